"""The names of things. Each id is its own type, so that two of them cannot be swapped unseen."""

from __future__ import annotations

from functools import lru_cache
from itertools import groupby
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


@lru_cache(maxsize=65536)
def natural_key(name: str) -> tuple[tuple[int, int, str], ...]:
    """Sort key that puts i2 before i10; numbers of any length, as a file may hold any name."""
    parts: list[tuple[int, int, str]] = []
    for is_number, run in groupby(name, lambda character: "0" <= character <= "9"):
        if is_number:
            number = "".join(run).lstrip("0")
            parts.append((0, len(number), number))
        else:
            parts.extend((1, 0, character) for character in run)
    return tuple(parts)


def entry_of(command: str) -> int:
    """The sequence of the journal entry that gave a command: `12.0` is the first command of entry 12."""
    return int(command.partition(".")[0])
