"""A replay finds what is not as recorded, by the first place where it is not."""

from __future__ import annotations

import json
from typing import Any

import pytest

from spotserve.core import commands as cmd
from spotserve.core import events as ev
from spotserve.core import replay as replay_module
from spotserve.core.canonical import canonical_json
from spotserve.core.controller import Entry
from spotserve.core.ids import InstanceId, RequestId
from spotserve.core.replay import Comparison, compare_state, mismatch, moments
from spotserve.core.replay_report import cluster_at, replay_report
from spotserve.core.spec import POLICY_VERSION
from spotserve.core.state import ClusterState
from spotserve.errors import StateDirError
from tests.golden_journals.reading import entries_of

Json = dict[str, Any]


@pytest.fixture(scope="module")
def entries() -> list[Entry]:
    """The journal of a daemon whose coordinator was killed in between."""
    return entries_of(f"v{POLICY_VERSION}-restart")


def compared(entries: list[Entry], snapshots: dict[int, Any] | None = None) -> Comparison:
    """All entries compared."""
    comparison = Comparison(snapshots or {})
    for moment in moments(ClusterState(), entries):
        comparison.take(moment)
    return comparison


def state_after(entries: list[Entry], sequence: int) -> ClusterState:
    """The fold up to an entry."""
    states = [ClusterState(), *(moment.after for moment in moments(ClusterState(), entries[:sequence]))]
    return states[-1]


def changed(entries: list[Entry], sequence: int, **update: Any) -> list[Entry]:
    """The entries with one of them changed."""
    return [e.model_copy(update=update) if e.sequence == sequence else e for e in entries]


def test_unchanged_journal_is_decided_again(entries: list[Entry]) -> None:
    """Tests that every decision of a journal is compared and found again."""
    comparison = compared(entries)
    assert ("same", len(entries), None) == (comparison.verdict, comparison.num_compared, comparison.difference)


@pytest.mark.parametrize("dropped", ["set_timer", "take_snapshot", "launch_instance", "admit_requests"])
def test_a_missing_command_is_told(entries: list[Entry], dropped: str) -> None:
    """Tests that of an entry that lacks one command the sequence, the event and the place are told."""
    entry = next(e for e in entries if any(command.kind == dropped for command in e.commands))
    index = next(i for i, command in enumerate(entry.commands) if command.kind == dropped)
    left = entry.commands[:index] + entry.commands[index + 1 :]
    before = state_after(entries, entry.sequence - 1)
    assert replay_module.compare_commands(before, entry) is None
    found = replay_module.compare_commands(before, entry.model_copy(update={"commands": left}))
    assert found is not None
    assert (entry.sequence, entry.event.kind) == (found.sequence, found.event)
    assert found.mismatch.path.startswith(f"commands[{index}]")
    assert len(found.decided_commands) == len(found.recorded_commands) + 1


def test_a_changed_value_inside_a_command_is_told_by_its_path(entries: list[Entry]) -> None:
    """Tests that one wrong number in a command is found, with both values."""
    entry = next(e for e in entries if isinstance(e.event, ev.NoticeReceived))
    index, timer = next((i, c) for i, c in enumerate(entry.commands) if isinstance(c, cmd.SetTimer))
    wrong = timer.model_copy(update={"at_s": timer.at_s + 1})
    commands = (*entry.commands[:index], wrong, *entry.commands[index + 1 :])
    report = replay_report(
        ClusterState(), changed(entries, entry.sequence, commands=commands)[: entry.sequence], snapshots={}
    )
    difference = report["checks"]["difference"]
    assert (entry.sequence, "notice_received") == (difference["sequence"], difference["event"])
    assert f"commands[{index}].at_s" == difference["path"]
    assert (repr(wrong.at_s), repr(timer.at_s)) == (difference["recorded"], difference["found"])
    assert "differ" == report["checks"]["decisions"]


def test_only_the_first_difference_is_told_and_all_are_counted(entries: list[Entry]) -> None:
    """Tests that a replay goes on after a difference: the first one is told, each one counted."""
    wrong = cmd.SetTimer(timer="none", at_s=1.0)
    both = changed(changed(entries, 22, commands=(wrong,)), 40, commands=(wrong,))
    comparison = compared(both)
    assert comparison.difference is not None
    assert (22, 2) == (comparison.difference.sequence, comparison.num_differing)
    assert len(entries) == comparison.num_entries


