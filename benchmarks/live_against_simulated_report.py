"""The page of `live_against_simulated`: what was equal, which figures lie within the spread, what was measured how."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import median
from typing import Any

TOLERANCE = 0.15
"""A simulated figure may lie so far outside the live runs' own spread."""
FIGURES = (
    ("ttft_p50_s", "TTFT, median"),
    ("ttft_p99_s", "TTFT, P99"),
    ("tpot_p50_s", "TPOT, median"),
    ("tpot_p99_s", "TPOT, P99"),
    ("latency_p50_s", "end to end, median"),
    ("latency_p99_s", "end to end, P99"),
    ("longest_stall_s", "longest stall"),
)
Json = Mapping[str, Any]
"""Parsed results, hence `Any`."""


def is_within(simulated: float, live: list[float]) -> bool:
    """Whether a figure is in the spread of the live ones, widened by the tolerance."""
    return min(live) * (1 - TOLERANCE) <= simulated <= max(live) * (1 + TOLERANCE)


def render(results: Json) -> str:
    """The page."""
    about = results["circumstances"]
    lines = [
        "# Live against simulated",
        "",
        f"`{about['command']}` at {about['commit'][:12]} ({about['uncommitted_files']} uncommitted files),",
        f"{about['cores']} cores ({about['processor']}), load average {about['load_average_before'][0]:.2f} before and "
        f"{about['load_average_after'][0]:.2f} after.",
        "",
        f"A random Llama ({results['model']['num_layers']} layers of {results['model']['hidden_size']}), two workers, "
        f"{results['requests']} requests; a notice takes one of the workers, later one joins.",
        f"A simulated figure counts as met between the least live one less {100 * TOLERANCE:.0f} % and the greatest "
        f"plus {100 * TOLERANCE:.0f} %.",
        "",
    ]
    for pace in results["paces"]:
        lines += _pace(pace)
    return "\n".join(lines)


def _pace(pace: Json) -> list[str]:
    live, simulated = pace["live"], pace["simulated"]
    equal = sum(run["differs"] is None for run in live)
    every = f"an iteration every {1000 * pace['pace_s']:g} ms at most"
    title = every if pace["pace_s"] else "iterations as fast as the machine's cores are"
    lines = [f"## {title}", ""]
    lines += [f"Order of SERVICE states and of committed plans equal in {equal} of {len(live)} runs:", ""]
    lines += [f"- SERVICE: {', '.join(simulated['course']['states'])}"]
    lines += [f"- {plan}" for plan in simulated["course"]["plans"]]
    lines += [f"- run {number} differs: {run['differs']}" for number, run in enumerate(live) if run["differs"]]
    lines += ["", "| | simulated | live, median | live, least to greatest | simulated / median | within |"]
    lines += ["| --- | ---: | ---: | ---: | ---: | --- |"]
    for name, title in FIGURES:
        values = [run[name] for run in live]
        middle = median(values)
        lines.append(
            f"| {title} | {_ms(simulated[name])} | {_ms(middle)} | {_ms(min(values))} to {_ms(max(values))} "
            f"| {simulated[name] / middle:.2f} | {'yes' if is_within(simulated[name], values) else '**no**'} |"
        )
    loads = ", ".join(f"{run['load_average_before']:.2f}" for run in live)
    lines += ["", f"Load average before each run: {loads}.", "", "| `[hardware]` | measured | samples | how |"]
    lines += ["| --- | ---: | ---: | --- |"]
    lines += [
        f"| `{name}` | {1000 * one['seconds']:.2f} ms | {one['samples']} | {one['how']} |"
        for name, one in sorted(pace["measured"].items())
    ]
    return [*lines, ""]


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:.1f} ms"
