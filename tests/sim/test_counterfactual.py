"""A recorded scenario as the simulator plays it, and the recorded figures beside it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from spotserve.core import events as ev
from spotserve.core.controller import Entry
from spotserve.core.recorded import RecordedScenario, recorded_scenario
from spotserve.core.spec import DeviceProfile
from spotserve.errors import SpotServeError
from spotserve.sim.counterfactual import (
    paced,
    recorded_line,
    recorded_tpot_s,
    scenario_of_record,
    under,
)
from tests.golden_journals.reading import entries_of


@pytest.fixture(scope="module")
def entries() -> list[Entry]:
    """A night with a kill and a request that timed out."""
    return entries_of("v1-kill")


@pytest.fixture(scope="module")
def record(entries: list[Entry]) -> RecordedScenario:
    """What it recorded."""
    return recorded_scenario(entries)


def test_scenario_has_the_recorded_machines_and_requests(record: RecordedScenario) -> None:
    """Tests that capacity, memory, start-up and requests are those of the journal."""
    scenario = scenario_of_record(record, name="night", policies=("live", "reroute"))
    assert (record.trace, record.spec, record.duration_s) == (scenario.trace, scenario.spec, scenario.duration_s)
    assert (1, 6 * 1024 * 1024) == (scenario.hardware.gpus_per_instance, scenario.hardware.gpu_memory_bytes)
    assert 0.1 < scenario.hardware.start_s < 1.0
    played = [(one.at_s, one.prompt_tokens, one.output_tokens) for one in scenario.workload.arrivals]
    assert played == [(one.at_s, one.prompt_tokens, sum(one.output_tokens or ())) for one in record.requests]


def test_a_fleet_of_two_types_keeps_them(record: RecordedScenario) -> None:
    """Tests that each type's memory, price and times are its own, in the bill, and when iterations are slowed down."""
    profile = record.spec.profile
    device = DeviceProfile(type="slow", latencies=profile.latencies, price_per_hour=3.0)
    spec = record.spec.model_copy(
        update={"profile": profile.model_copy(update={"devices": (device,), "price_per_hour": 1.0})}
    )
    first, *others = record.instances
    slow = replace(first, gpu_type="slow", num_gpus=2, memory_bytes=5 * 1024 * 1024)
    mixed = replace(record, spec=spec, instances=(slow, *others))
    scenario = scenario_of_record(mixed, name="night", policies=("live",))
    assert {"slow": (2, 5 * 1024 * 1024, 6.0)} == {
        name: (one.gpus_per_instance, one.gpu_memory_bytes, one.spot_usd_per_hour)
        for name, one in scenario.hardware.types.items()
    }
    assert (1, 6 * 1024 * 1024, 1.0) == (
        scenario.hardware.gpus_per_instance,
        scenario.hardware.gpu_memory_bytes,
        scenario.hardware.spot_usd_per_hour,
    )
    assert recorded_line(mixed).usd > recorded_line(mixed).instance_hours
    (slowed,) = paced(scenario, 2.0).spec.profile.devices
    assert [2 * point.layer_ms for point in device.latencies] == [point.layer_ms for point in slowed.latencies]


def test_choices_and_open_requests_are_played_and_said(record: RecordedScenario) -> None:
    """Tests that each choice is a request of its own, an open one gets what it asked for, and notes say both."""
    first, second, *_ = record.requests
    changed = replace(
        record,
        requests=(
            replace(first, num_choices=2, output_tokens=(5, 7)),
            replace(second, output_tokens=None, ended_at_s=None, outcome=None),
        ),
    )
    workload = scenario_of_record(changed, name="night", policies=("live",)).workload
    assert [5, 7, second.max_tokens] == [one.output_tokens for one in workload.arrivals]
    assert 2 == len(workload.notes)


