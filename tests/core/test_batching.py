"""The batcher against a rank that really keeps tables: nothing starves, nothing is allocated twice or left behind."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest

from spotserve.core.batching import Batcher, BatchItem, BatchLimits, MicroBatch, Sequence, SequenceKey
from spotserve.core.ids import RequestId
from spotserve.errors import InvariantError

LIMITS = BatchLimits(num_blocks=64, max_running=4, token_budget=48)


@dataclass
class Rank:
    """The KV of one rank, kept by key: it obeys descriptors and knows nothing of the batcher's counting."""

    limits: BatchLimits
    kv_tokens: dict[SequenceKey, int] = field(default_factory=dict)

    def execute(self, freed: list[SequenceKey], batch: MicroBatch) -> None:
        """Drop what is freed, then compute: a start must be where this rank's KV ends, and there must be room."""
        for key in freed:
            self.kv_tokens.pop(key, None)
        for item in batch.items:
            assert self.kv_tokens.get(item.key, 0) == item.start
            self.kv_tokens[item.key] = item.start + item.count
        assert self.num_blocks() <= self.limits.num_blocks

    def num_blocks(self) -> int:
        """Blocks in use."""
        return sum(self.limits.blocks_of(tokens) for tokens in self.kv_tokens.values())


def sequence(index: int, *, prompt: int = 20, max_tokens: int = 8, choice: int = 0) -> Sequence:
    """A choice that arrives as number `index`."""
    return Sequence(
        request=RequestId(f"q{index}"),
        choice=choice,
        kv_generation=0,
        arrival_index=index,
        prompt_tokens=prompt,
        max_tokens=max_tokens,
    )


def keys_of(batch: MicroBatch | None) -> list[str]:
    """The requests of a batch."""
    return [] if batch is None else [item.key.request for item in batch.items]


def drive(batcher: Batcher, rank: Rank, rng: random.Random, *, keep_up: bool = True) -> Iterator[MicroBatch]:
    """Run until nothing is left to do, with micro-batches out as the limits allow; yields each as it commits."""
    out: list[MicroBatch] = []
    while True:
        batch = batcher.schedule()
        if batch is not None:
            rank.execute(batcher.take_freed(), batch)
            out.append(batch)
        if out and (batch is None or rng.random() < 0.5):
            done = out.pop(0)
            batcher.commit(done.number)
            if keep_up:
                for sequence in batcher.sequences():
                    batcher.set_durable(sequence.request, sequence.choice, sequence.num_tokens)
            yield done
        elif batch is None:
            return


@pytest.mark.parametrize("case", range(60))
def test_everything_finishes_and_fits(case: int) -> None:
    """Tests that random loads end with every token generated, no rank over its pool and every block given back."""
    rng = random.Random(case)
    limits = BatchLimits(
        num_blocks=rng.randint(12, 40),
        max_running=rng.randint(1, 6),
        max_in_flight=rng.randint(1, 3),
        token_budget=rng.randint(24, 80),
    )
    batcher, rank = Batcher(limits), Rank(limits)
    wanted: dict[str, int] = {}
    for index in range(rng.randint(3, 12)):
        new = sequence(index, prompt=rng.randint(1, 120), max_tokens=rng.randint(1, 60), choice=rng.randint(0, 2))
        batcher.admit(new)
        wanted[new.request] = new.max_tokens
    sampled: dict[str, int] = {}
    for batch in drive(batcher, rank, rng):
        assert batch.num_rows <= limits.token_budget
        for item in batch.items:
            sampled[item.key.request] = sampled.get(item.key.request, 0) + item.samples
    assert wanted == sampled
    assert limits.num_blocks == batcher.free_blocks
    rank.execute(batcher.take_freed(), MicroBatch(-1, ()))
    assert {} == rank.kv_tokens


def test_a_small_pool_evicts_and_readmits() -> None:
    """Tests that a pool for one long sequence still ends two of them, by evicting the younger under a new name."""
    limits = BatchLimits(num_blocks=8, max_running=2, token_budget=64)
    batcher, rank = Batcher(limits), Rank(limits)
    for index in range(2):
        batcher.admit(sequence(index, prompt=30, max_tokens=90))
    seen: dict[str, set[int]] = {}
    ends = []
    for batch in drive(batcher, rank, random.Random(0)):
        for item in batch.items:
            seen.setdefault(item.key.request, set()).add(item.key.kv_generation)
        ends += [item.key.request for item in batch.items if item.start + item.count == 30 + 90 - 1]
    assert batcher.num_evictions > 0
    assert {0} == seen["q0"]
    assert 0 in seen["q1"]
    assert len(seen["q1"]) > 1
    assert ["q0", "q1"] == ends


