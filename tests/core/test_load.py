"""The arrival rate: counted over a window, told when it has moved."""

from __future__ import annotations

import numpy as np
import pytest

from spotserve.core.load import (
    LOAD_PERIOD_S,
    LOAD_WINDOW_S,
    PEAK_S,
    REMEMBERED_S,
    LoadWindow,
    Samples,
    comes_in_bursts,
    load_to_serve,
    sampled,
)
from spotserve.core.state import ClusterState
from tests.specs import small_spec


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


def known(loads: Samples, *, at_s: float, policy: str = "live") -> ClusterState:
    """A controller that was told these rates."""
    spec = small_spec().model_copy(update={"policy": policy})
    return ClusterState(spec=spec, loads=loads, load_rps=loads[-1][1] if loads else 0.0, at_s=at_s)


def test_the_highest_rate_of_five_minutes_is_planned_for() -> None:
    """Tests that `live` plans for the peak of the window, a rate counting until the next one, others for the moment."""
    loads = sampled(sampled(sampled((), 0.0, 5.0), 100.0, 9.0), 110.0, 2.0)
    assert load_to_serve(known(loads, at_s=110.0)) == 9.0
    assert load_to_serve(known(loads, at_s=110.0, policy="paper")) == 2.0
    assert load_to_serve(known(loads, at_s=109.0 + PEAK_S)) == 9.0
    assert load_to_serve(known(loads, at_s=110.0 + PEAK_S)) == 2.0
    assert load_to_serve(known((), at_s=0.0)) == 0.0


def rates(cv: float, mean_rps: float, *, seed: int, until_s: float = 1200.0) -> Samples:
    """What a window tells of arrivals whose gaps are Gamma distributed with this coefficient of variation."""
    drawn = np.random.default_rng(seed)
    shape = 1.0 / cv**2
    arrivals = np.cumsum(drawn.gamma(shape, 1.0 / (mean_rps * shape), size=int(4 * mean_rps * until_s) + 100))
    window = LoadWindow()
    samples: Samples = ()
    for at_s in np.arange(0.0, until_s, LOAD_PERIOD_S):
        for arrival_s in arrivals[(arrivals >= at_s - LOAD_PERIOD_S) & (arrivals < at_s)]:
            window.arrived(float(arrival_s))
        news = window.news(float(at_s))
        samples = samples if news is None else sampled(samples, float(at_s), news)
    return samples


@pytest.mark.parametrize(("mean_rps", "expected"), [(0.2, 10), (1.5, 10), (40.0, 0)])
def test_bursts_are_told_from_chance(mean_rps: float, expected: int) -> None:
    """Tests that arrivals of CV 6 are bursts where one stands out, and that Poisson arrivals never are."""
    for cv, count in ((1.0, 0), (6.0, expected)):
        seeds = range(10)
        assert count == sum(comes_in_bursts(known(rates(cv, mean_rps, seed=seed), at_s=1200.0)) for seed in seeds)


def test_a_burst_is_forgotten() -> None:
    """Tests that a burst counts for half an hour, and that the first rate that is known is none."""
    loads = ((0.0, 1.0), (400.0, 9.0), (430.0, 1.0))
    assert not comes_in_bursts(known(loads[:1], at_s=0.0))
    assert not comes_in_bursts(known(loads[:1], at_s=90.0))
    assert comes_in_bursts(known(loads, at_s=430.0))
    assert comes_in_bursts(known(loads, at_s=429.0 + REMEMBERED_S))
    assert not comes_in_bursts(known(loads, at_s=431.0 + REMEMBERED_S))
