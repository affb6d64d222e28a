"""The socket mesh of one replica generation: descriptors, pipeline activations and tensor-parallel exchanges on CPU.

Every pair of ranks that talks has plain TCP sockets of its own, one per channel, so that a slow activation never holds
up a descriptor. Exchanges only move bytes; whoever calls adds them up in rank order, which is what makes the sums the
same on every rank. gloo would be 10-30 times slower for the few KiB of a decode step and cannot be aborted.

A worker has one `MeshListener` for life. Each generation is joined on a side thread while the old one decodes; the two
share nothing but that listener. A socket belongs to a join only after both ends have proved by HMAC that they know the
generation's secret; anything else that connects is dropped and disturbs nobody.

Rank of position (stage p, tensor index m) is p * tensor_degree + m.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import hashlib
import hmac
import os
import select
import socket
import struct
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch

from spotserve.errors import InvariantError, MeshError
from spotserve.log import get_logger

MAX_CONTROL_BYTES = 64 << 20
SEND_BUFFER_BYTES = 4 << 20
NONCE_BYTES = 32
PROOF_BYTES = hashlib.sha256().digest_size
ACCEPTED = b"\x01"

_MAGIC = b"SPOTMSH1"
_HELLO = struct.Struct("<8sHHBB32s")  # magic, dialer, acceptor, channel, bytes of the key that follows, nonce
_LENGTH = struct.Struct("<Q")
_MAX_UNPROVED_SOCKETS = 512
_HELLO_TIMEOUT_S = 5.0
_PARKED_TIMEOUT_S = 30.0
_CANCEL_POLL_S = 0.05
_REDIAL_S = 0.02

log = get_logger("mesh")


class MeshTimeoutError(MeshError):
    """Nothing came within the time the caller gave; the mesh is still usable."""


class PeerLostError(MeshError):
    """A peer's socket was closed or broke."""

    def __init__(self, message: str, *, rank: int) -> None:
        super().__init__(message)
        self.rank = rank


class Channel(enum.IntEnum):
    """The independent ordered byte streams between two ranks."""

    CONTROL = 0
    PIPELINE = 1
    TENSOR = 2


class Handshake:
    """Mutual proof of a shared secret, without I/O: hello, challenge, answer, `ACCEPTED`.

    Each side proves over the whole hello and both nonces under a label of its own, so a proof can be neither replayed
    nor reflected. The mesh and the bulk transfers both use it.
    """

    CHALLENGE_BYTES = NONCE_BYTES + PROOF_BYTES

    def __init__(self, secret: bytes, hello: bytes) -> None:
        if not secret:
            raise InvariantError("handshake secret is empty")
        self._secret = secret
        self._hello = hello
        self._nonce = b""

    def challenge(self) -> bytes:
        """Acceptor: a nonce for the dialer and the proof that the acceptor knows the secret."""
        self._nonce = os.urandom(NONCE_BYTES)
        return self._nonce + self._proof(b"acceptor")

    def answer(self, challenge: bytes) -> bytes | None:
        """Dialer: the proof for the acceptor, or None if the acceptor's own proof is wrong."""
        self._nonce = challenge[:NONCE_BYTES]
        if not hmac.compare_digest(self._proof(b"acceptor"), challenge[NONCE_BYTES:]):
            return None
        return self._proof(b"dialer")

    def is_answered_by(self, answer: bytes) -> bool:
        """Acceptor: whether the dialer proved the secret."""
        return hmac.compare_digest(self._proof(b"dialer"), answer)

    def _proof(self, role: bytes) -> bytes:
        return hmac.digest(self._secret, b"spotserve|" + role + b"|" + self._nonce + self._hello, "sha256")


