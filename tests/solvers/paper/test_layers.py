"""Algorithm 2: the memory-bounded order of layers."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from spotserve.solvers.paper.layers import (
    Growth,
    StageChange,
    artifact_order,
    layer_growth,
    naive_peak,
    published_order,
    stage_starts,
)
from tests.solvers.paper.golden import golden_json


def growth_of(case: dict[str, Any]) -> tuple[tuple[int, ...], ...]:
    """Growth in whole layers: one rank per stage."""
    stages = zip(case["old_stage_per_instance"], case["new_stage_per_instance"], strict=True)
    return layer_growth(
        [StageChange(old, new) for old, new in stages],
        num_layers=case["layers"],
        old_pipeline=case["old_P"],
        old_tensor=1,
        new_pipeline=case["new_P"],
        new_tensor=1,
    )


def peak_of(growth: Growth, order: tuple[int, ...]) -> int:
    """The most that any holder ever holds beyond its start, recomputed."""
    used, peak = [0] * len(growth), 0
    for layer in order:
        used = [held + row[layer] for held, row in zip(used, growth, strict=True)]
        peak = max(peak, *used)
    return peak


def least_peak(growth: Growth) -> int:
    """The smallest peak of any order, over all subsets of moved layers."""
    layers = range(len(growth[0]))
    best = [0] * (1 << len(growth[0]))
    held = [[0] * len(growth)] * (1 << len(growth[0]))
    for moved in range(1, len(best)):
        first = (moved & -moved).bit_length() - 1
        held[moved] = [before + row[first] for before, row in zip(held[moved & (moved - 1)], growth, strict=True)]
        before = min(best[moved & ~(1 << layer)] for layer in layers if moved >> layer & 1)
        best[moved] = max(before, *held[moved])
    return best[-1]


def random_growth(rng: random.Random, *, num_layers: int = 12) -> tuple[tuple[int, ...], ...]:
    """Stages dealt out anew over three to six holders."""
    degrees = [degree for degree in (1, 2, 3, 4, 6, 8) if num_layers % degree == 0]
    old_pipeline, new_pipeline = rng.choice(degrees), rng.choice(degrees)
    changes = [
        StageChange(
            rng.choice([None, *range(old_pipeline)]),
            rng.choice([None, *range(new_pipeline)]),
        )
        for _ in range(rng.randint(3, 6))
    ]
    return layer_growth(
        changes,
        num_layers=num_layers,
        old_pipeline=old_pipeline,
        old_tensor=rng.choice([1, 2]),
        new_pipeline=new_pipeline,
        new_tensor=rng.choice([1, 2, 3]),
    )


def test_every_toy(shared_data: Path) -> None:
    """Tests the artifact's order, peak and violation flag of every published toy and bound, and the naive peak."""
    for case in golden_json(shared_data, "layer_order_toys.json"):
        growth = growth_of(case)
        assert naive_peak(growth) == case["naive_sequential_peak_extra_layers"], case["name"]
        for result in case["results"]:
            found = artifact_order(growth, bound=int(result["U_max_layers"]))
            assert list(found.order) == result["order"], (case["name"], result)
            assert found.peak == result["peak_extra_layers"] == peak_of(growth, found.order), (case["name"], result)
            assert found.met_bound is not result["violates_bound"], (case["name"], result)


def test_shares_follow_the_tensor_degrees() -> None:
    """Tests that going from M = 2 to M' = 1 on the same stage takes a layer's other half from everybody."""
    growth = layer_growth([StageChange(0, 0)], num_layers=4, old_pipeline=1, old_tensor=2, new_pipeline=2, new_tensor=1)
    assert growth == ((1, 1, -1, -1),)


def test_the_published_pass_puts_off_what_does_not_fit(shared_data: Path) -> None:
    """Tests that the printed algorithm looks at each layer once, then takes the least maximum of what it put off."""
    swap = next(case for case in golden_json(shared_data, "layer_order_toys.json") if case["name"] == "swap two stages")
    found = published_order(growth_of(swap), bound=2)
    assert found.order == (0, 1, 4, 5, 6, 7, 2, 3)
    assert (found.peak, found.met_bound) == (2, False)


def test_orders_are_permutations_within_the_bound_where_they_say_so(rng: random.Random) -> None:
    """Tests both orders on random changes: every layer once, the peak as counted, and a met bound is kept."""
    for _ in range(100):
        growth = random_growth(rng)
        for order in (artifact_order, published_order):
            bound = rng.randint(0, 6)
            found = order(growth, bound=bound)
            assert sorted(found.order) == list(range(12))
            assert found.peak == peak_of(growth, found.order)
            if found.met_bound:
                assert found.peak <= bound
                assert found.order == tuple(range(12))


def test_no_order_passes_both_the_bound_and_the_best_peak(rng: random.Random) -> None:
    """Tests on random changes that the peak is never above U_max and the least of any order at once."""
    for _ in range(60):
        growth = random_growth(rng, num_layers=8)
        least = least_peak(growth)
        for order in (artifact_order, published_order):
            for bound in (0, 1, 3):
                found = order(growth, bound=bound)
                assert least <= found.peak <= max(bound, least)


def test_a_stage_starts_once_its_last_layer_is_there() -> None:
    """Tests that front stages may start before all is moved, and each only after its own last layer."""
    assert stage_starts((0, 1, 4, 2, 5, 3, 6, 7), pipeline=2) == (6, 8)
    assert stage_starts((0, 1, 2, 3, 4, 5, 6, 7), pipeline=4) == (2, 4, 6, 8)
