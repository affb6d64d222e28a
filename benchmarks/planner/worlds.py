"""Seeded random planning problems, as large as asked for.

One draw is a cluster that runs (D, P, M) in tensor groups scattered over its instances, of which a fifth gets a notice;
the limits pin the (D, P, M) that it has to go to. `random` draws the two independently of each other, which is harsher
than a controller that prefers near configurations; `near` lets only D change.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from spotserve.cli.plan_file import spec_of
from spotserve.core.cost import replica_shards
from spotserve.core.ids import GpuId, InstanceId, ReplicaId, RequestId
from spotserve.core.plan import PlanningProblem, Trigger
from spotserve.core.slices import head_chunks, kv_token_bytes, layer_split, shard_bytes, stage_shard
from spotserve.core.snapshot import (
    ChoiceProgress,
    Gpu,
    Holding,
    InstanceView,
    Replica,
    RequestProgress,
    Snapshot,
    Stage,
    World,
)
from spotserve.core.spec import (
    KV_BLOCK_TOKENS,
    Axis,
    LatencyPoint,
    Limits,
    ModelSpec,
    Parameter,
    Profile,
    Segment,
    ServingSpec,
)

Kind = Literal["random", "near"]
KINDS: tuple[Kind, ...] = ("random", "near")

TENSOR_DEGREES = (1, 2, 4, 8)
PIPELINE_DEGREES = (1, 2, 3, 4, 6, 8, 12, 16)
MAX_DATA = 64
LEAST_USED = 0.8
"""Share of the GPUs that a configuration has to use."""

DYING_SHARE = 0.2
BLANK_SHARE = 0.1
"""Share of new instances in every third case."""

KV_SHARE = 0.3
KV_SPREAD = 0.6
"""KV of a replica: its weights' bytes times the share times a log-normal value of median 1."""

REQUESTS_PER_REPLICA = 8
LINK_BYTES_PER_S = 6.25e9
GRACE_S = 120.0
GPU_MEMORY_BYTES = 2**40
"""So much that old and new always fit side by side: it is transfers that are measured."""

MAX_LENGTH = 16384
EPOCH = 3
Shape = tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class Case:
    """One drawn problem and how it came about."""

    kind: Kind
    num_gpus: int
    seed: int
    old: Shape
    new: Shape
    problem: PlanningProblem


def gpus_per_instance(num_gpus: int) -> int:
    """4 in small clusters, else 8."""
    return 4 if num_gpus < 64 else 8


