"""`spotserve replay`: a journal decides the same again, and one that does not is told."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

from spotserve.cli.main import run_verb
from spotserve.core import events as ev
from spotserve.core.canonical import canonical_json, digest
from spotserve.core.controller import Entry
from spotserve.store.journal import EntryJournal, Journal, JournalIdentity, JournalRecord
from tests.sim.test_virtual_world import Stage


def written_journal(path: Path, entries: list[Entry]) -> None:
    """A journal file with these entries."""
    identity = JournalIdentity(created_unix_s=0.0, incarnation="0" * 16, model_digest="sha256:0", dtype="float32")
    journal = Journal.create(path, identity)
    asyncio.run(EntryJournal(journal).append(entries))
    journal.close()


def played_stage() -> Stage:
    """A run with a notice and a kill."""
    stage = Stage()
    stage.requests(4, max_tokens=60)
    stage.notice(4.0, "i0")
    stage.kill(6.0, "i1")
    stage.play(30.0)
    return stage


def test_replays_to_the_same_state(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Tests that a replay counts every entry and ends in the state that the controller had."""
    stage = played_stage()
    written_journal(tmp_path / "journal.db", stage.journal.entries)
    assert run_verb(["replay", str(tmp_path / "journal.db"), "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["entries"] == len(stage.journal.entries)
    assert summary["state_digest"] == digest(stage.controller.state)


def test_tells_a_changed_decision(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Tests that an entry with other commands than decided now is named and ends with exit code 1."""
    entries = list(played_stage().journal.entries)
    index = next(i for i, e in enumerate(entries) if isinstance(e.event, ev.NoticeReceived))
    entries[index] = entries[index].model_copy(update={"commands": ()})
    written_journal(tmp_path / "journal.db", entries[: index + 1])
    assert run_verb(["replay", str(tmp_path / "journal.db")]) == 1
    assert f"entry {index + 1} (notice_received)" in capsys.readouterr().err


def test_refuses_what_is_no_journal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Tests that a file of garbage is refused in one line."""
    (tmp_path / "journal.db").write_bytes(b"garbage" * 100)
    assert run_verb(["replay", str(tmp_path / "journal.db")]) == 1
    assert "journal.db" in capsys.readouterr().err


def test_entry_survives_json() -> None:
    """Tests that an entry is the same value after its canonical JSON."""
    for entry in played_stage().journal.entries:
        record = JournalRecord(entry.sequence, entry.event.at_s, canonical_json(entry))
        assert Entry.model_validate_json(record.body) == entry
