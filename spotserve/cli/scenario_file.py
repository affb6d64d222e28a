"""Scenario files: read within bounds, and resolved into a model, machines, capacity and requests."""

from __future__ import annotations

from pathlib import Path

from spotserve.cli.config import Origin, parse_solvers
from spotserve.cli.plan_file import model_of, read_bytes, spec_of, toml_of
from spotserve.cloud.traces import read_trace, skypilot_trace, zone_counts
from spotserve.core.gpu_catalogue import GPU_TYPES, gpu_type
from spotserve.core.ids import InstanceId
from spotserve.core.model_tables import model_table
from spotserve.core.paper_profiles import paper_profile
from spotserve.core.roofline import roofline_profile
from spotserve.core.spec import Limits, Profile, ServingSpec
from spotserve.core.trace import Trace, TraceEvent, delayed, window
from spotserve.errors import SpecError
from spotserve.sim.scenario import LengthsChoice, ModelChoice, Scenario, ScenarioFile, TraceChoice, WorkloadChoice
from spotserve.sim.workloads import (
    FixedLengths,
    Lengths,
    LognormalLengths,
    UniformLengths,
    Workload,
    at_rate,
    clipped,
    constant,
    diurnal,
    read_workload,
    synthetic,
    with_lengths,
)
from spotserve.sim.workloads import window as workload_window

MAX_WORKLOAD_BYTES = 256 * 1024 * 1024
DAY_S = 86_400.0


def scenario_of(path: Path, *, seed: int | None = None) -> Scenario:
    """The scenario in a file, everything it names read. Raises SpecError."""
    file = toml_of(ScenarioFile, path, what="SCENARIO")
    return resolved(file, path.parent, seed=file.seed if seed is None else seed)


def resolved(file: ScenarioFile, folder: Path, *, seed: int) -> Scenario:
    """A scenario with its files read; what is drawn is drawn by the seed."""
    spec = serving_spec(file.model, folder, gpus_per_instance=file.hardware.gpus_per_instance)
    parse_solvers(file.model.solvers, Origin("model.solvers"))
    trace = trace_of(file.trace, folder)
    require_one_type(trace, spec.profile)
    duration_s = file.duration_s or _duration_s(file, trace)
    workload = workload_of(file.workload, folder, seed=seed, duration_s=duration_s)
    return Scenario(
        name=file.name,
        spec=spec,
        hardware=file.hardware,
        trace=trace,
        workload=workload,
        slo=file.slo,
        seed=seed,
        policies=file.policies,
        duration_s=duration_s,
        drain_s=file.drain_s,
        known_load_rps=file.known_load_rps,
        ondemand_instances=file.ondemand_instances,
    )


def require_one_type(trace: Trace, profile: Profile) -> None:
    """Raise SpecError for a trace of GPUs that the profile is not of: they would be simulated as if they were."""
    others = sorted({event.gpu_type for event in trace.events} - {"", profile.device})
    if others:
        raise SpecError(
            f"trace {trace.name} has instances of GPU type {others[0]}, the profile is of {profile.device}",
            hint="a scenario simulates GPUs of one type",
        )


def _duration_s(file: ScenarioFile, trace: Trace) -> float:
    if trace.end_s is None:
        raise SpecError(
            f"scenario {file.name!r} has no end: its trace has none and there is no duration_s",
            hint="set duration_s, in seconds",
        )
    return trace.end_s


def serving_spec(choice: ModelChoice, folder: Path, *, gpus_per_instance: int) -> ServingSpec:
    """The model, its profile and the limits of a replica."""
    if choice.spec is not None:
        return spec_of(folder / choice.spec, what="spec").model_copy(update={"solvers": choice.solvers})
    assert choice.name is not None
    model = model_table(choice.name, dtype=choice.dtype, max_model_len=choice.max_model_len)
    limits = Limits(
        max_running=choice.max_running,
        max_model_len=model.max_model_len,
        migration_headroom_bytes=choice.migration_headroom_bytes,
    )
    profile = _profile(choice, folder, gpus_per_instance=gpus_per_instance)
    if choice.storage_bytes_per_s is not None:
        told = f"{profile.source}; storage {choice.storage_bytes_per_s:g} bytes/s by the scenario"
        profile = profile.model_copy(update={"storage_bytes_per_s": choice.storage_bytes_per_s, "source": told})
    return ServingSpec(model=model, profile=profile, limits=limits, solvers=choice.solvers)


