"""Figure 8: demand that changes. Which configuration each stamp of the trace leads to, and the latencies."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.paper.published import MODEL, SEQUENCES, Published
from benchmarks.paper.scenarios import ACTS_EARLY_S, FLUCTUATING
from benchmarks.paper.systems import SPOTSERVE, SYSTEMS, play, row_of
from benchmarks.results_file import say

LATE_S = 60.0
"""A configuration serves at most so long after the stamp that it is for."""


def measure(data: Path) -> list[dict[str, Any]]:
    """One row per trace and system."""
    published = Published.read(data)
    rows = []
    for trace in FLUCTUATING:
        for system in SYSTEMS:
            row = {"trace": trace, "system": system.name, **row_of(play(data, MODEL, trace, system))}
            if system is not SPOTSERVE:
                row["published_gain"] = published.p99_gain(trace, MODEL, system.name)
            rows.append(row)
        say(f"figure 8: {trace}")
    return rows


def is_published_sequence(trace: str, layouts: Sequence[Sequence[Any]]) -> bool:
    """Whether the layouts are the published ones, and each serves within its window around the published stamp."""
    published = SEQUENCES[trace]
    return [layout for _, layout in layouts] == [layout for _, layout in published] and all(
        stamp_s - ACTS_EARLY_S <= at_s <= stamp_s + LATE_S
        for (at_s, _), (stamp_s, _) in zip(layouts, published, strict=True)
    )


def render(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Sequences, then latencies."""
    yield "### Figure 8: sequences of (D,P,M), GPT-20B, demand 0.6, 0.8 and 0.6 requests per second"
    yield ""
    yield "| trace | published (for the stamp) | ours (serves from) | equal |"
    yield "| --- | --- | --- | --- |"
    for row in rows:
        if row["system"] == SPOTSERVE.name:
            theirs = ", ".join(f"{layout} {stamp_s:g} s" for stamp_s, layout in SEQUENCES[row["trace"]])
            ours = ", ".join(f"{layout} {at_s:g} s" for at_s, layout in row["layouts"])
            equal = "yes" if is_published_sequence(row["trace"], row["layouts"]) else "no"
            yield f"| {row['trace']} | {theirs} | {ours} | {equal} |"
    yield ""
    yield "| trace | system | average (s) | P99 (s) | P99 over SpotServe's | published | layouts |"
    yield "| --- |" + " --- |" * 6
    for row in rows:
        base = next(one for one in rows if (one["trace"], one["system"]) == (row["trace"], SPOTSERVE.name))
        gain = ("", "")
        if row["system"] != SPOTSERVE.name:
            gain = (f"{row['p99_s'] / base['p99_s']:.2f}", f"{row['published_gain']:.2f}")
        layouts = ", ".join(f"{layout} at {at_s:g}" for at_s, layout in row["layouts"])
        yield (
            f"| {row['trace']} | {row['system']} | {row['average_s']:.1f} | {row['p99_s']:.1f} | "
            f"{' | '.join(gain)} | {layouts} |"
        )
