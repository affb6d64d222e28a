"""The ledger: the content of every request and the only owner of committed tokens.

Tokens come from replicas, keyed (request, choice, position), and are judged in the writer thread in the order they
came: a replica generation that does not own the request is refused, doubles are dropped, a gap is dropped and
reported. Readers see a token only once the transaction that holds it is durable. Live requests are kept in memory,
so that streams and recovery read no disk; what ended leaves the memory and, 15 minutes later, the disk.
"""

from __future__ import annotations

import asyncio
import json
import struct
import threading
import time
import zlib
from array import array
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import apsw

from spotserve.core.canonical import canonical_json
from spotserve.core.ids import ReplicaId, RequestId
from spotserve.core.ports import ChoiceDelta, ChoiceView, NewRequest, RequestView
from spotserve.core.wire import FinishReason, TokenRun
from spotserve.errors import InvariantError, SpotServeError, StateDirError
from spotserve.log import get_logger
from spotserve.store.wal import check_wal
from spotserve.store.writer import Commit, Writer, open_database

RETENTION_S = 15 * 60.0
"""Content is deleted this long after its request ended."""

WINDOW_S = 0.002
"""Commits begin at least this far apart under load (the contract allows 5 ms)."""

_USER_VERSION = 1

Judge = Callable[[tuple[str, ...], Sequence[int], Sequence[int]], int | None]
"""(stop strings, earlier token ids of the choice, new ids) -> how many of the new ids are kept when the choice closes
with "stop" here, None when it goes on. Called in the writer thread, only for requests with stop strings; it must be
total, and must not keep or change what it is given."""

EndState = Literal["finished", "failed", "cancelled"]


class Owner(NamedTuple):
    """The replica generation that may append to a request."""

    replica: ReplicaId
    generation: int


@dataclass(frozen=True, slots=True)
class ClosedChoice:
    """A choice that was closed: by its leader, by a stop string, or by the coordinator."""

    request: RequestId
    choice: int
    finish_reason: FinishReason
    num_tokens: int
    by: Literal["leader", "stop_string", "coordinator"]


@dataclass(frozen=True, slots=True)
class AppendOutcome:
    """What one append, or one close, did."""

    closed: tuple[ClosedChoice, ...] = ()
    completed: tuple[RequestId, ...] = ()
    """Requests whose last open choice closed."""
    durable: tuple[tuple[RequestId, int, int], ...] = ()
    """(request, choice, durable tokens) of every choice that the runs of an owner named, for `wire.Durable`."""
    gaps: tuple[tuple[RequestId, int, int], ...] = ()
    """Choices of which tokens are missing, with their durable count, for `wire.Resend`."""
    first_tokens: tuple[RequestId, ...] = ()
    """Requests of which this generation's first token became durable."""
    unknown: tuple[RequestId, ...] = ()
    """Requests that the ledger does not hold (any more): the leader may close them."""
    fenced: int = 0
    """Runs refused because the sender does not own the request."""


@dataclass(frozen=True, slots=True)
class StoredRequest:
    """The durable content of a request."""

    new: NewRequest
    created_unix_s: int
    owner: Owner | None
    choices: tuple[ChoiceView, ...]
    ended: EndState | None
    error: str | None


@dataclass(frozen=True, slots=True)
class LedgerRow:
    """One stored run, as tests and `inspect` look at it."""

    choice: int
    position: int
    num_tokens: int
    replica: ReplicaId
    generation: int


@dataclass(slots=True)
class LedgerCounters:
    """What became of the runs since the start, and how many tokens they brought."""

    appended: int = 0
    fenced: int = 0
    doubles: int = 0
    gaps: int = 0
    conflicts: int = 0
    late: int = 0
    unknown: int = 0
    tokens: int = 0


@dataclass(slots=True)
class _Choice:
    """`tokens` and `staged_reason` belong to the writer thread; readers see the first `num_durable` tokens."""

    tokens: array[int] = field(default_factory=lambda: array("I"))
    staged_reason: FinishReason | None = None
    num_durable: int = 0
    finish_reason: FinishReason | None = None

    def publish(self) -> None:
        """What was staged is durable: show it."""
        self.num_durable, self.finish_reason = len(self.tokens), self.staged_reason


