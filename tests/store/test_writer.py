"""A failed commit is final, and the groups in between are whole."""

from __future__ import annotations

import asyncio
import subprocess
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import apsw
import pytest

from spotserve.errors import InvariantError, SpotServeError, StateDirError
from spotserve.store.journal import Journal
from spotserve.store.writer import Commit, Writer, open_database
from tests.store.conftest import TIMEOUT_S, identity, records


@pytest.fixture
def database(tmp_path: Path) -> Path:
    path = tmp_path / "numbers.db"
    with closing(open_database(path)) as connection:
        connection.execute("CREATE TABLE numbers (number INTEGER NOT NULL)")
    return path


def insert(writer: Writer, number: int | None) -> Commit[None]:
    def work(connection: apsw.Connection) -> None:
        connection.execute("INSERT INTO numbers VALUES (?)", (number,))

    return writer.submit(work)


def numbers(path: Path) -> list[int]:
    with closing(open_database(path, read_only=True)) as connection:
        return [row[0] for row in connection.execute("SELECT number FROM numbers ORDER BY number")]


def test_one_transaction_per_group(database: Path) -> None:
    """Tests that what is submitted during a commit shares the next one, and that close commits the rest."""
    entered, go_on = threading.Event(), threading.Event()

    def hold(connection: apsw.Connection) -> None:
        entered.set()
        assert go_on.wait(TIMEOUT_S)

    groups: list[int] = []
    writer = Writer(database, after_commit=lambda: groups.append(writer.num_commits))
    writer.submit(hold)
    assert entered.wait(TIMEOUT_S)
    commits = [insert(writer, number) for number in range(10)]
    go_on.set()
    writer.close()
    assert [None] * 10 == [commit.result(TIMEOUT_S) for commit in commits]
    assert [1, 2] == groups
    assert list(range(10)) == numbers(database)
    with pytest.raises(StateDirError, match="is closed"):
        insert(writer, 10).result(TIMEOUT_S)


def test_a_window_gathers_what_comes_after_a_commit(database: Path) -> None:
    """Tests that within the window after a commit submissions are gathered into one."""
    writer = Writer(database, window_s=0.5)
    insert(writer, 0).result(TIMEOUT_S)
    commits = [insert(writer, number) for number in range(1, 20)]
    for commit in commits:
        commit.result(TIMEOUT_S)
    assert 2 == writer.num_commits
    writer.close()


def test_a_refused_statement_ends_the_writer(database: Path) -> None:
    """Tests that a failed group leaves nothing behind and that everything after it gets the same error."""
    failures: list[SpotServeError] = []
    entered, go_on = threading.Event(), threading.Event()

    def hold(connection: apsw.Connection) -> None:
        entered.set()
        assert go_on.wait(TIMEOUT_S)

    writer = Writer(database, on_failure=failures.append)
    first = insert(writer, 1)
    first.result(TIMEOUT_S)
    writer.submit(hold)
    assert entered.wait(TIMEOUT_S)
    doomed = [insert(writer, 2), insert(writer, None), insert(writer, 3)]
    go_on.set()
    for commit in doomed:
        with pytest.raises(StateDirError, match="could not be written"):
            commit.result(TIMEOUT_S)
    with pytest.raises(StateDirError, match="could not be written"):
        insert(writer, 4).result(TIMEOUT_S)
    assert [writer.failure] == failures
    writer.close()
    assert [1] == numbers(database)


def test_what_waits_behind_a_failing_group_fails_with_it(database: Path) -> None:
    """Tests that work queued while a group fails gets its error instead of waiting for ever."""
    entered, go_on = threading.Event(), threading.Event()

    def fail_late(connection: apsw.Connection) -> None:
        entered.set()
        assert go_on.wait(TIMEOUT_S)
        connection.execute("INSERT INTO numbers VALUES (NULL)")

    writer = Writer(database)
    failing = writer.submit(fail_late)
    assert entered.wait(TIMEOUT_S)
    waiting = insert(writer, 1)
    go_on.set()
    assert isinstance(failing.exception(TIMEOUT_S), StateDirError)
    assert failing.exception(TIMEOUT_S) is waiting.exception(TIMEOUT_S)
    writer.close()
    assert [] == numbers(database)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_our_own_bug_ends_the_writer(database: Path) -> None:
    """Tests that an exception of our code inside a transaction is an InvariantError for all and commits nothing."""

    def stumble(connection: apsw.Connection) -> None:
        connection.execute("INSERT INTO numbers VALUES (1)")
        raise ZeroDivisionError("stumbled")

    writer = Writer(database)
    with pytest.raises(InvariantError, match="ZeroDivisionError: stumbled"):
        writer.submit(stumble).result(TIMEOUT_S)
    writer.close()
    assert [] == numbers(database)


