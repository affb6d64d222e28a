"""A request in memory: what its writer has staged, what its readers may see, and one change between the two.

Staging belongs to the writer thread, inside a transaction; publishing follows its commit.
"""

from __future__ import annotations

import asyncio
from array import array
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from spotserve.core.ids import ReplicaId, RequestId
from spotserve.core.ports import NewRequest
from spotserve.core.sampling import TokenLogprobs
from spotserve.core.wire import FinishReason, TokenRun

EndState = Literal["finished", "failed", "cancelled"]


class Owner(NamedTuple):
    """The replica generation that may append to a request."""

    replica: ReplicaId
    generation: int


@dataclass(frozen=True, slots=True)
class ClosedChoice:
    """A choice that was closed: by its leader, by a stop string, or by the coordinator."""

    request: RequestId
    choice: int
    finish_reason: FinishReason
    num_tokens: int
    by: Literal["leader", "stop_string", "coordinator"]


@dataclass(frozen=True, slots=True)
class AppendOutcome:
    """What one append, or one close, did."""

    closed: tuple[ClosedChoice, ...] = ()
    completed: tuple[RequestId, ...] = ()
    """Requests whose last open choice closed."""
    durable: tuple[tuple[RequestId, int, int], ...] = ()
    """(request, choice, durable tokens) of every choice that the runs of an owner named, for `wire.Durable`."""
    gaps: tuple[tuple[RequestId, int, int], ...] = ()
    """Choices of which tokens are missing, with their durable count, for `wire.Resend`."""
    first_tokens: tuple[RequestId, ...] = ()
    """Requests of which this generation's first token became durable."""
    late: tuple[tuple[RequestId, int], ...] = ()
    """(request, choice) that had been closed before the runs came: the leader does not know it and may close them."""
    unknown: tuple[RequestId, ...] = ()
    """Requests that the ledger does not hold (any more): the leader may close them."""
    fenced: int = 0
    """Runs refused because the sender does not own the request."""


@dataclass(slots=True)
class LiveChoice:
    """`tokens`, `logprobs` and what is staged belong to the writer thread; readers see the first `num_durable` tokens.

    `logprobs` are those of the tokens for a request that wants them, else none.
    """

    tokens: array[int] = field(default_factory=lambda: array("I"))
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    staged_prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    staged_reason: FinishReason | None = None
    num_durable: int = 0
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    finish_reason: FinishReason | None = None

    def publish(self) -> None:
        """What was staged is durable: show it."""
        self.num_durable, self.finish_reason = len(self.tokens), self.staged_reason
        self.prompt_logprobs = self.staged_prompt_logprobs


@dataclass(slots=True, eq=False)
class Signal:
    """Wakes one watcher in its own event loop."""

    loop: asyncio.AbstractEventLoop
    event: asyncio.Event


@dataclass(slots=True, eq=False)
class LiveRequest:
    """A request in memory."""

    number: int
    """Its row in the database."""
    new: NewRequest
    created_unix_s: int
    choices: list[LiveChoice]
    owner: Owner | None = None
    ended: EndState | None = None
    error: str | None = None
    staged_end: bool = False
    """It belongs to the writer thread, like `first_token_by`: the generation of which a token was staged last."""
    first_token_by: Owner | None = None
    signals: list[Signal] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Ending:
    """How and when a request ended."""

    state: EndState
    error: str | None
    at_unix_s: float


@dataclass(frozen=True, slots=True)
class StagedRun:
    """New tokens of one choice and who made them: one row, and one for each kind of logprobs they bring."""

    number: int
    choice: int
    position: int
    owner: Owner
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()


@dataclass(slots=True)
class StagedChange:
    """What one append, close or end does within its transaction; published when that is durable."""

    runs: list[StagedRun] = field(default_factory=list)
    closed: list[tuple[LiveRequest, ClosedChoice]] = field(default_factory=list)
    endings: list[tuple[LiveRequest, Ending]] = field(default_factory=list)
    named: dict[tuple[RequestId, int], tuple[LiveRequest, LiveChoice]] = field(default_factory=dict)
    """The choices that runs of an owner named, changed or not."""
    gaps: list[tuple[RequestId, int, int]] = field(default_factory=list)
    first_tokens: list[RequestId] = field(default_factory=list)
    late: list[tuple[RequestId, int]] = field(default_factory=list)
    unknown: list[RequestId] = field(default_factory=list)
    fenced: int = 0

    def outcome(self) -> AppendOutcome:
        """What to tell the caller once it is durable."""
        done = [live for live, _ in self.closed if all(choice.staged_reason is not None for choice in live.choices)]
        return AppendOutcome(
            closed=tuple(one for _, one in self.closed),
            completed=tuple(dict.fromkeys(live.new.request for live in done)),
            durable=tuple((name, index, len(choice.tokens)) for (name, index), (_, choice) in self.named.items()),
            gaps=tuple(self.gaps),
            first_tokens=tuple(self.first_tokens),
            late=tuple(dict.fromkeys(self.late)),
            unknown=tuple(dict.fromkeys(self.unknown)),
            fenced=self.fenced,
        )

    def publish(self) -> list[LiveRequest]:
        """Show it to readers; returns the requests that changed."""
        changed = {live.number: live for live, _ in self.named.values()}
        for live, one in self.closed:
            live.choices[one.choice].publish()
            changed[live.number] = live
        for _, choice in self.named.values():
            choice.publish()
        for live, ending in self.endings:
            live.ended, live.error = ending.state, ending.error
            changed[live.number] = live
        return list(changed.values())


def is_whole(new: NewRequest, run: TokenRun) -> bool:
    """Whether a run brings the logprobs that its request wants, and no others."""
    sampling = new.sampling
    wanted = 0 if sampling.logprobs is None else len(run.token_ids)
    prompted = sampling.prompt_logprobs and run.position == 0 and run.finish_reason != "error"
    return (wanted, len(new.prompt_ids) - 1 if prompted else 0) == (len(run.logprobs), len(run.prompt_logprobs))


def contradicts(choice: LiveChoice, run: TokenRun) -> bool:
    """True when a run cannot be true beside what is known: other tokens, or an end before known tokens."""
    if run.position < 0 or any(not 0 <= token < 2**32 for token in run.token_ids):
        return True
    num_known, stop = len(choice.tokens), run.position + len(run.token_ids)
    known = choice.tokens[run.position : stop]
    if list(known) != list(run.token_ids[: len(known)]):
        return True
    return choice.staged_reason is None and run.finish_reason is not None and stop < num_known


def stage_close(staged: StagedChange, live: LiveRequest, indices: frozenset[int] | None, reason: FinishReason) -> None:
    """Close the given open choices where they stand."""
    for index, choice in enumerate(live.choices):
        if choice.staged_reason is None and (indices is None or index in indices):
            stage_closed(staged, live, index, reason, "coordinator")


def stage_closed(
    staged: StagedChange,
    live: LiveRequest,
    index: int,
    reason: FinishReason,
    by: Literal["leader", "stop_string", "coordinator"],
) -> None:
    choice = live.choices[index]
    choice.staged_reason = reason
    staged.closed.append((live, ClosedChoice(live.new.request, index, reason, len(choice.tokens), by)))
