"""GPU types of a snapshot: which there are, of which memory, and how fast a replica is on its own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from spotserve.core.cost import pipeline_decode_ms, shape_of
from spotserve.core.ids import GpuId
from spotserve.core.plan import PlanningProblem
from spotserve.core.snapshot import Replica, World
from spotserve.core.spec import Profile
from spotserve.errors import SpecError
from spotserve.solvers.configure.templates import GpuKind


def types_of(world: World, profile: Profile) -> Mapping[GpuId, str]:
    """The type of each GPU, empty for the profile's own. Raises SpecError for one without times in the profile."""
    types = {}
    for number, instance in enumerate(world.instances):
        for index, gpu in enumerate(instance.gpus):
            try:
                other = profile.device_of(gpu.type)
            except KeyError:
                known = ", ".join([profile.device, *(device.type for device in profile.devices)])
                raise SpecError(
                    f"snapshot.world.instances[{number}].gpus[{index}].type: GPU type {gpu.type!r} has no times in "
                    f"profile {profile.name!r}",
                    hint=f"profile.devices lists GPU types; known: {known}",
                ) from None
            types[gpu.id] = "" if other is None else other.type
    return types


def kinds_of(gpus: Iterable[GpuId], memory: Mapping[GpuId, int], types: Mapping[GpuId, str]) -> tuple[GpuKind, ...]:
    """The kinds of some GPUs, largest memory first."""
    found: dict[str, list[int]] = {}
    for gpu in gpus:
        found.setdefault(types[gpu], []).append(memory[gpu])
    kinds = [GpuKind(name, len(sizes), min(sizes)) for name, sizes in found.items()]
    return tuple(sorted(kinds, key=lambda kind: (-kind.memory_bytes, kind.type)))


def replica_decode_ms(problem: PlanningProblem, replica: Replica, *, running: int) -> float:
    """Milliseconds per output token of a replica as it stands: its own layers per stage, on the GPUs it has."""
    shape = shape_of(replica, problem.snapshot.world.gpu_types, problem.spec.profile)
    return pipeline_decode_ms(problem.spec, shape, running=running)
