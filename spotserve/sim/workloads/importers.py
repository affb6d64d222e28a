"""Reads workloads from the bytes of files that others wrote: each format by its public description, nothing skipped.

- SpotServe artifact (Apache-2.0): `request_id,arrival_s,input_tokens,byte_offset_of_prompt`, no header, and a file of
  arrival rates, one per minute, on one line.
- Azure LLM inference traces 2023 and 2024 (CC-BY 4.0): CSV with `TIMESTAMP,ContextTokens,GeneratedTokens`.
- Mooncake (FAST'25): JSON lines of timestamp in ms, input_length, output_length, hash_ids.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import NoReturn

from pydantic import Field

from spotserve.core.frozen import Frozen
from spotserve.core.strict_json import MAX_FILE_BYTES, JsonFaultError, read_as, shown
from spotserve.errors import SpecError
from spotserve.sim.workloads.our_format import our_requests
from spotserve.sim.workloads.rate_curve import MAX_RPS, RateCurve, steps
from spotserve.sim.workloads.workload import MAX_ARRIVALS, MAX_SECONDS, MAX_TOKENS, Arrival, Workload

PAPER_OUTPUT_TOKENS = 128
"""Every request of the paper's evaluation (section 6.1)."""

PAPER_LINE = re.compile(r"([0-9]{1,12}),([0-9]{1,9}(?:\.[0-9]{1,40})?),([0-9]{1,9}),([0-9]{1,15})")
AZURE_HEADER = "TIMESTAMP,ContextTokens,GeneratedTokens"
AZURE_LINE = re.compile(
    r"([0-9]{4}-[0-9]{2}-[0-9]{2} [0-9]{2}:[0-9]{2}:[0-9]{2})(?:\.([0-9]{1,9}))?(?:\+00:00)?,([0-9]{1,9}),([0-9]{1,9})"
)
RATE = re.compile(r"[0-9]{1,9}(?:\.[0-9]{1,40})?")
MAX_LINE_CHARS = 1_000_000


class MooncakeLine(Frozen):
    """One request of a Mooncake trace."""

    timestamp: float = Field(ge=0, le=MAX_SECONDS * 1000)
    input_length: int = Field(ge=1, le=MAX_TOKENS)
    output_length: int = Field(ge=0, le=MAX_TOKENS)
    hash_ids: tuple[int, ...] = ()


def read_workload(data: bytes, *, where: str, name: str | None = None) -> Workload:
    """The workload in a file of any known format, which its beginning tells.

    Args:
        data: the bytes of the file.
        where: what messages call it, its path.
        name: what the workload is called; the last part of `where` without suffix if not given.

    Raises:
        SpecError: too large, no text, of no known format, or wrong in a line that is named.
    """
    first = data[:4096].lstrip().split(b"\n", 1)[0].strip()
    if first.startswith(b"{") and b'"timestamp"' in first:
        return mooncake_requests(data, where=where, name=name)
    if first.startswith(b"{"):
        return our_requests(data, where=where, name=name)
    if first.removeprefix(b"\xef\xbb\xbf").startswith(b"TIMESTAMP"):
        return azure_requests(data, where=where, name=name)
    if first[:1].isdigit() and first.count(b",") == 3:
        return paper_requests(data, where=where, name=name)
    raise SpecError(
        f"workload {where} is of no known format: it begins with {shown(first[:60].decode('utf-8', 'replace'))!r}",
        hint="ours (JSON), the paper's request files, Azure LLM inference CSV, Mooncake JSON lines",
    )


def paper_requests(
    data: bytes, *, where: str, name: str | None = None, output_tokens: int = PAPER_OUTPUT_TOKENS
) -> Workload:
    """A request file of the SpotServe artifact; it has no answer lengths, so each gets `output_tokens`."""
    lines = _Lines(data, where)
    arrivals: list[Arrival] = []
    for line in lines:
        found = PAPER_LINE.fullmatch(line)
        if found is None:
            lines.refuse("is not request_id,arrival_s,input_tokens,offset", "write 0,2.94,512,0")
        _, at_s, prompt, _ = found.groups()
        arrivals.append(lines.arrival(float(at_s), int(prompt), output_tokens))
    return lines.workload(
        arrivals,
        name=name,
        source="request file of the SpotServe artifact (branch artifact of Hsword/SpotServe)",
        notes=(f"{output_tokens} output tokens each: the file has none",),
    )


