"""Traces as values: who is there when, and pieces of a trace."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from spotserve.core.ids import InstanceId
from spotserve.core.trace import Trace, TraceEvent, delayed, instance_counts, instance_seconds, window
from spotserve.errors import SpecError


def ids(*numbers: int) -> tuple[InstanceId, ...]:
    return tuple(InstanceId(f"i{number}") for number in numbers)


EVENTS = (
    TraceEvent(at_s=0, kind="add", instances=ids(0, 1)),
    TraceEvent(at_s=5, kind="load", rps=2.0),
    TraceEvent(at_s=10, kind="add", instances=ids(2), zone="b", gpu_type="l4", market="ondemand"),
    TraceEvent(at_s=20, kind="notice", instances=ids(0), grace_s=30),
    TraceEvent(at_s=25, kind="notice", instances=ids(0), grace_s=100),
    TraceEvent(at_s=60, kind="kill", instances=ids(1)),
    TraceEvent(at_s=70, kind="add", instances=ids(3)),
)
TRACE = Trace(name="t", events=EVENTS, end_s=100, notes=("a note",))


def test_counts_end_at_the_deadline() -> None:
    """Tests that a noticed instance counts until its first deadline, and equal counts are not told twice."""
    assert ((0.0, 2), (10.0, 3), (50.0, 2), (60.0, 1), (70.0, 2)) == instance_counts(TRACE)


def test_counts_of_those_that_live_already() -> None:
    """Tests that instances that live at the beginning are counted."""
    events = (TraceEvent(at_s=1, kind="notice", instances=ids(1), grace_s=2),)
    assert ((0.0, 2), (3.0, 1)) == instance_counts(Trace(name="t", events=events), living=2)


def test_seconds_are_those_of_the_counts() -> None:
    """Tests that lived seconds are summed over the instances until the end of the bill and no further."""
    assert 2 * 10 + 3 * 40 + 2 * 10 + 1 * 10 + 2 * 30 == instance_seconds(TRACE, until_s=100)
    assert 2 * 10 + 3 * 5 == instance_seconds(TRACE, until_s=15)
    assert 2 * 7 == instance_seconds(Trace(name="t", events=()), until_s=7, living=2)


def test_window_begins_with_those_that_live() -> None:
    """Tests that a piece has the fleet, the load and the running notice of its first moment, under new ids."""
    piece = window(TRACE, start_s=30, stop_s=80)
    expected = (
        TraceEvent(at_s=0, kind="add", instances=ids(0, 1)),
        TraceEvent(at_s=0, kind="add", instances=ids(2), zone="b", gpu_type="l4", market="ondemand"),
        TraceEvent(at_s=0, kind="notice", instances=ids(0), grace_s=20),
        TraceEvent(at_s=0, kind="load", rps=2.0),
        TraceEvent(at_s=30, kind="kill", instances=ids(1)),
        TraceEvent(at_s=40, kind="add", instances=ids(3)),
    )
    assert expected == piece.events
    assert 50 == piece.end_s
    assert ("a note", "30 to 80 s of it, counted from 0") == piece.notes


def test_window_renumbers_those_that_are_gone() -> None:
    """Tests that ids of a piece begin at i0 where earlier instances have gone."""
    piece = window(TRACE, start_s=65, stop_s=80)
    expected = (
        TraceEvent(at_s=0, kind="add", instances=ids(0), zone="b", gpu_type="l4", market="ondemand"),
        TraceEvent(at_s=0, kind="load", rps=2.0),
        TraceEvent(at_s=5, kind="add", instances=ids(1)),
    )
    assert expected == piece.events


def test_window_counts_as_the_whole_does() -> None:
    """Tests that at every moment a piece has as many instances as the whole trace."""
    whole = instance_counts(TRACE)

    def at(counts: tuple[tuple[float, int], ...], moment_s: float) -> int:
        return next(count for at_s, count in reversed(counts) if at_s <= moment_s)

    for start_s in range(0, 79, 7):
        piece = instance_counts(window(TRACE, start_s=start_s, stop_s=80))
        for moment_s in range(start_s, 80):
            assert at(whole, moment_s) == at(piece, moment_s - start_s), (start_s, moment_s)


def test_instances_come_later() -> None:
    """Tests that a lag moves additions, gives notices when their instance is ready, and drops those gone before."""
    events = (
        TraceEvent(at_s=0, kind="add", instances=ids(2), zone="a"),
        TraceEvent(at_s=10, kind="add", instances=ids(3, 4, 5), zone="b"),
        TraceEvent(at_s=20, kind="load", rps=1.0),
        TraceEvent(at_s=30, kind="notice", instances=ids(0, 2, 3, 4), grace_s=200),
        TraceEvent(at_s=40, kind="kill", instances=ids(4)),
        TraceEvent(at_s=50, kind="add", instances=ids(6)),
        TraceEvent(at_s=300, kind="kill", instances=ids(6)),
    )
    expected = (
        TraceEvent(at_s=0, kind="add", instances=ids(2), zone="a"),
        TraceEvent(at_s=20, kind="load", rps=1.0),
        TraceEvent(at_s=30, kind="notice", instances=ids(0, 2), grace_s=200),
        TraceEvent(at_s=130, kind="add", instances=ids(3, 4), zone="b"),
        TraceEvent(at_s=130, kind="notice", instances=ids(3), grace_s=100),
        TraceEvent(at_s=170, kind="add", instances=ids(5)),
        TraceEvent(at_s=300, kind="kill", instances=ids(5)),
    )
    later = delayed(Trace(name="t", events=events), lag_s=120)
    assert expected == later.events
    assert ("an instance is ready 120 s after the trace adds it",) == later.notes


def test_no_lag_changes_nothing() -> None:
    """Tests that a lag of 0 leaves every event as it is, and a negative one is refused."""
    assert TRACE.events == delayed(TRACE, lag_s=0).events
    with pytest.raises(SpecError, match="lag_s -1"):
        delayed(TRACE, lag_s=-1)


def test_empty_windows_are_refused() -> None:
    """Tests that a piece of no time is refused."""
    with pytest.raises(SpecError, match="not a piece of time"):
        window(TRACE, start_s=30, stop_s=30)


def test_only_an_addition_says_what_is_bought() -> None:
    """Tests that a zone on anything but an addition is refused."""
    with pytest.raises(ValidationError, match="kill has neither zone"):
        TraceEvent(at_s=0, kind="kill", instances=ids(0), zone="a")