def split_address(address: str) -> tuple[str, int]:
    """Host and port of `host:port` (`[host]:port` for IPv6)."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65535:
        raise InvariantError(f"address {address!r} is not host:port")
    return host.removeprefix("[").removesuffix("]"), int(port)


def join_address(host: str, port: int) -> str:
    """`host:port`, with brackets around an IPv6 host."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def listen(host: str) -> socket.socket:
    """A listening TCP socket on a port that the operating system chooses."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server((host, 0), family=family, backlog=128)


def byte_view(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor of any dtype as bytes, without a copy."""
    if not tensor.is_contiguous() or tensor.device.type != "cpu":
        raise InvariantError(f"tensor of shape {tuple(tensor.shape)} on {tensor.device} is not contiguous CPU memory")
    return tensor.detach().view(-1).view(torch.uint8).numpy().data


def channels_of(rank: int, *, pipeline_degree: int, tensor_degree: int) -> list[tuple[int, Channel]]:
    """Every (peer, channel) that `rank` needs, sorted: nothing is opened that nobody uses."""
    stage, index = divmod(rank, tensor_degree)
    num_ranks = pipeline_degree * tensor_degree
    control = range(1, num_ranks) if rank == 0 else [0]
    pipeline = [p * tensor_degree + index for p in (stage - 1, stage + 1) if 0 <= p < pipeline_degree]
    tensor = [stage * tensor_degree + m for m in range(tensor_degree) if m != index]
    return sorted(
        [(peer, Channel.CONTROL) for peer in control]
        + [(peer, Channel.PIPELINE) for peer in pipeline]
        + [(peer, Channel.TENSOR) for peer in tensor]
    )


# Links -----------------------------------------------------------------------------------------------------------


class _Link:
    """One proved socket to one peer, with a lock per direction."""

    __slots__ = ("channel", "is_closed", "key", "rank", "receive_lock", "send_lock", "socket")

    def __init__(self, connection: socket.socket, *, key: str, rank: int, channel: Channel) -> None:
        connection.settimeout(None)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
        self.socket = connection
        self.key = key
        self.rank = rank
        self.channel = channel
        self.is_closed = False
        # Reentrant, so that whoever closes from inside an operation does not wait for itself.
        self.send_lock = threading.RLock()
        self.receive_lock = threading.RLock()

    def failure(self, cause: OSError | None = None) -> MeshError:
        if self.is_closed:
            return MeshError(f"mesh {self.key} was closed")
        reason = "closed its end" if cause is None else (cause.strerror or str(cause)).lower()
        return PeerLostError(
            f"rank {self.rank} of mesh {self.key} is gone ({self.channel.name.lower()} channel: {reason})",
            rank=self.rank,
        )

    def interrupt(self) -> None:
        """Wake whoever is blocked on the socket. The descriptor stays open until nobody can be using it."""
        self.is_closed = True
        with contextlib.suppress(OSError):  # The peer may have gone first.
            self.socket.shutdown(socket.SHUT_RDWR)

    def release(self) -> None:
        with self.send_lock, self.receive_lock:
            self.socket.close()

    def is_readable(self, timeout_s: float | None) -> bool:
        """Whether bytes, or the peer's end, are there within the time."""
        if self.is_closed:
            raise self.failure()
        poll = select.poll()
        try:
            poll.register(self.socket, select.POLLIN)
        except ValueError as error:  # The descriptor was released between the check and here.
            raise self.failure() from error
        return bool(poll.poll(None if timeout_s is None else max(0.0, timeout_s) * 1000))

    def receive_exactly(self, view: memoryview) -> None:
        received = 0
        while received < len(view):
            try:
                count = self.socket.recv_into(view[received:], 0, socket.MSG_WAITALL)
            except OSError as error:
                raise self.failure(error) from error
            if count == 0:
                raise self.failure()
            received += count


