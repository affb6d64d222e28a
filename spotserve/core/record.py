"""What a command changes once it is given: the second half of `apply`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from spotserve.core import commands as cmd
from spotserve.core.lifecycles import PLAN_RUN, REPLICA, REQUEST, can_fire, fire
from spotserve.core.load import load_to_serve
from spotserve.core.plan import Plan
from spotserve.core.state import (
    GIVEN_BACK,
    ClusterState,
    Disturbance,
    Instance,
    Migration,
    Planning,
    PlanRun,
    ReplicaEntry,
    TriggerKind,
)


def record(state: ClusterState, command: cmd.Command) -> ClusterState:
    """The state after a command was given."""
    recorder = _RECORDERS.get(command.kind)
    return state if recorder is None else recorder(state, command)


def _snapshot(state: ClusterState, command: cmd.TakeSnapshot) -> ClusterState:
    planning = Planning(
        phase="snapshot", trigger=command.trigger, membership=state.membership, epoch_to=state.next_epoch
    )
    return state.model_copy(update={"planning": planning})


def _solve(state: ClusterState, command: cmd.SolvePlan) -> ClusterState:
    assert state.planning is not None
    planning = state.planning.model_copy(update={"phase": "solve"})
    planned = {"planned_load_rps": load_to_serve(state), "planned_for_bursts": command.snapshot.in_bursts}
    return state.model_copy(update={"planning": planning, **planned})


def _begin(state: ClusterState, command: cmd.BeginRun) -> ClusterState:
    plan = command.plan
    for replica in new_replicas(state, plan):
        state = state.with_replica(ReplicaEntry(replica=replica))
    run = PlanRun(
        plan=plan,
        state=fire(PLAN_RUN, "proposed", "begun"),
        begun_at_s=state.at_s,
        steps={step.id: "pending" for step in plan.steps},
    )
    update: dict[str, object] = {
        "run": run,
        "planning": None,
        "trigger": None,
        "retry_at_s": None,
        "num_plan_failures": 0,
        "next_epoch": max(state.next_epoch, plan.epoch.to + 1),
    }
    state = state.model_copy(update=update)
    if not state.epoch:
        return state
    return _open_migration(state, plan.epoch.to, plan.trigger.kind, mode=plan.mode, estimated_s=plan.estimates.done_s)


def _open_migration(state: ClusterState, epoch: int, kind: TriggerKind, **fields: Any) -> ClusterState:
    """A line for `status`; what streams have suffered so far belongs to it."""
    disturbance = state.unattributed.model_dump()
    line = Migration(epoch=epoch, trigger=kind, **disturbance, **fields)
    return state.model_copy(update={"migrations": (*state.migrations, line), "unattributed": Disturbance()})


def new_replicas(state: ClusterState, plan: Plan) -> tuple[Any, ...]:
    """Replicas of the target that do not serve yet."""
    return tuple(r for r in plan.target.replicas if r.generation == plan.epoch.to)


def _execute(state: ClusterState, command: cmd.ExecuteStep) -> ClusterState:
    run = state.run
    assert run is not None
    steps = {**run.steps, command.step.id: "running"}
    return state.model_copy(update={"run": run.model_copy(update={"steps": steps})})


def _make_durable(state: ClusterState, command: cmd.MakeDurable) -> ClusterState:
    assert state.run is not None
    return state.model_copy(update={"run": state.run.model_copy(update={"durability": "asked"})})


def _commit(state: ClusterState, command: cmd.CommitRun) -> ClusterState:
    run = state.run
    assert run is not None
    steps = {step.id: "done" if step.kind in ("commit", "recompute") else run.steps[step.id] for step in run.plan.steps}
    committed = fire(PLAN_RUN, fire(PLAN_RUN, run.state, "prepared"), "committed")
    names = {a.request: state.requests[a.request].kv_generation for a in command.moved if a.request in state.requests}
    run = run.model_copy(update={"steps": steps, "state": committed, "moved": names})
    state = state.model_copy(update={"run": run})
    for entry in tuple(state.replicas.values()):
        if entry.state == "quiesced":
            state = state.with_replica(entry.model_copy(update={"state": fire(REPLICA, "quiesced", "retired")}))
    for owner in command.owners:
        request = state.requests.get(owner.request)
        if request is not None:
            status = request.state
            if owner.replica is None and status != "suspended":
                status = fire(REQUEST, status, "suspended")
            update = {"replica": owner.replica, "generation": owner.generation, "state": status}
            state = state.with_request(request.model_copy(update=update))
    state = _note_migration(state, run)
    moved = tuple(a.request for a in command.moved if a.request in state.requests)
    return state.model_copy(
        update={
            "epoch": run.epoch,
            "membership": state.membership + 1,
            "awaiting": (*state.awaiting, *moved),
        }
    )


def _note_migration(state: ClusterState, run: PlanRun) -> ClusterState:
    if not state.migrations or state.migrations[-1].epoch != run.epoch:
        return state
    line = state.migrations[-1]
    line = line.model_copy(
        update={
            "committed_at_s": state.at_s if line.committed_at_s is None else line.committed_at_s,
            "weight_bytes": run.weight_bytes,
            "kv_bytes": run.kv_bytes,
        }
    )
    return state.model_copy(update={"migrations": (*state.migrations[:-1], line)})


def _abort(state: ClusterState, command: cmd.AbortRun) -> ClusterState:
    run = state.run
    assert run is not None
    replicas = {
        name: entry
        for name, entry in state.replicas.items()
        if not (entry.replica.generation == run.epoch and entry.state in ("preparing", "lost"))
    }
    # What the run was for still has to be done.
    wanted = state.trigger if state.trigger is not None else run.plan.trigger.kind
    state = state.model_copy(update={"replicas": replicas, "run": None, "trigger": wanted})
    fire(PLAN_RUN, run.state, "aborted")
    for name, _generation in command.resume:
        entry = state.replicas[name]
        if entry.state != "quiesced":
            continue
        state = state.with_replica(entry.model_copy(update={"state": fire(REPLICA, entry.state, "resumed")}))
        for request in state.requests_of(name, entry.replica.generation):
            trigger = "first_token" if request.had_token else "admitted"
            if can_fire(REQUEST, request.state, trigger):
                state = state.with_request(request.model_copy(update={"state": fire(REQUEST, request.state, trigger)}))
    return _close_migration(state, run.epoch, "aborted")


def _close_migration(state: ClusterState, epoch: int, outcome: str) -> ClusterState:
    lines = tuple(
        line.model_copy(update={"outcome": outcome}) if line.epoch == epoch else line for line in state.migrations
    )
    return state.model_copy(update={"migrations": lines})


def _finish(state: ClusterState, command: cmd.FinishRun) -> ClusterState:
    run = state.run
    assert run is not None
    fire(PLAN_RUN, run.state, "released")
    replicas = {name: entry for name, entry in state.replicas.items() if entry.state not in ("retired", "lost")}
    state = _note_migration(state, run)
    state = state.model_copy(update={"run": None, "replicas": replicas})
    state = _note_need(state, run.plan.trigger.kind)
    if state.trigger is None and _may_use_more(state, run.plan.trigger.kind):
        state = state.model_copy(update={"trigger": "joined"})
    if not state.served and state.serving():
        state = state.model_copy(update={"served": True, "served_at_s": state.at_s})
    return _close_migration(state, run.epoch, "completed")


def _may_use_more(state: ClusterState, trigger: TriggerKind) -> bool:
    """Whether GPUs that a hurried plan left idle are free now of what they held, and the load is known to use them."""
    used = state.used_instances()
    idle = any(one.state == "ready" and one.id not in used for one in state.living())
    return trigger in ("notice", "lost") and idle and state.policy == "live" and load_to_serve(state) > 0


def _note_need(state: ClusterState, trigger: TriggerKind) -> ClusterState:
    """How many instances the layout uses; one that was chosen for want of more does not lower the number."""
    used = len(state.used_instances())
    ready = sum(one.state == "ready" for one in state.living())
    free_choice = trigger not in ("notice", "lost") and ready >= state.needed
    return state.model_copy(update={"needed": used if free_choice else max(used, state.needed)})


def _admit(state: ClusterState, command: cmd.AdmitRequests) -> ClusterState:
    for admission in command.admissions:
        request = state.requests.get(admission.request)
        if request is None:
            continue
        update: dict[str, object] = {
            "replica": command.replica,
            "generation": command.generation,
            # What starts from the ledger does so under a new name of its KV.
            "kv_generation": admission.kv_generation,
        }
        if not admission.choices and request.state in ("queued", "suspended"):
            update["state"] = fire(REQUEST, request.state, "admitted")
        state = state.with_request(request.model_copy(update=update))
    return state


def _timer(state: ClusterState, command: cmd.SetTimer) -> ClusterState:
    if command.timer != "replan":
        return state
    return state.model_copy(update={"retry_at_s": command.at_s, "num_retries": state.num_retries + 1})


def _drop_plan(state: ClusterState, command: cmd.DropPlan) -> ClusterState:
    planning = state.planning
    if planning is not None and planning.trigger.kind == "lost" and not command.again and not command.infeasible:
        # The untouched replicas took the requests over: a migration by recompute alone.
        state = _open_migration(state, planning.epoch_to, "lost", mode="live", outcome="completed")
        state = state.model_copy(update={"next_epoch": planning.epoch_to + 1})
    if planning is not None and not (command.again or command.infeasible):
        state = _note_need(state, planning.trigger.kind)
    failures = state.num_plan_failures + 1 if command.failed else 0
    update: dict[str, object] = {
        "planning": None,
        "infeasible": command.infeasible,
        "num_plan_failures": failures,
    }
    if not command.again:
        update["trigger"] = None
    elif state.trigger is None and planning is not None:
        update["trigger"] = planning.trigger.kind
    return state.model_copy(update=update)


def _launch(state: ClusterState, command: cmd.LaunchInstance) -> ClusterState:
    """One that is not known yet is asked for again."""
    if command.instance in state.instances:
        return state
    asked = Instance(id=command.instance, market=command.market)
    return state.with_instance(asked).model_copy(update={"given_back": state.given_back - 1})


def _kill(state: ClusterState, command: cmd.KillInstance) -> ClusterState:
    instance = state.instances[command.instance]
    if command.reason == GIVEN_BACK and instance.condemned is None:
        state = state.model_copy(update={"given_back": state.given_back + 1})
    return state.with_instance(instance.model_copy(update={"condemned": command.reason}))


def _end_request(state: ClusterState, command: cmd.EndRequest) -> ClusterState:
    request = state.requests[command.request]
    ending = (command.outcome, command.error)
    return state.with_request(request.model_copy(update={"ending": ending}))


def _stop(state: ClusterState, command: cmd.StopService) -> ClusterState:
    return state.model_copy(update={"stopped": True})


_RECORDERS: dict[str, Callable[[ClusterState, Any], ClusterState]] = {
    "take_snapshot": _snapshot,
    "solve_plan": _solve,
    "begin_run": _begin,
    "execute_step": _execute,
    "make_durable": _make_durable,
    "commit_run": _commit,
    "abort_run": _abort,
    "finish_run": _finish,
    "admit_requests": _admit,
    "set_timer": _timer,
    "drop_plan": _drop_plan,
    "launch_instance": _launch,
    "kill_instance": _kill,
    "end_request": _end_request,
    "stop_service": _stop,
}
