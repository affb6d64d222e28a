"""The HTTP surface with real processes behind it: what the API tests prove against a fake, on the real thing."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2 as httpx
import openai
import pytest

from spotserve.api.tokenizer import TextCodec
from spotserve.app import BUILTIN_MODEL
from spotserve.core.spec import KV_BLOCK_TOKENS
from tests.e2e.daemon import RunningDaemon, running
from tests.e2e.models import VOCAB_SIZE, write_profile, write_tiny

pytestmark = pytest.mark.e2e

MODEL = "spotserve-builtin"
PROMPT = "The for statement is used to"
QUESTION = [{"role": "user", "content": "What is a dictionary?"}]
KEY = "open-sesame"
MAX_RUNNING = 2
MAX_QUEUE = 2


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory, daemon_environment: dict[str, str]) -> Iterator[RunningDaemon]:
    """The built-in model as `make run` serves it."""
    with running(tmp_path_factory.mktemp("http") / "state", env=daemon_environment) as started:
        yield started


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory, daemon_environment: dict[str, str]) -> Iterator[httpx.Client]:
    """A client with the key of a daemon that has no tokenizer, wants a key and lets hardly anybody wait."""
    folder = tmp_path_factory.mktemp("bare")
    model = write_tiny(folder / "tiny")
    write_profile(model, Path(daemon_environment["SPOTSERVE_PROFILE_CACHE"]))
    arguments = ["--instances", "1", "--gpu-memory", "16MiB", "--max-num-seqs", str(MAX_RUNNING)]
    arguments += ["--max-queue", str(MAX_QUEUE)]
    environment = {**daemon_environment, "SPOTSERVE_API_KEY": KEY}
    with running(folder / "state", str(model), *arguments, env=environment) as started:
        headers = {"authorization": f"Bearer {KEY}"}
        with httpx.Client(base_url=started.url, headers=headers, timeout=180.0) as client:
            yield client


def post(daemon: RunningDaemon, path: str, **body: Any) -> httpx.Response:
    """One call of the front door, greedy unless told otherwise."""
    return httpx.post(f"{daemon.url}{path}", json={"model": MODEL, "temperature": 0, **body}, timeout=180.0)


def completion(daemon: RunningDaemon, **body: Any) -> dict[str, Any]:
    """A plain completion that is accepted."""
    answer = post(daemon, "/v1/completions", **body)
    assert 200 == answer.status_code, answer.text
    return {**answer.json(), "request": answer.headers["x-request-id"]}


def test_a_stream_says_what_the_plain_answer_says(daemon: RunningDaemon) -> None:
    """Tests with the openai client that text, ids and usage of completions and chats agree, streamed or not."""
    client = openai.OpenAI(base_url=f"{daemon.url}/v1", api_key="none", max_retries=0)
    extra = {"return_token_ids": True}
    plain = client.chat.completions.create(model=MODEL, messages=QUESTION, temperature=0, extra_body=extra)
    chunks = list(
        client.chat.completions.create(
            model=MODEL,
            messages=QUESTION,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
            extra_body=extra,
        )
    )
    choices = [choice for chunk in chunks for choice in chunk.choices]
    assert plain.choices[0].message.content == "".join(choice.delta.content or "" for choice in choices)
    assert plain.choices[0].token_ids == [one for choice in choices for one in choice.token_ids or []]
    assert ("stop", "stop") == (plain.choices[0].finish_reason, choices[-1].finish_reason)
    assert plain.usage == chunks[-1].usage
    assert len(plain.choices[0].token_ids) == plain.usage.completion_tokens
    whole = client.completions.create(model=MODEL, prompt=PROMPT, temperature=0, max_tokens=24)
    pieces = client.completions.create(model=MODEL, prompt=PROMPT, temperature=0, max_tokens=24, stream=True)
    assert whole.choices[0].text == "".join(piece.choices[0].text for piece in pieces)


def test_ids_and_texts_are_one_prompt(daemon: RunningDaemon) -> None:
    """Tests that a text, its ids, and both in a list give the same tokens."""
    codec = TextCodec.load(BUILTIN_MODEL)
    assert codec is not None
    ids = list(codec.encode(PROMPT))
    fields = {"max_tokens": 16, "return_token_ids": True}
    text = completion(daemon, prompt=PROMPT, **fields)
    assert len(ids) == text["usage"]["prompt_tokens"]
    expected = text["choices"][0]["token_ids"]
    assert expected == completion(daemon, prompt=ids, **fields)["choices"][0]["token_ids"]
    both = completion(daemon, prompt=[ids, ids], **fields)
    assert [expected, expected] == [choice["token_ids"] for choice in both["choices"]]


def test_choices_are_drawn_apart(daemon: RunningDaemon) -> None:
    """Tests that n=2 gives two different samples, and the same two for the same seed."""
    fields = {"prompt": PROMPT, "n": 2, "seed": 11, "temperature": 1.0, "max_tokens": 40, "ignore_eos": True}
    first = completion(daemon, **fields, return_token_ids=True)
    again = completion(daemon, **fields, return_token_ids=True)
    assert [0, 1] == [choice["index"] for choice in first["choices"]]
    assert first["choices"][0]["token_ids"] != first["choices"][1]["token_ids"]
    assert first["choices"] == again["choices"]
    assert 80 == first["usage"]["completion_tokens"]


def test_a_stop_string_ends_the_text_before_it(daemon: RunningDaemon) -> None:
    """Tests that a stop string that lies in the middle of an answer cuts it, streamed or not."""
    text = completion(daemon, prompt=PROMPT, max_tokens=48)["choices"][0]["text"]
    stop = text[len(text) // 2 : len(text) // 2 + 4]
    cut = completion(daemon, prompt=PROMPT, max_tokens=48, stop=[stop])["choices"][0]
    assert (text[: text.index(stop)], "stop") == (cut["text"], cut["finish_reason"])


def test_a_request_can_be_fetched(daemon: RunningDaemon) -> None:
    """Tests that GET of a request gives the durable record, and with starting_after what is past a position."""
    stream = daemon.stream(PROMPT, max_tokens=60)
    ids = stream.wait()
    record = daemon.fetch(stream.request)
    assert ("request", "finished", None) == (record["object"], record["state"], record["error"])
    assert [(0, ids, "length")] == [
        (choice["index"], choice["token_ids"], choice["finish_reason"]) for choice in record["choices"]
    ]
    lines = httpx.get(f"{daemon.url}/v1/requests/{stream.request}?starting_after=49", timeout=30.0).text.splitlines()
    data = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
    assert "[DONE]" == data[-1]
    later = [choice for chunk in map(json.loads, data[:-1]) for choice in chunk["choices"]]
    assert ids[50:] == [one for choice in later for one in choice["token_ids"]]
    unknown = httpx.get(f"{daemon.url}/v1/requests/{'0' * 32}", timeout=30.0)
    assert 404 == unknown.status_code


@pytest.mark.parametrize(
    ("body", "parameter"),
    [
        ({"prompt": [2**31]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": [True]}, "prompt"),
        ({"prompt": [1.0]}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": [5] * 1024}, "prompt"),
        ({"prompt": "x", "n": 0}, "n"),
        ({"prompt": "x", "stop": ""}, "stop"),
        ({"prompt": "x", "max_tokens": "8"}, "max_tokens"),
    ],
)
def test_refused_before_anything_is_allocated(daemon: RunningDaemon, body: dict[str, Any], parameter: str) -> None:
    """Tests that a bad field is a 400 that names it, with an id, and counts as no request."""
    before = daemon.status()["requests"]
    answer = post(daemon, "/v1/completions", **body)
    assert (400, parameter) == (answer.status_code, answer.json()["error"]["param"])
    assert 32 == len(answer.headers["x-request-id"])
    assert before == daemon.status()["requests"]


def test_a_disconnect_gives_the_memory_back(daemon: RunningDaemon) -> None:
    """Tests that streams left early are cancelled, and that twice the KV pools can be left behind that way."""
    before = daemon.status()["requests"]["cancelled"]
    replicas = httpx.get(f"{daemon.url}/admin/snapshot", timeout=30.0).json()["snapshot"]["world"]["replicas"]
    pool_tokens = KV_BLOCK_TOKENS * sum(replica["kv_blocks"] for replica in replicas)
    prompt = [5 + index % 500 for index in range(800)]
    num_left = 1 + 2 * pool_tokens // len(prompt)
    for _ in range(num_left):
        leave_early(daemon, prompt)
    daemon.wait_for(lambda: daemon.status()["requests"]["cancelled"] == before + num_left, "cancelled")
    assert (0, 0) == tuple(daemon.status()["requests"][state] for state in ("running", "queued"))
    full = [daemon.stream([7] * 800, max_tokens=200) for _ in replicas]
    assert [200] * len(replicas) == [len(stream.wait()) for stream in full]


def leave_early(daemon: RunningDaemon, prompt: list[int]) -> None:
    """Begin a long stream and hang up at its first token."""
    body = {"model": MODEL, "prompt": prompt, "max_tokens": 200, "stream": True, "ignore_eos": True}
    with httpx.stream("POST", f"{daemon.url}/v1/completions", json=body, timeout=60.0) as answer:
        next(line for line in answer.iter_lines() if line.startswith("data: "))


def test_a_deadline_ends_a_request(daemon: RunningDaemon) -> None:
    """Tests that timeout_s ends a choice with finish_reason error and its request as failed, tokens kept."""
    before = daemon.status()["requests"]["failed"]
    stream = daemon.stream(PROMPT, max_tokens=1000, timeout_s=0.5)
    assert stream.done.wait(60)
    record = daemon.fetch(stream.request)
    assert ("failed", "error") == (record["state"], record["choices"][0]["finish_reason"])
    assert stream.token_ids == record["choices"][0]["token_ids"]
    assert before + 1 == daemon.status()["requests"]["failed"]


def test_ids_only_without_a_tokenizer(bare: httpx.Client) -> None:
    """Tests that a folder without tokenizer refuses texts and chats with 400 and serves ids."""
    body = {"model": "tiny", "prompt": [3, 4, 5], "max_tokens": 8, "temperature": 0, "ignore_eos": True}
    served = bare.post("/v1/completions", json={**body, "return_token_ids": True})
    assert 200 == served.status_code, served.text
    ids = served.json()["choices"][0]["token_ids"]
    assert 8 == len(ids)
    assert all(0 <= one < VOCAB_SIZE for one in ids)
    assert 400 == bare.post("/v1/completions", json={**body, "prompt": "text"}).status_code
    assert 400 == bare.post("/v1/chat/completions", json={"model": "tiny", "messages": QUESTION}).status_code


def test_the_key_opens_everything_but_health(bare: httpx.Client) -> None:
    """Tests that with an API key every route but /health answers 401 without it."""
    url = str(bare.base_url).rstrip("/")
    for path in ("/v1/models", "/v1/requests/x", "/metrics", "/admin/status"):
        assert 401 == httpx.get(url + path, timeout=30.0).status_code, path
        assert 401 == httpx.get(url + path, headers={"authorization": "Bearer wrong"}, timeout=30.0).status_code, path
    assert 200 == httpx.get(f"{url}/health", timeout=30.0).status_code
    assert 200 == bare.get("/v1/models").status_code


def test_a_full_queue_is_told_and_the_accepted_are_served(bare: httpx.Client) -> None:
    """Tests that past --max-queue clients get 429 with Retry-After, and whoever was accepted gets an answer."""
    body = {"model": "tiny", "prompt": [3] * 64, "max_tokens": 200, "ignore_eos": True}
    with ThreadPoolExecutor(16) as clients:
        answers = list(clients.map(lambda _: bare.post("/v1/completions", json=body), range(16)))
    codes = sorted(answer.status_code for answer in answers)
    assert {200, 429} == set(codes)
    assert codes.count(200) >= MAX_QUEUE
    refused = next(answer for answer in answers if answer.status_code == 429)
    assert ("queue_full", True) == (refused.json()["error"]["code"], int(refused.headers["retry-after"]) >= 1)
    deadline_s = time.monotonic() + 30
    while bare.post("/v1/completions", json={**body, "max_tokens": 1}).status_code != 200:
        assert time.monotonic() < deadline_s
