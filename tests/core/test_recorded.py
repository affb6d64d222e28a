"""The scenario that a journal records: capacity, requests and spec, without what the controller made of them."""

from __future__ import annotations

import pytest

from spotserve.core import commands as cmd
from spotserve.core import events as ev
from spotserve.core.controller import Controller, Entry
from spotserve.core.ids import GpuId, InstanceId, RequestId
from spotserve.core.recorded import RecordedScenario, recorded_scenario
from spotserve.core.replay import moments
from spotserve.core.state import ClusterState
from spotserve.core.trace import instance_counts
from spotserve.errors import SpecError
from tests.golden_journals.reading import entries_of


def lives(scenario: RecordedScenario) -> list[tuple[str, tuple[str, ...], float | None]]:
    """The events of a trace without their times."""
    return [(event.kind, event.instances, event.grace_s) for event in scenario.trace.events]


def test_a_noticed_instance_is_not_killed_twice() -> None:
    """Tests that a notice is recorded with its grace, and the kill at its deadline is left to who plays it."""
    entries = entries_of("v1-notice")
    scenario = recorded_scenario(entries)
    notice = next(e.event for e in entries if isinstance(e.event, ev.NoticeReceived))
    added = [("add", (f"i{index}",), None) for index in range(4)]
    assert [*added, ("notice", (notice.instance,), 20.0)] == lives(scenario)
    assert [0.0] * 4 + [notice.at_s] == [event.at_s for event in scenario.trace.events]
    (gone,) = [one for one in scenario.instances if one.gone_at_s is not None]
    assert gone.instance == notice.instance
    assert gone.gone_at_s is not None
    assert notice.at_s + 20.0 <= gone.gone_at_s < notice.at_s + 21.0


def test_a_kill_and_a_replacement() -> None:
    """Tests that a kill is recorded when it came and an instance when it was ready, not when it was asked for."""
    entries = entries_of("v1-kill")
    scenario = recorded_scenario(entries)
    kill = next(e.event for e in entries if isinstance(e.event, ev.KillRequested))
    joined = next(e.event for e in entries if isinstance(e.event, ev.WorkerRegistered) and e.event.instance == "i4")
    wanted = next(e.event for e in entries if isinstance(e.event, ev.InstanceWanted))
    assert [("kill", (kill.instance,), None), ("add", ("i4",), None)] == lives(scenario)[4:]
    assert [kill.at_s, joined.at_s] == [event.at_s for event in scenario.trace.events[4:]]
    (replacement,) = [one for one in scenario.instances if one.instance == "i4"]
    assert (wanted.at_s, joined.at_s) == (replacement.asked_at_s, replacement.ready_at_s)
    assert (1, 6 * 1024 * 1024) == (scenario.gpus_per_instance, scenario.gpu_memory_bytes)
    assert [4, 3, 4] == [count for _, count in instance_counts(scenario.trace)]


def test_ids_follow_the_order_of_readiness() -> None:
    """Tests that an instance asked for later and ready sooner comes first in the trace, under the lower id."""
    scenario = recorded_scenario(entries_of("v1-restart"))
    ready = {one.instance: one.ready_at_s for one in scenario.instances}
    fourth, fifth = ready[InstanceId("i4")], ready[InstanceId("i5")]
    assert fourth is not None
    assert fifth is not None
    assert fifth < fourth, "this journal was kept for that"
    late = [(event.at_s, event.instances) for event in scenario.trace.events if event.kind == "add" and event.at_s]
    assert [(fifth, ("i4",)), (fourth, ("i5",))] == late
    assert "the coordinator's restart at 11.431 s is left out" in scenario.trace.notes
    assert [None, None] == [one.gone_at_s for one in scenario.instances if one.instance in ("i0", "i1")]


