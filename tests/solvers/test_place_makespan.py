"""Makespan: least time of the busiest port, against trying every placement, and proven by certificates."""

from __future__ import annotations

import hashlib
import os
import random
import subprocess
import sys
from dataclasses import replace
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest

from spotserve.errors import InvariantError
from spotserve.solvers.place import PlacementProblem, makespan, place
from spotserve.solvers.place.groups import Prices
from spotserve.solvers.place.joint import solve_jointly
from spotserve.solvers.place.ports import Load, look_at_ports
from spotserve.solvers.place.problem import overlaps
from spotserve.solvers.place.search import fetches, repair, search, weigh
from spotserve.solvers.place.seating import Arcs, costs_of, seat_for_bottleneck, seat_groups
from tests.solvers.placement_worlds import makespan_of, piecewise, reshaped, scattered

ROOT = Path(__file__).parents[2]


def parts_of(problem: PlacementProblem, gpus: tuple[str, ...]) -> int:
    """Instances that tensor groups touch, over all groups."""
    size = problem.tensor
    return sum(len({gpu.split("/")[0] for gpu in gpus[start : start + size]}) for start in range(0, len(gpus), size))


def least_by_trying(problem: PlacementProblem) -> int:
    """The least makespan of all placements that split as few groups as possible."""
    placements = list(permutations(problem.gpus, problem.num_positions))
    least = min(parts_of(problem, gpus) for gpus in placements)
    seen: dict[tuple[str, ...], int] = {}
    for gpus in placements:
        where = tuple(gpu.split("/")[0] for gpu in gpus)
        if where not in seen and parts_of(problem, gpus) == least:
            seen[where] = makespan_of(problem, gpus)
    return min(seen.values())


@pytest.mark.parametrize("instances", [[0, 1, 2, 3, 4], [0, 0, 1, 1, 2], [0, 0, 0, 1, 1]])
@pytest.mark.parametrize("case", range(6))
def test_equals_trying_everything(rng: random.Random, instances: list[int], case: int) -> None:
    """Tests that the makespan is the least possible, said to be optimal, and equal to its bound."""
    world = piecewise(rng, instances=instances, positions=4)
    result = place(world, "makespan")
    assert ("optimal", 0.0) == (result.status, result.gap)
    assert least_by_trying(world) == result.objective == result.bound


@pytest.mark.parametrize("case", range(4))
def test_equals_trying_everything_with_groups(rng: random.Random, case: int) -> None:
    """Tests the same where pairs of ranks have to share an instance and KV follows its replica."""
    positions = [*rng.sample(range(4), 4), None, None]
    world = reshaped(
        (2, 2, 1),
        (1, 2, 2),
        layers=4,
        positions=positions,
        instances=[0, 0, 1, 1, 2, 2],
        granule_bytes=3,
        kv_tokens=[rng.randrange(5), rng.randrange(5)],
    )
    result = place(world, "makespan")
    assert ("optimal", least_by_trying(world)) == (result.status, result.objective)


@pytest.mark.parametrize("case", range(4))
def test_kv_that_ranks_share_comes_to_each(rng: random.Random, case: int) -> None:
    """Tests the same where both ranks of a stage need all of its KV: not passed on, it passes the port twice."""
    world = reshaped(
        (2, 2, 1),
        (1, 2, 2),
        layers=4,
        positions=[*rng.sample(range(4), 4), None, None],
        instances=[0, 0, 1, 1, 2, 2],
        granule_bytes=1,
        kv_tokens=[rng.randrange(3, 9), rng.randrange(3, 9)],
    )
    alike = world.contents.kv_needed.reshape(2, 2, -1).any(axis=1).repeat(2, axis=0)
    assert alike.sum() == 2 * world.contents.kv_needed.sum()
    world = replace(world, contents=replace(world.contents, kv_needed=alike))
    result = place(world, "makespan")
    assert ("optimal", least_by_trying(world)) == (result.status, result.objective)


