"""A replica in virtual time: rounds done at once are the rounds done one by one, token by token."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest

from spotserve.core.batching import MicroBatch, Sequence, SequenceKey
from spotserve.core.ids import GpuId, ReplicaId, RequestId
from spotserve.core.snapshot import Replica, Stage
from spotserve.sim.agenda import Agenda
from spotserve.sim.engine import SimulatedReplica, _Course, foreseen
from spotserve.sim.ledger import Owner, Sampled


@dataclass(slots=True)
class ByRows:
    """A stage takes a millisecond and some of it more for every row, differently for each number of rows."""

    pipeline: int

    def stage_s(self, batch: MicroBatch) -> float:
        """Of one stage."""
        return 0.001 + 0.00017 * batch.num_rows**1.3

    def pass_s(self, batch: MicroBatch) -> float:
        """Of all of them."""
        return self.pipeline * self.stage_s(batch)


@dataclass(slots=True)
class Heard:
    """What a replica told: by stream, the time of its first and last token of each telling, and how many."""

    tokens: dict[tuple[str, int], int] = field(default_factory=dict)
    last_s: dict[tuple[str, int], float] = field(default_factory=dict)
    first_s: dict[tuple[str, int], float] = field(default_factory=dict)
    longest_s: dict[tuple[str, int], float] = field(default_factory=dict)
    evictions: list[SequenceKey] = field(default_factory=list)
    num_tellings: int = 0

    def sampled(self, owner: Owner, sampled: Sampled) -> None:
        """Take note of tokens."""
        self.num_tellings += 1
        key = (str(sampled.request), sampled.choice)
        assert self.tokens.get(key, 0) == sampled.position
        self.tokens[key] = sampled.position + sampled.count
        gap_s = sampled.first_at_s - self.last_s[key] if key in self.last_s else 0.0
        self.longest_s[key] = max(self.longest_s.get(key, 0.0), gap_s, sampled.longest_gap_s)
        self.first_s.setdefault(key, sampled.first_at_s)
        self.last_s[key] = sampled.last_at_s

    def evicted(self, owner: Owner, key: SequenceKey) -> None:
        """Take note of an eviction."""
        self.evictions.append(key)

    def never_fits(self, owner: Owner, request: RequestId) -> None:
        """Not in these tests."""
        raise AssertionError(request)


def replica_of(pipeline: int, *, kv_blocks: int = 400, max_running: int = 8) -> Replica:
    """A replica of so many stages."""
    stages = tuple(Stage(layers=(index, index + 1), gpus=(GpuId(f"i{index}/0"),)) for index in range(pipeline))
    return Replica(id=ReplicaId("r0"), generation=1, max_running=max_running, kv_blocks=kv_blocks, stages=stages)


def played(pipeline: int, seed: str, *, jumps: bool, kv_blocks: int) -> tuple[Heard, float]:
    """A replica with drawn arrivals, cancellations, and somebody who looks at it now and then."""
    dice = random.Random(seed)
    agenda, heard = Agenda(), Heard()
    replica = SimulatedReplica(
        replica_of(pipeline, kv_blocks=kv_blocks),
        durations=ByRows(pipeline),
        agenda=agenda,
        sink=heard,
        jumps=jumps,
    )

    def look() -> None:
        replica.positions()

    replica.start()
    for index in range(40):
        name, at_s = RequestId(f"q{index}"), dice.uniform(0, 4)
        prompt_tokens, end = dice.randint(1, 300), dice.randint(1, 200)
        sequence = Sequence(
            request=name,
            choice=0,
            kv_generation=1,
            arrival_index=index,
            prompt_tokens=prompt_tokens,
            max_tokens=end + dice.randint(0, 20),
        )
        agenda.at(at_s, lambda sequence=sequence, end=end: replica.admit([(sequence, end)]))  # type: ignore[misc]
        if dice.random() < 0.15:
            agenda.at(at_s + dice.uniform(0.01, 1), lambda name=name: replica.close(name))  # type: ignore[misc]
    for _ in range(30):
        agenda.at(dice.uniform(0, 5), look)
    agenda.next_event(1000.0)
    assert () == replica.positions()
    return heard, agenda.now_s


@pytest.mark.parametrize(("refill_s", "together"), [(0.0, False), (0.5, True)])
def test_a_static_replica_is_filled_up_before_its_next_batch(refill_s: float, together: bool) -> None:
    """Tests that who is handed over just after a batch's end runs in the next batch if the replica waits for it."""
    agenda, heard = Agenda(), Heard()
    replica = SimulatedReplica(
        replica_of(1, max_running=2), durations=ByRows(1), agenda=agenda, sink=heard, is_static=True, refill_s=refill_s
    )

    def ask(*indices: int) -> None:
        replica.admit(
            (
                Sequence(
                    request=RequestId(f"q{index}"),
                    choice=0,
                    kv_generation=1,
                    arrival_index=index,
                    prompt_tokens=9,
                    max_tokens=20,
                ),
                20,
            )
            for index in indices
        )

    def look() -> None:
        if heard.tokens.get(("q0", 0)) == 20 and ("q3", 0) not in heard.tokens and not asked:
            asked.append(True)
            ask(3)
        if agenda.now_s < 2:
            agenda.after(0.0001, look)

    asked: list[bool] = []
    replica.start()
    ask(0, 1, 2)
    agenda.after(0.0, look)
    agenda.next_event(10.0)
    assert heard.first_s["q0", 0] == heard.first_s["q1", 0]
    assert (heard.first_s["q2", 0] == heard.first_s["q3", 0]) is together
    assert {20} == set(heard.tokens.values())


