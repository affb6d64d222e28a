"""The same clusters under arrivals that are not periodic: our policy against the paper's system and its baselines.

Three models, four traces, four workloads. The published systems are those of `systems`: static batches, their
optimizer, told the rate. `paper`, `reroute` and `reparallelize` are their policies with our batching, and the last two
with our planner. `live` is told the mean rate at the beginning and measures it from then on.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cache, lru_cache
from math import exp, log
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.paper.scenarios import (
    BATCH,
    RATES_RPS,
    RELOAD_BYTES_PER_S,
    RUNS,
    TRACES,
    drawn_requests,
    phases_of,
    published_requests,
)
from benchmarks.paper.scenarios import scenario_of as paper_scenario
from benchmarks.paper.systems import SYSTEMS
from benchmarks.results_file import say
from spotserve.core.cost import Degrees, execution_ms
from spotserve.core.cost import Workload as AverageRequest
from spotserve.core.trace import TraceEvent, instance_counts
from spotserve.sim.measures import RunResult, Spread
from spotserve.sim.scenario import Scenario
from spotserve.sim.simulation import simulate
from spotserve.sim.workloads import Workload, at_rate, azure_requests, clipped, window
from spotserve.solvers.configure import tabulate
from spotserve.solvers.planner import make_plan

WORKLOADS = ("published", "cv6", "poisson", "azure")
ARRIVALS_S = 1500.0
"""How long requests are drawn for: longer than any of the traces lasts."""
AZURE_MOST = (512, 128)
"""Azure's prompts and answers are cut to what the paper's models serve: 640 tokens in all."""

OUR_BATCH = 16
"""Most running sequences of a replica with our batching: what the KV pool of the smallest replica holds."""

SPARE_INSTANCES = 1
"""Idle instances that `live` keeps."""


@dataclass(frozen=True, slots=True)
class Contender:
    """A column of the tables: a policy with our batching, or a published system."""

    name: str
    policy: str
    solvers: Mapping[str, str] = field(default_factory=dict)
    spare_instances: int | None = None
    max_running: int = OUR_BATCH


LIVE = Contender("live", "live", spare_instances=SPARE_INSTANCES)
OURS = (
    LIVE,
    Contender("live, all kept", "live"),
    Contender("paper", "paper"),
    Contender("reroute", "reroute"),
    Contender("reparallelize", "reparallelize"),
)
PUBLISHED = {system.name: system for system in SYSTEMS}
NAMES = (LIVE.name, OURS[1].name, *PUBLISHED, *(one.name for one in OURS[2:]))

ABLATED = (
    LIVE,
    OURS[1],
    Contender("moves only when stopped", "live", {"move": "stopped"}, SPARE_INSTANCES),
    Contender("places for reuse", "live", {"place": "reuse"}, SPARE_INSTANCES),
    Contender("places by rank", "live", {"place": "rank-order"}, SPARE_INSTANCES),
    Contender("chooses blind to queues", "live", {"configure": "paper"}, SPARE_INSTANCES),
    Contender("chooses without hysteresis", "live", {"configure": "cpsat-fickle"}, SPARE_INSTANCES),
    Contender("moves no KV", "live", {"arrange": "discard"}, SPARE_INSTANCES),
    Contender("moves the longest KV first", "live", {"ladder": "longest_first"}, SPARE_INSTANCES),
    Contender("static batches of 4", "live+static", {}, SPARE_INSTANCES, max_running=BATCH),
)


@dataclass(frozen=True, slots=True)
class Task:
    """One cell of the matrix."""

    data: Path
    azure: Path
    model: str
    trace: str
    workload: str
    seed: int
    contenders: tuple[Contender, ...]
    with_published: bool


def requests_of(task: Task) -> Workload:
    """The arrivals of a cell, the same for every contender."""
    if task.workload == "published":
        return published_requests(task.data, task.model)
    if task.workload == "azure":
        return _azure_part(task)
    cv = 6.0 if task.workload == "cv6" else 1.0
    return drawn_requests(task.model, cv=cv, seed=task.seed, duration_s=ARRIVALS_S)


def _azure_part(task: Task) -> Workload:
    """A part that the seed draws of the trace, with its own lengths and gaps; the whole has the model's rate."""
    slowed = at_rate(_azure(task.azure), rate_rps=RATES_RPS[task.model])
    start_s = random.Random(task.seed).uniform(0.0, slowed.duration_s - ARRIVALS_S)
    part = window(slowed, start_s=start_s, stop_s=start_s + ARRIVALS_S)
    return clipped(part, max_prompt_tokens=AZURE_MOST[0], max_output_tokens=AZURE_MOST[1])