@pytest.mark.parametrize("name", ["v1-notice", "v1-kill", "v1-restart"])
def test_every_request_is_recorded_with_what_it_was_given(name: str) -> None:
    """Tests that each accepted request is there once, with lengths, end and tokens as the journal has them."""
    entries = entries_of(name)
    scenario = recorded_scenario(entries)
    accepted = [e.event for e in entries if isinstance(e.event, ev.RequestAccepted)]
    ended = {e.event.request: e.event for e in entries if isinstance(e.event, ev.RequestEnded)}
    assert [(a.request, a.at_s, a.prompt_tokens) for a in accepted] == [
        (one.request, one.at_s, one.prompt_tokens) for one in scenario.requests
    ]
    for request in scenario.requests:
        end = ended[request.request]
        assert (end.at_s, end.outcome, end.tokens) == (request.ended_at_s, request.outcome, request.output_tokens)
        assert request.first_token_at_s is not None
        assert request.at_s < request.first_token_at_s <= end.at_s
    begun = entries[0].event
    assert isinstance(begun, ev.JournalBegun)
    assert begun.spec == scenario.spec
    assert scenario.duration_s == max(e.event.at_s for e in entries)


def test_a_timeout_and_a_cancelled_client_are_known() -> None:
    """Tests that the deadline of a request and the moment its client left are recorded."""
    entries = entries_of("v1-kill")
    (timed,) = [one for one in recorded_scenario(entries).requests if one.timeout_s is not None]
    assert (1.0, "failed") == (timed.timeout_s, timed.outcome)
    accepted = next(e for e in entries if isinstance(e.event, ev.RequestAccepted))
    name = accepted.event.request  # type: ignore[union-attr]
    left = Entry(sequence=accepted.sequence + 1, event=ev.CancelRequested(at_s=1.3, request=name))
    scenario = recorded_scenario([*entries[: accepted.sequence], left])
    (request,) = scenario.requests
    assert (1.3, None, None) == (request.cancelled_at_s, request.ended_at_s, request.output_tokens)
    assert (250,) == request.work_tokens, "nobody knows what it would have come to"
    assert timed.work_tokens == timed.output_tokens


def test_a_journal_that_was_cut_begins_where_it_was() -> None:
    """Tests that of a cut journal instances, deadlines and open requests of its base are there at 0."""
    entries = entries_of("v1-restart")
    noticed = next(e for e in entries if isinstance(e.event, ev.NoticeReceived))
    controller = Controller()
    for entry in entries[: noticed.sequence]:
        controller.fold(entry)
    scenario = recorded_scenario(entries[noticed.sequence :], base=controller.state)
    assert noticed.event.at_s == scenario.begins_s
    assert [("add", (f"i{index}",), None) for index in range(4)] == lives(scenario)[:4]
    first = scenario.trace.events[4]
    assert ("notice", ("i0",), 0.0) == (first.kind, first.instances, first.at_s)
    assert first.grace_s == pytest.approx(25.0)
    assert {one.request for one in scenario.requests if one.at_s == 0.0} >= set(controller.state.requests)
    assert scenario.spec == controller.state.spec
    assert scenario.duration_s == pytest.approx(entries[-1].event.at_s - scenario.begins_s)
    with pytest.raises(SpecError, match="no first entry"):
        recorded_scenario(entries[5:])


def played(*events: ev.Event) -> RecordedScenario:
    """A scenario of a fresh journal of one instance and these events, as the controller takes them."""
    begun = entries_of("v1-notice")[0].event
    assert isinstance(begun, ev.JournalBegun)
    controller = Controller()
    entries = [controller.step(begun.model_copy(update={"num_instances": 1, "at_s": 0.0}))]
    return recorded_scenario([*entries, *(controller.step(event) for event in events)])


def registered(at_s: float, instance: str, index: int = 0, *, num_gpus: int = 1) -> ev.WorkerRegistered:
    """A worker that dials in."""
    return ev.WorkerRegistered(
        at_s=at_s,
        instance=InstanceId(instance),
        worker=GpuId(f"{instance}/{index}"),
        num_gpus=num_gpus,
        memory_bytes=5000 + index,
        incarnation="a",
    )


