"""The migration plan: a declarative JSON file that the solver emits, the CLI shows and the runtime executes.

Field by field this is contracts section 5. Steps form a DAG; the runtime may start a step when all it depends on is
done. Nothing secret and no wall-clock time is in a plan.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Annotated, Literal

from pydantic import Field

from spotserve.core.frozen import Frozen
from spotserve.core.ids import GpuId, InstanceId, ReplicaId, RequestId, StepId
from spotserve.core.slices import Slice
from spotserve.core.snapshot import MAX_REMAINING_S, Replica, Snapshot
from spotserve.core.spec import ServingSpec

FORMAT_VERSION = "0.1"

Mode = Literal["live", "in_place"]
Reason = Literal[
    "new_stage",
    "holder_doomed",
    "holder_alive",
    "instance_fetches",
    "no_holder",
    "ports_full",
    "request_moves",
    "replica_changes",
    "replica_retires",
    "replica_lost",
    "cut_over",
    "kv_dropped",
    "join",
    "load",
    "first_placement",
]


class EpochChange(Frozen):
    """The epoch the plan starts from and the one its commit begins."""

    from_: int = Field(alias="from", ge=0)
    to: int = Field(ge=0)


class Trigger(Frozen):
    """Why there is a plan."""

    kind: Literal["start", "notice", "lost", "joined", "load"]
    instances: tuple[InstanceId, ...] = ()
    remaining_s: float | None = Field(default=None, ge=0, le=MAX_REMAINING_S)


class KvRoute(Frozen):
    """KV of `from_replica`'s requests in a rectangle of layers x kv heads goes to `to_replica`."""

    from_replica: ReplicaId
    to_replica: ReplicaId
    layers: tuple[int, int]
    kv_heads: tuple[int, int]


class Route(Frozen):
    """Requests of `from_replica` continue on `to_replica`."""

    from_replica: ReplicaId
    to_replica: ReplicaId


class StepBase(Frozen):
    """What every step has."""

    id: StepId
    depends_on: tuple[StepId, ...] = ()
    estimated_s: float = Field(default=0.0, ge=0)
    reason: Reason
    before: str | None = None
    after: str | None = None


class Reserve(StepBase):
    """Take memory for one position of a new replica generation: weights (new ranges) and the KV pool."""

    kind: Literal["reserve"] = "reserve"
    workers: tuple[GpuId, ...] = Field(min_length=1, max_length=1)
    replica: ReplicaId
    generation: int
    stage: int
    rank: int
    bytes: int = Field(ge=0)


class CopyWeights(StepBase):
    """`destination` pulls `slices` from `source` for its position in `replica`."""

    kind: Literal["copy_weights"] = "copy_weights"
    source: GpuId
    destination: GpuId
    replica: ReplicaId
    slices: tuple[Slice, ...]
    bytes: int = Field(ge=0)


class LoadWeights(StepBase):
    """The worker reads `slices` from storage, as no holder is left (or it is the first placement)."""

    kind: Literal["load_weights"] = "load_weights"
    workers: tuple[GpuId, ...] = Field(min_length=1, max_length=1)
    replica: ReplicaId
    slices: tuple[Slice, ...]
    bytes: int = Field(ge=0)


class CopyKv(StepBase):
    """`destination` follows the filled KV blocks of a rectangle at `source` until quiesce."""

    kind: Literal["copy_kv"] = "copy_kv"
    source: GpuId
    destination: GpuId
    route: KvRoute
    bytes: int = Field(ge=0)


class JoinGroup(StepBase):
    """All ranks of a new replica generation open their mesh while the old one decodes."""

    kind: Literal["join_group"] = "join_group"
    workers: tuple[GpuId, ...]
    replica: ReplicaId
    generation: int


class Quiesce(StepBase):
    """Schedule nothing new on `replica`, drain its micro-batches, report positions."""

    kind: Literal["quiesce"] = "quiesce"
    workers: tuple[GpuId, ...] = Field(min_length=1, max_length=1)
    replica: ReplicaId
    not_before_s: float = Field(default=0.0, ge=0)
    latest_s: float | None = Field(default=None, ge=0)


class CopyKvDelta(StepBase):
    """What the KV manifest names and `copy_kv` has not brought yet."""

    kind: Literal["copy_kv_delta"] = "copy_kv_delta"
    source: GpuId
    destination: GpuId
    route: KvRoute
    bytes: int = Field(ge=0)


class Commit(StepBase):
    """The only commit point; run by the coordinator."""

    kind: Literal["commit"] = "commit"


class Activate(StepBase):
    """A new replica generation starts to serve."""

    kind: Literal["activate"] = "activate"
    workers: tuple[GpuId, ...]
    replica: ReplicaId
    generation: int


class Recompute(StepBase):
    """Requests whose KV is not moved are prefilled again from the ledger."""

    kind: Literal["recompute"] = "recompute"
    requests: tuple[RequestId, ...]


class Release(StepBase):
    """A worker frees what the old generation of `replica` held and the new layout does not need.

    `slices` are the weights to free; `kv` says that the generation's KV pool is freed with them (in_place plans also
    release weights layer by layer, the pool once). With `keep_blocks` (in_place, behind the commit) the pool shrinks
    to so many blocks, into which what its requests have moves together. One that names a new replica makes room for it:
    its worker had no position and frees weights that an aborted plan left there.
    """

    kind: Literal["release"] = "release"
    workers: tuple[GpuId, ...] = Field(min_length=1, max_length=1)
    replica: ReplicaId
    generation: int
    slices: tuple[Slice, ...] = ()
    kv: bool = True
    keep_blocks: int | None = Field(default=None, ge=0)
    bytes: int = Field(default=0, ge=0)


