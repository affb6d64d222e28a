"""Help texts as golden files: `pytest tests/cli/test_help.py --rewrite` writes them, a diff shows what users get."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from spotserve.cli.config import SETTINGS, flag_of
from spotserve.cli.main import run_verb

FOLDER = Path(__file__).parent / "help"
VERBS = (
    *("run", "demo", "status", "notice", "kill", "add-instance", "snapshot", "apply", "stop"),
    *("plan", "show", "diff", "verify", "report", "inspect", "replay", "simulate", "profile", "worker"),
)


@pytest.fixture(autouse=True)
def _plain_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("NO_COLOR", "1")


@pytest.mark.parametrize("verb", ["", *VERBS])
def test_help(verb: str, golden: Callable[[Path, str], None], capsys: pytest.CaptureFixture[str]) -> None:
    """Tests that the help of a verb is the reviewed text."""
    assert 0 == run_verb([*verb.split(), "--help"])
    golden(FOLDER / f"{verb or 'spotserve'}.txt", capsys.readouterr().out)


def test_every_verb_has_a_golden_help(capsys: pytest.CaptureFixture[str]) -> None:
    """Tests that no verb escapes the list above."""
    assert 0 == run_verb(["--help"])
    listed = capsys.readouterr().out.split("Commands:\n")[1]
    assert list(VERBS) == re.findall(r"^  ([a-z-]+) ", listed, re.MULTILINE)


def test_every_setting_is_a_flag_of_run(capsys: pytest.CaptureFixture[str]) -> None:
    """Tests that what a variable or the file can set, the command line can set as well, and nothing else."""
    assert 0 == run_verb(["run", "--help"])
    options = capsys.readouterr().out.split("Options:\n")[1]
    flags = set(re.findall(r"^  (?:-[a-z]+, )?(--[a-z-]+)", options, re.MULTILINE))
    assert {flag_of(setting.key) for setting in SETTINGS} - {"MODEL"} == flags - {"--config", "--fresh", "--help"}
