"""A scenario under a policy: the daemon's own loop and controller on a simulated cluster, and what came of it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Coroutine, Sequence
from itertools import groupby

from spotserve.core.canonical import canonical_json
from spotserve.core.controller import Controller, Entry
from spotserve.core.ids import InstanceId
from spotserve.core.loop import JournalPort, run
from spotserve.core.service import service_state
from spotserve.core.state import ClusterState
from spotserve.core.trace import Trace
from spotserve.errors import InvariantError
from spotserve.sim.cluster import SimulatedCluster, Solve
from spotserve.sim.durations import Phases
from spotserve.sim.measures import (
    MigrationLine,
    Moment,
    Requests,
    RunResult,
    Spread,
    cost_of,
    keeps,
    latency_of,
    quantiles,
    stall_of,
    tpot_of,
    ttft_of,
)
from spotserve.sim.scenario import Scenario

Progress = Callable[[float], None]
"""Told the virtual time every now and then."""

PROGRESS_PERIOD_S = 1.0


class SimulatedJournal:
    """Keeps nothing but the digest of all entries, and the moments at which the cluster changed."""

    def __init__(self, controller: Controller, further: JournalPort | None, progress: Progress) -> None:
        self.moments: list[Moment] = []
        self.run_begun_at_s: dict[int, float] = {}
        """By the epoch of each migration."""
        self._controller = controller
        self._further = further
        self._progress = progress
        self._shown_at_s = 0.0
        self._hash = hashlib.sha256()
        self._seen: tuple[object, object, Moment] | None = None

    @property
    def digest(self) -> str:
        """Of every entry so far."""
        return f"sha256:{self._hash.hexdigest()}"

    def _moment(self) -> Moment:
        """The controller's state as pictures show it; fleet and layout are looked at only where they are new."""
        state, known = self._controller.state, self._seen
        if known is None or known[0] is not state.instances or known[1] is not state.replicas:
            self._seen = (state.instances, state.replicas, moment_of(state))
            return self._seen[2]
        return known[2].model_copy(update={"at_s": round(state.at_s, 6), "service": service_state(state)})

    async def append(self, entries: Sequence[Entry]) -> None:
        """Take note of entries."""
        for entry in entries:
            self._hash.update(canonical_json(entry).encode())
        moment = self._moment()
        if self.moments and (self.moments[-1].at_s, self.moments[-1].service) == (moment.at_s, moment.service):
            self.moments.pop()  # It held for no time.
        if not self.moments or self.moments[-1].model_copy(update={"at_s": moment.at_s}) != moment:
            self.moments.append(moment)
        for migration in self._controller.state.migrations[len(self.run_begun_at_s) :]:
            self.run_begun_at_s[migration.epoch] = moment.at_s
        if moment.at_s - self._shown_at_s >= PROGRESS_PERIOD_S:
            self._shown_at_s = moment.at_s
            self._progress(moment.at_s)
        if self._further is not None:
            await self._further.append(entries)


def moment_of(state: ClusterState) -> Moment:
    """What a picture shows of a state."""
    shapes = sorted((replica.pipeline, replica.tensor) for replica in state.serving())
    parts = [f"({len(list(same))},{pipeline},{tensor})" for (pipeline, tensor), same in groupby(shapes)]
    there = [one for one in state.instances.values() if one.state in ("ready", "doomed")]
    return Moment(
        at_s=round(state.at_s, 6),
        service=service_state(state),
        instances=len(there),
        gpus_there=sum(len(one.gpus) for one in there),
        gpus=sum(len(replica.gpus) for replica in state.serving()),
        layout=" ".join(parts) or "-",
    )


def simulate(
    scenario: Scenario,
    policy: str,
    solve: Solve,
    *,
    phases: Phases | None = None,
    journal: JournalPort | None = None,
    progress: Progress = lambda at_s: None,
    jumps: bool = True,
) -> RunResult:
    """Run a scenario under a policy.

    `phases` times static batches as somebody measured them; without `jumps` every iteration is an event of its own.
    """
    played = scenario.of_policy(policy)
    cluster = SimulatedCluster(played.spec, played.hardware, solve, phases=phases, jumps=jumps)
    _play_trace(cluster, played.trace)
    _play_workload(cluster, played)
    cluster.until_s = played.duration_s + played.drain_s
    controller = Controller()
    noted = SimulatedJournal(controller, journal, progress)
    run_through(run(cluster, controller, noted))
    return _result(played, policy, cluster, controller.state, noted)


