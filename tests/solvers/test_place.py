"""Place: the golden instances, groups kept whole, ties, and what the solvers promise each other."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment

from spotserve.core.ids import instance_of
from spotserve.solvers.place import PLACERS, PlacementProblem, place
from spotserve.solvers.place.assignment import assign
from spotserve.solvers.place.ports import look_at_ports
from spotserve.solvers.place.problem import Integers, overlaps
from spotserve.solvers.place.reuse import seat_for_reuse
from tests.solvers.placement_worlds import makespan_of, reshaped, scattered


def reuse_matrix(problem: PlacementProblem) -> Integers:
    """What every GPU has of every position."""
    return overlaps(problem).reuse(np.arange(len(problem.gpus)), np.arange(problem.num_positions))


def flat_reuse(problem: PlacementProblem) -> int:
    """The most that is reused if groups may be torn apart."""
    return assign(reuse_matrix(problem)).value


def grouped_reuse(problem: PlacementProblem) -> int:
    """The most found with every group whole."""
    return seat_for_reuse(problem, look_at_ports(problem), overlaps(problem)).reused_bytes


def bundled_reuse(problem: PlacementProblem) -> int:
    """The most with fixed bundles of consecutive groups, one bundle for each instance."""
    weights, ports = reuse_matrix(problem), look_at_ports(problem)
    rooms = [np.flatnonzero(ports.instance_of == number) for number in range(len(ports.num_gpus))]
    size = len(rooms[0]) // problem.tensor * problem.tensor
    bundles = [np.arange(a, min(a + size, problem.num_positions)) for a in range(0, problem.num_positions, size)]
    value = np.zeros((len(rooms), len(bundles)), np.int64)
    for row, gpus in enumerate(rooms):
        for column, positions in enumerate(bundles):
            inner = weights[np.ix_(gpus, positions)]
            value[row, column] = inner[linear_sum_assignment(inner, maximize=True)].sum()
    return int(value[linear_sum_assignment(value, maximize=True)].sum())


def groups(problem: PlacementProblem, gpus: Sequence[str]) -> list[set[str]]:
    """The instances that each tensor group touches."""
    size = problem.tensor
    return [{gpu.split("/")[0] for gpu in gpus[start : start + size]} for start in range(0, len(gpus), size)]


def placed(problem: PlacementProblem, solver: str = "makespan") -> tuple[str, ...]:
    """The GPUs of the answer."""
    answer = place(problem, solver).answer
    assert answer is not None
    return answer.gpus


# -- golden instances ---------------------------------------------------------------------------------------


def test_uneven_stages() -> None:
    """Tests G2: two stages of two layers become three of 2, 1, 1 on one blank GPU more: 3 layers stay."""
    case = reshaped((1, 2, 1), (1, 3, 1), layers=4, positions=[0, 1, None])
    assert reuse_matrix(case).tolist() == [[2, 0, 0], [0, 1, 1], [0, 0, 0]]
    assert place(case, "reuse").objective == 3


def test_shards_overlap() -> None:
    """Tests G3: halves of four layers overlap two quarters each: 8 granules of a quarter layer stay."""
    case = reshaped((1, 1, 2), (1, 1, 4), layers=4, positions=[0, 1, None, None])
    assert reuse_matrix(case)[0].tolist() == [4, 4, 0, 0]
    assert flat_reuse(case) == 8
    assert place(reshaped((1, 1, 2), (1, 1, 4), layers=4, positions=[0, 1, None, None]), "reuse").objective == 8


@pytest.mark.parametrize(("heirs", "value"), [([0, -1], 24), ([-1, 0], 30)])
def test_kv_chooses_the_heir(heirs: list[int], value: int) -> None:
    """Tests G4: of two replicas the one with more KV (5 against 2 per granule) is worth keeping: 30 against 24."""
    case = reshaped((2, 1, 1), (1, 1, 1), layers=2, positions=[0, 1], granule_bytes=10, kv_tokens=[2, 5], heirs=heirs)
    assert place(case, "reuse").objective == value
    assert placed(case, "reuse") == (("i0/0",) if heirs[0] == 0 else ("i1/0",))


def test_flat_is_not_deployable() -> None:
    """Tests G5: 4 half layers could stay if tensor groups were torn apart, 2 with each inside an instance."""
    case = reshaped((1, 4, 1), (1, 2, 2), layers=4, positions=[0, 2, 1, 3], instances=[0, 0, 1, 1])
    assert (4, 2) == (flat_reuse(case), grouped_reuse(case))
    result = place(case, "reuse")
    assert ("feasible", 2, 4) == (result.status, result.objective, result.bound)
    assert all(len(group) == 1 for group in groups(case, placed(case, "reuse")))


def test_fixed_bundles_lose_half() -> None:
    """Tests G6: an unchanged configuration whose bundles are spread: everything stays, bundled only half."""
    case = reshaped(
        (2, 2, 2), (2, 2, 2), layers=4, positions=[0, 1, 4, 5, 2, 3, 6, 7], instances=[0, 0, 0, 0, 1, 1, 1, 1]
    )
    assert (16, 16, 8) == (flat_reuse(case), grouped_reuse(case), bundled_reuse(case))
    assert place(case, "makespan").statistics["relabelled"] == 0


def test_reuse_is_not_makespan() -> None:
    """Tests G13: two stages of 4 GB go to two blank instances, not both to one: 4 GB, though both reuse 8 GB."""
    case = reshaped(
        (1, 4, 1),
        (1, 4, 1),
        layers=4,
        positions=[0, 1, None, None, None, None, 2, 3],
        instances=[0, 0, 1, 1, 2, 2, 3, 4],
        granule_bytes=4 * 10**9,
        num_senders=2,
    )
    result = place(case, "makespan")
    assert (4 * 10**9, "optimal", 8 * 10**9) == (result.objective, result.status, result.statistics["reused_bytes"])
    assert placed(case)[:2] == ("i0/0", "i0/1")
    assert {instance_of(gpu) for gpu in place(case, "makespan").answer.gpus[2:]} == {"i1", "i2"}  # type: ignore[union-attr]
    assert place(case, "rank-order").statistics["makespan_bytes"] == 8 * 10**9


# -- groups -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", range(8))
def test_flat_is_at_least_grouped_is_at_least_bundled(rng: random.Random, case: int) -> None:
    """Tests that tearing groups apart never reuses less than keeping them whole, nor that less than fixed bundles."""
    world = scattered(rng, num_gpus=16, per_instance=4)
    assert flat_reuse(world) >= grouped_reuse(world) >= bundled_reuse(world)


def test_whole_groups_cost_nothing_in_one_instance(rng: random.Random) -> None:
    """Tests that with one instance, or one rank in a group and one GPU in an instance, nothing is lost."""
    for per_instance in (8, 1):
        world = scattered(rng, num_gpus=8, per_instance=per_instance)
        assert flat_reuse(world) == grouped_reuse(world)


@pytest.mark.parametrize("solver", ["makespan", "reuse"])
@pytest.mark.parametrize("case", range(6))
def test_groups_stay_whole(rng: random.Random, solver: str, case: int) -> None:
    """Tests that every tensor group sits in one instance and no GPU takes two positions."""
    world = scattered(rng, num_gpus=16, per_instance=4)
    gpus = placed(world, solver)
    assert len(set(gpus)) == world.num_positions
    assert all(len(group) == 1 for group in groups(world, gpus))


def test_groups_over_several_instances_where_they_must() -> None:
    """Tests that four ranks on instances of two GPUs take two whole instances."""
    case = reshaped((1, 2, 2), (1, 1, 4), layers=4, positions=[0, 1, 2, 3, None, None], instances=[0, 0, 1, 1, 2, 2])
    (group,) = groups(case, placed(case))
    assert len(group) == 2


def test_only_as_many_groups_are_split_as_must_be() -> None:
    """Tests that with fragments of 3, 2 and 1 GPUs two of three pairs stay whole and the third is split."""
    case = reshaped((1, 1, 1), (3, 1, 2), layers=2, positions=[None] * 6, instances=[0, 0, 0, 1, 1, 2])
    assert sorted(len(group) for group in groups(case, placed(case))) == [1, 1, 2]
    assert place(case, "makespan").statistics["group_parts"] == 4


def test_room_comes_before_whole_groups() -> None:
    """Tests that a pair without room beside what is there is avoided, even if a group is split for it."""
    case = reshaped((1, 1, 1), (1, 1, 2), layers=2, positions=[None] * 4, instances=[0, 0, 1, 1])
    fits = np.array([[True, True], [False, False], [False, False], [True, True]])
    for solver in ("makespan", "reuse"):
        result = place(replace(case, fits=fits), solver)
        assert result.statistics["without_room"] == 0
        assert {"i0/0", "i1/1"} == set(result.answer.gpus)  # type: ignore[union-attr]


def test_room_comes_before_reuse() -> None:
    """Tests that a pair that does not fit is avoided, whatever it would reuse."""
    case = reshaped((2, 1, 1), (2, 1, 1), layers=2, positions=[0, 1], granule_bytes=90)
    fits = np.array([[True], [False]])
    one = replace(case, data=1, fits=fits, contents=replace(case.contents, heir=np.array([-1, 0])))
    for solver in ("makespan", "reuse"):
        assert placed(one, solver) == ("i0/0",)


# -- ties ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", ["makespan", "reuse"])
def test_same_configuration_relabels_nobody(rng: random.Random, solver: str) -> None:
    """Tests that an unchanged configuration without KV moves no GPU, wherever its groups are, and copies nothing."""
    slots = rng.sample(range(16), 16)
    positions = [slot * 4 + rank for slot in slots for rank in range(4)]
    case = reshaped((4, 4, 4), (4, 4, 4), layers=8, positions=positions, instances=[gpu // 8 for gpu in range(64)])
    result = place(case, solver)
    assert (0, 0) == (result.statistics["relabelled"], result.statistics["makespan_bytes"])
    assert "optimal" == result.status


@pytest.mark.parametrize("solver", ["makespan", "reuse", "rank-order"])
def test_blank_gpus_keep_their_order(solver: str) -> None:
    """Tests that interchangeable GPUs and instances take positions in natural order."""
    case = reshaped((1, 1, 1), (1, 3, 2), layers=3, positions=[None] * 12, instances=[gpu // 2 for gpu in range(12)])
    assert placed(case, solver) == ("i0/0", "i0/1", "i1/0", "i1/1", "i2/0", "i2/1")


def test_the_artifact_counts_kv_once() -> None:
    """Tests its edge weights: 5 bytes of weights and 6 of K and V lose against 9 of weights, as K and V count 3."""
    case = reshaped((2, 2, 1), (1, 1, 1), layers=2, positions=[0, 3], kv_tokens=[6, 0], heirs=[0, -1])
    case = replace(case, contents=replace(case.contents, weight_bytes=np.array([5, 9])))
    assert (("i0/0",), ("i1/0",)) == (placed(case, "paper"), placed(case, "paper-artifact"))


# -- all solvers --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", sorted(PLACERS))
def test_nothing_to_place(solver: str) -> None:
    """Tests that no position is no problem."""
    case = replace(reshaped((1, 1, 1), (1, 1, 1), layers=1, positions=[0]), data=0)
    assert placed(case, solver) == ()


@pytest.mark.parametrize("case", range(8))
def test_reports_are_true(rng: random.Random, case: int) -> None:
    """Tests that what every solver says of its placement is what counting by the definition gives."""
    world = scattered(rng, num_gpus=rng.choice([8, 12, 16]), per_instance=rng.choice([1, 2, 4]))
    weights = reuse_matrix(world)
    row = {gpu: number for number, gpu in enumerate(world.gpus)}
    for solver in sorted(PLACERS):
        result = place(world, solver)
        gpus = placed(world, solver)
        reused = sum(int(weights[row[gpu], position]) for position, gpu in enumerate(gpus))
        assert (reused, makespan_of(world, gpus)) == (
            result.statistics["reused_bytes"],
            result.statistics["makespan_bytes"],
        )
        if solver == "makespan":
            assert result.bound <= result.objective == makespan_of(world, gpus)
        else:
            assert result.bound >= result.objective == reused
        assert (result.gap == 0) == (result.bound == result.objective) or result.gap < 1e-6


def test_each_solver_keeps_its_promise(rng: random.Random) -> None:
    """Tests that nobody beats the bounds: with whole groups that of `makespan`, and in any case that of `reuse`."""
    for _ in range(6):
        world = scattered(rng, num_gpus=16, per_instance=4)
        results = {solver: place(world, solver) for solver in PLACERS}
        whole = world.data * world.pipeline
        for result in results.values():
            if result.statistics["group_parts"] == whole:
                assert result.statistics["makespan_bytes"] >= results["makespan"].bound
            assert result.statistics["reused_bytes"] <= results["reuse"].bound


@pytest.mark.parametrize(("solver", "follows"), [("makespan", 1), ("reuse", 1), ("paper", 1), ("rank-order", 0)])
def test_costs_decide(solver: str, follows: int) -> None:
    """Tests that the GPU that holds two stages keeps the larger: changing one byte count changes the placement."""
    case = reshaped((1, 1, 1), (1, 2, 1), layers=2, positions=[0, None])
    answers = {
        placed(replace(case, contents=replace(case.contents, weight_bytes=np.array([first, 5]))), solver)
        for first in (4, 9)
    }
    assert len(answers) == 1 + follows
