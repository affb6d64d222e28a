"""Capacity as a trace says, with real SIGKILLs; and the baseline policies under the same disturbances."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.daemon import SPOTSERVE
from tests.e2e.scene import Scene, clear, playing

pytestmark = pytest.mark.e2e

ROOMY = ("--gpu-memory", "24MiB", "-dp", "1", "-pp", "2", "-tp", "1")


def write_ours(folder: Path, *events: dict[str, Any]) -> Path:
    """A trace in our format."""
    path = folder / "trace.json"
    path.write_text(json.dumps({"format_version": "0.1", "events": events}))
    return path


def write_paper(folder: Path, *lines: str) -> Path:
    """A trace in the paper's format."""
    path = folder / "trace.txt"
    path.write_text("\n".join(lines) + "\n")
    return path


def play_through(scene: Scene) -> None:
    """Keep streams running until the trace is over; every one of them has its undisturbed tokens."""
    while "trace_ended" not in scene.daemon.log_path.read_text():
        assert scene.expected == [stream.wait() for stream in scene.streams()]


def taken(scene: Scene) -> list[str]:
    """Instances that are gone."""
    return [one["id"] for one in scene.daemon.status()["instances"] if one["state"] == "gone"]


def test_our_trace(tmp_path: Path, daemon_environment: dict[str, str]) -> None:
    """Tests that adds, notices, kills and loads happen as written, each instance taken by SIGKILL."""
    trace = write_ours(
        tmp_path,
        {"at_s": 9, "kind": "notice", "instances": ["i0"], "grace_s": 2},
        {"at_s": 11, "kind": "load", "rps": 3.0},
        {"at_s": 12, "kind": "add", "count": 1},
        {"at_s": 14, "kind": "kill", "count": 1},
        {"at_s": 16, "kind": "notice", "count": 2, "grace_s": 0.2},
        {"at_s": 17, "kind": "add", "count": 2},
    )
    with playing(tmp_path / "daemon", *ROOMY, "--trace", str(trace), env=daemon_environment) as scene:
        play_through(scene)
        scene.settle()
        assert ["i0", "i1", "i2", "i3"] == taken(scene)
        scene.daemon.wait_for(lambda: ["i4", "i5", "i6"] == scene.ready(), "all added ready", 60)
        scene.settle()


def test_paper_trace(tmp_path: Path, daemon_environment: dict[str, str]) -> None:
    """Tests that the paper's format brings and takes a whole fleet, every event acted on 30 s before its stamp."""
    trace = write_paper(
        tmp_path,
        "# the fleet comes from the trace",
        '[0, "add", {"nodes": ["n1", "n2", "n3"], "required_tpt": 0.5}]',
        '[36000, "other", {"nodes": [], "required_tpt": 1.5}]',
        '[38000, "remove", {"nodes": ["n1"]}]',
        '#[39000, "remove", {"nodes": ["n2", "n3"]}]',
        '[42000, "add", {"nodes": ["n4"]}]',
        '[45000, "DONE", {"nodes": []}]',
    )
    args = (*ROOMY, "--instances", "0", "--trace", str(trace))
    with playing(tmp_path / "daemon", *args, env=daemon_environment) as scene:
        play_through(scene)
        states = {one["id"]: one["state"] for one in scene.daemon.status()["instances"]}
        assert ("doomed", 4) == (states["i0"], len(states))
        scene.settle()
        assert "i0" not in scene.serving()
        scene.daemon.wait_for(lambda: ["i0"] == taken(scene), "n1 taken", 60)
        scene.settle()


@pytest.mark.slow
def test_published_trace(tmp_path: Path, shared_data: Path, daemon_environment: dict[str, str]) -> None:
    """Tests that a published trace, its times squeezed, takes and adds as many instances as it says."""
    text = (shared_data / "spotserve-paper" / "traces" / "availability" / "trace_0304_real.txt").read_text()
    events: list[dict[str, Any]] = []
    names = 0
    index: dict[str, str] = {}
    for line in text.splitlines():
        if not line.strip() or line.startswith("#"):
            continue
        time_ms, operation, details = json.loads(line)
        at_s = time_ms / 1000 / 60
        nodes = [str(node) for node in details.get("nodes", [])]
        if operation == "add" and nodes:
            index |= {node: f"i{names + offset}" for offset, node in enumerate(nodes)}
            names += len(nodes)
            events.append({"at_s": at_s, "kind": "add", "count": len(nodes)})
        if operation == "remove" and nodes:
            events.append({"at_s": at_s, "kind": "notice", "instances": [index[n] for n in nodes], "grace_s": 1.0})
    trace = write_ours(tmp_path, *events)
    args = ("--gpu-memory", "24MiB", "--instances", "0", "--trace", str(trace))
    with playing(tmp_path / "daemon", *args, env=daemon_environment) as scene:
        play_through(scene)
        num_taken = sum(len(event["instances"]) for event in events if event["kind"] == "notice")
        scene.daemon.wait_for(lambda: num_taken == len(taken(scene)), "all taken", 60)
        scene.settle()
        assert names == len(scene.daemon.status()["instances"])


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('[60000, "add", {"nodes": ["a"]}]\n[50000, "add", {"nodes": ["b"]}]\n', ":2: at 20 s is before"),
        ('[60000, "remove", {"nodes": ["a"]}]\n', ":1: takes 'a', which is not there"),
        ('{"format_version": "0.1", "events": [{"at_s": 1, "kind": "kill", "count": 5}]}', "takes 5 instances of 4"),
    ],
    ids=["unsorted", "removes-unknown", "too-many"],
)
def test_impossible_trace(tmp_path: Path, text: str, says: str) -> None:
    """Tests that a trace that cannot happen is refused at the start with exit code 2 and its line."""
    trace = tmp_path / "trace.txt"
    trace.write_text(text)
    command = [SPOTSERVE, "run", "--trace", str(trace), "--state-dir", str(tmp_path / "state"), "--port", "0"]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60)
    assert 2 == done.returncode, done.stderr
    assert says in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("policy", ["reroute", "reparallelize"])
def test_baselines_lose_nothing(tmp_path: Path, policy: str, daemon_environment: dict[str, str]) -> None:
    """Tests that the baseline policies bring every stream through a notice and a kill, token for token."""
    scene = Scene(tmp_path / "daemon", *ROOMY, "--policy", policy, env=daemon_environment)
    try:
        scene.start()
        streams = scene.decoding()
        leader = scene.serving()[0]
        scene.notice(leader, 4)
        assert scene.expected == [stream.wait() for stream in streams]
        scene.daemon.wait_for(lambda: leader in taken(scene), "taken", 60)
        scene.check(streams)
        streams = scene.decoding()
        scene.kill(scene.serving()[1])
        scene.check(streams)
        streams = scene.decoding()
        scene.notice(scene.serving()[0], 0)
        scene.check(streams)
        scene.stop()
    finally:
        clear(scene)
