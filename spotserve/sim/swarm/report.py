"""What a swarm showed: one result of many seeds, and what a person reads of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from spotserve.core.canonical import canonical_json
from spotserve.sim.swarm.injection import FAULT_CLASSES
from spotserve.sim.swarm.running import SeedResult

Json = dict[str, Any]
"""Plain JSON data, hence `Any`."""

COUNTED = ("entries", "runs", "requests", "tokens")


@dataclass(slots=True)
class SwarmReport:
    """The sum over seeds; failing ones are kept whole."""

    first_seed: int
    num_seeds: int = 0
    simulated_s: float = 0.0
    totals: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    died_at: Counter[str] = field(default_factory=Counter)
    refused_tokens: Counter[str] = field(default_factory=Counter)
    refused_plans: dict[int, str] = field(default_factory=dict)
    failures: list[Json] = field(default_factory=list)

    def add(self, result: SeedResult) -> None:
        """Count one more seed."""
        told = result.as_json()
        self.num_seeds += 1
        self.simulated_s += result.simulated_s
        self.totals.update({name: told[name] for name in COUNTED})
        self.faults += result.faults
        self.died_at += result.died_at
        self.refused_tokens += result.refused
        if result.refused_plans:
            self.refused_plans[result.seed] = result.refused_plans[0]
        if result.violations:
            self.failures.append({**told, "replay": replay_command(result.seed)})

    def as_json(self) -> Json:
        """The whole report as plain data."""
        return {
            "first_seed": self.first_seed,
            "num_seeds": self.num_seeds,
            "num_violations": sum(len(failure["violations"]) for failure in self.failures),
            "simulated_hours": round(self.simulated_s / 3600, 3),
            **{name: self.totals[name] for name in COUNTED},
            "faults": {name: self.faults[name] for name in FAULT_CLASSES},
            "coordinator_died_at": dict(sorted(self.died_at.items())),
            "refused_tokens": dict(sorted(self.refused_tokens.items())),
            "refused_plans": {str(seed): first for seed, first in sorted(self.refused_plans.items())},
            "failures": self.failures,
        }


def replay_command(seed: int) -> str:
    """What plays one seed again."""
    return f"spotserve simulate --swarm 1 --seed {seed} --format json"


def swarm_text(report: Json) -> str:
    """The report for a person."""
    last = report["first_seed"] + report["num_seeds"] - 1
    lines = [
        f"seeds {report['first_seed']} to {last}: {report['num_violations']} violations in "
        f"{len(report['failures'])} of {report['num_seeds']} seeds",
        f"{report['simulated_hours']} h simulated, {report['requests']} requests, {report['tokens']} tokens, "
        f"{report['runs']} plan runs, {report['entries']} journal entries",
        "",
        *(_fault_line(name, count) for name, count in report["faults"].items()),
    ]
    for failure in report["failures"]:
        lines += ["", *failure_lines(failure)]
    return "\n".join(lines) + "\n"


def _fault_line(name: str, count: int) -> str:
    return f"{name.replace('_', ' '):<34}{count:>9}"


def failure_lines(failure: Json) -> Iterable[str]:
    """One seed that broke a promise: what, in which scenario, and how to play it again."""
    yield f"seed {failure['seed']}:"
    yield from (f"  {violation}" for violation in failure["violations"])
    yield f"  scenario: {canonical_json(failure['scenario']).strip()}"
    yield f"  replay: {failure['replay']}"
