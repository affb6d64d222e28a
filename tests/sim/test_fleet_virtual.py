"""Instances that nobody needs are given back, and asked for again: the controller on a simulated cluster."""

from __future__ import annotations

from dataclasses import replace

import pytest

from spotserve.core.commands import KillInstance, LaunchInstance
from spotserve.core.fleet import HOLD_S, WATCH_S
from spotserve.core.state import GIVEN_BACK
from spotserve.core.trace import Trace
from spotserve.sim.measures import RunResult
from spotserve.sim.scenario import Scenario
from spotserve.sim.simulation import simulate
from spotserve.solvers.planner import make_plan
from tests.sim.scenes import Entries, event, four_instances, small_scenario

GONE_S = WATCH_S + 1.5 * HOLD_S
"""When idle instances have been given back."""
LONG_S = 2 * GONE_S


def scenario(trace: Trace, *, spare: int | None) -> Scenario:
    """A small scenario with one replica of two instances, and so many idle ones wanted."""
    made = small_scenario(trace, rate_rps=1.0)
    limits = made.spec.limits.model_copy(update={"spare_instances": spare, "data": 1, "pipeline": 2, "tensor": 1})
    return replace(made, spec=made.spec.model_copy(update={"limits": limits}))


def played(trace: Trace, *, spare: int | None) -> tuple[RunResult, list[tuple[float, str, str]]]:
    """The result, and (time, verb, instance) of every launch and every instance given back."""
    journal = Entries()
    result = simulate(scenario(trace, spare=spare), "live", make_plan, journal=journal)
    told = []
    for entry in journal.kept:
        for command in entry.commands:
            if isinstance(command, LaunchInstance):
                told.append((entry.event.at_s, "launch", command.instance))
            if isinstance(command, KillInstance) and command.reason == GIVEN_BACK:
                told.append((entry.event.at_s, "give back", command.instance))
    assert (0, 0) == (result.requests.open, result.requests.lost)
    assert result.requests.accepted == result.requests.finished
    return result, told


def test_idle_instances_go_after_a_while() -> None:
    """Tests that all but the wanted idle instances are given back once nothing changes for a while, and save money."""
    trace = four_instances(end_s=LONG_S)
    kept, nothing = played(trace, spare=None)
    saved, told = played(trace, spare=1)
    given = [(at_s, name) for at_s, verb, name in told if verb == "give back"]
    assert [verb for _, verb, _ in nothing] == ["launch"] * 4
    assert len(given) == 1
    assert WATCH_S <= given[0][0] < GONE_S
    assert saved.cost.usd < kept.cost.usd
    assert not saved.migrations, "an idle instance concerns nobody"


def test_a_spare_that_steps_in_is_replaced() -> None:
    """Tests that a preemption takes the idle instance at once, and that a given-back one is asked for in its place."""
    trace = four_instances(event(GONE_S, "notice", "i0", grace_s=20.0), end_s=LONG_S)
    result, told = played(trace, spare=1)
    launched = [(at_s, name) for at_s, verb, name in told if verb == "launch" and at_s > 1]
    assert [("notice", "completed")] == [(one.trigger, one.outcome) for one in result.migrations]
    assert [(GONE_S, "i4")] == launched


def test_an_offer_that_nobody_needs_is_declined() -> None:
    """Tests that an instance offered while enough wait is not launched, costs nothing and can be had later."""
    later = (
        event(GONE_S, "add", "i4"),
        event((GONE_S + HOLD_S / 2), "kill", "i0"),
        event(GONE_S + HOLD_S, "kill", "i1"),
    )
    result, told = played(four_instances(*later, end_s=2 * LONG_S), spare=0)
    at_s = {name: (round(when, 3), verb) for when, verb, name in told if when > 1}
    assert at_s["i4"] == (GONE_S - 5.0, "give back")
    asked_s = [when for when, verb, _ in told if when > GONE_S and verb == "launch"]
    assert [(GONE_S + HOLD_S / 2)] * 3 == pytest.approx(asked_s, abs=1), (
        "nothing fits one instance: all are asked for at once"
    )
    assert all(one.outcome == "completed" for one in result.migrations)


def test_without_the_option_everything_is_kept() -> None:
    """Tests that nobody gives back what a person rented unless they said so."""
    _, told = played(four_instances(event(20, "add", "i4"), end_s=LONG_S), spare=None)
    assert {verb for _, verb, _ in told} == {"launch"}


def test_what_a_layout_was_denied_is_kept_for_it() -> None:
    """Tests that idle instances stay while a preemption has left too few for the layout that was chosen freely."""
    made = small_scenario(four_instances(event(GONE_S, "notice", "i0", grace_s=20.0), end_s=LONG_S), rate_rps=1.0)
    limits = made.spec.limits.model_copy(update={"spare_instances": 0, "data": 2, "pipeline": 2, "tensor": 1})
    journal = Entries()
    pinned = replace(made, spec=made.spec.model_copy(update={"limits": limits}))
    result = simulate(pinned, "live", make_plan, journal=journal)
    killed = [one.reason for entry in journal.kept for one in entry.commands if isinstance(one, KillInstance)]
    assert {(4, "(2,2,1)"), (3, "(1,2,1)")} <= {(moment.instances, moment.layout) for moment in result.timeline}
    assert killed == ["deadline"], "the third instance waits for a fourth"


def test_freed_gpus_are_looked_at_again() -> None:
    """Tests that under a known load a plan made for a notice is followed by one for the GPUs that it left idle."""
    load = event(0, "load").model_copy(update={"rps": 1.0})
    trace = four_instances(event(20, "notice", "i0", grace_s=20.0), end_s=60.0)
    told = trace.model_copy(update={"events": (load, *trace.events)})
    asked = {}
    for name, played_trace in (("known", told), ("unknown", trace)):
        journal = Entries()
        made = scenario(played_trace, spare=None)
        simulate(made, "live", make_plan, journal=journal)
        asked[name] = [
            command.trigger.kind
            for entry in journal.kept
            for command in entry.commands
            if command.kind == "take_snapshot"
        ]
    assert asked["unknown"][:2] == ["start", "notice"]
    assert asked["known"].index("joined") == asked["known"].index("notice") + 1
    assert "joined" not in asked["unknown"][:2]
