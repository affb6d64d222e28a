"""Damaged, truncated and hostile journals: a precise line and exit code 1, never a crash, never a silent skip."""

from __future__ import annotations

import json
import os
import random
import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import apsw
import pytest

from spotserve.cli.main import run_verb
from spotserve.cli.replay_text import replay_text
from spotserve.core.canonical import canonical_json
from spotserve.core.controller import Entry
from spotserve.core.replay_report import replay_report
from spotserve.errors import StateDirError
from spotserve.store import journal as journal_module
from spotserve.store import journal_file, recording
from spotserve.store.journal import Journal
from spotserve.store.journal_file import JournalRecord
from spotserve.store.recording import read_recording
from tests.golden_journals.reading import FOLDER, entries_of
from tests.store.conftest import TIMEOUT_S, identity

GOLDEN = "v1-notice"
READING = (["replay"], ["replay", "--json", "--until", "3"], ["inspect"], ["inspect", "--request", "x"])
"""Every way to read a journal."""

ENDLESS_VIEW = (
    "CREATE VIEW {} AS WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n)"
    " SELECT i AS key, i AS value, i AS sequence FROM n"
)

Refused = Callable[[Path], str]


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Refused:
    """Has every verb read a journal; gives the one line that all of them refuse it with."""

    def run(path: Path) -> str:
        lines = set()
        for verb, *options in READING:
            code = run_verb([verb, str(path), *options])
            output = capsys.readouterr()
            assert (code, output.out) == (1, ""), (verb, output)
            first, *rest = output.err.splitlines()
            assert len(rest) <= 1
            assert all(line.startswith("hint: ") and "--fresh" not in line for line in rest), rest
            lines.add(first.removeprefix("error: "))
        assert len(lines) == 1, lines
        return lines.pop()

    return run


@pytest.fixture
def golden(tmp_path: Path) -> Path:
    """A copy of a golden journal."""
    return Path(shutil.copy(FOLDER / f"{GOLDEN}.db", tmp_path / "journal.db"))


def damaged(path: Path, statement: str, *values: object) -> Path:
    """The journal after an SQL statement that no daemon makes."""
    with closing(apsw.Connection(str(path))) as connection:
        connection.execute(statement, values)
    return path


def written(path: Path, bodies: list[str], *, at_s: list[float] | None = None) -> Path:
    """A whole journal, checksums and all, whose records hold these texts."""
    journal = Journal.create(path, identity())
    times = at_s or [0.0] * len(bodies)
    records = [JournalRecord(n, moment, body) for n, (moment, body) in enumerate(zip(times, bodies, strict=True), 1)]
    journal.append(records).result(TIMEOUT_S)
    journal.close()
    return path


def bodies_of(entries: list[Entry]) -> list[str]:
    """The JSON of entries."""
    return [canonical_json(entry) for entry in entries]


def timer(sequence: int, **fields: object) -> str:
    """The JSON of a quiet entry, or of one that only looks like it."""
    event = {"kind": "timer_fired", "at_s": 0.0, "timer": "none", **fields}
    return json.dumps({"sequence": sequence, "event": event, "commands": []})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "it is empty"),
        (b"\0", "table meta is missing|not a database"),
        (b"garbage" * 1000, "file is not a database"),
        (b'{"events": []}\n', "not a database"),
        (b"SQLite format 3\0" + b"\xff" * 4096, "malformed|not a database|disk"),
    ],
)
def test_what_is_no_journal(content: bytes, message: str, tmp_path: Path, refused: Refused) -> None:
    """Tests that files of anything else are refused by what they are not."""
    path = tmp_path / "journal.db"
    path.write_bytes(content)
    line = refused(path)
    assert line.startswith(f"{path} ")
    assert any(part in line for part in message.split("|")), line


def test_what_is_no_file(tmp_path: Path, refused: Refused) -> None:
    """Tests that a pipe, a device, a folder without a journal and nothing at all are refused at once."""
    os.mkfifo(tmp_path / "pipe")
    assert refused(tmp_path / "pipe") == f"{tmp_path}/pipe cannot be read: it is not a regular file"
    assert refused(Path("/dev/null")) == "/dev/null cannot be read: it is not a regular file"
    assert refused(tmp_path) == f"{tmp_path}/journal.db is not there"
    assert refused(tmp_path / "none.db") == f"{tmp_path}/none.db is not there"
    (tmp_path / "journal.db").mkdir()
    assert refused(tmp_path) == f"{tmp_path}/journal.db cannot be read: it is a directory"
    assert refused(tmp_path / ("x" * 300)).endswith("File name too long")


