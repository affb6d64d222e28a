"""Capacity traces: when instances come, are noticed, are killed, and how the load moves.

Two formats are read into one `Trace`. Ours is JSON (`{"format_version", "events": […]}`). The availability format
of the SpotServe paper (Miao et al., ASPLOS'24, section 6.1) has one JSON array per line; an instance is gone at
the stamp of its `remove`, and its replayer acts on every event one grace period of 30 s before the stamp.

A trace names instances as it likes. Reading it maps the names to ours in the order of arrival: the daemon starts
with `i0 … i(living - 1)`, the first one that the trace adds is the next. What cannot happen is refused with its
line: time running backwards, a removal of what is not there, an addition of what lives or has been removed.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NoReturn

from pydantic import Field, ValidationError, model_validator

from spotserve.core.frozen import Frozen
from spotserve.core.ids import InstanceId
from spotserve.errors import SpecError

FORMAT_VERSION = "0.1"
GRACE_S = 30.0
"""The paper's grace period; its replayer acts this long before every stamp."""
MAX_TRACE_BYTES = 64 * 2**20
MAX_EVENTS = 1_000_000
MAX_ADDED = 1024
MAX_SECONDS = 366 * 86_400.0

TraceKind = Literal["add", "notice", "kill", "load"]
OUR_ID = re.compile(r"i\d+")
PAPER_EXAMPLE = 'write [240000, "add", {"nodes": ["node-7"]}]'


class TraceEntry(Frozen):
    """One event as our file has it. `count` of a notice or kill takes the longest-living instances."""

    at_s: float = Field(ge=0, le=MAX_SECONDS)
    kind: TraceKind
    count: int | None = Field(default=None, ge=1, le=MAX_ADDED)
    instances: tuple[str, ...] | None = Field(default=None, min_length=1, max_length=MAX_ADDED)
    grace_s: float | None = Field(default=None, ge=0, le=86_400)
    rps: float | None = Field(default=None, ge=0)

    @model_validator(mode="after")
    def _fields_of_its_kind(self) -> TraceEntry:
        if self.kind == "load":
            if self.rps is None or self.count is not None or self.instances is not None:
                raise ValueError("a load has rps and neither count nor instances")
        elif (self.count is None) == (self.instances is None) or self.rps is not None:
            raise ValueError(f"{self.kind} has either count or instances, and no rps")
        if self.grace_s is not None and self.kind != "notice":
            raise ValueError(f"{self.kind} has no grace_s")
        return self


class TraceFile(Frozen):
    """Our trace format."""

    format_version: Literal["0.1"]
    events: tuple[TraceEntry, ...] = Field(max_length=MAX_EVENTS)


class TraceEvent(Frozen):
    """One event to act on at `at_s`, with our ids."""

    at_s: float
    kind: TraceKind
    instances: tuple[InstanceId, ...] = ()
    grace_s: float | None = None
    rps: float | None = None


class Trace(Frozen):
    """A whole trace in order of time. `end_s` is where it says that the run is over, if it does."""

    name: str
    events: tuple[TraceEvent, ...]
    end_s: float | None = None


