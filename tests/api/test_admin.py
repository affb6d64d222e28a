"""The admin routes: what they do, whom they answer, and what their errors carry for the command line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from starlette.requests import Request

from spotserve.api.admin import is_loopback, require_local
from spotserve.api.errors import HttpError
from spotserve.api.server import check_exposure
from spotserve.errors import SpecError
from tests.api.conftest import KEY, Served

ROUTES = [
    ("GET", "/admin/status"),
    ("GET", "/admin/snapshot"),
    ("POST", "/admin/notice"),
    ("POST", "/admin/kill"),
    ("POST", "/admin/add-instance"),
    ("POST", "/admin/stop"),
    ("POST", "/admin/apply"),
]


def test_verbs(served: Served) -> None:
    """Tests that each verb reaches the daemon and answers JSON."""
    with served.http() as client:
        assert "serving" == client.get("/admin/status").json()["state"]
        assert 200 == client.post("/admin/notice", json={"instance": "i2", "grace_s": 5}).status_code
        assert 200 == client.post("/admin/notice", json={"instance": "i1"}).status_code
        assert 200 == client.post("/admin/kill", json={"instance": "i3"}).status_code
        assert {"instance": "i4"} == client.post("/admin/add-instance").json()
        snapshot = client.get("/admin/snapshot").json()
        assert ["i0", "i1", "i2", "i3", "i4"] == [item["id"] for item in snapshot["snapshot"]["world"]["instances"]]
        assert {"spec", "snapshot"} == set(snapshot)
        assert 202 == client.post("/admin/stop").status_code
        assert "stopping" == client.get("/admin/status").json()["state"]
    assert [
        ("notice", "i2", 5.0),
        ("notice", "i1", 30.0),
        ("kill", "i3"),
        ("add_instance", "i4"),
    ] == served.administration.calls


@pytest.mark.parametrize("grace", ["NaN", "-1", "1e99", "Infinity", '"5"', "true", "[]", "86401"])
def test_absurd_grace_is_bad_input(served: Served, grace: str) -> None:
    """Tests that a grace period that is none makes the command exit 2, and nothing happens."""
    with served.http() as client:
        response = client.post("/admin/notice", content=f'{{"instance": "i0", "grace_s": {grace}}}')
    assert (400, 2) == (response.status_code, response.json()["error"]["exit_code"])
    assert [] == served.administration.calls


@pytest.mark.parametrize("verb", ["notice", "kill"])
def test_unknown_instances_name_the_living(served: Served, verb: str) -> None:
    """Tests that an unknown instance exits 1 with the living ids as hint."""
    with served.http() as client:
        error = client.post(f"/admin/{verb}", json={"instance": "i9"}).json()["error"]
        missing = client.post(f"/admin/{verb}", json={}).json()["error"]
    assert (1, "living: i0, i1, i2, i3") == (error["exit_code"], error["hint"])
    assert "i9" in error["message"]
    assert 2 == missing["exit_code"]


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"{}", b'{"epoch": 1, "epoch": 2}', b'{"format_version": "9"}'])
def test_a_broken_plan_is_refused(served: Served, body: bytes) -> None:
    """Tests that what is no plan makes `apply` exit 5."""
    with served.http() as client:
        response = client.post("/admin/apply", content=body)
    assert (409, 5) == (response.status_code, response.json()["error"]["exit_code"])


@pytest.mark.parametrize(("method", "path"), ROUTES)
@pytest.mark.parametrize(
    "headers",
    [
        {"host": "evil.example"},
        {"host": "evil.example:8000"},
        {"host": "192.168.0.7"},
        {"host": "127.0.0.1.evil.example"},
        {"host": "[fe80::1]:8000"},
        {"host": ""},
        {"origin": "http://evil.example"},
        {"origin": "http://localhost"},
        {"origin": "null"},
    ],
    ids=str,
)
def test_browsers_and_names_are_refused(shared: Served, method: str, path: str, headers: dict[str, str]) -> None:
    """Tests that a foreign Host (DNS rebinding) or any Origin (a web page) is a 403 on every admin route."""
    with shared.http() as client:
        response = client.request(method, path, headers=headers)
    assert (403, 1) == (response.status_code, response.json()["error"]["exit_code"])


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:1", "127.0.0.1", "127.8.9.1:80", "[::1]", "[::1]:8000"])
def test_loopback_hosts_are_answered(shared: Served, host: str) -> None:
    """Tests every spelling of a loopback Host."""
    with shared.http() as client:
        assert 200 == client.get("/admin/status", headers={"host": host}).status_code


@pytest.mark.parametrize(
    ("peer", "local"),
    [("127.0.0.1", True), ("::1", True), ("::ffff:127.0.0.1", True), ("10.0.0.9", False), ("", False)],
)
def test_only_loopback_peers(peer: str, local: bool) -> None:
    """Tests that a peer on another machine is refused whatever it claims in Host."""
    scope: dict[str, Any] = {"type": "http", "client": (peer, 1), "headers": [(b"host", b"localhost")]}
    if local:
        require_local(Request(scope))
    else:
        with pytest.raises(HttpError, match="loopback peers only"):
            require_local(Request(scope))


@pytest.mark.parametrize(
    "path", [path for _, path in ROUTES] + ["/v1/models", "/metrics", "/version", "/v1/requests/x"]
)
def test_the_key_is_required(serving: Callable[..., Served], path: str) -> None:
    """Tests that every route but /health wants the key, and that a wrong one is not told back."""
    served = serving(api_key=KEY)
    method = "POST" if ("POST", path) in ROUTES else "GET"
    wrong = [{}, {"authorization": f"Bearer {KEY}x"}, {"authorization": f"Basic {KEY}"}, {"authorization": KEY}]
    wrong += [{"authorization": "Bearer"}, {"authorization": "Bearer " + "x" * 20000}, {"x-api-key": KEY}]
    with served.http() as client:
        for headers in wrong:
            response = client.request(method, f"{path}?api_key={KEY}", headers=headers)
            assert 401 == response.status_code
            assert KEY not in response.text
        response = client.request(method, path, headers={"authorization": f"bearer {KEY}"})
        assert 401 != response.status_code
        assert 200 == client.get("/health").status_code
        assert 401 == client.post("/v1/completions", json={}).status_code


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "example.org", ""])
def test_exposure_needs_a_key(host: str) -> None:
    """Tests that listening beyond loopback is refused without a key."""
    with pytest.raises(SpecError, match="no API key"):
        check_exposure(host, None)
    check_exposure(host, KEY)
    with pytest.raises(SpecError, match="empty"):
        check_exposure("127.0.0.1", "")


def test_loopback_needs_none() -> None:
    """Tests that a loopback listener may go without key."""
    for host in ("127.0.0.1", "localhost", "::1"):
        check_exposure(host, None)
        assert is_loopback(host)


def test_no_secret_in_output(served: Served, folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Tests that neither prompt nor key nor text reaches the log or the metrics."""
    canary = "canary-brown"
    with served.http() as client:
        client.post(
            "/v1/completions",
            json={"model": "tiny", "prompt": canary, "max_tokens": 9},
            headers={"authorization": f"Bearer {KEY}", "x-request-id": "evil\x1b[0m"},
        )
        client.post("/v1/completions", json={"model": "tiny", "prompt": canary, "n": 99})
        metrics = client.get("/metrics").text
    output = "".join(capfd.readouterr()) + metrics
    assert "request_answered" in output
    for secret in (canary, KEY, "quick", "\x1b[0mevil", "evil"):
        assert secret not in output
