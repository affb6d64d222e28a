"""The text view of a plan, rendered from its JSON: what `show` prints, and the rows that `diff` compares."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

Json = Mapping[str, Any]
"""A plan (or a part of one) as plain JSON data, hence `Any`."""

MAX_STEPS_SHOWN = 200


def plan_text(plan: Json) -> str:
    """The whole plan for a person."""
    parts = [headline(plan), layout_table(plan), route_lines(plan), request_line(plan), step_table(plan), solvers(plan)]
    return "\n\n".join(part for part in parts if part) + "\n"


def headline(plan: Json) -> str:
    """What triggered it, what it comes to, and whether it can be applied."""
    trigger, times = plan["trigger"], plan["estimates"]
    who = f" {' '.join(trigger['instances'])}" if trigger["instances"] else ""
    left = "" if trigger["remaining_s"] is None else f", {seconds_text(trigger['remaining_s'])} left"
    lines = [
        f"epoch {plan['epoch']['from']} -> {plan['epoch']['to']}  {trigger['kind']}{who}{left}",
        f"policy {plan['policy']}  mode {plan['mode']}  next rungs {' '.join(plan['fallback'])}",
    ]
    if not plan["steps"]:
        lines.append("nothing to do: what runs is what should run" if plan["complete"] else "nothing fits what is left")
        return "\n".join(lines)
    slack = "" if times["slack_s"] is None else f"  slack {seconds_text(times['slack_s'])}"
    lines.append(
        f"copy {seconds_text(times['copy_s'])}  stall {seconds_text(times['stall_s'])}"
        f"  done {seconds_text(times['done_s'])}{slack}"
    )
    if not plan["complete"]:
        lines.append("not every request has a place: they wait")
    if not plan["applyable"]:
        lines.append("not applyable")
    return "\n".join(lines)


def layout_table(plan: Json) -> str:
    """The replicas after the plan; a star marks the new ones."""
    before = {replica["id"] for replica in plan["snapshot"]["world"]["replicas"]}
    rows = [
        (
            replica["id"] + ("" if replica["id"] in before else " *"),
            replica["generation"],
            index,
            f"{stage['layers'][0]}:{stage['layers'][1]}",
            " ".join(stage["gpus"]),
            replica["max_running"],
            replica["kv_blocks"],
        )
        for replica in plan["target"]["replicas"]
        for index, stage in enumerate(replica["stages"])
    ]
    return columns(("REPLICA", "GENERATION", "STAGE", "LAYERS", "GPUS", "RUNNING", "KV BLOCKS"), rows)


def route_lines(plan: Json) -> str:
    """Who inherits whose requests."""
    return "\n".join(f"requests of {route['from_replica']} -> {route['to_replica']}" for route in plan["routes"])


def request_line(plan: Json) -> str:
    """How many requests finish, move or are recomputed."""
    actions = [request["action"] for request in plan["requests"]]
    counts = [f"{actions.count(name)} {name}" for name in ("move", "finish", "recompute") if name in actions]
    return f"{len(actions)} requests: {', '.join(counts)}" if actions else ""


def step_table(plan: Json) -> str:
    """The steps in file order."""
    steps = plan["steps"]
    rows = [
        (
            step["id"],
            step["kind"],
            step_subject(step),
            size_text(step["bytes"]) if "bytes" in step else "-",
            seconds_text(step["estimated_s"]),
            step["reason"],
            " ".join(step["depends_on"]) or "-",
        )
        for step in steps[:MAX_STEPS_SHOWN]
    ]
    text = columns(("STEP", "KIND", "WHAT", "BYTES", "TAKES", "WHY", "AFTER"), rows)
    hidden = len(steps) - len(rows)
    return f"{text}\n… and {hidden} more steps" if hidden > 0 else text


def step_subject(step: Json) -> str:
    """Whom a step is about, without its id or its numbers."""
    if "source" in step:
        what = f"{step['source']} -> {step['destination']}"
        route = step.get("route")
        if route is None:
            return f"{what} for {step['replica']}"
        layers, heads = route["layers"], route["kv_heads"]
        return (
            f"{what} {route['from_replica']} -> {route['to_replica']}"
            f" layers {layers[0]}:{layers[1]} kv heads {heads[0]}:{heads[1]}"
        )
    if step["kind"] == "recompute":
        return f"{len(step['requests'])} requests"
    workers = " ".join(step.get("workers", ()))
    if step["kind"] == "release":
        layers = sorted({piece["parameter"] for piece in step["slices"]})
        return f"{workers} of {step['replica']}" + (f" {len(layers)} parameters" if layers else "")
    return f"{workers} for {step['replica']}" if "replica" in step else "the commit point"


def solvers(plan: Json) -> str:
    """Who decided what, and how sure."""
    rows = [
        (
            kind,
            report["name"],
            report["status"],
            f"{report['objective']:g}",
            f"{report['bound']:g}",
            f"{report['gap']:.1%}",
        )
        for kind, report in sorted(plan["solver"].items())
    ]
    return columns(("SOLVER", "NAME", "STATUS", "OBJECTIVE", "BOUND", "GAP"), rows)


def plan_facts(plan: Json) -> dict[str, str]:
    """Path -> value of what two plans can differ in; steps are named by what they do, not by their ids."""
    facts = {
        "epoch": f"{plan['epoch']['from']} -> {plan['epoch']['to']}",
        "trigger": headline(plan).split("  ", 1)[1].split("\n")[0],
        "policy": f"{plan['policy']} {plan['policy_version']}",
        "mode": plan["mode"],
        "spec_digest": plan["spec_digest"],
        "snapshot_digest": plan["snapshot_digest"],
        "fallback": " ".join(plan["fallback"]),
        "applyable": str(plan["applyable"]).lower(),
        "complete": str(plan["complete"]).lower(),
    }
    facts |= {f"estimates.{name}": str(value) for name, value in plan["estimates"].items()}
    for replica in plan["target"]["replicas"]:
        facts[f"replica.{replica['id']}"] = replica_text(replica)
    facts |= {f"route.{route['from_replica']}": route["to_replica"] for route in plan["routes"]}
    for request in plan["requests"]:
        facts[f"request.{request['request']}"] = f"{request['action']} {request['to_replica'] or '-'}"
    facts |= {f"solver.{kind}": report["name"] for kind, report in plan["solver"].items()}
    facts |= dict(step_facts(plan["steps"]))
    return facts


def replica_text(replica: Json) -> str:
    """A replica's layout in one line."""
    stages = " | ".join(f"{s['layers'][0]}:{s['layers'][1]} {' '.join(s['gpus'])}" for s in replica["stages"])
    return f"generation {replica['generation']} running {replica['max_running']} {stages}"


