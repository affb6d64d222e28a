"""The weight store shares slices between generations and copies what overlaps."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from spotserve.core.slices import Slice, shard_slices, slices_bytes, stage_shard
from spotserve.core.spec import ModelSpec
from spotserve.errors import InvariantError
from spotserve.runtime.checkpoint import Checkpoint
from spotserve.runtime.model_table import describe_model
from spotserve.runtime.weights import WeightStore
from tests.runtime.models import write_llama

DOWN = "model.layers.0.mlp.down_proj.weight"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model."""
    return write_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def model(folder: Path) -> ModelSpec:
    """Its description."""
    return describe_model(folder)


def piece(start: int, stop: int, *, parameter: str = DOWN, dim: int = 1) -> Slice:
    """A slice of the down projection unless told otherwise."""
    return Slice(parameter=parameter, dim=dim, start=start, stop=stop)


def test_equal_slices_are_held_once(model: ModelSpec) -> None:
    """Tests that two generations share a slice and the last release frees it."""
    weights = WeightStore(model)
    slices = shard_slices(model, stage_shard(model, layers=(0, 2), tensor=2, rank=0))
    weights.reserve(slices)
    weights.reserve(slices)
    assert weights.held_bytes == slices_bytes(model, slices)
    weights.release(slices)
    assert weights.held_bytes == slices_bytes(model, slices)
    weights.release(slices)
    assert weights.held_bytes == 0
    with pytest.raises(InvariantError):
        weights.release(slices[:1])


def test_a_new_cut_copies_what_is_held(model: ModelSpec, folder: Path) -> None:
    """Tests that only the ranges held nowhere are missing, and that the copied part is right bit for bit."""
    weights, checkpoint = WeightStore(model), Checkpoint(folder, model)
    weights.reserve([piece(0, 64)])
    weights.write_range(DOWN, 1, 0, 64, checkpoint.read(piece(0, 64)))
    weights.reserve([piece(32, 112)])
    assert weights.missing([piece(32, 112)]) == (piece(64, 112),)
    with pytest.raises(InvariantError):
        weights.tensor(piece(32, 112))
    weights.write_range(DOWN, 1, 64, 112, checkpoint.read(piece(64, 112)))
    weights.release([piece(0, 64)])
    assert torch.equal(checkpoint.read(piece(32, 112)), weights.tensor(piece(32, 112)))
    assert weights.holdings() == (piece(32, 112),)


def test_a_slice_reserved_during_a_copy_still_completes(model: ModelSpec, folder: Path) -> None:
    """Tests that bytes that arrived through another slice after `reserve` count for this one."""
    weights, checkpoint = WeightStore(model), Checkpoint(folder, model)
    weights.reserve([piece(0, 64), piece(32, 64)])
    weights.write_range(DOWN, 1, 0, 48, checkpoint.read(piece(0, 48)))
    assert weights.missing([piece(32, 64)]) == (piece(48, 64),)
    weights.write_range(DOWN, 1, 48, 64, checkpoint.read(piece(48, 64)))
    assert weights.missing([piece(0, 64), piece(32, 64)]) == ()
    assert torch.equal(checkpoint.read(piece(32, 64)), weights.tensor(piece(32, 64)))


def test_a_range_is_read_across_slices(model: ModelSpec, folder: Path) -> None:
    """Tests that `read_range` composes a contiguous range from several held slices, and says what is not held."""
    weights, checkpoint = WeightStore(model), Checkpoint(folder, model)
    for part in (piece(0, 48), piece(48, 96), piece(32, 64)):
        weights.reserve([part])
        weights.write_range(DOWN, 1, part.start, part.stop, checkpoint.read(part))
    got = weights.read_range(DOWN, 1, 16, 80)
    assert got.is_contiguous()
    assert torch.equal(checkpoint.read(piece(16, 80)), got)
    with pytest.raises(KeyError, match="96"):
        weights.read_range(DOWN, 1, 80, 100)


def test_a_range_that_landed_counts_once_it_is_marked(model: ModelSpec, folder: Path) -> None:
    """Tests that receiving into the store's own memory leaves the range missing until it is marked, then everywhere."""
    weights, checkpoint = WeightStore(model), Checkpoint(folder, model)
    query = "model.layers.0.self_attn.q_proj.weight"
    rows = int(weights.range_shape(piece(0, 8, parameter=query, dim=0))[1])
    whole, low, part = (piece(a, b, parameter=query, dim=0) for a, b in ((0, rows), (0, 16), (8, 24)))
    weights.reserve([whole, part])
    place = weights.landing_place(low)
    assert place is not None
    place.copy_(checkpoint.read(low))
    assert (low,) == weights.missing([low])
    weights.mark_written(low, place)
    assert (piece(16, rows, parameter=query, dim=0),) == weights.missing([whole])
    assert (piece(16, 24, parameter=query, dim=0),) == weights.missing([part])
    assert weights.landing_place(low) is None, "what is written may be read by now"
    weights.write_range(query, 0, 16, rows, checkpoint.read(piece(16, rows, parameter=query, dim=0)))
    assert torch.equal(checkpoint.read(whole), weights.tensor(whole))
    assert torch.equal(checkpoint.read(part), weights.tensor(part))


