"""What happened, from a journal's entries: what a person asks after at three in the morning, in plain JSON data.

Every entry is in exactly one item. What changes the service, the cluster or a plan run has an item of its own; runs of
quiet entries between them (requests that come and end, answers of steps, timers, samples) become one item of counts.
Times are those of the controller's clock, which never goes back, whatever an event's own time says.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from spotserve.core import commands as cmd
from spotserve.core import events as ev
from spotserve.core.plan import KV_KINDS, WEIGHT_KINDS, Plan
from spotserve.core.replay import Moment
from spotserve.core.service import service_state
from spotserve.core.snapshot import Replica
from spotserve.core.state import ClusterState

Json = dict[str, Any]
"""Plain JSON data, hence `Any`."""

LOUD_EVENTS: dict[str, tuple[str, ...]] = {
    "journal_begun": ("num_instances",),
    "coordinator_restarted": ("term", "num_instances"),
    "instance_wanted": ("market",),
    "notice_received": ("instance", "grace_s"),
    "notice_withdrawn": ("instance",),
    "kill_requested": ("instance",),
    "replica_broke": ("replica", "generation", "detail"),
    "plan_failed": ("error",),
    "step_failed": ("epoch", "step", "error"),
    "quiesced": ("epoch", "replica", "generation"),
    "stop_requested": ("drain_s",),
}
"""Events that always have an item of their own, and which of their fields it tells."""

QUIET_FIELDS: dict[str, tuple[str, ...]] = {
    "worker_registered": ("instance", "worker"),
    "instance_lost": ("instance", "reason"),
    "first_token": ("request", "replica", "generation", "stall_ms", "recomputed_tokens"),
    "request_evicted": ("request", "replica"),
    "request_ended": ("request", "outcome"),
    "request_accepted": ("request",),
    "cancel_requested": ("request",),
    "step_done": ("epoch", "step"),
    "ledger_durable": ("epoch",),
    "load_sampled": ("load_rps",),
    "timer_fired": ("timer",),
}
"""What is told of other events where something follows from them that must be told."""

QUIET_COMMANDS = frozenset(
    {"set_timer", "take_snapshot", "solve_plan", "execute_step", "make_durable", "admit_requests", "end_request"}
)
"""What the controller does all the time; told by what comes of it."""

COUNTED = {
    "request_accepted": "accepted",
    "first_token": "first_tokens",
    "request_evicted": "evicted",
    "cancel_requested": "cancelled_by_client",
}
"""Events of requests, and what they are counted as."""


@dataclass(slots=True)
class Meanwhile:
    """Quiet entries one after the other, counted."""

    sequence: int
    at_s: float
    last_sequence: int
    last_at_s: float
    entries: int = 0
    requests: Counter[str] = field(default_factory=Counter)
    failures: Counter[str] = field(default_factory=Counter)
    """Why requests were told to fail."""
    others: Counter[str] = field(default_factory=Counter)
    num_stalls: int = 0
    longest_ms: float = 0.0
    longest_of: str | None = None
    recomputed_tokens: int = 0

    def take(self, moment: Moment) -> None:
        """Count one more."""
        event = moment.entry.event
        self.entries += 1
        self.last_sequence, self.last_at_s = moment.entry.sequence, moment.after.at_s
        if isinstance(event, ev.RequestEnded):
            self.requests[event.outcome] += 1
        elif event.kind in COUNTED:
            self.requests[COUNTED[event.kind]] += 1
        else:
            self.others[event.kind] += 1
        if isinstance(event, ev.FirstToken):
            self._wait(event)
        for command in moment.entry.commands:
            if isinstance(command, cmd.EndRequest) and command.outcome == "failed":
                self.failures[command.error or "no reason given"] += 1

    def _wait(self, event: ev.FirstToken) -> None:
        self.recomputed_tokens += event.recomputed_tokens
        if event.stall_ms <= 0:
            return
        self.num_stalls += 1
        if event.stall_ms > self.longest_ms:
            self.longest_ms, self.longest_of = event.stall_ms, event.request

    def item(self) -> Json:
        """The counts as JSON."""
        stalls = {"count": self.num_stalls, "longest_ms": rounded(self.longest_ms, 3), "request": self.longest_of}
        return {
            "kind": "meanwhile",
            "sequence": self.sequence,
            "last_sequence": self.last_sequence,
            "entries": self.entries,
            "at_s": rounded(self.at_s),
            "last_at_s": rounded(self.last_at_s),
            "requests": dict(sorted(self.requests.items())),
            "failures": dict(sorted(self.failures.items())),
            "stalls": stalls if self.num_stalls else None,
            "recomputed_tokens": self.recomputed_tokens,
            "others": dict(sorted(self.others.items())),
        }


class Timeline:
    """The items of a journal. Feed it every moment, in order."""

    def __init__(self) -> None:
        self._items: list[Json] = []
        self._open: Meanwhile | None = None

    def take(self, moment: Moment) -> None:
        """Give the entry an item of its own, or count it with its neighbours."""
        item = loud_item(moment)
        if item is not None:
            self._close()
            self._items.append(item)
            return
        if self._open is None:
            first, at_s = moment.entry.sequence, moment.after.at_s
            self._open = Meanwhile(first, at_s, first, at_s)
        self._open.take(moment)

    def items(self) -> list[Json]:
        """All of them; the timeline ends here."""
        self._close()
        return self._items

    def _close(self) -> None:
        if self._open is not None:
            self._items.append(self._open.item())
            self._open = None


def loud_item(moment: Moment) -> Json | None:
    """The item of an entry that a person should see; None for a quiet one."""
    event, commands = moment.entry.event, moment.entry.commands
    facts, told = event_facts(moment), [command_facts(command, moment) for command in commands]
    told = [command for command in told if command is not None]
    old, new = service_state(moment.before), service_state(moment.after)
    changes = state_changes(moment)
    if event.kind not in LOUD_EVENTS and not told and old == new and not changes:
        return None
    return {
        "kind": "entry",
        "sequence": moment.entry.sequence,
        "at_s": rounded(moment.after.at_s),
        "event": facts,
        "changes": changes,
        "commands": told,
        "service": None if old == new else {"from": old, "to": new},
    }


def event_facts(moment: Moment) -> Json:
    """The event's kind and what of it is worth telling."""
    event = moment.entry.event
    names = LOUD_EVENTS.get(event.kind, QUIET_FIELDS.get(event.kind, ()))
    facts: Json = {"kind": event.kind, **{name: getattr(event, name) for name in names}}
    if isinstance(event, ev.JournalBegun):
        spec = event.spec
        facts |= {"model": spec.model.name, "policy": spec.policy, "policy_version": spec.policy_version}
    if isinstance(event, ev.CoordinatorRestarted):
        facts |= {"num_workers": len(event.workers), "away_s": rounded(moment.after.at_s - moment.before.at_s)}
    if isinstance(event, ev.Quiesced):
        facts["num_requests"] = len({position.request for position in event.positions})
    if isinstance(event, ev.PlanReady | ev.PlanSubmitted):
        facts["plan"] = plan_facts(event.plan)
    return facts


