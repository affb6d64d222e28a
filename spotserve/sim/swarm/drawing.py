"""Drawing a scenario: everything that a run of one seed does is decided here, before it begins.

Each seed leaves out some classes of faults altogether: what hides behind the noise of the others is then met as well
(swarm testing).
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal

from spotserve.core.spec import Limits, ServingSpec
from spotserve.sim.swarm.toy_model import toy_model, toy_profile

MIB = 1024 * 1024

STEP_KINDS = (
    *("reserve", "copy_weights", "load_weights", "copy_kv", "join_group", "quiesce", "copy_kv_delta", "commit"),
    *("activate", "recompute", "release"),
)
RARE_STEP_KINDS = ("copy_weights", "copy_kv", "copy_kv_delta", "recompute", "release", "quiesce")
"""Many runs have none of these: they are drawn twice as often, and the first that comes is crashed at."""

CRASH_TIMES: tuple[Literal["before", "during", "after"], ...] = ("before", "during", "after")

FIRST_FAULT_S = 1.5
LAST_FAULT_S = 12.0
HEAL_S = 30.0
"""From here on nothing goes wrong any more and the capacity is back."""

Phase = Literal["before", "after", "midway"]


@dataclass(frozen=True, slots=True)
class Arrival:
    """One request and what its client does."""

    at_s: float
    prompt_tokens: int
    max_tokens: int
    lengths: tuple[int, ...]
    timeout_s: float | None = None
    cancel_at_s: float | None = None
    reads_late: bool = False


@dataclass(frozen=True, slots=True)
class Disturbance:
    """Something that happens at a time to an instance, named by its place among those that live then."""

    at_s: float
    kind: str
    place: int
    seconds: float
    """A grace period, or how long it lasts."""
    told_s: float
    """How long nobody notices, or a share of `seconds`."""


@dataclass(frozen=True, slots=True)
class StepCrash:
    """The first or last worker of the n-th step of a kind dies at that step."""

    kind: str
    when: Literal["before", "during", "after"]
    number: int
    last: bool
    told_s: float


@dataclass(frozen=True, slots=True)
class CoordinatorCrash:
    """The coordinator dies at a journal write: before it, after it, or when some of its commands were given."""

    entry: int
    phase: Phase
    commands: int
    down_s: float


@dataclass(frozen=True, slots=True)
class Stop:
    """Somebody stops the service, waits for its end, and starts it again later."""

    at_s: float
    drain_s: float
    down_s: float


@dataclass(frozen=True, slots=True)
class Shares:
    """How often small things go wrong, per occasion."""

    message_duplicate: float = 0.0
    message_late: float = 0.0
    step_failure: float = 0.0
    out_of_memory: float = 0.0
    transfer_cut: float = 0.0
    transfer_slow: float = 0.0
    solver_slow: float = 0.0
    solver_failing: float = 0.0
    solver_absent: float = 0.0
    solver_wrong: float = 0.0
    kv_dropped: float = 0.0
    release_failure: float = 0.0


@dataclass(frozen=True, slots=True)
class SwarmScenario:
    """All of one seed."""

    seed: int
    num_layers: int
    num_instances: int
    gpus_per_instance: int
    gpu_memory_bytes: int
    policy: str
    max_running: int
    headroom_bytes: int
    link_bytes_per_s: float
    iteration_s: float
    arrivals: tuple[Arrival, ...]
    disturbances: tuple[Disturbance, ...]
    step_crashes: tuple[StepCrash, ...]
    coordinator: tuple[CoordinatorCrash, ...]
    shares: Shares
    stop: Stop | None
    spare_instances: int | None

    def spec(self) -> ServingSpec:
        """What is served."""
        return ServingSpec(
            model=toy_model(num_layers=self.num_layers),
            profile=toy_profile(link_bytes_per_s=self.link_bytes_per_s),
            limits=Limits(
                max_model_len=256,
                max_running=self.max_running,
                migration_headroom_bytes=self.headroom_bytes,
                spare_instances=self.spare_instances,
            ),
            policy=self.policy,
        )

    def as_json(self) -> dict[str, Any]:
        """Plain JSON data, hence `Any`."""
        return asdict(self)


NOTICES = ("short_notice", "long_notice", "late_notice", "doubled_notice", "withdrawn_notice", "notice_for_target")
NETWORK = ("link_slow", "link_cut", "link_parted", "mesh_cut")
KINDS = (*NOTICES, "no_notice", *NETWORK, "straggler", "flapping", "load", "foreign_message")


def draw_scenario(seed: int) -> SwarmScenario:
    """The scenario of a seed: the same in every process."""
    dice = random.Random(seed)
    gpus_per_instance = dice.choice([1, 1, 1, 2])
    num_instances = dice.choice([2, 3, 4, 5, 6] if gpus_per_instance == 1 else [2, 3])
    roomy = dice.random() < 0.7
    return SwarmScenario(
        seed=seed,
        num_layers=dice.choice([4, 6, 8]),
        num_instances=num_instances,
        gpus_per_instance=gpus_per_instance,
        gpu_memory_bytes=int((dice.uniform(6.0, 10.0) if roomy else dice.uniform(4.7, 6.0)) * MIB),
        policy=dice.choice([*["live"] * 8, "reroute", "reparallelize"]),
        max_running=dice.choice([4, 8, 8, 16]),
        headroom_bytes=0 if roomy else 700 * 1024,
        link_bytes_per_s=dice.choice([5e6, 2e7, 1e8]),
        iteration_s=dice.choice([0.03, 0.06, 0.09]),
        arrivals=_arrivals(dice),
        disturbances=_disturbances(dice),
        step_crashes=_step_crashes(dice),
        coordinator=_coordinator(dice),
        shares=_shares(dice),
        stop=_stop(dice),
        spare_instances=dice.choice([None, None, None, 0, 1]),
    )


def _arrivals(dice: random.Random) -> tuple[Arrival, ...]:
    every_s = dice.choice([0.05, 0.3, 0.9])
    longest = dice.choice([30, 150, 220, 220])
    arrivals = []
    at_s = dice.uniform(0.5, 4.0)
    for _ in range(dice.randint(2, 16)):
        at_s += dice.expovariate(1 / every_s)
        prompt_tokens = dice.choice([1, 20, 30, 90 if longest <= 150 else 30])
        max_tokens = dice.choice([1, 10, longest, longest, longest, longest])
        num_choices = dice.choice([1, 1, 1, 2, 3])
        lengths = tuple(max_tokens if dice.random() < 0.5 else dice.randint(1, max_tokens) for _ in range(num_choices))
        arrivals.append(
            Arrival(
                at_s=round(at_s, 3),
                prompt_tokens=prompt_tokens,
                max_tokens=max_tokens,
                lengths=lengths,
                timeout_s=round(dice.uniform(1.0, 20.0), 3) if dice.random() < 0.07 else None,
                cancel_at_s=round(at_s + dice.uniform(0.0, 6.0), 3) if dice.random() < 0.1 else None,
                reads_late=dice.random() < 0.2,
            )
        )
    return tuple(arrivals)


def _disturbances(dice: random.Random) -> tuple[Disturbance, ...]:
    kinds = ["long_notice", *(kind for kind in KINDS if dice.random() < 0.5)]
    draws = [_disturbance(dice, dice.choice(kinds)) for _ in range(dice.randint(1, 7))]
    draws += [_disturbance(dice, "capacity") for _ in draws if dice.random() < 0.5]
    return tuple(sorted(draws, key=lambda one: one.at_s))


def _disturbance(dice: random.Random, kind: str) -> Disturbance:
    seconds: dict[str, Callable[[], float]] = {
        "short_notice": lambda: dice.choice([0.0, 0.02, 0.1, 0.3]),
        "long_notice": lambda: dice.choice([1.5, 3.0, 8.0]),
        "link_cut": lambda: dice.uniform(0.05, 2.5),
        "link_parted": lambda: dice.uniform(4.0, 10.0),
        "load": lambda: dice.uniform(0.0, 20.0),
    }
    lasts = seconds.get(kind, lambda: dice.uniform(0.5, 6.0))
    return Disturbance(
        at_s=round(dice.uniform(FIRST_FAULT_S, LAST_FAULT_S), 3),
        kind=kind,
        place=dice.randrange(16),
        seconds=round(lasts(), 3),
        told_s=round(dice.choice([0.0, 0.05, 0.3, 2.0]) * dice.random(), 3),
    )


def _step_crashes(dice: random.Random) -> tuple[StepCrash, ...]:
    kinds = [dice.choice(STEP_KINDS + RARE_STEP_KINDS) for _ in range(dice.choice([0, 0, 1, 2, 4]))]
    return tuple(
        StepCrash(
            kind=kind,
            when=dice.choice(CRASH_TIMES),
            number=1 if kind in RARE_STEP_KINDS else dice.choice([1, 1, 2, 3, 5]),
            last=dice.random() < 0.5,
            told_s=round(dice.choice([0.0, 0.01, 0.3, 3.0]) * dice.random(), 3),
        )
        for kind in kinds
    )


def _coordinator(dice: random.Random) -> tuple[CoordinatorCrash, ...]:
    phases: tuple[Phase, ...] = ("before", "after", "midway")
    entries = sorted(dice.randint(2, 160) for _ in range(dice.choice([0, 0, 1, 1, 2])))
    return tuple(
        CoordinatorCrash(
            entry=entry,
            phase=dice.choice(phases),
            commands=dice.randint(1, 3),
            down_s=round(dice.choice([0.0, 0.2, 4.0]) * dice.random(), 3),
        )
        for entry in entries
    )


def _stop(dice: random.Random) -> Stop | None:
    if dice.random() < 0.8:
        return None
    return Stop(
        at_s=round(dice.uniform(FIRST_FAULT_S, LAST_FAULT_S), 3),
        drain_s=dice.choice([0.0, 0.5, 3.0, 10.0]),
        down_s=round(dice.choice([0.0, 1.0, 5.0]) * dice.random(), 3),
    )


def _shares(dice: random.Random) -> Shares:
    if dice.random() < 0.3:
        return Shares()

    def some(share: float, *, chance: float = 0.35) -> float:
        return share if dice.random() < chance else 0.0

    return Shares(
        message_duplicate=some(0.1),
        message_late=some(0.05),
        step_failure=some(0.03),
        out_of_memory=some(0.15, chance=0.25),
        transfer_cut=some(0.1),
        transfer_slow=some(0.3),
        solver_slow=some(0.4),
        solver_failing=some(0.3, chance=0.25),
        solver_absent=some(0.2, chance=0.15),
        solver_wrong=some(0.3, chance=0.25),
        kv_dropped=some(0.02),
        release_failure=dice.choice([0.0, 0.0, 0.0, 0.3, 0.9]),
    )
