"""Faults of real processes: whatever dies, stops or is taken, every stream has exactly its undisturbed tokens."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx2 as httpx
import pytest

from spotserve.app import BUILTIN_MODEL
from tests.e2e.models import write_profile
from tests.e2e.scene import PACED, PROMPTS, Scene, members_of, playing, rarely

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory, daemon_environment: dict[str, str]) -> Iterator[Scene]:
    """One replica of two stages, three spare instances, slow links."""
    env = {**daemon_environment, **PACED}
    args = ("--instances", "5", "--gpu-memory", "24MiB", "-dp", "1", "-pp", "2", "-tp", "1")
    with playing(tmp_path_factory.mktemp("faults"), *args, env=env) as scene:
        yield scene


@pytest.mark.parametrize("role", [0, 1], ids=["leader", "last-stage"])
def test_killed_without_notice(scene: Scene, role: int) -> None:
    """Tests that a kill of either stage costs a recompute and no token."""
    streams = scene.decoding()
    scene.kill(scene.serving()[role])
    scene.check(streams)
    assert "lost" == scene.daemon.status()["migrations"][-1]["trigger"]


@pytest.mark.parametrize("grace_s", [0.0, 0.5, *rarely(0.05, 3.0)])
def test_notice_too_short_to_move_all(scene: Scene, grace_s: float) -> None:
    """Tests that whatever a notice is too short for is recomputed, exactly."""
    streams = scene.decoding()
    scene.notice(scene.serving()[0], grace_s)
    scene.check(streams)


def test_two_notices_at_once(scene: Scene) -> None:
    """Tests that both stages noticed at once move to the spare instances with their KV."""
    streams = scene.decoding()
    first, last = scene.serving()
    scene.notice(first, 60)
    scene.notice(last, 60)
    assert scene.expected == [stream.wait() for stream in streams]
    # The streams may end before the capped copies do.
    scene.daemon.wait_for(lambda: not {first, last} & set(scene.serving()), "moved off both instances")
    line = next(one for one in scene.daemon.status()["migrations"][::-1] if one["outcome"] == "completed")
    assert ("notice", 0) == (line["trigger"], line["recomputed_tokens"])
    assert line["kv_bytes"] > 0
    scene.kill(first)
    scene.kill(last)
    scene.check(streams)


def test_notice_during_a_migration(scene: Scene) -> None:
    """Tests that a second notice on the way is answered by a plan that leaves both instances."""
    streams = scene.decoding()
    first, last = scene.serving()
    scene.notice(first, 60)
    scene.wait_copying()
    scene.notice(last, 60)
    assert scene.expected == [stream.wait() for stream in streams]
    scene.settle()
    assert not {first, last} & set(scene.serving())
    scene.kill(first)
    scene.kill(last)
    scene.check(streams)


@pytest.mark.parametrize(
    "place",
    [
        "copy_weights:after",
        "copy_kv_delta:before",
        "join_group:before",
        "activate:before",
        *rarely("reserve:after", "copy_weights:before", "copy_kv:before", "copy_kv:after"),
        *rarely("copy_kv_delta:after", "join_group:after", "activate:after"),
    ],
)
def test_target_lost_at(scene: Scene, place: str) -> None:
    """Tests that a destination may die at any step of the plan that moves to it."""
    streams = scene.decoding()
    spares = scene.spares()
    scene.arm(place, spares)
    scene.notice(scene.serving()[0], 60)
    scene.wait_fired(spares)
    doomed = next(one["id"] for one in scene.daemon.status()["instances"] if one["state"] == "doomed")
    assert scene.expected == [stream.wait() for stream in streams]
    scene.settle()
    scene.kill(doomed)
    scene.check(streams)


@pytest.mark.parametrize(
    "place", ["grant:before", "quiesce:after", *rarely("grant:after", "quiesce:before", "release:before")]
)
def test_source_and_leader_lost_at(scene: Scene, place: str) -> None:
    """Tests that the noticed leader, the source of all copies, may die at any step it takes part in."""
    streams = scene.decoding()
    leader = scene.serving()[0]
    scene.arm(place, [leader])
    scene.notice(leader, 60)
    scene.wait_fired([leader])
    scene.check(streams)


@pytest.mark.parametrize("place", ["activate:before", *rarely("join_group:after", "copy_kv:before", "release:after")])
def test_staying_stage_lost_at(scene: Scene, place: str) -> None:
    """Tests that the instance that stays in its role may die at any step."""
    streams = scene.decoding()
    leader, stays = scene.serving()
    scene.arm(place, [stays])
    scene.notice(leader, 60)
    scene.daemon.wait_for(
        lambda: not (scene.points / f"{stays}.0").exists() or not scene.migrating(), "the plan over", 120
    )
    assert scene.expected == [stream.wait() for stream in streams]
    (scene.points / f"{stays}.0").unlink(missing_ok=True)
    scene.settle()
    if leader in scene.living():
        scene.kill(leader)
    scene.check(streams)


def test_all_gone_then_capacity_back(scene: Scene) -> None:
    """Tests that with nothing left the streams wait with keep-alives, and finish once capacity is back."""
    streams = scene.decoding()
    for name in scene.living():
        scene.kill(name)
    scene.daemon.wait_state("degraded")
    late = scene.streams()
    scene.daemon.wait_for(lambda: all(stream.keep_alives for stream in [*streams, *late]), "keep-alives", 60)
    for _ in range(2):
        scene.daemon.admin("add-instance")
    assert scene.expected == [stream.wait() for stream in late]
    scene.check(streams)


def test_requests_end_and_come_while_kv_is_copied(scene: Scene) -> None:
    """Tests that blocks freed and taken anew in mid-copy spoil nobody: one ends, one is cancelled, others come."""
    streams = scene.decoding()
    short = [scene.daemon.stream(PROMPTS[0], max_tokens=40) for _ in range(2)]
    body = {"model": scene.daemon.model(), "prompt": PROMPTS[1], "max_tokens": 400, "stream": True, "ignore_eos": True}
    scene.num_accepted += 3
    with httpx.stream("POST", f"{scene.daemon.url}/v1/completions", json=body, timeout=60) as answer:
        lines = answer.iter_lines()
        next(lines)
        scene.notice(scene.serving()[0], 60)
        scene.wait_copying()
    late = scene.streams()
    for stream in short:
        assert scene.expected[0][:40] == stream.wait()
    assert scene.expected == [stream.wait() for stream in late]
    assert scene.expected == [stream.wait() for stream in streams]
    scene.settle()
    assert scene.daemon.status()["requests"]["cancelled"] >= 1
    doomed = [one["id"] for one in scene.daemon.status()["instances"] if one["state"] == "doomed"]
    for name in doomed:
        scene.kill(name)
    scene.check(streams)


@pytest.mark.parametrize("silence_s", [1.0, 6.0])
def test_stopped_worker(scene: Scene, silence_s: float) -> None:
    """Tests that a stopped worker is waited for a while, then fenced: nothing it says later counts."""
    streams = scene.decoding()
    group = scene.groups()[scene.serving()[0]]
    os.killpg(group, signal.SIGSTOP)
    time.sleep(silence_s)
    if silence_s < 3:
        os.killpg(group, signal.SIGCONT)
    else:
        scene.daemon.wait_for(lambda: len(scene.living()) < scene.num_living, "the silent one given up", 60)
        assert [] == members_of(group)
    scene.check(streams)


def test_sigterm_to_an_instance_is_a_notice(scene: Scene) -> None:
    """Tests that SIGTERM to an instance's process group is a notice that moves its KV away."""
    streams = scene.decoding()
    leader = scene.serving()[0]
    os.killpg(scene.groups()[leader], signal.SIGTERM)
    assert scene.expected == [stream.wait() for stream in streams]
    states = {one["id"]: one["state"] for one in scene.daemon.status()["instances"]}
    assert "doomed" == states[leader]
    scene.settle()
    assert leader not in scene.serving()
    line = scene.daemon.status()["migrations"][-1]
    assert ("notice", 0) == (line["trigger"], line["recomputed_tokens"])
    scene.kill(leader)
    scene.check(streams)


