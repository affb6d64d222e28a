"""The choice among candidates: goals one after the other, the first of them with 5 % of tolerance.

SpotServe (ASPLOS'24, Algorithm 1) takes the plain minimum, which is degenerate (thousands of GPUs for the last 0.2 % of
latency) and thrashes between neighbours. CP-SAT chooses among the columns that no other dominates; `enumerate` filters
the whole table and must agree.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from ortools.sat.python import cp_model

from spotserve.solvers.configure.candidates import Ints, Table
from spotserve.solvers.cp_sat import new_solver, require_exact
from spotserve.solvers.result import Result

TOLERANCE_PERMILLE = 50
RESHAPE_GAIN_PERMILLE = 1100
"""Under a known load a change of shape must win at least this much over what runs, or the shape stays (hysteresis);
under an unknown load what runs is kept."""

MAX_DETERMINISTIC_TIME = 10.0


@dataclass(frozen=True, slots=True)
class Goal:
    """One level of the lexicographic choice: a column, its direction and how far from the best is still good."""

    column: str
    maximise: bool = False
    tolerance_permille: int = 0


Chooser = Callable[[Table, Sequence[Goal]], Result[int]]
"""Picks a row by goals; objective and bound are those of the goal that has a tolerance."""


def goals_for(table: Table, *, load_known: bool, gives_back: bool = False) -> tuple[Goal, ...]:
    """The order of wishes. Under an unknown load throughput comes first, else to serve it, then latency with backlog.

    Where the load is known and instances are given back, the cheapest of what is about as fast is taken; what is paid
    for anyway is used.
    """
    throughput = Goal("throughput_urps", maximise=True)
    fastest, *degrees = Goal("latency_us"), Goal("tensor"), Goal("pipeline"), Goal("data")
    disturbed, cost = Goal("disturbed"), Goal("cost_micro")
    if load_known:
        latency = Goal("latency_us", tolerance_permille=TOLERANCE_PERMILLE)
        wishes = (cost, disturbed, throughput) if gives_back else (disturbed, throughput, cost)
        return (Goal("unserved"), latency, *wishes, fastest, *degrees)
    most = Goal("throughput_urps", maximise=True, tolerance_permille=TOLERANCE_PERMILLE)
    return (most, disturbed, fastest, throughput, cost, *degrees)


def choose_by_enumeration(table: Table, goals: Sequence[Goal]) -> Result[int]:
    """The choice by filtering the table goal after goal."""
    left = np.arange(len(table))
    objective_column, bound = goals[0].column, 0
    for goal in goals:
        values = table.columns[goal.column][left]
        best = int(values.max() if goal.maximise else values.min())
        if goal.tolerance_permille:
            objective_column, bound = goal.column, best
        limit = _limit(best, goal)
        left = left[values >= limit] if goal.maximise else left[values <= limit]
    index = int(left[0])
    objective = int(table.columns[objective_column][index])
    return Result(index, "optimal", objective, bound, statistics={"columns": len(table)})


def _limit(best: int, goal: Goal) -> int:
    """The worst value that still counts as good."""
    if goal.maximise:
        return -(-best * (1000 - goal.tolerance_permille) // 1000)
    return best * (1000 + goal.tolerance_permille) // 1000


def choose_by_cpsat(table: Table, goals: Sequence[Goal]) -> Result[int]:
    """The choice by CP-SAT: one 0/1 variable per undominated column, exactly one of them, goal after goal.

    Goals without tolerance that follow each other are one objective: the rank in their lexicographic order.
    """
    levels = _levels(table, goals)
    kept = undominated([level.costs for level in levels])
    model = cp_model.CpModel()
    taken = [model.new_bool_var(f"c{row}") for row in kept]
    model.add_exactly_one(taken)
    solver = new_solver(MAX_DETERMINISTIC_TIME)
    bound, proven, branches = 0.0, True, 0
    for level in levels:
        costs = level.costs[kept].tolist()
        require_exact(max(map(abs, costs)))
        spent = cp_model.LinearExpr.weighted_sum(taken, costs)
        model.minimize(spent)
        status = solver.solve(model)
        assert status in (cp_model.OPTIMAL, cp_model.FEASIBLE), f"column model answered {solver.status_name(status)}"
        proven = proven and status == cp_model.OPTIMAL
        branches += solver.num_branches
        best = round(solver.objective_value)
        if level.goal is not None:
            sign = -1 if level.goal.maximise else 1
            bound = sign * solver.best_objective_bound
            best = sign * _limit(sign * best, level.goal)
        model.add(spent <= best)
    index = kept[next(number for number, variable in enumerate(taken) if solver.boolean_value(variable))]
    goal = next((goal for goal in goals if goal.tolerance_permille), goals[0])
    return Result(
        index,
        "optimal" if proven else "feasible",
        int(table.columns[goal.column][index]),
        bound,
        statistics={"columns": len(table), "undominated": len(kept), "branches": branches},
    )


@dataclass(frozen=True, slots=True)
class _Level:
    """One objective of the model, to be minimised; `goal` is set where it has a tolerance."""

    costs: Ints
    goal: Goal | None


def _levels(table: Table, goals: Sequence[Goal]) -> list[_Level]:
    """The goals as objectives: those with a tolerance alone, runs of the others as one rank."""
    levels: list[_Level] = []
    strict: list[Goal] = []
    for goal in goals:
        if goal.tolerance_permille:
            levels += [_rank(table, strict)] if strict else []
            strict = []
            levels.append(_Level(_minimised(table, goal), goal))
        else:
            strict.append(goal)
    return [*levels, _rank(table, strict)] if strict else levels


def _minimised(table: Table, goal: Goal) -> Ints:
    values = table.columns[goal.column]
    return -values if goal.maximise else values


def _rank(table: Table, goals: Sequence[Goal]) -> _Level:
    """The place of each row in the lexicographic order of `goals`; equal rows have the same place."""
    keys = np.stack([_minimised(table, goal) for goal in goals])
    order = np.lexsort(keys[::-1])
    steps = (np.diff(keys[:, order], axis=1) != 0).any(axis=0)
    rank = np.empty(len(table), dtype=np.int64)
    rank[order] = np.concatenate([[0], np.cumsum(steps)])
    return _Level(rank, None)


def undominated(costs: Sequence[Ints]) -> list[int]:
    """The rows that no other row meets in every cost and beats (or precedes) in one, best last cost first.

    A dominated row is never chosen: its dominator passes every filter that it passes.
    """
    left = np.lexsort(tuple(costs))
    kept: list[int] = []
    while left.size:
        first, rest = int(left[0]), left[1:]
        kept.append(first)
        better = np.zeros(len(rest), dtype=np.bool_)
        for cost in costs[:-1]:
            better |= cost[rest] < cost[first]
        left = rest[better]
    return kept


CHOOSERS: Mapping[str, Chooser] = {"cpsat": choose_by_cpsat, "enumerate": choose_by_enumeration}