def test_another_policy_version_is_not_compared(entries: list[Entry], monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests that decisions of an older version are not compared, and differ from nothing."""
    monkeypatch.setattr(replay_module, "POLICY_VERSION", POLICY_VERSION + 1)
    wrong = changed(entries, 22, commands=(cmd.SetTimer(timer="none", at_s=1.0),))
    comparison = compared(wrong)
    assert ("not_compared", 0, None) == (comparison.verdict, comparison.num_compared, comparison.difference)
    assert [POLICY_VERSION] == comparison.versions


def test_a_restart_brings_its_own_policy_version(entries: list[Entry], monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests that what a coordinator of another version decided after a restart is told from what was before it."""
    restart = next(e for e in entries if isinstance(e.event, ev.CoordinatorRestarted))
    event = restart.event.model_copy(update={"policy_version": POLICY_VERSION + 1})
    upgraded = changed(entries, restart.sequence, event=event)
    comparison = compared(upgraded)
    assert ("partly_compared", restart.sequence - 1) == (comparison.verdict, comparison.num_compared)
    assert [POLICY_VERSION, POLICY_VERSION + 1] == comparison.versions
    monkeypatch.setattr(replay_module, "POLICY_VERSION", POLICY_VERSION + 1)
    comparison = compared(upgraded)
    assert (len(entries) - restart.sequence + 1, None) == (comparison.num_compared, comparison.difference)


def test_fold_snapshots_are_compared(entries: list[Entry]) -> None:
    """Tests that the state after an entry is what a snapshot there says, and one changed fact of it is found."""
    snapshot = json.loads(canonical_json(state_after(entries, 50)))
    assert (1, 0) == (compared(entries, {50: snapshot}).num_snapshots, compared(entries, {50: snapshot}).num_differing)
    wrong = {**snapshot, "instances": {**snapshot["instances"], "i0": {**snapshot["instances"]["i0"], "num_gpus": 2}}}
    comparison = compared(entries, {50: wrong})
    assert comparison.difference is not None
    assert ("state", 50) == (comparison.difference.kind, comparison.difference.sequence)
    assert ("instances.i0.num_gpus", "2", "1") == comparison.difference.mismatch
    assert (1, 0, "same") == (comparison.num_snapshots_differing, comparison.num_differing, comparison.verdict)


def test_a_snapshot_of_an_older_version_lacks_fields(entries: list[Entry]) -> None:
    """Tests that a field that a snapshot does not know is passed over, and an instance that it does not know is not."""
    moment = [*moments(ClusterState(), entries[:50])][-1]
    snapshot: Json = json.loads(canonical_json(moment.after))
    older = {name: value for name, value in snapshot.items() if name != "policy_version"}
    assert compare_state(older, moment) is None
    fewer = {**snapshot, "instances": {name: one for name, one in snapshot["instances"].items() if name != "i3"}}
    found = compare_state(fewer, moment)
    assert found is not None
    assert ("instances.i3", "absent") == (found.mismatch.path, found.mismatch.recorded)


@pytest.mark.parametrize(
    ("recorded", "value", "path"),
    [
        ([1, 2], (1, 2, 3), "[2]"),
        ([1, 2, 3], (1, 2), "[2]"),
        ({"a": 1}, {}, "a"),
        ({}, {"a": None}, "a"),
        (1, True, ""),
        ({"a": None}, {"a": 0}, "a"),
        ({"anything": 1}, ClusterState(), "anything"),
    ],
)
def test_mismatch_names_the_first_place(recorded: Any, value: Any, path: str) -> None:
    """Tests that longer, shorter, absent and merely similar values are told apart."""
    found = mismatch(recorded, value, ())
    assert found is not None
    assert path == found.path


def test_an_entry_that_cannot_follow_is_named(entries: list[Entry]) -> None:
    """Tests that whole entries that no daemon would write end the replay with their position, never a traceback."""
    hostile: list[tuple[ev.Event, tuple[cmd.Command, ...]]] = [
        (ev.TimerFired(at_s=1.5, timer="quiet"), (cmd.FinishRun(epoch=1),)),
        (ev.TimerFired(at_s=1.5, timer="quiet"), (cmd.KillInstance(instance=InstanceId("i99"), reason="x"),)),
        (ev.TimerFired(at_s=1.5, timer="quiet"), (cmd.EndRequest(request=RequestId("none"), outcome="failed"),)),
        (ev.TimerFired(at_s=1.5, timer="deadline:i99"), ()),
    ]
    for event, commands in hostile:
        wrong = [*entries[:20], Entry(sequence=21, event=event, commands=commands)]
        with pytest.raises(StateDirError, match=r"^entry 21 \(timer_fired\) cannot be ") as told:
            replay_report(ClusterState(), wrong, snapshots={})
        assert "\n" not in told.value.message


def test_until_ends_at_its_time(entries: list[Entry]) -> None:
    """Tests that a replay to a time folds what came up to it, and shows the cluster and the run of that moment."""
    begun = next(e for e in entries if any(isinstance(c, cmd.BeginRun) and c.plan.epoch.to == 3 for c in e.commands))
    report = replay_report(ClusterState(), entries, snapshots={}, until_s=begun.event.at_s)
    assert begun.sequence == report["entries"]
    assert cluster_at(state_after(entries, begun.sequence)) == report["cluster"]
    run = report["cluster"]["run"]
    assert (3, "preparing", ["i0", "i1"]) == (run["epoch"], run["state"], run["trigger"]["instances"])
    assert run["steps"]["running"] == len(run["running"]) > 0
    taken = {one["id"]: one["taken_in_s"] for one in report["cluster"]["instances"] if one["taken_in_s"] is not None}
    assert {"i0", "i1"} == set(taken)
    assert all(0 < seconds < 25 for seconds in taken.values())
    nothing = replay_report(ClusterState(), entries, snapshots={}, until_s=0.0)
    assert (0, [], "provisioning") == (nothing["entries"], nothing["timeline"], nothing["state"])
