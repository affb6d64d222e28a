"""Ranges of parameters, as the checker counts them: half-open runs by parameter and dimension."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice

Interval = tuple[int, int]
Cell = tuple[str, int]
"""A parameter and the dimension that it is cut along."""

Cells = dict[Cell, list[Interval]]
"""Half-open runs of each cell; runs may overlap, that is what is being judged. Lists are shared: never changed."""
NOTHING: Cells = {}


def join(cells: Cells, more: Cells) -> None:
    """Put the runs of more cells into cells."""
    for cell, runs in more.items():
        cells[cell] = cells[cell] + runs if cell in cells else runs


def without(wanted: Cells, had: Cells) -> Cells:
    """What of some cells is not among others."""
    left: Cells = {}
    for cell, runs in wanted.items():
        have = had.get(cell)
        if have != runs and (rest := merged(runs) if have is None else minus(runs, have)):
            left[cell] = rest
    return left


def common(left: Cells, right: Cells) -> Cells:
    """What both of two cells have."""
    both = {cell: shared(runs, right[cell]) for cell, runs in left.items() if cell in right}
    return {cell: runs for cell, runs in both.items() if runs}


def merged(runs: Sequence[Interval]) -> list[Interval]:
    """Sorted disjoint runs with the same union."""
    if len(runs) < 2:
        return list(runs)
    result: list[Interval] = []
    for start, stop in sorted(runs):
        if result and start <= result[-1][1]:
            result[-1] = (result[-1][0], max(stop, result[-1][1]))
        else:
            result.append((start, stop))
    return result


def overlap(runs: Sequence[Interval]) -> Interval | None:
    """The first place where two runs overlap, None if they are disjoint."""
    reach = None
    for start, stop in sorted(runs):
        if reach is not None and start < reach:
            return start, min(stop, reach)
        reach = stop if reach is None else max(reach, stop)
    return None


def minus(runs: Sequence[Interval], taken: Sequence[Interval]) -> list[Interval]:
    """What of `runs` no run of `taken` covers."""
    if len(runs) == len(taken) == 1:
        ((start, stop),), ((low, high),) = runs, taken
        if low <= start and stop <= high:
            return []
        return [part for part in ((start, min(low, stop)), (max(start, high), stop)) if part[0] < part[1]]
    covers = merged(taken)
    left: list[Interval] = []
    first = 0
    for start, stop in merged(runs):
        while first < len(covers) and covers[first][1] <= start:
            first += 1
        reach = start
        for low, high in islice(covers, first, None):
            if low >= stop:
                break
            if reach < low:
                left.append((reach, low))
            reach = max(reach, high)
        if reach < stop:
            left.append((reach, stop))
    return left


def shared(left: Sequence[Interval], right: Sequence[Interval]) -> list[Interval]:
    """The runs that both have."""
    if len(left) == len(right) == 1:
        start, stop = max(left[0][0], right[0][0]), min(left[0][1], right[0][1])
        return [(start, stop)] if start < stop else []
    return minus(left, minus(left, right)) if left and right else []
