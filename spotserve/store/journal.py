"""The journal: every event and the commands it led to, in order, durable before anything acts on them.

Entries are chained: the checksum of each covers its position, its bytes and the checksum before it, starting from
the journal's identity. A flipped bit, a lost, doubled or swapped entry and a cut tail are all told by their position;
nothing is ever skipped. What a crash tore is an uncommitted transaction, which SQLite drops by itself.
"""

from __future__ import annotations

import hashlib
import math
import os
import struct
import threading
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import apsw
from pydantic import ValidationError

from spotserve.core.canonical import canonical_json
from spotserve.core.controller import Entry
from spotserve.core.frozen import Frozen
from spotserve.errors import InvariantError, SpotServeError, StateDirError
from spotserve.store.wal import check_wal
from spotserve.store.writer import Commit, Writer, open_database

FORMAT_VERSION = "0.1"
RETENTION_S = 7 * 24 * 3600.0
"""Entries at least this old are cut once a snapshot of the fold stands behind them."""

_LINK_BYTES = 8 + 32
_FRESH_HINT = "start with --fresh to begin a new journal; the old one is kept for replay"


class JournalIdentity(Frozen):
    """What a journal was made for; its digest is where the chain of checksums begins."""

    format_version: str = FORMAT_VERSION
    model_digest: str
    dtype: str
    created_unix_s: int
    incarnation: str
    first_sequence: int = 1


@dataclass(frozen=True, slots=True)
class JournalRecord:
    """One entry: `body` is its JSON."""

    sequence: int
    at_s: float
    body: str


@dataclass(frozen=True, slots=True)
class FoldSnapshot:
    """The folded state after the entry `sequence`: a fold starts here and goes on with `sequence + 1`."""

    sequence: int
    at_s: float
    body: str


@dataclass(frozen=True, slots=True)
class _Link:
    """A place in the chain."""

    sequence: int
    checksum: bytes


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
        with _corruption_of(path):
            with closing(_reading(path)) as connection:
                connection.execute("BEGIN")
                self.identity = _identity(path, connection)
                self._clean_stop = _meta(path, connection, "clean_stop") == b"1"
                anchor = _link(path, connection, "anchor")
                snapshots = _snapshots(path, self._genesis(), connection)
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
                _write_empty(connection, identity)
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
                tail = _Link(record.sequence, _chained(tail.checksum, record.sequence, record.at_s, body))
                rows.append((record.sequence, record.at_s, body, tail.checksum))

            def work(connection: apsw.Connection) -> None:
                connection.executemany("INSERT INTO entries VALUES (?, ?, ?, ?)", rows)
                _put_link(connection, "head", tail)
                if reopened:
                    _put_meta(connection, "clean_stop", b"0")

            self._tail, self._clean_stop = tail, False
            self._last_at_s = max([self._last_at_s, *(record.at_s for record in records)])
            return writer.submit(work)

    def read(self, from_sequence: int | None = None) -> Iterator[JournalRecord]:
        """The durable entries from `from_sequence` (by default the first kept) to the last.

        Raises StateDirError with the position of an entry that is missing or corrupt, and when `from_sequence`
        was cut or lies beyond the end.
        """
        with _corruption_of(self.path), closing(_reading(self.path)) as connection:
            connection.execute("BEGIN")  # One view of entries and head, whatever is appended meanwhile.
            anchor = _link(self.path, connection, "anchor")
            first = anchor.sequence + 1 if from_sequence is None else from_sequence
            previous = _link_before(self.path, connection, first, anchor)
            query = "SELECT sequence, at_s, body, checksum FROM entries WHERE sequence >= ? ORDER BY sequence"
            for row in connection.execute(query, (first,)):
                previous = _checked(self.path, previous, row)
                yield JournalRecord(row[0], row[1], row[2].decode())
            head = _link(self.path, connection, "head")
            if head != previous:
                raise _corrupt(self.path, previous.sequence + 1, f"is missing, the head is {head.sequence}")

    def latest_snapshot(self) -> FoldSnapshot | None:
        """The newest snapshot of the fold; where a restart begins."""
        return self._latest_snapshot

    def base_snapshot(self) -> FoldSnapshot | None:
        """The snapshot just before the first kept entry, where a replay begins; None when nothing was cut."""
        with _corruption_of(self.path), closing(_reading(self.path)) as connection:
            connection.execute("BEGIN")
            anchor = _link(self.path, connection, "anchor")
            snapshots = _snapshots(self.path, self._genesis(), connection)
        return next((snapshot for snapshot in snapshots if snapshot.sequence == anchor.sequence), None)

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

            row = (sequence, snapshot.at_s, body.encode(), _snapshot_checksum(self._genesis(), snapshot))

            def work(connection: apsw.Connection) -> int:
                connection.execute("INSERT OR REPLACE INTO snapshots VALUES (?, ?, ?, ?)", row)
                return _cut(connection, snapshot.at_s - retention_s)

            def publish(first_sequence: int) -> None:
                self._latest_snapshot, self._first_sequence = snapshot, first_sequence

            return self._required_writer().submit(work, publish=publish)

    def mark_clean_stop(self) -> Commit[None]:
        """Note that the daemon stopped with nothing open: the next start begins a new journal."""

        def work(connection: apsw.Connection) -> None:
            _put_meta(connection, "clean_stop", b"1")

        return self._required_writer().submit(work)

    def close(self) -> None:
        """Commit what is queued and close the file."""
        if self._writer is not None:
            self._writer.close()

    def _check_origin(self, anchor: _Link, snapshots: list[FoldSnapshot]) -> None:
        """The chain begins with the identity, or where a snapshot that belongs to it stands."""
        if anchor.sequence == self.identity.first_sequence - 1:
            if anchor.checksum != self._genesis():
                raise StateDirError(f"{self.path} is corrupt: its identity was changed", hint=_FRESH_HINT)
        elif all(snapshot.sequence != anchor.sequence for snapshot in snapshots):
            raise _corrupt(self.path, anchor.sequence, "was cut without a snapshot")

    def _verify(self) -> _Link:
        """Read the whole chain; returns its end."""
        last_at_s = self._latest_snapshot.at_s if self._latest_snapshot is not None else 0.0
        for record in self.read():
            last_at_s = max(last_at_s, record.at_s)
        self._last_at_s = last_at_s
        with closing(_reading(self.path)) as connection:
            return _link(self.path, connection, "head")

    def _genesis(self) -> bytes:
        return _genesis(self.identity)

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
            try:
                yield Entry.model_validate_json(record.body)
            except ValidationError as error:
                raise StateDirError(
                    f"{self._journal.path} entry {record.sequence} is not one of this version", hint=_FRESH_HINT
                ) from error


