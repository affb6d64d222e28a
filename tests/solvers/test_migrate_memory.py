"""Migrate: the order of layers under a memory bound."""

from __future__ import annotations

import random
from itertools import permutations

import numpy as np
import pytest

from spotserve.core.ids import GpuId
from spotserve.solvers.migrate import memory_exact
from spotserve.solvers.migrate.memory import (
    LayerChange,
    MemoryProblem,
    bounded_order,
    least_peak,
    least_possible_peak,
    memory_problem,
    order_layers,
    peak_of,
)
from spotserve.solvers.migrate.memory_exact import exact_order


def swap() -> MemoryProblem:
    """Two GPUs that swap two layers each."""
    incoming = np.array([[0, 0, 1, 1], [1, 1, 0, 0]], dtype=np.int64)
    return MemoryProblem(np.zeros(2, dtype=np.int64), incoming, incoming[::-1].copy())


def random_problem(draw: random.Random, *, num_gpus: int, num_layers: int) -> MemoryProblem:
    """Every GPU receives some layers and frees others."""
    table = np.array(
        [[draw.choice([-2, -1, 0, 0, 1, 2, 3]) for _ in range(num_layers)] for _ in range(num_gpus)], dtype=np.int64
    )
    start = np.array([-draw.randrange(3) for _ in range(num_gpus)], dtype=np.int64)
    return MemoryProblem(start, np.maximum(table, 0), np.maximum(-table, 0))


def slow_peak(problem: MemoryProblem, order: tuple[int, ...]) -> int:
    """The peak, computed step by step."""
    assert sorted(order) == list(range(problem.num_layers))
    used, highest = [int(value) for value in problem.start], -(10**9)
    for layer in order:
        for gpu in range(len(used)):
            used[gpu] += int(problem.incoming[gpu, layer])
            highest = max(highest, used[gpu])
        for gpu in range(len(used)):
            used[gpu] -= int(problem.freed[gpu, layer])
    return highest


def test_swapping_stages_takes_one_layer_of_room() -> None:
    """Tests golden G12: order 0, 2, 3, 1 peaks at 1, front to back at 2, and 1 is proven least."""
    assert ((0, 2, 3, 1), 2) == (bounded_order(swap(), 1), peak_of(swap(), (0, 1, 2, 3)))
    best = least_peak(swap())
    assert ("optimal", 1, 1) == (best.status, best.objective, best.bound)
    exact = exact_order(swap())
    assert ("optimal", 1, 1) == (exact.status, exact.objective, exact.bound)


@pytest.mark.parametrize("round_", range(15))
def test_sweep_and_cpsat_against_all_orders(rng: random.Random, round_: int) -> None:
    """Tests bound <= best of all orders = CP-SAT <= sweep <= front to back, each peak recomputed."""
    problem = random_problem(rng, num_gpus=rng.randint(1, 4), num_layers=5)
    best = min(slow_peak(problem, order) for order in permutations(range(5)))
    swept, exact = least_peak(problem), exact_order(problem)
    assert swept.answer is not None
    assert exact.answer is not None
    assert swept.objective == slow_peak(problem, swept.answer)
    assert exact.objective == slow_peak(problem, exact.answer) == best
    assert ("optimal", best) == (exact.status, exact.bound)
    assert least_possible_peak(problem) == swept.bound <= best <= swept.objective
    assert swept.objective <= slow_peak(problem, tuple(range(5)))
    assert (swept.status == "optimal") == (swept.objective == swept.bound)


def test_sweep_is_near_the_optimum_at_32_layers() -> None:
    """Tests that at 32 layers over 4 stages the sweep's peak is the one that CP-SAT finds, half of front to back."""
    changes = shifted_stages(num_layers=32)
    problem = memory_problem(changes, dict.fromkeys(gpus(), 0))
    front, swept = peak_of(problem, tuple(range(32))), least_peak(problem)
    exact = exact_order(problem, deterministic_time=0.5)
    assert exact.answer is not None
    assert exact.bound <= exact.objective <= swept.objective <= front
    assert swept.objective <= 1.3 * exact.objective


