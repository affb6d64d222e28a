"""Fleet: how many instances to hold in which zone and market, so that enough are left with a wanted probability.

A zone fails as a whole, with its hazard, apart from the others; of the spot instances of a living zone a share
(attrition) is gone too. `hedge` is the penalty LP: minimise price + lambda * E[shortfall] over all failures of zones.
Lambda is bisected between its extremes until every efficient mix is known; each is rounded up, its probability counted
exactly, and the cheapest that reaches the quantile is taken. A small fleet is tried out whole.

The bound is the LP's: whoever has enough with probability q expects to miss at most (1 - q) of the need, so that
price + lambda * E[shortfall] - lambda * (1 - q) * need is never more than the price, whatever lambda is.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from math import ceil, floor, prod

import numpy as np
from scipy import sparse
from scipy.optimize import linprog

from spotserve.errors import SpecError
from spotserve.solvers.paper.fleet import CANDIDATE_POOL, alloc_free
from spotserve.solvers.result import Result

PPM = 1_000_000
"""Shares and probabilities are whole parts per million."""

MAX_ZONES = 10
"""2^Z failures are enumerated."""

MAX_NEED = 100_000
"""Instances; what is left of them is counted in millionths, in 64 bits."""

MAX_MIXES = 5_000
"""Fleets that are tried out one by one before the LP is asked."""

MAX_ROUNDS = 200
"""LPs that are solved at most; two for each efficient mix."""

MAX_PENALTY = 1e4
"""The largest lambda, in on-demand prices; prices beside a larger one would be within the LP solver's tolerance."""

LP_TOLERANCE = 1e-6
"""What a bound gives up, as a share, for the LP solver's tolerance."""


@dataclass(frozen=True, slots=True)
class Zone:
    """One spot market: price in micro-USD an hour, chance to fail and share lost in parts per million, most to have.

    `held` are the instances there that count as ours: newly allocated ones do, those under notice do not.
    """

    name: str
    price: int
    failure_ppm: int
    attrition_ppm: int = 0
    most: int = 1_000
    held: int = 0


@dataclass(frozen=True, slots=True)
class FleetProblem:
    """`need` instances shall be left with probability `quantile_ppm`; on-demand ones do not fail."""

    need: int
    zones: tuple[Zone, ...]
    on_demand_price: int
    quantile_ppm: int
    on_demand_held: int = 0
    pool: int = CANDIDATE_POOL


@dataclass(frozen=True, slots=True)
class Fleet:
    """Instances to hold, by zone and on demand."""

    spot: tuple[int, ...]
    on_demand: int


@dataclass(frozen=True, slots=True)
class FleetChange:
    """What to request and to give back, by zone and on demand, and the fleet that this aims at."""

    target: Fleet
    request_spot: tuple[int, ...]
    request_on_demand: int
    free_spot: tuple[int, ...]
    free_on_demand: int


@dataclass(frozen=True, slots=True)
class _Mix:
    """A solution of the penalty LP at one lambda."""

    amounts: tuple[float, ...]
    price: float
    shortfall: float


def decide_fleet(problem: FleetProblem, solver: str) -> Result[FleetChange]:
    """What to request and free, by the solver called so. Raises SpecError for a problem beyond its limits."""
    _check(problem)
    return FLEETS[solver](problem)


def hedge(problem: FleetProblem) -> Result[FleetChange]:
    """The cheapest fleet that keeps `need` with the wanted probability; proven for small ones."""
    odds = _Odds(problem)
    whole = prod(min(zone.most, problem.need) + 1 for zone in problem.zones)
    is_small = whole <= MAX_MIXES and not any(zone.attrition_ppm for zone in problem.zones)
    if is_small:
        fleet = _cheapest(problem, odds, _every_fleet(problem, odds))
        price = bound = price_of(problem, fleet)
    else:
        mixes, tried = _efficient_mixes(problem, odds)
        fleet, whole = _cheapest(problem, odds, _rounded(problem, odds, mixes)), len(tried)
        price = price_of(problem, fleet)
        miss = (PPM - problem.quantile_ppm) / PPM * problem.need
        least = max(mix.price + penalty * (mix.shortfall - miss) for penalty, mix in tried)
        bound = min(price, max(0, floor(least * (1 - LP_TOLERANCE))))
    return Result(
        _change(problem, fleet),
        "optimal" if bound == price else "feasible",
        objective=price,
        bound=bound,
        certificate={"kind": "every_fleet" if is_small else "penalty_lp", "available": odds.share(fleet)},
        statistics={"rounds": whole, "zones": len(problem.zones)},
    )


