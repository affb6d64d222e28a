"""The journal gives back exactly what was appended, or names the entry that is damaged."""

from __future__ import annotations

import asyncio
import os
import shutil
from contextlib import closing
from pathlib import Path

import apsw
import pytest

from spotserve.core.controller import Entry
from spotserve.core.events import InstanceWanted
from spotserve.errors import InvariantError, StateDirError
from spotserve.store.journal import EntryJournal, Journal
from spotserve.store.journal_file import JournalRecord
from tests.store.conftest import TIMEOUT_S, identity, records


def reopened(path: Path) -> list[JournalRecord]:
    """What a start would find."""
    with closing(Journal.open(path)) as journal:
        return list(journal.read())


def test_entries_come_back_in_order(journal: Journal) -> None:
    """Tests that each append is one commit and that a reopened journal has the entries, the clock and the identity."""
    before = journal.num_commits
    journal.append(records(1, 3)).result(TIMEOUT_S)
    journal.append(records(4, 4)).result(TIMEOUT_S)
    assert 2 == journal.num_commits - before
    journal.close()
    with closing(Journal.open(journal.path)) as again:
        assert records(1, 4) == list(again.read())
        assert records(3, 4) == list(again.read(3))
        assert (5, 4.0, identity()) == (again.next_sequence, again.last_at_s, again.identity)
        assert [] == list(again.read(5))


def test_a_sequence_that_does_not_follow_is_refused(journal: Journal) -> None:
    """Tests that a skipped or repeated sequence, and a time that is no number, append nothing of their call."""
    journal.append(records(1, 2)).result(TIMEOUT_S)
    nan = JournalRecord(3, float("nan"), "{}")
    for refused in (records(4, 4), records(2, 2), [*records(3, 3), *records(5, 5)], [nan]):
        with pytest.raises(InvariantError, match="does not follow"):
            journal.append(refused)
    journal.append(records(3, 3)).result(TIMEOUT_S)
    assert records(1, 3) == list(journal.read())


def test_entries_of_the_controller_come_back_equal(journal: Journal) -> None:
    """Tests that the loop's entries are journaled and read back as the same values."""
    entries = EntryJournal(journal)
    stepped = [Entry(sequence=number, event=InstanceWanted(at_s=number / 3)) for number in (1, 2)]
    asyncio.run(entries.append(stepped))
    assert stepped == list(entries.read())


def test_an_entry_of_another_version_names_its_position(journal: Journal) -> None:
    """Tests that a valid record that is no entry of this version is refused by its sequence."""
    journal.append(records(1, 1)).result(TIMEOUT_S)
    with pytest.raises(StateDirError, match="entry 1 is not one of this version"):
        list(EntryJournal(journal).read())


@pytest.mark.parametrize(
    ("damage", "position"),
    [
        ("UPDATE entries SET body = cast(replace(body, 'x', 'y') AS BLOB) WHERE sequence = 3", 3),
        ("UPDATE entries SET body = cast(body AS TEXT) WHERE sequence = 3", 3),
        ("UPDATE entries SET at_s = at_s + 1 WHERE sequence = 4", 4),
        ("UPDATE entries SET checksum = zeroblob(32) WHERE sequence = 1", 1),
        ("DELETE FROM entries WHERE sequence = 1", 1),
        ("DELETE FROM entries WHERE sequence = 3", 3),
        ("DELETE FROM entries WHERE sequence = 5", 5),
        ("DELETE FROM entries WHERE sequence > 2", 3),
        (
            "UPDATE entries SET sequence = 99 WHERE sequence = 2; UPDATE entries SET sequence = 2 WHERE sequence = 3;"
            "UPDATE entries SET sequence = 3 WHERE sequence = 99",
            2,
        ),
    ],
)
def test_a_damaged_entry_stops_the_start_with_its_position(journal: Journal, damage: str, position: int) -> None:
    """Tests that a changed, lost, cut or swapped entry is told by the first wrong position."""
    journal.append(records(1, 5)).result(TIMEOUT_S)
    journal.close()
    with closing(apsw.Connection(str(journal.path))) as connection:
        connection.execute(damage)
    with pytest.raises(StateDirError, match=f"is corrupt: entry {position} "):
        Journal.open(journal.path)
    with pytest.raises(StateDirError, match=f"is corrupt: entry {position} "):
        Journal.read_only(journal.path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            "UPDATE meta SET value = cast(replace(value, 'sha256:aa', 'sha256:ab') AS BLOB) WHERE key = 'identity'",
            "its identity was changed",
        ),
        ("UPDATE meta SET value = x'7b' WHERE key = 'identity'", "its identity cannot be read"),
        ("UPDATE meta SET value = x'00' WHERE key = 'anchor'", "its anchor has 1 bytes, not 40"),
        (
            "UPDATE meta SET value = (SELECT cast(x'0000000000000002' || checksum AS BLOB) FROM entries"
            " WHERE sequence = 2) WHERE key = 'anchor'; DELETE FROM entries WHERE sequence <= 2",
            "entry 2 was cut without a snapshot",
        ),
    ],
)
def test_changed_meta_data_stops_the_start(journal: Journal, damage: str, message: str) -> None:
    """Tests that a journal whose identity or beginning was changed is refused by what is wrong with it."""
    journal.append(records(1, 5)).result(TIMEOUT_S)
    journal.close()
    with closing(apsw.Connection(str(journal.path))) as connection:
        connection.execute(damage)
    with pytest.raises(StateDirError, match=message):
        Journal.open(journal.path)


