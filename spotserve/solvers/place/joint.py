"""Where parts go and from whom instances fetch, in one CP-SAT model: least time of the busiest port.

Only the holder classes need flow variables: which destination a byte goes to matters to its in-port alone, and that one
receives all it lacks whatever the sources. Then, within that time, fewest bytes, most reuse, fewest moved from home.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import numpy as np
from ortools.sat.python import cp_model

from spotserve.solvers.cp_sat import new_solver
from spotserve.solvers.place.groups import counts_of, kinds_of, needs_of
from spotserve.solvers.place.ports import Ports
from spotserve.solvers.place.problem import Integers
from spotserve.solvers.place.seating import Seating

MAX_UNITS = 2**24
"""Units of the whole volume; CP-SAT's sums stay far inside the doubles it keeps objectives in (2^52)."""

SECOND_SHARE = 0.25
"""Share of the budget left for the second goal."""


@dataclass(frozen=True, slots=True, eq=False)
class Joint:
    """The best seating found, the time that no seating of these parts passes, and what the search took."""

    where: Integers
    bound: int
    is_proven: bool
    deterministic_time: float
    branches: int


def solve_jointly(ports: Ports, seating: Seating, start: Integers, *, most: int, budget: float) -> Joint:
    """Search for a seating whose busiest port takes less than `most` bytes, for so much deterministic time."""
    model = _Model(ports, seating, start, most=most)
    return model.solve(budget)


@dataclass(frozen=True, slots=True)
class _Piece:
    """Pieces that the same kinds of parts need and the same instances hold, in units."""

    kinds: tuple[int, ...]
    replica: int | None
    units: int
    holder_class: int


