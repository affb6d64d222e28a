"""The swarm: each seed draws a cluster, a load and faults, and strangers judge what it leaves."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest

from benchmarks.swarm import FOUND
from spotserve.cli.main import run_verb
from spotserve.core import admission, plan_run, planning
from spotserve.core.state import ClusterState, Request
from spotserve.sim.swarm.drawing import STEP_KINDS, CoordinatorCrash, Shares, SwarmScenario, draw_scenario
from spotserve.sim.swarm.injection import FAULT_CLASSES
from spotserve.sim.swarm.running import SeedResult, SeedRun, run_seed
from spotserve.solvers.planner import make_plan

NUM_SEEDS = 200
PER_TEST = 20
QUICK_SHARE = 10


def ranges() -> list[Any]:
    """Ranges of seeds; `make quick` takes a tenth of them, `make test` all."""
    firsts = range(0, NUM_SEEDS, PER_TEST)
    marks = [() if index < len(firsts) // QUICK_SHARE else (pytest.mark.swarm,) for index in range(len(firsts))]
    return [pytest.param(first, marks=mark) for first, mark in zip(firsts, marks, strict=True)]


_RESULTS: dict[int, SeedResult] = {}


def result_of(seed: int) -> SeedResult:
    """The result of a seed, which is played once in a test process."""
    if seed not in _RESULTS:
        _RESULTS[seed] = run_seed(seed, make_plan)
    return _RESULTS[seed]


@pytest.mark.parametrize("first", ranges())
def test_seeds_break_no_promise(first: int) -> None:
    """Tests that whatever a seed draws, every promise holds, and that everything ends once the faults stop."""
    results = [result_of(seed) for seed in range(first, first + PER_TEST)]
    told = {result.seed: [str(violation) for violation in result.violations] for result in results if result.violations}
    assert {} == told, f"spotserve simulate --swarm 1 --seed {next(iter(told))}"


@pytest.mark.swarm
def test_every_fault_class_happens() -> None:
    """Tests that the seeds together meet every class of faults that the swarm knows, and name no other."""
    counts: Counter[str] = Counter()
    for seed in range(NUM_SEEDS):
        counts += result_of(seed).faults
    assert set(FAULT_CLASSES) == set(counts)


def test_every_kind_of_step_can_be_crashed_at() -> None:
    """Tests that no kind of step of a plan is left out of the crashes."""
    from spotserve.core.plan import Step

    kinds = {arm.model_fields["kind"].default for arm in Step.__origin__.__args__}  # type: ignore[attr-defined]
    assert kinds == set(STEP_KINDS)


@pytest.mark.parametrize("seed", FOUND)
def test_found_faults_stay_mended(seed: int) -> None:
    """Tests the seeds that once showed a fault of the product."""
    assert [] == [str(violation) for violation in result_of(seed).violations]


@pytest.mark.parametrize("first", ranges())
def test_every_plan_is_right_at_once(first: int) -> None:
    """Tests that the checker has nothing against any plan that comes as it was made."""
    refused = {seed: result_of(seed).refused_plans for seed in range(first, first + PER_TEST)}
    assert {} == {seed: plans for seed, plans in refused.items() if plans}


@pytest.mark.parametrize("seed", [44])
def test_a_seed_is_the_same_in_every_process(seed: int) -> None:
    """Tests that scenario and journal are the same to the byte, whatever the hashes of strings are."""
    script = (
        "import sys\n"
        "from spotserve.sim.swarm.running import run_seed\n"
        "from spotserve.solvers.planner import make_plan\n"
        "print(run_seed(int(sys.argv[1]), make_plan).journal_digest)\n"
    )
    digests = {result_of(seed).journal_digest + "\n"}
    for hash_seed in ("0", "4711"):
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
        done = subprocess.run(
            [sys.executable, "-c", script, str(seed)], capture_output=True, text=True, env=environment, check=True
        )
        digests.add(done.stdout)
    assert 1 == len(digests)


def test_a_late_answer_of_the_planner_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests that where answers come twice a plan of an older membership would begin, were they taken twice."""
    shares = Shares(message_duplicate=0.7, message_late=0.2)
    scenarios = [replace(draw_scenario(seed), shares=shares) for seed in (21, 49)]
    assert [] == [str(violation) for one in scenarios for violation in SeedRun(one, make_plan).run().violations]
    monkeypatch.setattr(planning, "_is_answered", lambda before, event: False)
    told = [str(violation) for one in scenarios for violation in SeedRun(one, make_plan).run().violations]
    assert any("which leaves" in one for one in told)


def crashed_at_the_commit(seed: int) -> SwarmScenario:
    """The scenario of a seed, but that its coordinator dies when a commit which recomputes is written and not given."""
    whole = replace(draw_scenario(seed), coordinator=())
    run = SeedRun(whole, make_plan)
    run.run()
    entry = next(
        entry.sequence
        for entry in run.journal.entries
        if any(command.kind == "commit_run" and command.recomputed for command in entry.commands)
        and any(command.kind == "admit_requests" for command in entry.commands)
    )
    return replace(whole, coordinator=(CoordinatorCrash(entry=entry, phase="after", commands=0, down_s=0.0),))


def test_a_restart_behind_a_commit_claims_no_kv_that_did_not_move(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests that requests which start from the ledger are admitted without KV, and that the world sees it otherwise."""
    scenario = crashed_at_the_commit(11)
    assert [] == SeedRun(scenario, make_plan).run().violations

    def everything(state: ClusterState, request: Request) -> bool:
        run = state.run
        return run is not None and run.committed and request.id in {p.request for p in run.positions}

    for module in (plan_run, admission):
        monkeypatch.setattr(module, "has_moved", everything)
    told = " ".join(str(violation) for violation in SeedRun(scenario, make_plan).run().violations)
    assert "that nothing brought" in told
    assert "with KV that did not move" in told


def test_seeds_differ() -> None:
    """Tests that two seeds draw two scenarios, and one seed always the same."""
    assert draw_scenario(1) == draw_scenario(1)
    assert len({str(draw_scenario(seed).as_json()) for seed in range(50)}) == 50


def test_command_reports_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    """Tests that the command runs the seeds it is told and says what they met."""
    assert 0 == run_verb(["simulate", "--swarm", "3", "--seed", "5", "--format", "json"])
    told = json.loads(capsys.readouterr().out)
    assert (5, 3, 0, []) == (told["first_seed"], told["num_seeds"], told["num_violations"], told["failures"])
    assert set(FAULT_CLASSES) == set(told["faults"])
    assert told["simulated_hours"] > 0


def test_command_tells_a_failing_seed(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests that a broken promise costs exit 1, and comes with its scenario and the command that plays it again."""
    monkeypatch.setattr(admission, "_rooms", lambda state: dict.fromkeys((r.id for r in state.serving()), 1000))
    assert 1 == run_verb(["simulate", "--swarm", "4", "--seed", "0"])
    told = capsys.readouterr().out
    assert "P5: " in told
    assert '"gpu_memory_bytes"' in told
    assert "replay: spotserve simulate --swarm 1 --seed " in told


def test_command_refuses_a_scenario_file_beside_the_swarm(capsys: pytest.CaptureFixture[str]) -> None:
    """Tests that a file cannot be mistaken for what the swarm plays."""
    assert 2 == run_verb(["simulate", "day.toml", "--swarm", "3"])
    assert "--swarm" in capsys.readouterr().err
