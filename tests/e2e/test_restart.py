"""The coordinator dies by SIGKILL and comes back: workers are adopted, requests run to their end, nothing is lost."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator

import pytest

from spotserve.core.controller import Entry
from tests.e2e.daemon import Stream
from tests.e2e.scene import PACED, Scene, clear, members_of, playing, rarely, until

pytestmark = pytest.mark.e2e

ROOMY = ("--instances", "4", "--gpu-memory", "24MiB", "-dp", "1", "-pp", "2", "-tp", "1")
ROOMY += ("--orphan-timeout", "60")


@pytest.fixture(scope="module")
def lasting(tmp_path_factory: pytest.TempPathFactory, daemon_environment: dict[str, str]) -> Iterator[Scene]:
    """One replica of two stages, two spare instances, slow links."""
    env = {**daemon_environment, **PACED}
    with playing(tmp_path_factory.mktemp("restart"), *ROOMY, env=env, max_tokens=400) as scene:
        yield scene


@pytest.fixture
def scene(lasting: Scene) -> Scene:
    """The scene with a living coordinator, whatever an earlier test left."""
    if lasting.daemon.process is None or lasting.daemon.process.poll() is not None:
        lasting.daemon.start()
    return lasting


def check_fetched(scene: Scene, streams: list[Stream]) -> None:
    """What the cut streams lack is there, once and exact; then the scene is calm."""
    for stream, expected in zip(streams, scene.expected, strict=True):
        num_seen = len(stream.token_ids)
        assert expected[:num_seen] == stream.token_ids
        rest = scene.follow(stream.request, num_seen - 1)
        assert list(range(num_seen, scene.max_tokens)) == [position for position, _ in rest]
        assert expected == stream.token_ids + [token for _, token in rest]
        scene.daemon.wait_for(lambda name=stream.request: "finished" == scene.daemon.fetch(name)["state"], "finished")
        fetched = scene.daemon.fetch(stream.request)
        assert ("finished", [expected]) == (fetched["state"], [c["token_ids"] for c in fetched["choices"]])
        scene.check_rows(stream.request)
    scene.settle()


def wait_cut(streams: list[Stream]) -> None:
    """Until the clients have noticed."""
    assert all(stream.done.wait(60) for stream in streams)
    assert not all(stream.finish_reason for stream in streams)


def living_groups(scene: Scene) -> dict[str, int]:
    """Process groups of living instances."""
    return {name: group for name, group in scene.groups().items() if members_of(group)}


@pytest.mark.parametrize("absence_s", [3.0, *rarely(0.0)])
def test_killed_while_decoding(scene: Scene, absence_s: float) -> None:
    """Tests that a new coordinator adopts the workers by incarnation, KV included, however long they decode alone."""
    streams = scene.decoding()
    before = living_groups(scene)
    scene.daemon.kill9()
    wait_cut(streams)
    time.sleep(absence_s)
    scene.daemon.start()
    check_fetched(scene, streams)
    assert before == living_groups(scene)
    restarted = next(entry for entry in scene.entries()[::-1] if entry.event.kind == "coordinator_restarted")
    later = [entry.event.kind for entry in scene.entries() if entry.sequence > restarted.sequence]
    assert not {"replica_broke", "instance_lost"} & set(later)
    streams = scene.decoding()
    scene.check(streams)


@pytest.mark.parametrize(
    "place",
    [
        "copy_kv_delta:before",
        "commit_run:before",
        "activate:before",
        *rarely("copy_weights:before", "quiesce:before", "make_durable:before", "release:before", "finish_run:before"),
    ],
)
def test_killed_during_a_migration(scene: Scene, place: str) -> None:
    """Tests that a coordinator may die before or after the commit of a plan: it is aborted, or carried to its end."""
    streams = scene.decoding()
    leader = scene.serving()[0]
    scene.arm_coordinator(place)
    scene.notice(leader, 60)
    assert scene.daemon.process is not None
    assert -signal.SIGKILL == scene.daemon.process.wait(60)
    wait_cut(streams)
    scene.daemon.start()
    check_fetched(scene, streams)
    scene.daemon.wait_for(lambda: leader not in scene.serving(), "moved away", 60)
    assert "completed" == scene.daemon.status()["migrations"][-1]["outcome"]
    scene.kill(leader)
    scene.fill_up()
    scene.settle()


def test_killed_while_copying(scene: Scene) -> None:
    """Tests that a coordinator killed in mid-copy leaves the old replica serving, and plans again."""
    streams = scene.decoding()
    leader = scene.serving()[0]
    scene.notice(leader, 60)
    scene.wait_copying()
    time.sleep(0.3)
    scene.daemon.kill9()
    wait_cut(streams)
    scene.daemon.start()
    check_fetched(scene, streams)
    scene.daemon.wait_for(lambda: leader not in scene.serving(), "moved away", 60)
    scene.kill(leader)
    scene.fill_up()
    scene.settle()


def test_a_worker_lost_while_the_coordinator_is_gone(scene: Scene) -> None:
    """Tests that a stage that died meanwhile is found absent, replaced, and its requests recomputed."""
    streams = scene.decoding()
    group = scene.groups()[scene.serving()[1]]
    scene.daemon.kill9()
    wait_cut(streams)
    os.killpg(group, signal.SIGKILL)
    scene.daemon.start()
    check_fetched(scene, streams)
    scene.fill_up()


def test_all_workers_lost_while_the_coordinator_is_gone(scene: Scene) -> None:
    """Tests that with every process gone the restart starts new instances and the ledger brings all requests back."""
    streams = scene.decoding()
    groups = living_groups(scene)
    scene.daemon.kill9()
    wait_cut(streams)
    for group in groups.values():
        os.killpg(group, signal.SIGKILL)
    scene.daemon.start()
    check_fetched(scene, streams)
    assert not set(groups) & set(scene.living())
    scene.daemon.wait_for(lambda: len(scene.ready()) == scene.num_living, "all instances ready", 60)


def test_notice_falls_due_while_the_coordinator_is_gone(scene: Scene) -> None:
    """Tests that a deadline goes on while no coordinator lives: the instance is taken at once, nothing is lost."""
    streams = scene.decoding()
    leader = scene.serving()[0]
    group = scene.groups()[leader]
    scene.arm_coordinator("copy_weights:before")
    scene.notice(leader, 3.0)
    assert scene.daemon.process is not None
    assert -signal.SIGKILL == scene.daemon.process.wait(60)
    wait_cut(streams)
    assert members_of(group)
    time.sleep(3.0)
    scene.daemon.start()
    scene.daemon.wait_for(lambda: leader not in scene.living(), "taken", 60)
    *_, noticed, restarted = (entry.event for entry in scene.entries() if is_notice_or_restart(entry, leader))
    assert ("notice_received", "coordinator_restarted") == (noticed.kind, restarted.kind)
    assert noticed.at_s + 3.0 <= restarted.at_s
    check_fetched(scene, streams)
    scene.fill_up()
    scene.settle()


def is_notice_or_restart(entry: Entry, instance: str) -> bool:
    """The notice of an instance, or any restart."""
    if entry.event.kind == "notice_received":
        return bool(entry.event.instance == instance)
    return entry.event.kind == "coordinator_restarted"


@pytest.mark.slow
def test_killed_twice(scene: Scene) -> None:
    """Tests that a second coordinator may die while it adopts, too."""
    streams = scene.decoding()
    scene.daemon.kill9()
    scene.daemon.start(wait=False)
    time.sleep(2.0)
    scene.daemon.kill9()
    wait_cut(streams)
    scene.daemon.start()
    check_fetched(scene, streams)


def test_drain_finishes_open_streams(scene: Scene) -> None:
    """Tests that a stop lets open streams finish and refuses new ones; a start after it begins a new journal."""
    streams = scene.decoding()
    assert scene.daemon.process is not None
    scene.daemon.process.send_signal(signal.SIGTERM)
    assert scene.expected == [stream.wait() for stream in streams]
    scene.stop()
    scene.daemon.start()
    assert ["i0", "i1", "i2", "i3"] == scene.living()
    assert 1 == len(list(scene.daemon.state_dir.glob("journal-*.db")))
    scene.num_accepted = 0
    scene.check(scene.decoding())


def test_second_signal_stops_now(scene: Scene) -> None:
    """Tests that a second signal leaves requests open, and the next start carries them to their end."""
    streams = scene.decoding()
    assert scene.daemon.process is not None
    scene.daemon.process.send_signal(signal.SIGTERM)
    until(lambda: scene.daemon.status()["state"] == "stopping", "stopping")
    scene.daemon.process.send_signal(signal.SIGINT)
    scene.stop()
    wait_cut(streams)
    scene.daemon.start()
    check_fetched(scene, streams)


def test_drain_time_over(tmp_path_factory: pytest.TempPathFactory, daemon_environment: dict[str, str]) -> None:
    """Tests that what is open at the end of --drain goes on at the next start."""
    folder = tmp_path_factory.mktemp("drain")
    with playing(folder, *ROOMY, "--drain", "0.2", env=daemon_environment, max_tokens=400) as scene:
        streams = scene.decoding()
        scene.stop()
        wait_cut(streams)
        scene.daemon.start()
        check_fetched(scene, streams)


@pytest.mark.slow
def test_orphans_leave(tmp_path_factory: pytest.TempPathFactory, daemon_environment: dict[str, str]) -> None:
    """Tests that workers whose coordinator stays away exit by themselves; a later start recomputes from the ledger."""
    args = (*ROOMY, "--orphan-timeout", "1")
    scene = Scene(tmp_path_factory.mktemp("orphans"), *args, env=daemon_environment, max_tokens=400)
    try:
        scene.start()
        streams = scene.decoding()
        groups = living_groups(scene)
        scene.daemon.kill9()
        wait_cut(streams)
        until(lambda: not any(members_of(group) for group in groups.values()), "orphans gone")
        scene.daemon.start()
        check_fetched(scene, streams)
        scene.stop()
    finally:
        clear(scene)