def test_an_eviction_is_told_once_and_prefills_prompt_and_tokens() -> None:
    """Tests that an evicted sequence gets its next kv_generation and keeps the tokens it has."""
    batcher = Batcher(LIMITS)
    batcher.admit(sequence(0, prompt=16, max_tokens=20))
    for _ in range(6):
        batch = batcher.schedule()
        assert batch is not None
        batcher.commit(batch.number)
    batcher.drop_kv(RequestId("q0"), 0)
    assert [SequenceKey(RequestId("q0"), 0, 1)] == batcher.take_evicted()
    assert [] == batcher.take_evicted()
    assert [SequenceKey(RequestId("q0"), 0, 0)] == batcher.take_freed()
    batch = batcher.schedule()
    assert batch is not None
    assert (BatchItem(SequenceKey(RequestId("q0"), 0, 1), 0, 16 + 6, samples=True),) == batch.items


def test_first_come_first_served() -> None:
    """Tests that a long prompt at the head is not overtaken by short ones that would fit."""
    limits = BatchLimits(num_blocks=16, max_running=4, token_budget=64)
    batcher = Batcher(limits)
    batcher.admit(sequence(0, prompt=120, max_tokens=8))
    batcher.admit(sequence(1, prompt=200, max_tokens=8))
    batcher.admit(sequence(2, prompt=4, max_tokens=8))
    assert ["q0"] == keys_of(batcher.schedule())
    assert 1 == batcher.num_running


def test_decodes_go_before_prefill_chunks() -> None:
    """Tests that a running stream gets a token in every iteration while a long prompt is prefilled beside it."""
    batcher = Batcher(LIMITS)
    batcher.admit(sequence(0, prompt=5, max_tokens=50))
    first = batcher.schedule()
    assert first is not None
    batcher.commit(first.number)
    batcher.admit(sequence(1, prompt=300, max_tokens=5))
    for _ in range(6):
        batch = batcher.schedule()
        assert batch is not None
        assert ["q0", "q1"] == keys_of(batch)
        assert 1 == batch.items[0].count
        assert 0 == (batch.items[1].start + batch.items[1].count) % 16
        batcher.commit(batch.number)


def test_micro_batches_share_the_decodes_and_no_sequence() -> None:
    """Tests that with two stages two micro-batches of equal size are out, with different sequences."""
    limits = BatchLimits(num_blocks=64, max_running=4, max_in_flight=2, token_budget=64)
    batcher = Batcher(limits)
    for index in range(4):
        batcher.admit(sequence(index, prompt=3, max_tokens=9))
    prefill = batcher.schedule()
    assert prefill is not None
    batcher.commit(prefill.number)
    first, second = batcher.schedule(), batcher.schedule()
    assert batcher.schedule() is None
    assert (["q0", "q1"], ["q2", "q3"]) == (keys_of(first), keys_of(second))


def test_flow_control_waits_for_the_ledger() -> None:
    """Tests that a choice stops 64 tokens past what is durable, and goes on when the ledger does."""
    batcher = Batcher(BatchLimits(num_blocks=64, max_running=4, token_budget=48))
    batcher.admit(sequence(0, prompt=4, max_tokens=200))
    rank = Rank(batcher.limits)
    for _ in drive(batcher, rank, random.Random(0), keep_up=False):
        pass
    assert [64] == [position.tokens for position in batcher.positions()]
    batcher.set_durable(RequestId("q0"), 0, 10)
    for _ in drive(batcher, rank, random.Random(0), keep_up=False):
        pass
    assert [74] == [position.tokens for position in batcher.positions()]


def test_pause_drains_and_reports() -> None:
    """Tests that after a pause nothing is scheduled, that a prefill keeps its chunk, and that a resume goes on."""
    batcher = Batcher(BatchLimits(num_blocks=64, max_running=4, token_budget=48))
    batcher.admit(sequence(0, prompt=4, max_tokens=20))
    batcher.admit(sequence(1, prompt=100, max_tokens=20))
    batch = batcher.schedule()
    assert batch is not None
    batcher.pause()
    batcher.commit(batch.number)
    assert batcher.schedule() is None
    positions = [(position.request, position.tokens, position.kv_tokens) for position in batcher.positions()]
    assert [("q0", 1, 4), ("q1", 0, 32)] == positions
    batcher.resume()
    assert ["q0", "q1"] == keys_of(batcher.schedule())


