"""Maximum-weight assignment of rows (GPUs) to columns (positions), by two solvers and with a proof that needs neither.

OR-Tools' cost scaling answers, scipy's Hungarian method must reach the same value, and integer potentials found by
longest-path iteration prove it without a solver (linear-programming duality). Beyond `MAX_CROSS_CHECKED` rows the
faster one answers and the potentials alone check it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from ortools.graph.python import linear_sum_assignment
from scipy.optimize import linear_sum_assignment as hungarian

from spotserve.errors import InvariantError
from spotserve.solvers.place.problem import Integers

MAX_SCALED_COST = 2**60
"""OR-Tools answers POSSIBLE_OVERFLOW when the largest cost times rows squared comes near 2^61."""

MAX_SUM = 2**51
"""scipy adds in doubles: beyond 2^52 it is wrong on ties."""

MAX_CROSS_CHECKED = 1024
"""Rows up to which both solvers run."""


@dataclass(frozen=True, slots=True)
class Assignment:
    """`rows[column]` takes the column; `value` is the sum of weights; `solvers` how many found it independently."""

    rows: tuple[int, ...]
    value: int
    solvers: int


@dataclass(frozen=True, slots=True, eq=False)
class Potentials:
    """Dual values: rows + columns >= weight everywhere, with equality of the sums at an optimum."""

    rows: Integers
    columns: Integers


def assign(weights: Integers) -> Assignment:
    """The assignment of most weight that uses every column, cross-checked.

    Raises InvariantError where the solvers or the potentials disagree: then one of them is wrong.
    """
    require_integers(weights)
    assert weights.shape[0] >= weights.shape[1], "more columns than rows"
    if weights.shape[1] == 0:
        return Assignment((), 0, 0)
    first = by_scipy(weights)
    small = len(weights) <= MAX_CROSS_CHECKED
    rows = by_ortools(weights) if small else first
    value = value_of(weights, rows)
    if small and value != value_of(weights, first):
        raise InvariantError(f"assignments disagree: {value} by OR-Tools, {value_of(weights, first)} by scipy")
    check_potentials(weights, rows, find_potentials(weights, rows))
    return Assignment(rows, value, 2 if small else 1)


def value_of(weights: Integers, rows: tuple[int, ...]) -> int:
    """The weight of an assignment, recomputed."""
    return int(weights[list(rows), np.arange(len(rows))].sum())


def by_ortools(weights: Integers) -> tuple[int, ...]:
    """OR-Tools' cost-scaling assignment, which is square only: missing columns are added with weight 0."""
    require_integers(weights)
    size, columns = weights.shape
    least = min(0, int(weights.min()))
    largest = max(0, int(weights.max()))
    if (largest - least) * size**2 >= MAX_SCALED_COST:
        raise InvariantError(f"assignment weights span {largest - least}, too much for {size} rows in OR-Tools")
    costs = np.full((size, size), largest, dtype=np.int64)
    costs[:, :columns] -= weights
    tails, heads = np.divmod(np.arange(size * size), size)
    solver = linear_sum_assignment.SimpleLinearSumAssignment()
    solver.add_arcs_with_cost(tails, heads, costs.ravel())
    status = solver.solve()
    if status != solver.OPTIMAL:
        raise InvariantError(f"assignment answered {status}")
    taken = {solver.right_mate(row): row for row in range(size)}
    return tuple(taken[column] for column in range(columns))


def by_scipy(weights: Integers) -> tuple[int, ...]:
    """scipy's shortest augmenting paths (the Hungarian method of Jonker and Volgenant)."""
    require_integers(weights)
    largest = int(np.abs(weights).max(initial=0))
    if largest * max(1, weights.shape[1]) >= MAX_SUM:
        raise InvariantError(f"assignment weights up to {largest} do not add exactly over {weights.shape[1]} columns")
    rows, columns = hungarian(weights, maximize=True)
    taken = dict(zip(columns.tolist(), rows.tolist(), strict=True))
    return tuple(taken[column] for column in range(weights.shape[1]))


def find_potentials(weights: Integers, rows: tuple[int, ...]) -> Potentials:
    """Integer potentials of an assignment by longest-path iteration. Raises InvariantError if it is not optimal."""
    size, columns = weights.shape
    matched = np.array(rows, np.int64)
    free = np.setdiff1d(np.arange(size), matched)
    own = weights[matched, np.arange(columns)]
    gains = weights[matched] - own[:, None]
    column_values = weights[free].max(axis=0) if len(free) else np.full(columns, weights.min(), np.int64)
    for _ in range(columns + 1):
        raised = np.maximum(column_values, (gains + column_values[:, None]).max(axis=0))
        if np.array_equal(raised, column_values):
            break
        column_values = raised
    else:
        raise InvariantError("the assignment is not optimal: swapping along a cycle gains weight")
    row_values = np.zeros(size, np.int64)
    row_values[matched] = own - column_values
    return Potentials(row_values, column_values)


def check_potentials(weights: Integers, rows: tuple[int, ...], potentials: Potentials) -> None:
    """Weak duality: potentials that cover every weight and add up to the value prove that nothing is larger.

    Rows that are left over cost 0 and, where there are any, no row may cost less. Raises InvariantError.
    """
    free = np.setdiff1d(np.arange(len(weights)), np.array(rows, np.int64))
    covered = (potentials.rows[:, None] + potentials.columns[None, :] >= weights).all()
    left_over = not potentials.rows[free].any() and (not len(free) or (potentials.rows >= 0).all())
    total = int(potentials.rows.sum() + potentials.columns.sum())
    if len(set(rows)) != len(rows) or not covered or not left_over or total != value_of(weights, rows):
        raise InvariantError(f"potentials of {total} do not prove the assignment's {value_of(weights, rows)}")


def require_integers(weights: Integers) -> None:
    """Raise InvariantError for floats: OR-Tools would cut 1.5 to 1 without a word."""
    if weights.dtype != np.int64:
        raise InvariantError(f"assignment weights are {weights.dtype}, not int64")
