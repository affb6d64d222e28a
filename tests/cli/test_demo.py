"""`spotserve demo`: what it counts, what it prints where, and that nothing of it is left."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from rich.console import Console

from spotserve.cli.client import AdminClient
from spotserve.cli.demo_answers import Answer
from spotserve.cli.demo_command import QUESTIONS, Outcome, judged, outcome_text
from spotserve.cli.demo_screen import Screen

ENTRY = "from spotserve.cli.main import main; main()"
STATUS: dict[str, Any] = {
    "state": "serving",
    "epoch": 1,
    "instances": [{"id": "i0", "state": "ready", "gpus": ["i0/0"], "market": "spot"}],
    "replicas": [
        {"id": "r1", "generation": 1, "tensor": 1, "stages": [{"gpus": ["i0/0"], "layers": [0, 6]}]},
    ],
}


class Records(AdminClient):
    """A daemon that knows how many tokens of each request are durable, and nothing else."""

    def __init__(self, **durable: int) -> None:
        super().__init__("http://127.0.0.1:1")
        self._durable = durable

    def get(self, path: str, *, timeout_s: float = 30.0) -> Any:
        """The record of a request."""
        return {"choices": [{"token_ids": [0] * self._durable[path.rsplit("/", 1)[1]]}]}


def answer(request: str, *token_ids: int, finish_reason: str | None = "stop") -> Answer:
    """An answer that came as it should, a token every second."""
    times_s = [float(index) for index in range(len(token_ids))]
    return Answer(request, request, str(token_ids), list(token_ids), times_s, finish_reason)


def outcome(reference: Answer, streamed: Answer, *, durable: int) -> Outcome:
    """What the demo makes of one answer in one disturbed round."""
    client = Records(a=durable)
    moved = [{"weight_bytes": 1, "kv_bytes": 2, "recomputed_tokens": 3}] * 2
    return Outcome(
        rounds=(judged(client, [reference], [streamed], disturbance="kill", instance="i0", migrations=moved),)
    )


def test_an_equal_answer_is_good() -> None:
    """Tests that an answer with the reference's tokens counts as identical, and that migrations are summed."""
    result = outcome(answer("a", 5, 6, 7), answer("a", 5, 6, 7), durable=3)
    assert result.is_good
    one = result.rounds[0]
    assert (1, 0, 0, True, 1.0) == (one.requests, one.lost, one.duplicated, one.identical, one.longest_stall_s)
    assert (2, 4, 6) == (one.weight_bytes, one.kv_bytes, one.recomputed_tokens)


@pytest.mark.parametrize(
    ("streamed", "durable", "lost", "duplicated"),
    [
        (answer("a", 5, 6), 3, 1, 0),
        (answer("a", 5, 6, 7, finish_reason=None), 3, 1, 0),
        (answer("a", 5, 6, 7, finish_reason="error"), 3, 1, 0),
        (answer("a", 5, 6, 6, 7), 3, 0, 1),
        (answer("a", 5, 6, 8), 3, 0, 0),
    ],
)
def test_every_flaw_is_counted(streamed: Answer, durable: int, lost: int, duplicated: int) -> None:
    """Tests that a short, unended, failed, doubled or changed answer makes the demo fail."""
    result = outcome(answer("a", 5, 6, 7), streamed, durable=durable)
    assert (lost, duplicated) == (result.rounds[0].lost, result.rounds[0].duplicated)
    assert not result.is_good
    assert " no " in outcome_text(result) or lost


def test_plain_lines_without_a_terminal() -> None:
    """Tests that without a terminal the screen prints a line per change, without any escape sequence."""
    file = io.StringIO()
    with Screen(Console(file=file)) as screen:
        screen.note("begins")
        for status in (STATUS, STATUS, {**STATUS, "state": "draining"}):
            screen.show(status, [answer("a", 5, 6)])
    lines = file.getvalue().splitlines()
    assert "begins" == lines[0]
    assert ["serving", "draining"] == [line.split()[0] for line in lines[1:]]
    assert lines[1].endswith("replica r1  layers 0:6 on i0/0  tokens streamed 2")
    assert "\x1b" not in file.getvalue()


def test_a_picture_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests that a terminal gets a picture with the service, its instances and the growing answers."""
    monkeypatch.delenv("NO_COLOR", raising=False)
    file = io.StringIO()
    with Screen(Console(file=file, force_terminal=True, width=120)) as screen:
        screen.note("begins")
        screen.show(STATUS, [answer("a", 5, 6)])
    assert "\x1b[" in file.getvalue()
    for part in ("begins", "service", "serving", "replica r1", "(5, 6)"):
        assert part in file.getvalue()


@pytest.fixture
def environment(tmp_path: Path, daemon_environment: dict[str, str]) -> dict[str, str]:
    """Everything the demo writes ends up below `tmp_path`."""
    return {**os.environ, **daemon_environment, "TMPDIR": str(tmp_path), "SPOTSERVE_PORT": "1", "NO_COLOR": "1"}


def assert_nothing_left(folder: Path) -> None:
    """No file in the folder, and no process that names it."""
    assert [] == list(folder.iterdir())
    for process in psutil.process_iter(["cmdline"]):
        assert str(folder) not in " ".join(process.info["cmdline"] or []), process


@pytest.mark.e2e
def test_demo(tmp_path: Path, environment: dict[str, str]) -> None:
    """Tests that the demo takes an instance with and one without notice, loses nothing, and cleans up."""
    done = subprocess.run(
        [sys.executable, "-c", ENTRY, "demo", "--json"], env=environment, capture_output=True, text=True, timeout=280
    )
    assert 0 == done.returncode, done.stderr
    rounds = json.loads(done.stdout)["rounds"]
    assert ["none", "notice", "kill"] == [one["disturbance"] for one in rounds]
    assert [(len(QUESTIONS), 0, 0, True)] * 3 == [
        (one["requests"], one["lost"], one["duplicated"], one["identical"]) for one in rounds
    ]
    _, noticed, killed = rounds
    assert 0 < noticed["kv_bytes"]
    assert 0 == noticed["recomputed_tokens"]
    assert 0 < killed["recomputed_tokens"]
    assert f"notice: {noticed['instance']} will be taken in 20 s" in done.stderr
    assert f"kill: {killed['instance']} is gone, without a notice" in done.stderr
    assert "\x1b" not in done.stderr
    assert_nothing_left(tmp_path)


@pytest.mark.e2e
@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_demo_cleans_up(tmp_path: Path, environment: dict[str, str], number: signal.Signals) -> None:
    """Tests that Ctrl-C or SIGTERM in the middle of the answers ends daemon, workers and folder, with exit 130."""
    process = subprocess.Popen(
        [sys.executable, "-c", ENTRY, "demo"],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell in the background ignores SIGINT for its children; the demo of a person does not.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("notice: "):
            break
    process.send_signal(number)
    out, _ = process.communicate(timeout=120)
    assert (130, "") == (process.returncode, out)
    deadline_s = time.monotonic() + 30
    while list(tmp_path.iterdir()) and time.monotonic() < deadline_s:
        time.sleep(0.1)
    assert_nothing_left(tmp_path)
