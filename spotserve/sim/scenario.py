"""What is simulated: a model on machines, its capacity, the requests that come, and what counts as well served."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from pydantic import Field, model_validator

from spotserve.core.frozen import Frozen
from spotserve.core.ids import InstanceId
from spotserve.core.spec import DType, ServingSpec
from spotserve.core.trace import Trace, TraceEvent
from spotserve.sim.hardware import Hardware
from spotserve.sim.workloads import Arrival, Workload

ONDEMAND = "ondemand"
"""The policy that rents no spot instance: `live` on a fleet that stays."""
STATIC = "+static"
"""Behind a policy's name: with the static batches of the paper's artifact."""


class Slo(Frozen):
    """What a served-well request keeps; none of them given: ended at all."""

    ttft_s: float | None = Field(default=None, gt=0)
    tpot_s: float | None = Field(default=None, gt=0)
    latency_s: float | None = Field(default=None, gt=0)


@dataclass(frozen=True, slots=True)
class Scenario:
    """One scenario, read and resolved; a policy and the seed's draws are all that is left open."""

    name: str
    spec: ServingSpec
    hardware: Hardware
    trace: Trace
    workload: Workload
    slo: Slo
    seed: int
    policies: tuple[str, ...]
    duration_s: float
    """Costs are counted so long; requests that are still open then have `drain_s` more."""
    drain_s: float = 600.0
    known_load_rps: float | None = None
    """A rate that is told before the first placement and never measured, as the paper's replay has it."""
    ondemand_instances: int | None = None

    def arrivals(self) -> tuple[Arrival, ...]:
        """The requests that come within the duration, no longer than the model takes."""
        longest = self.spec.limits.max_model_len
        return tuple(
            Arrival(one.at_s, prompt := min(one.prompt_tokens, longest - 1), min(one.output_tokens, longest - prompt))
            for one in self.workload.arrivals
            if one.at_s <= self.duration_s
        )

    def of_policy(self, policy: str) -> Scenario:
        """The scenario under a policy, as a name or a name with `+static`."""
        if policy.endswith(STATIC):
            limits = self.spec.limits.model_copy(update={"batching": "static"})
            spec = self.spec.model_copy(update={"limits": limits})
            return replace(self, spec=spec).of_policy(policy.removesuffix(STATIC))
        if policy != ONDEMAND:
            return replace(self, spec=self.spec.model_copy(update={"policy": policy}))
        count = self.ondemand_instances or 0
        trace = Trace(name=f"{count} on-demand", events=_steady(count), end_s=self.duration_s)
        hardware = self.hardware.model_copy(update={"spot_usd_per_hour": self.hardware.ondemand_usd_per_hour})
        spec = self.spec.model_copy(update={"policy": "live"})
        return replace(self, spec=spec, trace=trace, hardware=hardware)


def _steady(count: int) -> tuple[TraceEvent, ...]:
    return tuple(TraceEvent(at_s=0.0, kind="add", instances=(InstanceId(f"i{index}"),)) for index in range(count))


def _refuse(choice: Frozen, names: Iterable[str], why: str) -> None:
    """Raise ValueError if one of these fields was given: it would be ignored."""
    given = sorted(choice.model_fields_set.intersection(names))
    if given:
        raise ValueError(f"{given[0]} has no meaning {why}")


class LengthsChoice(Frozen):
    """How long prompts and answers are."""

    kind: str = Field(default="fixed", pattern="^(fixed|uniform|lognormal)$")
    prompt_tokens: int = Field(default=512, ge=1, le=1_000_000)
    output_tokens: int = Field(default=128, ge=1, le=1_000_000)
    prompt_cv: float = Field(default=1.0, ge=0, le=10)
    output_cv: float = Field(default=1.0, ge=0, le=10)
    prompt_range: tuple[int, int] | None = None
    output_range: tuple[int, int] | None = None

    @model_validator(mode="after")
    def _fields_of_its_kind(self) -> LengthsChoice:
        if self.kind == "uniform":
            if self.prompt_range is None or self.output_range is None:
                raise ValueError("uniform lengths need prompt_range and output_range, like [16, 1024]")
            _refuse(self, ("prompt_tokens", "output_tokens"), "with uniform lengths")
        else:
            _refuse(self, ("prompt_range", "output_range"), f"with {self.kind} lengths")
        if self.kind != "lognormal":
            _refuse(self, ("prompt_cv", "output_cv"), f"with {self.kind} lengths")
        return self


