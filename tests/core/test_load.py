"""The arrival rate: counted over a window, told when it has moved."""

from __future__ import annotations

from spotserve.core.load import LOAD_WINDOW_S, LoadWindow


def test_arrivals_count_for_one_window() -> None:
    """Tests that the rate is arrivals of the last window over its length, and that older ones are forgotten."""
    window = LoadWindow()
    for at_s in range(60):
        window.arrived(float(at_s), 2)
    assert window.sample(59.0) == 2 * 31 / LOAD_WINDOW_S
    assert window.sample(80.0) == 2 * 10 / LOAD_WINDOW_S
    assert window.sample(1000.0) == 0.0


def test_only_a_change_is_news() -> None:
    """Tests that the first rate is told, a tenth more is not, a fifth more is, and so is the end of all arrivals."""
    window = LoadWindow()
    window.arrived(0.0, 30)
    assert window.news(1.0) == 1.0
    window.arrived(2.0, 3)
    assert window.news(2.0) is None
    window.arrived(3.0, 3)
    assert window.news(3.0) == 1.2
    assert window.news(100.0) == 0.0
    assert window.news(105.0) is None
