"""What a leader tells its followers over the mesh, and what they answer: compact JSON, in one order for all ranks.

A descriptor names sequences and token ranges, never blocks: every rank has block tables of its own. Sampling parameters
travel once, with the first descriptor that names a key; a freed key is forgotten by all ranks before anything after it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from spotserve.core.batching import SequenceKey
from spotserve.core.ids import RequestId
from spotserve.core.sampling import SamplingParameters
from spotserve.errors import InvariantError


@dataclass(frozen=True, slots=True)
class RunItem:
    """Tokens [start, start + count) of one sequence. `position` is that of the token it samples, None if none."""

    key: SequenceKey
    start: int
    count: int
    position: int | None
    token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Run:
    """One micro-batch. `freed` is dropped before it, `admitted` are sampling parameters of keys new in it."""

    number: int
    freed: tuple[SequenceKey, ...]
    admitted: tuple[tuple[SequenceKey, SamplingParameters], ...]
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
    """From the sampler: the new token of every sampling item, in order."""

    number: int
    token_ids: tuple[int, ...]


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
                    (_key(key), SamplingParameters.model_validate(parameters)) for key, parameters in admitted
                ),
                items=tuple(
                    RunItem(_key(key), start, count, position, tuple(token_ids))
                    for key, start, count, position, token_ids in items
                ),
            )
        case "free":
            return Free(_keys(value[1]))
        case "adopt":
            return Adopt(tuple((_key(key), kv_tokens) for key, kv_tokens in value[1]), is_exclusive=value[2])
        case "stop":
            return Stop()
        case "sampled":
            return Sampled(value[1], tuple(value[2]))
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
                [(key, parameters.model_dump()) for key, parameters in message.admitted],
                [(item.key, item.start, item.count, item.position, item.token_ids) for item in message.items],
            ]
        case Free():
            return ["free", message.keys]
        case Adopt():
            return ["adopt", message.sequences, message.is_exclusive]
        case Stop():
            return ["stop"]
        case Sampled():
            return ["sampled", message.number, message.token_ids]
        case Missing():
            return ["missing", message.keys]


def _key(value: list[Any]) -> SequenceKey:
    request, choice, kv_generation = value
    return SequenceKey(RequestId(request), choice, kv_generation)


def _keys(values: list[list[Any]]) -> tuple[SequenceKey, ...]:
    return tuple(_key(value) for value in values)