@dataclass(slots=True, eq=False)
class _Signal:
    """Wakes one watcher in its own event loop."""

    loop: asyncio.AbstractEventLoop
    event: asyncio.Event


@dataclass(slots=True, eq=False)
class _Live:
    """A request in memory."""

    number: int
    """Its row in the database."""
    new: NewRequest
    created_unix_s: int
    choices: list[_Choice]
    owner: Owner | None = None
    ended: EndState | None = None
    error: str | None = None
    staged_end: bool = False
    """Belongs to the writer thread, like `first_token_by`: the generation of which a token was staged last."""
    first_token_by: Owner | None = None
    signals: list[_Signal] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _Ending:
    """How and when a request ended."""

    state: EndState
    error: str | None
    at_unix_s: float


@dataclass(slots=True)
class _Staged:
    """What one append, close or end does within its transaction; published when that is durable."""

    rows: list[tuple[int, int, int, str, int, bytes, int]] = field(default_factory=list)
    closed: list[tuple[_Live, ClosedChoice]] = field(default_factory=list)
    endings: list[tuple[_Live, _Ending]] = field(default_factory=list)
    named: dict[tuple[RequestId, int], tuple[_Live, _Choice]] = field(default_factory=dict)
    """The choices that runs of an owner named, changed or not."""
    gaps: list[tuple[RequestId, int, int]] = field(default_factory=list)
    first_tokens: list[RequestId] = field(default_factory=list)
    unknown: list[RequestId] = field(default_factory=list)
    fenced: int = 0

    def write(self, connection: apsw.Connection) -> None:
        """Put it into the open transaction."""
        connection.executemany("INSERT INTO runs VALUES (?, ?, ?, ?, ?, ?, ?)", self.rows)
        closed = [(live.number, one.choice, one.finish_reason, one.num_tokens) for live, one in self.closed]
        connection.executemany("INSERT INTO choices VALUES (?, ?, ?, ?)", closed)
        ended = [(ending.state, ending.at_unix_s, ending.error, live.number) for live, ending in self.endings]
        statement = "UPDATE requests SET ended = ?, ended_at_unix_s = ?, error = ? WHERE number = ?"
        connection.executemany(statement, ended)

    def outcome(self) -> AppendOutcome:
        """What to tell the caller once it is durable."""
        done = [live for live, _ in self.closed if all(choice.staged_reason is not None for choice in live.choices)]
        return AppendOutcome(
            closed=tuple(one for _, one in self.closed),
            completed=tuple(dict.fromkeys(live.new.request for live in done)),
            durable=tuple((name, index, len(choice.tokens)) for (name, index), (_, choice) in self.named.items()),
            gaps=tuple(self.gaps),
            first_tokens=tuple(self.first_tokens),
            unknown=tuple(dict.fromkeys(self.unknown)),
            fenced=self.fenced,
        )

    def publish(self) -> list[_Live]:
        """Show it to readers; returns the requests that changed."""
        changed = {live.number: live for live, _ in self.named.values()}
        for live, one in self.closed:
            live.choices[one.choice].publish()
            changed[live.number] = live
        for _, choice in self.named.values():
            choice.publish()
        for live, ending in self.endings:
            live.ended, live.error = ending.state, ending.error
            changed[live.number] = live
        return list(changed.values())


