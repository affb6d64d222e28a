"""Each checker is shown the faults that it is there for: planted in the product, or in the record that a run leaves."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from typing import Any

import pytest

from spotserve.core import admission, observe, plan_run, planning, record
from spotserve.core import commands as cmd
from spotserve.core import decide as decide_module
from spotserve.core import events as ev
from spotserve.core.controller import Entry
from spotserve.core.plan import CopyWeights, LoadWeights, Plan, PlanningProblem
from spotserve.core.state import ClusterState
from spotserve.sim import checkers
from spotserve.sim import world as world_module
from spotserve.sim.checkers import Violation
from spotserve.sim.streams import ClientStream
from spotserve.sim.swarm.drawing import Shares, draw_scenario
from spotserve.sim.swarm.running import SeedRun
from spotserve.sim.virtual_ledger import Run, VirtualLedger, VirtualRequest
from spotserve.sim.world import VirtualWorld
from spotserve.solvers.planner import make_plan

MOVES = 44
"""A seed whose migrations move the KV of live requests, more than once."""

SEEDS = (MOVES, 0, 1, 6, 10, 17, *range(60))
"""Those that show a planted fault first, then others, should decisions have changed."""


def first_violations(promise: str, *, shares: Shares | None = None) -> list[str]:
    """What is said of a promise in the first seed that breaks it; `shares` are of small things that go wrong."""
    for seed in SEEDS:
        drawn = draw_scenario(seed)
        scenario = drawn if shares is None else replace(drawn, shares=shares)
        found = [v for v in SeedRun(scenario, make_plan).run().violations if v.promise == promise]
        if found:
            return [str(violation) for violation in found]
    return []


# Planted in the product


def test_p1_sees_a_request_that_nobody_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests that a commit which forgets the requests that it does not move leaves them without an end."""
    commit = plan_run._commit

    def forgetful(state: ClusterState, run: Any) -> cmd.CommitRun:
        made = commit(state, run)
        kept = tuple(owner for owner in made.owners if owner.replica is not None)
        return made.model_copy(update={"owners": kept, "recomputed": ()})

    monkeypatch.setattr(plan_run, "_commit", forgetful)
    assert "terminal records: none" in " ".join(first_violations("P1"))


def test_p2_sees_a_ledger_that_takes_doubles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests that a ledger which takes what it has already doubles tokens in a stream, and P2 says so."""
    append = VirtualLedger.append

    def greedy(self: VirtualLedger, owner: Any, run: Run, **rest: Any) -> Any:
        request = self.requests.get(run.request)
        verdict = append(self, owner, run, **rest)
        if verdict in ("new", "first") and request is not None and len(request.rows[run.choice]) == 3:
            request.stream.tokens.append(request.rows[run.choice][-1])
        return verdict

    monkeypatch.setattr(VirtualLedger, "append", greedy)
    assert any(text.startswith("P2: ") and "follows" in text for text in first_violations("P2"))


def test_p3_sees_a_plan_of_an_older_membership(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests that a plan which is adopted though the cluster has changed meanwhile is seen."""

    def blind(state: ClusterState, plan: Any) -> Iterator[cmd.Command]:
        yield from planning.begin(state, plan)

    monkeypatch.setattr(planning, "_adopt", blind)
    assert "the cluster changed in" in " ".join(first_violations("P3"))


def test_p3_sees_a_commit_before_the_ledger_is_durable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests that a commit which does not wait for the ledger, that does not answer, is seen."""

    def hasty(state: ClusterState, command: cmd.MakeDurable) -> ClusterState:
        assert state.run is not None
        return state.model_copy(update={"run": state.run.model_copy(update={"durability": "durable"})})

    monkeypatch.setitem(record._RECORDERS, "make_durable", hasty)
    monkeypatch.setattr(VirtualWorld, "_make_durable", lambda world, command_id, command: None)
    assert "before the ledger is durable" in " ".join(first_violations("P3"))


def test_p4_sees_tokens_of_the_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests that without fences a zombie's tokens reach a client, and P4 says so."""
    policies = tuple(policy for policy in decide_module.POLICIES if policy is not decide_module._fences)
    monkeypatch.setattr(decide_module, "POLICIES", policies)
    assert "lost since" in " ".join(first_violations("P4"))


