"""The names of things. Each id is its own type, so that two of them cannot be swapped unseen."""

from __future__ import annotations

from functools import lru_cache
from typing import NewType

InstanceId = NewType("InstanceId", str)
"""`i0`, `i1`, …: one preemptible machine, never reused."""

GpuId = NewType("GpuId", str)
"""`i3/0`: GPU (and so worker) 0 of instance i3."""

ReplicaId = NewType("ReplicaId", str)
"""`r4`: one data-parallel pipeline."""

RequestId = NewType("RequestId", str)
"""128 random bits in hex, the client's `x-request-id`."""

StepId = NewType("StepId", str)
"""`s1`, `s2`, …: one step of one plan."""


@lru_cache(maxsize=65536)
def instance_of(gpu: GpuId) -> InstanceId:
    """The instance that a GPU sits in."""
    return InstanceId(gpu.split("/", 1)[0])
