"""The memory of a virtual GPU: it holds to its budget as a worker does."""

from __future__ import annotations

import pytest

from spotserve.core.ids import ReplicaId
from spotserve.core.slices import Shard, shard_bytes, shard_slices, stage_shard
from spotserve.sim.virtual_memory import VirtualGpu, WeightTable
from tests.specs import small_spec

SPEC = small_spec()
OLD, NEW = (ReplicaId("r1"), 1), (ReplicaId("r2"), 2)
BLOCKS = 8


def shard(first: int, last: int) -> Shard:
    """Some layers, whole."""
    return stage_shard(SPEC.model, layers=(first, last), tensor=1, rank=0)


def size(one: Shard, blocks: int = BLOCKS) -> int:
    """Bytes of a position: weights and pool."""
    return shard_bytes(SPEC.model, one) + blocks * WeightTable(SPEC).block_bytes(one)


def gpu(memory_bytes: int) -> VirtualGpu:
    """A GPU on which nothing is."""
    return VirtualGpu(WeightTable(SPEC), memory_bytes)


def holding(one: Shard, memory_bytes: int) -> VirtualGpu:
    """A GPU with a whole position."""
    made = gpu(memory_bytes)
    assert made.reserve(OLD, one, BLOCKS, is_eager=True)
    made.write(shard_slices(SPEC.model, one))
    assert {} == made.lacks(OLD)
    return made


@pytest.mark.parametrize(("spare", "fits"), [(0, True), (-1, False)])
def test_a_position_fits_to_the_byte(spare: int, fits: bool) -> None:
    """Tests that weights and pool are counted exactly, and that what is refused takes nothing."""
    one = gpu(size(shard(0, 2)) + spare)
    assert fits == one.reserve(OLD, shard(0, 2), BLOCKS, is_eager=True)
    assert (size(shard(0, 2)) if fits else 0) == one.used_bytes()


def test_what_both_generations_have_counts_once() -> None:
    """Tests that shared weights take no second room, and a pool of the same layers and size is taken over."""
    same = holding(shard(0, 2), size(shard(0, 2)))
    assert same.reserve(NEW, shard(0, 2), BLOCKS, is_eager=True)
    other = holding(shard(0, 2), size(shard(0, 2)))
    assert not other.reserve(NEW, shard(0, 2), BLOCKS + 1, is_eager=True)
    assert not other.reserve(NEW, shard(1, 2), BLOCKS, is_eager=True)


def test_weights_of_a_stopped_position_have_room_when_they_come() -> None:
    """Tests that in place a position takes its pool first and each weight as it comes."""
    one = holding(shard(0, 2), size(shard(0, 2)) + BLOCKS * WeightTable(SPEC).block_bytes(shard(1, 4)))
    assert one.reserve(NEW, shard(1, 4), BLOCKS, is_eager=False)
    more = [piece for piece in shard_slices(SPEC.model, shard(1, 4)) if ".2." in piece.parameter]
    assert not one.expect(more)
    gone = [piece for piece in shard_slices(SPEC.model, shard(0, 2)) if ".0." in piece.parameter]
    one.give_up(OLD, gone, keep_blocks=0)
    assert one.expect(more)
    one.write(more)
    assert not one.has(gone)
    assert one.has(more)
    assert (shard(0, 2),) != one.shards()


def test_left_over_weights_make_room_but_for_what_is_needed() -> None:
    """Tests that pieces of no position go when room is short, and those that the newcomer needs stay."""
    one = holding(shard(0, 2), size(shard(0, 2)))
    one.loosen(OLD)
    assert shard_bytes(SPEC.model, shard(0, 2)) == one.used_bytes()
    blocks = (one.memory_bytes - shard_bytes(SPEC.model, shard(1, 2))) // one.table.block_bytes(shard(1, 2))
    assert one.reserve(NEW, shard(1, 2), blocks, is_eager=True)
    assert one.was_short
    assert {} == one.lacks(NEW)
    assert size(shard(1, 2), blocks) == one.used_bytes()


def test_the_last_release_frees_all() -> None:
    """Tests that nothing is left of a position that has been released, nor of what was kept for a plan."""
    one = holding(shard(0, 2), 2 * size(shard(0, 4)))
    one.loosen(OLD)
    assert one.reserve(NEW, shard(2, 4), BLOCKS, is_eager=True)
    one.release(NEW)
    assert (0, (), ()) == (one.used_bytes(), one.shards(), one.pieces())


def test_pools_shrink_to_what_is_kept() -> None:
    """Tests that a pool gives back the blocks that are not kept, and grows no more."""
    one = holding(shard(0, 2), 2 * size(shard(0, 2)))
    block = one.table.block_bytes(shard(0, 2))
    before = one.used_bytes()
    one.give_up(OLD, (), keep_blocks=3)
    assert before - (BLOCKS - 3) * block == one.used_bytes()
    one.give_up(OLD, (), keep_blocks=5)
    assert before - (BLOCKS - 3) * block == one.used_bytes()
    assert (shard(0, 2),) == one.shards()
