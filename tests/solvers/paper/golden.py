"""Reading the published tables: profiles, golden rows and shapes."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

from spotserve.solvers.paper.latency import LatencyTable
from spotserve.solvers.paper.latency import latency_table as read_table
from spotserve.solvers.paper.models import Shape

PROFILE_FILES = {"OPT-6.7B": "megatron_6.7B", "GPT-20B": "megatron_h6144", "LLaMA-30B": "megatron_h7168"}
MIN_GPUS = {"OPT-6.7B": 4, "GPT-20B": 12, "LLaMA-30B": 16}
LOADS_GIVEN = {"OPT-6.7B": 2.0, "GPT-20B": 0.4, "LLaMA-30B": 0.2}


def latency_table(shared_data: Path, model: str) -> LatencyTable:
    """The T4-4x profile of a model."""
    path = shared_data / "spotserve-paper/profiles/T4-4x" / f"{PROFILE_FILES[model]}_profile.json"
    return read_table(path.read_text(encoding="utf-8"))


def golden_rows(shared_data: Path, name: str) -> list[dict[str, str]]:
    """The rows of a golden CSV file."""
    with (shared_data / "spotserve-paper/golden" / name).open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows, f"{name} is empty"
    return rows


def golden_json(shared_data: Path, name: str) -> Any:
    """A golden JSON file."""
    return json.loads((shared_data / "spotserve-paper/golden" / name).read_text(encoding="utf-8"))


def triple(text: str) -> tuple[int, int, int]:
    """Three numbers of "(a,b,c)"."""
    first, second, third = (int(part) for part in text.strip("()").split(","))
    return first, second, third


def shape(text: str) -> Shape:
    """A shape of "(D,P,M)"."""
    return Shape(*triple(text))
