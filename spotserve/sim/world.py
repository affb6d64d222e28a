"""A cluster in virtual time: the same controller, an event heap instead of machines.

Every fault is cheap here. Leaders produce one token per running choice and iteration; a token's value is a function of
(request, choice, position), so a gap, a double or a token of a fenced owner is seen at once. Planning is a function
passed in (the real solver or a fake).
"""

from __future__ import annotations

import heapq
import random
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from spotserve.core import commands as cmd
from spotserve.core import events as ev
from spotserve.core.ids import GpuId, InstanceId, ReplicaId, RequestId, StepId, instance_of
from spotserve.core.plan import CopyKvDelta, Plan, PlanningProblem, Release, Step
from spotserve.core.sampling import SamplingParameters
from spotserve.core.slices import Shard, stage_shard
from spotserve.core.snapshot import Holding, Replica
from spotserve.core.spec import ServingSpec
from spotserve.core.state import ClusterState, step_gpus
from spotserve.core.wire import ChoicePosition
from spotserve.errors import InfeasibleError, InvariantError, SpotServeError

Owner = tuple[ReplicaId, int]


def virtual_token(request: RequestId, choice: int, position: int) -> int:
    """The one right token at a position."""
    return zlib.crc32(f"{request}/{choice}/{position}".encode())


@dataclass(slots=True)
class VirtualRequest:
    """What the virtual ledger keeps of one request."""

    request: RequestId
    prompt_tokens: int
    max_tokens: int
    num_choices: int
    owner: Owner | None = None
    tokens: dict[int, list[int]] = field(default_factory=dict)
    recomputed: int = 0
    last_token_s: float | None = None
    stall_s: float = 0.0
    first_by: set[Owner] = field(default_factory=set)
    ended: str | None = None