def test_repair_empties_an_instance_of_a_stage() -> None:
    """Tests that a blank instance with two stages of two replicas each ends with one stage, fetched once for all four.

    No single swap helps: only the last part of a stage takes its weights along.
    """
    world = reshaped(
        (2, 2, 1),
        (4, 2, 1),
        layers=2,
        positions=[0, 1, 2, 3, None, None, None, None],
        instances=[0, 0, 0, 0, 1, 1, 1, 1],
        granule_bytes=7,
    )
    ports = look_at_ports(world)
    seating = seat_groups(world, ports, overlaps(world))
    start = np.array([0, 0, 0, 0, 1, 1, 1, 1])
    assert weigh(ports, seating.parts, start).bottleneck.num_bytes == 14
    assert weigh(ports, seating.parts, repair(seating, start, ports.num_gpus)).bottleneck.num_bytes == 7
    assert place(world, "makespan", budget=0).objective == 7


def test_what_has_to_leave_bounds_without_a_search() -> None:
    """Tests that the polynomial path alone proves a doomed instance's out-port: two stages of 7 bytes only it has."""
    world = reshaped(
        (1, 2, 1),
        (1, 2, 1),
        layers=2,
        positions=[None, None, 0, 1],
        instances=[0, 1, 2, 2],
        granule_bytes=7,
        num_senders=2,
    )
    result = place(world, "makespan", budget=0)
    assert ("optimal", 14, 14) == (result.status, result.objective, result.bound)
    assert {"kind": "out_ports", "ports": "i2", "bytes": 14} == result.certificate


@pytest.mark.parametrize("case", range(6))
def test_bounds_hold(rng: random.Random, case: int) -> None:
    """Tests that every bound is below what any method finds, and each stage no worse than the one before."""
    world = scattered(rng, num_gpus=24, per_instance=4)
    ports, shared = look_at_ports(world), overlaps(world)
    seating = seat_groups(world, ports, shared)
    dearest = seat_for_bottleneck(ports, seating)
    assert dearest is not None
    first = weigh(ports, seating.parts, seating.where)
    repaired = weigh(ports, seating.parts, repair(seating, seating.where, ports.num_gpus))
    needed = fetches(seating.prices)
    assert needed.received(repaired.where).max() <= needed.received(seating.where).max()
    found = search(ports, seating, first, bound=0, evaluations=200).best
    assert found.bottleneck.num_bytes <= first.bottleneck.num_bytes
    most = found.bottleneck.num_bytes
    joint = solve_jointly(ports, seating, found.where, most=most, budget=1.0)
    best = weigh(ports, seating.parts, joint.where).bottleneck.num_bytes
    assert max(makespan.least_bytes(ports, seating), dearest[1], joint.bound) <= best <= most
    fast = place(world, "makespan", budget=0)
    assert fast.bound <= best <= fast.objective


def test_coarse_units_stay_honest(rng: random.Random) -> None:
    """Tests that with sizes far beyond the model's units the bound is still below the objective, and near it."""
    for _ in range(4):
        world = piecewise(rng, instances=[0, 0, 1, 1, 2], positions=4)
        sizes = np.array([rng.randrange(2**36, 2**38) for _ in world.contents.weight_bytes], np.int64)
        world = replace(world, contents=replace(world.contents, weight_bytes=sizes))
        result = place(world, "makespan")
        least = least_by_trying(world)
        assert result.bound <= least <= result.objective
        assert result.objective <= least * 1.0001
        assert result.gap < 1e-4


