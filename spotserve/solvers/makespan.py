"""Makespan: place so that the busiest port fetches least, not so that most bytes are reused.

Most reused bytes is not the shortest migration: downtime is a maximum over ports, reuse a sum over GPUs. Starting from
the reuse-maximal assignment, a small CP-SAT model minimises the bytes that the busiest instance has to receive, then
maximises reuse among the placements that reach that. Where the start already meets the bound nothing is solved.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from math import gcd

from ortools.sat.python import cp_model

from spotserve.core.ids import GpuId, InstanceId, instance_of
from spotserve.core.plan import SolverReport

MAX_PAIRS = 1024
"""GPUs x positions up to which the model is built; beyond, the start is kept."""

MAX_DETERMINISTIC_TIME = 2.0
MAX_SUM = 2**50
"""CP-SAT keeps objectives in doubles; coefficients are coarsened until their sum is well inside."""


@dataclass(frozen=True, slots=True)
class Ports:
    """What the improver looks at: bytes to fetch and reuse weights of every pair, and which pairs may be taken."""

    gpus: tuple[GpuId, ...]
    missing_bytes: tuple[tuple[int, ...], ...]
    weights: tuple[tuple[int, ...], ...]
    fits: tuple[tuple[bool, ...], ...]

    def busiest(self, order: Sequence[int]) -> tuple[int, InstanceId]:
        """Bytes through the busiest in-port of a placement, and which port that is."""
        received: dict[InstanceId, int] = defaultdict(int)
        for position, row in enumerate(order):
            received[instance_of(self.gpus[row])] += self.missing_bytes[row][position]
        port, num_bytes = max(received.items(), key=lambda item: (item[1], item[0]))
        return num_bytes, port

    def squeezed(self, order: Sequence[int]) -> int:
        """Pairs of a placement that do not fit beside what is there."""
        return sum(not self.fits[row][position] for position, row in enumerate(order))

    def bound(self) -> int:
        """No placement does better: some position is nowhere cheaper."""
        positions = range(len(self.missing_bytes[0]))
        return max(min(row[position] for row in self.missing_bytes) for position in positions)


def improve(ports: Ports, start: Sequence[int]) -> tuple[list[int], SolverReport]:
    """A placement whose busiest port receives no more than that of `start`, and the report on it."""
    first, _ = ports.busiest(start)
    bound = ports.bound()
    if first == bound:
        return list(start), _report(ports, start, bound, proven=True)
    if len(ports.gpus) * len(start) > MAX_PAIRS:
        return list(start), _report(ports, start, bound, proven=False)
    model = _Model(ports, start)
    least, proven = model.least_port()
    order = model.most_reuse(least) if least < first else list(start)
    return order, _report(ports, order, least if proven else bound, proven=proven)


def _report(ports: Ports, order: Sequence[int], bound: int, *, proven: bool) -> SolverReport:
    num_bytes, port = ports.busiest(order)
    # A bound found in coarse units may be a hair above the placement that it bounds.
    bound = min(bound, num_bytes)
    return SolverReport(
        name="makespan",
        status="optimal" if proven else "feasible",
        objective=num_bytes,
        bound=bound,
        gap=round((num_bytes - bound) / max(1, num_bytes), 6),
        certificate={"kind": "in_port", "port": port, "bytes": num_bytes},
    )


class _Model:
    """The CP-SAT model over pairs; one solve for the port, one for reuse."""

    def __init__(self, ports: Ports, start: Sequence[int]) -> None:
        self._ports = ports
        self._start = list(start)
        rows, positions = range(len(ports.gpus)), range(len(start))
        self._model = cp_model.CpModel()
        self._taken = [[self._model.new_bool_var(f"x{row}_{position}") for position in positions] for row in rows]
        for position in positions:
            self._model.add_exactly_one(self._taken[row][position] for row in rows)
        for row in rows:
            self._model.add_at_most_one(self._taken[row])
        for row in rows:
            for position in positions:
                self._model.add_hint(self._taken[row][position], start[position] == row)
        self._model.add(self._sum([[not fits for fits in line] for line in ports.fits]) <= ports.squeezed(start))
        self._unit = _unit(ports.missing_bytes)
        self._load = self._port_loads()

    def least_port(self) -> tuple[int, bool]:
        """Bytes of the busiest port at best, and whether that is proven."""
        self._model.minimize(self._load)
        solver, proven = self._solve()
        order = self._order(solver)
        return self._ports.busiest(order)[0], proven

    def most_reuse(self, num_bytes: int) -> list[int]:
        """The placement of most weight among those whose busiest port receives no more than `num_bytes`."""
        self._model.add(self._load <= -(-num_bytes // self._unit))
        unit = _unit(self._ports.weights)
        self._model.maximize(self._sum([[weight // unit for weight in line] for line in self._ports.weights]))
        solver, _ = self._solve()
        return self._order(solver)

    def _port_loads(self) -> cp_model.IntVar:
        units = [[-(-size // self._unit) for size in line] for line in self._ports.missing_bytes]
        load = self._model.new_int_var(0, sum(max(line) for line in units), "busiest")
        members: dict[InstanceId, list[int]] = defaultdict(list)
        for row, gpu in enumerate(self._ports.gpus):
            members[instance_of(gpu)].append(row)
        for rows in members.values():
            pairs = [(row, position) for row in rows for position in range(len(self._start))]
            self._model.add(sum(units[row][position] * self._taken[row][position] for row, position in pairs) <= load)
        return load

    def _sum(self, coefficients: Sequence[Sequence[int]]) -> cp_model.LinearExprT:
        return sum(
            coefficient * self._taken[row][position]
            for row, line in enumerate(coefficients)
            for position, coefficient in enumerate(line)
            if coefficient
        )

    def _solve(self) -> tuple[cp_model.CpSolver, bool]:
        solver = cp_model.CpSolver()
        solver.parameters.num_workers = 1
        solver.parameters.random_seed = 1
        solver.parameters.linearization_level = 2
        solver.parameters.max_deterministic_time = MAX_DETERMINISTIC_TIME
        status = solver.solve(self._model)
        assert status in (cp_model.OPTIMAL, cp_model.FEASIBLE), f"placement answered {solver.status_name(status)}"
        return solver, status == cp_model.OPTIMAL

    def _order(self, solver: cp_model.CpSolver) -> list[int]:
        return [
            next(row for row in range(len(self._ports.gpus)) if solver.value(self._taken[row][position]))
            for position in range(len(self._start))
        ]


def _unit(values: Sequence[Sequence[int]]) -> int:
    """The granule: the greatest common divisor, coarsened until sums stay exact in a double."""
    unit = gcd(*(value for line in values for value in line)) or 1
    while sum(max(abs(value) for value in line) for line in values) // unit >= MAX_SUM:
        unit *= 2
    return unit
