"""The simulator and the daemon decide nothing apart: each decision is taken by code that both run, or this fails."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import FrameType, FunctionType
from typing import Any, get_args

import pytest

import spotserve.runtime.leader as live_leader
import spotserve.runtime.live_world as live_world
import spotserve.sim.cluster as simulated_world
import spotserve.sim.engine as simulated_leader
import spotserve.sim.simulation as simulation
from spotserve.app import daemon
from spotserve.core import commands, events
from spotserve.core.admission import by_arrival
from spotserve.core.controller import Entry
from spotserve.core.finding import Finding
from spotserve.core.load import LoadWindow
from spotserve.sim.ledger import Sampled, SimulatedLedger
from spotserve.sim.simulation import simulate
from spotserve.solvers import planner_server
from spotserve.solvers.planner import make_plan
from tests.one_truth import PACKAGE, STRANGERS, Side, made_decisions, one_sided, sources
from tests.rederivation import CountingBatcher, strange_decisions, strange_loads, strange_tokens
from tests.sim.scenes import MIB, Entries, event, four_instances, small_scenario

SIMULATOR = Side.of(sources(simulator=True))
DAEMON = Side.of(sources(simulator=False))

ONLY_SIMULATED = {
    "spotserve.core.cost.": "how long an iteration takes: a duration",
    "spotserve.core.slices.kv_token_bytes": "how much a transfer carries: a duration",
    "spotserve.core.state.step_gpus": "whose silence fails a step; a real worker is silent by itself",
}
ONLY_LIVE = {
    "spotserve.core.slices.": "which bytes a rank holds: the simulator holds none",
    "spotserve.core.canonical.": "how a value is written",
    "spotserve.core.strict_json.": "how a file is read",
    "spotserve.core.check.read_plan": "a plan file that a person applies",
    "spotserve.core.gpu_types.type_called": "the name of a GPU that a worker told",
    "spotserve.core.replay.moments": "the journal of an earlier daemon, folded",
    "spotserve.core.sizing.size_limits": "the spec, before anything is decided by it; a scenario states its own",
    "spotserve.core.spec.weight_copies": "the spec, too",
    "spotserve.core.snapshot.": "what is told of a moment",
    "spotserve.core.state.world_of": "what `snapshot` and `apply` show of the state",
    "spotserve.core.status.service_status": "what `status` shows of the state",
    "spotserve.core.ids.": "names",
    "spotserve.core.trace.": "a trace is read and changed before it is played",
    "spotserve.core.cells.": "a trace's text",
    "spotserve.core.finding.": "the words of a refusal",
}
ONLY_SIMULATED_METHODS = {
    "steps_until_change": "how many rounds nothing is decided in: a test holds it to single rounds",
    "advance": "those rounds, done at once",
    "in_flight": "where they are then",
    "find": "whose token a round brings",
    "num_running": "whether a static batch is over: the artifact's batches are simulated only",
    "num_rows": "how long a micro-batch takes: a duration",
    "serving": "what a picture shows of the state",
    "make_plan": "the planner, handed in; a daemon's runs in a process of its own",
}
DECIDED_EVENTS = {
    "plan_ready": ("findings_of", "blocking"),
    "plan_failed": ("findings_of", "blocking"),
    "load_sampled": ("LoadWindow", "news", "LOAD_PERIOD_S"),
    "request_evicted": ("Batcher", "schedule", "take_evicted"),
    "quiesced": ("pause", "positions"),
    "snapshot_taken": ("positions",),
    "request_ended": ("commit", "fits"),
    "first_token": ("start_of", "tokens_again", "handed_over"),
}
"""Events that carry a decision, and who takes it."""
TOLD_EVENTS = frozenset(
    {
        *("journal_begun", "instance_wanted", "worker_registered", "notice_received", "instance_lost", "timer_fired"),
        *("request_accepted", "step_done", "step_failed", "ledger_durable"),
    }
)
"""Events that tell what happened, to a world that could not choose."""
FACTS_OF_PERSONS = {
    "kill_requested": "a person kills",
    "cancel_requested": "a client goes away",
    "plan_submitted": "a person applies a plan",
    "notice_withdrawn": "the cloud takes a notice back",
    "stop_requested": "a person stops the daemon",
    "coordinator_restarted": "a daemon dies: the swarm plays it, a scenario does not",
    "replica_broke": "a rank fails: the swarm plays it, a scenario does not",
}
"""Events that nothing in a scenario brings about."""


# The source


def test_no_function_decides_for_one_side() -> None:
    """Tests that what one side calls of core and solvers the other calls too, but for what is named here with why."""
    assert [] == one_sided(SIMULATOR, DAEMON, ONLY_SIMULATED)
    assert [] == one_sided(DAEMON, SIMULATOR, ONLY_LIVE)


def test_no_side_makes_a_decision() -> None:
    """Tests that commands, plans, steps and states are made by core and solvers alone, and stepped by the loop."""
    assert [] == made_decisions(SIMULATOR)
    assert [] == made_decisions(DAEMON)


@pytest.mark.parametrize(
    "text",
    [
        "from spotserve.core import commands as cmd\ndef f(r): return cmd.AdmitRequests(replica=r)",
        "from spotserve.core.commands import DropPlan\nDropPlan(reason='too long')",
        "from spotserve.core.plan import Plan\nPlan(steps=())",
        "from spotserve.core.state import PlanRun\nPlanRun(epoch=1)",
        "from spotserve.core import plan\nplan.Quiesce(id='s1')",
        "import spotserve.core.commands as c\nc.StopService()",
        "from spotserve.core.decide import decide\ndecide(None, None)",
        "from spotserve.solvers.planner import make_plan\nmake_plan(None)",
        "class W:\n    def f(self, event): return self.controller.step(event)",
    ],
)
def test_a_decision_that_a_side_makes_is_found(text: str) -> None:
    """Tests that a source with a decision of its own is told of."""
    assert 1 == len(made_decisions(Side.of({"sim/planted.py": text})))


@pytest.mark.parametrize(
    "text",
    [
        "from spotserve.core.cost import request_ms\nrequest_ms(None, None, None)",
        "from spotserve.core.admission import admit\nadmit(None, None, None)",
        "from spotserve.solvers.fleet import decide_fleet\ndecide_fleet(None, '')",
        "from spotserve.core.plan_run import retry_at_s\nretry_at_s(None)",
    ],
)
def test_a_function_that_only_one_side_calls_is_found(text: str) -> None:
    """Tests that a chooser, imported by one side, is told of on either."""
    simulator = Side.of({**sources(simulator=True), "sim/planted.py": text})
    live = Side.of({**sources(simulator=False), "runtime/planted.py": text})
    allowed = {name: why for name, why in ONLY_SIMULATED.items() if name != "spotserve.core.cost."}
    assert any("sim/planted.py" in line for line in one_sided(simulator, DAEMON, allowed))
    assert any("runtime/planted.py" in line for line in one_sided(live, SIMULATOR, ONLY_LIVE))


def test_the_simulators_files_are_read() -> None:
    """Tests that the strangers left out are files that exist, and that the world and its leaders are read."""
    assert all((PACKAGE / "sim" / f"{name}.py").is_file() for name in STRANGERS)
    assert {"sim/cluster.py", "sim/engine.py", "sim/ledger.py", "sim/simulation.py"} <= set(sources(simulator=True))
    assert {"runtime/live_world.py", "runtime/leader.py", "app/daemon.py"} <= set(sources(simulator=False))


# Commands and events


def test_both_worlds_carry_out_every_command() -> None:
    """Tests that each command has a handler on both sides, and that what one leaves undone the other does."""
    kinds = {one.model_fields["kind"].default for one in get_args(get_args(commands.Command)[0])}
    scenario = small_scenario(four_instances(end_s=10))
    cluster = simulated_world.SimulatedCluster(scenario.spec, scenario.hardware, make_plan)
    simulated = {kind: handler.__name__ for kind, handler in cluster._handlers.items()}
    live = {kind: handler.__name__ for kind, handler in live_world._HANDLERS.items()}
    assert kinds == set(simulated) == set(live)
    idle = [{kind for kind, handler in side.items() if handler == "_nothing"} for side in (simulated, live)]
    assert idle[0] == idle[1]


def test_both_worlds_tell_every_event() -> None:
    """Tests that each event is told on both sides, but for what persons and failures bring about."""
    kinds = {one.__name__: one.model_fields["kind"].default for one in get_args(get_args(events.Event)[0])}
    told = [
        {kinds[part] for _, _, full in side.calls if ".events." in full for part in full.split(".") if part in kinds}
        for side in (SIMULATOR, DAEMON)
    ]
    assert set(FACTS_OF_PERSONS) == set(kinds.values()) - told[0]
    assert {"notice_withdrawn"} == set(kinds.values()) - told[1], "no cloud of ours takes a notice back yet"


def test_every_event_is_a_fact_or_has_a_decider_that_both_call() -> None:
    """Tests that a new kind of event is sorted, and that what decides an event is in the source of both sides."""
    kinds = {one.model_fields["kind"].default for one in get_args(get_args(events.Event)[0])}
    assert kinds == {*DECIDED_EVENTS, *TOLD_EVENTS, *FACTS_OF_PERSONS}
    for side in (SIMULATOR, DAEMON):
        known = side.attributes | {full.rpartition(".")[2] for full in side.imported}
        assert set() == {name for names in DECIDED_EVENTS.values() for name in names} - known


# The same objects


def test_the_deciders_are_the_same_objects() -> None:
    """Tests that verdict, hand-over, load, batches and the loop are one thing on both sides, and core's."""
    pairs: list[tuple[Any, Any]] = [
        (simulated_world.blocking, live_world.blocking),
        (simulated_world.findings_of, live_world.findings_of),
        (simulated_world.start_of, live_world.start_of),
        (simulated_world.tokens_again, live_world.tokens_again),
        (simulated_world.LoadWindow, daemon.LoadWindow),
        (simulated_world.LOAD_PERIOD_S, daemon.LOAD_PERIOD_S),
        (simulated_leader.Batcher, live_leader.Batcher),
        (simulated_leader.BatchLimits, live_leader.BatchLimits),
        (simulated_world.BatchedSequence.handed_over.__func__, live_leader.BatchedSequence.handed_over.__func__),
        (simulation.run, daemon.run_loop),
        (make_plan, planner_server.make_plan),
    ]
    for simulated, live in pairs:
        assert simulated is live or isinstance(simulated, float)
        assert simulated == live
        assert getattr(simulated, "__module__", "spotserve.core").startswith(("spotserve.core", "spotserve.solvers"))


