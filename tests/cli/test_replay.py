"""`spotserve replay`: a journal decides the same again, and one that does not is told."""

from __future__ import annotations

import asyncio
import json
import shutil
from pathlib import Path

import pytest

from spotserve.cli.main import run_verb
from spotserve.core import events as ev
from spotserve.core.canonical import canonical_json, digest
from spotserve.core.controller import Controller, Entry
from spotserve.core.ids import InstanceId
from spotserve.core.spec import POLICY_VERSION
from spotserve.store.journal import EntryJournal, Journal
from spotserve.store.journal_file import JournalIdentity, JournalRecord
from tests.golden_journals.reading import FOLDER
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


def test_tells_the_timeline_as_text_and_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Tests that the text has a row for each item of the JSON, every plan run, and the verdict."""
    written_journal(tmp_path / "journal.db", played_stage().journal.entries)
    assert run_verb(["replay", str(tmp_path), "--format", "json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert run_verb(["replay", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert f"{report['entries']} entries from 1970-01-01T00:00:00+00:00" in text
    assert f"same decisions at policy version {POLICY_VERSION}\n" + report["state_digest"] in text
    rows = text.split("Timeline\n")[1].split("\n\n")[0].splitlines()[1:]
    begun = [int(row.split()[2]) for row in rows if row.split()[1:2] == ["s"]]
    assert begun == [item["sequence"] for item in report["timeline"]]
    assert "notice for i0: taken in 30.00 s" in text
    assert "-> kill i1 (killed)" in text
    lines = text.split("Plan runs\n")[1].split("\n\n")[0].splitlines()
    assert len(lines) == len(report["runs"]) + 2
    assert f"At {report['at_s']:.3f} s\n" in text


def test_until_shows_the_cluster_of_a_moment(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Tests that with --until instances, replicas and open requests are those of then, and nothing later is told."""
    written_journal(tmp_path / "journal.db", played_stage().journal.entries)
    assert run_verb(["replay", str(tmp_path), "--until", "3.5", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["at_s"] <= 3.5
    assert report["cluster"]["state"] == report["state"] == "serving"
    assert {one["state"] for one in report["cluster"]["instances"]} == {"ready"}
    assert len(report["cluster"]["open_requests"]) == 4
    assert run_verb(["replay", str(tmp_path), "--until", "3.5"]) == 0
    text = capsys.readouterr().out
    assert "notice" not in text
    assert all(request["id"] in text for request in report["cluster"]["open_requests"])


@pytest.mark.parametrize("until", ["nan", "-1", "soon", "1e99"])
def test_until_that_is_no_time(until: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Tests that a time that is none exits 2 before anything is read."""
    assert run_verb(["replay", str(tmp_path / "none.db"), "--until", until]) == 2
    assert "--until" in capsys.readouterr().err


def test_policy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Tests that the journal's own policy replays, and one that does not exist exits 2 with the nearest."""
    written_journal(tmp_path / "journal.db", played_stage().journal.entries)
    assert run_verb(["replay", str(tmp_path), "--policy", "live"]) == 0
    capsys.readouterr()
    assert run_verb(["replay", str(tmp_path), "--policy", "lve"]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.splitlines()[1] == "hint: did you mean live?"


def test_another_policy_is_played(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Tests that another policy is simulated beside the journal's own, with the recorded figures in the first row."""
    journal = shutil.copy(FOLDER / "v1-notice.db", tmp_path)
    assert run_verb(["replay", journal, "--policy", "reroute", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["recorded_policy"], report["policy"]) == ("live", "reroute")
    own, other = report["simulated"]["policies"]
    assert [own["policy"], other["policy"]] == ["live", "reroute"]
    assert (own["lost"], other["lost"], own["open"], other["open"]) == (0, 0, 0, 0)
    recorded = report["recorded"]
    assert (recorded["requests"], recorded["finished"], recorded["tokens"]) == (6, 6, 1500)
    assert 0.75 < own["latency_p50_s"] / recorded["latency_s"]["p50"] < 1.33, "the pace of the model is the journal's"
    assert own["usd"] == pytest.approx(recorded["usd"], rel=0.02)
    assert run_verb(["replay", journal, "--policy", "reroute"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.split("\n\n")[1].splitlines()]
    assert [row[:2] for row in rows[1:4]] == [["live,", "recorded"], ["live,", "simulated"], ["reroute,", "simulated"]]


def test_nothing_to_play(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Tests that a journal without requests, or without an entry, exits 1 under another policy."""
    for entries in ([], played_stage().journal.entries[:8]):
        (tmp_path / "journal.db").unlink(missing_ok=True)
        written_journal(tmp_path / "journal.db", list(entries))
        assert run_verb(["replay", str(tmp_path), "--policy", "reroute"]) == 1
        output = capsys.readouterr()
        assert (output.out, "nothing to play" in output.err) == ("", True)


def test_a_journal_from_beyond_the_calendar(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Tests that a start that no calendar has is told as unknown."""
    identity = JournalIdentity(created_unix_s=10**40, incarnation="0" * 16, model_digest="x", dtype="float32")
    journal = Journal.create(tmp_path / "journal.db", identity)
    asyncio.run(EntryJournal(journal).append(played_stage().journal.entries[:10]))
    journal.close()
    assert run_verb(["replay", str(tmp_path)]) == 0
    assert "from an unknown time to an unknown time" in capsys.readouterr().out


def test_an_empty_journal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Tests that a journal without an entry is told as such."""
    written_journal(tmp_path / "journal.db", [])
    assert run_verb(["replay", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert "0 entries" in text
    assert "no entry" in text


def test_replays_what_a_daemon_is_writing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Tests that a journal that is open for writing is replayed up to its last durable entry, and goes on after it."""
    entries = played_stage().journal.entries
    identity = JournalIdentity(created_unix_s=0, incarnation="0" * 16, model_digest="sha256:0", dtype="float32")
    journal = Journal.create(tmp_path / "journal.db", identity)
    asyncio.run(EntryJournal(journal).append(entries[:40]))
    assert run_verb(["replay", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["entries"] == 40
    asyncio.run(EntryJournal(journal).append(entries[40:]))
    journal.close()
    assert run_verb(["replay", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["entries"] == len(entries)


def test_a_journal_that_was_cut(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Tests that a cut journal is replayed from its base, its later snapshots compared, and no time before it shown."""
    entries = played_stage().journal.entries
    identity = JournalIdentity(created_unix_s=0, incarnation="0" * 16, model_digest="sha256:0", dtype="float32")
    journal = Journal.create(tmp_path / "journal.db", identity)
    writer, controller = EntryJournal(journal), Controller()
    for cut_at, retention_s in ((20, 100.0), (45, 0.5)):
        asyncio.run(writer.append(entries[controller.sequence : cut_at]))
        for entry in entries[controller.sequence : cut_at]:
            controller.fold(entry)
        journal.save_snapshot(cut_at, canonical_json(controller.state), retention_s=retention_s).result(10.0)
    asyncio.run(writer.append(entries[45:]))
    assert journal.first_sequence == 21, "cut behind the first snapshot, the second one stands inside"
    journal.close()
    assert run_verb(["replay", str(tmp_path), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["entries"], report["journal"]["first_sequence"]) == (len(entries) - 20, 21)
    assert report["checks"]["num_snapshots_compared"] == 1
    assert report["state_digest"] == digest(played_stage().controller.state)
    assert run_verb(["replay", str(tmp_path), "--until", "0.1"]) == 1
    assert "before" in capsys.readouterr().err


def test_a_snapshot_that_does_not_fit_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Tests that a whole journal with a snapshot of another state exits 1 with the entry and the place."""
    entries = played_stage().journal.entries[:40]
    written_journal(tmp_path / "journal.db", entries)
    journal = Journal.open(tmp_path / "journal.db")
    controller = Controller()
    for entry in entries[:30]:
        controller.fold(entry)
    wrong = controller.state.model_copy(update={"epoch": 7})
    journal.save_snapshot(30, canonical_json(wrong)).result(10.0)
    journal.close()
    assert run_verb(["replay", str(tmp_path)]) == 1
    output = capsys.readouterr()
    assert "(1 differing)" in output.out
    assert "entry 30 (" in output.err
    assert "epoch was 7" in output.err


def test_text_cannot_steer_a_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Tests that control characters in a journal's texts are not printed."""
    entries = list(played_stage().journal.entries[:30])
    event = ev.InstanceLost(at_s=entries[-1].event.at_s, instance=InstanceId("i3"), reason="\x1b[2J\x07gone\n\nfake")
    controller = Controller()
    for entry in entries:
        controller.fold(entry)
    entries.append(controller.step(event))
    written_journal(tmp_path / "journal.db", entries)
    assert run_verb(["replay", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert "\x1b" not in text
    assert "\x07" not in text
    assert "\nfake" not in text


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
