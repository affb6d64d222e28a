"""Proofs about bulk transfers: intact buffers, refusals, damage, cancellation and the rate limiter."""

from __future__ import annotations

import contextlib
import json
import random
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import xxhash

from spotserve.errors import InvariantError, SpecError, TransferError
from spotserve.runtime.mesh import NONCE_BYTES, Handshake, split_address
from spotserve.runtime.ratelimit import RateLimiter
from spotserve.runtime.transfer import (
    MAX_HEADER_BYTES,
    TransferClient,
    TransferInterruptedError,
    TransferRefusedError,
    TransferReply,
    TransferServer,
)

SECRET = b"one secret per plan, source and destination"
GRANT = "p4:i0/0:i1/0"
TIMEOUT_S = 20.0


class Clock:
    """A clock that only sleeping moves."""

    def __init__(self) -> None:
        self.now_s = 100.0
        self.slept_s = 0.0

    def __call__(self) -> float:
        return self.now_s

    def sleep(self, duration_s: float) -> None:
        self.now_s += duration_s
        self.slept_s += duration_s


@pytest.fixture
def server() -> Iterator[TransferServer]:
    """A source with one grant."""
    made = TransferServer("127.0.0.1")
    made.grant(GRANT, SECRET, 600.0)
    yield made
    made.close()


@pytest.fixture
def clients() -> Iterator[list[TransferClient]]:
    """The clients a test made, closed at its end."""
    made: list[TransferClient] = []
    yield made
    for client in made:
        client.close()


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    """Threads for the calls that block."""
    with ThreadPoolExecutor(4) as executor:
        yield executor


def client_of(
    server: TransferServer, clients: list[TransferClient], *, grant_id: str = GRANT, secret: bytes = SECRET
) -> TransferClient:
    client = TransferClient(server.address, grant_id, secret, timeout_s=TIMEOUT_S)
    clients.append(client)
    return client


def buffers_of(sizes: list[int], seed: int = 1) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 256, (size,), dtype=torch.uint8, generator=generator) for size in sizes]


def serve(server: TransferServer, buffers: list[torch.Tensor]) -> None:
    server.register(lambda grant_id, request: TransferReply({"asked": request, "grant": grant_id}, buffers))


def test_many_buffers_arrive_intact_and_in_order(server: TransferServer, clients: list[TransferClient]) -> None:
    """Tests that empty, tiny and multi-chunk buffers arrive bit-equal, are told in order and counted."""
    rng = random.Random(5)
    sizes = [0, 1, 3 << 20, 0, (1 << 20) - 1, 17] + [rng.randrange(1, 9000) for _ in range(700)] + [(2 << 20) + 5, 0]
    buffers = buffers_of(sizes)
    serve(server, buffers)
    destinations = [torch.zeros_like(buffer) for buffer in buffers]
    told: list[int] = []
    client = client_of(server, clients)
    request: dict[str, object] = {"kind": "weights", "slices": [{"parameter": "wpe", "start": 0}]}
    for _ in range(2):
        reply = client.request(request, destinations, on_buffer=told.append)
        assert reply == {"asked": request, "grant": GRANT}
    assert all(torch.equal(sent, received) for sent, received in zip(buffers, destinations, strict=True))
    assert [*range(len(sizes)), *range(len(sizes))] == told
    assert 2 * sum(sizes) == client.bytes_received == client.bytes_verified == server.bytes_sent


def test_buffers_of_every_dtype_and_plain_memory_move(server: TransferServer, clients: list[TransferClient]) -> None:
    """Tests that bfloat16 tensors, multi-dimensional tensors and memoryviews are all just bytes."""
    tensor = torch.randn(40, 30, generator=torch.Generator().manual_seed(2))
    server.register(lambda grant_id, request: TransferReply({}, [tensor, tensor.bfloat16(), memoryview(b"some bytes")]))
    whole, halved, plain = torch.zeros(40, 30), torch.zeros(30, 40, dtype=torch.bfloat16), bytearray(10)
    client_of(server, clients).request({}, [whole, halved, memoryview(plain)])
    assert torch.equal(tensor, whole)
    assert torch.equal(tensor.bfloat16().view(-1), halved.view(-1))
    assert plain == b"some bytes"