# A run


def eventful() -> Any:
    """A notice, a kill, an instance that joins, and load that grows."""
    return four_instances(
        event(20, "notice", "i0", grace_s=15), event(45, "kill", "i1"), event(60, "add", "i4"), end_s=90
    )


def played() -> list[Entry]:
    """The journal of an eventful scenario."""
    entries = Entries()
    simulate(small_scenario(eventful(), memory_bytes=6 * MIB, rate_rps=6.0), "live", make_plan, journal=entries)
    return entries.kept


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> type[CountingBatcher]:
    """A simulator whose batchers count."""
    CountingBatcher.tokens, CountingBatcher.evictions = {}, 0
    monkeypatch.setattr(simulated_leader, "Batcher", CountingBatcher)
    return CountingBatcher


def test_a_simulation_decides_nothing_of_its_own(counted: type[CountingBatcher]) -> None:
    """Tests that each command, plan, refusal, rate, token and eviction of a run is what the shared functions give."""
    entries = played()
    assert [] == strange_decisions(entries, make_plan)
    assert [] == strange_loads(entries)
    assert [] == strange_tokens(entries, counted)
    kinds = [entry.event.kind for entry in entries]
    for needed in ("plan_ready", "quiesced", "load_sampled", "request_ended", "instance_lost"):
        assert needed in kinds, f"the scenario has no {needed} to judge"


