"""Scenario files: read within bounds, and resolved into a model, machines, capacity and requests."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

from spotserve.cli.config import Origin, parse_solvers
from spotserve.cli.plan_file import model_of, read_bytes, spec_of, toml_of
from spotserve.cloud.traces import ZoneHazard, read_trace, skypilot_trace, zone_counts, zone_trace
from spotserve.core.gpu_catalogue import GPU_TYPES, gpu_type
from spotserve.core.gpu_types import OWN, type_called
from spotserve.core.ids import InstanceId
from spotserve.core.model_tables import model_table
from spotserve.core.paper_profiles import paper_profile
from spotserve.core.roofline import Efficiencies, roofline_profile
from spotserve.core.spec import DeviceProfile, Limits, ModelSpec, Profile, ServingSpec
from spotserve.core.trace import Trace, TraceEvent, delayed, window
from spotserve.errors import SpecError
from spotserve.sim.hardware import Hardware, Machine, OtherMachine
from spotserve.sim.scenario import (
    CurveChoice,
    LengthsChoice,
    ModelChoice,
    RooflineChoice,
    Scenario,
    ScenarioFile,
    TraceChoice,
    WorkloadChoice,
)
from spotserve.sim.workloads import (
    FixedLengths,
    Lengths,
    LognormalLengths,
    RateCurve,
    UniformLengths,
    Workload,
    arrival_rates,
    at_rate,
    clipped,
    constant,
    diurnal,
    lengths_of,
    read_workload,
    scaled,
    steps,
    synthetic,
    thinned,
    with_lengths,
)
from spotserve.sim.workloads import window as workload_window

MAX_WORKLOAD_BYTES = 256 * 1024 * 1024
LEAST_PERIODS = 31


def scenario_of(path: Path, *, seed: int | None = None) -> Scenario:
    """The scenario in a file, everything it names read. Raises SpecError."""
    file = toml_of(ScenarioFile, path, what="SCENARIO")
    return resolved(file, path.parent, seed=file.seed if seed is None else seed)


def resolved(file: ScenarioFile, folder: Path, *, seed: int) -> Scenario:
    """A scenario with its files read; what is drawn is drawn by the seed."""
    spec = serving_spec(file.model, folder, hardware=file.hardware)
    parse_solvers(file.model.solvers, Origin("model.solvers"))
    trace = typed(trace_of(file.trace, folder, seed=seed, duration_s=file.duration_s), spec.profile, file.hardware)
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


def typed(trace: Trace, profile: Profile, hardware: Hardware) -> Trace:
    """The trace with its GPU types called as the profile calls them, empty for the profile's own.

    Raises:
        SpecError: an instance is of a type of which the scenario does not say what such an instance is.
    """
    names = {}
    for name in sorted({event.gpu_type for event in trace.events}):
        try:
            names[name] = type_called(profile, name)
        except SpecError:
            names[name] = name
        if names[name] and names[name] not in hardware.types:
            known = ", ".join([f"{OWN} ({profile.device})", *hardware.types])
            raise SpecError(
                f"trace {trace.name} has instances of GPU type {name}, and there is no hardware.types.{names[name]}",
                hint=f"known: {known}; a table [hardware.types.{names[name]}] says what such an instance is",
            )
    events = (
        event.model_copy(update={"gpu_type": names[event.gpu_type]}) if event.gpu_type else event
        for event in trace.events
    )
    return trace.model_copy(update={"events": tuple(events)})


def _duration_s(file: ScenarioFile, trace: Trace) -> float:
    if trace.end_s is None:
        raise SpecError(
            f"scenario {file.name!r} has no end: its trace has none and there is no duration_s",
            hint="set duration_s, in seconds",
        )
    return trace.end_s


def serving_spec(choice: ModelChoice, folder: Path, *, hardware: Hardware) -> ServingSpec:
    """The model, its profile with the times of every GPU type, and the limits of a replica."""
    if choice.spec is not None:
        read = spec_of(folder / choice.spec, what="spec").model_copy(update={"solvers": choice.solvers})
        profile = with_types(read.profile, hardware, choice, folder, model=read.model)
        return read.model_copy(update={"profile": profile})
    assert choice.name is not None
    model = model_table(choice.name, dtype=choice.dtype, max_model_len=choice.max_model_len)
    limits = Limits(
        max_running=choice.max_running,
        max_model_len=model.max_model_len,
        migration_headroom_bytes=choice.migration_headroom_bytes,
        spare_instances=choice.spare_instances,
    )
    # A roofline is of the whole model: a shorter max_model_len changes no time.
    whole = model_table(choice.name, dtype=choice.dtype)
    profile = _profile(choice, folder, model=whole, gpus_per_instance=hardware.gpus_per_instance)
    profile = with_types(profile, hardware, choice, folder, model=whole)
    if choice.storage_bytes_per_s is not None:
        told = f"{profile.source}; storage {choice.storage_bytes_per_s:g} bytes/s by the scenario"
        profile = profile.model_copy(update={"storage_bytes_per_s": choice.storage_bytes_per_s, "source": told})
    return ServingSpec(model=model, profile=profile, limits=limits, solvers=choice.solvers)


def _profile(choice: ModelChoice, folder: Path, *, model: ModelSpec, gpus_per_instance: int) -> Profile:
    assert choice.name is not None
    if choice.roofline is not None and choice.profile not in GPU_TYPES:
        raise SpecError(
            f"model.roofline has no meaning with profile {choice.profile!r}, whose times are measured",
            hint=f"GPUs of the catalogue: {', '.join(GPU_TYPES)}",
        )
    if choice.profile == "paper":
        return paper_profile(choice.name)
    return named_profile(choice.profile, folder, model, choice.roofline, gpus_per_instance=gpus_per_instance)


def named_profile(
    name: str, folder: Path, model: ModelSpec, choice: RooflineChoice | None, *, gpus_per_instance: int
) -> Profile:
    """The roofline of a GPU of the catalogue, or the profile in a file."""
    if name in GPU_TYPES:
        choice = RooflineChoice() if choice is None else choice
        return roofline_profile(
            model,
            gpu_type(name),
            gpus_per_instance=gpus_per_instance,
            context_tokens=choice.context_tokens,
            decode_rows=choice.decode_rows,
            efficiencies=_efficiencies(choice),
        )
    path = folder / name
    if not path.is_file():
        known = ", ".join(("paper", *GPU_TYPES))
        raise SpecError(f"profile {name!r} is neither a file nor known", hint=f"known: {known}")
    return model_of(Profile, path, what="profile")


def _efficiencies(choice: RooflineChoice) -> Efficiencies:
    given = {
        "memory": choice.memory_efficiency,
        "flops": choice.flops_efficiency,
        "link": choice.link_efficiency,
        "nic": choice.nic_efficiency,
    }
    return Efficiencies(**{name: value for name, value in given.items() if value is not None})


def with_types(profile: Profile, hardware: Hardware, choice: ModelChoice, folder: Path, *, model: ModelSpec) -> Profile:
    """The profile with the times of every other GPU type, and the spot prices that the scenario pays for each.

    The network and the storage are as slow as those of the slowest type: what a plan counts on must hold for all.
    """
    if not hardware.types:
        return profile
    found = {name: _profile_of(name, one, profile, choice, folder, model) for name, one in hardware.types.items()}
    devices = tuple(
        DeviceProfile(type=name, latencies=one.latencies, price_per_hour=_gpu_price(hardware.types[name]))
        for name, one in found.items()
    )
    others = "; ".join(f"{name}: {one.source}" for name, one in found.items())
    return profile.model_copy(
        update={
            "devices": devices,
            "price_per_hour": _gpu_price(hardware),
            "link_bytes_per_s": min(one.link_bytes_per_s for one in (profile, *found.values())),
            "storage_bytes_per_s": min(one.storage_bytes_per_s for one in (profile, *found.values())),
            "source": f"{profile.source}; {others}; network and storage of the slowest, prices by the scenario",
        }
    )


def _gpu_price(machine: Machine) -> float:
    return machine.spot_usd_per_hour / machine.gpus_per_instance


def _profile_of(
    name: str, machine: OtherMachine, own: Profile, choice: ModelChoice, folder: Path, model: ModelSpec
) -> Profile:
    """The times of another GPU type: of its own profile, of the main profile's `devices`, or of the catalogue."""
    if name in ("", OWN, own.device):
        raise SpecError(
            f"hardware.types.{name} is the profile's own type, which [hardware] describes",
            hint=f"name another type than {own.device}",
        )
    listed = {device.type: device for device in own.devices}
    if machine.profile is None and name in listed:
        return own.model_copy(update={"latencies": listed[name].latencies, "devices": ()})
    if machine.profile is None and name not in GPU_TYPES:
        raise SpecError(
            f"GPU type {name!r} of hardware.types has no times: it is not in the catalogue",
            hint=f"give hardware.types.{name} a profile, a file or one of {', '.join(GPU_TYPES)}",
        )
    told = name if machine.profile is None else machine.profile
    return named_profile(told, folder, model, choice.roofline, gpus_per_instance=machine.gpus_per_instance)


