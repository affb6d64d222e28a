"""The arrival rate as the controller learns it: counted over a sliding window, told when it has moved."""

from __future__ import annotations

from collections import deque
from typing import Protocol

LOAD_WINDOW_S = 30.0
"""The paper's window (section 3.2)."""
LOAD_PERIOD_S = 5.0
TOLD_CHANGE = 0.1
"""A rate is told again when it differs by more than this share from the one told last."""
PEAK_S = 300.0
"""How long a burst is remembered: who shrinks in every lull is too small for the next burst."""

Samples = tuple[tuple[float, float], ...]
"""(time, rate) of each sample, oldest first."""


class Known(Protocol):
    """What the controller knows of its load."""

    @property
    def policy(self) -> str:
        """Who decides."""

    @property
    def load_rps(self) -> float:
        """The rate now."""

    @property
    def at_s(self) -> float:
        """Now."""

    @property
    def loads(self) -> Samples:
        """The samples that count."""


def sampled(samples: Samples, at_s: float, load_rps: float) -> Samples:
    """The samples with one more; of those that are too old the last one stays, as its rate held until the next."""
    newest_old = max((at for at, _ in samples if at <= at_s - PEAK_S), default=float("-inf"))
    return (*(one for one in samples if one[0] >= newest_old), (at_s, load_rps))


def load_to_serve(known: Known) -> float:
    """The rate to plan for: the highest of the last `PEAK_S`; the published policies take the rate of the moment."""
    if known.policy != "live":
        return known.load_rps
    return max((rate for _, rate in sampled(known.loads, known.at_s, known.load_rps)), default=0.0)


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
