"""The simulator at size: a large model on mixed GPUs over days of real capacity, and its own speed as clusters grow.

    python -m benchmarks.simulator --data DIR [--part mixed|speed] [--days 2] [--sizes 16,64,256,1024] [--out F]

DIR holds `skypilot-spot-traces/` and `azure-llm-2023/`. Both parts are scenarios as a person could write them. Each run
is a process of its own, so that its processor time and peak memory are those of one simulation. Results of the parts
that ran replace those of the same parts in the results file; the others stay.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from benchmarks.results_file import circumstances, say, write_results
from spotserve.cli.scenario_file import resolved
from spotserve.core.controller import Entry
from spotserve.core.plan import Plan, PlanningProblem
from spotserve.core.strict_json import shaped
from spotserve.sim.measures import Moment
from spotserve.sim.scenario import Scenario, ScenarioFile
from spotserve.sim.simulation import simulate
from spotserve.solvers.planner import make_plan

DAY_S = 86_400
FIRST_DAY = 8.5
"""Of the SkyPilot counts: both 16-node zones change most around it."""
ZONES = {
    "availability/16-node/aws-08-27-2023/us-west-2c_v100_1.json": "own",
    "availability/16-node/aws-08-27-2023/us-east-2b_v100_1.json": "a10g",
    "preemption/4-node/aws-08-03-2023/us-east-2a_v100_1.json": "a10g",
}
"""Zone -> the GPU type that its nodes stand for; of each at most 6 instances of 4 GPUs: 24 + 24 + 16."""
AZURE = "azure-llm-2023/AzureLLMInferenceTrace_conv.csv"
POLICIES = ("live", "reroute", "reparallelize", "ondemand")
MODEL = {"name": "llama-70b", "dtype": "bfloat16", "profile": "l40s", "max_running": 32, "max_model_len": 4096}
L40S = {
    "gpus_per_instance": 4,
    "gpu_memory_bytes": 43_000_000_000,
    "spot_usd_per_hour": 5.28,
    "ondemand_usd_per_hour": 10.49264,
}
A10G = {
    "gpus_per_instance": 4,
    "gpu_memory_bytes": 21_000_000_000,
    "spot_usd_per_hour": 2.18,
    "ondemand_usd_per_hour": 5.672,
}
"""g6e.12xlarge and g5.12xlarge, prices of the catalogue."""
GPUS_PER_INSTANCE = 4
LOAD_RPS_PER_GPU = 0.04


def mixed_scenario(data: Path, *, days: float, rate_rps: float, seed: int, first_day: float = FIRST_DAY) -> Scenario:
    """Llama 3 70B on up to 64 GPUs of two types in three zones, as those of the SkyPilot traces came and went."""
    start_s = first_day * DAY_S
    return _scenario(
        {
            "name": "Llama-3-70B on 64 mixed GPUs",
            "ondemand_instances": 4,
            "model": MODEL,
            "hardware": {**L40S, "start_s": 180, "types": {"a10g": A10G}},
            "trace": {
                "zones": [f"skypilot-spot-traces/{zone}" for zone in ZONES],
                "gpu_types": list(ZONES.values()),
                "most_per_zone": 6,
                "victims": "random",
                "grace_s": 120,
                "start_s": start_s,
                "stop_s": start_s + days * DAY_S,
            },
            "workload": {
                "rate_rps": rate_rps,
                "cv": 2.0,
                "swing": 0.4,
                "max_prompt_tokens": 3072,
                "max_output_tokens": 1024,
                "lengths": {"kind": "file", "file": AZURE},
            },
            "slo": {"ttft_s": 10, "tpot_s": 0.2},
        },
        data,
        seed=seed,
    )


def sized_scenario(num_gpus: int, *, duration_s: float, seed: int) -> Scenario:
    """The same model on so many GPUs of one type in four zones that lose instances, and load in proportion."""
    each, rest = divmod(num_gpus // GPUS_PER_INSTANCE, 4)
    hazards = [
        {"zone": f"z{number}", "instances": each + (number < rest), "shocks_per_day": 6, "shock_share": 0.3}
        for number in range(4)
    ]
    return _scenario(
        {
            "name": f"Llama-3-70B on {num_gpus} GPUs",
            "duration_s": duration_s,
            "model": MODEL,
            "hardware": {**L40S, "start_s": 180},
            "trace": {"hazards": [hazard for hazard in hazards if hazard["instances"]], "unnoticed_share": 0.1},
            "workload": {
                "rate_rps": num_gpus * LOAD_RPS_PER_GPU,
                "cv": 2.0,
                "lengths": {"kind": "lognormal", "prompt_tokens": 800, "output_tokens": 200},
                "max_prompt_tokens": 3072,
                "max_output_tokens": 1024,
            },
            "slo": {"ttft_s": 10, "tpot_s": 0.2},
        },
        Path(),
        seed=seed,
    )


def _scenario(document: Mapping[str, Any], folder: Path, *, seed: int) -> Scenario:
    return replace(resolved(shaped(ScenarioFile, dict(document)), folder, seed=seed), drain_s=300.0)


class _Counting:
    """A journal that counts entries."""

    def __init__(self) -> None:
        self.count = 0

    async def append(self, entries: Sequence[Entry]) -> None:
        """Count them."""
        self.count += len(entries)


def measured(scenario: Scenario, policy: str) -> dict[str, Any]:
    """One run: what came of it, and what it took."""
    took_s: list[float] = []

    def solve(problem: PlanningProblem) -> Plan:
        begun_s = time.process_time()
        try:
            return make_plan(problem)
        finally:
            took_s.append(time.process_time() - begun_s)

    entries = _Counting()
    begun_s = time.process_time()
    result = simulate(scenario, policy, solve, journal=entries)
    cpu_s = time.process_time() - begun_s
    return {
        "policy": policy,
        "requests": result.requests.model_dump(),
        "latency_p50_s": result.latency_s.p50,
        "latency_p99_s": result.latency_s.p99,
        "ttft_p99_s": result.ttft_s.p99,
        "stall_p99_s": result.stall_s.p99,
        "stall_max_s": result.stall_s.max,
        "slo_share": result.slo_share,
        "usd": result.cost.usd,
        "instance_hours": result.cost.instance_hours,
        "usd_per_million_tokens": result.cost.usd_per_million_tokens,
        "tokens": result.tokens,
        "recomputed_tokens": result.recomputed_tokens,
        "migrations": len(result.migrations),
        "served_share": round(_served_s(result.timeline, scenario.duration_s) / scenario.duration_s, 6),
        "journal_digest": result.journal_digest,
        "entries": entries.count,
        "simulated_s": result.simulated_s,
        "cpu_s": round(cpu_s, 3),
        "plans": len(took_s),
        "planning_cpu_s": round(sum(took_s), 3),
        "longest_plan_cpu_s": round(max(took_s, default=0.0), 3),
        "peak_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1),
    }


def _served_s(timeline: Iterable[Moment], duration_s: float) -> float:
    """Seconds in which any replica served."""
    moments = list(timeline)
    ends = [*(moment.at_s for moment in moments[1:]), duration_s]
    return sum(
        max(0.0, min(end_s, duration_s) - moment.at_s)
        for moment, end_s in zip(moments, ends, strict=True)
        if moment.gpus
    )


def mixed_run(options: argparse.Namespace, policy: str) -> dict[str, Any]:
    """One policy over the days."""
    return measured(_mixed_scenario(options), policy)


def _mixed_scenario(options: argparse.Namespace) -> Scenario:
    return mixed_scenario(
        options.data, days=options.days, rate_rps=options.rate, seed=options.seed, first_day=options.first_day
    )


def sized_run(num_gpus: int, duration_s: float, seed: int) -> dict[str, Any]:
    """Our policy on so many GPUs."""
    return {"gpus": num_gpus, **measured(sized_scenario(num_gpus, duration_s=duration_s, seed=seed), "live")}


def facts_of(scenario: Scenario) -> dict[str, Any]:
    """What is told of a scenario beside its results."""
    counts = sum(len(event.instances) for event in scenario.trace.events if event.kind == "add")
    lost = sum(len(event.instances) for event in scenario.trace.events if event.kind in ("notice", "kill"))
    return {
        "trace": scenario.trace.name,
        "trace_notes": scenario.trace.notes,
        "workload_source": scenario.workload.source,
        "workload_notes": scenario.workload.notes,
        "requests": len(scenario.workload.arrivals),
        "instances_that_came": counts,
        "instances_that_went": lost,
        "duration_s": scenario.duration_s,
    }


def main() -> None:
    """Run the parts asked for."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.simulator", description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--part", action="append", choices=("mixed", "speed"))
    parser.add_argument("--days", type=float, default=2.0)
    parser.add_argument("--first-day", type=float, default=FIRST_DAY)
    parser.add_argument("--rate", type=float, default=0.8)
    parser.add_argument("--policies", default=",".join(POLICIES))
    parser.add_argument("--sizes", default="16,64,256,1024")
    parser.add_argument("--hours", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/simulator"))
    options = parser.parse_args()
    known = options.out.with_suffix(".json")
    results: dict[str, Any] = json.loads(known.read_text(encoding="utf-8")) if known.exists() else {"parts": {}}
    for part in options.part or ("mixed", "speed"):
        facts = circumstances("benchmarks.simulator")
        measure = _mixed if part == "mixed" else _speed
        for measures in measure(options):
            results["parts"][part] = {"circumstances": facts, "seed": options.seed, **measures}
            write_results(options.out, results, lambda saved: "\n".join(page(saved)) + "\n")


def _mixed(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """What there is after each policy."""
    facts = facts_of(_mixed_scenario(options))
    rows = []
    for policy in options.policies.split(","):
        with _one_process() as pool:
            rows.append(pool.submit(mixed_run, options, policy).result())
        say(f"{policy}: {rows[-1]['cpu_s']:.0f} s of processor time")
        yield {"scenario": facts, "rows": rows}


def _speed(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """What there is after each size."""
    rows = []
    for size in (int(size) for size in options.sizes.split(",")):
        with _one_process() as pool:
            rows.append(pool.submit(sized_run, size, 3600 * options.hours, options.seed).result())
        say(f"{size} GPUs: {rows[-1]['cpu_s']:.0f} s of processor time")
        yield {"rows": rows, "hours": options.hours}


def _one_process() -> ProcessPoolExecutor:
    return ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn"))


def page(results: Mapping[str, Any]) -> Iterator[str]:
    """The results as markdown."""
    yield "# The simulator at size"
    for part, render in (("mixed", mixed_lines), ("speed", speed_lines)):
        saved = results["parts"].get(part)
        if saved is not None:
            facts = saved["circumstances"]
            state = f"commit {facts['commit'][:9]}, {facts['uncommitted_files']} uncommitted files"
            load = facts["load_average_before"][0]
            yield ""
            yield from render(saved)
            yield ""
            yield (
                f"`{facts['command']}`, {state}, {facts['processor']}, {facts['cores']} cores "
                f"(load {load:.1f} before it), seed {saved['seed']}."
            )


def mixed_lines(saved: Mapping[str, Any]) -> Iterator[str]:
    """A 70B model over the days, policy by policy."""
    facts, rows = saved["scenario"], saved["rows"]
    base = rows[0]
    days = facts["duration_s"] / DAY_S
    yield f"## Llama 3 70B on up to 64 GPUs of two types, {days:g} days of the SkyPilot traces"
    yield ""
    yield (
        f"{facts['requests']} requests ({facts['workload_source']}; {'; '.join(facts['workload_notes'])}). "
        f"{facts['instances_that_came']} instances came and {facts['instances_that_went']} went. "
        f"{'; '.join(facts['trace_notes'])}. us-west-2c has instances of 4 L40S, us-east-2b and us-east-2a of 4 A10G: "
        "up to 24, 24 and 16 GPUs; the zones' counts are of different weeks, taken as if they began together. Times "
        "are rooflines; `ondemand` is `live` on 4 L40S instances that stay. `paper` knows one GPU type and is refused. "
        "`x` is over the first row; `served` is the share of the time in which any replica served."
    )
    yield ""
    yield from table(
        {
            "Policy": lambda row: row["policy"],
            "P50": lambda row: f"{row['latency_p50_s']:.2f} s",
            "P99": lambda row: f"{row['latency_p99_s']:.1f} s",
            "P99 x": lambda row: f"{row['latency_p99_s'] / base['latency_p99_s']:.2f}",
            "TTFT P99": lambda row: f"{row['ttft_p99_s']:.1f} s",
            "Stall P99": lambda row: f"{row['stall_p99_s']:.2f} s",
            "Longest stall": lambda row: f"{row['stall_max_s']:.1f} s",
            "In SLO": lambda row: f"{100 * row['slo_share']:.1f} %",
            "USD": lambda row: f"{row['usd']:.0f}",
            "USD/M tokens": lambda row: f"{row['usd_per_million_tokens']:.2f}",
            "x": lambda row: f"{row['usd_per_million_tokens'] / base['usd_per_million_tokens']:.2f}",
            "Served": lambda row: f"{100 * row['served_share']:.1f} %",
            "Open": lambda row: row["requests"]["open"],
            "Lost": lambda row: row["requests"]["lost"],
            "Recomputed": lambda row: row["recomputed_tokens"],
            "Migrations": lambda row: row["migrations"],
            "CPU s": lambda row: f"{row['cpu_s']:.0f}",
            "Planning": lambda row: f"{100 * row['planning_cpu_s'] / row['cpu_s']:.0f} %",
            "Speed": lambda row: f"{row['simulated_s'] / row['cpu_s']:.0f}",
            "Peak MiB": lambda row: f"{row['peak_mib']:.0f}",
        },
        rows,
    )


def table(columns: Mapping[str, Callable[[Any], object]], rows: Iterable[Any]) -> Iterator[str]:
    """A markdown table: a title and a cell's text for each column."""
    yield f"| {' | '.join(columns)} |"
    yield "|" + " --- |" * len(columns)
    for row in rows:
        yield f"| {' | '.join(str(cell(row)) for cell in columns.values())} |"


def speed_lines(saved: Mapping[str, Any]) -> Iterator[str]:
    """Speed and memory by size."""
    yield f"## The simulator's own speed: `live` for {saved['hours']:g} h as the cluster grows"
    yield ""
    yield (
        "Llama 3 70B on instances of 4 L40S in four zones whose losses are drawn (6 shocks a day that take 0.3 of a "
        f"zone, one single loss per instance and day), {LOAD_RPS_PER_GPU:g} requests per second and GPU. CPU seconds "
        "are those of the one process that simulates; planning is what the real planner took of them, which beside a "
        "daemon has a process of its own; speed is simulated seconds per CPU second, with planning and without."
    )
    yield ""
    yield from table(
        {
            "GPUs": lambda row: row["gpus"],
            "Requests": lambda row: row["requests"]["accepted"],
            "Tokens": lambda row: row["tokens"],
            "Journal entries": lambda row: row["entries"],
            "Migrations": lambda row: row["migrations"],
            "CPU s": lambda row: f"{row['cpu_s']:.1f}",
            "Plans": lambda row: row["plans"],
            "Planning s": lambda row: f"{row['planning_cpu_s']:.1f}",
            "Longest plan": lambda row: f"{row['longest_plan_cpu_s']:.2f} s",
            "Speed": lambda row: f"{row['simulated_s'] / row['cpu_s']:.0f}",
            "Speed without planning": lambda row: f"{row['simulated_s'] / _own_s(row):.0f}",
            "CPU us per token": lambda row: f"{1e6 * _own_s(row) / row['tokens']:.1f}",
            "Peak MiB": lambda row: f"{row['peak_mib']:.0f}",
            "P99": lambda row: f"{row['latency_p99_s']:.1f} s",
            "Lost": lambda row: row["requests"]["lost"],
        },
        saved["rows"],
    )


def _own_s(row: Mapping[str, Any]) -> float:
    own_s: float = row["cpu_s"] - row["planning_cpu_s"]
    return own_s


if __name__ == "__main__":
    main()
