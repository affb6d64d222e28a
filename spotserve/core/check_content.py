"""The content rules of a plan: every byte has a source, a place and one owner, and the memory to lie in."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

from spotserve.core.check_memory import worst_excess
from spotserve.core.check_world import most_ranks, well_formed
from spotserve.core.finding import Cells, Facts, Finding, Interval, Seat, add, minus, overlap
from spotserve.core.ids import GpuId, ReplicaId, StepId
from spotserve.core.plan import Activate, CopyKv, CopyKvDelta, CopyWeights, LoadWeights, Release, Reserve, Route, Step
from spotserve.core.slices import Slice, concrete_parameters, stage_shard
from spotserve.core.snapshot import ENDED_STATES, Replica, RequestProgress
from spotserve.core.spec import weight_copies

Taking = tuple[Step, int]
"""A step and the bytes that it takes of a GPU's memory, or gives back."""


def check_layout(facts: Facts) -> Iterator[Finding]:
    """Every replica of the target covers all layers once, on living GPUs, and no GPU sits in two positions."""
    seated: dict[GpuId, ReplicaId] = {}
    for number, replica in enumerate(facts.plan.target.replicas):
        path = f"target.replicas[{number}]"
        yield from _layers(facts, replica, path)
        for gpu in replica.gpus:
            if gpu in seated:
                yield Finding(
                    code="double_owner",
                    path=path,
                    message=f"{gpu} sits in a position of {seated[gpu]} and in one of {replica.id}",
                )
            seated[gpu] = replica.id
            if gpu not in facts.living:
                yield Finding(code="coverage_hole", path=path, message=f"{replica.id} needs {gpu}, which is not there")
            elif gpu in facts.doomed:
                yield Finding(code="coverage_hole", path=path, message=f"{replica.id} needs {gpu}, which is doomed")
        yield from _identity(facts, replica, path)


def _layers(facts: Facts, replica: Replica, path: str) -> Iterator[Finding]:
    runs = [stage.layers for stage in replica.stages]
    twice = overlap(runs)
    if twice is not None:
        message = f"layers {list(twice)} belong to two stages of {replica.id}"
        yield Finding(code="double_owner", path=path, message=message)
    for hole in minus([(0, facts.model.num_layers)], runs):
        message = f"layers {list(hole)} belong to no stage of {replica.id}"
        yield Finding(code="coverage_hole", path=path, message=message)
    if not well_formed(facts, replica):
        message = (
            f"stages of {replica.id} are not in layer order with one tensor degree of 1 to {most_ranks(facts.model)}"
        )
        yield Finding(code="corrupt", path=path, message=message)


def _identity(facts: Facts, replica: Replica, path: str) -> Iterator[Finding]:
    """An untouched replica is as it was; a new one has the generation of this epoch."""
    old = facts.before.get(replica.id)
    if old is not None and old != replica:
        message = f"{replica.id} keeps its id but is not the replica that runs"
        yield Finding(code="double_owner", path=path, message=message)
    if old is None and replica.generation != facts.plan.epoch.to:
        message = f"new replica {replica.id} has generation {replica.generation}, the epoch is {facts.plan.epoch.to}"
        yield Finding(code="stale", path=path, message=message)


def check_slices(facts: Facts) -> Iterator[Finding]:
    """Every slice names a range that the parameter table has."""
    whole = stage_shard(facts.model, layers=(0, facts.model.num_layers), tensor=1, rank=0)
    table = dict(concrete_parameters(facts.model, whole))
    for number, step in enumerate(facts.plan.steps):
        if not isinstance(step, CopyWeights | LoadWeights | Release):
            continue
        for piece in step.slices:
            parameter = table.get(piece.parameter)
            extent = 0 if parameter is None or parameter.dim != piece.dim else parameter.shape[piece.dim]
            if not 0 <= piece.start < piece.stop <= extent:
                message = f"the parameter table has no {piece.parameter}[{piece.dim}: {piece.start}, {piece.stop})"
                yield Finding(code="corrupt", step=step.id, path=f"steps[{number}].slices", message=message)


def check_bytes(facts: Facts) -> Iterator[Finding]:
    """The bytes that a step claims are those of its slices."""
    for number, step in enumerate(facts.plan.steps):
        if isinstance(step, CopyWeights | LoadWeights) and step.bytes != facts.slice_bytes(step.slices):
            message = f"{step.bytes} bytes are claimed, the slices have {facts.slice_bytes(step.slices)}"
            yield Finding(code="corrupt", step=step.id, path=f"steps[{number}].bytes", message=message)


