"""The request rules of a plan: every request of a replica that leaves goes somewhere, and its KV arrives whole."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

from spotserve.core.cells import minus, overlap
from spotserve.core.finding import Facts, Finding, Seat
from spotserve.core.ids import GpuId, ReplicaId
from spotserve.core.plan import CopyKv, CopyKvDelta, Route
from spotserve.core.snapshot import ENDED_STATES, RequestProgress


def check_kv(facts: Facts) -> Iterator[Finding]:
    """For each route and target GPU the copies cover its layers x kv heads exactly once."""
    copies: dict[tuple[ReplicaId, ReplicaId], list[tuple[int, CopyKv]]] = defaultdict(list)
    for number, step in facts.of(CopyKv, CopyKvDelta):
        yield from _kv_source(facts, step, number)
    for number, copy in facts.of(CopyKv):
        copies[copy.route.from_replica, copy.route.to_replica].append((number, copy))
    known = {(route.from_replica, route.to_replica) for route in facts.plan.routes}
    for from_replica, to_replica in sorted(copies.keys() - known):
        _, first = copies[from_replica, to_replica][0]
        message = f"KV goes from {from_replica} to {to_replica}, but no route says so"
        yield Finding(code="double_owner", step=first.id, path="routes", message=message)
    moves = {action.request for action in facts.plan.requests if action.action == "move"}
    moving = {request.replica for request in facts.plan.snapshot.requests if request.request in moves}
    for number, route in enumerate(facts.plan.routes):
        if route.from_replica not in facts.leaving or route.to_replica not in facts.after:
            continue
        along = copies[route.from_replica, route.to_replica]
        copies_due = facts.plan.fallback[:1] != ("tokens_only",) and route.from_replica not in facts.lost
        if not along:
            if route.from_replica in moving or copies_due:
                message = f"no copy_kv follows the route from {route.from_replica} to {route.to_replica}"
                yield Finding(code="missing_step", path=f"routes[{number}]", message=message)
            continue
        arriving: dict[GpuId, list[CopyKv]] = defaultdict(list)
        for _, copy in along:
            arriving[copy.destination].append(copy)
        seated = set(facts.after[route.to_replica].gpus)
        for seat in facts.seats(facts.after[route.to_replica]):
            yield from _rectangle_covered(seat, arriving[seat.gpu], route)
        for number_, copy in along:
            if copy.destination not in seated:
                message = f"{copy.destination} has no position in {route.to_replica}"
                yield Finding(code="double_owner", step=copy.id, path=f"steps[{number_}]", message=message)


def _kv_source(facts: Facts, step: CopyKv | CopyKvDelta, number: int) -> Iterator[Finding]:
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
        yield Finding(code="not_a_holder", step=step.id, path=f"steps[{number}]", message=message)
    elif route.from_replica in facts.lost:
        message = f"{route.from_replica} is lost, its KV cannot be named any more"
        yield Finding(code="not_a_holder", step=step.id, path=f"steps[{number}]", message=message)


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
    of_replica = {request.request: request.replica for request in open_}
    due = {name: replica for name, replica in of_replica.items() if replica in facts.leaving}
    seen: set[str] = set()
    for number, action in enumerate(facts.plan.requests):
        path = f"requests[{number}]"
        if action.request in seen:
            yield Finding(code="double_owner", path=path, message=f"request {action.request} has two actions")
        seen.add(action.request)
        replica = due.get(action.request)
        if replica is None:
            message = f"request {action.request} is not one of an affected replica"
            yield Finding(code="double_owner", path=path, message=message)
        elif action.action == "move" and replica in facts.lost:
            message = f"request {action.request} cannot move: {replica} is lost"
            yield Finding(code="not_a_holder", path=path, message=message)
        elif action.to_replica != routes.get(replica):
            message = f"request {action.request} goes to {action.to_replica}, the route to {routes.get(replica)}"
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
