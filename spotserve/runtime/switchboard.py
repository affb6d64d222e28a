"""The coordinator's end of the workers' streams: who is connected, commands out, messages in.

A command is kept until its reply comes: it goes out again when the same incarnation of the worker dials anew (the
worker answers a repeated id with its first outcome), and is answered for the worker when that one is given up. What
workers say on their own comes out of one queue, in the order of each worker. No torch here.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import grpc
import grpc.aio

from spotserve import __version__
from spotserve.core.ids import GpuId
from spotserve.core.wire import (
    WORKER_MESSAGE,
    Command,
    CoordinatorMessage,
    Refused,
    Register,
    Reply,
    Welcome,
    WorkerMessage,
)
from spotserve.errors import InvariantError, StateDirError
from spotserve.log import get_logger
from spotserve.runtime.envelope import SERVER_OPTIONS, EnvelopeError, Opener, Sealer, is_bearer
from spotserve.runtime.proto.worker_pb2 import Envelope
from spotserve.runtime.proto.worker_pb2_grpc import CoordinatorServicer, add_CoordinatorServicer_to_server

_REGISTER_TIMEOUT_S = 5.0
_STOP_GRACE_S = 0.5

log = get_logger("switchboard")


@dataclass(frozen=True, slots=True)
class Connected:
    """A worker registered and was welcomed; `is_new` unless it is the incarnation seen last."""

    worker: GpuId
    register: Register
    is_new: bool


@dataclass(frozen=True, slots=True)
class Disconnected:
    """The stream of a worker ended: its process died, or it cannot be reached. It may dial again."""

    worker: GpuId
    incarnation: str


@dataclass(frozen=True, slots=True)
class Received:
    """A worker said something that is not the reply to a command of ours."""

    worker: GpuId
    message: WorkerMessage


SwitchboardEvent = Connected | Disconnected | Received


@dataclass(slots=True)
class _Session:
    """One stream, from its welcome to its end."""

    register: Register
    outgoing: asyncio.Queue[CoordinatorMessage | None] = field(default_factory=asyncio.Queue)
    heard_at_s: float = field(default_factory=time.monotonic)


@dataclass(slots=True)
class _Pending:
    command: Command
    reply: asyncio.Future[Reply]


@dataclass(slots=True)
class _Line:
    """What is known of one worker id, connected or not."""

    incarnation: str
    session: _Session | None = None
    pending: dict[str, _Pending] = field(default_factory=dict)


class Switchboard:
    """The gRPC server that workers dial.

    Args:
        secret: what a worker proves in its metadata.
        term: of this coordinator.
        greet: the answer to a registration: a `Welcome`, or `Refused` for one that may not join. It runs in the event
            loop before the worker is connected and must not wait.
    """

    def __init__(self, *, secret: str, term: int, greet: Callable[[Register], Welcome | Refused]) -> None:
        if not secret:
            raise InvariantError("switchboard secret is empty")
        self.events: asyncio.Queue[SwitchboardEvent] = asyncio.Queue()
        self.port = 0
        self._secret = secret
        self._term = term
        self._greet = greet
        self._lines: dict[GpuId, _Line] = {}
        self._server: grpc.aio.Server | None = None

    async def start(self, host: str, port: int) -> None:
        """Listen; port 0 lets the operating system choose, `port` then says which.

        Raises:
            StateDirError: the port is taken.
        """
        server = grpc.aio.server(options=SERVER_OPTIONS)
        add_CoordinatorServicer_to_server(_Servicer(self), server)
        address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        try:
            self.port = server.add_insecure_port(address)
        except RuntimeError as error:
            await server.stop(grace=None)
            raise StateDirError(
                f"worker port {address} cannot be bound", hint="another daemon uses it; stop it or choose a state dir"
            ) from error
        await server.start()
        self._server = server

    async def stop(self) -> None:
        """End every stream. Workers keep what they hold and dial again until their orphan timeout."""
        if self._server is not None:
            for line in self._lines.values():
                if line.session is not None:
                    line.session.outgoing.put_nowait(None)
            await self._server.stop(grace=_STOP_GRACE_S)
            self._server = None
        for worker in list(self._lines):
            self.fail_worker(worker, "the coordinator stopped")

    def connected(self) -> dict[GpuId, Register]:
        """The workers that are connected now, sorted by id."""
        return {
            worker: line.session.register for worker, line in sorted(self._lines.items()) if line.session is not None
        }

    def silence_s(self, worker: GpuId) -> float | None:
        """Seconds since a connected worker was last heard (it speaks each second); None when not connected."""
        line = self._lines.get(worker)
        if line is None or line.session is None:
            return None
        return time.monotonic() - line.session.heard_at_s

    def forgive_silence(self) -> None:
        """Begin to count silence anew: this process itself stood still and has not read what was said."""
        for line in self._lines.values():
            if line.session is not None:
                line.session.heard_at_s = time.monotonic()

    def send(self, worker: GpuId, message: CoordinatorMessage) -> bool:
        """Send what is not answered. False when the worker is not connected: it is then not sent at all."""
        line = self._lines.get(worker)
        if line is None or line.session is None:
            return False
        line.session.outgoing.put_nowait(message)
        return True

    async def command(self, worker: GpuId, command: Command) -> Reply:
        """The reply to a command, however often the worker has to dial again before it comes.

        A worker that never registered, or was given up, answers `ok=False`. The same id may be asked again.
        """
        line = self._lines.get(worker)
        if line is None:
            return _failed(command.command, f"worker {worker} is not registered")
        pending = line.pending.get(command.command)
        if pending is None:
            pending = _Pending(command, asyncio.get_running_loop().create_future())
            line.pending[command.command] = pending
            if line.session is not None:
                line.session.outgoing.put_nowait(command)  # type: ignore[arg-type]  # Command is the base of them.
        return await asyncio.shield(pending.reply)

    def fail_worker(self, worker: GpuId, error: str = "the worker is lost") -> None:
        """Give a worker up: its pending commands are answered `ok=False`, its stream ends if there is one.

        It may register again, as another incarnation or the same one.
        """
        line = self._lines.pop(worker, None)
        if line is None:
            return
        if line.session is not None:
            line.session.outgoing.put_nowait(None)
        _fail_all(line, error)

    # One stream

    def check(self, register: Register) -> str | None:
        """Why a worker may not register, or None."""
        if register.version != __version__:
            return f"worker version {register.version} is not {__version__}"
        line = self._lines.get(register.worker)
        if line is not None and line.session is not None and line.incarnation != register.incarnation:
            return f"worker {register.worker} is already connected as another process"
        return None

    async def converse(self, context: grpc.aio.ServicerContext[Envelope, Envelope]) -> None:
        """Serve one stream from its first envelope to its end."""
        opener, sealer = Opener(WORKER_MESSAGE), Sealer()
        async with asyncio.timeout(_REGISTER_TIMEOUT_S):
            register = opener.open(await _read(context))
        if not isinstance(register, Register):
            raise EnvelopeError(f"first message is {register.kind}, not register")
        reason = self.check(register)
        greeting = Refused(term=self._term, reason=reason) if reason else self._greet(register)
        if isinstance(greeting, Refused):
            log.warning("worker_refused", worker=register.worker, reason=greeting.reason)
            await context.write(sealer.seal(greeting))
            return
        session = self._connect(register, greeting)
        try:
            await self._relay(session, context, opener, sealer)
        finally:
            self._disconnect(session)

    def _connect(self, register: Register, welcome: Welcome) -> _Session:
        line = self._lines.get(register.worker)
        is_new = line is None or line.incarnation != register.incarnation
        if line is None or is_new:
            if line is not None:
                _fail_all(line, "the worker was restarted")
            line = self._lines[register.worker] = _Line(register.incarnation)
        if line.session is not None:  # It noticed the break before we did.
            line.session.outgoing.put_nowait(None)
        session = line.session = _Session(register)
        session.outgoing.put_nowait(welcome)
        for pending in line.pending.values():
            session.outgoing.put_nowait(pending.command)  # type: ignore[arg-type]
        self.events.put_nowait(Connected(register.worker, register, is_new))
        return session

    def _disconnect(self, session: _Session) -> None:
        worker = session.register.worker
        line = self._lines.get(worker)
        if line is not None and line.session is session:
            line.session = None
            self.events.put_nowait(Disconnected(worker, session.register.incarnation))
        elif line is None:
            self.events.put_nowait(Disconnected(worker, session.register.incarnation))

    async def _relay(
        self,
        session: _Session,
        context: grpc.aio.ServicerContext[Envelope, Envelope],
        opener: Opener[WorkerMessage],
        sealer: Sealer,
    ) -> None:
        """Both directions at once, until one of them ends."""
        reading = asyncio.create_task(self._read_all(session, context, opener))
        writing = asyncio.create_task(_write_all(session, context, sealer))
        try:
            done, _ = await asyncio.wait({reading, writing}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            reading.cancel()
            writing.cancel()
            await asyncio.gather(reading, writing, return_exceptions=True)
        for task in done:
            task.result()

    async def _read_all(
        self,
        session: _Session,
        context: grpc.aio.ServicerContext[Envelope, Envelope],
        opener: Opener[WorkerMessage],
    ) -> None:
        worker = session.register.worker
        while True:
            message = opener.open(await _read(context))
            session.heard_at_s = time.monotonic()
            if isinstance(message, Reply):
                self._resolve(worker, message)
            elif message.kind != "heartbeat":
                self.events.put_nowait(Received(worker, message))

    def _resolve(self, worker: GpuId, reply: Reply) -> None:
        line = self._lines.get(worker)
        pending = line.pending.pop(reply.command, None) if line is not None else None
        if pending is not None and not pending.reply.done():
            pending.reply.set_result(reply)


class _Servicer(CoordinatorServicer):  # type: ignore[misc]  # Generated code has no types.
    """Authenticates a stream and hands it to the switchboard."""

    def __init__(self, switchboard: Switchboard) -> None:
        self._switchboard = switchboard

    async def Attach(  # noqa: N802  # The name is the protocol's.
        self, request_iterator: object, context: grpc.aio.ServicerContext[Envelope, Envelope]
    ) -> None:
        if not is_bearer(context.invocation_metadata() or (), self._switchboard._secret):
            log.warning("worker_unauthenticated", peer=context.peer())
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, "the worker secret is wrong")
        try:
            await self._switchboard.converse(context)
        except TimeoutError:
            await context.abort(grpc.StatusCode.DEADLINE_EXCEEDED, "no registration came")
        except EnvelopeError as error:
            log.warning("worker_stream_broken", peer=context.peer(), reason=error.message)
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, error.message)
        except EOFError:
            return


async def _read(context: grpc.aio.ServicerContext[Envelope, Envelope]) -> Envelope:
    envelope = await context.read()
    if not isinstance(envelope, Envelope):
        raise EOFError("the worker ended its stream")
    return envelope


async def _write_all(session: _Session, context: grpc.aio.ServicerContext[Envelope, Envelope], sealer: Sealer) -> None:
    while (message := await session.outgoing.get()) is not None:
        await context.write(sealer.seal(message))


def _failed(command: str, error: str) -> Reply:
    return Reply(command=command, ok=False, error=error)


def _fail_all(line: _Line, error: str) -> None:
    for pending in line.pending.values():
        if not pending.reply.done():
            pending.reply.set_result(_failed(pending.command.command, error))
    line.pending.clear()