def azure_requests(data: bytes, *, where: str, name: str | None = None) -> Workload:
    """An Azure LLM inference trace; time counts from the first request, and those out of order are sorted."""
    lines = _Lines(data, where)
    rows: list[tuple[datetime, int, int, int]] = []
    for line in lines:
        if lines.number == 1:
            if line.removeprefix("\ufeff") != AZURE_HEADER:
                lines.refuse(f"is not the header {AZURE_HEADER}")
            continue
        found = AZURE_LINE.fullmatch(line)
        if found is None:
            lines.refuse(f"is not {AZURE_HEADER}", "write 2023-11-16 18:15:46.6805900,374,44")
        moment, fraction, prompt, output = found.groups()
        try:
            second = datetime.fromisoformat(moment).replace(tzinfo=UTC)
        except ValueError as error:
            lines.refuse(f"time {moment}: {error}")
        nanoseconds = int((fraction or "0").ljust(9, "0"))
        rows.append((second, nanoseconds, int(prompt), int(output)))
        lines.arrival(0.0, int(prompt), max(1, int(output)))
    in_order = sorted(rows, key=lambda row: row[:2])
    first = in_order[0] if in_order else None
    lines.last_s = 0.0
    arrivals = [
        lines.arrival((row[0] - first[0]).total_seconds() + (row[1] - first[1]) / 1e9, row[2], max(1, row[3]))
        for row in in_order
        if first is not None
    ]
    silent = sum(row[3] == 0 for row in rows)
    return lines.workload(
        arrivals,
        name=name,
        source="Azure LLM inference trace",
        notes=(
            "time counts from the first request",
            *((f"{silent} requests of no output token have 1",) if silent else ()),
            *(("requests out of order were sorted",) if in_order != rows else ()),
        ),
    )


def mooncake_requests(data: bytes, *, where: str, name: str | None = None) -> Workload:
    """A Mooncake trace; the prefixes that its requests share (`hash_ids`) are not modelled."""
    lines = _Lines(data, where)
    rows: list[Arrival] = []
    silent = 0
    for line in lines:
        try:
            row = read_as(MooncakeLine, line.encode())
        except JsonFaultError as fault:
            lines.refuse(f"{fault.path or 'line'}: {fault.message}")
        silent += row.output_length == 0
        rows.append(lines.arrival(row.timestamp / 1000, row.input_length, max(1, row.output_length), is_sorted=False))
    in_order = sorted(rows, key=lambda each: each.at_s)
    return lines.workload(
        in_order,
        name=name,
        source="Mooncake trace",
        notes=(
            "shared prefixes (hash_ids) are not modelled: every prompt is prefilled whole",
            *((f"{silent} requests of no output token have 1",) if silent else ()),
            *(("requests out of order were sorted",) if in_order != rows else ()),
        ),
    )


def arrival_rates(data: bytes, *, where: str, step_s: float = 60.0) -> RateCurve:
    """A file of comma-separated requests per second, one for each `step_s` seconds (the paper's MAF segment)."""
    lines = _Lines(data, where)
    rates: list[float] = []
    for line in lines:
        for field in line.rstrip(",").split(","):
            if RATE.fullmatch(field.strip()) is None or float(field) > MAX_RPS:
                lines.refuse(f"{shown(field, 40)!r} is not a rate of 0 to {MAX_RPS:g} requests per second")
            rates.append(float(field))
    if not rates:
        raise SpecError(f"workload {where} has no rate")
    return steps(rates, step_s=step_s)


class _Lines:
    """The lines of a text file with their numbers, and the judge of what stands in them."""

    def __init__(self, data: bytes, where: str) -> None:
        if len(data) > MAX_FILE_BYTES:
            raise SpecError(f"workload {where} has {len(data)} bytes, more than {MAX_FILE_BYTES}")
        try:
            self._text = data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise SpecError(f"workload {where} is not UTF-8 text at byte {error.start}") from error
        self.where = where
        self.number = 0
        self.last_s = 0.0
        self._count = 0

    def __iter__(self) -> Iterator[str]:
        """Each line that is not blank, without the white space around it."""
        for number, line in enumerate(self._text.split("\n"), 1):
            self.number = number
            if len(line) > MAX_LINE_CHARS:
                self.refuse(f"has {len(line)} characters, more than {MAX_LINE_CHARS}")
            if line.strip():
                yield line.strip()

    def arrival(self, at_s: float, prompt_tokens: int, output_tokens: int, *, is_sorted: bool = True) -> Arrival:
        """A request on this line, if it can be one."""
        if not 0 <= at_s <= MAX_SECONDS:
            self.refuse(f"time {at_s:g} s is not between 0 and one year")
        if is_sorted and at_s < self.last_s:
            self.refuse(f"at {at_s:g} s is before the request above it at {self.last_s:g} s", "sort the requests")
        for what, tokens in (("prompt", prompt_tokens), ("output", output_tokens)):
            if not 1 <= tokens <= MAX_TOKENS:
                self.refuse(f"{tokens} {what} tokens are not between 1 and {MAX_TOKENS}")
        self.last_s = at_s
        return Arrival(at_s, prompt_tokens, output_tokens)

    def refuse(self, what: str, hint: str | None = None) -> NoReturn:
        """This line is wrong."""
        raise SpecError(f"{self.where}:{self.number}: {what}", hint=hint)

    def workload(self, arrivals: list[Arrival], *, name: str | None, source: str, notes: tuple[str, ...]) -> Workload:
        """The workload of a file. Raises SpecError if it has no request or too many."""
        if not 1 <= len(arrivals) <= MAX_ARRIVALS:
            raise SpecError(f"workload {self.where} has {len(arrivals)} requests, not 1 to {MAX_ARRIVALS}")
        return Workload(name_of(self.where) if name is None else name, source, tuple(arrivals), notes)


def name_of(where: str) -> str:
    """The last part of a path without its suffix."""
    last = where.replace("\\", "/").rsplit("/", 1)[-1]
    return last.rsplit(".", 1)[0] or last
