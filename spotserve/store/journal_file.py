"""The file of a journal: tables, rows, and the chain of checksums that tells a damaged one by its position.

Whatever lies at a path may be damaged or made to do harm: it is refused in one line and costs no more than its size.
"""

from __future__ import annotations

import hashlib
import os
import stat
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import apsw
from pydantic import ValidationError

from spotserve.core.canonical import canonical_json
from spotserve.core.frozen import Frozen
from spotserve.errors import StateDirError
from spotserve.store.writer import open_database

FORMAT_VERSION = "0.1"
MAX_BODY_BYTES = 256 * 1024 * 1024
"""Of one entry or snapshot: some hundred times what the plan for a thousand GPUs takes."""

_COLUMNS = "(sequence INTEGER PRIMARY KEY, at_s REAL NOT NULL, body BLOB NOT NULL, checksum BLOB NOT NULL)"
_TABLES = {
    "meta": "CREATE TABLE meta (key TEXT PRIMARY KEY, value BLOB NOT NULL) WITHOUT ROWID",
    "entries": f"CREATE TABLE entries {_COLUMNS}",
    "snapshots": f"CREATE TABLE snapshots {_COLUMNS}",
}
_LINK_BYTES = 8 + 32
FRESH_HINT = "start with --fresh to begin a new journal; the old one is kept for replay"


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
class Link:
    """A place in the chain of checksums."""

    sequence: int
    checksum: bytes


@contextmanager
def corruption_of(path: Path) -> Iterator[None]:
    """Turns what SQLite finds wrong with a file into a StateDirError that names the file."""
    try:
        yield
    except (apsw.Error, UnicodeDecodeError) as error:
        denied = isinstance(error, apsw.CantOpenError) and path.exists() and not os.access(path, os.R_OK)
        reason = "permission denied" if denied else error
        raise StateDirError(f"{path} cannot be read: {reason}", hint=FRESH_HINT) from error


def corrupt(path: Path, sequence: int, what: str) -> StateDirError:
    return StateDirError(f"{path} is corrupt: entry {sequence} {what}", hint=FRESH_HINT)


def reading(path: Path) -> apsw.Connection:
    """A reading connection; a closed journal in a folder that cannot be written is read as it lies there."""
    require_files(path)
    if os.access(path.parent, os.W_OK) or path.with_name(path.name + "-wal").exists():
        connection = open_database(path, read_only=True)
    else:
        flags = apsw.SQLITE_OPEN_READONLY | apsw.SQLITE_OPEN_URI
        connection = apsw.Connection(f"{path.resolve().as_uri()}?immutable=1", flags=flags)
    # What the file itself says about functions to call is not for us to do.
    connection.config(apsw.SQLITE_DBCONFIG_DEFENSIVE, 1)
    connection.config(apsw.SQLITE_DBCONFIG_TRUSTED_SCHEMA, 0)
    return connection


def require_files(path: Path) -> None:
    """Raise StateDirError for what SQLite would wait on for ever, or call a database that is merely empty.

    By name and not by descriptor: closing one would drop the locks that this process holds on the file.
    """
    for suffix in ("", "-wal", "-shm"):
        file = path.with_name(path.name + suffix)
        try:
            status = file.stat()
        except FileNotFoundError:
            continue  # SQLite says so of the journal itself.
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise StateDirError(f"{file} cannot be read: {reason}") from error
        if not stat.S_ISREG(status.st_mode):
            kind = "a directory" if stat.S_ISDIR(status.st_mode) else "not a regular file"
            raise StateDirError(f"{file} cannot be read: it is {kind}", hint="give a file on disk")
        if not suffix and not status.st_size:
            raise StateDirError(f"{file} cannot be read: it is empty", hint=FRESH_HINT)


def genesis_of(identity: JournalIdentity) -> bytes:
    return hashlib.sha256(canonical_json(identity).encode()).digest()


def chained(previous: bytes, sequence: int, at_s: float, body: bytes) -> bytes:
    """The checksum of a record whose predecessor has the checksum `previous`."""
    return hashlib.sha256(previous + struct.pack(">qd", sequence, at_s) + body).digest()


def snapshot_checksum(genesis: bytes, snapshot: FoldSnapshot) -> bytes:
    return chained(genesis, snapshot.sequence, snapshot.at_s, snapshot.body.encode())


def write_empty(connection: apsw.Connection, identity: JournalIdentity) -> None:
    origin = Link(identity.first_sequence - 1, genesis_of(identity))
    with connection:
        for creation in _TABLES.values():
            connection.execute(creation)
        put_meta(connection, "identity", canonical_json(identity).encode())
        put_meta(connection, "clean_stop", b"0")
        put_link(connection, "anchor", origin)
        put_link(connection, "head", origin)


