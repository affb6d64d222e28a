"""The frozen picture of a cluster that a plan is made for (contracts section 5)."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Literal

from pydantic import Field

from spotserve.core.frozen import Frozen
from spotserve.core.ids import GpuId, InstanceId, ReplicaId, RequestId
from spotserve.core.slices import Shard, Slice

InstanceState = Literal["requested", "joining", "ready", "doomed", "gone"]
Market = Literal["spot", "ondemand"]

MAX_REMAINING_S = 366 * 86_400.0
"""The longest grace period that is believed."""

ENDED_STATES = frozenset({"finished", "cancelled", "failed"})
"""Request states that nothing follows."""


class Gpu(Frozen):
    """One GPU: its id, the memory budget a plan may use, and its type (empty: the profile's own device)."""

    id: GpuId
    memory_bytes: int = Field(gt=0)
    type: str = Field(default="", exclude_if=lambda gpu_type: not gpu_type)


class InstanceView(Frozen):
    """An instance as the planner sees it. `remaining_s` is the grace period left of a doomed one."""

    id: InstanceId
    state: InstanceState
    market: Market = "spot"
    gpus: tuple[Gpu, ...] = ()
    remaining_s: float | None = Field(default=None, ge=0, le=MAX_REMAINING_S)


class Stage(Frozen):
    """One pipeline stage: layers [layers[0], layers[1]) on `gpus`, one per tensor rank in rank order."""

    layers: tuple[int, int]
    gpus: tuple[GpuId, ...]


class Replica(Frozen):
    """One data-parallel pipeline. `kv_blocks` is the size of each rank's KV pool in blocks."""

    id: ReplicaId
    generation: int
    max_running: int = Field(ge=1)
    kv_blocks: int = Field(ge=0)
    stages: tuple[Stage, ...] = Field(min_length=1)

    @property
    def pipeline(self) -> int:
        """The pipeline parallel degree."""
        return len(self.stages)

    @property
    def tensor(self) -> int:
        """The tensor parallel degree."""
        return len(self.stages[0].gpus)

    @property
    def leader(self) -> GpuId:
        """Stage 0, rank 0: the rank that schedules."""
        return self.stages[0].gpus[0]

    @cached_property
    def gpus(self) -> tuple[GpuId, ...]:
        """All GPUs, stage by stage, rank by rank: mesh rank order."""
        return tuple(gpu for stage in self.stages for gpu in stage.gpus)


class Holding(Frozen):
    """Weights that one GPU holds: whole shards, and loose slices left over from an aborted plan."""

    gpu: GpuId
    shards: tuple[Shard, ...] = ()
    slices: tuple[Slice, ...] = ()


class ChoiceProgress(Frozen):
    """One choice of a request: tokens generated so far and tokens with KV in place (prompt included)."""

    choice: int = Field(ge=0)
    kv_generation: int = Field(ge=0)
    tokens: int = Field(ge=0)
    kv_tokens: int = Field(ge=0)


class RequestProgress(Frozen):
    """A live request, where it runs and how far it is."""

    request: RequestId
    replica: ReplicaId | None
    state: str
    prompt_tokens: int = Field(ge=0)
    max_tokens: int = Field(ge=0)
    choices: tuple[ChoiceProgress, ...] = ()


class World(Frozen):
    """Membership, layout and weight placement: what `snapshot_digest` covers."""

    epoch: int = Field(ge=0)
    instances: tuple[InstanceView, ...]
    replicas: tuple[Replica, ...]
    holdings: tuple[Holding, ...] = ()

    @cached_property
    def gpu_types(self) -> Mapping[GpuId, str]:
        """The type of each GPU that is said to have one."""
        return {gpu.id: gpu.type for instance in self.instances for gpu in instance.gpus if gpu.type}

    @cached_property
    def positions(self) -> Mapping[GpuId, tuple[Replica, int]]:
        """The replica that each GPU belongs to, and its mesh rank there."""
        return {gpu: (one, index) for one in reversed(self.replicas) for index, gpu in enumerate(one.gpus)}


class Snapshot(Frozen):
    """The world, and the requests in it (which the digest does not cover)."""

    world: World
    requests: tuple[RequestProgress, ...] = ()
    load_rps: float = Field(default=0.0, ge=0)
    in_bursts: bool = Field(default=False, exclude_if=lambda bursts: not bursts)
    """Whether requests come in bursts: what is paid for serves the next one instead of being given back."""
    next_epoch: int | None = Field(default=None, ge=0)
    """The first epoch that no run has used, aborted ones included; None: the one after the world's."""

    @cached_property
    def live_requests(self) -> Mapping[ReplicaId, tuple[RequestProgress, ...]]:
        """The requests of each replica that have not ended, by id."""
        live: dict[ReplicaId, list[RequestProgress]] = {}
        for progress in sorted(self.requests, key=lambda progress: progress.request):
            if progress.replica is not None and progress.state not in ENDED_STATES:
                live.setdefault(progress.replica, []).append(progress)
        return {replica: tuple(requests) for replica, requests in live.items()}
