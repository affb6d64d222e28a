"""The same clusters under arrivals that are not periodic: our policy against the paper's and its baselines."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from math import exp, log
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.paper.scenarios import RUNS, TRACES, drawn_requests, phases_of, published_requests, scenario_of
from benchmarks.results_file import say
from spotserve.sim.measures import RunResult
from spotserve.sim.scenario import Scenario
from spotserve.sim.simulation import simulate
from spotserve.sim.workloads import azure_requests, clipped, lengths_of
from spotserve.solvers.planner import make_plan

POLICIES = ("live", "paper+static", "paper", "reroute", "reparallelize")
WORKLOADS = ("published", "cv6", "poisson", "azure")
AZURE_MOST = (512, 128)
"""Azure's prompts and answers are cut to what the paper's models serve: 640 tokens in all."""


def scenario(data: Path, azure: Path, model: str, trace: str, workload: str, seed: int) -> Scenario:
    """A scenario of the matrix."""
    published = published_requests(data, model)
    if workload == "published":
        drawn = published
    else:
        lengths = None
        if workload == "azure":
            sample = azure_requests(azure.read_bytes(), where=azure.name)
            cut = clipped(sample, max_prompt_tokens=AZURE_MOST[0], max_output_tokens=AZURE_MOST[1])
            lengths = lengths_of(cut)
        cv = 6.0 if workload == "cv6" else 1.0
        drawn = drawn_requests(model, cv=cv, seed=seed, duration_s=1500.0, lengths=lengths)
    return scenario_of(data, model, trace, drawn, seed=seed, knows_load=False)


def measure(
    data: Path, azure: Path, *, models: Sequence[str], traces: Sequence[str], workloads: Sequence[str], seeds: int
) -> list[dict[str, Any]]:
    """One row per model, trace, workload, seed and policy; the published files have nothing to draw, so one seed."""
    rows = []
    for model in models:
        phases = phases_of(data, model)
        for trace in traces:
            for workload in workloads:
                for seed in range(1 if workload == "published" else seeds):
                    played = scenario(data, azure, model, trace, workload, seed)
                    for policy in POLICIES:
                        run = simulate(played, policy, make_plan, phases=phases)
                        rows.append(row_of(model, trace, workload, run))
                say(f"beyond: {model} on {trace}, {workload}")
    return rows


def row_of(model: str, trace: str, workload: str, run: RunResult) -> dict[str, Any]:
    """What the tables are made of."""
    return {
        "model": model,
        "trace": trace,
        "workload": workload,
        "seed": run.seed,
        "policy": run.policy,
        "average_s": run.latency_s.mean,
        "p99_s": run.latency_s.p99,
        "fastest_s": run.latency_quantiles_s[0] if run.latency_quantiles_s else 0.0,
        "longest_stall_s": run.stall_s.max,
        "usd_per_million_tokens": run.cost.usd_per_million_tokens,
        "accepted": run.requests.accepted,
        "open": run.requests.open,
        "lost": run.requests.lost,
        "recomputed_tokens": run.recomputed_tokens,
    }


def geometric_mean(values: Sequence[float]) -> float:
    """The mean of ratios."""
    return exp(sum(log(value) for value in values) / len(values)) if values else 0.0


def ratios(rows: Sequence[Mapping[str, Any]], policy: str, field: str) -> list[float]:
    """Of each model, trace, workload and seed: a policy's figure over that of `live`."""
    live = {key_of(row): row[field] for row in rows if row["policy"] == "live"}
    return [
        row[field] / live[key_of(row)]
        for row in rows
        if row["policy"] == policy and row[field] and live.get(key_of(row))
    ]


def key_of(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """What two policies have in common."""
    return row["model"], row["trace"], row["workload"], row["seed"]


def render(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """The rows as markdown."""
    yield "## Beyond: every accepted request counted, medians over seeds (seconds)"
    yield ""
    yield (
        "| model | trace | workload | "
        + " | ".join(f"{policy} P99 / stall" for policy in POLICIES)
        + " | open | lost |"
    )
    yield "| --- |" + " --- |" * (len(POLICIES) + 4)
    for group in dict.fromkeys((row["model"], row["trace"], row["workload"]) for row in rows):
        same = [row for row in rows if (row["model"], row["trace"], row["workload"]) == group]
        cells = []
        for policy in POLICIES:
            own = [row for row in same if row["policy"] == policy]
            cells.append(
                f"{median(row['p99_s'] for row in own):.1f} / {median(row['longest_stall_s'] for row in own):.1f}"
            )
        ends = f"{max(row['open'] for row in same)} | {max(row['lost'] for row in same)}"
        yield f"| {' | '.join(group)} | {' | '.join(cells)} | {ends} |"
    yield ""
    yield "Geometric means of the ratio to `live`, run by run:"
    yield ""
    yield "| workload | policy | P99 | longest stall | cost per token | runs |"
    yield "| --- |" + " --- |" * 5
    for workload in dict.fromkeys(row["workload"] for row in rows):
        own = [row for row in rows if row["workload"] == workload]
        for policy in POLICIES[1:]:
            p99, stall = ratios(own, policy, "p99_s"), ratios(own, policy, "longest_stall_s")
            cost = ratios(own, policy, "usd_per_million_tokens")
            yield (
                f"| {workload} | {policy} | {geometric_mean(p99):.2f} | {geometric_mean(stall):.2f} | "
                f"{geometric_mean(cost):.2f} | {len(p99)} |"
            )


MODELS = tuple(RUNS)
TRACE_NAMES = tuple(TRACES)
