"""The tokens of a simulation: who may append, what each stream saw, and how each request ended.

Tokens are counted by position and have no value: one that leaves a gap, comes twice or comes from somebody who does
not own the request is an error of ours and ends the simulation.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from spotserve.core.ids import ReplicaId, RequestId
from spotserve.errors import InvariantError

Owner = tuple[ReplicaId, int]


@dataclass(slots=True)
class StreamRecord:
    """One choice as its client sees it."""

    num_tokens: int = 0
    first_at_s: float | None = None
    last_at_s: float | None = None
    stall_s: float = 0.0
    """The longest gap between two tokens."""
    closed: bool = False


@dataclass(slots=True)
class RequestRecord:
    """One accepted request."""

    request: RequestId
    arrival_index: int
    arrived_at_s: float
    prompt_tokens: int
    max_tokens: int
    output_tokens: int
    """Where the model would end; at most `max_tokens`."""
    deliver_s: float = 0.0
    """From the leader to the client, for every token alike; the times of a stream are the leader's."""
    num_choices: int = 1
    owner: Owner | None = None
    streams: list[StreamRecord] = field(default_factory=list)
    first_by: set[Owner] = field(default_factory=set)
    to_recompute: int = 0
    recomputed_tokens: int = 0
    ended: str | None = None
    ended_at_s: float | None = None

    def __post_init__(self) -> None:
        self.streams = [StreamRecord() for _ in range(self.num_choices)]

    @property
    def num_tokens(self) -> int:
        """Tokens of all choices."""
        return sum(stream.num_tokens for stream in self.streams)

    @property
    def stall_s(self) -> float:
        """The longest gap any of its streams saw."""
        return max(stream.stall_s for stream in self.streams)

    @property
    def last_at_s(self) -> float | None:
        """When its latest token came."""
        times = [stream.last_at_s for stream in self.streams if stream.last_at_s is not None]
        return max(times, default=None)


@dataclass(frozen=True, slots=True)
class Sampled:
    """`count` tokens of one choice from `position` on, the first at `first_at_s` and the last at `last_at_s`."""

    request: RequestId
    choice: int
    position: int
    count: int
    first_at_s: float
    last_at_s: float
    longest_gap_s: float = 0.0
    """Between two of them."""


class SimulatedLedger:
    """Every request ever accepted."""

    def __init__(self) -> None:
        self.records: dict[RequestId, RequestRecord] = {}
        self._fenced: set[Owner] = set()

    def accept(self, record: RequestRecord) -> None:
        """A new request."""
        self.records[record.request] = record

    def fence(self, owner: Owner) -> None:
        """Nothing that this generation says counts any more."""
        self._fenced.add(owner)

    def append(self, owner: Owner, sampled: Sampled) -> bool:
        """Take tokens; True when they are the first of this owner. Raises InvariantError for a wrong one."""
        record = self.records[sampled.request]
        if record.owner != owner or owner in self._fenced:
            raise InvariantError(f"{owner} appends to {sampled.request}, which belongs to {record.owner}")
        stream = record.streams[sampled.choice]
        if stream.closed or sampled.position != stream.num_tokens:
            raise InvariantError(
                f"{sampled.request} has {stream.num_tokens} tokens of choice {sampled.choice}, offered is position "
                f"{sampled.position}"
            )
        self._note_times(stream, sampled)
        stream.num_tokens += sampled.count
        stream.closed = stream.num_tokens >= record.output_tokens
        is_first = owner not in record.first_by
        record.first_by.add(owner)
        return is_first

    @staticmethod
    def _note_times(stream: StreamRecord, sampled: Sampled) -> None:
        if stream.last_at_s is not None:
            stream.stall_s = max(stream.stall_s, sampled.first_at_s - stream.last_at_s)
        stream.stall_s = max(stream.stall_s, sampled.longest_gap_s)
        if stream.first_at_s is None:
            stream.first_at_s = sampled.first_at_s
        stream.last_at_s = sampled.last_at_s
