"""The world as the solvers see it: who stays, who is doomed, who is gone, and which replicas that touches.

The trigger counts beside the recorded states: a dry run for `--lose i3` plans on the cluster as it is, with i3 taken
as doomed (notice) or gone (lost).
"""

from __future__ import annotations

from dataclasses import dataclass

from spotserve.core.ids import GpuId, ReplicaId, natural_key
from spotserve.core.plan import PlanningProblem
from spotserve.core.snapshot import InstanceView, Replica, RequestProgress


@dataclass(frozen=True, slots=True)
class View:
    """Classified GPUs and replicas; every tuple is in the natural order of ids."""

    memory: dict[GpuId, int]
    staying: tuple[GpuId, ...]
    doomed: dict[GpuId, float | None]
    intact: tuple[Replica, ...]
    draining: tuple[Replica, ...]
    lost: tuple[Replica, ...]

    def alive(self, gpu: GpuId) -> bool:
        """Whether a worker is still there, doomed or not."""
        return gpu in self.memory

    @property
    def remaining_s(self) -> float | None:
        """The shortest grace period left."""
        return min((left for left in self.doomed.values() if left is not None), default=None)


def instance_state(instance: InstanceView, problem: PlanningProblem) -> str:
    """The recorded state of an instance; a ready one is what the trigger says of it."""
    hypothetical = {"lost": "gone", "notice": "doomed"}
    if instance.state == "ready" and instance.id in problem.trigger.instances:
        return hypothetical.get(problem.trigger.kind, instance.state)
    return instance.state


def grace_left_s(instance: InstanceView, problem: PlanningProblem) -> float | None:
    """The grace period left of a doomed instance; None when nobody said."""
    known = [instance.remaining_s]
    if instance.id in problem.trigger.instances:
        known.append(problem.trigger.remaining_s)
    return min((left for left in known if left is not None), default=None)


def look(problem: PlanningProblem) -> View:
    """Classify the snapshot's GPUs and replicas under the trigger.

    Doomed GPUs without a position are not there: what they hold may be gone before it is read.
    """
    used = {gpu for replica in problem.snapshot.world.replicas for gpu in replica.gpus}
    memory: dict[GpuId, int] = {}
    staying: list[GpuId] = []
    doomed: dict[GpuId, float | None] = {}
    for instance in sorted(problem.snapshot.world.instances, key=lambda view: natural_key(view.id)):
        state = instance_state(instance, problem)
        if state not in ("ready", "doomed"):
            continue
        for gpu in sorted(instance.gpus, key=lambda gpu: natural_key(gpu.id)):
            if state == "doomed" and gpu.id not in used:
                continue
            memory[gpu.id] = gpu.memory_bytes
            if state == "doomed":
                doomed[gpu.id] = grace_left_s(instance, problem)
            else:
                staying.append(gpu.id)
    replicas = sorted(problem.snapshot.world.replicas, key=lambda replica: natural_key(replica.id))
    lost = tuple(r for r in replicas if any(gpu not in memory for gpu in r.gpus))
    draining = tuple(r for r in replicas if r not in lost and any(gpu in doomed for gpu in r.gpus))
    intact = tuple(r for r in replicas if r not in lost and r not in draining)
    return View(memory, tuple(staying), doomed, intact, draining, lost)


def requests_of(problem: PlanningProblem, replica: ReplicaId) -> tuple[RequestProgress, ...]:
    """The live requests of a replica in a fixed order."""
    return problem.snapshot.live_requests.get(replica, ())


def kv_tokens(progress: RequestProgress) -> int:
    """Tokens of a request whose KV is in place."""
    return sum(choice.kv_tokens for choice in progress.choices)