def test_a_moved_sequence_goes_on_without_prefill() -> None:
    """Tests that a choice admitted with its KV in place decodes at once, from the last token."""
    batcher = Batcher(LIMITS)
    moved = sequence(3, prompt=20, max_tokens=30)
    moved.num_tokens = moved.durable_tokens = 7
    moved.kv_tokens = 26
    assert batcher.admit(moved)
    assert not batcher.admit(sequence(3, prompt=20, max_tokens=30))
    batch = batcher.schedule()
    assert batch is not None
    assert (BatchItem(moved.key, 26, 1, samples=True),) == batch.items
    batcher.commit(batch.number)
    assert 0 == batcher.num_prefilled_tokens


def test_no_prefill_lengthens_the_first_iteration_after_a_move() -> None:
    """Tests that moved sequences decode once by themselves, in all micro-batches, and that prefill then goes on."""
    batcher = Batcher(BatchLimits(num_blocks=64, max_running=4, max_in_flight=2, token_budget=48))
    for index in range(2):
        moved = sequence(index)
        moved.num_tokens, moved.kv_tokens, moved.durable_tokens = 3, 22, 3
        batcher.admit(moved)
    batcher.admit(sequence(2))
    first = batcher.schedule()
    second = batcher.schedule()
    assert first is not None
    assert {"q0", "q1"} == {*keys_of(first), *keys_of(second)}
    assert all(item.count == 1 for item in first.items)
    batcher.commit(first.number)
    if second is not None:
        batcher.commit(second.number)
    assert "q2" in [*keys_of(batcher.schedule()), *keys_of(batcher.schedule())]


def test_moved_sequences_beyond_max_running_wait_with_their_kv() -> None:
    """Tests that KV that moved in is kept while its sequence waits for a running place."""
    limits = BatchLimits(num_blocks=64, max_running=1, token_budget=48)
    batcher = Batcher(limits)
    for index in range(2):
        moved = sequence(index, prompt=20, max_tokens=4)
        moved.kv_tokens, moved.num_tokens, moved.durable_tokens = 20, 1, 1
        batcher.admit(moved)
    rank = Rank(limits, {SequenceKey(RequestId(f"q{index}"), 0, 0): 20 for index in range(2)})
    order = [keys_of(batch) for batch in drive(batcher, rank, random.Random(0))]
    assert [["q0"]] * 3 + [["q1"]] * 3 == order
    assert 0 == batcher.num_evictions


def test_waiting_sequences_with_kv_give_way_to_an_older_one_without() -> None:
    """Tests that KV that was moved here and only waits cannot keep the pool from the oldest sequence for ever."""
    limits = BatchLimits(num_blocks=12, max_running=2)
    batcher, rank = Batcher(limits), Rank(limits)
    moved = [sequence(index, prompt=60) for index in (1, 2)]
    for one in moved:
        one.num_tokens = one.durable_tokens = 1
        one.kv_tokens = rank.kv_tokens[one.key] = 60
        assert batcher.admit(one)
    recomputed = sequence(0, prompt=90)
    assert batcher.admit(recomputed)
    assert batcher.free_blocks < limits.blocks_of(recomputed.known_tokens)

    for _ in drive(batcher, rank, random.Random(0)):
        pass

    assert not list(batcher.sequences())
    assert batcher.free_blocks == limits.num_blocks
    assert [one.kv_generation for one in moved] == [0, 1], "only the youngest had to give way"


def test_close_frees_at_once_or_after_the_micro_batch() -> None:
    """Tests that a closed choice gives its blocks back, one that is out with a micro-batch when that is back."""
    batcher = Batcher(LIMITS)
    batcher.admit(sequence(0))
    batcher.admit(sequence(1, choice=0))
    batch = batcher.schedule()
    assert batch is not None
    assert [SequenceKey(RequestId("q0"), 0, 0)] == batcher.close(RequestId("q0"))
    assert [] == batcher.take_freed()
    assert ["q1"] == [position.request for position in batcher.positions()]
    batcher.commit(batch.number)
    assert [SequenceKey(RequestId("q0"), 0, 0)] == batcher.take_freed()
    assert [] == batcher.close(RequestId("q0"))
    batcher.close(RequestId("q1"))
    assert LIMITS.num_blocks == batcher.free_blocks