def check_weights(facts: Facts) -> Iterator[Finding]:
    """What each new position needs is held or delivered exactly once, by someone who holds it."""
    released = _released_before_arrival(facts)
    delivered: dict[GpuId, Cells] = defaultdict(dict)
    for number, step in enumerate(facts.plan.steps):
        if isinstance(step, CopyWeights):
            yield from _source_holds(facts, step, f"steps[{number}]")
            add(delivered[step.destination], step.slices)
        elif isinstance(step, LoadWeights):
            add(delivered[step.workers[0]], step.slices)
    for gpu in sorted(delivered.keys() - facts.new_seat.keys()):
        yield Finding(
            code="double_owner", path="steps", message=f"{gpu} receives weights but has no position in a new replica"
        )
    for gpu, seat in facts.new_seat.items():
        needs, held, lacking = facts.needs(seat), facts.held.get(gpu, {}), facts.lacking(seat)[0]
        if gone := released.get(gpu):
            held = {key: minus(runs, gone.get(key, [])) for key, runs in held.items()}
            lacking = {key: minus(runs, held.get(key, [])) for key, runs in needs.items()}
        yield from _covered(needs, held, lacking, delivered.get(gpu, {}), gpu)


def _covered(needs: Cells, held: Cells, lacking: Cells, delivered: Cells, gpu: GpuId) -> Iterator[Finding]:
    """What a position lacks arrives, once, and nothing else does."""
    for key in sorted({*lacking, *delivered}):
        name = key[0]
        arriving = delivered.get(key, [])
        for hole in minus(lacking.get(key, []), arriving):
            message = f"nothing brings {name} [{hole[0]}, {hole[1]}) to {gpu}"
            yield Finding(code="coverage_hole", path="steps", message=message)
        twice = overlap([*arriving, *held.get(key, [])])
        if twice is not None:
            message = f"{name} [{twice[0]}, {twice[1]}) is delivered to {gpu} twice"
            yield Finding(code="double_owner", path="steps", message=message)
        for extra in minus(arriving, needs.get(key, [])):
            message = f"{name} [{extra[0]}, {extra[1]}) is delivered to {gpu} but belongs to another position"
            yield Finding(code="double_owner", path="steps", message=message)


def _source_holds(facts: Facts, step: CopyWeights, path: str) -> Iterator[Finding]:
    held = facts.held.get(step.source)
    if held is None:
        message = f"{step.source} holds no weights or is not there"
        yield Finding(code="not_a_holder", step=step.id, path=path, message=message)
        return
    for (name, dim), runs in facts.cells_of(step.slices).items():
        for start, stop in minus(runs, held.get((name, dim), [])):
            message = f"{step.source} does not hold {name} [{start}, {stop})"
            yield Finding(code="not_a_holder", step=step.id, path=path, message=message)
            return
    if step.source == step.destination:
        message = f"{step.source} copies weights to itself"
        yield Finding(code="double_owner", step=step.id, path=path, message=message)


def _released_before_arrival(facts: Facts) -> dict[GpuId, Cells]:
    """Weights that a GPU frees before its new position's weights arrive: they count as not held."""
    result: dict[GpuId, Cells] = {}
    reserves = {step.workers[0]: step for step in facts.plan.steps if isinstance(step, Reserve)}
    for step in facts.plan.steps:
        if isinstance(step, Release) and step.workers[0] in facts.new_seat:
            reserve = reserves.get(step.workers[0])
            if reserve is not None and facts.follows(reserve, step):
                add(result.setdefault(step.workers[0], {}), step.slices)
    return result


