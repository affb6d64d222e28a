"""What a draft frees, and in which order its layers move when memory is short."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from spotserve.core.ids import GpuId
from spotserve.core.snapshot import Replica
from spotserve.solvers.draft import Draft
from spotserve.solvers.migrate.memory import LayerChange, memory_problem, peak_of
from spotserve.solvers.migrate.pieces import front_first, layer_of
from spotserve.solvers.migrate.sources import UNPLANNED
from spotserve.solvers.paper.layers import artifact_order, published_order
from spotserve.solvers.ranges import Catalog, Ranges, shard_at, without


@dataclass(frozen=True, slots=True)
class Gone:
    """Weights that a GPU holds and its new position, if any, does not need; equal ones are one object."""

    ranges: Ranges
    by_layer: Mapping[str, Ranges]
    bytes_by_layer: Mapping[str, int]


def new_ranges(catalog: Catalog, seats: Mapping[GpuId, Replica], gpu: GpuId) -> Ranges:
    """What a GPU's position in a new replica owns; nothing if it has none."""
    replica = seats.get(gpu)
    return {} if replica is None else catalog.owned(shard_at(catalog.model, replica, replica.gpus.index(gpu)))


def gone_weights(catalog: Catalog, draft: Draft) -> dict[GpuId, Gone]:
    """What each living GPU of an affected replica may free, and in a restart each other one that gets a position."""
    seats = {gpu: replica for replica in draft.fresh for gpu in replica.gpus}
    nothing: Ranges = {}
    known: dict[tuple[int, int], Gone] = {}
    result = {}
    old = draft.old_position
    for gpu in (*old, *(gpu for gpu in seats if draft.released_first and gpu not in old)):
        held = draft.held.get(gpu, nothing)
        # What a restart frees comes again, but for what an aborted plan left where there is no position.
        is_kept = gpu in seats and not (draft.released_first and gpu in old)
        needed = new_ranges(catalog, seats, gpu) if is_kept else nothing
        key = id(held), id(needed)
        if key not in known:
            known[key] = _gone(catalog, without(held, needed) if needed else held)
        result[gpu] = known[key]
    return result


def _gone(catalog: Catalog, ranges: Ranges) -> Gone:
    by_layer: dict[str, Ranges] = defaultdict(dict)
    for name, runs in ranges.items():
        by_layer[layer_of(name)][name] = runs
    return Gone(ranges, dict(by_layer), {layer: catalog.bytes(part) for layer, part in by_layer.items()})


def layer_changes(catalog: Catalog, draft: Draft) -> tuple[LayerChange, ...]:
    """Per layer, what each GPU receives and what it may free once the layer has moved; front layers first."""
    incoming: dict[str, dict[GpuId, int]] = defaultdict(lambda: defaultdict(int))
    freed: dict[str, dict[GpuId, int]] = defaultdict(dict)
    for transfer in draft.transfers:
        for part in transfer.parts:
            incoming[part.layer][transfer.destination] += part.bytes
    for gpu, gone in gone_weights(catalog, draft).items():
        for layer, size in gone.bytes_by_layer.items():
            freed[layer][gpu] = size
    layers = sorted({*incoming, *freed}, key=lambda layer: front_first(catalog.model, layer))
    return tuple(LayerChange(layer, dict(incoming[layer]), dict(freed[layer])) for layer in layers)


def published_layers(
    catalog: Catalog, draft: Draft, *, memory: Mapping[GpuId, int], solver: str = "paper"
) -> tuple[str, ...]:
    """The order of Algorithm 2 (SpotServe, section 3.4): as printed, as its artifact finds it, or none.

    As printed U_max is the least memory left on any GPU; the artifact lets nobody hold more than before, and orders the
    layers between the embedding and the head. Nothing says that it fits: the last resort of both is the least maximum,
    whatever it is.
    """
    changes = layer_changes(catalog, draft)
    layers = tuple(change.layer for change in changes)
    if solver in UNPLANNED:
        return layers
    if solver == "paper-artifact":
        inner = [number for number, layer in enumerate(layers) if layer.isdigit()]
        growth = _growth([changes[number] for number in inner])
        order = artifact_order(growth, bound=0).order if growth else range(len(inner))
        ends = inner[0] if inner else len(layers), inner[-1] + 1 if inner else len(layers)
        return (*layers[: ends[0]], *(layers[inner[place]] for place in order), *layers[ends[1] :])
    growth = _growth(changes)
    if not growth:
        return layers
    bound = min(memory[gpu] for gpu in _touched(changes) if gpu in memory)
    return tuple(layers[place] for place in published_order(growth, bound=bound).order)


def _touched(changes: Sequence[LayerChange]) -> list[GpuId]:
    return sorted({gpu for change in changes for gpu in (*change.incoming, *change.freed)})


def _growth(changes: Sequence[LayerChange]) -> list[list[int]]:
    """Of each GPU that any layer touches, how much more it holds once each layer has moved."""
    return [[change.incoming.get(gpu, 0) - change.freed.get(gpu, 0) for change in changes] for gpu in _touched(changes)]


def peak_bytes(changes: Sequence[LayerChange], order: Sequence[str], memory: Mapping[GpuId, int]) -> int:
    """By how many bytes the fullest GPU passes its free memory while the layers move in an order; 0 or less fits."""
    place = {change.layer: number for number, change in enumerate(changes)}
    return peak_of(memory_problem(changes, memory), [place[layer] for layer in order])
