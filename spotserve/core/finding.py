"""What the checker says, and the facts it judges a plan by: derived from the file alone, not from any solver."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, reduce
from heapq import heapify, heappop, heappush
from itertools import chain
from operator import or_
from typing import Literal, TypeVar, overload

from spotserve.core.cells import NOTHING, Cell, Cells, Interval, common, join, merged, without
from spotserve.core.frozen import Frozen
from spotserve.core.ids import GpuId, InstanceId, ReplicaId, StepId
from spotserve.core.plan import CopyKv, CopyKvDelta, Plan, Step, StepBase
from spotserve.core.slices import (
    Shard,
    Slice,
    concrete_parameters,
    kv_head_range,
    parameter_slices,
    row_bytes,
    stage_shard,
)
from spotserve.core.snapshot import Holding, InstanceView, Replica
from spotserve.core.spec import Parameter
from spotserve.core.strict_json import shown

Code = Literal[
    "coverage_hole",
    "double_owner",
    "not_a_holder",
    "over_memory",
    "cycle",
    "duplicate_step",
    "missing_step",
    "wrong_order",
    "past_deadline",
    "stale",
    "corrupt",
    "bad_version",
]


class Finding(Frozen):
    """One thing that is wrong with a plan file: what kind, at which step, where in the file."""

    code: Code
    step: StepId | None = None
    path: str
    message: str

    def line(self) -> str:
        """`CODE step path: message`, a dash where no step is meant; names are the file's, and so are made safe."""
        return f"{self.code} {shown(self.step or '-', 80)} {shown(self.path, 200)}: {shown(self.message, 400)}"


A = TypeVar("A", bound=StepBase)
B = TypeVar("B", bound=StepBase)
C = TypeVar("C", bound=StepBase)
D = TypeVar("D", bound=StepBase)
E = TypeVar("E", bound=StepBase)

Pairs = dict[tuple[int, int], Cells]
"""Cells by the ids of the two that they come of."""

Rectangle = tuple[GpuId, GpuId, ReplicaId, ReplicaId, Interval, Interval]
"""What one KV step copies: from where to where, for which replicas, layers and kv heads."""


@dataclass(frozen=True, slots=True)
class Seat:
    """One position of a replica: its GPU, its shard, the KV rectangle it stores."""

    gpu: GpuId
    replica: ReplicaId
    shard: Shard
    layers: Interval
    heads: Interval


