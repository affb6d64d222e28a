"""The world as it is: workers over gRPC, instances of a cloud, the planner process, the ledger, the clock.

It carries out the controller's commands and tells what happens as events. It decides nothing: what is lost, moved or
admitted is the controller's word. Tokens pass through here from the leaders to the ledger and never reach the
controller; of them it learns first tokens and ends.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

from spotserve.core import commands as cmd
from spotserve.core import events as ev
from spotserve.core import wire
from spotserve.core.admission import start_of, tokens_again
from spotserve.core.controller import Entry
from spotserve.core.gpu_types import type_called
from spotserve.core.ids import GpuId, InstanceId, ReplicaId, RequestId, instance_of
from spotserve.core.loop import JournalPort
from spotserve.core.plan import Plan, PlanningProblem
from spotserve.core.ports import NewRequest
from spotserve.core.snapshot import Holding
from spotserve.core.spec import POLICY_VERSION, ServingSpec
from spotserve.core.state import ClusterState
from spotserve.core.verdict import blocking, findings_of
from spotserve.errors import SpotServeError
from spotserve.log import get_logger
from spotserve.runtime.failpoints import Failpoint
from spotserve.runtime.step_executor import StepExecutor
from spotserve.runtime.switchboard import Connected, Disconnected, Received, Switchboard

RECONNECT_S = 3.0
"""A worker whose process lives may be out of reach this long before its instance counts as lost."""
LATE_S = 1.0
"""A round of the failure detector that is later than this says nothing about the workers."""
LAUNCH_TIMEOUT_S = 120.0
PROBE_TIMEOUT_S = 3.0
WATCH_S = 0.5
DURABLE_POLL_S = 0.001
MAX_EVENTS = 256
BROKEN_CHOICE = "a choice outgrew its replica's KV pool, or the model gave it no usable logits"
"""What `GET /v1/requests/{id}` says of a request of which a choice ended with an error."""

log = get_logger("world")


class Cloud(Protocol):
    """Where instances come from."""

    async def launch(self, instance: InstanceId) -> None:
        """Begin to bring an instance up."""

    async def kill(self, instance: InstanceId) -> None:
        """Take it; returns when its processes are gone."""

    def adopt(self, instance: InstanceId, *, process_group: int, started_at: float) -> None:
        """An instance that an earlier coordinator launched."""

    def alive(self, instance: InstanceId) -> bool:
        """Whether any of its processes runs."""

    async def wait_gone(self, instances: Sequence[InstanceId], *, timeout_s: float) -> None:
        """Wait for processes told to exit; kill the rest."""

    def last_lines(self, instance: InstanceId, count: int = 20) -> list[str]:
        """The end of its log."""


class Planner(Protocol):
    """Solves planning problems."""

    async def solve(self, problem: PlanningProblem) -> Plan:
        """The plan. Raises SpotServeError."""


class Outcome(Protocol):
    """What an append to the ledger did."""

    @property
    def closed(self) -> Sequence[Any]:
        """Closed choices: request, choice, by."""

    @property
    def completed(self) -> Sequence[RequestId]:
        """Requests whose last choice closed."""

    @property
    def durable(self) -> Sequence[tuple[RequestId, int, int]]:
        """(request, choice, durable tokens)."""

    @property
    def gaps(self) -> Sequence[tuple[RequestId, int, int]]:
        """Choices of which tokens are missing."""

    @property
    def first_tokens(self) -> Sequence[RequestId]:
        """Requests of which this generation's first token became durable."""

    @property
    def late(self) -> Sequence[tuple[RequestId, int]]:
        """Choices that were closed before their runs came."""

    @property
    def unknown(self) -> Sequence[RequestId]:
        """Requests that the ledger does not hold."""


class Content(Protocol):
    """What is durable of a request."""

    @property
    def new(self) -> NewRequest:
        """The request as accepted."""

    @property
    def choices(self) -> Sequence[Any]:
        """Choice views."""

    @property
    def ended(self) -> str | None:
        """How it ended."""