def test_eos_ends_a_choice() -> None:
    """Tests that a stopped key is removed at its commit and is not told as ended by length."""
    batcher = Batcher(LIMITS)
    batcher.admit(sequence(0, prompt=4, max_tokens=1))
    batcher.admit(sequence(1, prompt=4, max_tokens=1))
    batch = batcher.schedule()
    assert batch is not None
    stopped = SequenceKey(RequestId("q0"), 0, 0)
    outcome = batcher.commit(batch.number, {stopped})
    assert [SequenceKey(RequestId("q1"), 0, 0)] == outcome.at_length
    assert () == batcher.positions()


def test_what_can_never_fit_is_refused() -> None:
    """Tests that a sequence larger than the pool is known beforehand and refused at admission."""
    batcher = Batcher(LIMITS)
    assert batcher.fits(prompt_tokens=1000, max_tokens=25)
    assert not batcher.fits(prompt_tokens=1000, max_tokens=26)
    with pytest.raises(InvariantError, match="exceeds 64 blocks"):
        batcher.admit(sequence(0, prompt=1000, max_tokens=26))


def test_a_young_decode_waits_while_a_younger_is_out() -> None:
    """Tests that no sequence evicts itself for want of blocks that a micro-batch under way is about to give back."""
    limits = BatchLimits(num_blocks=4, max_running=2, max_in_flight=2, token_budget=48)
    batcher = Batcher(limits)
    batcher.admit(sequence(0, prompt=16, max_tokens=40))
    batcher.admit(sequence(1, prompt=30, max_tokens=3))
    rank = Rank(limits)
    for _ in drive(batcher, rank, random.Random(2)):
        pass
    assert () == batcher.positions()
    assert 4 == batcher.free_blocks


@pytest.mark.parametrize("prompt", [1, 16, 40, 130])
def test_a_sequence_without_tokens_computes_its_prompt(prompt: int) -> None:
    """Tests that `max_tokens` 0 prefills the whole prompt in chunks, samples nothing, and ends once."""
    batcher, rank = Batcher(LIMITS), Rank(LIMITS)
    assert batcher.fits(prompt_tokens=64 * 16, max_tokens=0)
    assert not batcher.fits(prompt_tokens=64 * 16 + 1, max_tokens=0)
    batcher.admit(sequence(0, prompt=prompt, max_tokens=0))
    batcher.admit(sequence(1, prompt=5, max_tokens=2))
    computed, ended = 0, []
    while (batch := batcher.schedule()) is not None:
        rank.execute(batcher.take_freed(), batch)
        mine = [item for item in batch.items if item.key.request == "q0"]
        computed += sum(item.count for item in mine)
        assert not any(item.samples for item in mine)
        ended += batcher.commit(batch.number).at_length
    assert (prompt, ["q0", "q1"]) == (computed, sorted(key.request for key in ended))
    assert LIMITS.num_blocks == batcher.free_blocks


def snapshot(batcher: Batcher) -> list[tuple[str, int, int, int, int, bool]]:
    """Tokens, KV and blocks of every open sequence, and the free blocks."""
    rows = [
        (one.request, one.choice, one.num_tokens, one.kv_tokens, one.num_blocks, one.is_running)
        for one in batcher.sequences()
    ]
    return [*rows, ("free", 0, batcher.free_blocks, batcher.num_evictions, batcher.num_iterations, False)]


def round_robin(batcher: Batcher, out: list[MicroBatch]) -> None:
    """Bring back the oldest micro-batch and issue what can be issued."""
    batcher.commit(out.pop(0).number)
    tell_durable(batcher)
    issue(batcher, out)


def issue(batcher: Batcher, out: list[MicroBatch]) -> None:
    """Everything that can be scheduled now goes out."""
    while (batch := batcher.schedule()) is not None:
        out.append(batch)
    batcher.take_freed()


def tell_durable(batcher: Batcher) -> None:
    """The ledger keeps up."""
    for one in batcher.sequences():
        batcher.set_durable(one.request, one.choice, one.num_tokens)


