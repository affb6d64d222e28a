"""When each copy starts if a port carries one at a time: the list schedule of whole transfers.

A port that falls free takes the first waiting copy, in order of priority, whose other port is free too. No port idles
while a copy waits for it and its partner alone, so the end is below the sum of the fullest out-port and the fullest
in-port, at most twice the bound (open shop).
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from spotserve.core.ids import InstanceId
from spotserve.solvers.migrate.ports import Ports


@dataclass(frozen=True, slots=True)
class Copy:
    """One transfer between ports; the source None is storage. Lower priorities go first, then lower places in line."""

    source: InstanceId | None
    destination: InstanceId
    bytes: int
    priority: int


def list_schedule(copies: Sequence[Copy], ports: Ports) -> tuple[int, ...]:
    """The start of each copy in ticks; one inside an instance passes no port and starts at once."""
    line = sorted(range(len(copies)), key=lambda number: copies[number].priority)
    waiting: dict[tuple[str, str], dict[int, None]] = defaultdict(dict)
    used = [_ports_of(copy) for copy in copies]
    start = [0] * len(copies)
    place = {number: index for index, number in enumerate(line)}
    for number in line:
        for port in used[number]:
            waiting[port][number] = None
    busy: set[tuple[str, str]] = set()
    ends: list[tuple[int, int]] = []
    ready = [number for number in line if used[number]]
    now = 0
    while True:
        for number in ready:
            if busy.isdisjoint(used[number]):
                start[number] = now
                busy.update(used[number])
                for port in used[number]:
                    del waiting[port][number]
                heapq.heappush(ends, (now + copy_ticks(copies[number], ports), number))
        if not ends:
            return tuple(start)
        now = ends[0][0]
        freed: dict[int, None] = {}
        while ends and ends[0][0] == now:
            _, number = heapq.heappop(ends)
            busy.difference_update(used[number])
            for port in used[number]:
                freed.update(waiting[port])
        ready = sorted(freed, key=place.__getitem__)


def makespan(copies: Sequence[Copy], start: Sequence[int], ports: Ports) -> int:
    """When the last copy that passes a port ends, in ticks."""
    pairs = zip(copies, start, strict=True)
    return max((begin + copy_ticks(copy, ports) for copy, begin in pairs if _ports_of(copy)), default=0)


def copy_ticks(copy: Copy, ports: Ports) -> int:
    """How long a copy takes alone: the slower of its ports decides."""
    if copy.source is None:
        rate = ports.storage_bytes_per_s
    else:
        rate = min(ports.rate(copy.source), ports.rate(copy.destination))
    return ports.ticks(copy.bytes, rate)


def _ports_of(copy: Copy) -> tuple[tuple[str, str], ...]:
    """What a copy occupies: two ports, or the instance's reader of storage."""
    if copy.source == copy.destination:
        return ()
    if copy.source is None:
        return (("storage", copy.destination),)
    return ("out", copy.source), ("in", copy.destination)
