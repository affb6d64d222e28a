"""Stalls and recomputed tokens are counted with the migration that streams waited for."""

from __future__ import annotations

import pytest

from spotserve.core import events as ev
from spotserve.core.ids import GpuId, ReplicaId, RequestId
from spotserve.core.observe import observe
from spotserve.core.plan import Trigger
from spotserve.core.snapshot import Replica, Stage
from spotserve.core.spec import POLICY_VERSION
from spotserve.core.state import ClusterState, Disturbance, Migration, Planning, ReplicaEntry, Request, TriggerKind

REQUEST, REPLICA = RequestId("1" * 32), ReplicaId("r2")


MOVED = Migration(epoch=2, trigger="lost", mode="live", outcome="completed")


def resumed(
    *later: Migration,
    trigger: TriggerKind | None = None,
    planned: TriggerKind | None = None,
    committed_at_s: float = 4.0,
) -> ClusterState:
    """A request that a migration after a loss has put on its replica, and that now says its first token there.

    Args:
        later: migrations that came after it.
        trigger: what asks for another plan meanwhile.
        planned: what another plan is made for meanwhile.
        committed_at_s: of the migration; the request has waited from 5 s on, until 9 s.
    """
    stage = Stage(layers=(0, 6), gpus=(GpuId("i0/0"),))
    replica = Replica(id=REPLICA, generation=2, max_running=8, kv_blocks=8, stages=(stage,))
    planning = None
    if planned is not None:
        planning = Planning(phase="solve", trigger=Trigger(kind=planned), membership=3, epoch_to=3)
    state = ClusterState(
        epoch=2,
        policy_version=POLICY_VERSION,
        replicas={REPLICA: ReplicaEntry(replica=replica, state="serving")},
        requests={REQUEST: Request(id=REQUEST, arrival_index=0, prompt_tokens=4, num_choices=1, max_tokens=9)},
        migrations=(MOVED.model_copy(update={"committed_at_s": committed_at_s}), *later),
        trigger=trigger,
        planning=planning,
    )
    owner = state.requests[REQUEST].model_copy(update={"state": "prefilling", "replica": REPLICA, "generation": 2})
    token = ev.FirstToken(
        at_s=9.0, request=REQUEST, replica=REPLICA, generation=2, stall_ms=4000.0, recomputed_tokens=70
    )
    return observe(state.with_request(owner), token)


@pytest.mark.parametrize("kind", [None, "joined", "load", "notice"])
def test_what_disturbs_nobody_takes_no_blame(kind: TriggerKind | None) -> None:
    """Tests that a plan asked for by a join, by load or by a notice is not charged with what a loss before it cost."""
    for state in (resumed(trigger=kind), resumed(planned=kind)):
        line = state.migrations[-1]
        assert (4000.0, 70) == (line.stall_ms_max, line.recomputed_tokens)
        assert Disturbance() == state.unattributed


@pytest.mark.parametrize("kind", ["lost", "start"])
def test_what_breaks_streams_is_charged(kind: TriggerKind) -> None:
    """Tests that streams that wait while a loss or a restart has no plan yet count with the migration to come."""
    for state in (resumed(trigger=kind), resumed(planned=kind)):
        assert 0 == state.migrations[-1].recomputed_tokens
        assert Disturbance(stall_ms_max=4000.0, recomputed_tokens=70) == state.unattributed


@pytest.mark.parametrize("kind", ["lost", "start"])
def test_who_stood_still_before_the_commit_waited_for_it(kind: TriggerKind) -> None:
    """Tests that what a stop cost is not charged to the loss, during it, of an instance that nothing ran on."""
    for state in (resumed(trigger=kind, committed_at_s=8.0), resumed(planned=kind, committed_at_s=8.0)):
        line = state.migrations[-1]
        assert (4000.0, 70) == (line.stall_ms_max, line.recomputed_tokens)
        assert Disturbance() == state.unattributed


@pytest.mark.parametrize("committed_at_s", [None, 8.5])
def test_a_later_migration_is_not_charged(committed_at_s: float | None) -> None:
    """Tests that a stall belongs to the first migration committed in it, whether or not another one is over too."""
    later = MOVED.model_copy(update={"epoch": 3, "trigger": "joined", "committed_at_s": committed_at_s})
    state = resumed(later, committed_at_s=8.0)
    assert [(4000.0, 70), (0.0, 0)] == [(line.stall_ms_max, line.recomputed_tokens) for line in state.migrations]