class Facts:
    """What follows from a plan file without asking a solver."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.model = plan.spec.model
        self.world = plan.snapshot.world
        # What is named by an id lives as long as these facts: a tuple of the plan, or cells that are kept here.
        self._of: dict[tuple[type[StepBase], ...], list[tuple[int, Step]]] = {}
        self._row_bytes: dict[str, int] = {}
        self._layer_cells: dict[int, list[tuple[Cell, str]]] = {}
        self._runs: dict[tuple[int, int], dict[str, list[Interval]]] = {}
        self._owned: dict[tuple[object, ...], Cells] = {}
        self._cells_of: dict[int, Cells] = {}
        self._bytes_of: dict[int, int] = {}
        self._cells_of_pieces: dict[tuple[int, ...], Cells] = {}
        self._in_table: dict[int, bool] = {}
        self._unheld: Pairs = {}
        self._needed: Pairs = {}
        self._positions: dict[tuple[Interval, int], list[tuple[Shard, Interval]]] = {}
        self._seats: dict[int, tuple[Seat, ...]] = {}

    @overload
    def of(self, one: type[A], /) -> Sequence[tuple[int, A]]: ...
    @overload
    def of(self, one: type[A], two: type[B], /) -> Sequence[tuple[int, A | B]]: ...
    @overload
    def of(self, one: type[A], two: type[B], three: type[C], /) -> Sequence[tuple[int, A | B | C]]: ...
    @overload
    def of(
        self, one: type[A], two: type[B], three: type[C], four: type[D], five: type[E], /
    ) -> Sequence[tuple[int, A | B | C | D | E]]: ...
    def of(self, *kinds: type[StepBase]) -> Sequence[tuple[int, StepBase]]:
        """The steps of some kinds with their numbers, in the order of the file."""
        if kinds not in self._of:
            # Sorted by number, and so hardly any work: plans have their kinds in runs.
            self._of[kinds] = sorted(chain.from_iterable(self._of_kind.get(kind, ()) for kind in kinds))
        return self._of[kinds]

    @cached_property
    def _of_kind(self) -> dict[type[StepBase], list[tuple[int, Step]]]:
        result: dict[type[StepBase], list[tuple[int, Step]]] = {}
        for pair in enumerate(self.plan.steps):
            result.setdefault(type(pair[1]), []).append(pair)
        return result

    @cached_property
    def living(self) -> dict[GpuId, InstanceView]:
        """The GPUs that have a worker, doomed ones too."""
        return {
            gpu.id: instance
            for instance in self.world.instances
            if instance.state in ("ready", "doomed") and not self._takes(instance, "lost")
            for gpu in instance.gpus
        }

    @cached_property
    def doomed(self) -> dict[GpuId, float | None]:
        """The GPUs under notice, and the grace period each has left."""
        result: dict[GpuId, float | None] = {}
        for gpu, instance in self.living.items():
            if instance.state == "doomed" or self._takes(instance, "notice"):
                named = instance.id in self._triggering
                known = [instance.remaining_s, self.plan.trigger.remaining_s if named else None]
                result[gpu] = min((left for left in known if left is not None), default=None)
        return result

    def _takes(self, instance: InstanceView, kind: str) -> bool:
        """Whether the trigger changes the state of an instance that the snapshot has as ready."""
        return self.plan.trigger.kind == kind and instance.state == "ready" and instance.id in self._triggering

    @cached_property
    def _triggering(self) -> frozenset[InstanceId]:
        return frozenset(self.plan.trigger.instances)

    @cached_property
    def memory(self) -> dict[GpuId, int]:
        """Memory budget of each GPU."""
        return {gpu.id: gpu.memory_bytes for instance in self.world.instances for gpu in instance.gpus}

    @cached_property
    def before(self) -> dict[ReplicaId, Replica]:
        """The replicas of the snapshot."""
        return {replica.id: replica for replica in self.world.replicas}

    @cached_property
    def after(self) -> dict[ReplicaId, Replica]:
        """The replicas of the target."""
        return {replica.id: replica for replica in self.plan.target.replicas}

    @cached_property
    def fresh(self) -> dict[ReplicaId, Replica]:
        """The target's new replicas."""
        return {name: replica for name, replica in self.after.items() if name not in self.before}

    @cached_property
    def leaving(self) -> dict[ReplicaId, Replica]:
        """The snapshot's replicas that the target no longer has."""
        return {name: replica for name, replica in self.before.items() if name not in self.after}

    @cached_property
    def lost(self) -> set[ReplicaId]:
        """The replicas that miss a worker already: nothing can be read of their KV."""
        return {name for name, one in self.before.items() if any(gpu not in self.living for gpu in one.gpus)}

    @cached_property
    def held(self) -> dict[GpuId, Cells]:
        """Weight ranges that each living GPU holds; GPUs with the same shards have the same cells."""
        result: dict[GpuId, Cells] = {}
        of_shards: dict[tuple[int, ...], Cells] = {}
        for holding in self.world.holdings:
            if holding.gpu not in self.living:
                continue
            if holding.gpu not in result and not holding.slices:
                owned = tuple(id(self.owned(shard)) for shard in holding.shards)
                if owned not in of_shards:
                    is_one = len(holding.shards) == 1
                    of_shards[owned] = self.owned(holding.shards[0]) if is_one else self._together({}, holding)
                result[holding.gpu] = of_shards[owned]
            else:
                result[holding.gpu] = self._together(result.get(holding.gpu, {}), holding)
        return result

    def _together(self, held: Cells, holding: Holding) -> Cells:
        """Cells, and all that a holding names beside them."""
        cells = dict(held)
        for shard in holding.shards:
            join(cells, self.owned(shard))
        join(cells, self.cells_of(holding.slices))
        return {cell: merged(runs) for cell, runs in cells.items()}

    def lacking(self, seat: Seat) -> Cells:
        """What a position needs and its GPU does not hold."""
        return self._pair(self._unheld, without, self.needs(seat), self.held.get(seat.gpu, NOTHING))

    def seats(self, replica: Replica) -> tuple[Seat, ...]:
        """The positions of a replica, as its stages and the parameter table define them."""
        if id(replica) not in self._seats:
            self._seats[id(replica)] = tuple(
                Seat(gpu, replica.id, shard, stage.layers, heads)
                for stage in replica.stages
                for gpu, (shard, heads) in zip(
                    stage.gpus, self._ranks(stage.layers, tensor=len(stage.gpus)), strict=True
                )
            )
        return self._seats[id(replica)]

    def _ranks(self, layers: Interval, *, tensor: int) -> list[tuple[Shard, Interval]]:
        """Shard and kv heads of each rank of a stage."""
        if (layers, tensor) not in self._positions:
            self._positions[layers, tensor] = [
                (
                    stage_shard(self.model, layers=layers, tensor=tensor, rank=rank),
                    kv_head_range(self.model, tensor=tensor, rank=rank),
                )
                for rank in range(tensor)
            ]
        return self._positions[layers, tensor]

    @cached_property
    def old_seat(self) -> dict[GpuId, Seat]:
        """The position each GPU leaves."""
        return {gpu: seat for seats in self.old_seats.values() for gpu, seat in seats.items()}

    @cached_property
    def old_seats(self) -> dict[ReplicaId, dict[GpuId, Seat]]:
        """The positions of each replica that leaves."""
        return {name: {seat.gpu: seat for seat in self.seats(one)} for name, one in self.leaving.items()}

    @cached_property
    def new_seat(self) -> dict[GpuId, Seat]:
        """The position each GPU takes in a new replica."""
        return {seat.gpu: seat for replica in self.fresh.values() for seat in self.seats(replica)}

    def needs(self, seat: Seat) -> Cells:
        """The weight ranges of a position."""
        return self.owned(seat.shard)

    def owned(self, shard: Shard) -> Cells:
        """The weight ranges of a shard."""
        key = (shard.layers, shard.tensor, shard.rank, shard.first, shard.last)
        if key not in self._owned:
            runs = self._runs_of(shard.tensor, shard.rank)
            parts = [self._end_cells[0]] if shard.first else []
            parts += [self._cells_at(layer) for layer in range(*shard.layers)]
            parts += [self._end_cells[1]] if shard.last else []
            self._owned[key] = {cell: runs[name] for part in parts for cell, name in part}
        return self._owned[key]

    def _runs_of(self, tensor: int, rank: int) -> dict[str, list[Interval]]:
        """The ranges of each row of the parameter table that a rank owns, the same in every layer."""
        if (tensor, rank) not in self._runs:
            self._runs[tensor, rank] = {
                parameter.name: merged(parameter_slices(self.model, parameter, tensor=tensor, rank=rank))
                for parameter in self.model.parameters
            }
        return self._runs[tensor, rank]

    def _cells_at(self, layer: int) -> list[tuple[Cell, str]]:
        """The cells of a layer, each with the table's name for it."""
        if layer not in self._layer_cells:
            shard = Shard(layers=(layer, layer + 1), tensor=1, rank=0, first=False, last=False)
            self._layer_cells[layer] = self._named(shard)
        return self._layer_cells[layer]

    @cached_property
    def _end_cells(self) -> tuple[list[tuple[Cell, str]], list[tuple[Cell, str]]]:
        """The cells before the first and behind the last layer."""
        ends = (Shard(layers=(0, 0), tensor=1, rank=0, first=first, last=not first) for first in (True, False))
        first, last = (self._named(shard) for shard in ends)
        return first, last

    def _named(self, shard: Shard) -> list[tuple[Cell, str]]:
        return [((name, one.dim), one.name) for name, one in concrete_parameters(self.model, shard)]

    @cached_property
    def table(self) -> dict[str, Parameter]:
        """The row of every parameter, under the name that it has in its layer."""
        whole = stage_shard(self.model, layers=(0, self.model.num_layers), tensor=1, rank=0)
        return dict(concrete_parameters(self.model, whole))

    @cached_property
    def _extents(self) -> dict[Cell, int]:
        return {(name, one.dim): one.shape[one.dim] for name, one in self.table.items()}

    def in_table(self, slices: tuple[Slice, ...]) -> bool:
        """Whether the parameter table has all of a step's slices."""
        cells = self.cells_of(slices)
        if id(cells) not in self._in_table:
            self._in_table[id(cells)] = all(self.has_run(cell, run) for cell, runs in cells.items() for run in runs)
        return self._in_table[id(cells)]

    def has_run(self, cell: Cell, run: Interval) -> bool:
        """Whether the parameter table has a run."""
        return 0 <= run[0] < run[1] <= self._extents.get(cell, 0)

    def pool_bytes(self, replica: Replica, seat: Seat) -> int:
        """Bytes of a position's KV pool."""
        return replica.kv_blocks * self.plan.spec.limits.kv_block_tokens * self.token_bytes(seat.layers, seat.heads)

    def token_bytes(self, layers: Interval, heads: Interval) -> int:
        """Bytes of the keys and values of one token in a rectangle."""
        return (layers[1] - layers[0]) * (heads[1] - heads[0]) * self._head_bytes

    @cached_property
    def _head_bytes(self) -> int:
        """Bytes of a token's key and value at one layer and kv head."""
        return 2 * self.model.head_dim * self.model.element_bytes

    def cells_of(self, slices: tuple[Slice, ...]) -> Cells:
        """The runs of a step's slices; steps with the very same slices, as a planner writes them, have one value."""
        if id(slices) not in self._cells_of:
            pieces = tuple(map(id, slices))
            if pieces in self._cells_of_pieces:
                self._cells_of[id(slices)] = self._cells_of_pieces[pieces]
                return self._cells_of[id(slices)]
            cells: Cells = {}
            for piece in slices:
                cell, run = (piece.parameter, piece.dim), (piece.start, piece.stop)
                if cell in cells:
                    cells[cell].append(run)
                else:
                    cells[cell] = [run]
            self._cells_of[id(slices)] = self._cells_of_pieces[pieces] = cells
        return self._cells_of[id(slices)]

    def unheld(self, slices: tuple[Slice, ...], gpu: GpuId) -> Cells:
        """What of a step's slices a GPU does not hold from the start."""
        return self._pair(self._unheld, without, self.cells_of(slices), self.held.get(gpu, NOTHING))

    def needed_of(self, slices: tuple[Slice, ...], seat: Seat) -> Cells:
        """What of a step's slices a position needs."""
        return self._pair(self._needed, common, self.cells_of(slices), self.needs(seat))

    def _pair(self, known: Pairs, make: Callable[[Cells, Cells], Cells], left: Cells, right: Cells) -> Cells:
        """What two cells of these facts make, once for all steps and GPUs that have the same."""
        key = id(left), id(right)
        if key not in known:
            known[key] = make(left, right)
        return known[key]

    def slice_bytes(self, slices: tuple[Slice, ...]) -> int:
        """Bytes of a step's slices. Raises KeyError for a parameter that the table does not have."""
        return self.cells_bytes(self.cells_of(slices))

    def cells_bytes(self, cells: Cells) -> int:
        """Bytes of the runs of these facts' cells. Raises KeyError for a parameter that the table does not have."""
        if id(cells) not in self._bytes_of:
            total, rows = 0, self._row_bytes
            for (name, _), runs in cells.items():
                if name not in rows:
                    rows[name] = row_bytes(self.model, self.table[name])
                for start, stop in runs:
                    total += (stop - start) * rows[name]
            self._bytes_of[id(cells)] = total
        return self._bytes_of[id(cells)]

    def moving_tokens(self, replica: ReplicaId) -> tuple[int, int]:
        """KV tokens and choices that move away from a replica."""
        return self._moving.get(replica, (0, 0))

    @cached_property
    def _moving(self) -> dict[ReplicaId, tuple[int, int]]:
        """`moving_tokens` of every replica."""
        moving = {action.request for action in self.plan.requests if action.action == "move"}
        result: dict[ReplicaId, tuple[int, int]] = {}
        for request in self.plan.snapshot.requests:
            if request.replica is not None and request.request in moving:
                tokens, choices = result.get(request.replica, (0, 0))
                tokens += sum(choice.kv_tokens for choice in request.choices)
                result[request.replica] = tokens, choices + max(1, len(request.choices))
        return result

    @cached_property
    def ancestors(self) -> dict[StepId, int]:
        """For each step the bit set of all it depends on, directly or not (empty where a cycle hides it)."""
        bits = self._bits
        result: dict[StepId, int] = {}
        known: dict[tuple[StepId, ...], int] = {}
        for step in self.in_order:
            reach = known.get(step.depends_on)
            if reach is None:
                reach = 0
                for name in step.depends_on:
                    if name in result:
                        reach |= bits[name] | result[name]
                if self.has_unique_ids:
                    known[step.depends_on] = reach
            result[step.id] = reach
        return result

    @cached_property
    def has_unique_ids(self) -> bool:
        """Whether a name in `depends_on` means one step."""
        return len(self._bits) == len(self.plan.steps)

    @cached_property
    def _bits(self) -> dict[StepId, int]:
        return {step.id: 1 << number for number, step in enumerate(self.plan.steps)}

    @cached_property
    def in_order(self) -> tuple[Step, ...]:
        """The steps in topological order, file order where it is one; steps on or behind a cycle are left out."""
        number = {step.id: index for index, step in enumerate(self.plan.steps)}
        if len(number) == len(self.plan.steps) and self._is_in_order(number):
            return self.plan.steps
        blocked = {i: {n for n in step.depends_on if n in number} for i, step in enumerate(self.plan.steps)}
        followers: dict[StepId, list[int]] = {}
        for index, names in blocked.items():
            for name in names:
                followers.setdefault(name, []).append(index)
        ready = [index for index, names in blocked.items() if not names]
        heapify(ready)
        result: list[Step] = []
        while ready:
            step = self.plan.steps[heappop(ready)]
            result.append(step)
            for index in followers.get(step.id, ()):
                if step.id not in blocked[index]:
                    continue  # Another step of the same id came first; that has its own finding.
                blocked[index].discard(step.id)
                if not blocked[index]:
                    heappush(ready, index)
        return tuple(result)

    def _is_in_order(self, known: Container[StepId]) -> bool:
        """Whether the file's order is topological already."""
        seen: set[StepId] = set()
        for step in self.plan.steps:
            if not seen.issuperset(step.depends_on) and any(n in known and n not in seen for n in step.depends_on):
                return False
            seen.add(step.id)
        return True

    def follows(self, later: Step, earlier: Step) -> bool:
        """Whether `later` depends on `earlier`, directly or not."""
        return bool(self.ancestors.get(later.id, 0) & self._bits[earlier.id])

    def unawaited(self, later: Step, earlier: Iterable[A], mask: int = -1) -> Sequence[A]:
        """Those of `earlier` that `later` does not depend on; with their `mask`, quickly where there are none."""
        reach, bits = self.ancestors.get(later.id, 0), self._bits
        return [step for step in earlier if not reach & bits[step.id]] if mask & ~reach else ()

    def awaited(self, later: Step, earlier: Iterable[Step]) -> list[int]:
        """The places of those of `earlier` that `later` depends on."""
        reach, bits = self.ancestors.get(later.id, 0), self._bits
        return [place for place, step in enumerate(earlier) if reach & bits[step.id]]

    def mask(self, steps: Iterable[Step]) -> int:
        """The bit set of some steps."""
        return reduce(or_, (self._bits[step.id] for step in steps), 0)


def rectangle(step: CopyKv | CopyKvDelta) -> Rectangle:
    """What tells a KV step from others."""
    route = step.route
    return step.source, step.destination, route.from_replica, route.to_replica, route.layers, route.kv_heads
