"""Strangers to the controller: they read a journal's entries and what clients read, and judge the promises P1 to P5.

They know events, commands and plans, and nothing of the controller's state or of the world that played it.
"""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from spotserve.core import commands as cmd
from spotserve.core import events as ev
from spotserve.core.check import check_plan
from spotserve.core.ids import GpuId, InstanceId, RequestId, StepId, instance_of
from spotserve.core.plan import CopyKv, CopyKvDelta, Plan, Step
from spotserve.sim.streams import ClientStream, Owner, virtual_token

RUN_PATIENCE_S = 60.0
"""A run that has not committed by then, beyond three times its estimate and its waits, is given up."""
LATE_MESSAGE_S = 5.0
PLANS_PER_MINUTE = 90
"""Runs begun in any minute beyond those that a change of membership asked for."""


class JournalEntry(Protocol):
    """One entry of a journal."""

    @property
    def sequence(self) -> int:
        """Its number."""

    @property
    def event(self) -> ev.Event:
        """What happened."""

    @property
    def commands(self) -> tuple[cmd.Command, ...]:
        """What followed."""


@dataclass(frozen=True, slots=True)
class Violation:
    """A promise that was broken, and where it shows."""

    promise: str
    message: str
    entry: int | None = None

    def __str__(self) -> str:
        where = "" if self.entry is None else f" (entry {self.entry})"
        return f"{self.promise}: {self.message}{where}"


Streams = Mapping[RequestId, ClientStream]
Checker = Callable[[Sequence[JournalEntry], Streams], Iterator[Violation]]


def check_all(entries: Sequence[JournalEntry], streams: Streams) -> list[Violation]:
    """What all checkers find."""
    return [violation for checker in CHECKERS.values() for violation in checker(entries, streams)]


# P1: exactly one terminal record


def check_ends(entries: Sequence[JournalEntry], streams: Streams) -> Iterator[Violation]:
    """P1: every accepted request reaches exactly one terminal record, and its client is told the same."""
    accepted: dict[RequestId, int] = {}
    ends: defaultdict[RequestId, list[tuple[int, ev.RequestEnded]]] = defaultdict(list)
    for entry in entries:
        event = entry.event
        if isinstance(event, ev.RequestAccepted):
            if event.request in accepted:
                yield Violation("P1", f"{event.request} is accepted twice", entry.sequence)
            accepted[event.request] = entry.sequence
        elif isinstance(event, ev.RequestEnded):
            ends[event.request].append((entry.sequence, event))
    for name in accepted:
        if len(ends[name]) != 1:
            told = [f"{end.outcome} in {sequence}" for sequence, end in ends[name]] or ["none"]
            yield Violation("P1", f"{name} has {len(ends[name])} terminal records: {', '.join(told)}", accepted[name])
            continue
        sequence, end = ends[name][0]
        stream = streams.get(name)
        if stream is None or stream.ended != end.outcome:
            said = None if stream is None else stream.ended
            yield Violation("P1", f"{name} ended as {end.outcome}, its client was told {said}", sequence)
    for name in ends:
        if name not in accepted:
            yield Violation("P1", f"{name} ended and was never accepted", ends[name][0][0])
    for name, stream in streams.items():
        if stream.accepted and name not in accepted:
            yield Violation("P1", f"{name}'s client was told that it is accepted; no entry says so")


# P2: streams


def check_streams(entries: Sequence[JournalEntry], streams: Streams) -> Iterator[Violation]:
    """P2: what clients read is without gap, double or foreign token, and complete where the request finished."""
    durable = {e.event.request: (e.sequence, e.event) for e in entries if isinstance(e.event, ev.RequestEnded)}
    for name, stream in streams.items():
        read = [0] * len(stream.lengths)
        for token in stream.tokens:
            if token.position != read[token.choice]:
                message = f"{name} choice {token.choice}: position {token.position} follows {read[token.choice] - 1}"
                yield Violation("P2", message, token.after_entry)
                break
            if token.token != virtual_token(name, token.choice, token.position):
                yield Violation(
                    "P2", f"{name} choice {token.choice}: wrong token at {token.position}", token.after_entry
                )
                break
            read[token.choice] += 1
        else:
            yield from _wrong_length(name, stream, tuple(read), durable.get(name))


def _wrong_length(
    name: RequestId, stream: ClientStream, read: tuple[int, ...], end: tuple[int, ev.RequestEnded] | None
) -> Iterator[Violation]:
    if stream.ended == "finished" and read != stream.lengths:
        yield Violation("P2", f"{name} finished with {read} tokens, the model ends it at {stream.lengths}")
    if end is not None and end[1].tokens != read:
        yield Violation("P2", f"{name} ended with {end[1].tokens} tokens, its client read {read}", end[0])


