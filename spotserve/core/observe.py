"""What an event changes by itself, before any policy: the first half of `apply`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from spotserve.core import events as ev
from spotserve.core.fleet import expects_bursts
from spotserve.core.ids import InstanceId, ReplicaId, RequestId, entry_of, instance_of
from spotserve.core.lifecycles import INSTANCE, REPLICA, REQUEST, can_fire, fire
from spotserve.core.load import load_to_serve, sampled
from spotserve.core.plan import (
    Activate,
    CopyKv,
    CopyKvDelta,
    CopyWeights,
    JoinGroup,
    LoadWeights,
    Release,
    Reserve,
    Step,
)
from spotserve.core.snapshot import Gpu
from spotserve.core.state import (
    RELEASE_TRIES,
    TRIGGER_RANK,
    ClusterState,
    Instance,
    PlanRun,
    ReplicaEntry,
    Request,
    TriggerKind,
    involved,
    step_gpus,
)


def observe(state: ClusterState, event: ev.Event) -> ClusterState:
    """The state after an event. Late, doubled and foreign messages change nothing."""
    state = state.model_copy(update={"at_s": max(state.at_s, event.at_s)})
    return _OBSERVERS[event.kind](state, event)


def raise_trigger(state: ClusterState, kind: TriggerKind) -> ClusterState:
    """Ask for a plan; a graver reason replaces a lesser one."""
    current = state.trigger
    if current is not None and TRIGGER_RANK[current] >= TRIGGER_RANK[kind]:
        return state
    return state.model_copy(update={"trigger": kind})


def suspend_requests(state: ClusterState, entry: ReplicaEntry) -> ClusterState:
    """Take a lost replica's requests off it: they start again from the ledger."""
    for request in state.requests_of(entry.replica.id, entry.replica.generation):
        state = state.with_request(
            request.model_copy(update={"state": _suspended(request), "replica": None, "generation": 0})
        )
    return state


def _suspended(request: Request) -> str:
    return request.state if request.state == "suspended" else fire(REQUEST, request.state, "suspended")


def _begun(state: ClusterState, event: ev.JournalBegun) -> ClusterState:
    begun = {"spec": event.spec, "policy_version": event.spec.policy_version}
    state = state.model_copy(update={**begun, "num_instances": event.num_instances, "term": 1})
    for _ in range(event.num_instances):
        state = _add_instance(state, "spot")
    return state


def _restarted(state: ClusterState, event: ev.CoordinatorRestarted) -> ClusterState:
    state = state.model_copy(
        update={"term": event.term, "planning": None, "retry_at_s": None, "stop_by_s": None, "stopped": False}
    )
    if event.policy_version is not None:
        state = state.model_copy(update={"policy_version": event.policy_version})
    if any(state.doomed(replica) for replica in state.serving()):
        state = raise_trigger(state, "notice")
    # An instance that did not dial in again is about to be told lost: it does not count any more.
    present = [i for i in state.living() if all(gpu.id in event.workers for gpu in i.gpus)]
    missing = max(0, event.num_instances - state.given_back - len(present))
    for _ in range(missing):
        state = _add_instance(state, "spot")
    if state.serving():
        return state
    if state.epoch:
        return raise_trigger(state, "joined")
    pending = any(i.state in ("requested", "joining") for i in state.instances.values())
    return state if pending else raise_trigger(state, "start")


def _add_instance(state: ClusterState, market: Any) -> ClusterState:
    name = InstanceId(f"i{len(state.instances)}")
    return state.with_instance(Instance(id=name, market=market))


def _wanted(state: ClusterState, event: ev.InstanceWanted) -> ClusterState:
    return _add_instance(state, event.market)


def _registered(state: ClusterState, event: ev.WorkerRegistered) -> ClusterState:
    instance = state.instances.get(event.instance)
    if instance is None or instance.state == "gone" or any(gpu.id == event.worker for gpu in instance.gpus):
        return state
    status = instance.state
    if status == "requested":
        status = fire(INSTANCE, status, "worker_registered")
        if instance.deadline_at_s is not None:
            # It was noticed before it had dialled in.
            status = fire(INSTANCE, status, "noticed")
    gpu = Gpu(id=event.worker, memory_bytes=event.memory_bytes, type=event.gpu_type)
    gpus = tuple(sorted((*instance.gpus, gpu), key=_gpu_order))
    if status == "joining" and len(gpus) == event.num_gpus:
        status = fire(INSTANCE, status, "all_registered")
    instance = instance.model_copy(update={"state": status, "num_gpus": event.num_gpus, "gpus": gpus})
    state = state.with_instance(instance)
    return _ready(state) if status == "ready" else state


