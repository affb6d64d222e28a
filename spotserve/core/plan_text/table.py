"""How a plan's numbers and names are written for a person, and rows set in columns."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from typing import Any

from spotserve.core.ids import GpuId, InstanceId, instance_of, natural_key

Json = Mapping[str, Any]
"""A plan (or a part of one) as plain JSON data, hence `Any`."""

LONG_S = 1e6
"""From here on a time is written in three digits."""
_NUMBERED = re.compile(r"(.*?)(\d+)$", re.DOTALL)
_UNREAD = frozenset({"spec", "slices", "holdings"})
"""Parts of a plan that no text is made of, and that make up most of a file."""


def columns(titles: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Columns as wide as their widest cell; empty for no rows."""
    if not rows:
        return ""
    cells = [list(titles), *([str(cell) for cell in row] for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(titles))]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in cells)


def section(title: str, body: str, *, always: bool = False) -> str:
    """A titled block, its lines set in by two; empty if there is nothing below the title, unless it says enough."""
    lines = [f"  {line}".rstrip() for line in body.split("\n")] if body else []
    return "\n".join([title, *lines]) if lines or always else ""


def seconds_text(value_s: float) -> str:
    """`12.0 ms` below a second, `2.40 s` above, `41 us` where a tenth of a millisecond is too coarse."""
    if 0 < abs(value_s) < 1e-4:
        return f"{value_s * 1e6:.0f} us"
    if abs(value_s) < 1:
        return f"{value_s * 1000:.1f} ms"
    return f"{value_s:.2f} s" if abs(value_s) < LONG_S else f"{value_s:.3g} s"


def moment_text(at_s: float) -> str:
    """A time since the plan's start: always milliseconds, so that a column of them can be compared."""
    return f"{at_s * 1000:.1f} ms" if at_s < LONG_S else seconds_text(at_s)


def size_text(size_bytes: float) -> str:
    """Bytes in powers of ten, as link rates are given."""
    size = float(size_bytes)
    for unit in ("B", "kB", "MB", "GB"):
        if abs(size) < 999.5:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB" if size < 999.5 else f"{size:.0f} TB"


def count_text(number: int, noun: str) -> str:
    """`1 step`, `2 steps`, `1 replica`, `2 copies`."""
    return f"{number} {noun if number == 1 else noun[:-1] + 'ies' if noun.endswith('y') else noun + 's'}"


def runs_text(names: Iterable[str]) -> str:
    """`i0/0-3 i2/0`: neighbours whose last numbers count up are written as one; the order stays."""
    runs: list[tuple[str, str, str]] = []
    for name in names:
        match = _NUMBERED.match(name)
        head, number = (match[1], match[2]) if match else (name, "")
        if runs and number and runs[-1][0] == head and runs[-1][2] and int(runs[-1][2]) + 1 == int(number):
            runs[-1] = (head, runs[-1][1], number)
        else:
            runs.append((head, number, number))
    return " ".join(f"{head}{first}" if first == last else f"{head}{first}-{last}" for head, first, last in runs)


def cut(text: str, width: int) -> str:
    """The text, its end given up for an ellipsis if it is wider than `width`."""
    return text if len(text) <= width else text[: width - 1].rstrip() + "…"


def by_instance(gpus: Iterable[GpuId]) -> dict[InstanceId, list[GpuId]]:
    """GPUs of each instance, in natural order of the instances."""
    ordered = sorted(gpus, key=natural_key)
    return {name: list(group) for name, group in groupby(ordered, key=instance_of)}


def printable(value: Any) -> Any:
    """The same JSON with control characters replaced in every text that is shown: a file cannot steer a terminal."""
    if isinstance(value, str):
        return value if value.isprintable() else "".join(c if c.isprintable() else "\ufffd" for c in value)
    if isinstance(value, Mapping):
        return {printable(key): item if key in _UNREAD else printable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [printable(item) for item in value]
    return value
