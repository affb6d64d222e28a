"""Rungs: the plan of a layout, as far up the ladder as memory and the deadline allow.

Live: with all KV, with the hottest KV, with tokens only; all that with doomed senders, then without. In place: layer by
layer (Algorithm 2) with KV, then without, then all at once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

from spotserve.core.canonical import digest
from spotserve.core.cost import least_kv_blocks
from spotserve.core.ids import GpuId
from spotserve.core.plan import CopyKv, CopyKvDelta, CopyWeights, EpochChange, Plan, SolverReport, Step, Target
from spotserve.solvers.actions import seconds_per_token
from spotserve.solvers.arrange import DISCARD
from spotserve.solvers.content import (
    RESTART_POLICIES,
    Content,
    KvOfRoutes,
    allowed,
    content_of,
    draft_of,
    kv_of,
    senders,
)
from spotserve.solvers.draft import Draft, used_blocks
from spotserve.solvers.estimate import estimate, finish_times, margin_s
from spotserve.solvers.facts import Facts
from spotserve.solvers.layer_order import layer_changes, peak_bytes, published_layers
from spotserve.solvers.layout import Layout, LayoutBuilder
from spotserve.solvers.migrate.memory import order_layers
from spotserve.solvers.migrate.sources import LAYER_BY_LAYER, PAPER_SOLVERS
from spotserve.solvers.prices import cost_of
from spotserve.solvers.steps import StepWriter, busiest_port_s
from spotserve.solvers.window import CUT_OVER_TRIPS, stop_window

BUDGETS = 6
"""Times that the ladder's solver is asked for less before no KV moves at all."""

PATIENCE_S = 10.0
"""How long a stop that has no deadline waits for requests that can go nowhere else."""

STAY_SHARE = 0.8
"""Share of a grace period that a stop may wait for them."""

Rung = Literal["all_kv", "hottest_kv", "tokens_only"]
LADDER: tuple[Rung, ...] = ("all_kv", "hottest_kv", "tokens_only")

Reports = Mapping[str, SolverReport]


