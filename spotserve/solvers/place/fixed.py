"""Placements that somebody else thought out: the paper's two fixed levels, and no thought at all."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from spotserve.solvers.paper.mapper import two_level
from spotserve.solvers.paper.models import Shape
from spotserve.solvers.place.judged import Judged, judge
from spotserve.solvers.place.ports import look_at_ports
from spotserve.solvers.place.problem import Overlaps, Placement, PlacementProblem, overlaps
from spotserve.solvers.result import Result


def place_as_published(problem: PlacementProblem) -> Result[Placement]:
    """Kuhn-Munkres inside bundles of consecutive ranks, then between them (SpotServe, section 3.3 and artifact)."""
    return _by_two_levels(problem, overlaps(problem))


def place_as_the_artifact(problem: PlacementProblem) -> Result[Placement]:
    """The same with the artifact's edge weights, which count K and V once."""
    shared = overlaps(problem)
    return _by_two_levels(problem, replace(shared, kv=shared.kv // 2))


def _by_two_levels(problem: PlacementProblem, shared: Overlaps) -> Result[Placement]:
    everyone, everything = np.arange(len(problem.gpus)), np.arange(problem.num_positions)
    weights = shared.reuse(everyone, everything)
    where = look_at_ports(problem).instance_of
    instances = [np.flatnonzero(where == number).tolist() for number in range(int(where.max(initial=-1)) + 1)]
    holds = [bool(row.any()) for row in weights]
    mapped = two_level(
        [gpus for gpus in instances if any(holds[gpu] for gpu in gpus)],
        Shape(problem.data, problem.pipeline, problem.tensor),
        weights.tolist(),
        fresh=[gpus for gpus in instances if not any(holds[gpu] for gpu in gpus)],
    )
    return _as_it_is(problem, mapped.gpus)


def place_in_rank_order(problem: PlacementProblem) -> Result[Placement]:
    """Position q on the q-th GPU, whatever it holds (the ablation of the paper)."""
    return _as_it_is(problem, tuple(range(problem.num_positions)))


def _as_it_is(problem: PlacementProblem, rows: tuple[int, ...]) -> Result[Placement]:
    """The placement with the bytes it reuses; no position can reuse more than its best GPU has of it."""
    ports, shared = look_at_ports(problem), overlaps(problem)
    best: Judged = judge(problem, ports, shared, rows)
    everyone, everything = np.arange(len(problem.gpus)), np.arange(problem.num_positions)
    bound = int(shared.reuse(everyone, everything).max(axis=0).sum())
    return Result(
        best.placement(problem),
        "optimal" if best.reused_bytes == bound else "feasible",
        objective=best.reused_bytes,
        bound=bound,
        certificate={"kind": "assignment", "reused_bytes": best.reused_bytes, "stayed": best.stayed},
        statistics=best.statistics(),
    )
