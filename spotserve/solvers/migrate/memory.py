"""In which order layers move when memory is short (SpotServe, ASPLOS'24, Algorithm 2), for a sweep of bounds.

A layer's move first takes room at its receivers, then frees it at its former holders. Algorithm 2 takes the layers
front to back, puts off those that would pass the bound U_max, and moves these last, each time the one that leaves the
fullest GPU least full. How good that is depends on the bound, so several are tried; where none of them fits and there
are few layers, CP-SAT decides.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from spotserve.core.ids import GpuId
from spotserve.solvers.result import Result

SWEEP_VALUES = 16
EXACT_LAYERS = 32
"""With more layers CP-SAT is not asked: it would take seconds."""

Matrix = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class LayerChange:
    """Bytes each GPU receives and may free when one layer moves."""

    layer: str
    incoming: Mapping[GpuId, int]
    freed: Mapping[GpuId, int]


@dataclass(frozen=True, slots=True)
class MemoryProblem:
    """Per GPU (row) what it has taken at the start (negative: free), and per layer (column) what comes and goes.

    Peaks are counted from the same zero: a peak of at most 0 fits.
    """

    start: Matrix
    incoming: Matrix
    freed: Matrix

    @property
    def num_layers(self) -> int:
        """How many layers have to be put in order."""
        return int(self.incoming.shape[1])


def memory_problem(changes: Sequence[LayerChange], free_bytes: Mapping[GpuId, int]) -> MemoryProblem:
    """The problem of the GPUs that receive anything; GPUs that are alike count once."""
    gpus = sorted({gpu for change in changes for gpu, size in change.incoming.items() if size})
    rows = [
        (
            -free_bytes[gpu],
            *(change.incoming.get(gpu, 0) for change in changes),
            *(change.freed.get(gpu, 0) for change in changes),
        )
        for gpu in gpus
    ]
    table = np.unique(np.array(rows, dtype=np.int64).reshape(len(rows), 1 + 2 * len(changes)), axis=0)
    return MemoryProblem(table[:, 0], table[:, 1 : 1 + len(changes)], table[:, 1 + len(changes) :])


def peak_of(problem: MemoryProblem, order: Sequence[int]) -> int:
    """The most that any GPU has taken while the layers move in an order."""
    if not problem.start.size or not order:
        return int(problem.start.max(initial=0))
    moved = np.array(order)
    net = (problem.incoming - problem.freed)[:, moved]
    before = problem.start[:, None] + np.cumsum(net, axis=1) - net
    return int((before + problem.incoming[:, moved]).max())


def least_possible_peak(problem: MemoryProblem) -> int:
    """No order has a lower peak: some layer is the first to come, some the last, and the end is what it is."""
    if not problem.start.size or not problem.num_layers:
        return int(problem.start.max(initial=0))
    final = problem.start + (problem.incoming - problem.freed).sum(axis=1)
    first = (problem.start[:, None] + problem.incoming).max(axis=0).min()
    last = (final[:, None] + problem.freed).max(axis=0).min()
    return int(max(final.max(), first, last))


def bounded_order(problem: MemoryProblem, bound: int) -> tuple[int, ...]:
    """Algorithm 2 with one U_max: what keeps below it front to back, then the rest by the least fullest GPU."""
    used = problem.start.copy()
    net = problem.incoming - problem.freed
    order: list[int] = []
    late: list[int] = []
    for layer in range(problem.num_layers):
        if (used + problem.incoming[:, layer]).max(initial=bound) <= bound:
            order.append(layer)
            used += net[:, layer]
        else:
            late.append(layer)
    while late:
        peaks = (used[:, None] + problem.incoming[:, late]).max(axis=0)
        layer = late.pop(int(np.argmin(peaks)))
        order.append(layer)
        used += net[:, layer]
    return tuple(order)


def least_peak(problem: MemoryProblem) -> Result[tuple[int, ...]]:
    """The order of the lowest peak among those of a sweep of bounds; of equals the one of the highest bound."""
    least = least_possible_peak(problem)
    best: tuple[int, ...] = ()
    peak = tried = 0
    for bound in _sweep(least, peak_of(problem, range(problem.num_layers))):
        order = bounded_order(problem, bound)
        tried += 1
        if tried == 1 or peak_of(problem, order) < peak:
            best, peak = order, peak_of(problem, order)
        if peak == least:
            break
    return Result(best, "optimal" if peak == least else "feasible", peak, least, statistics={"bounds": tried})


def _sweep(least: int, most: int) -> list[int]:
    """Bounds from the highest down."""
    values = np.linspace(least, max(least, most), SWEEP_VALUES)
    return sorted({int(value) for value in values}, reverse=True)


def order_layers(changes: Sequence[LayerChange], free_bytes: Mapping[GpuId, int]) -> Result[tuple[str, ...]]:
    """An order in which no GPU ever runs out of `free_bytes`, as near to front to back as the sweep finds one.

    The objective is the peak, in bytes beyond the free ones: 0 or less. Without an answer the status says whether there
    is provably none.
    """
    problem = memory_problem(changes, free_bytes)
    front = tuple(range(len(changes)))
    least = least_possible_peak(problem)
    for bound in _sweep(min(least, 0), 0):
        order = bounded_order(problem, bound)
        if (peak := peak_of(problem, order)) <= 0:
            return _named(changes, order, "optimal" if order == front or peak == least else "feasible", peak, least)
    if least > 0:
        return Result(None, "infeasible", bound=least)
    if problem.num_layers > EXACT_LAYERS:
        return Result(None, "unknown", bound=least)
    # Only here: importing CP-SAT takes longer than all of the above.
    from spotserve.solvers.migrate.memory_exact import exact_order

    exact = exact_order(problem, most=0)
    if exact.answer is None:
        return Result(None, exact.status, bound=exact.bound, statistics=exact.statistics)
    return _named(changes, exact.answer, exact.status, int(exact.objective), int(exact.bound))


def _named(
    changes: Sequence[LayerChange], order: Sequence[int], status: str, peak: int, least: int
) -> Result[tuple[str, ...]]:
    """An order by the layers' names."""
    names = tuple(changes[layer].layer for layer in order)
    return Result(names, "optimal" if status == "optimal" else "feasible", peak, least)
