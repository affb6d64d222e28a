"""Turns a plan's steps into commands to workers and their replies into events.

One step, one outcome: `StepDone`, `StepFailed`, or for a quiesce `Quiesced`. Secrets for transfers are minted here per
(plan, source, destination), go to the two workers alone and are never in a file or log.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from spotserve.core import commands as cmd
from spotserve.core import events as ev
from spotserve.core import wire
from spotserve.core.ids import GpuId, ReplicaId
from spotserve.core.plan import (
    Activate,
    CopyKv,
    CopyKvDelta,
    CopyWeights,
    JoinGroup,
    LoadWeights,
    Plan,
    Quiesce,
    Release,
    Reserve,
)
from spotserve.core.slices import stage_shard
from spotserve.core.snapshot import Replica
from spotserve.errors import InvariantError
from spotserve.log import get_logger

GRANT_EXPIRES_S = 600.0
OVERDUE_S = 30.0
"""A worker that has not answered a step for so long is named in the log, again and again."""

log = get_logger("steps")


class Workers(Protocol):
    """The coordinator's line to its workers."""

    async def command(self, worker: GpuId, command: wire.Command) -> wire.Reply:
        """The reply to a command."""

    def connected(self) -> dict[GpuId, wire.Register]:
        """Workers that are connected, with their addresses."""


class StepError(Exception):
    """A worker refused or gave up a step; caught here and told as `StepFailed`."""


