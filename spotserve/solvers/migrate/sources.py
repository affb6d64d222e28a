"""From whom each GPU gets what it lacks.

Each piece goes to the least-loaded port that holds it, pieces with few holders first. Where that leaves a port fuller
than the bound allows, pieces are split over several holders: along the maximum flow that proves the bound, or by the
prefix LP, which also brings front stages forward. What several GPUs of an instance lack one of them gets and passes on.
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from math import ceil

from spotserve.core.ids import GpuId, InstanceId, instance_of, natural_key
from spotserve.solvers.migrate.fan_out import Relay, fan_out
from spotserve.solvers.migrate.pieces import Part, Piece, split_parts
from spotserve.solvers.migrate.ports import (
    FixedCopy,
    Ports,
    SourceFlow,
    Traffic,
    in_time,
    least_time,
    traffic,
)
from spotserve.solvers.migrate.schedule import Copy, list_schedule, makespan
from spotserve.solvers.migrate.split import PieceClass, PrefixTimes, Shares, prefix_split
from spotserve.solvers.ranges import Catalog
from spotserve.solvers.result import Certificate, Result

CRUMB_BYTES = 1024 * 1024
"""A round trip costs more than so few bytes balance: they go with a transfer that is made anyway."""

PAPER_SOLVERS = ("paper", "paper-artifact", "paper-unplanned", "paper-first-holder")
SOURCE_SOLVERS = ("layered", "maxflow", "prefix_lp", "first_holder", *PAPER_SOLVERS)
"""How sources are chosen.

