"""The paper's runs on our simulator: its bills and its sequences of configurations, to the digit."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import pytest

from benchmarks.paper import costs, figure6, figure8, figure9, reproduced
from benchmarks.paper.published import SEQUENCES, Published
from benchmarks.paper.scenarios import phases_of, published_requests, scenario_of, trace_of
from benchmarks.paper.systems import SPOTSERVE, SYSTEMS, holes_of, layouts_of, play, play_on_demand, row_of
from spotserve.sim.measures import Moment, RunResult
from spotserve.sim.simulation import simulate
from spotserve.solvers.planner import make_plan


@cache
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


@pytest.mark.thorough
def test_the_saving_is_the_published_one(shared_data: Path) -> None:
    """Tests the 54 %: B_S beside eight on-demand instances for 18 minutes, both as simulated."""
    data = shared_data / "spotserve-paper"
    published = Published.read(data)
    fleet = play_on_demand(data, "GPT-20B", costs.BASE_INSTANCES, duration_s=published.on_demand_s_billed)
    assert round(fleet.run.cost.usd, 3) == round(published.on_demand_usd(costs.BASE_INSTANCES), 3) == 9.389
    spot = played(shared_data, "B_S", "reroute")
    assert round(1 - spot.cost.usd / fleet.run.cost.usd, 2) == published.saving


def test_table_1_is_met(shared_data: Path) -> None:
    """Tests the fewest GPUs and the milliseconds of every model."""
    rows = costs.measure_table_1(shared_data / "spotserve-paper")
    assert [4, 12, 16] == [row["min_gpus"] for row in rows] == [row["published_min_gpus"] for row in rows]
    assert [5.447, 14.373, 17.54] == [round(row["l_exe_s"], 3) for row in rows]
    assert all(line.endswith("| yes |") for line in list(costs.render_table_1(rows))[4:])


@pytest.mark.thorough
@pytest.mark.parametrize("trace", sorted(SEQUENCES))
def test_the_sequences_of_figure_8(shared_data: Path, trace: str) -> None:
    """Tests that the paper's policy goes through the published configurations, each at the stamp that it is for."""
    run = play(shared_data / "spotserve-paper", "GPT-20B", trace, SPOTSERVE).run
    layouts = layouts_of(run.timeline)
    assert [layout for _, layout in layouts] == [layout for _, layout in SEQUENCES[trace]]
    assert figure8.is_published_sequence(trace, layouts)
    assert not figure8.is_published_sequence(trace, [(at_s + 100, layout) for at_s, layout in layouts])
    assert run.requests.finished == run.requests.accepted


def test_demand_is_told_when_it_is_noticed(shared_data: Path) -> None:
    """Tests that a change of demand alone comes at its stamp, and one beside a removal with its notice."""
    trace = trace_of(shared_data / "spotserve-paper", "A'_S+O")
    assert [(300.0, 0.8), (570.0, 0.6)] == [(event.at_s, event.rps) for event in trace.events if event.kind == "load"]


def test_the_paper_takes_the_configurations_it_took(shared_data: Path) -> None:
    """Tests that the paper's policy on B_S serves (2,2,8), with seven instances (2,3,4), then (2,2,8) again."""
    run = played(shared_data, "B_S", "paper+static")
    assert [layout for _, layout in layouts_of(run.timeline)] == ["(2,2,8)", "(2,3,4)", "(2,2,8)"]
    assert [line.outcome for line in run.migrations] == ["completed"] * 3
    assert run.recomputed_tokens == 0


@pytest.mark.thorough
@pytest.mark.parametrize("system", SYSTEMS, ids=lambda system: system.name)
def test_averages_are_within_the_aims(shared_data: Path, system: object) -> None:
    """Tests GPT-20B on B_S+O, where SpotServe and Rerouting hold the same pipelines and only hand-outs differ."""
    data = shared_data / "spotserve-paper"
    one = next(each for each in SYSTEMS if each is system)
    row = row_of(play(data, "GPT-20B", "B_S+O", one))
    average_s, _ = Published.read(data).latency_s("B_S+O", one.name)
    assert abs(row["average_s"] / average_s - 1) <= figure6.AIMS[one.name]
    assert (row["lost"], row["open"]) == (0, 0)


def test_the_rerouting_hole(shared_data: Path) -> None:
    """Tests that LLaMA-30B has no (4,8) pipeline on B_S from 240 s until the eighth instance is back and loaded."""
    reroute = next(system for system in SYSTEMS if system.keeps_shape)
    row = row_of(play(shared_data / "spotserve-paper", "LLaMA-30B", "B_S", reroute))
    ((begin_s, end_s),) = row["holes"]
    assert 239.0 < begin_s < 241.0
    assert 720.0 < end_s < 800.0
    assert {"(1,4,8)"} == {layout for _, layout in row["layouts"]}
    assert row["longest_s"] > end_s - begin_s
    assert row["ended"] < row["finished"] == row["accepted"]


def test_holes_are_no_migrations() -> None:
    """Tests that a stop of seconds is no hole, and that one that nothing ends is none either."""

    def moment(at_s: float, gpus: int) -> Moment:
        return Moment(at_s=at_s, service="serving", instances=4, gpus_there=16, gpus=gpus, layout="-")

    timeline = [moment(0, 0), moment(2, 16), moment(100, 0), moment(101, 0), moment(170, 16), moment(300, 0)]
    assert [(100, 170)] == holes_of(timeline)


@pytest.mark.thorough
def test_the_ablation_takes_one_part_away_after_the_other(shared_data: Path) -> None:
    """Tests that without the controller (P, M) stays, and that without the arranger KV is computed again."""
    data = shared_data / "spotserve-paper"
    names = [step.name for step in figure9.STEPS]
    assert len(names) == len(Published.read(data).ablation("B_S")) == 5
    controller, planner, arranger, mapper = figure9.STEPS[1:]
    fixed = row_of(play(data, "GPT-20B", "B_S", controller))
    assert {"(1,2,8)", "(2,2,8)"} == {layout for _, layout in fixed["layouts"]}
    assert fixed["recomputed_tokens"] == 0
    assert {"migrate"} == planner.solvers.keys() - controller.solvers.keys()
    assert {"arrange"} == arranger.solvers.keys() - planner.solvers.keys()
    assert {"place"} == mapper.solvers.keys() - arranger.solvers.keys()
    without = row_of(play(data, "GPT-20B", "B_S", arranger))
    assert without["recomputed_tokens"] > 0
    assert without["lost"] == 0


def test_ours_stalls_shorter_than_the_paper(shared_data: Path) -> None:
    """Tests that where both must reshape in place our longest stall is less than half of the paper's policy's."""
    ours, theirs = (played(shared_data, "B_S", policy) for policy in ("live", "paper+static"))
    assert 2 * ours.stall_s.max < theirs.stall_s.max
    assert ours.latency_s.p99 < theirs.latency_s.p99
    assert ours.recomputed_tokens == 0


def test_the_committed_page_is_what_its_numbers_say() -> None:
    """Tests that the part of the results page that is about the published runs is made of the results file."""
    results = Path(__file__).resolve().parents[2] / "benchmarks/results/paper.json"
    rows = json.loads(results.read_text(encoding="utf-8"))["parts"]["reproduced"]["rows"]
    assert "\n".join(reproduced.render(rows)) in results.with_suffix(".md").read_text(encoding="utf-8")
