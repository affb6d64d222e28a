"""In_place plans on real workers: what the planner says fits does, with the memory budget enforced at every step."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from spotserve.core import commands as cmd
from spotserve.core import events as ev
from spotserve.core.ids import GpuId
from spotserve.core.plan import Commit, CopyKvDelta, Plan, PlanningProblem, Recompute, Release, Reserve, Trigger
from spotserve.core.slices import slices_bytes
from spotserve.core.spec import ModelSpec, ServingSpec
from spotserve.core.wire import ChoicePosition, CopyWeightsCommand, ReserveCommand
from spotserve.runtime.forkserver_client import ForkServer
from spotserve.runtime.step_executor import StepExecutor
from spotserve.solvers.planner import make_plan
from tests.planning_worlds import KIB, notice, running_problem, tiny_spec, with_memory
from tests.runtime.cluster import Cluster, PlacedReplica, running_cluster
from tests.runtime.stage_play import folder, forkserver, model, prompt_of, reference

__all__ = ["folder", "forkserver", "model"]

pytestmark = pytest.mark.e2e

KV_BLOCKS = 24
MAX_TOKENS = 75
BLOCKS_EACH = 8
"""Of 40 tokens of prompt and these: nothing is evicted for want of room."""


def short_problem(model: ModelSpec, old: tuple[int, int], new: tuple[int, int]) -> tuple[PlanningProblem, Plan, int]:
    """The least memory with which requests keep their KV in place: problem, plan, KiB of each GPU."""
    pipeline, tensor = new
    spec = tiny_spec(model=model, max_model_len=128, max_running=2, pipeline=pipeline, tensor=tensor, data=1)
    is_smaller = pipeline * tensor < old[0] * old[1]
    trigger = notice(f"i{old[0] * old[1] - 1}") if is_smaller else Trigger(kind="load")
    problem = running_problem(
        spec, shape=(1, *old), memory_bytes=KIB, trigger=trigger, kv_blocks=KV_BLOCKS, requests_each=2
    )
    for kib in range(200, 4000, 10):
        candidate = with_memory(problem, kib * KIB)
        plan = make_plan(candidate)
        keeps = plan.mode == "in_place" and plan.fallback[0] == "all_kv"
        if keeps and plan.target.replicas[0].kv_blocks >= 2 * BLOCKS_EACH:
            return candidate, plan, kib
    raise AssertionError("no memory makes this change in place with its KV")


async def execute(cluster: Cluster, plan: Plan) -> int:
    """Every step in the plan's order, as the controller would; returns the bytes of KV that crossed a link."""
    positions: tuple[ChoicePosition, ...] = ()
    executor = StepExecutor(
        cluster.switchboard,
        term=cluster.term,
        clock=lambda: 0.0,
        contents=lambda admissions: tuple(cluster.contents(positions)),
    )
    executor.begin(plan)
    kv_bytes = 0
    for step in plan.steps:
        if isinstance(step, Commit | Recompute):
            continue
        manifest = positions if isinstance(step, CopyKvDelta) else ()
        command = cmd.ExecuteStep(epoch=plan.epoch.to, step=step, manifest=manifest)
        event = await executor.execute(f"7.{step.id}", command)
        assert not isinstance(event, ev.StepFailed), f"{step.kind} {step.id}: {event.error}"
        if isinstance(event, ev.Quiesced):
            positions = event.positions
            cluster.cap(None)
        elif isinstance(event, ev.StepDone):
            assert () == event.missing
            kv_bytes += event.bytes if step.kind in ("copy_kv", "copy_kv_delta") else 0
    return kv_bytes


def serving(spec: ServingSpec, plan: Plan) -> PlacedReplica:
    """The plan's new replica as a test's."""
    (target,) = plan.target.replicas
    return PlacedReplica(target.id, target.generation, target.pipeline, target.tensor, target.gpus, spec.model)


