"""The paper's runs as scenarios: three models on 4 T4 per instance, four traces, the published request files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from spotserve.cloud.traces import read_trace
from spotserve.core.model_tables import model_table
from spotserve.core.paper_profiles import (
    GPUS_PER_INSTANCE,
    ON_DEMAND_USD_PER_INSTANCE_HOUR,
    PROMPT_TOKENS,
    SPOT_USD_PER_INSTANCE_HOUR,
    paper_profile,
)
from spotserve.core.snapshot import Replica
from spotserve.core.spec import Limits, ServingSpec
from spotserve.core.trace import Trace, delayed
from spotserve.sim.durations import Phases
from spotserve.sim.hardware import Hardware
from spotserve.sim.scenario import Scenario, Slo
from spotserve.sim.workloads import FixedLengths, Workload, constant, paper_requests, synthetic
from spotserve.solvers.paper.latency import OUTPUT_TOKENS, BatchPlan, careful, latency_table, phase_times

TRACES = {
    "A_S": "trace_0304_real.txt",
    "B_S": "trace_0506_real.txt",
    "A_S+O": "trace_0304_ondemand.txt",
    "B_S+O": "trace_0506_ondemand.txt",
}
FLUCTUATING = {"A'_S+O": "trace_0304_workload.txt", "B'_S+O": "trace_0506_workload.txt"}
"""Of Figure 8, whose demand changes."""
ACTS_EARLY_S = 30.0
"""The replayer acts on every line a grace period before its stamp; what is added is there at the stamp."""

BATCH = 4
"""The largest batch of the artifact's scripts."""

GPU_MEMORY_BYTES = 14_000_000_000
"""Of a T4's 16 GB, what is left to an engine."""

LEAST_KV_TOKENS = 12_288
"""KV and workspace that a replica must have room for; so the fewest GPUs are 4, 12 and 16 (the paper, Table 1)."""

RELOAD_BYTES_PER_S = 1.0e9
"""Assumed: an instance reloads from its disk at 1 GB/s, so that a pipeline of GPT-20B takes about half a minute."""


@dataclass(frozen=True, slots=True)
class PaperRun:
    """A model of the evaluation: its table, profile file, request file and the rate the optimizer is given."""

    table: str
    profile: str
    requests: str
    told_rps: float
    rerouted: tuple[int, int]
    """The (P, M) that its optimizer has for 40 GPUs, which Rerouting keeps."""


RUNS = {
    "OPT-6.7B": PaperRun("opt-6.7b", "megatron_6.7B", "query6144_tpt1.5_cv6.txt", 2.0, (2, 4)),
    "GPT-20B": PaperRun("gpt-20b", "megatron_h6144", "query_tpt0.35_cv6.txt", 0.4, (2, 8)),
    "LLaMA-30B": PaperRun("llama-30b", "megatron_h7168", "query_tpt0.2_cv6.txt", 0.2, (4, 8)),
}
FLUCTUATING_REQUESTS = "query_realAr_cv6.txt"
FLUCTUATING_RPS = 0.6
"""What the optimizer is told until the trace says otherwise; the model is GPT-20B."""
RATES_RPS = {"OPT-6.7B": 1.5, "GPT-20B": 0.35, "LLaMA-30B": 0.2}


def trace_of(data: Path, name: str) -> Trace:
    """A trace with what it adds ready at its stamps."""
    trace = read_trace(data / "traces/availability" / {**TRACES, **FLUCTUATING}[name])
    notices = {event.at_s for event in trace.events if event.kind == "notice"}
    events = [
        # Overload begins a grace period before the stamp and is noticed at it (section 6.3).
        event.model_copy(update={"at_s": event.at_s + ACTS_EARLY_S})
        if event.kind == "load" and event.at_s not in notices
        else event
        for event in trace.events
    ]
    events.sort(key=lambda event: event.at_s)
    named = trace.model_copy(update={"name": name, "events": tuple(events)})
    return delayed(named, lag_s=ACTS_EARLY_S)


def published_requests(data: Path, model: str, trace: str = "A_S") -> Workload:
    """The request file that the artifact replays for a model, or on a trace whose demand changes."""
    path = data / "traces/workload" / (FLUCTUATING_REQUESTS if trace in FLUCTUATING else RUNS[model].requests)
    return paper_requests(path.read_bytes(), where=path.name)


def drawn_requests(model: str, *, cv: float, seed: int, duration_s: float) -> Workload:
    """Requests of a model's rate whose gaps really have this coefficient of variation."""
    return synthetic(constant(RATES_RPS[model]), FixedLengths(), cv=cv, duration_s=duration_s, seed=seed)


def scenario_of(
    data: Path,
    model: str,
    trace_name: str,
    workload: Workload,
    *,
    seed: int,
    knows_load: bool,
    solvers: Mapping[str, str] | None = None,
    shape: tuple[int, int] | None = None,
    static_batches: int | None = None,
    reload_bytes_per_s: float = RELOAD_BYTES_PER_S,
) -> Scenario:
    """One run of the evaluation; the paper's baselines have its optimizer (`solvers`), one a fixed (P, M) (`shape`).

    `static_batches` are those that a pipeline may hold, where not the policy's own number.
    """
    run = RUNS[model]
    trace = trace_of(data, trace_name)
    assert trace.end_s is not None, "the paper's traces end with DONE"
    table = model_table(run.table)
    profile = paper_profile(run.table).model_copy(update={"storage_bytes_per_s": reload_bytes_per_s})
    length = table.max_model_len
    pipeline, tensor = shape or (None, None)
    limits = Limits(
        pipeline=pipeline,
        tensor=tensor,
        max_running=BATCH,
        max_model_len=length,
        min_kv_tokens=LEAST_KV_TOKENS,
        expected_tokens=(PROMPT_TOKENS, OUTPUT_TOKENS),
    )
    if static_batches is not None:
        limits = limits.model_copy(update={"static_batches": static_batches})
    told_rps = FLUCTUATING_RPS if trace_name in FLUCTUATING else run.told_rps
    return Scenario(
        name=f"{model} on {trace_name}",
        spec=ServingSpec(model=table, profile=profile, limits=limits, solvers=dict(solvers or {})),
        hardware=Hardware(
            gpus_per_instance=GPUS_PER_INSTANCE,
            gpu_memory_bytes=GPU_MEMORY_BYTES,
            start_s=120.0,
            spot_usd_per_hour=SPOT_USD_PER_INSTANCE_HOUR,
            ondemand_usd_per_hour=ON_DEMAND_USD_PER_INSTANCE_HOUR,
        ),
        trace=trace,
        workload=workload,
        slo=Slo(),
        seed=seed,
        policies=(),
        duration_s=trace.end_s,
        known_load_rps=told_rps if knows_load else None,
        ondemand_instances=8,
    )


def phases_of(data: Path, model: str) -> Phases:
    """Times of static batches as the artifact's profile has them, with its careful factor of 1.1."""
    path = data / "profiles/T4-4x" / f"{RUNS[model].profile}_profile.json"
    table = latency_table(path.read_text(encoding="utf-8"))

    def phases(replica: Replica, sequences: int) -> tuple[float, float]:
        batch = 1 << max(0, sequences - 1).bit_length()
        plan = BatchPlan(replica.pipeline, replica.tensor, batch, initial_parts=batch, token_parts=1)
        times = careful(table, phase_times(table, plan))
        return times.initial_ms / 1000.0, times.token_ms / 1000.0

    return phases
