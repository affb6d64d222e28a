"""`GET /v1/requests/{id}`: what became of a request, after a restart too, and its tokens from any position on."""

from __future__ import annotations

import asyncio
import re
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from spotserve.api.choice import ChoiceFold, Piece, whole_choice
from spotserve.api.errors import HttpError
from spotserve.api.streaming import DeltaFeed, EventStreamResponse, IndexedDelta, Watched, event
from spotserve.api.tokenizer import TextCodec
from spotserve.api.validation import ModelInfo
from spotserve.core.ids import RequestId
from spotserve.core.ports import Frontdoor, RequestView
from spotserve.errors import RequestError

_REQUEST_ID = re.compile(r"[0-9a-f]{32}")
_POSITION = re.compile(r"-1|0|[1-9][0-9]{0,9}")


class RequestEndpoints:
    """The reading route for accepted requests. Reading never changes a request."""

    def __init__(self, frontdoor: Frontdoor, codec: TextCodec | None, model: ModelInfo, *, keep_alive_s: float) -> None:
        self._frontdoor = frontdoor
        self._codec = codec
        self._model = model
        self._keep_alive_s = keep_alive_s

    async def read(self, request: Request) -> Response:
        """GET /v1/requests/{id}, as JSON or, with `starting_after`, as a stream."""
        starting_after = _read_starting_after(request)
        view = await self._view(request.path_params["request"])
        if starting_after is None:
            return JSONResponse(await asyncio.to_thread(self._body, view))
        source = Continuation(view, self._codec, self._model_name(view), starting_after)
        feed = DeltaFeed(self._frontdoor, [Watched(view.request, _first_index(view))])
        return EventStreamResponse(feed, source, keep_alive_s=self._keep_alive_s)

    async def _view(self, name: str) -> RequestView:
        view = await self._frontdoor.view(RequestId(name)) if _REQUEST_ID.fullmatch(name) else None
        if view is None:
            raise HttpError(404, "no such request, or it ended too long ago", reason="request_not_found")
        return view

    def _model_name(self, view: RequestView) -> str:
        return str(view.keep_text.get("model", self._model.name))

    def _body(self, view: RequestView) -> dict[str, Any]:
        choices = []
        for choice in view.choices:
            text, logprobs = whole_choice(view, self._codec, choice.choice)
            told: dict[str, Any] = {
                "index": _first_index(view) + choice.choice,
                "token_ids": list(choice.token_ids),
                "text": text,
                "finish_reason": choice.finish_reason,
            }
            choices.append(told if logprobs is None else {**told, "logprobs": logprobs})
        return {
            "id": view.request,
            "object": "request",
            "model": self._model_name(view),
            "created": view.created_unix_s,
            "state": view.state,
            "prompt_tokens": len(view.prompt_ids),
            "choices": choices,
            "error": view.error,
        }


def _first_index(view: RequestView) -> int:
    """A completion of several prompts counts its choices through; each prompt is a request of its own."""
    return int(view.keep_text.get("first_index", 0))


def _read_starting_after(request: Request) -> int | None:
    values = request.query_params.getlist("starting_after")
    if not values:
        return None
    if len(values) > 1 or not _POSITION.fullmatch(values[0]):
        raise RequestError(
            f"starting_after {values[-1][:32]!r} is not an integer of -1 or more", parameter="starting_after"
        )
    return int(values[0])


class Continuation:
    """The tokens of a request past a position. Text and logprobs continue exactly where those up to there ended."""

    def __init__(self, view: RequestView, codec: TextCodec | None, model_name: str, starting_after: int) -> None:
        self._request = view.request
        self._model_name = model_name
        self._created_unix_s = view.created_unix_s
        self._first = starting_after + 1
        indices = [_first_index(view) + choice.choice for choice in view.choices]
        self._folds = {index: ChoiceFold(view, codec) for index in indices}
        self._open = set(indices)

    @property
    def complete(self) -> bool:
        """True when every choice has ended."""
        return not self._open

    def opening(self) -> bytes:
        """Nothing comes before the tokens."""
        return b""

    def events(self, indexed: IndexedDelta) -> bytes:
        """The part of a delta past the position; tokens before it only move the text along."""
        delta = indexed.delta
        num_known = min(max(0, self._first - delta.position), len(delta.token_ids))
        fold = self._folds[indexed.index]
        echo = fold.begin(delta.prompt_logprobs) if delta.position == 0 else Piece()
        fold.push(delta.token_ids[:num_known], delta.logprobs[:num_known])
        piece = echo if self._first == 0 else Piece()
        piece += fold.push(delta.token_ids[num_known:], delta.logprobs[num_known:])
        if delta.finish_reason is not None:
            self._open.discard(indexed.index)
            piece += fold.close()
        token_ids = list(delta.token_ids[num_known:])
        if not token_ids and delta.finish_reason is None:
            return b""
        position = delta.position + num_known
        choice = {
            "index": indexed.index,
            "position": position,
            "token_ids": token_ids,
            "text": piece.text,
            "finish_reason": delta.finish_reason,
        }
        if fold.tells_logprobs:
            choice["logprobs"] = fold.logprobs(piece)
        return event(
            {
                "id": self._request,
                "object": "request.chunk",
                "created": self._created_unix_s,
                "model": self._model_name,
                "position": position,
                "choices": [choice],
            }
        )

    def closing(self) -> bytes:
        """Nothing but `[DONE]` comes after the tokens."""
        return b""
