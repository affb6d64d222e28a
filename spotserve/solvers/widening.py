"""Replicas of another shape beside those that run, on GPUs that would idle: what no equal replicas can do.

A better shape for all often does not fit beside what the GPUs hold, and stopping for it costs more than it brings. New
replicas of any shape on idle GPUs disturb nobody; where the mean latency of such a mix is clearly less than that of the
plan at hand, the mix is taken.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from spotserve.core.cost import Pool, Workload, balanced, pool_throughput_rps, pools_request_ms
from spotserve.core.snapshot import Replica
from spotserve.core.spec import ServingSpec
from spotserve.solvers.configure.candidates import Candidate, Table


@dataclass(frozen=True, slots=True)
class Mix:
    """So many new replicas of one shape beside the intact ones (none: just these), and a request's latency then."""

    shape: tuple[int, int]
    count: int
    latency_ms: float


def latency_of(spec: ServingSpec, replicas: Sequence[Replica], workload: Workload, *further: Pool) -> float:
    """l_req in ms over replicas of any shapes, infinite if they cannot serve the load."""
    pools = (*pools_of(spec, replicas), *further)
    latency_ms = pools_request_ms(spec, pools, workload) if pools else None
    return float("inf") if latency_ms is None else latency_ms


def throughput_of(spec: ServingSpec, replicas: Sequence[Replica], workload: Workload) -> float:
    """Requests per second of replicas of any shapes."""
    return sum(pool_throughput_rps(spec, pool, workload) for pool in pools_of(spec, replicas))


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
    """The mixes that serve the load, fastest first: as many new replicas of a shape as idle GPUs hold."""
    found = [Mix((1, 1), 0, latency_of(spec, intact, workload))]
    for row in _filling(rows, num_idle):
        pool = Pool(balanced(spec.model, pipeline=row.pipeline, tensor=row.tensor), row.data, row.max_running)
        found.append(Mix(row.shape, row.data, latency_of(spec, intact, workload, pool)))
    served = [mix for mix in found if mix.latency_ms < float("inf")]
    return iter(sorted(served, key=lambda mix: (mix.latency_ms, mix.count * mix.shape[0] * mix.shape[1], mix.shape)))


def _filling(rows: Table, num_idle: int) -> Iterator[Candidate]:
    """Of each shape the row with the most replicas that so many GPUs hold."""
    columns = rows.columns
    size = columns["pipeline"] * columns["tensor"]
    return iter(rows.where(columns["data"] == num_idle // size))