def _gpu_order(gpu: Gpu) -> int:
    return int(gpu.id.split("/", 1)[1])


def _ready(state: ClusterState) -> ClusterState:
    state = state.model_copy(update={"membership": state.membership + 1})
    if state.epoch == 0:
        pending = any(i.state in ("requested", "joining") for i in state.instances.values())
        return state if pending and not state.patience_over else raise_trigger(state, "start")
    return raise_trigger(state, "joined")


def _noticed(state: ClusterState, event: ev.NoticeReceived) -> ClusterState:
    instance = state.instances.get(event.instance)
    if instance is None or instance.state == "gone":
        return state
    deadline_s = event.at_s + event.grace_s
    if instance.deadline_at_s is not None:
        deadline_s = min(deadline_s, instance.deadline_at_s)
    was_doomed = instance.state == "doomed"
    shorter = instance.deadline_at_s is None or deadline_s < instance.deadline_at_s
    # An instance that has not even dialled in yet keeps its state; the deadline alone is noted.
    fires = can_fire(INSTANCE, instance.state, "noticed")
    status = fire(INSTANCE, instance.state, "noticed") if fires else instance.state
    state = state.with_instance(instance.model_copy(update={"state": status, "deadline_at_s": deadline_s}))
    if was_doomed and not shorter:
        return state
    state = state.model_copy(update={"membership": state.membership + 1})
    return raise_trigger(state, "notice") if concerns(state, event.instance) else state


def concerns(state: ClusterState, instance: InstanceId) -> bool:
    """Whether an instance hosts a replica or takes part in the run or the plan being made."""
    hosts = any(
        instance_of(gpu) == instance
        for entry in state.replicas.values()
        if entry.state in ("preparing", "serving", "quiesced")
        for gpu in entry.replica.gpus
    )
    planned = state.run is not None and any(instance_of(gpu) == instance for gpu in involved(state.run.plan))
    return hosts or planned


def _withdrawn(state: ClusterState, event: ev.NoticeWithdrawn) -> ClusterState:
    instance = state.instances.get(event.instance)
    if instance is None or instance.state == "gone" or instance.deadline_at_s is None:
        return state
    if instance.state != "doomed":
        return state.with_instance(instance.model_copy(update={"deadline_at_s": None}))
    ready = instance.model_copy(update={"state": fire(INSTANCE, "doomed", "withdrawn"), "deadline_at_s": None})
    state = state.with_instance(ready).model_copy(update={"membership": state.membership + 1})
    return raise_trigger(state, "joined")


def _unchanged(state: ClusterState, event: ev.Event) -> ClusterState:
    return state


def _lost(state: ClusterState, event: ev.InstanceLost) -> ClusterState:
    instance = state.instances.get(event.instance)
    if instance is None or instance.state == "gone":
        return state
    concerned = concerns(state, event.instance)
    gone = instance.model_copy(update={"state": fire(INSTANCE, instance.state, "lost"), "deadline_at_s": None})
    state = state.with_instance(gone).model_copy(update={"membership": state.membership + 1})
    for entry in tuple(state.replicas.values()):
        if any(instance_of(gpu) == event.instance for gpu in entry.replica.gpus):
            state = lose_replica(state, entry)
    state = _forgive_steps(state, event.instance)
    if state.epoch == 0 and not any(i.state in ("requested", "joining") for i in state.instances.values()):
        state = raise_trigger(state, "start")
    return raise_trigger(state, "lost") if concerned and state.epoch else state


def lose_replica(state: ClusterState, entry: ReplicaEntry) -> ClusterState:
    """A replica generation is lost with its KV; its requests are suspended."""
    if not can_fire(REPLICA, entry.state, "lost"):
        return state
    lost = entry.model_copy(update={"state": fire(REPLICA, entry.state, "lost")})
    return suspend_requests(state.with_replica(lost), lost)


def _forgive_steps(state: ClusterState, instance: InstanceId) -> ClusterState:
    """After the commit the steps of a lost worker or for a lost replica count as done; KV they owed is missing."""
    run = state.run
    if run is None or not run.committed:
        return state
    missing = set(run.missing)
    lost_replicas = {e.replica.id for e in state.replicas.values() if e.state == "lost"}
    steps = dict(run.steps)
    for step in run.plan.steps:
        on_instance = any(instance_of(gpu) == instance for gpu in step_gpus(step))
        if on_instance or _prepares(step, lost_replicas):
            if isinstance(step, CopyKvDelta) and steps[step.id] in ("pending", "running"):
                missing |= _route_choices(run, step)
            steps[step.id] = "done"
    update = {"steps": steps, "missing": tuple(sorted(missing))}
    return state.model_copy(update={"run": run.model_copy(update=update)})


