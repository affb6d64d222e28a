"""The arrival rate as the controller learns it: counted over a sliding window, told when it has moved."""

from __future__ import annotations

from collections import deque

LOAD_WINDOW_S = 30.0
"""The paper's window (section 3.2)."""
LOAD_PERIOD_S = 5.0
TOLD_CHANGE = 0.1
"""A rate is told again when it differs by more than this share from the one told last."""


class LoadWindow:
    """Counts arrivals; the daemon and the simulator ask it every `LOAD_PERIOD_S`."""

    def __init__(self) -> None:
        self._arrivals: deque[float] = deque()
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
        """The rate, if the controller should hear of it."""
        load_rps = self.sample(at_s)
        if abs(load_rps - self._told_rps) <= TOLD_CHANGE * max(load_rps, self._told_rps):
            return None
        self._told_rps = load_rps
        return load_rps
