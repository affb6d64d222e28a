"""What a migration moves: the artifact's own estimate of volume and time, and the least that any placement could move.

The estimate counts, per instance, what is sent plus what is received, once over the network and once inside, and takes
the fullest instance of either kind over 50 Gbit/s (section 2.5 of the artifact's arranger). The least is exact bytes of
a free maximum-weight matching of GPUs with positions.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from spotserve.solvers.paper.mapper import (
    NO_BATCH,
    CarriedBatch,
    DeviceMap,
    Seat,
    edge_weight_h,
    rank_order,
    reused_weight_bytes,
    two_level,
)
from spotserve.solvers.paper.matching import by_scipy, kuhn_munkres
from spotserve.solvers.paper.models import (
    PaperModel,
    Position,
    Shape,
    embedding_floats,
    head_floats,
    replicated_floats,
    sharded_floats,
    weight_bytes,
)

LINK_MBIT_PER_S = 50_000
FLOAT_MBIT = 32e-6

Piece = tuple[str, int, int]
"""(kind, layer, shard): `sharded` parts are cut as finely as the larger tensor degree."""


@dataclass(frozen=True, slots=True)
class Transition:
    """A change of shape. GPUs are numbered in address order and `instance_of[gpu]` says where each is.

    `old[q]` is the GPU at old position q; `staying` are the GPUs of the new fleet; `batches[d]` is what old pipeline d
    carries, and new pipeline i inherits old pipeline `heirs[i]` (an old number or one beyond: nothing to inherit).
    """

    model: PaperModel
    old_shape: Shape
    new_shape: Shape
    old: tuple[int, ...]
    staying: tuple[int, ...]
    instance_of: tuple[int, ...]
    heirs: tuple[int, ...]
    batches: tuple[CarriedBatch, ...] = ()

    def carried(self, pipeline: int) -> CarriedBatch:
        """The batch of an old pipeline."""
        return self.batches[pipeline] if pipeline < len(self.batches) else NO_BATCH

    @property
    def keeps_running(self) -> bool:
        """Whether pipelines are only added: then those that run are not stopped, and no KV moves."""
        old, new = self.old_shape, self.new_shape
        same = (old.pipeline, old.tensor) == (new.pipeline, new.tensor)
        return same and old.data <= new.data and set(self.old) <= set(self.staying)

    def survivors(self) -> tuple[int, ...]:
        """GPUs of the old shape that stay, in address order."""
        held = set(self.old)
        return tuple(gpu for gpu in self.staying if gpu in held)

    def seats(self) -> dict[int, Seat]:
        """Where every GPU of the old shape sits."""
        positions = self.old_shape.positions()
        return {gpu: Seat(self.old_shape, at) for gpu, at in zip(self.old, positions, strict=True)}


@dataclass(frozen=True, slots=True)
class TransferEstimate:
    """Mbit moved between and inside instances, in all and on the fullest instance, and the seconds that follow."""

    between_mbit: float
    inside_mbit: float
    most_between_mbit: float
    most_inside_mbit: float

    @property
    def transfer_s(self) -> float:
        """T_transfer."""
        return self.most_between_mbit / LINK_MBIT_PER_S + self.most_inside_mbit / LINK_MBIT_PER_S


@dataclass(frozen=True, slots=True)
class LeastTransfer:
    """Weight bytes that the new shape needs, that survivors may reuse at most, and of the naive order of survivors."""

    needed_bytes: int
    reusable_bytes: int
    naive_moved_bytes: int

    @property
    def moved_bytes(self) -> int:
        """What any placement moves at least."""
        return self.needed_bytes - self.reusable_bytes


def place_by_matching(transition: Transition) -> DeviceMap:
    """The artifact's placement: two-level matching of what survives, newcomers in address order.

    Where pipelines are only added, all that run stay where they are.
    """
    seats = transition.seats()
    if transition.keeps_running:
        added = [gpu for gpu in transition.staying if gpu not in seats]
        gpus = (*transition.old, *added[: transition.new_shape.gpus - transition.old_shape.gpus])
        held = (Seat(transition.old_shape, position) for position in transition.old_shape.positions())
        return DeviceMap(gpus, sum(edge_weight_h(transition.model, seat, seat) for seat in held))
    targets = tuple(transition.new_shape.positions())
    weights = [[0.0] * len(targets) for _ in transition.instance_of]
    for gpu in transition.survivors():
        old = seats[gpu]
        for number, position in enumerate(targets):
            batch = NO_BATCH
            if transition.heirs[position.replica] == old.position.replica:
                batch = transition.carried(old.position.replica)
            weights[gpu][number] = edge_weight_h(transition.model, old, Seat(transition.new_shape, position), batch)
    fresh = tuple(gpu for gpu in transition.staying if gpu not in seats)
    return two_level(
        _by_instance(transition.survivors(), transition.instance_of),
        transition.new_shape,
        weights,
        fresh=_by_instance(fresh, transition.instance_of),
        matcher=kuhn_munkres,
    )


def place_by_rank(transition: Transition) -> DeviceMap:
    """The ablation's placement: GPUs in address order."""
    return rank_order(transition.staying, transition.new_shape)


