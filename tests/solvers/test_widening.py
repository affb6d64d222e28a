"""Replicas of other shapes beside those that run, stops that have to pay, and a disk that GPUs share."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from spotserve.core.check import check_plan
from spotserve.core.cost import Workload, worth_of
from spotserve.core.ids import instance_of
from spotserve.core.plan import LoadWeights, Plan, PlanningProblem, Trigger
from spotserve.core.spec import DeviceProfile
from spotserve.solvers.configure import tabulate
from spotserve.solvers.facts import gather
from spotserve.solvers.planner import make_plan
from spotserve.solvers.widening import mixes
from tests.planning_worlds import MIB, notice, running_problem, tiny_spec

JOINED = Trigger(kind="joined")


def under_load(problem: PlanningProblem, load_rps: float) -> PlanningProblem:
    """The problem with a known arrival rate."""
    snapshot = problem.snapshot.model_copy(update={"load_rps": load_rps})
    return problem.model_copy(update={"snapshot": snapshot})


def crowded(**limits: int | None) -> PlanningProblem:
    """One replica of three stages, and two idle GPUs: no second one of its shape, and no room for others beside it."""
    spec = tiny_spec(min_kv_tokens=2048, max_running=16, **limits)
    return running_problem(spec, shape=(1, 3, 1), memory_bytes=4 * MIB, trigger=JOINED, spare=2, kv_blocks=128)


def shapes(plan: Plan) -> list[tuple[int, int]]:
    """(P, M) of the target's replicas."""
    return sorted((one.pipeline, one.tensor) for one in plan.target.replicas)


def test_idle_gpus_serve_in_another_shape() -> None:
    """Tests that under a load that one replica cannot serve idle GPUs hold one of another shape, disturbing nobody."""
    problem = under_load(crowded(), 12.0)
    plan = make_plan(problem)
    assert len(shapes(plan)) == 2
    assert len(set(shapes(plan))) == 2
    assert set(problem.snapshot.world.replicas) < set(plan.target.replicas)
    assert ("live", "widening", 0.0) == (plan.mode, plan.solver["configure"].name, plan.estimates.stall_s)
    assert () == check_plan(plan)


@pytest.mark.parametrize("problem", [crowded(), under_load(crowded(pipeline=3, tensor=1), 12.0)], ids=["load", "pins"])
def test_no_mix_without_a_reason(problem: PlanningProblem) -> None:
    """Tests that under an unknown load, or where a person chose the degrees, all replicas have one shape."""
    assert len(set(shapes(make_plan(problem)))) == 1


def test_mixes_are_sorted_and_serve() -> None:
    """Tests that the fastest mix comes first, as fast as the cost model says, and what cannot serve comes last."""
    problem = crowded()
    replicas = problem.snapshot.world.replicas
    intact = gather(problem).pools_of(replicas)
    spec, memory = problem.spec, [4 * MIB] * 5
    found = {}
    for load_rps in (1.0, 12.0, 1e6):
        workload = Workload(40, 200, load_rps)
        rows = tabulate(spec, memory=memory, workload=workload, intact=replicas)
        found[load_rps] = list(mixes(spec, rows, workload, intact=intact, num_idle=2))
        ranks = [(not mix.worth.serves_load, mix.worth.latency_ms) for mix in found[load_rps]]
        assert ranks == sorted(ranks)
    alone = next(mix for mix in found[1.0] if mix.count == 0)
    assert alone.worth == worth_of(spec, intact, Workload(40, 200, 1.0))
    assert all(mix.count * mix.shape[0] * mix.shape[1] <= 2 for mix in found[1.0])
    assert not any(mix.worth.serves_load for mix in found[1e6])
    assert any(mix.worth.serves_load for mix in found[12.0])
    assert not all(mix.worth.serves_load for mix in found[12.0])


def joined_to_a_slow_shape(*, link_bytes_per_s: float) -> PlanningProblem:
    """A replica of four stages that would be faster on one, but does not fit beside itself."""
    spec = tiny_spec(min_kv_tokens=4096, link_bytes_per_s=link_bytes_per_s, storage_bytes_per_s=link_bytes_per_s)
    profile = spec.profile.model_copy(update={"stage_overhead_ms": 5.0})
    spec = spec.model_copy(update={"profile": profile})
    problem = running_problem(spec, shape=(1, 4, 1), memory_bytes=4 * MIB, trigger=JOINED, kv_blocks=256)
    return under_load(problem, 0.5)


def with_another_type(problem: PlanningProblem) -> PlanningProblem:
    """The same cluster, the last GPU of which is of a type that is called otherwise and exactly as fast."""
    spec, world = problem.spec, problem.snapshot.world
    other = DeviceProfile(type="other", latencies=spec.profile.latencies)
    spec = spec.model_copy(update={"profile": spec.profile.model_copy(update={"devices": (other,)})})
    *others, last = world.instances
    last = last.model_copy(update={"gpus": tuple(gpu.model_copy(update={"type": "other"}) for gpu in last.gpus)})
    world = world.model_copy(update={"instances": (*others, last)})
    snapshot = problem.snapshot.model_copy(update={"world": world})
    return problem.model_copy(update={"spec": spec, "snapshot": snapshot})


@pytest.mark.parametrize("changed", [lambda problem: problem, with_another_type], ids=["one-type", "two-types"])
def test_a_stop_that_nothing_forces_has_to_pay(changed: Callable[[PlanningProblem], PlanningProblem]) -> None:
    """Tests that a faster shape that needs a stop is taken where the stop is short, and left where it is long."""
    fast, slow = (make_plan(changed(joined_to_a_slow_shape(link_bytes_per_s=rate))) for rate in (1e9, 1e4))
    assert fast.mode == "in_place"
    assert shapes(fast) != [(4, 1)]
    assert ([(4, 1)], ()) == (shapes(slow), slow.steps)


def test_gpus_of_an_instance_share_its_disk() -> None:
    """Tests that an estimate has the GPUs of an instance load one after the other, in the stop and before it."""
    for policy, mode in (("reparallelize", "in_place"), ("reroute", "live")):
        problem = running_problem(
            tiny_spec(policy=policy),
            shape=(2, 2, 1),
            memory_bytes=8 * MIB,
            trigger=notice("i0"),
            spare=1,
            gpus_per_instance=2,
        )
        plan = make_plan(problem)
        loads: dict[str, int] = {}
        for step in plan.steps:
            if isinstance(step, LoadWeights):
                instance = instance_of(step.workers[0])
                loads[instance] = loads.get(instance, 0) + step.bytes
        disk_s = max(loads.values()) / problem.spec.profile.storage_bytes_per_s
        longest_s = max(step.estimated_s for step in plan.steps if isinstance(step, LoadWeights))
        assert plan.mode == mode
        assert longest_s < disk_s
        assert (plan.estimates.stall_s if mode == "in_place" else plan.estimates.copy_s) >= disk_s - 1e-6
