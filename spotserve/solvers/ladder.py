"""The deadline ladder: whose KV leaves in time, when not everybody's can.

Two-interval LP: until T- every instance sends, afterwards the survivors and storage. Stage 1 keeps the most value, the
seconds that computing the KV again would take; stage 2 fixes that loss and ends the rest, the tail after T-, soonest.
A request moves whole, so its shares are rounded: greedily by (value - the bytes' prices) per byte, prices being the
duals of stage 1. Those prices are also the certificate. For any prices, value above price plus the worth of all
capacity bounds every choice (weak duality); that sum is formed in whole numbers, whatever the LP solver's tolerance.

Resources are whatever is short: bytes through ports until T-, sequences and KV blocks of the target.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from scipy import sparse
from scipy.optimize import linprog

from spotserve.errors import SpecError
from spotserve.solvers.result import Result

MIB = 1024 * 1024

MAX_VALUE = 2**51
"""Values in microseconds are doubles in the LP: their sum must be exact."""

CERTIFIED_PRICES = 8
"""Prices that a report names, the resources that cost most of all first."""

PRICE_PARTS = 2**40
"""Parts of a microsecond in which prices are counted."""

LP_VALUE = 1e6
"""All values together in the LP's units, far above its solver's absolute tolerance of 1e-7."""

LOSS_SLACK = 1e-3
"""What stage 2 may lose more than stage 1, in those units."""


@dataclass(frozen=True, slots=True)
class Item:
    """A request whose KV can move: what that saves, and what it takes of each resource (index, amount).

    A `lasting` one is held by survivors alone: it may also cross after T-, through ports that have a rate then.
    """

    name: str
    value_us: int
    uses: tuple[tuple[int, int], ...]
    length: int
    lasting: bool = False


@dataclass(frozen=True, slots=True)
class Resource:
    """Something that is short: so much of it until T-, and so much more with each second afterwards.

    `rate_per_s` is None for what does not come back with time (sequences, blocks) and 0 for a port that is gone.
    """

    name: str
    capacity: int
    rate_per_s: int | None = None


@dataclass(frozen=True, slots=True)
class Weights:
    """Weight bytes that some GPU must get: through ports until T-, through them later if `lasting`, or from storage.

    `storage` is the instance that would read them, None if the plan needs them from a GPU.
    """

    num_bytes: int
    uses: tuple[int, ...]
    storage: int | None = None
    lasting: bool = False

    @property
    def is_due(self) -> bool:
        """Whether they must cross until T-."""
        return self.storage is None and not self.lasting


@dataclass(frozen=True, slots=True)
class LadderProblem:
    """Everything that wants to cross. `storage_per_s[i]` is the rate at which instance i reads storage after T-.

    Weights are not lost, as storage has them: they may wait behind KV.
    """

    items: tuple[Item, ...]
    resources: tuple[Resource, ...]
    weights: tuple[Weights, ...] = ()
    storage_per_s: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Kept:
    """Names of the requests that move, in the order of the items."""

    names: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Relaxed:
    """The LP's answer: a price of each resource (microseconds a unit) and how long the tail is."""

    prices: tuple[float, ...]
    tail_s: float
    iterations: int


Ranking = Callable[[Item, Sequence[float]], float]
"""An item's place in the greedy order, the largest first."""


def keep_requests(problem: LadderProblem, solver: str) -> Result[Kept]:
    """The requests that move, by the solver called so. Raises SpecError for values beyond what a double holds."""
    total = sum(item.value_us for item in problem.items)
    if total >= MAX_VALUE:
        raise SpecError(f"values of {total} us cannot be summed exactly, at most {MAX_VALUE - 1}")
    room = _room(problem)
    short = min(range(len(room)), key=lambda index: room[index], default=None)
    if short is not None and room[short] < 0:
        return Result(None, "infeasible", certificate={"kind": "due", "resource": problem.resources[short].name})
    if all(weights.is_due for weights in problem.weights) and _fits(problem.items, room):
        kept = Kept(tuple(item.name for item in problem.items))
        return Result(kept, "optimal", total, total, {"kind": "all_fit", "requests": len(problem.items)})
    relaxed = _relax(problem)
    chosen = SELECTORS[solver](problem, relaxed.prices)
    objective = sum(item.value_us for item in chosen)
    bound = min(total, price_bound(problem, relaxed.prices))
    names = {item.name for item in chosen}
    return Result(
        Kept(tuple(item.name for item in problem.items if item.name in names)),
        "optimal" if objective == bound else "feasible",
        objective=objective,
        bound=bound,
        certificate=_certificate(problem, relaxed.prices),
        statistics={
            "requests": len(problem.items),
            "kept": len(chosen),
            "iterations": relaxed.iterations,
            "tail_s": round(relaxed.tail_s, 6),
        },
    )


