"""The agent of one GPU: registers with the coordinator, executes its commands, runs a rank of a replica.

Commands are executed once per id; a repeated id is answered with its first outcome. What is quick is done in order on
one thread; copies, loads and joins have a thread each, so that decoding and other commands never wait for them. The
agent outlives the coordinator: it goes on decoding, keeps what the ledger has not, and tells it to the next one.
"""

from __future__ import annotations

import os
import queue
import secrets
import signal
import sys
import threading
import time
import traceback
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import psutil
import torch

from spotserve import __version__
from spotserve.core.batching import BatchLimits, SequenceKey
from spotserve.core.ids import ReplicaId
from spotserve.core.spec import ServingSpec
from spotserve.core.wire import (
    AbortCommand,
    ActivateCommand,
    AdmitCommand,
    CloseCommand,
    Command,
    CoordinatorMessage,
    CopyKvCommand,
    CopyKvDeltaCommand,
    CopyWeightsCommand,
    Durable,
    GrantCommand,
    JoinGroupCommand,
    LoadWeightsCommand,
    ProbeCommand,
    QuiesceCommand,
    Register,
    ReleaseCommand,
    Reply,
    Resend,
    ReserveCommand,
    ResumeCommand,
    SelfNotice,
    Shutdown,
    Welcome,
)
from spotserve.errors import InvariantError, ModelError, SpotServeError, TransferError
from spotserve.log import configure_logging, get_logger
from spotserve.runtime.checkpoint import TORCH_DTYPES
from spotserve.runtime.failpoints import Failpoint
from spotserve.runtime.holdings import Holdings, Position
from spotserve.runtime.instance import WorkerSettings
from spotserve.runtime.kv_migration import KvFollower, Peer
from spotserve.runtime.kv_store import KvStore
from spotserve.runtime.leader import Leader, QuiesceReport
from spotserve.runtime.linear import check_linear
from spotserve.runtime.link import Link, LinkCallbacks
from spotserve.runtime.mesh import MeshListener, join
from spotserve.runtime.ratelimit import RateLimiter
from spotserve.runtime.replica_loop import Follower
from spotserve.runtime.transfer import TransferClient, TransferServer
from spotserve.runtime.transfer_source import LocalPeer, TransferSource
from spotserve.runtime.weight_transfer import load_slices, pull_slices
from spotserve.runtime.weights import WeightStore

SELF_NOTICE_S = 30.0
SWITCH_INTERVAL_S = 0.0005
"""How long a copy's thread waits for the interpreter while the engine's small operations keep taking it back. It waits
so after every system call: at the default of 5 ms a copy of a few KV blocks into a serving worker takes 0.2 s."""
_MAX_OUTCOMES = 8192
_PROBE_PATIENCE_S = 0.01
"""A notice's plan waits for the probe: an iteration's length is too much, and a position need not be the very last."""

log = get_logger("agent")


class LinkCap(RateLimiter):
    """A rate limiter whose rate is learned later, from the welcome."""

    def __init__(self) -> None:
        super().__init__(None)
        self._limiter = RateLimiter(None)

    def set(self, bytes_per_s: float | None) -> None:
        """Cap at this rate from now on."""
        self._limiter = RateLimiter(bytes_per_s)

    def acquire(self, num_bytes: int, is_cancelled: Callable[[], bool] = lambda: False) -> None:
        """Wait until `num_bytes` more may pass."""
        self._limiter.acquire(num_bytes, is_cancelled)


