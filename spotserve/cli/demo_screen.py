"""What the demo shows while it runs: a live picture on a terminal, plain lines anywhere else. Always on stderr."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from spotserve.cli.demo_answers import Answer

NUM_NOTES = 6
STATE_STYLES = {"serving": "green", "ready": "green", "doomed": "yellow", "gone": "red", "degraded": "red"}


class Screen:
    """Follows a daemon and its clients. On a terminal it redraws, elsewhere it prints what changed."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._notes: list[str] = []
        self._status: dict[str, Any] = {}
        self._shown = ""
        # Without colour there may still be a terminal, but a picture that moves is what NO_COLOR's readers avoid.
        self._live = (
            Live(console=console, refresh_per_second=12) if console.is_terminal and not console.no_color else None
        )

    def __enter__(self) -> Screen:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    def note(self, line: str) -> None:
        """Say what the demo does now."""
        self._notes.append(line)
        if self._live is None:
            self._console.print(line, markup=False, highlight=False, soft_wrap=True)
        else:
            self._live.update(self._picture(()))

    def show(self, status: dict[str, Any], answers: Sequence[Answer]) -> None:
        """Take a new status and the answers as they are."""
        self._status = status
        if self._live is not None:
            self._live.update(self._picture(answers))
        elif (line := status_line(status)) != self._shown:
            self._shown = line
            tokens = sum(len(answer.token_ids) for answer in answers)
            self._console.print(f"  {line}  tokens streamed {tokens}", markup=False, highlight=False, soft_wrap=True)

    def _picture(self, answers: Sequence[Answer]) -> RenderableType:
        notes = Text("\n".join(self._notes[-NUM_NOTES:]))
        if not self._status:
            return Panel(notes, title="spotserve demo")
        state = self._status["state"]
        title = Text.assemble("service ", (state, STATE_STYLES.get(state, "cyan")), f"  epoch {self._status['epoch']}")
        return Panel(Group(notes, title, instances_line(self._status), *replica_lines(self._status), streams(answers)))


def status_line(status: dict[str, Any]) -> str:
    """The state of service, instances and replicas in one line."""
    instances = " ".join(f"{instance['id']}:{instance['state']}" for instance in status["instances"])
    return f"{status['state']}  {instances}  {' | '.join(line.plain for line in replica_lines(status))}"


def instances_line(status: dict[str, Any]) -> Text:
    """Every instance and its state."""
    line = Text("instances")
    for instance in status["instances"]:
        line.append(f"  {instance['id']} ").append(instance["state"], STATE_STYLES.get(instance["state"], "cyan"))
    return line


def replica_lines(status: dict[str, Any]) -> list[Text]:
    """Which GPUs hold which layers, replica by replica."""
    lines = []
    for replica in status["replicas"]:
        stages = [
            f"layers {stage['layers'][0]}:{stage['layers'][1]} on {'+'.join(stage['gpus'])}"
            for stage in replica["stages"]
        ]
        lines.append(Text(f"replica {replica['id']}  " + " -> ".join(stages)))
    return lines


def streams(answers: Sequence[Answer]) -> Table:
    """The answers as they grow: how many tokens, and the end of the text."""
    table = Table(box=None, expand=True, padding=(0, 1))
    table.add_column("question", no_wrap=True, max_width=38)
    table.add_column("tokens", justify="right")
    table.add_column("answer", no_wrap=True, overflow="crop", ratio=1)
    for answer in answers:
        end = " ".join(answer.text.split())[-80:]
        table.add_row(Text(answer.question), str(len(answer.token_ids)), Text(end))
    return table