def test_a_list_is_asked_first_and_sizes_its_destinations(
    server: TransferServer, clients: list[TransferClient]
) -> None:
    """Tests that a reply without buffers works and that destinations may depend on the reply."""
    buffers = buffers_of([100, 200])

    def handle(grant_id: str, request: dict[str, object]) -> TransferReply:
        return TransferReply({"tokens": [1, 2]}, buffers if request["kind"] == "kv" else ())

    server.register(handle)
    client = client_of(server, clients)
    assert client.request({"kind": "kv_list"}) == {"tokens": [1, 2]}
    made: list[torch.Tensor] = []

    def allocate(reply: dict[str, object]) -> list[torch.Tensor]:
        tokens = reply["tokens"]
        assert isinstance(tokens, list)
        made.extend(torch.zeros(100 * count, dtype=torch.uint8) for count in tokens)
        return made

    client.request({"kind": "kv"}, allocate)
    assert all(torch.equal(sent, received) for sent, received in zip(buffers, made, strict=True))


@pytest.mark.parametrize(
    ("expected_sizes", "message"),
    [
        ([10, 19], "buffer 1 from .* has 20 bytes, 19 were expected"),
        ([10, 21], "buffer 1 from .* has 20 bytes, 21 were expected"),
        ([10], "announced 2 buffers, 1 were expected"),
        ([], "announced 2 buffers, 0 were expected"),
        ([10, 20, 0], "announced 2 buffers, 3 were expected"),
    ],
)
def test_sizes_other_than_expected_are_refused(
    server: TransferServer, clients: list[TransferClient], expected_sizes: list[int], message: str
) -> None:
    """Tests that the destination's own sizes rule, nothing is written, and the client can ask again."""
    buffers = buffers_of([10, 20])
    serve(server, buffers)
    destinations = [torch.zeros(size, dtype=torch.uint8) for size in expected_sizes]
    client = client_of(server, clients)
    with pytest.raises(TransferError, match=message):
        client.request({}, destinations)
    assert not any(destination.any() for destination in destinations)
    assert client.bytes_received == 0
    right = [torch.zeros(10, dtype=torch.uint8), torch.zeros(20, dtype=torch.uint8)]
    client.request({}, right)
    assert torch.equal(buffers[1], right[1])


def test_a_read_only_destination_is_our_bug(server: TransferServer, clients: list[TransferClient]) -> None:
    """Tests that immutable memory is refused before anything is received into it."""
    serve(server, buffers_of([4]))
    with pytest.raises(InvariantError, match="destination buffer 0 is read-only"):
        client_of(server, clients).request({}, [memoryview(b"four")])


class Proxy:
    """Passes one connection on to a source and flips one bit of what comes back."""

    def __init__(self, address: str, *, flip_at_byte: int) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._upstream_address = split_address(address)
        self._flip_at_byte = flip_at_byte
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        with (
            self._listener,
            self._listener.accept()[0] as downstream,
            socket.create_connection(self._upstream_address) as upstream,
        ):
            asking = threading.Thread(target=self._pump, args=(downstream, upstream, -1))
            asking.start()
            self._pump(upstream, downstream, self._flip_at_byte)
            asking.join()

    @staticmethod
    def _pump(source: socket.socket, sink: socket.socket, flip_at_byte: int) -> None:
        passed = 0
        try:
            while part := bytearray(source.recv(65536)):
                if passed <= flip_at_byte < passed + len(part):
                    part[flip_at_byte - passed] ^= 0x10
                passed += len(part)
                sink.sendall(part)
        except ConnectionError:
            pass  # Either end may leave first; the other is told below.
        finally:
            for end in (source, sink):
                with contextlib.suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)

    def join(self) -> None:
        self._thread.join(TIMEOUT_S)
        assert not self._thread.is_alive()