@dataclass(slots=True)
class _Outgoing:
    """A length and a payload on their way to one peer."""

    link: _Link
    payload: memoryview
    header: bytes = b""
    sent: int = 0

    def __post_init__(self) -> None:
        self.header = _LENGTH.pack(len(self.payload))

    def push(self, flags: int = 0) -> bool:
        """Send what the socket takes; True once all is sent."""
        if self.sent < _LENGTH.size:
            parts = [memoryview(self.header)[self.sent :], self.payload]
        else:
            parts = [self.payload[self.sent - _LENGTH.size :]]
        try:
            self.sent += self.link.socket.sendmsg(parts, [], flags)
        except BlockingIOError:
            return False
        except OSError as error:
            raise self.link.failure(error) from error
        return self.sent == _LENGTH.size + len(self.payload)


@dataclass(slots=True)
class _Incoming:
    """A length and a payload expected from one peer; the payload lands where it is wanted."""

    link: _Link
    payload: memoryview
    header: bytearray = field(default_factory=lambda: bytearray(_LENGTH.size))
    received: int = 0

    def pull(self, flags: int = 0) -> bool:
        """Receive what is there; True once all is received."""
        if self.received < _LENGTH.size:
            parts = [memoryview(self.header)[self.received :], self.payload]
        else:
            parts = [self.payload[self.received - _LENGTH.size :]]
            # Only once the length is known to be right: a peer that sends less would leave us waiting for ever.
            flags = flags or socket.MSG_WAITALL
        try:
            count = self.link.socket.recvmsg_into(parts, 0, flags)[0]
        except BlockingIOError:
            return False
        except OSError as error:
            raise self.link.failure(error) from error
        if count == 0:
            raise self.link.failure()
        is_header_new = self.received < _LENGTH.size
        self.received += count
        if is_header_new and self.received >= _LENGTH.size:
            self._check_length()
        return self.received == _LENGTH.size + len(self.payload)

    def _check_length(self) -> None:
        (length,) = _LENGTH.unpack(self.header)
        if length != len(self.payload):
            link = self.link
            raise MeshError(
                f"rank {link.rank} of mesh {link.key} sent {length} bytes on the {link.channel.name.lower()} channel, "
                f"{len(self.payload)} were expected"
            )


def _exchange(outgoing: Sequence[_Outgoing], incoming: Sequence[_Incoming]) -> None:
    """Send and receive until all is through, never waiting for one direction while the other is stuck."""
    unsent = [item for item in outgoing if not item.push(socket.MSG_DONTWAIT)]
    unread = list(incoming)
    while unsent:
        poll = select.poll()
        events: dict[int, int] = {}
        for link, event in [(o.link, select.POLLOUT) for o in unsent] + [(i.link, select.POLLIN) for i in unread]:
            descriptor = link.socket.fileno()
            if descriptor < 0:
                raise link.failure()
            events[descriptor] = events.get(descriptor, 0) | event
        for descriptor, event in events.items():
            poll.register(descriptor, event)
        poll.poll()
        unread = [item for item in unread if not item.pull(socket.MSG_DONTWAIT)]
        unsent = [item for item in unsent if not item.push(socket.MSG_DONTWAIT)]
    # All of ours is in the kernel, so blocking on one peer after another can hold up nobody.
    for item in unread:
        while not item.pull():
            pass


# The mesh --------------------------------------------------------------------------------------------------------


