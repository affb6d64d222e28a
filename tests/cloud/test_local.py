"""The local cloud: with which arguments instances are started."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from spotserve.cloud.local import LocalCloud
from spotserve.core.ids import InstanceId


@dataclass(frozen=True, slots=True)
class Nobody:
    """A process that never was."""

    pid: int = 0
    started_at: float = 0.0


@dataclass
class PaperLauncher:
    """Writes down what it was to start."""

    started: list[list[str]] = field(default_factory=list)

    def fork(self, args: Sequence[str], *, log: Path, env: Mapping[str, str] | None = None) -> Nobody:
        """Start nothing."""
        self.started.append(list(args))
        return Nobody()


@pytest.mark.parametrize(
    ("types", "told"),
    [
        ((), [[], [], [], []]),
        (("slow",), [["--gpu-type=slow"]] * 4),
        (("", "slow", "fast"), [[], ["--gpu-type=slow"], ["--gpu-type=fast"], []]),
    ],
)
def test_types_in_turn(types: tuple[str, ...], told: list[list[str]], tmp_path: Path) -> None:
    """Tests that instances take the types in turn by their number, also one that is launched again or out of order."""
    launcher = PaperLauncher()
    cloud = LocalCloud(launcher, log_folder=tmp_path, worker_args=["--gpus", "1"], gpu_types=types)
    for number in (3, 0, 1, 2, 3):
        asyncio.run(cloud.launch(InstanceId(f"i{number}")))
    expected = [["--gpus", "1", *told[number], "--instance", f"i{number}"] for number in (3, 0, 1, 2, 3)]
    assert expected == launcher.started
