"""The README says what is true: its transcript is run and compared, its figures are those of the code."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import time
from pathlib import Path

import pytest

from spotserve.api.protocol import ReceiptBounds
from spotserve.api.validation import (
    MAX_CHOICES,
    MAX_COMPLETION_LOGPROBS,
    MAX_PROMPTS,
    MAX_SCORED_PROMPT_TOKENS,
    MAX_STOP_CHARS,
    MAX_STOPS,
)
from spotserve.cloud.local import MAX_WORKERS_PER_CORE, WORKER_BYTES
from spotserve.core.options import POLICY_NAMES, RunOptions
from spotserve.core.sampling import MAX_BIAS, MAX_BIASED_TOKENS, MAX_TOP_LOGPROBS
from spotserve.runtime.architecture import ARCHITECTURES
from spotserve.store.ledger import RETENTION_S
from tests.e2e.daemon import SPOTSERVE, RunningDaemon, running

CHECKOUT = Path(__file__).resolve().parent.parent
README = (CHECKOUT / "README.md").read_text(encoding="utf-8")
SETTLE_TIMEOUT_S = 60.0
COMMAND_TIMEOUT_S = 120.0


def section(title: str) -> str:
    """The text below a heading."""
    return README.split(f"\n## {title}\n")[1].split("\n## ")[0]


def transcript() -> list[tuple[str, str]]:
    """Each command of the transcript with what it prints."""
    block = re.search(r"```console\n(.*?)```", section("What it looks like"), re.DOTALL)
    assert block is not None
    parts = [part.partition("\n") for part in re.split(r"^\$ ", block[1], flags=re.MULTILINE)[1:]]
    return [(command, output) for command, _, output in parts]


def pattern(output: str) -> re.Pattern[str]:
    """What an output with `…` in it may look like: anything within a line, or any lines for a line of its own."""
    lines = [
        r"(?:[^\n]*\n)*?" if line == "…" else re.escape(line).replace("…", r"[^\n]*") + r"\n"
        for line in output.splitlines()
    ]
    return re.compile("".join(lines))


def table_rows(title: str) -> dict[str, str]:
    """The two columns of a section's table."""
    rows = re.findall(r"^\| (.+?) \| (.+?) \|$", section(title), re.MULTILINE)
    return {name: bound for name, bound in rows if set(name) != {"-"}}


@pytest.mark.e2e
def test_transcript(tmp_path: Path, daemon_environment: dict[str, str]) -> None:
    """Tests that the transcript's commands, run in order against a daemon, print what stands there."""
    (start, ready), *commands = transcript()
    assert ("make run &", "ready http://127.0.0.1:8000\n") == (start, ready)
    with running(tmp_path / "state", env=daemon_environment) as daemon:
        for command, output in commands:
            said = run_until(command, pattern(output), daemon)
            assert pattern(output).fullmatch(said), f"$ {command}\n{said}"


def run_until(command: str, expected: re.Pattern[str], daemon: RunningDaemon) -> str:
    """What a command prints; one that only looks is repeated until the daemon has settled."""
    # The interpreter's folder stands in for the .venv that a reader has made.
    folder = Path(SPOTSERVE).parent
    line = command.replace(".venv/bin/", f"{folder}/")
    environment = {
        **os.environ,
        "SPOTSERVE_PORT": str(daemon.port),
        "SPOTSERVE_URL": daemon.url,
        "NO_COLOR": "1",
    }
    deadline_s = time.monotonic() + SETTLE_TIMEOUT_S
    while True:
        done = subprocess.run(
            shlex.split(line),
            cwd=CHECKOUT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=COMMAND_TIMEOUT_S,
        )
        looks = command.endswith(" status")
        if not looks or expected.fullmatch(done.stdout) or time.monotonic() > deadline_s:
            return done.stdout
        time.sleep(0.2)


def test_limits_are_those_of_the_code() -> None:
    """Tests that each bound of the limits table is the constant that the code enforces."""
    rows = table_rows("Limits")
    default = {name: field.default for name, field in RunOptions.model_fields.items()}
    expected = {
        "workers on one machine": f"{MAX_WORKERS_PER_CORE} per core, and {WORKER_BYTES >> 20} MiB of free memory",
        "running sequences of a replica": f"{default['max_num_seqs']} ",
        "waiting requests": f"{default['max_queue']} ",
        "choices of a request (`n`)": f"{MAX_CHOICES}",
        "prompts of a completion": f"{MAX_PROMPTS}",
        "stop strings": f"{MAX_STOPS} of {MAX_STOP_CHARS} characters",
        "`logit_bias`": f"{MAX_BIASED_TOKENS} token ids, each from -{MAX_BIAS:.0f} to {MAX_BIAS:.0f}",
        "`logprobs`": f"the {MAX_COMPLETION_LOGPROBS} likeliest of each token of a completion, `top_logprobs` "
        f"{MAX_TOP_LOGPROBS} in a chat",
        "a prompt echoed with logprobs": f"{MAX_SCORED_PROMPT_TOKENS} tokens",
        "body of a request": f"{ReceiptBounds().body_bytes >> 20} MiB",
        "ended requests can be fetched": f"for {RETENTION_S / 60:.0f} minutes",
    }
    for name, bound in expected.items():
        assert rows[name].startswith(bound), name


def test_every_policy_and_architecture_is_named() -> None:
    """Tests that the README names each policy and each model architecture there is."""
    for policy in POLICY_NAMES:
        assert f"`{policy}`" in section("Policies")
    for architecture in ARCHITECTURES:
        assert f"`{architecture}`" in section("Models")


def test_set_up_is_two_commands() -> None:
    """Tests that the README begins with `make run` and `make test` and that the Makefile has both."""
    targets = re.findall(r"^([a-z-]+):", (CHECKOUT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    commands = re.findall(r"^make ([a-z-]+)", section("Two commands"), re.MULTILINE)
    assert ["run", "test"] == commands
    assert set(commands) <= set(targets)
