"""What a run is measured by: percentiles, the time per token, stalls, the SLO, and what instances cost."""

from __future__ import annotations

import pytest

from spotserve.core.ids import RequestId
from spotserve.sim.cluster import InstanceRecord
from spotserve.sim.hardware import Hardware
from spotserve.sim.ledger import RequestRecord, StreamRecord
from spotserve.sim.measures import Spread, cost_of, keeps, latency_of, percentile, quantiles, stall_of, tpot_of, ttft_of
from spotserve.sim.scenario import Slo

HARDWARE = Hardware(gpu_memory_bytes=1, spot_usd_per_hour=1.0, ondemand_usd_per_hour=3.0)


def record(*streams: StreamRecord, ended_at_s: float | None = None, ended: str = "finished") -> RequestRecord:
    """A request of 10 s with these streams."""
    made = RequestRecord(
        request=RequestId("q0"),
        arrival_index=0,
        arrived_at_s=10.0,
        prompt_tokens=5,
        max_tokens=100,
        output_tokens=100,
        num_choices=len(streams) or 1,
        ended=ended if ended_at_s is not None else None,
        ended_at_s=ended_at_s,
    )
    if streams:
        made.streams = list(streams)
    return made


def stream(num_tokens: int, first_at_s: float, last_at_s: float, *, stall_s: float = 0.0) -> StreamRecord:
    """A choice with so many tokens."""
    return StreamRecord(num_tokens=num_tokens, first_at_s=first_at_s, last_at_s=last_at_s, stall_s=stall_s)


def test_percentiles_are_nearest_ranks() -> None:
    """Tests that a percentile is a value of the sample: the smallest that so many do not exceed."""
    ordered = [float(number) for number in range(1, 201)]
    assert [1.0, 1.0, 100.0, 180.0, 198.0, 200.0] == [percentile(ordered, p) for p in (0, 0.5, 50, 90, 99, 100)]
    assert 7.0 == percentile([7.0], 99)


def test_a_spread_of_nothing_is_zero() -> None:
    """Tests that an empty sample has no quantiles and a spread of zeros, and order does not matter."""
    assert Spread() == Spread.of([])
    assert () == quantiles([])
    assert Spread.of([1.0, 3.0, 2.0]) == Spread.of([3.0, 2.0, 1.0])
    assert (1.0, 2.0, 3.0) == tuple(quantiles([3.0, 1.0, 2.0])[percent] for percent in (0, 50, 100))
    assert 101 == len(quantiles([3.0]))


def test_an_open_request_counts_with_what_it_has_waited() -> None:
    """Tests that latency and first-token time of an open request grow until now, and those of an ended one do not."""
    assert 90.0 == latency_of(record(), 100.0)
    assert 90.0 == ttft_of(record(), 100.0)
    ended = record(stream(3, 12.0, 16.0), ended_at_s=17.0)
    assert 7.0 == latency_of(ended, 100.0)
    assert 2.0 == ttft_of(ended, 100.0)


def test_time_per_token_is_the_slowest_choice() -> None:
    """Tests that the first token does not count, and one token has no time per token."""
    assert 2.0 == tpot_of(record(stream(3, 12.0, 16.0), stream(2, 12.0, 13.0), ended_at_s=17.0), 100.0)
    assert tpot_of(record(stream(1, 12.0, 12.0), ended_at_s=17.0), 100.0) is None
    assert tpot_of(record(), 100.0) is None


def test_an_open_stream_that_waits_is_slow() -> None:
    """Tests that a stream that stopped after three quick tokens has neither a good time per token nor no stall."""
    waiting = record(stream(3, 12.0, 14.0, stall_s=1.0))
    assert 86.0 == stall_of(waiting, 100.0)
    assert pytest.approx(88.0 / 3) == tpot_of(waiting, 100.0)
    done = record(stream(3, 12.0, 14.0, stall_s=1.0), ended_at_s=14.0)
    assert 1.0 == stall_of(done, 100.0)


def test_a_closed_choice_does_not_wait_for_the_others() -> None:
    """Tests that a choice that ended has no gap to now while another one goes on."""
    closed = stream(3, 12.0, 14.0, stall_s=1.0)
    closed.closed = True
    assert 5.0 == stall_of(record(closed, stream(9, 12.0, 95.0, stall_s=2.0)), 100.0)


@pytest.mark.parametrize(
    ("slo", "expected"),
    [
        (Slo(), True),
        (Slo(ttft_s=2.0), True),
        (Slo(ttft_s=1.99), False),
        (Slo(tpot_s=2.0), True),
        (Slo(tpot_s=1.99), False),
        (Slo(latency_s=7.0), True),
        (Slo(latency_s=6.99), False),
    ],
)
def test_each_bound_of_the_slo_counts(slo: Slo, expected: bool) -> None:
    """Tests that a request is served well if it keeps every bound that is given, the bound itself included."""
    assert expected == keeps(record(stream(3, 12.0, 16.0), ended_at_s=17.0), slo)


def test_only_finished_requests_are_served_well() -> None:
    """Tests that an open request and a failed one never count."""
    assert not keeps(record(stream(3, 12.0, 16.0)), Slo())
    assert not keeps(record(stream(3, 12.0, 16.0), ended_at_s=17.0, ended="failed"), Slo())


def test_an_instance_costs_from_the_moment_it_is_asked_for() -> None:
    """Tests that starting is paid for, markets have their own price, and nothing after the duration counts."""
    instances = [
        InstanceRecord("spot", asked_at_s=0.0, ready_at_s=120.0, gone_at_s=1800.0),
        InstanceRecord("ondemand", asked_at_s=1800.0, ready_at_s=1920.0),
        InstanceRecord("spot", asked_at_s=5000.0),
        InstanceRecord("spot", asked_at_s=3000.0, gone_at_s=9000.0),
    ]
    cost = cost_of(instances, HARDWARE, duration_s=3600.0, tokens=1_000_000)
    assert pytest.approx(0.5 + 0.5 + 600 / 3600, abs=1e-6) == cost.instance_hours
    assert pytest.approx(0.5 * 1.0 + 0.5 * 3.0 + 600 / 3600 * 1.0, abs=1e-6) == cost.usd
    assert cost.usd == cost.usd_per_million_tokens
    assert cost_of(instances, HARDWARE, duration_s=3600.0, tokens=0).usd_per_million_tokens is None
