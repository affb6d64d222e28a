"""Mixed layout: GPUs for replicas of different shapes on a fleet of several GPU types.

Each stage says which type it runs on, so the positions of each type are a maximum-weight assignment of their own: most
bytes of weights and inherited KV already in place, then fewest GPUs moved from where they sit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import numpy as np

from spotserve.core.cost import PipelineShape
from spotserve.core.ids import GpuId, ReplicaId
from spotserve.core.slices import Shard, kv_token_bytes
from spotserve.core.snapshot import Replica
from spotserve.solvers.draft import new_replicas
from spotserve.solvers.facts import Facts
from spotserve.solvers.place.assignment import assign
from spotserve.solvers.place.inner import ranked_weights, settled
from spotserve.solvers.place.problem import Flags, Integers
from spotserve.solvers.ranges import cut, shard_at
from spotserve.solvers.result import Result


@dataclass(frozen=True, slots=True)
class Seat:
    """One position: of which new replica (by number) and of which GPU type it is, and its index in mesh rank order."""

    replica: int
    index: int
    type: str
    shard: Shard


def layer_runs(shape: PipelineShape) -> tuple[tuple[int, int], ...]:
    """The half-open run of layers of each stage."""
    ends = accumulate((stage.layers for stage in shape.stages), initial=0)
    return tuple(pairwise(ends))


def seats_of(facts: Facts, shapes: Sequence[PipelineShape]) -> tuple[Seat, ...]:
    """Every position of the new replicas, replica by replica in mesh rank order."""
    last = facts.model.num_layers
    return tuple(
        Seat(
            replica=number,
            index=stage * shape.tensor + rank,
            type=shape.stages[stage].device,
            shard=Shard(layers=run, tensor=shape.tensor, rank=rank, first=run[0] == 0, last=run[1] == last),
        )
        for number, shape in enumerate(shapes)
        for stage, run in enumerate(layer_runs(shape))
        for rank in range(shape.tensor)
    )


def place_by_type(
    facts: Facts,
    shapes: Sequence[PipelineShape],
    *,
    gpus: Sequence[GpuId],
    heirs: Mapping[ReplicaId, int],
) -> Result[tuple[Replica, ...]]:
    """The new replicas on `gpus`, of which there are enough of each type. Objective and bound are reused bytes."""
    seats = seats_of(facts, shapes)
    taken: dict[int, GpuId] = {}
    reused = stayed = 0
    for name in sorted({seat.type for seat in seats}):
        mine = [number for number, seat in enumerate(seats) if seat.type == name]
        offered = [gpu for gpu in gpus if facts.types[gpu] == name]
        bytes_held, home = _what_is_there(facts, offered, [seats[n] for n in mine], shapes, heirs)
        weights = ranked_weights(bytes_held, home=home, room=np.ones_like(home))
        rows = settled(weights, assign(weights).rows)
        for column, (number, row) in enumerate(zip(mine, rows, strict=True)):
            taken[number] = offered[row]
            reused += int(bytes_held[row, column])
            stayed += int(home[row, column])
    replicas = new_replicas(
        facts.problem.epoch_to,
        [layer_runs(shape) for shape in shapes],
        [[taken[n] for n, seat in enumerate(seats) if seat.replica == number] for number in range(len(shapes))],
    )
    certificate: dict[str, str | int | float] = {
        "kind": "assignment_by_type",
        "reused_bytes": reused,
        "stayed": stayed,
        "positions": len(seats),
    }
    return Result(replicas, "optimal", reused, reused, certificate)


def _what_is_there(
    facts: Facts,
    gpus: Sequence[GpuId],
    seats: Sequence[Seat],
    shapes: Sequence[PipelineShape],
    heirs: Mapping[ReplicaId, int],
) -> tuple[Integers, Flags]:
    """[GPU, seat]: bytes of weights and of inherited KV that the GPU has, and whether it sits there already.

    Counted once per shard and not per seat, as equal replicas have equal shards.
    """
    shards = list(dict.fromkeys(seat.shard for seat in seats))
    column = np.array([shards.index(seat.shard) for seat in seats], np.int64)
    overlap = [[facts.catalog.overlap_bytes(facts.holdings.get(gpu), shard) for shard in shards] for gpu in gpus]
    bytes_held = np.array(overlap, np.int64).reshape(len(gpus), len(shards))[:, column]
    home = np.zeros(bytes_held.shape, np.bool_)
    for row, gpu in enumerate(gpus):
        old, index = facts.problem.snapshot.world.positions.get(gpu, (None, 0))
        if old is None or old.id not in heirs or old in facts.view.lost:
            continue
        heir, mine = heirs[old.id], facts.catalog.kv_rectangle(shard_at(facts.model, old, index))
        same = tuple(stage.layers for stage in old.stages) == layer_runs(shapes[heir])
        for number, seat in enumerate(seats):
            if seat.replica != heir:
                continue
            home[row, number] = same and seat.index == index
            shared = cut(facts.catalog.kv_rectangle(seat.shard), mine)
            if shared is not None:
                token_bytes = kv_token_bytes(facts.model, layers=shared[0], heads=shared[1])
                bytes_held[row, number] += facts.progress(old) * token_bytes
    return bytes_held, home
