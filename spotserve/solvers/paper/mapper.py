"""The device mapper (section 3.3): edge weights, and matching GPUs with positions on two fixed levels.

GPUs are cut into clusters inside their instance, positions into groups of consecutive tensor ranks. Kuhn-Munkres
matches inside every (cluster, group) pair, then clusters with groups by the inner sums; both levels stay fixed, so the
result may be worse than a free assignment.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations
from math import gcd

import numpy as np

from spotserve.solvers.paper.matching import Matcher, Weights, by_scipy
from spotserve.solvers.paper.models import (
    ELEMENT_BYTES,
    PaperModel,
    Position,
    Shape,
    embedding_floats,
    head_floats,
    replicated_floats,
    sharded_floats,
)


@dataclass(frozen=True, slots=True)
class CarriedBatch:
    """The batch whose KV a pipeline holds: sequences and allocated tokens (S_in + S_out, whatever the progress)."""

    sequences: int
    tokens: int


NO_BATCH = CarriedBatch(0, 0)

MOST_PERMUTED = 4
"""Clusters up to this size are matched by adding up every order."""


@dataclass(frozen=True, slots=True)
class Seat:
    """A position and the shape it is one of."""

    shape: Shape
    position: Position


@dataclass(frozen=True, slots=True)
class DeviceMap:
    """`gpus[q]` takes position q (replica by replica, stage by stage, rank by rank); `weight` is what is reused."""

    gpus: tuple[int, ...]
    weight: float


def layer_overlap(model: PaperModel, old: Seat, new: Seat) -> int:
    """Layers that both positions hold."""
    first = [seat.position.stage * model.padded_layers // seat.shape.pipeline for seat in (old, new)]
    last = [(seat.position.stage + 1) * model.padded_layers // seat.shape.pipeline for seat in (old, new)]
    return max(0, min(last) - max(first))


def rank_overlap(old: Seat, new: Seat) -> tuple[int, int]:
    """The fraction of a layer's sharded part that both hold, as (numerator, denominator)."""
    before, after = old.shape.tensor, new.shape.tensor
    low = max(old.position.rank * after, new.position.rank * before)
    high = min((old.position.rank + 1) * after, (new.position.rank + 1) * before)
    return max(0, high - low), before * after


def edge_weight_h(model: PaperModel, old: Seat, new: Seat, batch: CarriedBatch = NO_BATCH) -> float:
    """The artifact's edge weight in units of h floats; `batch` is that of the pipeline the new one inherits, if u's.

    It counts K and V once, as the artifact does; `reused_weight_bytes` and `reused_kv_bytes` are exact.
    """
    layers = layer_overlap(model, old, new)
    share, whole = rank_overlap(old, new)
    everywhere = (model.vocab + model.max_sequence) + (
        batch.tokens + 3 * model.hidden + 4
    ) * batch.sequences / model.hidden
    if _both_last(old, new):
        everywhere += model.vocab + 2
    return layers * (6 + (12 * model.hidden + 7 + batch.sequences * batch.tokens) * (share / whole)) + everywhere


