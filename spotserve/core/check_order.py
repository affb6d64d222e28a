"""The order rules of a plan: its steps form a DAG, none is missing or doubled, and doomed sources are read in time."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator

from spotserve.core.finding import Facts, Finding, rectangle
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
    known = set(counts)
    for number, step in enumerate(facts.plan.steps):
        for before in () if known.issuperset(step.depends_on) else step.depends_on:
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
    for number, step, effect in _effects(facts):
        if effect in seen:
            message = f"it does what {seen[effect]} does: {step.kind}"
            yield Finding(code="duplicate_step", step=step.id, path=f"steps[{number}]", message=message)
        else:
            seen[effect] = step.id


def _effects(facts: Facts) -> Iterator[tuple[int, Step, tuple[object, ...]]]:
    """Number, step and what makes it the same as another one; copies and loads are judged by what they bring."""
    for number, commit in facts.of(Commit):
        yield number, commit, (commit.kind,)
    for number, reserve in facts.of(Reserve):
        yield number, reserve, (reserve.kind, reserve.workers[0])
    for number, step in facts.of(JoinGroup, Activate, Quiesce):
        yield number, step, (step.kind, step.replica)
    for number, delta in facts.of(CopyKvDelta):
        yield number, delta, (delta.kind, rectangle(delta))
    for number, release in facts.of(Release):
        if release.kv:
            yield number, release, (release.kind, release.workers[0], release.replica)


def check_missing(facts: Facts) -> Iterator[Finding]:
    """Commit, quiesce, and what every new position, replica and copy needs."""
    if not facts.plan.steps:
        changed = facts.fresh or facts.leaving
        if changed:
            yield Finding(code="missing_step", path="steps", message="the layout changes but there are no steps")
        return
    recomputed = [action.request for action in facts.plan.requests if action.action == "recompute"]
    alive = [gpu for gpu in facts.old_seat if gpu in facts.living]
    standing = [name for name in facts.leaving if name not in facts.lost]
    wanted: tuple[tuple[str, Iterable[str], set[str]], ...] = (
        ("commit", [""], {"" for _ in facts.of(Commit)}),
        ("quiesce", standing, {step.replica for _, step in facts.of(Quiesce)}),
        ("join_group", facts.fresh, {step.replica for _, step in facts.of(JoinGroup)}),
        ("activate", facts.fresh, {step.replica for _, step in facts.of(Activate)}),
        ("reserve", facts.new_seat, {step.workers[0] for _, step in facts.of(Reserve)}),
        ("release", alive, {step.workers[0] for _, step in facts.of(Release) if step.kv}),
        ("recompute", recomputed, {name for _, step in facts.of(Recompute) for name in step.requests}),
    )
    for kind, names, done in wanted:
        for name in names:
            if name not in done:
                message = f"there is no {kind}{f' of {name}' if name else ''}"
                yield Finding(code="missing_step", path="steps", message=message)
    yield from _strangers(facts)
    yield from _missing_deltas(facts)


def _missing_deltas(facts: Facts) -> Iterator[Finding]:
    """Each followed rectangle is completed once the source stands still, and nothing else is."""
    copies = {rectangle(step): step.id for _, step in facts.of(CopyKv)}
    deltas = {rectangle(step): step.id for _, step in facts.of(CopyKvDelta)}
    for copied, name in copies.items():
        if copied not in deltas:
            yield Finding(code="missing_step", step=name, path="steps", message=f"no copy_kv_delta completes {name}")
    for completed, name in deltas.items():
        if completed not in copies:
            yield Finding(code="missing_step", step=name, path="steps", message=f"no copy_kv precedes {name}")


def _strangers(facts: Facts) -> Iterator[Finding]:
    """Steps for workers that are gone, or for replicas that the plan does not know, help nobody."""
    for number, copy in facts.of(CopyWeights, CopyKv, CopyKvDelta):
        if copy.source not in facts.living or copy.destination not in facts.living:
            yield from _absent(facts, copy, number, copy.source, copy.destination)
    for number, step in facts.of(Reserve, LoadWeights, JoinGroup, Quiesce, Activate):
        yield from _absent(facts, step, number, *step.workers)
    for number, release in facts.of(Release):
        yield from _absent(facts, release, number, *release.workers)
    for number, new in facts.of(Reserve, JoinGroup, Activate, CopyWeights, LoadWeights):
        if new.replica not in facts.fresh:
            message = f"{new.replica} is not a new replica of the target"
            yield Finding(code="double_owner", step=new.id, path=f"steps[{number}]", message=message)
    for number, last in facts.of(Quiesce, Release):
        if isinstance(last, Release) and last.replica in facts.fresh:
            yield from _room_made(facts, last, number)
        else:
            yield from _old_position_named(facts, last, number)
    for number, one in facts.of(Reserve, JoinGroup, Activate):
        if one.replica in facts.fresh:
            yield from _seat_named(facts, one, number)
    yield from _recomputed_once(facts)


def _absent(facts: Facts, step: Step, number: int, *workers: GpuId) -> Iterator[Finding]:
    for gpu in workers:
        if gpu not in facts.living:
            message = f"{gpu} is not there"
            yield Finding(code="not_a_holder", step=step.id, path=f"steps[{number}]", message=message)


def _old_position_named(facts: Facts, step: Quiesce | Release, number: int) -> Iterator[Finding]:
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
    yield Finding(code="double_owner", step=step.id, path=f"steps[{number}]", message=message)


def _room_made(facts: Facts, step: Release, number: int) -> Iterator[Finding]:
    """Left-over weights go for a new position of a GPU that has no old one: there they go with the last release."""
    replica = facts.fresh[step.replica]
    gpu = step.workers[0]
    if gpu not in replica.gpus:
        message = f"{gpu} has no position in {replica.id}"
    elif gpu in facts.old_seat:
        message = f"{gpu} frees what belongs to {facts.old_seat[gpu].replica} in the name of {replica.id}"
    elif step.kv or step.keep_blocks is not None:
        message = f"{gpu} has no old KV pool to free for {replica.id}"
    elif step.generation != replica.generation:
        message = f"generation {step.generation} is not {replica.id}'s {replica.generation}"
    else:
        return
    yield Finding(code="double_owner", step=step.id, path=f"steps[{number}]", message=message)


def _recomputed_once(facts: Facts) -> Iterator[Finding]:
    """A request is prefilled again by one step, and only where the plan says so of it."""
    due = {action.request for action in facts.plan.requests if action.action == "recompute"}
    for number, step in facts.of(Recompute):
        for request in step.requests:
            if request not in due:
                message = f"request {request} is not one to be recomputed, or is recomputed twice"
                yield Finding(code="double_owner", step=step.id, path=f"steps[{number}].requests", message=message)
            due.discard(request)


def _seat_named(facts: Facts, step: Reserve | JoinGroup | Activate, number: int) -> Iterator[Finding]:
    """A step that names positions names those of the target; generations are the plan's."""
    replica = facts.fresh[step.replica]
    if isinstance(step, Reserve):
        stages = replica.stages
        ranks = stages[step.stage].gpus if 0 <= step.stage < len(stages) else ()
        if not 0 <= step.rank < len(ranks) or ranks[step.rank] != step.workers[0]:
            message = f"stage {step.stage} rank {step.rank} of {replica.id} is not {step.workers[0]}"
            yield Finding(code="double_owner", step=step.id, path=f"steps[{number}]", message=message)
    elif step.workers != replica.gpus:
        message = f"{step.kind} names {len(step.workers)} workers, not the {len(replica.gpus)} of {replica.id} in order"
        yield Finding(code="double_owner", step=step.id, path=f"steps[{number}]", message=message)
    if step.generation != replica.generation:
        message = f"generation {step.generation} is not {replica.id}'s {replica.generation}"
        yield Finding(code="double_owner", step=step.id, path=f"steps[{number}]", message=message)


