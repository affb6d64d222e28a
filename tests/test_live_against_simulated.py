"""What the comparison of live with simulated counts: courses, spreads, and the page."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest

from benchmarks.live_against_simulated_report import FIGURES, is_within, render
from benchmarks.live_against_simulated_scene import (
    CommittedPlan,
    Course,
    Scene,
    course_of,
    difference,
    draw_requests,
    draw_single_requests,
)
from spotserve.sim.simulation import simulate
from spotserve.solvers.planner import make_plan
from tests.sim.scenes import Entries, event, four_instances, small_scenario

COURSE = Course(
    states=("provisioning", "serving"), plans=(CommittedPlan(layout=((1, 1),), trigger="start", mode="live"),)
)


def test_a_course_is_in_the_journals_order() -> None:
    """Tests that states are told without repetition and a committed plan with its target's layout."""
    entries = Entries()
    scenario = small_scenario(four_instances(event(15, "notice", "i0", grace_s=15), end_s=40))
    simulate(scenario, "live", make_plan, journal=entries)
    course = course_of(entries.kept)
    assert ("provisioning", "serving") == course.states[:2]
    assert all(before != after for before, after in pairwise(course.states))
    assert ["start", "notice"] == [plan.trigger for plan in course.plans][:2]
    commits = [plan for plan in entries.kept for one in plan.commands if one.kind == "commit_run"]
    assert len(commits) == len(course.plans)
    assert difference(course, course) is None


@pytest.mark.parametrize(
    ("other", "says"),
    [
        (replace(COURSE, states=("provisioning", "degraded")), "SERVICE state 2: live serving, simulated degraded"),
        (replace(COURSE, states=COURSE.states[:1]), "SERVICE state 2: live serving, simulated nothing"),
        (replace(COURSE, plans=()), "committed plan 1: live start: (1, 1), live, simulated nothing"),
        (
            replace(COURSE, plans=(replace(COURSE.plans[0], mode="in_place"),)),
            "committed plan 1: live start: (1, 1), live, simulated start: (1, 1), in_place",
        ),
        (
            replace(COURSE, plans=(replace(COURSE.plans[0], layout=((2, 1),)),)),
            "committed plan 1: live start: (1, 1), live, simulated start: (2, 1), live",
        ),
    ],
)
def test_courses_that_differ_are_told_apart(other: Course, says: str) -> None:
    """Tests that another state, plan, mode or layout is found and named."""
    assert says == difference(COURSE, other)


@pytest.mark.parametrize(("simulated", "within"), [(0.86, True), (0.84, False), (2.29, True), (2.31, False)])
def test_the_spread_is_widened_on_both_sides(simulated: float, within: bool) -> None:
    """Tests that a figure may lie 15 % outside the least and the greatest live one, and no further."""
    assert within == is_within(simulated, [1.0, 2.0, 1.5])


def test_requests_are_under_way_when_the_trace_acts() -> None:
    """Tests that long answers are asked for before notice and join, and single requests never meet."""
    scene = Scene()
    arrivals = draw_requests(scene, 0)
    assert arrivals == draw_requests(scene, 0) != draw_requests(scene, 1)
    for at_s in (scene.notice_s, scene.join_s):
        before = [one for one in arrivals if at_s - 1 < one.at_s < at_s and one.max_tokens == scene.long_tokens]
        assert 4 == len(before)
    single = [one.at_s for one in draw_single_requests(scene, 0)]
    assert min(after - before for before, after in pairwise(single)) > 2


def test_the_page_tells_a_miss_from_a_hit() -> None:
    """Tests that the page says which figure is outside the spread and which run took another course."""
    figures = {name: 1.0 for name, _ in FIGURES}
    course = {"states": ["serving"], "plans": ["start: (1, 1), live"]}
    live: dict[str, Any] = {"course": course, "differs": None, "load_average_before": 0.5, **figures}
    results = {
        "circumstances": {
            "command": "python -m x",
            "commit": "0" * 40,
            "uncommitted_files": 0,
            "cores": 2,
            "processor": "cpu",
            "load_average_before": [0.1, 0, 0],
            "load_average_after": [0.2, 0, 0],
        },
        "model": {"num_layers": 8, "hidden_size": 512},
        "requests": 37,
        "paces": [
            {
                "pace_s": 0.03,
                "measured": {"rpc_s": {"seconds": 0.005, "samples": 7, "how": "round trips"}},
                "simulated": {"course": course, **figures, "ttft_p99_s": 0.5},
                "live": [live, {**live, "differs": "SERVICE state 2: live x, simulated y"}],
            }
        ],
    }
    page = render(results)
    assert "equal in 1 of 2 runs" in page
    assert "- run 1 differs: SERVICE state 2: live x, simulated y" in page
    assert 1 == page.count("**no**")
    assert "| TTFT, P99 | 500.0 ms | 1000.0 ms | 1000.0 ms to 1000.0 ms | 0.50 | **no** |" in page
    assert "| `rpc_s` | 5.00 ms | 7 | round trips |" in page
