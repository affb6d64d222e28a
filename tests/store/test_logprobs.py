"""Logprobs in the ledger: as durable as their tokens, to the bit, and only for requests that want them."""

from __future__ import annotations

import asyncio
import random
import struct
from collections.abc import Callable, Sequence
from pathlib import Path

import apsw
import pytest

from spotserve.core.ids import RequestId
from spotserve.core.ports import ChoiceDelta, NewRequest
from spotserve.core.sampling import RankedToken, SamplingParameters, TokenLogprobs
from spotserve.core.wire import WORKER_MESSAGE, FinishReason, TokenRun, Tokens
from spotserve.errors import StateDirError
from spotserve.store.ledger import Ledger, Owner
from tests.store.conftest import R1, R2, TIMEOUT_S, new_request, run_of

A, B = RequestId("a"), RequestId("b")
PROMPT_IDS = (4, 5, 6, 7)


def scores(seed: int, count: int, num_top: int = 2) -> tuple[TokenLogprobs, ...]:
    """Logprobs with every bit in use; the first is the least there is."""
    rng = random.Random(seed)
    made = [
        TokenLogprobs(
            -rng.expovariate(0.1), tuple(RankedToken(rng.getrandbits(32), -rng.random()) for _ in range(num_top))
        )
        for _ in range(count)
    ]
    return (TokenLogprobs(-9999.0, made[0].top), *made[1:]) if made else ()


PROMPT = scores(1, len(PROMPT_IDS) - 1)


def wishing(name: str, *, num_choices: int = 1, stop: tuple[str, ...] = (), prompt: bool = True) -> NewRequest:
    """A request that wants logprobs."""
    sampling = SamplingParameters(seed=7, max_tokens=100, logprobs=2, prompt_logprobs=prompt)
    return NewRequest(
        request=RequestId(name), prompt_ids=PROMPT_IDS, num_choices=num_choices, sampling=sampling, stop=stop
    )


def scored_run(
    position: int,
    token_ids: Sequence[int],
    logprobs: Sequence[TokenLogprobs],
    *,
    prompt_logprobs: tuple[TokenLogprobs, ...] = (),
    finish_reason: FinishReason | None = None,
) -> TokenRun:
    """A run of request a's choice 0."""
    return TokenRun(
        request=A,
        choice=0,
        position=position,
        token_ids=tuple(token_ids),
        finish_reason=finish_reason,
        logprobs=tuple(logprobs),
        prompt_logprobs=prompt_logprobs,
    )


@pytest.fixture
def scored(open_ledger: Callable[..., Ledger]) -> Ledger:
    """A ledger in which r1 generation 1 owns a, which wants all logprobs, and b, which wants none."""
    ledger = open_ledger()
    ledger.accept([wishing("a"), new_request("b")])
    ledger.set_owners({A: Owner(R1, 1), B: Owner(R1, 1)}).result(TIMEOUT_S)
    return ledger


async def collect(ledger: Ledger, request: RequestId, after: int = -1) -> list[ChoiceDelta]:
    return [delta async for delta in ledger.watch(request, after)]


def test_logprobs_survive_a_restart_to_the_bit(scored: Ledger, open_ledger: Callable[..., Ledger]) -> None:
    """Tests that views and watches bring the same floats before and after a restart, each beside its token."""
    first, second = scores(2, 3), scores(3, 2)
    scored.append(R1, 1, [scored_run(0, (1, 2, 3), first, prompt_logprobs=PROMPT)])
    scored.append(R1, 1, [scored_run(3, (4, 5), second, finish_reason="length"), run_of("b", 0, 9)])
    scored.end(A, "finished").result(TIMEOUT_S)
    before = scored.content(A)
    scored.shutdown()
    again = open_ledger()
    (choice,) = again.content(A).choices
    assert before == again.content(A)
    assert (PROMPT, (*first, *second)) == (choice.prompt_logprobs, choice.logprobs)
    packed = [struct.pack("<d", one.logprob) for one in choice.logprobs]
    assert [struct.pack("<d", one.logprob) for one in (*first, *second)] == packed
    for after in (-1, 0, 2, 4):
        deltas = asyncio.run(collect(again, A, after))
        assert (*first, *second)[after + 1 :] == tuple(one for delta in deltas for one in delta.logprobs)
        assert (PROMPT if after == -1 else ()) == tuple(one for delta in deltas for one in delta.prompt_logprobs)
    assert ((), ()) == (again.content(B).choices[0].logprobs, again.content(B).choices[0].prompt_logprobs)


