"""The one loop: live, simulated and replayed alike. The world is the only thing that differs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from spotserve.core.commands import Command
from spotserve.core.controller import Controller, Entry
from spotserve.core.events import Event


class World(Protocol):
    """Where events come from and commands go."""

    async def next_events(self) -> Sequence[Event]:
        """Waits for at least one event; empty means the end."""

    def submit(self, command_id: str, command: Command) -> None:
        """Begin to carry out a command; its outcome is an event. A repeated id does nothing new."""


class JournalPort(Protocol):
    """Where entries become durable."""

    async def append(self, entries: Sequence[Entry]) -> None:
        """One durable commit; failure ends the process."""


async def run(world: World, controller: Controller, journal: JournalPort) -> None:
    """Turn events into entries, make them durable, then let the world act."""
    while events := await world.next_events():
        entries = [controller.step(event) for event in events]
        await journal.append(entries)
        for entry in entries:
            for index, command in enumerate(entry.commands):
                world.submit(f"{entry.sequence}.{index}", command)
