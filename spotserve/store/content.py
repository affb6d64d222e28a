"""The tables of the ledger: requests, runs of tokens, their logprobs and ends of choices.

Content rows carry a checksum. Logprobs have rows of their own, written for requests that want them only; those of a
prompt lie at position -1.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import apsw

from spotserve.core.canonical import canonical_json
from spotserve.core.ids import ReplicaId
from spotserve.core.ports import NewRequest
from spotserve.core.sampling import RankedToken, TokenLogprobs
from spotserve.errors import StateDirError
from spotserve.store.live_request import LiveChoice, LiveRequest, Owner, StagedChange, StagedRun

_USER_VERSION = 2
_SCHEMA = """
CREATE TABLE requests (
    number INTEGER PRIMARY KEY,
    request TEXT NOT NULL UNIQUE,
    created_unix_s INTEGER NOT NULL,
    prompt_ids BLOB NOT NULL,
    body BLOB NOT NULL,
    checksum INTEGER NOT NULL,
    replica TEXT,
    generation INTEGER,
    ended TEXT,
    ended_at_unix_s REAL,
    error TEXT
);
CREATE INDEX requests_by_end ON requests (ended_at_unix_s);
CREATE TABLE runs (
    number INTEGER NOT NULL,
    choice INTEGER NOT NULL,
    position INTEGER NOT NULL,
    replica TEXT NOT NULL,
    generation INTEGER NOT NULL,
    token_ids BLOB NOT NULL,
    checksum INTEGER NOT NULL,
    PRIMARY KEY (number, choice, position)
) WITHOUT ROWID;
CREATE TABLE choices (
    number INTEGER NOT NULL,
    choice INTEGER NOT NULL,
    finish_reason TEXT NOT NULL,
    num_tokens INTEGER NOT NULL,
    PRIMARY KEY (number, choice)
) WITHOUT ROWID;
"""
_LOGPROBS_SCHEMA = """
CREATE TABLE logprobs (
    number INTEGER NOT NULL,
    choice INTEGER NOT NULL,
    position INTEGER NOT NULL,
    logprobs BLOB NOT NULL,
    checksum INTEGER NOT NULL,
    PRIMARY KEY (number, choice, position)
) WITHOUT ROWID;
"""
_PROMPT = -1
"""The position of a prompt's logprobs."""
_HEAD = struct.Struct("<dI")
_RANKED = struct.Struct("<Id")
_INSERT_REQUEST = (
    "INSERT INTO requests (number, request, created_unix_s, prompt_ids, body, checksum) VALUES (?, ?, ?, ?, ?, ?)"
)


def prepare_tables(path: Path, connection: apsw.Connection) -> None:
    """Create the tables in a new file, and those that a file of version 1 lacks; refuse a file of another version."""
    version = connection.pragma("user_version")
    if version == 0 and not connection.execute("SELECT count(*) FROM sqlite_schema").get:
        with connection:
            connection.execute(_SCHEMA + _LOGPROBS_SCHEMA)
            connection.pragma("user_version", _USER_VERSION)
    elif version == 1:
        with connection:
            connection.execute(_LOGPROBS_SCHEMA)
            connection.pragma("user_version", _USER_VERSION)
    elif version != _USER_VERSION:
        raise StateDirError(f"{path} has version {version}, not {_USER_VERSION}", hint="start with --fresh")


def _request_row(live: LiveRequest) -> tuple[int, str, int, bytes, bytes, int]:
    prompt_ids = _packed(live.new.prompt_ids)
    body = canonical_json(live.new.model_dump(mode="json", exclude={"prompt_ids"})).encode()
    return live.number, live.new.request, live.created_unix_s, prompt_ids, body, zlib.crc32(prompt_ids + body)


