"""Reuse: the most bytes that stay where they are (SpotServe, section 3.3, without its fixed bundles).

The assignment of GPUs to positions is exact and proven by potentials. Where it tears a tensor group apart that could
stay whole, groups are seated first and improved by swaps; the assignment's value is then the bound.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from spotserve.solvers.place.assignment import assign, by_scipy, value_of
from spotserve.solvers.place.inner import local_weights, rounding, seat_gpus, settled
from spotserve.solvers.place.judged import Judged, judge
from spotserve.solvers.place.ports import Ports, look_at_ports
from spotserve.solvers.place.problem import Integers, Overlaps, Placement, PlacementProblem, overlaps
from spotserve.solvers.place.search import EMPTY, changes_of
from spotserve.solvers.place.seating import Seating, seat_groups
from spotserve.solvers.result import Result

MAX_LOCAL_ASSIGNMENTS = 4096
"""Assignments inside one instance that the swap search may solve."""


def place_for_reuse(problem: PlacementProblem) -> Result[Placement]:
    """The placement that reuses most bytes; pairs without room and split groups are avoided before that."""
    ports, shared = look_at_ports(problem), overlaps(problem)
    everyone, everything = np.arange(len(problem.gpus)), np.arange(problem.num_positions)
    weights = local_weights(shared, everyone, everything)
    assignment = assign(weights)
    free = judge(problem, ports, shared, tuple(settled(weights, assignment.rows)))
    bound = free.reused_bytes + rounding(shared, everyone, everything)
    best = free
    if free.group_parts > problem.data * problem.pipeline:
        best = min(free, seat_for_reuse(problem, ports, shared), key=_rank)
    return Result(
        best.placement(problem),
        "optimal" if bound == best.reused_bytes else "feasible",
        objective=best.reused_bytes,
        bound=max(bound, best.reused_bytes),
        certificate={"kind": "assignment", "reused_bytes": free.reused_bytes, "stayed": free.stayed},
        statistics={
            **best.statistics(),
            "independent_solvers": assignment.solvers,
            "potentials_checked": 1,
        },
    )


def seat_for_reuse(problem: PlacementProblem, ports: Ports, shared: Overlaps) -> Judged:
    """Groups kept whole: seated by a flow on what each could reuse at most, then swapped while reuse grows."""
    seating = seat_groups(problem, ports, shared, goal="reuse")
    where = _Swaps(ports, shared, seating).improve()
    return judge(problem, ports, shared, seat_gpus(ports, shared, seating, where))


def _rank(judged: Judged) -> tuple[int, int, int, int]:
    return judged.squeezed, judged.group_parts, -judged.reused_bytes, -judged.stayed


@dataclass(slots=True)
class _Swaps:
    """Local search over seatings: the value of an instance is that of its best inner assignment."""

    ports: Ports
    shared: Overlaps
    seating: Seating
    values: dict[tuple[int, tuple[int, ...]], int] = field(default_factory=dict)

    def improve(self) -> Integers:
        """The seating after swaps and moves that each gained weight, in a fixed order."""
        where = self.seating.where
        while (better := self._better(where)) is not None:
            where = better
        return where

    def _better(self, where: Integers) -> Integers | None:
        """The first change that gains, None if none does or the search has taken long enough."""
        parts = self.seating.parts
        changes = changes_of(parts, where, self.ports.num_gpus, np.arange(len(where)))
        for number in range(len(changes.part)):
            part, other, target = int(changes.part[number]), int(changes.other[number]), int(changes.target[number])
            if other != EMPTY and other < part:
                continue
            origin = int(where[part])
            changed = changes.applied(where, number)
            gain = self._value(changed, origin) + self._value(changed, target)
            if gain > self._value(where, origin) + self._value(where, target):
                return changed
            if len(self.values) > MAX_LOCAL_ASSIGNMENTS:
                return None
        return None

    def _value(self, where: Integers, instance: int) -> int:
        members = tuple(int(part) for part in np.flatnonzero(where == instance))
        key = instance, members
        if key not in self.values:
            self.values[key] = self._solve(instance, members)
        return self.values[key]

    def _solve(self, instance: int, members: tuple[int, ...]) -> int:
        if not members:
            return 0
        parts = self.seating.parts
        positions = np.concatenate([np.arange(parts.first[r], parts.first[r] + parts.size[r]) for r in members])
        rows = np.flatnonzero(self.ports.instance_of == instance)
        reuse, room = self.shared.reuse(rows, positions), self.shared.room(rows, positions)
        weights = local_weights(self.shared, rows, positions)
        chosen = by_scipy(weights)
        lacking = value_of((~room).astype(np.int64), chosen)
        return value_of(reuse, chosen) - lacking * self.shared.most
