"""What a simulated run was like: for clients, for whoever pays, and minute by minute."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import ceil

from spotserve.core.frozen import Frozen
from spotserve.sim.cluster import InstanceRecord
from spotserve.sim.hardware import Hardware
from spotserve.sim.ledger import RequestRecord
from spotserve.sim.scenario import Slo


class Spread(Frozen):
    """A sample in seconds: `p50` is the smallest value that at least half of the sample does not exceed."""

    count: int = 0
    mean: float = 0.0
    p50: float = 0.0
    p90: float = 0.0
    p99: float = 0.0
    max: float = 0.0

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        """The spread of a sample, all 0 of an empty one."""
        ordered = sorted(values)
        if not ordered:
            return cls()
        return cls(
            count=len(ordered),
            mean=round(sum(ordered) / len(ordered), 6),
            p50=round(percentile(ordered, 50), 6),
            p90=round(percentile(ordered, 90), 6),
            p99=round(percentile(ordered, 99), 6),
            max=round(ordered[-1], 6),
        )


def quantiles(values: Iterable[float]) -> tuple[float, ...]:
    """The values at 0, 1, … 100 % of a sample, nothing of an empty one."""
    ordered = sorted(values)
    return tuple(round(percentile(ordered, percent), 6) for percent in range(101)) if ordered else ()


def percentile(ordered: Sequence[float], percent: float) -> float:
    """Nearest rank of a sample in order."""
    return ordered[max(0, ceil(len(ordered) * percent / 100) - 1)]


class Moment(Frozen):
    """The cluster from `at_s` on, until the next one."""

    at_s: float
    service: str
    instances: int
    """Ready or doomed."""
    gpus_there: int
    """Of these instances."""
    gpus: int
    """In replicas that serve."""
    layout: str
    """(D, P, M) of equal replicas, one after another of unequal ones, `-` of none."""


class MigrationLine(Frozen):
    """A plan run as the controller tells it."""

    at_s: float
    """When it began."""
    epoch: int
    trigger: str
    mode: str
    outcome: str | None
    estimated_s: float
    stall_s_max: float
    weight_bytes: int
    kv_bytes: int
    recomputed_tokens: int


class Requests(Frozen):
    """Every accepted request is in exactly one of the others; `lost` are those that nobody answers for."""

    accepted: int
    finished: int
    failed: int
    open: int
    """Still running when the simulation ended."""
    lost: int


class Cost(Frozen):
    """What the instances cost within the scenario's duration."""

    instance_hours: float
    usd: float
    usd_per_million_tokens: float | None


class RunResult(Frozen):
    """One policy under one seed. Times in seconds; open requests count with the time they have waited so far."""

    policy: str
    seed: int
    requests: Requests
    latency_s: Spread
    ttft_s: Spread
    tpot_s: Spread
    stall_s: Spread
    """Of each request the longest gap between two of its tokens; an open one has been waiting since its last."""
    latency_quantiles_s: tuple[float, ...]
    """Of the latencies, at 0, 1, … 100 %."""
    goodput_rps: float
    """Requests within the SLO per second of the scenario."""
    slo_share: float
    tokens: int
    recomputed_tokens: int
    cost: Cost
    migrations: tuple[MigrationLine, ...]
    timeline: tuple[Moment, ...]
    duration_s: float
    simulated_s: float
    journal_digest: str


def cost_of(instances: Iterable[InstanceRecord], hardware: Hardware, *, duration_s: float, tokens: int) -> Cost:
    """Every instance is paid for from the moment it is asked for."""
    hours, usd = 0.0, 0.0
    for record in instances:
        stop_s = min(duration_s, duration_s if record.gone_at_s is None else record.gone_at_s)
        used = max(0.0, stop_s - min(record.asked_at_s, duration_s)) / 3600.0
        machine = hardware.of(record.gpu_type)
        price = machine.spot_usd_per_hour if record.market == "spot" else machine.ondemand_usd_per_hour
        hours += used
        usd += used * price
    per_million = round(usd / tokens * 1e6, 6) if tokens else None
    return Cost(instance_hours=round(hours, 6), usd=round(usd, 6), usd_per_million_tokens=per_million)


def latency_of(record: RequestRecord, end_s: float) -> float:
    """From its arrival to its end at the client, or to now."""
    return (end_s if record.ended_at_s is None else record.ended_at_s + record.deliver_s) - record.arrived_at_s


def ttft_of(record: RequestRecord, end_s: float) -> float:
    """From its arrival to its first token at the client, or to now."""
    first = [stream.first_at_s + record.deliver_s for stream in record.streams if stream.first_at_s is not None]
    return min(first, default=end_s) - record.arrived_at_s


def tpot_of(record: RequestRecord, end_s: float) -> float | None:
    """Seconds per token after the first, as if an open one had its next token now; None where there is none."""
    times = []
    for one in record.streams:
        if one.first_at_s is None or one.last_at_s is None:
            continue
        if one.num_tokens > 1:
            times.append((one.last_at_s - one.first_at_s) / (one.num_tokens - 1))
        if record.ended_at_s is None and not one.closed:
            times.append((end_s - one.first_at_s) / one.num_tokens)
    return max(times, default=None)


def stall_of(record: RequestRecord, end_s: float) -> float:
    """The longest gap between two tokens of a stream; an open stream's last gap goes on until now."""
    stalls = [record.stall_s]
    if record.ended_at_s is None:
        stalls += [end_s - one.last_at_s for one in record.streams if not one.closed and one.last_at_s is not None]
    return max(stalls)


def keeps(record: RequestRecord, slo: Slo) -> bool:
    """Whether a request was served well."""
    if record.ended != "finished" or record.ended_at_s is None:
        return False
    tpot_s = tpot_of(record, record.ended_at_s)
    return (
        (slo.latency_s is None or latency_of(record, record.ended_at_s) <= slo.latency_s)
        and (slo.ttft_s is None or ttft_of(record, record.ended_at_s) <= slo.ttft_s)
        and (slo.tpot_s is None or tpot_s is None or tpot_s <= slo.tpot_s)
    )
