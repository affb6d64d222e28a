"""Workloads drawn from a seed, their rates and lengths, and the ways to change one."""

from __future__ import annotations

import math
import random
import statistics

import pytest

from spotserve.errors import SpecError
from spotserve.sim.workloads import (
    Arrival,
    EmpiricalLengths,
    FixedLengths,
    Lengths,
    LognormalLengths,
    RateCurve,
    UniformLengths,
    Workload,
    at_rate,
    clipped,
    constant,
    diurnal,
    lengths_of,
    our_requests,
    ramp,
    scaled,
    steps,
    synthetic,
    thinned,
    window,
    with_lengths,
    workload_json,
)

FIXED = FixedLengths()
SMALL = Workload("small", "made up", tuple(Arrival(float(at_s), 10 * at_s + 10, at_s + 1) for at_s in range(10)))


@pytest.mark.parametrize("cv", [0.0, 0.5, 1.0, 2.0, 6.0])
def test_the_cv_is_true(seed: int, cv: float) -> None:
    """Tests that 100 000 gaps have the coefficient of variation that was asked for, within a tenth."""
    workload = synthetic(constant(1000.0), FIXED, cv=cv, duration_s=100.0, seed=seed)
    assert 85_000 < len(workload.arrivals) < 115_000
    assert math.isclose(cv, workload.cv, rel_tol=0.1, abs_tol=1e-9)


def test_gaps_of_the_published_generator_would_fail(seed: int) -> None:
    """Tests that the test above can fail: the artifact's own Gamma parameters give a CV far below 6."""
    rng, rate_rps, asked = random.Random(seed), 0.35, 6
    gaps = [rng.gammavariate(1000 / (rate_rps * asked), asked) / 1000 for _ in range(10_000)]
    assert math.isclose(1 / rate_rps, statistics.mean(gaps), rel_tol=0.05)
    assert statistics.stdev(gaps) / statistics.mean(gaps) < 0.06


@pytest.mark.parametrize("cv", [0.0, 1.0, 6.0])
def test_as_many_come_as_are_expected(cv: float) -> None:
    """Tests that over many seeds the mean number of requests is rate times duration, however bursty."""

    def count(seed: int) -> int:
        try:
            return len(synthetic(constant(0.35), FIXED, cv=cv, duration_s=400, seed=seed).arrivals)
        except SpecError:  # The first gap may be longer than all of it.
            return 0

    counts = [count(seed) for seed in range(1000)]
    # A process that begins with a whole gap has (cv² - 1) / 2 requests too many or too few: 17.5 of 140 at a CV of 6.
    # The count of a renewal process has variance cv² times its mean.
    assert abs(statistics.mean(counts) - 140) < 3.5 * cv * math.sqrt(140 / 1000) + 0.5


CURVES = [
    constant(2.0),
    ramp(0.0, 4.0, duration_s=600.0),
    ramp(4.0, 0.5, duration_s=300.0),
    diurnal(2.0, swing=0.9, period_s=500.0),
    diurnal(2.0, swing=1.0, period_s=400.0, peak_s=0.0),
    steps([1.0, 0.0, 5.0, 0.5], step_s=150.0),
    RateCurve(((100.0, 1.0), (200.0, 3.0), (200.0, 0.0), (300.0, 0.0), (400.0, 2.0)), "by hand"),
]


@pytest.mark.parametrize("curve", CURVES, ids=lambda curve: curve.told)
def test_rates_are_inverted_exactly(curve: RateCurve) -> None:
    """Tests that the time at which so many requests are expected is where the integral of the rate is that number."""
    total = curve.expected(590.0)
    for part in range(1, 200):
        count = total * part / 200
        at_s = curve.reached_s(count)
        assert math.isclose(count, curve.expected(at_s), rel_tol=1e-9), part
    times = [curve.reached_s(total * part / 200) for part in range(200)]
    assert sorted(times) == times


@pytest.mark.parametrize("curve", CURVES, ids=lambda curve: curve.told)
def test_integral_is_that_of_the_points(curve: RateCurve) -> None:
    """Tests the expected count against a sum over small steps of the interpolated rate."""

    def rate(at_s: float) -> float:
        before = [point for point in curve.points if point[0] <= at_s]
        after = [point for point in curve.points if point[0] > at_s]
        if not before or not after:
            return (before[-1] if before else after[0])[1]
        (start_s, low), (stop_s, high) = before[-1], after[0]
        return low + (high - low) * (at_s - start_s) / (stop_s - start_s)

    summed = math.fsum(rate(index + 0.5) for index in range(600))
    assert math.isclose(summed, curve.expected(600.0), rel_tol=2e-3)


