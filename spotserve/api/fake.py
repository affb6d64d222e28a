"""A front door and an administration without workers, for tests and for trying the HTTP surface.

Tokens come from a function of (prompt, choice, position), at once or when the test lets them go. It keeps the
promises of the ports: acceptance is atomic, deltas are gap-free, stop strings and EOS close a choice.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from spotserve.api.text import StopJudge
from spotserve.core.ids import InstanceId, RequestId
from spotserve.core.plan import Plan
from spotserve.core.ports import ChoiceDelta, ChoiceView, NewRequest, RequestView
from spotserve.core.sampling import RankedToken, SamplingParameters, TokenLogprobs
from spotserve.core.snapshot import InstanceView, Snapshot, World
from spotserve.core.wire import FinishReason
from spotserve.errors import NotServingError, PlanRefusedError, QueueFullError, UnknownInstanceError

TokenRule = Callable[[tuple[int, ...], int, int], int]


@dataclass(slots=True)
class _Choice:
    token_ids: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None


@dataclass(slots=True)
class _Request:
    new: NewRequest
    created_unix_s: int
    choices: list[_Choice]
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    state: str = "queued"
    error: str | None = None
    task: asyncio.Task[None] | None = None


class FakeFrontdoor:
    """A `Frontdoor` that generates by rule.

    `held_at` stops every choice at that many tokens until `release()`; `chunk` tokens become durable at a time.
    """

    def __init__(self, rule: TokenRule, judge: StopJudge | None = None, *, chunk: int = 1) -> None:
        self._rule = rule
        self._judge = judge or StopJudge(None)
        self._chunk = chunk
        self._requests: dict[RequestId, _Request] = {}
        self._released = asyncio.Event()
        self._released.set()
        self._held_at: int | None = None
        self.state = "serving"
        self.ready = True
        self.queue_full = False
        self.ends_watches = False
        """Set while tokens are held: watches end as they do when the daemon stops."""
        self.submitted: list[NewRequest] = []
        self.cancelled: list[RequestId] = []

    def hold(self, at: int = 0) -> None:
        """Let no choice grow past `at` tokens."""
        self._held_at = at
        self._released.clear()

    def release(self) -> None:
        """Let every choice go on."""
        self._held_at = None
        self._released.set()

    def end_watches(self) -> None:
        """End every watch without ending its request."""
        self.ends_watches = True
        for request in self._requests.values():
            request.changed.set()

    def fail(self, request_id: RequestId, error: str) -> None:
        """End a request as failed."""
        self._end(self._requests[request_id], "failed", "error", error)

    async def close(self) -> None:
        """End the generating tasks."""
        tasks = [request.task for request in self._requests.values() if request.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def submit(self, requests: Sequence[NewRequest]) -> None:
        """Accept all or none."""
        if not self.ready:
            raise NotServingError("the daemon is starting")
        if self.queue_full:
            raise QueueFullError("queue of 1024 requests is full")
        for new in requests:
            self.submitted.append(new)
            request = _Request(new, int(time.time()), [_Choice() for _ in range(new.num_choices)])
            self._requests[new.request] = request
            request.task = asyncio.create_task(self._run(request))

    async def watch(self, request: RequestId, after: int = -1) -> AsyncIterator[ChoiceDelta]:
        """Replay, then follow."""
        state = self._requests[request]
        sent = [after + 1] * len(state.choices)
        ended = [False] * len(state.choices)
        while not all(ended) and not self.ends_watches:
            state.changed.clear()
            for index, choice in enumerate(state.choices):
                fresh = tuple(choice.token_ids[sent[index] :])
                prompt = state.new.prompt_ids if sent[index] == 0 else ()
                if ended[index] or not (fresh or choice.finish_reason):
                    continue
                ended[index] = choice.finish_reason is not None
                yield ChoiceDelta(
                    choice=index,
                    position=sent[index],
                    token_ids=fresh,
                    finish_reason=choice.finish_reason,
                    logprobs=_logprobs(state.new.sampling, fresh, sent[index]),
                    prompt_logprobs=_prompt_logprobs(state.new.sampling, prompt),
                )
                sent[index] += len(fresh)
            if not all(ended) and not self.ends_watches:
                await state.changed.wait()

    async def cancel(self, request: RequestId) -> None:
        """End a live request."""
        self.cancelled.append(request)
        self._end(self._requests[request], "cancelled", "cancelled", None)

    async def view(self, request: RequestId) -> RequestView | None:
        """The request as it stands."""
        state = self._requests.get(request)
        if state is None:
            return None
        return RequestView(
            request=request,
            state=state.state,
            created_unix_s=state.created_unix_s,
            prompt_ids=state.new.prompt_ids,
            sampling=state.new.sampling,
            stop=state.new.stop,
            choices=tuple(
                ChoiceView(
                    choice=index,
                    token_ids=tuple(choice.token_ids),
                    finish_reason=choice.finish_reason,
                    logprobs=_logprobs(state.new.sampling, choice.token_ids, 0),
                    prompt_logprobs=_prompt_logprobs(state.new.sampling, state.new.prompt_ids),
                )
                for index, choice in enumerate(state.choices)
            ),
            error=state.error,
            keep_text=state.new.keep_text,
        )

    async def _run(self, request: _Request) -> None:
        request.state = "decoding"
        while any(choice.finish_reason is None for choice in request.choices):
            for index, choice in enumerate(request.choices):
                self._grow(request, index, choice)
            request.changed.set()
            await asyncio.sleep(0)
            if self._is_held(request):
                await self._released.wait()
        if request.state == "decoding":
            request.state = "finished"

    def _is_held(self, request: _Request) -> bool:
        held_at = self._held_at
        growing = [choice for choice in request.choices if choice.finish_reason is None]
        return held_at is not None and all(len(choice.token_ids) >= held_at for choice in growing)

    def _grow(self, request: _Request, index: int, choice: _Choice) -> None:
        if choice.finish_reason is not None:
            return
        sampling, position = request.new.sampling, len(choice.token_ids)
        end = min(position + self._chunk, sampling.max_tokens)
        if self._held_at is not None:
            end = min(end, self._held_at)
        fresh: list[int] = []
        for at in range(position, end):
            fresh.append(self._rule(request.new.prompt_ids, index, at))
            if fresh[-1] in sampling.stop_token_ids and not sampling.ignore_eos:
                choice.finish_reason = "stop"
                break
        kept = self._judge(request.new.stop, choice.token_ids, fresh, sampling.min_tokens)
        if kept is not None:
            fresh, choice.finish_reason = fresh[:kept], "stop"
        choice.token_ids.extend(fresh)
        if choice.finish_reason is None and len(choice.token_ids) == sampling.max_tokens:
            choice.finish_reason = "length"

    def _end(self, request: _Request, state: str, reason: FinishReason, error: str | None) -> None:
        if all(choice.finish_reason is not None for choice in request.choices):
            return
        request.state, request.error = state, error
        for choice in request.choices:
            choice.finish_reason = choice.finish_reason or reason
        request.changed.set()


def _logprobs(sampling: SamplingParameters, token_ids: Sequence[int], position: int) -> tuple[TokenLogprobs, ...]:
    """Made-up logprobs that tell token and position."""
    if sampling.logprobs is None:
        return ()
    top = tuple(RankedToken(token_id, -1.0 - token_id) for token_id in range(5, 5 + sampling.logprobs))
    return tuple(TokenLogprobs(-token_id - at / 1000, top) for at, token_id in enumerate(token_ids, position))


def _prompt_logprobs(sampling: SamplingParameters, prompt_ids: tuple[int, ...]) -> tuple[TokenLogprobs, ...]:
    return _logprobs(sampling, prompt_ids, 0)[1:] if sampling.prompt_logprobs else ()


class FakeAdministration:
    """An `Administration` over a set of names; it records what it was asked."""

    def __init__(self, instances: Sequence[str] = ("i0", "i1", "i2", "i3")) -> None:
        self._instances = {InstanceId(name): "ready" for name in instances}
        self.calls: list[tuple[Any, ...]] = []
        self.stopping = False

    def status(self) -> dict[str, Any]:
        """A status of the documented shape."""
        return {
            "format_version": "0.1",
            "state": "stopping" if self.stopping else "serving",
            "epoch": 1,
            "parallel": {"data": 1, "pipeline": 1, "tensor": 1},
            "replicas": [],
            "instances": [
                {"id": name, "state": state, "gpus": 1, "market": "spot"} for name, state in self._instances.items()
            ],
            "requests": {"running": 0, "queued": 0, "finished": 0, "failed": 0, "cancelled": 0},
            "migrations": [],
        }

    async def notice(self, instance: InstanceId, grace_s: float) -> dict[str, Any]:
        """Doom an instance."""
        self._require(instance)
        self._instances[instance] = "doomed"
        self.calls.append(("notice", instance, grace_s))
        return {"instance": instance, "grace_s": grace_s}

    async def kill(self, instance: InstanceId) -> dict[str, Any]:
        """Take an instance."""
        self._require(instance)
        self._instances[instance] = "gone"
        self.calls.append(("kill", instance))
        return {"instance": instance}

    async def add_instance(self) -> InstanceId:
        """One more."""
        name = InstanceId(f"i{len(self._instances)}")
        self._instances[name] = "requested"
        self.calls.append(("add_instance", name))
        return name

    async def snapshot(self) -> tuple[dict[str, Any], Snapshot]:
        """An empty spec and a world without replicas."""
        instances = tuple(InstanceView(id=name, state="ready") for name in self._instances)
        return {}, Snapshot(world=World(epoch=1, instances=instances, replicas=()))

    async def apply(self, plan: Plan) -> dict[str, Any]:
        """Every plan is stale here but one for epoch 1."""
        if plan.epoch.from_ != 1:
            raise PlanRefusedError(f"plan is for epoch {plan.epoch.from_}, the daemon is at 1", hint="plan again")
        self.calls.append(("apply", plan.epoch.to))
        return {"outcome": "completed"}

    async def stop(self) -> None:
        """Begin to stop."""
        self.stopping = True

    def _require(self, instance: InstanceId) -> None:
        living = [name for name, state in self._instances.items() if state != "gone"]
        if instance not in living:
            raise UnknownInstanceError(f"instance {instance} is unknown or gone", hint=f"living: {', '.join(living)}")
