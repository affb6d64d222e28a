"""What another policy would have done with what a daemon lived through: in dollars, latencies and stalls."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from spotserve.core.controller import Entry
from spotserve.core.plan_text.table import columns, printable, seconds_text
from spotserve.core.recorded import recorded_scenario
from spotserve.core.replay import moments
from spotserve.core.state import ClusterState
from spotserve.errors import SpotServeError
from spotserve.sim.comparison import compared
from spotserve.sim.counterfactual import paced, recorded_line, recorded_tpot_s, scenario_of_record, under
from spotserve.sim.measures import RunResult
from spotserve.sim.scenario import Scenario

FORMAT_VERSION = "0.1"
LEAST_PACE, MOST_PACE = 0.9, 1.1
"""A profile that is so near the recorded pace is left as it is."""

Json = dict[str, Any]
"""Plain JSON data, hence `Any`."""


def counterfactual(
    base: ClusterState, entries: Iterable[Entry], *, recorded: str, wanted: str, until_s: float | None, name: str
) -> Json:
    """Play a journal's capacity and requests under its own policy and under another.

    Args:
        base: the fold of all before the first entry.
        entries: of the journal, in order.
        recorded: the policy that decided it.
        wanted: the other one.
        until_s: what came later is left out.
        name: what to call the scenario.

    Raises SpotServeError if there is nothing to play, StateDirError for an entry that cannot follow.
    """
    # Folded on the way, as only a journal that folds is worth playing.
    record = recorded_scenario(
        (moment.entry for moment in moments(base, entries, until_s=until_s)), base=base if base.spec else None
    )
    if not record.requests or not record.gpu_memory_bytes or record.duration_s <= 0:
        raise SpotServeError("the journal has no request, or no instance that came up: there is nothing to play")
    scenario = scenario_of_record(record, name=name, policies=(recorded, wanted))
    first = _played(scenario, recorded)
    pace, recorded_pace_s = 1.0, recorded_tpot_s(record)
    if recorded_pace_s and first.tpot_s.p50:
        pace = recorded_pace_s / first.tpot_s.p50
    if not LEAST_PACE <= pace <= MOST_PACE:
        scenario = paced(scenario, pace)
        first = _played(scenario, recorded)
    runs = [first, _played(scenario, wanted)]
    return {
        "format_version": FORMAT_VERSION,
        "policy": wanted,
        "recorded_policy": recorded,
        "until_s": until_s,
        "recorded": recorded_line(record).model_dump(mode="json"),
        "pace": pace,
        "simulated": compared(scenario, runs).model_dump(mode="json"),
    }


def _played(scenario: Scenario, policy: str) -> RunResult:
    """One run."""
    # OR-Tools takes a second to import.
    from spotserve.cli.simulation_progress import simulation_progress
    from spotserve.sim.simulation import simulate
    from spotserve.solvers.planner import make_plan

    with simulation_progress() as show:
        return simulate(
            under(scenario, policy),
            policy,
            make_plan,
            progress=lambda at_s: show(policy, at_s, scenario.duration_s),
        )


def counterfactual_text(report: Json) -> str:
    """The recorded figures, the same policy simulated, and the other one; every figure comes from the JSON."""
    report = printable(report)
    recorded, simulated = report["recorded"], report["simulated"]
    facts = simulated["scenario"]
    money = "USD" if recorded["is_priced"] else "COST"
    rows = [_recorded_row(recorded), *(_simulated_row(line) for line in simulated["policies"])]
    titles = (
        "POLICY",
        "P50",
        "P99",
        "TTFT P99",
        "LONGEST STALL",
        money,
        f"{money}/M TOKENS",
        "OPEN",
        "P99 x",
        "COST x",
    )
    notes = [*facts["trace_notes"], *facts["workload_notes"]]
    if not recorded["is_priced"]:
        notes.append("the profile has no price: a GPU-hour counts as 1")
    notes.append(f"x: over {report['recorded_policy']} simulated; the recorded line shows what the model is worth")
    head = f"{facts['name']}: {facts['num_requests']} requests in {seconds_text(facts['duration_s'])}"
    return "\n".join([head, "", columns(titles, rows), *notes]) + "\n"


def _recorded_row(line: Json) -> tuple[object, ...]:
    return (
        f"{line['policy']}, recorded",
        seconds_text(line["latency_s"]["p50"]),
        seconds_text(line["latency_s"]["p99"]),
        seconds_text(line["ttft_s"]["p99"]),
        seconds_text(line["longest_stall_s"]),
        f"{line['usd']:.4g}",
        _figure(line["usd_per_million_tokens"]),
        line["open"],
        "-",
        "-",
    )


def _simulated_row(line: Json) -> tuple[object, ...]:
    return (
        f"{line['policy']}, simulated",
        *(seconds_text(line[name]) for name in ("latency_p50_s", "latency_p99_s", "ttft_p99_s", "longest_stall_s")),
        f"{line['usd']:.4g}",
        _figure(line["usd_per_million_tokens"]),
        line["open"],
        _figure(line["p99_ratio"]),
        _figure(line["cost_ratio"]),
    )


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