class WorkloadChoice(Frozen):
    """A request file, or arrivals drawn by the seed."""

    file: str | None = None
    """The paper's request files, Azure's CSV, Mooncake's JSONL or ours, found by content."""
    rate_rps: float | None = Field(default=None, gt=0, le=100_000)
    """Of a file: time is stretched to this rate. Of drawn arrivals: their mean rate."""
    cv: float = Field(default=1.0, ge=0, le=20)
    """Coefficient of variation of the gaps of drawn arrivals (Gamma; 1 is Poisson)."""
    swing: float = Field(default=0.0, ge=0, lt=1)
    """Of drawn arrivals: how far the rate moves up and down over a day."""
    start_s: float = Field(default=0.0, ge=0)
    stop_s: float | None = Field(default=None, gt=0)
    max_prompt_tokens: int | None = Field(default=None, ge=1)
    max_output_tokens: int | None = Field(default=None, ge=1)
    lengths: LengthsChoice | None = None

    @model_validator(mode="after")
    def _has_arrivals(self) -> WorkloadChoice:
        if self.file is None and self.rate_rps is None:
            raise ValueError("a workload has a file or a rate_rps")
        if self.file is None:
            _refuse(self, ("start_s", "stop_s"), "without a file: duration_s says how long arrivals are drawn")
        else:
            _refuse(self, ("cv", "swing"), "with a file")
        return self


class TraceChoice(Frozen):
    """A fleet that stays, a trace file, or the spot history of zones."""

    instances: int | None = Field(default=None, ge=0, le=1024)
    file: str | None = None
    zones: tuple[str, ...] = ()
    """SkyPilot availability files, one per zone."""
    instances_per_node: int = Field(default=1, ge=1, le=64)
    most_per_zone: int | None = Field(default=None, ge=1, le=1024)
    grace_s: float = Field(default=30.0, ge=0, le=86_400)
    """Of the zones' removals; 0 gives none of them a notice."""
    ready_after_s: float = Field(default=0.0, ge=0, le=86_400)
    """An instance is ready so long after the file adds it; the paper's files act a grace period early."""
    start_s: float = Field(default=0.0, ge=0)
    stop_s: float | None = Field(default=None, gt=0)

    @model_validator(mode="after")
    def _one_source(self) -> TraceChoice:
        if (self.instances is not None) + (self.file is not None) + bool(self.zones) != 1:
            raise ValueError("a trace is one of instances, file and zones")
        if not self.zones:
            _refuse(self, ("instances_per_node", "most_per_zone", "grace_s"), "without zones")
        if self.instances is not None:
            _refuse(self, ("ready_after_s", "start_s", "stop_s"), "with instances that stay")
        return self


class ModelChoice(Frozen):
    """The model, what it is measured with, and the limits of a replica."""

    name: str | None = None
    """A model table of ours."""
    spec: str | None = None
    """A spec.toml, model and profile in one."""
    profile: str = "paper"
    """`paper` (its T4 figures), a GPU of the catalogue (`roofline`), or a profile file."""
    dtype: DType | None = None
    """Of weights and KV, instead of the table's."""
    storage_bytes_per_s: float | None = Field(default=None, gt=0)
    """At which an instance reads weights, instead of the profile's."""
    max_running: int = Field(default=8, ge=1, le=1024)
    max_model_len: int | None = Field(default=None, ge=1)
    migration_headroom_bytes: int = Field(default=0, ge=0)
    solvers: dict[str, str] = {}

    @model_validator(mode="after")
    def _one_source(self) -> ModelChoice:
        if (self.name is None) == (self.spec is None):
            raise ValueError("a model is either a name or a spec")
        if self.spec is not None:
            _refuse(self, type(self).model_fields.keys() - {"spec", "solvers"}, "with a spec, which has its own")
        return self


class ScenarioFile(Frozen):
    """A scenario as its TOML file has it; paths are relative to the file."""

    format_version: str = Field(default="0.1", pattern="^0\\.1$")
    name: str = Field(min_length=1, max_length=200)
    seed: int = Field(default=0, ge=0, lt=2**63)
    policies: tuple[str, ...] = Field(default=("live", "reroute", "reparallelize"), min_length=1)
    model: ModelChoice
    hardware: Hardware
    trace: TraceChoice
    workload: WorkloadChoice
    slo: Slo = Slo()
    duration_s: float | None = Field(default=None, gt=0, le=366 * 86_400)
    drain_s: float = Field(default=600.0, ge=0, le=86_400)
    known_load_rps: float | None = Field(default=None, gt=0)
    ondemand_instances: int | None = Field(default=None, ge=1, le=1024)
