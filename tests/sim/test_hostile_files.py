"""Damaged workload and trace files: read or refused with a message, never anything else."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from spotserve.cloud.traces import ZoneHazard, read_trace, trace_json, zone_counts, zone_trace
from spotserve.errors import SpecError
from spotserve.sim.workloads import FixedLengths, arrival_rates, constant, read_workload, synthetic, workload_json

WORKLOAD = synthetic(constant(1.0), FixedLengths(), duration_s=20, seed=0)
TRACE = zone_trace([ZoneHazard("a", 3, gpu_type="l4")], duration_s=86_400, seed=0, unnoticed_share=0.5)

PAPER_REQUESTS = "".join(f"{number},{number * 1.25},512,{number * 2966}\n" for number in range(10))
AZURE = "TIMESTAMP,ContextTokens,GeneratedTokens\n" + "".join(
    f"2023-11-16 18:15:{number + 10}.68{number}5900,{number + 1},44\n" for number in range(10)
)
MOONCAKE = "".join(
    f'{{"timestamp": {number * 50}, "input_length": 9, "output_length": 5, "hash_ids": [1, {number}]}}\n'
    for number in range(10)
)
PAPER_TRACE = '[0, "add", {"nodes": ["a", "b"]}]\n[60000, "remove", {"nodes": ["a"], "required_tpt": 0.5}]\n'
PAPER_DAY = "480000,add,node1\n540000,add,node2\n660000,remove,node1\n"
ZONE = '{"metadata": {"gap_seconds": 300}, "data": [1, 2, 3, 0]}'
RATES = "0.5,0.25,1.5\n"

BYTES = [*(bytes([byte]) for byte in b'{}[]",-\n\x00\xff'), b"9" * 20, b"1e999", b"NaN", b"null", "é".encode()]


def damaged(data: bytes, rng: random.Random) -> bytes:
    """One to four cuts, doublings, swaps and insertions."""
    for _ in range(rng.randint(1, 4)):
        start, stop = sorted(rng.randrange(len(data) + 1) for _ in range(2))
        kind = rng.randrange(4)
        if kind == 0:
            data = data[:start] + data[min(stop, start + 20) :]
        elif kind == 1:
            data = data[:stop] + data[start : start + 200] + data[stop:]
        elif kind == 2:
            data = data[:start] + rng.choice(BYTES) + data[start:]
        else:
            data = data[:start] + rng.choice(BYTES) + data[start + 1 :]
    return data


def told(read: Callable[[], object]) -> bool:
    """Whether it was refused; anything but a SpecError of one line passes through and fails the test."""
    try:
        read()
        return False
    except SpecError as error:
        lines = (error.message, error.hint or "none")
    assert all(line and line.isprintable() and len(line) < 1000 for line in lines), lines
    return True


@pytest.mark.parametrize(
    "text",
    [workload_json(WORKLOAD), PAPER_REQUESTS, AZURE, MOONCAKE],
    ids=["ours", "paper", "azure", "mooncake"],
)
def test_damaged_workloads(text: str, rng: random.Random) -> None:
    """Tests that 1500 damaged files of each format are read or refused in one line, and many are refused."""
    refused = sum(told(lambda data=data: read_workload(data, where="w")) for data in damages(text, rng, 1500))
    assert refused > 700


def test_damaged_rates(rng: random.Random) -> None:
    """Tests the same of files of rates."""
    refused = sum(told(lambda data=data: arrival_rates(data, where="w")) for data in damages(RATES, rng, 500))
    assert refused > 200


@pytest.mark.parametrize(
    "text", [trace_json(TRACE), PAPER_TRACE, PAPER_DAY, ZONE], ids=["ours", "paper", "day", "zone"]
)
def test_damaged_traces(text: str, rng: random.Random, tmp_path: Path) -> None:
    """Tests that 400 damaged files of each format are read or refused in one line, and many are refused."""
    path = tmp_path / "t"
    read = zone_counts if text is ZONE else read_trace

    def read_again(data: bytes) -> bool:
        path.write_bytes(data)
        return told(lambda: read(path))

    assert sum(read_again(data) for data in damages(text, rng, 400)) > 150


def damages(text: str, rng: random.Random, count: int) -> list[bytes]:
    return [damaged(text.encode(), rng) for _ in range(count)]
