"""A daemon to be disturbed: its undisturbed tokens, what is armed to die in it, and what must hold afterwards."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2 as httpx
import psutil
import pytest

from spotserve.core.controller import Entry
from spotserve.store.journal import EntryJournal, Journal
from tests.e2e.daemon import RunningDaemon, Stream

PROMPTS = ("The for statement", "A dictionary is", "class Example:", "To import a module")
LAUNCHED = re.compile(r"instance_launched .*instance=(i\d+) process_group=(\d+)")
PATIENCE_S = 120.0

PACED = {"SPOTSERVE_LINK_BYTES_PER_S": "4000000", "SPOTSERVE_ITERATION_S": "0.006"}
"""Links so slow that the weights of one stage take about a second, so that a migration can be met on its way, and an
iteration of a length that every machine keeps, so that the streams outlast such a migration."""


class Scene:
    """One daemon, four streams whose undisturbed tokens are known, and its failpoints.

    Args:
        folder: where the state dir and the failpoints lie.
        args: of `spotserve run`.
        env: of the daemon.
        max_tokens: of every stream.
    """

    def __init__(self, folder: Path, *args: str, env: dict[str, str], max_tokens: int = 250) -> None:
        self.points = folder / "failpoints"
        self.points.mkdir(parents=True)
        self.daemon = RunningDaemon(folder / "state", *args, env={**env, "SPOTSERVE_FAILPOINTS": str(self.points)})
        self.max_tokens = max_tokens
        self.expected: list[list[int]] = []
        self.num_accepted = 0
        self.num_living = 0

    def start(self) -> Scene:
        """Bring it up and take down what nobody disturbed."""
        self.daemon.start()
        self.num_living = len(self.living())
        self.expected = [stream.wait(PATIENCE_S) for stream in self.streams()]
        assert all(len(set(tokens)) >= 50 for tokens in self.expected), "too tame to show a wrong token"
        return self

    def streams(self, **fields: Any) -> list[Stream]:
        """The four streams: three greedy ones and one that is sampled."""
        self.num_accepted += len(PROMPTS)
        drawn: list[dict[str, Any]] = [{}, {}, {}, {"temperature": 0.9, "seed": 11}]
        return [
            self.daemon.stream(prompt, max_tokens=self.max_tokens, **{**own, **fields})
            for prompt, own in zip(PROMPTS, drawn, strict=True)
        ]

    def decoding(self, num_tokens: int = 12) -> list[Stream]:
        """The four streams, each past its first tokens."""
        streams = self.streams()
        for stream in streams:
            stream.wait_tokens(num_tokens, PATIENCE_S)
        return streams

    # Who is who

    def living(self) -> list[str]:
        """Instances that are not gone."""
        return [one["id"] for one in self.daemon.status()["instances"] if one["state"] != "gone"]

    def ready(self) -> list[str]:
        """Instances that are neither joining nor doomed."""
        return [one["id"] for one in self.daemon.status()["instances"] if one["state"] == "ready"]

    def serving(self) -> list[str]:
        """Instances of the first replica, its leader's first."""
        stages = self.daemon.status()["replicas"][0]["stages"]
        return [gpu.split("/")[0] for stage in stages for gpu in stage["gpus"]]

    def spares(self) -> list[str]:
        """Instances that wait."""
        used = set(self.serving())
        return [name for name in self.ready() if name not in used]

    def groups(self) -> dict[str, int]:
        """The process group of every instance that was ever launched."""
        text = self.daemon.log_path.read_text(errors="replace")
        return {name: int(group) for name, group in LAUNCHED.findall(text)}

    # Disturbances

    def notice(self, instance: str, grace_s: float) -> None:
        """A preemption notice."""
        self.daemon.admin("notice", instance=instance, grace_s=grace_s)

    def kill(self, instance: str) -> None:
        """SIGKILL without notice."""
        self.daemon.admin("kill", instance=instance)

    def arm(self, place: str, instances: Sequence[str]) -> None:
        """The first of these instances that reaches the place dies there."""
        for name in instances:
            draft = self.points / f"{name}.draft"
            draft.write_text(place)
            draft.rename(self.points / f"{name}.0")

    def arm_coordinator(self, place: str) -> None:
        """The coordinator dies at the place."""
        draft = self.points / "coordinator.draft"
        draft.write_text(place)
        draft.rename(self.points / "coordinator")

    def wait_fired(self, instances: Sequence[str]) -> None:
        """Until one of the armed instances died; the others are disarmed."""
        files = [self.points / f"{name}.0" for name in instances]
        self.daemon.wait_for(lambda: not all(file.exists() for file in files), "a failpoint reached", PATIENCE_S)
        for file in files:
            file.unlink(missing_ok=True)

    def wait_copying(self) -> None:
        """Until a migration is under way."""
        self.daemon.wait_for(lambda: self.migrating(), "migrating", PATIENCE_S)

    def migrating(self) -> bool:
        """Whether a plan runs."""
        lines = self.daemon.status()["migrations"]
        return bool(lines) and lines[-1]["outcome"] is None

    def is_moved(self, instance: str) -> bool:
        """Whether no plan runs and no replica is on the instance."""
        replicas = self.daemon.status()["replicas"]
        used = {gpu.split("/")[0] for one in replicas for stage in one["stages"] for gpu in stage["gpus"]}
        return not self.migrating() and instance not in used

    def fill_up(self) -> None:
        """Bring the number of instances back to what it was at the start."""
        for _ in range(self.num_living - len(self.living())):
            self.daemon.admin("add-instance")
        self.daemon.wait_for(lambda: len(self.ready()) == self.num_living, "all instances ready", PATIENCE_S)

    # What must hold

    def check(self, streams: Sequence[Stream]) -> None:
        """Every stream is exact and nothing accepted is open or uncounted; then the lost instances are replaced."""
        assert self.expected == [stream.wait(PATIENCE_S) for stream in streams]
        assert ["length"] * len(streams) == [stream.finish_reason for stream in streams]
        for stream in streams:
            self.check_rows(stream.request)
        self.settle()
        self.fill_up()
        self.settle()

    def check_rows(self, request: str, num_tokens: int | None = None) -> None:
        """The ledger holds each position once, in order."""
        position = 0
        for _, first, count, _, _ in self.daemon.ledger_rows(request):
            assert first == position
            position += count
        assert (self.max_tokens if num_tokens is None else num_tokens) == position

    def settle(self) -> None:
        """Calm again: serving, no run under way, every accepted request ended and counted once."""
        self.daemon.wait_for(self.is_calm, "calm", PATIENCE_S)
        counts = self.daemon.status()["requests"]
        assert (0, 0) == (counts["running"], counts["queued"])
        assert self.num_accepted == counts["finished"] + counts["failed"] + counts["cancelled"]

    def is_calm(self) -> bool:
        """Whether it serves, nothing runs and nothing is open."""
        status = self.daemon.status()
        is_open = status["requests"]["running"] + status["requests"]["queued"]
        return status["state"] == "serving" and not is_open and all(line["outcome"] for line in status["migrations"])

    def entries(self) -> list[Entry]:
        """The journal as it stands on disk."""
        journal = Journal.read_only(self.daemon.state_dir / "journal.db")
        try:
            return list(EntryJournal(journal).read(None))
        finally:
            journal.close()

    def count(self, kind: str) -> int:
        """How many events of a kind the journal has."""
        return sum(1 for entry in self.entries() if entry.event.kind == kind)

    def follow(self, request: str, after: int) -> list[tuple[int, int]]:
        """(position, token) of `GET /v1/requests/{id}?starting_after=N`, to its end."""
        url = f"{self.daemon.url}/v1/requests/{request}"
        found: list[tuple[int, int]] = []
        with httpx.stream("GET", url, params={"starting_after": after}, timeout=PATIENCE_S) as answer:
            assert answer.status_code == 200
            lines = [line.removeprefix("data: ") for line in answer.iter_lines() if line.startswith("data: ")]
        assert "[DONE]" == lines.pop()
        for line in lines:
            chunk = json.loads(line)["choices"][0]
            found += list(enumerate(chunk["token_ids"], chunk["position"]))
        return found

    def stop(self) -> None:
        """Stop the daemon; nothing of it may be left: no process, no listening socket."""
        groups = self.groups()
        worker_port = int((self.daemon.state_dir / "worker-port").read_text())
        assert 0 == self.daemon.stop(), self.daemon.log_tail()
        assert {} == {name: members for name, group in groups.items() if (members := members_of(group))}
        for port in (self.daemon.port, worker_port):
            with socket.socket() as probe:
                assert 0 != probe.connect_ex(("127.0.0.1", port)), f"port {port} still listens"


