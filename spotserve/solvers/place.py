"""Place: which GPU takes which position of the new replicas, so that the most bytes are already where they belong.

A maximum-weight assignment of GPUs to (replica, stage, rank) positions (SpotServe, section 3.3, without its fixed
two-level bundles). Weights are in granules, the greatest common divisor of the byte counts, so that the stay-at-home
tie-break cannot overflow OR-Tools. `hungarian` (scipy) is the independent cross-check: values must agree.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import gcd

import numpy as np
from numpy.typing import NDArray
from ortools.graph.python import linear_sum_assignment
from scipy.optimize import linear_sum_assignment as scipy_assignment

from spotserve.core.ids import GpuId
from spotserve.core.plan import SolverReport
from spotserve.solvers.makespan import Ports, improve

Costs = NDArray[np.int64]

MAX_ASSIGNMENT_MAGNITUDE = 2**60
"""OR-Tools refuses costs whose product with n squared comes near 2^61."""


@dataclass(frozen=True, slots=True)
class PlacementProblem:
    """`reuse_bytes[g][q]`: what GPU g already holds of position q; `home[g]`: its present position, if it may stay;
    `fits[g][q]`: whether old and new contents fit side by side (a wish, not a bound: in_place needs no room);
    `need_bytes[q]`: all that position q holds, which `makespan` compares with what is there."""

    gpus: tuple[GpuId, ...]
    num_positions: int
    reuse_bytes: tuple[tuple[int, ...], ...]
    home: tuple[int | None, ...]
    fits: tuple[tuple[bool, ...], ...]
    need_bytes: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Placement:
    """`gpus[q]` takes position q."""

    gpus: tuple[GpuId, ...]
    report: SolverReport


Assigner = Callable[[Costs], list[int]]
"""Square integer cost matrix in, column of each row out, at minimum total cost."""


def place(problem: PlacementProblem, solver: str) -> Placement:
    """Assign a GPU to each position: fewest pairs that do not fit, then most bytes reused, then fewest moved home."""
    assert len(problem.gpus) >= problem.num_positions, "more positions than GPUs"
    if problem.num_positions == 0:
        return Placement((), SolverReport(name=solver, status="optimal"))
    weights = _weights(problem)
    size = len(problem.gpus)
    costs = np.full((size, size), int(weights.max()), dtype=np.int64)
    costs[:, : problem.num_positions] -= weights
    columns = ASSIGNERS[solver](costs)
    taken = {column: row for row, column in enumerate(columns) if column < problem.num_positions}
    order = _settle_ties(problem, [taken[position] for position in range(problem.num_positions)])
    if solver == "makespan":
        order, report = improve(_ports(problem, weights), order)
        return Placement(tuple(problem.gpus[row] for row in order), report)
    reused = sum(problem.reuse_bytes[row][position] for position, row in enumerate(order))
    return Placement(
        tuple(problem.gpus[row] for row in order),
        SolverReport(
            name=solver,
            status="optimal",
            objective=reused,
            bound=reused,
            certificate={
                "kind": "assignment",
                "reused_bytes": reused,
                "stayed": sum(problem.home[row] == position for position, row in enumerate(order)),
            },
        ),
    )


def _ports(problem: PlacementProblem, weights: Costs) -> Ports:
    """The same problem as the makespan improver sees it."""
    return Ports(
        gpus=problem.gpus,
        missing_bytes=tuple(
            tuple(max(0, need - held) for need, held in zip(problem.need_bytes, row, strict=True))
            for row in problem.reuse_bytes
        ),
        weights=tuple(tuple(int(weight) for weight in row) for row in weights),
        fits=problem.fits,
    )


def _settle_ties(problem: PlacementProblem, order: list[int]) -> list[int]:
    """The same value with interchangeable GPUs in natural order: the first of them takes the first position.

    Blank GPUs are interchangeable. Without this their order is the solver's whim; with it a tensor group takes
    neighbours, so one instance where it can.
    """
    alike: dict[tuple[tuple[int, ...], tuple[bool, ...]], list[int]] = {}
    for row in range(len(problem.gpus)):
        if problem.home[row] is None:
            alike.setdefault((problem.reuse_bytes[row], problem.fits[row]), []).append(row)
    settled = list(order)
    for rows in alike.values():
        members = set(rows)
        positions = [position for position, row in enumerate(order) if row in members]
        for position, row in zip(positions, rows, strict=False):
            settled[position] = row
    return settled


def _weights(problem: PlacementProblem) -> Costs:
    """Integer weights: fit dominates reuse, reuse dominates staying at home."""
    size = len(problem.gpus)
    granule = gcd(*(value for row in problem.reuse_bytes for value in row)) or 1
    largest = max(value for row in problem.reuse_bytes for value in row) // granule
    coarse = 1
    while 2 * (largest // coarse + 1) * (size + 1) ** 2 * size**2 >= MAX_ASSIGNMENT_MAGNITUDE:
        coarse *= 2
    granules = np.array(problem.reuse_bytes, dtype=np.int64) // (granule * coarse)
    weights = granules * (size + 1)
    for row, position in enumerate(problem.home):
        if position is not None:
            weights[row, position] += 1
    no_room = int(weights.max()) * size + 1
    squeezed = np.array([[not fits for fits in row] for row in problem.fits], dtype=np.int64)
    fitted: Costs = weights - no_room * squeezed
    return fitted


def assign_by_ortools(costs: Costs) -> list[int]:
    """OR-Tools' cost-scaling assignment."""
    size = len(costs)
    rows, columns = np.divmod(np.arange(size * size), size)
    assignment = linear_sum_assignment.SimpleLinearSumAssignment()
    assignment.add_arcs_with_cost(rows, columns, costs.ravel())
    status = assignment.solve()
    assert status == assignment.OPTIMAL, f"assignment answered {status}"
    return [assignment.right_mate(row) for row in range(size)]


def assign_by_scipy(costs: Costs) -> list[int]:
    """scipy's shortest-augmenting-path assignment."""
    return [int(column) for column in scipy_assignment(costs)[1]]


def assign_in_order(costs: Costs) -> list[int]:
    """No thought at all: GPU g takes position g. A yardstick for benchmarks."""
    return list(range(len(costs)))


ASSIGNERS: dict[str, Assigner] = {
    "makespan": assign_by_ortools,
    "assignment": assign_by_ortools,
    "hungarian": assign_by_scipy,
    "in_order": assign_in_order,
}
"""`makespan` starts from the assignment and improves it."""


def reuse_of(problem: PlacementProblem, gpus: Sequence[GpuId]) -> int:
    """Bytes reused by a placement, recomputed."""
    rows = {gpu: row for row, gpu in enumerate(problem.gpus)}
    return sum(problem.reuse_bytes[rows[gpu]][position] for position, gpu in enumerate(gpus))
