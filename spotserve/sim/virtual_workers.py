"""Workers in virtual time: what they hold, and what the steps of a plan do to them."""

from __future__ import annotations

from spotserve.core import commands as cmd
from spotserve.core import events as ev
from spotserve.core.ids import GpuId, InstanceId, ReplicaId, RequestId, instance_of
from spotserve.core.plan import CopyWeights, LoadWeights, Step
from spotserve.core.slices import Shard, Slice, shard_slices, stage_shard
from spotserve.core.spec import ServingSpec
from spotserve.core.state import step_gpus
from spotserve.sim.faults import Faults
from spotserve.sim.streams import Owner
from spotserve.sim.virtual_leaders import VirtualLeaders, VirtualReplica
from spotserve.sim.virtual_timeline import VirtualRates


class VirtualWorkers(VirtualLeaders):
    """The GPUs: weights of positions, those that have come for one, and those that belong to none."""

    def __init__(
        self, spec: ServingSpec, *, seed: int, rates: VirtualRates, faults: Faults, failure_share: float
    ) -> None:
        super().__init__(seed=seed, rates=rates, faults=faults)
        self.spec = spec
        self.failure_share = failure_share
        self.holdings: dict[GpuId, dict[Owner, Shard]] = {}
        self.arrived: dict[GpuId, dict[Owner, tuple[Slice, ...]]] = {}
        """Weights that came for a position which does not serve yet."""
        self.loose: dict[GpuId, tuple[Slice, ...]] = {}
        """Weights that belong to no position any more."""

    def _execute_step(self, command_id: str, command: cmd.ExecuteStep) -> None:
        step = command.step
        instances = sorted({instance_of(gpu) for gpu in step_gpus(step)})
        size = getattr(step, "bytes", 0)
        duration_s = self._spread(self.rates.step_s + size / self.rates.link_bytes_per_s)
        duration_s *= self.faults.step_slowness(step) * max(self.link(name).slowness for name in instances)
        error = self.faults.step_error(step)
        resumes = self._resumes_of(step)
        self.down(
            instances,
            lambda: self._push_effect(command, duration_s, error, resumes),
        )

    def _push_effect(self, command: cmd.ExecuteStep, duration_s: float, error: str | None, resumes: int) -> None:
        def effect() -> ev.Event | None:
            if self._resumes_of(command.step) != resumes:
                return None  # A leader takes its commands in order: the resume of an abort undoes a quiesce.
            event = self._failed_step(command, error) if error is not None else self._step_outcome(command)
            if event is not None:
                self.up(_answering(command.step), self._spread(self.rates.step_s / 2), lambda: event)
            return None

        self.after(duration_s, effect)

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
            return None if command.epoch in self.aborted else self._quiesce(command, step.replica)
        if step.kind == "activate":
            return self._activate(command)
        if step.kind == "release" and step.id in self.plans[command.epoch].last_releases:
            for gpu in step.workers:
                self.holdings[gpu].pop((step.replica, step.generation), None)
                self.loose.pop(gpu, None)
        if isinstance(step, CopyWeights | LoadWeights) and command.epoch not in self.aborted:
            self._keep(command.epoch, step)
        missing = tuple((p.request, p.choice) for p in command.manifest if self._gone(p.request, p.choice))
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

    def _keep(self, epoch: int, step: CopyWeights | LoadWeights) -> None:
        gpu = step.destination if isinstance(step, CopyWeights) else step.workers[0]
        pieces = self.arrived.setdefault(gpu, {})
        owner = (step.replica, epoch)
        pieces[owner] = (*pieces.get(owner, ()), *step.slices)

    def _gone(self, request: RequestId, choice: int) -> bool:
        """Whether the source has freed a choice's KV."""
        return self.requests[request].is_closed(choice)

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

    def _activate(self, command: cmd.ExecuteStep) -> ev.Event | None:
        step = command.step
        assert step.kind == "activate"
        virtual = self.replicas.get((step.replica, step.generation))
        if virtual is None or virtual.state == "dead":
            return self._failed_step(command, "no such position")
        if virtual.state == "prepared":
            virtual.state = "serving"
            self._take_positions(virtual)
            self._start(virtual, command.admissions)
        return ev.StepDone(at_s=self.at_s, epoch=command.epoch, step=step.id)

    def _take_positions(self, virtual: VirtualReplica) -> None:
        """From now on its ranks hold their shards whole."""
        target = virtual.replica
        for stage in target.stages:
            for rank, gpu in enumerate(stage.gpus):
                shard = stage_shard(self.spec.model, layers=stage.layers, tensor=target.tensor, rank=rank)
                self.holdings[gpu][virtual.owner] = shard
                self.arrived.get(gpu, {}).pop(virtual.owner, None)

    def _loosen(self, owner: Owner, instance: InstanceId) -> None:
        """What an instance holds of a generation that is no more belongs to no position; the next plan may use it."""
        for gpu in [gpu for gpu in self.holdings if instance_of(gpu) == instance]:
            shard = self.holdings[gpu].pop(owner, None)
            pieces = () if shard is None else tuple(shard_slices(self.spec.model, shard))
            pieces += self.arrived.get(gpu, {}).pop(owner, ())
            if pieces:
                self.loose[gpu] = (*self.loose.get(gpu, ()), *pieces)


def _answering(step: Step) -> InstanceId:
    """The worker that tells how a step went."""
    is_copy = step.kind in ("copy_weights", "copy_kv", "copy_kv_delta")
    return instance_of(step_gpus(step)[-1 if is_copy else 0])
