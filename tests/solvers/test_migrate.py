"""Migrate: sources of missing ranges, their bound, and the KV rectangles of a route."""

from __future__ import annotations

import random
from itertools import combinations

import pytest

from spotserve.core.ids import GpuId, instance_of
from spotserve.core.slices import kv_head_range
from spotserve.solvers.migrate import Piece, bound_bytes, choose_sources, cut_pieces, kv_transfers
from spotserve.solvers.ranges import Catalog
from tests.planning_worlds import replica, tiny_model

GB = 10**9


def piece(destination: str, holders: list[str], size: int, layer: str = "0") -> Piece:
    """A piece of `size` bytes."""
    return Piece(GpuId(destination), layer, tuple(GpuId(gpu) for gpu in holders), {}, size)


def test_two_holders_of_two_slices_are_the_bottleneck() -> None:
    """Tests the golden instance in which two slices are only at one holder: 12 GB leave its port."""
    pieces = [
        piece("i3/0", ["i1/0"], 6 * GB),
        piece("i4/0", ["i1/0"], 6 * GB),
        piece("i5/0", ["i1/0", "i2/0"], 6 * GB),
    ]
    bound, certificate = bound_bytes(pieces)
    assert (12 * GB, "out_ports", "i1") == (bound, certificate["kind"], certificate["ports"])
    chosen, report = choose_sources(pieces, doomed=(), solver="maxflow")
    assert (12 * GB, "optimal") == (report.objective, report.status)
    assert [t.source for t in chosen if t.destination == "i5/0"] == ["i2/0"]
    _, naive = choose_sources(pieces, doomed=(), solver="first_holder")
    assert naive.objective == 18 * GB


def test_shared_slices_are_bounded_by_both_holders() -> None:
    """Tests the golden instance in which three slices at the same two holders take 9 GB of each port at best."""
    pieces = [piece(f"i{index}/0", ["i1/0", "i2/0"], 6 * GB) for index in (3, 4, 5)]
    assert bound_bytes(pieces)[0] == 9 * GB


@pytest.mark.parametrize("seed", range(20))
def test_bound_is_the_worst_hall_set(seed: int) -> None:
    """Tests that the max-flow bound is the maximum over every set of pieces and every in-port."""
    draw = random.Random(seed)
    names = [f"i{index}/0" for index in range(4)]
    pieces = [
        piece(f"i{9 + draw.randrange(3)}/0", sorted(draw.sample(names, draw.randrange(1, 4))), draw.randrange(1, 50))
        for _ in range(6)
    ]
    in_ports = [sum(p.bytes for p in pieces if p.destination == f"i{9 + index}/0") for index in range(3)]
    hall = [
        -(-sum(p.bytes for p in group) // len({instance_of(gpu) for p in group for gpu in p.holders}))
        for count in range(1, 7)
        for group in combinations(pieces, count)
    ]
    assert max(*in_ports, *hall) == bound_bytes(pieces)[0]


@pytest.mark.parametrize("seed", range(20))
def test_sources_hold_what_they_send(seed: int) -> None:
    """Tests that every piece comes from one of its holders and that the report's objective is not below the bound."""
    draw = random.Random(seed)
    names = [f"i{index}/{gpu}" for index in range(3) for gpu in range(2)]
    pieces = [
        piece(draw.choice(names), sorted(draw.sample(names, draw.randrange(4))), draw.randrange(1, 9), str(number))
        for number in range(12)
    ]
    chosen, report = choose_sources(pieces, doomed={GpuId("i0/0")}, solver="maxflow")
    by_layer = {p.layer: p for p in pieces}
    assert all(
        (t.source in by_layer[t.layer].holders) if by_layer[t.layer].holders else t.source is None for t in chosen
    )
    assert report.objective >= report.bound


def test_doomed_holder_is_second_choice() -> None:
    """Tests that of two equally loaded holders the one that stays is asked."""
    chosen, _ = choose_sources([piece("i3/0", ["i1/0", "i2/0"], 5)], doomed={GpuId("i1/0")}, solver="maxflow")
    assert chosen[0].source == "i2/0"


def test_same_instance_needs_no_port() -> None:
    """Tests that a sibling GPU is preferred and loads no network port."""
    chosen, report = choose_sources([piece("i1/1", ["i0/0", "i1/0"], 5)], doomed=(), solver="maxflow")
    assert ("i1/0", 0, 0) == (chosen[0].source, report.objective, report.bound)


def test_pieces_are_cut_where_holders_end() -> None:
    """Tests that a range held half by one GPU and half by another comes in two pieces, and a held-nowhere one bare."""
    catalog = Catalog(tiny_model())
    name = "model.layers.0.mlp.up_proj.weight"
    pieces = cut_pieces(
        catalog,
        {GpuId("i9/0"): {name: [(0, 192)]}},
        {GpuId("i1/0"): {name: [(0, 64)]}, GpuId("i2/0"): {name: [(32, 128)]}},
        [GpuId("i1/0"), GpuId("i2/0")],
    )
    assert {(): [(128, 192)], ("i1/0",): [(0, 32)], ("i1/0", "i2/0"): [(32, 64)], ("i2/0",): [(64, 128)]} == {
        one.holders: one.ranges[name] for one in pieces
    }


@pytest.mark.parametrize("kv_heads", [1, 2, 4, 8])
@pytest.mark.parametrize(
    ("old_shape", "new_shape"), [((2, 1), (2, 1)), ((1, 2), (2, 1)), ((2, 2), (3, 1)), ((1, 3), (2, 2))]
)
def test_rectangles_cover_each_position_once(
    kv_heads: int, old_shape: tuple[int, int], new_shape: tuple[int, int]
) -> None:
    """Tests that each (layer, kv head) of each new position arrives exactly once, from a GPU that has it."""
    model = tiny_model(kv_heads=kv_heads, num_layers=6)
    old = replica(
        "r1", [f"i{n}/0" for n in range(4)], pipeline=old_shape[0], tensor=old_shape[1], num_layers=6, kv_blocks=9
    )
    new = replica(
        "r2", [f"i{n}/0" for n in range(2, 6)], pipeline=new_shape[0], tensor=new_shape[1], num_layers=6, kv_blocks=9
    )
    cells = [
        (t.destination, layer, head)
        for t in kv_transfers(Catalog(model), model, old, new)
        for layer in range(*t.rectangle[0])
        for head in range(*t.rectangle[1])
    ]
    wanted = [
        (gpu, layer, head)
        for stage in new.stages
        for rank, gpu in enumerate(stage.gpus)
        for layer in range(*stage.layers)
        for head in range(*kv_head_range(model, tensor=new.tensor, rank=rank))
    ]
    assert sorted(wanted) == sorted(cells)


def test_what_a_gpu_has_stays_on_it() -> None:
    """Tests that a GPU that keeps its layers copies them to itself and asks nobody."""
    model = tiny_model()
    old = replica("r1", ["i0/0", "i1/0"], pipeline=2, tensor=1, num_layers=8, kv_blocks=9)
    new = replica("r2", ["i0/0", "i2/0"], pipeline=2, tensor=1, num_layers=8, kv_blocks=9)
    pairs = [(t.source, t.destination) for t in kv_transfers(Catalog(model), model, old, new)]
    assert pairs == [("i0/0", "i0/0"), ("i1/0", "i2/0")]
