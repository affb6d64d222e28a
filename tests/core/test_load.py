"""The arrival rate: counted over a window, told when it has moved."""

from __future__ import annotations

from dataclasses import dataclass

from spotserve.core.load import LOAD_WINDOW_S, PEAK_S, LoadWindow, Samples, load_to_serve, sampled


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
    assert window.news(0.0) is None
    window.arrived(20.0, 30)
    assert window.news(31.0) == 1.0
    window.arrived(32.0, 3)
    assert window.news(32.0) is None
    window.arrived(33.0, 3)
    assert window.news(33.0) == 1.2
    assert window.news(100.0) == 0.0
    assert window.news(105.0) is None


def test_no_rate_before_the_first_window_is_over() -> None:
    """Tests that arrivals of a few seconds are not told as the rate of a whole window."""
    window = LoadWindow()
    window.arrived(0.0, 30)
    assert [window.news(at_s) for at_s in (0.0, 5.0, 25.0)] == [None, None, None]
    assert window.news(30.0) == 1.0


@dataclass(frozen=True)
class Known:
    """What a controller knows of its load."""

    policy: str
    load_rps: float
    at_s: float
    loads: Samples


def test_the_highest_rate_of_five_minutes_is_planned_for() -> None:
    """Tests that `live` plans for the peak of the window, a rate counting until the next one, others for the moment."""
    loads = sampled(sampled(sampled((), 0.0, 5.0), 100.0, 9.0), 110.0, 2.0)
    assert load_to_serve(Known("live", 2.0, 110.0, loads)) == 9.0
    assert load_to_serve(Known("paper", 2.0, 110.0, loads)) == 2.0
    assert load_to_serve(Known("live", 2.0, 109.0 + PEAK_S, loads)) == 9.0
    assert load_to_serve(Known("live", 2.0, 110.0 + PEAK_S, loads)) == 2.0
    assert load_to_serve(Known("live", 0.0, 0.0, ())) == 0.0


def test_samples_do_not_pile_up() -> None:
    """Tests that of what is older than the window only the rate that held at its beginning is kept."""
    loads: Samples = ()
    for at_s in range(0, 2000, 5):
        loads = sampled(loads, float(at_s), float(at_s))
    assert len(loads) == PEAK_S / 5 + 1
    assert loads[0][0] == 1995 - PEAK_S
