"""Synthetic arrivals: a renewal process of Gamma gaps whose coefficient of variation is what it says.

The request files of the SpotServe artifact are called `cv6` and have a CV below 0.1: its generator draws Gamma(shape =
1000/(rate c), scale = c ms), whose CV is sqrt(c rate / 1000). A CV of c takes shape 1/c² and scale c²/rate, here.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

from spotserve.errors import SpecError
from spotserve.sim.workloads.lengths import Lengths
from spotserve.sim.workloads.rate_curve import RateCurve
from spotserve.sim.workloads.workload import MAX_ARRIVALS, MAX_SECONDS, Arrival, Workload

MAX_CV = 100.0


def synthetic(
    rate: RateCurve,
    lengths: Lengths,
    *,
    cv: float = 1.0,
    duration_s: float,
    seed: int,
    name: str | None = None,
) -> Workload:
    """Requests from 0 until `duration_s`, their gaps Gamma of coefficient of variation `cv` (1: Poisson, 0: even).

    Under a rate that moves, the process runs in operational time, the integral of the rate, where its rate is 1. It is
    stationary: it has begun long before 0, so the expected number of requests is that integral for every `cv`.

    Args:
        rate: requests per second over time.
        lengths: how long they are.
        cv: coefficient of variation of the gaps in operational time.
        duration_s: how long.
        seed: what it is drawn with; the same seed gives the same workload.
        name: what it is called; made of rate, cv and seed if not given.

    Raises:
        SpecError: a value out of its bounds, or more requests than a workload may have.
    """
    if not 0 <= cv <= MAX_CV:
        raise SpecError(f"cv {cv:g} is not between 0 and {MAX_CV:g}")
    if not 0 < duration_s <= MAX_SECONDS:
        raise SpecError(f"duration_s {duration_s:g} is not between 0 and {MAX_SECONDS:g}")
    if rate.expected(duration_s) > MAX_ARRIVALS:
        raise SpecError(
            f"{rate.expected(duration_s):.0f} requests in {duration_s:g} s exceed {MAX_ARRIVALS}",
            hint="a lower rate or a shorter time",
        )
    # Times and lengths have streams of their own: other lengths leave the times as they are.
    times, drawn = random.Random(f"{seed}:times"), random.Random(f"{seed}:lengths")
    arrivals = tuple(Arrival(at_s, *lengths.draw(drawn)) for at_s in _times(rate, cv, duration_s, times))
    if not arrivals:
        raise SpecError(f"no request arrives within {duration_s:g} s at {rate.told}", hint="another seed, or longer")
    return Workload(
        name=name or f"gamma-cv{cv:g}-seed{seed}",
        source=f"synthetic, {rate.told}, Gamma gaps of CV {cv:g}, seed {seed}",
        arrivals=arrivals,
        notes=(f"lengths: {lengths.told}",),
    )


def _times(rate: RateCurve, cv: float, duration_s: float, rng: random.Random) -> Iterator[float]:
    count = last_s = 0.0
    for number, gap in enumerate(_gaps(cv, rng)):
        count += gap
        # Rounding can put the later of two counts that are almost equal before the earlier one.
        last_s = at_s = max(last_s, rate.reached_s(count))
        if at_s >= duration_s:
            return
        if number >= 2 * MAX_ARRIVALS:
            raise SpecError(f"more than {2 * MAX_ARRIVALS} requests were drawn", hint="a lower rate or another seed")
        yield at_s


def _gaps(cv: float, rng: random.Random) -> Iterator[float]:
    """Gaps of mean 1; the first one is what is left of a gap that has begun before."""
    if cv == 0:
        yield rng.random()
        while True:
            yield 1.0
    shape, scale = 1 / (cv * cv), cv * cv
    # A moment falls into a gap with a chance that grows with its length: Gamma(shape + 1), somewhere inside it.
    yield rng.gammavariate(shape + 1, scale) * rng.random()
    while True:
        yield rng.gammavariate(shape, scale)
