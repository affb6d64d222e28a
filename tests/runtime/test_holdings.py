"""What a worker holds: weights that a plan left behind, and what frees them."""

from __future__ import annotations

from pathlib import Path

from spotserve.core.ids import ReplicaId
from spotserve.core.slices import kv_token_bytes, shard_slices, slices_bytes, stage_shard
from spotserve.core.spec import KV_BLOCK_TOKENS, ModelSpec
from spotserve.core.wire import ReserveCommand
from spotserve.runtime.holdings import Holdings
from spotserve.runtime.weight_transfer import load_slices
from tests.runtime.cluster import serving_spec
from tests.runtime.stage_play import folder, model

__all__ = ["folder", "model"]


def held_of(folder: Path, model: ModelSpec, *, memory_bytes: int = 1 << 28) -> Holdings:
    """A worker with the first two layers, left there by a plan that was aborted."""
    held = Holdings(serving_spec(model), folder=folder, memory_bytes=memory_bytes, device="cpu")
    reserve(held, 1, model, layers=(0, 2), kv_blocks=4)
    position = held.position(ReplicaId("r1"), 1)
    assert position is not None
    load_slices(held, position.slices)
    held.abort(1)
    return held


def reserve(held: Holdings, epoch: int, model: ModelSpec, *, layers: tuple[int, int], kv_blocks: int) -> None:
    """Take a position of some layers."""
    held.reserve(
        ReserveCommand(
            term=1,
            command="c",
            epoch=epoch,
            replica=ReplicaId(f"r{epoch}"),
            generation=epoch,
            stage=0,
            rank=0,
            pipeline=1,
            tensor=1,
            shard=stage_shard(model, layers=layers, tensor=1, rank=0),
            kv_blocks=kv_blocks,
            max_running=1,
        )
    )


def test_a_release_for_a_new_position_frees_left_over_slices(folder: Path, model: ModelSpec) -> None:
    """Tests that weights of an aborted plan go when a plan names them for a position that is not there yet."""
    held = held_of(folder, model)
    left_over = held.loose()
    dropped, kept = left_over[:2], left_over[2:]
    held.release_part(ReplicaId("r2"), 2, dropped, keep_blocks=None)
    assert kept == held.loose()
    assert slices_bytes(model, kept) == held.union_bytes(held.weights.taken())


def test_room_for_a_position_is_not_made_of_its_own_weights(folder: Path, model: ModelSpec) -> None:
    """Tests that left-over weights which a new position is to use stay when others have to go."""
    whole = slices_bytes(model, shard_slices(model, stage_shard(model, layers=(0, 2), tensor=1, rank=0)))
    first = shard_slices(model, stage_shard(model, layers=(0, 1), tensor=1, rank=0))
    block = KV_BLOCK_TOKENS * kv_token_bytes(model, layers=(0, 1), heads=(0, model.num_kv_heads))
    blocks = (whole - slices_bytes(model, first)) // block + 4
    held = held_of(folder, model, memory_bytes=whole + 8 * block)
    assert blocks > 8, "the pool takes room that the second layer has"
    reserve(held, 2, model, layers=(0, 1), kv_blocks=blocks)
    position = held.position(ReplicaId("r2"), 2)
    assert position is not None
    assert held.is_complete(position)
    assert sorted(map(str, first)) == sorted(map(str, held.loose()))
