"""Replicas of another shape beside those that run, on GPUs that would idle: what no equal replicas can do.

A better shape for all often does not fit beside what the GPUs hold, and stopping for it costs more than it brings. New
replicas of any shape on idle GPUs disturb nobody; where the mean latency of such a mix is clearly less than that of the
plan at hand, the mix is taken.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from spotserve.core.cost import Pool, Workload, Worth, balanced, worth_of
from spotserve.core.spec import ServingSpec
from spotserve.solvers.configure.candidates import Candidate, Table


@dataclass(frozen=True, slots=True)
class Mix:
    """So many new replicas of one shape beside the intact ones (none: just these), and what they are worth then."""

    shape: tuple[int, int]
    count: int
    worth: Worth


def mixes(
    spec: ServingSpec, rows: Table, workload: Workload, *, intact: Sequence[Pool], num_idle: int
) -> Iterator[Mix]:
    """The mixes, fastest first, but those that serve the load: as many new replicas of a shape as idle GPUs hold."""
    found = [Mix((1, 1), 0, worth_of(spec, intact, workload))]
    for row in _filling(rows, num_idle):
        pool = Pool(balanced(spec.model, pipeline=row.pipeline, tensor=row.tensor), row.data, row.max_running)
        found.append(Mix(row.shape, row.data, worth_of(spec, (*intact, pool), workload)))
    return iter(sorted(found, key=_rank))


def _rank(mix: Mix) -> tuple[bool, float, int, tuple[int, int]]:
    gpus = mix.count * mix.shape[0] * mix.shape[1]
    return not mix.worth.serves_load, mix.worth.latency_ms, gpus, mix.shape


def _filling(rows: Table, num_idle: int) -> Iterator[Candidate]:
    """Of each shape the row with the most replicas that so many GPUs hold."""
    columns = rows.columns
    size = columns["pipeline"] * columns["tensor"]
    return iter(rows.where(columns["data"] == num_idle // size))
