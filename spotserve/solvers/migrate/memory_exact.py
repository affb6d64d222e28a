"""The order of layers with the least memory peak, exactly: CP-SAT with one position for each layer.

The oracle for Algorithm 2, and the answer where its sweep finds no order that fits.
"""

from __future__ import annotations

from math import gcd

import numpy as np
from ortools.sat.python import cp_model

from spotserve.solvers.cp_sat import MAX_SUM, new_solver
from spotserve.solvers.migrate.memory import MemoryProblem, least_peak, least_possible_peak, peak_of
from spotserve.solvers.result import Result

DETERMINISTIC_TIME = 2.0


def exact_order(
    problem: MemoryProblem, *, most: int | None = None, deterministic_time: float = DETERMINISTIC_TIME
) -> Result[tuple[int, ...]]:
    """The order of the least peak; with `most` any order whose peak is at most that.

    Status "infeasible" is proven; "unknown" means that the limit came first or the numbers are too large.
    """
    if not problem.start.size or not problem.num_layers:
        return Result(tuple(range(problem.num_layers)), "optimal", peak_of(problem, ()), least_possible_peak(problem))
    granule, least = _granule(problem), least_possible_peak(problem)
    if int(np.abs(problem.incoming).sum() + np.abs(problem.freed).sum()) // granule >= MAX_SUM:
        return Result(None, "unknown", bound=least)
    model = cp_model.CpModel()
    layers = range(problem.num_layers)
    at = [[model.new_bool_var("") for _ in layers] for _ in layers]
    for layer in layers:
        model.add_exactly_one(at[layer])
        model.add_exactly_one(at[other][layer] for other in layers)
    _order_equals(model, problem, at)
    top = int(problem.incoming.sum() + np.abs(problem.start).max()) // granule + 1
    peak = model.new_int_var(-top, top, "peak")
    for row in range(problem.start.size):
        _keep_below(model, problem, at, peak, row, granule)
    model.add(peak >= -(-least // granule))
    for place, layer in enumerate(least_peak(problem).answer or ()):
        for other in layers:
            model.add_hint(at[other][place], other == layer)
    if most is None:
        model.minimize(peak)
    else:
        model.add(peak <= most // granule)
    solver = new_solver(deterministic_time)
    status = solver.solve(model)
    statistics = {"branches": solver.num_branches, "deterministic_time": round(solver.deterministic_time, 3)}
    if status not in (cp_model.OPTIMAL, cp_model.FEASIBLE):
        proven = status == cp_model.INFEASIBLE
        return Result(None, "infeasible" if proven else "unknown", bound=least, statistics=statistics)
    order = tuple(next(layer for layer in layers if solver.value(at[layer][place])) for place in layers)
    if most is None:
        least = round(solver.best_objective_bound) * granule
    return Result(
        order,
        "optimal" if most is None and status == cp_model.OPTIMAL else "feasible",
        peak_of(problem, order),
        least,
        statistics=statistics,
    )


def _granule(problem: MemoryProblem) -> int:
    """The largest unit of which every number is a multiple."""
    values = np.concatenate([problem.start.ravel(), problem.incoming.ravel(), problem.freed.ravel()])
    return max(1, gcd(*(int(value) for value in np.unique(np.abs(values)))))


def _order_equals(model: cp_model.CpModel, problem: MemoryProblem, at: list[list[cp_model.IntVar]]) -> None:
    """Layers with the same changes come in their own order: they are symmetric."""
    columns = np.concatenate([problem.incoming, problem.freed])
    seen: dict[bytes, int] = {}
    for layer in range(problem.num_layers):
        key = columns[:, layer].tobytes()
        if key in seen:
            places = range(problem.num_layers)
            model.add(
                sum(place * at[seen[key]][place] for place in places)
                < sum(place * at[layer][place] for place in places)
            )
        seen[key] = layer


def _keep_below(
    model: cp_model.CpModel,
    problem: MemoryProblem,
    at: list[list[cp_model.IntVar]],
    peak: cp_model.IntVar,
    row: int,
    granule: int,
) -> None:
    """At every place the GPU of a row has taken at most the peak."""
    layers = range(problem.num_layers)
    incoming = [int(size) // granule for size in problem.incoming[row]]
    net = [int(size) // granule for size in problem.incoming[row] - problem.freed[row]]
    start = int(problem.start[row]) // granule
    for place in layers:
        before = sum(net[layer] * at[layer][early] for layer in layers if net[layer] for early in range(place))
        now = sum(incoming[layer] * at[layer][place] for layer in layers if incoming[layer])
        model.add(start + before + now <= peak)
