"""How long a placement's migration takes at best, and how long the best placement's does: two models for HiGHS.

They share nothing with the solvers. Content is counted in chunks of a layer, ports are those of instances, GPUs
under notice still send, and weights that several GPUs of an instance lack pass its port once. Given a placement, the
sources are a linear program. The joint model places the tensor groups as well, each inside one instance.
"""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from scipy import sparse
from scipy.optimize import Bounds, LinearConstraint, linprog, milp

from spotserve.core.ids import InstanceId, ReplicaId, instance_of
from spotserve.core.plan import Plan
from spotserve.core.snapshot import Replica

GIGA = 1e9


@dataclass(frozen=True, slots=True, order=True)
class Content:
    """Weights of a cell, or with `replica` the KV of its moving requests there."""

    layers: tuple[int, int]
    chunks: tuple[int, int]
    replica: ReplicaId | None = None


@dataclass(frozen=True, slots=True)
class Joint:
    """The best placement's makespan, the bound below it, and whether they meet."""

    makespan_s: float
    bound_s: float
    proven: bool
    columns: int


class Migration:
    """What a plan's target needs and who holds it, cut so finely that nobody holds a cell in part."""

    def __init__(self, plan: Plan) -> None:
        world, model = plan.snapshot.world, plan.spec.model
        self.plan = plan
        self.num_chunks = len(model.axis("q_heads").chunks)
        self.link = plan.spec.profile.link_bytes_per_s
        before = {one.id for one in world.replicas}
        after = {one.id for one in plan.target.replicas}
        self.fresh = tuple(one for one in plan.target.replicas if one.id not in before)
        self.kept = {one.id: one for one in plan.target.replicas if one.id in before}
        self.leaving = {one.id: one for one in world.replicas if one.id not in after}
        everyone = (*world.replicas, *self.fresh)
        marks = sorted({edge for one in everyone for stage in one.stages for edge in stage.layers})
        edges = sorted(
            {
                self.chunks_of(one.tensor, rank)[side]
                for one in everyone
                for rank in range(one.tensor)
                for side in (0, 1)
            }
        )
        self.layer_runs = list(itertools.pairwise(marks))
        self.chunk_runs = list(itertools.pairwise(edges))
        layer_bytes = sum(
            int(np.prod(row.shape)) * model.element_bytes for row in model.parameters if row.stage == "layer"
        )
        self.weight_bytes = layer_bytes / self.num_chunks
        assert model.num_kv_heads % self.num_chunks == 0, "ranks share KV, which comes to each of them by itself"
        heads = model.num_kv_heads / self.num_chunks
        self.token_bytes = 2 * heads * model.head_dim * model.element_bytes
        moving = {action.request for action in plan.requests if action.action == "move"}
        self.tokens: Counter[ReplicaId] = Counter()
        for request in plan.snapshot.requests:
            if request.replica is not None and request.request in moving:
                self.tokens[request.replica] += sum(choice.kv_tokens for choice in request.choices)
        self.sources: dict[ReplicaId, list[ReplicaId]] = defaultdict(list)
        for route in plan.routes:
            if self.tokens[route.from_replica]:
                self.sources[route.to_replica].append(route.from_replica)
        self.holders: dict[Content, set[InstanceId]] = defaultdict(set)
        for one in world.replicas:
            for index, gpu in enumerate(one.gpus):
                for cell in self._cells(one, index):
                    self.holders[cell].add(instance_of(gpu))
                    if one.id in self.leaving:
                        self.holders[Content(cell.layers, cell.chunks, one.id)].add(instance_of(gpu))

    def chunks_of(self, tensor: int, rank: int) -> tuple[int, int]:
        """The chunks that a rank owns; degrees divide their number."""
        assert self.num_chunks % tensor == 0, f"tensor degree {tensor} does not divide {self.num_chunks} chunks"
        return rank * self.num_chunks // tensor, (rank + 1) * self.num_chunks // tensor

    def _cells(self, replica: Replica, index: int) -> Iterator[Content]:
        stage, rank = divmod(index, replica.tensor)
        layers, chunks = replica.stages[stage].layers, self.chunks_of(replica.tensor, rank)
        for run in self.layer_runs:
            if layers[0] <= run[0] < layers[1]:
                for columns in self.chunk_runs:
                    if chunks[0] <= columns[0] < chunks[1]:
                        yield Content(run, columns)

    def needs(self, replica: Replica, index: int) -> Iterator[Content]:
        """What a position of a target's replica must have: weights of a new one, and KV that comes to it."""
        for cell in self._cells(replica, index):
            if replica.id not in self.kept:
                yield cell
            for source in self.sources[replica.id]:
                yield Content(cell.layers, cell.chunks, source)

    def bytes(self, content: Content) -> float:
        """How large it is."""
        cells = (content.layers[1] - content.layers[0]) * (content.chunks[1] - content.chunks[0])
        each = self.weight_bytes if content.replica is None else self.tokens[content.replica] * self.token_bytes
        return cells * each

    def fetched(self) -> Demands:
        """What crosses which in-port of the plan's placement, by who can send it."""
        lacked = {
            (instance_of(gpu), content)
            for replica in (*self.fresh, *self.kept.values())
            for index, gpu in enumerate(replica.gpus)
            for content in self.needs(replica, index)
            if instance_of(gpu) not in self.holders[content]
        }
        demands: Demands = Counter()
        for into, content in lacked:
            demands[into, tuple(sorted(self.holders[content]))] += self.bytes(content)
        return demands