class _Model:
    """Variables: which instance takes which part, what it therefore fetches, and who sends how much of a class."""

    def __init__(self, ports: Ports, seating: Seating, start: Integers, *, most: int) -> None:
        self._ports, self._seating, self._start = ports, seating, start
        self._num_instances = len(ports.num_gpus)
        self._model = cp_model.CpModel()
        volume = int(seating.prices.fetched.max(axis=0).sum())
        self._unit = max(1, -(-volume // MAX_UNITS))
        self._most = -(-most // self._unit)
        self._taken = [
            [self._model.new_bool_var(f"part{part}@{instance}") for part in range(len(start))]
            for instance in range(self._num_instances)
        ]
        self._time = self._model.new_int_var(0, self._most, "time")
        self._seat_parts()
        self._received: dict[int, list[cp_model.LinearExprT]] = defaultdict(list)
        self._sent: dict[int, list[cp_model.LinearExprT]] = defaultdict(list)
        self._fetch()
        self._bound_ports()

    def _seat_parts(self) -> None:
        """Every part once, no more GPUs than an instance has, and no more pairs without room than at the start."""
        size, squeezed = self._seating.parts.size, self._seating.prices.squeezed[:, self._seating.prices.kind]
        for part in range(len(self._start)):
            self._model.add_exactly_one(row[part] for row in self._taken)
        for instance, row in enumerate(self._taken):
            used = cp_model.LinearExpr.weighted_sum(row, size.tolist())
            self._model.add(used <= int(self._ports.num_gpus[instance]))
            for part, taken in enumerate(row):
                self._model.add_hint(taken, int(self._start[part]) == instance)
        if squeezed.any():
            now = int(squeezed[self._start, np.arange(len(self._start))].sum())
            self._model.add(self._sum(squeezed) <= now)

    def _fetch(self) -> None:
        """What every instance receives, and every holder class sends, as sums of parts taken."""
        for instance in range(self._num_instances):
            needing: dict[tuple[tuple[int, ...], int | None], cp_model.LinearExprT] = {}
            for piece in _pieces(self._ports, self._seating, instance, self._unit):
                key = piece.kinds, piece.replica
                if key not in needing:
                    needing[key] = self._any_of(instance, piece)
                self._received[instance].append(piece.units * needing[key])
                if piece.holder_class >= 0:
                    self._sent[piece.holder_class].append(piece.units * needing[key])

    def _any_of(self, instance: int, piece: _Piece) -> cp_model.LinearExprT:
        """Whether an instance takes a part that needs the piece: fetched once, however many do."""
        wanted = np.isin(self._seating.prices.kind, piece.kinds)
        if piece.replica is not None:
            wanted &= self._seating.parts.first // self._ports.seats == piece.replica
        parts = [int(part) for part in np.flatnonzero(wanted)]
        if len(parts) == 1:
            return self._taken[instance][parts[0]]
        any_ = self._model.new_bool_var("")
        for part in parts:
            self._model.add_implication(self._taken[instance][part], any_)
        return any_

    def _bound_ports(self) -> None:
        """No in-port and no out-port passes more than `time`; each class is sent by its holders, split at will."""
        for terms in self._received.values():
            self._model.add(sum(terms) <= self._time)
        sending: dict[int, list[cp_model.IntVar]] = defaultdict(list)
        for number, terms in sorted(self._sent.items()):
            shares = []
            for port in np.flatnonzero(self._ports.holders[number]):
                share = self._model.new_int_var(0, self._most, "")
                sending[int(port)].append(share)
                shares.append(share)
            self._model.add(sum(terms) <= sum(shares))
        for shares in sending.values():
            self._model.add(sum(shares) <= self._time)

    def solve(self, budget: float) -> Joint:
        """Least time first; then, within that, the second goal with what is left of the budget."""
        self._model.minimize(self._time)
        first = new_solver(budget * (1 - SECOND_SHARE))
        status = first.solve(self._model)
        spent, branches = first.response_proto.deterministic_time, first.num_branches
        if status not in (cp_model.OPTIMAL, cp_model.FEASIBLE):
            return Joint(self._start, self._bound(first), False, spent, branches)
        where, bound, proven = self._where(first), self._bound(first), status == cp_model.OPTIMAL
        self._model.add(self._time <= first.value(self._time))
        self._second_goal()
        self._model.clear_hints()
        for instance, row in enumerate(self._taken):
            for part, taken in enumerate(row):
                self._model.add_hint(taken, int(where[part]) == instance)
        second = new_solver(budget * SECOND_SHARE)
        if second.solve(self._model) in (cp_model.OPTIMAL, cp_model.FEASIBLE):
            where = self._where(second)
        return Joint(
            where,
            bound,
            proven,
            spent + second.response_proto.deterministic_time,
            branches + second.num_branches,
        )

    def _second_goal(self) -> None:
        """Fewest bytes, then most reuse, then most GPUs at home."""
        prices = self._seating.prices
        reused = prices.reused // max(1, int(prices.reused.max(initial=0)) // 2**8)
        homely = int(prices.stayed.sum()) + 1
        useful = (int(reused.max(axis=0).sum()) + 1) * homely
        total = sum(sum(terms) for terms in self._received.values()) if self._received else 0
        coarse = max(1, (MAX_UNITS * useful) >> 50)
        self._model.minimize(max(1, useful // coarse) * total - self._sum((reused * homely + prices.stayed) // coarse))

    def _sum(self, coefficients: Integers) -> cp_model.LinearExprT:
        variables = [taken for row in self._taken for taken in row]
        return cp_model.LinearExpr.weighted_sum(variables, coefficients.ravel().tolist())

    def _bound(self, solver: cp_model.CpSolver) -> int:
        """Bytes below which no seating gets: units were rounded down, and shares are whole units."""
        units = int(np.ceil(solver.best_objective_bound - 1e-6))
        return units if self._unit == 1 else max(0, (units - 1) * self._unit + 1)

    def _where(self, solver: cp_model.CpSolver) -> Integers:
        values = np.array([[solver.boolean_value(taken) for taken in row] for row in self._taken])
        where: Integers = values.argmax(axis=0)
        return where


def _pieces(ports: Ports, seating: Seating, instance: int, unit: int) -> list[_Piece]:
    """What an instance lacks of what any part needs, joined by who needs it and who holds it; rounded down to units."""
    kinds = kinds_of(seating.parts, ports.seats)
    amounts: dict[tuple[tuple[int, ...], int | None, int], int] = defaultdict(int)
    needs = needs_of(kinds.spans, ports.weight_needed)
    for piece in np.flatnonzero(ports.weight_lacking[instance] & needs.any(axis=0)):
        key = tuple(np.flatnonzero(needs[:, piece]).tolist()), None, int(ports.weight_class[piece])
        amounts[key] += int(ports.weight_bytes[piece])
    kv_needs = counts_of(kinds.spans, ports.kv_needed)
    for replica in np.flatnonzero(ports.kv_tokens):
        lacking = ports.kv_lacking[ports.kv_row[instance, replica]]
        for kind, piece in zip(*np.nonzero(kv_needs * lacking), strict=True):
            kv_key = (int(kind),), int(replica), int(ports.kv_class[replica, piece])
            num_bytes = ports.kv_token_bytes[piece] * ports.kv_tokens[replica]
            amounts[kv_key] += int(kv_needs[kind, piece] * num_bytes)
    return [_Piece(*key[:2], num_bytes // unit, key[2]) for key, num_bytes in amounts.items() if num_bytes >= unit]
