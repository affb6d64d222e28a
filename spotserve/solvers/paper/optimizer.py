"""Algorithm 1 (section 3.2), the adaptive configuration optimizer: as the artifact runs it and as the paper prints it.

The artifact minimises execution time alone, always takes as many replicas as the GPUs allow, and takes the first of
equals. The paper's text has any number of replicas within what the cloud offers, and of similar latencies the one with
the fewest instances.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from spotserve.solvers.paper.latency import OUTPUT_TOKENS, BatchPlan, LatencyTable, execution_ms, throughput_rps
from spotserve.solvers.result import Result

SIMILAR_PERMILLE = 50
"""What "similar latency" means; the paper gives no figure."""

GPUS_PER_INSTANCE = 4


@dataclass(frozen=True, slots=True)
class Fleet:
    """GPUs that can be counted on (N_t), in instances of `gpus_per_instance`; `offered`: GPUs the cloud has in all."""

    gpus: int
    gpus_per_instance: int = GPUS_PER_INSTANCE
    offered: int | None = None

    @property
    def reachable(self) -> int:
        """GPUs that a configuration may take at most, after allocating."""
        return max(self.gpus, self.offered or 0)

    def instances(self, gpus: int) -> int:
        """Whole instances that so many GPUs take."""
        return -(-gpus // self.gpus_per_instance)


@dataclass(frozen=True, slots=True)
class Demand:
    """What is to be served: alpha_t, the largest batch, S_out, and the fewest GPUs one pipeline must have."""

    load_rps: float
    max_batch: int
    min_gpus: int
    output_tokens: int = OUTPUT_TOKENS


@dataclass(frozen=True, slots=True)
class Configuration:
    """(D, P, M, B) with micro-batches, and what it is judged by."""

    data: int
    plan: BatchPlan
    latency_ms: float
    throughput_rps: float

    @property
    def gpus(self) -> int:
        """How many GPUs it takes."""
        return self.data * self.plan.pipeline * self.plan.tensor


@dataclass(frozen=True, slots=True)
class Decision:
    """The configuration, whether it serves the load, and how many instances more (or fewer) than N_t it takes."""

    configuration: Configuration
    serves_load: bool
    delta_instances: int


def optimize(table: LatencyTable, fleet: Fleet, demand: Demand, *, as_published: bool = False) -> Result[Decision]:
    """C' of Algorithm 1: the least latency of what serves the load, else the most throughput of what fits.

    The answer is None if one pipeline needs more GPUs than there are. Objective and bound are l_exe in ms, or requests
    per second where nothing serves the load; both by enumeration, so they are equal.
    """
    rows = tuple(_published_rows(table, fleet, demand) if as_published else _artifact_rows(table, fleet, demand))
    serving = [row for row in rows if row.throughput_rps >= demand.load_rps]
    fitting = [row for row in rows if row.gpus <= fleet.gpus]
    statistics = {"configurations": len(rows), "serving": len(serving)}
    if serving:
        # min and max take the first of equals, as the artifact's strict comparisons do.
        fastest = min(serving, key=lambda row: row.latency_ms)
        chosen = _cheapest_similar(serving, fastest, fleet) if as_published else fastest
        decision = Decision(chosen, True, fleet.instances(chosen.gpus) - fleet.instances(fleet.gpus))
        return Result(
            decision, "optimal", chosen.latency_ms, fastest.latency_ms, _certificate("latency_ms"), statistics
        )
    if fitting:
        chosen = max(fitting, key=lambda row: row.throughput_rps)
        decision = Decision(chosen, False, fleet.instances(chosen.gpus) - fleet.instances(fleet.gpus))
        best = chosen.throughput_rps
        return Result(decision, "optimal", best, best, _certificate("throughput_rps"), statistics)
    return Result(None, "infeasible", statistics=statistics)


def replicas_only(table: LatencyTable, fleet: Fleet, demand: Demand, *, most_gpus: int) -> tuple[BatchPlan, int] | None:
    """The Rerouting baseline: (P, M, B) is solved once for `most_gpus`, afterwards only D follows the fleet.

    None if even `most_gpus` hold no pipeline; D is 0 while the fleet is smaller than one pipeline.
    """
    once = optimize(table, Fleet(most_gpus, fleet.gpus_per_instance), demand).answer
    if once is None:
        return None
    plan = once.configuration.plan
    return plan, fleet.gpus // (plan.pipeline * plan.tensor)


def batch_of(waiting: int, *, max_batch: int) -> int:
    """The batch that a pipeline takes from its queue: the largest power of two of what waits, up to `max_batch`."""
    batch = min(1, waiting)
    while batch and batch * 2 <= min(waiting, max_batch):
        batch *= 2
    return batch


def _plans(table: LatencyTable, demand: Demand, *, gpus: int) -> Iterator[BatchPlan]:
    """(P, M, B, M1, M2) in the order of the artifact's loops, which settles its ties."""
    if demand.min_gpus > gpus:
        return
    for tensor in _powers_of_two(min(table.max_tensor, gpus)):
        for batch in _powers_of_two(demand.max_batch):
            for initial_parts in _powers_of_two(batch):
                for token_parts in _powers_of_two(batch):
                    for pipeline in range(-(-demand.min_gpus // tensor), gpus // tensor + 1):
                        if table.padded_layers % pipeline == 0:
                            yield BatchPlan(pipeline, tensor, batch, initial_parts, token_parts)


def _artifact_rows(table: LatencyTable, fleet: Fleet, demand: Demand) -> Iterator[Configuration]:
    """Every plan with as many replicas as fit."""
    for plan in _plans(table, demand, gpus=fleet.gpus):
        latency = execution_ms(table, plan, output_tokens=demand.output_tokens)
        yield _configuration(fleet.gpus // (plan.pipeline * plan.tensor), plan, latency)


def _published_rows(table: LatencyTable, fleet: Fleet, demand: Demand) -> Iterator[Configuration]:
    """Every plan with every number of replicas, up to what the cloud offers."""
    for plan in _plans(table, demand, gpus=fleet.reachable):
        latency = execution_ms(table, plan, output_tokens=demand.output_tokens)
        for data in range(1, fleet.reachable // (plan.pipeline * plan.tensor) + 1):
            yield _configuration(data, plan, latency)


def _configuration(data: int, plan: BatchPlan, latency_ms: float) -> Configuration:
    served = throughput_rps(data=data, batch=plan.batch, latency_ms=latency_ms)
    return Configuration(data, plan, latency_ms, served)


def _cheapest_similar(rows: list[Configuration], fastest: Configuration, fleet: Fleet) -> Configuration:
    """Of latencies within `SIMILAR_PERMILLE` of the least: fewest instances, then least latency."""
    limit = fastest.latency_ms * (1000 + SIMILAR_PERMILLE) / 1000
    similar = [row for row in rows if row.latency_ms <= limit]
    return min(similar, key=lambda row: (fleet.instances(row.gpus), row.latency_ms))


def _certificate(measure: str) -> dict[str, str | int | float]:
    return {"kind": "enumeration", "measure": measure}


def _powers_of_two(most: int) -> Iterator[int]:
    """1, 2, 4, ... up to `most`."""
    power = 1
    while power <= most:
        yield power
        power *= 2
