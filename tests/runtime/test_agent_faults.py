"""Workers when things go wrong: killed peers, a coordinator that is replaced, aborted plans, full memory and pools."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import psutil
import pytest

from spotserve.core.ids import GpuId, ReplicaId
from spotserve.core.slices import Shard, stage_shard
from spotserve.core.wire import AdmitCommand, LoadWeightsCommand, ProbeCommand, ReserveCommand
from tests.runtime.cluster import Cluster
from tests.runtime.stage_play import Play, folder, forkserver, model, play, prompt_of, reference

__all__ = ["folder", "forkserver", "model", "play"]

pytestmark = pytest.mark.e2e

I0 = GpuId("i0/0")


def test_a_new_coordinator_adopts_the_streams(play: Play, folder: Path) -> None:
    """Tests that workers outlive a coordinator, decode 64 tokens ahead, and give the next one every token once."""
    prompt = prompt_of(11, 12)

    async def scenario(cluster: Cluster) -> None:
        await cluster.launch(2)
        replica = await cluster.place(1, 2, ["i0", "i1"])
        await cluster.admit(replica, "a", prompt, max_tokens=200)
        await cluster.until(lambda: len(cluster.tokens("a")) > 5)
        incarnations = {worker: register.incarnation for worker, register in cluster.workers.items()}
        await cluster.stop()
        cluster.term = 2
        await cluster.start()
        await cluster.until(lambda: len(cluster.workers) == 2)
        registers = cluster.workers.values()
        assert incarnations == {register.worker: register.incarnation for register in registers}
        assert ["serving", "serving"] == [role.state for register in registers for role in register.roles]
        await cluster.finished("a")
        assert reference(folder, prompt, 200) == cluster.tokens("a")
        stale = await cluster.ask(I0, ProbeCommand(term=1, command="stale"))
        assert "term 1 is below 2" == stale.error

    play(scenario)


@pytest.mark.parametrize("change", ["journal", "deterministic", "linear"])
def test_a_coordinator_of_another_service_is_left(play: Play, change: str) -> None:
    """Tests that a worker ends when the next coordinator has another journal, or computes otherwise."""

    async def scenario(cluster: Cluster) -> None:
        await cluster.launch(1)
        await cluster.place(1, 1, ["i0"])
        await cluster.stop()
        assert "first" == cluster.journal
        cluster.term = 2
        if change == "journal":
            cluster.journal = "second"
        else:
            other = {"deterministic": False} if change == "deterministic" else {"linear": "prepacked"}
            cluster.spec = cluster.spec.model_copy(update=other)
        await cluster.start()
        assert 1 == await cluster.exit_status(cluster.processes["i0"])
        last = (cluster.log_dir / "i0.log").read_text()
        assert ("another journal" if change == "journal" else "another model") in last

    play(scenario)


def test_a_worker_says_whose_it_is_and_follows_a_moved_model(play: Play) -> None:
    """Tests that a worker tells the journal that it belongs to, and reads the folder that the last welcome named."""

    async def scenario(cluster: Cluster) -> None:
        folder, cluster.model_path = cluster.model_path, cluster.log_dir / "moved away"
        await cluster.launch(1)
        assert [None] == [register.journal for register in cluster.workers.values()]
        await cluster.stop()
        cluster.term, cluster.model_path = 2, folder
        await cluster.start()
        await cluster.until(lambda: cluster.workers)
        assert ["first"] == [register.journal for register in cluster.workers.values()]
        replica = await cluster.place(1, 1, ["i0"])
        await cluster.admit(replica, "a", prompt_of(10, 8), max_tokens=8)
        await cluster.finished("a")

    play(scenario)


def test_undurable_tokens_are_bounded(play: Play) -> None:
    """Tests that a leader stops 64 tokens past what the ledger reported durable."""

    async def scenario(cluster: Cluster) -> None:
        cluster.cap(0)
        await cluster.launch(1)
        replica = await cluster.place(1, 1, ["i0"])
        await cluster.admit(replica, "a", prompt_of(12, 5), max_tokens=200)
        await cluster.until(lambda: len(cluster.tokens("a")) >= 64)
        positions = await cluster.quiesce(replica)
        assert [64] == [position.tokens for position in positions]
        assert 64 == len(cluster.tokens("a"))

    play(scenario)


def test_a_killed_rank_breaks_its_replica_once(play: Play, folder: Path) -> None:
    """Tests that the survivors of a killed rank report it, and that they can serve the request in another replica."""
    prompt = prompt_of(13, 40)

    async def scenario(cluster: Cluster) -> None:
        await cluster.launch(3)
        replica = await cluster.place(1, 3, ["i0", "i1", "i2"])
        await cluster.admit(replica, "a", prompt, max_tokens=120)
        await cluster.until(lambda: len(cluster.tokens("a")) > 5)
        cluster.kill(GpuId("i1/0"))
        await cluster.until(lambda: len(cluster.broken) == 2 and len(cluster.workers) == 2)
        await cluster.do(I0, ProbeCommand)
        target = cluster.replica(2, 1, ["i0", "i2"], name="r2", generation=2)
        await cluster.reserve(target)
        await cluster.load(target)
        await cluster.join(target)
        durable = len(cluster.tokens("a"))
        request = cluster.prompts[next(iter(cluster.prompts))]
        content = request.choices[0].model_copy(update={"token_ids": tuple(cluster.tokens("a")), "kv_generation": 1})
        await cluster.activate(target, [request.model_copy(update={"choices": (content,)})])
        await cluster.finished("a")
        assert reference(folder, prompt, 120) == cluster.tokens("a")
        probe = await cluster.probe(I0)
        assert 40 + durable == probe["prefilled_tokens"]
        assert 2 == len(cluster.broken)

    play(scenario)


def test_abort_keeps_weights_and_resume_goes_on(play: Play, folder: Path) -> None:
    """Tests that an aborted migration leaves the old replica decoding exactly and the copied weights as holdings."""
    prompt = prompt_of(14, 50)

    async def scenario(cluster: Cluster) -> None:
        await cluster.launch(2)
        source = await cluster.place(1, 1, ["i0"])
        cluster.cap(20)
        await cluster.admit(source, "a", prompt, max_tokens=200)
        await cluster.until(lambda: len(cluster.tokens("a")) > 2)
        target = cluster.replica(1, 1, ["i1"], name="r2", generation=2)
        await cluster.reserve(target)
        copied = await cluster.copy_weights(target, I0)
        await cluster.copy_kv(source, target)
        assert 1 == len(await cluster.quiesce(source))
        await cluster.abort(target)
        probe = await cluster.probe(GpuId("i1/0"))
        assert ([], 0) == (probe["shards"], probe["memory_bytes"])
        assert [] != probe["slices"]
        cluster.cap(None)
        await cluster.resume(source)
        again = cluster.replica(1, 1, ["i1"], name="r3", generation=3)
        await cluster.reserve(again)
        assert copied > 0
        assert 0 == await cluster.copy_weights(again, I0)
        await cluster.join(again)
        await cluster.activate(again)
        await cluster.admit(again, "b", prompt, max_tokens=200)
        await cluster.finished("a", "b")
        assert [reference(folder, prompt, 200)] * 2 == [cluster.tokens("a"), cluster.tokens("b")]

    play(scenario)


def test_requests_move_into_a_serving_replica(play: Play, folder: Path) -> None:
    """Tests that requests move with their KV into a replica that serves its own meanwhile."""
    prompts = {"a": prompt_of(15, 60), "b": prompt_of(16, 30)}

    async def scenario(cluster: Cluster) -> None:
        await cluster.launch(3)
        source = await cluster.place(1, 2, ["i0", "i1"])
        target = await cluster.place(1, 1, ["i2"], name="r2", generation=2)
        cluster.cap(20)
        await cluster.admit(source, "a", prompts["a"], max_tokens=200)
        await cluster.admit(target, "b", prompts["b"], max_tokens=200)
        await cluster.until(lambda: len(cluster.tokens("a")) > 20 and len(cluster.tokens("b")) > 2)
        assert await cluster.copy_kv(source, target) > 0
        positions = await cluster.quiesce(source)
        assert 1 == len(positions)
        _, missing = await cluster.copy_kv_delta(positions)
        assert [] == missing
        cluster.cap(None)
        await cluster.do(
            target.leader,
            AdmitCommand,
            replica=target.id,
            generation=target.generation,
            requests=tuple(cluster.contents(positions)),
        )
        await cluster.release(source)
        await cluster.finished("a", "b")
        for name, prompt in prompts.items():
            assert reference(folder, prompt, 200) == cluster.tokens(name)
        assert {("r1", 1), ("r2", 2)} == set(cluster.stream("a").sources)
        probe = await cluster.probe(target.leader)
        assert 30 == probe["prefilled_tokens"]

    play(scenario)


def test_kv_that_is_not_there_is_recomputed(play: Play, folder: Path) -> None:
    """Tests that a choice whose KV one rank lacks is prefilled again under a new kv_generation, exactly."""
    prompt = prompt_of(17, 60)

    async def scenario(cluster: Cluster) -> None:
        await cluster.launch(3)
        source = await cluster.place(1, 1, ["i0"])
        cluster.cap(20)
        await cluster.admit(source, "a", prompt, max_tokens=200)
        await cluster.until(lambda: len(cluster.tokens("a")) > 20)
        target = cluster.replica(2, 1, ["i1", "i2"], name="r2", generation=2)
        await cluster.reserve(target)
        await cluster.load(target)
        await cluster.join(target)
        await cluster.copy_kv(source, target)
        positions = await cluster.quiesce(source)
        assert 1 == len(positions)
        cluster.drop_route()  # The second stage never gets its delta.
        await cluster.copy_kv_delta(positions)
        cluster.cap(None)
        await cluster.activate(target, cluster.contents(positions))
        await cluster.finished("a")
        assert reference(folder, prompt, 200) == cluster.tokens("a")
        assert [("r2", 1)] == [(evicted.replica, evicted.kv_generation) for evicted in cluster.evictions]

    play(scenario)


def test_a_small_pool_evicts_and_stays_exact(play: Play, folder: Path) -> None:
    """Tests that streams evicted for want of blocks come back with the very same tokens, in a replica of two stages."""
    prompts = {name: prompt_of(20 + index, 30) for index, name in enumerate("abc")}

    async def scenario(cluster: Cluster) -> None:
        await cluster.launch(2)
        replica = await cluster.place(2, 1, ["i0", "i1"], kv_blocks=10)
        for name, prompt in prompts.items():
            await cluster.admit(replica, name, prompt, max_tokens=80)
        await cluster.admit(replica, "huge", prompt_of(30, 150), max_tokens=80)
        await cluster.finished(*prompts, "huge")
        for name, prompt in prompts.items():
            assert reference(folder, prompt, 80) == cluster.tokens(name)
        assert cluster.evictions
        assert ("error", []) == (cluster.stream("huge").finish_reason, cluster.tokens("huge"))
        probe = await cluster.probe(I0)
        assert (10, len(cluster.evictions)) == (probe["free_blocks"], probe["evictions"])
        while (await cluster.probe(GpuId("i1/0")))["free_blocks"] != 10:
            await asyncio.sleep(0.02)

    play(scenario)


def test_commands_are_executed_once_and_bounded_by_memory(play: Play) -> None:
    """Tests that a repeated id gets its first outcome, and that what exceeds the budget takes nothing."""

    async def scenario(cluster: Cluster) -> None:
        await cluster.launch(1, memory="2MiB")
        model = cluster.spec.model
        shard = stage_shard(model, layers=(0, 4), tensor=1, rank=0)

        def reserve(command: str, *, kv_blocks: int, shard: Shard = shard) -> ReserveCommand:
            return ReserveCommand(
                term=1,
                command=command,
                epoch=1,
                replica=ReplicaId("r1"),
                generation=1,
                stage=0,
                rank=0,
                pipeline=1,
                tensor=1,
                shard=shard,
                kv_blocks=kv_blocks,
                max_running=8,
            )

        refused = await cluster.ask(I0, reserve("big", kv_blocks=200))
        assert not refused.ok
        assert "over_memory" in str(refused.error)
        assert 0 == (await cluster.probe(I0))["memory_bytes"]
        assert refused == await cluster.ask(I0, reserve("big", kv_blocks=1))
        assert (await cluster.ask(I0, reserve("small", kv_blocks=4))).ok
        foreign = LoadWeightsCommand(term=1, command="load", epoch=1, replica=ReplicaId("r1"), generation=1, slices=())
        assert {"bytes": 0} == (await cluster.ask(I0, foreign)).result

    play(scenario)


def test_an_instance_of_two_gpus_is_one_group(play: Play, folder: Path) -> None:
    """Tests that an instance's GPUs register apart, serve together, take SIGTERM as a notice and die together."""
    prompt = prompt_of(18, 9)

    async def scenario(cluster: Cluster) -> None:
        await cluster.launch(1, gpus=2)
        replica = await cluster.place(1, 2, ["i0/0", "i0/1"])
        await cluster.admit(replica, "a", prompt, max_tokens=100)
        await cluster.until(lambda: len(cluster.tokens("a")) > 2)
        registers = [cluster.workers[worker] for worker in sorted(cluster.workers)]
        group = cluster.processes["i0"].pid
        assert [("i0", 2, group)] * 2 == [(r.instance, r.num_gpus, r.process_group) for r in registers]
        os.killpg(group, signal.SIGTERM)
        os.killpg(group, signal.SIGINT)
        await cluster.until(lambda: sorted(cluster.notices) == ["i0/0", "i0/1"])
        await cluster.finished("a")
        assert reference(folder, prompt, 100) == cluster.tokens("a")
        cluster.kill(I0)
        await cluster.until(lambda: not cluster.workers)
        async with asyncio.timeout(10):
            while any(psutil.pid_exists(register.pid) for register in registers):
                await asyncio.sleep(0.02)

    play(scenario)