`layered` is least-loaded, split by the prefix LP where the bound shows that it pays; its in_place plans keep KV and
free weights layer by layer where memory and time allow, the others free all of an old generation and fetch it again.
`maxflow` splits along the flow. `prefix_lp` always solves the LP and takes storage for a holder of everything.
`first_holder` is what naive systems do. `paper` deals the receivers out over the holders in turn, as its artifact deals
new GPUs out over the old pipelines, and moves layers one after another in the order of Algorithm 2 (SpotServe, section
3.4); `paper-artifact` in the order that its code finds. The other two are ablations of the paper: layers as they are
numbered and nothing goes on beside them (`paper-unplanned`), and all from the first holder (`paper-first-holder`).
"""

ONE_SOURCE = ("first_holder", "paper-first-holder")

UNPLANNED = ("paper-unplanned", "paper-first-holder")
"""Those that stop what runs even where replicas are only added."""

FIRST_HOLDER = ("first_holder", *PAPER_SOLVERS)
"""Those that take pieces whole, from holders that no load is weighed for."""

LAYER_BY_LAYER = ("layered", *PAPER_SOLVERS)
"""Those whose in_place plans keep what fits and move weights layer by layer."""


@dataclass(frozen=True, slots=True)
class SourceProblem:
    """Pieces to fetch, the KV that is copied anyway, and what the ports carry."""

    pieces: tuple[Piece, ...]
    ports: Ports
    doomed: Collection[GpuId] = ()
    fixed: tuple[FixedCopy, ...] = ()


@dataclass(frozen=True, slots=True)
class Transfer:
    """Parts that one GPU gets from one source; None: from storage."""

    source: GpuId | None
    destination: GpuId
    stage: int
    parts: tuple[Part, ...]
    bytes: int
    by_choice: bool = False
    """From storage although somebody holds it: the ports are full."""
    is_relayed: bool = False
    """The source, of the same instance, gets it by transfers of the same plan."""


@dataclass(slots=True)
class _Load:
    """Bytes to send so far, and for each holder set its ports by load."""

    ports: Ports
    doomed: Collection[InstanceId]
    sent: dict[InstanceId, int] = field(default_factory=dict)
    gpus: dict[GpuId, int] = field(default_factory=dict)
    sources: dict[GpuId, dict[GpuId, None]] = field(default_factory=lambda: defaultdict(dict))
    queues: dict[tuple[InstanceId, ...], list[tuple[int, bool, int]]] = field(default_factory=dict)

    def add(self, source: GpuId, destination: GpuId, num_bytes: int) -> None:
        """Count one transfer; inside an instance it loads no port."""
        self.sources[destination][source] = None
        self.gpus[source] = self.gpus.get(source, 0) + num_bytes
        port = instance_of(source)
        if port != instance_of(destination):
            self.sent[port] = self.sent.get(port, 0) + num_bytes

    def busy(self, port: InstanceId) -> int:
        """How long a port has to send so far."""
        return self.ports.ticks(self.sent.get(port, 0), self.ports.rate(port))

    def least_loaded(self, holders: tuple[InstanceId, ...]) -> InstanceId:
        """The port with least to send, survivors before doomed ones. Loads only grow: a stale entry is put back."""
        queue = self.queues.get(holders)
        if queue is None:
            queue = [(self.busy(port), port in self.doomed, rank) for rank, port in enumerate(holders)]
            heapq.heapify(queue)
            self.queues[holders] = queue
        while True:
            known, doomed, rank = queue[0]
            now = self.busy(holders[rank])
            if now == known:
                return holders[rank]
            heapq.heapreplace(queue, (now, doomed, rank))

    def gpu_at(self, piece: Piece, port: InstanceId) -> GpuId:
        """The holder at a port that sends least so far."""
        at_port = [gpu for gpu in piece.holders if instance_of(gpu) == port]
        return min(at_port, key=lambda gpu: (self.gpus.get(gpu, 0), natural_key(gpu)))


def choose_sources(problem: SourceProblem, catalog: Catalog, solver: str) -> Result[tuple[Transfer, ...]]:
    """Transfers that bring every piece once, in the order in which they should start.

    The objective and the bound are ticks that the fullest port works: bytes, where all links are equal. What is passed
    on inside an instance comes last: it waits for what brings it there.
    """
    relays: tuple[Relay, ...] = ()
    if solver not in FIRST_HOLDER:
        pieces, relays = fan_out(catalog, problem.pieces, least_bytes=CRUMB_BYTES)
        problem = replace(problem, pieces=pieces)
    load = traffic(problem.pieces, problem.fixed)
    bound, certificate = least_time(load, problem.ports)
    transfers = _whole(problem, solver)
    objective = _busiest(problem, transfers)
    statistics: dict[str, int | float] = {"split": 0}
    if solver == "prefix_lp":
        times = prefix_split(*_classes(problem, storage=True), in_bytes=_in_bytes(problem, storage=True))
        bound, certificate = _lp_bound(times, problem)
        better = _split(problem, catalog, times.shares, storage=True)
        if _busiest(problem, better) <= objective:
            transfers, statistics["split"] = better, 1
        statistics |= {f"prefix_{number}_s": round(time, 6) for number, time in enumerate(times.times_s)}
    elif solver not in FIRST_HOLDER and objective - bound > problem.ports.round_trip_ticks:
        better = _split(problem, catalog, _shares(problem, load, bound, solver), storage=False)
        # A transfer more costs a round trip more.
        if objective - _busiest(problem, better) > problem.ports.round_trip_ticks:
            transfers, statistics["split"] = better, 1
    objective = _busiest(problem, transfers)
    ordered, scheduled = in_order(transfers, problem, by_start=solver not in PAPER_SOLVERS)
    passed_on = _passed_on(relays)
    if passed_on:
        statistics["relays"] = len(passed_on)
    return Result(
        answer=(*ordered, *passed_on),
        status="optimal" if objective <= bound else "feasible",
        objective=objective,
        bound=min(bound, objective),
        certificate=certificate,
        statistics={**statistics, "scheduled": scheduled, "transfers": len(ordered)},
    )


def _passed_on(relays: Sequence[Relay]) -> list[Transfer]:
    """One transfer for each pair inside an instance, front stages first."""
    transfers = [
        Transfer(one.source, one.destination, one.stage, one.parts, one.bytes, is_relayed=True) for one in relays
    ]
    pairs: dict[tuple[GpuId, GpuId | None, int], list[Transfer]] = defaultdict(list)
    for one in transfers:
        pairs[one.destination, one.source, one.stage].append(one)
    return sorted((_merged(group) for group in pairs.values()), key=_by_stage)


def _by_stage(one: Transfer) -> tuple[int, tuple[object, ...], tuple[object, ...]]:
    return one.stage, natural_key(one.destination), natural_key(one.source or "")


def _whole(problem: SourceProblem, solver: str) -> list[Transfer]:
    """Every piece from one source."""
    load = _Load(problem.ports, {instance_of(gpu) for gpu in problem.doomed})
    for copy in problem.fixed:
        if copy.source != copy.destination:
            load.sent[copy.source] = load.sent.get(copy.source, 0) + copy.bytes
    receivers = sorted({piece.destination for piece in problem.pieces}, key=natural_key)
    turns = {gpu: turn for turn, gpu in enumerate(receivers)}
    transfers = []
    for piece in sorted(problem.pieces, key=lambda one: (len(one.ports), -one.bytes)):
        source = _source(piece, load, solver, turn=turns[piece.destination]) if piece.holders else None
        if source is not None:
            load.add(source, piece.destination, piece.bytes)
        transfers.append(Transfer(source, piece.destination, piece.stage, piece.parts, piece.bytes))
    return transfers


def _source(piece: Piece, load: _Load, solver: str, *, turn: int) -> GpuId:
    """The one holder that sends a piece."""
    if solver in FIRST_HOLDER:
        return piece.holders[0 if solver in ONE_SOURCE else turn % len(piece.holders)]
    own = instance_of(piece.destination)
    if own in piece.ports:
        return load.gpu_at(piece, own)
    if piece.bytes < CRUMB_BYTES:
        known = load.sources[piece.destination]
        if both := [gpu for gpu in piece.holders if gpu in known]:
            return min(both, key=lambda gpu: (load.busy(instance_of(gpu)), load.gpus.get(gpu, 0), natural_key(gpu)))
    return load.gpu_at(piece, load.least_loaded(piece.ports))


# -- splitting ------------------------------------------------------------------------------------------------------


def _class_of(piece: Piece, *, storage: bool) -> PieceClass:
    """Stages are priorities from 1; 0 is KV."""
    return PieceClass(1 + piece.stage, piece.ports, instance_of(piece.destination) if storage else None)


def _classes(problem: SourceProblem, *, storage: bool) -> tuple[dict[PieceClass, int], Ports]:
    """Bytes by class of what passes ports; storage alone sends what nobody holds."""
    sizes: dict[PieceClass, int] = defaultdict(int)
    for copy in problem.fixed:
        if copy.source != copy.destination and copy.bytes:
            sizes[PieceClass(0, (copy.source,))] += copy.bytes
    for piece in problem.pieces:
        if piece.bytes and (piece.crosses or (storage and not piece.ports)):
            sizes[_class_of(piece, storage=storage)] += piece.bytes
    return dict(sizes), problem.ports


def _in_bytes(problem: SourceProblem, *, storage: bool) -> list[dict[InstanceId, int]]:
    """What each in-port receives of KV, then of each stage, as far as storage has no part in it."""
    last = max((piece.stage for piece in problem.pieces), default=0)
    volumes = [dict(traffic((), problem.fixed).in_bytes)]
    for stage in range(last + 1):
        pieces = [one for one in problem.pieces if one.stage == stage and not storage]
        volumes.append(dict(traffic(pieces, ()).in_bytes))
    return volumes


def _shares(problem: SourceProblem, load: Traffic, bound: int, solver: str) -> Shares:
    """How much each port sends of each class, storage aside."""
    if solver == "layered":
        classes, ports = _classes(problem, storage=False)
        return prefix_split(classes, ports, in_bytes=_in_bytes(problem, storage=False)).shares
    flow = SourceFlow(load.out_bytes, problem.ports, bound).shares()
    shares: Shares = {}
    sizes, _ = _classes(problem, storage=False)
    for one in sorted(sizes, key=lambda each: each.priority):
        left, shares[one] = sizes[one], {}
        for port, size in flow[one.senders].items():
            taken = min(left, size)
            left -= taken
            flow[one.senders][port] = size - taken
            if taken:
                shares[one][port] = taken
    return shares


def _lp_bound(times: PrefixTimes, problem: SourceProblem) -> tuple[int, Certificate]:
    """The bound where storage may help: the in-port with the most KV, or what the LP's prices prove."""
    proved = ceil(times.bound_s * problem.ports.bytes_per_s * (1 - 1e-9))
    fullest, certificate = in_time(traffic((), problem.fixed), problem.ports)
    return (fullest, certificate) if fullest >= proved else (proved, times.certificate)


