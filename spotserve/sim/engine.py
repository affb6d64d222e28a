"""A replica in virtual time: the shared batcher decides what an iteration does, a profile how long it takes.

A micro-batch enters the pipeline when the first stage is free and is back when every stage has had it; in lockstep a
stage takes as long as the slowest one. Rounds in which nothing changes are done in one event.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush
from itertools import pairwise
from typing import Protocol

from spotserve.core.batching import Batcher, BatchLimits, MicroBatch, Sequence, SequenceKey
from spotserve.core.ids import RequestId
from spotserve.core.snapshot import Replica
from spotserve.core.wire import ChoicePosition
from spotserve.sim.agenda import Clock
from spotserve.sim.ledger import Owner, Sampled

LEAST_JUMP = 2
"""Rounds: one alone is as cheap as its commits."""
SAME_S = 1e-9


class Durations(Protocol):
    """How long a replica's micro-batches take."""

    def stage_s(self, batch: MicroBatch) -> float:
        """Until the first stage can take the next one."""

    def pass_s(self, batch: MicroBatch) -> float:
        """Until it has been through all stages."""


class Sink(Protocol):
    """Who hears of a replica's tokens."""

    def sampled(self, owner: Owner, sampled: Sampled) -> None:
        """New tokens of a choice."""

    def evicted(self, owner: Owner, key: SequenceKey) -> None:
        """A choice's KV was given up; it is prefilled again."""

    def never_fits(self, owner: Owner, request: RequestId) -> None:
        """The replica's KV pool could never hold this request."""


@dataclass(slots=True)
class _Course:
    """A micro-batch in a jump: when it is back, and when it goes out again after each time."""

    stage_s: float
    pass_s: float
    back_s: list[float]
    issued_s: list[float] = field(default_factory=list)


@dataclass(slots=True)
class _Jump:
    """Rounds being done at once, up to `until_s`, when something else than them is due."""

    until_s: float
    courses: dict[int, _Course]


def foreseen(courses: dict[int, _Course], *, free_s: float, steps: int) -> _Jump:
    """How micro-batches that stay as they are go round, `steps` times at most.

    One that is back goes out once the first stage is free, at `free_s` for the next. Two that wait for it together
    would become one: the jump ends before that.
    """
    heap = [(course.back_s[-1], number) for number, course in courses.items()]
    heapify(heap)
    while True:
        back_s, number = heappop(heap)
        course = courses[number]
        issued_s = back_s if back_s > free_s else free_s
        meets_another = bool(heap) and heap[0][0] <= issued_s + SAME_S
        if meets_another or len(course.back_s) > steps:
            return _Jump(back_s, courses)
        course.issued_s.append(issued_s)
        course.back_s.append(issued_s + course.pass_s)
        heappush(heap, (issued_s + course.pass_s, number))
        free_s = issued_s + course.stage_s