def price_bound(problem: LadderProblem, prices: Sequence[float]) -> int:
    """No choice of requests is worth more, whatever the (non-negative) prices: weak duality in whole numbers."""
    exact = [int(price * PRICE_PARTS) for price in prices]
    worth = sum(price * left for price, left in zip(exact, _room(problem), strict=True))
    # What may come after T- escapes the prices of ports; only what does not come back binds it.
    escapes = [resource.rate_per_s is not None for resource in problem.resources]
    for item in problem.items:
        price = sum(exact[i] * amount for i, amount in item.uses if not (item.lasting and escapes[i]))
        worth += max(0, item.value_us * PRICE_PARTS - price)
    return worth // PRICE_PARTS


def by_price(problem: LadderProblem, prices: Sequence[float]) -> tuple[Item, ...]:
    """Greedy by reduced value, or longest first where that keeps more."""
    priced = _greedy(problem, prices, _reduced_value)
    return max(priced, longest_first(problem, prices), key=_value_of)


def longest_first(problem: LadderProblem, prices: Sequence[float]) -> tuple[Item, ...]:
    """Greedy by length alone: SpotServe keeps the batches with most progress. A yardstick."""
    return _greedy(problem, prices, lambda item, _: item.length)


SELECTORS: dict[str, Callable[[LadderProblem, Sequence[float]], tuple[Item, ...]]] = {
    "priced": by_price,
    "longest_first": longest_first,
}


def _value_of(items: Iterable[Item]) -> int:
    return sum(item.value_us for item in items)


def _reduced_value(item: Item, prices: Sequence[float]) -> float:
    """Value above price for each unit of what the item takes."""
    price = sum(prices[index] * amount for index, amount in item.uses)
    return (item.value_us - price) / max(1, max((amount for _, amount in item.uses), default=1))


def _greedy(problem: LadderProblem, prices: Sequence[float], rank: Ranking) -> tuple[Item, ...]:
    """Every item that still fits, in order of rank, then length, then name."""
    room = _room(problem)
    order = sorted(problem.items, key=lambda item: (-rank(item, prices), -item.length, item.name))
    chosen = []
    for item in order:
        # A lasting item that does not pass the ports in time passes them later.
        ports = [(i, n) for i, n in item.uses if problem.resources[i].rate_per_s is not None]
        fixed = [(i, n) for i, n in item.uses if problem.resources[i].rate_per_s is None]
        in_time = all(amount <= room[index] for index, amount in ports)
        if not all(amount <= room[index] for index, amount in fixed) or not (in_time or item.lasting):
            continue
        chosen.append(item)
        for index, amount in (*fixed, *(ports if in_time else ())):
            room[index] -= amount
    return tuple(chosen)


def _room(problem: LadderProblem) -> list[int]:
    """What weights that are due leave of each resource."""
    room = [resource.capacity for resource in problem.resources]
    for weights in problem.weights:
        for index in weights.uses if weights.is_due else ():
            room[index] -= weights.num_bytes
    return room


def _fits(items: Iterable[Item], room: Sequence[int]) -> bool:
    left = list(room)
    for item in items:
        for index, amount in item.uses:
            left[index] -= amount
    return min(left, default=0) >= 0


