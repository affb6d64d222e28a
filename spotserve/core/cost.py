"""The cost model: how long a configuration takes per request, how much it serves, and what it needs of memory.

Queue-aware where SpotServe's is not (Miao et al., ASPLOS'24, section 3.2 minimises execution time alone): a request
waits as in an M/M/c queue with one server per running sequence, and P micro-batches are in flight, so the slowest
stage bounds throughput and not the sum of the stages. Configure, the simulator and the reports use this one model.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, sqrt

from spotserve.core.slices import Shard, kv_block_bytes, layer_split, shard_bytes, stage_shard
from spotserve.core.spec import LatencyPoint, Limits, ModelSpec, Profile, ServingSpec

SERVES_MARGIN = 1.05
"""A configuration serves a load only if its throughput exceeds it by this factor; the wait diverges at 1.0."""

OCCUPANCY_ROUNDS = 4
"""Rounds of the fixed point between latency and running sequences (Little's law); it settles in two or three."""


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


def layer_ms(profile: Profile, *, tokens: int, tensor: int) -> float:
    """Milliseconds of one decoder layer for a forward of `tokens` rows, between and beyond the measured points.

    A tensor degree that was not measured takes the nearest measured one below it (no speed-up is made up), or the
    smallest measured one scaled up if there is none below.
    """
    measured = sorted({point.tensor for point in profile.latencies})
    below = [degree for degree in measured if degree <= tensor]
    degree = below[-1] if below else measured[0]
    scale = 1.0 if below else measured[0] / tensor
    points = sorted((p for p in profile.latencies if p.tensor == degree), key=lambda p: p.tokens)
    return scale * _along_tokens(points, tokens)


def _along_tokens(points: list[LatencyPoint], tokens: int) -> float:
    """Piece-wise linear in the token count; flat below the first point, the last slope beyond the last one."""
    if tokens <= points[0].tokens or len(points) == 1:
        return points[0].layer_ms if tokens <= points[0].tokens else points[0].layer_ms * tokens / points[0].tokens
    index = next((i for i, point in enumerate(points) if point.tokens >= tokens), len(points) - 1)
    low, high = points[index - 1], points[index]
    slope = (high.layer_ms - low.layer_ms) / (high.tokens - low.tokens)
    return max(low.layer_ms + slope * (tokens - low.tokens), points[0].layer_ms)


def stage_ms(spec: ServingSpec, *, pipeline: int, tensor: int, tokens: int) -> float:
    """Milliseconds that the slowest stage takes for a forward of `tokens` rows."""
    layers = ceil(spec.model.num_layers / pipeline)
    return layers * layer_ms(spec.profile, tokens=tokens, tensor=tensor) + spec.profile.stage_overhead_ms


def prefill_ms(spec: ServingSpec, *, pipeline: int, tensor: int, tokens: int) -> float:
    """Milliseconds until the first token of a prompt of `tokens`, alone on the replica."""
    return pipeline * stage_ms(spec, pipeline=pipeline, tensor=tensor, tokens=max(1, tokens))


def decode_ms(spec: ServingSpec, *, pipeline: int, tensor: int, running: int) -> float:
    """Milliseconds per output token with `running` sequences spread over P micro-batches."""
    rows = max(1, ceil(running / pipeline))
    return pipeline * stage_ms(spec, pipeline=pipeline, tensor=tensor, tokens=rows)


def execution_ms(spec: ServingSpec, degrees: Degrees, workload: Workload, *, running: int) -> float:
    """l_exe of the paper (section 2.1, equations 1 and 2) with `running` sequences on the replica."""
    first = prefill_ms(spec, pipeline=degrees.pipeline, tensor=degrees.tensor, tokens=workload.prompt_tokens)
    later = decode_ms(spec, pipeline=degrees.pipeline, tensor=degrees.tensor, running=running)
    return first + workload.output_tokens * later


def throughput_rps(spec: ServingSpec, degrees: Degrees, workload: Workload) -> float:
    """Requests per second that all replicas finish together when B sequences run on each."""
    rows = max(1, ceil(degrees.max_running / degrees.pipeline))
    prompt = stage_ms(spec, pipeline=degrees.pipeline, tensor=degrees.tensor, tokens=max(1, workload.prompt_tokens))
    token = stage_ms(spec, pipeline=degrees.pipeline, tensor=degrees.tensor, tokens=rows)
    # Fewer running sequences than stages leave stages idle: the pipeline is then as slow as its depth.
    in_flight = min(degrees.max_running, degrees.pipeline)
    per_token = token * degrees.pipeline / (in_flight * rows)
    per_prompt = prompt * degrees.pipeline / in_flight
    return degrees.data * 1000.0 / (per_prompt + workload.output_tokens * per_token)


def request_ms(spec: ServingSpec, degrees: Degrees, workload: Workload) -> float | None:
    """l_req = waiting + execution at the given load; None if the configuration cannot serve it.

    The wait is Sakasegawa's approximation of M/M/c with c = D * B servers.
    """
    if workload.load_rps <= 0:
        return execution_ms(spec, degrees, workload, running=1)
    capacity = throughput_rps(spec, degrees, workload)
    if capacity < SERVES_MARGIN * workload.load_rps:
        return None
    running = 1
    for _ in range(OCCUPANCY_ROUNDS):
        busy_s = execution_ms(spec, degrees, workload, running=running) / 1000.0
        running = min(degrees.max_running, max(1, ceil(workload.load_rps / degrees.data * busy_s)))
    execution = execution_ms(spec, degrees, workload, running=running)
    servers = degrees.data * degrees.max_running
    utilisation = workload.load_rps / capacity
    crowding: float = utilisation ** (sqrt(2.0 * (servers + 1)) - 1.0)
    waiting = execution * crowding / (servers * (1.0 - utilisation))
    return waiting + execution


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
