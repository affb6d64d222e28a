"""A plan before its steps are written: the target layout, who inherits whose requests, and what must be fetched."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from spotserve.core.cost import decode_ms, sequence_blocks
from spotserve.core.ids import GpuId, ReplicaId
from spotserve.core.plan import Mode, PlanningProblem, RequestAction, Route
from spotserve.core.slices import Shard, kv_block_bytes, kv_token_bytes
from spotserve.core.snapshot import Replica, RequestProgress
from spotserve.solvers.migrate import KvTransfer, Transfer
from spotserve.solvers.ranges import Catalog, Ranges, Rectangle, shard_at
from spotserve.solvers.view import View, kv_tokens, natural_key, requests_of

GROWTH_BLOCKS = 3
"""KV blocks that a choice may begin or go on filling between a snapshot and the stop."""


@dataclass(frozen=True, slots=True)
class Draft:
    """All decisions of a plan; `steps.py` writes the DAG from it and decides nothing."""

    problem: PlanningProblem
    view: View
    mode: Mode
    untouched: tuple[Replica, ...]
    fresh: tuple[Replica, ...]
    affected: tuple[Replica, ...]
    routes: tuple[Route, ...]
    actions: tuple[RequestAction, ...]
    transfers: tuple[Transfer, ...]
    kv: Mapping[Route, tuple[KvTransfer, ...]]
    held: Mapping[GpuId, Ranges]
    released_first: bool = False
    """in_place only: old weights go before anything comes (the restart of `reparallelize`)."""
    kept_blocks: Mapping[ReplicaId, int] = field(default_factory=dict)
    """in_place only: blocks to which an old KV pool shrinks and that stay until the new pools have their content; the
    pools of replicas that are not named here go before anything comes."""

    @property
    def target(self) -> tuple[Replica, ...]:
        """Every replica after the plan, in natural order."""
        return tuple(sorted((*self.untouched, *self.fresh), key=lambda replica: natural_key(replica.id)))

    @property
    def old_position(self) -> dict[GpuId, Replica]:
        """The affected replica that each living GPU belongs to."""
        return {gpu: replica for replica in self.affected for gpu in replica.gpus if self.view.alive(gpu)}

    def rectangle_bytes(self, route: Route, rectangle: Rectangle) -> int:
        """KV bytes, as of the snapshot, of the requests that move along `route`, in one rectangle."""
        moving = {action.request for action in self.actions if action.action == "move"}
        tokens = sum(
            kv_tokens(request) for request in requests_of(self.problem, route.from_replica) if request.request in moving
        )
        return tokens * kv_token_bytes(self.problem.spec.model, layers=rectangle[0], heads=rectangle[1])

    def delta_bytes(self, route: Route, rectangle: Rectangle) -> int:
        """KV bytes of one block per choice that moves along `route`: what the stop has to bring."""
        moving = {action.request for action in self.actions if action.action == "move"}
        choices = sum(
            max(1, len(request.choices))
            for request in requests_of(self.problem, route.from_replica)
            if request.request in moving
        )
        block = kv_token_bytes(self.problem.spec.model, layers=rectangle[0], heads=rectangle[1])
        return choices * self.problem.spec.limits.kv_block_tokens * block


def pool_bytes(catalog: Catalog, problem: PlanningProblem, replica: Replica, gpu: GpuId) -> int:
    """Bytes of a GPU's KV pool in a replica."""
    shard = shard_at(catalog.model, replica, replica.gpus.index(gpu))
    return replica.kv_blocks * kv_block_bytes(catalog.model, shard, block_tokens=problem.spec.limits.kv_block_tokens)


