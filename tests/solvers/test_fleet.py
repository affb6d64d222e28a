"""What to buy: the paper's rule, the chance constraint's toy, brute force for small fleets, and what always holds."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace
from fractions import Fraction

import pytest

from spotserve.cli.config import Origin, parse_solvers
from spotserve.core.options import NOT_IN_PLANS, SOLVER_NAMES
from spotserve.errors import SpecError
from spotserve.solvers.fleet import (
    MAX_MIXES,
    MAX_NEED,
    MAX_ZONES,
    PPM,
    Fleet,
    FleetProblem,
    Zone,
    available,
    decide_fleet,
    price_of,
)
from spotserve.solvers.registry import LIBRARY_SOLVERS, SOLVERS, chosen_solvers


def two_zones(quantile_ppm: int) -> FleetProblem:
    """One instance, two zones at 0.3 that fail one time in ten, on-demand at 1 (golden instance G14)."""
    zones = (Zone("a", 300_000, 100_000), Zone("b", 300_000, 100_000))
    return FleetProblem(1, zones, 1_000_000, quantile_ppm)


def drawn(rng: random.Random, *, num_zones: int, need: int, attrition: bool = False) -> FleetProblem:
    """Any zones and any of three quantiles."""
    zones = tuple(
        Zone(
            f"z{number}",
            rng.randint(250_000, 600_000),
            rng.randint(20_000, 300_000),
            rng.choice([0, 10_000, 50_000]) if attrition else 0,
        )
        for number in range(num_zones)
    )
    return FleetProblem(need, zones, 1_000_000, rng.choice([900_000, 950_000, 990_000]))


def chance_of(problem: FleetProblem, fleet: Fleet) -> Fraction:
    """P(enough are left), by the book."""
    total = Fraction(0)
    for failed in itertools.product((0, 1), repeat=len(problem.zones)):
        chance, left = Fraction(1), Fraction(fleet.on_demand)
        for zone, count, is_gone in zip(problem.zones, fleet.spot, failed, strict=True):
            fails = Fraction(zone.failure_ppm, PPM)
            chance *= fails if is_gone else 1 - fails
            left += 0 if is_gone else count * (1 - Fraction(zone.attrition_ppm, PPM))
        total += chance if left >= problem.need else 0
    return total


def cheapest_price(problem: FleetProblem) -> int:
    """The price of the cheapest fleet that reaches the quantile, by trying all."""
    most = range(problem.need + 2)
    return min(
        price_of(problem, Fleet(spot, on_demand))
        for spot in itertools.product(*(most for _ in problem.zones))
        for on_demand in most
        if chance_of(problem, Fleet(spot, on_demand)) >= Fraction(problem.quantile_ppm, PPM)
    )


def hedged(problem: FleetProblem) -> Fleet:
    """The fleet that `hedge` aims at."""
    answer = decide_fleet(problem, "hedge").answer
    assert answer is not None
    return answer.target


def hedged_price(problem: FleetProblem) -> int:
    """Its price."""
    return price_of(problem, hedged(problem))


def test_chance_constraint() -> None:
    """Tests G14: one in each zone for 0.6 at 95 %, with 99 % in fact; one on demand at 99.5 %."""
    result = decide_fleet(two_zones(950_000), "hedge")
    assert result.answer is not None
    assert (Fleet((1, 1), 0), 600_000, "optimal") == (result.answer.target, result.objective, result.status)
    assert Fraction(99, 100) == available(two_zones(950_000), result.answer.target)
    assert Fleet((0, 0), 1) == hedged(two_zones(995_000))
    assert 1_000_000 == hedged_price(two_zones(995_000))


@pytest.mark.parametrize("num_zones", [0, 1, 2, 3])
def test_small_fleets_against_brute_force(num_zones: int, rng: random.Random) -> None:
    """Tests that small fleets are as cheap as any that reaches the quantile."""
    for _ in range(8 if num_zones < 3 else 4):
        problem = drawn(rng, num_zones=num_zones, need=rng.randint(1, 4))
        result = decide_fleet(problem, "hedge")
        assert result.bound == result.objective == cheapest_price(problem)


def test_penalty_lp_against_brute_force(rng: random.Random) -> None:
    """Tests the LP where it decides: feasible, its bound below the optimum, and often near it."""
    dearer = []
    for _ in range(10):
        problem = drawn(rng, num_zones=2, need=rng.randint(2, 6), attrition=True)
        problem = replace(problem, zones=(replace(problem.zones[0], attrition_ppm=50_000), problem.zones[1]))
        result = decide_fleet(problem, "hedge")
        assert result.answer is not None
        best = cheapest_price(problem)
        assert result.certificate["kind"] == "penalty_lp"
        assert result.bound <= best <= result.objective
        dearer.append(result.objective / best)
    assert sorted(dearer)[5] < 1.35


def test_probability_is_recomputed_exactly(rng: random.Random) -> None:
    """Tests that the integers that are returned reach the quantile, with zones, attrition and LPs of any size."""
    for num_zones, need in ((1, 40), (2, 80), (3, 30), (4, 12), (5, 10)):
        problem = drawn(rng, num_zones=num_zones, need=need, attrition=True)
        fleet = hedged(problem)
        assert chance_of(problem, fleet) == available(problem, fleet) >= Fraction(problem.quantile_ppm, PPM)


def test_a_higher_quantile_costs_more(rng: random.Random) -> None:
    """Tests that the price never falls as the quantile grows, by trying all and by the LP."""
    for num_zones, need, attrition in ((2, 5, False), (3, 6, False), (3, 20, True), (4, 16, True)):
        problem = drawn(rng, num_zones=num_zones, need=need, attrition=attrition)
        quantiles = (500_000, 900_000, 950_000, 990_000, 999_000, PPM)
        prices = [hedged_price(replace(problem, quantile_ppm=quantile)) for quantile in quantiles]
        assert prices == sorted(prices)
        assert price_of(problem, Fleet((0,) * num_zones, need)) >= prices[-1]


def test_dearer_zones_cost_more(rng: random.Random) -> None:
    """Tests that no price that grows makes a proven fleet cheaper, and that doubling all doubles any fleet's price."""
    for _ in range(12):
        problem = drawn(rng, num_zones=3, need=5)
        index = rng.randrange(3)
        dearer = replace(problem.zones[index], price=problem.zones[index].price + rng.randint(1, 400_000))
        zones = (*problem.zones[:index], dearer, *problem.zones[index + 1 :])
        assert hedged_price(replace(problem, zones=zones)) >= hedged_price(problem)
    for num_zones, need in ((3, 5), (4, 16)):
        problem = drawn(rng, num_zones=num_zones, need=need, attrition=True)
        zones = tuple(replace(zone, price=2 * zone.price) for zone in problem.zones)
        doubled = replace(problem, zones=zones, on_demand_price=2 * problem.on_demand_price)
        assert 2 * hedged_price(problem) == hedged_price(doubled)


