"""Our workload format: JSON, one request to a line, read back to the same workload."""

from __future__ import annotations

import json
from typing import Annotated, Literal

from pydantic import Field

from spotserve.core.frozen import Frozen
from spotserve.core.strict_json import JsonFaultError, read_as
from spotserve.errors import SpecError
from spotserve.sim.workloads.workload import MAX_ARRIVALS, MAX_SECONDS, MAX_TOKENS, Arrival, Workload

FORMAT_VERSION: Literal["0.1"] = "0.1"
MAX_TEXT = 2000


class ArrivalEntry(Frozen):
    """One request."""

    at_s: float = Field(ge=0, le=MAX_SECONDS)
    prompt_tokens: int = Field(ge=1, le=MAX_TOKENS)
    output_tokens: int = Field(ge=1, le=MAX_TOKENS)


class WorkloadFile(Frozen):
    """Requests in order of arrival, where they come from, and how they were scaled or assumed."""

    format_version: Literal["0.1"]
    name: str = Field(min_length=1, max_length=200)
    source: str = Field(default="", max_length=MAX_TEXT)
    notes: tuple[Annotated[str, Field(max_length=MAX_TEXT)], ...] = Field(default=(), max_length=100)
    arrivals: tuple[ArrivalEntry, ...] = Field(min_length=1, max_length=MAX_ARRIVALS)


def our_requests(data: bytes, *, where: str, name: str | None = None) -> Workload:
    """The workload in a file of ours. Raises SpecError with the place of the first wrong value."""
    try:
        read = read_as(WorkloadFile, data)
    except JsonFaultError as fault:
        raise SpecError(
            f"workload {where} is malformed at {fault.path or 'file'}: {fault.message}",
            hint="schemas/workload.schema.json describes it",
        ) from fault
    last_s = 0.0
    for index, entry in enumerate(read.arrivals):
        if entry.at_s < last_s:
            raise SpecError(
                f"workload {where} is malformed at arrivals[{index}].at_s: {entry.at_s:g} s is before the one above",
                hint="sort the arrivals",
            )
        last_s = entry.at_s
    arrivals = tuple(Arrival(entry.at_s, entry.prompt_tokens, entry.output_tokens) for entry in read.arrivals)
    return Workload(read.name if name is None else name, read.source, arrivals, read.notes)


def workload_json(workload: Workload) -> str:
    """A workload in our format; read again it is the same workload."""
    head = {
        "format_version": FORMAT_VERSION,
        "name": workload.name,
        "source": workload.source,
        "notes": list(workload.notes),
    }
    fields = [f"{json.dumps(key)}: {json.dumps(value, ensure_ascii=False)}" for key, value in head.items()]
    body = ",\n".join(
        f' {{"at_s": {json.dumps(each.at_s)}, "prompt_tokens": {each.prompt_tokens}, '
        f'"output_tokens": {each.output_tokens}}}'
        for each in workload.arrivals
    )
    return "{" + ",\n".join([*fields, f'"arrivals": [\n{body}\n]']) + "}\n"
