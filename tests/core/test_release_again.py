"""A release that fails behind the commit is asked for again, later each time, and not for ever."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from itertools import pairwise

import pytest

from spotserve.core import commands as cmd
from spotserve.core import events as ev
from spotserve.core.controller import Controller
from spotserve.core.ids import GpuId, InstanceId, ReplicaId, StepId, instance_of
from spotserve.core.plan import PlanningProblem, Release
from spotserve.core.plan_run import RELEASE_AGAIN_S
from spotserve.core.slices import stage_shard
from spotserve.core.snapshot import Holding, Replica
from spotserve.core.state import RELEASE_TRIES
from spotserve.solvers.planner import make_plan
from tests.specs import small_spec

MEMORY_BYTES = 12 * 1024 * 1024
Failing = Callable[[Release, int], bool]
"""Whether the n-th try of a release fails."""


class Cluster:
    """Workers that do at once what they are told, but for releases that fail; time passes by timers alone."""

    def __init__(self, failing: Failing) -> None:
        self.controller = Controller()
        self.failing = failing
        self.asked_at_s: dict[StepId, list[float]] = {}
        self.timers: dict[str, float] = {}
        self.finished: list[int] = []
        self.at_s = 0.0
        self._spec = small_spec()
        self._serving: dict[ReplicaId, Replica] = {}
        self._events: deque[ev.Event] = deque()
        self.tell(ev.JournalBegun(at_s=0.0, spec=self._spec, num_instances=3))

    def tell(self, event: ev.Event) -> None:
        """One event, and all that follows from it at once."""
        self._events.append(event)
        while self._events:
            entry = self.controller.step(self._events.popleft())
            for index, command in enumerate(entry.commands):
                self._carry_out(f"{entry.sequence}.{index}", command)

    def pass_timer(self, prefix: str) -> None:
        """Let the time come for which the controller waits."""
        name = min((name for name in self.timers if name.startswith(prefix)), key=lambda one: self.timers[one])
        self.at_s = max(self.at_s, self.timers.pop(name))
        self.tell(ev.TimerFired(at_s=self.at_s, timer=name))

    def notice(self) -> None:
        """The cloud takes an instance that a replica is on, in a minute."""
        victim = instance_of(next(iter(self._serving.values())).gpus[0])
        self.tell(ev.NoticeReceived(at_s=self.at_s, instance=victim, grace_s=60.0))

    def _carry_out(self, name: str, command: cmd.Command) -> None:
        if isinstance(command, cmd.LaunchInstance):
            self._events.append(self._registered(command.instance))
        elif isinstance(command, cmd.SetTimer):
            self.timers[command.timer] = command.at_s
        elif isinstance(command, cmd.TakeSnapshot):
            self._events.append(ev.SnapshotTaken(at_s=self.at_s, command=name, holdings=self._holdings(), positions=()))
        elif isinstance(command, cmd.SolvePlan):
            problem = PlanningProblem(
                spec=self._spec, snapshot=command.snapshot, trigger=command.trigger, epoch_to=command.epoch_to
            )
            self._events.append(ev.PlanReady(at_s=self.at_s, command=name, plan=make_plan(problem)))
        elif isinstance(command, cmd.BeginRun):
            self._serving = {replica.id: replica for replica in command.plan.target.replicas}
        elif isinstance(command, cmd.MakeDurable):
            self._events.append(ev.LedgerDurable(at_s=self.at_s, epoch=command.epoch))
        elif isinstance(command, cmd.ExecuteStep):
            self._events.append(self._answer(command))
        elif isinstance(command, cmd.FinishRun):
            self.finished.append(command.epoch)

    def _registered(self, instance: InstanceId) -> ev.Event:
        return ev.WorkerRegistered(
            at_s=self.at_s,
            instance=instance,
            worker=GpuId(f"{instance}/0"),
            num_gpus=1,
            memory_bytes=MEMORY_BYTES,
            incarnation="1",
        )

    def _holdings(self) -> tuple[Holding, ...]:
        return tuple(
            Holding(gpu=gpu, shards=(stage_shard(self._spec.model, layers=stage.layers, tensor=one.tensor, rank=rank),))
            for one in self._serving.values()
            for stage in one.stages
            for rank, gpu in enumerate(stage.gpus)
        )

    def _answer(self, command: cmd.ExecuteStep) -> ev.Event:
        step, epoch = command.step, command.epoch
        if step.kind == "quiesce":
            entry = self.controller.state.replicas[step.replica]
            return ev.Quiesced(
                at_s=self.at_s,
                epoch=epoch,
                step=step.id,
                replica=step.replica,
                generation=entry.replica.generation,
                positions=(),
            )
        if isinstance(step, Release):
            times = self.asked_at_s.setdefault(step.id, [])
            times.append(self.at_s)
            if self.failing(step, len(times)):
                return ev.StepFailed(at_s=self.at_s, epoch=epoch, step=step.id, error="no")
        return ev.StepDone(at_s=self.at_s, epoch=epoch, step=step.id)


def migrated(failing: Failing) -> Cluster:
    """A cluster that serves, had a notice, and has its new layout but for what fails."""
    cluster = Cluster(failing)
    assert [1] == cluster.finished
    cluster.notice()
    assert cluster.asked_at_s
    return cluster


@pytest.mark.parametrize("failures", range(1, RELEASE_TRIES))
def test_a_failed_release_is_asked_for_again(failures: int) -> None:
    """Tests that a release is tried until it works, each time twice as late, and that the run ends with it."""
    cluster = migrated(lambda step, number: number <= failures)
    while any(name.startswith("release:") for name in cluster.timers):
        assert [1] == cluster.finished
        cluster.pass_timer("release:")
    assert [1, 2] == cluster.finished
    for times in cluster.asked_at_s.values():
        gaps = [after - before for before, after in pairwise(times)]
        assert [RELEASE_AGAIN_S * 2**number for number in range(failures)] == gaps


def test_a_release_is_given_up_in_the_end() -> None:
    """Tests that a worker which never frees anything does not hold up the next plan for ever."""
    cluster = migrated(lambda step, number: True)
    while any(name.startswith("release:") for name in cluster.timers):
        assert [1] == cluster.finished
        cluster.pass_timer("release:")
    assert [1, 2] == cluster.finished
    assert {RELEASE_TRIES} == {len(times) for times in cluster.asked_at_s.values()}


def test_a_restart_asks_for_a_failed_release() -> None:
    """Tests that a coordinator which died between two tries asks again at once."""
    cluster = migrated(lambda step, number: number == 1)
    waiting = {name: len(times) for name, times in cluster.asked_at_s.items()}
    workers = tuple(gpu.id for one in cluster.controller.state.living() for gpu in one.gpus)
    cluster.timers.clear()
    cluster.tell(ev.CoordinatorRestarted(at_s=cluster.at_s, term=2, workers=workers, num_instances=3))
    assert {name: count + 1 for name, count in waiting.items()} == {n: len(t) for n, t in cluster.asked_at_s.items()}
    assert [1, 2] == cluster.finished


def test_a_lost_worker_owes_no_release() -> None:
    """Tests that the run does not wait for a release of a worker that is gone."""
    cluster = migrated(lambda step, number: True)
    (run,) = [cluster.controller.state.run]
    assert run is not None
    owing = [step for step in run.plan.steps if isinstance(step, Release) and run.steps[step.id] == "running"]
    for name in {instance_of(step.workers[0]) for step in owing}:
        cluster.tell(ev.InstanceLost(at_s=cluster.at_s, instance=name, reason="silent"))
    assert 2 in cluster.finished
