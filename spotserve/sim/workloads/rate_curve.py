"""How the arrival rate moves over time: piece-wise linear, so that its integral can be inverted exactly."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from spotserve.errors import SpecError

MAX_RPS = 1e6
MAX_POINTS = 100_000
DIURNAL_POINTS = 96
"""Of one period: at a day, a straight piece for every quarter of an hour."""
MAX_PERIODS = MAX_POINTS // DIURNAL_POINTS - 1


@dataclass(frozen=True, slots=True)
class RateCurve:
    """Requests per second between the points (time, rate); constant before the first and behind the last.

    Two points of one time are a step. `told` says what it is, for the notes of a workload.
    """

    points: tuple[tuple[float, float], ...]
    told: str
    _counts: tuple[float, ...] = field(init=False, repr=False, compare=False)
    """Expected requests from 0 until each point."""

    def __post_init__(self) -> None:
        if not 1 <= len(self.points) <= MAX_POINTS:
            raise SpecError(f"a rate of {len(self.points)} points is not one of 1 to {MAX_POINTS}")
        for (before_s, _), (after_s, _) in pairwise(self.points):
            if not before_s <= after_s:
                raise SpecError(f"the rate at {after_s:g} s stands after that at {before_s:g} s", hint="sort them")
        for at_s, rps in self.points:
            if not 0 <= rps <= MAX_RPS or not 0 <= at_s < math.inf:
                raise SpecError(f"rate {rps:g} at {at_s:g} s is not between 0 and {MAX_RPS:g} at 0 s or later")
        counts = [self.points[0][0] * self.points[0][1]]
        for (before_s, before), (after_s, after) in pairwise(self.points):
            counts.append(counts[-1] + (after_s - before_s) * (before + after) / 2)
        object.__setattr__(self, "_counts", tuple(counts))

    def expected(self, until_s: float) -> float:
        """Requests that are expected from 0 until a time: the integral of the rate."""
        first_s, first = self.points[0]
        if until_s <= first_s:
            return until_s * first
        index = bisect_right(self.points, until_s, key=lambda point: point[0]) - 1
        start_s, rps = self.points[index]
        beyond_s = until_s - start_s
        return self._counts[index] + beyond_s * (rps + self._slope(index) * beyond_s / 2)

    def reached_s(self, count: float) -> float:
        """When so many requests are expected to have come; infinite if never."""
        if count <= self._counts[0]:
            first = self.points[0][1]
            return count / first if first > 0 else (0.0 if count == 0 else self.points[0][0])
        index = bisect_right(self._counts, count) - 1
        start_s, rps = self.points[index]
        rest, slope = count - self._counts[index], self._slope(index)
        # The stable root of slope/2 * x² + rps * x = rest.
        root = math.sqrt(max(0.0, rps * rps + 2 * slope * rest))
        return start_s + 2 * rest / (rps + root) if rps + root > 0 else math.inf

    def _slope(self, index: int) -> float:
        if index + 1 == len(self.points):
            return 0.0
        (start_s, before), (stop_s, after) = self.points[index], self.points[index + 1]
        return (after - before) / (stop_s - start_s) if stop_s > start_s else 0.0


def constant(rps: float) -> RateCurve:
    """Always the same rate."""
    return RateCurve(((0.0, rps),), f"{rps:g} requests per second")


def scaled(curve: RateCurve, *, mean_rps: float, duration_s: float) -> RateCurve:
    """The same curve at another height: so much on average from 0 until `duration_s`.

    Raises:
        SpecError: the curve is 0 all that time.
    """
    mean = curve.expected(duration_s) / duration_s
    if mean <= 0:
        raise SpecError(f"{curve.told}: no request within {duration_s:g} s, so no mean of {mean_rps:g} per second")
    factor = mean_rps / mean
    points = tuple((at_s, rps * factor) for at_s, rps in curve.points)
    return RateCurve(points, f"{curve.told}, times {factor:.6g}: {mean_rps:g} on average of {duration_s:g} s")


def ramp(start_rps: float, stop_rps: float, *, duration_s: float) -> RateCurve:
    """A straight line from one rate to another, which then stays."""
    return RateCurve(
        ((0.0, start_rps), (duration_s, stop_rps)),
        f"{start_rps:g} to {stop_rps:g} requests per second within {duration_s:g} s",
    )


def diurnal(
    mean_rps: float, *, swing: float, period_s: float = 86_400.0, peak_s: float | None = None, periods: int = 31
) -> RateCurve:
    """A sine around a mean, as days have it; after so many periods the last rate stays.

    Args:
        mean_rps: mean rate.
        swing: by how much of the mean the peak lies above it, 0 to 1.
        period_s: one day, or less for a quick one.
        peak_s: when the first peak is; the middle of the first period if not given.
        periods: for how many of them.
    """
    if not 0 <= swing <= 1 or not 0 < period_s < math.inf:
        raise SpecError(f"swing {swing:g} is not between 0 and 1, or period_s {period_s:g} is not above 0")
    if not 1 <= periods <= MAX_PERIODS:
        raise SpecError(f"{periods} periods of {period_s:g} s are not 1 to {MAX_PERIODS}", hint="a longer period_s")
    peak_s = period_s / 2 if peak_s is None else peak_s
    # Chords of a sine lie below its peaks and above its valleys alike: over a period the mean is exact.
    points = tuple(
        (at_s, max(0.0, mean_rps * (1 + swing * math.cos(2 * math.pi * (at_s - peak_s) / period_s))))
        for at_s in (index * period_s / DIURNAL_POINTS for index in range(periods * DIURNAL_POINTS + 1))
    )
    return RateCurve(
        points, f"{mean_rps:g} requests per second ± {swing:g} of it, period {period_s:g} s, peak at {peak_s:g} s"
    )


def steps(rates: Sequence[float], *, step_s: float) -> RateCurve:
    """One rate for each `step_s` seconds; the last one stays."""
    if not rates or not 0 < step_s < math.inf:
        raise SpecError(f"{len(rates)} rates for {step_s:g} s each are no steps")
    points = [(0.0, rates[0])]
    for index, (before, after) in enumerate(pairwise(rates), 1):
        points += [(index * step_s, before), (index * step_s, after)]
    return RateCurve(tuple(points), f"{len(rates)} rates of {min(rates):g} to {max(rates):g}, {step_s:g} s each")
