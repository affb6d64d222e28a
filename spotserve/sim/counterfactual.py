"""What a daemon lived through as a scenario, so that another policy can live through it as well.

Capacity, requests and lengths are those of the journal. How long things take is modelled, at the pace of the journal's
requests, under the recorded policy too: that run beside the recorded figures shows what the model is worth.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from statistics import median

from pydantic import ValidationError

from spotserve.core.frozen import Frozen
from spotserve.core.recorded import RecordedRequest, RecordedScenario
from spotserve.core.spec import LatencyPoint
from spotserve.errors import SpotServeError
from spotserve.sim.hardware import Hardware, OtherMachine
from spotserve.sim.measures import Spread
from spotserve.sim.scenario import Scenario, Slo
from spotserve.sim.workloads import Arrival, Workload
from spotserve.sim.workloads.workload import MAX_ARRIVALS, MAX_SECONDS

UNKNOWN_PRICE = 1.0
"""Per GPU-hour where the profile has no price: costs can then be compared, and are no dollars."""


class RecordedLine(Frozen):
    """What clients saw of the daemon and what it cost, from the journal alone. Open requests count until its end."""

    policy: str
    requests: int
    finished: int
    open: int
    latency_s: Spread
    ttft_s: Spread
    longest_stall_s: float
    tokens: int
    instance_hours: float
    usd: float
    usd_per_million_tokens: float | None
    is_priced: bool
    """Whether the profile has a price; else a GPU-hour counts as 1."""


def scenario_of_record(record: RecordedScenario, *, name: str, policies: Sequence[str]) -> Scenario:
    """The scenario of a record. A request of several choices is played as so many requests.

    Raises SpotServeError for more time, more requests or larger machines than can be simulated.
    """
    if record.duration_s > MAX_SECONDS:
        raise SpotServeError(
            f"the journal lasts {record.duration_s:g} s, more than {MAX_SECONDS:g} s can be simulated",
            hint="give --until",
        )
    return Scenario(
        name=name,
        spec=record.spec,
        hardware=_hardware(record),
        trace=record.trace,
        workload=_workload(record),
        slo=Slo(),
        seed=0,
        policies=tuple(policies),
        duration_s=record.duration_s,
    )


def under(scenario: Scenario, policy: str) -> Scenario:
    """The scenario for one policy: solvers that somebody chose for the recorded one are not another's."""
    if policy == scenario.spec.policy:
        return scenario
    return replace(scenario, spec=scenario.spec.model_copy(update={"solvers": {}}))