class Ledger:
    """The content store of one state dir. Every method may be called from any thread, `watch` from a coroutine.

    Args:
        path: The database; created when missing.
        judge: Decides stop strings; None ignores them.
        clock: Wall clock in seconds since 1970.
        window_s: Least distance between two commits under load.
        on_failure: Called once, in the writer thread, when a commit failed: the process should exit.
        vfs: Name of the SQLite VFS; tests inject faults by one of their own.

    Raises:
        StateDirError: The file cannot be read, is corrupt or of another version.
    """

    def __init__(
        self,
        path: Path,
        *,
        judge: Judge | None = None,
        clock: Callable[[], float] = time.time,
        window_s: float = WINDOW_S,
        on_failure: Callable[[SpotServeError], None] | None = None,
        vfs: str | None = None,
    ) -> None:
        self.path = path
        self.counters = LedgerCounters()
        self._judge = judge
        self._clock = clock
        self._lock = threading.Lock()
        self._arriving: dict[RequestId, _Live] = {}
        """Accepted, not durable yet: visible to the writer thread only."""
        self._fenced: set[Owner] = set()
        self._touched: dict[int, _Live] = {}
        try:
            check_wal(path)
            with closing(open_database(path, vfs=vfs)) as connection:
                _prepare(path, connection)
                self._next_number = (connection.execute("SELECT max(number) FROM requests").get or 0) + 1
                self._live = {live.new.request: live for live in _load(path, connection, "ended IS NULL")}
            self._reader = open_database(path, read_only=True)
            self._writer = Writer(path, window_s=window_s, after_commit=self._wake, on_failure=on_failure, vfs=vfs)
        except apsw.Error as error:
            raise StateDirError(f"{path} cannot be opened: {error}", hint="start with --fresh to begin anew") from error

    @property
    def num_commits(self) -> int:
        """Transactions committed since the start."""
        return self._writer.num_commits

    @property
    def failure(self) -> SpotServeError | None:
        """Why nothing can be written any more, None while all is well."""
        return self._writer.failure

    # Writing

    def accept(self, requests: Sequence[NewRequest]) -> Commit[None]:
        """Store new requests. Raises InvariantError for an id that is already known; then none is stored."""
        created_unix_s = int(self._clock())
        with self._lock:
            names = [new.request for new in requests]
            known = [name for name in names if name in self._live or name in self._arriving or names.count(name) > 1]
            if known:
                raise InvariantError(f"request {known[0]} was accepted before")
            arrivals = []
            for new in requests:
                choices = [_Choice() for _ in range(new.num_choices)]
                arrivals.append(_Live(self._next_number, new, created_unix_s, choices))
                self._next_number += 1
            self._arriving.update((live.new.request, live) for live in arrivals)

        def work(connection: apsw.Connection) -> None:
            connection.executemany(_INSERT_REQUEST, [_request_row(live) for live in arrivals])

        def publish(_: None) -> None:
            with self._lock:
                self._live.update((name, self._arriving.pop(name)) for name in names)

        return self._writer.submit(work, publish=publish)

    def set_owner(self, request: RequestId, replica: ReplicaId, generation: int) -> Commit[None]:
        """`set_owners` of one request."""
        return self.set_owners({request: Owner(replica, generation)})

    def set_owners(self, owners: Mapping[RequestId, Owner | None]) -> Commit[None]:
        """Hand requests to other replica generations, or to none.

        It takes its place among the appends: earlier ones are judged by the old owner, later ones by the new.
        Requests that ended are left alone. Raises InvariantError for a request that is not known.
        """
        with self._lock:
            changes = [(self._in_memory(request), owner) for request, owner in owners.items()]
        for request, (live, _) in zip(owners, changes, strict=True):
            if live is None and request not in self:
                raise InvariantError(f"request {request} is not in the ledger")
        held = [(live, owner) for live, owner in changes if live is not None]

        def work(connection: apsw.Connection) -> None:
            for live, owner in held:
                live.owner = owner
                replica, generation = owner if owner is not None else (None, None)
                statement = "UPDATE requests SET replica = ?, generation = ? WHERE number = ?"
                connection.execute(statement, (replica, generation, live.number))

        return self._writer.submit(work)

    def fence(self, replica: ReplicaId, generation: int) -> Commit[None]:
        """Refuse every later append of a replica generation, from now on and for ever.

        Once the outcome is there, `durable` and `content` are the last word: nothing of it is under way any more.
        """
        self._fenced.add(Owner(replica, generation))
        return self.flush()

    def flush(self) -> Commit[None]:
        """The outcome comes once all that was handed over before is durable."""
        return self._writer.submit(lambda connection: None)

    def append(self, replica: ReplicaId, generation: int, runs: Sequence[TokenRun]) -> Commit[AppendOutcome]:
        """Append what a leader sampled, as far as it is its to append and new."""

        def stage(staged: _Staged) -> None:
            for run in runs:
                self._stage_run(staged, Owner(replica, generation), run)

        return self._submit(stage)

    def close(
        self, request: RequestId, choices: Iterable[int] | None = None, reason: FinishReason = "cancelled"
    ) -> Commit[AppendOutcome]:
        """Close choices (None: all that are open) as they stand; a closed or unknown one is left alone."""
        indices = None if choices is None else frozenset(choices)

        def stage(staged: _Staged) -> None:
            live = self._in_memory(request)
            if live is not None:
                _stage_close(staged, live, indices, reason)

        return self._submit(stage)

    def end(self, request: RequestId, state: EndState, error: str | None = None) -> Commit[AppendOutcome]:
        """Store how a request ended, closing what is still open; only the first end counts."""
        reason: FinishReason = "cancelled" if state == "cancelled" else "error"
        ending = _Ending(state, error, self._clock())

        def stage(staged: _Staged) -> None:
            live = self._in_memory(request)
            if live is not None and not live.staged_end:
                _stage_close(staged, live, None, reason)
                live.staged_end = True
                staged.endings.append((live, ending))

        return self._submit(stage)

    def forget_unjournaled(self, known: Iterable[RequestId]) -> Commit[tuple[RequestId, ...]]:
        """At a start: delete open requests that never reached the journal, so were never accepted."""
        journaled = set(known)

        def work(connection: apsw.Connection) -> tuple[RequestId, ...]:
            with self._lock:
                forgotten = [live for name, live in self._live.items() if name not in journaled and not live.staged_end]
            _delete(connection, [live.number for live in forgotten])
            return tuple(sorted(live.new.request for live in forgotten))

        return self._writer.submit(work, publish=self._drop)

    def expire(self, now_unix_s: float, *, retention_s: float = RETENTION_S) -> Commit[tuple[RequestId, ...]]:
        """Delete the content of requests that ended at least `retention_s` ago."""

        def work(connection: apsw.Connection) -> tuple[RequestId, ...]:
            query = "SELECT number, request FROM requests WHERE ended_at_unix_s <= ? ORDER BY number"
            rows: list[Any] = connection.execute(query, (now_unix_s - retention_s,)).fetchall()
            _delete(connection, [number for number, _ in rows])
            return tuple(request for _, request in rows)

        return self._writer.submit(work, publish=self._drop)

    def shutdown(self) -> None:
        """Commit what is queued and close the database."""
        self._writer.close()
        with self._lock:
            self._reader.close()

    # Reading: durable content only

    def open_requests(self) -> tuple[RequestId, ...]:
        """Requests that have not ended, in the order of their acceptance."""
        with self._lock:
            live = sorted(self._live.values(), key=lambda live: live.number)
        return tuple(entry.new.request for entry in live if entry.ended is None)

    def __contains__(self, request: object) -> bool:
        """True when the content of a request is here, ended or not."""
        with self._lock:
            query = "SELECT count(*) FROM requests WHERE request = ?"
            return request in self._live or bool(self._reader.execute(query, (request,)).get)

    def durable(self, request: RequestId) -> dict[int, int]:
        """Durable tokens per choice. Raises KeyError for an unknown request."""
        return {index: choice.num_durable for index, choice in enumerate(self._found(request).choices)}

    def content(self, request: RequestId) -> StoredRequest:
        """All that is durable of a request. Raises KeyError for an unknown one."""
        live = self._found(request)
        with self._lock:
            views = tuple(
                ChoiceView(
                    choice=index,
                    token_ids=tuple(choice.tokens[: choice.num_durable]),
                    finish_reason=choice.finish_reason,
                )
                for index, choice in enumerate(live.choices)
            )
            return StoredRequest(live.new, live.created_unix_s, live.owner, views, live.ended, live.error)

    def view(self, request: RequestId, live_state: str | None = None) -> RequestView | None:
        """What `GET /v1/requests/{id}` answers, None for an unknown or expired request.

        The ledger knows only how a request ended; `live_state` is the controller's word on one that has not.
        """
        try:
            stored = self.content(request)
        except KeyError:
            return None
        started = any(choice.token_ids for choice in stored.choices)
        return RequestView(
            request=request,
            state=stored.ended or live_state or ("decoding" if started else "queued"),
            created_unix_s=stored.created_unix_s,
            prompt_ids=stored.new.prompt_ids,
            stop=stored.new.stop,
            choices=stored.choices,
            error=stored.error,
            keep_text=stored.new.keep_text,
        )

    def rows(self, request: RequestId) -> list[LedgerRow]:
        """The stored runs with the generation that made each. Raises KeyError for an unknown request."""
        number = self._found(request).number
        query = "SELECT choice, position, length(token_ids) / 4, replica, generation FROM runs WHERE number = ?"
        with self._lock:
            return [LedgerRow(*row) for row in self._reader.execute(query + " ORDER BY choice, position", (number,))]

    def watch(self, request: RequestId, after: int = -1) -> AsyncIterator[ChoiceDelta]:
        """Durable tokens at positions > `after` of every choice, then new ones as they are committed, to the end.

        Nothing is buffered for a slow reader: each step takes what is durable past its own position.
        Raises KeyError, at the call, for an unknown or expired request.
        """
        return self._deltas(self._found(request), after)

    async def _deltas(self, live: _Live, after: int) -> AsyncIterator[ChoiceDelta]:
        signal = _Signal(asyncio.get_running_loop(), asyncio.Event())
        positions = [max(0, after + 1)] * len(live.choices)
        open_choices = set(range(len(live.choices)))
        with self._lock:
            live.signals.append(signal)
        try:
            while open_choices:
                signal.event.clear()  # Before the look, so that a commit after it is not missed.
                for delta in self._news(live, positions, open_choices):
                    positions[delta.choice] += len(delta.token_ids)
                    if delta.finish_reason is not None:
                        open_choices.remove(delta.choice)
                    yield delta
                if open_choices:
                    await signal.event.wait()
        finally:
            with self._lock:
                live.signals.remove(signal)
                self._evict(live)

    def _news(self, live: _Live, positions: list[int], open_choices: set[int]) -> list[ChoiceDelta]:
        """What is durable past the positions of the choices that are still open to a watcher."""
        deltas = []
        with self._lock:
            for index in sorted(open_choices):
                choice, position = live.choices[index], positions[index]
                tokens = tuple(choice.tokens[position : choice.num_durable])
                if tokens or choice.finish_reason is not None:
                    deltas.append(
                        ChoiceDelta(
                            choice=index, position=position, token_ids=tokens, finish_reason=choice.finish_reason
                        )
                    )
        return deltas

    # In the writer thread

    def _submit(self, stage: Callable[[_Staged], None]) -> Commit[AppendOutcome]:
        staged = _Staged()

        def work(connection: apsw.Connection) -> AppendOutcome:
            stage(staged)
            staged.write(connection)
            return staged.outcome()

        def publish(_: AppendOutcome) -> None:
            with self._lock:
                for live in staged.publish():
                    self._touched[live.number] = live

        return self._writer.submit(work, publish=publish)

    def _stage_run(self, staged: _Staged, sender: Owner, run: TokenRun) -> None:
        """Judge one run; what is not to be appended is counted by its reason."""
        live = self._in_memory(run.request)
        if live is None or not 0 <= run.choice < len(live.choices):
            self.counters.unknown += 1
            staged.unknown.append(run.request)
            return
        if live.owner != sender or sender in self._fenced:
            self.counters.fenced += 1
            staged.fenced += 1
            return
        choice = live.choices[run.choice]
        staged.named[run.request, run.choice] = (live, choice)
        num_known = len(choice.tokens)
        new_ids = run.token_ids[max(0, num_known - run.position) :]
        if _contradicts(choice, run):
            self.counters.conflicts += 1
            get_logger("store").error(
                "token_conflict", request=run.request, choice=run.choice, position=run.position, replica=sender.replica
            )
        elif choice.staged_reason is not None:
            self.counters.late += 1
        elif run.position > num_known:
            self.counters.gaps += 1
            staged.gaps.append((run.request, run.choice, num_known))
        elif not new_ids and run.finish_reason is None:
            self.counters.doubles += 1
        else:
            self._stage_new(staged, live, run, new_ids, sender)

    def _stage_new(self, staged: _Staged, live: _Live, run: TokenRun, new_ids: tuple[int, ...], sender: Owner) -> None:
        """Append the new tokens of a run, up to a stop string, and close the choice where it ends."""
        choice = live.choices[run.choice]
        num_known = len(choice.tokens)
        kept = self._judged(live, choice, new_ids)
        new_ids = new_ids[:kept]
        if new_ids:
            blob = _packed(new_ids)
            checksum = _run_checksum(live.number, run.choice, num_known, blob)
            staged.rows.append((live.number, run.choice, num_known, *sender, blob, checksum))
            choice.tokens.extend(new_ids)
            if live.first_token_by != sender:
                live.first_token_by = sender
                staged.first_tokens.append(run.request)
        if kept is not None:
            _stage_closed(staged, live, run.choice, "stop", "stop_string")
        elif run.finish_reason is not None:
            _stage_closed(staged, live, run.choice, run.finish_reason, "leader")
        self.counters.appended += 1
        self.counters.tokens += len(new_ids)

    def _judged(self, live: _Live, choice: _Choice, new_ids: tuple[int, ...]) -> int | None:
        if self._judge is None or not live.new.stop or not new_ids:
            return None
        kept = self._judge(live.new.stop, choice.tokens, new_ids)
        if kept is not None and not 0 <= kept <= len(new_ids):
            raise InvariantError(f"stop judge keeps {kept} of {len(new_ids)} tokens")
        return kept

    def _drop(self, requests: tuple[RequestId, ...]) -> None:
        with self._lock:
            for request in requests:
                self._live.pop(request, None)

    def _wake(self) -> None:
        """Wake the watchers of what changed: one call into each event loop."""
        events: dict[asyncio.AbstractEventLoop, list[asyncio.Event]] = {}
        with self._lock:
            for live in self._touched.values():
                for signal in live.signals:
                    events.setdefault(signal.loop, []).append(signal.event)
                self._evict(live)
            self._touched.clear()
        for loop, waiting in events.items():
            # A loop that ended has no watchers any more, only their remains.
            with suppress(RuntimeError):
                loop.call_soon_threadsafe(_set_all, waiting)

    # In any thread

    def _in_memory(self, request: RequestId) -> _Live | None:
        """A request that has not left the memory, or whose acceptance is under way."""
        return self._live.get(request) or self._arriving.get(request)

    def _evict(self, live: _Live) -> None:
        """Let go of a request that ended and that nobody watches. The lock is held."""
        if live.ended is not None and not live.signals:
            self._live.pop(live.new.request, None)

    def _found(self, request: RequestId) -> _Live:
        """The request from memory, else from the disk. Raises KeyError."""
        with self._lock:
            live = self._live.get(request)
            if live is None and request not in self._arriving:
                with self._reader:  # One view of all tables: it may expire meanwhile.
                    live = next(iter(_load(self.path, self._reader, "request = ?", (request,))), None)
        if live is None:
            raise KeyError(request)
        return live


