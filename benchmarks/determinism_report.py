"""Renders the results of `benchmarks.determinism` as markdown: every number is computed from the JSON, aims too."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

AIM = 0.75
AIM_SCENARIOS = ("decode 8", "decode 32")

Cell = Mapping[str, Any]


def render(results: Mapping[str, Any]) -> str:
    """The whole page."""
    cells = results["cells"]
    measures = [variant for variant in results["variants"] if variant not in ("fast", "deterministic")]
    parts = [_head(results), _speed_table(cells)]
    if measures:
        parts.append(_measure_table(cells, measures))
    return "\n\n".join([*parts, _notes()]) + "\n"


def _head(results: Mapping[str, Any]) -> str:
    facts, model = results["circumstances"], results["model"]
    dirty = f" + {facts['uncommitted_files']} uncommitted files" if facts["uncommitted_files"] else ""
    return "\n".join(
        [
            "# What deterministic mode costs",
            "",
            f"- Command: `{facts['command']}`",
            f"- Commit: `{facts['commit']}`{dirty}",
            f"- Hardware: {facts['processor']}, {facts['cores']} cores, {facts['memory_gib']} GiB; "
            f"load average {facts['load_average_before'][0]:.1f} before, {facts['load_average_after'][0]:.1f} after",
            f"- Software: {facts['system']}, Python {facts['python']}, torch {facts['torch']}, one thread",
            f"- Model: random Llama, {model['num_layers']} layers, hidden {model['hidden_size']}, "
            f"{model['num_q_heads']}/{model['num_kv_heads']} heads, vocabulary {model['vocab_size']}, "
            f"seed {model['seed']}",
            f"- {results['rounds']} rounds of {results['steps']} steps, variants interleaved within each step",
        ]
    )


def _speed_table(cells: Sequence[Cell]) -> str:
    lines = [
        "## Against fast mode",
        "",
        "| dtype | linears | work | fast, tokens/s | deterministic, tokens/s | of fast (rounds) | aim | met |",
        "| --- | --- | --- | ---: | ---: | ---: | ---: | --- |",
    ]
    for cell in cells:
        ratios = _ratios(cell, "deterministic")
        has_aim = cell["scenario"] in AIM_SCENARIOS
        is_met = "yes" if median(ratios) >= AIM else "**no**"
        fields = [
            cell["dtype"],
            cell["linear"],
            cell["scenario"],
            f"{_tokens_per_s(cell, 'fast'):.0f}",
            f"{_tokens_per_s(cell, 'deterministic'):.0f}",
            f"{median(ratios):.2f} ({min(ratios):.2f}–{max(ratios):.2f})",
            f"≥ {AIM}" if has_aim else "",
            is_met if has_aim else "",
        ]
        lines.append(f"| {' | '.join(fields)} |")
    return "\n".join(lines)


def _measure_table(cells: Sequence[Cell], measures: Sequence[str]) -> str:
    lines = [
        "## Each measure alone",
        "",
        f"| dtype | linears | work | {' | '.join(measures)} | all |",
        f"| --- | --- | --- | {' | '.join('---:' for _ in measures)} | ---: |",
    ]
    for cell in cells:
        costs = [f"{100 / median(_ratios(cell, variant)) - 100:+.0f} %" for variant in (*measures, "deterministic")]
        lines.append(f"| {cell['dtype']} | {cell['linear']} | {cell['scenario']} | {' | '.join(costs)} |")
    return "\n".join(lines)


def _notes() -> str:
    return "\n".join(
        [
            "## What the numbers mean",
            "",
            "- Tokens per second: rows of a step divided by the median step, in processor time of the one thread.",
            "- Of fast: for each step, fast mode's time over the variant's on the same batch a moment apart; the "
            "median of a round, then of the rounds, and the range of the rounds.",
            "- Each measure alone: how much longer a step takes with this one measure on top of fast mode. They do "
            "not add up: a padded row is then multiplied by chunks too.",
            "- `decode N`: N sequences of 128 to 192 tokens, one row each. `prefill 512`: one prompt in two chunks.",
        ]
    )


def _ratios(cell: Cell, variant: str) -> list[float]:
    """Fast mode's time over the variant's, of each round."""
    return [
        median(fast / other for fast, other in zip(times["fast"], times[variant], strict=True))
        for times in cell["rounds"]
    ]


def _tokens_per_s(cell: Cell, variant: str) -> float:
    steps = [seconds for times in cell["rounds"] for seconds in times[variant]]
    return float(cell["tokens"] / median(steps))