def test_cancelling_a_waiter_leaves_the_commit(database: Path) -> None:
    """Tests that a coroutine that is cancelled while it waits neither undoes the commit nor harms the writer."""
    go_on = threading.Event()
    writer = Writer(database)
    writer.submit(lambda connection: go_on.wait(TIMEOUT_S))

    async def scenario() -> None:
        waiting = asyncio.ensure_future(asyncio.wait_for(insert(writer, 1), TIMEOUT_S))
        await asyncio.sleep(0)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        go_on.set()
        await insert(writer, 2)

    asyncio.run(scenario())
    writer.close()
    assert [1, 2] == numbers(database)


class _FaultyVfs(apsw.VFS):
    """The system's files, whose writes or syncs of a WAL fail while a fault is armed."""

    def __init__(self) -> None:
        self.armed: str | None = None
        self.num_syncs = 0
        super().__init__("faulty", "")

    def xOpen(self, name: apsw.URIFilename | str | None, flags: list[int]) -> _FaultyFile:  # noqa: N802
        return _FaultyFile(self, name, flags)


class _FaultyFile(apsw.VFSFile):
    def __init__(self, vfs: _FaultyVfs, name: apsw.URIFilename | str | None, flags: list[int]) -> None:
        self._vfs = vfs
        self._is_wal = bool(flags[0] & apsw.SQLITE_OPEN_WAL)
        super().__init__("", name, flags)

    def xSync(self, flags: int) -> None:  # noqa: N802
        if self._is_wal and self._vfs.armed == "sync":
            self._vfs.num_syncs += 1
            raise apsw.IOError("fsync failed")
        super().xSync(flags)

    def xWrite(self, data: bytes, offset: int) -> None:  # noqa: N802
        if self._is_wal and self._vfs.armed == "write":
            raise apsw.FullError("no space left")
        super().xWrite(data, offset)


@pytest.fixture
def faulty_vfs() -> Iterator[_FaultyVfs]:
    vfs = _FaultyVfs()
    yield vfs
    vfs.unregister()


@pytest.mark.parametrize("fault", ["sync", "write"])
def test_a_disk_fault_is_final(tmp_path: Path, faulty_vfs: _FaultyVfs, fault: str) -> None:
    """Tests that after a failed write or fsync nothing is retried or acknowledged, though the disk is well again."""
    journal = Journal.create(tmp_path / "journal.db", identity(), vfs="faulty")
    journal.append(records(1, 2)).result(TIMEOUT_S)
    faulty_vfs.armed = fault
    with pytest.raises(StateDirError, match="could not be written"):
        journal.append(records(3, 3)).result(TIMEOUT_S)
    faulty_vfs.armed = None
    with pytest.raises(StateDirError, match="could not be written"):
        journal.append(records(4, 4)).result(TIMEOUT_S)
    assert (0 if fault == "write" else 1) == faulty_vfs.num_syncs
    assert journal.failure is not None
    journal.close()
    with closing(Journal.open(journal.path)) as again:
        found = list(again.read())
        assert found in (records(1, 2), records(1, 3))
        again.append(records(len(found) + 1, 5)).result(TIMEOUT_S)
        assert records(1, 5) == list(again.read())


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "tiny"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)]
    try:
        mounted = subprocess.run(mount, capture_output=True, timeout=30).returncode == 0
    except FileNotFoundError:
        mounted = False
    if not mounted:
        pytest.skip("a tiny tmpfs cannot be mounted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True, timeout=30)


def test_a_full_disk_loses_nothing_that_was_acknowledged(tiny_disk: Path) -> None:
    """Tests that on a full disk appends fail for good and a restart has exactly the acknowledged entries."""
    journal = Journal.create(tiny_disk / "journal.db", identity())
    num_acknowledged = 0
    while (failure := journal.append(records(num_acknowledged + 1, num_acknowledged + 1)).exception(TIMEOUT_S)) is None:
        num_acknowledged += 1
    assert isinstance(failure, StateDirError)
    assert "full" in failure.message
    with pytest.raises(StateDirError, match="full"):
        journal.append(records(num_acknowledged + 2, num_acknowledged + 2)).result(TIMEOUT_S)
    journal.close()
    assert num_acknowledged > 0
    reader = Journal.read_only(journal.path)
    assert records(1, num_acknowledged) == list(reader.read())
