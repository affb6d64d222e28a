"""Where old and new do not fit side by side: the replica stops first, its KV moves, then its weights layer by layer.

Four GPUs of 4800 KiB are full with (1, 2, 2); three can hold (1, 3, 1), but not beside what they have.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from spotserve.core.commands import CommitRun
from tests.e2e.conftest import TinyModel
from tests.e2e.daemon import UNHURRIED, RunningDaemon, Stream, running
from tests.e2e.history import last_run
from tests.e2e.test_live_migration import degrees, generations, parallel_of, tokens_of, wait_tokens

pytestmark = pytest.mark.e2e

NUM_TOKENS = 200
NUM_BEFORE_NOTICE = 20
NOTICED, STAYING = "i0", "i2"


class ShortOfMemory:
    """A daemon whose next notice can only be answered in place, three streams on it, and its failpoints."""

    def __init__(self, daemon: RunningDaemon, model: TinyModel, points: Path) -> None:
        self.daemon = daemon
        self.model = model
        self.points = points

    def decoding(self) -> list[Stream]:
        """Three streams past their first tokens."""
        streams = [self.daemon.stream(ids, max_tokens=NUM_TOKENS) for ids in self.model.prompt_ids[2:]]
        wait_tokens(streams, NUM_BEFORE_NOTICE)
        return streams

    def expected(self) -> list[list[int]]:
        """What they must bring."""
        return self.model.expected(NUM_TOKENS)[2:]

    def arm(self, instance: str, place: str) -> Path:
        """The instance dies when it reaches the place; the file is gone then."""
        draft = self.points / "draft"
        draft.write_text(place)
        return draft.rename(self.points / f"{instance}.0")

    def notice(self) -> None:
        """The notice that only an in_place plan answers."""
        self.daemon.admin("notice", instance=NOTICED, grace_s=60)

    def wait_died(self, armed: Path) -> None:
        """Until the armed instance reached its place."""
        self.daemon.wait_for(lambda: not armed.exists(), "a failpoint reached", 120)

    def wait_over(self) -> None:
        """Until no run is under way."""
        self.daemon.wait_for(
            lambda: all(line["outcome"] for line in self.daemon.status()["migrations"]), "migrated", timeout_s=120
        )


@pytest.fixture
def short(tmp_path: Path, large: TinyModel, large_environment: dict[str, str]) -> Iterator[ShortOfMemory]:
    """It, from start to stop."""
    points = tmp_path / "failpoints"
    points.mkdir()
    args = [str(large.folder), "--gpu-memory", "4800KiB", "--max-num-seqs", "3", "--instances", "4", *degrees(1, 2, 2)]
    env = {**large_environment, **UNHURRIED, "SPOTSERVE_FAILPOINTS": str(points)}
    with running(tmp_path / "state", *args, env=env) as daemon:
        yield ShortOfMemory(daemon, large, points)


def test_kv_survives_where_memory_is_short(short: ShortOfMemory) -> None:
    """Tests that an in_place plan keeps all KV and fetches weights from GPUs: nothing is computed or loaded again."""
    assert (1, 2, 2) == parallel_of(short.daemon)
    streams = short.decoding()
    short.notice()
    short.daemon.wait_for(lambda: bool(short.daemon.status()["migrations"]), "planned", 120)
    assert short.expected() == tokens_of(streams)
    short.wait_over()
    (line,) = short.daemon.status()["migrations"]
    assert ("notice", "completed", "in_place") == (line["trigger"], line["outcome"], line["mode"])
    assert 0 == line["recomputed_tokens"]
    assert line["kv_bytes"] > 0
    assert line["weight_bytes"] > 0
    assert (1, 3, 1) == parallel_of(short.daemon)
    run = last_run(short.daemon)
    assert not run.begun("load_weights")
    assert min(run.begun("release")) < max(run.begun("copy_weights"))
    assert [[1, run.plan.epoch.to]] * 3 == [generations(short.daemon, stream) for stream in streams]
    again = short.decoding()
    assert short.expected() == tokens_of(again)


@pytest.mark.parametrize(
    "place",
    [
        "reserve:after",
        "copy_kv:before",
        "copy_kv_delta:after",
        "copy_weights:before",
        "copy_weights:after",
        "release:before",
        "release:after",
        "activate:before",
    ],
)
def test_target_lost_after_the_commit(short: ShortOfMemory, place: str) -> None:
    """Tests that a GPU of the new layout may die at any step behind the commit: storage and ledger have it all."""
    streams = short.decoding()
    armed = short.arm(STAYING, place)
    short.notice()
    short.wait_died(armed)
    short.daemon.admin("add-instance")
    assert short.expected() == tokens_of(streams)
    short.wait_over()
    assert [stream.finish_reason for stream in streams] == ["length"] * 3


def test_source_lost_after_the_commit(short: ShortOfMemory) -> None:
    """Tests that the noticed GPU, a source of KV and weights, may be gone in the middle of the copies."""
    streams = short.decoding()
    armed = short.arm(NOTICED, "grant:after")
    short.notice()
    short.wait_died(armed)
    assert short.expected() == tokens_of(streams)
    short.wait_over()
    entries = last_run(short.daemon).entries
    assert any(isinstance(command, CommitRun) for entry in entries for command in entry.commands)
