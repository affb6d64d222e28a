"""Proofs about the socket mesh: gathers, framing, joins side by side, refusals, closing and dead peers."""

from __future__ import annotations

import random
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import pytest
import torch

from spotserve.errors import InvariantError, MeshError
from spotserve.runtime.mesh import (
    NONCE_BYTES,
    Channel,
    Handshake,
    Mesh,
    MeshListener,
    MeshTimeoutError,
    PeerLostError,
    channels_of,
    join,
    split_address,
)

SECRET = b"one secret per generation"
TIMEOUT_S = 20.0


@pytest.fixture
def listeners() -> Iterator[list[MeshListener]]:
    """Four workers' listeners."""
    made = [MeshListener("127.0.0.1") for _ in range(4)]
    yield made
    for listener in made:
        listener.close()


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    """Threads that play the ranks."""
    with ThreadPoolExecutor(16) as executor:
        yield executor


def start_join(
    pool: ThreadPoolExecutor,
    listeners: list[MeshListener],
    rank: int,
    *,
    key: str = "r1:1",
    secret: bytes = SECRET,
    pipeline_degree: int = 1,
    tensor_degree: int = 2,
    timeout_s: float = TIMEOUT_S,
    cancelled: threading.Event | None = None,
) -> Future[Mesh]:
    num_ranks = pipeline_degree * tensor_degree
    return pool.submit(
        join,
        listeners[rank],
        key,
        rank,
        [listener.address for listener in listeners[:num_ranks]],
        secret,
        pipeline_degree=pipeline_degree,
        tensor_degree=tensor_degree,
        timeout_s=timeout_s,
        cancelled=cancelled or threading.Event(),
    )


def join_all(
    pool: ThreadPoolExecutor,
    listeners: list[MeshListener],
    *,
    key: str = "r1:1",
    pipeline_degree: int = 1,
    tensor_degree: int = 2,
) -> list[Mesh]:
    joins = [
        start_join(pool, listeners, rank, key=key, pipeline_degree=pipeline_degree, tensor_degree=tensor_degree)
        for rank in reversed(range(pipeline_degree * tensor_degree))
    ]
    return [future.result(TIMEOUT_S) for future in reversed(joins)]


def close_all(meshes: list[Mesh]) -> None:
    for mesh in meshes:
        mesh.close()


def parts_of(sizes: list[int], dtype: torch.dtype, seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(size, generator=generator).to(dtype) for size in sizes]


