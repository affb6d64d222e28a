"""Penalties, bias, `min_tokens`, logprobs, echo and stop strings through a notice, a kill and a new coordinator.

Answers are compared whole: text, ids, every float of every logprob, offsets and reasons, as an undisturbed client got
them. The stop string lies in text whose characters are spread over several tokens, so that every cut splits some.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx2 as httpx
import pytest

from spotserve.api.text import Detokenizer
from spotserve.api.tokenizer import TextCodec
from spotserve.app import BUILTIN_MODEL
from spotserve.core.events import RequestAccepted
from tests.e2e.scene import PACED, PATIENCE_S, Scene, playing

pytestmark = pytest.mark.e2e

ARGS = ("--instances", "4", "--gpu-memory", "32MiB", "-dp", "1", "-pp", "2", "-tp", "1", "--orphan-timeout", "60")
EOS = 1
NUM_TOKENS = 320
LEAST_TOKENS = 300
STOP_FROM = 240
"""The stop string begins at this token or a little before."""
LEAST_STOP = 150
NUM_ECHOED = 300
NUM_BEFORE = 12
LONG_PROMPT = "To import a module, 東京 🙂 naïve, write import. " * 16
"""More than a prefill chunk."""
CHARACTER = "東"


def byte_bias(codec: TextCodec) -> dict[str, int]:
    """A bias that leaves nothing but the three bytes of a character, each a token of its own.

    In any order: nearly every cut of such tokens leaves some behind that are not a character yet.
    """
    single = {codec.token_bytes(token_id): token_id for token_id in range(2048)}
    return {str(single[bytes([byte])]): 100 for byte in CHARACTER.encode()}


def requests_of(codec: TextCodec) -> dict[str, tuple[str, dict[str, Any]]]:
    """Path and fields of what is asked at once; by name."""
    common = {"max_tokens": NUM_TOKENS, "ignore_eos": True, "return_token_ids": True, "seed": 17}
    # EOS would be the first token, were it not for `min_tokens`.
    steered = {"logit_bias": {str(EOS): 100, "300": 2.5, "301": -100}, "min_tokens": LEAST_TOKENS, "ignore_eos": False}
    penalties = {"presence_penalty": 0.6, "frequency_penalty": 0.4}
    question = [{"role": "user", "content": "What is a dictionary?"}]
    return {
        "steered": (
            "/v1/completions",
            {**common, **steered, **penalties, "prompt": "A dictionary is", "temperature": 0.9, "n": 2, "logprobs": 5},
        ),
        "chat": (
            "/v1/chat/completions",
            {**common, "messages": question, "temperature": 0, "logprobs": True, "top_logprobs": 3, **penalties},
        ),
        "bytes": (
            "/v1/completions",
            {
                **common,
                "prompt": "é 東京 🙂",
                "temperature": 2.0,
                "top_p": 1.0,
                "logit_bias": byte_bias(codec),
                "logprobs": 2,
                "n": 2,
            },
        ),
        "echo": (
            "/v1/completions",
            {
                **common,
                "prompt": LONG_PROMPT,
                "max_tokens": NUM_ECHOED,
                "temperature": 0.5,
                "echo": True,
                "logprobs": 3,
            },
        ),
    }


SCORING = {"prompt": LONG_PROMPT, "max_tokens": 0, "echo": True, "logprobs": 5}


@dataclass
class Watched:
    """A streamed request: what came of it, put together as a plain answer would have it."""

    request: str = ""
    choices: dict[int, dict[str, Any]] = field(default_factory=dict)
    done: threading.Event = field(default_factory=threading.Event)

    def take(self, choice: dict[str, Any]) -> None:
        """One choice of a chunk."""
        mine = self.choices.setdefault(
            choice["index"], {"text": "", "token_ids": [], "logprobs": {}, "finish_reason": None}
        )
        mine["text"] += choice["text"] if "text" in choice else choice["delta"].get("content", "")
        mine["token_ids"] += choice.get("token_ids") or []
        mine["finish_reason"] = choice["finish_reason"]
        for name, values in (choice.get("logprobs") or {}).items():
            if values is not None:
                mine["logprobs"].setdefault(name, []).extend(values)

    @property
    def num_tokens(self) -> int:
        """Of the choice that has fewest."""
        return min((len(choice["token_ids"]) for choice in self.choices.values()), default=0)


def follow(method: str, url: str, watched: Watched, **options: Any) -> None:
    """Take a stream until it ends or is cut."""
    try:
        with httpx.stream(method, url, timeout=PATIENCE_S, **options) as answer:
            watched.request = answer.headers["x-request-id"]
            for line in answer.iter_lines():
                if line.startswith("data: {"):
                    for choice in json.loads(line.removeprefix("data: "))["choices"]:
                        watched.take(choice)
    except httpx.TransportError:
        pass  # The coordinator was killed.
    finally:
        watched.done.set()


class Play:
    """A scene, what is asked in it, and what nobody disturbed answered."""

    def __init__(self, scene: Scene) -> None:
        self.scene = scene
        codec = TextCodec.load(BUILTIN_MODEL)
        assert codec is not None
        self.codec = codec
        self.requests = requests_of(codec)
        self.model = scene.daemon.model()
        whole = self.watch_to_end(self.ask("bytes"))["bytes"]
        self.requests["bytes"][1]["stop"] = late_stop(whole.choices[0])
        self.expected = {name: watched.choices for name, watched in self.watch_to_end(self.ask()).items()}
        self.expected_score = self.score()

    def ask(self, *names: str) -> dict[str, Watched]:
        """These requests, or all, at once, streamed in threads."""
        asked = {}
        for name in names or self.requests:
            path, fields = self.requests[name]
            asked[name] = Watched()
            body = {"model": self.model, "stream": True, **fields}
            arguments = ("POST", f"{self.scene.daemon.url}{path}", asked[name])
            threading.Thread(target=follow, args=arguments, kwargs={"json": body}, daemon=True).start()
        self.scene.num_accepted += len(asked)
        return asked

    def decoding(self) -> dict[str, Watched]:
        """Every request at once, each past its first tokens."""
        asked = self.ask()
        deadline_s = time.monotonic() + PATIENCE_S
        while any(watched.num_tokens < NUM_BEFORE for watched in asked.values()):
            assert time.monotonic() < deadline_s
            time.sleep(0.005)
        assert not any(watched.done.is_set() for watched in asked.values())
        return asked

    def watch_to_end(self, asked: dict[str, Watched]) -> dict[str, Watched]:
        """All of them ended."""
        for watched in asked.values():
            assert watched.done.wait(PATIENCE_S)
        return asked

    def score(self) -> dict[str, Any]:
        """A plain answer that is a prompt's logprobs."""
        self.scene.num_accepted += 1
        url = f"{self.scene.daemon.url}/v1/completions"
        answer = httpx.post(url, json={"model": self.model, **SCORING}, timeout=PATIENCE_S)
        assert 200 == answer.status_code, answer.text
        (choice,) = answer.json()["choices"]
        return dict(choice)

    def continued(self, request: str, after: int = -1) -> dict[int, dict[str, Any]]:
        """`GET /v1/requests/{id}?starting_after=N`, put together."""
        watched = Watched()
        url = f"{self.scene.daemon.url}/v1/requests/{request}"
        follow("GET", url, watched, params={"starting_after": after})
        return watched.choices

    def check_fetched(self, request: str, expected: dict[int, dict[str, Any]]) -> None:
        """What is fetched is what was streamed."""
        fetched = self.scene.daemon.fetch(request)
        for choice in fetched["choices"]:
            told = {name: values for name, values in choice["logprobs"].items() if values is not None}
            actual = {**{name: choice[name] for name in ("text", "token_ids", "finish_reason")}, "logprobs": told}
            assert expected[choice["index"]] == actual

    def cuts(self, request: str) -> dict[int, list[int]]:
        """Per choice, the positions at which another generation went on."""
        found: dict[int, list[int]] = {}
        last: dict[int, int] = {}
        for choice, position, _, _, generation in self.scene.daemon.ledger_rows(request):
            if last.setdefault(choice, generation) != generation:
                found.setdefault(choice, []).append(position)
            last[choice] = generation
        return found


