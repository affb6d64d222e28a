"""Small models, specs and random worlds that the planner's and the checker's tests share."""

from __future__ import annotations

import random

from spotserve.core.cost import replica_shards
from spotserve.core.ids import GpuId, InstanceId, ReplicaId, RequestId
from spotserve.core.plan import Plan, PlanningProblem, Trigger
from spotserve.core.slices import Shard, kv_block_bytes, layer_split, shard_bytes, shard_slices
from spotserve.core.snapshot import (
    ChoiceProgress,
    Gpu,
    Holding,
    InstanceState,
    InstanceView,
    Replica,
    RequestProgress,
    Snapshot,
    Stage,
    World,
)
from spotserve.core.spec import LatencyPoint, Limits, ModelSpec, Profile, ServingSpec
from tests.specs import small_model

KIB = 1024
MIB = 1024 * KIB


def tiny_model(*, num_layers: int = 8, q_heads: int = 8, kv_heads: int = 4, max_model_len: int = 512) -> ModelSpec:
    """A llama-shaped parameter table: hidden 64, MLP 256, vocabulary 512."""
    model = small_model(num_layers=num_layers, hidden=64, q_heads=q_heads, kv_heads=kv_heads, mlp=256, vocab=512)
    return model.model_copy(update={"max_model_len": max_model_len})


def tiny_spec(
    *,
    model: ModelSpec | None = None,
    policy: str = "live",
    link_bytes_per_s: float = 100e6,
    storage_bytes_per_s: float = 200e6,
    solvers: dict[str, str] | None = None,
    **limits: int | None,
) -> ServingSpec:
    """A spec with a CPU-like profile; keyword arguments beyond the named ones are limits."""
    chosen: dict[str, int | None] = {"max_model_len": 256, "max_running": 4, **limits}
    return ServingSpec(
        model=model or tiny_model(),
        profile=Profile(
            name="test",
            source="made up",
            device="cpu",
            latencies=(
                LatencyPoint(tokens=1, tensor=1, layer_ms=0.4),
                LatencyPoint(tokens=16, tensor=1, layer_ms=0.8),
                LatencyPoint(tokens=256, tensor=1, layer_ms=8.0),
            ),
            link_bytes_per_s=link_bytes_per_s,
            storage_bytes_per_s=storage_bytes_per_s,
        ),
        limits=Limits.model_validate(chosen),
        policy=policy,
        solvers=solvers or {},
    )


def instance(
    number: int, *, memory_bytes: int, gpus: int = 1, state: InstanceState = "ready", remaining_s: float | None = None
) -> InstanceView:
    """Instance `i<number>`."""
    name = InstanceId(f"i{number}")
    return InstanceView(
        id=name,
        state=state,
        gpus=tuple(Gpu(id=GpuId(f"{name}/{index}"), memory_bytes=memory_bytes) for index in range(gpus)),
        remaining_s=remaining_s,
    )


def replica(
    name: str,
    gpus: list[str],
    *,
    pipeline: int,
    tensor: int,
    num_layers: int,
    kv_blocks: int,
    generation: int = 1,
    max_running: int = 4,
) -> Replica:
    """A replica on `gpus`, stage by stage."""
    return Replica(
        id=ReplicaId(name),
        generation=generation,
        max_running=max_running,
        kv_blocks=kv_blocks,
        stages=tuple(
            Stage(layers=layers, gpus=tuple(GpuId(gpu) for gpu in gpus[stage * tensor : (stage + 1) * tensor]))
            for stage, layers in enumerate(layer_split(num_layers, pipeline))
        ),
    )


def holdings(model: ModelSpec, replicas: list[Replica]) -> tuple[Holding, ...]:
    """Each rank holds the shard of its position."""
    return tuple(
        Holding(gpu=gpu, shards=(shard,))
        for one in replicas
        for gpu, shard in zip(one.gpus, replica_shards(model, pipeline=one.pipeline, tensor=one.tensor), strict=True)
    )


def request(number: int, where: Replica, *, tokens: int, prompt: int = 40, max_tokens: int = 200) -> RequestProgress:
    """A decoding request with KV for its prompt and all but its newest token."""
    return RequestProgress(
        request=RequestId(f"{number:032x}"),
        replica=where.id,
        state="decoding",
        prompt_tokens=prompt,
        max_tokens=max_tokens,
        choices=(ChoiceProgress(choice=0, kv_generation=0, tokens=tokens, kv_tokens=prompt + max(0, tokens - 1)),),
    )


