"""Configure: which (D, P, M, B) the GPUs that stay should run.

`candidates` tabulates what fits, `choice` picks by goals (`cpsat`, or `enumerate` which must agree); here is what a
person or what runs already has to say first: pins, the running shape, migration headroom, a second replica. Fleets of
several GPU types go through `mixed` instead, whose replicas may differ in shape (`templates`, `mix`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from spotserve.core.cost import Workload
from spotserve.core.plan import SolverReport
from spotserve.core.spec import ServingSpec
from spotserve.solvers.configure.candidates import Candidate, Table, as_table, tabulate
from spotserve.solvers.configure.choice import CHOOSERS, RESHAPE_GAIN_PERMILLE, Goal, goals_for
from spotserve.solvers.paper.candidates import algorithm_1, algorithm_1_as_published

__all__ = [
    "BY_PAPER",
    "CHOOSERS",
    "FICKLE",
    "Candidate",
    "Choice",
    "Goal",
    "Table",
    "configure",
    "goals_for",
    "kept_shape",
    "pinned",
    "several_replicas",
    "tabulate",
]

SEVERAL_LOSS_PERMILLE = 1250
"""What a second replica may cost: so much of the latency that a single one would have."""

FICKLE = {"cpsat-fickle": "cpsat"}
"""Without hysteresis: what runs is worth nothing to them."""

BY_PAPER = {"paper": False, "paper-as-published": True}
"""Algorithm 1 as the artifact runs it, and as the paper prints it: they look at nothing but pins before they choose."""


@dataclass(frozen=True, slots=True)
class Choice:
    """The chosen candidate (None: nothing fits) and how it was found."""

    candidate: Candidate | None
    report: SolverReport


def configure(
    spec: ServingSpec, rows: Sequence[Candidate], *, workload: Workload, solver: str, in_bursts: bool = False
) -> Choice:
    """Choose among tabulated candidates: pins come first, then the running shape, then migration headroom.

    Where idle instances are given back the cheapest of what is about as fast is taken, but not for load `in_bursts`.
    """
    table = as_table(rows)
    if not len(table):
        certificate: dict[str, str | int | float] = {"kind": "no_candidate"}
        return Choice(None, SolverReport(name=solver, status="infeasible", certificate=certificate))
    load_known = workload.load_rps > 0
    allowed, pins = pinned(spec, table)
    if solver in BY_PAPER:
        offered = allowed
        if BY_PAPER[solver]:
            result = algorithm_1_as_published(offered.columns, load_known=load_known)
        else:
            result = algorithm_1(spec, offered.columns, workload)
        judged = dict(result.certificate)
    else:
        near = allowed if solver in FICKLE else kept_shape(allowed, load_known=load_known)
        roomy = near.where(near.columns["headroom"] > 0)
        roomy = roomy if len(roomy) else near
        offered = several_replicas(roomy, load_known=load_known) if spec.policy == "live" else roomy
        gives_back = spec.policy == "live" and spec.limits.spare_instances is not None and not in_bursts
        goals = goals_for(offered, load_known=load_known, gives_back=gives_back)
        if solver in FICKLE:
            goals = tuple(goal for goal in goals if goal.column != "disturbed")
        result = CHOOSERS[FICKLE.get(solver, solver)](offered, goals)
        measure = next(goal.column for goal in goals if goal.tolerance_permille)
        judged = {"kind": "epsilon_lexicographic", "measure": measure}
    assert result.answer is not None, "a table with rows has a choice"
    candidate = offered[result.answer]
    report = result.report(solver).model_copy(
        update={
            "certificate": {
                **judged,
                "candidates": len(offered),
                "data": candidate.data,
                "pipeline": candidate.pipeline,
                "tensor": candidate.tensor,
                "max_running": candidate.max_running,
                "serves_load": int(not candidate.unserved),
                "pins": pins,
                "headroom": "kept" if candidate.headroom else "given_up",
            }
        }
    )
    return Choice(candidate, report)


def pinned(spec: ServingSpec, table: Table) -> tuple[Table, str]:
    """The rows that keep the pinned degrees: all of them, else P and M with fewer replicas, else any."""
    limits, columns = spec.limits, table.columns
    if limits.data is None and limits.pipeline is None and limits.tensor is None:
        return table, "none"
    shaped = columns["data"] > 0
    for name, pin in (("pipeline", limits.pipeline), ("tensor", limits.tensor)):
        if pin is not None:
            shaped = shaped & (columns[name] == pin)
    if (shaped & (columns["data"] == (limits.data or columns["data"]))).any():
        return table.where(shaped & (columns["data"] == (limits.data or columns["data"]))), "kept"
    if limits.data is not None and (shaped & (columns["data"] < limits.data)).any():
        return table.where(shaped & (columns["data"] < limits.data)), "data_relaxed"
    return table, "relaxed"


def kept_shape(table: Table, *, load_known: bool) -> Table:
    """The rows that keep the running (P, M) where that is worth it, else all of them."""
    kept = table.where(table.columns["reshaped"] == 0)
    return kept if len(kept) and (not load_known or _as_good(kept, table, RESHAPE_GAIN_PERMILLE)) else table


def several_replicas(table: Table, *, load_known: bool) -> Table:
    """The rows of at least two replicas where they are nearly as good as one larger, else all of them.

    With a second replica the loss of one instance stops only the streams of one, and these have where to go at once:
    their KV moves into a pool that is there already. A single larger replica always stops whole.
    """
    several = table.where(table.columns["data"] > 1)
    return several if len(several) and (not load_known or _as_good(several, table, SEVERAL_LOSS_PERMILLE)) else table


def _as_good(some: Table, table: Table, loss_permille: int) -> bool:
    """Whether the best of `some` is as fast as the table's but for so much, and serves the load if that does."""
    unserved, best_us = _best(table)
    some_unserved, some_us = _best(some)
    return some_unserved == unserved and some_us * 1000 <= best_us * loss_permille


def _best(table: Table) -> tuple[int, int]:
    """(unserved, latency) of the fastest row among those that serve the load, if any does."""
    unserved = table.columns["unserved"]
    served = table.where(unserved == unserved.min())
    return int(unserved.min()), int(served.columns["latency_us"].min())
