"""`spotserve run` as a process of a benchmark, driven by its HTTP port as any script would."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2 as httpx

SPOTSERVE = str(Path(sys.executable).parent / "spotserve")
START_TIMEOUT_S = 300.0
STOP_TIMEOUT_S = 60.0


class DaemonError(Exception):
    """The daemon did not do what the benchmark needs of it."""


class Daemon:
    """One daemon from its start to its stop; its state dir stays for the journal to be read."""

    def __init__(self, state_dir: Path, args: list[str], environment: Mapping[str, str]) -> None:
        self.state_dir = state_dir
        self.port = _free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.command = [SPOTSERVE, "run", *args]
        self._log_path = state_dir.parent / f"{state_dir.name}.stderr"
        own = ["--port", str(self.port), "--state-dir", str(state_dir), "--drain", "1", "--orphan-timeout", "20"]
        with self._log_path.open("ab") as log:
            self._process = subprocess.Popen(
                [*self.command, *own],
                env={**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "NO_COLOR": "1", **environment},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=log,
            )

    def wait_for(self, condition: Callable[[], bool], what: str, timeout_s: float) -> None:
        """Poll until `condition()` holds."""
        deadline_s = time.monotonic() + timeout_s
        while not condition():
            if self._process.poll() is not None:
                raise DaemonError(f"daemon ended while waiting for {what}:\n{self.log_tail()}")
            if time.monotonic() > deadline_s:
                raise DaemonError(f"not {what} after {timeout_s:g} s:\n{self.log_tail()}")
            time.sleep(0.02)

    def is_ready(self) -> bool:
        """Whether it has begun to serve."""
        try:
            return bool(httpx.get(f"{self.url}/health", timeout=5.0).status_code == 200)
        except httpx.TransportError:
            return False

    def status(self) -> dict[str, Any]:
        """The JSON of `spotserve status`."""
        return dict(httpx.get(f"{self.url}/admin/status", timeout=10.0).json())

    def admin(self, verb: str, **body: Any) -> dict[str, Any]:
        """An admin call."""
        answer = httpx.post(f"{self.url}/admin/{verb}", json=body, timeout=60.0)
        if answer.status_code >= 300:
            raise DaemonError(f"{verb} was answered {answer.status_code}: {answer.text}")
        return dict(answer.json())

    def log_tail(self, num_lines: int = 30) -> str:
        """The end of its stderr."""
        return "\n".join(self._log_path.read_text(errors="replace").splitlines()[-num_lines:])

    def stop(self) -> None:
        """SIGTERM; what is open is not waited for longer than the drain."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


@contextmanager
def running(state_dir: Path, args: list[str], environment: Mapping[str, str]) -> Iterator[Daemon]:
    """A daemon that has begun to serve; it is stopped at the end."""
    daemon = Daemon(state_dir, args, environment)
    try:
        daemon.wait_for(daemon.is_ready, "ready", START_TIMEOUT_S)
        yield daemon
    finally:
        daemon.stop()


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
