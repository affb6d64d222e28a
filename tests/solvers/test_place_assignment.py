"""Assignment: two solvers, a flow, a linear program and trying everything agree; potentials prove it; guards hold."""

from __future__ import annotations

import random
from itertools import permutations

import numpy as np
import pytest
from ortools.graph.python import linear_sum_assignment, min_cost_flow
from scipy.optimize import linprog

from spotserve.errors import InvariantError
from spotserve.solvers.place import assignment as module
from spotserve.solvers.place.assignment import (
    assign,
    by_ortools,
    by_scipy,
    check_potentials,
    find_potentials,
    value_of,
)
from spotserve.solvers.place.inner import ranked_weights
from spotserve.solvers.place.problem import Integers


def drawn(draw: random.Random, *, rows: int, columns: int, most: int = 6, unit: int = 1) -> Integers:
    """Random weights, many of them equal."""
    return np.array([[draw.randrange(most) * unit for _ in range(columns)] for _ in range(rows)], np.int64)


def by_flow(weights: Integers) -> int:
    """The value by OR-Tools' min-cost flow, with a sink for the rows that are left over."""
    rows, columns = weights.shape
    flow = min_cost_flow.SimpleMinCostFlow()
    for row in range(rows):
        flow.set_node_supply(row, 1)
        flow.add_arc_with_capacity_and_unit_cost(row, rows + columns, 1, 0)
        for column in range(columns):
            flow.add_arc_with_capacity_and_unit_cost(row, rows + column, 1, -int(weights[row, column]))
    for column in range(columns):
        flow.set_node_supply(rows + column, -1)
    flow.set_node_supply(rows + columns, columns - rows)
    assert flow.solve() == flow.OPTIMAL
    return -flow.optimal_cost()