@pytest.mark.parametrize(
    ("flip_at_byte", "num_verified", "named"),
    [(2_500_000, 2, "buffer 2"), (4_500_000, 4, "buffer 4 to 5")],
)
def test_a_flipped_bit_raises_and_the_rest_can_be_asked_again(
    server: TransferServer, clients: list[TransferClient], flip_at_byte: int, num_verified: int, named: str
) -> None:
    """Tests that damage names its buffer, counts what was complete, and a retry from there yields all bytes."""
    buffers = buffers_of([1 << 20, 1 << 20, 1 << 20, 1 << 20, 1 << 19, 1 << 19, 1 << 20])

    def handle(grant_id: str, request: dict[str, object]) -> TransferReply:
        first = request["first"]
        assert isinstance(first, int)
        return TransferReply({}, buffers[first:])

    server.register(handle)
    proxy = Proxy(server.address, flip_at_byte=flip_at_byte)
    client = TransferClient(proxy.address, GRANT, SECRET, timeout_s=TIMEOUT_S)
    clients.append(client)
    destinations = [torch.zeros_like(buffer) for buffer in buffers]
    with pytest.raises(TransferInterruptedError, match=f"chunk of {named} has a wrong checksum") as interrupted:
        client.request({"first": 0}, destinations)
    proxy.join()
    assert num_verified == interrupted.value.num_buffers_verified
    assert client.bytes_received - client.bytes_verified == 1 << 20
    client_of(server, clients).request({"first": num_verified}, destinations[num_verified:])
    assert all(torch.equal(sent, received) for sent, received in zip(buffers, destinations, strict=True))


def test_a_flipped_header_is_refused(server: TransferServer, clients: list[TransferClient]) -> None:
    """Tests that a damaged reply is not taken for the source's word."""
    server.register(lambda grant_id, request: TransferReply({"tokens": 1234567}))
    # Challenge, accepted, frame, then the JSON.
    proxy = Proxy(server.address, flip_at_byte=64 + 1 + 12 + 20)
    client = TransferClient(proxy.address, GRANT, SECRET, timeout_s=TIMEOUT_S)
    with pytest.raises(TransferError, match="header has a wrong checksum"):
        client.request({})
    client.close()
    proxy.join()


def test_grants_unknown_wrong_expired_or_revoked_are_refused(clients: list[TransferClient]) -> None:
    """Tests that only a live grant with its own secret opens the source, and that its end ends its connections."""
    clock = Clock()
    server = TransferServer("127.0.0.1", clock=clock)
    server.register(lambda grant_id, request: TransferReply({"hello": grant_id}))
    server.grant("a", SECRET, 10.0)
    server.grant("b", b"other", 30.0)
    for grant_id, secret in [("unknown", SECRET), ("a", b"other"), ("b", SECRET)]:
        with pytest.raises(TransferInterruptedError, match=f"grant {grant_id} was refused"):
            client_of(server, clients, grant_id=grant_id, secret=secret).request({})
    first = client_of(server, clients, grant_id="a")
    second = client_of(server, clients, grant_id="b", secret=b"other")
    assert [first.request({}), second.request({})] == [{"hello": "a"}, {"hello": "b"}]
    clock.now_s += 10.0
    with pytest.raises(TransferRefusedError, match="grant a has expired"):
        first.request({})
    with pytest.raises(TransferInterruptedError, match="grant a was refused"):
        client_of(server, clients, grant_id="a").request({})
    server.revoke("b")
    server.revoke("never granted")
    with pytest.raises(TransferInterruptedError):
        second.request({})
    with pytest.raises(TransferInterruptedError, match="grant b was refused"):
        second.request({})
    server.close()


