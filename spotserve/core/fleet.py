"""The fleet: instances that no replica needs are given back, and asked for again once one does.

Off unless `limits.spare_instances` says how many idle ones shall wait for the next preemption. What is given back was
idle for a while, so that a layout which changes to and fro keeps what it rents; what is missing is asked for at once,
as it takes minutes to come. Nobody ever asks for more than was given back: how much there may be is a person's word.
While requests come in bursts everything is kept: what is idle serves the next one. The published policies keep what
they have.
"""

from __future__ import annotations

from collections.abc import Iterator

from spotserve.core import commands as cmd
from spotserve.core import events as ev
from spotserve.core.ids import InstanceId, instance_of
from spotserve.core.load import comes_in_bursts
from spotserve.core.plan import Plan
from spotserve.core.state import GIVEN_BACK, ClusterState, Instance

HOLD_S = 60.0
"""How long nothing has changed before idle instances go."""
TIMER = "fleet"
WATCH_S = 150.0
"""How long it has served before anything goes: five windows of arrivals, that a burst may be among."""


def hold_fleet(before: ClusterState, state: ClusterState, event: ev.Event) -> Iterator[cmd.Command]:
    """Give back what has been idle for long, ask for what is missing."""
    spare = _wanted_idle(state)
    if spare is None:
        return
    for number in range(_missing(before, state, event, spare)):
        name = InstanceId(f"i{len(state.instances) + number}")
        yield cmd.LaunchInstance(instance=name)
    settled = (before.run is not None and state.run is None) or isinstance(event, ev.CoordinatorRestarted)
    if settled or not before.served or state.membership != before.membership:
        yield cmd.SetTimer(timer=TIMER, at_s=state.at_s + HOLD_S)
    if isinstance(event, ev.TimerFired) and event.timer == TIMER:
        busy = state.run is not None or state.planning is not None or state.trigger is not None
        if busy or expects_bursts(state) or state.at_s < state.served_at_s + WATCH_S:
            yield cmd.SetTimer(timer=TIMER, at_s=state.at_s + HOLD_S)
        else:
            for name in _surplus(state, spare):
                yield cmd.KillInstance(instance=name, reason=GIVEN_BACK)


def expects_bursts(state: ClusterState) -> bool:
    """Whether what is idle is kept for the next burst."""
    return _wanted_idle(state) is not None and comes_in_bursts(state)


def is_declined(state: ClusterState, name: InstanceId) -> bool:
    """Whether an instance that is on offer is not taken, as enough idle ones are there or on their way."""
    spare = _wanted_idle(state)
    if spare is None or not state.serving() or comes_in_bursts(state):
        return False
    others = [one for one in _idle(state) + _coming(state) if one.id != name]
    return len(others) >= _wanted(state, spare)


def _wanted_idle(state: ClusterState) -> int | None:
    """How many idle instances shall wait; None: nothing is given back, or nothing has served yet."""
    if state.spec is None or state.spec.policy != "live" or not state.served:
        return None
    return state.spec.limits.spare_instances


def _missing(before: ClusterState, state: ClusterState, event: ev.Event, spare: int) -> int:
    """How many to ask for: all that were given back if the load is too much, comes in bursts or fits nothing left.

    Else one for each that the cloud takes, and as many as shall be idle.
    """
    if state.given_back == 0 or state.stop_by_s is not None:
        return 0
    overloaded = isinstance(event, ev.PlanReady) and not _serves(event.plan)
    if overloaded or expects_bursts(state) or (state.infeasible and not state.serving()):
        return state.given_back
    taken = sum(_is_taken(before.instances.get(one.id), one) for one in state.instances.values())
    return min(state.given_back, max(taken, _wanted(state, spare) - len(_idle(state)) - len(_coming(state))))


def _is_taken(before: Instance | None, after: Instance) -> bool:
    """Whether the cloud takes an instance that we meant to keep, as of this event."""
    was_ours = before is not None and before.state != "gone" and before.deadline_at_s is None
    goes = after.state == "gone" or after.deadline_at_s is not None
    return was_ours and goes and after.condemned != GIVEN_BACK


def _serves(plan: Plan) -> bool:
    """Whether a plan's configuration serves the load, as far as its solver says."""
    report = plan.solver.get("configure")
    certificate = None if report is None else report.certificate
    return certificate is None or certificate.get("serves_load", 1) != 0


def _surplus(state: ClusterState, spare: int) -> list[InstanceId]:
    """The idle instances beyond those that shall wait, dearest and youngest first."""
    youngest_first = _idle(state)[::-1]
    idle = sorted(youngest_first, key=lambda one: one.market == "spot")
    return [one.id for one in idle[: max(0, len(idle) + len(_coming(state)) - _wanted(state, spare))]]


def _wanted(state: ClusterState, spare: int) -> int:
    """How many instances shall be idle: those for the next preemption, and what a layout lacks that was cut short."""
    return spare + max(0, state.needed - len(state.used_instances()))


def _idle(state: ClusterState) -> list[Instance]:
    """Ready instances without a position in any replica."""
    used = {
        instance_of(gpu)
        for entry in state.replicas.values()
        if entry.state in ("preparing", "serving", "quiesced")
        for gpu in entry.replica.gpus
    }
    return [one for one in state.living() if one.state == "ready" and one.id not in used and one.condemned is None]


def _coming(state: ClusterState) -> list[Instance]:
    """Instances that have not registered as a whole yet and were not noticed."""
    return [
        one
        for one in state.living()
        if one.state in ("requested", "joining") and one.condemned is None and one.deadline_at_s is None
    ]
