"""Figure 6: three models on four traces under three systems, and how long reloading may be assumed to take."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.paper.published import MODEL, Published
from benchmarks.paper.scenarios import RELOAD_BYTES_PER_S, RUNS, TRACES
from benchmarks.paper.systems import SPOTSERVE, SYSTEMS, play, row_of
from benchmarks.results_file import say

AIMS = {"SpotServe": 0.12, "Rerouting": 0.15, "Reparallelization": 0.25}
"""How far an average may be from the published one."""

SINGLE_BATCHED = "A_S+O"

RELOAD_RATES = (2 * RELOAD_BYTES_PER_S, RELOAD_BYTES_PER_S, 0.75 * RELOAD_BYTES_PER_S)


def measure(data: Path) -> list[dict[str, Any]]:
    """One row per model, trace and system."""
    published = Published.read(data)
    rows = []
    for model in RUNS:
        for trace in TRACES:
            for system in SYSTEMS:
                played = play(data, model, trace, system)
                row = {"model": model, "trace": trace, "system": system.name, **row_of(played)}
                if model == MODEL:
                    row["published_average_s"], row["published_p99_s"] = published.latency_s(trace, system.name)
                if system is not SPOTSERVE:
                    row["published_gain"] = published.p99_gain(trace, model, system.name)
                rows.append(row)
            say(f"figure 6: {model} on {trace}")
    return rows


def measure_reloads(data: Path) -> list[dict[str, Any]]:
    """The baselines of GPT-20B again, whose engines load their weights from disk at other rates."""
    published = Published.read(data)
    rows = []
    for rate in RELOAD_RATES:
        for system in SYSTEMS[1:]:
            for trace in TRACES:
                run = play(data, MODEL, trace, system, reload_bytes_per_s=rate).run
                average_s, p99_s = published.latency_s(trace, system.name)
                row = {"system": system.name, "trace": trace, "reload_bytes_per_s": rate / system.reloads}
                row |= {"average_ratio": run.latency_s.mean / average_s, "p99_ratio": run.latency_s.p99 / p99_s}
                rows.append(row)
        say(f"figure 6: engines that reload at {rate / 1e9:g} GB/s")
    return rows


def measure_single_batches(data: Path) -> list[dict[str, Any]]:
    """GPT-20B on A_S+O as its script has it: an idle pipeline gets one batch, and nobody more."""
    published = Published.read(data)
    rows = []
    for system in SYSTEMS:
        run = play(data, MODEL, SINGLE_BATCHED, replace(system, batches=0)).run
        average_s, p99_s = published.latency_s(SINGLE_BATCHED, system.name)
        row = {"system": system.name, "average_s": run.latency_s.mean, "p99_s": run.latency_s.p99}
        rows.append(row | {"published_average_s": average_s, "published_p99_s": p99_s})
    return rows


def render(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """The absolute figures of GPT-20B, the ratios of all models, the layouts, the hole."""
    yield from _absolute([row for row in rows if row["model"] == MODEL])
    yield from _gains(rows)
    yield from _holes(rows)
    yield ""
    yield "Layouts (D,P,M) that served, with the second each began:"
    yield ""
    for row in rows:
        told = ", ".join(f"{layout} at {at_s:g}" for at_s, layout in row["layouts"])
        yield f"- {row['model']}, {row['trace']}, {row['system']}: {told}"


def _absolute(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    yield f"### {MODEL}, published request files (seconds)"
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


def _gains(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    yield ""
    yield "### All models: SpotServe's P99 improvement over each baseline"
    yield ""
    yield (
        "Absolute latencies of OPT-6.7B and LLaMA-30B are not published, only how many times SpotServe's P99 each "
        "baseline's is. Ours counts every request until its end; *ended* are those that ended within the trace, which "
        "is what the artifact counts."
    )
    yield ""
    yield (
        "| model | trace | system | average (s) | P99 (s) | P99 over SpotServe's | ended | P99 of these (s) | over "
        "SpotServe's | published | ratio |"
    )
    yield "| --- |" + " --- |" * 10
    for row in rows:
        base = next(
            one
            for one in rows
            if (one["model"], one["trace"], one["system"]) == (row["model"], row["trace"], SPOTSERVE.name)
        )
        gain, ended = row["p99_s"] / base["p99_s"], row["ended_p99_s"] / base["ended_p99_s"]
        published = "" if row is base else f"{row['published_gain']:.2f}"
        ratio = "" if row is base else f"{ended / row['published_gain']:.2f}"
        yield (
            f"| {row['model']} | {row['trace']} | {row['system']} | {row['average_s']:.1f} | {row['p99_s']:.1f} | "
            f"{gain:.2f} | {row['ended']} of {row['accepted']} | {row['ended_p99_s']:.1f} | {ended:.2f} | "
            f"{published} | {ratio} |"
        )


def _holes(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Outages that are no migrations: where too few instances hold the fixed (P, M)."""
    yield ""
    yield "### The Rerouting hole: times without any pipeline of the fixed (P, M)"
    yield ""
    yield "| model | trace | system | nothing serves (s) | average (s) | P50 (s) | P99 (s) | longest (s) | ended |"
    yield "| --- |" + " --- |" * 8
    with_hole = {(row["model"], row["trace"]) for row in rows if row["holes"]}
    for row in rows:
        if (row["model"], row["trace"]) in with_hole:
            told = ", ".join(f"{begin_s:g} to {end_s:g}" for begin_s, end_s in row["holes"]) or "never"
            yield (
                f"| {row['model']} | {row['trace']} | {row['system']} | {told} | {row['average_s']:.1f} | "
                f"{row['p50_s']:.1f} | {row['p99_s']:.1f} | {row['longest_s']:.1f} | "
                f"{row['ended']} of {row['accepted']} |"
            )


def render_reloads(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """What the assumed reload time does to the averages."""
    yield f"### {MODEL}: the assumed reload rate, averages and P99 over the published ones"
    yield ""
    yield "| system | GB/s of an instance | " + " | ".join(f"{trace} average, P99" for trace in TRACES) + " |"
    yield "| --- | --- |" + " --- |" * len(TRACES)
    for system, rate in dict.fromkeys((row["system"], row["reload_bytes_per_s"]) for row in rows):
        own = [row for row in rows if (row["system"], row["reload_bytes_per_s"]) == (system, rate)]
        cells = " | ".join(f"{row['average_ratio']:.2f}, {row['p99_ratio']:.2f}" for row in own)
        yield f"| {system} | {rate / 1e9:g} | {cells} |"


def render_single_batches(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """A_S+O with one batch at a time."""
    yield f"### {MODEL} on {SINGLE_BATCHED}, one batch at a time, as its script has it"
    yield ""
    yield "| system | average (s) | published | ratio | P99 (s) | published | ratio |"
    yield "| --- |" + " --- |" * 6
    for row in rows:
        yield (
            f"| {row['system']} | {row['average_s']:.1f} | {row['published_average_s']:.1f} | "
            f"{row['average_s'] / row['published_average_s']:.2f} | {row['p99_s']:.1f} | "
            f"{row['published_p99_s']:.1f} | {row['p99_s'] / row['published_p99_s']:.2f} |"
        )
