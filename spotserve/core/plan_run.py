"""Driving a plan run: start each step when what it depends on is done, make durable, commit, finish, or abort."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from spotserve.core import commands as cmd
from spotserve.core import events as ev
from spotserve.core.admission import KV_GENERATIONS_PER_ADMISSION, by_arrival, has_moved
from spotserve.core.ids import ReplicaId, RequestId, StepId, instance_of
from spotserve.core.plan import CopyKvDelta, KvRoute, Plan, Quiesce, Step
from spotserve.core.record import record
from spotserve.core.state import ClusterState, PlanRun, Request
from spotserve.core.wire import ChoicePosition

RETRY_S = 0.5
MAX_RETRY_S = 10.0
RELEASE_AGAIN_S = 0.25
RUN_PATIENCE_S = 60.0
DEADLINE_MARGIN_S = 0.3
"""Before the instance is taken: what the last steps of a plan need to be over."""


def retry_at_s(state: ClusterState) -> float:
    """When to plan again after a failure: later each time."""
    delay_s: float = min(RETRY_S * 2.0 ** min(state.num_retries, 8), MAX_RETRY_S)
    return state.at_s + delay_s


def begin(state: ClusterState, plan: Plan) -> Iterator[cmd.Command]:
    command = cmd.BeginRun(plan=plan)
    yield command
    state = record(state, command)
    waits = {s.not_before_s for s in plan.steps if isinstance(s, Quiesce) and s.not_before_s > 0}
    patience_s = RUN_PATIENCE_S + 3 * plan.estimates.done_s + max(waits, default=0.0)
    yield cmd.SetTimer(timer=f"run:{plan.epoch.to}", at_s=state.at_s + patience_s)
    for wait_s in sorted(waits):
        # Told apart by its time: each wakes the run once, which then looks what may start.
        yield cmd.SetTimer(timer=f"quiesce:{plan.epoch.to}:{wait_s}", at_s=state.at_s + wait_s)
    latest = [s.latest_s for s in plan.steps if isinstance(s, Quiesce) and s.latest_s is not None]
    if latest:
        yield cmd.SetTimer(timer=f"latest:{plan.epoch.to}", at_s=state.at_s + min(latest))
    sources = {instance_of(s.source) for s in plan.steps if isinstance(s, CopyKvDelta)}
    deadlines = [at_s for name in sources if (at_s := state.instances[name].deadline_at_s) is not None]
    if deadlines:
        at_s = max(state.at_s, min(deadlines) - DEADLINE_MARGIN_S)
        yield cmd.SetTimer(timer=f"delta:{plan.epoch.to}", at_s=at_s)
    assert state.run is not None
    yield from _advance(state, state.run, state.run.plan.steps)


def drive_run(before: ClusterState, state: ClusterState, event: ev.Event) -> Iterator[cmd.Command]:
    """Drive the run: abort it, or start every step that may start, make durable, commit, finish."""
    run = state.run
    if run is None:
        return
    if isinstance(event, ev.CoordinatorRestarted):
        yield from _restart_run(state, run)
        return
    reason = _abort_reason(state, run, event)
    if reason is not None:
        yield from _abort(state, run, reason)
        return
    yield from _release_again(state, run, event)
    if run.committed and before.run is not None and before.run.committed:
        yield from _admit_moved(state, run, lambda replica: _kv_arrived(run, replica, before=before.run))
    yield from _advance(state, run, _enabled_by(run.plan, event))


def _release_again(state: ClusterState, run: PlanRun, event: ev.Event) -> Iterator[cmd.Command]:
    """Ask again for a release that failed, later each time: else its worker would keep that memory for ever."""
    if isinstance(event, ev.StepFailed) and event.epoch == run.epoch and event.step in run.failed_releases:
        if run.steps[event.step] == "running":
            delay_s = RELEASE_AGAIN_S * 2.0 ** (run.failed_releases[event.step] - 1)
            yield cmd.SetTimer(timer=f"release:{run.epoch}:{event.step}", at_s=state.at_s + delay_s)
    elif isinstance(event, ev.TimerFired) and event.timer.startswith(f"release:{run.epoch}:"):
        name = event.timer.rpartition(":")[2]
        step = next(step for step in run.plan.steps if step.id == name)
        if run.steps[step.id] == "running":
            yield _execution(state, run, step)


def _enabled_by(plan: Plan, event: ev.Event) -> Sequence[Step]:
    """The steps that an event may let start, in the plan's order: all, but after a single step's end.

    A plan of a thousand GPUs has tens of thousands of steps, and as many of these events.
    """
    if not isinstance(event, ev.StepDone | ev.Quiesced) or event.epoch != plan.epoch.to:
        return plan.steps
    return [plan.steps[index] for index in plan.followers.get(event.step, plan.stops)]


def _restart_run(state: ClusterState, run: PlanRun) -> Iterator[cmd.Command]:
    """Before its commit a run dies with its coordinator; after it, what was under way is asked for again."""
    if not run.committed:
        yield from _abort(state, run, "coordinator restarted")
        return
    for step in run.plan.steps:
        if run.steps[step.id] == "running":
            yield _execution(state, run, step)
    yield from _admit_moved(state, run, lambda replica: _kv_arrived(run, replica))
    yield from _advance(state, run, run.plan.steps)


def _abort_reason(state: ClusterState, run: PlanRun, event: ev.Event) -> str | None:
    if run.committed:
        return None
    if state.trigger in ("notice", "lost"):
        return state.trigger
    if isinstance(event, ev.StepFailed) and event.epoch == run.epoch:
        step = next((s for s in run.plan.steps if s.id == event.step), None)
        if step is not None and step.kind not in ("copy_kv", "copy_kv_delta"):
            return f"step {event.step} failed: {event.error}"
    if isinstance(event, ev.TimerFired) and event.timer == f"run:{run.epoch}":
        return "run took too long"
    if any(e.state == "lost" and e.replica.generation == run.epoch for e in state.replicas.values()):
        return "lost"
    return None


def _abort(state: ClusterState, run: PlanRun, reason: str) -> Iterator[cmd.Command]:
    # One that was asked to quiesce and has not answered may stop at any moment: it is told to go on as well.
    asked = {step.replica for step in run.plan.steps if isinstance(step, Quiesce) and run.steps[step.id] != "pending"}
    resume = tuple(
        (name, entry.replica.generation)
        for name, entry in state.replicas.items()
        if entry.state == "quiesced" or (entry.state == "serving" and name in asked)
    )
    yield cmd.AbortRun(epoch=run.epoch, reason=reason, resume=resume)
    if state.trigger is None:
        yield cmd.SetTimer(timer="replan", at_s=retry_at_s(state))


def _advance(state: ClusterState, run: PlanRun, steps: Sequence[Step]) -> Iterator[cmd.Command]:
    """Everything that can happen now, of these steps; one that ends at once lets the next begin in the same entry."""
    for step in steps:
        if step.kind in ("commit", "recompute") or run.steps[step.id] != "pending":
            continue
        if _may_start(run, step) and _is_time(state, run, step):
            command = _execution(state, run, step)
            yield command
            state = record(state, command)
            assert state.run is not None
            run = state.run
    if run.durability == "wanted" and _all(run, "quiesce"):
        yield cmd.MakeDurable(epoch=run.epoch, positions=run.positions)
        return
    if not run.committed and run.durability == "durable" and _commit_ready(run):
        commit = _commit(state, run)
        yield commit
        state = record(state, commit)
        assert state.run is not None
        committed = state.run
        yield from _admit_moved(state, committed, lambda replica: _kv_arrived(committed, replica))
        yield from _advance(state, committed, committed.plan.steps)
        return
    if run.committed and all(status in ("done", "late") for status in run.steps.values()):
        yield cmd.FinishRun(epoch=run.epoch)


def _settled(run: PlanRun, step_id: StepId) -> bool:
    return run.steps.get(step_id) in ("done", "late")


def _is_time(state: ClusterState, run: PlanRun, step: Step) -> bool:
    """A quiesce waits for requests that end before it; whatever else is ready starts."""
    return not isinstance(step, Quiesce) or state.at_s >= run.begun_at_s + step.not_before_s


def _may_start(run: PlanRun, step: Step) -> bool:
    return all(_settled(run, name) for name in step.depends_on)


def _all(run: PlanRun, kind: str) -> bool:
    return all(_settled(run, step.id) for step in run.plan.steps if step.kind == kind)


def _commit_ready(run: PlanRun) -> bool:
    commits = [step for step in run.plan.steps if step.kind == "commit"]
    return all(_may_start(run, step) for step in commits)


def _execution(state: ClusterState, run: PlanRun, step: Step) -> cmd.ExecuteStep:
    manifest: tuple[ChoicePosition, ...] = ()
    admissions: tuple[cmd.Admission, ...] = ()
    if isinstance(step, CopyKvDelta):
        manifest = _manifest(state, run, step.route)
    if step.kind == "activate":
        admissions = _admissions_of(state, run, step.replica)
    return cmd.ExecuteStep(epoch=run.epoch, step=step, manifest=manifest, admissions=admissions)


def _manifest(state: ClusterState, run: PlanRun, route: KvRoute) -> tuple[ChoicePosition, ...]:
    """Positions of the open requests of one quiesced replica; after the commit (in_place) of those that moved."""
    owner = route.to_replica if run.committed else route.from_replica
    return tuple(
        p
        for p in run.positions
        if run.sources.get(p.request) == route.from_replica
        and p.request in state.requests
        and state.requests[p.request].replica == owner
    )


def _admissions_of(state: ClusterState, run: PlanRun, replica: ReplicaId) -> tuple[cmd.Admission, ...]:
    """The requests that the commit gave to `replica`, with the KV that moved."""
    missing = set(run.missing)
    admissions = []
    for request in by_arrival(state.requests.values()):
        if request.replica != replica or not has_moved(state, request):
            continue  # What was admitted here anew starts from the ledger: none of its KV is here.
        choices = tuple(p for p in run.positions if p.request == request.id and (p.request, p.choice) not in missing)
        admissions.append(cmd.Admission(request=request.id, kv_generation=request.kv_generation, choices=choices))
    return tuple(admissions)


def _commit(state: ClusterState, run: PlanRun) -> cmd.CommitRun:
    """Who owns what from now on: moved requests with their KV, all others nobody until they are admitted again."""
    missing = set(run.missing)
    targets = {replica.id: replica for replica in run.plan.target.replicas}
    owners: list[cmd.OwnerChange] = []
    moved: list[cmd.Admission] = []
    recomputed: list[RequestId] = []
    for entry in state.replicas.values():
        if entry.state != "quiesced":
            continue
        for request in state.requests_of(entry.replica.id, entry.replica.generation):
            target = _target_of(run.plan, request, entry.replica.id)
            positions = [p for p in run.positions if p.request == request.id]
            kept = tuple(p for p in positions if (p.request, p.choice) not in missing)
            if target is None or target not in targets or not kept:
                owners.append(cmd.OwnerChange(request=request.id, replica=None, generation=0))
                recomputed.append(request.id)
                continue
            generation = targets[target].generation
            owners.append(cmd.OwnerChange(request=request.id, replica=target, generation=generation))
            generations = 0 if len(kept) == request.num_choices else KV_GENERATIONS_PER_ADMISSION
            kv_generation = request.kv_generation + generations
            moved.append(cmd.Admission(request=request.id, kv_generation=kv_generation, choices=kept))
    return cmd.CommitRun(
        epoch=run.epoch,
        owners=tuple(owners),
        moved=tuple(moved),
        recomputed=tuple(recomputed),
    )


def _target_of(plan: Plan, request: Request, replica: ReplicaId) -> ReplicaId | None:
    """Where a request's KV goes: its own action, else its replica's route. None: nowhere, it is recomputed."""
    for action in plan.requests:
        if action.request == request.id:
            return action.to_replica if action.action == "move" else None
    routed = [route.to_replica for route in plan.routes if route.from_replica == replica]
    copied = {s.route.to_replica for s in plan.steps if s.kind == "copy_kv_delta" and s.route.from_replica == replica}
    return next((name for name in routed if name in copied), None)


def _admit_moved(state: ClusterState, run: PlanRun, is_due: Callable[[ReplicaId], bool]) -> Iterator[cmd.Command]:
    """Requests that moved into an untouched replica go to its leader; new replicas get theirs by `activate`."""
    for replica in run.plan.target.replicas:
        if replica.generation == run.epoch or not is_due(replica.id):
            continue
        admissions = tuple(_renamed(state, admission) for admission in _admissions_of(state, run, replica.id))
        if admissions:
            yield cmd.AdmitRequests(replica=replica.id, generation=replica.generation, admissions=admissions)


def _kv_arrived(run: PlanRun, replica: ReplicaId, *, before: PlanRun | None = None) -> bool:
    """Whether all KV for a replica has come or never will; with `before`, whether the last of it just did."""
    deltas = [s for s in run.plan.steps if isinstance(s, CopyKvDelta) and s.route.to_replica == replica]
    if not all(_settled(run, step.id) for step in deltas):
        return False
    return before is None or not all(_settled(before, step.id) for step in deltas)


def _renamed(state: ClusterState, admission: cmd.Admission) -> cmd.Admission:
    """Choices whose KV did not come start under another name of it: the part that came is nobody's."""
    request = state.requests[admission.request]
    if len(admission.choices) == request.num_choices:
        return admission
    return admission.model_copy(update={"kv_generation": request.kv_generation + KV_GENERATIONS_PER_ADMISSION})
