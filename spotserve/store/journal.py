"""The journal: every event and the commands it led to, in order, durable before anything acts on them.

Entries are chained: the checksum of each covers its position, its bytes and the checksum before it, starting from
the journal's identity. A flipped bit, a lost, doubled or swapped entry and a cut tail are all told by their position;
nothing is ever skipped. What a crash tore is an uncommitted transaction, which SQLite drops by itself.
"""

from __future__ import annotations

import math
import struct
import threading
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import apsw
from pydantic import ValidationError

from spotserve.core.canonical import canonical_json
from spotserve.core.controller import Entry
from spotserve.core.state import ClusterState
from spotserve.core.strict_json import shown
from spotserve.errors import InvariantError, SpotServeError, StateDirError
from spotserve.store.journal_file import (
    FRESH_HINT,
    MAX_BODY_BYTES,
    FoldSnapshot,
    JournalIdentity,
    JournalRecord,
    Link,
    chained,
    checked_link,
    corrupt,
    corruption_of,
    genesis_of,
    identity_of,
    link_before,
    link_of,
    meta_of,
    put_link,
    put_meta,
    reading,
    require_table,
    snapshot_checksum,
    snapshots_of,
    write_empty,
)
from spotserve.store.wal import check_wal
from spotserve.store.writer import Commit, Writer, open_database

RETENTION_S = 7 * 24 * 3600.0
"""Entries at least this old are cut once a snapshot of the fold stands behind them."""


@dataclass(frozen=True, slots=True)
class KeptPart:
    """What was not cut, in one view: `base` is the fold of all that was, `snapshots` are those inside `records`."""

    base: FoldSnapshot | None
    snapshots: tuple[FoldSnapshot, ...]
    records: Iterator[JournalRecord]


