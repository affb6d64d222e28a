"""Mix: how many replicas of which template a fleet of several GPU types should run ("template columns, set packing").

The master is a small CP-SAT model with a count per template. The wait in the queue is computed outside of it: each
template comes at several operating points, a part of its throughput with the latency that a request then has, and the
load is dealt out to them in thousandths, so that the mean latency is linear.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ortools.sat.python import cp_model

from spotserve.core.cost import (
    SERVES_MARGIN,
    Pool,
    Workload,
    pool_throughput_rps,
    pools_request_ms,
    serves_load,
)
from spotserve.core.spec import ServingSpec
from spotserve.solvers.configure.candidates import MICRO
from spotserve.solvers.configure.choice import MAX_DETERMINISTIC_TIME, TOLERANCE_PERMILLE
from spotserve.solvers.configure.templates import Template
from spotserve.solvers.cp_sat import new_solver, require_exact
from spotserve.solvers.result import Result

SHARES = 1000
"""Parts in which the load is dealt out to operating points."""

OPERATING_POINTS_PERMILLE = (200, 400, 600, 750, 850, 920, 952)
"""Shares of a template's throughput at which it may run; the last is 1 / 1.05, beyond it no load counts as served."""


@dataclass(frozen=True, slots=True)
class OperatingPoint:
    """One replica of a template at part of its throughput, and what a request then takes."""

    served_urps: int
    latency_us: int


@dataclass(frozen=True, slots=True)
class MixProblem:
    """Templates, GPUs of each kind, the load (0: unknown), and what runs.

    `points[c]` are the operating points of template c; `running[c]` replicas of it run undisturbed; the number of
    replicas is within [least, most].
    """

    templates: tuple[Template, ...]
    available: tuple[int, ...]
    load_urps: int
    points: tuple[tuple[OperatingPoint, ...], ...] = ()
    running: tuple[int, ...] = ()
    least: int = 1
    most: int | None = None


@dataclass(frozen=True, slots=True)
class Mix:
    """The number of replicas of each template, and whether they serve the load."""

    counts: tuple[int, ...]
    serves_load: bool


def operating_points(spec: ServingSpec, template: Template, workload: Workload) -> tuple[OperatingPoint, ...]:
    """A template's operating points at its own queue: waiting and execution at each share of its throughput."""
    pool = (Pool(template.shape, 1, template.batch),)
    points = []
    for permille in OPERATING_POINTS_PERMILLE:
        served_urps = template.throughput_urps * permille // 1000
        offered = Workload(workload.prompt_tokens, workload.output_tokens, served_urps / MICRO)
        if served_urps and serves_load(pool_throughput_rps(spec, pool[0], workload), offered):
            points.append(OperatingPoint(served_urps, round(pools_request_ms(spec, pool, offered) * 1000)))
    return tuple(points)


def solve_mix(problem: MixProblem) -> Result[Mix]:
    """The best mix; None if not even `least` replicas have the GPUs they take.

    Under a known load the least mean latency of what serves it, then within 5 % of that the fewest GPUs disturbed and
    the lowest price; else the most throughput, then the fewest disturbed. Objective and bound are those of the first of
    these goals: us x SHARES, or requests per 10^6 seconds.
    """
    if problem.load_urps > 0:
        served = _solve(problem, serves=True)
        if served.answer is not None:
            return served
    return _solve(problem, serves=False)


@dataclass(slots=True)
class _Master:
    """The model: a count per template, and under a known load one per operating point."""

    model: cp_model.CpModel
    counts: list[cp_model.IntVar]
    largest: list[int]
    latency: cp_model.LinearExpr | None
    kept: cp_model.LinearExpr