@pytest.mark.parametrize("suffix", ["-wal", "-shm"])
def test_a_pipe_in_the_place_of_the_log(suffix: str, golden: Path, refused: Refused) -> None:
    """Tests that what SQLite would open beside the journal, and wait on, is refused as well."""
    os.mkfifo(golden.with_name(f"journal.db{suffix}"))
    assert refused(golden).endswith(f"journal.db{suffix} cannot be read: it is not a regular file")


def test_no_permission(golden: Path, monkeypatch: pytest.MonkeyPatch, refused: Refused) -> None:
    """Tests that a journal that may not be read is refused by that reason, which SQLite does not tell."""
    golden.chmod(0)
    if os.access(golden, os.R_OK):  # Root may read anything: SQLite's answer to others is put in its place.
        refusal = apsw.CantOpenError("unable to open database file")
        monkeypatch.setattr(journal_file, "open_database", lambda *args, **options: (_ for _ in ()).throw(refusal))
        monkeypatch.setattr(recording, "check_wal", lambda path: None)
        monkeypatch.setattr(os, "access", lambda path, mode: mode != os.R_OK)
        golden.with_name("journal.db-wal").touch()
    assert refused(golden) == f"{golden} cannot be read: permission denied"


@pytest.mark.parametrize("table", ["meta", "entries", "snapshots"])
def test_a_missing_table(table: str, golden: Path, refused: Refused) -> None:
    """Tests that a journal without one of its tables is refused by its name."""
    assert refused(damaged(golden, f"DROP TABLE {table}")) == f"{golden} is corrupt: its table {table} is missing"


@pytest.mark.parametrize("table", ["meta", "entries", "snapshots"])
def test_a_view_in_the_place_of_a_table(table: str, golden: Path, refused: Refused) -> None:
    """Tests that a view that would compute for ever is never asked."""
    damaged(golden, f"DROP TABLE {table}")
    damaged(golden, ENDLESS_VIEW.format(table))
    assert refused(golden) == f"{golden} is corrupt: its {table} is not the table that a daemon makes"


@pytest.mark.parametrize(
    ("statement", "message"),
    [
        ("DELETE FROM entries WHERE sequence = 30", "is corrupt: entry 30 is missing, the next is 31"),
        ("DELETE FROM entries WHERE sequence > 55", "is corrupt: entry 56 is missing, the head is 61"),
        ("DELETE FROM entries", "is corrupt: entry 1 is missing, the head is 61"),
        ("UPDATE entries SET sequence = 900 WHERE sequence = 61", "is corrupt: entry 61 is missing, the next is 900"),
        ("UPDATE entries SET at_s = 9e999 WHERE sequence = 8", "is corrupt: entry 8 does not match its checksum"),
        ("UPDATE entries SET body = zeroblob(9) WHERE sequence = 8", "is corrupt: entry 8 does not match its checksum"),
        ("UPDATE entries SET body = 'text' WHERE sequence = 8", "is corrupt: entry 8 has fields of other types"),
        ("UPDATE entries SET body = 7 WHERE sequence = 8", "is corrupt: entry 8 has fields of other types"),
        ("UPDATE entries SET checksum = 'x' WHERE sequence = 8", "is corrupt: entry 8 does not match its checksum"),
        ("UPDATE meta SET value = zeroblob(40) WHERE key = 'head'", "is corrupt: entry 62 is missing, the head is 0"),
        ("INSERT INTO snapshots VALUES (9, 1.0, x'00', x'00')", "entry 9 has a snapshot that does not match its"),
    ],
)
def test_a_changed_record(statement: str, message: str, golden: Path, refused: Refused) -> None:
    """Tests that a lost, moved, cut or changed record is told by its position."""
    assert message in refused(damaged(golden, statement))


