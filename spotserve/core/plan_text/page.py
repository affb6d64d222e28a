"""A whole plan as one page of text."""

from __future__ import annotations

from spotserve.core.plan_text.certificates import decision_lines
from spotserve.core.plan_text.money import cost_line
from spotserve.core.plan_text.schedule import Span, critical_path, port_spans
from spotserve.core.plan_text.table import (
    Json,
    columns,
    count_text,
    cut,
    moment_text,
    printable,
    runs_text,
    seconds_text,
    section,
    size_text,
)
from spotserve.core.plan_text.topology import (
    instance_table,
    layout_line,
    replica_table,
    replicas_after,
    replicas_before,
    request_lines,
)
from spotserve.core.plan_text.transfers import link_table, ports

MOST_ROWS = 40
ALL_ROWS = 10**9
SUBJECT_WIDTH = 42
AFTER_WIDTH = 20


def plan_text(plan: Json, *, most_rows: int = MOST_ROWS) -> str:
    """The whole plan for a person; tables end after `most_rows` with a count of what is left out."""
    plan = printable(plan)
    before, after = replicas_before(plan), replicas_after(plan)
    parts = [
        headline(plan),
        section(f"Before: {layout_line(plan, before)}", replica_table(plan, before, most_rows=most_rows), always=True),
        section(f"After: {layout_line(plan, after)}", replica_table(plan, after, most_rows=most_rows), always=True),
        section("Instances (replica:stage x GPUs)", instance_table(plan, most_rows=most_rows)),
        section("Requests", request_lines(plan)),
        section("Transfers by link", link_table(plan, most_rows=most_rows)),
        section("Critical path", path_table(plan, most_rows=most_rows)),
        section("Steps", step_table(plan, most_rows=most_rows)),
        section("Decided", decision_lines(plan)),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def headline(plan: Json) -> str:
    """What triggered it, what it comes to, and whether it can be applied."""
    trigger, times = plan["trigger"], plan["estimates"]
    who = f" {runs_text(trigger['instances'])}" if trigger["instances"] else ""
    left = "" if trigger["remaining_s"] is None else f", {seconds_text(trigger['remaining_s'])} left"
    lines = [
        f"epoch {plan['epoch']['from']} -> {plan['epoch']['to']}  {trigger['kind']}{who}{left}",
        f"policy {plan['policy']}  mode {plan['mode']}  next rungs {' '.join(plan['fallback'])}",
    ]
    if plan.get("cost"):
        lines.append(cost_line(plan["cost"]))
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


def path_table(plan: Json, *, most_rows: int) -> str:
    """The chain of steps that makes the plan take as long as it does, and what is left until the deadline."""
    lines = critical_path(plan)
    if not lines:
        return ""
    rows = []
    for line in lines[:most_rows]:
        if line.step is None:
            name, what = "(port)", _port_wait(plan)
        else:
            name, what = line.step["id"], f"{line.step['kind']} {cut(step_subject(line.step), 2 * SUBJECT_WIDTH)}"
        rows.append((moment_text(line.begin_s), seconds_text(line.takes_s), name, what))
    text = columns(("BEGINS", "TAKES", "STEP", "WHAT"), rows)
    if len(lines) > most_rows:
        text += f"\n… and {count_text(len(lines) - most_rows, 'more step')}"
    times = plan["estimates"]
    slack_s = times["slack_s"]
    end = f"done after {seconds_text(times['done_s'])}"
    if slack_s is not None:
        side = "before" if slack_s >= 0 else "after"
        end += f", {seconds_text(abs(slack_s))} {side} the deadline"
    return f"{text}\n{end}"


def _port_wait(plan: Json) -> str:
    """Why the copies of a chain take longer than they would alone."""
    found = ports(plan)
    return f"copies share ports: {found[0].words}" if found else "what the estimate adds to the longest chain"


def step_table(plan: Json, *, most_rows: int) -> str:
    """The steps in file order, with when each begins if a port carries one copy at a time."""
    spans = port_spans(plan["steps"], link_bytes_per_s=plan["spec"]["profile"]["link_bytes_per_s"])
    rows = [_step_row(span) for span in spans[:most_rows]]
    text = columns(("STEP", "KIND", "WHAT", "BYTES", "BEGINS", "TAKES", "WHY", "AFTER"), rows)
    hidden = len(spans) - len(rows)
    return f"{text}\n… and {count_text(hidden, 'more step')} (show --all)" if hidden > 0 else text


def _step_row(span: Span) -> tuple[str, ...]:
    step = span.step
    return (
        step["id"],
        step["kind"],
        cut(step_subject(step), SUBJECT_WIDTH),
        size_text(step["bytes"]) if step.get("bytes") else "-",
        moment_text(span.begin_s),
        seconds_text(step["estimated_s"]),
        step["reason"],
        cut(runs_text(step["depends_on"]), AFTER_WIDTH) or "-",
    )


def step_subject(step: Json) -> str:
    """Whom a step is about, without its id or its numbers."""
    if "source" in step:
        what = f"{step['source']} -> {step['destination']}"
        route = step.get("route")
        if route is None:
            return f"{what} for {step['replica']}"
        layers, heads = route["layers"], route["kv_heads"]
        return f"{what} {route['to_replica']} layers {layers[0]}:{layers[1]} heads {heads[0]}:{heads[1]}"
    if step["kind"] == "recompute":
        return count_text(len(step["requests"]), "request")
    workers = runs_text(step.get("workers", ()))
    if step["kind"] == "release":
        names = {piece["parameter"] for piece in step["slices"]}
        return f"{workers} of {step['replica']}" + (f" {count_text(len(names), 'parameter')}" if names else "")
    if "replica" in step:
        stop = ""
        if step["kind"] == "quiesce" and step["not_before_s"] > 0:
            stop = f" not before {seconds_text(step['not_before_s'])}"
        return f"{workers} for {step['replica']}{stop}"
    return "by the coordinator"
