"""What a plan costs in money: by hand on small fleets, and absent where a price is."""

from __future__ import annotations

import json

import pytest
from pydantic import ValidationError

from spotserve.core.canonical import canonical_json
from spotserve.core.check import check_plan, verify
from spotserve.core.cost import Pool, balanced, pool_throughput_rps
from spotserve.core.ids import GpuId
from spotserve.core.plan import Plan, PlanningProblem, Trigger
from spotserve.core.snapshot import Gpu
from spotserve.core.spec import DeviceProfile, Profile, ServingSpec
from spotserve.solvers.estimate import workload_of
from spotserve.solvers.planner import make_plan
from tests.planning_worlds import MIB, lost, notice, running_problem, tiny_spec

OTHER = "other"


def priced_spec(price: float | None, *, other: float | None = None, policy: str = "live") -> ServingSpec:
    """The tiny spec with a price of its own GPUs, and of another type that is as fast."""
    spec = tiny_spec(policy=policy)
    device = DeviceProfile(type=OTHER, latencies=spec.profile.latencies, price_per_hour=other)
    profile = spec.profile.model_copy(update={"price_per_hour": price, "devices": (device,)})
    return spec.model_copy(update={"profile": profile})


def priced_problem(
    trigger: Trigger, *, price: float | None = 2.0, shape: tuple[int, int, int] = (1, 2, 1), spare: int = 1
) -> PlanningProblem:
    """A running cluster of one-GPU instances."""
    return running_problem(priced_spec(price), shape=shape, memory_bytes=3 * MIB, trigger=trigger, spare=spare)


def with_type(problem: PlanningProblem, name: str, other: float | None) -> PlanningProblem:
    """The same with one instance of the other type."""
    world = problem.snapshot.world
    instances = tuple(
        one.model_copy(update={"gpus": (Gpu(id=GpuId(f"{name}/0"), memory_bytes=3 * MIB, type=OTHER),)})
        if one.id == name
        else one
        for one in world.instances
    )
    snapshot = problem.snapshot.model_copy(update={"world": world.model_copy(update={"instances": instances})})
    return problem.model_copy(update={"snapshot": snapshot, "spec": priced_spec(2.0, other=other)})


def test_without_a_price_nothing_is_said() -> None:
    """Tests that a plan without prices has no cost, not even an empty one, and reads back as it is."""
    plan = make_plan(priced_problem(notice("i1"), price=None))
    assert plan.cost is None
    assert "cost" not in json.loads(canonical_json(plan))
    assert () == verify(canonical_json(plan).encode())


@pytest.mark.parametrize("price", [None, 2.0])
def test_an_empty_fleet_costs_nothing_if_a_price_is_known(price: float | None) -> None:
    """Tests that a cluster without one GPU costs zero dollars with a price, and has no cost without."""
    problem = priced_problem(notice("i0"), price=price)
    world = problem.snapshot.world.model_copy(update={"instances": (), "replicas": (), "holdings": ()})
    snapshot = problem.snapshot.model_copy(update={"world": world, "requests": ()})
    cost = make_plan(problem.model_copy(update={"snapshot": snapshot, "trigger": Trigger(kind="load")})).cost
    assert (None if price is None else 0.0) == (cost and cost.after_usd_per_h)


@pytest.mark.parametrize("price", [0.0, -1.0, 1e7, 1e308])
def test_an_absurd_price_is_refused(price: float) -> None:
    """Tests that a price that is none, or of which no sum could be held, is refused where it is read."""
    profile = priced_spec(2.0).profile.model_dump()
    for wrong in ({"price_per_hour": price}, {"devices": [{**profile["devices"][0], "price_per_hour": price}]}):
        with pytest.raises(ValidationError, match="price_per_hour"):
            Profile.model_validate({**profile, **wrong})


def test_fleet_before_and_after_by_hand() -> None:
    """Tests that every living GPU is paid for, spares too, and that a stop costs the GPUs that it stops."""
    plan = make_plan(priced_problem(notice("i1"), spare=2))
    assert plan.cost is not None
    assert (4 * 2.0, 3 * 2.0) == (plan.cost.before_usd_per_h, plan.cost.after_usd_per_h)
    assert plan.estimates.stall_s > 0
    assert plan.cost.stall_usd == pytest.approx(2 * 2.0 * plan.estimates.stall_s / 3600, abs=1e-6)
    assert () == verify(canonical_json(plan).encode())


