"""Everything that is refused, in OpenAI's error shape and before anything is accepted."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import openai
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from spotserve.api.validation import _LATER_FIELDS, read_json_object
from spotserve.errors import RequestError
from tests.api.conftest import Served
from tests.api.folder import MAX_MODEL_LEN, VOCAB_SIZE

COMPLETION: dict[str, Any] = {"model": "tiny", "prompt": [5], "max_tokens": 2}
CHAT: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}


def post(served: Served, path: str, body: object) -> tuple[int, dict[str, Any]]:
    """Send a body, as it is when bytes; checks the error's shape and that nothing was accepted."""
    before = len(served.frontdoor.submitted)
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    with served.http() as client:
        response = client.post(path, content=data)
    assert before == len(served.frontdoor.submitted)
    assert 32 == len(response.headers["x-request-id"])
    error = response.json()["error"]
    assert {"message", "type", "param", "code"} == set(error)
    assert error["message"]
    return response.status_code, error


SHARED_FIELDS: list[tuple[str, Any]] = [
    ("n", 0),
    ("n", -1),
    ("n", 9),
    ("n", 10**30),
    ("n", 1.0),
    ("n", True),
    ("n", "2"),
    ("max_tokens", 0),
    ("max_tokens", -5),
    ("max_tokens", MAX_MODEL_LEN),
    ("max_tokens", 10**30),
    ("max_tokens", 2.5),
    ("max_tokens", True),
    ("max_tokens", [1]),
    ("max_completion_tokens", 0),
    ("temperature", -0.1),
    ("temperature", 2.1),
    ("temperature", "hot"),
    ("temperature", True),
    ("temperature", []),
    ("top_p", 0),
    ("top_p", 1.5),
    ("top_p", -1),
    ("top_k", -2),
    ("top_k", 1.5),
    ("top_k", 10**9),
    ("seed", 1.5),
    ("seed", 2**64),
    ("seed", -(2**63) - 1),
    ("seed", True),
    ("seed", "x"),
    ("stop", ""),
    ("stop", ["a", ""]),
    ("stop", ["a", 1]),
    ("stop", 7),
    ("stop", {}),
    ("stop", ["a", "b", "c", "d", "e"]),
    ("stop", "x" * 257),
    ("stream", 1),
    ("stream", "true"),
    ("stream_options", []),
    ("stream_options", {"include_usage": True}),
    ("ignore_eos", 1),
    ("return_token_ids", "yes"),
    ("timeout_s", 0),
    ("timeout_s", -1),
    ("timeout_s", 1e9),
    ("timeout_s", "1"),
    ("model", 7),
    ("presence_penalty", 2.1),
    ("presence_penalty", -2.1),
    ("presence_penalty", True),
    ("frequency_penalty", 2.1),
    ("frequency_penalty", "much"),
    ("min_tokens", -1),
    ("min_tokens", 3),
    ("min_tokens", 1.0),
    ("logit_bias", []),
    ("logit_bias", {"the": 1}),
    ("logit_bias", {"-1": 1}),
    ("logit_bias", {"05": 1}),
    ("logit_bias", {str(VOCAB_SIZE): 1}),
    ("logit_bias", {"5": 100.5}),
    ("logit_bias", {"5": -101}),
    ("logit_bias", {"5": True}),
    ("logit_bias", {"5": None}),
    ("logit_bias", {str(token_id): 1 for token_id in range(1025)}),
    ("logprobs", -1),
    ("logprobs", 6),
    ("logprobs", 1.5),
    ("logprobs", "yes"),
    ("top_logprobs", 2),
    ("echo", 1),
]


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
@pytest.mark.parametrize(("name", "value"), SHARED_FIELDS, ids=lambda value: repr(value)[:24])
def test_wrong_values(shared: Served, path: str, name: str, value: object) -> None:
    """Tests that each wrong value is a 400 that names its field."""
    body = {**(COMPLETION if path == "/v1/completions" else CHAT), name: value}
    status, error = post(shared, path, body)
    assert (400, "invalid_request_error", name) == (status, error["type"], error["param"])