def as_published(problem: FleetProblem) -> Result[FleetChange]:
    """Algorithm 1, lines 6 to 9: request on-demand and spot at once, free on-demand first, keep a candidate pool."""
    if len(problem.zones) != 1:
        raise SpecError(f"the paper's fleet knows one spot market, not {len(problem.zones)}", hint="use fleet=hedge")
    (zone,) = problem.zones
    change = alloc_free(problem.need, spot=zone.held, on_demand=problem.on_demand_held, pool=problem.pool)
    target = Fleet(
        (zone.held + change.request_spot - change.free_spot,),
        problem.on_demand_held + change.request_on_demand - change.free_on_demand,
    )
    price = price_of(problem, target)
    return Result(
        FleetChange(
            target,
            (change.request_spot,),
            change.request_on_demand,
            (change.free_spot,),
            change.free_on_demand,
        ),
        "feasible",
        objective=price,
        bound=0,
        certificate={"kind": "none", "available": _Odds(problem).share(target)},
    )


FLEETS: dict[str, Callable[[FleetProblem], Result[FleetChange]]] = {"hedge": hedge, "paper": as_published}


def price_of(problem: FleetProblem, fleet: Fleet) -> int:
    """Micro-USD an hour."""
    spot = sum(zone.price * count for zone, count in zip(problem.zones, fleet.spot, strict=True))
    return spot + problem.on_demand_price * fleet.on_demand


def available(problem: FleetProblem, fleet: Fleet) -> Fraction:
    """The exact probability that `need` instances are left."""
    odds = _Odds(problem)
    return Fraction(odds.available(fleet), odds.whole)


def _check(problem: FleetProblem) -> None:
    if len(problem.zones) > MAX_ZONES:
        raise SpecError(f"{len(problem.zones)} zones exceed {MAX_ZONES}", hint="leave out the dearest")
    if not 0 <= problem.quantile_ppm <= PPM:
        raise SpecError(f"quantile {problem.quantile_ppm} ppm is not within 0 and {PPM}")
    for zone in problem.zones:
        if not (0 <= zone.failure_ppm <= PPM and 0 <= zone.attrition_ppm < PPM):
            raise SpecError(f"zone {zone.name}: a hazard is not within 0 and {PPM} ppm")
    if problem.need > MAX_NEED:
        raise SpecError(f"need {problem.need} exceeds {MAX_NEED}")
    if problem.need < 0 or min([problem.on_demand_price, *(zone.price for zone in problem.zones)]) < 0:
        raise SpecError("need and prices are not negative")


class _Odds:
    """Every set of failed zones, its chance in whole parts of `whole`, and what is left of a fleet then."""

    def __init__(self, problem: FleetProblem) -> None:
        self.problem = problem
        self.failed = list(itertools.product((False, True), repeat=len(problem.zones)))
        self.whole: int = PPM ** len(problem.zones)
        self.chances = [
            prod(z.failure_ppm if gone else PPM - z.failure_ppm for z, gone in zip(problem.zones, failed, strict=True))
            for failed in self.failed
        ]
        shape = (len(self.failed), len(problem.zones))
        lasting = np.array([PPM - zone.attrition_ppm for zone in problem.zones], dtype=np.int64)
        self._left = np.where(np.array(self.failed, dtype=bool).reshape(shape), 0, lasting)

    def left_ppm(self, spot: tuple[int, ...]) -> list[int]:
        """Spot instances left in each case, in millionths."""
        left: list[int] = (self._left @ np.array(spot, dtype=np.int64)).tolist()
        return left

    def available(self, fleet: Fleet) -> int:
        """The chance that enough are left, in parts of `whole`."""
        least = (self.problem.need - fleet.on_demand) * PPM
        return sum(c for c, left in zip(self.chances, self.left_ppm(fleet.spot), strict=True) if left >= least)

    def share(self, fleet: Fleet) -> float:
        """The same as a share of 1."""
        return self.available(fleet) / self.whole

    def suffices(self, chance: int) -> bool:
        """Whether a chance reaches the quantile."""
        return chance * PPM >= self.problem.quantile_ppm * self.whole


def _cheapest(problem: FleetProblem, odds: _Odds, fleets: Iterator[Fleet]) -> Fleet:
    """The cheapest that reaches the quantile, then the one most often enough, then with most on demand.

    `need` on demand always does.
    """
    best = Fleet((0,) * len(problem.zones), problem.need)
    best_key = (price_of(problem, best), -odds.available(best), -best.on_demand, best.spot)
    for fleet in fleets:
        price = price_of(problem, fleet)
        if price > best_key[0] or not odds.suffices(chance := odds.available(fleet)):
            continue
        key = (price, -chance, -fleet.on_demand, fleet.spot)
        if key < best_key:
            best, best_key = fleet, key
    return best