class SimulatedReplica:
    """One replica generation."""

    def __init__(
        self,
        replica: Replica,
        *,
        durations: Durations,
        agenda: Clock,
        sink: Sink,
        is_static: bool = False,
        refill_s: float = 0.0,
        jumps: bool = True,
        is_durable_at_once: bool = True,
    ) -> None:
        """`is_durable_at_once`: the sink makes tokens durable as it hears of them; else somebody calls `durable`."""
        self.replica = replica
        self.state = "prepared"
        self.owner: Owner = (replica.id, replica.generation)
        self.batcher = Batcher(
            BatchLimits.of_replica(
                kv_blocks=replica.kv_blocks,
                max_running=replica.max_running,
                pipeline=replica.pipeline,
                is_static=is_static,
            )
        )
        self._durations = durations
        self._agenda = agenda
        self._sink = sink
        self._jumps = jumps and is_durable_at_once
        self._is_durable_at_once = is_durable_at_once
        self._refill_s = refill_s if is_static else 0.0
        """After a static batch: who waits elsewhere is handed over before the next one is formed."""
        self._ends: dict[tuple[RequestId, int], int] = {}
        """Where the model would end each choice."""
        self._untold: set[tuple[RequestId, int]] = set()
        """Choices without a token of this generation: the controller waits for the first, which no jump may delay."""
        self._out: dict[int, MicroBatch] = {}
        self._back_s: dict[int, float] = {}
        self._free_s = 0.0
        """When the first stage can take the next micro-batch."""
        self._jump: _Jump | None = None
        self._wake_number = 0
        self._quiesced: Callable[[tuple[ChoicePosition, ...]], None] | None = None

    # Asked by the cluster

    def start(self) -> None:
        """Begin to serve."""
        self.state = "serving"
        self._go_on()

    def admit(self, sequences: Iterable[tuple[Sequence, int]]) -> None:
        """Take choices over; with each, at how many tokens the model ends it."""
        self._settle()
        for sequence, end in sequences:
            if not self.batcher.fits(prompt_tokens=sequence.prompt_tokens, max_tokens=sequence.max_tokens):
                self._sink.never_fits(self.owner, sequence.request)
            elif self.batcher.admit(sequence):
                self._ends[sequence.request, sequence.choice] = end
                self._untold.add((sequence.request, sequence.choice))
        self._tell_evictions()
        self._go_on()

    def durable(self, request: RequestId, choice: int, num_tokens: int) -> None:
        """The ledger has so many tokens of a choice; one that had too many ahead of it goes on."""
        self.batcher.set_durable(request, choice, num_tokens)
        if not self._out:
            self._go_on()

    def drop_kv(self, request: RequestId, choice: int) -> None:
        """A rank turns out not to have a choice's KV: it is prefilled again, unless it is out just now."""
        self._settle()
        self.batcher.drop_kv(request, choice)
        self._tell_evictions()

    def close(self, request: RequestId) -> None:
        """End a request's choices."""
        self._settle()
        self.batcher.close(request)
        self._go_on()

    def quiesce(self, report: Callable[[tuple[ChoicePosition, ...]], None]) -> None:
        """Schedule nothing new; `report` is called once nothing is out."""
        self._settle()
        self.batcher.pause()
        self._quiesced = report
        self._go_on()

    def resume(self) -> None:
        """Go on after a quiesce."""
        self.batcher.resume()
        self._quiesced = None
        self.state = "serving"
        self._go_on()

    def kill(self) -> None:
        """It is no more; what was out is lost."""
        self._settle()
        self.state = "dead"
        self._wake_number += 1

    def positions(self) -> tuple[ChoicePosition, ...]:
        """How far every open choice is now."""
        self._settle()
        self._go_on()
        return self.batcher.positions()

    # The pipeline

    def _go_on(self) -> None:
        """Issue what can be issued, jump over what does not change, and wake when the next thing is due."""
        if self.state != "serving":
            return
        self._issue(self._agenda.now_s)
        if not self._out and self._quiesced is not None:
            self.state = "quiesced"
            self._quiesced(self.batcher.positions())
            return
        self._begin_jump()
        self._wake()

    def _issue(self, at_s: float) -> None:
        """Fill the first stage if it is free."""
        while self._free_s <= at_s + SAME_S:
            batch = self.batcher.schedule()
            self._tell_evictions()
            if batch is None:
                break
            self._out[batch.number] = batch
            self._free_s = at_s + self._durations.stage_s(batch)
            self._back_s[batch.number] = at_s + self._durations.pass_s(batch)
        self.batcher.take_freed()

    def _wake(self) -> None:
        """Come back when a micro-batch does, or when the first stage is free for one more."""
        self._wake_number += 1
        number = self._wake_number
        due_s = self._due_s(self._agenda.now_s) if self._jump is None else self._jump.until_s
        if due_s < float("inf"):
            self._agenda.at(due_s, lambda: self._woken(number))

    def _due_s(self, since_s: float) -> float:
        """When the next micro-batch is back, or the first stage free for one more."""
        due_s = min(self._back_s.values(), default=float("inf"))
        if len(self._out) < self.replica.pipeline and self._free_s > since_s + SAME_S:
            due_s = min(due_s, self._free_s)
        return due_s

    def _woken(self, number: int) -> None:
        if number != self._wake_number or self.state != "serving":
            return
        self._settle()
        self._come_back(self._agenda.now_s)
        self._go_on()

    def _come_back(self, at_s: float) -> None:
        """Take every micro-batch that is back by then."""
        due = [n for n, back_s in self._back_s.items() if back_s <= at_s + SAME_S]
        for batch_number in sorted(due, key=lambda n: (self._back_s[n], n)):
            self._commit(batch_number)

    def _commit(self, number: int) -> None:
        """A micro-batch is back: each sampling item has one more token."""
        batch = self._out.pop(number)
        at_s = self._back_s.pop(number)
        sampled = []
        stopped = set()
        for item in batch.items:
            sequence = self.batcher.find(item.key)
            if sequence is None or not item.samples:
                continue
            name = (item.key.request, item.key.choice)
            sampled.append((sequence, Sampled(*name, sequence.num_tokens, 1, first_at_s=at_s, last_at_s=at_s)))
            self._untold.discard(name)
            if sequence.num_tokens + 1 >= self._ends[name]:
                stopped.add(item.key)
        self.batcher.commit(number, stopped)
        for sequence, token in sampled:
            self._tell(sequence, token)
        for key in stopped:
            del self._ends[key.request, key.choice]
        if stopped and not self.batcher.num_running:
            self._free_s = max(self._free_s, at_s + self._refill_s)

    def _tell(self, sequence: Sequence, sampled: Sampled) -> None:
        if self._is_durable_at_once:
            self.batcher.set_durable(sequence.request, sequence.choice, sequence.num_tokens)
        self._sink.sampled(self.owner, sampled)

    def _tell_evictions(self) -> None:
        for key in self.batcher.take_evicted():
            self._sink.evicted(self.owner, key)

    # Many rounds at once

    def _begin_jump(self) -> None:
        if not self._jumps or self._jump is not None:
            return
        steps = self.batcher.steps_until_change()
        for batch in self._out.values():
            for item in batch.items:
                if steps < LEAST_JUMP or (item.key.request, item.key.choice) in self._untold:
                    return
                sequence = self.batcher.find(item.key)
                assert sequence is not None
                end = self._ends[item.key.request, item.key.choice]
                steps = min(steps, end - sequence.num_tokens - 1)
        if steps >= LEAST_JUMP:
            courses = {
                number: _Course(self._durations.stage_s(batch), self._durations.pass_s(batch), [self._back_s[number]])
                for number, batch in self._out.items()
            }
            self._jump = foreseen(courses, free_s=self._free_s, steps=steps)

    def _settle(self) -> None:
        """Do the rounds of a jump that are over by now; whoever looks at the replica or changes it comes here first."""
        jump, self._jump = self._jump, None
        if jump is None:
            return
        now_s = self._agenda.now_s
        steps = min(bisect_left(course.issued_s, now_s - SAME_S) for course in jump.courses.values())
        if steps:
            self._advance(jump, steps)
        # Of the round under way some micro-batches are back and some are out again: one by one, at their own times.
        at_s = float("-inf")
        while (due_s := self._due_s(at_s)) < now_s - SAME_S:
            at_s = due_s
            self._come_back(at_s)
            self._issue(at_s)

    def _advance(self, jump: _Jump, steps: int) -> None:
        """Do rounds that every micro-batch has done, up to where it is out again."""
        told = []
        for number, course in jump.courses.items():
            times_s = course.back_s[:steps]
            longest_s = max((after - before for before, after in pairwise(times_s)), default=0.0)
            for item in self._out[number].items:
                sequence = self.batcher.find(item.key)
                assert sequence is not None
                key = (item.key.request, item.key.choice)
                token = Sampled(*key, sequence.num_tokens, steps, times_s[0], times_s[-1], longest_s)
                told.append((sequence, token))
        self.batcher.advance(steps)
        for number, course in jump.courses.items():
            self._out[number] = self.batcher.in_flight(number)
            self._back_s[number] = course.back_s[steps]
        self._free_s = max(course.issued_s[steps - 1] + course.stage_s for course in jump.courses.values())
        for sequence, token in told:
            self._tell(sequence, token)