def _set_all(events: list[asyncio.Event]) -> None:
    for event in events:
        event.set()


def _contradicts(choice: _Choice, run: TokenRun) -> bool:
    """True when a run cannot be true beside what is known: other tokens, or an end before known tokens."""
    if run.position < 0 or any(not 0 <= token < 2**32 for token in run.token_ids):
        return True
    num_known, stop = len(choice.tokens), run.position + len(run.token_ids)
    known = choice.tokens[run.position : stop]
    if list(known) != list(run.token_ids[: len(known)]):
        return True
    return choice.staged_reason is None and run.finish_reason is not None and stop < num_known


def _stage_close(staged: _Staged, live: _Live, indices: frozenset[int] | None, reason: FinishReason) -> None:
    """Close the given open choices where they stand."""
    for index, choice in enumerate(live.choices):
        if choice.staged_reason is None and (indices is None or index in indices):
            _stage_closed(staged, live, index, reason, "coordinator")


def _stage_closed(
    staged: _Staged,
    live: _Live,
    index: int,
    reason: FinishReason,
    by: Literal["leader", "stop_string", "coordinator"],
) -> None:
    choice = live.choices[index]
    choice.staged_reason = reason
    staged.closed.append((live, ClosedChoice(live.new.request, index, reason, len(choice.tokens), by)))


