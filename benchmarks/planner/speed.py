"""How long it takes from a problem to a checked plan in memory, and which stage takes it."""

from __future__ import annotations

import gc
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import Any
from unittest import mock

from benchmarks.planner.worlds import KINDS, Case, draw_case, real_model
from benchmarks.results_file import say
from spotserve.core.check import check_plan
from spotserve.core.plan import Plan, PlanningProblem
from spotserve.solvers import content, layout, planner, rungs
from spotserve.solvers.layout import LayoutBuilder
from spotserve.solvers.place import Placement, PlacementProblem, place
from spotserve.solvers.place.makespan import MAX_JOINT_GPUS
from spotserve.solvers.planner import Planner, make_plan
from spotserve.solvers.planner_server import uncollected
from spotserve.solvers.result import Result
from spotserve.solvers.rungs import Rungs
from spotserve.solvers.steps import StepWriter

STAGES: tuple[tuple[str, Any, str], ...] = (
    ("gather", planner, "gather"),
    ("configure", Planner, "_candidates"),
    ("configure", Planner, "_configure"),
    ("place", LayoutBuilder, "lay_out"),
    ("sources", content, "_fetched"),
    ("requests", content, "decide_requests"),
    ("kv", rungs, "kv_of"),
    ("steps", StepWriter, "write_live"),
    ("file", Rungs, "_finish"),
)
"""Stage, owner and name of the functions that are timed; none calls another."""

STAGE_NAMES = (*dict.fromkeys(stage for stage, _, _ in STAGES), "check", "rest")
REAL_MODEL_UP_TO = 256
AIMS_S = {64: 0.05, 1024: 1.0}


def measure(sizes: Sequence[int], *, cases: int, seed: int) -> list[dict[str, Any]]:
    """One row per path, kind, size and case, with seconds of the process on a core (other load does not count)."""
    make_plan(draw_case("random", 16, seed).problem)
    rows = []
    for num_gpus in sizes:
        for kind in KINDS:
            drawn = [draw_case(kind, num_gpus, seed + number) for number in range(cases)]
            rows += _rows("compact", drawn)
        if num_gpus <= REAL_MODEL_UP_TO:
            model = real_model()
            rows += _rows("opt-6.7b", [draw_case("random", num_gpus, seed + n, model=model) for n in range(cases)])
        say(f"speed: {num_gpus} GPUs")
    return rows


def _rows(model: str, drawn: Sequence[Case]) -> Iterator[dict[str, Any]]:
    for case in drawn:
        with placed_within(0.0):
            yield {"model": model, "path": "polynomial", **timed(case)}
        if case.num_gpus <= MAX_JOINT_GPUS:
            yield {"model": model, "path": "default", **timed(case)}


@contextmanager
def placed_within(budget: float) -> Iterator[None]:
    """Placement with so much deterministic time for the joint model; 0 is the polynomial path."""

    def budgeted(problem: PlacementProblem, solver: str, **_: float) -> Result[Placement]:
        return place(problem, solver, budget=budget)

    with mock.patch.object(layout, "place", budgeted):
        yield


def timed(case: Case) -> dict[str, Any]:
    """Times of one problem: whole, and once more stage by stage."""
    problem = unseen(case)
    gc.collect()
    with uncollected():
        began, began_s = time.perf_counter(), time.process_time()
        plan = make_plan(problem)
        findings = check_plan(plan)
        cpu_s, wall_s = time.process_time() - began_s, time.perf_counter() - began
    return {
        "kind": case.kind,
        "gpus": case.num_gpus,
        "seed": case.seed,
        "old": case.old,
        "new": case.new,
        "mode": plan.mode,
        "steps": len(plan.steps),
        "refused": findings[0].line() if findings else None,
        "cpu_s": cpu_s,
        "wall_s": wall_s,
        "stages_s": staged(case),
    }


def staged(case: Case) -> dict[str, float]:
    """CPU seconds of each stage of one more run."""
    spent: Counter[str] = Counter()
    problem = unseen(case)
    gc.collect()
    with watched(spent), uncollected():
        began_s = time.process_time()
        plan: Plan = make_plan(problem)
        planned_s = time.process_time()
        check_plan(plan)
    spent["check"] = time.process_time() - planned_s
    spent["rest"] = planned_s - began_s - sum(spent[name] for name in STAGE_NAMES if name not in ("check", "rest"))
    return {name: spent[name] for name in STAGE_NAMES}


def unseen(case: Case) -> PlanningProblem:
    """The problem as it comes out of a message: nothing about it is known yet."""
    return PlanningProblem.model_validate_json(case.problem.model_dump_json())


@contextmanager
def watched(spent: Counter[str]) -> Iterator[None]:
    """Count the time inside each stage's functions."""
    patches = [
        mock.patch.object(owner, name, clocked(getattr(owner, name), spent, stage)) for stage, owner, name in STAGES
    ]
    for patch in patches:
        patch.start()
    try:
        yield
    finally:
        for patch in patches:
            patch.stop()


def clocked(function: Callable[..., Any], spent: Counter[str], stage: str) -> Callable[..., Any]:
    """The function, its time added to `spent[stage]`."""

    @wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        began_s = time.process_time()
        try:
            return function(*args, **kwargs)
        finally:
            spent[stage] += time.process_time() - began_s

    return run


def render(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """The rows as markdown."""
    yield "## Time from problem to checked plan in memory"
    yield ""
    yield (
        "Milliseconds of the process on a core, median (max) over the cases, and each stage's median in a second run. "
        "The garbage collector is off, as in the planner process. "
        f"The `polynomial` path leaves out the joint placement model, which up to {MAX_JOINT_GPUS} GPUs is part of the "
        "`default`. "
        f"Aims: {', '.join(f'{1000 * aim:g} ms at {size} GPUs' for size, aim in AIMS_S.items())}."
    )
    yield ""
    yield "| model | kind | path | GPUs | cases | steps | CPU ms | wall ms | aim | " + " | ".join(STAGE_NAMES) + " |"
    yield "| --- | --- | --- | --- | --- | --- | --- | --- | --- |" + " --- |" * len(STAGE_NAMES)
    names = ("model", "kind", "path", "gpus")
    for key in dict.fromkeys(tuple(row[name] for name in names) for row in rows):
        same = [row for row in rows if tuple(row[name] for name in names) == key]
        model, kind, path, gpus = key
        middle = statistics.median(row["cpu_s"] for row in same)
        aim = AIMS_S.get(gpus) if path == "polynomial" else None
        cells = [
            model,
            kind,
            path,
            str(gpus),
            str(len(same)),
            f"{statistics.median(row['steps'] for row in same):.0f}",
            f"{1000 * middle:.0f} ({1000 * max(row['cpu_s'] for row in same):.0f})",
            f"{1000 * statistics.median(row['wall_s'] for row in same):.0f}",
            "refused" if any(row["refused"] for row in same) else verdict(aim, middle),
            *(f"{1000 * statistics.median(row['stages_s'][name] for row in same):.1f}" for name in STAGE_NAMES),
        ]
        yield "| " + " | ".join(cells) + " |"
    yield ""
    refused = [row for row in rows if row["refused"]]
    if refused:
        yield f"The checker refuses {len(refused)} plans, the first of them with: {refused[0]['refused']}."
        yield ""


def verdict(aim: float | None, seconds: float) -> str:
    """Whether an aim is met, nothing where there is none."""
    return "" if aim is None else "met" if seconds <= aim else "missed"
