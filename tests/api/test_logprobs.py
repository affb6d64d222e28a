"""Logprobs and echo in OpenAI's two shapes, the same streamed, plain, fetched and continued."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable
from typing import Any

import pytest

from spotserve.api.choice import ChoiceFold, token_name
from spotserve.api.tokenizer import TextCodec
from spotserve.core.ids import RequestId
from spotserve.core.ports import NewRequest
from spotserve.core.sampling import SamplingParameters, TokenLogprobs
from tests.api.conftest import Served
from tests.api.folder import metaspace_tokenizer
from tests.api.test_generation import answer_ids
from tests.api.test_requests import continuation

NUM_TOKENS = 70
"""More than the answer of the fake: umlauts and an emoji whose bytes are tokens of their own are in it."""


def post(served: Served, path: str = "/v1/completions", **fields: Any) -> tuple[str, dict[str, Any]]:
    """A plain answer and its request's id."""
    content = {"messages": [{"role": "user", "content": "hi"}]} if "chat" in path else {"prompt": "the grüße"}
    with served.http() as client:
        response = client.post(path, json={"model": "tiny", **content, "max_tokens": NUM_TOKENS, **fields})
    assert 200 == response.status_code, response.text
    return response.headers["x-request-id"], response.json()


def streamed(served: Served, path: str = "/v1/completions", **fields: Any) -> list[dict[str, Any]]:
    """The choices of a stream's chunks."""
    content = {"messages": [{"role": "user", "content": "hi"}]} if "chat" in path else {"prompt": "the grüße"}
    body = {"model": "tiny", **content, "max_tokens": NUM_TOKENS, "stream": True, **fields}
    with served.http() as client:
        text = client.post(path, json=body).text
    lines = [line[6:] for line in text.split("\n") if line.startswith("data: ")]
    assert "[DONE]" == lines.pop()
    return [choice for line in lines for choice in json.loads(line)["choices"]]


def put_together(pieces: list[dict[str, Any] | None]) -> dict[str, list[Any]]:
    """Columns or contents of chunks, one behind the other."""
    whole: dict[str, list[Any]] = {}
    for piece in pieces:
        for name, values in (piece or {}).items():
            if values is not None:
                whole.setdefault(name, []).extend(values)
    return whole


def fetched(served: Served, request: str) -> dict[str, Any]:
    """`GET /v1/requests/{id}`."""
    with served.http() as client:
        return dict(client.get(f"/v1/requests/{request}").json())


def test_a_completions_logprobs(shared: Served) -> None:
    """Tests every column of the legacy shape against the fake's numbers, the sampled token among the likeliest."""
    _, answer = post(shared, logprobs=2)
    codec = shared.codec
    assert codec is not None
    (choice,) = answer["choices"]
    ids = answer_ids(shared, NUM_TOKENS)
    names = [token_name(codec, token_id) for token_id in ids]
    assert names == choice["logprobs"]["tokens"]
    assert [-token_id - at / 1000 for at, token_id in enumerate(ids)] == choice["logprobs"]["token_logprobs"]
    top = [{token_name(codec, 5): -6.0, token_name(codec, 6): -7.0} for _ in ids]
    for at, (name, token_id) in enumerate(zip(names, ids, strict=True)):
        top[at][name] = -token_id - at / 1000
    assert top == choice["logprobs"]["top_logprobs"]


def test_offsets_point_at_the_text(shared: Served) -> None:
    """Tests that what stands at an offset is its token, or its tokens where a character's bytes lie over several."""
    _, answer = post(shared, logprobs=0, echo=True)
    (choice,) = answer["choices"]
    codec, text = shared.codec, choice["text"]
    assert codec is not None
    token_ids = [*codec.encode("the grüße"), *answer_ids(shared, NUM_TOKENS)]
    offsets = choice["logprobs"]["text_offset"]
    assert any(name.startswith("bytes:") for name in choice["logprobs"]["tokens"])
    assert len(token_ids) == len(offsets)
    assert sorted(offsets) == offsets
    for offset in set(offsets):
        data = [codec.token_bytes(token) or b"" for token, at in zip(token_ids, offsets, strict=True) if at == offset]
        assert text.startswith(b"".join(data).decode().removeprefix("<s>"), offset)


