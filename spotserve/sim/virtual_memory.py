"""The memory of a GPU in virtual time: weights by range, KV pools by position, and a budget that is held to.

Kept as a worker keeps it: what any position or left-over piece covers stays, a pool of the same rectangle and size is
taken over by the next generation, and what does not fit is refused. So a planner that counts wrong fails here.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from spotserve.core.cells import NOTHING, Cells, common, join, merged, without
from spotserve.core.ids import GpuId
from spotserve.core.slices import (
    Shard,
    Slice,
    kv_block_bytes,
    kv_head_range,
    parameter_of,
    row_bytes,
    shard_ranges,
    stage_shard,
)
from spotserve.core.snapshot import Replica
from spotserve.core.spec import ServingSpec
from spotserve.sim.streams import Owner


class WeightTable:
    """Ranges of a model's parameters, and how large they are."""

    def __init__(self, spec: ServingSpec) -> None:
        self.spec = spec
        self._owned: dict[Shard, Cells] = {}
        self._rows: dict[str, int] = {}

    def owned(self, shard: Shard) -> Cells:
        """What a position needs."""
        if shard not in self._owned:
            named = shard_ranges(self.spec.model, shard)
            self._owned[shard] = {(name, parameter.dim): list(runs) for name, parameter, runs in named}
        return self._owned[shard]

    def bytes(self, cells: Cells) -> int:
        """Bytes of some ranges, what overlaps counted once."""
        total = 0
        for (name, _), runs in cells.items():
            if name not in self._rows:
                self._rows[name] = row_bytes(self.spec.model, parameter_of(self.spec.model, name))
            total += self._rows[name] * sum(stop - start for start, stop in merged(runs))
        return total

    def block_bytes(self, shard: Shard) -> int:
        """Bytes of one KV block of a position."""
        return kv_block_bytes(self.spec.model, shard, block_tokens=self.spec.limits.kv_block_tokens)

    def shard_of(self, replica: Replica, gpu: GpuId) -> Shard:
        """The position of a GPU in a replica."""
        stage, rank = divmod(replica.gpus.index(gpu), replica.tensor)
        return stage_shard(self.spec.model, layers=replica.stages[stage].layers, tensor=replica.tensor, rank=rank)


@dataclass(slots=True)
class VirtualPool:
    """A KV pool; generations of the same rectangle and size share one."""

    num_blocks: int


@dataclass(slots=True)
class VirtualPosition:
    """What a generation has on a GPU."""

    shard: Shard
    pool: VirtualPool
    holds: Cells
    is_eager: bool
    """Its weights have their room before they come."""
    is_whole: bool = True
    """Nothing of it has been given up."""


