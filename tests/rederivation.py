"""What a journal's world decided, decided again by the functions that every world shares.

Works on the journal of a daemon and on that of a simulation alike: commands by `decide`, answers to planning by the
planner and the checker's verdict. Whatever is not what they give, somebody else decided.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from spotserve.core import events as ev
from spotserve.core.batching import Batcher
from spotserve.core.commands import SolvePlan
from spotserve.core.controller import Entry
from spotserve.core.decide import decide
from spotserve.core.load import LOAD_PERIOD_S, LoadWindow
from spotserve.core.plan import Plan, PlanningProblem
from spotserve.core.replay import moments
from spotserve.core.spec import ServingSpec
from spotserve.core.state import ClusterState
from spotserve.core.verdict import blocking, findings_of
from spotserve.errors import SpotServeError

Solve = Callable[[PlanningProblem], Plan]


def strange_decisions(entries: Iterable[Entry], solve: Solve) -> list[str]:
    """Every decision in a journal that the shared functions do not give, in words."""
    entries = list(entries)
    return [*_strange_commands(entries), *_strange_answers(entries, solve)]


def _strange_commands(entries: list[Entry]) -> Iterator[str]:
    for moment in moments(ClusterState(), entries):
        if decide(moment.before, moment.entry.event) != moment.entry.commands:
            yield f"entry {moment.entry.sequence}: commands that the controller does not give"


def _strange_answers(entries: list[Entry], solve: Solve) -> Iterator[str]:
    spec = spec_of(entries)
    asked: dict[str, SolvePlan] = {}
    for entry in entries:
        for index, command in enumerate(entry.commands):
            if isinstance(command, SolvePlan):
                asked[f"{entry.sequence}.{index}"] = command
        if isinstance(entry.event, ev.PlanReady | ev.PlanFailed):
            command = asked.pop(entry.event.command)
            problem = PlanningProblem(
                spec=spec, snapshot=command.snapshot, trigger=command.trigger, epoch_to=command.epoch_to
            )
            if not _is_answer(entry.event, problem, solve):
                yield f"entry {entry.sequence}: {entry.event.kind} is not the planner's and the checker's answer"


def _is_answer(event: ev.PlanReady | ev.PlanFailed, problem: PlanningProblem, solve: Solve) -> bool:
    try:
        plan = solve(problem)
    except SpotServeError as error:
        return isinstance(event, ev.PlanFailed) and event.error == error.message
    finding = blocking(findings_of(plan))
    if finding is not None:
        return isinstance(event, ev.PlanFailed) and event.error == f"checker: {finding}"
    return isinstance(event, ev.PlanReady) and event.plan == plan


def spec_of(entries: list[Entry]) -> ServingSpec:
    """What a journal was served by."""
    event = entries[0].event
    assert isinstance(event, ev.JournalBegun)
    return event.spec


def strange_loads(entries: Iterable[Entry]) -> list[str]:
    """Rates in a simulated journal that the shared window does not tell, or does and are missing."""
    window = LoadWindow()
    strange: list[str] = []
    next_s, served = LOAD_PERIOD_S, False
    told: dict[float, float] = {}
    arrivals: list[float] = []
    last_s = 0.0
    for moment in moments(ClusterState(), entries):
        event = moment.entry.event
        while next_s < event.at_s - 1e-9:
            _sample(window, arrivals, next_s, served, told)
            next_s += LOAD_PERIOD_S
        if isinstance(event, ev.RequestAccepted):
            arrivals.append(event.at_s)
        if isinstance(event, ev.LoadSampled):
            _sample(window, arrivals, next_s, served, told)
            next_s += LOAD_PERIOD_S
            if told.pop(round(event.at_s, 6), None) != event.load_rps:
                strange.append(f"entry {moment.entry.sequence}: {event.load_rps} requests/s at {event.at_s:g} s")
        served = served or moment.after.served
        last_s = event.at_s
    return [
        *strange,
        *(f"{rate} requests/s at {at_s:g} s was not told" for at_s, rate in told.items() if at_s < last_s),
    ]


def _sample(window: LoadWindow, arrivals: list[float], at_s: float, served: bool, told: dict[float, float]) -> None:
    for arrived_s in arrivals:
        window.arrived(arrived_s)
    arrivals.clear()
    rate = window.news(at_s) if served else None
    if rate is not None:
        told[round(at_s, 6)] = rate


class CountingBatcher(Batcher):
    """Counts what the shared batcher decided: tokens by request, and evictions."""

    tokens: dict[str, int] = {}
    evictions = 0

    def commit(self, number: int, stopped: Any = ()) -> Any:
        """A micro-batch is back."""
        for item in self.in_flight(number).items:
            if item.samples and self.is_open(item.key):
                self.count(item.key.request, 1)
        return super().commit(number, stopped)

    def advance(self, steps: int) -> None:
        """Rounds at once."""
        for batch in self._in_flight.values():
            for item in batch.items:
                self.count(item.key.request, steps)
        super().advance(steps)

    def take_evicted(self) -> Any:
        """Evictions to tell."""
        evicted = super().take_evicted()
        CountingBatcher.evictions += len(evicted)
        return evicted

    @classmethod
    def count(cls, request: str, tokens: int) -> None:
        """Tokens of a request."""
        cls.tokens[request] = cls.tokens.get(request, 0) + tokens


def strange_tokens(entries: list[Entry], counted: type[CountingBatcher]) -> list[str]:
    """Requests whose tokens, and evictions, are not those that the batchers counted."""
    ended = {one.event.request: sum(one.event.tokens) for one in entries if one.event.kind == "request_ended"}
    evicted = sum(one.event.kind == "request_evicted" for one in entries)
    # A batch that a killed replica had out brought more than anybody saw.
    wrong = [name for name, tokens in ended.items() if counted.tokens.get(name, 0) < tokens]
    return [*wrong, *(["evictions"] if evicted > counted.evictions else [])]
