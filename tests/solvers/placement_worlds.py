"""Placement problems that tests build from shapes or piece by piece."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from math import lcm

import numpy as np

from spotserve.core.ids import GpuId
from spotserve.core.slices import split_evenly
from spotserve.solvers.place import Contents, PlacementProblem

Shape = tuple[int, int, int]


def gpu_ids(instances: Sequence[int]) -> tuple[GpuId, ...]:
    """`i<instance>/<index>` for the instance number of each GPU, in order."""
    counts = dict.fromkeys(instances, 0)
    names = []
    for instance in instances:
        names.append(GpuId(f"i{instance}/{counts[instance]}"))
        counts[instance] += 1
    return tuple(names)


def reshaped(
    old: Shape,
    new: Shape,
    *,
    layers: int,
    positions: Sequence[int | None],
    instances: Sequence[int] | None = None,
    granule_bytes: int = 1,
    kv_tokens: Sequence[int] | None = None,
    heirs: Sequence[int] | None = None,
    num_senders: int = 0,
) -> PlacementProblem:
    """GPUs at old positions (row-major; None: blank) go to a new shape; one granule is 1/lcm(M', M) of a layer.

    `kv_tokens` are bytes of KV per granule of each old replica, `heirs` who inherits them (default: the same number).
    The last `num_senders` GPUs are doomed.
    """
    unit = lcm(old[2], new[2])
    where = instances if instances is not None else range(len(positions))
    gpus = gpu_ids(list(where))
    seats = old[1] * old[2]
    held = np.array([_granules(old, None if at is None else at % seats, layers, unit) for at in positions])
    needed = np.array([_granules(new, seat, layers, unit) for seat in range(new[1] * new[2])])
    tokens = np.array(kv_tokens if kv_tokens is not None else [0] * old[0], np.int64)
    heir = [number if number < new[0] else -1 for number in range(old[0])] if heirs is None else list(heirs)
    placed = len(gpus) - num_senders
    keeps = old[1:] == new[1:]
    home = [
        heir[at // seats] * seats + at % seats if at is not None and keeps and heir[at // seats] >= 0 else None
        for at in positions[:placed]
    ]
    return PlacementProblem(
        gpus=gpus[:placed],
        senders=gpus[placed:],
        data=new[0],
        pipeline=new[1],
        tensor=new[2],
        contents=Contents(
            weight_bytes=np.full(layers * unit, granule_bytes, np.int64),
            weight_held=held,
            weight_needed=needed,
            kv_token_bytes=np.ones(layers * unit, np.int64),
            kv_held=held,
            kv_needed=needed,
            old_replica=np.array([-1 if at is None else at // seats for at in positions], np.int64),
            kv_tokens=tokens,
            heir=np.array(heir, np.int64),
        ),
        home=tuple(home),
        fits=np.ones((placed, new[1] * new[2]), np.bool_),
    )


def _granules(shape: Shape, seat: int | None, layers: int, unit: int) -> np.ndarray:
    """The granules (layer-major) of a seat of a shape."""
    owned = np.zeros((layers, unit), np.bool_)
    if seat is not None:
        stage, rank = divmod(seat, shape[2])
        first, last = split_evenly(layers, shape[1])[stage]
        width = unit // shape[2]
        owned[first:last, rank * width : (rank + 1) * width] = True
    return owned.ravel()


def scattered(draw: random.Random, *, num_gpus: int, per_instance: int, layers: int = 8) -> PlacementProblem:
    """A random reconfiguration: tensor groups wherever history put them, some instances doomed, some blank."""
    shapes = [
        (data, pipeline, tensor)
        for tensor in (1, 2, 4, 8)
        if tensor <= per_instance
        for pipeline in (1, 2, 3, 4, 8)
        if pipeline <= layers
        for data in [num_gpus // (pipeline * tensor)]
        if data
    ]
    old = draw.choice(shapes)
    num_instances = num_gpus // per_instance
    slots = list(range(old[0] * old[1]))
    draw.shuffle(slots)
    at: list[int | None] = [None] * num_gpus
    for slot, group in enumerate(slots):
        for rank in range(old[2]):
            at[slot * old[2] + rank] = group * old[2] + rank
    order = list(range(num_instances))
    draw.shuffle(order)
    num_doomed = max(1, num_instances // 5) if num_instances > 1 else 0
    staying = sorted(order[num_doomed:])
    num_blank = draw.choice([0, 0, 1])
    left = (len(staying) + num_blank) * per_instance
    new = draw.choice([shape for shape in shapes if shape[0] * shape[1] * shape[2] <= left] or [(1, 1, 1)])
    instances = [*staying, *range(num_instances, num_instances + num_blank), *sorted(order[:num_doomed])]
    gpus = [(instance, index) for instance in instances for index in range(per_instance)]
    return reshaped(
        old,
        new,
        layers=layers,
        positions=[
            at[instance * per_instance + index] if instance < num_instances else None for instance, index in gpus
        ],
        instances=[instance for instance, _ in gpus],
        granule_bytes=draw.choice([1, 8, 1_000_000]),
        kv_tokens=[draw.randrange(0, 6) * draw.choice([1, 1000]) for _ in range(old[0])],
        num_senders=num_doomed * per_instance,
    )


def piecewise(draw: random.Random, *, instances: Sequence[int], positions: int, pieces: int = 6) -> PlacementProblem:
    """One replica whose positions need, and whose GPUs hold, any pieces of any size."""
    gpus = gpu_ids(list(instances))
    held = np.array([[draw.random() < 0.35 for _ in range(pieces)] for _ in gpus], np.bool_)
    needed = np.array([[draw.random() < 0.5 for _ in range(pieces)] for _ in range(positions)], np.bool_)
    nothing = np.zeros((len(gpus), 0), np.bool_)
    return PlacementProblem(
        gpus=gpus,
        senders=(),
        data=1,
        pipeline=positions,
        tensor=1,
        contents=Contents(
            weight_bytes=np.array([draw.randrange(1, 9) for _ in range(pieces)], np.int64),
            weight_held=held,
            weight_needed=needed,
            kv_token_bytes=np.zeros(0, np.int64),
            kv_held=nothing,
            kv_needed=np.zeros((positions, 0), np.bool_),
            old_replica=np.full(len(gpus), -1, np.int64),
            kv_tokens=np.zeros(0, np.int64),
            heir=np.zeros(0, np.int64),
        ),
        home=(None,) * len(gpus),
        fits=np.ones((len(gpus), positions), np.bool_),
    )


def makespan_of(problem: PlacementProblem, gpus: Sequence[GpuId]) -> int:
    """Bytes of the busiest port, counted by the definition: all in-ports and every Hall set of holders."""
    contents = problem.contents
    everyone = [*problem.gpus, *problem.senders]
    instance = [gpu.split("/")[0] for gpu in everyone]
    seats = problem.pipeline * problem.tensor
    fetched: dict[tuple[str, object], tuple[int, frozenset[str]]] = {}
    for position, gpu in enumerate(gpus):
        replica, seat = divmod(position, seats)
        here = gpu.split("/")[0]
        for piece in np.flatnonzero(contents.weight_needed[seat]):
            holders = frozenset(instance[row] for row in np.flatnonzero(contents.weight_held[:, piece]))
            if here not in holders:
                fetched[here, int(piece)] = int(contents.weight_bytes[piece]), holders
        for old in np.flatnonzero(contents.heir == replica):
            for piece in np.flatnonzero(contents.kv_needed[seat]):
                rows = np.flatnonzero(contents.kv_held[:, piece] & (contents.old_replica == old))
                holders = frozenset(instance[row] for row in rows)
                if holders and here not in holders:
                    size = int(contents.kv_token_bytes[piece] * contents.kv_tokens[old])
                    # Every GPU gets its KV from a holder itself.
                    fetched[here, (position, int(old), int(piece))] = size, holders
    received: dict[str, int] = {}
    for (here, _), (size, _) in fetched.items():
        received[here] = received.get(here, 0) + size
    sent: dict[frozenset[str], int] = {}
    for size, holders in fetched.values():
        if holders:
            sent[holders] = sent.get(holders, 0) + size
    hall = 0
    ports = sorted({port for holders in sent for port in holders})
    for count in range(1, len(ports) + 1):
        for chosen in itertools.combinations(ports, count):
            total = sum(size for holders, size in sent.items() if holders <= set(chosen))
            hall = max(hall, -(-total // count))
    return max([hall, *received.values()])
