"""The composition root: the one module that wires the controller to real ports and runs a daemon."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import sys
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, TextIO

import psutil

from spotserve.api.server import bind, build_app, check_exposure
from spotserve.api.server import serve as serve_http
from spotserve.api.text import StopJudge
from spotserve.api.tokenizer import GenerationDefaults, TextCodec
from spotserve.api.validation import ModelInfo
from spotserve.cloud.local import LocalCloud, check_capacity
from spotserve.cloud.player import TracePlayer
from spotserve.cloud.traces import Trace, read_trace
from spotserve.core import events as ev
from spotserve.core import wire
from spotserve.core.canonical import canonical_json, digest
from spotserve.core.controller import Controller
from spotserve.core.ids import InstanceId, RequestId
from spotserve.core.loop import run as run_loop
from spotserve.core.options import RunOptions
from spotserve.core.plan import CopyWeights, LoadWeights, Plan
from spotserve.core.ports import ChoiceDelta, NewRequest, Progress, RequestView
from spotserve.core.service import service_state
from spotserve.core.sizing import size_limits
from spotserve.core.snapshot import RequestProgress, Snapshot
from spotserve.core.spec import Limits, ModelSpec, Profile, ServingSpec, weight_copies
from spotserve.core.state import ClusterState, world_of
from spotserve.core.status import service_status
from spotserve.errors import (
    NotServingError,
    PlanRefusedError,
    QueueFullError,
    SpecError,
    SpotServeError,
    UnknownInstanceError,
)
from spotserve.log import configure_logging, get_logger
from spotserve.runtime.architecture import read_architecture
from spotserve.runtime.checkpoint_header import CheckpointLayout, validate_checkpoint
from spotserve.runtime.failpoints import failpoint_variables
from spotserve.runtime.forkserver_client import ForkServer, ForkServerError
from spotserve.runtime.instance import default_memory_bytes
from spotserve.runtime.live_world import LiveWorld
from spotserve.runtime.model_manifest import ModelManifest, check_unchanged, read_manifest, resolve_manifest
from spotserve.runtime.model_source import ModelSource, resolve_model
from spotserve.runtime.profiles import answer_of, profile_of, write_whole
from spotserve.runtime.switchboard import Switchboard
from spotserve.solvers.planner_process import PlannerProcess
from spotserve.store.journal import EntryJournal, Journal
from spotserve.store.ledger import Ledger, Owner
from spotserve.store.state_dir import StateDir

BUILTIN_MODEL = Path(__file__).parent / "builtin"
BUILTIN_NAME = "spotserve-builtin"
BUILTIN_GPU_MEMORY_BYTES = 6 * 1024 * 1024
DESCRIPTION_VERSION = 1
"""Counts changes to what is refused or described: an older description is made anew."""
MANIFEST_NAME = "model-manifest.json"
"""In the state dir: what was served from it last."""
REJOIN_S = 8.0
"""How long a restarted coordinator waits for the workers of its predecessor."""
LOAD_WINDOW_S = 30.0
LOAD_PERIOD_S = 5.0
EXPIRE_PERIOD_S = 60.0
SNAPSHOT_ENTRIES = 2000

log = get_logger("daemon")


def serve(options: RunOptions, progress: Progress, log_stream: TextIO | None = None) -> int:
    """Run a daemon until it is stopped; returns the exit code.

    Args:
        options: what a person said.
        progress: is told how the start goes.
        log_stream: where logs go; None is stderr.
    """
    configure_logging(options.log_format, stream=log_stream)
    check_exposure(options.host, options.api_key)
    # What may take minutes is done before there is an event loop, so that Ctrl-C ends it at once.
    inputs = _checked(options, progress)
    with inputs.listener, StateDir(Path(options.state_dir), fresh=options.fresh) as state_dir:
        manifest = _manifest(options, inputs.layout, state_dir, progress)
        return asyncio.run(_serve(options, inputs, manifest, state_dir, progress))


@dataclass(frozen=True, slots=True)
class Inputs:
    """What a person gave, read and found good while nothing was started and nothing written yet."""

    layout: CheckpointLayout
    model_name: str
    served_name: str
    """What clients call the model."""
    codec: TextCodec | None
    defaults: GenerationDefaults
    trace: Trace | None
    listener: socket.socket
    """Owns the HTTP address; listened on when the front door opens."""

    @property
    def folder(self) -> Path:
        """The model's folder."""
        return self.layout.folder