def test_a_destination_that_cannot_prove_the_secret_is_cut_off(server: TransferServer) -> None:
    """Tests that naming a live grant and sending the source's own proof back opens nothing."""
    hello = struct.pack("<8sB32s", b"SPOTXFR1", len(GRANT), bytes(32)) + GRANT.encode()
    with socket.create_connection(split_address(server.address), TIMEOUT_S) as connection:
        connection.sendall(hello)
        challenge = connection.recv(Handshake.CHALLENGE_BYTES, socket.MSG_WAITALL)
        connection.sendall(challenge[NONCE_BYTES:])
        accepted = connection.recv(1)
    assert accepted == b""


def test_a_refusal_of_the_handler_keeps_the_connection(server: TransferServer, clients: list[TransferClient]) -> None:
    """Tests that a handler's error reaches the destination by its message and the next request is served."""
    client = client_of(server, clients)
    with pytest.raises(TransferRefusedError, match="source is not ready"):
        client.request({})

    def handle(grant_id: str, request: dict[str, object]) -> TransferReply:
        if request["kind"] == "kv":
            raise TransferError("request q7 is not held here")
        return TransferReply({"ok": True})

    server.register(handle)
    with pytest.raises(TransferRefusedError, match="request q7 is not held here"):
        client.request({"kind": "kv"})
    assert client.request({"kind": "weights"}) == {"ok": True}


def test_release_is_called_after_success_and_after_failure(
    server: TransferServer, clients: list[TransferClient]
) -> None:
    """Tests that a source can unpin what it streamed, also when the destination goes away in the middle."""
    released = threading.Semaphore(0)
    buffers = buffers_of([64 << 20])
    server.register(lambda grant_id, request: TransferReply({}, buffers, released.release))
    client_of(server, clients).request({}, [torch.zeros_like(buffers[0])])
    assert released.acquire(timeout=TIMEOUT_S)
    leaver = client_of(server, clients)

    def refuse(reply: dict[str, object]) -> list[torch.Tensor]:
        raise InvariantError("no room")

    with pytest.raises(InvariantError, match="no room"):
        leaver.request({}, refuse)
    assert released.acquire(timeout=TIMEOUT_S)


def test_close_ends_a_blocked_request(
    server: TransferServer, clients: list[TransferClient], pool: ThreadPoolExecutor
) -> None:
    """Tests that closing the client, or the server, from another thread raises in a request that waits."""
    entered, leave = threading.Semaphore(0), threading.Event()

    def handle(grant_id: str, request: dict[str, object]) -> TransferReply:
        entered.release()
        leave.wait(TIMEOUT_S)
        return TransferReply({})

    server.register(handle)
    client, other = client_of(server, clients), client_of(server, clients)
    blocked, blocked_too = pool.submit(client.request, {}), pool.submit(other.request, {})
    assert entered.acquire(timeout=TIMEOUT_S)
    assert entered.acquire(timeout=TIMEOUT_S)
    client.close()
    with pytest.raises(TransferInterruptedError, match="was closed by this side"):
        blocked.result(TIMEOUT_S)
    with pytest.raises(TransferInterruptedError, match="was closed by this side"):
        client.request({})
    closing = pool.submit(server.close)
    with pytest.raises(TransferInterruptedError, match="broke off"):
        blocked_too.result(TIMEOUT_S)
    leave.set()
    closing.result(TIMEOUT_S)


def test_close_ends_a_client_that_waits_for_its_rate(server: TransferServer, pool: ThreadPoolExecutor) -> None:
    """Tests that a request slowed to a crawl by its limiter still ends at once when closed."""
    buffers = buffers_of([8 << 20])
    received = threading.Event()
    sleeping = RateLimiter(1000.0, burst_bytes=0)
    client = TransferClient(server.address, GRANT, SECRET, sleeping, TIMEOUT_S)

    def mark(index: int) -> None:
        received.set()

    destinations = [torch.zeros(1, dtype=torch.uint8), torch.zeros_like(buffers[0])]
    serve(server, [torch.ones(1, dtype=torch.uint8), *buffers])
    blocked = pool.submit(client.request, {}, destinations, on_buffer=mark)
    assert received.wait(TIMEOUT_S)
    client.close()
    with pytest.raises(TransferInterruptedError, match="closed by this side") as interrupted:
        blocked.result(TIMEOUT_S)
    assert interrupted.value.num_buffers_verified == 1