def gpus() -> list[GpuId]:
    return [GpuId(f"i{number}/0") for number in range(4)]


def shifted_stages(*, num_layers: int) -> tuple[LayerChange, ...]:
    """Stage s of four goes from GPU s to GPU s + 1."""
    run = num_layers // 4
    return tuple(
        LayerChange(str(layer), {gpus()[(layer // run + 1) % 4]: 1000}, {gpus()[layer // run]: 1000})
        for layer in range(num_layers)
    )


def test_front_to_back_where_there_is_room() -> None:
    """Tests that enough memory leaves the layers in their order, and less memory changes it before it refuses."""
    changes = shifted_stages(num_layers=8)
    names = tuple(str(layer) for layer in range(8))
    assert names == order_layers(changes, dict.fromkeys(gpus(), 2000)).answer
    tight = order_layers(changes, dict.fromkeys(gpus(), 1000))
    assert tight.answer is not None
    assert names != tight.answer
    assert sorted(tight.answer) == sorted(names)
    problem = memory_problem(changes, dict.fromkeys(gpus(), 1000))
    assert tight.objective == slow_peak(problem, tuple(int(layer) for layer in tight.answer)) <= 0
    refused = order_layers(changes, dict.fromkeys(gpus(), 999))
    assert (None, "infeasible", 1) == (refused.answer, refused.status, refused.bound)


def test_a_larger_layer_changes_the_order() -> None:
    """Tests that one coefficient decides: a GPU with less room gets its layer after it has freed one."""
    changes = shifted_stages(num_layers=4)
    roomy = order_layers(changes, dict.fromkeys(gpus(), 1000)).answer
    short = order_layers(changes, {**dict.fromkeys(gpus(), 1000), gpus()[1]: 0}).answer
    assert ("0", "1", "2", "3") == roomy
    assert short is not None
    assert short.index("1") < short.index("0")


def test_cpsat_decides_where_the_sweep_finds_nothing(rng: random.Random) -> None:
    """Tests that an order is found whenever one fits, also where Algorithm 2 misses it with every bound."""
    missed = 0
    for _ in range(200):
        problem = random_problem(rng, num_gpus=4, num_layers=5)
        changes = tuple(
            LayerChange(
                str(layer),
                {gpu: int(size) for gpu, size in zip(gpus(), problem.incoming[:, layer], strict=True)},
                {gpu: int(size) for gpu, size in zip(gpus(), problem.freed[:, layer], strict=True)},
            )
            for layer in range(5)
        )
        best = min(slow_peak(problem, order) for order in permutations(range(5)))
        short = {gpu: best - int(taken) for gpu, taken in zip(gpus(), problem.start, strict=True)}
        found = order_layers(changes, short)
        assert found.answer is not None
        assert slow_peak(problem, tuple(int(layer) for layer in found.answer)) <= best
        missed += least_peak(problem).objective > best
        none = order_layers(changes, {gpu: room - 1 for gpu, room in short.items()})
        assert none.answer is None or not any(change.incoming.values() for change in changes)
        if missed > 2:
            return


def test_nothing_moves_without_layers() -> None:
    """Tests that no change needs no order."""
    result = order_layers((), {GpuId("i0/0"): 5})
    assert ((), "optimal") == (result.answer, result.status)


def test_numbers_that_cpsat_cannot_count_are_not_given_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests that sums beyond 2^52 are refused with status unknown before any model is built."""
    monkeypatch.setattr(memory_exact.cp_model, "CpModel", None)
    large = MemoryProblem(
        np.array([0], dtype=np.int64), np.array([[2**52, 1]], dtype=np.int64), np.array([[1, 3]], dtype=np.int64)
    )
    assert (None, "unknown") == (exact_order(large).answer, exact_order(large).status)