async def _serve(
    options: RunOptions, inputs: Inputs, manifest: ModelManifest, state_dir: StateDir, progress: Progress
) -> int:
    daemon = await Daemon.build(options, inputs, manifest, state_dir, progress)
    return await daemon.run()


def _checked(options: RunOptions, progress: Progress) -> Inputs:
    """Read what was given, the cheapest first. Raises SpecError, ModelError, HubError or PortError."""
    check_capacity(
        options.instances * options.gpus_per_instance,
        num_cores=os.cpu_count() or 1,
        free_bytes=psutil.virtual_memory().available,
    )
    trace = None if options.trace is None else read_trace(Path(options.trace), living=options.instances)
    with contextlib.ExitStack() as undo:
        listener = undo.enter_context(bind(options.host, options.port))
        source = ModelSource(BUILTIN_MODEL, BUILTIN_MODEL.name)
        if options.model is not None:
            source = resolve_model(options.model, progress)
        layout = validate_checkpoint(source.folder)
        read_architecture(source.folder)
        inputs = Inputs(
            layout=layout,
            model_name=source.name,
            served_name=options.served_model_name or (BUILTIN_NAME if options.model is None else source.name),
            codec=TextCodec.load(source.folder),
            defaults=GenerationDefaults.load(source.folder),
            trace=trace,
            listener=listener,
        )
        undo.pop_all()
    return inputs


def _manifest(options: RunOptions, layout: CheckpointLayout, state_dir: StateDir, progress: Progress) -> ModelManifest:
    """The hash of every file that is served from, compared with what this state dir served before."""
    manifest = resolve_manifest(
        layout, cache=_profile_cache(state_dir), progress=progress, hash_again=options.verify_weights
    )
    if not options.fresh:
        check_unchanged(read_manifest(state_dir.path / MANIFEST_NAME), manifest, layout.folder)
    return manifest


def _profile_cache(state_dir: StateDir) -> Path:
    """The folder of what is found out about models once and kept."""
    return Path(os.environ.get("SPOTSERVE_PROFILE_CACHE", state_dir.path / "profiles"))