def check_releases(facts: Facts) -> Iterator[Finding]:
    """Nothing is freed that the new layout still needs, unless it arrives again, or before it has been read."""
    released = _released_before_arrival(facts)
    readers: dict[GpuId, list[CopyWeights]] = defaultdict(list)
    kv_readers: dict[tuple[GpuId, ReplicaId], list[CopyKv | CopyKvDelta]] = defaultdict(list)
    for step in facts.plan.steps:
        if isinstance(step, CopyWeights):
            readers[step.source].append(step)
        elif isinstance(step, CopyKv | CopyKvDelta):
            kv_readers[step.source, step.route.from_replica].append(step)
    freed_before: dict[GpuId, Cells] = defaultdict(dict)
    for number, step in enumerate(facts.plan.steps):
        if not isinstance(step, Release):
            continue
        gpu, path = step.workers[0], f"steps[{number}]"
        freed = facts.cells_of(step.slices)
        seat = facts.new_seat.get(gpu)
        needed = facts.needs(seat) if seat is not None else {}
        again, held, before = released.get(gpu, {}), facts.held.get(gpu, {}), freed_before[gpu]
        for key, runs in freed.items() if needed else ():
            for start, stop in _shared(minus(runs, again.get(key, [])), needed.get(key, [])):
                message = f"{gpu} frees {key[0]} [{start}, {stop}), which its new position needs"
                yield Finding(code="coverage_hole", step=step.id, path=path, message=message)
        for key, runs in freed.items():
            for start, stop in minus(runs, held.get(key, [])):
                message = f"{gpu} does not hold {key[0]} [{start}, {stop}), which it is to free"
                yield Finding(code="not_a_holder", step=step.id, path=path, message=message)
            if overlap([*runs, *before.get(key, [])]) is not None:
                message = f"{gpu} frees some of {key[0]} twice"
                yield Finding(code="duplicate_step", step=step.id, path=path, message=message)
        add(before, step.slices)
        for kv_reader in kv_readers[gpu, step.replica]:
            if step.kv:
                yield from _read_first(facts, step, kv_reader, path)
            elif step.keep_blocks is not None and not facts.follows(kv_reader, step):
                message = f"{kv_reader.id} does not wait until the pool that it reads has shrunk"
                yield Finding(code="wrong_order", step=kv_reader.id, path=path, message=message)
        yield from _kept_pool(facts, step, path)
        for reader in readers[gpu]:
            wanted = facts.cells_of(reader.slices)
            if any(_shared(runs, wanted.get(key, [])) for key, runs in freed.items()):
                yield from _read_first(facts, step, reader, path)


def _kept_pool(facts: Facts, release: Release, path: str) -> Iterator[Finding]:
    """A pool that shrinks keeps what moves, and does so only where nobody decodes with it any more."""
    if release.keep_blocks is None:
        return
    if facts.plan.mode == "live" or release.kv:
        message = "a pool shrinks only in in_place mode, and not when it goes"
        yield Finding(code="wrong_order", step=release.id, path=path, message=message)
    tokens, _ = facts.moving_tokens(release.replica)
    if release.keep_blocks * facts.plan.spec.limits.kv_block_tokens < tokens:
        message = f"{release.keep_blocks} blocks are kept of {release.replica}, {tokens} tokens of it move"
        yield Finding(code="coverage_hole", step=release.id, path=path, message=message)


def _read_first(
    facts: Facts, release: Release, reader: CopyWeights | CopyKv | CopyKvDelta, path: str
) -> Iterator[Finding]:
    if facts.follows(reader, release):
        message = f"{reader.id} reads what {release.workers[0]} has freed by then"
        yield Finding(code="not_a_holder", step=reader.id, path=path, message=message)
    elif not facts.follows(release, reader):
        message = f"it may free what {reader.id} still reads"
        yield Finding(code="wrong_order", step=release.id, path=path, message=message)


def _shared(left: list[Interval], right: list[Interval]) -> list[Interval]:
    return [(max(a, c), min(b, d)) for a, b in left for c, d in right if max(a, c) < min(b, d)]


def check_kv(facts: Facts) -> Iterator[Finding]:
    """For each route and target GPU the copies cover its layers x kv heads exactly once."""
    copies: dict[Route, list[tuple[int, CopyKv]]] = defaultdict(list)
    for number, step in enumerate(facts.plan.steps):
        if isinstance(step, CopyKv):
            route = Route(from_replica=step.route.from_replica, to_replica=step.route.to_replica)
            copies[route].append((number, step))
            yield from _kv_source(facts, step, f"steps[{number}]")
        elif isinstance(step, CopyKvDelta):
            yield from _kv_source(facts, step, f"steps[{number}]")
    known = set(facts.plan.routes)
    for route in sorted(copies.keys() - known, key=str):
        first = copies[route][0][1]
        message = f"KV goes from {route.from_replica} to {route.to_replica}, but no route says so"
        yield Finding(code="double_owner", step=first.id, path="routes", message=message)
    moves = {action.request for action in facts.plan.requests if action.action == "move"}
    for number, route in enumerate(facts.plan.routes):
        if route.from_replica not in facts.leaving or route.to_replica not in facts.after:
            continue
        moving = any(r.request in moves for r in facts.plan.snapshot.requests if r.replica == route.from_replica)
        copies_due = facts.plan.fallback[:1] != ("tokens_only",) and route.from_replica not in facts.lost
        if not copies[route]:
            if moving or copies_due:
                message = f"no copy_kv follows the route from {route.from_replica} to {route.to_replica}"
                yield Finding(code="missing_step", path=f"routes[{number}]", message=message)
            continue
        arriving: dict[GpuId, list[CopyKv]] = defaultdict(list)
        for _, step in copies[route]:
            arriving[step.destination].append(step)
        for seat in facts.seats(facts.after[route.to_replica]):
            yield from _rectangle_covered(seat, arriving[seat.gpu], route)
        seated = set(facts.after[route.to_replica].gpus)
        for number_, step in copies[route]:
            if step.destination not in seated:
                message = f"{step.destination} has no position in {route.to_replica}"
                yield Finding(code="double_owner", step=step.id, path=f"steps[{number_}]", message=message)


