"""How long iterations take: by the profile's times of a layer, or by the phases of the paper's artifact."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from spotserve.core.batching import MicroBatch
from spotserve.core.cost import PipelineShape, shape_of, slowest_stage_ms
from spotserve.core.ids import GpuId
from spotserve.core.snapshot import Replica
from spotserve.core.spec import ServingSpec
from spotserve.sim.hardware import Hardware

Phases = Callable[[Replica, int], tuple[float, float]]
"""(seconds of the initial phase, seconds of each token after it) of a static batch of so many sequences."""


@dataclass(slots=True)
class PipelineDurations:
    """A micro-batch takes as long in every stage as in the slowest one: one that does not depend on what is before.

    Beside its own stage the leader has `iteration_s` of work with each: it schedules, and says what was sampled. It
    begins one in `least_s` at most.
    """

    spec: ServingSpec
    shape: PipelineShape
    iteration_s: float = 0.0
    least_s: float = 0.0
    _known_s: dict[int, float] = field(default_factory=dict)

    @classmethod
    def of(
        cls, spec: ServingSpec, replica: Replica, gpu_types: Mapping[GpuId, str], hardware: Hardware
    ) -> PipelineDurations:
        """The durations of a replica on GPUs of these types; one that is not named has the profile's own."""
        shape = shape_of(replica, gpu_types, spec.profile)
        return cls(spec, shape, hardware.iteration_s, hardware.least_iteration_s)

    def stage_s(self, batch: MicroBatch) -> float:
        """Until the first stage can take the next one."""
        return max(self._slowest_s(batch) + self.iteration_s, self.least_s)

    def pass_s(self, batch: MicroBatch) -> float:
        """Until it has been through all stages."""
        return self.shape.pipeline * self._slowest_s(batch) + self.iteration_s

    def _slowest_s(self, batch: MicroBatch) -> float:
        rows = batch.num_rows
        if rows not in self._known_s:
            self._known_s[rows] = slowest_stage_ms(self.spec, self.shape, tokens=rows) / 1000.0
        return self._known_s[rows]


@dataclass(frozen=True, slots=True)
class PhaseDurations:
    """A static batch by its phases: nothing else is in the pipeline meanwhile."""

    replica: Replica
    phases: Phases

    def stage_s(self, batch: MicroBatch) -> float:
        """The whole pass."""
        return self.pass_s(batch)

    def pass_s(self, batch: MicroBatch) -> float:
        """The initial phase if any of it is prefilled, else one token."""
        initial_s, token_s = self.phases(self.replica, len(batch.items))
        return initial_s if any(item.count > 1 for item in batch.items) else token_s
