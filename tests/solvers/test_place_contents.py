"""Contents: pieces by numpy say the same as ranges one GPU and one position at a time."""

from __future__ import annotations

import random

import numpy as np
import pytest

from spotserve.core.cost import replica_shards
from spotserve.core.ids import GpuId
from spotserve.core.slices import kv_token_bytes, shard_bytes, shard_slices
from spotserve.core.snapshot import Holding, Replica
from spotserve.core.spec import ModelSpec
from spotserve.solvers.place.contents import Carried, gather_contents
from spotserve.solvers.place.problem import Contents, product
from spotserve.solvers.ranges import Catalog, cut, shard_at
from tests.planning_worlds import holdings, replica, tiny_model

SHAPES = [(1, 1), (2, 1), (4, 1), (1, 2), (2, 2), (1, 3), (3, 2), (1, 4), (2, 4)]


def running(model: ModelSpec, shape: tuple[int, int], *, data: int = 2) -> list[Replica]:
    """Replicas of a shape, one GPU after the other."""
    size = shape[0] * shape[1]
    return [
        replica(
            f"r{number}",
            [f"i{number * size + index}/0" for index in range(size)],
            pipeline=shape[0],
            tensor=shape[1],
            num_layers=model.num_layers,
            kv_blocks=8,
        )
        for number in range(data)
    ]


def gathered(model: ModelSpec, held: dict[GpuId, Holding], new: tuple[int, int], carried: list[Carried]) -> Contents:
    """The pieces for one new shape."""
    shards = replica_shards(model, pipeline=new[0], tensor=new[1])
    return gather_contents(model, gpus=list(held), shards=shards, holdings=held, carried=carried)


@pytest.mark.parametrize("new", SHAPES)
def test_overlaps_equal_range_arithmetic(rng: random.Random, new: tuple[int, int]) -> None:
    """Tests that weights in common are exact with uneven chunks, doubled kv heads and replicated parameters."""
    model = tiny_model(num_layers=6, kv_heads=rng.choice([1, 2, 4]))
    catalog = Catalog(model)
    replicas = running(model, rng.choice(SHAPES)) + running(model, rng.choice(SHAPES), data=1)
    held = {one.gpu: one for one in holdings(model, replicas)} | {GpuId("i99/0"): Holding(gpu=GpuId("i99/0"))}
    contents = gathered(model, held, new, [])
    shards = replica_shards(model, pipeline=new[0], tensor=new[1])
    overlap = product(contents.weight_held, contents.weight_needed, contents.weight_bytes)
    assert [[catalog.overlap_bytes(one, shard) for shard in shards] for one in held.values()] == overlap.tolist()
    needs = (contents.weight_needed * contents.weight_bytes).sum(axis=1)
    assert [shard_bytes(model, shard) for shard in shards] == needs.tolist()


def test_loose_slices_count(rng: random.Random) -> None:
    """Tests that slices left over from an aborted plan, with or without a shard beside them, are counted exactly."""
    model = tiny_model(num_layers=4, kv_heads=2)
    catalog = Catalog(model)
    old, other = (replica_shards(model, pipeline=2, tensor=tensor) for tensor in (2, 3))
    held = {}
    for number in range(4):
        loose = tuple(rng.sample(shard_slices(model, other[rng.randrange(6)]), 9))
        gpu = GpuId(f"i{number}/0")
        held[gpu] = Holding(gpu=gpu, shards=(old[number],) if number % 2 else (), slices=loose)
    contents = gathered(model, held, (1, 4), [])
    overlap = product(contents.weight_held, contents.weight_needed, contents.weight_bytes)
    shards = replica_shards(model, pipeline=1, tensor=4)
    assert [[catalog.overlap_bytes(one, shard) for shard in shards] for one in held.values()] == overlap.tolist()
    assert overlap.any()


@pytest.mark.parametrize("new", SHAPES)
def test_kv_overlaps_equal_rectangles(rng: random.Random, new: tuple[int, int]) -> None:
    """Tests that KV in common is layers x kv heads of the replica that each GPU belongs to."""
    model = tiny_model(num_layers=6, kv_heads=rng.choice([1, 2, 4]))
    catalog = Catalog(model)
    replicas = running(model, rng.choice(SHAPES))
    held = {one.gpu: one for one in holdings(model, replicas)}
    carried = [Carried(one, 10 * number, number) for number, one in enumerate(replicas)]
    contents = gathered(model, held, new, carried)
    shards = replica_shards(model, pipeline=new[0], tensor=new[1])
    overlap = product(contents.kv_held, contents.kv_needed, contents.kv_token_bytes)
    for row, gpu in enumerate(held):
        number = next(index for index, one in enumerate(replicas) if gpu in one.gpus)
        assert contents.old_replica[row] == number
        mine = catalog.kv_rectangle(shard_at(model, replicas[number], replicas[number].gpus.index(gpu)))
        for column, shard in enumerate(shards):
            shared = cut(catalog.kv_rectangle(shard), mine)
            expected = 0 if shared is None else kv_token_bytes(model, layers=shared[0], heads=shared[1])
            assert expected == overlap[row, column]
    assert contents.kv_tokens.tolist() == [0, 10]


def test_a_tensor_group_needs_every_piece_once(rng: random.Random) -> None:
    """Tests that the ranks of a group together need the whole stage, replicated parameters counted once."""
    model = tiny_model(num_layers=4)
    contents = gathered(model, {}, (2, 4), [])
    whole = replica_shards(model, pipeline=2, tensor=1)
    for stage, shard in enumerate(whole):
        needed = contents.weight_needed[4 * stage : 4 * stage + 4].any(axis=0)
        assert shard_bytes(model, shard) == int(contents.weight_bytes[needed].sum())
    assert contents.weight_held.shape == (0, len(contents.weight_bytes))
    assert not np.any(contents.kv_held)
