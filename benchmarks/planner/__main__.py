"""The planner on random clusters: time, quality, what a budget buys, the paper's transitions, the daemon's heartbeat.

    python -m benchmarks.planner [--part speed|anytime|quality|paper|jitter] [--sizes 16,64] [--cases N] [--seed S]

Without `--part` every part runs with the sizes of its own. Results of the parts that ran replace those of the same
parts in the results file; the others stay.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.planner import anytime, jitter, paper, quality, speed
from benchmarks.results_file import circumstances, write_results


@dataclass(frozen=True, slots=True)
class Part:
    """One kind of measurement: how to take it and show it, and what it takes by itself."""

    measure: Callable[..., list[dict[str, Any]]]
    render: Callable[[Sequence[Mapping[str, Any]]], Iterator[str]]
    sizes: tuple[int, ...]
    cases: int


PARTS = {
    "speed": Part(speed.measure, speed.render, sizes=(16, 64, 256, 1024), cases=10),
    "quality": Part(quality.measure, quality.render, sizes=(16, 32, 64), cases=200),
    "anytime": Part(anytime.measure, anytime.render, sizes=(64, 256), cases=10),
    "paper": Part(paper.measure, paper.render, sizes=(), cases=1),
    "jitter": Part(jitter.measure, jitter.render, sizes=(64, 1024), cases=3),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the parts and write the results; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.planner", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--part", choices=tuple(PARTS), action="append", help="may be given several times")
    parser.add_argument("--sizes", type=_sizes, help="numbers of GPUs, with commas")
    parser.add_argument("--cases", type=int, help="per size and kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "results" / "planner")
    options = parser.parse_args(arguments)
    results = _known(options.out)
    for name in options.part or PARTS:
        part = PARTS[name]
        cases = options.cases or part.cases
        given = circumstances("benchmarks.planner")
        rows = part.measure(options.sizes or part.sizes, cases=cases, seed=options.seed)
        given["load_average_after"] = os.getloadavg()
        results["parts"][name] = {"circumstances": given, "cases": cases, "seed": options.seed, "rows": rows}
        write_results(options.out, results, render)
    return 0


def _sizes(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def _known(out: Path) -> dict[str, Any]:
    """The results so far."""
    path = out.with_suffix(".json")
    if not path.exists():
        return {"format_version": "0.1", "parts": {}}
    known: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return known


def render(results: Mapping[str, Any]) -> str:
    """The results as markdown."""
    lines = [
        "# The planner on random clusters",
        "",
        "Seeded draws (`benchmarks/planner/worlds.py`): `random` takes (D, P, M) before and after independently of "
        "each other, `near` lets only D change where that is possible. Tensor groups sit scattered over the instances "
        "(4 GPUs each, 8 from 64 GPUs on), a fifth of which gets a notice of 120 s; in every third case a tenth of "
        "new instances is there. 64 layers of 1.6 GB, KV of a replica 0.3 x lognormal(0, 0.6) of its weights, NIC "
        "6.25 GB/s, memory enough for old and new side by side.",
        "",
    ]
    for name, part in PARTS.items():
        if name not in results["parts"]:
            continue
        done = results["parts"][name]
        given = done["circumstances"]
        lines += part.render(done["rows"])
        lines += [
            f"`{given['command']}`, seed {done['seed']}, commit {given['commit'][:12]} ({given['uncommitted_files']} "
            f"files changed), {given['processor']}, {given['cores']} cores; load average "
            f"{given['load_average_before'][0]:.1f} before, {given['load_average_after'][0]:.1f} after.",
            "",
        ]
    return "\n".join(lines).rstrip() + "\n"


if __name__ == "__main__":
    sys.exit(main())