def trace_of(choice: TraceChoice, folder: Path, *, seed: int = 0, duration_s: float | None = None) -> Trace:
    """The capacity of a scenario; what is drawn is drawn by the seed, until `duration_s`."""
    if choice.instances is not None:
        return _staying(choice.instances, choice.gpu_types)
    if choice.hazards:
        return _drawn_zones(choice, seed=seed, duration_s=duration_s)
    if choice.file is not None:
        trace = read_trace(folder / choice.file)
    else:
        zones = [zone_counts(folder / zone) for zone in choice.zones]
        trace = skypilot_trace(
            zones,
            name=", ".join(Path(zone).stem for zone in choice.zones),
            instances_per_node=choice.instances_per_node,
            most_per_zone=choice.most_per_zone,
            grace_s=choice.grace_s,
            victims=choice.victims,
            seed=seed,
            gpu_types=dict(zip((each.zone for each in zones), choice.gpu_types, strict=False)),
        )
    if choice.ready_after_s:
        trace = delayed(trace, lag_s=choice.ready_after_s)
    if choice.start_s or choice.stop_s is not None:
        stop_s = choice.stop_s if choice.stop_s is not None else trace.end_s
        if stop_s is None:
            raise SpecError("the trace has no end to cut it at", hint="set trace.stop_s")
        if trace.end_s is not None and stop_s > trace.end_s:
            raise SpecError(
                f"trace.stop_s {stop_s:g} is after the end of trace {trace.name} at {trace.end_s:g} s",
                hint="what it would be like then is not known",
            )
        trace = window(trace, start_s=choice.start_s, stop_s=stop_s)
    return trace


