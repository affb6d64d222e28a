"""`spotserve verify`: the checker's verdict on a plan file; it needs no other file and no daemon."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from spotserve.cli.admin_commands import Format, Json, wanted_format
from spotserve.cli.plan_file import read_bytes
from spotserve.core.canonical import canonical_json
from spotserve.core.check import verify as findings_of

REFUSED = 5


def register(app: typer.Typer) -> None:
    """Add `verify` to the command line."""
    app.command()(verify)


def verify(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A plan, as spotserve plan --out writes it.")],
    output: Format = "table",
    as_json: Json = False,
) -> None:
    """Check a plan: `ok`, or one line per finding and exit code 5."""
    wanted = wanted_format(output, as_json)
    findings = findings_of(read_bytes(file, what="FILE"))
    if wanted == "json":
        told = [finding.model_dump(mode="json") for finding in findings]
        typer.echo(canonical_json({"valid": not findings, "findings": told}), nl=False)
    else:
        typer.echo("\n".join(finding.line() for finding in findings) or "ok")
    if findings:
        raise typer.Exit(REFUSED)
