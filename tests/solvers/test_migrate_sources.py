"""Migrate: from whom each range comes, and the proof that nobody could be faster."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from itertools import combinations, product

import numpy as np
import pytest
from ortools.linear_solver.python import model_builder

from spotserve.core.ids import GpuId, InstanceId, instance_of
from spotserve.errors import InvariantError
from spotserve.solvers.migrate import split
from spotserve.solvers.migrate.pieces import Demand, Piece, cut_pieces
from spotserve.solvers.migrate.ports import MAX_FLOW_BYTES, FixedCopy, SourceFlow, least_time, proved_time, traffic
from spotserve.solvers.migrate.sources import PAPER_SOLVERS, SOURCE_SOLVERS, choose_sources
from spotserve.solvers.migrate.split import PieceClass, prefix_split, proved_s
from spotserve.solvers.ranges import Catalog
from tests.planning_worlds import tiny_model
from tests.solvers.migrate_worlds import GB, catalog, delivered, piece, port_load, ports, problem, random_pieces, wanted

SPLITTING = ("layered", "maxflow", "prefix_lp")


def test_slices_at_one_holder_are_the_bottleneck() -> None:
    """Tests golden G7: two slices are only at instance 1, so its port needs 12 s; the first holder sends for 18 s."""
    pieces = (
        piece("i3/0", ["i1/0"], 6 * GB),
        piece("i4/0", ["i1/0"], 6 * GB),
        piece("i5/0", ["i1/0", "i2/0"], 6 * GB),
    )
    best = choose_sources(problem(*pieces), catalog(), "layered")
    assert ("optimal", 12 * GB, 12 * GB, 0.0) == (best.status, best.objective, best.bound, best.gap)
    assert {"kind": "out_ports", "ports": "i1", "bytes": 12 * GB, "bytes_per_s": GB} == best.certificate
    assert ["i2/0"] == [one.source for one in best.answer or () if one.destination == "i5/0"]
    naive = choose_sources(problem(*pieces), catalog(), "first_holder")
    assert ("feasible", 18 * GB, 12 * GB) == (naive.status, naive.objective, naive.bound)


@pytest.mark.parametrize("solver", SPLITTING)
def test_a_slice_is_split_over_its_holders(solver: str) -> None:
    """Tests golden G8: three slices at the same two holders take 9 s if one of them is split, 12 s if none is."""
    pieces = [piece(f"i{index}/0", ["i1/0", "i2/0"], 6 * GB, layer=index) for index in (3, 4, 5)]
    whole = min(max(chosen.count(1), chosen.count(2)) * 6 for chosen in product((1, 2), repeat=3))
    slow_storage = ports(storage=1)
    result = choose_sources(problem(*pieces, ports_=slow_storage), catalog(), solver)
    assert (12, 9 * GB, 1) == (whole, port_load(result.answer or ()), result.statistics["split"])
    assert abs(result.objective - 9 * GB) <= 2 * 10**6
    assert abs(result.bound - 9 * GB) <= 2 * 10**6
    assert wanted(pieces) == delivered(result.answer or ())


def test_storage_takes_over_what_one_port_cannot_send() -> None:
    """Tests golden G9: 12 GB at one holder and storage of 1 GB/s for all take 6 s; without storage 12 s."""
    pieces = (piece("i2/0", ["i1/0"], 6 * GB), piece("i3/0", ["i1/0"], 6 * GB, layer=1))
    both = choose_sources(problem(*pieces, ports_=ports(storage_total=GB)), catalog(), "prefix_lp")
    assert (6.0, 6.0) == (round(both.objective / GB, 2), round(both.bound / GB, 2))
    assert "port_prices" == both.certificate["kind"] or "in_port" == both.certificate["kind"]
    assert 6 * GB == sum(one.bytes for one in both.answer or () if one.source is None)
    assert 12 * GB == choose_sources(problem(*pieces), catalog(), "layered").objective


def test_storage_relieves_an_in_port_beside_kv() -> None:
    """Tests that KV of 4 GB leaves an in-port 2 s for weights, and that storage brings the rest in the same 6 s."""
    kv = [FixedCopy(InstanceId("i1"), InstanceId("i3"), 4 * GB)]
    result = choose_sources(problem(piece("i3/0", ["i2/0"], 8 * GB), fixed=kv), catalog(), "prefix_lp")
    assert (6.0, 6.0) == (round(result.objective / GB, 2), round(result.bound / GB, 2))
    assert 6 * GB == sum(one.bytes for one in result.answer or () if one.source is None and one.by_choice)


def test_unequal_ports_share_by_their_rates() -> None:
    """Tests that two holders of 1 and 2 GB/s send 12 GB in 4 s, and that the certificate names their joint rate."""
    pieces = [piece(f"i{index}/0", ["i1/0", "i2/0"], 3 * GB, layer=index) for index in (3, 4, 5, 6)]
    for solver in ("layered", "maxflow"):
        result = choose_sources(problem(*pieces, ports_=ports(rates={"i2": 2 * GB})), catalog(), solver)
        sent = {name: sum(t.bytes for t in result.answer or () if t.source == f"{name}/0") for name in ("i1", "i2")}
        assert {"i1": 4 * GB, "i2": 8 * GB} == sent
        assert (4 * GB, 3 * GB) == (result.objective, result.certificate["bytes_per_s"])


def test_a_coefficient_changes_the_sources() -> None:
    """Tests that a port's rate and a piece's bytes decide who sends."""
    pieces = (piece("i3/0", ["i1/0", "i2/0"], 6 * GB), piece("i4/0", ["i1/0"], 4 * GB, layer=1))

    def sender(slow: str, second: int) -> list[GpuId | None]:
        changed = (pieces[0], piece("i4/0", ["i1/0"], second * GB, layer=1))
        result = choose_sources(problem(*changed, ports_=ports(rates={slow: GB // 10})), catalog(), "layered")
        return sorted({one.source for one in result.answer or () if one.destination == "i3/0"})

    assert sender("i9", 4) == ["i1/0", "i2/0"] or sender("i9", 4) == ["i2/0"]
    assert sender("i1", 4) == ["i2/0"]
    assert "i1/0" in sender("i2", 1)


@pytest.mark.parametrize("round_", range(30))
def test_bound_is_flow_lp_glop_and_hall_sets(rng: random.Random, round_: int) -> None:
    """Tests that max-flow, HiGHS, GLOP and the worst of all Hall sets and in-ports are one number."""
    pieces = random_pieces(rng, num_pieces=rng.randint(1, 8))
    load, free = traffic(pieces, ()), ports(storage=1)
    ticks, certificate = least_time(load, free)
    in_ports = [sum(one.bytes for one in pieces if one.destination == f"i{3 + index}/0") for index in range(3)]
    hall = [
        -(-sum(one.bytes for one in group) // len({port for one in group for port in one.ports}))
        for count in range(1, len(pieces) + 1)
        for group in combinations(pieces, count)
    ]
    assert max(*in_ports, *hall) == ticks == proved_time(certificate, load, free)
    sizes = {PieceClass(0, holders): size for holders, size in load.out_bytes.items()}
    lp = prefix_split(sizes, free, in_bytes=[load.in_bytes])
    assert abs(lp.times_s[-1] * GB - ticks) <= 1e-6 * ticks
    assert abs(_glop_s(pieces) * GB - ticks) <= 1e-6 * ticks


@pytest.mark.parametrize("round_", range(12))
def test_bound_with_unequal_ports_is_the_lp(rng: random.Random, round_: int) -> None:
    """Tests max-flow = HiGHS and the certificate where every instance has a rate of its own."""
    pieces = random_pieces(rng, num_pieces=8)
    free = ports(storage=1, rates={f"i{index}": rng.randint(1, 40) * GB // 10 for index in range(6)})
    load = traffic(pieces, ())
    ticks, certificate = least_time(load, free)
    sizes = {PieceClass(0, holders): size for holders, size in load.out_bytes.items()}
    lp = prefix_split(sizes, free, in_bytes=[load.in_bytes])
    assert abs(lp.times_s[-1] * GB - ticks) <= 1e-6 * ticks
    assert ticks == proved_time(certificate, load, free)
    for solver in SPLITTING[:2]:
        result = choose_sources(problem(*pieces, ports_=free), catalog(), solver)
        assert ticks <= result.objective <= ticks * 1.02
        assert wanted(pieces) == delivered(result.answer or ())


def _glop_s(pieces: list[Piece]) -> float:
    """The least makespan in seconds by OR-Tools GLOP, ports of 1 GB/s."""
    model = model_builder.Model()
    time = model.new_num_var(0, float("inf"), "time")
    sent = {(n, port): model.new_num_var(0, float("inf"), "") for n, one in enumerate(pieces) for port in one.ports}
    for number, one in enumerate(pieces):
        model.add(sum(sent[number, port] for port in one.ports) == one.bytes / GB)
    for port in sorted({port for _, port in sent}):
        model.add(sum(var for (_, sender), var in sent.items() if sender == port) <= time)
    for port in sorted({instance_of(one.destination) for one in pieces}):
        model.add(time >= sum(one.bytes for one in pieces if instance_of(one.destination) == port) / GB)
    model.minimize(time)
    solver = model_builder.Solver("glop")
    status = solver.solve(model)
    assert model_builder.SolveStatus.OPTIMAL == status
    return float(solver.objective_value)


@pytest.mark.parametrize("solver", SOURCE_SOLVERS)
@pytest.mark.parametrize("round_", range(6))
def test_every_row_arrives_once_from_a_holder(rng: random.Random, solver: str, round_: int) -> None:
    """Tests coverage and holders of every solver's answer, and that none is below its bound."""
    pieces = random_pieces(rng, num_pieces=6, stages=2)
    pieces.append(piece("i4/0", [], 2 * GB, layer=7))
    pieces.append(piece("i2/1", ["i2/0", "i1/0"], 3 * GB, layer=6))
    result = choose_sources(problem(*pieces), catalog(), solver)
    assert result.answer is not None
    assert wanted(pieces) == delivered(result.answer)
    holders = {(one.destination, one.parts[0].layer): set(one.holders) for one in pieces}
    for one in result.answer:
        for part in one.parts:
            allowed = holders[one.destination, part.layer]
            assert one.source in allowed or (one.source is None and (not allowed or solver == "prefix_lp"))
    assert result.objective >= result.bound
    assert (result.status == "optimal") == (result.objective <= result.bound)
    assert {one.source for one in result.answer if one.destination == "i2/1"} == {"i2/0"} or solver in (
        "first_holder",
        *PAPER_SOLVERS,
    )


