"""What the journal of a running daemon says about its plan runs: the evidence that a status line cannot give."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from spotserve.core.commands import BeginRun, ExecuteStep
from spotserve.core.controller import Entry
from spotserve.core.events import FirstToken, Quiesced, RequestAccepted
from spotserve.core.plan import Plan
from spotserve.store.journal import EntryJournal, Journal
from tests.e2e.daemon import RunningDaemon


@dataclass(frozen=True, slots=True)
class RunHistory:
    """One plan run, and every entry of the journal it belongs to."""

    plan: Plan
    entries: tuple[Entry, ...]

    def begun(self, kind: str, replica: str | None = None) -> list[int]:
        """Sequences of the entries that had a step of this kind (of this replica) begin."""
        return [
            entry.sequence
            for entry in self.entries
            for command in entry.commands
            if isinstance(command, ExecuteStep)
            and command.epoch == self.plan.epoch.to
            and command.step.kind == kind
            and replica in (None, getattr(command.step, "replica", None))
        ]

    def quiesced(self) -> list[tuple[str, int]]:
        """(replica, generation) of those that the run drained."""
        return [
            (entry.event.replica, entry.event.generation)
            for entry in self.entries
            if isinstance(entry.event, Quiesced) and entry.event.epoch == self.plan.epoch.to
        ]

    def served_while_copying(self) -> list[str]:
        """Requests that were accepted after the first `copy_weights` and had their first token before `quiesce`.

        Of a replica that the run drains. Each took it at least one iteration between the two steps: the journal's
        order says so, no clock does.
        """
        accepted: dict[str, int] = {}
        served: list[str] = []
        copying = min(self.begun("copy_weights"))
        for entry in self.entries:
            if isinstance(entry.event, RequestAccepted) and entry.sequence > copying:
                accepted[entry.event.request] = entry.sequence
            if isinstance(entry.event, FirstToken) and entry.event.request in accepted:
                event = entry.event
                is_drained = (event.replica, event.generation) in self.quiesced()
                if is_drained and entry.sequence < min(self.begun("quiesce", event.replica)):
                    served.append(event.request)
        return served


def last_run(daemon: RunningDaemon) -> RunHistory:
    """The latest plan run."""
    entries = tuple(EntryJournal(Journal.read_only(daemon.state_dir / "journal.db")).read())
    return RunHistory(list(_plans(entries))[-1], entries)


def _plans(entries: tuple[Entry, ...]) -> Iterator[Plan]:
    for entry in entries:
        for command in entry.commands:
            if isinstance(command, BeginRun):
                yield command.plan
