"""A replay's report for a person: the verdict, the timeline, the plan runs, and the cluster at the end of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from spotserve.core.plan_text.table import (
    columns,
    count_text,
    printable,
    runs_text,
    seconds_text,
    section,
    size_text,
)

Json = dict[str, Any]
"""Plain JSON data, hence `Any`."""

MOST_OPEN = 20
"""Open requests that are named; `--format json` has all of them."""

REQUEST_WORDS = (
    ("accepted", "accepted"),
    ("first_tokens", "got a first token"),
    ("evicted", "evicted"),
    ("cancelled_by_client", "given up by the client"),
    ("finished", "finished"),
    ("failed", "failed"),
    ("cancelled", "cancelled"),
)
"""Counts of requests in the order in which they are told."""

CHECK_WORDS = {
    "same": "same decisions at policy version {policy_version}",
    "differ": "other decisions than recorded in {num_decisions_differing} of {num_decisions_compared} entries",
    "partly_compared": "same decisions in {num_decisions_compared} of {entries} entries, those of policy version"
    " {policy_version}",
    "not_compared": "decisions not compared: taken at policy version {versions}, this is {policy_version}",
}


def replay_text(report: Json) -> str:
    """The whole report; every figure in it comes from the JSON."""
    report = printable(report)
    parts = [
        _headline(report),
        section("Timeline", timeline_table(report["timeline"])),
        section("Plan runs", runs_table(report["runs"])),
        section(f"At {moment_text(report['at_s'])}", cluster_text(report["cluster"]), always=True),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def moment_text(at_s: float) -> str:
    """Seconds since the journal's start, as `--until` takes them."""
    return f"{at_s:.3f} s"


def _headline(report: Json) -> str:
    journal, checks = report["journal"], report["checks"]
    versions = " ".join(str(version) for version in checks["journal_policy_versions"]) or "none"
    verdict = CHECK_WORDS[checks["decisions"]].format(**checks, versions=versions, entries=report["entries"])
    if not report["entries"]:
        verdict = "no entry"
    compared = checks["num_snapshots_compared"]
    if compared:
        differing = checks["num_snapshots_differing"]
        verdict += f", {count_text(compared, 'fold snapshot')} {f'({differing} differing)' if differing else 'matched'}"
    ending = "" if report["until_s"] is not None else ", stopped cleanly" if journal["clean_stop"] else ""
    return "\n".join(
        [
            f"{journal['path']}: {count_text(report['entries'], 'entry')} from {journal['began'] or 'an unknown time'}"
            f" to {journal['ended'] or 'an unknown time'}{ending}",
            f"{report['state']}  epoch {report['epoch']}  policy {report['policy']}: {verdict}",
            report["state_digest"],
        ]
    )


def timeline_table(items: list[Json]) -> str:
    """One row for an item, one more for each thing that followed in the same entry."""
    rows: list[tuple[str, str, str, str]] = []
    for item in items:
        lines = meanwhile_lines(item) if item["kind"] == "meanwhile" else entry_lines(item)
        service = item.get("service")
        for index, line in enumerate(lines):
            first = index == 0
            rows.append(
                (
                    moment_text(item["at_s"]) if first else "",
                    str(item["sequence"]) if first else "",
                    service["to"] if first and service else "",
                    line,
                )
            )
    return columns(("TIME", "ENTRY", "SERVICE", "WHAT"), rows)


def meanwhile_lines(item: Json) -> list[str]:
    """Quiet entries in one line, what streams felt of them in another."""
    counts = item["requests"]
    told = [f"{counts[name]} {words}" for name, words in REQUEST_WORDS if name in counts]
    told += [f"{count} told to fail: {reason}" for reason, count in item["failures"].items()]
    if item["others"]:
        names = (name if count == 1 else f"{count} {name}" for name, count in item["others"].items())
        told.append(f"quiet: {', '.join(names)}")
    lines = ["  " + "; ".join(told)]
    stalls = item["stalls"]
    if stalls is not None:
        lines.append(
            f"  {count_text(stalls['count'], 'stream')} waited, longest {stalls['longest_ms']:.1f} ms"
            f" (request {stalls['request']})"
        )
    if item["recomputed_tokens"]:
        lines.append(f"  {count_text(item['recomputed_tokens'], 'token')} recomputed")
    return lines


def entry_lines(item: Json) -> list[str]:
    """The event, what changed with it, and what was decided."""
    event = item["event"]
    teller = EVENTS.get(event["kind"])
    changes = [line for change in item["changes"] if (line := _change(change, event))]
    lines = [teller(event) if teller is not None else _plainly(event), *changes]
    if event["kind"] == "worker_registered" and changes:
        lines = changes  # Its last worker: that the instance is there says all of it.
    launched = [command["instance"] for command in item["commands"] if command["kind"] == "launch_instance"]
    if launched:
        lines.append(f"-> launch {runs_text(launched)}")
    lines += [f"-> {_decision(command)}" for command in item["commands"] if command["kind"] != "launch_instance"]
    return lines