@dataclass(slots=True)
class VirtualGpu:
    """One GPU of a worker."""

    table: WeightTable
    memory_bytes: int
    positions: dict[Owner, VirtualPosition] = field(default_factory=dict)
    loose: Cells = field(default_factory=dict)
    """Weights that belong to no position any more; the next plan may use them."""
    content: Cells = field(default_factory=dict)
    """What is written, whoever holds it."""
    was_short: bool = False
    """Whether left-over weights went for want of room since somebody was last told of them."""

    def reserve(self, owner: Owner, shard: Shard, kv_blocks: int, *, is_eager: bool, taken_bytes: int = 0) -> bool:
        """Take a position's memory; False if it exceeds what there is, less `taken_bytes` that somebody else has."""
        if owner in self.positions:
            return True
        pool = self._pool_to_take_over(shard, kv_blocks)
        more = 0 if pool is not None else kv_blocks * self.table.block_bytes(shard)
        holds = self.table.owned(shard)
        if not self._fits(holds, more + taken_bytes, is_eager=is_eager):
            return False
        fresh = VirtualPool(kv_blocks) if pool is None else pool
        self.positions[owner] = VirtualPosition(shard, fresh, holds, is_eager)
        return True

    def expect(self, slices: Iterable[Slice]) -> bool:
        """Whether weights have room when they come."""
        return self.used_bytes(cells_of(slices)) <= self.memory_bytes

    def write(self, slices: Iterable[Slice]) -> None:
        """Weights have come."""
        self.content = _union(self.content, cells_of(slices))

    def has(self, slices: Iterable[Slice]) -> bool:
        """Whether all of these ranges are written here."""
        return not without(cells_of(slices), self.content)

    def lacks(self, owner: Owner) -> Cells:
        """What a position still needs."""
        return without(self.positions[owner].holds, self.content)

    def release(self, owner: Owner) -> None:
        """A position ends, and what was kept for a plan goes with it: that is decided now."""
        self.positions.pop(owner, None)
        self.drop_loose()

    def give_up(self, owner: Owner, slices: Iterable[Slice], *, keep_blocks: int | None) -> None:
        """Parts of a position that was left go, and its pool but for `keep_blocks` blocks (None: nothing of it)."""
        gone = cells_of(slices)
        position = self.positions.get(owner)
        if position is not None:
            if gone:
                position.holds = without(position.holds, gone)
                position.is_whole = False
            if keep_blocks == 0:  # Not emptied: a newer generation may have taken the pool over.
                position.pool = VirtualPool(0)
            elif keep_blocks is not None:
                position.pool.num_blocks = min(position.pool.num_blocks, keep_blocks)
        self.loose = without(self.loose, gone)
        self._trim()

    def loosen(self, owner: Owner) -> None:
        """A position is no more; its weights stay as left-over pieces."""
        position = self.positions.pop(owner, None)
        if position is not None:
            self.loose = _union(self.loose, common(position.holds, self.content))
            self._trim()

    def drop_loose(self) -> None:
        """Forget what belongs to no position."""
        self.loose = {}
        self._trim()

    def shards(self) -> tuple[Shard, ...]:
        """Whole positions whose weights are all here."""
        whole = [one.shard for owner, one in self.positions.items() if one.is_whole and not self.lacks(owner)]
        return tuple(dict.fromkeys(whole))

    def pieces(self) -> tuple[Slice, ...]:
        """What is here beside them."""
        cells = dict(self.loose)
        for one in self.positions.values():
            if not one.is_whole:
                cells = _union(cells, common(one.holds, self.content))
        return tuple(
            Slice(parameter=name, dim=dim, start=start, stop=stop)
            for (name, dim), runs in cells.items()
            for start, stop in runs
        )

    def used_bytes(self, more: Cells = NOTHING) -> int:
        """What weights and pools take, with some more weights."""
        weights = dict(self.content)
        for position in self.positions.values():
            if position.is_eager:
                join(weights, position.holds)
        join(weights, more)
        pools = {
            id(one.pool): one.pool.num_blocks * self.table.block_bytes(one.shard) for one in self.positions.values()
        }
        return self.table.bytes(weights) + sum(pools.values())

    def _fits(self, holds: Cells, more_bytes: int, *, is_eager: bool) -> bool:
        """Whether a position has room; left-over weights that it does not need make some."""
        weights = holds if is_eager else NOTHING
        if self.used_bytes(weights) + more_bytes > self.memory_bytes and self.loose:
            self.loose = common(self.loose, holds)
            self.was_short = True
            self._trim()
        return self.used_bytes(weights) + more_bytes <= self.memory_bytes

    def _pool_to_take_over(self, shard: Shard, kv_blocks: int) -> VirtualPool | None:
        """A pool of an older generation with the same layers, kv heads and blocks, as the plan counts it."""
        rectangle = self._rectangle(shard)
        for position in self.positions.values():
            if self._rectangle(position.shard) == rectangle and position.pool.num_blocks == kv_blocks:
                return position.pool
        return None

    def _rectangle(self, shard: Shard) -> tuple[tuple[int, int], tuple[int, int]]:
        return shard.layers, kv_head_range(self.table.spec.model, tensor=shard.tensor, rank=shard.rank)

    def _trim(self) -> None:
        """What nobody holds any more is free."""
        held = dict(self.loose)
        for position in self.positions.values():
            join(held, position.holds)
        self.content = common(self.content, held)


def cells_of(slices: Iterable[Slice]) -> Cells:
    """Slices as ranges by parameter."""
    cells: Cells = {}
    for piece in slices:
        join(cells, {(piece.parameter, piece.dim): [(piece.start, piece.stop)]})
    return cells


def _union(left: Cells, right: Cells) -> Cells:
    both = dict(left)
    join(both, right)
    return {cell: merged(runs) for cell, runs in both.items()}
