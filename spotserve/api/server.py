"""The HTTP front door: the routes, what stands before all of them, and uvicorn inside the coordinator's loop.

Every route says for itself who may use it (`_Access`): no decision is made on the text of a URL. The gate around
all routes gives each answer its `x-request-id`, turns our own bugs into a plain 500 and writes one log line.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import secrets
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any, Literal

import uvicorn
from starlette.applications import Starlette
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

import spotserve
from spotserve.api.admin import AdminEndpoints, is_loopback, require_local
from spotserve.api.errors import HttpError, admin_error, error_body, openai_error
from spotserve.api.generation import GenerationEndpoints
from spotserve.api.metrics import Metrics
from spotserve.api.protocol import ReceiptBounds, bounded_protocol
from spotserve.api.requests import RequestEndpoints
from spotserve.api.tokenizer import TextCodec
from spotserve.api.validation import ModelInfo, check_model
from spotserve.core.ids import RequestId
from spotserve.core.ports import Administration, Frontdoor
from spotserve.errors import PortError, SpecError, SpotServeError
from spotserve.log import get_logger

_Access = Literal["public", "key", "admin"]
_Handler = Callable[[Request], Awaitable[Response]]
_log = get_logger("api")

_IDLE_CONNECTION_S = 75
_CLOSE_STREAMS_S = 1
"""How long open streams may go on once the server is told to end; the drain has happened before."""


def check_exposure(host: str, api_key: str | None) -> None:
    """Refuse to listen beyond loopback without an API key.

    Raises:
        SpecError: The host is not loopback and there is no key.
    """
    if api_key is not None and not api_key:
        raise SpecError("the API key is empty", hint="leave it out, or set SPOTSERVE_API_KEY to a secret")
    if not is_loopback(host) and api_key is None:
        raise SpecError(
            f"host {host} can be reached from other machines and no API key is set",
            hint="set SPOTSERVE_API_KEY, or listen on 127.0.0.1",
        )


def build_app(
    frontdoor: Frontdoor,
    administration: Administration,
    codec: TextCodec | None,
    model: ModelInfo,
    *,
    api_key: str | None = None,
    keep_alive_s: float = 5.0,
) -> Starlette:
    """The ASGI application.

    Args:
        frontdoor: Where generation requests go.
        administration: Where admin verbs go.
        codec: The model's tokenizer; None serves ids only.
        model: What clients may know of the model.
        api_key: Bearer token required on every route but `/health`; None requires none.
        keep_alive_s: A stream that says nothing for this long gets a comment.
    """
    metrics = Metrics()
    generation = GenerationEndpoints(frontdoor, codec, model, metrics, keep_alive_s=keep_alive_s)
    requests = RequestEndpoints(frontdoor, codec, model, keep_alive_s=keep_alive_s)
    admin = AdminEndpoints(administration)
    public = PublicEndpoints(frontdoor, administration, model, metrics)
    guard = _Guard(api_key)

    def route(method: str, path: str, handler: _Handler, access: _Access = "key") -> Route:
        return Route(path, guard.protect(path, handler, access), methods=[method])

    routes = [
        route("GET", "/health", public.health, "public"),
        route("GET", "/version", public.version),
        route("GET", "/metrics", public.metrics),
        route("GET", "/v1/models", public.models),
        route("GET", "/v1/models/{model:path}", public.model),
        route("POST", "/v1/completions", generation.completions),
        route("POST", "/v1/chat/completions", generation.chat),
        route("GET", "/v1/requests/{request}", requests.read),
        route("GET", "/admin/status", admin.status, "admin"),
        route("GET", "/admin/snapshot", admin.snapshot, "admin"),
        route("POST", "/admin/notice", admin.notice, "admin"),
        route("POST", "/admin/kill", admin.kill, "admin"),
        route("POST", "/admin/add-instance", admin.add_instance, "admin"),
        route("POST", "/admin/stop", admin.stop, "admin"),
        route("POST", "/admin/apply", admin.apply, "admin"),
    ]

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        yield
        if codec is not None:
            await asyncio.to_thread(codec.close)

    return Starlette(
        routes=routes,
        middleware=[Middleware(Gate, metrics=metrics)],
        exception_handlers={HTTPException: _routing_error},
        lifespan=lifespan,
    )


class PublicEndpoints:
    """What is known without generating anything."""

    def __init__(
        self, frontdoor: Frontdoor, administration: Administration, model: ModelInfo, metrics: Metrics
    ) -> None:
        self._frontdoor = frontdoor
        self._administration = administration
        self._model = model
        self._metrics = metrics

    async def health(self, request: Request) -> Response:
        """GET /health: 503 before the first serving, then 200 in every state."""
        ready = self._frontdoor.ready
        headers = {} if ready else {"retry-after": "1"}
        return JSONResponse({"state": self._frontdoor.state}, 200 if ready else 503, headers=headers)

    async def version(self, request: Request) -> Response:
        """GET /version."""
        return JSONResponse({"version": spotserve.__version__})

    async def metrics(self, request: Request) -> Response:
        """GET /metrics."""
        text = self._metrics.render(self._administration.status(), self._frontdoor.state)
        return PlainTextResponse(text, media_type="text/plain; version=0.0.4")

    async def models(self, request: Request) -> Response:
        """GET /v1/models."""
        self._require_ready()
        return JSONResponse({"object": "list", "data": [self._card()]})

    async def model(self, request: Request) -> Response:
        """GET /v1/models/{id}."""
        self._require_ready()
        check_model(request.path_params["model"], self._model)
        return JSONResponse(self._card())

    def _require_ready(self) -> None:
        if not self._frontdoor.ready:
            raise HttpError(503, "the daemon is starting", reason="not_serving", headers={"retry-after": "1"})

    def _card(self) -> dict[str, Any]:
        model = self._model
        return {
            "id": model.name,
            "object": "model",
            "created": model.created_unix_s,
            "owned_by": "spotserve",
            "root": model.name,
            "max_model_len": model.max_model_len,
        }


class _Guard:
    """Wraps a handler with who may call it, and its errors with the body its callers understand."""

    def __init__(self, api_key: str | None) -> None:
        self._key_digest = None if api_key is None else hashlib.sha256(api_key.encode()).digest()

    def protect(self, path: str, handler: _Handler, access: _Access) -> _Handler:
        """The handler as the route at `path` calls it."""
        answer_error = admin_error if access == "admin" else openai_error

        async def protected(request: Request) -> Response:
            request.state.route = path
            try:
                if access == "admin":
                    require_local(request)
                if access != "public":
                    self._require_key(request)
                return await handler(request)
            except SpotServeError as error:
                return answer_error(error)

        return protected

    def _require_key(self, request: Request) -> None:
        """Compare digests: equal length, so that the time taken says nothing about the key."""
        if self._key_digest is None:
            return
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        given = hashlib.sha256(token.strip().encode("utf-8", "surrogateescape")).digest()
        if not hmac.compare_digest(given, self._key_digest) or scheme.lower() != "bearer":
            raise HttpError(
                401,
                "the API key is missing or wrong",
                reason="invalid_api_key",
                hint="send Authorization: Bearer KEY",
                headers={"www-authenticate": "Bearer"},
            )


async def _routing_error(request: Request, error: Exception) -> Response:
    """Unknown paths and wrong methods, in OpenAI's shape."""
    assert isinstance(error, HTTPException)
    reason = "method_not_allowed" if error.status_code == 405 else "unknown_route"
    body = error_body(error.status_code, str(error.detail), reason=reason)
    return JSONResponse(body, error.status_code, headers=error.headers)


