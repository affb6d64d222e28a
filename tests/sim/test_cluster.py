"""The simulated cluster: every request ends, the same scenario is the same run, jumps change nothing, bills fit."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from spotserve.cli.scenario_file import trace_of
from spotserve.core.events import WorkerRegistered
from spotserve.core.spec import DeviceProfile
from spotserve.core.trace import Trace, TraceEvent, instance_counts
from spotserve.sim.hardware import OtherMachine
from spotserve.sim.measures import RunResult
from spotserve.sim.scenario import ONDEMAND, Scenario, TraceChoice
from spotserve.sim.simulation import simulate
from spotserve.solvers.planner import make_plan
from tests.sim.scenes import MIB, Entries, event, four_instances, small_scenario

CHECKOUT = Path(__file__).resolve().parents[2]
POLICIES = ("live", "reroute", "reparallelize", ONDEMAND)


def eventful() -> Trace:
    """Notice, addition, loss without notice, addition: within a minute."""
    later = (
        event(10, "notice", "i1", grace_s=5.0),
        event(25, "add", "i4"),
        event(32, "kill", "i0"),
        event(40, "add", "i5"),
    )
    return four_instances(*later, end_s=60.0)


def without_digest(result: RunResult) -> RunResult:
    """What a run was like, but for the last digits of its moments."""
    return result.model_copy(update={"journal_digest": ""})


@pytest.mark.parametrize("policy", POLICIES)
def test_every_request_ends(policy: str) -> None:
    """Tests that under every policy all requests finish, none is lost, and all their tokens came."""
    scenario = small_scenario(eventful())
    result = simulate(scenario, policy, make_plan)
    requests = result.requests
    assert len(scenario.workload.arrivals) == requests.accepted == requests.finished
    assert (0, 0, 0) == (requests.failed, requests.open, requests.lost)
    assert 40 * requests.accepted == result.tokens
    assert (policy == ONDEMAND) == (not result.migrations)


def test_what_cannot_be_served_stays_open() -> None:
    """Tests that requests that nobody can serve are counted as open with the time they waited, not dropped."""
    nobody = four_instances(event(5, "kill", "i0", "i1", "i2", "i3"), end_s=20.0)
    result = simulate(small_scenario(nobody, rate_rps=20.0, drain_s=10.0), "live", make_plan)
    requests = result.requests
    assert requests.open > 0
    assert 0 == requests.lost
    assert requests.accepted == requests.finished + requests.open
    assert result.latency_s.max > 20
    assert result.slo_share < 1
    assert result.stall_s.max > 20
    assert "degraded" == result.timeline[-1].service


@pytest.mark.parametrize(("memory_mib", "pipelines"), [(6, {"2"}), (4, {"1", "2", "3"})])
@pytest.mark.parametrize("policy", ["live", "reparallelize"])
def test_jumps_change_nothing(memory_mib: int, pipelines: set[str], policy: str) -> None:
    """Tests that many rounds in one event give the same latencies, states, layouts and plans as one each."""
    scenario = small_scenario(eventful(), memory_bytes=memory_mib * MIB)
    jumped, stepped = Entries(), Entries()
    with_jumps = simulate(scenario, policy, make_plan, journal=jumped)
    without = simulate(scenario, policy, make_plan, journal=stepped, jumps=False)
    assert without_digest(without) == without_digest(with_jumps)
    plans = [
        [entry.event.plan.target for entry in entries.kept if entry.event.kind == "plan_ready"]
        for entries in (jumped, stepped)
    ]
    assert plans[0]
    assert plans[1] == plans[0]
    used = {str(replica.pipeline) for target in plans[0] for replica in target.replicas}
    assert used & pipelines, "the scenario has no pipeline of the kind it is for"


@pytest.mark.thorough
def test_the_same_run_in_every_process() -> None:
    """Tests that this process and two of other hash seeds write the same journal, byte by byte."""
    script = (
        "from tests.sim.test_cluster import eventful;"
        "from tests.sim.scenes import small_scenario;"
        "from spotserve.sim.simulation import simulate;"
        "from spotserve.solvers.planner import make_plan;"
        "print(simulate(small_scenario(eventful()), 'live', make_plan).journal_digest)"
    )
    running = [
        subprocess.Popen(
            [sys.executable, "-c", script],
            cwd=CHECKOUT,
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
            stdout=subprocess.PIPE,
            text=True,
        )
        for hash_seed in ("1", "4242")
    ]
    digests = {process.communicate()[0].strip() for process in running}
    assert 1 == len(digests)
    assert simulate(small_scenario(eventful()), "live", make_plan).journal_digest == digests.pop()


def test_another_seed_is_another_run() -> None:
    """Tests that the digest is of what happened: other arrivals, another digest."""
    digests = {simulate(small_scenario(eventful(), seed=seed), "live", make_plan).journal_digest for seed in (0, 1)}
    assert 2 == len(digests)


def test_a_journal_is_told_of_everything() -> None:
    """Tests that a journal that listens gets every request and every end, and changes nothing of the run."""
    scenario = small_scenario(eventful())
    entries = Entries()
    heard = simulate(scenario, "live", make_plan, journal=entries)
    kinds = [entry.event.kind for entry in entries.kept]
    assert heard.requests.accepted == kinds.count("request_accepted") == kinds.count("request_ended")
    assert simulate(scenario, "live", make_plan) == heard


def test_progress_goes_forward() -> None:
    """Tests that whoever watches is told rising times, up to the last minute of the scenario."""
    times: list[float] = []
    simulate(small_scenario(eventful()), "live", make_plan, progress=times.append)
    assert sorted(set(times)) == times
    assert times[-1] > 50


COUNTS = {
    "A_S": (((0, 7), (240, 8), (360, 10), (600, 9), (900, 10), (1200, 8)), 1320.0, 203, 6.444),
    "B_S": (((0, 10), (120, 8), (240, 7), (720, 8), (960, 9)), 1020.0, 137, 4.349),
}
"""Of the SpotServe paper: instance counts, the end, billed instance-minutes, USD."""


def counted(name: str) -> Scenario:
    """The paper's trace with the paper's prices and start-up, and hardly any traffic."""
    counts, end_s, _, _ = COUNTS[name]
    events: list[TraceEvent] = []
    living: list[str] = []
    number = 0
    for at_s, count in counts:
        if count > len(living):
            names = [f"i{number + index}" for index in range(count - len(living))]
            number += len(names)
            living += names
            events.append(event(at_s, "add", *names))
        else:
            gone, living = living[: len(living) - count], living[len(living) - count :]
            events.append(event(at_s - 30, "notice", *gone, grace_s=30.0))
    scenario = small_scenario(Trace(name=name, events=tuple(events), end_s=end_s), rate_rps=0.05)
    hardware = scenario.hardware.model_copy(
        update={"start_s": 120.0, "spot_usd_per_hour": 1.9046, "ondemand_usd_per_hour": 3.912}
    )
    return replace(scenario, hardware=hardware)


@pytest.mark.parametrize("name", COUNTS)
def test_the_bill_is_the_papers(name: str) -> None:
    """Tests that A_S costs 203 instance-minutes and B_S 137: start-ups of two minutes are paid for (section 6.2)."""
    _, _, minutes, usd = COUNTS[name]
    cost = simulate(counted(name), "live", make_plan).cost
    assert pytest.approx(minutes / 60, abs=1e-4) == cost.instance_hours
    assert pytest.approx(usd, abs=1e-3) == cost.usd


@pytest.mark.parametrize(("name", "file"), [("A_S", "trace_0304_real.txt"), ("B_S", "trace_0506_real.txt")])
def test_the_published_files_have_that_bill(shared_data: Path, name: str, file: str) -> None:
    """Tests that the paper's own files, ready 30 s after they act, have its instance counts and its bill."""
    path = shared_data / "spotserve-paper" / "traces" / "availability" / file
    trace = trace_of(TraceChoice(file=str(path), ready_after_s=30.0), Path())
    counts, end_s, minutes, usd = COUNTS[name]
    assert counts == instance_counts(trace)
    played = replace(counted(name), trace=trace)
    assert end_s == played.duration_s
    cost = simulate(played, "live", make_plan).cost
    assert pytest.approx(minutes / 60, abs=1e-4) == cost.instance_hours
    assert pytest.approx(usd, abs=1e-3) == cost.usd


