"""What became of every plan run, from the journal's entries: when each step was ordered, answered, given up.

A step is measured from the entry that orders it to the entry that has its answer, so messages and the fsyncs between
are in it. Commit and recompute are decided by one entry and have no answer: nothing is measured of them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import InitVar, dataclass, field
from typing import Any

from spotserve.core import commands as cmd
from spotserve.core import events as ev
from spotserve.core.controller import Entry
from spotserve.core.ids import StepId
from spotserve.core.plan import KV_KINDS, PREPARING_KINDS, WEIGHT_KINDS, Plan
from spotserve.core.replay import Moment, moments
from spotserve.core.state import ClusterState, Migration

PHASES = ("begun", "quiesced", "durable", "committed", "released", "aborted")
"""In the order in which a run can reach them; the last two exclude each other."""


@dataclass(slots=True)
class StepRecord:
    """One step of a run: None where it never came to that."""

    ordered_at_s: float | None = None
    answered_at_s: float | None = None
    outcome: str = "not_started"
    moved_bytes: int | None = None
    error: str | None = None


@dataclass(slots=True)
class RunRecord:
    """One execution of a plan. `number` counts like the migrations of `status`, from 1; 0 is a first placement."""

    number: int
    plan: Plan
    phases: dict[str, float]
    steps: dict[StepId, StepRecord] = field(default_factory=dict)
    abort_reason: str | None = None
    migration: Migration | None = None

    @property
    def outcome(self) -> str:
        """`completed`, `aborted` or `running`."""
        return "completed" if "released" in self.phases else "aborted" if "aborted" in self.phases else "running"


@dataclass(slots=True)
class RunHistory:
    """Every run in a journal. Feed it the state before the first entry, then every moment in order.

    Args:
        state: the fold of all entries before; a run that is under way in it is the first.
    """

    state: InitVar[ClusterState]
    runs: list[RunRecord] = field(default_factory=list)

    def __post_init__(self, state: ClusterState) -> None:
        """Take the run under way."""
        if state.run is not None:
            known = {step.id: StepRecord() for step in state.run.plan.steps}
            known |= {step: StepRecord(outcome=status) for step, status in state.run.steps.items()}
            self.runs.append(RunRecord(_number(state), state.run.plan, {"begun": state.run.begun_at_s}, known))

    def take(self, moment: Moment) -> None:
        """Note what one entry says about a run."""
        runs, state = self.runs, moment.after
        _answered(runs[-1] if runs else None, moment.entry.event)
        for command in moment.entry.commands:
            if isinstance(command, cmd.BeginRun):
                steps = {step.id: StepRecord() for step in command.plan.steps}
                runs.append(RunRecord(_number(state), command.plan, {"begun": state.at_s}, steps))
            elif runs:
                _ordered(runs[-1], command, state.at_s)
        _given_up(runs[-1] if runs else None, moment.before, state)

    def ended(self, state: ClusterState) -> list[RunRecord]:
        """The runs with what `state`, the last fold, says about each."""
        lines = {line.epoch: line for line in state.migrations}
        for run in self.runs:
            run.migration = lines.get(run.plan.epoch.to)
        return self.runs


def run_history(state: ClusterState, entries: Iterable[Entry]) -> list[RunRecord]:
    """Every run that the entries begin, and the one that is under way in `state`, the fold of all before them."""
    history = RunHistory(state)
    for moment in moments(state, entries):
        history.take(moment)
        state = moment.after
    return history.ended(state)


def _number(state: ClusterState) -> int:
    """Which of the migrations the newest run is; a first placement is none."""
    return len(state.migrations) if state.epoch else 0


def _answered(run: RunRecord | None, event: ev.Event) -> None:
    """Note what an event says about a step or a phase of the run."""
    if run is None or getattr(event, "epoch", None) != run.plan.epoch.to:
        return
    if isinstance(event, ev.LedgerDurable):
        run.phases.setdefault("durable", event.at_s)
    elif isinstance(event, ev.StepDone | ev.StepFailed | ev.Quiesced):
        record = run.steps.get(event.step)
        if record is None or record.answered_at_s is not None:
            return
        record.answered_at_s = event.at_s
        late = record.outcome == "late"
        if isinstance(event, ev.StepFailed):
            record.outcome, record.error = "failed", event.error
        else:
            record.outcome = "late" if late else "done"
        if isinstance(event, ev.StepDone):
            record.moved_bytes = event.bytes
        if isinstance(event, ev.Quiesced):
            run.phases["quiesced"] = event.at_s


def _ordered(run: RunRecord, command: cmd.Command, at_s: float) -> None:
    """Note what a command does to a step or a phase of the run."""
    if isinstance(command, cmd.ExecuteStep):
        record = run.steps.setdefault(command.step.id, StepRecord())
        if record.outcome == "failed":  # Asked for again.
            record.outcome, record.error, record.answered_at_s = "running", None, None
        if record.ordered_at_s is None:
            record.ordered_at_s = at_s
            record.outcome = "running"
    elif isinstance(command, cmd.CommitRun):
        run.phases["committed"] = at_s
        for step in run.plan.steps:
            if step.kind in ("commit", "recompute"):
                run.steps[step.id] = StepRecord(ordered_at_s=at_s, outcome="done")
    elif isinstance(command, cmd.AbortRun):
        run.phases["aborted"] = at_s
        run.abort_reason = command.reason
    elif isinstance(command, cmd.FinishRun):
        run.phases["released"] = at_s


def _given_up(run: RunRecord | None, before: ClusterState, after: ClusterState) -> None:
    """Note the steps that the fold settled without an answer: late at the deadline, or owed by a lost worker."""
    if run is None or after.run is None or before.run is None or before.run.epoch != after.run.epoch:
        return
    for step, status in after.run.steps.items():
        record = run.steps.setdefault(step, StepRecord())
        if status == before.run.steps.get(step) or record.answered_at_s is not None:
            continue
        if status == "late":
            record.outcome = "late"
        elif status == "done" and record.outcome in ("running", "not_started"):
            record.outcome = "forgiven"


Json = dict[str, Any]
"""Plain JSON data, hence `Any`."""


def run_line(run: RunRecord) -> Json:
    """A run in one line: the list of `inspect`."""
    return {
        "number": run.number,
        "epoch": run.plan.epoch.to,
        "trigger": {"kind": run.plan.trigger.kind, "instances": list(run.plan.trigger.instances)},
        "mode": run.plan.mode,
        "outcome": run.outcome,
        "abort_reason": run.abort_reason,
        "phases": {name: _rounded(run.phases[name]) for name in PHASES if name in run.phases},
    }


def run_report(run: RunRecord) -> Json:
    """A run with every step and the totals, estimated beside measured."""
    steps = [_step_line(run, index) for index in range(len(run.plan.steps))]
    return {**run_line(run), "steps": steps, "totals": _totals(run, steps)}


def _step_line(run: RunRecord, index: int) -> Json:
    step = run.plan.steps[index]
    record = run.steps[step.id]
    measured_s = None
    if record.ordered_at_s is not None and record.answered_at_s is not None:
        measured_s = _rounded(record.answered_at_s - record.ordered_at_s)
    workers = getattr(step, "workers", ())
    ends = [getattr(step, "source", None), getattr(step, "destination", None)]
    begun_s = run.phases["begun"]
    return {
        "step": step.id,
        "kind": step.kind,
        "workers": [*workers, *(end for end in ends if end is not None)],
        "outcome": record.outcome,
        "error": record.error,
        "began_s": None if record.ordered_at_s is None else _rounded(record.ordered_at_s - begun_s),
        "estimated_s": step.estimated_s,
        "measured_s": measured_s,
        "ratio": None if measured_s is None or not step.estimated_s else round(measured_s / step.estimated_s, 3),
        "estimated_bytes": getattr(step, "bytes", None),
        "moved_bytes": record.moved_bytes if step.kind in (*WEIGHT_KINDS, *KV_KINDS) else None,
    }


def _totals(run: RunRecord, steps: list[Json]) -> Json:
    """Estimates of the plan beside what the journal has of the same; None for what did not come to its end."""
    estimates, phases, begun_s = run.plan.estimates, run.phases, run.phases["begun"]
    copies = [run.steps[step.id] for step in run.plan.steps if step.kind in PREPARING_KINDS]
    copy_s = _duration(copies, copies) if all(record.outcome == "done" for record in copies) else None
    stops = [run.steps[step.id] for step in run.plan.steps if step.kind == "quiesce"]
    starts = [run.steps[step.id] for step in run.plan.steps if step.kind == "activate"]
    served = "committed" in phases and all(record.outcome == "done" for record in starts)
    stall_s = _duration(stops, starts, at_least_s=phases["committed"]) if served else None
    done_s = phases["released"] - begun_s if "released" in phases else None
    line = run.migration
    return {
        "copy_s": _pair(estimates.copy_s, copy_s),
        "stall_s": _pair(estimates.stall_s, stall_s),
        "done_s": _pair(estimates.done_s, done_s),
        "weight_bytes": _bytes(steps, WEIGHT_KINDS),
        "kv_bytes": _bytes(steps, KV_KINDS),
        "stall_ms_max": None if line is None else line.stall_ms_max,
        "recomputed_tokens": None if line is None else line.recomputed_tokens,
    }


def _duration(first: list[StepRecord], last: list[StepRecord], *, at_least_s: float | None = None) -> float | None:
    """From the first order to the last answer (or `at_least_s`, if that is later)."""
    begun = [record.ordered_at_s for record in first if record.ordered_at_s is not None]
    ended = [record.answered_at_s for record in last if record.answered_at_s is not None]
    ended += [] if at_least_s is None else [at_least_s]
    return max(ended) - min(begun) if begun and ended else None


def _pair(estimated: float, measured: float | None) -> Json:
    ratio = None if measured is None or not estimated else round(measured / estimated, 3)
    return {"estimated": estimated, "measured": None if measured is None else _rounded(measured), "ratio": ratio}


def _bytes(steps: list[Json], kinds: tuple[str, ...]) -> Json:
    chosen = [step for step in steps if step["kind"] in kinds]
    estimated = sum(step["estimated_bytes"] for step in chosen)
    moved = sum(step["moved_bytes"] or 0 for step in chosen)
    return {"estimated": estimated, "measured": moved, "ratio": round(moved / estimated, 3) if estimated else None}


def _rounded(value_s: float) -> float:
    """Microseconds: no noise digits."""
    return round(value_s, 6)
