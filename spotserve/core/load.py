"""The arrival rate as the controller learns it: counted over a sliding window, told when it has moved."""

from __future__ import annotations

import math
from collections import deque
from itertools import pairwise

from spotserve.core.state import ClusterState

LOAD_WINDOW_S = 30.0
"""The paper's window (section 3.2)."""
LOAD_PERIOD_S = 5.0
TOLD_CHANGE = 0.1
"""A rate is told again when it differs by more than this share from the one told last."""
PEAK_S = 300.0
"""How long a rate is planned for: who shrinks in every lull is too small for what comes after it."""
REMEMBERED_S = 1800.0
"""How long a burst counts as one of several."""
BURST_RATIO = 2.0
"""A rate of more than so many times the mean is a burst, if chance does not explain it."""
CHANCE_DEVIATIONS = 5.0
"""A rate within so many standard deviations of the mean may be chance."""

Samples = tuple[tuple[float, float], ...]
"""(time, rate) of each sample, oldest first."""


def sampled(samples: Samples, at_s: float, load_rps: float) -> Samples:
    """The samples with one more; of those that are too old the last one stays, as its rate held until the next."""
    return (*_since(samples, at_s - REMEMBERED_S), (at_s, load_rps))


def load_to_serve(state: ClusterState) -> float:
    """The rate to plan for: the highest of the last `PEAK_S`; the published policies take the rate of the moment."""
    if state.policy != "live":
        return state.load_rps
    return max((rate for _, rate in _since(_until_now(state), state.at_s - PEAK_S)), default=0.0)


def comes_in_bursts(state: ClusterState) -> bool:
    """Whether the highest rate that is remembered stands out: from the mean, and from what chance makes of it.

    Arrivals that know nothing of each other come to a window of n on average within a few times sqrt(n) of it.
    """
    samples = _until_now(state)
    since_s = samples[0][0]
    if state.at_s <= since_s:
        return False
    mean_rps = sum(rate * (until_s - at_s) for (at_s, rate), (until_s, _) in pairwise(samples)) / (state.at_s - since_s)
    by_chance_rps = CHANCE_DEVIATIONS * math.sqrt(mean_rps / LOAD_WINDOW_S)
    return max(rate for _, rate in samples) > mean_rps + max(by_chance_rps, mean_rps * (BURST_RATIO - 1))


def _until_now(state: ClusterState) -> Samples:
    """What is remembered, and that the newest rate holds until now."""
    return sampled(state.loads, state.at_s, state.load_rps)


def _since(samples: Samples, since_s: float) -> Samples:
    """The samples that count after `since_s`, the one that held then included."""
    first_s = max((at_s for at_s, _ in samples if at_s <= since_s), default=-math.inf)
    return tuple(one for one in samples if one[0] >= first_s)


class LoadWindow:
    """Counts arrivals; the daemon and the simulator ask it every `LOAD_PERIOD_S`."""

    def __init__(self) -> None:
        self._arrivals: deque[float] = deque()
        self._since_s: float | None = None
        self._told_rps = 0.0

    def arrived(self, at_s: float, count: int = 1) -> None:
        """So many requests were accepted at `at_s`, which never runs backwards."""
        self._arrivals.extend([at_s] * count)

    def sample(self, at_s: float) -> float:
        """Arrivals per second over the window that ends at `at_s`."""
        while self._arrivals and self._arrivals[0] < at_s - LOAD_WINDOW_S:
            self._arrivals.popleft()
        return len(self._arrivals) / LOAD_WINDOW_S

    def news(self, at_s: float) -> float | None:
        """The rate, if the controller should hear of it; before the first window is over too few are counted."""
        load_rps = self.sample(at_s)
        self._since_s = at_s if self._since_s is None else self._since_s
        if at_s < self._since_s + LOAD_WINDOW_S:
            return None
        if abs(load_rps - self._told_rps) <= TOLD_CHANGE * max(load_rps, self._told_rps):
            return None
        self._told_rps = load_rps
        return load_rps
