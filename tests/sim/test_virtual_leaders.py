"""Leaders of the virtual world: what the shared batcher decides shows in journal and streams."""

from __future__ import annotations

from spotserve.core import commands as cmd
from spotserve.core.batching import Batcher
from spotserve.core.events import Quiesced
from spotserve.core.wire import MAX_UNDURABLE_TOKENS, ChoicePosition
from spotserve.sim.world import check_streams
from tests.sim.test_faults_virtual import restart
from tests.sim.test_virtual_world import Stage


def batchers(stage: Stage) -> list[Batcher]:
    """Those of every leader there ever was."""
    return [virtual.engine.batcher for virtual in stage.world.replicas.values()]


def test_leaders_drive_the_shared_batcher() -> None:
    """Tests that every token of a stream was scheduled by the batcher that the daemon's leaders drive."""
    stage = Stage()
    stage.requests(5, max_tokens=40)
    stage.play(30.0)
    check_streams(stage.world)
    assert {Batcher} == {type(one) for one in batchers(stage)}
    assert 40 <= sum(one.num_iterations for one in batchers(stage)) < 5 * 40, "requests share iterations"
    assert 5 * 20 == sum(one.num_prefilled_tokens for one in batchers(stage))


def test_a_full_pool_evicts_and_loses_nothing() -> None:
    """Tests that where blocks run out the youngest gives way, the controller hears of it, and all streams are whole."""
    stage = Stage(num_instances=2, gpu_memory_bytes=6_000_000, limits={"max_running": 8})
    stage.requests(8, every_s=0.01, max_tokens=220)
    stage.play(120.0)
    check_streams(stage.world)
    assert sum(one.num_evictions for one in batchers(stage)) > 0
    assert "request_evicted" in {entry.event.kind for entry in stage.journal.entries}


def test_a_stop_finds_prefills_under_way() -> None:
    """Tests that requests whose prefill is not over are told as they are when a replica stops, and end all the same."""
    told = [p for tick in range(6) for p in stopped_while_prefilling(4.0 + 0.05 * tick)]
    assert any(0 < p.kv_tokens < 190 and p.tokens == 0 for p in told)
    assert any(p.tokens > 0 for p in told)


def stopped_while_prefilling(noticed_at_s: float) -> list[ChoicePosition]:
    """Where requests with long prompts stood when a replica that they came to had stopped."""
    stage = Stage(limits={"max_running": 8})
    for index in range(12):
        stage.world.request(4.0 + 0.005 * index, name=f"q{index}", prompt_tokens=190, max_tokens=30)
    stage.notice(noticed_at_s, "i0", grace_s=30.0)
    stage.play(60.0)
    check_streams(stage.world)
    assert "serving" == stage.service
    return [p for entry in stage.journal.entries if isinstance(entry.event, Quiesced) for p in entry.event.positions]


def test_a_leader_waits_for_a_ledger_that_is_away() -> None:
    """Tests that without a coordinator a leader samples so far ahead and no further, and goes on with the next one."""
    stage = Stage()
    stage.requests(3, max_tokens=200)
    stage.play(4.0)
    stage.world.pass_without_coordinator(30.0)
    ahead = [
        tokens - stage.world.requests[name].durable(choice)
        for virtual in stage.world.replicas.values()
        for (name, choice), tokens in virtual.sampled.items()
    ]
    assert [MAX_UNDURABLE_TOKENS] * 3 == ahead
    restart(stage)
    stage.play(100.0)
    check_streams(stage.world)
    assert not any(isinstance(c, cmd.FenceReplica) for entry in stage.journal.entries for c in entry.commands)
