"""A real daemon with real worker processes, driven from outside as a person or a script would."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2 as httpx
import psutil

SPOTSERVE = str(Path(sys.executable).parent / "spotserve")
START_TIMEOUT_S = 240.0
CALM_TIMEOUT_S = 60.0
UNHURRIED = {"SPOTSERVE_ITERATION_S": "0.015"}
"""Iterations so long that streams of 200 tokens outlast a migration on a busy machine too."""


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@dataclass
class Stream:
    """One streamed completion in a thread: token ids as they come, when each came, and how it ended."""

    token_ids: list[int] = field(default_factory=list)
    by_choice: dict[int, list[int]] = field(default_factory=dict)
    times_s: list[float] = field(default_factory=list)
    request: str = ""
    finish_reason: str | None = None
    error: str | None = None
    keep_alives: int = 0
    done: threading.Event = field(default_factory=threading.Event)

    def wait(self, timeout_s: float = 120.0) -> list[int]:
        """The tokens once the stream has ended."""
        assert self.done.wait(timeout_s), f"stream {self.request} has {len(self.token_ids)} tokens after {timeout_s} s"
        assert self.error is None, self.error
        return self.token_ids

    def wait_tokens(self, count: int, timeout_s: float = 60.0) -> None:
        """Block until `count` tokens have come."""
        deadline_s = time.monotonic() + timeout_s
        while len(self.token_ids) < count and not self.done.is_set():
            assert time.monotonic() < deadline_s, f"{len(self.token_ids)} of {count} tokens after {timeout_s} s"
            time.sleep(0.005)

    @property
    def longest_stall_s(self) -> float:
        """The longest gap between two arrivals."""
        return max((b - a for a, b in zip(self.times_s, self.times_s[1:], strict=False)), default=0.0)


class RunningDaemon:
    """`spotserve run` as a process; its state dir outlives a restart."""

    def __init__(self, state_dir: Path, *args: str, env: dict[str, str] | None = None) -> None:
        self.state_dir = state_dir
        self.args = args
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.env = {**os.environ, "OMP_NUM_THREADS": "1", "NO_COLOR": "1", **(env or {})}
        self.process: subprocess.Popen[bytes] | None = None
        self.log_path = state_dir.parent / f"{state_dir.name}.stderr"

    def start(self, *, wait: bool = True) -> RunningDaemon:
        """Start the process; with `wait` return once it has said `ready`."""
        if self.process is not None and self.process.stdout is not None:
            self.process.stdout.close()
        command = [SPOTSERVE, "run", "--port", str(self.port), "--state-dir", str(self.state_dir)]
        command += ["--orphan-timeout", "20", *self.args]
        with self.log_path.open("ab") as log:
            self.process = subprocess.Popen(
                command, env=self.env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log
            )
        if wait:
            self.wait_ready()
        return self

    def wait_ready(self) -> None:
        """Until `/health` answers 200."""
        self.wait_for(lambda: self._health() == 200, "ready", timeout_s=START_TIMEOUT_S)

    def _health(self) -> int:
        try:
            return httpx.get(f"{self.url}/health", timeout=5.0).status_code
        except httpx.TransportError:
            return 0

    def wait_for(self, condition: Any, what: str, timeout_s: float = CALM_TIMEOUT_S) -> None:
        """Poll until `condition()` holds."""
        deadline_s = time.monotonic() + timeout_s
        while not condition():
            assert self.process is not None
            code = self.process.poll()
            assert code is None, f"daemon ended with {code} while waiting for {what}:\n{self.log_tail()}"
            assert time.monotonic() < deadline_s, f"not {what} after {timeout_s} s: {self.status()}\n{self.log_tail()}"
            time.sleep(0.02)

    def log_tail(self, lines: int = 40) -> str:
        """The end of the daemon's stderr."""
        return "\n".join(self.log_path.read_text(errors="replace").splitlines()[-lines:])

    def cli(self, *args: str, timeout_s: float = 60.0) -> subprocess.CompletedProcess[str]:
        """A CLI verb against this daemon."""
        return subprocess.run(
            [SPOTSERVE, *args],
            env={**self.env, "SPOTSERVE_URL": self.url},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout_s,
        )

    def admin(self, verb: str, **body: Any) -> dict[str, Any]:
        """An admin call without the price of a CLI process."""
        answer = httpx.post(f"{self.url}/admin/{verb}", json=body, timeout=60.0)
        assert answer.status_code < 300, answer.text
        return dict(answer.json())

    def status(self) -> dict[str, Any]:
        """The JSON of `spotserve status`."""
        return dict(httpx.get(f"{self.url}/admin/status", timeout=10.0).json())

    def wait_state(self, state: str, timeout_s: float = CALM_TIMEOUT_S) -> None:
        """Until the SERVICE state is `state`."""
        self.wait_for(lambda: self.status()["state"] == state, state, timeout_s)

    def model(self) -> str:
        """The served model's name."""
        return str(httpx.get(f"{self.url}/v1/models", timeout=10.0).json()["data"][0]["id"])

    def stream(self, prompt: str | Sequence[int], *, max_tokens: int, **fields: Any) -> Stream:
        """Stream one completion in a thread. Greedy and `ignore_eos` unless told otherwise."""
        body = {
            "model": self.model(),
            "prompt": prompt if isinstance(prompt, str) else list(prompt),
            "max_tokens": max_tokens,
            "stream": True,
            "temperature": 0,
            "ignore_eos": True,
            "return_token_ids": True,
            **fields,
        }
        stream = Stream()
        threading.Thread(target=_follow, args=(f"{self.url}/v1/completions", body, stream), daemon=True).start()
        return stream

    def fetch(self, request: str) -> dict[str, Any]:
        """`GET /v1/requests/{id}`."""
        return dict(httpx.get(f"{self.url}/v1/requests/{request}", timeout=10.0).json())

    def kill9(self) -> None:
        """SIGKILL the coordinator alone; workers live on."""
        assert self.process is not None
        self.process.send_signal(signal.SIGKILL)
        self.process.wait(10)

    def stop(self, timeout_s: float = 45.0) -> int:
        """SIGTERM, as a service manager would; the exit code."""
        assert self.process is not None
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        code = self.process.wait(timeout_s)
        if self.process.stdout is not None:
            self.process.stdout.close()
        return code

    def ledger_rows(self, request: str) -> list[Any]:
        """The ledger's rows of a request, with the generation that made each; the daemon may run."""
        import apsw

        connection = apsw.Connection(str(self.state_dir / "ledger.db"), flags=apsw.SQLITE_OPEN_READONLY)
        query = (
            "SELECT runs.choice, runs.position, length(runs.token_ids) / 4, runs.replica, runs.generation"
            " FROM runs JOIN requests USING (number) WHERE requests.request = ? ORDER BY 1, 2"
        )
        try:
            return list(connection.execute(query, (request,)))
        finally:
            connection.close()