def step_facts(steps: Sequence[Json]) -> Iterator[tuple[str, str]]:
    """Each step under what it does; a number tells doubles apart."""
    seen: dict[str, int] = {}
    for step in steps:
        name = f"step.{step['kind']} {step_subject(step)}"
        seen[name] = seen.get(name, 0) + 1
        suffix = "" if seen[name] == 1 else f" #{seen[name]}"
        yield name + suffix, f"{step.get('bytes', 0)} bytes"


def plan_changes(before: Json, after: Json) -> list[dict[str, str | None]]:
    """What differs between two plans, sorted by path; None where only one of them has it."""
    old, new = plan_facts(before), plan_facts(after)
    return [
        {"path": path, "before": old.get(path), "after": new.get(path)}
        for path in sorted({*old, *new})
        if old.get(path) != new.get(path)
    ]


def changes_text(changes: Sequence[Mapping[str, str | None]]) -> str:
    """`- path: before` and `+ path: after`, or that there is no difference."""
    lines = []
    for change in changes:
        for sign, side in (("-", "before"), ("+", "after")):
            if change[side] is not None:
                lines.append(f"{sign} {change['path']}: {change[side]}")
    return "\n".join(lines or ["no difference"]) + "\n"


def columns(titles: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Columns as wide as their widest cell; empty for no rows."""
    if not rows:
        return ""
    cells = [list(titles), *([str(cell) for cell in row] for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(titles))]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in cells)


def seconds_text(value_s: float) -> str:
    """`12 ms` below a second, `2.40 s` above."""
    return f"{value_s * 1000:.1f} ms" if abs(value_s) < 1 else f"{value_s:.2f} s"


def size_text(size_bytes: int) -> str:
    """Bytes for a person."""
    size = float(size_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"
