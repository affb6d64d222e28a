"""A running daemon: its start, its tasks and its end, and what the front door and the admin endpoints ask of it."""

from __future__ import annotations

import asyncio
import signal
import sys
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any, TextIO

from spotserve.api.server import build_app, check_exposure
from spotserve.api.server import serve as serve_http
from spotserve.api.validation import ModelInfo
from spotserve.app.deployment import Deployment, Inputs, deploy, read_inputs
from spotserve.app.parts import Parts, assemble
from spotserve.cloud.player import TracePlayer
from spotserve.core import events as ev
from spotserve.core.canonical import canonical_json, digest
from spotserve.core.ids import InstanceId, RequestId
from spotserve.core.load import LOAD_PERIOD_S, LoadWindow
from spotserve.core.loop import run as run_loop
from spotserve.core.options import RunOptions
from spotserve.core.plan import CopyWeights, LoadWeights, Plan
from spotserve.core.ports import ChoiceDelta, NewRequest, Progress, RequestView
from spotserve.core.service import service_state
from spotserve.core.snapshot import RequestProgress, Snapshot
from spotserve.core.spec import ServingSpec
from spotserve.core.state import world_of
from spotserve.core.status import service_status
from spotserve.core.verdict import findings_of
from spotserve.errors import NotServingError, PlanRefusedError, QueueFullError, UnknownInstanceError
from spotserve.log import configure_logging
from spotserve.store.journal import EntryJournal
from spotserve.store.ledger import Owner
from spotserve.store.state_dir import StateDir

REJOIN_S = 8.0
"""How long a restarted coordinator waits for the workers of its predecessor."""
EXPIRE_PERIOD_S = 60.0
SNAPSHOT_ENTRIES = 2000


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
    inputs = read_inputs(options, progress)
    with inputs.listener, StateDir(Path(options.state_dir), fresh=options.fresh) as state_dir:
        return asyncio.run(_run(deploy(options, inputs, state_dir, progress)))


async def _run(deployment: Deployment) -> int:
    return await Daemon(deployment, await assemble(deployment)).run()


class Daemon:
    """A running service: the front door and the administration of one controller and its world."""

    def __init__(self, deployment: Deployment, parts: Parts) -> None:
        self.options = deployment.options
        self.spec = parts.spec
        self.player: TracePlayer | None = None
        self.url = ""
        self._inputs = deployment.inputs
        self._progress = deployment.progress
        self._controller = parts.controller
        self._journal = parts.journal
        self._ledger = parts.ledger
        self._world = parts.world
        self._switchboard = parts.switchboard
        self._forkserver = parts.forkserver
        self._planner = parts.planner
        self._continued = parts.continued
        self._load = LoadWindow()
        self._submitting = 0
        self._num_signals = 0
        if deployment.inputs.trace is not None:
            last_at_s = parts.journal.last_at_s
            played_s = last_at_s - parts.controller.state.served_at_s
            away_s = parts.began_s - last_at_s
            self.player = TracePlayer(deployment.inputs.trace, self, played_s=played_s, away_s=away_s)

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
        while True:
            await asyncio.sleep(LOAD_PERIOD_S)
            now_s = time.monotonic()
            load_rps = self._load.news(now_s) if self.ready else None
            if load_rps is not None:
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
        self._load.arrived(time.monotonic(), len(requests))

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
        await self._world.tell(ev.LoadSampled(at_s=self._world.at_s(), load_rps=load_rps, told=True))

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
        # A large plan takes the checker a while, in which heartbeats go on and the world may change.
        findings = await asyncio.to_thread(findings_of, plan, daemon_epoch=state.epoch)
        if findings:
            raise PlanRefusedError(f"plan refused: {findings[0]}", hint="run `spotserve verify` for all findings")
        is_current = plan.snapshot_digest == digest(world) and plan.spec_digest == digest(self.spec)
        if not is_current or self._controller.state.epoch != state.epoch:
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


async def _first_end(vital: Sequence[asyncio.Task[None]], others: Sequence[asyncio.Task[None]]) -> None:
    """Wait until one of the vital tasks ends, or any task fails: a relay that died unseen would hang every request."""
    waiting = {*vital, *others}
    while waiting:
        done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
        if any(task in vital for task in done):
            return


def _model_info(spec: ServingSpec, inputs: Inputs) -> ModelInfo:
    return ModelInfo(
        name=inputs.served_name,
        vocab_size=spec.model.vocab_size,
        max_model_len=spec.limits.max_model_len,
        created_unix_s=int(time.time()),
        defaults=inputs.defaults,
    )