@dataclass(frozen=True, slots=True)
class Rungs:
    """Plans of layouts; `decided` are the reports of those who chose the configuration."""

    facts: Facts
    layouts: LayoutBuilder
    decided: Reports

    def live(self, layout: Layout) -> Plan:
        """The first rung of the live ladder whose doomed sources are read in time."""
        kv = kv_of(self.facts, layout)
        for doomed in (True, False):
            sources = senders(self.facts, doomed=doomed)
            kept = self._descend(partial(self._live_with_kv, layout, sources, kv)) if self._moves_kv else None
            if kept is not None:
                return kept
            plan = self._live(layout, content_of(self.facts, layout, sources, {}), "tokens_only")
            if self._in_time(plan):
                break
        return plan

    def in_place(self, layout: Layout) -> Plan:
        """A plan that stops first: layer by layer if memory and time allow, else all at once."""
        if self.facts.policy not in RESTART_POLICIES and self.facts.solvers["migrate"] in LAYER_BY_LAYER:
            for keeps_kv in (True, False) if self._moves_kv else (False,):
                if (plan := self._descend(partial(self._layered, layout, keeps_kv))) is not None:
                    return plan
        sources = allowed(self.facts, [gpu for replica in layout.untouched for gpu in replica.gpus])
        # Whoever has no old position has nothing that a step could release: what it holds stays, and is not fetched.
        freed = frozenset(gpu for replica in layout.affected for gpu in replica.gpus)
        content = content_of(self.facts, layout, sources, {}, freed=freed)
        draft = replace(draft_of(self.facts, layout, content), mode="in_place", released_first=True)
        return self._written(draft, "tokens_only", self._reports(layout, content))

    def from_storage(self, layout: Layout) -> Plan:
        """The plan of rerouting: live, KV is lost, and weights come from storage."""
        content = content_of(self.facts, layout, [], {})
        return self._written(draft_of(self.facts, layout, content), "tokens_only", self._reports(layout, content))

    def without_target(self) -> Plan:
        """Nothing fits what is left: serve until the last moment, then wait with every request kept."""
        layout = Layout((), (), self.facts.affected(()), ())
        draft = draft_of(self.facts, layout, Content())
        if layout.affected:
            return self._written(draft, "tokens_only", self.decided)
        return self._finish(draft, (), "tokens_only", self.decided)

    def unchanged(self) -> Plan:
        """What runs is what should run."""
        layout = Layout(tuple(self.facts.problem.snapshot.world.replicas), (), (), ())
        return self._finish(draft_of(self.facts, layout, Content()), (), "all_kv", self.decided)

    @property
    def _moves_kv(self) -> bool:
        """Whether who is interrupted may keep KV at all."""
        return self.facts.solvers["arrange"] != DISCARD

    # -- deadlines ------------------------------------------------------------------------------------------

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

    def _stay_s(self) -> float:
        """How long the stop may wait for requests that can go nowhere else."""
        allowed_s = self._allowed_s()
        return PATIENCE_S if allowed_s is None else STAY_SHARE * max(0.0, allowed_s)

    # -- live -----------------------------------------------------------------------------------------------

    def _live_with_kv(
        self, layout: Layout, sources: list[GpuId], kv: KvOfRoutes, budget_s: float | None
    ) -> Plan | None:
        """One rung: what moves within a budget (None: of any size); None if that is nothing."""
        content = content_of(self.facts, layout, sources, kv, budget_s=budget_s, stay_s=self._stay_s())
        if budget_s is not None and not content.moving:
            return None
        return self._live(layout, content, "all_kv" if budget_s is None else "hottest_kv")

    def _live(self, layout: Layout, content: Content, rung: Rung) -> Plan:
        draft = self._as_published(draft_of(self.facts, layout, content, stay_s=self._stay_s()))
        return self._written(draft, rung, self._reports(layout, content))

    def _as_published(self, draft: Draft) -> Draft:
        """The draft; `paper` sends its weights one layer after the other, in the order of its Algorithm 2."""
        solver = self.facts.solvers["migrate"]
        if solver not in PAPER_SOLVERS:
            return draft
        memory = self.layouts.free_of_pools(draft)
        order = published_layers(self.facts.catalog, draft, memory=memory, solver=solver)
        return replace(draft, layer_by_layer=order)

    # -- in place -------------------------------------------------------------------------------------------

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
            kv = kv_of(self.facts, sized) if keeps_kv else {}
            content = content_of(self.facts, sized, senders(self.facts, doomed=True), kv, budget_s=budget_s)
            if budget_s is not None and not content.moving:
                return None
            draft = replace(draft_of(self.facts, sized, content), mode="in_place", kept_blocks=kept)
            draft = self._as_published(draft)
            order, reports = self._order(draft)
            if order is not None:
                rung: Rung = "tokens_only" if not kv else "all_kv" if budget_s is None else "hottest_kv"
                return self._written(draft, rung, {**self._reports(sized, content), **reports}, order=order)
            # Weights on their way need room too.
            fresh = tuple(self.layouts.with_blocks(replica, replica.kv_blocks * 3 // 4) for replica in fresh)
        return None

    def _order(self, draft: Draft) -> tuple[Sequence[str] | None, Reports]:
        """The order in which layers move, None if memory does not suffice for one, and who found it."""
        memory = self.layouts.free_of_pools(draft)
        changes = layer_changes(self.facts.catalog, draft)
        if draft.layer_by_layer is not None:
            return draft.layer_by_layer if peak_bytes(changes, draft.layer_by_layer, memory) <= 0 else None, {}
        result = order_layers(changes, memory)
        return result.answer, {"memory": result.report("algorithm_2")}

    # -- the file -------------------------------------------------------------------------------------------

    def _reports(self, layout: Layout, content: Content) -> Reports:
        """Who decided so far."""
        placed = {} if layout.report is None else {"place": layout.report}
        return {**self.decided, **placed, **content.reports}

    def _written(self, draft: Draft, rung: Rung, reports: Reports, *, order: Sequence[str] | None = None) -> Plan:
        """The plan of a draft; who chose when to stop goes into its reports if there is a deadline."""
        name = self.facts.solvers["arrange"]
        window, stop = stop_window(draft, name)
        writer = StepWriter(draft, self.facts.catalog, window)
        steps = writer.write_live() if draft.mode == "live" else writer.write_in_place(order)
        if stop is not None:
            reports = {**reports, "arrange": stop.report(name)}
        return self._finish(draft, steps, rung, reports)

    def _finish(self, draft: Draft, steps: tuple[Step, ...], rung: Rung, reports: Reports) -> Plan:
        """The plan file's other fields."""
        problem = self.facts.problem
        placed = all(action.to_replica is not None for action in draft.actions)
        serves = bool(draft.target) or not problem.snapshot.world.replicas
        estimates = estimate(steps, self.facts.view.remaining_s, profile=problem.spec.profile)
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
            solver=dict(sorted(reports.items())),
            estimates=estimates,
            cost=cost_of(self.facts, draft, stall_s=estimates.stall_s),
            fallback=LADDER[LADDER.index(rung) :],
            applyable=bool(steps),
            complete=placed and serves and bool(draft.target),
            steps=steps,
        )
