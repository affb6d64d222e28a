"""Steps: the DAG of a draft, in live or in_place order (contracts section 5, design section 3).

Steps are written in an order that is itself topological, so ids, files and diffs read from top to bottom. Nothing is
decided here but dependencies and estimates.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from spotserve.core.ids import GpuId, ReplicaId, StepId, instance_of
from spotserve.core.plan import (
    Activate,
    Commit,
    CopyKv,
    CopyKvDelta,
    CopyWeights,
    JoinGroup,
    KvRoute,
    LoadWeights,
    Quiesce,
    Reason,
    Recompute,
    Release,
    Reserve,
    Route,
    Step,
)
from spotserve.core.slices import Slice
from spotserve.core.snapshot import Replica
from spotserve.core.spec import ModelSpec
from spotserve.solvers.draft import Draft, inherited_pool, pool_bytes
from spotserve.solvers.gpu_kinds import replica_decode_ms
from spotserve.solvers.layer_order import Gone, gone_weights
from spotserve.solvers.migrate.kv import KvTransfer
from spotserve.solvers.migrate.pieces import Part, front_first
from spotserve.solvers.migrate.sources import Transfer
from spotserve.solvers.ranges import Catalog, Ranges, Rectangle, common, join, shard_at
from spotserve.solvers.view import requests_of

S = TypeVar("S", bound="Step")

LOCAL_COPY_BYTES_PER_S = 4e9
"""Moving KV inside one GPU; only its order of magnitude matters."""


@dataclass(frozen=True, slots=True)
class Window:
    """When a quiesce may begin and by when it must have."""

    not_before_s: float
    latest_s: float | None


@dataclass(slots=True)
class StepWriter:
    """Collects steps, gives them ids and remembers what later steps have to wait for.

    Copies are written in the order in which they should start: KV first, weights in the order of the draft's transfers.
    The runtime starts whatever is ready in the order of the file.
    """

    draft: Draft
    catalog: Catalog
    window: Window
    steps: list[Step] = field(default_factory=list)
    reserved: dict[GpuId, StepId] = field(default_factory=dict)
    arrivals: dict[GpuId, list[StepId]] = field(default_factory=lambda: defaultdict(list))
    joined: dict[ReplicaId, StepId] = field(default_factory=dict)
    copied_kv: list[tuple[Route, KvTransfer, StepId]] = field(default_factory=list)
    quiesced: dict[ReplicaId, StepId] = field(default_factory=dict)
    seats: dict[GpuId, Replica] = field(init=False)
    incoming: dict[GpuId, int] = field(init=False)
    gone: Mapping[GpuId, Gone] = field(init=False)
    old: Mapping[GpuId, Replica] = field(init=False)
    units: dict[tuple[Route, str], int] = field(default_factory=dict)
    written: dict[int, tuple[Slice, ...]] = field(default_factory=dict)
    kept: list[Ranges] = field(default_factory=list)
    """What `written` knows by its id must stay alive."""
    brought: dict[tuple[GpuId, str], list[tuple[Ranges, StepId]]] = field(default_factory=lambda: defaultdict(list))
    """By GPU that passes weights on, and layer: which step brings it what."""
    relaying: set[GpuId] = field(init=False)

    def __post_init__(self) -> None:
        self.seats = {gpu: replica for replica in self.draft.fresh for gpu in replica.gpus}
        self.incoming = defaultdict(int)
        for transfer in self.draft.transfers:
            self.incoming[transfer.destination] += transfer.bytes
        self.relaying = {one.source for one in self.draft.transfers if one.is_relayed and one.source is not None}
        self.old = self.draft.old_position
        self.gone = gone_weights(self.catalog, self.draft)

    def write_live(self) -> tuple[Step, ...]:
        """reserve, copy, join, quiesce, delta -> commit -> activate, recompute, release."""
        for replica in self.draft.fresh:
            self._reserve(replica, with_weights=True)
        for route, transfers in self.draft.kv.items():
            for transfer in transfers:
                self._copy_kv(route, transfer, self._reserved_at(transfer.destination))
        if self.draft.layer_by_layer is None:
            for one in self.draft.transfers:
                self._fetch(one, one.parts, [self.reserved[one.destination]])
        else:
            self._layers(self.draft.layer_by_layer, {}, frees=False)
        for replica in self.draft.fresh:
            self._join(replica, [])
        prepared = [step.id for step in self.steps]
        self._quiesce_all(self._unreached(prepared))
        for route, transfer, copied in self.copied_kv:
            self._copy_kv_delta(route, transfer, [copied, self.quiesced[route.from_replica]])
        commit = self._commit(self._unreached([step.id for step in self.steps]))
        activated = [self._activate(replica, [commit]) for replica in self.draft.fresh]
        self._recompute([commit, *activated])
        for replica in self.draft.affected:
            for gpu in self._alive(replica):
                self._release(replica, gpu, self._unneeded(gpu), [commit, *activated])
        return tuple(self.steps)

    def write_in_place(self, order: Sequence[str] | None) -> tuple[Step, ...]:
        """quiesce -> commit -> KV -> weights, layer by layer with releases between -> activate (Algorithm 2).

        The delta after each `copy_kv` brings the last blocks, which are not full, and says what did not come. A GPU's
        last release ends its old position.

        Without an `order` everything old is released first, then fetched: the restart.
        """
        self._quiesce_all([])
        commit = self._commit(list(self.quiesced.values()))
        before: dict[GpuId, StepId] = {}
        shrunk: dict[GpuId, StepId] = {}
        for replica in self.draft.affected:
            kept = self.draft.kept_blocks.get(replica.id)
            for gpu in self._alive(replica):
                if kept is None:
                    slices = self._unneeded(gpu) if order is None else {}
                    before[gpu] = self._release(replica, gpu, slices, [commit])
                elif kept < replica.kv_blocks and any(gpu in new.gpus for new in self.draft.fresh):
                    shrunk[gpu] = self._release(replica, gpu, {}, [commit], kv=False, keep_blocks=kept)
        cleared = self._clear_left_over(commit) if order is None else {}
        opened = {**dict.fromkeys(self.old, commit), **before, **shrunk, **cleared}
        for replica in self.draft.fresh:
            self._reserve(replica, with_weights=False, after={gpu: opened.get(gpu, commit) for gpu in replica.gpus})
        for route, transfers in self.draft.kv.items():
            for transfer in transfers:
                self._copy_kv(route, transfer, [*self._reserved_at(transfer.destination), opened[transfer.source]])
        before |= self._kv_deltas(set(before))
        self._layers(order, before)
        for replica in self.draft.fresh:
            self._join(replica, [])
        activated = []
        for replica in self.draft.fresh:
            needs = [step for gpu in replica.gpus for step in self.arrivals[gpu]]
            activated.append(self._activate(replica, [commit, self.joined[replica.id], *needs]))
        self._recompute([commit, *activated])
        if order is not None:
            waits = self._unreached([step.id for step in self.steps if not isinstance(step, Recompute)])
            for replica in self.draft.affected:
                for gpu in self._alive(replica):
                    slices = {} if gpu in self.reserved else self._unneeded(gpu)
                    self._release(replica, gpu, slices, waits, kv=gpu not in before)
        return tuple(self.steps)

    def _clear_left_over(self, commit: StepId) -> dict[GpuId, StepId]:
        """A restart counts on empty GPUs: those without an old position drop what they hold and will not need."""
        return {
            gpu: self._release(replica, gpu, self._unneeded(gpu), [commit], kv=False)
            for replica in self.draft.fresh
            for gpu in replica.gpus
            if gpu not in self.old and self._unneeded(gpu)
        }

    def _kv_deltas(self, without_pool: set[GpuId]) -> dict[GpuId, StepId]:
        """The last blocks of every rectangle; then old pools make way for weights. What a GPU's weights wait for."""
        readers: dict[GpuId, list[StepId]] = defaultdict(list)
        for route, transfer, copied in self.copied_kv:
            delta = self._copy_kv_delta(route, transfer, [copied, self.quiesced[route.from_replica]])
            self.arrivals[transfer.destination].append(delta)
            readers[transfer.source].append(delta)
            readers[transfer.destination].append(delta)
        return {
            gpu: self._release(replica, gpu, {}, [self._commit_id(), *dict.fromkeys(readers[gpu])])
            for replica in self.draft.affected
            for gpu in self._alive(replica)
            if gpu in self.reserved and gpu not in without_pool
        }

    def _layers(self, order: Sequence[str] | None, before: Mapping[GpuId, StepId], *, frees: bool = True) -> None:
        """Weights: all at once after the restart's releases, else layer by layer, freeing in between.

        A draft that goes `layer_by_layer` begins a layer when the one before has arrived, and the first after all KV.
        """
        if order is None:
            for one in self.draft.transfers:
                self._fetch(one, one.parts, [self.reserved[one.destination]])
            return
        by_layer: dict[str, list[tuple[Transfer, Part]]] = defaultdict(list)
        for one in self.draft.transfers:
            for part in one.parts:
                by_layer[part.layer].append((one, part))
        freed: dict[GpuId, list[StepId]] = defaultdict(list)
        last_layer = [step for _, _, step in self.copied_kv] if self.draft.layer_by_layer is not None else []
        for layer in order:
            readers: dict[GpuId, list[StepId]] = defaultdict(list)
            this_layer = []
            for one, parts in _by_pair(by_layer[layer]):
                gpu = one.destination
                waits = [self.reserved[gpu], *([before[gpu]] if gpu in before else []), *freed[gpu], *last_layer]
                step = self._fetch(one, parts, waits)
                this_layer.append(step)
                if one.source is not None and not one.is_relayed:
                    readers[one.source].append(step)
            if self.draft.layer_by_layer is not None:
                last_layer = this_layer or last_layer
            if frees:
                self._free_layer(layer, readers, freed)

    def _free_layer(
        self, layer: str, readers: Mapping[GpuId, Sequence[StepId]], freed: dict[GpuId, list[StepId]]
    ) -> None:
        """What nobody needs of a layer goes once it has been read, on GPUs to which more is to come."""
        for replica in self.draft.affected:
            for gpu in self._alive(replica):
                gone = self.gone[gpu].by_layer.get(layer)
                # Nothing comes to the others: all they hold goes at the end.
                if gone and gpu in self.reserved:
                    waits = [self._commit_id(), *readers.get(gpu, ())]
                    freed[gpu].append(self._release(replica, gpu, gone, waits, kv=False))

    def _commit_id(self) -> StepId:
        return next(step.id for step in self.steps if step.kind == "commit")

    def _alive(self, replica: Replica) -> list[GpuId]:
        return [gpu for gpu in replica.gpus if self.draft.view.alive(gpu)]

    def _reserved_at(self, gpu: GpuId) -> list[StepId]:
        return [self.reserved[gpu]] if gpu in self.reserved else []

    def _unneeded(self, gpu: GpuId) -> Ranges:
        """Weights that a GPU holds and its new position, if any, does not need."""
        return self.gone[gpu].ranges if gpu in self.gone else {}

    def _slices(self, ranges: Ranges) -> tuple[Slice, ...]:
        """Ranges as slices; mappings that many steps share are written once."""
        if id(ranges) not in self.written:
            self.kept.append(ranges)
            self.written[id(ranges)] = self.catalog.slices(ranges)
        return self.written[id(ranges)]

    def _next(self) -> StepId:
        return StepId(f"s{len(self.steps) + 1}")

    def _add(self, step: Step) -> StepId:
        self.steps.append(step)
        return step.id

    def _unreached(self, ids: Sequence[StepId]) -> list[StepId]:
        """Those of `ids` that no other of them depends on: enough to wait for all."""
        inside = set(ids)
        depended = {before for step in self.steps if step.id in inside for before in step.depends_on}
        return [step for step in ids if step not in depended]

    def _reserve(self, replica: Replica, *, with_weights: bool, after: dict[GpuId, StepId] | None = None) -> None:
        for index, gpu in enumerate(replica.gpus):
            stage, rank = divmod(index, replica.tensor)
            incoming = self.incoming.get(gpu, 0) if with_weights else 0
            self.reserved[gpu] = self._add(
                Reserve(
                    id=self._next(),
                    depends_on=(after[gpu],) if after else (),
                    reason=self._opening(),
                    workers=(gpu,),
                    replica=replica.id,
                    generation=replica.generation,
                    stage=stage,
                    rank=rank,
                    bytes=incoming + self._new_pool_bytes(replica, gpu),
                    estimated_s=self._round_trip(),
                    before=position_text(self.old.get(gpu), gpu),
                    after=position_text(replica, gpu),
                )
            )

    def _opening(self) -> Reason:
        """Why a position is taken."""
        reasons: dict[str, Reason] = {"start": "first_placement", "joined": "join", "load": "load"}
        return reasons.get(self.draft.problem.trigger.kind, "new_stage")

    def _fetch(self, transfer: Transfer, parts: Sequence[Part], depends_on: Sequence[StepId]) -> StepId:
        """One pair's copy of some parts as one step; what is passed on waits for the steps that bring it there."""
        source, destination = transfer.source, transfer.destination
        if transfer.is_relayed and source is not None:
            depends_on = (*depends_on, *self._bringing(source, parts))
        layers = _ranges_of(self.catalog.model, parts)
        slices = tuple(itertools.chain.from_iterable(self._slices(ranges) for ranges in layers))
        num_bytes = sum(part.bytes for part in parts)
        replica = self.seats[destination].id
        profile = self.draft.problem.spec.profile
        step: Step
        if source is None:
            start = self.draft.problem.trigger.kind == "start"
            step = LoadWeights(
                id=self._next(),
                depends_on=tuple(depends_on),
                reason="first_placement" if start else "ports_full" if transfer.by_choice else "no_holder",
                workers=(destination,),
                replica=replica,
                slices=slices,
                bytes=num_bytes,
                estimated_s=_seconds(num_bytes / profile.storage_bytes_per_s + profile.round_trip_s),
            )
        else:
            step = CopyWeights(
                id=self._next(),
                depends_on=tuple(depends_on),
                reason=self._holding(transfer),
                source=source,
                destination=destination,
                replica=replica,
                slices=slices,
                bytes=num_bytes,
                estimated_s=_seconds(num_bytes / profile.link_bytes_per_s + profile.round_trip_s),
            )
        self.arrivals[destination].append(step.id)
        if destination in self.relaying and not transfer.is_relayed:
            for part in parts:
                self.brought[destination, part.layer].append((part.ranges, step.id))
        return self._add(step)

    def _holding(self, transfer: Transfer) -> Reason:
        """Why a source is one."""
        if transfer.is_relayed:
            return "instance_fetches"
        return "holder_doomed" if transfer.source in self.draft.view.doomed else "holder_alive"

    def _bringing(self, gpu: GpuId, parts: Sequence[Part]) -> list[StepId]:
        """The steps that bring a GPU any of the parts, in the order of the file."""
        steps: dict[StepId, None] = {}
        for part in parts:
            for ranges, step in self.brought[gpu, part.layer]:
                if step not in steps and (ranges is part.ranges or common(part.ranges, ranges)):
                    steps[step] = None
        return list(steps)

    def _new_pool_bytes(self, replica: Replica, gpu: GpuId) -> int:
        """A position's KV pool, nothing if a live plan takes over the one that is there."""
        problem = self.draft.problem
        shard = shard_at(self.catalog.model, replica, replica.gpus.index(gpu))
        old = inherited_pool(self.catalog, problem, gpu, shard) if self.draft.mode == "live" else None
        if old is not None and old not in self.draft.view.lost and old.kv_blocks == replica.kv_blocks:
            return 0
        return pool_bytes(self.catalog, problem, replica, gpu)

    def _join(self, replica: Replica, after: list[StepId]) -> None:
        self.joined[replica.id] = self._add(
            JoinGroup(
                id=self._next(),
                depends_on=(*(self.reserved[gpu] for gpu in replica.gpus), *after),
                reason=self._opening(),
                workers=replica.gpus,
                replica=replica.id,
                generation=replica.generation,
                estimated_s=_seconds(2 * self._round_trip()),
            )
        )

    def _copy_kv(self, route: Route, transfer: KvTransfer, depends_on: list[StepId]) -> None:
        num_bytes = self._kv_bytes(route, transfer.rectangle, "copy")
        step = CopyKv(
            id=self._next(),
            depends_on=tuple(depends_on),
            reason="request_moves",
            source=transfer.source,
            destination=transfer.destination,
            route=kv_route(route, transfer.rectangle),
            bytes=0 if transfer.source == transfer.destination else num_bytes,
            estimated_s=self._kv_seconds(transfer, num_bytes),
        )
        self.copied_kv.append((route, transfer, self._add(step)))
        self.arrivals[transfer.destination].append(step.id)

    def _copy_kv_delta(self, route: Route, transfer: KvTransfer, depends_on: list[StepId]) -> StepId:
        num_bytes = self._kv_bytes(route, transfer.rectangle, "delta")
        return self._add(
            CopyKvDelta(
                id=self._next(),
                depends_on=tuple(depends_on),
                reason="request_moves",
                source=transfer.source,
                destination=transfer.destination,
                route=kv_route(route, transfer.rectangle),
                bytes=0 if transfer.source == transfer.destination else num_bytes,
                estimated_s=self._kv_seconds(transfer, num_bytes),
            )
        )

    def _kv_bytes(self, route: Route, rectangle: Rectangle, kind: str) -> int:
        """Bytes of a rectangle: so many cells of one layer and one kv head."""
        if (route, kind) not in self.units:
            cell = (0, 1), (0, 1)
            measure = self.draft.rectangle_bytes if kind == "copy" else self.draft.delta_bytes
            self.units[route, kind] = measure(route, cell)
        (first, last), (low, high) = rectangle
        return self.units[route, kind] * (last - first) * (high - low)

    def _kv_seconds(self, transfer: KvTransfer, num_bytes: int) -> float:
        if transfer.source == transfer.destination:
            return _seconds(num_bytes / LOCAL_COPY_BYTES_PER_S)
        return _seconds(num_bytes / self.draft.problem.spec.profile.link_bytes_per_s + self._round_trip())

    def _quiesce_all(self, depends_on: list[StepId]) -> None:
        for replica in self.draft.affected:
            if replica in self.draft.view.lost:
                continue
            running = max(1, len(requests_of(self.draft.problem, replica.id)))
            iteration = replica_decode_ms(self.draft.problem, replica, running=running)
            self.quiesced[replica.id] = self._add(
                Quiesce(
                    id=self._next(),
                    depends_on=tuple(depends_on),
                    reason="replica_changes" if self.draft.routes else "replica_retires",
                    workers=(replica.leader,),
                    replica=replica.id,
                    not_before_s=self.window.not_before_s,
                    latest_s=self.window.latest_s,
                    estimated_s=_seconds(iteration / 1000.0 + self._round_trip()),
                )
            )

    def _commit(self, depends_on: list[StepId]) -> StepId:
        return self._add(
            Commit(id=self._next(), depends_on=tuple(depends_on), reason="cut_over", estimated_s=2 * self._round_trip())
        )

    def _activate(self, replica: Replica, depends_on: list[StepId]) -> StepId:
        return self._add(
            Activate(
                id=self._next(),
                depends_on=tuple(depends_on),
                reason="cut_over",
                workers=replica.gpus,
                replica=replica.id,
                generation=replica.generation,
                estimated_s=self._round_trip(),
            )
        )

    def _recompute(self, depends_on: list[StepId]) -> None:
        again = tuple(action.request for action in self.draft.actions if action.action == "recompute")
        if again:
            lost = any(replica in self.draft.view.lost for replica in self.draft.affected)
            self._add(
                Recompute(
                    id=self._next(),
                    depends_on=tuple(depends_on),
                    reason="replica_lost" if lost else "kv_dropped",
                    requests=again,
                )
            )

    def _release(
        self,
        replica: Replica,
        gpu: GpuId,
        ranges: Ranges,
        depends_on: Iterable[StepId],
        *,
        kv: bool = True,
        keep_blocks: int | None = None,
    ) -> StepId:
        freed = replica.kv_blocks if kv else 0 if keep_blocks is None else replica.kv_blocks - keep_blocks
        pool = pool_bytes(self.catalog, self.draft.problem, replica, gpu) // max(1, replica.kv_blocks) * freed
        return self._add(
            Release(
                id=self._next(),
                depends_on=tuple(depends_on),
                reason=self._leaving(replica, gpu),
                workers=(gpu,),
                replica=replica.id,
                generation=replica.generation,
                slices=self._slices(ranges),
                kv=kv,
                keep_blocks=keep_blocks,
                bytes=self.catalog.bytes(ranges) + pool,
                estimated_s=self._round_trip(),
                before=position_text(self.old.get(gpu), gpu),
                after=position_text(self.seats.get(gpu), gpu),
            )
        )

    def _leaving(self, replica: Replica, gpu: GpuId) -> Reason:
        """Why something is freed: its position goes, or a new one needs the room."""
        if gpu not in self.old:
            return self._opening()
        return "replica_lost" if replica in self.draft.view.lost else "replica_retires"

    def _round_trip(self) -> float:
        return self.draft.problem.spec.profile.round_trip_s


