"""Prefix LP: pieces split over their holders (and storage) so that the last copy, then each stage, is early.

Variables are the bytes that each port sends of each class (stage, holder set). Priorities are KV, then the stages in
order; every prefix of them has a time by which each port has carried the prefix. First the time of the whole is
minimised, then, at that time, the sum over the prefixes. Where storage is no choice, what an in-port receives is given
and bounds the times.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from scipy.optimize import OptimizeResult, linprog

from spotserve.core.ids import InstanceId
from spotserve.errors import InvariantError
from spotserve.solvers.migrate.ports import Ports, PortSet
from spotserve.solvers.result import Certificate

SCALE = 1e9
"""The LP counts in gigabytes: bytes themselves are beyond the tolerances of a floating-point solver."""

LEAST_SHARE_BYTES = 0.5

MAX_ARCS = 20_000
"""Beyond so many variables only the first of the two goals is solved for."""


@dataclass(frozen=True, slots=True)
class PieceClass:
    """Pieces of one priority that the same ports can send; `reader` is set where storage may send them too."""

    priority: int
    senders: PortSet
    reader: InstanceId | None = None


Shares = dict[PieceClass, dict[InstanceId | None, int]]
"""Bytes that each port sends of a class; None is storage."""


@dataclass(frozen=True, slots=True)
class PrefixTimes:
    """The split, the times of the prefixes in seconds, and the least time of the whole with its proof."""

    shares: Shares
    times_s: tuple[float, ...]
    bound_s: float
    certificate: Certificate


Arc = tuple[int, InstanceId | None]


@dataclass(frozen=True, slots=True)
class _Model:
    """The LP's index sets: arcs from classes to ports, one row per port of each prefix."""

    classes: tuple[PieceClass, ...]
    sizes: tuple[int, ...]
    arcs: tuple[Arc, ...]
    least_s: tuple[float, ...]
    ports: Ports


def prefix_split(
    sizes: Mapping[PieceClass, int], ports: Ports, *, in_bytes: Sequence[Mapping[InstanceId, int]]
) -> PrefixTimes:
    """The split of classes of `sizes` bytes; `in_bytes` says what each in-port receives of each priority.

    Of the classes with a reader `in_bytes` says nothing: how much of them passes the in-port is for the LP to say.
    Raises InvariantError if the LP is not solved to optimality.
    """
    model = _model(sizes, ports, in_bytes)
    if not sizes:
        return PrefixTimes({}, model.least_s, 0.0, {"kind": "nothing_to_copy"})
    rows = _rows(model, in_bytes)
    whole = _solve(model, rows, np.eye(len(in_bytes))[-1], latest_s=None)
    bound_s, certificate = _proof(model, rows, whole, in_bytes)
    solution, times = whole, whole.x[len(model.arcs) :]
    if len(model.arcs) <= MAX_ARCS and len(in_bytes) > 1:
        latest = float(times[-1]) * (1 + 1e-9) + 1e-9
        solution = _solve(model, rows, np.ones(len(in_bytes)), latest_s=latest)
        times = solution.x[len(model.arcs) :]
    shares: Shares = defaultdict(dict)
    for (number, port), gigabytes in zip(model.arcs, solution.x[: len(model.arcs)], strict=True):
        if gigabytes * SCALE > LEAST_SHARE_BYTES:
            shares[model.classes[number]][port] = round(float(gigabytes) * SCALE)
    return PrefixTimes(dict(shares), tuple(float(time) for time in times), bound_s, certificate)


def proved_s(
    prices: Mapping[tuple[str, InstanceId | None], float],
    sizes: Mapping[PieceClass, int],
    ports: Ports,
    *,
    in_bytes: Mapping[InstanceId, int],
) -> float:
    """The time in seconds that prices of ports prove, computed without a solver (linear programming duality).

    A port that works for T seconds carries at most T times its rate, so the bytes, each valued at the cheapest port
    that can send it, are worth at most T times the rates' worth.
    """
    worth = sum(max(0.0, price) * _rate(key, ports) for key, price in prices.items())
    if worth <= 0:
        return 0.0
    value = sum(size * min(_price(one, port, prices) for port in _senders(one)) for one, size in sizes.items())
    value += sum(size * max(0.0, prices.get(("in", port), 0.0)) for port, size in in_bytes.items())
    return value / worth


def _price(one: PieceClass, port: InstanceId | None, prices: Mapping[tuple[str, InstanceId | None], float]) -> float:
    """What a byte of a class costs if `port` sends it: the prices of all that it passes."""
    passed: tuple[tuple[str, InstanceId | None], ...] = ("storage", one.reader), ("storage", None)
    if port is not None:
        passed = ("out", port), ("in", one.reader)
    return sum(max(0.0, prices.get(key, 0.0)) for key in passed)


def _senders(one: PieceClass) -> tuple[InstanceId | None, ...]:
    return one.senders if one.reader is None else (*one.senders, None)


def _rate(key: tuple[str, InstanceId | None], ports: Ports) -> float:
    kind, port = key
    if kind == "storage":
        return float(ports.storage_bytes_per_s if port is not None else ports.storage_total_bytes_per_s or 0)
    assert port is not None, "a port has an instance"
    return float(ports.rate(port))


