"""The command line against a daemon made of paper: what is asked, what is printed where, and every exit code."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import queue
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import structlog

from spotserve import __version__
from spotserve.api.fake import FakeAdministration, FakeFrontdoor
from spotserve.api.server import bind, build_app, serve
from spotserve.api.validation import ModelInfo
from spotserve.cli import admin_commands
from spotserve.cli.client import daemon_url
from spotserve.cli.main import run_verb
from spotserve.log import configure_logging

PLANS = Path(__file__).resolve().parents[2] / "plans"

STATUS = {
    "format_version": "0.1",
    "state": "serving",
    "epoch": 2,
    "parallel": {"data": 1, "pipeline": 2, "tensor": 1},
    "replicas": [
        {
            "id": "r2",
            "generation": 2,
            "tensor": 1,
            "stages": [{"gpus": ["i1/0"], "layers": [0, 4]}, {"gpus": ["i3/0"], "layers": [4, 8]}],
        }
    ],
    "instances": [
        {"id": "i0", "state": "gone", "gpus": ["i0/0"], "market": "spot"},
        {"id": "i1", "state": "ready", "gpus": ["i1/0"], "market": "spot"},
    ],
    "requests": {"running": 1, "queued": 0, "finished": 5, "failed": 0, "cancelled": 0},
    "migrations": [
        {
            "epoch": 2,
            "trigger": "notice",
            "mode": "live",
            "outcome": "completed",
            "estimated_s": 0.25,
            "stall_ms_max": 31.4,
            "weight_bytes": 3145728,
            "kv_bytes": 2048,
            "recomputed_tokens": 0,
        }
    ],
}
STATUS_TABLE = """\
serving  epoch 2  1x2x1 (DxPxM)

requests  running 1  queued 0  finished 5  failed 0  cancelled 0

INSTANCE  STATE  MARKET  GPUS
i0        gone   spot    i0/0
i1        ready  spot    i1/0

REPLICA  GENERATION  STAGE  LAYERS  GPUS
r2       2           0      0:4     i1/0
r2       2           1      4:8     i3/0

EPOCH  TRIGGER  MODE  OUTCOME    ESTIMATED  STALL  WEIGHTS  KV       RECOMPUTED
2      notice   live  completed  0.25 s     31 ms  3.0 MiB  2.0 KiB  0 tokens
"""


@dataclass
class PaperDaemon:
    """Answers every call from a table and remembers what was asked."""

    url: str = ""
    answers: dict[tuple[str, str], tuple[int, Any]] = field(default_factory=dict)
    calls: list[tuple[str, str, Any]] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)


@pytest.fixture
def daemon(monkeypatch: pytest.MonkeyPatch) -> Iterator[PaperDaemon]:
    """A daemon that `SPOTSERVE_URL` names."""
    paper = PaperDaemon()

    class Handler(BaseHTTPRequestHandler):
        def answer(self) -> None:
            length = int(self.headers.get("Content-Length", 0))
            body = json.loads(self.rfile.read(length)) if length else None
            paper.calls.append((self.command, self.path, body))
            paper.keys.append(self.headers.get("Authorization"))
            status, answer = paper.answers.get((self.command, self.path), (200, {}))
            payload = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(payload)))
            self.end_headers()
            self.wfile.write(payload)

        do_GET = do_POST = answer  # noqa: N815

        def log_message(self, *arguments: object) -> None:
            """Nothing on stderr: the tests read it."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    paper.url = f"http://127.0.0.1:{server.server_address[1]}"
    monkeypatch.setenv("SPOTSERVE_URL", paper.url)
    monkeypatch.delenv("SPOTSERVE_API_KEY", raising=False)
    try:
        yield paper
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


Capture = pytest.CaptureFixture[str]


def error(message: str, code: str, exit_code: int, hint: str | None = None) -> dict[str, Any]:
    return {"error": {"message": message, "hint": hint, "code": code, "exit_code": exit_code}}


def test_status_table(daemon: PaperDaemon, capsys: Capture) -> None:
    """Tests that the table shows what the JSON says, on stdout, with nothing on stderr."""
    daemon.answers["GET", "/admin/status"] = (200, STATUS)
    assert 0 == run_verb(["status"])
    assert (STATUS_TABLE, "") == tuple(capsys.readouterr())