def test_an_on_demand_instance_of_the_beginning_is_paid_as_such() -> None:
    """Tests that the market of an instance that is there at 0 is the trace's, like that of a later one."""
    bought = [event(0, "add", "i0", "i1"), event(0, "add", "i2"), event(0, "add", "i3"), event(20, "add", "i4")]
    bought[1] = bought[1].model_copy(update={"market": "ondemand"})
    scenario = small_scenario(Trace(name="mixed", events=tuple(bought), end_s=60.0))
    cost = simulate(scenario, "live", make_plan).cost
    assert pytest.approx((3 * 60 + 45) / 3600 * 1.0 + 60 / 3600 * 3.0, abs=1e-5) == cost.usd


def test_zones_that_begin_empty(shared_data: Path) -> None:
    """Tests that published counts of zones are played: nothing is there at first, then some, and all requests end."""
    folder = shared_data / "skypilot-spot-traces" / "availability" / "1-node" / "aws-02-15-2023"
    zones = tuple(str(folder / f"{zone}_v100_1.json") for zone in ("us-east-1a", "us-east-2a"))
    choice = TraceChoice(zones=zones, instances_per_node=4, start_s=1200.0, stop_s=2500.0)
    scenario = small_scenario(trace_of(choice, Path()), rate_rps=0.5)
    assert 0 == instance_counts(scenario.trace)[0][1]
    result = simulate(scenario, "live", make_plan)
    assert result.requests.accepted == result.requests.finished > 0
    assert "provisioning" == result.timeline[0].service


