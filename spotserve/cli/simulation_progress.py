"""How far a simulation is: a bar on a terminal, nothing anywhere else. Always on stderr."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from spotserve.cli.start_progress import BAR_COLUMNS

Show = Callable[[str, float, float], None]
"""Told what is under way, how much of it is done, and how much it is in all."""


@contextmanager
def simulation_progress(stderr: TextIO | None = None, *, unit: str = "s") -> Iterator[Show]:
    """Draws a bar while it lasts, and leaves nothing behind; `unit` is what it counts."""
    console = Console(file=sys.stderr if stderr is None else stderr)
    if not console.is_terminal or console.no_color:
        yield lambda title, done_s, total_s: None
        return
    with Live(console=console, transient=True, redirect_stdout=False, redirect_stderr=False) as live:
        yield lambda title, done_s, total_s: live.update(_line(title, done_s, total_s, unit))


def _line(title: str, done: float, total: float, unit: str) -> Table:
    row = Table.grid(padding=(0, 1))
    bar = ProgressBar(total=max(1.0, total), completed=min(done, total), width=BAR_COLUMNS)
    row.add_row(Text(title), bar, Text(f"{done:.0f} of {total:.0f} {unit}"))
    return row
