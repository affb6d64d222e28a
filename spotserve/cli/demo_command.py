"""`spotserve demo`: takes GPUs away from a daemon in the middle of its answers, and counts what the clients noticed."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Sequence
from types import FrameType
from typing import Annotated, Any, Literal, NoReturn

import typer
from rich.console import Console

from spotserve.cli.admin_commands import size_text, table
from spotserve.cli.client import AdminClient
from spotserve.cli.demo_answers import Answer, ask_all
from spotserve.cli.demo_daemon import temporary_daemon
from spotserve.cli.demo_screen import Screen
from spotserve.core.canonical import canonical_json
from spotserve.core.frozen import Frozen
from spotserve.errors import SpotServeError

FORMAT_VERSION = "0.1"
QUESTIONS = (
    "What is a list?",
    "Explain the with statement in Python.",
    "How does the import statement work?",
    "What is a dictionary?",
    "Tell me about class definitions.",
    "Hello",
)
"""What the built-in model was trained to answer at some length."""
RUN_ARGUMENTS = ("--drain", "0", "--orphan-timeout", "15", "--log-format", "json")
GRACE_S = 20.0
DISTURB_TOKENS = 8
"""Every answer has at least so many tokens when the instance is taken."""
CALM_TIMEOUT_S = 120.0
POLL_S = 0.05

Disturbance = Literal["none", "notice", "kill"]


class Round(Frozen):
    """What the clients of one round saw, and what the daemon moved for them."""

    disturbance: Disturbance
    instance: str | None
    requests: int
    lost: int
    """Requests without a proper end, or with fewer tokens than their durable record."""
    duplicated: int
    """Requests with more tokens than their durable record."""
    identical: bool
    """Every answer has the tokens and the text of the undisturbed round."""
    longest_stall_s: float
    weight_bytes: int
    kv_bytes: int
    recomputed_tokens: int


class Outcome(Frozen):
    """The demo's result, as `--json` prints it."""

    format_version: str = FORMAT_VERSION
    rounds: tuple[Round, ...]

    @property
    def is_good(self) -> bool:
        """Whether no client could notice anything but time."""
        return all(one.lost == 0 and one.duplicated == 0 and one.identical for one in self.rounds)


def register(app: typer.Typer) -> None:
    """Add `demo` to the command line."""
    app.command()(demo)


def demo(as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False) -> None:
    """Watch answers survive a preemption.

    Starts a daemon of its own with the built-in model, asks it questions undisturbed, then with an instance taken
    after a notice, then with one killed without. Exits 0 only if no token was lost, doubled or changed.
    """
    # A demo that a script or a closing terminal ends cleans up as well as one ended by Ctrl-C.
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)
    with Screen(Console(file=sys.stderr)) as screen:
        outcome = run_demo(screen)
    typer.echo(canonical_json(outcome) if as_json else outcome_text(outcome), nl=False)
    raise typer.Exit(0 if outcome.is_good else 1)


