"""The plan builder: from one planning problem to one plan, pure and deterministic.

`make_plan` is configure -> routes -> place -> migrate -> steps, tried along a ladder: live with all KV, with the
hottest KV, with tokens only, with survivors as sources only; then in_place; then nothing fits and the plan says so.

As a process (`python -m spotserve.solvers.planner`) it reads one PlanningProblem per line on stdin and answers one
line on stdout; OR-Tools' graph solvers hold the GIL, so they stay out of the coordinator.
"""

from __future__ import annotations

import gc
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal, TextIO

from pydantic import ValidationError

from spotserve.core.canonical import canonical_json, digest
from spotserve.core.cost import least_kv_blocks
from spotserve.core.ids import GpuId, InstanceId, ReplicaId, instance_of
from spotserve.core.plan import (
    CopyKv,
    CopyKvDelta,
    CopyWeights,
    EpochChange,
    Plan,
    PlanningProblem,
    RequestAction,
    Route,
    SolverReport,
    Step,
    Target,
)
from spotserve.core.slices import kv_token_bytes
from spotserve.core.snapshot import Replica
from spotserve.errors import SpecError, SpotServeError
from spotserve.solvers.actions import decide_requests, ladder_problem, seconds_per_token
from spotserve.solvers.configure import Candidate, Choice, Table, configure, tabulate
from spotserve.solvers.configure.mixed import MixChoice
from spotserve.solvers.draft import Draft, used_blocks
from spotserve.solvers.estimate import estimate, finish_times, margin_s, workload_of
from spotserve.solvers.facts import Facts, gather
from spotserve.solvers.gpu_kinds import shape_of
from spotserve.solvers.ladder import keep_requests
from spotserve.solvers.layer_order import layer_changes, peak_bytes, published_layers
from spotserve.solvers.layout import Layout, LayoutBuilder
from spotserve.solvers.migrate.kv import KvTransfer, kv_transfers
from spotserve.solvers.migrate.memory import order_layers
from spotserve.solvers.migrate.pieces import Demand, cut_pieces
from spotserve.solvers.migrate.ports import FixedCopy, ports_of
from spotserve.solvers.migrate.sources import LAYER_BY_LAYER, SourceProblem, Transfer, choose_sources
from spotserve.solvers.migration_cost import MigrationCost, migration_cost
from spotserve.solvers.mixed_layout import configure_by_type, kept_replicas
from spotserve.solvers.ranges import shard_at
from spotserve.solvers.registry import POLICIES, require_known
from spotserve.solvers.steps import StepWriter, Window, busiest_port_s
from spotserve.solvers.view import kv_tokens, natural_key, requests_of
from spotserve.solvers.window import CUT_OVER_TRIPS, stop_window

MAX_LINE_BYTES = 64 * 1024 * 1024
ATTEMPTS = 8
"""Candidates tried in live mode before in_place is considered, and compared where the first one's outage is long."""

MAX_COMPARED_GPUS = 128
"""GPUs up to which several candidates are planned to the end; beyond, the first one that has a live plan is taken."""

BUDGETS = 6
"""Times that the ladder's solver is asked for less before no KV moves at all."""

PATIENCE_S = 10.0
"""How long a stop that has no deadline waits for requests that can go nowhere else."""

STAY_SHARE = 0.8
"""Share of a grace period that a stop may wait for them."""

WORSE_PERMILLE = 1500
"""A later candidate may be this much worse than the first and still be preferred for being live."""

Rung = Literal["all_kv", "hottest_kv", "tokens_only"]
LADDER: tuple[Rung, ...] = ("all_kv", "hottest_kv", "tokens_only")

RESTART_POLICIES = frozenset({"reroute", "reparallelize"})
"""Baselines that move no KV and load weights from storage."""


