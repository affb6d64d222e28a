"""`spotserve diff`: what two plan files decide differently."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from spotserve.cli.admin_commands import Format, Json, wanted_format
from spotserve.cli.plan_file import plan_of
from spotserve.core.canonical import canonical_json
from spotserve.core.plan_text import changes_text, plan_changes

DIFFERENT = 3


def register(app: typer.Typer) -> None:
    """Add `diff` to the command line."""
    app.command()(diff)


def diff(
    before: Annotated[Path, typer.Argument(metavar="A", help="A plan file.")],
    after: Annotated[Path, typer.Argument(metavar="B", help="Another plan file.")],
    exit_code: Annotated[bool, typer.Option("--exit-code", help="Exit with 3 if they differ.")] = False,
    output: Format = "table",
    as_json: Json = False,
) -> None:
    """Compare what two plans decide: layout, routes, requests, links, times, solvers."""
    wanted = wanted_format(output, as_json)
    changes = plan_changes(plan_of(before).model_dump(mode="json"), plan_of(after).model_dump(mode="json"))
    if wanted == "json":
        typer.echo(canonical_json({"same": not changes, "changes": changes}), nl=False)
    else:
        typer.echo(changes_text(changes), nl=False)
    if changes and exit_code:
        raise typer.Exit(DIFFERENT)
