"""What is simulated: a model on machines, its capacity, the requests that come, and what counts as well served."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Annotated, Literal

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
            given = self.spec.limits
            batches = given.static_batches
            if "static_batches" not in given.model_fields_set and policy.removesuffix(STATIC) == "paper":
                batches = 1  # The artifact's own number; of its baselines it is 2.
            limits = given.model_copy(update={"batching": "static", "static_batches": batches})
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


Seconds = Annotated[float, Field(ge=0, le=366 * 86_400)]
RequestsPerSecond = Annotated[float, Field(ge=0, le=100_000)]


class LengthsChoice(Frozen):
    """How long prompts and answers are."""

    kind: str = Field(default="fixed", pattern="^(fixed|uniform|lognormal|file)$")
    prompt_tokens: int = Field(default=512, ge=1, le=1_000_000)
    output_tokens: int = Field(default=128, ge=1, le=1_000_000)
    prompt_cv: float = Field(default=1.0, ge=0, le=10)
    output_cv: float = Field(default=1.0, ge=0, le=10)
    prompt_range: tuple[int, int] | None = None
    output_range: tuple[int, int] | None = None
    file: str | None = None
    """A request file (the paper's, Azure's, Mooncake's, ours), whose pairs of prompt and answer are drawn."""

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
        if self.kind != "file":
            _refuse(self, ("file",), f"with {self.kind} lengths")
        elif self.file is None:
            raise ValueError("lengths of a file need file, a request file")
        else:
            _refuse(self, ("prompt_tokens", "output_tokens"), "with lengths of a file")
        return self


class CurveChoice(Frozen):
    """How the rate of drawn arrivals moves; times count from the scenario's begin, the last rate stays."""

    points: tuple[tuple[Seconds, RequestsPerSecond], ...] = Field(default=(), max_length=10_000)
    """[second, requests per second], straight lines between: two are a ramp, two of one time a step."""
    steps_rps: tuple[RequestsPerSecond, ...] = Field(default=(), max_length=10_000)
    """One rate for each `step_s`."""
    file: str | None = None
    """Comma-separated rates, one for each `step_s`, as the paper's MAF segment."""
    step_s: float = Field(default=60.0, gt=0, le=366 * 86_400)

    @model_validator(mode="after")
    def _one_source(self) -> CurveChoice:
        if bool(self.points) + bool(self.steps_rps) + (self.file is not None) != 1:
            raise ValueError("a curve is one of points, steps_rps and file")
        if self.points:
            _refuse(self, ("step_s",), "with points")
        return self


class WorkloadChoice(Frozen):
    """A request file, or arrivals drawn by the seed."""

    file: str | None = None
    """The paper's request files, Azure's CSV, Mooncake's JSONL or ours, found by content."""
    rate_rps: float | None = Field(default=None, gt=0, le=100_000)
    """Of a file: time is stretched to this rate. Of drawn arrivals: their mean rate, to which a curve is scaled."""
    curve: CurveChoice | None = None
    """Of drawn arrivals: how their rate moves."""
    cv: float = Field(default=1.0, ge=0, le=20)
    """Coefficient of variation of the gaps of drawn arrivals (Gamma; 1 is Poisson)."""
    swing: float = Field(default=0.0, ge=0, lt=1)
    """Of drawn arrivals: how far the rate moves up and down over a period."""
    period_s: float = Field(default=86_400.0, gt=0, le=366 * 86_400)
    """Of a swing."""
    peak_s: float | None = Field(default=None, ge=0, le=366 * 86_400)
    """Of a swing: its first peak; the middle of the period if not given."""
    share: float = Field(default=1.0, gt=0, le=1)
    """Of a file: each request is kept with this probability, at its time."""
    start_s: float = Field(default=0.0, ge=0)
    stop_s: float | None = Field(default=None, gt=0)
    max_prompt_tokens: int | None = Field(default=None, ge=1)
    max_output_tokens: int | None = Field(default=None, ge=1)
    lengths: LengthsChoice | None = None

    @model_validator(mode="after")
    def _has_arrivals(self) -> WorkloadChoice:
        if self.file is None and self.rate_rps is None and self.curve is None:
            raise ValueError("a workload has a file or a rate_rps or a curve")
        if self.file is None:
            _refuse(self, ("start_s", "stop_s"), "without a file: duration_s says how long arrivals are drawn")
            _refuse(self, ("share",), "without a file: rate_rps says how many arrivals are drawn")
        else:
            _refuse(self, ("cv", "swing", "curve"), "with a file")
        if self.curve is not None:
            _refuse(self, ("swing",), "with a curve")
        if not self.swing:
            _refuse(self, ("period_s", "peak_s"), "without a swing")
        return self


class HazardChoice(Frozen):
    """A zone whose losses are drawn: many at once in shocks, and single ones."""

    zone: str = Field(min_length=1, max_length=200)
    instances: int = Field(ge=0, le=1024)
    shocks_per_day: float = Field(default=2.0, ge=0, le=10_000)
    shock_share: float = Field(default=0.8, ge=0, le=1)
    """How much of the zone a shock takes."""
    shock_spread_s: float = Field(default=60.0, ge=0, le=86_400)
    """Within which time."""
    singles_per_instance_day: float = Field(default=1.0, ge=0, le=10_000)
    outage_s: float = Field(default=600.0, ge=0, le=366 * 86_400)
    """Mean time after a shock in which nothing new comes."""
    recovery_s: float = Field(default=180.0, ge=0, le=366 * 86_400)
    """Mean time after a loss, or after an outage, until an instance is replaced."""
    gpu_type: str = Field(default="", max_length=200)


class TraceChoice(Frozen):
    """A fleet that stays, a trace file, the spot history of zones, or zones whose losses the seed draws."""

    instances: int | None = Field(default=None, ge=0, le=1024)
    file: str | None = None
    zones: tuple[str, ...] = ()
    """SkyPilot availability files, one per zone."""
    hazards: tuple[HazardChoice, ...] = Field(default=(), max_length=64)
    gpu_types: tuple[Annotated[str, Field(max_length=200)], ...] = Field(default=(), max_length=1024)
    """Of `zones`: the GPU type of each. Of `instances`: they take these types in turn. `own` is the profile's own."""
    instances_per_node: int = Field(default=1, ge=1, le=64)
    most_per_zone: int | None = Field(default=None, ge=1, le=1024)
    victims: Literal["oldest", "newest", "random"] = "oldest"
    """Which instances of a zone go when its count falls; random ones are drawn by the seed."""
    grace_s: float = Field(default=30.0, ge=0, le=86_400)
    """Of the zones' removals; 0 gives none of them a notice."""
    unnoticed_share: float = Field(default=0.0, ge=0, le=1)
    """Of drawn losses: how many come without a notice."""
    shared_shocks_per_day: float = Field(default=0.0, ge=0, le=10_000)
    """Drawn shocks that hit all zones at once."""
    ready_after_s: float = Field(default=0.0, ge=0, le=86_400)
    """An instance is ready so long after the file adds it; the paper's files act a grace period early."""
    start_s: float = Field(default=0.0, ge=0)
    stop_s: float | None = Field(default=None, gt=0)

    @model_validator(mode="after")
    def _one_source(self) -> TraceChoice:
        sources = (self.instances is not None, self.file is not None, bool(self.zones), bool(self.hazards))
        if sum(sources) != 1:
            raise ValueError("a trace is one of instances, file, zones and hazards")
        if not self.zones:
            _refuse(self, ("instances_per_node", "most_per_zone", "victims"), "without zones")
        if not self.hazards:
            _refuse(self, ("unnoticed_share", "shared_shocks_per_day"), "without hazards")
        if not self.zones and not self.hazards:
            _refuse(self, ("grace_s",), "without zones or hazards")
        if self.instances is not None:
            _refuse(self, ("ready_after_s", "start_s", "stop_s"), "with instances that stay")
        if self.hazards:
            _refuse(self, ("ready_after_s",), "with hazards: their recovery_s is until an instance is ready")
            _refuse(self, ("start_s", "stop_s"), "with hazards: duration_s says how long losses are drawn")
        self._types_of_a_kind()
        return self

    def _types_of_a_kind(self) -> None:
        if self.file is not None:
            _refuse(self, ("gpu_types",), "with a file, whose `add` events have a gpu_type each")
        if self.hazards:
            _refuse(self, ("gpu_types",), "with hazards, which have a gpu_type each")
        if self.zones and self.gpu_types and len(self.gpu_types) != len(self.zones):
            raise ValueError(f"{len(self.gpu_types)} gpu_types for {len(self.zones)} zones: each zone needs one")


class RooflineChoice(Frozen):
    """What a GPU of the catalogue reaches of its data sheet, and the forwards that its times are of."""

    context_tokens: int | None = Field(default=None, ge=1)
    """What a decoding sequence has behind it; 1024 or the model's most if not given."""
    decode_rows: int = Field(default=32, ge=1, le=4096)
    """How many rows of a forward decode before the others prefill."""
    memory_efficiency: float | None = Field(default=None, gt=0, le=1)
    flops_efficiency: float | None = Field(default=None, gt=0, le=1)
    link_efficiency: float | None = Field(default=None, gt=0, le=1)
    nic_efficiency: float | None = Field(default=None, gt=0, le=1)


class ModelChoice(Frozen):
    """The model, what it is measured with, and the limits of a replica."""

    name: str | None = None
    """A model table of ours."""
    spec: str | None = None
    """A spec.toml, model and profile in one."""
    profile: str = "paper"
    """`paper` (its T4 figures), a GPU of the catalogue (`roofline`), or a profile file."""
    roofline: RooflineChoice | None = None
    """Of GPUs of the catalogue."""
    dtype: DType | None = None
    """Of weights and KV, instead of the table's."""
    storage_bytes_per_s: float | None = Field(default=None, gt=0)
    """At which an instance reads weights, instead of the profile's."""
    max_running: int = Field(default=8, ge=1, le=1024)
    max_model_len: int | None = Field(default=None, ge=1)
    migration_headroom_bytes: int = Field(default=0, ge=0)
    spare_instances: int | None = Field(default=None, ge=0, le=1024)
    """Under `live`: idle instances that wait for the next preemption, more are given back; else all are kept."""
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
