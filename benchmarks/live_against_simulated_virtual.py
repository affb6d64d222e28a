"""The scenario in virtual time, by the profile of the machine and the durations measured there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from benchmarks.live_against_simulated_live import Measured
from benchmarks.live_against_simulated_scene import NUM_INSTANCES, Scene
from benchmarks.workload import Arrival
from spotserve.core.controller import Entry
from spotserve.core.ids import InstanceId
from spotserve.core.spec import ServingSpec
from spotserve.core.trace import Trace, TraceEvent
from spotserve.sim.hardware import Hardware
from spotserve.sim.measures import RunResult
from spotserve.sim.scenario import Scenario, Slo
from spotserve.sim.simulation import simulate
from spotserve.sim.workloads import Arrival as SimulatedArrival
from spotserve.sim.workloads import Workload
from spotserve.solvers.planner import make_plan

SETTLE_S = 6.0
"""The simulated journal goes on so long behind the trace."""


@dataclass(slots=True)
class KeptEntries:
    """A journal that keeps its entries."""

    entries: list[Entry]

    async def append(self, entries: Sequence[Entry]) -> None:
        """Keep them."""
        self.entries += entries


@dataclass(frozen=True, slots=True)
class SimulatedRun:
    """What came of it, and the journal."""

    result: RunResult
    entries: Sequence[Entry]


def hardware_of(scene: Scene, measured: Mapping[str, Measured], *, pace_s: float) -> Hardware:
    """The hardware table: every duration as it was measured; planning of so few GPUs grows with none of them."""
    known = {
        "gpu_memory_bytes": scene.gpu_memory_mib << 20,
        "least_iteration_s": pace_s,
        "solve_s_per_gpu": 0.0,
        "spot_usd_per_hour": 1.0,
        "ondemand_usd_per_hour": 1.0,
    }
    return Hardware.model_validate({**known, **{name: one.seconds for name, one in measured.items()}})


def simulated_run(
    scene: Scene, spec: ServingSpec, hardware: Hardware, arrivals: Sequence[Arrival], *, served_at_s: float
) -> SimulatedRun:
    """Simulate the trace and the requests, both from `served_at_s` on: when the live daemon began to serve."""
    journal = KeptEntries([])
    until_s = served_at_s + scene.end_s + SETTLE_S
    scenario = Scenario(
        name="live against simulated",
        spec=spec,
        hardware=hardware,
        trace=_trace(scene, served_at_s, start_s=hardware.start_s, until_s=until_s),
        workload=Workload(
            name="seeded",
            source="benchmarks/live_against_simulated_scene.py",
            arrivals=tuple(
                SimulatedArrival(served_at_s + one.at_s, len(one.prompt_ids), one.max_tokens) for one in arrivals
            ),
        ),
        slo=Slo(),
        seed=0,
        policies=(spec.policy,),
        duration_s=until_s,
        drain_s=0.0,
    )
    result = simulate(scenario, spec.policy, make_plan, journal=journal)
    return SimulatedRun(result, journal.entries)


def _trace(scene: Scene, served_at_s: float, *, start_s: float, until_s: float) -> Trace:
    """The trace of the scene: an instance that is added is ready `start_s` later, as the simulator's traces say it."""
    first = tuple(InstanceId(f"i{index}") for index in range(NUM_INSTANCES))
    events = (
        TraceEvent(at_s=0.0, kind="add", instances=first),
        TraceEvent(at_s=served_at_s + scene.notice_s, kind="notice", instances=first[:1], grace_s=scene.grace_s),
        TraceEvent(at_s=served_at_s + scene.join_s + start_s, kind="add", instances=(InstanceId(f"i{NUM_INSTANCES}"),)),
    )
    return Trace(name="notice and join", events=events, end_s=until_s)


def simulated_latencies(result: RunResult) -> dict[str, float]:
    """The compared figures, in seconds."""
    return {
        "ttft_p50_s": result.ttft_s.p50,
        "ttft_p99_s": result.ttft_s.p99,
        "tpot_p50_s": result.tpot_s.p50,
        "tpot_p99_s": result.tpot_s.p99,
        "latency_p50_s": result.latency_s.p50,
        "latency_p99_s": result.latency_s.p99,
        "longest_stall_s": result.stall_s.max,
    }
