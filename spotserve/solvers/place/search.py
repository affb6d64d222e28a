"""From a cheap seating of parts to a faster one: bottleneck repair, then the search that the certificate guides.

Repair looks at bytes received only and takes microseconds. The search asks the max-flow certificate which instances are
hot (the full in-port, or those that fetch the pieces of the full out-ports), swaps or moves only their parts, and keeps
what shortens the migration.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from spotserve.solvers.place.groups import Parts, Prices, fetched_alone
from spotserve.solvers.place.ports import Bottleneck, Load, Ports
from spotserve.solvers.place.problem import Flags, Integers
from spotserve.solvers.place.seating import Seating

TRIALS_PER_ROUND = 24
"""Most promising changes that are weighed exactly before the search gives up."""

MAX_EVICTIONS = 32
"""Evictions of all parts of a kind that one repair may try."""

EMPTY = -1


@dataclass(frozen=True, slots=True, eq=False)
class Changes:
    """Parts that may leave their instance, and what they swap with (`EMPTY`: they move to free GPUs of `target`)."""

    part: Integers
    other: Integers
    target: Integers

    def applied(self, where: Integers, number: int) -> Integers:
        """The seating after one of the changes."""
        changed = where.copy()
        part, other = int(self.part[number]), int(self.other[number])
        if other != EMPTY:
            changed[other] = where[part]
        changed[part] = self.target[number]
        return changed


def changes_of(parts: Parts, where: Integers, num_gpus: Integers, movable: Integers) -> Changes:
    """Every swap of a movable part with one of its size on another instance, and every move to free GPUs."""
    free = num_gpus - np.bincount(where, weights=parts.size, minlength=len(num_gpus)).astype(np.int64)
    swaps = (parts.size[movable][:, None] == parts.size[None, :]) & (where[movable][:, None] != where[None, :])
    mover, other = np.nonzero(swaps)
    moves = (parts.size[movable][:, None] <= free[None, :]) & (where[movable][:, None] != np.arange(len(free))[None, :])
    leaver, target = np.nonzero(moves)
    return Changes(
        np.concatenate((movable[mover], movable[leaver])),
        np.concatenate((other, np.full(len(leaver), EMPTY))),
        np.concatenate((where[other], target)),
    )


@dataclass(frozen=True, slots=True, eq=False)
class Fetches:
    """Bytes to fetch for one part: weights by [instance, kind of part], KV by [instance, part].

    Parts of one kind on an instance share their weights, so only the first of them brings any.
    """

    weights: Integers
    kv: Integers
    kind: Integers

    def received(self, where: Integers) -> Integers:
        """Bytes that every instance receives."""
        kv = np.bincount(where, weights=self.kv[where, np.arange(len(where))], minlength=len(self.weights))
        received: Integers = (self.weights * (self._count(where) > 0)).sum(axis=1) + kv.astype(np.int64)
        return received

    def changed(self, where: Integers, changes: Changes) -> tuple[Integers, Integers]:
        """What every change adds to the bytes of the instance that the part leaves, and of the one it goes to."""
        count = self._count(where)
        leaving, arriving = self.weights * (count == 1), self.weights * (count == 0)
        part, target, swapped = changes.part, changes.target, changes.other != EMPTY
        other, origin = np.where(swapped, changes.other, part), where[changes.part]
        kind, other_kind = self.kind[part], self.kind[other]
        alike = swapped & (kind == other_kind)
        here = np.where(alike, 0, np.where(swapped, arriving[origin, other_kind], 0) - leaving[origin, kind])
        there = np.where(alike, 0, arriving[target, kind] - np.where(swapped, leaving[target, other_kind], 0))
        here += np.where(swapped, self.kv[origin, other], 0) - self.kv[origin, part]
        there += self.kv[target, part] - np.where(swapped, self.kv[target, other], 0)
        return here, there

    def _count(self, where: Integers) -> Integers:
        count = np.zeros(self.weights.shape, np.int64)
        np.add.at(count, (where, self.kind), 1)
        return count


def fetches(prices: Prices) -> Fetches:
    """What the prices say of bytes to fetch."""
    return Fetches(prices.weights_fetched, prices.kv_bytes - prices.kv_present, prices.kind)


def repair(seating: Seating, start: Integers, num_gpus: Integers, *, rounds: int = 4096) -> Integers:
    """Swap or move parts away from the instance that fetches most while that lowers the most that one fetches.

    Where no single change does, all its parts of one kind go at once: only the last of them takes the weights along.
    """
    needed, where = fetches(seating.prices), start
    received, evictions = needed.received(where), 0
    for _ in range(rounds):
        fullest = int(received.argmax())
        changes = changes_of(seating.parts, where, num_gpus, np.flatnonzero(where == fullest))
        if not len(changes.part):
            break
        most = _most_received(seating, needed, where, received, changes)
        best = int(most.argmin())
        if most[best] < received[fullest]:
            where = changes.applied(where, best)
        else:
            evicted = _evicted(seating, needed, where, received, num_gpus) if evictions < MAX_EVICTIONS else None
            if evicted is None:
                break
            where, evictions = evicted, evictions + 1
        received = needed.received(where)
    return where


def _most_received(
    seating: Seating, needed: Fetches, where: Integers, received: Integers, changes: Changes
) -> Integers:
    """The more that either instance of a change would receive; not to be had where more pairs lacked room."""
    here, there = needed.changed(where, changes)
    most: Integers = np.maximum(received[where[changes.part]] + here, received[changes.target] + there)
    squeezed = seating.prices.squeezed[:, seating.prices.kind]
    most[_squeezed_more(squeezed, where, changes)] = np.iinfo(np.int64).max
    return most


def _evicted(
    seating: Seating, needed: Fetches, where: Integers, received: Integers, num_gpus: Integers
) -> Integers | None:
    """The best seating in which the fullest instance has no part of some kind any more; None if none relieves it."""
    fullest = int(received.argmax())
    kinds = np.unique(needed.kind[where == fullest])
    best, least = None, int(received[fullest])
    for kind in kinds:
        tried = _without_kind(seating, needed, where, num_gpus, instance=fullest, kind=int(kind))
        if tried is not None and (most := int(needed.received(tried).max())) < least:
            best, least = tried, most
    return best


def _without_kind(
    seating: Seating, needed: Fetches, where: Integers, num_gpus: Integers, *, instance: int, kind: int
) -> Integers | None:
    """Exchange an instance's parts of a kind one by one, at fewest bytes in total; None if that overfills another."""
    squeezed, most = seating.prices.squeezed[:, seating.prices.kind], int(needed.received(where)[instance])
    for _ in range(int(((where == instance) & (needed.kind == kind)).sum())):
        leaving = np.flatnonzero((where == instance) & (needed.kind == kind))
        changes = changes_of(seating.parts, where, num_gpus, leaving)
        received = needed.received(where)
        here, there = needed.changed(where, changes)
        fits = (received[changes.target] + there < most) & ~_squeezed_more(squeezed, where, changes)
        fits &= (changes.other == EMPTY) | (needed.kind[changes.other] != kind)
        options = np.flatnonzero(fits)
        if not len(options):
            return None
        where = changes.applied(where, int(options[(here + there)[options].argmin()]))
    return where


