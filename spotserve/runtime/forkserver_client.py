"""Starts or finds a forkserver and asks it for instances. No torch here: the coordinator imports this module.

A forkserver that this client started belongs to it and ends with it (or with its process, however that dies).
With `SPOTSERVE_FORKSERVER=PATH` in the environment the one at PATH is used and left alone: tests share one.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spotserve.errors import SpotServeError

SOCKET_VARIABLE = "SPOTSERVE_FORKSERVER"
START_TIMEOUT_S = 120.0
_ANSWER_TIMEOUT_S = 30.0
_CONNECT_POLL_S = 0.05


class ForkServerError(SpotServeError):
    """The forkserver did not start, is gone, or refused a request."""

    code = "SPS-194"


@dataclass(frozen=True, slots=True)
class ForkedProcess:
    """The first process of an instance; its pid is the id of the instance's process group too."""

    pid: int
    started_at: float
    """As the OS tells it (psutil create_time): a pid is signalled only if this still agrees."""


class ForkServer:
    """A connection to a forkserver. Thread-safe."""

    def __init__(self, connection: socket.socket, process: subprocess.Popen[bytes] | None, folder: str | None) -> None:
        self._connection = connection
        self._process = process
        self._folder = folder
        self._reader = connection.makefile("rb")
        self._lock = threading.Lock()

    @classmethod
    def start(cls, *, log: Path | None = None) -> ForkServer:
        """The forkserver that the environment names, else one of our own (its output goes to `log`).

        Raises:
            ForkServerError: none answers in time.
        """
        named = os.environ.get(SOCKET_VARIABLE)
        if named:
            return cls.connect(Path(named))
        # A unix socket's path is bounded to about 100 bytes, so it is not in the state dir.
        folder = tempfile.mkdtemp(prefix="spotserve-")
        path = Path(folder) / "forkserver"
        process = launch(path, log=log, parent_pid=os.getpid())
        try:
            server = cls(_dial(path, process), process, folder)
            server._ask({"op": "own"})
        except BaseException:
            process.kill()
            process.wait()
            _remove(folder)
            raise
        return server

    @classmethod
    def connect(cls, path: Path) -> ForkServer:
        """A shared forkserver that somebody else started."""
        return cls(_dial(path, None), None, None)

    def fork(self, args: Sequence[str], *, log: Path, env: Mapping[str, str] | None = None) -> ForkedProcess:
        """Start an instance with the arguments of `spotserve worker`; its output is appended to `log`."""
        answer = self._ask({"op": "fork", "args": list(args), "log": str(log), "env": dict(env or {})})
        return ForkedProcess(pid=answer["pid"], started_at=answer["started_at"])

    def exit_status(self, pid: int) -> int | None:
        """The exit status of a process that ended (negative: the signal that killed it), None while it runs."""
        answer = self._ask({"op": "poll", "pid": pid})
        if answer["running"]:
            return None
        status = answer["status"]
        return 0 if status is None else int(status)

    def close(self) -> None:
        """End the connection, and with it a forkserver of our own. Instances live on."""
        with self._lock:
            self._reader.close()
            self._connection.close()
        if self._process is not None:
            try:
                self._process.wait(timeout=5.0)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        if self._folder is not None:
            _remove(self._folder)

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        with self._lock:
            try:
                self._connection.sendall(json.dumps(request).encode() + b"\n")
                line = self._reader.readline()
            except (OSError, ValueError) as error:
                raise ForkServerError(f"forkserver does not answer ({error})") from error
        if not line:
            raise ForkServerError("forkserver is gone", hint="its log tells why")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise ForkServerError(f"forkserver refused {request['op']}: {answer['error']}")
        return answer


def launch(
    path: Path, *, log: Path | None = None, parent_pid: int | None = None, is_shared: bool = False
) -> subprocess.Popen[bytes]:
    """Start the forkserver process listening at `path`; returns before it has imported torch."""
    command = [sys.executable, "-m", "spotserve.runtime.forkserver", "--socket", str(path)]
    command += ["--parent-pid", str(parent_pid)] if parent_pid is not None else []
    command += ["--shared"] if is_shared else []
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    environment.pop(SOCKET_VARIABLE, None)
    # A worker needs no client's key; what it does not have it cannot leak.
    environment.pop("SPOTSERVE_API_KEY", None)
    output = subprocess.DEVNULL if log is None else os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    try:
        return subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            # Ctrl-C belongs to the daemon alone; workers and their forkserver are told by it.
            start_new_session=True,
        )
    finally:
        if output >= 0:
            os.close(output)


def _dial(path: Path, process: subprocess.Popen[bytes] | None) -> socket.socket:
    deadline_s = time.monotonic() + START_TIMEOUT_S
    while True:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            connection.connect(str(path))
        except (FileNotFoundError, ConnectionRefusedError) as error:
            connection.close()
            if process is not None and process.poll() is not None:
                raise ForkServerError(
                    f"forkserver ended with status {process.returncode} at start", hint="its log tells why"
                ) from error
            if time.monotonic() >= deadline_s:
                raise ForkServerError(f"no forkserver at {path} after {START_TIMEOUT_S:.0f} s") from error
            time.sleep(_CONNECT_POLL_S)
        else:
            connection.settimeout(_ANSWER_TIMEOUT_S)
            return connection


def _remove(folder: str) -> None:
    (Path(folder) / "forkserver").unlink(missing_ok=True)
    Path(folder).rmdir()
