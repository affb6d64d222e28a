"""Which part of every parameter each (stage, rank) owns, in global coordinates.

Planner, workers and simulator use these functions and no others, so re-sharding any (P, M) into any (P', M') is an
intersection of ranges. A rank owns whole chunks of each axis (contracts section 7 (a)), unevenly where needed: 8 chunks
over M=3 are 3/3/2; kv heads are the cover of the rank's q heads and so may be held by two neighbours.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from math import prod

from spotserve.core.frozen import Frozen
from spotserve.core.spec import Axis, ModelSpec, Parameter

MAX_CHUNKS = 8
CHUNK_COLUMNS = 16


class Slice(Frozen):
    """[start, stop) of dimension `dim` of one concrete parameter (layer number filled in)."""

    parameter: str
    dim: int
    start: int
    stop: int


class Shard(Frozen):
    """A position's share of the model: layers [layers[0], layers[1]) at rank `rank` of `tensor`.

    `first` and `last` say whether the embedding and the output head belong to it.
    """

    layers: tuple[int, int]
    tensor: int
    rank: int
    first: bool
    last: bool


@lru_cache(maxsize=4096)
def split_evenly(count: int, parts: int) -> tuple[tuple[int, int], ...]:
    """`count` things in `parts` contiguous half-open runs; the first `count % parts` runs get one more."""
    quotient, remainder = divmod(count, parts)
    runs = []
    start = 0
    for index in range(parts):
        stop = start + quotient + (index < remainder)
        runs.append((start, stop))
        start = stop
    return tuple(runs)


def head_chunks(num_q_heads: int) -> tuple[tuple[int, int], ...]:
    """Reduction chunks of the attention output: min(8, q heads) balanced groups of q heads."""
    return split_evenly(num_q_heads, min(MAX_CHUNKS, num_q_heads))


def column_chunks(width: int) -> tuple[tuple[int, int], ...]:
    """Reduction chunks of an MLP axis: at most 8 runs of whole 16-column units, a remainder joined to the last."""
    units = max(1, width // CHUNK_COLUMNS)
    runs = [
        (start * CHUNK_COLUMNS, stop * CHUNK_COLUMNS) for start, stop in split_evenly(units, min(MAX_CHUNKS, units))
    ]
    runs[-1] = (runs[-1][0], width)
    return tuple(runs)


def max_tensor_degree(model: ModelSpec) -> int:
    """The smallest number of chunks of any axis that is dealt out: no larger tensor degree is a candidate."""
    return min(len(axis.chunks) for axis in model.axes if axis.cover_of is None)


def axis_range(model: ModelSpec, axis: Axis, *, tensor: int, rank: int) -> tuple[int, int]:
    """The half-open run of `axis` that `rank` of `tensor` owns (for a cover: the run it needs)."""
    if axis.cover_of is not None:
        start, stop = axis_range(model, model.axis(axis.cover_of), tensor=tensor, rank=rank)
        return start // axis.group, -(-stop // axis.group)
    first, last = split_evenly(len(axis.chunks), tensor)[rank]
    return axis.chunks[first][0], axis.chunks[last - 1][1]


def owned_chunks(axis: Axis, *, tensor: int, rank: int) -> tuple[tuple[int, int], ...]:
    """The reduction chunks of `axis` that a rank computes, in the global order."""
    first, last = split_evenly(len(axis.chunks), tensor)[rank]
    return axis.chunks[first:last]


def q_head_range(model: ModelSpec, *, tensor: int, rank: int) -> tuple[int, int]:
    """The q heads a rank computes."""
    return axis_range(model, model.axis("q_heads"), tensor=tensor, rank=rank)


def kv_head_range(model: ModelSpec, *, tensor: int, rank: int) -> tuple[int, int]:
    """The kv heads a rank stores: the cover of its q heads."""
    return axis_range(model, model.axis("kv_heads"), tensor=tensor, rank=rank)


def layer_split(num_layers: int, pipeline: int) -> tuple[tuple[int, int], ...]:
    """Layers of each stage, balanced, the front stages one more where uneven."""
    return split_evenly(num_layers, pipeline)


def stage_shard(model: ModelSpec, *, layers: tuple[int, int], tensor: int, rank: int) -> Shard:
    """The shard at `layers` and `rank`: it owns the embedding (head) if it owns the first (last) layer."""
    return Shard(layers=layers, tensor=tensor, rank=rank, first=layers[0] == 0, last=layers[1] == model.num_layers)


def parameter_slices(model: ModelSpec, parameter: Parameter, *, tensor: int, rank: int) -> tuple[tuple[int, int], ...]:
    """The ranges along `parameter.dim` that a rank owns, adjacent ones joined."""
    if not parameter.segments:
        return ((0, parameter.shape[parameter.dim]),)
    ranges: list[tuple[int, int]] = []
    for segment in parameter.segments:
        start, stop = axis_range(model, model.axis(segment.axis), tensor=tensor, rank=rank)
        run = (segment.offset + start * segment.unit, segment.offset + stop * segment.unit)
        if ranges and ranges[-1][1] == run[0]:
            ranges[-1] = (ranges[-1][0], run[1])
        else:
            ranges.append(run)
    return tuple(ranges)


def concrete_parameters(model: ModelSpec, shard: Shard) -> Iterable[tuple[str, Parameter]]:
    """(name with the layer filled in, table row) of each parameter of a shard, in a fixed order."""
    for parameter in model.parameters:
        if parameter.stage == "first" and shard.first:
            yield parameter.name, parameter
    for layer in range(*shard.layers):
        for parameter in model.parameters:
            if parameter.stage == "layer":
                yield parameter.name.replace("{layer}", str(layer)), parameter
    for parameter in model.parameters:
        if parameter.stage == "last" and shard.last:
            yield parameter.name, parameter


def shard_slices(model: ModelSpec, shard: Shard) -> tuple[Slice, ...]:
    """Every range a position owns, in a fixed order."""
    return tuple(
        Slice(parameter=name, dim=parameter.dim, start=start, stop=stop)
        for name, parameter, ranges in shard_ranges(model, shard)
        for start, stop in ranges
    )


def shard_ranges(model: ModelSpec, shard: Shard) -> Iterator[tuple[str, Parameter, tuple[tuple[int, int], ...]]]:
    """Each concrete parameter of a shard with its table row and the ranges that the position owns, in a fixed order."""
    owned = {
        parameter.name: parameter_slices(model, parameter, tensor=shard.tensor, rank=shard.rank)
        for parameter in model.parameters
    }
    for name, parameter in concrete_parameters(model, shard):
        yield name, parameter, owned[parameter.name]


def parameter_of(model: ModelSpec, name: str) -> Parameter:
    """The table row of a concrete parameter name. Raises KeyError if the table has none."""
    template = ".".join("{layer}" if part.isdigit() else part for part in name.split("."))
    for parameter in model.parameters:
        if parameter.name in (name, template):
            return parameter
    raise KeyError(name)


def row_bytes(model: ModelSpec, parameter: Parameter) -> int:
    """Bytes of one index of the split dimension."""
    return prod(parameter.shape) // parameter.shape[parameter.dim] * model.element_bytes


def shard_bytes(model: ModelSpec, shard: Shard) -> int:
    """Weight bytes of a position."""
    times = {"first": int(shard.first), "layer": len(range(*shard.layers)), "last": int(shard.last)}
    return sum(
        times[parameter.stage] * (stop - start) * row_bytes(model, parameter)
        for parameter in model.parameters
        if times[parameter.stage]
        for start, stop in parameter_slices(model, parameter, tensor=shard.tensor, rank=shard.rank)
    )


def slices_bytes(model: ModelSpec, slices: Iterable[Slice]) -> int:
    """Bytes of a list of slices."""
    rows: dict[str, int] = {}
    total = 0
    for piece in slices:
        if piece.parameter not in rows:
            rows[piece.parameter] = row_bytes(model, parameter_of(model, piece.parameter))
        total += (piece.stop - piece.start) * rows[piece.parameter]
    return total


def intersect(wanted: Sequence[tuple[int, int]], held: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """The common part of two lists of disjoint ranges."""
    return [(max(a, c), min(b, d)) for a, b in wanted for c, d in held if max(a, c) < min(b, d)]


def subtract(wanted: Sequence[tuple[int, int]], held: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """What of `wanted` is not in `held`."""
    left = list(wanted)
    for start, stop in held:
        if not left:
            break
        left = [piece for a, b in left for piece in ((a, min(b, start)), (max(a, stop), b)) if piece[0] < piece[1]]
    return left


def kv_token_bytes(model: ModelSpec, *, layers: tuple[int, int], heads: tuple[int, int]) -> int:
    """KV cache bytes of one token in a rectangle of layers x kv heads (keys and values)."""
    return 2 * (layers[1] - layers[0]) * (heads[1] - heads[0]) * model.head_dim * model.element_bytes


def kv_block_bytes(model: ModelSpec, shard: Shard, *, block_tokens: int) -> int:
    """Bytes of one KV cache block on a position."""
    heads = kv_head_range(model, tensor=shard.tensor, rank=shard.rank)
    return block_tokens * kv_token_bytes(model, layers=shard.layers, heads=heads)
