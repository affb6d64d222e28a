"""What both ends of the control stream agree on: envelopes, the bearer secret, bounds and keepalive.

No torch here: the coordinator imports this module.
"""

from __future__ import annotations

import hmac
from collections.abc import Iterable
from typing import Generic, TypeVar

from pydantic import TypeAdapter

from spotserve.core.frozen import Frozen
from spotserve.errors import SpotServeError
from spotserve.runtime.proto.worker_pb2 import Envelope

MAX_MESSAGE_BYTES = 64 << 20
HEARTBEAT_S = 1.0
AUTHORIZATION = "authorization"

_KEEPALIVE_MS = 1_000
_KEEPALIVE_TIMEOUT_MS = 2_000

CHANNEL_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.keepalive_time_ms", _KEEPALIVE_MS),
    ("grpc.keepalive_timeout_ms", _KEEPALIVE_TIMEOUT_MS),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    # Every dial is a new channel; a shared subchannel would carry the backoff of the last failure along.
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.enable_http_proxy", 0),
)
"""Both ends ping an idle peer each second, so that a hung machine is noticed although its sockets are open."""

SERVER_OPTIONS: tuple[tuple[str, int], ...] = (
    *CHANNEL_OPTIONS,
    ("grpc.http2.min_ping_interval_without_data_ms", _KEEPALIVE_MS // 2),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", _KEEPALIVE_MS // 2),
    ("grpc.http2.max_ping_strikes", 0),
    # Two daemons must never share one port.
    ("grpc.so_reuseport", 0),
)


Message = TypeVar("Message")


class EnvelopeError(SpotServeError):
    """A peer broke the rules of the control stream."""

    code = "SPS-193"


class Sealer:
    """Packs the messages of one direction of one stream, numbered from 1."""

    def __init__(self) -> None:
        self._sequence = 0

    def seal(self, message: Frozen) -> Envelope:
        """The envelope of the next message."""
        self._sequence += 1
        return Envelope(sequence=self._sequence, json=message.model_dump_json().encode())


class Opener(Generic[Message]):
    """Unpacks the messages of one direction of one stream and insists that none is missing."""

    def __init__(self, adapter: TypeAdapter[Message]) -> None:
        self._adapter = adapter
        self._sequence = 0

    def open(self, envelope: Envelope) -> Message:
        """The message inside.

        Raises:
            EnvelopeError: out of order, or not a message we know.
        """
        self._sequence += 1
        if envelope.sequence != self._sequence:
            raise EnvelopeError(f"envelope {envelope.sequence} came where {self._sequence} was due")
        try:
            return self._adapter.validate_json(envelope.json)
        except ValueError as error:
            # The content may be a prompt: say where it is wrong, not what it was.
            raise EnvelopeError(f"envelope {envelope.sequence} holds no valid message ({places(error)})") from error


def bearer(secret: str) -> tuple[tuple[str, str], ...]:
    """The metadata that proves the secret."""
    return ((AUTHORIZATION, f"Bearer {secret}"),)


def is_bearer(metadata: Iterable[tuple[str, str | bytes]], secret: str) -> bool:
    """Whether the metadata proves the secret; takes the same time whatever it holds."""
    given = next((value for key, value in metadata if key == AUTHORIZATION), "")
    given_bytes = given.encode() if isinstance(given, str) else given
    return hmac.compare_digest(given_bytes, f"Bearer {secret}".encode())


def places(error: ValueError) -> str:
    """Where a message is wrong and how, without what it holds."""
    errors = getattr(error, "errors", None)
    if errors is None:
        return type(error).__name__
    return ", ".join(".".join(map(str, item["loc"])) + ": " + item["type"] for item in errors()[:3])