def by_linear_program(weights: Integers) -> float:
    """The value by HiGHS: the assignment polytope has integer corners."""
    rows, columns = weights.shape
    index = np.arange(rows * columns)
    used = (index[None, :] // columns == np.arange(rows)[:, None]).astype(float)
    filled = (index[None, :] % columns == np.arange(columns)[:, None]).astype(float)
    solved = linprog(
        -weights.ravel().astype(float), A_ub=used, b_ub=np.ones(rows), A_eq=filled, b_eq=np.ones(columns), bounds=(0, 1)
    )
    return float(-solved.fun)


@pytest.mark.parametrize("case", range(10))
def test_everybody_agrees(rng: random.Random, case: int) -> None:
    """Tests that OR-Tools, scipy, a min-cost flow, a linear program and trying everything reach the same value."""
    columns = rng.randrange(1, 5)
    weights = drawn(rng, rows=rng.randrange(columns, 7), columns=columns, unit=1 + case * 1_000_003)
    best = max(value_of(weights, rows) for rows in permutations(range(len(weights)), columns))
    assert best == assign(weights).value == by_flow(weights)
    assert best == value_of(weights, by_ortools(weights)) == value_of(weights, by_scipy(weights))
    assert best == pytest.approx(by_linear_program(weights))


def test_agrees_at_size(rng: random.Random) -> None:
    """Tests that both solvers and the flow reach the same value with 40 GPUs and large units."""
    weights = drawn(rng, rows=40, columns=32, unit=2**33)
    found = assign(weights)
    assert (found.value, 2) == (by_flow(weights), found.solvers)


def test_greedy_would_be_wrong() -> None:
    """Tests the smallest instance on which taking the largest weight first loses (G1: 18, greedy 10)."""
    assert assign(np.array([[10, 9], [9, 0]])).value == 18


def test_invariances(rng: random.Random) -> None:
    """Tests that permuting changes no value, a constant per row of a square matrix adds up, and scaling scales."""
    weights = drawn(rng, rows=7, columns=7, most=50)
    value = assign(weights).value
    shuffled = weights[rng.sample(range(7), 7)][:, rng.sample(range(7), 7)]
    assert value == assign(shuffled).value
    offsets = np.arange(7)
    assert value + int(offsets.sum()) == assign(weights + offsets[:, None]).value
    assert 12 * value == assign(12 * weights).value


def test_monotone(rng: random.Random) -> None:
    """Tests that raising any one weight never lowers the value."""
    weights = drawn(rng, rows=5, columns=4)
    value = assign(weights).value
    for row in range(5):
        for column in range(4):
            raised = weights.copy()
            raised[row, column] += 3
            assert assign(raised).value >= value


def test_one_coefficient_changes_the_assignment() -> None:
    """Tests that the answer follows the costs: one weight changed, another row takes the column."""
    weights = np.array([[5, 4], [5, 5], [0, 0]])
    assert assign(weights).rows == (0, 1)
    weights[2, 1] = 9
    assert assign(weights).rows in ((0, 2), (1, 2))


def test_potentials_prove_and_refuse(rng: random.Random) -> None:
    """Tests that integer potentials prove an optimum without a solver, and that no worse assignment has any."""
    refused = 0
    for _ in range(40):
        columns = rng.randrange(2, 7)
        weights = drawn(rng, rows=rng.randrange(columns, 9), columns=columns)
        best = assign(weights)
        potentials = find_potentials(weights, best.rows)
        check_potentials(weights, best.rows, potentials)
        worse = best.rows[::-1]
        if value_of(weights, worse) < best.value:
            refused += 1
            with pytest.raises(InvariantError):
                check_potentials(weights, worse, find_potentials(weights, worse))
            with pytest.raises(InvariantError, match="do not prove"):
                check_potentials(weights, worse, potentials)
    assert refused > 10


def test_disagreement_is_our_bug(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests that the cross-check is real: a solver that answers worse is found out."""
    weights = np.array([[10, 9], [9, 0]])
    monkeypatch.setattr(module, "by_scipy", lambda _: (0, 1))
    with pytest.raises(InvariantError, match="disagree: 18 by OR-Tools, 10 by scipy"):
        assign(weights)
    monkeypatch.setattr(module, "MAX_CROSS_CHECKED", 1)
    with pytest.raises(InvariantError, match="not optimal"):
        assign(weights)


def test_at_scale_potentials_check_alone(monkeypatch: pytest.MonkeyPatch, rng: random.Random) -> None:
    """Tests that beyond the bound one solver answers, with the same value and the potentials checked."""
    weights = drawn(rng, rows=12, columns=9)
    both = assign(weights)
    monkeypatch.setattr(module, "MAX_CROSS_CHECKED", 8)
    alone = assign(weights)
    assert (both.value, 2, 1) == (alone.value, both.solvers, alone.solvers)


def test_nothing_to_assign() -> None:
    """Tests that no column is no problem."""
    assert assign(np.zeros((3, 0), np.int64)).rows == ()


def test_floats_are_refused() -> None:
    """Tests the guard against OR-Tools cutting 1.5 to 1: on this matrix that would cost the optimum."""
    floats = np.array([[1.5, 1.0], [1.4, 0.0]])
    raw = linear_sum_assignment.SimpleLinearSumAssignment()
    raw.add_arcs_with_cost(np.array([0]), np.array([0]), np.array([1.5]))
    assert (raw.solve(), raw.optimal_cost()) == (raw.OPTIMAL, 1)
    for solver in (assign, by_ortools, by_scipy):
        with pytest.raises(InvariantError, match="float64, not int64"):
            solver(floats)  # type: ignore[operator]


def test_rectangles_are_made_square() -> None:
    """Tests the guard against OR-Tools calling a 3 x 2 problem infeasible."""
    raw = linear_sum_assignment.SimpleLinearSumAssignment()
    raw.add_arcs_with_cost(np.array([0, 0, 1, 1, 2, 2]), np.array([0, 1, 0, 1, 0, 1]), np.zeros(6, np.int64))
    assert raw.solve() != raw.OPTIMAL
    assert by_ortools(np.array([[1, 0], [0, 0], [0, 4]])) == (0, 2)
    with pytest.raises(AssertionError, match="more columns than rows"):
        assign(np.zeros((2, 3), np.int64))


def test_overflow_is_refused() -> None:
    """Tests that weights beyond what OR-Tools scales or scipy adds exactly are refused, not answered wrongly."""
    large = np.array([[2**58, 0], [0, 2**58]])
    with pytest.raises(InvariantError, match="too much for 2 rows in OR-Tools"):
        by_ortools(large)
    with pytest.raises(InvariantError, match="do not add exactly"):
        by_scipy(large)
    assert by_ortools(large // 4) == (0, 1)


def test_ranked_weights_stay_within_the_solvers(rng: random.Random) -> None:
    """Tests that bytes of any size become weights both solvers take, room before reuse before home."""
    reuse = np.array([[rng.randrange(2**45, 2**50) for _ in range(6)] for _ in range(8)], np.int64)
    home, room = np.eye(8, 6, dtype=np.bool_), np.ones((8, 6), np.bool_)
    room[0, :5] = False
    weights = ranked_weights(reuse, home=home, room=room)
    found = assign(weights)
    assert room[list(found.rows), range(6)].all()
    equal = ranked_weights(
        np.full((3, 3), 7), home=np.eye(3, dtype=np.bool_)[[2, 0, 1]], room=np.ones((3, 3), np.bool_)
    )
    assert assign(equal).rows == (1, 2, 0)