# P3: plans


@dataclass(slots=True)
class _Known:
    """What a reader of the journal knows of the cluster at an entry."""

    gpus: dict[InstanceId, set[GpuId]] = field(default_factory=dict)
    num_gpus: dict[InstanceId, int] = field(default_factory=dict)
    noticed: set[InstanceId] = field(default_factory=set)
    gone: set[InstanceId] = field(default_factory=set)
    changed_at: int = 0
    """The last entry that changed who is there, beyond what the run under way did itself."""
    lost: set[Owner] = field(default_factory=set)
    seats: dict[Owner, tuple[GpuId, ...]] = field(default_factory=dict)

    def note(self, entry: JournalEntry) -> None:
        """Take an entry's event."""
        event = entry.event
        if isinstance(event, ev.WorkerRegistered) and event.instance not in self.gone:
            gpus = self.gpus.setdefault(event.instance, set())
            was_complete = len(gpus) == event.num_gpus
            gpus.add(event.worker)
            if len(gpus) == event.num_gpus and not was_complete and event.instance not in self.noticed:
                self.changed_at = entry.sequence
        elif isinstance(event, ev.NoticeReceived) and self._stands(event.instance):
            if event.instance not in self.noticed:
                self.changed_at = entry.sequence
            self.noticed.add(event.instance)
        elif isinstance(event, ev.NoticeWithdrawn) and event.instance in self.noticed:
            self.noticed.discard(event.instance)
            if event.instance not in self.gone:
                self.changed_at = entry.sequence
        elif isinstance(event, ev.InstanceLost) and event.instance not in self.gone:
            self.gone.add(event.instance)
            if event.instance in self.gpus:
                self.changed_at = entry.sequence
            self._lose(lambda gpus: any(instance_of(gpu) == event.instance for gpu in gpus))
        for command in entry.commands:
            if isinstance(command, cmd.FenceReplica):
                self.lost.add((command.replica, command.generation))
                self.changed_at = max(self.changed_at, entry.sequence)

    def _stands(self, instance: InstanceId) -> bool:
        return instance in self.gpus and instance not in self.gone

    def _lose(self, hit: Callable[[tuple[GpuId, ...]], bool]) -> None:
        self.lost |= {owner for owner, gpus in self.seats.items() if hit(gpus)}


@dataclass(slots=True)
class _Run:
    """A run as its reader sees it."""

    plan: Plan
    begun: JournalEntry
    answered: set[StepId] = field(default_factory=set)
    is_durable: bool = False
    is_committed: bool = False


def check_plans(entries: Sequence[JournalEntry], streams: Streams) -> Iterator[Violation]:
    """P3: a plan runs only if it is current, complete and checked; a commit only once all before it is done."""
    known = _Known()
    epoch = 0
    asked_at = 0
    run: _Run | None = None
    for entry in entries:
        known.note(entry)
        if run is not None:
            _hear(run, entry.event)
        for command in entry.commands:
            if isinstance(command, cmd.TakeSnapshot):
                asked_at = entry.sequence
            elif isinstance(command, cmd.BeginRun):
                if run is not None:
                    yield Violation("P3", f"run {command.plan.epoch.to} begins beside another", entry.sequence)
                yield from _unfit(command.plan, known, epoch, asked_at, entry)
                run = _Run(command.plan, entry)
                fresh = (r for r in command.plan.target.replicas if r.generation == command.plan.epoch.to)
                known.seats.update({(r.id, r.generation): r.gpus for r in fresh})
            elif isinstance(command, cmd.ExecuteStep):
                yield from _unready(run, command, entry)
            elif isinstance(command, cmd.CommitRun):
                yield from _uncommittable(run, command, known, entry)
                epoch = command.epoch
                if run is not None:
                    run.is_committed = True
            elif isinstance(command, cmd.AbortRun | cmd.FinishRun):
                yield from _wrong_end(run, command, entry)
                run = None


def _hear(run: _Run, event: ev.Event) -> None:
    if isinstance(event, ev.StepDone | ev.Quiesced | ev.StepFailed) and event.epoch == run.plan.epoch.to:
        run.answered.add(event.step)
    elif isinstance(event, ev.LedgerDurable) and event.epoch == run.plan.epoch.to:
        run.is_durable = True


