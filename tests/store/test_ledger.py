"""The ledger judges who may append what, and shows only what is durable."""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import apsw
import pytest

from spotserve.core.ids import RequestId
from spotserve.core.ports import ChoiceDelta
from spotserve.core.wire import FinishReason, TokenRun
from spotserve.errors import InvariantError, StateDirError
from spotserve.store.ledger import ClosedChoice, Ledger, LedgerRow, Owner
from tests.store.conftest import R1, R2, TIMEOUT_S, new_request, run_of

A, B = RequestId("a"), RequestId("b")


def tokens(ledger: Ledger, request: RequestId, choice: int = 0) -> tuple[int, ...]:
    return ledger.content(request).choices[choice].token_ids


def test_accepted_content_survives_a_restart(open_ledger: Callable[..., Ledger]) -> None:
    """Tests that an accepted request comes back whole: prompt, parameters, owner, tokens, closed choices."""
    ledger = open_ledger(clock=lambda: 1_234.9)
    new = new_request("a", num_choices=2, stop=("x",))
    ledger.accept([new])
    ledger.set_owner(A, R1, 3)
    ledger.append(R1, 3, [run_of("a", 0, 5, 2**32 - 1), run_of("a", 0, 6, choice=1, finish_reason="length")])
    ledger.append(R1, 3, [run_of("a", 2, 9)]).result(TIMEOUT_S)
    stored = ledger.content(A)
    ledger.shutdown()

    again = open_ledger()
    assert stored == again.content(A)
    assert (new, 1_234, Owner(R1, 3)) == (stored.new, stored.created_unix_s, stored.owner)
    assert [(5, 2**32 - 1, 9), (6,)] == [choice.token_ids for choice in stored.choices]
    assert [None, "length"] == [choice.finish_reason for choice in stored.choices]
    assert (A,) == again.open_requests()


def test_a_second_acceptance_is_refused(ledger: Ledger) -> None:
    """Tests that one id is accepted once, within a call and across calls, and that a refused call stores nothing."""
    with pytest.raises(InvariantError, match="request a was accepted before"):
        ledger.accept([new_request("c"), new_request("a")])
    with pytest.raises(InvariantError, match="request d was accepted before"):
        ledger.accept([new_request("d"), new_request("d")])
    assert ledger.view(RequestId("c")) is None


def test_doubles_are_dropped(ledger: Ledger) -> None:
    """Tests that re-sent tokens are stored once, also where a run overlaps what is known."""
    ledger.append(R1, 1, [run_of("a", 0, 10, 11, 12)])
    ledger.append(R1, 1, [run_of("a", 0, 10, 11, 12)])
    outcome = ledger.append(R1, 1, [run_of("a", 1, 11, 12, 13, 14)]).result(TIMEOUT_S)
    assert ((A, 0, 5),) == outcome.durable
    assert (10, 11, 12, 13, 14) == tokens(ledger, A)
    assert [LedgerRow(0, 0, 3, R1, 1), LedgerRow(0, 3, 2, R1, 1)] == ledger.rows(A)
    assert (1, 0, 0) == (ledger.counters.doubles, ledger.counters.gaps, ledger.counters.conflicts)


def test_a_gap_is_dropped_and_reported(ledger: Ledger) -> None:
    """Tests that tokens past a hole are refused with the count to send again from."""
    ledger.append(R1, 1, [run_of("a", 0, 10)])
    outcome = ledger.append(R1, 1, [run_of("a", 2, 12, finish_reason="length")]).result(TIMEOUT_S)
    assert ((A, 0, 1),) == outcome.gaps
    assert (10,) == tokens(ledger, A)
    assert {0: 1} == ledger.durable(A)
    assert () == outcome.closed


