"""Runs the swarm over ranges of seeds and keeps one line for each: an interrupted run goes on where it was.

    python -m benchmarks.swarm --seeds 10000

A range that is there is not run again, unless `--again` says so; each line tells the commit and the code that it was
run with. The page beside the lines is made of them.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.results_file import say

ROOT = Path(__file__).parent.parent
LINES = ROOT / "benchmarks" / "results" / "swarm.jsonl"
SUMMED = ("num_seeds", "num_violations", "entries", "runs", "requests", "tokens")
COUNTED = ("faults", "coordinator_died_at", "refused_tokens")

FOUND: dict[int, str] = {
    61: "a machine that died while it joined came half back (the virtual world)",
    123: "a second, late answer of the planner began a plan of an older membership",
    1711: "after a restart behind a commit a leader was told of KV that had not moved",
    4032: "KV that a first migration left behind was held against the next one (the virtual world)",
    1821: "a leader took again what it had sampled to its end (the virtual world)",
    105: "a restart counted on room that weights of an aborted plan took on an idle GPU",
    254: "the same, beside a replica that went on",
    744: "a reserve that was short of room made some of left-over weights that its own position was to use",
    849: "an instance that was about to be taken was held for capacity that is back (the swarm)",
    1186: "weights came for a position that was gone, and took room for ever (the virtual world)",
    665: "after a restart what a release never freed passed for a replica of the layout (the virtual world)",
    8241: "a request of which one choice had ended moved twice, and was handed over only once",
    9151: "the same, after a restart",
    1898: "a reserve of a coordinator that had died came about under the next one (the virtual world)",
}
"""Seeds that showed a fault, and which; each is mended, and a test of its own."""

Json = dict[str, Any]
"""Plain JSON data, hence `Any`."""


def main() -> None:
    """Run what is missing, then write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--first", type=int, default=0, help="first seed")
    parser.add_argument("--seeds", type=int, default=10_000, help="number of seeds")
    parser.add_argument("--range", type=int, default=250, help="seeds of one line")
    parser.add_argument("--again", action="store_true", help="forget the lines so far")
    parser.add_argument("--out", type=Path, default=LINES, help="JSON lines; the page lies beside them")
    options = parser.parse_args()
    code = code_digest()
    known = [] if options.again else read_lines(options.out)
    done = {(line["first_seed"], line["num_seeds"]) for line in known}
    for first in range(options.first, options.first + options.seeds, options.range):
        count = min(options.range, options.first + options.seeds - first)
        if (first, count) not in done:
            line = run_range(first, count, code)
            known.append(line)
            write_lines(options.out, known)
            say(f"seeds {first} to {first + count - 1}: {line['num_violations']} violations, {line['cpu_s']} s")
    write_lines(options.out, known)


def run_range(first: int, count: int, code: str) -> Json:
    """One line: the report of a range of seeds, and what it was made with."""
    from spotserve.sim.swarm.report import SwarmReport
    from spotserve.sim.swarm.running import run_seed
    from spotserve.solvers.planner import make_plan

    begun_s = time.process_time()
    report = SwarmReport(first)
    for seed in range(first, first + count):
        report.add(run_seed(seed, make_plan))
    return {
        **report.as_json(),
        "command": f"spotserve simulate --swarm {count} --seed {first} --format json",
        "commit": git("rev-parse", "HEAD"),
        "code": code,
        "cpu_s": round(time.process_time() - begun_s, 1),
    }