@pytest.mark.parametrize("flags", [["--json"], ["--format", "json"]])
def test_status_json(daemon: PaperDaemon, capsys: Capture, flags: list[str]) -> None:
    """Tests that --json and --format json print the daemon's own answer."""
    daemon.answers["GET", "/admin/status"] = (200, STATUS)
    assert 0 == run_verb(["status", *flags])
    assert STATUS == json.loads(capsys.readouterr().out)


def test_status_of_a_mixed_fleet(daemon: PaperDaemon, capsys: Capture) -> None:
    """Tests that the table names the types of GPUs where the daemon tells them."""
    gone, ready = STATUS["instances"]  # type: ignore[misc]
    answer = {**STATUS, "instances": [{**gone, "gpu_types": []}, {**ready, "gpu_types": ["a10", "a10"]}]}
    daemon.answers["GET", "/admin/status"] = (200, answer)
    assert 0 == run_verb(["status"])
    out = capsys.readouterr().out
    assert "INSTANCE  STATE  MARKET  GPUS  TYPE\ni0        gone   spot    i0/0  -\n" in out
    assert "i1        ready  spot    i1/0  a10\n" in out


def test_status_of_an_empty_daemon(daemon: PaperDaemon, capsys: Capture) -> None:
    """Tests that nothing placed and a plan still running read well."""
    running = {**STATUS["migrations"][0], "outcome": None, "estimated_s": None, "stall_ms_max": None}  # type: ignore[index]
    answer = {**STATUS, "parallel": None, "replicas": [], "instances": [], "migrations": [running]}
    daemon.answers["GET", "/admin/status"] = (200, answer)
    assert 0 == run_verb(["status"])
    out = capsys.readouterr().out
    assert "REPLICA" not in out
    assert "2      notice   live  running  -          -      3.0 MiB" in out


@pytest.mark.parametrize(
    ("arguments", "call"),
    [
        (["notice", "i2"], ("POST", "/admin/notice", {"instance": "i2", "grace_s": 30.0})),
        (["notice", "i2", "--grace", "0"], ("POST", "/admin/notice", {"instance": "i2", "grace_s": 0.0})),
        (["kill", "i2"], ("POST", "/admin/kill", {"instance": "i2"})),
        (["stop"], ("POST", "/admin/stop", {})),
    ],
)
def test_silent_verbs(
    daemon: PaperDaemon, capsys: Capture, arguments: list[str], call: tuple[str, str, object]
) -> None:
    """Tests that a verb without data asks exactly one thing, prints nothing and exits 0."""
    assert 0 == run_verb(arguments)
    assert [call] == daemon.calls
    assert ("", "") == tuple(capsys.readouterr())


def test_add_instance_prints_the_id(daemon: PaperDaemon, capsys: Capture) -> None:
    """Tests that the new id alone is on stdout."""
    daemon.answers["POST", "/admin/add-instance"] = (200, {"instance": "i7"})
    assert 0 == run_verb(["add-instance"])
    assert "i7\n" == capsys.readouterr().out


def test_snapshot(daemon: PaperDaemon, capsys: Capture) -> None:
    """Tests that snapshot prints the snapshot, and the spec when asked."""
    daemon.answers["GET", "/admin/snapshot"] = (200, {"spec": {"a": 1}, "snapshot": {"b": 2}})
    assert 0 == run_verb(["snapshot"]) + run_verb(["snapshot", "--spec"])
    assert '{"b":2}\n{"a":1}\n' == capsys.readouterr().out


@pytest.mark.parametrize(("outcome", "code"), [("completed", 0), ("aborted", 1)])
def test_apply(daemon: PaperDaemon, capsys: Capture, outcome: str, code: int) -> None:
    """Tests that apply sends the file as it is and exits by the outcome."""
    plan = PLANS / "notice" / "expected-plan.json"
    daemon.answers["POST", "/admin/apply"] = (200, {"outcome": outcome})
    assert code == run_verb(["apply", str(plan)])
    assert [("POST", "/admin/apply", json.loads(plan.read_bytes()))] == daemon.calls
    assert {"outcome": outcome} == json.loads(capsys.readouterr().out)


