"""The plan builder: from one planning problem to one plan, pure and deterministic.

`make_plan` is configure -> routes -> place -> migrate -> steps, tried along a ladder: live with all KV, with the
hottest KV, with tokens only, with survivors as sources only; then in_place; then nothing fits and the plan says so.

As a process (`python -m spotserve.solvers.planner`) it reads one PlanningProblem per line on stdin and answers one
line on stdout; OR-Tools' graph solvers hold the GIL, so they stay out of the coordinator.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, TextIO

from pydantic import ValidationError

from spotserve.core.canonical import canonical_json, digest
from spotserve.core.cost import least_kv_blocks
from spotserve.core.ids import GpuId, ReplicaId
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
from spotserve.core.snapshot import Replica
from spotserve.errors import SpecError, SpotServeError
from spotserve.solvers.configure import Candidate, Choice, configure, tabulate
from spotserve.solvers.draft import Draft, decide_requests, finishing_s, used_blocks
from spotserve.solvers.estimate import estimate, finish_times, margin_s, workload_of
from spotserve.solvers.facts import Facts, gather
from spotserve.solvers.layout import Layout, LayoutBuilder
from spotserve.solvers.migrate import KvTransfer, Transfer, choose_sources, cut_pieces, kv_transfers
from spotserve.solvers.ranges import Ranges, shard_at, without
from spotserve.solvers.registry import POLICIES, require_known
from spotserve.solvers.steps import StepWriter, Window, busiest_port_s, memory_order
from spotserve.solvers.view import natural_key, requests_of

MAX_LINE_BYTES = 64 * 1024 * 1024
ATTEMPTS = 6
"""Candidates tried in live mode before in_place is considered."""

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
        rows = self._candidates()
        first = self._configure(rows)
        if first.candidate is None:
            return self._degraded(first)
        if self._keeps_everything(first.candidate):
            self.reports["configure"] = first.report
            return self._unchanged()
        if self.facts.policy == "live" or not self.facts.problem.snapshot.world.replicas:
            for choice in self._near_best(rows, first):
                if choice.candidate is not None and self._keeps_everything(choice.candidate):
                    self.reports = {"configure": choice.report}
                    return self._unchanged()
                if (plan := self._live(choice)) is not None:
                    return plan
        self.reports["configure"] = first.report
        untouched = () if self.facts.policy == "reparallelize" else self._kept(first.candidate)
        return self._in_place(first.candidate.shape, first.candidate.data, untouched)

    def _candidates(self) -> tuple[Candidate, ...]:
        """Every configuration that fits the GPUs that stay."""
        return tabulate(
            self.facts.spec,
            memory=[self.facts.view.memory[gpu] for gpu in self.facts.view.staying],
            workload=workload_of(self.facts.problem),
            intact=self.facts.view.intact,
            hit=(*self.facts.view.draining, *self.facts.view.lost),
        )

    def _configure(self, rows: Iterable[Candidate]) -> Choice:
        return configure(
            self.facts.spec,
            tuple(rows),
            load_rps=self.facts.problem.snapshot.load_rps,
            solver=self.facts.solvers["configure"],
        )

    def _near_best(self, rows: tuple[Candidate, ...], first: Choice) -> Iterator[Choice]:
        """The best candidate, then the next ones while they are about as good."""
        best = first.candidate
        assert best is not None
        choice, left = first, list(rows)
        for _ in range(ATTEMPTS):
            candidate = choice.candidate
            if candidate is None or not _about_as_good(candidate, best) or _pins(choice) != _pins(first):
                return
            yield choice
            left = [row for row in left if (row.shape, row.data) != (candidate.shape, candidate.data)]
            choice = self._configure(left)

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
        self.reports["configure"] = choice.report
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
        moving = sum(
            len(requests_of(self.facts.problem, r.id)) for r in layout.affected if r not in self.facts.view.lost
        )
        for doomed_sources in (True, False):
            hottest: int | None = None
            while True:
                plan = self._live_plan(layout, hottest=hottest, doomed_sources=doomed_sources)
                if self._in_time(plan):
                    return plan
                if hottest == 0:
                    break
                hottest = (moving if hottest is None else hottest) // 2
        return plan

    def _in_time(self, plan: Plan) -> bool:
        """Whether every step that reads a doomed instance ends within its grace period, margin included."""
        left = self.facts.view.remaining_s
        if left is None:
            return True
        finish = finish_times(plan.steps)
        reads = [
            step
            for step in plan.steps
            if isinstance(step, CopyWeights | CopyKv | CopyKvDelta) and step.source in self.facts.view.doomed
        ]
        ports = busiest_port_s(plan.steps, link_bytes_per_s=self.facts.spec.profile.link_bytes_per_s)
        needed = max((finish[step.id] for step in reads), default=0.0)
        return not reads or max(needed, ports) <= left - margin_s(left)

    def _live_plan(self, layout: Layout, *, hottest: int | None, doomed_sources: bool) -> Plan:
        """One rung: `hottest` requests move (None: all, 0: none)."""
        transfers = self._fetch(layout.fresh, sources=self._sources(doomed=doomed_sources))
        actions = self._actions(layout, hottest=hottest, may_move=hottest != 0)
        kv = {} if hottest == 0 else self._kv(layout)
        draft = Draft(
            problem=self.facts.problem,
            view=self.facts.view,
            mode="live",
            untouched=layout.untouched,
            fresh=layout.fresh,
            affected=layout.affected,
            routes=layout.routes,
            actions=actions,
            transfers=transfers,
            kv=kv,
            held=self.facts.held,
        )
        steps = StepWriter(draft, self.facts.catalog, self._window(draft)).write_live()
        rung: Rung = "all_kv" if hottest is None else "hottest_kv" if hottest else "tokens_only"
        return self._finish(draft, steps, rung)

    def _window(self, draft: Draft) -> Window:
        """When to stop decoding: copies done and finishing requests gone, or the last moment if nothing fits."""
        left = self.facts.view.remaining_s
        finishing = round(finishing_s(self.facts.problem, draft.affected, draft.actions), 6)
        if left is None:
            return Window(finishing, None)
        profile = self.facts.spec.profile
        delta = sum(draft.delta_bytes(route, transfer.rectangle) for route, kv in draft.kv.items() for transfer in kv)
        cut_over_s = delta / profile.link_bytes_per_s + 4 * profile.round_trip_s
        latest_s = round(max(0.0, left - cut_over_s - margin_s(left)), 6)
        return Window(min(finishing, latest_s) if draft.target else latest_s, latest_s)

    # -- the other ways -------------------------------------------------------------------------------------

    def _in_place(self, shape: tuple[int, int], data: int, untouched: tuple[Replica, ...]) -> Plan:
        """A plan that stops first: old and new do not fit side by side, or the policy restarts everything."""
        layout = self._lay_out(shape, data - len(untouched), untouched, mode="in_place")
        assert layout is not None, "a tabulated candidate fits an empty GPU"
        if self.facts.policy not in RESTART_POLICIES and self.facts.solvers["migrate"] == "layered":
            for keeps_kv in (True, False):
                if (plan := self._layered(layout, keeps_kv=keeps_kv)) is not None and self._in_time(plan):
                    return plan
        sources = [gpu for replica in layout.untouched for gpu in replica.gpus]
        draft = self._draft_in_place(layout, sources=self._allowed(sources), kv={}, released_first=True)
        steps = StepWriter(draft, self.facts.catalog, self._window(draft)).write_in_place(None)
        return self._finish(draft, steps, "tokens_only")

    def _layered(self, layout: Layout, *, keeps_kv: bool) -> Plan | None:
        """Algorithm 2; with `keeps_kv` old KV pools shrink to their content, which moves before any weight does."""
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
            draft = self._draft_in_place(sized, sources=self._sources(doomed=True), kv=kv, kept_blocks=kept)
            order = memory_order(self.facts.catalog, draft, memory=self.layouts.free_of_pools(draft))
            if order is not None:
                steps = StepWriter(draft, self.facts.catalog, self._window(draft)).write_in_place(order)
                return self._finish(draft, steps, "all_kv" if kv else "tokens_only")
            # Weights on their way need room too.
            fresh = tuple(self.layouts.with_blocks(replica, replica.kv_blocks * 3 // 4) for replica in fresh)
        return None

    def _draft_in_place(
        self,
        layout: Layout,
        *,
        sources: list[GpuId],
        kv: Mapping[Route, tuple[KvTransfer, ...]],
        kept_blocks: Mapping[ReplicaId, int] | None = None,
        released_first: bool = False,
    ) -> Draft:
        transfers = self._fetch(layout.fresh, sources=sources, nothing_held=released_first)
        return Draft(
            problem=self.facts.problem,
            view=self.facts.view,
            mode="in_place",
            untouched=layout.untouched,
            fresh=layout.fresh,
            affected=layout.affected,
            routes=layout.routes,
            actions=self._actions(layout, hottest=None, stay_s=0.0, may_move=bool(kv)),
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
            actions=self._actions(layout, hottest=0, may_move=False),
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
            actions=self._actions(layout, hottest=0, may_move=False),
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

    def _fetch(
        self, fresh: tuple[Replica, ...], *, sources: list[GpuId], nothing_held: bool = False
    ) -> tuple[Transfer, ...]:
        """Where every missing range of the new replicas comes from."""
        wants: dict[GpuId, Ranges] = {}
        for replica in fresh:
            for index, gpu in enumerate(replica.gpus):
                owned = self.facts.catalog.owned(shard_at(self.facts.model, replica, index))
                held = {} if nothing_held else self.facts.held.get(gpu, {})
                if missing := without(owned, held):
                    wants[gpu] = missing
        pieces = cut_pieces(self.facts.catalog, wants, self.facts.held, sources)
        transfers, self.reports["migrate"] = choose_sources(
            pieces, doomed=self.facts.view.doomed, solver=self.facts.solvers["migrate"]
        )
        return transfers

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

    def _actions(
        self, layout: Layout, *, hottest: int | None, may_move: bool, stay_s: float | None = None
    ) -> tuple[RequestAction, ...]:
        """What becomes of the requests of the affected replicas."""
        target = (*layout.untouched, *layout.fresh)
        return decide_requests(
            self.facts.problem,
            self.facts.view,
            layout.affected,
            layout.routes,
            target,
            may_move=may_move,
            hottest=hottest,
            stay_s=self._stay_s() if stay_s is None else stay_s,
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


def answer(line: str) -> str:
    """One line of the planner process's protocol: a problem in, `{"plan": …}` or `{"error": …}` out."""
    try:
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
    serve(sys.stdin, sys.stdout)
