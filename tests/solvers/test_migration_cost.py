"""The choice among candidates by what their migration costs, against what they gain until the next event."""

from __future__ import annotations

import pytest

from spotserve.core.check import check_plan
from spotserve.core.cost import Worth
from spotserve.core.plan import Estimates, Plan, PlanningProblem, RequestAction
from spotserve.solvers.migration_cost import HYSTERESIS, QUIET_S, MigrationCost, migration_cost
from spotserve.solvers.planner import make_plan
from tests.planning_worlds import MIB, lost, running_problem, tiny_spec


def half_lost(*, link_bytes_per_s: float, load_rps: float = 0.2) -> PlanningProblem:
    """Two replicas of two stages lose one GPU; on a single stage each, requests would be 1.4 times as fast."""
    spec = tiny_spec(link_bytes_per_s=link_bytes_per_s)
    profile = spec.profile.model_copy(update={"stage_overhead_ms": 2.0})
    problem = running_problem(
        spec.model_copy(update={"profile": profile}),
        shape=(2, 2, 1),
        memory_bytes=8 * MIB,
        trigger=lost("i2"),
        requests_each=4,
    )
    snapshot = problem.snapshot.model_copy(update={"load_rps": load_rps})
    return problem.model_copy(update={"snapshot": snapshot})


def chosen(plan: Plan) -> tuple[object, object, object]:
    """P, the candidates passed over, and how many replicas go on as they are."""
    certificate = plan.solver["configure"].certificate or {}
    before = {replica.id for replica in plan.snapshot.world.replicas}
    kept = sum(replica.id in before for replica in plan.target.replicas)
    return certificate["pipeline"], certificate.get("passed_over"), kept


def test_a_faster_shape_is_left_where_getting_there_costs_more() -> None:
    """Tests that on a fast link both replicas change shape, and on a slow one the living replica stays as it is."""
    fast, slow = (make_plan(half_lost(link_bytes_per_s=rate)) for rate in (1e9, 1e4))
    assert (1, None, 0) == chosen(fast)
    assert (1, None, 1) == chosen(slow), "a faster one comes up beside it"
    assert (0.0, "live") == (slow.estimates.stall_s, slow.mode)
    assert () == check_plan(fast) == check_plan(slow)


def test_the_expected_quiet_time_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests that the same slow migration is worth it where the next event is far off."""
    monkeypatch.setattr("spotserve.solvers.migration_cost.QUIET_S", 1000 * QUIET_S)
    assert (1, None, 0) == chosen(make_plan(half_lost(link_bytes_per_s=1e4)))


def test_cost_is_counted_in_request_seconds() -> None:
    """Tests serving and outage by hand: under a known load, an unknown one, and with a request that is recomputed."""
    problem = half_lost(link_bytes_per_s=1e9, load_rps=2.0)
    plan = make_plan(problem).model_copy(update={"estimates": Estimates(stall_s=3.0), "requests": (), "steps": ()})
    row = Worth(throughput_rps=1e-5, latency_ms=500.0, serves_load=True)
    known = migration_cost(plan, row, best=row)
    assert known.serving == pytest.approx(2.0 * 0.5 * QUIET_S)
    assert known.outage == pytest.approx((8 + 2.0 * 3.0 / 2) * 3.0)
    unknown = plan.model_copy(update={"snapshot": plan.snapshot.model_copy(update={"load_rps": 0.0})})
    slower = migration_cost(unknown, Worth(5e-6, 0.001, serves_load=True), best=row)
    assert slower.serving == pytest.approx(8 * 2 * QUIET_S)
    assert slower.outage == pytest.approx(8 * 3.0)
    again = tuple(
        RequestAction(request=one.request, action="recompute", to_replica=plan.target.replicas[0].id)
        for one in plan.snapshot.requests[:2]
    )
    two = migration_cost(plan.model_copy(update={"requests": again}), row, best=row).outage - known.outage
    one = migration_cost(plan.model_copy(update={"requests": again[:1]}), row, best=row).outage - known.outage
    assert two > 2 * one > 0
    all_lost = [replica.id for replica in plan.snapshot.world.replicas]
    alone = migration_cost(plan.model_copy(update={"requests": again}), row, best=row, lost=all_lost)
    assert alone.outage == pytest.approx(2.0 * 3.0 / 2 * 3.0)


def test_only_a_clear_gain_beats_the_first() -> None:
    """Tests that a candidate within the hysteresis does not take the first one's place."""
    first = MigrationCost(serving=100.0, outage=10.0)
    assert not MigrationCost(serving=110.0 * (1 - HYSTERESIS), outage=0.0).beats(first)
    assert MigrationCost(serving=110.0 * (1 - HYSTERESIS) - 0.1, outage=0.0).beats(first)
    assert [True, False] == [first.may_be_beaten, MigrationCost(100.0, 5.0).may_be_beaten]