def read_lines(path: Path) -> list[Json]:
    """The lines so far; none where there is no file."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write_lines(path: Path, lines: list[Json]) -> None:
    """The lines in order of seeds, whole or not at all, and the page beside them."""
    ordered = sorted(lines, key=lambda line: int(line["first_seed"]))
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text("".join(json.dumps(line, sort_keys=True) + "\n" for line in ordered), encoding="utf-8")
    part.replace(path)
    path.with_suffix(".md").write_text(page(ordered), encoding="utf-8")


def page(lines: list[Json]) -> str:
    """What all ranges showed together."""
    total = {name: sum(line[name] for line in lines) for name in SUMMED}
    counts = {name: summed(line[name] for line in lines) for name in COUNTED}
    refused = {seed: first for line in lines for seed, first in line["refused_plans"].items()}
    hours = sum(line["simulated_hours"] for line in lines)
    cpu_s = sum(line["cpu_s"] for line in lines)
    commits = sorted({line["commit"][:12] for line in lines})
    failing = [failure for line in lines for failure in line["failures"]]
    rows = [
        ("seeds", f"{total['num_seeds']:,} ({spans(lines)})"),
        ("violations", f"{total['num_violations']:,} in {len(failing)} seeds"),
        ("simulated", f"{hours:,.1f} h in {cpu_s / 60:.0f} min of one core"),
        ("requests, tokens", f"{total['requests']:,}, {total['tokens']:,}"),
        ("plan runs, journal entries", f"{total['runs']:,}, {total['entries']:,}"),
        ("plans that the checker refused", f"in {len(refused)} seeds: {', '.join(list(refused)[:12])}"),
        ("token messages that the ledger refused", told(counts["refused_tokens"])),
        ("commit, code", f"{', '.join(commits)}, {', '.join(sorted({line['code'][:12] for line in lines}))}"),
    ]
    faults = [f"| {name.replace('_', ' ')} | {count:,} |" for name, count in counts["faults"].items()]
    died = [f"| {name} | {count:,} |" for name, count in sorted(counts["coordinator_died_at"].items())]
    return "\n".join(
        [
            "# The swarm",
            "",
            "`python -m benchmarks.swarm --seeds N`; a range again: the `command` of its line in `swarm.jsonl`.",
            "",
            "| what | count |",
            "|---|---|",
            *(f"| {name} | {value} |" for name, value in rows),
            "",
            "## Faults that happened",
            "",
            "| class | times |",
            "|---|---|",
            *faults,
            "",
            "## Faults of ours that seeds showed, all mended",
            "",
            "| seed | what |",
            "|---|---|",
            *(f"| {seed} | {what} |" for seed, what in sorted(FOUND.items())),
            "",
            "## Entries at whose write the coordinator died",
            "",
            "| event | times |",
            "|---|---|",
            *died,
            "",
            *(line for failure in failing for line in failing_lines(failure)),
        ]
    )


def failing_lines(failure: Json) -> list[str]:
    """A seed that broke a promise."""
    return [f"- seed {failure['seed']}: {'; '.join(failure['violations'][:3])}", f"  `{failure['replay']}`", ""]


def summed(counts: Iterable[dict[str, int]]) -> dict[str, int]:
    """Counts of all ranges, in the order of the first."""
    total: Counter[str] = Counter()
    for one in counts:
        total.update(one)
    return dict(total)


def told(counts: dict[str, int]) -> str:
    """`fenced 12, late 3`."""
    return ", ".join(f"{name} {count:,}" for name, count in sorted(counts.items())) or "none"


def spans(lines: list[Json]) -> str:
    """`0 to 9999`, with the holes that there are."""
    runs: list[list[int]] = []
    for line in lines:
        first, end = line["first_seed"], line["first_seed"] + line["num_seeds"]
        if runs and runs[-1][1] == first:
            runs[-1][1] = end
        else:
            runs.append([first, end])
    return ", ".join(f"{first} to {end - 1}" for first, end in runs)


def code_digest() -> str:
    """One hash of all that a seed runs through."""
    whole = hashlib.sha256()
    for folder in ("core", "sim", "solvers"):
        for path in sorted((ROOT / "spotserve" / folder).rglob("*.py")):
            whole.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    return whole.hexdigest()


def git(*args: str) -> str:
    """What git says, where this is a checkout."""
    done = subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip()


if __name__ == "__main__":
    main()
