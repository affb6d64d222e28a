"""Layout: which GPUs, KV pools and routes the target gets, once the degrees are chosen.

Placement decides which GPU takes which position; the pools are then as large as the memory of every rank allows, beside
what the old generation still holds (live) or without it (in_place).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from spotserve.core.cost import (
    PipelineShape,
    kv_blocks_within,
    least_kv_blocks,
    most_kv_blocks,
    replica_shards,
    running_bound,
)
from spotserve.core.ids import GpuId, ReplicaId, natural_key
from spotserve.core.plan import Mode, Route, SolverReport
from spotserve.core.slices import Shard, kv_block_bytes, layer_split
from spotserve.core.snapshot import Replica
from spotserve.solvers.draft import Draft, complete_routes, inherited_pool, new_replicas, pool_bytes, route_requests
from spotserve.solvers.facts import Facts
from spotserve.solvers.mixed_layout import place_by_type
from spotserve.solvers.place import Contents, PlacementProblem, place
from spotserve.solvers.place.contents import Carried, gather_contents
from spotserve.solvers.place.problem import Flags, product
from spotserve.solvers.ranges import Rectangle, shard_at, without

RoomRule = Callable[[GpuId, Shard], int]
"""Bytes that a KV pool of a position may take on a GPU."""


@dataclass(frozen=True, slots=True)
class Layout:
    """The target layout and who inherits whom; `report` is that of its placement, if anything was placed."""

    untouched: tuple[Replica, ...]
    fresh: tuple[Replica, ...]
    affected: tuple[Replica, ...]
    routes: tuple[Route, ...]
    report: SolverReport | None = None


@dataclass(slots=True)
class LayoutBuilder:
    """Builds layouts from the facts; `free` is the memory of GPUs that was already added up."""

    facts: Facts
    free: dict[GpuId, int] = field(default_factory=dict)

    def lay_out(
        self, shape: tuple[int, int], num_fresh: int, untouched: tuple[Replica, ...], *, mode: Mode
    ) -> Layout | None:
        """GPUs, KV pools and routes of the target; None if a live KV pool would be too small."""
        affected = self.facts.affected(untouched)
        heirs = route_requests(self.facts.problem, self.facts.view, affected, num_fresh)
        problem = self._placement_problem(shape, num_fresh, untouched, affected, heirs, live=mode == "live")
        solver = self.facts.solvers["place"]
        result = place(problem, solver)
        assert result.answer is not None, "there are as many GPUs as positions"
        seats, gpus = shape[0] * shape[1], result.answer.gpus
        fresh = new_replicas(
            self.facts.problem.epoch_to,
            [layer_split(self.facts.model.num_layers, shape[0])] * num_fresh,
            [gpus[number * seats : (number + 1) * seats] for number in range(num_fresh)],
        )
        return self._routed(fresh, untouched, affected, heirs, result.report(solver), mode=mode)

    def lay_out_by_type(
        self, shapes: Sequence[PipelineShape], untouched: tuple[Replica, ...], *, mode: Mode
    ) -> Layout | None:
        """The same for new replicas of several shapes, each stage on GPUs of the type that its shape names."""
        affected = self.facts.affected(untouched)
        heirs = route_requests(self.facts.problem, self.facts.view, affected, len(shapes))
        result = place_by_type(self.facts, shapes, gpus=self.facts.idle(untouched), heirs=heirs)
        assert result.answer is not None, "a mix takes no more GPUs of a type than there are"
        return self._routed(result.answer, untouched, affected, heirs, result.report("by_type"), mode=mode)

    def _routed(
        self,
        fresh: tuple[Replica, ...],
        untouched: tuple[Replica, ...],
        affected: tuple[Replica, ...],
        heirs: Mapping[ReplicaId, int],
        report: SolverReport,
        *,
        mode: Mode,
    ) -> Layout | None:
        """The layout of placed replicas: their KV pools, and who inherits whom."""
        sized = tuple(self._sized_live(r) if mode == "live" else self.sized(r, room=None) for r in fresh)
        if any(replica.kv_blocks < least_kv_blocks(self.facts.spec.limits) for replica in sized):
            return None
        names = {old: sized[number].id for old, number in heirs.items()}
        target = tuple(sorted((*untouched, *sized), key=lambda r: natural_key(r.id)))
        routes = complete_routes(self.facts.problem, affected, names, target)
        return Layout(untouched, sized, affected, routes, report)

    def _placement_problem(
        self,
        shape: tuple[int, int],
        num_fresh: int,
        untouched: tuple[Replica, ...],
        affected: tuple[Replica, ...],
        heirs: Mapping[ReplicaId, int],
        *,
        live: bool,
    ) -> PlacementProblem:
        """What the GPUs that no untouched replica uses, and those that only send, hold, and what positions need."""
        gpus = self.facts.idle(untouched)
        shards = replica_shards(self.facts.model, pipeline=shape[0], tensor=shape[1])
        placed = set(gpus)
        senders = tuple(gpu for gpu in self.facts.view.memory if gpu not in placed)
        carried = [
            Carried(replica, self.facts.progress(replica), heirs[replica.id])
            for replica in affected
            if replica.id in heirs and replica not in self.facts.view.lost
        ]
        contents = gather_contents(
            self.facts.model,
            gpus=(*gpus, *senders),
            shards=shards,
            holdings=self.facts.holdings,
            carried=carried,
        )
        present = {
            gpu: old.heir * len(shards) + index
            for old in carried
            if len(old.replica.gpus) == len(shards)
            for index, gpu in enumerate(old.replica.gpus)
        }
        return PlacementProblem(
            gpus=gpus,
            senders=senders,
            data=num_fresh,
            pipeline=shape[0],
            tensor=shape[1],
            contents=contents,
            home=tuple(present.get(gpu) for gpu in gpus),
            fits=self._room_matrix(gpus, shards, contents)
            if live
            else np.ones((len(gpus), len(shards)), dtype=np.bool_),
        )

    def _room_matrix(self, gpus: tuple[GpuId, ...], shards: tuple[Shard, ...], contents: Contents) -> Flags:
        """Whether a position and the smallest KV pool fit beside what a GPU has now: [GPU, position]."""
        limits = self.facts.spec.limits
        overlap = product(contents.weight_held[: len(gpus)], contents.weight_needed, contents.weight_bytes)
        weights = np.array([self.facts.copies * self.facts.catalog.shard_bytes(shard) for shard in shards], np.int64)
        pools = np.array(
            [
                least_kv_blocks(limits) * kv_block_bytes(self.facts.model, shard, block_tokens=limits.kv_block_tokens)
                for shard in shards
            ],
            np.int64,
        )
        rectangles = [self.facts.catalog.kv_rectangle(shard) for shard in shards]
        taken_over = np.array([[rectangle == mine for rectangle in rectangles] for mine in self._pools(gpus)], np.bool_)
        free = np.array([self._free_now(gpu) for gpu in gpus], np.int64)
        fits: Flags = weights - overlap + pools * ~taken_over.reshape(len(gpus), len(shards)) <= free[:, None]
        return fits

    def _pools(self, gpus: tuple[GpuId, ...]) -> list[Rectangle | None]:
        """The layers and kv heads of the KV pool that each GPU has and a new generation may take over."""
        pools: list[Rectangle | None] = []
        positions = self.facts.problem.snapshot.world.positions
        for gpu in gpus:
            replica, index = positions.get(gpu, (None, 0))
            if replica is None or replica in self.facts.view.lost:
                pools.append(None)
            else:
                pools.append(self.facts.catalog.kv_rectangle(shard_at(self.facts.model, replica, index)))
        return pools

    def _inherited(self, gpu: GpuId, shard: Shard) -> Replica | None:
        replica = inherited_pool(self.facts.catalog, self.facts.problem, gpu, shard)
        return None if replica in self.facts.view.lost else replica

    def _free_now(self, gpu: GpuId) -> int:
        """Memory that neither held weights nor a KV pool takes."""
        if gpu not in self.free:
            held = self.facts.catalog.held_bytes(self.facts.holdings.get(gpu))
            free = self.facts.view.memory[gpu] - self.facts.copies * held
            if gpu in self.facts.problem.snapshot.world.positions:
                replica, _ = self.facts.problem.snapshot.world.positions[gpu]
                free -= pool_bytes(self.facts.catalog, self.facts.problem, replica, gpu)
            self.free[gpu] = free
        return self.free[gpu]

    def _live_room(self, gpu: GpuId, shard: Shard) -> int:
        """Memory left for a new KV pool while the old generation still runs."""
        missing = without(self.facts.catalog.owned(shard), self.facts.held.get(gpu, {}))
        # Copies are laid out for one position: a new one shares none with the old one that still runs.
        laid_out = (self.facts.copies - 1) * self.facts.catalog.shard_bytes(shard)
        return self._free_now(gpu) - self.facts.catalog.bytes(missing) - laid_out

    def _room_of_heir(self, gpu: GpuId, shard: Shard) -> int:
        """The same, where a pool of the same rectangle is taken over instead of a second one beside it."""
        replica = self._inherited(gpu, shard)
        room = self._live_room(gpu, shard)
        if replica is None or room < 0:
            return room
        return pool_bytes(self.facts.catalog, self.facts.problem, replica, gpu)

    def _sized_live(self, replica: Replica) -> Replica:
        """Pools taken over where both generations agree on the number of blocks, else beside the old ones."""
        sized = self.sized(replica, room=self._room_of_heir)
        for index, gpu in enumerate(replica.gpus):
            old = self._inherited(gpu, shard_at(self.facts.model, replica, index))
            if old is not None and old.kv_blocks != sized.kv_blocks:
                return self.sized(replica, room=self._live_room)
        return sized

    def sized(self, replica: Replica, *, room: RoomRule | None) -> Replica:
        """The replica with the largest KV pool that fits all its ranks, and B accordingly."""
        limits = self.facts.spec.limits
        blocks = most_kv_blocks(limits)
        for index, gpu in enumerate(replica.gpus):
            shard = shard_at(self.facts.model, replica, index)
            steady = self.facts.view.memory[gpu] - self.facts.copies * self.facts.catalog.shard_bytes(shard)
            roomy = kv_blocks_within(self.facts.model, limits, shard, steady - limits.migration_headroom_bytes)
            tight = kv_blocks_within(self.facts.model, limits, shard, steady)
            blocks = min(blocks, max(roomy, min(tight, least_kv_blocks(limits))))
            if room is not None:
                blocks = min(blocks, kv_blocks_within(self.facts.model, limits, shard, room(gpu, shard)))
        return self.with_blocks(replica, blocks)

    def room_beside(self, affected: tuple[Replica, ...], kept: Mapping[ReplicaId, int]) -> RoomRule:
        """Memory for a new KV pool before any weight has come or gone, beside what is kept of the old pool."""

        def room(gpu: GpuId, shard: Shard) -> int:
            free = self._free_now(gpu)
            for replica in affected:
                if gpu in replica.gpus:
                    gone = self.with_blocks(replica, replica.kv_blocks - kept.get(replica.id, 0))
                    free += pool_bytes(self.facts.catalog, self.facts.problem, gone, gpu)
            return free

        return room

    def free_of_pools(self, draft: Draft) -> dict[GpuId, int]:
        """Memory left for weights once the old KV pools are gone and the new ones there."""
        free = {gpu: self._free_now(gpu) for gpu in self.facts.view.memory}
        for gpu, replica in draft.old_position.items():
            free[gpu] += pool_bytes(self.facts.catalog, self.facts.problem, replica, gpu)
        for replica in draft.fresh:
            for gpu in replica.gpus:
                free[gpu] -= pool_bytes(self.facts.catalog, self.facts.problem, replica, gpu)
        return free

    def with_blocks(self, replica: Replica, kv_blocks: int) -> Replica:
        """The replica with a KV pool of so many blocks."""
        bound = running_bound(self.facts.spec.limits, kv_blocks)
        return replica.model_copy(update={"kv_blocks": kv_blocks, "max_running": bound})