def test_what_never_came_up_is_left_out_and_said() -> None:
    """Tests that an instance that was lost before all its GPUs were there is no capacity, and a note says so."""
    scenario = played(
        registered(0.5, "i0", 0, num_gpus=2),
        ev.InstanceWanted(at_s=1.0),
        registered(1.5, "i1", 0),
        ev.InstanceLost(at_s=2.0, instance=InstanceId("i0"), reason="never came up"),
    )
    assert [("add", ("i0",), None)] == lives(scenario)
    assert [1.5] == [event.at_s for event in scenario.trace.events]
    assert ("i0 was asked for and never ready: left out",) == scenario.trace.notes


def test_a_crash_is_a_kill_and_a_withdrawn_notice_is_said() -> None:
    """Tests that an instance that goes by itself is killed in the trace, and a withdrawn notice is only noted."""
    name = InstanceId("i0")
    scenario = played(
        registered(0.5, "i0"),
        ev.NoticeReceived(at_s=1.0, instance=name, grace_s=9.0),
        ev.NoticeWithdrawn(at_s=2.0, instance=name),
        ev.InstanceLost(at_s=3.0, instance=name, reason="crashed"),
    )
    assert [("add", ("i0",), None), ("kill", ("i0",), None)] == lives(scenario)
    assert ("the notice of i0, withdrawn at 2.000 s, is left out",) == scenario.trace.notes


def test_an_early_notice_waits_for_its_instance() -> None:
    """Tests that a notice from before an instance was ready takes effect when it is, with what is left of it."""
    scenario = played(
        ev.InstanceWanted(at_s=0.1),
        ev.NoticeReceived(at_s=0.2, instance=InstanceId("i1"), grace_s=10.0),
        registered(0.5, "i0"),
        registered(4.2, "i1"),
    )
    assert [("add", ("i0",), None), ("add", ("i1",), None), ("notice", ("i1",), 6.0)] == lives(scenario)


def test_a_deadline_that_another_policy_may_not_see_is_no_kill() -> None:
    """Tests that an instance that the cloud takes before its deadline is killed then, one at its deadline is not."""
    name = InstanceId("i0")
    before = played(
        registered(0.5, "i0"),
        ev.NoticeReceived(at_s=1.0, instance=name, grace_s=9.0),
        ev.InstanceLost(at_s=3.0, instance=name, reason="taken early"),
    )
    assert [("notice", 1.0), ("kill", 3.0)] == [(event.kind, event.at_s) for event in before.trace.events[1:]]
    at_it = played(
        registered(0.5, "i0"),
        ev.NoticeReceived(at_s=1.0, instance=name, grace_s=2.0),
        ev.TimerFired(at_s=3.0, timer="deadline:i0"),
        ev.InstanceLost(at_s=3.1, instance=name, reason="deadline"),
    )
    assert [("notice", 1.0)] == [(event.kind, event.at_s) for event in at_it.trace.events[1:]]


def test_a_request_of_nobody_is_passed_over() -> None:
    """Tests that late messages about a request that has ended, or was never accepted, change nothing."""
    entries = entries_of("v1-notice")
    state = [moment.after for moment in moments(ClusterState(), entries)][-1]
    late = [
        ev.CancelRequested(at_s=40.0, request=RequestId("nobody")),
        ev.CancelRequested(at_s=41.0, request=recorded_scenario(entries).requests[0].request),
    ]
    more = [Entry(sequence=len(entries) + 1 + i, event=event) for i, event in enumerate(late)]
    assert recorded_scenario(entries).requests == recorded_scenario([*entries, *more]).requests
    assert not any(isinstance(command, cmd.EndRequest) for entry in more for command in entry.commands)
    assert not state.requests
