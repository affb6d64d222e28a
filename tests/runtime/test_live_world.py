"""The world's looks at the ledger's content, over a real ledger."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from spotserve.core import commands as cmd
from spotserve.core import events as ev
from spotserve.core.ids import GpuId, ReplicaId, RequestId
from spotserve.core.plan import Trigger
from spotserve.core.ports import NewRequest
from spotserve.core.sampling import RankedToken, SamplingParameters, TokenLogprobs
from spotserve.core.wire import FinishReason, ReleaseCommand, TokenRun, Tokens
from spotserve.runtime.live_world import BROKEN_CHOICE, LiveWorld
from spotserve.store import content as stored_content
from spotserve.store.ledger import Ledger, Owner, StoredRequest

R1 = ReplicaId("r1")
A = RequestId("a")
TIMEOUT_S = 30.0
LOGPROBS = (TokenLogprobs(-0.5, (RankedToken(7, -0.5),)), TokenLogprobs(-1.5, (RankedToken(8, -0.25),)))


class WatchedLedger(Ledger):
    """A ledger that notes every content it gave."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.given: list[StoredRequest] = []

    def content(self, request: RequestId, *, with_logprobs: bool = True) -> StoredRequest:
        """As the ledger's, noted."""
        stored = super().content(request, with_logprobs=with_logprobs)
        self.given.append(stored)
        return stored


def world_over(ledger: Any, state: Any, *, switchboard: Any = None) -> LiveWorld:
    """A world that has nothing but a ledger, a state and perhaps workers."""
    absent: Any = None
    return LiveWorld(
        absent,
        switchboard=switchboard,
        cloud=absent,
        planner=absent,
        ledger=ledger,
        term=1,
        began_s=0.0,
        state=lambda: state,
        owner=Owner,
    )


