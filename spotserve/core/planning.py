"""Making a plan: a trigger asks for a snapshot, the snapshot for a solution, the solution begins a run."""

from __future__ import annotations

from collections.abc import Iterator

from spotserve.core import commands as cmd
from spotserve.core import events as ev
from spotserve.core.admission import by_arrival
from spotserve.core.fleet import expects_bursts
from spotserve.core.ids import RequestId, entry_of
from spotserve.core.load import load_to_serve
from spotserve.core.plan import Plan, Trigger
from spotserve.core.plan_run import begin, retry_at_s
from spotserve.core.snapshot import ChoiceProgress, RequestProgress, Snapshot
from spotserve.core.state import ClusterState, world_of

PATIENT_RETRIES = 3
"""Replicas that may break one after the other, without a token between, before planning waits."""


def make_plan(before: ClusterState, state: ClusterState, event: ev.Event) -> Iterator[cmd.Command]:
    """Snapshot, solve, begin; whatever is older than the membership starts over."""
    if _is_answered(before, event):
        return
    if isinstance(event, ev.SnapshotTaken) and state.planning is not None and state.planning.phase == "snapshot":
        yield from _solve(state, event)
    elif isinstance(event, ev.PlanReady) and _is_awaited(state, event.plan):
        yield from _adopt(state, event.plan)
    elif isinstance(event, ev.PlanFailed) and state.planning is not None:
        yield cmd.DropPlan(reason=event.error, again=True, failed=True)
        yield cmd.SetTimer(timer="replan", at_s=retry_at_s(state))
    elif isinstance(event, ev.PlanSubmitted) and _may_apply(state, event):
        yield from begin(state, event.plan)
    is_due = isinstance(event, ev.TimerFired) and event.timer == "replan" and before.retry_at_s is not None
    if is_due and state.trigger is None and state.planning is None and state.run is None:
        yield from _start_planning(state, "joined")


def _is_answered(before: ClusterState, event: ev.Event) -> bool:
    """Whether a planning command has its answer already: the same one again may be of a world that is no more."""
    if not isinstance(event, ev.SnapshotTaken | ev.PlanReady | ev.PlanFailed):
        return False
    return entry_of(event.command) <= before.answered


def _is_awaited(state: ClusterState, plan: Plan) -> bool:
    """Whether a plan answers the planning under way, and not one that a run or a restart has overtaken."""
    planning = state.planning
    return planning is not None and planning.phase == "solve" and plan.epoch.to == planning.epoch_to


def _may_apply(state: ClusterState, event: ev.PlanSubmitted) -> bool:
    """Nothing else is under way, the membership is the one that was checked, and the epoch was never used."""
    current = event.membership == state.membership and event.plan.epoch.to >= state.next_epoch
    return state.run is None and current


def _start_planning(state: ClusterState, kind: str) -> Iterator[cmd.Command]:
    yield cmd.TakeSnapshot(trigger=_trigger(state, kind), drop_loose=state.num_plan_failures > 0)


def _trigger(state: ClusterState, kind: str) -> Trigger:
    """Why there is to be a plan: doomed instances that nothing runs on any more hurry nobody."""
    used = state.used_instances()
    doomed = tuple(i for i in state.instances.values() if i.state == "doomed")
    doomed = tuple(i for i in doomed if i.id in used) or (doomed if kind == "notice" else ())
    deadlines = [i.deadline_at_s for i in doomed if i.deadline_at_s is not None]
    remaining_s = max(0.0, min(deadlines) - state.at_s) if deadlines else None
    return Trigger.model_validate({"kind": kind, "instances": tuple(i.id for i in doomed), "remaining_s": remaining_s})


def _solve(state: ClusterState, event: ev.SnapshotTaken) -> Iterator[cmd.Command]:
    planning = state.planning
    assert planning is not None
    if planning.membership != state.membership:
        yield cmd.DropPlan(reason="membership changed during the snapshot", again=True)
        return
    progress: dict[RequestId, list[ChoiceProgress]] = {}
    for p in event.positions:
        progress.setdefault(p.request, []).append(
            ChoiceProgress(choice=p.choice, kv_generation=p.kv_generation, tokens=p.tokens, kv_tokens=p.kv_tokens)
        )
    requests = tuple(
        RequestProgress(
            request=request.id,
            replica=request.replica,
            state=request.state,
            prompt_tokens=request.prompt_tokens,
            max_tokens=request.max_tokens,
            choices=tuple(progress.get(request.id, ())),
        )
        for request in by_arrival(state.requests.values())
    )
    world = world_of(state).model_copy(update={"holdings": event.holdings})
    snapshot = Snapshot(world=world, requests=requests, load_rps=load_to_serve(state), in_bursts=expects_bursts(state))
    yield cmd.SolvePlan(
        snapshot=snapshot, trigger=planning.trigger, epoch_to=planning.epoch_to, membership=state.membership
    )


def _adopt(state: ClusterState, plan: Plan) -> Iterator[cmd.Command]:
    planning = state.planning
    assert planning is not None
    if planning.membership != state.membership:
        yield cmd.DropPlan(reason="plan is for an older membership", again=True)
    elif not plan.target.replicas:
        yield cmd.DropPlan(reason="nothing fits what is left", infeasible=True)
    elif not plan.applyable or not plan.steps:
        yield cmd.DropPlan(reason="nothing to do")
    else:
        yield from begin(state, plan)


def answer_triggers(before: ClusterState, state: ClusterState, event: ev.Event) -> Iterator[cmd.Command]:
    """Begin to plan when a trigger waits and neither a plan nor a run is under way."""
    if state.trigger is None or state.planning is not None or state.run is not None:
        return
    if state.retry_at_s is not None and state.membership == before.membership:
        return  # What failed would fail again; another membership is another problem and is solved at once.
    if state.stop_by_s is not None and not state.requests:
        return
    if isinstance(event, ev.ReplicaBroke) and state.num_retries > PATIENT_RETRIES:
        # It breaks whatever it is rebuilt of: slower each time, so that the journal and the workers survive it.
        yield cmd.SetTimer(timer="replan", at_s=retry_at_s(state))
        return
    yield from _start_planning(state, state.trigger)
