"""What the checker says, and the facts it judges a plan by: derived from the file alone, not from any solver."""

from __future__ import annotations

from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, reduce
from heapq import heapify, heappop, heappush
from operator import or_
from typing import Literal

from spotserve.core.frozen import Frozen
from spotserve.core.ids import GpuId, ReplicaId, StepId
from spotserve.core.plan import Plan, Step
from spotserve.core.slices import Shard, Slice, kv_head_range, parameter_of, row_bytes, shard_ranges
from spotserve.core.snapshot import Holding, InstanceView, Replica
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


Interval = tuple[int, int]
Cells = dict[tuple[str, int], list[Interval]]
"""Half-open runs per (parameter, dimension); runs may overlap, that is what is being judged."""


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
        self._row_bytes: dict[str, int] = {}
        self._owned: dict[Shard, Cells] = {}
        self._cells_of: dict[int, Cells] = {}
        self._held_bytes: dict[int, int] = {}
        self._lacking: dict[tuple[int, Shard], tuple[Cells, int]] = {}

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
                named = instance.id in self.plan.trigger.instances
                known = [instance.remaining_s, self.plan.trigger.remaining_s if named else None]
                result[gpu] = min((left for left in known if left is not None), default=None)
        return result

    def _takes(self, instance: InstanceView, kind: str) -> bool:
        """Whether the trigger changes the state of an instance that the snapshot has as ready."""
        named = instance.state == "ready" and instance.id in self.plan.trigger.instances
        return named and self.plan.trigger.kind == kind

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
        """Weight ranges that each living GPU holds."""
        result: dict[GpuId, Cells] = {}
        of_shards: dict[tuple[Shard, ...], Cells] = {}
        for holding in self.world.holdings:
            if holding.gpu not in self.living:
                continue
            if holding.gpu not in result and not holding.slices:
                if holding.shards not in of_shards:
                    of_shards[holding.shards] = self._together((), holding)
                result[holding.gpu] = of_shards[holding.shards]
            else:
                result[holding.gpu] = self._together(result.get(holding.gpu, {}).items(), holding)
        return result

    def _together(self, runs_of: Iterable[tuple[tuple[str, int], list[Interval]]], holding: Holding) -> Cells:
        """Runs, and all that a holding names beside them."""
        cells: Cells = {key: list(runs) for key, runs in runs_of}
        for shard in holding.shards:
            for key, runs in self.owned(shard).items():
                cells.setdefault(key, []).extend(runs)
        add(cells, holding.slices)
        return {key: merged(runs) for key, runs in cells.items()}

    def lacking(self, seat: Seat) -> tuple[Cells, int]:
        """What a position needs and its GPU does not hold, and the bytes of that."""
        held = self.held.get(seat.gpu, {})
        # GPUs with the same shards have the same cells, which live as long as these facts.
        key = (id(held) if held else 0, seat.shard)
        if key not in self._lacking:
            needs = self.needs(seat).items()
            cells = {name: left for name, runs in needs if (left := minus(runs, held.get(name, [])))}
            self._lacking[key] = cells, self.cells_bytes(cells)
        return self._lacking[key]

    def held_bytes(self, gpu: GpuId) -> int:
        """Bytes of the weights that a GPU holds."""
        cells = self.held.get(gpu)
        if not cells:
            return 0
        if id(cells) not in self._held_bytes:
            self._held_bytes[id(cells)] = self.cells_bytes(cells)
        return self._held_bytes[id(cells)]

    def seats(self, replica: Replica) -> tuple[Seat, ...]:
        """The positions of a replica, as its stages and the parameter table define them."""
        result = []
        for stage in replica.stages:
            for rank, gpu in enumerate(stage.gpus):
                shard = Shard(
                    layers=stage.layers,
                    tensor=len(stage.gpus),
                    rank=rank,
                    first=stage.layers[0] == 0,
                    last=stage.layers[1] == self.model.num_layers,
                )
                heads = kv_head_range(self.model, tensor=len(stage.gpus), rank=rank)
                result.append(Seat(gpu, replica.id, shard, stage.layers, heads))
        return tuple(result)

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
        if shard not in self._owned:
            self._owned[shard] = {
                (name, parameter.dim): list(ranges) for name, parameter, ranges in shard_ranges(self.model, shard)
            }
        return self._owned[shard]

    def pool_bytes(self, replica: Replica, seat: Seat) -> int:
        """Bytes of a position's KV pool."""
        return replica.kv_blocks * self.plan.spec.limits.kv_block_tokens * self.token_bytes(seat.layers, seat.heads)

    def token_bytes(self, layers: Interval, heads: Interval) -> int:
        """Bytes of the keys and values of one token in a rectangle."""
        return 2 * (layers[1] - layers[0]) * (heads[1] - heads[0]) * self.model.head_dim * self.model.element_bytes

    def cells_of(self, slices: tuple[Slice, ...]) -> Cells:
        """The runs of a step's slices. They are those of one plan, which holds the very tuple, so its id names it."""
        if id(slices) not in self._cells_of:
            self._cells_of[id(slices)] = {}
            add(self._cells_of[id(slices)], slices)
        return self._cells_of[id(slices)]

    def slice_bytes(self, slices: Iterable[Slice]) -> int:
        """Bytes of some slices. Raises KeyError for a parameter that the table does not have."""
        total = 0
        for piece in slices:
            total += (piece.stop - piece.start) * self._row(piece.parameter)
        return total

    def _row(self, name: str) -> int:
        """Bytes of one index of a parameter's split dimension."""
        if name not in self._row_bytes:
            self._row_bytes[name] = row_bytes(self.model, parameter_of(self.model, name))
        return self._row_bytes[name]

    def cells_bytes(self, cells: Cells) -> int:
        """Bytes of disjoint runs."""
        return sum(
            self._row(name) * sum(stop - start for start, stop in runs) for (name, _), runs in cells.items() if runs
        )

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
                if len(bits) == len(self.plan.steps):  # No id is there twice, so that a name means one step.
                    known[step.depends_on] = reach
            result[step.id] = reach
        return result

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

    def unawaited(self, later: Step, earlier: Sequence[Step], mask: int) -> Sequence[Step]:
        """Those of `earlier`, whose `mask` it is, that `later` does not depend on."""
        if not mask & ~self.ancestors.get(later.id, 0):
            return ()
        return [step for step in earlier if not self.follows(later, step)]

    def mask(self, steps: Iterable[Step]) -> int:
        """The bit set of some steps."""
        return reduce(or_, (self._bits[step.id] for step in steps), 0)