def check_mode(facts: Facts) -> Iterator[Finding]:
    """What must come before what; a plan on a cycle is not judged twice."""
    if len(facts.in_order) < len(facts.plan.steps):
        return
    commits = facts.of(Commit)
    if not commits:
        return
    yield from _around_commit(facts, commits[0][1])
    yield from _preparation(facts)
    yield from _activation(facts)


def _around_commit(facts: Facts, commit: Commit) -> Iterator[Finding]:
    """Live: only cut-over and clean-up behind the commit. In place: only the stop before it."""
    behind: set[type] = {Activate, Recompute, Release}
    if facts.plan.mode == "in_place":
        behind |= {Reserve, CopyWeights, LoadWeights, CopyKv, CopyKvDelta, JoinGroup}
    for number, step in enumerate(facts.plan.steps):
        if step is commit:
            continue
        if type(step) in behind:
            if not facts.follows(step, commit):
                message = f"{step.kind} does not wait for the commit {commit.id} in {facts.plan.mode} mode"
                yield Finding(code="wrong_order", step=step.id, path=f"steps[{number}]", message=message)
        elif not facts.follows(commit, step):
            message = f"the commit {commit.id} does not wait for {step.kind} in {facts.plan.mode} mode"
            yield Finding(code="wrong_order", step=step.id, path=f"steps[{number}]", message=message)


