"""Allocation, freeing and billing as the paper does them."""

from __future__ import annotations

import random
from itertools import pairwise
from pathlib import Path

import pytest

from spotserve.solvers.paper.fleet import FleetChange, alloc_free, billed_minutes, cost_usd
from tests.solvers.paper.golden import golden_json
from tests.solvers.paper.test_optimizer import replay


def test_a_lack_is_asked_of_both_markets_at_once() -> None:
    """Tests that missing instances are requested as spot and as on-demand, whichever comes first."""
    assert alloc_free(8, spot=4, on_demand=2) == FleetChange(request_spot=2, request_on_demand=2)


def test_on_demand_is_given_back_first() -> None:
    """Tests that what is over beyond the pool of two goes back, on-demand before spot."""
    assert alloc_free(4, spot=5, on_demand=3) == FleetChange(free_on_demand=2)
    assert alloc_free(2, spot=5, on_demand=3) == FleetChange(free_on_demand=3, free_spot=1)
    assert alloc_free(4, spot=4, on_demand=2) == FleetChange()
    assert alloc_free(4, spot=4, on_demand=2, pool=0) == FleetChange(free_on_demand=2)


def test_what_stays_is_enough(rng: random.Random) -> None:
    """Tests on random fleets that freeing leaves need and pool, and never happens beside a request."""
    for _ in range(200):
        needed, spot, on_demand = (rng.randint(0, 12) for _ in range(3))
        change = alloc_free(needed, spot=spot, on_demand=on_demand)
        left = spot + on_demand - change.free_spot - change.free_on_demand
        if needed > spot + on_demand:
            assert left + change.request_spot == needed == left + change.request_on_demand
        else:
            assert change.request_spot == change.request_on_demand == 0
            assert left == min(spot + on_demand, needed + 2)
        assert change.free_spot == 0 or change.free_on_demand == on_demand


@pytest.mark.parametrize(("name", "trace"), [("A_S", "trace_0304_real"), ("B_S", "trace_0506_real")])
def test_billing_of_the_traces(shared_data: Path, name: str, trace: str) -> None:
    """Tests instance-minutes, acquisitions and dollars of both spot traces, counted from the traces themselves."""
    golden = golden_json(shared_data, "cost.json")
    published = golden["billing"][name]
    events = replay(shared_data, trace)
    ends_s = 1320.0 if name == "A_S" else 1020.0
    starts_s = [at_s for at_s, _, _ in events]
    spans = zip(starts_s, [*starts_s[1:], ends_s], (count for _, count, _ in events), strict=True)
    available = sum((stop - start) / 60 * count for start, stop, count in spans)
    counts = [count for _, count, _ in events]
    acquired = sum(max(0, after - before) for before, after in pairwise(counts))
    minutes = billed_minutes(available, acquisitions=acquired)
    assert (available, acquired) == (published["available_instance_minutes"], published["acquisitions"])
    assert minutes == published["billed_instance_minutes"]
    usd = cost_usd(minutes, usd_per_hour=golden["prices_usd_per_instance_hour"]["spot"])
    assert usd == pytest.approx(published["usd"], abs=5.1e-5, rel=0)


def test_billing_with_on_demand_and_the_saving(shared_data: Path) -> None:
    """Tests the mixed fleets, the on-demand fleets of 18 minutes, and the 54 % saving of B_S against eight of them."""
    golden = golden_json(shared_data, "cost.json")
    spot = golden["prices_usd_per_instance_hour"]["spot"]
    on_demand = golden["prices_usd_per_instance_hour"]["on_demand"]
    for name in ("A_S+O", "B_S+O"):
        published = golden["billing"][name]
        usd = cost_usd(published["spot_minutes_published"], usd_per_hour=spot)
        usd += cost_usd(published["on_demand_minutes_published"], usd_per_hour=on_demand)
        assert usd == pytest.approx(published["usd"], abs=5.1e-5, rel=0)
    for count, published in golden["on_demand_only"].items():
        usd = cost_usd(18 * int(count), usd_per_hour=on_demand)
        assert usd == pytest.approx(published["usd_for_18_min"], abs=5.1e-5, rel=0)
    eight = cost_usd(18 * 8, usd_per_hour=on_demand)
    saving = 1 - cost_usd(golden["billing"]["B_S"]["billed_instance_minutes"], usd_per_hour=spot) / eight
    assert saving == pytest.approx(golden["saving_B_S_vs_8_on_demand"], abs=5.1e-5, rel=0)
    assert round(100 * saving, 1) == 53.7
