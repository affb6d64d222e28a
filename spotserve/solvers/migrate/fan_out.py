"""What several GPUs of an instance lack passes its port once: one GPU fetches it, the others copy it from that one.

Placement counts it so, and a copy inside an instance passes no port. Crumbs are not worth another round trip.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from spotserve.core.ids import GpuId, InstanceId, instance_of
from spotserve.solvers.migrate.pieces import Part, Piece
from spotserve.solvers.ranges import Catalog, Ranges, common, without

Parts = tuple[Part, ...]


@dataclass(frozen=True, slots=True)
class Relay:
    """Parts that one GPU copies from another of its instance once that one has fetched them."""

    source: GpuId
    destination: GpuId
    stage: int
    parts: Parts
    bytes: int


def fan_out(
    catalog: Catalog, pieces: Sequence[Piece], *, least_bytes: int
) -> tuple[tuple[Piece, ...], tuple[Relay, ...]]:
    """The pieces without what another GPU of the instance fetches before, and the relays that bring that instead.

    A pair that shares less than `least_bytes` of a piece fetches twice. What has a holder inside the instance, or none
    at all, stays as it is. A relay's source fetches what it passes on itself: no relay waits for another one.
    """
    shared = _Shared(catalog, least_bytes)
    fetched: dict[tuple[InstanceId, tuple[GpuId, ...]], list[Piece]] = defaultdict(list)
    kept: list[Piece] = []
    relays: list[Relay] = []
    for piece in pieces:
        left = piece
        if piece.crosses:
            # Ranges with the same holders whole: nothing is shared by pieces of different holders.
            firsts = fetched[instance_of(piece.destination), piece.holders]
            for first in firsts:
                passed_on, rest = shared.of(left, first)
                if passed_on:
                    size = sum(part.bytes for part in passed_on)
                    relays.append(Relay(first.destination, piece.destination, piece.stage, passed_on, size))
                    left = replace(left, parts=rest, bytes=left.bytes - size)
            if left.parts:
                firsts.append(left)
        if left.parts:
            kept.append(left)
    return tuple(kept), tuple(relays)


@dataclass(slots=True)
class _Shared:
    """What pairs of pieces have in common; pieces of GPUs that need the same and lack the same are cut once."""

    catalog: Catalog
    least_bytes: int
    needs: dict[tuple[int, int], int] = field(default_factory=dict)
    pairs: dict[tuple[int, int], tuple[Parts, Parts, Parts, Parts]] = field(default_factory=dict)

    def of(self, piece: Piece, first: Piece) -> tuple[Parts, Parts]:
        """(what both pieces have, what only `piece` has); all of it is the latter where both share but a crumb."""
        if self._need_bytes(piece.need, first.need) < self.least_bytes:
            return (), piece.parts
        key = id(piece.parts), id(first.parts)
        if key not in self.pairs:
            inside, outside = _divided(self.catalog, piece.parts, first.parts)
            if sum(part.bytes for part in inside) < self.least_bytes:
                inside, outside = (), piece.parts
            # Parts that are known by their ids must stay alive.
            self.pairs[key] = inside, outside, piece.parts, first.parts
        return self.pairs[key][:2]

    def _need_bytes(self, left: Ranges, right: Ranges) -> int:
        """Bytes that two positions both need: no two pieces of theirs share more."""
        key = id(left), id(right)
        if key not in self.needs:
            self.needs[key] = self.catalog.bytes(common(left, right))
        return self.needs[key]


def _divided(catalog: Catalog, parts: Parts, others: Parts) -> tuple[Parts, Parts]:
    """What of `parts` is among the others, and what is not."""
    if parts is others:
        return parts, ()
    inside: list[Part] = []
    outside: list[Part] = []
    by_layer = {part.layer: part for part in others}
    for part in parts:
        other = by_layer.get(part.layer)
        both = common(part.ranges, other.ranges) if other is not None else {}
        if other is None or not both:
            outside.append(part)
            continue
        size = catalog.bytes(both)
        inside.append(part if size == part.bytes else Part(part.layer, both, size))
        if size < part.bytes:
            outside.append(Part(part.layer, without(part.ranges, other.ranges), part.bytes - size))
    return tuple(inside), tuple(outside)
