"""Table 1, the bills of Figure 7, the 54 %, and Figure 7's fleets that stay."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.paper.published import MODEL, Published
from benchmarks.paper.scenarios import RUNS, TRACES
from benchmarks.paper.systems import SPOTSERVE, play, play_on_demand, row_of
from benchmarks.results_file import say
from spotserve.solvers.paper.latency import BatchPlan, execution_ms, latency_table
from spotserve.solvers.paper.models import PAPER_MODELS, min_gpus

WEIGHT_BUDGET_BYTES = 12 * 10**9
"""Of a T4's 16 GB for weights: what gives the paper's fewest GPUs, which its artifact has as an input."""

BASE_INSTANCES = 8
"""The on-demand fleet that the saving is of."""


def measure_table_1(data: Path) -> list[dict[str, Any]]:
    """The fewest GPUs from memory, and l_exe of one sequence from the profile, model by model."""
    rows = []
    for model, published in Published.read(data).table_1.items():
        path = data / "profiles/T4-4x" / f"{RUNS[model].profile}_profile.json"
        table = latency_table(path.read_text(encoding="utf-8"))
        plan = BatchPlan(int(published["P"]), int(published["M"]), batch=1, initial_parts=1, token_parts=1)
        fewest = min_gpus(PAPER_MODELS[model], weight_budget_bytes=WEIGHT_BUDGET_BYTES)
        rows.append(
            {
                "model": model,
                "shape": [plan.pipeline, plan.tensor],
                "min_gpus": fewest,
                "published_min_gpus": int(published["min_gpus"]),
                "l_exe_s": execution_ms(table, plan) / 1000,
                "published_l_exe_s": published["l_exe_B1_s"],
            }
        )
    return rows


def measure(data: Path) -> dict[str, Any]:
    """Bills of simulated runs, and the fleets that stay."""
    published = Published.read(data)
    duration_s = published.on_demand_s_billed
    fleets = []
    for instances, (average_s, p99_s) in published.on_demand_s.items():
        row = {"instances": instances, **row_of(play_on_demand(data, MODEL, instances, duration_s=duration_s))}
        row |= {"published_average_s": average_s, "published_p99_s": p99_s}
        fleets.append(row | {"published_usd": published.on_demand_usd(instances)})
        say(f"figure 7: {instances} instances on demand")
    bills = []
    for trace in TRACES:
        run = play(data, MODEL, trace, SPOTSERVE).run
        bills.append({"trace": trace, "usd": run.cost.usd, "published_usd": published.usd(trace)})
    of_trace = next(row["usd"] for row in bills if row["trace"] == "B_S")
    of_fleet = next(row["usd"] for row in fleets if row["instances"] == BASE_INSTANCES)
    saving = {"usd": of_trace, "on_demand_usd": of_fleet, "saving": 1 - of_trace / of_fleet}
    return {"fleets": fleets, "bills": bills, "saving": saving | {"published_saving": published.saving}}


def render_table_1(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Table 1."""
    yield "### Table 1"
    yield ""
    yield "| model | (P,M) | fewest GPUs | published | l_exe of one sequence (s) | published | equal |"
    yield "| --- |" + " --- |" * 6
    for row in rows:
        equal = (row["min_gpus"], round(row["l_exe_s"], 3)) == (row["published_min_gpus"], row["published_l_exe_s"])
        yield (
            f"| {row['model']} | ({row['shape'][0]},{row['shape'][1]}) | {row['min_gpus']} | "
            f"{row['published_min_gpus']} | {row['l_exe_s']:.3f} | {row['published_l_exe_s']:.3f} | "
            f"{'yes' if equal else 'no'} |"
        )


def render(costs: Mapping[str, Any]) -> Iterator[str]:
    """Bills, the saving, and the fleets that stay."""
    yield "### Figure 7: bills, and the 54 %"
    yield ""
    yield "| what | ours (USD) | published (USD) | equal |"
    yield "| --- | --- | --- | --- |"
    lines = [(f"trace {row['trace']}", row) for row in costs["bills"]]
    lines += [(f"{row['instances']} instances on demand", row) for row in costs["fleets"]]
    for name, row in lines:
        equal = "yes" if round(row["usd"], 3) == round(row["published_usd"], 3) else "no"
        yield f"| {name} | {row['usd']:.3f} | {row['published_usd']:.3f} | {equal} |"
    saving = costs["saving"]
    yield ""
    yield (
        f"Saving of B_S over {BASE_INSTANCES} instances on demand: 1 - {saving['usd']:.3f} / "
        f"{saving['on_demand_usd']:.3f} = {saving['saving']:.1%}, published {saving['published_saving']:.0%}: "
        f"{'equal' if round(saving['saving'], 2) == saving['published_saving'] else 'not equal'}."
    )
    yield ""
    yield "SpotServe on fleets that stay (GPT-20B), as measured by the paper, before its plot takes 4.5 and 9 s off:"
    yield ""
    yield "| instances | average (s) | published | ratio | P99 (s) | published | ratio | layouts |"
    yield "| --- |" + " --- |" * 7
    for row in costs["fleets"]:
        layouts = ", ".join(layout for _, layout in row["layouts"])
        yield (
            f"| {row['instances']} | {row['average_s']:.1f} | {row['published_average_s']:.1f} | "
            f"{row['average_s'] / row['published_average_s']:.2f} | {row['p99_s']:.1f} | "
            f"{row['published_p99_s']:.1f} | {row['p99_s'] / row['published_p99_s']:.2f} | {layouts} |"
        )
