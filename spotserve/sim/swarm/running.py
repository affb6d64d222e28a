"""Running one seed: play, die, restart, heal; then the strangers judge the journal and the streams."""

from __future__ import annotations

import asyncio
import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from spotserve.core import events as ev
from spotserve.core.canonical import digest
from spotserve.core.commands import Command, KillInstance
from spotserve.core.controller import Controller, Entry, apply
from spotserve.core.decide import decide
from spotserve.core.ids import RequestId
from spotserve.core.loop import run
from spotserve.core.plan import Plan, PlanningProblem
from spotserve.core.service import service_state
from spotserve.core.state import GIVEN_BACK, RELEASE_TRIES, ClusterState
from spotserve.errors import SpotServeError
from spotserve.sim.checkers import Violation, check_all
from spotserve.sim.streams import ClientStream
from spotserve.sim.swarm.drawing import HEAL_S, CoordinatorCrash, SwarmScenario, draw_scenario
from spotserve.sim.swarm.injection import SwarmFaults
from spotserve.sim.virtual_timeline import VirtualRates
from spotserve.sim.world import VirtualWorld

LIVENESS_S = 400.0
"""After the healing everything that was accepted has to end within this time."""
LOOK_S = 20.0
CALM_S = 30.0
"""Once all have ended and the service serves, nothing may be planned any more after so long."""
MAX_ENTRIES = 20_000

Planner = Callable[[PlanningProblem], Plan]


class CoordinatorDiedError(Exception):
    """The process is no more; whatever it had not written is lost."""


@dataclass(slots=True)
class SeedResult:
    """What one seed showed."""

    scenario: SwarmScenario
    violations: list[Violation] = field(default_factory=list)
    faults: Counter[str] = field(default_factory=Counter)
    died_at: Counter[str] = field(default_factory=Counter)
    """Kinds of the entries at whose write a coordinator died."""
    refused: Counter[str] = field(default_factory=Counter)
    """Runs of tokens that the ledger did not take, by reason."""
    refused_plans: list[str] = field(default_factory=list)
    """What the checker had against plans of the planner: they were made again."""
    entries: int = 0
    num_runs: int = 0
    num_requests: int = 0
    num_tokens: int = 0
    simulated_s: float = 0.0
    journal_digest: str = ""

    @property
    def seed(self) -> int:
        """The seed."""
        return self.scenario.seed

    def as_json(self) -> dict[str, Any]:
        """Plain JSON data, hence `Any`; the scenario only where something is wrong."""
        told: dict[str, Any] = {
            "seed": self.seed,
            "violations": [str(violation) for violation in self.violations],
            "faults": dict(sorted(self.faults.items())),
            "entries": self.entries,
            "runs": self.num_runs,
            "requests": self.num_requests,
            "tokens": self.num_tokens,
            "simulated_s": round(self.simulated_s, 3),
            "journal_digest": self.journal_digest,
        }
        if self.violations:
            told["scenario"] = self.scenario.as_json()
        return told


class CrashingJournal:
    """Keeps entries in memory, and dies where the scenario says."""

    def __init__(self, crashes: Sequence[CoordinatorCrash]) -> None:
        self.entries: list[Entry] = []
        self.crashes = list(crashes)
        self.streams: Callable[[RequestId], ClientStream | None] = lambda _: None

    async def append(self, entries: Sequence[Entry]) -> None:
        """Remember them; a client is told that it is accepted once that is durable."""
        for entry in entries:
            if self._is_due(entry, "before"):
                raise CoordinatorDiedError
            self.entries.append(entry)
            if self._is_due(entry, "after"):
                raise CoordinatorDiedError
            if isinstance(entry.event, ev.RequestAccepted):
                stream = self.streams(entry.event.request)
                if stream is not None:
                    stream.accepted = True

    def _is_due(self, entry: Entry, phase: str) -> bool:
        return (
            bool(self.crashes)
            and (entry.sequence, phase) >= (self.crashes[0].entry, self.crashes[0].phase)
            and (self.crashes[0].phase == phase)
        )


