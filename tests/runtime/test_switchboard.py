"""Switchboard and link against each other in one process: commands, reconnections, refusals."""

from __future__ import annotations

import asyncio
import importlib.util
import queue
import subprocess
import sys
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import pytest
from pydantic import TypeAdapter

from spotserve import __version__
from spotserve.core.ids import GpuId, InstanceId, ReplicaId, RequestId
from spotserve.core.wire import (
    Command,
    CoordinatorMessage,
    Durable,
    Heartbeat,
    ProbeCommand,
    Refused,
    Register,
    Reply,
    SelfNotice,
    TokenRun,
    Tokens,
    Welcome,
)
from spotserve.errors import StateDirError
from spotserve.runtime.envelope import EnvelopeError, Opener, Sealer, bearer, is_bearer
from spotserve.runtime.link import Link, LinkCallbacks, _Outbox
from spotserve.runtime.proto.worker_pb2 import Envelope
from spotserve.runtime.proto.worker_pb2_grpc import CoordinatorStub
from spotserve.runtime.switchboard import Connected, Disconnected, Received, Switchboard
from tests.specs import small_spec

WORKER = GpuId("i0/0")
SECRET = "a secret"
CHECKOUT = Path(__file__).resolve().parents[2]


def register_of(incarnation: str, *, worker: GpuId = WORKER, version: str = __version__) -> Register:
    """The first message of a worker that holds nothing."""
    return Register(
        worker=worker,
        instance=InstanceId("i0"),
        num_gpus=1,
        incarnation=incarnation,
        pid=1,
        process_group=1,
        started_at=1.0,
        version=version,
        memory_bytes=1,
        device="cpu",
        mesh_address="127.0.0.1:1",
        transfer_address="127.0.0.1:2",
    )


@dataclass
class Worker:
    """A worker without an engine: what its link told it."""

    port: int
    incarnation: str = "one"
    secret: str = SECRET
    version: str = __version__
    answers: bool = True
    received: queue.Queue[CoordinatorMessage] = field(default_factory=queue.Queue)
    welcomes: list[Welcome] = field(default_factory=list)
    ended: queue.Queue[tuple[str, int]] = field(default_factory=queue.Queue)

    def __post_init__(self) -> None:
        self.link = Link(
            coordinator=f"127.0.0.1:{self.port}",
            secret=self.secret,
            orphan_timeout_s=30.0,
            callbacks=LinkCallbacks(
                register=lambda: register_of(self.incarnation, version=self.version),
                welcomed=self.welcomes.append,
                received=self.take,
                ended=lambda reason, code: self.ended.put((reason, code)),
            ),
        )
        self.link.start()

    def take(self, message: CoordinatorMessage) -> None:
        """Answer a command with its own id."""
        self.received.put(message)
        if isinstance(message, Command) and self.answers:
            self.link.send(Reply(command=message.command, ok=True, result={"term": message.term}))


def greet(register: Register) -> Welcome | Refused:
    """The test's answer to a registration."""
    if register.incarnation == "unwanted":
        return Refused(term=3, reason="unwanted")
    return Welcome(term=3, spec=small_spec(), model_path="/nowhere", journal="j", orphan_timeout_s=3.0)


def play(scenario: Callable[[Switchboard], Awaitable[None]]) -> None:
    """Run a scenario with a listening switchboard."""

    async def main() -> None:
        switchboard = Switchboard(secret=SECRET, term=3, greet=greet)
        await switchboard.start("127.0.0.1", 0)
        try:
            async with asyncio.timeout(30):
                await scenario(switchboard)
        finally:
            await switchboard.stop()

    asyncio.run(main())


async def get(messages: queue.Queue[CoordinatorMessage]) -> CoordinatorMessage:
    """The next message that a worker got."""
    return await asyncio.to_thread(messages.get, True, 10)


def probe(command: str) -> ProbeCommand:
    """A command."""
    return ProbeCommand(term=3, command=command)


def test_commands_and_messages_pass() -> None:
    """Tests that a command is answered by its id, that messages come out in order, and heartbeats do not."""

    async def scenario(switchboard: Switchboard) -> None:
        worker = Worker(switchboard.port)
        event = await switchboard.events.get()
        assert Connected(WORKER, register_of("one"), is_new=True) == event
        assert {"term": 3} == (await switchboard.command(WORKER, probe("c1"))).result
        assert switchboard.send(WORKER, Durable(term=3, positions=()))
        assert probe("c1") == await get(worker.received)
        assert Durable(term=3, positions=()) == await get(worker.received)
        for grace_s in (1.0, 2.0):
            worker.link.send(SelfNotice(grace_s=grace_s))
        for grace_s in (1.0, 2.0):
            assert Received(WORKER, SelfNotice(grace_s=grace_s)) == await switchboard.events.get()
        await asyncio.sleep(1.2)
        silence_s = switchboard.silence_s(WORKER)
        assert silence_s is not None
        assert silence_s < 1.1
        assert switchboard.events.empty()
        worker.link.close()
        assert Disconnected(WORKER, "one") == await switchboard.events.get()
        assert not switchboard.send(WORKER, Durable(term=3, positions=()))
        assert switchboard.silence_s(WORKER) is None

    play(scenario)