def late_stop(choice: dict[str, Any]) -> str:
    """A stop string that first comes past the middle and has the character in it, as late as there is one."""
    text = str(choice["text"])
    for start in choice["logprobs"]["text_offset"][STOP_FROM:LEAST_STOP:-1]:
        stop = text[start : text.find(CHARACTER, start) + 1]
        if 2 <= len(stop) <= 80 and text.find(stop) == start:
            return stop
    raise AssertionError("no such string")


@pytest.fixture(scope="module")
def play(tmp_path_factory: pytest.TempPathFactory, daemon_environment: dict[str, str]) -> Iterator[Play]:
    """One replica of two stages, two spare instances, slow links."""
    # The shortest of the streams, the one with the stop string, must outlast the migration.
    env = {**daemon_environment, **PACED, "SPOTSERVE_LINK_BYTES_PER_S": "8000000"}
    with playing(tmp_path_factory.mktemp("generation"), *ARGS, env=env, max_tokens=150) as scene:
        yield Play(scene)


def test_undisturbed_answers_show_the_features(play: Play) -> None:
    """Tests that what the others compare with has what it is there for: each feature left its mark."""
    for choice in play.expected["steered"].values():
        # Not before its least tokens, and then at once: the bias allows nothing else.
        assert ("stop", LEAST_TOKENS + 1, EOS) == (
            choice["finish_reason"],
            len(choice["token_ids"]),
            choice["token_ids"][-1],
        )
        assert choice["token_ids"].count(301) == 0
        assert 6 in {len(top) for top in choice["logprobs"]["top_logprobs"]}
    steered = play.expected["steered"]
    assert steered[0]["token_ids"] != steered[1]["token_ids"]
    (chat,) = play.expected["chat"].values()
    assert (NUM_TOKENS, "length") == (len(chat["logprobs"]["content"]), chat["finish_reason"])
    stop = play.requests["bytes"][1]["stop"]
    stopped = play.expected["bytes"][0]
    assert ("stop", True) == (stopped["finish_reason"], LEAST_STOP < len(stopped["token_ids"]) < NUM_TOKENS)
    assert stop not in stopped["text"]
    (echo,) = play.expected["echo"].values()
    assert echo["text"].startswith(LONG_PROMPT)
    num_prompt = len(play.codec.encode(LONG_PROMPT))
    assert num_prompt > 256
    assert num_prompt + NUM_ECHOED == len(echo["logprobs"]["tokens"])
    score = play.expected_score
    assert (LONG_PROMPT, "length") == (score["text"], score["finish_reason"])
    assert echo["logprobs"]["token_logprobs"][:num_prompt] == score["logprobs"]["token_logprobs"]
    accepted = [entry.event for entry in play.scene.entries() if isinstance(entry.event, RequestAccepted)]
    assert {()} == {event.sampling.logit_bias for event in accepted}, "the journal holds what a client cares about"


