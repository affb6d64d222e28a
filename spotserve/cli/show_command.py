"""`spotserve show`: a plan file for a person."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from spotserve.cli.admin_commands import Format, Json, wanted_format
from spotserve.cli.plan_file import plan_of
from spotserve.core.canonical import canonical_json
from spotserve.core.plan_text import plan_text


def register(app: typer.Typer) -> None:
    """Add `show` to the command line."""
    app.command()(show)


def show(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A plan, as spotserve plan --out writes it.")],
    output: Format = "table",
    as_json: Json = False,
) -> None:
    """Show a plan: layout, routes, steps, and who decided."""
    wanted = wanted_format(output, as_json)
    plan = plan_of(file)
    typer.echo(canonical_json(plan) if wanted == "json" else plan_text(plan.model_dump(mode="json")), nl=False)
