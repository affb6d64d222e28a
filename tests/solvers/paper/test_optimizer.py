"""Algorithm 1 against every published answer of it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from spotserve.solvers.paper.latency import LatencyTable
from spotserve.solvers.paper.optimizer import Configuration, Demand, Fleet, batch_of, optimize, replicas_only
from tests.solvers.paper.golden import LOADS_GIVEN, MIN_GPUS, golden_json, golden_rows, latency_table


def demand(model: str, load_rps: float, *, max_batch: int = 4) -> Demand:
    """A load on one of the paper's models."""
    return Demand(load_rps, max_batch, MIN_GPUS[model])


def columns(configuration: Configuration) -> tuple[int, ...]:
    """(D, P, M, B, M1, M2)."""
    plan = configuration.plan
    return (
        configuration.data,
        plan.pipeline,
        plan.tensor,
        plan.batch,
        plan.initial_parts,
        plan.token_parts,
    )


def test_every_row_of_config_choice(shared_data: Path) -> None:
    """Tests that the artifact's optimizer answers every published input: the configuration, l_exe, phi and branch."""
    tables = {name: latency_table(shared_data, name) for name in MIN_GPUS}
    for row in golden_rows(shared_data, "config_choice.csv"):
        asked = demand(row["model"], float(row["alpha_req_per_s"]), max_batch=int(row["max_B"]))
        result = optimize(tables[row["model"]], Fleet(int(row["gpus"])), asked)
        if row["feasible"] == "no_fit":
            assert (result.answer, result.status) == (None, "infeasible"), row
            continue
        assert result.answer is not None, row
        chosen = result.answer.configuration
        assert columns(chosen) == tuple(int(row[key]) for key in ("D", "P", "M", "B", "M1", "M2")), row
        assert result.answer.serves_load == (row["feasible"] == "1"), row
        assert chosen.latency_ms == pytest.approx(float(row["l_exe_ms"]), abs=1e-4, rel=0), row
        assert chosen.throughput_rps == pytest.approx(float(row["phi_req_per_s"]), abs=1e-6, rel=0), row


@pytest.mark.parametrize(
    ("model", "load_rps", "instances", "expected"),
    [
        ("GPT-20B", 0.4, 2, None),
        ("GPT-20B", 0.4, 3, ((1, 3, 4), False, None, 0.2767)),
        ("GPT-20B", 0.4, 4, ((1, 2, 8), False, None, 0.3086)),
        ("GPT-20B", 0.4, 6, ((2, 3, 4), True, 14.459, 0.5533)),
        ("GPT-20B", 0.4, 7, ((2, 3, 4), True, 14.459, 0.5533)),
        ("GPT-20B", 0.4, 8, ((2, 2, 8), True, 12.961, 0.6173)),
        ("GPT-20B", 0.4, 12, ((3, 2, 8), True, 12.116, 0.4952)),
        ("OPT-6.7B", 2.0, 2, ((2, 1, 4), False, None, 1.5123)),
        ("OPT-6.7B", 2.0, 3, ((3, 1, 4), True, 5.290, 2.2684)),
        ("OPT-6.7B", 2.0, 5, ((5, 1, 4), True, 4.889, 2.0455)),
        ("OPT-6.7B", 2.0, 9, ((9, 1, 4), True, 4.889, 3.6819)),
        ("OPT-6.7B", 2.0, 10, ((5, 2, 4), True, 4.729, 2.1144)),
        ("LLaMA-30B", 0.2, 3, None),
        ("LLaMA-30B", 0.2, 4, ((1, 2, 8), True, 17.751, 0.2253)),
        ("LLaMA-30B", 0.2, 6, ((1, 3, 8), True, 17.498, None)),
        ("LLaMA-30B", 0.2, 8, ((1, 4, 8), True, 17.383, None)),
        ("LLaMA-30B", 0.2, 12, ((1, 6, 8), True, 17.291, None)),
    ],
)
def test_answers_that_the_paper_s_runs_show(
    shared_data: Path,
    model: str,
    load_rps: float,
    instances: int,
    expected: tuple[tuple[int, int, int], bool, float | None, float | None] | None,
) -> None:
    """Tests (D, P, M), branch, seconds and throughput at the loads that the evaluation gives its optimizer."""
    answer = optimize(latency_table(shared_data, model), Fleet(4 * instances), demand(model, load_rps)).answer
    if expected is None:
        assert answer is None
        return
    degrees, serves_load, latency_s, throughput_rps = expected
    assert answer is not None
    assert (columns(answer.configuration)[:3], answer.serves_load) == (degrees, serves_load)
    if latency_s is not None:
        assert answer.configuration.latency_ms / 1000 == pytest.approx(latency_s, abs=5.1e-4, rel=0)
    if throughput_rps is not None:
        assert answer.configuration.throughput_rps == pytest.approx(throughput_rps, abs=5.1e-5, rel=0)