@pytest.mark.parametrize("case", range(200))
def test_many_steps_at_once_are_the_steps_one_by_one(case: int) -> None:
    """Tests that `advance(k)` leaves the tokens and block tables that k single rounds leave, and k is not always 0."""
    rng = random.Random(case)
    limits = BatchLimits(
        num_blocks=rng.randint(12, 60),
        max_running=rng.randint(1, 6),
        max_in_flight=rng.randint(1, 4),
        token_budget=rng.randint(24, 96),
    )
    if case % 4 == 0:
        limits = BatchLimits.of_replica(
            kv_blocks=limits.num_blocks, max_running=limits.max_running, pipeline=1, is_static=True
        )
    loads = [(index, rng.randint(1, 60), rng.randint(1, 90)) for index in range(rng.randint(1, 8))]
    one_by_one, at_once = Batcher(limits), Batcher(limits)
    single_out: list[MicroBatch] = []
    jumped_out: list[MicroBatch] = []
    for index, prompt, max_tokens in loads:
        for batcher in (one_by_one, at_once):
            batcher.admit(sequence(index, prompt=prompt, max_tokens=max_tokens))
    issue(one_by_one, single_out)
    issue(at_once, jumped_out)
    num_jumped = 0
    while jumped_out:
        steps = at_once.steps_until_change()
        steps = rng.randint(0, steps) if rng.random() < 0.3 else steps
        at_once.advance(steps)
        tell_durable(at_once)
        for _ in range(steps * len(single_out)):
            round_robin(one_by_one, single_out)
        assert snapshot(at_once) == snapshot(one_by_one)
        assert [[item.key for item in batch.items] for batch in single_out] == [
            [item.key for item in batch.items] for batch in jumped_out
        ]
        num_jumped += steps
        round_robin(one_by_one, single_out)
        round_robin(at_once, jumped_out)
        assert snapshot(at_once) == snapshot(one_by_one)
    assert num_jumped > 0 or max(max_tokens for _, _, max_tokens in loads) < 12


def test_no_steps_at_once_while_something_changes() -> None:
    """Tests that a prefill under way, one who could start, a pause and a closing sequence allow no jump."""
    batcher = Batcher(LIMITS)
    batcher.admit(sequence(0, prompt=60, max_tokens=20))
    out: list[MicroBatch] = []
    issue(batcher, out)
    assert batcher.steps_until_change() == 0
    for _ in range(2):
        round_robin(batcher, out)
    assert batcher.steps_until_change() == 18
    batcher.admit(sequence(1))
    assert batcher.steps_until_change() == 0
    batcher.close(RequestId("q1"))
    assert batcher.steps_until_change() == 18
    batcher.pause()
    assert batcher.steps_until_change() == 0
    batcher.resume()
    batcher.close(RequestId("q0"))
    assert batcher.steps_until_change() == 0


def test_a_static_batch_is_a_power_of_two_and_nobody_joins_it() -> None:
    """Tests that five who wait make batches of 4 and 1, and that one who comes meanwhile waits for the next."""
    limits = BatchLimits.of_replica(kv_blocks=64, max_running=4, pipeline=3, is_static=True)
    batcher = Batcher(limits)
    for index in range(5):
        batcher.admit(sequence(index, prompt=40, max_tokens=3 + index))
    out: list[MicroBatch] = []
    issue(batcher, out)
    assert [keys_of(batch) for batch in out] == [["q0", "q1", "q2", "q3"]]
    assert out[0].num_rows == 160
    batcher.admit(sequence(5))
    batches = []
    while out:
        round_robin(batcher, out)
        batches += [keys_of(batch) for batch in out]
    assert batches[:5] == [["q0", "q1", "q2", "q3"]] * 2 + [["q1", "q2", "q3"], ["q2", "q3"], ["q3"]]
    assert batches[5] == ["q4", "q5"]


def test_an_interrupted_static_batch_goes_on_whole() -> None:
    """Tests that three who came with their KV run together at once, before those who wait."""
    batcher = Batcher(BatchLimits.of_replica(kv_blocks=64, max_running=4, pipeline=1, is_static=True))
    batcher.admit(sequence(0))
    for index in (1, 2, 3):
        moved = sequence(index, prompt=20, max_tokens=9)
        moved.num_tokens = moved.durable_tokens = 4
        moved.kv_tokens = 23
        batcher.admit(moved)
    assert keys_of(batcher.schedule()) == ["q1", "q2", "q3"]