def _model(sizes: Mapping[PieceClass, int], ports: Ports, in_bytes: Sequence[Mapping[InstanceId, int]]) -> _Model:
    classes = tuple(sizes)
    arcs = tuple((number, port) for number, one in enumerate(classes) for port in _senders(one))
    received: dict[InstanceId, int] = defaultdict(int)
    least = []
    for volumes in in_bytes:
        for port, size in volumes.items():
            received[port] += size
        least.append(max((size / ports.rate(port) for port, size in received.items()), default=0.0))
    return _Model(classes, tuple(sizes[one] for one in classes), arcs, tuple(least), ports)


@dataclass(frozen=True, slots=True)
class _Rows:
    """Rows `bytes of a prefix through a port - rate x time of the prefix <= 0`."""

    keys: tuple[tuple[int, str, InstanceId | None], ...]
    matrix: sparse.csr_array
    limits: NDArray[np.float64]
    """Less than 0 where an in-port receives what is not for the LP to say."""
    whole: sparse.csr_array
    """Rows that say that every class is sent whole."""


def _rows(model: _Model, in_bytes: Sequence[Mapping[InstanceId, int]]) -> _Rows:
    num_prefixes = len(in_bytes)
    index: dict[tuple[int, str, InstanceId | None], int] = {}
    rows: list[int] = []
    columns: list[int] = []
    for column, (number, port) in enumerate(model.arcs):
        one = model.classes[number]
        for key in _keys(one, port, model.ports):
            for prefix in range(one.priority, num_prefixes):
                rows.append(index.setdefault((prefix, *key), len(index)))
                columns.append(column)
    values = [1.0] * len(rows)
    for (prefix, kind, port), row in index.items():
        rows.append(row)
        columns.append(len(model.arcs) + prefix)
        values.append(-_rate((kind, port), model.ports) / SCALE)
    first = len(index)
    for prefix in range(num_prefixes - 1):
        rows += [first + prefix, first + prefix]
        columns += [len(model.arcs) + prefix, len(model.arcs) + prefix + 1]
        values += [1.0, -1.0]
    width = len(model.arcs) + num_prefixes
    matrix = sparse.csr_array((values, (rows, columns)), shape=(first + num_prefixes - 1, width))
    owners = [number for number, _ in model.arcs]
    whole = sparse.csr_array((np.ones(len(owners)), (owners, range(len(owners)))), shape=(len(model.classes), width))
    limits = np.zeros(matrix.shape[0])
    for (prefix, kind, port), row in index.items():
        if kind == "in" and port is not None:
            limits[row] = -sum(volumes.get(port, 0) for volumes in in_bytes[: prefix + 1]) / SCALE
    return _Rows(tuple(index), matrix, limits, whole)


def _keys(one: PieceClass, port: InstanceId | None, ports: Ports) -> list[tuple[str, InstanceId | None]]:
    """The ports that a byte of a class passes on its way from `port`, as far as that depends on the choice."""
    if port is not None:
        return [("out", port)] if one.reader is None else [("out", port), ("in", one.reader)]
    keys: list[tuple[str, InstanceId | None]] = [("storage", one.reader)]
    if ports.storage_total_bytes_per_s is not None:
        keys.append(("storage", None))
    return keys


def _solve(model: _Model, rows: _Rows, weights: NDArray[np.float64], *, latest_s: float | None) -> OptimizeResult:
    """One LP; `latest_s` bounds the time of the whole."""
    bounds: list[tuple[float, float | None]] = [(0.0, None)] * len(model.arcs)
    bounds += [(least, None) for least in model.least_s]
    if latest_s is not None:
        bounds[-1] = (model.least_s[-1], max(latest_s, model.least_s[-1]))
    solution = linprog(
        np.concatenate([np.zeros(len(model.arcs)), weights]),
        A_ub=rows.matrix,
        b_ub=rows.limits,
        A_eq=rows.whole,
        b_eq=np.array(model.sizes) / SCALE,
        bounds=bounds,
        method="highs",
    )
    if solution.status != 0:
        raise InvariantError(
            f"the prefix LP with {len(model.arcs)} arcs answered {solution.status}: {solution.message}"
        )
    return solution


def _proof(
    model: _Model, rows: _Rows, whole: OptimizeResult, in_bytes: Sequence[Mapping[InstanceId, int]]
) -> tuple[float, Certificate]:
    """The bound that the LP's prices prove; in-ports whose load is given prove their own."""
    prices: dict[tuple[str, InstanceId | None], float] = defaultdict(float)
    for (_, kind, sender), marginal in zip(rows.keys, whole.ineqlin.marginals[: len(rows.keys)], strict=True):
        prices[kind, sender] -= float(marginal)
    received: dict[InstanceId, int] = defaultdict(int)
    for volumes in in_bytes:
        for port, size in volumes.items():
            received[port] += size
    sizes = dict(zip(model.classes, model.sizes, strict=True))
    proved = proved_s(prices, sizes, model.ports, in_bytes=received)
    named = {
        f"{kind}_{name or 'all'}": round(price * _rate((kind, name), model.ports) / SCALE, 6)
        for (kind, name), price in sorted(prices.items(), key=lambda item: str(item[0]))
        if price > 0
    }
    return proved, {"kind": "port_prices", **named}