def test_on_demand_instances_have_their_own_price() -> None:
    """Tests that the policy ondemand rents what it is told to for the whole time, at the on-demand price."""
    scenario = small_scenario(eventful())
    cost = simulate(scenario, ONDEMAND, make_plan).cost
    assert pytest.approx(4 / 60, abs=1e-6) == cost.instance_hours
    assert pytest.approx(4 / 60 * 3.0, abs=1e-5) == cost.usd


def two_types(*slow: str, later: tuple[TraceEvent, ...] = ()) -> Scenario:
    """Four instances for a minute, of which the `slow` ones have two GPUs that take three times as long."""
    bought = [event(0, "add", f"i{index}") for index in range(4)]
    events = [
        one.model_copy(update={"gpu_type": "slow"}) if one.kind == "add" and one.instances[0] in slow else one
        for one in (*bought, *later)
    ]
    scenario = small_scenario(Trace(name="two types", events=tuple(events), end_s=60.0), rate_rps=1.0)
    profile = scenario.spec.profile
    times = tuple(point.model_copy(update={"layer_ms": 3 * point.layer_ms}) for point in profile.latencies)
    devices = (DeviceProfile(type="slow", latencies=times),)
    machine = OtherMachine(
        gpus_per_instance=2, gpu_memory_bytes=7 * MIB, spot_usd_per_hour=1.5, ondemand_usd_per_hour=4.0
    )
    return replace(
        scenario,
        spec=scenario.spec.model_copy(update={"profile": profile.model_copy(update={"devices": devices})}),
        hardware=scenario.hardware.model_copy(update={"types": {"slow": machine}}),
    )


@pytest.mark.parametrize("policy", ["live", "reroute", "reparallelize"])
def test_gpus_of_two_types(policy: str) -> None:
    """Tests that instances register what their type has, layers go by the types' speed, and each has its price."""
    later = (event(10, "kill", "i0"), event(12, "notice", "i1", grace_s=8.0), event(30, "add", "i4"))
    scenario = two_types("i0", "i1", "i4", later=later)
    journal = Entries()
    result = simulate(scenario, policy, make_plan, journal=journal)
    registered = [entry.event for entry in journal.kept if isinstance(entry.event, WorkerRegistered)]
    own, slow = ("", 1, 6 * MIB), ("slow", 2, 7 * MIB)
    assert {"i0": slow, "i1": slow, "i2": own, "i3": own, "i4": slow} == {
        one.instance: (one.gpu_type, one.num_gpus, one.memory_bytes) for one in registered
    }
    assert result.requests.accepted == result.requests.finished > 0
    assert (3, 4) == (result.timeline[-1].instances, result.timeline[-1].gpus_there)
    assert pytest.approx((2 * 60 * 1.0 + (10 + 20 + 35) * 1.5) / 3600, abs=1e-5) == result.cost.usd


def test_a_slower_type_takes_its_own_time() -> None:
    """Tests that a fleet of a type that is three times as slow takes three times as long for a token."""
    own = simulate(two_types(), "live", make_plan)
    slow = simulate(two_types("i0", "i1", "i2", "i3"), "live", make_plan)
    assert 2.0 < slow.tpot_s.p50 / own.tpot_s.p50 < 3.5