@pytest.mark.parametrize(
    "run",
    [
        run_of("a", 0, 10, 99, 12),
        run_of("a", -1, 10, 11),
        run_of("a", 0, 10, finish_reason="stop"),
        run_of("a", 2, 2**32),
        run_of("a", 2, -1),
    ],
    ids=["other token", "negative position", "end before known tokens", "too large a token", "negative token"],
)
def test_a_contradiction_changes_nothing(ledger: Ledger, run: TokenRun) -> None:
    """Tests that a run that cannot be true beside the durable tokens is counted and dropped whole."""
    ledger.append(R1, 1, [run_of("a", 0, 10, 11)])
    outcome = ledger.append(R1, 1, [run]).result(TIMEOUT_S)
    assert 1 == ledger.counters.conflicts
    assert ((), (10, 11)) == (outcome.closed, tokens(ledger, A))


def test_only_the_owner_appends(ledger: Ledger) -> None:
    """Tests that another replica, another generation and the owner before the hand-over are refused."""
    ledger.append(R1, 1, [run_of("a", 0, 10)])
    assert 2 == sum(
        ledger.append(*other, [run_of("a", 1, 66)]).result(TIMEOUT_S).fenced for other in [(R2, 1), (R1, 2)]
    )
    ledger.set_owner(A, R2, 2)
    assert 1 == ledger.append(R1, 1, [run_of("a", 1, 77)]).result(TIMEOUT_S).fenced
    assert (A,) == ledger.append(R2, 2, [run_of("a", 1, 11)]).result(TIMEOUT_S).first_tokens
    assert (10, 11) == tokens(ledger, A)
    assert [LedgerRow(0, 0, 1, R1, 1), LedgerRow(0, 1, 1, R2, 2)] == ledger.rows(A)
    assert 3 == ledger.counters.fenced


def test_a_request_without_an_owner_takes_nothing(ledger: Ledger) -> None:
    """Tests that a request taken from its owner, and one never given to any, refuses all tokens."""
    ledger.set_owners({A: None})
    ledger.accept([new_request("c")])
    outcome = ledger.append(R1, 1, [run_of("a", 0, 1), run_of("c", 0, 1)]).result(TIMEOUT_S)
    assert 2 == outcome.fenced


def test_a_fence_is_the_last_word(tmp_path: Path, open_ledger: Callable[..., Ledger]) -> None:
    """Tests that appends under way are durable when the fence returns, and that none comes after it."""
    ledger = open_ledger(window_s=0.05)
    ledger.accept([new_request("a")])
    ledger.set_owner(A, R1, 1).result(TIMEOUT_S)
    early = [ledger.append(R1, 1, [run_of("a", position, position)]) for position in range(20)]
    ledger.fence(R1, 1).result(TIMEOUT_S)
    durable = ledger.durable(A)
    assert all(commit.done() for commit in early)
    assert 1 == ledger.append(R1, 1, [run_of("a", durable[0], 5)]).result(TIMEOUT_S).fenced
    assert durable == ledger.durable(A)


def test_a_fence_survives_a_hand_over_back(ledger: Ledger) -> None:
    """Tests that a fenced generation stays refused even as the owner on paper."""
    ledger.fence(R1, 1)
    ledger.set_owner(A, R1, 1)
    assert 1 == ledger.append(R1, 1, [run_of("a", 0, 5)]).result(TIMEOUT_S).fenced


def test_finish_reasons_close_choices_and_complete_requests(ledger: Ledger) -> None:
    """Tests that a request is complete with its last choice, and that late tokens are dropped."""
    first = ledger.append(R1, 1, [run_of("b", 0, 1, choice=0, finish_reason="length")]).result(TIMEOUT_S)
    last = ledger.append(R1, 1, [run_of("b", 0, choice=1, finish_reason="stop")]).result(TIMEOUT_S)
    again = ledger.append(R1, 1, [run_of("b", 0, 1, 2, choice=0, finish_reason="length")]).result(TIMEOUT_S)
    assert ((ClosedChoice(B, 0, "length", 1, "leader"),), ()) == (first.closed, first.completed)
    assert ((ClosedChoice(B, 1, "stop", 0, "leader"),), (B,)) == (last.closed, last.completed)
    assert ((), (), 1) == (again.closed, again.completed, ledger.counters.late)
    assert (1,) == tokens(ledger, B)


