"""`spotserve inspect`: what a daemon's plan runs came to, estimated against measured."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from spotserve.cli.admin_commands import Format, Json, wanted_format
from spotserve.core.canonical import canonical_json
from spotserve.core.plan_text.runs import report_text, runs_table
from spotserve.core.run_history import RunRecord, run_history, run_line, run_report
from spotserve.core.state import ClusterState
from spotserve.errors import SpotServeError, StateDirError


def register(app: typer.Typer) -> None:
    """Add `inspect` to the command line."""
    app.command()(inspect)


def inspect(
    journal: Annotated[Path, typer.Argument(metavar="JOURNAL", help="A journal.db, or the state dir that it is in.")],
    migration: Annotated[
        int | None,
        typer.Option(
            metavar="N", min=0, help="Its steps, estimated and measured; counted as in status, 0: the first placement."
        ),
    ] = None,
    output: Format = "table",
    as_json: Json = False,
) -> None:
    """List the plan runs in JOURNAL, or show one migration step by step."""
    wanted = wanted_format(output, as_json)
    runs = runs_in(journal / "journal.db" if journal.is_dir() else journal)
    if migration is None:
        answer = {"runs": [run_line(run) for run in runs]}
        typer.echo(canonical_json(answer) if wanted == "json" else runs_table(answer), nl=False)
        return
    report = run_report(numbered(runs, migration))
    typer.echo(canonical_json(report) if wanted == "json" else report_text(report), nl=False)


def runs_in(path: Path) -> list[RunRecord]:
    """The plan runs of a journal, of a daemon that runs or has ended."""
    # Here and not above: apsw is of no use to the other verbs.
    from spotserve.store.journal import EntryJournal, Journal

    if not path.is_file():
        raise StateDirError(f"{path} is not there", hint="a daemon's state dir holds it: spotserve run --state-dir")
    source = Journal.read_only(path)
    base = source.base_snapshot()
    state = ClusterState() if base is None else ClusterState.model_validate_json(base.body)
    return run_history(state, EntryJournal(source).read(None if base is None else base.sequence + 1))


def numbered(runs: list[RunRecord], number: int) -> RunRecord:
    """The run of that number; of several first placements the last. Raises SpotServeError if there is none."""
    found = [run for run in runs if run.number == number]
    if not found:
        known = ", ".join(str(run.number) for run in runs) or "none"
        raise SpotServeError(f"migration {number} has no plan run in the journal", hint=f"there are: {known}")
    return found[-1]