def _split(problem: SourceProblem, catalog: Catalog, shares: Shares, *, storage: bool) -> list[Transfer]:
    """Every piece in rows from the ports that its class's shares name; what no share covers stays with the last."""
    load = _Load(problem.ports, ())
    transfers = []
    left = {one: dict(volumes) for one, volumes in shares.items()}
    for piece in sorted(problem.pieces, key=lambda one: (one.stage, -one.bytes)):
        dealt: list[tuple[InstanceId | None, tuple[Part, ...]]]
        if piece.crosses or (storage and not piece.ports):
            dealt = _dealt(catalog, piece, left.get(_class_of(piece, storage=storage), {}))
        else:
            dealt = [(instance_of(piece.destination) if piece.ports else None, piece.parts)]
        for port, parts in dealt:
            size = sum(part.bytes for part in parts)
            gpu = None if port is None else load.gpu_at(piece, port)
            if gpu is not None:
                load.add(gpu, piece.destination, size)
            by_choice = gpu is None and bool(piece.ports)
            transfers.append(Transfer(gpu, piece.destination, piece.stage, parts, size, by_choice))
    return transfers


def _dealt(
    catalog: Catalog, piece: Piece, left: dict[InstanceId | None, int]
) -> list[tuple[InstanceId | None, tuple[Part, ...]]]:
    """One piece over the ports of its class: whole where a share has room for it, else cut, never into crumbs."""
    dealt: list[tuple[InstanceId | None, tuple[Part, ...]]] = []
    parts, size = list(piece.parts), piece.bytes
    while parts:
        open_ports = {port: room for port, room in left.items() if room > 0}
        fitting = [port for port, room in open_ports.items() if room >= size - CRUMB_BYTES]
        if fitting or not open_ports:
            port = min(
                fitting or left or piece.ports or (None,), key=lambda one: (left.get(one, 0), natural_key(one or ""))
            )
            left[port] = left.get(port, 0) - size
            return [*dealt, (port, tuple(parts))]
        port = max(open_ports, key=lambda one: (open_ports[one], natural_key(one or "")))
        first, parts = split_parts(catalog, parts, open_ports[port])
        left[port] = 0
        size -= sum(part.bytes for part in first)
        if first:
            dealt.append((port, tuple(first)))
    return dealt