@contextmanager
def _corruption_of(path: Path) -> Iterator[None]:
    """Turns what SQLite finds wrong with a file into a StateDirError that names the file."""
    try:
        yield
    except (apsw.Error, UnicodeDecodeError) as error:
        raise StateDirError(f"{path} cannot be read: {error}", hint=_FRESH_HINT) from error


def _corrupt(path: Path, sequence: int, what: str) -> StateDirError:
    return StateDirError(f"{path} is corrupt: entry {sequence} {what}", hint=_FRESH_HINT)


def _reading(path: Path) -> apsw.Connection:
    """A reading connection; a closed journal in a folder that cannot be written is read as it lies there."""
    if os.access(path.parent, os.W_OK) or path.with_name(path.name + "-wal").exists():
        return open_database(path, read_only=True)
    flags = apsw.SQLITE_OPEN_READONLY | apsw.SQLITE_OPEN_URI
    return apsw.Connection(f"{path.resolve().as_uri()}?immutable=1", flags=flags)


def _genesis(identity: JournalIdentity) -> bytes:
    return hashlib.sha256(canonical_json(identity).encode()).digest()


def _chained(previous: bytes, sequence: int, at_s: float, body: bytes) -> bytes:
    """The checksum of a record whose predecessor has the checksum `previous`."""
    return hashlib.sha256(previous + struct.pack(">qd", sequence, at_s) + body).digest()


def _snapshot_checksum(genesis: bytes, snapshot: FoldSnapshot) -> bytes:
    return _chained(genesis, snapshot.sequence, snapshot.at_s, snapshot.body.encode())


def _write_empty(connection: apsw.Connection, identity: JournalIdentity) -> None:
    origin = _Link(identity.first_sequence - 1, _genesis(identity))
    with connection:
        connection.execute("CREATE TABLE meta (key TEXT PRIMARY KEY, value BLOB NOT NULL) WITHOUT ROWID")
        columns = "(sequence INTEGER PRIMARY KEY, at_s REAL NOT NULL, body BLOB NOT NULL, checksum BLOB NOT NULL)"
        connection.execute(f"CREATE TABLE entries {columns}")
        connection.execute(f"CREATE TABLE snapshots {columns}")
        _put_meta(connection, "identity", canonical_json(identity).encode())
        _put_meta(connection, "clean_stop", b"0")
        _put_link(connection, "anchor", origin)
        _put_link(connection, "head", origin)


