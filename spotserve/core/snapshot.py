"""The frozen picture of a cluster that a plan is made for (contracts section 5)."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from spotserve.core.frozen import Frozen
from spotserve.core.ids import GpuId, InstanceId, ReplicaId, RequestId
from spotserve.core.slices import Shard, Slice

InstanceState = Literal["requested", "joining", "ready", "doomed", "gone"]
Market = Literal["spot", "ondemand"]


class Gpu(Frozen):
    """One GPU: its id and the memory budget a plan may use."""

    id: GpuId
    memory_bytes: int = Field(gt=0)


class InstanceView(Frozen):
    """An instance as the planner sees it. `remaining_s` is the grace period left of a doomed one."""

    id: InstanceId
    state: InstanceState
    market: Market = "spot"
    gpus: tuple[Gpu, ...] = ()
    remaining_s: float | None = None


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

    @property
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

    choice: int
    kv_generation: int
    tokens: int
    kv_tokens: int


class RequestProgress(Frozen):
    """A live request, where it runs and how far it is."""

    request: RequestId
    replica: ReplicaId | None
    state: str
    prompt_tokens: int
    max_tokens: int
    choices: tuple[ChoiceProgress, ...] = ()


class World(Frozen):
    """Membership, layout and weight placement: what `snapshot_digest` covers."""

    epoch: int
    instances: tuple[InstanceView, ...]
    replicas: tuple[Replica, ...]
    holdings: tuple[Holding, ...] = ()


class Snapshot(Frozen):
    """The world, and the requests in it (which the digest does not cover)."""

    world: World
    requests: tuple[RequestProgress, ...] = ()
    load_rps: float = Field(default=0.0, ge=0)
    next_epoch: int | None = None
    """The first epoch that no run has used, aborted ones included; None: the one after the world's."""
