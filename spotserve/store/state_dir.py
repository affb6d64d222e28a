"""The state dir: all that a daemon keeps on disk, and the lock that makes it the only one to write there.

It decides whether a start continues the journal or begins a new one, and never mixes two models: the content
store of another model is deleted, its journal archived or refused.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import socket
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from spotserve.errors import StateDirError
from spotserve.store.journal import Journal
from spotserve.store.journal_file import JournalIdentity

LOWEST_PORT = 20000
PORT_TRIES = 50
OUTGOING_PORTS = Path("/proc/sys/net/ipv4/ip_local_port_range")
_FILE_MODE = 0o600
_DATABASE_SUFFIXES = ("", "-wal", "-shm")


@dataclass(frozen=True, slots=True)
class OpenedJournal:
    """The journal of this run; `continued` when the last daemon crashed or left requests open."""

    journal: Journal
    continued: bool


def default_state_dir(port: int, environment: Mapping[str, str]) -> Path:
    """Where the daemon at `port` keeps its state unless told otherwise."""
    base = environment.get("XDG_STATE_HOME", "")
    # The XDG specification: a relative path is invalid and is to be ignored.
    home = Path(base) if base.startswith("/") else Path.home() / ".local" / "state"
    return home / "spotserve" / str(port)


class StateDir:
    """A locked state dir. Use as a context manager, or `close` it.

    Opening creates it (mode 0700), takes the lock, writes the pid and raises the term, all durably. The lock goes
    with the last process that has it open: a child that is forked without exec would hold it on.

    Args:
        path: The folder.
        fresh: Archive the journal and delete the content of earlier runs when the journal is opened, so that a start
            that is refused before destroys nothing. Term, secret and port stay: workers of the earlier run must still
            be told apart.

    Raises:
        StateDirError: It cannot be created or written, or another process holds it.
    """

    def __init__(self, path: Path, *, fresh: bool = False) -> None:
        self.path = path
        self._fresh = fresh
        try:
            _create_private(path)
            self._lock_fd = _lock(path / "pid")
        except OSError as error:
            raise _unwritable(path, error) from error
        try:
            self.logs_path.mkdir(mode=0o700, exist_ok=True)
            self._term = self._raise_term()
        except OSError as error:
            self.close()
            raise _unwritable(path, error) from error
        except StateDirError:
            self.close()
            raise

    def __enter__(self) -> StateDir:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def term(self) -> int:
        """The coordinator's term: higher at each start, so that workers can refuse an earlier coordinator."""
        return self._term

    @property
    def journal_path(self) -> Path:
        """The journal of this run."""
        return self.path / "journal.db"

    @property
    def ledger_path(self) -> Path:
        """The content store."""
        return self.path / "ledger.db"

    @property
    def logs_path(self) -> Path:
        """The folder of log files."""
        return self.path / "logs"

    @property
    def secret_path(self) -> Path:
        """The file to hand to `spotserve worker --secret-file`; exists after `secret()`."""
        return self.path / "worker-secret"

    def secret(self) -> str:
        """The secret that workers prove at registration: random, made once, readable by the owner only."""
        if not self.secret_path.exists():
            _write_durably(self.secret_path, secrets.token_hex(32))
        secret = self.secret_path.read_text().strip()
        if len(secret) < 32:
            raise StateDirError(
                f"{self.secret_path} holds {len(secret)} characters, fewer than 32", hint="delete the file"
            )
        return secret

    def worker_port(self, host: str = "127.0.0.1") -> int:
        """The port that workers dial: a free one at first, the same at every later start."""
        file = self.path / "worker-port"
        if file.exists():
            return _read_number(file, largest=65535)
        port = _free_port(host)
        _write_durably(file, str(port))
        return port

    def open_journal(self, *, model_digest: str, dtype: str, now_unix_s: float) -> OpenedJournal:
        """Continue the journal, or begin a new one: when told to, there is none or the last daemon stopped cleanly.

        Raises StateDirError when the journal to continue is corrupt or belongs to another model or dtype.
        """
        if self._fresh:
            self._archive_journal()
            self._fresh = False
        if self.journal_path.exists():
            journal = Journal.open(self.journal_path)
            identity, clean_stop = journal.identity, journal.clean_stop
            same = (identity.model_digest, identity.dtype) == (model_digest, dtype)
            if same and not clean_stop:
                return OpenedJournal(self._with_incarnation(journal), continued=True)
            if not clean_stop:
                journal.close()
                raise _other_model(self.journal_path, identity, model_digest=model_digest, dtype=dtype)
            journal.close()
            self._archive_journal()
            if not same:
                self._delete_ledger()
        else:
            # Content without the journal that accepted it belongs to nobody.
            self._delete_ledger()
        identity = JournalIdentity(
            model_digest=model_digest,
            dtype=dtype,
            created_unix_s=int(now_unix_s),
            incarnation=secrets.token_hex(8),
        )
        return OpenedJournal(self._with_incarnation(Journal.create(self.journal_path, identity)), continued=False)

    def archived_journals(self) -> list[Path]:
        """Earlier journals, oldest first."""
        numbered = [(int(file.stem.removeprefix("journal-")), file) for file in self.path.glob("journal-[0-9]*.db")]
        return [file for _, file in sorted(numbered)]

    def close(self) -> None:
        """Clear the pid and give the lock back. A second call does nothing."""
        if self._lock_fd is None:
            return
        with suppress(OSError):  # The pid of a process that ended misleads nobody: the lock decides.
            os.ftruncate(self._lock_fd, 0)
        os.close(self._lock_fd)
        self._lock_fd = None

    def _raise_term(self) -> int:
        file = self.path / "term"
        term = (_read_number(file, largest=2**53) if file.exists() else 0) + 1
        _write_durably(file, str(term))
        return term

    def _with_incarnation(self, journal: Journal) -> Journal:
        _write_durably(self.path / "incarnation", journal.identity.incarnation)
        return journal

    def _archive_journal(self) -> None:
        """Give the journal the next archive name; its WAL goes with it, for a corrupt one may need it."""
        if not self.journal_path.exists():
            return
        archived = self.archived_journals()
        number = int(archived[-1].stem.removeprefix("journal-")) + 1 if archived else 1
        for suffix in reversed(_DATABASE_SUFFIXES):
            file = self.path / f"journal.db{suffix}"
            if file.exists():
                file.rename(self.path / f"journal-{number}.db{suffix}")
        _sync_folder(self.path)

    def _delete_ledger(self) -> None:
        for suffix in _DATABASE_SUFFIXES:
            (self.path / f"ledger.db{suffix}").unlink(missing_ok=True)
        _sync_folder(self.path)