def test_a_chats_logprobs(shared: Served) -> None:
    """Tests the content list with the official client: token, bytes, logprob and the likeliest others."""
    answer = shared.openai().chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": "hi"}],
        max_tokens=NUM_TOKENS,
        logprobs=True,
        top_logprobs=3,
        n=2,
    )
    assert shared.codec is not None
    for choice in answer.choices:
        ids = answer_ids(shared, NUM_TOKENS, choice=choice.index)
        assert choice.logprobs is not None
        assert choice.logprobs.content is not None
        assert [-token_id - at / 1000 for at, token_id in enumerate(ids)] == [
            token.logprob for token in choice.logprobs.content
        ]
        assert [[-6.0, -7.0, -8.0]] * NUM_TOKENS == [
            [top.logprob for top in token.top_logprobs] for token in choice.logprobs.content
        ]
        data = b"".join(bytes(token.bytes or []) for token in choice.logprobs.content)
        assert choice.message.content == data.decode(errors="replace")


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
@pytest.mark.parametrize("stop", [None, "own fo", "🙂"])
def test_every_way_of_reading_agrees(shared: Served, path: str, stop: str | None) -> None:
    """Tests that plain, streamed, fetched and continued answers have the same text and logprobs, each once."""
    fields = {"logprobs": True, "top_logprobs": 2} if "chat" in path else {"logprobs": 2, "echo": True}
    request, answer = post(shared, path, n=2, stop=stop, **fields)
    view = fetched(shared, request)
    chunks = streamed(shared, path, n=2, stop=stop, **fields)
    continued = [chunk["choices"][0] for chunk in continuation(shared, request, -1)]
    for index, choice in enumerate(answer["choices"]):
        text = choice["message"]["content"] if "chat" in path else choice["text"]
        expected = put_together([choice["logprobs"]])
        assert (text, expected) == (view["choices"][index]["text"], put_together([view["choices"][index]["logprobs"]]))
        mine = [chunk for chunk in chunks if chunk["index"] == index]
        pieces = [chunk["delta"].get("content", "") if "chat" in path else chunk["text"] for chunk in mine]
        assert (text, expected) == ("".join(pieces), put_together([chunk["logprobs"] for chunk in mine]))
        rest = [chunk for chunk in continued if chunk["index"] == index]
        assert (text, expected) == (
            "".join(chunk["text"] for chunk in rest),
            put_together([chunk["logprobs"] for chunk in rest]),
        )


@pytest.mark.parametrize("starting_after", [0, 1, 17, 61])
def test_a_continuation_brings_the_rest(shared: Served, starting_after: int) -> None:
    """Tests that logprobs past a position are those of the whole answer, offsets included, without the prompt."""
    request, answer = post(shared, logprobs=1, echo=True)
    (choice,) = answer["choices"]
    chunks = [chunk["choices"][0] for chunk in continuation(shared, request, starting_after)]
    num_left = NUM_TOKENS - starting_after - 1
    expected = {name: values[-num_left:] for name, values in choice["logprobs"].items()}
    assert expected == put_together([chunk["logprobs"] for chunk in chunks])
    assert choice["text"].endswith("".join(chunk["text"] for chunk in chunks))


def test_an_echo_comes_first(shared: Served) -> None:
    """Tests that an echoed prompt precedes what would come without it, and that its first token has no logprob."""
    codec = shared.codec
    assert codec is not None
    _, plain = post(shared)
    _, echoed = post(shared, echo=True)
    assert "the grüße" + plain["choices"][0]["text"] == echoed["choices"][0]["text"]
    assert echoed["choices"][0]["logprobs"] is None
    prompt_ids = codec.encode("the grüße")
    _, scored = post(shared, echo=True, logprobs=1)
    logprobs = scored["choices"][0]["logprobs"]
    assert [None, *(-token_id - at / 1000 for at, token_id in enumerate(prompt_ids) if at)] == logprobs[
        "token_logprobs"
    ][: len(prompt_ids)]
    assert [None, None] == [logprobs["token_logprobs"][0], logprobs["top_logprobs"][0]]
    assert "<s>" == logprobs["tokens"][0]


def fold_of(codec: TextCodec, prompt: tuple[int, ...], logprobs: int | None, stop: tuple[str, ...] = ()) -> ChoiceFold:
    """The fold of a request that echoes this prompt."""
    sampling = SamplingParameters(seed=1, max_tokens=9, logprobs=logprobs, prompt_logprobs=logprobs is not None)
    kept = {"kind": "completion", "echo": True}
    request = NewRequest(
        request=RequestId("a"), prompt_ids=prompt, num_choices=1, sampling=sampling, stop=stop, keep_text=kept
    )
    return ChoiceFold(request, codec)


@pytest.mark.parametrize("stop", [(), ("cd",)])
def test_an_echo_keeps_the_space_behind_it(stop: tuple[str, ...]) -> None:
    """Tests that a decoder that strips a text's first space strips none between echo and answer, offsets included."""
    codec = TextCodec(metaspace_tokenizer(), eos_token_ids=(2,), template=None)
    prompt, token_ids = codec.encode("ab a"), codec.encode("ab cd a", add_special_tokens=False)
    whole = codec.decode((*prompt, *token_ids))
    assert "ab a ab cd a" == whole
    fold = fold_of(codec, prompt, 0, stop)
    scores = [TokenLogprobs(-1.0)] * (len(prompt) + len(token_ids))
    piece = fold.begin(scores[: len(prompt) - 1])
    for token_id in token_ids:
        piece += fold.push([token_id], scores[:1])
    piece += fold.close()
    assert (whole.partition("cd")[0] if stop else whole) == piece.text
    logprobs = fold.logprobs(piece)
    assert logprobs is not None
    for name, at in zip(logprobs["tokens"][2:], logprobs["text_offset"][2:], strict=True):
        assert whole.startswith(name, at)


