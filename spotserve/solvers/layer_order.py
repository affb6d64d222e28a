"""In which order layers move when memory is short (SpotServe, ASPLOS'24, Algorithm 2).

A layer's move first takes room at its receivers, then frees it at its former holders. Front layers first while the
room lasts; when none fits, the one that leaves the fullest GPU least full, and only if even that fits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from spotserve.core.ids import GpuId


@dataclass(frozen=True, slots=True)
class LayerChange:
    """Bytes each GPU receives and may free when one layer moves."""

    layer: str
    incoming: Mapping[GpuId, int]
    freed: Mapping[GpuId, int]


def order_layers(changes: Sequence[LayerChange], free_bytes: Mapping[GpuId, int]) -> tuple[str, ...] | None:
    """An order in which no GPU ever runs out of `free_bytes`, or None when this greedy rule finds none."""
    free = dict(free_bytes)
    waiting = list(changes)
    order: list[str] = []
    while waiting:
        fitting = [change for change in waiting if all(free[gpu] >= size for gpu, size in change.incoming.items())]
        if not fitting:
            return None
        # A move that frees more than it takes is never wrong; otherwise the front layer, whose stage can start.
        chosen = next((c for c in fitting if sum(c.freed.values()) > sum(c.incoming.values())), fitting[0])
        for gpu, size in chosen.incoming.items():
            free[gpu] -= size
        for gpu, size in chosen.freed.items():
            free[gpu] = free.get(gpu, 0) + size
        order.append(chosen.layer)
        waiting.remove(chosen)
    return tuple(order)
