"""`/v1/completions` and `/v1/chat/completions`: one path from a validated body to accepted requests to an answer.

Nothing is answered before `submit` returned, so a client that got a header holds a durable request. A client that
goes away has its requests cancelled; a server that shuts down leaves them open.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from spotserve.api.choice import ChoiceFold, Kind, Piece
from spotserve.api.errors import HttpError
from spotserve.api.metrics import Metrics
from spotserve.api.streaming import DeltaFeed, EventStreamResponse, IndexedDelta, Watched, event, watch_disconnect
from spotserve.api.tokenizer import TextCodec
from spotserve.api.validation import (
    DEFAULT_COMPLETION_TOKENS,
    Fields,
    ModelInfo,
    Prompt,
    Wishes,
    check_scored_tokens,
    prompt_too_long,
    read_json_object,
    read_messages,
    read_model,
    read_prompts,
    read_wishes,
    resolve_max_tokens,
)
from spotserve.core.ids import RequestId
from spotserve.core.ports import Frontdoor, NewRequest
from spotserve.core.sampling import SamplingParameters
from spotserve.errors import InvariantError, RequestError

_LARGE_BODY_BYTES = 128 << 10
"""Bodies from here on are parsed in a thread, so that they do not hold up everybody's tokens."""
_CLIENT_CLOSED_REQUEST = 499
"""The status in our own log for a client that went away before its answer; nobody receives it."""


