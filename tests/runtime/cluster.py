"""A coordinator for tests: switchboard, forkserver, and the commands that a plan's steps become. It has no policy."""

from __future__ import annotations

import asyncio
import os
import secrets
import signal
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import psutil

from spotserve.core.ids import GpuId, ReplicaId, RequestId, instance_of
from spotserve.core.plan import KvRoute
from spotserve.core.sampling import SamplingParameters
from spotserve.core.slices import kv_head_range, layer_split, shard_slices, stage_shard
from spotserve.core.spec import LatencyPoint, Limits, ModelSpec, Profile, ServingSpec
from spotserve.core.wire import (
    AbortCommand,
    ActivateCommand,
    AdmitCommand,
    ChoiceContent,
    ChoicePosition,
    CloseCommand,
    Command,
    CopyKvCommand,
    CopyKvDeltaCommand,
    CopyWeightsCommand,
    Durable,
    Evicted,
    GrantCommand,
    JoinGroupCommand,
    LoadWeightsCommand,
    ProbeCommand,
    QuiesceCommand,
    Register,
    ReleaseCommand,
    ReplicaBroken,
    Reply,
    RequestContent,
    ReserveCommand,
    ResumeCommand,
    SelfNotice,
    Shutdown,
    Tokens,
    Welcome,
)
from spotserve.runtime.forkserver_client import ForkedProcess, ForkServer
from spotserve.runtime.switchboard import Connected, Disconnected, Received, Switchboard

TIMEOUT_S = 60.0


def serving_spec(model: ModelSpec) -> ServingSpec:
    """A spec around a model; the profile's numbers are not used by workers."""
    profile = Profile(
        name="test",
        source="made up",
        device="cpu",
        latencies=(LatencyPoint(tokens=1, tensor=1, layer_ms=1.0),),
        link_bytes_per_s=1e9,
        storage_bytes_per_s=1e9,
    )
    return ServingSpec(model=model, profile=profile, limits=Limits(max_model_len=model.max_model_len))


@dataclass
class PlacedReplica:
    """A replica of the test: P x M workers."""

    id: ReplicaId
    generation: int
    pipeline: int
    tensor: int
    workers: tuple[GpuId, ...]
    model: ModelSpec

    def positions(self) -> list[tuple[GpuId, int, int]]:
        """(worker, stage, rank) in mesh rank order."""
        return [(worker, *divmod(index, self.tensor)) for index, worker in enumerate(self.workers)]

    def layers(self, stage: int) -> tuple[int, int]:
        """The layers of a stage."""
        return layer_split(self.model.num_layers, self.pipeline)[stage]

    def kv_heads(self, rank: int) -> tuple[int, int]:
        """The kv heads of a rank."""
        return kv_head_range(self.model, tensor=self.tensor, rank=rank)

    @property
    def leader(self) -> GpuId:
        """The worker that schedules."""
        return self.workers[0]


@dataclass
class Stream:
    """What a ledger would hold of one choice."""

    token_ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    sources: list[tuple[str, int]] = field(default_factory=list)


