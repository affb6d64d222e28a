"""The ledger: the content of every request and the only owner of committed tokens.

Tokens come from replicas, keyed (request, choice, position), and are judged in the writer thread in the order they
came: a replica generation that does not own the request is refused, doubles are dropped, a gap is dropped and
reported. Readers see a token only once the transaction that holds it is durable. Live requests are kept in memory,
so that streams and recovery read no disk; what ended leaves the memory and, 15 minutes later, the disk.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import apsw

from spotserve.core.ids import ReplicaId, RequestId
from spotserve.core.ports import ChoiceDelta, ChoiceView, NewRequest, RequestView
from spotserve.core.wire import FinishReason, TokenRun
from spotserve.errors import InvariantError, SpotServeError, StateDirError
from spotserve.log import get_logger
from spotserve.store.content import (
    delete_requests,
    insert_requests,
    load_requests,
    prepare_tables,
    store_change,
    store_owner,
)
from spotserve.store.live_request import (
    AppendOutcome,
    ClosedChoice,
    Ending,
    EndState,
    LiveChoice,
    LiveRequest,
    Owner,
    Signal,
    StagedChange,
    StagedRun,
    contradicts,
    is_whole,
    stage_close,
    stage_closed,
)
from spotserve.store.wal import check_wal
from spotserve.store.writer import Commit, Writer, open_database

__all__ = [
    "AppendOutcome",
    "ClosedChoice",
    "EndState",
    "Judge",
    "Ledger",
    "LedgerCounters",
    "LedgerRow",
    "Owner",
    "StoredRequest",
]

RETENTION_S = 15 * 60.0
"""Content is deleted this long after its request ended."""

WINDOW_S = 0.002
"""Commits begin at least this far apart under load (the contract allows 5 ms)."""

Judge = Callable[[tuple[str, ...], Sequence[int], Sequence[int], int], int | None]
"""(stop strings, earlier token ids of the choice, new ids, `min_tokens`) -> how many of the new ids are kept when the
choice closes with "stop" here, None when it goes on. Called in the writer thread, only for requests with stop strings;
it must be total, and must not keep or change what it is given."""


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
        self._arriving: dict[RequestId, LiveRequest] = {}
        """Accepted, not durable yet: visible to the writer thread only."""
        self._fenced: set[Owner] = set()
        self._stopped: SpotServeError | None = None
        """Why no more tokens will come: a failed commit, or the shutdown."""
        self._on_failure = on_failure
        self._touched: dict[int, LiveRequest] = {}
        try:
            check_wal(path)
            with closing(open_database(path, vfs=vfs)) as connection:
                prepare_tables(path, connection)
                self._next_number = (connection.execute("SELECT max(number) FROM requests").get or 0) + 1
                self._live = {live.new.request: live for live in load_requests(path, connection, "ended IS NULL")}
            self._reader = open_database(path, read_only=True)
            self._writer = Writer(
                path, window_s=window_s, after_commit=self._wake_changed, on_failure=self._fail, vfs=vfs
            )
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
                choices = [LiveChoice() for _ in range(new.num_choices)]
                arrivals.append(LiveRequest(self._next_number, new, created_unix_s, choices))
                self._next_number += 1
            self._arriving.update((live.new.request, live) for live in arrivals)

        def work(connection: apsw.Connection) -> None:
            insert_requests(connection, arrivals)

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
                if live.staged_end:
                    continue
                live.owner = owner
                store_owner(connection, live)

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

        def stage(staged: StagedChange) -> None:
            for run in runs:
                self._stage_run(staged, Owner(replica, generation), run)

        return self._submit(stage)

    def close(
        self, request: RequestId, choices: Iterable[int] | None = None, reason: FinishReason = "cancelled"
    ) -> Commit[AppendOutcome]:
        """Close choices (None: all that are open) as they stand; a closed or unknown one is left alone."""
        indices = None if choices is None else frozenset(choices)

        def stage(staged: StagedChange) -> None:
            live = self._in_memory(request)
            if live is not None:
                stage_close(staged, live, indices, reason)

        return self._submit(stage)

    def end(self, request: RequestId, state: EndState, error: str | None = None) -> Commit[AppendOutcome]:
        """Store how a request ended, closing what is still open; only the first end counts."""
        reason: FinishReason = "cancelled" if state == "cancelled" else "error"
        ending = Ending(state, error, self._clock())

        def stage(staged: StagedChange) -> None:
            live = self._in_memory(request)
            if live is not None and not live.staged_end:
                stage_close(staged, live, None, reason)
                live.staged_end = True
                staged.endings.append((live, ending))

        return self._submit(stage)

    def forget_unjournaled(self, known: Iterable[RequestId]) -> Commit[tuple[RequestId, ...]]:
        """At a start: delete open requests that never reached the journal, so were never accepted."""
        journaled = set(known)

        def work(connection: apsw.Connection) -> tuple[RequestId, ...]:
            with self._lock:
                forgotten = [live for name, live in self._live.items() if name not in journaled and not live.staged_end]
            self._delete(connection, [live.number for live in forgotten])
            return tuple(sorted(live.new.request for live in forgotten))

        return self._writer.submit(work, publish=self._drop)

    def expire(self, now_unix_s: float, *, retention_s: float = RETENTION_S) -> Commit[tuple[RequestId, ...]]:
        """Delete the content of requests that ended at least `retention_s` ago."""

        def work(connection: apsw.Connection) -> tuple[RequestId, ...]:
            query = "SELECT number, request FROM requests WHERE ended_at_unix_s <= ? ORDER BY number"
            rows: list[Any] = connection.execute(query, (now_unix_s - retention_s,)).fetchall()
            self._delete(connection, [number for number, _ in rows])
            return tuple(request for _, request in rows)

        return self._writer.submit(work, publish=self._drop)

    def shutdown(self) -> None:
        """Commit what is queued and close the database; who still watches gets a StateDirError."""
        # The last connection to close empties the log, which a reader cannot.
        with self._lock:
            self._reader.close()
        self._writer.close()
        self._stop_watchers(StateDirError(f"{self.path.name} is closed"))

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
        choices = self._found(request, with_logprobs=False).choices
        return {index: choice.num_durable for index, choice in enumerate(choices)}

    def content(self, request: RequestId, *, with_logprobs: bool = True) -> StoredRequest:
        """All that is durable of a request, or all but its logprobs. Raises KeyError for an unknown one."""
        live = self._found(request, with_logprobs=with_logprobs)
        with self._lock:
            views = tuple(
                _view(index, choice, with_logprobs=with_logprobs) for index, choice in enumerate(live.choices)
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
            sampling=stored.new.sampling,
            stop=stored.new.stop,
            choices=stored.choices,
            error=stored.error,
            keep_text=stored.new.keep_text,
        )

    def rows(self, request: RequestId) -> list[LedgerRow]:
        """The stored runs with the generation that made each. Raises KeyError for an unknown request."""
        number = self._found(request, with_logprobs=False).number
        query = "SELECT choice, position, length(token_ids) / 4, replica, generation FROM runs WHERE number = ?"
        with self._lock:
            return [LedgerRow(*row) for row in self._reader.execute(query + " ORDER BY choice, position", (number,))]

    def watch(self, request: RequestId, after: int = -1) -> AsyncIterator[ChoiceDelta]:
        """Durable tokens at positions > `after` of every choice, then new ones as they are committed, to the end.

        Nothing is buffered for a slow reader: each step takes what is durable past its own position.
        Raises KeyError, at the call, for an unknown or expired request; StateDirError, in the iteration, when no
        more can come because a commit failed or the ledger was shut down.
        """
        return self._deltas(self._found(request), after)

    async def _deltas(self, live: LiveRequest, after: int) -> AsyncIterator[ChoiceDelta]:
        signal = Signal(asyncio.get_running_loop(), asyncio.Event())
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
                    if self._stopped is not None:
                        raise self._stopped
                    await signal.event.wait()
        finally:
            with self._lock:
                live.signals.remove(signal)
                self._evict(live)

    def _news(self, live: LiveRequest, positions: list[int], open_choices: set[int]) -> list[ChoiceDelta]:
        """What is durable past the positions of the choices that are still open to a watcher."""
        deltas = []
        with self._lock:
            for index in sorted(open_choices):
                choice, position = live.choices[index], positions[index]
                tokens = tuple(choice.tokens[position : choice.num_durable])
                if tokens or choice.finish_reason is not None:
                    deltas.append(
                        ChoiceDelta(
                            choice=index,
                            position=position,
                            token_ids=tokens,
                            finish_reason=choice.finish_reason,
                            logprobs=tuple(choice.logprobs[position : choice.num_durable]),
                            prompt_logprobs=choice.prompt_logprobs if position == 0 else (),
                        )
                    )
        return deltas

    # In the writer thread

    def _submit(self, stage: Callable[[StagedChange], None]) -> Commit[AppendOutcome]:
        staged = StagedChange()

        def work(connection: apsw.Connection) -> AppendOutcome:
            stage(staged)
            store_change(connection, staged)
            return staged.outcome()

        def publish(_: AppendOutcome) -> None:
            with self._lock:
                for live in staged.publish():
                    self._touched[live.number] = live

        return self._writer.submit(work, publish=publish)

    def _stage_run(self, staged: StagedChange, sender: Owner, run: TokenRun) -> None:
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
        if contradicts(choice, run) or not is_whole(live.new, run):
            self.counters.conflicts += 1
            get_logger("store").error(
                "token_conflict", request=run.request, choice=run.choice, position=run.position, replica=sender.replica
            )
        elif choice.staged_reason is not None:
            self.counters.late += 1
            staged.late.append((run.request, run.choice))
        elif run.position > num_known:
            self.counters.gaps += 1
            staged.gaps.append((run.request, run.choice, num_known))
        elif not new_ids and run.finish_reason is None:
            self.counters.doubles += 1
        else:
            self._stage_new(staged, live, run, new_ids, sender)

    def _stage_new(
        self, staged: StagedChange, live: LiveRequest, run: TokenRun, new_ids: tuple[int, ...], sender: Owner
    ) -> None:
        """Append the new tokens of a run, up to a stop string, and close the choice where it ends."""
        choice = live.choices[run.choice]
        num_known = len(choice.tokens)
        kept = self._judged(live, choice, new_ids)
        new_ids = new_ids[:kept]
        logprobs = run.logprobs[max(0, num_known - run.position) :][:kept]
        prompt_logprobs = run.prompt_logprobs if num_known == 0 else ()
        if new_ids or prompt_logprobs:
            staged.runs.append(
                StagedRun(live.number, run.choice, num_known, sender, new_ids, logprobs, prompt_logprobs)
            )
            choice.tokens.extend(new_ids)
            choice.logprobs += logprobs
            choice.staged_prompt_logprobs = choice.staged_prompt_logprobs or prompt_logprobs
        if new_ids and live.first_token_by != sender:
            live.first_token_by = sender
            staged.first_tokens.append(run.request)
        if kept is not None:
            stage_closed(staged, live, run.choice, "stop", "stop_string")
        elif run.finish_reason is not None:
            stage_closed(staged, live, run.choice, run.finish_reason, "leader")
        self.counters.appended += 1
        self.counters.tokens += len(new_ids)

    def _judged(self, live: LiveRequest, choice: LiveChoice, new_ids: tuple[int, ...]) -> int | None:
        if self._judge is None or not live.new.stop or not new_ids:
            return None
        kept = self._judge(live.new.stop, choice.tokens, new_ids, live.new.sampling.min_tokens)
        if kept is not None and not 0 <= kept <= len(new_ids):
            raise InvariantError(f"stop judge keeps {kept} of {len(new_ids)} tokens")
        return kept

    def _delete(self, connection: apsw.Connection, numbers: list[int]) -> None:
        if numbers:
            delete_requests(connection, numbers)
            self._writer.erase_log()

    def _drop(self, requests: tuple[RequestId, ...]) -> None:
        with self._lock:
            for request in requests:
                self._live.pop(request, None)

    def _wake_changed(self) -> None:
        """Show the watchers what the last commit brought."""
        with self._lock:
            signals = [signal for live in self._touched.values() for signal in live.signals]
            for live in self._touched.values():
                self._evict(live)
            self._touched.clear()
        _wake(signals)

    def _fail(self, failure: SpotServeError) -> None:
        self._stop_watchers(failure)
        if self._on_failure is not None:
            self._on_failure(failure)

    # In any thread

    def _stop_watchers(self, reason: SpotServeError) -> None:
        with self._lock:
            self._stopped = self._stopped or reason
            signals = [signal for live in self._live.values() for signal in live.signals]
        _wake(signals)

    def _in_memory(self, request: RequestId) -> LiveRequest | None:
        """A request that has not left the memory, or whose acceptance is under way."""
        return self._live.get(request) or self._arriving.get(request)

    def _evict(self, live: LiveRequest) -> None:
        """Let go of a request that ended and that nobody watches. The lock is held."""
        if live.ended is not None and not live.signals:
            self._live.pop(live.new.request, None)

    def _found(self, request: RequestId, *, with_logprobs: bool = True) -> LiveRequest:
        """The request from memory, else from the disk, where its logprobs may stay. Raises KeyError."""
        with self._lock:
            live = self._live.get(request)
            if live is None and request not in self._arriving:
                with self._reader:  # One view of all tables: it may expire meanwhile.
                    found = load_requests(
                        self.path, self._reader, "request = ?", (request,), with_logprobs=with_logprobs
                    )
                live = next(iter(found), None)
        if live is None:
            raise KeyError(request)
        return live


def _view(index: int, choice: LiveChoice, *, with_logprobs: bool) -> ChoiceView:
    """What is durable of a choice: checked when it was appended or loaded, so not here once more."""
    num_durable = choice.num_durable
    return ChoiceView.model_construct(
        choice=index,
        token_ids=tuple(choice.tokens[:num_durable]),
        finish_reason=choice.finish_reason,
        logprobs=tuple(choice.logprobs[:num_durable]) if with_logprobs else (),
        prompt_logprobs=choice.prompt_logprobs if with_logprobs else (),
    )


def _wake(signals: list[Signal]) -> None:
    """Wake watchers by one call into each event loop."""
    events: dict[asyncio.AbstractEventLoop, list[asyncio.Event]] = {}
    for signal in signals:
        events.setdefault(signal.loop, []).append(signal.event)
    for loop, waiting in events.items():
        # A loop that ended has no watchers any more, only their remains.
        with suppress(RuntimeError):
            loop.call_soon_threadsafe(_set_all, waiting)


def _set_all(events: list[asyncio.Event]) -> None:
    for event in events:
        event.set()
