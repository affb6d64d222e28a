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
from spotserve.core.ids import GpuId, ReplicaId
from spotserve.core.plan import Route, SolverReport
from spotserve.core.slices import Shard, kv_block_bytes, layer_split
from spotserve.core.snapshot import Replica, Stage
from spotserve.solvers.draft import Draft, complete_routes, inherited_pool, pool_bytes, route_requests
from spotserve.solvers.facts import Facts
from spotserve.solvers.mixed_layout import place_by_type
from spotserve.solvers.place import DEFAULT_BUDGET, Contents, PlacementProblem, place
from spotserve.solvers.place.contents import Carried, gather_contents
from spotserve.solvers.place.problem import Flags, product
from spotserve.solvers.ranges import Rectangle, shard_at, without
from spotserve.solvers.view import natural_key

RoomRule = Callable[[GpuId, Shard], int]
"""Bytes that a KV pool of a position may take on a GPU."""


@dataclass(frozen=True, slots=True)
class Layout:
    """The target layout and who inherits whom."""

    untouched: tuple[Replica, ...]
    fresh: tuple[Replica, ...]
    affected: tuple[Replica, ...]
    routes: tuple[Route, ...]


@dataclass(slots=True)
class LayoutBuilder:
    """Builds layouts from the facts; `report` is the last placement's.

    `place_budget` is the deterministic time that placing may take beyond its polynomial path.
    """

    facts: Facts
    place_budget: float = DEFAULT_BUDGET
    report: SolverReport | None = None
    free: dict[GpuId, int] = field(default_factory=dict)

    def lay_out(
        self, shape: tuple[int, int], num_fresh: int, untouched: tuple[Replica, ...], *, mode: str
    ) -> Layout | None:
        """GPUs, KV pools and routes of the target; None if a live KV pool would be too small."""
        affected = self.facts.affected(untouched)
        heirs = route_requests(self.facts.problem, self.facts.view, affected, num_fresh)
        fresh = self._place(shape, num_fresh, untouched, affected, heirs, live=mode == "live")
        return self._routed(fresh, untouched, affected, heirs, mode=mode)

    def lay_out_by_type(
        self, shapes: Sequence[PipelineShape], untouched: tuple[Replica, ...], *, mode: str
    ) -> Layout | None:
        """The same for new replicas of several shapes, each stage on GPUs of the type that its shape names."""
        affected = self.facts.affected(untouched)
        heirs = route_requests(self.facts.problem, self.facts.view, affected, len(shapes))
        used = {gpu for replica in untouched for gpu in replica.gpus}
        gpus = tuple(gpu for gpu in self.facts.view.staying if gpu not in used)
        result = place_by_type(self.facts, shapes, gpus=gpus, types=self.facts.types, heirs=heirs)
        self.report = result.report("by_type")
        assert result.answer is not None, "a mix takes no more GPUs of a type than there are"
        return self._routed(result.answer, untouched, affected, heirs, mode=mode)

    def _routed(
        self,
        fresh: tuple[Replica, ...],
        untouched: tuple[Replica, ...],
        affected: tuple[Replica, ...],
        heirs: Mapping[ReplicaId, int],
        *,
        mode: str,
    ) -> Layout | None:
        """The layout of placed replicas: their KV pools, and who inherits whom."""
        sized = tuple(self._sized_live(r) if mode == "live" else self.sized(r, room=None) for r in fresh)
        if any(replica.kv_blocks < least_kv_blocks(self.facts.spec.limits) for replica in sized):
            return None
        names = {old: sized[number].id for old, number in heirs.items()}
        target = tuple(sorted((*untouched, *sized), key=lambda r: natural_key(r.id)))
        return Layout(untouched, sized, affected, complete_routes(self.facts.problem, affected, names, target))

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
        gpus = tuple(gpu for gpu in self.facts.view.staying if gpu not in used)
        shards = replica_shards(self.facts.model, pipeline=shape[0], tensor=shape[1])
        problem = self._placement_problem(gpus, shape, shards, num_fresh, affected, heirs, live=live)
        result = place(problem, self.facts.solvers["place"], budget=self.place_budget)
        self.report = result.report(self.facts.solvers["place"])
        assert result.answer is not None, "there are as many GPUs as positions"
        placed = result.answer.gpus
        return tuple(
            self._replica(number, num_fresh, shape, placed[number * len(shards) : (number + 1) * len(shards)])
            for number in range(num_fresh)
        )

    def _placement_problem(
        self,
        gpus: tuple[GpuId, ...],
        shape: tuple[int, int],
        shards: tuple[Shard, ...],
        num_fresh: int,
        affected: tuple[Replica, ...],
        heirs: Mapping[ReplicaId, int],
        *,
        live: bool,
    ) -> PlacementProblem:
        """What the GPUs that may be placed, and those that only send, hold and what each position needs."""
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

    def _replica(self, number: int, count: int, shape: tuple[int, int], gpus: tuple[GpuId, ...]) -> Replica:
        """A new replica; its id carries the epoch, so no id is ever used twice."""
        epoch = self.facts.problem.epoch_to
        name = f"r{epoch}" if count == 1 else f"r{epoch}.{number + 1}"
        stages = tuple(
            Stage(layers=layers, gpus=gpus[stage * shape[1] : (stage + 1) * shape[1]])
            for stage, layers in enumerate(layer_split(self.facts.model.num_layers, shape[0]))
        )
        return Replica(id=ReplicaId(name), generation=epoch, max_running=1, kv_blocks=0, stages=stages)
