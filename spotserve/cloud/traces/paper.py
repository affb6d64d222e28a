"""The availability formats of the SpotServe paper (Miao et al., ASPLOS'24, section 6.1).

One has one JSON array per line, the other, of the whole day, `time_ms,operation,node`. An instance is gone at the stamp
of its `remove`, and the paper's replayer acts on every event one grace period of 30 s before the stamp.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any

from spotserve.cloud.traces.fleet import OUR_ID, Fleet
from spotserve.cloud.traces.strict_lines import parse_json
from spotserve.core.trace import DEFAULT_GRACE_S, TraceEvent

MAX_NODES = 1024
MAX_SECONDS = 366 * 86_400.0
DAY_LINE = re.compile(r"([0-9]{1,12}),(add|remove),([^,\s]{1,200})")
PAPER_EXAMPLE = 'write [240000, "add", {"nodes": ["node-7"]}]'


def paper_events(text: str, fleet: Fleet) -> tuple[list[TraceEvent], float | None]:
    """The events of the paper's availability format, moved to when they are acted on, and the end."""
    events: list[TraceEvent] = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        stamp_s, operation, details = paper_line(parse_json(line, fleet, first_line=number), fleet, number)
        at_s = max(0.0, stamp_s - DEFAULT_GRACE_S)
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
    if len(names) > MAX_NODES:
        fleet.refuse(line, f"names {len(names)} nodes, more than {MAX_NODES}")
    return [f"node {name}" if OUR_ID.fullmatch(name) else name for name in names]


def required_rate(details: dict[str, Any], fleet: Fleet, line: int) -> float:
    """The demand, requests per second."""
    rate = details["required_tpt"]
    if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 <= rate < math.inf:
        fleet.refuse(line, f"required_tpt {rate} is not a rate of 0 or more requests per second")
    return float(rate)


def is_day_csv(text: str) -> bool:
    """Whether a text looks like the paper's trace of a whole day: its first line is `time_ms,operation,node`."""
    first = text.lstrip().split("\n", 1)[0]
    return first[:1].isdigit() and first.count(",") == 2


def paper_day_events(text: str, fleet: Fleet) -> Iterator[TraceEvent]:
    """The events of `time_ms,operation,node`, moved to when they are acted on; those of one moment are one event."""
    open_event: TraceEvent | None = None
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        stamp_s, operation, name = day_line(line.strip(), fleet, number)
        at_s = max(0.0, stamp_s - DEFAULT_GRACE_S)
        fleet.advance(at_s, number)
        if operation == "add":
            event = TraceEvent(at_s=at_s, kind="add", instances=fleet.add([name], number))
        else:
            grace_s = stamp_s - at_s
            doomed = fleet.doom(fleet.named([name], number), grace_s)
            event = TraceEvent(at_s=at_s, kind="notice", instances=doomed, grace_s=grace_s)
        if open_event is not None and open_event.model_copy(update={"instances": event.instances}) == event:
            open_event = event.model_copy(update={"instances": (*open_event.instances, *event.instances)})
            continue
        if open_event is not None:
            yield open_event
        open_event = event
    if open_event is not None:
        yield open_event


def day_line(line: str, fleet: Fleet, number: int) -> tuple[float, str, str]:
    """(stamp in seconds, operation, node) of `time_ms,operation,node`."""
    found = DAY_LINE.fullmatch(line)
    if found is None:
        fleet.refuse(number, "is not time_ms,operation,node", "write 480000,add,node1")
    time_ms, operation, name = found.groups()
    if int(time_ms) > MAX_SECONDS * 1000:
        fleet.refuse(number, f"time {time_ms} ms is not between 0 and one year")
    return int(time_ms) / 1000, operation, f"node {name}" if OUR_ID.fullmatch(name) else name
