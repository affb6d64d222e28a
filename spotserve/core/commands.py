"""What the controller wants done: the second family of values. The world carries them out and answers by events.

A command's id is `<entry sequence>.<index>`; executors answer a repeated id with the first outcome.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, TypeAdapter

from spotserve.core.frozen import Frozen
from spotserve.core.ids import InstanceId, ReplicaId, RequestId
from spotserve.core.plan import Plan, Step, Trigger
from spotserve.core.snapshot import Market, Snapshot
from spotserve.core.wire import ChoicePosition


class LaunchInstance(Frozen):
    """Bring up an instance; answered by `WorkerRegistered` events or `InstanceLost`."""

    kind: Literal["launch_instance"] = "launch_instance"
    instance: InstanceId
    market: Market = "spot"


class KillInstance(Frozen):
    """SIGKILL all of an instance; answered by `InstanceLost`."""

    kind: Literal["kill_instance"] = "kill_instance"
    instance: InstanceId
    reason: str


class SetTimer(Frozen):
    """Answered by `TimerFired` at `at_s`; setting a timer again moves it."""

    kind: Literal["set_timer"] = "set_timer"
    timer: str
    at_s: float


class TakeSnapshot(Frozen):
    """Ask every worker for its holdings and leaders for progress; answered by `SnapshotTaken`."""

    kind: Literal["take_snapshot"] = "take_snapshot"
    trigger: Trigger
    drop_loose: bool = False
    """Workers first forget weights that belong to no position: the last plan did not come about beside them."""


class SolvePlan(Frozen):
    """Answered by `PlanReady` or `PlanFailed`."""

    kind: Literal["solve_plan"] = "solve_plan"
    snapshot: Snapshot
    trigger: Trigger
    epoch_to: int
    membership: int


class DropPlan(Frozen):
    """A solution leads to no run: nothing to do, nothing fits, or (`again`) the world has changed. Not answered."""

    kind: Literal["drop_plan"] = "drop_plan"
    reason: str
    infeasible: bool = False
    again: bool = False
    failed: bool = False


class BeginRun(Frozen):
    """A plan run starts; not answered. The executor keeps the plan for the steps to come."""

    kind: Literal["begin_run"] = "begin_run"
    plan: Plan


class Admission(Frozen):
    """A request for a replica: per choice the KV that is already there (0: prefill everything)."""

    request: RequestId
    kv_generation: int
    choices: tuple[ChoicePosition, ...] = ()
    """Choices with KV in place, as the manifest names them; all others start from the ledger under `kv_generation`."""


class ExecuteStep(Frozen):
    """Carry out one step; answered by `StepDone`, `StepFailed`, or for quiesce by `Quiesced`."""

    kind: Literal["execute_step"] = "execute_step"
    epoch: int
    step: Step
    admissions: tuple[Admission, ...] = ()
    """For `activate`: the requests that move into the replica."""
    manifest: tuple[ChoicePosition, ...] = ()
    """For `copy_kv_delta`: the KV manifest of the route's old replica."""


class MakeDurable(Frozen):
    """Answered by `LedgerDurable` once the ledger has every token up to these positions."""

    kind: Literal["make_durable"] = "make_durable"
    epoch: int
    positions: tuple[ChoicePosition, ...]


class OwnerChange(Frozen):
    """From now on only (replica, generation) may append tokens of the request."""

    request: RequestId
    replica: ReplicaId | None
    generation: int


class CommitRun(Frozen):
    """The commit point: the entry that carries this is the moment the plan took effect. Not answered."""

    kind: Literal["commit_run"] = "commit_run"
    epoch: int
    owners: tuple[OwnerChange, ...]
    moved: tuple[Admission, ...]
    recomputed: tuple[RequestId, ...]


class AbortRun(Frozen):
    """Forget what was prepared; `resume` are quiesced replicas that go on decoding. Not answered."""

    kind: Literal["abort_run"] = "abort_run"
    epoch: int
    reason: str
    resume: tuple[tuple[ReplicaId, int], ...] = ()


class FinishRun(Frozen):
    """The run is released: every step done. Not answered."""

    kind: Literal["finish_run"] = "finish_run"
    epoch: int


class AdmitRequests(Frozen):
    """Hand requests to a serving replica. Not answered: `FirstToken` and `RequestEnded` tell."""

    kind: Literal["admit_requests"] = "admit_requests"
    replica: ReplicaId
    generation: int
    admissions: tuple[Admission, ...]
    again: bool = False
    """After a restart: most of them run there already, and nothing of those is recomputed."""


class FenceReplica(Frozen):
    """The generation is lost: nothing it says counts any more; survivors free it. Not answered."""

    kind: Literal["fence_replica"] = "fence_replica"
    replica: ReplicaId
    generation: int


class EndRequest(Frozen):
    """Close what is open of a request and free its KV; answered by `RequestEnded`."""

    kind: Literal["end_request"] = "end_request"
    request: RequestId
    outcome: Literal["cancelled", "failed"]
    error: str | None = None
    replica: ReplicaId | None = None
    generation: int = 0


class StopService(Frozen):
    """The drain is over: stop everything. Not answered."""

    kind: Literal["stop_service"] = "stop_service"


Command = Annotated[
    LaunchInstance
    | KillInstance
    | SetTimer
    | TakeSnapshot
    | SolvePlan
    | DropPlan
    | BeginRun
    | ExecuteStep
    | MakeDurable
    | CommitRun
    | AbortRun
    | FinishRun
    | AdmitRequests
    | FenceReplica
    | EndRequest
    | StopService,
    Field(discriminator="kind"),
]
COMMAND: TypeAdapter[Command] = TypeAdapter(Command)