@dataclass(slots=True)
class VirtualReplica:
    """A replica generation: who runs on it and whether it may."""

    replica: Replica
    state: str = "prepared"
    running: dict[RequestId, int] = field(default_factory=dict)
    """request -> iterations of prefill still to do."""
    kv_generation: dict[RequestId, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class VirtualRates:
    """How fast the virtual machines are."""

    join_s: float = 1.0
    solve_s: float = 0.05
    iteration_s: float = 0.02
    step_s: float = 0.01
    commit_s: float = 0.02
    link_bytes_per_s: float = 1e8
    jitter: float = 0.5


class VirtualWorld:
    """A `World` whose clock jumps to the next thing that happens."""

    def __init__(
        self,
        spec: ServingSpec,
        planner: Callable[[PlanningProblem], Plan],
        *,
        seed: int,
        gpus_per_instance: int = 1,
        gpu_memory_bytes: int,
        rates: VirtualRates | None = None,
        duplicate_share: float = 0.0,
        failure_share: float = 0.0,
    ) -> None:
        self.spec = spec
        self.planner = planner
        self.random = random.Random(seed)
        self.rates = rates if rates is not None else VirtualRates()
        self.gpus_per_instance = gpus_per_instance
        self.gpu_memory_bytes = gpu_memory_bytes
        self.duplicate_share = duplicate_share
        self.failure_share = failure_share
        self.at_s = 0.0
        self.until_s = float("inf")
        self.alive: set[InstanceId] = set()
        self.replicas: dict[Owner, VirtualReplica] = {}
        self.requests: dict[RequestId, VirtualRequest] = {}
        self.holdings: dict[GpuId, dict[Owner, Shard]] = {}
        self.plans: dict[int, Plan] = {}
        self.brought: dict[tuple[int, StepId], set[tuple[RequestId, int]]] = {}
        """What each `copy_kv_delta` of an epoch brought."""
        self.fenced: set[Owner] = set()
        self.aborted: set[int] = set()
        self.submitted: set[str] = set()
        self._heap: list[tuple[float, int, Callable[[], ev.Event | None], bool]] = []
        self._events_left: int | None = None
        self._count = 0
        self._timers: dict[str, int] = {}

    # The world's two verbs

    async def next_events(self) -> Sequence[ev.Event]:
        """The next thing that happens; empty when nothing is left or time is up."""
        if self._events_left == 0:
            return []
        while self._heap and self._heap[0][0] <= self.until_s:
            at_s, _, happen, _ = heapq.heappop(self._heap)
            self.at_s = max(self.at_s, at_s)
            event = happen()
            if event is None:
                continue
            if self.random.random() < self.duplicate_share and event.kind not in _NOT_REPEATED:
                self._repeat(event)
            if self._events_left is not None:
                self._events_left -= 1
            return [event]
        return []

    def _repeat(self, event: ev.Event) -> None:
        """Deliver a message a second time, late."""
        self.after(self.random.uniform(0.0, 0.5), lambda: event.model_copy(update={"at_s": self.at_s}))

    def submit(self, command_id: str, command: cmd.Command) -> None:
        """Begin to carry out a command; a repeated id is ignored."""
        if command_id in self.submitted or self._events_left == 0:
            return
        self.submitted.add(command_id)
        handler = getattr(self, f"_{command.kind}", None)
        if handler is not None:
            handler(command_id, command)

    # For tests and scenarios

    def crash_coordinator_after(self, num_events: int) -> None:
        """The coordinator dies once this many events are journaled; the last one's commands are never given."""
        self._events_left = num_events

    def restart_coordinator(self, state: ClusterState, *, num_instances: int) -> None:
        """A new coordinator on the folded state: its predecessor's timers and answers are gone, workers live on."""
        self._events_left = None
        self._heap = [item for item in self._heap if item[3]]
        heapq.heapify(self._heap)
        self._timers.clear()
        self.submitted.clear()
        workers = tuple(sorted(gpu for gpu in self.holdings if instance_of(gpu) in self.alive))
        term = state.term + 1
        self.after(
            0.0,
            lambda: ev.CoordinatorRestarted(at_s=self.at_s, term=term, workers=workers, num_instances=num_instances),
        )
        for gpu in workers:
            self.after(0.001, lambda gpu=gpu: self._registration(gpu, "again"))  # type: ignore[misc]
        for instance in state.living():
            if instance.state != "requested" and instance.id not in self.alive:
                self.after(0.002, lambda name=instance.id: self._loss(name, "absent"))  # type: ignore[misc]
        self._adopt_replicas(state)
        self._adopt_requests(state)

    def _adopt_replicas(self, state: ClusterState) -> None:
        """Broken ones are told; one that quiesced for a run the fold knows nothing of goes on."""
        for entry in state.replicas.values():
            owner = (entry.replica.id, entry.replica.generation)
            virtual = self.replicas.get(owner)
            if entry.state in ("serving", "quiesced") and (virtual is None or virtual.state == "dead"):
                self.after(0.003, lambda owner=owner: self._breakage(owner))  # type: ignore[misc]
            elif entry.state == "serving" and virtual is not None and virtual.state == "quiesced":
                self._abort_run("", cmd.AbortRun(epoch=-1, reason="restart", resume=(owner,)))

    def _adopt_requests(self, state: ClusterState) -> None:
        """Owners come from the fold; ends that were not journaled are told again."""
        for request in self.requests.values():
            folded = state.requests.get(request.request)
            if folded is None:
                continue
            request.owner = None if folded.replica is None else (folded.replica, folded.generation)
            if request.ended is not None:
                outcome, request.ended = request.ended, None
                self.after(0.01, lambda r=request, o=outcome: self._end(r, o))  # type: ignore[misc]

    def _registration(self, worker: GpuId, incarnation: str) -> ev.Event:
        return ev.WorkerRegistered(
            at_s=self.at_s,
            instance=instance_of(worker),
            worker=worker,
            num_gpus=self.gpus_per_instance,
            memory_bytes=self.gpu_memory_bytes,
            incarnation=incarnation,
        )

    def _loss(self, instance: InstanceId, reason: str) -> ev.Event:
        return ev.InstanceLost(at_s=self.at_s, instance=instance, reason=reason)

    def _breakage(self, owner: Owner) -> ev.Event:
        return ev.ReplicaBroke(at_s=self.at_s, replica=owner[0], generation=owner[1], detail="absent")

    def after(self, delay_s: float, happen: Callable[[], ev.Event | None], *, survives: bool = True) -> int:
        """Let something happen `delay_s` from now; a coordinator's own affairs do not survive its death."""
        self._count += 1
        heapq.heappush(self._heap, (self.at_s + delay_s, self._count, happen, survives))
        return self._count

    def at(self, at_s: float, make: Callable[[float], ev.Event]) -> None:
        """Schedule an event at an absolute time."""
        self.after(max(0.0, at_s - self.at_s), lambda: make(self.at_s))

    def request(
        self, at_s: float, *, name: str, prompt_tokens: int = 20, max_tokens: int = 30, num_choices: int = 1
    ) -> None:
        """Schedule a request."""
        request = RequestId(name)

        def accept() -> ev.Event:
            self.requests[request] = VirtualRequest(request, prompt_tokens, max_tokens, num_choices)
            return ev.RequestAccepted(
                at_s=self.at_s,
                request=request,
                prompt_tokens=prompt_tokens,
                num_choices=num_choices,
                sampling=SamplingParameters(seed=0, max_tokens=max_tokens),
            )

        self.after(max(0.0, at_s - self.at_s), accept)

    def crash(self, instance: InstanceId) -> None:
        """An instance dies now, unannounced; the failure detector tells a little later."""
        self.alive.discard(instance)
        for virtual in self.replicas.values():
            if any(instance_of(gpu) == instance for gpu in virtual.replica.gpus):
                virtual.state = "dead"
        for gpu in [gpu for gpu in self.holdings if instance_of(gpu) == instance]:
            del self.holdings[gpu]

    # Commands

    def _launch_instance(self, command_id: str, command: cmd.LaunchInstance) -> None:
        def join(index: int) -> ev.Event:
            self.alive.add(command.instance)
            worker = GpuId(f"{command.instance}/{index}")
            self.holdings.setdefault(worker, {})
            return self._registration(worker, command_id)

        for index in range(self.gpus_per_instance):
            self.after(self._spread(self.rates.join_s), lambda index=index: join(index))  # type: ignore[misc]

    def _kill_instance(self, command_id: str, command: cmd.KillInstance) -> None:
        self.crash(command.instance)
        self.after(
            self._spread(self.rates.step_s),
            lambda: self._loss(command.instance, command.reason),
        )

    def _set_timer(self, command_id: str, command: cmd.SetTimer) -> None:
        def fire() -> ev.Event | None:
            if self._timers.get(command.timer) != count:
                return None
            return ev.TimerFired(at_s=self.at_s, timer=command.timer)

        count = self.after(max(0.0, command.at_s - self.at_s), fire, survives=False)
        self._timers[command.timer] = count

    def _take_snapshot(self, command_id: str, command: cmd.TakeSnapshot) -> None:
        def answer() -> ev.Event:
            holdings = tuple(
                Holding(gpu=gpu, shards=tuple(dict.fromkeys(shards.values())))
                for gpu, shards in sorted(self.holdings.items())
                if instance_of(gpu) in self.alive
            )
            positions = tuple(p for v in self.replicas.values() if v.state == "serving" for p in self._positions(v))
            return ev.SnapshotTaken(at_s=self.at_s, command=command_id, holdings=holdings, positions=positions)

        self.after(self._spread(self.rates.step_s), answer, survives=False)

    def _solve_plan(self, command_id: str, command: cmd.SolvePlan) -> None:
        def answer() -> ev.Event:
            problem = PlanningProblem(
                spec=self.spec, snapshot=command.snapshot, trigger=command.trigger, epoch_to=command.epoch_to
            )
            try:
                return ev.PlanReady(at_s=self.at_s, command=command_id, plan=self.planner(problem))
            except InfeasibleError as error:
                return ev.PlanFailed(at_s=self.at_s, command=command_id, error=str(error))

        self.after(self._spread(self.rates.solve_s), answer, survives=False)

    def _begin_run(self, command_id: str, command: cmd.BeginRun) -> None:
        self.plans[command.plan.epoch.to] = command.plan
        for replica in command.plan.target.replicas:
            if replica.generation == command.plan.epoch.to:
                self.replicas[replica.id, replica.generation] = VirtualReplica(replica)

    def _execute_step(self, command_id: str, command: cmd.ExecuteStep) -> None:
        step = command.step
        size = getattr(step, "bytes", 0)
        duration_s = self._spread(self.rates.step_s + size / self.rates.link_bytes_per_s)
        self.after(duration_s, lambda: self._step_outcome(command), survives=self.random.random() < 0.5)

    def _step_outcome(self, command: cmd.ExecuteStep) -> ev.Event | None:
        step = command.step
        if any(instance_of(gpu) not in self.alive for gpu in step_gpus(step)):
            return None
        if self.random.random() < self.failure_share:
            return ev.StepFailed(at_s=self.at_s, epoch=command.epoch, step=step.id, error="drawn by the seed")
        if step.kind == "quiesce":
            # A leader takes its commands in order: the resume of an abort comes after the quiesce it undoes.
            return None if command.epoch in self.aborted else self._quiesce(command, step.replica)
        if step.kind == "activate":
            return self._activate(command)
        if step.kind == "reserve":
            self._hold(command.epoch, step.workers[0], step.replica, step.stage, step.rank)
        if step.kind == "release" and self._is_last_release(command.epoch, step):
            for gpu in step.workers:
                self.holdings[gpu].pop((step.replica, step.generation), None)
        missing = tuple((p.request, p.choice) for p in command.manifest if self._gone(step, p.request))
        if step.kind == "copy_kv_delta":
            brought = {(p.request, p.choice) for p in command.manifest} - set(missing)
            self.brought[command.epoch, step.id] = brought
        return ev.StepDone(
            at_s=self.at_s, epoch=command.epoch, step=step.id, bytes=getattr(step, "bytes", 0), missing=missing
        )

    def _is_last_release(self, epoch: int, step: Release) -> bool:
        """Whether the position ends; in_place plans free parts of it before."""
        releases = [s for s in self.plans[epoch].steps if isinstance(s, Release) and s.workers == step.workers]
        return [s.id for s in releases if s.replica == step.replica][-1] == step.id

    def _gone(self, step: Step, request: RequestId) -> bool:
        return self.requests[request].ended is not None

    def _hold(self, epoch: int, gpu: GpuId, replica: ReplicaId, stage: int, rank: int) -> None:
        target = self.replicas[replica, epoch].replica
        shard = stage_shard(self.spec.model, layers=target.stages[stage].layers, tensor=target.tensor, rank=rank)
        self.holdings[gpu][replica, epoch] = shard

    def _quiesce(self, command: cmd.ExecuteStep, replica: ReplicaId) -> ev.Event | None:
        virtual = next((v for v in self.replicas.values() if v.replica.id == replica and v.state == "serving"), None)
        if virtual is None:
            return None
        virtual.state = "quiesced"
        return ev.Quiesced(
            at_s=self.at_s,
            epoch=command.epoch,
            step=command.step.id,
            replica=replica,
            generation=virtual.replica.generation,
            positions=self._positions(virtual),
        )

    def _positions(self, virtual: VirtualReplica) -> tuple[ChoicePosition, ...]:
        positions = []
        for name, prefill in virtual.running.items():
            request = self.requests[name]
            for choice in range(request.num_choices):
                tokens = len(request.tokens.get(choice, []))
                kv_tokens = 0 if prefill else request.prompt_tokens + max(0, tokens - 1)
                positions.append(
                    ChoicePosition(
                        request=name,
                        choice=choice,
                        kv_generation=virtual.kv_generation[name],
                        tokens=tokens,
                        kv_tokens=kv_tokens,
                    )
                )
        return tuple(positions)

    def _activate(self, command: cmd.ExecuteStep) -> ev.Event | None:
        step = command.step
        assert step.kind == "activate"
        virtual = self.replicas.get((step.replica, step.generation))
        if virtual is None or virtual.state == "dead":
            return None
        if virtual.state == "prepared":
            virtual.state = "serving"
            self._start(virtual, command.admissions)
            self.after(self._spread(self.rates.iteration_s), lambda: self._iterate(virtual))
        return ev.StepDone(at_s=self.at_s, epoch=command.epoch, step=step.id)

    def _start(self, virtual: VirtualReplica, admissions: Sequence[cmd.Admission]) -> None:
        for admission in admissions:
            request = self.requests[admission.request]
            if request.ended is not None or admission.request in virtual.running:
                continue
            kept = {p.choice for p in admission.choices if p.kv_tokens}
            self._check_brought(virtual, admission.request, kept)
            moved = len(kept) == request.num_choices
            if not moved and request.tokens:
                request.recomputed += request.prompt_tokens
            virtual.running[admission.request] = 0 if moved else 1 + request.prompt_tokens // 64
            virtual.kv_generation[admission.request] = admission.kv_generation

    def _check_brought(self, virtual: VirtualReplica, request: RequestId, choices: set[int]) -> None:
        """A leader is told of no KV that some copy has not brought."""
        for epoch, plan in self.plans.items():
            if epoch in self.aborted:
                continue  # What it copied counts for nothing; the run behind it copies again.
            for step in plan.steps:
                if not isinstance(step, CopyKvDelta) or step.route.to_replica != virtual.replica.id:
                    continue
                sources = [v for v in self.replicas.values() if v.replica.id == step.route.from_replica]
                brought = {choice for name, choice in self.brought.get((epoch, step.id), ()) if name == request}
                if any(request in v.running for v in sources) and not choices <= brought:
                    raise InvariantError(
                        f"{virtual.replica.id} is told of KV of {request} that {step.id} did not bring"
                    )

    def _make_durable(self, command_id: str, command: cmd.MakeDurable) -> None:
        def answer() -> ev.Event:
            closed = tuple(
                (p.request, p.choice) for p in command.positions if self.requests[p.request].ended is not None
            )
            return ev.LedgerDurable(at_s=self.at_s, epoch=command.epoch, closed=closed)

        self.after(self._spread(self.rates.step_s), answer, survives=False)

    def _commit_run(self, command_id: str, command: cmd.CommitRun) -> None:
        for change in command.owners:
            owner = None if change.replica is None else (change.replica, change.generation)
            self.requests[change.request].owner = owner

    def _abort_run(self, command_id: str, command: cmd.AbortRun) -> None:
        self.aborted.add(command.epoch)
        for owner, virtual in tuple(self.replicas.items()):
            if owner[1] == command.epoch:
                virtual.state = "dead"
        for owner in command.resume:
            virtual = self.replicas[owner]
            if virtual.state == "quiesced":
                virtual.state = "serving"
                self.after(self.rates.iteration_s, lambda v=virtual: self._iterate(v))  # type: ignore[misc]

    def _fence_replica(self, command_id: str, command: cmd.FenceReplica) -> None:
        owner = (command.replica, command.generation)
        self.fenced.add(owner)
        if owner in self.replicas:
            self.replicas[owner].state = "dead"

    def _admit_requests(self, command_id: str, command: cmd.AdmitRequests) -> None:
        owner = (command.replica, command.generation)
        for admission in command.admissions:
            self.requests[admission.request].owner = owner
        virtual = self.replicas[owner]
        self._start(virtual, command.admissions)

    def _end_request(self, command_id: str, command: cmd.EndRequest) -> None:
        request = self.requests[command.request]
        self.after(0.0, lambda: self._end(request, command.outcome))

    def _end(self, request: VirtualRequest, outcome: str) -> ev.Event | None:
        if request.ended is not None:
            return None
        request.ended = outcome
        for virtual in self.replicas.values():
            virtual.running.pop(request.request, None)
        tokens = tuple(len(request.tokens.get(choice, [])) for choice in range(request.num_choices))
        return ev.RequestEnded.model_validate(
            {"at_s": self.at_s, "request": request.request, "outcome": outcome, "tokens": tokens}
        )

    # Decoding

    def _iterate(self, virtual: VirtualReplica) -> ev.Event | None:
        """One iteration of a replica; what it tells the controller are first tokens and ends."""
        if virtual.state != "serving":
            return None
        self.after(self._spread(self.rates.iteration_s), lambda: self._iterate(virtual))
        owner = (virtual.replica.id, virtual.replica.generation)
        for name in list(virtual.running)[: virtual.replica.max_running]:
            if virtual.running[name]:
                virtual.running[name] -= 1
                continue
            request = self.requests[name]
            if request.owner != owner or owner in self.fenced:
                raise InvariantError(f"{owner} runs {name}, which belongs to {request.owner}")
            for event in self._append(request, owner):
                # The ledger's commit lies between a token and what the controller hears of it.
                self.after(self._spread(self.rates.commit_s), lambda event=event: event)  # type: ignore[misc]
        return None

    def _append(self, request: VirtualRequest, owner: Owner) -> list[ev.Event]:
        for choice in range(request.num_choices):
            tokens = request.tokens.setdefault(choice, [])
            if len(tokens) < request.max_tokens:
                tokens.append(virtual_token(request.request, choice, len(tokens)))
        stall_s = 0.0 if request.last_token_s is None else self.at_s - request.last_token_s
        request.stall_s = max(request.stall_s, stall_s)
        request.last_token_s = self.at_s
        events: list[ev.Event] = []
        if owner not in request.first_by:
            request.first_by.add(owner)
            events.append(self._first_token(request, owner, stall_s))
        if all(len(tokens) >= request.max_tokens for tokens in request.tokens.values()):
            ended = self._end(request, "finished")
            if ended is not None:
                events.append(ended)
        return events

    def _first_token(self, request: VirtualRequest, owner: Owner, stall_s: float) -> ev.Event:
        recomputed, request.recomputed = request.recomputed, 0
        return ev.FirstToken(
            at_s=self.at_s,
            request=request.request,
            replica=owner[0],
            generation=owner[1],
            stall_ms=1000 * stall_s,
            recomputed_tokens=recomputed,
        )

    def _spread(self, mean_s: float) -> float:
        return mean_s * self.random.uniform(1 - self.rates.jitter, 1 + self.rates.jitter)


_NOT_REPEATED = ("journal_begun", "instance_wanted", "request_accepted", "stop_requested", "plan_submitted")


def check_streams(world: VirtualWorld) -> None:
    """Every request ended, its tokens the right ones, complete and once. Raises SpotServeError naming the request."""
    for name, request in world.requests.items():
        if request.ended is None:
            raise SpotServeError(f"request {name} never ended")
        for choice, tokens in request.tokens.items():
            expected = [virtual_token(name, choice, position) for position in range(len(tokens))]
            if tokens != expected or (request.ended == "finished" and len(tokens) != request.max_tokens):
                raise SpotServeError(f"request {name} choice {choice} has {len(tokens)} tokens, some wrong")