class TokenLedger(Protocol):
    """The single owner of committed tokens."""

    def append(self, replica: ReplicaId, generation: int, runs: Sequence[wire.TokenRun]) -> Awaitable[Outcome]:
        """Append what a leader sampled."""

    def set_owners(self, owners: Mapping[RequestId, Any]) -> Awaitable[None]:
        """Hand requests to other replica generations."""

    def fence(self, replica: ReplicaId, generation: int) -> Awaitable[None]:
        """Refuse a generation for ever."""

    def flush(self) -> Awaitable[None]:
        """All handed over before is durable."""

    def __contains__(self, request: object) -> bool:
        """Whether it holds a request, ended or not."""

    def content(self, request: RequestId, *, with_logprobs: bool) -> Content:
        """Durable content, which costs a multiple with logprobs. Raises KeyError."""

    def end(self, request: RequestId, state: Any, error: str | None = None) -> Awaitable[Outcome]:
        """Store how a request ended."""


class LiveWorld:
    """Implements the loop's `World`, and the journal port's echo that callers wait on."""

    def __init__(
        self,
        spec: ServingSpec,
        *,
        switchboard: Switchboard,
        cloud: Cloud,
        planner: Planner,
        ledger: TokenLedger,
        term: int,
        began_s: float,
        state: Callable[[], ClusterState],
        owner: Callable[[ReplicaId, int], Any],
    ) -> None:
        self.spec = spec
        self.switchboard = switchboard
        self.cloud = cloud
        self.planner = planner
        self.ledger = ledger
        self.term = term
        self._origin_s = time.monotonic() - began_s
        self._state = state
        self._owner = owner
        self._steps = StepExecutor(switchboard, term=term, clock=self.at_s, contents=self.contents)
        self._events: asyncio.Queue[ev.Event | None] = asyncio.Queue()
        self._failpoint = Failpoint.from_environment("coordinator")
        self._told: dict[int, asyncio.Future[Entry]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._timers: dict[str, asyncio.TimerHandle] = {}
        self._launched_at_s: dict[InstanceId, float] = {}
        self._absent_since_s: dict[GpuId, float] = {}
        self._last_token_s: dict[RequestId, float] = {}
        self._to_recompute: dict[RequestId, int] = {}
        self._serials = itertools.count()
        self._silent: set[GpuId] = set()
        self._stopping = False
        self.stopped = asyncio.Event()
        self.failure: BaseException | None = None

    def at_s(self) -> float:
        """Seconds since the journal's start; never runs backwards in a process."""
        return time.monotonic() - self._origin_s

    # Events in

    def tell(self, event: ev.Event) -> asyncio.Future[Entry]:
        """Put an event before the controller; the future is done once its entry is durable."""
        future: asyncio.Future[Entry] = asyncio.get_running_loop().create_future()
        self._told[id(event)] = future
        self._events.put_nowait(event)
        return future

    def emit(self, event: ev.Event) -> None:
        """Put an event before the controller."""
        self._events.put_nowait(event)

    async def next_events(self) -> Sequence[ev.Event]:
        """What has happened since the last call; waits for at least one."""
        first = await self._events.get()
        events = [] if first is None else [first]
        while first is not None and len(events) < MAX_EVENTS and not self._events.empty():
            event = self._events.get_nowait()
            if event is None:
                self._events.put_nowait(None)
                break
            events.append(event)
        return events

    def echo(self, journal: JournalPort) -> JournalPort:
        """A journal that tells waiting callers when their entry is durable."""
        return _EchoJournal(journal, self._durable)

    def _durable(self, entries: Sequence[Entry]) -> None:
        for entry in entries:
            future = self._told.pop(id(entry.event), None)
            if future is not None and not future.done():
                future.set_result(entry)

    # A restart

    def adopt(self, *, num_instances: int) -> None:
        """Tell a continued controller what is left of the world its predecessor knew."""
        state = self._state()
        registers = self.switchboard.connected()
        earlier = [self._events.get_nowait() for _ in range(self._events.qsize())]
        self.emit(
            ev.CoordinatorRestarted(
                at_s=self.at_s(),
                term=self.term,
                workers=tuple(registers),
                num_instances=num_instances,
                policy_version=POLICY_VERSION,
            )
        )
        for event in earlier:
            self._events.put_nowait(event)
        for instance in state.living():
            if instance.state != "requested" and any(gpu.id not in registers for gpu in instance.gpus):
                self.spawn(self._condemn(instance.id, "absent after the restart"))
        self._adopt_replicas(state, registers)
        self.spawn(self._adopt_requests(state))

    def _adopt_replicas(self, state: ClusterState, registers: dict[GpuId, wire.Register]) -> None:
        roles = {
            (gpu, role.replica, role.generation): role.state
            for gpu, register in registers.items()
            for role in register.roles
        }
        living = {entry.replica.id: entry for entry in state.replicas.values() if entry.state != "lost"}
        for entry in living.values():
            replica = entry.replica
            states = [roles.get((gpu, replica.id, replica.generation)) for gpu in replica.gpus]
            if entry.state in ("serving", "quiesced") and any(s in (None, "broken", "prepared") for s in states):
                self._broke(replica.id, replica.generation, "not all of it came back")
            elif entry.state == "serving" and states[0] == "quiesced":
                # It had quiesced for a run that the journal does not know of.
                self.spawn(self.resume(f"adopt-{self.term}", replica.id, replica.generation))
        self._free_unknown(f"adopt-{self.term}", roles)

    def _free_unknown(self, command_id: str, roles: Iterable[tuple[GpuId, ReplicaId, int]]) -> None:
        """Free positions of replicas that are no more; their weights stay as holdings that the next plan may use."""
        entries = self._state().replicas.values()
        living = {(entry.replica.id, entry.replica.generation) for entry in entries if entry.state != "lost"}
        for gpu, name, generation in roles:
            if (name, generation) not in living:
                release = wire.ReleaseCommand(
                    term=self.term,
                    command=f"{command_id}-{name}-{generation}@{gpu}",
                    replica=name,
                    generation=generation,
                    keep_weights=True,
                )
                self.spawn(self._ask(gpu, release))

    async def _adopt_requests(self, state: ClusterState) -> None:
        """Ask leaders for what the ledger lacks; tell the ends that the journal missed."""
        for entry in state.replicas.values():
            requests = state.requests_of(entry.replica.id, entry.replica.generation)
            positions = [
                (request.id, view.choice, len(view.token_ids))
                for request in requests
                if self._known(request.id)
                for view in self.ledger.content(request.id, with_logprobs=False).choices
                if view.finish_reason is None
            ]
            if positions:
                self.switchboard.send(entry.replica.leader, wire.Resend(term=self.term, positions=tuple(positions)))
        for name in state.requests:
            if not self._known(name):
                continue
            content = self.ledger.content(name, with_logprobs=False)
            if content.ended is not None:
                self._ended(name, content.ended)
            elif all(view.finish_reason is not None for view in content.choices):
                await self._complete(name)
        for request in state.requests.values():
            if request.replica is not None and self._known(request.id):
                for view in self.ledger.content(request.id, with_logprobs=False).choices:
                    if view.finish_reason is not None:
                        self._close_at_leader(request.replica, request.generation, request.id, view.choice)

    # Commands out

    def submit(self, command_id: str, command: cmd.Command) -> None:
        """Begin to carry out a command."""
        self._failpoint.reach(f"{command.kind}:before")
        handler = _HANDLERS[command.kind]
        work = handler(self, command_id, command)
        if work is not None:
            self.spawn(work)

    def spawn(self, work: Any) -> None:
        """Run a coroutine; a failure of ours ends the process rather than being lost."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._finished)

    def _finished(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._fail(error)

    def _fail(self, error: BaseException) -> None:
        """Our bug or the ledger's end: the loop must not go on as if nothing had happened."""
        log.error("world_failed", error=repr(error), exc_info=error)
        self.failure = error
        self._events.put_nowait(None)

    async def _launch(self, command_id: str, command: cmd.LaunchInstance) -> None:
        self._launched_at_s[command.instance] = time.monotonic()
        try:
            await self.cloud.launch(command.instance)
        except SpotServeError as error:
            self.emit(ev.InstanceLost(at_s=self.at_s(), instance=command.instance, reason=error.message))

    async def _kill(self, command_id: str, command: cmd.KillInstance) -> None:
        await self.cloud.kill(command.instance)
        self.lose(command.instance, command.reason)

    def lose(self, instance: InstanceId, reason: str) -> None:
        """Give an instance up: its workers' open commands fail, the controller is told."""
        self._launched_at_s.pop(instance, None)
        for worker in [w for w in self.switchboard.connected() if instance_of(w) == instance]:
            self.switchboard.fail_worker(worker, "instance lost")
        for gpu in self._gpus_of(instance):
            self._absent_since_s.pop(gpu, None)
            self.switchboard.fail_worker(gpu, "instance lost")
        self.emit(ev.InstanceLost(at_s=self.at_s(), instance=instance, reason=reason))

    def _gpus_of(self, instance: InstanceId) -> list[GpuId]:
        known = self._state().instances.get(instance)
        return [] if known is None else [gpu.id for gpu in known.gpus]

    def _set_timer(self, command_id: str, command: cmd.SetTimer) -> None:
        old = self._timers.pop(command.timer, None)
        if old is not None:
            old.cancel()
        delay_s = max(0.0, command.at_s - self.at_s())
        loop = asyncio.get_running_loop()
        self._timers[command.timer] = loop.call_later(delay_s, self._fire, command.timer, command.at_s)

    def _fire(self, timer: str, at_s: float) -> None:
        self._timers.pop(timer, None)
        # The loop's clock may be a hair early; the controller compares with the time it asked for.
        self.emit(ev.TimerFired(at_s=max(at_s, self.at_s()), timer=timer))

    async def _take_snapshot(self, command_id: str, command: cmd.TakeSnapshot) -> None:
        workers = tuple(self.switchboard.connected())
        replies = await asyncio.gather(
            *(self._probe(command_id, worker, drop_loose=command.drop_loose) for worker in workers)
        )
        holdings: list[Holding] = []
        positions: list[wire.ChoicePosition] = []
        roles: list[tuple[GpuId, ReplicaId, int]] = []
        for worker, result in zip(workers, replies, strict=True):
            if result is None:
                continue
            roles += [(worker, role["replica"], role["generation"]) for role in result["roles"]]
            holdings.append(
                Holding.model_validate({"gpu": worker, "shards": result["shards"], "slices": result["slices"]})
            )
            positions += [wire.ChoicePosition.model_validate(p) for p in result["positions"]]
        # A release that failed for good has left a position behind: the plan to come does not count on its memory.
        self._free_unknown(command_id, roles)
        self.emit(
            ev.SnapshotTaken(at_s=self.at_s(), command=command_id, holdings=tuple(holdings), positions=tuple(positions))
        )

    async def _probe(self, command_id: str, worker: GpuId, *, drop_loose: bool = False) -> dict[str, Any] | None:
        probe = wire.ProbeCommand(term=self.term, command=f"{command_id}@{worker}", drop_loose=drop_loose)
        try:
            async with asyncio.timeout(PROBE_TIMEOUT_S):
                reply = await self.switchboard.command(worker, probe)
        except TimeoutError:
            return None
        return reply.result if reply.ok else None

    async def probe_holdings(self) -> tuple[Holding, ...]:
        """What every worker holds now, for `spotserve snapshot` and `apply`."""
        workers = tuple(self.switchboard.connected())
        name = f"snapshot-{time.monotonic_ns()}"
        results = await asyncio.gather(*(self._probe(name, worker) for worker in workers))
        return tuple(
            Holding.model_validate({"gpu": worker, "shards": result["shards"], "slices": result["slices"]})
            for worker, result in zip(workers, results, strict=True)
            if result is not None
        )

    async def _solve(self, command_id: str, command: cmd.SolvePlan) -> None:
        problem = PlanningProblem(
            spec=self.spec, snapshot=command.snapshot, trigger=command.trigger, epoch_to=command.epoch_to
        )
        try:
            plan = await self.planner.solve(problem)
        except SpotServeError as error:
            self.emit(ev.PlanFailed(at_s=self.at_s(), command=command_id, error=error.message))
            return
        # A large plan takes the checker a while, in which heartbeats go on.
        findings = await asyncio.to_thread(findings_of, plan)
        first = blocking(findings)
        if first is not None:
            log.error("plan_refused", code=first.code, finding=str(first), num_findings=len(findings))
            self.emit(ev.PlanFailed(at_s=self.at_s(), command=command_id, error=f"checker: {first}"))
            return
        log.info(
            "plan_ready",
            epoch=plan.epoch.to,
            trigger=plan.trigger.kind,
            mode=plan.mode,
            steps=len(plan.steps),
            estimated_s=plan.estimates.done_s,
        )
        self.emit(ev.PlanReady(at_s=self.at_s(), command=command_id, plan=plan))

    def _begin_run(self, command_id: str, command: cmd.BeginRun) -> None:
        self._steps.begin(command.plan)

    async def _execute(self, command_id: str, command: cmd.ExecuteStep) -> None:
        if self._steps.plan(command.epoch) is None:
            run = self._state().run
            if run is None or run.epoch != command.epoch:
                return
            self._steps.begin(run.plan)
        self._failpoint.reach(f"{command.step.kind}:before")
        event = await self._steps.execute(command_id, command)
        if isinstance(event, ev.StepFailed):
            log.warning("step_failed", epoch=event.epoch, step=event.step, kind=command.step.kind, error=event.error)
        self.emit(event)

    async def _make_durable(self, command_id: str, command: cmd.MakeDurable) -> None:
        closed: set[tuple[RequestId, int]] = set()
        waiting = {(p.request, p.choice): p.tokens for p in command.positions}
        while waiting:
            await self.ledger.flush()
            for (request, choice), tokens in tuple(waiting.items()):
                standing = self._standing(request, choice)
                if standing is None:
                    closed.add((request, choice))
                if standing is None or standing >= tokens:
                    del waiting[request, choice]
            if waiting:
                # Tokens that a leader sent before its reply may still be on their way to the ledger.
                await asyncio.sleep(DURABLE_POLL_S)
            if self._steps.plan(command.epoch) is None:
                return
        self.emit(ev.LedgerDurable(at_s=self.at_s(), epoch=command.epoch, closed=tuple(sorted(closed))))

    def _standing(self, request: RequestId, choice: int) -> int | None:
        """Durable tokens of an open choice, None when it is closed or gone."""
        try:
            view = self.ledger.content(request, with_logprobs=False).choices[choice]
        except KeyError:
            return None
        return None if view.finish_reason is not None else len(view.token_ids)

    async def _commit_run(self, command_id: str, command: cmd.CommitRun) -> None:
        log.info("plan_committed", epoch=command.epoch, moved=len(command.moved), recomputed=len(command.recomputed))
        owners = {
            change.request: None if change.replica is None else self._owner(change.replica, change.generation)
            for change in command.owners
            if self._known(change.request)
        }
        await self.ledger.set_owners(owners)

    def _known(self, request: RequestId) -> bool:
        return request in self.ledger

    async def _abort_run(self, command_id: str, command: cmd.AbortRun) -> None:
        log.warning("plan_aborted", epoch=command.epoch, reason=command.reason)
        self._steps.finish(command.epoch)
        # The streams of a quiesced replica wait for nothing else.
        resumes = [self.resume(f"{command_id}.resume", name, generation) for name, generation in command.resume]
        aborts = [
            self.switchboard.command(
                worker, wire.AbortCommand(term=self.term, command=f"{command_id}@{worker}", epoch=command.epoch)
            )
            for worker in self.switchboard.connected()
        ]
        await asyncio.gather(*resumes, *aborts)

    async def resume(self, command_id: str, replica: ReplicaId, generation: int) -> None:
        """A quiesced leader goes on decoding."""
        entry = self._state().replicas.get(replica)
        if entry is None:
            return
        leader = entry.replica.leader
        await self.switchboard.command(
            leader,
            wire.ResumeCommand(
                term=self.term, command=f"{command_id}@{leader}", replica=replica, generation=generation
            ),
        )

    async def _finish_run(self, command_id: str, command: cmd.FinishRun) -> None:
        log.info("plan_released", epoch=command.epoch)
        self._steps.finish(command.epoch)

    async def _admit(self, command_id: str, command: cmd.AdmitRequests) -> None:
        entry = self._state().replicas.get(command.replica)
        if entry is None or entry.replica.generation != command.generation:
            return
        known = [a for a in command.admissions if self._known(a.request)]
        owner = self._owner(command.replica, command.generation)
        # The flush inside: what an earlier owner sent before it was fenced is in the content read next.
        await self.ledger.set_owners({a.request: owner for a in known})
        # Read again: what ended while the owners were written is not handed out any more.
        live = self._state().requests
        requests = self.contents([a for a in known if a.request in live], again=command.again)
        if not requests:
            return
        leader = entry.replica.leader
        admit = wire.AdmitCommand(
            term=self.term,
            command=command_id,
            replica=command.replica,
            generation=command.generation,
            requests=requests,
        )
        reply = await self.switchboard.command(leader, admit)
        if not reply.ok:
            log.warning("admit_refused", replica=command.replica, error=reply.error)
            self._broke(command.replica, command.generation, f"leader refused requests: {reply.error}")

    def contents(self, admissions: Sequence[cmd.Admission], *, again: bool = False) -> tuple[wire.RequestContent, ...]:
        """Prompts, durable tokens and the KV to rely on, for requests that are still open.

        `again`: they are only named again after a restart, and count as recomputed no second time.
        """
        requests = (self._content(admission, again=again) for admission in admissions)
        return tuple(request for request in requests if request is not None)

    def _content(self, admission: cmd.Admission, *, again: bool) -> wire.RequestContent | None:
        try:
            stored = self.ledger.content(admission.request, with_logprobs=False)
        except KeyError:
            return None
        known = self._state().requests.get(admission.request)
        choices = []
        recomputed = 0
        for view in stored.choices:
            if view.finish_reason is not None:
                continue
            start = start_of(admission, view.choice)
            if start.kv_tokens is None and known is not None and known.had_token:
                recomputed += tokens_again(len(stored.new.prompt_ids), len(view.token_ids))
            choices.append(
                wire.ChoiceContent(
                    choice=view.choice,
                    kv_generation=start.kv_generation,
                    token_ids=view.token_ids,
                    kv_tokens=start.kv_tokens or 0,
                )
            )
        if not choices or stored.ended is not None:
            return None
        if recomputed and not again:
            self._to_recompute[admission.request] = recomputed
        return wire.RequestContent(
            request=admission.request,
            arrival_index=0 if known is None else known.arrival_index,
            prompt_ids=stored.new.prompt_ids,
            sampling=stored.new.sampling,
            choices=tuple(choices),
        )

    async def _fence(self, command_id: str, command: cmd.FenceReplica) -> None:
        log.warning("replica_fenced", replica=command.replica, generation=command.generation)
        fenced = self.ledger.fence(command.replica, command.generation)
        entry = self._state().replicas.get(command.replica)
        await fenced
        if entry is None:
            return
        connected = self.switchboard.connected()
        # Its KV is of no use any more; its weights stay as holdings that the next plan may copy from.
        for worker in entry.replica.gpus:
            if worker in connected:
                release = wire.ReleaseCommand(
                    term=self.term,
                    command=f"{command_id}@{worker}",
                    replica=command.replica,
                    generation=command.generation,
                    keep_weights=True,
                )
                self.spawn(self._ask(worker, release))

    async def _ask(self, worker: GpuId, command: wire.Command) -> None:
        reply = await self.switchboard.command(worker, command)
        if not reply.ok:
            log.warning("command_failed", worker=worker, command=command.command, error=reply.error)

    async def _end_request(self, command_id: str, command: cmd.EndRequest) -> None:
        if command.replica is not None:
            self._close_at_leader(command.replica, command.generation, command.request)
        await self.ledger.end(command.request, command.outcome, command.error)
        # Only the first end counts: one that finished just before has been told, and has no second record.
        if self.ledger.content(command.request, with_logprobs=False).ended == command.outcome:
            self._ended(command.request, command.outcome)

    def _close_at_leader(
        self, replica: ReplicaId, generation: int, request: RequestId, choice: int | None = None
    ) -> None:
        entry = self._state().replicas.get(replica)
        if entry is None or entry.replica.leader not in self.switchboard.connected():
            return
        close = wire.CloseCommand(
            term=self.term,
            # Never one that was used: a worker answers a repeated id with its first outcome.
            command=f"close-{self.term}-{next(self._serials)}",
            replica=replica,
            generation=generation,
            request=request,
            choice=choice,
        )
        self.spawn(self._ask(entry.replica.leader, close))

    def _ended(self, request: RequestId, outcome: str) -> None:
        self._last_token_s.pop(request, None)
        self._to_recompute.pop(request, None)
        choices = self.ledger.content(request, with_logprobs=False).choices
        self.emit(
            ev.RequestEnded.model_validate(
                {
                    "at_s": self.at_s(),
                    "request": request,
                    "outcome": outcome,
                    "tokens": tuple(len(choice.token_ids) for choice in choices),
                }
            )
        )

    async def _stop(self, command_id: str, command: cmd.StopService) -> None:
        self._stopping = True
        living = [instance.id for instance in self._state().living()]
        for worker in self.switchboard.connected():
            self.switchboard.send(worker, wire.Shutdown(term=self.term))
        await self.cloud.wait_gone(living, timeout_s=3.0)
        self.stopped.set()
        self._events.put_nowait(None)

    def _nothing(self, command_id: str, command: cmd.Command) -> None:
        """The command is for the record alone."""

    # What workers say

    async def pump(self) -> None:
        """Relay the switchboard's events for as long as it runs."""
        while True:
            item = await self.switchboard.events.get()
            if isinstance(item, Connected):
                self._connected(item.register)
            elif isinstance(item, Disconnected):
                self._absent_since_s[item.worker] = time.monotonic()
                self._check_absent(item.worker)
            elif isinstance(item, Received):
                self._received(item.worker, item.message)

    def _connected(self, register: wire.Register) -> None:
        self._absent_since_s.pop(register.worker, None)
        self.cloud.adopt(register.instance, process_group=register.process_group, started_at=register.started_at)
        siblings = [worker for worker in self.switchboard.connected() if instance_of(worker) == register.instance]
        if len(siblings) == register.num_gpus:
            self._launched_at_s.pop(register.instance, None)
        if register.worker in self._gpus_of(register.instance):
            return  # It dialled again; the journal knows it.
        self.emit(
            ev.WorkerRegistered(
                at_s=self.at_s(),
                instance=register.instance,
                worker=register.worker,
                num_gpus=register.num_gpus,
                memory_bytes=register.memory_bytes,
                incarnation=register.incarnation,
                gpu_type=type_called(self.spec.profile, register.gpu_type),
            )
        )

    def _received(self, worker: GpuId, message: wire.WorkerMessage) -> None:
        if isinstance(message, wire.Tokens):
            self.spawn(
                self._append(worker, message, self.ledger.append(message.replica, message.generation, message.runs))
            )
        elif isinstance(message, wire.ReplicaBroken):
            self._broke(message.replica, message.generation, message.detail)
        elif isinstance(message, wire.Evicted):
            self.emit(
                ev.RequestEvicted(
                    at_s=self.at_s(),
                    request=message.request,
                    replica=message.replica,
                    generation=message.generation,
                )
            )
        elif isinstance(message, wire.SelfNotice):
            self._self_notice(worker, message)

    def _self_notice(self, worker: GpuId, message: wire.SelfNotice) -> None:
        if self._stopping:
            return
        self.emit(ev.NoticeReceived(at_s=self.at_s(), instance=instance_of(worker), grace_s=message.grace_s))

    def _broke(self, replica: ReplicaId, generation: int, detail: str) -> None:
        self.emit(ev.ReplicaBroke(at_s=self.at_s(), replica=replica, generation=generation, detail=detail))

    async def _append(self, worker: GpuId, message: wire.Tokens, commit: Awaitable[Outcome]) -> None:
        """What follows once a leader's tokens are durable."""
        outcome = await commit
        now_s = time.monotonic()
        if outcome.durable:
            self.switchboard.send(worker, wire.Durable(term=self.term, positions=tuple(outcome.durable)))
        if outcome.gaps:
            self.switchboard.send(worker, wire.Resend(term=self.term, positions=tuple(outcome.gaps)))
        for request in outcome.first_tokens:
            self._first_token(request, message, now_s)
        live = self._state().requests
        for request, _, _ in outcome.durable:
            if request in live:
                self._last_token_s[request] = now_s
        for closed in outcome.closed:
            if closed.by == "stop_string":
                self._close_at_leader(message.replica, message.generation, closed.request, closed.choice)
        for request, choice in outcome.late:
            self._close_at_leader(message.replica, message.generation, request, choice)
        for request in outcome.unknown:
            self._close_at_leader(message.replica, message.generation, request)
        for request in outcome.completed:
            await self._complete(request)

    async def _complete(self, request: RequestId) -> None:
        """Every choice has ended: the request finished, or failed if one of them ended with an error."""
        choices = self.ledger.content(request, with_logprobs=False).choices
        is_broken = any(view.finish_reason == "error" for view in choices)
        outcome, error = ("failed", BROKEN_CHOICE) if is_broken else ("finished", None)
        await self.ledger.end(request, outcome, error)
        self._ended(request, outcome)

    def _first_token(self, request: RequestId, message: wire.Tokens, now_s: float) -> None:
        last_s = self._last_token_s.get(request)
        self.emit(
            ev.FirstToken(
                at_s=self.at_s(),
                request=request,
                replica=message.replica,
                generation=message.generation,
                stall_ms=0.0 if last_s is None else 1000 * (now_s - last_s),
                recomputed_tokens=self._to_recompute.pop(request, 0),
            )
        )

    # The failure detector: streams that end, heartbeats that stop, launches that never come

    async def watch(self) -> None:
        """Look at every worker twice a second."""
        while True:
            slept_at_s = time.monotonic()
            await asyncio.sleep(WATCH_S)
            late_s = time.monotonic() - slept_at_s - WATCH_S
            if late_s > LATE_S:
                # It was this process that stood still: what the workers said meanwhile has not been read yet.
                log.warning("coordinator_late", late_s=round(late_s, 1))
                self.switchboard.forgive_silence()
                self._absent_since_s = dict.fromkeys(self._absent_since_s, time.monotonic())
                continue
            silent = self._silent_workers()
            for worker in sorted(silent & self._silent):
                log.warning("worker_silent", worker=worker)
                await self._condemn(instance_of(worker), "silent")
            self._silent = silent
            for worker in tuple(self._absent_since_s):
                self._check_absent(worker)
            for instance, launched_s in tuple(self._launched_at_s.items()):
                if time.monotonic() - launched_s > LAUNCH_TIMEOUT_S or self._died_at_start(instance, launched_s):
                    for line in self.cloud.last_lines(instance):
                        log.error("instance_log", instance=instance, line=line)
                    await self._condemn(instance, "did not come up")

    def _silent_workers(self) -> set[GpuId]:
        """Connected workers whose heartbeats have stopped."""
        silences = {worker: self.switchboard.silence_s(worker) for worker in self.switchboard.connected()}
        return {worker for worker, silence_s in silences.items() if silence_s is not None and silence_s > RECONNECT_S}

    def _died_at_start(self, instance: InstanceId, launched_s: float) -> bool:
        return time.monotonic() - launched_s > RECONNECT_S and not self.cloud.alive(instance)

    def _check_absent(self, worker: GpuId) -> None:
        """Lost at once if no process is left, else after it had time to dial again."""
        instance = instance_of(worker)
        known = self._state().instances.get(instance)
        if self._stopping or known is None or known.state == "gone":
            self._absent_since_s.pop(worker, None)
            return
        absent_s = time.monotonic() - self._absent_since_s[worker]
        if not self.cloud.alive(instance) or absent_s > RECONNECT_S:
            self._absent_since_s.pop(worker, None)
            self.spawn(self._condemn(instance, "process ended" if absent_s <= RECONNECT_S else "unreachable"))

    async def _condemn(self, instance: InstanceId, reason: str) -> None:
        """No zombie may come back: what is left of the instance is killed before it counts as lost."""
        await self.cloud.kill(instance)
        self.lose(instance, reason)


class _EchoJournal:
    """Passes entries on, and their durability back."""

    def __init__(self, journal: JournalPort, durable: Callable[[Sequence[Entry]], None]) -> None:
        self._journal = journal
        self._durable = durable

    async def append(self, entries: Sequence[Entry]) -> None:
        """One durable commit, then the echo."""
        await self._journal.append(entries)
        self._durable(entries)


_HANDLERS: dict[str, Callable[[LiveWorld, str, Any], Any]] = {
    "launch_instance": LiveWorld._launch,
    "kill_instance": LiveWorld._kill,
    "set_timer": LiveWorld._set_timer,
    "take_snapshot": LiveWorld._take_snapshot,
    "solve_plan": LiveWorld._solve,
    "drop_plan": LiveWorld._nothing,
    "begin_run": LiveWorld._begin_run,
    "execute_step": LiveWorld._execute,
    "make_durable": LiveWorld._make_durable,
    "commit_run": LiveWorld._commit_run,
    "abort_run": LiveWorld._abort_run,
    "finish_run": LiveWorld._finish_run,
    "admit_requests": LiveWorld._admit,
    "fence_replica": LiveWorld._fence,
    "end_request": LiveWorld._end_request,
    "stop_service": LiveWorld._stop,
}