def test_a_view_checks_nothing_again(scored: Ledger) -> None:
    """Tests that a view shows the very logprobs that were appended, and that it can do without them."""
    made = scores(9, 3)
    scored.append(R1, 1, [scored_run(0, (1, 2, 3), made, prompt_logprobs=PROMPT)]).result(TIMEOUT_S)
    (first,), (second,) = scored.content(A).choices, scored.content(A).choices
    # A validated copy would be equal, and made of other objects.
    assert [True] * 3 == [one is other for one, other in zip(first.logprobs, second.logprobs, strict=True)]
    assert made == first.logprobs
    (bare,) = scored.content(A, with_logprobs=False).choices
    assert first.model_copy(update={"logprobs": (), "prompt_logprobs": ()}) == bare


def test_the_wire_keeps_every_bit() -> None:
    """Tests that a thousand floats come back from the JSON of a message as they were."""
    made = scores(4, 1000)
    run = scored_run(0, range(1000), made)
    message = Tokens(replica=R1, generation=1, runs=(run,))
    again = WORKER_MESSAGE.validate_json(message.model_dump_json())
    assert message == again
    assert [struct.pack("<d", one.logprob) for one in made] == [
        struct.pack("<d", one.logprob) for one in again.runs[0].logprobs
    ]


def test_doubles_keep_the_first_logprobs(scored: Ledger) -> None:
    """Tests that tokens that come again, in part new, add only the new ones' logprobs, and the prompt's once."""
    first, rest = scores(5, 2), scores(6, 2)
    scored.append(R1, 1, [scored_run(0, (1, 2), first, prompt_logprobs=PROMPT)])
    scored.append(R1, 1, [scored_run(0, (1, 2), first, prompt_logprobs=PROMPT)])
    scored.append(R1, 1, [scored_run(1, (2, 3, 4), (first[1], *rest))])
    scored.set_owner(A, R2, 2)
    scored.append(R2, 2, [scored_run(0, (1, 2), scores(7, 2), prompt_logprobs=scores(8, 3))]).result(TIMEOUT_S)
    (choice,) = scored.content(A).choices
    assert ((1, 2, 3, 4), (*first, *rest), PROMPT) == (choice.token_ids, choice.logprobs, choice.prompt_logprobs)


@pytest.mark.parametrize(
    "run",
    [
        scored_run(0, (1, 2), scores(5, 1), prompt_logprobs=PROMPT),
        scored_run(0, (1, 2), (), prompt_logprobs=PROMPT),
        scored_run(0, (1,), scores(5, 1)),
        scored_run(0, (1,), scores(5, 1), prompt_logprobs=PROMPT[1:]),
        scored_run(0, (), (), finish_reason="length"),
    ],
    ids=["one short", "none", "no prompt", "short prompt", "an end without its prompt"],
)
def test_a_run_without_its_logprobs_is_refused(scored: Ledger, run: TokenRun) -> None:
    """Tests that no token is stored without the logprobs that its request wants."""
    scored.append(R1, 1, [run]).result(TIMEOUT_S)
    assert (1, 0) == (scored.counters.conflicts, scored.durable(A)[0])
    assert scored.content(A).choices[0].finish_reason is None


def test_logprobs_nobody_wanted_are_refused(scored: Ledger) -> None:
    """Tests that a run with logprobs for a request without is no run of ours."""
    run = run_of("b", 0, 1).model_copy(update={"logprobs": scores(1, 1)})
    scored.append(R1, 1, [run]).result(TIMEOUT_S)
    assert (1, 0) == (scored.counters.conflicts, scored.durable(B)[0])


def test_a_failed_start_needs_no_logprobs(scored: Ledger) -> None:
    """Tests that a leader may end a request that it cannot run."""
    scored.append(R1, 1, [scored_run(0, (), (), finish_reason="error")]).result(TIMEOUT_S)
    assert "error" == scored.content(A).choices[0].finish_reason


def test_a_prompt_alone_is_kept(scored: Ledger, open_ledger: Callable[..., Ledger]) -> None:
    """Tests that a request without tokens has its prompt's logprobs, shown when durable, restart included."""
    run = scored_run(0, (), (), prompt_logprobs=PROMPT, finish_reason="length")
    outcome = scored.append(R1, 1, [run]).result(TIMEOUT_S)
    assert ((A,), (), ((A, 0, 0),)) == (outcome.completed, outcome.first_tokens, outcome.durable)
    (delta,) = asyncio.run(collect(scored, A))
    assert ((), PROMPT, "length") == (delta.token_ids, delta.prompt_logprobs, delta.finish_reason)
    scored.shutdown()
    assert PROMPT == open_ledger().content(A).choices[0].prompt_logprobs


