"""What a machine's own durations do to a run: around an iteration, a request, a transfer."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from spotserve.core.batching import BatchItem, MicroBatch, SequenceKey
from spotserve.core.cost import PipelineShape, StageLoad
from spotserve.core.ids import RequestId
from spotserve.sim.durations import PipelineDurations
from spotserve.sim.scenario import Scenario
from spotserve.sim.simulation import simulate
from spotserve.solvers.planner import make_plan
from tests.sim.scenes import Entries, event, four_instances, small_scenario
from tests.specs import small_spec


def measured(scenario: Scenario, **seconds: float) -> Scenario:
    """The scenario on machines with these durations."""
    return replace(scenario, hardware=scenario.hardware.model_copy(update=seconds))


def a_notice() -> Scenario:
    """Four instances, one of which is taken."""
    return small_scenario(four_instances(event(15, "notice", "i0", grace_s=15), end_s=40))


@pytest.mark.parametrize("stages", [1, 3])
def test_an_iteration_is_more_than_its_layers(stages: int) -> None:
    """Tests that the leader's own work comes once to a pass, and that a micro-batch begins no sooner than its pace."""
    shape = PipelineShape(1, (StageLoad(2),) * stages)
    batch = MicroBatch(0, (BatchItem(SequenceKey(RequestId("q"), 0, 0), 0, 8, samples=True),))
    bare = PipelineDurations(small_spec(), shape)
    busy = PipelineDurations(small_spec(), shape, iteration_s=0.004)
    paced = PipelineDurations(small_spec(), shape, least_s=5.0)
    assert busy.pass_s(batch) == pytest.approx(bare.pass_s(batch) + 0.004)
    assert busy.stage_s(batch) == pytest.approx(bare.stage_s(batch) + 0.004)
    assert (5.0, bare.pass_s(batch)) == (paced.stage_s(batch), paced.pass_s(batch))


@pytest.mark.parametrize("least_s", [0.03, 0.5])
def test_paced_rounds_can_be_done_at_once(least_s: float) -> None:
    """Tests that where a replica waits for its pace many rounds in one event are the same as one each."""
    scenario = measured(a_notice(), least_iteration_s=least_s, iteration_s=0.002)
    runs = [simulate(scenario, "live", make_plan, jumps=jumps) for jumps in (True, False)]
    digests: dict[str, Any] = {"journal_digest": ""}
    assert runs[0].model_copy(update=digests) == runs[1].model_copy(update=digests)
    assert runs[0].tpot_s.p50 >= least_s * 0.99


def test_clients_wait_for_what_surrounds_a_request() -> None:
    """Tests that accepting comes before all else, and delivering to every token alike: gaps stay as they are."""
    bare = simulate(a_notice(), "live", make_plan)
    late = simulate(measured(a_notice(), deliver_s=2.0), "live", make_plan)
    assert late.ttft_s.p50 == pytest.approx(bare.ttft_s.p50 + 2.0)
    assert late.latency_s.max == pytest.approx(bare.latency_s.max + 2.0)
    assert (bare.tpot_s, bare.stall_s) == (late.tpot_s, late.stall_s)
    slow = simulate(measured(a_notice(), accept_s=3.0), "live", make_plan)
    assert slow.ttft_s.p50 >= bare.ttft_s.p50 + 2.5
    assert slow.requests.accepted == bare.requests.accepted


def test_a_transfer_is_more_than_its_bytes() -> None:
    """Tests that what a transfer takes beside its bytes makes the plan run of a notice longer."""
    longest_s = []
    for transfer_s in (0.0, 0.4):
        kept = Entries()
        simulate(measured(a_notice(), transfer_s=transfer_s), "live", make_plan, journal=kept)
        longest_s.append(max(entry.event.at_s for entry in kept.kept if is_transfer(entry)))
    assert longest_s[1] > longest_s[0] + 0.3


def is_transfer(entry: Any) -> bool:
    """Whether an entry tells of bytes that came."""
    return bool(entry.event.kind == "step_done" and entry.event.bytes)
