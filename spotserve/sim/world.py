"""A cluster in virtual time: the same controller, an event heap instead of machines.

Workers, their links and the ledger outlive the coordinator. A leader samples ahead of the ledger as in the live system;
tokens travel to it over the leader's link, and it refuses those of anybody who does not own the request. Planning is a
function passed in (the real solver or a fake), and what goes wrong is asked of a `Faults`.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence

from spotserve.core import commands as cmd
from spotserve.core import events as ev
from spotserve.core.ids import GpuId, InstanceId, RequestId, entry_of, instance_of
from spotserve.core.plan import Plan, PlanningProblem
from spotserve.core.sampling import SamplingParameters
from spotserve.core.snapshot import Holding
from spotserve.core.spec import ServingSpec
from spotserve.core.state import ClusterState
from spotserve.core.verdict import blocking, findings_of
from spotserve.errors import InfeasibleError, SpotServeError
from spotserve.sim.faults import Faults
from spotserve.sim.streams import Owner, virtual_token
from spotserve.sim.virtual_leaders import VirtualReplica
from spotserve.sim.virtual_ledger import VirtualRequest
from spotserve.sim.virtual_memory import VirtualGpu
from spotserve.sim.virtual_timeline import VirtualRates
from spotserve.sim.virtual_workers import VirtualWorkers

RECONNECT_S = 3.0
"""A worker whose process lives may be out of reach this long before its instance counts as lost."""
REJOIN_S = 8.0
"""How long a restarted coordinator waits for the workers of its predecessor."""
PROBE_TIMEOUT_S = 3.0


class VirtualWorld(VirtualWorkers):
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
        faults: Faults | None = None,
    ) -> None:
        super().__init__(
            spec,
            seed=seed,
            rates=rates if rates is not None else VirtualRates(),
            faults=faults if faults is not None else Faults(),
            failure_share=failure_share,
        )
        self.planner = planner
        self.gpus_per_instance = gpus_per_instance
        self.gpu_memory_bytes = gpu_memory_bytes
        self.duplicate_share = duplicate_share
        self.until_s = float("inf")
        self.dead: set[InstanceId] = set()
        self.told_lost: set[InstanceId] = set()
        self.refused_plans: list[str] = []
        """What the checker had against plans that were as the planner made them."""
        self.submitted: set[str] = set()
        self.stopped = False
        """Whether the service has come to its end."""
        self._is_stopping = False
        self._num_arrivals = 0
        self._events_left: int | None = None
        self._timers: dict[str, int] = {}

    # The world's two verbs

    async def next_events(self) -> Sequence[ev.Event]:
        """The next thing that happens; empty when nothing is left or time is up."""
        if self._events_left == 0 or self.stopped:
            return []
        while self._heap and self._heap[0][0] <= self.until_s:
            event = self._happen()
            if event is None or self._is_held_up(event):
                continue
            if self._events_left is not None:
                self._events_left -= 1
            return [event]
        return []

    def _happen(self) -> ev.Event | None:
        at_s, _, happen, _ = heapq.heappop(self._heap)
        self.at_s = max(self.at_s, at_s)
        return happen()

    def _is_held_up(self, event: ev.Event) -> bool:
        """Whether an event comes later; one may also come a second time."""
        if event.kind in _NOT_REPEATED:
            return False
        if self.random.random() < self.duplicate_share or self.faults.is_doubled(event):
            self._again(event, self.random.uniform(0.0, 0.5))
        late_s = self.faults.lateness_s(event)
        if late_s:
            self._again(event, late_s)
        return late_s > 0

    def _again(self, event: ev.Event, delay_s: float) -> None:
        """Deliver a message later than it came: the controller's clock is that of its delivery."""
        self.after(delay_s, lambda: event.model_copy(update={"at_s": self.at_s}), survives=False)

    def submit(self, command_id: str, command: cmd.Command) -> None:
        """Begin to carry out a command; a repeated id is ignored."""
        if command_id in self.submitted or self._events_left == 0:
            return
        self.submitted.add(command_id)
        self.last_entry = entry_of(command_id)
        self.faults.given(command)
        handler = getattr(self, f"_{command.kind}", None)
        if handler is not None:
            handler(command_id, command)

    # For tests and scenarios

    def crash_coordinator_after(self, num_events: int) -> None:
        """The coordinator dies once this many events are journaled; the last one's commands are never given."""
        self._events_left = num_events

    def pass_without_coordinator(self, seconds: float) -> None:
        """The coordinator is dead for a while: workers go on, clients come back later, notices wait at the workers."""
        self._forget_coordinator()
        self._is_down = True
        until_s = self.at_s + seconds
        waiting: list[ev.Event] = []
        while self._heap and self._heap[0][0] <= until_s:
            event = self._happen()
            if event is not None and event.kind not in _MISSED:
                waiting.append(event)
        self.at_s = until_s
        self._is_down = False
        for event in waiting:
            self.after(0.01, lambda event=event: self._as_told_now(event))  # type: ignore[misc]

    def _as_told_now(self, event: ev.Event) -> ev.Event:
        update: dict[str, float] = {"at_s": self.at_s}
        if isinstance(event, ev.NoticeReceived):
            update["grace_s"] = max(0.0, event.at_s + event.grace_s - self.at_s)
        return event.model_copy(update=update)

    def restart_coordinator(self, state: ClusterState, *, num_instances: int) -> None:
        """A new coordinator on the folded state: its predecessor's timers and answers are gone, workers live on."""
        self._forget_coordinator()
        self._events_left = None
        self.stopped = self._is_stopping = False
        self.num_restarts += 1
        self.submitted.clear()
        joined = [gpu for gpu in self.gpus if instance_of(gpu) in self.alive - self.told_lost]
        workers = tuple(sorted(gpu for gpu in joined if self._link_of(gpu).open_at_s <= self.at_s + REJOIN_S))
        term = state.term + 1
        self.after(
            0.0,
            lambda: ev.CoordinatorRestarted(at_s=self.at_s, term=term, workers=workers, num_instances=num_instances),
        )
        for gpu in workers:
            self.after(0.001, lambda gpu=gpu: self._registration(gpu, "again"))  # type: ignore[misc]
        back = {instance_of(gpu) for gpu in workers}
        for instance in state.living():
            if instance.state != "requested" and instance.id not in back:
                self.after(0.002, lambda name=instance.id: self.lose(name, "absent"))  # type: ignore[misc]
        self.ledger.forget_unjournaled(state.requests)
        self._adopt_replicas(state)
        self._adopt_requests(state)
        self.ledger.read_all()

    def _forget_coordinator(self) -> None:
        self._heap = [item for item in self._heap if item[3]]
        heapq.heapify(self._heap)
        self._timers.clear()

    def _adopt_replicas(self, state: ClusterState) -> None:
        """Broken ones are told; one that quiesced for a run the fold knows nothing of goes on."""
        entries = [entry for entry in state.replicas.values() if entry.state != "lost"]
        self.current = {(entry.replica.id, entry.replica.generation) for entry in entries}
        self._free_unknown()
        for entry in state.replicas.values():
            owner = (entry.replica.id, entry.replica.generation)
            virtual = self.replicas.get(owner)
            if entry.state in ("serving", "quiesced") and (virtual is None or virtual.state in ("dead", "prepared")):
                self.after(0.003, lambda owner=owner: self._breakage(owner))  # type: ignore[misc]
            elif entry.state == "serving" and virtual is not None and virtual.state == "quiesced":
                self.down([virtual.leader], lambda v=virtual: self._resume(v))  # type: ignore[misc]

    def _adopt_requests(self, state: ClusterState) -> None:
        """Owners come from the fold, leaders send again what the ledger lacks, unjournaled ends are told again."""
        for request in tuple(self.requests.values()):
            folded = state.requests.get(request.request)
            if folded is None:
                continue
            request.owner = None if folded.replica is None else (folded.replica, folded.generation)
            if request.ended is None and request.is_complete:
                self.ledger.end(request, "finished")
            if request.ended is not None:
                self.after(0.01, lambda r=request: self._ending(r), survives=False)  # type: ignore[misc]
        for virtual in self.replicas.values():
            if virtual.state in ("serving", "quiesced"):
                self.down([virtual.leader], lambda v=virtual: self._send_again(v))  # type: ignore[misc]

    def _registration(self, worker: GpuId, incarnation: str) -> ev.Event | None:
        if instance_of(worker) not in self.alive:
            return None
        return ev.WorkerRegistered(
            at_s=self.at_s,
            instance=instance_of(worker),
            worker=worker,
            num_gpus=self.gpus_per_instance,
            memory_bytes=self.gpu_memory_bytes,
            incarnation=incarnation,
        )

    def lose(self, instance: InstanceId, reason: str) -> ev.Event:
        """What the failure detector tells; a process that lives on all the same is a zombie."""
        self.told_lost.add(instance)
        return ev.InstanceLost(at_s=self.at_s, instance=instance, reason=reason)

    def _breakage(self, owner: Owner) -> ev.Event:
        return ev.ReplicaBroke(at_s=self.at_s, replica=owner[0], generation=owner[1], detail="absent")

    def request(
        self,
        at_s: float,
        *,
        name: str,
        prompt_tokens: int = 20,
        max_tokens: int = 30,
        num_choices: int = 1,
        lengths: tuple[int, ...] = (),
        timeout_s: float | None = None,
        reads_late: bool = False,
    ) -> None:
        """Schedule a request; without `lengths` every choice goes on to `max_tokens`."""
        request = RequestId(name)
        ends = lengths if lengths else (max_tokens,) * num_choices

        def accept() -> ev.Event | None:
            if self._is_down or self._is_stopping:
                self.after(1.0, accept)  # Nobody answered: the client tries again.
                return None
            self._num_arrivals += 1
            self.requests[request] = VirtualRequest(
                request, prompt_tokens, max_tokens, ends, self._num_arrivals, reads_late=reads_late
            )
            return ev.RequestAccepted(
                at_s=self.at_s,
                request=request,
                prompt_tokens=prompt_tokens,
                num_choices=len(ends),
                sampling=SamplingParameters(seed=0, max_tokens=max_tokens),
                timeout_s=timeout_s,
            )

        self.after(max(0.0, at_s - self.at_s), accept)

    def crash(self, instance: InstanceId) -> None:
        """An instance dies now, unannounced; the failure detector tells a little later."""
        if instance not in self.alive:
            return
        self.alive.discard(instance)
        self.dead.add(instance)
        for virtual in tuple(self.replicas.values()):
            if virtual.sits_on(instance) and virtual.state != "dead":
                was = virtual.state
                virtual.engine.kill()
                if was in ("serving", "quiesced") and virtual.leader in self.alive:
                    self._tell_break(virtual)
        for gpu in [gpu for gpu in self.gpus if instance_of(gpu) == instance]:
            del self.gpus[gpu]

    def stop(self, drain_s: float) -> ev.Event | None:
        """Somebody stops the service: nothing is accepted any more, what runs has `drain_s` to end."""
        if self._is_down or self._is_stopping:
            return None
        self._is_stopping = True
        return ev.StopRequested(at_s=self.at_s, drain_s=drain_s)

    def send_home(self) -> None:
        """A service that has stopped sends its workers home."""
        for instance in sorted(self.alive):
            self.crash(instance)

    def break_mesh(self, owner: Owner) -> bool:
        """A rank loses the others: the generation can never go on. Whether it was serving."""
        virtual = self.replicas.get(owner)
        if virtual is None or virtual.state != "serving" or virtual.leader not in self.alive:
            return False
        virtual.engine.kill()
        self._tell_break(virtual)
        return True

    def _tell_break(self, virtual: VirtualReplica) -> None:
        self.up(virtual.leader, self._spread(self.rates.step_s), lambda: self._breakage(virtual.owner))

    # Commands

    def _launch_instance(self, command_id: str, command: cmd.LaunchInstance) -> None:
        def join(index: int) -> ev.Event | None:
            if command.instance in self.told_lost or command.instance in self.dead:
                return None
            self.alive.add(command.instance)
            worker = GpuId(f"{command.instance}/{index}")
            self.gpus.setdefault(worker, VirtualGpu(self._table, self.gpu_memory_bytes))
            return None if self._is_down else self._registration(worker, command_id)

        for index in range(self.gpus_per_instance):
            self.after(self._spread(self.rates.join_s), lambda index=index: join(index))  # type: ignore[misc]

    def _kill_instance(self, command_id: str, command: cmd.KillInstance) -> None:
        self.crash(command.instance)
        self.told_lost.add(command.instance)
        self.after(self._spread(self.rates.step_s), lambda: self.lose(command.instance, command.reason), survives=False)

    def _set_timer(self, command_id: str, command: cmd.SetTimer) -> None:
        def fire() -> ev.Event | None:
            if self._timers.get(command.timer) != count:
                return None
            return ev.TimerFired(at_s=self.at_s, timer=command.timer)

        count = self.after(max(0.0, command.at_s - self.at_s), fire, survives=False)
        self._timers[command.timer] = count

    def _take_snapshot(self, command_id: str, command: cmd.TakeSnapshot) -> None:
        silent = [instance for instance in sorted(self.alive) if self.is_cut(instance)]

        def answer() -> ev.Event:
            self._free_unknown()
            if command.drop_loose:
                for gpu in self.gpus.values():
                    gpu.drop_loose()
            heard = {i for i in self.alive if i not in silent and not self.is_cut(i) and i not in self.told_lost}
            holdings = tuple(
                Holding(gpu=name, shards=gpu.shards(), slices=gpu.pieces())
                for name, gpu in sorted(self.gpus.items())
                if instance_of(name) in heard
            )
            serving = [v for v in self.replicas.values() if v.state == "serving" and v.leader in heard]
            positions = tuple(p for v in serving for p in v.engine.positions())
            return ev.SnapshotTaken(at_s=self.at_s, command=command_id, holdings=holdings, positions=positions)

        delay_s = PROBE_TIMEOUT_S if silent else self._spread(self.rates.step_s)
        self.after(delay_s, answer, survives=False)

    def _solve_plan(self, command_id: str, command: cmd.SolvePlan) -> None:
        problem = PlanningProblem(
            spec=self.spec, snapshot=command.snapshot, trigger=command.trigger, epoch_to=command.epoch_to
        )
        solving = self.faults.solving(problem)

        def answer() -> ev.Event:
            if solving.error is not None:
                return ev.PlanFailed(at_s=self.at_s, command=command_id, error=solving.error)
            try:
                made = self.planner(problem)
            except InfeasibleError as error:
                return ev.PlanFailed(at_s=self.at_s, command=command_id, error=str(error))
            plan = self.faults.damaged(made)
            finding = blocking(findings_of(plan))
            if finding is not None and plan is made:
                self.refused_plans.append(str(finding))
            if finding is not None:
                return ev.PlanFailed(at_s=self.at_s, command=command_id, error=f"checker: {finding}")
            return ev.PlanReady(at_s=self.at_s, command=command_id, plan=plan)

        self.after(self._spread(self.rates.solve_s) + solving.delay_s, answer, survives=False)

    def _begin_run(self, command_id: str, command: cmd.BeginRun) -> None:
        self.plans[command.plan.epoch.to] = command.plan
        for replica in command.plan.target.replicas:
            if replica.generation == command.plan.epoch.to:
                self._prepare(replica)

    # The run's other commands

    def _make_durable(self, command_id: str, command: cmd.MakeDurable) -> None:
        def answer() -> ev.Event | None:
            if command.epoch in self.aborted:
                return None
            closed = [p for p in command.positions if self.requests[p.request].is_closed(p.choice)]
            open_ones = [p for p in command.positions if p not in closed]
            if any(self.requests[p.request].durable(p.choice) < p.tokens for p in open_ones):
                self.after(self.rates.step_s, answer, survives=False)
                return None
            pairs = tuple((p.request, p.choice) for p in closed)
            return ev.LedgerDurable(at_s=self.at_s, epoch=command.epoch, closed=pairs)

        self.after(self._spread(self.rates.step_s), answer, survives=False)

    def _commit_run(self, command_id: str, command: cmd.CommitRun) -> None:
        self._has_target(command.epoch)
        self.ledger.set_owners(
            {
                change.request: None if change.replica is None else (change.replica, change.generation)
                for change in command.owners
            }
        )

    def _finish_run(self, command_id: str, command: cmd.FinishRun) -> None:
        self._has_target(command.epoch)

    def _has_target(self, epoch: int) -> None:
        """What a plan wanted is what there is; a restart may lie between its commit and its end."""
        target = self.plans[epoch].target
        self.current = {(replica.id, replica.generation) for replica in target.replicas} - self.ledger.fenced

    def _abort_run(self, command_id: str, command: cmd.AbortRun) -> None:
        self.aborted.add(command.epoch)
        for owner, virtual in tuple(self.replicas.items()):
            if owner[1] == command.epoch:
                virtual.engine.kill()
                for instance in virtual.instances:
                    self._loosen(owner, instance)
        for owner in command.resume:
            virtual = self.replicas[owner]
            self.down([virtual.leader], lambda v=virtual: self._resume(v))  # type: ignore[misc]

    def _fence_replica(self, command_id: str, command: cmd.FenceReplica) -> None:
        owner = (command.replica, command.generation)
        self.ledger.fenced.add(owner)
        self.current.discard(owner)
        virtual = self.replicas.get(owner)
        for instance in () if virtual is None else virtual.instances:
            if instance in self.alive and instance not in self.told_lost:
                self.down([instance], lambda name=instance: self._free(owner, name))  # type: ignore[misc]

    def _free(self, owner: Owner, instance: InstanceId) -> None:
        self.replicas[owner].engine.kill()
        self._loosen(owner, instance)

    def _free_unknown(self) -> None:
        """What a release failed to free for good: positions of generations that are no more."""
        self.unfreed.clear()
        self.overtaken.clear()
        for gpu in self.gpus.values():
            gpu.was_short = False
            for owner in [owner for owner in gpu.positions if owner not in self.current]:
                gpu.loosen(owner)

    def _admit_requests(self, command_id: str, command: cmd.AdmitRequests) -> None:
        owner = (command.replica, command.generation)
        self.ledger.set_owners({a.request: owner for a in command.admissions if a.request in self.requests})
        virtual = self.replicas[owner]

        def arrive() -> None:
            if virtual.state in ("serving", "quiesced"):
                self._take_over(virtual, command.admissions)

        self.down([virtual.leader], arrive)

    def _end_request(self, command_id: str, command: cmd.EndRequest) -> None:
        request = self.requests[command.request]

        def end() -> ev.Event | None:
            return self._ending(request) if self.ledger.end(request, command.outcome) else None

        if command.replica is not None:
            virtual = self.replicas[command.replica, command.generation]
            self.down([virtual.leader], lambda: self._close(virtual, command.request))
        self.after(0.001, end, survives=False)

    def _stop_service(self, command_id: str, command: cmd.StopService) -> None:
        self.stopped = True


_NOT_REPEATED = frozenset(
    {
        *("journal_begun", "coordinator_restarted", "instance_wanted", "request_accepted", "request_ended"),
        *("plan_submitted", "stop_requested"),
    }
)
"""What no network lies before: it comes once and in time."""

_MISSED = frozenset({"worker_registered", "instance_lost", "replica_broke"})
"""What nobody keeps for a coordinator that is dead: a new one finds it out by itself."""


def check_streams(world: VirtualWorld) -> None:
    """Every request ended, its tokens the right ones, complete and once. Raises SpotServeError naming the request."""
    for name, request in world.requests.items():
        if request.ended is None:
            raise SpotServeError(f"request {name} never ended")
        for choice, rows in enumerate(request.rows):
            tokens = [row.token for row in rows]
            expected = [virtual_token(name, choice, position) for position in range(len(tokens))]
            if tokens != expected or (request.ended == "finished" and len(tokens) != request.lengths[choice]):
                raise SpotServeError(f"request {name} choice {choice} has {len(tokens)} tokens, some wrong")
