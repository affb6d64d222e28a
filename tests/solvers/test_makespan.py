"""Makespan: the busiest port decides, not the sum of what is reused."""

from __future__ import annotations

import random
from itertools import permutations

import pytest

from spotserve.core.ids import GpuId, instance_of
from spotserve.solvers.place import PlacementProblem, place


def problem(reuse: list[list[int]], need: list[int], *, gpus_per_instance: int = 1) -> PlacementProblem:
    """A placement problem in which position q takes `need[q]` bytes."""
    size = len(reuse)
    return PlacementProblem(
        gpus=tuple(GpuId(f"i{index // gpus_per_instance}/{index % gpus_per_instance}") for index in range(size)),
        num_positions=len(need),
        reuse_bytes=tuple(tuple(row) for row in reuse),
        home=(None,) * size,
        fits=tuple((True,) * len(need) for _ in reuse),
        need_bytes=tuple(need),
    )


def busiest(case: PlacementProblem, gpus: tuple[GpuId, ...]) -> int:
    """Bytes through the busiest in-port, counted afresh."""
    received: dict[str, int] = {}
    for position, gpu in enumerate(gpus):
        held = case.reuse_bytes[case.gpus.index(gpu)][position]
        port = instance_of(gpu)
        received[port] = received.get(port, 0) + case.need_bytes[position] - held
    return max(received.values())


def test_reuse_is_not_makespan() -> None:
    """Tests the smallest instance on which the most reused bytes make one port fetch more than it has to."""
    case = problem([[10, 6], [6, 3]], [10, 10])
    assert busiest(case, place(case, "assignment").gpus) == 7
    assert busiest(case, place(case, "makespan").gpus) == 4


@pytest.mark.parametrize("seed", range(25))
@pytest.mark.parametrize("gpus_per_instance", [1, 2])
def test_equals_brute_force(seed: int, gpus_per_instance: int) -> None:
    """Tests that the busiest port is the least possible, never more than that of the assignment, and reported."""
    draw = random.Random(seed)
    need = [draw.randrange(4, 12) * 1000 for _ in range(4)]
    reuse = [[draw.randrange(0, size // 1000 + 1) * 1000 for size in need] for _ in range(6)]
    case = problem(reuse, need, gpus_per_instance=gpus_per_instance)
    placement = place(case, "makespan")
    least = min(busiest(case, rows) for rows in permutations(case.gpus, 4))
    assert least == busiest(case, placement.gpus) == placement.report.objective
    assert "optimal" == placement.report.status
    assert least <= busiest(case, place(case, "assignment").gpus)


def test_certificate_names_the_port() -> None:
    """Tests that the report says which instance receives most, and how much."""
    placement = place(problem([[0], [3]], [10]), "makespan")
    assert {"kind": "in_port", "port": "i1", "bytes": 7} == placement.report.certificate


def test_large_problems_keep_the_assignment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests that beyond the bound on pairs the assignment stands, said to be feasible with its true gap."""
    monkeypatch.setattr("spotserve.solvers.makespan.MAX_PAIRS", 3)
    case = problem([[10, 6], [6, 3]], [10, 10])
    placement = place(case, "makespan")
    assert ("feasible", 7.0, 4.0) == (placement.report.status, placement.report.objective, placement.report.bound)
    assert placement.gpus == place(case, "assignment").gpus
