"""What a larger budget buys: the placement's makespan over the solver's deterministic budget."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from unittest import mock

from benchmarks.planner.worlds import Case, draw_case
from benchmarks.results_file import say
from spotserve.solvers import layout
from spotserve.solvers.place import Placement, PlacementProblem, makespan, place
from spotserve.solvers.place.makespan import MAX_JOINT_GPUS, place_for_makespan
from spotserve.solvers.planner import make_plan
from spotserve.solvers.result import Result

EVALUATIONS = (1, 4, 16, 64, 256, 1024)
"""Seatings that the search may weigh, without the joint model behind it."""

BUDGETS = (0.05, 0.2, 0.5, 1.0, 3.0, 10.0)
"""Deterministic time of the joint model behind the usual search, where there is one."""


def measure(sizes: Sequence[int], *, cases: int, seed: int) -> list[dict[str, Any]]:
    """One row per size and case, with the makespan in bytes at every budget."""
    rows = []
    for num_gpus in sizes:
        for number in range(cases):
            case = draw_case("random", num_gpus, seed + number)
            problem = placement_problem(case)
            points = [weighed(problem, evaluations) for evaluations in EVALUATIONS]
            if num_gpus <= MAX_JOINT_GPUS:
                points += [joined(problem, budget) for budget in BUDGETS]
            rows.append({"gpus": num_gpus, "seed": case.seed, "old": case.old, "new": case.new, "points": points})
        say(f"anytime: {num_gpus} GPUs")
    return rows


def placement_problem(case: Case) -> PlacementProblem:
    """What a plan of the case asks the placement solver."""
    asked: list[PlacementProblem] = []

    def keep(problem: PlacementProblem, solver: str, **_: float) -> Result[Placement]:
        asked.append(problem)
        return place(problem, solver)

    spec = case.problem.spec.model_copy(update={"solvers": {"place": "rank-order"}})
    with mock.patch.object(layout, "place", keep):
        make_plan(case.problem.model_copy(update={"spec": spec}))
    return asked[0]


def weighed(problem: PlacementProblem, evaluations: int) -> dict[str, Any]:
    """The polynomial path with a search of so many seatings."""
    with mock.patch.object(makespan, "_evaluations", return_value=evaluations):
        return _point(problem, f"search {evaluations}", budget=0.0)


def joined(problem: PlacementProblem, budget: float) -> dict[str, Any]:
    """The usual search, then the joint model for so much deterministic time."""
    return _point(problem, f"joint {budget:g}", budget=budget)


def _point(problem: PlacementProblem, name: str, *, budget: float) -> dict[str, Any]:
    began_s = time.process_time()
    result = place_for_makespan(problem, budget=budget)
    return {
        "budget": name,
        "bytes": result.objective,
        "bound": result.bound,
        "proven": result.status == "optimal",
        "cpu_s": time.process_time() - began_s,
    }


def render(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """The rows as markdown."""
    yield "## What a budget buys"
    yield ""
    yield (
        "Makespan of the `makespan` placement over the best of its row's budgets. `search n` weighs at most n "
        "seatings; "
        "`joint b` has b of deterministic time for the joint model after the usual search (up to "
        f"{MAX_JOINT_GPUS} GPUs)."
    )
    yield ""
    yield "| GPUs | budget | cases | mean | max | at the best | proven | CPU ms, median | CPU ms, max |"
    yield "| --- |" + " --- |" * 8
    for gpus in dict.fromkeys(row["gpus"] for row in rows):
        same = [row for row in rows if row["gpus"] == gpus and min(point["bytes"] for point in row["points"]) > 0]
        for number, name in enumerate(point["budget"] for point in same[0]["points"]):
            points = [row["points"][number] for row in same]
            best = [min(point["bytes"] for point in row["points"]) for row in same]
            ratios = [point["bytes"] / least for point, least in zip(points, best, strict=True)]
            cells = [
                str(gpus),
                name,
                str(len(points)),
                f"{statistics.fmean(ratios):.3f}",
                f"{max(ratios):.3f}",
                f"{100 * sum(ratio <= 1 + 1e-9 for ratio in ratios) / len(ratios):.0f} %",
                str(sum(point["proven"] for point in points)),
                f"{1000 * statistics.median(point['cpu_s'] for point in points):.0f}",
                f"{1000 * max(point['cpu_s'] for point in points):.0f}",
            ]
            yield "| " + " | ".join(cells) + " |"
    yield ""
