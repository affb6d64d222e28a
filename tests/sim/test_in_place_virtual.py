"""Plans that stop first, in virtual time: KV moves after the commit, and a loss there costs a recompute, no token."""

from __future__ import annotations

import random

import pytest

from spotserve.core import commands as cmd
from spotserve.core import events as ev
from spotserve.core.check import check_plan
from spotserve.core.controller import Controller
from spotserve.core.ids import InstanceId, instance_of
from spotserve.core.plan import Step
from spotserve.core.state import step_gpus
from spotserve.sim.world import check_streams
from tests.sim.test_faults_virtual import check_calm, die_silently, on_step
from tests.sim.test_swarm import draw_scenario, seeds
from tests.sim.test_virtual_world import Stage

KIB = 1024
KINDS = ["reserve", "copy_kv", "copy_kv_delta", "copy_weights", "release", "join_group", "activate"]


def short_stage(*, seed: int = 3, num_instances: int = 3) -> Stage:
    """A pipeline over all GPUs, which do not hold the next one beside it; four streams that outlast the migration."""
    stage = Stage(
        seed=seed,
        num_instances=num_instances,
        gpu_memory_bytes=5800 * KIB if num_instances == 3 else 4800 * KIB,
        limits={"migration_headroom_bytes": 700 * KIB},
    )
    stage.requests(4, max_tokens=200)
    return stage


@pytest.mark.parametrize("num_instances", [3, 4])
def test_notice_moves_kv_in_place(num_instances: int) -> None:
    """Tests that where memory is short a sufficient notice still costs no recomputed token."""
    stage = short_stage(num_instances=num_instances)
    stage.notice(4.0, "i0")
    stage.play(60.0)
    check_streams(stage.world)
    (line,) = stage.controller.state.migrations
    assert ("in_place", "completed", 0) == (line.mode, line.outcome, line.recomputed_tokens)
    assert line.kv_bytes > 0
    assert line.weight_bytes > 0
    plan = stage.world.plans[line.epoch]
    assert () == check_plan(plan)
    assert line.kv_bytes == sum(step.bytes for step in plan.steps if step.kind in ("copy_kv", "copy_kv_delta"))
    assert "serving" == stage.service


def test_delta_after_the_commit_names_what_moved() -> None:
    """Tests that each delta is told of the requests that moved along its route, once their owner has changed."""
    stage = short_stage()
    stage.notice(4.0, "i0")
    stage.play(60.0)
    deltas = [
        command
        for entry in stage.journal.entries
        for command in entry.commands
        if isinstance(command, cmd.ExecuteStep) and command.step.kind == "copy_kv_delta"
    ]
    assert deltas
    assert [["q0", "q1", "q2", "q3"]] * len(deltas) == [sorted(p.request for p in one.manifest) for one in deltas]


def test_failed_delta_is_recomputed() -> None:
    """Tests that KV which a delta could not bring after the commit is left out of the activation and recomputed."""
    stage = short_stage()
    stage.notice(4.0, "i0")
    outcome = stage.world._step_outcome
    failed: list[Step] = []

    def failing(command: cmd.ExecuteStep) -> ev.Event | None:
        if command.step.kind == "copy_kv_delta" and not failed:
            failed.append(command.step)
            return ev.StepFailed(at_s=stage.world.at_s, epoch=command.epoch, step=command.step.id, error="broke off")
        return outcome(command)

    stage.world._step_outcome = failing  # type: ignore[method-assign]
    stage.play(60.0)
    check_streams(stage.world)
    (line,) = stage.controller.state.migrations
    assert ("in_place", "completed") == (line.mode, line.outcome)
    assert line.recomputed_tokens > 0


@pytest.mark.parametrize("told_s", [0.2, *(pytest.param(told_s, marks=pytest.mark.swarm) for told_s in (0.0, 3.0))])
@pytest.mark.parametrize("delay_s", [0.02, pytest.param(0.0, marks=pytest.mark.swarm)])
@pytest.mark.parametrize("end", [0, -1], ids=["first-worker", "last-worker"])
@pytest.mark.parametrize("kind", KINDS)
def test_worker_of_a_step_dies_after_the_commit(kind: str, end: int, delay_s: float, told_s: float) -> None:
    """Tests that either end of any step behind the commit may die before or after it, told at once or late."""
    stage = short_stage()
    stage.notice(4.0, "i0", grace_s=20.0)
    on_step(
        stage,
        kind,
        lambda step: die_silently(stage, instance_of(step_gpus(step)[end]), delay_s=delay_s, told_s=told_s),
    )
    check_calm(stage)


@pytest.mark.parametrize(
    ("victim", "first"),
    [
        pytest.param(victim, first, marks=() if (victim, first) == ("i0", 4) else pytest.mark.swarm)
        for victim in (None, "i0", "i1")
        for first in (4, 6, 8)
    ],
)
def test_restart_at_every_entry_in_place(victim: str | None, first: int) -> None:
    """Tests that the coordinator may die after any entry of an in_place run, with or without an instance."""
    reference = short_stage()
    reference.notice(4.0, "i0", grace_s=5.0)
    reference.play(20.0)
    assert "in_place" == reference.controller.state.migrations[0].mode
    for cut in range(first, len(reference.journal.entries), 6):
        stage = short_stage()
        stage.notice(4.0, "i0", grace_s=5.0)
        stage.world.crash_coordinator_after(cut)
        stage.play(100.0)
        if victim is not None:
            stage.world.crash(InstanceId(victim))
        controller = Controller()
        for entry in stage.journal.entries:
            controller.fold(entry)
        stage.controller = controller
        stage.world.restart_coordinator(controller.state, num_instances=3)
        stage.play(200.0)
        check_streams(stage.world)
        assert "serving" == stage.service, cut


@pytest.mark.parametrize("seed", seeds(2000, 60))
def test_nothing_is_lost_where_memory_is_short(seed: int) -> None:
    """Tests that random faults, half of them with a coordinator death, cost no token where plans are in place."""
    dice = random.Random(-seed)
    stage = Stage(
        seed=seed,
        num_instances=dice.choice([3, 4]),
        shares=(dice.choice([0.0, 0.1]), dice.choice([0.0, 0.0, 0.02])),
        gpu_memory_bytes=dice.choice([4800, 5400, 5800]) * KIB,
        limits={"migration_headroom_bytes": 700 * KIB},
    )
    draw_scenario(stage, seed)
    for at_s in (40.0, 40.2, 40.4, 40.6):
        stage.add(at_s)
    if seed % 2:
        stage.world.crash_coordinator_after(dice.randint(2, 160))
        stage.play(300.0)
        controller = Controller()
        for entry in stage.journal.entries:
            controller.fold(entry)
        stage.controller = controller
        stage.world.restart_coordinator(controller.state, num_instances=3)
    stage.play(600.0)
    check_streams(stage.world)
    assert "serving" == stage.service
    assert {} == stage.controller.state.requests