class Journal:
    """A journal file; `create` and `open` give one to append to, `read_only` one to look into.

    Opening verifies the whole chain. Raises StateDirError when the file is missing, corrupt or of another format.
    """

    def __init__(self, path: Path, *, writable: bool, vfs: str | None = None) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._writer: Writer | None = None
        self._last_at_s = 0.0
        if writable:
            check_wal(path)
        with corruption_of(path):
            with closing(reading(path)) as connection:
                connection.execute("BEGIN")
                require_table(path, connection, "meta")
                self.identity = identity_of(path, connection)
                for table in ("entries", "snapshots"):
                    require_table(path, connection, table)
                self._clean_stop = meta_of(path, connection, "clean_stop") == b"1"
                anchor = link_of(path, connection, "anchor")
                snapshots = snapshots_of(path, self._genesis(), connection)
            self._latest_snapshot = snapshots[-1] if snapshots else None
            self._check_origin(anchor, snapshots)
            self._first_sequence = anchor.sequence + 1
            self._tail = self._verify()
            if writable:
                self._writer = Writer(path, vfs=vfs)

    @classmethod
    def create(cls, path: Path, identity: JournalIdentity, *, vfs: str | None = None) -> Journal:
        """A new, empty journal at `path`, where none may be.

        It is built beside and renamed, so that a journal found at its place is always a whole one.
        """
        draft = path.with_name(path.name + ".new")
        for leftover in (draft, draft.with_name(draft.name + "-wal"), draft.with_name(draft.name + "-shm")):
            leftover.unlink(missing_ok=True)
        try:
            with closing(open_database(draft)) as connection:
                write_empty(connection, identity)
            draft.rename(path)
        except (apsw.Error, OSError) as error:
            raise StateDirError(f"{path} could not be created: {error}", hint="check the disk") from error
        return cls(path, writable=True, vfs=vfs)

    @classmethod
    def open(cls, path: Path, *, vfs: str | None = None) -> Journal:
        """An existing journal, to be continued."""
        return cls(path, writable=True, vfs=vfs)

    @classmethod
    def read_only(cls, path: Path) -> Journal:
        """An existing journal, to be read; a daemon may be writing it meanwhile."""
        return cls(path, writable=False)

    @property
    def clean_stop(self) -> bool:
        """True when the last daemon stopped cleanly with nothing open, and none has continued it since."""
        return self._clean_stop

    @property
    def first_sequence(self) -> int:
        """The first entry that is kept; earlier ones were cut behind a snapshot."""
        return self._first_sequence

    @property
    def next_sequence(self) -> int:
        """The sequence that the next appended entry must have."""
        return self._tail.sequence + 1

    @property
    def last_at_s(self) -> float:
        """The latest `at_s` of any entry or snapshot; 0.0 in an empty journal."""
        return self._last_at_s

    @property
    def num_commits(self) -> int:
        """Transactions committed since it was opened."""
        return self._writer.num_commits if self._writer is not None else 0

    @property
    def failure(self) -> SpotServeError | None:
        """Why nothing can be appended any more, None while all is well."""
        return self._writer.failure if self._writer is not None else None

    def append(self, records: Sequence[JournalRecord]) -> Commit[None]:
        """Append entries in one transaction; the outcome comes once they are durable.

        Raises InvariantError when a sequence does not continue the journal; then nothing was appended.
        """
        writer = self._required_writer()
        with self._lock:
            tail, rows, reopened = self._tail, [], self._clean_stop
            for record in records:
                if record.sequence != tail.sequence + 1 or not math.isfinite(record.at_s):
                    raise InvariantError(
                        f"journal entry {record.sequence} at {record.at_s} s does not follow {tail.sequence}"
                    )
                body = record.body.encode()
                if len(body) > MAX_BODY_BYTES:
                    raise InvariantError(f"journal entry {record.sequence} has {len(body)} bytes")
                tail = Link(record.sequence, chained(tail.checksum, record.sequence, record.at_s, body))
                rows.append((record.sequence, record.at_s, body, tail.checksum))

            def work(connection: apsw.Connection) -> None:
                connection.executemany("INSERT INTO entries VALUES (?, ?, ?, ?)", rows)
                put_link(connection, "head", tail)
                if reopened:
                    put_meta(connection, "clean_stop", b"0")

            self._tail, self._clean_stop = tail, False
            self._last_at_s = max([self._last_at_s, *(record.at_s for record in records)])
            return writer.submit(work)

    def read(self, from_sequence: int | None = None) -> Iterator[JournalRecord]:
        """The durable entries from `from_sequence` (by default the first kept) to the last.

        Raises StateDirError with the position of an entry that is missing or corrupt, and when `from_sequence`
        was cut or lies beyond the end.
        """
        with corruption_of(self.path), closing(reading(self.path)) as connection:
            connection.execute("BEGIN")  # One view of entries and head, whatever is appended meanwhile.
            anchor = link_of(self.path, connection, "anchor")
            yield from self._records(
                connection, anchor, anchor.sequence + 1 if from_sequence is None else from_sequence
            )

    def _records(self, connection: apsw.Connection, anchor: Link, first: int) -> Iterator[JournalRecord]:
        previous = link_before(self.path, connection, first, anchor)
        # A body that is too long is told by its length and not read into memory.
        query = (
            "SELECT sequence, at_s, CASE WHEN length(body) <= ?1 THEN body END, checksum, length(body)"
            " FROM entries WHERE sequence >= ?2 ORDER BY sequence"
        )
        for row in connection.execute(query, (MAX_BODY_BYTES, first)):
            previous = checked_link(self.path, previous, row)
            yield JournalRecord(row[0], row[1], row[2].decode())
        head = link_of(self.path, connection, "head")
        if head != previous:
            raise corrupt(self.path, previous.sequence + 1, f"is missing, the head is {head.sequence}")

    def kept(self) -> KeptPart:
        """All that was not cut. Raises StateDirError like `read`, its records too."""
        with corruption_of(self.path):
            connection = reading(self.path)
            connection.execute("BEGIN")
            anchor = link_of(self.path, connection, "anchor")
            snapshots = snapshots_of(self.path, self._genesis(), connection)
        base = next((snapshot for snapshot in snapshots if snapshot.sequence == anchor.sequence), None)
        inside = tuple(snapshot for snapshot in snapshots if snapshot.sequence > anchor.sequence)
        return KeptPart(base, inside, self._kept_records(connection, anchor))

    def _kept_records(self, connection: apsw.Connection, anchor: Link) -> Iterator[JournalRecord]:
        with corruption_of(self.path), closing(connection):
            yield from self._records(connection, anchor, anchor.sequence + 1)

    def latest_snapshot(self) -> FoldSnapshot | None:
        """The newest snapshot of the fold; where a restart begins."""
        return self._latest_snapshot

    def base_snapshot(self) -> FoldSnapshot | None:
        """The snapshot just before the first kept entry, where a replay begins; None when nothing was cut."""
        return self.kept().base

    def save_snapshot(self, sequence: int, body: str, *, retention_s: float = RETENTION_S) -> Commit[int]:
        """Store the state folded up to and including `sequence`, and cut what is older than the retention.

        Entries are cut only up to a snapshot that is itself older than `retention_s`, so a replay of the kept part
        always has a state to start from. The outcome is the first sequence that is kept.
        """
        with self._lock:
            if not self._first_sequence - 1 <= sequence <= self._tail.sequence:
                raise InvariantError(
                    f"snapshot {sequence} lies outside the journal, which ends at {self._tail.sequence}"
                )
            snapshot = FoldSnapshot(sequence, self._last_at_s, body)

            row = (sequence, snapshot.at_s, body.encode(), snapshot_checksum(self._genesis(), snapshot))

            def work(connection: apsw.Connection) -> int:
                connection.execute("INSERT OR REPLACE INTO snapshots VALUES (?, ?, ?, ?)", row)
                return _cut(connection, snapshot.at_s - retention_s)

            def publish(first_sequence: int) -> None:
                self._latest_snapshot, self._first_sequence = snapshot, first_sequence

            return self._required_writer().submit(work, publish=publish)

    def mark_clean_stop(self) -> Commit[None]:
        """Note that the daemon stopped with nothing open: the next start begins a new journal."""

        def work(connection: apsw.Connection) -> None:
            put_meta(connection, "clean_stop", b"1")

        return self._required_writer().submit(work)

    def close(self) -> None:
        """Commit what is queued and close the file."""
        if self._writer is not None:
            self._writer.close()

    def _check_origin(self, anchor: Link, snapshots: list[FoldSnapshot]) -> None:
        """The chain begins with the identity, or where a snapshot that belongs to it stands."""
        if anchor.sequence == self.identity.first_sequence - 1:
            if anchor.checksum != self._genesis():
                raise StateDirError(f"{self.path} is corrupt: its identity was changed", hint=FRESH_HINT)
        elif all(snapshot.sequence != anchor.sequence for snapshot in snapshots):
            raise corrupt(self.path, anchor.sequence, "was cut without a snapshot")

    def _verify(self) -> Link:
        """Read the whole chain; returns its end."""
        last_at_s = self._latest_snapshot.at_s if self._latest_snapshot is not None else 0.0
        for record in self.read():
            last_at_s = max(last_at_s, record.at_s)
        self._last_at_s = last_at_s
        with closing(reading(self.path)) as connection:
            return link_of(self.path, connection, "head")

    def _genesis(self) -> bytes:
        return genesis_of(self.identity)

    def _required_writer(self) -> Writer:
        if self._writer is None:
            raise InvariantError(f"{self.path.name} was opened to be read only")
        return self._writer