class Mesh:
    """The sockets of one rank in one replica generation, made by `join`; each channel may have a thread of its own.

    After any MeshError but MeshTimeoutError the streams may be out of step: close the mesh.
    """

    def __init__(
        self,
        key: str,
        rank: int,
        *,
        pipeline_degree: int,
        tensor_degree: int,
        sockets: dict[tuple[int, Channel], socket.socket],
    ) -> None:
        self.key = key
        self.rank = rank
        self.pipeline_degree = pipeline_degree
        self.tensor_degree = tensor_degree
        self.stage, self.tensor_index = divmod(rank, tensor_degree)
        self._is_closed = False
        self._tensor_lock = threading.RLock()
        self._links = {
            (peer, channel): _Link(connection, key=key, rank=peer, channel=channel)
            for (peer, channel), connection in sockets.items()
        }
        first = self.stage * tensor_degree
        self._tensor_links = [
            (m, self._links[(first + m, Channel.TENSOR)]) for m in range(tensor_degree) if m != self.tensor_index
        ]

    @property
    def num_ranks(self) -> int:
        """Ranks of the replica."""
        return self.pipeline_degree * self.tensor_degree

    @property
    def is_closed(self) -> bool:
        """Whether `close` was called."""
        return self._is_closed

    def send_control(self, rank: int, payload: bytes) -> None:
        """Send one framed message; returns once the kernel has it."""
        if len(payload) > MAX_CONTROL_BYTES:
            raise MeshError(f"control message of {len(payload)} bytes exceeds {MAX_CONTROL_BYTES}")
        self._send(self._link(rank, Channel.CONTROL), memoryview(payload))

    def recv_control(self, rank: int, timeout_s: float | None) -> bytes:
        """The next framed message of that rank.

        Raises:
            MeshTimeoutError: none began within `timeout_s`; nothing is lost by asking again.
        """
        link = self._link(rank, Channel.CONTROL)
        with link.receive_lock:
            if timeout_s is not None and not link.is_readable(timeout_s):
                raise MeshTimeoutError(f"rank {rank} of mesh {self.key} sent no control message within {timeout_s} s")
            header = bytearray(_LENGTH.size)
            link.receive_exactly(memoryview(header))
            (length,) = _LENGTH.unpack(header)
            if length > MAX_CONTROL_BYTES:
                raise MeshError(f"control message of {length} bytes from rank {rank} exceeds {MAX_CONTROL_BYTES}")
            payload = bytearray(length)
            link.receive_exactly(memoryview(payload))
        return bytes(payload)

    def poll_control(self, rank: int) -> bool:
        """Whether `recv_control` would find a message, or the peer's death, at once."""
        return self._link(rank, Channel.CONTROL).is_readable(0.0)

    def send_tensor(self, rank: int, tensor: torch.Tensor) -> None:
        """Send a contiguous tensor over the pipeline channel."""
        self._send(self._link(rank, Channel.PIPELINE), byte_view(tensor))

    def recv_tensor(self, rank: int, out: torch.Tensor) -> None:
        """Receive a tensor of exactly the bytes of `out` into it over the pipeline channel."""
        link = self._link(rank, Channel.PIPELINE)
        incoming = _Incoming(link, byte_view(out))
        with link.receive_lock:
            while not incoming.pull():
                pass

    def all_gather(self, tensor: torch.Tensor, out: Sequence[torch.Tensor]) -> None:
        """Exchange with the tensor-parallel ranks of this stage.

        Args:
            tensor: what this rank contributes, contiguous; ranks may contribute different sizes.
            out: one tensor per tensor index, which says the size expected from it; the own place is filled too, and
                may be `tensor` itself.
        """
        if len(out) != self.tensor_degree:
            raise InvariantError(f"{len(out)} places for a gather of tensor degree {self.tensor_degree}")
        own = out[self.tensor_index]
        if own.nbytes != tensor.nbytes:
            raise InvariantError(f"own part of {tensor.nbytes} bytes does not fit its place of {own.nbytes}")
        mine = byte_view(tensor)
        with self._tensor_lock:
            outgoing = [_Outgoing(link, mine) for _, link in self._tensor_links]
            incoming = [_Incoming(link, byte_view(out[m])) for m, link in self._tensor_links]
            _exchange(outgoing, incoming)
        if own.data_ptr() != tensor.data_ptr():
            own.copy_(tensor.view_as(own))

    def close(self) -> None:
        """Make every blocked and later call, in any thread, raise MeshError; idempotent."""
        self._is_closed = True
        for link in self._links.values():
            link.interrupt()
        with self._tensor_lock:
            for link in self._links.values():
                link.release()

    def _link(self, rank: int, channel: Channel) -> _Link:
        link = self._links.get((rank, channel))
        if link is None:
            raise InvariantError(f"rank {self.rank} of mesh {self.key} has no {channel.name.lower()} channel to {rank}")
        return link

    def _send(self, link: _Link, payload: memoryview) -> None:
        outgoing = _Outgoing(link, payload)
        with link.send_lock:
            while not outgoing.push():
                pass


