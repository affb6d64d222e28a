"""When the steps of a plan begin and end by its own estimates, and the chain of them that takes longest.

Each step starts as soon as all it depends on are done. Copies that share an instance's port wait for each other
beyond that; the plan's estimate adds what the busiest port needs more than the longest chain of copies has.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heappush

from spotserve.core.ids import instance_of
from spotserve.core.plan import PREPARING_KINDS
from spotserve.core.plan_text.table import Json

NEGLIGIBLE_S = 1e-6


@dataclass(frozen=True, slots=True)
class Span:
    """A step and when it runs, in seconds from the plan's start; the port is busy with it until `busy_until_s`."""

    step: Json
    begin_s: float
    end_s: float
    busy_until_s: float


@dataclass(frozen=True, slots=True)
class PathLine:
    """One line of the critical path: a step, or (None) what copies wait for the port that they share."""

    step: Json | None
    begin_s: float
    takes_s: float


def ports_of(step: Json) -> tuple[tuple[str, str], ...]:
    """(instance, direction) of the network ports that a step's bytes pass: none inside one instance."""
    if "source" not in step:
        return ()
    source, destination = instance_of(step["source"]), instance_of(step["destination"])
    return () if source == destination else ((source, "out"), (destination, "in"))


def free_spans(steps: Sequence[Json]) -> list[Span]:
    """When each step runs if ports were never shared, in file order (the times of the plan's estimate)."""
    return _spans(steps, link_bytes_per_s=None)


def port_spans(steps: Sequence[Json], *, link_bytes_per_s: float) -> list[Span]:
    """When each step runs if a port carries one copy at a time, the earliest first, in file order where equal."""
    return _spans(steps, link_bytes_per_s=link_bytes_per_s)


def _spans(steps: Sequence[Json], *, link_bytes_per_s: float | None) -> list[Span]:
    index_of = {step["id"]: index for index, step in reversed(list(enumerate(steps)))}
    befores = [[index_of[name] for name in step["depends_on"] if name in index_of] for step in steps]
    followers: list[list[int]] = [[] for _ in steps]
    for index, before in enumerate(befores):
        for earlier in before:
            followers[earlier].append(index)
    waiting = [len(before) for before in befores]
    spans: list[Span | None] = [None] * len(steps)
    ports: dict[tuple[str, str], float] = {}
    heap = [(_not_before_s(step), index) for index, step in enumerate(steps) if not waiting[index]]
    heapify(heap)
    while heap:
        ready_s, index = heappop(heap)
        step = steps[index]
        used = ports_of(step) if link_bytes_per_s is not None else ()
        begin_s = max([ready_s, *(ports.get(port, 0.0) for port in used)])
        if begin_s > ready_s:
            heappush(heap, (begin_s, index))
            continue
        end_s = begin_s + step["estimated_s"]
        busy_s = end_s
        if used and link_bytes_per_s is not None:
            busy_s = min(end_s, begin_s + step["bytes"] / link_bytes_per_s)
            ports |= dict.fromkeys(used, busy_s)
        spans[index] = Span(step, begin_s, end_s, busy_s)
        for follower in followers[index]:
            waiting[follower] -= 1
            if not waiting[follower]:
                known = [span.end_s for before in befores[follower] if (span := spans[before]) is not None]
                heappush(heap, (max([_not_before_s(steps[follower]), *known]), follower))
    # Steps of a cycle never come up; a picture of a bad plan still shows them, at its start.
    return [
        span if span is not None else Span(step, 0.0, step["estimated_s"], step["estimated_s"])
        for span, step in zip(spans, steps, strict=True)
    ]


def _not_before_s(step: Json) -> float:
    return float(step.get("not_before_s", 0.0))


def critical_path(plan: Json) -> list[PathLine]:
    """The chain of steps that makes `done_s`: the times of its lines, and the waits between them, sum up to it."""
    spans = free_spans(plan["steps"])
    if not spans:
        return []
    by_id = {span.step["id"]: span for span in reversed(spans)}
    chain: list[Span] = []
    seen: set[str] = set()
    last: Span | None = max(spans, key=lambda span: span.end_s)
    while last is not None and last.step["id"] not in seen:
        chain.append(last)
        seen.add(last.step["id"])
        before = [by_id[name] for name in last.step["depends_on"] if name in by_id]
        last = max(before, key=lambda span: span.end_s, default=None)
    chain.reverse()
    shared_s = plan["estimates"]["done_s"] - chain[-1].end_s
    return _lines(chain, shared_s if shared_s > NEGLIGIBLE_S else 0.0)


def _lines(chain: Sequence[Span], shared_s: float) -> list[PathLine]:
    """The chain, with the wait for shared ports behind the last copy that prepares."""
    copies = [index for index, span in enumerate(chain) if span.step["kind"] in PREPARING_KINDS]
    behind = copies[-1] if copies else len(chain) - 1
    lines: list[PathLine] = []
    for index, span in enumerate(chain):
        late_s = shared_s if index > behind else 0.0
        lines.append(PathLine(span.step, span.begin_s + late_s, span.end_s - span.begin_s))
        if index == behind and shared_s:
            lines.append(PathLine(None, span.end_s, shared_s))
    return lines
