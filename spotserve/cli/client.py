"""The admin verbs' way to a running daemon: plain HTTP to its `/admin` endpoints.

The standard library's client is used as it is: no proxy, no redirect, nothing but loopback in practice. An error
body carries message, hint, code and exit code, and becomes an error of the same here.
"""

from __future__ import annotations

import http.client
import json
import os
from collections.abc import Mapping
from typing import Any, cast
from urllib.parse import urlsplit

from spotserve.cli.config import Origin, integer
from spotserve.errors import DaemonUnreachableError, SpecError, SpotServeError

DEFAULT_PORT = 8000
MAX_ANSWER_BYTES = 256 * 2**20


class AdminClient:
    """Calls one daemon's admin endpoints; JSON in, JSON out."""

    def __init__(self, url: str, *, api_key: str | None = None) -> None:
        parts = urlsplit(url)
        if parts.scheme not in {"http", "https"} or not parts.hostname:
            raise SpecError(f"--url {url} is not an http URL", hint="write http://127.0.0.1:8000")
        try:
            self._port = parts.port
        except ValueError as error:
            raise SpecError(f"--url {url} has a port that is not between 0 and 65535") from error
        self._https = parts.scheme == "https"
        self._host = parts.hostname
        self._prefix = parts.path.rstrip("/")
        self._api_key = api_key
        self.url = url.rstrip("/")

    def get(self, path: str, *, timeout_s: float = 30.0) -> Any:
        """The JSON answer to a GET."""
        return self._call("GET", path, None, timeout_s=timeout_s)

    def post(self, path: str, body: object = None, *, timeout_s: float | None = 30.0) -> Any:
        """The JSON answer to a POST of a value, or of bytes as they are; `timeout_s` None waits as long as it takes."""
        return self._call("POST", path, {} if body is None else body, timeout_s=timeout_s)

    def _call(self, method: str, path: str, body: object, *, timeout_s: float | None) -> Any:
        kind = http.client.HTTPSConnection if self._https else http.client.HTTPConnection
        connection = kind(self._host, self._port, timeout=timeout_s)
        headers = {"Accept": "application/json"}
        if self._api_key is not None:
            headers["Authorization"] = f"Bearer {self._api_key}"
        payload = None
        if body is not None:
            payload = body if isinstance(body, bytes) else json.dumps(body, allow_nan=False).encode()
            headers["Content-Type"] = "application/json"
        try:
            connection.request(method, self._prefix + path, body=payload, headers=headers)
            response = connection.getresponse()
            text = response.read(MAX_ANSWER_BYTES)
        except (OSError, http.client.HTTPException) as error:
            raise self._unreachable(error) from error
        finally:
            connection.close()
        return self._answer(response.status, text)

    def _answer(self, status: int, text: bytes) -> Any:
        try:
            answer = json.loads(text) if text else {}
        except (ValueError, RecursionError) as error:
            raise self._unreachable("what answers there is no spotserve") from error
        if status < 400:
            return answer
        raise error_from(status, answer)

    def _unreachable(self, reason: object) -> DaemonUnreachableError:
        detail = getattr(reason, "strerror", None) or str(reason) or type(reason).__name__
        return DaemonUnreachableError(
            f"no daemon answers at {self.url}: {detail}",
            hint="start one with spotserve run, or name it with --url or SPOTSERVE_URL",
        )


def daemon_url(url: str | None, environment: Mapping[str, str] | None = None) -> str:
    """`--url` > `SPOTSERVE_URL` > `http://127.0.0.1:$SPOTSERVE_PORT` > port 8000."""
    variables = os.environ if environment is None else environment
    if url:
        return url
    if variables.get("SPOTSERVE_URL"):
        return variables["SPOTSERVE_URL"]
    port = variables.get("SPOTSERVE_PORT") or DEFAULT_PORT
    return f"http://127.0.0.1:{integer(1, 65535)(port, Origin('SPOTSERVE_PORT'))}"


def client_for(url: str | None, api_key: str | None = None) -> AdminClient:
    """The client that an admin verb uses."""
    return AdminClient(daemon_url(url), api_key=api_key or os.environ.get("SPOTSERVE_API_KEY") or None)


def error_from(status: int, answer: object) -> SpotServeError:
    """The error that a daemon told in its body: its words, hint, code and exit code."""
    told = answer.get("error") if isinstance(answer, dict) else None
    details = cast("dict[str, Any]", told) if isinstance(told, dict) else {}
    message = str(details.get("message") or f"the daemon answered {status}")
    error = SpotServeError(message, hint=str(details["hint"]) if details.get("hint") else None)
    if isinstance(details.get("code"), str):
        error.code = details["code"]
    if isinstance(details.get("exit_code"), int):
        error.exit_code = details["exit_code"]
    return error
