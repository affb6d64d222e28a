"""The order rules of a plan: its steps form a DAG, none is missing or doubled, and doomed sources are read in time."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence

from spotserve.core.finding import Facts, Finding
from spotserve.core.ids import GpuId, InstanceId, ReplicaId, StepId, instance_of
from spotserve.core.plan import (
    Activate,
    Commit,
    CopyKv,
    CopyKvDelta,
    CopyWeights,
    JoinGroup,
    LoadWeights,
    Quiesce,
    Recompute,
    Release,
    Reserve,
    Step,
)

TIME_TOLERANCE_S = 1e-6


def check_graph(facts: Facts) -> Iterator[Finding]:
    """Ids are unique, dependencies exist, nothing waits for itself."""
    counts = Counter(step.id for step in facts.plan.steps)
    for name in sorted(name for name, count in counts.items() if count > 1):
        yield Finding(code="duplicate_step", step=name, path="steps", message=f"{counts[name]} steps are called {name}")
    for number, step in enumerate(facts.plan.steps):
        for before in step.depends_on:
            if before not in counts:
                message = f"it depends on {before}, which is not in the plan"
                yield Finding(code="missing_step", step=step.id, path=f"steps[{number}].depends_on", message=message)
    stuck = {step.id for step in facts.plan.steps} - {step.id for step in facts.in_order}
    if stuck:
        first = next(step.id for step in facts.plan.steps if step.id in stuck)
        message = f"{len(stuck)} steps wait for each other: {', '.join(sorted(stuck)[:8])}"
        yield Finding(code="cycle", step=first, path="steps", message=message)


def check_doubles(facts: Facts) -> Iterator[Finding]:
    """No step does again what another one has done."""
    seen: dict[tuple[object, ...], StepId] = {}
    for number, step in enumerate(facts.plan.steps):
        key = _effect(step)
        if key is not None and key in seen:
            message = f"it does what {seen[key]} does: {step.kind}"
            yield Finding(code="duplicate_step", step=step.id, path=f"steps[{number}]", message=message)
        elif key is not None:
            seen[key] = step.id


def _effect(step: Step) -> tuple[object, ...] | None:
    """What makes two steps the same one."""
    if isinstance(step, Reserve):
        return step.kind, step.workers[0]
    if isinstance(step, JoinGroup | Activate | Quiesce):
        return step.kind, step.replica
    if isinstance(step, Commit):
        return (step.kind,)
    if isinstance(step, CopyKvDelta):
        return step.kind, step.source, step.destination, step.route
    if isinstance(step, Release) and step.kv:
        return step.kind, step.workers[0], step.replica
    return None


def check_missing(facts: Facts) -> Iterator[Finding]:
    """Commit, quiesce, and what every new position, replica and copy needs."""
    if not facts.plan.steps:
        changed = facts.fresh or facts.leaving
        if changed:
            yield Finding(code="missing_step", path="steps", message="the layout changes but there are no steps")
        return
    kinds: dict[str, set[str]] = defaultdict(set)
    for step in facts.plan.steps:
        if isinstance(step, Reserve) or (isinstance(step, Release) and step.kv):
            kinds[step.kind].add(step.workers[0])
        elif isinstance(step, JoinGroup | Activate | Quiesce):
            kinds[step.kind].add(step.replica)
        elif isinstance(step, Recompute):
            kinds[step.kind].update(step.requests)
        else:
            kinds[step.kind].add("")
    wanted: list[tuple[str, str]] = [("commit", "")]
    wanted += [("quiesce", name) for name in facts.leaving if name not in facts.lost]
    wanted += [(kind, name) for name in facts.fresh for kind in ("join_group", "activate")]
    wanted += [("reserve", gpu) for gpu in facts.new_seat]
    wanted += [("release", gpu) for gpu in facts.old_seat if gpu in facts.living]
    wanted += [("recompute", action.request) for action in facts.plan.requests if action.action == "recompute"]
    for kind, name in wanted:
        if name not in kinds[kind]:
            message = f"there is no {kind}{f' of {name}' if name else ''}"
            yield Finding(code="missing_step", path="steps", message=message)
    yield from _strangers(facts)
    yield from _missing_deltas(facts)


def _missing_deltas(facts: Facts) -> Iterator[Finding]:
    """Each followed rectangle is completed once the source stands still, and nothing else is."""
    copies = {(s.source, s.destination, s.route): s.id for s in facts.plan.steps if isinstance(s, CopyKv)}
    deltas = {(s.source, s.destination, s.route): s.id for s in facts.plan.steps if isinstance(s, CopyKvDelta)}
    for key in copies.keys() - deltas.keys():
        message = f"no copy_kv_delta completes {copies[key]}"
        yield Finding(code="missing_step", step=copies[key], path="steps", message=message)
    for key in deltas.keys() - copies.keys():
        message = f"no copy_kv precedes {deltas[key]}"
        yield Finding(code="missing_step", step=deltas[key], path="steps", message=message)


def _strangers(facts: Facts) -> Iterator[Finding]:
    """Steps for workers that are gone, or for replicas that the plan does not know, help nobody."""
    for number, step in enumerate(facts.plan.steps):
        path = f"steps[{number}]"
        for gpu in _workers(step):
            if gpu not in facts.living:
                message = f"{gpu} is not there"
                yield Finding(code="not_a_holder", step=step.id, path=path, message=message)
        if isinstance(step, Reserve | JoinGroup | Activate | CopyWeights | LoadWeights):
            if step.replica not in facts.fresh:
                message = f"{step.replica} is not a new replica of the target"
                yield Finding(code="double_owner", step=step.id, path=path, message=message)
        elif isinstance(step, Quiesce | Release):
            yield from _old_position_named(facts, step, path)
        yield from _seat_named(facts, step, path)
    yield from _recomputed_once(facts)


def _old_position_named(facts: Facts, step: Quiesce | Release, path: str) -> Iterator[Finding]:
    """The leader stops its replica; a rank frees what the generation it belonged to held."""
    replica = facts.leaving.get(step.replica)
    if replica is None:
        message = f"{step.replica} is not a replica that leaves"
    elif isinstance(step, Quiesce) and step.workers[0] != replica.leader:
        message = f"{step.workers[0]} does not lead {replica.id}, {replica.leader} does"
    elif isinstance(step, Release) and step.workers[0] not in replica.gpus:
        message = f"{step.workers[0]} has no position in {replica.id}"
    elif isinstance(step, Release) and step.generation != replica.generation:
        message = f"generation {step.generation} is not {replica.id}'s {replica.generation}"
    else:
        return
    yield Finding(code="double_owner", step=step.id, path=path, message=message)


def _recomputed_once(facts: Facts) -> Iterator[Finding]:
    """A request is prefilled again by one step, and only where the plan says so of it."""
    due = {action.request for action in facts.plan.requests if action.action == "recompute"}
    for number, step in enumerate(facts.plan.steps):
        if not isinstance(step, Recompute):
            continue
        for request in step.requests:
            if request not in due:
                message = f"request {request} is not one to be recomputed, or is recomputed twice"
                yield Finding(code="double_owner", step=step.id, path=f"steps[{number}].requests", message=message)
            due.discard(request)


def _seat_named(facts: Facts, step: Step, path: str) -> Iterator[Finding]:
    """A step that names positions names those of the target; generations are the plan's."""
    if not isinstance(step, Reserve | JoinGroup | Activate) or step.replica not in facts.fresh:
        return
    replica = facts.fresh[step.replica]
    if isinstance(step, Reserve):
        stages = replica.stages
        ranks = stages[step.stage].gpus if 0 <= step.stage < len(stages) else ()
        if not 0 <= step.rank < len(ranks) or ranks[step.rank] != step.workers[0]:
            message = f"stage {step.stage} rank {step.rank} of {replica.id} is not {step.workers[0]}"
            yield Finding(code="double_owner", step=step.id, path=path, message=message)
    if isinstance(step, JoinGroup | Activate) and step.workers != replica.gpus:
        message = f"{step.kind} names {len(step.workers)} workers, not the {len(replica.gpus)} of {replica.id} in order"
        yield Finding(code="double_owner", step=step.id, path=path, message=message)
    if step.generation != replica.generation:
        message = f"generation {step.generation} is not {replica.id}'s {replica.generation}"
        yield Finding(code="double_owner", step=step.id, path=path, message=message)


