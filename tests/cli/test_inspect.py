"""`spotserve inspect`: what plan runs came to, worked out again by hand from the journal's entries."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from spotserve.cli.main import run_verb
from spotserve.core import commands as cmd
from spotserve.core import events as ev
from spotserve.core.controller import Controller, Entry
from spotserve.core.run_history import run_history, run_line, run_report
from spotserve.core.state import ClusterState
from tests.cli.test_replay import written_journal
from tests.sim.test_virtual_world import Stage

Said = Callable[..., tuple[int, str, str]]


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str]) -> Said:
    """Runs `inspect`; gives (exit code, stdout, stderr)."""

    def run(*arguments: object) -> tuple[int, str, str]:
        code = run_verb(["inspect", *(str(argument) for argument in arguments)])
        output = capsys.readouterr()
        return code, output.out, output.err

    return run


def noticed_stage() -> Stage:
    """A first placement, and a notice whose requests move."""
    stage = Stage()
    stage.requests(6, max_tokens=200)
    stage.notice(4.0, "i0")
    stage.play(8.0)
    return stage


def disturbed_stage() -> Stage:
    """The same, and a second notice while the KV of the first migration is copied."""
    begun_s = run_history(ClusterState(), noticed_stage().journal.entries)[1].phases["begun"]
    stage = Stage()
    stage.requests(6, max_tokens=200)
    stage.notice(4.0, "i0")
    stage.notice(begun_s + 0.004, "i1")
    stage.play(8.0)
    return stage


def by_hand(entries: list[Entry], epoch: int) -> dict[str, tuple[float, int]]:
    """Step -> (seconds from its order to its answer, bytes received) of one run that went well."""
    ordered: dict[str, float] = {}
    found: dict[str, tuple[float, int]] = {}
    for entry in entries:
        event = entry.event
        if isinstance(event, ev.StepDone | ev.Quiesced) and event.epoch == epoch and event.step not in found:
            found[str(event.step)] = (event.at_s - ordered[event.step], getattr(event, "bytes", 0))
        for command in entry.commands:
            if isinstance(command, cmd.ExecuteStep) and command.epoch == epoch:
                ordered.setdefault(command.step.id, event.at_s)
    return found


def test_lists_the_runs(said: Said, tmp_path: Path) -> None:
    """Tests that the first placement is number 0, a migration number 1, with phases in the order of their times."""
    stage = noticed_stage()
    written_journal(tmp_path / "journal.db", stage.journal.entries)
    code, out, err = said(tmp_path, "--json")
    assert (code, err) == (0, "")
    first, second = json.loads(out)["runs"]
    assert (first["number"], first["trigger"]["kind"], first["outcome"]) == (0, "start", "completed")
    assert (second["number"], second["trigger"]) == (1, {"kind": "notice", "instances": ["i0"]})
    times = [second["phases"][name] for name in ("begun", "quiesced", "durable", "committed", "released")]
    assert times == sorted(times)
    assert times[0] >= 4.0
    code, text, _ = said(tmp_path / "journal.db")
    assert (code, len(text.splitlines())) == (0, 3)
    assert "notice i0" in text


def test_steps_are_those_of_the_journal(said: Said, tmp_path: Path) -> None:
    """Tests that seconds and bytes of each step and the totals are what one counts by hand in the entries."""
    stage = noticed_stage()
    entries = stage.journal.entries
    written_journal(tmp_path / "journal.db", entries)
    code, out, _ = said(tmp_path, "--migration", 1, "--json")
    report = json.loads(out)
    (line,) = stage.controller.state.migrations
    expected = by_hand(entries, line.epoch)
    measured = {step["step"]: step for step in report["steps"] if step["measured_s"] is not None}
    assert (code, sorted(measured)) == (0, sorted(expected))
    for name, (seconds, size) in expected.items():
        step = measured[name]
        assert step["measured_s"] == pytest.approx(seconds, abs=1e-6)
        assert step["outcome"] == "done"
        assert step["ratio"] == pytest.approx(step["measured_s"] / step["estimated_s"], rel=1e-2)
        if step["moved_bytes"] is not None:
            assert step["moved_bytes"] == size
    totals = report["totals"]
    assert (totals["kv_bytes"]["measured"], totals["weight_bytes"]["measured"]) == (line.kv_bytes, line.weight_bytes)
    assert totals["stall_ms_max"] == line.stall_ms_max
    phases = report["phases"]
    assert totals["done_s"]["measured"] == pytest.approx(phases["released"] - phases["begun"], abs=1e-6)
    assert {step["kind"] for step in report["steps"] if step["measured_s"] is None} == {"commit"}


def test_text_is_of_the_json(said: Said, tmp_path: Path) -> None:
    """Tests that the table has a row for each step and no list of steps that were not carried out."""
    written_journal(tmp_path / "journal.db", noticed_stage().journal.entries)
    steps = json.loads(said(tmp_path, "--migration", 1, "--json")[1])["steps"]
    code, text, _ = said(tmp_path, "--migration", 1)
    assert code == 0
    assert text.startswith("migration 1  epoch 2  notice i0  mode live  completed after ")
    rows = [line.split() for line in text.split("Steps\n")[1].splitlines()[1:]]
    assert [row[0] for row in rows] == [step["step"] for step in steps]
    assert "Not carried out" not in text
    assert said(tmp_path, "--migration", 0)[1].startswith("first placement  epoch 1  start")


def test_aborted_run_names_what_was_not_done(said: Said, tmp_path: Path) -> None:
    """Tests that a run which a notice aborts is listed with its reason, and its open steps are named."""
    stage = disturbed_stage()
    written_journal(tmp_path / "journal.db", stage.journal.entries)
    runs = json.loads(said(tmp_path, "--json")[1])["runs"]
    assert [run["outcome"] for run in runs[1:]] == [line.outcome for line in stage.controller.state.migrations]
    (aborted,) = [run for run in runs if run["outcome"] == "aborted"]
    assert aborted["abort_reason"] == "notice"
    report = json.loads(said(tmp_path, "--migration", aborted["number"], "--json")[1])
    outcomes = {step["outcome"] for step in report["steps"]}
    assert "not_started" in outcomes
    assert report["totals"]["done_s"]["measured"] is None
    text = said(tmp_path, "--migration", aborted["number"])[1]
    open_steps = [step for step in report["steps"] if step["outcome"] != "done"]
    assert f"Not carried out\n  {len(open_steps)} steps\n" in text
    assert "aborted after" in text


def test_journal_that_was_cut(tmp_path: Path) -> None:
    """Tests that numbers go on, and what is known is told, if the journal begins in the middle of a run."""
    stage = noticed_stage()
    entries = stage.journal.entries
    whole = run_history(ClusterState(), entries)
    begun = next(
        index
        for index, entry in enumerate(entries)
        if any(isinstance(command, cmd.BeginRun) and command.plan.epoch.to == 2 for command in entry.commands)
    )
    controller = Controller()
    for entry in entries[: begun + 1]:
        controller.fold(entry)
    (run,) = run_history(controller.state, entries[begun + 1 :])
    assert (run.number, run.outcome) == (1, "completed")
    assert run_line(run)["phases"] == run_line(whole[-1])["phases"]
    report: dict[str, Any] = run_report(run)
    assert report["totals"]["kv_bytes"] == run_report(whole[-1])["totals"]["kv_bytes"]
    assert report["steps"][0]["measured_s"] is None, "it was ordered before the journal begins"


def test_life_of_a_request(said: Said, tmp_path: Path) -> None:
    """Tests that a request's life is told as a table made of the JSON, with a row for each step."""
    stage = noticed_stage()
    written_journal(tmp_path / "journal.db", stage.journal.entries)
    code, out, err = said(tmp_path, "--request", "q0", "--json")
    report = json.loads(out)
    assert (code, err, report["request"], report["state"]) == (0, "", "q0", "finished")
    code, text, _ = said(tmp_path / "journal.db", "--request", "q0")
    assert (code, text.splitlines()[0]) == (0, "request q0  finished")
    rows = [line.split() for line in text.split("Life\n")[1].splitlines()[1:]]
    assert [row[2] for row in rows] == [str(step["sequence"]) for step in report["steps"]]
    assert "moved to" in text


