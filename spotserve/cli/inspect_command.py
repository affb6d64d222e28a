"""`spotserve inspect`: what a daemon's plan runs came to, estimated against measured, and the life of a request."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from spotserve.cli.admin_commands import Format, Json, wanted_format
from spotserve.cli.request_text import request_text
from spotserve.core.canonical import canonical_json
from spotserve.core.plan_text.runs import report_text, runs_table
from spotserve.core.request_history import request_report
from spotserve.core.run_history import RunRecord, run_history, run_line, run_report
from spotserve.errors import SpecError, SpotServeError


def register(app: typer.Typer) -> None:
    """Add `inspect` to the command line."""
    app.command()(inspect)


def inspect(
    journal: Annotated[
        Path,
        # Whether it can be read is for the store to say, in one way for whatever is wrong.
        typer.Argument(metavar="JOURNAL", readable=False, help="A journal.db, or the state dir that it is in."),
    ],
    migration: Annotated[
        int | None,
        typer.Option(
            metavar="N", min=0, help="Its steps, estimated and measured; counted as in status, 0: the first placement."
        ),
    ] = None,
    request: Annotated[
        str | None, typer.Option(metavar="ID", help="The life of this request: the x-request-id of its answer.")
    ] = None,
    output: Format = "table",
    as_json: Json = False,
) -> None:
    """List the plan runs in JOURNAL, or show one migration or one request step by step."""
    wanted = wanted_format(output, as_json)
    if request is not None:
        if migration is not None:
            raise SpecError("--request and --migration are two questions", hint="ask one at a time")
        life = request_in(journal, request)
        typer.echo(canonical_json(life) if wanted == "json" else request_text(life), nl=False)
        return
    runs = runs_in(journal)
    if migration is None:
        answer = {"runs": [run_line(run) for run in runs]}
        typer.echo(canonical_json(answer) if wanted == "json" else runs_table(answer), nl=False)
        return
    report = run_report(numbered(runs, migration))
    typer.echo(canonical_json(report) if wanted == "json" else report_text(report), nl=False)


def runs_in(place: Path) -> list[RunRecord]:
    """The plan runs of a journal, of a daemon that runs or has ended."""
    # Here and not above: apsw is of no use to the other verbs.
    from spotserve.store.recording import read_recording

    source = read_recording(place)
    return run_history(source.base, source.entries)


def request_in(place: Path, request: str) -> dict[str, Any]:
    """The life of a request. Raises SpotServeError if the journal does not know it."""
    from spotserve.store.recording import read_recording

    source = read_recording(place)
    return request_report(source.base, source.entries, request)


def numbered(runs: list[RunRecord], number: int) -> RunRecord:
    """The run of that number; of several first placements the last. Raises SpotServeError if there is none."""
    found = [run for run in runs if run.number == number]
    if not found:
        known = ", ".join(str(run.number) for run in runs) or "none"
        raise SpotServeError(f"migration {number} has no plan run in the journal", hint=f"there are: {known}")
    return found[-1]