def test_a_journal_of_the_future(golden: Path, refused: Refused) -> None:
    """Tests that another format version is told by both numbers, whatever its tables are."""
    with closing(apsw.Connection(str(golden))) as connection:
        row = connection.execute("SELECT value FROM meta WHERE key = 'identity'").fetchone()
        assert row is not None
        later = json.dumps({**json.loads(row[0]), "format_version": "7.0"}).encode()
        connection.execute("UPDATE meta SET value = ? WHERE key = 'identity'", (later,))
        connection.execute("DROP TABLE snapshots")
    assert refused(golden) == f"{golden} has format_version 7.0, not 0.1"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (timer(3, kind="sun_rose"), "entry 3 is not one of this version: event: "),
        (timer(3, colour="red"), "entry 3 is not one of this version: event.timer_fired.colour: "),
        (timer(3, at_s=-1.0), "entry 3 is not one of this version: event.timer_fired.at_s: "),
        (timer(3).replace("0.0", "1e999"), "entry 3 is not one of this version"),
        (timer(3).replace("0.0", "NaN"), "entry 3 is not one of this version"),
        (timer(3).replace('"none"', '"\\ud800"'), "entry 3 is not one of this version"),
        (timer(3).replace("0.0", "1" * 5000), "entry 3 is not one of this version"),
        (timer(2), "is corrupt: entry 3 calls itself entry 2"),
        (timer(3, at_s=2.5), "is corrupt: entry 3 happened at 2.5 s and is filed at 0.0 s"),
        ("", "entry 3 is not one of this version: its JSON: "),
        ("[" * 100_000, "entry 3 is not one of this version: its JSON: "),
        ('{"sequence":' * 50_000, "entry 3 is not one of this version: its JSON: "),
        ("\x1b[31m", "entry 3 is not one of this version: its JSON: "),
        (
            json.dumps({"sequence": 3, "event": {"kind": "timer_fired", "at_s": 0.0, "timer": "x"}, "commands": [{}]}),
            "entry 3 is not one of this version: commands.0",
        ),
    ],
)
def test_a_record_with_a_right_checksum_and_a_wrong_body(
    body: str, message: str, tmp_path: Path, refused: Refused
) -> None:
    """Tests that an entry that is none is told by its position and by what is wrong in it, in one line."""
    line = refused(written(tmp_path / "journal.db", [timer(1), timer(2), body, timer(4)]))
    assert message in line
    assert line.isprintable()
    assert len(line) < 600


def test_a_body_that_is_no_text(tmp_path: Path, refused: Refused) -> None:
    """Tests that bytes that are not UTF-8 are refused even if their checksum is right."""
    path = written(tmp_path / "journal.db", [timer(1)])
    body = b"\xff\xfe"
    with closing(apsw.Connection(str(path))) as connection:
        previous = connection.execute("SELECT checksum FROM entries WHERE sequence = 1").get
        checksum = journal_file.chained(previous, 2, 0.0, body)
        connection.execute("INSERT INTO entries VALUES (2, 0.0, ?, ?)", (body, checksum))
        journal_file.put_link(connection, "head", journal_file.Link(2, checksum))
    assert "cannot be read: " in refused(path)


def test_a_huge_record_is_told_by_its_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: Refused) -> None:
    """Tests that a record beyond the bound is refused by its length, and that the writer keeps to the same bound."""
    path = written(tmp_path / "journal.db", [timer(1), timer(2, timer="x" * 5000), timer(3)])
    for module in (journal_file, journal_module):
        monkeypatch.setattr(module, "MAX_BODY_BYTES", 4000)
    assert refused(path).endswith("bytes, more than 4000")
    assert "is corrupt: entry 2 has " in refused(path)
    with pytest.raises(Exception, match=r"entry 1 has 5\d\d\d bytes"):
        written(tmp_path / "other.db", [timer(1, timer="x" * 5000)])


