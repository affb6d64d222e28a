"""Our trace format: JSON, `{"format_version", "events": […]}`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field, ValidationError, model_validator

from spotserve.cloud.traces.fleet import Fleet
from spotserve.cloud.traces.strict_lines import event_lines, parse_json
from spotserve.core.frozen import Frozen
from spotserve.core.snapshot import Market
from spotserve.core.trace import DEFAULT_GRACE_S, Trace, TraceEvent, TraceKind

FORMAT_VERSION: Literal["0.1"] = "0.1"
MAX_EVENTS = 1_000_000
MAX_ADDED = 1024
MAX_SECONDS = 366 * 86_400.0
MAX_NAME = 200
MAX_NOTE = 2000
MAX_NOTES = 100


class TraceEntry(Frozen):
    """One event as our file has it. `count` of a notice or kill takes the longest-living instances."""

    at_s: float = Field(ge=0, le=MAX_SECONDS)
    kind: TraceKind
    count: int | None = Field(default=None, ge=1, le=MAX_ADDED)
    instances: tuple[Annotated[str, Field(min_length=1, max_length=MAX_NAME)], ...] | None = Field(
        default=None, min_length=1, max_length=MAX_ADDED
    )
    grace_s: float | None = Field(default=None, ge=0, le=86_400)
    rps: float | None = Field(default=None, ge=0)
    zone: str = Field(default="", max_length=MAX_NAME, exclude_if=lambda zone: not zone)
    gpu_type: str = Field(default="", max_length=MAX_NAME, exclude_if=lambda gpu_type: not gpu_type)
    market: Market = Field(default="spot", exclude_if=lambda market: market == "spot")

    @model_validator(mode="after")
    def _fields_of_its_kind(self) -> TraceEntry:
        if self.kind == "load":
            if self.rps is None or self.count is not None or self.instances is not None:
                raise ValueError("a load has rps and neither count nor instances")
        elif (self.count is None) == (self.instances is None) or self.rps is not None:
            raise ValueError(f"{self.kind} has either count or instances, and no rps")
        if self.grace_s is not None and self.kind != "notice":
            raise ValueError(f"{self.kind} has no grace_s")
        if self.kind != "add" and (self.zone or self.gpu_type or self.market != "spot"):
            raise ValueError(f"{self.kind} has neither zone nor gpu_type nor market")
        return self


class TraceFile(Frozen):
    """Our trace format."""

    format_version: Literal["0.1"]
    source: str = Field(default="", max_length=MAX_NOTE)
    notes: tuple[Annotated[str, Field(max_length=MAX_NOTE)], ...] = Field(default=(), max_length=MAX_NOTES)
    end_s: float | None = Field(default=None, ge=0, le=MAX_SECONDS)
    events: tuple[TraceEntry, ...] = Field(max_length=MAX_EVENTS)


def our_trace(text: str, fleet: Fleet, *, name: str) -> Trace:
    """The trace that a text of our JSON format holds, under a name."""
    document = parse_json(text, fleet, first_line=1)
    lines = event_lines(text)
    try:
        trace = TraceFile.model_validate(document)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        index = first["loc"][1] if len(first["loc"]) > 1 and first["loc"][0] == "events" else None
        place = ".".join(str(part) for part in first["loc"]) or "the document"
        line = lines[index] if isinstance(index, int) and index < len(lines) else 1
        fleet.refuse(line, f"{place}: {first['msg']}")
    return Trace(
        name=name,
        events=tuple(_our_events(trace, lines, fleet)),
        end_s=trace.end_s,
        source=trace.source,
        notes=trace.notes,
    )


def _our_events(trace: TraceFile, lines: list[int], fleet: Fleet) -> Iterator[TraceEvent]:
    for line, entry in zip(lines, trace.events, strict=True):
        fleet.advance(entry.at_s, line)
        yield our_event(entry, fleet, line)


def our_event(entry: TraceEntry, fleet: Fleet, line: int) -> TraceEvent:
    """One entry with its instances found and mapped."""
    if entry.kind == "load":
        return TraceEvent(at_s=entry.at_s, kind="load", rps=entry.rps)
    if entry.kind == "add":
        added = (
            fleet.add_count(entry.count, line) if entry.count is not None else fleet.add(entry.instances or (), line)
        )
        return TraceEvent(
            at_s=entry.at_s,
            kind="add",
            instances=added,
            zone=entry.zone,
            gpu_type=entry.gpu_type,
            market=entry.market,
        )
    names = fleet.oldest(entry.count, line) if entry.count is not None else fleet.named(entry.instances or (), line)
    if entry.kind == "kill":
        return TraceEvent(at_s=entry.at_s, kind="kill", instances=tuple(fleet.remove(name) for name in names))
    grace_s = DEFAULT_GRACE_S if entry.grace_s is None else entry.grace_s
    return TraceEvent(at_s=entry.at_s, kind="notice", instances=fleet.doom(names, grace_s), grace_s=grace_s)


def trace_json(trace: Trace) -> str:
    """A trace in our format, one event to a line; read again it is the same trace.

    Its instances stand under our ids, so it is read with as many `living` ones as it was. Of what is longer than our
    format has room for, notes are cut and an event becomes several.
    """
    entries = [entry.model_dump_json(exclude_defaults=True) for event in trace.events for entry in _entries(event)]
    head = TraceFile(
        format_version=FORMAT_VERSION,
        source=trace.source[:MAX_NOTE],
        notes=tuple(note[:MAX_NOTE] for note in trace.notes[:MAX_NOTES]),
        end_s=trace.end_s,
        events=(),
    ).model_dump(mode="json", exclude_defaults=True, exclude={"events"})
    fields = [f"{json.dumps(key)}: {json.dumps(value, ensure_ascii=False)}" for key, value in head.items()]
    body = ",\n".join(f" {entry}" for entry in entries)
    return "{" + ",\n".join([*fields, f'"events": [\n{body}\n]']) + "}\n"


def _entries(event: TraceEvent) -> Iterator[TraceEntry]:
    fields = event.model_dump(exclude={"instances"})
    for first in range(0, max(1, len(event.instances)), MAX_ADDED):
        yield TraceEntry(instances=event.instances[first : first + MAX_ADDED] or None, **fields)