def test_a_pending_command_survives_a_reconnection() -> None:
    """Tests that an unanswered command goes out again to the same incarnation, and fails with another one."""

    async def scenario(switchboard: Switchboard) -> None:
        silent = Worker(switchboard.port, answers=False)
        await switchboard.events.get()
        first = asyncio.create_task(switchboard.command(WORKER, probe("c1")))
        assert probe("c1") == await get(silent.received)
        silent.link.close()
        assert Disconnected(WORKER, "one") == await switchboard.events.get()
        same = Worker(switchboard.port)
        event = await switchboard.events.get()
        assert isinstance(event, Connected)
        assert not event.is_new
        assert (await first).ok
        same.answers = False
        second = asyncio.create_task(switchboard.command(WORKER, probe("c2")))
        while await get(same.received) != probe("c2"):
            pass
        same.link.close()
        await switchboard.events.get()
        other = Worker(switchboard.port, incarnation="two")
        event = await switchboard.events.get()
        assert isinstance(event, Connected)
        assert event.is_new
        assert "the worker was restarted" == (await second).error
        other.link.close()

    play(scenario)


def test_a_lost_worker_answers_for_itself_no_more() -> None:
    """Tests that giving a worker up fails its pending commands, and that an unknown one fails at once."""

    async def scenario(switchboard: Switchboard) -> None:
        worker = Worker(switchboard.port, answers=False)
        await switchboard.events.get()
        asked = asyncio.create_task(switchboard.command(WORKER, probe("c1")))
        await get(worker.received)
        switchboard.fail_worker(WORKER)
        assert (False, "the worker is lost") == ((await asked).ok, (await asked).error)
        assert Disconnected(WORKER, "one") == await switchboard.events.get()
        worker.link.close()
        unknown = await switchboard.command(GpuId("i9/0"), probe("c2"))
        assert "worker i9/0 is not registered" == unknown.error

    play(scenario)


def test_strangers_are_refused() -> None:
    """Tests that a wrong secret, another version, a double id and an unwanted worker end their links with a reason."""

    async def scenario(switchboard: Switchboard) -> None:
        worker = Worker(switchboard.port)
        await switchboard.events.get()
        cases = [
            (Worker(switchboard.port, secret="wrong"), "does not accept the secret"),
            (Worker(switchboard.port, version="0.0.0"), "worker version 0.0.0 is not"),
            (Worker(switchboard.port, incarnation="two"), "worker i0/0 is already connected as another process"),
        ]
        for stranger, reason in cases:
            said, code = await asyncio.to_thread(stranger.ended.get, True, 10)
            assert reason in said
            assert 1 == code
        assert (await switchboard.command(WORKER, probe("c1"))).ok
        worker.link.close()
        await switchboard.events.get()
        unwanted = Worker(switchboard.port, incarnation="unwanted")
        assert ("refused by the coordinator: unwanted", 1) == await asyncio.to_thread(unwanted.ended.get, True, 10)
        assert switchboard.events.empty()

    play(scenario)


def test_messages_wait_for_the_next_coordinator_and_orphans_end() -> None:
    """Tests that what is said while nobody listens arrives later, that a lower term is not served, and the timeout."""

    async def main() -> None:
        first = Switchboard(secret=SECRET, term=3, greet=greet)
        await first.start("127.0.0.1", 0)
        worker = Worker(first.port)
        await first.events.get()
        await first.stop()
        await asyncio.sleep(
            0.5
        )  # What is said before the break is noticed may be lost, and is said again by the agent.
        worker.link.send(SelfNotice(grace_s=1.0))
        second = Switchboard(secret=SECRET, term=3, greet=greet)
        await second.start("127.0.0.1", first.port)
        assert isinstance(await second.events.get(), Connected)
        assert Received(WORKER, SelfNotice(grace_s=1.0)) == await second.events.get()
        assert 2 == len(worker.welcomes)
        await second.stop()
        reason, code = await asyncio.to_thread(worker.ended.get, True, 20)
        assert reason.startswith("no coordinator for")
        assert 0 == code

    asyncio.run(asyncio.wait_for(main(), 40))


