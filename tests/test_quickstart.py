"""The README's quickstart, run line by line as it stands there."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

README = Path(__file__).resolve().parent.parent / "README.md"
ENTRY = "from spotserve.cli.main import main; main()"
START_TIMEOUT_S = 120
STOP_TIMEOUT_S = 90


def quickstart() -> list[list[str]]:
    """The commands of the quickstart, each as its words."""
    section = README.read_text(encoding="utf-8").split("## Quickstart")[1]
    block = re.search(r"```sh\n(.*?)```", section, re.DOTALL)
    assert block is not None
    return [shlex.split(line, comments=True) for line in block[1].replace("\\\n", " ").splitlines()]


def test_quickstart_is_ten_lines() -> None:
    """Tests that the quickstart stays short, sets up first, starts the daemon second and stops it last."""
    commands = quickstart()
    assert len(commands) <= 10
    assert ["make", "setup"] == commands[0]
    assert [".venv/bin/spotserve", "run", "&"] == commands[1]
    assert [".venv/bin/spotserve", "stop"] == commands[-1]


@pytest.fixture
def daemon(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, daemon_environment: dict[str, str]
) -> Iterator[subprocess.Popen[str]]:
    """`spotserve run` as the quickstart starts it, on a port and in a state dir of its own."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    for variable in [name for name in os.environ if name.startswith("SPOTSERVE_")]:
        monkeypatch.delenv(variable)
    for variable, value in daemon_environment.items():
        monkeypatch.setenv(variable, value)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.setenv("SPOTSERVE_PORT", str(port))
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen([sys.executable, "-c", ENTRY, "run"], stdout=subprocess.PIPE, stderr=log, text=True)
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        assert f"ready http://127.0.0.1:{port}\n" == line, (tmp_path / "log").read_text()
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


@pytest.mark.e2e
@pytest.mark.skipif(shutil.which("curl") is None, reason="no curl here")
def test_quickstart(daemon: subprocess.Popen[str]) -> None:
    """Tests that every line of the quickstart exits 0, the answer has text, and the daemon stops cleanly."""
    port = os.environ["SPOTSERVE_PORT"]
    outputs = []
    for words in quickstart()[2:]:
        command = [word.replace(":8000/", f":{port}/") for word in words]
        if command[0] == ".venv/bin/spotserve":
            command = [sys.executable, "-c", ENTRY, *command[1:]]
        done = subprocess.run(command, capture_output=True, text=True, timeout=START_TIMEOUT_S)
        assert (0, "") == (done.returncode, done.stderr), words
        outputs.append(done.stdout)
    assert re.search(r'"content":"[^"]', outputs[0])
    assert "i4\n" in outputs
    assert 0 == daemon.wait(timeout=STOP_TIMEOUT_S)
