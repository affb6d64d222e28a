"""Durable tokens on their way to a client: several watches merged into one feed, and a feed sent as SSE.

A feed never runs ahead of its reader by more than a bounded queue: a slow client holds its own watch back and
nobody else's, the ledger keeps its tokens.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Protocol

from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from spotserve.core.ids import RequestId
from spotserve.core.ports import ChoiceDelta, Frontdoor

_QUEUED_DELTAS = 256
DONE = b"data: [DONE]\n\n"
_KEEP_ALIVE = b": keep-alive\n\n"


def event(value: dict[str, Any]) -> bytes:
    """One SSE event with JSON data."""
    return b"data: " + json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


@dataclass(frozen=True, slots=True)
class Watched:
    """A request to watch; its choices are told to the client as `first_index` + choice."""

    request: RequestId
    first_index: int = 0


@dataclass(frozen=True, slots=True)
class IndexedDelta:
    """New tokens of the choice that the client knows by `index`."""

    index: int
    delta: ChoiceDelta


@dataclass(frozen=True, slots=True)
class _Ended:
    """A watch is over, well or not."""

    error: Exception | None


class DeltaFeed:
    """The watches of one HTTP answer, merged. Use it as an async context: leaving it ends the watches."""

    def __init__(self, frontdoor: Frontdoor, watched: Sequence[Watched]) -> None:
        self._frontdoor = frontdoor
        self._watched = tuple(watched)
        self._num_running = len(self._watched)
        self._queue: asyncio.Queue[IndexedDelta | _Ended] = asyncio.Queue(_QUEUED_DELTAS)
        self._pumps: list[asyncio.Task[None]] = []
        self._getter: asyncio.Task[IndexedDelta | _Ended] | None = None

    async def __aenter__(self) -> DeltaFeed:
        self._pumps = [asyncio.create_task(self._pump(watched)) for watched in self._watched]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        tasks = [*self._pumps, *([self._getter] if self._getter is not None else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    @property
    def exhausted(self) -> bool:
        """True when every watch is over and everything was handed out."""
        return self._num_running == 0

    async def next_deltas(self, gone: asyncio.Future[None], timeout_s: float | None) -> list[IndexedDelta]:
        """What has come, waiting for at least one delta; empty on a time-out, when `gone` is done, or at the end.

        Raises:
            Exception: What a watch raised.
        """
        if self._getter is None:
            self._getter = asyncio.create_task(self._queue.get())
        waited: set[asyncio.Future[Any]] = {self._getter, gone}
        await asyncio.wait(waited, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        if gone.done() or not self._getter.done():
            return []
        items = [self._getter.result()]
        self._getter = None
        while not self._queue.empty():
            items.append(self._queue.get_nowait())
        deltas = []
        for item in items:
            if isinstance(item, IndexedDelta):
                deltas.append(item)
                continue
            self._num_running -= 1
            if item.error is not None:
                raise item.error
        return deltas

    async def _pump(self, watched: Watched) -> None:
        error: Exception | None = None
        try:
            async for delta in self._frontdoor.watch(watched.request):
                await self._queue.put(IndexedDelta(watched.first_index + delta.choice, delta))
        except Exception as failure:  # noqa: BLE001 - raised again by the reader of the feed
            error = failure
        await self._queue.put(_Ended(error))


class EventSource(Protocol):
    """Turns deltas into SSE events; one per stream."""

    @property
    def complete(self) -> bool:
        """True when every choice has ended."""

    def opening(self) -> bytes:
        """Events before the first token."""

    def events(self, indexed: IndexedDelta) -> bytes:
        """Events for one delta, possibly none."""

    def closing(self) -> bytes:
        """Events after the last token, before `[DONE]`."""


class EventStreamResponse(Response):
    """A feed as an SSE answer, with comments while nothing comes.

    A stream whose watches end before its choices do (the daemon stops) is cut without `[DONE]`: the client can tell
    that it did not see the end. Only a client that goes away is told to `on_disconnect`; a server that shuts down
    is not, so that the request stays open.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        feed: DeltaFeed,
        source: EventSource,
        *,
        keep_alive_s: float,
        on_disconnect: Callable[[], Awaitable[None]] | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(headers={"cache-control": "no-store", "x-accel-buffering": "no", **(headers or {})})
        del self.headers["content-length"]
        self._feed = feed
        self._source = source
        self._keep_alive_s = keep_alive_s
        self._on_disconnect = on_disconnect

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async with watch_disconnect(receive) as gone, self._feed as feed:
            await send(_body(self._source.opening()))
            clock = asyncio.get_running_loop().time
            silent_until_s = clock() + self._keep_alive_s
            while not feed.exhausted and not gone.done():
                deltas = await feed.next_deltas(gone, max(0.0, silent_until_s - clock()))
                data = b"".join(self._source.events(indexed) for indexed in deltas)
                if data or clock() >= silent_until_s:
                    await send(_body(data or _KEEP_ALIVE))
                    silent_until_s = clock() + self._keep_alive_s
            if self._source.complete:
                await send(_body(self._source.closing() + DONE, more=False))
            elif gone.done() and self._on_disconnect is not None:
                await self._on_disconnect()


def _body(data: bytes, *, more: bool = True) -> Message:
    return {"type": "http.response.body", "body": data, "more_body": more}


class watch_disconnect:  # noqa: N801 - read as a statement: `async with watch_disconnect(receive) as gone`
    """A future that is done once the client has gone away, for as long as the context lasts."""

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> asyncio.Task[None]:
        self._task = asyncio.create_task(self._wait())
        return self._task

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        assert self._task is not None
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    async def _wait(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