def test_what_is_not_one_run_of_memory_lands_elsewhere(model: ModelSpec) -> None:
    """Tests that a cut along columns, and a range that nobody reserved, have no landing place."""
    weights = WeightStore(model)
    weights.reserve([piece(0, 64)])
    assert weights.landing_place(piece(0, 32)) is None
    assert weights.landing_place(piece(32, 96)) is None
    assert weights.landing_place(piece(0, 64)) is not None


def test_a_lazy_slice_takes_memory_when_it_is_written(model: ModelSpec, folder: Path) -> None:
    """Tests that a lazy slice costs nothing until bytes come, counts what others hold, and then has all of it."""
    weights, checkpoint = WeightStore(model), Checkpoint(folder, model)
    weights.reserve([piece(0, 64)])
    weights.write_range(DOWN, 1, 0, 64, checkpoint.read(piece(0, 64)))
    before = weights.held_bytes
    weights.reserve([piece(32, 112)], is_lazy=True)
    assert (before, (piece(64, 112),)) == (weights.held_bytes, weights.missing([piece(32, 112)]))
    weights.write_range(DOWN, 1, 64, 112, checkpoint.read(piece(64, 112)))
    assert torch.equal(checkpoint.read(piece(32, 112)), weights.tensor(piece(32, 112)))


def test_what_goes_is_taken_over(model: ModelSpec, folder: Path) -> None:
    """Tests that a slice that goes leaves its content to lazy slices that counted on it."""
    weights, checkpoint = WeightStore(model), Checkpoint(folder, model)
    weights.reserve([piece(0, 64)])
    weights.write_range(DOWN, 1, 0, 64, checkpoint.read(piece(0, 64)))
    weights.reserve([piece(32, 112)], is_lazy=True)
    weights.release([piece(0, 64)])
    assert (piece(64, 112),) == weights.missing([piece(32, 112)])
    assert torch.equal(checkpoint.read(piece(32, 64)), weights.read_range(DOWN, 1, 32, 64))


@pytest.mark.parametrize("is_reserved", [False, True], ids=["before-reserve", "after-reserve"])
def test_a_part_is_given_up(model: ModelSpec, folder: Path, is_reserved: bool) -> None:
    """Tests that ranges go out of the middle of a slice, and what is left can be read whoever comes first."""
    weights, checkpoint = WeightStore(model), Checkpoint(folder, model)
    weights.reserve([piece(0, 112)])
    weights.write_range(DOWN, 1, 0, 112, checkpoint.read(piece(0, 112)))
    if is_reserved:
        weights.reserve([piece(64, 112)], is_lazy=True)
    left = weights.give_up([piece(0, 112)], [piece(16, 64)])
    assert (piece(0, 16), piece(64, 112)) == left
    assert (piece(0, 16), piece(64, 112)) == weights.holdings()
    assert torch.equal(checkpoint.read(piece(64, 112)), weights.read_range(DOWN, 1, 64, 112))
    assert left == weights.give_up(left, [piece(16, 64)])
    assert slices_bytes(model, left) == weights.held_bytes
    if is_reserved:
        assert (piece(0, 16),) == weights.release_doubled(left)
        assert torch.equal(checkpoint.read(piece(64, 112)), weights.tensor(piece(64, 112)))


def test_only_what_others_have_is_doubled(model: ModelSpec, folder: Path) -> None:
    """Tests that a slice is let go of when another one has all its content, and not before."""
    weights, checkpoint = WeightStore(model), Checkpoint(folder, model)
    weights.reserve([piece(0, 64)])
    weights.write_range(DOWN, 1, 0, 64, checkpoint.read(piece(0, 64)))
    weights.reserve([piece(0, 112)], is_lazy=True)
    assert (piece(0, 64),) == weights.release_doubled([piece(0, 64)])
    weights.write_range(DOWN, 1, 64, 112, checkpoint.read(piece(64, 112)))
    assert () == weights.release_doubled([piece(0, 64)])
    assert (piece(0, 112),) == weights.taken()
    assert torch.equal(checkpoint.read(piece(0, 112)), weights.tensor(piece(0, 112)))
