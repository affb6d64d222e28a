"""The process that workers are forked from: torch and transformers imported once, no thread, no gRPC.

`python -m spotserve.runtime.forkserver --socket PATH` serves JSON lines over a unix socket (mode 0600). Importing torch
and transformers costs seconds and hundreds of MB per process; a fork of this one costs milliseconds. It may fork safely
because it has a single thread for life: one selector loop reads requests and reaps children.

Requests: `{"op": "own"}` makes this connection the owner (its end is the server's end, unless `--shared`),
`{"op": "fork", "args": […], "log": PATH, "env": {…}}` starts an instance and answers `{"pid", "started_at"}`,
`{"op": "poll", "pid": N}` answers `{"running", "status"}`, `{"op": "ping"}` answers `{}`.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import importlib
import json
import os
import selectors
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch

MAX_LINE_BYTES = 1 << 20
PRELOADED = (
    "spotserve.runtime.stage_model",
    "spotserve.runtime.sampler",
    "spotserve.runtime.transfer",
    "spotserve.runtime.instance",
    "transformers.models.llama.modeling_llama",
)
_PR_SET_CHILD_SUBREAPER = 36
_OWNER_CHECK_S = 1.0
_MAX_REMEMBERED = 4096

Entry = Callable[[list[str]], int]


def instance_entry(args: list[str]) -> int:
    """What a child runs: one instance, with the arguments of `spotserve worker`."""
    module = importlib.import_module("spotserve.runtime.instance")
    return int(module.instance_main(args))


class ForkServer:
    """One listening socket, its connections, and the children."""

    def __init__(self, path: Path, *, is_shared: bool, parent_pid: int | None, entry: Entry = instance_entry) -> None:
        self._path = path
        self._is_shared = is_shared
        self._parent_pid = parent_pid
        self._entry = entry
        self._listener = _listen(path)
        self._selector = selectors.DefaultSelector()
        self._buffers: dict[socket.socket, bytearray] = {}
        self._owner: socket.socket | None = None
        self._is_stopping = False
        self._exits: dict[int, int] = {}
        self._wakeup, self._wakeup_writer = socket.socketpair()

    def serve(self) -> None:
        """Answer until the owner (or the parent) is gone."""
        _become_subreaper()
        self._wakeup.setblocking(False)
        self._wakeup_writer.setblocking(False)
        signal.set_wakeup_fd(self._wakeup_writer.fileno(), warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda number, frame: None)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._selector.register(self._wakeup, selectors.EVENT_READ)
        try:
            while not self._is_stopping and self._has_parent():
                for key, _ in self._selector.select(_OWNER_CHECK_S):
                    self._handle(key.fileobj)
                self._reap()
        finally:
            signal.set_wakeup_fd(-1)
            with contextlib.suppress(FileNotFoundError):
                self._path.unlink()

    def _has_parent(self) -> bool:
        return self._parent_pid is None or os.getppid() == self._parent_pid

    def _handle(self, ready: Any) -> None:
        if ready is self._listener:
            connection, _ = self._listener.accept()
            self._buffers[connection] = bytearray()
            self._selector.register(connection, selectors.EVENT_READ)
        elif ready is self._wakeup:
            with contextlib.suppress(BlockingIOError):
                self._wakeup.recv(4096)
        else:
            self._read(ready)

    def _read(self, connection: socket.socket) -> None:
        try:
            part = connection.recv(65536)
        except ConnectionError:
            part = b""
        buffer = self._buffers[connection]
        buffer += part
        if not part or len(buffer) > MAX_LINE_BYTES:
            self._drop(connection)
            return
        while b"\n" in buffer:
            line, _, rest = bytes(buffer).partition(b"\n")
            buffer[:] = rest
            try:
                connection.sendall(json.dumps(self._answer(connection, line)).encode() + b"\n")
            except ConnectionError:
                self._drop(connection)
                return

    def _drop(self, connection: socket.socket) -> None:
        self._selector.unregister(connection)
        del self._buffers[connection]
        connection.close()
        if connection is self._owner and not self._is_shared:
            self._is_stopping = True

    def _answer(self, connection: socket.socket, line: bytes) -> dict[str, Any]:
        try:
            request = json.loads(line)
            operation = request["op"]
            if operation == "own":
                self._owner = connection
                return {}
            if operation == "fork":
                return self._fork(list(request["args"]), str(request["log"]), dict(request.get("env", {})))
            if operation == "poll":
                return self._poll(int(request["pid"]))
            if operation == "ping":
                return {}
            return {"error": f"operation {operation!r} is not known"}
        except (ValueError, KeyError, TypeError) as error:
            return {"error": f"request is malformed ({type(error).__name__})"}
        except OSError as error:
            return {"error": f"fork failed: {error}"}

    def _fork(self, args: list[str], log: str, env: dict[str, str]) -> dict[str, Any]:
        log_descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        sys.stdout.flush()
        sys.stderr.flush()
        is_group, says_group = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(is_group)
            self._run_child(args, log_descriptor, env, says_group)
        os.close(log_descriptor)
        os.close(says_group)
        os.read(is_group, 1)  # Until the child leads its group: whoever learns the pid may signal the group at once.
        os.close(is_group)
        self._exits.pop(pid, None)
        return {"pid": pid, "started_at": psutil.Process(pid).create_time()}

    def _run_child(self, args: list[str], log_descriptor: int, env: dict[str, str], says_group: int) -> None:
        """Become an instance: a process group of its own, none of our sockets, stdio to the log. Never returns."""
        status = 1
        try:
            os.setsid()
            os.close(says_group)
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            for inherited in [self._listener, self._wakeup, self._wakeup_writer, *self._buffers]:
                inherited.close()
            self._selector.close()
            _redirect(log_descriptor)
            os.environ.update(env)
            status = self._entry(args)
        except BaseException:  # noqa: BLE001
            # The edge of the process: what is not caught here would run the parent's loop in the child.
            traceback.print_exc()
        finally:
            with contextlib.suppress(OSError, ValueError):
                sys.stderr.flush()
                sys.stdout.flush()
            os._exit(status)

    def _poll(self, pid: int) -> dict[str, Any]:
        self._reap()
        if pid in self._exits:
            return {"running": False, "status": self._exits[pid]}
        return {"running": psutil.pid_exists(pid), "status": None}

    def _reap(self) -> None:
        """Collect the dead, grandchildren of a dead instance included; negative status is a signal's number."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            if len(self._exits) >= _MAX_REMEMBERED:
                del self._exits[next(iter(self._exits))]
            self._exits[pid] = os.waitstatus_to_exitcode(status)


