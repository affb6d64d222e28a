"""Plan runs that were executed, as text: the list, and one of them with estimated beside measured."""

from __future__ import annotations

from spotserve.core.plan_text.table import (
    Json,
    columns,
    count_text,
    cut,
    printable,
    runs_text,
    seconds_text,
    section,
    size_text,
)

WHO_WIDTH = 30
UNFINISHED = {
    "not_started": "never started",
    "running": "never answered",
    "late": "given up before the deadline",
    "forgiven": "its worker or its replica was lost after the commit",
}
"""Outcomes of steps in words."""


def runs_table(answer: Json) -> str:
    """One row for a run: phases are seconds after it began."""
    answer = printable(answer)
    if not answer["runs"]:
        return "no plan was run\n"
    rows = [
        (
            run["number"],
            run["epoch"],
            _trigger(run),
            run["mode"],
            f"{run['phases']['begun']:.3f} s",
            *(_after(run, phase) for phase in ("quiesced", "durable", "committed")),
            _end(run),
            run["outcome"] + (f" ({run['abort_reason']})" if run["abort_reason"] else ""),
        )
        for run in answer["runs"]
    ]
    titles = ("MIGRATION", "EPOCH", "TRIGGER", "MODE", "BEGUN", "QUIESCED", "DURABLE", "COMMITTED", "ENDED", "OUTCOME")
    return columns(titles, rows) + "\n"


def _trigger(run: Json) -> str:
    return cut(" ".join([run["trigger"]["kind"], runs_text(run["trigger"]["instances"])]).strip(), WHO_WIDTH)


def _after(run: Json, phase: str) -> str:
    """`+12.0 ms` after the run began."""
    if phase not in run["phases"]:
        return "-"
    return f"+{seconds_text(run['phases'][phase] - run['phases']['begun'])}"


def _end(run: Json) -> str:
    return _after(run, "released" if "released" in run["phases"] else "aborted")


def report_text(report: Json) -> str:
    """One run: headline, totals, steps, and what was not carried out."""
    report = printable(report)
    name = f"migration {report['number']}" if report["number"] else "first placement"
    ended = f" after {_end(report)[1:]}" if _end(report) != "-" else ""
    reason = f": {report['abort_reason']}" if report["abort_reason"] else ""
    head = f"{name}  epoch {report['epoch']}  {_trigger(report)}  mode {report['mode']}  "
    head += f"{report['outcome']}{ended}{reason}"
    parts = [
        head,
        section("Totals", _totals_table(report["totals"])),
        section("Steps", _step_table(report)),
        section("Not carried out", _unfinished(report)),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _totals_table(totals: Json) -> str:
    rows = [
        (name, seconds_text(pair["estimated"]), _seconds(pair["measured"]), _ratio(pair["ratio"]))
        for name, pair in (("copy", totals["copy_s"]), ("stall", totals["stall_s"]), ("done", totals["done_s"]))
    ]
    rows += [
        (name, size_text(pair["estimated"]), size_text(pair["measured"]), _ratio(pair["ratio"]))
        for name, pair in (("weights", totals["weight_bytes"]), ("kv", totals["kv_bytes"]))
    ]
    text = columns(("WHAT", "ESTIMATED", "MEASURED", "RATIO"), rows)
    if totals["stall_ms_max"] is None:
        return text
    wait = f"longest wait of a stream {totals['stall_ms_max']:.1f} ms"
    return f"{text}\n{wait}, {count_text(totals['recomputed_tokens'], 'token')} recomputed"


def _step_table(report: Json) -> str:
    rows = [
        (
            step["step"],
            step["kind"],
            _who(step),
            "-" if step["began_s"] is None else f"+{seconds_text(step['began_s'])}",
            seconds_text(step["estimated_s"]),
            _seconds(step["measured_s"]),
            _ratio(step["ratio"]),
            _size(step["estimated_bytes"]),
            _size(step["moved_bytes"]),
            step["outcome"],
        )
        for step in report["steps"]
    ]
    titles = ("STEP", "KIND", "WHO", "BEGAN", "ESTIMATED", "MEASURED", "RATIO", "BYTES", "MOVED", "OUTCOME")
    return columns(titles, rows)


def _who(step: Json) -> str:
    if step["kind"].startswith("copy"):
        return " -> ".join(step["workers"])
    return cut(runs_text(step["workers"]), WHO_WIDTH) or "-"


def _unfinished(report: Json) -> str:
    """Steps that never came to an end, and why where it is known."""
    lines = [
        f"{step['step']} {step['kind']}: {UNFINISHED.get(step['outcome'], step['outcome'])}"
        + (f": {step['error']}" if step["error"] else "")
        for step in report["steps"]
        if step["outcome"] != "done"
    ]
    if not lines:
        return ""
    return "\n".join([count_text(len(lines), "step"), *lines])


def _seconds(value_s: float | None) -> str:
    return "-" if value_s is None else seconds_text(value_s)


def _size(value: int | None) -> str:
    return "-" if value is None else size_text(value)


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
