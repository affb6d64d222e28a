"""Just-in-time arrangement: the artifact's steps and the paper's."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from spotserve.solvers.paper.arranger import (
    BatchTimes,
    Interruption,
    batch_times,
    jit_steps,
    jit_steps_as_published,
    slot_s,
    switch_cost_s,
)
from spotserve.solvers.paper.latency import BatchPlan
from tests.solvers.paper.golden import golden_rows, latency_table

TIMES = BatchTimes(initial_s=1.0, token_s=0.1, single_initial_s=0.6)


def test_every_row_of_jit_steps(shared_data: Path) -> None:
    """Tests slot, t1, t2 and the tokens granted in every published case (-1 there is the whole batch)."""
    for row in golden_rows(shared_data, "jit_steps.csv"):
        assert row["kind"] in ("preempt", "acquire")
        kind: Interruption = "preempt" if row["kind"] == "preempt" else "acquire"
        plan = BatchPlan(*(int(row[key]) for key in ("P", "M", "B", "M1", "M2")))
        times = batch_times(kind, latency_table(shared_data, row["model"]), plan)
        slot = slot_s(kind, cost_s=float(row["transfer_cost_s"]), elapsed_s=float(row["elapsed_s"]))
        assert slot == pytest.approx(float(row["slot_s"])), row
        assert times.initial_s == pytest.approx(float(row["t1_s"]), abs=5.1e-6, rel=0), row
        assert times.token_s == pytest.approx(float(row["t2_s"]), abs=5.1e-7, rel=0), row
        expected = int(row["steps"])
        assert jit_steps(kind, slot_s=slot, times=times) == (128 if expected == -1 else expected), row


def test_steps_never_grow_with_time_or_cost(rng: random.Random) -> None:
    """Tests that waiting longer or paying more never grants more tokens before a preemption."""
    for _ in range(50):
        cost, elapsed = rng.uniform(0, 15), rng.uniform(0, 25)
        early = jit_steps("preempt", slot_s=slot_s("preempt", cost_s=cost, elapsed_s=elapsed), times=TIMES)
        later = slot_s("preempt", cost_s=cost + rng.uniform(0, 5), elapsed_s=elapsed + rng.uniform(0, 5))
        assert jit_steps("preempt", slot_s=later, times=TIMES) <= early


def test_an_acquisition_grants_no_less(rng: random.Random) -> None:
    """Tests that of equal slots an acquisition decodes at least as long as a preemption."""
    for _ in range(50):
        slot = rng.uniform(-5, 40)
        assert jit_steps("acquire", slot_s=slot, times=TIMES) >= jit_steps("preempt", slot_s=slot, times=TIMES)


def test_a_slot_as_short_as_a_lone_prompt_starts_nothing() -> None:
    """Tests the border: 0 tokens up to the initial phase of a batch of one."""
    assert jit_steps("preempt", slot_s=0.6, times=TIMES) == 0
    assert jit_steps("acquire", slot_s=0.6, times=TIMES) == 0
    assert jit_steps("acquire", slot_s=0.61, times=TIMES) == 0
    assert jit_steps("acquire", slot_s=1.05, times=TIMES) == 1


def test_a_late_notice_costs_what_it_lost() -> None:
    """Tests that a notice with 20 s left counts 10 s of the grace period as spent, and one with 40 s none."""
    assert switch_cost_s(5.0) == 5.5
    assert switch_cost_s(5.0, remaining_s=20.0) == 15.5
    assert switch_cost_s(5.0, remaining_s=40.0) == 5.5


def test_the_published_formulas() -> None:
    """Tests the largest S that ends before the slot, the smallest that outlasts it, and the guard on T_mig."""
    times = BatchTimes(initial_s=1.0, token_s=0.5, single_initial_s=0.5)
    assert jit_steps_as_published("preempt", slot_s=6.0, transfer_s=2.0, times=times) == 9
    assert jit_steps_as_published("acquire", slot_s=6.0, transfer_s=2.0, times=times) == 10
    assert jit_steps_as_published("acquire", slot_s=600.0, transfer_s=2.0, times=times) == 128
    assert jit_steps_as_published("preempt", slot_s=1.5, transfer_s=2.0, times=times) is None
    assert jit_steps_as_published("preempt", slot_s=-1.0, transfer_s=0.5, times=times) == 0
