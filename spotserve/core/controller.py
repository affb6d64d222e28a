"""The controller: a deterministic reducer. `step` is `decide` (policies) followed by `apply` (no policy).

A fold calls only `apply`, with the recorded commands; a replay also calls `decide` and compares.
"""

from __future__ import annotations

from spotserve.core.commands import Command
from spotserve.core.decide import decide
from spotserve.core.events import CoordinatorRestarted, Event
from spotserve.core.frozen import Frozen
from spotserve.core.lifecycles import SERVICE, fire
from spotserve.core.observe import observe
from spotserve.core.record import record
from spotserve.core.service import service_state
from spotserve.core.state import ClusterState


class Entry(Frozen):
    """One journal entry: an event and the commands that followed from it."""

    sequence: int
    event: Event
    commands: tuple[Command, ...] = ()


def apply(state: ClusterState, event: Event, commands: tuple[Command, ...]) -> ClusterState:
    """The state after an event and its commands."""
    after = observe(state, event)
    for command in commands:
        after = record(after, command)
    if not isinstance(event, CoordinatorRestarted):  # A new coordinator is a new service; `stopped` ended the old one.
        _check_service(state, after)
    return after


def _check_service(before: ClusterState, after: ClusterState) -> None:
    """The headline state may only take the edges of its table."""
    old, new = service_state(before), service_state(after)
    if old != new:
        fire(SERVICE, old, new)


class Controller:
    """Holds the state and steps it, one event at a time."""

    def __init__(self, state: ClusterState | None = None, *, sequence: int = 0) -> None:
        self.state = state if state is not None else ClusterState()
        self.sequence = sequence

    def step(self, event: Event) -> Entry:
        """Take one event; the entry names it and every command that follows."""
        commands = decide(self.state, event)
        self.state = apply(self.state, event, commands)
        self.sequence += 1
        return Entry(sequence=self.sequence, event=event, commands=commands)

    def fold(self, entry: Entry) -> None:
        """Take a journaled entry as it was decided then."""
        self.state = apply(self.state, entry.event, entry.commands)
        self.sequence = entry.sequence
