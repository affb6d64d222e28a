"""Completions and chats with the official client, streamed and not."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from typing import Any

import openai
import pytest

from spotserve.api.tokenizer import GenerationDefaults
from tests.api.conftest import ANSWER, Served
from tests.api.folder import EOS, MAX_MODEL_LEN

MESSAGES: Any = [
    {"role": "developer", "content": "be brief"},
    {"role": "user", "content": [{"type": "text", "text": "hi"}]},
]


def answer_ids(served: Served, count: int, *, choice: int = 0) -> list[int]:
    """The tokens that the fake gives."""
    assert served.codec is not None
    ids = served.codec.encode(ANSWER, add_special_tokens=False)
    return [ids[(position + choice) % len(ids)] for position in range(count)]


def test_completion(shared: Served) -> None:
    """Tests a plain completion: text, reason, usage, id."""
    answer = shared.openai().completions.create(model="tiny", prompt="hello", max_tokens=6)
    assert shared.codec is not None
    assert shared.codec.decode(answer_ids(shared, 6)) == answer.choices[0].text
    assert "length" == answer.choices[0].finish_reason
    assert answer.usage is not None
    num_prompt = len(shared.codec.encode("hello"))
    assert (num_prompt, 6, num_prompt + 6) == (
        answer.usage.prompt_tokens,
        answer.usage.completion_tokens,
        answer.usage.total_tokens,
    )
    assert answer.id == f"cmpl-{answer._request_id}"
    assert "text_completion" == answer.object
    assert not hasattr(answer.choices[0], "token_ids")


def test_streamed_text_is_the_plain_text(shared: Served) -> None:
    """Tests that streamed pieces, ids and usage equal the plain answer's, multi-byte characters included."""
    client, options = shared.openai(), {"return_token_ids": True, "ignore_eos": True}
    plain = client.completions.create(model="tiny", prompt="hello", max_tokens=90, seed=1, extra_body=options)
    stream = client.completions.create(
        model="tiny",
        prompt="hello",
        max_tokens=90,
        seed=1,
        extra_body=options,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    usage = chunks.pop()
    text = "".join(chunk.choices[0].text for chunk in chunks)
    ids = [token_id for chunk in chunks for token_id in chunk.choices[0].token_ids]  # type: ignore[attr-defined]
    assert plain.choices[0].text == text
    assert "🙂" in text
    assert plain.choices[0].token_ids == ids == answer_ids(shared, 90)  # type: ignore[attr-defined]
    assert [None] * (len(chunks) - 1) + ["length"] == [chunk.choices[0].finish_reason for chunk in chunks]
    assert (usage.choices, usage.usage) == ([], plain.usage)
    assert {None} == {chunk.usage for chunk in chunks}


def test_chat(shared: Served) -> None:
    """Tests a plain chat: the template makes the prompt, the rest of the model's length may be generated."""
    answer = shared.openai().chat.completions.create(model="tiny", messages=MESSAGES)
    new = shared.frontdoor.submitted[-1]
    assert shared.codec is not None
    assert (
        shared.codec.encode("<|system|>be brief\n<|user|>hi\n<|assistant|>", add_special_tokens=False) == new.prompt_ids
    )
    assert MAX_MODEL_LEN - len(new.prompt_ids) == new.sampling.max_tokens
    assert "assistant" == answer.choices[0].message.role
    assert answer.choices[0].message.content is not None
    assert answer.choices[0].message.content.startswith("the quick brown fox")
    assert answer.id == f"chatcmpl-{new.request}"


def test_chat_stream(shared: Served) -> None:
    """Tests that a streamed chat opens with the role and adds up to the plain one."""
    client = shared.openai()
    plain = client.chat.completions.create(model="tiny", messages=MESSAGES, max_completion_tokens=20, max_tokens=3)
    chunks = list(
        client.chat.completions.create(model="tiny", messages=MESSAGES, max_completion_tokens=20, stream=True)
    )
    assert ("assistant", "") == (chunks[0].choices[0].delta.role, chunks[0].choices[0].delta.content)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert plain.choices[0].message.content == text
    assert "length" == chunks[-1].choices[0].finish_reason
    assert {"chat.completion.chunk"} == {chunk.object for chunk in chunks}


def test_several_choices_and_prompts(shared: Served) -> None:
    """Tests that choices are counted through prompt by prompt, and that every prompt is a request of its own."""
    raw = shared.openai().completions.with_raw_response.create(
        model="tiny", prompt=[[5, 6], [7, 8, 9]], n=2, max_tokens=4, extra_body={"return_token_ids": True}
    )
    answer, ids = raw.parse(), raw.headers["x-request-ids"].split(",")
    expected = [answer_ids(shared, 4, choice=choice) for choice in (0, 1, 0, 1)]
    assert expected == [choice.token_ids for choice in answer.choices]  # type: ignore[attr-defined]
    assert [0, 1, 2, 3] == [choice.index for choice in answer.choices]
    assert answer.usage is not None
    assert (5, 16) == (answer.usage.prompt_tokens, answer.usage.completion_tokens)
    assert raw.headers["x-request-id"] == ids[0]
    assert ids == [new.request for new in shared.frontdoor.submitted[-2:]]
    assert [(5, 6), (7, 8, 9)] == [new.prompt_ids for new in shared.frontdoor.submitted[-2:]]
    with shared.http() as client:
        second = client.get(f"/v1/requests/{ids[1]}").json()
    assert [2, 3] == [choice["index"] for choice in second["choices"]]


def test_several_choices_streamed(shared: Served) -> None:
    """Tests that the chunks of several choices can be told apart."""
    stream = shared.openai().completions.create(
        model="tiny", prompt=["a", "b"], n=2, max_tokens=5, stream=True, extra_body={"return_token_ids": True}
    )
    ids: dict[int, list[int]] = {}
    for chunk in stream:
        choice = chunk.choices[0]
        ids.setdefault(choice.index, []).extend(choice.token_ids)  # type: ignore[attr-defined]
    assert {index: answer_ids(shared, 5, choice=index % 2) for index in range(4)} == ids


def test_stop_string(shared: Served) -> None:
    """Tests that text ends before the stop string while the ids hold the token that completed it."""
    client = shared.openai()
    options: dict[str, Any] = {"model": "tiny", "prompt": "x", "max_tokens": 60, "stop": ["own fo", "zzz"]}
    plain = client.completions.create(**options, extra_body={"return_token_ids": True})
    text = "".join(chunk.choices[0].text for chunk in client.completions.create(**options, stream=True))
    assert "the quick br" == plain.choices[0].text == text
    assert "stop" == plain.choices[0].finish_reason
    assert shared.codec is not None
    assert "own fo" in shared.codec.decode(plain.choices[0].token_ids)  # type: ignore[attr-defined]


def test_ids_without_a_tokenizer(serving: Callable[..., Served]) -> None:
    """Tests that a model without tokenizer serves ids and refuses everything that needs text."""
    served = serving(folder=None, defaults=GenerationDefaults(eos_token_ids=(13,), temperature=0.0))
    client = served.openai()
    answer = client.completions.create(model="tiny", prompt=[1, 2], extra_body={"return_token_ids": True})
    assert ([10, 11, 12, 13], "stop", "") == (
        answer.choices[0].token_ids,  # type: ignore[attr-defined]
        answer.choices[0].finish_reason,
        answer.choices[0].text,
    )
    answer = client.completions.create(
        model="tiny", prompt=[1, 2], max_tokens=9, extra_body={"return_token_ids": True, "ignore_eos": True}
    )
    assert (9, "length") == (len(answer.choices[0].token_ids), answer.choices[0].finish_reason)  # type: ignore[attr-defined]
    for refused in (
        lambda: client.completions.create(model="tiny", prompt="text"),
        lambda: client.completions.create(model="tiny", prompt=[1], stop="x"),
        lambda: client.chat.completions.create(model="tiny", messages=MESSAGES),
    ):
        with pytest.raises(openai.BadRequestError):
            refused()


def test_parameters_arrive(shared: Served) -> None:
    """Tests that every parameter reaches the daemon, and what is put in for those left out."""
    client = shared.openai()
    client.completions.create(
        model="tiny",
        prompt=[5],
        max_tokens=3,
        temperature=0.5,
        top_p=0.25,
        seed=-7,
        stop=["zz", "zz", "yy"],
        extra_body={"top_k": 4, "ignore_eos": True, "timeout_s": 12, "unheard_of": {"a": [1]}, "min_tokens": 0},
    )
    new = shared.frontdoor.submitted[-1]
    assert (0.5, 0.25, 4, -7, 3, True, (EOS,)) == (
        new.sampling.temperature,
        new.sampling.top_p,
        new.sampling.top_k,
        new.sampling.seed,
        new.sampling.max_tokens,
        new.sampling.ignore_eos,
        new.sampling.stop_token_ids,
    )
    assert (("zz", "yy"), 12.0) == (new.stop, new.timeout_s)
    client.completions.create(model="tiny", prompt=[5] * 120)
    client.completions.create(model="tiny", prompt=[5])
    clamped, plain = shared.frontdoor.submitted[-2:]
    assert (8, 16) == (clamped.sampling.max_tokens, plain.sampling.max_tokens)
    assert (0.7, 1.0, 20, False, None, ()) == (
        plain.sampling.temperature,
        plain.sampling.top_p,
        plain.sampling.top_k,
        plain.sampling.ignore_eos,
        plain.timeout_s,
        plain.stop,
    )
    assert plain.sampling.seed != clamped.sampling.seed
    assert 0 <= plain.sampling.seed < 2**63


def test_headers_come_before_tokens_and_comments_follow(serving: Callable[..., Served]) -> None:
    """Tests that a stalled stream has its headers and id, then keep-alive comments, then its tokens."""
    served = serving(keep_alive_s=0.05)
    served.do(served.frontdoor.hold)
    lines: list[str] = []
    body = {"model": "tiny", "prompt": [5], "max_tokens": 4, "stream": True, "return_token_ids": True}
    with served.http() as client, client.stream("POST", "/v1/completions", json=body) as response:
        assert 200 == response.status_code
        assert served.frontdoor.submitted[-1].request == response.headers["x-request-id"]
        assert response.headers["content-type"].startswith("text/event-stream")
        for line in response.iter_lines():
            lines.append(line)
            if lines.count(": keep-alive") == 3:
                served.do(served.frontdoor.release)
    events = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    assert answer_ids(served, 4) == [token_id for event in events for token_id in event["choices"][0]["token_ids"]]
    assert "data: [DONE]" == [line for line in lines if line][-1]


@pytest.mark.parametrize("stream", [True, False])
def test_a_disconnect_cancels(serving: Callable[..., Served], stream: bool) -> None:
    """Tests that a client that goes away has its requests cancelled."""
    served = serving()
    served.do(lambda: served.frontdoor.hold(4))
    body = json.dumps({"model": "tiny", "prompt": [[5], [6]], "max_tokens": 9, "stream": stream}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n".encode()
    with socket.create_connection(("127.0.0.1", served.port)) as connection:
        connection.sendall(head + body)
        served.wait_until(lambda: len(served.frontdoor.submitted) == 2)
        if stream:
            assert connection.recv(100).startswith(b"HTTP/1.1 200")
    served.wait_until(lambda: len(served.frontdoor.cancelled) == 2)
    assert [new.request for new in served.frontdoor.submitted] == served.frontdoor.cancelled


def test_a_server_that_stops_cancels_nothing(serving: Callable[..., Served]) -> None:
    """Tests that a stream cut by the server's end has no [DONE] and leaves its request open."""
    served = serving()
    served.do(lambda: served.frontdoor.hold(4))
    body = {"model": "tiny", "prompt": [5], "max_tokens": 9, "stream": True}
    data = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(data)}\r\n\r\n".encode()
    with socket.create_connection(("127.0.0.1", served.port), timeout=30) as connection:
        connection.sendall(head + data)
        served.wait_until(lambda: len(served.frontdoor.submitted) == 1)
        received = connection.recv(65536)
        served.stop()
        while part := connection.recv(65536):
            received += part
    assert received.startswith(b"HTTP/1.1 200")
    assert b"[DONE]" not in received
    assert [] == served.frontdoor.cancelled


@pytest.mark.parametrize("stream", [True, False])
def test_watches_that_end_early(serving: Callable[..., Served], stream: bool) -> None:
    """Tests that a daemon that stops is told apart from an answer that ended."""
    served = serving()
    served.do(lambda: served.frontdoor.hold(4))
    client, body = served.openai(), {"model": "tiny", "prompt": [5], "max_tokens": 9}
    served.loop.call_soon_threadsafe(lambda: served.loop.create_task(_end_when_submitted(served)))
    with pytest.raises(openai.APIError) as caught:
        list(client.completions.create(**body, stream=stream))  # type: ignore[call-overload]
    if not stream:
        assert isinstance(caught.value, openai.InternalServerError)
        assert (503, "false") == (caught.value.status_code, caught.value.response.headers["x-should-retry"])
        assert served.frontdoor.submitted[-1].request in str(caught.value)


async def _end_when_submitted(served: Served) -> None:
    import asyncio

    while not served.frontdoor.submitted:
        await asyncio.sleep(0.01)
    await asyncio.sleep(0.1)
    served.frontdoor.end_watches()


@pytest.mark.parametrize("stream", [True, False])
def test_a_failed_request_ends_with_error(serving: Callable[..., Served], stream: bool) -> None:
    """Tests that a request past its deadline ends with finish_reason error and is read back as failed."""
    served = serving()
    served.do(lambda: served.frontdoor.hold(4))

    async def fail() -> None:
        import asyncio

        while not served.frontdoor.submitted:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.1)
        served.frontdoor.fail(served.frontdoor.submitted[0].request, "deadline of 1 s passed")

    served.loop.call_soon_threadsafe(lambda: served.loop.create_task(fail()))
    client = served.openai()
    if stream:
        chunks = list(client.completions.create(model="tiny", prompt=[5], max_tokens=9, stream=True))
        assert "error" == chunks[-1].choices[0].finish_reason
    else:
        answer = client.completions.create(model="tiny", prompt=[5], max_tokens=9)
        assert "error" == answer.choices[0].finish_reason
    with served.http() as http:
        view = http.get(f"/v1/requests/{served.frontdoor.submitted[0].request}").json()
    assert ("failed", "deadline of 1 s passed") == (view["state"], view["error"])