@pytest.mark.parametrize("round_", range(10))
def test_more_of_anything_never_takes_longer(rng: random.Random, round_: int) -> None:
    """Tests that a holder or bandwidth more never raises the least time, and that a piece more never lowers it."""
    pieces = random_pieces(rng, num_pieces=6)
    least = least_time(traffic(pieces, ()), ports())[0]
    richer = list(pieces)
    number = rng.randrange(len(pieces))
    old = pieces[number]
    richer[number] = piece(old.destination, [*old.holders, "i9/0"], old.bytes, layer=number)
    assert least_time(traffic(richer, ()), ports())[0] <= least
    faster = ports(rates={f"i{rng.randrange(6)}": 2 * GB})
    assert least_time(traffic(pieces, ()), faster)[0] <= least
    more = [*pieces, piece("i5/0", ["i0/0"], GB, layer=9)]
    assert least_time(traffic(more, ()), ports())[0] >= least


@pytest.mark.parametrize("round_", range(8))
def test_prefix_times_rise_and_meet_their_bounds(rng: random.Random, round_: int) -> None:
    """Tests T_0 <= ... <= T_P = T*, each T_s at least the bound of its prefix alone, and the proof of the prices."""
    pieces = random_pieces(rng, num_pieces=8, stages=3)
    fixed = [FixedCopy(InstanceId("i0"), InstanceId("i4"), 2 * GB)]
    free = ports(storage=1)
    sizes = {PieceClass(0, (InstanceId("i0"),)): 2 * GB}
    in_bytes = [dict(traffic((), fixed).in_bytes)]
    for one in pieces:
        key = PieceClass(1 + one.stage, one.ports)
        sizes[key] = sizes.get(key, 0) + one.bytes
    for stage in range(3):
        in_bytes.append(dict(traffic([one for one in pieces if one.stage == stage], ()).in_bytes))
    lp = prefix_split(sizes, free, in_bytes=in_bytes)
    assert list(lp.times_s) == sorted(lp.times_s)
    for prefix, time in enumerate(lp.times_s):
        load = traffic([one for one in pieces if one.stage < prefix], fixed)
        assert time * GB >= least_time(load, free)[0] * (1 - 1e-6)
    whole = least_time(traffic(pieces, fixed), free)[0]
    assert abs(lp.times_s[-1] * GB - whole) <= 1e-6 * whole
    assert lp.bound_s <= lp.times_s[-1] * (1 + 1e-6)
    for one, size in sizes.items():
        assert sum(lp.shares[one].values()) == pytest.approx(size, abs=10)


