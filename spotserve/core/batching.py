"""Continuous batching by counting: which tokens of which sequences an iteration computes, who holds how many blocks.

The leader of a replica and the simulator drive the same `Batcher`; it knows numbers of tokens and never a token. First
come, first served by arrival; decodes before prefill chunks inside a token budget; when blocks run out the youngest
sequence is evicted (its KV is dropped, its `kv_generation` raised) and prefills prompt and tokens again later. Up to
`max_in_flight` micro-batches are out at once so that no pipeline stage idles; a sequence is in at most one of them.

Blocks are counted, not named: every rank has tables of its own, and a rank never holds more than what is counted here
because everything freed travels to it before the micro-batch that could need the room.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from spotserve.core.admission import Start
from spotserve.core.ids import RequestId
from spotserve.core.spec import KV_BLOCK_TOKENS
from spotserve.core.wire import MAX_UNDURABLE_TOKENS, ChoicePosition
from spotserve.errors import InvariantError

DEFAULT_TOKEN_BUDGET = 256
"""Rows of one micro-batch: a decode waits at most for a prefill chunk of this size."""


class SequenceKey(NamedTuple):
    """The name of a choice's KV."""

    request: RequestId
    choice: int
    kv_generation: int


@dataclass(frozen=True, slots=True)
class BatchLimits:
    """What bounds a replica's batches."""

    num_blocks: int
    max_running: int
    max_in_flight: int = 1
    token_budget: int = DEFAULT_TOKEN_BUDGET
    block_tokens: int = KV_BLOCK_TOKENS
    max_undurable_tokens: int = MAX_UNDURABLE_TOKENS
    is_static: bool = False
    """A batch is formed when nothing runs, of a power of two sequences, and runs to its end (the paper's artifact)."""

    @classmethod
    def of_replica(cls, *, kv_blocks: int, max_running: int, pipeline: int, is_static: bool = False) -> BatchLimits:
        """The bounds of a replica with so large a KV pool, B and pipeline parallel degree."""
        if is_static:
            return cls(
                num_blocks=kv_blocks,
                max_running=max_running,
                token_budget=KV_BLOCK_TOKENS * (kv_blocks + max_running),  # Whole prompts, all of a batch at once.
                is_static=True,
            )
        return cls(
            num_blocks=kv_blocks,
            max_running=max_running,
            max_in_flight=pipeline,
            token_budget=max(DEFAULT_TOKEN_BUDGET, 2 * max_running),
        )

    def blocks_of(self, num_tokens: int) -> int:
        """Blocks that the KV of `num_tokens` tokens takes."""
        return -(-num_tokens // self.block_tokens)


@dataclass(slots=True)
class Sequence:
    """One open choice. `num_tokens` generated, `kv_tokens` with KV in place, `num_blocks` counted for it."""

    request: RequestId
    choice: int
    kv_generation: int
    arrival_index: int
    prompt_tokens: int
    max_tokens: int
    num_tokens: int = 0
    kv_tokens: int = 0
    durable_tokens: int = 0
    num_blocks: int = 0
    is_running: bool = False
    is_in_flight: bool = False
    is_closing: bool = False
    has_stood_still: bool = False
    """Moved here with its KV, and no iteration since: its client has waited long enough."""

    @classmethod
    def handed_over(
        cls, request: RequestId, choice: int, start: Start, *, arrival_index: int, lengths: tuple[int, int, int]
    ) -> Sequence:
        """A choice as a leader takes it over; `lengths`: tokens of its prompt, at most, and durable so far."""
        prompt_tokens, max_tokens, num_tokens = lengths
        return cls(
            request=request,
            choice=choice,
            kv_generation=start.kv_generation,
            arrival_index=arrival_index,
            prompt_tokens=prompt_tokens,
            max_tokens=max_tokens,
            num_tokens=num_tokens,
            # The last known token is the next input, so its KV is never in place.
            kv_tokens=min(start.kv_tokens or 0, prompt_tokens + num_tokens - 1),
            durable_tokens=num_tokens,
        )

    @property
    def key(self) -> SequenceKey:
        """The name of its KV now."""
        return SequenceKey(self.request, self.choice, self.kv_generation)

    @property
    def age(self) -> tuple[int, int]:
        """What orders sequences: the smaller, the older."""
        return (self.arrival_index, self.choice)

    @property
    def known_tokens(self) -> int:
        """Tokens whose ids are known: prompt and generated."""
        return self.prompt_tokens + self.num_tokens

    @property
    def is_decoding(self) -> bool:
        """Whether only the last known token is without KV, and it was generated."""
        return self.num_tokens > 0 and self.kv_tokens == self.known_tokens - 1

    @property
    def is_complete(self) -> bool:
        """Whether it has all its tokens; one without any, when its prompt has been computed."""
        return self.num_tokens >= self.max_tokens and self.kv_tokens >= self.prompt_tokens


@dataclass(frozen=True, slots=True)
class BatchItem:
    """Tokens [start, start + count) of one sequence; `samples` says that a new token follows from the last one."""

    key: SequenceKey
    start: int
    count: int
    samples: bool


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """The work of one iteration."""

    number: int
    items: tuple[BatchItem, ...]

    @property
    def num_rows(self) -> int:
        """Tokens that go through the layers."""
        return sum(item.count for item in self.items)


@dataclass(slots=True)
class Outcome:
    """What a commit ended: choices at their `max_tokens`."""

    at_length: list[SequenceKey] = field(default_factory=list)


class Batcher:
    """The scheduler of one replica."""

    def __init__(self, limits: BatchLimits) -> None:
        if limits.token_budget < limits.max_running + limits.block_tokens:
            raise InvariantError(
                f"token budget {limits.token_budget} is below {limits.max_running} decodes and one block"
            )
        self.limits = limits
        self.free_blocks = limits.num_blocks
        self.num_iterations = 0
        self.num_prefilled_tokens = 0
        self.num_evictions = 0
        self._sequences: dict[tuple[RequestId, int], Sequence] = {}
        self._in_flight: dict[int, MicroBatch] = {}
        self._next_number = 0
        self._is_paused = False
        self._freed: list[SequenceKey] = []
        self._evicted: list[SequenceKey] = []

    # Requests

    def fits(self, *, prompt_tokens: int, max_tokens: int) -> bool:
        """Whether the pool could ever hold such a sequence alone."""
        return self.limits.blocks_of(prompt_tokens + max(1, max_tokens) - 1) <= self.limits.num_blocks

    def admit(self, sequence: Sequence) -> bool:
        """Take a choice over; False (and nothing changes) if it is already here.

        One with KV in place gets its blocks at once, younger sequences make room; if even that is not enough it is
        evicted itself.
        """
        name = (sequence.request, sequence.choice)
        if name in self._sequences:
            return False
        if not self.fits(prompt_tokens=sequence.prompt_tokens, max_tokens=sequence.max_tokens):
            num_tokens = sequence.prompt_tokens + sequence.max_tokens
            raise InvariantError(f"sequence of {num_tokens} tokens exceeds {self.limits.num_blocks} blocks")
        self._sequences[name] = sequence
        if sequence.kv_tokens:
            self._take_over(sequence)
            sequence.has_stood_still = sequence.is_decoding
        return True

    def close(self, request: RequestId, choice: int | None = None) -> list[SequenceKey]:
        """End choices of a request and free their KV, that of one in flight when its micro-batch is back.

        Returns the keys that were open.
        """
        closed = []
        for sequence in list(self._sequences.values()):
            if sequence.request == request and choice in (None, sequence.choice) and not sequence.is_closing:
                closed.append(sequence.key)
                if sequence.is_in_flight:
                    sequence.is_closing = True
                else:
                    self._remove(sequence)
        return closed

    def set_durable(self, request: RequestId, choice: int, num_tokens: int) -> None:
        """The ledger holds so many tokens of a choice. Unknown choices have ended meanwhile."""
        sequence = self._sequences.get((request, choice))
        if sequence is not None:
            sequence.durable_tokens = max(sequence.durable_tokens, num_tokens)

    # Iterations

    def schedule(self) -> MicroBatch | None:
        """The next micro-batch, or None when there is nothing to do now."""
        if self._is_paused or len(self._in_flight) >= self.limits.max_in_flight:
            return None
        self._start_waiting()
        items: list[BatchItem] = []
        self._add_decodes(items)
        if not self._is_catching_up(items):
            self._add_chunks(items)
        if not items:
            return None
        batch = MicroBatch(self._next_number, tuple(items))
        self._next_number += 1
        self._in_flight[batch.number] = batch
        for item in items:
            self._of(item.key).is_in_flight = True
        return batch

    def commit(self, number: int, stopped: Collection[SequenceKey] = ()) -> Outcome:
        """A micro-batch is back: its KV is in place and each sampling item has one more token.

        `stopped` are the keys whose new token ended them (EOS). Sequences that end are removed.
        """
        batch = self._in_flight.pop(number)
        outcome = Outcome()
        self.num_iterations += 1
        for item in batch.items:
            sequence = self._of(item.key)
            sequence.is_in_flight = sequence.has_stood_still = False
            if not sequence.is_decoding:
                self.num_prefilled_tokens += item.count
            sequence.kv_tokens = item.start + item.count
            sequence.num_tokens += item.samples
            if sequence.is_complete and item.key not in stopped:
                outcome.at_length.append(item.key)
            if sequence.is_closing or sequence.is_complete or item.key in stopped:
                self._remove(sequence)
        return outcome

    def steps_until_change(self) -> int:
        """How many more tokens every running sequence gets before any decision: rounds of the same micro-batches.

        0 unless all that runs is out, each with one decode, and nobody who waits could start. Within so many rounds no
        sequence ends, none is evicted and none meets the bound of undurable tokens, so `advance` may do them at once.
        """
        running = [sequence for sequence in self._sequences.values() if sequence.is_running]
        if self._is_paused or not running or self._could_start() or any(map(self._is_in_a_change, running)):
            return 0
        if any(len(batch.items) > self._share() for batch in self._in_flight.values()):
            return 0  # It would be cut in two when it is back.
        most = min(
            min(
                sequence.max_tokens - sequence.num_tokens,
                self.limits.max_undurable_tokens - (sequence.num_tokens - sequence.durable_tokens),
            )
            for sequence in running
        )
        steps = max(0, most - 1)
        while steps and self._blocks_for(running, steps) > self.free_blocks:
            steps -= 1
        return steps

    def advance(self, steps: int) -> None:
        """Do so many rounds of the micro-batches that are out, at most `steps_until_change()`; they stay out."""
        if steps == 0:
            return
        for sequence in self._sequences.values():
            if not sequence.is_running:
                continue
            self._take_blocks(sequence, self._blocks_for([sequence], steps))
            sequence.num_tokens += steps
            sequence.kv_tokens += steps
            sequence.has_stood_still = False
        for number, batch in self._in_flight.items():
            items = tuple(replace(item, start=item.start + steps) for item in batch.items)
            self._in_flight[number] = MicroBatch(number, items)
        self.num_iterations += steps * len(self._in_flight)

    def take_freed(self) -> list[SequenceKey]:
        """Keys whose KV the ranks must drop before the next micro-batch; each is told once."""
        freed, self._freed = self._freed, []
        return freed

    def take_evicted(self) -> list[SequenceKey]:
        """Sequences evicted since the last call, under their new `kv_generation`."""
        evicted, self._evicted = self._evicted, []
        return evicted

    # Quiesce

    def pause(self) -> None:
        """Schedule nothing new; what is in flight comes back."""
        self._is_paused = True

    def resume(self) -> None:
        """Schedule again."""
        self._is_paused = False

    @property
    def num_in_flight(self) -> int:
        """Micro-batches that are out."""
        return len(self._in_flight)

    @property
    def num_running(self) -> int:
        """Sequences that hold a running place."""
        return sum(sequence.is_running for sequence in self._sequences.values())

    def sequences(self) -> Iterator[Sequence]:
        """Open sequences, oldest first."""
        return iter(sorted(self._sequences.values(), key=lambda sequence: sequence.age))

    def positions(self) -> tuple[ChoicePosition, ...]:
        """How far every open choice is, oldest first."""
        return tuple(
            ChoicePosition(
                request=sequence.request,
                choice=sequence.choice,
                kv_generation=sequence.kv_generation,
                tokens=sequence.num_tokens,
                kv_tokens=sequence.kv_tokens,
            )
            for sequence in self.sequences()
            if not sequence.is_closing
        )

    def find(self, key: SequenceKey) -> Sequence | None:
        """The open sequence under this key."""
        sequence = self._sequences.get((key.request, key.choice))
        return sequence if sequence is not None and sequence.key == key and not sequence.is_closing else None

    def in_flight(self, number: int) -> MicroBatch:
        """A micro-batch that is out."""
        return self._in_flight[number]

    def is_open(self, key: SequenceKey) -> bool:
        """Whether a sequence is here under this key and nobody closed it."""
        return self.find(key) is not None

    def drop_kv(self, request: RequestId, choice: int) -> None:
        """A rank turned out not to hold this choice's KV: prefill it again under a new kv_generation."""
        sequence = self._sequences.get((request, choice))
        if sequence is not None and not sequence.is_in_flight:
            self._evict(sequence)

    # Inside

    def _of(self, key: SequenceKey) -> Sequence:
        return self._sequences[(key.request, key.choice)]

    def _running(self) -> list[Sequence]:
        """Running sequences that may go into a batch now, oldest first."""
        return [
            sequence
            for sequence in self.sequences()
            if sequence.is_running and not sequence.is_in_flight and not sequence.is_closing
        ]

    def _may_generate(self, sequence: Sequence) -> bool:
        return sequence.num_tokens - sequence.durable_tokens < self.limits.max_undurable_tokens

    def _is_in_a_change(self, sequence: Sequence) -> bool:
        """Whether a running sequence is anything but out with one decode."""
        return not sequence.is_in_flight or sequence.is_closing or not sequence.is_decoding

    def _blocks_for(self, running: list[Sequence], steps: int) -> int:
        """Blocks that these take beyond what they have until their next decode after `steps` more."""
        return sum(
            max(0, self.limits.blocks_of(sequence.kv_tokens + steps + 1) - sequence.num_blocks) for sequence in running
        )

    def _could_start(self) -> bool:
        """Whether the first that waits would get a running place."""
        if self.limits.is_static:
            return False
        first = next((sequence for sequence in self.sequences() if not sequence.is_running), None)
        num_running = self.num_running
        return first is not None and num_running < self.limits.max_running and self._fits_now(first, num_running)

    def _fits_now(self, sequence: Sequence, num_running: int) -> bool:
        extra = self.limits.blocks_of(sequence.known_tokens) - sequence.num_blocks
        spare = 1 if num_running else 0  # One block left for a decode, else the newcomer is evicted at once.
        return extra <= 0 or extra + spare <= self.free_blocks

    def _start_waiting(self) -> None:
        """Give running places in order of arrival; the first that does not fit holds up the rest, so none starves."""
        num_running = self.num_running
        if num_running >= self.limits.max_running:
            return
        for sequence in self._next_waiting(num_running):
            if num_running == 0:
                self._evict_waiting_for(sequence)
            if num_running >= self.limits.max_running or not self._fits_now(sequence, num_running):
                return
            self._take_blocks(sequence, max(0, self.limits.blocks_of(sequence.known_tokens) - sequence.num_blocks))
            sequence.is_running = True
            num_running += 1

    def _evict_waiting_for(self, first: Sequence) -> None:
        """Nobody runs, so nobody will free a block: of those that wait with their KV, the youngest give way."""
        holders = [other for other in self._sequences.values() if other.num_blocks and other.age > first.age]
        while holders and not self._fits_now(first, 0):
            youngest = max(holders, key=lambda other: other.age)
            holders.remove(youngest)
            self._evict(youngest)

    def _next_waiting(self, num_running: int) -> list[Sequence]:
        """Who may start, oldest first. Nobody joins a static batch; one that was interrupted goes on as it was."""
        waiting = [sequence for sequence in self.sequences() if not sequence.is_running]
        if not self.limits.is_static or not waiting:
            return waiting
        if num_running:
            return []
        resumed = [sequence for sequence in waiting if sequence.kv_tokens]
        return resumed or waiting[: 1 << (min(len(waiting), self.limits.max_running).bit_length() - 1)]

    def _share(self) -> int:
        """Decodes of one micro-batch."""
        return -(-self.num_running // self.limits.max_in_flight)

    def _add_decodes(self, items: list[BatchItem]) -> None:
        """An even share of the decoding sequences, so that the micro-batches of a pipeline are of a size."""
        share = self._share()
        for sequence in self._running():
            if len(items) >= share:
                return
            if not sequence.is_running or not sequence.is_decoding or not self._may_generate(sequence):
                continue  # It may have been evicted for an older one a moment ago.
            if self._make_room(sequence):
                items.append(BatchItem(sequence.key, sequence.kv_tokens, 1, samples=True))

    def _is_catching_up(self, items: list[BatchItem]) -> bool:
        """Whether a sequence has its first iteration here after a move: no prefill shall make that stall longer.

        Only what is in this micro-batch or out with another counts, so this ends within one iteration.
        """
        keys = {item.key for item in items}
        return any(
            sequence.has_stood_still and (sequence.is_in_flight or sequence.key in keys)
            for sequence in self._sequences.values()
        )

    def _add_chunks(self, items: list[BatchItem]) -> None:
        """Prefill chunks with what is left of the budget, ending at a block's end unless they end the prefill."""
        left = self.limits.token_budget - len(items)
        for sequence in self._running():
            if sequence.is_decoding or not self._may_generate(sequence):
                continue
            stop = min(sequence.known_tokens, sequence.kv_tokens + left)
            if stop < sequence.known_tokens:
                stop -= stop % self.limits.block_tokens
            count = stop - sequence.kv_tokens
            if count <= 0:
                return
            samples = stop == sequence.known_tokens and sequence.max_tokens > 0
            items.append(BatchItem(sequence.key, sequence.kv_tokens, count, samples=samples))
            left -= count

    def _make_room(self, sequence: Sequence) -> bool:
        """One more block for a decode if it needs one; evicts younger sequences, at last the sequence itself."""
        extra = self.limits.blocks_of(sequence.kv_tokens + 1) - sequence.num_blocks
        if extra <= 0:
            return True
        while self.free_blocks < extra:
            holders = [other for other in self._sequences.values() if other.num_blocks and other.age >= sequence.age]
            victims = [other for other in holders if not other.is_in_flight]
            victim = max(victims, key=lambda other: other.age)
            if victim is sequence and len(victims) < len(holders):
                return False  # A younger one is out with a micro-batch; its blocks can be had when it is back.
            self._evict(victim)
            if victim is sequence:
                return False
        self._take_blocks(sequence, extra)
        return True

    def _take_over(self, sequence: Sequence) -> None:
        extra = self.limits.blocks_of(sequence.kv_tokens)
        while self.free_blocks < extra:
            victims = [
                other
                for other in self._sequences.values()
                if other.num_blocks and not other.is_in_flight and other.age > sequence.age
            ]
            if not victims:
                self._evict(sequence)
                return
            self._evict(max(victims, key=lambda other: other.age))
        self._take_blocks(sequence, extra)

    def _take_blocks(self, sequence: Sequence, count: int) -> None:
        if count > self.free_blocks:
            raise InvariantError(f"{count} blocks asked for, {self.free_blocks} free")
        self.free_blocks -= count
        sequence.num_blocks += count

    def _return_blocks(self, sequence: Sequence) -> None:
        self.free_blocks += sequence.num_blocks
        sequence.num_blocks = 0
        self._freed.append(sequence.key)

    def _evict(self, sequence: Sequence) -> None:
        self._return_blocks(sequence)
        sequence.kv_generation += 1
        sequence.kv_tokens = 0
        sequence.is_running = False
        self.num_evictions += 1
        self._evicted.append(sequence.key)

    def _remove(self, sequence: Sequence) -> None:
        self._return_blocks(sequence)
        del self._sequences[(sequence.request, sequence.choice)]