def _seconds(value: float) -> float:
    """Estimates are rounded to microseconds: no noise digits in files."""
    return round(value, 6)


def _by_pair(layer: Sequence[tuple[Transfer, Part]]) -> list[tuple[Transfer, list[Part]]]:
    """The parts of one layer, those of a pair together, but for what is passed on."""
    groups: dict[tuple[GpuId, GpuId | None, bool], tuple[Transfer, list[Part]]] = {}
    for transfer, part in layer:
        key = transfer.destination, transfer.source, transfer.is_relayed
        groups.setdefault(key, (transfer, []))[1].append(part)
    return list(groups.values())


def _ranges_of(model: ModelSpec, parts: Sequence[Part]) -> list[Ranges]:
    """The ranges of each layer, front layers first, touching runs joined."""
    if len(parts) == 1:
        return [parts[0].ranges]
    layers: dict[str, Ranges] = {}
    for part in sorted(parts, key=lambda one: front_first(model, one.layer)):
        known = layers.get(part.layer)
        if known is None:
            layers[part.layer] = part.ranges
            continue
        layers[part.layer] = {
            name: join(known.get(name, []), part.ranges.get(name, [])) for name in {**known, **part.ranges}
        }
    return list(layers.values())


def kv_route(route: Route, rectangle: Rectangle) -> KvRoute:
    """A route with the rectangle of one copy."""
    return KvRoute(
        from_replica=route.from_replica, to_replica=route.to_replica, layers=rectangle[0], kv_heads=rectangle[1]
    )


