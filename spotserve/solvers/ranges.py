"""Range arithmetic over the parameter table, cached: what a shard owns, what a GPU holds, what two of them share."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache

from spotserve.core.slices import (
    Shard,
    Slice,
    intersect,
    kv_head_range,
    parameter_of,
    parameter_slices,
    row_bytes,
    shard_bytes,
    shard_ranges,
    subtract,
)
from spotserve.core.snapshot import Holding, Replica
from spotserve.core.spec import ModelSpec

Ranges = dict[str, list[tuple[int, int]]]
"""Disjoint half-open ranges of the split dimension, per concrete parameter."""

Rectangle = tuple[tuple[int, int], tuple[int, int]]
"""Layers x kv heads."""


@dataclass(slots=True)
class Catalog:
    """Cached facts of one model; a planner run makes one and throws it away."""

    model: ModelSpec
    _ranges: dict[Shard, Ranges] = field(default_factory=dict)
    _rows: dict[str, tuple[int, int]] = field(default_factory=dict)
    _bytes: dict[Shard, int] = field(default_factory=dict)
    _slices: dict[tuple[str, int, int], Slice] = field(default_factory=dict)
    _layer_overlap: dict[tuple[int, int, int, int, str], int] = field(default_factory=dict)
    _kv_heads: dict[tuple[int, int], tuple[int, int]] = field(default_factory=dict)

    def owned(self, shard: Shard) -> Ranges:
        """The ranges of a shard."""
        if shard not in self._ranges:
            self._ranges[shard] = {name: list(ranges) for name, _, ranges in shard_ranges(self.model, shard)}
        return self._ranges[shard]

    def shard_bytes(self, shard: Shard) -> int:
        """Weight bytes of a shard."""
        if shard not in self._bytes:
            self._bytes[shard] = shard_bytes(self.model, shard)
        return self._bytes[shard]

    def held(self, holding: Holding) -> Ranges:
        """The ranges a GPU holds, shards and loose slices together."""
        if len(holding.shards) == 1 and not holding.slices:
            return self.owned(holding.shards[0])
        ranges: Ranges = {}
        for shard in holding.shards:
            for name, runs in self.owned(shard).items():
                ranges[name] = join(ranges.get(name, []), runs)
        for piece in holding.slices:
            ranges[piece.parameter] = join(ranges.get(piece.parameter, []), [(piece.start, piece.stop)])
        return ranges

    def held_bytes(self, holding: Holding | None) -> int:
        """Weight bytes that a GPU holds."""
        if holding is None:
            return 0
        if len(holding.shards) == 1 and not holding.slices:
            return self.shard_bytes(holding.shards[0])
        return self.bytes(self.held(holding))

    def row(self, name: str) -> int:
        """Bytes of one index of a parameter's split dimension."""
        return self._row(name)[0]

    def _row(self, name: str) -> tuple[int, int]:
        if name not in self._rows:
            parameter = parameter_of(self.model, name)
            self._rows[name] = (row_bytes(self.model, parameter), parameter.dim)
        return self._rows[name]

    def bytes(self, ranges: Ranges) -> int:
        """Bytes of some ranges."""
        total = 0
        for name, runs in ranges.items():
            row, _ = self._rows.get(name) or self._row(name)
            for start, stop in runs:
                total += (stop - start) * row
        return total

    def slices(self, ranges: Ranges) -> tuple[Slice, ...]:
        """Ranges as slices of a plan, in the order of the mapping."""
        return tuple(self._slice(name, start, stop) for name, runs in ranges.items() for start, stop in runs)

    def _slice(self, name: str, start: int, stop: int) -> Slice:
        key = (name, start, stop)
        if key not in self._slices:
            self._slices[key] = Slice(parameter=name, dim=self._row(name)[1], start=start, stop=stop)
        return self._slices[key]

    def overlap_bytes(self, holding: Holding | None, shard: Shard) -> int:
        """Weight bytes of `shard` that a GPU already holds."""
        if holding is None:
            return 0
        if len(holding.shards) == 1 and not holding.slices:
            return self._shard_overlap(holding.shards[0], shard)
        return self.bytes(common(self.owned(shard), self.held(holding)))

    def _shard_overlap(self, old: Shard, new: Shard) -> int:
        layers = min(old.layers[1], new.layers[1]) - max(old.layers[0], new.layers[0])
        total = max(0, layers) * self._stage_overlap(old, new, "layer")
        if old.first and new.first:
            total += self._stage_overlap(old, new, "first")
        if old.last and new.last:
            total += self._stage_overlap(old, new, "last")
        return total

    def _stage_overlap(self, old: Shard, new: Shard, stage: str) -> int:
        key = (old.tensor, old.rank, new.tensor, new.rank, stage)
        if key not in self._layer_overlap:
            self._layer_overlap[key] = sum(
                row_bytes(self.model, parameter) * (stop - start)
                for parameter in self.model.parameters
                if parameter.stage == stage
                for start, stop in intersect(
                    parameter_slices(self.model, parameter, tensor=new.tensor, rank=new.rank),
                    parameter_slices(self.model, parameter, tensor=old.tensor, rank=old.rank),
                )
            )
        return self._layer_overlap[key]

    def kv_rectangle(self, shard: Shard) -> Rectangle:
        """Layers x kv heads that a position stores."""
        key = shard.tensor, shard.rank
        if key not in self._kv_heads:
            self._kv_heads[key] = kv_head_range(self.model, tensor=shard.tensor, rank=shard.rank)
        return shard.layers, self._kv_heads[key]


def shard_at(model: ModelSpec, replica: Replica, index: int) -> Shard:
    """The shard of the `index`-th GPU of a replica in mesh rank order."""
    stage, rank = divmod(index, replica.tensor)
    return _shard(replica.stages[stage].layers, replica.tensor, rank, model.num_layers)


@lru_cache(maxsize=65536)
def _shard(layers: tuple[int, int], tensor: int, rank: int, num_layers: int) -> Shard:
    return Shard(layers=layers, tensor=tensor, rank=rank, first=layers[0] == 0, last=layers[1] == num_layers)


def join(left: list[tuple[int, int]], right: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """The union of two lists of disjoint ranges, sorted, touching ranges joined."""
    merged: list[tuple[int, int]] = []
    for start, stop in sorted([*left, *right]):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], stop))
        else:
            merged.append((start, stop))
    return merged


def common(wanted: Ranges, held: Ranges) -> Ranges:
    """What of `wanted` is in `held`."""
    return {name: runs for name in wanted if (runs := intersect(wanted[name], held.get(name, [])))}


def without(wanted: Ranges, held: Ranges) -> Ranges:
    """What of `wanted` is not in `held`."""
    return {name: runs for name in wanted if (runs := subtract(wanted[name], held.get(name, [])))}


def cut(left: Rectangle, right: Rectangle) -> Rectangle | None:
    """The common part of two rectangles, None if empty."""
    layers = max(left[0][0], right[0][0]), min(left[0][1], right[0][1])
    heads = max(left[1][0], right[1][0]), min(left[1][1], right[1][1])
    return (layers, heads) if layers[0] < layers[1] and heads[0] < heads[1] else None
