"""`spotserve report`: a plan as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from spotserve.cli.drawing.report import plan_html, plan_svg
from spotserve.cli.plan_file import plan_of
from spotserve.errors import SpecError

WRITERS = {".html": plan_html, ".svg": plan_svg}


def register(app: typer.Typer) -> None:
    """Add `report` to the command line."""
    app.command()(report)


def report(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A plan, as spotserve plan --out writes it.")],
    out: Annotated[Path, typer.Option(metavar="F", help="The picture to write: *.html or *.svg.")],
) -> None:
    """Draw a plan: layouts before and after, and its transfers over time."""
    writer = WRITERS.get(out.suffix.lower())
    if writer is None:
        raise SpecError(f"--out {out} ends in neither .html nor .svg", hint="an example: --out plan.html")
    text = writer(plan_of(file).model_dump(mode="json"))
    try:
        out.write_text(text, encoding="utf-8")
    except OSError as error:
        raise SpecError(f"--out {out} cannot be written: {error.strerror}") from error
