"""Attention over the paged KV cache, as one function that transformers' layers call.

In deterministic mode the bits of a row are a function of its tokens and position alone (contracts section 7 (b)):
queries sit in 16-row tiles aligned to absolute positions, absent rows are zero, and the keys of a tile are exactly the
16 * (position // 16 + 1) tokens up to the tile's end. Tiles of equal length share a call; a batch's longest sequence
never pads another. Measured here: the bits of a tile do not depend on batch, number of heads, or strides.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from spotserve.core.batching import SequenceKey
from spotserve.core.spec import KV_BLOCK_TOKENS
from spotserve.runtime.kv_store import KvStore, slots_of

ATTENTION_NAME = "spotserve_paged"
TILE = KV_BLOCK_TOKENS
"""Rows of a query tile; equal to a KV block, so a tile's keys are whole blocks."""


@dataclass(frozen=True, slots=True)
class Span:
    """`count` rows of one sequence: its tokens [start, start + count)."""

    key: SequenceKey
    start: int
    count: int

    @property
    def stop(self) -> int:
        """One past the last position."""
        return self.start + self.count


@dataclass(slots=True)
class TileGroup:
    """Tiles [first, first + count) of `num_blocks` KV blocks each; their gathered blocks begin at `offset`."""

    first: int
    count: int
    num_blocks: int
    offset: int


@dataclass(slots=True)
class PagedBatch:
    """What the attention of every layer needs to know of a forward; built once per forward."""

    kv: KvStore
    rows: int
    slots: Tensor
    tile_rows: Tensor
    num_tiles: int
    blocks: Tensor
    groups: list[TileGroup]
    mask: Tensor
    head_map: HeadMap


@dataclass(frozen=True, slots=True)
class HeadMap:
    """Which local kv head each local q head reads: in even groups of `group`, else by `index`."""

    group: int
    index: Tensor | None


