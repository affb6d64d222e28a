"""What a person sees of a start: bars on a terminal, lines of the log anywhere else. Always on stderr."""

from __future__ import annotations

import io
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import IO, TextIO, cast

from rich.console import Console
from rich.filesize import decimal
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from spotserve.core.ports import StartStage
from spotserve.log import get_logger

TITLES: dict[StartStage, str] = {
    "download": "downloading",
    "verify": "checking files",
    "join": "instances",
    "load": "loading weights",
}
PATIENCE_S = 2.0
"""A stage that is over sooner leaves no line on a terminal."""
PERIOD_S = 5.0
MAX_PERIOD_S = 60.0
"""Of the log's lines about one stage: seldomer the longer it takes."""
BAR_COLUMNS = 40

log = get_logger("start")


class StartLines:
    """Tells a start in lines of the log: one now and then of a stage that lasts."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._stage: StartStage | None = None
        self._began_s = 0.0
        self._told_s = 0.0
        self._period_s = PERIOD_S
        self._counts = (0, 0)

    @property
    def stream(self) -> None:
        """Where else lines may go meanwhile: anywhere."""
        return None

    def show(self, stage: StartStage, done: int, total: int) -> None:
        """So much of a stage is done."""
        now_s = self._clock()
        if stage != self._stage:
            self.end()
            self._stage, self._began_s, self._told_s, self._period_s = stage, now_s, now_s, PERIOD_S
        self._counts = (done, total)
        if now_s - self._told_s >= self._period_s:
            self._told_s, self._period_s = now_s, min(MAX_PERIOD_S, 2 * self._period_s)
            self._tell()

    def end(self) -> None:
        """The stage is over; one that was told of is told to its end."""
        if self._stage is not None and self._told_s > self._began_s:
            self._tell()
        self._stage = None

    def _tell(self) -> None:
        done, total = self._counts
        log.info("start_progress", stage=self._stage, done=done, total=total, elapsed_s=round(self._elapsed_s(), 1))

    def _elapsed_s(self) -> float:
        return self._clock() - self._began_s


class StartBars:
    """Draws the stage of a start on a terminal; what is written to it meanwhile stands above the bar."""

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        self._console = console
        self._clock = clock
        self._lock = threading.RLock()
        self._live: Live | None = None
        self._stage: StartStage | None = None
        self._began_s = 0.0
        self._counts = (0, 0)

    @property
    def stream(self) -> TextIO:
        """Where lines may go meanwhile: the same terminal, the bar out of the way."""
        return cast("TextIO", AboveBars(self, self._console.file))

    def show(self, stage: StartStage, done: int, total: int) -> None:
        """So much of a stage is done."""
        with self._lock:
            if stage != self._stage:
                self.end()
                self._stage, self._began_s = stage, self._clock()
            elif self._live is not None and (done, total) == self._counts:
                return
            self._counts = (done, total)
            if self._live is not None:
                self._live.update(self._line())
                return
            self._live = Live(
                self._line(), console=self._console, transient=True, redirect_stdout=False, redirect_stderr=False
            )
            self._live.start(refresh=True)

    def end(self) -> None:
        """The stage is over; one that took time leaves a line."""
        with self.hidden():
            elapsed_s = self._clock() - self._began_s
            if self._stage is not None and elapsed_s >= PATIENCE_S:
                words = f"{TITLES[self._stage]}: {self._amount()} in {elapsed_s:.0f} s"
                self._console.print(words, markup=False, highlight=False)
            self._stage = None

    @contextmanager
    def hidden(self) -> Iterator[None]:
        """Without a bar, until something of it changes after this."""
        with self._lock:
            if self._live is not None:
                self._live.stop()
                self._live = None
            yield

    def _line(self) -> Table:
        assert self._stage is not None
        done, total = self._counts
        row = Table.grid(padding=(0, 1))
        bar = ProgressBar(total=max(1, total), completed=done, width=BAR_COLUMNS)
        row.add_row(Text(TITLES[self._stage]), bar, Text(self._amount()))
        return row

    def _amount(self) -> str:
        done, total = self._counts
        if self._stage == "join":
            return f"{done} of {total}"
        return f"{decimal(done)} of {decimal(total)}"


class AboveBars(io.TextIOBase):
    """A terminal to write lines to while a bar is drawn on it."""

    def __init__(self, bars: StartBars, terminal: IO[str]) -> None:
        super().__init__()
        self._bars = bars
        self._terminal = terminal

    def write(self, text: str) -> int:
        """Write past the bar, which comes back below with its next change."""
        with self._bars.hidden():
            return self._terminal.write(text)

    def flush(self) -> None:
        """Write what is buffered."""
        self._terminal.flush()

    def isatty(self) -> bool:
        """Whether colours are seen."""
        return self._terminal.isatty()


def start_progress(stderr: TextIO) -> StartBars | StartLines:
    """Bars where stderr is a terminal that may move, lines otherwise."""
    console = Console(file=stderr)
    # Without colour there may still be a terminal, but a picture that moves is what NO_COLOR's readers avoid.
    return StartBars(console) if console.is_terminal and not console.no_color else StartLines()


def default_progress() -> StartBars | StartLines:
    """For the process's own stderr."""
    return start_progress(sys.stderr)