def _prepares(step: Step, lost_replicas: set[ReplicaId]) -> bool:
    """Whether a step only serves a new replica that is lost."""
    if isinstance(step, CopyKv | CopyKvDelta):
        return step.route.to_replica in lost_replicas
    kinds = (Reserve, CopyWeights, LoadWeights, JoinGroup, Activate)
    return isinstance(step, kinds) and step.replica in lost_replicas


def _broke(state: ClusterState, event: ev.ReplicaBroke) -> ClusterState:
    entry = state.replicas.get(event.replica)
    if entry is None or entry.replica.generation != event.generation or entry.state in ("lost", "retired"):
        return state
    changed = {"membership": state.membership + 1, "num_retries": state.num_retries + 1}
    state = lose_replica(state, entry).model_copy(update=changed)
    run = state.run
    if run is not None and run.committed:
        steps = {step.id: "done" if _prepares(step, {event.replica}) else run.steps[step.id] for step in run.plan.steps}
        state = state.model_copy(update={"run": run.model_copy(update={"steps": steps})})
    return raise_trigger(state, "lost")


def _accepted(state: ClusterState, event: ev.RequestAccepted) -> ClusterState:
    request = Request(
        id=event.request,
        arrival_index=state.next_arrival,
        prompt_tokens=event.prompt_tokens,
        num_choices=event.num_choices,
        max_tokens=event.sampling.max_tokens,
        deadline_at_s=None if event.timeout_s is None else event.at_s + event.timeout_s,
    )
    return state.with_request(request).model_copy(update={"next_arrival": state.next_arrival + 1})


def _first_token(state: ClusterState, event: ev.FirstToken) -> ClusterState:
    request = state.requests.get(event.request)
    if request is None or (request.replica, request.generation) != (event.replica, event.generation):
        return state
    if request.state != "decoding":
        # A first token may be told after the quiesce that it came before: the request then stays suspended.
        decodes = state.replicas[event.replica].state == "serving"
        status = fire(REQUEST, request.state, "first_token") if decodes else request.state
        state = state.with_request(request.model_copy(update={"state": status, "had_token": True}))
    if event.recomputed_tokens or request.state != "decoding":
        # Something serves again: what comes next is no repetition of what failed.
        state = state.model_copy(update={"num_retries": 0})
    state = state.model_copy(update={"awaiting": tuple(r for r in state.awaiting if r != event.request)})
    return _disturbed(state, event)


def _disturbed(state: ClusterState, event: ev.FirstToken) -> ClusterState:
    """Count a stall and recomputed tokens with the migration they belong to."""
    if not event.stall_ms and not event.recomputed_tokens:
        return state
    index = _waited_for(state, event)
    line = state.unattributed if index is None else state.migrations[index]
    line = line.model_copy(
        update={
            "stall_ms_max": max(line.stall_ms_max, event.stall_ms),
            "recomputed_tokens": line.recomputed_tokens + event.recomputed_tokens,
        }
    )
    if index is None:
        return state.model_copy(update={"unattributed": line})
    lines = (*state.migrations[:index], line, *state.migrations[index + 1 :])
    return state.model_copy(update={"migrations": lines})


def _waited_for(state: ClusterState, event: ev.FirstToken) -> int | None:
    """The index of the migration that a request waited for; None for the one to come.

    That is the first one committed since the request stood still. Where there is none it is the last one, unless a loss
    or a restart still waits for its plan. Up to policy version 2 whatever waited for a plan was to blame.
    """
    waits = {state.trigger, state.planning and state.planning.trigger.kind} - {None}
    first = None
    if state.policy_version > 2:
        waits &= {"lost", "start"}
        stood_still_at_s = event.at_s - event.stall_ms / 1000.0
        for index in reversed(range(len(state.migrations))):
            committed_at_s = state.migrations[index].committed_at_s
            if committed_at_s is not None and committed_at_s <= stood_still_at_s:
                break
            first = first if committed_at_s is None else index
    if first is None and state.migrations and not waits:
        return len(state.migrations) - 1
    return first