@pytest.mark.parametrize("pipeline", [1, 2, 3, 5])
@pytest.mark.parametrize("number", range(2))
@pytest.mark.parametrize("kv_blocks", [400, 60])
def test_rounds_at_once_are_rounds_one_by_one(pipeline: int, number: int, kv_blocks: int, seed: int) -> None:
    """Tests that jumps change no token and no time, in pipelines, under evictions and cancellations."""
    jumped, jumped_end_s = played(pipeline, f"{seed}:{number}", jumps=True, kv_blocks=kv_blocks)
    stepped, stepped_end_s = played(pipeline, f"{seed}:{number}", jumps=False, kv_blocks=kv_blocks)
    assert stepped.tokens == jumped.tokens
    assert stepped.evictions == jumped.evictions
    assert stepped_end_s == pytest.approx(jumped_end_s, abs=1e-6)
    for mine, theirs in (
        (jumped.first_s, stepped.first_s),
        (jumped.last_s, stepped.last_s),
        (jumped.longest_s, stepped.longest_s),
    ):
        assert theirs == pytest.approx(mine, abs=1e-6)
    # Else nothing was jumped over, and the test could not fail.
    assert jumped.num_tellings < 0.98 * stepped.num_tellings


def test_few_blocks_evict() -> None:
    """Tests that the small pool of the test above is small enough to evict somebody."""
    assert played(2, "0:0", jumps=True, kv_blocks=60)[0].evictions


def test_two_that_wait_together_end_a_jump() -> None:
    """Tests that a slow micro-batch behind which two others come back ends a jump: they would go out as one."""
    courses = {
        0: _Course(stage_s=1.0, pass_s=3.0, back_s=[3.0]),
        1: _Course(stage_s=1.0, pass_s=3.0, back_s=[4.0]),
        2: _Course(stage_s=3.0, pass_s=9.0, back_s=[11.0]),
    }
    assert 3.0 == foreseen(courses, free_s=5.0, steps=10).until_s


def test_a_slow_micro_batch_holds_up_the_other() -> None:
    """Tests the times of two micro-batches of a pipeline of two, the second one slower, computed by hand."""
    courses = {
        0: _Course(stage_s=1.0, pass_s=2.0, back_s=[2.0]),
        1: _Course(stage_s=3.0, pass_s=6.0, back_s=[7.0]),
    }
    jump = foreseen(courses, free_s=4.0, steps=2)
    assert [2.0, 6.0, 8.0] == jump.courses[0].back_s  # It waits for the first stage once, then it is quicker.
    assert [4.0, 6.0] == jump.courses[0].issued_s
    assert [7.0, 13.0] == jump.courses[1].back_s
    assert 8.0 == jump.until_s
