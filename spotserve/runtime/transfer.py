"""Bulk transfers: the destination worker pulls weight slices and KV blocks from the source over a socket of its own.

A connection names a grant and proves its secret, which was minted for one plan, source and destination. After that the
destination asks: a JSON request, answered by a JSON reply and by buffers. The receiver has computed every size from
its own layout and refuses any other, and it checks xxh3 of every transfer chunk, so a source can neither overrun it
nor damage it unnoticed. A source only ever answers, so it needs no state beyond the grants and may vanish at any byte:
the error says how many buffers are complete and the caller asks somebody for the rest.

The buffers of one reply are one stream cut into transfer chunks of at most 1 MiB; small buffers share a chunk, because
a system call and a checksum per KV head would cost more than its bytes. Nothing is copied on the way: the kernel reads
from the source's tensors and writes into the destination's.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import struct
import threading
import time
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
import xxhash

from spotserve.errors import InvariantError, SpotServeError, TransferError
from spotserve.log import get_logger
from spotserve.runtime.mesh import (
    ACCEPTED,
    NONCE_BYTES,
    PROOF_BYTES,
    Handshake,
    byte_view,
    join_address,
    listen,
    split_address,
)
from spotserve.runtime.ratelimit import RateLimiter

CHUNK_BYTES = 1 << 20
MAX_HEADER_BYTES = 1 << 20

_MAGIC = b"SPOTXFR1"
_HELLO = struct.Struct("<8sB32s")  # magic, bytes of the grant id that follows, nonce
_FRAME = struct.Struct("<IQ")  # bytes that follow, their xxh3_64
_MAX_PIECES = 256  # of a chunk; the kernel takes at most 1024 in one call
_MAX_CONNECTIONS = 128
_HELLO_TIMEOUT_S = 5.0
_SOURCE_TIMEOUT_S = 30.0

Buffer = memoryview | torch.Tensor

log = get_logger("transfer")


class TransferRefusedError(TransferError):
    """The source answered that it will not serve the request; the client may ask for something else."""


class TransferInterruptedError(TransferError):
    """The transfer broke off; the first `num_buffers_verified` buffers are complete and checked."""

    def __init__(self, message: str, *, num_buffers_verified: int) -> None:
        super().__init__(message)
        self.num_buffers_verified = num_buffers_verified


class _BrokenStreamError(Exception):
    """The other end closed, or what it sent cannot be what was meant; the connection is of no more use."""


@dataclass(frozen=True, slots=True)
class TransferReply:
    """What a source answers: a JSON object and contiguous buffers, streamed in order.

    `release` is called once the buffers are sent or the connection is gone, so that a source can pin what it streams.
    """

    reply: dict[str, object]
    buffers: Sequence[Buffer] = ()
    release: Callable[[], None] | None = None


Handler = Callable[[str, dict[str, object]], TransferReply]


# The stream ------------------------------------------------------------------------------------------------------


def _as_bytes(buffer: Buffer) -> memoryview:
    if isinstance(buffer, torch.Tensor):
        return byte_view(buffer)
    if not buffer.c_contiguous:
        raise InvariantError(f"transfer buffer of {buffer.nbytes} bytes is not contiguous")
    return buffer.cast("B") if buffer.nbytes else memoryview(b"")


def _chunks_of(views: Sequence[memoryview]) -> Iterator[tuple[int, list[memoryview]]]:
    """Cut the buffers into chunks: the index of the first buffer in it and its pieces. Both ends cut alike."""
    first, pieces, room = 0, list[memoryview](), CHUNK_BYTES
    for index, view in enumerate(views):
        start = 0
        while start < len(view):
            if not pieces:
                first = index
            piece = view[start : start + room]
            pieces.append(piece)
            start += len(piece)
            room -= len(piece)
            if room == 0 or len(pieces) == _MAX_PIECES:
                yield first, pieces
                pieces, room = [], CHUNK_BYTES
    if pieces:
        yield first, pieces


def _checksum_of(pieces: Sequence[memoryview]) -> int:
    digest = xxhash.xxh3_64()
    for piece in pieces:
        digest.update(piece)
    return int(digest.intdigest())


def _without(views: list[memoryview], num_bytes: int) -> list[memoryview]:
    """What is left of `views` behind their first `num_bytes`."""
    for index, view in enumerate(views):
        if num_bytes < len(view):
            return [view[num_bytes:], *views[index + 1 :]]
        num_bytes -= len(view)
    return []


def _send_all(connection: socket.socket, views: list[memoryview]) -> None:
    while views:
        views = _without(views, connection.sendmsg(views))


def _send_frame(connection: socket.socket, pieces: list[memoryview]) -> None:
    header = _FRAME.pack(sum(map(len, pieces)), _checksum_of(pieces))
    _send_all(connection, [memoryview(header), *pieces])


def _receive_all(connection: socket.socket, views: list[memoryview]) -> None:
    while views:
        count = connection.recvmsg_into(views, 0, socket.MSG_WAITALL)[0]
        if count == 0:
            raise _BrokenStreamError("the connection was closed")
        views = _without(views, count)


def _receive(connection: socket.socket, num_bytes: int) -> bytes:
    received = bytearray(num_bytes)
    _receive_all(connection, [memoryview(received)] if num_bytes else [])
    return bytes(received)


def _receive_frame_into(connection: socket.socket, pieces: list[memoryview]) -> bool:
    """Receive one chunk straight into its places; False if its checksum differs."""
    header = bytearray(_FRAME.size)
    # Not MSG_WAITALL: a source that announces less than expected must be noticed, not waited for.
    count = connection.recvmsg_into([memoryview(header), *pieces])[0]
    if count == 0:
        raise _BrokenStreamError("the connection was closed")
    if count < _FRAME.size:
        _receive_all(connection, [memoryview(header)[count:]])
        count = _FRAME.size
    length, checksum = _FRAME.unpack(header)
    expected = sum(map(len, pieces))
    if length != expected:
        raise _BrokenStreamError(f"a transfer chunk of {length} bytes came where {expected} were expected")
    _receive_all(connection, _without(pieces, count - _FRAME.size))
    return _checksum_of(pieces) == int(checksum)


def _send_object(connection: socket.socket, value: dict[str, object]) -> None:
    _send_frame(connection, [memoryview(_encode(value))])


def _encode(value: dict[str, object]) -> bytes:
    encoded = json.dumps(value, separators=(",", ":"), allow_nan=False).encode()
    if len(encoded) > MAX_HEADER_BYTES:
        raise TransferError(f"transfer header of {len(encoded)} bytes exceeds {MAX_HEADER_BYTES}")
    return encoded


def _receive_object(connection: socket.socket) -> dict[str, object]:
    length, checksum = _FRAME.unpack(_receive(connection, _FRAME.size))
    if length > MAX_HEADER_BYTES:
        raise TransferError(f"transfer header of {length} bytes exceeds {MAX_HEADER_BYTES}")
    encoded = _receive(connection, length)
    if _checksum_of([memoryview(encoded)]) != checksum:
        raise TransferError("transfer header has a wrong checksum")
    try:
        value = json.loads(encoded)
    except (ValueError, RecursionError) as error:
        raise TransferError(f"transfer header of {length} bytes is not JSON") from error
    if not isinstance(value, dict):
        raise TransferError(f"transfer header is a JSON {type(value).__name__}, not an object")
    return value


def _prepare(connection: socket.socket, timeout_s: float) -> None:
    """Blocking calls that the kernel itself ends after `timeout_s` of silence: no poll per call."""
    connection.settimeout(None)
    timeval = struct.pack("ll", int(timeout_s), int(timeout_s % 1 * 1e6))
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, timeval)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, timeval)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


# The source ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Grant:
    secret: bytes
    expires_at_s: float


class TransferServer:
    """The source side of a worker: a listening socket, a thread per connection, and the grants that open it."""

    def __init__(
        self,
        host: str = "127.0.0.1",
        rate_limiter: RateLimiter | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._socket = listen(host)
        self.port: int = self._socket.getsockname()[1]
        self.address = join_address(host, self.port)
        self._rate_limiter = rate_limiter or RateLimiter(None)
        self._clock = clock
        self._handler: Handler | None = None
        self._lock = threading.Lock()
        self._grants: dict[str, _Grant] = {}
        self._connections: dict[socket.socket, str | None] = {}
        self._threads: set[threading.Thread] = set()
        self._bytes_sent = 0
        self._is_closed = False
        self._thread = threading.Thread(target=self._accept, name="transfer-listener", daemon=True)
        self._thread.start()

    @property
    def bytes_sent(self) -> int:
        """Buffer bytes handed to the kernel so far, of every connection."""
        return self._bytes_sent

    def register(self, handler: Handler) -> None:
        """Answer requests by `handler(grant_id, request)`, called on the connection's thread.

        A SpotServeError it raises becomes a TransferRefusedError with the same message at the destination.
        """
        self._handler = handler

    def grant(self, grant_id: str, secret: bytes, expires_s: float) -> None:
        """Let whoever proves `secret` ask under `grant_id` for the next `expires_s` seconds."""
        if not secret or not 0 < len(grant_id.encode()) <= 255:
            raise InvariantError(f"grant id of {len(grant_id)} characters or secret of {len(secret)} bytes is unusable")
        now_s = self._clock()
        with self._lock:
            for expired in sorted(name for name, grant in self._grants.items() if grant.expires_at_s <= now_s):
                self._drop_grant(expired)
            known = self._grants.get(grant_id)
            if known is not None and known.secret != secret:
                self._drop_grant(grant_id)
            self._grants[grant_id] = _Grant(secret, now_s + expires_s)

    def revoke(self, grant_id: str) -> None:
        """Take a grant back and end its connections; unknown ids are fine."""
        with self._lock:
            self._drop_grant(grant_id)

    def close(self) -> None:
        """Stop listening and end every connection."""
        with self._lock:
            self._is_closed = True
            for connection in [self._socket, *self._connections]:
                _interrupt(connection)
            threads = [self._thread, *self._threads]
        for thread in threads:
            thread.join()
        self._socket.close()

    def _drop_grant(self, grant_id: str) -> None:
        self._grants.pop(grant_id, None)
        for connection, used_id in self._connections.items():
            if used_id == grant_id:
                _interrupt(connection)

    def _live_grant(self, grant_id: str) -> _Grant | None:
        with self._lock:
            grant = self._grants.get(grant_id)
        return grant if grant is not None and self._clock() < grant.expires_at_s else None

    def _accept(self) -> None:
        while not self._is_closed:
            try:
                connection, _ = self._socket.accept()
            except OSError as error:
                # Closed, or out of descriptors: the next turn of the loop tells.
                if not self._is_closed:
                    log.warning("transfer_accept_failed", reason=str(error))
                    time.sleep(0.05)
                continue
            thread = threading.Thread(target=self._serve, args=(connection,), name="transfer-source", daemon=True)
            with self._lock:
                if self._is_closed or len(self._connections) >= _MAX_CONNECTIONS:
                    connection.close()
                    continue
                self._connections[connection] = None
                self._threads.add(thread)
                thread.start()

    def _serve(self, connection: socket.socket) -> None:
        """One connection from its hello to its end."""
        try:
            grant_id = self._prove(connection)
            if grant_id is not None:
                self._answer_requests(connection, grant_id)
        except (OSError, _BrokenStreamError, ValueError) as error:
            log.debug("transfer_connection_ended", reason=str(error))
        except TransferError as error:
            log.warning("transfer_connection_dropped", reason=error.message)
        finally:
            # Under the lock, so that nobody interrupts a descriptor that is already somebody else's.
            with self._lock:
                del self._connections[connection]
                self._threads.discard(threading.current_thread())
                connection.close()

    def _prove(self, connection: socket.socket) -> str | None:
        """The grant whose secret the dialer proved, or None."""
        _prepare(connection, _HELLO_TIMEOUT_S)
        magic = _receive(connection, len(_MAGIC))
        if magic != _MAGIC:
            return None
        hello = magic + _receive(connection, _HELLO.size - len(_MAGIC))
        encoded_id = _receive(connection, _HELLO.unpack(hello)[1])
        grant_id = encoded_id.decode()
        grant = self._live_grant(grant_id)
        if grant is None:
            log.warning("transfer_grant_unknown", grant=grant_id)
            return None
        handshake = Handshake(grant.secret, hello + encoded_id)
        connection.sendall(handshake.challenge())
        if not handshake.is_answered_by(_receive(connection, PROOF_BYTES)):
            log.warning("transfer_proof_wrong", grant=grant_id)
            return None
        with self._lock:
            if self._grants.get(grant_id) is not grant:
                return None
            self._connections[connection] = grant_id
        connection.sendall(ACCEPTED)
        return grant_id

    def _answer_requests(self, connection: socket.socket, grant_id: str) -> None:
        _prepare(connection, _SOURCE_TIMEOUT_S)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", 0, 0))
        while True:
            request = _receive_object(connection)
            if self._live_grant(grant_id) is None:
                _send_object(connection, {"error": f"grant {grant_id} has expired"})
                return
            self._answer(connection, grant_id, request)

    def _answer(self, connection: socket.socket, grant_id: str, request: dict[str, object]) -> None:
        try:
            if self._handler is None:
                raise TransferError("source is not ready to serve transfers")
            answer = self._handler(grant_id, request)
        except SpotServeError as error:
            _send_object(connection, {"error": error.message[:1000]})
            return
        try:
            self._stream(connection, answer)
        finally:
            if answer.release is not None:
                answer.release()

    def _stream(self, connection: socket.socket, answer: TransferReply) -> None:
        views = [_as_bytes(buffer) for buffer in answer.buffers]
        try:
            header = _encode({"reply": answer.reply, "sizes": [len(view) for view in views]})
        except TransferError as error:
            _send_object(connection, {"error": error.message})
            return
        _send_frame(connection, [memoryview(header)])
        for _, pieces in _chunks_of(views):
            num_bytes = sum(map(len, pieces))
            self._rate_limiter.acquire(num_bytes, lambda: self._is_closed)
            _send_frame(connection, pieces)
            with self._lock:
                self._bytes_sent += num_bytes


def _interrupt(connection: socket.socket) -> None:
    """Wake whoever is blocked on the socket."""
    with contextlib.suppress(OSError):  # It may be unconnected or gone already.
        connection.shutdown(socket.SHUT_RDWR)


# The destination -------------------------------------------------------------------------------------------------


class TransferClient:
    """The destination side: one connection to one source under one grant, dialed at the first request.

    One request at a time; `close` may come from any thread. After an error the next request dials anew.
    """

    def __init__(
        self,
        address: str,
        grant_id: str,
        secret: bytes,
        rate_limiter: RateLimiter | None = None,
        timeout_s: float = 30.0,
    ) -> None:
        self.address = address
        self.grant_id = grant_id
        self._secret = secret
        self._rate_limiter = rate_limiter or RateLimiter(None)
        self._timeout_s = timeout_s
        self._lock = threading.Lock()
        self._socket: socket.socket | None = None
        self._is_busy = False
        self._is_closed = False
        self.bytes_received = 0
        self.bytes_verified = 0
        self.first_byte_s: float | None = None
        """Monotonic time at which the first transfer chunk was here."""

    def request(
        self,
        request: dict[str, object],
        destinations: Sequence[Buffer] | Callable[[dict[str, object]], Sequence[Buffer]] = (),
        *,
        on_buffer: Callable[[int], None] | None = None,
    ) -> dict[str, object]:
        """Ask the source and fill the destinations.

        Args:
            request: what the source's handler gets, at most 1 MiB of JSON.
            destinations: where the buffers go, in order, or a function that says so once it knows the reply. Their
                sizes are the sizes expected.
            on_buffer: told the index of each buffer, in order, once it is complete and checked.

        Returns:
            The reply of the source's handler.

        Raises:
            TransferRefusedError: the source's handler, or its check of the grant, said no.
            TransferInterruptedError: connection, timeout, close or checksum; it counts the buffers verified.
            TransferError: a header out of bounds or sizes other than those expected; nothing was written.
        """
        num_verified = 0

        def count(index: int) -> None:
            nonlocal num_verified
            num_verified = index + 1
            if on_buffer is not None:
                on_buffer(index)

        encoded = _encode(request)
        with self._lock:
            if self._is_busy:
                raise InvariantError(f"transfer client of {self.address} is asked by two threads at once")
            self._is_busy = True
        is_in_step = False
        try:
            connection = self._socket or self._dial()
            _send_frame(connection, [memoryview(encoded)])
            reply = self._receive_reply(connection, destinations, count)
            is_in_step = True
            return reply
        except TransferRefusedError:
            is_in_step = True
            raise
        except (OSError, _BrokenStreamError) as error:
            raise TransferInterruptedError(
                f"transfer from {self.address} {self._why_broken(error)}", num_buffers_verified=num_verified
            ) from error
        finally:
            self._finish(is_in_step=is_in_step)

    def close(self) -> None:
        """End the connection; a blocked request raises TransferInterruptedError, as does every later one."""
        with self._lock:
            self._is_closed = True
            if self._socket is not None:
                _interrupt(self._socket)
                if not self._is_busy:
                    self._socket.close()
                    self._socket = None

    def _finish(self, *, is_in_step: bool) -> None:
        with self._lock:
            self._is_busy = False
            if self._socket is not None and (self._is_closed or not is_in_step):
                self._socket.close()
                self._socket = None

    def _why_broken(self, error: OSError | _BrokenStreamError) -> str:
        if self._is_closed:
            return "was closed by this side"
        if isinstance(error, BlockingIOError):
            return f"was silent for {self._timeout_s} s"
        return f"broke off: {error}"

    def _dial(self) -> socket.socket:
        host, port = split_address(self.address)
        connection = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
        # Known to `close` before it blocks.
        with self._lock:
            if self._is_closed:
                connection.close()
                raise _BrokenStreamError("the client is closed")
            self._socket = connection
        _prepare(connection, self._timeout_s)
        connection.connect((host, port))
        encoded_id = self.grant_id.encode()
        hello = _HELLO.pack(_MAGIC, len(encoded_id), os.urandom(NONCE_BYTES)) + encoded_id
        handshake = Handshake(self._secret, hello)
        try:
            connection.sendall(hello)
            answer = handshake.answer(_receive(connection, Handshake.CHALLENGE_BYTES))
            if answer is None:
                raise _BrokenStreamError("its proof of the secret is wrong")
            connection.sendall(answer)
            _receive(connection, len(ACCEPTED))
        except (ConnectionError, _BrokenStreamError) as error:
            raise _BrokenStreamError(f"grant {self.grant_id} was refused ({error})") from error
        return connection

    def _receive_reply(
        self,
        connection: socket.socket,
        destinations: Sequence[Buffer] | Callable[[dict[str, object]], Sequence[Buffer]],
        on_buffer: Callable[[int], None],
    ) -> dict[str, object]:
        header = _receive_object(connection)
        if "error" in header:
            raise TransferRefusedError(f"source {self.address} refused: {header['error']}")
        reply = header.get("reply")
        if not isinstance(reply, dict):
            raise TransferError(f"header from {self.address} has no reply")
        views = [_as_bytes(buffer) for buffer in (destinations(reply) if callable(destinations) else destinations)]
        self._check_sizes(header.get("sizes"), views)
        self._receive_buffers(connection, views, on_buffer)
        return reply

    def _check_sizes(self, sizes: object, views: Sequence[memoryview]) -> None:
        if not isinstance(sizes, list) or len(sizes) != len(views):
            announced = len(sizes) if isinstance(sizes, list) else "no"
            raise TransferError(f"source {self.address} announced {announced} buffers, {len(views)} were expected")
        for index, (size, view) in enumerate(zip(sizes, views, strict=True)):
            if size != len(view):
                raise TransferError(
                    f"buffer {index} from {self.address} has {size} bytes, {len(view)} were expected",
                    hint="source and destination disagree on the layout",
                )
            if view.readonly and len(view):
                raise InvariantError(f"destination buffer {index} is read-only")

    def _receive_buffers(
        self, connection: socket.socket, views: Sequence[memoryview], on_buffer: Callable[[int], None]
    ) -> None:
        ends = list(accumulate(len(view) for view in views))
        received, next_index = 0, 0
        for first, pieces in _chunks_of(views):
            is_right = _receive_frame_into(connection, pieces)
            if self.first_byte_s is None:
                self.first_byte_s = time.monotonic()
            num_bytes = sum(map(len, pieces))
            received += num_bytes
            self.bytes_received += num_bytes
            if not is_right:
                last = bisect_left(ends, received)
                raise _BrokenStreamError(
                    f"transfer chunk of buffer {first}"
                    + (f" to {last}" if last > first else "")
                    + " has a wrong checksum"
                )
            self.bytes_verified += num_bytes
            while next_index < len(ends) and ends[next_index] <= received:
                on_buffer(next_index)
                next_index += 1
            self._rate_limiter.acquire(num_bytes, lambda: self._is_closed)
        for index in range(next_index, len(ends)):  # Empty ones behind the last chunk, or nothing but empty ones.
            on_buffer(index)