@dataclass(slots=True)
class Fleet:
    """Who lives while a trace is read; the one judge of what can happen."""

    where: str
    living: dict[str, InstanceId] = field(default_factory=dict)
    """Name in the trace -> our id, in order of arrival."""
    deadlines_s: dict[str, float] = field(default_factory=dict)
    gone: set[str] = field(default_factory=set)
    next_index: int = 0
    now_s: float = 0.0

    def advance(self, at_s: float, line: int) -> None:
        """Time goes on to `at_s`: noticed instances whose deadline passed are gone."""
        if at_s < self.now_s:
            self.refuse(line, f"at {at_s:g} s is before the event above it at {self.now_s:g} s", "sort the events")
        self.now_s = at_s
        for name in [name for name, deadline_s in self.deadlines_s.items() if deadline_s <= at_s]:
            self.remove(name)

    def add(self, names: Sequence[str], line: int) -> tuple[InstanceId, ...]:
        """New instances under these names."""
        return tuple(self._add(name, line) for name in names)

    def add_count(self, count: int, line: int) -> tuple[InstanceId, ...]:
        """So many new instances, named by our ids."""
        return tuple(self._add(f"i{self.next_index}", line) for _ in range(count))

    def _add(self, name: str, line: int) -> InstanceId:
        if name in self.living:
            self.refuse(line, f"adds {name!r}, which is living")
        if name in self.gone:
            self.refuse(line, f"adds {name!r} again, and a removed id never returns")
        ours = InstanceId(f"i{self.next_index}")
        if OUR_ID.fullmatch(name) and name != ours:
            self.refuse(line, f"adds {name!r}, and the next id is {ours}", "leave ids away: give a count")
        self.next_index += 1
        self.living[name] = ours
        return ours

    def named(self, names: Sequence[str], line: int) -> tuple[str, ...]:
        """These names, all of them living and none twice."""
        for index, name in enumerate(names):
            if name not in self.living:
                self.refuse(line, f"takes {name!r}, which is not there", f"living: {', '.join(self.living) or 'none'}")
            if name in names[:index]:
                self.refuse(line, f"takes {name!r} twice")
        return tuple(names)

    def oldest(self, count: int, line: int) -> tuple[str, ...]:
        """The `count` that live longest and are not doomed yet."""
        free = [name for name in self.living if name not in self.deadlines_s]
        if len(free) < count:
            self.refuse(line, f"takes {count} instances of {len(free)}")
        return tuple(free[:count])

    def doom(self, names: Sequence[str], grace_s: float) -> tuple[InstanceId, ...]:
        """A notice: the deadline of each can only come nearer."""
        for name in names:
            self.deadlines_s[name] = min(self.now_s + grace_s, self.deadlines_s.get(name, math.inf))
        return tuple(self.living[name] for name in names)

    def remove(self, name: str) -> InstanceId:
        """It is gone."""
        self.deadlines_s.pop(name, None)
        self.gone.add(name)
        return self.living.pop(name)

    def refuse(self, line: int, what: str, hint: str | None = None) -> NoReturn:
        """The event on this line cannot happen."""
        raise SpecError(f"{self.where}:{line}: {what}", hint=hint)