def _every_fleet(problem: FleetProblem, odds: _Odds) -> Iterator[Fleet]:
    """Every spot mix with the fewest on demand that reach the quantile; no zone gains from more than `need`."""
    for spot in itertools.product(*(range(min(zone.most, problem.need) + 1) for zone in problem.zones)):
        lacking = [problem.need - left // PPM for left in odds.left_ppm(spot)]
        chance = 0
        for on_demand, part in sorted(zip(lacking, odds.chances, strict=True)):
            chance += part
            if odds.suffices(chance):
                yield Fleet(spot, max(0, on_demand))
                break


def _rounded(problem: FleetProblem, odds: _Odds, mixes: list[_Mix]) -> Iterator[Fleet]:
    """Each mix rounded up that reaches the quantile, without what its probability does not need."""
    for mix in mixes:
        counts = [ceil(round(amount, 6)) for amount in mix.amounts]
        fleet = Fleet(tuple(counts[:-1]), counts[-1])
        if odds.suffices(odds.available(fleet)):
            yield _trimmed(problem, odds, fleet)


def _trimmed(problem: FleetProblem, odds: _Odds, fleet: Fleet) -> Fleet:
    """The same chance for less: the dearest instance that adds none goes first."""
    chance = odds.available(fleet)
    while True:
        fewer = [Fleet(fleet.spot, fleet.on_demand - 1)] if fleet.on_demand else []
        fewer += [
            Fleet((*fleet.spot[:i], count - 1, *fleet.spot[i + 1 :]), fleet.on_demand)
            for i, count in enumerate(fleet.spot)
            if count
        ]
        as_good = [smaller for smaller in fewer if odds.available(smaller) >= chance]
        if not as_good:
            return fleet
        fleet = min(as_good, key=lambda smaller: price_of(problem, smaller))


def _efficient_mixes(problem: FleetProblem, odds: _Odds) -> tuple[list[_Mix], list[tuple[float, _Mix]]]:
    """Every vertex of the front of price against expected shortfall, and each lambda tried with its solution.

    Between two neighbours the lambda at which they cost the same either shows a mix between them or that there is none.
    """
    program = _Program(problem, odds)
    ends = [program.solve(0.0), program.solve(MAX_PENALTY * max(1, problem.on_demand_price))]
    tried = [(0.0, ends[0])]
    mixes, open_ends = list(ends), [(ends[0], ends[1])]
    while open_ends and len(tried) < MAX_ROUNDS:
        cheap, safe = open_ends.pop(0)
        if cheap.shortfall - safe.shortfall < 1e-9:
            continue
        penalty = (safe.price - cheap.price) / (cheap.shortfall - safe.shortfall)
        mix = program.solve(penalty)
        tried.append((penalty, mix))
        level = cheap.price + penalty * cheap.shortfall
        if mix.price + penalty * mix.shortfall < level - 1e-7 * (1.0 + abs(level)):
            mixes.append(mix)
            open_ends += [(cheap, mix), (mix, safe)]
    return mixes, tried


class _Program:
    """The penalty LP: amounts by zone and on demand, and the shortfall of each failure."""

    def __init__(self, problem: FleetProblem, odds: _Odds) -> None:
        self.problem = problem
        self.chances = [chance / odds.whole for chance in odds.chances]
        zones, rows = len(problem.zones), len(odds.failed)
        entries = [
            (row, index, -(PPM - zone.attrition_ppm) / PPM)
            for row, failed in enumerate(odds.failed)
            for index, zone in enumerate(problem.zones)
            if not failed[index]
        ]
        entries += [(row, zones, -1.0) for row in range(rows)]
        entries += [(row, zones + 1 + row, -1.0) for row in range(rows)]
        self.prices = [float(zone.price) for zone in problem.zones] + [float(problem.on_demand_price)]
        self.matrix = sparse.csr_array(
            (
                [entry for _, _, entry in entries],
                ([row for row, _, _ in entries], [column for _, column, _ in entries]),
            ),
            shape=(rows, zones + 1 + rows),
        )
        most = [*(zone.most for zone in problem.zones), problem.need]
        self.bounds: list[tuple[float, float | None]] = [(0.0, float(count)) for count in most]
        self.bounds += [(0.0, None)] * rows

    def solve(self, penalty: float) -> _Mix:
        """The cheapest mix at a price of `penalty` for each instance that is expected to miss."""
        scale = max([1.0, *self.prices, penalty])
        objective = [price / scale for price in self.prices] + [penalty / scale * chance for chance in self.chances]
        limits = [-float(self.problem.need)] * len(self.chances)
        answer = linprog(objective, A_ub=self.matrix, b_ub=limits, bounds=self.bounds, method="highs-ds")
        assert answer.status == 0, f"a shortfall is always possible: {answer.message}"
        amounts = [float(value) for value in answer.x[: len(self.prices)]]
        misses = [float(value) for value in answer.x[len(self.prices) :]]
        return _Mix(
            tuple(amounts),
            sum(price * amount for price, amount in zip(self.prices, amounts, strict=True)),
            sum(chance * miss for chance, miss in zip(self.chances, misses, strict=True)),
        )


def _change(problem: FleetProblem, fleet: Fleet) -> FleetChange:
    """From what is held to what shall be."""
    pairs = [(count, zone.held) for count, zone in zip(fleet.spot, problem.zones, strict=True)]
    return FleetChange(
        fleet,
        tuple(max(0, count - held) for count, held in pairs),
        max(0, fleet.on_demand - problem.on_demand_held),
        tuple(max(0, held - count) for count, held in pairs),
        max(0, problem.on_demand_held - fleet.on_demand),
    )