def _unfit(plan: Plan, known: _Known, epoch: int, asked_at: int, entry: JournalEntry) -> Iterator[Violation]:
    """Whether a plan may not begin now."""
    for finding in check_plan(plan):
        # Too late for some of it is no reason: what does not arrive in time is recomputed.
        if finding.code != "past_deadline":
            yield Violation("P3", f"plan {plan.epoch.to} is refused by the checker: {finding}", entry.sequence)
    if plan.epoch.from_ != epoch:
        yield Violation("P3", f"plan {plan.epoch.to} is for epoch {plan.epoch.from_}, it is {epoch}", entry.sequence)
    if known.changed_at > asked_at:
        message = f"plan {plan.epoch.to} is of snapshot {asked_at}; the cluster changed in {known.changed_at}"
        yield Violation("P3", message, entry.sequence)
    for replica in plan.target.replicas:
        owner = (replica.id, replica.generation)
        fresh = replica.generation == plan.epoch.to
        if not fresh and (owner in known.lost or owner not in known.seats):
            yield Violation("P3", f"plan {plan.epoch.to} keeps {replica.id}, which is lost", entry.sequence)
        for gpu in replica.gpus if fresh else ():
            if not _may_take(gpu, known):
                yield Violation("P3", f"plan {plan.epoch.to} puts {replica.id} on {gpu}, which leaves", entry.sequence)


def _may_take(gpu: GpuId, known: _Known) -> bool:
    instance = instance_of(gpu)
    return gpu in known.gpus.get(instance, ()) and instance not in known.gone and instance not in known.noticed


def _unready(run: _Run | None, command: cmd.ExecuteStep, entry: JournalEntry) -> Iterator[Violation]:
    """A step begins when all that it depends on has an answer; KV copies may have been given up."""
    if run is None or command.epoch != run.plan.epoch.to:
        yield Violation("P3", f"step {command.step.id} of epoch {command.epoch} runs outside its run", entry.sequence)
        return
    steps = {step.id: step for step in run.plan.steps}
    if command.step.id not in steps or steps[command.step.id] != command.step:
        yield Violation("P3", f"step {command.step.id} is not of plan {command.epoch}", entry.sequence)
        return
    for name in command.step.depends_on:
        if not run.is_committed and name not in run.answered and not _may_be_late(steps[name]):
            message = f"step {command.step.id} of plan {command.epoch} begins before {name} is answered"
            yield Violation("P3", message, entry.sequence)


def _may_be_late(step: Step) -> bool:
    return isinstance(step, CopyKv | CopyKvDelta)


def _uncommittable(run: _Run | None, command: cmd.CommitRun, known: _Known, entry: JournalEntry) -> Iterator[Violation]:
    if run is None or command.epoch != run.plan.epoch.to or run.is_committed:
        yield Violation("P3", f"epoch {command.epoch} is committed outside its run", entry.sequence)
        return
    steps = {step.id: step for step in run.plan.steps}
    stops = [step.id for step in run.plan.steps if step.kind == "quiesce"]
    for name in (*stops, *next((step.depends_on for step in run.plan.steps if step.kind == "commit"), ())):
        if name not in run.answered and not _may_be_late(steps[name]):
            yield Violation("P3", f"epoch {command.epoch} is committed before {name} is answered", entry.sequence)
    if not run.is_durable and any(step.kind == "quiesce" for step in run.plan.steps):
        yield Violation("P3", f"epoch {command.epoch} is committed before the ledger is durable", entry.sequence)
    for replica in run.plan.target.replicas:
        if (replica.id, replica.generation) in known.lost:
            yield Violation("P3", f"epoch {command.epoch} is committed with {replica.id} lost", entry.sequence)


def _wrong_end(run: _Run | None, command: cmd.AbortRun | cmd.FinishRun, entry: JournalEntry) -> Iterator[Violation]:
    is_finish = isinstance(command, cmd.FinishRun)
    if run is None or command.epoch != run.plan.epoch.to or run.is_committed != is_finish:
        yield Violation("P3", f"{command.kind} of epoch {command.epoch} has no such run", entry.sequence)


# P4: fencing