class StepExecutor:
    """Executes the steps of the plans it was told of."""

    def __init__(
        self,
        workers: Workers,
        *,
        term: int,
        clock: Callable[[], float],
        contents: Callable[[Sequence[cmd.Admission]], tuple[wire.RequestContent, ...]],
    ) -> None:
        self._workers = workers
        self._term = term
        self._clock = clock
        self._contents = contents
        self._plans: dict[int, Plan] = {}
        self._secrets: dict[tuple[int, str, str], str] = {}

    def begin(self, plan: Plan) -> None:
        """Keep a plan for the steps to come."""
        self._plans[plan.epoch.to] = plan

    def finish(self, epoch: int) -> None:
        """Forget a plan and its secrets."""
        self._plans.pop(epoch, None)
        self._secrets = {key: secret for key, secret in self._secrets.items() if key[0] != epoch}

    def plan(self, epoch: int) -> Plan | None:
        """The plan of an epoch that is under way."""
        return self._plans.get(epoch)

    async def execute(self, command_id: str, command: cmd.ExecuteStep) -> ev.Event:
        """Carry out one step; whatever happens to the workers comes back as its event."""
        step = command.step
        try:
            if isinstance(step, Quiesce):
                return await self._quiesce(command_id, command.epoch, step)
            result = await self._outcome(command_id, command)
        except StepError as error:
            return ev.StepFailed(at_s=self._clock(), epoch=command.epoch, step=step.id, error=str(error))
        missing = tuple((request, choice) for request, choice in result.get("missing", ()))
        at_s = self._clock()
        age_s = result.get("first_byte_age_s")
        return ev.StepDone(
            at_s=at_s,
            epoch=command.epoch,
            step=step.id,
            bytes=result.get("bytes", 0),
            missing=missing,
            # Late by the reply's way here, never early.
            result={} if age_s is None else {"first_byte_at_s": max(0.0, at_s - age_s)},
        )

    async def _outcome(self, command_id: str, command: cmd.ExecuteStep) -> dict[str, Any]:
        step, epoch = command.step, command.epoch
        if isinstance(step, Reserve):
            return await self._reserve(command_id, epoch, step)
        if isinstance(step, CopyWeights):
            return await self._copy_weights(command_id, epoch, step)
        if isinstance(step, LoadWeights):
            load = wire.LoadWeightsCommand(
                **self._head(command_id),
                epoch=epoch,
                replica=step.replica,
                generation=self._generation(epoch, step.replica),
                slices=step.slices,
            )
            return await self._ask(step.workers[0], load)
        if isinstance(step, CopyKv):
            return await self._copy_kv(command_id, epoch, step)
        if isinstance(step, CopyKvDelta):
            return await self._copy_kv_delta(command_id, epoch, step, command.manifest)
        if isinstance(step, JoinGroup):
            return await self._join(command_id, epoch, step)
        if isinstance(step, Activate):
            return await self._activate(command_id, epoch, step, command.admissions)
        if isinstance(step, Release):
            return await self._release(command_id, epoch, step)
        raise InvariantError(f"step {step.id} of kind {step.kind} has no executor")

    async def _reserve(self, command_id: str, epoch: int, step: Reserve) -> dict[str, Any]:
        plan = self._plan(epoch)
        replica = _replica(plan, step.replica)
        shard = stage_shard(
            plan.spec.model, layers=replica.stages[step.stage].layers, tensor=replica.tensor, rank=step.rank
        )
        reserve = wire.ReserveCommand(
            **self._head(command_id),
            epoch=epoch,
            replica=step.replica,
            generation=step.generation,
            stage=step.stage,
            rank=step.rank,
            pipeline=replica.pipeline,
            tensor=replica.tensor,
            shard=shard,
            kv_blocks=replica.kv_blocks,
            max_running=replica.max_running,
            with_weights=plan.mode == "live",
        )
        return await self._ask(step.workers[0], reserve)

    async def _copy_weights(self, command_id: str, epoch: int, step: CopyWeights) -> dict[str, Any]:
        copy = wire.CopyWeightsCommand(
            **self._head(command_id),
            **await self._granted(command_id, epoch, step),
            epoch=epoch,
            replica=step.replica,
            generation=self._generation(epoch, step.replica),
            source=step.source,
            slices=step.slices,
        )
        return await self._ask(step.destination, copy)

    async def _copy_kv(self, command_id: str, epoch: int, step: CopyKv) -> dict[str, Any]:
        copy = wire.CopyKvCommand(
            **self._head(command_id),
            **await self._granted(command_id, epoch, step),
            **self._route(epoch, step),
            epoch=epoch,
            step=step.id,
            source=step.source,
        )
        return await self._ask(step.destination, copy)

    async def _copy_kv_delta(
        self, command_id: str, epoch: int, step: CopyKvDelta, manifest: tuple[wire.ChoicePosition, ...]
    ) -> dict[str, Any]:
        follows = self._plan(epoch).followed[step.id]
        delta = wire.CopyKvDeltaCommand(
            **self._head(command_id),
            **await self._granted(command_id, epoch, step),
            **self._route(epoch, step),
            epoch=epoch,
            step=step.id,
            follows=follows,
            source=step.source,
            manifest=manifest,
        )
        return await self._ask(step.destination, delta)

    async def _join(self, command_id: str, epoch: int, step: JoinGroup) -> dict[str, Any]:
        replica = _replica(self._plan(epoch), step.replica)
        registers = self._workers.connected()
        absent = [gpu for gpu in replica.gpus if gpu not in registers]
        if absent:
            raise StepError(f"worker {absent[0]} is not connected")
        join = wire.JoinGroupCommand(
            **self._head(command_id),
            epoch=epoch,
            replica=step.replica,
            generation=step.generation,
            addresses=tuple(registers[gpu].mesh_address for gpu in replica.gpus),
            secret=self._secret(epoch, "mesh", step.replica),
        )
        return await self._ask_all(replica.gpus, join)

    async def _activate(
        self, command_id: str, epoch: int, step: Activate, admissions: tuple[cmd.Admission, ...]
    ) -> dict[str, Any]:
        replica = _replica(self._plan(epoch), step.replica)
        activate = wire.ActivateCommand(
            **self._head(command_id), epoch=epoch, replica=step.replica, generation=step.generation
        )
        # The followers' loops first: the leader's first descriptor then finds them listening.
        leading = activate.model_copy(update={"requests": self._contents(admissions)})
        others = [gpu for gpu in replica.gpus if gpu != replica.leader]
        await asyncio.gather(self._ask_all(others, activate), self._ask(replica.leader, leading))
        return {}

    async def _release(self, command_id: str, epoch: int, step: Release) -> dict[str, Any]:
        release = wire.ReleaseCommand(
            **self._head(command_id),
            replica=step.replica,
            generation=step.generation,
            slices=None if step.id in self._plan(epoch).last_releases else step.slices,
            kv=step.kv,
            keep_blocks=step.keep_blocks,
        )
        return await self._ask(step.workers[0], release)

    async def _quiesce(self, command_id: str, epoch: int, step: Quiesce) -> ev.Event:
        replica = next(r for r in self._plan(epoch).snapshot.world.replicas if r.id == step.replica)
        quiesce = wire.QuiesceCommand(
            **self._head(command_id), epoch=epoch, replica=step.replica, generation=replica.generation
        )
        result = await self._ask(replica.leader, quiesce)
        return ev.Quiesced(
            at_s=self._clock(),
            epoch=epoch,
            step=step.id,
            replica=step.replica,
            generation=replica.generation,
            positions=tuple(wire.ChoicePosition.model_validate(p) for p in result["positions"]),
        )

    # Parts of commands

    def _head(self, command_id: str) -> dict[str, Any]:
        return {"term": self._term, "command": command_id}

    async def _granted(self, command_id: str, epoch: int, step: CopyWeights | CopyKv | CopyKvDelta) -> dict[str, Any]:
        """The source is told to expect the destination; where to dial and what to prove."""
        if step.source == step.destination:
            return {"source_address": "", "grant": "", "secret": ""}
        secret = self._secret(epoch, step.source, step.destination)
        name = f"{epoch}:{step.source}:{step.destination}"
        grant = wire.GrantCommand(
            term=self._term,
            command=f"{command_id}.grant",
            epoch=epoch,
            grant=name,
            secret=secret,
            expires_s=GRANT_EXPIRES_S,
        )
        await self._ask(step.source, grant)
        register = self._workers.connected().get(step.source)
        if register is None:
            raise StepError(f"worker {step.source} is not connected")
        return {"source_address": register.transfer_address, "grant": name, "secret": secret}

    def _route(self, epoch: int, step: CopyKv | CopyKvDelta) -> dict[str, Any]:
        plan = self._plan(epoch)
        source = next(r for r in plan.snapshot.world.replicas if r.id == step.route.from_replica)
        return {
            "route": step.route,
            "source_generation": source.generation,
            "target_generation": self._generation(epoch, step.route.to_replica),
        }

    def _secret(self, epoch: int, source: str, destination: str) -> str:
        return self._secrets.setdefault((epoch, source, destination), secrets.token_hex(32))

    def _plan(self, epoch: int) -> Plan:
        plan = self._plans.get(epoch)
        if plan is None:
            # Its run was aborted while the step waited for a worker: nothing of it may reach one any more.
            raise StepError(f"the plan of epoch {epoch} is not under way any more")
        return plan

    def _generation(self, epoch: int, replica: ReplicaId) -> int:
        return _replica(self._plan(epoch), replica).generation

    async def _ask(self, worker: GpuId, command: wire.Command) -> dict[str, Any]:
        # One command may go to several workers: the id is told apart by its receiver.
        named = command.model_copy(update={"command": f"{command.command}@{worker}"})
        reply = await self._patiently(worker, named)
        if not reply.ok:
            raise StepError(f"{worker}: {reply.error}")
        return reply.result

    async def _patiently(self, worker: GpuId, command: wire.Command) -> wire.Reply:
        """The reply, however long it takes: a copy may take minutes, but whoever waits should be able to read why."""
        asked = asyncio.ensure_future(self._workers.command(worker, command))
        waited_s = 0.0
        try:
            while not (await asyncio.wait((asked,), timeout=OVERDUE_S))[0]:
                waited_s += OVERDUE_S
                log.warning("step_overdue", worker=worker, command=command.command, waited_s=waited_s)
            return asked.result()
        finally:
            asked.cancel()

    async def _ask_all(self, workers: Sequence[GpuId], command: wire.Command) -> dict[str, Any]:
        results = await asyncio.gather(*(self._ask(w, command) for w in workers), return_exceptions=True)
        for result in results:
            if isinstance(result, BaseException):
                raise result
        return {}


def _replica(plan: Plan, name: ReplicaId) -> Replica:
    return next(replica for replica in plan.target.replicas if replica.id == name)