# The database

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
_INSERT_REQUEST = (
    "INSERT INTO requests (number, request, created_unix_s, prompt_ids, body, checksum) VALUES (?, ?, ?, ?, ?, ?)"
)


def _prepare(path: Path, connection: apsw.Connection) -> None:
    """Create the tables in a new file; refuse a file of another version."""
    version = connection.pragma("user_version")
    if version == 0 and not connection.execute("SELECT count(*) FROM sqlite_schema").get:
        with connection:
            connection.execute(_SCHEMA)
            connection.pragma("user_version", _USER_VERSION)
    elif version != _USER_VERSION:
        raise StateDirError(f"{path} has version {version}, not {_USER_VERSION}", hint="start with --fresh")


def _request_row(live: _Live) -> tuple[int, str, int, bytes, bytes, int]:
    prompt_ids = _packed(live.new.prompt_ids)
    body = canonical_json(live.new.model_dump(mode="json", exclude={"prompt_ids"})).encode()
    return live.number, live.new.request, live.created_unix_s, prompt_ids, body, zlib.crc32(prompt_ids + body)


def _load(path: Path, connection: apsw.Connection, where: str, bindings: tuple[str, ...] = ()) -> list[_Live]:
    """The requests that a constant condition names, with their content, checked.

    Raises StateDirError for a row that is corrupt.
    """
    columns = "number, created_unix_s, prompt_ids, body, checksum, replica, generation, ended, error"
    query = f"SELECT {columns} FROM requests WHERE {where} ORDER BY number"  # noqa: S608  (no data in it)
    return [_loaded(path, connection, row) for row in connection.execute(query, bindings).fetchall()]