@pytest.mark.parametrize("body", ["not json", "[" * 10_000, '{"epoch": -1, "unknown": 3}', "[]", '"state"'])
def test_a_snapshot_that_is_no_state(body: str, tmp_path: Path, refused: Refused) -> None:
    """Tests that the base of a cut journal that is no state is told by the entry it is after."""
    path = written(tmp_path / "journal.db", [timer(1, at_s=0.0), timer(2, at_s=0.0)])
    journal = Journal.open(path)
    journal.save_snapshot(1, body).result(TIMEOUT_S)
    journal.append([JournalRecord(3, 99.0, timer(3, at_s=99.0))]).result(TIMEOUT_S)
    journal.save_snapshot(3, "{}", retention_s=10.0).result(TIMEOUT_S)
    assert journal.first_sequence == 2
    journal.close()
    assert "the snapshot after entry 1 is not one of this version: " in refused(path)


def test_an_older_snapshot_inside_is_told_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Tests that a snapshot inside the journal that is no JSON, or another value than a state, exits 1."""
    path = written(tmp_path / "journal.db", [timer(1), timer(2)])
    journal = Journal.open(path)
    journal.save_snapshot(1, "not json").result(TIMEOUT_S)
    journal.close()
    assert run_verb(["replay", str(path)]) == 1
    assert "the snapshot after entry 1 is not JSON" in capsys.readouterr().err
    journal = Journal.open(path)
    journal.save_snapshot(1, '["no state"]').result(TIMEOUT_S)
    journal.close()
    assert run_verb(["replay", str(path)]) == 1
    assert "entry 1 (timer_fired): folds to another state" in capsys.readouterr().err


def test_an_entry_that_cannot_follow(tmp_path: Path, refused: Refused) -> None:
    """Tests that a whole, well-formed journal that no daemon wrote is told by the entry that cannot be."""
    kill = {"kind": "kill_instance", "instance": "i7", "reason": "none"}
    body = json.dumps({**json.loads(timer(2)), "commands": [kill]})
    line = refused(written(tmp_path / "journal.db", [timer(1), body]))
    assert line == "entry 2 (timer_fired) cannot be folded: KeyError: 'i7'"


def test_entries_that_nobody_wrote(tmp_path: Path, rng: random.Random) -> None:
    """Tests that journals of right checksums with changed, moved, lost and doubled entries are told or refused."""
    entries = [json.loads(canonical_json(entry)) for entry in entries_of("v1-kill")]
    outcomes = {"refused": 0, "told": 0}
    for number in range(40):
        documents = json.loads(json.dumps(entries))
        for _ in range(rng.choice((1, 1, 3))):
            spoil(documents, rng)
        for sequence, document in enumerate(documents, 1):
            document["sequence"] = sequence
        times = [float(document["event"].get("at_s", 0.0)) for document in documents]
        path = written(tmp_path / f"{number}.db", [json.dumps(document) for document in documents], at_s=times)
        try:
            report = replay_text({**reported(path), "journal": dict.fromkeys(("path", "began", "ended", "clean_stop"))})
            assert "Timeline" in report
            outcomes["told"] += 1
        except StateDirError:
            outcomes["refused"] += 1
    assert min(outcomes.values()) > 5, outcomes


def spoil(documents: list[dict[str, Any]], rng: random.Random) -> None:
    """Make one thing of a journal another."""
    kind = rng.choice(("lose", "swap", "double", "number", "name", "name"))
    first, second = rng.randrange(len(documents)), rng.randrange(len(documents))
    if kind == "lose":
        documents.pop(first)
    elif kind == "swap":
        documents[first], documents[second] = documents[second], documents[first]
    elif kind == "double":
        documents.insert(first, json.loads(json.dumps(documents[second])))
    else:
        event = documents[first]["event"]
        fields = [name for name, value in event.items() if isinstance(value, str if kind == "name" else int | float)]
        for field in rng.sample(fields, min(1, len(fields))):
            names = ("i0", "i9", "r1.1", "r3", "s1", "none", "timer_fired", "request_ended", "quiesced")
            event[field] = rng.choice(names) if kind == "name" else rng.choice((0, 1, -1, 2**53, 1e300))


def test_flipped_bits(golden: Path, rng: random.Random) -> None:
    """Tests that with any bit flipped the journal is refused, or replays to the very same report."""
    whole = golden.read_bytes()
    expected = reported(golden)
    outcomes = {"refused": 0, "same": 0}
    for _ in range(120):
        flipped = bytearray(whole)
        flipped[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
        golden.write_bytes(flipped)
        try:
            assert reported(golden) == expected
            outcomes["same"] += 1
        except StateDirError:
            outcomes["refused"] += 1
    assert outcomes["refused"] > 40, outcomes


def test_truncated_files(golden: Path) -> None:
    """Tests that a file that lost its end is refused wherever it was cut."""
    whole = golden.read_bytes()
    for kept in (1, 15, 16, 99, 100, 1000, *range(4096, len(whole), 12_288), len(whole) - 1):
        golden.write_bytes(whole[:kept])
        with pytest.raises(StateDirError) as told:
            reported(golden)
        assert told.value.message.startswith(str(golden))


def reported(path: Path) -> dict[str, Any]:
    """The whole replay of a journal; no log of an earlier file stays beside it."""
    for suffix in ("-wal", "-shm"):
        path.with_name(path.name + suffix).unlink(missing_ok=True)
    source = read_recording(path)
    return replay_report(source.base, source.entries, snapshots=source.snapshots)


def crashed(tmp_path: Path, num_commits: int = 8) -> tuple[Path, bytes]:
    """A journal as a killed daemon leaves it, all its entries in the log, and the log."""
    journal = Journal.create(tmp_path / "running.db", identity())
    for entry in entries_of(GOLDEN)[:num_commits]:
        body = canonical_json(entry)
        journal.append([JournalRecord(entry.sequence, entry.event.at_s, body)]).result(TIMEOUT_S)
    folder = tmp_path / "crashed"
    folder.mkdir()
    shutil.copy(tmp_path / "running.db", folder / "journal.db")
    log = (tmp_path / "running.db-wal").read_bytes()
    journal.close()
    return folder / "journal.db", log


def test_a_damaged_log_is_told(tmp_path: Path) -> None:
    """Tests that a flipped bit in a dead daemon's log is refused, or costs the last transaction at most."""
    path, log = crashed(tmp_path)
    (path.parent / "pid").write_text("999999999\n")
    num_refused = 0
    for offset in range(0, len(log), 1511):
        flipped = bytearray(log)
        flipped[offset] ^= 1
        path.with_name("journal.db-shm").unlink(missing_ok=True)
        path.with_name("journal.db-wal").write_bytes(flipped)
        try:
            assert len(list(read_recording(path).entries)) >= 7, offset
        except StateDirError:
            num_refused += 1
    assert num_refused > 10


