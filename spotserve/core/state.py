"""The controller's state: immutable, serialisable, and nothing in it that the journal does not determine."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property
from typing import Literal

from pydantic import Field

from spotserve.core.frozen import Frozen
from spotserve.core.ids import GpuId, InstanceId, ReplicaId, RequestId, StepId, instance_of
from spotserve.core.plan import Plan, Trigger
from spotserve.core.snapshot import Gpu, InstanceView, Market, Replica, World
from spotserve.core.spec import ServingSpec
from spotserve.core.wire import ChoicePosition

StepState = Literal["pending", "running", "late", "done"]
"""`late`: given up at the grace period's end; later steps go on without it, what it lacks is recomputed."""

TriggerKind = Literal["start", "notice", "lost", "joined", "load"]
TRIGGER_RANK: dict[str, int] = {"load": 0, "joined": 1, "start": 2, "notice": 3, "lost": 4}


RELEASE_TRIES = 5

GIVEN_BACK = "given back"
"""Why an instance that nobody needs is killed."""


class Instance(Frozen):
    """One instance; gone ones stay listed."""

    id: InstanceId
    state: str = "requested"
    market: Market = "spot"
    num_gpus: int = 0
    gpus: tuple[Gpu, ...] = ()
    deadline_at_s: float | None = None
    condemned: str | None = None
    """Why it was ordered to be killed: a coordinator that finds it alive after a restart orders it again."""


class ReplicaEntry(Frozen):
    """A replica generation and where it is in its life."""

    replica: Replica
    state: str = "preparing"


class Request(Frozen):
    """A live request. `kv_generation` names its KV; each admission that starts from the ledger raises it."""

    id: RequestId
    state: str = "queued"
    arrival_index: int
    prompt_tokens: int
    num_choices: int
    max_tokens: int
    replica: ReplicaId | None = None
    generation: int = 0
    kv_generation: int = 0
    had_token: bool = False
    deadline_at_s: float | None = None
    ending: tuple[Literal["cancelled", "failed"], str | None] | None = None
    """(outcome, error) that it was ordered to end with: ordered again after a restart."""


class PlanRun(Frozen):
    """One execution of a plan."""

    plan: Plan
    state: str = "proposed"
    begun_at_s: float
    steps: dict[StepId, StepState]
    positions: tuple[ChoicePosition, ...] = ()
    sources: dict[RequestId, ReplicaId] = {}
    """The replica on which each request of `positions` stood still."""
    moved: dict[RequestId, int] = {}
    """What the commit moved, and the `kv_generation` of each request then."""
    missing: tuple[tuple[RequestId, int], ...] = ()
    durability: Literal["wanted", "asked", "durable"] = "wanted"
    weight_bytes: int = 0
    kv_bytes: int = 0
    failed_releases: dict[StepId, int] = {}
    """Releases behind the commit that failed, and how often: each is asked for again, `RELEASE_TRIES` times in all."""

    @property
    def epoch(self) -> int:
        """The epoch that this run's commit begins."""
        return self.plan.epoch.to

    @property
    def committed(self) -> bool:
        """Whether there is no way back."""
        return self.state in ("committed", "released")


class Planning(Frozen):
    """A plan is being made: first a snapshot, then a solution."""

    phase: Literal["snapshot", "solve"]
    trigger: Trigger
    membership: int
    epoch_to: int


class Migration(Frozen):
    """One line of `status`' migrations: what a plan run did, in bytes received and verified."""

    epoch: int
    trigger: TriggerKind
    mode: str
    outcome: Literal["completed", "aborted"] | None = None
    committed_at_s: float | None = None
    estimated_s: float = 0.0
    stall_ms_max: float = 0.0
    weight_bytes: int = 0
    kv_bytes: int = 0
    recomputed_tokens: int = 0


class Disturbance(Frozen):
    """What streams suffered from a loss before the migration that answers it has its line in `status`."""

    stall_ms_max: float = 0.0
    recomputed_tokens: int = 0


class Counters(Frozen):
    """Ended requests since the journal began."""

    finished: int = 0
    failed: int = 0
    cancelled: int = 0