# -- certificates -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", range(8))
def test_certificate_checks_without_a_solver(rng: random.Random, case: int) -> None:
    """Tests that the named ports alone explain the makespan: what only they hold, or what one receives."""
    world = scattered(rng, num_gpus=16, per_instance=2)
    ports, shared = look_at_ports(world), overlaps(world)
    seating = seat_groups(world, ports, shared)
    load = ports.load(seating.parts.spread(seating.where))
    worst = ports.bottleneck(load)
    if worst.is_in_port:
        assert load.received[worst.ports[0]] == worst.num_bytes == worst.total_bytes
    else:
        holders = ports.holders[list(worst.classes)].any(axis=0)
        assert set(np.flatnonzero(holders)) == set(worst.ports)
        assert int(load.sent[list(worst.classes)].sum()) == worst.total_bytes
        assert -(-worst.total_bytes // len(worst.ports)) == worst.num_bytes


def test_certificate_names_the_in_port() -> None:
    """Tests that the report says which instance receives most, and how much."""
    case = reshaped((1, 1, 1), (2, 1, 1), layers=2, positions=[0, None], granule_bytes=5)
    result = place(case, "makespan")
    assert {"kind": "in_port", "port": "i1", "bytes": 10} == result.certificate


def test_certificate_names_the_out_ports() -> None:
    """Tests that where one holder has to send to many, its out-port is named with what it alone holds."""
    case = reshaped((1, 1, 1), (4, 1, 1), layers=2, positions=[0, None, None, None], granule_bytes=5)
    result = place(case, "makespan")
    assert {"kind": "out_ports", "ports": "i0", "bytes": 30} == result.certificate
    assert (30, "optimal") == (result.objective, result.status)


def test_instances_fetch_once(rng: random.Random) -> None:
    """Tests that two replicas on one blank instance fetch their weights once, and are put there for it."""
    case = reshaped(
        (1, 1, 1), (3, 1, 1), layers=2, positions=[0, None, None, None], instances=[0, 1, 1, 2], granule_bytes=5
    )
    result = place(case, "makespan")
    assert (10, {"i0/0", "i1/0", "i1/1"}) == (result.objective, set(result.answer.gpus))  # type: ignore[union-attr]


# -- properties ---------------------------------------------------------------------------------------------


def test_more_holders_never_slow(rng: random.Random) -> None:
    """Tests that a piece held by one GPU more never raises the least makespan."""
    world = piecewise(rng, instances=[0, 1, 2, 2], positions=3)
    least = place(world, "makespan").objective
    for row, piece in np.argwhere(~world.contents.weight_held)[:8]:
        held = world.contents.weight_held.copy()
        held[row, piece] = True
        # A piece that nobody held came from storage and loaded no out-port, so only further holders can but help.
        if world.contents.weight_held[:, piece].any():
            more = replace(world, contents=replace(world.contents, weight_held=held))
            assert place(more, "makespan").objective <= least


def test_more_demand_never_speeds(rng: random.Random) -> None:
    """Tests that a position that needs one piece more never lowers the least makespan."""
    world = piecewise(rng, instances=[0, 1, 2, 2], positions=3)
    least = place(world, "makespan").objective
    for seat, piece in np.argwhere(~world.contents.weight_needed)[:6]:
        needed = world.contents.weight_needed.copy()
        needed[seat, piece] = True
        more = replace(world, contents=replace(world.contents, weight_needed=needed))
        assert place(more, "makespan").objective >= least


def test_scale(rng: random.Random) -> None:
    """Tests that bytes a thousand times as large give the same placement and a makespan a thousand times as long."""
    world = piecewise(rng, instances=[0, 0, 1, 1], positions=4)
    large = replace(world, contents=replace(world.contents, weight_bytes=1000 * world.contents.weight_bytes))
    small, scaled = place(world, "makespan"), place(large, "makespan")
    assert small.answer == scaled.answer
    assert 1000 * small.objective >= scaled.objective > 1000 * (small.objective - 1)


def test_the_budget_is_only_for_the_joint_model(rng: random.Random) -> None:
    """Tests that without a budget, and beyond the size, the polynomial answer stands with its true gap."""
    world = scattered(rng, num_gpus=24, per_instance=4)
    fast = place(world, "makespan", budget=0)
    assert "joint_branches" not in fast.statistics
    assert (fast.status == "optimal") == (fast.bound == fast.objective)


def test_joint_model_stops_at_its_size(monkeypatch: pytest.MonkeyPatch, rng: random.Random) -> None:
    """Tests that the joint model is not built beyond the bound on GPUs."""
    world = scattered(rng, num_gpus=24, per_instance=4)
    monkeypatch.setattr(makespan, "MAX_JOINT_GPUS", 4)
    assert "joint_branches" not in place(world, "makespan").statistics


# -- guards -------------------------------------------------------------------------------------------------


def test_flow_statuses_are_looked_at() -> None:
    """Tests that unbalanced supplies and costs out of range are our bug, not an answer."""
    unbalanced = Arcs()
    unbalanced.add(np.array([0]), np.array([1]), 1, np.array([3]))
    with pytest.raises(InvariantError, match="min-cost flow answered"):
        unbalanced.solve(np.array([1, 0]))
    dear = Arcs()
    dear.add(np.array([0]), np.array([1]), 1, np.array([2**61]))
    with pytest.raises(InvariantError, match="min-cost flow answered"):
        dear.solve(np.array([1, -1]))


def test_costs_stay_in_the_flow_solvers_range(rng: random.Random) -> None:
    """Tests that prices of any size become costs that the flow solver can scale."""
    kinds, parts, instances = 3, 40, 9
    huge = np.array([[rng.randrange(2**48, 2**50) for _ in range(kinds)] for _ in range(instances)], np.int64)
    prices = Prices(
        weights_fetched=huge,
        squeezed=np.array([[rng.randrange(3) for _ in range(kinds)] for _ in range(instances)], np.int64),
        weights_reused=huge[::-1],
        kind=np.arange(parts) % kinds,
        kv_bytes=np.full(parts, 2**47 + 1, np.int64),
        kv_present=np.full((instances, parts), 2**40 + 1, np.int64),
        kv_reused=np.full((instances, parts), 2**40 + 3, np.int64),
        stayed=np.ones((instances, parts), np.int64),
    )
    plain, own, saved = costs_of(prices)
    nodes = parts + kinds + instances + 2
    assert (int(np.abs(plain).max()) + int(own.max()) + int(saved.max())) * nodes < 2**62
    order = np.argsort(prices.squeezed, axis=0, kind="stable")
    assert (np.diff(np.take_along_axis(prices.squeezed, order, axis=0), axis=0) >= 0).all()
    for kind in range(kinds):
        for one in range(instances):
            for other in range(instances):
                if prices.squeezed[one, kind] < prices.squeezed[other, kind]:
                    assert plain[one, kind] < plain[other, kind]


def test_flows_of_too_many_bytes_are_refused() -> None:
    """Tests the guard against a max flow beyond 64 bits, which answers with a number all the same."""
    case = reshaped((1, 1, 1), (2, 1, 1), layers=1, positions=[0, None])
    ports = look_at_ports(case)
    with pytest.raises(InvariantError, match="too many for a max flow"):
        ports.bottleneck(Load(np.array([0, 5]), np.array([2**62])))


def test_contents_beyond_doubles_are_refused() -> None:
    """Tests that overlaps are refused where a double would round them."""
    case = reshaped((1, 1, 1), (1, 1, 1), layers=2, positions=[0], granule_bytes=2**52)
    with pytest.raises(AssertionError, match="not exact in doubles"):
        place(case, "makespan")


# -- determinism --------------------------------------------------------------------------------------------


def digest_of_placements() -> str:
    """What all solvers answer to a few worlds, as one digest."""
    lines = []
    for seed in range(4):
        world = scattered(random.Random(seed), num_gpus=16, per_instance=4)
        for solver in ("makespan", "reuse", "paper", "rank-order"):
            lines.append(repr(place(world, solver)))
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


@pytest.mark.thorough
def test_the_same_in_three_processes() -> None:
    """Tests that answers, statistics and certificates do not depend on the process or its hash seed."""
    code = "from tests.solvers.test_place_makespan import digest_of_placements; print(digest_of_placements())"
    digests = {digest_of_placements()}
    for seed in ("1", "31337"):
        done = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            cwd=ROOT,
            env={**os.environ, "PYTHONHASHSEED": seed},
            check=True,
        )
        digests.add(done.stdout.strip())
    assert len(digests) == 1


def test_senders_come_last() -> None:
    """Tests that the instance-level view keeps instances that may be placed before those that only send."""
    ports = look_at_ports(reshaped((2, 1, 1), (1, 1, 1), layers=1, positions=[0, 1], num_senders=1))
    assert (("i0", "i1"), 1) == (ports.instances, len(ports.num_gpus))
