"""Reading accepted requests back: as JSON, and as a stream from any position on."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from typing import Any

import pytest

from tests.api.conftest import Served
from tests.api.test_generation import answer_ids


def generate(served: Served, **options: Any) -> tuple[str, dict[str, Any]]:
    """One finished completion: its id and its answer."""
    body = {"model": "tiny", "prompt": [5, 6], "max_tokens": 70, "return_token_ids": True, **options}
    with served.http() as client:
        response = client.post("/v1/completions", json=body)
    assert 200 == response.status_code
    return response.headers["x-request-id"], response.json()


def continuation(served: Served, request: str, starting_after: int) -> list[dict[str, Any]]:
    """The events of a stream, which must end with [DONE]."""
    with served.http() as client:
        response = client.get(f"/v1/requests/{request}", params={"starting_after": starting_after})
    assert 200 == response.status_code
    lines = [line for line in response.text.split("\n") if line.startswith("data: ")]
    assert "data: [DONE]" == lines.pop()
    return [json.loads(line[6:]) for line in lines]


def test_a_finished_request(shared: Served) -> None:
    """Tests every field of a finished request."""
    request, answer = generate(shared, n=2)
    with shared.http() as client:
        view = client.get(f"/v1/requests/{request}").json()
    assert view.pop("created") > 1_700_000_000
    choices = [
        {
            "index": index,
            "token_ids": choice["token_ids"],
            "text": choice["text"],
            "finish_reason": "length",
        }
        for index, choice in enumerate(answer["choices"])
    ]
    assert view == {
        "id": request,
        "object": "request",
        "model": "tiny",
        "state": "finished",
        "prompt_tokens": 2,
        "choices": choices,
        "error": None,
    }


@pytest.mark.parametrize("stop", [None, "own fo"])
@pytest.mark.parametrize("starting_after", [-1, 0, 1, 4, 17, 61, 69, 70, 1000])
def test_starting_after(shared: Served, starting_after: int, stop: str | None) -> None:
    """Tests that the tokens past a position come with their positions, and that the text is the rest of the text."""
    request, answer = generate(shared, stop=stop)
    expected = answer["choices"][0]
    chunks = continuation(shared, request, starting_after)
    everything = continuation(shared, request, -1)
    ids, position = [], starting_after + 1
    for chunk in chunks:
        (choice,) = chunk["choices"]
        if choice["token_ids"]:
            assert position == chunk["position"] == choice["position"]
        position += len(choice["token_ids"])
        ids += choice["token_ids"]
    assert expected["token_ids"][starting_after + 1 :] == ids
    assert expected["finish_reason"] == chunks[-1]["choices"][0]["finish_reason"]
    assert expected["text"] == "".join(chunk["choices"][0]["text"] for chunk in everything)
    assert expected["text"].endswith("".join(chunk["choices"][0]["text"] for chunk in chunks))


def test_a_live_request_is_followed(serving: Callable[..., Served]) -> None:
    """Tests that a stream replays what is durable, waits for the rest, and that dropping one cancels nothing."""
    served = serving(keep_alive_s=0.05)
    served.do(lambda: served.frontdoor.hold(6))
    body = {"model": "tiny", "prompt": [5], "max_tokens": 10, "stream": True}
    with served.http() as client, client.stream("POST", "/v1/completions", json=body) as original:
        request = original.headers["x-request-id"]
        served.wait_until(lambda: len(served.frontdoor._requests[request].choices[0].token_ids) == 6)
        with served.http() as reader:
            view = reader.get(f"/v1/requests/{request}").json()
        assert ("decoding", answer_ids(served, 6)) == (view["state"], view["choices"][0]["token_ids"])
        with socket.create_connection(("127.0.0.1", served.port)) as dropped:
            dropped.sendall(f"GET /v1/requests/{request}?starting_after=-1 HTTP/1.1\r\nhost: x\r\n\r\n".encode())
            assert dropped.recv(100)
        ids: list[int] = []
        with served.http() as reader, reader.stream("GET", f"/v1/requests/{request}?starting_after=2") as follower:
            for line in follower.iter_lines():
                if line == ": keep-alive":
                    served.do(served.frontdoor.release)
                if line.startswith("data: {"):
                    ids += json.loads(line[6:])["choices"][0]["token_ids"]
        original.read()
    assert answer_ids(served, 10)[3:] == ids
    assert [] == served.frontdoor.cancelled


@pytest.mark.parametrize("value", ["", "x", "-2", "1.0", "1e3", "99999999999", "01", "0&starting_after=1", "%00", "٣"])
def test_wrong_positions(shared: Served, value: str) -> None:
    """Tests that a position must be an integer of -1 or more, given once."""
    request, _ = generate(shared)
    with shared.http() as client:
        response = client.get(f"/v1/requests/{request}?starting_after={value}")
    assert (400, "starting_after") == (response.status_code, response.json()["error"]["param"])


@pytest.mark.parametrize("request_id", ["0" * 32, "x", "0" * 31, "A" * 32, "%2e%2e", "a" * 5000, "%0d%0a", "cmpl-1"])
def test_unknown_requests(shared: Served, request_id: str) -> None:
    """Tests that unknown and malformed ids are the same 404."""
    with shared.http() as client:
        response = client.get(f"/v1/requests/{request_id}")
        stream = client.get(f"/v1/requests/{request_id}?starting_after=-1")
    assert (404, "request_not_found") == (response.status_code, response.json()["error"]["code"])
    assert 404 == stream.status_code


def test_a_cancelled_request(serving: Callable[..., Served]) -> None:
    """Tests that a cancelled request can be read with the tokens it got."""
    served = serving()
    served.do(lambda: served.frontdoor.hold(4))
    body = json.dumps({"model": "tiny", "prompt": [5], "max_tokens": 9, "stream": True}).encode()
    with socket.create_connection(("127.0.0.1", served.port)) as connection:
        connection.sendall(
            f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n".encode() + body
        )
        assert connection.recv(100)
        served.wait_until(
            lambda: any(len(request.choices[0].token_ids) == 4 for request in served.frontdoor._requests.values())
        )
    served.wait_until(lambda: bool(served.frontdoor.cancelled))
    with served.http() as client:
        view = client.get(f"/v1/requests/{served.frontdoor.cancelled[0]}").json()
    assert ("cancelled", answer_ids(served, 4), "cancelled") == (
        view["state"],
        view["choices"][0]["token_ids"],
        view["choices"][0]["finish_reason"],
    )