@pytest.mark.parametrize("logprobs", [None, 0])
def test_a_long_echo_is_put_together_once(logprobs: int | None) -> None:
    """Tests that of a long prompt the fold keeps how long its text is, not the text, which is made once."""
    codec = TextCodec(metaspace_tokenizer(), eos_token_ids=(2,), template=None)
    prompt = codec.encode("ab " * 5_000)
    fold = fold_of(codec, prompt, logprobs)
    piece = fold.begin([TokenLogprobs(-1.0)] * (len(prompt) - 1))
    assert codec.decode(prompt) == piece.text
    assert (0 if logprobs is None else len(prompt)) == len(piece.entries)
    if logprobs is None:
        assert fold._offsets is None
        return
    assert not [held for held in gc.get_referents(fold._offsets) if isinstance(held, str)]
    letter = fold.push(codec.encode("b", add_special_tokens=False)[-1:], [TokenLogprobs(-1.0)])
    following = fold.push(codec.encode("b", add_special_tokens=False)[-1:], [TokenLogprobs(-1.0)])
    assert [len(piece.text), len(piece.text + letter.text)] == [one.entries[0][3] for one in (letter, following)]


@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_is_scored_without_an_answer(shared: Served, stream: bool) -> None:
    """Tests that `max_tokens` 0 answers the prompt with its logprobs, a request that can be fetched like others."""
    fields = {"echo": True, "logprobs": 0, "max_tokens": 0}
    (choice,) = streamed(shared, **fields) if stream else post(shared, **fields)[1]["choices"]
    assert ("the grüße", "length") == (choice["text"], choice["finish_reason"])
    assert shared.codec is not None
    assert len(shared.codec.encode("the grüße")) == len(choice["logprobs"]["token_logprobs"])
    request, answer = post(shared, **fields)
    assert 0 == answer["usage"]["completion_tokens"]
    assert answer["choices"][0]["logprobs"] == fetched(shared, request)["choices"][0]["logprobs"]


def test_a_stream_waits_for_no_text(shared: Served) -> None:
    """Tests that logprobs of tokens whose text is held back come with their tokens."""
    chunks = streamed(shared, logprobs=0, stop="the quick brown fox jumps over the lazy cat")
    assert "" == chunks[0]["text"]
    assert chunks[0]["logprobs"]["tokens"]


def test_prompts_of_ids_and_several_of_them(shared: Served) -> None:
    """Tests that each of several prompts is echoed with its own choices."""
    _, answer = post(shared, prompt=[[5, 6], [7, 8, 9]], n=2, echo=True, logprobs=0, max_tokens=2)
    assert [4, 4, 5, 5] == [len(choice["logprobs"]["tokens"]) for choice in answer["choices"]]


def test_without_tokenizer_tokens_are_their_ids(serving: Callable[..., Served]) -> None:
    """Tests that a model without tokenizer tells ids as strings, and no text."""
    served = serving(folder=None)
    request, answer = post(served, prompt=[5, 6], logprobs=1, echo=True, max_tokens=3)
    (choice,) = answer["choices"]
    expected = {
        "tokens": ["5", "6", "10", "11", "12"],
        "token_logprobs": [None, -6.001, -10.0, -11.001, -12.002],
        "top_logprobs": [
            None,
            {"5": -6.0, "6": -6.001},
            {"5": -6.0, "10": -10.0},
            {"5": -6.0, "11": -11.001},
            {"5": -6.0, "12": -12.002},
        ],
        "text_offset": [0, 0, 0, 0, 0],
    }
    assert ("", expected) == (choice["text"], choice["logprobs"])
    assert expected == fetched(served, request)["choices"][0]["logprobs"]


def test_what_a_client_asked_for_reaches_the_engine(shared: Served) -> None:
    """Tests that penalties, bias and least tokens are handed on, sorted and without what adds nothing."""
    post(
        shared,
        presence_penalty=-1.5,
        frequency_penalty=2,
        logit_bias={"12": -100, "5": 0.5, "7": 0},
        min_tokens=3,
        max_tokens=5,
    )
    sampling = shared.frontdoor.submitted[-1].sampling
    assert (-1.5, 2.0, 3) == (sampling.presence_penalty, sampling.frequency_penalty, sampling.min_tokens)
    assert ((5, 0.5), (12, -100.0)) == sampling.logit_bias
    assert (None, False) == (sampling.logprobs, sampling.prompt_logprobs)


def test_a_stop_string_behind_the_least_tokens(shared: Served) -> None:
    """Tests that a stop string within `min_tokens` is text, in the answer and when it is fetched."""
    ids = answer_ids(shared, NUM_TOKENS)
    assert shared.codec is not None
    early = len(shared.codec.encode("the quick", add_special_tokens=False))
    request, answer = post(shared, stop="the", min_tokens=early, return_token_ids=True)
    (choice,) = answer["choices"]
    assert ("the quick brown fox jumps over ", "stop") == (choice["text"], choice["finish_reason"])
    assert choice["text"] == fetched(shared, request)["choices"][0]["text"]
    assert ids[: len(choice["token_ids"])] == choice["token_ids"]
