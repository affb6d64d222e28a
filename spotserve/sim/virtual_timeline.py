"""Virtual time: a heap of what will happen, and the lines between the coordinator and the instances."""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from spotserve.core import events as ev
from spotserve.core.ids import GpuId, InstanceId, instance_of

Happening = Callable[[], ev.Event | None]
"""Something that happens; the event that the controller is told of, if any."""

GONE = float("inf")


@dataclass(slots=True)
class VirtualLink:
    """An instance's line to the coordinator: in order both ways; cut, it holds back what is sent."""

    open_at_s: float = 0.0
    slowness: float = 1.0
    last_up_s: float = 0.0
    last_down_s: float = 0.0


@dataclass(frozen=True, slots=True)
class VirtualRates:
    """How fast the virtual machines are."""

    join_s: float = 1.0
    solve_s: float = 0.05
    iteration_s: float = 0.02
    step_s: float = 0.01
    commit_s: float = 0.02
    link_bytes_per_s: float = 1e8
    jitter: float = 0.5


class VirtualTimeline:
    """A clock that jumps to the next thing that happens; a coordinator's own affairs end with it."""

    def __init__(self, *, seed: int, rates: VirtualRates) -> None:
        self.random = random.Random(seed)
        self.rates = rates
        self.at_s = 0.0
        self.links: dict[InstanceId, VirtualLink] = {}
        self._heap: list[tuple[float, int, Happening, bool]] = []
        self._is_down = False
        """Whether there is no coordinator now."""
        self._count = 0

    def after(self, delay_s: float, happen: Happening, *, survives: bool = True) -> int:
        """Let something happen `delay_s` from now; a coordinator's own affairs do not survive its death."""
        return self._push(self.at_s + delay_s, happen, survives=survives)

    def _push(self, at_s: float, happen: Happening, *, survives: bool) -> int:
        self._count += 1
        heapq.heappush(self._heap, (at_s, self._count, happen, survives))
        return self._count

    def at(self, at_s: float, make: Callable[[float], ev.Event]) -> None:
        """Schedule an event at an absolute time."""
        self.after(max(0.0, at_s - self.at_s), lambda: make(self.at_s))

    def link(self, instance: InstanceId) -> VirtualLink:
        """An instance's line to the coordinator."""
        return self.links.setdefault(instance, VirtualLink())

    def _link_of(self, gpu: GpuId) -> VirtualLink:
        return self.link(instance_of(gpu))

    def is_cut(self, instance: InstanceId) -> bool:
        """Whether nothing gets through to an instance now."""
        return self.link(instance).open_at_s > self.at_s

    def up(self, instance: InstanceId, delay_s: float, happen: Happening) -> None:
        """A message of a worker to the coordinator: in order, lost if that dies before it has read it."""
        link = self.link(instance)
        link.last_up_s = max(self.at_s + delay_s * link.slowness, link.open_at_s, link.last_up_s)
        if not self._is_down and link.last_up_s < GONE:
            self._push(link.last_up_s, happen, survives=False)

    def down(self, instances: Iterable[InstanceId], act: Callable[[], None]) -> None:
        """A message of the coordinator to workers: in order, and once sent it outlives the sender."""
        ways = [self.link(instance) for instance in instances]
        delay_s = self._spread(self.rates.step_s / 2)
        at_s = max(max(self.at_s + delay_s * way.slowness, way.open_at_s, way.last_down_s) for way in ways)

        def arrive() -> None:
            act()

        if at_s < GONE:
            for way in ways:
                way.last_down_s = at_s
            self._push(at_s, arrive, survives=True)

    def _spread(self, mean_s: float) -> float:
        return mean_s * self.random.uniform(1 - self.rates.jitter, 1 + self.rates.jitter)
