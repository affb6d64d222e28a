"""Which instance takes which part of the tensor groups, by min-cost flow on the bytes it would have to fetch.

Costs are additive over the parts, so the sum is exact but for pieces that two parts of an instance share
("instance-level mapping on NIC bytes"); the bottleneck seating minimises the dearest part instead and bounds any other.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from ortools.graph.python import max_flow, min_cost_flow

from spotserve.errors import InvariantError
from spotserve.solvers.place.groups import Parts, Prices, common_unit, price
from spotserve.solvers.place.ports import Ports
from spotserve.solvers.place.problem import Flags, Integers, Overlaps, PlacementProblem

MAX_SCALED_COST = 2**60
"""The flow solver multiplies costs by its number of nodes and answers BAD_COST_RANGE beyond 2^63; 2^60 is safe."""

MAX_BOTTLENECK_PAIRS = 2**16
"""Instances x parts up to which the cheapest dearest part is looked for: each pair is then an arc of its own."""

COARSE_REUSE = 64
"""Levels that reuse keeps in the flow's costs before bytes to fetch are made coarser."""


@dataclass(frozen=True, slots=True, eq=False)
class Seating:
    """The parts, the instance of each, and the prices that led there."""

    parts: Parts
    where: Integers
    prices: Prices


def seat_groups(
    problem: PlacementProblem, ports: Ports, overlaps: Overlaps, *, goal: Literal["bytes", "reuse"] = "bytes"
) -> Seating:
    """Every part on an instance with room for it, as many groups whole as can be.

    The goal is fewest bytes fetched in total, then most reuse; or most reuse alone.
    """
    free = ports.num_gpus.copy()
    waiting = np.arange(0, problem.num_positions, problem.tensor)
    size = problem.tensor
    firsts, sizes, seats = [], [], []
    levels = 0
    while len(waiting):
        smaller = _part_size(size, int(free.max()))
        waiting = (waiting[:, None] + np.arange(0, size, smaller)[None, :]).ravel()
        size = smaller
        parts = Parts(waiting, np.full(len(waiting), size), is_uniform=True)
        prices = price(problem, ports, overlaps, parts)
        where = _cheapest(prices if goal == "bytes" else _free_of_charge(prices), free // size)
        seated = where >= 0
        firsts.append(waiting[seated])
        sizes.append(parts.size[seated])
        seats.append(where[seated])
        free -= size * np.bincount(where[seated], minlength=len(free))
        waiting = waiting[~seated]
        levels += 1
    order = np.argsort(np.concatenate(firsts))
    parts = Parts(np.concatenate(firsts)[order], np.concatenate(sizes)[order], is_uniform=levels == 1)
    return Seating(parts, np.concatenate(seats)[order], price(problem, ports, overlaps, parts))


def _part_size(size: int, largest: int) -> int:
    """The largest divisor of a part's size that fits the largest instance."""
    assert largest >= 1, f"no GPU left for a part of {size} ranks"
    return next(part for part in range(min(size, largest), 0, -1) if size % part == 0)


def _free_of_charge(prices: Prices) -> Prices:
    """The prices when bytes fetched cost nothing."""
    nothing = {name: np.zeros_like(getattr(prices, name)) for name in ("weights_fetched", "kv_bytes", "kv_present")}
    return replace(prices, **nothing)


def _cheapest(prices: Prices, slots: Integers) -> Integers:
    """The instance of every part, -1 where no slot is left, at least cost by min-cost flow.

    First fewest pairs without room, then fewest bytes, then most reuse, then most GPUs at home. Parts of a kind reach
    the instances over one pool; only where KV or a home makes a difference has a part an arc of its own.
    """
    plain, own, saved = costs_of(prices)
    num_instances, num_kinds = plain.shape
    num_parts = len(own)
    pool, place, nowhere = num_parts, num_parts + num_kinds, num_parts + num_kinds + num_instances
    sink = nowhere + 1
    instance, part = np.nonzero(saved)
    lacking = max(0, num_parts - int(slots.sum()))
    k, i = np.meshgrid(np.arange(num_kinds), np.arange(num_instances), indexing="ij")
    arcs = Arcs()
    into_pool = arcs.add(np.arange(num_parts), pool + prices.kind, 1, own)
    out_of_pool = arcs.add(pool + k.ravel(), place + i.ravel(), slots[i.ravel()], plain.T.ravel())
    direct = arcs.add(part, place + instance, 1, plain[instance, prices.kind[part]] + own[part] - saved[instance, part])
    if lacking:
        arcs.add(np.arange(num_parts), np.full(num_parts, nowhere), 1, np.zeros(num_parts, np.int64))
        arcs.add(np.array([nowhere]), np.array([sink]), lacking, np.zeros(1, np.int64))
    arcs.add(place + np.arange(num_instances), np.full(num_instances, sink), slots, np.zeros(num_instances, np.int64))
    supply = np.zeros(sink + 1, np.int64)
    supply[:num_parts], supply[sink] = 1, -num_parts
    flows = arcs.solve(supply)
    where = np.full(num_parts, -1, np.int64)
    taken = flows[direct] > 0
    where[part[taken]] = instance[taken]
    pooled = flows[into_pool] > 0
    by_kind = flows[out_of_pool].reshape(num_kinds, num_instances)
    for number in range(num_kinds):
        members = np.flatnonzero(pooled & (prices.kind == number))
        where[members] = np.repeat(np.arange(num_instances), by_kind[number])
    return where


def costs_of(prices: Prices) -> tuple[Integers, Integers, Integers]:
    """(by [instance, kind], by part, saved by [instance, part]) integer costs, coarse enough for the flow solver.

    A lower goal can never outweigh one unit of a higher one: each is worth less than that even summed over all parts.
    """
    num_parts, nodes = len(prices.kind), len(prices.kind) + sum(prices.weights_fetched.shape) + 2
    unit = common_unit(prices.weights_fetched, prices.kv_bytes, prices.kv_present)
    reuse_unit = common_unit(prices.weights_reused, prices.kv_reused)
    homely = int(prices.stayed.sum()) + 1
    squeezed = int(prices.squeezed.max(initial=0))
    while True:
        weights_reused, kv_reused = prices.weights_reused // reuse_unit, prices.kv_reused // reuse_unit
        fetched, kv, present = (each // unit for each in (prices.weights_fetched, prices.kv_bytes, prices.kv_present))
        useful = (int(weights_reused.max(initial=0)) + int(kv_reused.max(initial=0))) * num_parts * homely + homely
        largest = (int(fetched.max(initial=0)) + int(kv.max(initial=0)) + 1) * useful
        costly = largest * num_parts if squeezed else 0
        if (largest + costly * (squeezed + 1)) * nodes < MAX_SCALED_COST:
            break
        if useful >= COARSE_REUSE * homely * num_parts:
            reuse_unit *= 2
        else:
            unit *= 2
    plain = prices.squeezed * costly + fetched * useful - weights_reused * homely
    saved = present * useful + kv_reused * homely + prices.stayed
    return plain, kv * useful, saved


class Arcs:
    """Arcs of a min-cost flow, gathered and solved at once."""

    def __init__(self) -> None:
        self._flow = min_cost_flow.SimpleMinCostFlow()

    def add(self, tails: Integers, heads: Integers, capacity: Integers | int, costs: Integers) -> Integers:
        """Add arcs and return their numbers."""
        capacities = np.broadcast_to(np.asarray(capacity, np.int64), costs.shape)
        numbers: Integers = self._flow.add_arcs_with_capacity_and_unit_cost(
            tails.astype(np.int32), heads.astype(np.int32), np.ascontiguousarray(capacities), costs
        )
        return numbers

    def solve(self, supply: Integers) -> Integers:
        """The flow of every arc. Raises InvariantError for any status but OPTIMAL."""
        self._flow.set_nodes_supplies(np.arange(len(supply), dtype=np.int32), supply)
        status = self._flow.solve()
        if status != self._flow.OPTIMAL:
            raise InvariantError(f"min-cost flow answered {status}")
        flows: Integers = self._flow.flows(np.arange(self._flow.num_arcs(), dtype=np.int32))
        return flows


def seat_for_bottleneck(ports: Ports, seating: Seating) -> tuple[Integers, int] | None:
    """The seating whose dearest part is cheapest, at least bytes in total, and the price of that part.

    No placement is faster than that price. None where that many pairs are too many, parts are of several sizes, or room
    has to be looked at.
    """
    prices, parts = seating.prices, seating.parts
    fetched = prices.fetched
    if fetched.size > MAX_BOTTLENECK_PAIRS or not parts.is_uniform or prices.squeezed.any():
        return None
    slots = ports.num_gpus // parts.size[0]
    levels = np.unique(fetched)
    low, high = int(np.searchsorted(levels, fetched.min(axis=0).max())), len(levels) - 1
    while low < high:
        middle = (low + high) // 2
        if _seats_all(fetched <= levels[middle], slots):
            high = middle
        else:
            low = middle + 1
    instance, part = np.nonzero(fetched <= levels[high])
    return _cheapest_of(fetched[instance, part] // _coarse(fetched), instance, part, slots), int(levels[high])


def _seats_all(allowed: Flags, slots: Integers) -> bool:
    """Whether every part gets one of the instances that are allowed for it."""
    num_instances, num_parts = allowed.shape
    instance, part = np.nonzero(allowed)
    tails = np.concatenate((np.full(num_parts, 0), 2 + part, 2 + num_parts + np.arange(num_instances)))
    heads = np.concatenate((2 + np.arange(num_parts), 2 + num_parts + instance, np.full(num_instances, 1)))
    capacity = np.concatenate((np.ones(num_parts + len(part), np.int64), slots))
    flow = max_flow.SimpleMaxFlow()
    flow.add_arcs_with_capacity(tails.astype(np.int32), heads.astype(np.int32), capacity)
    status = flow.solve(0, 1)
    if status != flow.OPTIMAL:
        raise InvariantError(f"max flow answered {status}")
    return bool(flow.optimal_flow() == num_parts)


def _cheapest_of(costs: Integers, instance: Integers, part: Integers, slots: Integers) -> Integers:
    """The instance of every part among the given pairs, at least cost in total."""
    num_parts, num_instances = int(part.max()) + 1, len(slots)
    sink = num_parts + num_instances
    arcs = Arcs()
    pairs = arcs.add(part, num_parts + instance, 1, costs)
    arcs.add(
        num_parts + np.arange(num_instances), np.full(num_instances, sink), slots, np.zeros(num_instances, np.int64)
    )
    supply = np.zeros(sink + 1, np.int64)
    supply[:num_parts], supply[sink] = 1, -num_parts
    taken = arcs.solve(supply)[pairs] > 0
    where = np.empty(num_parts, np.int64)
    where[part[taken]] = instance[taken]
    return where


def _coarse(fetched: Integers) -> int:
    """A unit in which the flow solver can add the prices."""
    unit = common_unit(fetched)
    while int(fetched.max(initial=0)) // unit * (sum(fetched.shape) + 2) >= MAX_SCALED_COST:
        unit *= 2
    return unit
