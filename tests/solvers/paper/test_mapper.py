"""The device mapper: edge weights, matchings and the two fixed levels."""

from __future__ import annotations

import random
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest

from spotserve.solvers.paper import mapper
from spotserve.solvers.paper.mapper import (
    NO_BATCH,
    CarriedBatch,
    Seat,
    edge_weight_h,
    kept_pipelines,
    layer_overlap,
    rank_order,
    rank_overlap,
    reused_kv_bytes,
    reused_weight_bytes,
    two_level,
)
from spotserve.solvers.paper.matching import Matcher, Weights, by_scipy, kuhn_munkres
from spotserve.solvers.paper.models import GPT_20B, PAPER_MODELS, Position, Shape
from tests.solvers.paper.golden import golden_json, golden_rows, shape, triple


def seat(degrees: Shape, replica: int, stage: int, rank: int) -> Seat:
    """A position of a shape."""
    return Seat(degrees, Position(replica, stage, rank))


def best_by_brute_force(weights: Weights) -> float:
    """The largest total of any assignment of rows to columns."""
    rows, columns = weights.shape
    return float(
        max(sum(weights[row, column] for row, column in enumerate(p)) for p in permutations(range(columns), rows))
    )


def test_every_row_of_edge_weights(shared_data: Path) -> None:
    """Tests the artifact's edge weight and the exact bytes of every published pair of positions."""
    for row in golden_rows(shared_data, "edge_weights.csv"):
        model = PAPER_MODELS[row["model"]]
        old = seat(shape(row["old_DPM"]), *triple(row["old_dpm"]))
        new = seat(shape(row["new_DPM"]), *triple(row["new_dpm"]))
        same = old.position.replica == new.position.replica
        batch = CarriedBatch(int(row["batch"]), int(row["mem_len"])) if same and row["batch"] != "0" else NO_BATCH
        share, whole = rank_overlap(old, new)
        assert layer_overlap(model, old, new) == int(row["layer_overlap"]), row
        assert share / whole == pytest.approx(float(row["shard_overlap"])), row
        weight = edge_weight_h(model, old, new, batch)
        assert weight == pytest.approx(float(row["artifact_weight_in_h_floats"]), abs=1e-6, rel=0), row
        kept = reused_weight_bytes(model, old, new), reused_kv_bytes(model, old, new, batch)
        assert kept == (int(row["exact_param_bytes"]), int(row["exact_kv_bytes"])), row
        assert sum(kept) == int(row["exact_total_bytes"])


def test_edge_weight_of_the_paper_s_transition() -> None:
    """Tests GPT-20B (2,2,8)@(0,0,0) -> (2,3,4)@(0,0,0) without KV and with a batch of four."""
    old, new = seat(Shape(2, 2, 8), 0, 0, 0), seat(Shape(2, 3, 4), 0, 0, 0)
    batch = CarriedBatch(4, 640)
    assert edge_weight_h(GPT_20B, old, new) == pytest.approx(199_406.0, abs=1e-6)
    assert edge_weight_h(GPT_20B, old, new, batch) == pytest.approx(204_538.419271, abs=1e-6)
    assert reused_weight_bytes(GPT_20B, old, new) == 4_900_601_856
    assert reused_kv_bytes(GPT_20B, old, new, batch) == 251_658_240


@pytest.mark.parametrize("matcher", [by_scipy, kuhn_munkres])
def test_published_matchings(shared_data: Path, matcher: Matcher) -> None:
    """Tests the unit example and Figure 4b: optimum, number of optima, and what identity would reuse."""
    cases = golden_json(shared_data, "device_mapping_cases.json")
    unit, toy = cases["km_unit_test"], cases["figure_4b_toy"]
    assert unit["max_total"] == 19
    found = matcher(np.array(unit["weights"], dtype=np.float64))
    assert (found.total, found.columns) == (19, tuple(unit["one_optimal_assignment_row_to_col"]))
    weights = np.array(toy["weights"])
    assert matcher(weights).total == toy["max_total"] == 68
    assert float(np.trace(weights)) == toy["identity_assignment_total"] == 42
    totals = [sum(weights[row, column] for row, column in enumerate(p)) for p in permutations(range(6))]
    assert totals.count(68) == toy["number_of_optimal_assignments"] == 8
    given = toy["one_optimal_assignment"]
    assert sum(weights[row, column] for row, column in enumerate(given)) == 68


def test_first_stage_holders_keep_layers_in_figure_4b(shared_data: Path) -> None:
    """Tests that u1, which holds stage 0, never gets a position that shares no layer with it."""
    weights = np.array(golden_json(shared_data, "device_mapping_cases.json")["figure_4b_toy"]["weights"])
    for matcher in (by_scipy, kuhn_munkres):
        assert weights[1, matcher(weights).columns[1]] > 0