def _evicted(state: ClusterState, event: ev.RequestEvicted) -> ClusterState:
    request = state.requests.get(event.request)
    if request is None or (request.replica, request.generation) != (event.replica, event.generation):
        return state
    serves = state.replicas[event.replica].state == "serving"
    if not serves or not can_fire(REQUEST, request.state, "evicted"):
        return state
    # The request stays with its replica, whose leader readmits it by itself.
    queued = fire(REQUEST, request.state, "evicted")
    return state.with_request(request.model_copy(update={"state": fire(REQUEST, queued, "admitted")}))


def _ended(state: ClusterState, event: ev.RequestEnded) -> ClusterState:
    request = state.requests.get(event.request)
    if request is None:
        return state
    fire(REQUEST, request.state, event.outcome)
    counters = state.counters.model_copy(update={event.outcome: getattr(state.counters, event.outcome) + 1})
    return state.model_copy(
        update={
            "requests": {name: other for name, other in state.requests.items() if name != event.request},
            "counters": counters,
            "awaiting": tuple(name for name in state.awaiting if name != event.request),
        }
    )


def _answered(state: ClusterState, event: ev.SnapshotTaken | ev.PlanReady | ev.PlanFailed) -> ClusterState:
    return state.model_copy(update={"answered": max(state.answered, entry_of(event.command))})


def _step_of(run: PlanRun, step_id: str) -> Step | None:
    return next((step for step in run.plan.steps if step.id == step_id), None)


def _with_step(state: ClusterState, run: PlanRun, step: Step, **update: object) -> ClusterState:
    steps = {**run.steps, step.id: "done"}
    return state.model_copy(update={"run": run.model_copy(update={"steps": steps, **update})})


def _step_done(state: ClusterState, event: ev.StepDone) -> ClusterState:
    run = state.run
    step = None if run is None or run.epoch != event.epoch else _step_of(run, event.step)
    if run is None or step is None or run.steps[step.id] == "done":
        return state
    update: dict[str, object] = {}
    if isinstance(step, CopyWeights):
        update["weight_bytes"] = run.weight_bytes + event.bytes
    if isinstance(step, CopyKv | CopyKvDelta):
        update["kv_bytes"] = run.kv_bytes + event.bytes
    if isinstance(step, CopyKvDelta):
        update["missing"] = tuple(sorted({*run.missing, *event.missing}))
    state = _with_step(state, run, step, **update)
    if step.kind == "activate":
        entry = state.replicas.get(step.replica)
        if entry is not None and entry.state == "preparing":
            served = entry.model_copy(update={"state": fire(REPLICA, entry.state, "activated")})
            state = state.with_replica(served).model_copy(update={"infeasible": False})
    return state


def _step_failed(state: ClusterState, event: ev.StepFailed) -> ClusterState:
    run = state.run
    step = None if run is None or run.epoch != event.epoch else _step_of(run, event.step)
    if run is None or step is None or run.steps[step.id] == "done":
        return state
    if isinstance(step, CopyKv):
        return _with_step(state, run, step)
    if isinstance(step, CopyKvDelta):
        return _with_step(state, run, step, missing=tuple(sorted({*run.missing, *_route_choices(run, step)})))
    if run.committed:
        if step.kind == "activate" and (entry := state.replicas.get(step.replica)) is not None:
            state = raise_trigger(lose_replica(state, entry), "lost")
        if isinstance(step, Release):
            failed = {**run.failed_releases, step.id: run.failed_releases.get(step.id, 0) + 1}
            run = run.model_copy(update={"failed_releases": failed})
            if failed[step.id] < RELEASE_TRIES:
                return state.model_copy(update={"run": run})  # Still to be done: `plan_run` asks for it again.
            return _with_step(state, run, step)
        return _with_step(state, run, step) if state.run is run else _with_step(state, state.run or run, step)
    return state


def _route_choices(run: PlanRun, step: CopyKvDelta) -> set[tuple[RequestId, int]]:
    """All choices whose KV a failed delta would have completed."""
    from_replica = step.route.from_replica
    return {(p.request, p.choice) for p in run.positions if run.sources.get(p.request) == from_replica}


def _quiesced(state: ClusterState, event: ev.Quiesced) -> ClusterState:
    run = state.run
    step = None if run is None or run.epoch != event.epoch else _step_of(run, event.step)
    entry = state.replicas.get(event.replica)
    if run is None or step is None or run.steps[step.id] == "done" or entry is None or entry.state != "serving":
        return state
    entry = entry.model_copy(update={"state": fire(REPLICA, entry.state, "quiesced")})
    sources = {**run.sources, **{position.request: event.replica for position in event.positions}}
    run = run.model_copy(update={"positions": (*run.positions, *event.positions), "sources": sources})
    # A delta may have been given up before anybody knew what it was to bring.
    late = [s for s in run.plan.steps if isinstance(s, CopyKvDelta) and run.steps[s.id] == "late"]
    missing = {*run.missing, *(choice for delta in late for choice in _route_choices(run, delta))}
    state = _with_step(state, run, step, missing=tuple(sorted(missing)))
    state = _without_late_copies(state.with_replica(entry))
    for request in state.requests_of(event.replica, event.generation):
        state = state.with_request(request.model_copy(update={"state": _suspended(request)}))
    return state