class Outcomes:
    """The outcome of each command that this process executed, or is executing."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._replies: OrderedDict[str, Reply | None] = OrderedDict()

    def begin(self, command: str) -> tuple[bool, Reply | None]:
        """(whether to execute it now, its outcome if it has one)."""
        with self._lock:
            if command in self._replies:
                return False, self._replies[command]
            self._replies[command] = None
            return True, None

    def finish(self, reply: Reply) -> None:
        """Remember an outcome; the oldest ones are forgotten."""
        with self._lock:
            self._replies[reply.command] = reply
            while len(self._replies) > _MAX_OUTCOMES:
                self._replies.popitem(last=False)


class Agent:
    """One worker process."""

    def __init__(self, settings: WorkerSettings) -> None:
        self._settings = settings
        self._incarnation = secrets.token_hex(16)
        self._outcomes = Outcomes()
        self._failpoint = Failpoint.from_environment(settings.worker)
        self._upload, self._download = LinkCap(), LinkCap()
        self._least_iteration_s = 0.0
        self._meshes = MeshListener(settings.host)
        self._transfers = TransferServer(settings.host, self._upload)
        self._source = TransferSource(weights=self._weights, kv=self._kv_of)
        self._transfers.register(self._source.answer)
        self._holdings: Holdings | None = None
        self._journal: str | None = None
        self._followers: dict[tuple[int, str], KvFollower] = {}
        self._followers_lock = threading.Lock()
        self._grants: dict[int, set[str]] = {}
        self._commands: queue.SimpleQueue[Command] = queue.SimpleQueue()
        self._notice = threading.Event()
        self._ended = threading.Event()
        self._exit_code = 0
        self._link = Link(
            coordinator=settings.coordinator,
            secret=settings.read_secret(),
            orphan_timeout_s=settings.orphan_timeout_s,
            callbacks=LinkCallbacks(
                register=self._register, welcomed=self._welcomed, received=self._received, ended=self._end
            ),
        )

    def run(self) -> int:
        """Work until the link ends for good; returns the exit code. Signals are handled here, in the main thread."""
        threading.Thread(target=self._execute_in_order, name="commands", daemon=True).start()
        self._link.start()
        while not self._ended.wait():
            pass
        return self._exit_code

    def take_notice(self) -> None:
        """SIGTERM: the instance will be taken; go on working and say so."""
        if not self._notice.is_set():
            self._notice.set()
            self._link.send(SelfNotice(grace_s=SELF_NOTICE_S))

    # The link

    def _register(self) -> Register:
        process = psutil.Process()
        settings = self._settings
        return Register(
            worker=settings.worker,
            instance=settings.instance,
            num_gpus=settings.num_gpus,
            incarnation=self._incarnation,
            pid=process.pid,
            process_group=os.getpgid(0),
            started_at=process.create_time(),
            version=__version__,
            memory_bytes=settings.gpu_memory_bytes,
            device=settings.device,
            gpu_type=settings.gpu_type or _device_name(settings.device),
            mesh_address=self._meshes.address,
            transfer_address=self._transfers.address,
            roles=tuple(position.role() for position in self._positions()),
            journal=self._journal,
        )

    def _welcomed(self, welcome: Welcome) -> None:
        if self._holdings is None:
            try:
                check_linear(welcome.spec.linear, TORCH_DTYPES[welcome.spec.model.dtype], self._settings.device)
            except ModelError as error:
                self._end(error.message, 1)
                return
            self._holdings = Holdings(
                welcome.spec,
                folder=Path(welcome.model_path),
                files=welcome.model_files,
                memory_bytes=self._settings.gpu_memory_bytes,
                device=self._settings.device,
            )
            self._journal = welcome.journal
        elif self._journal != welcome.journal:
            self._end("the coordinator began another journal", 1)
            return
        elif not _is_same_service(self._holdings.spec, welcome.spec):
            self._end("the coordinator serves another model now, or otherwise", 1)
            return
        else:
            try:
                self._holdings.relocate(Path(welcome.model_path), welcome.model_files)
            except ModelError as error:
                self._end(error.message, 1)
                return
        self._upload.set(welcome.link_bytes_per_s)
        self._download.set(welcome.link_bytes_per_s)
        self._least_iteration_s = welcome.least_iteration_s
        log.info("welcomed", term=welcome.term, worker=self._settings.worker)
        if self._notice.is_set():
            self._link.send(SelfNotice(grace_s=SELF_NOTICE_S))
        for position in self._positions():
            loop = position.loop
            broken = loop.report() if loop is not None else None
            if broken is not None:
                self._link.send(broken)
            if isinstance(loop, Leader):
                self._link.hold_tokens(*position.key)
                loop.resend()

    def _received(self, message: CoordinatorMessage) -> None:
        if isinstance(message, Command):
            self._accept(message)
            return
        term = getattr(message, "term", 0)
        if term < self._link.term:
            log.warning("message_of_old_term", kind=message.kind, term=term)
        elif isinstance(message, Durable):
            for leader in self._leaders():
                leader.set_durable(message.positions)
        elif isinstance(message, Resend):
            for leader in self._leaders():
                leader.resend(message.positions)
        elif isinstance(message, Shutdown):
            self._end("told to by the coordinator", 0)

    def _end(self, reason: str, exit_code: int) -> None:
        log.info("worker_ends", worker=self._settings.worker, reason=reason)
        self._exit_code = exit_code
        self._ended.set()

    # Commands

    def _accept(self, command: Command) -> None:
        if command.term < self._link.term:
            error = f"term {command.term} is below {self._link.term}"
            self._link.send(Reply(command=command.command, ok=False, error=error))
            return
        is_new, outcome = self._outcomes.begin(command.command)
        if outcome is not None:
            self._link.send(outcome)
        elif is_new and isinstance(command, _SLOW):
            threading.Thread(target=self._execute, args=(command,), name=_kind(command), daemon=True).start()
        elif is_new:
            self._commands.put(command)

    def _execute_in_order(self) -> None:
        while True:
            self._execute(self._commands.get())

    def _execute(self, command: Command) -> None:
        self._failpoint.reach(f"{_kind(command)}:before")
        try:
            result = self._dispatch(command)
        except SpotServeError as error:
            self._fail(command, error.message)
        except Exception as error:  # noqa: BLE001  # The command's edge: the coordinator must learn of any failure.
            traceback.print_exc()
            self._fail(command, f"{type(error).__name__}: {error}")
        else:
            if isinstance(result, Future):
                result.add_done_callback(lambda done: self._answer_later(command, done))
            else:
                self._succeed(command, result)
                if isinstance(command, CopyWeightsCommand | LoadWeightsCommand):
                    self._build_ahead(command.replica, command.generation)

    def _answer_later(self, command: Command, done: Future[Any]) -> None:
        error = done.exception()
        if error is not None:
            self._fail(command, error.message if isinstance(error, SpotServeError) else str(error))
            return
        report = done.result()
        self._succeed(command, _quiesce_result(report) if isinstance(report, QuiesceReport) else {})

    def _succeed(self, command: Command, result: dict[str, Any]) -> None:
        self._failpoint.reach(f"{_kind(command)}:after")
        self._reply(Reply(command=command.command, ok=True, result=result))

    def _fail(self, command: Command, error: str) -> None:
        log.warning("command_failed", kind=_kind(command), command=command.command, error=error)
        self._reply(Reply(command=command.command, ok=False, error=error))

    def _reply(self, reply: Reply) -> None:
        self._outcomes.finish(reply)
        self._link.send(reply)

    def _dispatch(self, command: Command) -> dict[str, Any] | Future[Any]:
        match command:
            case ReserveCommand():
                self._held().reserve(command)
                return {}
            case GrantCommand():
                self._transfers.grant(command.grant, bytes.fromhex(command.secret), command.expires_s)
                self._grants.setdefault(command.epoch, set()).add(command.grant)
                return {}
            case CopyWeightsCommand():
                return self._copy_weights(command)
            case LoadWeightsCommand():
                return self._load_weights(command)
            case CopyKvCommand():
                return self._copy_kv(command)
            case CopyKvDeltaCommand():
                return self._copy_kv_delta(command)
            case JoinGroupCommand():
                return self._join_group(command)
            case ActivateCommand():
                return self._activate(command)
            case ReleaseCommand():
                return self._release(command)
            case AbortCommand():
                return self._abort(command)
            case ProbeCommand():
                return self._probe(command)
            case QuiesceCommand():
                return self._leader(command).quiesce()
            case ResumeCommand():
                return self._leader(command).resume()
            case AdmitCommand():
                return self._leader(command).admit(command.requests)
            case CloseCommand():
                return self._close(command)
        raise InvariantError(f"command {_kind(command)} is not known")

    # Copies

    def _copy_weights(self, command: CopyWeightsCommand) -> dict[str, Any]:
        held = self._held()
        held.expect(command.slices)
        peer = self._peer(command.source, command.source_address, command.grant, command.secret)
        try:
            return {"bytes": pull_slices(held, peer, command.slices), **_first_byte(peer.first_byte_s)}
        finally:
            peer.close()
            held.trim()

    def _load_weights(self, command: LoadWeightsCommand) -> dict[str, Any]:
        held = self._held()
        held.expect(command.slices)
        num_bytes = load_slices(held, command.slices)
        held.trim()
        return {"bytes": num_bytes}

    def _shares_pool(self, command: CopyKvCommand | CopyKvDeltaCommand) -> bool:
        """Whether source and target generation keep their KV in one pool here: then there is nothing to copy."""
        if command.source != self._settings.worker or self._holdings is None:
            return False
        source = self._holdings.position(command.route.from_replica, command.source_generation)
        target = self._holdings.position(command.route.to_replica, command.target_generation)
        return source is not None and target is not None and source.kv is target.kv

    def _copy_kv(self, command: CopyKvCommand) -> dict[str, Any]:
        if self._shares_pool(command):
            return {"bytes": 0}
        # One plan runs at a time: what an older one still follows was left behind when it stepped down its ladder.
        self._abandon(lambda epoch: epoch < command.epoch)
        follower = self._follower(command)
        follower.start()
        follower.is_caught_up.wait()
        if follower.error is not None:
            raise TransferError(follower.error)
        return {"bytes": follower.take_bytes(), **_first_byte(follower.first_byte_s)}

    def _copy_kv_delta(self, command: CopyKvDeltaCommand) -> dict[str, Any]:
        if self._shares_pool(command):
            return {"bytes": 0, "missing": self._absent(command)}
        with self._followers_lock:
            follower = self._followers.pop((command.epoch, command.follows), None)
        if follower is None:  # `copy_kv` was skipped or its worker restarted: everything is delta.
            follower = self._new_follower(command)
        missing = follower.finish(command.manifest)
        follower.close()
        return {
            "bytes": follower.take_bytes(),
            "missing": [list(item) for item in missing],
            **_first_byte(follower.first_byte_s),
        }

    def _absent(self, command: CopyKvDeltaCommand) -> list[list[Any]]:
        """Choices of the manifest whose KV the shared pool does not hold whole."""
        kv = self._position(command.route.to_replica, command.target_generation).kv
        directory = kv.directory()
        return [
            [item.request, item.choice]
            for item in command.manifest
            if directory.get(SequenceKey(item.request, item.choice, item.kv_generation), 0) < item.kv_tokens
        ]

    def _follower(self, command: CopyKvCommand) -> KvFollower:
        with self._followers_lock:
            old = self._followers.get((command.epoch, command.step))
            if old is not None:
                return old
            follower = self._followers[(command.epoch, command.step)] = self._new_follower(command)
            return follower

    def _abandon(self, is_over: Callable[[int], bool]) -> None:
        """Stop the followers of these epochs and free what they brought and nobody adopted."""
        with self._followers_lock:
            keys = [key for key in self._followers if is_over(key[0])]
            followers = [self._followers.pop(key) for key in keys]
        for follower in followers:
            follower.abandon()

    def _new_follower(self, command: CopyKvCommand | CopyKvDeltaCommand) -> KvFollower:
        position = self._position(command.route.to_replica, command.target_generation)
        return KvFollower(
            peer=self._peer(command.source, command.source_address, command.grant, command.secret),
            route=command.route,
            source_generation=command.source_generation,
            incoming=position.incoming,
            is_local=command.source == self._settings.worker,
        )

    def _peer(self, source: str, address: str, grant: str, secret: str) -> Peer:
        if source == self._settings.worker:
            return LocalPeer(self._source)
        return TransferClient(address, grant, bytes.fromhex(secret), self._download)

    def _weights(self) -> WeightStore | None:
        return None if self._holdings is None else self._holdings.weights

    def _kv_of(self, replica: Any, generation: int) -> KvStore | None:
        position = self._holdings.position(replica, generation) if self._holdings is not None else None
        return None if position is None else position.kv

    # Replicas

    def _join_group(self, command: JoinGroupCommand) -> dict[str, Any]:
        position = self._position(command.replica, command.generation)
        if position.mesh is None:
            place = position.place
            mesh = join(
                self._meshes,
                f"{command.replica}.{command.generation}",
                place.mesh_rank,
                command.addresses,
                bytes.fromhex(command.secret),
                pipeline_degree=place.pipeline,
                tensor_degree=place.tensor,
                timeout_s=command.timeout_s,
                cancelled=position.join_cancelled,
            )
            position.mesh = mesh
            if position.join_cancelled.is_set():
                mesh.close()
        self._build_ahead(command.replica, command.generation)
        return {}

    def _build_ahead(self, replica: ReplicaId, generation: int) -> None:
        """Build a stage as soon as its mesh and weights are there, so that it is not done inside the stop."""
        held = self._held()
        position = held.position(replica, generation)
        if position is None or position.mesh is None or not held.is_complete(position):
            return
        try:
            held.build(position)
        except SpotServeError as error:
            # The activation tries again, and answers with whatever stands in its way.
            log.warning("build_ahead_failed", replica=replica, generation=generation, error=error.message)

    def _activate(self, command: ActivateCommand) -> dict[str, Any]:
        position = self._position(command.replica, command.generation)
        if position.loop is not None:
            return {}
        held = self._held()
        if position.mesh is None:
            raise InvariantError(f"replica {command.replica} generation {command.generation} has joined no group")
        missing = held.weights.missing(position.slices)
        if missing:
            raise InvariantError(f"{len(missing)} weight slices are missing, the first is {missing[0]}")
        runner = held.build(position)
        if position.place.is_leader:
            leader = Leader(runner, self._limits(position), self._link.send, least_iteration_s=self._least_iteration_s)
            # Before it starts, so that nothing is scheduled before the ranks took over what was copied in.
            leader.admit(command.requests, is_exclusive=True)
            position.loop = leader
        else:
            position.loop = Follower(runner, self._link.send)
        position.loop.start()
        return {}

    def _limits(self, position: Position) -> BatchLimits:
        return BatchLimits.of_replica(
            kv_blocks=position.kv_blocks, max_running=position.max_running, pipeline=position.place.pipeline
        )

    def _release(self, command: ReleaseCommand) -> dict[str, Any]:
        if self._holdings is None:
            return {}
        if command.slices is None:
            self._holdings.release(command.replica, command.generation, keep_weights=command.keep_weights)
        else:
            keep_blocks = 0 if command.kv else command.keep_blocks
            self._holdings.release_part(command.replica, command.generation, command.slices, keep_blocks=keep_blocks)
        return {}

    def _abort(self, command: AbortCommand) -> dict[str, Any]:
        for grant in sorted(self._grants.pop(command.epoch, ())):
            self._transfers.revoke(grant)
        self._abandon(lambda epoch: epoch == command.epoch)
        if self._holdings is not None:
            self._holdings.abort(command.epoch)
        return {}

    def _close(self, command: CloseCommand) -> dict[str, Any] | Future[Any]:
        position = self._holdings.position(command.replica, command.generation) if self._holdings is not None else None
        leader = None if position is None else position.leader
        if leader is None or leader.broken is not None:
            return {}
        return leader.close(command.request, command.choice)

    def _probe(self, command: ProbeCommand) -> dict[str, Any]:
        held = self._held()
        if command.drop_loose:
            held.drop_loose()
        positions = held.positions()
        retired = [piece for position in positions if position.is_retired for piece in position.slices]
        result: dict[str, Any] = {
            "shards": [p.shard.model_dump() for p in positions if held.is_complete(p)],
            "slices": [piece.model_dump() for piece in (*held.loose(), *retired)],
            "roles": [p.role().model_dump() for p in positions],
            "memory_bytes": held.union_bytes([piece for p in positions for piece in p.slices])
            + sum({id(p.kv): p.kv.bytes for p in positions}.values()),
            "positions": [],
            "free_blocks": sum({id(p.kv): p.kv.num_free for p in positions}.values()),
            "iterations": 0,
            "prefilled_tokens": 0,
            "evictions": 0,
        }
        for position in positions:
            leader = position.leader
            if leader is None or leader.broken is not None:
                continue
            try:
                progress = leader.progress().result(_PROBE_PATIENCE_S)
            except TimeoutError:  # In the middle of an iteration, or of waiting for a peer that is gone.
                progress = leader.last_progress
            except SpotServeError:
                continue
            result["positions"] += [choice.model_dump() for choice in progress.positions]
            result["iterations"] += progress.iterations
            result["prefilled_tokens"] += progress.prefilled_tokens
            result["evictions"] += progress.evictions
        return result

    # What is held

    def _held(self) -> Holdings:
        if self._holdings is None:
            raise InvariantError("a command came before the welcome")
        return self._holdings

    def _positions(self) -> list[Position]:
        return self._holdings.positions() if self._holdings is not None else []

    def _leaders(self) -> list[Leader]:
        return [leader for position in self._positions() if (leader := position.leader) is not None]

    def _position(self, replica: Any, generation: int) -> Position:
        position = self._held().position(replica, generation)
        if position is None:
            raise TransferError(f"replica {replica} generation {generation} is not reserved here")
        return position

    def _leader(self, command: QuiesceCommand | ResumeCommand | AdmitCommand) -> Leader:
        position = self._held().position(command.replica, command.generation)
        leader = None if position is None else position.leader
        if leader is None:
            raise TransferError(f"replica {command.replica} generation {command.generation} is not led from here")
        return leader


_SLOW = (
    CopyWeightsCommand,
    LoadWeightsCommand,
    CopyKvCommand,
    CopyKvDeltaCommand,
    JoinGroupCommand,
    ReleaseCommand,
    AbortCommand,
    ProbeCommand,
)


def agent_main(settings: WorkerSettings) -> int:
    """Run the agent of one GPU in this process, whose main thread this is."""
    torch.set_num_threads(1)
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    configure_logging("json")
    agent = Agent(settings)
    signal.signal(signal.SIGTERM, lambda number, frame: agent.take_notice())
    return agent.run()


def _device_name(device: str) -> str:
    """What CUDA calls the GPU; empty on a CPU, where only the person who starts the worker can tell."""
    return torch.cuda.get_device_name() if device == "cuda" else ""


def _is_same_service(old: ServingSpec, new: ServingSpec) -> bool:
    """Whether what was built for one spec computes exactly what the other one says."""
    return (old.model, old.deterministic, old.linear) == (new.model, new.deterministic, new.linear)


def _kind(command: Command) -> str:
    return str(getattr(command, "kind", type(command).__name__))


def _first_byte(first_byte_s: float | None) -> dict[str, Any]:
    """How long ago a copy's first transfer chunk came: an age, because nobody else has this process's clock."""
    return {} if first_byte_s is None else {"first_byte_age_s": time.monotonic() - first_byte_s}


def _quiesce_result(report: QuiesceReport) -> dict[str, Any]:
    return {"positions": [position.model_dump() for position in report.positions], "iterations": report.iterations}