@pytest.mark.parametrize("round_", range(5))
def test_prefix_times_need_no_stretch(rng: random.Random, round_: int) -> None:
    """Tests against the interval LP: a fluid schedule meets all prefix times at once, and they cannot all shrink."""
    pieces = random_pieces(rng, num_pieces=6, stages=2)
    sizes: dict[PieceClass, int] = {}
    for one in pieces:
        sizes[PieceClass(one.stage, one.ports)] = sizes.get(PieceClass(one.stage, one.ports), 0) + one.bytes
    by_stage = [traffic([one for one in pieces if one.stage == stage], ()).in_bytes for stage in range(2)]
    lp = prefix_split(sizes, ports(storage=1), in_bytes=by_stage)
    assert _stretch(pieces, lp.times_s) == pytest.approx(1.0, abs=1e-6)


def _stretch(pieces: list[Piece], times_s: tuple[float, ...]) -> float:
    """The least factor on the times at which pieces of stage s can be sent within the intervals up to s."""
    model = model_builder.Model()
    factor = model.new_num_var(0, float("inf"), "factor")
    loads: dict[tuple[int, str, str], list[object]] = {}
    for one in pieces:
        parts = []
        for interval in range(one.stage + 1):
            for port in one.ports:
                part = model.new_num_var(0, float("inf"), "")
                parts.append(part)
                loads.setdefault((interval, "out", port), []).append(part)
                loads.setdefault((interval, "in", instance_of(one.destination)), []).append(part)
        model.add(sum(parts) == one.bytes / GB)
    for (interval, _, _), sent in loads.items():
        length = times_s[interval] - (times_s[interval - 1] if interval else 0.0)
        model.add(sum(sent) <= length * factor)
    model.minimize(factor)
    solver = model_builder.Solver("glop")
    assert model_builder.SolveStatus.OPTIMAL == solver.solve(model)
    return float(solver.objective_value)


