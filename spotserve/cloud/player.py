"""Plays a trace against a daemon: the cloud's part of an experiment."""

from __future__ import annotations

import asyncio
import time
from typing import Any, Protocol

from spotserve.cloud.traces import Trace, TraceEvent
from spotserve.core.ids import InstanceId
from spotserve.errors import UnknownInstanceError
from spotserve.log import get_logger

log = get_logger("trace")


class Stage(Protocol):
    """What a trace acts upon."""

    @property
    def ready(self) -> bool:
        """True from the first `serving` on."""

    async def notice(self, instance: InstanceId, grace_s: float) -> dict[str, Any]:
        """A preemption notice."""

    async def kill(self, instance: InstanceId) -> dict[str, Any]:
        """A kill without notice."""

    async def add_instance(self) -> InstanceId:
        """One more instance."""

    async def load(self, load_rps: float) -> None:
        """The load to plan for."""


class TracePlayer:
    """Acts on each event of a trace at its time, counted from the first `serving`.

    `played_s` is how much of it an earlier coordinator of the same journal has played, `away_s` how long ago that was:
    what fell due since is acted on at once.
    """

    def __init__(self, trace: Trace, stage: Stage, *, played_s: float = 0.0, away_s: float = 0.0) -> None:
        self._trace = trace
        self._stage = stage
        self._played_s = played_s
        self._away_s = away_s

    async def play(self) -> None:
        """Run to the end of the trace."""
        events = [event for event in self._trace.events if event.at_s >= self._played_s]
        # A trace may bring the whole fleet: nothing would ever serve without its first instances.
        while events and events[0].kind == "add" and not events[0].at_s:
            await self._act(events.pop(0))
        while not self._stage.ready:
            await asyncio.sleep(0.02)
        began_s = time.monotonic() - self._played_s - self._away_s
        for event in events:
            await asyncio.sleep(max(0.0, event.at_s - (time.monotonic() - began_s)))
            log.info("trace_event", kind=event.kind, at_s=event.at_s, instances=list(event.instances))
            try:
                await self._act(event)
            except UnknownInstanceError as error:
                # It died earlier than the trace says; there is nothing left to take.
                log.warning("trace_event_skipped", reason=error.message)
        log.info("trace_ended", num_events=len(self._trace.events))

    async def _act(self, event: TraceEvent) -> None:
        if event.kind == "add":
            for _ in event.instances:
                await self._stage.add_instance()
        elif event.kind == "load":
            assert event.rps is not None
            await self._stage.load(event.rps)
        else:
            await asyncio.gather(*(self._take(event, instance) for instance in event.instances))

    async def _take(self, event: TraceEvent, instance: InstanceId) -> None:
        if event.kind == "kill":
            await self._stage.kill(instance)
        else:
            await self._stage.notice(instance, event.grace_s if event.grace_s is not None else 30.0)