def test_unknown_requests_are_named(ledger: Ledger) -> None:
    """Tests that a run of an unknown request or choice is reported, so that its leader can be told."""
    outcome = ledger.append(R1, 1, [run_of("z", 0, 1), run_of("a", 0, 1, choice=1)]).result(TIMEOUT_S)
    assert (RequestId("z"), A) == outcome.unknown


def stop_at_pair(stop: tuple[str, ...], earlier: Sequence[int], new_ids: Sequence[int], min_tokens: int) -> int | None:
    """A judge whose stop "string" is token 7 followed by token 8."""
    both = [*earlier, *new_ids]
    ends = [at + 1 for at in range(1, len(both)) if both[at - 1 : at + 1] == [7, 8]]
    return ends[0] - len(earlier) if ends else None


def test_a_stop_string_across_two_runs_closes_the_choice(open_ledger: Callable[..., Ledger]) -> None:
    """Tests that a stop string that ends in the second run closes there and drops the rest."""
    ledger = open_ledger(judge=stop_at_pair)
    ledger.accept([new_request("a", stop=("7 8",)), new_request("b", num_choices=1)])
    ledger.set_owners({A: Owner(R1, 1), B: Owner(R1, 1)})
    ledger.append(R1, 1, [run_of("a", 0, 5, 7), run_of("b", 0, 5, 7)])
    runs = [run_of("a", 2, 8, 9, 10, finish_reason="length"), run_of("b", 2, 8, 9, 10)]
    outcome = ledger.append(R1, 1, runs).result(TIMEOUT_S)
    late = ledger.append(R1, 1, [run_of("a", 5, 11)]).result(TIMEOUT_S)
    assert (ClosedChoice(A, 0, "stop", 3, "stop_string"),) == outcome.closed
    assert ((A,), ((A, 0, 3), (B, 0, 5))) == (outcome.completed, outcome.durable)
    assert ((5, 7, 8), (5, 7, 8, 9, 10)) == (tokens(ledger, A), tokens(ledger, B))
    assert ((), 1) == (late.gaps, ledger.counters.late)
    assert (("a", 0),) == late.late


def test_close_and_end(ledger: Ledger) -> None:
    """Tests that close takes the named choices, end the rest, and that only the first end of a request counts."""
    ledger.append(R1, 1, [run_of("b", 0, 1, 2, choice=0)])
    closed = ledger.close(B, [0], "cancelled").result(TIMEOUT_S)
    ended = ledger.end(B, "failed", "deadline of 3 s passed").result(TIMEOUT_S)
    ledger.end(B, "finished").result(TIMEOUT_S)
    assert (ClosedChoice(B, 0, "cancelled", 2, "coordinator"),) == closed.closed
    assert ((ClosedChoice(B, 1, "error", 0, "coordinator"),), (B,)) == (ended.closed, ended.completed)
    view = ledger.view(B)
    assert view is not None
    assert ("failed", "deadline of 3 s passed") == (view.state, view.error)
    assert (A,) == ledger.open_requests()


def test_view_takes_the_controllers_word_on_a_live_request(ledger: Ledger) -> None:
    """Tests the state of a view: the end if there was one, else what the controller says, else what the tokens say."""
    ledger.append(R1, 1, [run_of("b", 0, 1)]).result(TIMEOUT_S)
    views = [ledger.view(A), ledger.view(B), ledger.view(A, "suspended")]
    assert ["queued", "decoding", "suspended"] == [view.state for view in views if view is not None]