@pytest.mark.parametrize(
    ("old", "new"),
    [((2, 1), (1, 2)), ((1, 2), (2, 1)), ((2, 2), (3, 1)), ((2, 1), (1, 1))],
    ids=str,
)
def test_in_place_within_the_budget(
    old: tuple[int, int], new: tuple[int, int], folder: Path, model: ModelSpec, tmp_path: Path, forkserver: ForkServer
) -> None:
    """Tests that with the least memory the planner accepts, KV and weights move layer by layer and tokens are exact."""
    problem, plan, kib = short_problem(model, old, new)
    prompts = {request.request: prompt_of(20 + i, 40) for i, request in enumerate(problem.snapshot.requests)}
    before = problem.snapshot.world.replicas[0]

    async def scenario(cluster: Cluster) -> None:
        await cluster.launch(old[0] * old[1], memory=f"{kib}KiB")
        workers = [gpu.split("/")[0] for gpu in before.gpus]
        source = await cluster.place(
            *old, workers, name=before.id, generation=before.generation, kv_blocks=KV_BLOCKS, max_running=2
        )
        cluster.cap(10)
        for name, prompt in prompts.items():
            await cluster.admit(source, name, prompt, max_tokens=MAX_TOKENS)
        await cluster.until(lambda: all(len(cluster.tokens(name)) > 3 for name in prompts))
        assert await execute(cluster, plan) > 0
        await cluster.finished(*prompts)
        target = serving(problem.spec, plan)
        probe = await cluster.probe(target.leader)
        assert 0 == probe["prefilled_tokens"]
        for name, prompt in prompts.items():
            assert reference(folder, prompt, MAX_TOKENS) == cluster.tokens(name)
            assert {(before.id, before.generation), (target.id, target.generation)} == set(cluster.stream(name).sources)
        for worker, stage, rank in target.positions():
            left = await cluster.probe(worker)
            assert [] == left["slices"]
            assert [(target.id, stage, rank)] == [(r["replica"], r["stage"], r["rank"]) for r in left["roles"]]
        assert [] == cluster.broken

    async def main() -> None:
        async with running_cluster(problem.spec, folder, tmp_path, forkserver) as cluster:
            await scenario(cluster)

    asyncio.run(main())


def test_the_budget_is_enforced_when_weights_come(
    folder: Path, model: ModelSpec, tmp_path: Path, forkserver: ForkServer
) -> None:
    """Tests that a reserve with weights is refused where one without them is not, and so is a layer too many."""
    problem, plan, kib = short_problem(model, (2, 1), (1, 2))
    before = problem.snapshot.world.replicas[0]
    gpu = GpuId("i0/0")
    reserve = next(step for step in plan.steps if isinstance(step, Reserve) and step.workers == (gpu,))
    wanted = [step for step in plan.steps if step.kind == "copy_weights" and step.destination == gpu]

    async def main() -> None:
        async with running_cluster(problem.spec, folder, tmp_path, forkserver) as cluster:
            await cluster.launch(2, memory=f"{kib}KiB")
            await cluster.place(2, 1, ["i0", "i1"], name=before.id, generation=before.generation, kv_blocks=KV_BLOCKS)
            whole = plan.target.replicas[0]
            fields = {
                "term": cluster.term,
                "epoch": plan.epoch.to,
                "replica": reserve.replica,
                "generation": reserve.generation,
                "stage": reserve.stage,
                "rank": reserve.rank,
                "pipeline": whole.pipeline,
                "tensor": whole.tensor,
                "shard": {
                    "layers": whole.stages[0].layers,
                    "tensor": whole.tensor,
                    "rank": reserve.rank,
                    "first": True,
                    "last": True,
                },
                "kv_blocks": whole.kv_blocks,
                "max_running": whole.max_running,
            }
            refused = await cluster.ask(gpu, ReserveCommand.model_validate({**fields, "command": "with"}))
            assert refused.error is not None
            assert refused.error.startswith("over_memory")
            shrink = next(step for step in plan.steps if isinstance(step, Release) and step.workers == (gpu,))
            assert shrink.keep_blocks is not None
            release = StepExecutor(cluster.switchboard, term=cluster.term, clock=lambda: 0.0, contents=lambda _: ())
            release.begin(plan)
            await release.execute("8.0", cmd.ExecuteStep(epoch=plan.epoch.to, step=shrink))
            fields["with_weights"] = False
            taken = await cluster.ask(gpu, ReserveCommand.model_validate({**fields, "command": "without"}))
            assert taken.ok, taken.error
            slices = tuple(piece for step in wanted for piece in step.slices)
            assert slices_bytes(model, slices) > 0
            grant = await cluster.grant(GpuId("i1/0"), plan.epoch.to)
            copy = CopyWeightsCommand(
                term=cluster.term,
                command="copy",
                epoch=plan.epoch.to,
                replica=reserve.replica,
                generation=reserve.generation,
                source=GpuId("i1/0"),
                source_address=cluster.workers[GpuId("i1/0")].transfer_address,
                slices=slices,
                **grant,
            )
            refused = await cluster.ask(gpu, copy)
            assert refused.error is not None
            assert refused.error.startswith("over_memory")

    asyncio.run(main())
