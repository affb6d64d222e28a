"""Pieces of gigabytes for the tests of migrate: abstract problems as a person writes them down."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable, Mapping, Sequence

from spotserve.core.ids import GpuId, InstanceId, instance_of
from spotserve.core.spec import ModelSpec
from spotserve.solvers.migrate.pieces import Part, Piece, holder_ports
from spotserve.solvers.migrate.ports import FixedCopy, Ports
from spotserve.solvers.migrate.sources import SourceProblem, Transfer
from spotserve.solvers.ranges import Catalog, join
from tests.specs import small_model

GB = 10**9
ROW_BYTES = 10**6
ROWS = 64_000
NAME = "model.layers.{layer}.weight"


def gigabyte_model() -> ModelSpec:
    """Layers of one parameter with rows of a megabyte, 64 GB each: pieces are runs of its rows."""
    model = small_model()
    table = {"name": NAME, "shape": (ROWS, ROW_BYTES // 4), "kind": "replicated", "stage": "layer"}
    return model.model_copy(update={"parameters": (type(model.parameters[0]).model_validate(table),)})


def catalog() -> Catalog:
    """The facts of that model."""
    return Catalog(gigabyte_model())


def piece(destination: str, holders: Sequence[str], size: int, *, layer: int = 0, stage: int = 0) -> Piece:
    """`size` bytes, whole rows, of a layer."""
    gpus = tuple(GpuId(gpu) for gpu in holders)
    assert size % ROW_BYTES == 0
    part = Part(str(layer), {NAME.replace("{layer}", str(layer)): [(0, size // ROW_BYTES)]}, size)
    return Piece(GpuId(destination), stage, gpus, holder_ports(gpus), (part,), size)


def ports(
    *,
    bytes_per_s: int = GB,
    storage: int = GB,
    storage_total: int | None = None,
    rates: Mapping[str, int] | None = None,
) -> Ports:
    """Ports of 1 GB/s unless said otherwise; a second is a billion ticks."""
    named = {InstanceId(name): rate for name, rate in (rates or {}).items()}
    return Ports(bytes_per_s, storage, storage_total, named)


def problem(
    *pieces: Piece, ports_: Ports | None = None, doomed: Sequence[str] = (), fixed: Sequence[FixedCopy] = ()
) -> SourceProblem:
    """Those pieces through such ports."""
    return SourceProblem(tuple(pieces), ports_ or ports(), frozenset(GpuId(gpu) for gpu in doomed), tuple(fixed))


def random_pieces(draw: random.Random, *, num_pieces: int, stages: int = 1) -> list[Piece]:
    """Pieces of 1 to 8 GB for three instances, held by one to three of three others."""
    names = [f"i{index}/0" for index in range(3)]
    return [
        piece(
            f"i{3 + draw.randrange(3)}/0",
            sorted(draw.sample(names, draw.randint(1, 3))),
            draw.randint(1, 8) * GB,
            layer=number,
            stage=draw.randrange(stages),
        )
        for number in range(num_pieces)
    ]


def runs_of(parts: Iterable[tuple[GpuId, Part]]) -> dict[tuple[GpuId, str], list[tuple[int, int]]]:
    """Runs of rows that arrive of each parameter at each GPU, in order; raises AssertionError if one comes twice."""
    runs: dict[tuple[GpuId, str], list[tuple[int, int]]] = {}
    for destination, part in parts:
        for name, ranges in part.ranges.items():
            runs.setdefault((destination, name), []).extend(ranges)
    for key, arriving in runs.items():
        arriving.sort()
        assert all(before[1] <= after[0] for before, after in itertools.pairwise(arriving)), f"{key} comes twice"
        runs[key] = join([], arriving)
    return runs


def delivered(transfers: Iterable[Transfer]) -> dict[tuple[GpuId, str], list[tuple[int, int]]]:
    """Runs that transfers bring."""
    return runs_of((one.destination, part) for one in transfers for part in one.parts)


def wanted(pieces: Iterable[Piece]) -> dict[tuple[GpuId, str], list[tuple[int, int]]]:
    """Runs that pieces ask for."""
    return runs_of((one.destination, part) for one in pieces for part in one.parts)


def port_load(transfers: Sequence[Transfer]) -> int:
    """Bytes through the fullest port, out or in."""
    load: dict[tuple[str, str], int] = {}
    for one in transfers:
        into = instance_of(one.destination)
        keys = [("in", str(into))]
        if one.source is not None:
            if instance_of(one.source) == into:
                continue
            keys.append(("out", str(instance_of(one.source))))
        for key in keys:
            load[key] = load.get(key, 0) + one.bytes
    return max(load.values(), default=0)