def used_blocks(problem: PlanningProblem, replica: Replica) -> int:
    """Blocks of a KV pool that its requests will have filled when they stop: as of now, and a margin.

    What is more than this by then is computed again.
    """
    block_tokens = problem.spec.limits.kv_block_tokens
    blocks = 0
    for request in requests_of(problem, replica.id):
        for choice in request.choices or (None,):
            tokens = 0 if choice is None else choice.kv_tokens
            blocks += max(tokens, request.prompt_tokens) // block_tokens + GROWTH_BLOCKS
    return min(replica.kv_blocks, blocks + blocks // 4)


def inherited_pool(catalog: Catalog, problem: PlanningProblem, gpu: GpuId, shard: Shard) -> Replica | None:
    """The running replica whose KV pool on `gpu` a new position of the same layers and kv heads takes over.

    The pool then counts once, if both generations have the same number of blocks; its KV is not copied at all.
    """
    for replica in problem.snapshot.world.replicas:
        if gpu in replica.gpus:
            held = catalog.kv_rectangle(shard_at(catalog.model, replica, replica.gpus.index(gpu)))
            return replica if held == catalog.kv_rectangle(shard) else None
    return None


def route_requests(
    problem: PlanningProblem, view: View, affected: tuple[Replica, ...], fresh: int
) -> dict[ReplicaId, int]:
    """Which new replica (by number) inherits which affected one: the most KV on surviving GPUs first.

    Replicas beyond the number of new ones are left out; they are spread over the whole target later.
    """
    staying = set(view.staying)

    def worth(replica: Replica) -> tuple[int, int, int]:
        tokens = sum(kv_tokens(request) for request in requests_of(problem, replica.id))
        survivors = sum(gpu in staying for gpu in replica.gpus)
        live = replica not in view.lost
        return (tokens * survivors if live else 0, survivors, len(requests_of(problem, replica.id)))

    ranked = sorted(affected, key=lambda r: (tuple(-value for value in worth(r)), natural_key(r.id)))
    return {replica.id: number for number, replica in enumerate(ranked[:fresh])}


def complete_routes(
    problem: PlanningProblem,
    affected: tuple[Replica, ...],
    inherited: Mapping[ReplicaId, ReplicaId],
    target: tuple[Replica, ...],
) -> tuple[Route, ...]:
    """One route for each affected replica; those without an heir go where most room is left. Empty without target."""
    if not target:
        return ()
    expected = {
        replica.id: len(requests_of(problem, replica.id))
        + sum(len(requests_of(problem, old)) for old, new in inherited.items() if new == replica.id)
        for replica in target
    }
    limits = {replica.id: replica.max_running for replica in target}
    routes = []
    for replica in affected:
        heir = inherited.get(replica.id)
        if heir is None:
            heir = min(expected, key=lambda name: (expected[name] / limits[name], natural_key(name)))
            expected[heir] += len(requests_of(problem, replica.id))
        routes.append(Route(from_replica=replica.id, to_replica=heir))
    return tuple(routes)


def decide_requests(
    problem: PlanningProblem,
    view: View,
    affected: tuple[Replica, ...],
    routes: tuple[Route, ...],
    target: tuple[Replica, ...],
    *,
    may_move: bool,
    hottest: int | None,
    stay_s: float,
) -> tuple[RequestAction, ...]:
    """Finish, move or recompute each request of an affected replica.

    The requests furthest along move first while B and the KV pool of the target hold them; `hottest` bounds how many
    move at all. Of those left, one that ends within `stay_s` finishes where it is: the stop waits that long for it.
    """
    heir = {route.from_replica: route.to_replica for route in routes}
    room = {replica.id: _room(problem, replica) for replica in target}
    lost = {replica.id for replica in view.lost}
    waiting = [(replica, request) for replica in affected for request in requests_of(problem, replica.id)]
    waiting.sort(key=lambda pair: (-kv_tokens(pair[1]), pair[1].request))
    actions, moved = [], 0
    for replica, request in waiting:
        to_replica = heir.get(replica.id)
        action = "recompute"
        if replica.id not in lost and to_replica is not None and may_move:
            if (hottest is None or moved < hottest) and _take(problem, room[to_replica], request):
                action, moved = "move", moved + 1
            elif _seconds_left(problem, replica, request) <= stay_s:
                action = "finish"
        actions.append(
            RequestAction.model_validate({"request": request.request, "action": action, "to_replica": to_replica})
        )
    return tuple(sorted(actions, key=lambda action: action.request))


@dataclass(slots=True)
class _Room:
    """What a target replica can still take."""

    sequences: int
    blocks: int


def _room(problem: PlanningProblem, replica: Replica) -> _Room:
    own = requests_of(problem, replica.id)
    return _Room(
        replica.max_running - sum(max(1, len(request.choices)) for request in own),
        replica.kv_blocks - sum(_blocks(problem, request) for request in own),
    )


def _blocks(problem: PlanningProblem, request: RequestProgress) -> int:
    """KV cache blocks a request occupies, with one to grow into per choice."""
    limits = problem.spec.limits
    tokens = [choice.kv_tokens for choice in request.choices] or [0]
    return sum(min(sequence_blocks(limits), count // limits.kv_block_tokens + 1) for count in tokens)


def _take(problem: PlanningProblem, room: _Room, request: RequestProgress) -> bool:
    sequences, blocks = max(1, len(request.choices)), _blocks(problem, request)
    if sequences > room.sequences or blocks > room.blocks:
        return False
    room.sequences -= sequences
    room.blocks -= blocks
    return True


def _seconds_left(problem: PlanningProblem, replica: Replica, request: RequestProgress) -> float:
    """How long a decoding request still needs where it is; for ever if it does not decode yet."""
    if request.state != "decoding" or not request.choices:
        return math.inf
    left = max(request.max_tokens - choice.tokens for choice in request.choices)
    running = max(1, len(requests_of(problem, replica.id)))
    token_ms = decode_ms(problem.spec, pipeline=replica.pipeline, tensor=replica.tensor, running=running)
    return left * token_ms / 1000.0


def finishing_s(problem: PlanningProblem, affected: tuple[Replica, ...], actions: tuple[RequestAction, ...]) -> float:
    """How long the slowest of the requests that finish where they are needs; 0 if there is none."""
    finishing = {action.request for action in actions if action.action == "finish"}
    return max(
        (
            _seconds_left(problem, replica, request)
            for replica in affected
            for request in requests_of(problem, replica.id)
            if request.request in finishing
        ),
        default=0.0,
    )