def _preparation(facts: Facts) -> Iterator[Finding]:
    """Memory before content and meshes, copies before the delta, the stop before the delta."""
    reserves = {step.workers[0]: step for _, step in facts.of(Reserve)}
    stops = {step.replica: step for _, step in facts.of(Quiesce)}
    copies = {rectangle(step): step for _, step in facts.of(CopyKv)}
    for number, copy in facts.of(CopyWeights, CopyKv):
        if copy.destination in reserves and not facts.follows(copy, reserves[copy.destination]):
            yield _too_early(copy, number, reserves[copy.destination])
    for number, step in facts.of(LoadWeights, JoinGroup):
        for reserve in facts.unawaited(step, [reserves[gpu] for gpu in step.workers if gpu in reserves]):
            yield _too_early(step, number, reserve)
    for number, delta in facts.of(CopyKvDelta):
        for earlier in (copies.get(rectangle(delta)), stops.get(delta.route.from_replica)):
            if earlier is not None and not facts.follows(delta, earlier):
                yield _too_early(delta, number, earlier)
    if facts.plan.mode == "live":
        prepared = [one for _, one in facts.of(Reserve, CopyWeights, LoadWeights, CopyKv, JoinGroup)]
        mask = facts.mask(prepared)
        for number, stop in facts.of(Quiesce):
            for preparation in facts.unawaited(stop, prepared, mask):
                yield _too_early(stop, number, preparation)


def _too_early(step: Step, number: int, earlier: Step) -> Finding:
    """A step may begin before another one is done."""
    message = f"{step.kind} does not wait for {earlier.kind} {earlier.id}"
    return Finding(code="wrong_order", step=step.id, path=f"steps[{number}]", message=message)


def _activation(facts: Facts) -> Iterator[Finding]:
    """A replica serves once its ranks have all of their content and their mesh; live frees after that."""
    content: dict[ReplicaId, list[Step]] = defaultdict(list)
    for _, step in facts.of(CopyWeights, LoadWeights, JoinGroup):
        content[step.replica].append(step)
    for _, copy in facts.of(CopyKv, CopyKvDelta):
        content[copy.route.to_replica].append(copy)
    for number, activate in facts.of(Activate):
        for part in facts.unawaited(activate, content[activate.replica]):
            yield _too_early(activate, number, part)
    activates = [one for _, one in facts.of(Activate)]
    mask = facts.mask(activates)
    for number, last in facts.of(Recompute, Release):
        if isinstance(last, Recompute) or facts.plan.mode == "live":
            for earlier in facts.unawaited(last, activates, mask):
                yield _too_early(last, number, earlier)


def check_deadline(facts: Facts) -> Iterator[Finding]:
    """Every read of a doomed instance ends within its grace period: by path, and by the bytes through each port."""
    finish = _earliest_finish(facts)
    numbers = {step.id: number for number, step in enumerate(facts.plan.steps)}
    for _, copy in facts.of(CopyWeights, CopyKv, CopyKvDelta):
        left = facts.doomed.get(copy.source)
        if left is not None and finish.get(copy.id, 0.0) > left + TIME_TOLERANCE_S:
            message = f"it reads {copy.source} until {finish[copy.id]:.3f} s, {left:g} s are left"
            path = f"steps[{numbers[copy.id]}]"
            yield Finding(code="past_deadline", step=copy.id, path=path, message=message)
    for _, stop in facts.of(Quiesce):
        if stop.id in finish:
            yield from _stop_in_time(facts, stop, f"steps[{numbers[stop.id]}]")
    yield from _ports_in_time(facts)


def _earliest_finish(facts: Facts) -> dict[StepId, float]:
    """When each step that is not on or behind a cycle can be done, each link and disk its own."""
    finish: dict[StepId, float] = {}
    begins: dict[tuple[StepId, ...], float] = {}
    for step in facts.in_order:
        begin = begins.get(step.depends_on)
        if begin is None:
            begin = max([finish.get(before, 0.0) for before in step.depends_on], default=0.0)
            if facts.has_unique_ids:
                begins[step.depends_on] = begin
        if isinstance(step, Quiesce):
            begin = max(begin, step.not_before_s)
        finish[step.id] = begin + _least_seconds(facts, step)
    return finish


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
    for _, step in facts.of(CopyWeights, CopyKv, CopyKvDelta):
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
    match step:
        case LoadWeights():
            return facts.slice_bytes(step.slices) / facts.plan.spec.profile.storage_bytes_per_s
        case CopyWeights() | CopyKv() | CopyKvDelta() if step.source != step.destination:
            return _moved_bytes(facts, step) / facts.plan.spec.profile.link_bytes_per_s
    return 0.0


def _moved_bytes(facts: Facts, step: CopyWeights | CopyKv | CopyKvDelta) -> int:
    """Bytes that a copy moves: of its slices or of the requests that move, or what it claims if that is more."""
    if isinstance(step, CopyWeights):
        return max(step.bytes, facts.slice_bytes(step.slices))
    tokens, choices = facts.moving_tokens(step.route.from_replica)
    count = tokens if isinstance(step, CopyKv) else choices * facts.plan.spec.limits.kv_block_tokens
    return max(step.bytes, count * facts.token_bytes(step.route.layers, step.route.kv_heads))
