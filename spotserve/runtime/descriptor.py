"""What a leader tells its followers over the mesh, and what they answer: compact JSON, in one order for all ranks.

A descriptor names sequences and token ranges, never blocks: every rank has block tables of its own. Sampling parameters
travel once, with the first descriptor that names a key, and with them the tokens generated before where the parameters
need them: whatever brought the sequence here. A freed key is forgotten by all ranks before anything after it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from spotserve.core.batching import SequenceKey
from spotserve.core.ids import RequestId
from spotserve.core.sampling import RankedToken, SamplingParameters, TokenLogprobs
from spotserve.errors import InvariantError


@dataclass(frozen=True, slots=True)
class RunItem:
    """Tokens [start, start + count) of one sequence. `position` is that of the token it samples, None if none.

    `targets` are the prompt tokens that follow its rows from `first_scored` on, wherever their logprobs are wanted.
    """

    key: SequenceKey
    start: int
    count: int
    position: int | None
    token_ids: tuple[int, ...]
    first_scored: int = 0
    targets: tuple[int, ...] = ()

    @property
    def num_logits(self) -> int:
        """Rows at its end whose logits are needed."""
        if self.targets:
            return self.start + self.count - self.first_scored
        return int(self.position is not None)


@dataclass(frozen=True, slots=True)
class Admitted:
    """A key that is new to the ranks. `history` is what it has generated, told only if its sampling needs it."""

    key: SequenceKey
    sampling: SamplingParameters
    history: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Run:
    """One micro-batch. `freed` is dropped before it, `admitted` are the keys new in it."""

    number: int
    freed: tuple[SequenceKey, ...]
    admitted: tuple[Admitted, ...]
    items: tuple[RunItem, ...]


@dataclass(frozen=True, slots=True)
class Free:
    """Sequences that ended while there was nothing to run."""

    keys: tuple[SequenceKey, ...]


@dataclass(frozen=True, slots=True)
class Adopt:
    """These sequences go on with the KV that was copied in: (key, tokens with KV). Answered by `Missing`.

    With `is_exclusive` every other sequence is freed: the replica starts with these.
    """

    sequences: tuple[tuple[SequenceKey, int], ...]
    is_exclusive: bool


@dataclass(frozen=True, slots=True)
class Stop:
    """The replica is released: followers end."""


Descriptor = Run | Free | Adopt | Stop


@dataclass(frozen=True, slots=True)
class Sampled:
    """From the sampler: the new token of every sampling item, in order; sampler.NO_TOKEN where there is none.

    `logprobs` of the same items, empty when none asked; `prompt_logprobs` are (index of the item, of its targets).
    """

    number: int
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs | None, ...] = ()
    prompt_logprobs: tuple[tuple[int, tuple[TokenLogprobs, ...]], ...] = ()


@dataclass(frozen=True, slots=True)
class Missing:
    """From every follower: keys to adopt whose KV is not all here."""

    keys: tuple[SequenceKey, ...]


Answer = Sampled | Missing


def encode(message: Descriptor | Answer) -> bytes:
    """The bytes of a message."""
    return json.dumps(_plain(message), separators=(",", ":")).encode()


def decode(payload: bytes) -> Descriptor | Answer:
    """The message of these bytes; the peer has proved the secret of the mesh, so only our own bugs are refused."""
    value = json.loads(payload)
    match value[0]:
        case "run":
            _, number, freed, admitted, items = value
            return Run(
                number=number,
                freed=_keys(freed),
                admitted=tuple(
                    Admitted(_key(key), SamplingParameters.model_validate(parameters), tuple(history))
                    for key, parameters, history in admitted
                ),
                items=tuple(
                    RunItem(_key(key), start, count, position, tuple(token_ids), first_scored, tuple(targets))
                    for key, start, count, position, token_ids, first_scored, targets in items
                ),
            )
        case "free":
            return Free(_keys(value[1]))
        case "adopt":
            return Adopt(tuple((_key(key), kv_tokens) for key, kv_tokens in value[1]), is_exclusive=value[2])
        case "stop":
            return Stop()
        case "sampled":
            _, number, token_ids, logprobs, prompt_logprobs = value
            return Sampled(
                number,
                tuple(token_ids),
                tuple(None if one is None else _logprobs(one) for one in logprobs),
                tuple((index, tuple(map(_logprobs, targets))) for index, targets in prompt_logprobs),
            )
        case "missing":
            return Missing(_keys(value[1]))
    raise InvariantError(f"mesh message {value[0]!r} is not known")


def _plain(message: Descriptor | Answer) -> list[Any]:
    match message:
        case Run():
            return [
                "run",
                message.number,
                message.freed,
                [(one.key, one.sampling.model_dump(exclude_defaults=True), one.history) for one in message.admitted],
                [
                    (item.key, item.start, item.count, item.position, item.token_ids, item.first_scored, item.targets)
                    for item in message.items
                ],
            ]
        case Free():
            return ["free", message.keys]
        case Adopt():
            return ["adopt", message.sequences, message.is_exclusive]
        case Stop():
            return ["stop"]
        case Sampled():
            return ["sampled", message.number, message.token_ids, message.logprobs, message.prompt_logprobs]
        case Missing():
            return ["missing", message.keys]


def _key(value: list[Any]) -> SequenceKey:
    request, choice, kv_generation = value
    return SequenceKey(RequestId(request), choice, kv_generation)


def _keys(values: list[list[Any]]) -> tuple[SequenceKey, ...]:
    return tuple(_key(value) for value in values)


def _logprobs(value: list[Any]) -> TokenLogprobs:
    logprob, top = value
    return TokenLogprobs(logprob, tuple(RankedToken(token_id, other) for token_id, other in top))