def _solve(problem: MixProblem, *, serves: bool) -> Result[Mix]:
    if not problem.templates:
        return Result(None, "infeasible")
    master = _build(problem, serves=serves)
    solver = new_solver(MAX_DETERMINISTIC_TIME)
    templates, counts = problem.templates, master.counts
    throughput = _sum(counts, [t.throughput_urps for t in templates], master.largest)
    price = _sum(counts, [t.cost_micro for t in templates], master.largest)
    position = _sum(counts, list(range(1, len(templates) + 1)), master.largest)
    first = -throughput if master.latency is None else master.latency
    goals = [(first, TOLERANCE_PERMILLE), (-master.kept, 0)]
    goals += [(-throughput, 0), (price, 0)] if master.latency is None else [(price, 0), (-throughput, 0)]
    goals.append((position, 0))
    objective, bound, proven, branches = 0, 0.0, True, 0
    chosen: tuple[int, ...] = (0,) * len(templates)
    for number, (goal, tolerance) in enumerate(goals):
        master.model.minimize(goal)
        status = solver.solve(master.model)
        branches += solver.num_branches
        if status == cp_model.INFEASIBLE and number == 0:
            return Result(None, "infeasible", statistics={"templates": len(templates), "branches": branches})
        if status not in (cp_model.OPTIMAL, cp_model.FEASIBLE):
            # Time ran out: what was found before stands, unproven.
            proven = False
            break
        proven = proven and status == cp_model.OPTIMAL
        best = round(solver.objective_value)
        chosen = tuple(solver.value(count) for count in counts)
        if number == 0:
            bound = abs(solver.best_objective_bound)
        objective = abs(solver.value(first))
        master.model.add(goal <= best + abs(best) * tolerance // 1000)
    if not any(chosen):
        return Result(None, "unknown", statistics={"templates": len(templates), "branches": branches})
    return Result(
        Mix(chosen, serves or problem.load_urps <= 0),
        "optimal" if proven else "feasible",
        objective,
        bound,
        statistics={"templates": len(templates), "branches": branches},
    )


def _build(problem: MixProblem, *, serves: bool) -> _Master:
    """Counts within the GPUs of each kind; under a known load enough operating points to serve it."""
    model = cp_model.CpModel()
    largest = [
        min(have // use for have, use in zip(problem.available, template.uses, strict=True) if use)
        for template in problem.templates
    ]
    counts = [model.new_int_var(0, most, f"x{number}") for number, most in enumerate(largest)]
    for kind, have in enumerate(problem.available):
        model.add(_sum(counts, [template.uses[kind] for template in problem.templates], largest) <= have)
    model.add(cp_model.LinearExpr.sum(counts) >= problem.least)
    if problem.most is not None:
        model.add(cp_model.LinearExpr.sum(counts) <= problem.most)
    latency = None
    if serves:
        latency = _at_operating_points(model, problem, counts, largest)
    kept, gpus = [], []
    for number, running in enumerate(problem.running):
        if running:
            variable = model.new_int_var(0, running, f"k{number}")
            model.add(variable <= counts[number])
            kept.append(variable)
            gpus.append(problem.templates[number].gpus)
    return _Master(model, counts, largest, latency, cp_model.LinearExpr.weighted_sum(kept, gpus))


def _at_operating_points(
    model: cp_model.CpModel, problem: MixProblem, counts: Sequence[cp_model.IntVar], largest: Sequence[int]
) -> cp_model.LinearExpr:
    """Mean latency in us x SHARES when each replica runs at one of its points and each share of the load is served."""
    shares: list[cp_model.IntVar] = []
    latencies: list[int] = []
    for number, points in enumerate(problem.points):
        taken = []
        for index, point in enumerate(points):
            at_point = model.new_int_var(0, largest[number], f"y{number}.{index}")
            most = min(SHARES, largest[number] * point.served_urps * SHARES // problem.load_urps)
            share = model.new_int_var(0, most, f"r{number}.{index}")
            require_exact(largest[number] * SHARES * point.served_urps)
            model.add(problem.load_urps * share <= SHARES * point.served_urps * at_point)
            taken.append(at_point)
            shares.append(share)
            latencies.append(point.latency_us)
        model.add(cp_model.LinearExpr.sum(taken) == counts[number])
    model.add(cp_model.LinearExpr.sum(shares) == SHARES)
    margin = -(-problem.load_urps * round(SERVES_MARGIN * 1000) // 1000)
    throughput = [template.throughput_urps for template in problem.templates]
    model.add(_sum(counts, throughput, largest) >= margin)
    require_exact(max(latencies, default=0) * SHARES)
    return cp_model.LinearExpr.weighted_sum(shares, latencies)


def _sum(
    variables: Sequence[cp_model.IntVar], coefficients: Sequence[int], largest: Sequence[int]
) -> cp_model.LinearExpr:
    """A weighted sum that doubles hold exactly. Raises ValueError for one that they may not."""
    require_exact(sum(abs(value) * most for value, most in zip(coefficients, largest, strict=True)))
    return cp_model.LinearExpr.weighted_sum(list(variables), list(coefficients))


def pools_of(templates: Sequence[Template], counts: Sequence[int]) -> tuple[Pool, ...]:
    """The mix as pools of equal replicas."""
    return tuple(Pool(t.shape, count, t.batch) for t, count in zip(templates, counts, strict=True) if count)


def names_of(templates: Sequence[Template], counts: Sequence[int]) -> Mapping[str, int]:
    """The mix in words: `2x[t4:16+a10:32]` is a pipeline of tensor degree 2 with 16 layers on t4, 32 on a10."""
    return {
        f"{t.shape.tensor}x[" + "+".join(f"{s.device or 'own'}:{s.layers}" for s in t.shape.stages) + "]": count
        for t, count in zip(templates, counts, strict=True)
        if count
    }
