"""Small models, specs and random worlds that the planner's and the checker's tests share."""

from __future__ import annotations

import random

from spotserve.core.cost import replica_shards
from spotserve.core.ids import GpuId, InstanceId, ReplicaId, RequestId
from spotserve.core.plan import Plan, PlanningProblem, Trigger
from spotserve.core.slices import column_chunks, head_chunks, layer_split
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
from spotserve.core.spec import (
    Axis,
    LatencyPoint,
    Limits,
    ModelSpec,
    Parameter,
    Profile,
    Segment,
    ServingSpec,
)

KIB = 1024
MIB = 1024 * KIB


def tiny_model(*, num_layers: int = 8, q_heads: int = 8, kv_heads: int = 4, max_model_len: int = 512) -> ModelSpec:
    """A llama-shaped parameter table: hidden 64, head 16, MLP 256, vocabulary 512."""
    hidden, head, mlp, vocabulary = 64, 16, 256, 512

    def column(name: str, axis: str, unit: int, rows: int) -> Parameter:
        segments = (Segment(offset=0, axis=axis, unit=unit),)
        return Parameter(name=name, shape=(rows, hidden), kind="col", dim=0, segments=segments, stage="layer")

    def row(name: str, axis: str, unit: int, columns: int) -> Parameter:
        segments = (Segment(offset=0, axis=axis, unit=unit),)
        return Parameter(name=name, shape=(hidden, columns), kind="row", dim=1, segments=segments, stage="layer")

    layer = "model.layers.{layer}."
    return ModelSpec(
        name="tiny",
        digest="sha256:" + "0" * 64,
        architecture="LlamaForCausalLM",
        dtype="float32",
        num_layers=num_layers,
        hidden_size=hidden,
        num_q_heads=q_heads,
        num_kv_heads=kv_heads,
        head_dim=head,
        vocab_size=vocabulary,
        max_model_len=max_model_len,
        axes=(
            Axis(name="q_heads", size=q_heads, chunks=head_chunks(q_heads)),
            Axis(name="kv_heads", size=kv_heads, cover_of="q_heads", group=q_heads // kv_heads),
            Axis(name="mlp", size=mlp, chunks=column_chunks(mlp)),
        ),
        parameters=(
            Parameter(name="model.embed_tokens.weight", shape=(vocabulary, hidden), kind="replicated", stage="first"),
            Parameter(name=layer + "input_layernorm.weight", shape=(hidden,), kind="replicated", stage="layer"),
            column(layer + "self_attn.q_proj.weight", "q_heads", head, q_heads * head),
            column(layer + "self_attn.k_proj.weight", "kv_heads", head, kv_heads * head),
            column(layer + "self_attn.v_proj.weight", "kv_heads", head, kv_heads * head),
            row(layer + "self_attn.o_proj.weight", "q_heads", head, q_heads * head),
            column(layer + "mlp.up_proj.weight", "mlp", 1, mlp),
            row(layer + "mlp.down_proj.weight", "mlp", 1, mlp),
            Parameter(name="model.norm.weight", shape=(hidden,), kind="replicated", stage="last"),
            Parameter(name="lm_head.weight", shape=(vocabulary, hidden), kind="replicated", stage="last"),
        ),
    )


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
    name: str, gpus: list[str], *, pipeline: int, tensor: int, num_layers: int, kv_blocks: int, generation: int = 1
) -> Replica:
    """A replica on `gpus`, stage by stage."""
    return Replica(
        id=ReplicaId(name),
        generation=generation,
        max_running=4,
        kv_blocks=kv_blocks,
        stages=tuple(
            Stage(
                layers=layers, gpus=tuple(GpuId(gpu) for gpu in gpus[stage * tensor : (stage + 1) * tensor])
            )
            for stage, layers in enumerate(layer_split(num_layers, pipeline))
        ),
    )


def holdings(model: ModelSpec, replicas: list[Replica]) -> tuple[Holding, ...]:
    """Each rank holds the shard of its position."""
    return tuple(
        Holding(gpu=gpu, shards=(shard,))
        for one in replicas
        for gpu, shard in zip(
            one.gpus, replica_shards(model, pipeline=one.pipeline, tensor=one.tensor), strict=True
        )
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
        solvers={"configure": draw.choice(["cpsat", "enumerate"])} if seed % 7 else {},
    )
    shape = draw.choice([(1, 1, 1), (1, 2, 1), (2, 2, 1), (2, 1, 2), (1, 2, 2), (3, 1, 1), (1, 1, 3), (1, 2, 3)])
    kind = draw.choice(["notice", "notice", "lost", "joined", "load", "start"])
    problem = running_problem(
        spec,
        shape=shape,
        memory_bytes=draw.choice([1, 2, 3, 5, 8, 12]) * MIB,
        trigger=Trigger(kind="load"),
        spare=draw.randrange(3),
        requests_each=draw.randrange(5),
        gpus_per_instance=draw.choice([1, 1, 2]),
        kv_blocks=draw.choice([16, 24, 40]),
    )
    return _troubled(problem, kind, draw)


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