class Cluster:
    """Workers, commands to them, and the tokens that they send."""

    def __init__(self, spec: ServingSpec, model_path: Path, log_dir: Path, forkserver: ForkServer) -> None:
        self.spec = spec
        self.model_path = model_path
        self.log_dir = log_dir
        self.forkserver = forkserver
        self.secret = secrets.token_hex(16)
        self.term = 1
        self.journal = "first"
        self.port = 0
        self.orphan_timeout_s = 20.0
        self.durable_cap: int | None = None
        self.workers: dict[GpuId, Register] = {}
        self.processes: dict[str, ForkedProcess] = {}
        self.streams: dict[tuple[RequestId, int], Stream] = {}
        self.evictions: list[Evicted] = []
        self.broken: list[ReplicaBroken] = []
        self.notices: list[GpuId] = []
        self.prompts: dict[RequestId, RequestContent] = {}
        self.changed = asyncio.Condition()
        self._ids = count()
        self._pump: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Listen for workers."""
        self.switchboard = Switchboard(secret=self.secret, term=self.term, greet=self.greet)
        await self.switchboard.start("127.0.0.1", self.port)
        self.port = self.switchboard.port
        self._pump = asyncio.create_task(self._read_events())

    async def stop(self) -> None:
        """Stop listening; workers live on."""
        assert self._pump is not None
        self._pump.cancel()
        await asyncio.gather(self._pump, return_exceptions=True)
        await self.switchboard.stop()
        self.workers.clear()

    def greet(self, register: Register) -> Welcome:
        """Everybody is welcome."""
        return Welcome(
            term=self.term,
            spec=self.spec,
            model_path=str(self.model_path),
            journal=self.journal,
            orphan_timeout_s=self.orphan_timeout_s,
        )

    async def _read_events(self) -> None:
        while True:
            event = await self.switchboard.events.get()
            async with self.changed:
                match event:
                    case Connected():
                        self.workers[event.worker] = event.register
                    case Disconnected():
                        self.workers.pop(event.worker, None)
                    case Received():
                        self._take(event)
                self.changed.notify_all()

    def _take(self, event: Received) -> None:
        match event.message:
            case Tokens():
                self._append(event.worker, event.message)
            case Evicted():
                self.evictions.append(event.message)
            case ReplicaBroken():
                self.broken.append(event.message)
            case SelfNotice():
                self.notices.append(event.worker)

    def _append(self, worker: GpuId, tokens: Tokens) -> None:
        durable = []
        for run in tokens.runs:
            stream = self.streams.setdefault((run.request, run.choice), Stream())
            assert run.position <= len(stream.token_ids), "a gap in a stream"
            fresh = run.token_ids[len(stream.token_ids) - run.position :]
            assert stream.token_ids[run.position :] == list(run.token_ids[: len(run.token_ids) - len(fresh)])
            stream.token_ids += fresh
            stream.sources += [(tokens.replica, tokens.generation)] * len(fresh)
            stream.finish_reason = run.finish_reason or stream.finish_reason
            durable.append((run.request, run.choice, self._durable(stream)))
        self.switchboard.send(worker, Durable(term=self.term, positions=tuple(durable)))

    def _durable(self, stream: Stream) -> int:
        return len(stream.token_ids) if self.durable_cap is None else min(self.durable_cap, len(stream.token_ids))

    def cap(self, durable_cap: int | None) -> None:
        """Report at most so many tokens of a choice as durable: it then stands still 64 tokens later."""
        self.durable_cap = durable_cap
        positions = tuple((*name, self._durable(stream)) for name, stream in self.streams.items())
        for worker in self.workers:
            self.switchboard.send(worker, Durable(term=self.term, positions=positions))

    async def until(self, condition: Any, timeout_s: float = TIMEOUT_S) -> None:
        """Wait for something to become true."""
        async with asyncio.timeout(timeout_s), self.changed:
            await self.changed.wait_for(condition)

    # Workers

    async def launch(self, num_instances: int, *, gpus: int = 1, memory: str = "64MiB", env: Any = None) -> None:
        """Fork instances i0, i1, … and wait until all their GPUs have registered."""
        first = len(self.processes)
        for index in range(first, first + num_instances):
            self.processes[f"i{index}"] = self.fork(f"i{index}", gpus=gpus, memory=memory, env=env)
        await self.until(lambda: len(self.workers) == len(self.processes) * gpus)

    def fork(
        self, instance: str, *, gpus: int = 1, memory: str = "64MiB", env: Any = None, secret: str | None = None
    ) -> ForkedProcess:
        """Fork one instance and do not wait."""
        secret_file = self.log_dir / f"secret-{instance}"
        secret_file.write_text(secret or self.secret)
        arguments = {
            "--coordinator": f"127.0.0.1:{self.port}",
            "--secret-file": str(secret_file),
            "--instance": instance,
            "--gpus": str(gpus),
            "--gpu-memory": memory,
            "--orphan-timeout": str(self.orphan_timeout_s),
        }
        flags = [part for pair in arguments.items() for part in pair]
        return self.forkserver.fork(flags, log=self.log_dir / f"{instance}.log", env=env)

    async def exit_status(self, process: ForkedProcess) -> int:
        """Wait for the end of a process that was forked."""
        async with asyncio.timeout(TIMEOUT_S):
            while (status := self.forkserver.exit_status(process.pid)) is None:
                await asyncio.sleep(0.02)
            return status

    def kill(self, worker: GpuId) -> None:
        """SIGKILL the worker's instance."""
        os.killpg(self.processes[instance_of(worker)].pid, signal.SIGKILL)

    def kill_all(self) -> None:
        """SIGKILL everything that is left."""
        for process in self.processes.values():
            if psutil.pid_exists(process.pid) and psutil.Process(process.pid).create_time() == process.started_at:
                os.killpg(process.pid, signal.SIGKILL)

    # Commands

    async def ask(self, worker: GpuId, command: Command) -> Reply:
        """The reply, whatever it is."""
        async with asyncio.timeout(TIMEOUT_S):
            return await self.switchboard.command(worker, command)

    async def do(self, worker: GpuId, kind: type[Command], **fields: Any) -> dict[str, Any]:
        """The result of a command that must succeed."""
        reply = await self.ask(worker, kind(term=self.term, command=f"c{next(self._ids)}", **fields))
        assert reply.ok, f"{worker} {kind.__name__}: {reply.error}"
        return reply.result

    async def reserve(self, replica: PlacedReplica, *, kv_blocks: int = 64, max_running: int = 8) -> None:
        """Every rank takes its memory."""
        for worker, stage, rank in replica.positions():
            shard = stage_shard(replica.model, layers=replica.layers(stage), tensor=replica.tensor, rank=rank)
            await self.do(
                worker,
                ReserveCommand,
                epoch=replica.generation,
                replica=replica.id,
                generation=replica.generation,
                stage=stage,
                rank=rank,
                pipeline=replica.pipeline,
                tensor=replica.tensor,
                shard=shard,
                kv_blocks=kv_blocks,
                max_running=max_running,
            )

    async def load(self, replica: PlacedReplica) -> int:
        """Every rank reads its slices from the folder; returns the bytes."""
        results = await asyncio.gather(
            *(
                self.do(
                    worker,
                    LoadWeightsCommand,
                    epoch=replica.generation,
                    replica=replica.id,
                    generation=replica.generation,
                    slices=shard_slices(
                        replica.model,
                        stage_shard(replica.model, layers=replica.layers(stage), tensor=replica.tensor, rank=rank),
                    ),
                )
                for worker, stage, rank in replica.positions()
            )
        )
        return sum(result["bytes"] for result in results)

    async def copy_weights(self, replica: PlacedReplica, source: GpuId) -> int:
        """Every rank but the source pulls all its slices from one worker that holds the whole model."""
        total = 0
        for worker, stage, rank in replica.positions():
            shard = stage_shard(replica.model, layers=replica.layers(stage), tensor=replica.tensor, rank=rank)
            grant = await self.grant(source, replica.generation)
            result = await self.do(
                worker,
                CopyWeightsCommand,
                epoch=replica.generation,
                replica=replica.id,
                generation=replica.generation,
                source=source,
                source_address=self.workers[source].transfer_address,
                slices=shard_slices(replica.model, shard),
                **grant,
            )
            total += result["bytes"]
        return total

    async def grant(self, source: GpuId, epoch: int) -> dict[str, str]:
        """Let somebody pull from `source`; the grant's fields of a copy command."""
        name, secret = f"g{next(self._ids)}", secrets.token_hex(16)
        await self.do(source, GrantCommand, epoch=epoch, grant=name, secret=secret, expires_s=60.0)
        return {"grant": name, "secret": secret}

    async def join(self, replica: PlacedReplica) -> None:
        """Open the mesh."""
        secret = secrets.token_hex(16)
        await asyncio.gather(
            *(
                self.do(
                    worker,
                    JoinGroupCommand,
                    epoch=replica.generation,
                    replica=replica.id,
                    generation=replica.generation,
                    addresses=tuple(self.workers[other].mesh_address for other in replica.workers),
                    secret=secret,
                )
                for worker in replica.workers
            )
        )

    async def activate(self, replica: PlacedReplica, requests: Sequence[RequestContent] = ()) -> None:
        """Serve as the new generation."""
        await asyncio.gather(
            *(
                self.do(
                    worker,
                    ActivateCommand,
                    epoch=replica.generation,
                    replica=replica.id,
                    generation=replica.generation,
                    requests=tuple(requests) if worker == replica.leader else (),
                )
                for worker in replica.workers
            )
        )

    async def place(
        self,
        pipeline: int,
        tensor: int,
        workers: Sequence[str],
        *,
        name: str = "r1",
        generation: int = 1,
        kv_blocks: int = 64,
        max_running: int = 8,
    ) -> PlacedReplica:
        """A serving replica with weights from the folder."""
        replica = self.replica(pipeline, tensor, workers, name=name, generation=generation)
        await self.reserve(replica, kv_blocks=kv_blocks, max_running=max_running)
        await self.load(replica)
        await self.join(replica)
        await self.activate(replica)
        return replica

    def replica(
        self, pipeline: int, tensor: int, workers: Sequence[str], *, name: str = "r1", generation: int = 1
    ) -> PlacedReplica:
        """A replica on paper."""
        gpus = tuple(GpuId(f"{worker}/0" if "/" not in worker else worker) for worker in workers)
        return PlacedReplica(ReplicaId(name), generation, pipeline, tensor, gpus, self.spec.model)

    async def admit(
        self,
        replica: PlacedReplica,
        name: str,
        prompt_ids: Sequence[int],
        *,
        max_tokens: int = 32,
        num_choices: int = 1,
        **sampling: Any,
    ) -> None:
        """Run a request; greedy and without EOS unless said otherwise."""
        parameters = SamplingParameters(
            **{"temperature": 0.0, "seed": 7, "max_tokens": max_tokens, "ignore_eos": True, **sampling}
        )
        content = RequestContent(
            request=RequestId(name),
            arrival_index=len(self.prompts),
            prompt_ids=tuple(prompt_ids),
            sampling=parameters,
            choices=tuple(ChoiceContent(choice=choice, kv_generation=0) for choice in range(num_choices)),
        )
        self.prompts[content.request] = content
        await self.do(
            replica.leader,
            AdmitCommand,
            replica=replica.id,
            generation=replica.generation,
            requests=(content,),
        )

    async def finished(self, *names: str, num_choices: int = 1) -> None:
        """Wait until requests ended."""
        wanted = [(name, choice) for name in names for choice in range(num_choices)]
        await self.until(lambda: all(self.stream(name, choice).finish_reason for name, choice in wanted))

    def tokens(self, name: str, choice: int = 0) -> list[int]:
        """What came of a choice."""
        return self.stream(name, choice).token_ids

    def stream(self, name: str, choice: int = 0) -> Stream:
        """What came of a choice, and from where."""
        return self.streams.setdefault((RequestId(name), choice), Stream())

    async def probe(self, worker: GpuId) -> dict[str, Any]:
        """Holdings and progress."""
        return await self.do(worker, ProbeCommand)

    async def quiesce(self, replica: PlacedReplica) -> list[ChoicePosition]:
        """Positions of the open choices once nothing is in flight."""
        result = await self.do(
            replica.leader,
            QuiesceCommand,
            epoch=replica.generation + 1,
            replica=replica.id,
            generation=replica.generation,
        )
        return [ChoicePosition.model_validate(position) for position in result["positions"]]

    async def resume(self, replica: PlacedReplica) -> None:
        """Go on."""
        await self.do(replica.leader, ResumeCommand, replica=replica.id, generation=replica.generation)

    async def release(self, replica: PlacedReplica) -> None:
        """Free a generation on all its ranks."""
        for worker in replica.workers:
            await self.do(worker, ReleaseCommand, replica=replica.id, generation=replica.generation)

    async def abort(self, replica: PlacedReplica) -> None:
        """Forget what was prepared for a generation."""
        for worker in replica.workers:
            await self.do(worker, AbortCommand, epoch=replica.generation)

    async def close(self, replica: PlacedReplica, name: str, choice: int | None = None) -> None:
        """Cancel."""
        await self.do(
            replica.leader,
            CloseCommand,
            replica=replica.id,
            generation=replica.generation,
            request=RequestId(name),
            choice=choice,
        )

    def contents(self, positions: Sequence[ChoicePosition]) -> list[RequestContent]:
        """The moved requests with what the ledger (the test's streams) has of them."""
        by_request: dict[RequestId, list[ChoicePosition]] = {}
        for position in positions:
            by_request.setdefault(position.request, []).append(position)
        return [
            self.prompts[request].model_copy(
                update={
                    "choices": tuple(
                        ChoiceContent(
                            choice=position.choice,
                            kv_generation=position.kv_generation,
                            token_ids=tuple(
                                self.streams[(request, position.choice)].token_ids
                                if (request, position.choice) in self.streams
                                else ()
                            ),
                            kv_tokens=position.kv_tokens,
                        )
                        for position in choices
                    )
                }
            )
            for request, choices in by_request.items()
        ]

    # KV

    def rectangles(self, old: PlacedReplica, new: PlacedReplica) -> list[tuple[GpuId, GpuId, KvRoute]]:
        """(source, destination, rectangle) that together cover each target rank's KV once."""
        found = []
        for destination, stage, rank in new.positions():
            covered: set[tuple[int, int]] = set()
            for source, old_stage, old_rank in old.positions():
                layers = _common(new.layers(stage), old.layers(old_stage))
                heads = _common(new.kv_heads(rank), old.kv_heads(old_rank))
                if layers is None or heads is None:
                    continue
                heads = (max([heads[0], *(h + 1 for layer, h in covered if layer == layers[0])]), heads[1])
                if heads[0] >= heads[1]:
                    continue
                covered |= {(layer, head) for layer in range(*layers) for head in range(*heads)}
                route = KvRoute(from_replica=old.id, to_replica=new.id, layers=layers, kv_heads=heads)
                found.append((source, destination, route))
        return found

    async def copy_kv(self, old: PlacedReplica, new: PlacedReplica) -> int:
        """Follow every rectangle; returns the bytes when all have caught up."""
        self._routes = []
        for number, (source, destination, route) in enumerate(self.rectangles(old, new)):
            grant = await self.grant(source, new.generation)
            common = {
                "epoch": new.generation,
                "source": source,
                "source_address": self.workers[source].transfer_address,
                "route": route,
                "source_generation": old.generation,
                "target_generation": new.generation,
                **grant,
            }
            self._routes.append((destination, f"s{number}", common))
        results = await asyncio.gather(
            *(self.do(worker, CopyKvCommand, step=step, **common) for worker, step, common in self._routes)
        )
        return sum(result["bytes"] for result in results)

    def drop_route(self) -> None:
        """Forget the last rectangle, as if its delta never ran."""
        self._routes.pop()

    async def copy_kv_delta(self, positions: Sequence[ChoicePosition]) -> tuple[int, list[Any]]:
        """Bring the rest; returns all bytes and what is missing."""
        results = await asyncio.gather(
            *(
                self.do(
                    worker,
                    CopyKvDeltaCommand,
                    step=f"d{step}",
                    follows=step,
                    manifest=tuple(positions),
                    **common,
                )
                for worker, step, common in self._routes
            )
        )
        return sum(result["bytes"] for result in results), [item for result in results for item in result["missing"]]

    async def shut_down(self) -> None:
        """Tell every worker to exit and wait until they did."""
        for worker in list(self.workers):
            self.switchboard.send(worker, Shutdown(term=self.term))
        await self.until(lambda: not self.workers)


def _common(first: tuple[int, int], second: tuple[int, int]) -> tuple[int, int] | None:
    start, stop = max(first[0], second[0]), min(first[1], second[1])
    return (start, stop) if start < stop else None


@asynccontextmanager
async def running_cluster(
    spec: ServingSpec, model_path: Path, log_dir: Path, forkserver: ForkServer
) -> AsyncIterator[Cluster]:
    """A cluster without workers; whatever it launches is dead afterwards."""
    cluster = Cluster(spec, model_path, log_dir, forkserver)
    await cluster.start()
    try:
        yield cluster
    finally:
        cluster.kill_all()
        await cluster.stop()
