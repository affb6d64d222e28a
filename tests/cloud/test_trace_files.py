"""Our trace format written and read again, and the paper's trace of a whole day."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest

from spotserve.cloud.traces import (
    Trace,
    TraceEvent,
    ZoneHazard,
    instance_counts,
    read_trace,
    trace_json,
    window,
    zone_trace,
)
from spotserve.core.ids import InstanceId
from spotserve.errors import SpecError


def again(folder: Path, trace: Trace, *, living: int = 0) -> Trace:
    path = folder / f"{trace.name}.json"
    path.write_text(trace_json(trace), encoding="utf-8")
    return read_trace(path, living=living)


def test_round_trip_of_every_field(tmp_path: Path) -> None:
    """Tests that a trace with every kind of event and every field is read as it was written."""
    names = tuple(InstanceId(f"i{number}") for number in range(2, 5))
    events = (
        TraceEvent(at_s=0, kind="add", instances=names, zone="us-east-1a", gpu_type="l4", market="ondemand"),
        TraceEvent(at_s=1.25, kind="load", rps=0.6),
        TraceEvent(at_s=1.25, kind="notice", instances=names[1:2], grace_s=0.0),
        TraceEvent(at_s=2, kind="notice", instances=("i0",), grace_s=12.5),
        TraceEvent(at_s=3, kind="kill", instances=(names[0], InstanceId("i1"))),
    )
    trace = Trace(name="all", events=events, end_s=7.5, source='a "source"', notes=("one", 'two "events": [x]'))
    assert trace == again(tmp_path, trace, living=2)


def test_what_our_format_has_no_room_for(tmp_path: Path) -> None:
    """Tests that an event of many instances becomes several, and that long notes are cut and many left out."""
    names = tuple(InstanceId(f"i{number}") for number in range(2500))
    events = (
        TraceEvent(at_s=0, kind="add", instances=names, zone="a"),
        TraceEvent(at_s=1, kind="kill", instances=names),
    )
    trace = Trace(name="large", events=events, end_s=2.0, source="s" * 3000, notes=("n" * 3000,) * 120)
    read = again(tmp_path, trace)
    assert [("add", 1024), ("add", 1024), ("add", 452)] == [(one.kind, len(one.instances)) for one in read.events[:3]]
    assert instance_counts(trace) == instance_counts(read)
    assert ("s" * 2000, ("n" * 2000,) * 100) == (read.source, read.notes)


def test_round_trip_of_published_traces(tmp_path: Path, shared_data: Path) -> None:
    """Tests that every trace of the paper is the same after it was written in our format."""
    folder = shared_data / "spotserve-paper/traces"
    paths = [*sorted((folder / "availability").glob("*.txt")), folder / "availability-full/g4dn.csv"]
    assert len(paths) >= 20
    for path in paths:
        trace = read_trace(path)
        assert trace == again(tmp_path, trace), path.name


def test_round_trip_of_a_drawn_trace(tmp_path: Path, seed: int) -> None:
    """Tests that a synthetic trace with zones and types is the same after it was written."""
    zones = [ZoneHazard("a", 4, gpu_type="l4"), ZoneHazard("b", 3)]
    trace = zone_trace(zones, duration_s=86_400, seed=seed, unnoticed_share=0.3)
    assert trace == again(tmp_path, trace)


def test_the_papers_day(shared_data: Path) -> None:
    """Tests that the trace of a day has its published size, peak and mean, and every node its own id."""
    trace = read_trace(shared_data / "spotserve-paper/traces/availability-full/g4dn.csv")
    counts = instance_counts(trace)
    added = [name for event in trace.events if event.kind == "add" for name in event.instances]
    noticed = [name for event in trace.events if event.kind == "notice" for name in event.instances]
    assert (79, 74) == (len(added), len(noticed))
    assert [f"i{number}" for number in range(79)] == added
    assert 24 == max(count for _, count in counts)
    lived_s = sum(count * (after_s - at_s) for (at_s, count), (after_s, _) in pairwise(counts))
    assert 12.8 == round(lived_s / (counts[-1][0] - 480), 1)


def test_the_papers_day_is_acted_on_early(tmp_path: Path) -> None:
    """Tests that every event of a day acts 30 s before its stamp, and those of one moment are one event."""
    path = tmp_path / "day.csv"
    path.write_text("480000,add,n1\n480000,add,n2\n540000,remove,n2\n540000,remove,n1\n", encoding="utf-8")
    expected = (
        TraceEvent(at_s=450, kind="add", instances=("i0", "i1")),
        TraceEvent(at_s=510, kind="notice", instances=("i1", "i0"), grace_s=30),
    )
    assert expected == read_trace(path).events


@pytest.mark.parametrize(
    ("start_min", "stop_min", "published"),
    [
        (212, 232, {212: 7, 214: 8, 216: 10, 222: 9, 225: 10, 232: 8}),
        (313, 336, {313: 10, 324: 8, 326: 7, 332: 8, 336: 9}),
    ],
)
def test_segments_of_the_papers_day(
    shared_data: Path, start_min: int, stop_min: int, published: dict[int, int]
) -> None:
    """Tests that the pieces that A_S and B_S were cut from have the published counts."""
    day = read_trace(shared_data / "spotserve-paper/traces/availability-full/g4dn.csv")
    piece = instance_counts(window(day, start_s=start_min * 60, stop_s=stop_min * 60 + 1))
    found = {
        minute: next(count for at_s, count in reversed(piece) if at_s <= (minute - start_min) * 60)
        for minute in published
    }
    assert published == found


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("0,add,n1\n1000,grow,n2", 2, "is not time_ms,operation,node"),
        ("0,add,n1\n-5,add,n2", 2, "is not time_ms,operation,node"),
        ("0,add,n1\n1e3,add,n2", 2, "is not time_ms,operation,node"),
        ("0,add,n1\n99999999999999,add,n2", 2, "is not time_ms,operation,node"),
        ("0,add,n1\n999999999999,add,n2", 2, "not between 0 and one year"),
        ("90000,add,n1\n80000,add,n2", 2, "before the event above"),
        ("0,add,n1\n90000,remove,n2", 2, "'n2', which is not there"),
        ("0,add,n1\n0,add,n1", 2, "'n1', which is living"),
        ("0,add,n1\n1000,remove,n1\n90000,add,n1", 3, "never returns"),
    ],
)
def test_refuses_the_impossible_in_the_papers_day(tmp_path: Path, text: str, line: int, words: str) -> None:
    """Tests that garbage and impossible lines are refused with their number."""
    path = tmp_path / "day.csv"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(SpecError) as caught:
        read_trace(path)
    assert caught.value.message.startswith(f"{path}:{line}: ")
    assert words in caught.value.message


def test_zone_belongs_to_an_addition(tmp_path: Path) -> None:
    """Tests that our format refuses a zone on a kill, with its line."""
    path = tmp_path / "zone.json"
    path.write_text(
        '{"format_version": "0.1", "events": [\n{"at_s": 0, "kind": "kill", "count": 1, "zone": "a"}]}',
        encoding="utf-8",
    )
    with pytest.raises(SpecError, match=r":2: .*kill has neither zone"):
        read_trace(path, living=1)