def test_p4_sees_a_name_of_kv_used_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests that a recompute under the KV generation of an earlier admission is seen."""

    def nameless(before: ClusterState, state: ClusterState, event: ev.Event) -> Iterator[cmd.Command]:
        for command in admission.admit(before, state, event):
            assert isinstance(command, cmd.AdmitRequests)
            named = tuple(one.model_copy(update={"kv_generation": 1}) for one in command.admissions)
            yield command.model_copy(update={"admissions": named})

    policies = tuple(nameless if policy is admission.admit else policy for policy in decide_module.POLICIES)
    monkeypatch.setattr(decide_module, "POLICIES", policies)
    assert "starts again with KV" in " ".join(first_violations("P4"))


def test_p5_sees_a_crowded_replica(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests that admissions without a bound are seen."""
    monkeypatch.setattr(admission, "_rooms", lambda state: dict.fromkeys((r.id for r in state.serving()), 1000))
    assert "is given" in " ".join(first_violations("P5"))


def test_p5_sees_a_run_without_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests that a run which waits far too long for a worker that does not answer is seen."""
    outcome = VirtualWorld._step_outcome

    def silent(self: VirtualWorld, command: cmd.ExecuteStep) -> ev.Event | None:
        return None if command.step.kind == "join_group" else outcome(self, command)

    monkeypatch.setattr(VirtualWorld, "_step_outcome", silent)
    monkeypatch.setattr(plan_run, "RUN_PATIENCE_S", 200.0)
    assert "goes on after" in " ".join(first_violations("P5"))


def test_p5_sees_a_stop_that_never_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests that a service which is told to stop and does not is seen."""
    policies = tuple(policy for policy in decide_module.POLICIES if policy is not decide_module._stopping)
    monkeypatch.setattr(decide_module, "POLICIES", policies)
    assert "goes on after its drain" in " ".join(first_violations("P5"))


def test_a_release_that_nobody_asks_for_again_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests that a worker which keeps what it failed to free is found, were it freed at no snapshot either."""
    monkeypatch.setattr(observe, "RELEASE_TRIES", 1)
    monkeypatch.setattr(VirtualWorld, "_free_unknown", lambda self: None)
    assert "which does not serve" in " ".join(first_violations("memory", shares=Shares(release_failure=0.9)))


def larger_pools(problem: PlanningProblem) -> Plan:
    """A plan whose pools are larger than its planner counted."""
    plan = make_plan(problem)
    new = [replica.generation == plan.epoch.to for replica in plan.target.replicas]
    replicas = tuple(
        replica.model_copy(update={"kv_blocks": 2 * replica.kv_blocks}) if is_new else replica
        for replica, is_new in zip(plan.target.replicas, new, strict=True)
    )
    return plan.model_copy(update={"target": plan.target.model_copy(update={"replicas": replicas})})


def forgetful_copies(problem: PlanningProblem) -> Plan:
    """A plan that leaves one range of weights where it was."""
    plan = make_plan(problem)
    steps = tuple(
        step.model_copy(update={"slices": step.slices[1:]}) if isinstance(step, CopyWeights | LoadWeights) else step
        for step in plan.steps
    )
    return plan.model_copy(update={"steps": steps})


@pytest.mark.parametrize(("planner", "told"), [(larger_pools, "counts on memory"), (forgetful_copies, "lacks weights")])
def test_workers_hold_a_plan_to_what_they_have(
    planner: Callable[[PlanningProblem], Plan], told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tests that a plan which the checker lets pass by mistake fails at workers that count for themselves."""
    monkeypatch.setattr(world_module, "findings_of", lambda plan: ())
    violations = SeedRun(draw_scenario(MOVES), planner).run().violations
    assert told in " ".join(str(one) for one in violations if one.promise == "error")


# Planted in the record


@cache
def clean_record() -> tuple[tuple[Entry, ...], dict[Any, VirtualRequest]]:
    """Journal and ledger of a seed."""
    run = SeedRun(draw_scenario(MOVES), make_plan)
    assert [] == run.run().violations
    commits = [c for entry in run.journal.entries for c in entry.commands if isinstance(c, cmd.CommitRun)]
    assert any(commit.moved for commit in commits)
    return tuple(run.journal.entries), run.world.requests