def test_apply_refuses_what_is_no_plan(daemon: PaperDaemon, capsys: Capture, tmp_path: Path) -> None:
    """Tests that garbage exits 5 and a missing file 2, and that neither reaches the daemon."""
    garbage = tmp_path / "garbage"
    garbage.write_bytes(b"\x00{")
    assert (5, 2) == (run_verb(["apply", str(garbage)]), run_verb(["apply", str(tmp_path / "none")]))
    assert [] == daemon.calls
    assert 2 == capsys.readouterr().err.count("error: ")


@pytest.mark.parametrize(
    ("status", "answer", "code", "told"),
    [
        (404, error("i9 is gone", "SPS-140", 1, "living: i0"), 1, "error: i9 is gone\nhint: living: i0\n"),
        (409, error("stale plan", "SPS-170", 5), 5, "error: stale plan\n"),
        (409, error("nothing fits", "SPS-180", 4), 4, "error: nothing fits\n"),
        (400, error("new kind of error", "SPS-999", 2), 2, "error: new kind of error\n"),
        (403, {}, 1, "error: the daemon answered 403\n"),
    ],
)
def test_daemon_errors(daemon: PaperDaemon, capsys: Capture, status: int, answer: object, code: int, told: str) -> None:
    """Tests that an error of the daemon is told in its own words, hint included, with its own exit code."""
    daemon.answers["POST", "/admin/kill"] = (status, answer)
    assert code == run_verb(["kill", "i9"])
    assert ("", told) == tuple(capsys.readouterr())


def test_unreachable(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests that no daemon means exit 1, one line with the URL, and a hint."""
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{closed.getsockname()[1]}"
        monkeypatch.setenv("SPOTSERVE_URL", url)
        assert 1 == run_verb(["status"])
    lines = capsys.readouterr().err.splitlines()
    assert [f"error: no daemon answers at {url}: Connection refused"] == lines[:1]
    assert ["hint: start one with spotserve run, or name it with --url or SPOTSERVE_URL"] == lines[1:]


def test_something_else_answers(daemon: PaperDaemon, capsys: Capture) -> None:
    """Tests that another program on the port is told as no daemon."""
    daemon.answers["GET", "/admin/status"] = (200, b"<html>")
    assert 1 == run_verb(["status"])
    assert f"no daemon answers at {daemon.url}: what answers there is no spotserve" in capsys.readouterr().err


def test_url_precedence() -> None:
    """Tests --url > SPOTSERVE_URL > SPOTSERVE_PORT > 8000."""
    both = {"SPOTSERVE_URL": "http://b", "SPOTSERVE_PORT": "7"}
    found = [daemon_url("http://a", both), daemon_url(None, both), daemon_url(None, {"SPOTSERVE_PORT": "7"})]
    assert ["http://a", "http://b", "http://127.0.0.1:7"] == found
    assert "http://127.0.0.1:8000" == daemon_url(None, {})


def test_api_key_is_sent(daemon: PaperDaemon, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests that SPOTSERVE_API_KEY goes along as a bearer token and nothing does without it."""
    run_verb(["stop"])
    monkeypatch.setenv("SPOTSERVE_API_KEY", "sesame")
    run_verb(["stop"])
    assert [None, "Bearer sesame"] == daemon.keys


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "missing command"),
        (["statu"], "no such command 'statu'. Did you mean 'status'?"),
        (["notice"], "missing argument 'ID'"),
        (["notice", "i1", "--grace", "-1"], "--grace -1 is not between 0 and 86400 seconds"),
        (["notice", "i1", "--grace", "nan"], "--grace nan is not a number of seconds"),
        (["notice", "i1", "--grace", "1e9"], "--grace 1e9 is not between 0 and 86400 seconds"),
        (["status", "--format", "yaml"], "--format yaml is not one of table, json"),
        (["status", "--url", "ftp://x"], "--url ftp://x is not an http URL"),
        (["status", "--url", "http://x:99999"], "--url http://x:99999 has a port that is not between 0 and 65535"),
        (["run", "--prot", "1"], "no such option: --prot (Possible options: --host, --port)"),
        (["run", "--port", "x"], "--port x is not a whole number"),
        (["worker", "--coordinator", "here", "--secret-file", "f"], "--coordinator here is not HOST:PORT"),
        (["profile", "/nowhere"], "MODEL /nowhere is not a folder"),
    ],
)
def test_usage_errors(capsys: Capture, arguments: list[str], message: str) -> None:
    """Tests that wrong usage is one line on stderr and exit 2, before anything is done."""
    assert 2 == run_verb(arguments)
    out, err = capsys.readouterr()
    assert ("", f"error: {message}") == (out, err.splitlines()[0])