Step = Annotated[
    Reserve
    | CopyWeights
    | LoadWeights
    | CopyKv
    | JoinGroup
    | Quiesce
    | CopyKvDelta
    | Commit
    | Activate
    | Recompute
    | Release,
    Field(discriminator="kind"),
]


WEIGHT_KINDS = ("copy_weights", "load_weights")
KV_KINDS = ("copy_kv", "copy_kv_delta")
COPY_KINDS = ("copy_weights", *KV_KINDS)
"""Step kinds with a source and a destination."""
TRANSFER_KINDS = (*WEIGHT_KINDS, *KV_KINDS)
"""What moves bytes."""
PREPARING_KINDS = (*WEIGHT_KINDS, "copy_kv")
"""What moves bytes while the old replica decodes, if the plan is live."""


class Target(Frozen):
    """Every replica after the plan; untouched ones keep id and generation."""

    replicas: tuple[Replica, ...]


class RequestAction(Frozen):
    """What becomes of one request of an affected replica."""

    request: RequestId
    action: Literal["finish", "move", "recompute"]
    to_replica: ReplicaId | None = None


class SolverReport(Frozen):
    """Who decided, how sure, and the certificate if there is one."""

    name: str
    status: Literal["optimal", "feasible", "infeasible", "unknown"]
    objective: float = 0.0
    bound: float = 0.0
    gap: float = 0.0
    certificate: dict[str, str | int | float] | None = None
    statistics: dict[str, int | float] | None = None


class Estimates(Frozen):
    """Predicted times of the plan, seconds."""

    copy_s: float = 0.0
    stall_s: float = 0.0
    done_s: float = 0.0
    slack_s: float | None = None


class Cost(Frozen):
    """What the fleet costs before the event and after it, US dollars: every living GPU at the profile's price.

    Dollars per million tokens are those of output at the most load that the replicas take; None where none serves. A
    stop costs what the GPUs that it stops cost meanwhile.
    """

    before_usd_per_h: float = Field(ge=0)
    after_usd_per_h: float = Field(ge=0)
    before_usd_per_million_tokens: float | None = Field(default=None, ge=0)
    after_usd_per_million_tokens: float | None = Field(default=None, ge=0)
    stall_usd: float = Field(default=0.0, ge=0)


class Plan(Frozen):
    """A whole migration plan."""

    format_version: str = FORMAT_VERSION
    epoch: EpochChange
    trigger: Trigger
    mode: Mode = "live"
    policy: str
    policy_version: int
    spec: ServingSpec
    spec_digest: str
    snapshot: Snapshot
    snapshot_digest: str
    target: Target
    routes: tuple[Route, ...] = ()
    requests: tuple[RequestAction, ...] = ()
    solver: dict[str, SolverReport] = {}
    estimates: Estimates = Estimates()
    cost: Cost | None = Field(default=None, exclude_if=lambda cost: cost is None)
    """None where the profile has no price of a GPU that is paid for."""
    fallback: tuple[Literal["all_kv", "hottest_kv", "tokens_only"], ...] = ("all_kv", "hottest_kv", "tokens_only")
    applyable: bool
    complete: bool
    steps: tuple[Step, ...] = ()

    @cached_property
    def last_releases(self) -> frozenset[StepId]:
        """Of each worker and old replica the release that ends the position; in_place plans free parts of it before."""
        new = {replica.id for replica in self.target.replicas if replica.generation == self.epoch.to}
        releases = [step for step in self.steps if isinstance(step, Release) and step.replica not in new]
        return frozenset({(step.workers, step.replica): step.id for step in releases}.values())

    @cached_property
    def followed(self) -> Mapping[StepId, StepId]:
        """Of each `copy_kv_delta` the `copy_kv` that it completes: the same ends and the same rectangle."""
        copies = {(one.source, one.destination, one.route): one.id for one in self.steps if isinstance(one, CopyKv)}
        deltas = [step for step in self.steps if isinstance(step, CopyKvDelta)]
        found = ((one.id, copies.get((one.source, one.destination, one.route))) for one in deltas)
        return {delta: copy for delta, copy in found if copy is not None}

    @cached_property
    def stops(self) -> tuple[int, ...]:
        """The indices of the quiesce steps: these wait for their time as well."""
        return tuple(index for index, step in enumerate(self.steps) if isinstance(step, Quiesce))

    @cached_property
    def followers(self) -> Mapping[StepId, tuple[int, ...]]:
        """Of each step that others depend on, the indices of those and of the quiesce steps, ascending."""
        after: dict[StepId, set[int]] = {}
        for index, step in enumerate(self.steps):
            for name in step.depends_on:
                after.setdefault(name, set(self.stops)).add(index)
        return {name: tuple(sorted(indices)) for name, indices in after.items()}


class PlanningProblem(Frozen):
    """What `SolvePlan` carries to the planner process, and `spotserve plan` builds from a case."""

    spec: ServingSpec
    snapshot: Snapshot
    trigger: Trigger
    epoch_to: int
