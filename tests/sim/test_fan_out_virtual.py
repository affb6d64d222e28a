"""Weights that one GPU of an instance fetches for the others, in virtual time: any of them may be lost, no token is."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from spotserve.core import commands as cmd
from spotserve.core import events as ev
from spotserve.core.check import check_plan
from spotserve.core.ids import instance_of
from spotserve.core.plan import Step
from spotserve.sim.world import check_streams
from spotserve.solvers.migrate import sources
from tests.sim.test_faults_virtual import check_calm, die_silently
from tests.sim.test_virtual_world import Stage

MIB = 1024 * 1024


@pytest.fixture
def stage(monkeypatch: pytest.MonkeyPatch) -> Stage:
    """Two replicas on the two GPUs of `i0`, which gets a notice; `i1` has two as well."""
    monkeypatch.setattr(sources, "CRUMB_BYTES", 1)
    stage = Stage(num_instances=1, gpu_memory_bytes=64 * MIB, limits={"data": 2, "pipeline": 1, "tensor": 1})
    stage.world.gpus_per_instance = 2
    stage.add(3.0)
    stage.requests(6, from_s=4.0, max_tokens=200)
    stage.notice(6.0, "i0", grace_s=20.0)
    return stage


def is_relay(step: Step) -> bool:
    """Whether a step passes on what the same plan brought."""
    return step.kind == "copy_weights" and step.reason == "instance_fetches"


def test_one_fetches_for_both(stage: Stage) -> None:
    """Tests that the second GPU's copy begins when the first one's is done, and that nothing is computed again."""
    stage.play(60.0)
    check_streams(stage.world)
    (line,) = [one for one in stage.controller.state.migrations if one.trigger == "notice"]
    assert ("completed", 0) == (line.outcome, line.recomputed_tokens)
    plan = stage.world.plans[line.epoch]
    assert () == check_plan(plan)
    (relay,) = (step for step in plan.steps if is_relay(step))
    (bringing,) = (step for step in plan.steps if step.kind == "copy_weights" and not is_relay(step))
    ordered, done = {}, {}
    for entry in stage.journal.entries:
        for command in entry.commands:
            if isinstance(command, cmd.ExecuteStep) and command.epoch == line.epoch:
                ordered[command.step.id] = entry.sequence
        if isinstance(entry.event, ev.StepDone) and entry.event.epoch == line.epoch:
            done[entry.event.step] = entry.sequence
    assert ordered[bringing.id] < done[bringing.id] <= ordered[relay.id] < done[relay.id]


@pytest.mark.parametrize("told_s", [0.0, 3.0])
@pytest.mark.parametrize("delay_s", [0.0, 0.02])
@pytest.mark.parametrize("whose", ["source", "destination"])
@pytest.mark.parametrize("which", [is_relay, lambda step: not is_relay(step)], ids=["relay", "fetch"])
def test_either_end_of_a_copy_dies(
    stage: Stage, which: Callable[[Step], bool], whose: str, delay_s: float, told_s: float
) -> None:
    """Tests that the instance of either end may die before or after a copy over the network or inside, told or not."""

    submit = stage.world.submit
    hit: list[Step] = []

    def watching(command_id: str, command: cmd.Command) -> None:
        submit(command_id, command)
        if (
            isinstance(command, cmd.ExecuteStep)
            and command.step.kind == "copy_weights"
            and which(command.step)
            and not hit
        ):
            hit.append(command.step)
            die_silently(stage, instance_of(getattr(command.step, whose)), delay_s=delay_s, told_s=told_s)

    stage.world.submit = watching  # type: ignore[method-assign]
    check_calm(stage)
    assert hit


@pytest.mark.parametrize("which", [is_relay, lambda step: not is_relay(step)], ids=["relay", "fetch"])
def test_a_copy_that_fails_aborts_the_plan(stage: Stage, which: Callable[[Step], bool]) -> None:
    """Tests that a copy that its worker gives up is what it always was: an abort, another plan, nothing lost."""
    outcome = stage.world._step_outcome
    failed: list[Step] = []

    def failing(command: cmd.ExecuteStep) -> ev.Event | None:
        if command.step.kind == "copy_weights" and which(command.step) and not failed:
            failed.append(command.step)
            return ev.StepFailed(at_s=stage.world.at_s, epoch=command.epoch, step=command.step.id, error="broke off")
        return outcome(command)

    stage.world._step_outcome = failing  # type: ignore[method-assign]
    stage.play(100.0)
    check_streams(stage.world)
    assert ["aborted", "completed"] == [
        one.outcome for one in stage.controller.state.migrations if one.trigger != "joined"
    ]
    assert failed
