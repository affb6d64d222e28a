"""Leaders in virtual time: they drive the shared batcher and sample ahead of the ledger, to which tokens travel."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from spotserve.core import commands as cmd
from spotserve.core import events as ev
from spotserve.core.admission import start_of, tokens_again
from spotserve.core.batching import MicroBatch, SequenceKey
from spotserve.core.batching import Sequence as BatchedSequence
from spotserve.core.ids import InstanceId, RequestId, StepId, instance_of
from spotserve.core.plan import CopyKvDelta, Plan
from spotserve.core.snapshot import Replica
from spotserve.core.wire import ChoicePosition
from spotserve.errors import InvariantError
from spotserve.sim.engine import SimulatedReplica
from spotserve.sim.faults import Faults
from spotserve.sim.ledger import Sampled
from spotserve.sim.streams import Owner
from spotserve.sim.virtual_ledger import Run, VirtualLedger, VirtualRequest
from spotserve.sim.virtual_timeline import VirtualRates, VirtualTimeline

PREFILL_ROWS = 64
"""Rows that make an iteration as long again."""


@dataclass(slots=True)
class VirtualPace:
    """How long a leader's micro-batches take: drawn for each, longer for a straggler and for more rows."""

    draw: Callable[[], float]
    pipeline: int
    _drawn: tuple[int, float] = (-1, 0.0)

    def stage_s(self, batch: MicroBatch) -> float:
        """Until the first stage can take the next one."""
        return self.pass_s(batch) / self.pipeline

    def pass_s(self, batch: MicroBatch) -> float:
        """Until it has been through all stages."""
        if self._drawn[0] != batch.number:
            self._drawn = (batch.number, self.draw() * (1 + batch.num_rows / PREFILL_ROWS))
        return self._drawn[1]


@dataclass(slots=True)
class VirtualReplica:
    """A replica generation: what its leader runs, and what it has sampled."""

    engine: SimulatedReplica
    sampled: dict[tuple[RequestId, int], int] = field(default_factory=dict)
    """(request, choice) -> tokens that the leader knows of; kept until the request has ended."""
    message: tuple[float, list[Run]] = field(default_factory=lambda: (-1.0, []))
    """What the leader sends at a time: the tokens of one iteration go together."""
    resumes: int = 0
    """Times that its leader was told to go on: a quiesce that was asked for before does not come about."""

    @property
    def replica(self) -> Replica:
        """What it is a generation of."""
        return self.engine.replica

    @property
    def state(self) -> str:
        """`prepared`, `serving`, `quiesced` or `dead`."""
        return self.engine.state

    @property
    def owner(self) -> Owner:
        """The generation's name in the ledger."""
        return self.engine.owner

    @property
    def leader(self) -> InstanceId:
        """Where its leader runs."""
        return instance_of(self.replica.leader)

    @property
    def instances(self) -> list[InstanceId]:
        """Where its ranks run."""
        return sorted({instance_of(gpu) for gpu in self.replica.gpus})

    def sits_on(self, instance: InstanceId) -> bool:
        """Whether a rank of it runs on an instance."""
        return any(instance_of(gpu) == instance for gpu in self.replica.gpus)

    def has(self, request: RequestId) -> bool:
        """Whether an open choice of a request is here."""
        return any(sequence.request == request for sequence in self.engine.batcher.sequences())

    def holds(self, position: ChoicePosition) -> bool:
        """Whether the KV that a position names is here."""
        key = SequenceKey(position.request, position.choice, position.kv_generation)
        return self.engine.batcher.is_open(key)


@dataclass(frozen=True, slots=True)
class _Clock:
    """The world's time as a leader sees it: a leader outlives the coordinator."""

    timeline: VirtualTimeline

    @property
    def now_s(self) -> float:
        return self.timeline.at_s

    def at(self, at_s: float, happen: Callable[[], ev.Event | None]) -> None:
        self.timeline.after(max(0.0, at_s - self.timeline.at_s), happen)


