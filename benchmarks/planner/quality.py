"""How far each placement solver's makespan is from the proven best of the joint model."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.planner.oracle import Joint, joint_s, placement_s
from benchmarks.planner.speed import placed_within
from benchmarks.planner.worlds import KINDS, Case, draw_case
from benchmarks.results_file import say
from spotserve.core.ids import instance_of
from spotserve.core.plan import CopyKvDelta, Plan, Step
from spotserve.solvers.planner import make_plan
from spotserve.solvers.registry import SOLVERS
from spotserve.solvers.steps import busiest_port_s

COMPARED = ("makespan", "reuse", "paper", "rank-order")
PROVEN_UP_TO = 64
"""GPUs; beyond, the best that any method finds takes the place of the optimum."""

LONG_BUDGET = 60.0
"""Deterministic time of the joint model where it only stands for the best that can be found."""

TIME_LIMIT_S = {16: 20.0, 32: 30.0, 64: 60.0, 256: 60.0}
AIMS = {16: 1.02, 32: 1.02, 64: 1.02, 256: 1.10}


def solvers() -> tuple[str, ...]:
    """The placement solvers of the table that exist."""
    return tuple(name for name in COMPARED if name in SOLVERS["place"])


def measure(sizes: Sequence[int], *, cases: int, seed: int) -> list[dict[str, Any]]:
    """One row per size, kind and case."""
    rows = []
    for num_gpus in sizes:
        for kind in KINDS:
            for number in range(cases):
                rows.append(compared(draw_case(kind, num_gpus, seed + number)))
            say(f"quality: {num_gpus} GPUs, {kind}")
    return rows


def planned(case: Case, place: str) -> Plan:
    """The plan with one placement solver."""
    spec = case.problem.spec.model_copy(update={"solvers": {"place": place}})
    return make_plan(case.problem.model_copy(update={"spec": spec}))


def compared(case: Case) -> dict[str, Any]:
    """Makespans of one case: each solver's placement with the best sources, its plan as written, and the optimum."""
    plans = {name: planned(case, name) for name in solvers()}
    rate = case.problem.spec.profile.link_bytes_per_s
    placed_s = {name: placement_s(plan) for name, plan in plans.items()}
    joint = joint_s(plans[solvers()[0]], time_limit_s=TIME_LIMIT_S.get(case.num_gpus, 60.0))
    long_s = None
    if case.num_gpus > PROVEN_UP_TO:
        with placed_within(LONG_BUDGET):
            long_s = placement_s(planned(case, "makespan"))
    return {
        "gpus": case.num_gpus,
        "kind": case.kind,
        "seed": case.seed,
        "old": case.old,
        "new": case.new,
        "placed_s": placed_s,
        "written_s": {name: busiest_port_s(foreseen(plan), link_bytes_per_s=rate) for name, plan in plans.items()},
        "split_groups": {name: split_groups(plan) for name, plan in plans.items()},
        "optimum_s": None if math.isinf(joint.makespan_s) else joint.makespan_s,
        "bound_s": _bound(joint),
        "proven": joint.proven,
        "long_s": long_s,
        "columns": joint.columns,
    }


def foreseen(plan: Plan) -> list[Step]:
    """The steps of a plan without the blocks that are not full before the stop: no placement can foresee them."""
    return [step for step in plan.steps if not isinstance(step, CopyKvDelta)]


def _bound(joint: Joint) -> float:
    return joint.makespan_s if joint.proven else joint.bound_s


def split_groups(plan: Plan) -> int:
    """New tensor groups that span instances."""
    before = {one.id for one in plan.snapshot.world.replicas}
    return sum(
        len({instance_of(gpu) for gpu in stage.gpus}) > 1
        for one in plan.target.replicas
        if one.id not in before
        for stage in one.stages
    )


def best_s(row: Mapping[str, Any]) -> float:
    """The proven optimum, or the best that any method found."""
    found = [row[name] for name in ("optimum_s", "long_s") if row[name] is not None]
    if row["proven"]:
        return float(found[0])
    inside = [value for name, value in row["placed_s"].items() if not row["split_groups"][name]]
    return float(min(found + inside))


def render(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """The rows as markdown."""
    yield "## Makespan over the best"
    yield ""
    yield (
        "Time of the busiest port of a placement with the best sources, over that of the joint model's optimum (tensor "
        "groups inside instances; HiGHS) or, where that is not proven, of the best that any method found. Cases in "
        "which nothing has to cross a port are left out of the ratios; `moved for nothing` counts those in which a "
        "solver moves something all the same. What several GPUs of an instance lack passes its port once, for all "
        "placements and in the steps of their plans. `as written` is the busiest port of these steps, with the sources "
        "that they name and without the last KV blocks of the stop, over the same best. HiGHS has "
        f"{', '.join(f'{limit:g} s at {gpus}' for gpus, limit in TIME_LIMIT_S.items())} GPUs, by the clock, a case: on "
        "a busy machine it proves less. The planner's own budgets are deterministic, and above "
        f"{PROVEN_UP_TO} GPUs the best also counts its placement with a deterministic budget of {LONG_BUDGET:g} s."
    )
    yield ""
    yield (
        "| GPUs | kind | place | cases | proven | mean | median | p90 | max | optimal | as written, mean | "
        "as written, max | split groups | moved for nothing | aim |"
    )
    yield "| --- |" + " --- |" * 14
    for gpus, kind in dict.fromkeys((row["gpus"], row["kind"]) for row in rows):
        same = [row for row in rows if (row["gpus"], row["kind"]) == (gpus, kind)]
        moving = [row for row in same if best_s(row) > 1e-9]
        for name in same[0]["placed_s"]:
            ratios = [row["placed_s"][name] / best_s(row) for row in moving]
            written = [row["written_s"][name] / best_s(row) for row in moving]
            idle = sum(row["placed_s"][name] > 1e-9 for row in same if best_s(row) <= 1e-9)
            if not ratios:
                continue
            mean = statistics.fmean(ratios)
            aim = AIMS.get(gpus) if name == "makespan" else None
            cells = [
                str(gpus),
                kind,
                name,
                str(len(moving)),
                str(sum(row["proven"] for row in moving)),
                f"{mean:.3f}",
                f"{statistics.median(ratios):.3f}",
                f"{float(np.quantile(ratios, 0.9)):.3f}",
                f"{max(ratios):.3f}",
                f"{100 * sum(ratio <= 1 + 1e-6 for ratio in ratios) / len(ratios):.0f} %",
                f"{statistics.fmean(written):.3f}",
                f"{max(written):.3f}",
                str(sum(row["split_groups"][name] > 0 for row in moving)),
                str(idle),
                "" if aim is None else f"≤ {aim:g}: {'met' if mean <= aim else 'missed'}",
            ]
            yield "| " + " | ".join(cells) + " |"
    yield ""
    open_rows = [row for row in rows if not row["proven"] and best_s(row) > 1e-9]
    if open_rows:
        gaps = [best_s(row) / max(1e-9, row["bound_s"]) for row in open_rows]
        yield (
            f"Not proven: {len(open_rows)} cases; best found over the bound there {statistics.median(gaps):.3f} in the "
            f"median, {max(gaps):.3f} at most."
        )
        yield ""