def test_a_rate_that_ends_never_reaches_more() -> None:
    """Tests that a count that a silent rate cannot bring is never reached, and nothing arrives after the silence."""
    curve = steps([1.0, 0.0], step_s=10.0)
    assert math.inf == curve.reached_s(10.5)
    assert synthetic(curve, FIXED, duration_s=1000.0, seed=0).duration_s <= 10.0


def test_a_scaled_curve_has_its_mean() -> None:
    """Tests that a curve keeps its shape at another height, by its mean over a time; one that is 0 has no height."""
    curve = scaled(ramp(1.0, 3.0, duration_s=100.0), mean_rps=10.0, duration_s=50.0)
    assert 500.0 == pytest.approx(curve.expected(50.0))
    assert 3.0 == pytest.approx(curve.points[1][1] / curve.points[0][1])
    assert "10 on average of 50 s" in curve.told
    with pytest.raises(SpecError, match="no mean of 2 per second"):
        scaled(steps([0.0, 5.0], step_s=60.0), mean_rps=2.0, duration_s=60.0)


def test_a_swing_has_as_many_periods_as_it_is_told() -> None:
    """Tests that a rate goes on swinging through its periods and stays after them; too many are refused."""
    curve = diurnal(2.0, swing=0.5, period_s=10.0, periods=40)
    assert 800.0 == pytest.approx(curve.expected(400.0))
    assert 1.0 == pytest.approx(curve.points[-1][1])
    with pytest.raises(SpecError, match="2000 periods of 10 s are not 1 to 1040"):
        diurnal(2.0, swing=0.5, period_s=10.0, periods=2000)


def test_diurnal_peaks_where_it_says() -> None:
    """Tests that the hours about the peak bring more than those about the valley, and a day its mean."""
    curve = diurnal(1.0, swing=0.8, peak_s=6 * 3600.0)
    peak = curve.expected(7 * 3600.0) - curve.expected(5 * 3600.0)
    valley = curve.expected(19 * 3600.0) - curve.expected(17 * 3600.0)
    assert math.isclose(1.8 / 0.2, peak / valley, rel_tol=0.1)
    assert math.isclose(86_400.0, curve.expected(86_400.0), rel_tol=1e-3)
    noon = diurnal(1.0, swing=0.8)
    assert max(noon.points[:97], key=lambda point: point[1])[0] == 43_200.0


def test_bursts_follow_the_rate(seed: int) -> None:
    """Tests that under a ramp a bursty workload has its requests where the rate is high."""
    workload = synthetic(ramp(0.0, 20.0, duration_s=1000.0), FIXED, cv=2.0, duration_s=1000.0, seed=seed)
    late = sum(arrival.at_s >= 500.0 for arrival in workload.arrivals)
    assert math.isclose(0.75, late / len(workload.arrivals), abs_tol=0.05)
    assert [arrival.at_s for arrival in workload.arrivals] == sorted(arrival.at_s for arrival in workload.arrivals)


def test_the_seed_decides_everything(seed: int) -> None:
    """Tests that equal seeds give equal workloads, others do not, and other lengths leave the times alone."""
    first = synthetic(constant(1.0), FIXED, cv=6, duration_s=500, seed=seed)
    assert first == synthetic(constant(1.0), FIXED, cv=6, duration_s=500, seed=seed)
    assert first.arrivals != synthetic(constant(1.0), FIXED, cv=6, duration_s=500, seed=seed + 1).arrivals
    other = synthetic(constant(1.0), UniformLengths((1, 9), (1, 9)), cv=6, duration_s=500, seed=seed)
    assert [arrival.at_s for arrival in first.arrivals] == [arrival.at_s for arrival in other.arrivals]


def drawn(lengths: Lengths, seed: int, count: int = 20_000) -> tuple[list[int], list[int]]:
    rng = random.Random(seed)
    pairs = [lengths.draw(rng) for _ in range(count)]
    return [prompt for prompt, _ in pairs], [output for _, output in pairs]


