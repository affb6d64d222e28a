"""The cost model: how long a configuration takes per request, how much it serves, and what it needs of memory.

Queue-aware where SpotServe's is not (Miao et al., ASPLOS'24, section 3.2 minimises execution time alone): a request
waits as in an M/M/c queue with one server per running sequence, decodes only while no other prompt is computed, and P
micro-batches are in flight, so the slowest stage bounds throughput and not the sum of the stages. Configure, the
simulator and the reports use this one model.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import ceil, sqrt

from spotserve.core.ids import GpuId
from spotserve.core.slices import Shard, kv_block_bytes, layer_split, shard_bytes, stage_shard
from spotserve.core.snapshot import Replica
from spotserve.core.spec import LatencyPoint, Limits, ModelSpec, Profile, ServingSpec

SERVES_MARGIN = 1.05
"""A configuration serves a load only if its throughput exceeds it by this factor; the wait diverges at 1.0."""

OVERLOAD_S = 30.0
"""How long more comes than is served, as far as anybody knows: as long as the window in which arrivals are counted."""

OCCUPANCY_ROUNDS = 4
"""Rounds of the fixed point between latency and running sequences (Little's law); it settles in two or three."""

BUSY_DEVIATIONS = 2.0
"""A request is reckoned in a busy moment, which is where P99 is made: so many standard deviations of the number that is
in the system over its mean, dealt out evenly to the replicas."""

MOST_PREFILL_SHARE = 0.9
"""Beyond, answers would never end; what computes prompts for so long serves no load anyway."""


@dataclass(frozen=True, slots=True)
class Workload:
    """What an average request asks for, and how many of them come per second (0: unknown)."""

    prompt_tokens: int
    output_tokens: int
    load_rps: float


@dataclass(frozen=True, slots=True)
class Degrees:
    """A configuration (D, P, M, B): parallel degrees and most running sequences per replica."""

    data: int
    pipeline: int
    tensor: int
    max_running: int

    @property
    def gpus(self) -> int:
        """How many GPUs it takes."""
        return self.data * self.pipeline * self.tensor


@dataclass(frozen=True, slots=True)
class StageLoad:
    """What one pipeline stage has to do: so many layers on GPUs of one type (empty: the profile's own)."""

    layers: int
    device: str = ""


@dataclass(frozen=True, slots=True)
class PipelineShape:
    """One pipeline: its tensor degree and its stages from front to back."""

    tensor: int
    stages: tuple[StageLoad, ...]

    @property
    def pipeline(self) -> int:
        """The pipeline parallel degree."""
        return len(self.stages)


def balanced(model: ModelSpec, *, pipeline: int, tensor: int) -> PipelineShape:
    """The pipeline of `pipeline` stages with the layers dealt out evenly, on the profile's own device."""
    runs = layer_split(model.num_layers, pipeline)
    return PipelineShape(tensor, tuple(StageLoad(stop - start) for start, stop in runs))


def shape_of(replica: Replica, types: Mapping[GpuId, str], profile: Profile) -> PipelineShape:
    """A replica's stages as the cost model takes them; a stage over several types is as slow as the slowest."""

    def slowest(gpus: Iterable[GpuId]) -> str:
        names = sorted({types.get(gpu, "") for gpu in gpus})
        return (
            names[0]
            if len(names) == 1
            else max(names, key=lambda name: layer_ms(profile, tokens=1, tensor=replica.tensor, device=name))
        )

    return PipelineShape(
        replica.tensor,
        tuple(StageLoad(stage.layers[1] - stage.layers[0], slowest(stage.gpus)) for stage in replica.stages),
    )


@dataclass(frozen=True, slots=True)
class LatencyCurve:
    """Milliseconds of a decoder layer over the number of rows, at one tensor degree on one GPU type."""

    points: tuple[LatencyPoint, ...]
    scale: float

    def ms(self, tokens: int) -> float:
        """Milliseconds for `tokens` rows, between and beyond the measured points."""
        return self.scale * _along_tokens(self.points, tokens)


def latency_curve(profile: Profile, *, tensor: int, device: str = "") -> LatencyCurve:
    """The measured points that count for a tensor degree on a GPU type.

    A tensor degree that was not measured takes the nearest measured one below it (no speed-up is made up), or the
    smallest measured one scaled up if there is none below. Raises KeyError for a type without times.
    """
    points = profile.points["" if device == profile.device else device]
    degree = max((measured for measured in points if measured <= tensor), default=None)
    if degree is not None:
        return LatencyCurve(points[degree], 1.0)
    smallest = min(points)
    return LatencyCurve(points[smallest], smallest / tensor)


def layer_ms(profile: Profile, *, tokens: int, tensor: int, device: str = "") -> float:
    """Milliseconds of one decoder layer for a forward of `tokens` rows, as `latency_curve` has it."""
    known, key = profile.layer_ms_of, (device, tensor, tokens)
    if key not in known:
        known[key] = latency_curve(profile, tensor=tensor, device=device).ms(tokens)
    return known[key]


def _along_tokens(points: tuple[LatencyPoint, ...], tokens: int) -> float:
    """Piece-wise linear in the token count; flat below the first point, the last slope beyond the last one."""
    if tokens <= points[0].tokens or len(points) == 1:
        return points[0].layer_ms if tokens <= points[0].tokens else points[0].layer_ms * tokens / points[0].tokens
    index = next((i for i, point in enumerate(points) if point.tokens >= tokens), len(points) - 1)
    low, high = points[index - 1], points[index]
    slope = (high.layer_ms - low.layer_ms) / (high.tokens - low.tokens)
    return max(low.layer_ms + slope * (tokens - low.tokens), points[0].layer_ms)


def slowest_stage_ms(spec: ServingSpec, shape: PipelineShape, *, tokens: int) -> float:
    """Milliseconds that the slowest stage takes for a forward of `tokens` rows."""
    return max(
        stage.layers * layer_ms(spec.profile, tokens=tokens, tensor=shape.tensor, device=stage.device)
        + spec.profile.stage_overhead_ms
        for stage in set(shape.stages)
    )


def prefill_ms(spec: ServingSpec, *, pipeline: int, tensor: int, tokens: int) -> float:
    """Milliseconds until the first token of a prompt of `tokens`, alone on a balanced replica."""
    shape = balanced(spec.model, pipeline=pipeline, tensor=tensor)
    return pipeline * slowest_stage_ms(spec, shape, tokens=max(1, tokens))


def decode_ms(spec: ServingSpec, *, pipeline: int, tensor: int, running: int) -> float:
    """Milliseconds per output token with `running` sequences spread over P micro-batches of a balanced replica."""
    return pipeline_decode_ms(spec, balanced(spec.model, pipeline=pipeline, tensor=tensor), running=running)


def pipeline_decode_ms(spec: ServingSpec, shape: PipelineShape, *, running: int) -> float:
    """Milliseconds per output token with `running` sequences spread over P micro-batches."""
    rows = max(1, ceil(running / shape.pipeline))
    return shape.pipeline * slowest_stage_ms(spec, shape, tokens=rows)


def execution_ms(spec: ServingSpec, degrees: Degrees, workload: Workload, *, running: int) -> float:
    """l_exe of the paper (section 2.1, equations 1 and 2) with `running` sequences on a balanced replica."""
    shape = balanced(spec.model, pipeline=degrees.pipeline, tensor=degrees.tensor)
    return pipeline_execution_ms(spec, shape, workload, running=running)


def pipeline_execution_ms(spec: ServingSpec, shape: PipelineShape, workload: Workload, *, running: int) -> float:
    """l_exe with `running` sequences on one pipeline; in lockstep each stage takes as long as the slowest."""
    first = shape.pipeline * slowest_stage_ms(spec, shape, tokens=max(1, workload.prompt_tokens))
    return first + workload.output_tokens * pipeline_decode_ms(spec, shape, running=running)


def throughput_rps(spec: ServingSpec, degrees: Degrees, workload: Workload) -> float:
    """Requests per second that all replicas of equal, balanced pipelines finish when B sequences run on each."""
    shape = balanced(spec.model, pipeline=degrees.pipeline, tensor=degrees.tensor)
    return pool_throughput_rps(spec, Pool(shape, degrees.data, degrees.max_running), workload)


def request_ms(spec: ServingSpec, degrees: Degrees, workload: Workload) -> float:
    """l_req = waiting + execution of equal, balanced pipelines."""
    shape = balanced(spec.model, pipeline=degrees.pipeline, tensor=degrees.tensor)
    return pools_request_ms(spec, (Pool(shape, degrees.data, degrees.max_running),), workload)


@dataclass(frozen=True, slots=True)
class Pool:
    """Equal replicas: how many of a pipeline, and how many sequences run at most on each."""

    shape: PipelineShape
    data: int
    max_running: int


def pool_throughput_rps(spec: ServingSpec, pool: Pool, workload: Workload) -> float:
    """Requests per second that the replicas of a pool finish together when B sequences run on each.

    A static batch has the pipeline to itself: phi = D * B / l_exe (the paper's section 3.2).
    """
    if spec.limits.batching == "static":
        execution = pipeline_execution_ms(spec, pool.shape, workload, running=pool.max_running)
        return pool.data * pool.max_running * 1000.0 / execution
    stages = pool.shape.pipeline
    rows = max(1, ceil(pool.max_running / stages))
    prompt = slowest_stage_ms(spec, pool.shape, tokens=max(1, workload.prompt_tokens))
    token = slowest_stage_ms(spec, pool.shape, tokens=rows)
    # A round of all micro-batches brings each of the B sequences one token, however unevenly they are dealt out.
    per_token = token * stages / pool.max_running
    # Fewer running sequences than stages leave stages idle: the pipeline is then as slow as its depth.
    per_prompt = prompt * stages / min(pool.max_running, stages)
    return pool.data * 1000.0 / (per_prompt + workload.output_tokens * per_token)


def serves_load(capacity_rps: float, workload: Workload) -> bool:
    """Whether pools of this throughput keep up with the load."""
    return capacity_rps >= SERVES_MARGIN * workload.load_rps


def pools_request_ms(spec: ServingSpec, pools: Sequence[Pool], workload: Workload) -> float:
    """Mean l_req over pools that share the load as their throughputs are.

    The wait of a pool is Sakasegawa's approximation of M/M/c with c = D * B servers. Pools that cannot serve the load
    run full, and who comes at the end of `OVERLOAD_S` waits for what is left over until then.
    """
    capacities = [pool_throughput_rps(spec, pool, workload) for pool in pools]
    capacity = sum(capacities)
    total = 0.0
    if not serves_load(capacity, workload):
        for pool, part in zip(pools, capacities, strict=True):
            full_ms = pipeline_execution_ms(spec, pool.shape, workload, running=pool.max_running)
            total += part / capacity * full_ms
        return total + 1000.0 * OVERLOAD_S * max(0.0, workload.load_rps / capacity - 1.0)
    for pool, part in zip(pools, capacities, strict=True):
        share = part / capacity
        load_rps = share * workload.load_rps
        total += share * _pool_request_ms(spec, pool, workload, load_rps=load_rps, capacity_rps=part)
    return total


@dataclass(frozen=True, slots=True)
class Worth:
    """What replicas are to requests together."""

    throughput_rps: float
    latency_ms: float
    serves_load: bool


def worth_of(spec: ServingSpec, pools: Sequence[Pool], workload: Workload) -> Worth:
    """The worth of at least one pool."""
    throughput_rps = sum(pool_throughput_rps(spec, pool, workload) for pool in pools)
    return Worth(throughput_rps, pools_request_ms(spec, pools, workload), serves_load(throughput_rps, workload))


def _pool_request_ms(
    spec: ServingSpec, pool: Pool, workload: Workload, *, load_rps: float, capacity_rps: float
) -> float:
    if load_rps <= 0:
        return pipeline_execution_ms(spec, pool.shape, workload, running=1)
    share = prefill_share(spec, pool, workload, load_rps=load_rps)
    execution = pipeline_execution_ms(spec, pool.shape, workload, running=1)
    for _ in range(OCCUPANCY_ROUNDS):
        busy = load_rps / pool.data * (execution / 1000.0)
        crowd = busy + BUSY_DEVIATIONS * sqrt(busy / pool.data)
        running = min(pool.max_running, max(1, ceil(crowd)))
        left = 1.0 - min(MOST_PREFILL_SHARE, share * crowd / busy)
        execution = pipeline_execution_ms(spec, pool.shape, workload, running=running) / left
    servers = pool.data * pool.max_running
    utilisation = load_rps / capacity_rps
    crowding: float = utilisation ** (sqrt(2.0 * (servers + 1)) - 1.0)
    waiting = execution * crowding / (servers * (1.0 - utilisation))
    return waiting + execution


def prefill_share(spec: ServingSpec, pool: Pool, workload: Workload, *, load_rps: float) -> float:
    """The share of its time that a stage computes prompts of requests that come later: all who decode wait for them.

    A static batch has the pipeline to itself.
    """
    if spec.limits.batching == "static":
        return 0.0
    prompt_ms = slowest_stage_ms(spec, pool.shape, tokens=max(1, workload.prompt_tokens))
    return load_rps / pool.data * (prompt_ms / 1000.0)


def sequence_blocks(limits: Limits) -> int:
    """KV cache blocks of one sequence of `max_model_len` tokens."""
    return -(-limits.max_model_len // limits.kv_block_tokens)


def least_kv_blocks(limits: Limits) -> int:
    """The smallest KV pool a replica may have, in blocks."""
    return -(-(limits.min_kv_tokens or limits.max_model_len) // limits.kv_block_tokens)


def most_kv_blocks(limits: Limits) -> int:
    """The largest KV pool that could ever be used: B sequences of full length, and one block to spare."""
    return max(least_kv_blocks(limits), limits.max_running * sequence_blocks(limits) + 1)


def running_bound(limits: Limits, kv_blocks: int) -> int:
    """B: each running sequence needs a block at least; eviction covers what grows beyond the pool."""
    return max(1, min(limits.max_running, kv_blocks))


def replica_shards(model: ModelSpec, *, pipeline: int, tensor: int) -> tuple[Shard, ...]:
    """The shard of each position of a (P, M) replica, stage by stage, rank by rank."""
    return tuple(
        stage_shard(model, layers=layers, tensor=tensor, rank=rank)
        for layers in layer_split(model.num_layers, pipeline)
        for rank in range(tensor)
    )


class ShardSizes:
    """Weight bytes and KV cache block bytes of shards, counted once per (degree, rank) and not once per layer."""

    def __init__(self, model: ModelSpec, *, block_tokens: int) -> None:
        self._model = model
        self._block_tokens = block_tokens
        self._parts: dict[tuple[int, int], tuple[int, int, int, int]] = {}

    def weights(self, shard: Shard) -> int:
        """Weight bytes of a position."""
        layer, first, last, _ = self._part(shard.tensor, shard.rank)
        ends = first * shard.first + last * shard.last
        return (shard.layers[1] - shard.layers[0]) * layer + ends

    def block(self, shard: Shard) -> int:
        """Bytes of one KV cache block of a position."""
        return (shard.layers[1] - shard.layers[0]) * self._part(shard.tensor, shard.rank)[3]

    def _part(self, tensor: int, rank: int) -> tuple[int, int, int, int]:
        """Bytes of one layer, of what the first and the last stage have more, and of a block of one layer."""
        key = (tensor, rank)
        if key not in self._parts:
            inside = Shard(layers=(0, 1), tensor=tensor, rank=rank, first=False, last=False)
            layer = shard_bytes(self._model, inside)
            first = shard_bytes(self._model, inside.model_copy(update={"first": True})) - layer
            last = shard_bytes(self._model, inside.model_copy(update={"last": True})) - layer
            block = kv_block_bytes(self._model, inside, block_tokens=self._block_tokens)
            self._parts[key] = (layer, first, last, block)
        return self._parts[key]


def kv_blocks_within(model: ModelSpec, limits: Limits, shard: Shard, free_bytes: int) -> int:
    """How many KV cache blocks of a position fit into `free_bytes` (never negative)."""
    block = kv_block_bytes(model, shard, block_tokens=limits.kv_block_tokens)
    return max(0, free_bytes // block)
