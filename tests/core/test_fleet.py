"""Giving instances back: what the controller sets up again when it starts anew."""

from __future__ import annotations

from spotserve.core import commands as cmd
from spotserve.core import events as ev
from spotserve.core.decide import decide
from spotserve.core.fleet import HOLD_S, TIMER, WATCH_S, is_declined
from spotserve.core.ids import GpuId, InstanceId, ReplicaId
from spotserve.core.load import Samples
from spotserve.core.snapshot import Replica, Stage
from spotserve.core.state import ClusterState, Instance, ReplicaEntry
from tests.specs import small_spec


def test_a_restart_waits_for_idle_instances_again() -> None:
    """Tests that the timer that died with a coordinator is set by the next one, and only where instances go back."""
    timers = []
    for spare in (0, None):
        spec = small_spec()
        spec = spec.model_copy(update={"limits": spec.limits.model_copy(update={"spare_instances": spare})})
        state = ClusterState(spec=spec, served=True, epoch=1)
        event = ev.CoordinatorRestarted(at_s=5.0, term=2, num_instances=0, workers=())
        commands = decide(state, event)
        timers.append([one.at_s for one in commands if isinstance(one, cmd.SetTimer) and one.timer == TIMER])
    assert timers == [[5.0 + HOLD_S], []]


CALM: Samples = ((0.0, 1.0),)
BURST: Samples = ((0.0, 1.0), (200.0, 9.0), (230.0, 1.0))


def with_idle(loads: Samples, *, given_back: int = 0) -> ClusterState:
    """One instance serves, two are idle, none of which is to wait for a preemption."""
    spec = small_spec()
    spec = spec.model_copy(update={"limits": spec.limits.model_copy(update={"spare_instances": 0})})
    replica = Replica(
        id=ReplicaId("r1"),
        generation=1,
        max_running=8,
        kv_blocks=8,
        stages=(Stage(layers=(0, 6), gpus=(GpuId("i0/0"),)),),
    )
    return ClusterState(
        spec=spec,
        served=True,
        epoch=1,
        at_s=300.0,
        needed=1,
        given_back=given_back,
        loads=loads,
        load_rps=1.0,
        replicas={replica.id: ReplicaEntry(replica=replica, state="serving")},
        instances={InstanceId(name): Instance(id=InstanceId(name), state="ready") for name in ("i0", "i1", "i2")},
    )


def test_bursts_keep_what_is_idle() -> None:
    """Tests that idle instances go when the load is calm, and are looked at again later while it comes in bursts."""
    fired = ev.TimerFired(at_s=300.0, timer=TIMER)
    killed = [one.instance for one in decide(with_idle(CALM), fired) if isinstance(one, cmd.KillInstance)]
    assert ["i2", "i1"] == killed
    kept = decide(with_idle(BURST), fired)
    assert [(TIMER, 300.0 + HOLD_S)] == [(one.timer, one.at_s) for one in kept if isinstance(one, cmd.SetTimer)]
    assert not [one for one in kept if isinstance(one, cmd.KillInstance)]


def test_idle_instances_are_kept_until_the_load_is_known() -> None:
    """Tests that nothing is given back before arrivals have been watched for a while."""
    early = with_idle(CALM).model_copy(update={"at_s": WATCH_S - 1.0})
    commands = decide(early, ev.TimerFired(at_s=WATCH_S - 1.0, timer=TIMER))
    assert not [one for one in commands if isinstance(one, cmd.KillInstance)]
    assert [TIMER] == [one.timer for one in commands if isinstance(one, cmd.SetTimer)]


def test_a_burst_asks_for_what_was_given_back() -> None:
    """Tests that a burst asks for everything that was given back, once, and declines no offer."""
    for loads, number in ((CALM, 0), (BURST, 2)):
        state = with_idle(loads, given_back=2)
        commands = decide(state, ev.LoadSampled(at_s=300.0, load_rps=1.0))
        assert number == len([one for one in commands if isinstance(one, cmd.LaunchInstance)])
        assert is_declined(state, InstanceId("i2")) == (loads is CALM)