def compact_model(num_layers: int = 64) -> ModelSpec:
    """1.6 GB a layer in two rows of the parameter table: the plan's size is then that of the planning."""
    hidden, heads, mlp = 8192, 64, 40960
    chunk = mlp // 8
    return ModelSpec(
        name="compact-100GB",
        digest="sha256:0",
        architecture="none",
        dtype="bfloat16",
        num_layers=num_layers,
        hidden_size=hidden,
        num_q_heads=heads,
        num_kv_heads=heads,
        head_dim=hidden // heads,
        vocab_size=1,
        max_model_len=65536,
        axes=(
            Axis(name="q_heads", size=heads, chunks=head_chunks(heads)),
            Axis(name="kv_heads", size=heads, cover_of="q_heads"),
            Axis(name="mlp", size=mlp, chunks=tuple((start, start + chunk) for start in range(0, mlp, chunk))),
        ),
        parameters=(
            _column("model.layers.{layer}.attention.weight", (hidden, 2 * hidden), "q_heads", hidden // heads),
            _column("model.layers.{layer}.mlp.weight", (mlp, 2 * hidden), "mlp", 1),
        ),
    )


def _column(name: str, shape: tuple[int, int], axis: str, unit: int) -> Parameter:
    segment = Segment(offset=0, axis=axis, unit=unit)
    return Parameter(name=name, shape=shape, kind="col", segments=(segment,), stage="layer")


def real_model() -> ModelSpec:
    """The parameter table of OPT-6.7B: 16 rows a layer, replicated biases and norms among them."""
    return spec_of(Path(__file__).parents[2] / "plans" / "opt-6.7b-t4" / "spec.toml", what="model").model


def draw_case(
    kind: Kind, num_gpus: int, seed: int, *, model: ModelSpec | None = None, gpu_memory_bytes: int = GPU_MEMORY_BYTES
) -> Case:
    """The problem of a seed; the same for the same arguments."""
    chosen = model or compact_model()
    rng = np.random.default_rng([num_gpus, seed, KINDS.index(kind)])
    per_instance = gpus_per_instance(num_gpus)
    num_instances = num_gpus // per_instance
    old = _draw_shape(rng, num_gpus, per_instance, chosen.num_layers)
    num_dying = max(1, round(DYING_SHARE * num_instances))
    dying = sorted(int(one) for one in rng.permutation(num_instances)[:num_dying])
    num_blank = round(BLANK_SHARE * num_instances) if seed % 3 == 0 else 0
    left = (num_instances - num_dying + num_blank) * per_instance
    new = _draw_shape(rng, left, per_instance, chosen.num_layers)
    if kind == "near" and left >= old[1] * old[2]:
        new = (min(MAX_DATA, left // (old[1] * old[2])), old[1], old[2])
    replicas = _scattered(rng, old, per_instance, chosen)
    world = World(
        epoch=EPOCH,
        instances=tuple(
            _instance(number, per_instance, gpu_memory_bytes) for number in range(num_instances + num_blank)
        ),
        replicas=replicas,
        holdings=_holdings(chosen, replicas),
    )
    requests = tuple(request for number, one in enumerate(replicas) for request in _requests(rng, chosen, number, one))
    trigger = Trigger(kind="notice", instances=tuple(InstanceId(f"i{number}") for number in dying), remaining_s=GRACE_S)
    spec = ServingSpec(
        model=chosen,
        profile=_profile(),
        limits=Limits(
            data=new[0],
            pipeline=new[1],
            tensor=new[2],
            max_running=REQUESTS_PER_REPLICA,
            max_model_len=min(MAX_LENGTH, chosen.max_model_len),
        ),
    )
    problem = PlanningProblem(
        spec=spec, snapshot=Snapshot(world=world, requests=requests), trigger=trigger, epoch_to=EPOCH + 1
    )
    return Case(kind, num_gpus, seed, old, new, problem)


def _draw_shape(rng: np.random.Generator, num_gpus: int, per_instance: int, num_layers: int) -> Shape:
    """(D, P, M), uniform over those that use enough of the GPUs, tensor groups inside an instance."""
    shapes = [
        (data, pipeline, tensor)
        for tensor in TENSOR_DEGREES
        if tensor <= per_instance
        for pipeline in PIPELINE_DEGREES
        if pipeline <= num_layers
        for data in [num_gpus // (pipeline * tensor)]
        if 1 <= data <= MAX_DATA and data * pipeline * tensor >= LEAST_USED * num_gpus
    ]
    return shapes[int(rng.integers(len(shapes)))]


def _instance(number: int, num_gpus: int, memory_bytes: int) -> InstanceView:
    name = InstanceId(f"i{number}")
    gpus = tuple(Gpu(id=GpuId(f"{name}/{index}"), memory_bytes=memory_bytes) for index in range(num_gpus))
    return InstanceView(id=name, state="ready", gpus=gpus)


def _scattered(rng: np.random.Generator, shape: Shape, per_instance: int, model: ModelSpec) -> tuple[Replica, ...]:
    """Replicas whose tensor groups sit wherever history has put them, each inside one instance."""
    data, pipeline, tensor = shape
    slot_of = [int(slot) for slot in rng.permutation(data * pipeline)]
    return tuple(
        Replica(
            id=ReplicaId(f"r{EPOCH}.{number + 1}"),
            generation=EPOCH,
            max_running=REQUESTS_PER_REPLICA,
            kv_blocks=REQUESTS_PER_REPLICA * (min(MAX_LENGTH, model.max_model_len) // KV_BLOCK_TOKENS) + 1,
            stages=tuple(
                Stage(layers=layers, gpus=_group(slot_of[number * pipeline + stage], tensor, per_instance))
                for stage, layers in enumerate(layer_split(model.num_layers, pipeline))
            ),
        )
        for number in range(data)
    )


def _group(slot: int, tensor: int, per_instance: int) -> tuple[GpuId, ...]:
    """The GPUs of the tensor group in a slot; slots fill the instances from the first to the last."""
    first = slot * tensor
    return tuple(GpuId(f"i{gpu // per_instance}/{gpu % per_instance}") for gpu in range(first, first + tensor))


def _holdings(model: ModelSpec, replicas: tuple[Replica, ...]) -> tuple[Holding, ...]:
    """Each rank holds the shard of its position."""
    return tuple(
        Holding(gpu=gpu, shards=(shard,))
        for one in replicas
        for gpu, shard in zip(one.gpus, replica_shards(model, pipeline=one.pipeline, tensor=one.tensor), strict=True)
    )


def _requests(rng: np.random.Generator, model: ModelSpec, number: int, replica: Replica) -> tuple[RequestProgress, ...]:
    """Requests of one length that together have the KV drawn for the replica."""
    layers, heads = (0, model.num_layers), (0, model.num_kv_heads)
    weights = shard_bytes(model, stage_shard(model, layers=layers, tensor=1, rank=0))
    kv_bytes = KV_SHARE * float(rng.lognormal(0.0, KV_SPREAD)) * weights
    tokens = kv_bytes / kv_token_bytes(model, layers=layers, heads=heads) / REQUESTS_PER_REPLICA
    length = min(MAX_LENGTH, model.max_model_len)
    kv_tokens = min(length - 2, max(2, round(tokens)))
    return tuple(
        RequestProgress(
            request=RequestId(f"{number * REQUESTS_PER_REPLICA + index:032x}"),
            replica=replica.id,
            state="decoding",
            prompt_tokens=kv_tokens // 2,
            max_tokens=length - kv_tokens // 2,
            choices=(
                ChoiceProgress(choice=0, kv_generation=0, tokens=kv_tokens - kv_tokens // 2 + 1, kv_tokens=kv_tokens),
            ),
        )
        for index in range(REQUESTS_PER_REPLICA)
    )


def _profile() -> Profile:
    return Profile(
        name="random",
        source="made up",
        device="none",
        latencies=(
            LatencyPoint(tokens=1, tensor=1, layer_ms=1.0),
            LatencyPoint(tokens=1, tensor=8, layer_ms=0.2),
            LatencyPoint(tokens=2048, tensor=1, layer_ms=40.0),
            LatencyPoint(tokens=2048, tensor=8, layer_ms=8.0),
        ),
        link_bytes_per_s=LINK_BYTES_PER_S,
        storage_bytes_per_s=LINK_BYTES_PER_S / 4,
    )