def plan_facts(plan: Plan) -> Json:
    """What a plan is for, what it leads to, and what it was estimated to take."""
    return {
        "epoch": plan.epoch.to,
        "trigger": {"kind": plan.trigger.kind, "instances": list(plan.trigger.instances)},
        "mode": plan.mode,
        "replicas": [degrees(replica) for replica in plan.target.replicas],
        "estimates": plan.estimates.model_dump(mode="json"),
        "weight_bytes": sum(getattr(step, "bytes", 0) for step in plan.steps if step.kind in WEIGHT_KINDS),
        "kv_bytes": sum(getattr(step, "bytes", 0) for step in plan.steps if step.kind in KV_KINDS),
        "num_steps": len(plan.steps),
    }


def degrees(replica: Replica) -> Json:
    """A replica by its name and its pipeline and tensor degrees."""
    return {
        "id": replica.id,
        "generation": replica.generation,
        "pipeline": replica.pipeline,
        "tensor": replica.tensor,
    }


def _launch(command: cmd.LaunchInstance, moment: Moment) -> Json:
    return {"instance": command.instance, "market": command.market}


def _kill(command: cmd.KillInstance, moment: Moment) -> Json:
    return {"instance": command.instance, "reason": command.reason}


def _drop(command: cmd.DropPlan, moment: Moment) -> Json | None:
    planning = moment.before.planning
    kind = None if planning is None else planning.trigger.kind
    if kind == "load" and not (command.again or command.infeasible or command.failed):
        return None  # The load changed and everything may stay as it is: so it goes all day.
    return {"trigger": kind, "reason": command.reason, "infeasible": command.infeasible, "again": command.again}