def head_map(*, q_heads: tuple[int, int], kv_heads: tuple[int, int], group: int, device: str = "cpu") -> HeadMap:
    """The map of a rank that owns global heads `q_heads` and stores their cover `kv_heads`."""
    local = [head // group - kv_heads[0] for head in range(*q_heads)]
    counts = {local.count(head) for head in local}
    if len(counts) == 1:
        return HeadMap(group=counts.pop(), index=None)
    return HeadMap(group=1, index=torch.tensor(local, device=device))


class MaskCache:
    """The causal mask of a tile against its keys, for every length, as views of one tensor."""

    def __init__(self, dtype: torch.dtype, device: str = "cpu") -> None:
        self._dtype = dtype
        self._device = device
        self._mask = torch.empty(0)

    def of(self, num_blocks: int) -> Tensor:
        """A mask [TILE, at least num_blocks * TILE] whose last columns are a tile's own tokens."""
        length = num_blocks * TILE
        if self._mask.numel() < TILE * length:
            allowed = torch.ones(TILE, 2 * length, dtype=torch.bool).tril(2 * length - TILE)
            mask = torch.zeros(TILE, 2 * length, dtype=self._dtype).masked_fill_(~allowed, float("-inf"))
            self._mask = mask.to(self._device)
        return self._mask


def plan_tiles(spans: Sequence[Span], kv: KvStore, masks: MaskCache, heads: HeadMap, device: str = "cpu") -> PagedBatch:
    """Lay out the tiles of a batch: sequences in one tile by length, then those in several, one after another."""
    tables = [kv.table(span.key) for span in spans]
    first_tile = [0] * len(spans)
    groups: list[TileGroup] = []
    blocks: list[int] = []
    num_tiles = 0
    tiles = [(span.start // TILE, (span.stop - 1) // TILE) for span in spans]
    single = [index for index, (low, high) in enumerate(tiles) if low == high]
    for index in sorted(single, key=lambda each: (tiles[each][1], each)):
        num_blocks = tiles[index][1] + 1
        if groups and groups[-1].num_blocks == num_blocks:
            groups[-1].count += 1
        else:
            groups.append(TileGroup(num_tiles, 1, num_blocks, len(blocks)))
        first_tile[index] = num_tiles
        blocks += tables[index][:num_blocks]
        num_tiles += 1
    for index, (low, high) in enumerate(tiles):
        if low != high:
            # Tiles of one sequence are calls of their own over one gathered prefix.
            first_tile[index] = num_tiles
            groups += [TileGroup(num_tiles + tile - low, 1, tile + 1, len(blocks)) for tile in range(low, high + 1)]
            blocks += tables[index][: high + 1]
            num_tiles += high - low + 1
    slots: list[int] = []
    tile_rows: list[int] = []
    for index, span in enumerate(spans):
        slots += slots_of(tables[index], span.start, span.stop)
        offset = first_tile[index] * TILE + span.start % TILE
        tile_rows += range(offset, offset + span.count)
    return PagedBatch(
        kv=kv,
        rows=len(slots),
        slots=torch.tensor(slots, device=device),
        tile_rows=torch.tensor(tile_rows, device=device),
        num_tiles=num_tiles,
        blocks=torch.tensor(blocks, device=device),
        groups=groups,
        mask=masks.of(max(group.num_blocks for group in groups)),
        head_map=heads,
    )


def paged_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    paged_batch: PagedBatch,
    **_: Any,
) -> tuple[Tensor, None]:
    """Write the keys and values [1, heads, rows, head_dim] of the batch, attend, and return [1, rows, heads, head_dim].

    Rows beyond the batch's are padding: they are not written and come back as zero.
    """
    batch = paged_batch
    layer: int = module.layer_idx  # type: ignore[assignment]
    keys, values = batch.kv.keys(layer), batch.kv.values(layer)
    num_heads, head_dim = query.shape[1], query.shape[3]
    _slots(keys).index_copy_(1, batch.slots, key[0, :, : batch.rows])
    _slots(values).index_copy_(1, batch.slots, value[0, :, : batch.rows])
    tiles = query.new_zeros(num_heads, batch.num_tiles * TILE, head_dim)
    tiles.index_copy_(1, batch.tile_rows, query[0, :, : batch.rows])
    attended = _attend_tiles(
        tiles, keys.index_select(1, batch.blocks), values.index_select(1, batch.blocks), batch, scaling
    )
    output = query.new_zeros(1, query.shape[2], num_heads, head_dim)
    output[0, : batch.rows] = attended.index_select(1, batch.tile_rows).transpose(0, 1)
    return output, None


def _slots(pool: Tensor) -> Tensor:
    """A pool [heads, blocks, tokens, head_dim] with its slots in one dimension."""
    return pool.view(pool.shape[0], -1, pool.shape[3])


def _attend_tiles(tiles: Tensor, keys: Tensor, values: Tensor, batch: PagedBatch, scaling: float) -> Tensor:
    """Tiles [heads, tiles * TILE, head_dim] over gathered blocks [kv heads, blocks, TILE, head_dim]."""
    if batch.head_map.index is not None:
        keys = keys.index_select(0, batch.head_map.index)
        values = values.index_select(0, batch.head_map.index)
    result = torch.empty_like(tiles)
    for group in batch.groups:
        _attend_group(result, tiles, keys, values, group, batch, scaling)
    return result


def _attend_group(
    result: Tensor, tiles: Tensor, keys: Tensor, values: Tensor, group: TileGroup, batch: PagedBatch, scaling: float
) -> None:
    """One call for tiles of equal length, written to their rows of `result`."""
    kv_heads, head_dim = keys.shape[0], keys.shape[3]
    per_kv = batch.head_map.group
    rows = slice(group.first * TILE, (group.first + group.count) * TILE)
    taken = slice(group.offset, group.offset + group.count * group.num_blocks)
    length = group.num_blocks * TILE
    # [kv heads, q heads each, tiles, TILE, head_dim] -> one batch entry per (kv head, tile).
    query = tiles[:, rows].view(kv_heads, per_kv, group.count, TILE, head_dim).transpose(1, 2)
    query = query.reshape(kv_heads * group.count, per_kv, TILE, head_dim)
    shape = (kv_heads * group.count, 1, length, head_dim)
    expanded = (kv_heads * group.count, per_kv, length, head_dim)
    output = F.scaled_dot_product_attention(
        query,
        keys[:, taken].reshape(shape).expand(expanded),
        values[:, taken].reshape(shape).expand(expanded),
        attn_mask=batch.mask[:, batch.mask.shape[1] - length :],
        scale=scaling,
    )
    output = output.view(kv_heads, group.count, per_kv, TILE, head_dim).transpose(1, 2)
    result[:, rows] = output.reshape(kv_heads * per_kv, group.count * TILE, head_dim)
