"""Steps: the DAG of a draft, in live or in_place order (contracts section 5, design section 3).

Steps are written in an order that is itself topological, so ids, files and diffs read from top to bottom. Nothing is
decided here but dependencies and estimates.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from spotserve.core.cost import decode_ms
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
from spotserve.core.snapshot import Replica
from spotserve.solvers.draft import Draft, inherited_pool, pool_bytes
from spotserve.solvers.layer_order import LayerChange, order_layers
from spotserve.solvers.migrate import KvTransfer, Transfer, layer_of
from spotserve.solvers.ranges import Catalog, Ranges, Rectangle, join, shard_at, without
from spotserve.solvers.view import natural_key, requests_of

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
    """Collects steps, gives them ids and remembers what later steps have to wait for."""

    draft: Draft
    catalog: Catalog
    window: Window
    steps: list[Step] = field(default_factory=list)
    reserved: dict[GpuId, StepId] = field(default_factory=dict)
    arrivals: dict[GpuId, list[StepId]] = field(default_factory=lambda: defaultdict(list))
    joined: dict[ReplicaId, StepId] = field(default_factory=dict)
    copied_kv: list[tuple[Route, KvTransfer, StepId]] = field(default_factory=list)
    quiesced: dict[ReplicaId, StepId] = field(default_factory=dict)

    def write_live(self) -> tuple[Step, ...]:
        """reserve, copy, join, quiesce, delta -> commit -> activate, recompute, release."""
        for replica in self.draft.fresh:
            self._reserve(replica, with_weights=True)
        for group in _by_pair(self.draft.transfers):
            self._fetch(group, [self.reserved[group[0].destination]])
        for replica in self.draft.fresh:
            self._join(replica, [])
        for route, transfers in self.draft.kv.items():
            for transfer in transfers:
                self._copy_kv(route, transfer, self._reserved_at(transfer.destination))
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
        opened = {**dict.fromkeys(self.draft.old_position, commit), **before, **shrunk}
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

    def _layers(self, order: Sequence[str] | None, before: Mapping[GpuId, StepId]) -> None:
        """Weights: all at once after the restart's releases, else one layer after the other, freeing in between."""
        if order is None:
            for group in _by_pair(self.draft.transfers):
                self._fetch(group, [self.reserved[group[0].destination]])
            return
        freed: dict[GpuId, list[StepId]] = defaultdict(list)
        for layer in order:
            readers: dict[GpuId, list[StepId]] = defaultdict(list)
            for group in _by_pair([t for t in self.draft.transfers if t.layer == layer]):
                gpu = group[0].destination
                step = self._fetch(group, [self.reserved[gpu], *([before[gpu]] if gpu in before else []), *freed[gpu]])
                if group[0].source is not None:
                    readers[group[0].source].append(step)
            for replica in self.draft.affected:
                for gpu in self._alive(replica):
                    gone = {n: r for n, r in self._unneeded(gpu).items() if layer_of(n) == layer}
                    # Nothing comes to the others: all they hold goes at the end.
                    if gone and gpu in self.reserved:
                        waits = [self._commit_id(), *readers[gpu]]
                        freed[gpu].append(self._release(replica, gpu, gone, waits, kv=False))

    def _commit_id(self) -> StepId:
        return next(step.id for step in self.steps if step.kind == "commit")

    def _alive(self, replica: Replica) -> list[GpuId]:
        return [gpu for gpu in replica.gpus if self.draft.view.alive(gpu)]

    def _reserved_at(self, gpu: GpuId) -> list[StepId]:
        return [self.reserved[gpu]] if gpu in self.reserved else []

    def _unneeded(self, gpu: GpuId) -> Ranges:
        """Weights that a GPU holds and its new position, if any, does not need."""
        needed = new_ranges(self.catalog, self.draft.fresh, gpu)
        held = self.draft.held.get(gpu, {})
        return held if self.draft.released_first else without(held, needed)

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
            incoming = sum(t.bytes for t in self.draft.transfers if t.destination == gpu) if with_weights else 0
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
                    before=position_text(self.draft.old_position.get(gpu), gpu),
                    after=position_text(replica, gpu),
                )
            )

    def _opening(self) -> Reason:
        """Why a position is taken."""
        reasons: dict[str, Reason] = {"start": "first_placement", "joined": "join", "load": "load"}
        return reasons.get(self.draft.problem.trigger.kind, "new_stage")

    def _fetch(self, group: Sequence[Transfer], depends_on: list[StepId]) -> StepId:
        """One pair's transfers as one step."""
        source, destination = group[0].source, group[0].destination
        ranges: Ranges = {}
        for transfer in group:
            for name, runs in transfer.ranges.items():
                ranges[name] = join(ranges.get(name, []), runs)
        slices = self.catalog.slices(ranges)
        num_bytes = sum(transfer.bytes for transfer in group)
        replica = next(r.id for r in self.draft.fresh if destination in r.gpus)
        profile = self.draft.problem.spec.profile
        step: Step
        if source is None:
            start = self.draft.problem.trigger.kind == "start"
            step = LoadWeights(
                id=self._next(),
                depends_on=tuple(depends_on),
                reason="first_placement" if start else "no_holder",
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
                reason="holder_doomed" if source in self.draft.view.doomed else "holder_alive",
                source=source,
                destination=destination,
                replica=replica,
                slices=slices,
                bytes=num_bytes,
                estimated_s=_seconds(num_bytes / profile.link_bytes_per_s + profile.round_trip_s),
            )
        self.arrivals[destination].append(step.id)
        return self._add(step)

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
        num_bytes = self.draft.rectangle_bytes(route, transfer.rectangle)
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
        num_bytes = self.draft.delta_bytes(route, transfer.rectangle)
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

    def _kv_seconds(self, transfer: KvTransfer, num_bytes: int) -> float:
        if transfer.source == transfer.destination:
            return _seconds(num_bytes / LOCAL_COPY_BYTES_PER_S)
        return _seconds(num_bytes / self.draft.problem.spec.profile.link_bytes_per_s + self._round_trip())

    def _quiesce_all(self, depends_on: list[StepId]) -> None:
        for replica in self.draft.affected:
            if replica in self.draft.view.lost:
                continue
            running = max(1, len(requests_of(self.draft.problem, replica.id)))
            iteration = decode_ms(
                self.draft.problem.spec, pipeline=replica.pipeline, tensor=replica.tensor, running=running
            )
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
        freed_pool = replica.model_copy(update={"kv_blocks": freed})
        pool = pool_bytes(self.catalog, self.draft.problem, freed_pool, gpu)
        fresh = next((new for new in self.draft.fresh if gpu in new.gpus), None)
        return self._add(
            Release(
                id=self._next(),
                depends_on=tuple(depends_on),
                reason="replica_lost" if replica in self.draft.view.lost else "replica_retires",
                workers=(gpu,),
                replica=replica.id,
                generation=replica.generation,
                slices=self.catalog.slices(ranges),
                kv=kv,
                keep_blocks=keep_blocks,
                bytes=self.catalog.bytes(ranges) + pool,
                estimated_s=self._round_trip(),
                before=position_text(replica, gpu),
                after=position_text(fresh, gpu),
            )
        )

    def _round_trip(self) -> float:
        return self.draft.problem.spec.profile.round_trip_s