def _listen(path: Path) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    previous = os.umask(0o177)
    try:
        listener.bind(str(path))
    finally:
        os.umask(previous)
    listener.listen(64)
    return listener


def _become_subreaper() -> None:
    """Adopt the GPU processes of an instance whose first process died, so that no zombie keeps its group alive."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER) failed")


def _redirect(log_descriptor: int) -> None:
    null = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((null, 0), (log_descriptor, 1), (log_descriptor, 2)):
        os.dup2(source, target)
    os.close(null)
    os.close(log_descriptor)


def preload() -> None:
    """Import what every worker needs; whoever starts a thread while being imported breaks the fork, so check."""
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    for name in PRELOADED:
        importlib.import_module(name)
    num_threads = len(os.listdir("/proc/self/task")) if os.path.isdir("/proc/self/task") else threading.active_count()
    if num_threads != 1 or "grpc" in sys.modules:
        raise RuntimeError(f"preloading left {num_threads} threads, grpc imported: {'grpc' in sys.modules}")
    # What lives now lives for ever: keep the collector from touching, and so copying, the shared pages.
    gc.collect()
    gc.freeze()


def main(arguments: list[str] | None = None) -> int:
    """Serve until the owner is gone; one line `ready` on stdout once the socket listens."""
    parser = argparse.ArgumentParser(prog="spotserve-forkserver", description="Forks preloaded workers")
    parser.add_argument("--socket", type=Path, required=True)
    parser.add_argument("--parent-pid", type=int)
    parser.add_argument("--shared", action="store_true", help="serve on after the owner's end")
    options = parser.parse_args(arguments)
    preload()
    server = ForkServer(options.socket, is_shared=options.shared, parent_pid=options.parent_pid)
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    server.serve()
    return 0


if __name__ == "__main__":
    sys.exit(main())
