"""What a journal has of the world, without what the controller made of it: the scenario of a counterfactual.

Capacity is told as a trace: when instances were ready, were noticed, and went by themselves. What the controller did to
them (the kill at a deadline) is left out, as another policy would bring it about again or not. Requests come with the
tokens that were really generated, so that another policy has the same work to do.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from spotserve.core import commands as cmd
from spotserve.core import events as ev
from spotserve.core.controller import Entry
from spotserve.core.ids import InstanceId, RequestId, natural_key
from spotserve.core.snapshot import Market
from spotserve.core.spec import ServingSpec
from spotserve.core.state import ClusterState
from spotserve.core.trace import Trace, TraceEvent
from spotserve.errors import SpecError


@dataclass(frozen=True, slots=True)
class RecordedRequest:
    """One accepted request: what it asked for, and how it went.

    Attributes:
        at_s: arrival; 0.0 for one that was open already where the record begins.
        output_tokens: durable tokens per choice at its end; None for one that was open when the record ends.
        ended_at_s: None for one that was open when the record ends.
        outcome: `finished`, `cancelled` or `failed`; None for an open one.
        cancelled_at_s: when its client went away.
        stall_ms_max: the longest gap that its stream saw when its owner changed.
    """

    request: RequestId
    at_s: float
    prompt_tokens: int
    num_choices: int
    max_tokens: int
    timeout_s: float | None = None
    output_tokens: tuple[int, ...] | None = None
    first_token_at_s: float | None = None
    ended_at_s: float | None = None
    outcome: str | None = None
    cancelled_at_s: float | None = None
    stall_ms_max: float = 0.0

    @property
    def work_tokens(self) -> tuple[int, ...]:
        """Tokens per choice that another run has to generate: those of the record, `max_tokens` of an open one."""
        return (self.max_tokens,) * self.num_choices if self.output_tokens is None else self.output_tokens


@dataclass(frozen=True, slots=True)
class RecordedInstance:
    """One instance that was asked for; not `ready_at_s` if it never came up, not `gone_at_s` while it lives."""

    instance: InstanceId
    market: Market
    asked_at_s: float
    num_gpus: int = 0
    memory_bytes: int = 0
    gpu_type: str = ""
    ready_at_s: float | None = None
    gone_at_s: float | None = None


@dataclass(frozen=True, slots=True)
class RecordedScenario:
    """What happened to a daemon: the spec it served by, its capacity, its requests. Times count from its begin.

    Attributes:
        trace: capacity as the simulator plays it; its ids are dealt in the order in which instances were ready.
        instances: all that were asked for, by their own ids: what they cost.
        begins_s: where in the journal it begins; not 0.0 if older entries were cut.
    """

    spec: ServingSpec
    trace: Trace
    requests: tuple[RecordedRequest, ...]
    instances: tuple[RecordedInstance, ...]
    begins_s: float
    duration_s: float

    @property
    def gpus_per_instance(self) -> int:
        """GPUs of the largest instance; 1 if none ever came up."""
        return max((one.num_gpus for one in self.instances), default=0) or 1

    @property
    def gpu_memory_bytes(self) -> int:
        """The least memory budget of any GPU; 0 if none ever came up."""
        return min((one.memory_bytes for one in self.instances if one.memory_bytes), default=0)


def recorded_scenario(entries: Iterable[Entry], *, base: ClusterState | None = None) -> RecordedScenario:
    """The scenario that a journal records.

    Args:
        entries: of the journal, in order.
        base: the fold of all entries before, if they were cut.

    Raises:
        SpecError: the entries do not say what was served.
    """
    record = _Record(begins_s=0.0 if base is None else base.at_s)
    if base is not None:
        record.continue_from(base)
    for entry in entries:
        record.take(entry)
    if record.spec is None:
        raise SpecError("the journal has no first entry, so it does not say what was served")
    return RecordedScenario(
        spec=record.spec,
        trace=record.trace(),
        requests=tuple(record.requests.values()),
        instances=tuple(record.instances.values()),
        begins_s=record.begins_s,
        duration_s=record.now_s,
    )


@dataclass(slots=True)
class _Notice:
    """The cloud's last word about an instance."""

    at_s: float
    deadline_s: float