# -- order and judgement --------------------------------------------------------------------------------------------


def in_order(
    transfers: Sequence[Transfer], problem: SourceProblem, *, by_start: bool
) -> tuple[tuple[Transfer, ...], int]:
    """One transfer per pair and stage, sorted by the start that a list schedule gives it, and the schedule's end.

    KV is scheduled first, then front stages first.
    """
    pairs: dict[tuple[GpuId, GpuId | None, int, bool], list[Transfer]] = defaultdict(list)
    for one in transfers:
        pairs[one.destination, one.source, one.stage, one.by_choice].append(one)
    merged = [_merged(group) for group in pairs.values()]
    merged.sort(key=_by_stage)
    copies = [Copy(copy.source, copy.destination, copy.bytes, 0) for copy in problem.fixed]
    copies += [
        Copy(
            None if one.source is None else instance_of(one.source),
            instance_of(one.destination),
            one.bytes,
            1 + one.stage,
        )
        for one in merged
    ]
    start = list_schedule(copies, problem.ports)
    first = len(problem.fixed)
    line = sorted(range(len(merged)), key=lambda number: start[first + number]) if by_start else range(len(merged))
    return tuple(merged[number] for number in line), makespan(copies, start, problem.ports)


def _merged(group: Sequence[Transfer]) -> Transfer:
    """Transfers of one pair as one."""
    first = group[0]
    if len(group) == 1:
        return first
    parts = tuple(part for one in group for part in one.parts)
    size = sum(one.bytes for one in group)
    return replace(first, parts=parts, bytes=size)


def _busiest(problem: SourceProblem, transfers: Sequence[Transfer]) -> int:
    """How long the fullest port works."""
    out: dict[InstanceId, int] = defaultdict(int)
    into: dict[InstanceId, int] = defaultdict(int)
    storage: dict[InstanceId, int] = defaultdict(int)
    for copy in problem.fixed:
        if copy.source != copy.destination:
            out[copy.source] += copy.bytes
            into[copy.destination] += copy.bytes
    for one in transfers:
        port = instance_of(one.destination)
        if one.source is None:
            storage[port] += one.bytes
        elif instance_of(one.source) != port:
            out[instance_of(one.source)] += one.bytes
            into[port] += one.bytes
    rates = problem.ports
    times = [rates.ticks(size, rates.rate(port)) for volumes in (out, into) for port, size in volumes.items()]
    times += [rates.ticks(size, rates.storage_bytes_per_s) for size in storage.values()]
    if rates.storage_total_bytes_per_s is not None:
        times.append(rates.ticks(sum(storage.values()), rates.storage_total_bytes_per_s))
    return max(times, default=0)