class VirtualLeaders(VirtualTimeline):
    """Every replica generation there ever was, and the ledger that their leaders append to."""

    def __init__(self, *, seed: int, rates: VirtualRates, faults: Faults) -> None:
        super().__init__(seed=seed, rates=rates)
        self.faults = faults
        self.last_entry = 0
        """Sequence of the last journal entry whose commands were given."""
        self.alive: set[InstanceId] = set()
        self.replicas: dict[Owner, VirtualReplica] = {}
        self.ledger = VirtualLedger()
        self.plans: dict[int, Plan] = {}
        self.brought: dict[tuple[int, StepId], set[tuple[RequestId, int]]] = {}
        """What each `copy_kv_delta` of an epoch brought."""
        self.aborted: set[int] = set()

    @property
    def requests(self) -> dict[RequestId, VirtualRequest]:
        """Every request ever offered, as the ledger has it."""
        return self.ledger.requests

    def _prepare(self, replica: Replica) -> None:
        instances = sorted({instance_of(gpu) for gpu in replica.gpus})

        def draw() -> float:
            slowness = max(self.faults.iteration_slowness(instance) for instance in instances)
            return self._spread(self.rates.iteration_s) * slowness

        engine = SimulatedReplica(
            replica,
            durations=VirtualPace(draw, replica.pipeline),
            agenda=_Clock(self),
            sink=self,
            is_durable_at_once=False,
        )
        self.replicas[engine.owner] = VirtualReplica(engine)

    def _take_over(self, virtual: VirtualReplica, admissions: Sequence[cmd.Admission]) -> None:
        """What a leader is handed: durable tokens, and the KV it may rely on; what it runs already it runs on."""
        sequences = []
        for admission in admissions:
            request = self.requests.get(admission.request)
            if request is None or request.ended is not None:
                continue
            fresh = [c for c in range(request.num_choices) if (admission.request, c) not in virtual.sampled]
            if fresh:
                kept = {p.choice: p for p in admission.choices if p.kv_tokens}
                self._check_brought(virtual, request, kept)
            for choice in fresh:
                durable = virtual.sampled[admission.request, choice] = request.durable(choice)
                if request.is_closed(choice):
                    continue
                start = start_of(admission, choice)
                if not start.kv_tokens and request.first_by:
                    request.recomputed += tokens_again(request.prompt_tokens, durable)
                sequence = BatchedSequence.handed_over(
                    admission.request,
                    choice,
                    start,
                    arrival_index=request.arrival_index,
                    lengths=(request.prompt_tokens, request.max_tokens, durable),
                )
                sequences.append((sequence, request.lengths[choice]))
        virtual.engine.admit(sequences)

    def _check_brought(self, virtual: VirtualReplica, request: VirtualRequest, kept: dict[int, ChoicePosition]) -> None:
        """A leader is told of no KV that some copy has not brought, and of none for other tokens than are durable."""
        for choice, position in kept.items():
            durable = request.durable(choice)
            if position.tokens != durable and not request.is_closed(choice):
                raise InvariantError(
                    f"{virtual.replica.id} is told of {position.tokens} tokens of {request.request}; durable: {durable}"
                )
        came: set[int] = set()
        for epoch, step in self._last_deltas(virtual, request.request):
            brought = {choice for name, choice in self.brought.get((epoch, step.id), ()) if name == request.request}
            came |= brought
            if not set(kept) <= brought:
                raise InvariantError(
                    f"{virtual.replica.id} is told of KV of {request.request} that {step.id} did not bring"
                )
        if not set(kept) <= came:
            raise InvariantError(f"{virtual.replica.id} is told of KV of {request.request} that nothing brought")

    def _last_deltas(self, virtual: VirtualReplica, request: RequestId) -> list[tuple[int, CopyKvDelta]]:
        """What last could have brought a request's KV to a replica; what an aborted run copied counts for nothing."""
        sources = {v.replica.id for v in self.replicas.values() if v.has(request)}
        deltas = [
            (epoch, step)
            for epoch, plan in self.plans.items()
            for step in (plan.steps if epoch not in self.aborted else ())
            if isinstance(step, CopyKvDelta) and step.route.to_replica == virtual.replica.id
            if step.route.from_replica in sources
        ]
        last = max((epoch for epoch, _ in deltas), default=0)
        return [(epoch, step) for epoch, step in deltas if epoch == last]

    def _resume(self, virtual: VirtualReplica) -> None:
        virtual.resumes += 1
        if virtual.state in ("serving", "quiesced"):
            virtual.engine.resume()

    def _close(self, virtual: VirtualReplica, request: RequestId) -> None:
        virtual.engine.close(request)
        for key in [key for key in virtual.sampled if key[0] == request]:
            del virtual.sampled[key]

    def _ending(self, request: VirtualRequest) -> ev.Event:
        tokens = tuple(len(rows) for rows in request.rows)
        return ev.RequestEnded.model_validate(
            {"at_s": self.at_s, "request": request.request, "outcome": request.ended, "tokens": tokens}
        )

    # What a leader says

    def sampled(self, owner: Owner, sampled: Sampled) -> None:
        """A new token of a choice: those of one iteration go to the ledger in one message."""
        virtual = self.replicas[owner]
        name = (sampled.request, sampled.choice)
        virtual.sampled[name] = sampled.position + sampled.count
        run = Run(*name, sampled.position, sampled.count)
        at_s, runs = virtual.message
        if at_s == self.at_s:
            runs.append(run)
        else:
            virtual.message = (self.at_s, [run])
            self._send(virtual, virtual.message[1])
        if self.faults.drops_kv():
            virtual.engine.drop_kv(*name)

    def evicted(self, owner: Owner, key: SequenceKey) -> None:
        """A choice's KV blocks went to others; it is prefilled again under a new name of its KV."""
        self.faults.evicted()
        self.up(
            self.replicas[owner].leader,
            self._spread(self.rates.step_s),
            lambda: ev.RequestEvicted(at_s=self.at_s, request=key.request, replica=owner[0], generation=owner[1]),
        )

    def never_fits(self, owner: Owner, request: RequestId) -> None:
        """The request fails, as it does live."""

        def end() -> ev.Event | None:
            refused = self.requests.get(request)
            if refused is None or refused.owner != owner or not self.ledger.end(refused, "failed"):
                return None
            return self._ending(refused)

        self.up(self.replicas[owner].leader, self._spread(self.rates.step_s), end)

    def _send(self, virtual: VirtualReplica, runs: list[Run]) -> None:
        self.up(virtual.leader, self._spread(self.rates.commit_s), lambda: self._commit_tokens(virtual, runs))

    def _send_again(self, virtual: VirtualReplica) -> None:
        """All that the leader knows and the ledger lacks."""
        runs = []
        for (name, choice), sampled in virtual.sampled.items():
            request = self.requests.get(name)
            if request is not None and request.ended is None and sampled > request.durable(choice):
                durable = request.durable(choice)
                runs.append(Run(name, choice, durable, sampled - durable))
        if runs:
            self._send(virtual, runs)

    def _commit_tokens(self, virtual: VirtualReplica, runs: list[Run]) -> ev.Event | None:
        """The ledger's commit; what the controller hears of it are first tokens and ends."""
        again = False
        for run in runs:
            request = self.requests.get(run.request)
            if request is None:
                continue
            verdict = self.ledger.append(virtual.owner, run, at_s=self.at_s, after_entry=self.last_entry)
            again = again or verdict == "gap"
            if verdict == "late":
                self.down([virtual.leader], lambda name=run.request: self._close_if_ended(virtual, name))  # type: ignore[misc]
            elif verdict in ("new", "first", "double"):
                if verdict != "double":
                    self._note(virtual, request, is_first=verdict == "first")
                virtual.engine.durable(run.request, run.choice, request.durable(run.choice))
        if again:
            self.down([virtual.leader], lambda: self._send_again(virtual))
        return None

    def _close_if_ended(self, virtual: VirtualReplica, name: RequestId) -> None:
        if self.requests[name].ended is not None:
            self._close(virtual, name)

    def _note(self, virtual: VirtualReplica, request: VirtualRequest, *, is_first: bool) -> None:
        stall_s = 0.0 if request.last_token_s is None else self.at_s - request.last_token_s
        request.stall_s = max(request.stall_s, stall_s)
        request.last_token_s = self.at_s
        if is_first:
            recomputed, request.recomputed = request.recomputed, 0
            first = self._first_token(request, virtual.owner, stall_s, recomputed)
            self.after(0.001, lambda: first, survives=False)
        if request.is_complete and self.ledger.end(request, "finished"):
            self._close(virtual, request.request)
            self.after(0.001, lambda: self._ending(request), survives=False)

    def _first_token(self, request: VirtualRequest, owner: Owner, stall_s: float, recomputed: int) -> ev.Event:
        return ev.FirstToken(
            at_s=self.at_s,
            request=request.request,
            replica=owner[0],
            generation=owner[1],
            stall_ms=1000 * stall_s,
            recomputed_tokens=recomputed,
        )