def check_fences(entries: Sequence[JournalEntry], streams: Streams) -> Iterator[Violation]:
    """P4: no token of anybody who did not own the request then; epochs, terms and names of KV are never used again."""
    owners: defaultdict[RequestId, list[tuple[int, Owner | None]]] = defaultdict(list)
    ended_at: dict[Owner, int] = {}
    seats: dict[Owner, tuple[GpuId, ...]] = {}
    kv_names: dict[RequestId, int] = {}
    moved: set[RequestId] = set()
    last_epoch = last_term = 0
    for entry in entries:
        event = entry.event
        if isinstance(event, ev.CoordinatorRestarted):
            if event.term <= last_term:
                yield Violation("P4", f"term {event.term} follows {last_term}", entry.sequence)
            last_term = event.term
        elif isinstance(event, ev.JournalBegun):
            last_term = 1
        elif isinstance(event, ev.InstanceLost):
            for owner, gpus in seats.items():
                if any(instance_of(gpu) == event.instance for gpu in gpus):
                    ended_at.setdefault(owner, entry.sequence)
        for command in entry.commands:
            if isinstance(command, cmd.BeginRun):
                epoch = command.plan.epoch.to
                if epoch <= last_epoch:
                    yield Violation("P4", f"epoch {epoch} is used again, {last_epoch} was", entry.sequence)
                last_epoch = max(last_epoch, epoch)
                fresh = (r for r in command.plan.target.replicas if r.generation == epoch)
                seats.update({(r.id, r.generation): r.gpus for r in fresh})
            elif isinstance(command, cmd.FenceReplica):
                ended_at.setdefault((command.replica, command.generation), entry.sequence)
            elif isinstance(command, cmd.CommitRun):
                moved = {admission.request for admission in command.moved}
                for change in command.owners:
                    owner_now = None if change.replica is None else (change.replica, change.generation)
                    owners[change.request].append((entry.sequence, owner_now))
                    yield from _given_to_the_dead(owner_now, ended_at, entry)
            elif isinstance(command, cmd.AdmitRequests):
                owner = (command.replica, command.generation)
                yield from _given_to_the_dead(owner, ended_at, entry)
                for admission in command.admissions:
                    owners[admission.request].append((entry.sequence, owner))
                    yield from _old_name(admission, command, kv_names, entry)
                    yield from _unmoved(admission, moved, entry)
                    if not admission.choices and not command.again:
                        moved.discard(admission.request)
            elif isinstance(command, cmd.ExecuteStep):
                for admission in command.admissions:
                    yield from _unmoved(admission, moved, entry)
    for name, stream in streams.items():
        yield from _foreign_token(name, stream, owners[name], ended_at)


def _given_to_the_dead(owner: Owner | None, ended_at: Mapping[Owner, int], entry: JournalEntry) -> Iterator[Violation]:
    if owner is not None and owner in ended_at:
        yield Violation("P4", f"a request goes to {owner}, which is lost since {ended_at[owner]}", entry.sequence)


def _old_name(
    admission: cmd.Admission, command: cmd.AdmitRequests, kv_names: dict[RequestId, int], entry: JournalEntry
) -> Iterator[Violation]:
    """What starts from the ledger does so under a name of its KV that was never used."""
    last = kv_names.get(admission.request, 0)
    if not admission.choices and not command.again and admission.kv_generation <= last:
        message = f"{admission.request} starts again with KV {admission.kv_generation}, {last} was used"
        yield Violation("P4", message, entry.sequence)
    kv_names[admission.request] = max(last, admission.kv_generation)


def _unmoved(admission: cmd.Admission, moved: set[RequestId], entry: JournalEntry) -> Iterator[Violation]:
    """KV is relied on only where the last commit moved it, and the request did not start again since."""
    if admission.choices and admission.request not in moved:
        yield Violation("P4", f"{admission.request} is admitted with KV that did not move", entry.sequence)


def _foreign_token(
    name: RequestId,
    stream: ClientStream,
    history: Sequence[tuple[int, Owner | None]],
    ended_at: Mapping[Owner, int],
) -> Iterator[Violation]:
    for token in stream.tokens:
        owner = next((one for sequence, one in reversed(history) if sequence <= token.after_entry), None)
        if token.owner != owner:
            message = f"{name} position {token.position} is by {token.owner}, the owner was {owner}"
            yield Violation("P4", message, token.after_entry)
            return
        if ended_at.get(token.owner, token.after_entry + 1) <= token.after_entry:
            message = f"{name} position {token.position} is by {token.owner}, lost since {ended_at[token.owner]}"
            yield Violation("P4", message, token.after_entry)
            return


# P5: bounds


def check_bounds(entries: Sequence[JournalEntry], streams: Streams) -> Iterator[Violation]:
    """P5: sequences per replica, tokens per choice, time per run and stop, and runs per minute are bounded."""
    for name, stream in streams.items():
        most = max(Counter(token.choice for token in stream.tokens).values(), default=0)
        if most > stream.max_tokens:
            yield Violation("P5", f"{name} has {most} tokens, max_tokens is {stream.max_tokens}")
    yield from _crowded(entries)
    yield from _endless_runs(entries)
    yield from _endless_stops(entries)
    yield from _thrashing(entries)


