"""An instance that nothing runs on any more hurries no plan, although its grace period is not over."""

from __future__ import annotations

from dataclasses import replace

from spotserve.core.events import PlanReady
from spotserve.sim.scenario import Scenario
from spotserve.sim.simulation import simulate
from spotserve.solvers.planner import make_plan
from tests.sim.scenes import MIB, Entries, event, four_instances, small_scenario

GRACE_S = 30.0
SECOND_AT_S = 20.0 + GRACE_S - 1.0
"""A second before the first noticed instance is taken."""


def scenario() -> Scenario:
    """One replica of two instances; each is noticed, the second when the first is idle and about to go.

    Links are so slow that a move takes longer than the first has left.
    """
    notices = (event(20.0, "notice", "i0", grace_s=GRACE_S), event(SECOND_AT_S, "notice", "i1", grace_s=GRACE_S))
    made = small_scenario(four_instances(*notices, end_s=120.0), rate_rps=1.0)
    spec = made.spec
    limits = spec.limits.model_copy(update={"data": 1, "pipeline": 2, "tensor": 1})
    profile = spec.profile.model_copy(update={"link_bytes_per_s": 1.0 * MIB})
    return replace(made, spec=spec.model_copy(update={"limits": limits, "profile": profile}))


def test_an_idle_instance_hurries_nobody() -> None:
    """Tests that a plan has the grace period of what it moves off, and that nothing is recomputed."""
    journal = Entries()
    result = simulate(scenario(), "live", make_plan, journal=journal)
    plans = [entry.event.plan for entry in journal.kept if isinstance(entry.event, PlanReady)]
    named = [(plan.trigger.instances, plan.trigger.remaining_s) for plan in plans if plan.trigger.kind == "notice"]
    assert [("i0",), ("i1",)] == [instances for instances, _ in named]
    assert all(left_s is not None and left_s > GRACE_S - 2.0 for _, left_s in named)
    moves = [(one.trigger, one.outcome, one.recomputed_tokens) for one in result.migrations]
    assert [("notice", "completed", 0)] * 2 == moves
    slowest = max(plan.estimates.done_s for plan in plans)
    assert slowest > 1.0, "nothing that the first deadline could have cut short"
    assert result.requests.accepted == result.requests.finished