class GenerationEndpoints:
    """The two generating routes."""

    def __init__(
        self, frontdoor: Frontdoor, codec: TextCodec | None, model: ModelInfo, metrics: Metrics, *, keep_alive_s: float
    ) -> None:
        self._frontdoor = frontdoor
        self._codec = codec
        self._model = model
        self._metrics = metrics
        self._keep_alive_s = keep_alive_s

    async def completions(self, request: Request) -> Response:
        """POST /v1/completions."""
        fields = await _read_fields(request)
        read_model(fields, self._model)
        wishes = read_wishes(fields, self._model, kind="completion", has_text=self._codec is not None)
        prompts = [await self._encode(prompt) for prompt in read_prompts(fields, self._model)]
        return await self._generate(request, "completion", wishes, prompts)

    async def chat(self, request: Request) -> Response:
        """POST /v1/chat/completions."""
        fields = await _read_fields(request)
        read_model(fields, self._model)
        wishes = read_wishes(fields, self._model, kind="chat", has_text=self._codec is not None)
        messages = read_messages(fields)
        if self._codec is None or self._codec.template is None:
            raise RequestError("this model has no chat template", parameter="messages", hint="use /v1/completions")
        self._check_text_size(sum(len(message["content"].encode()) for message in messages))
        text = await self._codec.template.render_soon(messages)
        self._check_text_size(len(text.encode()))
        prompt = await asyncio.to_thread(self._codec.encode, text, add_special_tokens=False)
        if not prompt:
            raise RequestError("messages render to no token", parameter="messages")
        return await self._generate(request, "chat", wishes, [prompt])

    async def _encode(self, prompt: Prompt) -> tuple[int, ...]:
        if not isinstance(prompt, str):
            return prompt
        if self._codec is None:
            raise RequestError("a text prompt needs a tokenizer, which this model lacks; send ids", parameter="prompt")
        self._check_text_size(len(prompt.encode()))
        token_ids = await asyncio.to_thread(self._codec.encode, prompt)
        if not token_ids:
            raise RequestError("prompt has no token", parameter="prompt")
        return token_ids

    def _check_text_size(self, size_bytes: int) -> None:
        """Refuse what cannot fit before it is rendered or tokenised."""
        assert self._codec is not None
        if size_bytes > self._codec.max_text_bytes(self._model.max_model_len):
            least = size_bytes // self._codec.max_text_bytes(1)
            raise prompt_too_long(least, 1, self._model)

    async def _generate(
        self, request: Request, kind: Kind, wishes: Wishes, prompts: Sequence[tuple[int, ...]]
    ) -> Response:
        accepted = self._new_requests(request.state.request_id, kind, wishes, prompts)
        # Shielded: a server that shuts down meanwhile must not cut an acceptance in two.
        await asyncio.shield(self._frontdoor.submit(accepted))
        self._metrics.prompt_tokens += sum(len(prompt) for prompt in prompts)
        answer = Answer(kind, accepted, wishes, self._model, self._codec, self._metrics)
        feed = DeltaFeed(self._frontdoor, answer.watched)
        headers = {"x-request-ids": ",".join(new.request for new in accepted)} if len(accepted) > 1 else {}
        if wishes.stream:
            return EventStreamResponse(
                feed,
                answer,
                keep_alive_s=self._keep_alive_s,
                on_disconnect=lambda: self._cancel(accepted),
                headers=headers,
            )
        return await self._collect(request, feed, answer, accepted, headers)

    def _new_requests(
        self, first_id: RequestId, kind: Kind, wishes: Wishes, prompts: Sequence[tuple[int, ...]]
    ) -> list[NewRequest]:
        default = DEFAULT_COMPLETION_TOKENS if kind == "completion" else None
        check_scored_tokens(wishes, [len(prompt) for prompt in prompts])
        return [
            NewRequest(
                request=first_id if index == 0 else RequestId(secrets.token_hex(16)),
                prompt_ids=prompt,
                num_choices=wishes.num_choices,
                sampling=SamplingParameters(
                    temperature=wishes.temperature,
                    top_p=wishes.top_p,
                    top_k=wishes.top_k,
                    seed=secrets.randbits(63) if wishes.seed is None else wishes.seed,
                    max_tokens=resolve_max_tokens(wishes, len(prompt), self._model, default=default),
                    min_tokens=wishes.min_tokens,
                    ignore_eos=wishes.ignore_eos,
                    stop_token_ids=self._model.defaults.eos_token_ids,
                    presence_penalty=wishes.presence_penalty,
                    frequency_penalty=wishes.frequency_penalty,
                    logit_bias=wishes.logit_bias,
                    logprobs=wishes.logprobs,
                    prompt_logprobs=wishes.echo and wishes.logprobs is not None,
                ),
                stop=wishes.stop,
                timeout_s=wishes.timeout_s,
                keep_text={
                    "kind": kind,
                    "model": self._model.name,
                    "first_index": index * wishes.num_choices,
                    **({"echo": True} if wishes.echo else {}),
                },
            )
            for index, prompt in enumerate(prompts)
        ]

    async def _collect(
        self,
        request: Request,
        feed: DeltaFeed,
        answer: Answer,
        accepted: Sequence[NewRequest],
        headers: dict[str, str],
    ) -> Response:
        async with watch_disconnect(request.receive) as gone, feed:
            while not feed.exhausted and not gone.done():
                for indexed in await feed.next_deltas(gone, None):
                    answer.take(indexed)
            if gone.done() and not answer.complete:
                await self._cancel(accepted)
                return Response(status_code=_CLIENT_CLOSED_REQUEST)
        if not answer.complete:
            raise HttpError(
                503,
                f"the daemon stops; the request goes on at its next start: GET /v1/requests/{accepted[0].request}",
                reason="stopping",
                headers={"x-should-retry": "false"},
            )
        return JSONResponse(answer.body(), headers=headers)

    async def _cancel(self, accepted: Sequence[NewRequest]) -> None:
        for new in accepted:
            await self._frontdoor.cancel(new.request)


async def _read_fields(request: Request) -> Fields:
    data = await request.body()
    if len(data) < _LARGE_BODY_BYTES:
        return Fields(read_json_object(data))
    return Fields(await asyncio.to_thread(read_json_object, data))


@dataclass(slots=True)
class _Choice:
    """One choice of an answer as far as it has come."""

    fold: ChoiceFold
    pieces: list[Piece] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None