def _loaded(path: Path, connection: apsw.Connection, row: tuple[Any, ...]) -> _Live:
    number, created_unix_s, prompt_ids, body, checksum, replica, generation, ended, error = row
    if zlib.crc32(prompt_ids + body) != checksum:
        raise _corrupt(path, f"request {number} does not match its checksum")
    new = NewRequest.model_validate({**json.loads(body), "prompt_ids": _unpacked(prompt_ids)})
    live = _Live(number, new, created_unix_s, [_Choice() for _ in range(new.num_choices)])
    live.owner = Owner(ReplicaId(replica), generation) if replica is not None else None
    live.ended, live.error, live.staged_end = ended, error, ended is not None
    _load_runs(path, connection, live)
    _load_ends(path, connection, live)
    return live


def _load_runs(path: Path, connection: apsw.Connection, live: _Live) -> None:
    query = "SELECT choice, position, replica, generation, token_ids, checksum FROM runs WHERE number = ?"
    rows = connection.execute(query + " ORDER BY choice, position", (live.number,))
    for index, position, replica, generation, blob, checksum in rows:
        tokens = live.choices[index].tokens
        if position != len(tokens) or checksum != _run_checksum(live.number, index, position, blob):
            raise _corrupt(path, f"request {live.number} choice {index} is damaged at position {len(tokens)}")
        tokens.extend(_unpacked(blob))
        if live.first_token_by is None or generation > live.first_token_by.generation:
            live.first_token_by = Owner(replica, generation)
    for choice in live.choices:
        choice.publish()


