"""What each GPU lacks, cut where its holders' ranges end, so that every piece has one set of whole holders.

GPUs that hold the same content form one class, and what a shard needs is cut once against the classes: the work grows
with the number of different shards, not with the number of GPUs times parameters.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

from spotserve.core.ids import GpuId, InstanceId, instance_of, natural_key
from spotserve.core.slices import parameter_of
from spotserve.core.spec import ModelSpec
from spotserve.solvers.ranges import Catalog, Ranges, join


@dataclass(frozen=True, slots=True)
class Demand:
    """What a GPU's new position needs in all, and the pipeline stage that waits for it."""

    destination: GpuId
    stage: int
    ranges: Ranges


@dataclass(frozen=True, slots=True)
class Part:
    """The share of one layer in a piece."""

    layer: str
    ranges: Ranges
    bytes: int


@dataclass(frozen=True, slots=True)
class Piece:
    """Parts, front layers first, that one GPU lacks and the same GPUs hold whole; `ports` are their instances."""

    destination: GpuId
    stage: int
    holders: tuple[GpuId, ...]
    ports: tuple[InstanceId, ...]
    parts: tuple[Part, ...]
    bytes: int
    need: Ranges = field(default_factory=dict, repr=False, compare=False)
    """All that the GPU's position needs, one object for positions of the same shard; nothing if it frees first."""

    @property
    def crosses(self) -> bool:
        """Whether it must pass a port: somebody holds it, but nobody in the destination's own instance."""
        return bool(self.ports) and instance_of(self.destination) not in self.ports


Interval = tuple[int, int]

Classes = tuple[int, ...]
"""Content classes, by number, that hold a piece whole."""


@dataclass(frozen=True, slots=True)
class _Content:
    """Who holds what, GPUs of equal content together."""

    ranges: tuple[Ranges, ...]
    sources: tuple[tuple[GpuId, ...], ...]
    class_of: Mapping[GpuId, int]
    holding: Mapping[str, tuple[int, ...]]


@lru_cache(maxsize=65536)
def layer_of(name: str) -> str:
    """The layer number in a concrete parameter name, or the name itself for embedding and head."""
    return next((part for part in name.split(".") if part.isdigit()), name)


def front_first(model: ModelSpec, layer: str) -> tuple[int, str]:
    """Sort key of layers: what comes before the first one, the layers by number, what comes behind the last one."""
    if layer.isdigit():
        return int(layer), ""
    return -1 if parameter_of(model, layer).stage == "first" else model.num_layers, layer


def holder_ports(holders: Sequence[GpuId]) -> tuple[InstanceId, ...]:
    """The instances of some holders, each once, in natural order."""
    return tuple(sorted({instance_of(gpu) for gpu in holders}, key=natural_key))


def cut_pieces(
    catalog: Catalog,
    demands: Sequence[Demand],
    holdings: Mapping[GpuId, Ranges],
    sources: Sequence[GpuId],
    *,
    freed: frozenset[GpuId] | None = None,
) -> tuple[Piece, ...]:
    """The pieces of every demand, without what its GPU holds already and, in a restart, is not among the `freed`.

    A piece that nobody holds has no holders: it comes from storage.
    """
    content = _content(demands, holdings, sources)
    cuts: dict[int, dict[Classes, tuple[Part, ...]]] = {}
    merged: dict[tuple[int, int | None], dict[tuple[GpuId, ...], tuple[Part, ...]]] = {}
    holders_of: dict[Classes, tuple[GpuId, ...]] = {}
    ports_of: dict[tuple[GpuId, ...], tuple[InstanceId, ...]] = {}
    pieces = []
    for demand in demands:
        is_freed = freed is not None and demand.destination in freed
        shard, own = id(demand.ranges), None if is_freed else content.class_of.get(demand.destination)
        if shard not in cuts:
            cuts[shard] = _cuts(catalog, demand.ranges, content)
        if (shard, own) not in merged:
            merged[shard, own] = _missing(catalog, cuts[shard], own, content, holders_of)
        for known, parts in merged[shard, own].items():
            holders = tuple(gpu for gpu in known if gpu != demand.destination) if is_freed else known
            if holders not in ports_of:
                ports_of[holders] = holder_ports(holders)
            size = sum(part.bytes for part in parts)
            # In a restart nobody passes anything on: no plan reads what was freed in a GPU.
            need = {} if freed is not None else demand.ranges
            pieces.append(Piece(demand.destination, demand.stage, holders, ports_of[holders], parts, size, need))
    return tuple(pieces)


def _content(demands: Sequence[Demand], holdings: Mapping[GpuId, Ranges], sources: Sequence[GpuId]) -> _Content:
    """Content classes of all sources and destinations; equal mappings count as one where they are one object."""
    number: dict[int, int] = {}
    ranges: list[Ranges] = []
    members: list[list[GpuId]] = []
    class_of: dict[GpuId, int] = {}
    giving = set(sources)
    for gpu in dict.fromkeys((*sources, *(demand.destination for demand in demands))):
        held = holdings.get(gpu)
        if not held:
            continue
        if id(held) not in number:
            number[id(held)] = len(ranges)
            ranges.append(held)
            members.append([])
        class_of[gpu] = number[id(held)]
        if gpu in giving:
            members[class_of[gpu]].append(gpu)
    holding: dict[str, list[int]] = defaultdict(list)
    for one, held in enumerate(ranges):
        for name in held:
            holding[name].append(one)
    return _Content(
        tuple(ranges),
        tuple(tuple(gpus) for gpus in members),
        class_of,
        {name: tuple(classes) for name, classes in holding.items()},
    )


