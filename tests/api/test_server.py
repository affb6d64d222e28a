"""The server around the application: models, metrics, hostile bytes, bounds, deadlines, start and end."""

from __future__ import annotations

import json
import re
import socket
from collections.abc import Callable

import pytest

from spotserve.api.protocol import ReceiptBounds
from spotserve.api.server import bind
from spotserve.errors import PortError, SpecError
from tests.api.conftest import Served
from tests.api.folder import MAX_MODEL_LEN

BODY = json.dumps({"model": "tiny", "prompt": [5], "max_tokens": 2}).encode()
POST = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\n"


def test_models(shared: Served) -> None:
    """Tests the list of models and the one that is served."""
    client = shared.openai()
    (model,) = client.models.list().data
    assert ("tiny", "model", 1_700_000_000) == (model.id, model.object, model.created)
    assert MAX_MODEL_LEN == model.max_model_len  # type: ignore[attr-defined]
    assert model == client.models.retrieve("tiny")
    with shared.http() as http:
        assert [404, 404] == [http.get(f"/v1/models/{name}").status_code for name in ("other", "a/b")]
        assert {"version": "0.1.0"} == http.get("/version").json()


def test_every_answer_has_an_id(shared: Served) -> None:
    """Tests that ids are ours, never a client's, and always new."""
    seen = set()
    with shared.http() as http:
        for path in ("/health", "/metrics", "/nowhere", "/v1/models", "/admin/status", "/v1/requests/x"):
            response = http.get(path, headers={"x-request-id": "10.0.0.1:99"})
            assert re.fullmatch("[0-9a-f]{32}", response.headers["x-request-id"])
            seen.add(response.headers["x-request-id"])
    assert 6 == len(seen)


def test_metrics(served: Served) -> None:
    """Tests that the exposition is well-formed, of our names only, and counts."""
    with served.http() as http:
        http.post("/v1/completions", content=BODY)
        http.get("/<script>")
        assert 200 == http.head("/metrics").status_code
        text = http.get("/metrics").text
    for line in text.splitlines():
        assert re.fullmatch(r"# (HELP|TYPE) spotserve_\w+ .+|spotserve_\w+(\{[^{}]*\})? [0-9.e+-]+", line)
    assert 'spotserve_http_responses_total{route="/v1/completions",code="200"} 1\n' in text
    assert 'spotserve_http_responses_total{route="other",code="404"} 1\n' in text
    assert "spotserve_prompt_tokens_total 1\n" in text
    assert "spotserve_generation_tokens_total 2\n" in text
    assert "spotserve_time_to_first_token_seconds_count 1\n" in text
    assert 'spotserve_state{state="serving"} 1\n' in text
    assert 'spotserve_instances{state="ready"} 4\n' in text


@pytest.mark.parametrize(
    "data",
    [
        b"\x00\x01\x02\r\n\r\n",
        b"GET\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"GET /health HTTP/9.9\r\n\r\n",
        b"GET /health HTTP/1.1\r\nhost : x\r\n\r\n",
        b"GET /health HTTP/1.1\nhost: x\n\n",
        b"GET /h\x80 HTTP/1.1\r\nhost: x\r\n\r\n",
        b"GET http:// HTTP/1.1\r\nhost: x\r\n\r\n",
        POST + b"content-length: -1\r\n\r\n",
        POST + b"content-length: x\r\n\r\n",
        POST + b"content-length: 1\r\ncontent-length: 2\r\n\r\n{}",
        POST + b"content-length: 4\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
        POST + b"transfer-encoding: xchunked\r\n\r\n0\r\n\r\n",
        POST + b"transfer-encoding: chunked\r\n\r\nzz\r\n",
    ],
    ids=lambda value: repr(value)[:40],
)
def test_garbage_is_answered_once_and_closed(shared: Served, data: bytes) -> None:
    """Tests that smuggling, broken framing and other protocols get one 400 in OpenAI's shape and a closed socket."""
    head, _, body = shared.raw(data).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400")
    assert b"x-request-id: " in head
    assert "invalid_request_error" == json.loads(body)["error"]["type"]


def test_pipelining_is_refused(served: Served) -> None:
    """Tests that a second request before the first answer is refused, so that disconnects stay visible."""
    served.do(served.frontdoor.hold)
    request = POST + f"content-length: {len(BODY)}\r\n\r\n".encode() + BODY
    answer = served.raw(request + request)
    assert answer.startswith(b"HTTP/1.1 400")
    assert b"pipelined_request" in answer