def test_one_client_serves_one_thread_at_a_time(
    server: TransferServer, clients: list[TransferClient], pool: ThreadPoolExecutor
) -> None:
    """Tests that a second request during the first is our bug and does not mix up the stream."""
    entered, leave = threading.Event(), threading.Event()

    def handle(grant_id: str, request: dict[str, object]) -> TransferReply:
        entered.set()
        leave.wait(TIMEOUT_S)
        return TransferReply({"asked": request})

    server.register(handle)
    client = client_of(server, clients)
    first = pool.submit(client.request, {"n": 1})
    assert entered.wait(TIMEOUT_S)
    with pytest.raises(InvariantError, match="two threads at once"):
        client.request({"n": 2})
    leave.set()
    assert first.result(TIMEOUT_S) == {"asked": {"n": 1}}


def test_a_silent_source_ends_at_the_timeout(server: TransferServer, pool: ThreadPoolExecutor) -> None:
    """Tests that a source that never answers costs the client its timeout and no more."""
    leave = threading.Event()

    def handle(grant_id: str, request: dict[str, object]) -> TransferReply:
        leave.wait(TIMEOUT_S)
        return TransferReply({})

    server.register(handle)
    client = TransferClient(server.address, GRANT, SECRET, timeout_s=0.1)
    with pytest.raises(TransferInterruptedError, match=r"was silent for 0\.1 s"):
        client.request({})
    client.close()
    leave.set()


SOURCE = """
import torch
from spotserve.runtime.ratelimit import RateLimiter
from spotserve.runtime.transfer import TransferReply, TransferServer
server = TransferServer("127.0.0.1", RateLimiter(4e6, burst_bytes=3 << 20))
server.grant("p4:i0/0:i1/0", b"one secret per plan, source and destination", 600.0)
server.register(lambda grant_id, request: TransferReply({}, [torch.ones(1 << 20)] * 100))
print(server.address, flush=True)
input()
"""


