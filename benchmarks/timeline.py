"""What the journal of a run tells: when instances came and went, and every plan run that answered it.

Times are the journal's own seconds (`at_s`); `clock_offset_s` relates them to the clients' clock.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from spotserve.core.controller import Entry
from spotserve.core.plan import CopyKv, CopyKvDelta, CopyWeights, LoadWeights, Step
from spotserve.store.journal import EntryJournal, Journal


@dataclass(slots=True)
class StepSpan:
    """One executed step."""

    step: Step
    began_s: float
    done_s: float | None = None
    num_bytes: int = 0
    first_byte_s: float | None = None


@dataclass(slots=True)
class PlanRunSpan:
    """One plan run, from the entry that began it to the one that ended it."""

    epoch: int
    trigger: str
    mode: str
    rung: str
    began_s: float
    quiesce_s: float | None = None
    commit_s: float | None = None
    ended_s: float | None = None
    is_aborted: bool = False
    owners_changed: frozenset[str] = frozenset()
    recomputed: frozenset[str] = frozenset()
    steps: dict[str, StepSpan] = field(default_factory=dict)

    @property
    def is_completed(self) -> bool:
        """Whether it ran to its end."""
        return self.commit_s is not None and self.ended_s is not None and not self.is_aborted

    @property
    def first_byte_s(self) -> float | None:
        """When the first byte from another worker was in place."""
        return min((s.first_byte_s for s in self.steps.values() if s.first_byte_s is not None), default=None)

    def bytes_of(self, *kinds: type[Step]) -> int:
        """Verified bytes of the steps of some kinds."""
        return sum(span.num_bytes for span in self.steps.values() if isinstance(span.step, kinds))


@dataclass(slots=True)
class Disturbance:
    """Capacity that went or came (`notice`, `kill`, `join`), or a plan for a new load (`load`)."""

    kind: str
    instance: str | None
    at_s: float
    deadline_s: float | None = None
    ended_s: float = 0.0
    """When the last run that answered it had ended and every request it interrupted had its next token."""
    runs: list[PlanRunSpan] = field(default_factory=list)

    @property
    def is_noticed_in_time(self) -> bool:
        """A notice that all runs which answered it were done with before the instance was taken."""
        return (
            self.kind == "notice"
            and bool(self.runs)
            and self.deadline_s is not None
            and all(run.is_completed and (run.ended_s or 0.0) < self.deadline_s for run in self.runs)
        )

    def overlaps(self, start_s: float, stop_s: float) -> bool:
        """Whether [start_s, stop_s] and the disturbance have a moment in common."""
        return start_s <= self.ended_s and self.at_s <= stop_s


@dataclass(slots=True)
class Timeline:
    """All of it."""

    disturbances: list[Disturbance] = field(default_factory=list)
    runs: list[PlanRunSpan] = field(default_factory=list)
    accepted_s: dict[str, float] = field(default_factory=dict)
    """Request -> when it was accepted."""
    recomputed_at_s: list[tuple[float, int]] = field(default_factory=list)

    def recomputed_during(self, disturbance: Disturbance) -> int:
        """Tokens prefilled again from the disturbance to its end."""
        return sum(n for at_s, n in self.recomputed_at_s if disturbance.at_s <= at_s <= disturbance.ended_s)


def read_timeline(state_dir: Path) -> Timeline:
    """The timeline of a stopped daemon."""
    return timeline_of(EntryJournal(Journal.read_only(state_dir / "journal.db")).read())


def timeline_of(entries: Iterable[Entry]) -> Timeline:
    """The timeline that journal entries tell."""
    timeline = Timeline()
    for entry in entries:
        _take_event(timeline, entry)
        _take_commands(timeline, entry)
    for run in timeline.runs:
        _assign(timeline, run)
    timeline.disturbances.sort(key=lambda d: d.at_s)
    return timeline


def _take_event(timeline: Timeline, entry: Entry) -> None:
    event = entry.event
    match event.kind:
        case "request_accepted":
            timeline.accepted_s[event.request] = event.at_s
        case "first_token":
            if event.recomputed_tokens:
                timeline.recomputed_at_s.append((event.at_s, event.recomputed_tokens))
            if event.stall_ms > 0 and timeline.disturbances:
                timeline.disturbances[-1].ended_s = event.at_s
        case "notice_received":
            deadline_s = event.at_s + event.grace_s
            timeline.disturbances.append(Disturbance("notice", event.instance, event.at_s, deadline_s, event.at_s))
        case "kill_requested":
            timeline.disturbances.append(Disturbance("kill", event.instance, event.at_s, None, event.at_s))
        case "instance_wanted":
            timeline.disturbances.append(Disturbance("join", None, event.at_s, None, event.at_s))
        case "step_done":
            span = _span(timeline, event.epoch, event.step)
            if span is not None:
                span.done_s, span.num_bytes = event.at_s, event.bytes
                span.first_byte_s = event.result.get("first_byte_at_s")
        case "quiesced":
            span = _span(timeline, event.epoch, event.step)
            if span is not None:
                span.done_s = event.at_s
        case _:
            return


def _take_commands(timeline: Timeline, entry: Entry) -> None:
    at_s = entry.event.at_s
    for command in entry.commands:
        match command.kind:
            case "begin_run":
                plan = command.plan
                if plan.trigger.kind == "load":
                    timeline.disturbances.append(Disturbance("load", None, at_s, None, at_s))
                timeline.runs.append(
                    PlanRunSpan(plan.epoch.to, plan.trigger.kind, plan.mode, plan.fallback[0], began_s=at_s)
                )
            case "execute_step":
                run = _run(timeline, command.epoch)
                if run is not None:
                    run.steps.setdefault(command.step.id, StepSpan(command.step, at_s))
                    if command.step.kind == "quiesce" and run.quiesce_s is None:
                        run.quiesce_s = at_s
            case "commit_run":
                run = _run(timeline, command.epoch)
                if run is not None:
                    run.commit_s = at_s
                    run.owners_changed = frozenset(owner.request for owner in command.owners)
                    run.recomputed = frozenset(command.recomputed)
            case "abort_run" | "finish_run":
                run = _run(timeline, command.epoch)
                if run is not None:
                    run.ended_s, run.is_aborted = at_s, command.kind == "abort_run"
            case _:
                continue


def _run(timeline: Timeline, epoch: int) -> PlanRunSpan | None:
    return next((run for run in reversed(timeline.runs) if run.epoch == epoch), None)


def _span(timeline: Timeline, epoch: int, step: str) -> StepSpan | None:
    run = _run(timeline, epoch)
    return None if run is None else run.steps.get(step)


def _assign(timeline: Timeline, run: PlanRunSpan) -> None:
    """A run answers what happened last before it began."""
    earlier = [d for d in timeline.disturbances if d.at_s <= run.began_s]
    if not earlier:
        return  # The first placement.
    disturbance = max(earlier, key=lambda d: d.at_s)
    disturbance.runs.append(run)
    disturbance.ended_s = max(disturbance.ended_s, run.ended_s if run.ended_s is not None else run.began_s)


def clock_offset_s(bounds: Sequence[tuple[float, float, float]]) -> float:
    """Client clock minus journal clock, from (sent, accepted, answered) of each request.

    The daemon stamps a request after it was sent and before its headers came; every request narrows the offset.
    """
    low = max(sent_s - accepted_s for sent_s, accepted_s, _ in bounds)
    high = min(answered_s - accepted_s for _, accepted_s, answered_s in bounds)
    return (low + high) / 2


WEIGHT_STEPS = (CopyWeights,)
LOAD_STEPS = (LoadWeights,)
KV_STEPS = (CopyKv, CopyKvDelta)