def running_problem(
    spec: ServingSpec,
    *,
    shape: tuple[int, int, int],
    memory_bytes: int,
    trigger: Trigger,
    spare: int = 0,
    requests_each: int = 2,
    gpus_per_instance: int = 1,
    epoch: int = 3,
    kv_blocks: int = 40,
) -> PlanningProblem:
    """A cluster that runs (D, P, M) on the first GPUs, with `spare` blank instances behind them."""
    data, pipeline, tensor = shape
    needed = -(-data * pipeline * tensor // gpus_per_instance)
    instances = [
        instance(number, memory_bytes=memory_bytes, gpus=gpus_per_instance) for number in range(needed + spare)
    ]
    gpus = [gpu.id for one in instances for gpu in one.gpus]
    size = pipeline * tensor
    replicas = [
        replica(
            f"r{epoch}.{number + 1}",
            list(gpus[number * size : (number + 1) * size]),
            pipeline=pipeline,
            tensor=tensor,
            num_layers=spec.model.num_layers,
            kv_blocks=kv_blocks,
            generation=epoch,
            max_running=spec.limits.max_running,
        )
        for number in range(data)
    ]
    requests = [
        request(100 * number + index, one, tokens=5 + 7 * index + 3 * number)
        for number, one in enumerate(replicas)
        for index in range(requests_each)
    ]
    world = World(
        epoch=epoch,
        instances=tuple(instances),
        replicas=tuple(replicas),
        holdings=holdings(spec.model, replicas),
    )
    return PlanningProblem(
        spec=spec,
        snapshot=Snapshot(world=world, requests=tuple(requests)),
        trigger=trigger,
        epoch_to=epoch + 1,
    )


def notice(*names: str, remaining_s: float = 30.0) -> Trigger:
    """A preemption notice."""
    return Trigger(kind="notice", instances=tuple(InstanceId(name) for name in names), remaining_s=remaining_s)


def lost(*names: str) -> Trigger:
    """A loss without notice."""
    return Trigger(kind="lost", instances=tuple(InstanceId(name) for name in names))


def random_problem(seed: int) -> PlanningProblem:
    """Any cluster, any trouble: what the property tests plan for."""
    draw = random.Random(seed)
    kv_heads = draw.choice([1, 2, 4, 8])
    model = tiny_model(num_layers=draw.choice([2, 4, 6, 8]), kv_heads=kv_heads)
    spec = tiny_spec(
        model=model,
        policy=draw.choice(["live", "live", "live", "live", "reroute", "reparallelize"]),
        link_bytes_per_s=draw.choice([1e6, 20e6, 1e9]),
        migration_headroom_bytes=draw.choice([0, 0, 256 * KIB]),
        max_running=draw.choice([1, 4, 8]),
        min_kv_tokens=draw.choice([0, 32]),
        solvers={
            "configure": draw.choice(["cpsat", "enumerate", "enumerate"]),
            "migrate": draw.choice(["layered", "maxflow", "prefix_lp", "first_holder", "paper"]),
            "place": draw.choice(["makespan", "reuse", "paper", "rank-order"]),
        },
    )
    shape = draw.choice([(1, 1, 1), (1, 2, 1), (2, 2, 1), (2, 1, 2), (1, 2, 2), (3, 1, 1), (1, 1, 3), (1, 2, 3)])
    kind = draw.choice(["notice", "notice", "lost", "joined", "load", "start"])
    problem = running_problem(
        spec,
        shape=shape,
        memory_bytes=MIB,
        trigger=Trigger(kind="load"),
        spare=draw.randrange(3),
        requests_each=draw.randrange(5),
        gpus_per_instance=draw.choice([1, 1, 2]),
        kv_blocks=draw.choice([16, 24, 40]),
    )
    problem = with_memory(problem, max(draw.choice([0, 0, 1, 2, 3, 5, 8]) * MIB, memory_in_use(problem)))
    return _troubled(problem, kind, draw)


def memory_in_use(problem: PlanningProblem) -> int:
    """What the fullest GPU of a running cluster holds: weights and KV pool."""
    spec = problem.spec
    return max(
        shard_bytes(spec.model, shard)
        + one.kv_blocks * kv_block_bytes(spec.model, shard, block_tokens=spec.limits.kv_block_tokens)
        for one in problem.snapshot.world.replicas
        for shard in replica_shards(spec.model, pipeline=one.pipeline, tensor=one.tensor)
    )


def with_memory(problem: PlanningProblem, memory_bytes: int) -> PlanningProblem:
    """The same cluster on GPUs of another size."""
    instances = tuple(
        one.model_copy(
            update={"gpus": tuple(gpu.model_copy(update={"memory_bytes": memory_bytes}) for gpu in one.gpus)}
        )
        for one in problem.snapshot.world.instances
    )
    world = problem.snapshot.world.model_copy(update={"instances": instances})
    return problem.model_copy(update={"snapshot": problem.snapshot.model_copy(update={"world": world})})


def with_left_over(problem: PlanningProblem, gpu: str, shard: Shard) -> PlanningProblem:
    """The same cluster, but that a GPU without a position still holds a shard's slices of an aborted plan."""
    world = problem.snapshot.world
    left_over = Holding(gpu=GpuId(gpu), slices=tuple(shard_slices(problem.spec.model, shard)))
    world = world.model_copy(update={"holdings": (*world.holdings, left_over)})
    return problem.model_copy(update={"snapshot": problem.snapshot.model_copy(update={"world": world})})


def _troubled(problem: PlanningProblem, kind: str, draw: random.Random) -> PlanningProblem:
    names = [one.id for one in problem.snapshot.world.instances]
    hit = draw.sample(names, draw.randrange(1, max(2, len(names))))
    snapshot = problem.snapshot
    if kind == "notice":
        trigger = Trigger(kind="notice", instances=tuple(sorted(hit)), remaining_s=draw.choice([0.0, 0.5, 3.0, 30.0]))
    elif kind == "lost":
        trigger = Trigger(kind="lost", instances=tuple(sorted(hit)))
    elif kind == "start":
        world = snapshot.world.model_copy(update={"replicas": (), "holdings": (), "epoch": 0})
        snapshot = Snapshot(world=world)
        return problem.model_copy(update={"snapshot": snapshot, "trigger": Trigger(kind="start"), "epoch_to": 1})
    elif kind == "joined":
        trigger = Trigger(kind="joined", instances=(names[-1],))
    else:
        snapshot = snapshot.model_copy(update={"load_rps": draw.choice([0.0, 1.0, 20.0])})
        trigger = Trigger(kind="load")
    return problem.model_copy(update={"snapshot": snapshot, "trigger": trigger})


def kinds(plan: Plan) -> list[str]:
    """The kinds of a plan's steps in order."""
    return [step.kind for step in plan.steps]
