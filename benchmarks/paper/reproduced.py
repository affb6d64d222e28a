"""The published runs of GPT-20B again: the paper's policies with static batches on our simulator, and its figures."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.paper.scenarios import RUNS, TRACES, phases_of, published_requests, scenario_of
from benchmarks.results_file import say
from spotserve.sim.simulation import simulate
from spotserve.solvers.planner import make_plan

MODEL = "GPT-20B"
SYSTEMS = {"SpotServe": "paper+static", "Rerouting": "reroute+static", "Reparallelization": "reparallelize+static"}
AIMS = {"SpotServe": 0.12, "Rerouting": 0.15, "Reparallelization": 0.25}
"""How far an average may be from the published one."""

PUBLISHED: Mapping[str, Mapping[str, tuple[float, float]]] = {
    "A_S": {"Reparallelization": (32.045, 61.287), "Rerouting": (26.333, 51.008), "SpotServe": (23.518, 46.108)},
    "B_S": {"Reparallelization": (27.068, 56.284), "Rerouting": (47.570, 99.115), "SpotServe": (23.315, 37.083)},
    "A_S+O": {"Reparallelization": (32.663, 65.816), "Rerouting": (30.373, 50.732), "SpotServe": (23.416, 49.005)},
    "B_S+O": {"Reparallelization": (31.915, 73.257), "Rerouting": (24.580, 43.239), "SpotServe": (20.724, 33.388)},
}
"""(average, P99) seconds, from the artifact's plotting script (es/scripts_ae/tradeoff_plot.py)."""

PUBLISHED_USD = {"A_S": 6.444, "B_S": 4.349}
"""Of the spot instances; the traces with on-demand instances are not split in the published files."""


def measure(data: Path) -> list[dict[str, Any]]:
    """One row per trace and system."""
    rows = []
    for trace in TRACES:
        for system, policy in SYSTEMS.items():
            workload = published_requests(data, MODEL)
            solvers = {} if system == "SpotServe" else {"configure": "paper"}
            shape = RUNS[MODEL].rerouted if system == "Rerouting" else None
            scenario = scenario_of(data, MODEL, trace, workload, seed=0, knows_load=True, solvers=solvers, shape=shape)
            run = simulate(scenario, policy, make_plan, phases=phases_of(data, MODEL))
            average, p99 = PUBLISHED[trace][system]
            rows.append(
                {
                    "trace": trace,
                    "system": system,
                    "policy": policy,
                    "average_s": run.latency_s.mean,
                    "p99_s": run.latency_s.p99,
                    "longest_stall_s": run.stall_s.max,
                    "published_average_s": average,
                    "published_p99_s": p99,
                    "usd": run.cost.usd,
                    "accepted": run.requests.accepted,
                    "finished": run.requests.finished,
                    "lost": run.requests.lost,
                    "layouts": layouts_of(run.timeline),
                    "migrations": [
                        {"trigger": one.trigger, "mode": one.mode, "outcome": one.outcome, "stall_s": one.stall_s_max}
                        for one in run.migrations
                    ],
                }
            )
        say(f"reproduced: {trace}")
    return rows


def layouts_of(timeline: Sequence[Any]) -> list[tuple[float, str]]:
    """(time, layout) of each layout that served for more than a moment."""
    served = [moment for moment in timeline if moment.service == "serving" and moment.layout != "-"]
    changes: list[tuple[float, str]] = []
    for moment in served:
        if not changes or changes[-1][1] != moment.layout:
            changes.append((round(moment.at_s, 1), moment.layout))
    return changes


def render(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """The rows as markdown."""
    yield "## GPT-20B, published request files (seconds)"
    yield ""
    yield "| trace | system | average | published | ratio | aim | P99 | published | ratio | longest stall | USD |"
    yield "| --- |" + " --- |" * 10
    for row in rows:
        average = row["average_s"] / row["published_average_s"]
        aim = AIMS[row["system"]]
        met = "met" if abs(average - 1) <= aim else "missed"
        yield (
            f"| {row['trace']} | {row['system']} | {row['average_s']:.1f} | {row['published_average_s']:.1f} | "
            f"{average:.2f} | ±{aim:.0%} {met} | {row['p99_s']:.1f} | {row['published_p99_s']:.1f} | "
            f"{row['p99_s'] / row['published_p99_s']:.2f} | {row['longest_stall_s']:.1f} | {row['usd']:.3f} |"
        )
    yield ""
    for trace, usd in PUBLISHED_USD.items():
        ours = next(row["usd"] for row in rows if row["trace"] == trace)
        yield f"Spot cost of {trace}: {ours:.3f} USD, published {usd:.3f}."
    yield ""
    yield "Layouts (D,P,M) that served, with the second each began:"
    yield ""
    for row in rows:
        told = ", ".join(f"{layout} at {at_s:g}" for at_s, layout in row["layouts"])
        yield f"- {row['trace']}, {row['system']}: {told}"