def load_requests(
    path: Path,
    connection: apsw.Connection,
    where: str,
    bindings: tuple[str, ...] = (),
    *,
    with_logprobs: bool = True,
) -> list[LiveRequest]:
    """The requests that a constant condition names, with their content or all but its logprobs, checked.

    Raises StateDirError for a row that is corrupt.
    """
    columns = "number, created_unix_s, prompt_ids, body, checksum, replica, generation, ended, error"
    query = f"SELECT {columns} FROM requests WHERE {where} ORDER BY number"  # noqa: S608  (no data in it)
    rows = connection.execute(query, bindings).fetchall()
    return [_loaded(path, connection, row, with_logprobs=with_logprobs) for row in rows]


def _loaded(path: Path, connection: apsw.Connection, row: tuple[Any, ...], *, with_logprobs: bool) -> LiveRequest:
    number, created_unix_s, prompt_ids, body, checksum, replica, generation, ended, error = row
    if zlib.crc32(prompt_ids + body) != checksum:
        raise _corrupt(path, f"request {number} does not match its checksum")
    new = NewRequest.model_validate({**json.loads(body), "prompt_ids": _unpacked(prompt_ids)})
    live = LiveRequest(number, new, created_unix_s, [LiveChoice() for _ in range(new.num_choices)])
    live.owner = Owner(ReplicaId(replica), generation) if replica is not None else None
    live.ended, live.error, live.staged_end = ended, error, ended is not None
    _load_runs(path, connection, live)
    if with_logprobs and new.sampling.logprobs is not None:
        _load_logprobs(path, connection, live)
    for choice in live.choices:
        choice.publish()
    _load_ends(path, connection, live)
    return live


def _load_runs(path: Path, connection: apsw.Connection, live: LiveRequest) -> None:
    query = "SELECT choice, position, replica, generation, token_ids, checksum FROM runs WHERE number = ?"
    rows = connection.execute(query + " ORDER BY choice, position", (live.number,))
    for index, position, replica, generation, blob, checksum in rows:
        tokens = live.choices[index].tokens
        if position != len(tokens) or checksum != _run_checksum(live.number, index, position, blob):
            raise _corrupt(path, f"request {live.number} choice {index} is damaged at position {len(tokens)}")
        tokens.extend(_unpacked(blob))
        if live.first_token_by is None or generation > live.first_token_by.generation:
            live.first_token_by = Owner(replica, generation)


def _load_logprobs(path: Path, connection: apsw.Connection, live: LiveRequest) -> None:
    query = "SELECT choice, position, logprobs, checksum FROM logprobs WHERE number = ? ORDER BY choice, position"
    for index, position, blob, checksum in connection.execute(query, (live.number,)):
        choice = live.choices[index]
        if position not in (_PROMPT, len(choice.logprobs)) or checksum != _run_checksum(
            live.number, index, position, blob
        ):
            raise _corrupt(path, f"request {live.number} choice {index} has damaged logprobs at position {position}")
        if position == _PROMPT:
            choice.staged_prompt_logprobs = _unpacked_logprobs(blob)
        else:
            choice.logprobs += _unpacked_logprobs(blob)
    for index, choice in enumerate(live.choices):
        owed = len(live.new.prompt_ids) - 1 if live.new.sampling.prompt_logprobs and choice.tokens else 0
        if len(choice.logprobs) != len(choice.tokens) or len(choice.staged_prompt_logprobs) < owed:
            raise _corrupt(path, f"request {live.number} choice {index} lacks logprobs of its tokens")


def _load_ends(path: Path, connection: apsw.Connection, live: LiveRequest) -> None:
    query = "SELECT choice, finish_reason, num_tokens FROM choices WHERE number = ?"
    for index, reason, num_tokens in connection.execute(query, (live.number,)):
        choice = live.choices[index]
        if num_tokens != len(choice.tokens):
            raise _corrupt(
                path, f"request {live.number} choice {index} has {len(choice.tokens)} of {num_tokens} tokens"
            )
        choice.staged_reason = reason
        choice.publish()


def insert_requests(connection: apsw.Connection, arrivals: Sequence[LiveRequest]) -> None:
    """Store new requests in the open transaction."""
    connection.executemany(_INSERT_REQUEST, [_request_row(live) for live in arrivals])