def test_lengths_have_their_moments(seed: int) -> None:
    """Tests mean and coefficient of variation of every distribution of lengths."""
    assert ([512] * 3, [128] * 3) == drawn(FIXED, seed, 3)
    prompts, outputs = drawn(UniformLengths((1, 4), (10, 10)), seed)
    assert {1, 2, 3, 4} == set(prompts)
    assert {10} == set(outputs)
    assert math.isclose(2.5, statistics.mean(prompts), rel_tol=0.02)
    lognormal = LognormalLengths(1000, 1.0, 200, 0.5, max_prompt_tokens=10**6, max_output_tokens=10**6)
    for values, mean, cv in zip(drawn(lognormal, seed), (1000, 200), (1.0, 0.5), strict=True):
        assert math.isclose(mean, statistics.mean(values), rel_tol=0.05)
        assert math.isclose(cv, statistics.stdev(values) / statistics.mean(values), rel_tol=0.1)
    prompts, outputs = drawn(LognormalLengths(1000, 2.0, 2, 3.0, 1500, 50), seed)
    assert 1500 == max(prompts)
    assert (1, 50) == (min(outputs), max(outputs))


def test_seen_pairs_stay_together(seed: int) -> None:
    """Tests that empirical lengths draw pairs that were seen, all of them, with their frequency."""
    lengths = EmpiricalLengths(((1, 10), (2, 20), (2, 20), (3, 30)), "a test")
    prompts, outputs = drawn(lengths, seed)
    assert all(output == 10 * prompt for prompt, output in zip(prompts, outputs, strict=True))
    assert math.isclose(0.5, prompts.count(2) / len(prompts), abs_tol=0.02)
    assert EmpiricalLengths(((10, 1), (20, 2)), "small") == lengths_of(window(SMALL, start_s=0, stop_s=2))


def test_a_window_counts_from_its_start() -> None:
    """Tests that a window holds the requests of its half-open time, counted from its start, and says so."""
    piece = window(SMALL, start_s=2, stop_s=5)
    assert [(0.0, 30), (1.0, 40), (2.0, 50)] == [(each.at_s, each.prompt_tokens) for each in piece.arrivals]
    assert ("requests of 2 to 5 s, counted from 0",) == piece.notes


def test_a_rate_stretches_time() -> None:
    """Tests that another rate keeps every request and moves only the times."""
    fast = at_rate(SMALL, rate_rps=10 * SMALL.rate_rps)
    assert math.isclose(10 * SMALL.rate_rps, fast.rate_rps)
    assert math.isclose(SMALL.cv, fast.cv, abs_tol=1e-12)
    assert SMALL.tokens == fast.tokens
    assert fast.notes == ("times multiplied by 0.1: 11.1111 requests per second",)


def test_thinning_keeps_times(seed: int) -> None:
    """Tests that thinning keeps a share of the requests at their times, and the seed decides which."""
    whole = synthetic(constant(100.0), FIXED, duration_s=100.0, seed=seed)
    half = thinned(whole, share=0.5, seed=seed)
    assert set(half.arrivals) < set(whole.arrivals)
    assert math.isclose(0.5, len(half.arrivals) / len(whole.arrivals), abs_tol=0.03)
    assert half == thinned(whole, share=0.5, seed=seed)
    assert half.arrivals != thinned(whole, share=0.5, seed=seed + 1).arrivals


def test_clipping_and_new_lengths_are_told() -> None:
    """Tests that cut lengths are within their bounds, the note counts them, and drawn ones keep the times."""
    cut = clipped(SMALL, max_prompt_tokens=50, max_output_tokens=8)
    assert (50, 8) == (
        max(each.prompt_tokens for each in cut.arrivals),
        max(each.output_tokens for each in cut.arrivals),
    )
    assert cut.notes == ("prompts cut to 50 and answers to 8 tokens: 5 of 10 requests",)
    fixed = with_lengths(SMALL, FIXED, seed=0)
    assert (5120, 1280) == fixed.tokens
    assert [each.at_s for each in SMALL.arrivals] == [each.at_s for each in fixed.arrivals]