def read_trace(path: Path, *, living: int = 0) -> Trace:
    """The trace in a file of either format.

    Args:
        path: the file.
        living: instances that live when the trace begins; they are `i0 … i(living - 1)`.

    Raises SpecError with file and line for what is no trace or cannot happen.
    """
    try:
        if path.stat().st_size > MAX_TRACE_BYTES:
            raise SpecError(f"trace {path} has {path.stat().st_size} bytes, more than {MAX_TRACE_BYTES}")
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise SpecError(f"trace {path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise SpecError(f"trace {path} is not UTF-8 text at byte {error.start}") from error
    fleet = Fleet(where=str(path))
    fleet.add_count(living, line=0)
    if text.lstrip().startswith("{"):
        events, end_s = list(our_events(text, fleet)), None
    else:
        events, end_s = paper_events(text, fleet)
    if not events:
        raise SpecError(f"trace {path} has no event")
    return Trace(name=path.stem, events=tuple(events), end_s=end_s)


def our_events(text: str, fleet: Fleet) -> Iterator[TraceEvent]:
    """The events of our JSON format."""
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
        return TraceEvent(at_s=entry.at_s, kind="add", instances=added)
    names = fleet.oldest(entry.count, line) if entry.count is not None else fleet.named(entry.instances or (), line)
    if entry.kind == "kill":
        return TraceEvent(at_s=entry.at_s, kind="kill", instances=tuple(fleet.remove(name) for name in names))
    grace_s = GRACE_S if entry.grace_s is None else entry.grace_s
    return TraceEvent(at_s=entry.at_s, kind="notice", instances=fleet.doom(names, grace_s), grace_s=grace_s)


def event_lines(text: str) -> list[int]:
    """The line on which each element of `events` begins; the text is known to be JSON."""
    opened = re.search(r'"events"\s*:\s*\[', text)
    if opened is None:
        return []
    decoder, position = json.JSONDecoder(), opened.end()
    lines: list[int] = []
    line, counted = 1, 0
    while True:
        position = next(at for at in range(position, len(text)) if text[at] not in " \t\r\n,")
        if text[position] == "]":
            return lines
        line, counted = line + text.count("\n", counted, position), position
        lines.append(line)
        _, position = decoder.raw_decode(text, position)


def paper_events(text: str, fleet: Fleet) -> tuple[list[TraceEvent], float | None]:
    """The events of the paper's availability format, moved to when they are acted on, and the end."""
    events: list[TraceEvent] = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        stamp_s, operation, details = paper_line(parse_json(line, fleet, first_line=number), fleet, number)
        at_s = max(0.0, stamp_s - GRACE_S)
        fleet.advance(at_s, number)
        if operation == "DONE":
            return events, stamp_s
        names = node_names(details, fleet, number)
        if operation == "add":
            events.append(TraceEvent(at_s=at_s, kind="add", instances=fleet.add(names, number)))
        elif operation == "remove":
            doomed = fleet.doom(fleet.named(names, number), stamp_s - at_s)
            events.append(TraceEvent(at_s=at_s, kind="notice", instances=doomed, grace_s=stamp_s - at_s))
        elif operation != "other":
            fleet.refuse(number, f"operation {operation!r} is not add, remove, other or DONE")
        elif names:
            fleet.refuse(number, f"other names nodes {', '.join(names)}, and changes no membership")
        if details.get("required_tpt") is not None:
            events.append(TraceEvent(at_s=at_s, kind="load", rps=required_rate(details, fleet, number)))
    return events, None


def paper_line(value: Any, fleet: Fleet, line: int) -> tuple[float, str, dict[str, Any]]:
    """(stamp in seconds, operation, details) of `[time_ms, operation, {"nodes": […], "required_tpt": …}]`."""
    if not isinstance(value, list) or len(value) != 3:
        fleet.refuse(line, "is not [time_ms, operation, {…}]", PAPER_EXAMPLE)
    time_ms, operation, details = value
    if isinstance(time_ms, bool) or not isinstance(time_ms, int | float):
        fleet.refuse(line, f"time {time_ms!r} is no number", PAPER_EXAMPLE)
    if not isinstance(operation, str) or not isinstance(details, dict):
        fleet.refuse(line, "is not [time_ms, operation, {…}]", PAPER_EXAMPLE)
    if not 0 <= time_ms <= MAX_SECONDS * 1000:
        fleet.refuse(line, f"time {time_ms} ms is not between 0 and one year")
    unknown = sorted(set(details) - {"nodes", "required_tpt"})
    if unknown:
        fleet.refuse(line, f"key {unknown[0]!r} is neither nodes nor required_tpt")
    return time_ms / 1000, operation, details


def node_names(details: dict[str, Any], fleet: Fleet, line: int) -> list[str]:
    """The nodes of a line; `add` and `remove` without any is an empty event, which the published files have."""
    names = details.get("nodes")
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        fleet.refuse(line, "nodes is not a list of names")
    if len(names) > MAX_ADDED:
        fleet.refuse(line, f"names {len(names)} nodes, more than {MAX_ADDED}")
    return [f"node {name}" if OUR_ID.fullmatch(name) else name for name in names]


def required_rate(details: dict[str, Any], fleet: Fleet, line: int) -> float:
    """The demand, requests per second."""
    rate = details["required_tpt"]
    if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 <= rate < math.inf:
        fleet.refuse(line, f"required_tpt {rate} is not a rate of 0 or more requests per second")
    return float(rate)


def parse_json(text: str, fleet: Fleet, *, first_line: int) -> Any:
    """Strict JSON: no NaN, no infinity, no key twice."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in pairs]
        if len(set(keys)) != len(keys):
            raise ValueError(f"key {next(key for key in keys if keys.count(key) > 1)!r} stands twice")
        return dict(pairs)

    def constant(name: str) -> NoReturn:
        raise ValueError(f"{name} is no number")

    try:
        return json.loads(text, object_pairs_hook=unique, parse_constant=constant)
    except json.JSONDecodeError as error:
        fleet.refuse(first_line + error.lineno - 1, f"not JSON: {error.msg}")
    except (ValueError, RecursionError) as error:
        fleet.refuse(first_line, str(error))