def _crowded(entries: Iterable[JournalEntry]) -> Iterator[Violation]:
    """A replica is handed no more choices than it runs, but for a request that has more of them than that."""
    choices: dict[RequestId, int] = {}
    bounds: dict[Owner, int] = {}
    owned: defaultdict[Owner, set[RequestId]] = defaultdict(set)
    for entry in entries:
        event = entry.event
        if isinstance(event, ev.RequestAccepted):
            choices[event.request] = event.num_choices
        elif isinstance(event, ev.RequestEnded):
            for requests in owned.values():
                requests.discard(event.request)
        for command in entry.commands:
            if isinstance(command, cmd.BeginRun):
                bounds.update({(r.id, r.generation): r.max_running for r in command.plan.target.replicas})
            elif isinstance(command, cmd.CommitRun):
                for change in command.owners:
                    for requests in owned.values():
                        requests.discard(change.request)
                    if change.replica is not None:
                        owned[change.replica, change.generation].add(change.request)
            elif isinstance(command, cmd.AdmitRequests):
                owner = (command.replica, command.generation)
                fresh = {admission.request for admission in command.admissions} - owned[owner]
                owned[owner] |= fresh
                total = sum(choices.get(name, 0) for name in owned[owner])
                if fresh and not command.again and total > bounds.get(owner, 0) and len(owned[owner]) > 1:
                    message = f"{owner} is given {total} choices, it runs {bounds.get(owner, 0)}"
                    yield Violation("P5", message, entry.sequence)
            elif isinstance(command, cmd.FenceReplica):
                owned.pop((command.replica, command.generation), None)


def _endless_runs(entries: Iterable[JournalEntry]) -> Iterator[Violation]:
    run: tuple[int, float, float] | None = None
    for entry in entries:
        at_s = entry.event.at_s
        if run is not None and at_s > run[1] + run[2]:
            yield Violation("P5", f"run {run[0]} goes on after {at_s - run[1]:.1f} s", entry.sequence)
            run = None
        for command in entry.commands:
            if isinstance(command, cmd.BeginRun):
                waits = [step.not_before_s for step in command.plan.steps if step.kind == "quiesce"]
                patience_s = RUN_PATIENCE_S + 3 * command.plan.estimates.done_s + max(waits, default=0.0)
                run = (command.plan.epoch.to, at_s, patience_s + LATE_MESSAGE_S)
            elif isinstance(command, cmd.CommitRun | cmd.AbortRun | cmd.FinishRun):
                run = None


def _endless_stops(entries: Iterable[JournalEntry]) -> Iterator[Violation]:
    """A service that is told to stop does so within its drain, whatever is open; a restart ends the stop."""
    stop: tuple[int, float] | None = None
    for entry in entries:
        event = entry.event
        if stop is not None and event.at_s > stop[1] + LATE_MESSAGE_S:
            yield Violation("P5", f"the stop of entry {stop[0]} goes on after its drain", entry.sequence)
            stop = None
        if isinstance(event, ev.StopRequested):
            stop = (entry.sequence, event.at_s + event.drain_s)
        elif isinstance(event, ev.CoordinatorRestarted):
            stop = None
        if any(isinstance(command, cmd.StopService) for command in entry.commands):
            stop = None


_MEMBERSHIP = ("worker_registered", "notice_received", "notice_withdrawn", "instance_lost", "replica_broke")


def _thrashing(entries: Iterable[JournalEntry]) -> Iterator[Violation]:
    begun: deque[float] = deque()
    changes: deque[float] = deque()
    for entry in entries:
        at_s = entry.event.at_s
        if entry.event.kind in _MEMBERSHIP:
            changes.append(at_s)
        begun.extend(at_s for command in entry.commands if isinstance(command, cmd.BeginRun))
        for times in (begun, changes):
            while times and times[0] < at_s - 60.0:
                times.popleft()
        if len(begun) > PLANS_PER_MINUTE + 2 * len(changes):
            yield Violation("P5", f"{len(begun)} runs begun within a minute", entry.sequence)
            return


CHECKERS: dict[str, Checker] = {
    "P1": check_ends,
    "P2": check_streams,
    "P3": check_plans,
    "P4": check_fences,
    "P5": check_bounds,
}
"""One checker for each promise."""