@pytest.mark.parametrize(
    ("path", "fields", "name"),
    [
        ("/v1/completions", {"logprobs": True}, "logprobs"),
        ("/v1/completions", {"logprobs": 2, "top_logprobs": 2}, "top_logprobs"),
        ("/v1/completions", {"max_tokens": 0, "logprobs": 1}, "max_tokens"),
        ("/v1/chat/completions", {"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ("/v1/chat/completions", {"logprobs": True, "top_logprobs": True}, "top_logprobs"),
        ("/v1/chat/completions", {"echo": True}, "echo"),
        ("/v1/chat/completions", {"echo": True, "max_tokens": 0}, "echo"),
    ],
)
def test_each_endpoint_has_its_own_logprobs(shared: Served, path: str, fields: dict[str, Any], name: str) -> None:
    """Tests that a completion counts its logprobs, a chat asks for them, and that only a completion echoes."""
    status, error = post(shared, path, {**(COMPLETION if path == "/v1/completions" else CHAT), **fields})
    assert (400, name) == (status, error["param"])


def test_an_echoed_prompt_is_bounded(shared: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests that logprobs of a prompt past the bound are refused, and that its echo alone is not."""
    monkeypatch.setattr("spotserve.api.validation.MAX_SCORED_PROMPT_TOKENS", 3)
    body = {**COMPLETION, "prompt": [5, 6, 7, 8], "echo": True}
    status, error = post(shared, "/v1/completions", {**body, "logprobs": 0})
    assert (400, "echo", True) == (status, error["param"], "of 4 tokens exceeds 3" in error["message"])
    with shared.http() as client:
        assert 200 == client.post("/v1/completions", json=body).status_code
        assert 200 == client.post("/v1/completions", json={**body, "prompt": [5, 6, 7], "logprobs": 0}).status_code


def test_echoed_prompts_are_bounded_together(shared: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests that many prompts and choices cannot have more logprobs than one prompt at a time might."""
    monkeypatch.setattr("spotserve.api.validation.MAX_SCORED_TOKENS", 11)
    body = {**COMPLETION, "prompt": [[5, 6, 7]] * 2, "n": 2, "echo": True}
    status, error = post(shared, "/v1/completions", {**body, "logprobs": 0})
    assert (400, "echo", True) == (status, error["param"], "12 prompt tokens" in error["message"])
    with shared.http() as client:
        assert 200 == client.post("/v1/completions", json=body).status_code
        assert 200 == client.post("/v1/completions", json={**body, "n": 1, "logprobs": 0}).status_code


LATER_VALUES: dict[str, Any] = {
    "add_generation_prompt": False,
    "best_of": 2,
    "repetition_penalty": 1.1,
    "response_format": {"type": "json_object"},
    "tool_choice": "required",
    "skip_special_tokens": False,
    "prompt_logprobs": 0,
    "modalities": ["audio"],
}


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
@pytest.mark.parametrize("name", sorted(_LATER_FIELDS))
def test_later_features_are_refused(shared: Served, path: str, name: str) -> None:
    """Tests that a field we cannot honour is refused when it asks for something, and taken when it does not."""
    body = {**(COMPLETION if path == "/v1/completions" else CHAT), name: LATER_VALUES.get(name, 1)}
    status, error = post(shared, path, body)
    assert (400, name) == (status, error["param"])
    assert "not supported yet" in error["message"]
    body[name] = _LATER_FIELDS[name][0]
    with shared.http() as client:
        assert 200 == client.post(path, json=body).status_code


@pytest.mark.parametrize(
    "prompt",
    [
        None,
        "",
        [],
        [[]],
        [""],
        ["a", ""],
        [[1], []],
        ["a", [1]],
        [1, "a"],
        [[1], 2],
        7,
        True,
        {},
        [True],
        [1.0],
        [-1],
        [VOCAB_SIZE],
        [10**30],
        [None],
        [[1, "2"]],
        [["a"]],
        [1, [2]],
        [5] * MAX_MODEL_LEN,
        [5] * (MAX_MODEL_LEN - 1),
        "z" * 20000,
        [[5]] * 129,
    ],
    ids=lambda value: repr(value)[:24],
)
def test_wrong_prompts(shared: Served, prompt: object) -> None:
    """Tests that no prompt but texts or ids inside the vocabulary, of fitting length, is taken."""
    status, error = post(shared, "/v1/completions", {**COMPLETION, "prompt": prompt})
    assert (400, "prompt") == (status, error["param"])


def test_too_long_has_its_code(shared: Served) -> None:
    """Tests the code by which clients know a request that does not fit."""
    status, error = post(shared, "/v1/completions", {**COMPLETION, "prompt": [5] * 100, "max_tokens": 29})
    assert (400, "context_length_exceeded") == (status, error["code"])
    assert f"{MAX_MODEL_LEN}" in error["message"]


@pytest.mark.parametrize(
    "messages",
    [
        None,
        [],
        "hi",
        [1],
        [{}],
        [{"role": "user"}],
        [{"role": "user", "content": None}],
        [{"role": "user", "content": 7}],
        [{"role": "user", "content": []}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x"}}]}],
        [{"role": "user", "content": [{"type": "text", "text": 1}]}],
        [{"role": "user", "content": ["hi"]}],
        [{"role": "robot", "content": "hi"}],
        [{"role": ["user"], "content": "hi"}],
        [{"role": "tool", "content": "hi"}],
        [{"role": "assistant", "content": "hi", "tool_calls": [{"id": "a"}]}],
        [{"role": "user", "content": "refuse"}],
        [{"role": "user", "content": "hi"}] * 2049,
        [{"role": "user", "content": "z" * 20000}],
        [{"role": "user", "content": "z?" * 100}],
    ],
    ids=lambda value: repr(value)[:32],
)
def test_wrong_messages(shared: Served, messages: object) -> None:
    """Tests that no chat but one of known roles and text, that the template takes and that fits, is taken."""
    status, error = post(shared, "/v1/chat/completions", {**CHAT, "messages": messages})
    assert 400 == status
    assert error["param"].startswith(("messages", "prompt"))


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"nonsense",
        b"[]",
        b'"text"',
        b"null",
        b'{"model": "tiny", "prompt": [5], "temperature": NaN}',
        b'{"model": "tiny", "prompt": [5], "temperature": Infinity}',
        b'{"model": "tiny", "prompt": [5], "temperature": -Infinity}',
        b'{"model": "tiny", "prompt": [5], "temperature": 1e400}',
        b'{"model": "tiny", "prompt": [5], "seed": ' + b"9" * 5000 + b"}",
        b'{"model": "tiny", "prompt": [5], "prompt": [6]}',
        b'{"model": "tiny", "prompt": [5], "x": {"a": 1, "a": 1}}',
        b'{"\\ud800": 1, "\\ud800": 1}',
        b'{"model": "tiny", "prompt": "\xff"}',
        b'{"model": "tiny", "prompt": "\xc0\xaf"}',
        b'{"model": "tiny", "prompt": "\\ud800"}',
        b'{"model": "tiny", "prompt": [5], "\\udc00": 1}',
        b'{"model": "tiny", "prompt": "a\x00b"}',
        b'\xef\xbb\xbf{"model": "tiny", "prompt": [5]}',
        b'{"model": "tiny", "prompt": [5], "x": ' + b"[" * 64 + b"]" * 64 + b"}",
        b'{"model": "tiny", "prompt": [5], "x": ' + b"[" * 1_000_000 + b"}",
        b'{"a":' * 200_000,
        '{"model": "tiny", "prompt": [5]}'.encode("utf-16"),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_wrong_json(shared: Served, body: bytes) -> None:
    """Tests that bodies that are no strict JSON object are refused, bombs included."""
    assert 400 == post(shared, "/v1/completions", body)[0]


def test_depth_up_to_the_bound_is_read() -> None:
    """Tests that 64 levels are read and 65 are not."""
    assert read_json_object(b'{"x":' + b"[" * 63 + b"]" * 63 + b"}")
    with pytest.raises(RequestError, match="deeper than 64"):
        read_json_object(b'{"x":' + b"[" * 64 + b"]" * 64 + b"}")


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=8),
    lambda children: st.lists(children, max_size=4) | st.dictionaries(st.text(max_size=8), children, max_size=4),
    max_leaves=8,
)
NAMES = sorted({name for name, _ in SHARED_FIELDS} | {"prompt", "messages", *_LATER_FIELDS})


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(fields=st.dictionaries(st.sampled_from(NAMES), JSON_VALUES, max_size=4), chat=st.booleans())
def test_no_body_breaks_the_server(shared: Served, fields: dict[str, Any], chat: bool) -> None:
    """Tests that whatever values the fields have, the answer is a 200 or a 4xx in OpenAI's shape."""
    body = {**(CHAT if chat else COMPLETION), **fields}
    path = "/v1/chat/completions" if chat else "/v1/completions"
    with shared.http() as client:
        response = client.post(path, content=json.dumps(body).encode())
    assert response.status_code in (200, 400, 404)
    if response.status_code != 200:
        assert {"message", "type", "param", "code"} == set(response.json()["error"])


@pytest.mark.parametrize("name", ["other", "../tiny", "/etc/passwd", "file:///etc/passwd", "http://x/y", "TINY", ""])
def test_another_model(shared: Served, name: str) -> None:
    """Tests that only the served model's name is known, and that no name is ever opened."""
    status, error = post(shared, "/v1/completions", {**COMPLETION, "model": name})
    assert (404, "model_not_found", "model") == (status, error["code"], error["param"])


def test_no_model(shared: Served) -> None:
    """Tests that the model must be named."""
    status, error = post(shared, "/v1/completions", {"prompt": [5]})
    assert (400, "model") == (status, error["param"])


def test_unknown_routes_and_methods(shared: Served) -> None:
    """Tests that unknown paths and methods answer in OpenAI's shape."""
    assert 404 == post(shared, "/v1/responses", {})[0]
    assert 405 == post(shared, "/v1/models", {})[0]
    with shared.http() as client:
        assert 405 == client.get("/v1/completions").status_code


def test_a_full_queue(serving: Callable[..., Served]) -> None:
    """Tests that a full queue is a 429 that says when to come back, as the client knows it."""
    served = serving()
    served.frontdoor.queue_full = True
    with pytest.raises(openai.RateLimitError) as caught:
        served.openai().completions.create(**COMPLETION)
    assert ("1", "queue_full") == (caught.value.response.headers["retry-after"], caught.value.code)


def test_a_daemon_that_is_not_ready(serving: Callable[..., Served]) -> None:
    """Tests that health, models and generation answer 503 before the first serving, health 200 in every state after."""
    served = serving()
    served.frontdoor.ready, served.frontdoor.state = False, "provisioning"
    with served.http() as client:
        assert [503] * 3 == [client.get(path).status_code for path in ("/health", "/v1/models", "/v1/models/tiny")]
        response = client.post("/v1/completions", json=COMPLETION)
        assert (503, "2") == (response.status_code, response.headers["retry-after"])
        served.frontdoor.ready, served.frontdoor.state = True, "degraded"
        assert (200, {"state": "degraded"}) == (client.get("/health").status_code, client.get("/health").json())
