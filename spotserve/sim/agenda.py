"""What will happen in virtual time: a heap keyed by (time, priority, sequence)."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from typing import Protocol

from spotserve.core.events import Event

Happening = Callable[[], Event | None]
"""Something that happens; the event that the controller is told of, if any."""

FIRST = 0
NORMAL = 1
LAST = 2


class Clock(Protocol):
    """What a replica needs of virtual time."""

    @property
    def now_s(self) -> float:
        """The time."""

    def at(self, at_s: float, happen: Happening) -> None:
        """Let something happen at `at_s`, now if that has passed."""


class Agenda:
    """The clock of a simulation jumps from one happening to the next."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self._heap: list[tuple[float, int, int, Happening]] = []
        self._sequence = 0

    def at(self, at_s: float, happen: Happening, *, priority: int = NORMAL) -> None:
        """Let something happen at `at_s`, now if that has passed; equal times in order of priority, then of calls."""
        self._sequence += 1
        heapq.heappush(self._heap, (max(at_s, self.now_s), priority, self._sequence, happen))

    def after(self, delay_s: float, happen: Happening, *, priority: int = NORMAL) -> None:
        """Let something happen `delay_s` from now."""
        self.at(self.now_s + delay_s, happen, priority=priority)

    def next_event(self, until_s: float) -> Event | None:
        """Let things happen up to `until_s` until one of them concerns the controller; None when none does."""
        while self._heap and self._heap[0][0] <= until_s:
            at_s, _, _, happen = heapq.heappop(self._heap)
            self.now_s = at_s
            event = happen()
            if event is not None:
                return event
        return None
