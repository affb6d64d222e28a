"""What the checker says, and the facts it judges a plan by: derived from the file alone, not from any solver."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from heapq import heapify, heappop, heappush
from typing import Literal

from spotserve.core.frozen import Frozen
from spotserve.core.ids import GpuId, ReplicaId, StepId
from spotserve.core.plan import Plan, Step
from spotserve.core.slices import Shard, Slice, kv_head_range, parameter_of, row_bytes, shard_slices
from spotserve.core.snapshot import InstanceView, Replica

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
        """`CODE step path: message`, a dash where no step is meant."""
        return f"{self.code} {self.step or '-'} {self.path}: {self.message}"


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
        for holding in self.world.holdings:
            if holding.gpu not in self.living:
                continue
            cells = result.setdefault(holding.gpu, {})
            for shard in holding.shards:
                add(cells, shard_slices(self.model, shard))
            add(cells, holding.slices)
        return {gpu: {key: merged(runs) for key, runs in cells.items()} for gpu, cells in result.items()}

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
        return {seat.gpu: seat for replica in self.leaving.values() for seat in self.seats(replica)}

    @cached_property
    def new_seat(self) -> dict[GpuId, Seat]:
        """The position each GPU takes in a new replica."""
        return {seat.gpu: seat for replica in self.fresh.values() for seat in self.seats(replica)}

    def needs(self, seat: Seat) -> Cells:
        """The weight ranges of a position."""
        cells: Cells = {}
        add(cells, shard_slices(self.model, seat.shard))
        return cells

    def pool_bytes(self, replica: Replica, seat: Seat) -> int:
        """Bytes of a position's KV pool."""
        return replica.kv_blocks * self.plan.spec.limits.kv_block_tokens * self.token_bytes(seat.layers, seat.heads)

    def token_bytes(self, layers: Interval, heads: Interval) -> int:
        """Bytes of the keys and values of one token in a rectangle."""
        return 2 * (layers[1] - layers[0]) * (heads[1] - heads[0]) * self.model.head_dim * self.model.element_bytes

    def slice_bytes(self, slices: Iterable[Slice]) -> int:
        """Bytes of some slices. Raises KeyError for a parameter that the table does not have."""
        total = 0
        for piece in slices:
            if piece.parameter not in self._row_bytes:
                self._row_bytes[piece.parameter] = row_bytes(self.model, parameter_of(self.model, piece.parameter))
            total += (piece.stop - piece.start) * self._row_bytes[piece.parameter]
        return total

    def cells_bytes(self, cells: Cells) -> int:
        """Bytes of disjoint runs."""
        return sum(
            self.slice_bytes(Slice(parameter=name, dim=dim, start=a, stop=b) for a, b in runs)
            for (name, dim), runs in cells.items()
        )

    def moving_tokens(self, replica: ReplicaId) -> tuple[int, int]:
        """KV tokens and choices that move away from a replica."""
        moving = {action.request for action in self.plan.requests if action.action == "move"}
        mine = [r for r in self.plan.snapshot.requests if r.replica == replica and r.request in moving]
        tokens = sum(choice.kv_tokens for request in mine for choice in request.choices)
        return tokens, sum(max(1, len(request.choices)) for request in mine)

    @cached_property
    def ancestors(self) -> dict[StepId, int]:
        """For each step the bit set of all it depends on, directly or not (empty where a cycle hides it)."""
        bits = self._bits
        result: dict[StepId, int] = {}
        for step in self.in_order:
            reach = 0
            for name in step.depends_on:
                if name in result:
                    reach |= bits[name] | result[name]
            result[step.id] = reach
        return result

    @cached_property
    def _bits(self) -> dict[StepId, int]:
        return {step.id: 1 << number for number, step in enumerate(self.plan.steps)}

    @cached_property
    def in_order(self) -> tuple[Step, ...]:
        """The steps in topological order, file order where it is one; steps on or behind a cycle are left out."""
        number = {step.id: index for index, step in enumerate(self.plan.steps)}
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
                blocked[index].discard(step.id)
                if not blocked[index]:
                    heappush(ready, index)
        return tuple(result)

    def follows(self, later: Step, earlier: Step) -> bool:
        """Whether `later` depends on `earlier`, directly or not."""
        return bool(self.ancestors.get(later.id, 0) & self._bits[earlier.id])


def add(cells: Cells, slices: Iterable[Slice]) -> None:
    """Put slices into cells."""
    for piece in slices:
        cells.setdefault((piece.parameter, piece.dim), []).append((piece.start, piece.stop))


def merged(runs: Iterable[Interval]) -> list[Interval]:
    """Sorted disjoint runs with the same union."""
    result: list[Interval] = []
    for start, stop in sorted(runs):
        if result and start <= result[-1][1]:
            result[-1] = (result[-1][0], max(stop, result[-1][1]))
        else:
            result.append((start, stop))
    return result


def overlap(runs: Iterable[Interval]) -> Interval | None:
    """The first place where two runs overlap, None if they are disjoint."""
    reach = None
    for start, stop in sorted(runs):
        if reach is not None and start < reach:
            return start, min(stop, reach)
        reach = stop if reach is None else max(reach, stop)
    return None


def minus(runs: Iterable[Interval], taken: Iterable[Interval]) -> list[Interval]:
    """What of `runs` no run of `taken` covers."""
    left = merged(runs)
    for low, high in taken:
        left = [part for a, b in left for part in ((a, min(b, low)), (max(a, high), b)) if part[0] < part[1]]
    return left
