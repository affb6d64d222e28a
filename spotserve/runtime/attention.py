"""Attention over the paged KV cache, as one function that transformers' layers call.

Queries are laid out in tiles: neighbouring rows of one sequence that attend to the same keys, with the q heads of a kv
head folded into the rows, so that keys and values are read once for all of them and never copied per head.

In deterministic mode the bits of a row are a function of its tokens and position alone (contracts section 7 (b)): tiles
have 4 rows aligned to absolute positions and all q heads of their kv head, absent rows and heads are zero, and the keys
of a tile are exactly the 16 * (position // 16 + 1) tokens up to the end of its KV block; a batch's longest sequence
never pads another. Tiles of equal length share a call. Measured here: the bits of a tile do not depend on batch, number
of heads, or strides.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from math import prod

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from spotserve.core.batching import SequenceKey
from spotserve.core.spec import KV_BLOCK_TOKENS
from spotserve.runtime.kv_store import KvStore, slots_of

ATTENTION_NAME = "spotserve_paged"


@dataclass(frozen=True, slots=True)
class Tiling:
    """How sequences are cut into tiles.

    `rows` is the most that a tile has; an aligned tile begins at a multiple of it and is never shorter. Tiles share a
    call while the shortest has at least `least_fill` of the longest one's KV blocks.
    """

    rows: int
    is_aligned: bool
    least_fill: float

    def cut(self, span: Span) -> list[Tile]:
        """The tiles of a span, one after another."""
        if self.is_aligned:
            first, last = span.start // self.rows, (span.stop - 1) // self.rows
            return [Tile(tile * self.rows, self.rows) for tile in range(first, last + 1)]
        starts = range(span.start, span.stop, self.rows)
        return [Tile(start, min(self.rows, span.stop - start)) for start in starts]


ALIGNED_TILES = Tiling(rows=4, is_aligned=True, least_fill=1.0)
"""Deterministic mode. More rows make a decode compute more that is thrown away, fewer make a prefill slower."""
FREE_TILES = Tiling(rows=64, is_aligned=False, least_fill=0.75)
"""Fast mode: a decode is one row, whatever its position."""


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


@dataclass(frozen=True, slots=True)
class Tile:
    """Rows [start, start + rows) of a sequence."""

    start: int
    rows: int

    @property
    def num_blocks(self) -> int:
        """KV blocks up to its last row's."""
        return (self.start + self.rows - 1) // KV_BLOCK_TOKENS + 1


@dataclass(frozen=True, slots=True)
class TileGroup:
    """Tiles of `rows` rows over `num_blocks` KV blocks that share a call.

    They are laid out from row `first` on, their gathered blocks from `offset` on: each tile's own, or the same for all
    if the tiles are of one sequence.
    """

    tiles: tuple[Tile, ...]
    rows: int
    num_blocks: int
    first: int
    offset: int
    is_one_sequence: bool


@dataclass(slots=True)
class PagedBatch:
    """What the attention of every layer needs to know of a forward; built once per forward.

    `slots` is where the rows' keys and values go, `tile_rows` where in the tiles' layout of `num_tile_rows` the rows'
    queries are. `masks` are those of the groups, by window. The keys and values of `blocks` are gathered in `gathered`.
    """

    kv: KvStore
    rows: int
    slots: Tensor
    tile_rows: Tensor
    num_tile_rows: int
    blocks: Tensor
    gathered: Tensor
    groups: list[TileGroup]
    masks: dict[int | None, list[Tensor]]
    heads: HeadMap


class GatherBuffer:
    """Memory that the gathered keys and values of every layer and forward use: fresh pages cost more than the copy."""

    def __init__(self, dtype: torch.dtype, device: str = "cpu") -> None:
        self._memory = torch.empty(0, dtype=dtype, device=device)

    def of(self, shape: tuple[int, ...]) -> Tensor:
        """A tensor of `shape` with any content."""
        count = prod(shape)
        if self._memory.numel() < count:
            self._memory = self._memory.new_empty(count)
        return self._memory[:count].view(shape)


class PagedSlot:
    """Where a stage puts the batch of the forward that runs, for its attention modules to find."""

    current: PagedBatch


@dataclass(frozen=True, slots=True)
class LayerAttention:
    """What a stage tells an attention module: where the batch is, and `paged_attention`'s options of its layer."""

    slot: PagedSlot
    window: int | None
    score_cap: float | None


