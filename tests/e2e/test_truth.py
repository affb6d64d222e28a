"""Exactness with real processes: whatever the degrees, the batch and the losses, a stream is what nobody disturbed.

Greedy tokens are judged by `transformers`, sampled ones by our own undisturbed run on one GPU.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.conftest import SAMPLED, TinyModel
from tests.e2e.daemon import RunningDaemon, Stream, running
from tests.e2e.models import NUM_TOKENS

pytestmark = pytest.mark.e2e

NUM_BEFORE_KILL = 40


@dataclass(frozen=True, slots=True)
class Shape:
    """Degrees to start with, and the instances to start them on."""

    data: int
    pipeline: int
    tensor: int
    instances: int
    gpus_per_instance: int = 1

    def args(self, folder: Path) -> list[str]:
        """The arguments of `spotserve run`."""
        degrees = ["-dp", str(self.data), "-pp", str(self.pipeline), "-tp", str(self.tensor)]
        instances = ["--instances", str(self.instances), "--gpus-per-instance", str(self.gpus_per_instance)]
        return [str(folder), "--gpu-memory", "24MiB", *degrees, *instances]

    def __str__(self) -> str:
        return f"{self.data}x{self.pipeline}x{self.tensor}-on-{self.instances}x{self.gpus_per_instance}"


SHAPES = (
    Shape(1, 1, 1, instances=2),
    Shape(1, 1, 3, instances=4),
    Shape(1, 3, 1, instances=3),
    Shape(2, 1, 2, instances=5),
    Shape(1, 2, 3, instances=6),
    Shape(1, 2, 2, instances=3, gpus_per_instance=2),
)
FURTHER_SHAPES = (
    Shape(1, 7, 1, instances=8),
    Shape(1, 1, 8, instances=8),
    Shape(2, 3, 1, instances=7),
    Shape(1, 4, 2, instances=4, gpus_per_instance=2),
)


@dataclass
class Churn:
    """Short requests that come and go beside the watched streams, so that no batch stays as it was."""

    daemon: RunningDaemon
    model: TinyModel
    streams: list[tuple[int, int, Stream]] = field(default_factory=list)
    stopping: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> Churn:
        self._thread = threading.Thread(target=self._come_and_go)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stopping.set()
        self._thread.join()

    def _come_and_go(self) -> None:
        while not self.stopping.is_set():
            number = len(self.streams)
            prompt, max_tokens = number % len(self.model.prompt_ids), 3 + 7 * number % 23
            stream = self.daemon.stream(self.model.prompt_ids[prompt], max_tokens=max_tokens)
            self.streams.append((prompt, max_tokens, stream))
            stream.done.wait(60)

    def check(self) -> None:
        """Each of them was exact as well."""
        assert self.streams
        for prompt, max_tokens, stream in self.streams:
            assert self.model.token_ids[prompt][:max_tokens] == stream.wait()


@pytest.mark.parametrize(
    "shape", [*SHAPES, *(pytest.param(shape, marks=pytest.mark.slow) for shape in FURTHER_SHAPES)], ids=str
)
def test_streams_are_exact_before_across_and_after_a_kill(
    shape: Shape,
    tmp_path: Path,
    small: TinyModel,
    sampled: list[dict[int, list[int]]],
    small_environment: dict[str, str],
) -> None:
    """Tests that greedy streams equal `transformers` and sampled ones the undisturbed run, whoever is killed."""
    with running(tmp_path / "state", *shape.args(small.folder), env=small_environment) as daemon:
        degrees = {"data": shape.data, "pipeline": shape.pipeline, "tensor": shape.tensor}
        assert degrees == daemon.status()["parallel"]
        with Churn(daemon, small) as churn:
            greedy = small.stream_all(daemon, NUM_TOKENS)
            drawn = [daemon.stream(ids, max_tokens=NUM_TOKENS, **SAMPLED) for ids in small.prompt_ids[1:3]]
            for stream in greedy:
                stream.wait_tokens(NUM_BEFORE_KILL, timeout_s=200)
            daemon.admin("kill", instance=last_instance(daemon.status()))
            assert small.expected(NUM_TOKENS) == [stream.wait(200) for stream in greedy]
            for stream in drawn:
                stream.wait(200)
            assert sampled[1:3] == [stream.by_choice for stream in drawn]
        churn.check()
        daemon.wait_state("serving")
        answers = [line for line in daemon.status()["migrations"] if line["trigger"] == "lost"]
        # A rank that heard its mesh break may be heard before the loss is: that first plan is aborted by the second.
        *before, last = [line["outcome"] for line in answers]
        assert ("completed", set()) == (last, set(before) - {"aborted"})
        assert answers[-1]["recomputed_tokens"] > 0
        assert any(len(owners(daemon, stream)) == 2 for stream in greedy)
        assert small.expected(60) == [stream.wait() for stream in small.stream_all(daemon, 60)]


def last_instance(status: dict[str, Any]) -> str:
    """The instance of the first replica's last rank: never its leader when there is more than one."""
    return str(status["replicas"][0]["stages"][-1]["gpus"][-1]).split("/")[0]


def owners(daemon: RunningDaemon, stream: Stream) -> set[tuple[str, int]]:
    """The (replica, generation) pairs that made a stream's tokens, from the ledger."""
    return {(replica, generation) for *_, replica, generation in daemon.ledger_rows(stream.request)}