def run_through(coroutine: Coroutine[None, None, None]) -> None:
    """Run what never waits: no event loop is needed, and one would keep a Ctrl-C to itself until the end."""
    try:
        coroutine.send(None)
    except StopIteration:
        return
    coroutine.close()
    raise InvariantError("the simulation waits for something that is not simulated")


def _play_trace(cluster: SimulatedCluster, trace: Trace) -> None:
    """The instances that the trace has at 0 are there; a later one is asked for early enough to be ready then."""
    first = [event for event in trace.events if event.kind == "add" and event.at_s == 0]
    ondemand = [instance for event in first if event.market == "ondemand" for instance in event.instances]
    gpu_types = {instance: event.gpu_type for event in first for instance in event.instances}
    cluster.begin(len(gpu_types), ondemand=ondemand, gpu_types=gpu_types)
    for event in trace.events:
        for instance in event.instances:
            if event.kind == "add" and event.at_s > 0:
                cluster.add(event.at_s, instance, market=event.market, gpu_type=event.gpu_type)
            elif event.kind == "notice":
                cluster.notice(event.at_s, InstanceId(instance), 30.0 if event.grace_s is None else event.grace_s)
            elif event.kind == "kill":
                cluster.kill(event.at_s, InstanceId(instance))
        if event.kind == "load" and event.rps is not None:
            cluster.load(event.at_s, event.rps)


def _play_workload(cluster: SimulatedCluster, scenario: Scenario) -> None:
    if scenario.known_load_rps is not None:
        cluster.know_load(scenario.known_load_rps)
    for index, arrival in enumerate(scenario.arrivals()):
        cluster.request(
            f"q{index}",
            arrival.at_s,
            prompt_tokens=arrival.prompt_tokens,
            max_tokens=arrival.output_tokens,
            output_tokens=arrival.output_tokens,
        )


def _result(
    scenario: Scenario, policy: str, cluster: SimulatedCluster, state: ClusterState, journal: SimulatedJournal
) -> RunResult:
    cluster.settle()
    records = list(cluster.ledger.records.values())
    end_s = cluster.agenda.now_s
    tokens = sum(record.num_tokens for record in records)
    well = sum(keeps(record, scenario.slo) for record in records)
    ended = [record for record in records if record.ended is not None]
    lost = sum(record.ended is None and record.request not in state.requests for record in records)
    return RunResult(
        policy=policy,
        seed=scenario.seed,
        requests=Requests(
            accepted=len(records),
            finished=sum(record.ended == "finished" for record in ended),
            failed=sum(record.ended != "finished" for record in ended),
            open=len(records) - len(ended) - lost,
            lost=lost,
        ),
        latency_s=Spread.of(latency_of(record, end_s) for record in records),
        latency_quantiles_s=quantiles(latency_of(record, end_s) for record in records),
        ttft_s=Spread.of(ttft_of(record, end_s) for record in records),
        tpot_s=Spread.of(tpot for record in records if (tpot := tpot_of(record, end_s)) is not None),
        stall_s=Spread.of(stall_of(record, end_s) for record in records),
        goodput_rps=round(well / scenario.duration_s, 6),
        slo_share=round(well / len(records), 6) if records else 0.0,
        tokens=tokens,
        recomputed_tokens=sum(record.recomputed_tokens for record in records),
        cost=cost_of(cluster.instances.values(), scenario.hardware, duration_s=scenario.duration_s, tokens=tokens),
        migrations=tuple(
            MigrationLine(
                at_s=journal.run_begun_at_s[one.epoch],
                epoch=one.epoch,
                trigger=one.trigger,
                mode=one.mode,
                outcome=one.outcome,
                estimated_s=one.estimated_s,
                stall_s_max=round(one.stall_ms_max / 1000.0, 6),
                weight_bytes=one.weight_bytes,
                kv_bytes=one.kv_bytes,
                recomputed_tokens=one.recomputed_tokens,
            )
            for one in state.migrations
        ),
        timeline=tuple(journal.moments),
        duration_s=scenario.duration_s,
        simulated_s=round(end_s, 6),
        journal_digest=journal.digest,
    )
