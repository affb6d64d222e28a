"""Solvers answer the same in any process; one set of processes for several, as their imports take most of the time."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from tests.solvers import test_arrange, test_fleet, test_ladder

ROOT = Path(__file__).resolve().parents[2]

PROGRAM = """
from spotserve.solvers.arrange import *
from spotserve.solvers.fleet import *
from spotserve.solvers.ladder import *

for stop in {stops!r}:
    print(arrange(stop, "scan"), arrange(stop, "paper"))
for ladder in {ladders!r}:
    print(keep_requests(ladder, "priced"))
for fleet in {fleets!r}:
    print(decide_fleet(fleet, "hedge"))
"""


@pytest.mark.thorough
def test_same_answer_in_any_process(rng: random.Random) -> None:
    """Tests that three processes with different hash seeds stop, keep and buy the same, certificates included."""
    program = PROGRAM.format(
        stops=[test_arrange.drawn(rng) for _ in range(10)],
        ladders=[test_ladder.drawn(rng, num_items=100) for _ in range(3)],
        fleets=[test_fleet.drawn(rng, num_zones=zones, need=20, attrition=True) for zones in (2, 3, 4)],
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", program],
            capture_output=True,
            text=True,
            cwd=ROOT,
            env={**os.environ, "PYTHONHASHSEED": seed},
            check=True,
        ).stdout
        for seed in ("0", "1", "42")
    }
    assert 1 == len(outputs)
    assert 16 == next(iter(outputs)).count("\n")
