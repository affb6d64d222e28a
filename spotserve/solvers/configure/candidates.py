"""Candidates: every (D, P, M, B) of equal replicas that fits the GPUs that stay, tabulated column by column.

One numpy sweep instead of a loop, as there are tens of thousands of rows at 4096 GPUs; the arithmetic is that of
`core/cost.py`, operation by operation, so that both give the same microseconds.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from spotserve.core.cost import (
    BUSY_DEVIATIONS,
    MOST_PREFILL_SHARE,
    OCCUPANCY_ROUNDS,
    OVERLOAD_S,
    SERVES_MARGIN,
    ShardSizes,
    Workload,
    Worth,
    latency_curve,
    least_kv_blocks,
    most_kv_blocks,
)
from spotserve.core.slices import Shard, layer_split, max_tensor_degree
from spotserve.core.snapshot import Replica
from spotserve.core.spec import ServingSpec, weight_copies

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

MOST_US = 10**15
"""No latency is taken for longer than this, as solvers count in whole numbers."""

MICRO = 1_000_000


@dataclass(frozen=True, slots=True)
class Candidate:
    """A feasible configuration and what it is judged by; all integers."""

    data: int
    pipeline: int
    tensor: int
    max_running: int
    gpus: int
    cost_micro: int
    unserved: int
    latency_us: int
    execution_us: int
    throughput_urps: int
    disturbed: int
    reshaped: int
    headroom: int

    @property
    def shape(self) -> tuple[int, int]:
        """(P, M)."""
        return self.pipeline, self.tensor

    @property
    def worth(self) -> Worth:
        """What it is to requests."""
        return Worth(self.throughput_urps / MICRO, self.latency_us / 1000, not self.unserved)


COLUMNS = tuple(field.name for field in fields(Candidate))


@dataclass(frozen=True, slots=True)
class Table(Sequence[Candidate]):
    """Candidates in a fixed order, one integer array for each of their fields."""

    columns: Mapping[str, Ints]

    def __len__(self) -> int:
        return len(self.columns["data"])

    def __getitem__(self, index: int) -> Candidate:  # type: ignore[override]  # slices are made by `where`
        return Candidate(**{name: int(self.columns[name][index]) for name in COLUMNS})

    def __iter__(self) -> Iterator[Candidate]:
        lists = [self.columns[name].tolist() for name in COLUMNS]
        return (Candidate(*values) for values in zip(*lists, strict=True))

    def where(self, keep: NDArray[np.bool_]) -> Table:
        """The rows that `keep` marks."""
        return Table({name: values[keep] for name, values in self.columns.items()})

    def find(self, *, data: int, pipeline: int, tensor: int) -> Candidate | None:
        """The row of one (D, P, M), None if it does not fit."""
        columns = self.columns
        same = (columns["pipeline"] == pipeline) & (columns["tensor"] == tensor) & (columns["data"] == data)
        return self[int(np.flatnonzero(same)[0])] if same.any() else None

    def without(self, *, pipeline: int, tensor: int, data: int) -> Table:
        """The rows but for one (D, P, M)."""
        columns = self.columns
        same = (columns["pipeline"] == pipeline) & (columns["tensor"] == tensor) & (columns["data"] == data)
        return self.where(~same)


def as_table(rows: Sequence[Candidate]) -> Table:
    """Candidates as a table."""
    if isinstance(rows, Table):
        return rows
    return Table({name: np.array([getattr(row, name) for row in rows], dtype=np.int64) for name in COLUMNS})


def tabulate(
    spec: ServingSpec,
    *,
    memory: Sequence[int],
    workload: Workload,
    intact: Sequence[Replica],
    hit: Sequence[Replica] = (),
) -> Table:
    """Every configuration that fits `memory` (bytes of each GPU that stays), in a fixed order.

    `intact` replicas are disturbed by a change; the shapes of those that are `hit` count as running too.
    """
    shapes = {(replica.pipeline, replica.tensor) for replica in (*intact, *hit)}
    largest_first = np.array(sorted(memory, reverse=True), dtype=np.int64)
    sizes = ShardSizes(spec.model, block_tokens=spec.limits.kv_block_tokens)
    parts = [
        _rows_of_degree(spec, sizes, largest_first, workload, intact, shapes, tensor=tensor)
        for tensor in range(1, min(max_tensor_degree(spec.model), len(memory)) + 1)
    ]
    return Table({name: np.concatenate([part[name] for part in parts] or [np.zeros(0, np.int64)]) for name in COLUMNS})


def _rows_of_degree(
    spec: ServingSpec,
    sizes: ShardSizes,
    largest_first: Ints,
    workload: Workload,
    intact: Sequence[Replica],
    shapes: set[tuple[int, int]],
    *,
    tensor: int,
) -> dict[str, Ints]:
    """All columns of one tensor degree, every P and D that fit."""
    num_gpus = len(largest_first)
    stages = np.arange(1, min(spec.model.num_layers, num_gpus // tensor) + 1, dtype=np.int64)
    most_data = num_gpus // (stages * tensor)
    pipeline = np.repeat(stages, most_data)
    data = np.arange(len(pipeline), dtype=np.int64) - np.repeat(np.cumsum(most_data) - most_data, most_data) + 1
    budget = largest_first[data * pipeline * tensor - 1]
    held, block = (column[pipeline - 1] for column in _positions(spec, sizes, stages, tensor=tensor))
    least, reserve = least_kv_blocks(spec.limits), spec.limits.migration_headroom_bytes
    needs = (held + least * block).max(axis=1)
    fits = needs <= budget
    pipeline, data, budget, needs = pipeline[fits], data[fits], budget[fits], needs[fits]
    held, block = held[fits], block[fits]
    headroom = needs + reserve <= budget
    room = (budget - np.where(headroom, reserve, 0))[:, None] - held
    blocks = (np.maximum(0, room) // block).min(axis=1)
    blocks = np.maximum(least, np.minimum(blocks, most_kv_blocks(spec.limits)))
    max_running = np.maximum(1, np.minimum(spec.limits.max_running, blocks))
    # How many average sequences the KV pool really holds at once.
    tokens = max(1, workload.prompt_tokens + workload.output_tokens)
    batch = np.maximum(1, np.minimum(max_running, blocks * spec.limits.kv_block_tokens // tokens))
    latency_ms, execution_ms, throughput_rps = _times(spec, workload, data, pipeline, batch, tensor=tensor)
    gpus = data * pipeline * tensor
    return {
        "data": data,
        "pipeline": pipeline,
        "tensor": np.full_like(data, tensor),
        "max_running": max_running,
        "gpus": gpus,
        "cost_micro": gpus * round(spec.profile.compared_price_of("") * MICRO),
        "unserved": (throughput_rps < SERVES_MARGIN * workload.load_rps).astype(np.int64),
        "latency_us": np.rint(np.minimum(latency_ms * 1000, MOST_US)).astype(np.int64),
        "execution_us": np.rint(execution_ms * 1000).astype(np.int64),
        "throughput_urps": np.rint(throughput_rps * 1e6).astype(np.int64),
        "disturbed": _disturbed(intact, data, pipeline, tensor=tensor),
        "reshaped": _reshaped(shapes, pipeline, tensor=tensor),
        "headroom": headroom.astype(np.int64),
    }


def _positions(spec: ServingSpec, sizes: ShardSizes, stages: Ints, *, tensor: int) -> tuple[Ints, Ints]:
    """Weight bytes and KV cache block bytes of the positions that decide: [P, the kinds of a stage x ranks]."""
    copies = weight_copies(spec.linear)
    held, block = [], []
    for pipeline in stages.tolist():
        runs = layer_split(spec.model.num_layers, pipeline)
        # A middle stage has no more layers than the second one, which is the first of them.
        deciding = (runs[0], runs[min(1, pipeline - 1)], runs[-1])
        shards = [
            Shard(layers=run, tensor=tensor, rank=rank, first=run[0] == 0, last=run[1] == spec.model.num_layers)
            for run in deciding
            for rank in range(tensor)
        ]
        held.append([copies * sizes.weights(shard) for shard in shards])
        block.append([sizes.block(shard) for shard in shards])
    return np.array(held, dtype=np.int64), np.array(block, dtype=np.int64)


def _times(
    spec: ServingSpec, workload: Workload, data: Ints, pipeline: Ints, batch: Ints, *, tensor: int
) -> tuple[Floats, Floats, Floats]:
    """l_req in ms, l_exe of a full batch and requests per second, as `core/cost.py` has them."""
    curve = latency_curve(spec.profile, tensor=tensor)
    layers = -(-spec.model.num_layers // pipeline)
    overhead = spec.profile.stage_overhead_ms
    prompt = layers * curve.ms(max(1, workload.prompt_tokens)) + overhead
    most_rows = int(batch.max(initial=1))
    layer_ms = np.array([curve.ms(max(1, rows)) for rows in range(most_rows + 1)])

    def stage_ms(running: Ints) -> Floats:
        stage: Floats = layers * layer_ms[np.maximum(1, -(-running // pipeline))] + overhead
        return stage

    def execution_ms(running: Ints) -> Floats:
        return pipeline * prompt + workload.output_tokens * (pipeline * stage_ms(running))

    in_flight = np.minimum(batch, pipeline)
    per_token = stage_ms(batch) * pipeline / batch
    capacity = data * 1000.0 / (prompt * pipeline / in_flight + workload.output_tokens * per_token)
    is_static = spec.limits.batching == "static"
    if is_static:
        capacity = data * batch * 1000.0 / execution_ms(batch)
    running = np.ones_like(data)
    load = workload.load_rps
    if load <= 0:
        return execution_ms(running), execution_ms(batch), capacity
    share = np.zeros_like(prompt) if is_static else load / data * (prompt / 1000.0)
    execution = execution_ms(running)
    for _ in range(OCCUPANCY_ROUNDS):
        busy = load / data * (execution / 1000.0)
        crowd = busy + BUSY_DEVIATIONS * np.sqrt(busy / data)
        running = np.minimum(batch, np.maximum(1.0, np.minimum(np.ceil(crowd), 2.0**52)).astype(np.int64))
        left = 1.0 - np.minimum(MOST_PREFILL_SHARE, share * crowd / busy)
        execution = execution_ms(running) / left
    served = capacity >= SERVES_MARGIN * load
    servers = data * batch
    utilisation = np.where(served, load / capacity, 0.5)
    crowding = utilisation ** (np.sqrt(2.0 * (servers + 1)) - 1.0)
    waiting = execution * crowding / (servers * (1.0 - utilisation))
    full = execution_ms(batch)
    behind = full + 1000.0 * OVERLOAD_S * np.maximum(0.0, load / capacity - 1.0)
    return np.where(served, waiting + execution, behind), full, capacity


def _disturbed(intact: Sequence[Replica], data: Ints, pipeline: Ints, *, tensor: int) -> Ints:
    """GPUs of running replicas that a configuration does not keep as they are."""
    running = sum(len(replica.gpus) for replica in intact)
    same = np.zeros(int(pipeline.max(initial=0)) + 1, dtype=np.int64)
    for replica in intact:
        if replica.tensor == tensor and replica.pipeline < len(same):
            same[replica.pipeline] += 1
    kept: Ints = running - np.minimum(data, same[pipeline]) * pipeline * tensor
    return kept


def _reshaped(shapes: set[tuple[int, int]], pipeline: Ints, *, tensor: int) -> Ints:
    """Whether (P, M) is none that runs."""
    kept = [stages for stages, degree in shapes if degree == tensor]
    reshaped: Ints = (bool(shapes) & ~np.isin(pipeline, kept)).astype(np.int64)
    return reshaped