@pytest.mark.parametrize("key", ["identity", "anchor", "head"])
def test_missing_meta_data_stops_the_start(journal: Journal, key: str) -> None:
    """Tests that a journal without its identity, anchor or head is refused by the name of what is missing."""
    journal.close()
    with closing(apsw.Connection(str(journal.path))) as connection:
        connection.execute("DELETE FROM meta WHERE key = ?", (key,))
    with pytest.raises(StateDirError, match=f"its {key} is missing"):
        Journal.open(journal.path)


def test_a_flipped_bit_anywhere_is_never_read_as_something_else(journal: Journal, tmp_path: Path) -> None:
    """Tests that with a bit flipped at every 64th byte a journal is refused, or reads exactly as before."""
    journal.append(records(1, 40)).result(TIMEOUT_S)
    journal.close()
    whole = journal.path.read_bytes()
    damaged = tmp_path / "damaged" / "journal.db"
    damaged.parent.mkdir()
    num_refused = 0
    for offset in range(0, len(whole), 64):
        flipped = bytearray(whole)
        flipped[offset] ^= 1 << (offset // 64 % 8)
        damaged.write_bytes(flipped)
        try:
            with closing(Journal.read_only(damaged)) as opened:
                found = (opened.identity, list(opened.read()))
        except StateDirError:
            num_refused += 1
        else:
            assert (identity(), records(1, 40)) == found, f"bit flipped at {offset}"
    assert num_refused > len(whole) // 64 // 8


@pytest.mark.parametrize("kept", [0, 1, 99, 4096, 10_000])
def test_a_cut_file_is_refused(journal: Journal, kept: int) -> None:
    """Tests that a database file that lost its end, or all of it, is refused and not taken for a new one."""
    journal.append(records(1, 200)).result(TIMEOUT_S)
    journal.close()
    journal.path.write_bytes(journal.path.read_bytes()[:kept])
    with pytest.raises(StateDirError, match=r"corrupt|cannot be read|missing"):
        Journal.open(journal.path)


def crashed_copy(journal: Journal, folder: Path, wal: bytes) -> Path:
    """The files as a power cut leaves them: the WAL holds `wal`, the shared memory is gone."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    shutil.copy(journal.path, folder)
    (folder / "journal.db-wal").write_bytes(wal)
    return folder / "journal.db"


def grown_wal(journal: Journal, num_entries: int) -> tuple[bytes, list[int]]:
    """The WAL after that many appends, and its length when each was acknowledged."""
    wal, lengths = journal.path.with_name("journal.db-wal"), []
    for record in records(1, num_entries):
        journal.append([record]).result(TIMEOUT_S)
        lengths.append(wal.stat().st_size)
    return wal.read_bytes(), lengths


def test_a_torn_write_loses_no_acknowledged_entry(journal: Journal, tmp_path: Path) -> None:
    """Tests that a log cut at any length has every entry acknowledged by then, in order, and goes on from there."""
    wal, lengths = grown_wal(journal, 8)
    for length in sorted({*range(0, len(wal), 1511), *lengths, *(length - 1 for length in lengths)}):
        path = crashed_copy(journal, tmp_path / "crashed", wal[:length])
        acknowledged = sum(known <= length for known in lengths)
        assert records(1, acknowledged) == reopened(path), f"cut at {length}"


def test_damage_inside_the_log_stops_the_start(journal: Journal, tmp_path: Path) -> None:
    """Tests that a bit flipped in the log, at every 311th byte, is refused or loses the last transaction at most.

    Damage there cannot be told from a write that the crash tore.
    """
    wal, lengths = grown_wal(journal, 8)
    num_refused = 0
    for offset in range(0, len(wal), 311):
        flipped = bytearray(wal)
        flipped[offset] ^= 1 << (offset % 8)
        path = crashed_copy(journal, tmp_path / "crashed", bytes(flipped))
        try:
            found = reopened(path)
        except StateDirError:
            num_refused += 1
        else:
            least = 8 if offset < lengths[-2] else 7
            assert found in (records(1, least), records(1, 8)), f"bit flipped at {offset}"
    assert num_refused > len(wal) // 311 // 2


def test_cutting_behind_an_old_snapshot(journal: Journal) -> None:
    """Tests that entries are cut only behind a snapshot past the retention, and that what is kept still verifies."""
    journal.append(records(1, 20)).result(TIMEOUT_S)
    journal.save_snapshot(20, '{"folded":20}', retention_s=100.0).result(TIMEOUT_S)
    journal.append([JournalRecord(21, 60.0, "{}"), JournalRecord(22, 121.0, "{}")]).result(TIMEOUT_S)
    assert 1 == journal.first_sequence
    assert journal.base_snapshot() is None
    assert 21 == journal.save_snapshot(22, '{"folded":22}', retention_s=100.0).result(TIMEOUT_S)
    journal.close()

    with closing(Journal.open(journal.path)) as again:
        latest, base = again.latest_snapshot(), again.base_snapshot()
        assert latest is not None
        assert base is not None
        assert ((22, '{"folded":22}'), (20, '{"folded":20}')) == (
            (latest.sequence, latest.body),
            (base.sequence, base.body),
        )
        assert (21, 23, 121.0) == (again.first_sequence, again.next_sequence, again.last_at_s)
        assert [21, 22] == [record.sequence for record in again.read()]
        with pytest.raises(StateDirError, match="entry 4 is missing"):
            list(again.read(5))
        again.append([JournalRecord(23, 122.0, "{}")]).result(TIMEOUT_S)
        with pytest.raises(InvariantError, match="snapshot 24 lies outside"):
            again.save_snapshot(24, "{}")
    with closing(apsw.Connection(str(journal.path))) as connection:
        connection.execute("UPDATE snapshots SET body = x'7b7d' WHERE sequence = 20")
    with pytest.raises(StateDirError, match="entry 20 has a snapshot that does not match"):
        Journal.open(journal.path)


def test_a_clean_stop_is_noted_until_the_next_entry(journal: Journal) -> None:
    """Tests that the note of a clean stop is there after a reopening, and gone with the first entry after it."""
    journal.append(records(1, 1)).result(TIMEOUT_S)
    journal.mark_clean_stop().result(TIMEOUT_S)
    journal.close()
    with closing(Journal.open(journal.path)) as again:
        assert again.clean_stop
        again.append(records(2, 2)).result(TIMEOUT_S)
    with closing(Journal.open(journal.path)) as last:
        assert not last.clean_stop


def test_a_journal_is_read_while_it_is_written(journal: Journal) -> None:
    """Tests that a reader sees the durable entries of a running daemon, in one view, and cannot append."""
    journal.append(records(1, 3)).result(TIMEOUT_S)
    reader = Journal.read_only(journal.path)
    reading = reader.read()
    first = next(reading)
    journal.append(records(4, 5)).result(TIMEOUT_S)
    assert records(1, 3) == [first, *reading]
    assert records(1, 5) == list(reader.read())
    with pytest.raises(InvariantError, match="read only"):
        reader.append(records(6, 6))


def test_a_closed_journal_is_read_where_nothing_can_be_written(
    journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tests that a closed journal in a folder without write permission is read, and nothing put beside it."""
    journal.append(records(1, 3)).result(TIMEOUT_S)
    journal.close()
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    reader = Journal.read_only(journal.path)
    reading = reader.read()
    assert records(1, 3)[0] == next(reading)
    assert [journal.path] == list(journal.path.parent.iterdir())


def test_another_format_version_is_refused(tmp_path: Path) -> None:
    """Tests that a journal of another format version is refused and the message names both."""
    other = identity().model_copy(update={"format_version": "9.0"})
    with pytest.raises(StateDirError, match=r"format_version 9\.0, not 0\.1"):
        Journal.create(tmp_path / "journal.db", other)


def test_a_missing_journal_is_refused(tmp_path: Path) -> None:
    """Tests that reading no journal is an error that names the path, and creates nothing."""
    with pytest.raises(StateDirError, match=r"none\.db cannot be read"):
        Journal.read_only(tmp_path / "none.db")
    assert [] == list(tmp_path.iterdir())
