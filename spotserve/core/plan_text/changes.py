"""What two plans decide differently: target, routes, requests, what passes each link, times, and who decided."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby

from spotserve.core.ids import instance_of, natural_key
from spotserve.core.plan import COPY_KINDS
from spotserve.core.plan_text.money import usd_text
from spotserve.core.plan_text.table import Json, printable, runs_text, seconds_text, size_text
from spotserve.core.plan_text.transfers import STORAGE

SECTIONS = {
    "trigger": "what they answer",
    "inputs": "what they were made for",
    "outcome": "outcome",
    "estimates": "times",
    "cost": "money",
    "target": "replicas after the plan",
    "route": "routes",
    "request": "requests",
    "steps": "steps",
    "link": "links",
    "solver": "solvers",
}
"""Where a path of a difference begins -> its title, in the order of the text."""


def plan_facts(plan: Json) -> dict[str, str]:
    """Path -> value of what two plans can differ in; steps count by what they do, not by id or file order."""
    trigger = plan["trigger"]
    left = "" if trigger["remaining_s"] is None else f", {seconds_text(trigger['remaining_s'])} left"
    facts = {
        "trigger.event": " ".join([trigger["kind"], *trigger["instances"]]) + left,
        "trigger.epoch": f"{plan['epoch']['from']} -> {plan['epoch']['to']}",
        "inputs.policy": f"{plan['policy']} {plan['policy_version']}",
        "inputs.spec_digest": plan["spec_digest"],
        "inputs.snapshot_digest": plan["snapshot_digest"],
        "outcome.mode": plan["mode"],
        "outcome.fallback": " ".join(plan["fallback"]),
        "outcome.applyable": str(plan["applyable"]).lower(),
        "outcome.complete": str(plan["complete"]).lower(),
    }
    for name, value in plan["estimates"].items():
        facts[f"estimates.{name}"] = "none" if value is None else seconds_text(value)
    for name, value in (plan.get("cost") or {}).items():
        facts[f"cost.{name}"] = "none" if value is None else usd_text(value)
    facts |= {f"target.{replica['id']}": replica_text(replica) for replica in plan["target"]["replicas"]}
    facts |= {f"route.{route['from_replica']}": route["to_replica"] for route in plan["routes"]}
    for request in plan["requests"]:
        facts[f"request.{request['request']}"] = f"{request['action']} {request['to_replica'] or '-'}"
    facts |= {f"steps.{kind}": str(number) for kind, number in Counter(s["kind"] for s in plan["steps"]).items()}
    facts |= dict(_link_facts(plan["steps"]))
    facts |= dict(_solver_facts(plan["solver"]))
    return facts


def replica_text(replica: Json) -> str:
    """A replica's layout in one line."""
    stages = " | ".join(f"{s['layers'][0]}:{s['layers'][1]} {runs_text(s['gpus'])}" for s in replica["stages"])
    pool = f"running {replica['max_running']} kv_blocks {replica['kv_blocks']}"
    return f"generation {replica['generation']} {pool} {stages}"


def _link_facts(steps: Sequence[Json]) -> Iterator[tuple[str, str]]:
    """What is copied from instance to instance: steps and bytes of each kind."""
    sums: dict[tuple[str, str], dict[str, tuple[int, int]]] = defaultdict(dict)
    for step in steps:
        if step["kind"] in COPY_KINDS:
            ends: tuple[str, str] = instance_of(step["source"]), instance_of(step["destination"])
        elif step["kind"] == "load_weights":
            ends = STORAGE, instance_of(step["workers"][0])
        else:
            continue
        number, size = sums[ends].get(step["kind"], (0, 0))
        sums[ends][step["kind"]] = number + 1, size + step["bytes"]
    for (source, destination), kinds in sums.items():
        parts = [f"{number} {kind} {size_text(size)} ({size})" for kind, (number, size) in sorted(kinds.items())]
        yield f"link.{source} -> {destination}", ", ".join(parts)


def _solver_facts(reports: Mapping[str, Json]) -> Iterator[tuple[str, str]]:
    """Who decided, and what it came to; the certificate and the search's statistics only follow from that."""
    for kind, report in reports.items():
        figures = f"objective {report['objective']:.12g} bound {report['bound']:.12g} gap {report['gap']:.1%}"
        yield f"solver.{kind}", f"{report['name']} {report['status']} {figures}"


def plan_changes(before: Json, after: Json) -> list[dict[str, str | None]]:
    """What differs between two plans, by section and natural order of its path; None where only one of them has it."""
    old, new = plan_facts(before), plan_facts(after)
    ranks = {name: rank for rank, name in enumerate(SECTIONS)}
    paths = sorted({*old, *new}, key=lambda path: (ranks[path.split(".")[0]], natural_key(path)))
    return [
        {"path": path, "before": old.get(path), "after": new.get(path)}
        for path in paths
        if old.get(path) != new.get(path)
    ]


def changes_text(changes: Sequence[Mapping[str, str | None]]) -> str:
    """`- path: before` and `+ path: after` under the title of their section, or that there is no difference."""
    blocks = []
    for name, group in groupby(printable(changes), key=lambda change: str(change["path"]).split(".")[0]):
        lines = [SECTIONS[name]]
        for change in group:
            for sign, side in (("-", "before"), ("+", "after")):
                if change[side] is not None:
                    lines.append(f"{sign} {change['path']}: {change[side]}")
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks or ["no difference"]) + "\n"
