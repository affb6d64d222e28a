"""Tensor groups in parts, and what a part costs on an instance, without a loop over pairs.

A group (one stage of one replica) goes whole into one instance where its ranks fit, in equal parts over several where
they must; groups for which only fragments are left are cut into smaller parts.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd

import numpy as np

from spotserve.solvers.place.ports import Ports
from spotserve.solvers.place.problem import Flags, Integers, Overlaps, PlacementProblem


@dataclass(frozen=True, slots=True, eq=False)
class Parts:
    """Runs of positions that share an instance: `first[r]` and `size[r]`; `is_uniform`: all of one size.

    They are not where only fragments of instances were left for some groups.
    """

    first: Integers
    size: Integers
    is_uniform: bool

    def positions(self) -> Integers:
        """All positions, part by part."""
        return np.concatenate([np.arange(a, a + b) for a, b in zip(self.first, self.size, strict=True)])

    def spread(self, where: Integers) -> Integers:
        """The instance of every position, from that of every part."""
        seats = np.empty(int(self.size.sum()), np.int64)
        seats[self.positions()] = np.repeat(where, self.size)
        return seats


@dataclass(frozen=True, slots=True, eq=False)
class Prices:
    """What parts cost on instances. Parts of one kind (the same seats of a replica) differ only in KV and homes.

    By [instance, kind]: weight bytes to fetch alone, pairs without room at least, weight bytes reused at most. By part:
    its kind, and the bytes of its KV. By [instance, part]: what of that KV is there, reused at most, and GPUs at home.
    """

    weights_fetched: Integers
    squeezed: Integers
    weights_reused: Integers
    kind: Integers
    kv_bytes: Integers
    kv_present: Integers
    kv_reused: Integers
    stayed: Integers

    @property
    def fetched(self) -> Integers:
        """Bytes that an instance fetches for a part alone: [instance, part]."""
        fetched: Integers = self.weights_fetched[:, self.kind] + self.kv_bytes - self.kv_present
        return fetched

    @property
    def reused(self) -> Integers:
        """Bytes that GPUs of an instance can reuse of a part, at most: [instance, part]."""
        reused: Integers = self.weights_reused[:, self.kind] + self.kv_reused
        return reused


@dataclass(frozen=True, slots=True, eq=False)
class Kinds:
    """The distinct runs of seats among some parts: `spans[kind]`, and replica and kind of every part."""

    spans: Flags
    replica: Integers
    kind: Integers


def kinds_of(parts: Parts, seats: int) -> Kinds:
    replica, start = np.divmod(parts.first, seats)
    kinds, kind = np.unique(np.stack((start, parts.size)), axis=1, return_inverse=True)
    spans = np.zeros((kinds.shape[1], seats), np.bool_)
    for number, (first, size) in enumerate(kinds.T):
        spans[number, first : first + size] = True
    return Kinds(spans, replica, kind.ravel())


def needs_of(spans: Flags, needed: Flags) -> Flags:
    """The pieces that any seat of a span needs."""
    needs: Flags = spans.astype(np.float32) @ needed.astype(np.float32) > 0
    return needs


def counts_of(spans: Flags, needed: Flags) -> Integers:
    """How many seats of a span need each piece."""
    counts: Integers = np.rint(spans.astype(np.float32) @ needed.astype(np.float32)).astype(np.int64)
    return counts


def fetched_alone(ports: Ports, parts: Parts) -> tuple[Integers, Integers]:
    """Bytes to fetch for a part alone: weights by [instance, kind of part], KV by [instance, part]."""
    kinds = kinds_of(parts, ports.seats)
    weights, kv = ports.missing(needs_of(kinds.spans, ports.weight_needed), counts_of(kinds.spans, ports.kv_needed))
    return weights, kv[:, kinds.replica, kinds.kind]


def price(problem: PlacementProblem, ports: Ports, overlaps: Overlaps, parts: Parts) -> Prices:
    """What every part costs on every instance, without a loop over pairs."""
    kinds = kinds_of(parts, problem.seats)
    spans, replica, kind = kinds.spans, kinds.replica, kinds.kind
    kv_needs = counts_of(spans, ports.kv_needed)
    fetched, kv_alone = ports.missing(needs_of(spans, ports.weight_needed), kv_needs)
    kv_bytes = ports.kv_bytes(kv_needs)[replica, kind]
    best, kv_best = _best_reuse(problem, ports, overlaps)
    seats_of = spans.T.astype(np.int64)
    return Prices(
        weights_fetched=fetched,
        squeezed=_squeezed(ports, overlaps, spans),
        weights_reused=best @ seats_of,
        kind=kind,
        kv_bytes=kv_bytes,
        kv_present=kv_bytes - kv_alone[:, replica, kind],
        kv_reused=(kv_best @ seats_of)[:, replica, kind],
        stayed=_stayed(ports, overlaps, parts),
    )


def _stayed(ports: Ports, overlaps: Overlaps, parts: Parts) -> Integers:
    """GPUs of every instance whose present position is in every part: [instance, part]."""
    stayed = np.zeros((len(ports.num_gpus), len(parts.first)), np.int64)
    gpus = np.flatnonzero(overlaps.home >= 0)
    part = np.searchsorted(parts.first, overlaps.home[gpus], side="right") - 1
    inside = (part >= 0) & (overlaps.home[gpus] < (parts.first + parts.size)[part])
    np.add.at(stayed, (ports.instance_of[gpus[inside]], part[inside]), 1)
    return stayed


def _best_reuse(problem: PlacementProblem, ports: Ports, overlaps: Overlaps) -> tuple[Integers, Integers]:
    """The most a GPU of an instance has of a seat: weights by [instance, seat], KV by [instance, replica, seat]."""
    targets = len(ports.num_gpus)
    weights = np.zeros((targets, problem.seats), np.int64)
    np.maximum.at(weights, ports.instance_of, overlaps.weights)
    kv = np.zeros((targets, problem.data, problem.seats), np.int64)
    heirs = np.flatnonzero(overlaps.heir >= 0)
    np.maximum.at(kv, (ports.instance_of[heirs], overlaps.heir[heirs]), overlaps.kv[heirs])
    return weights, kv


def _squeezed(ports: Ports, overlaps: Overlaps, spans: Flags) -> Integers:
    """Pairs of a span on an instance that cannot fit, at least: seats that no GPU can take, or too few GPUs for any."""
    targets = len(ports.num_gpus)
    taken_by = np.zeros((targets, overlaps.fits.shape[1]), np.int64)
    np.add.at(taken_by, ports.instance_of, overlaps.fits)
    hopeless = (taken_by == 0).astype(np.int64) @ spans.T
    usable = np.zeros((targets, len(spans)), np.int64)
    np.add.at(usable, ports.instance_of, needs_of(overlaps.fits, spans.T))
    least: Integers = np.maximum(hopeless, spans.sum(axis=1)[None, :] - usable)
    return least


def common_unit(*values: Integers) -> int:
    """The greatest common divisor of all values, 1 if all are 0."""
    return max(1, gcd(*(int(np.gcd.reduce(each, axis=None)) for each in values)))