def _workers(step: Step) -> tuple[GpuId, ...]:
    if isinstance(step, CopyWeights | CopyKv | CopyKvDelta):
        return step.source, step.destination
    if isinstance(step, Commit | Recompute):
        return ()
    return step.workers


def check_mode(facts: Facts) -> Iterator[Finding]:
    """What must come before what; a plan on a cycle is not judged twice."""
    if len(facts.in_order) < len(facts.plan.steps):
        return
    commit = next((step for step in facts.plan.steps if isinstance(step, Commit)), None)
    if commit is None:
        return
    yield from _around_commit(facts, commit)
    yield from _preparation(facts)
    yield from _activation(facts)


def _around_commit(facts: Facts, commit: Commit) -> Iterator[Finding]:
    """Live: only cut-over and clean-up behind the commit. In place: only the stop before it."""
    behind: tuple[type, ...] = (Activate, Recompute, Release)
    if facts.plan.mode == "in_place":
        behind = (*behind, Reserve, CopyWeights, LoadWeights, CopyKv, CopyKvDelta, JoinGroup)
    for number, step in enumerate(facts.plan.steps):
        if step is commit:
            continue
        if isinstance(step, behind):
            if not facts.follows(step, commit):
                message = f"{step.kind} does not wait for the commit {commit.id} in {facts.plan.mode} mode"
                yield Finding(code="wrong_order", step=step.id, path=f"steps[{number}]", message=message)
        elif not facts.follows(commit, step):
            message = f"the commit {commit.id} does not wait for {step.kind} in {facts.plan.mode} mode"
            yield Finding(code="wrong_order", step=step.id, path=f"steps[{number}]", message=message)