def test_one_coefficient_changes_the_fleet() -> None:
    """Tests that price, hazard, room and need each change what is bought."""
    problem = two_zones(950_000)
    safe = replace(problem.zones[0], failure_ppm=40_000)
    assert Fleet((1, 0), 0) == hedged(replace(problem, zones=(safe, problem.zones[1])))
    dear = replace(problem.zones[0], price=800_000)
    assert Fleet((0, 0), 1) == hedged(replace(problem, zones=(dear, problem.zones[1])))
    full = replace(problem.zones[0], most=0)
    assert Fleet((0, 0), 1) == hedged(replace(problem, zones=(full, problem.zones[1])))
    assert Fleet((2, 2), 0) == hedged(replace(problem, need=2))


def test_change_is_from_what_is_held() -> None:
    """Tests that what is there already is not requested and what is not wanted is given back."""
    problem = two_zones(950_000)
    zones = (replace(problem.zones[0], held=3), problem.zones[1])
    change = decide_fleet(replace(problem, zones=zones, on_demand_held=1), "hedge").answer
    assert change is not None
    assert ((0, 1), 0, (2, 0), 1) == (
        change.request_spot,
        change.request_on_demand,
        change.free_spot,
        change.free_on_demand,
    )


def test_the_paper_asks_both_markets_at_once() -> None:
    """Tests Algorithm 1's lines 6 to 9 through the same door: both markets asked, on demand freed first, two kept."""
    base = FleetProblem(6, (Zone("any", 300_000, 100_000, held=4),), 1_000_000, 950_000, on_demand_held=1)
    more = decide_fleet(base, "paper").answer
    assert more is not None
    assert ((1,), 1) == (more.request_spot, more.request_on_demand)
    less = decide_fleet(replace(base, need=1), "paper").answer
    assert less is not None
    assert ((1,), 1, (0,), 0) == (less.free_spot, less.free_on_demand, less.request_spot, less.request_on_demand)
    with pytest.raises(SpecError, match="knows one spot market, not 2"):
        decide_fleet(two_zones(950_000), "paper")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"zones": tuple(Zone(f"z{n}", 1, 1) for n in range(MAX_ZONES + 1))}, "zones exceed"),
        ({"quantile_ppm": PPM + 1}, "quantile"),
        ({"zones": (Zone("a", 1, PPM + 1),)}, "zone a: a hazard"),
        ({"zones": (Zone("a", -1, 1),)}, "not negative"),
        ({"need": MAX_NEED + 1}, "exceeds"),
    ],
)
def test_problems_beyond_its_limits_are_refused(changes: dict[str, object], message: str) -> None:
    """Tests the guards of 2^Z failures, probabilities and 64-bit counts."""
    with pytest.raises(SpecError, match=message):
        decide_fleet(replace(two_zones(950_000), **changes), "hedge")  # type: ignore[arg-type]


def test_certain_zones() -> None:
    """Tests that zones which always or never fail are no special case."""
    never, always = Zone("never", 300_000, 0), Zone("always", 1, PPM)
    assert Fleet((4, 0), 0) == hedged(FleetProblem(4, (never, always), 1_000_000, PPM))
    assert Fleet((0,), 4) == hedged(FleetProblem(4, (always,), 1_000_000, 1))
    assert (4 + 1) ** 2 <= MAX_MIXES


def test_fleet_is_no_solver_of_plans() -> None:
    """Tests that asking a plan or a daemon for it is refused with the reason, not silently ignored."""
    assert SOLVERS.keys().isdisjoint(LIBRARY_SOLVERS)
    assert SOLVER_NAMES.keys().isdisjoint(LIBRARY_SOLVERS)
    assert LIBRARY_SOLVERS.keys() == NOT_IN_PLANS.keys()
    with pytest.raises(SpecError, match="decides what to buy"):
        chosen_solvers({"fleet": "hedge"})
    with pytest.raises(SpecError, match="--solver fleet decides what to buy"):
        parse_solvers("fleet=hedge", Origin("--solver"))