def _seconds(value: float) -> float:
    """Estimates are rounded to microseconds: no noise digits in files."""
    return round(value, 6)


def _by_pair(transfers: Iterable[Transfer]) -> list[list[Transfer]]:
    """Transfers grouped by destination and source, in natural order."""
    groups: dict[tuple[GpuId, GpuId | None], list[Transfer]] = defaultdict(list)
    for transfer in transfers:
        groups[transfer.destination, transfer.source].append(transfer)
    return [groups[key] for key in sorted(groups, key=lambda key: (natural_key(key[0]), natural_key(key[1] or "")))]


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


def new_ranges(catalog: Catalog, fresh: Sequence[Replica], gpu: GpuId) -> Ranges:
    """What a GPU's position in a new replica owns; nothing if it has none."""
    for replica in fresh:
        if gpu in replica.gpus:
            return catalog.owned(shard_at(catalog.model, replica, replica.gpus.index(gpu)))
    return {}


def layer_changes(catalog: Catalog, draft: Draft) -> tuple[LayerChange, ...]:
    """Per layer, what each GPU receives and what it may free once the layer has moved."""
    incoming: dict[str, dict[GpuId, int]] = defaultdict(lambda: defaultdict(int))
    freed: dict[str, dict[GpuId, int]] = defaultdict(lambda: defaultdict(int))
    for transfer in draft.transfers:
        incoming[transfer.layer][transfer.destination] += transfer.bytes
    for gpu in draft.old_position:
        gone = without(draft.held.get(gpu, {}), new_ranges(catalog, draft.fresh, gpu))
        for name, runs in gone.items():
            freed[layer_of(name)][gpu] += catalog.bytes({name: runs})
    layers = sorted({*incoming, *freed}, key=lambda layer: (not layer.isdigit(), natural_key(layer)))
    return tuple(LayerChange(layer, dict(incoming[layer]), dict(freed[layer])) for layer in layers)


def memory_order(catalog: Catalog, draft: Draft, *, memory: dict[GpuId, int]) -> tuple[str, ...] | None:
    """The order in which layers can move with `memory` bytes free on each GPU; None if there is none."""
    return order_layers(layer_changes(catalog, draft), memory)


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