def gather_everywhere(pool: ThreadPoolExecutor, meshes: list[Mesh], parts: list[torch.Tensor]) -> list[torch.Tensor]:
    """Every rank's concatenated result."""

    def gather(mesh: Mesh) -> torch.Tensor:
        out = [torch.full_like(part, -1.0) for part in parts]
        mesh.all_gather(parts[mesh.tensor_index], out)
        return torch.cat([part.view(-1) for part in out])

    return [future.result(TIMEOUT_S) for future in [pool.submit(gather, mesh) for mesh in meshes]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sizes", [[5, 3], [3 * 384, 3 * 384, 2 * 384], [4096, 1, 0, 77], [1_000_003, 1_500_001]])
def test_gather_gives_every_rank_the_same_parts(
    listeners: list[MeshListener], pool: ThreadPoolExecutor, sizes: list[int], dtype: torch.dtype
) -> None:
    """Tests that uneven parts of any dtype arrive bit-equal in rank order at 2, 3 and 4 ranks, twice in a row."""
    meshes = join_all(pool, listeners, tensor_degree=len(sizes))
    for seed in (1, 2):
        parts = parts_of(sizes, dtype, seed)
        expected = torch.cat(parts)
        for actual in gather_everywhere(pool, meshes, parts):
            assert torch.equal(expected, actual)
    close_all(meshes)


def test_gather_larger_than_every_socket_buffer_does_not_deadlock(
    listeners: list[MeshListener], pool: ThreadPoolExecutor
) -> None:
    """Tests that ranks which all send 48 MiB at once still receive."""
    meshes = join_all(pool, listeners, tensor_degree=2)
    parts = parts_of([12 << 20, (12 << 20) + 1], torch.float32, 3)
    for actual in gather_everywhere(pool, meshes, parts):
        assert torch.equal(torch.cat(parts), actual)
    close_all(meshes)


def test_gather_within_one_rank_copies_its_own_part(listeners: list[MeshListener], pool: ThreadPoolExecutor) -> None:
    """Tests that a mesh of one rank needs no peer."""
    (mesh,) = join_all(pool, listeners, tensor_degree=1)
    out = [torch.zeros(4)]
    mesh.all_gather(torch.arange(4.0), out)
    assert out[0].tolist() == [0.0, 1.0, 2.0, 3.0]
    close_all([mesh])


def test_gather_refuses_a_part_of_another_size(listeners: list[MeshListener], pool: ThreadPoolExecutor) -> None:
    """Tests that a peer's part that is not as long as its place is an error, shorter and longer."""
    for expected_size in (3, 5):
        meshes = join_all(pool, listeners, tensor_degree=2)
        sender = pool.submit(meshes[0].all_gather, torch.zeros(4), [torch.zeros(4), torch.zeros(4)])
        with pytest.raises(MeshError, match=f"sent 16 bytes on the tensor channel, {4 * expected_size} were expected"):
            meshes[1].all_gather(torch.zeros(4), [torch.zeros(expected_size), torch.zeros(4)])
        sender.result(TIMEOUT_S)
        close_all(meshes)


def test_gather_refuses_memory_that_is_not_contiguous(listeners: list[MeshListener], pool: ThreadPoolExecutor) -> None:
    """Tests that a strided tensor is our bug and is not sent wrongly."""
    meshes = join_all(pool, listeners, tensor_degree=2)
    strided = torch.zeros(4, 4).t()[:2]
    with pytest.raises(InvariantError, match="not contiguous"):
        meshes[0].all_gather(strided, [torch.zeros(2, 4), torch.zeros(2, 4)])
    close_all(meshes)


def test_channels_are_symmetric_and_only_those_needed() -> None:
    """Tests that both ends of every pair open the same channels and that a 2x2 replica opens no other."""
    expected = {
        0: [
            (1, Channel.CONTROL),
            (1, Channel.TENSOR),
            (2, Channel.CONTROL),
            (2, Channel.PIPELINE),
            (3, Channel.CONTROL),
        ],
        3: [(0, Channel.CONTROL), (1, Channel.PIPELINE), (2, Channel.TENSOR)],
    }
    for rank, channels in expected.items():
        assert channels == channels_of(rank, pipeline_degree=2, tensor_degree=2)
    for pipeline_degree, tensor_degree in [(1, 1), (1, 4), (3, 1), (3, 2), (2, 4)]:
        ends = {
            (rank, peer, channel)
            for rank in range(pipeline_degree * tensor_degree)
            for peer, channel in channels_of(rank, pipeline_degree=pipeline_degree, tensor_degree=tensor_degree)
        }
        assert ends == {(peer, rank, channel) for rank, peer, channel in ends}


def test_control_messages_keep_their_borders_and_order(listeners: list[MeshListener], pool: ThreadPoolExecutor) -> None:
    """Tests that empty, small and 64 MiB control messages arrive framed and in order in both directions."""
    meshes = join_all(pool, listeners, pipeline_degree=2, tensor_degree=1)
    rng = random.Random(7)
    messages = [rng.randbytes(size) for size in (0, 1, 100, 70_000)] + [bytes(64 << 20)]
    for source, destination in ((0, 1), (1, 0)):

        def send_all(mesh: Mesh = meshes[source], rank: int = destination) -> None:
            for message in messages:
                mesh.send_control(rank, message)

        sender = pool.submit(send_all)
        assert messages == [meshes[destination].recv_control(source, TIMEOUT_S) for _ in messages]
        sender.result(TIMEOUT_S)
    with pytest.raises(MeshError, match="exceeds 67108864"):
        meshes[0].send_control(1, bytes((64 << 20) + 1))
    close_all(meshes)


def test_control_poll_and_timeout_lose_nothing(listeners: list[MeshListener], pool: ThreadPoolExecutor) -> None:
    """Tests that polling does not block, a timeout is its own error and the late message is still read."""
    meshes = join_all(pool, listeners, pipeline_degree=2, tensor_degree=1)
    assert not meshes[0].poll_control(1)
    with pytest.raises(MeshTimeoutError, match="rank 1"):
        meshes[0].recv_control(1, 0.01)
    meshes[1].send_control(0, b"late")
    assert meshes[0].recv_control(1, None) == b"late"
    assert not meshes[0].poll_control(1)
    meshes[1].send_control(0, b"x")
    meshes[0].send_control(1, b"echo")
    assert meshes[1].recv_control(0, TIMEOUT_S) == b"echo"
    assert meshes[0].poll_control(1)
    close_all(meshes)


def test_pipeline_moves_tensors_between_stages(listeners: list[MeshListener], pool: ThreadPoolExecutor) -> None:
    """Tests that activations reach the same tensor index of the next stage and refuse a wrong size."""
    meshes = join_all(pool, listeners, pipeline_degree=2, tensor_degree=2)
    sent = parts_of([640, 640], torch.bfloat16, 5)
    for index in (0, 1):
        meshes[index].send_tensor(2 + index, sent[index].view(8, 80))
        out = torch.zeros(8, 80, dtype=torch.bfloat16)
        meshes[2 + index].recv_tensor(index, out)
        assert torch.equal(sent[index], out.view(-1))
    meshes[0].send_tensor(2, torch.zeros(4))
    with pytest.raises(MeshError, match="rank 0 of mesh r1:1 sent 16 bytes on the pipeline channel, 20 were expected"):
        meshes[2].recv_tensor(0, torch.zeros(5))
    with pytest.raises(InvariantError, match="no pipeline channel to 3"):
        meshes[0].send_tensor(3, torch.zeros(4))
    close_all(meshes)


def test_a_stuck_channel_does_not_block_the_others(listeners: list[MeshListener], pool: ThreadPoolExecutor) -> None:
    """Tests that a descriptor passes while an activation waits for a receiver that does not read."""
    meshes = join_all(pool, listeners, pipeline_degree=2, tensor_degree=1)
    activation = torch.ones(16 << 20)
    stuck = pool.submit(meshes[0].send_tensor, 1, activation)
    meshes[0].send_control(1, b"descriptor")
    assert meshes[1].recv_control(0, TIMEOUT_S) == b"descriptor"
    assert not stuck.done()
    out = torch.zeros_like(activation)
    meshes[1].recv_tensor(0, out)
    stuck.result(TIMEOUT_S)
    assert torch.equal(activation, out)
    close_all(meshes)


def test_generations_join_side_by_side_while_one_decodes(
    listeners: list[MeshListener], pool: ThreadPoolExecutor
) -> None:
    """Tests that two more generations join on the same listeners while the first goes on exchanging."""
    first = join_all(pool, listeners, key="r1:1", tensor_degree=2)
    stop = threading.Event()

    def decode(mesh: Mesh) -> int:
        num_iterations = 0
        out = [torch.zeros(64), torch.zeros(64)]
        while True:
            # The leader's word ends both sides at the same iteration.
            mine = torch.full((64,), float(stop.is_set() and mesh.rank == 0))
            mesh.all_gather(mine, out)
            num_iterations += 1
            if out[0][0]:
                return num_iterations

    decoding = [pool.submit(decode, mesh) for mesh in first]
    second = [start_join(pool, listeners, rank, key="r2:2", tensor_degree=3) for rank in (2, 0)]
    third = [start_join(pool, listeners, rank, key="r3:2", pipeline_degree=2) for rank in (3, 1, 0, 2)]
    second.append(start_join(pool, listeners, 1, key="r2:2", tensor_degree=3))
    joined = [future.result(TIMEOUT_S) for future in second]
    joined_third = [future.result(TIMEOUT_S) for future in third]
    stop.set()
    assert decoding[0].result(TIMEOUT_S) == decoding[1].result(TIMEOUT_S) > 0
    parts = parts_of([9, 9, 6], torch.float32, 11)
    for actual in gather_everywhere(pool, joined, parts):
        assert torch.equal(torch.cat(parts), actual)
    assert {0, 1, 2, 3} == {mesh.rank for mesh in joined_third}
    close_all(first + joined + joined_third)


def test_a_wrong_secret_is_refused_and_the_right_join_unaffected(
    listeners: list[MeshListener], pool: ThreadPoolExecutor
) -> None:
    """Tests that an impostor of rank 1 fails on its own while the true rank 1 joins."""
    impostor = start_join(pool, [listeners[0], listeners[2]], 1, secret=b"guessed", timeout_s=1.0)
    leader = start_join(pool, listeners, 0)
    with pytest.raises(MeshError, match="proof of the secret is wrong"):
        impostor.result(TIMEOUT_S)
    assert not leader.done()
    follower = start_join(pool, listeners, 1)
    meshes = [leader.result(TIMEOUT_S), follower.result(TIMEOUT_S)]
    meshes[0].send_control(1, b"welcome")
    assert meshes[1].recv_control(0, TIMEOUT_S) == b"welcome"
    close_all(meshes)


@pytest.mark.parametrize("forgery", ["reflected", "random"])
def test_a_dialer_that_cannot_prove_the_secret_is_cut_off(
    listeners: list[MeshListener], pool: ThreadPoolExecutor, forgery: str
) -> None:
    """Tests that after a right hello a wrong answer, even the acceptor's own proof sent back, is not accepted."""
    leader = start_join(pool, listeners, 0)
    key = b"r1:1"
    hello = struct.pack("<8sHHBB32s", b"SPOTMSH1", 1, 0, Channel.CONTROL, len(key), bytes(32)) + key
    with socket.create_connection(split_address(listeners[0].address), TIMEOUT_S) as connection:
        connection.sendall(hello)
        challenge = connection.recv(Handshake.CHALLENGE_BYTES, socket.MSG_WAITALL)
        connection.sendall(challenge[NONCE_BYTES:] if forgery == "reflected" else random.Random(3).randbytes(32))
        accepted = connection.recv(1)
    assert accepted == b""
    meshes = [future.result(TIMEOUT_S) for future in (start_join(pool, listeners, 1), leader)]
    close_all(meshes)


def test_a_join_without_its_peers_ends_at_its_timeout_or_cancellation(
    listeners: list[MeshListener], pool: ThreadPoolExecutor
) -> None:
    """Tests that accepting and dialing ranks both give up, name whom they miss, and leave the key free again."""
    with pytest.raises(MeshTimeoutError, match=r"exceeded 0\.1 s: rank 1 has not dialed"):
        start_join(pool, listeners, 0, timeout_s=0.1).result(TIMEOUT_S)
    with pytest.raises(MeshTimeoutError, match=r"exceeded 0\.1 s"):
        start_join(pool, listeners, 1, timeout_s=0.1).result(TIMEOUT_S)
    for rank in (0, 1):
        cancelled = threading.Event()
        waiting = start_join(pool, listeners, rank, cancelled=cancelled)
        cancelled.set()
        with pytest.raises(MeshError, match="was cancelled"):
            waiting.result(TIMEOUT_S)
    close_all(join_all(pool, listeners))


def test_a_dialer_waits_for_a_listener_that_opens_late(pool: ThreadPoolExecutor) -> None:
    """Tests that a refused connection is tried again until the peer is there."""
    with socket.create_server(("127.0.0.1", 0)) as reserved:
        port = reserved.getsockname()[1]
    follower_listener = MeshListener("127.0.0.1")
    refusals: list[str] = []

    class LateEvent(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            refusals.append("refused")
            return super().wait(timeout)

    cancelled = LateEvent()
    follower = pool.submit(
        join,
        follower_listener,
        "r1:1",
        1,
        [f"127.0.0.1:{port}", follower_listener.address],
        SECRET,
        pipeline_degree=1,
        tensor_degree=2,
        timeout_s=TIMEOUT_S,
        cancelled=cancelled,
    )
    with pytest.raises(TimeoutError):
        follower.result(0.1)
    assert refusals
    cancelled.set()
    with pytest.raises(MeshError, match="was cancelled"):
        follower.result(TIMEOUT_S)
    follower_listener.close()


def blocked_calls(mesh: Mesh) -> list[Callable[[], object]]:
    """One call per channel and direction that waits for a peer that does nothing."""
    return [
        lambda: mesh.recv_control(1, None),
        lambda: mesh.recv_control(2, TIMEOUT_S),
        lambda: mesh.recv_tensor(2, torch.zeros(1)),
        lambda: mesh.send_tensor(2, torch.zeros(16 << 20)),
        lambda: mesh.all_gather(torch.zeros(16 << 20), [torch.zeros(16 << 20), torch.zeros(16 << 20)]),
    ]


def test_close_unblocks_every_call_in_every_thread(listeners: list[MeshListener], pool: ThreadPoolExecutor) -> None:
    """Tests that calls blocked on every channel and calls made later raise MeshError after a close."""
    meshes = join_all(pool, listeners, pipeline_degree=2, tensor_degree=2)
    calls = blocked_calls(meshes[0])
    blocked = [pool.submit(call) for call in calls]
    with pytest.raises(TimeoutError):
        blocked[0].result(0.2)
    assert not any(future.done() for future in blocked)
    meshes[0].close()
    for future in blocked:
        with pytest.raises(MeshError, match="mesh r1:1 was closed"):
            future.result(TIMEOUT_S)
    calls += [lambda: meshes[0].poll_control(1), lambda: meshes[0].send_control(1, b"x")]
    for call in calls:
        with pytest.raises(MeshError, match="mesh r1:1 was closed"):
            call()
    meshes[0].close()
    assert meshes[0].is_closed
    close_all(meshes)


def test_a_peer_that_closes_is_named(listeners: list[MeshListener], pool: ThreadPoolExecutor) -> None:
    """Tests that the end of a peer raises PeerLostError with its rank on every channel."""
    meshes = join_all(pool, listeners, pipeline_degree=2, tensor_degree=2)
    meshes[2].close()
    assert meshes[0].poll_control(2)
    for call in (lambda: meshes[0].recv_control(2, TIMEOUT_S), lambda: meshes[0].recv_tensor(2, torch.zeros(1))):
        with pytest.raises(PeerLostError, match="rank 2 of mesh r1:1 is gone") as lost:
            call()
        assert lost.value.rank == 2
    meshes[1].close()
    with pytest.raises(PeerLostError, match="rank 1 of mesh r1:1 is gone"):
        meshes[0].all_gather(torch.zeros(9), [torch.zeros(9), torch.zeros(9)])
    close_all(meshes)


FOLLOWER = """
import sys, threading, time
from spotserve.runtime.mesh import MeshListener, join
listener = MeshListener("127.0.0.1")
print(listener.address, flush=True)
mesh = join(listener, "r1:1", 1, [sys.stdin.readline().strip(), listener.address], b"one secret per generation",
            pipeline_degree=1, tensor_degree=2, timeout_s=60.0, cancelled=threading.Event())
mesh.send_control(0, b"joined")
time.sleep(600)
"""


@pytest.mark.e2e
def test_a_killed_process_raises_in_a_blocked_gather(listeners: list[MeshListener], pool: ThreadPoolExecutor) -> None:
    """Tests that SIGKILL of a real peer process ends the pending gather with its rank."""
    with subprocess.Popen(
        [sys.executable, "-c", FOLLOWER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdin is not None
            assert process.stdout is not None
            follower_address = process.stdout.readline().strip()
            process.stdin.write(listeners[0].address + "\n")
            process.stdin.flush()
            mesh = join(
                listeners[0],
                "r1:1",
                0,
                [listeners[0].address, follower_address],
                SECRET,
                pipeline_degree=1,
                tensor_degree=2,
                timeout_s=60.0,
                cancelled=threading.Event(),
            )
            assert mesh.recv_control(1, 60.0) == b"joined"
            gather = pool.submit(mesh.all_gather, torch.zeros(8), [torch.zeros(8), torch.zeros(8)])
            with pytest.raises(TimeoutError):
                gather.result(0.1)
        finally:
            process.kill()
        with pytest.raises(PeerLostError, match="rank 1 of mesh r1:1 is gone"):
            gather.result(TIMEOUT_S)
        mesh.close()


def test_garbage_at_the_listeners_disturbs_nobody(listeners: list[MeshListener], pool: ThreadPoolExecutor) -> None:
    """Tests that 300 seeded random payloads, half with the right magic, neither hinder a join nor harm a mesh."""
    rng = random.Random(20240607)
    waiting = start_join(pool, listeners, 0, pipeline_degree=3, tensor_degree=1)
    kept: list[socket.socket] = []
    for case in range(300):
        prefix = b"SPOTMSH1" if case % 2 else b""
        # The hello of a wanted rank and key, then noise in place of the proof.
        if case % 10 == 1:
            prefix += b"\x01\x00\x00\x00\x00\x04" + rng.randbytes(32) + b"r1:1"
        connection = socket.create_connection(split_address(listeners[case % 3].address))
        connection.sendall(prefix + rng.randbytes(rng.randrange(1, 400)))
        if case % 3:
            connection.close()
        else:
            kept.append(connection)
    meshes = [start_join(pool, listeners, rank, pipeline_degree=3, tensor_degree=1) for rank in (1, 2)]
    joined = [waiting.result(TIMEOUT_S), *[future.result(TIMEOUT_S) for future in meshes]]
    joined[2].send_control(0, b"token")
    assert joined[0].recv_control(2, TIMEOUT_S) == b"token"
    for connection in kept:
        connection.close()
    close_all(joined)


def test_a_closed_listener_refuses_joins(pool: ThreadPoolExecutor) -> None:
    """Tests that a join at a closed listener fails at once and a second close is harmless."""
    listener = MeshListener("127.0.0.1")
    listener.close()
    listener.close()
    with pytest.raises(MeshError, match="listener is closed"):
        start_join(pool, [listener, listener], 0).result(TIMEOUT_S)
