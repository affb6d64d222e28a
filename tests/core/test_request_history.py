"""The life of a request, step by step, worked out again by hand from the journal's entries."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from spotserve.core import commands as cmd
from spotserve.core import events as ev
from spotserve.core.controller import Controller, Entry
from spotserve.core.ids import RequestId
from spotserve.core.request_history import request_report
from spotserve.core.state import ClusterState
from spotserve.errors import SpotServeError
from tests.golden_journals.reading import entries_of

Json = dict[str, Any]
NAMES = ("v1-notice", "v1-kill", "v1-restart")


def reports(entries: list[Entry]) -> dict[RequestId, Json]:
    """The report on every request of a journal."""
    accepted = [e.event.request for e in entries if isinstance(e.event, ev.RequestAccepted)]
    return {request: request_report(ClusterState(), entries, request) for request in accepted}


def whats(report: Json) -> list[str]:
    """What happened, in order."""
    return [step["what"] for step in report["steps"]]


def one_where(entries: list[Entry], holds: Callable[[Json], bool]) -> Json:
    """The first report that fits."""
    return next(report for report in reports(entries).values() if holds(report))


@pytest.mark.parametrize("name", NAMES)
def test_totals_are_those_of_the_events(name: str) -> None:
    """Tests that times, stalls and tokens of every request are what one counts by hand in its events."""
    entries = entries_of(name)
    for request, report in reports(entries).items():
        own = [e.event for e in entries if getattr(e.event, "request", None) == request]
        firsts = [event for event in own if isinstance(event, ev.FirstToken)]
        end = own[-1]
        assert isinstance(end, ev.RequestEnded)
        totals = report["totals"]
        assert ("accepted", "ended") == (whats(report)[0], whats(report)[-1])
        assert totals["ttft_s"] == pytest.approx(firsts[0].at_s - own[0].at_s, abs=1e-6)
        assert totals["latency_s"] == pytest.approx(end.at_s - own[0].at_s, abs=1e-6)
        assert totals["stall_ms_max"] == max(event.stall_ms for event in firsts)
        assert totals["recomputed_tokens"] == sum(event.recomputed_tokens for event in firsts)
        assert totals["num_evictions"] == sum(isinstance(event, ev.RequestEvicted) for event in own)
        assert (end.outcome, list(end.tokens)) == (report["state"], report["tokens"])
        assert "decoding" in {step.get("state") for step in report["steps"]}


@pytest.mark.parametrize("name", ["v1-notice", "v1-kill"])
def test_time_in_states_adds_up(name: str) -> None:
    """Tests that the time in each state adds up to the whole life of a request."""
    for report in reports(entries_of(name)).values():
        spent = report["totals"]["in_state_s"]
        assert sum(spent.values()) == pytest.approx(report["totals"]["latency_s"], abs=0.1)
        assert spent["decoding"] > 0


def test_a_move_is_told_step_by_step() -> None:
    """Tests that a request that moved with its KV shows plan, standstill, move and first token on the new replica."""
    report = one_where(entries_of("v1-notice"), lambda report: report["totals"]["num_moves"] == 1)
    told = whats(report)
    order = ["accepted", "admitted", "first_token", "planned", "quiesced", "moved", "admitted", "first_token", "ended"]
    assert order == [what for what in told if what not in ("evicted",)]
    by_what = {step["what"]: step for step in report["steps"]}
    assert ("suspended", "move") == (by_what["quiesced"]["state"], by_what["planned"]["action"])
    assert by_what["quiesced"]["choices"][0]["kv_tokens"] > 0
    assert 0 == report["totals"]["recomputed_tokens"]
    assert 2 == len(report["totals"]["replicas"])
    assert by_what["moved"]["to"] == report["totals"]["replicas"][1]["id"]


def test_a_kill_suspends_and_recomputes() -> None:
    """Tests that a request of a killed replica shows the loss, the new home and the recomputed tokens."""
    report = one_where(entries_of("v1-kill"), lambda report: report["totals"]["recomputed_tokens"] > 0)
    lost = next(step for step in report["steps"] if step["what"] == "first_token" and step["recomputed_tokens"])
    assert lost["stall_ms"] > 0
    entry = next(e for e in entries_of("v1-kill") if isinstance(e.event, ev.InstanceLost))
    again = next(step for step in report["steps"] if step["sequence"] == entry.sequence)
    assert ("admitted", "prefilling") == (again["what"], again["state"])


def test_a_deadline_is_told_with_its_reason() -> None:
    """Tests that a request that ran out of time shows the timer, the order to end and the end."""
    report = one_where(entries_of("v1-kill"), lambda report: report["state"] == "failed")
    assert ["deadline_passed", "told_to_end", "ended"] == whats(report)[-3:]
    assert "timeout_s passed" == report["steps"][-2]["error"]
    assert 1.0 == report["timeout_s"]


def test_a_restart_names_its_requests_again() -> None:
    """Tests that a request that outlived its coordinator is shown to be named again."""
    report = one_where(entries_of("v1-restart"), lambda report: "named_again" in whats(report))
    assert report["totals"]["latency_s"] > 8


def test_a_loss_without_a_new_home_is_a_change() -> None:
    """Tests that a request that only stands still is told by what made it stand still."""
    entries = entries_of("v1-notice")
    last = next(e for e in entries if isinstance(e.event, ev.NoticeReceived))
    controller = Controller()
    for entry in entries[: last.sequence - 1]:
        controller.fold(entry)
    replica = next(iter(controller.state.replicas.values())).replica
    request = controller.state.requests_of(replica.id, replica.generation)[0]
    event = ev.ReplicaBroke(at_s=2.0, replica=replica.id, generation=replica.generation, detail="mesh")
    broke = Entry(sequence=last.sequence, event=event)
    report = request_report(ClusterState(), [*entries[: last.sequence - 1], broke], request.id)
    step = report["steps"][-1]
    assert ("changed", "replica_broke", "suspended", None) == (
        step["what"], step["cause"], step["state"], step["replica"]
    )  # fmt: skip
    assert "suspended" == report["state"]
    assert (None, None) == (report["ended_at_s"], report["tokens"])


def test_a_request_older_than_the_journal_is_told_from_there() -> None:
    """Tests that of a request that the base of a cut journal has its sizes are known, and its acceptance is not."""
    entries = entries_of("v1-notice")
    noticed = next(e for e in entries if isinstance(e.event, ev.NoticeReceived))
    controller = Controller()
    for entry in entries[: noticed.sequence]:
        controller.fold(entry)
    request = next(iter(controller.state.requests.values()))
    report = request_report(controller.state, entries[noticed.sequence :], request.id)
    assert (request.prompt_tokens, request.max_tokens) == (report["prompt_tokens"], report["max_tokens"])
    assert (None, None, "finished") == (report["accepted_at_s"], report["totals"]["ttft_s"], report["state"])
    assert "accepted" not in whats(report)


def test_an_unknown_request_is_answered_by_the_nearest() -> None:
    """Tests that a beginning and a mistyped id lead to the id meant, and anything else to the latest one."""
    entries = entries_of("v1-notice")
    known = [e.event.request for e in entries if isinstance(e.event, ev.RequestAccepted)]
    wrong = known[2][:-3] + "zzz"
    for asked, expected in ((known[2][:9], known[2]), (wrong, known[2]), ("?", known[-1]), ("", known[-1])):
        with pytest.raises(SpotServeError, match="is not in the journal") as told:
            request_report(ClusterState(), entries, asked)
        assert expected in str(told.value.hint)
    with pytest.raises(SpotServeError) as told:
        request_report(ClusterState(), entries[:5], known[0])
    assert "no request is in the journal" == told.value.hint


def test_what_is_said_of_a_request_is_said_by_entries_that_name_it() -> None:
    """Tests that every command of the journal that names a request is a step of its life."""
    entries = entries_of("v1-restart")
    for request, report in reports(entries).items():
        named = sum(
            1
            for entry in entries
            for command in entry.commands
            if isinstance(command, cmd.AdmitRequests)
            for admission in command.admissions
            if admission.request == request
        )
        assert named == sum(what in ("admitted", "named_again") for what in whats(report))