def _staying(count: int, gpu_types: tuple[str, ...]) -> Trace:
    """Instances that are there from the beginning to the end, of these GPU types in turn."""
    adds = tuple(
        TraceEvent(
            at_s=0.0,
            kind="add",
            instances=(InstanceId(f"i{index}"),),
            gpu_type=gpu_types[index % len(gpu_types)] if gpu_types else "",
        )
        for index in range(count)
    )
    counts = Counter(event.gpu_type for event in adds if event.gpu_type)
    notes = (f"GPU types: {', '.join(f'{num} {name}' for name, num in counts.items())}",) if counts else ()
    return Trace(name=f"{count} that stay", events=adds, notes=notes)


def _drawn_zones(choice: TraceChoice, *, seed: int, duration_s: float | None) -> Trace:
    """Losses of zones, drawn by the seed."""
    if duration_s is None:
        raise SpecError("trace.hazards are drawn without an end: there is no duration_s", hint="set duration_s")
    return zone_trace(
        [ZoneHazard(**hazard.model_dump()) for hazard in choice.hazards],
        duration_s=duration_s,
        seed=seed,
        grace_s=choice.grace_s,
        unnoticed_share=choice.unnoticed_share,
        shared_shocks_per_day=choice.shared_shocks_per_day,
        name=", ".join(hazard.zone for hazard in choice.hazards),
    )


def workload_of(choice: WorkloadChoice, folder: Path, *, seed: int, duration_s: float) -> Workload:
    """The requests of a scenario."""
    if choice.file is None:
        lengths = drawn_lengths(choice.lengths or LengthsChoice(), folder)
        rate = rate_of(choice, folder, duration_s=duration_s)
        workload = synthetic(rate, lengths, cv=choice.cv, duration_s=duration_s, seed=seed)
    else:
        workload = _requests_in(folder / choice.file)
        if choice.start_s or choice.stop_s is not None:
            stop_s = choice.stop_s if choice.stop_s is not None else workload.duration_s
            workload = workload_window(workload, start_s=choice.start_s, stop_s=stop_s)
        if choice.rate_rps is not None:
            workload = at_rate(workload, rate_rps=choice.rate_rps)
        if choice.share < 1:
            workload = thinned(workload, share=choice.share, seed=seed)
        if choice.lengths is not None:
            workload = with_lengths(workload, drawn_lengths(choice.lengths, folder), seed=seed)
    most_prompt, most_output = choice.max_prompt_tokens, choice.max_output_tokens
    if most_prompt is None and most_output is None:
        return workload
    return clipped(workload, max_prompt_tokens=most_prompt, max_output_tokens=most_output)


def _requests_in(path: Path) -> Workload:
    return read_workload(read_bytes(path, what="workload", max_bytes=MAX_WORKLOAD_BYTES), where=str(path))


def rate_of(choice: WorkloadChoice, folder: Path, *, duration_s: float) -> RateCurve:
    """How the rate of drawn arrivals moves."""
    if choice.curve is not None:
        curve = _curve(choice.curve, folder)
        return curve if choice.rate_rps is None else scaled(curve, mean_rps=choice.rate_rps, duration_s=duration_s)
    assert choice.rate_rps is not None
    if not choice.swing:
        return constant(choice.rate_rps)
    periods = max(LEAST_PERIODS, math.ceil(duration_s / choice.period_s))
    return diurnal(choice.rate_rps, swing=choice.swing, period_s=choice.period_s, peak_s=choice.peak_s, periods=periods)


def _curve(choice: CurveChoice, folder: Path) -> RateCurve:
    if choice.file is not None:
        path = folder / choice.file
        data = read_bytes(path, what="workload", max_bytes=MAX_WORKLOAD_BYTES)
        return arrival_rates(data, where=str(path), step_s=choice.step_s)
    if choice.steps_rps:
        return steps(choice.steps_rps, step_s=choice.step_s)
    rates = [rps for _, rps in choice.points]
    return RateCurve(
        choice.points, f"{len(rates)} points of {min(rates):g} to {max(rates):g} requests per second, lines between"
    )


def drawn_lengths(choice: LengthsChoice, folder: Path) -> Lengths:
    """The lengths that a scenario asks for."""
    if choice.kind == "file":
        assert choice.file is not None
        return lengths_of(_requests_in(folder / choice.file))
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
