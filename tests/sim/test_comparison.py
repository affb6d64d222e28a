"""Policies side by side: medians over seeds, ratios seed by seed, the worst of what must not happen."""

from __future__ import annotations

from dataclasses import replace

import pytest

from spotserve.sim.comparison import PolicyLine, compared, facts_of
from spotserve.sim.measures import Cost, Requests, RunResult, Spread
from spotserve.sim.workloads import Arrival, Workload
from tests.sim.scenes import four_instances, small_scenario

SCENARIO = small_scenario(four_instances(end_s=20.0))


def run_of(
    policy: str, seed: int, *, p99_s: float, usd_per_million: float | None = 2.0, still_open: int = 0, lost: int = 0
) -> RunResult:
    """A run of which only these figures matter."""
    return RunResult(
        policy=policy,
        seed=seed,
        requests=Requests(accepted=10, finished=10 - still_open - lost, failed=0, open=still_open, lost=lost),
        latency_s=Spread(count=10, p50=p99_s / 2, p99=p99_s),
        ttft_s=Spread(p99=1.0),
        tpot_s=Spread(p99=0.1),
        stall_s=Spread(max=float(seed)),
        latency_quantiles_s=(),
        goodput_rps=0.5,
        slo_share=1.0,
        tokens=100,
        recomputed_tokens=seed,
        cost=Cost(instance_hours=1.0, usd=3.0, usd_per_million_tokens=usd_per_million),
        migrations=(),
        timeline=(),
        duration_s=20.0,
        simulated_s=20.0,
        journal_digest="",
    )


def lines(*runs: RunResult) -> dict[str, PolicyLine]:
    """The lines of a comparison by policy."""
    return {line.policy: line for line in compared(SCENARIO, runs).policies}


def test_figures_are_medians_of_the_seeds() -> None:
    """Tests that one bad seed of three does not move a figure, and the number of seeds is told."""
    line = lines(*(run_of("live", seed, p99_s=p99_s) for seed, p99_s in ((0, 4.0), (1, 900.0), (2, 6.0))))["live"]
    assert (3, 6.0, 3.0, 1.0, 1.0) == (
        line.seeds,
        line.latency_p99_s,
        line.latency_p50_s,
        line.longest_stall_s,
        line.recomputed_tokens,
    )


def test_ratios_are_taken_seed_by_seed() -> None:
    """Tests that a ratio is the median of the seeds' own ratios, to the policy that comes first."""
    found = lines(
        run_of("live", 0, p99_s=1.0),
        run_of("live", 1, p99_s=10.0),
        run_of("live", 2, p99_s=100.0),
        run_of("paper", 0, p99_s=100.0),
        run_of("paper", 1, p99_s=20.0),
        run_of("paper", 2, p99_s=200.0),
    )
    assert ["live", "paper"] == list(found)
    assert 1.0 == found["live"].p99_ratio
    # The ratio of the medians would be 10.
    assert 2.0 == found["paper"].p99_ratio


def test_a_ratio_that_has_no_base_is_none() -> None:
    """Tests that without tokens, or with a base of 0, there is no ratio instead of a division by zero."""
    found = lines(run_of("live", 0, p99_s=0.0, usd_per_million=None), run_of("paper", 0, p99_s=1.0))
    assert found["paper"].p99_ratio is None
    assert found["paper"].cost_ratio is None
    assert found["live"].usd_per_million_tokens is None


def test_what_must_not_happen_is_the_worst_seed() -> None:
    """Tests that one lost request under one seed is seen, however many seeds are good."""
    line = lines(*(run_of("live", seed, p99_s=1.0, lost=int(seed == 3), still_open=seed % 2) for seed in range(9)))
    assert (1, 1) == (line["live"].lost, line["live"].open)


def test_nothing_compares_with_nothing() -> None:
    """Tests that no run at all is no line and no error."""
    assert () == compared(SCENARIO, []).policies


def test_facts_count_what_is_played() -> None:
    """Tests that requests after the end are not counted, and that cutting them and their lengths is told."""
    arrivals = (Arrival(1.0, 60, 40), Arrival(2.0, 250, 40), Arrival(3.0, 900, 40), Arrival(30.0, 60, 40))
    workload = Workload("given", "a test", arrivals, ("a note of its own",))
    facts = facts_of(replace(SCENARIO, workload=workload))
    assert 3 == facts.num_requests
    assert pytest.approx(3 / 20) == facts.mean_rps
    assert "a test" == facts.workload_source
    assert (
        "a note of its own",
        "the first 3 of 4 requests: those within 20 s",
        "prompts and answers cut to 256 tokens together: 2 of 3 requests",
    ) == facts.workload_notes
    assert (6, 255) == (
        replace(SCENARIO, workload=workload).arrivals()[1].output_tokens,
        replace(SCENARIO, workload=workload).arrivals()[2].prompt_tokens,
    )
