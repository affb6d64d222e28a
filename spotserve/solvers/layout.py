"""Layout: which GPUs, KV pools and routes the target gets, once the degrees are chosen.

Placement decides which GPU takes which position; the pools are then as large as the memory of every rank allows, beside
what the old generation still holds (live) or without it (in_place).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from spotserve.core.cost import kv_blocks_within, least_kv_blocks, most_kv_blocks, replica_shards, running_bound
from spotserve.core.ids import GpuId, ReplicaId
from spotserve.core.plan import Route, SolverReport
from spotserve.core.slices import Shard, kv_block_bytes, layer_split
from spotserve.core.snapshot import Replica, Stage
from spotserve.solvers.draft import Draft, complete_routes, inherited_pool, pool_bytes, route_requests
from spotserve.solvers.facts import Facts
from spotserve.solvers.place import PlacementProblem, place
from spotserve.solvers.ranges import cut, shard_at, without
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


@dataclass(frozen=True, slots=True)
class PlacementRow:
    """One GPU's part of the placement problem."""

    reuse: tuple[int, ...]
    fits: tuple[bool, ...]
    home: int | None


@dataclass(slots=True)
class LayoutBuilder:
    """Builds layouts from the facts; `report` is the last placement's."""

    facts: Facts
    report: SolverReport | None = None
    free: dict[GpuId, int] = field(default_factory=dict)

    def lay_out(
        self, shape: tuple[int, int], num_fresh: int, untouched: tuple[Replica, ...], *, mode: str
    ) -> Layout | None:
        """GPUs, KV pools and routes of the target; None if a live KV pool would be too small."""
        affected = self.facts.affected(untouched)
        heirs = route_requests(self.facts.problem, self.facts.view, affected, num_fresh)
        fresh = self._place(shape, num_fresh, untouched, affected, heirs, live=mode == "live")
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
            self.facts.solvers["place"],
        )
        self.report = placement.report
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
            if replica.id in heirs and replica not in self.facts.view.lost:
                progress[heirs[replica.id]] += self.facts.progress(replica)
        token_bytes = [kv_block_bytes(self.facts.model, shard, block_tokens=1) for shard in shards]
        return tuple(
            self.facts.catalog.shard_bytes(shard) + tokens * per_token
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
                overlap = self.facts.catalog.overlap_bytes(self.facts.holdings.get(gpu), shard)
                kept = 0
                if old is not None and heirs.get(old.id) == number and old not in self.facts.view.lost:
                    kept = self._kv_overlap(old, gpu, shard)
                    if old.gpus.index(gpu) == index and len(old.gpus) == len(shards):
                        home = number * len(shards) + index
                reuse.append(overlap + kept)
                fits.append(not live or self._fits(gpu, shard, overlap))
        return PlacementRow(tuple(reuse), tuple(fits), home)

    def _kv_overlap(self, old: Replica, gpu: GpuId, shard: Shard) -> int:
        """KV bytes of a replica's requests that a GPU holds and a position needs."""
        model = self.facts.model
        held = self.facts.catalog.kv_rectangle(shard_at(model, old, old.gpus.index(gpu)))
        shared = cut(self.facts.catalog.kv_rectangle(shard), held)
        if shared is None:
            return 0
        (first, last), (low, high) = shared
        return 2 * (last - first) * (high - low) * model.head_dim * model.element_bytes * self.facts.progress(old)

    def _fits(self, gpu: GpuId, shard: Shard, overlap: int) -> bool:
        """Whether a position and the smallest KV pool fit beside what a GPU has now."""
        limits = self.facts.spec.limits
        block = kv_block_bytes(self.facts.model, shard, block_tokens=limits.kv_block_tokens)
        incoming = self.facts.copies * self.facts.catalog.shard_bytes(shard) - overlap
        pool = 0 if self._inherited(gpu, shard) is not None else least_kv_blocks(limits) * block
        return incoming + pool <= self._free_now(gpu)

    def _inherited(self, gpu: GpuId, shard: Shard) -> Replica | None:
        replica = inherited_pool(self.facts.catalog, self.facts.problem, gpu, shard)
        return None if replica in self.facts.view.lost else replica

    def _free_now(self, gpu: GpuId) -> int:
        """Memory that neither held weights nor a KV pool takes."""
        if gpu not in self.free:
            free = self.facts.view.memory[gpu] - self.facts.copies * self.facts.catalog.bytes(
                self.facts.held.get(gpu, {})
            )
            for replica in self.facts.problem.snapshot.world.replicas:
                if gpu in replica.gpus:
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