def add(cells: Cells, slices: Iterable[Slice]) -> None:
    """Put slices into cells."""
    for piece in slices:
        cells.setdefault((piece.parameter, piece.dim), []).append((piece.start, piece.stop))


def merged(runs: Iterable[Interval]) -> list[Interval]:
    """Sorted disjoint runs with the same union."""
    ordered = sorted(runs)
    if len(ordered) < 2:
        return ordered
    result: list[Interval] = []
    for start, stop in ordered:
        if result and start <= result[-1][1]:
            result[-1] = (result[-1][0], max(stop, result[-1][1]))
        else:
            result.append((start, stop))
    return result


def overlap(runs: Iterable[Interval]) -> Interval | None:
    """The first place where two runs overlap, None if they are disjoint."""
    ordered = sorted(runs)
    if len(ordered) < 2:
        return None
    reach = None
    for start, stop in ordered:
        if reach is not None and start < reach:
            return start, min(stop, reach)
        reach = stop if reach is None else max(reach, stop)
    return None


def minus(runs: Iterable[Interval], taken: Sequence[Interval]) -> list[Interval]:
    """What of `runs` no run of `taken` covers."""
    left = merged(runs)
    if len(left) == len(taken) == 1 and taken[0][0] <= left[0][0] and left[0][1] <= taken[0][1]:
        return []
    for low, high in taken:
        if not left:
            break
        left = [part for a, b in left for part in ((a, min(b, low)), (max(a, high), b)) if part[0] < part[1]]
    return left