def test_queued_appends_share_commits(open_ledger: Callable[..., Ledger]) -> None:
    """Tests that what arrives while a commit is under way becomes one transaction."""
    entered, go_on = threading.Event(), threading.Event()

    def judge(stop: tuple[str, ...], earlier: Sequence[int], new_ids: Sequence[int], min_tokens: int) -> int | None:
        entered.set()
        assert go_on.wait(TIMEOUT_S)
        return None

    ledger = open_ledger(judge=judge)
    ledger.accept([new_request("a", stop=("x",)), new_request("b")])
    ledger.set_owners({A: Owner(R1, 1), B: Owner(R1, 1)}).result(TIMEOUT_S)
    before = ledger.num_commits
    held = ledger.append(R1, 1, [run_of("a", 0, 1)])
    assert entered.wait(TIMEOUT_S)
    grouped = [ledger.append(R1, 1, [run_of("b", position, position)]) for position in range(50)]
    go_on.set()
    outcomes = [commit.result(TIMEOUT_S) for commit in [held, *grouped]]
    assert 2 == ledger.num_commits - before
    assert [position + 1 for position in range(50)] == [outcome.durable[0][2] for outcome in outcomes[1:]]


async def collect(ledger: Ledger, request: RequestId, after: int = -1) -> list[ChoiceDelta]:
    return [delta async for delta in ledger.watch(request, after)]


def assembled(deltas: list[ChoiceDelta], choice: int, first: int) -> list[int]:
    """The tokens of one choice, each delta checked to begin where the one before ended."""
    collected: list[int] = []
    for delta in deltas:
        if delta.choice == choice:
            assert first + len(collected) == delta.position
            collected.extend(delta.token_ids)
    return collected


def test_watch_is_gap_free_while_the_writer_appends(ledger: Ledger, rng: random.Random) -> None:
    """Tests that watchers, early, late and slow ones, see each token once and in order, and end with the request."""
    script = [[rng.randrange(1000) for _ in range(200)] for _ in range(2)]

    def feed() -> None:
        position = [0, 0]
        while any(position[choice] < 200 for choice in range(2)):
            choice = rng.choice([choice for choice in range(2) if position[choice] < 200])
            at, size = position[choice], rng.randrange(1, 6)
            ids = script[choice][at : at + size]
            position[choice] = at + len(ids)
            reason: FinishReason | None = "length" if position[choice] == 200 else None
            ledger.append(R1, 1, [run_of("b", at, *ids, choice=choice, finish_reason=reason)]).result(TIMEOUT_S)

    async def slowly() -> list[ChoiceDelta]:
        deltas = []
        async for delta in ledger.watch(B):
            deltas.append(delta)
            await asyncio.sleep(rng.random() / 100)
        return deltas

    async def scenario() -> list[list[ChoiceDelta]]:
        early = [asyncio.create_task(collect(ledger, B)), asyncio.create_task(slowly())]
        late = asyncio.create_task(collect(ledger, B, 149))
        feeder = asyncio.create_task(asyncio.to_thread(feed))
        watched = [await asyncio.wait_for(task, TIMEOUT_S) for task in [*early, late]]
        await feeder
        return [*watched, await collect(ledger, B)]

    *whole, late, after = asyncio.run(scenario())
    for choice in range(2):
        for deltas in [*whole, after]:
            assert script[choice] == assembled(deltas, choice, 0)
        assert script[choice][150:] == assembled(late, choice, 150)
    assert 2 == len(after)
    assert ["length", "length"] == [delta.finish_reason for delta in after]