class EntryJournal:
    """The journal as the controller's loop sees it (`core.loop.JournalPort`): entries in, entries out."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal

    async def append(self, entries: Sequence[Entry]) -> None:
        """One durable commit of all entries."""
        await self._journal.append(
            [JournalRecord(entry.sequence, entry.event.at_s, canonical_json(entry)) for entry in entries]
        )

    def read(self, from_sequence: int | None = None) -> Iterator[Entry]:
        """The durable entries. Raises StateDirError like `Journal.read`, and for one of another version."""
        for record in self._journal.read(from_sequence):
            yield entry_of(self._journal.path, record)


def entry_of(path: Path, record: JournalRecord) -> Entry:
    """The entry in a record. Raises StateDirError if it is none of this version, or that of another place."""
    try:
        entry = Entry.model_validate_json(record.body)
    except ValidationError as error:
        raise _other_version(path, f"entry {record.sequence}", error) from error
    if entry.sequence != record.sequence:
        raise corrupt(path, record.sequence, f"calls itself entry {entry.sequence}")
    if entry.event.at_s != record.at_s:
        raise corrupt(path, record.sequence, f"happened at {entry.event.at_s} s and is filed at {record.at_s} s")
    return entry


def state_of(path: Path, snapshot: FoldSnapshot) -> ClusterState:
    """The state in a fold snapshot. Raises StateDirError if it is none of this version."""
    try:
        return ClusterState.model_validate_json(snapshot.body)
    except ValidationError as error:
        raise _other_version(path, f"the snapshot after entry {snapshot.sequence}", error) from error


def _other_version(path: Path, what: str, error: ValidationError) -> StateDirError:
    first = error.errors(include_url=False, include_input=False)[0]
    where = shown(".".join(str(part) for part in first["loc"]) or "its JSON", 120)
    return StateDirError(
        f"{path} {what} is not one of this version: {where}: {shown(first['msg'], 200)}", hint=FRESH_HINT
    )


def _cut(connection: apsw.Connection, before_s: float) -> int:
    """Delete what lies behind the newest snapshot older than `before_s`; returns the first sequence kept."""
    query = "SELECT max(sequence) FROM snapshots WHERE at_s < ?"
    sequence = connection.execute(query, (before_s,)).get
    row = connection.execute("SELECT checksum FROM entries WHERE sequence = ?", (sequence,)).fetchone()
    if row is not None:
        put_link(connection, "anchor", Link(sequence, row[0]))
        connection.execute("DELETE FROM entries WHERE sequence <= ?", (sequence,))
        connection.execute("DELETE FROM snapshots WHERE sequence < ?", (sequence,))
    value = connection.execute("SELECT value FROM meta WHERE key = 'anchor'").get
    return int(struct.unpack(">q", value[:8])[0]) + 1
