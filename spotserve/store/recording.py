"""A journal to be looked into, of a daemon that runs, has ended or has died: verified before it is believed.

Whatever lies at the path may be damaged or made to do harm: it is refused in one line that says where, and it never
costs more than its own size.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from spotserve.core.controller import Entry
from spotserve.core.state import ClusterState
from spotserve.core.strict_json import shown
from spotserve.errors import StateDirError
from spotserve.store.journal import Journal, entry_of, state_of
from spotserve.store.journal_file import FoldSnapshot, JournalIdentity, JournalRecord, require_files
from spotserve.store.wal import check_wal

JOURNAL_NAME = "journal.db"
_DAMAGE_HINT = "what a copy lacks is often in journal.db-wal: copy the whole state dir of a daemon that has ended"
_ANY_JSON: TypeAdapter[Any] = TypeAdapter(Any)
_MISSING_HINT = "a daemon's state dir holds it: spotserve run --state-dir"


@dataclass(frozen=True, slots=True)
class Recording:
    """What a journal holds.

    Attributes:
        identity: what it was made for.
        clean_stop: whether the daemon stopped with nothing open, and none has continued it.
        base: the fold of all that was cut off; the empty state if nothing was.
        first_sequence: of the entries that are kept.
        snapshots: fold snapshots inside the kept entries, as parsed JSON (hence `Any`), by the entry each is after.
        entries: all that are kept, in order. Raises StateDirError with the position of one that cannot be read.
    """

    path: Path
    identity: JournalIdentity
    clean_stop: bool
    base: ClusterState
    first_sequence: int
    snapshots: Mapping[int, Any]
    entries: Iterator[Entry]


def read_recording(place: Path) -> Recording:
    """The journal at `place`, which may be the state dir it lies in.

    Raises StateDirError for what is no journal, damaged, or of another format.
    """
    path = _journal_path(place)
    with _for_a_reader():
        require_files(path)
        if not _is_being_written(path) and os.access(path.parent, os.W_OK):
            check_wal(path)
        journal = Journal.read_only(path)
        kept = journal.kept()
        return Recording(
            path=path,
            identity=journal.identity,
            clean_stop=journal.clean_stop,
            base=ClusterState() if kept.base is None else state_of(path, kept.base),
            first_sequence=journal.first_sequence,
            snapshots={snapshot.sequence: _parsed(path, snapshot) for snapshot in kept.snapshots},
            entries=_entries(path, kept.records),
        )


def _journal_path(place: Path) -> Path:
    """The journal itself, when a state dir is named."""
    try:
        path = place / JOURNAL_NAME if place.is_dir() else place
        is_there = path.exists()
    except (OSError, ValueError) as error:  # A name that no file can have.
        reason = error.strerror if isinstance(error, OSError) else error
        raise StateDirError(f"{shown(place)} cannot be read: {reason}") from error
    if not is_there:
        raise StateDirError(f"{path} is not there", hint=_MISSING_HINT)
    return path


def _is_being_written(path: Path) -> bool:
    """Whether the daemon of this state dir lives: its log grows, and what is newest in it is no damage."""
    try:
        os.kill(int((path.parent / "pid").read_text()[:20]), 0)
    except (OSError, ValueError) as error:
        return isinstance(error, PermissionError)
    return True


def _entries(path: Path, records: Iterator[JournalRecord]) -> Iterator[Entry]:
    with _for_a_reader():
        for record in records:
            yield entry_of(path, record)


def _parsed(path: Path, snapshot: FoldSnapshot) -> Any:
    """A snapshot as plain JSON; an older one lacks what later versions know."""
    try:
        return _ANY_JSON.validate_json(snapshot.body)
    except ValidationError as error:
        reason = shown(error.errors(include_url=False, include_input=False)[0]["msg"], 120)
        raise StateDirError(f"{path} the snapshot after entry {snapshot.sequence} is not JSON: {reason}") from error


@contextmanager
def _for_a_reader() -> Iterator[None]:
    """The hint of a start, to begin anew, is none for somebody who wants to see what there is."""
    try:
        yield
    except StateDirError as error:
        raise StateDirError(error.message, hint=_DAMAGE_HINT) from error
