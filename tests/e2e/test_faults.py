"""Faults of real processes: whatever dies, stops or is taken, every stream has exactly its undisturbed tokens."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator

import httpx2 as httpx
import pytest

from tests.e2e.scene import PROMPTS, Scene, playing

pytestmark = pytest.mark.e2e

LINK_BYTES_PER_S = 2_000_000
"""So slow that the weights of one stage take about two seconds: a migration can be met on its way."""


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory, daemon_environment: dict[str, str]) -> Iterator[Scene]:
    """One replica of two stages, three spare instances, slow links."""
    env = {**daemon_environment, "SPOTSERVE_LINK_BYTES_PER_S": str(LINK_BYTES_PER_S)}
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


@pytest.mark.parametrize("grace_s", [0.0, 0.05, 0.5, 3.0])
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
    assert not {first, last} & set(scene.serving())
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
        "reserve:after",
        "copy_weights:before",
        "copy_weights:after",
        "copy_kv:before",
        "copy_kv:after",
        "copy_kv_delta:before",
        "copy_kv_delta:after",
        "join_group:before",
        "join_group:after",
        "activate:before",
        "activate:after",
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


@pytest.mark.parametrize("place", ["grant:before", "grant:after", "quiesce:before", "quiesce:after", "release:before"])
def test_source_and_leader_lost_at(scene: Scene, place: str) -> None:
    """Tests that the noticed leader, the source of all copies, may die at any step it takes part in."""
    streams = scene.decoding()
    leader = scene.serving()[0]
    scene.arm(place, [leader])
    scene.notice(leader, 60)
    scene.wait_fired([leader])
    scene.check(streams)


@pytest.mark.parametrize("place", ["join_group:after", "copy_kv:before", "activate:before", "release:after"])
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