def store_owner(connection: apsw.Connection, live: LiveRequest) -> None:
    """Store who may append to a request in the open transaction."""
    replica, generation = live.owner if live.owner is not None else (None, None)
    statement = "UPDATE requests SET replica = ?, generation = ? WHERE number = ?"
    connection.execute(statement, (replica, generation, live.number))


def store_change(connection: apsw.Connection, staged: StagedChange) -> None:
    """Store new runs and ends in the open transaction."""
    rows = [_run_row(run) for run in staged.runs if run.token_ids]
    connection.executemany("INSERT INTO runs VALUES (?, ?, ?, ?, ?, ?, ?)", rows)
    logprobs = [row for run in staged.runs for row in _logprob_rows(run)]
    if logprobs:
        connection.executemany("INSERT INTO logprobs VALUES (?, ?, ?, ?, ?)", logprobs)
    closed = [(live.number, one.choice, one.finish_reason, one.num_tokens) for live, one in staged.closed]
    connection.executemany("INSERT INTO choices VALUES (?, ?, ?, ?)", closed)
    ended = [(ending.state, ending.at_unix_s, ending.error, live.number) for live, ending in staged.endings]
    statement = "UPDATE requests SET ended = ?, ended_at_unix_s = ?, error = ? WHERE number = ?"
    connection.executemany(statement, ended)


def _run_row(run: StagedRun) -> tuple[int, int, int, str, int, bytes, int]:
    blob = _packed(run.token_ids)
    checksum = _run_checksum(run.number, run.choice, run.position, blob)
    return run.number, run.choice, run.position, *run.owner, blob, checksum


def _logprob_rows(run: StagedRun) -> list[tuple[int, int, int, bytes, int]]:
    rows = []
    for position, logprobs in ((_PROMPT, run.prompt_logprobs), (run.position, run.logprobs)):
        if logprobs:
            blob = _packed_logprobs(logprobs)
            checksum = _run_checksum(run.number, run.choice, position, blob)
            rows.append((run.number, run.choice, position, blob, checksum))
    return rows


def delete_requests(connection: apsw.Connection, numbers: list[int]) -> None:
    """Delete requests and their content in the open transaction."""
    rows = [(number,) for number in numbers]
    connection.executemany("DELETE FROM runs WHERE number = ?", rows)
    connection.executemany("DELETE FROM logprobs WHERE number = ?", rows)
    connection.executemany("DELETE FROM choices WHERE number = ?", rows)
    connection.executemany("DELETE FROM requests WHERE number = ?", rows)


def _packed(token_ids: Sequence[int]) -> bytes:
    return struct.pack(f"<{len(token_ids)}I", *token_ids)


def _unpacked(blob: bytes) -> tuple[int, ...]:
    return struct.unpack(f"<{len(blob) // 4}I", blob)


def _packed_logprobs(logprobs: Sequence[TokenLogprobs]) -> bytes:
    """Of each token its logprob, how many others follow, and those: every float as its eight bytes."""
    parts = []
    for logprob, top in logprobs:
        parts.append(_HEAD.pack(logprob, len(top)))
        parts += [_RANKED.pack(*ranked) for ranked in top]
    return b"".join(parts)


def _unpacked_logprobs(blob: bytes) -> tuple[TokenLogprobs, ...]:
    logprobs, at = [], 0
    while at < len(blob):
        logprob, count = _HEAD.unpack_from(blob, at)
        at += _HEAD.size
        stop = at + count * _RANKED.size
        logprobs.append(TokenLogprobs(logprob, tuple(map(RankedToken._make, _RANKED.iter_unpack(blob[at:stop])))))
        at = stop
    return tuple(logprobs)


def _run_checksum(number: int, choice: int, position: int, blob: bytes) -> int:
    return zlib.crc32(blob, zlib.crc32(struct.pack("<3q", number, choice, position)))


def _corrupt(path: Path, what: str) -> StateDirError:
    return StateDirError(f"{path} is corrupt: {what}", hint="start with --fresh to begin anew")
