"""The timeline: every entry in one item, what matters in items of its own."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from spotserve.core import commands as cmd
from spotserve.core import events as ev
from spotserve.core.controller import Entry
from spotserve.core.replay import moments
from spotserve.core.service import service_state
from spotserve.core.state import ClusterState
from spotserve.core.timeline import COUNTED, Timeline
from tests.golden_journals.reading import entries_of

Json = dict[str, Any]
NAMES = ("v1-notice", "v1-kill", "v1-restart")


def told(entries: list[Entry]) -> list[Json]:
    """The timeline of entries."""
    timeline = Timeline()
    for moment in moments(ClusterState(), entries):
        timeline.take(moment)
    return timeline.items()


@pytest.fixture(scope="module", params=NAMES)
def entries(request: pytest.FixtureRequest) -> list[Entry]:
    """The entries of each golden journal."""
    return entries_of(request.param)


def test_every_entry_is_in_one_item(entries: list[Entry]) -> None:
    """Tests that the items follow one another without a gap and count each entry once."""
    following = entries[0].sequence
    for item in told(entries):
        assert item["sequence"] == following
        following = item.get("last_sequence", item["sequence"]) + 1
        counts = Counter(e.event.kind for e in entries[item["sequence"] - 1 : following - 1])
        if item["kind"] == "entry":
            assert {item["event"]["kind"]: 1} == counts
        else:
            assert item["entries"] == counts.total()
            assert sum(item["requests"].values()) + sum(item["others"].values()) == counts.total()
    assert following == entries[-1].sequence + 1


def test_requests_are_counted(entries: list[Entry]) -> None:
    """Tests that accepted, first, evicted and ended requests of all items add up to the journal's."""
    expected: Counter[str] = Counter()
    for entry in entries:
        if isinstance(entry.event, ev.RequestEnded):
            expected[entry.event.outcome] += 1
        elif entry.event.kind in COUNTED:
            expected[COUNTED[entry.event.kind]] += 1
    counted: Counter[str] = Counter()
    for item in told(entries):
        if item["kind"] == "meanwhile":
            counted.update(item["requests"])
        elif item["event"]["kind"] in COUNTED:
            counted[COUNTED[item["event"]["kind"]]] += 1
    assert expected == counted


def test_times_never_go_back(entries: list[Entry]) -> None:
    """Tests that the timeline's clock runs forward, though events of a restart may be older than it."""
    times = [item["at_s"] for item in told(entries)]
    assert times == sorted(times)


def test_service_changes_are_all_told(entries: list[Entry]) -> None:
    """Tests that the SERVICE states of the timeline are the states of the fold, in order."""
    states = ["provisioning"]
    for moment in moments(ClusterState(), entries):
        if service_state(moment.after) != states[-1]:
            states.append(service_state(moment.after))
    changes = [item["service"] for item in told(entries) if item.get("service")]
    assert states == ["provisioning", *(change["to"] for change in changes)]
    assert all(change["from"] == before for change, before in zip(changes, states, strict=False))


def test_decisions_of_note_are_all_told(entries: list[Entry]) -> None:
    """Tests that every launch, kill, fence, begin, commit, abort and release of the journal is in an item."""
    kinds = ("launch_instance", "kill_instance", "fence_replica", "begin_run", "commit_run", "abort_run", "finish_run")
    expected = [command.kind for e in entries for command in e.commands if command.kind in kinds]
    found = [
        command["kind"]
        for item in told(entries)
        if item["kind"] == "entry"
        for command in item["commands"]
        if command["kind"] in kinds
    ]
    assert expected == found
    assert "commit_run" in found


def test_stalls_are_those_of_first_tokens(entries: list[Entry]) -> None:
    """Tests that streams that waited are counted with the longest wait and its request."""
    waits = {e.event.request: e.event.stall_ms for e in entries if isinstance(e.event, ev.FirstToken)}
    items = told(entries)
    groups = [item["stalls"] for item in items if item["kind"] == "meanwhile" and item["stalls"]]
    single = [i["event"] for i in items if i["kind"] == "entry" and i["event"]["kind"] == "first_token"]
    num_waiting = sum(1 for e in entries if isinstance(e.event, ev.FirstToken) and e.event.stall_ms > 0)
    assert num_waiting == sum(group["count"] for group in groups) + sum(one["stall_ms"] > 0 for one in single)
    assert num_waiting > 0
    for group in groups:
        assert group["longest_ms"] == round(waits[group["request"]], 3)


def test_a_quiet_night_is_one_line() -> None:
    """Tests that hundreds of timers and samples become one item with their counts."""
    entries = entries_of("v1-notice")
    last = entries[-2]
    quiet = [
        Entry(sequence=last.sequence + 1 + index, event=ev.TimerFired(at_s=30.0 + index, timer="delta:77"))
        for index in range(500)
    ]
    item = told([*entries[:-1], *quiet])[-1]
    assert ("meanwhile", 500) == (item["kind"], item["entries"])
    assert (30.0, 529.0, {"timer_fired": 500}) == (item["at_s"], item["last_at_s"], item["others"])


def test_steps_that_were_given_up_are_told() -> None:
    """Tests that the ladder's step down, which only a timer shows, has an item that counts the steps."""
    entries = entries_of("v1-restart")
    begun = next(e for e in entries if any(isinstance(c, cmd.BeginRun) and c.plan.epoch.to == 3 for c in e.commands))
    cut = Entry(sequence=begun.sequence + 1, event=ev.TimerFired(at_s=begun.event.at_s, timer="latest:3"))
    item = told([*entries[: begun.sequence], cut])[-1]
    assert item["changes"][0]["kind"] == "steps_given_up"
    assert item["changes"][0]["count"] > 0


def test_a_failure_has_its_reason() -> None:
    """Tests that the request whose time was up is counted as failed, with the reason that it was given."""
    groups = [item for item in told(entries_of("v1-kill")) if item["kind"] == "meanwhile" and item["failures"]]
    assert [{"timeout_s passed": 1}] == [item["failures"] for item in groups]
    assert [1] == [item["requests"]["failed"] for item in groups]
