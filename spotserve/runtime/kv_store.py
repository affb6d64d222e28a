"""The paged KV cache of one position: pools, block tables of its own, and rectangles in and out for migration.

KV is named by (request, choice, kv_generation) and addressed by (layer, kv head, token) in global coordinates; block
ids never leave this store, so source and destination of a migration may lay their blocks out differently. A full block
never changes. The engine thread extends and fills, copy threads export and import: tables are under one lock, and a
block that is being exported is pinned, so freeing its sequence meanwhile cannot hand it to another.
"""

from __future__ import annotations

import mmap
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import prod

import torch
from torch import Tensor

from spotserve.core.batching import SequenceKey
from spotserve.core.spec import KV_BLOCK_TOKENS
from spotserve.errors import InvariantError, SpotServeError


class OutOfBlocks(SpotServeError):  # noqa: N818
    """The pool has too few free blocks; nothing was changed."""

    code = "SPS-192"


@dataclass(slots=True)
class _Sequence:
    blocks: list[int] = field(default_factory=list)
    kv_tokens: int = 0


class KvStore:
    """Blocks of `KV_BLOCK_TOKENS` tokens for layers [layers[0], layers[1]) x kv heads [kv_heads[0], kv_heads[1]).

    A pool holds one layer's keys or values as [heads, blocks, tokens, head_dim]: heads outermost, so that a gather
    of blocks is already what attention wants per head and a migration cuts heads at no cost.
    """

    def __init__(
        self,
        *,
        num_blocks: int,
        layers: tuple[int, int],
        kv_heads: tuple[int, int],
        head_dim: int,
        dtype: torch.dtype,
        device: str = "cpu",
    ) -> None:
        self.num_blocks = num_blocks
        self.layers = layers
        self.kv_heads = kv_heads
        self.head_dim = head_dim
        self.dtype = dtype
        self._pool = _zeros(
            (layers[1] - layers[0], 2, kv_heads[1] - kv_heads[0], num_blocks, KV_BLOCK_TOKENS, head_dim), dtype, device
        )
        self._lock = threading.Lock()
        self._free = list(range(num_blocks - 1, -1, -1))
        self._sequences: dict[SequenceKey, _Sequence] = {}
        self._pins: dict[int, int] = {}
        self._orphans: set[int] = set()

    @property
    def num_free(self) -> int:
        """Blocks that `extend` can still take."""
        with self._lock:
            return len(self._free)

    @property
    def bytes(self) -> int:
        """Bytes of the pools."""
        return self._pool.numel() * self._pool.element_size()

    def keys(self, layer: int) -> Tensor:
        """The key pool of global layer `layer`: [heads, blocks, tokens, head_dim]."""
        return self._pool[layer - self.layers[0], 0]

    def values(self, layer: int) -> Tensor:
        """The value pool of global layer `layer`."""
        return self._pool[layer - self.layers[0], 1]

    def blocks_short(self, key: SequenceKey, kv_tokens: int) -> int:
        """How many more blocks `key` needs to hold `kv_tokens` tokens."""
        with self._lock:
            return self._short(key, kv_tokens)

    def extend(self, key: SequenceKey, kv_tokens: int) -> None:
        """Make room for `kv_tokens` tokens in all; a new key begins empty. Idempotent.

        Raises:
            OutOfBlocks: too few are free; nothing was changed.
        """
        with self._lock:
            short = self._short(key, kv_tokens)
            if short > len(self._free):
                raise OutOfBlocks(f"{short} KV blocks needed, {len(self._free)} of {self.num_blocks} free")
            sequence = self._sequences.setdefault(key, _Sequence())
            taken = [self._free.pop() for _ in range(short)]
            # Attention multiplies a masked tail's values by zero; what another sequence left there may be infinite.
            for block in taken:
                self._pool[:, :, :, block] = 0
            sequence.blocks += taken

    def fill(self, key: SequenceKey, kv_tokens: int) -> None:
        """Say that the first `kv_tokens` tokens are written: only they are exported and listed."""
        with self._lock:
            sequence = self._sequences[key]
            if kv_tokens > len(sequence.blocks) * KV_BLOCK_TOKENS:
                raise InvariantError(f"{key} filled to {kv_tokens} tokens, room for {len(sequence.blocks)} blocks")
            sequence.kv_tokens = max(sequence.kv_tokens, kv_tokens)

    def free(self, key: SequenceKey) -> None:
        """Give a sequence's blocks back, pinned ones once they are exported; an unknown key is nothing to do."""
        with self._lock:
            sequence = self._sequences.pop(key, None)
            if sequence is None:
                return
            for block in reversed(sequence.blocks):
                if block in self._pins:
                    self._orphans.add(block)
                else:
                    self._free.append(block)

    def shrink(self, num_blocks: int) -> None:
        """Keep so many blocks, and the longest sequences that fit in them; for a pool that nobody decodes with.

        Through host memory: the device never holds both.
        """
        with self._lock:
            if num_blocks >= self.num_blocks:
                return
            if self._pins:
                raise InvariantError(f"{len(self._pins)} blocks of a pool that shrinks are being exported")
            kept: dict[SequenceKey, _Sequence] = {}
            used: list[int] = []
            for key, sequence in sorted(self._sequences.items(), key=lambda item: (-item[1].kv_tokens, item[0])):
                written = sequence.blocks[: -(-sequence.kv_tokens // KV_BLOCK_TOKENS)]
                if len(used) + len(written) <= num_blocks:
                    kept[key] = _Sequence(list(range(len(used), len(used) + len(written))), sequence.kv_tokens)
                    used += written
            content = self._pool[:, :, :, used].cpu()
            shape, device = self._pool.shape, self._pool.device
            self._pool = torch.zeros(0, dtype=self.dtype)
            self._pool = torch.zeros((*shape[:3], num_blocks, *shape[4:]), dtype=self.dtype, device=device)
            self._pool[:, :, :, : len(used)] = content.to(device)
            self.num_blocks = num_blocks
            self._sequences = kept
            self._free = list(range(num_blocks - 1, len(used) - 1, -1))

    def table(self, key: SequenceKey) -> tuple[int, ...]:
        """The block ids of a sequence, in token order."""
        with self._lock:
            return tuple(self._sequences[key].blocks)

    def kv_tokens(self, key: SequenceKey) -> int:
        """Tokens of `key` that are written; 0 for an unknown key."""
        with self._lock:
            sequence = self._sequences.get(key)
            return 0 if sequence is None else sequence.kv_tokens

    def filled_blocks(self, key: SequenceKey) -> int:
        """Full blocks of a sequence: these never change and can be copied while decoding goes on."""
        return self.kv_tokens(key) // KV_BLOCK_TOKENS

    def directory(self) -> dict[SequenceKey, int]:
        """Each sequence and its written tokens, sorted by key."""
        with self._lock:
            return {key: self._sequences[key].kv_tokens for key in sorted(self._sequences)}

    def block_shape(
        self, *, tokens: int, layers: tuple[int, int], kv_heads: tuple[int, int]
    ) -> tuple[int, int, int, int, int]:
        """The shape of an exported rectangle: [layers, 2, kv heads, tokens, head_dim]."""
        return (layers[1] - layers[0], 2, kv_heads[1] - kv_heads[0], tokens, self.head_dim)

    def export_block(
        self, key: SequenceKey, block_index: int, *, layers: tuple[int, int], kv_heads: tuple[int, int]
    ) -> Tensor:
        """A contiguous copy [layers, 2, kv heads, written tokens, head_dim] of one block's rectangle.

        Raises:
            KeyError: the sequence is not here (any more).
        """
        with self._pinned(key, block_index) as (block, tokens):
            rectangle = self._rectangle(layers, kv_heads)[:, :, :, block, :tokens]
            return rectangle.clone(memory_format=torch.contiguous_format)

    def import_block(
        self,
        key: SequenceKey,
        block_index: int,
        rectangle: Tensor,
        *,
        layers: tuple[int, int],
        kv_heads: tuple[int, int],
    ) -> None:
        """Write what `export_block` of another store gave. `extend` comes before, `fill` after all rectangles."""
        tokens = rectangle.shape[3]
        if tuple(rectangle.shape) != self.block_shape(tokens=tokens, layers=layers, kv_heads=kv_heads):
            raise InvariantError(f"KV rectangle {tuple(rectangle.shape)} is not that of layers {layers} {kv_heads}")
        with self._lock:
            block = self._sequences[key].blocks[block_index]
        self._rectangle(layers, kv_heads)[:, :, :, block, :tokens] = rectangle

    def _short(self, key: SequenceKey, kv_tokens: int) -> int:
        sequence = self._sequences.get(key)
        held = 0 if sequence is None else len(sequence.blocks)
        return max(0, -(-kv_tokens // KV_BLOCK_TOKENS) - held)

    def _rectangle(self, layers: tuple[int, int], kv_heads: tuple[int, int]) -> Tensor:
        inside = self.layers[0] <= layers[0] < layers[1] <= self.layers[1]
        if not inside or not self.kv_heads[0] <= kv_heads[0] < kv_heads[1] <= self.kv_heads[1]:
            raise InvariantError(
                f"layers {layers} x kv heads {kv_heads} are not within {self.layers} x {self.kv_heads}"
            )
        rows = slice(layers[0] - self.layers[0], layers[1] - self.layers[0])
        heads = slice(kv_heads[0] - self.kv_heads[0], kv_heads[1] - self.kv_heads[0])
        return self._pool[rows, :, heads]

    @contextmanager
    def _pinned(self, key: SequenceKey, block_index: int) -> Iterator[tuple[int, int]]:
        """(block, its written tokens), kept from reuse until the caller is done."""
        with self._lock:
            sequence = self._sequences[key]
            tokens = min(KV_BLOCK_TOKENS, sequence.kv_tokens - block_index * KV_BLOCK_TOKENS)
            if tokens <= 0:
                raise InvariantError(f"block {block_index} of {key} has no token, {sequence.kv_tokens} are written")
            block = sequence.blocks[block_index]
            self._pins[block] = self._pins.get(block, 0) + 1
        try:
            yield block, tokens
        finally:
            with self._lock:
                self._pins[block] -= 1
                if not self._pins[block]:
                    del self._pins[block]
                    if block in self._orphans:
                        self._orphans.remove(block)
                        self._free.append(block)


def slots_of(table: Sequence[int], start: int, stop: int) -> list[int]:
    """Flat slots of the tokens [start, stop) of a sequence with block table `table`."""
    return [
        table[position // KV_BLOCK_TOKENS] * KV_BLOCK_TOKENS + position % KV_BLOCK_TOKENS
        for position in range(start, stop)
    ]


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> Tensor:
    """A zeroed pool. On a CPU of pages that the system zeroes when they are first used: a reserve is then no wait."""
    count = prod(shape)
    if device != "cpu" or count == 0:
        return torch.zeros(shape, dtype=dtype, device=device)
    return torch.frombuffer(mmap.mmap(-1, count * dtype.itemsize), dtype=dtype, count=count).view(shape)
