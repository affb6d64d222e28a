"""What planning costs the daemon: how late its event loop is while the planner process solves."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.planner.worlds import draw_case
from benchmarks.results_file import say
from spotserve.core.canonical import canonical_json
from spotserve.core.check import check_plan
from spotserve.core.events import PlanReady
from spotserve.core.plan import Plan
from spotserve.solvers.planner_process import PlannerProcess

TICK_S = 0.01
IDLE_S = 3.0
BLOCKED_S = 0.05


def measure(sizes: Sequence[int], *, cases: int, seed: int) -> list[dict[str, Any]]:
    """One row per size: delays of a 10 ms ticker when idle and while plans are made, and what JSON takes of that."""
    rows = []
    for num_gpus in sizes:
        rows.append(asyncio.run(_watched(num_gpus, cases=cases, seed=seed)))
        say(f"jitter: {num_gpus} GPUs")
    return rows


async def _watched(num_gpus: int, *, cases: int, seed: int) -> dict[str, Any]:
    problems = [draw_case("random", num_gpus, seed + number).problem for number in range(cases)]
    process = PlannerProcess()
    await process.start()
    await process.solve(draw_case("random", 16, seed).problem)
    idle = await _delays(asyncio.sleep(IDLE_S))
    solving: list[float] = []
    plans: list[Plan] = []
    began = time.perf_counter()
    for problem in problems:
        solving += await _delays(_keep(process, problem, plans))
    seconds = time.perf_counter() - began
    await process.close()
    return {
        "gpus": num_gpus,
        "cases": cases,
        "solve_s": seconds / cases,
        "idle": _spread(idle),
        "solving": _spread(solving),
        "steps": max(len(plan.steps) for plan in plans),
        **_json_s(problems[0], plans[0]),
    }


async def _keep(process: PlannerProcess, problem: Any, plans: list[Plan]) -> None:
    plans.append(await process.solve(problem))


async def _delays(work: Any) -> list[float]:
    """How late each tick was while `work` ran."""
    late: list[float] = []
    task = asyncio.ensure_future(work)
    while not task.done():
        due = time.perf_counter() + TICK_S
        await asyncio.sleep(TICK_S)
        late.append(max(0.0, time.perf_counter() - due))
    await task
    return late


def _spread(late: Sequence[float]) -> dict[str, float]:
    values = np.array(late)
    return {
        "ticks": len(late),
        "median_s": float(np.median(values)),
        "p99_s": float(np.quantile(values, 0.99)),
        "max_s": float(values.max()),
    }


def _json_s(problem: Any, plan: Plan) -> dict[str, float]:
    """Seconds and bytes of writing the problem and reading the plan, as the coordinator does."""
    marks = [time.perf_counter()]
    line = problem.model_dump_json().encode()
    marks.append(time.perf_counter())
    answer = json.dumps({"plan": plan.model_dump(mode="json")}, sort_keys=True, separators=(",", ":"))
    began = time.perf_counter()
    raw = json.loads(answer)
    parsed = time.perf_counter()
    received = Plan.model_validate(raw["plan"])
    done = time.perf_counter()
    check_plan(received)
    checked = time.perf_counter()
    canonical_json(PlanReady(at_s=0.0, command="c1", plan=received))
    journalled = time.perf_counter()
    return {
        "problem_bytes": len(line),
        "plan_bytes": len(answer),
        "write_problem_s": marks[1] - marks[0],
        "parse_plan_s": parsed - began,
        "validate_plan_s": done - parsed,
        "check_plan_s": checked - done,
        "journal_plan_s": journalled - checked,
    }


def render(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """The rows as markdown."""
    yield "## How late the daemon's loop is while a plan is made"
    yield ""
    yield (
        f"A {1000 * TICK_S:g} ms ticker in the coordinator's process, whose planner is another process. Milliseconds "
        f"late: median / p99 / max. Above {1000 * BLOCKED_S:g} ms counts as blocked. The daemon also checks the plan "
        "and writes it to its journal in this loop, which the ticker does not see here."
    )
    yield ""
    yield (
        "| GPUs | plans | s per plan | steps | idle | while planning | problem JSON | write it | plan JSON | parse it "
        "| validate it | check it | journal it | |"
    )
    yield "| --- |" + " --- |" * 13
    for row in rows:
        cells = [
            str(row["gpus"]),
            str(row["cases"]),
            f"{row['solve_s']:.2f}",
            str(row["steps"]),
            *(
                " / ".join(f"{1000 * row[when][key]:.1f}" for key in ("median_s", "p99_s", "max_s"))
                for when in ("idle", "solving")
            ),
            f"{row['problem_bytes'] / 1e6:.2f} MB",
            f"{1000 * row['write_problem_s']:.0f} ms",
            f"{row['plan_bytes'] / 1e6:.2f} MB",
            f"{1000 * row['parse_plan_s']:.0f} ms",
            f"{1000 * row['validate_plan_s']:.0f} ms",
            f"{1000 * row['check_plan_s']:.0f} ms",
            f"{1000 * row['journal_plan_s']:.0f} ms",
            "blocked" if row["solving"]["max_s"] > BLOCKED_S else "",
        ]
        yield "| " + " | ".join(cells) + " |"
    yield ""