def reused_weight_bytes(model: PaperModel, old: Seat, new: Seat) -> int:
    """Exact weight bytes that a GPU at `old` has of what `new` needs."""
    layers = layer_overlap(model, old, new)
    share, whole = rank_overlap(old, new)
    floats = layers * (sharded_floats(model) * share // whole + replicated_floats(model)) + embedding_floats(model)
    return ELEMENT_BYTES * (floats + _both_last(old, new) * head_floats(model))


def reused_kv_bytes(model: PaperModel, old: Seat, new: Seat, batch: CarriedBatch) -> int:
    """Exact KV bytes, where the new pipeline inherits the old one's batch."""
    share, whole = rank_overlap(old, new)
    floats = 2 * layer_overlap(model, old, new) * batch.sequences * batch.tokens * model.hidden * share // whole
    return ELEMENT_BYTES * floats


def cluster_size(tensor: int, instance_sizes: Sequence[int]) -> int:
    """GPUs per cluster: min(M', GPUs per instance); where that does not divide, the greatest common divisor."""
    return gcd(tensor, *instance_sizes)


def two_level(
    instances: Sequence[Sequence[int]],
    shape: Shape,
    weights: Sequence[Sequence[float]],
    *,
    fresh: Sequence[Sequence[int]] = (),
    matcher: Matcher = by_scipy,
) -> DeviceMap:
    """The paper's two-level matching.

    `instances` are the GPUs of each instance that holds something, in address order; `weights[gpu][q]` what GPU `gpu`
    has of position q (positions replica by replica, stage by stage, rank by rank); `fresh` the instances that hold
    nothing: they take what remains, in address order. GPU numbers are rows of `weights`. All matchers reach the same
    weight on either level; `kuhn_munkres` settles ties as the artifact does.
    """
    size = cluster_size(shape.tensor, [len(gpus) for gpus in (*instances, *fresh)])
    clusters = _clusters(instances, size)
    groups = _groups(shape, size)
    matrix = np.array(weights, dtype=np.float64).reshape(len(weights), shape.gpus)
    outer = _inner_totals(matrix, clusters, groups, matcher)
    seats = [-1] * shape.gpus
    pairs = _pairs(outer, matcher)
    for cluster, group in pairs:
        inner = matcher(matrix[np.ix_(clusters[cluster], groups[group])])
        for gpu, column in zip(clusters[cluster], inner.columns, strict=True):
            seats[groups[group][column]] = gpu
    used = {cluster for cluster, _ in pairs}
    idle = [gpus for number, gpus in enumerate(clusters) if number not in used] + _clusters(fresh, size)
    _fill(seats, groups, idle)
    return DeviceMap(tuple(seats), float(sum(outer[pair] for pair in pairs)))


def rank_order(gpus: Sequence[int], shape: Shape) -> DeviceMap:
    """The ablation without a device mapper: position q goes to the q-th GPU. Its weight is not looked at."""
    assert len(gpus) >= shape.gpus, "more positions than GPUs"
    return DeviceMap(tuple(gpus[: shape.gpus]), 0.0)


def kept_pipelines(steps: dict[int, int], *, data: int) -> tuple[int, ...]:
    """The old pipelines whose batches live on in `data` new ones, in increasing order; the others are re-queued.

    `steps` is the decoding progress of each interrupted pipeline. All are kept where they fit, filled up with the
    lowest other ids; else the furthest ones. New pipeline i inherits the i-th.
    """
    if len(steps) > data:
        return tuple(sorted(sorted(steps, key=lambda pipeline: -steps[pipeline])[:data]))
    kept = list(steps)
    for pipeline in range(data):
        if len(kept) == data:
            break
        if pipeline not in steps:
            kept.append(pipeline)
    return tuple(sorted(kept))


def _both_last(old: Seat, new: Seat) -> bool:
    return all(seat.position.stage == seat.shape.pipeline - 1 for seat in (old, new))


def _clusters(instances: Sequence[Sequence[int]], size: int) -> list[tuple[int, ...]]:
    """GPUs in runs of `size`, never across instances."""
    return [tuple(gpus[start : start + size]) for gpus in instances for start in range(0, len(gpus), size)]


def _groups(shape: Shape, size: int) -> list[tuple[int, ...]]:
    """Positions in runs of `size` consecutive ranks: replica by replica, block by block of ranks, stage by stage."""
    return [
        tuple((replica * shape.pipeline + stage) * shape.tensor + start + rank for rank in range(size))
        for replica in range(shape.data)
        for start in range(0, shape.tensor, size)
        for stage in range(shape.pipeline)
    ]


def _inner_totals(
    matrix: Weights, clusters: Sequence[Sequence[int]], groups: Sequence[Sequence[int]], matcher: Matcher
) -> Weights:
    """The weight of the best matching inside every (cluster, group) pair."""
    totals = np.zeros((len(clusters), len(groups)))
    if not totals.size:
        return totals
    rows, columns = np.array(clusters), np.array(groups)
    size = rows.shape[1]
    if size > MOST_PERMUTED:
        for (cluster, group), _ in np.ndenumerate(totals):
            totals[cluster, group] = matcher(matrix[np.ix_(rows[cluster], columns[group])]).total
        return totals
    # Few enough orders to add up each of them for all pairs at once.
    sums = (
        sum(matrix[np.ix_(rows[:, place], columns[:, taken])] for place, taken in enumerate(order))
        for order in permutations(range(size))
    )
    for total in sums:
        np.maximum(totals, total, out=totals)
    return totals


def _pairs(outer: Weights, matcher: Matcher) -> list[tuple[int, int]]:
    """(cluster, group) pairs of the outer matching, whichever side is the shorter."""
    if 0 in outer.shape:
        return []
    if outer.shape[0] > outer.shape[1]:
        return [(cluster, group) for group, cluster in enumerate(matcher(outer.T).columns)]
    return list(enumerate(matcher(outer).columns))


def _fill(seats: list[int], groups: Sequence[Sequence[int]], idle: Sequence[Sequence[int]]) -> None:
    """Groups that nobody was matched with go to unused clusters in address order."""
    spare = iter(idle)
    for group in groups:
        if seats[group[0]] == -1:
            cluster = next(spare, None)
            assert cluster is not None, "more positions than GPUs"
            for seat, gpu in zip(group, cluster, strict=True):
                seats[seat] = gpu
