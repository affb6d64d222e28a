"""Migration is live: weights and full KV blocks move while the replica goes on decoding, and nothing is recomputed.

What a status line claims is checked against what the journal and the ledger say, and tokens against `transformers`.
"""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.conftest import SAMPLED, TinyModel
from tests.e2e.daemon import UNHURRIED, RunningDaemon, Stream, running
from tests.e2e.history import last_run
from tests.e2e.models import NUM_TOKENS

pytestmark = pytest.mark.e2e

NUM_BEFORE_NOTICE = 30
LONG = 300
SLOW_LINK = {"SPOTSERVE_LINK_BYTES_PER_S": "900000"}
"""The burst of 1 MiB passes at once, what is left of a GPU's share of `large` takes seconds."""


def degrees(data: int, pipeline: int, tensor: int) -> list[str]:
    """Pinned degrees as arguments of `spotserve run`."""
    return ["-dp", str(data), "-pp", str(pipeline), "-tp", str(tensor)]


def wait_tokens(streams: list[Stream], count: int) -> None:
    """Until each stream has brought `count` tokens."""
    for stream in streams:
        stream.wait_tokens(count, timeout_s=200)


def tokens_of(streams: list[Stream]) -> list[list[int]]:
    """The tokens of ended streams."""
    return [stream.wait(200) for stream in streams]


def instance_of_replica(status: dict[str, Any], index: int = 0) -> str:
    """The instance of a replica's leader."""
    return str(status["replicas"][index]["stages"][0]["gpus"][0]).split("/")[0]


def parallel_of(daemon: RunningDaemon) -> tuple[int, int, int]:
    """(D, P, M) as served now."""
    parallel = daemon.status()["parallel"]
    return parallel["data"], parallel["pipeline"], parallel["tensor"]


def generations(daemon: RunningDaemon, stream: Stream) -> list[int]:
    """The generations that made a stream's tokens, by position, from the ledger."""
    made = [generation for *_, generation in daemon.ledger_rows(stream.request)]
    return sorted(set(made), key=made.index)


def wait_migrated(daemon: RunningDaemon, trigger: str, num_earlier: int) -> dict[str, Any]:
    """The status line of the first migration after `num_earlier` ones, once it has ended."""
    daemon.wait_for(
        lambda: any(line["outcome"] for line in daemon.status()["migrations"][num_earlier:]),
        f"migrated for {trigger}",
        timeout_s=120,
    )
    line: dict[str, Any] = daemon.status()["migrations"][num_earlier]
    assert (trigger, "completed", "live") == (line["trigger"], line["outcome"], line["mode"])
    return line


def assert_moved_live(line: dict[str, Any]) -> None:
    """KV moved, and nothing was prefilled a second time."""
    assert line["recomputed_tokens"] == 0
    assert line["kv_bytes"] > 0


class Arrivals:
    """One short request after the other for as long as it is entered; they tell which replica served when."""

    def __init__(self, daemon: RunningDaemon, model: TinyModel) -> None:
        self._daemon = daemon
        self._model = model
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._arrive)
        self.streams: list[Stream] = []

    def __enter__(self) -> Arrivals:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        self._thread.join()

    def _arrive(self) -> None:
        while not self._stopping.is_set():
            stream = self._daemon.stream(self._model.prompt_ids[0], max_tokens=2)
            self.streams.append(stream)
            stream.done.wait(100)

    def assert_exact(self) -> None:
        """They had the tokens they should."""
        assert [self._model.token_ids[0][:2]] * len(self.streams) == tokens_of(self.streams)


def test_decoding_goes_on_while_weights_move(
    tmp_path: Path, large: TinyModel, large_environment: dict[str, str]
) -> None:
    """Tests that a replica serves between its plan's first `copy_weights` and its `quiesce`, and moves all KV."""
    args = [str(large.folder), "--gpu-memory", "24MiB", "--instances", "5", *degrees(1, 2, 2)]
    with running(tmp_path / "state", *args, env={**large_environment, **SLOW_LINK}) as daemon:
        streams = [daemon.stream(ids, max_tokens=LONG) for ids in large.prompt_ids[2:]]
        wait_tokens(streams, NUM_BEFORE_NOTICE)
        with Arrivals(daemon, large) as arrivals:
            daemon.admin("notice", instance=instance_of_replica(daemon.status()), grace_s=60)
            line = wait_migrated(daemon, "notice", 0)
        assert large.expected(LONG)[2:] == tokens_of(streams)
        arrivals.assert_exact()
        assert_moved_live(line)
        assert line["weight_bytes"] > 0
        run = last_run(daemon)
        assert line["epoch"] == run.plan.epoch.to
        assert [1, run.plan.epoch.to] == generations(daemon, streams[0])
        assert run.served_while_copying()


