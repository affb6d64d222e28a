"""The random clusters that the planner is measured on, and the oracle that it is measured against."""

from __future__ import annotations

import itertools

import pytest

from benchmarks.planner import speed
from benchmarks.planner.oracle import joint_s, placement_s
from benchmarks.planner.worlds import (
    BLANK_SHARE,
    DYING_SHARE,
    KINDS,
    LEAST_USED,
    Case,
    Kind,
    draw_case,
    gpus_per_instance,
    real_model,
)
from spotserve.core.check import check_plan
from spotserve.core.ids import GpuId, instance_of
from spotserve.core.plan import Plan
from spotserve.core.slices import kv_token_bytes
from spotserve.solvers.planner import make_plan

CASES = [(kind, size, seed) for kind in KINDS for size in (16, 32, 64) for seed in range(4)]


@pytest.mark.parametrize(("kind", "size", "seed"), CASES)
def test_cluster_is_as_described(kind: Kind, size: int, seed: int) -> None:
    """Tests that shapes use the GPUs, groups sit inside instances, a fifth is hit, every third case has blank ones."""
    case = draw_case(kind, size, seed)
    world, per_instance = case.problem.snapshot.world, gpus_per_instance(size)
    num_old = size // per_instance
    num_blank = round(BLANK_SHARE * num_old) if seed % 3 == 0 else 0
    assert num_old + num_blank == len(world.instances)
    assert max(1, round(DYING_SHARE * num_old)) == len(case.problem.trigger.instances)
    data, pipeline, tensor = case.old
    assert size >= data * pipeline * tensor >= LEAST_USED * size
    assert {(pipeline, tensor)} == {(one.pipeline, one.tensor) for one in world.replicas}
    seats = [gpu for one in world.replicas for gpu in one.gpus]
    assert data * pipeline * tensor == len(seats) == len(set(seats))
    for one in world.replicas:
        assert all(len({instance_of(gpu) for gpu in stage.gpus}) == 1 for stage in one.stages)
    limits = case.problem.spec.limits
    assert case.new == (limits.data, limits.pipeline, limits.tensor)


def test_same_seed_same_problem() -> None:
    """Tests that a draw depends on its arguments alone, and on each of them."""
    drawn = {draw_case(kind, size, seed).problem.model_dump_json() for kind, size, seed in CASES}
    assert len(CASES) == len(drawn)
    assert drawn == {draw_case(kind, size, seed).problem.model_dump_json() for kind, size, seed in CASES}


def test_near_lets_only_data_change() -> None:
    """Tests that (P, M) stays wherever one replica of it still fits, and that this is most of the time."""
    cases = [draw_case("near", 64, seed) for seed in range(20)]
    stayed = [case for case in cases if case.old[1:] == case.new[1:]]
    assert len(stayed) > len(cases) // 2
    for case in cases:
        staying = len(case.problem.snapshot.world.instances) - len(case.problem.trigger.instances)
        if case not in stayed:
            assert staying * gpus_per_instance(64) < case.old[1] * case.old[2]


def test_kv_is_a_share_of_the_weights() -> None:
    """Tests that a replica's KV is three tenths of its weights in the median."""
    shares = sorted(share for seed in range(30) for share in kv_shares(draw_case("random", 32, seed)))
    assert 0.24 < shares[len(shares) // 2] < 0.36
    assert shares[0] < 0.15 < 0.6 < shares[-1]


def kv_shares(case: Case) -> list[float]:
    """KV bytes of each replica over 102 GB."""
    model = case.problem.spec.model
    token = kv_token_bytes(model, layers=(0, model.num_layers), heads=(0, model.num_kv_heads))
    return [
        token * sum(r.choices[0].kv_tokens for r in case.problem.snapshot.requests if r.replica == one.id) / 103.1e9
        for one in case.problem.snapshot.world.replicas
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_plans_are_live_and_checked(kind: Kind) -> None:
    """Tests that drawn problems reach the pinned configuration live, without a finding, also of a real model."""
    for case in [draw_case(kind, 16, 1), draw_case(kind, 32, 0), draw_case(kind, 16, 2, model=real_model())]:
        plan = make_plan(case.problem)
        assert () == check_plan(plan)
        assert ("live", case.new[0]) == (plan.mode, len(plan.target.replicas))
        assert {case.new[1:]} == {(one.pipeline, one.tensor) for one in plan.target.replicas}


def test_stages_add_up() -> None:
    """Tests that the timed functions are there and that none counts another's time again."""
    row = speed.timed(draw_case("random", 16, 1))
    assert set(speed.STAGE_NAMES) == set(row["stages_s"])
    assert row["stages_s"]["place"] > 0
    assert row["stages_s"]["rest"] >= 0


def test_oracle_finds_the_best_of_all_placements() -> None:
    """Tests that the joint model's makespan is the least over every way to put groups into instances."""
    compared = 0
    for seed in range(40):
        case = draw_case("random", 16, seed)
        if case.new[0] * case.new[1] <= 4 and case.new[2] > 1:
            plan = make_plan(case.problem)
            joint = joint_s(plan, time_limit_s=20.0)
            assert joint.proven
            assert (
                pytest.approx(min(placement_s(other) for other in all_placements(plan)), rel=1e-5) == joint.makespan_s
            )
            compared += 1
    assert compared >= 3


def all_placements(plan: Plan) -> list[Plan]:
    """The plan with the tensor groups of its new replicas in every choice of slots, one per set of instances."""
    before = {one.id for one in plan.snapshot.world.replicas}
    kept = {gpu for one in plan.target.replicas if one.id in before for gpu in one.gpus}
    fresh = [one for one in plan.target.replicas if one.id not in before]
    tensor, groups = fresh[0].tensor, sum(one.pipeline for one in fresh)
    slots: list[tuple[GpuId, ...]] = []
    for instance in plan.snapshot.world.instances:
        if instance.id not in plan.trigger.instances:
            free = [gpu.id for gpu in instance.gpus if gpu.id not in kept]
            slots += [tuple(free[at : at + tensor]) for at in range(0, len(free) - tensor + 1, tensor)]
    seen: dict[tuple[str, ...], Plan] = {}
    for chosen in itertools.permutations(slots, groups):
        key = tuple(instance_of(group[0]) for group in chosen)
        if key not in seen:
            left = iter(chosen)
            moved = tuple(
                one.model_copy(
                    update={"stages": tuple(stage.model_copy(update={"gpus": next(left)}) for stage in one.stages)}
                )
                for one in fresh
            )
            target = (*(one for one in plan.target.replicas if one.id in before), *moved)
            seen[key] = plan.model_copy(update={"target": plan.target.model_copy(update={"replicas": target})})
    return list(seen.values())