class _Program:
    """Rows and columns of the LP, in the LP's units: shares of `LP_VALUE`, MiB or pieces of resources."""

    def __init__(self, problem: LadderProblem) -> None:
        self.problem = problem
        self.value_us = max(1, _value_of(problem.items)) / LP_VALUE
        self.scale = [1 if resource.rate_per_s is None else MIB for resource in problem.resources]
        num = len(problem.resources)
        self.capacity = [max(0, r.capacity) / s for r, s in zip(problem.resources, self.scale, strict=True)]
        # Rows: each resource until T-; each resource after it; each instance's storage; each item at most once.
        self.later, self.storage = num, 2 * num
        self.once = 2 * num + len(problem.storage_per_s)
        self.rows: list[int] = []
        self.columns: list[int] = []
        self.entries: list[float] = []
        self.lost: list[float] = []
        self.upper: list[float | None] = []
        self.covers: list[tuple[int, int]] = []
        for number, item in enumerate(problem.items):
            self._item(number, item)
        for number, weights in enumerate(problem.weights):
            self._weights(number, weights)
        self.tail = self._column(0.0, None)
        for index, resource in enumerate(problem.resources):
            self._enter(self.later + index, self.tail, -(resource.rate_per_s or 0) / self.scale[index])
        for index, rate in enumerate(problem.storage_per_s):
            self._enter(self.storage + index, self.tail, -rate / MIB)

    def _column(self, value: float, upper: float | None) -> int:
        self.lost.append(-value)
        self.upper.append(upper)
        return len(self.lost) - 1

    def _enter(self, row: int, column: int, entry: float) -> None:
        self.rows.append(row)
        self.columns.append(column)
        self.entries.append(entry)

    def _item(self, number: int, item: Item) -> None:
        """A share that moves until T-, and one that moves later if survivors hold it."""
        for later in (False, True) if item.lasting else (False,):
            column = self._column(item.value_us / self.value_us, 1.0)
            for index, amount in item.uses:
                returns = self.problem.resources[index].rate_per_s is not None
                self._enter(index + (self.later if later and returns else 0), column, amount / self.scale[index])
            self._enter(self.once + number, column, 1.0)

    def _weights(self, number: int, weights: Weights) -> None:
        """MiB until T-, later, and from storage: together all of them."""
        ways = [list(weights.uses)]
        if weights.storage is not None:
            ways.append([self.storage + weights.storage])
        if weights.lasting:
            ways.append([self.later + index for index in weights.uses])
        for rows in ways:
            column = self._column(0.0, None)
            for row in rows:
                self._enter(row, column, 1.0)
            self.covers.append((number, column))

    def solve(self, objective: Sequence[float], *, most_lost: float | None = None) -> Any:
        """HiGHS' dual simplex; `most_lost` bounds stage 1's objective."""
        limits = [*self.capacity, *([0.0] * (self.once - self.later)), *([1.0] * len(self.problem.items))]
        entries, rows, columns = list(self.entries), list(self.rows), list(self.columns)
        if most_lost is not None:
            entries += self.lost
            rows += [len(limits)] * len(self.lost)
            columns += range(len(self.lost))
            limits.append(most_lost)
        matrix = sparse.csr_array((entries, (rows, columns)), shape=(len(limits), len(self.lost)))
        covers = sparse.csr_array(
            ([1.0] * len(self.covers), ([n for n, _ in self.covers], [c for _, c in self.covers])),
            shape=(len(self.problem.weights), len(self.lost)),
        )
        answer = linprog(
            objective,
            A_ub=matrix,
            b_ub=limits,
            A_eq=covers if self.problem.weights else None,
            b_eq=[weights.num_bytes / MIB for weights in self.problem.weights] or None,
            bounds=[(0.0, upper) for upper in self.upper],
            method="highs-ds",
        )
        assert answer.status == 0, f"the LP has an answer, as nothing need move: {answer.message}"
        return answer


def _relax(problem: LadderProblem) -> _Relaxed:
    """Both stages; the second only where something can come late."""
    program = _Program(problem)
    first = program.solve(program.lost)
    prices = tuple(
        max(0.0, -float(dual)) * program.value_us / scale
        for dual, scale in zip(first.ineqlin.marginals[: len(problem.resources)], program.scale, strict=True)
    )
    iterations, tail_s = int(first.nit), 0.0
    if problem.weights or any(item.lasting for item in problem.items):
        objective = [float(column == program.tail) for column in range(len(program.lost))]
        second = program.solve(objective, most_lost=float(first.fun) + LOSS_SLACK)
        iterations, tail_s = iterations + int(second.nit), max(0.0, float(second.fun))
    return _Relaxed(prices, tail_s, iterations)


def _certificate(problem: LadderProblem, prices: Sequence[float]) -> Mapping[str, str | int | float]:
    """The resources that are short, with the value of one MiB (a port) or one piece more of each."""
    costly = sorted(
        (-price * resource.capacity, resource.name, price, resource.rate_per_s is None)
        for price, resource in zip(prices, problem.resources, strict=True)
        if price > 0
    )
    proof: dict[str, str | int | float] = {"kind": "prices"}
    for _, name, price, is_counted in costly[:CERTIFIED_PRICES]:
        proof[f"{name} us/{'each' if is_counted else 'MiB'}"] = round(price * (1 if is_counted else MIB), 3)
    return proof
