"""Leaders in virtual time: they sample ahead of the ledger, to which their tokens travel over their line."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from spotserve.core import commands as cmd
from spotserve.core import events as ev
from spotserve.core.ids import InstanceId, RequestId, StepId, instance_of
from spotserve.core.plan import CopyKvDelta, Plan
from spotserve.core.snapshot import Replica
from spotserve.core.wire import ChoicePosition
from spotserve.errors import InvariantError
from spotserve.sim.faults import Faults
from spotserve.sim.streams import Owner
from spotserve.sim.virtual_ledger import Run, VirtualLedger, VirtualRequest
from spotserve.sim.virtual_timeline import VirtualRates, VirtualTimeline

MAX_UNDURABLE_TOKENS = 64


@dataclass(slots=True)
class VirtualReplica:
    """A replica generation: who runs on it and whether it may."""

    replica: Replica
    state: str = "prepared"
    running: dict[RequestId, int] = field(default_factory=dict)
    """request -> iterations of prefill still to do."""
    kv_generation: dict[RequestId, int] = field(default_factory=dict)
    sampled: dict[tuple[RequestId, int], int] = field(default_factory=dict)
    """(request, choice) -> tokens that the leader knows of; kept until the request has ended."""
    is_ticking: bool = False
    resumes: int = 0
    """Times that its leader was told to go on: a quiesce that was asked for before does not come about."""

    @property
    def owner(self) -> Owner:
        """The generation's name in the ledger."""
        return (self.replica.id, self.replica.generation)

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

    def _start(self, virtual: VirtualReplica, admissions: Sequence[cmd.Admission]) -> None:
        for admission in admissions:
            request = self.requests.get(admission.request)
            if request is None or request.ended is not None or (admission.request, 0) in virtual.sampled:
                continue  # It runs here already, or has been sampled to its end.
            kept = {p.choice: p for p in admission.choices if p.kv_tokens}
            self._check_brought(virtual, request, kept)
            moved = all(choice in kept or request.is_closed(choice) for choice in range(request.num_choices))
            if not moved and any(request.rows):
                request.recomputed += request.prompt_tokens
            virtual.running[admission.request] = 0 if moved else 1 + request.prompt_tokens // 64
            virtual.kv_generation[admission.request] = admission.kv_generation
            for choice in range(request.num_choices):
                virtual.sampled[admission.request, choice] = request.durable(choice)
        self._tick_soon(virtual)

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
        deltas = [
            (epoch, step)
            for epoch, plan in self.plans.items()
            for step in (plan.steps if epoch not in self.aborted else ())
            if isinstance(step, CopyKvDelta) and step.route.to_replica == virtual.replica.id
            if any(v.replica.id == step.route.from_replica and request in v.running for v in self.replicas.values())
        ]
        last = max((epoch for epoch, _ in deltas), default=0)
        return [(epoch, step) for epoch, step in deltas if epoch == last]

    def _positions(self, virtual: VirtualReplica) -> tuple[ChoicePosition, ...]:
        """How far every choice is that the leader has not brought to its end."""
        positions = []
        for name, prefill in virtual.running.items():
            request = self.requests[name]
            for choice, length in enumerate(request.lengths):
                tokens = virtual.sampled[name, choice]
                if tokens >= length:
                    continue
                kv_tokens = 0 if prefill else request.prompt_tokens + max(0, tokens - 1)
                positions.append(
                    ChoicePosition(
                        request=name,
                        choice=choice,
                        kv_generation=virtual.kv_generation[name],
                        tokens=tokens,
                        kv_tokens=kv_tokens,
                    )
                )
        return tuple(positions)

    def _resume(self, virtual: VirtualReplica) -> None:
        virtual.resumes += 1
        if virtual.state == "quiesced":
            virtual.state = "serving"
            self._tick_soon(virtual)

    def _close(self, virtual: VirtualReplica, request: RequestId) -> None:
        virtual.running.pop(request, None)
        for key in [key for key in virtual.sampled if key[0] == request]:
            del virtual.sampled[key]

    def _ending(self, request: VirtualRequest) -> ev.Event:
        tokens = tuple(len(rows) for rows in request.rows)
        return ev.RequestEnded.model_validate(
            {"at_s": self.at_s, "request": request.request, "outcome": request.ended, "tokens": tokens}
        )

    def _tick_soon(self, virtual: VirtualReplica) -> None:
        """Go on decoding if there is anything to decode and nobody does."""
        if virtual.state == "serving" and virtual.running and not virtual.is_ticking:
            virtual.is_ticking = True
            slowness = self.faults.iteration_slowness(virtual.leader)
            self.after(self._spread(self.rates.iteration_s) * slowness, lambda: self._iterate(virtual))

    def _iterate(self, virtual: VirtualReplica) -> ev.Event | None:
        """One iteration of a replica: each running choice samples one token, all go to the ledger in one message."""
        virtual.is_ticking = False
        if virtual.state != "serving" or virtual.leader not in self.alive:
            return None
        runs = []
        for name in list(virtual.running)[: virtual.replica.max_running]:
            if virtual.running[name]:
                virtual.running[name] -= 1
            else:
                runs += self._sample(virtual, self.requests[name])
        if runs:
            if self.faults.evicts():
                self._evict(virtual, runs[0].request)
            self._send(virtual, runs)
        self._tick_soon(virtual)
        return None

    def _sample(self, virtual: VirtualReplica, request: VirtualRequest) -> list[Run]:
        runs = []
        for choice, length in enumerate(request.lengths):
            have = virtual.sampled[request.request, choice]
            if have < min(length, request.durable(choice) + MAX_UNDURABLE_TOKENS):
                virtual.sampled[request.request, choice] = have + 1
                runs.append(Run(request.request, choice, have, 1))
        if all(virtual.sampled[request.request, choice] >= n for choice, n in enumerate(request.lengths)):
            virtual.running.pop(request.request, None)
        return runs

    def _evict(self, virtual: VirtualReplica, name: RequestId) -> None:
        """A request's KV blocks go to others; it is prefilled again under a new name of its KV."""
        if name not in virtual.running:
            return
        virtual.running[name] = 1 + self.requests[name].prompt_tokens // 64
        virtual.kv_generation[name] += 1
        replica, generation = virtual.owner
        self.up(
            virtual.leader,
            self._spread(self.rates.step_s),
            lambda: ev.RequestEvicted(at_s=self.at_s, request=name, replica=replica, generation=generation),
        )

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
            elif verdict in ("new", "first"):
                self._note(virtual, request, is_first=verdict == "first")
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
