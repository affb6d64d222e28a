"""`spotserve show`: a plan file for a person."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from spotserve.cli.admin_commands import Format, Json, wanted_format
from spotserve.cli.plan_file import plan_of
from spotserve.core.canonical import canonical_json
from spotserve.core.plan_text import plan_text
from spotserve.core.plan_text.page import ALL_ROWS, MOST_ROWS


def register(app: typer.Typer) -> None:
    """Add `show` to the command line."""
    app.command()(show)


def show(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A plan, as spotserve plan --out writes it.")],
    every: Annotated[bool, typer.Option("--all", help=f"Every row, not the first {MOST_ROWS} of a table.")] = False,
    output: Format = "table",
    as_json: Json = False,
) -> None:
    """Show a plan: layouts, transfers by link, critical path, and why it is so."""
    wanted = wanted_format(output, as_json)
    plan = plan_of(file)
    if wanted == "json":
        typer.echo(canonical_json(plan), nl=False)
    else:
        text = plan_text(plan.model_dump(mode="json"), most_rows=ALL_ROWS if every else MOST_ROWS)
        typer.echo(text, nl=False)