def _follow(url: str, body: dict[str, Any], stream: Stream) -> None:
    try:
        with httpx.stream("POST", url, json=body, timeout=httpx.Timeout(180.0)) as answer:
            stream.request = answer.headers.get("x-request-id", "")
            if answer.status_code != 200:
                answer.read()
                stream.error = f"{answer.status_code}: {answer.text}"
                return
            for line in answer.iter_lines():
                _take_line(line, stream)
    except httpx.HTTPError as error:
        stream.error = f"{type(error).__name__}: {error}"
    finally:
        stream.done.set()


def _take_line(line: str, stream: Stream) -> None:
    if line.startswith(":"):
        stream.keep_alives += 1
    if not line.startswith("data: ") or line == "data: [DONE]":
        return
    chunk = json.loads(line.removeprefix("data: "))
    if "error" in chunk:
        stream.error = str(chunk["error"])
        return
    for choice in chunk["choices"]:
        ids = choice.get("token_ids") or []
        stream.token_ids += ids
        stream.by_choice.setdefault(choice["index"], []).extend(ids)
        stream.times_s += [time.monotonic()] * len(ids)
        stream.finish_reason = choice.get("finish_reason") or stream.finish_reason


@contextmanager
def running(state_dir: Path, *args: str, env: dict[str, str] | None = None) -> Iterator[RunningDaemon]:
    """A daemon for a test; at the end it is stopped and nothing of it may be left."""
    daemon = RunningDaemon(state_dir, *args, env=env)
    try:
        daemon.start()  # In here: one that never gets ready must not outlive the test either.
        yield daemon
    finally:
        before = _children(daemon)
        code = daemon.stop()
        psutil.wait_procs(before, timeout=5)
    assert code == 0, daemon.log_tail()


def _children(daemon: RunningDaemon) -> list[psutil.Process]:
    process = daemon.process
    if process is None or process.poll() is not None:
        return []
    return psutil.Process(process.pid).children(recursive=True)
