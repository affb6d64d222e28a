"""The life of one request for a person, from the JSON of `inspect --request`."""

from __future__ import annotations

from typing import Any

from spotserve.cli.replay_text import moment_text
from spotserve.core.plan_text.table import columns, count_text, printable, seconds_text, section

Json = dict[str, Any]
"""Plain JSON data, hence `Any`."""

ACTIONS = {"finish": "may finish where it is", "move": "moves", "recompute": "is recomputed"}
"""What a plan has in mind for it."""


def request_text(report: Json) -> str:
    """Headline, where the time went, and every step."""
    report = printable(report)
    return "\n\n".join([_headline(report), section("Totals", _totals(report)), section("Life", _life(report))]) + "\n"


def _headline(report: Json) -> str:
    choices = count_text(report["num_choices"], "choice")
    sizes = f"{count_text(report['prompt_tokens'], 'prompt token')}, at most {report['max_tokens']} more, {choices}"
    if report["tokens"] is not None:
        sizes += f", {' '.join(str(count) for count in report['tokens'])} generated"
    return f"request {report['request']}  {report['state']}\n{sizes}"


def _totals(report: Json) -> str:
    totals = report["totals"]
    spent = ", ".join(
        f"{name[:-2] if name.endswith('_s') else name} {seconds_text(value)}"
        for name, value in totals["in_state_s"].items()
        if value
    )
    homes = " ".join(f"{one['id']} (generation {one['generation']})" for one in totals["replicas"])
    rows = [
        ("first token after", _seconds(totals["ttft_s"])),
        ("ended after", _seconds(totals["latency_s"])),
        ("time spent", spent or "-"),
        (
            "longest stall",
            f"{totals['stall_ms_max']:.1f} ms of {totals['num_stalls']}" if totals["num_stalls"] else "-",
        ),
        ("moves", totals["num_moves"]),
        ("evictions", totals["num_evictions"]),
        ("recomputed", count_text(totals["recomputed_tokens"], "token")),
        ("served by", homes or "-"),
    ]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name.ljust(width)}  {value}" for name, value in rows)


def _life(report: Json) -> str:
    rows = [
        (
            moment_text(step["at_s"]),
            step["sequence"],
            step.get("state", ""),
            step.get("replica") or "",
            _step(step),
        )
        for step in report["steps"]
    ]
    return columns(("TIME", "ENTRY", "STATE", "REPLICA", "WHAT"), rows)


def _step(step: Json) -> str:
    """One step in words."""
    what = step["what"]
    if what == "admitted":
        return f"admitted to {step['to']} generation {step['generation']}"
    if what == "named_again":
        return f"named to {step['to']} again after the restart"
    if what == "first_token":
        stall = f" after a stall of {step['stall_ms']:.1f} ms" if step["stall_ms"] else ""
        again = f", {count_text(step['recomputed_tokens'], 'token')} recomputed" if step["recomputed_tokens"] else ""
        return f"first token of {step['on']} generation {step['generation']}{stall}{again}"
    if what == "quiesced":
        done = " ".join(f"{one['tokens']} tokens ({one['kv_tokens']} in the KV cache)" for one in step["choices"])
        return f"stands still on {step['on']} at {done} (epoch {step['epoch']})"
    if what == "planned":
        to = f" to {step['to']}" if step["to"] and step["action"] == "move" else ""
        return f"plan of epoch {step['epoch']}: {ACTIONS[step['action']]}{to}"
    if what == "moved":
        return f"moved to {step['to']} with its KV (epoch {step['epoch']})"
    if what == "left_to_recompute":
        return f"its KV stays behind: to be recomputed (epoch {step['epoch']})"
    if what == "evicted":
        return f"evicted from the KV cache of {step['on']}"
    if what == "told_to_end":
        return f"told to end as {step['outcome']}" + (f": {step['error']}" if step["error"] else "")
    if what == "ended":
        return f"ended: {step['outcome']}"
    if what == "changed":
        return f"by {step['cause'].replace('_', ' ')}"
    return str(what.replace("_", " "))


def _seconds(value_s: float | None) -> str:
    return "-" if value_s is None else seconds_text(value_s)