@contextmanager
def four_small_gpus(folder: Path, environment: dict[str, str]) -> Iterator[Scene]:
    """The built-in default: four GPUs of 6 MiB, all in use, little room for two generations at once.

    Planned with a made-up profile: one that was measured gives fewer, roomier replicas on some machines.
    """
    write_profile(BUILTIN_MODEL, folder / "profiles")
    env = {**environment, **PACED, "SPOTSERVE_PROFILE_CACHE": str(folder / "profiles")}
    with playing(folder, env=env) as scene:
        yield scene


@pytest.fixture(scope="module")
def tight(tmp_path_factory: pytest.TempPathFactory, daemon_environment: dict[str, str]) -> Iterator[Scene]:
    """Four small GPUs that instances are taken from, test after test."""
    with four_small_gpus(tmp_path_factory.mktemp("tight"), daemon_environment) as scene:
        yield scene


@pytest.fixture
def crowded(tmp_path: Path, daemon_environment: dict[str, str]) -> Iterator[Scene]:
    """Four small GPUs as they were placed first: later a spare may be left over, and the pools roomier."""
    with four_small_gpus(tmp_path, daemon_environment) as scene:
        yield scene


@pytest.mark.parametrize("grace_s", [0.5, 20.0, *rarely(0.0)])
def test_tight_notice(tight: Scene, grace_s: float) -> None:
    """Tests that a notice without memory for a live move loses nothing, and that joins under load take it up again."""
    streams = tight.decoding()
    tight.notice(tight.serving()[0], grace_s)
    assert tight.expected == [stream.wait() for stream in streams]
    for name in [one["id"] for one in tight.daemon.status()["instances"] if one["state"] == "doomed"]:
        tight.kill(name)
    streams = tight.decoding()
    tight.fill_up()
    tight.check(streams)