@dataclass(frozen=True, slots=True)
class HeadMap:
    """`group` q heads read each kv head; the rank's first q head is number `first` of those of its kv heads."""

    group: int
    first: int


def head_map(*, q_heads: tuple[int, int], kv_heads: tuple[int, int], group: int) -> HeadMap:
    """The map of a rank that owns global heads `q_heads` and stores their cover `kv_heads`."""
    return HeadMap(group=group, first=q_heads[0] - kv_heads[0] * group)


def plan_tiles(
    spans: Sequence[Span],
    kv: KvStore,
    heads: HeadMap,
    tiling: Tiling,
    *,
    windows: Collection[int | None],
    buffer: GatherBuffer,
    device: str = "cpu",
) -> PagedBatch:
    """Lay out the tiles of a batch: sequences in one tile by length, then those in several, one after another.

    Args:
        windows: what the layers of the stage have, for their masks.
        buffer: for the batch's gathered keys and values; the next forward may use it again.
    """
    tables = [kv.table(span.key) for span in spans]
    cuts = [tiling.cut(span) for span in spans]
    first_rows = [0] * len(spans)
    groups: list[TileGroup] = []
    blocks: list[int] = []
    num_tile_rows = 0
    single = [index for index, cut in enumerate(cuts) if len(cut) == 1]
    for members in _sharing(single, cuts, tiling.least_fill):
        tiles = tuple(cuts[index][0] for index in members)
        rows, num_blocks = tiles[0].rows, tiles[0].num_blocks
        groups.append(TileGroup(tiles, rows, num_blocks, num_tile_rows, len(blocks), is_one_sequence=False))
        for index in members:
            first_rows[index] = num_tile_rows
            num_tile_rows += rows
            own = tables[index][:num_blocks]
            blocks += own + own[:1] * (num_blocks - len(own))  # Behind a shorter one's keys comes what is masked.
    for index, cut in enumerate(cuts):
        if len(cut) > 1:
            first_rows[index] = num_tile_rows
            for (rows, num_blocks), same in groupby(cut, key=lambda tile: (tile.rows, tile.num_blocks)):
                tiles = tuple(same)
                groups.append(TileGroup(tiles, rows, num_blocks, num_tile_rows, len(blocks), is_one_sequence=True))
                num_tile_rows += rows * len(tiles)
            blocks += tables[index][: cut[-1].num_blocks]
    slots: list[int] = []
    tile_rows: list[int] = []
    for span, table, cut, first_row in zip(spans, tables, cuts, first_rows, strict=True):
        slots += slots_of(table, span.start, span.stop)
        offset = first_row + span.start - cut[0].start
        tile_rows += range(offset, offset + span.count)
    return PagedBatch(
        kv=kv,
        rows=len(slots),
        slots=torch.tensor(slots, device=device),
        tile_rows=torch.tensor(tile_rows, device=device),
        num_tile_rows=num_tile_rows,
        blocks=torch.tensor(blocks, device=device),
        gathered=buffer.of((2, kv.kv_heads[1] - kv.kv_heads[0], len(blocks), KV_BLOCK_TOKENS, kv.head_dim)),
        groups=groups,
        masks={window: [_mask(group, heads, window, kv.dtype, device) for group in groups] for window in windows},
        heads=heads,
    )


def _sharing(single: Sequence[int], cuts: Sequence[Sequence[Tile]], least_fill: float) -> list[list[int]]:
    """Which of the sequences `single`, cut in one tile each, share a call: the longest of each first."""
    runs: list[list[int]] = []
    for index in sorted(single, key=lambda each: (cuts[each][0].rows, -cuts[each][0].num_blocks, each)):
        tile, longest = cuts[index][0], cuts[runs[-1][0]][0] if runs else None
        if longest and longest.rows == tile.rows and tile.num_blocks >= least_fill * longest.num_blocks:
            runs[-1].append(index)
        else:
            runs.append([index])
    return runs


def _mask(group: TileGroup, heads: HeadMap, window: int | None, dtype: torch.dtype, device: str) -> Tensor:
    """What to add to a group's scores: [tiles, 1, rows and heads of a kv head, keys].

    A row sees the keys up to its own, with a `window` only that many; what is further back stays in the cache, masked.
    """
    starts = torch.tensor([[tile.start] for tile in group.tiles])
    positions = (starts + torch.arange(group.rows)).repeat_interleave(heads.group, dim=1)[:, None, :, None]
    keys = torch.arange(group.num_blocks * KV_BLOCK_TOKENS)
    hidden = keys > positions
    if window is not None:
        hidden |= keys <= positions - window
    return torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, float("-inf")).to(device)


