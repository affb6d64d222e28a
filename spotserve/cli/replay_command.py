"""`spotserve replay`: fold a journal again and compare every decision with the one it records."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from spotserve.core.canonical import digest
from spotserve.core.controller import Entry, apply
from spotserve.core.decide import decide
from spotserve.core.service import service_state
from spotserve.core.state import ClusterState


def register(app: typer.Typer) -> None:
    """Add `replay` to the command line."""
    app.command()(replay)


def replay(
    journal: Annotated[Path, typer.Argument(help="A state dir's journal.db, of a daemon that runs or has ended.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary as JSON.")] = False,
) -> None:
    """Replay JOURNAL: the same events must lead to the same decisions. Exit 1 at the first that differs."""
    # Here and not above: apsw is of no use to the other verbs.
    from spotserve.store.journal import EntryJournal, Journal

    source = Journal.read_only(journal)
    base = source.base_snapshot()
    state = ClusterState() if base is None else ClusterState.model_validate_json(base.body)
    count = 0
    for entry in EntryJournal(source).read(None if base is None else base.sequence + 1):
        _compare(state, entry)
        state = apply(state, entry.event, entry.commands)
        count += 1
    summary: dict[str, Any] = {
        "entries": count,
        "at_s": round(state.at_s, 3),
        "epoch": state.epoch,
        "state": service_state(state),
        "state_digest": digest(state),
    }
    if as_json:
        typer.echo(json.dumps(summary, sort_keys=True))
    else:
        typer.echo(f"{count} entries, {state.at_s:.3f} s, epoch {state.epoch}, {summary['state']}: same decisions")
        typer.echo(summary["state_digest"])


def _compare(state: ClusterState, entry: Entry) -> None:
    decided = decide(state, entry.event)
    if decided == entry.commands:
        return
    typer.echo(f"entry {entry.sequence} ({entry.event.kind}): decided otherwise than recorded", err=True)
    recorded = [command.kind for command in entry.commands]
    typer.echo(f"recorded {recorded}, decided now {[command.kind for command in decided]}", err=True)
    raise typer.Exit(1)