def position_text(replica: Replica | None, gpu: GpuId) -> str | None:
    """`r4 stage 0 rank 1`, or None for a spare GPU."""
    if replica is None:
        return None
    stage, rank = divmod(replica.gpus.index(gpu), replica.tensor)
    return f"{replica.id} stage {stage} rank {rank}"


def busiest_port_s(steps: Iterable[Step], *, link_bytes_per_s: float) -> float:
    """Seconds that the busiest instance port needs for all copies of `steps`."""
    ports: dict[tuple[str, str], int] = defaultdict(int)
    for step in steps:
        if isinstance(step, CopyWeights | CopyKv | CopyKvDelta):
            source, destination = instance_of(step.source), instance_of(step.destination)
            if source != destination:
                ports["out", source] += step.bytes
                ports["in", destination] += step.bytes
    return max(ports.values(), default=0) / link_bytes_per_s


def busiest_storage_s(steps: Iterable[Step], *, storage_bytes_per_s: float) -> float:
    """Seconds that the busiest instance needs for what `steps` load: its GPUs share one way to storage."""
    loads: dict[str, int] = defaultdict(int)
    for step in steps:
        if isinstance(step, LoadWeights):
            loads[instance_of(step.workers[0])] += step.bytes
    return max(loads.values(), default=0) / storage_bytes_per_s
