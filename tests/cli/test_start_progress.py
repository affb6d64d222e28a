"""What a person sees of a start: bars on a terminal, now and then a line of the log elsewhere, nothing on stdout."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pty
import shutil
import subprocess
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
import structlog
from rich.console import Console

from spotserve.app import BUILTIN_MODEL, deployment
from spotserve.cli import profile_command, run_command
from spotserve.cli.main import run_verb
from spotserve.cli.start_progress import StartBars, StartLines, start_progress
from spotserve.core.ports import Progress
from spotserve.errors import ModelError
from spotserve.log import configure_logging
from tests.e2e.daemon import SPOTSERVE

HIDE_CURSOR, SHOW_CURSOR = b"\x1b[?25l", b"\x1b[?25h"


class Terminal(io.StringIO):
    """Text that went to a terminal."""

    def isatty(self) -> bool:
        """It is one."""
        return True


class Clock:
    """Seconds that pass only when told to."""

    now_s = 0.0

    def __call__(self) -> float:
        """The time."""
        return self.now_s


@pytest.fixture
def log() -> Iterator[io.StringIO]:
    """The log, as JSON lines."""
    stream = io.StringIO()
    configure_logging("json", stream=stream)
    yield stream
    structlog.reset_defaults()


def test_lines_are_few_and_tell_the_end(log: io.StringIO) -> None:
    """Tests that a short stage is silent, and a long one is told every few seconds and at its end."""
    clock = Clock()
    lines = StartLines(clock)
    lines.show("verify", 10, 10)
    lines.end()
    assert "" == log.getvalue()
    for done in range(0, 101, 1):
        clock.now_s += 0.2
        lines.show("download", done, 100)
    lines.end()
    told = [json.loads(line) for line in log.getvalue().splitlines()]
    assert {("download", 100)} == {(line["stage"], line["total"]) for line in told}
    assert [100] == [line["done"] for line in told][-1:]
    assert all(later["elapsed_s"] - earlier["elapsed_s"] >= 5 for earlier, later in pairwise(told[:-1]))
    assert 2 <= len(told) <= 5


def test_bars_make_way_for_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests that a bar is drawn on a terminal, that a line of the log erases it first, and that a long stage stays."""
    terminal, clock = Terminal(), Clock()
    monkeypatch.setenv("TERM", "xterm")
    bars = StartBars(Console(file=terminal, force_terminal=True, width=100), clock)
    bars.show("download", 250_000_000, 1_000_000_000)
    assert "downloading" in terminal.getvalue()
    assert "250.0 MB of 1.0 GB" in terminal.getvalue()
    before = len(terminal.getvalue())
    bars.stream.write("a line\n")
    after = terminal.getvalue()[before:]
    assert after.endswith("a line\n")
    assert "\x1b[2K" in after  # The bar's line is erased before.
    clock.now_s = 4.0
    bars.show("download", 1_000_000_000, 1_000_000_000)
    bars.show("join", 1, 4)
    bars.end()
    assert "downloading: 1.0 GB of 1.0 GB in 4 s" in terminal.getvalue()
    assert "1 of 4" in terminal.getvalue()
    assert not terminal.getvalue().rstrip().endswith("of 4")


@pytest.mark.e2e
def test_a_refused_start_gives_the_terminal_back(tmp_path: Path) -> None:
    """Tests that a start that is refused under its bar shows the cursor again before its error."""
    folder = Path(shutil.copytree(BUILTIN_MODEL, tmp_path / "model"))
    (folder / "SHA256SUMS").write_text(f"{'0' * 64}  model.safetensors\n")
    command = [SPOTSERVE, "run", str(folder), "--port", "0", "--state-dir", str(tmp_path / "state"), "--instances", "1"]
    ours, theirs = pty.openpty()
    environment = {name: value for name, value in os.environ.items() if name != "NO_COLOR"} | {"TERM": "xterm"}
    with subprocess.Popen(command, env=environment, stderr=theirs, stdout=subprocess.DEVNULL) as process:
        os.close(theirs)
        told = all_of(ours)
    assert 2 == process.returncode
    assert 1 <= told.count(HIDE_CURSOR) == told.count(SHOW_CURSOR)
    assert told.rindex(SHOW_CURSOR) < told.index(b"error: ")


def all_of(terminal: int) -> bytes:
    """What is written to a terminal until nobody is left there."""
    told = b""
    with os.fdopen(terminal, "rb", buffering=0) as stream, contextlib.suppress(OSError):
        while piece := stream.read(4096):
            told += piece
    return told


@pytest.mark.parametrize("interruption", [KeyboardInterrupt(), ModelError("no such model")])
@pytest.mark.parametrize("verb", ["run", "profile"])
def test_every_start_that_ends_early_ends_its_bar(
    verb: str, interruption: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tests that after Ctrl-C or a refusal in the middle of a download no bar is left."""
    terminal = Terminal()
    monkeypatch.setenv("TERM", "xterm")

    def stopped(model: str, progress: Progress) -> None:
        progress.show("download", 1, 2)
        raise interruption

    monkeypatch.setattr(deployment, "resolve_model", stopped)
    monkeypatch.setattr(profile_command, "resolve_model", stopped)
    for command in (run_command, profile_command):
        bars = StartBars(Console(file=terminal, force_terminal=True, width=100))
        monkeypatch.setattr(command, "default_progress", lambda bars=bars: bars)
    flags = ["--port", "0", "--instances", "1"] if verb == "run" else []
    assert run_verb([verb, "org/name", "--state-dir", str(tmp_path / "state"), *flags]) in (2, 130)
    told = terminal.getvalue().encode()
    assert 1 == told.count(HIDE_CURSOR) == told.count(SHOW_CURSOR)


def test_what_moves_is_for_terminals_with_colour(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests that a file, and a terminal whose reader set NO_COLOR, get lines."""
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert isinstance(start_progress(Terminal()), StartBars)
    assert isinstance(start_progress(io.StringIO()), StartLines)
    monkeypatch.setenv("NO_COLOR", "1")
    assert isinstance(start_progress(Terminal()), StartLines)