def judged(
    change_entries: Callable[[list[Entry]], list[Entry]] | None = None,
    change_stream: Callable[[ClientStream], ClientStream] | None = None,
) -> list[Violation]:
    """What the strangers say of a record in which something was changed."""
    entries, requests = clean_record()
    changed = list(entries) if change_entries is None else change_entries(list(entries))
    streams = {}
    longest = max(requests.values(), key=lambda request: len(request.stream.tokens)).request
    for name, request in requests.items():
        old = request.stream
        copy = ClientStream(
            name, old.lengths, old.max_tokens, accepted=old.accepted, tokens=list(old.tokens), ended=old.ended
        )
        streams[name] = change_stream(copy) if change_stream is not None and name == longest else copy
    return checkers.check_all(changed, streams)


def without(kind: str) -> Callable[[list[Entry]], list[Entry]]:
    """Drops the entries with an event of a kind."""
    return lambda entries: [entry for entry in entries if entry.event.kind != kind]


def repeated(kind: str) -> Callable[[list[Entry]], list[Entry]]:
    """Has the first entry with a command of a kind, or an event of it, twice."""

    def repeat(entries: list[Entry]) -> list[Entry]:
        index = next(
            i for i, e in enumerate(entries) if e.event.kind == kind or any(c.kind == kind for c in e.commands)
        )
        return [*entries[: index + 1], entries[index], *entries[index + 1 :]]

    return repeat


def edited(edit: Callable[[ClientStream], Any]) -> Callable[[ClientStream], ClientStream]:
    """A stream with something changed in place."""

    def change(stream: ClientStream) -> ClientStream:
        edit(stream)
        return stream

    return change


def _other_token(stream: ClientStream) -> None:
    stream.tokens[2] = stream.tokens[2]._replace(token=stream.tokens[2].token ^ 1)


def _other_owner(stream: ClientStream) -> None:
    stream.tokens[-1] = stream.tokens[-1]._replace(owner=(stream.tokens[-1].owner[0], 999))


def _other_end(stream: ClientStream) -> None:
    stream.ended = "failed"


def _too_long(stream: ClientStream) -> None:
    stream.max_tokens = 1


@pytest.mark.parametrize(
    ("promise", "change_entries", "change_stream"),
    [
        ("P1", without("request_ended"), None),
        ("P1", repeated("request_ended"), None),
        ("P1", repeated("request_accepted"), None),
        ("P1", without("request_accepted"), None),
        ("P1", None, edited(_other_end)),
        ("P2", None, edited(lambda stream: stream.tokens.pop(1))),
        ("P2", None, edited(lambda stream: stream.tokens.insert(2, stream.tokens[1]))),
        ("P2", None, edited(lambda stream: stream.tokens.pop())),
        ("P2", None, edited(_other_token)),
        ("P3", without("step_done"), None),
        ("P3", without("quiesced"), None),
        ("P3", without("ledger_durable"), None),
        ("P3", repeated("begin_run"), None),
        ("P3", repeated("finish_run"), None),
        ("P4", repeated("begin_run"), None),
        ("P4", None, edited(_other_owner)),
        ("P5", None, edited(_too_long)),
    ],
)
def test_a_changed_record_is_seen(
    promise: str,
    change_entries: Callable[[list[Entry]], list[Entry]] | None,
    change_stream: Callable[[ClientStream], ClientStream] | None,
) -> None:
    """Tests that a record with one thing changed breaks the promise that it is about."""
    assert promise in {violation.promise for violation in judged(change_entries, change_stream)}


def test_a_clean_record_is_clean() -> None:
    """Tests that nothing is said of a record as it was left."""
    assert [] == judged()


def test_strangers_know_nothing_of_the_world() -> None:
    """Tests that the checkers import events, commands, plans and streams, and no state and no world."""
    import ast
    from pathlib import Path

    tree = ast.parse(Path(checkers.__file__).read_text(encoding="utf-8"))
    names = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module}
    ours = {name for name in names if name.startswith("spotserve")}
    assert ours <= {
        *("spotserve.core", "spotserve.core.check", "spotserve.core.ids", "spotserve.core.plan"),
        "spotserve.sim.streams",
    }


def test_terms_must_rise() -> None:
    """Tests that a coordinator with a term that was used is seen."""
    entries = [
        Entry(sequence=number, event=ev.CoordinatorRestarted(at_s=1.0, term=2, workers=(), num_instances=0))
        for number in (1, 2)
    ]
    assert ["P4: term 2 follows 2 (entry 2)"] == [str(v) for v in checkers.check_fences(entries, {})]