def test_orphans_and_strangers_exit(play: Play, tmp_path: Path) -> None:
    """Tests that a worker exits after its orphan timeout, and at once when its secret is wrong or it is a double."""

    async def scenario(cluster: Cluster) -> None:
        cluster.orphan_timeout_s = 1.0
        await cluster.launch(1)
        double = cluster.fork("i0")
        stranger = cluster.fork("i7", secret="wrong")
        assert (1, 1) == (await cluster.exit_status(double), await cluster.exit_status(stranger))
        assert ["i0/0"] == list(cluster.workers)
        await cluster.stop()
        assert 0 == await cluster.exit_status(cluster.processes["i0"])

    play(scenario)


def test_a_failpoint_kills_where_it_says(play: Play) -> None:
    """Tests that a worker told to die at a step dies there and leaves the command unanswered."""

    async def scenario(cluster: Cluster) -> None:
        await cluster.launch(1, env={"SPOTSERVE_FAILPOINT": "load_weights:after"})
        replica = cluster.replica(1, 1, ["i0"])
        await cluster.reserve(replica)
        loading = asyncio.create_task(cluster.load(replica))
        assert -signal.SIGKILL == await cluster.exit_status(cluster.processes["i0"])
        await cluster.until(lambda: not cluster.workers)
        assert not loading.done()
        cluster.switchboard.fail_worker(I0)
        with pytest.raises(AssertionError, match="the worker is lost"):
            await loading

    play(scenario)