def recorded_tpot_s(record: RecordedScenario) -> float | None:
    """Seconds per token after the first, of the quarter of finished requests that was disturbed least; None of none."""
    paces = sorted(
        (request.ended_at_s - request.first_token_at_s) / (max(request.output_tokens) - 1)
        for request in record.requests
        if request.outcome == "finished"
        and request.ended_at_s is not None
        and request.first_token_at_s is not None
        and request.output_tokens is not None
        and max(request.output_tokens, default=0) > 1
    )
    return paces[len(paces) // 4] if paces else None


def paced(scenario: Scenario, factor: float) -> Scenario:
    """The scenario with every iteration so many times as long as the profile says, and a note of it."""
    profile = scenario.spec.profile

    def longer(latencies: Iterable[LatencyPoint]) -> tuple[LatencyPoint, ...]:
        return tuple(point.model_copy(update={"layer_ms": point.layer_ms * factor}) for point in latencies)

    slower = profile.model_copy(
        update={
            "latencies": longer(profile.latencies),
            "devices": tuple(one.model_copy(update={"latencies": longer(one.latencies)}) for one in profile.devices),
            "stage_overhead_ms": profile.stage_overhead_ms * factor,
        }
    )
    note = f"iterations take {factor:.3g} times what the profile says, as the journal's requests did"
    workload = replace(scenario.workload, notes=(*scenario.workload.notes, note))
    return replace(scenario, spec=scenario.spec.model_copy(update={"profile": slower}), workload=workload)


def recorded_line(record: RecordedScenario) -> RecordedLine:
    """The recorded figures, counted as the simulator counts its own."""
    end_s = record.duration_s
    requests = record.requests
    tokens = sum(sum(one.output_tokens or ()) for one in requests)
    hardware = _hardware(record)
    paid = [(_paid_s(one.asked_at_s, one.gone_at_s, end_s) / 3600.0, one.gpu_type) for one in record.instances]
    hours = sum(each for each, _ in paid)
    usd = sum(each * hardware.of(gpu_type).spot_usd_per_hour for each, gpu_type in paid)
    return RecordedLine(
        policy=record.spec.policy,
        requests=len(requests),
        finished=sum(one.outcome == "finished" for one in requests),
        open=sum(one.outcome is None for one in requests),
        latency_s=Spread.of(_until(one, one.ended_at_s, end_s) for one in requests),
        ttft_s=Spread.of(_until(one, one.first_token_at_s, end_s) for one in requests),
        longest_stall_s=round(max((one.stall_ms_max for one in requests), default=0.0) / 1000.0, 6),
        tokens=tokens,
        instance_hours=round(hours, 6),
        usd=round(usd, 6),
        usd_per_million_tokens=round(usd / tokens * 1e6, 6) if tokens else None,
        is_priced=record.spec.profile.price_of("") is not None,
    )


def _until(request: RecordedRequest, at_s: float | None, end_s: float) -> float:
    return max(0.0, (end_s if at_s is None else at_s) - request.at_s)


def _paid_s(asked_at_s: float, gone_at_s: float | None, end_s: float) -> float:
    return max(0.0, (end_s if gone_at_s is None else gone_at_s) - asked_at_s)


def _hardware(record: RecordedScenario) -> Hardware:
    """The recorded machines; what the journal does not say is as the simulator assumes it."""
    of_own_type = tuple(one for one in record.instances if not one.gpu_type)
    own = replace(record, instances=of_own_type or record.instances)
    usd_per_hour = _usd_per_hour(record, "", own.gpus_per_instance)
    started = [one.ready_at_s - one.asked_at_s for one in record.instances if one.ready_at_s is not None]
    try:
        return Hardware(
            gpus_per_instance=own.gpus_per_instance,
            gpu_memory_bytes=max(1, own.gpu_memory_bytes),
            start_s=median(started) if started else 0.0,
            spot_usd_per_hour=usd_per_hour,
            ondemand_usd_per_hour=usd_per_hour,
            types={
                name: _other_machine(record, name) for name in sorted({one.gpu_type for one in record.instances} - {""})
            },
        )
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        told = f"{first['loc'][0]}: {first['msg']}"
        raise SpotServeError(f"the journal's machines cannot be simulated: {told}") from error


def _other_machine(record: RecordedScenario, gpu_type: str) -> OtherMachine:
    """The recorded instances of another GPU type than the profile's own."""
    same = [one for one in record.instances if one.gpu_type == gpu_type]
    num_gpus = max(one.num_gpus for one in same)
    usd_per_hour = _usd_per_hour(record, gpu_type, num_gpus)
    return OtherMachine(
        gpus_per_instance=num_gpus,
        gpu_memory_bytes=min(one.memory_bytes for one in same),
        spot_usd_per_hour=usd_per_hour,
        ondemand_usd_per_hour=usd_per_hour,
    )


def _usd_per_hour(record: RecordedScenario, gpu_type: str, num_gpus: int) -> float:
    price = record.spec.profile.price_of(gpu_type)
    return num_gpus * (UNKNOWN_PRICE if price is None else price)


def _workload(record: RecordedScenario) -> Workload:
    """The recorded requests, by arrival."""
    count = sum(one.num_choices if one.output_tokens is None else len(one.output_tokens) for one in record.requests)
    if count > MAX_ARRIVALS:
        raise SpotServeError(
            f"the journal has {count} requests, more than {MAX_ARRIVALS} can be simulated", hint="give --until"
        )
    arrivals = [
        Arrival(at_s=request.at_s, prompt_tokens=request.prompt_tokens, output_tokens=max(1, tokens))
        for request in record.requests
        for tokens in request.work_tokens
    ]
    arrivals.sort(key=lambda arrival: arrival.at_s)
    several = sum(request.num_choices > 1 for request in record.requests)
    is_open = sum(request.output_tokens is None for request in record.requests)
    notes = []
    if several:
        notes.append(f"{several} requests of several choices: each choice is a request of its own")
    if is_open:
        notes.append(f"{is_open} requests were open at the end: they are given all the tokens that they asked for")
    return Workload(name="recorded", source="a journal", arrivals=tuple(arrivals), notes=tuple(notes))