def test_tokens_at_the_most_load_by_hand() -> None:
    """Tests that dollars per million tokens are those of the fleet over what its replicas can put out."""
    problem = priced_problem(notice("i1"), spare=2)
    plan = make_plan(problem)
    workload = workload_of(problem)
    for replicas, usd_per_h, said in (
        (problem.snapshot.world.replicas, 8.0, plan.cost and plan.cost.before_usd_per_million_tokens),
        (plan.target.replicas, 6.0, plan.cost and plan.cost.after_usd_per_million_tokens),
    ):
        requests_per_s = sum(
            pool_throughput_rps(
                problem.spec,
                Pool(balanced(problem.spec.model, pipeline=one.pipeline, tensor=one.tensor), 1, one.max_running),
                workload,
            )
            for one in replicas
        )
        tokens_per_h = requests_per_s * workload.output_tokens * 3600
        assert said == pytest.approx(usd_per_h / tokens_per_h * 1e6, abs=1e-6)


def test_what_went_and_what_came_count_on_their_side() -> None:
    """Tests that a lost instance is paid for before alone, and a joining one after alone."""
    gone = make_plan(priced_problem(lost("i1"))).cost
    assert gone is not None
    assert (6.0, 4.0) == (gone.before_usd_per_h, gone.after_usd_per_h)
    joined = make_plan(priced_problem(Trigger.model_validate({"kind": "joined", "instances": ["i2"]}))).cost
    assert joined is not None
    assert (4.0, 6.0) == (joined.before_usd_per_h, joined.after_usd_per_h)


def test_types_have_their_own_prices() -> None:
    """Tests that each GPU costs what its type does, and that one type without a price leaves no cost at all."""
    problem = priced_problem(notice("i1"))
    cost = make_plan(with_type(problem, "i2", 5.0)).cost
    assert cost is not None
    assert (2.0 + 2.0 + 5.0, 2.0 + 5.0) == (cost.before_usd_per_h, cost.after_usd_per_h)
    assert make_plan(with_type(problem, "i2", None)).cost is None


def test_a_replica_on_gpus_that_came_and_were_noticed_has_a_price() -> None:
    """Tests that what stops is priced where its type is on neither side: joined by this event, noticed since."""
    problem = with_type(priced_problem(Trigger(kind="joined", instances=("i1",)), spare=2), "i1", 5.0)
    world = problem.snapshot.world
    doomed = tuple(
        one.model_copy(update={"state": "doomed", "remaining_s": 30.0}) if one.id == "i1" else one
        for one in world.instances
    )
    snapshot = problem.snapshot.model_copy(update={"world": world.model_copy(update={"instances": doomed})})
    cost = make_plan(problem.model_copy(update={"snapshot": snapshot})).cost
    assert cost is not None
    assert (6.0, 6.0) == (cost.before_usd_per_h, cost.after_usd_per_h)


def test_without_a_target_tokens_have_no_price() -> None:
    """Tests that what is left and cannot serve is still paid for, with no price of a token."""
    plan = make_plan(priced_problem(notice("i0", "i1", "i2")))
    assert not plan.target.replicas
    assert plan.cost is not None
    assert (6.0, 0.0) == (plan.cost.before_usd_per_h, plan.cost.after_usd_per_h)
    assert plan.cost.before_usd_per_million_tokens
    assert plan.cost.after_usd_per_million_tokens is None


@pytest.mark.parametrize("policy", ["live", "paper", "reroute", "reparallelize"])
def test_a_price_changes_no_decision_of_a_fleet_of_one_type(policy: str) -> None:
    """Tests that twice the price doubles every figure of the cost and changes nothing else but the spec."""
    plans: list[Plan] = []
    for price in (2.0, 4.0):
        problem = running_problem(
            priced_spec(price, policy=policy), shape=(2, 2, 1), memory_bytes=3 * MIB, trigger=notice("i1"), spare=1
        )
        plans.append(make_plan(problem))
        assert () == check_plan(plans[-1])
    ones, twos = ((plan.cost.model_dump() if plan.cost else {}) for plan in plans)
    assert ones
    assert {name: pytest.approx(2 * value, abs=3e-6) for name, value in ones.items()} == twos
    blank = {"cost": None, "spec": plans[0].spec, "spec_digest": ""}
    assert plans[0].model_copy(update=blank) == plans[1].model_copy(update=blank)


@pytest.mark.parametrize(
    "cost",
    [
        {"before_usd_per_h": -1.0, "after_usd_per_h": 1.0},
        {"before_usd_per_h": 1.0},
        {"before_usd_per_h": 1.0, "after_usd_per_h": 1.0, "after_eur_per_h": 1.0},
    ],
)
def test_a_malformed_cost_is_corrupt(cost: dict[str, float]) -> None:
    """Tests that a negative, a missing and an unknown figure each refuse the file with the path of the cost."""
    plan = make_plan(priced_problem(notice("i1"))).model_dump(mode="json")
    (finding,) = verify(json.dumps({**plan, "cost": cost}).encode())
    assert finding.code == "corrupt"
    assert finding.path.startswith("cost.")
