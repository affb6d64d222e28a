"""Content: what a layout is given. Which weights come from where, whose KV moves, and what becomes of requests."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field

from spotserve.core.ids import GpuId, InstanceId, instance_of
from spotserve.core.plan import Route, SolverReport
from spotserve.core.slices import kv_token_bytes
from spotserve.solvers.actions import decide_requests, ladder_problem
from spotserve.solvers.draft import Draft
from spotserve.solvers.facts import Facts
from spotserve.solvers.ladder import keep_requests
from spotserve.solvers.layout import Layout
from spotserve.solvers.migrate.kv import KvTransfer, kv_transfers
from spotserve.solvers.migrate.pieces import Demand, cut_pieces
from spotserve.solvers.migrate.ports import FixedCopy, ports_of
from spotserve.solvers.migrate.sources import SourceProblem, Transfer, choose_sources
from spotserve.solvers.ranges import shard_at
from spotserve.solvers.result import Result
from spotserve.solvers.view import kv_tokens, requests_of

KvOfRoutes = Mapping[Route, tuple[KvTransfer, ...]]
"""The rectangles of KV that follow each route."""

RESTART_POLICIES = frozenset({"reroute", "reparallelize"})
"""Baselines that move no KV and load weights from storage."""


@dataclass(frozen=True, slots=True)
class Content:
    """The weights that are fetched, the KV rectangles of routes, the requests that move, and who decided that."""

    transfers: tuple[Transfer, ...] = ()
    kv: KvOfRoutes = field(default_factory=dict)
    moving: frozenset[str] = frozenset()
    reports: Mapping[str, SolverReport] = field(default_factory=dict)


def senders(facts: Facts, *, doomed: bool) -> list[GpuId]:
    """The GPUs that weights may be copied from: all living ones, or those that stay."""
    return allowed(facts, [*facts.view.staying, *(facts.view.doomed if doomed else ())])


def allowed(facts: Facts, gpus: list[GpuId]) -> list[GpuId]:
    """Those of some GPUs that weights may be copied from; the baselines load everything from storage."""
    return [] if facts.policy in RESTART_POLICIES else gpus


def kv_of(facts: Facts, layout: Layout) -> dict[Route, tuple[KvTransfer, ...]]:
    """KV rectangles of every route whose source still lives."""
    replicas = {replica.id: replica for replica in (*layout.untouched, *layout.fresh, *layout.affected)}
    lost = {replica.id for replica in facts.view.lost}
    return {
        route: kv_transfers(facts.catalog, facts.model, replicas[route.from_replica], replicas[route.to_replica])
        for route in layout.routes
        if route.from_replica not in lost
    }


def content_of(
    facts: Facts,
    layout: Layout,
    sources: list[GpuId],
    kv: KvOfRoutes,
    *,
    budget_s: float | None = None,
    stay_s: float | None = None,
    freed: frozenset[GpuId] | None = None,
) -> Content:
    """Where weights come from, and which requests move.

    Args:
        sources: the GPUs that weights may be copied from.
        kv: what could move; empty where no KV does.
        budget_s: the time that ports have; None: all that B and the KV pools hold moves.
        stay_s: who ends within so long, where a budget is set, finishes where it is.
        freed: GPUs of a restart that release all they hold first, and fetch it again.
    """
    weights = _fetched(facts, layout, sources, kv, None, freed=freed)
    moving, reports = _moving(facts, layout, kv, weights, budget_s=budget_s, stay_s=stay_s)
    if len(moving) < sum(len(requests_of(facts.problem, route.from_replica)) for route in kv):
        # Weights had their senders chosen beside the KV of all requests; with less of it other ports are free.
        weights = _fetched(facts, layout, sources, kv, moving, freed=freed)
    assert weights.answer is not None, "every piece has a holder or comes from storage"
    reports["migrate"] = weights.report(facts.solvers["migrate"])
    return Content(weights.answer, kv, moving, reports)


def _fetched(
    facts: Facts,
    layout: Layout,
    sources: list[GpuId],
    kv: KvOfRoutes,
    moving: frozenset[str] | None,
    *,
    freed: frozenset[GpuId] | None,
) -> Result[tuple[Transfer, ...]]:
    """Where every missing range of the new replicas comes from, beside the KV that passes the ports."""
    demands = [
        Demand(gpu, index // replica.tensor, facts.catalog.owned(shard_at(facts.model, replica, index)))
        for replica in layout.fresh
        for index, gpu in enumerate(replica.gpus)
    ]
    problem = SourceProblem(
        cut_pieces(facts.catalog, demands, facts.held, sources, freed=freed),
        ports_of(facts.spec.profile),
        frozenset(facts.view.doomed),
        _kv_copies(facts, kv, moving),
    )
    return choose_sources(problem, facts.catalog, facts.solvers["migrate"])


def _kv_copies(facts: Facts, kv: KvOfRoutes, moving: frozenset[str] | None) -> tuple[FixedCopy, ...]:
    """What the KV of the requests that move (None: all) puts through the ports."""
    copies: dict[tuple[InstanceId, InstanceId], int] = defaultdict(int)
    for route, rectangles in kv.items():
        requests = requests_of(facts.problem, route.from_replica)
        tokens = sum(kv_tokens(one) for one in requests if moving is None or one.request in moving)
        for one in rectangles:
            source, destination = instance_of(one.source), instance_of(one.destination)
            if source != destination:
                layers, heads = one.rectangle
                copies[source, destination] += tokens * kv_token_bytes(facts.model, layers=layers, heads=heads)
    return tuple(FixedCopy(*ports, size) for ports, size in copies.items())


def _moving(
    facts: Facts,
    layout: Layout,
    kv: KvOfRoutes,
    weights: Result[tuple[Transfer, ...]],
    *,
    budget_s: float | None,
    stay_s: float | None,
) -> tuple[frozenset[str], dict[str, SolverReport]]:
    """The requests that the ladder's solver lets move, and its report where something bound it."""
    problem = ladder_problem(
        facts.problem,
        facts.view,
        layout.affected,
        (*layout.untouched, *layout.fresh),
        kv=kv,
        transfers=weights.answer or (),
        budget_s=budget_s,
        stay_s=stay_s,
    )
    if not problem.items:
        return frozenset(), {}
    name = facts.solvers["ladder"]
    result = keep_requests(problem, name)
    binds = facts.view.remaining_s is not None or result.certificate.get("kind") != "all_fit"
    moving = frozenset(result.answer.names if result.answer is not None else ())
    return moving, {"ladder": result.report(name)} if binds else {}


def draft_of(facts: Facts, layout: Layout, content: Content, *, stay_s: float | None = None) -> Draft:
    """A live draft of a layout and its content; without `stay_s` no request finishes where it is."""
    living = [replica.id for replica in layout.affected if replica not in facts.view.lost]
    actions = decide_requests(
        facts.problem,
        layout.affected,
        layout.routes,
        moving=content.moving,
        staying=() if stay_s is None else living,
        stay_s=stay_s or 0.0,
    )
    return Draft(
        problem=facts.problem,
        view=facts.view,
        mode="live",
        untouched=layout.untouched,
        fresh=layout.fresh,
        affected=layout.affected,
        routes=layout.routes,
        actions=actions,
        transfers=content.transfers,
        kv=content.kv,
        held=facts.held,
    )