def test_tight_kill_of_all_but_one(tight: Scene) -> None:
    """Tests that one GPU left serves nothing and loses nothing: streams wait until there are two again."""
    streams = tight.decoding()
    for name in tight.living()[1:]:
        tight.kill(name)
    tight.daemon.wait_state("degraded")
    tight.daemon.admin("add-instance")
    tight.check(streams)


@pytest.mark.parametrize(
    "place",
    [
        "copy_weights:after",
        "activate:before",
        *rarely("reserve:before", "quiesce:after", "copy_kv_delta:before", "release:before", "join_group:before"),
    ],
)
def test_tight_lost_at(tight: Scene, place: str) -> None:
    """Tests that an instance that stays may die at any step of an in-place plan, before its commit or after it."""
    streams = tight.decoding()
    doomed, *others = tight.ready()
    tight.arm(place, others)
    tight.notice(doomed, 60)
    tight.daemon.wait_for(
        lambda: not all((tight.points / f"{name}.0").exists() for name in others) or tight.is_moved(doomed),
        "died or moved",
        120,
    )
    for name in others:
        (tight.points / f"{name}.0").unlink(missing_ok=True)
    tight.daemon.wait_for(lambda: tight.daemon.status()["state"] in ("serving", "draining", "degraded"), "calm", 120)
    tight.kill(doomed)
    tight.fill_up()
    tight.check(streams)


CROWDS = 6


def test_tight_evictions_while_moving(crowded: Scene) -> None:
    """Tests that streams that evict one another for want of blocks stay exact through a notice and a kill."""
    for _ in range(CROWDS):
        streams = [stream for _ in range(4) for stream in crowded.streams()]
        crowded.daemon.wait_for(
            lambda crowd=streams: crowded.count("request_evicted") > 0 or all(one.done.is_set() for one in crowd),
            "evicted or done",
            240,
        )
        if crowded.count("request_evicted"):
            break  # On a machine that starts its clients slowly a crowd may be over before it is one.
    assert crowded.count("request_evicted"), f"nobody was evicted in {CROWDS} crowds"
    crowded.notice(crowded.serving()[0], 2.0)
    assert crowded.expected * 4 == [stream.wait(240) for stream in streams]
    crowded.fill_up()
    crowded.settle()


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory, daemon_environment: dict[str, str]) -> Iterator[Scene]:
    """Two replicas, instances of two GPUs each."""
    args = ("--instances", "3", "--gpus-per-instance", "2", "--gpu-memory", "24MiB", "-dp", "2", "-pp", "2", "-tp", "1")
    with playing(tmp_path_factory.mktemp("pairs"), *args, env=daemon_environment) as scene:
        yield scene


def test_one_process_of_an_instance_dies(pairs: Scene) -> None:
    """Tests that an instance that lost one of its GPU processes is taken as a whole, and nothing of it stays."""
    streams = pairs.decoding()
    name = pairs.serving()[0]
    group = pairs.groups()[name]
    os.kill(max(members_of(group)), signal.SIGKILL)
    pairs.check(streams)
    pairs.daemon.wait_for(lambda: not members_of(group), "rid of the other process")
    pairs.daemon.wait_for(lambda: name not in pairs.living(), "told of the loss")


@pytest.mark.parametrize("grace_s", [None, 0.3, 20.0])
def test_one_of_two_replicas(pairs: Scene, grace_s: float | None) -> None:
    """Tests that streams of a lost or noticed replica go on while those of the other never notice."""
    streams = pairs.decoding()
    name = pairs.serving()[0]
    if grace_s is None:
        pairs.kill(name)
    else:
        pairs.notice(name, grace_s)
    assert pairs.expected == [stream.wait() for stream in streams]
    if name in pairs.living():
        pairs.kill(name)
    pairs.check(streams)


def test_load_changes(pairs: Scene) -> None:
    """Tests that a burst of requests, and the plan that answers it, leave every stream exact."""
    bursts = [pairs.streams() for _ in range(5)]
    pairs.kill(pairs.serving()[0])
    for streams in bursts:
        assert pairs.expected == [stream.wait(240) for stream in streams]
    pairs.fill_up()
    pairs.settle()
