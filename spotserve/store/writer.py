"""One writer thread per database: everything queued meanwhile becomes one durable transaction (group commit).

A commit that failed is the end of the writer. After a failed fsync the kernel may have dropped the dirty pages and
answer the next fsync with success, so nothing is ever retried: every open future raises, and so does all that
comes later. The process is expected to exit and to read the truth from the disk at its next start.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import apsw

from spotserve.errors import InvariantError, SpotServeError, StateDirError
from spotserve.log import get_logger

T = TypeVar("T")

MIN_SQLITE_VERSION = (3, 51, 3)
"""Older libraries can lose a WAL when two connections reset it at once."""

CHECKPOINT_PAGES = 1000
"""The writer copies the WAL into the database once it has grown past this many pages."""


class Commit(Future[T]):
    """The outcome of work that a writer was given: set once it is durable. Await it, or call `result()`."""

    def __await__(self) -> Generator[Any, None, T]:
        return asyncio.wrap_future(self).__await__()


def open_database(path: Path, *, read_only: bool = False, vfs: str | None = None) -> apsw.Connection:
    """A connection to the database at `path`, every commit of which is on the disk when it returns.

    A reader creates nothing. Raises apsw.Error, and StateDirError when the SQLite library is too old.
    """
    _check_library()
    flags = apsw.SQLITE_OPEN_READONLY if read_only else apsw.SQLITE_OPEN_READWRITE | apsw.SQLITE_OPEN_CREATE
    connection = apsw.Connection(str(path), flags=flags, vfs=vfs)
    connection.set_busy_timeout(5000)
    if not read_only:
        connection.pragma("journal_mode", "wal")
        connection.pragma("synchronous", "full")
        # What was deleted is overwritten: prompts and answers leave the disk when they expire.
        connection.pragma("secure_delete", True)
    return connection


@dataclass(slots=True)
class _Job(Generic[T]):
    """Work waiting for the next transaction."""

    work: Callable[[apsw.Connection], T]
    publish: Callable[[T], None] | None
    commit: Commit[T]


class Writer:
    """Owns the only writing connection of one database.

    Args:
        path: The database.
        window_s: Two commits begin at least this far apart, so that what arrives in between shares one. A writer
            that was idle for longer commits at once.
        after_commit: Called in the writer thread after each group, when all its results are published.
        on_failure: Called once, in the writer thread, when the writer has failed.
        vfs: Name of the SQLite VFS; tests inject faults by one of their own.
    """

    def __init__(
        self,
        path: Path,
        *,
        window_s: float = 0.0,
        after_commit: Callable[[], None] | None = None,
        on_failure: Callable[[SpotServeError], None] | None = None,
        vfs: str | None = None,
    ) -> None:
        self.path = path
        self._window_s = window_s
        self._after_commit = after_commit
        self._on_failure = on_failure
        self._connection = open_database(path, vfs=vfs)
        self._wal_pages = 0
        self._erasing = False
        # A hook of our own turns SQLite's automatic checkpoint off, which would ignore its own I/O errors.
        self._connection.set_wal_hook(self._count_wal_pages)
        self._condition = threading.Condition()
        self._queue: deque[_Job[Any]] = deque()
        self._closing = False
        self._failure: SpotServeError | None = None
        self._num_commits = 0
        self._thread = threading.Thread(target=self._run, name=f"writer-{path.name}", daemon=True)
        self._thread.start()

    @property
    def num_commits(self) -> int:
        """Transactions committed so far."""
        return self._num_commits

    @property
    def failure(self) -> SpotServeError | None:
        """Why the writer refuses everything, None while it works."""
        return self._failure

    def submit(self, work: Callable[[apsw.Connection], T], *, publish: Callable[[T], None] | None = None) -> Commit[T]:
        """Run `work` in the next transaction, in the order of submission.

        `publish` gets its result in the writer thread once the transaction is durable, before the future is set.
        """
        commit: Commit[T] = Commit()
        commit.set_running_or_notify_cancel()  # What was handed over cannot be cancelled.
        with self._condition:
            if self._failure is not None:
                commit.set_exception(self._failure)
            elif self._closing:
                commit.set_exception(StateDirError(f"{self.path.name} is closed"))
            else:
                self._queue.append(_Job(work, publish, commit))
                if len(self._queue) == 1:
                    self._condition.notify()
        return commit

    def erase_log(self) -> None:
        """Called by work that deleted content: empty the WAL, which still holds it, after this transaction."""
        self._erasing = True

    def close(self) -> None:
        """Commit what is queued, then close the database. A second call does nothing."""
        with self._condition:
            self._closing = True
            self._condition.notify()
        self._thread.join()
        self._connection.close()

    def _run(self) -> None:
        last_commit_at = float("-inf")
        while group := self._next_group(last_commit_at):
            try:
                results = self._commit(group)
            except (apsw.Error, OSError) as error:
                self._fail(group, StateDirError(f"{self.path} could not be written: {error}", hint="check the disk"))
                return
            except BaseException as error:
                self._fail(group, InvariantError(f"writing {self.path.name} failed: {type(error).__name__}: {error}"))
                raise
            last_commit_at = time.monotonic()
            self._settle(group, results)

    def _next_group(self, last_commit_at: float) -> list[_Job[Any]]:
        """All that is queued, once the window is over; empty when the writer closes."""
        opens_at = last_commit_at + self._window_s
        with self._condition:
            while not self._queue and not self._closing:
                self._condition.wait()
            while self._queue and not self._closing and (wait_s := opens_at - time.monotonic()) > 0:
                self._condition.wait(wait_s)
            group = list(self._queue)
            self._queue.clear()
        return group

    def _commit(self, group: list[_Job[Any]]) -> list[Any]:
        self._connection.execute("BEGIN IMMEDIATE")
        results = [job.work(self._connection) for job in group]
        self._connection.execute("COMMIT")
        self._num_commits += 1
        self._checkpoint()
        return results

    def _checkpoint(self) -> None:
        """Copy the WAL into the database when it is long, or when what it holds must go."""
        if self._erasing:
            try:
                self._connection.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_TRUNCATE)
            except apsw.BusyError:
                return  # Somebody reads the old pages: after the next transaction, then.
            self._erasing = False
        elif self._wal_pages >= CHECKPOINT_PAGES:
            self._connection.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_PASSIVE)

    def _settle(self, group: list[_Job[Any]], results: list[Any]) -> None:
        for job, result in zip(group, results, strict=True):
            if job.publish is not None:
                job.publish(result)
        if self._after_commit is not None:
            self._after_commit()
        for job, result in zip(group, results, strict=True):
            job.commit.set_result(result)

    def _fail(self, group: list[_Job[Any]], failure: SpotServeError) -> None:
        with self._condition:
            self._failure = failure
            group = [*group, *self._queue]
            self._queue.clear()
        get_logger("store").error("writer_failed", database=self.path.name, error=failure.message)
        for job in group:
            job.commit.set_exception(failure)
        if self._on_failure is not None:
            self._on_failure(failure)

    def _count_wal_pages(self, connection: apsw.Connection, name: str, num_pages: int) -> int:
        self._wal_pages = num_pages
        return int(apsw.SQLITE_OK)


def _check_library() -> None:
    version = apsw.sqlite_lib_version()
    if tuple(int(part) for part in version.split(".")) < MIN_SQLITE_VERSION:
        bound = ".".join(str(part) for part in MIN_SQLITE_VERSION)
        raise StateDirError(f"SQLite {version} is older than {bound}", hint="reinstall apsw from its wheel")