class DyingWorld:
    """A world whose coordinator may die between two commands of one entry."""

    def __init__(self, world: VirtualWorld, journal: CrashingJournal) -> None:
        self._world = world
        self._journal = journal

    async def next_events(self) -> Sequence[ev.Event]:
        """What happens next."""
        if len(self._journal.entries) > MAX_ENTRIES:
            raise SpotServeError(f"more than {MAX_ENTRIES} entries: it does not come to rest")
        return await self._world.next_events()

    def submit(self, command_id: str, command: Command) -> None:
        """Hand a command on, unless the coordinator dies before it."""
        crashes = self._journal.crashes
        sequence, index = (int(part) for part in command_id.split("."))
        if crashes and crashes[0].phase == "midway" and sequence >= crashes[0].entry and index >= crashes[0].commands:
            raise CoordinatorDiedError
        self._world.submit(command_id, command)


class SeedRun:
    """One scenario from its begin to its judgement."""

    def __init__(self, scenario: SwarmScenario, planner: Planner) -> None:
        self.scenario = scenario
        self.result = SeedResult(scenario)
        self.faults = SwarmFaults(scenario)
        spec = scenario.spec()
        self.world = VirtualWorld(
            spec,
            planner,
            seed=scenario.seed,
            gpus_per_instance=scenario.gpus_per_instance,
            gpu_memory_bytes=scenario.gpu_memory_bytes,
            rates=VirtualRates(link_bytes_per_s=scenario.link_bytes_per_s, iteration_s=scenario.iteration_s),
            faults=self.faults,
        )
        self.controller = Controller()
        self.journal = CrashingJournal(scenario.coordinator)
        self.journal.streams = self._stream_of
        self.world.at(
            0.0,
            lambda at_s: ev.JournalBegun(at_s=at_s, spec=spec, num_instances=scenario.num_instances, patience_s=20.0),
        )
        self.faults.begin(self.world)

    def _stream_of(self, request: RequestId) -> ClientStream | None:
        known = self.world.requests.get(request)
        return None if known is None else known.stream

    def run(self) -> SeedResult:
        """Play the scenario and judge it."""
        try:
            self._play(HEAL_S)
            self._heal()
            self._demand_liveness()
        except SpotServeError as error:
            self._violated("error", f"{type(error).__name__}: {error}")
        except (AssertionError, KeyError, IndexError, StopIteration, TypeError, ValueError, AttributeError) as error:
            self._violated("error", _where(error))
        self._judge()
        self._count()
        return self.result

    def _violated(self, promise: str, message: str) -> None:
        entry = self.journal.entries[-1].sequence if self.journal.entries else None
        self.result.violations.append(Violation(promise, message, entry))

    def _play(self, until_s: float) -> None:
        """Run the loop; a coordinator that dies is started again."""
        self.world.until_s = until_s
        while True:
            try:
                asyncio.run(run(DyingWorld(self.world, self.journal), self.controller, self.journal))
            except CoordinatorDiedError:
                self._after_a_crash()
            else:
                if not self.world.stopped:
                    return
                self._after_a_stop()

    def _after_a_crash(self) -> None:
        crash = self.journal.crashes.pop(0)
        written = self.journal.entries[-1].event.kind if self.journal.entries else "nothing"
        self.result.died_at[written] += 1
        where = {"before": "before_write", "after": "after_write", "midway": "midway"}[crash.phase]
        self.faults.counts[f"coordinator_crash_{where}"] += 1
        self._restart(crash.down_s)

    def _after_a_stop(self) -> None:
        """A clean end: workers are sent home. What was open goes on at the next start."""
        assert self.scenario.stop is not None
        is_open = bool(self.controller.state.requests)
        self.faults.counts["stop_with_open_requests" if is_open else "stop_drained"] += 1
        self.world.send_home()
        self._restart(self.scenario.stop.down_s)

    def _restart(self, down_s: float) -> None:
        self.world.pass_without_coordinator(down_s)
        controller = Controller()
        for entry in self.journal.entries:
            controller.fold(entry)
        self.controller = controller
        self.world.last_entry = controller.sequence
        self.world.restart_coordinator(controller.state, num_instances=self.scenario.num_instances)

    # Healing

    def _heal(self) -> None:
        """Faults stop and capacity comes back; from here on there is no excuse."""
        self.journal.crashes.clear()
        self.faults.heal()
        staying = [one for one in self.controller.state.living() if one.state != "doomed"]
        missing = self.scenario.num_instances - len(staying)
        for number in range(max(0, missing)):
            self.world.after(0.1 * (number + 1), lambda: ev.InstanceWanted(at_s=self.world.at_s))

    def _demand_liveness(self) -> None:
        end_s = HEAL_S + LIVENESS_S
        while not self._all_ended() and self.world.until_s < end_s:
            self._play(self.world.until_s + LOOK_S)
        if not self._all_ended():
            left = sorted(self.controller.state.requests)
            self._violated("liveness", f"{', '.join(left)} did not end within {LIVENESS_S:g} s of the healing")
            return
        while service_state(self.controller.state) != "serving" and self.world.until_s < end_s:
            self._play(self.world.until_s + LOOK_S)
        if service_state(self.controller.state) != "serving":
            state = service_state(self.controller.state)
            self._violated("liveness", f"the service is {state} though the capacity is back")
        self._play(self.world.until_s + CALM_S)
        settled_at_s = self.world.until_s
        self._play(self.world.until_s + LOOK_S)
        self._demand_freed_memory()
        restless = [e.sequence for e in self.journal.entries if e.event.at_s > settled_at_s and _plans(e)]
        if restless:
            self._violated("liveness", f"still planning {CALM_S:g} s after the last request: entries {restless[:5]}")

    def _demand_freed_memory(self) -> None:
        """Workers have nothing but what serves, unless one would not free it: the next plan sees to that."""
        failed = Counter(
            (entry.event.epoch, entry.event.step)
            for entry in self.journal.entries
            if isinstance(entry.event, ev.StepFailed)
        )
        if max(failed.values(), default=0) >= RELEASE_TRIES:
            return
        serving = {(replica.id, replica.generation) for replica in self.controller.state.serving()}
        for name, gpu in self.world.gpus.items():
            left = sorted(set(gpu.positions) - serving)
            if left and name not in self.world.overtaken:
                self._violated("memory", f"{name} still has {left[0]}, which does not serve")

    def _all_ended(self) -> bool:
        offered = any(one.at_s > self.world.at_s for one in self.scenario.arrivals)
        return not offered and not self.controller.state.requests

    # Judgement

    def _judge(self) -> None:
        streams = {name: request.stream for name, request in self.world.requests.items()}
        for stream in self.world.requests.values():
            stream.read()
        self.result.violations += check_all(self.journal.entries, streams)
        self.result.violations += _check_replay(self.journal.entries, self.controller.state)

    def _count(self) -> None:
        result, entries = self.result, self.journal.entries
        result.faults = +self.faults.counts
        result.faults["request_timeout"] = sum(
            1
            for entry in entries
            if isinstance(entry.event, ev.TimerFired) and entry.event.timer.startswith("request:") and entry.commands
        )
        result.faults["capacity_given_back"] = sum(
            1
            for entry in entries
            for command in entry.commands
            if isinstance(command, KillInstance) and command.reason == GIVEN_BACK
        )
        result.faults = +result.faults
        result.refused = self.world.ledger.refused
        result.refused_plans = self.world.refused_plans
        result.entries = len(entries)
        result.num_runs = sum(1 for entry in entries for c in entry.commands if c.kind == "begin_run")
        result.num_requests = sum(1 for entry in entries if isinstance(entry.event, ev.RequestAccepted))
        result.num_tokens = sum(len(request.stream.tokens) for request in self.world.requests.values())
        result.simulated_s = self.world.at_s
        result.journal_digest = journal_digest(entries)


def _plans(entry: Entry) -> bool:
    return any(command.kind == "begin_run" for command in entry.commands)


def _where(error: BaseException) -> str:
    """The error and the line that raised it."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    place = "" if trace is None else f" in {trace.tb_frame.f_code.co_name}, line {trace.tb_lineno}"
    return f"{type(error).__name__}: {error}{place}"


def _check_replay(entries: Sequence[Entry], final: ClusterState) -> Iterator[Violation]:
    """P7: the journal folds to the same state, and the same events lead to the same decisions."""
    state = ClusterState()
    for entry in entries:
        if decide(state, entry.event) != entry.commands:
            yield Violation("P7", "decided otherwise than recorded", entry.sequence)
            return
        state = apply(state, entry.event, entry.commands)
    if digest(state) != digest(final):
        yield Violation("P7", "the journal folds to another state")


def journal_digest(entries: Sequence[Entry]) -> str:
    """One hash over all entries."""
    whole = hashlib.sha256()
    for entry in entries:
        whole.update(entry.model_dump_json().encode())
    return whole.hexdigest()


def run_seed(seed: int, planner: Planner) -> SeedResult:
    """Draw the scenario of a seed, run it, judge it."""
    return SeedRun(draw_scenario(seed), planner).run()