def _cuts(catalog: Catalog, need: Ranges, content: _Content) -> dict[Classes, tuple[Part, ...]]:
    """What a shard needs, cut at every end of a held range, by the classes that hold the whole cut."""
    found: dict[Classes, dict[str, Ranges]] = defaultdict(lambda: defaultdict(dict))
    known: dict[tuple[object, ...], list[tuple[Interval, Classes]]] = {}
    for name, runs in need.items():
        classes = content.holding.get(name, ())
        held = [content.ranges[one][name] for one in classes]
        # The layers of a stage are cut alike.
        key = (classes, *map(tuple, (runs, *held)))
        if key not in known:
            known[key] = _elementary(runs, dict(zip(classes, held, strict=True)))
        layer = layer_of(name)
        for run, holding in known[key]:
            found[holding][layer].setdefault(name, []).append(run)
    return {holding: _parts(catalog, layers) for holding, layers in found.items()}


def _parts(catalog: Catalog, layers: Mapping[str, Ranges]) -> tuple[Part, ...]:
    """Parts of touching runs joined, in the order of the mapping."""
    result = []
    for layer, ranges in layers.items():
        joined = {name: runs if len(runs) == 1 else join([], runs) for name, runs in ranges.items()}
        result.append(Part(layer, joined, catalog.bytes(joined)))
    return tuple(result)


def _missing(
    catalog: Catalog,
    cuts: Mapping[Classes, tuple[Part, ...]],
    own: int | None,
    content: _Content,
    holders_of: dict[Classes, tuple[GpuId, ...]],
) -> dict[tuple[GpuId, ...], tuple[Part, ...]]:
    """The cuts that class `own` does not hold, by the GPUs that can send them."""
    groups: dict[tuple[GpuId, ...], list[tuple[Part, ...]]] = defaultdict(list)
    for classes, parts in cuts.items():
        if own in classes:
            continue
        if classes not in holders_of:
            gpus = [gpu for one in classes for gpu in content.sources[one]]
            holders_of[classes] = tuple(sorted(gpus, key=natural_key))
        groups[holders_of[classes]].append(parts)
    return {holders: lists[0] if len(lists) == 1 else _together(catalog, lists) for holders, lists in groups.items()}


def _together(catalog: Catalog, lists: Sequence[tuple[Part, ...]]) -> tuple[Part, ...]:
    """Parts of several cuts as one list: those of a layer become one part, front layers first."""
    layers: dict[str, Ranges] = defaultdict(dict)
    for part in sorted(itertools.chain(*lists), key=lambda part: front_first(catalog.model, part.layer)):
        for name, runs in part.ranges.items():
            layers[part.layer].setdefault(name, []).extend(runs)
    return _parts(catalog, layers)


def _elementary(runs: Sequence[Interval], held: Mapping[int, Sequence[Interval]]) -> list[tuple[Interval, Classes]]:
    """Each run cut at every end of a held range, with the classes that hold the whole cut."""
    result = []
    ends = sorted({end for ranges in held.values() for run in ranges for end in run})
    for start, stop in runs:
        marks = [start, *(end for end in ends if start < end < stop), stop]
        for left, right in itertools.pairwise(marks):
            classes = tuple(one for one, ranges in held.items() if any(a <= left and right <= b for a, b in ranges))
            result.append(((left, right), classes))
    return result


def split_parts(catalog: Catalog, parts: Sequence[Part], first_bytes: int) -> tuple[list[Part], list[Part]]:
    """The parts in two, `first_bytes` in the first up to less than a row each; every row goes to exactly one side."""
    first: list[Part] = []
    rest: list[Part] = []
    left = first_bytes
    for part in parts:
        if part.bytes <= left:
            first.append(part)
            left -= part.bytes
        elif left <= 0:
            rest.append(part)
            left = 0
        else:
            inside, outside = _split_part(catalog, part, left)
            first += [inside] if inside.bytes else []
            rest += [outside] if outside.bytes else []
            left = 0
    return first, rest


def _split_part(catalog: Catalog, part: Part, first_bytes: int) -> tuple[Part, Part]:
    """One part in two, at a row."""
    inside: Ranges = {}
    outside: Ranges = {}
    left = first_bytes
    for name, runs in part.ranges.items():
        row = catalog.row(name)
        for start, stop in runs:
            middle = start + min(stop - start, left // row)
            if middle > start:
                inside.setdefault(name, []).append((start, middle))
            if middle < stop:
                outside.setdefault(name, []).append((middle, stop))
            left -= (middle - start) * row
    size = catalog.bytes(inside)
    return Part(part.layer, inside, size), Part(part.layer, outside, part.bytes - size)
