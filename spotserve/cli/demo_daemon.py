"""The daemon that a demo starts for itself: its own folder, a free port, and nothing left when it is over."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from spotserve.cli.client import AdminClient
from spotserve.errors import DaemonUnreachableError, SpotServeError

ENTRY = "from spotserve.cli.main import main; main()"
START_TIMEOUT_S = 300.0
STOP_TIMEOUT_S = 30.0
KEPT_VARIABLES = ("SPOTSERVE_FORKSERVER", "SPOTSERVE_PROFILE_CACHE")
"""The variables that say where a daemon finds things; those that say what it is do not reach the demo's."""


@contextmanager
def temporary_daemon(*arguments: str) -> Iterator[AdminClient]:
    """A daemon with these arguments of `spotserve run`, ready; when the block ends it is gone with its folder."""
    folder = Path(tempfile.mkdtemp(prefix="spotserve-demo-"))
    process = None
    try:
        port = free_port()
        process = _start(folder, port, arguments)
        client = AdminClient(f"http://127.0.0.1:{port}")
        _wait_ready(process, client, folder / "stderr")
        yield client
    finally:
        if process is not None:
            _stop(process)
        shutil.rmtree(folder, ignore_errors=True)


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def _start(folder: Path, port: int, arguments: tuple[str, ...]) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", ENTRY, "run", "--port", str(port), "--state-dir", str(folder / "state")]
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith("SPOTSERVE_") or name in KEPT_VARIABLES
    }
    environment["TORCHINDUCTOR_CACHE_DIR"] = str(folder / "torch")
    with (folder / "stderr").open("wb") as log:
        return subprocess.Popen(
            [*command, *arguments],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=log,
            # Ctrl-C is for the demo, which then stops the daemon in its own way.
            start_new_session=True,
        )


def _wait_ready(process: subprocess.Popen[bytes], client: AdminClient, log: Path) -> None:
    deadline_s = time.monotonic() + START_TIMEOUT_S
    while not _is_ready(client):
        if process.poll() is not None:
            lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
            raise SpotServeError(
                f"the demo's daemon ended with {process.returncode}: {lines[-1] if lines else 'no word'}"
            )
        if time.monotonic() > deadline_s:
            raise SpotServeError(f"the demo's daemon was not ready after {START_TIMEOUT_S:g} s")
        time.sleep(0.1)


def _is_ready(client: AdminClient) -> bool:
    try:
        client.get("/health", timeout_s=5.0)
    except DaemonUnreachableError:
        return False
    except SpotServeError:  # 503: it starts
        return False
    return True


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Stop it as a person would; whatever is left after that is killed."""
    try:
        family = psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        family = []
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
    try:
        process.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    _, alive = psutil.wait_procs(family, timeout=5.0)
    for child in alive:
        child.kill()
    psutil.wait_procs(alive, timeout=5.0)