def members_of(group: int) -> list[int]:
    """Pids of a process group that still run."""
    members = []
    for process in psutil.process_iter(["status"]):
        try:
            if os.getpgid(process.pid) == group and process.info["status"] != psutil.STATUS_ZOMBIE:
                members.append(process.pid)
        except ProcessLookupError:
            continue
    return members


@contextmanager
def playing(folder: Path, *args: str, env: dict[str, str], **fields: Any) -> Iterator[Scene]:
    """A scene from start to stop; whatever happens none of its processes stays."""
    scene = Scene(folder, *args, env=env, **fields)
    try:
        yield scene.start()
        scene.stop()
    finally:
        clear(scene)


def clear(scene: Scene) -> None:
    """End what a failed test left."""
    process = scene.daemon.process
    if process is not None and process.poll() is None:
        process.kill()
        process.wait(10)
    if process is not None and process.stdout is not None:
        process.stdout.close()
    for group in scene.groups().values():
        if members_of(group):
            os.killpg(group, signal.SIGKILL)


def rarely(*values: object) -> list[Any]:
    """Cases of a parametrized test that only the long run plays."""
    return [pytest.param(value, marks=pytest.mark.slow) for value in values]


def until(condition: Callable[[], bool], what: str, timeout_s: float = PATIENCE_S) -> None:
    """Poll until it holds; no daemon is asked whether it lives."""
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, f"not {what} after {timeout_s} s"
        time.sleep(0.02)
