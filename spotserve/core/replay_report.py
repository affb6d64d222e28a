"""What a replay says, as plain JSON data: the verdict, the plan runs, the timeline, and the cluster at its end."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from spotserve.core.canonical import digest
from spotserve.core.controller import Entry
from spotserve.core.replay import Comparison, Difference, moments
from spotserve.core.run_history import RunHistory, run_line, run_report
from spotserve.core.service import service_state
from spotserve.core.spec import POLICY_VERSION
from spotserve.core.state import ClusterState, PlanRun
from spotserve.core.status import service_status
from spotserve.core.timeline import Json, Timeline, degrees, rounded

FORMAT_VERSION = "0.1"


def replay_report(
    state: ClusterState,
    entries: Iterable[Entry],
    *,
    snapshots: Mapping[int, Any],
    until_s: float | None = None,
) -> Json:
    """Replay entries from `state`, the fold of all before them, to `until_s` or to their end.

    Args:
        state: where the first entry begins.
        entries: of the journal, in order.
        snapshots: fold snapshots of the journal (parsed JSON, hence `Any`), by the entry that each is after.
        until_s: seconds from the journal's start; what is later is left out.

    Raises StateDirError with the position of an entry that cannot follow those before it.
    """
    begins_s = state.at_s
    comparison, timeline, history = Comparison(snapshots), Timeline(), RunHistory(state)
    for moment in moments(state, entries, until_s=until_s):
        comparison.take(moment)
        timeline.take(moment)
        history.take(moment)
        state = moment.after
    return {
        "format_version": FORMAT_VERSION,
        "entries": comparison.num_entries,
        "begins_s": rounded(begins_s),
        "at_s": rounded(state.at_s),
        "until_s": until_s,
        "epoch": state.epoch,
        "state": service_state(state),
        "state_digest": digest(state),
        "policy": None if state.spec is None else state.spec.policy,
        "checks": _checks(comparison),
        "runs": [
            {
                **run_line(run),
                "replicas": [degrees(replica) for replica in run.plan.target.replicas],
                "totals": run_report(run)["totals"],
            }
            for run in history.ended(state)
        ],
        "timeline": timeline.items(),
        "cluster": cluster_at(state),
    }


def _checks(comparison: Comparison) -> Json:
    """What was compared with what, and the first difference."""
    return {
        "policy_version": POLICY_VERSION,
        "journal_policy_versions": comparison.versions,
        "decisions": comparison.verdict,
        "num_decisions_compared": comparison.num_compared,
        "num_snapshots_compared": comparison.num_snapshots,
        "num_decisions_differing": comparison.num_differing,
        "num_snapshots_differing": comparison.num_snapshots_differing,
        "difference": None if comparison.difference is None else _difference(comparison.difference),
    }


def _difference(difference: Difference) -> Json:
    where, recorded, found = difference.mismatch
    return {
        "kind": difference.kind,
        "sequence": difference.sequence,
        "event": difference.event,
        "path": where,
        "recorded": recorded,
        "found": found,
        "recorded_commands": list(difference.recorded_commands),
        "decided_commands": list(difference.decided_commands),
        "message": difference.line(),
    }


def cluster_at(state: ClusterState) -> Json:
    """The whole cluster at one moment: as `status` tells it, with deadlines, requests and the run under way."""
    status = service_status(state)
    for line in status["instances"]:
        deadline_s = state.instances[line["id"]].deadline_at_s
        line["taken_in_s"] = None if deadline_s is None else rounded(deadline_s - state.at_s)
    return {
        **{name: status[name] for name in ("state", "epoch", "parallel", "instances", "requests")},
        "replicas": [
            {
                **degrees(entry.replica),
                "state": entry.state,
                "stages": [{"gpus": list(stage.gpus), "layers": list(stage.layers)} for stage in entry.replica.stages],
                "requests": len(state.requests_of(name, entry.replica.generation)),
            }
            for name, entry in state.replicas.items()
        ],
        "open_requests": [
            {"id": request.id, "state": request.state, "replica": request.replica}
            for request in sorted(state.requests.values(), key=lambda request: request.arrival_index)
        ],
        "planning": None
        if state.planning is None
        else {"phase": state.planning.phase, "trigger": state.planning.trigger.kind, "epoch": state.planning.epoch_to},
        "run": None if state.run is None else _run_at(state.run, at_s=state.at_s),
    }


def _run_at(run: PlanRun, *, at_s: float) -> Json:
    """How far a run is."""
    counts = dict.fromkeys(("pending", "running", "late", "done"), 0)
    for status in run.steps.values():
        counts[status] += 1
    return {
        "epoch": run.epoch,
        "trigger": {"kind": run.plan.trigger.kind, "instances": list(run.plan.trigger.instances)},
        "mode": run.plan.mode,
        "state": run.state,
        "since_s": rounded(at_s - run.begun_at_s),
        "estimated_s": run.plan.estimates.done_s,
        "steps": counts,
        "running": [
            {"step": step.id, "kind": step.kind} for step in run.plan.steps if run.steps.get(step.id) == "running"
        ],
    }
