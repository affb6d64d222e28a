"""Templates: every pipeline that a fleet of several GPU types can form, with the layers dealt out by speed and memory.

A template is a tensor degree and stages from front to back, each with the GPU type it runs on and its number of layers
("template columns"). Layers go to stages so that the slowest stage is as fast as it can be (exact, by bisection), each
stage within what the memory of its type holds.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations_with_replacement

import numpy as np

from spotserve.core.cost import (
    PipelineShape,
    Pool,
    ShardSizes,
    StageLoad,
    Workload,
    latency_curve,
    least_kv_blocks,
    most_kv_blocks,
    pipeline_execution_ms,
    pool_throughput_rps,
)
from spotserve.core.slices import Shard, max_tensor_degree
from spotserve.core.spec import ServingSpec, weight_copies
from spotserve.solvers.configure.candidates import MICRO

MAX_MIXED_STAGES = 12
"""Stages of a pipeline over several GPU types; pipelines of one type may have as many as there are layers."""


@dataclass(frozen=True, slots=True)
class GpuKind:
    """The GPUs of one type that stay: how many, and the memory of the smallest."""

    type: str
    count: int
    memory_bytes: int


@dataclass(frozen=True, slots=True)
class Template:
    """A pipeline that fits, and what one replica of it is judged by.

    `uses[k]` GPUs of kind k; `batch` average sequences run at once within `kv_blocks`; `alone_us` is l_exe of a request
    that has the replica for itself.
    """

    shape: PipelineShape
    uses: tuple[int, ...]
    kv_blocks: int
    max_running: int
    batch: int
    throughput_urps: int
    alone_us: int
    cost_micro: int
    headroom: bool

    @property
    def gpus(self) -> int:
        """How many GPUs one replica takes."""
        return sum(self.uses)


def split_layers(num_layers: int, times: Sequence[int], caps: Sequence[int]) -> tuple[int, ...] | None:
    """Layers of each stage so that the largest `times[s] * layers[s]` is least; None if the caps leave no split.

    Every stage gets a layer at least. Exact: bisection over the values that the largest product can have.
    """
    if sum(caps) < num_layers or len(times) > num_layers or min(caps) < 1:
        return None

    def most(limit: int) -> list[int]:
        return [min(cap, limit // time) for time, cap in zip(times, caps, strict=True)]

    values = sorted({time * count for time, cap in zip(times, caps, strict=True) for count in range(1, cap + 1)})
    low, high = 0, len(values) - 1
    while low < high:
        middle = (low + high) // 2
        layers = most(values[middle])
        if min(layers) >= 1 and sum(layers) >= num_layers:
            high = middle
        else:
            low = middle + 1
    layers = most(values[low])
    for _ in range(sum(layers) - num_layers):
        # What is too much comes off the stage that then takes longest, the last of equals.
        slowest = max((s for s in range(len(layers)) if layers[s] > 1), key=lambda s: (layers[s] * times[s], s))
        layers[slowest] -= 1
    return tuple(layers)


@dataclass(frozen=True, slots=True)
class _Draw:
    """The stages of one tensor degree: bytes of a layer, of the ends and of a block of each rank; ms per layer."""

    layer: tuple[int, ...]
    first: tuple[int, ...]
    last: tuple[int, ...]
    block: tuple[int, ...]
    layer_ns: tuple[int, ...]


class TemplateMaker:
    """Makes templates for a spec, the kinds of GPUs and the average request."""

    def __init__(self, spec: ServingSpec, kinds: Sequence[GpuKind], workload: Workload) -> None:
        self.spec = spec
        self.kinds = tuple(kinds)
        self.workload = workload
        self._draws: dict[int, _Draw] = {}
        # Thousands of pipelines have the same few stages.
        self._caps: dict[tuple[int, int, bool, bool, bool], int] = {}
        self._blocks: dict[tuple[int, int, bool, bool, int], tuple[int, int]] = {}

    def all(self, *, headroom: bool) -> tuple[Template, ...]:
        """Every template that the fleet has GPUs for, in a fixed order; of two stage orders the faster one."""
        found = []
        for tensor in range(1, max_tensor_degree(self.spec.model) + 1):
            most = [kind.count // tensor for kind in self.kinds]
            for chosen in self._stage_kinds(most):
                made = self.split(chosen, tensor=tensor, headroom=headroom)
                if len(set(chosen)) > 1:
                    turned = self.split(chosen[::-1], tensor=tensor, headroom=headroom)
                    made = max((t for t in (made, turned) if t), key=lambda t: t.throughput_urps, default=None)
                if made is not None:
                    found.append(made)
        return tuple(found)

    def _stage_kinds(self, most: Sequence[int]) -> Iterator[tuple[int, ...]]:
        """The kinds of the stages, front to back, equal ones together."""
        num_layers, num_kinds = self.spec.model.num_layers, len(self.kinds)
        for kind in range(num_kinds):
            for stages in range(1, min(most[kind], num_layers) + 1):
                yield (kind,) * stages
        for stages in range(2, min(MAX_MIXED_STAGES, sum(most), num_layers) + 1):
            for chosen in combinations_with_replacement(range(num_kinds), stages):
                if len(set(chosen)) > 1 and all(chosen.count(kind) <= most[kind] for kind in set(chosen)):
                    yield chosen

    def split(self, chosen: Sequence[int], *, tensor: int, headroom: bool) -> Template | None:
        """The fastest split of the layers over stages of the `chosen` kinds; None if the memory does not hold it."""
        draw = self._draw(tensor)
        caps = [self._cap(tensor, chosen, stage, headroom=headroom) for stage in range(len(chosen))]
        layers = split_layers(self.spec.model.num_layers, [draw.layer_ns[kind] for kind in chosen], caps)
        return None if layers is None else self.judge(chosen, layers, tensor=tensor)

    def judge(self, chosen: Sequence[int], layers: Sequence[int], *, tensor: int) -> Template | None:
        """The template with these layers on these kinds, or None if its memory does not hold the smallest KV pool."""
        limits = self.spec.limits
        rooms = [self._room(tensor, chosen, stage, count) for stage, count in enumerate(layers)]
        roomy, tight = min(room for room, _ in rooms), min(room for _, room in rooms)
        least = least_kv_blocks(limits)
        if tight < least:
            return None
        blocks = min(max(roomy, least), most_kv_blocks(limits))
        max_running = max(1, min(limits.max_running, blocks))
        tokens = max(1, self.workload.prompt_tokens + self.workload.output_tokens)
        batch = max(1, min(max_running, blocks * limits.kv_block_tokens // tokens))
        loads = tuple(StageLoad(count, self.kinds[kind].type) for count, kind in zip(layers, chosen, strict=True))
        shape = PipelineShape(tensor, loads)
        uses = tuple(list(chosen).count(kind) * tensor for kind in range(len(self.kinds)))
        prices = [round(self.spec.profile.compared_price_of(kind.type) * MICRO) for kind in self.kinds]
        return Template(
            shape=shape,
            uses=uses,
            kv_blocks=blocks,
            max_running=max_running,
            batch=batch,
            throughput_urps=round(pool_throughput_rps(self.spec, Pool(shape, 1, batch), self.workload) * 1e6),
            alone_us=round(pipeline_execution_ms(self.spec, shape, self.workload, running=1) * 1000),
            cost_micro=sum(price * count for price, count in zip(prices, uses, strict=True)),
            headroom=roomy >= least,
        )

    def _weights(self, draw: _Draw, rank: int, layers: int, *, first: bool, last: bool) -> int:
        """Weight bytes of a position, copies included."""
        ends = first * draw.first[rank] + last * draw.last[rank]
        return weight_copies(self.spec.linear) * (layers * draw.layer[rank] + ends)

    def _room(self, tensor: int, chosen: Sequence[int], stage: int, layers: int) -> tuple[int, int]:
        """KV blocks beside a stage's weights, with the migration headroom kept free and without."""
        first, last = stage == 0, stage == len(chosen) - 1
        key = tensor, chosen[stage], first, last, layers
        if key not in self._blocks:
            draw, memory_bytes = self._draw(tensor), self.kinds[chosen[stage]].memory_bytes
            free = [
                (memory_bytes - self._weights(draw, rank, layers, first=first, last=last), block * layers)
                for rank, block in enumerate(draw.block)
            ]
            headroom_bytes = self.spec.limits.migration_headroom_bytes
            self._blocks[key] = (
                min((free_bytes - headroom_bytes) // block for free_bytes, block in free),
                min(free_bytes // block for free_bytes, block in free),
            )
        return self._blocks[key]

    def _cap(self, tensor: int, chosen: Sequence[int], stage: int, *, headroom: bool) -> int:
        """How many layers a stage's memory holds beside the smallest KV pool."""
        first, last = stage == 0, stage == len(chosen) - 1
        key = tensor, chosen[stage], first, last, headroom
        if key not in self._caps:
            draw, limits = self._draw(tensor), self.spec.limits
            budget = self.kinds[chosen[stage]].memory_bytes - (limits.migration_headroom_bytes if headroom else 0)
            copies, least = weight_copies(self.spec.linear), least_kv_blocks(limits)
            most = min(
                (budget - self._weights(draw, rank, 0, first=first, last=last))
                // (copies * draw.layer[rank] + least * block)
                for rank, block in enumerate(draw.block)
            )
            self._caps[key] = max(0, min(most, self.spec.model.num_layers))
        return self._caps[key]

    def _draw(self, tensor: int) -> _Draw:
        if tensor not in self._draws:
            sizes = ShardSizes(self.spec.model, block_tokens=self.spec.limits.kv_block_tokens)

            def bytes_of(num_layers: int, *, first: bool = False, last: bool = False) -> tuple[int, ...]:
                return tuple(sizes.weights(_shard(num_layers, tensor, rank, first, last)) for rank in range(tensor))

            curves = [latency_curve(self.spec.profile, tensor=tensor, device=kind.type) for kind in self.kinds]
            rows = max(1, self.spec.limits.max_running // 2)
            prompt, output = max(1, self.workload.prompt_tokens), self.workload.output_tokens
            self._draws[tensor] = _Draw(
                layer=bytes_of(1),
                first=bytes_of(0, first=True),
                last=bytes_of(0, last=True),
                block=tuple(sizes.block(_shard(1, tensor, rank, False, False)) for rank in range(tensor)),
                layer_ns=tuple(max(1, round(1e6 * (c.ms(prompt) + output * c.ms(rows) / rows))) for c in curves),
            )
        return self._draws[tensor]


def _shard(num_layers: int, tensor: int, rank: int, first: bool, last: bool) -> Shard:
    return Shard(layers=(0, num_layers), tensor=tensor, rank=rank, first=first, last=last)


def undominated_templates(templates: Sequence[Template]) -> tuple[Template, ...]:
    """The templates that no other one meets with no more GPUs of any kind, as fast a request and as much throughput.

    Of equal ones the first stays. Another may take the place of a dominated one in any mix.
    """
    if not templates:
        return ()
    costs = np.array([[*t.uses, -t.throughput_urps, t.alone_us, t.cost_micro, -t.headroom] for t in templates])
    order = np.lexsort((np.arange(len(templates)), *costs.T[::-1]))
    kept: list[int] = []
    for row in order.tolist():
        if not kept or not (costs[kept] <= costs[row]).all(axis=1).any():
            kept.append(row)
    return tuple(templates[row] for row in sorted(kept))
