"""Inside an instance: which of its GPUs takes which of the positions seated there.

Room for old and new side by side comes before reuse, reuse before staying at home; interchangeable GPUs and instances
take positions in order, so that a plan reads naturally and never depends on a solver's whim.
"""

from __future__ import annotations

import numpy as np

from spotserve.solvers.place.assignment import MAX_SCALED_COST, MAX_SUM, by_scipy
from spotserve.solvers.place.groups import common_unit
from spotserve.solvers.place.ports import Ports
from spotserve.solvers.place.problem import Flags, Integers, Overlaps
from spotserve.solvers.place.seating import Seating


def seat_gpus(ports: Ports, overlaps: Overlaps, seating: Seating, where: Integers) -> tuple[int, ...]:
    """The GPU of every position, given the instance of every part.

    Inside an instance: fewest pairs without room, then most reuse, then most GPUs at home.
    """
    seats = seating.parts.spread(in_natural_order(ports, overlaps, where))
    rows = np.empty(len(seats), np.int64)
    members = np.split(np.argsort(ports.instance_of, kind="stable"), np.cumsum(ports.num_gpus)[:-1])
    order = np.argsort(seats, kind="stable")
    guests = np.split(order, np.cumsum(np.bincount(seats, minlength=len(members)))[:-1])
    for gpus, positions in zip(members, guests, strict=True):
        if len(positions):
            weights = local_weights(overlaps, gpus, positions)
            rows[positions] = gpus[list(settled(weights, by_scipy(weights)))]
    return tuple(int(row) for row in rows)


def in_natural_order(ports: Ports, overlaps: Overlaps, where: Integers) -> Integers:
    """The same seating with interchangeable instances in order: the first of them takes the first part.

    Instances that hold the same weights, no KV and nobody's home are interchangeable, the blank ones above all.
    """
    ordered = where.copy()
    alike: dict[tuple[bytes, ...], list[int]] = {}
    at_home = np.bincount(ports.instance_of, weights=overlaps.home >= 0, minlength=len(ports.num_gpus))
    has_kv = (ports.kv_row >= len(ports.kv_tokens)).any(axis=1)
    for instance in np.flatnonzero((at_home == 0) & ~has_kv):
        gpus = ports.instance_of == instance
        key = ports.weight_lacking[instance], overlaps.weights[gpus], overlaps.fits[gpus]
        alike.setdefault(tuple(each.tobytes() for each in key), []).append(int(instance))
    for instances in alike.values():
        guests = [np.flatnonzero(where == instance) for instance in instances]
        guests.sort(key=lambda parts: int(parts[0]) if len(parts) else len(where))
        for number, parts in zip(instances, guests, strict=True):
            ordered[parts] = number
    return ordered


def local_weights(overlaps: Overlaps, rows: Integers, positions: Integers) -> Integers:
    """Weights of the assignment of some GPUs to some positions: room before reuse before staying at home."""
    reuse = overlaps.reuse(rows, positions)
    home = overlaps.at_home(rows, positions)
    room = overlaps.room(rows, positions)
    return ranked_weights(reuse, home=home, room=room)


def ranked_weights(reuse: Integers, *, home: Flags, room: Flags) -> Integers:
    """One integer per pair in which room outweighs all reuse, and reuse all staying; coarse where it has to be.

    The unit is the greatest common divisor, doubled until the solvers' sums stay exact.
    """
    size = len(reuse) + 1
    weights = (reuse // _weight_unit(reuse, is_roomy=bool(room.all()))) * size + home
    if not room.all():
        weights = weights - (int(weights.max(initial=0)) * size + 1) * ~room
    return weights.astype(np.int64)


def rounding(overlaps: Overlaps, rows: Integers, positions: Integers) -> int:
    """Bytes by which the unit of `local_weights` may hide more reuse; 0 unless they had to be coarse."""
    reuse = overlaps.reuse(rows, positions)
    unit = _weight_unit(reuse, is_roomy=bool(overlaps.room(rows, positions).all()))
    return 0 if unit == common_unit(reuse) else unit * len(positions)


def _weight_unit(reuse: Integers, *, is_roomy: bool) -> int:
    size, unit = len(reuse) + 1, common_unit(reuse)
    while (int(reuse.max(initial=0)) // unit + 1) * size * (1 if is_roomy else size) >= _most(size):
        unit *= 2
    return unit


def _most(size: int) -> int:
    """The bound on weights that OR-Tools (cost scaling) and scipy (doubles) both keep."""
    return min(MAX_SCALED_COST // (2 * size**2), MAX_SUM // (2 * size))


def settled(weights: Integers, rows: tuple[int, ...]) -> list[int]:
    """The same value with interchangeable GPUs in order: the first of them takes the first position."""
    settled = list(rows)
    alike: dict[bytes, list[int]] = {}
    for row in range(len(weights)):
        alike.setdefault(weights[row].tobytes(), []).append(row)
    for members in alike.values():
        if len(members) > 1:
            seats = [position for position, row in enumerate(rows) if row in members]
            for position, row in zip(seats, members, strict=False):
                settled[position] = row
    return settled
