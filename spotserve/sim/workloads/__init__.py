"""Workloads: requests over time, from the files of others, from ours, or drawn from a seed."""

from spotserve.sim.workloads.importers import (
    arrival_rates,
    azure_requests,
    mooncake_requests,
    paper_requests,
    read_workload,
)
from spotserve.sim.workloads.lengths import (
    EmpiricalLengths,
    FixedLengths,
    Lengths,
    LognormalLengths,
    UniformLengths,
)
from spotserve.sim.workloads.our_format import WorkloadFile, our_requests, workload_json
from spotserve.sim.workloads.rate_curve import RateCurve, constant, diurnal, ramp, scaled, steps
from spotserve.sim.workloads.synthetic import synthetic
from spotserve.sim.workloads.workload import (
    Arrival,
    Workload,
    at_rate,
    clipped,
    lengths_of,
    thinned,
    window,
    with_lengths,
)

__all__ = [
    "Arrival",
    "EmpiricalLengths",
    "FixedLengths",
    "Lengths",
    "LognormalLengths",
    "RateCurve",
    "UniformLengths",
    "Workload",
    "WorkloadFile",
    "arrival_rates",
    "at_rate",
    "azure_requests",
    "clipped",
    "constant",
    "diurnal",
    "lengths_of",
    "mooncake_requests",
    "our_requests",
    "paper_requests",
    "ramp",
    "read_workload",
    "scaled",
    "steps",
    "synthetic",
    "thinned",
    "window",
    "with_lengths",
    "workload_json",
]
