"""A capacity trace as values: when instances come, are noticed, are killed, and how the load moves.

Whoever reads traces (`cloud`) makes these, and whoever plays them (the daemon, the simulator) takes them. Instances
have our ids, `i0`, `i1`, … in the order of arrival.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import groupby, pairwise
from typing import Literal

from pydantic import model_validator

from spotserve.core.frozen import Frozen
from spotserve.core.ids import InstanceId
from spotserve.core.snapshot import Market
from spotserve.errors import SpecError

TraceKind = Literal["add", "notice", "kill", "load"]
DEFAULT_GRACE_S = 30.0
"""The paper's grace period (section 3.2)."""


class TraceEvent(Frozen):
    """One event to act on at `at_s`, with our ids. Where, what and how an instance is bought stand at its `add`."""

    at_s: float
    kind: TraceKind
    instances: tuple[InstanceId, ...] = ()
    grace_s: float | None = None
    rps: float | None = None
    zone: str = ""
    gpu_type: str = ""
    market: Market = "spot"

    @model_validator(mode="after")
    def _bought_when_added(self) -> TraceEvent:
        if self.kind != "add" and (self.zone or self.gpu_type or self.market != "spot"):
            raise ValueError(f"{self.kind} has neither zone nor gpu_type nor market")
        return self


class Trace(Frozen):
    """A whole trace in order of time. `end_s` is where it says that the run is over, if it does.

    `source` says where it comes from, and `notes` how what it tells was scaled or assumed, one sentence each.
    """

    name: str
    events: tuple[TraceEvent, ...]
    end_s: float | None = None
    source: str = ""
    notes: tuple[str, ...] = ()


@dataclass(slots=True)
class _Living:
    """Who lives while a trace is gone through, in order of arrival."""

    bought: dict[InstanceId, TraceEvent] = field(default_factory=dict)
    deadlines_s: dict[InstanceId, float] = field(default_factory=dict)

    def due(self, at_s: float) -> list[tuple[float, InstanceId]]:
        """Noticed instances whose deadline is not after `at_s`, earliest first."""
        return sorted((deadline_s, name) for name, deadline_s in self.deadlines_s.items() if deadline_s <= at_s)

    def remove(self, instance: InstanceId) -> bool:
        """It is gone; False if it was already."""
        self.deadlines_s.pop(instance, None)
        return self.bought.pop(instance, None) is not None

    def act(self, event: TraceEvent) -> None:
        """What an event does to the fleet."""
        if event.kind == "add":
            self.bought.update(dict.fromkeys(event.instances, event))
        for instance in event.instances:
            if event.kind == "kill":
                self.remove(instance)
            elif event.kind == "notice" and instance in self.bought:
                deadline_s = event.at_s + (DEFAULT_GRACE_S if event.grace_s is None else event.grace_s)
                self.deadlines_s[instance] = min(deadline_s, self.deadlines_s.get(instance, deadline_s))


def _first(living: int) -> _Living:
    """The fleet that lives when a trace begins."""
    start = TraceEvent(at_s=0.0, kind="add", instances=tuple(InstanceId(f"i{index}") for index in range(living)))
    fleet = _Living()
    fleet.act(start)
    return fleet


def instance_counts(trace: Trace, *, living: int = 0) -> tuple[tuple[float, int], ...]:
    """(time, instances) from 0 s on, at each change; a noticed instance counts until its deadline.

    Args:
        trace: the trace.
        living: instances that live when it begins.
    """
    fleet = _first(living)
    counts: dict[float, int] = {0.0: living}

    def expire(at_s: float) -> None:
        for deadline_s, instance in fleet.due(at_s):
            fleet.remove(instance)
            counts[deadline_s] = len(fleet.bought)

    for event in trace.events:
        expire(event.at_s)
        fleet.act(event)
        counts[event.at_s] = len(fleet.bought)
    expire(float("inf"))
    return tuple(_changes(counts))


def instance_seconds(trace: Trace, *, until_s: float, living: int = 0) -> float:
    """Seconds that instances lived until a time, summed over them: what a cloud bills, but for their start-up.

    Args:
        trace: the trace.
        until_s: where the bill ends.
        living: instances that live when it begins.
    """
    counts = (*instance_counts(trace, living=living), (math.inf, 0))
    return math.fsum(
        count * (min(after_s, until_s) - at_s) for (at_s, count), (after_s, _) in pairwise(counts) if at_s < until_s
    )


def _changes(counts: dict[float, int]) -> Iterator[tuple[float, int]]:
    last = None
    for at_s, count in counts.items():
        if count != last:
            yield at_s, count
        last = count


