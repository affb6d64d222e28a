"""Policies side by side: the same capacity and the same requests, seed by seed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from statistics import median

from spotserve.core.frozen import Frozen
from spotserve.sim.hardware import Hardware
from spotserve.sim.measures import RunResult
from spotserve.sim.scenario import Scenario, Slo
from spotserve.sim.workloads import Arrival


class ScenarioFacts(Frozen):
    """What was simulated, and where it comes from."""

    name: str
    model: str
    profile: str
    profile_source: str
    trace: str
    trace_source: str
    trace_notes: tuple[str, ...]
    workload: str
    workload_source: str
    workload_notes: tuple[str, ...]
    num_requests: int
    mean_rps: float
    gpus_per_instance: int
    hardware: Hardware
    ondemand_instances: int | None
    """Of the policy that rents no spot instance; the trace is not for it."""
    slo: Slo
    duration_s: float
    drain_s: float
    """Requests that are open at the end of the duration have so long to end."""


class PolicyLine(Frozen):
    """One policy over all seeds: medians of the runs, the worst of what must not happen at all."""

    policy: str
    seeds: int
    latency_p50_s: float
    latency_p99_s: float
    ttft_p99_s: float
    tpot_p99_s: float
    longest_stall_s: float
    goodput_rps: float
    slo_share: float
    usd: float
    usd_per_million_tokens: float | None
    recomputed_tokens: float
    migrations: float
    open: int
    lost: int
    p99_ratio: float | None
    """Of its latency P99 to that of the first policy, seed by seed."""
    cost_ratio: float | None
    """Of its cost per token, likewise."""


class Comparison(Frozen):
    """The answer of `spotserve simulate`."""

    format_version: str = "0.1"
    scenario: ScenarioFacts
    policies: tuple[PolicyLine, ...]
    runs: tuple[RunResult, ...]


def facts_of(scenario: Scenario) -> ScenarioFacts:
    """The facts of a scenario."""
    workload = scenario.workload
    played = scenario.arrivals()
    return ScenarioFacts(
        name=scenario.name,
        model=scenario.spec.model.name,
        profile=scenario.spec.profile.name,
        profile_source=scenario.spec.profile.source,
        trace=scenario.trace.name,
        trace_source=scenario.trace.source,
        trace_notes=scenario.trace.notes,
        workload=workload.name,
        workload_source=workload.source,
        workload_notes=(*workload.notes, *_play_notes(scenario, played)),
        num_requests=len(played),
        mean_rps=round(len(played) / scenario.duration_s, 6),
        gpus_per_instance=scenario.hardware.gpus_per_instance,
        hardware=scenario.hardware,
        ondemand_instances=scenario.ondemand_instances,
        slo=scenario.slo,
        duration_s=scenario.duration_s,
        drain_s=scenario.drain_s,
    )


def _play_notes(scenario: Scenario, played: tuple[Arrival, ...]) -> Iterator[str]:
    """What playing the requests changes about them."""
    given = scenario.workload.arrivals
    if len(played) < len(given):
        yield f"the first {len(played)} of {len(given)} requests: those within {scenario.duration_s:g} s"
    cut = sum(one != other for one, other in zip(played, given, strict=False))
    if cut:
        longest = scenario.spec.limits.max_model_len
        yield f"prompts and answers cut to {longest} tokens together: {cut} of {len(played)} requests"


def compared(scenario: Scenario, runs: Iterable[RunResult]) -> Comparison:
    """The runs of all policies and seeds; the first policy is what the others are measured against."""
    kept = tuple(runs)
    names = tuple(dict.fromkeys(run.policy for run in kept))
    by_policy = {name: [run for run in kept if run.policy == name] for name in names}
    base = by_policy[names[0]] if names else []
    lines = tuple(_line(name, same, base) for name, same in by_policy.items())
    return Comparison(scenario=facts_of(scenario), policies=lines, runs=kept)


def _line(name: str, runs: list[RunResult], base: list[RunResult]) -> PolicyLine:
    def middle(of: Callable[[RunResult], float]) -> float:
        return round(median(of(run) for run in runs), 6)

    per_million = [one for run in runs if (one := run.cost.usd_per_million_tokens) is not None]
    return PolicyLine(
        policy=name,
        seeds=len(runs),
        latency_p50_s=middle(lambda run: run.latency_s.p50),
        latency_p99_s=middle(lambda run: run.latency_s.p99),
        ttft_p99_s=middle(lambda run: run.ttft_s.p99),
        tpot_p99_s=middle(lambda run: run.tpot_s.p99),
        longest_stall_s=middle(lambda run: run.stall_s.max),
        goodput_rps=middle(lambda run: run.goodput_rps),
        slo_share=middle(lambda run: run.slo_share),
        usd=middle(lambda run: run.cost.usd),
        usd_per_million_tokens=round(median(per_million), 6) if per_million else None,
        recomputed_tokens=middle(lambda run: run.recomputed_tokens),
        migrations=middle(lambda run: len(run.migrations)),
        open=max(run.requests.open for run in runs),
        lost=max(run.requests.lost for run in runs),
        p99_ratio=_ratio(runs, base, lambda run: run.latency_s.p99),
        cost_ratio=_ratio(runs, base, lambda run: run.cost.usd_per_million_tokens),
    )


def _ratio(runs: list[RunResult], base: list[RunResult], of: Callable[[RunResult], float | None]) -> float | None:
    of_seed = {run.seed: of(run) for run in base}
    ratios = [
        value / reference
        for run in runs
        if (value := of(run)) is not None and (reference := of_seed.get(run.seed)) is not None and reference > 0
    ]
    return round(median(ratios), 6) if ratios else None
