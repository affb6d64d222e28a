"""Steps become commands to workers; what becomes of them when their plan ends while they wait."""

from __future__ import annotations

import asyncio

import pytest
import structlog
import structlog.testing

from spotserve.core import commands as cmd
from spotserve.core import events as ev
from spotserve.core import wire
from spotserve.core.ids import GpuId, InstanceId
from spotserve.core.plan import CopyWeights, Reserve
from spotserve.runtime import step_executor
from spotserve.runtime.step_executor import StepExecutor
from spotserve.solvers.planner import make_plan
from tests.planning_worlds import MIB, notice, running_problem, tiny_spec


class SlowWorkers:
    """Answers no command before it is told to; remembers what kinds it was sent."""

    def __init__(self) -> None:
        self.kinds: list[str] = []
        self.asked = asyncio.Event()
        self.may_answer = asyncio.Event()

    async def command(self, worker: GpuId, command: wire.Command) -> wire.Reply:
        """The reply, once it may come."""
        self.kinds.append(command.kind)  # type: ignore[attr-defined]
        self.asked.set()
        await self.may_answer.wait()
        return wire.Reply(command=command.command, ok=True)

    def connected(self) -> dict[GpuId, wire.Register]:
        """Nobody needs an address here."""
        return {}


def test_step_of_an_aborted_plan_fails_quietly() -> None:
    """Tests that a copy whose plan is aborted while it waits for its grant sends nothing more and ends no daemon."""

    async def play() -> tuple[ev.Event, list[str]]:
        workers = SlowWorkers()
        executor = StepExecutor(workers, term=1, clock=lambda: 0.0, contents=lambda admissions: ())
        problem = running_problem(tiny_spec(), shape=(1, 2, 2), memory_bytes=24 * MIB, trigger=notice("i0"), spare=1)
        plan = make_plan(problem)
        step = next(step for step in plan.steps if isinstance(step, CopyWeights) and step.source != step.destination)
        executor.begin(plan)
        execution = asyncio.create_task(executor.execute("7.0", cmd.ExecuteStep(epoch=plan.epoch.to, step=step)))
        await workers.asked.wait()
        executor.finish(plan.epoch.to)
        workers.may_answer.set()
        return await execution, workers.kinds

    event, kinds = asyncio.run(play())
    assert isinstance(event, ev.StepFailed)
    assert ["grant"] == kinds


def test_a_step_that_is_not_answered_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests that the log says which worker a step waits for, and that the step still ends well when it answers."""
    monkeypatch.setattr(step_executor, "OVERDUE_S", 0.01)

    async def play(log: list[structlog.typing.EventDict]) -> ev.Event:
        workers = SlowWorkers()
        executor = StepExecutor(workers, term=1, clock=lambda: 0.0, contents=lambda admissions: ())
        problem = running_problem(tiny_spec(), shape=(1, 2, 2), memory_bytes=24 * MIB, trigger=notice("i0"), spare=1)
        plan = make_plan(problem)
        step = next(step for step in plan.steps if isinstance(step, Reserve))
        executor.begin(plan)
        execution = asyncio.create_task(executor.execute("7.0", cmd.ExecuteStep(epoch=plan.epoch.to, step=step)))
        while len(log) < 2:
            await asyncio.sleep(0.01)
        workers.may_answer.set()
        done = await execution
        assert {("step_overdue", step.workers[0])} == {(line["event"], line["worker"]) for line in log}
        return done

    with structlog.testing.capture_logs() as log:
        assert isinstance(asyncio.run(play(log)), ev.StepDone)


class CopyingWorkers(SlowWorkers):
    """Copies at once; its first byte came 1.5 s before the reply."""

    async def command(self, worker: GpuId, command: wire.Command) -> wire.Reply:
        """The reply of a copy."""
        return wire.Reply(command=command.command, ok=True, result={"bytes": 10, "first_byte_age_s": 1.5})

    def connected(self) -> dict[GpuId, wire.Register]:
        """Everybody."""
        return dict.fromkeys((GpuId(f"i{index}/0") for index in range(8)), register())


def register() -> wire.Register:
    """A worker of which only the address matters."""
    return wire.Register(
        worker=GpuId("i0/0"),
        instance=InstanceId("i0"),
        num_gpus=1,
        incarnation="a",
        pid=1,
        process_group=1,
        started_at=0.0,
        version="0",
        memory_bytes=1,
        device="cpu",
        mesh_address="127.0.0.1:1",
        transfer_address="127.0.0.1:2",
    )


def test_first_byte_is_told_by_the_coordinators_clock() -> None:
    """Tests that the age of a copy's first byte becomes a time of the journal, with the bytes beside it."""
    executor = StepExecutor(CopyingWorkers(), term=1, clock=lambda: 9.0, contents=lambda admissions: ())
    problem = running_problem(tiny_spec(), shape=(1, 2, 2), memory_bytes=24 * MIB, trigger=notice("i0"), spare=1)
    plan = make_plan(problem)
    step = next(step for step in plan.steps if isinstance(step, CopyWeights) and step.source != step.destination)
    executor.begin(plan)
    event = asyncio.run(executor.execute("7.0", cmd.ExecuteStep(epoch=plan.epoch.to, step=step)))
    assert isinstance(event, ev.StepDone)
    assert (10, {"first_byte_at_s": 7.5}) == (event.bytes, event.result)