def window(trace: Trace, *, start_s: float, stop_s: float, living: int = 0) -> Trace:
    """The piece [start_s, stop_s) of a trace, its time counted from 0.

    Those that live at `start_s` are added at 0 under new ids, and a notice that runs then is given at 0 with what is
    left of its grace period.

    Args:
        trace: the trace.
        start_s: where the piece begins.
        stop_s: where it ends.
        living: instances that live when the whole trace begins.

    Raises:
        SpecError: the piece is empty.
    """
    if not 0 <= start_s < stop_s:
        raise SpecError(f"window {start_s:g} to {stop_s:g} s is not a piece of time", hint="0 <= start_s < stop_s")
    fleet = _first(living)
    rps: float | None = None
    for event in trace.events:
        if event.at_s > start_s:
            break
        for _, instance in fleet.due(event.at_s):
            fleet.remove(instance)
        fleet.act(event)
        rps = event.rps if event.kind == "load" else rps
    for _, instance in fleet.due(start_s):
        fleet.remove(instance)
    ids: dict[InstanceId, InstanceId] = {}
    events = [*_opening(fleet, ids, start_s=start_s, rps=rps), *_inside(trace, ids, start_s=start_s, stop_s=stop_s)]
    return trace.model_copy(
        update={
            "events": tuple(events),
            "end_s": stop_s - start_s,
            "notes": (*trace.notes, f"{start_s:g} to {stop_s:g} s of it, counted from 0"),
        }
    )


def delayed(trace: Trace, *, lag_s: float) -> Trace:
    """The trace with every instance that it adds after 0 ready so much later, as starting one takes time.

    A notice that comes before its instance is ready is given when it is, with what is left of the grace period; an
    instance that is gone before it is ready has no event. Ids are given anew, in the order of arrival.
    """
    if not 0 <= lag_s < math.inf:
        raise SpecError(f"lag_s {lag_s:g} is not 0 or more seconds")
    ready_s = {
        name: event.at_s + lag_s * (event.at_s > 0)
        for event in trace.events
        if event.kind == "add"
        for name in event.instances
    }
    gone_s = _ends(trace)
    events: list[TraceEvent] = []
    for event in trace.events:
        arrived = [name for name in event.instances if gone_s.get(name, math.inf) > ready_s.get(name, 0.0)]
        if event.kind == "load":
            events.append(event)
        for at_s, members in groupby(arrived, key=lambda name: max(event.at_s, ready_s.get(name, 0.0))):
            update: dict[str, object] = {"at_s": at_s, "instances": tuple(members)}
            if event.grace_s is not None and at_s > event.at_s:
                update["grace_s"] = event.at_s + event.grace_s - at_s
            events.append(event.model_copy(update=update))
    events.sort(key=lambda event: event.at_s)
    note = f"an instance is ready {lag_s:g} s after the trace adds it"
    return trace.model_copy(update={"events": tuple(_renumbered(events)), "notes": (*trace.notes, note)})


def _ends(trace: Trace) -> dict[InstanceId, float]:
    """When each instance is gone, of those that go."""
    ends: dict[InstanceId, float] = {}
    for event in trace.events:
        if event.kind in ("notice", "kill"):
            grace_s = 0.0 if event.kind == "kill" else DEFAULT_GRACE_S if event.grace_s is None else event.grace_s
            for name in event.instances:
                ends[name] = min(event.at_s + grace_s, ends.get(name, math.inf))
    return ends


def _renumbered(events: list[TraceEvent]) -> Iterator[TraceEvent]:
    """The events with the ids of added instances in order of arrival, from the first of them on."""
    added = [name for event in events if event.kind == "add" for name in event.instances]
    first = min((int(name.removeprefix("i")) for name in added), default=0)
    ids = {name: InstanceId(f"i{first + index}") for index, name in enumerate(added)}
    for event in events:
        yield event.model_copy(update={"instances": tuple(ids.get(name, name) for name in event.instances)})


def _opening(
    fleet: _Living, ids: dict[InstanceId, InstanceId], *, start_s: float, rps: float | None
) -> Iterator[TraceEvent]:
    """What a piece of a trace begins with; `ids` is filled in."""

    def purchase(instance: InstanceId) -> tuple[str, str, Market]:
        bought = fleet.bought[instance]
        return bought.zone, bought.gpu_type, bought.market

    for (zone, gpu_type, market), members in groupby(fleet.bought, key=purchase):
        named = tuple(ids.setdefault(instance, InstanceId(f"i{len(ids)}")) for instance in members)
        yield TraceEvent(at_s=0.0, kind="add", instances=named, zone=zone, gpu_type=gpu_type, market=market)
    for instance, deadline_s in fleet.deadlines_s.items():
        yield TraceEvent(at_s=0.0, kind="notice", instances=(ids[instance],), grace_s=deadline_s - start_s)
    if rps is not None:
        yield TraceEvent(at_s=0.0, kind="load", rps=rps)


def _inside(trace: Trace, ids: dict[InstanceId, InstanceId], *, start_s: float, stop_s: float) -> Iterator[TraceEvent]:
    """The events of a piece, with its ids and its time."""
    for event in trace.events:
        if not start_s < event.at_s < stop_s:
            continue
        if event.kind == "add":
            for instance in event.instances:
                ids[instance] = InstanceId(f"i{len(ids)}")
        named = tuple(ids[instance] for instance in event.instances)
        yield event.model_copy(update={"at_s": event.at_s - start_s, "instances": named})
