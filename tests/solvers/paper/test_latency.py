"""The paper's latency model against its published table."""

from __future__ import annotations

from pathlib import Path

import pytest

from spotserve.solvers.paper.latency import BatchPlan, careful, execution_ms, hopeful, phase_times
from tests.solvers.paper.golden import golden_rows, latency_table


def test_every_row_of_the_latency_table(shared_data: Path) -> None:
    """Tests that t1, t2 and l_exe meet every published row to 1e-3 ms."""
    tables = {name: latency_table(shared_data, name) for name in ("OPT-6.7B", "GPT-20B", "LLaMA-30B")}
    for row in golden_rows(shared_data, "latency_table.csv"):
        table = tables[row["model"]]
        plan = BatchPlan(*(int(row[key]) for key in ("P", "M", "B", "M1", "M2")))
        times = careful(table, phase_times(table, plan))
        assert times.initial_ms == pytest.approx(float(row["t1_initial_ms"]), abs=1e-3, rel=0), row
        assert times.token_ms == pytest.approx(float(row["t2_per_token_ms"]), abs=1e-3, rel=0), row
        assert execution_ms(table, plan) == pytest.approx(float(row["l_exe_ms"]), abs=1e-3, rel=0), row


@pytest.mark.parametrize(
    ("model", "pipeline", "tensor", "seconds"),
    [
        ("OPT-6.7B", 1, 4, 5.447),
        ("GPT-20B", 3, 4, 14.373),
        ("LLaMA-30B", 2, 8, 17.540),
        ("GPT-20B", 2, 8, 12.472),
        ("GPT-20B", 1, 4, 14.011),
        ("LLaMA-30B", 4, 4, 21.273),
    ],
)
def test_table_1(shared_data: Path, model: str, pipeline: int, tensor: int, seconds: float) -> None:
    """Tests that Table 1's latencies, and its neighbours', are the cost model's to the millisecond."""
    table = latency_table(shared_data, model)
    latency_ms = execution_ms(table, BatchPlan(pipeline, tensor, 1, 1, 1))
    assert latency_ms / 1000 == pytest.approx(seconds, abs=5e-4, rel=0)


def test_a_batch_that_its_parts_do_not_divide_runs_whole(shared_data: Path) -> None:
    """Tests that a batch of 1 in 4 micro-batches costs what one of 1 in 1 costs."""
    table = latency_table(shared_data, "GPT-20B")
    assert phase_times(table, BatchPlan(2, 8, 1, 4, 4)) == phase_times(table, BatchPlan(2, 8, 1, 1, 1))


def test_careful_is_longer_than_hopeful(shared_data: Path) -> None:
    """Tests that the correction multiplies careful times and divides hopeful ones."""
    table = latency_table(shared_data, "OPT-6.7B")
    plain = phase_times(table, BatchPlan(1, 4, 4, 4, 1))
    assert careful(table, plain).token_ms == pytest.approx(1.1 * plain.token_ms)
    assert hopeful(table, plain).initial_ms == pytest.approx(plain.initial_ms / 1.1)


def test_an_unmeasured_degree_is_named(shared_data: Path) -> None:
    """Tests that a tensor degree without a profile row is refused by name."""
    with pytest.raises(KeyError, match="tensor degree 3"):
        latency_table(shared_data, "OPT-6.7B").layer_time(tensor=3, batch=1)