def test_nothing_is_seen_before_the_commit(open_ledger: Callable[..., Ledger]) -> None:
    """Tests that tokens judged but not committed are in no view and in no count."""
    staged, go_on = threading.Event(), threading.Event()

    def judge(stop: tuple[str, ...], earlier: Sequence[int], new_ids: Sequence[int], min_tokens: int) -> int | None:
        if new_ids[0] == 2:
            staged.set()
            assert go_on.wait(TIMEOUT_S)
        return None

    ledger = open_ledger(judge=judge)
    ledger.accept([new_request("a", stop=("x",))])
    ledger.set_owner(A, R1, 1).result(TIMEOUT_S)
    commit = ledger.append(R1, 1, [run_of("a", 0, 1), run_of("a", 1, 2)])
    assert staged.wait(TIMEOUT_S)
    assert ((), {0: 0}) == (tokens(ledger, A), ledger.durable(A))

    async def first_seen() -> tuple[bool, ChoiceDelta]:
        watching = asyncio.ensure_future(anext(ledger.watch(A)))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        too_early = watching.done()
        go_on.set()
        return too_early, await asyncio.wait_for(watching, TIMEOUT_S)

    too_early, delta = asyncio.run(first_seen())
    commit.result(TIMEOUT_S)
    assert (False, (1, 2)) == (too_early, delta.token_ids)
    assert (1, 2) == tokens(ledger, A)


def test_a_watcher_learns_that_no_more_can_come(ledger: Ledger) -> None:
    """Tests that a watcher of an open request ends with an error, after its tokens, when the ledger shuts down."""

    async def scenario() -> ChoiceDelta:
        watcher = ledger.watch(A)
        await ledger.append(R1, 1, [run_of("a", 0, 1, 2)])
        first = await anext(watcher)
        following = asyncio.ensure_future(anext(watcher))
        await asyncio.sleep(0)
        await asyncio.to_thread(ledger.shutdown)
        with pytest.raises(StateDirError, match="is closed"):
            await asyncio.wait_for(following, TIMEOUT_S)
        return first

    assert (1, 2) == asyncio.run(scenario()).token_ids


def test_watch_of_an_unknown_request(ledger: Ledger) -> None:
    """Tests that watching an unknown request is refused at the call."""
    with pytest.raises(KeyError):
        ledger.watch(RequestId("z"))


def test_ended_requests_leave_memory_when_nobody_watches(ledger: Ledger) -> None:
    """Tests that an ended request stays in memory for its watcher only, and is still answered from the disk."""

    async def scenario() -> list[ChoiceDelta]:
        watcher = ledger.watch(A)
        await ledger.append(R1, 1, [run_of("a", 0, 1, 2)])
        first = await anext(watcher)
        await ledger.end(A, "finished")
        await ledger.end(A, "failed", "too late")
        assert A in ledger._live
        return [first, *[delta async for delta in watcher]]

    deltas = asyncio.run(scenario())
    assert [1, 2] == assembled(deltas, 0, 0)
    assert A not in ledger._live
    assert ((1, 2), "finished", None) == (tokens(ledger, A), ledger.content(A).ended, ledger.content(A).error)
    assert A in ledger


def test_content_expires_after_its_retention(tmp_path: Path, open_ledger: Callable[..., Ledger]) -> None:
    """Tests that content goes 15 minutes after the end, from every table and every file, and not before."""
    ledger = open_ledger(clock=lambda: 1_000.0)
    ledger.accept([new_request("a"), new_request("b")])
    ledger.set_owner(A, R1, 1)
    secret = (0x5EC2E701, 0x5EC2E702, 0x5EC2E703)
    ledger.append(R1, 1, [run_of("a", 0, *secret)])
    ledger.end(A, "finished")
    assert () == ledger.expire(1_899.0).result(TIMEOUT_S)
    assert secret == tokens(ledger, A)
    assert (A,) == ledger.expire(1_900.0).result(TIMEOUT_S)
    assert ledger.view(A) is None
    with pytest.raises(KeyError):
        ledger.watch(A)
    assert (B,) == ledger.open_requests()
    raw = b"".join(token.to_bytes(4, "little") for token in secret)
    assert [False, False] == [raw in (tmp_path / name).read_bytes() for name in ("ledger.db", "ledger.db-wal")]
    ledger.shutdown()
    assert raw not in (tmp_path / "ledger.db").read_bytes()
    assert ["ledger.db"] == [file.name for file in tmp_path.iterdir()]