def _without_late_copies(state: ClusterState) -> ClusterState:
    """A delta that was given up before the positions were known brought nothing of them."""
    run = state.run
    assert run is not None
    late = [s for s in run.plan.steps if isinstance(s, CopyKvDelta) and run.steps[s.id] == "late"]
    missing = {choice for step in late for choice in _route_choices(run, step)}
    update = {"missing": tuple(sorted({*run.missing, *missing}))}
    return state.model_copy(update={"run": run.model_copy(update=update)})


def _durable(state: ClusterState, event: ev.LedgerDurable) -> ClusterState:
    run = state.run
    if run is None or run.epoch != event.epoch or run.durability != "asked":
        return state
    closed = set(event.closed)
    positions = tuple(p for p in run.positions if (p.request, p.choice) not in closed)
    update = {"durability": "durable", "positions": positions}
    return state.model_copy(update={"run": run.model_copy(update=update)})


def _load(state: ClusterState, event: ev.LoadSampled) -> ClusterState:
    loads = sampled(() if event.told else state.loads, event.at_s, event.load_rps)
    state = state.model_copy(update={"load_rps": event.load_rps, "loads": loads})
    load_rps = load_to_serve(state)
    reference = max(state.planned_load_rps, 0.05)
    changed = load_rps > 1.5 * reference or load_rps < 0.5 * state.planned_load_rps
    changed = changed or (event.told and event.load_rps != state.planned_load_rps)
    changed = changed or expects_bursts(state) != state.planned_for_bursts
    return raise_trigger(state, "load") if changed and state.epoch and state.serving() else state


def _timer(state: ClusterState, event: ev.TimerFired) -> ClusterState:
    name, _, argument = event.timer.partition(":")
    run = state.run
    if name == "patience":
        state = state.model_copy(update={"patience_over": True})
        ready = any(i.state == "ready" for i in state.instances.values())
        return raise_trigger(state, "start") if state.epoch == 0 and ready else state
    if name == "replan":
        return state.model_copy(update={"retry_at_s": None})
    if name == "latest" and run is not None and str(run.epoch) == argument and not run.committed:
        return _give_up(state, run, "copy_kv")
    if name == "delta" and run is not None and str(run.epoch) == argument and not run.committed:
        return _give_up(state, run, "copy_kv_delta")
    return state


def _give_up(state: ClusterState, run: PlanRun, kind: str) -> ClusterState:
    """The ladder: go on without what has not arrived; it is recomputed."""
    steps = dict(run.steps)
    missing = set(run.missing)
    for step in run.plan.steps:
        if step.kind == kind and steps[step.id] in ("pending", "running"):
            steps[step.id] = "late"
            if isinstance(step, CopyKvDelta):
                missing |= _route_choices(run, step)
    update = {"steps": steps, "missing": tuple(sorted(missing))}
    return state.model_copy(update={"run": run.model_copy(update=update)})


def _stop(state: ClusterState, event: ev.StopRequested) -> ClusterState:
    return state.model_copy(update={"stop_by_s": event.at_s + event.drain_s})


_OBSERVERS: dict[str, Callable[[ClusterState, Any], ClusterState]] = {
    "journal_begun": _begun,
    "coordinator_restarted": _restarted,
    "instance_wanted": _wanted,
    "worker_registered": _registered,
    "notice_received": _noticed,
    "notice_withdrawn": _withdrawn,
    "kill_requested": _unchanged,
    "instance_lost": _lost,
    "replica_broke": _broke,
    "request_accepted": _accepted,
    "cancel_requested": _unchanged,
    "first_token": _first_token,
    "request_evicted": _evicted,
    "request_ended": _ended,
    "snapshot_taken": _answered,
    "plan_ready": _answered,
    "plan_failed": _answered,
    "plan_submitted": _unchanged,
    "step_done": _step_done,
    "step_failed": _step_failed,
    "quiesced": _quiesced,
    "ledger_durable": _durable,
    "load_sampled": _load,
    "timer_fired": _timer,
    "stop_requested": _stop,
}
