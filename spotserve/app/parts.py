"""The parts of a daemon, wired to each other: the controller as the journal leaves it, and every real port."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from dataclasses import dataclass

from spotserve.api.text import StopJudge
from spotserve.app.deployment import Deployment
from spotserve.app.greeting import greeter, welcome_of, worker_args
from spotserve.app.serving_spec import forked_and_measured
from spotserve.cloud.local import LocalCloud
from spotserve.core.canonical import canonical_json
from spotserve.core.controller import Controller
from spotserve.core.gpu_types import type_called
from spotserve.core.replay import moments
from spotserve.core.spec import ServingSpec
from spotserve.core.state import ClusterState
from spotserve.errors import SpotServeError
from spotserve.log import get_logger
from spotserve.runtime.failpoints import failpoint_variables
from spotserve.runtime.forkserver_client import ForkServer
from spotserve.runtime.live_world import LiveWorld
from spotserve.runtime.profiles import write_whole
from spotserve.runtime.switchboard import Switchboard
from spotserve.solvers.planner_process import PlannerProcess
from spotserve.store.journal import EntryJournal, Journal, state_of
from spotserve.store.ledger import Ledger, Owner

log = get_logger("daemon")


@dataclass(frozen=True, slots=True)
class Parts:
    """Everything of a daemon that runs before its first event, but for the workers."""

    spec: ServingSpec
    controller: Controller
    journal: Journal
    ledger: Ledger
    world: LiveWorld
    switchboard: Switchboard
    forkserver: ForkServer
    planner: PlannerProcess
    continued: bool
    """Whether the journal is an earlier coordinator's."""
    began_s: float
    """The journal's time at this start."""


async def assemble(deployment: Deployment) -> Parts:
    """Bring up everything but the workers; nothing is left half-started when this raises."""
    async with contextlib.AsyncExitStack() as undo:
        parts = await _assembled(deployment, undo)
        undo.pop_all()
    return parts


async def _assembled(deployment: Deployment, undo: contextlib.AsyncExitStack) -> Parts:
    options, state_dir = deployment.options, deployment.state_dir
    forkserver, spec = await forked_and_measured(deployment)
    undo.push_async_callback(asyncio.to_thread, forkserver.close)
    opened = state_dir.open_journal(model_digest=spec.model.digest, dtype=spec.model.dtype, now_unix_s=time.time())
    undo.callback(opened.journal.close)
    write_whole(deployment.manifest_path, canonical_json(deployment.manifest))
    controller, began_s = folded(opened.journal, continued=opened.continued)
    spec = _continued_spec(controller, spec)
    ledger = Ledger(state_dir.ledger_path, judge=StopJudge(deployment.inputs.codec), on_failure=_die)
    undo.push_async_callback(asyncio.to_thread, ledger.shutdown)
    planner = PlannerProcess()
    welcome = welcome_of(deployment, spec, journal=opened.journal.identity.incarnation)
    switchboard = Switchboard(secret=state_dir.secret(), term=state_dir.term, greet=greeter(welcome, controller))
    await switchboard.start("127.0.0.1", state_dir.worker_port())
    undo.push_async_callback(switchboard.stop)
    cloud = LocalCloud(
        forkserver,
        log_folder=state_dir.logs_path,
        worker_args=worker_args(deployment, port=switchboard.port),
        gpu_types=[type_called(spec.profile, name) for name in options.gpu_types],
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
    return Parts(
        spec=spec,
        controller=controller,
        journal=opened.journal,
        ledger=ledger,
        world=world,
        switchboard=switchboard,
        forkserver=forkserver,
        planner=planner,
        continued=opened.continued and controller.state.spec is not None,
        began_s=began_s,
    )


def _continued_spec(controller: Controller, spec: ServingSpec) -> ServingSpec:
    """The spec that the journal began with, which stays; the given one for a new journal."""
    begun = controller.state.spec
    if begun is not None and begun != spec:
        log.warning("options_ignored", reason="the journal is continued with what it began with", hint="--fresh")
    return spec if begun is None else begun


def folded(journal: Journal, *, continued: bool) -> tuple[Controller, float]:
    """The controller as the journal leaves it, and the time to go on from.

    Raises StateDirError with the position of an entry that cannot follow those before it.
    """
    if not continued:
        return Controller(), 0.0
    base = journal.latest_snapshot()
    state = ClusterState() if base is None else state_of(journal.path, base)
    sequence = 0 if base is None else base.sequence
    for moment in moments(state, EntryJournal(journal).read(sequence + 1 if sequence else None)):
        state, sequence = moment.after, moment.entry.sequence
    controller = Controller(state, sequence=sequence)
    # Deadlines go on while no coordinator lives; what fell due meanwhile is acted on at once.
    return controller, max(journal.last_at_s, time.time() - journal.identity.created_unix_s)


def _die(error: SpotServeError) -> None:
    """A store that cannot write is the end: nothing may be answered that is not durable."""
    log.error("store_failed", error=error.message)
    os._exit(1)
