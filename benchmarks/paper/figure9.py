"""Figure 9: SpotServe without one of its parts after the other, and its artifact beside its text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.paper.published import MODEL, Published
from benchmarks.paper.scenarios import TRACES
from benchmarks.paper.systems import SPOTSERVE, System, play, row_of
from benchmarks.results_file import say

ABLATED = ("A_S", "B_S")

STEPS = (
    SPOTSERVE,
    System("- controller", SPOTSERVE.policy, keeps_shape=True),
    System("- migration planner", SPOTSERVE.policy, {"migrate": "paper-unplanned"}, keeps_shape=True),
    System(
        "- interruption arranger",
        SPOTSERVE.policy,
        {"migrate": "paper-unplanned", "arrange": "discard"},
        keeps_shape=True,
    ),
    System(
        "- device mapper",
        SPOTSERVE.policy,
        {"migrate": "paper-first-holder", "arrange": "discard", "place": "rank-order"},
        keeps_shape=True,
    ),
)
"""Each step keeps what the steps before it took away.

Without the controller (P, M) stays that of 40 GPUs and only D follows the fleet. Without the migration planner layers
move as they are numbered, and whatever runs stops even where replicas are only added. Without the interruption arranger
no KV moves: what was interrupted is computed again. Without the device mapper the q-th GPU takes the q-th position, and
the first holder sends everything.
"""

VARIANTS = (
    replace(SPOTSERVE, name="policy `paper`"),
    System(
        "as the artifact runs it",
        SPOTSERVE.policy,
        {"configure": "paper", "place": "paper-artifact", "migrate": "paper-artifact", "arrange": "paper"},
    ),
    System(
        "as the text has it",
        SPOTSERVE.policy,
        {
            "configure": "paper-as-published",
            "place": "paper",
            "migrate": "paper",
            "arrange": "paper-as-published",
        },
    ),
)
"""Where the artifact deviates from the text there is a solver for either, of each kind; the policy mixes them."""


def measure(data: Path) -> list[dict[str, Any]]:
    """One row per trace and step."""
    published = Published.read(data)
    rows = []
    for trace in ABLATED:
        for step, (average, p99) in zip(STEPS, published.ablation(trace), strict=True):
            row = {"trace": trace, "step": step.name, **row_of(play(data, MODEL, trace, step))}
            rows.append(row | {"published_average_ratio": average, "published_p99_ratio": p99})
        say(f"figure 9: {trace}")
    return rows


def measure_variants(data: Path) -> list[dict[str, Any]]:
    """One row per trace and variant."""
    rows = []
    for trace in TRACES:
        for variant in VARIANTS:
            rows.append({"trace": trace, "variant": variant.name, **row_of(play(data, MODEL, trace, variant))})
        say(f"artifact and text: {trace}")
    return rows


def render(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """The steps as ratios to SpotServe."""
    yield f"### Figure 9: the four ablation steps, {MODEL}, over SpotServe's own"
    yield ""
    yield (
        "| trace | step | average (s) | over SpotServe's | published | P99 (s) | over SpotServe's | published | "
        "longest stall (s) | recomputed tokens |"
    )
    yield "| --- |" + " --- |" * 9
    for row in rows:
        base = next(one for one in rows if (one["trace"], one["step"]) == (row["trace"], SPOTSERVE.name))
        yield (
            f"| {row['trace']} | {row['step']} | {row['average_s']:.1f} | {row['average_s'] / base['average_s']:.2f} | "
            f"{row['published_average_ratio']:.2f} | {row['p99_s']:.1f} | {row['p99_s'] / base['p99_s']:.2f} | "
            f"{row['published_p99_ratio']:.2f} | {row['longest_stall_s']:.1f} | {row['recomputed_tokens']} |"
        )


def render_variants(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Artifact and text side by side."""
    yield f"### The artifact's deviations from the text, {MODEL}"
    yield ""
    yield "| trace | variant | average (s) | P99 (s) | longest stall (s) | recomputed tokens | layouts |"
    yield "| --- |" + " --- |" * 6
    for row in rows:
        layouts = ", ".join(f"{layout} at {at_s:g}" for at_s, layout in row["layouts"])
        yield (
            f"| {row['trace']} | {row['variant']} | {row['average_s']:.1f} | {row['p99_s']:.1f} | "
            f"{row['longest_stall_s']:.1f} | {row['recomputed_tokens']} | {layouts} |"
        )
