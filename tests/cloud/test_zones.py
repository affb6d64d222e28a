"""Traces from counts per zone, and traces drawn from hazards of zones."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from spotserve.cloud.traces import (
    TraceEvent,
    ZoneCounts,
    ZoneHazard,
    delayed,
    instance_counts,
    instance_seconds,
    read_trace,
    skypilot_trace,
    trace_json,
    zone_counts,
    zone_trace,
)
from spotserve.errors import SpecError

A = ZoneCounts("a", 300.0, (2, 2, 3, 1))
B = ZoneCounts("b", 300.0, (0, 1, 1, 1))


def test_counts_become_instances_in_order_of_arrival() -> None:
    """Tests that rises add, falls notice the oldest of their zone a grace period early, and ids follow arrival."""
    trace = skypilot_trace([A, B], name="two", grace_s=30.0, gpu_types={"b": "l4"})
    expected = (
        TraceEvent(at_s=0, kind="add", instances=("i0", "i1"), zone="a"),
        TraceEvent(at_s=300, kind="add", instances=("i2",), zone="b", gpu_type="l4"),
        TraceEvent(at_s=600, kind="add", instances=("i3",), zone="a"),
        TraceEvent(at_s=870, kind="notice", instances=("i0", "i1"), grace_s=30),
    )
    assert expected == trace.events
    assert 1200 == trace.end_s


def test_scaling_is_stated() -> None:
    """Tests that the notes of a trace say every scale and choice."""
    told = " ".join(skypilot_trace([A], name="n", instances_per_node=4, most_per_zone=8, victims="random").notes)
    for words in ("instances_per_node 4", "most_per_zone 8", "random", "seed 0", "notice 30 s"):
        assert words in told
    assert "no notice" in " ".join(skypilot_trace([A], name="n", grace_s=0).notes)


def test_scale_and_bound() -> None:
    """Tests that nodes are multiplied and then cut to the most of a zone."""
    trace = skypilot_trace([A], name="n", instances_per_node=4, most_per_zone=9)
    assert ((0.0, 8), (600.0, 9), (900.0, 4)) == instance_counts(trace)


def test_without_grace_instances_are_killed() -> None:
    """Tests that a grace period of 0 kills at the moment of the fall."""
    trace = skypilot_trace([A], name="n", grace_s=0)
    assert TraceEvent(at_s=900, kind="kill", instances=("i0", "i1")) == trace.events[-1]


def test_falls_come_before_rises() -> None:
    """Tests that at one moment what a zone loses goes before what another one brings."""
    falling, rising = ZoneCounts("a", 300.0, (1, 0)), ZoneCounts("b", 300.0, (0, 1))
    for zones in ([falling, rising], [rising, falling]):
        assert ["add", "kill", "add"] == [event.kind for event in skypilot_trace(zones, name="n", grace_s=0).events]


def test_who_goes() -> None:
    """Tests that oldest, newest and random take different instances, and the seed decides the random ones."""
    many = ZoneCounts("z", 300.0, (50, 10))
    taken = {
        (victims, seed): skypilot_trace([many], name="n", victims=victims, seed=seed).events[-1].instances
        for victims in ("oldest", "newest", "random")
        for seed in (0, 1)
    }
    assert tuple(f"i{number}" for number in range(40)) == taken["oldest", 0]
    assert tuple(f"i{number}" for number in range(10, 50)) == taken["newest", 0]
    assert 3 == len({taken["oldest", 0], taken["newest", 0], taken["random", 0]})
    assert taken["random", 0] != taken["random", 1]


@pytest.mark.parametrize(
    "folder",
    ["availability/1-node/aws-02-15-2023", "availability/16-node/aws-08-27-2023", "preemption/4-node/aws-08-03-2023"],
)
def test_published_counts(shared_data: Path, folder: str, tmp_path: Path) -> None:
    """Tests that a trace of all zones has at each sample the sum of their counts, and can be written and read."""
    paths = sorted((shared_data / "skypilot-spot-traces" / folder).glob("*.json"))
    zones = [zone_counts(path) for path in paths]
    assert paths
    trace = skypilot_trace(zones, name="published", instances_per_node=2, grace_s=30)
    found = dict(instance_counts(trace))
    last = 0
    for index in range(len(zones[0].counts)):
        last = found.get(index * zones[0].gap_s, last)
        assert 2 * sum(zone.counts[index] for zone in zones) == last, index
    path = tmp_path / "published.json"
    path.write_text(trace_json(trace), encoding="utf-8")
    assert trace == read_trace(path)


@pytest.mark.parametrize(
    ("document", "words"),
    [
        ({"metadata": {"gap_seconds": 0}, "data": [1]}, "metadata.gap_seconds"),
        ({"metadata": {"gap_seconds": 300}, "data": []}, "data"),
        ({"metadata": {"gap_seconds": 300}, "data": [1, -1]}, "data[1]"),
        ({"metadata": {"gap_seconds": 300}, "data": [1, 1.5]}, "data[1]"),
        ({"metadata": {"gap_seconds": 300}, "data": [1], "zone": "a"}, "zone"),
        ({"metadata": {}, "data": [1]}, "gap_seconds"),
        ([1, 2], "not an object"),
    ],
)
def test_refuses_what_is_no_count(tmp_path: Path, document: object, words: str) -> None:
    """Tests that a wrong file is refused with the place of what is wrong."""
    path = tmp_path / "zone.json"
    path.write_text(json.dumps(document), encoding="utf-8")
    with pytest.raises(SpecError) as caught:
        zone_counts(path)
    assert str(path) in caught.value.message
    assert words in caught.value.message


@pytest.mark.parametrize(
    ("zones", "options", "words"),
    [
        ([], {}, "not one or more"),
        ([A, A], {}, "each named once"),
        ([A], {"instances_per_node": 0}, "instances_per_node 0"),
        ([A], {"most_per_zone": 0}, "most_per_zone 0"),
        ([A], {"grace_s": 301.0}, "shortest gap of 300"),
        ([A], {"gpu_types": {"c": "l4"}}, "zone 'c'"),
        ([ZoneCounts("z", 300.0, (100_000,))], {}, "z has 100000 instances"),
        ([ZoneCounts("z", 300.0, (0, 10_000) * 200)], {}, "instances, more than"),
    ],
)
def test_refuses_scales_without_bounds(zones: list[ZoneCounts], options: dict[str, object], words: str) -> None:
    """Tests that a scale, a grace period or a zone that cannot be is refused."""
    with pytest.raises(SpecError) as caught:
        skypilot_trace(zones, name="n", **options)
    assert words in caught.value.message


DAYS = 30
ZONES = [
    ZoneHazard("a", 8, shocks_per_day=4, singles_per_instance_day=0.5),
    ZoneHazard("b", 8, shocks_per_day=4, singles_per_instance_day=0.5),
]


def losses(events: tuple[TraceEvent, ...], *, seconds: float) -> list[int]:
    """Instances lost in each window of so many seconds."""
    windows = [0] * math.ceil(DAYS * 86_400 / seconds)
    for event in events:
        if event.kind in {"notice", "kill"}:
            windows[int(event.at_s // seconds)] += len(event.instances)
    return windows


def variance_to_mean(values: list[int]) -> float:
    mean = sum(values) / len(values)
    return sum((value - mean) ** 2 for value in values) / len(values) / mean


def test_shocks_come_together(seed: int) -> None:
    """Tests that losses of a zone with shocks are far from independent, and those without shocks are not."""
    shaken = zone_trace(ZONES, duration_s=DAYS * 86_400, seed=seed)
    alone = [ZoneHazard(each.zone, 8, shocks_per_day=0, singles_per_instance_day=3.6) for each in ZONES]
    still = zone_trace(alone, duration_s=DAYS * 86_400, seed=seed)
    assert variance_to_mean(losses(shaken.events, seconds=300)) > 3
    assert 0.8 < variance_to_mean(losses(still.events, seconds=300)) < 1.25


def test_shared_shocks_hit_all_zones(seed: int) -> None:
    """Tests that with shared shocks alone every zone loses instances in the same minutes."""
    zones = [ZoneHazard(name, 8, shocks_per_day=0, singles_per_instance_day=0) for name in "abc"]
    trace = zone_trace(zones, duration_s=DAYS * 86_400, seed=seed, shared_shocks_per_day=2)
    zone_of = {name: event.zone for event in trace.events if event.kind == "add" for name in event.instances}
    hits: dict[str, set[int]] = {name: set() for name in "abc"}
    for event in trace.events:
        if event.kind == "notice":
            hits[zone_of[event.instances[0]]].add(int(event.at_s // 120))
    near = [any(minute + shift in hits["b"] for shift in (-1, 0, 1)) for minute in hits["a"]]
    assert len(near) >= 20
    assert sum(near) / len(near) > 0.9


def test_delayed_traces_are_possible(tmp_path: Path, seed: int) -> None:
    """Tests that a drawn trace whose instances start slowly is accepted by the judge of traces."""
    trace = delayed(zone_trace(ZONES, duration_s=7 * 86_400, seed=seed, unnoticed_share=0.3), lag_s=900)
    path = tmp_path / "synthetic.json"
    path.write_text(trace_json(trace), encoding="utf-8")
    assert trace == read_trace(path)


def test_a_shock_takes_its_share(seed: int) -> None:
    """Tests that half of a zone goes at each shock if its share is a half, and all of it if it is one."""
    for share in (0.5, 1.0):
        hazard = ZoneHazard("a", 40, shocks_per_day=1, shock_share=share, singles_per_instance_day=0, outage_s=0)
        trace = zone_trace([hazard], duration_s=DAYS * 86_400, seed=seed)
        hits = [count for count in losses(trace.events, seconds=3600) if count > 5]
        assert len(hits) >= 10
        assert math.isclose(40 * share, sorted(hits)[len(hits) // 2], rel_tol=0.2)


def test_a_closed_zone_gives_nothing(seed: int) -> None:
    """Tests that a long outage after a shock keeps a zone small, and without one it is soon whole again."""
    lived = {
        outage_s: instance_seconds(
            zone_trace(
                [ZoneHazard("a", 20, shocks_per_day=2, shock_share=1.0, singles_per_instance_day=0, outage_s=outage_s)],
                duration_s=DAYS * 86_400,
                seed=seed,
            ),
            until_s=DAYS * 86_400,
        )
        / (20 * DAYS * 86_400)
        for outage_s in (0.0, 6 * 3600.0)
    }
    assert lived[0.0] > 0.98
    assert lived[6 * 3600.0] < 0.75


def test_drawn_traces_are_possible_and_repeatable(tmp_path: Path, seed: int) -> None:
    """Tests that no zone exceeds its size, the judge of traces accepts it, and the seed alone decides it."""
    trace = zone_trace(ZONES, duration_s=7 * 86_400, seed=seed, unnoticed_share=0.2, shared_shocks_per_day=1)
    assert trace == zone_trace(ZONES, duration_s=7 * 86_400, seed=seed, unnoticed_share=0.2, shared_shocks_per_day=1)
    assert trace.events != zone_trace(ZONES, duration_s=7 * 86_400, seed=seed + 1).events
    assert max(count for _, count in instance_counts(trace)) <= 16
    kinds = {event.kind for event in trace.events}
    assert {"add", "notice", "kill"} == kinds
    assert all(event.at_s < 7 * 86_400 for event in trace.events)
    path = tmp_path / "synthetic.json"
    path.write_text(trace_json(trace), encoding="utf-8")
    assert trace == read_trace(path)


@pytest.mark.parametrize(
    ("zones", "options", "words"),
    [
        ([], {}, "not one or more"),
        ([ZoneHazard("a", 0)], {}, "instances of all zones 0"),
        ([ZoneHazard("a", 4, shock_share=1.5)], {}, "a: shock_share 1.5"),
        ([ZoneHazard("a", 4, outage_s=-1)], {}, "a: outage_s -1"),
        ([ZoneHazard("a", 4)], {"unnoticed_share": 2.0}, "unnoticed_share 2"),
        ([ZoneHazard("a", 4)], {"duration_s": 0.0}, "duration_s 0"),
        ([ZoneHazard("a", 4)], {"duration_s": float("nan")}, "duration_s nan"),
        ([ZoneHazard("a", 500, singles_per_instance_day=10_000, recovery_s=0)], {}, "more than 1000000 events"),
    ],
)
def test_refuses_hazards_without_bounds(zones: list[ZoneHazard], options: dict[str, float], words: str) -> None:
    """Tests that a hazard that cannot be is refused by its name."""
    with pytest.raises(SpecError) as caught:
        zone_trace(zones, **{"duration_s": 86_400.0, "seed": 0, **options})  # type: ignore[arg-type]
    assert words in caught.value.message
