"""`/admin/*`: what the command line asks of a running daemon. Answers loopback peers only.

A loopback `Host` and no `Origin` are required as well: a web page that a browser on this machine shows can send
requests to loopback, but it cannot leave the `Origin` out, nor choose the `Host` that it was resolved from.
"""

from __future__ import annotations

import asyncio
import ipaddress
import math

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from spotserve.api.errors import HttpError
from spotserve.api.validation import Fields, read_json_object
from spotserve.core.check import read_plan
from spotserve.core.finding import Finding
from spotserve.core.ids import InstanceId
from spotserve.core.plan import Plan
from spotserve.core.ports import Administration
from spotserve.errors import PlanRefusedError, SpecError

DEFAULT_GRACE_S = 30.0
MAX_GRACE_S = 86400.0


class AdminEndpoints:
    """The administrative routes; each returns once what it says is journaled."""

    def __init__(self, administration: Administration) -> None:
        self._administration = administration

    async def status(self, request: Request) -> Response:
        """GET /admin/status: the JSON of `spotserve status --json`."""
        return JSONResponse(self._administration.status())

    async def notice(self, request: Request) -> Response:
        """POST /admin/notice {"instance", "grace_s"}: a preemption notice."""
        fields = await _read_fields(request)
        instance, grace_s = _read_instance(fields), _read_grace(fields)
        return JSONResponse(await asyncio.shield(self._administration.notice(instance, grace_s)))

    async def kill(self, request: Request) -> Response:
        """POST /admin/kill {"instance"}: SIGKILL, answered when its processes are reaped."""
        instance = _read_instance(await _read_fields(request))
        return JSONResponse(await asyncio.shield(self._administration.kill(instance)))

    async def add_instance(self, request: Request) -> Response:
        """POST /admin/add-instance: one more instance; answers its id."""
        return JSONResponse({"instance": await asyncio.shield(self._administration.add_instance())})

    async def stop(self, request: Request) -> Response:
        """POST /admin/stop: begin the drain."""
        await asyncio.shield(self._administration.stop())
        return JSONResponse({"stopping": True}, 202)

    async def snapshot(self, request: Request) -> Response:
        """GET /admin/snapshot: spec and snapshot, the input of `spotserve plan`."""
        spec, snapshot = await self._administration.snapshot()
        return JSONResponse({"spec": spec, "snapshot": snapshot.model_dump(mode="json")})

    async def apply(self, request: Request) -> Response:
        """POST /admin/apply with a plan: runs it; answers at released or aborted."""
        plan = await asyncio.to_thread(_read_plan, await request.body())
        return JSONResponse(await asyncio.shield(self._administration.apply(plan)))


def require_local(request: Request) -> None:
    """Raise the 403 for a peer, `Host` or `Origin` that is not a local program."""
    peer = request.client.host if request.client is not None else ""
    if not is_loopback(peer):
        raise _forbidden("the admin endpoints answer loopback peers only")
    hosts = request.headers.getlist("host")
    if len(hosts) != 1 or not is_loopback(_host_name(hosts[0])):
        raise _forbidden("the admin endpoints need a loopback Host header")
    if "origin" in request.headers:
        raise _forbidden("the admin endpoints answer no browser (Origin header)")


def is_loopback(host: str) -> bool:
    """True for `localhost` and loopback addresses; a name is never resolved."""
    if host.lower() == "localhost":
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return (mapped or address).is_loopback


def _host_name(header: str) -> str:
    """The host of a `Host` header, without port and brackets."""
    if header.startswith("["):
        return header[1:].partition("]")[0]
    return header.partition(":")[0]


def _forbidden(message: str) -> HttpError:
    return HttpError(403, message, reason="forbidden")


async def _read_fields(request: Request) -> Fields:
    return Fields(read_json_object(await request.body()))


def _read_instance(fields: Fields) -> InstanceId:
    instance = fields.text("instance")
    if not instance:
        raise SpecError("instance is missing", hint="name one, such as i0")
    return InstanceId(instance)


def _read_grace(fields: Fields) -> float:
    value = fields.get("grace_s")
    if value is None:
        return DEFAULT_GRACE_S
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise SpecError(f"grace_s {value!r} is not a number of seconds")
    if not 0 <= value <= MAX_GRACE_S:
        raise SpecError(f"grace_s {value:g} is not between 0 and {MAX_GRACE_S:g}")
    return float(value)


def _read_plan(data: bytes) -> Plan:
    plan = read_plan(data)
    if isinstance(plan, Finding):
        raise PlanRefusedError(f"plan refused: {plan.line()}", hint="spotserve plan --out writes plans")
    return plan