# Joining ---------------------------------------------------------------------------------------------------------


class _Expectation:
    """What one join waits for at the listener: proved sockets of the higher ranks."""

    def __init__(self, *, rank: int, secret: bytes, wanted: set[tuple[int, Channel]]) -> None:
        self.rank = rank
        self.secret = secret
        self._wanted = wanted
        self._condition = threading.Condition()
        self._sockets: dict[tuple[int, Channel], socket.socket] = {}
        self._is_open = True

    def wants(self, hello: _Hello) -> bool:
        return hello.acceptor == self.rank and (hello.dialer, hello.channel) in self._wanted

    def offer(self, hello: _Hello, connection: socket.socket) -> bool:
        """Take a proved socket; False once the join is over. If a dialer tried again its newest one is live."""
        with self._condition:
            if not self._is_open:
                return False
            older = self._sockets.pop((hello.dialer, hello.channel), None)
            self._sockets[(hello.dialer, hello.channel)] = connection
            self._condition.notify_all()
        if older is not None:
            older.close()
        return True

    def take(self, deadline: _Deadline) -> dict[tuple[int, Channel], socket.socket]:
        with self._condition:
            while missing := sorted(self._wanted - self._sockets.keys()):
                rank, channel = missing[0]
                deadline.check(f"rank {rank} has not dialed its {channel.name.lower()} channel")
                self._condition.wait(deadline.slice_s())
            taken, self._sockets = self._sockets, {}
            return taken

    def close(self) -> None:
        with self._condition:
            self._is_open = False
            for connection in self._sockets.values():
                connection.close()
            self._sockets.clear()


@dataclass(frozen=True, slots=True)
class _Hello:
    """The first bytes of a dialer: who it is and whom it wants."""

    dialer: int
    acceptor: int
    channel: Channel
    key: str
    nonce: bytes

    def pack(self) -> bytes:
        key = self.key.encode()
        return _HELLO.pack(_MAGIC, self.dialer, self.acceptor, self.channel, len(key), self.nonce) + key


@dataclass(slots=True)
class _Deadline:
    """The end of a join: its time is up, or the plan was cancelled."""

    key: str
    at_s: float
    timeout_s: float
    cancelled: threading.Event

    def slice_s(self) -> float:
        """How long to wait before looking at the cancellation again."""
        return max(0.0, min(_CANCEL_POLL_S, self.at_s - time.monotonic()))

    def check(self, what: str) -> None:
        if self.cancelled.is_set():
            raise MeshError(f"join of mesh {self.key} was cancelled: {what}")
        if time.monotonic() >= self.at_s:
            raise MeshTimeoutError(f"join of mesh {self.key} exceeded {self.timeout_s} s: {what}")