def test_request_that_is_not_there(said: Said, tmp_path: Path) -> None:
    """Tests that an unknown request exits 1 with the nearest id, and two questions at once exit 2."""
    written_journal(tmp_path / "journal.db", noticed_stage().journal.entries)
    code, out, err = said(tmp_path, "--request", "q00")
    assert (code, out) == (1, "")
    assert err.splitlines()[0] == "error: request q00 is not in the journal"
    assert err.splitlines()[1].startswith("hint: did you mean q0")
    assert said(tmp_path, "--request", "q0", "--migration", 1)[0] == 2
    assert said(tmp_path, "--request", "\x1b[31m\n")[2].count("\n") == 2


def test_what_is_not_there(said: Said, tmp_path: Path) -> None:
    """Tests that a missing journal, garbage and an unknown number exit 1 in one line, and no number exits 2."""
    assert said(tmp_path)[0] == 1
    written_journal(tmp_path / "journal.db", noticed_stage().journal.entries)
    code, out, err = said(tmp_path, "--migration", 7)
    assert (code, out) == (1, "")
    assert err == "error: migration 7 has no plan run in the journal\nhint: there are: 0, 1\n"
    assert said(tmp_path, "--migration", "x")[0] == 2
    assert said(tmp_path, "--migration", -1)[0] == 2
    garbage = tmp_path / "garbage.db"
    garbage.write_bytes(b"garbage" * 100)
    code, out, err = said(garbage)
    assert (code, out) == (1, "")
    assert "garbage.db" in err