@lru_cache(maxsize=1)
def _azure(path: Path) -> Workload:
    return azure_requests(path.read_bytes(), where=path.name)


def our_scenario(task: Task, requests: Workload, contender: Contender) -> Scenario:
    """A cell under one of our policies; `live` measures its load, the others are told it like the published systems."""
    measures = contender.policy.startswith("live")
    made = paper_scenario(task.data, task.model, task.trace, requests, seed=task.seed, knows_load=not measures)
    told = TraceEvent(at_s=0.0, kind="load", rps=RATES_RPS[task.model])
    events = (told, *made.trace.events) if measures else made.trace.events
    limits = made.spec.limits.model_copy(
        update={"max_running": contender.max_running, "spare_instances": contender.spare_instances}
    )
    spec = made.spec.model_copy(update={"limits": limits, "solvers": dict(contender.solvers)})
    return replace(made, spec=spec, trace=made.trace.model_copy(update={"events": events}))


def published_scenario(task: Task, requests: Workload, name: str) -> Scenario:
    """A cell under a system of the paper."""
    system = PUBLISHED[name]
    return paper_scenario(
        task.data,
        task.model,
        task.trace,
        requests,
        seed=task.seed,
        knows_load=True,
        solvers=system.solvers,
        shape=RUNS[task.model].rerouted if system.keeps_shape else None,
        static_batches=system.batches,
        reload_bytes_per_s=RELOAD_BYTES_PER_S / system.reloads,
    )


def play(task: Task) -> list[dict[str, Any]]:
    """A row for each contender of a cell."""
    requests = requests_of(task)
    phases = phases_of(task.data, task.model)
    rows = []
    for contender in task.contenders:
        played = our_scenario(task, requests, contender)
        rows.append((contender.name, simulate(played, contender.policy, make_plan, phases=phases)))
    if task.with_published:
        for name, system in PUBLISHED.items():
            played = published_scenario(task, requests, name)
            rows.append((name, simulate(played, system.policy, make_plan, phases=phases)))
    floor_s = fastest_p99_s(our_scenario(task, requests, LIVE))
    return [row_of(task, name, run, floor_s) for name, run in rows]


def fastest_p99_s(scenario: Scenario) -> float:
    """P99 if every request ran at once and alone, on the fastest configuration that the trace ever has GPUs for."""
    spec, hardware = scenario.spec, scenario.hardware
    instances = max(count for _, count in instance_counts(scenario.trace))
    memory = [hardware.gpu_memory_bytes] * (instances * hardware.gpus_per_instance)
    rows = tabulate(spec, memory=memory, workload=AverageRequest(512, 128, 0.0), intact=())
    best = min(rows, key=lambda row: row.latency_us)
    degrees = Degrees(best.data, best.pipeline, best.tensor, best.max_running)

    @cache
    def alone_s(prompt_tokens: int, output_tokens: int) -> float:
        return execution_ms(spec, degrees, AverageRequest(prompt_tokens, output_tokens, 0.0), running=1) / 1000.0

    return Spread.of(alone_s(one.prompt_tokens, one.output_tokens) for one in scenario.arrivals()).p99


def row_of(task: Task, name: str, run: RunResult, floor_s: float) -> dict[str, Any]:
    """What the tables are made of."""
    return {
        "model": task.model,
        "trace": task.trace,
        "workload": task.workload,
        "seed": task.seed,
        "policy": name,
        "average_s": run.latency_s.mean,
        "p99_s": run.latency_s.p99,
        "fastest_p99_s": round(floor_s, 6),
        "longest_stall_s": run.stall_s.max,
        "usd": run.cost.usd,
        "usd_per_million_tokens": run.cost.usd_per_million_tokens,
        "accepted": run.requests.accepted,
        "finished": run.requests.finished,
        "open": run.requests.open,
        "lost": run.requests.lost,
        "recomputed_tokens": run.recomputed_tokens,
    }


