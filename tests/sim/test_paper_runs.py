"""The paper's runs on our simulator: its bills and its sequence of configurations, to the digit."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.paper.reproduced import layouts_of
from benchmarks.paper.scenarios import phases_of, published_requests, scenario_of
from spotserve.sim.measures import RunResult
from spotserve.sim.simulation import simulate
from spotserve.solvers.planner import make_plan


def played(shared_data: Path, trace: str, policy: str) -> RunResult:
    """GPT-20B on one of the paper's traces with its request file."""
    data = shared_data / "spotserve-paper"
    workload = published_requests(data, "GPT-20B")
    scenario = scenario_of(data, "GPT-20B", trace, workload, seed=0, knows_load=True)
    return simulate(scenario, policy, make_plan, phases=phases_of(data, "GPT-20B"))


@pytest.mark.parametrize(("trace", "usd"), [("A_S", 6.444), ("B_S", 4.349)])
def test_the_bill_is_the_published_one(shared_data: Path, trace: str, usd: float) -> None:
    """Tests that instance-minutes times price are what the paper paid, and that no request is lost on the way."""
    run = played(shared_data, trace, "live")
    assert round(run.cost.usd, 3) == usd
    assert run.requests.finished == run.requests.accepted
    assert run.requests.lost == 0


def test_the_paper_takes_the_configurations_it_took(shared_data: Path) -> None:
    """Tests that the paper's policy on B_S serves (2,2,8), with seven instances (2,3,4), then (2,2,8) again."""
    run = played(shared_data, "B_S", "paper+static")
    assert [layout for _, layout in layouts_of(run.timeline)] == ["(2,2,8)", "(2,3,4)", "(2,2,8)"]
    assert [line.outcome for line in run.migrations] == ["completed"] * 3
    assert run.recomputed_tokens == 0


def test_ours_stalls_shorter_than_the_paper(shared_data: Path) -> None:
    """Tests that where both must reshape in place our longest stall is less than half of the paper's policy's."""
    ours, theirs = (played(shared_data, "B_S", policy) for policy in ("live", "paper+static"))
    assert 2 * ours.stall_s.max < theirs.stall_s.max
    assert ours.latency_s.p99 < theirs.latency_s.p99
    assert ours.recomputed_tokens == 0
