"""The scenario that is lived through and simulated: its model, its trace, its requests, and what a journal says of it.

Two instances of one emulated GPU each, a replica on each. A notice takes one of them while four long answers are under
way, so that KV moves; later an instance joins, while four more are. Everything else comes as the seed says.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.random_llama import ModelShape
from benchmarks.workload import Arrival
from spotserve.core.controller import Entry
from spotserve.core.plan import Plan
from spotserve.core.replay import moments
from spotserve.core.service import service_state
from spotserve.core.state import ClusterState
from spotserve.store.journal import EntryJournal, Journal

MODEL = ModelShape(hidden_size=512, intermediate_size=1376, num_layers=8, num_q_heads=8, num_kv_heads=4, vocab_size=512)
"""An iteration takes some ten milliseconds on one core: long beside what surrounds it, short enough for a scenario."""
NUM_INSTANCES = 2
LONG_TOKENS = 192
LEAD_S = 0.8
"""So long before notice and join the long answers are asked for."""
PATIENCE_S = 60.0


@dataclass(frozen=True, slots=True)
class Scene:
    """When what happens, counted from the first `serving`, and the machines it happens to.

    Degrees are pinned: a profile that was measured beside other work should not change what is compared.
    """

    notice_s: float = 10.0
    grace_s: float = 8.0
    join_s: float = 24.0
    end_s: float = 38.0
    gpu_memory_mib: int = 192
    vocab_size: int = MODEL.vocab_size
    long_tokens: int = LONG_TOKENS

    @property
    def args(self) -> tuple[str, ...]:
        """Of `spotserve run`."""
        memory = f"{self.gpu_memory_mib}MiB"
        return ("--instances", str(NUM_INSTANCES), "--gpu-memory", memory, "-dp", "2", "-pp", "1", "-tp", "1")

    @property
    def trace(self) -> tuple[dict[str, object], ...]:
        """As a trace file has it."""
        return (
            {"at_s": self.notice_s, "kind": "notice", "instances": ["i0"], "grace_s": self.grace_s},
            {"at_s": self.join_s, "kind": "add", "count": 1},
        )


@dataclass(frozen=True, slots=True)
class CommittedPlan:
    """A plan that was committed: the (P, M) of its target's replicas, why it was made, and how it was run."""

    layout: tuple[tuple[int, int], ...]
    trigger: str
    mode: str

    @classmethod
    def of(cls, plan: Plan) -> CommittedPlan:
        """What counts of a plan."""
        layout = sorted((replica.pipeline, replica.tensor) for replica in plan.target.replicas)
        return cls(tuple(layout), plan.trigger.kind, plan.mode)

    def __str__(self) -> str:
        shapes = " ".join(f"({pipeline}, {tensor})" for pipeline, tensor in self.layout)
        return f"{self.trigger}: {shapes}, {self.mode}"


@dataclass(frozen=True, slots=True)
class Course:
    """What a journal says in order: SERVICE states without repetition, and committed plans."""

    states: tuple[str, ...]
    plans: tuple[CommittedPlan, ...]


def course_of(entries: Iterable[Entry]) -> Course:
    """The course of a journal up to its stop, which a simulation does not have."""
    states: list[str] = []
    plans: list[CommittedPlan] = []
    state = ClusterState()
    for moment in moments(state, entries):
        if moment.entry.event.kind == "stop_requested":
            break
        for command in moment.entry.commands:
            run = moment.before.run if moment.after.run is None else moment.after.run
            if command.kind == "commit_run" and run is not None:
                plans.append(CommittedPlan.of(run.plan))
        now = service_state(moment.after)
        if not states or states[-1] != now:
            states.append(now)
    return Course(tuple(states), tuple(plans))


def difference(live: Course, simulated: Course) -> str | None:
    """The first thing in which two courses differ; None for equal ones."""
    for what, ours, theirs in (
        ("SERVICE state", live.states, simulated.states),
        ("committed plan", live.plans, simulated.plans),
    ):
        for index in range(max(len(ours), len(theirs))):
            one = str(ours[index]) if index < len(ours) else "nothing"
            other = str(theirs[index]) if index < len(theirs) else "nothing"
            if one != other:
                return f"{what} {index + 1}: live {one}, simulated {other}"
    return None


def draw_requests(scene: Scene, seed: int, *, rate_rps: float = 1.0) -> tuple[Arrival, ...]:
    """A few dozen requests: Poisson arrivals, and four long ones before the notice and before the join."""
    rng = random.Random(seed)
    befores_s = (scene.notice_s, scene.join_s)
    times = [(before_s - LEAD_S + 0.05 * index, scene.long_tokens) for before_s in befores_s for index in range(4)]
    at_s = rng.expovariate(rate_rps)
    while at_s < scene.end_s:
        times.append((at_s, rng.randint(32, 80)))
        at_s += rng.expovariate(rate_rps)
    return tuple(_request(scene, index, at_s, tokens, rng) for index, (at_s, tokens) in enumerate(sorted(times)))


def draw_single_requests(scene: Scene, seed: int, *, count: int = 14) -> tuple[Arrival, ...]:
    """Requests one after another, never two at a time: what each takes is not due to any other."""
    rng = random.Random(seed)
    step_s = scene.end_s / count
    return tuple(_request(scene, index, 0.5 + step_s * index, 64, rng) for index in range(count))


def _request(scene: Scene, index: int, at_s: float, max_tokens: int, rng: random.Random) -> Arrival:
    prompt_ids = tuple(rng.randrange(3, scene.vocab_size) for _ in range(rng.randint(24, 96)))
    return Arrival(index, at_s, prompt_ids, max_tokens, temperature=0.0, seed=0)


def read_entries(state_dir: Path) -> Sequence[Entry]:
    """The journal of a stopped daemon."""
    return tuple(EntryJournal(Journal.read_only(state_dir / "journal.db")).read())
