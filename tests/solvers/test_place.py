"""Place: assignments of GPUs to positions, against the other solver, against brute force and by golden instances."""

from __future__ import annotations

import random
from itertools import permutations

import pytest

from spotserve.core.ids import GpuId
from spotserve.solvers.place import PlacementProblem, place, reuse_of


def problem(
    reuse: list[list[int]], *, home: list[int | None] | None = None, fits: list[list[bool]] | None = None
) -> PlacementProblem:
    """A placement problem over GPUs i0/0, i1/0, …"""
    size = len(reuse)
    return PlacementProblem(
        gpus=tuple(GpuId(f"i{index}/0") for index in range(size)),
        num_positions=len(reuse[0]),
        reuse_bytes=tuple(tuple(row) for row in reuse),
        home=tuple(home or [None] * size),
        fits=tuple(tuple(row) for row in (fits or [[True] * len(row) for row in reuse])),
    )


def drawn(seed: int, *, gpus: int, positions: int, unit: int = 1) -> PlacementProblem:
    """Random weights, many of them equal."""
    draw = random.Random(seed)
    return problem([[draw.randrange(6) * unit for _ in range(positions)] for _ in range(gpus)])


@pytest.mark.parametrize("seed", range(12))
def test_solvers_agree_with_brute_force(seed: int) -> None:
    """Tests that OR-Tools, scipy and trying everything reach the same reuse, in bytes of any size."""
    case = drawn(seed, gpus=6, positions=4, unit=1 + seed * 1_000_003)
    best = max(reuse_of(case, [case.gpus[row] for row in rows]) for rows in permutations(range(6), 4))
    for solver in ("assignment", "hungarian"):
        placement = place(case, solver)
        assert best == reuse_of(case, placement.gpus) == placement.report.objective
        assert len(set(placement.gpus)) == 4


@pytest.mark.parametrize("seed", range(4))
def test_solvers_agree_at_size(seed: int) -> None:
    """Tests that both solvers reach the same value with 40 GPUs."""
    case = drawn(seed, gpus=40, positions=32, unit=2**33)
    assert place(case, "assignment").report.objective == place(case, "hungarian").report.objective


def test_greedy_would_be_wrong() -> None:
    """Tests the smallest instance on which taking the largest weight first loses (18, greedy 10)."""
    assert place(problem([[10, 9], [9, 0]]), "assignment").report.objective == 18


def test_ties_stay_at_home() -> None:
    """Tests that among equal placements the one that relabels no GPU is taken."""
    case = problem([[7, 7, 7]] * 3, home=[2, 0, 1])
    assert place(case, "assignment").gpus == ("i1/0", "i2/0", "i0/0")


def test_blank_gpus_keep_their_order() -> None:
    """Tests that interchangeable GPUs take positions in natural order, so that tensor groups take neighbours."""
    assert place(problem([[0, 0, 0]] * 12), "assignment").gpus == ("i0/0", "i1/0", "i2/0")


def test_room_comes_before_reuse() -> None:
    """Tests that a pair that does not fit beside what is there is avoided, whatever it would reuse."""
    case = problem([[90, 1], [90, 1]], fits=[[False, True], [True, False]])
    assert place(case, "assignment").gpus == ("i1/0", "i0/0")


def test_nothing_to_place() -> None:
    """Tests that no position is no problem."""
    empty = PlacementProblem(gpus=(), num_positions=0, reuse_bytes=(), home=(), fits=())
    assert place(empty, "assignment").gpus == ()