class MeshListener:
    """The worker's one listening socket for meshes; hands proved sockets to the join that waits for their key.

    The peers' joins do not start at the same moment, so a hello for a key that nobody waits for yet is kept for
    half a minute. Garbage, floods and wrong secrets cost a socket here and nothing else.
    """

    def __init__(self, host: str = "127.0.0.1") -> None:
        self._socket = listen(host)
        self._socket.setblocking(False)
        self.port: int = self._socket.getsockname()[1]
        self.address = join_address(host, self.port)
        self._expectations: dict[str, _Expectation] = {}
        self._lock = threading.Lock()
        self._loop = asyncio.new_event_loop()
        self._registered = asyncio.Event()
        self._stopping = asyncio.Event()
        self._is_closed = False
        self._thread = threading.Thread(target=self._run, name="mesh-listener", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop listening. Meshes already joined live on; joins in progress get no more peers."""
        with self._lock:
            if self._is_closed:
                return
            self._is_closed = True
            self._loop.call_soon_threadsafe(self._stopping.set)
        self._thread.join()

    @contextlib.contextmanager
    def expecting(self, key: str, expectation: _Expectation) -> Iterator[None]:
        """While the block runs, proved sockets for `key` go to `expectation`."""
        with self._lock:
            if self._is_closed:
                raise MeshError(f"join of mesh {key}: the listener is closed")
            if key in self._expectations:
                raise InvariantError(f"mesh {key} is already being joined at {self.address}")
            self._expectations[key] = expectation
            self._loop.call_soon_threadsafe(self._announce)
        try:
            yield
        finally:
            with self._lock:
                del self._expectations[key]
            expectation.close()

    def _announce(self) -> None:
        """Wake every parked socket to look again."""
        self._registered.set()
        self._registered = asyncio.Event()

    def _run(self) -> None:
        with contextlib.closing(self._loop):
            self._loop.run_until_complete(self._serve())

    async def _serve(self) -> None:
        greetings: set[asyncio.Task[None]] = set()
        accepting = asyncio.create_task(self._accept(greetings))
        await self._stopping.wait()
        for task in [accepting, *greetings]:
            task.cancel()
        await asyncio.gather(accepting, *greetings, return_exceptions=True)
        self._socket.close()

    async def _accept(self, greetings: set[asyncio.Task[None]]) -> None:
        while True:
            try:
                connection, _ = await self._loop.sock_accept(self._socket)
            except OSError as error:  # Out of descriptors, or a dialer that gave up while in the backlog.
                log.warning("mesh_accept_failed", reason=str(error))
                await asyncio.sleep(_CANCEL_POLL_S)
                continue
            if len(greetings) >= _MAX_UNPROVED_SOCKETS:
                connection.close()
                continue
            connection.setblocking(False)
            task = asyncio.create_task(self._greet(connection))
            greetings.add(task)
            task.add_done_callback(greetings.discard)

    async def _greet(self, connection: socket.socket) -> None:
        """Take one socket from its hello to the join that wants it, or drop it."""
        is_handed_over = False
        try:
            is_handed_over = await self._prove(connection)
        except (OSError, EOFError, TimeoutError, ValueError) as error:
            log.debug("mesh_dialer_dropped", reason=str(error))
        finally:
            if not is_handed_over:
                connection.close()

    async def _prove(self, connection: socket.socket) -> bool:
        async with asyncio.timeout(_HELLO_TIMEOUT_S):
            hello = await self._read_hello(connection)
        async with asyncio.timeout(_PARKED_TIMEOUT_S):
            expectation = await self._expectation_of(hello.key)
        if not expectation.wants(hello):
            return False
        handshake = Handshake(expectation.secret, hello.pack())
        async with asyncio.timeout(_HELLO_TIMEOUT_S):
            await self._loop.sock_sendall(connection, handshake.challenge())
            if not handshake.is_answered_by(await self._read(connection, PROOF_BYTES)):
                log.warning("mesh_dialer_refused", key=hello.key, rank=hello.dialer)
                return False
            await self._loop.sock_sendall(connection, ACCEPTED)
        return expectation.offer(hello, connection)

    async def _expectation_of(self, key: str) -> _Expectation:
        while True:
            registered = self._registered
            with self._lock:
                expectation = self._expectations.get(key)
            if expectation is not None:
                return expectation
            await registered.wait()

    async def _read_hello(self, connection: socket.socket) -> _Hello:
        if (magic := await self._read(connection, len(_MAGIC))) != _MAGIC:
            raise ValueError("first bytes are no mesh hello")
        rest = await self._read(connection, _HELLO.size - len(_MAGIC))
        _, dialer, acceptor, channel, key_bytes, nonce = _HELLO.unpack(magic + rest)
        key = (await self._read(connection, key_bytes)).decode()
        return _Hello(dialer=dialer, acceptor=acceptor, channel=Channel(channel), key=key, nonce=nonce)

    async def _read(self, connection: socket.socket, num_bytes: int) -> bytes:
        received = b""
        while len(received) < num_bytes:
            part = await self._loop.sock_recv(connection, num_bytes - len(received))
            if not part:
                raise EOFError("dialer closed its end")
            received += part
        return received


def join(
    listener: MeshListener,
    key: str,
    rank: int,
    addresses: Sequence[str],
    secret: bytes,
    *,
    pipeline_degree: int,
    tensor_degree: int,
    timeout_s: float,
    cancelled: threading.Event,
) -> Mesh:
    """Join the mesh `key` as `rank`: accept from higher ranks, dial lower ones until they answer.

    Blocks until every socket is proved, so it belongs on a side thread. `addresses` are the listeners of all ranks.

    Raises:
        MeshError: cancelled, or not complete in time (MeshTimeoutError); every socket opened so far is closed.
    """
    num_ranks = pipeline_degree * tensor_degree
    if len(addresses) != num_ranks or not 0 <= rank < num_ranks:
        raise InvariantError(f"rank {rank} with {len(addresses)} addresses in a mesh of {num_ranks} ranks")
    if len(key.encode()) > 255:
        raise InvariantError(f"mesh key of {len(key)} characters exceeds 255 bytes")
    deadline = _Deadline(key, time.monotonic() + timeout_s, timeout_s, cancelled)
    needed = channels_of(rank, pipeline_degree=pipeline_degree, tensor_degree=tensor_degree)
    expectation = _Expectation(rank=rank, secret=secret, wanted={link for link in needed if link[0] > rank})
    sockets: dict[tuple[int, Channel], socket.socket] = {}
    with listener.expecting(key, expectation), contextlib.ExitStack() as opened:
        for peer, channel in needed:
            if peer < rank:
                hello = _Hello(dialer=rank, acceptor=peer, channel=channel, key=key, nonce=os.urandom(NONCE_BYTES))
                sockets[(peer, channel)] = opened.enter_context(_dial(addresses[peer], hello, secret, deadline))
        sockets.update(expectation.take(deadline))
        opened.pop_all()
    return Mesh(key, rank, pipeline_degree=pipeline_degree, tensor_degree=tensor_degree, sockets=sockets)


def _dial(address: str, hello: _Hello, secret: bytes, deadline: _Deadline) -> socket.socket:
    """A proved socket to `hello.acceptor`, however often that takes before the deadline."""
    while True:
        try:
            return _dial_once(address, hello, secret, deadline)
        except (OSError, EOFError) as error:
            reason = f"rank {hello.acceptor} at {address} does not answer ({error})"
        deadline.cancelled.wait(min(_REDIAL_S, deadline.slice_s()))
        deadline.check(reason)


def _dial_once(address: str, hello: _Hello, secret: bytes, deadline: _Deadline) -> socket.socket:
    connection = socket.create_connection(split_address(address), timeout=1.0)
    try:
        packed = hello.pack()
        handshake = Handshake(secret, packed)
        connection.sendall(packed)
        answer = handshake.answer(_receive_before(connection, Handshake.CHALLENGE_BYTES, deadline))
        if answer is None:
            raise EOFError("its proof of the secret is wrong")
        connection.sendall(answer)
        _receive_before(connection, len(ACCEPTED), deadline)
    except BaseException:
        connection.close()
        raise
    return connection


def _receive_before(connection: socket.socket, num_bytes: int, deadline: _Deadline) -> bytes:
    received = b""
    while len(received) < num_bytes:
        deadline.check("a peer accepted the connection and has not joined yet")
        connection.settimeout(max(deadline.slice_s(), 0.001))
        try:
            part = connection.recv(num_bytes - len(received))
        except TimeoutError:
            continue
        if not part:
            raise EOFError("it closed the connection")
        received += part
    return received
