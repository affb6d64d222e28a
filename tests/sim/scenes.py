"""Small scenarios for tests of the simulator: a model of a few megabytes, minutes of traffic."""

from __future__ import annotations

from collections.abc import Sequence

from spotserve.core.controller import Entry
from spotserve.core.ids import InstanceId
from spotserve.core.trace import Trace, TraceEvent
from spotserve.sim.hardware import Hardware
from spotserve.sim.scenario import Scenario, Slo
from spotserve.sim.workloads import FixedLengths, constant, synthetic
from tests.specs import small_spec

MIB = 1024 * 1024


class Entries:
    """A journal that keeps its entries."""

    def __init__(self) -> None:
        self.kept: list[Entry] = []

    async def append(self, entries: Sequence[Entry]) -> None:
        """Keep them."""
        self.kept.extend(entries)


def event(at_s: float, kind: str, *names: str, grace_s: float | None = None) -> TraceEvent:
    """One event of a trace."""
    instances = tuple(InstanceId(name) for name in names)
    return TraceEvent.model_validate({"at_s": at_s, "kind": kind, "instances": instances, "grace_s": grace_s})


def four_instances(*later: TraceEvent, end_s: float) -> Trace:
    """`i0` to `i3` at once, and what happens to them."""
    events = (event(0, "add", "i0", "i1", "i2", "i3"), *later)
    return Trace(name="four", events=events, end_s=end_s)


def small_scenario(
    trace: Trace, *, memory_bytes: int = 6 * MIB, rate_rps: float = 4.0, seed: int = 0, drain_s: float = 60.0
) -> Scenario:
    """The small model on GPUs that hold half of it, requests of 60 tokens in and 40 out."""
    assert trace.end_s is not None
    lengths = FixedLengths(prompt_tokens=60, output_tokens=40)
    return Scenario(
        name="small",
        spec=small_spec(),
        hardware=Hardware(gpu_memory_bytes=memory_bytes, start_s=5.0, spot_usd_per_hour=1.0, ondemand_usd_per_hour=3.0),
        trace=trace,
        workload=synthetic(constant(rate_rps), lengths, duration_s=trace.end_s, seed=seed),
        slo=Slo(latency_s=5.0),
        seed=seed,
        policies=("live", "reroute", "reparallelize"),
        duration_s=trace.end_s,
        drain_s=drain_s,
        ondemand_instances=4,
    )
