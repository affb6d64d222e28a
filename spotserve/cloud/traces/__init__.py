"""Capacity traces: when instances come, are noticed, are killed, and how the load moves.

Three formats are read into one `Trace`: ours, and the two of the SpotServe paper; counts of instances per zone (the
SkyPilot spot traces) become one with a stated scaling, and synthetic ones are drawn from hazards of zones.

A trace names instances as it likes. Reading it maps the names to ours in the order of arrival: the daemon starts
with `i0 … i(living - 1)`, the first one that the trace adds is the next. What cannot happen is refused with its
line: time running backwards, a removal of what is not there, an addition of what lives or has been removed.
"""

from spotserve.cloud.traces.fleet import Fleet
from spotserve.cloud.traces.hazards import ZoneHazard, zone_trace
from spotserve.cloud.traces.ours import TraceEntry, TraceFile, trace_json
from spotserve.cloud.traces.reading import read_trace
from spotserve.cloud.traces.zones import ZoneCounts, skypilot_trace, zone_counts
from spotserve.core.trace import DEFAULT_GRACE_S, Trace, TraceEvent, delayed, instance_counts, instance_seconds, window

__all__ = [
    "DEFAULT_GRACE_S",
    "Fleet",
    "Trace",
    "TraceEntry",
    "TraceEvent",
    "TraceFile",
    "ZoneCounts",
    "ZoneHazard",
    "delayed",
    "instance_counts",
    "instance_seconds",
    "read_trace",
    "skypilot_trace",
    "trace_json",
    "window",
    "zone_counts",
    "zone_trace",
]
