"""Requests, runs and databases that the tests of the store share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from spotserve.core.ids import ReplicaId, RequestId
from spotserve.core.ports import NewRequest
from spotserve.core.sampling import SamplingParameters
from spotserve.core.wire import FinishReason, TokenRun
from spotserve.store.journal import Journal
from spotserve.store.journal_file import JournalIdentity, JournalRecord
from spotserve.store.ledger import Ledger

R1, R2 = ReplicaId("r1"), ReplicaId("r2")
TIMEOUT_S = 30.0
"""Longest wait for a commit: a hang becomes a failure."""


def new_request(name: str, *, num_choices: int = 1, stop: tuple[str, ...] = ()) -> NewRequest:
    return NewRequest(
        request=RequestId(name),
        prompt_ids=(1, 2, 2**32 - 1),
        num_choices=num_choices,
        sampling=SamplingParameters(seed=7, max_tokens=100),
        stop=stop,
        keep_text={"endpoint": "completions"},
    )


def run_of(
    name: str, position: int, *token_ids: int, choice: int = 0, finish_reason: FinishReason | None = None
) -> TokenRun:
    return TokenRun(
        request=RequestId(name), choice=choice, position=position, token_ids=token_ids, finish_reason=finish_reason
    )


def identity(*, model_digest: str = "sha256:aa", first_sequence: int = 1) -> JournalIdentity:
    return JournalIdentity(
        model_digest=model_digest,
        dtype="float32",
        created_unix_s=1_000,
        incarnation="ab",
        first_sequence=first_sequence,
    )


def records(first: int, last: int) -> list[JournalRecord]:
    """Entries `first` to `last`, one a second, every one with another body."""
    return [
        JournalRecord(number, float(number), f'{{"sequence":{number},"x":"é{number * 7919}"}}')
        for number in range(first, last + 1)
    ]


@pytest.fixture
def open_ledger(tmp_path: Path) -> Iterator[Callable[..., Ledger]]:
    """Opens the ledger of this test; whatever is still open is shut down at its end."""
    opened: list[Ledger] = []

    def open_one(**options: object) -> Ledger:
        opened.append(Ledger(tmp_path / "ledger.db", **options))  # type: ignore[arg-type]
        return opened[-1]

    yield open_one
    for ledger in opened:
        ledger.shutdown()


@pytest.fixture
def ledger(open_ledger: Callable[..., Ledger]) -> Ledger:
    """A ledger in which r1 generation 1 owns the requests "a" (one choice) and "b" (two)."""
    ledger = open_ledger()
    ledger.accept([new_request("a"), new_request("b", num_choices=2)]).result(TIMEOUT_S)
    ledger.set_owner(RequestId("a"), R1, 1)
    ledger.set_owner(RequestId("b"), R1, 1).result(TIMEOUT_S)
    return ledger


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    journal = Journal.create(tmp_path / "journal.db", identity())
    yield journal
    journal.close()