def _begin(command: cmd.BeginRun, moment: Moment) -> Json:
    number = len(moment.after.migrations) if moment.after.epoch else 0
    return {"number": number, "epoch": command.plan.epoch.to}


def _commit(command: cmd.CommitRun, moment: Moment) -> Json:
    return {"epoch": command.epoch, "moved": len(command.moved), "recomputed": len(command.recomputed)}


def _abort(command: cmd.AbortRun, moment: Moment) -> Json:
    return {"epoch": command.epoch, "reason": command.reason, "resumed": [name for name, _ in command.resume]}


def _finish(command: cmd.FinishRun, moment: Moment) -> Json:
    run = moment.before.run
    begun_at_s = None if run is None else run.begun_at_s
    return {
        "epoch": command.epoch,
        "done_s": None if begun_at_s is None else rounded(moment.after.at_s - begun_at_s),
        "estimated_s": None if run is None else run.plan.estimates.done_s,
    }


def _fence(command: cmd.FenceReplica, moment: Moment) -> Json:
    return {"replica": command.replica, "generation": command.generation}


_TELLERS: dict[str, Callable[[Any, Moment], Json | None]] = {
    "launch_instance": _launch,
    "kill_instance": _kill,
    "drop_plan": _drop,
    "begin_run": _begin,
    "commit_run": _commit,
    "abort_run": _abort,
    "finish_run": _finish,
    "fence_replica": _fence,
}


def command_facts(command: cmd.Command, moment: Moment) -> Json | None:
    """A decision and what of it is worth telling; None for one that is not."""
    if command.kind in QUIET_COMMANDS:
        return None
    teller = _TELLERS.get(command.kind)
    facts = {} if teller is None else teller(command, moment)
    return None if facts is None else {"kind": command.kind, **facts}


def state_changes(moment: Moment) -> list[Json]:
    """What neither the event nor a command names: lifecycles of instances and replicas, steps that were given up."""
    before, after = moment.before, moment.after
    changes: list[Json] = []
    if after.instances is not before.instances:
        for name, instance in after.instances.items():
            old = before.instances.get(name)
            if old is not None and old.state != instance.state and instance.state != "joining":
                changes.append({"kind": "instance", "id": name, "from": old.state, "to": instance.state})
    if after.replicas is not before.replicas:
        for replica, entry in after.replicas.items():
            was = before.replicas.get(replica)
            if was is not None and was.state != entry.state:
                changes.append({"kind": "replica", "id": replica, "from": was.state, "to": entry.state})
    late = _num_late(after) - _num_late(before)
    if late > 0:
        changes.append({"kind": "steps_given_up", "count": late})
    return changes


def _num_late(state: ClusterState) -> int:
    """Steps of the run that were given up so that the rest is in time."""
    return 0 if state.run is None else sum(1 for status in state.run.steps.values() if status == "late")


def rounded(value: float, digits: int = 6) -> float:
    """Microseconds: no noise digits."""
    return round(value, digits)
