"""Tells a damaged write-ahead log from one that a crash tore.

SQLite reads a WAL up to the first frame whose checksum fails and takes the rest for what a crash tore: right for the
last transaction, silent loss for any other. We sync every commit, so behind the last good frame at most one
transaction can lie unfinished; a second commit frame there, or a broken header before frames, is damage.

Damage inside the very last transaction cannot be told from a torn write and is dropped like one.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import apsw

from spotserve.errors import StateDirError

_HEADER = struct.Struct(">8I")
_FRAME_HEADER = struct.Struct(">4I")
_FRAME_HEADER_BYTES = 24
_MAGIC_LITTLE_ENDIAN, _MAGIC_BIG_ENDIAN = 0x377F0682, 0x377F0683


@dataclass(frozen=True, slots=True)
class _WalHeader:
    page_bytes: int
    salts: tuple[int, int]


def check_wal(database: Path) -> None:
    """Raise StateDirError when the WAL beside `database` lost transactions that were acknowledged.

    Only for a database that no other process has open.
    """
    wal = database.with_name(database.name + "-wal")
    if not wal.exists() or wal.stat().st_size <= _HEADER.size:
        return
    header = _read_header(wal)
    num_good_frames = _num_good_frames(database)
    lost = [index for index in _commit_frames(wal, header) if index >= num_good_frames]
    if len(lost) > 1:
        raise StateDirError(
            f"{wal} is corrupt: frame {num_good_frames + 1} is damaged and {len(lost)} transactions follow it",
            hint="restore the file, or start with --fresh to begin anew",
        )


def _read_header(wal: Path) -> _WalHeader:
    with wal.open("rb") as file:
        raw = file.read(_HEADER.size)
    magic, _, page_bytes, _, salt_1, salt_2, *checksum = _HEADER.unpack(raw)
    order = {_MAGIC_LITTLE_ENDIAN: "<", _MAGIC_BIG_ENDIAN: ">"}.get(magic)
    if order is None or _checksum(struct.unpack(order + "6I", raw[:24])) != tuple(checksum):
        raise StateDirError(f"{wal} is corrupt: its header is damaged", hint="restore the file, or start with --fresh")
    return _WalHeader(page_bytes, (salt_1, salt_2))


def _checksum(words: tuple[int, ...]) -> tuple[int, int]:
    """SQLite's WAL checksum (file format, section 4.2)."""
    first = second = 0
    for even, odd in zip(words[::2], words[1::2], strict=True):
        first = (first + even + second) & 0xFFFFFFFF
        second = (second + odd + first) & 0xFFFFFFFF
    return first, second


def _num_good_frames(database: Path) -> int:
    """Frames up to the last commit that SQLite itself recovers."""
    try:
        with closing(apsw.Connection(str(database), flags=apsw.SQLITE_OPEN_READWRITE)) as connection:
            # Closing the last connection would otherwise copy the WAL into the database and delete it.
            connection.config(apsw.SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, 1)
            connection.execute("SELECT count(*) FROM sqlite_schema").fetchall()
            num_frames, _ = connection.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_NOOP)
    except apsw.Error as error:
        raise StateDirError(f"{database} cannot be read: {error}") from error
    return int(num_frames)


def _commit_frames(wal: Path, header: _WalHeader) -> Iterator[int]:
    """Indices of the frames that end a transaction of the present WAL; one damaged salt does not hide a frame.

    A frame of an earlier use of the file has two other salts.
    """
    frame_bytes = _FRAME_HEADER_BYTES + header.page_bytes
    num_frames = (wal.stat().st_size - _HEADER.size) // frame_bytes
    with wal.open("rb") as file:
        for index in range(num_frames):
            file.seek(_HEADER.size + index * frame_bytes)
            _, commit_pages, *salts = _FRAME_HEADER.unpack(file.read(_FRAME_HEADER.size))
            if commit_pages and any(salt == own for salt, own in zip(salts, header.salts, strict=True)):
                yield index
