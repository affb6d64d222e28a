"""Journals of real daemons of former days: they fold to the same states for ever (tests/golden_journals/README.md)."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from spotserve.cli.main import run_verb
from spotserve.core.replay import mismatch, moments
from spotserve.core.replay_report import replay_report
from spotserve.core.spec import POLICY_VERSION
from spotserve.store.recording import Recording, read_recording
from tests.golden_journals.reading import GOLDEN
from tests.golden_journals.record import PROMPTS

MAX_BYTES = 300_000

Opened = Callable[[Path], Recording]


@pytest.fixture
def opened(tmp_path: Path) -> Opened:
    """Opens a copy: SQLite would put files of its own beside the golden one."""

    def open_copy(path: Path) -> Recording:
        return read_recording(Path(shutil.copy(path, tmp_path)))

    return open_copy


def version_of(path: Path) -> int:
    """The policy version that decided in it: `v1-notice.db`."""
    return int(path.stem.split("-")[0].removeprefix("v"))


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_golden_journal_folds_to_the_recorded_state(path: Path, opened: Opened) -> None:
    """Tests that every fact of the state that was recorded with a journal is what it folds to now."""
    source = opened(path)
    state = source.base
    for moment in moments(state, source.entries):
        state = moment.after
    recorded = json.loads(path.with_suffix(".state.json").read_text())
    assert len(recorded) > 20
    found = mismatch(recorded, state, ())
    assert found is None, f"{found}: journals in the field break; see tests/golden_journals/README.md"


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_golden_journal_is_decided_again(path: Path, opened: Opened) -> None:
    """Tests that a journal of the present policy version is decided as recorded, and one of another not compared."""
    source = opened(path)
    checks = replay_report(source.base, source.entries, snapshots=source.snapshots)["checks"]
    told = "" if checks["difference"] is None else checks["difference"]["message"]
    expected = "same" if version_of(path) == POLICY_VERSION else "not_compared"
    assert expected == checks["decisions"], (
        f"{told}\nIf it is to be decided so from now on: raise POLICY_VERSION in spotserve/core/spec.py and record new"
        " journals beside the old ones (tests/golden_journals/README.md). If not, the change is wrong"
    )
    assert [version_of(path)] == checks["journal_policy_versions"]


def test_the_present_policy_version_has_golden_journals() -> None:
    """Tests that raising the policy version brings new journals, so that its decisions are kept as well."""
    present = {path.stem.partition("-")[2] for path in GOLDEN if version_of(path) == POLICY_VERSION}
    missing = {"notice", "kill", "restart"} - present
    assert set() == missing, "record them: python -m tests.golden_journals.record tests/golden_journals"


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_golden_journals_are_small_and_hold_no_content(path: Path) -> None:
    """Tests that no prompt of the recorder is in a journal, and that the files stay small."""
    content = path.read_bytes()
    assert len(content) < MAX_BYTES
    assert [] == [prompt for prompt in PROMPTS if prompt.encode() in content]


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_every_golden_journal_is_told(path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Tests that `replay` tells each of them in both formats, whatever its version."""
    copied = shutil.copy(path, tmp_path)
    assert 0 == run_verb(["replay", copied])
    text = capsys.readouterr()
    assert "" == text.err
    assert "journal begun: model builtin" in text.out
    assert 0 == run_verb(["replay", copied, "--json"])
    report = json.loads(capsys.readouterr().out)
    assert sum(item.get("entries", 1) for item in report["timeline"]) == report["entries"]