@pytest.mark.parametrize("trace", ["trace_0304_ondemand", "trace_0304_real", "trace_0304_workload", "trace_0506_real"])
def test_every_trace_and_model(shared_data: Path, trace: str) -> None:
    """Tests that the optimizer follows every published sequence, replayed from the trace itself."""
    published = golden_json(shared_data, "trace_config_sequences.json")[trace]
    events = replay(shared_data, trace)
    assert [(at_s, count) for at_s, count, _ in events] == [
        (event["t_s"], event["instances_after"]) for event in published["events"] if event["op"] != "DONE"
    ]
    for model, answers in published["configs"].items():
        table = latency_table(shared_data, model)
        assert len(answers) == len(events)
        for (at_s, count, load_rps), answer in zip(events, answers, strict=True):
            asked = demand(model, load_rps or (0.6 if "workload" in trace else LOADS_GIVEN[model]))
            assert (at_s, count, asked.load_rps) == (answer["t_s"], answer["instances"], answer["alpha"])
            check_answer(table, count, asked, answer["config"])


def check_answer(table: LatencyTable, count: int, asked: Demand, expected: dict[str, Any]) -> None:
    """One entry of a sequence."""
    decision = optimize(table, Fleet(4 * count), asked).answer
    assert decision is not None
    keys = ("D", "P", "M", "B_solver", "M1", "M2")
    assert columns(decision.configuration) == tuple(expected[key] for key in keys)
    assert decision.configuration.latency_ms / 1000 == pytest.approx(expected["l_exe_s"], abs=5.1e-5, rel=0)
    assert decision.configuration.throughput_rps == pytest.approx(expected["phi"], abs=5.1e-5, rel=0)
    assert decision.serves_load == expected["meets_alpha"]


def replay(shared_data: Path, trace: str) -> list[tuple[float, int, float | None]]:
    """(seconds, instances after it, load asked for) of every event before DONE."""
    path = shared_data / "spotserve-paper/traces/availability" / f"{trace}.txt"
    alive: set[str] = set()
    load_rps: float | None = None
    events = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.strip() or line.startswith("#"):
            continue
        at_ms, operation, info = json.loads(line)
        alive = alive | set(info["nodes"]) if operation == "add" else alive - set(info["nodes"])
        load_rps = info.get("required_tpt", load_rps)
        if operation != "DONE":
            events.append((at_ms / 1000, len(alive), load_rps))
    return events


def test_figure_8_of_trace_b(shared_data: Path) -> None:
    """Tests the configurations of B'_S+O that Figure 8 shows, from the trace's own counts and loads."""
    table = latency_table(shared_data, "GPT-20B")
    seen = {}
    for at_s, count, load_rps in replay(shared_data, "trace_0506_workload"):
        decision = optimize(table, Fleet(4 * count), demand("GPT-20B", load_rps or 0.6)).answer
        assert decision is not None
        seen[at_s] = columns(decision.configuration)[:3]
    assert {shape for at_s, shape in seen.items() if at_s < 300} == {(2, 2, 8)}
    assert [seen[at_s] for at_s in (300, 330, 450, 600)] == [(3, 3, 4), (3, 3, 4), (3, 2, 8), (2, 2, 8)]


