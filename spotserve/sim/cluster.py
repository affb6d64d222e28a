"""A cluster in virtual time: it does what the controller commands as the live world would; only durations are made up.

What an iteration does is the shared batcher's word, how long it takes the profile's; transfers share ports
(`sim/links.py`). Planning is a port: the real planner and the checker's verdict. Decisions are the controller's alone.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from spotserve.core import commands as cmd
from spotserve.core import events as ev
from spotserve.core.admission import start_of, tokens_again
from spotserve.core.batching import Sequence as BatchedSequence
from spotserve.core.batching import SequenceKey
from spotserve.core.ids import GpuId, InstanceId, ReplicaId, RequestId, StepId, instance_of
from spotserve.core.load import LOAD_PERIOD_S, LoadWindow
from spotserve.core.plan import CopyKv, CopyKvDelta, CopyWeights, LoadWeights, Plan, PlanningProblem, Release
from spotserve.core.sampling import SamplingParameters
from spotserve.core.slices import Shard, Slice, kv_token_bytes, stage_shard
from spotserve.core.snapshot import Holding, Market, Replica
from spotserve.core.spec import ServingSpec
from spotserve.core.state import GIVEN_BACK, step_gpus
from spotserve.core.verdict import blocking, findings_of
from spotserve.core.wire import ChoicePosition
from spotserve.errors import SpotServeError
from spotserve.sim.agenda import FIRST, LAST, Agenda
from spotserve.sim.durations import PhaseDurations, Phases, PipelineDurations
from spotserve.sim.engine import Durations, SimulatedReplica
from spotserve.sim.hardware import Hardware
from spotserve.sim.ledger import Owner, RequestRecord, Sampled, SimulatedLedger
from spotserve.sim.links import LinkRates, Links
from spotserve.sim.offers import Machine, Offers

FIRST_PLACEMENT_S = 5.0
"""By then the instances of the beginning serve."""

Solve = Callable[[PlanningProblem], Plan]


@dataclass(slots=True)
class InstanceRecord:
    """One instance: from when to when it was paid for."""

    market: Market
    asked_at_s: float
    ready_at_s: float | None = None
    gone_at_s: float | None = None
    gpu_type: str = ""


@dataclass(slots=True)
class _Held:
    """Weights of one GPU: the shards of its positions, and slices that belong to none yet."""

    shards: dict[Owner, Shard] = field(default_factory=dict)
    loose: dict[Slice, None] = field(default_factory=dict)


class SimulatedCluster:
    """A `World` whose clock jumps to the next thing that happens."""

    def __init__(
        self,
        spec: ServingSpec,
        hardware: Hardware,
        solve: Solve,
        *,
        phases: Phases | None = None,
        is_warm: bool = True,
        jumps: bool = True,
    ) -> None:
        self.spec = spec
        self.hardware = hardware
        self.agenda = Agenda()
        self.until_s = float("inf")
        self.ledger = SimulatedLedger()
        self.instances: dict[InstanceId, InstanceRecord] = {}
        self.links = Links(self.agenda, _rates(spec, hardware))
        self.stopped = False
        self._solve = solve
        self._phases = phases
        self._is_warm = is_warm
        """The first placement finds its weights on the GPUs: what is simulated began before."""
        self._jumps = jumps
        self._load = LoadWindow()
        self._measures_load = True
        self._has_served = False
        self._offers = Offers()
        self._held: dict[GpuId, _Held] = {}
        self._alive: set[InstanceId] = set()
        self._replicas: dict[Owner, SimulatedReplica] = {}
        self._plans: dict[int, Plan] = {}
        self._aborted: set[int] = set()
        self._followed: dict[int, set[StepId]] = {}
        """The `copy_kv` steps of each epoch that have caught up."""
        self._timers: dict[str, int] = {}
        self._num_timers = 0
        self._handlers: dict[str, Callable[[str, Any], None]] = {
            "launch_instance": self._launch,
            "kill_instance": self._kill,
            "set_timer": self._set_timer,
            "take_snapshot": self._take_snapshot,
            "solve_plan": self._solve_plan,
            "drop_plan": self._nothing,
            "begin_run": self._begin_run,
            "execute_step": self._execute,
            "make_durable": self._make_durable,
            "commit_run": self._commit_run,
            "abort_run": self._abort_run,
            "finish_run": self._finish_run,
            "admit_requests": self._admit,
            "fence_replica": self._fence,
            "end_request": self._end_request,
            "stop_service": self._stop,
        }

    # The world's two verbs

    async def next_events(self) -> Sequence[ev.Event]:
        """The next thing that concerns the controller; empty when nothing is left or time is up."""
        event = None if self.stopped else self.agenda.next_event(self.until_s)
        return [] if event is None else [event]

    def submit(self, command_id: str, command: cmd.Command) -> None:
        """Begin to carry out a command."""
        self._handlers[command.kind](command_id, command)

    # What a scenario does

    def begin(
        self,
        num_instances: int,
        *,
        ondemand: Collection[InstanceId] = (),
        gpu_types: Mapping[InstanceId, str] | None = None,
    ) -> None:
        """Serve: so many instances are up at once, all on spot and of the profile's own GPU type but for some."""
        for name in (InstanceId(f"i{index}") for index in range(num_instances)):
            market: Market = "ondemand" if name in ondemand else "spot"
            self._offers.has(Machine(name, market, (gpu_types or {}).get(name, ""), ready_at_s=0.0), name)
        self.agenda.at(
            0.0,
            lambda: ev.JournalBegun(at_s=self.agenda.now_s, spec=self.spec, num_instances=num_instances),
            priority=FIRST,
        )
        self.agenda.after(LOAD_PERIOD_S, self._sample_load)

    def know_load(self, load_rps: float) -> None:
        """The arrival rate is told before the first placement, and never measured."""
        self._measures_load = False
        self.agenda.at(0.0, lambda: ev.LoadSampled(at_s=self.agenda.now_s, load_rps=load_rps), priority=FIRST)

    def request(self, name: str, at_s: float, *, prompt_tokens: int, max_tokens: int, output_tokens: int) -> None:
        """A client asks at `at_s`; the model would end after `output_tokens`."""
        accepted_at_s = at_s + self.hardware.accept_s
        self.agenda.at(accepted_at_s, lambda: self._accept(RequestId(name), prompt_tokens, max_tokens, output_tokens))

    def notice(self, at_s: float, machine: InstanceId, grace_s: float) -> None:
        """The cloud will take a machine."""

        def happen() -> ev.Event | None:
            instance = self._offers.leave(machine)
            if instance is None or not self._lives(instance):
                return None
            return ev.NoticeReceived(at_s=self.agenda.now_s, instance=instance, grace_s=grace_s)

        self.agenda.at(at_s, happen)

    def kill(self, at_s: float, machine: InstanceId) -> None:
        """The cloud takes a machine unannounced."""

        def happen() -> ev.Event | None:
            instance = self._offers.leave(machine)
            if instance is not None and self._lives(instance):
                self._lose(instance, "taken by the cloud")
            return None

        self.agenda.at(at_s, happen)

    def add(self, ready_at_s: float, name: InstanceId, *, market: Market = "spot", gpu_type: str = "") -> None:
        """A machine is offered, early enough to be ready at `ready_at_s`.

        The controller hears of one that was asked for before the beginning once that is over, as the first placement
        would wait for it.
        """
        machine = Machine(name, market, gpu_type, ready_at_s)

        def happen() -> ev.Event | None:
            instance = self._offers.offer(machine)
            if instance is None:
                return ev.InstanceWanted(at_s=self.agenda.now_s, market=market)
            self._start(instance, machine)
            return None

        self.agenda.at(max(FIRST_PLACEMENT_S, ready_at_s - self.hardware.start_s), happen)

    def load(self, at_s: float, load_rps: float) -> None:
        """Somebody tells the arrival rate."""
        self.agenda.at(at_s, lambda: ev.LoadSampled(at_s=self.agenda.now_s, load_rps=load_rps, told=True))

    def settle(self) -> None:
        """Bring every replica's tokens up to now."""
        for replica in self._replicas.values():
            if replica.state == "serving":
                replica.positions()

    def _lives(self, instance: InstanceId) -> bool:
        record = self.instances.get(instance)
        return record is not None and record.gone_at_s is None

    def _accept(self, name: RequestId, prompt_tokens: int, max_tokens: int, output_tokens: int) -> ev.Event:
        now_s = self.agenda.now_s
        self._load.arrived(now_s)
        self.ledger.accept(
            RequestRecord(
                request=name,
                arrival_index=len(self.ledger.records),
                arrived_at_s=now_s - self.hardware.accept_s,
                prompt_tokens=prompt_tokens,
                max_tokens=max_tokens,
                output_tokens=min(max_tokens, output_tokens),
                deliver_s=self.hardware.deliver_s,
            )
        )
        return ev.RequestAccepted(
            at_s=now_s,
            request=name,
            prompt_tokens=prompt_tokens,
            num_choices=1,
            sampling=SamplingParameters(seed=0, max_tokens=max_tokens),
        )

    def _sample_load(self) -> ev.Event | None:
        self.agenda.after(LOAD_PERIOD_S, self._sample_load)
        load_rps = self._load.news(self.agenda.now_s) if self._has_served and self._measures_load else None
        return None if load_rps is None else ev.LoadSampled(at_s=self.agenda.now_s, load_rps=load_rps)

    # Instances

    def _launch(self, command_id: str, command: cmd.LaunchInstance) -> None:
        machine = self._offers.take(command.instance)
        if machine is not None:
            self._start(command.instance, machine)

    def _start(self, instance: InstanceId, machine: Machine) -> None:
        """Rent a machine: it is paid for from now on, or from when it was started to be ready in time."""
        now_s = self.agenda.now_s
        ready_at_s = now_s + self.hardware.start_s if machine.ready_at_s is None else max(now_s, machine.ready_at_s)
        asked_at_s = max(0.0, min(now_s, ready_at_s - self.hardware.start_s))
        self.instances[instance] = InstanceRecord(machine.market, asked_at_s, gpu_type=machine.gpu_type)
        for index in range(self.hardware.of(machine.gpu_type).gpus_per_instance):
            worker = GpuId(f"{instance}/{index}")
            self.agenda.at(ready_at_s, lambda worker=worker: self._register(worker))  # type: ignore[misc]

    def _register(self, worker: GpuId) -> ev.Event | None:
        instance = instance_of(worker)
        if not self._lives(instance):
            return None
        self._alive.add(instance)
        self._held[worker] = _Held()
        record = self.instances[instance]
        record.ready_at_s = self.agenda.now_s
        machine = self.hardware.of(record.gpu_type)
        return ev.WorkerRegistered(
            at_s=self.agenda.now_s,
            instance=instance,
            worker=worker,
            num_gpus=machine.gpus_per_instance,
            memory_bytes=machine.gpu_memory_bytes,
            gpu_type=record.gpu_type,
            incarnation=f"{worker}@0",
        )

    def _kill(self, command_id: str, command: cmd.KillInstance) -> None:
        instance, reason = command.instance, command.reason
        if instance not in self.instances:
            self._offers.decline(instance)
            self._after(0.0, lambda at_s: ev.InstanceLost(at_s=at_s, instance=instance, reason=reason))
        elif self._lives(instance):
            if reason == GIVEN_BACK:
                self._offers.give_back(instance)
            self._lose(instance, reason)

    def _lose(self, instance: InstanceId, reason: str) -> None:
        """All of an instance is gone at once; the failure detector tells a little later."""
        self.instances[instance].gone_at_s = self.agenda.now_s
        self._alive.discard(instance)
        self.links.drop(instance=instance)
        for replica in self._replicas.values():
            if any(instance_of(gpu) == instance for gpu in replica.replica.gpus):
                replica.kill()
        for gpu in [gpu for gpu in self._held if instance_of(gpu) == instance]:
            del self._held[gpu]
        self._after(self.hardware.detect_s, lambda at_s: ev.InstanceLost(at_s=at_s, instance=instance, reason=reason))

    def _after(self, delay_s: float, make: Callable[[float], ev.Event]) -> None:
        self.agenda.after(delay_s, lambda: make(self.agenda.now_s))

    # Planning

    def _set_timer(self, command_id: str, command: cmd.SetTimer) -> None:
        self._num_timers += 1
        number = self._timers[command.timer] = self._num_timers

        def fire() -> ev.Event | None:
            if self._timers.get(command.timer) != number:
                return None
            del self._timers[command.timer]
            return ev.TimerFired(at_s=self.agenda.now_s, timer=command.timer)

        self.agenda.at(command.at_s, fire, priority=LAST)

    def _take_snapshot(self, command_id: str, command: cmd.TakeSnapshot) -> None:
        def answer(at_s: float) -> ev.Event:
            if command.drop_loose:
                for held in self._held.values():
                    held.loose.clear()
            positions = tuple(p for one in self._replicas.values() if one.state == "serving" for p in one.positions())
            return ev.SnapshotTaken(at_s=at_s, command=command_id, holdings=self._holdings(), positions=positions)

        self._after(self.hardware.rpc_s, answer)

    def _holdings(self) -> tuple[Holding, ...]:
        return tuple(
            Holding(gpu=gpu, shards=tuple(dict.fromkeys(held.shards.values())), slices=tuple(held.loose))
            for gpu, held in sorted(self._held.items())
        )

    def _solve_plan(self, command_id: str, command: cmd.SolvePlan) -> None:
        problem = PlanningProblem(
            spec=self.spec, snapshot=command.snapshot, trigger=command.trigger, epoch_to=command.epoch_to
        )
        num_gpus = sum(len(instance.gpus) for instance in command.snapshot.world.instances)
        delay_s = self.hardware.solve_s + self.hardware.solve_s_per_gpu * num_gpus
        self._after(delay_s, self._answer(command_id, problem))

    def _answer(self, command_id: str, problem: PlanningProblem) -> Callable[[float], ev.Event]:
        try:
            plan = self._solve(problem)
        except SpotServeError as error:
            text = error.message
            return lambda at_s: ev.PlanFailed(at_s=at_s, command=command_id, error=text)
        finding = blocking(findings_of(plan))
        if finding is not None:
            return lambda at_s: ev.PlanFailed(at_s=at_s, command=command_id, error=f"checker: {finding}")
        return lambda at_s: ev.PlanReady(at_s=at_s, command=command_id, plan=plan)

    # Steps

    def _begin_run(self, command_id: str, command: cmd.BeginRun) -> None:
        plan = command.plan
        self._plans[plan.epoch.to] = plan
        for replica in plan.target.replicas:
            if replica.generation == plan.epoch.to:
                self._replicas[replica.id, replica.generation] = self._new_replica(replica)

    def _new_replica(self, replica: Replica) -> SimulatedReplica:
        is_static = self.spec.limits.batching == "static"
        durations: Durations = PipelineDurations.of(self.spec, replica, self._types_of(replica), self.hardware)
        if is_static and self._phases is not None:
            durations = PhaseDurations(replica, self._phases)
        return SimulatedReplica(
            replica,
            durations=durations,
            agenda=self.agenda,
            sink=self,
            is_static=is_static,
            refill_s=self.hardware.commit_s + 2 * self.hardware.rpc_s,
            jumps=self._jumps,
        )

    def _types_of(self, replica: Replica) -> dict[GpuId, str]:
        return {gpu: self.instances[instance_of(gpu)].gpu_type for gpu in replica.gpus}

    def _execute(self, command_id: str, command: cmd.ExecuteStep) -> None:
        step, epoch = command.step, command.epoch
        dead = [gpu for gpu in step_gpus(step) if instance_of(gpu) not in self._alive]
        if dead:
            error = f"worker {dead[0]} is not connected"
            self._after(
                self.hardware.rpc_s, lambda at_s: ev.StepFailed(at_s=at_s, epoch=epoch, step=step.id, error=error)
            )
        elif isinstance(step, CopyWeights):
            self.links.copy(step.source, step.destination, step.bytes, epoch=epoch, done=self._got(epoch, step))
        elif isinstance(step, LoadWeights):
            size = 0 if self._is_warm and not self._has_served else step.bytes
            self.links.load(step.workers[0], size, epoch=epoch, done=self._got(epoch, step))
        elif isinstance(step, CopyKv):
            size = self._kv_bytes(step, self._full_blocks(step.route.from_replica, epoch))
            done = self._caught_up(epoch, step, size)
            self.links.copy(step.source, step.destination, size, epoch=epoch, done=done)
        elif isinstance(step, CopyKvDelta):
            self._copy_delta(epoch, step, command.manifest)
        elif step.kind == "quiesce":
            self._quiesce(epoch, step.id, step.replica)
        elif step.kind == "activate":
            self.agenda.after(self.hardware.activate_s, lambda: self._activate(command))
        elif step.kind == "join_group":
            self._after(self.hardware.join_s, self._done(epoch, step.id))
        elif isinstance(step, Release):
            self.agenda.after(self.hardware.rpc_s, lambda: self._release(epoch, step))
        else:
            self._after(self.hardware.rpc_s, self._done(epoch, step.id))

    def _done(self, epoch: int, step: StepId, size: int = 0) -> Callable[[float], ev.Event]:
        return lambda at_s: ev.StepDone(at_s=at_s, epoch=epoch, step=step, bytes=size)

    def _tell(self, make: Callable[[float], ev.Event]) -> None:
        """An event in the middle of a happening comes before all else of that moment."""
        self.agenda.at(self.agenda.now_s, lambda: make(self.agenda.now_s), priority=FIRST)

    def _got(self, epoch: int, step: CopyWeights | LoadWeights) -> Callable[[], None]:
        gpu = step.destination if isinstance(step, CopyWeights) else step.workers[0]

        def done() -> None:
            if gpu in self._held:
                self._held[gpu].loose.update(dict.fromkeys(step.slices))
            self._tell(self._done(epoch, step.id, step.bytes))

        return done

    def _kv_bytes(self, step: CopyKv | CopyKvDelta, num_tokens: int) -> int:
        route = step.route
        return num_tokens * kv_token_bytes(self.spec.model, layers=route.layers, heads=route.kv_heads)

    def _old_replica(self, name: ReplicaId, epoch: int) -> SimulatedReplica | None:
        """The generation of a replica that a plan found."""
        old = next((one for one in self._plans[epoch].snapshot.world.replicas if one.id == name), None)
        return None if old is None else self._replicas.get((old.id, old.generation))

    def _full_blocks(self, name: ReplicaId, epoch: int) -> int:
        """KV tokens in full blocks, which never change any more."""
        old = self._old_replica(name, epoch)
        block = self.spec.limits.kv_block_tokens
        return 0 if old is None else sum(p.kv_tokens - p.kv_tokens % block for p in old.positions())

    def _caught_up(self, epoch: int, step: CopyKv, size: int) -> Callable[[], None]:
        def caught_up() -> None:
            if epoch not in self._aborted:
                self._followed.setdefault(epoch, set()).add(step.id)
                self._tell(self._done(epoch, step.id, size))

        def done() -> None:
            if self.hardware.follow_s:
                self.agenda.after(self.hardware.follow_s, caught_up)
            else:
                caught_up()

        return done

    def _copy_delta(self, epoch: int, step: CopyKvDelta, manifest: tuple[ChoicePosition, ...]) -> None:
        """What a `copy_kv` that has caught up left: the last, partial block of each; else everything."""
        followed = self._plans[epoch].followed.get(step.id) in self._followed.get(epoch, ())
        block = self.spec.limits.kv_block_tokens
        size = self._kv_bytes(step, sum(p.kv_tokens % block if followed else p.kv_tokens for p in manifest))

        def done() -> None:
            missing = tuple((p.request, p.choice) for p in manifest if self.ledger.records[p.request].ended is not None)
            self._tell(lambda at_s: ev.StepDone(at_s=at_s, epoch=epoch, step=step.id, bytes=size, missing=missing))

        self.links.copy(step.source, step.destination, size, epoch=epoch, done=done)

    def _quiesce(self, epoch: int, step: StepId, name: ReplicaId) -> None:
        old = self._old_replica(name, epoch)
        if old is None or old.state != "serving":
            self._tell(lambda at_s: ev.StepFailed(at_s=at_s, epoch=epoch, step=step, error=f"{name} does not serve"))
            return
        replica = old

        def report(positions: tuple[ChoicePosition, ...]) -> None:
            if epoch in self._aborted:
                return
            self._after(
                self.hardware.rpc_s,
                lambda at_s: ev.Quiesced(
                    at_s=at_s,
                    epoch=epoch,
                    step=step,
                    replica=name,
                    generation=replica.replica.generation,
                    positions=positions,
                ),
            )

        replica.quiesce(report)

    def _activate(self, command: cmd.ExecuteStep) -> ev.Event | None:
        step = command.step
        assert step.kind == "activate"
        replica = self._replicas.get((step.replica, step.generation))
        if replica is None or replica.state == "dead":
            return None
        if replica.state == "prepared":
            self._hold(replica.replica)
            replica.admit(self._sequences(replica.owner, command.admissions))
            replica.start()
            self._has_served = True
        return ev.StepDone(at_s=self.agenda.now_s, epoch=command.epoch, step=step.id)

    def _hold(self, replica: Replica) -> None:
        """What was copied for a position is its shard from now on."""
        for stage in replica.stages:
            for rank, gpu in enumerate(stage.gpus):
                if gpu in self._held:
                    shard = stage_shard(self.spec.model, layers=stage.layers, tensor=replica.tensor, rank=rank)
                    self._held[gpu].shards[replica.id, replica.generation] = shard
                    self._held[gpu].loose.clear()

    def _release(self, epoch: int, step: Release) -> ev.Event:
        owner = (step.replica, step.generation)
        if step.id in self._plans[epoch].last_releases:
            for gpu in step.workers:
                if gpu in self._held:
                    self._held[gpu].shards.pop(owner, None)
            if owner in self._replicas:
                self._replicas.pop(owner).kill()
        elif owner[1] == epoch and step.workers[0] in self._held:
            self._held[step.workers[0]].loose.clear()
        return ev.StepDone(at_s=self.agenda.now_s, epoch=epoch, step=step.id)

    # The run

    def _make_durable(self, command_id: str, command: cmd.MakeDurable) -> None:
        def answer(at_s: float) -> ev.Event:
            closed = tuple(
                (p.request, p.choice) for p in command.positions if self.ledger.records[p.request].ended is not None
            )
            return ev.LedgerDurable(at_s=at_s, epoch=command.epoch, closed=closed)

        self._after(self.hardware.commit_s, answer)

    def _commit_run(self, command_id: str, command: cmd.CommitRun) -> None:
        for change in command.owners:
            owner = None if change.replica is None else (change.replica, change.generation)
            self.ledger.records[change.request].owner = owner

    def _abort_run(self, command_id: str, command: cmd.AbortRun) -> None:
        self._aborted.add(command.epoch)
        self.links.drop(epoch=command.epoch)
        for owner in [owner for owner in self._replicas if owner[1] == command.epoch]:
            self._replicas.pop(owner).kill()
        for owner in command.resume:
            replica = self._replicas.get(owner)
            if replica is not None and replica.state != "dead":
                replica.resume()
        self._finish(command.epoch)

    def _finish_run(self, command_id: str, command: cmd.FinishRun) -> None:
        self._finish(command.epoch)

    def _finish(self, epoch: int) -> None:
        self._plans.pop(epoch, None)
        self._followed.pop(epoch, None)

    def _fence(self, command_id: str, command: cmd.FenceReplica) -> None:
        owner = (command.replica, command.generation)
        self.ledger.fence(owner)
        replica = self._replicas.pop(owner, None)
        if replica is None:
            return
        replica.kill()  # Its KV is of no use any more; its weights stay as holdings that the next plan may copy from.

    # Requests

    def _admit(self, command_id: str, command: cmd.AdmitRequests) -> None:
        owner = (command.replica, command.generation)
        for admission in command.admissions:
            self.ledger.records[admission.request].owner = owner

        def arrive() -> None:
            replica = self._replicas.get(owner)
            if replica is not None and replica.state in ("serving", "quiescing", "quiesced"):
                replica.admit(self._sequences(owner, command.admissions))

        self.agenda.after(self.hardware.rpc_s, arrive)

    def _sequences(self, owner: Owner, admissions: Iterable[cmd.Admission]) -> list[tuple[BatchedSequence, int]]:
        """What a leader is handed: durable tokens, and the KV it may rely on."""
        sequences = []
        for admission in admissions:
            record = self.ledger.records[admission.request]
            if record.ended is not None or record.owner != owner:
                continue
            for choice, stream in enumerate(record.streams):
                if stream.closed:
                    continue
                start = start_of(admission, choice)
                if start.kv_tokens is None and record.first_by:
                    record.to_recompute += tokens_again(record.prompt_tokens, stream.num_tokens)
                sequence = BatchedSequence.handed_over(
                    record.request,
                    choice,
                    start,
                    arrival_index=record.arrival_index,
                    lengths=(record.prompt_tokens, record.max_tokens, stream.num_tokens),
                )
                sequences.append((sequence, record.output_tokens))
        return sequences

    def sampled(self, owner: Owner, sampled: Sampled) -> None:
        """A leader's tokens reach the ledger."""
        record = self.ledger.records[sampled.request]
        before_s = record.last_at_s
        if self.ledger.append(owner, sampled):
            stall_s = 0.0 if before_s is None else sampled.first_at_s - before_s
            recomputed, record.to_recompute = record.to_recompute, 0
            record.recomputed_tokens += recomputed
            self._after(self.hardware.commit_s, self._first_token(owner, sampled.request, stall_s, recomputed))
        if all(stream.closed for stream in record.streams):
            self._end(record, "finished")

    def _first_token(
        self, owner: Owner, request: RequestId, stall_s: float, recomputed: int
    ) -> Callable[[float], ev.Event]:
        return lambda at_s: ev.FirstToken(
            at_s=at_s,
            request=request,
            replica=owner[0],
            generation=owner[1],
            stall_ms=1000 * max(0.0, stall_s),
            recomputed_tokens=recomputed,
        )

    def evicted(self, owner: Owner, key: SequenceKey) -> None:
        """A leader gave a choice's KV blocks to others."""
        self._tell(
            lambda at_s: ev.RequestEvicted(at_s=at_s, request=key.request, replica=owner[0], generation=owner[1])
        )

    def never_fits(self, owner: Owner, request: RequestId) -> None:
        """The request fails, as it does live."""
        self._end(self.ledger.records[request], "failed")

    def _end(self, record: RequestRecord, outcome: str) -> None:
        if record.ended is not None:
            return
        record.ended = outcome
        record.ended_at_s = self.agenda.now_s
        tokens = tuple(stream.num_tokens for stream in record.streams)
        self._after(
            self.hardware.commit_s,
            lambda at_s: ev.RequestEnded.model_validate(
                {"at_s": at_s, "request": record.request, "outcome": outcome, "tokens": tokens}
            ),
        )

    def _end_request(self, command_id: str, command: cmd.EndRequest) -> None:
        if command.replica is not None:
            replica = self._replicas.get((command.replica, command.generation))
            if replica is not None and replica.state != "dead":
                replica.close(command.request)
        self._end(self.ledger.records[command.request], command.outcome)

    def _stop(self, command_id: str, command: cmd.StopService) -> None:
        self.stopped = True

    def _nothing(self, command_id: str, command: cmd.Command) -> None:
        """The command is for the record alone."""


def _rates(spec: ServingSpec, hardware: Hardware) -> LinkRates:
    profile = spec.profile
    return LinkRates(
        network_bytes_per_s=profile.link_bytes_per_s,
        local_bytes_per_s=hardware.local_bytes_per_s,
        storage_bytes_per_s=profile.storage_bytes_per_s,
        round_trip_s=profile.round_trip_s + hardware.transfer_s,
    )
