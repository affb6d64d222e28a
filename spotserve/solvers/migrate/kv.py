"""Which rectangle of KV goes from which GPU of an old replica to which position of a new one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from spotserve.core.ids import GpuId, instance_of, natural_key
from spotserve.core.slices import intersect, subtract
from spotserve.core.snapshot import Replica
from spotserve.core.spec import ModelSpec
from spotserve.solvers.ranges import Catalog, Rectangle, cut, shard_at


@dataclass(frozen=True, slots=True)
class KvTransfer:
    """A rectangle of KV that goes from one GPU to another (or stays on it)."""

    source: GpuId
    destination: GpuId
    rectangle: Rectangle


def kv_transfers(catalog: Catalog, model: ModelSpec, old: Replica, new: Replica) -> tuple[KvTransfer, ...]:
    """Rectangles that cover each position of `new` exactly once from the positions of `old`, front stages first.

    What a GPU already holds stays on it (source equals destination); kv heads that neighbours hold twice come from
    a rank in the same instance, else from the one that has sent least so far.
    """
    sent: dict[GpuId, int] = {}
    result: list[KvTransfer] = []
    held = {gpu: catalog.kv_rectangle(shard_at(model, old, index)) for index, gpu in enumerate(old.gpus)}
    places = {gpu: place for place, gpu in enumerate(sorted(old.gpus, key=natural_key))}
    for index, destination in enumerate(new.gpus):
        need = catalog.kv_rectangle(shard_at(model, new, index))
        for stage in old.stages:
            if stage.layers[0] < need[0][1] and need[0][0] < stage.layers[1]:
                ranks = sorted(
                    stage.gpus, key=lambda gpu: (*_distance(gpu, destination), sent.get(gpu, 0), places[gpu])
                )
                result += _stage_rectangles(need, ranks, held, destination, sent)
    return tuple(result)


def _distance(source: GpuId, destination: GpuId) -> tuple[bool, bool]:
    """Less is nearer: the GPU itself, another one of its instance, any other."""
    return source != destination, instance_of(source) != instance_of(destination)


def _stage_rectangles(
    need: Rectangle,
    ranks: Sequence[GpuId],
    held: Mapping[GpuId, Rectangle],
    destination: GpuId,
    sent: dict[GpuId, int],
) -> list[KvTransfer]:
    """One destination's rectangle, as far as one old stage holds it, from its ranks in order."""
    rectangles = []
    open_heads = [need[1]]
    for gpu in ranks:
        shared = cut(need, held[gpu])
        if shared is None:
            continue
        for heads in intersect(open_heads, [shared[1]]):
            rectangles.append(KvTransfer(gpu, destination, (shared[0], heads)))
            if gpu != destination:
                sent[gpu] = sent.get(gpu, 0) + (heads[1] - heads[0]) * (shared[0][1] - shared[0][0])
        open_heads = subtract(open_heads, [shared[1]])
    return rectangles