def test_round_trip(seed: int) -> None:
    """Tests that a workload with every field is read as it was written, to the last bit of its times."""
    workload = clipped(
        synthetic(diurnal(1.0, swing=0.5, period_s=100.0), FIXED, cv=6, duration_s=300, seed=seed, name='a "name"'),
        max_output_tokens=5,
    )
    assert workload == our_requests(workload_json(workload).encode(), where="w.json")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{}", "format_version"),
        ('{"format_version": "0.1", "name": "n", "arrivals": []}', "arrivals"),
        ('{"format_version": "0.2", "name": "n", "arrivals": []}', "format_version"),
        ('{"format_version": "0.1", "name": "n", "arrivals": [{"at_s": 0}]}', "arrivals[0].prompt_tokens"),
        ('{"format_version": "0.1", "name": "n", "arrivals": [A, {"at_s": -1, TOKENS}]}', "arrivals[1].at_s"),
        ('{"format_version": "0.1", "name": "n", "arrivals": [A, {"at_s": 1, TOKENS, "x": 1}]}', "arrivals[1].x"),
        ('{"format_version": "0.1", "name": "n", "arrivals": [{"at_s": 9, TOKENS}, A]}', "arrivals[1].at_s: 1 s is"),
        ('{"format_version": "0.1", "name": "n", "name": "m", "arrivals": [A]}', "there twice"),
        ('{"format_version": "0.1", "name": "n", "arrivals": [{"at_s": NaN, TOKENS}]}', "NaN"),
        ('{"format_version": "0.1", "name": "n", "arrivals": [{"at_s": 1e999, TOKENS}]}', "not finite"),
        ("[" * 100_000, "nesting"),
        ("\xff", "workload w.json is malformed at file"),
    ],
)
def test_refuses_what_is_not_ours(text: str, words: str) -> None:
    """Tests that a wrong file of our format is refused with the place of what is wrong."""
    tokens = '"prompt_tokens": 1, "output_tokens": 1'
    full = text.replace("A", f'{{"at_s": 1, {tokens}}}').replace("TOKENS", tokens)
    with pytest.raises(SpecError) as caught:
        our_requests(full.encode("latin-1"), where="w.json")
    assert words in caught.value.message


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: synthetic(constant(1.0), FIXED, cv=-1, duration_s=10, seed=0), "cv -1"),
        (lambda: synthetic(constant(1.0), FIXED, duration_s=0, seed=0), "duration_s 0"),
        (lambda: synthetic(constant(1e5), FIXED, duration_s=1e4, seed=0), "exceed 500000"),
        (lambda: synthetic(constant(1e-9), FIXED, duration_s=1, seed=0), "no request arrives"),
        (lambda: constant(-1.0), "rate -1"),
        (lambda: constant(math.nan), "rate nan"),
        (lambda: RateCurve((), "none"), "0 points"),
        (lambda: RateCurve(((5.0, 1.0), (4.0, 1.0)), "back"), "stands after"),
        (lambda: diurnal(1.0, swing=1.5), "swing 1.5"),
        (lambda: steps([], step_s=60.0), "no steps"),
        (lambda: FixedLengths(0, 1), "prompt_tokens 0"),
        (lambda: UniformLengths((5, 1), (1, 1)), "prompt 5 to 1"),
        (lambda: LognormalLengths(0, 1, 1, 1, 1, 1), "prompt_mean 0"),
        (lambda: LognormalLengths(1, -1, 1, 1, 1, 1), "prompt_cv -1"),
        (lambda: EmpiricalLengths((), "nobody"), "lengths of nobody"),
        (lambda: window(SMALL, start_s=3, stop_s=3), "not a piece of time"),
        (lambda: window(SMALL, start_s=100, stop_s=200), "no request left"),
        (lambda: at_rate(SMALL, rate_rps=0), "rate_rps 0"),
        (lambda: at_rate(SMALL, rate_rps=1e-9), "more than a year"),
        (lambda: thinned(SMALL, share=1.5, seed=0), "share 1.5"),
        (lambda: clipped(SMALL, max_prompt_tokens=0), "max_prompt_tokens 0"),
    ],
)
def test_refuses_values_out_of_bounds(make: object, words: str) -> None:
    """Tests that each value out of its bounds is refused by its name."""
    assert callable(make)
    with pytest.raises(SpecError) as caught:
        make()
    assert words in caught.value.message
