"""What happened: frozen values that the world hands to the controller and the journal keeps.

`at_s` counts seconds from the journal's start. No event carries a prompt, text or token id.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter

from spotserve.core.frozen import Frozen
from spotserve.core.ids import GpuId, InstanceId, ReplicaId, RequestId, StepId
from spotserve.core.plan import Plan
from spotserve.core.sampling import SamplingParameters
from spotserve.core.snapshot import Holding, Market
from spotserve.core.spec import ServingSpec
from spotserve.core.wire import ChoicePosition


class EventBase(Frozen):
    """When it happened."""

    at_s: float = Field(ge=0)


class JournalBegun(EventBase):
    """The first entry: what is served, and how many instances to bring up."""

    kind: Literal["journal_begun"] = "journal_begun"
    spec: ServingSpec
    num_instances: int = Field(ge=0)
    patience_s: float = Field(default=60.0, gt=0)
    """How long the first placement waits for instances that have not joined."""


class CoordinatorRestarted(EventBase):
    """The journal is continued by a new coordinator; `workers` are those that came back within the wait."""

    kind: Literal["coordinator_restarted"] = "coordinator_restarted"
    term: int
    workers: tuple[GpuId, ...]
    num_instances: int = Field(ge=0)
    policy_version: int | None = None
    """The version that decides from here on; None in journals that were recorded before it was told: no other one."""


class InstanceWanted(EventBase):
    """A person or a trace asks for one more instance."""

    kind: Literal["instance_wanted"] = "instance_wanted"
    market: Market = "spot"


class WorkerRegistered(EventBase):
    """One GPU of an instance has dialled in."""

    kind: Literal["worker_registered"] = "worker_registered"
    instance: InstanceId
    worker: GpuId
    num_gpus: int
    memory_bytes: int
    incarnation: str
    gpu_type: str = Field(default="", exclude_if=lambda gpu_type: not gpu_type)
    """One of the profile's types; empty is the profile's own, as in journals from before there were others."""


class NoticeReceived(EventBase):
    """The cloud will take `instance` in `grace_s` seconds."""

    kind: Literal["notice_received"] = "notice_received"
    instance: InstanceId
    grace_s: float = Field(ge=0)


class NoticeWithdrawn(EventBase):
    """The cloud keeps the instance after all."""

    kind: Literal["notice_withdrawn"] = "notice_withdrawn"
    instance: InstanceId


class KillRequested(EventBase):
    """A person or a trace takes an instance without notice."""

    kind: Literal["kill_requested"] = "kill_requested"
    instance: InstanceId


class InstanceLost(EventBase):
    """The instance is no more: killed, crashed, unreachable, or never came up."""

    kind: Literal["instance_lost"] = "instance_lost"
    instance: InstanceId
    reason: str


class ReplicaBroke(EventBase):
    """A rank of the replica lost its mesh: this generation can never go on."""

    kind: Literal["replica_broke"] = "replica_broke"
    replica: ReplicaId
    generation: int
    detail: str


class RequestAccepted(EventBase):
    """A request is durable in the ledger; with this entry it is accepted."""

    kind: Literal["request_accepted"] = "request_accepted"
    request: RequestId
    prompt_tokens: int = Field(ge=1)
    num_choices: int = Field(ge=1)
    sampling: SamplingParameters
    timeout_s: float | None = None


class CancelRequested(EventBase):
    """The client went away."""

    kind: Literal["cancel_requested"] = "cancel_requested"
    request: RequestId


class FirstToken(EventBase):
    """The first durable token of a request under a replica generation."""

    kind: Literal["first_token"] = "first_token"
    request: RequestId
    replica: ReplicaId
    generation: int
    stall_ms: float = Field(default=0.0, ge=0)
    """Since the request's previous durable token, if it had one: what its stream saw."""
    recomputed_tokens: int = Field(default=0, ge=0)
    """Tokens that were prefilled a second time for this owner, because their KV was lost or left behind."""


