"""One scenario lived through by a real daemon and simulated: what happens in which order, and who decided it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.live_against_simulated_live import Measured, live_run
from benchmarks.live_against_simulated_scene import Course, Scene, course_of, difference, draw_requests
from benchmarks.live_against_simulated_virtual import hardware_of, simulated_run
from spotserve.core.spec import ServingSpec
from spotserve.solvers.planner import make_plan
from tests.e2e.models import SMALL, VOCAB_SIZE, write_tiny
from tests.rederivation import strange_decisions

pytestmark = pytest.mark.e2e

PACE_S = 0.03
"""Iterations so long that the answers outlast the migrations on a busy machine too."""
SCENE = Scene(
    notice_s=2.0, grace_s=2.5, join_s=5.5, end_s=7.5, gpu_memory_mib=24, vocab_size=VOCAB_SIZE, long_tokens=120
)
UNHURRIED = {"start_s": Measured(0.5, 1, "of a machine at rest"), "solve_s": Measured(0.05, 1, "of a machine at rest")}
"""The order is what counts here: durations measured on a machine that does other work would stretch the scene."""


def quick(spec: ServingSpec) -> ServingSpec:
    """The spec with layers that take no time to speak of beside the pace, whatever was measured just now."""
    points = tuple(point.model_copy(update={"layer_ms": 0.1}) for point in spec.profile.latencies)
    profile = spec.profile.model_copy(update={"latencies": points, "stage_overhead_ms": 0.0})
    return spec.model_copy(update={"profile": profile})


def unhurried(course: Course) -> Course:
    """The course without `resuming`, which comes only if answers are still open when the plan commits."""
    return replace(course, states=tuple(state for state in course.states if state != "resuming"))


def test_the_same_course(tmp_path: Path, daemon_environment: dict[str, str], seed: int) -> None:
    """Tests that SERVICE states and committed plans come in the order that the simulator has, by the same deciders."""
    folder = write_tiny(tmp_path / "model", **SMALL)
    arrivals = draw_requests(SCENE, seed)
    environment = {**daemon_environment, "SPOTSERVE_ITERATION_S": str(PACE_S)}
    lived = live_run(SCENE, folder, tmp_path / "state", arrivals, environment)
    hardware = hardware_of(SCENE, UNHURRIED, pace_s=PACE_S)
    simulated = simulated_run(SCENE, quick(lived.spec), hardware, arrivals, served_at_s=lived.began_at_s)
    course, foretold = (unhurried(course_of(entries)) for entries in (lived.entries, simulated.entries))
    assert difference(course, foretold) is None
    assert ["start", "notice", "joined"] == [plan.trigger for plan in course.plans]
    assert {"draining", "migrating"} <= set(course.states)
    assert simulated.result.requests.finished == len(arrivals) == len(lived.streams)
    assert [] == strange_decisions(lived.entries, make_plan)
    assert [] == strange_decisions(simulated.entries, make_plan)