def estimate_transfer(transition: Transition, placed: DeviceMap, *, by_rank: bool = False) -> TransferEstimate:
    """The artifact's estimate. `by_rank` is its ablation: every shard comes from the first holder in replica 0."""
    ports = _Ports(transition.instance_of)
    sources = [0] * len(placed.gpus) if by_rank else _source_replicas(transition, placed)
    for replica in range(transition.old_shape.data):
        wanting = [number for number, source in enumerate(sources) if source == replica]
        holders = _old_holders(transition, replica)
        for piece, gpus in _new_holders(transition, placed, wanting).items():
            _send(ports, holders[piece], gpus, _weight_mbit(transition, piece), first_only=by_rank)
    for heir, replica in enumerate(() if transition.keeps_running and not by_rank else transition.heirs):
        # The artifact looks at the new number here: a pipeline beyond the old ones inherits nothing.
        if heir < transition.old_shape.data and transition.carried(replica) != NO_BATCH:
            own = range(heir * len(placed.gpus) // transition.new_shape.data, len(placed.gpus))
            numbers = own[: transition.new_shape.pipeline * transition.new_shape.tensor]
            holders = _old_holders(transition, replica)
            for piece, gpus in _new_holders(transition, placed, numbers).items():
                _send(ports, holders[piece], gpus, _kv_mbit(transition, piece, replica), first_only=by_rank)
    return ports.estimate()


def least_transfer(transition: Transition) -> LeastTransfer:
    """The exact minimum over all placements, weights only: needed minus a free maximum-weight matching."""
    seats = transition.seats()
    survivors = transition.survivors()
    targets = [Seat(transition.new_shape, position) for position in transition.new_shape.positions()]
    reused = [[reused_weight_bytes(transition.model, seats[gpu], target) for target in targets] for gpu in survivors]
    needed = sum(_needed_bytes(transition, target.position) for target in targets)
    matrix = np.array(reused, dtype=np.float64)
    if len(survivors) > len(targets):
        pairs = [(row, column) for column, row in enumerate(by_scipy(matrix.T).columns)]
    else:
        pairs = list(enumerate(by_scipy(matrix).columns))
    naive = sum(reused[number][number] for number in range(min(len(survivors), len(targets))))
    return LeastTransfer(needed, sum(reused[row][column] for row, column in pairs), needed - naive)


class _Ports:
    """Mbit that every instance sends and receives over the network, and moves inside."""

    def __init__(self, instance_of: Sequence[int]) -> None:
        self._instance_of = instance_of
        self._between = dict.fromkeys(instance_of, 0.0)
        self._inside = dict.fromkeys(instance_of, 0.0)

    def move(self, source: int, target: int, mbit: float) -> None:
        """Count one transfer: at both ends over the network, once inside an instance."""
        sender, receiver = self._instance_of[source], self._instance_of[target]
        if sender == receiver:
            self._inside[sender] += mbit
            return
        self._between[sender] += mbit
        self._between[receiver] += mbit

    def estimate(self) -> TransferEstimate:
        """Sums and maxima."""
        return TransferEstimate(
            between_mbit=sum(self._between.values()) / 2,
            inside_mbit=sum(self._inside.values()),
            most_between_mbit=max(self._between.values()),
            most_inside_mbit=max(self._inside.values()),
        )


def _send(ports: _Ports, holders: Sequence[int], gpus: Sequence[int], mbit: float, *, first_only: bool) -> None:
    """One piece to all that lack it, from its holders in turn."""
    lacking = [gpu for gpu in gpus if gpu not in holders]
    for number, gpu in enumerate(lacking):
        ports.move(holders[0 if first_only else number % len(holders)], gpu, mbit)


def _source_replicas(transition: Transition, placed: DeviceMap) -> list[int]:
    """The old replica that each new position's weights come from: its GPU's own, or in turn for newcomers."""
    seats = transition.seats()
    sources = [seats[gpu].position.replica if gpu in seats else -1 for gpu in placed.gpus]
    positions = tuple(transition.new_shape.positions())
    newcomers = [number for number, source in enumerate(sources) if source == -1]
    newcomers.sort(key=lambda number: (positions[number].stage, positions[number].rank, positions[number].replica))
    for turn, number in enumerate(newcomers):
        sources[number] = turn % transition.old_shape.data
    return sources


def _old_holders(transition: Transition, replica: int) -> Mapping[Piece, list[int]]:
    """The GPUs of one old replica that hold each piece, in address order."""
    holders: dict[Piece, list[int]] = {}
    for gpu, seat in transition.seats().items():
        if seat.position.replica == replica:
            for piece in _pieces(transition, seat):
                holders.setdefault(piece, []).append(gpu)
    return holders


def _new_holders(transition: Transition, placed: DeviceMap, numbers: Sequence[int]) -> Mapping[Piece, list[int]]:
    """The GPUs at some new positions that need each piece, in address order."""
    positions = tuple(transition.new_shape.positions())
    holders: dict[Piece, list[int]] = {}
    for number in sorted(numbers, key=lambda each: placed.gpus[each]):
        for piece in _pieces(transition, Seat(transition.new_shape, positions[number])):
            holders.setdefault(piece, []).append(placed.gpus[number])
    return holders


def _pieces(transition: Transition, seat: Seat) -> Iterator[Piece]:
    """What a position holds, in pieces as fine as the larger tensor degree."""
    grain = max(transition.old_shape.tensor, transition.new_shape.tensor) // seat.shape.tensor
    run = transition.model.padded_layers // seat.shape.pipeline
    yield "embedding", 0, 0
    for layer in range(seat.position.stage * run, (seat.position.stage + 1) * run):
        yield "replicated", layer, 0
        for shard in range(seat.position.rank * grain, (seat.position.rank + 1) * grain):
            yield "sharded", layer, shard
    if seat.position.stage == seat.shape.pipeline - 1:
        yield "head", 0, 0


def _weight_mbit(transition: Transition, piece: Piece) -> float:
    """Mbit of a piece's weights."""
    model = transition.model
    grain = max(transition.old_shape.tensor, transition.new_shape.tensor)
    floats = {
        "embedding": embedding_floats(model),
        "replicated": replicated_floats(model),
        "sharded": sharded_floats(model) / grain,
        "head": head_floats(model),
    }
    return FLOAT_MBIT * floats[piece[0]]


def _kv_mbit(transition: Transition, piece: Piece, replica: int) -> float:
    """Mbit of a piece's KV as the artifact counts it: neither divided by the tensor degree nor doubled for K and V."""
    batch, hidden = transition.carried(replica), transition.model.hidden
    if piece[0] == "embedding":
        return FLOAT_MBIT * (batch.tokens + 3 * hidden + 4) * batch.sequences
    return FLOAT_MBIT * batch.sequences * batch.tokens * hidden if piece[0] == "sharded" else 0.0


def _needed_bytes(transition: Transition, position: Position) -> int:
    shape = transition.new_shape
    is_last = position.stage == shape.pipeline - 1
    return weight_bytes(transition.model, pipeline=shape.pipeline, tensor=shape.tensor, is_last=is_last)


def _by_instance(gpus: Sequence[int], instance_of: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    """GPUs grouped by instance, in address order."""
    groups: dict[int, list[int]] = {}
    for gpu in gpus:
        groups.setdefault(instance_of[gpu], []).append(gpu)
    return tuple(tuple(group) for group in groups.values())
