"""What one part needs of another, as small protocols; `app/` wires the real ones, tests the fakes."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Any, Literal, Protocol

from pydantic import Field

from spotserve.core.frozen import Frozen
from spotserve.core.ids import InstanceId, RequestId
from spotserve.core.plan import Plan
from spotserve.core.sampling import SamplingParameters, TokenLogprobs
from spotserve.core.snapshot import Snapshot
from spotserve.core.wire import FinishReason

StartStage = Literal["download", "verify", "join", "load"]


class NewRequest(Frozen):
    """A validated generation request as the front door hands it in; one per prompt."""

    request: RequestId
    prompt_ids: tuple[int, ...] = Field(min_length=1)
    num_choices: int = Field(ge=1)
    sampling: SamplingParameters
    stop: tuple[str, ...] = ()
    timeout_s: float | None = None
    keep_text: dict[str, Any] = {}
    """What `GET /v1/requests/{id}` needs to answer later (endpoint kind, served model name): no prompt."""


class ChoiceView(Frozen):
    """The durable part of one choice."""

    choice: int
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None
    logprobs: tuple[TokenLogprobs, ...] = ()
    """Of each token, for a request that wants them."""
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    """Of each token of the prompt but the first, likewise."""


class RequestView(Frozen):
    """A request as the ledger knows it; `state` is a REQUEST lifecycle state."""

    request: RequestId
    state: str
    created_unix_s: int
    prompt_ids: tuple[int, ...]
    sampling: SamplingParameters
    stop: tuple[str, ...]
    choices: tuple[ChoiceView, ...]
    error: str | None = None
    keep_text: dict[str, Any] = {}


class ChoiceDelta(Frozen):
    """Newly durable tokens of one choice; `finish_reason` set with the last ones (tokens may then be empty).

    Their `logprobs`, where wanted; `prompt_logprobs` come with position 0.
    """

    choice: int
    position: int
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None = None
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()


class Progress(Protocol):
    """Somebody who watches a start: on a terminal a bar, elsewhere lines of the log."""

    def show(self, stage: StartStage, done: int, total: int) -> None:
        """`done` of `total` bytes (`join`: instances) of a stage; stages follow one another."""

    def end(self) -> None:
        """The stage shown last is over."""


class Frontdoor(Protocol):
    """What the HTTP front door needs of the daemon."""

    @property
    def state(self) -> str:
        """The SERVICE state."""

    @property
    def ready(self) -> bool:
        """True from the first `serving` on."""

    async def submit(self, requests: Sequence[NewRequest]) -> None:
        """Accept requests; returns once they are durable.

        Raises QueueFullError or NotServingError; then none of them was accepted.
        """

    def watch(self, request: RequestId, after: int = -1) -> AsyncIterator[ChoiceDelta]:
        """Durable tokens at positions > `after` of every choice, then new ones as they come, to the end.

        Raises KeyError for an unknown or expired request.
        """

    async def cancel(self, request: RequestId) -> None:
        """The client went away: end the request and free its KV."""

    async def view(self, request: RequestId) -> RequestView | None:
        """The request's durable content, None when unknown or expired."""


class Administration(Protocol):
    """What the admin endpoints need of the daemon; every call returns once journaled (or as contracts say)."""

    def status(self) -> dict[str, Any]:
        """The JSON of `spotserve status --json`."""

    async def notice(self, instance: InstanceId, grace_s: float) -> dict[str, Any]:
        """Preemption notice. Raises UnknownInstanceError."""

    async def kill(self, instance: InstanceId) -> dict[str, Any]:
        """SIGKILL, returns after the processes are reaped. Raises UnknownInstanceError."""

    async def add_instance(self) -> InstanceId:
        """One more instance; returns once journaled."""

    async def snapshot(self) -> tuple[dict[str, Any], Snapshot]:
        """(spec as JSON, snapshot) of the running daemon."""

    async def apply(self, plan: Plan) -> dict[str, Any]:
        """Run a plan; returns at released or aborted: {"outcome": …}. Raises PlanRefusedError (stale)."""

    async def stop(self) -> None:
        """Begin the drain and stop."""