def _squeezed_more(squeezed: Integers, where: Integers, changes: Changes) -> Flags:
    """Which changes put more pairs where there is no room."""
    part, target, swapped = changes.part, changes.target, changes.other != EMPTY
    other, origin = np.where(swapped, changes.other, part), where[changes.part]
    moved = squeezed[target, part] - squeezed[origin, part]
    back = np.where(swapped, squeezed[origin, other] - squeezed[target, other], 0)
    more: Flags = moved + back > 0
    return more


@dataclass(frozen=True, slots=True, eq=False)
class Weighed:
    """A seating, what passes the ports, and the certificate of the busiest."""

    where: Integers
    load: Load
    bottleneck: Bottleneck

    @property
    def rank(self) -> tuple[int, int, int]:
        """Less is better: time, how many in-ports take that long, bytes in total."""
        fullest = int((self.load.received >= self.bottleneck.num_bytes).sum())
        return self.bottleneck.num_bytes, fullest, int(self.load.received.sum())


def weigh(ports: Ports, parts: Parts, where: Integers) -> Weighed:
    """Weigh a seating exactly."""
    load = ports.load(parts.spread(where))
    return Weighed(where, load, ports.bottleneck(load))


@dataclass(frozen=True, slots=True, eq=False)
class Found:
    """Where the search ended, and how many seatings it weighed."""

    best: Weighed
    evaluations: int


def search(ports: Ports, seating: Seating, start: Weighed, *, bound: int, evaluations: int) -> Found:
    """Improve a seating until it reaches `bound`, no promising change helps, or so many seatings were weighed."""
    now, weighed = start, 0
    while now.bottleneck.num_bytes > bound:
        better = None
        for changed in _promising(ports, seating, now):
            if weighed >= evaluations:
                break
            found = weigh(ports, seating.parts, changed)
            weighed += 1
            if found.rank < now.rank:
                better = found
                break
        if better is None:
            break
        now = better
    return Found(now, weighed)


def _promising(ports: Ports, seating: Seating, now: Weighed) -> Iterator[Integers]:
    """The changes that relieve the hot instances most by the additive estimate, best first."""
    parts, prices, bottleneck, where = seating.parts, seating.prices, now.bottleneck, now.where
    exposed = ports if bottleneck.is_in_port else ports.restricted(bottleneck.classes)
    hot = bottleneck.ports if bottleneck.is_in_port else np.flatnonzero(exposed.load(parts.spread(where)).received)
    changes = changes_of(parts, where, ports.num_gpus, np.flatnonzero(np.isin(where, hot)))
    here, there = fetches(prices).changed(where, changes)
    received = now.load.received
    worst = np.maximum(received[where[changes.part]] + here, received[changes.target] + there)
    useful = worst < bottleneck.num_bytes
    if bottleneck.is_in_port:
        promise = worst
    else:
        weights, kv = fetched_alone(exposed, parts)
        promise = np.add(*Fetches(weights, kv, prices.kind).changed(where, changes))
        useful &= promise < 0
    useful &= ~_squeezed_more(prices.squeezed[:, prices.kind], where, changes)
    candidates = np.flatnonzero(useful)
    for number in candidates[np.argsort(promise[candidates], kind="stable")[:TRIALS_PER_ROUND]]:
        yield changes.applied(where, int(number))