@dataclass(slots=True)
class Planner:
    """One planning run: the problem, its caches and the reports of the solvers."""

    facts: Facts
    layouts: LayoutBuilder
    reports: dict[str, SolverReport] = field(default_factory=dict)

    def plan(self) -> Plan:
        """The best plan the ladder reaches."""
        if self.facts.policy == "reroute" and (shape := self._running_shape()) is not None:
            return self._reroute(shape)
        if self.facts.mixed:
            return self._plan_by_type()
        rows = self._candidates()
        first = self._configure(rows)
        if first.candidate is None:
            return self._degraded(first)
        if self._keeps_everything(first.candidate):
            self.reports["configure"] = first.report
            return self._unchanged()
        if self.facts.policy == "live" or not self.facts.problem.snapshot.world.replicas:
            plan = self._best_live(rows, first)
            if plan is not None:
                return plan
        self.reports["configure"] = first.report
        untouched = () if self.facts.policy == "reparallelize" else self._kept(first.candidate)
        return self._in_place(first.candidate.shape, first.candidate.data, untouched)

    def _plan_by_type(self) -> Plan:
        """A plan for a fleet of several GPU types, whose replicas may differ in shape."""
        choice = configure_by_type(self.facts)
        if not choice.replicas:
            return self._degraded(Choice(None, choice.report))
        self.reports["configure"] = choice.report
        world = self.facts.problem.snapshot.world
        untouched = kept_replicas(self.facts, choice.shapes)
        if len(untouched) == len(world.replicas) == len(choice.shapes):
            return self._unchanged()
        if self.facts.policy == "live" or not world.replicas:
            layout = self._lay_out_by_type(choice, untouched, mode="live")
            if layout is not None:
                return self._climb_down(layout)
        if self.facts.policy == "reparallelize":
            untouched = ()
        layout = self._lay_out_by_type(choice, untouched, mode="in_place")
        assert layout is not None, "a template fits an empty GPU"
        return self._stopped(layout)

    def _lay_out_by_type(self, choice: MixChoice, untouched: tuple[Replica, ...], *, mode: str) -> Layout | None:
        """The new replicas of a mix placed beside the untouched ones."""
        shapes = list(choice.shapes)
        for replica in untouched:
            shapes.remove(shape_of(replica, self.facts.types, self.facts.spec.profile))
        layout = self.layouts.lay_out_by_type(shapes, untouched, mode=mode)
        assert self.layouts.report is not None, "a layout was placed"
        self.reports["place"] = self.layouts.report
        return layout

    def _candidates(self) -> Table:
        """Every configuration that fits the GPUs that stay."""
        return tabulate(
            self.facts.spec,
            memory=[self.facts.view.memory[gpu] for gpu in self.facts.view.staying],
            workload=workload_of(self.facts.problem),
            intact=self.facts.view.intact,
            hit=(*self.facts.view.draining, *self.facts.view.lost),
        )

    def _configure(self, rows: Table) -> Choice:
        return configure(
            self.facts.spec,
            rows,
            load_rps=self.facts.problem.snapshot.load_rps,
            solver=self.facts.solvers["configure"],
        )

    def _near_best(self, rows: Table, first: Choice) -> Iterator[Choice]:
        """The best candidate, then the next ones while they are about as good."""
        best = first.candidate
        assert best is not None
        choice, left = first, rows
        for _ in range(ATTEMPTS):
            candidate = choice.candidate
            if candidate is None or not _about_as_good(candidate, best) or _pins(choice) != _pins(first):
                return
            yield choice
            left = left.without(pipeline=candidate.pipeline, tensor=candidate.tensor, data=candidate.data)
            choice = self._configure(left)

    def _best_live(self, rows: Table, first: Choice) -> Plan | None:
        """The live plan of the first candidate that has one, or of another that costs clients clearly less.

        Others are only planned where the first one's outage is long enough for any of them to win; None if no candidate
        fits beside what is there.
        """
        best: tuple[Plan, MigrationCost] | None = None
        passed_over = 0
        for choice in self._near_best(rows, first):
            assert choice.candidate is not None, "only candidates are near the best"
            assert first.candidate is not None, "what is near has something to be near to"
            self.reports = {"configure": _with(choice, passed_over=passed_over) if best else choice.report}
            plan = self._unchanged() if self._keeps_everything(choice.candidate) else self._live(choice)
            if plan is None:
                continue
            lost = [replica.id for replica in self.facts.view.lost]
            cost = migration_cost(plan, choice.candidate, best=first.candidate, lost=lost)
            if best is None:
                best = leading = plan, cost
                if not cost.may_be_beaten or len(self.facts.view.staying) > MAX_COMPARED_GPUS:
                    return plan
            elif cost.beats(leading[1]) and cost.score < best[1].score:
                best = plan, cost
            passed_over += 1
        return best[0] if best else None

    def _running_shape(self) -> tuple[int, int] | None:
        """(P, M) of what runs or ran; None before the first placement."""
        replicas = self.facts.problem.snapshot.world.replicas
        return (replicas[0].pipeline, replicas[0].tensor) if replicas else None

    def _kept(self, candidate: Candidate) -> tuple[Replica, ...]:
        """The intact replicas of the chosen shape, at most D, those with the most KV first."""
        same = [r for r in self.facts.view.intact if (r.pipeline, r.tensor) == candidate.shape]
        same.sort(key=lambda r: (-self.facts.progress(r), natural_key(r.id)))
        return tuple(sorted(same[: candidate.data], key=lambda r: natural_key(r.id)))

    def _keeps_everything(self, candidate: Candidate) -> bool:
        """Whether the chosen layout is exactly what runs."""
        kept = self._kept(candidate)
        return len(kept) == len(self.facts.problem.snapshot.world.replicas) == candidate.data

    # -- live -----------------------------------------------------------------------------------------------

    def _live(self, choice: Choice) -> Plan | None:
        """A live plan of a candidate, as far up the ladder as the deadline allows; None if memory is short."""
        candidate = choice.candidate
        assert candidate is not None
        untouched = self._kept(candidate)
        layout = self._lay_out(candidate.shape, candidate.data - len(untouched), untouched, mode="live")
        if layout is None:
            return None
        return self._climb_down(layout)

    def _lay_out(
        self, shape: tuple[int, int], num_fresh: int, untouched: tuple[Replica, ...], *, mode: str
    ) -> Layout | None:
        layout = self.layouts.lay_out(shape, num_fresh, untouched, mode=mode)
        assert self.layouts.report is not None, "a layout was placed"
        self.reports["place"] = self.layouts.report
        return layout

    def _climb_down(self, layout: Layout) -> Plan:
        """The first rung of the ladder whose doomed sources are read in time."""
        kv = self._kv(layout)
        for doomed_sources in (True, False):
            sources = self._sources(doomed=doomed_sources)
            if (kept := self._descend(partial(self._live_plan, layout, sources, kv))) is not None:
                return kept
            self.reports.pop("ladder", None)
            transfers = self._fetch(layout.fresh, sources=sources)
            plan = self._finish_live(layout, transfers, {}, frozenset(), "tokens_only")
            if self._in_time(plan):
                break
        return plan

    def _descend(self, build: Callable[[float | None], Plan | None]) -> Plan | None:
        """The first plan in time: with all KV, then with what is worth most of it within ever shorter budgets."""
        budget_s = None
        for _ in range(BUDGETS):
            plan = build(budget_s)
            if plan is None or self._in_time(plan):
                return plan
            allowed_s = self._allowed_s()
            assert allowed_s is not None, "only a deadline makes a plan late"
            if budget_s is None:
                budget_s = max(0.0, allowed_s - self._cut_over_s())
            else:
                budget_s *= min(0.9, allowed_s / max(self._needed_s(plan), 1e-9))
        return None

    def _allowed_s(self) -> float | None:
        """What plans may use of the grace period."""
        left = self.facts.view.remaining_s
        return None if left is None else left - margin_s(left)

    def _cut_over_s(self) -> float:
        """What a stop takes beside its bytes: round trips and the iteration that it waits for."""
        draining = self.facts.view.draining
        iteration_s = max((seconds_per_token(self.facts.problem, replica) for replica in draining), default=0.0)
        return CUT_OVER_TRIPS * self.facts.spec.profile.round_trip_s + iteration_s

    def _needed_s(self, plan: Plan) -> float:
        """When the last read of a doomed instance ends, by path and by the busiest port; 0 if there is none."""
        reads = [
            step
            for step in plan.steps
            if isinstance(step, CopyWeights | CopyKv | CopyKvDelta) and step.source in self.facts.view.doomed
        ]
        if not reads:
            return 0.0
        finish = finish_times(plan.steps)
        ports = busiest_port_s(plan.steps, link_bytes_per_s=self.facts.spec.profile.link_bytes_per_s)
        return max(ports, *(finish[step.id] for step in reads))

    def _in_time(self, plan: Plan) -> bool:
        """Whether every read of a doomed instance ends within its grace period, margin included, as must any stop."""
        allowed_s = self._allowed_s()
        stop = plan.solver.get("arrange")
        if allowed_s is None or (stop is not None and stop.status == "infeasible"):
            return allowed_s is None
        needed_s = self._needed_s(plan)
        return needed_s == 0.0 or needed_s <= allowed_s

    def _live_plan(
        self,
        layout: Layout,
        sources: list[GpuId],
        kv: Mapping[Route, tuple[KvTransfer, ...]],
        budget_s: float | None,
    ) -> Plan | None:
        """One rung: what moves within a budget (None: of any size); None if that is nothing."""
        transfers, moving = self._content(layout, sources, kv, budget_s, stay_s=self._stay_s())
        if budget_s is not None and not moving:
            return None
        return self._finish_live(layout, transfers, kv, moving, "all_kv" if budget_s is None else "hottest_kv")

    def _finish_live(
        self,
        layout: Layout,
        transfers: tuple[Transfer, ...],
        kv: Mapping[Route, tuple[KvTransfer, ...]],
        moving: frozenset[str],
        rung: Rung,
    ) -> Plan:
        draft = Draft(
            problem=self.facts.problem,
            view=self.facts.view,
            mode="live",
            untouched=layout.untouched,
            fresh=layout.fresh,
            affected=layout.affected,
            routes=layout.routes,
            actions=self._actions(layout, moving, stay_s=self._stay_s()),
            transfers=transfers,
            kv=kv,
            held=self.facts.held,
        )
        if self.facts.solvers["migrate"] == "paper":
            draft = self._as_published(draft)
        steps = StepWriter(draft, self.facts.catalog, self._window(draft)).write_live()
        return self._finish(draft, steps, rung)

    def _as_published(self, draft: Draft) -> Draft:
        """A draft whose weights go one layer after the other, in the order of the paper's Algorithm 2."""
        memory = self.layouts.free_of_pools(draft)
        return replace(draft, layer_by_layer=published_layers(self.facts.catalog, draft, memory=memory))

    def _window(self, draft: Draft) -> Window:
        """When to stop decoding; the solver's report goes into the plan if there is a deadline."""
        name = self.facts.solvers["arrange"]
        window, result = stop_window(draft, name)
        self.reports.pop("arrange", None)
        if result is not None:
            self.reports["arrange"] = result.report(name)
        return window

    # -- the other ways -------------------------------------------------------------------------------------

    def _in_place(self, shape: tuple[int, int], data: int, untouched: tuple[Replica, ...]) -> Plan:
        """A plan that stops first: old and new do not fit side by side, or the policy restarts everything."""
        layout = self._lay_out(shape, data - len(untouched), untouched, mode="in_place")
        assert layout is not None, "a tabulated candidate fits an empty GPU"
        return self._stopped(layout)

    def _stopped(self, layout: Layout) -> Plan:
        """A plan of a layout that stops first: layer by layer if memory and time allow, else all at once."""
        if self.facts.policy not in RESTART_POLICIES and self.facts.solvers["migrate"] in LAYER_BY_LAYER:
            for keeps_kv in (True, False):
                if (plan := self._descend(partial(self._layered, layout, keeps_kv))) is not None:
                    return plan
        self.reports.pop("ladder", None)
        self.reports.pop("memory", None)
        sources = [gpu for replica in layout.untouched for gpu in replica.gpus]
        draft = self._draft_in_place(layout, sources=self._allowed(sources), kv={}, released_first=True)
        steps = StepWriter(draft, self.facts.catalog, self._window(draft)).write_in_place(None)
        return self._finish(draft, steps, "tokens_only")

    def _layered(self, layout: Layout, keeps_kv: bool, budget_s: float | None) -> Plan | None:
        """Algorithm 2; with `keeps_kv` old KV pools shrink to their content, which moves before any weight does.

        None if memory does not suffice, or if nothing moves within `budget_s`.
        """
        if budget_s is not None and not keeps_kv:
            return None
        limits = self.facts.spec.limits
        kept = {
            r.id: used_blocks(self.facts.problem, r)
            for r in layout.affected
            if keeps_kv and r not in self.facts.view.lost
        }
        fresh = tuple(self.layouts.sized(r, room=self.layouts.room_beside(layout.affected, kept)) for r in layout.fresh)
        while all(replica.kv_blocks >= least_kv_blocks(limits) for replica in fresh):
            sized = replace(layout, fresh=fresh)
            kv = self._kv(sized) if keeps_kv else {}
            draft = self._draft_in_place(
                sized, sources=self._sources(doomed=True), kv=kv, kept_blocks=kept, budget_s=budget_s
            )
            if budget_s is not None and all(action.action != "move" for action in draft.actions):
                return None
            draft, order = self._ordered(draft)
            if order is not None:
                steps = StepWriter(draft, self.facts.catalog, self._window(draft)).write_in_place(order)
                rung: Rung = "tokens_only" if not kv else "all_kv" if budget_s is None else "hottest_kv"
                return self._finish(draft, steps, rung)
            # Weights on their way need room too.
            fresh = tuple(self.layouts.with_blocks(replica, replica.kv_blocks * 3 // 4) for replica in fresh)
        return None

    def _ordered(self, draft: Draft) -> tuple[Draft, tuple[str, ...] | None]:
        """The draft with the order in which its layers move, None if memory does not suffice for one."""
        memory = self.layouts.free_of_pools(draft)
        changes = layer_changes(self.facts.catalog, draft)
        if self.facts.solvers["migrate"] == "paper":
            published = self._as_published(draft)
            order = published.layer_by_layer or ()
            return published, order if peak_bytes(changes, order, memory) <= 0 else None
        result = order_layers(changes, memory)
        self.reports["memory"] = result.report("algorithm_2")
        return draft, result.answer

    def _draft_in_place(
        self,
        layout: Layout,
        *,
        sources: list[GpuId],
        kv: Mapping[Route, tuple[KvTransfer, ...]],
        kept_blocks: Mapping[ReplicaId, int] | None = None,
        released_first: bool = False,
        budget_s: float | None = None,
    ) -> Draft:
        self.reports.pop("ladder", None)
        transfers, moving = self._content(layout, sources, kv, budget_s, nothing_held=released_first)
        return Draft(
            problem=self.facts.problem,
            view=self.facts.view,
            mode="in_place",
            untouched=layout.untouched,
            fresh=layout.fresh,
            affected=layout.affected,
            routes=layout.routes,
            actions=self._actions(layout, moving),
            transfers=transfers,
            kv=kv,
            held=self.facts.held,
            released_first=released_first,
            kept_blocks=kept_blocks or {},
        )

    def _reroute(self, shape: tuple[int, int]) -> Plan:
        """Rerouting: fixed (P, M); a hit replica is dropped, idle GPUs form new ones from storage, KV is lost."""
        untouched = self.facts.view.intact
        used = {gpu for replica in untouched for gpu in replica.gpus}
        idle = [gpu for gpu in self.facts.view.staying if gpu not in used]
        spawn = len(idle) // (shape[0] * shape[1])
        if self.facts.spec.limits.data is not None:
            spawn = max(0, min(spawn, self.facts.spec.limits.data - len(untouched)))
        self.reports["configure"] = SolverReport(
            name="fixed_shape",
            status="optimal" if untouched or spawn else "infeasible",
            objective=len(untouched) + spawn,
            bound=len(untouched) + spawn,
            certificate={"kind": "fixed_shape", "pipeline": shape[0], "tensor": shape[1]},
        )
        if not spawn and len(untouched) == len(self.facts.problem.snapshot.world.replicas):
            return self._unchanged()
        layout = self._lay_out(shape, spawn, untouched, mode="live")
        if layout is None:
            # A pipeline that does not fit beside what its GPUs still hold is not formed: rerouting never restarts.
            layout = self._lay_out(shape, 0, untouched, mode="live")
            assert layout is not None, "a layout without new replicas needs no room"
        transfers = self._fetch(layout.fresh, sources=[])
        draft = Draft(
            problem=self.facts.problem,
            view=self.facts.view,
            mode="live",
            untouched=layout.untouched,
            fresh=layout.fresh,
            affected=layout.affected,
            routes=layout.routes,
            actions=self._actions(layout, frozenset()),
            transfers=transfers,
            kv={},
            held=self.facts.held,
        )
        steps = StepWriter(draft, self.facts.catalog, self._window(draft)).write_live()
        return self._finish(draft, steps, "tokens_only")

    def _degraded(self, choice: Choice) -> Plan:
        """Nothing fits what is left: serve until the last moment, then wait with every request kept."""
        self.reports["configure"] = choice.report
        layout = Layout((), (), self.facts.affected(()), ())
        draft = Draft(
            problem=self.facts.problem,
            view=self.facts.view,
            mode="live",
            untouched=(),
            fresh=(),
            affected=layout.affected,
            routes=(),
            actions=self._actions(layout, frozenset()),
            transfers=(),
            kv={},
            held=self.facts.held,
        )
        steps = StepWriter(draft, self.facts.catalog, self._window(draft)).write_live() if layout.affected else ()
        return self._finish(draft, steps, "tokens_only")

    def _unchanged(self) -> Plan:
        """What runs is what should run."""
        layout = Layout(tuple(self.facts.problem.snapshot.world.replicas), (), (), ())
        draft = Draft(
            problem=self.facts.problem,
            view=self.facts.view,
            mode="live",
            untouched=layout.untouched,
            fresh=(),
            affected=(),
            routes=(),
            actions=(),
            transfers=(),
            kv={},
            held=self.facts.held,
        )
        return self._finish(draft, (), "all_kv")

    # -- content --------------------------------------------------------------------------------------------

    def _content(
        self,
        layout: Layout,
        sources: list[GpuId],
        kv: Mapping[Route, tuple[KvTransfer, ...]],
        budget_s: float | None,
        *,
        stay_s: float | None = None,
        nothing_held: bool = False,
    ) -> tuple[tuple[Transfer, ...], frozenset[str]]:
        """Where weights come from, and which requests move within a budget."""
        transfers = self._fetch(layout.fresh, sources=sources, kv=kv, nothing_held=nothing_held)
        moving = self._moving(layout, transfers, kv, budget_s, stay_s=stay_s)
        if len(moving) < sum(len(requests_of(self.facts.problem, route.from_replica)) for route in kv):
            # Weights had their senders chosen beside the KV of all requests; with less of it other ports are free.
            transfers = self._fetch(layout.fresh, sources=sources, kv=kv, moving=moving, nothing_held=nothing_held)
        return transfers, moving

    def _fetch(
        self,
        fresh: tuple[Replica, ...],
        *,
        sources: list[GpuId],
        kv: Mapping[Route, tuple[KvTransfer, ...]] | None = None,
        moving: frozenset[str] | None = None,
        nothing_held: bool = False,
    ) -> tuple[Transfer, ...]:
        """Where every missing range of the new replicas comes from, beside the KV that passes the ports."""
        demands = [
            Demand(gpu, index // replica.tensor, self.facts.catalog.owned(shard_at(self.facts.model, replica, index)))
            for replica in fresh
            for index, gpu in enumerate(replica.gpus)
        ]
        pieces = cut_pieces(self.facts.catalog, demands, self.facts.held, sources, nothing_held=nothing_held)
        problem = SourceProblem(
            pieces,
            ports_of(self.facts.spec.profile),
            frozenset(self.facts.view.doomed),
            self._kv_copies(kv or {}, moving),
        )
        solver = self.facts.solvers["migrate"]
        result = choose_sources(problem, self.facts.catalog, solver)
        assert result.answer is not None, "every piece has a holder or comes from storage"
        self.reports["migrate"] = result.report(solver)
        return result.answer

    def _kv_copies(
        self, kv: Mapping[Route, tuple[KvTransfer, ...]], moving: frozenset[str] | None
    ) -> tuple[FixedCopy, ...]:
        """What the KV of the requests that move (None: all) puts through the ports."""
        copies: dict[tuple[InstanceId, InstanceId], int] = defaultdict(int)
        for route, rectangles in kv.items():
            requests = requests_of(self.facts.problem, route.from_replica)
            tokens = sum(kv_tokens(one) for one in requests if moving is None or one.request in moving)
            for one in rectangles:
                source, destination = instance_of(one.source), instance_of(one.destination)
                if source != destination:
                    layers, heads = one.rectangle
                    size = kv_token_bytes(self.facts.model, layers=layers, heads=heads)
                    copies[source, destination] += tokens * size
        return tuple(FixedCopy(*ports, size) for ports, size in copies.items())

    def _allowed(self, sources: list[GpuId]) -> list[GpuId]:
        """The GPUs that weights may be copied from; the baselines load everything from storage."""
        return [] if self.facts.policy in RESTART_POLICIES else sources

    def _sources(self, *, doomed: bool) -> list[GpuId]:
        """All living GPUs, or those that stay."""
        return self._allowed([*self.facts.view.staying, *(self.facts.view.doomed if doomed else ())])

    def _stay_s(self) -> float:
        """How long the stop may wait for requests that can go nowhere else."""
        left = self.facts.view.remaining_s
        return PATIENCE_S if left is None else STAY_SHARE * max(0.0, left - margin_s(left))

    def _moving(
        self,
        layout: Layout,
        transfers: tuple[Transfer, ...],
        kv: Mapping[Route, tuple[KvTransfer, ...]],
        budget_s: float | None,
        *,
        stay_s: float | None = None,
    ) -> frozenset[str]:
        """The requests that the ladder's solver lets move; all that B and the KV pools hold if there is no budget."""
        problem = ladder_problem(
            self.facts.problem,
            self.facts.view,
            layout.affected,
            (*layout.untouched, *layout.fresh),
            kv=kv,
            transfers=transfers,
            budget_s=budget_s,
            stay_s=stay_s,
        )
        if not problem.items:
            return frozenset()
        name = self.facts.solvers["ladder"]
        result = keep_requests(problem, name)
        self.reports.pop("ladder", None)
        if self.facts.view.remaining_s is not None or result.certificate.get("kind") != "all_fit":
            self.reports["ladder"] = result.report(name)
        return frozenset(result.answer.names if result.answer is not None else ())

    def _actions(
        self, layout: Layout, moving: frozenset[str], *, stay_s: float | None = None
    ) -> tuple[RequestAction, ...]:
        """What becomes of the requests of the affected replicas; without `stay_s` none of them finishes there."""
        living = [replica.id for replica in layout.affected if replica not in self.facts.view.lost]
        return decide_requests(
            self.facts.problem,
            layout.affected,
            layout.routes,
            moving=moving,
            staying=() if stay_s is None else living,
            stay_s=stay_s or 0.0,
        )

    def _kv(self, layout: Layout) -> dict[Route, tuple[KvTransfer, ...]]:
        """KV rectangles of every route whose source still lives."""
        replicas = {replica.id: replica for replica in (*layout.untouched, *layout.fresh, *layout.affected)}
        lost = {replica.id for replica in self.facts.view.lost}
        return {
            route: kv_transfers(
                self.facts.catalog,
                self.facts.model,
                replicas[route.from_replica],
                replicas[route.to_replica],
            )
            for route in layout.routes
            if route.from_replica not in lost
        }

    # -- the file -------------------------------------------------------------------------------------------

    def _finish(self, draft: Draft, steps: tuple[Step, ...], rung: Rung) -> Plan:
        """The plan file's other fields."""
        problem = self.facts.problem
        placed = all(action.to_replica is not None for action in draft.actions)
        serves = bool(draft.target) or not problem.snapshot.world.replicas
        return Plan(
            epoch=EpochChange.model_validate({"from": problem.snapshot.world.epoch, "to": problem.epoch_to}),
            trigger=problem.trigger,
            mode=draft.mode,
            policy=self.facts.policy,
            policy_version=problem.spec.policy_version,
            spec=problem.spec,
            spec_digest=digest(problem.spec),
            snapshot=problem.snapshot,
            snapshot_digest=digest(problem.snapshot.world),
            target=Target(replicas=draft.target),
            routes=draft.routes,
            requests=draft.actions,
            solver=dict(sorted(self.reports.items())),
            estimates=estimate(
                steps, self.facts.view.remaining_s, link_bytes_per_s=problem.spec.profile.link_bytes_per_s
            ),
            fallback=LADDER[LADDER.index(rung) :],
            applyable=bool(steps),
            complete=placed and serves and bool(draft.target),
            steps=steps,
        )


def _pins(choice: Choice) -> str | int | float | None:
    """How far a choice keeps the pinned degrees."""
    return (choice.report.certificate or {}).get("pins")


def _with(choice: Choice, *, passed_over: int) -> SolverReport:
    """The report of a choice that was taken over better ones of which the migration costs more."""
    certificate = {**(choice.report.certificate or {}), "passed_over": passed_over}
    return choice.report.model_copy(update={"certificate": certificate})


def _about_as_good(candidate: Candidate, best: Candidate) -> bool:
    """Whether a live plan for `candidate` is worth more than an in_place plan for `best`."""
    if candidate.unserved > best.unserved:
        return False
    if best.unserved or best.latency_us == candidate.latency_us:
        return candidate.throughput_urps * WORSE_PERMILLE >= best.throughput_urps * 1000
    return candidate.latency_us * 1000 <= best.latency_us * WORSE_PERMILLE


def make_plan(problem: PlanningProblem) -> Plan:
    """The plan for a problem. Raises SpecError for an unknown policy or solver."""
    require_known("policy", problem.spec.policy, POLICIES)
    facts = gather(problem)
    return Planner(facts, LayoutBuilder(facts)).plan()


@contextmanager
def uncollected() -> Iterator[None]:
    """No garbage collection inside: a plan is many thousands of values that stay, and looking through them takes a
    quarter of the time of making them."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def answer(line: str) -> str:
    """One line of the planner process's protocol: a problem in, `{"plan": …}` or `{"error": …}` out."""
    try:
        with uncollected():
            problem = PlanningProblem.model_validate_json(line)
            return canonical_json({"plan": make_plan(problem).model_dump(mode="json")})
    except ValidationError as error:
        failure: SpotServeError = SpecError(
            f"planning problem is malformed: {error.errors(include_url=False)[0]['msg']}"
        )
    except SpotServeError as error:
        failure = error
    return canonical_json({"error": {"code": failure.code, "message": failure.message, "hint": failure.hint}})


def serve(requests: TextIO, answers: TextIO) -> None:
    """Answer problems until the input ends."""
    while line := requests.readline(MAX_LINE_BYTES):
        if line.strip():
            answers.write(answer(line))
            answers.flush()


if __name__ == "__main__":
    gc.freeze()
    serve(sys.stdin, sys.stdout)