def test_rates_are_told_while_nothing_serves() -> None:
    """Tests that the simulator measures the load when every replica is lost, as a daemon does once it has served."""
    all_go = event(45, "kill", "i0", "i1", "i2", "i3")
    trace = four_instances(all_go, event(75, "add", "i4", "i5"), end_s=110)
    entries = Entries()
    simulate(small_scenario(trace, rate_rps=1.0), "live", make_plan, journal=entries)
    assert [] == strange_loads(entries.kept)
    told_s = [one.event.at_s for one in entries.kept if one.event.kind == "load_sampled"]
    assert any(46 < at_s < 75 for at_s in told_s), "no rate moves while nothing serves"


def test_a_refusal_of_the_simulators_own_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests that a simulator that refuses plans by a rule of its own is told of, at its first refusal."""

    def too_long(findings: tuple[Finding, ...]) -> str | None:
        return "I do not like it"

    monkeypatch.setattr(simulated_world, "blocking", too_long)
    assert any("plan_failed is not" in line for line in strange_decisions(played()[:40], make_plan))


def test_a_plan_of_the_simulators_own_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests that a simulator that touches a plan before it answers is told of."""

    def answer(self: Any, command_id: str, problem: Any) -> Any:
        plan = make_plan(problem)
        changed = plan.model_copy(update={"mode": "in_place"})
        return lambda at_s: events.PlanReady(at_s=at_s, command=command_id, plan=changed)

    monkeypatch.setattr(simulated_world.SimulatedCluster, "_answer", answer)
    assert any("plan_ready is not" in line for line in strange_decisions(played()[:40], make_plan))


def test_a_command_of_the_loops_own_is_found() -> None:
    """Tests that an entry whose commands the controller did not give is told of."""
    entries = played()[:60]
    index = next(i for i, entry in enumerate(entries) if any(c.kind == "admit_requests" for c in entry.commands))
    entries[index] = entries[index].model_copy(update={"commands": ()})
    assert f"entry {entries[index].sequence}: commands that the controller does not give" in strange_decisions(
        entries[: index + 1], make_plan
    )


