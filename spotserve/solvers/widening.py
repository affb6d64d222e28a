"""Replicas of another shape beside those that run, on GPUs that would idle: what no equal replicas can do.

A better shape for all often does not fit beside what the GPUs hold, and stopping for it costs more than it brings. New
replicas of any shape on idle GPUs disturb nobody; where the mean latency of such a mix is clearly less than that of the
plan at hand, the mix is taken.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from spotserve.core.cost import Pool, Workload, balanced, pool_throughput_rps, pools_request_ms, serves_load
from spotserve.core.snapshot import Replica
from spotserve.core.spec import ServingSpec
from spotserve.solvers.configure.candidates import Candidate, Table


@dataclass(frozen=True, slots=True)
class Mix:
    """So many new replicas of one shape beside the intact ones (none: just these), and what they are worth then."""

    shape: tuple[int, int]
    count: int
    worth: Worth


@dataclass(frozen=True, slots=True)
class Worth:
    """What replicas of any shapes are to requests together."""

    throughput_rps: float
    latency_ms: float
    serves_load: bool


def worth_of(spec: ServingSpec, replicas: Sequence[Replica], workload: Workload, *further: Pool) -> Worth:
    """The worth of at least one replica."""
    pools = (*pools_of(spec, replicas), *further)
    throughput_rps = sum(pool_throughput_rps(spec, pool, workload) for pool in pools)
    return Worth(throughput_rps, pools_request_ms(spec, pools, workload), serves_load(throughput_rps, workload))


def pools_of(spec: ServingSpec, replicas: Sequence[Replica]) -> list[Pool]:
    """Replicas by shape, as the cost model takes them."""
    same: dict[tuple[int, int], list[Replica]] = defaultdict(list)
    for replica in replicas:
        same[replica.pipeline, replica.tensor].append(replica)
    return [
        Pool(balanced(spec.model, pipeline=stages, tensor=degree), len(group), min(one.max_running for one in group))
        for (stages, degree), group in same.items()
    ]


def mixes(
    spec: ServingSpec, rows: Table, workload: Workload, *, intact: Sequence[Replica], num_idle: int
) -> Iterator[Mix]:
    """The mixes, fastest first, but those that serve the load: as many new replicas of a shape as idle GPUs hold."""
    found = [Mix((1, 1), 0, worth_of(spec, intact, workload))]
    for row in _filling(rows, num_idle):
        pool = Pool(balanced(spec.model, pipeline=row.pipeline, tensor=row.tensor), row.data, row.max_running)
        found.append(Mix(row.shape, row.data, worth_of(spec, intact, workload, pool)))
    return iter(sorted(found, key=_rank))


def _rank(mix: Mix) -> tuple[bool, float, int, tuple[int, int]]:
    gpus = mix.count * mix.shape[0] * mix.shape[1]
    return not mix.worth.serves_load, mix.worth.latency_ms, gpus, mix.shape


def _filling(rows: Table, num_idle: int) -> Iterator[Candidate]:
    """Of each shape the row with the most replicas that so many GPUs hold."""
    columns = rows.columns
    size = columns["pipeline"] * columns["tensor"]
    return iter(rows.where(columns["data"] == num_idle // size))