Demands = Counter[tuple[InstanceId, tuple[InstanceId, ...]]]
"""Bytes per receiving instance and set of instances that hold them."""


def placement_s(plan: Plan) -> float:
    """The least makespan of a plan's placement: the sources as a linear program."""
    migration = Migration(plan)
    demands = sorted(migration.fetched().items())
    if not demands:
        return 0.0
    ports = {name for (receiver, holders), _ in demands for name in (receiver, *holders)}
    names = {port: number for number, port in enumerate(sorted(ports))}
    arcs = [(number, holder) for number, ((_, holders), _) in enumerate(demands) for holder in holders]
    count = len(arcs)
    sent = sparse.csr_array((np.ones(count), ([arc[0] for arc in arcs], range(count))), shape=(len(demands), count + 1))
    rows = [names[holder] for _, holder in arcs] + [len(names) + names[demands[number][0][0]] for number, _ in arcs]
    rate = -migration.link / GIGA
    load = sparse.csr_array(
        (
            np.concatenate([np.ones(2 * count), np.full(2 * len(names), rate)]),
            (rows + list(range(2 * len(names))), [*range(count), *range(count), *[count] * (2 * len(names))]),
        ),
        shape=(2 * len(names), count + 1),
    )
    cost = np.zeros(count + 1)
    cost[-1] = 1.0
    sizes = np.array([size for _, size in demands]) / GIGA
    found = linprog(cost, A_ub=load, b_ub=np.zeros(2 * len(names)), A_eq=sent, b_eq=sizes, method="highs")
    assert found.status == 0, f"linear program answered {found.message}"
    return float(found.fun)


def joint_s(plan: Plan, *, time_limit_s: float) -> Joint:
    """The least makespan of any placement of the plan's new replicas with tensor groups inside instances.

    Variables: y (group on instance) binary, z (some of these groups are on the instance), f (gigabytes of a class of
    content from a holder to an instance), T. A class is content that the same groups need and the same instances hold.
    """
    migration = Migration(plan)
    busy = {gpu for replica in migration.kept.values() for gpu in replica.gpus}
    slots: Counter[InstanceId] = Counter()
    trigger = set(plan.trigger.instances) if plan.trigger.kind in ("notice", "lost") else set()
    for instance in plan.snapshot.world.instances:
        if instance.state == "ready" and instance.id not in trigger:
            slots[instance.id] = sum(gpu.id not in busy for gpu in instance.gpus)
    instances = sorted(name for name, count in slots.items() if count)
    return _Model(migration, instances, slots).solve(time_limit_s)