def test_the_world_never_looks_at_logprobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests that admissions, migrations, restarts and ends read tokens alone, in memory as on the disk."""
    unpacked: list[bytes] = []
    monkeypatch.setattr(stored_content, "_unpacked_logprobs", lambda blob: unpacked.append(blob) or LOGPROBS)
    ledger = WatchedLedger(tmp_path / "ledger.db")
    sampling = SamplingParameters(seed=1, max_tokens=9, logprobs=1)
    ledger.accept([NewRequest(request=A, prompt_ids=(1, 2), num_choices=1, sampling=sampling)])
    ledger.set_owner(A, R1, 1).result(TIMEOUT_S)
    run = TokenRun(request=A, choice=0, position=0, token_ids=(7, 8), logprobs=LOGPROBS)
    ledger.append(R1, 1, [run]).result(TIMEOUT_S)
    record = SimpleNamespace(id=A, replica=None, had_token=True, arrival_index=3)
    state = SimpleNamespace(requests={A: record}, replicas={})

    async def scenario() -> list[ev.Event]:
        world = world_over(ledger, state)
        (content,) = world.contents([cmd.Admission(request=A, kv_generation=1)])
        assert (7, 8) == content.choices[0].token_ids
        assert 2 == world._standing(A, 0)
        assert [True, False] == [world._known(name) for name in (A, RequestId("b"))]
        await world._adopt_requests(state)
        world.submit("end", cmd.EndRequest(request=A, replica=None, generation=0, outcome="cancelled"))
        events = list(await world.next_events())
        assert A not in ledger._live, "what follows is not read from the disk"
        await world._adopt_requests(state)
        return [*events, *await world.next_events()]

    ended = asyncio.run(asyncio.wait_for(scenario(), TIMEOUT_S))
    assert [("cancelled", (2,))] * 2 == [(event.outcome, event.tokens) for event in ended]
    assert ([()] * len(ledger.given), []) == ([stored.choices[0].logprobs for stored in ledger.given], unpacked)
    assert 5 <= len(ledger.given)
    assert LOGPROBS == ledger.content(A).choices[0].logprobs
    ledger.shutdown()


def test_a_cancel_that_comes_after_the_end_leaves_no_second_record(tmp_path: Path) -> None:
    """Tests that a request which finished as its cancellation was under way is told to be finished alone."""
    ledger = WatchedLedger(tmp_path / "ledger.db")
    sampling = SamplingParameters(seed=1, max_tokens=2)
    ledger.accept([NewRequest(request=A, prompt_ids=(1,), num_choices=1, sampling=sampling)])
    ledger.end(A, "finished").result(TIMEOUT_S)
    record = SimpleNamespace(id=A, replica=None, had_token=True, arrival_index=0)

    async def scenario() -> bool:
        world = world_over(ledger, SimpleNamespace(requests={A: record}, replicas={}))
        world.submit("end", cmd.EndRequest(request=A, replica=None, generation=0, outcome="cancelled"))
        await asyncio.gather(*world._tasks)
        return world._events.empty()

    assert asyncio.run(asyncio.wait_for(scenario(), TIMEOUT_S))
    assert "finished" == ledger.content(A).ended
    ledger.shutdown()


@pytest.mark.parametrize(
    ("reasons", "ended"), [(("length", "stop"), ("finished", None)), (("length", "error"), ("failed", BROKEN_CHOICE))]
)
def test_a_choice_that_ends_with_an_error_fails_its_request(
    tmp_path: Path, reasons: tuple[FinishReason, ...], ended: tuple[str, str | None]
) -> None:
    """Tests that a request is finished once all of its choices are, and failed if one ended with an error."""
    ledger = WatchedLedger(tmp_path / "ledger.db")
    sampling = SamplingParameters(seed=1, max_tokens=1)
    ledger.accept([NewRequest(request=A, prompt_ids=(1,), num_choices=2, sampling=sampling)])
    ledger.set_owner(A, R1, 1).result(TIMEOUT_S)
    runs = [
        TokenRun(request=A, choice=number, position=0, token_ids=(7,), finish_reason=reason)
        for number, reason in enumerate(reasons)
    ]
    switchboard = SimpleNamespace(send=lambda worker, message: None)

    async def scenario() -> list[ev.Event]:
        world = world_over(ledger, SimpleNamespace(requests={A: None}, replicas={}), switchboard=switchboard)
        message = Tokens(replica=R1, generation=1, runs=tuple(runs))
        await world._append(GpuId("i0/0"), message, ledger.append(R1, 1, runs))
        return list(await world.next_events())

    events = asyncio.run(asyncio.wait_for(scenario(), TIMEOUT_S))
    assert [ended[0]] == [event.outcome for event in events if isinstance(event, ev.RequestEnded)]
    stored = ledger.content(A)
    assert (*ended, reasons) == (stored.ended, stored.error, tuple(one.finish_reason for one in stored.choices))
    ledger.shutdown()


class Workers:
    """Workers that tell what they hold, and note what they are told to free."""

    def __init__(self, roles: list[dict[str, Any]]) -> None:
        self.roles = roles
        self.freed: list[tuple[str, str, int]] = []

    def connected(self) -> dict[str, None]:
        """One worker."""
        return {"i0/0": None}

    async def command(self, worker: str, command: Any) -> SimpleNamespace:
        """Answer a probe, note a release."""
        if isinstance(command, ReleaseCommand):
            assert (None, True) == (command.slices, command.keep_weights)
            self.freed.append((worker, command.replica, command.generation))
        return SimpleNamespace(ok=True, result={"shards": [], "slices": [], "positions": [], "roles": self.roles})


def test_a_snapshot_frees_positions_of_replicas_that_are_no_more() -> None:
    """Tests that what a release failed to free goes before the next plan, and that what runs stays."""
    names = [("r1", 1, "serving"), ("r1", 2, "serving"), ("r2", 2, "lost"), ("r3", 3, "serving")]
    entries = [
        SimpleNamespace(replica=SimpleNamespace(id=name, generation=generation), state=state)
        for name, generation, state in names[1:]
    ]
    workers = Workers([{"replica": name, "generation": generation} for name, generation, _ in names])

    async def scenario() -> list[ev.Event]:
        state = SimpleNamespace(replicas={entry.replica.id: entry for entry in entries})
        world = world_over(None, state, switchboard=workers)
        world.submit("7.0", cmd.TakeSnapshot(trigger=Trigger(kind="joined")))
        events = list(await world.next_events())
        await asyncio.gather(*world._tasks)
        return events

    (taken,) = asyncio.run(asyncio.wait_for(scenario(), TIMEOUT_S))
    assert "snapshot_taken" == taken.kind
    assert [("i0/0", "r1", 1), ("i0/0", "r2", 2)] == workers.freed
