"""The simulated ledger counts tokens by position: a gap, a double or a stranger's token ends the simulation."""

from __future__ import annotations

import pytest

from spotserve.core.ids import ReplicaId, RequestId
from spotserve.errors import InvariantError
from spotserve.sim.ledger import RequestRecord, Sampled, SimulatedLedger

OWNER = (ReplicaId("r0"), 1)
NAME = RequestId("q0")


@pytest.fixture
def ledger() -> SimulatedLedger:
    """One request of two choices of five tokens."""
    made = SimulatedLedger()
    made.accept(
        RequestRecord(
            request=NAME,
            arrival_index=0,
            arrived_at_s=0.0,
            prompt_tokens=3,
            max_tokens=5,
            output_tokens=5,
            num_choices=2,
            owner=OWNER,
        )
    )
    return made


def sampled(position: int, count: int = 1, *, choice: int = 0, at_s: float = 1.0) -> Sampled:
    """Tokens of one moment."""
    return Sampled(NAME, choice, position, count, at_s, at_s)


def test_tokens_are_taken_in_order(ledger: SimulatedLedger) -> None:
    """Tests that the first token of an owner is told as such, once, and a choice closes at its last."""
    assert ledger.append(OWNER, sampled(0))
    assert not ledger.append(OWNER, sampled(0, choice=1))
    assert not ledger.append(OWNER, sampled(1, 4))
    record = ledger.records[NAME]
    assert [True, False] == [stream.closed for stream in record.streams]
    assert 6 == record.num_tokens


@pytest.mark.parametrize("position", [0, 2, 5])
def test_a_gap_and_a_double_are_errors(ledger: SimulatedLedger, position: int) -> None:
    """Tests that only the next position is taken."""
    ledger.append(OWNER, sampled(0))
    with pytest.raises(InvariantError, match="offered is position"):
        ledger.append(OWNER, sampled(position))


def test_a_closed_choice_takes_no_more(ledger: SimulatedLedger) -> None:
    """Tests that nothing follows the last token."""
    ledger.append(OWNER, sampled(0, 5))
    with pytest.raises(InvariantError):
        ledger.append(OWNER, sampled(5))


def test_strangers_and_the_fenced_are_errors(ledger: SimulatedLedger) -> None:
    """Tests that another generation, and the owner itself once it is fenced, may not append."""
    with pytest.raises(InvariantError, match="belongs to"):
        ledger.append((ReplicaId("r0"), 2), sampled(0))
    ledger.fence(OWNER)
    with pytest.raises(InvariantError, match="belongs to"):
        ledger.append(OWNER, sampled(0))


def test_gaps_between_and_within_tellings_count(ledger: SimulatedLedger) -> None:
    """Tests that the stall of a stream is its longest gap, whether between two tellings or inside one."""
    ledger.append(OWNER, Sampled(NAME, 0, 0, 1, 1.0, 1.0))
    ledger.append(OWNER, Sampled(NAME, 0, 1, 3, 3.0, 8.0, longest_gap_s=4.0))
    stream = ledger.records[NAME].streams[0]
    assert (1.0, 8.0, 4.0) == (stream.first_at_s, stream.last_at_s, stream.stall_s)
    ledger.append(OWNER, Sampled(NAME, 0, 4, 1, 14.0, 14.0))
    assert 6.0 == stream.stall_s