def _preparation(facts: Facts) -> Iterator[Finding]:
    """Memory before content and meshes, copies before the delta, the stop before the delta."""
    reserves = {step.workers[0]: step for step in facts.plan.steps if isinstance(step, Reserve)}
    stops = {step.replica: step for step in facts.plan.steps if isinstance(step, Quiesce)}
    copies = {(s.source, s.destination, s.route): s for s in facts.plan.steps if isinstance(s, CopyKv)}
    kinds = (Reserve, CopyWeights, LoadWeights, CopyKv, JoinGroup)
    prepared = [step for step in facts.plan.steps if isinstance(step, kinds)]
    mask = facts.mask(prepared)
    for number, step in enumerate(facts.plan.steps):
        before: list[Step] = []
        if isinstance(step, CopyWeights | CopyKv) and step.destination in reserves:
            before.append(reserves[step.destination])
        elif isinstance(step, LoadWeights | JoinGroup):
            before += [reserves[gpu] for gpu in step.workers if gpu in reserves]
        elif isinstance(step, CopyKvDelta):
            copy = copies.get((step.source, step.destination, step.route))
            stop = stops.get(step.route.from_replica)
            before += [earlier for earlier in (copy, stop) if earlier is not None]
        elif isinstance(step, Quiesce) and facts.plan.mode == "live":
            before += facts.unawaited(step, prepared, mask)
        for earlier in before:
            if not facts.follows(step, earlier):
                message = f"{step.kind} does not wait for {earlier.kind} {earlier.id}"
                yield Finding(code="wrong_order", step=step.id, path=f"steps[{number}]", message=message)


def _activation(facts: Facts) -> Iterator[Finding]:
    """A replica serves once its ranks have all of their content and their mesh; live frees after that."""
    activates = [step for step in facts.plan.steps if isinstance(step, Activate)]
    mask = facts.mask(activates)
    content: dict[ReplicaId, list[Step]] = defaultdict(list)
    for step in facts.plan.steps:
        if isinstance(step, CopyWeights | LoadWeights | JoinGroup):
            content[step.replica].append(step)
        elif isinstance(step, CopyKv | CopyKvDelta):
            content[step.route.to_replica].append(step)
    for number, step in enumerate(facts.plan.steps):
        before: Sequence[Step] = ()
        if isinstance(step, Activate):
            before = content[step.replica]
        elif isinstance(step, Recompute) or (isinstance(step, Release) and facts.plan.mode == "live"):
            before = facts.unawaited(step, activates, mask)
        for earlier in before:
            if not facts.follows(step, earlier):
                message = f"{step.kind} does not wait for {earlier.kind} {earlier.id}"
                yield Finding(code="wrong_order", step=step.id, path=f"steps[{number}]", message=message)


