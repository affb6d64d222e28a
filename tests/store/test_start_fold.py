"""A daemon that goes on with a journal folds it to the state that its predecessor had, or says which entry is wrong."""

from __future__ import annotations

import time
from contextlib import closing
from pathlib import Path

import pytest

from spotserve.app.parts import folded
from spotserve.core import commands as cmd
from spotserve.core import events as ev
from spotserve.core.canonical import canonical_json
from spotserve.core.controller import Controller, Entry
from spotserve.core.ids import InstanceId
from spotserve.errors import StateDirError
from spotserve.store.journal import Journal
from spotserve.store.journal_file import JournalRecord
from tests.golden_journals.reading import entries_of
from tests.store.conftest import TIMEOUT_S, identity


def written(path: Path, entries: list[Entry], *, snapshot_after: int | None = None, body: str = "") -> Journal:
    """A journal of these entries, with a fold snapshot if wanted."""
    journal = Journal.create(path / "journal.db", identity())
    for entry in entries:
        journal.append([JournalRecord(entry.sequence, entry.event.at_s, canonical_json(entry))]).result(TIMEOUT_S)
        if entry.sequence == snapshot_after:
            journal.save_snapshot(entry.sequence, body).result(TIMEOUT_S)
    return journal


@pytest.mark.parametrize("snapshot_after", [None, 30])
def test_a_continued_journal_is_folded_to_its_end(tmp_path: Path, snapshot_after: int | None) -> None:
    """Tests that from the first entry or from the latest snapshot the fold ends in the same state and sequence."""
    entries = entries_of("v1-kill")
    controller, bodies = Controller(), {}
    for entry in entries:
        controller.fold(entry)
        bodies[entry.sequence] = canonical_json(controller.state)
    body = bodies.get(snapshot_after or 0, "")
    with closing(written(tmp_path, entries, snapshot_after=snapshot_after, body=body)) as journal:
        found, began_s = folded(journal, continued=True)
        assert (controller.state, controller.sequence) == (found.state, found.sequence)
        assert began_s == pytest.approx(time.time() - identity().created_unix_s, abs=60)
        fresh, began_s = folded(journal, continued=False)
        assert (Controller().state, 0, 0.0) == (fresh.state, fresh.sequence, began_s)


def test_an_entry_that_cannot_follow_stops_the_start(tmp_path: Path) -> None:
    """Tests that a whole entry that no daemon wrote is told by its position and kind, and not by a traceback."""
    entries = entries_of("v1-kill")[:20]
    kill = cmd.KillInstance(instance=InstanceId("i99"), reason="none")
    wrong = Entry(sequence=21, event=ev.TimerFired(at_s=2.0, timer="none"), commands=(kill,))
    with (
        closing(written(tmp_path, [*entries, wrong])) as journal,
        pytest.raises(StateDirError, match=r"^entry 21 \(timer_fired\) cannot be folded: KeyError"),
    ):
        folded(journal, continued=True)


def test_a_snapshot_of_another_version_stops_the_start(tmp_path: Path) -> None:
    """Tests that a snapshot with a field that this version does not know is told by its position."""
    entries = entries_of("v1-kill")[:20]
    with (
        closing(written(tmp_path, entries, snapshot_after=10, body='{"colour": "red"}')) as journal,
        pytest.raises(StateDirError, match="the snapshot after entry 10 is not one of this version: colour"),
    ):
        folded(journal, continued=True)