def test_tokens_without_text_do_not_silence_a_stream(serving: Callable[..., Served]) -> None:
    """Tests that a stream whose tokens show no text still gets its comments."""
    served = serving(keep_alive_s=0.0)
    assert served.codec is not None
    served.frontdoor._rule = lambda prompt, choice, position: EOS
    body = {"model": "tiny", "prompt": [5], "max_tokens": 20, "ignore_eos": True, "stream": True}
    with served.http() as client:
        text = client.post("/v1/completions", json=body).text
    assert ": keep-alive" in text
    assert 1 == text.count("data: {")
    assert text.endswith("data: [DONE]\n\n")


def test_a_slow_reader_holds_only_itself_back(serving: Callable[..., Served]) -> None:
    """Tests that a client that does not read fills one bounded buffer while others are served."""
    served = serving()
    body = json.dumps({"model": "tiny", "prompt": [[5]] * 100, "n": 8, "max_tokens": 100, "stream": True}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n".encode()
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", served.port))
        connection.sendall(head + body)
        served.wait_until(lambda: len(served.frontdoor.submitted) == 100)
        answer = served.openai().completions.create(model="tiny", prompt=[5], max_tokens=4)
        assert "length" == answer.choices[0].finish_reason
    served.wait_until(lambda: len(served.frontdoor.cancelled) == 100)
