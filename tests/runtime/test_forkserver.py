"""The forkserver: forks with one thread, reaps what dies, and ends with its owner."""

from __future__ import annotations

import json
import os
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from spotserve.errors import SpecError
from spotserve.runtime.forkserver_client import SOCKET_VARIABLE, ForkServer, ForkServerError, launch
from spotserve.runtime.instance import parse_bytes, parse_worker_arguments

ARGUMENTS = ["--coordinator", "127.0.0.1:9", "--secret-file", "nowhere", "--instance", "i0", "--gpu-memory", "6MiB"]


@pytest.fixture(scope="module")
def own_socket(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the module's forkserver listens."""
    return tmp_path_factory.mktemp("fork") / "socket"


@pytest.fixture(scope="module")
def shared(own_socket: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A shared forkserver, so that one preload serves the module."""
    process = launch(own_socket, log=own_socket.parent / "log", is_shared=True)
    yield process
    process.kill()
    process.wait()


@pytest.fixture
def server(own_socket: Path, shared: subprocess.Popen[bytes]) -> Iterator[ForkServer]:
    """A connection to it."""
    client = ForkServer.connect(own_socket)
    yield client
    client.close()


def wait_for_status(server: ForkServer, pid: int) -> int:
    """The exit status of a child, once it has one."""
    deadline_s = time.monotonic() + 30
    while (status := server.exit_status(pid)) is None:
        assert time.monotonic() < deadline_s
        time.sleep(0.01)
    return status


@pytest.mark.e2e
def test_forks_a_group_of_its_own_with_a_log_and_reaps_it(server: ForkServer, tmp_path: Path) -> None:
    """Tests that a child leads its own session, writes to its log, and that its exit status is known after its end."""
    forked = server.fork(ARGUMENTS, log=tmp_path / "log")
    assert 2 == wait_for_status(server, forked.pid)
    assert "secret file nowhere cannot be read (No such file or directory)\n" == (tmp_path / "log").read_text()
    assert 0o600 == stat.S_IMODE((tmp_path / "log").stat().st_mode)
    assert not psutil.pid_exists(forked.pid)


@pytest.mark.e2e
def test_children_are_apart_from_the_forkserver(
    server: ForkServer, shared: subprocess.Popen[bytes], tmp_path: Path
) -> None:
    """Tests that an instance has its own process group, no socket of the forkserver, and is reaped when killed."""
    secret = tmp_path / "secret"
    secret.write_text("s")
    arguments = [*ARGUMENTS, "--secret-file", str(secret), "--gpus", "2"]
    forked = server.fork(arguments, log=tmp_path / "log", env={"SPOTSERVE_TEST_MARK": "1"})
    process = psutil.Process(forked.pid)
    assert process.create_time() == forked.started_at
    assert forked.pid == os.getpgid(forked.pid)
    deadline_s = time.monotonic() + 30
    while not process.children():
        assert time.monotonic() < deadline_s
        time.sleep(0.01)
    sibling = process.children()[0]
    assert forked.pid == os.getpgid(sibling.pid)
    unix = [link for link in psutil.Process(shared.pid).net_connections("unix") if link.laddr]
    assert unix
    assert [] == [link for link in process.net_connections("unix") if link.laddr]
    os.kill(forked.pid, signal.SIGKILL)
    assert -signal.SIGKILL == wait_for_status(server, forked.pid)
    sibling.kill()  # Its parent is gone: the forkserver has adopted it and must reap it too.
    while sibling.is_running():
        assert time.monotonic() < deadline_s
        time.sleep(0.01)


@pytest.mark.e2e
def test_the_socket_is_private_and_garbage_is_answered(
    server: ForkServer, own_socket: Path, shared: subprocess.Popen[bytes]
) -> None:
    """Tests that only the user may connect, and that a malformed line is an error and not the server's end."""
    assert 0o600 == stat.S_IMODE(own_socket.stat().st_mode)
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(str(own_socket))
    with connection, connection.makefile("rb") as lines:
        for line in (b"not json\n", b'{"op": "fork"}\n', b'{"op": "dance"}\n', b"[]\n"):
            connection.sendall(line)
            assert "error" in json.loads(lines.readline())
    with pytest.raises(ForkServerError, match="fork failed"):
        server.fork(ARGUMENTS, log=Path("/nowhere/log"))
    assert shared.poll() is None


@pytest.mark.e2e
@pytest.mark.slow
def test_ends_with_its_owner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests that a forkserver of our own ends when its owner closes, and when its owner is killed."""
    monkeypatch.delenv(SOCKET_VARIABLE, raising=False)
    owner = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys\n"
            "from spotserve.runtime.forkserver_client import ForkServer\n"
            "server = ForkServer.start()\n"
            "print(server._process.pid, flush=True)\n"
            "sys.stdin.read()\n",
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert owner.stdout is not None
    assert owner.stdin is not None
    forkserver = psutil.Process(int(owner.stdout.readline()))
    owner.kill()
    owner.wait()
    owner.stdout.close()
    owner.stdin.close()
    psutil.wait_procs([forkserver], timeout=20)
    assert not forkserver.is_running()


@pytest.mark.parametrize(
    ("text", "expected"), [("6MiB", 6 << 20), ("1048576", 1 << 20), ("80GB", 80 * 10**9), ("1.5 GiB", 3 << 29)]
)
def test_memory_sizes(text: str, expected: int) -> None:
    """Tests that memory sizes mean what their unit says."""
    assert expected == parse_bytes(text)


@pytest.mark.parametrize("text", ["", "x", "-1", "0", "nan", "inf", "6 parsecs"])
def test_wrong_memory_sizes_are_refused(text: str) -> None:
    """Tests that a size that is no positive number of bytes is an error that names it."""
    with pytest.raises(SpecError, match="memory size"):
        parse_bytes(text)


def test_worker_arguments() -> None:
    """Tests that the arguments of a worker become its settings, and that wrong ones are refused."""
    settings = parse_worker_arguments([*ARGUMENTS, "--gpus", "2", "--orphan-timeout", "3"])
    assert ("i0/0", 2, 6 << 20, 3.0) == (
        settings.worker,
        settings.num_gpus,
        settings.gpu_memory_bytes,
        settings.orphan_timeout_s,
    )
    assert ("", "slow") == (settings.gpu_type, parse_worker_arguments([*ARGUMENTS, "--gpu-type=slow"]).gpu_type)
    for wrong in (["--gpus", "0"], ["--gpus", "x"], ["--device", "tpu"], ["--colour", "red"]):
        with pytest.raises(SpecError, match="worker arguments"):
            parse_worker_arguments([*ARGUMENTS, *wrong])
    with pytest.raises(SpecError, match="required"):
        parse_worker_arguments(["--instance", "i0"])