def _plainly(facts: Json) -> str:
    """A kind and its fields as they are."""
    told = " ".join(f"{name} {value}" for name, value in facts.items() if name != "kind" and value not in (None, 0))
    return f"{facts['kind'].replace('_', ' ')} {told}".strip()


def _begun(event: Json) -> str:
    policy = f"policy {event['policy']} {event['policy_version']}"
    return f"journal begun: model {event['model']}, {policy}, {count_text(event['num_instances'], 'instance')}"


def _restarted(event: Json) -> str:
    workers = count_text(event["num_workers"], "worker")
    away = seconds_text(event["away_s"])
    return f"coordinator restarted, {away} after the last entry: term {event['term']}, {workers} came back"


def _lost(event: Json) -> str:
    return f"instance {event['instance']} lost: {event['reason']}"


def _noticed(event: Json) -> str:
    return f"notice for {event['instance']}: taken in {seconds_text(event['grace_s'])}"


def _plan(event: Json) -> str:
    return f"plan {'ready' if event['kind'] == 'plan_ready' else 'submitted'}: {plan_line(event['plan'])}"


def plan_line(plan: Json) -> str:
    """A plan in one line: trigger, target, estimates."""
    trigger = plan["trigger"]
    who = f" {runs_text(trigger['instances'])}" if trigger["instances"] else ""
    times = plan["estimates"]
    return (
        f"epoch {plan['epoch']}, {trigger['kind']}{who}, mode {plan['mode']}, target {layout_text(plan['replicas'])};"
        f" estimated copy {seconds_text(times['copy_s'])}, stall {seconds_text(times['stall_s'])},"
        f" done {seconds_text(times['done_s'])}"
    )


def layout_text(replicas: list[Json]) -> str:
    """`2x2x1` (DxPxM) where replicas are equal, else each one's PxM."""
    shapes = [f"{replica['pipeline']}x{replica['tensor']}" for replica in replicas]
    if not shapes:
        return "nothing"
    if len(set(shapes)) == 1:
        return f"{len(shapes)}x{shapes[0]} (DxPxM)"
    return " ".join(shapes) + " (PxM each)"


def _quiesced(event: Json) -> str:
    requests = count_text(event["num_requests"], "request")
    return f"replica {event['replica']} quiesced with {requests} (epoch {event['epoch']})"


def _first_token(event: Json) -> str:
    stall = f" after a stall of {event['stall_ms']:.1f} ms" if event["stall_ms"] else ""
    tokens = event["recomputed_tokens"]
    again = f", {count_text(tokens, 'token')} recomputed" if tokens else ""
    return f"request {event['request']} goes on at {event['replica']}{stall}{again}"


EVENTS: dict[str, Callable[[Json], str]] = {
    "journal_begun": _begun,
    "coordinator_restarted": _restarted,
    "instance_wanted": lambda event: f"one more {event['market']} instance asked for",
    "instance_lost": _lost,
    "replica_broke": lambda event: f"replica {event['replica']} broke: {event['detail']}",
    "snapshot_taken": lambda event: "the workers told what they hold",
    "notice_received": _noticed,
    "notice_withdrawn": lambda event: f"notice for {event['instance']} withdrawn",
    "kill_requested": lambda event: f"{event['instance']} is to be killed",
    "worker_registered": lambda event: f"worker {event['worker']} registered",
    "first_token": _first_token,
    "step_done": lambda event: f"step {event['step']} done (epoch {event['epoch']})",
    "ledger_durable": lambda event: f"tokens durable (epoch {event['epoch']})",
    "plan_ready": _plan,
    "plan_submitted": _plan,
    "plan_failed": lambda event: f"plan failed: {event['error']}",
    "step_failed": lambda event: f"step {event['step']} failed (epoch {event['epoch']}): {event['error']}",
    "quiesced": _quiesced,
    "timer_fired": lambda event: f"timer {event['timer']}",
    "stop_requested": lambda event: f"stop asked for, drain {seconds_text(event['drain_s'])}",
}


def _change(change: Json, event: Json) -> str:
    """A change of the state in words; what the event's own line says already is left out."""
    if change["kind"] == "steps_given_up":
        return f"{count_text(change['count'], 'step')} given up to be in time: what they lack is recomputed"
    if change["kind"] == "instance" and event["kind"] == "instance_lost" and change["to"] == "gone":
        return ""
    if change["kind"] == "replica" and event["kind"] == "quiesced" and change["to"] == "quiesced":
        return ""
    return f"{change['kind']} {change['id']} {change['from']} -> {change['to']}"