class Gate:
    """Stands around the whole application: request id, the last catch, one log line, one count."""

    def __init__(self, app: ASGIApp, *, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = RequestId(secrets.token_hex(16))
        scope.setdefault("state", {})["request_id"] = request_id
        status, began_s = 0, time.monotonic()

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except ClientDisconnect:
            _log.info("client_left_early", request=request_id)
        except Exception:  # noqa: BLE001 - the last catch: one bad request must not end more than itself
            _log.exception("request_broke", request=request_id)
            if status == 0:
                body = error_body(
                    500, "internal error; the server's log has it by x-request-id", reason="internal_error"
                )
                await JSONResponse(body, 500)(scope, receive, send_with_id)
        finally:
            route = scope["state"].get("route", "other")
            self._metrics.count_response(route, status)
            if route not in ("/health", "/metrics"):
                _log.info(
                    "request_answered",
                    request=request_id,
                    method=scope["method"],
                    route=route,
                    status=status,
                    duration_s=round(time.monotonic() - began_s, 4),
                )


async def serve(
    app: ASGIApp,
    listener: socket.socket,
    on_started: Callable[[str], None] | None = None,
    *,
    bounds: ReceiptBounds | None = None,
) -> None:
    """Listen and serve inside the running loop until cancelled; signals stay the caller's.

    Args:
        app: What `build_app` made.
        listener: What `bind` made; closed at the end.
        on_started: Called with the URL once connections are taken.
        bounds: Limits of what a peer may send and how slowly.
    """
    config = uvicorn.Config(
        app,
        http=bounded_protocol(bounds or ReceiptBounds()),
        ws="none",
        lifespan="on",
        log_config=None,
        log_level="critical",
        access_log=False,
        server_header=False,
        timeout_keep_alive=_IDLE_CONNECTION_S,
        timeout_graceful_shutdown=_CLOSE_STREAMS_S,
        backlog=2048,
    )
    server = _Server(config, on_started=lambda: on_started(_url(listener)) if on_started else None)
    running = asyncio.create_task(server.serve(sockets=[listener]))
    try:
        await asyncio.shield(running)
    except asyncio.CancelledError:
        server.should_exit = True
        await running
        raise
    finally:
        listener.close()


class _Server(uvicorn.Server):
    """uvicorn without its signal handlers: SIGINT and SIGTERM begin the coordinator's drain, not uvicorn's exit."""

    def __init__(self, config: uvicorn.Config, *, on_started: Callable[[], None]) -> None:
        super().__init__(config)
        self._on_started = on_started

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._on_started()


def bind(host: str, port: int) -> socket.socket:
    """A socket that owns the address; nobody can connect before `serve` listens on it.

    Raises:
        SpecError: There is no such address.
        PortError: The address cannot be had.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, OverflowError, UnicodeError) as error:
        raise SpecError(f"host {host} port {port} is no address: {error}") from error
    family, _, _, _, address = min(found, key=lambda entry: entry[0] != socket.AF_INET)
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.setblocking(False)
    except OSError as error:
        listener.close()
        raise PortError(
            f"port {port} on {host} cannot be used: {error.strerror}", hint="choose another with --port"
        ) from error
    return listener


def _url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