def _create_private(path: Path) -> None:
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    if path.stat().st_uid != os.geteuid():
        raise StateDirError(f"state dir {path} belongs to another user", hint="choose another with --state-dir")
    path.chmod(0o700)


def _lock(file: Path) -> int | None:
    """Lock the pid file for as long as it is open, and write our pid into it."""
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT, _FILE_MODE)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        holder = os.pread(descriptor, 32, 0).decode("ascii", "replace").strip() or "unknown"
        os.close(descriptor)
        raise StateDirError(
            f"state dir {file.parent} is held by process {holder}",
            hint="stop that daemon (spotserve stop), or choose another with --state-dir",
        ) from error
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
    return descriptor


def _read_number(file: Path, *, largest: int) -> int:
    text = file.read_text(errors="replace").strip()
    if not (text.isascii() and text.isdigit() and 1 <= int(text) <= largest):
        raise StateDirError(f"{file} holds {text[:32]!r}, not a number from 1 to {largest}", hint="restore the file")
    return int(text)


def _write_durably(file: Path, text: str) -> None:
    """Replace a small file at once: after a crash it holds the old text or the new."""
    draft = file.with_name(file.name + ".new")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, _FILE_MODE)
    with os.fdopen(descriptor, "w") as stream:
        stream.write(text + "\n")
        stream.flush()
        os.fsync(descriptor)
    draft.replace(file)
    _sync_folder(file.parent)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _unwritable(path: Path, error: OSError) -> StateDirError:
    return StateDirError(
        f"state dir {path} cannot be written: {error.strerror}", hint="choose another with --state-dir"
    )


def _other_model(path: Path, identity: JournalIdentity, *, model_digest: str, dtype: str) -> StateDirError:
    return StateDirError(
        f"{path} belongs to model {identity.model_digest} in {identity.dtype}, not {model_digest} in {dtype}",
        hint="start with --fresh, or serve the other model from another --state-dir",
    )


def _free_port(host: str) -> int:
    """A port that is free now and that no dialling process is given as its own.

    Between a crash and the restart workers dial again and again: from the system's range for outgoing connections one
    of them, or anybody else, would sooner or later hold the very port that the coordinator comes back to.
    """
    highest = _first_outgoing_port()
    for _ in range(PORT_TRIES if highest > LOWEST_PORT else 0):
        port = LOWEST_PORT + secrets.randbelow(highest - LOWEST_PORT)
        with suppress(OSError):
            return _bound_port(host, port)
    return _bound_port(host, 0)


def _bound_port(host: str, port: int) -> int:
    """The port that a listener gets; 0 lets the system choose. Raises OSError if it is taken."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as listener:
        listener.bind((host, port))
        return int(listener.getsockname()[1])


def _first_outgoing_port() -> int:
    """Where the system's range for outgoing connections begins; 0 where it does not say."""
    with suppress(OSError, ValueError, IndexError):
        return int(OUTGOING_PORTS.read_text().split()[0])
    return 0
