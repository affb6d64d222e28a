"""Migrate: the list schedule of copies, and the rectangles of KV."""

from __future__ import annotations

import itertools
import random

import pytest
from ortools.sat.python import cp_model

from spotserve.core.ids import GpuId, InstanceId, instance_of
from spotserve.core.slices import kv_head_range
from spotserve.solvers.migrate.kv import kv_transfers
from spotserve.solvers.migrate.ports import FixedCopy
from spotserve.solvers.migrate.schedule import Copy, copy_ticks, list_schedule, makespan
from spotserve.solvers.migrate.sources import choose_sources
from spotserve.solvers.ranges import Catalog
from tests.planning_worlds import replica, tiny_model
from tests.solvers.migrate_worlds import GB, catalog, piece, ports, problem, random_pieces


def copy(source: str | None, destination: str, gigabytes: int, priority: int = 0) -> Copy:
    """A copy between two instances."""
    return Copy(None if source is None else InstanceId(source), InstanceId(destination), gigabytes * GB, priority)


def ends(copies: list[Copy]) -> list[float]:
    """When each copy ends, in seconds."""
    start = list_schedule(copies, ports())
    return [(begin + copy_ticks(one, ports())) / GB for one, begin in zip(copies, start, strict=True)]


def test_front_stages_first_costs_no_makespan() -> None:
    """Tests golden G10: stage 0 is ready after 4 s and stage 1 after 8 s, not both after 8 s."""
    assert [8.0, 4.0] == ends([copy("i1", "i3", 4, priority=2), copy("i1", "i2", 4, priority=1)])
    pieces = (piece("i3/0", ["i1/0"], 4 * GB, layer=1, stage=1), piece("i2/0", ["i1/0"], 4 * GB))
    result = choose_sources(problem(*pieces, ports_=ports(storage=1)), catalog(), "prefix_lp")
    assert ["i2/0", "i3/0"] == [one.destination for one in result.answer or ()]
    assert (0, 4, 8) == tuple(round(result.statistics[f"prefix_{number}_s"]) for number in range(3))
    assert 8 * GB == result.objective == result.statistics["scheduled"]
    assert 8 * GB * (1 - 1e-8) <= result.bound <= 8 * GB


def test_open_shop_meets_the_port_bound() -> None:
    """Tests golden G11: 2 x 2 copies of 3 s end after 6 s, and the cyclic 3 x 3 ones after 3 s."""
    square = [copy(source, destination, 3) for source in ("i0", "i1") for destination in ("i2", "i3")]
    assert 6.0 == max(ends(square))
    cyclic = [copy(f"i{n}", f"i{3 + n}", 2) for n in range(3)]
    cyclic += [copy(f"i{n}", f"i{3 + (n + 1) % 3}", 1) for n in range(3)]
    assert 3.0 == max(ends(cyclic))


def test_kv_goes_before_weights() -> None:
    """Tests that a port sends KV first: the weights that share it start when the KV is through."""
    kv = FixedCopy(InstanceId("i1"), InstanceId("i2"), 3 * GB)
    assert [3.0, 5.0] == ends([copy("i1", "i2", 3, priority=0), copy("i1", "i2", 2, priority=1)])
    result = choose_sources(problem(piece("i2/0", ["i1/0"], 2 * GB), fixed=[kv]), catalog(), "layered")
    assert 5 * GB == result.statistics["scheduled"]


@pytest.mark.parametrize("round_", range(20))
def test_no_port_carries_two_copies(rng: random.Random, round_: int) -> None:
    """Tests one copy per port and direction, no idle pair of ports, and an end below twice the bound."""
    copies = [
        copy(
            rng.choice([None, "i0", "i1", "i2"]),
            rng.choice(["i2", "i3", "i4"]),
            rng.randint(1, 9),
            priority=rng.randrange(3),
        )
        for _ in range(rng.randint(1, 25))
    ]
    start = list_schedule(copies, ports())
    spans: dict[tuple[str, str], list[tuple[int, int]]] = {}
    for one, begin in zip(copies, start, strict=True):
        if one.source == one.destination:
            assert begin == 0
            continue
        passed = [("storage" if one.source is None else "in", str(one.destination))]
        if one.source is not None:
            passed.append(("out", str(one.source)))
        for port in passed:
            spans.setdefault(port, []).append((begin, begin + copy_ticks(one, ports())))
    for busy in spans.values():
        busy.sort()
        assert all(before[1] <= after[0] for before, after in itertools.pairwise(busy))
    loads = {port: sum(end - begin for begin, end in busy) for port, busy in spans.items()}
    end = makespan(copies, start, ports())
    assert max(loads.values(), default=0) <= end <= 2 * max(loads.values(), default=0)
    for one, begin in zip(copies, start, strict=True):
        if one.source not in (None, one.destination) and begin:
            waited = [*spans["out", str(one.source)], *spans["in", str(one.destination)]]
            assert any(finish == begin for _, finish in waited)


@pytest.mark.parametrize("round_", range(5))
def test_schedule_against_cpsat(rng: random.Random, round_: int) -> None:
    """Tests that no schedule of whole copies is shorter than the bound, and the list's is at most twice the best."""
    copies = [
        copy(f"i{rng.randrange(3)}", f"i{3 + rng.randrange(3)}", rng.randint(1, 9)) for _ in range(rng.randint(2, 8))
    ]
    model = cp_model.CpModel()
    last = sum(one.bytes // GB for one in copies)
    begins = [model.new_int_var(0, last, "") for _ in copies]
    whole = [
        model.new_fixed_size_interval_var(begin, one.bytes // GB, "") for begin, one in zip(begins, copies, strict=True)
    ]
    for side in ("source", "destination"):
        for port in sorted({str(getattr(one, side)) for one in copies}):
            model.add_no_overlap([at for at, one in zip(whole, copies, strict=True) if getattr(one, side) == port])
    end = model.new_int_var(0, last, "")
    for begin, one in zip(begins, copies, strict=True):
        model.add(end >= begin + one.bytes // GB)
    model.minimize(end)
    solver = cp_model.CpSolver()
    solver.parameters.num_workers = 1
    assert cp_model.OPTIMAL == solver.solve(model)
    best = round(solver.objective_value)
    assert best <= max(ends(copies)) < 2 * best or best == max(ends(copies))


def test_schedule_serves_every_transfer() -> None:
    """Tests that the order of transfers is by start: front stages are never behind what starts later."""
    pieces = random_pieces(random.Random(3), num_pieces=20, stages=3)
    result = choose_sources(problem(*pieces), catalog(), "layered")
    answer = result.answer or ()
    copies = [
        Copy(
            None if one.source is None else instance_of(one.source), instance_of(one.destination), one.bytes, one.stage
        )
        for one in answer
    ]
    start = list_schedule(copies, ports())
    assert list(start) == sorted(start)
    assert result.statistics["scheduled"] <= 2 * result.bound


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
    held: dict[GpuId, set[tuple[int, int]]] = {
        gpu: {
            (layer, head)
            for layer in range(*stage.layers)
            for head in range(*kv_head_range(model, tensor=old.tensor, rank=rank))
        }
        for stage in old.stages
        for rank, gpu in enumerate(stage.gpus)
    }
    transfers = kv_transfers(Catalog(model), model, old, new)
    cells = []
    for one in transfers:
        for layer in range(*one.rectangle[0]):
            for head in range(*one.rectangle[1]):
                cells.append((one.destination, layer, head))
                assert (layer, head) in held[one.source]
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