def _kv_source(facts: Facts, step: CopyKv | CopyKvDelta, path: str) -> Iterator[Finding]:
    route = step.route
    seat = facts.old_seats.get(route.from_replica, {}).get(step.source)
    inside = (
        seat is not None
        and seat.layers[0] <= route.layers[0] < route.layers[1] <= seat.layers[1]
        and seat.heads[0] <= route.kv_heads[0] < route.kv_heads[1] <= seat.heads[1]
    )
    if not inside:
        message = f"{step.source} does not hold layers {list(route.layers)} x kv heads {list(route.kv_heads)}"
        message += f" of {route.from_replica}"
        yield Finding(code="not_a_holder", step=step.id, path=path, message=message)
    elif route.from_replica in facts.lost or step.source not in facts.living:
        message = f"{route.from_replica} is lost, its KV cannot be named any more"
        yield Finding(code="not_a_holder", step=step.id, path=path, message=message)


def _rectangle_covered(seat: Seat, steps: list[CopyKv], route: Route) -> Iterator[Finding]:
    """Layer by layer, the head runs that arrive (or stay) are the position's, once each."""
    low, high = seat.layers
    # What arrives changes at these layers only.
    edges = {low, *(edge for step in steps for edge in step.route.layers if low < edge < high)}
    for layer in sorted(edges):
        runs = [
            (step.route.kv_heads[0], step.route.kv_heads[1])
            for step in steps
            if step.route.layers[0] <= layer < step.route.layers[1]
        ]
        where = f"layer {layer} of {route.from_replica} on {seat.gpu}"
        holes, twice = minus([seat.heads], runs), overlap(runs)
        if holes:
            message = f"no copy_kv brings kv heads {list(holes[0])} of {where}"
            yield Finding(code="coverage_hole", path="steps", message=message)
        if twice is not None:
            message = f"kv heads {list(twice)} of {where} arrive twice"
            yield Finding(code="double_owner", path="steps", message=message)
        if holes or twice is not None:
            break  # The same rectangles cover the layers behind; one finding tells it.
    for step in steps:
        (first, last), (low, high) = step.route.layers, step.route.kv_heads
        if first < seat.layers[0] or last > seat.layers[1] or low < seat.heads[0] or high > seat.heads[1]:
            message = f"layers [{first}, {last}) x kv heads [{low}, {high}) are not all of {seat.gpu}'s position"
            yield Finding(code="double_owner", step=step.id, path="steps", message=message)


