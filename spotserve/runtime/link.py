"""The worker's end of its stream to the coordinator: dials, redials, and gives up after the orphan timeout.

Threads of its own, as gRPC may not exist in a process that still forks. What the worker says while nobody listens
waits here; what was on the wire when a stream broke is said again by the agent at the next welcome (undurable tokens)
or asked for again by the coordinator (replies, from the outcome cache).
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import grpc

from spotserve.core.ids import ReplicaId
from spotserve.core.wire import (
    COORDINATOR_MESSAGE,
    CoordinatorMessage,
    Heartbeat,
    Refused,
    Register,
    Tokens,
    Welcome,
    WorkerMessage,
)
from spotserve.log import get_logger
from spotserve.runtime.envelope import CHANNEL_OPTIONS, HEARTBEAT_S, EnvelopeError, Opener, Sealer, bearer
from spotserve.runtime.proto.worker_pb2 import Envelope
from spotserve.runtime.proto.worker_pb2_grpc import CoordinatorStub

_FIRST_REDIAL_S = 0.05
_LAST_REDIAL_S = 1.0

log = get_logger("link")


@dataclass(frozen=True, slots=True)
class LinkCallbacks:
    """What the agent does about the stream; all run on the link's thread and must not wait."""

    register: Callable[[], Register]
    welcomed: Callable[[Welcome], None]
    received: Callable[[CoordinatorMessage], None]
    ended: Callable[[str, int], None]
    """The link is over for good: the reason and the exit code of the process."""


class _Outbox:
    """Messages to send. Only the stream that is current may take one, so none is lost to a dead stream's thread."""

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._messages: deque[WorkerMessage] = deque()
        self._held: set[tuple[ReplicaId, int]] = set()
        self._stream = 0
        self._is_welcomed = False

    def put(self, message: WorkerMessage) -> None:
        with self._condition:
            if isinstance(message, Tokens) and message.again:
                self._held.discard((message.replica, message.generation))
                if not message.runs:
                    return
            if not self._is_held(message):
                self._messages.append(message)
                self._condition.notify_all()

    def hold_tokens(self, replica: ReplicaId, generation: int) -> None:
        """Forget tokens of a leader, those waiting and those to come, until it says everything again.

        Some before them may have been lost with the last stream, and the ledger takes no gap.
        """
        with self._condition:
            self._held.add((replica, generation))
            self._messages = deque(message for message in self._messages if not self._is_held(message))

    def _is_held(self, message: WorkerMessage) -> bool:
        return isinstance(message, Tokens) and (message.replica, message.generation) in self._held

    def open(self) -> int:
        """Make a new stream the current one; it sends nothing before its welcome."""
        with self._condition:
            self._stream += 1
            self._is_welcomed = False
            self._condition.notify_all()
            return self._stream

    def welcome(self) -> None:
        with self._condition:
            self._is_welcomed = True
            self._condition.notify_all()

    def take(self, stream: int) -> WorkerMessage | None:
        """The next message, a heartbeat when there is none for a second, None when the stream is over."""
        deadline_s = time.monotonic() + HEARTBEAT_S
        with self._condition:
            while self._stream == stream:
                if self._is_welcomed and self._messages:
                    return self._messages.popleft()
                left_s = deadline_s - time.monotonic()
                if left_s <= 0 and self._is_welcomed:
                    return Heartbeat()
                self._condition.wait(max(left_s, 0.01))
            return None


class Link:
    """One worker's stream, through all its reconnections."""

    def __init__(self, *, coordinator: str, secret: str, orphan_timeout_s: float, callbacks: LinkCallbacks) -> None:
        self._coordinator = coordinator
        self._secret = secret
        self._orphan_timeout_s = orphan_timeout_s
        self._callbacks = callbacks
        self._outbox = _Outbox()
        self._term = 0
        self._attached_at_s = time.monotonic()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="link", daemon=True)

    @property
    def term(self) -> int:
        """The highest term of a coordinator that welcomed this worker."""
        return self._term

    def start(self) -> None:
        """Dial, and go on dialing."""
        self._thread.start()

    def send(self, message: WorkerMessage) -> None:
        """Say something; it waits while no coordinator is there. Any thread may call."""
        self._outbox.put(message)

    def hold_tokens(self, replica: ReplicaId, generation: int) -> None:
        """From a welcome on: drop a leader's tokens until it has said again all that may be lost."""
        self._outbox.hold_tokens(replica, generation)

    def close(self) -> None:
        """End the stream and dial no more."""
        self._stopping.set()
        self._outbox.open()

    def _run(self) -> None:
        pause_s = _FIRST_REDIAL_S
        while not self._stopping.is_set():
            dialled_at_s = time.monotonic()
            if self._converse_once() and time.monotonic() - dialled_at_s > _LAST_REDIAL_S:
                # A stream that breaks at once, again and again, is not worth a quick redial.
                pause_s = _FIRST_REDIAL_S
            if self._stopping.is_set():
                return
            orphaned_s = time.monotonic() - self._attached_at_s
            if orphaned_s >= self._orphan_timeout_s:
                self._callbacks.ended(f"no coordinator for {orphaned_s:.1f} s", 0)
                return
            self._stopping.wait(min(pause_s, max(0.0, self._orphan_timeout_s - orphaned_s)))
            pause_s = min(2 * pause_s, _LAST_REDIAL_S)

    def _converse_once(self) -> bool:
        """One stream from dial to end; True if it was welcomed."""
        stream = self._outbox.open()
        with grpc.insecure_channel(self._coordinator, options=CHANNEL_OPTIONS) as channel:
            call = CoordinatorStub(channel).Attach(self._outgoing(stream), metadata=bearer(self._secret))
            is_welcomed = False
            try:
                opener = Opener(COORDINATOR_MESSAGE)
                for envelope in call:
                    is_welcomed = self._handle(opener.open(envelope), is_welcomed)
                    if self._stopping.is_set():
                        break
            except grpc.RpcError as error:
                self._note_failure(error)
            except EnvelopeError as error:
                log.warning("link_broken", reason=error.message)
            finally:
                call.cancel()
                self._outbox.open()
                if is_welcomed:
                    self._attached_at_s = time.monotonic()
            return is_welcomed

    def _outgoing(self, stream: int) -> Iterator[Envelope]:
        sealer = Sealer()
        yield sealer.seal(self._callbacks.register())
        while (message := self._outbox.take(stream)) is not None:
            yield sealer.seal(message)

    def _handle(self, message: CoordinatorMessage, is_welcomed: bool) -> bool:
        """Act on one message; returns whether the stream is welcomed now."""
        if isinstance(message, Refused):
            self._stopping.set()
            self._callbacks.ended(f"refused by the coordinator: {message.reason}", 1)
            return is_welcomed
        if isinstance(message, Welcome):
            if message.term < self._term:
                raise EnvelopeError(f"welcome of term {message.term}, {self._term} was seen")
            self._term = message.term
            self._orphan_timeout_s = message.orphan_timeout_s
            self._callbacks.welcomed(message)
            self._outbox.welcome()
            return True
        if not is_welcomed:
            raise EnvelopeError(f"{message.kind} came before the welcome")
        self._callbacks.received(message)
        return True

    def _note_failure(self, error: grpc.RpcError) -> None:
        code = error.code() if isinstance(error, grpc.Call) else None
        if code is grpc.StatusCode.UNAUTHENTICATED:
            self._stopping.set()
            self._callbacks.ended("the coordinator does not accept the secret", 1)
            return
        log.info("link_lost", code=None if code is None else code.name)
