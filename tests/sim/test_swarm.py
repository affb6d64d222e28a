"""Random faults by the hundreds: one seed draws the whole scenario and is in the test's name."""

from __future__ import annotations

import random
from typing import Any

import pytest

from spotserve.core import events as ev
from spotserve.core.canonical import digest
from spotserve.core.controller import Controller, apply
from spotserve.core.decide import decide
from spotserve.core.ids import InstanceId, RequestId
from spotserve.core.state import ClusterState
from spotserve.sim.world import check_streams
from tests.sim.test_virtual_world import Stage

NUM_SEEDS = 200
QUICK_SHARE = 20


def seeds(first: int, count: int) -> list[Any]:
    """Seeds from `first` on; `make quick` takes a twentieth of them, `make test` all."""
    marks = [() if index < count // QUICK_SHARE else (pytest.mark.swarm,) for index in range(count)]
    return [pytest.param(first + index, marks=mark) for index, mark in enumerate(marks)]


def draw_scenario(stage: Stage, seed: int) -> None:
    """Requests, notices (long, short, none at all), kills, withdrawals, cancellations, capacity that comes back."""
    dice = random.Random(seed)
    stage.requests(dice.randint(1, 12), every_s=dice.uniform(0.01, 0.3), max_tokens=dice.randint(5, 150))
    names = [f"i{index}" for index in range(8)]
    for _ in range(dice.randint(1, 6)):
        at_s = dice.uniform(2.0, 9.0)
        kind = dice.choice(["notice", "notice", "kill", "add", "withdraw", "cancel", "load", "silent"])
        name = dice.choice(names)
        if kind == "notice":
            stage.notice(at_s, name, grace_s=dice.choice([0.0, 0.05, 0.3, 1.0, 5.0, 30.0]))
        elif kind == "kill":
            stage.kill(at_s, name)
        elif kind == "add":
            stage.add(at_s)
        elif kind == "withdraw":
            stage.world.at(at_s, lambda now_s, n=name: ev.NoticeWithdrawn(at_s=now_s, instance=InstanceId(n)))
        elif kind == "cancel":
            stage.world.at(
                at_s, lambda now_s: ev.CancelRequested(at_s=now_s, request=RequestId(f"q{dice.randint(0, 11)}"))
            )
        elif kind == "load":
            stage.world.at(at_s, lambda now_s: ev.LoadSampled(at_s=now_s, load_rps=dice.uniform(0, 20)))
        else:
            silent_death(stage, at_s, InstanceId(name), told_s=dice.uniform(0.01, 2.0))


def silent_death(stage: Stage, at_s: float, instance: InstanceId, told_s: float) -> None:
    """An instance dies unannounced; the failure detector tells later."""

    def die() -> ev.Event | None:
        if instance not in stage.world.alive:
            return None
        stage.world.crash(instance)
        stage.world.after(told_s, lambda: ev.InstanceLost(at_s=stage.world.at_s, instance=instance, reason="silent"))
        return None

    stage.world.after(at_s, die)


@pytest.mark.parametrize("seed", seeds(0, NUM_SEEDS))
def test_nothing_is_lost(seed: int) -> None:
    """Tests that whatever is taken, every accepted request ends with exactly its tokens and the service recovers."""
    stage = draw_stage(seed)
    stage.play(300.0)
    check_calm(stage)
    check_replay(stage)


@pytest.mark.parametrize("seed", seeds(1000, NUM_SEEDS // 4))
def test_nothing_is_lost_over_a_restart(seed: int) -> None:
    """Tests the same when the coordinator dies somewhere in the middle and is started again."""
    stage = draw_stage(seed)
    stage.world.crash_coordinator_after(random.Random(seed).randint(2, 120))
    stage.play(300.0)
    controller = Controller()
    for entry in stage.journal.entries:
        controller.fold(entry)
    stage.controller = controller
    stage.world.restart_coordinator(controller.state, num_instances=2)
    stage.play(600.0)
    check_calm(stage)


def draw_stage(seed: int) -> Stage:
    """A cluster, a policy and a scenario, all from one seed; capacity comes back at the end."""
    dice = random.Random(-seed)
    policy = dice.choice(["live", "live", "live", "reroute", "reparallelize"])
    shares = (dice.choice([0.0, 0.1]), dice.choice([0.0, 0.0, 0.02]))
    stage = Stage(seed=seed, num_instances=dice.choice([2, 3, 4, 5]), policy=policy, shares=shares)
    draw_scenario(stage, seed)
    for at_s in (40.0, 40.2, 40.4, 40.6):
        stage.add(at_s)
    return stage


def check_calm(stage: Stage) -> None:
    """Every accepted request has ended, right and whole, and the service serves."""
    check_streams(stage.world)
    assert stage.service == "serving"
    assert stage.controller.state.requests == {}


def check_replay(stage: Stage) -> None:
    """A fold of the journal gives the same state, a replay the same decisions."""
    state = ClusterState()
    for entry in stage.journal.entries:
        assert entry.commands == decide(state, entry.event)
        state = apply(state, entry.event, entry.commands)
    assert digest(stage.controller.state) == digest(state)


@pytest.mark.parametrize("first", [2, *(pytest.param(first, marks=pytest.mark.swarm) for first in (5, 8))])
def test_restart_at_every_entry(first: int) -> None:
    """Tests that a coordinator that dies after any entry goes on from the fold and loses nothing."""
    reference = Stage(seed=7)
    reference.requests(6, max_tokens=80)
    reference.notice(4.0, "i0", grace_s=5.0)
    reference.play(100.0)
    total = len(reference.journal.entries)
    for cut in range(first, total, 9):
        check_restart(cut)


def check_restart(cut: int) -> None:
    """Play to entry `cut`, drop the coordinator with all unanswered commands, restart from the fold."""
    stage = Stage(seed=7)
    stage.requests(6, max_tokens=80)
    stage.notice(4.0, "i0", grace_s=5.0)
    stage.world.crash_coordinator_after(cut)
    stage.play(100.0)
    controller = Controller()
    for entry in stage.journal.entries:
        controller.fold(entry)
    stage.controller = controller
    stage.world.restart_coordinator(controller.state, num_instances=4)
    stage.play(200.0)
    check_streams(stage.world)
    assert stage.service == "serving", cut