def _interrupt(number: int, frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt


def run_demo(screen: Screen) -> Outcome:
    """The three rounds against one daemon."""
    screen.note("starting a daemon with the built-in model on 4 emulated GPUs; it measures this machine first")
    with temporary_daemon(*RUN_ARGUMENTS) as client:
        model = str(client.get("/v1/models")["data"][0]["id"])
        screen.note(f"ready at {client.url}; asking {len(QUESTIONS)} questions, nobody disturbs")
        reference = ask_all(client.url, model, QUESTIONS)
        follow(client, screen, reference)
        rounds = [judged(client, reference, reference, disturbance="none", instance=None, migrations=[])]
        for disturbance in ("notice", "kill"):
            screen.note(f"the same questions again, this time with a {disturbance}")
            rounds.append(disturbed(client, screen, model, reference, disturbance))
        screen.note("stopping the daemon")
    return Outcome(rounds=tuple(rounds))


def disturbed(
    client: AdminClient, screen: Screen, model: str, reference: Sequence[Answer], disturbance: Literal["notice", "kill"]
) -> Round:
    """One round in which an instance that serves is taken while every answer is in the middle."""
    before = len(client.get("/admin/status")["migrations"])
    answers = ask_all(client.url, model, QUESTIONS)
    while not all(len(answer.token_ids) >= DISTURB_TOKENS or answer.is_done for answer in answers):
        screen.show(client.get("/admin/status"), answers)
        time.sleep(POLL_S)
    instance = serving_instance(client.get("/admin/status"))
    if disturbance == "notice":
        client.post("/admin/notice", {"instance": instance, "grace_s": GRACE_S})
        screen.note(f"notice: {instance} will be taken in {GRACE_S:g} s")
    else:
        client.post("/admin/kill", {"instance": instance})
        screen.note(f"kill: {instance} is gone, without a notice")
    follow(client, screen, answers)
    migrations = settled(client, screen, answers, before)
    return judged(client, reference, answers, disturbance=disturbance, instance=instance, migrations=migrations)


def serving_instance(status: dict[str, Any]) -> str:
    """An instance whose GPU serves now."""
    if not status["replicas"]:
        raise SpotServeError(f"the demo's daemon is {status['state']}: no replica serves")
    return str(status["replicas"][0]["stages"][0]["gpus"][0]).split("/")[0]


def follow(client: AdminClient, screen: Screen, answers: Sequence[Answer]) -> None:
    """Show what happens until every answer has ended."""
    while not all(answer.is_done for answer in answers):
        screen.show(client.get("/admin/status"), answers)
        time.sleep(POLL_S)
    screen.show(client.get("/admin/status"), answers)


def settled(client: AdminClient, screen: Screen, answers: Sequence[Answer], before: int) -> list[dict[str, Any]]:
    """The migrations of this round, once the daemon has dealt with the loss and serves again."""
    deadline_s = time.monotonic() + CALM_TIMEOUT_S
    while time.monotonic() < deadline_s:
        status = client.get("/admin/status")
        screen.show(status, answers)
        migrations: list[dict[str, Any]] = status["migrations"][before:]
        if migrations and migrations[-1]["outcome"] is not None and status["state"] == "serving":
            return migrations
        time.sleep(POLL_S)
    raise SpotServeError(f"the demo's daemon did not serve again within {CALM_TIMEOUT_S:g} s")


def judged(
    client: AdminClient,
    reference: Sequence[Answer],
    answers: Sequence[Answer],
    *,
    disturbance: Disturbance,
    instance: str | None,
    migrations: Sequence[dict[str, Any]],
) -> Round:
    """Compare what was streamed with the undisturbed round and with what the daemon has on disk."""
    kept = [num_durable_tokens(client, answer) for answer in answers]
    ended = [answer.error is None and answer.finish_reason in ("stop", "length") for answer in answers]
    return Round(
        disturbance=disturbance,
        instance=instance,
        requests=len(answers),
        lost=sum(
            not good or len(answer.token_ids) < durable
            for answer, good, durable in zip(answers, ended, kept, strict=True)
        ),
        duplicated=sum(len(answer.token_ids) > durable for answer, durable in zip(answers, kept, strict=True)),
        identical=[(one.token_ids, one.text) for one in answers] == [(one.token_ids, one.text) for one in reference],
        longest_stall_s=round(max(answer.longest_stall_s for answer in answers), 3),
        weight_bytes=sum(line["weight_bytes"] for line in migrations),
        kv_bytes=sum(line["kv_bytes"] for line in migrations),
        recomputed_tokens=sum(line["recomputed_tokens"] for line in migrations),
    )


def num_durable_tokens(client: AdminClient, answer: Answer) -> int:
    """How many tokens the daemon's record of a request has; 0 for one that was never accepted."""
    if not answer.request:
        return 0
    return sum(len(choice["token_ids"]) for choice in client.get(f"/v1/requests/{answer.request}")["choices"])


def outcome_text(outcome: Outcome) -> str:
    """The table for a person; every figure in it is in the JSON."""
    titles = ("ROUND", "REQUESTS", "LOST", "DUPLICATED", "IDENTICAL", "STALL", "WEIGHTS", "KV", "RECOMPUTED")
    rows = [
        (
            "undisturbed" if one.instance is None else f"{one.disturbance} {one.instance}",
            one.requests,
            one.lost,
            one.duplicated,
            "yes" if one.identical else "no",
            f"{1000 * one.longest_stall_s:.0f} ms",
            size_text(one.weight_bytes),
            size_text(one.kv_bytes),
            f"{one.recomputed_tokens} tokens",
        )
        for one in outcome.rounds
    ]
    return table(titles, rows) + "\n"
