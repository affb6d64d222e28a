"""Tokens and the clients that read them, in virtual time.

A token's value is a function of (request, choice, position), so that a gap, a double or a foreign token shows in the
stream. Beside each token stands who made it and after which journal entry it became durable.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field
from typing import NamedTuple

from spotserve.core.ids import ReplicaId, RequestId

Owner = tuple[ReplicaId, int]
"""A replica generation."""


def virtual_token(request: RequestId, choice: int, position: int) -> int:
    """The one right token at a position."""
    return zlib.crc32(f"{request}/{choice}/{position}".encode())


class StreamedToken(NamedTuple):
    """One token as the ledger made it durable and a client read it."""

    choice: int
    position: int
    token: int
    owner: Owner
    after_entry: int
    """Sequence of the last journal entry whose commands had been given."""
    at_s: float


@dataclass(slots=True)
class ClientStream:
    """What one client was promised and what it has read."""

    request: RequestId
    lengths: tuple[int, ...]
    """Where the model ends each choice."""
    max_tokens: int
    accepted: bool = False
    """Whether the client was told so: its entry is durable."""
    tokens: list[StreamedToken] = field(default_factory=list)
    ended: str | None = None
    """How the stream said it ended."""