def _put_meta(connection: apsw.Connection, key: str, value: bytes) -> None:
    connection.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (key, value))


def _put_link(connection: apsw.Connection, key: str, link: _Link) -> None:
    _put_meta(connection, key, struct.pack(">q", link.sequence) + link.checksum)


def _meta(path: Path, connection: apsw.Connection, key: str) -> bytes:
    row = connection.execute("SELECT value FROM meta WHERE key = ?", (key,)).fetchone()
    if row is None or not isinstance(row[0], bytes):
        raise StateDirError(f"{path} is corrupt: its {key} is missing", hint=_FRESH_HINT)
    return row[0]


def _link(path: Path, connection: apsw.Connection, key: str) -> _Link:
    value = _meta(path, connection, key)
    if len(value) != _LINK_BYTES:
        raise StateDirError(f"{path} is corrupt: its {key} has {len(value)} bytes, not {_LINK_BYTES}", hint=_FRESH_HINT)
    return _Link(struct.unpack(">q", value[:8])[0], value[8:])


def _identity(path: Path, connection: apsw.Connection) -> JournalIdentity:
    raw = _meta(path, connection, "identity")
    try:
        identity = JournalIdentity.model_validate_json(raw)
    except ValidationError as error:
        raise StateDirError(f"{path} is corrupt: its identity cannot be read", hint=_FRESH_HINT) from error
    if identity.format_version != FORMAT_VERSION:
        raise StateDirError(
            f"{path} has format_version {identity.format_version}, not {FORMAT_VERSION}", hint=_FRESH_HINT
        )
    return identity


def _link_before(path: Path, connection: apsw.Connection, sequence: int, anchor: _Link) -> _Link:
    """The link that the entry `sequence` is chained to."""
    if sequence == anchor.sequence + 1:
        return anchor
    row = connection.execute("SELECT checksum FROM entries WHERE sequence = ?", (sequence - 1,)).fetchone()
    if row is None:
        raise _corrupt(path, sequence - 1, "is missing")
    return _Link(sequence - 1, row[0])


def _checked(path: Path, previous: _Link, row: tuple[Any, ...]) -> _Link:
    """The link of an entry's row, when it follows `previous` and its checksum holds."""
    sequence, at_s, body, checksum = row
    if sequence != previous.sequence + 1:
        raise _corrupt(path, previous.sequence + 1, f"is missing, the next is {sequence}")
    if not isinstance(at_s, float) or not isinstance(body, bytes):
        raise _corrupt(path, sequence, "has fields of other types")
    if checksum != _chained(previous.checksum, sequence, at_s, body):
        raise _corrupt(path, sequence, "does not match its checksum")
    return _Link(sequence, checksum)


def _snapshots(path: Path, genesis: bytes, connection: apsw.Connection) -> list[FoldSnapshot]:
    """All stored snapshots, oldest first."""
    snapshots = []
    for sequence, at_s, body, checksum in connection.execute("SELECT * FROM snapshots ORDER BY sequence"):
        if not isinstance(at_s, float) or not isinstance(body, bytes):
            raise _corrupt(path, sequence, "has a snapshot with fields of other types")
        if checksum != _chained(genesis, sequence, at_s, body):
            raise _corrupt(path, sequence, "has a snapshot that does not match its checksum")
        snapshots.append(FoldSnapshot(sequence, at_s, body.decode()))
    return snapshots


def _cut(connection: apsw.Connection, before_s: float) -> int:
    """Delete what lies behind the newest snapshot older than `before_s`; returns the first sequence kept."""
    query = "SELECT max(sequence) FROM snapshots WHERE at_s < ?"
    sequence = connection.execute(query, (before_s,)).get
    row = connection.execute("SELECT checksum FROM entries WHERE sequence = ?", (sequence,)).fetchone()
    if row is not None:
        _put_link(connection, "anchor", _Link(sequence, row[0]))
        connection.execute("DELETE FROM entries WHERE sequence <= ?", (sequence,))
        connection.execute("DELETE FROM snapshots WHERE sequence < ?", (sequence,))
    value = connection.execute("SELECT value FROM meta WHERE key = 'anchor'").get
    return int(struct.unpack(">q", value[:8])[0]) + 1