def paged_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    paged_batch: PagedBatch,
    window: int | None = None,
    score_cap: float | None = None,
) -> tuple[Tensor, None]:
    """Write the keys and values [1, heads, rows, head_dim] of the batch, attend, and return [1, rows, heads, head_dim].

    Rows beyond the batch's are padding: they are not written and come back as zero.

    Args:
        window: how many tokens a row sees, its own included.
        score_cap: what the scores are capped to by tanh before the mask.
    """
    batch = paged_batch
    layer: int = module.layer_idx  # type: ignore[assignment]
    keys, values = batch.kv.keys(layer), batch.kv.values(layer)
    num_heads, head_dim = query.shape[1], query.shape[3]
    _slots(keys).index_copy_(1, batch.slots, key[0, :, : batch.rows])
    _slots(values).index_copy_(1, batch.slots, value[0, :, : batch.rows])
    own = slice(batch.heads.first, batch.heads.first + num_heads)
    tiles = query.new_zeros(batch.num_tile_rows, keys.shape[0] * batch.heads.group, head_dim)
    tiles[:, own].index_copy_(0, batch.tile_rows, query[0, :, : batch.rows].transpose(0, 1))
    keys = torch.index_select(keys, 1, batch.blocks, out=batch.gathered[0])
    values = torch.index_select(values, 1, batch.blocks, out=batch.gathered[1])
    attend = F.scaled_dot_product_attention if score_cap is None else partial(_capped_attention, cap=score_cap)
    attended = torch.empty_like(tiles)
    for group, mask in zip(batch.groups, batch.masks[window], strict=True):
        folded = attend(
            _folded(tiles, group, keys.shape[0]),
            _keys_of(keys, group),
            _keys_of(values, group),
            attn_mask=mask,
            scale=scaling,
        )
        _unfold(attended, group, folded)
    output = query.new_zeros(1, query.shape[2], num_heads, head_dim)
    output[0, : batch.rows] = attended[:, own].index_select(0, batch.tile_rows)
    return output, None


def _slots(pool: Tensor) -> Tensor:
    """A pool [heads, blocks, tokens, head_dim] with its slots in one dimension."""
    return pool.view(pool.shape[0], -1, pool.shape[3])


def _folded(tiles: Tensor, group: TileGroup, kv_heads: int) -> Tensor:
    """A group's part of [tile rows, q heads, head_dim] as [tiles, kv heads, rows and q heads of each, head_dim]."""
    count, head_dim = len(group.tiles), tiles.shape[2]
    part = tiles[group.first : group.first + count * group.rows]
    return part.view(count, group.rows, kv_heads, -1, head_dim).transpose(1, 2).reshape(count, kv_heads, -1, head_dim)


def _unfold(attended: Tensor, group: TileGroup, folded: Tensor) -> None:
    """Write what `_folded` was attended to back to the group's rows."""
    count, kv_heads, _, head_dim = folded.shape
    part = attended[group.first : group.first + count * group.rows]
    part.view(count, group.rows, kv_heads, -1, head_dim).copy_(
        folded.reshape(count, kv_heads, group.rows, -1, head_dim).transpose(1, 2)
    )


def _keys_of(gathered: Tensor, group: TileGroup) -> Tensor:
    """A group's part of gathered blocks [kv heads, blocks, tokens, head_dim] as [tiles, kv heads, keys, head_dim]."""
    kv_heads, head_dim = gathered.shape[0], gathered.shape[3]
    count = 1 if group.is_one_sequence else len(group.tiles)
    part = gathered[:, group.offset : group.offset + count * group.num_blocks]
    return part.view(kv_heads, count, -1, head_dim).transpose(0, 1).expand(len(group.tiles), -1, -1, -1)


def _capped_attention(
    query: Tensor, keys: Tensor, values: Tensor, *, attn_mask: Tensor, scale: float, cap: float
) -> Tensor:
    """Attention with capped scores, which no fused kernel has: [tiles, kv heads, rows and heads or keys, head_dim].

    In float32 throughout. Scores are contiguous and whole multiples of 16 wide, so that tanh and exp take one path.
    """
    products = torch.matmul(query.float(), keys.float().transpose(2, 3)) * scale
    capped = torch.tanh(products / cap) * cap + attn_mask.float()
    return torch.matmul(torch.softmax(capped, dim=-1), values.float()).to(query.dtype)
