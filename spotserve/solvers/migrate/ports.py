"""The port model: what passes which port, and the least time in which the fullest can have carried it.

An instance has one full-duplex network interface; copies inside an instance do not pass it, nor does what it reads from
storage at a rate of its own. Without a choice of storage the least time is
combinatorial (max-flow bound): either an in-port is full, or a set of pieces is held by so few instances that their
out-ports are (Hall set). Newton iteration on minimum cuts finds the set, and the set proves the bound.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from ortools.graph.python import max_flow

from spotserve.core.ids import InstanceId, instance_of, natural_key
from spotserve.core.spec import Profile
from spotserve.errors import InvariantError
from spotserve.solvers.migrate.pieces import Piece
from spotserve.solvers.result import Certificate

MAX_FLOW_BYTES = 2**62
"""More in all overflows the flow's 64-bit sums."""

PortSet = tuple[InstanceId, ...]


@dataclass(frozen=True, slots=True)
class Ports:
    """Rates in bytes/s; the rate of an instance that `rates` does not name is `bytes_per_s`.

    Time is counted in ticks of 1 / `bytes_per_s` seconds: where all rates are equal, ticks are bytes and all is exact.
    """

    bytes_per_s: int
    storage_bytes_per_s: int
    storage_total_bytes_per_s: int | None = None
    """Rate at which storage serves all instances together; None: as fast as each can read."""
    rates: Mapping[InstanceId, int] = field(default_factory=dict)
    round_trip_ticks: int = 0

    def ticks(self, num_bytes: int, bytes_per_s: int) -> int:
        """How many ticks a rate needs, rounded up; in a tick `self.bytes_per_s` carries one byte."""
        return -(-num_bytes * self.bytes_per_s // bytes_per_s)

    def capacity(self, ticks: int, bytes_per_s: int) -> int:
        """Bytes that a rate carries in some ticks, rounded up: no load that fits is refused."""
        return -(-ticks * bytes_per_s // self.bytes_per_s)

    def rate(self, port: InstanceId) -> int:
        """Bytes/s of an instance's network interface, each way."""
        return self.rates.get(port, self.bytes_per_s)


@dataclass(frozen=True, slots=True)
class FixedCopy:
    """KV that one instance sends to another in any case, before the weights."""

    source: InstanceId
    destination: InstanceId
    bytes: int


@dataclass(frozen=True, slots=True)
class Traffic:
    """What has to pass ports: bytes that any instance of a set can send, that each receives, that storage reads."""

    out_bytes: Mapping[PortSet, int]
    in_bytes: Mapping[InstanceId, int]
    storage_bytes: Mapping[InstanceId, int]


def traffic(pieces: Iterable[Piece], fixed: Iterable[FixedCopy]) -> Traffic:
    """The traffic of pieces and fixed copies; copies inside an instance are none."""
    out: dict[PortSet, int] = defaultdict(int)
    into: dict[InstanceId, int] = defaultdict(int)
    storage: dict[InstanceId, int] = defaultdict(int)
    for copy in fixed:
        if copy.source != copy.destination and copy.bytes:
            out[copy.source,] += copy.bytes
            into[copy.destination] += copy.bytes
    for piece in pieces:
        port = instance_of(piece.destination)
        if not piece.ports:
            storage[port] += piece.bytes
        elif port not in piece.ports and piece.bytes:
            out[piece.ports] += piece.bytes
            into[port] += piece.bytes
    return Traffic(dict(out), dict(into), dict(storage))


def least_time(load: Traffic, ports: Ports) -> tuple[int, Certificate]:
    """The least time in ticks, whatever sources are chosen, and the certificate that proves it."""
    ticks, certificate = in_time(load, ports)
    while (full := _overfull(load.out_bytes, ports, ticks)) is not None:
        certificate = _hall_set(load, ports, full)
        ticks = proved_time(certificate, load, ports)
    return ticks, certificate


def proved_time(certificate: Certificate, load: Traffic, ports: Ports) -> int:
    """The time in ticks that a certificate proves, computed from the traffic alone; no solver is asked."""
    if certificate["kind"] == "nothing_to_copy":
        return 0
    if certificate["kind"] == "out_ports":
        full = tuple(InstanceId(name) for name in str(certificate["ports"]).split(","))
        return ports.ticks(_only_at(load, full), sum(ports.rate(port) for port in full))
    port = InstanceId(str(certificate["port"]))
    if certificate["kind"] == "storage":
        return ports.ticks(load.storage_bytes.get(port, 0), ports.storage_bytes_per_s)
    return ports.ticks(load.in_bytes.get(port, 0), ports.rate(port))


def in_time(load: Traffic, ports: Ports) -> tuple[int, Certificate]:
    """The time of the fullest in-port or storage reader, which no choice of sources changes."""
    candidates: list[tuple[int, int, str, InstanceId, int, int]] = []
    for kind, volumes in (("in_port", load.in_bytes), ("storage", load.storage_bytes)):
        for port, size in volumes.items():
            rate = ports.rate(port) if kind == "in_port" else ports.storage_bytes_per_s
            candidates.append((ports.ticks(size, rate), size, kind, port, size, rate))
    if not candidates:
        return 0, {"kind": "nothing_to_copy", "bytes": 0}
    first = max(candidates, key=lambda one: (one[0], one[1], one[2]))
    ticks, _, kind, port, size, rate = min(
        (one for one in candidates if one[:3] == first[:3]), key=lambda one: natural_key(one[3])
    )
    return ticks, {"kind": kind, "port": port, "bytes": size, "bytes_per_s": rate}


def _hall_set(load: Traffic, ports: Ports, full: Sequence[InstanceId]) -> Certificate:
    return {
        "kind": "out_ports",
        "ports": ",".join(full),
        "bytes": _only_at(load, full),
        "bytes_per_s": sum(ports.rate(port) for port in full),
    }


def _only_at(load: Traffic, full: Sequence[InstanceId]) -> int:
    """Bytes that nobody but these instances can send."""
    inside = set(full)
    return sum(size for holders, size in load.out_bytes.items() if inside.issuperset(holders))


def _overfull(out_bytes: Mapping[PortSet, int], ports: Ports, ticks: int) -> PortSet | None:
    """Instances that cannot send within the time what only they hold; None if there are none."""
    flow = SourceFlow(out_bytes, ports, ticks)
    return None if flow.is_enough else flow.full_ports()


class SourceFlow:
    """The maximum flow source -> pieces of one holder set -> out-ports -> sink, with what each port can send in time.

    Raises InvariantError if the bytes together are too many for the flow's integers, or it does not end optimal.
    """

    def __init__(self, out_bytes: Mapping[PortSet, int], ports: Ports, ticks: int) -> None:
        self._sets = list(out_bytes)
        self._senders = sorted({port for holders in out_bytes for port in holders}, key=natural_key)
        self._first_sender = 2 + len(self._sets)
        self._flow = max_flow.SimpleMaxFlow()
        self._arcs: list[tuple[PortSet, InstanceId, int]] = []
        wanted = sum(out_bytes.values())
        if wanted >= MAX_FLOW_BYTES:
            raise InvariantError(f"{wanted} bytes to copy, a maximum flow counts less than {MAX_FLOW_BYTES}")
        node = {port: self._first_sender + number for number, port in enumerate(self._senders)}
        for number, holders in enumerate(self._sets):
            self._flow.add_arc_with_capacity(0, 2 + number, out_bytes[holders])
            for port in holders:
                arc = self._flow.add_arc_with_capacity(2 + number, node[port], out_bytes[holders])
                self._arcs.append((holders, port, arc))
        for port in self._senders:
            room = min(wanted, ports.capacity(ticks, ports.rate(port)))
            self._flow.add_arc_with_capacity(node[port], 1, room)
        status = self._flow.solve(0, 1) if self._sets else self._flow.OPTIMAL
        if status != self._flow.OPTIMAL:
            raise InvariantError(f"the maximum flow over {len(self._sets)} holder sets answered {status}")
        self.is_enough = not self._sets or self._flow.optimal_flow() >= wanted

    def full_ports(self) -> PortSet:
        """The out-ports on the source's side of the minimum cut."""
        side = set(self._flow.get_source_side_min_cut())
        return tuple(port for number, port in enumerate(self._senders) if self._first_sender + number in side)

    def shares(self) -> dict[PortSet, dict[InstanceId, int]]:
        """Bytes that each port sends of each holder set."""
        result: dict[PortSet, dict[InstanceId, int]] = defaultdict(dict)
        for holders, port, arc in self._arcs:
            if size := self._flow.flow(arc):
                result[holders][port] = size
        return dict(result)


def ports_of(profile: Profile) -> Ports:
    """The ports of a cluster whose instances are all as the profile says."""
    return Ports(
        bytes_per_s=max(1, round(profile.link_bytes_per_s)),
        storage_bytes_per_s=max(1, round(profile.storage_bytes_per_s)),
        round_trip_ticks=round(profile.round_trip_s * profile.link_bytes_per_s),
    )
