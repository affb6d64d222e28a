"""Faults that real processes showed, and sweeps of their kind, in virtual time: each case costs milliseconds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest

from spotserve.core import commands as cmd
from spotserve.core import events as ev
from spotserve.core.controller import Controller
from spotserve.core.ids import InstanceId, instance_of
from spotserve.core.plan import Plan, PlanningProblem, Release, Step
from spotserve.core.state import RELEASE_TRIES, step_gpus
from spotserve.errors import InfeasibleError
from spotserve.sim.faults import Faults
from spotserve.sim.world import check_streams
from tests.sim.test_virtual_world import Stage

KINDS = [
    "reserve",
    "load_weights",
    "copy_weights",
    "copy_kv",
    "copy_kv_delta",
    "join_group",
    "quiesce",
    "activate",
    "release",
]


def busy_stage(*, seed: int = 7, num_instances: int = 4) -> Stage:
    """Six streams that outlast a migration."""
    stage = Stage(seed=seed, num_instances=num_instances)
    stage.requests(6, max_tokens=200)
    return stage


def on_step(stage: Stage, kind: str, act: Callable[[Step], None]) -> None:
    """Do something when a migration's first step of a kind is given."""
    submit = stage.world.submit
    done: list[Step] = []

    def watching(command_id: str, command: cmd.Command) -> None:
        submit(command_id, command)
        if isinstance(command, cmd.ExecuteStep) and command.epoch > 1 and command.step.kind == kind and not done:
            done.append(command.step)
            act(command.step)

    stage.world.submit = watching  # type: ignore[method-assign]


def die_silently(stage: Stage, instance: InstanceId, *, delay_s: float, told_s: float) -> None:
    """The instance dies `delay_s` from now, and is told lost `told_s` later."""

    def die() -> ev.Event | None:
        stage.world.crash(instance)
        stage.world.after(told_s, lambda: ev.InstanceLost(at_s=stage.world.at_s, instance=instance, reason="silent"))
        return None

    stage.world.after(delay_s, die)


def check_calm(stage: Stage) -> None:
    """Three more instances bring it back to serving with nothing lost."""
    stage.play(40.0)
    for at_s in (40.0, 40.1, 40.2):
        stage.add(at_s)
    stage.play(200.0)
    check_streams(stage.world)
    assert "serving" == stage.service
    assert {} == stage.controller.state.requests


@pytest.mark.parametrize("told_s", [0.2, *(pytest.param(told_s, marks=pytest.mark.swarm) for told_s in (0.0, 3.0))])
@pytest.mark.parametrize("delay_s", [0.02, pytest.param(0.0, marks=pytest.mark.swarm)])
@pytest.mark.parametrize("end", [0, -1], ids=["first-worker", "last-worker"])
@pytest.mark.parametrize("kind", KINDS)
def test_worker_of_a_step_dies(kind: str, end: int, delay_s: float, told_s: float) -> None:
    """Tests that the source or destination of any step may die before or after it, told at once or late."""
    stage = busy_stage()
    stage.notice(4.0, "i0", grace_s=20.0)

    def act(step: Step) -> None:
        gpus = step_gpus(step)
        instance = instance_of(gpus[end]) if gpus else InstanceId("i0")
        die_silently(stage, instance, delay_s=delay_s, told_s=told_s)

    on_step(stage, kind, act)
    check_calm(stage)


def test_a_loss_is_answered_during_a_retry_pause() -> None:
    """Tests that the pause after failed plans holds up the same problem only: a loss is planned for at once."""
    stage = busy_stage()
    stage.play(5.0)
    solve, stage.world.planner = stage.world.planner, refuse
    stage.notice(6.0, "i0", grace_s=60.0)
    stage.play(12.0)
    assert stage.controller.state.num_retries > 2
    stage.world.planner = solve
    stage.kill(12.0, "i1")
    stage.play(12.5)
    lost = next(entry for entry in stage.journal.entries if entry.event.kind == "instance_lost")
    assert "take_snapshot" in [command.kind for command in lost.commands]
    check_calm(stage)


def refuse(problem: PlanningProblem) -> Plan:
    """A planner that finds nothing."""
    raise InfeasibleError("nothing today")


def restart(stage: Stage, *, num_instances: int = 4) -> None:
    """The coordinator comes back from the fold of its journal."""
    controller = Controller()
    for entry in stage.journal.entries:
        controller.fold(entry)
    stage.controller = controller
    stage.world.restart_coordinator(controller.state, num_instances=num_instances)


@pytest.mark.parametrize("survivors", [0, 1, 2])
def test_workers_die_with_their_coordinator(survivors: int) -> None:
    """Tests that a restart brings the living instances up to their number, however many died meanwhile."""
    stage = busy_stage()
    stage.play(4.0)
    for name in sorted(stage.world.alive)[survivors:]:
        stage.world.crash(name)
    restart(stage)
    stage.play(100.0)
    check_streams(stage.world)
    assert "serving" == stage.service
    assert 4 == len(stage.controller.state.living())