class Daemon:
    """A running service: the front door and the administration of one controller and its world."""

    def __init__(
        self,
        options: RunOptions,
        *,
        spec: ServingSpec,
        state_dir: StateDir,
        controller: Controller,
        journal: Journal,
        ledger: Ledger,
        world: LiveWorld,
        switchboard: Switchboard,
        forkserver: ForkServer,
        planner: PlannerProcess,
        inputs: Inputs,
        progress: Progress,
        continued: bool,
    ) -> None:
        self.options = options
        self.spec = spec
        self._state_dir = state_dir
        self._controller = controller
        self._journal = journal
        self._ledger = ledger
        self._world = world
        self._switchboard = switchboard
        self._forkserver = forkserver
        self._planner = planner
        self._inputs = inputs
        self._progress = progress
        self._continued = continued
        self._arrivals: deque[float] = deque()
        self._submitting = 0
        self._num_signals = 0
        self.player: TracePlayer | None = None
        self.url = ""

    # Building

    @classmethod
    async def build(
        cls, options: RunOptions, inputs: Inputs, manifest: ModelManifest, state_dir: StateDir, progress: Progress
    ) -> Daemon:
        """Bring up everything but the workers; nothing is left half-started when this raises."""
        async with contextlib.AsyncExitStack() as undo:
            daemon = await cls._build(options, inputs, manifest, state_dir, progress, undo)
            undo.pop_all()
        return daemon

    @classmethod
    async def _build(
        cls,
        options: RunOptions,
        inputs: Inputs,
        manifest: ModelManifest,
        state_dir: StateDir,
        progress: Progress,
        undo: contextlib.AsyncExitStack,
    ) -> Daemon:
        forkserver, spec = await _forked_and_measured(options, inputs, state_dir)
        undo.push_async_callback(asyncio.to_thread, forkserver.close)
        opened = state_dir.open_journal(model_digest=spec.model.digest, dtype=spec.model.dtype, now_unix_s=time.time())
        undo.callback(opened.journal.close)
        write_whole(state_dir.path / MANIFEST_NAME, canonical_json(manifest))
        controller, began_s = _folded(opened.journal, opened.continued)
        if controller.state.spec is not None:
            if controller.state.spec != spec:
                log.warning(
                    "options_ignored", reason="the journal is continued with what it began with", hint="--fresh"
                )
            spec = controller.state.spec
        ledger = Ledger(state_dir.ledger_path, judge=StopJudge(inputs.codec), on_failure=_die)
        undo.push_async_callback(asyncio.to_thread, ledger.shutdown)
        planner = PlannerProcess()
        switchboard = Switchboard(
            secret=state_dir.secret(),
            term=state_dir.term,
            greet=_greeter(
                options,
                spec,
                inputs.folder,
                manifest,
                term=state_dir.term,
                journal=opened.journal.identity.incarnation,
                controller=controller,
            ),
        )
        await switchboard.start("127.0.0.1", state_dir.worker_port())
        undo.push_async_callback(switchboard.stop)
        cloud = LocalCloud(
            forkserver,
            log_folder=state_dir.logs_path,
            worker_args=_worker_args(options, spec, state_dir, switchboard),
            env=failpoint_variables(os.environ),
        )
        world = LiveWorld(
            spec,
            switchboard=switchboard,
            cloud=cloud,
            planner=planner,
            ledger=ledger,
            term=state_dir.term,
            began_s=began_s,
            state=lambda: controller.state,
            owner=Owner,
        )
        await planner.start()
        daemon = cls(
            options,
            spec=spec,
            state_dir=state_dir,
            controller=controller,
            journal=opened.journal,
            ledger=ledger,
            world=world,
            switchboard=switchboard,
            forkserver=forkserver,
            planner=planner,
            inputs=inputs,
            progress=progress,
            continued=opened.continued and controller.state.spec is not None,
        )
        if inputs.trace is not None:
            last_at_s = opened.journal.last_at_s
            played_s = last_at_s - controller.state.served_at_s
            daemon.player = TracePlayer(inputs.trace, daemon, played_s=played_s, away_s=began_s - last_at_s)
        return daemon

    # Running

    async def run(self) -> int:
        """Serve until stopped. Returns the exit code."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._signalled)
        background = [asyncio.create_task(work) for work in (self._world.pump(), self._world.watch(), self._periodic())]
        http = asyncio.create_task(self._serve_http())
        try:
            await self._begin()
            background.append(asyncio.create_task(self._loop()))
            if self.player is not None:
                background.append(asyncio.create_task(self.player.play()))
            await _first_end([http, *background[:4]], background[4:])
        finally:
            http.cancel()
            for task in background:
                task.cancel()
            await asyncio.gather(http, *background, return_exceptions=True)
            await self._close()
            for number in (signal.SIGINT, signal.SIGTERM):
                # A second signal asks for what is happening already; it must not turn the exit code.
                loop.remove_signal_handler(number)
                signal.signal(number, signal.SIG_IGN)
        return 0

    async def _loop(self) -> None:
        journal = self._world.echo(EntryJournal(self._journal))
        await run_loop(self._world, self._controller, journal)
        if self._world.failure is not None:
            raise self._world.failure

    async def _begin(self) -> None:
        """The first event: a new journal, or a restart with what is left of the old world."""
        at_s = self._world.at_s()
        if self._continued:
            await self._restart()
            return
        self._world.emit(ev.JournalBegun(at_s=at_s, spec=self.spec, num_instances=self.options.instances))

    async def _restart(self) -> None:
        """Adopt what lives: owners from the fold first, then workers, then what is gone is told."""
        state = self._controller.state
        await self._ledger.forget_unjournaled(state.requests)
        owners = {
            name: None if request.replica is None else Owner(request.replica, request.generation)
            for name, request in state.requests.items()
            if name in self._ledger
        }
        await self._ledger.set_owners(owners)
        # A predecessor that stopped, rather than died, has sent its workers home.
        expected = set() if state.stopped else {gpu.id for instance in state.living() for gpu in instance.gpus}
        deadline_s = time.monotonic() + REJOIN_S
        while not expected <= set(self._switchboard.connected()) and time.monotonic() < deadline_s:
            await asyncio.sleep(0.02)
        self._world.adopt(num_instances=self.options.instances)

    async def _serve_http(self) -> None:
        info = _model_info(self.spec, self._inputs)
        app = build_app(self, self, self._inputs.codec, info, api_key=self.options.api_key)
        started = asyncio.create_task(self._announce())
        try:
            await serve_http(app, self._inputs.listener, self._listening)
        finally:
            started.cancel()

    def _listening(self, url: str) -> None:
        self.url = url

    async def _announce(self) -> None:
        while not (self.url and self.ready):
            self._show_start()
            await asyncio.sleep(0.02)
        self._progress.end()
        sys.stdout.write(f"ready {self.url}\n")
        sys.stdout.flush()

    def _show_start(self) -> None:
        """Tell how far the first placement is: instances first, then their weights, step by step."""
        state = self._controller.state
        moves = (
            [] if state.run is None else [s for s in state.run.plan.steps if isinstance(s, CopyWeights | LoadWeights)]
        )
        if state.run is not None and moves:
            done = sum(step.bytes for step in moves if state.run.steps[step.id] == "done")
            self._progress.show("load", done, sum(step.bytes for step in moves))
        elif self.options.instances:
            joined = sum(1 for instance in state.living() if instance.state in ("ready", "doomed"))
            self._progress.show("join", min(joined, self.options.instances), self.options.instances)

    async def _periodic(self) -> None:
        """Load, expiry and fold snapshots."""
        expired_at_s = time.monotonic()
        saved_at = self._controller.sequence
        last_rps = 0.0
        while True:
            await asyncio.sleep(LOAD_PERIOD_S)
            now_s = time.monotonic()
            while self._arrivals and self._arrivals[0] < now_s - LOAD_WINDOW_S:
                self._arrivals.popleft()
            load_rps = len(self._arrivals) / LOAD_WINDOW_S
            if self.ready and abs(load_rps - last_rps) > 0.1 * max(load_rps, last_rps):
                last_rps = load_rps
                self._world.emit(ev.LoadSampled(at_s=self._world.at_s(), load_rps=load_rps))
            if now_s - expired_at_s > EXPIRE_PERIOD_S:
                expired_at_s = now_s
                await self._ledger.expire(time.time())
            if self._controller.sequence - saved_at > SNAPSHOT_ENTRIES:
                saved_at = self._controller.sequence
                await self._journal.save_snapshot(saved_at, canonical_json(self._controller.state))

    def _signalled(self) -> None:
        self._num_signals += 1
        drain_s = self.options.drain_s if self._num_signals == 1 else 0.0
        self._world.emit(ev.StopRequested(at_s=self._world.at_s(), drain_s=drain_s))

    async def _close(self) -> None:
        await self._switchboard.stop()
        await self._planner.close()
        await asyncio.to_thread(self._forkserver.close)
        if self._controller.state.stopped and not self._controller.state.requests:
            await self._journal.mark_clean_stop()
        await asyncio.to_thread(self._journal.close)
        await asyncio.to_thread(self._ledger.shutdown)

    # Frontdoor

    @property
    def state(self) -> str:
        """The SERVICE state."""
        return service_state(self._controller.state)

    @property
    def ready(self) -> bool:
        """True from the first `serving` on."""
        return self._controller.state.served

    async def submit(self, requests: Sequence[NewRequest]) -> None:
        """Accept requests: durable in the ledger, then in the journal, then the caller may answer."""
        state = self._controller.state
        if not self.ready or state.stop_by_s is not None:
            raise NotServingError("the daemon is not admitting requests")
        queued = sum(1 for request in state.requests.values() if request.state == "queued")
        if queued + self._submitting + len(requests) > self.options.max_queue:
            raise QueueFullError(f"{queued} requests wait, the bound is {self.options.max_queue}")
        self._submitting += len(requests)
        try:
            await self._ledger.accept(requests)
            told = [self._world.tell(self._accepted(new)) for new in requests]
            await asyncio.gather(*told)
        finally:
            self._submitting -= len(requests)
        self._arrivals.extend([time.monotonic()] * len(requests))

    def _accepted(self, new: NewRequest) -> ev.RequestAccepted:
        return ev.RequestAccepted(
            at_s=self._world.at_s(),
            request=new.request,
            prompt_tokens=len(new.prompt_ids),
            num_choices=new.num_choices,
            # Which tokens a client favours is content: it stays in the ledger.
            sampling=new.sampling.model_copy(update={"logit_bias": ()}),
            timeout_s=new.timeout_s,
        )

    def watch(self, request: RequestId, after: int = -1) -> AsyncIterator[ChoiceDelta]:
        """Durable tokens past `after`, to the end."""
        return self._ledger.watch(request, after)

    async def cancel(self, request: RequestId) -> None:
        """The client went away."""
        if request in self._controller.state.requests:
            await self._world.tell(ev.CancelRequested(at_s=self._world.at_s(), request=request))

    async def view(self, request: RequestId) -> RequestView | None:
        """The durable content of a request."""
        known = self._controller.state.requests.get(request)
        # Of a request that ended all is read from the disk.
        return await asyncio.to_thread(self._ledger.view, request, None if known is None else known.state)

    # Administration

    def status(self) -> dict[str, Any]:
        """The JSON of `spotserve status --json`."""
        return service_status(self._controller.state)

    async def notice(self, instance: InstanceId, grace_s: float) -> dict[str, Any]:
        """A preemption notice; returns once journaled."""
        self._require_living(instance)
        at_s = self._world.at_s()
        await self._world.tell(ev.NoticeReceived(at_s=at_s, instance=instance, grace_s=grace_s))
        return {"instance": instance, "grace_s": grace_s}

    async def kill(self, instance: InstanceId) -> dict[str, Any]:
        """SIGKILL an instance; returns once its processes are gone and that is journaled."""
        self._require_living(instance)
        await self._world.tell(ev.KillRequested(at_s=self._world.at_s(), instance=instance))
        while self._controller.state.instances[instance].state != "gone":
            await asyncio.sleep(0.005)
        return {"instance": instance}

    def _require_living(self, instance: InstanceId) -> None:
        living = [known.id for known in self._controller.state.living()]
        if instance not in living:
            raise UnknownInstanceError(
                f"instance {instance} is not living", hint=f"living instances: {', '.join(living) or 'none'}"
            )

    async def add_instance(self) -> InstanceId:
        """One more instance; returns once journaled."""
        entry = await self._world.tell(ev.InstanceWanted(at_s=self._world.at_s()))
        return next(command.instance for command in entry.commands if command.kind == "launch_instance")

    async def load(self, load_rps: float) -> None:
        """A trace says what load to plan for."""
        await self._world.tell(ev.LoadSampled(at_s=self._world.at_s(), load_rps=load_rps))

    async def snapshot(self) -> tuple[dict[str, Any], Snapshot]:
        """The spec and the snapshot of this moment."""
        state = self._controller.state
        world = world_of(state).model_copy(update={"holdings": await self._world.probe_holdings()})
        requests = tuple(
            RequestProgress(
                request=request.id,
                replica=request.replica,
                state=request.state,
                prompt_tokens=request.prompt_tokens,
                max_tokens=request.max_tokens,
            )
            for request in state.requests.values()
        )
        return self.spec.model_dump(mode="json"), Snapshot(
            world=world, requests=requests, load_rps=state.load_rps, next_epoch=state.next_epoch
        )

    async def apply(self, plan: Plan) -> dict[str, Any]:
        """Run a plan that was made for the world as it is; returns at released or aborted."""
        state = self._controller.state
        membership = state.membership
        world = world_of(state).model_copy(update={"holdings": await self._world.probe_holdings()})
        findings = self._world.findings(plan, daemon_epoch=state.epoch)
        if findings:
            raise PlanRefusedError(f"plan refused: {findings[0]}", hint="run `spotserve verify` for all findings")
        if plan.snapshot_digest != digest(world) or plan.spec_digest != digest(self.spec):
            raise PlanRefusedError("stale plan: the world has changed since its snapshot", hint="plan again")
        entry = await self._world.tell(ev.PlanSubmitted(at_s=self._world.at_s(), plan=plan, membership=membership))
        if not any(command.kind == "begin_run" for command in entry.commands):
            raise PlanRefusedError("stale plan: another run is under way or the membership changed", hint="plan again")
        while True:
            run = self._controller.state.run
            if run is None or run.epoch != plan.epoch.to:
                break
            await asyncio.sleep(0.01)
        lines = [line for line in self._controller.state.migrations if line.epoch == plan.epoch.to]
        return {"epoch": plan.epoch.to, "outcome": lines[-1].outcome if lines else "completed"}

    async def stop(self) -> None:
        """Begin the drain."""
        self._signalled()


# Parts


async def _first_end(vital: Sequence[asyncio.Task[None]], others: Sequence[asyncio.Task[None]]) -> None:
    """Wait until one of the vital tasks ends, or any task fails: a relay that died unseen would hang every request."""
    waiting = {*vital, *others}
    while waiting:
        done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
        if any(task in vital for task in done):
            return


async def _forked_and_measured(
    options: RunOptions, inputs: Inputs, state_dir: StateDir
) -> tuple[ForkServer, ServingSpec]:
    """The forkserver, and what is served: parameter table and profile, each made once by a short process and kept.

    What can be refused is refused before the forkserver starts, which takes seconds.
    """
    cache, folder = _profile_cache(state_dir), inputs.folder
    model = await asyncio.to_thread(_described, inputs, options.dtype, cache)
    limits = _limits(options, model)
    forking = asyncio.create_task(asyncio.to_thread(ForkServer.start, log=state_dir.logs_path / "forkserver.log"))
    try:
        profile = await asyncio.to_thread(
            profile_of, folder, device=options.device, dtype=options.dtype, linear=options.linear, cache=cache
        )
    except BaseException:
        with contextlib.suppress(ForkServerError):
            await asyncio.to_thread((await forking).close)
        raise
    spec = ServingSpec(
        model=model,
        profile=_as_capped(profile),
        limits=limits,
        policy=options.policy,
        solvers=options.solvers,
        deterministic=options.deterministic,
        linear=options.linear,
    )
    return await forking, spec


def _link_cap() -> float | None:
    """Bytes per second that a worker's bulk transfers are held to, if a person wants a slower network."""
    cap = os.environ.get("SPOTSERVE_LINK_BYTES_PER_S")
    return None if cap is None else float(cap)