def test_a_connection_is_kept(shared: Served) -> None:
    """Tests that requests may follow each other on one connection."""
    with socket.create_connection(("127.0.0.1", shared.port), timeout=20) as connection:
        for _ in range(3):
            connection.sendall(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n")
            answer = b""
            while not answer.endswith(b"}"):
                answer += connection.recv(65536)
            assert answer.startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (POST + b"content-length: 4194305\r\n\r\n", 413),
        (POST + b"content-length: 99999999999999999999999\r\n\r\n", 400),
        (POST + b"transfer-encoding: chunked\r\n\r\n" + (b"100000\r\n" + b" " * 0x100000 + b"\r\n") * 5, 413),
        (b"GET /health HTTP/1.1\r\nx: " + b"y" * 40000 + b"\r\n\r\n", 431),
        (b"GET /health HTTP/1.1\r\nx: " + b"y" * 400000, 431),
        (b"GET /" + b"y" * 400000 + b" HTTP/1.1\r\nhost: x\r\n\r\n", 431),
        (b"GET /health HTTP/1.1\r\n" + b"a: b\r\n" * 101 + b"\r\n", 431),
    ],
    ids=["length", "absurd_length", "chunked", "header", "endless_header", "url", "many_headers"],
)
def test_too_much_is_refused(shared: Served, data: bytes, status: int) -> None:
    """Tests the bounds on headers and body, declared and not."""
    head, _, body = shared.raw(data).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 %d" % status)
    assert json.loads(body)["error"]["message"]


def test_a_body_up_to_the_bound_is_read(shared: Served) -> None:
    """Tests that 4 MiB are read (and then refused for their content)."""
    with shared.http() as http:
        body = BODY + b" " * ((4 << 20) - len(BODY))
        assert 200 == http.post("/v1/completions", content=body).status_code
        assert 413 == http.post("/v1/completions", content=body + b" ").status_code
        assert 409 == http.post("/admin/apply", content=body + b" ").status_code


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"GET /health HTTP/1.1\r\nhost",
        POST + b"content-length: 100\r\n\r\n{",
        POST + b"transfer-encoding: chunked\r\n\r\n5\r\nab",
    ],
    ids=["silence", "half_headers", "half_body", "half_chunk"],
)
def test_a_slow_peer_is_closed(serving: Callable[..., Served], data: bytes) -> None:
    """Tests that headers and body must arrive in time, and that the server goes on serving."""
    served = serving(bounds=ReceiptBounds(header_deadline_s=0.2, body_deadline_s=0.2))
    answer = served.raw(data)
    assert answer.startswith(b"HTTP/1.1 408")
    assert b"request_timeout" in answer
    with served.http() as http:
        assert 200 == http.get("/health").status_code


def test_deadlines_do_not_cut_answers(serving: Callable[..., Served]) -> None:
    """Tests that the receipt deadlines end with the request: a long answer and an idle connection outlive them."""
    served = serving(keep_alive_s=0.05, bounds=ReceiptBounds(header_deadline_s=0.3, body_deadline_s=0.3))
    served.do(served.frontdoor.hold)
    body = {"model": "tiny", "prompt": [5], "max_tokens": 4, "stream": True}
    num_comments = 0
    with served.http() as http:
        with http.stream("POST", "/v1/completions", json=body) as response:
            for line in response.iter_lines():
                num_comments += line == ": keep-alive"
                if num_comments == 15:
                    served.do(served.frontdoor.release)
        assert line == "" or line == "data: [DONE]"
        assert 200 == http.get("/health").status_code


def test_a_taken_port_is_one_line(shared: Served) -> None:
    """Tests that a taken port is told with the way out, and an address that is none as well."""
    with pytest.raises(PortError, match=f"port {shared.port} on 127.0.0.1 cannot be used") as caught:
        bind("127.0.0.1", shared.port)
    assert "--port" in str(caught.value.hint)
    with pytest.raises(SpecError, match="is no address"):
        bind("no.such.host.invalid", 0)


def test_a_bug_is_a_plain_500(served: Served, capfd: pytest.CaptureFixture[str]) -> None:
    """Tests that our own bug ends one request without telling how, and nothing else."""

    def broken() -> dict[str, object]:
        raise KeyError("secret internal")

    served.administration.status = broken  # type: ignore[method-assign]
    with served.http() as http:
        response = http.get("/metrics")
        assert (500, "internal_error") == (response.status_code, response.json()["error"]["code"])
        assert "secret internal" not in response.text
        assert 200 == http.get("/health").status_code
    assert response.headers["x-request-id"] in capfd.readouterr().out
