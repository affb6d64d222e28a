"""The pieces of a placement problem, from the parameter table and what the GPUs hold.

Layers are cut wherever a shard ends, and the parameters of a layer wherever a rank's range ends; ranges that the same
ranks own are one piece. So overlaps factorise into layers x ranks, and replicated or unevenly dealt parameters are
exact.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from spotserve.core.ids import GpuId
from spotserve.core.slices import (
    Shard,
    Slice,
    kv_head_range,
    kv_token_bytes,
    parameter_of,
    parameter_slices,
    row_bytes,
)
from spotserve.core.snapshot import Holding, Replica
from spotserve.core.spec import ModelSpec, Parameter
from spotserve.solvers.place.problem import Contents, Flags, Integers

Runs = tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True, order=True)
class Rank:
    """A rank of a tensor degree."""

    tensor: int
    rank: int


Pattern = Rank | tuple[tuple[str, Runs], ...]
"""What a GPU holds of one layer: a rank's ranges, or loose ranges by parameter."""

STAGES = ("layer", "first", "last")


@dataclass(frozen=True, slots=True)
class Part:
    """What a GPU holds of a run of layers; `first` and `last` for embedding and head."""

    layers: tuple[int, int]
    pattern: Pattern
    first: bool = False
    last: bool = False


@dataclass(frozen=True, slots=True)
class Carried:
    """An old replica whose KV counts: its tokens in place, and the number of the new replica that inherits them."""

    replica: Replica
    tokens: int
    heir: int


def gather_contents(
    model: ModelSpec,
    *,
    gpus: Sequence[GpuId],
    shards: Sequence[Shard],
    holdings: Mapping[GpuId, Holding],
    carried: Sequence[Carried],
) -> Contents:
    """Pieces, holders and needs. `shards` are the positions of one new replica; `gpus` all that hold or are placed."""
    needed = [[_part(shard)] for shard in shards]
    held = [_parts(model, holdings.get(gpu)) for gpu in gpus]
    seat_of = {gpu: (number, index) for number, old in enumerate(carried) for index, gpu in enumerate(old.replica.gpus)}
    cuts = sorted(
        {end for parts in itertools.chain(needed, held) for part in parts for end in part.layers}
        | {end for old in carried for stage in old.replica.stages for end in stage.layers}
    )
    weights = _Weights(model, cuts, {part.pattern: None for parts in itertools.chain(needed, held) for part in parts})
    kv = _Kv(model, cuts, {Rank(shard.tensor, shard.rank) for shard in shards} | _old_ranks(carried))
    old_replica = np.array([seat_of[gpu][0] if gpu in seat_of else -1 for gpu in gpus], np.int64)
    return Contents(
        weight_bytes=weights.num_bytes,
        weight_held=weights.rows(held),
        weight_needed=weights.rows(needed),
        kv_token_bytes=kv.num_bytes,
        kv_held=kv.rows([_kv_place(carried, *seat_of[gpu]) if gpu in seat_of else None for gpu in gpus]),
        kv_needed=kv.rows([(shard.layers, Rank(shard.tensor, shard.rank)) for shard in shards]),
        old_replica=old_replica,
        kv_tokens=np.array([old.tokens for old in carried], np.int64),
        heir=np.array([old.heir for old in carried], np.int64),
    )


def _part(shard: Shard) -> Part:
    return Part(shard.layers, Rank(shard.tensor, shard.rank), shard.first, shard.last)


def _parts(model: ModelSpec, holding: Holding | None) -> list[Part]:
    """What a GPU holds, loose slices of an aborted plan layer by layer."""
    if holding is None:
        return []
    return [_part(shard) for shard in holding.shards] + _loose_parts(model, holding.slices)


def _loose_parts(model: ModelSpec, slices: Iterable[Slice]) -> list[Part]:
    by_layer: dict[int | None, dict[str, list[tuple[int, int]]]] = {}
    for piece in slices:
        number = next((int(part) for part in piece.parameter.split(".") if part.isdigit()), None)
        name = parameter_of(model, piece.parameter).name
        by_layer.setdefault(number, {}).setdefault(name, []).append((piece.start, piece.stop))
    parts = []
    for number, ranges in by_layer.items():
        pattern = tuple((name, tuple(sorted(runs))) for name, runs in sorted(ranges.items()))
        layers = (0, 0) if number is None else (number, number + 1)
        parts.append(Part(layers, pattern, first=number is None, last=number is None))
    return parts


def _old_ranks(carried: Sequence[Carried]) -> set[Rank]:
    return {Rank(old.replica.tensor, rank) for old in carried for rank in range(old.replica.tensor)}


