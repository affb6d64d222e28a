"""The KV store: tables, bounds, and rectangles between stores of different cuts."""

from __future__ import annotations

import pytest
import torch

from spotserve.core.batching import SequenceKey
from spotserve.errors import InvariantError
from spotserve.runtime.kv_store import KvStore, OutOfBlocks, slots_of
from tests.runtime.models import key_of


def store(*, num_blocks: int = 8, layers: tuple[int, int] = (0, 4), kv_heads: tuple[int, int] = (0, 4)) -> KvStore:
    """A small store."""
    return KvStore(num_blocks=num_blocks, layers=layers, kv_heads=kv_heads, head_dim=8, dtype=torch.float32)


def fill_randomly(kv: KvStore, key: SequenceKey, kv_tokens: int, seed: int = 0) -> None:
    """Write random tokens through the pools as the engine does."""
    generator = torch.Generator().manual_seed(seed)
    kv.extend(key, kv_tokens)
    slots = torch.tensor(slots_of(kv.table(key), 0, kv_tokens))
    for layer in range(*kv.layers):
        for pool in (kv.keys(layer), kv.values(layer)):
            heads = pool.shape[0]
            pool.view(heads, -1, 8).index_copy_(1, slots, torch.randn(heads, kv_tokens, 8, generator=generator))
    kv.fill(key, kv_tokens)


def test_extend_takes_only_what_is_missing() -> None:
    """Tests that room grows by whole blocks, repeats change nothing, and freeing gives all back."""
    kv = store()
    kv.extend(key_of(0), 17)
    kv.extend(key_of(0), 32)
    assert kv.num_free == 6
    assert kv.blocks_short(key_of(0), 33) == 1
    kv.free(key_of(0))
    kv.free(key_of(0))
    assert kv.num_free == 8
    assert kv.directory() == {}


def test_out_of_blocks_changes_nothing() -> None:
    """Tests that a refused extension leaves tables and free blocks as they were."""
    kv = store(num_blocks=2)
    kv.extend(key_of(0), 16)
    with pytest.raises(OutOfBlocks, match="2 KV blocks needed, 1 of 2 free"):
        kv.extend(key_of(1), 32)
    assert kv.num_free == 1
    assert kv.directory() == {key_of(0): 0}


def test_directory_lists_written_tokens_only() -> None:
    """Tests that reserved room does not count as KV until it is filled."""
    kv = store()
    fill_randomly(kv, key_of(0), 20)
    kv.extend(key_of(0), 40)
    assert kv.directory() == {key_of(0): 20}
    assert kv.filled_blocks(key_of(0)) == 1
    with pytest.raises(InvariantError):
        kv.fill(key_of(0), 49)


def test_rectangles_move_between_different_cuts() -> None:
    """Tests that two sources with other layers, heads and tables make up a destination, bit for bit."""
    whole = store()
    fill_randomly(whole, key_of(0), 41)
    left, right = store(kv_heads=(0, 3)), store(kv_heads=(2, 4), layers=(1, 4))
    right.extend(key_of(5), 16)  # makes the tables differ
    for part in (left, right):
        part.extend(key_of(0), 41)
        for block in range(3):
            rectangle = whole.export_block(key_of(0), block, layers=part.layers, kv_heads=part.kv_heads)
            part.import_block(key_of(0), block, rectangle, layers=part.layers, kv_heads=part.kv_heads)
        part.fill(key_of(0), 41)
    target = store(layers=(1, 3))
    target.extend(key_of(0), 41)
    for block in range(3):
        for source, heads in ((left, (0, 2)), (right, (2, 4))):
            rectangle = source.export_block(key_of(0), block, layers=(1, 3), kv_heads=heads)
            assert rectangle.is_contiguous()
            target.import_block(key_of(0), block, rectangle, layers=(1, 3), kv_heads=heads)
    target.fill(key_of(0), 41)
    for block, tokens in ((0, 16), (1, 16), (2, 9)):
        expected = whole.export_block(key_of(0), block, layers=(1, 3), kv_heads=(0, 4))
        assert expected.shape == (2, 2, 4, tokens, 8)
        assert torch.equal(expected, target.export_block(key_of(0), block, layers=(1, 3), kv_heads=(0, 4)))


def test_a_freed_block_is_zero_when_taken_again() -> None:
    """Tests that what another sequence left (even infinities) cannot reach a masked tail."""
    kv = store(num_blocks=1)
    kv.extend(key_of(0), 16)
    kv.keys(0).fill_(float("inf"))
    kv.free(key_of(0))
    kv.extend(key_of(1), 1)
    assert float(kv.keys(0).abs().sum()) == 0.0


def test_a_pinned_block_is_not_reused() -> None:
    """Tests that freeing a sequence during an export keeps the block back until the export ends."""
    kv = store(num_blocks=1)
    fill_randomly(kv, key_of(0), 16)
    with kv._pinned(key_of(0), 0):
        kv.free(key_of(0))
        assert kv.num_free == 0
    assert kv.num_free == 1


def test_a_rectangle_outside_the_store_is_refused() -> None:
    """Tests that wrong layers, heads or shapes are our bug, never a silent write elsewhere."""
    kv = store(layers=(1, 3))
    fill_randomly(kv, key_of(0), 16)
    with pytest.raises(InvariantError, match="not within"):
        kv.export_block(key_of(0), 0, layers=(0, 2), kv_heads=(0, 4))
    with pytest.raises(InvariantError, match="not that of"):
        kv.import_block(key_of(0), 0, torch.zeros(1, 2, 3, 16, 8), layers=(1, 2), kv_heads=(0, 4))
    with pytest.raises(KeyError):
        kv.export_block(key_of(1), 0, layers=(1, 2), kv_heads=(0, 4))


def test_a_pool_shrinks_to_its_content() -> None:
    """Tests that a shrunk pool has the longest sequences bit for bit, and room for the rest of its blocks."""
    kv = store()
    for index, kv_tokens in enumerate((20, 40, 33)):
        fill_randomly(kv, key_of(index), kv_tokens, seed=index)
    kv.free(key_of(2))
    fill_randomly(kv, key_of(3), 5, seed=3)
    kv.extend(key_of(1), 64)
    before = [kv.export_block(key_of(1), block, layers=(0, 4), kv_heads=(0, 4)) for block in range(3)]
    size = kv.bytes
    kv.shrink(5)
    assert {key_of(0): 20, key_of(1): 40} == kv.directory()
    assert (5, 0, 5 * size // 8) == (kv.num_blocks, kv.num_free, kv.bytes)
    for block, expected in enumerate(before):
        assert torch.equal(expected, kv.export_block(key_of(1), block, layers=(0, 4), kv_heads=(0, 4)))
    kv.free(key_of(0))
    kv.extend(key_of(4), 32)
    kv.shrink(5)
    assert 0 == kv.num_free
