"""What a worker holds: its weight store, the positions of replica generations, and slices left over from aborted plans.

The memory budget counts a weight range once, however many generations share it, as plans and their checker do.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Literal

from spotserve.core.ids import ReplicaId
from spotserve.core.slices import Shard, Slice, kv_head_range, parameter_of, row_bytes, shard_slices, subtract
from spotserve.core.spec import KV_BLOCK_TOKENS, ServingSpec
from spotserve.core.wire import ModelFile, ReserveCommand, RoleReport
from spotserve.errors import ModelError, SpotServeError
from spotserve.runtime.checkpoint import TORCH_DTYPES, Checkpoint
from spotserve.runtime.kv_migration import IncomingKv
from spotserve.runtime.kv_store import KvStore
from spotserve.runtime.leader import Leader
from spotserve.runtime.mesh import Mesh
from spotserve.runtime.replica_loop import Follower, Place, StageRunner
from spotserve.runtime.stage_model import StageModel
from spotserve.runtime.weights import WeightStore

PositionKey = tuple[ReplicaId, int]


class OverMemoryError(SpotServeError):
    """A position does not fit beside what the worker holds."""

    code = "SPS-196"


class AbortedError(SpotServeError):
    """The plan that a command belongs to was aborted."""

    code = "SPS-197"


@dataclass(slots=True)
class Position:
    """One stage and rank of one replica generation on this worker."""

    place: Place
    epoch: int
    shard: Shard
    slices: tuple[Slice, ...]
    max_running: int
    kv_blocks: int
    kv: KvStore
    incoming: IncomingKv
    join_cancelled: threading.Event = field(default_factory=threading.Event)
    lock: threading.Lock = field(default_factory=threading.Lock)
    mesh: Mesh | None = None
    model: StageModel | None = None
    loop: Leader | Follower | None = None
    is_retired: bool = False
    """An in_place plan committed: it only serves as a source until it is released."""

    @property
    def key(self) -> PositionKey:
        """Replica and generation."""
        return (self.place.replica, self.place.generation)

    @property
    def leader(self) -> Leader | None:
        """The running leader, if this rank is it."""
        return self.loop if isinstance(self.loop, Leader) else None

    @property
    def state(self) -> Literal["prepared", "serving", "quiesced", "broken"]:
        """As `RoleReport` has it."""
        if self.is_retired:
            return "quiesced"
        if self.loop is None:
            return "prepared"
        if self.loop.broken is not None:
            return "broken"
        return "quiesced" if self.leader is not None and self.leader.is_quiesced else "serving"

    def role(self) -> RoleReport:
        """What a coordinator is told at registration."""
        place = self.place
        return RoleReport(
            replica=place.replica,
            generation=place.generation,
            stage=place.stage,
            rank=place.rank,
            state=self.state,
        )


class Holdings:
    """Everything on one worker's GPU. Thread-safe."""

    def __init__(
        self, spec: ServingSpec, *, folder: Path, files: Sequence[ModelFile] = (), memory_bytes: int, device: str
    ) -> None:
        self.spec = spec
        self.weights = WeightStore(spec.model, device=device)
        self._folder = folder
        self._files = files
        self._memory_bytes = memory_bytes
        self._device = device
        self._lock = threading.RLock()
        self._positions: dict[PositionKey, Position] = {}
        self._loose: list[Slice] = []
        self._aborted_epoch = 0
        self._checkpoint: Checkpoint | None = None

    def position(self, replica: ReplicaId, generation: int) -> Position | None:
        """The position held for a generation."""
        with self._lock:
            return self._positions.get((replica, generation))

    def positions(self) -> list[Position]:
        """All positions, sorted."""
        with self._lock:
            return [self._positions[key] for key in sorted(self._positions)]

    def loose(self) -> tuple[Slice, ...]:
        """Slices that belong to no position."""
        with self._lock:
            return tuple(self._loose)

    def relocate(self, folder: Path, files: Sequence[ModelFile]) -> None:
        """Read the model's files from this folder from now on; they are checked anew when something is read.

        Raises:
            ModelError: its weights have other bytes than those that are held; nothing was changed.
        """
        with self._lock:
            if (folder, tuple(files)) == (self._folder, tuple(self._files)):
                return
            if _weight_hashes(files) != _weight_hashes(self._files):
                raise ModelError(f"model folder {folder} has other weights than {self._folder} had")
            self._folder, self._files, self._checkpoint = folder, files, None

    def checkpoint(self) -> Checkpoint:
        """The model folder, checked to be the one that the spec was made from.

        Raises:
            ModelError: it is another, or broken.
        """
        with self._lock:
            if self._checkpoint is None:
                checkpoint = Checkpoint(self._folder, self.spec.model, files=self._files)
                if checkpoint.digest != self.spec.model.digest:
                    served = self.spec.model.digest
                    raise ModelError(f"model folder {self._folder} has digest {checkpoint.digest}, {served} is served")
                self._checkpoint = checkpoint
            return self._checkpoint

    def reserve(self, command: ReserveCommand) -> None:
        """Take a position's memory; a repeat changes nothing.

        Raises:
            OverMemoryError: weights and pools would exceed the budget; nothing was taken.
        """
        model = self.spec.model
        key = (command.replica, command.generation)
        if not command.with_weights:
            for position in self.positions():
                if position.key != key:
                    _retire(position)
        with self._lock:
            if key in self._positions:
                return
            if command.epoch <= self._aborted_epoch:
                raise AbortedError(f"epoch {command.epoch} was aborted, {self._aborted_epoch} being the last that was")
            slices = shard_slices(model, command.shard)
            self._check_budget(command, slices if command.with_weights else ())
            self.weights.reserve(slices, is_lazy=not command.with_weights)
            heir = self._pool_to_take_over(command)
            incoming = self._new_pool(command.shard, command.kv_blocks) if heir is None else heir.incoming
            place = Place(
                replica=command.replica,
                generation=command.generation,
                stage=command.stage,
                rank=command.rank,
                pipeline=command.pipeline,
                tensor=command.tensor,
            )
            self._positions[key] = Position(
                place=place,
                epoch=command.epoch,
                shard=command.shard,
                slices=slices,
                max_running=command.max_running,
                kv_blocks=command.kv_blocks,
                kv=incoming.kv,
                incoming=incoming,
            )
        self.trim()

    def expect(self, slices: Iterable[Slice]) -> None:
        """Check that slices have room when they come; positions reserved with their weights have it already.

        Raises:
            OverMemoryError: they would exceed the budget.
        """
        with self._lock:
            pools = sum({id(position.kv): position.kv.bytes for position in self._positions.values()}.values())
            needed = pools + self.union_bytes([*self.weights.taken(), *slices])
        if needed > self._memory_bytes:
            raise OverMemoryError(f"over_memory: {needed} bytes needed, the budget is {self._memory_bytes}")

    def trim(self) -> None:
        """Let go of what a retired generation holds and a newer one has by now too."""
        with self._lock:
            for position in self._positions.values():
                if position.is_retired:
                    position.slices = self.weights.release_doubled(position.slices)

    def _new_pool(self, shard: Shard, kv_blocks: int) -> IncomingKv:
        model = self.spec.model
        return IncomingKv(
            KvStore(
                num_blocks=kv_blocks,
                layers=shard.layers,
                kv_heads=kv_head_range(model, tensor=shard.tensor, rank=shard.rank),
                head_dim=model.head_dim,
                dtype=TORCH_DTYPES[model.dtype],
                device=self._device,
            )
        )

    def _pool_to_take_over(self, command: ReserveCommand) -> Position | None:
        """An older generation's position whose pool has the same layers, kv heads and blocks (as the plan counts it).

        Its KV stays where it is: keys name (request, choice, kv_generation), whatever generation runs them.
        """
        heads = kv_head_range(self.spec.model, tensor=command.shard.tensor, rank=command.shard.rank)
        for position in self._positions.values():
            same = (position.kv.layers, position.kv.kv_heads) == (command.shard.layers, heads)
            if same and position.kv.num_blocks == command.kv_blocks:
                return position
        return None

    def build(self, position: Position) -> StageRunner:
        """The stage over the position's weights and mesh; both must be complete."""
        assert position.mesh is not None
        with position.lock:
            if position.model is None:
                position.model = StageModel(
                    self._folder,
                    self.spec.model,
                    position.shard,
                    self.weights,
                    position.kv,
                    exchange=position.mesh if position.place.tensor > 1 else None,
                    deterministic=self.spec.deterministic,
                    prepacked=self.spec.linear == "prepacked",
                    device=self._device,
                )
            return StageRunner(position.place, position.model, position.mesh, position.incoming)

    def is_complete(self, position: Position) -> bool:
        """Whether all weights of the position are written."""
        return not position.is_retired and not self.weights.missing(position.slices)

    def release_part(
        self, replica: ReplicaId, generation: int, slices: Sequence[Slice], *, keep_blocks: int | None
    ) -> None:
        """Free these ranges of a position that has been left, and its pool but for `keep_blocks` blocks (None: nothing
        of it); the rest can be copied from. Where there is no such position yet, they are left-over slices.
        """
        position = self.position(replica, generation)
        if position is None:
            with self._lock:
                self._loose = list(self.weights.give_up(self._loose, slices))
            return
        _retire(position)
        with self._lock:
            if keep_blocks == 0:  # Not emptied: a newer generation may have taken the pool over.
                position.incoming = self._new_pool(position.shard, 0)
                position.kv = position.incoming.kv
            elif keep_blocks is not None:
                position.kv.shrink(keep_blocks)
            position.slices = self.weights.give_up(position.slices, slices)
            self._loose = list(self.weights.give_up(self._loose, slices))
        self.trim()

    def release(self, replica: ReplicaId, generation: int, *, keep_weights: bool = False) -> None:
        """Free a position; slices left over from aborted plans go too, as what they were kept for is decided now.

        With `keep_weights` (the replica was lost) its written slices become such leftovers instead.
        """
        position = self._take(replica, generation)
        if position is None:
            return
        _end(position)
        if keep_weights:
            self._loosen(position)
            return
        self.weights.release(position.slices)
        self.drop_loose()

    def abort(self, epoch: int) -> None:
        """Forget positions prepared for an epoch; their written slices stay as holdings.

        A reserve that comes after it, or is executed after it, is refused: nobody would ever free it.
        """
        with self._lock:
            self._aborted_epoch = max(self._aborted_epoch, epoch)
        for position in self.positions():
            if position.epoch != epoch or position.loop is not None:
                continue
            self._take(*position.key)
            position.join_cancelled.set()
            _end(position)
            self._loosen(position)

    def _loosen(self, position: Position) -> None:
        """Keep what is written of a position's weights as slices that belong to none."""
        with self._lock:
            written = [piece for piece in position.slices if not self.weights.missing([piece])]
            kept = set(written)
            self.weights.release([piece for piece in position.slices if piece not in kept])
            self._loose += written

    def _take(self, replica: ReplicaId, generation: int) -> Position | None:
        with self._lock:
            return self._positions.pop((replica, generation), None)

    def drop_loose(self) -> None:
        """Forget the slices that belong to no position."""
        with self._lock:
            self.weights.release(self._loose)
            self._loose = []

    def _keep_of_loose(self, needed: Sequence[Slice]) -> None:
        """Forget slices that belong to no position, but for what one needs that is about to take them over."""
        kept: dict[tuple[str, int], list[tuple[int, int]]] = {}
        for piece in needed:
            kept.setdefault((piece.parameter, piece.dim), []).append((piece.start, piece.stop))
        dropped = [
            piece.model_copy(update={"start": start, "stop": stop})
            for piece in self._loose
            for start, stop in subtract([(piece.start, piece.stop)], kept.get((piece.parameter, piece.dim), []))
        ]
        self._loose = list(self.weights.give_up(self._loose, dropped))

    def _check_budget(self, command: ReserveCommand, slices: Sequence[Slice]) -> None:
        stores = {id(position.kv): position.kv.bytes for position in self._positions.values()}
        pools = sum(stores.values())
        if self._pool_to_take_over(command) is None:
            pools += self._pool_bytes(command)
        held = [piece for position in self._positions.values() for piece in position.slices]
        if pools + self.union_bytes([*held, *slices, *self._loose]) > self._memory_bytes and self._loose:
            self._keep_of_loose(shard_slices(self.spec.model, command.shard))
        needed = pools + self.union_bytes([*held, *slices, *self._loose])
        if needed > self._memory_bytes:
            raise OverMemoryError(f"over_memory: {needed} bytes needed, the budget is {self._memory_bytes}")

    def _pool_bytes(self, command: ReserveCommand) -> int:
        model = self.spec.model
        first, last = kv_head_range(model, tensor=command.shard.tensor, rank=command.shard.rank)
        num_layers = command.shard.layers[1] - command.shard.layers[0]
        extents = (num_layers, 2, last - first, command.kv_blocks, KV_BLOCK_TOKENS, model.head_dim)
        return prod(extents) * model.element_bytes

    def union_bytes(self, slices: Iterable[Slice]) -> int:
        """Bytes of the slices, what several cover counted once."""
        ranges: dict[tuple[str, int], list[tuple[int, int]]] = {}
        for piece in slices:
            ranges.setdefault((piece.parameter, piece.dim), []).append((piece.start, piece.stop))
        model = self.spec.model
        return sum(
            _union_length(runs) * row_bytes(model, parameter_of(model, parameter))
            for (parameter, _), runs in ranges.items()
        )


def _retire(position: Position) -> None:
    """End what runs there and let go of the tensors it multiplies with; weights and KV stay."""
    _end(position)
    with position.lock:
        position.is_retired = True
        position.loop, position.mesh, position.model = None, None, None


def _end(position: Position) -> None:
    position.join_cancelled.set()
    if position.loop is not None:
        position.loop.stop()
    if position.mesh is not None:
        position.mesh.close()


def _union_length(runs: Iterable[tuple[int, int]]) -> int:
    total = 0
    reach = 0
    for start, stop in sorted(runs):
        total += max(0, stop - max(start, reach))
        reach = max(reach, stop)
    return total


def _weight_hashes(files: Iterable[ModelFile]) -> list[str]:
    return sorted(file.sha256 for file in files if file.name.endswith(".safetensors"))
