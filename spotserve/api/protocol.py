"""uvicorn's httptools protocol with what it lacks: bounds on headers and body, and deadlines for receiving them.

A peer that sends its headers or body too slowly, too large or malformed gets one answer in OpenAI's error shape and
is closed, before the application sees the request. Requests are not pipelined: a second one before the first is
answered is refused, so that a connection is always read and a disconnect always noticed.
"""

from __future__ import annotations

import asyncio
import json
import secrets
from dataclasses import dataclass
from typing import Any

from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol
from uvicorn.server import ServerState

from spotserve.api.admin import is_loopback
from spotserve.api.errors import error_body

_LINGER_S = 2.0
"""How long a refused peer may go on reading before the socket is closed under it."""


@dataclass(frozen=True, slots=True)
class ReceiptBounds:
    """How much a peer may send, and how long it may take."""

    header_bytes: int = 32 << 10
    num_headers: int = 100
    body_bytes: int = 4 << 20
    plan_bytes: int = 64 << 20
    """Bound of a plan file, which a local program hands to `/admin/apply`."""
    header_deadline_s: float = 10.0
    body_deadline_s: float = 30.0


class BoundedProtocol(HttpToolsProtocol):
    """One connection; `bounds` is set by a subclass made for the server (`bounded_protocol`)."""

    bounds = ReceiptBounds()

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self._receiving_headers = True
        self._header_bytes = 0
        self._body_bytes = 0
        self._body_bound_bytes = self.bounds.body_bytes
        self._refused = False
        self._deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._expect("headers", self.bounds.header_deadline_s)

    def connection_lost(self, exc: Exception | None) -> None:
        self._expect_nothing()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._refused:
            return
        if self._receiving_headers:
            if self._deadline is None and not self._answering():
                self._expect("headers", self.bounds.header_deadline_s)
            self._header_bytes += len(data)
        super().data_received(data)
        if self._receiving_headers and self._header_bytes > self.bounds.header_bytes:
            self._refuse_headers()

    # Parser callbacks

    def on_message_begin(self) -> None:
        if self._answering():
            self._refuse(400, "a request before the answer to the last one is not supported", "pipelined_request")
            return
        super().on_message_begin()

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self._refused:
            super().on_header(name, value)

    def on_url(self, url: bytes) -> None:
        if not self._refused:
            super().on_url(url)

    def on_headers_complete(self) -> None:
        if self._refused:
            return
        self._receiving_headers = False
        size = len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)
        if size > self.bounds.header_bytes or len(self.headers) > self.bounds.num_headers:
            self._refuse_headers()
            return
        self._body_bound_bytes = self.bounds.plan_bytes if self._brings_plan() else self.bounds.body_bytes
        length = next((value for name, value in self.headers if name == b"content-length"), b"0")
        if int(length) > self._body_bound_bytes:
            self._refuse_body()
            return
        self._body_bytes = 0
        self._expect("body", self.bounds.body_deadline_s)
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        if self._refused:
            return
        self._body_bytes += len(body)
        if self._body_bytes > self._body_bound_bytes:
            self._refuse_body()
            return
        super().on_body(body)

    def on_message_complete(self) -> None:
        if self._refused:
            return
        self._expect_nothing()
        self._receiving_headers = True
        self._header_bytes = 0
        super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        """What uvicorn calls for bytes that are no HTTP request."""
        self._refuse(400, "the bytes received are not an HTTP request", "invalid_http")

    # Deadlines and refusals

    def _brings_plan(self) -> bool:
        return bytes(self.url) == b"/admin/apply" and self.client is not None and is_loopback(self.client[0])

    def _answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _expect(self, what: str, deadline_s: float) -> None:
        self._expect_nothing()
        self._deadline = self.loop.call_later(deadline_s, self._too_slow, what, deadline_s)

    def _expect_nothing(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _too_slow(self, what: str, deadline_s: float) -> None:
        self._deadline = None
        self._refuse(408, f"the {what} did not arrive within {deadline_s:g} s", "request_timeout")

    def _refuse_headers(self) -> None:
        bounds = self.bounds
        message = f"the headers exceed {bounds.header_bytes} bytes or {bounds.num_headers} lines"
        self._refuse(431, message, "headers_too_large")

    def _refuse_body(self) -> None:
        self._refuse(413, f"the body exceeds {self._body_bound_bytes} bytes", "body_too_large")

    def _refuse(self, status: int, message: str, reason: str) -> None:
        """Answer once, unless an answer is already under way, and close; what still arrives is dropped."""
        if self._refused or self.transport.is_closing():
            return
        self._refused = True
        self._expect_nothing()
        cycle = self.cycle
        unanswered = cycle is None or cycle.response_complete or not cycle.response_started
        if cycle is not None and not cycle.response_complete:
            cycle.disconnected = True
            cycle.message_event.set()
        if not unanswered:
            self.transport.close()
            return
        self.flow.resume_reading()
        self.transport.write(_answer(status, message, reason))
        self.transport.write_eof()
        self.loop.call_later(_LINGER_S, self.transport.close)


def _answer(status: int, message: str, reason: str) -> bytes:
    body = json.dumps(error_body(status, message, reason=reason)).encode()
    head = (
        f"content-type: application/json\r\ncontent-length: {len(body)}\r\n"
        f"x-request-id: {secrets.token_hex(16)}\r\nconnection: close\r\n\r\n"
    )
    return STATUS_LINE[status] + head.encode() + body


def bounded_protocol(bounds: ReceiptBounds) -> type[BoundedProtocol]:
    """The protocol class of a server with these bounds."""
    return type("BoundedProtocol", (BoundedProtocol,), {"bounds": bounds})
