"""A trace is played from its start, or from where an earlier coordinator left it."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from spotserve.cloud.player import TracePlayer
from spotserve.cloud.traces import Trace, TraceEvent
from spotserve.core.ids import InstanceId


class Recorder:
    """Notes what a trace does; ready only while something lives."""

    def __init__(self, *, living: int) -> None:
        self.living = living
        self.done: list[str] = []

    @property
    def ready(self) -> bool:
        return self.living > 0

    async def notice(self, instance: InstanceId, grace_s: float) -> dict[str, Any]:
        self.done.append(f"notice {instance}")
        return {}

    async def kill(self, instance: InstanceId) -> dict[str, Any]:
        self.done.append(f"kill {instance}")
        return {}

    async def add_instance(self) -> InstanceId:
        self.living += 1
        self.done.append("add")
        return InstanceId("i0")

    async def load(self, load_rps: float) -> None:
        self.done.append(f"load {load_rps}")


def trace(*events: TraceEvent) -> Trace:
    return Trace(name="test", events=events)


def added(at_s: float) -> TraceEvent:
    return TraceEvent(at_s=at_s, kind="add", instances=(InstanceId("i0"),))


def loaded(at_s: float) -> TraceEvent:
    return TraceEvent(at_s=at_s, kind="load", rps=at_s)


def test_a_trace_may_bring_the_whole_fleet() -> None:
    """Tests that instances added at 0 come before anything serves: without them nothing ever would."""
    stage = Recorder(living=0)
    asyncio.run(asyncio.wait_for(TracePlayer(trace(added(0), added(0), loaded(0.01)), stage).play(), 10))
    assert ["add", "add", "load 0.01"] == stage.done


@pytest.mark.parametrize("away_s", [0.0, 100.0])
def test_a_trace_goes_on_after_a_restart(away_s: float) -> None:
    """Tests that what was played is not played again, and that what fell due meanwhile is acted on at once."""
    stage = Recorder(living=1)
    events = (added(0), loaded(5), loaded(10.01), loaded(10.02 + away_s))
    asyncio.run(asyncio.wait_for(TracePlayer(trace(*events), stage, played_s=10, away_s=away_s).play(), 10))
    assert ["load 10.01", f"load {10.02 + away_s}"] == stage.done