@pytest.mark.e2e
def test_a_source_killed_in_the_middle_leaves_whole_buffers() -> None:
    """Tests that SIGKILL of a real source process raises and the buffers told before are complete."""
    with subprocess.Popen(
        [sys.executable, "-c", SOURCE], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        client = TransferClient(process.stdout.readline().strip(), GRANT, SECRET, timeout_s=TIMEOUT_S)
        destinations = [torch.zeros(1 << 20) for _ in range(100)]
        with pytest.raises(TransferInterruptedError, match="broke off") as interrupted:
            client.request({}, destinations, on_buffer=lambda index: process.kill())
        client.close()
    num_verified = interrupted.value.num_buffers_verified
    assert 0 < num_verified < 100
    assert all(bool(destination.eq(1).all()) for destination in destinations[:num_verified])


def test_garbage_at_the_server_disturbs_nobody(server: TransferServer, clients: list[TransferClient]) -> None:
    """Tests that 300 seeded random payloads, half with the right magic, hinder no transfer."""
    rng = random.Random(20240608)
    buffers = buffers_of([300_000])
    serve(server, buffers)
    destination = torch.zeros_like(buffers[0])
    for case in range(300):
        prefix = b"SPOTXFR1" if case % 2 else b""
        if case % 10 == 1:
            prefix += bytes([len(GRANT)]) + rng.randbytes(32) + GRANT.encode()
        with socket.create_connection(split_address(server.address)) as connection:
            connection.sendall(prefix + rng.randbytes(rng.randrange(1, 400)))
            if case % 50 == 0:
                destination.zero_()
                client_of(server, clients).request({}, [destination])
                assert torch.equal(buffers[0], destination)


def raw_connection(client: TransferClient) -> socket.socket:
    """The socket of a client that has proved its grant, to misuse it."""
    client.request({})
    assert client._socket is not None
    return client._socket


@pytest.mark.parametrize(
    "payload",
    [
        struct.pack("<IQ", MAX_HEADER_BYTES + 1, 0),
        struct.pack("<IQ", 4, 1) + b"null",
        *(
            struct.pack("<IQ", len(body), xxhash.xxh3_64_intdigest(body)) + body
            for body in (b"[1]", b"{", b"\xff\xfe", b"", b"[" * 500_000)
        ),
    ],
    ids=["too long", "wrong checksum", "not an object", "cut JSON", "not UTF-8", "empty", "deeply nested"],
)
def test_malformed_requests_end_their_connection_only(
    server: TransferServer, clients: list[TransferClient], payload: bytes
) -> None:
    """Tests that a proved peer that sends a bad or oversized header is cut off and others are served."""
    serve(server, [])
    connection = raw_connection(client_of(server, clients))
    connection.sendall(payload)
    assert connection.recv(1) == b""
    assert client_of(server, clients).request({"n": 1}) == {"asked": {"n": 1}, "grant": GRANT}


def test_headers_above_the_bound_are_refused_on_both_sides(
    server: TransferServer, clients: list[TransferClient]
) -> None:
    """Tests that neither a request nor a reply above 1 MiB of JSON is sent, one just below is."""
    server.register(lambda grant_id, request: TransferReply({"blob": "x" * int(str(request["size"]))}))
    client = client_of(server, clients)
    with pytest.raises(TransferError, match=f"exceeds {MAX_HEADER_BYTES}"):
        client.request({"size": 0, "blob": "x" * MAX_HEADER_BYTES})
    with pytest.raises(TransferRefusedError, match=f"exceeds {MAX_HEADER_BYTES}"):
        client.request({"size": MAX_HEADER_BYTES})
    size = MAX_HEADER_BYTES - 100
    padding = "x" * (size - len(json.dumps({"size": size})))
    assert client.request({"size": size, "padding": padding}) == {"blob": "x" * size}


def test_rate_limiter_lets_the_burst_through_and_then_the_rate() -> None:
    """Tests with a clock of its own that waiting adds up to the bytes over the rate, less the burst."""
    clock = Clock()
    limiter = RateLimiter(1000.0, burst_bytes=500, clock=clock, sleep=clock.sleep)
    limiter.acquire(500)
    assert clock.slept_s == 0.0
    for _ in range(10):
        limiter.acquire(100)
    assert clock.slept_s == pytest.approx(1.0)
    clock.now_s += 3600.0
    limiter.acquire(500)
    assert clock.slept_s == pytest.approx(1.0)
    limiter.acquire(250)
    assert clock.slept_s == pytest.approx(1.25)


def test_rate_limiter_without_a_rate_never_sleeps() -> None:
    """Tests that None leaves a link uncapped and that nonsense rates are refused."""
    clock = Clock()
    RateLimiter(None, clock=clock, sleep=clock.sleep).acquire(1 << 60)
    assert clock.slept_s == 0.0
    for rate in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(SpecError, match="is not positive and finite"):
            RateLimiter(rate)


def test_a_shared_limiter_is_drawn_by_what_passes(server: TransferServer) -> None:
    """Tests that a client draws exactly its buffer bytes from the limiter that it shares."""
    clock = Clock()
    limiter = RateLimiter(1 << 20, burst_bytes=0, clock=clock, sleep=clock.sleep)
    buffers = buffers_of([3 << 20])
    serve(server, buffers)
    for _ in range(2):
        client = TransferClient(server.address, GRANT, SECRET, limiter, TIMEOUT_S)
        client.request({}, [torch.zeros_like(buffers[0])])
        client.close()
    assert clock.slept_s == pytest.approx(6.0)