@pytest.mark.parametrize("stopped_at_s", [4.0, 4.05, 4.2])
def test_restart_after_a_stop_with_open_requests(stopped_at_s: float) -> None:
    """Tests that what is open at the end of the drain, or of a coordinator killed while it drains, goes on."""
    stage = busy_stage()
    stage.world.at(4.0, lambda at_s: ev.StopRequested(at_s=at_s, drain_s=0.1))
    stage.play(stopped_at_s)
    for name in sorted(stage.world.alive):
        stage.world.crash(name)
    restart(stage)
    stage.play(100.0)
    check_streams(stage.world)
    assert "serving" == stage.service


@pytest.mark.parametrize(
    ("victim", "first"),
    [
        pytest.param(victim, first, marks=() if (victim, first) == ("i1", 4) else pytest.mark.swarm)
        for victim in ("i0", "i1", "i2", "i3")
        for first in (4, 6, 8)
    ],
)
def test_restart_at_every_entry_with_a_death(victim: str, first: int) -> None:
    """Tests that an instance may die while the coordinator is away, whatever entry that one died after."""
    reference = busy_stage()
    reference.notice(4.0, "i0", grace_s=5.0)
    reference.play(20.0)
    for cut in range(first, len(reference.journal.entries), 6):
        stage = busy_stage()
        stage.notice(4.0, "i0", grace_s=5.0)
        stage.world.crash_coordinator_after(cut)
        stage.play(100.0)
        stage.world.crash(InstanceId(victim))
        restart(stage)
        stage.play(200.0)
        check_streams(stage.world)
        assert "serving" == stage.service, cut


class StubbornWorkers(Faults):
    """Releases fail so many times each, or for ever."""

    def __init__(self, times: int) -> None:
        self.times = times
        self.tried: Counter[tuple[str, tuple[str, ...]]] = Counter()

    def step_error(self, step: Step) -> str | None:
        """Why a worker does not free what it is told to."""
        if not isinstance(step, Release):
            return None
        self.tried[step.replica, step.workers] += 1
        return "not now" if self.tried[step.replica, step.workers] <= self.times else None


@pytest.mark.parametrize("times", [1, RELEASE_TRIES - 1])
def test_a_failed_release_is_asked_for_again(times: int) -> None:
    """Tests that a worker which could not free a position is asked until it did, and has nothing left of it."""
    stage = busy_stage()
    stage.world.faults = StubbornWorkers(times)
    stage.notice(4.0, "i0", grace_s=60.0)
    stage.play(30.0)
    serving = {(replica.id, replica.generation) for replica in stage.controller.state.serving()}
    held = {owner for gpu in stage.world.gpus.values() for owner in gpu.positions}
    assert ("completed", serving) == (stage.controller.state.migrations[-1].outcome, held)
    check_calm(stage)


def test_what_is_never_released_goes_with_the_next_plan() -> None:
    """Tests that a release which is given up leaves a position, and that the next plan's snapshot frees it."""
    stage = busy_stage()
    stage.world.faults = StubbornWorkers(RELEASE_TRIES)
    stage.notice(4.0, "i0", grace_s=20.0)
    stage.play(40.0)
    assert "completed" == stage.controller.state.migrations[-1].outcome
    serving = {(replica.id, replica.generation) for replica in stage.controller.state.serving()}
    held = {owner for gpu in stage.world.gpus.values() for owner in gpu.positions}
    assert serving < held
    check_calm(stage)
    serving = {(replica.id, replica.generation) for replica in stage.controller.state.serving()}
    assert serving == {owner for gpu in stage.world.gpus.values() for owner in gpu.positions}


@pytest.mark.parametrize("drain_s", [0.0, 0.3, 60.0])
def test_a_stop_goes_on_at_the_next_start(drain_s: float) -> None:
    """Tests that a stop ends within its drain, offers meanwhile come back later, and what was open ends after it."""
    stage = busy_stage()
    stage.world.after(4.0, lambda: stage.world.stop(drain_s))
    stage.world.request(4.1, name="late", max_tokens=10)
    stage.play(100.0)
    assert ("stopped", True) == (stage.service, stage.world.stopped)
    assert stage.world.at_s <= 4.0 + drain_s + 0.01
    assert (drain_s < 10) == bool(stage.controller.state.requests)
    assert "late" not in stage.world.requests
    stage.world.send_home()
    stage.world.pass_without_coordinator(1.0)
    restart(stage)
    stage.play(200.0)
    check_streams(stage.world)
    assert ("serving", 7) == (stage.service, stage.controller.state.counters.finished)
