"""How long iterations take: by the profile's times of a layer, or by the phases of the paper's artifact."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from spotserve.core.batching import MicroBatch
from spotserve.core.cost import PipelineShape, StageLoad, slowest_stage_ms
from spotserve.core.snapshot import Replica
from spotserve.core.spec import ServingSpec

Phases = Callable[[Replica, int], tuple[float, float]]
"""(seconds of the initial phase, seconds of each token after it) of a static batch of so many sequences."""


@dataclass(slots=True)
class PipelineDurations:
    """A micro-batch takes as long in every stage as in the slowest one: one that does not depend on what is before."""

    spec: ServingSpec
    shape: PipelineShape
    _known_s: dict[int, float] = field(default_factory=dict)

    @classmethod
    def of(cls, spec: ServingSpec, replica: Replica) -> PipelineDurations:
        """The durations of a replica on GPUs of the profile's own type."""
        stages = tuple(StageLoad(stage.layers[1] - stage.layers[0]) for stage in replica.stages)
        return cls(spec, PipelineShape(replica.tensor, stages))

    def stage_s(self, batch: MicroBatch) -> float:
        """Until the first stage can take the next one."""
        rows = batch.num_rows
        if rows not in self._known_s:
            self._known_s[rows] = slowest_stage_ms(self.spec, self.shape, tokens=rows) / 1000.0
        return self._known_s[rows]

    def pass_s(self, batch: MicroBatch) -> float:
        """Until it has been through all stages."""
        return self.shape.pipeline * self.stage_s(batch)


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