class RequestEvicted(EventBase):
    """A leader gave a choice's KV blocks to others; it will prefill again on the same replica."""

    kind: Literal["request_evicted"] = "request_evicted"
    request: RequestId
    replica: ReplicaId
    generation: int


class RequestEnded(EventBase):
    """Every choice of the request is closed in the ledger."""

    kind: Literal["request_ended"] = "request_ended"
    request: RequestId
    outcome: Literal["finished", "cancelled", "failed"]
    tokens: tuple[int, ...]
    """Durable tokens per choice."""


class SnapshotTaken(EventBase):
    """The workers answered: what they hold and how far requests are."""

    kind: Literal["snapshot_taken"] = "snapshot_taken"
    command: str
    holdings: tuple[Holding, ...]
    positions: tuple[ChoicePosition, ...]


class PlanReady(EventBase):
    """The planner's answer."""

    kind: Literal["plan_ready"] = "plan_ready"
    command: str
    plan: Plan


class PlanFailed(EventBase):
    """The planner could not answer, or the checker refused its plan."""

    kind: Literal["plan_failed"] = "plan_failed"
    command: str
    error: str


class PlanSubmitted(EventBase):
    """A person applies a plan file that was checked and is current at `membership`."""

    kind: Literal["plan_submitted"] = "plan_submitted"
    plan: Plan
    membership: int


class StepDone(EventBase):
    """A step's executor answered. `bytes` are those received and verified by workers."""

    kind: Literal["step_done"] = "step_done"
    epoch: int
    step: StepId
    bytes: int = Field(default=0, ge=0)
    missing: tuple[tuple[RequestId, int], ...] = ()
    """(request, choice) whose KV a delta could not bring."""
    result: dict[str, Any] = {}


class StepFailed(EventBase):
    """A step's executor refused or gave up."""

    kind: Literal["step_failed"] = "step_failed"
    epoch: int
    step: StepId
    error: str


class Quiesced(EventBase):
    """A replica has drained; every token up to `positions` is on its way to the ledger."""

    kind: Literal["quiesced"] = "quiesced"
    epoch: int
    step: StepId
    replica: ReplicaId
    generation: int
    positions: tuple[ChoicePosition, ...]


class LedgerDurable(EventBase):
    """Every token up to the quiesced positions is durable; `closed` choices ended meanwhile and leave the manifest."""

    kind: Literal["ledger_durable"] = "ledger_durable"
    epoch: int
    closed: tuple[tuple[RequestId, int], ...] = ()


class LoadSampled(EventBase):
    """Arrivals per second over the last window; or as somebody `told` them, who is taken at their word."""

    kind: Literal["load_sampled"] = "load_sampled"
    load_rps: float = Field(ge=0)
    told: bool = Field(default=False, exclude_if=lambda told: not told)


class TimerFired(EventBase):
    """A timer that the controller set has run out."""

    kind: Literal["timer_fired"] = "timer_fired"
    timer: str


class StopRequested(EventBase):
    """Stop admitting, finish within `drain_s`, then stop."""

    kind: Literal["stop_requested"] = "stop_requested"
    drain_s: float = Field(ge=0)


Event = Annotated[
    JournalBegun
    | CoordinatorRestarted
    | InstanceWanted
    | WorkerRegistered
    | NoticeReceived
    | NoticeWithdrawn
    | KillRequested
    | InstanceLost
    | ReplicaBroke
    | RequestAccepted
    | CancelRequested
    | FirstToken
    | RequestEvicted
    | RequestEnded
    | SnapshotTaken
    | PlanReady
    | PlanFailed
    | PlanSubmitted
    | StepDone
    | StepFailed
    | Quiesced
    | LedgerDurable
    | LoadSampled
    | TimerFired
    | StopRequested,
    Field(discriminator="kind"),
]
EVENT: TypeAdapter[Event] = TypeAdapter(Event)
