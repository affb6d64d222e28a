"""The command line: one verb per file, one way for errors to reach a person, one table of exit codes.

stdout carries data, stderr carries talk. An error is one line `error: …`, a hint may follow as a second; the exit
code comes from the error's class (contracts section 5). Nothing here imports torch, so that a verb starts at once.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from spotserve import __version__
from spotserve.cli import (
    admin_commands,
    demo_command,
    diff_command,
    inspect_command,
    plan_command,
    profile_command,
    replay_command,
    report_command,
    run_command,
    show_command,
    simulate_command,
    verify_command,
    worker_command,
)
from spotserve.errors import SpotServeError

VERBS = (
    run_command,
    demo_command,
    admin_commands,
    plan_command,
    show_command,
    diff_command,
    verify_command,
    report_command,
    inspect_command,
    replay_command,
    simulate_command,
    profile_command,
    worker_command,
)
"""In the order in which help lists them."""

INTERRUPTED = 130
USAGE_ERROR: type[Exception] = typer.BadParameter.__mro__[1]
"""typer exports only the leaves of its usage errors; this is their base."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of `spotserve`: runs one verb and exits with its code."""
    sys.exit(run_verb(sys.argv[1:] if arguments is None else arguments))


def run_verb(arguments: Sequence[str]) -> int:
    """The exit code of one command line."""
    try:
        code = build()(args=list(arguments), prog_name="spotserve", standalone_mode=False)
    except SpotServeError as error:
        return tell(error.message, hint=error.hint, code=error.exit_code)
    except USAGE_ERROR as error:
        return tell(
            usage_message(error), hint="spotserve --help lists the verbs, spotserve VERB --help its options", code=2
        )
    except (KeyboardInterrupt, typer.Abort):
        return INTERRUPTED
    except BrokenPipeError:
        # The reader of our data went away (`| head`): nothing to say, and nobody to say it to.
        sys.stderr.close()
        return 1
    return code if isinstance(code, int) else 0


def build() -> typer.Typer:
    """The command line with every verb."""
    app = typer.Typer(
        name="spotserve",
        help="Serve large language models on preemptible GPUs so that nobody notices the preemptions.",
        add_completion=False,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(about)
    for module in VERBS:
        module.register(app)
    return app


def about(
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the version and exit.", is_eager=True, callback=lambda on: show_version(on)
        ),
    ] = False,
) -> None:
    """Serve large language models on preemptible GPUs so that nobody notices the preemptions."""


def show_version(wanted: bool) -> None:
    """`spotserve 0.1.0` on stdout."""
    if wanted:
        typer.echo(f"spotserve {__version__}")
        raise typer.Exit


def usage_message(error: Exception) -> str:
    """The one line of a usage error: typer's own words without the full stop."""
    told = getattr(error, "format_message", None)
    text = told() if callable(told) else str(error)
    first_line = " ".join(str(text).split())
    return first_line[:1].lower() + first_line[1:].rstrip(".")


def tell(message: str, *, hint: str | None, code: int) -> int:
    """One line of error, one of hint, and the exit code back."""
    typer.echo(f"error: {' '.join(message.split())}", err=True)
    if hint is not None:
        typer.echo(f"hint: {hint}", err=True)
    return code
