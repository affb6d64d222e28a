"""Migrate: from whom each GPU gets what it lacks.

Missing ranges are cut where the holders' ranges end, so that each piece has a set of whole holders; each piece goes
to the least-loaded holder, pieces with few holders first. The max-flow certificate of `bound_bytes` says how good
that can be: no choice of sources empties the busiest port before (reference: bottleneck of in-ports and Hall sets).
A port is an instance's network interface; copies inside an instance do not pass it.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

from ortools.graph.python import max_flow

from spotserve.core.ids import GpuId, InstanceId, instance_of
from spotserve.core.plan import SolverReport
from spotserve.core.slices import intersect, subtract
from spotserve.core.snapshot import Replica
from spotserve.core.spec import ModelSpec
from spotserve.solvers.ranges import Catalog, Ranges, Rectangle, cut, join, shard_at
from spotserve.solvers.view import natural_key


@dataclass(frozen=True, slots=True)
class Piece:
    """Ranges of one layer that one GPU lacks and the same GPUs hold whole."""

    destination: GpuId
    layer: str
    holders: tuple[GpuId, ...]
    ranges: Ranges
    bytes: int


@dataclass(frozen=True, slots=True)
class Transfer:
    """`destination` gets `ranges` of `layer` from `source` (None: from storage)."""

    source: GpuId | None
    destination: GpuId
    layer: str
    ranges: Ranges
    bytes: int


@dataclass(frozen=True, slots=True)
class KvTransfer:
    """A rectangle of KV that goes from one GPU to another (or stays on it)."""

    source: GpuId
    destination: GpuId
    rectangle: Rectangle


CRUMB_BYTES = 1024 * 1024

Preference = Callable[[Sequence[GpuId], "Load", Piece], GpuId]


@dataclass(slots=True)
class Load:
    """Bytes that each instance and each GPU has to send so far."""

    ports: dict[InstanceId, int]
    gpus: dict[GpuId, int]
    doomed: Collection[GpuId]
    pairs: set[tuple[GpuId, GpuId]] = field(default_factory=set)

    def add(self, source: GpuId, destination: GpuId, num_bytes: int) -> None:
        """Count one transfer; inside an instance it loads no port."""
        self.pairs.add((source, destination))
        self.gpus[source] = self.gpus.get(source, 0) + num_bytes
        if instance_of(source) != instance_of(destination):
            port = instance_of(source)
            self.ports[port] = self.ports.get(port, 0) + num_bytes

    def port(self, source: GpuId, destination: GpuId) -> int:
        """The load of the port that a transfer would use, 0 inside an instance."""
        return 0 if instance_of(source) == instance_of(destination) else self.ports.get(instance_of(source), 0) + 1


def layer_of(name: str) -> str:
    """The layer number in a concrete parameter name, or the name itself for embedding and head."""
    return next((part for part in name.split(".") if part.isdigit()), name)


def cut_pieces(
    catalog: Catalog, wants: Mapping[GpuId, Ranges], holdings: Mapping[GpuId, Ranges], sources: Sequence[GpuId]
) -> tuple[Piece, ...]:
    """What each GPU wants, in pieces with one holder set each; no holder left gives the empty set."""
    holders_of: dict[str, list[GpuId]] = defaultdict(list)
    for gpu in sources:
        for name in holdings.get(gpu, {}):
            holders_of[name].append(gpu)
    pieces: dict[tuple[GpuId, str, tuple[GpuId, ...]], Ranges] = {}
    for destination, wanted in wants.items():
        for name, runs in wanted.items():
            candidates = [gpu for gpu in holders_of[name] if gpu != destination]
            for run, holders in _elementary(runs, {gpu: holdings[gpu][name] for gpu in candidates}):
                ranges = pieces.setdefault((destination, layer_of(name), holders), {})
                ranges[name] = join(ranges.get(name, []), [run])
    return tuple(
        Piece(destination, layer, holders, ranges, catalog.bytes(ranges))
        for (destination, layer, holders), ranges in pieces.items()
    )


def _elementary(
    runs: Sequence[tuple[int, int]], held: Mapping[GpuId, Sequence[tuple[int, int]]]
) -> list[tuple[tuple[int, int], tuple[GpuId, ...]]]:
    """Each run cut at every end of a held range, with the GPUs that hold the whole cut."""
    result = []
    ends = sorted({end for ranges in held.values() for run in ranges for end in run})
    for start, stop in runs:
        marks = [start, *(end for end in ends if start < end < stop), stop]
        for left, right in itertools.pairwise(marks):
            holders = tuple(gpu for gpu, ranges in held.items() if any(a <= left and right <= b for a, b in ranges))
            result.append(((left, right), holders))
    return result


def least_loaded(holders: Sequence[GpuId], load: Load, piece: Piece) -> GpuId:
    """The holder whose port, then GPU, has least to send; survivors before doomed ones.

    A crumb goes with a transfer that is made anyway: a round trip costs more than it balances.
    """
    crumb = piece.bytes < CRUMB_BYTES
    return min(
        holders,
        key=lambda gpu: (
            crumb and (gpu, piece.destination) not in load.pairs,
            load.port(gpu, piece.destination),
            gpu in load.doomed,
            load.gpus.get(gpu, 0),
            natural_key(gpu),
        ),
    )


def first_holder(holders: Sequence[GpuId], load: Load, piece: Piece) -> GpuId:
    """The first holder in order, as naive systems do. A yardstick for benchmarks."""
    return min(holders, key=natural_key)


PREFERENCES: dict[str, Preference] = {
    "maxflow": least_loaded,
    "layered": least_loaded,
    "first_holder": first_holder,
}
"""How a source is chosen. `layered` is `maxflow` whose in_place plans keep KV and free weights layer by layer
(SpotServe's Algorithm 2) where memory and time allow; the others free all of an old generation and fetch it again."""


def choose_sources(
    pieces: Sequence[Piece], *, doomed: Collection[GpuId], solver: str
) -> tuple[tuple[Transfer, ...], SolverReport]:
    """A source for every piece, and the report with the max-flow bound (bytes through the busiest port)."""
    load = Load({}, {}, doomed)
    chosen: list[Transfer] = []
    for piece in sorted(pieces, key=lambda p: (len(p.holders), -p.bytes)):
        source = PREFERENCES[solver](piece.holders, load, piece) if piece.holders else None
        if source is not None:
            load.add(source, piece.destination, piece.bytes)
        chosen.append(Transfer(source, piece.destination, piece.layer, piece.ranges, piece.bytes))
    bound, certificate = bound_bytes(pieces)
    objective = max([*load.ports.values(), *_in_ports(pieces).values()], default=0)
    report = SolverReport(
        name=solver,
        status="optimal" if objective == bound else "feasible",
        objective=objective,
        bound=bound,
        gap=round((objective - bound) / max(1, objective), 6),
        certificate=certificate,
    )
    chosen.sort(key=lambda t: (natural_key(t.destination), natural_key(t.source or ""), natural_key(t.layer)))
    return tuple(chosen), report


def _crossing(pieces: Sequence[Piece]) -> list[Piece]:
    """The pieces that must pass a port: no holder sits in the destination's own instance."""
    return [
        piece
        for piece in pieces
        if piece.holders and all(instance_of(gpu) != instance_of(piece.destination) for gpu in piece.holders)
    ]


def _in_ports(pieces: Sequence[Piece]) -> dict[InstanceId, int]:
    """Bytes that each instance must receive."""
    ports: dict[InstanceId, int] = defaultdict(int)
    for piece in _crossing(pieces):
        ports[instance_of(piece.destination)] += piece.bytes
    return ports


def bound_bytes(pieces: Sequence[Piece]) -> tuple[int, dict[str, str | int | float]]:
    """The least possible load of the busiest port, with the certificate that proves it.

    Either one instance's in-port is full, or a set of pieces is held by so few instances that their out-ports are
    (Newton iteration on minimum cuts).
    """
    crossing = _crossing(pieces)
    in_ports = _in_ports(pieces)
    if not crossing:
        return 0, {"kind": "nothing_to_copy", "bytes": 0}
    port, bound = max(in_ports.items(), key=lambda item: (item[1], item[0]))
    certificate: dict[str, str | int | float] = {"kind": "in_port", "port": port, "bytes": bound}
    while (hall := _overfull(crossing, bound)) is not None:
        num_bytes, holders = hall
        bound = -(-num_bytes // len(holders))
        certificate = {"kind": "out_ports", "ports": ",".join(holders), "bytes": num_bytes}
    return bound, certificate


def _overfull(pieces: Sequence[Piece], bound: int) -> tuple[int, tuple[InstanceId, ...]] | None:
    """Pieces whose holders together cannot send them at `bound` bytes a port: (bytes, those holders), or None."""
    holders = sorted({instance_of(gpu) for piece in pieces for gpu in piece.holders}, key=natural_key)
    node = {instance: 2 + len(pieces) + number for number, instance in enumerate(holders)}
    flow = max_flow.SimpleMaxFlow()
    for number, piece in enumerate(pieces):
        flow.add_arc_with_capacity(0, 2 + number, piece.bytes)
        for instance in sorted({instance_of(gpu) for gpu in piece.holders}, key=natural_key):
            flow.add_arc_with_capacity(2 + number, node[instance], piece.bytes)
    for instance in holders:
        flow.add_arc_with_capacity(node[instance], 1, bound)
    status = flow.solve(0, 1)
    assert status == flow.OPTIMAL, f"max flow answered {status}"
    if flow.optimal_flow() >= sum(piece.bytes for piece in pieces):
        return None
    side = set(flow.get_source_side_min_cut())
    full = tuple(instance for instance in holders if node[instance] in side)
    inside = [piece for number, piece in enumerate(pieces) if 2 + number in side]
    return sum(piece.bytes for piece in inside), full


def kv_transfers(catalog: Catalog, model: ModelSpec, old: Replica, new: Replica) -> tuple[KvTransfer, ...]:
    """Rectangles that cover each position of `new` exactly once from the positions of `old`.

    What a GPU already holds stays on it (source equals destination); kv heads that neighbours hold twice come from
    the rank that has sent least so far.
    """
    sent: dict[GpuId, int] = {}
    result: list[KvTransfer] = []
    held = {gpu: catalog.kv_rectangle(shard_at(model, old, index)) for index, gpu in enumerate(old.gpus)}
    for index, destination in enumerate(new.gpus):
        need = catalog.kv_rectangle(shard_at(model, new, index))
        for stage in old.stages:
            result += _stage_rectangles(need, stage.gpus, held, destination, sent)
    return tuple(result)


def _stage_rectangles(
    need: Rectangle,
    ranks: Sequence[GpuId],
    held: Mapping[GpuId, Rectangle],
    destination: GpuId,
    sent: dict[GpuId, int],
) -> list[KvTransfer]:
    """One destination's rectangle, as far as one old stage holds it."""
    rectangles = []
    open_heads = [need[1]]
    for gpu in sorted(ranks, key=lambda gpu: (gpu != destination, sent.get(gpu, 0), natural_key(gpu))):
        shared = cut(need, held[gpu])
        if shared is None:
            continue
        for heads in intersect(open_heads, [shared[1]]):
            rectangles.append(KvTransfer(gpu, destination, (shared[0], heads)))
            if gpu != destination:
                sent[gpu] = sent.get(gpu, 0) + (heads[1] - heads[0]) * (shared[0][1] - shared[0][0])
        open_heads = subtract(open_heads, [shared[1]])
    return rectangles