def _decision(command: Json) -> str:
    kind = command["kind"]
    if kind == "kill_instance":
        return f"kill {command['instance']} ({command['reason']})"
    if kind == "drop_plan":
        again = ", plan again" if command["again"] else ""
        return f"no run: {command['reason']}{again}"
    if kind == "begin_run":
        name = f"migration {command['number']}" if command["number"] else "first placement"
        return f"begin {name} (epoch {command['epoch']})"
    if kind == "commit_run":
        moved, recomputed = command["moved"], command["recomputed"]
        return f"commit epoch {command['epoch']}: {count_text(moved, 'request')} moved, {recomputed} recomputed"
    if kind == "abort_run":
        resumed = f", {runs_text(command['resumed'])} go on" if command["resumed"] else ""
        return f"abort epoch {command['epoch']}: {command['reason']}{resumed}"
    if kind == "finish_run":
        took = "" if command["done_s"] is None else f" after {seconds_text(command['done_s'])}"
        estimated = "" if command["estimated_s"] is None else f" (estimated {seconds_text(command['estimated_s'])})"
        return f"released epoch {command['epoch']}{took}{estimated}"
    if kind == "fence_replica":
        return f"fence {command['replica']} generation {command['generation']}"
    return _plainly(command)


def runs_table(runs: list[Json]) -> str:
    """Each plan run, estimated against measured."""
    rows = []
    for run in runs:
        totals = run["totals"]
        trigger = f"{run['trigger']['kind']} {runs_text(run['trigger']['instances'])}".strip()
        outcome = run["outcome"] + (f" ({run['abort_reason']})" if run["abort_reason"] else "")
        wait_ms = totals["stall_ms_max"]
        rows.append(
            (
                run["number"],
                run["epoch"],
                trigger,
                run["mode"],
                layout_text(run["replicas"]),
                *(_pair(totals[name], seconds_text) for name in ("copy_s", "stall_s", "done_s")),
                "-" if wait_ms is None else f"{wait_ms:.1f} ms",
                _pair(totals["weight_bytes"], size_text),
                _pair(totals["kv_bytes"], size_text),
                "-" if totals["recomputed_tokens"] is None else totals["recomputed_tokens"],
                outcome,
            )
        )
    titles = ("MIGRATION", "EPOCH", "TRIGGER", "MODE", "TARGET", "COPY", "STALL", "DONE")
    text = columns((*titles, "LONGEST WAIT", "WEIGHTS", "KV", "RECOMPUTED", "OUTCOME"), rows)
    return f"{text}\nestimated / measured; LONGEST WAIT is what a stream saw" if text else ""


def _pair(pair: Json, words: Callable[[float], str]) -> str:
    measured = "-" if pair["measured"] is None else words(pair["measured"])
    return f"{words(pair['estimated'])} / {measured}"


def cluster_text(cluster: Json) -> str:
    """The cluster at the end of what was replayed."""
    counts = "  ".join(f"{name} {count}" for name, count in cluster["requests"].items())
    parts = [
        f"{cluster['state']}  epoch {cluster['epoch']}\nrequests  {counts}",
        _run_under_way(cluster),
        columns(
            ("INSTANCE", "STATE", "MARKET", "TAKEN IN", "GPUS"),
            [
                (
                    one["id"],
                    one["state"],
                    one["market"],
                    "-" if one["taken_in_s"] is None else seconds_text(one["taken_in_s"]),
                    runs_text(one["gpus"]) or "-",
                )
                for one in cluster["instances"]
            ],
        ),
        columns(
            ("REPLICA", "STATE", "GENERATION", "REQUESTS", "STAGES"),
            [
                (
                    one["id"],
                    one["state"],
                    one["generation"],
                    one["requests"],
                    "  ".join(
                        f"{stage['layers'][0]}:{stage['layers'][1]} {runs_text(stage['gpus'])}"
                        for stage in one["stages"]
                    ),
                )
                for one in cluster["replicas"]
            ],
        ),
        _open_requests(cluster["open_requests"]),
    ]
    return "\n\n".join(part for part in parts if part)


def _run_under_way(cluster: Json) -> str:
    """The run, or the plan that is being made."""
    run, planning = cluster["run"], cluster["planning"]
    if run is not None:
        steps = run["steps"]
        total = sum(steps.values())
        trigger = f"{run['trigger']['kind']} {runs_text(run['trigger']['instances'])}".strip()
        late = f", {steps['late']} given up" if steps["late"] else ""
        running = ", ".join(f"{step['step']} {step['kind']}" for step in run["running"])
        return (
            f"run of epoch {run['epoch']} ({trigger}, {run['mode']}) {run['state']} since"
            f" {seconds_text(run['since_s'])} of estimated {seconds_text(run['estimated_s'])}:"
            f" {steps['done']} of {count_text(total, 'step')} done{late}"
            + (f"\nunder way: {running}" if running else "")
        )
    if planning is not None:
        return f"a plan for epoch {planning['epoch']} ({planning['trigger']}) is being made: {planning['phase']}"
    return ""


def _open_requests(requests: list[Json]) -> str:
    rows = [(one["id"], one["state"], one["replica"] or "-") for one in requests[:MOST_OPEN]]
    text = columns(("REQUEST", "STATE", "REPLICA"), rows)
    hidden = len(requests) - len(rows)
    return f"{text}\n… and {count_text(hidden, 'more request')} (--format json)" if hidden else text
