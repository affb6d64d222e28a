"""The plan builder: from one planning problem to one plan, pure and deterministic.

`make_plan` is configure -> routes -> place -> migrate -> steps, tried along a ladder: live with all KV, with the
hottest KV, with tokens only, with survivors as sources only; then in_place; then nothing fits and the plan says so.

As a process (`python -m spotserve.solvers.planner`) it reads one PlanningProblem per line on stdin and answers one
line on stdout; OR-Tools' graph solvers hold the GIL, so they stay out of the coordinator.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, TextIO

from pydantic import ValidationError

from spotserve.core.canonical import canonical_json, digest
from spotserve.core.cost import (
    Workload,
    kv_blocks_within,
    least_kv_blocks,
    most_kv_blocks,
    replica_shards,
    running_bound,
)
from spotserve.core.ids import GpuId, ReplicaId, StepId
from spotserve.core.plan import (
    CopyKv,
    CopyKvDelta,
    CopyWeights,
    EpochChange,
    Estimates,
    Plan,
    PlanningProblem,
    Quiesce,
    RequestAction,
    Route,
    SolverReport,
    Step,
    Target,
)
from spotserve.core.slices import Shard, kv_block_bytes, layer_split
from spotserve.core.snapshot import Holding, Replica, Stage
from spotserve.core.spec import weight_copies
from spotserve.errors import SpecError, SpotServeError
from spotserve.solvers.configure import Candidate, Choice, configure, tabulate
from spotserve.solvers.draft import (
    Draft,
    complete_routes,
    decide_requests,
    finishing_s,
    inherited_pool,
    pool_bytes,
    route_requests,
    used_blocks,
)
from spotserve.solvers.migrate import KvTransfer, Transfer, choose_sources, cut_pieces, kv_transfers
from spotserve.solvers.place import PlacementProblem, place
from spotserve.solvers.ranges import Catalog, Ranges, cut, shard_at, without
from spotserve.solvers.registry import POLICIES, chosen_solvers, require_known
from spotserve.solvers.steps import StepWriter, Window, busiest_port_s, memory_order
from spotserve.solvers.view import View, kv_tokens, look, natural_key, requests_of

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

    problem: PlanningProblem
    view: View
    catalog: Catalog
    solvers: dict[str, str]
    holdings: dict[GpuId, Holding]
    held: dict[GpuId, Ranges]
    reports: dict[str, SolverReport] = field(default_factory=dict)
    free: dict[GpuId, int] = field(default_factory=dict)

    @property
    def copies(self) -> int:
        """How often weights take memory."""
        return weight_copies(self.problem.spec.linear)

    @property
    def policy(self) -> str:
        """The policy that decides."""
        return self.problem.spec.policy

    def plan(self) -> Plan:
        """The best plan the ladder reaches."""
        if self.policy == "reroute" and (shape := self._running_shape()) is not None:
            return self._reroute(shape)
        rows = self._candidates()
        first = self._configure(rows)
        if first.candidate is None:
            return self._degraded(first)
        if self._keeps_everything(first.candidate):
            self.reports["configure"] = first.report
            return self._unchanged()
        if self.policy == "live" or not self.problem.snapshot.world.replicas:
            for choice in self._near_best(rows, first):
                if choice.candidate is not None and self._keeps_everything(choice.candidate):
                    self.reports = {"configure": choice.report}
                    return self._unchanged()
                if (plan := self._live(choice)) is not None:
                    return plan
        self.reports["configure"] = first.report
        untouched = () if self.policy == "reparallelize" else self._kept(first.candidate)
        return self._in_place(first.candidate.shape, first.candidate.data, untouched)

    def _candidates(self) -> tuple[Candidate, ...]:
        """Every configuration that fits the GPUs that stay."""
        return tabulate(
            self.problem.spec,
            memory=[self.view.memory[gpu] for gpu in self.view.staying],
            workload=workload_of(self.problem),
            intact=self.view.intact,
            hit=(*self.view.draining, *self.view.lost),
        )

    def _configure(self, rows: Iterable[Candidate]) -> Choice:
        return configure(
            self.problem.spec,
            tuple(rows),
            load_rps=self.problem.snapshot.load_rps,
            solver=self.solvers["configure"],
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
        replicas = self.problem.snapshot.world.replicas
        return (replicas[0].pipeline, replicas[0].tensor) if replicas else None

    def _kept(self, candidate: Candidate) -> tuple[Replica, ...]:
        """The intact replicas of the chosen shape, at most D, those with the most KV first."""
        same = [r for r in self.view.intact if (r.pipeline, r.tensor) == candidate.shape]
        same.sort(key=lambda r: (-self._progress(r), natural_key(r.id)))
        return tuple(sorted(same[: candidate.data], key=lambda r: natural_key(r.id)))

    def _progress(self, replica: Replica) -> int:
        return sum(kv_tokens(request) for request in requests_of(self.problem, replica.id))

    def _keeps_everything(self, candidate: Candidate) -> bool:
        """Whether the chosen layout is exactly what runs."""
        kept = self._kept(candidate)
        return len(kept) == len(self.problem.snapshot.world.replicas) == candidate.data

    def _affected(self, untouched: tuple[Replica, ...]) -> tuple[Replica, ...]:
        kept = {replica.id for replica in untouched}
        replicas = sorted(self.problem.snapshot.world.replicas, key=lambda r: natural_key(r.id))
        return tuple(replica for replica in replicas if replica.id not in kept)

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

    def _climb_down(self, layout: Layout) -> Plan:
        """The first rung of the ladder whose doomed sources are read in time."""
        moving = sum(len(requests_of(self.problem, r.id)) for r in layout.affected if r not in self.view.lost)
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
        left = self.view.remaining_s
        if left is None:
            return True
        finish = finish_times(plan.steps)
        reads = [
            step
            for step in plan.steps
            if isinstance(step, CopyWeights | CopyKv | CopyKvDelta) and step.source in self.view.doomed
        ]
        ports = busiest_port_s(plan.steps, link_bytes_per_s=self.problem.spec.profile.link_bytes_per_s)
        needed = max((finish[step.id] for step in reads), default=0.0)
        return not reads or max(needed, ports) <= left - margin_s(left)

    def _live_plan(self, layout: Layout, *, hottest: int | None, doomed_sources: bool) -> Plan:
        """One rung: `hottest` requests move (None: all, 0: none)."""
        transfers = self._fetch(layout.fresh, sources=self._sources(doomed=doomed_sources))
        actions = self._actions(layout, hottest=hottest, may_move=hottest != 0)
        kv = {} if hottest == 0 else self._kv(layout)
        draft = Draft(
            problem=self.problem,
            view=self.view,
            mode="live",
            untouched=layout.untouched,
            fresh=layout.fresh,
            affected=layout.affected,
            routes=layout.routes,
            actions=actions,
            transfers=transfers,
            kv=kv,
            held=self.held,
        )
        steps = StepWriter(draft, self.catalog, self._window(draft)).write_live()
        rung: Rung = "all_kv" if hottest is None else "hottest_kv" if hottest else "tokens_only"
        return self._finish(draft, steps, rung)

    def _window(self, draft: Draft) -> Window:
        """When to stop decoding: copies done and finishing requests gone, or the last moment if nothing fits."""
        left = self.view.remaining_s
        finishing = round(finishing_s(self.problem, draft.affected, draft.actions), 6)
        if left is None:
            return Window(finishing, None)
        profile = self.problem.spec.profile
        delta = sum(draft.delta_bytes(route, transfer.rectangle) for route, kv in draft.kv.items() for transfer in kv)
        cut_over_s = delta / profile.link_bytes_per_s + 4 * profile.round_trip_s
        latest_s = round(max(0.0, left - cut_over_s - margin_s(left)), 6)
        return Window(min(finishing, latest_s) if draft.target else latest_s, latest_s)

    # -- the other ways -------------------------------------------------------------------------------------

    def _in_place(self, shape: tuple[int, int], data: int, untouched: tuple[Replica, ...]) -> Plan:
        """A plan that stops first: old and new do not fit side by side, or the policy restarts everything."""
        layout = self._lay_out(shape, data - len(untouched), untouched, mode="in_place")
        assert layout is not None, "a tabulated candidate fits an empty GPU"
        if self.policy not in RESTART_POLICIES and self.solvers["migrate"] == "layered":
            for keeps_kv in (True, False):
                if (plan := self._layered(layout, keeps_kv=keeps_kv)) is not None and self._in_time(plan):
                    return plan
        sources = [gpu for replica in layout.untouched for gpu in replica.gpus]
        draft = self._draft_in_place(layout, sources=self._allowed(sources), kv={}, released_first=True)
        steps = StepWriter(draft, self.catalog, self._window(draft)).write_in_place(None)
        return self._finish(draft, steps, "tokens_only")

    def _layered(self, layout: Layout, *, keeps_kv: bool) -> Plan | None:
        """Algorithm 2; with `keeps_kv` old KV pools shrink to their content, which moves before any weight does."""
        limits = self.problem.spec.limits
        kept = {r.id: used_blocks(self.problem, r) for r in layout.affected if keeps_kv and r not in self.view.lost}
        fresh = tuple(self._sized(r, room=self._room_beside(layout.affected, kept)) for r in layout.fresh)
        while all(replica.kv_blocks >= least_kv_blocks(limits) for replica in fresh):
            sized = replace(layout, fresh=fresh)
            kv = self._kv(sized) if keeps_kv else {}
            draft = self._draft_in_place(sized, sources=self._sources(doomed=True), kv=kv, kept_blocks=kept)
            order = memory_order(self.catalog, draft, memory=self._free_of_pools(draft))
            if order is not None:
                steps = StepWriter(draft, self.catalog, self._window(draft)).write_in_place(order)
                return self._finish(draft, steps, "all_kv" if kv else "tokens_only")
            # Weights on their way need room too.
            fresh = tuple(self._with_blocks(replica, replica.kv_blocks * 3 // 4) for replica in fresh)
        return None

    def _room_beside(self, affected: tuple[Replica, ...], kept: Mapping[ReplicaId, int]) -> RoomRule:
        """Memory for a new KV pool before any weight has come or gone, beside what is kept of the old pool."""

        def room(gpu: GpuId, shard: Shard) -> int:
            free = self._free_now(gpu)
            for replica in affected:
                if gpu in replica.gpus:
                    gone = self._with_blocks(replica, replica.kv_blocks - kept.get(replica.id, 0))
                    free += pool_bytes(self.catalog, self.problem, gone, gpu)
            return free

        return room

    def _free_of_pools(self, draft: Draft) -> dict[GpuId, int]:
        """Memory left for weights once the old KV pools are gone and the new ones there."""
        free = {gpu: self._free_now(gpu) for gpu in self.view.memory}
        for gpu, replica in draft.old_position.items():
            free[gpu] += pool_bytes(self.catalog, self.problem, replica, gpu)
        for replica in draft.fresh:
            for gpu in replica.gpus:
                free[gpu] -= pool_bytes(self.catalog, self.problem, replica, gpu)
        return free

    def _with_blocks(self, replica: Replica, kv_blocks: int) -> Replica:
        """The replica with a KV pool of so many blocks."""
        bound = running_bound(self.problem.spec.limits, kv_blocks)
        return replica.model_copy(update={"kv_blocks": kv_blocks, "max_running": bound})

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
            problem=self.problem,
            view=self.view,
            mode="in_place",
            untouched=layout.untouched,
            fresh=layout.fresh,
            affected=layout.affected,
            routes=layout.routes,
            actions=self._actions(layout, hottest=None, stay_s=0.0, may_move=bool(kv)),
            transfers=transfers,
            kv=kv,
            held=self.held,
            released_first=released_first,
            kept_blocks=kept_blocks or {},
        )

    def _reroute(self, shape: tuple[int, int]) -> Plan:
        """Rerouting: fixed (P, M); a hit replica is dropped, idle GPUs form new ones from storage, KV is lost."""
        untouched = self.view.intact
        used = {gpu for replica in untouched for gpu in replica.gpus}
        idle = [gpu for gpu in self.view.staying if gpu not in used]
        spawn = len(idle) // (shape[0] * shape[1])
        if self.problem.spec.limits.data is not None:
            spawn = max(0, min(spawn, self.problem.spec.limits.data - len(untouched)))
        self.reports["configure"] = SolverReport(
            name="fixed_shape",
            status="optimal" if untouched or spawn else "infeasible",
            objective=len(untouched) + spawn,
            bound=len(untouched) + spawn,
            certificate={"kind": "fixed_shape", "pipeline": shape[0], "tensor": shape[1]},
        )
        if not spawn and len(untouched) == len(self.problem.snapshot.world.replicas):
            return self._unchanged()
        layout = self._lay_out(shape, spawn, untouched, mode="live")
        if layout is None:
            # A pipeline that does not fit beside what its GPUs still hold is not formed: rerouting never restarts.
            layout = self._lay_out(shape, 0, untouched, mode="live")
            assert layout is not None, "a layout without new replicas needs no room"
        transfers = self._fetch(layout.fresh, sources=[])
        draft = Draft(
            problem=self.problem,
            view=self.view,
            mode="live",
            untouched=layout.untouched,
            fresh=layout.fresh,
            affected=layout.affected,
            routes=layout.routes,
            actions=self._actions(layout, hottest=0, may_move=False),
            transfers=transfers,
            kv={},
            held=self.held,
        )
        steps = StepWriter(draft, self.catalog, self._window(draft)).write_live()
        return self._finish(draft, steps, "tokens_only")

    def _degraded(self, choice: Choice) -> Plan:
        """Nothing fits what is left: serve until the last moment, then wait with every request kept."""
        self.reports["configure"] = choice.report
        layout = Layout((), (), self._affected(()), ())
        draft = Draft(
            problem=self.problem,
            view=self.view,
            mode="live",
            untouched=(),
            fresh=(),
            affected=layout.affected,
            routes=(),
            actions=self._actions(layout, hottest=0, may_move=False),
            transfers=(),
            kv={},
            held=self.held,
        )
        steps = StepWriter(draft, self.catalog, self._window(draft)).write_live() if layout.affected else ()
        return self._finish(draft, steps, "tokens_only")

    def _unchanged(self) -> Plan:
        """What runs is what should run."""
        layout = Layout(tuple(self.problem.snapshot.world.replicas), (), (), ())
        draft = Draft(
            problem=self.problem,
            view=self.view,
            mode="live",
            untouched=layout.untouched,
            fresh=(),
            affected=(),
            routes=(),
            actions=(),
            transfers=(),
            kv={},
            held=self.held,
        )
        return self._finish(draft, (), "all_kv")

    # -- layout ---------------------------------------------------------------------------------------------

    def _lay_out(
        self, shape: tuple[int, int], num_fresh: int, untouched: tuple[Replica, ...], *, mode: str
    ) -> Layout | None:
        """GPUs, KV pools and routes of the target; None if a live KV pool would be too small."""
        affected = self._affected(untouched)
        heirs = route_requests(self.problem, self.view, affected, num_fresh)
        fresh = self._place(shape, num_fresh, untouched, affected, heirs, live=mode == "live")
        sized = tuple(self._sized_live(r) if mode == "live" else self._sized(r, room=None) for r in fresh)
        if any(replica.kv_blocks < least_kv_blocks(self.problem.spec.limits) for replica in sized):
            return None
        names = {old: sized[number].id for old, number in heirs.items()}
        target = tuple(sorted((*untouched, *sized), key=lambda r: natural_key(r.id)))
        return Layout(untouched, sized, affected, complete_routes(self.problem, affected, names, target))

    def _place(
        self,
        shape: tuple[int, int],
        num_fresh: int,
        untouched: tuple[Replica, ...],
        affected: tuple[Replica, ...],
        heirs: Mapping[ReplicaId, int],
        *,
        live: bool,
    ) -> tuple[Replica, ...]:
        """New replicas on the best GPUs that no untouched replica uses."""
        used = {gpu for replica in untouched for gpu in replica.gpus}
        gpus = tuple(gpu for gpu in self.view.staying if gpu not in used)
        shards = replica_shards(self.problem.spec.model, pipeline=shape[0], tensor=shape[1])
        rows = [self._placement_row(gpu, shards, num_fresh, affected, heirs, live=live) for gpu in gpus]
        placement = place(
            PlacementProblem(
                gpus=gpus,
                num_positions=num_fresh * len(shards),
                reuse_bytes=tuple(row.reuse for row in rows),
                home=tuple(row.home for row in rows),
                fits=tuple(row.fits for row in rows),
                need_bytes=self._need_bytes(shards, num_fresh, affected, heirs),
            ),
            self.solvers["place"],
        )
        self.reports["place"] = placement.report
        return tuple(
            self._replica(number, num_fresh, shape, placement.gpus[number * len(shards) : (number + 1) * len(shards)])
            for number in range(num_fresh)
        )

    def _need_bytes(
        self,
        shards: tuple[Shard, ...],
        num_fresh: int,
        affected: tuple[Replica, ...],
        heirs: Mapping[ReplicaId, int],
    ) -> tuple[int, ...]:
        """Weights and inherited KV of every position."""
        progress = [0] * num_fresh
        for replica in affected:
            if replica.id in heirs and replica not in self.view.lost:
                progress[heirs[replica.id]] += self._progress(replica)
        token_bytes = [kv_block_bytes(self.problem.spec.model, shard, block_tokens=1) for shard in shards]
        return tuple(
            self.catalog.shard_bytes(shard) + tokens * per_token
            for tokens in progress
            for shard, per_token in zip(shards, token_bytes, strict=True)
        )

    def _placement_row(
        self,
        gpu: GpuId,
        shards: tuple[Shard, ...],
        num_fresh: int,
        affected: tuple[Replica, ...],
        heirs: Mapping[ReplicaId, int],
        *,
        live: bool,
    ) -> PlacementRow:
        """What one GPU would bring to every position."""
        old = next((replica for replica in affected if gpu in replica.gpus), None)
        reuse, fits, home = [], [], None
        for number in range(num_fresh):
            for index, shard in enumerate(shards):
                overlap = self.catalog.overlap_bytes(self.holdings.get(gpu), shard)
                kept = 0
                if old is not None and heirs.get(old.id) == number and old not in self.view.lost:
                    kept = self._kv_overlap(old, gpu, shard)
                    if old.gpus.index(gpu) == index and len(old.gpus) == len(shards):
                        home = number * len(shards) + index
                reuse.append(overlap + kept)
                fits.append(not live or self._fits(gpu, shard, overlap))
        return PlacementRow(tuple(reuse), tuple(fits), home)

    def _kv_overlap(self, old: Replica, gpu: GpuId, shard: Shard) -> int:
        """KV bytes of a replica's requests that a GPU holds and a position needs."""
        model = self.problem.spec.model
        held = self.catalog.kv_rectangle(shard_at(model, old, old.gpus.index(gpu)))
        shared = cut(self.catalog.kv_rectangle(shard), held)
        if shared is None:
            return 0
        (first, last), (low, high) = shared
        return 2 * (last - first) * (high - low) * model.head_dim * model.element_bytes * self._progress(old)

    def _fits(self, gpu: GpuId, shard: Shard, overlap: int) -> bool:
        """Whether a position and the smallest KV pool fit beside what a GPU has now."""
        limits = self.problem.spec.limits
        block = kv_block_bytes(self.problem.spec.model, shard, block_tokens=limits.kv_block_tokens)
        incoming = self.copies * self.catalog.shard_bytes(shard) - overlap
        pool = 0 if self._inherited(gpu, shard) is not None else least_kv_blocks(limits) * block
        return incoming + pool <= self._free_now(gpu)

    def _inherited(self, gpu: GpuId, shard: Shard) -> Replica | None:
        replica = inherited_pool(self.catalog, self.problem, gpu, shard)
        return None if replica in self.view.lost else replica

    def _free_now(self, gpu: GpuId) -> int:
        """Memory that neither held weights nor a KV pool takes."""
        if gpu not in self.free:
            free = self.view.memory[gpu] - self.copies * self.catalog.bytes(self.held.get(gpu, {}))
            for replica in self.problem.snapshot.world.replicas:
                if gpu in replica.gpus:
                    free -= pool_bytes(self.catalog, self.problem, replica, gpu)
            self.free[gpu] = free
        return self.free[gpu]

    def _live_room(self, gpu: GpuId, shard: Shard) -> int:
        """Memory left for a new KV pool while the old generation still runs."""
        missing = without(self.catalog.owned(shard), self.held.get(gpu, {}))
        # Copies are laid out for one position: a new one shares none with the old one that still runs.
        laid_out = (self.copies - 1) * self.catalog.shard_bytes(shard)
        return self._free_now(gpu) - self.catalog.bytes(missing) - laid_out

    def _room_of_heir(self, gpu: GpuId, shard: Shard) -> int:
        """The same, where a pool of the same rectangle is taken over instead of a second one beside it."""
        replica = self._inherited(gpu, shard)
        room = self._live_room(gpu, shard)
        if replica is None or room < 0:
            return room
        return pool_bytes(self.catalog, self.problem, replica, gpu)

    def _sized_live(self, replica: Replica) -> Replica:
        """Pools taken over where both generations agree on the number of blocks, else beside the old ones."""
        sized = self._sized(replica, room=self._room_of_heir)
        for index, gpu in enumerate(replica.gpus):
            old = self._inherited(gpu, shard_at(self.problem.spec.model, replica, index))
            if old is not None and old.kv_blocks != sized.kv_blocks:
                return self._sized(replica, room=self._live_room)
        return sized

    def _sized(self, replica: Replica, *, room: RoomRule | None) -> Replica:
        """The replica with the largest KV pool that fits all its ranks, and B accordingly."""
        limits = self.problem.spec.limits
        blocks = most_kv_blocks(limits)
        for index, gpu in enumerate(replica.gpus):
            shard = shard_at(self.problem.spec.model, replica, index)
            steady = self.view.memory[gpu] - self.copies * self.catalog.shard_bytes(shard)
            roomy = kv_blocks_within(self.problem.spec.model, limits, shard, steady - limits.migration_headroom_bytes)
            tight = kv_blocks_within(self.problem.spec.model, limits, shard, steady)
            blocks = min(blocks, max(roomy, min(tight, least_kv_blocks(limits))))
            if room is not None:
                blocks = min(blocks, kv_blocks_within(self.problem.spec.model, limits, shard, room(gpu, shard)))
        return self._with_blocks(replica, blocks)

    def _replica(self, number: int, count: int, shape: tuple[int, int], gpus: tuple[GpuId, ...]) -> Replica:
        """A new replica; its id carries the epoch, so no id is ever used twice."""
        epoch = self.problem.epoch_to
        name = f"r{epoch}" if count == 1 else f"r{epoch}.{number + 1}"
        stages = tuple(
            Stage(layers=layers, gpus=gpus[stage * shape[1] : (stage + 1) * shape[1]])
            for stage, layers in enumerate(layer_split(self.problem.spec.model.num_layers, shape[0]))
        )
        return Replica(id=ReplicaId(name), generation=epoch, max_running=1, kv_blocks=0, stages=stages)

    # -- content --------------------------------------------------------------------------------------------

    def _fetch(
        self, fresh: tuple[Replica, ...], *, sources: list[GpuId], nothing_held: bool = False
    ) -> tuple[Transfer, ...]:
        """Where every missing range of the new replicas comes from."""
        wants: dict[GpuId, Ranges] = {}
        for replica in fresh:
            for index, gpu in enumerate(replica.gpus):
                owned = self.catalog.owned(shard_at(self.problem.spec.model, replica, index))
                held = {} if nothing_held else self.held.get(gpu, {})
                if missing := without(owned, held):
                    wants[gpu] = missing
        pieces = cut_pieces(self.catalog, wants, self.held, sources)
        transfers, self.reports["migrate"] = choose_sources(
            pieces, doomed=self.view.doomed, solver=self.solvers["migrate"]
        )
        return transfers

    def _allowed(self, sources: list[GpuId]) -> list[GpuId]:
        """The GPUs that weights may be copied from; the baselines load everything from storage."""
        return [] if self.policy in RESTART_POLICIES else sources

    def _sources(self, *, doomed: bool) -> list[GpuId]:
        """All living GPUs, or those that stay."""
        return self._allowed([*self.view.staying, *(self.view.doomed if doomed else ())])

    def _stay_s(self) -> float:
        """How long the stop may wait for requests that can go nowhere else."""
        left = self.view.remaining_s
        return PATIENCE_S if left is None else STAY_SHARE * max(0.0, left - margin_s(left))

    def _actions(
        self, layout: Layout, *, hottest: int | None, may_move: bool, stay_s: float | None = None
    ) -> tuple[RequestAction, ...]:
        """What becomes of the requests of the affected replicas."""
        target = (*layout.untouched, *layout.fresh)
        return decide_requests(
            self.problem,
            self.view,
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
        lost = {replica.id for replica in self.view.lost}
        return {
            route: kv_transfers(
                self.catalog,
                self.problem.spec.model,
                replicas[route.from_replica],
                replicas[route.to_replica],
            )
            for route in layout.routes
            if route.from_replica not in lost
        }

    # -- the file -------------------------------------------------------------------------------------------

    def _finish(self, draft: Draft, steps: tuple[Step, ...], rung: Rung) -> Plan:
        """The plan file's other fields."""
        problem = self.problem
        placed = all(action.to_replica is not None for action in draft.actions)
        serves = bool(draft.target) or not problem.snapshot.world.replicas
        return Plan(
            epoch=EpochChange.model_validate({"from": problem.snapshot.world.epoch, "to": problem.epoch_to}),
            trigger=problem.trigger,
            mode=draft.mode,
            policy=self.policy,
            policy_version=problem.spec.policy_version,
            spec=problem.spec,
            spec_digest=digest(problem.spec),
            snapshot=problem.snapshot,
            snapshot_digest=digest(problem.snapshot.world),
            target=Target(replicas=draft.target),
            routes=draft.routes,
            requests=draft.actions,
            solver=dict(sorted(self.reports.items())),
            estimates=estimate(steps, self.view.remaining_s, link_bytes_per_s=problem.spec.profile.link_bytes_per_s),
            fallback=LADDER[LADDER.index(rung) :],
            applyable=bool(steps),
            complete=placed and serves and bool(draft.target),
            steps=steps,
        )


@dataclass(frozen=True, slots=True)
class Layout:
    """The target layout and who inherits whom."""

    untouched: tuple[Replica, ...]
    fresh: tuple[Replica, ...]
    affected: tuple[Replica, ...]
    routes: tuple[Route, ...]


@dataclass(frozen=True, slots=True)
class PlacementRow:
    """One GPU's part of the placement problem."""

    reuse: tuple[int, ...]
    fits: tuple[bool, ...]
    home: int | None


RoomRule = Callable[[GpuId, Shard], int]
"""Bytes that a KV pool of a position may take on a GPU."""


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


def margin_s(left_s: float) -> float:
    """Safety kept of a grace period: a tenth, at least half a second unless that is most of it."""
    return max(0.1 * left_s, min(0.5, 0.5 * left_s))


def workload_of(problem: PlanningProblem) -> Workload:
    """The average request: of the snapshot if it has any, else half a context in and a quarter out."""
    requests = problem.snapshot.requests
    length = problem.spec.limits.max_model_len
    prompt, output = max(1, length // 2), max(1, length // 4)
    if requests:
        prompt = max(1, sum(request.prompt_tokens for request in requests) // len(requests))
        output = max(1, sum(request.max_tokens for request in requests) // len(requests))
    return Workload(min(prompt, length), min(output, length), problem.snapshot.load_rps)


def finish_times(steps: Iterable[Step]) -> dict[StepId, float]:
    """When each step ends if every step starts as soon as all it depends on are done."""
    finish: dict[StepId, float] = {}
    for step in steps:
        begin = max((finish[before] for before in step.depends_on), default=0.0)
        if isinstance(step, Quiesce):
            begin = max(begin, step.not_before_s)
        finish[step.id] = begin + step.estimated_s
    return finish


def estimate(steps: tuple[Step, ...], remaining_s: float | None, *, link_bytes_per_s: float) -> Estimates:
    """Copy, stall and total time along the longest path, or the busiest port where that takes longer."""
    if not steps:
        return Estimates(slack_s=remaining_s)
    finish = finish_times(steps)
    begin = {step.id: finish[step.id] - step.estimated_s for step in steps}
    copies = [step for step in steps if step.kind in ("copy_weights", "load_weights", "copy_kv")]
    path_s = max((finish[s.id] for s in copies), default=0.0) - min((begin[s.id] for s in copies), default=0.0)
    copy_s = max(path_s, busiest_port_s(copies, link_bytes_per_s=link_bytes_per_s))
    stops = [begin[step.id] for step in steps if step.kind == "quiesce"]
    cut_over_s = max(finish[step.id] for step in steps if step.kind in ("commit", "activate", "recompute"))
    done_s = max(finish.values()) + copy_s - path_s
    return Estimates(
        copy_s=round(copy_s, 6),
        stall_s=round(cut_over_s - min(stops), 6) if stops else 0.0,
        done_s=round(done_s, 6),
        slack_s=None if remaining_s is None else round(remaining_s - done_s, 6),
    )


def make_plan(problem: PlanningProblem) -> Plan:
    """The plan for a problem. Raises SpecError for an unknown policy or solver."""
    require_known("policy", problem.spec.policy, POLICIES)
    catalog = Catalog(problem.spec.model)
    holdings = {holding.gpu: holding for holding in problem.snapshot.world.holdings}
    return Planner(
        problem=problem,
        view=look(problem),
        catalog=catalog,
        solvers=chosen_solvers(problem.spec.solvers),
        holdings=holdings,
        held={gpu: catalog.held(holding) for gpu, holding in sorted(holdings.items())},
    ).plan()


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
