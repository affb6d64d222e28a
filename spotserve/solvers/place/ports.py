"""What a placement sends through which instance's network interface, and the certificate of its busiest one.

A port is an instance's interface, full duplex; copies inside an instance do not pass it. Weights that several GPUs of
an instance lack pass it once, as one of them passes them on; KV, which still grows, comes to each. The least time is
that of the fullest in-port or of the fullest set of out-ports: pieces that only those instances hold ("max-flow bound",
Newton iteration on minimum cuts).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from ortools.graph.python import max_flow

from spotserve.core.ids import InstanceId
from spotserve.errors import InvariantError
from spotserve.solvers.place.problem import Flags, Integers, PlacementProblem, instances_in_order, product

NOBODY = -1
MAX_FLOW = 2**62
"""Flows beyond 2^63 come back as POSSIBLE_OVERFLOW, with a number."""


@dataclass(frozen=True, slots=True, eq=False)
class Load:
    """Bytes that each instance receives, and bytes to be sent of each holder class."""

    received: Integers
    sent: Integers


@dataclass(frozen=True, slots=True)
class Bottleneck:
    """Why a placement takes as long as it does: `ports` have to pass `total_bytes`, so one passes `num_bytes`.

    `classes` are the holder classes of an out-port bottleneck, empty for an in-port.
    """

    num_bytes: int
    ports: tuple[int, ...]
    total_bytes: int
    classes: tuple[int, ...] = ()

    @property
    def is_in_port(self) -> bool:
        """Whether one instance receives too much; else some instances hold too much alone."""
        return not self.classes


@dataclass(frozen=True, slots=True, eq=False)
class Ports:
    """The problem at instance level. Instances that may be placed come first, those that only send after them.

    A holder class is a set of instances that hold the same pieces; class `NOBODY` comes from storage and loads no
    out-port. `kv_lacking[kv_row[i, d]]` are the KV pieces of new replica d that instance i lacks and somebody has.
    """

    instances: tuple[InstanceId, ...]
    instance_of: Integers
    num_gpus: Integers
    weight_bytes: Integers
    weight_needed: Flags
    weight_lacking: Flags
    weight_class: Integers
    kv_token_bytes: Integers
    kv_needed: Flags
    kv_lacking: Flags
    kv_replica: Integers
    """The new replica of each row of `kv_lacking`."""
    kv_row: Integers
    kv_tokens: Integers
    kv_class: Integers
    holders: Flags

    @property
    def seats(self) -> int:
        """Positions of one replica."""
        return len(self.weight_needed)

    def missing(self, needs: Flags, kv_needs: Integers) -> tuple[Integers, Integers]:
        """Bytes that an instance alone would fetch: weights by [instance, need], KV by [instance, replica, need].

        Of KV it counts how many GPUs need a piece.
        """
        weights = product(self.weight_lacking, needs, self.weight_bytes)
        kv = product(self.kv_lacking, kv_needs, self.kv_token_bytes)
        return weights, kv[self.kv_row] * self.kv_tokens[None, :, None]

    def kv_bytes(self, kv_needs: Integers) -> Integers:
        """KV bytes that somebody has, by [replica, need], for as many GPUs as need them."""
        blank = self.kv_lacking[: len(self.kv_tokens)]
        return product(blank, kv_needs, self.kv_token_bytes) * self.kv_tokens[:, None]

    def restricted(self, classes: tuple[int, ...]) -> Ports:
        """The same ports, looking only at the pieces of some holder classes."""
        return replace(
            self,
            weight_bytes=np.where(np.isin(self.weight_class, classes), self.weight_bytes, 0),
            kv_lacking=self.kv_lacking & np.isin(self.kv_class, classes)[self.kv_replica],
        )

    def load(self, where: Integers) -> Load:
        """What passes the ports when position q is on instance `where[q]`; weights that it lacks it fetches once."""
        replica, seat = np.divmod(np.arange(len(where)), self.seats)
        taken = np.zeros((len(self.num_gpus), self.seats), np.bool_)
        taken[where, seat] = True
        needed = taken.astype(np.float32) @ self.weight_needed.astype(np.float32) > 0
        fetched = needed & self.weight_lacking
        received = (fetched * self.weight_bytes).sum(axis=1)
        sent = np.zeros(len(self.holders) + 1, np.int64)
        np.add.at(sent, self.weight_class, fetched.sum(axis=0) * self.weight_bytes)
        self._add_kv(where, replica, seat, received, sent)
        return Load(received, sent[:-1])

    def _add_kv(self, where: Integers, replica: Integers, seat: Integers, received: Integers, sent: Integers) -> None:
        """Add the KV pieces, each once for every position that needs it."""
        carrying = np.flatnonzero(self.kv_tokens[replica] > 0)
        if not len(carrying):
            return
        keys = where[carrying] * len(self.kv_tokens) + replica[carrying]
        order = np.argsort(keys, kind="stable")
        carrying, keys = carrying[order], keys[order]
        starts = np.flatnonzero(np.concatenate(([True], keys[1:] != keys[:-1])))
        needed = np.add.reduceat(self.kv_needed[seat[carrying]].astype(np.int64), starts, axis=0)
        instance, heir = np.divmod(keys[starts], len(self.kv_tokens))
        fetched = needed * self.kv_lacking[self.kv_row[instance, heir]]
        num_bytes = fetched * self.kv_token_bytes * self.kv_tokens[heir][:, None]
        np.add.at(received, instance, num_bytes.sum(axis=1))
        np.add.at(sent, self.kv_class[heir][fetched > 0], num_bytes[fetched > 0])

    def bottleneck(self, load: Load) -> Bottleneck:
        """The certificate of the least time in which this load passes the ports, in bytes of one port."""
        port = int(load.received.argmax())
        worst = Bottleneck(int(load.received[port]), (port,), int(load.received[port]))
        sending = np.flatnonzero(load.sent)
        if not len(sending):
            return worst
        graph = _OutPorts(self.holders[sending], load.sent[sending])
        while (overfull := graph.overfull(worst.num_bytes)) is not None:
            classes, ports = overfull
            total = int(load.sent[sending[classes]].sum())
            worst = Bottleneck(-(-total // len(ports)), ports, total, tuple(int(one) for one in sending[classes]))
        return worst


class _OutPorts:
    """The flow source -> holder class -> instance -> sink; feasible for a port size if it carries everything."""

    def __init__(self, holders: Flags, sent: Integers) -> None:
        self._total = int(sent.sum())
        if self._total >= MAX_FLOW:
            raise InvariantError(f"{self._total} bytes are too many for a max flow")
        self._num_classes, self._num_ports = holders.shape
        number, port = np.nonzero(holders)
        self._flow = max_flow.SimpleMaxFlow()
        first = 2 + np.arange(self._num_classes)
        last = 2 + self._num_classes + np.arange(self._num_ports)
        self._flow.add_arcs_with_capacity(np.zeros(self._num_classes, np.int32), first.astype(np.int32), sent)
        self._flow.add_arcs_with_capacity(
            (2 + number).astype(np.int32),
            (2 + self._num_classes + port).astype(np.int32),
            np.full(len(number), self._total, np.int64),
        )
        self._out = self._flow.add_arcs_with_capacity(
            last.astype(np.int32), np.ones(self._num_ports, np.int32), np.zeros(self._num_ports, np.int64)
        )

    def overfull(self, num_bytes: int) -> tuple[list[int], tuple[int, ...]] | None:
        """Classes that their holders cannot send at `num_bytes` a port, and those holders; None if all pass."""
        self._flow.set_arcs_capacity(self._out, np.full(self._num_ports, num_bytes, np.int64))
        status = self._flow.solve(0, 1)
        if status != self._flow.OPTIMAL:
            raise InvariantError(f"max flow answered {status}")
        if self._flow.optimal_flow() >= self._total:
            return None
        side = sorted(int(node) for node in self._flow.get_source_side_min_cut())
        classes = [node - 2 for node in side if 2 <= node < 2 + self._num_classes]
        ports = tuple(node - 2 - self._num_classes for node in side if node >= 2 + self._num_classes)
        return classes, ports


def look_at_ports(problem: PlacementProblem) -> Ports:
    """The problem at instance level: contents united over the GPUs of an instance, holders per piece."""
    contents = problem.contents
    instances, instance_of = instances_in_order((*problem.gpus, *problem.senders))
    targets = int(instance_of[: len(problem.gpus)].max(initial=-1)) + 1
    weight_held = _united(contents.weight_held, instance_of, len(instances))
    classes: dict[bytes, int] = {}
    weight_class = _classes(weight_held.T, classes)
    kv = _inherited_kv(problem, instance_of, len(instances), targets, classes)
    members = [np.frombuffer(row, np.bool_) for row in classes]
    return Ports(
        instances=instances,
        instance_of=instance_of[: len(problem.gpus)],
        num_gpus=np.bincount(instance_of[: len(problem.gpus)], minlength=targets),
        weight_bytes=contents.weight_bytes,
        weight_needed=contents.weight_needed,
        weight_lacking=~weight_held[:targets],
        weight_class=weight_class,
        kv_token_bytes=contents.kv_token_bytes,
        kv_needed=contents.kv_needed,
        kv_lacking=kv.lacking,
        kv_replica=kv.replica,
        kv_row=kv.row,
        kv_tokens=kv.tokens,
        kv_class=kv.holder_class,
        holders=np.array(members, np.bool_).reshape(len(members), len(instances)),
    )


def _united(held: Flags, group: Integers, num_groups: int) -> Flags:
    """The union of rows by group."""
    united = np.zeros((num_groups, held.shape[1]), np.bool_)
    order = np.argsort(group, kind="stable")
    ordered = group[order]
    starts = np.flatnonzero(np.concatenate(([True], ordered[1:] != ordered[:-1]))) if len(group) else order
    if len(starts):
        united[ordered[starts]] = np.logical_or.reduceat(held[order], starts, axis=0)
    return united


def _classes(holders: Flags, classes: dict[bytes, int]) -> Integers:
    """The class of each row of holding instances; new ones are added to `classes`."""
    rows = np.ascontiguousarray(holders)
    anybody = [bool(row.any()) for row in rows]
    return np.array(
        [
            classes.setdefault(row.tobytes(), len(classes)) if known else NOBODY
            for row, known in zip(rows, anybody, strict=True)
        ],
        np.int64,
    )


@dataclass(frozen=True, slots=True, eq=False)
class _InheritedKv:
    """The KV fields of `Ports`; row d of `lacking` is an instance that has no KV of new replica d."""

    replica: Integers
    row: Integers
    lacking: Flags
    tokens: Integers
    holder_class: Integers


def _inherited_kv(
    problem: PlacementProblem, instance_of: Integers, num_instances: int, targets: int, classes: dict[bytes, int]
) -> _InheritedKv:
    """Who holds which KV piece of which new replica."""
    contents = problem.contents
    num_pieces = len(contents.kv_token_bytes)
    tokens = np.zeros(problem.data, np.int64)
    inherited = np.flatnonzero(contents.heir >= 0)
    tokens[contents.heir[inherited]] = contents.kv_tokens[inherited]
    old = contents.old_replica
    known = np.flatnonzero(old >= 0)
    known = known[contents.heir[old[known]] >= 0]
    heir = contents.heir[old[known]]
    pairs, group = np.unique(instance_of[known] * problem.data + heir, return_inverse=True)
    held = _united(contents.kv_held[known], group, len(pairs))
    instance, replica = np.divmod(pairs, problem.data)
    owned = np.zeros((problem.data, num_pieces), np.bool_)
    np.logical_or.at(owned, replica, held)
    kv_row = np.tile(np.arange(problem.data), (targets, 1))
    placed = instance < targets
    kv_row[instance[placed], replica[placed]] = problem.data + np.flatnonzero(placed)
    kv_class = np.full((problem.data, num_pieces), NOBODY, np.int64)
    for number in range(problem.data):
        mine = np.flatnonzero(replica == number)
        if tokens[number] and len(mine):
            by_instance = np.zeros((num_pieces, num_instances), np.bool_)
            by_instance[:, instance[mine]] = held[mine].T
            kv_class[number] = _classes(by_instance, classes)
    return _InheritedKv(
        replica=np.concatenate((np.arange(problem.data), replica)),
        row=kv_row,
        lacking=np.vstack((owned, owned[replica] & ~held)),
        tokens=tokens,
        holder_class=kv_class,
    )
