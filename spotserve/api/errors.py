"""The error bodies of the HTTP front door: OpenAI's shape for `/v1`, message + hint + exit code for `/admin`.

One table says which HTTP status an error of ours has. Messages carry what, value and bound, never an internal.
"""

from __future__ import annotations

from dataclasses import dataclass

from starlette.responses import JSONResponse

from spotserve.errors import (
    InfeasibleError,
    NotServingError,
    PlanRefusedError,
    QueueFullError,
    RequestError,
    SpecError,
    SpotServeError,
    UnknownInstanceError,
)


class HttpError(SpotServeError):
    """An answer of the front door itself, with its HTTP status and OpenAI's `code` and `param`."""

    code = "SPS-121"

    def __init__(
        self,
        status: int,
        message: str,
        *,
        reason: str,
        parameter: str | None = None,
        hint: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message, hint=hint)
        self.status = status
        self.reason = reason
        self.parameter = parameter
        self.headers = headers or {}


@dataclass(frozen=True, slots=True)
class _Answer:
    """How one class of errors is told to a client."""

    status: int
    reason: str | None
    headers: tuple[tuple[str, str], ...] = ()


_ANSWERS: tuple[tuple[type[SpotServeError], _Answer], ...] = (
    (QueueFullError, _Answer(429, "queue_full", (("retry-after", "1"),))),
    (NotServingError, _Answer(503, "not_serving", (("retry-after", "2"),))),
    (UnknownInstanceError, _Answer(404, "unknown_instance")),
    (PlanRefusedError, _Answer(409, "plan_refused")),
    (InfeasibleError, _Answer(409, "infeasible")),
    (RequestError, _Answer(400, None)),
    (SpecError, _Answer(400, None)),
    (SpotServeError, _Answer(500, "internal_error")),
)
_KINDS = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}


def error_body(
    status: int, message: str, *, parameter: str | None = None, reason: str | None = None
) -> dict[str, object]:
    """OpenAI's error object for a status."""
    kind = _KINDS.get(status, "server_error" if status >= 500 else "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": parameter, "code": reason}}


def openai_error(error: SpotServeError) -> JSONResponse:
    """The answer of a `/v1` route to an error."""
    answer = _answer_of(error)
    message = error.message if error.hint is None else f"{error.message}; hint: {error.hint}"
    parameter = error.parameter if isinstance(error, RequestError | HttpError) else None
    body = error_body(answer.status, message, parameter=parameter, reason=answer.reason)
    return JSONResponse(body, answer.status, headers=dict(answer.headers))


def admin_error(error: SpotServeError) -> JSONResponse:
    """The answer of an `/admin` route to an error: what the command line needs to say and to exit with."""
    answer = _answer_of(error)
    body = {"message": error.message, "hint": error.hint, "exit_code": error.exit_code, "code": error.code}
    return JSONResponse({"error": body}, answer.status, headers=dict(answer.headers))


def _answer_of(error: SpotServeError) -> _Answer:
    if isinstance(error, HttpError):
        return _Answer(error.status, error.reason, tuple(error.headers.items()))
    return next(answer for kind, answer in _ANSWERS if isinstance(error, kind))