def _least_iteration_s() -> float:
    """Seconds that a micro-batch takes at least, if a person wants the pace of a slower GPU."""
    return float(os.environ.get("SPOTSERVE_ITERATION_S", "0"))


def _as_capped(profile: Profile) -> Profile:
    """The profile with links no faster than they are held to: plans must not count on what the workers will not do."""
    cap = _link_cap()
    if cap is None or profile.link_bytes_per_s <= cap:
        return profile
    return profile.model_copy(update={"link_bytes_per_s": cap})


def _limits(options: RunOptions, model: ModelSpec) -> Limits:
    max_model_len = options.max_model_len if options.max_model_len is not None else model.max_model_len
    if max_model_len > model.max_model_len:
        raise SpecError(
            f"--max-model-len {max_model_len} exceeds the model's {model.max_model_len}",
            hint=f"choose --max-model-len up to {model.max_model_len}",
        )
    return size_limits(
        model,
        gpu_memory_bytes=_gpu_memory_bytes(options),
        num_gpus=options.instances * options.gpus_per_instance,
        max_model_len=max_model_len,
        max_running=options.max_num_seqs,
        degrees=(options.data, options.pipeline, options.tensor),
        weight_copies=weight_copies(options.linear),
    )


def _described(inputs: Inputs, dtype: str | None, cache: Path) -> ModelSpec:
    """The parameter table from a process that may import transformers; kept by the checkpoint's digest and versions."""
    key = inputs.layout.digest.removeprefix("sha256:")[:32]
    versions = f"v{DESCRIPTION_VERSION}-{version('transformers')}"
    kept = cache / f"model-{key}-{dtype or 'stored'}-{versions}.json"
    try:
        described = ModelSpec.model_validate_json(kept.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        answer = answer_of("spotserve.runtime.describe", inputs.folder, dtype=dtype)
        write_whole(kept, answer)
        described = ModelSpec.model_validate_json(answer)
    # Another folder with the same files may have been described first.
    return described.model_copy(update={"name": inputs.model_name})


def _gpu_memory_bytes(options: RunOptions) -> int:
    num_gpus = max(1, options.instances * options.gpus_per_instance)
    if options.gpu_memory is not None and options.gpu_memory.total_bytes is not None:
        return options.gpu_memory.total_bytes
    if options.gpu_memory is not None and options.gpu_memory.free_share is not None:
        return default_memory_bytes(num_gpus, share=options.gpu_memory.free_share)
    return BUILTIN_GPU_MEMORY_BYTES if options.model is None else default_memory_bytes(num_gpus)


def _worker_args(
    options: RunOptions, spec: ServingSpec, state_dir: StateDir, switchboard: Switchboard
) -> tuple[str, ...]:
    """The arguments of `spotserve worker`, as a person would type them, but for the instance's name."""
    return (
        "--coordinator",
        f"127.0.0.1:{switchboard.port}",
        "--secret-file",
        str(state_dir.secret_path),
        "--gpus",
        str(options.gpus_per_instance),
        "--gpu-memory",
        str(_gpu_memory_bytes(options)),
        "--device",
        options.device,
        "--orphan-timeout",
        str(options.orphan_timeout_s),
    )


def _greeter(
    options: RunOptions,
    spec: ServingSpec,
    folder: Path,
    manifest: ModelManifest,
    *,
    term: int,
    journal: str,
    controller: Controller,
) -> Callable[[wire.Register], wire.Welcome | wire.Refused]:
    """Welcomes workers of instances that the controller asked for, refuses all others.

    A worker that another journal's coordinator welcomed is one of the others, whatever its name: it outlived its
    daemon, and what it holds is not what this journal says.
    """
    cap = _link_cap()
    least_iteration_s = _least_iteration_s()
    # Without its identity a worker takes no file on trust.
    files = [file.model_copy(update={"identity": None}) if options.verify_weights else file for file in manifest.files]

    def greet(register: wire.Register) -> wire.Welcome | wire.Refused:
        known = controller.state.instances.get(register.instance)
        if known is None or known.state == "gone":
            return wire.Refused(term=term, reason=f"instance {register.instance} is not wanted")
        if register.journal not in (None, journal):
            return wire.Refused(term=term, reason=f"worker {register.worker} belongs to another journal")
        return wire.Welcome(
            term=term,
            spec=spec,
            model_path=str(folder.resolve()),
            model_files=tuple(files),
            journal=journal,
            link_bytes_per_s=cap,
            least_iteration_s=least_iteration_s,
            orphan_timeout_s=options.orphan_timeout_s,
        )

    return greet


def _folded(journal: Journal, continued: bool) -> tuple[Controller, float]:
    """The controller as the journal leaves it, and the time to go on from."""
    controller = Controller()
    if not continued:
        return controller, 0.0
    base = journal.latest_snapshot()
    if base is not None:
        controller = Controller(ClusterState.model_validate_json(base.body), sequence=base.sequence)
    for entry in EntryJournal(journal).read(controller.sequence + 1 if controller.sequence else None):
        controller.fold(entry)
    # Deadlines go on while no coordinator lives; what fell due meanwhile is acted on at once.
    return controller, max(journal.last_at_s, time.time() - journal.identity.created_unix_s)


def _model_info(spec: ServingSpec, inputs: Inputs) -> ModelInfo:
    return ModelInfo(
        name=inputs.served_name,
        vocab_size=spec.model.vocab_size,
        max_model_len=spec.limits.max_model_len,
        created_unix_s=int(time.time()),
        defaults=inputs.defaults,
    )


def _die(error: SpotServeError) -> None:
    """A store that cannot write is the end: nothing may be answered that is not durable."""
    log.error("store_failed", error=error.message)
    os._exit(1)