def test_rerouting_has_no_pipeline_of_llama_on_trace_b(shared_data: Path) -> None:
    """Tests that Rerouting's fixed (4, 8) holds no pipeline from 240 to 720 s of B_S, nor before 240 s of A_S."""
    table = latency_table(shared_data, "LLaMA-30B")
    pipelines = {}
    for trace in ("trace_0304_real", "trace_0506_real"):
        for at_s, count, _ in replay(shared_data, trace):
            answer = replicas_only(table, Fleet(4 * count), demand("LLaMA-30B", 0.2), most_gpus=40)
            assert answer is not None
            assert (answer[0].pipeline, answer[0].tensor) == (4, 8)
            pipelines[trace, at_s] = answer[1]
    assert [pipelines["trace_0506_real", at_s] for at_s in (120.0, 240.0, 720.0)] == [1, 0, 1]
    assert [pipelines["trace_0304_real", at_s] for at_s in (0.0, 240.0)] == [0, 1]


@pytest.mark.parametrize(("model", "shape"), [("OPT-6.7B", (2, 4)), ("GPT-20B", (2, 8)), ("LLaMA-30B", (4, 8))])
def test_rerouting_shapes(shared_data: Path, model: str, shape: tuple[int, int]) -> None:
    """Tests the shapes that Rerouting solves once for 40 GPUs."""
    answer = replicas_only(
        latency_table(shared_data, model), Fleet(40), demand(model, LOADS_GIVEN[model]), most_gpus=40
    )
    assert answer is not None
    assert (answer[0].pipeline, answer[0].tensor) == shape


def test_the_published_text_takes_fewer_instances(shared_data: Path) -> None:
    """Tests that of similar latencies the text takes 4 instances of LLaMA-30B where the artifact takes all 12."""
    table, asked = latency_table(shared_data, "LLaMA-30B"), demand("LLaMA-30B", 0.2)
    artifact = optimize(table, Fleet(48), asked).answer
    published = optimize(table, Fleet(48), asked, as_published=True).answer
    assert artifact is not None
    assert published is not None
    assert columns(artifact.configuration)[:3] == (1, 6, 8)
    assert columns(published.configuration)[:3] == (1, 2, 8)
    assert (artifact.delta_instances, published.delta_instances) == (0, -8)


def test_the_published_text_allocates_what_the_cloud_offers(shared_data: Path) -> None:
    """Tests that a load too high for N_t is met with more instances if there are, else by the most throughput."""
    table, asked = latency_table(shared_data, "GPT-20B"), demand("GPT-20B", 0.8)
    grown = optimize(table, Fleet(16, offered=64), asked, as_published=True).answer
    stuck = optimize(table, Fleet(16), asked, as_published=True).answer
    assert grown is not None
    assert stuck is not None
    assert grown.serves_load
    assert grown.delta_instances > 0
    assert (stuck.serves_load, stuck.delta_instances) == (False, 0)


def test_a_result_reports_what_it_minimised(shared_data: Path) -> None:
    """Tests that the objective is l_exe where the load is served and throughput where it is not."""
    table = latency_table(shared_data, "GPT-20B")
    served = optimize(table, Fleet(28), demand("GPT-20B", 0.4))
    short = optimize(table, Fleet(12), demand("GPT-20B", 0.4))
    assert (served.certificate["measure"], round(served.objective)) == ("latency_ms", 14459)
    assert (short.certificate["measure"], round(short.objective, 4)) == ("throughput_rps", 0.2767)


def test_batches() -> None:
    """Tests the batch that a pipeline takes of what waits."""
    assert [batch_of(waiting, max_batch=4) for waiting in (0, 1, 2, 3, 4, 5, 9)] == [0, 1, 2, 2, 4, 4, 4]


def test_a_cost_coefficient_changes_the_answer(shared_data: Path) -> None:
    """Tests that a layer twice as slow per token at M = 8 takes GPT-20B from (2, 2, 8) to another shape."""
    table, asked = latency_table(shared_data, "GPT-20B"), demand("GPT-20B", 0.4)
    slower = {
        key: replace(time, token_ms=2 * time.token_ms) if key[0] == 8 else time
        for key, time in table.layer_times.items()
    }
    before = optimize(table, Fleet(32), asked).answer
    after = optimize(replace(table, layer_times=slower), Fleet(32), asked).answer
    assert before is not None
    assert after is not None
    assert columns(before.configuration)[:3] == (2, 2, 8)
    assert after.configuration.plan.tensor != 8