def test_unjournaled_content_is_forgotten(open_ledger: Callable[..., Ledger]) -> None:
    """Tests that at a start content whose request never reached the journal goes, ended content stays."""
    ledger = open_ledger()
    ledger.accept([new_request("a"), new_request("b"), new_request("c")])
    ledger.end(RequestId("c"), "finished").result(TIMEOUT_S)
    ledger.shutdown()
    again = open_ledger()
    assert (B,) == again.forget_unjournaled([A]).result(TIMEOUT_S)
    assert [True, False, True] == [RequestId(name) in again for name in "abc"]


def test_first_tokens_are_told_once_per_generation(open_ledger: Callable[..., Ledger]) -> None:
    """Tests that first_tokens names a request once per generation, a restart in between included."""
    ledger = open_ledger()
    ledger.accept([new_request("a", num_choices=2)])
    ledger.set_owner(A, R1, 1)
    firsts = [
        ledger.append(R1, 1, [run_of("a", 0, 1)]).result(TIMEOUT_S).first_tokens,
        ledger.append(R1, 1, [run_of("a", 0, 1, choice=1)]).result(TIMEOUT_S).first_tokens,
    ]
    ledger.shutdown()
    ledger = open_ledger()
    firsts.append(ledger.append(R1, 1, [run_of("a", 1, 2)]).result(TIMEOUT_S).first_tokens)
    ledger.set_owner(A, R2, 2)
    firsts.append(ledger.append(R2, 2, [run_of("a", 2, 2)]).result(TIMEOUT_S).first_tokens)
    assert [(A,), (), (), (A,)] == firsts


@pytest.mark.parametrize(
    "damage",
    [
        "UPDATE runs SET token_ids = x'00000000' WHERE position = 0",
        "DELETE FROM runs WHERE position = 0",
        "DELETE FROM runs WHERE position = 1",
        "UPDATE requests SET body = cast(replace(body, '100', '101') AS BLOB)",
        "PRAGMA user_version = 9",
    ],
)
def test_damaged_content_stops_the_start(tmp_path: Path, open_ledger: Callable[..., Ledger], damage: str) -> None:
    """Tests that changed, missing and cut content of an open request is refused, never served."""
    ledger = open_ledger()
    ledger.accept([new_request("a", num_choices=2)])
    ledger.set_owner(A, R1, 1)
    ledger.append(R1, 1, [run_of("a", 0, 1)])
    ledger.append(R1, 1, [run_of("a", 1, 2, finish_reason="length")])
    ledger.shutdown()
    connection = apsw.Connection(str(tmp_path / "ledger.db"))
    connection.execute(damage)
    connection.close()
    with pytest.raises(StateDirError, match=r"corrupt|version 9"):
        open_ledger()


def test_damage_inside_the_log_stops_the_start(tmp_path: Path, ledger: Ledger) -> None:
    """Tests that a ledger whose log lost acknowledged transactions to damage is refused, not served shortened."""
    for position in range(5):
        ledger.append(R1, 1, [run_of("a", position, position)]).result(TIMEOUT_S)
    crashed = tmp_path / "crashed"
    crashed.mkdir()
    (crashed / "ledger.db").write_bytes((tmp_path / "ledger.db").read_bytes())
    wal = bytearray((tmp_path / "ledger.db-wal").read_bytes())
    wal[len(wal) // 2] ^= 1
    (crashed / "ledger.db-wal").write_bytes(wal)
    with pytest.raises(StateDirError, match=r"ledger\.db-wal is corrupt"):
        Ledger(crashed / "ledger.db")


def test_owners_of_unknown_requests_are_refused(ledger: Ledger) -> None:
    """Tests that an owner for a request that the ledger lacks is our bug, while one that ended is left alone."""
    with pytest.raises(InvariantError, match="request z is not in the ledger"):
        ledger.set_owner(RequestId("z"), R1, 1)
    ledger.end(A, "finished").result(TIMEOUT_S)
    ledger.set_owner(A, R2, 2).result(TIMEOUT_S)
    assert Owner(R1, 1) == ledger.content(A).owner
