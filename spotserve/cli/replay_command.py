"""`spotserve replay`: what a journal tells, folded again and compared with what would be decided now."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from itertools import chain
from pathlib import Path
from typing import Annotated, Any

import typer

from spotserve.cli.admin_commands import Format, Json, wanted_format
from spotserve.cli.config import Origin, choice, seconds
from spotserve.cli.replay_text import replay_text
from spotserve.core.canonical import canonical_json
from spotserve.core.controller import Entry
from spotserve.core.events import JournalBegun
from spotserve.core.options import POLICY_NAMES
from spotserve.core.replay_report import replay_report
from spotserve.core.state import ClusterState
from spotserve.core.strict_json import shown
from spotserve.errors import SpotServeError

MAX_UNTIL_S = 1e10
MAX_PATH = 4096


def register(app: typer.Typer) -> None:
    """Add `replay` to the command line."""
    app.command()(replay)


def replay(
    journal: Annotated[
        Path,
        # Whether it can be read is for the store to say, in one way for whatever is wrong.
        typer.Argument(metavar="JOURNAL", readable=False, help="A journal.db, or the state dir that it is in."),
    ],
    until: Annotated[
        str | None, typer.Option(metavar="T", help="Only to T seconds after the journal's start: the cluster then.")
    ] = None,
    policy: Annotated[
        str | None, typer.Option(metavar="NAME", help="Play it under this policy instead, simulated.")
    ] = None,
    output: Format = "table",
    as_json: Json = False,
) -> None:
    """Tell what happened in JOURNAL, and check that it would be decided so again.

    Exit 1 at the first decision that differs. With another --policy: the same capacity and requests, simulated.
    """
    wanted = wanted_format(output, as_json)
    until_s = None if until is None else float(str(seconds(0, MAX_UNTIL_S)(until, Origin("--until"))))
    if policy is not None:
        choice(POLICY_NAMES)(policy, Origin("--policy"))
    report = report_of(journal, until_s=until_s, policy=policy)
    typer.echo(canonical_json(report) if wanted == "json" else text_of(report), nl=False)
    difference = report["checks"]["difference"] if "checks" in report else None
    if difference is not None:
        raise SpotServeError(difference["message"], hint=_hint(difference))


def report_of(place: Path, *, until_s: float | None, policy: str | None) -> dict[str, Any]:
    """The report on the journal at a place, or on the same under another policy.

    Raises StateDirError for a damaged one, SpotServeError if nothing that is kept is early enough.
    """
    # Here and not above: apsw is of no use to the other verbs.
    from spotserve.store.recording import read_recording

    source = read_recording(place)
    if until_s is not None and until_s < source.base.at_s:
        raise SpotServeError(
            f"--until {until_s:g} is before {source.base.at_s:.3f} s, where what is kept of the journal begins",
            hint="older entries were cut behind a snapshot",
        )
    first = next(source.entries, None)
    entries = source.entries if first is None else chain([first], source.entries)
    path, recorded = shown(source.path, MAX_PATH), policy_of(source.base, first)
    if policy is not None and policy != recorded:
        if recorded is None:
            raise SpotServeError("the journal has no entry: there is nothing to play under another policy")
        from spotserve.cli.counterfactual import counterfactual

        return counterfactual(source.base, entries, recorded=recorded, wanted=policy, until_s=until_s, name=path)
    report = replay_report(source.base, entries, snapshots=source.snapshots, until_s=until_s)
    created_s = source.identity.created_unix_s
    report["journal"] = {
        "path": path,
        "began": _moment(created_s, report["begins_s"]),
        "ended": _moment(created_s, report["at_s"]),
        "created_unix_s": created_s,
        "first_sequence": source.first_sequence,
        "clean_stop": source.clean_stop,
    }
    return report


def text_of(report: dict[str, Any]) -> str:
    """Either report for a person."""
    if "simulated" not in report:
        return replay_text(report)
    from spotserve.cli.counterfactual import counterfactual_text

    return counterfactual_text(report)


def policy_of(base: ClusterState, first: Entry | None) -> str | None:
    """The policy that a journal was decided by; None for an empty one."""
    if first is not None and isinstance(first.event, JournalBegun):
        return first.event.spec.policy
    return None if base.spec is None else base.spec.policy


def _moment(created_unix_s: int, at_s: float) -> str | None:
    """Wall-clock time of a moment of the journal, UTC; None for one that no calendar has."""
    try:
        return (datetime.fromtimestamp(created_unix_s, UTC) + timedelta(seconds=at_s)).isoformat(timespec="seconds")
    except (OverflowError, ValueError, OSError):
        return None


def _hint(difference: dict[str, Any]) -> str:
    if difference["kind"] == "state":
        return "the snapshot or the entries before it were changed, or the fold of this version has a fault"
    recorded, decided = (" ".join(difference[name]) or "nothing" for name in ("recorded_commands", "decided_commands"))
    return f"recorded: {recorded}; decided now: {decided}"