def check_requests(facts: Facts) -> Iterator[Finding]:
    """Each request of an affected replica has one action; moves and finishes follow a route within B."""
    routes = {route.from_replica: route.to_replica for route in facts.plan.routes}
    if len(routes) < len(facts.plan.routes):
        yield Finding(code="double_owner", path="routes", message="a replica's requests have two routes")
    for number, route in enumerate(facts.plan.routes):
        for name, known in ((route.from_replica, facts.leaving), (route.to_replica, facts.after)):
            if name not in known:
                message = f"{name} is not a replica that the plan {'retires' if known is facts.leaving else 'has'}"
                yield Finding(code="coverage_hole", path=f"routes[{number}]", message=message)
    for name in sorted(facts.leaving.keys() - routes.keys()):
        if facts.after:
            yield Finding(code="coverage_hole", path="routes", message=f"requests of {name} have no route")
    open_ = [request for request in facts.plan.snapshot.requests if request.state not in ENDED_STATES]
    due = {request.request: request for request in open_ if request.replica in facts.leaving}
    seen: set[str] = set()
    for number, action in enumerate(facts.plan.requests):
        path = f"requests[{number}]"
        if action.request in seen:
            yield Finding(code="double_owner", path=path, message=f"request {action.request} has two actions")
        seen.add(action.request)
        request = due.get(action.request)
        if request is None or request.replica is None:
            message = f"request {action.request} is not one of an affected replica"
            yield Finding(code="double_owner", path=path, message=message)
        elif action.action == "move" and request.replica in facts.lost:
            message = f"request {action.request} cannot move: {request.replica} is lost"
            yield Finding(code="not_a_holder", path=path, message=message)
        elif action.to_replica != routes.get(request.replica):
            message = (
                f"request {action.request} goes to {action.to_replica}, the route to {routes.get(request.replica)}"
            )
            yield Finding(code="double_owner", path=path, message=message)
    for unnamed in sorted(due.keys() - seen):
        yield Finding(code="coverage_hole", path="requests", message=f"request {unnamed} has no action")
    yield from _running_bound(facts)
    waiting = any(action.to_replica is None for action in facts.plan.requests)
    if facts.plan.complete == (waiting or not facts.after):
        message = f"complete is {facts.plan.complete}, but " + (
            "a request has no place or nothing serves" if facts.plan.complete else "every request has a place"
        )
        yield Finding(code="corrupt", path="complete", message=message)


def _running_bound(facts: Facts) -> Iterator[Finding]:
    """No more sequences move into a replica than B leaves room for, nor more KV than its pool."""
    moving = {a.request: a.to_replica for a in facts.plan.requests if a.action == "move"}
    arriving: dict[ReplicaId, list[RequestProgress]] = defaultdict(list)
    staying: dict[ReplicaId, list[RequestProgress]] = defaultdict(list)
    for request in facts.plan.snapshot.requests:
        goal = moving.get(request.request)
        if goal is not None:
            arriving[goal].append(request)
        elif request.replica is not None and request.state not in ENDED_STATES:
            staying[request.replica].append(request)
    for number, replica in enumerate(facts.plan.target.replicas):
        if not arriving[replica.id]:
            continue
        path = f"target.replicas[{number}]"
        everyone = [*arriving[replica.id], *staying[replica.id]]
        running = sum(max(1, len(request.choices)) for request in everyone)
        if running > replica.max_running:
            message = f"{running} sequences on {replica.id} exceed its max_running {replica.max_running}"
            yield Finding(code="over_memory", path=path, message=message)
        blocks = sum(_blocks(facts, choice.kv_tokens) for request in everyone for choice in request.choices)
        if blocks > replica.kv_blocks:
            message = f"{blocks} blocks of KV on {replica.id} exceed its {replica.kv_blocks}"
            yield Finding(code="over_memory", path=path, message=message)


