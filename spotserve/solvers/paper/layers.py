"""Algorithm 2 (section 3.4), the memory-optimised order of layers: as the artifact runs it and as the paper prints it.

Moving a layer lets a receiver grow and a sender shrink. U is what an instance holds beyond what it held before; the
order keeps it below U_max where it can, and else makes its maximum as small as it can, layer by layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

Growth = Sequence[Sequence[int]]
"""`growth[holder][layer]`: how much more a GPU or instance that stays holds once the layer has moved; in any unit."""


@dataclass(frozen=True, slots=True)
class StageChange:
    """The stage of one holder before and after (None: it holds none)."""

    old_stage: int | None
    new_stage: int | None


@dataclass(frozen=True, slots=True)
class LayerOrder:
    """The order of layers, the most that any holder ever holds beyond its start, and whether a bound was in the way."""

    order: tuple[int, ...]
    peak: int
    met_bound: bool


def layer_growth(
    changes: Sequence[StageChange],
    *,
    num_layers: int,
    old_pipeline: int,
    old_tensor: int,
    new_pipeline: int,
    new_tensor: int,
) -> tuple[tuple[int, ...], ...]:
    """Growth of every holder and layer, in units of a layer over M x M'; layers are dealt out equally to stages."""
    old_share, new_share = new_tensor, old_tensor
    old_run, new_run = num_layers // old_pipeline, num_layers // new_pipeline
    return tuple(
        tuple(
            new_share * (layer // new_run == change.new_stage) - old_share * (layer // old_run == change.old_stage)
            for layer in range(num_layers)
        )
        for change in changes
    )


def artifact_order(growth: Growth, *, bound: int) -> LayerOrder:
    """The artifact's greedy: after each placement it looks from layer 0 again for one that keeps every U within bound.

    Where there is none, the layer with the smallest maximum of U, those first that free memory on a holder that is
    fullest now; of equals the lowest.
    """
    used = [0] * len(growth)
    left = list(range(len(growth[0])))
    order: list[int] = []
    peak, met = 0, True
    while left:
        layer = next((layer for layer in left if _highest(used, growth, layer) <= bound), None)
        met = met and layer == left[0]
        if layer is None:
            relief = _freeing(used, growth, left)
            layer = min(left, key=lambda each: (max(0, _highest(used, growth, each)), each not in relief, each))
        _apply(used, growth, layer)
        peak = max(peak, *used)
        order.append(layer)
        left.remove(layer)
    return LayerOrder(tuple(order), peak, met)


def published_order(growth: Growth, *, bound: int) -> LayerOrder:
    """MemOptMigPlanner as printed: one pass that puts off what would pass the bound, then the least maximum."""
    used = [0] * len(growth)
    order: list[int] = []
    put_off: list[int] = []
    peak = 0
    for layer in range(len(growth[0])):
        if _highest(used, growth, layer) > bound:
            put_off.append(layer)
            continue
        _apply(used, growth, layer)
        peak = max(peak, *used)
        order.append(layer)
    met = not put_off
    while put_off:
        layer = min(put_off, key=lambda each: (_highest(used, growth, each), each))
        _apply(used, growth, layer)
        peak = max(peak, *used)
        order.append(layer)
        put_off.remove(layer)
    return LayerOrder(tuple(order), peak, met)


def naive_peak(growth: Growth) -> int:
    """The peak of moving layers as they are numbered."""
    used = [0] * len(growth)
    peak = 0
    for layer in range(len(growth[0])):
        _apply(used, growth, layer)
        peak = max(peak, *used)
    return peak


def stage_starts(order: Sequence[int], *, pipeline: int) -> tuple[int, ...]:
    """After how many moved layers each new stage has all of its own and may start (Algorithm 2, lines 5 to 7)."""
    run = len(order) // pipeline
    place = {layer: index for index, layer in enumerate(order)}
    return tuple(1 + max(place[layer] for layer in range(stage * run, (stage + 1) * run)) for stage in range(pipeline))


def _highest(used: Sequence[int], growth: Growth, layer: int) -> int:
    """The largest U once a layer has moved."""
    return max(held + row[layer] for held, row in zip(used, growth, strict=True))


def _freeing(used: Sequence[int], growth: Growth, layers: Sequence[int]) -> frozenset[int]:
    """The layers whose move takes something off a holder that is fullest now."""
    most = max(used)
    fullest = [row for held, row in zip(used, growth, strict=True) if held == most]
    return frozenset(layer for layer in layers if any(row[layer] < 0 for row in fullest))


def _apply(used: list[int], growth: Growth, layer: int) -> None:
    for holder, row in enumerate(growth):
        used[holder] += row[layer]
