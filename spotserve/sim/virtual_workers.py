"""Workers in virtual time: what they hold, and what the steps of a plan do to them."""

from __future__ import annotations

from collections.abc import Iterable

from spotserve.core import commands as cmd
from spotserve.core import events as ev
from spotserve.core.ids import GpuId, InstanceId, ReplicaId, StepId, instance_of
from spotserve.core.plan import CopyKv, CopyKvDelta, CopyWeights, LoadWeights, Release, Reserve, Step
from spotserve.core.spec import ServingSpec
from spotserve.core.state import step_gpus
from spotserve.core.wire import ChoicePosition
from spotserve.errors import InvariantError
from spotserve.sim.faults import Faults
from spotserve.sim.streams import Owner
from spotserve.sim.virtual_leaders import VirtualLeaders, VirtualReplica
from spotserve.sim.virtual_memory import VirtualGpu, WeightTable
from spotserve.sim.virtual_timeline import VirtualRates


class VirtualWorkers(VirtualLeaders):
    """The GPUs: each holds to its memory whatever a plan says of it."""

    def __init__(
        self, spec: ServingSpec, *, seed: int, rates: VirtualRates, faults: Faults, failure_share: float
    ) -> None:
        super().__init__(seed=seed, rates=rates, faults=faults)
        self.spec = spec
        self.failure_share = failure_share
        self.gpus: dict[GpuId, VirtualGpu] = {}
        self.current: set[Owner] = set()
        """The generations of the last committed plan that nobody has fenced."""
        self.unfreed: set[GpuId] = set()
        """GPUs on which a release failed since positions of no generation were last freed."""
        self.overtaken: set[GpuId] = set()
        """GPUs on which a reserve of a coordinator that had died came about since then."""
        self.num_restarts = 0
        self.fetched: dict[int, set[StepId]] = {}
        """Steps of each epoch that brought weights."""
        self._table = WeightTable(spec)

    def _execute_step(self, command_id: str, command: cmd.ExecuteStep) -> None:
        step = command.step
        instances = sorted({instance_of(gpu) for gpu in step_gpus(step)})
        size = getattr(step, "bytes", 0)
        duration_s = self._spread(self.rates.step_s + size / self.rates.link_bytes_per_s)
        duration_s *= self.faults.step_slowness(step) * max(self.link(name).slowness for name in instances)
        error = self.faults.step_error(step)
        resumes, restarts = self._resumes_of(step), self.num_restarts

        def effect() -> ev.Event | None:
            if self._resumes_of(command.step) != resumes:
                return None  # A leader takes its commands in order: the resume of an abort undoes a quiesce.
            event = self._failed_step(command, error) if error is not None else self._step_outcome(command)
            if isinstance(event, ev.StepFailed) and isinstance(command.step, Release):
                self.unfreed.update(command.step.workers)
            if isinstance(command.step, Reserve) and self.num_restarts != restarts:
                self.overtaken.update(command.step.workers)
            if event is not None:
                self.up(_answering(command.step), self._spread(self.rates.step_s / 2), lambda: event)
            return None

        def arrive() -> None:
            self.after(duration_s, effect)

        self.down(instances, arrive)

    def _resumes_of(self, step: Step) -> int:
        if step.kind != "quiesce":
            return 0
        return sum(virtual.resumes for virtual in self.replicas.values() if virtual.replica.id == step.replica)

    def _failed_step(self, command: cmd.ExecuteStep, error: str) -> ev.Event:
        return ev.StepFailed(at_s=self.at_s, epoch=command.epoch, step=command.step.id, error=error)

    def _step_outcome(self, command: cmd.ExecuteStep) -> ev.Event | None:
        step = command.step
        if any(instance_of(gpu) not in self.alive for gpu in step_gpus(step)):
            return self._interrupted(command)
        if self.random.random() < self.failure_share:
            return self._failed_step(command, "drawn by the seed")
        if step.kind == "quiesce":
            if command.epoch not in self.aborted:
                self._quiesce(command, step.replica)
            return None
        if step.kind == "activate":
            return self._activate(command)
        if isinstance(step, Release):
            self._release(command.epoch, step)
        if isinstance(step, Reserve | CopyWeights | LoadWeights):
            if command.epoch in self.aborted:
                return self._failed_step(command, "the epoch was aborted")
            epoch = command.epoch
            error = self._reserve(epoch, step) if isinstance(step, Reserve) else self._fetch(epoch, step)
            if error is not None:
                return self._failed_step(command, error)
        missing = tuple((p.request, p.choice) for p in command.manifest if not self._can_send(command, p))
        if step.kind == "copy_kv_delta":
            brought = {(p.request, p.choice) for p in command.manifest} - set(missing)
            self.brought[command.epoch, step.id] = brought
        return ev.StepDone(
            at_s=self.at_s, epoch=command.epoch, step=step.id, bytes=getattr(step, "bytes", 0), missing=missing
        )

    def _interrupted(self, command: cmd.ExecuteStep) -> ev.Event | None:
        """One end of a step is dead: the other may notice before the failure detector does."""
        if _answering(command.step) not in self.alive or self.random.random() < 0.5:
            return None
        return self._failed_step(command, "the peer is gone")

    # Memory

    def _reserve(self, epoch: int, step: Reserve) -> str | None:
        """Take a position's memory; the error of a worker that has not so much."""
        name = step.workers[0]
        gpu = self.gpus[name]
        owner = (step.replica, step.generation)
        replica = self.replicas[owner].replica
        shard = self._table.shard_of(replica, name)
        is_live = self.plans[epoch].mode == "live"
        taken = self.faults.taken_bytes(step, gpu.memory_bytes - gpu.used_bytes())
        if gpu.reserve(owner, shard, replica.kv_blocks, is_eager=is_live, taken_bytes=taken):
            return None
        if not taken and name not in self.unfreed | self.overtaken:
            raise InvariantError(f"{step.id} counts on memory that {name} has not: {gpu.used_bytes()} bytes are used")
        return f"over_memory: {gpu.used_bytes()} bytes are used, the budget is {gpu.memory_bytes - taken}"

    def _fetch(self, epoch: int, step: CopyWeights | LoadWeights) -> str | None:
        """Weights come, if their holder has them and there is room; what has come once does not come again."""
        if step.id in self.fetched.get(epoch, ()):
            return None
        gpu = self.gpus[step.destination if isinstance(step, CopyWeights) else step.workers[0]]
        if (step.replica, epoch) not in gpu.positions:
            return "no such position"
        if isinstance(step, CopyWeights) and not self.gpus[step.source].has(step.slices):
            if not self.gpus[step.source].was_short and self._came(
                epoch, [s for s in self.plans[epoch].steps if s.id in step.depends_on]
            ):
                raise InvariantError(f"{step.source} is to send weights in {step.id} that it does not have")
            return f"{step.source} does not have what it is to send"
        if not gpu.expect(step.slices):
            return f"over_memory: {gpu.used_bytes()} bytes are used, the budget is {gpu.memory_bytes}"
        gpu.write(step.slices)
        self.fetched.setdefault(epoch, set()).add(step.id)
        return None

    def _came(self, epoch: int, steps: Iterable[Step]) -> bool:
        """Whether those of some steps that bring weights did so."""
        due = {step.id for step in steps if isinstance(step, CopyWeights | LoadWeights)}
        return due <= self.fetched.get(epoch, set())

    def _release(self, epoch: int, step: Release) -> None:
        owner = (step.replica, step.generation)
        gpu = self.gpus[step.workers[0]]
        if step.id in self.plans[epoch].last_releases:
            gpu.release(owner)
        else:
            gpu.give_up(owner, step.slices, keep_blocks=0 if step.kv else step.keep_blocks)

    def _loosen(self, owner: Owner, instance: InstanceId) -> None:
        """What an instance holds of a generation that is no more belongs to no position; the next plan may use it."""
        for name, gpu in self.gpus.items():
            if instance_of(name) == instance:
                gpu.loosen(owner)

    # What runs

    def _can_send(self, command: cmd.ExecuteStep, position: ChoicePosition) -> bool:
        """Whether the source still has the KV of a choice."""
        step = command.step
        assert isinstance(step, CopyKv | CopyKvDelta)
        if self.requests[position.request].is_closed(position.choice):
            return False
        sources = [v for v in self.replicas.values() if v.replica.id == step.route.from_replica]
        return any(v.state != "dead" and v.holds(position) for v in sources)

    def _quiesce(self, command: cmd.ExecuteStep, replica: ReplicaId) -> None:
        virtual = next((v for v in self.replicas.values() if v.replica.id == replica and v.state == "serving"), None)
        if virtual is None:
            return
        generation = virtual.replica.generation

        def report(positions: tuple[ChoicePosition, ...]) -> None:
            if virtual.leader not in self.alive:
                return
            self.up(
                virtual.leader,
                self._spread(self.rates.step_s / 2),
                lambda: ev.Quiesced(
                    at_s=self.at_s,
                    epoch=command.epoch,
                    step=command.step.id,
                    replica=replica,
                    generation=generation,
                    positions=positions,
                ),
            )

        virtual.engine.quiesce(report)

    def _activate(self, command: cmd.ExecuteStep) -> ev.Event | None:
        step = command.step
        assert step.kind == "activate"
        virtual = self.replicas.get((step.replica, step.generation))
        if virtual is None or virtual.state == "dead":
            return self._failed_step(command, "no such position")
        if virtual.state == "prepared":
            if not self._has_weights(command.epoch, virtual):
                return self._failed_step(command, "its weights are not all here")
            self._take_over(virtual, command.admissions)
            virtual.engine.start()
        return ev.StepDone(at_s=self.at_s, epoch=command.epoch, step=step.id)

    def _has_weights(self, epoch: int, virtual: VirtualReplica) -> bool:
        """A replica serves with all of its weights: a plan that brings too few is wrong, a step that failed is not."""
        gpus = {name: self.gpus[name] for name in virtual.replica.gpus}
        if any(virtual.owner not in gpu.positions for gpu in gpus.values()):
            return False
        lacking = [name for name, gpu in gpus.items() if gpu.lacks(virtual.owner)]
        steps = [step for step in self.plans[epoch].steps if getattr(step, "replica", None) == virtual.replica.id]
        if lacking and self._came(epoch, steps):
            raise InvariantError(f"{virtual.replica.id} is activated, and {lacking[0]} lacks weights")
        return not lacking


def _answering(step: Step) -> InstanceId:
    """The worker that tells how a step went."""
    is_copy = step.kind in ("copy_weights", "copy_kv", "copy_kv_delta")
    return instance_of(step_gpus(step)[-1 if is_copy else 0])