def test_a_stop_string_cuts_logprobs_too(open_ledger: Callable[..., Ledger]) -> None:
    """Tests that tokens behind a stop string are dropped with their logprobs, and that the judge learns min_tokens."""
    asked: list[int] = []

    def judge(stop: tuple[str, ...], earlier: Sequence[int], new_ids: Sequence[int], min_tokens: int) -> int | None:
        asked.append(min_tokens)
        return 2

    ledger = open_ledger(judge=judge)
    new = wishing("a", stop=("x",), prompt=False)
    ledger.accept([new.model_copy(update={"sampling": new.sampling.model_copy(update={"min_tokens": 1})})])
    ledger.set_owner(A, R1, 1)
    made = scores(5, 3)
    ledger.append(R1, 1, [scored_run(0, (1, 2, 3), made)]).result(TIMEOUT_S)
    (choice,) = ledger.content(A).choices
    assert ([1], (1, 2), made[:2], "stop") == (asked, choice.token_ids, choice.logprobs, choice.finish_reason)


def test_logprobs_expire_with_their_tokens(tmp_path: Path, open_ledger: Callable[..., Ledger]) -> None:
    """Tests that no byte of them is left 15 minutes after the end."""
    ledger = open_ledger(clock=lambda: 1_000.0)
    ledger.accept([wishing("a")])
    ledger.set_owner(A, R1, 1)
    made = scores(5, 1)
    ledger.append(R1, 1, [scored_run(0, (1,), made, prompt_logprobs=PROMPT)])
    ledger.end(A, "finished")
    raw = struct.pack("<d", made[0].top[0].logprob)
    ledger.flush().result(TIMEOUT_S)
    assert any(raw in (tmp_path / name).read_bytes() for name in ("ledger.db", "ledger.db-wal"))
    assert (A,) == ledger.expire(1_900.0).result(TIMEOUT_S)
    ledger.shutdown()
    assert raw not in (tmp_path / "ledger.db").read_bytes()


@pytest.mark.parametrize(
    "damage",
    [
        "UPDATE logprobs SET logprobs = zeroblob(length(logprobs)) WHERE position = 0",
        "UPDATE logprobs SET logprobs = zeroblob(length(logprobs)) WHERE position = -1",
        "DELETE FROM logprobs WHERE position = 0",
        "DELETE FROM logprobs WHERE position = 1",
        "DELETE FROM logprobs WHERE position = -1",
    ],
)
def test_damaged_logprobs_stop_the_start(
    tmp_path: Path, scored: Ledger, open_ledger: Callable[..., Ledger], damage: str
) -> None:
    """Tests that changed and missing logprobs of an open request are refused, never served."""
    scored.append(R1, 1, [scored_run(0, (1,), scores(5, 1), prompt_logprobs=PROMPT)])
    scored.append(R1, 1, [scored_run(1, (2,), scores(6, 1))])
    scored.shutdown()
    connection = apsw.Connection(str(tmp_path / "ledger.db"))
    connection.execute(damage)
    connection.close()
    with pytest.raises(StateDirError, match="corrupt"):
        open_ledger()


def test_a_ledger_of_the_version_before_goes_on(tmp_path: Path, open_ledger: Callable[..., Ledger]) -> None:
    """Tests that a file without a table of logprobs is read, gets one, and takes what comes next."""
    ledger = open_ledger()
    ledger.accept([new_request("b")])
    ledger.set_owner(B, R1, 1)
    ledger.append(R1, 1, [run_of("b", 0, 1, 2)])
    ledger.shutdown()
    connection = apsw.Connection(str(tmp_path / "ledger.db"))
    # What version 1 lacked: the table, and the fields of the parameters that came with it.
    connection.execute("DROP TABLE logprobs")
    connection.pragma("user_version", 1)
    connection.close()
    again = open_ledger()
    assert (1, 2) == again.content(B).choices[0].token_ids
    again.accept([wishing("a")])
    again.set_owner(A, R1, 1)
    made = scores(5, 1)
    again.append(R1, 1, [scored_run(0, (1,), made, prompt_logprobs=PROMPT)]).result(TIMEOUT_S)
    assert made == again.content(A).choices[0].logprobs
    again.shutdown()
    assert made == open_ledger().content(A).choices[0].logprobs