def test_a_living_daemon_is_not_accused(tmp_path: Path) -> None:
    """Tests that beside the pid of a living process the log is not judged: it grows while it is read."""
    path, log = crashed(tmp_path)
    path.with_name("journal.db-wal").write_bytes(log[: len(log) // 2] + b"\xff" + log[len(log) // 2 + 1 :])
    with pytest.raises(StateDirError, match="is damaged and"):
        read_recording(path)
    path.with_name("journal.db-shm").unlink(missing_ok=True)
    (path.parent / "pid").write_text(f"{os.getpid()}\n")
    assert len(list(read_recording(path).entries)) < 8


def test_no_entry_of_a_dead_daemon_is_lost(tmp_path: Path) -> None:
    """Tests that entries that are only in the log of a killed daemon are replayed."""
    path, log = crashed(tmp_path)
    path.with_name("journal.db-wal").write_bytes(log)
    assert [entry.sequence for entry in read_recording(path).entries] == list(range(1, 9))
    assert log == path.with_name("journal.db-wal").read_bytes(), "the daemon that comes back finds its log"


def test_reading_changes_nothing(golden: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Tests that replay and inspect leave the bytes of a journal as they are."""
    before = golden.read_bytes()
    assert run_verb(["replay", str(golden)]) == 0
    assert run_verb(["inspect", str(golden)]) == 0
    assert before == golden.read_bytes()
    capsys.readouterr()


def test_another_program_s_database(tmp_path: Path, refused: Refused) -> None:
    """Tests that a database that holds something else is refused by the table it lacks."""
    with closing(sqlite3.connect(tmp_path / "other.db")) as connection:
        connection.execute("CREATE TABLE songs (name TEXT)")
    assert refused(tmp_path / "other.db").endswith("is corrupt: its table meta is missing")