def test_prices_prove_a_time_without_a_solver() -> None:
    """Tests the duality bound by hand: a byte that only a priced port can send is worth its price."""
    sizes = {PieceClass(0, (InstanceId("i1"),)): 12 * GB, PieceClass(0, (InstanceId("i1"), InstanceId("i2"))): 6 * GB}
    assert 12.0 == proved_s({("out", InstanceId("i1")): 1.0}, sizes, ports(), in_bytes={})
    assert 9.0 == proved_s(
        {("out", InstanceId("i1")): 1.0, ("out", InstanceId("i2")): 1.0}, sizes, ports(), in_bytes={}
    )
    assert 0.0 == proved_s({}, sizes, ports(), in_bytes={})


def test_kv_that_moves_anyway_turns_sources_away() -> None:
    """Tests that weights come from the holder whose port no KV passes, and that the KV counts in the bound."""
    fixed = [FixedCopy(InstanceId("i1"), InstanceId("i4"), 5 * GB)]
    result = choose_sources(problem(piece("i3/0", ["i1/0", "i2/0"], 4 * GB), fixed=fixed), catalog(), "layered")
    assert (["i2/0"], 5 * GB) == ([one.source for one in result.answer or ()], result.objective)


def test_doomed_holder_is_second_choice() -> None:
    """Tests that of two equally loaded holders the one that stays is asked."""
    result = choose_sources(problem(piece("i3/0", ["i1/0", "i2/0"], GB), doomed=["i1/0"]), catalog(), "layered")
    assert ["i2/0"] == [one.source for one in result.answer or ()]


def test_a_crumb_goes_with_a_transfer_that_is_made_anyway() -> None:
    """Tests that less than a megabyte opens no pair of its own, however busy the port is."""
    small = piece("i3/0", ["i1/0", "i2/0"], 10**6, layer=1)
    result = choose_sources(problem(piece("i3/0", ["i1/0"], 4 * GB), small), catalog(), "layered")
    assert [("i1/0", 4 * GB + 10**6)] == [(one.source, one.bytes) for one in result.answer or ()]


def test_nothing_to_fetch_is_an_empty_plan() -> None:
    """Tests that a GPU that keeps its content fetches nothing: T = 0, proven."""
    held = {GpuId("i1/0"): {"model.layers.0.mlp.up_proj.weight": [(0, 192)]}}
    pieces = cut_pieces(Catalog(tiny_model()), [Demand(GpuId("i1/0"), 0, held[GpuId("i1/0")])], held, [GpuId("i1/0")])
    for solver in SOURCE_SOLVERS:
        result = choose_sources(problem(*pieces), catalog(), solver)
        assert ((), "optimal", 0, 0) == (result.answer, result.status, result.objective, result.bound)