def check_deadline(facts: Facts) -> Iterator[Finding]:
    """Every read of a doomed instance ends within its grace period: by path, and by the bytes through each port."""
    finish: dict[StepId, float] = {}
    for step in facts.in_order:
        begin = max([finish.get(before, 0.0) for before in step.depends_on], default=0.0)
        if isinstance(step, Quiesce):
            begin = max(begin, step.not_before_s)
        finish[step.id] = begin + _least_seconds(facts, step)
    numbers = {step.id: number for number, step in enumerate(facts.plan.steps)}
    for step in facts.in_order:
        path = f"steps[{numbers[step.id]}]"
        if isinstance(step, CopyWeights | CopyKv | CopyKvDelta):
            left = facts.doomed.get(step.source)
            if left is not None and finish[step.id] > left + TIME_TOLERANCE_S:
                message = f"it reads {step.source} until {finish[step.id]:.3f} s, {left:g} s are left"
                yield Finding(code="past_deadline", step=step.id, path=path, message=message)
        elif isinstance(step, Quiesce):
            yield from _stop_in_time(facts, step, path)
    yield from _ports_in_time(facts)


def _stop_in_time(facts: Facts, step: Quiesce, path: str) -> Iterator[Finding]:
    replica = facts.leaving.get(step.replica)
    known = [facts.doomed.get(gpu) for gpu in (replica.gpus if replica is not None else ())]
    left = min((seconds for seconds in known if seconds is not None), default=None)
    if step.latest_s is not None and step.not_before_s > step.latest_s + TIME_TOLERANCE_S:
        message = f"not before {step.not_before_s:g} s and at the latest at {step.latest_s:g} s cannot both hold"
        yield Finding(code="past_deadline", step=step.id, path=path, message=message)
    if left is not None and (step.latest_s is None or step.latest_s > left + TIME_TOLERANCE_S):
        message = f"{step.replica} may go on until {step.latest_s} s, {left:g} s are left"
        yield Finding(code="past_deadline", step=step.id, path=path, message=message)


def _ports_in_time(facts: Facts) -> Iterator[Finding]:
    """A port that doomed reads pass cannot carry faster than the link what must have passed by any deadline."""
    passing: dict[tuple[str, InstanceId], dict[float, int]] = defaultdict(lambda: defaultdict(int))
    for step in facts.plan.steps:
        if not isinstance(step, CopyWeights | CopyKv | CopyKvDelta):
            continue
        grace = facts.doomed.get(step.source)
        source, destination = instance_of(step.source), instance_of(step.destination)
        if grace is None or source == destination:
            continue
        size = _moved_bytes(facts, step)
        passing["sends", source][grace] += size
        passing["receives", destination][grace] += size
    rate = facts.plan.spec.profile.link_bytes_per_s
    for name, port in sorted(passing):
        due = 0
        for left, size in sorted(passing[name, port].items()):
            due += size
            if due / rate > left + TIME_TOLERANCE_S:
                message = f"{port} {name} {due} bytes of doomed instances, {left:g} s are left"
                yield Finding(code="past_deadline", path="steps", message=message)
                break


def _least_seconds(facts: Facts, step: Step) -> float:
    """The least time a step can take: bytes over the profile's rate."""
    profile = facts.plan.spec.profile
    if isinstance(step, LoadWeights):
        return _known_bytes(facts, step) / profile.storage_bytes_per_s
    if isinstance(step, CopyWeights | CopyKv | CopyKvDelta) and step.source != step.destination:
        return _moved_bytes(facts, step) / profile.link_bytes_per_s
    return 0.0


def _known_bytes(facts: Facts, step: CopyWeights | LoadWeights) -> int:
    try:
        return facts.slice_bytes(step.slices)
    except KeyError:
        return step.bytes  # An unknown parameter has its own finding.


def _moved_bytes(facts: Facts, step: CopyWeights | CopyKv | CopyKvDelta) -> int:
    """Bytes that a copy moves: of its slices or of the requests that move, or what it claims if that is more."""
    if isinstance(step, CopyWeights):
        return max(step.bytes, _known_bytes(facts, step))
    tokens, choices = facts.moving_tokens(step.route.from_replica)
    count = tokens if isinstance(step, CopyKv) else choices * facts.plan.spec.limits.kv_block_tokens
    return max(step.bytes, count * facts.token_bytes(step.route.layers, step.route.kv_heads))
