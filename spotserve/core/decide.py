"""The decisions: given the state after an event, which commands follow. Pure; no decision depends on a token's value.

Order matters and is fixed: what must stop (fences, kills) first, then the plan run, then planning, then admissions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from spotserve.core import commands as cmd
from spotserve.core import events as ev
from spotserve.core.admission import admit
from spotserve.core.fleet import hold_fleet, is_declined
from spotserve.core.ids import InstanceId, RequestId
from spotserve.core.observe import observe
from spotserve.core.plan_run import drive_run
from spotserve.core.planning import answer_triggers, make_plan
from spotserve.core.record import record
from spotserve.core.state import GIVEN_BACK, ClusterState, Request

RESTART_PATIENCE_S = 60.0
"""How long a first placement, interrupted by a restart, waits for instances that have not joined."""

Policy = Callable[[ClusterState, ev.Event], Iterator[cmd.Command]]


def decide(state: ClusterState, event: ev.Event) -> tuple[cmd.Command, ...]:
    """All commands that follow from `event`. Each policy sees the commands before it as done."""
    before = state
    state = observe(state, event)
    commands: list[cmd.Command] = []
    for policy in POLICIES:
        for command in policy(before, state, event):
            state = record(state, command)
            commands.append(command)
    return tuple(commands)


def _instances(before: ClusterState, state: ClusterState, event: ev.Event) -> Iterator[cmd.Command]:
    """Launch what is wanted, kill what is condemned, time what is noticed."""
    if isinstance(event, ev.JournalBegun):
        yield cmd.SetTimer(timer="patience", at_s=state.at_s + event.patience_s)
    for name, instance in state.instances.items():
        if name not in before.instances:
            if is_declined(state, name):
                yield cmd.KillInstance(instance=name, reason=GIVEN_BACK)
            else:
                yield cmd.LaunchInstance(instance=name, market=instance.market)
    if isinstance(event, ev.KillRequested) and _living(state, event.instance):
        yield cmd.KillInstance(instance=event.instance, reason="killed")
    if isinstance(event, ev.NoticeReceived) and _living(state, event.instance):
        deadline_s = state.instances[event.instance].deadline_at_s
        assert deadline_s is not None
        yield cmd.SetTimer(timer=f"deadline:{event.instance}", at_s=deadline_s)
    if isinstance(event, ev.TimerFired) and event.timer.startswith("deadline:"):
        condemned = InstanceId(event.timer.partition(":")[2])
        instance = state.instances[condemned]
        if _living(state, condemned) and instance.deadline_at_s is not None and instance.deadline_at_s <= state.at_s:
            yield cmd.KillInstance(instance=condemned, reason="deadline")
    if isinstance(event, ev.CoordinatorRestarted):
        yield cmd.SetTimer(timer="patience", at_s=state.at_s + RESTART_PATIENCE_S)
        for instance in state.living():
            if instance.deadline_at_s is not None:
                yield cmd.SetTimer(timer=f"deadline:{instance.id}", at_s=instance.deadline_at_s)
            if instance.condemned is not None:
                yield cmd.KillInstance(instance=instance.id, reason=instance.condemned)
            elif instance.state == "requested" and instance.id in before.instances:
                yield cmd.LaunchInstance(instance=instance.id, market=instance.market)


def _living(state: ClusterState, instance: InstanceId) -> bool:
    return instance in state.instances and state.instances[instance].state != "gone"


def _fences(before: ClusterState, state: ClusterState, event: ev.Event) -> Iterator[cmd.Command]:
    """A replica that is lost by this event is fenced before anything else is done about it."""
    if state.replicas is before.replicas:
        return
    for name, entry in state.replicas.items():
        old = before.replicas.get(name)
        if entry.state == "lost" and (old is None or old.state != "lost"):
            yield cmd.FenceReplica(replica=name, generation=entry.replica.generation)


def _requests(before: ClusterState, state: ClusterState, event: ev.Event) -> Iterator[cmd.Command]:
    """Deadlines and cancellations."""
    if isinstance(event, ev.RequestAccepted):
        deadline_s = state.requests[event.request].deadline_at_s
        if deadline_s is not None:
            yield cmd.SetTimer(timer=f"request:{event.request}", at_s=deadline_s)
    if isinstance(event, ev.CancelRequested) and event.request in state.requests:
        yield _end(state.requests[event.request], "cancelled", None)
    if isinstance(event, ev.TimerFired) and event.timer.startswith("request:"):
        request = state.requests.get(RequestId(event.timer.partition(":")[2]))
        if request is not None:
            yield _end(request, "failed", "timeout_s passed")
    if isinstance(event, ev.CoordinatorRestarted):
        for request in state.requests.values():
            if request.ending is not None:
                yield _end(request, *request.ending)
            elif request.deadline_at_s is not None:
                yield cmd.SetTimer(timer=f"request:{request.id}", at_s=request.deadline_at_s)


def _end(request: Request, outcome: str, error: str | None) -> cmd.EndRequest:
    return cmd.EndRequest(
        request=request.id,
        outcome="cancelled" if outcome == "cancelled" else "failed",
        error=error,
        replica=request.replica,
        generation=request.generation,
    )


def _stopping(before: ClusterState, state: ClusterState, event: ev.Event) -> Iterator[cmd.Command]:
    """Stop when everything accepted has ended, or at the end of the drain; what is left stays open."""
    if state.stop_by_s is None or state.stopped:
        return
    if isinstance(event, ev.StopRequested):
        yield cmd.SetTimer(timer="drain", at_s=state.stop_by_s)
    over = isinstance(event, ev.TimerFired) and event.timer == "drain" and state.at_s >= state.stop_by_s
    if over or not state.requests:
        yield cmd.StopService()


POLICIES = (_instances, _fences, _requests, make_plan, drive_run, answer_triggers, admit, hold_fleet, _stopping)