def test_a_notice_moves_it_all(play: Play) -> None:
    """Tests that answers across a live migration, KV moved and nothing recomputed, are whole, with the same bits."""
    scene, asked = play.scene, play.decoding()
    noticed = scene.serving()[1]
    scene.notice(noticed, 30)
    play.watch_to_end(asked)
    assert play.expected == {name: watched.choices for name, watched in asked.items()}
    line = scene.daemon.status()["migrations"][-1]
    assert ("notice", "completed", 0) == (line["trigger"], line["outcome"], line["recomputed_tokens"])
    assert line["kv_bytes"] > 0
    scene.kill(noticed)
    scene.settle()
    scene.fill_up()
    for name, watched in asked.items():
        assert set(play.cuts(watched.request)) == set(play.expected[name]), f"{name} ended before the migration"
        play.check_fetched(watched.request, play.expected[name])
    assert is_split(play, asked["bytes"]), "no cut lies within a character"


def is_split(play: Play, watched: Watched) -> bool:
    """Whether a cut lies between two tokens of one character."""
    for choice, positions in play.cuts(watched.request).items():
        detokenizer = Detokenizer(play.codec)
        pieces = [detokenizer.push(token_id) for token_id in watched.choices[choice]["token_ids"][: positions[0]]]
        if not pieces[-1]:
            return True
    return False


def test_a_kill_recomputes_it_all(play: Play) -> None:
    """Tests that answers across the loss of a leader and all KV are whole, with the same bits."""
    scene, asked = play.scene, play.decoding()
    scene.kill(scene.serving()[0])
    assert play.expected_score == play.score()
    play.watch_to_end(asked)
    assert play.expected == {name: watched.choices for name, watched in asked.items()}
    scene.settle()
    assert scene.daemon.status()["migrations"][-1]["recomputed_tokens"] > 0
    scene.fill_up()
    for name, watched in asked.items():
        assert set(play.cuts(watched.request)) == set(play.expected[name]), f"{name} ended before the kill"


def test_a_new_coordinator_has_it_all(play: Play) -> None:
    """Tests that what clients read after a `kill -9` of the coordinator is what they would have got, from anywhere."""
    scene, asked = play.scene, play.decoding()
    scene.daemon.kill9()
    play.watch_to_end(asked)
    scene.daemon.start()
    for name, watched in asked.items():
        expected = play.expected[name]
        assert expected == play.continued(watched.request)
        rest = play.continued(watched.request, NUM_BEFORE - 1)
        for index, choice in expected.items():
            assert choice["token_ids"][NUM_BEFORE:] == rest[index]["token_ids"]
            num_left = len(rest[index]["token_ids"])
            assert {column: values[-num_left:] for column, values in choice["logprobs"].items()} == rest[index][
                "logprobs"
            ]
            assert choice["text"].endswith(rest[index]["text"])
            seen = watched.choices[index]
            assert choice["token_ids"][: len(seen["token_ids"])] == seen["token_ids"]
            for column, values in seen["logprobs"].items():
                assert choice["logprobs"][column][: len(values)] == values
        play.check_fetched(watched.request, expected)
    scene.settle()