def test_too_many_bytes_are_refused() -> None:
    """Tests that a flow that would overflow is refused before it is solved, with the number and its limit."""
    with pytest.raises(InvariantError, match=str(MAX_FLOW_BYTES)):
        SourceFlow({(InstanceId("i1"),): MAX_FLOW_BYTES}, ports(), 1)


def test_an_unsolved_lp_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests that the LP's status is looked at: an answer that is not optimal is never used."""
    solved = split.linprog

    def gives_up(*args: object, **options: object) -> object:
        result = solved(*args, **options)
        result.status, result.message = 1, "iteration limit reached"
        return result

    monkeypatch.setattr(split, "linprog", gives_up)
    sizes = {PieceClass(0, (InstanceId("i1"), InstanceId("i2"))): GB, PieceClass(0, (InstanceId("i2"),)): 3 * GB}
    with pytest.raises(InvariantError, match="prefix LP"):
        prefix_split(sizes, ports(), in_bytes=[{}])


def test_pieces_are_cut_where_holders_end() -> None:
    """Tests that a range held half by one GPU and half by another comes in two pieces, and a held-nowhere one bare."""
    name = "model.layers.0.mlp.up_proj.weight"
    first, second = GpuId("i1/0"), GpuId("i2/0")
    pieces = cut_pieces(
        Catalog(tiny_model()),
        [Demand(GpuId("i9/0"), 0, {name: [(0, 192)]})],
        {first: {name: [(0, 64)]}, second: {name: [(32, 128)]}},
        [first, second],
    )
    assert {(): [(128, 192)], (first,): [(0, 32)], (first, second): [(32, 64)], (second,): [(64, 128)]} == {
        one.holders: one.parts[0].ranges[name] for one in pieces
    }


def test_what_a_gpu_holds_is_not_fetched_unless_it_goes() -> None:
    """Tests that a GPU fetches only what it lacks, and all of it where its content is released first."""
    name = "model.layers.0.mlp.up_proj.weight"
    first, second = GpuId("i1/0"), GpuId("i2/0")
    held = {first: {name: [(0, 64)]}, second: {name: [(0, 128)]}}
    demands = [Demand(first, 0, {name: [(0, 128)]})]
    lacking = cut_pieces(Catalog(tiny_model()), demands, held, [first, second])
    assert [((second,), {name: [(64, 128)]})] == [(one.holders, one.parts[0].ranges) for one in lacking]
    everything = cut_pieces(Catalog(tiny_model()), demands, held, [first, second], freed=frozenset({first}))
    assert [(0, 64), (64, 128)] == sorted(run for one in everything for run in one.parts[0].ranges[name])
    assert all(first not in one.holders for one in everything)
    # A GPU that may send nothing still keeps what it has.
    kept = cut_pieces(Catalog(tiny_model()), demands, held, [])
    assert [((), {name: [(64, 128)]})] == [(one.holders, one.parts[0].ranges) for one in kept]


@pytest.mark.thorough
def test_same_sources_in_any_process(seed: int) -> None:
    """Tests that three processes with different hash seeds choose the same sources, splits included."""
    program = (
        "import random\n"
        "from spotserve.solvers.migrate.sources import choose_sources\n"
        "from tests.solvers.migrate_worlds import catalog, problem, random_pieces\n"
        f"pieces = random_pieces(random.Random({seed}), num_pieces=12, stages=3)\n"
        "for solver in ('layered', 'maxflow', 'prefix_lp'):\n"
        "    print(choose_sources(problem(*pieces), catalog(), solver))\n"
    )
    answers = {
        subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "PYTHONHASHSEED": str(hash_seed)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for hash_seed in (0, 1, 2)
    }
    assert 1 == len(answers)
    assert "Transfer" in answers.pop()


def test_a_large_problem_meets_its_bound() -> None:
    """Tests that 600 pieces at 64 ports are spread to within a percent of the bound."""
    draw = np.random.default_rng(5)
    pieces = [
        piece(
            f"i{64 + int(draw.integers(64))}/0",
            [f"i{port}/0" for port in sorted(int(one) for one in draw.choice(64, size=8, replace=False))],
            int(draw.integers(1, 9)) * GB,
            layer=number % 8,
            stage=number % 4,
        )
        for number in range(600)
    ]
    result = choose_sources(problem(*pieces), catalog(), "maxflow")
    assert result.objective <= 1.01 * result.bound
