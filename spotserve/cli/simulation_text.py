"""A comparison of policies for a person: what was simulated, one line per policy, and their migrations."""

from __future__ import annotations

from textwrap import wrap
from typing import Any

from spotserve.core.plan_text.table import columns, count_text, printable, seconds_text, section, size_text

Json = dict[str, Any]
"""Plain JSON data, hence `Any`."""

NAME_WIDTH = 13
FACT_WIDTH = 105
MOST_MIGRATIONS = 12
"""Of a run, that are told one by one; `--format json` has all of them in any case."""

TITLES = (
    *("POLICY", "P50", "P99", "TTFT P99", "TPOT P99", "STALL", "GOODPUT", "SLO", "USD", "USD/M TOK", "RECOMPUTED"),
    *("MIGRATIONS", "OPEN", "LOST", "P99 x", "COST x"),
)
MIGRATION_TITLES = (
    *("BEGUN", "EPOCH", "TRIGGER", "MODE", "OUTCOME"),
    *("LAYOUT AFTER", "STALL", "WEIGHTS", "KV", "RECOMPUTED"),
)


def simulation_text(comparison: Json) -> str:
    """The whole answer; every figure in it comes from the JSON."""
    comparison = printable(comparison)
    parts = [
        facts_text(comparison),
        policies_table(comparison),
        footnote(comparison),
        *(section(title, body) for title, body in migration_tables(comparison)),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def seeds_of(comparison: Json) -> list[int]:
    """The seeds of all runs, in order."""
    return sorted({run["seed"] for run in comparison["runs"]})


def facts_text(comparison: Json) -> str:
    """What was simulated and where it comes from, every scaling with it."""
    facts = comparison["scenario"]
    seeds = seeds_of(comparison)
    drawn = f"seed {seeds[0]}" if len(seeds) == 1 else f"seeds {', '.join(str(seed) for seed in seeds)}"
    rows = [
        ("model", facts["model"]),
        ("profile", facts["profile"]),
        ("", facts["profile_source"]),
        ("instances", hardware_text(facts)),
        *(("", type_text(name, machine)) for name, machine in facts["hardware"].get("types", {}).items()),
        ("trace", facts["trace"]),
        ("", facts["trace_source"]),
        *(("", note) for note in facts["trace_notes"]),
        ("workload", facts["workload"]),
        ("", facts["workload_source"]),
        *(("", note) for note in facts["workload_notes"]),
        ("requests", requests_text(facts) + ("" if len(seeds) < 2 else f"; all of this under seed {seeds[0]}")),
        ("served well", slo_text(facts["slo"])),
    ]
    lines = [line for name, told in rows if told for line in _fact_lines(name, told)]
    return "\n".join([f"{facts['name']}: {span_text(facts['duration_s'])}, {drawn}", *lines])


def _fact_lines(name: str, told: str) -> list[str]:
    """A fact in lines that a page has room for, its name before the first."""
    lines = wrap(told, FACT_WIDTH, break_on_hyphens=False)
    return [f"{name if not index else '':<{NAME_WIDTH}}{line}" for index, line in enumerate(lines)]


def span_text(duration_s: float) -> str:
    """`22 min`, `1 h 30 min`, `45 s`."""
    whole = round(duration_s)
    hours, minutes, rest = whole // 3600, whole % 3600 // 60, whole % 60
    parts = [f"{hours} h" if hours else "", f"{minutes} min" if minutes else "", f"{rest} s" if rest else ""]
    return " ".join(part for part in parts if part) or "0 s"


def hardware_text(facts: Json) -> str:
    """GPUs, memory, start-up and prices of an instance."""
    hardware = facts["hardware"]
    gpus = count_text(hardware["gpus_per_instance"], "GPU")
    ondemand = facts["ondemand_instances"]
    fleet = f"; policy ondemand keeps {ondemand} on-demand ones instead" if ondemand is not None else ""
    return (
        f"{gpus} of {size_text(hardware['gpu_memory_bytes'])}, up after {hardware['start_s']:g} s,"
        f" {_prices_text(hardware)}{fleet}"
    )


def type_text(name: str, machine: Json) -> str:
    """The same of another GPU type."""
    gpus = count_text(machine["gpus_per_instance"], "GPU")
    return f"{name}: {gpus} of {size_text(machine['gpu_memory_bytes'])}, {_prices_text(machine)}"


def _prices_text(machine: Json) -> str:
    return f"{machine['spot_usd_per_hour']:g} USD/h spot, {machine['ondemand_usd_per_hour']:g} on demand"


def requests_text(facts: Json) -> str:
    """How many and how fast."""
    return f"{facts['num_requests']}, {facts['mean_rps']:.3g} per second; {facts['drain_s']:g} s more to end in"


def slo_text(slo: Json) -> str:
    """What counts for goodput."""
    words = (("ttft_s", "first token"), ("tpot_s", "each further token"), ("latency_s", "answer"))
    told = [f"{name} within {seconds_text(slo[key])}" for key, name in words if slo[key] is not None]
    return ", ".join(told) or "a request that is answered"


def policies_table(comparison: Json) -> str:
    """One row per policy."""
    return columns(TITLES, [_policy_row(line) for line in comparison["policies"]])


def _policy_row(line: Json) -> tuple[object, ...]:
    per_million = line["usd_per_million_tokens"]
    return (
        line["policy"],
        *(f"{line[key]:.2f} s" for key in ("latency_p50_s", "latency_p99_s", "ttft_p99_s")),
        seconds_text(line["tpot_p99_s"]),
        seconds_text(line["longest_stall_s"]),
        f"{line['goodput_rps']:.3g}/s",
        f"{100 * line['slo_share']:.1f} %",
        f"{line['usd']:.2f}",
        "-" if per_million is None else f"{per_million:.4g}",
        f"{line['recomputed_tokens']:g}",
        f"{line['migrations']:g}",
        line["open"],
        line["lost"],
        _ratio(line["p99_ratio"]),
        _ratio(line["cost_ratio"]),
    )


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def footnote(comparison: Json) -> str:
    """What the columns mean."""
    lines = comparison["policies"]
    base = lines[0]["policy"] if lines else "none"
    text = (
        "P50, P99: latency from arrival to end. STALL: the longest gap between two tokens of an answer.\n"
        f"P99 x, COST x: latency P99 and USD per million tokens over those of {base}."
    )
    if len(seeds_of(comparison)) > 1:
        text += " Each figure is the median of the seeds; OPEN and LOST are the worst of them."
    if any(line["open"] for line in lines):
        text += "\nOPEN requests count in every figure with the time that they have waited."
    return text


def migration_tables(comparison: Json) -> list[tuple[str, str]]:
    """(title, table) of each policy's migrations under the first seed; where they are many, only how many."""
    seeds = seeds_of(comparison)
    tables = []
    for run in comparison["runs"]:
        if run["seed"] != seeds[0] or not run["migrations"]:
            continue
        if len(run["migrations"]) > MOST_MIGRATIONS:
            body = f"{len(run['migrations'])}, --format json has all of them"
        else:
            body = columns(MIGRATION_TITLES, [_migration_row(one, run) for one in run["migrations"]])
        tables.append((f"Migrations of {run['policy']}, seed {run['seed']}", body))
    return tables


def _migration_row(one: Json, run: Json) -> tuple[object, ...]:
    return (
        f"{one['at_s']:.2f} s",
        one["epoch"],
        one["trigger"],
        one["mode"],
        one["outcome"] or "under way",
        layout_after(one, run),
        seconds_text(one["stall_s_max"]),
        size_text(one["weight_bytes"]),
        size_text(one["kv_bytes"]),
        one["recomputed_tokens"],
    )


def layout_after(one: Json, run: Json) -> str:
    """The last layout that serves before the next migration begins."""
    later = [other["at_s"] for other in run["migrations"] if other["at_s"] > one["at_s"]]
    until_s = min(later, default=float("inf"))
    within = [moment["layout"] for moment in run["timeline"] if one["at_s"] <= moment["at_s"] < until_s]
    return within[-1] if within else "-"
