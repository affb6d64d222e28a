"""Two GPUs of one instance need the same weights: one fetches them, the other copies them from it inside the instance.

Both replicas of a model of 7 MB run on `i0`, which gets a notice; `i1`, two GPUs as well, takes over.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from spotserve.core.commands import ExecuteStep
from spotserve.core.events import StepDone
from spotserve.core.ids import instance_of
from spotserve.core.plan import CopyWeights
from tests.e2e.conftest import TinyModel
from tests.e2e.daemon import UNHURRIED, RunningDaemon, Stream, running
from tests.e2e.history import RunHistory, last_run
from tests.e2e.models import NUM_TOKENS
from tests.e2e.test_live_migration import assert_moved_live, degrees, parallel_of, tokens_of, wait_migrated, wait_tokens

pytestmark = pytest.mark.e2e

NUM_BEFORE_NOTICE = 20


@pytest.fixture
def points(tmp_path: Path) -> Path:
    """The folder of failpoints."""
    folder = tmp_path / "failpoints"
    folder.mkdir()
    return folder


@pytest.fixture
def doubled(
    tmp_path: Path, large: TinyModel, large_environment: dict[str, str], points: Path
) -> Iterator[RunningDaemon]:
    """A daemon with both replicas on `i0`, and `i1` without any."""
    args = [str(large.folder), "--gpu-memory", "24MiB", "--instances", "1", "--gpus-per-instance", "2"]
    env = {**large_environment, **UNHURRIED, "SPOTSERVE_FAILPOINTS": str(points)}
    with running(tmp_path / "state", *args, *degrees(2, 1, 1), env=env) as daemon:
        assert {"i0"} == {gpu.split("/")[0] for replica in daemon.status()["replicas"] for gpu in gpus(replica)}
        spare = daemon.admin("add-instance")["instance"]
        assert "i1" == spare
        daemon.wait_for(lambda: states(daemon)[spare] == "ready", "spare ready")
        yield daemon


def gpus(replica: dict[str, list[dict[str, list[str]]]]) -> list[str]:
    """The GPUs of a replica in a status."""
    return [gpu for stage in replica["stages"] for gpu in stage["gpus"]]


def states(daemon: RunningDaemon) -> dict[str, str]:
    """The state of each instance."""
    return {instance["id"]: instance["state"] for instance in daemon.status()["instances"]}


def decoding(daemon: RunningDaemon, model: TinyModel) -> list[Stream]:
    """Every prompt's stream, past its first tokens."""
    streams = model.stream_all(daemon, NUM_TOKENS)
    wait_tokens(streams, NUM_BEFORE_NOTICE)
    return streams


def relay_of(run: RunHistory) -> tuple[CopyWeights, CopyWeights]:
    """(the copy over the network, the copy inside the instance), the only ones of a run's plan."""
    copies = [step for step in run.plan.steps if isinstance(step, CopyWeights)]
    (across,) = (step for step in copies if step.reason != "instance_fetches")
    (inside,) = (step for step in copies if step.reason == "instance_fetches")
    return across, inside


def ordered_at(run: RunHistory, step: CopyWeights) -> int:
    """The entry that had a step begin."""
    (sequence,) = (
        entry.sequence
        for entry in run.entries
        for command in entry.commands
        if isinstance(command, ExecuteStep) and (command.epoch, command.step.id) == (run.plan.epoch.to, step.id)
    )
    return sequence


def done(run: RunHistory, step: CopyWeights) -> tuple[int, StepDone]:
    """The entry that had a step's answer, and the answer."""
    ((sequence, event),) = (
        (entry.sequence, entry.event)
        for entry in run.entries
        if isinstance(entry.event, StepDone) and (entry.event.epoch, entry.event.step) == (run.plan.epoch.to, step.id)
    )
    return sequence, event


def test_one_gpu_fetches_for_its_instance(doubled: RunningDaemon, large: TinyModel) -> None:
    """Tests that weights cross to an instance once and move on inside it before the commit, with exact streams."""
    streams = decoding(doubled, large)
    doubled.admin("notice", instance="i0", grace_s=60)
    assert_moved_live(wait_migrated(doubled, "notice", 0))
    assert large.expected(NUM_TOKENS) == tokens_of(streams)
    assert (2, 1, 1) == parallel_of(doubled)
    run = last_run(doubled)
    across, inside = relay_of(run)
    assert ("i0", "i1", "i1") == (
        instance_of(across.source),
        instance_of(across.destination),
        instance_of(inside.destination),
    )
    assert across.destination == inside.source
    arrived, _ = done(run, across)
    passed_on, answer = done(run, inside)
    assert arrived <= ordered_at(run, inside) < passed_on
    assert answer.bytes == inside.bytes == across.bytes > 0
    # Both replicas serve from what they have now.
    doubled.admin("kill", instance="i0")
    assert large.expected(30) == [stream.wait() for stream in large.stream_all(doubled, 30)]


@pytest.mark.parametrize(
    "place",
    [*(pytest.param(f"copy_weights:{side}", marks=pytest.mark.slow) for side in ("before", "after")), "grant:after"],
)
def test_the_gpu_that_fetches_is_lost(doubled: RunningDaemon, large: TinyModel, points: Path, place: str) -> None:
    """Tests that it may die before, after or while it passes weights on: the plan aborts, and another one completes."""
    streams = decoding(doubled, large)
    (points / "draft").write_text(place)
    armed = (points / "draft").rename(points / "i1.0")
    doubled.admin("notice", instance="i0", grace_s=60)
    doubled.wait_for(lambda: not armed.exists(), "a failpoint reached", 120)
    doubled.admin("add-instance")
    assert large.expected(NUM_TOKENS) == tokens_of(streams)
    doubled.wait_for(
        lambda: [line["outcome"] for line in doubled.status()["migrations"]][-1:] == ["completed"], "migrated", 120
    )
    assert "aborted" == doubled.status()["migrations"][0]["outcome"]
    assert [stream.finish_reason for stream in streams] == ["length"] * len(streams)