def _profile(choice: ModelChoice, folder: Path, *, gpus_per_instance: int) -> Profile:
    assert choice.name is not None
    if choice.profile == "paper":
        return paper_profile(choice.name)
    if choice.profile in GPU_TYPES:
        model = model_table(choice.name, dtype=choice.dtype)
        return roofline_profile(model, gpu_type(choice.profile), gpus_per_instance=gpus_per_instance)
    path = folder / choice.profile
    if not path.is_file():
        known = ", ".join(("paper", *GPU_TYPES))
        raise SpecError(f"profile {choice.profile!r} is neither a file nor known", hint=f"known: {known}")
    return model_of(Profile, path, what="profile")


def trace_of(choice: TraceChoice, folder: Path) -> Trace:
    """The capacity of a scenario."""
    if choice.instances is not None:
        adds = tuple(
            TraceEvent(at_s=0.0, kind="add", instances=(InstanceId(f"i{index}"),)) for index in range(choice.instances)
        )
        return Trace(name=f"{choice.instances} that stay", events=adds)
    if choice.file is not None:
        trace = read_trace(folder / choice.file)
    else:
        trace = skypilot_trace(
            [zone_counts(folder / zone) for zone in choice.zones],
            name=", ".join(Path(zone).stem for zone in choice.zones),
            instances_per_node=choice.instances_per_node,
            most_per_zone=choice.most_per_zone,
            grace_s=choice.grace_s,
        )
    if choice.ready_after_s:
        trace = delayed(trace, lag_s=choice.ready_after_s)
    if choice.start_s or choice.stop_s is not None:
        stop_s = choice.stop_s if choice.stop_s is not None else trace.end_s
        if stop_s is None:
            raise SpecError("the trace has no end to cut it at", hint="set trace.stop_s")
        trace = window(trace, start_s=choice.start_s, stop_s=stop_s)
    return trace


def workload_of(choice: WorkloadChoice, folder: Path, *, seed: int, duration_s: float) -> Workload:
    """The requests of a scenario."""
    if choice.file is None:
        assert choice.rate_rps is not None
        rate = (
            diurnal(choice.rate_rps, swing=choice.swing, period_s=DAY_S) if choice.swing else constant(choice.rate_rps)
        )
        lengths = lengths_of(choice.lengths or LengthsChoice())
        workload = synthetic(rate, lengths, cv=choice.cv, duration_s=duration_s, seed=seed)
    else:
        path = folder / choice.file
        data = read_bytes(path, what="workload", max_bytes=MAX_WORKLOAD_BYTES)
        workload = read_workload(data, where=str(path))
        if choice.start_s or choice.stop_s is not None:
            stop_s = choice.stop_s if choice.stop_s is not None else workload.duration_s
            workload = workload_window(workload, start_s=choice.start_s, stop_s=stop_s)
        if choice.rate_rps is not None:
            workload = at_rate(workload, rate_rps=choice.rate_rps)
        if choice.lengths is not None:
            workload = with_lengths(workload, lengths_of(choice.lengths), seed=seed)
    most_prompt, most_output = choice.max_prompt_tokens, choice.max_output_tokens
    if most_prompt is None and most_output is None:
        return workload
    return clipped(workload, max_prompt_tokens=most_prompt, max_output_tokens=most_output)


def lengths_of(choice: LengthsChoice) -> Lengths:
    """The lengths that a scenario asks for."""
    if choice.kind == "uniform":
        assert choice.prompt_range is not None
        assert choice.output_range is not None
        return UniformLengths(prompt=choice.prompt_range, output=choice.output_range)
    if choice.kind == "lognormal":
        return LognormalLengths(
            prompt_mean=choice.prompt_tokens,
            prompt_cv=choice.prompt_cv,
            output_mean=choice.output_tokens,
            output_cv=choice.output_cv,
            max_prompt_tokens=32 * choice.prompt_tokens,
            max_output_tokens=32 * choice.output_tokens,
        )
    return FixedLengths(prompt_tokens=choice.prompt_tokens, output_tokens=choice.output_tokens)