def test_what_cannot_be_simulated_is_told(record: RecordedScenario) -> None:
    """Tests that endless journals, a billion choices and huge instances are refused before they cost much."""
    with pytest.raises(SpotServeError, match=r"lasts 1e\+300 s, more than"):
        scenario_of_record(replace(record, duration_s=1e300), name="night", policies=("live",))
    hostile = replace(record.requests[0], num_choices=10**18, output_tokens=None)
    with pytest.raises(SpotServeError, match="1000000000000000000 requests, more than"):
        scenario_of_record(replace(record, requests=(hostile,)), name="night", policies=("live",))
    huge = replace(record.instances[0], num_gpus=1000)
    with pytest.raises(SpotServeError, match="cannot be simulated: gpus_per_instance: "):
        scenario_of_record(replace(record, instances=(huge,)), name="night", policies=("live",))


def test_recorded_figures_are_those_of_the_events(entries: list[Entry], record: RecordedScenario) -> None:
    """Tests that requests, tokens, latencies and instance hours are what one counts by hand."""
    line = recorded_line(record)
    arrivals = {e.event.request: e.event.at_s for e in entries if isinstance(e.event, ev.RequestAccepted)}
    ends = [e.event for e in entries if isinstance(e.event, ev.RequestEnded)]
    assert (7, 6, 0) == (line.requests, line.finished, line.open)
    assert line.tokens == sum(sum(end.tokens) for end in ends)
    latencies = sorted(end.at_s - arrivals[end.request] for end in ends)
    assert line.latency_s.max == pytest.approx(latencies[-1], abs=1e-6)
    assert line.latency_s.p50 == pytest.approx(latencies[3], abs=1e-6)
    stalls = [e.event.stall_ms for e in entries if isinstance(e.event, ev.FirstToken)]
    assert line.longest_stall_s == pytest.approx(max(stalls) / 1000, abs=1e-6)
    begun, ended = entries[0].event.at_s, entries[-1].event.at_s
    lost = next(e.event.at_s for e in entries if isinstance(e.event, ev.InstanceLost))
    wanted = next(e.event.at_s for e in entries if isinstance(e.event, ev.InstanceWanted))
    hours = (3 * (ended - begun) + (lost - begun) + (ended - wanted)) / 3600
    assert line.instance_hours == pytest.approx(hours, abs=1e-6)
    assert (False, line.instance_hours) == (line.is_priced, line.usd)
    priced = record.spec.profile.model_copy(update={"price_per_hour": 0.5})
    dollars = recorded_line(replace(record, spec=record.spec.model_copy(update={"profile": priced})))
    assert (True, pytest.approx(hours / 2, abs=1e-6)) == (dollars.is_priced, dollars.usd)


def test_pace_is_that_of_the_least_disturbed(record: RecordedScenario) -> None:
    """Tests that the recorded pace is a lower quartile of seconds per token, and none without a finished request."""
    paces = sorted(
        (one.ended_at_s - one.first_token_at_s) / (sum(one.output_tokens) - 1)
        for one in record.requests
        if one.outcome == "finished" and one.ended_at_s and one.first_token_at_s and one.output_tokens
    )
    assert paces[1] == recorded_tpot_s(record)
    assert recorded_tpot_s(replace(record, requests=())) is None


def test_paced_scenario_takes_so_many_times_as_long(record: RecordedScenario) -> None:
    """Tests that a pace multiplies every iteration's time, and nothing of the network or the trace."""
    scenario = scenario_of_record(record, name="night", policies=("live",))
    slower = paced(scenario, 3.0)
    before, after = scenario.spec.profile, slower.spec.profile
    assert [3.0 * point.layer_ms for point in before.latencies] == [point.layer_ms for point in after.latencies]
    assert 3.0 * before.stage_overhead_ms == after.stage_overhead_ms
    assert (before.link_bytes_per_s, scenario.trace) == (after.link_bytes_per_s, slower.trace)
    assert "3 times" in slower.workload.notes[-1]


def test_chosen_solvers_are_those_of_the_recorded_policy_alone(record: RecordedScenario) -> None:
    """Tests that a solver that was chosen for the daemon stays with its policy, and another policy has its own."""
    spec = record.spec.model_copy(update={"solvers": {"place": "reuse"}})
    scenario = scenario_of_record(replace(record, spec=spec), name="night", policies=("live", "reroute"))
    assert {"place": "reuse"} == under(scenario, "live").spec.solvers
    assert {} == under(scenario, "reroute").spec.solvers
