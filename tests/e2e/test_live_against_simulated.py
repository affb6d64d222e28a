"""One scenario lived through by a real daemon and simulated: what happens in which order, and who decided it."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.live_against_simulated_live import live_run, of_the_world
from benchmarks.live_against_simulated_scene import Scene, course_of, difference, draw_requests
from benchmarks.live_against_simulated_virtual import hardware_of, simulated_run
from spotserve.solvers.planner import make_plan
from tests.e2e.models import SMALL, VOCAB_SIZE, write_tiny
from tests.rederivation import strange_decisions

pytestmark = pytest.mark.e2e

PACE_S = 0.03
"""Iterations so long that the answers outlast the migrations on a busy machine too."""
SCENE = Scene(
    notice_s=2.0, grace_s=2.5, join_s=5.5, end_s=7.5, gpu_memory_mib=24, vocab_size=VOCAB_SIZE, long_tokens=120
)


def test_the_same_course(tmp_path: Path, daemon_environment: dict[str, str], seed: int) -> None:
    """Tests that SERVICE states and committed plans come in the order that the simulator has, by the same deciders."""
    folder = write_tiny(tmp_path / "model", **SMALL)
    arrivals = draw_requests(SCENE, seed)
    environment = {**daemon_environment, "SPOTSERVE_ITERATION_S": str(PACE_S)}
    lived = live_run(SCENE, folder, tmp_path / "state", arrivals, environment)
    hardware = hardware_of(SCENE, of_the_world(lived), pace_s=PACE_S)
    simulated = simulated_run(SCENE, lived.spec, hardware, arrivals, served_at_s=lived.began_at_s)
    course = course_of(lived.entries)
    assert difference(course, course_of(simulated.entries)) is None
    assert ["start", "notice", "joined"] == [plan.trigger for plan in course.plans]
    assert {"draining", "migrating", "resuming"} <= set(course.states)
    assert simulated.result.requests.finished == len(arrivals) == len(lived.streams)
    assert [] == strange_decisions(lived.entries, make_plan)
    assert [] == strange_decisions(simulated.entries, make_plan)