def _load_ends(path: Path, connection: apsw.Connection, live: _Live) -> None:
    query = "SELECT choice, finish_reason, num_tokens FROM choices WHERE number = ?"
    for index, reason, num_tokens in connection.execute(query, (live.number,)):
        choice = live.choices[index]
        if num_tokens != len(choice.tokens):
            raise _corrupt(
                path, f"request {live.number} choice {index} has {len(choice.tokens)} of {num_tokens} tokens"
            )
        choice.staged_reason = reason
        choice.publish()


def _delete(connection: apsw.Connection, numbers: list[int]) -> None:
    rows = [(number,) for number in numbers]
    connection.executemany("DELETE FROM runs WHERE number = ?", rows)
    connection.executemany("DELETE FROM choices WHERE number = ?", rows)
    connection.executemany("DELETE FROM requests WHERE number = ?", rows)


def _packed(token_ids: Sequence[int]) -> bytes:
    return struct.pack(f"<{len(token_ids)}I", *token_ids)


def _unpacked(blob: bytes) -> tuple[int, ...]:
    return struct.unpack(f"<{len(blob) // 4}I", blob)


def _run_checksum(number: int, choice: int, position: int, blob: bytes) -> int:
    return zlib.crc32(blob, zlib.crc32(struct.pack("<3q", number, choice, position)))


def _corrupt(path: Path, what: str) -> StateDirError:
    return StateDirError(f"{path} is corrupt: {what}", hint="start with --fresh to begin anew")
