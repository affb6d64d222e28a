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
from spotserve.core.snapshot import Replica, Stage
from spotserve.errors import SpecError
from spotserve.solvers.configure.mixed import MixChoice, configure_mix
from spotserve.solvers.estimate import workload_of
from spotserve.solvers.facts import Facts
from spotserve.solvers.gpu_kinds import kinds_of, shape_of
from spotserve.solvers.place.assignment import MAX_SCALED_COST, assign
from spotserve.solvers.place.problem import Flags, Integers
from spotserve.solvers.ranges import cut, shard_at
from spotserve.solvers.result import Result
from spotserve.solvers.view import natural_key


@dataclass(frozen=True, slots=True)
class Seat:
    """One position: of which new replica (by number) and of which GPU type it is, and its index in mesh rank order."""

    replica: int
    index: int
    type: str
    shard: Shard


def configure_by_type(facts: Facts) -> MixChoice:
    """The mix for the GPUs that stay. Raises SpecError where the solver asked for knows one GPU type only."""
    solver = facts.solvers["configure"]
    if solver != "cpsat":
        names = ", ".join(sorted({facts.types[gpu] or facts.spec.profile.device for gpu in facts.view.staying}))
        raise SpecError(
            f"configure={solver} knows fleets of the profile's own GPU type only, these are {names}",
            hint="--solver configure=cpsat",
        )
    running = [shape_of(replica, facts.types, facts.spec.profile) for replica in facts.view.intact]
    kinds = kinds_of(facts.view.staying, facts.view.memory, facts.types)
    return configure_mix(facts.spec, kinds, workload_of(facts.problem), running)


def kept_replicas(facts: Facts, shapes: Sequence[PipelineShape]) -> tuple[Replica, ...]:
    """The intact replicas that a mix keeps: of each shape at most as many as it has, those with the most KV first."""
    left = list(shapes)
    kept = []
    for replica in sorted(facts.view.intact, key=lambda r: (-facts.progress(r), natural_key(r.id))):
        shape = shape_of(replica, facts.types, facts.spec.profile)
        if shape in left:
            left.remove(shape)
            kept.append(replica)
    return tuple(sorted(kept, key=lambda r: natural_key(r.id)))


def layer_runs(shape: PipelineShape) -> tuple[tuple[int, int], ...]:
    """The half-open run of layers of each stage."""
    ends = accumulate((stage.layers for stage in shape.stages), initial=0)
    return tuple(pairwise(ends))


def unplaced(shape: PipelineShape, gpus: Sequence[GpuId], *, name: ReplicaId, generation: int) -> Replica:
    """A new replica of a shape on `gpus`, in mesh rank order; its KV pool is sized later."""
    tensor = shape.tensor
    stages = tuple(
        Stage(layers=layers, gpus=tuple(gpus[stage * tensor : (stage + 1) * tensor]))
        for stage, layers in enumerate(layer_runs(shape))
    )
    return Replica(id=name, generation=generation, max_running=1, kv_blocks=0, stages=stages)


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
    types: Mapping[GpuId, str],
    heirs: Mapping[ReplicaId, int],
) -> Result[tuple[Replica, ...]]:
    """The new replicas on `gpus`, of which there are enough of each type. Objective and bound are reused bytes."""
    seats = seats_of(facts, shapes)
    taken: dict[int, GpuId] = {}
    reused = stayed = 0
    for name in sorted({seat.type for seat in seats}):
        mine = [number for number, seat in enumerate(seats) if seat.type == name]
        offered = [gpu for gpu in gpus if types[gpu] == name]
        bytes_held, home = _what_is_there(facts, offered, [seats[n] for n in mine], shapes, heirs)
        rows = _settled(bytes_held, home, list(assign(_weights(bytes_held, home)).rows))
        for column, (number, row) in enumerate(zip(mine, rows, strict=True)):
            taken[number] = offered[row]
            reused += int(bytes_held[row, column])
            stayed += int(home[row, column])
    epoch, count = facts.problem.epoch_to, len(shapes)
    replicas = tuple(
        unplaced(
            shape,
            [taken[n] for n, seat in enumerate(seats) if seat.replica == number],
            name=ReplicaId(f"r{epoch}" if count == 1 else f"r{epoch}.{number + 1}"),
            generation=epoch,
        )
        for number, shape in enumerate(shapes)
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


def _weights(bytes_held: Integers, home: Flags) -> Integers:
    """Reused granules first, then GPUs at home; coarser granules where the solvers could not add exactly."""
    size = max(1, len(bytes_held))
    granule = max(1, int(np.gcd.reduce(bytes_held, axis=None)))
    while (int(bytes_held.max(initial=0)) // granule + 1) * (size + 1) ** 3 * 4 >= MAX_SCALED_COST // 2**9:
        granule *= 2
    weights: Integers = bytes_held // granule * (size + 1) + home
    return weights


def _settled(bytes_held: Integers, home: Flags, rows: list[int]) -> list[int]:
    """The same value with interchangeable GPUs in natural order, so that a tensor group takes neighbours."""
    alike: dict[bytes, list[int]] = {}
    for row in range(len(bytes_held)):
        if not home[row].any():
            alike.setdefault(bytes_held[row].tobytes(), []).append(row)
    settled = list(rows)
    for members in alike.values():
        inside = set(members)
        columns = [column for column, row in enumerate(rows) if row in inside]
        for column, row in zip(columns, members, strict=False):
            settled[column] = row
    return settled