@dataclass(slots=True)
class _Record:
    """Collects entry by entry; `now_s` is the latest time, all times count from `begins_s`."""

    begins_s: float
    now_s: float = 0.0
    spec: ServingSpec | None = None
    requests: dict[RequestId, RecordedRequest] = field(default_factory=dict)
    instances: dict[InstanceId, RecordedInstance] = field(default_factory=dict)
    first: set[InstanceId] = field(default_factory=set)
    """Instances that the record begins with."""
    workers: dict[InstanceId, set[str]] = field(default_factory=dict)
    notices: dict[InstanceId, list[_Notice]] = field(default_factory=dict)
    taken: dict[InstanceId, float] = field(default_factory=dict)
    """Instances that went without our doing, and when."""
    condemned: set[InstanceId] = field(default_factory=set)
    """Instances that the controller was about to kill at their deadline."""
    notes: list[str] = field(default_factory=list)

    def continue_from(self, base: ClusterState) -> None:
        """What there is already."""
        self.spec = base.spec
        for name, instance in base.instances.items():
            if instance.state == "gone":
                continue
            is_up = instance.state in ("ready", "doomed")
            self.instances[name] = RecordedInstance(
                instance=name,
                market=instance.market,
                asked_at_s=0.0,
                num_gpus=instance.num_gpus,
                memory_bytes=min((gpu.memory_bytes for gpu in instance.gpus), default=0),
                gpu_type=instance.gpus[0].type if instance.gpus else "",
                ready_at_s=0.0 if is_up else None,
            )
            self.workers[name] = {gpu.id for gpu in instance.gpus}
            if is_up:
                self.first.add(name)
            if instance.deadline_at_s is not None:
                self.notices[name] = [_Notice(0.0, max(0.0, instance.deadline_at_s - self.begins_s))]
            if instance.condemned == "deadline":
                self.condemned.add(name)
        for request in sorted(base.requests.values(), key=lambda request: request.arrival_index):
            self.requests[request.id] = RecordedRequest(
                request=request.id,
                at_s=0.0,
                prompt_tokens=request.prompt_tokens,
                num_choices=request.num_choices,
                max_tokens=request.max_tokens,
                timeout_s=None if request.deadline_at_s is None else max(0.0, request.deadline_at_s - self.begins_s),
            )

    def take(self, entry: Entry) -> None:
        """Note one entry."""
        event = entry.event
        # Events of a restart may be older than what the journal has already: the controller's clock never goes back.
        at_s = max(0.0, event.at_s - self.begins_s)
        self.now_s = max(self.now_s, at_s)
        if isinstance(event, ev.JournalBegun):
            self.spec = event.spec
        elif isinstance(event, ev.CoordinatorRestarted):
            self.notes.append(f"the coordinator's restart at {self.now_s:.3f} s is left out")
        elif isinstance(event, ev.RequestAccepted | ev.FirstToken | ev.RequestEnded | ev.CancelRequested):
            self._request(event, at_s)
        else:
            self._capacity(event, self.now_s)
        for command in entry.commands:
            if isinstance(command, cmd.LaunchInstance) and command.instance not in self.instances:
                asked = RecordedInstance(command.instance, command.market, self.now_s)
                self.instances[command.instance] = asked
                if isinstance(event, ev.JournalBegun):
                    self.first.add(command.instance)
            elif isinstance(command, cmd.KillInstance) and command.reason == "deadline":
                self.condemned.add(command.instance)

    def _request(
        self, event: ev.RequestAccepted | ev.FirstToken | ev.RequestEnded | ev.CancelRequested, at_s: float
    ) -> None:
        known = self.requests.get(event.request)
        if isinstance(event, ev.RequestAccepted):
            known = RecordedRequest(
                request=event.request,
                at_s=at_s,
                prompt_tokens=event.prompt_tokens,
                num_choices=event.num_choices,
                max_tokens=event.sampling.max_tokens,
                timeout_s=event.timeout_s,
            )
        elif known is None or known.ended_at_s is not None:
            return
        elif isinstance(event, ev.FirstToken):
            known = replace(
                known,
                first_token_at_s=at_s if known.first_token_at_s is None else known.first_token_at_s,
                stall_ms_max=max(known.stall_ms_max, event.stall_ms),
            )
        elif isinstance(event, ev.RequestEnded):
            known = replace(known, ended_at_s=at_s, outcome=event.outcome, output_tokens=event.tokens)
        else:
            known = replace(known, cancelled_at_s=at_s)
        self.requests[event.request] = known

    def _capacity(self, event: ev.Event, at_s: float) -> None:
        name = getattr(event, "instance", None)
        known = self.instances.get(name) if name is not None else None
        if name is None or known is None or known.gone_at_s is not None:
            return
        if isinstance(event, ev.WorkerRegistered):
            self._registered(known, event, at_s)
        elif isinstance(event, ev.NoticeReceived):
            self.notices.setdefault(name, []).append(_Notice(at_s, at_s + event.grace_s))
        elif isinstance(event, ev.NoticeWithdrawn):
            if self.notices.pop(name, None) is not None:
                self.notes.append(f"the notice of {name}, withdrawn at {at_s:.3f} s, is left out")
        elif isinstance(event, ev.KillRequested):
            self.taken.setdefault(name, at_s)
        elif isinstance(event, ev.InstanceLost):
            self.instances[name] = replace(known, gone_at_s=at_s)
            if name not in self.condemned:
                self.taken.setdefault(name, at_s)

    def _registered(self, known: RecordedInstance, event: ev.WorkerRegistered, at_s: float) -> None:
        workers = self.workers.setdefault(known.instance, set())
        workers.add(event.worker)
        memory_bytes = min(known.memory_bytes or event.memory_bytes, event.memory_bytes)
        is_up = known.ready_at_s is None and len(workers) >= event.num_gpus
        self.instances[known.instance] = replace(
            known,
            num_gpus=event.num_gpus,
            memory_bytes=memory_bytes,
            gpu_type=event.gpu_type,
            ready_at_s=at_s if is_up else known.ready_at_s,
        )

    def trace(self) -> Trace:
        """Capacity as a trace, under new ids: those that came up, in the order in which they did."""
        up = [one for one in self.instances.values() if one.ready_at_s is not None]
        up.sort(key=lambda one: (self._added_s(one), natural_key(one.instance)))
        ids = {one.instance: InstanceId(f"i{index}") for index, one in enumerate(up)}
        events: list[TraceEvent] = []
        for one in up:
            events += self._life(one, ids[one.instance])
        never = [name for name, one in self.instances.items() if one.ready_at_s is None]
        notes = [*self.notes, *(f"{name} was asked for and never ready: left out" for name in never)]
        # Of one moment what is added comes first, in the order of ids, as the sort is stable.
        events.sort(key=lambda event: (event.at_s, event.kind != "add"))
        return Trace(name="recorded", events=tuple(events), end_s=self.now_s, source="a journal", notes=tuple(notes))

    def _added_s(self, one: RecordedInstance) -> float:
        """When it is there: what the record begins with is there at once."""
        assert one.ready_at_s is not None
        return 0.0 if one.instance in self.first else one.ready_at_s

    def _life(self, one: RecordedInstance, name: InstanceId) -> list[TraceEvent]:
        """What the trace says of one instance."""
        added_s = self._added_s(one)
        events = [
            TraceEvent(at_s=added_s, kind="add", instances=(name,), gpu_type=one.gpu_type, market=one.market),
        ]
        for notice in self.notices.get(one.instance, []):
            at_s = max(notice.at_s, added_s)
            grace_s = round(max(0.0, notice.deadline_s - at_s), 6)
            events.append(TraceEvent(at_s=at_s, kind="notice", instances=(name,), grace_s=grace_s))
        if one.instance in self.taken:
            at_s = max(self.taken[one.instance], added_s)
            events.append(TraceEvent(at_s=at_s, kind="kill", instances=(name,)))
        return events
