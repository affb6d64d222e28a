"""Algorithm 1 over a table of configurations."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from spotserve.cli.main import run_verb
from spotserve.core.cost import Workload
from spotserve.solvers.configure import configure, tabulate
from spotserve.solvers.paper.candidates import algorithm_1
from tests.specs import small_spec


@dataclass(frozen=True, slots=True)
class Row:
    """A configuration as the table judges it."""

    pipeline: int
    tensor: int
    gpus: int
    latency_us: int
    throughput_urps: int
    unserved: int = 0


WIDE = Row(1, 4, 8, 1000, 200)
WIDE_ONCE = Row(1, 4, 4, 1010, 100)
DEEP = Row(2, 4, 8, 980, 150)


def chosen(*rows: Row, load_known: bool = True, as_published: bool = False) -> Row:
    """What Algorithm 1 takes of some rows."""
    names = ("pipeline", "tensor", "gpus", "latency_us", "throughput_urps", "unserved")
    columns = {name: np.array([getattr(row, name) for row in rows], dtype=np.int64) for name in names}
    columns["execution_us"] = columns["latency_us"]
    answer = algorithm_1(columns, load_known=load_known, as_published=as_published).answer
    assert answer is not None
    return rows[answer]


def test_the_artifact_takes_the_least_latency_of_all_gpus() -> None:
    """Tests that only the most replicas of each shape count, and that the least latency wins."""
    assert chosen(WIDE_ONCE, WIDE, DEEP) == DEEP
    assert chosen(replace(WIDE_ONCE, latency_us=900), WIDE) == WIDE


def test_the_text_takes_the_cheapest_of_the_similar() -> None:
    """Tests that 3 % more latency for half of the GPUs is taken as published, and 6 % is not."""
    assert chosen(WIDE_ONCE, WIDE, DEEP, as_published=True) == WIDE_ONCE
    assert chosen(replace(WIDE_ONCE, latency_us=1040), WIDE, DEEP, as_published=True) == DEEP


def test_throughput_decides_where_nothing_serves_the_load() -> None:
    """Tests that overload and an unknown load both take the most throughput."""
    short = replace(WIDE, unserved=1), replace(DEEP, unserved=1)
    assert chosen(*short) == short[0]
    assert chosen(DEEP, WIDE, load_known=False) == WIDE


def test_the_first_of_equals_wins() -> None:
    """Tests that ties fall in the order of the table."""
    twin = replace(DEEP, pipeline=4, tensor=2)
    assert chosen(DEEP, twin) == DEEP
    assert chosen(twin, DEEP) == twin


@pytest.mark.parametrize("as_published", [False, True])
def test_the_planner_s_table_is_judged_as_a_loop_would(as_published: bool) -> None:
    """Tests the columns of a real table against the same rule written as a loop over its rows."""
    workload = Workload(prompt_tokens=64, output_tokens=32, load_rps=2.0)
    table = tabulate(small_spec(), memory=[64 * 2**20] * 8, workload=workload, intact=())
    rows = list(table)
    if not as_published:
        rows = [row for row in rows if row.gpus + row.pipeline * row.tensor > 8]
    fastest = min(row.latency_us for row in rows if not row.unserved)
    similar = [row for row in rows if not row.unserved and row.latency_us * 1000 <= fastest * 1050]
    if as_published:
        expected = min(similar, key=lambda row: (row.gpus, row.latency_us))
    else:
        expected = min(rows, key=lambda row: row.execution_us)
    answer = algorithm_1(table.columns, load_known=True, as_published=as_published).answer
    assert answer is not None
    assert table[answer] == expected


def test_the_paper_looks_at_pins_and_at_nothing_else() -> None:
    """Tests `configure` under `paper`: no hysteresis, no second replica, but what a person pinned."""
    spec = small_spec()
    workload = Workload(prompt_tokens=64, output_tokens=32, load_rps=2.0)
    table = tabulate(spec, memory=[64 * 2**20] * 5, workload=workload, intact=())
    free = configure(spec, table, load_rps=2.0, solver="paper")
    cautious = configure(spec, table, load_rps=2.0, solver="enumerate")
    pinned = configure(small_spec(pipeline=2, tensor=2), table, load_rps=2.0, solver="paper")
    assert free.candidate is not None
    assert cautious.candidate is not None
    assert pinned.candidate is not None
    answer = algorithm_1(table.columns, load_known=True).answer
    assert answer is not None
    assert free.candidate == table[answer]
    assert (free.candidate.data, cautious.candidate.data > 1) == (1, True)
    assert (pinned.candidate.shape, pinned.candidate.gpus) == ((2, 2), 4)
    assert free.report.certificate is not None
    assert free.report.certificate["kind"] == "algorithm_1"


@pytest.mark.parametrize("solver", ["paper", "paper-as-published"])
def test_a_person_may_ask_for_it(solver: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Tests that `--solver configure=paper` plans a case and that the plan says who configured it."""
    case = Path(__file__).resolve().parents[3] / "plans" / "notice"
    assert run_verb(["plan", str(case), "--solver", f"configure={solver}", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)["solver"]["configure"]
    assert (report["name"], report["status"], report["certificate"]["kind"]) == (solver, "optimal", "algorithm_1")
