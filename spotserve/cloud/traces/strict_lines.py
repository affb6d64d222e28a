"""JSON as traces hold it, read by the one strict reader, with the line of what is wrong."""

from __future__ import annotations

import json
import re
from typing import Any

from spotserve.cloud.traces.fleet import Fleet
from spotserve.core.strict_json import JsonFaultError, parse

TOLD_LINE = re.compile(r"line (\d+) column")
EVENT_PATH = re.compile(r"events\[(\d+)\]")


def parse_json(text: str, fleet: Fleet, *, first_line: int) -> Any:
    """The document in a text; `first_line` is where the text begins in its file."""
    try:
        return parse(text.encode())
    except JsonFaultError as fault:
        told = TOLD_LINE.search(fault.message)
        event = EVENT_PATH.match(fault.path)
        line = first_line
        if told is not None:
            line += int(told.group(1)) - 1
        elif event is not None:
            line = dict(enumerate(event_lines(text))).get(int(event.group(1)), first_line)
        fleet.refuse(line, f"{fault.path}: {fault.message}" if fault.path else fault.message)


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