def test_garbage_ends_its_stream_alone() -> None:
    """Tests that envelopes out of order or without a valid message end the stream they came on, and nothing else."""

    async def scenario(switchboard: Switchboard) -> None:
        worker = Worker(switchboard.port)
        await switchboard.events.get()
        sealer = Sealer()
        cases = [
            [Envelope(sequence=2, json=b"{}")],
            [Envelope(sequence=1, json=b'{"kind": "reg')],
            [sealer.seal(Heartbeat())],
        ]
        for envelopes in cases:
            code = await asyncio.to_thread(send_raw, switchboard.port, envelopes)
            assert grpc.StatusCode.INVALID_ARGUMENT == code
        assert (await switchboard.command(WORKER, probe("c1"))).ok
        worker.link.close()

    play(scenario)


def send_raw(port: int, envelopes: list[Envelope]) -> grpc.StatusCode:
    """Send envelopes on a stream of their own; how it ended."""
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        call = CoordinatorStub(channel).Attach(iter(envelopes), metadata=bearer(SECRET))
        with pytest.raises(grpc.RpcError):
            next(call)
        code = call.code()
        assert isinstance(code, grpc.StatusCode)
        return code


def test_the_port_is_not_shared() -> None:
    """Tests that a second switchboard on the same port is an error that says so."""

    async def scenario(switchboard: Switchboard) -> None:
        with pytest.raises(StateDirError, match="cannot be bound"):
            await Switchboard(secret=SECRET, term=1, greet=greet).start("127.0.0.1", switchboard.port)

    play(scenario)


def test_tokens_wait_until_everything_is_said_again() -> None:
    """Tests that after a break no token overtakes those that may be lost: a gap would reach the ledger."""

    def tokens(position: int, *, again: bool = False, replica: str = "r1") -> Tokens:
        run = TokenRun(request=RequestId("a"), choice=0, position=position, token_ids=(7,))
        return Tokens(replica=ReplicaId(replica), generation=1, runs=(run,), again=again)

    outbox = _Outbox()
    stream = outbox.open()
    outbox.put(tokens(5))
    outbox.put(tokens(3, replica="r2"))
    outbox.put(SelfNotice(grace_s=1.0))
    outbox.hold_tokens(ReplicaId("r1"), 1)
    outbox.put(tokens(6))
    outbox.put(tokens(4, again=True))
    outbox.put(tokens(7))
    outbox.welcome()
    said = [outbox.take(stream) for _ in range(4)]
    assert [tokens(3, replica="r2"), SelfNotice(grace_s=1.0), tokens(4, again=True), tokens(7)] == said
    outbox.open()
    assert outbox.take(stream) is None


def test_envelopes_are_numbered_and_the_secret_is_compared_whole() -> None:
    """Tests that a missing envelope is noticed and that only the very secret is accepted."""
    opener, sealer = Opener(TypeAdapter(Heartbeat)), Sealer()
    lost, next_one = sealer.seal(Heartbeat()), sealer.seal(Heartbeat())
    with pytest.raises(EnvelopeError, match="envelope 2 came where 1 was due"):
        opener.open(next_one)
    assert 1 == lost.sequence
    assert is_bearer(bearer("s"), "s")
    for wrong in (bearer("S"), bearer("s "), (), (("authorization", "s"),)):
        assert not is_bearer(wrong, "s")


def test_the_switchboard_imports_no_torch() -> None:
    """Tests that the coordinator's end and the forkserver's client keep torch out of the process."""
    code = (
        "import sys, spotserve.runtime.switchboard, spotserve.runtime.forkserver_client, spotserve.runtime.instance\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.skipif(importlib.util.find_spec("grpc_tools") is None, reason="grpcio-tools is not installed")
def test_generated_code_matches_the_proto(tmp_path: Path) -> None:
    """Tests that the committed modules are what schemas/worker.proto generates."""
    package = tmp_path / "spotserve" / "runtime" / "proto"
    package.mkdir(parents=True)
    proto = package / "worker.proto"
    proto.write_text((CHECKOUT / "schemas" / "worker.proto").read_text())
    outputs = [f"--{kind}_out={tmp_path}" for kind in ("python", "grpc_python", "pyi")]
    command = [sys.executable, "-m", "grpc_tools.protoc", f"-I{tmp_path}", *outputs, str(proto)]
    subprocess.run(command, check=True)
    committed = CHECKOUT / "spotserve" / "runtime" / "proto"
    for name in ("worker_pb2.py", "worker_pb2_grpc.py", "worker_pb2.pyi"):
        assert (package / name).read_text() == (committed / name).read_text()