def test_shape_changes_and_back(tmp_path: Path, large: TinyModel, large_environment: dict[str, str]) -> None:
    """Tests that KV moves from (1, 2, 2) into (1, 3, 1) when a GPU goes, and back when one joins under load."""
    # Pools of three sequences: what is left holds both generations at once, but no whole model.
    args = [str(large.folder), "--gpu-memory", "8800KiB", "--max-num-seqs", "3", "--instances", "4", *degrees(1, 2, 2)]
    with running(tmp_path / "state", *args, env=large_environment) as daemon:
        assert (1, 2, 2) == parallel_of(daemon)
        streams = [daemon.stream(ids, max_tokens=LONG) for ids in large.prompt_ids[2:]]
        wait_tokens(streams, NUM_BEFORE_NOTICE)
        daemon.admin("notice", instance="i2", grace_s=60)
        assert_moved_live(wait_migrated(daemon, "notice", 0))
        assert (1, 3, 1) == parallel_of(daemon)
        assert large.expected(LONG)[2:] == tokens_of(streams)
        assert [1, last_run(daemon).plan.epoch.to] == generations(daemon, streams[0])
        daemon.admin("kill", instance="i2")
        streams = [daemon.stream(ids, max_tokens=LONG) for ids in large.prompt_ids[2:]]
        wait_tokens(streams, NUM_BEFORE_NOTICE)
        num_earlier = len(daemon.status()["migrations"])
        daemon.admin("add-instance")
        assert_moved_live(wait_migrated(daemon, "joined", num_earlier))
        assert (1, 2, 2) == parallel_of(daemon)
        assert large.expected(LONG)[2:] == tokens_of(streams)
        assert 2 == len(generations(daemon, streams[0]))


@pytest.mark.parametrize(
    ("shape", "instances"), [((1, 1, 5), 6), pytest.param((1, 7, 1), 8, marks=pytest.mark.slow)], ids=str
)
def test_sampled_streams_move_at_odd_degrees(
    shape: tuple[int, int, int],
    instances: int,
    tmp_path: Path,
    small: TinyModel,
    sampled: list[dict[int, list[int]]],
    small_environment: dict[str, str],
) -> None:
    """Tests that greedy and sampled streams move with their KV where there are fewer kv heads than ranks, or layers."""
    args = [str(small.folder), "--gpu-memory", "24MiB", "--instances", str(instances), *degrees(*shape)]
    with running(tmp_path / "state", *args, env=small_environment) as daemon:
        assert shape == parallel_of(daemon)
        greedy = [daemon.stream(ids, max_tokens=NUM_TOKENS) for ids in small.prompt_ids[:3]]
        drawn = [daemon.stream(ids, max_tokens=NUM_TOKENS, **SAMPLED) for ids in small.prompt_ids[3:]]
        wait_tokens([*greedy, *drawn], NUM_BEFORE_NOTICE)
        daemon.admin("notice", instance="i0", grace_s=60)
        assert_moved_live(wait_migrated(daemon, "notice", 0))
        assert shape == parallel_of(daemon)
        assert small.expected(NUM_TOKENS)[:3] == tokens_of(greedy)
        tokens_of(drawn)
        assert sampled[3:] == [stream.by_choice for stream in drawn]
        epoch = last_run(daemon).plan.epoch.to
        assert [[1, epoch]] * 5 == [generations(daemon, stream) for stream in [*greedy, *drawn]]


def test_untouched_replica_does_not_notice(tmp_path: Path, small: TinyModel, small_environment: dict[str, str]) -> None:
    """Tests that a replica outside the notice keeps id and generation, and no step of the plan stops it."""
    args = [str(small.folder), "--gpu-memory", "24MiB", "--instances", "5", *degrees(2, 1, 2)]
    with running(tmp_path / "state", *args, env={**small_environment, **UNHURRIED}) as daemon:
        touched, untouched = daemon.status()["replicas"]
        streams = small.stream_all(daemon, NUM_TOKENS)
        wait_tokens(streams, NUM_BEFORE_NOTICE)
        daemon.admin("notice", instance=instance_of_replica(daemon.status(), 0), grace_s=60)
        assert_moved_live(wait_migrated(daemon, "notice", 0))
        assert small.expected(NUM_TOKENS) == tokens_of(streams)
        assert untouched in daemon.status()["replicas"]
        assert (2, 1, 2) == parallel_of(daemon)
        run = last_run(daemon)
        assert [(touched["id"], touched["generation"])] == run.quiesced()
        owners = [{row[3:] for row in daemon.ledger_rows(stream.request)} for stream in streams]
        stayed = {(untouched["id"], untouched["generation"])}
        assert stayed in owners
        assert any(len(names) == 2 and not names & stayed for names in owners)


def test_a_replica_merges_into_the_one_that_stays(
    tmp_path: Path, large: TinyModel, large_environment: dict[str, str]
) -> None:
    """Tests that with free degrees the streams of a replica that goes move live into another that keeps serving."""
    args = [str(large.folder), "--gpu-memory", "8MiB", "--instances", "4"]
    with running(tmp_path / "state", *args, env=large_environment) as daemon:
        _, stays = daemon.status()["replicas"]
        streams = [daemon.stream(ids, max_tokens=LONG) for ids in large.prompt_ids[2:]]
        wait_tokens(streams, NUM_BEFORE_NOTICE)
        daemon.admin("notice", instance=instance_of_replica(daemon.status(), 0), grace_s=60)
        assert_moved_live(wait_migrated(daemon, "notice", 0))
        assert [stays] == daemon.status()["replicas"]
        assert large.expected(LONG)[2:] == tokens_of(streams)
