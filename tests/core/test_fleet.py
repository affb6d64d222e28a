"""Giving instances back: what the controller sets up again when it starts anew."""

from __future__ import annotations

from spotserve.core import commands as cmd
from spotserve.core import events as ev
from spotserve.core.decide import decide
from spotserve.core.fleet import HOLD_S, TIMER
from spotserve.core.state import ClusterState
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