class ClusterState(Frozen):
    """Everything the controller knows."""

    spec: ServingSpec | None = None
    policy_version: int = 1
    """The version that decides: the spec's, until a coordinator of another one continues the journal."""
    num_instances: int = 0
    at_s: float = 0.0
    term: int = 0
    epoch: int = 0
    next_epoch: int = 1
    membership: int = 0
    next_arrival: int = 0
    instances: dict[InstanceId, Instance] = {}
    replicas: dict[ReplicaId, ReplicaEntry] = {}
    requests: dict[RequestId, Request] = {}
    counters: Counters = Counters()
    run: PlanRun | None = None
    planning: Planning | None = None
    answered: int = 0
    """The newest entry of which a planning command has its answer: what answers it, or an older one, again is late."""
    trigger: TriggerKind | None = None
    retry_at_s: float | None = None
    num_retries: int = 0
    num_plan_failures: int = 0
    infeasible: bool = False
    served: bool = False
    served_at_s: float = 0.0
    """When it served first: a trace's time counts from there."""
    patience_over: bool = False
    awaiting: tuple[RequestId, ...] = ()
    """Requests that moved and whose first token on the new owner has not been seen."""
    migrations: tuple[Migration, ...] = ()
    unattributed: Disturbance = Disturbance()
    load_rps: float = Field(default=0.0, ge=0)
    loads: tuple[tuple[float, float], ...] = ()
    """(time, rate) of the samples that count for `peak_rps`."""
    needed: int = 0
    """Instances of the layout that was last chosen among as many as it would take."""
    given_back: int = 0
    """Instances that were not needed and may be asked for again."""
    planned_load_rps: float = 0.0
    planned_for_bursts: bool = False
    stop_by_s: float | None = None
    stopped: bool = False

    @property
    def policy(self) -> str:
        """Who decides: the spec's policy."""
        return "" if self.spec is None else self.spec.policy

    def with_instance(self, instance: Instance) -> ClusterState:
        """The state with one instance replaced."""
        return self.model_copy(update={"instances": {**self.instances, instance.id: instance}})

    def with_replica(self, entry: ReplicaEntry) -> ClusterState:
        """The state with one replica replaced."""
        return self.model_copy(update={"replicas": {**self.replicas, entry.replica.id: entry}})

    def with_request(self, request: Request) -> ClusterState:
        """The state with one request replaced."""
        return self.model_copy(update={"requests": {**self.requests, request.id: request}})

    def living(self) -> tuple[Instance, ...]:
        """Instances that are not gone, in id order."""
        return tuple(i for i in self.instances.values() if i.state != "gone")

    def serving(self) -> tuple[Replica, ...]:
        """Replicas that decode."""
        return self._serving

    @cached_property
    def _serving(self) -> tuple[Replica, ...]:
        return tuple(entry.replica for entry in self.replicas.values() if entry.state == "serving")

    def used_instances(self) -> frozenset[InstanceId]:
        """Instances with a GPU of a replica that decodes."""
        return frozenset(instance_of(gpu) for replica in self.serving() for gpu in replica.gpus)

    def doomed(self, replica: Replica) -> bool:
        """Whether the replica has a GPU on an instance that will be taken."""
        return bool(self._doomed) and any(instance_of(gpu) in self._doomed for gpu in replica.gpus)

    def any_doomed(self, replicas: Iterable[Replica]) -> bool:
        """Whether one of these replicas is."""
        return bool(self._doomed) and any(self.doomed(replica) for replica in replicas)

    @cached_property
    def _doomed(self) -> frozenset[InstanceId]:
        return frozenset(name for name, instance in self.instances.items() if instance.state == "doomed")

    def requests_of(self, replica: ReplicaId, generation: int) -> tuple[Request, ...]:
        """Live requests that a replica generation owns, by arrival."""
        owned = (r for r in self.requests.values() if r.replica == replica and r.generation == generation)
        return tuple(sorted(owned, key=lambda r: r.arrival_index))


def involved(plan: Plan) -> frozenset[GpuId]:
    """Every GPU that a plan's steps or its target name."""
    gpus: set[GpuId] = {gpu for replica in plan.target.replicas for gpu in replica.gpus}
    for step in plan.steps:
        gpus.update(step_gpus(step))
    return frozenset(gpus)


def step_gpus(step: object) -> tuple[GpuId, ...]:
    """The workers that a step needs alive."""
    workers = tuple(getattr(step, "workers", ()))
    ends = tuple(getattr(step, end) for end in ("source", "destination") if hasattr(step, end))
    return workers + ends


def world_of(state: ClusterState) -> World:
    """The part of the state that a plan is made for; holdings come from the workers."""
    return World(
        epoch=state.epoch,
        instances=tuple(
            InstanceView(id=i.id, state=i.state, market=i.market, gpus=i.gpus)  # type: ignore[arg-type]
            for i in state.instances.values()
            if i.state != "gone"
        ),
        replicas=tuple(e.replica for e in state.replicas.values() if e.state in ("serving", "quiesced")),
    )