class _Model:
    """The joint model's columns and rows."""

    def __init__(self, migration: Migration, instances: list[InstanceId], slots: Counter[InstanceId]) -> None:
        self.migration, self.instances, self.slots = migration, instances, slots
        self.tensor = migration.fresh[0].tensor if migration.fresh else 1
        self.groups = [(one, stage) for one in migration.fresh for stage in range(one.pipeline)]
        self.entries: list[tuple[int, int, float]] = []
        self.low: list[float] = []
        self.high: list[float] = []
        self.columns = 1 + len(instances) * len(self.groups)
        self.any_of: dict[tuple[int, tuple[int, ...]], int] = {}
        self.loads: dict[tuple[str, InstanceId], list[int]] = defaultdict(list)

    def _y(self, instance: int, group: int) -> int:
        return 1 + instance * len(self.groups) + group

    def _any(self, instance: int, members: tuple[int, ...]) -> int:
        """The column that is at least 1 if one of some groups is on an instance."""
        if len(members) == 1:
            return self._y(instance, members[0])
        if (instance, members) not in self.any_of:
            self.any_of[instance, members] = self.columns
            self.columns += 1
            for group in members:
                self._row([(self.any_of[instance, members], 1.0), (self._y(instance, group), -1.0)], 0.0, np.inf)
        return self.any_of[instance, members]

    def _row(self, entries: list[tuple[int, float]], low: float, high: float) -> None:
        number = len(self.low)
        self.entries += [(number, column, value) for column, value in entries]
        self.low.append(low)
        self.high.append(high)

    def solve(self, time_limit_s: float) -> Joint:
        """Build, solve, and say how sure."""
        for group in range(len(self.groups)):
            self._row([(self._y(i, group), 1.0) for i in range(len(self.instances))], 1.0, 1.0)
        for i, name in enumerate(self.instances):
            most = self.slots[name] // self.tensor
            self._row([(self._y(i, group), 1.0) for group in range(len(self.groups))], 0.0, most)
        for (holders, members), size in sorted(self._classes().items()):
            for i, name in enumerate(self.instances):
                if name not in holders:
                    self._flow([(self._any(i, members), -size)], 0.0, holders, name)
        for (into, holders), size in sorted(self._to_kept().items()):
            self._flow([], size, holders, into)
        rate = -self.migration.link / GIGA
        for columns in self.loads.values():
            self._row([*((column, 1.0) for column in columns), (0, rate)], -np.inf, 0.0)
        return self._answer(time_limit_s)

    def _flow(
        self, entries: list[tuple[int, float]], size: float, holders: tuple[InstanceId, ...], into: InstanceId
    ) -> None:
        """One class into one instance: what its groups need comes from its holders."""
        flows = range(self.columns, self.columns + len(holders))
        self.columns += len(holders)
        self._row([*((column, 1.0) for column in flows), *entries], size, np.inf)
        self.loads["in", into] += flows
        for column, holder in zip(flows, holders, strict=True):
            self.loads["out", holder].append(column)

    def _classes(self) -> dict[tuple[tuple[InstanceId, ...], tuple[int, ...]], float]:
        """Gigabytes that each set of groups needs and each set of instances holds."""
        needing: dict[Content, dict[int, None]] = defaultdict(dict)
        for number, (replica, stage) in enumerate(self.groups):
            for rank in range(self.tensor):
                for content in self.migration.needs(replica, stage * self.tensor + rank):
                    needing[content][number] = None
        classes: Counter[tuple[tuple[InstanceId, ...], tuple[int, ...]]] = Counter()
        for content, members in needing.items():
            holders = tuple(sorted(self.migration.holders[content]))
            classes[holders, tuple(members)] += self.migration.bytes(content) / GIGA
        return classes

    def _to_kept(self) -> dict[tuple[InstanceId, tuple[InstanceId, ...]], float]:
        """Gigabytes of KV that come to replicas that stay where they are."""
        lacked = {
            (instance_of(gpu), content)
            for replica in self.migration.kept.values()
            for index, gpu in enumerate(replica.gpus)
            for content in self.migration.needs(replica, index)
            if instance_of(gpu) not in self.migration.holders[content]
        }
        sizes: Counter[tuple[InstanceId, tuple[InstanceId, ...]]] = Counter()
        for into, content in lacked:
            sizes[into, tuple(sorted(self.migration.holders[content]))] += self.migration.bytes(content) / GIGA
        return sizes

    def _answer(self, time_limit_s: float) -> Joint:
        rows, columns, values = zip(*self.entries, strict=True) if self.entries else ((), (), ())
        matrix = sparse.csr_array((values, (rows, columns)), shape=(len(self.low), self.columns))
        cost = np.zeros(self.columns)
        cost[0] = 1.0
        binaries = len(self.instances) * len(self.groups)
        kinds = np.zeros(self.columns)
        kinds[1 : 1 + binaries] = 1
        most = np.full(self.columns, np.inf)
        most[1 : 1 + binaries] = 1.0
        found = milp(
            cost,
            constraints=LinearConstraint(matrix, self.low, self.high),
            integrality=kinds,
            bounds=Bounds(np.zeros(self.columns), most),
            options={"time_limit": time_limit_s, "mip_rel_gap": 1e-6},
        )
        bound = float(found.mip_dual_bound) if found.mip_dual_bound is not None else 0.0
        if found.x is None:
            return Joint(float("inf"), max(0.0, bound), proven=False, columns=self.columns)
        return Joint(float(found.fun), bound, proven=found.status == 0, columns=self.columns)