def test_version_and_help(capsys: Capture) -> None:
    """Tests that the version is data, and that help names every admin verb."""
    assert 0 == run_verb(["--version"])
    assert f"spotserve {__version__}\n" == capsys.readouterr().out
    assert 0 == run_verb(["--help"])
    out = capsys.readouterr().out
    for verb in ("run", "status", "notice", "kill", "add-instance", "snapshot", "apply", "stop", "worker", "profile"):
        assert f"\n  {verb} " in out


def test_interrupt(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    """Tests that Ctrl-C exits 130 without a traceback."""

    def interrupted(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(admin_commands, "client_for", interrupted)
    assert 130 == run_verb(["status"])
    assert "" == capsys.readouterr().out


@pytest.fixture
def front_door(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeAdministration]:
    """The real admin endpoints over a fake administration, behind an API key that SPOTSERVE_API_KEY holds."""
    administration, started = FakeAdministration(), queue.Queue[str]()
    configure_logging(stream=io.StringIO())
    app = build_app(
        FakeFrontdoor(lambda prompt, choice, position: 0),
        administration,
        None,
        ModelInfo(name="paper", vocab_size=10, max_model_len=10),
        api_key="sesame",
    )
    loop = asyncio.new_event_loop()
    serving = loop.create_task(serve(app, bind("127.0.0.1", 0), started.put))

    def run() -> None:
        with contextlib.suppress(asyncio.CancelledError):
            loop.run_until_complete(serving)

    thread = threading.Thread(target=run)
    thread.start()
    monkeypatch.setenv("SPOTSERVE_URL", started.get(timeout=30))
    monkeypatch.setenv("SPOTSERVE_API_KEY", "sesame")
    try:
        yield administration
    finally:
        loop.call_soon_threadsafe(serving.cancel)
        thread.join()
        loop.close()
        structlog.reset_defaults()


def test_verbs_against_the_real_endpoints(front_door: FakeAdministration, capsys: Capture) -> None:
    """Tests that every verb's path, body and answer are those of the daemon's own admin endpoints."""
    verbs = (["notice", "i1", "--grace", "3"], ["kill", "i0"], ["add-instance"], ["status"], ["snapshot"], ["stop"])
    assert [0] * len(verbs) == [run_verb(verb) for verb in verbs]
    assert [("notice", "i1", 3.0), ("kill", "i0"), ("add_instance", "i4")] == front_door.calls
    assert front_door.stopping
    out = capsys.readouterr().out
    assert out.startswith("i4\nserving  epoch 1  1x1x1 (DxPxM)")
    assert '"requests":[],"world":{' in out


def test_errors_of_the_real_endpoints(
    front_door: FakeAdministration, capsys: Capture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Tests that an unknown instance exits 1 naming the living, a wrong plan 5, and a wrong key 1."""
    plan = tmp_path / "plan.json"
    plan.write_text("{}", encoding="utf-8")
    assert (1, 5) == (run_verb(["kill", "i9"]), run_verb(["apply", str(plan)]))
    monkeypatch.setenv("SPOTSERVE_API_KEY", "wrong")
    assert 1 == run_verb(["status"])
    told = capsys.readouterr().err
    assert "error: instance i9 is unknown or gone\nhint: living: i0, i1, i2, i3\n" in told
    assert f"error: {plan}: bad_version - format_version: format version None is not 0.1\n" in told
    assert "error: the API key is missing or wrong\n" in told