def test_a_rate_of_the_simulators_own_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests that a simulator that tells rates by another rule than the shared one is told of."""

    class Eager(LoadWindow):
        def news(self, at_s: float) -> float | None:
            return self.sample(at_s)

    monkeypatch.setattr(simulated_world, "LoadWindow", Eager)
    assert strange_loads(played())


def test_tokens_of_the_simulators_own_are_found(
    monkeypatch: pytest.MonkeyPatch, counted: type[CountingBatcher]
) -> None:
    """Tests that a leader that gives each answer a token which no batch had is told of."""
    told, appended = simulated_leader.SimulatedReplica._tell, SimulatedLedger.append

    def generous(self: Any, sequence: Any, sampled: Sampled) -> None:
        if sampled.position == 0:
            self._ends[sampled.request, sampled.choice] -= 1
            sampled = replace(sampled, count=sampled.count + 1)
        told(self, sequence, sampled)

    def append(self: SimulatedLedger, owner: Any, sampled: Sampled) -> bool:
        stream = self.records[sampled.request].streams[sampled.choice]
        return appended(self, owner, replace(sampled, position=stream.num_tokens))

    monkeypatch.setattr(SimulatedLedger, "append", append)
    monkeypatch.setattr(simulated_leader.SimulatedReplica, "_tell", generous)
    assert strange_tokens(played(), counted)


def test_an_eviction_of_the_simulators_own_is_found(
    monkeypatch: pytest.MonkeyPatch, counted: type[CountingBatcher]
) -> None:
    """Tests that a leader that tells of an eviction which the batcher did not decide is told of."""

    def admit(self: Any, sequences: Any) -> None:
        handed = list(sequences)
        admitted(self, handed)
        for sequence, _ in handed:
            self._sink.evicted(self.owner, sequence.key)

    admitted = simulated_leader.SimulatedReplica.admit
    monkeypatch.setattr(simulated_leader.SimulatedReplica, "admit", admit)
    assert ["evictions"] == strange_tokens(played(), counted)


# What a run calls


def test_what_a_run_calls_is_what_a_daemon_calls() -> None:
    """Tests that every method of core that the simulator calls in a run has its call in the daemon's source, too."""
    with called_directly() as called:
        played()
    assert {"Batcher.schedule", "LoadWindow.news", "start_of", "blocking"} <= {name for _, name in called}
    assert [] == unknown_to_the_daemon(called)


def test_a_call_of_one_side_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests that a simulated world that asks core for an order on its way is told of."""
    handler = simulated_world.SimulatedCluster._launch

    def launch(self: Any, command_id: str, command: Any) -> None:
        as_if_there()
        handler(self, command_id, command)

    monkeypatch.setattr(simulated_world.SimulatedCluster, "_launch", launch)
    with called_directly() as called:
        played()
    assert ["spotserve.core.admission.by_arrival"] == unknown_to_the_daemon(called)


def peek() -> None:
    """Asks a function of core that nobody's business is."""
    by_arrival([])


as_if_there = FunctionType(peek.__code__, {"__name__": simulated_world.__name__, "by_arrival": by_arrival})
"""The same, as the simulated world's own."""


@contextmanager
def called_directly() -> Iterator[set[tuple[str, str]]]:
    """(module, name) of every function of core and solvers that the simulator's own code calls meanwhile."""
    called: set[tuple[str, str]] = set()
    seen: set[tuple[int, int]] = set()

    def note(frame: FrameType, kind: str, argument: object) -> None:
        back = frame.f_back
        if kind != "call" or back is None or (key := (id(frame.f_code), id(back.f_code))) in seen:
            return
        seen.add(key)
        here, there = back.f_globals.get("__name__", ""), frame.f_globals.get("__name__", "")
        if there.startswith(("spotserve.core.", "spotserve.solvers.")) and here.startswith("spotserve.sim."):
            called.add((there, frame.f_code.co_qualname))

    sys.setprofile(note)
    try:
        yield called
    finally:
        sys.setprofile(None)


def unknown_to_the_daemon(called: set[tuple[str, str]]) -> list[str]:
    """Of those calls the ones that no file of the daemon has, and nobody has named as deciding nothing."""
    strange = []
    for module, name in sorted(called):
        last = name.rpartition(".")[2]
        is_known = f"{module}.{name}" in DAEMON.imported or last in DAEMON.attributes
        is_plain = name.startswith("<") or ".<" in name or (last.startswith("__") and last.endswith("__"))
        is_named = f"{module}.{name}".startswith(tuple(ONLY_SIMULATED)) or last in ONLY_SIMULATED_METHODS
        if not (is_known or is_plain or is_named):
            strange.append(f"{module}.{name}")
    return strange


def test_the_table_excuses_what_is_there() -> None:
    """Tests that each name that is excused from a run's calls is one of them, so that none is excused in advance."""
    with called_directly() as called:
        played()
    names = {name.rpartition(".")[2] for _, name in called}
    assert set() == set(ONLY_SIMULATED_METHODS) - names - {"num_running"}, "num_running: static batches alone"