def put_meta(connection: apsw.Connection, key: str, value: bytes) -> None:
    connection.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (key, value))


def put_link(connection: apsw.Connection, key: str, link: Link) -> None:
    put_meta(connection, key, struct.pack(">q", link.sequence) + link.checksum)


def require_table(path: Path, connection: apsw.Connection, name: str) -> None:
    """Raise StateDirError unless the table is the one that we create: a view in its place could compute for ever."""
    row = connection.execute("SELECT type, sql FROM sqlite_schema WHERE name = ?", (name,)).fetchone()
    if row is None:
        raise StateDirError(f"{path} is corrupt: its table {name} is missing", hint=FRESH_HINT)
    if row != ("table", _TABLES[name]):
        raise StateDirError(f"{path} is corrupt: its {name} is not the table that a daemon makes", hint=FRESH_HINT)


def meta_of(path: Path, connection: apsw.Connection, key: str) -> bytes:
    row = connection.execute("SELECT value FROM meta WHERE key = ?", (key,)).fetchone()
    if row is None or not isinstance(row[0], bytes):
        raise StateDirError(f"{path} is corrupt: its {key} is missing", hint=FRESH_HINT)
    return row[0]


def link_of(path: Path, connection: apsw.Connection, key: str) -> Link:
    value = meta_of(path, connection, key)
    if len(value) != _LINK_BYTES:
        raise StateDirError(f"{path} is corrupt: its {key} has {len(value)} bytes, not {_LINK_BYTES}", hint=FRESH_HINT)
    return Link(struct.unpack(">q", value[:8])[0], value[8:])


def identity_of(path: Path, connection: apsw.Connection) -> JournalIdentity:
    raw = meta_of(path, connection, "identity")
    try:
        identity = JournalIdentity.model_validate_json(raw)
    except ValidationError as error:
        raise StateDirError(f"{path} is corrupt: its identity cannot be read", hint=FRESH_HINT) from error
    if identity.format_version != FORMAT_VERSION:
        raise StateDirError(
            f"{path} has format_version {identity.format_version}, not {FORMAT_VERSION}", hint=FRESH_HINT
        )
    return identity


def link_before(path: Path, connection: apsw.Connection, sequence: int, anchor: Link) -> Link:
    """The link that the entry `sequence` is chained to."""
    if sequence == anchor.sequence + 1:
        return anchor
    row = connection.execute("SELECT checksum FROM entries WHERE sequence = ?", (sequence - 1,)).fetchone()
    if row is None:
        raise corrupt(path, sequence - 1, "is missing")
    return Link(sequence - 1, row[0])


def checked_link(path: Path, previous: Link, row: tuple[Any, ...]) -> Link:
    """The link of an entry's row, when it follows `previous` and its checksum holds."""
    sequence, at_s, body, checksum, num_bytes = row
    if sequence != previous.sequence + 1:
        raise corrupt(path, previous.sequence + 1, f"is missing, the next is {sequence}")
    if num_bytes > MAX_BODY_BYTES:
        raise corrupt(path, sequence, f"has {num_bytes} bytes, more than {MAX_BODY_BYTES}")
    if not isinstance(at_s, float) or not isinstance(body, bytes):
        raise corrupt(path, sequence, "has fields of other types")
    if checksum != chained(previous.checksum, sequence, at_s, body):
        raise corrupt(path, sequence, "does not match its checksum")
    return Link(sequence, checksum)


def snapshots_of(path: Path, genesis: bytes, connection: apsw.Connection) -> list[FoldSnapshot]:
    """All stored snapshots, oldest first."""
    snapshots = []
    query = (
        "SELECT sequence, at_s, CASE WHEN length(body) <= ? THEN body END, checksum, length(body)"
        " FROM snapshots ORDER BY sequence"
    )
    for row in connection.execute(query, (MAX_BODY_BYTES,)):
        sequence, at_s, body, checksum, num_bytes = row
        if num_bytes > MAX_BODY_BYTES:
            raise corrupt(path, sequence, f"has a snapshot of {num_bytes} bytes, more than {MAX_BODY_BYTES}")
        if not isinstance(at_s, float) or not isinstance(body, bytes):
            raise corrupt(path, sequence, "has a snapshot with fields of other types")
        if checksum != chained(genesis, sequence, at_s, body):
            raise corrupt(path, sequence, "has a snapshot that does not match its checksum")
        snapshots.append(FoldSnapshot(sequence, at_s, body.decode()))
    return snapshots