def _kv_place(carried: Sequence[Carried], number: int, index: int) -> tuple[tuple[int, int], Rank]:
    """(layers, rank) of the `index`-th GPU of an old replica."""
    replica = carried[number].replica
    stage, rank = divmod(index, replica.tensor)
    return replica.stages[stage].layers, Rank(replica.tensor, rank)


class _Weights:
    """Weight pieces: for each run of layers each elementary range of a layer, then those of embedding and head."""

    def __init__(self, model: ModelSpec, cuts: list[int], patterns: Mapping[Pattern, None]) -> None:
        self._cuts = cuts
        self._columns = {pattern: number for number, pattern in enumerate(patterns)}
        self._has: dict[str, Flags] = {}
        sizes: dict[str, Integers] = {}
        for stage in STAGES:
            self._has[stage], sizes[stage] = _elementary(model, stage, list(patterns))
        lengths = np.diff(np.array(cuts, np.int64))
        self._num_atoms = len(sizes["layer"])
        self._first = len(lengths) * self._num_atoms
        self._last = self._first + len(sizes["first"])
        self.num_bytes = np.concatenate((np.outer(lengths, sizes["layer"]).ravel(), sizes["first"], sizes["last"]))

    def rows(self, owners: Sequence[Sequence[Part]]) -> Flags:
        """Which pieces each owner has: [owner, piece]."""
        rows = np.zeros((len(owners), len(self.num_bytes)), np.bool_)
        number = {layer: index for index, layer in enumerate(self._cuts)}
        for row, parts in zip(rows, owners, strict=True):
            grid = row[: self._first].reshape(-1, self._num_atoms)
            for part in parts:
                column = self._columns[part.pattern]
                grid[number[part.layers[0]] : number[part.layers[1]]] |= self._has["layer"][column]
                if part.first:
                    row[self._first : self._last] |= self._has["first"][column]
                if part.last:
                    row[self._last :] |= self._has["last"][column]
        return rows


def _elementary(model: ModelSpec, stage: str, patterns: Sequence[Pattern]) -> tuple[Flags, Integers]:
    """(which pattern has which elementary piece, bytes of each) of one stage's parameters."""
    sizes: dict[bytes, int] = {}
    for parameter in model.parameters:
        if parameter.stage != stage:
            continue
        runs = [_runs(model, parameter, pattern) for pattern in patterns]
        ends = sorted({end for each in runs for run in each for end in run})
        for low, high in itertools.pairwise(ends):
            owners = np.array([any(start <= low and high <= stop for start, stop in each) for each in runs], np.bool_)
            if owners.any():
                signature = owners.tobytes()
                sizes[signature] = sizes.get(signature, 0) + row_bytes(model, parameter) * (high - low)
    signatures = [np.frombuffer(signature, np.bool_) for signature in sizes]
    has = np.array(signatures, np.bool_).reshape(len(signatures), len(patterns)).T
    return has, np.array(list(sizes.values()), np.int64)


def _runs(model: ModelSpec, parameter: Parameter, pattern: Pattern) -> Runs:
    """The ranges of a parameter that a pattern has."""
    if isinstance(pattern, Rank):
        return parameter_slices(model, parameter, tensor=pattern.tensor, rank=pattern.rank)
    return next((runs for name, runs in pattern if name == parameter.name), ())


class _Kv:
    """KV pieces of one token: for each run of layers each elementary run of kv heads."""

    def __init__(self, model: ModelSpec, cuts: list[int], ranks: set[Rank]) -> None:
        self._cuts = {layer: index for index, layer in enumerate(cuts)}
        self._heads = {each: kv_head_range(model, tensor=each.tensor, rank=each.rank) for each in sorted(ranks)}
        self._ends = sorted({end for heads in self._heads.values() for end in heads})
        self._num_runs = max(0, len(cuts) - 1)
        self.num_bytes = np.array(
            [
                kv_token_bytes(model, layers=layers, heads=heads)
                for layers in itertools.pairwise(cuts)
                for heads in itertools.pairwise(self._ends)
            ],
            np.int64,
        )

    def rows(self, owners: Sequence[tuple[tuple[int, int], Rank] | None]) -> Flags:
        """Which pieces each owner has: [owner, piece]."""
        rows = np.zeros((len(owners), len(self.num_bytes)), np.bool_)
        for row, owner in zip(rows, owners, strict=True):
            if owner is not None:
                (first, last), rank = owner
                low, high = (self._ends.index(end) for end in self._heads[rank])
                row.reshape(self._num_runs, -1)[self._cuts[first] : self._cuts[last], low:high] = True
        return rows