class Answer:
    """The answer to one generation request: fed with deltas, told as SSE events or as one body."""

    def __init__(
        self,
        kind: Kind,
        accepted: Sequence[NewRequest],
        wishes: Wishes,
        model: ModelInfo,
        codec: TextCodec | None,
        metrics: Metrics,
    ) -> None:
        self._kind = kind
        self._wishes = wishes
        self._model = model
        self._metrics = metrics
        self._num_prompt_tokens = sum(len(new.prompt_ids) for new in accepted)
        self._created_unix_s = int(time.time())
        self._accepted_s = time.monotonic()
        self._seen_token = False
        prefix = "cmpl-" if kind == "completion" else "chatcmpl-"
        self._id = prefix + accepted[0].request
        self.watched = [Watched(new.request, index * wishes.num_choices) for index, new in enumerate(accepted)]
        self._choices = [_Choice(ChoiceFold(new, codec)) for new in accepted for _ in range(wishes.num_choices)]

    @property
    def complete(self) -> bool:
        """True when every choice has ended."""
        return all(choice.finish_reason is not None for choice in self._choices)

    def take(self, indexed: IndexedDelta) -> Piece:
        """Add a delta; returns what becomes visible with it."""
        choice, delta = self._choices[indexed.index], indexed.delta
        gap = bool(delta.token_ids) and delta.position != len(choice.token_ids)
        if gap or choice.finish_reason is not None:
            raise InvariantError(
                f"choice {indexed.index} got position {delta.position} after {len(choice.token_ids)} tokens"
            )
        if delta.token_ids and not self._seen_token:
            self._seen_token = True
            self._metrics.time_to_first_token.observe(time.monotonic() - self._accepted_s)
        self._metrics.generation_tokens += len(delta.token_ids)
        piece = choice.fold.begin(delta.prompt_logprobs) if delta.position == 0 else Piece()
        piece += choice.fold.push(delta.token_ids, delta.logprobs)
        if delta.finish_reason is not None:
            piece += choice.fold.close()
        choice.token_ids.extend(delta.token_ids)
        choice.finish_reason = delta.finish_reason
        choice.pieces.append(piece)
        return piece

    def body(self) -> dict[str, Any]:
        """The whole answer."""
        choices = []
        for index, choice in enumerate(self._choices):
            piece = Piece(
                "".join(piece.text for piece in choice.pieces),
                tuple(entry for piece in choice.pieces for entry in piece.entries),
            )
            content: dict[str, Any] = (
                {"text": piece.text}
                if self._kind == "completion"
                else {"message": {"role": "assistant", "content": piece.text, "refusal": None}}
            )
            logprobs = choice.fold.logprobs(piece)
            choices.append(self._choice(index, content, choice.token_ids, choice.finish_reason, logprobs))
        name = "text_completion" if self._kind == "completion" else "chat.completion"
        return {**self._envelope(name, choices), "usage": self._usage()}

    def opening(self) -> bytes:
        """A chat begins with the role of each choice."""
        if self._kind == "completion":
            return b""
        delta = {"delta": {"role": "assistant", "content": ""}}
        return b"".join(self._chunk([self._choice(index, delta, [], None)]) for index in range(len(self._choices)))

    def events(self, indexed: IndexedDelta) -> bytes:
        """The chunk of one delta; none while all its text is held back and nobody asked for ids or logprobs."""
        piece, delta = self.take(indexed), indexed.delta
        if not (piece.text or piece.entries or delta.finish_reason is not None or self._wishes.return_token_ids):
            return b""
        chat_delta = {"content": piece.text} if piece.text else {}
        content: dict[str, Any] = {"text": piece.text} if self._kind == "completion" else {"delta": chat_delta}
        logprobs = self._choices[indexed.index].fold.logprobs(piece) if piece.entries else None
        return self._chunk([self._choice(indexed.index, content, delta.token_ids, delta.finish_reason, logprobs)])

    def closing(self) -> bytes:
        """The usage chunk, where asked for."""
        return self._chunk([], usage=self._usage()) if self._wishes.include_usage else b""

    def _choice(
        self,
        index: int,
        content: dict[str, Any],
        token_ids: Sequence[int],
        finish_reason: str | None,
        logprobs: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        choice = {"index": index, **content, "logprobs": logprobs, "finish_reason": finish_reason}
        if self._wishes.return_token_ids:
            choice["token_ids"] = list(token_ids)
        return choice

    def _chunk(self, choices: list[dict[str, Any]], usage: dict[str, Any] | None = None) -> bytes:
        name = "text_completion" if self._kind == "completion" else "chat.completion.chunk"
        chunk = self._envelope(name, choices)
        if self._wishes.include_usage:
            chunk["usage"] = usage
        return event(chunk)

    def _envelope(self, name: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self._id,
            "object": name,
            "created": self._created_unix_s,
            "model": self._model.name,
            "choices": choices,
        }

    def _usage(self) -> dict[str, int]:
        completion_tokens = sum(len(choice.token_ids) for choice in self._choices)
        return {
            "prompt_tokens": self._num_prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": self._num_prompt_tokens + completion_tokens,
        }
