"""What a person sees of a start: bars on a terminal, now and then a line of the log elsewhere, nothing on stdout."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from itertools import pairwise

import pytest
import structlog
from rich.console import Console

from spotserve.cli.start_progress import StartBars, StartLines, start_progress
from spotserve.log import configure_logging


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


def test_what_moves_is_for_terminals_with_colour(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests that a file, and a terminal whose reader set NO_COLOR, get lines."""
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert isinstance(start_progress(Terminal()), StartBars)
    assert isinstance(start_progress(io.StringIO()), StartLines)
    monkeypatch.setenv("NO_COLOR", "1")
    assert isinstance(start_progress(Terminal()), StartLines)