def measure(
    data: Path,
    azure: Path,
    *,
    models: Sequence[str],
    traces: Sequence[str],
    workloads: Sequence[str],
    seeds: int,
    jobs: int = 1,
    contenders: tuple[Contender, ...] = OURS,
    with_published: bool = True,
) -> list[dict[str, Any]]:
    """One row per model, trace, workload, seed and contender; the published files have nothing to draw: one seed."""
    tasks = [
        Task(data, azure, model, trace, workload, seed, contenders, with_published)
        for model in models
        for trace in traces
        for workload in workloads
        for seed in range(1 if workload == "published" else seeds)
    ]
    rows: list[dict[str, Any]] = []
    with ProcessPoolExecutor(max_workers=jobs) as pool:
        for task, own in zip(tasks, pool.map(play, tasks), strict=True):
            rows += own
            say(f"{task.model} on {task.trace}, {task.workload}, seed {task.seed}")
    return rows


def geometric_mean(values: Sequence[float]) -> float:
    """The mean of ratios."""
    return exp(sum(log(value) for value in values) / len(values)) if values else 0.0


def key_of(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """What two contenders have in common."""
    return row["model"], row["trace"], row["workload"], row["seed"]


def by_key(rows: Sequence[Mapping[str, Any]], policy: str) -> dict[tuple[Any, ...], Mapping[str, Any]]:
    """The rows of a contender."""
    return {key_of(row): row for row in rows if row["policy"] == policy}


def ratios(rows: Sequence[Mapping[str, Any]], policy: str, figure: str, *, over: str = LIVE.name) -> list[float]:
    """Of each cell: a contender's figure over that of `live`."""
    base = by_key(rows, over)
    return [
        row[figure] / base[key][figure]
        for key, row in by_key(rows, policy).items()
        if row[figure] and base.get(key, {}).get(figure)
    ]


def better_of(rows: Sequence[Mapping[str, Any]], policies: Sequence[str]) -> list[float]:
    """Of each cell: the smallest P99 of these contenders over that of `live`."""
    live = by_key(rows, LIVE.name)
    theirs = [by_key(rows, policy) for policy in policies]
    return [min(own[key]["p99_s"] for own in theirs) / live[key]["p99_s"] for key in live]


def shares_of_possible(rows: Sequence[Mapping[str, Any]]) -> list[float]:
    """Of each cell: the share that `live` reaches of the P99 ratio that the fastest possible execution would have."""
    return [row["fastest_p99_s"] / row["p99_s"] for row in by_key(rows, LIVE.name).values()]


def render(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """The rows as markdown."""
    names = [name for name in NAMES if any(row["policy"] == name for row in rows)]
    yield "## Beyond: every accepted request counted"
    yield ""
    yield (
        "Published systems: SpotServe, Rerouting, Reparallelization. The others have our batching "
        f"(B up to {OUR_BATCH}). `live` keeps {SPARE_INSTANCES} idle instance and gives the others back. *Floor*: "
        "P99 if every request ran at once, alone, on the fastest configuration. Medians over seeds, seconds."
    )
    yield ""
    yield from _aims(rows)
    yield ""
    yield from _means(rows, names)
    yield ""
    yield f"| model | trace | workload | floor | {' | '.join(f'{name}: P99 / stall' for name in names)} | open | lost |"
    yield "| --- |" + " --- |" * (len(names) + 5)
    for group in dict.fromkeys((row["model"], row["trace"], row["workload"]) for row in rows):
        same = [row for row in rows if (row["model"], row["trace"], row["workload"]) == group]
        cells = [f"{median(row['fastest_p99_s'] for row in same):.1f}"]
        for name in names:
            own = [row for row in same if row["policy"] == name]
            p99, stall = (median(row[figure] for row in own) for figure in ("p99_s", "longest_stall_s"))
            cells.append(f"{p99:.1f} / {stall:.1f}")
        ends = f"{max(row['open'] for row in same)} | {max(row['lost'] for row in same)}"
        yield f"| {' | '.join(group)} | {' | '.join(cells)} | {ends} |"


def _aims(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Each aim beside what was measured."""
    yield "| aim | bound | measured | |"
    yield "| --- | --- | --- | --- |"
    published = [row for row in rows if row["workload"] == "published"]
    drawn = [row for row in rows if row["workload"] != "published"]
    if published:
        share = geometric_mean(shares_of_possible(published))
        yield _aim("published files: share of the possible P99 ratio over SpotServe", 0.8, share)
    for workload in dict.fromkeys(row["workload"] for row in drawn):
        own = [row for row in drawn if row["workload"] == workload]
        yield _aim(f"{workload}: P99 of SpotServe as published over ours", 3.0, _mean(own, "SpotServe", "p99_s"))
        yield _aim(f"{workload}: P99 of `paper` with our batching over ours", 1.5, _mean(own, "paper", "p99_s"))
        baselines = geometric_mean(better_of(own, ("Rerouting", "Reparallelization")))
        yield _aim(f"{workload}: P99 of the better published baseline over ours", 5.0, baselines)
        ours = geometric_mean(better_of(own, ("reroute", "reparallelize")))
        yield _aim(f"{workload}: the same baselines with our planner and batching", 5.0, ours)
    yield _aim("longest stall of SpotServe as published over ours", 10.0, _mean(rows, "SpotServe", "longest_stall_s"))
    yield _aim("longest stall of `paper` with our batching over ours", 10.0, _mean(rows, "paper", "longest_stall_s"))
    cost = 1.0 / _mean(rows, "SpotServe", "usd_per_million_tokens")
    yield _aim("cost per token over SpotServe's", 0.9, cost, most=True)
    lost = sum(row["lost"] for row in rows)
    yield _aim(f"requests lost of {sum(row['accepted'] for row in rows)}", 0, lost, most=True)


def _mean(rows: Sequence[Mapping[str, Any]], policy: str, figure: str) -> float:
    return geometric_mean(ratios(rows, policy, figure))


def _aim(what: str, bound: float, measured: float, *, most: bool = False) -> str:
    met = measured <= bound if most else measured >= bound
    sign = "at most" if most else "at least"
    return f"| {what} | {sign} {bound:g} | {measured:.3g} | {'met' if met else 'missed'} |"


def _means(rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> Iterator[str]:
    """Geometric means by workload, and how far the spread between models is."""
    yield "Geometric means of the ratio to `live`, run by run; *possible*: to the floor."
    yield ""
    yield "| workload | policy | P99 | possible | smallest | largest | longest stall | cost per token | runs |"
    yield "| --- |" + " --- |" * 8
    for workload in dict.fromkeys(row["workload"] for row in rows):
        own = [row for row in rows if row["workload"] == workload]
        for name in names:
            if name == LIVE.name:
                continue
            p99 = ratios(own, name, "p99_s")
            possible = geometric_mean([row["p99_s"] / row["fastest_p99_s"] for row in by_key(own, name).values()])
            stall, cost = (_mean(own, name, figure) for figure in ("longest_stall_s", "usd_per_million_tokens"))
            yield (
                f"| {workload} | {name} | {geometric_mean(p99):.2f} | {possible:.2f} | {min(p99):.2f} | "
                f"{max(p99):.2f} | {stall:.2f} | {cost:.2f} | {len(p99)} |"
            )


def render_ablation(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """What each idea is worth."""
    yield "## Ours without one idea at a time"
    yield ""
    yield "Geometric means over the runs of the figure without the idea over that of `live`: above 1, the idea helps."
    yield ""
    yield "| without | average | P99 | longest stall | cost per token | recomputed tokens | open | lost | runs |"
    yield "| --- |" + " --- |" * 8
    for contender in ABLATED:
        own = by_key(rows, contender.name).values()
        figures = [
            f"{_mean(rows, contender.name, figure):.2f}"
            for figure in ("average_s", "p99_s", "longest_stall_s", "usd_per_million_tokens")
        ]
        recomputed = sum(row["recomputed_tokens"] for row in own)
        ends = f"{sum(row['open'] for row in own)} | {sum(row['lost'] for row in own)} | {len(own)}"
        yield f"| {contender.name} | {' | '.join(figures)} | {recomputed} | {ends} |"


MODELS = tuple(RUNS)
TRACE_NAMES = tuple(TRACES)
