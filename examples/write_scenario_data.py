"""Writes the trace and request files of the example scenarios: counts of instances and seeds, no measured data.

    python examples/write_scenario_data.py examples/scenarios

A test fails when a file differs from what this writes.
"""

import json
import sys
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

from spotserve.cloud.traces import TraceEntry, TraceFile, ZoneHazard, trace_json, zone_trace
from spotserve.sim.workloads import FixedLengths, constant, synthetic, workload_json

GRACE_S = 30.0
PAPER = "SpotServe (ASPLOS 2024), instance counts over time of trace {}, 4 GPUs (g4dn.12xlarge) each"
Count = tuple[float, int]
A_S: Sequence[Count] = ((0, 7), (240, 8), (360, 10), (600, 9), (900, 10), (1200, 8))
B_S: Sequence[Count] = ((0, 10), (120, 8), (240, 7), (720, 8), (960, 9))


def counted(counts: Sequence[Count], *, name: str, end_s: float) -> str:
    """A trace of instance counts: additions are ready at their time, removals are noticed a grace period before."""
    events = [TraceEntry(at_s=0, kind="add", count=counts[0][1])]
    for (_, before), (at_s, after) in pairwise(counts):
        if after > before:
            events.append(TraceEntry(at_s=at_s, kind="add", count=after - before))
        else:
            events.append(TraceEntry(at_s=at_s - GRACE_S, kind="notice", count=before - after, grace_s=GRACE_S))
    file = TraceFile(
        format_version="0.1",
        source=PAPER.format(name),
        notes=("counts have no names: the longest-living instances go", f"notice {GRACE_S:g} s before a count falls"),
        end_s=end_s,
        events=tuple(events),
    )
    return file.model_dump_json(indent=1, exclude_defaults=True, exclude_none=True) + "\n"


def zones() -> str:
    """Six hours of three zones that lose instances one by one and many at once."""
    hazards = [
        ZoneHazard("zone-a", 4, shocks_per_day=8.0, singles_per_instance_day=4.0, outage_s=1200.0),
        ZoneHazard("zone-b", 3, shocks_per_day=4.0, singles_per_instance_day=6.0),
        ZoneHazard("zone-c", 3, shocks_per_day=12.0, shock_share=0.7, outage_s=1800.0),
    ]
    return trace_json(zone_trace(hazards, duration_s=21_600.0, seed=3, unnoticed_share=0.1, name="three-zones"))


def zone(*runs: tuple[int, int]) -> str:
    """Nodes of one zone as (count, five-minute samples of it), in the format of the SkyPilot spot traces."""
    counts = [count for count, samples in runs for _ in range(samples)]
    return json.dumps({"metadata": {"gap_seconds": 300}, "data": counts}) + "\n"


def gpt_requests() -> str:
    """The paper's lengths and mean rate, arrivals Poisson."""
    lengths = FixedLengths(prompt_tokens=512, output_tokens=128)
    name = "gpt-20b-requests"
    return workload_json(synthetic(constant(0.35), lengths, cv=1.0, duration_s=1320.0, seed=20, name=name))


FILES: dict[str, Callable[[], str]] = {
    "a_s.json": lambda: counted(A_S, name="A_S", end_s=1320.0),
    "b_s.json": lambda: counted(B_S, name="B_S", end_s=1020.0),
    "three-zones.json": zones,
    "gpt-20b-requests.json": gpt_requests,
    "zone-l40s.json": lambda: zone((2, 10), (3, 4), (1, 4), (2, 6)),
    "zone-a10g.json": lambda: zone((4, 7), (1, 3), (4, 14)),
    "zone-spare.json": lambda: zone((0, 3), (3, 13), (0, 3), (2, 5)),
}


def main(folder: Path) -> None:
    """Write every file."""
    for name, text in FILES.items():
        (folder / name).write_text(text(), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
