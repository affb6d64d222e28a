"""A plan before its steps are written: the target layout, who inherits whose requests, and what must be fetched."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from spotserve.core.ids import GpuId, ReplicaId, natural_key
from spotserve.core.plan import Mode, PlanningProblem, RequestAction, Route
from spotserve.core.slices import Shard, kv_block_bytes, kv_token_bytes
from spotserve.core.snapshot import Replica, Stage
from spotserve.solvers.migrate.kv import KvTransfer
from spotserve.solvers.migrate.sources import Transfer
from spotserve.solvers.ranges import Catalog, Ranges, Rectangle, shard_at
from spotserve.solvers.view import View, kv_tokens, requests_of

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
    layer_by_layer: tuple[str, ...] | None = None
    """Weights go one layer after the other in this order, all KV before them (SpotServe, section 3.4)."""

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


def new_replicas(
    epoch: int, layers: Sequence[Sequence[tuple[int, int]]], gpus: Sequence[Sequence[GpuId]]
) -> tuple[Replica, ...]:
    """New replicas by the layers of their stages and their GPUs in mesh rank order; their KV pools are sized later.

    An id carries the epoch, so none is ever used twice.
    """
    replicas = []
    for number, (runs, ranks) in enumerate(zip(layers, gpus, strict=True)):
        tensor = len(ranks) // len(runs)
        stages = tuple(
            Stage(layers=run, gpus=tuple(ranks[stage * tensor : (stage + 1) * tensor]))
            for stage, run in enumerate(runs)
        )
        name = ReplicaId(f"r{epoch}" if len(layers) == 1 else f"r{epoch}.{number + 1}")
        replicas.append(Replica(id=name, generation=epoch, max_running=1, kv_blocks=0, stages=stages))
    return tuple(replicas)


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
    position = problem.snapshot.world.positions.get(gpu)
    if position is None:
        return None
    replica, index = position
    held = catalog.kv_rectangle(shard_at(catalog.model, replica, index))
    return replica if held == catalog.kv_rectangle(shard) else None


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