def _blocks(facts: Facts, tokens: int) -> int:
    """KV cache blocks that so many tokens of one choice fill."""
    return -(-tokens // facts.plan.spec.limits.kv_block_tokens)


def check_memory(facts: Facts) -> Iterator[Finding]:
    """Live: old and new weights and both KV pools at once. In place: the peak in the order of the steps."""
    reserved: dict[GpuId, int] = {}
    for number, step in enumerate(facts.plan.steps):
        if isinstance(step, Reserve) and step.workers[0] in facts.new_seat:
            reserved[step.workers[0]] = step.bytes
            yield from _reserve_covers(facts, step, f"steps[{number}].bytes")
    if facts.plan.mode == "live":
        for gpu, seat in facts.new_seat.items():
            weights = facts.held_bytes(gpu) + facts.lacking(seat)[1]
            extra = reserved.get(gpu, 0) - _position_bytes(facts, seat)
            laid_out = _laid_out(facts, facts.old_seat.get(gpu)) + _laid_out(facts, seat)
            used = weights + laid_out + _old_pool(facts, gpu) + _second_pool(facts, seat) + max(0, extra)
            yield from _within(facts, gpu, used, None, "old and new weights and both KV pools")
        return
    yield from _peak(facts)


def _reserve_covers(facts: Facts, step: Reserve, path: str) -> Iterator[Finding]:
    seat = facts.new_seat[step.workers[0]]
    due = _position_bytes(facts, seat)
    if step.bytes < due:
        message = f"{step.bytes} bytes are reserved on {seat.gpu}, the position takes {due}"
        yield Finding(code="over_memory", step=step.id, path=path, message=message)


def _position_bytes(facts: Facts, seat: Seat) -> int:
    """What a new position takes: its KV pool, and in live mode the weights that its GPU lacks."""
    if facts.plan.mode != "live":
        return facts.pool_bytes(facts.fresh[seat.replica], seat)
    pool = _second_pool(facts, seat)
    return pool + facts.lacking(seat)[1]


def _laid_out(facts: Facts, seat: Seat | None) -> int:
    """Bytes of the second copies of a position's weights, where weights are multiplied with in another layout."""
    if seat is None:
        return 0
    return (weight_copies(facts.plan.spec.linear) - 1) * facts.cells_bytes(facts.needs(seat))


def _peak(facts: Facts) -> Iterator[Finding]:
    """No order that the dependencies allow takes more than a GPU has, at any step that takes memory."""
    takes, gives = _memory_steps(facts)
    for gpu, taking in takes.items():
        before = facts.cells_bytes(facts.held.get(gpu, {})) + _old_pool(facts, gpu)
        needs = [[i for i, (give, _) in enumerate(gives[gpu]) if facts.follows(take, give)] for take, _ in taking]
        excess, last = worst_excess([size for _, size in taking], [size for _, size in gives[gpu]], needs)
        step = None if last is None else taking[last][0].id
        yield from _within(facts, gpu, before + excess, step, "weights and KV pools at this step")


def _memory_steps(facts: Facts) -> tuple[dict[GpuId, list[Taking]], dict[GpuId, list[Taking]]]:
    """What each step takes of a GPU's memory, and what each gives back, in an order that the dependencies allow."""
    takes: dict[GpuId, list[Taking]] = defaultdict(list)
    gives: dict[GpuId, list[Taking]] = defaultdict(list)
    pools: dict[GpuId, int] = {}
    for step in facts.in_order:
        if isinstance(step, Reserve | LoadWeights):
            takes[step.workers[0]].append((step, step.bytes))
        elif isinstance(step, CopyWeights):
            takes[step.destination].append((step, step.bytes))
        elif isinstance(step, Activate) and step.replica in facts.fresh:
            for seat in facts.seats(facts.fresh[step.replica]):
                takes[seat.gpu].append((step, _laid_out(facts, seat)))
        elif isinstance(step, Release):
            gpu = step.workers[0]
            pool = pools.get(gpu, _old_pool(facts, gpu))
            pools[gpu] = min(pool, _pool_left(facts, step))
            gives[gpu].append((step, pool - pools[gpu] + _slices_bytes(facts, step.slices)))
    return takes, gives


def _pool_left(facts: Facts, release: Release) -> int:
    """What a release leaves of the old KV pool."""
    gpu = release.workers[0]
    if release.kv or gpu not in facts.old_seat:
        return 0
    seat = facts.old_seat[gpu]
    replica = facts.leaving[seat.replica]
    if release.keep_blocks is None:
        return facts.pool_bytes(replica, seat)
    return facts.pool_bytes(replica.model_copy(update={"kv_blocks": release.keep_blocks}), seat)


def _slices_bytes(facts: Facts, slices: tuple[Slice, ...]) -> int:
    try:
        return facts.slice_bytes(slices)
    except KeyError:
        return 0  # An unknown parameter has its own finding; nothing is freed by it.


def _within(facts: Facts, gpu: GpuId, used: int, step: StepId | None, what: str) -> Iterator[Finding]:
    budget = facts.memory.get(gpu, 0)
    if used > budget:
        message = f"{what} take {used} bytes on {gpu}, which has {budget}"
        yield Finding(code="over_memory", step=step, path=f"snapshot.world.gpus[{gpu}]", message=message)


def _old_pool(facts: Facts, gpu: GpuId) -> int:
    seat = facts.old_seat.get(gpu)
    return 0 if seat is None else facts.pool_bytes(facts.leaving[seat.replica], seat)


def _second_pool(facts: Facts, seat: Seat) -> int:
    """A new position's KV pool beside the old one; the same pool if layers, heads and size are what they were."""
    replica = facts.fresh[seat.replica]
    old = facts.old_seat.get(seat.gpu)
    if old is not None and (old.layers, old.heads) == (seat.layers, seat.heads):
        before = facts.leaving[old.replica]
        alive = all(gpu in facts.living for gpu in before.gpus)
        if alive and before.kv_blocks == replica.kv_blocks:
            return 0
    return facts.pool_bytes(replica, seat)
