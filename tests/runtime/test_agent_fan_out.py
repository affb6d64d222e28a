"""Real workers pass on what the same plan has brought them, before they serve with any of it, in place too."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from spotserve.core.check import check_plan
from spotserve.core.plan import CopyWeights, Plan, PlanningProblem
from spotserve.core.spec import ModelSpec
from spotserve.runtime.forkserver_client import ForkServer
from spotserve.solvers.migrate import sources
from spotserve.solvers.planner import make_plan
from tests.planning_worlds import KIB, notice, running_problem, tiny_spec, with_memory
from tests.runtime.cluster import Cluster, running_cluster
from tests.runtime.stage_play import folder, forkserver, model, prompt_of, reference
from tests.runtime.test_agent_in_place import BLOCKS_EACH, KV_BLOCKS, MAX_TOKENS, execute, serving

__all__ = ["folder", "forkserver", "model"]

pytestmark = pytest.mark.e2e


def paired_problem(model: ModelSpec) -> tuple[PlanningProblem, Plan, int]:
    """Two stages of two ranks become one stage where the first was, in the least memory: problem, plan, KiB of a GPU.

    Both ranks lack the layers of the other instance, and need the same norms of them.
    """
    spec = tiny_spec(model=model, max_model_len=128, max_running=2, pipeline=1, tensor=2, data=1)
    problem = running_problem(
        spec,
        shape=(1, 2, 2),
        memory_bytes=KIB,
        trigger=notice("i1"),
        kv_blocks=KV_BLOCKS,
        requests_each=2,
        gpus_per_instance=2,
    )
    for kib in range(200, 4000, 10):
        candidate = with_memory(problem, kib * KIB)
        plan = make_plan(candidate)
        keeps = plan.mode == "in_place" and plan.fallback[0] == "all_kv"
        if keeps and plan.target.replicas[0].tensor == 2 and plan.target.replicas[0].kv_blocks >= 2 * BLOCKS_EACH:
            return candidate, plan, kib
    raise AssertionError("no memory makes this change in place with its KV")


def test_a_worker_passes_on_what_it_has_just_got(
    folder: Path, model: ModelSpec, tmp_path: Path, forkserver: ForkServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tests that layers arrive over the network once, go on to the other rank, and give the right tokens."""
    monkeypatch.setattr(sources, "CRUMB_BYTES", 1)
    problem, plan, kib = paired_problem(model)
    assert () == check_plan(plan)
    relays = [step for step in plan.steps if isinstance(step, CopyWeights) and step.reason == "instance_fetches"]
    assert {("i0/0", "i0/1")} == {(step.source, step.destination) for step in relays}
    assert len(relays) > 1
    prompts = {request.request: prompt_of(20 + i, 40) for i, request in enumerate(problem.snapshot.requests)}
    before = problem.snapshot.world.replicas[0]

    async def scenario(cluster: Cluster) -> None:
        await cluster.launch(2, gpus=2, memory=f"{kib}KiB")
        source = await cluster.place(
            2, 2, before.gpus, name=before.id, generation=before.generation, kv_blocks=KV_BLOCKS, max_running=2
        )
        cluster.cap(10)
        for name, prompt in prompts.items():
            await cluster.admit(source, name, prompt, max_tokens=MAX_TOKENS)
        await cluster.until(lambda: all(len(cluster.tokens(name)) > 3 for name in prompts))
        assert await execute(cluster, plan) > 0
        await cluster.finished(*prompts)
        for name, prompt in prompts.items():
            assert reference(folder, prompt, MAX_TOKENS) == cluster.tokens(name)
        target = serving(problem.spec, plan)
        assert 0 == (await cluster.probe(target.leader))["prefilled_tokens"]
        assert [] == cluster.broken

    async def main() -> None:
        async with running_cluster(problem.spec, folder, tmp_path, forkserver) as cluster:
            await scenario(cluster)

    asyncio.run(main())
