"""What the planner sees of a snapshot: who stays, who is doomed, who is not worth looking at."""

from __future__ import annotations

import pytest

from spotserve.core.plan import PlanningProblem
from spotserve.solvers.planner import make_plan
from spotserve.solvers.view import look
from tests.planning_worlds import notice, running_problem, tiny_spec

MIB = 1024 * 1024


def with_idle_doomed(*, remaining_s: float) -> PlanningProblem:
    """One replica on i0 and i1, of which i0 is noticed; i2 waits, i3 is doomed, idle and holds what i0 holds."""
    spec = tiny_spec(data=1, pipeline=2, tensor=1)
    problem = running_problem(
        spec, shape=(1, 2, 1), memory_bytes=8 * MIB, trigger=notice("i0", remaining_s=30.0), spare=2
    )
    world = problem.snapshot.world
    *others, idle = world.instances
    doomed = idle.model_copy(update={"state": "doomed", "remaining_s": remaining_s})
    held = next(one for one in world.holdings if one.gpu == "i0/0").model_copy(update={"gpu": doomed.gpus[0].id})
    world = world.model_copy(update={"instances": (*others, doomed), "holdings": (*world.holdings, held)})
    return problem.model_copy(update={"snapshot": problem.snapshot.model_copy(update={"world": world})})


@pytest.mark.parametrize("remaining_s", [0.0, 20.0])
def test_a_doomed_gpu_without_a_position_is_not_there(remaining_s: float) -> None:
    """Tests that what is idle and doomed sets no deadline and is no source, as it may be gone before it is read."""
    problem = with_idle_doomed(remaining_s=remaining_s)
    view = look(problem)
    assert ({"i0/0": 30.0}, 30.0) == (view.doomed, view.remaining_s)
    assert not view.alive(problem.snapshot.world.instances[-1].gpus[0].id)
    plan = make_plan(problem)
    sources = {step.source for step in plan.steps if step.kind == "copy_weights"}
    assert {"i0/0"} == sources
    assert all(step.latest_s > 20.0 for step in plan.steps if step.kind == "quiesce" and step.latest_s is not None)