def test_both_matchers_reach_the_brute_force_optimum(rng: random.Random) -> None:
    """Tests both Kuhn-Munkres on small random matrices, square and wide, with many ties."""
    for _ in range(60):
        rows = rng.randint(1, 5)
        weights = np.array([[rng.randint(0, 6) for _ in range(rng.randint(rows, 6))]] * 1, dtype=np.float64)
        weights = np.array(
            [[rng.randint(0, 6) for _ in range(weights.shape[1])] for _ in range(rows)], dtype=np.float64
        )
        best = best_by_brute_force(weights)
        for matcher in (by_scipy, kuhn_munkres):
            found = matcher(weights)
            assert found.total == best
            assert len(set(found.columns)) == rows


def test_more_rows_than_columns_are_refused() -> None:
    """Tests that a matrix with more rows than columns is our bug, not an answer."""
    for matcher in (by_scipy, kuhn_munkres):
        with pytest.raises(AssertionError, match="more rows than columns"):
            matcher(np.zeros((3, 2)))


def test_two_levels_keep_groups_inside_instances(rng: random.Random) -> None:
    """Tests that every block of consecutive ranks sits inside one instance, whatever the weights say."""
    degrees = Shape(2, 2, 4)
    instances = [tuple(range(4 * number, 4 * number + 4)) for number in range(5)]
    weights = [[float(rng.randint(0, 100)) for _ in range(degrees.gpus)] for _ in range(20)]
    mapped = two_level(instances, degrees, weights)
    assert len(set(mapped.gpus)) == degrees.gpus
    for start in range(0, degrees.gpus, 4):
        assert len({gpu // 4 for gpu in mapped.gpus[start : start + 4]}) == 1
    assert mapped.weight == sum(weights[gpu][position] for position, gpu in enumerate(mapped.gpus))


def test_newcomers_take_what_remains_in_address_order() -> None:
    """Tests that unmatched groups go to fresh instances in order, and that a group wider than an instance is split."""
    degrees = Shape(1, 2, 4)
    weights = [[float(gpu == position) for position in range(8)] for gpu in range(8)]
    mapped = two_level([(0, 1), (2, 3)], degrees, weights, fresh=[(4, 5), (6, 7)])
    assert mapped.gpus == (0, 1, 2, 3, 4, 5, 6, 7)
    assert mapped.weight == 4


def test_the_two_fixed_levels_cost_something() -> None:
    """Tests that two levels may reuse less than a free matching: an instance cannot be split over two groups."""
    weights = [[5.0, 0.0, 0.0, 0.0], [0.0, 0.0, 5.0, 0.0], [0.0, 5.0, 0.0, 0.0], [0.0, 0.0, 0.0, 5.0]]
    mapped = two_level([(0, 1), (2, 3)], Shape(2, 1, 2), weights)
    assert mapped.weight < by_scipy(np.array(weights)).total == 20


def test_rank_order_looks_at_nothing() -> None:
    """Tests that the ablation deals GPUs out as they come."""
    assert rank_order((7, 3, 5), Shape(1, 2, 1)).gpus == (7, 3)


def test_surviving_batches() -> None:
    """Tests that the furthest batches live on, and that all do where they fit."""
    assert kept_pipelines({0: 520, 1: 600, 2: 560}, data=2) == (1, 2)
    assert kept_pipelines({2: 5}, data=3) == (0, 1, 2)
    assert kept_pipelines({0: 5, 1: 5, 2: 5}, data=2) == (0, 1)


@pytest.mark.parametrize("matcher", [by_scipy, kuhn_munkres])
def test_each_level_is_optimal(rng: random.Random, matcher: Matcher) -> None:
    """Tests two levels against brute force on both: every way to deal clusters to groups, every order inside."""
    for _ in range(20):
        degrees = Shape(rng.choice([1, 2]), rng.choice([1, 2]), rng.choice([1, 2, 4]))
        num_instances = -(-degrees.gpus // 2) + rng.randint(0, 1)
        weights = [[float(rng.randint(0, 9)) for _ in range(degrees.gpus)] for _ in range(2 * num_instances)]
        instances = [(2 * number, 2 * number + 1) for number in range(num_instances)]
        size = min(degrees.tensor, 2)
        clusters = [gpus[start : start + size] for gpus in instances for start in range(0, 2, size)]
        groups = [tuple(range(start, start + size)) for start in range(0, degrees.gpus, size)]
        inner = np.array(
            [[best_by_brute_force(np.array(weights)[np.ix_(gpus, group)]) for group in groups] for gpus in clusters]
        )
        mapped = two_level(instances, degrees, weights, matcher=matcher)
        assert mapped.weight == best_by_brute_force(inner.T)
        assert mapped.weight == sum(weights[gpu][position] for position, gpu in enumerate(mapped.gpus))


def test_small_and_large_clusters_are_summed_alike(rng: random.Random, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests that adding up every order gives what a matching of each pair gives."""
    weights = [[float(rng.randint(0, 99)) for _ in range(32)] for _ in range(32)]
    instances = [tuple(range(4 * number, 4 * number + 4)) for number in range(8)]
    at_once = two_level(instances, Shape(2, 4, 4), weights)
    monkeypatch.setattr(mapper, "MOST_PERMUTED", 0)
    assert two_level(instances, Shape(2, 4, 4), weights) == at_once
