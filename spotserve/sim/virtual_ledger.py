"""The ledger in virtual time: the single owner of committed tokens, which refuses whoever does not own a request.

It outlives a coordinator. Clients read what is durable in it and nothing else; after a restart they go on where they
were.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from spotserve.core.ids import RequestId
from spotserve.sim.streams import ClientStream, Owner, StreamedToken, virtual_token


class Run(NamedTuple):
    """`num_tokens` tokens of a choice from `position` on, as a leader sends them."""

    request: RequestId
    choice: int
    position: int
    num_tokens: int


Verdict = Literal["new", "first", "double", "gap", "late", "fenced"]
"""What became of a run; `first` is new and the first of its owner."""


@dataclass(slots=True)
class VirtualRequest:
    """What the ledger keeps of one request."""

    request: RequestId
    prompt_tokens: int
    max_tokens: int
    lengths: tuple[int, ...]
    arrival_index: int = 0
    owner: Owner | None = None
    rows: list[list[StreamedToken]] = field(default_factory=list)
    stream: ClientStream = field(init=False)
    reads_late: bool = False
    """A slow reader: it reads when it is woken, not at each commit."""
    recomputed: int = 0
    last_token_s: float | None = None
    stall_s: float = 0.0
    first_by: set[Owner] = field(default_factory=set)
    ended: str | None = None

    def __post_init__(self) -> None:
        self.rows = [[] for _ in self.lengths]
        self.stream = ClientStream(self.request, self.lengths, self.max_tokens)

    @property
    def num_choices(self) -> int:
        """Choices of the request."""
        return len(self.lengths)

    def durable(self, choice: int) -> int:
        """Durable tokens of a choice."""
        return len(self.rows[choice])

    def is_closed(self, choice: int) -> bool:
        """Whether nothing more can come of a choice."""
        return self.ended is not None or len(self.rows[choice]) >= self.lengths[choice]

    @property
    def is_complete(self) -> bool:
        """Whether every choice is where the model ends it."""
        return all(len(rows) >= length for rows, length in zip(self.rows, self.lengths, strict=True))

    def read(self) -> None:
        """The client reads all that is durable and that it has not read."""
        have = Counter(token.choice for token in self.stream.tokens)
        for choice, rows in enumerate(self.rows):
            self.stream.tokens.extend(rows[have[choice] :])
        self.stream.ended = self.ended


class VirtualLedger:
    """Every request ever offered, and who may append to it."""

    def __init__(self) -> None:
        self.requests: dict[RequestId, VirtualRequest] = {}
        self.fenced: set[Owner] = set()
        self.refused: Counter[str] = Counter()
        """Runs that were not appended, by verdict."""

    def append(self, owner: Owner, run: Run, *, at_s: float, after_entry: int) -> Verdict:
        """Make tokens durable as far as they are the owner's to append, and new."""
        verdict = self._judge(owner, run)
        if verdict not in ("new", "first"):
            self.refused[verdict] += 1
            return verdict
        request = self.requests[run.request]
        rows = request.rows[run.choice]
        for position in range(len(rows), run.position + run.num_tokens):
            token = virtual_token(run.request, run.choice, position)
            row = StreamedToken(run.choice, position, token, owner, after_entry, at_s)
            rows.append(row)
            if not request.reads_late:
                request.stream.tokens.append(row)
        request.first_by.add(owner)
        return verdict

    def _judge(self, owner: Owner, run: Run) -> Verdict:
        request = self.requests.get(run.request)
        if request is None:
            return "late"
        if request.owner != owner or owner in self.fenced:
            return "fenced"
        known = request.durable(run.choice)
        if request.is_closed(run.choice):
            return "late"
        if run.position > known:
            return "gap"
        if run.position + run.num_tokens <= known:
            return "double"
        return "new" if owner in request.first_by else "first"

    def set_owners(self, owners: Mapping[RequestId, Owner | None]) -> None:
        """Hand requests to other replica generations."""
        for name, owner in owners.items():
            self.requests[name].owner = owner

    def end(self, request: VirtualRequest, outcome: str) -> bool:
        """Store how a request ended; only the first end counts, and True says that this was it."""
        if request.ended is not None:
            return False
        request.ended = outcome
        request.read()
        return True

    def forget_unjournaled(self, known: Iterable[RequestId]) -> None:
        """At a restart: open requests that never reached the journal were never accepted."""
        kept = set(known)
        for name, request in tuple(self.requests.items()):
            if name not in kept and request.ended is None and not request.stream.accepted:
                del self.requests[name]

    def read_all(self) -> None:
        """Every client reads on, as after a new connection."""
        for request in self.requests.values():
            request.read()
