"""The plan builder: each policy and mode by example, and any cluster in any trouble judged by the checker."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from spotserve.core.canonical import canonical_json
from spotserve.core.check import check_plan
from spotserve.core.cost import replica_shards
from spotserve.core.plan import CopyKv, CopyKvDelta, CopyWeights, LoadWeights, Plan, Quiesce, Release, Reserve, Trigger
from spotserve.core.slices import kv_block_bytes, shard_bytes
from spotserve.errors import SpecError
from spotserve.solvers.planner import make_plan
from spotserve.solvers.planner_server import answer, serve
from tests import planning_worlds
from tests.planning_worlds import (
    KIB,
    MIB,
    kinds,
    lost,
    notice,
    random_problem,
    request,
    running_problem,
    tiny_spec,
    with_left_over,
    with_memory,
)
from tests.specs import with_experts

ROOT = Path(__file__).resolve().parents[2]


def layout(plan: Plan) -> dict[str, list[list[str]]]:
    """GPUs of each stage of each replica."""
    return {one.id: [list(stage.gpus) for stage in one.stages] for one in plan.target.replicas}


def actions(plan: Plan) -> list[str]:
    """What becomes of the requests."""
    return [action.action for action in plan.requests]


@pytest.mark.parametrize("seed", range(200))
def test_checker_finds_nothing(seed: int) -> None:
    """Tests that whatever the cluster and the trouble, the independent checker has no finding."""
    plan = make_plan(random_problem(seed))
    assert () == check_plan(plan)


@pytest.mark.parametrize("seed", range(30))
def test_checker_finds_nothing_of_experts(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests the same for parameters of three dimensions, of which a rank owns two ranges."""
    dense = planning_worlds.tiny_model
    monkeypatch.setattr(planning_worlds, "tiny_model", lambda **changes: with_experts(dense(**changes)))
    problem = random_problem(seed)
    assert any(len(parameter.segments) == 2 for parameter in problem.spec.model.parameters)
    assert () == check_plan(make_plan(problem))


def test_prepacked_weights_take_memory_twice() -> None:
    """Tests that new replicas keep room for the copies, in any cluster and trouble, and that some would not else."""
    num_short = 0
    for seed in range(40):
        plain = random_problem(seed)
        prepacked = plain.model_copy(update={"spec": plain.spec.model_copy(update={"linear": "prepacked"})})
        assert not short_of_copies(make_plan(prepacked))
        num_short += short_of_copies(make_plan(plain))
    assert num_short > 0


def short_of_copies(plan: Plan) -> bool:
    """Whether some new position's pool and its weights twice exceed its GPU."""
    world, model = plan.snapshot.world, plan.spec.model
    memory = {gpu.id: gpu.memory_bytes for instance in world.instances for gpu in instance.gpus}
    before = {replica.id for replica in world.replicas}
    return any(
        2 * shard_bytes(model, shard)
        + replica.kv_blocks * kv_block_bytes(model, shard, block_tokens=plan.spec.limits.kv_block_tokens)
        > memory[gpu]
        for replica in plan.target.replicas
        if replica.id not in before
        for gpu, shard in zip(
            replica.gpus, replica_shards(model, pipeline=replica.pipeline, tensor=replica.tensor), strict=True
        )
    )


def test_notice_moves_requests_to_the_replica_that_stays() -> None:
    """Tests that an untouched replica takes a doomed one's requests with their KV and copies no weight."""
    plan = make_plan(running_problem(tiny_spec(), shape=(2, 2, 1), memory_bytes=3 * MIB, trigger=notice("i2")))
    assert {"r3.1": [["i0/0"], ["i1/0"]]} == layout(plan)
    assert ["move", "move"] == actions(plan)
    assert {"copy_kv", "quiesce", "copy_kv_delta", "commit", "release"} == set(kinds(plan))
    assert [("i2/0", "i0/0"), ("i3/0", "i1/0")] == [
        (step.source, step.destination) for step in plan.steps if isinstance(step, CopyKv)
    ]


def test_spare_takes_over_a_stage() -> None:
    """Tests that a spare gets the doomed stage's weights from it, and the stage that stays is not copied."""
    problem = running_problem(
        tiny_spec(), shape=(1, 2, 1), memory_bytes=4 * MIB, trigger=notice("i1"), spare=1, kv_blocks=20
    )
    plan = make_plan(problem)
    assert ("live", {"r4": [["i0/0"], ["i2/0"]]}) == (plan.mode, layout(plan))
    assert [("i1/0", "i2/0", "holder_doomed")] == [
        (step.source, step.destination, step.reason) for step in plan.steps if isinstance(step, CopyWeights)
    ]


def test_loss_recomputes() -> None:
    """Tests that without notice no KV is copied, nothing is quiesced, and the requests are computed again."""
    plan = make_plan(running_problem(tiny_spec(), shape=(2, 2, 1), memory_bytes=3 * MIB, trigger=lost("i1")))
    assert ["commit", "recompute", "release"] == kinds(plan)
    assert ["recompute", "recompute"] == actions(plan)
    assert plan.complete


def test_join_forms_a_replica_from_its_peers() -> None:
    """Tests that two blank GPUs become a second replica whose weights come from the first, which is not stopped."""
    trigger = Trigger.model_validate({"kind": "joined", "instances": ["i3"]})
    plan = make_plan(running_problem(tiny_spec(), shape=(1, 2, 1), memory_bytes=3 * MIB, trigger=trigger, spare=2))
    assert {"r3.1": [["i0/0"], ["i1/0"]], "r4": [["i2/0"], ["i3/0"]]} == layout(plan)
    assert ["reserve", "reserve", "copy_weights", "copy_weights", "join_group", "commit", "activate"] == kinds(plan)


def test_first_placement_loads_from_storage() -> None:
    """Tests that a cluster without replicas gets them by reserve, load, join, commit, activate."""
    problem = running_problem(
        tiny_spec(), shape=(1, 1, 1), memory_bytes=3 * MIB, trigger=Trigger(kind="start"), spare=3, requests_each=0
    )
    world = problem.snapshot.world.model_copy(update={"replicas": (), "holdings": (), "epoch": 0})
    snapshot = problem.snapshot.model_copy(update={"world": world})
    for policy in ("live", "paper", "reroute", "reparallelize"):
        spec = tiny_spec(policy=policy)
        plan = make_plan(problem.model_copy(update={"spec": spec, "snapshot": snapshot, "epoch_to": 1}))
        assert ("live", {1}) == (plan.mode, {one.generation for one in plan.target.replicas})
        assert ["reserve", "load_weights", "join_group", "commit", "activate"] == list(dict.fromkeys(kinds(plan)))
        assert () == check_plan(plan)


def test_nothing_fits() -> None:
    """Tests that with one GPU too few the plan has no target, keeps serving to the last moment, and says it waits."""
    plan = make_plan(
        running_problem(tiny_spec(), shape=(1, 2, 1), memory_bytes=2 * MIB, trigger=notice("i0"), kv_blocks=16)
    )
    assert ((), False, True, "infeasible") == (
        plan.target.replicas,
        plan.complete,
        plan.applyable,
        plan.solver["configure"].status,
    )
    (stop,) = [step for step in plan.steps if isinstance(step, Quiesce)]
    assert stop.latest_s == stop.not_before_s
    assert 20 < stop.not_before_s < 30
    assert [("recompute", None)] * 2 == [(action.action, action.to_replica) for action in plan.requests]


def test_nothing_to_do() -> None:
    """Tests that a load that the running layout serves makes an empty plan that cannot be applied."""
    problem = running_problem(tiny_spec(), shape=(2, 2, 1), memory_bytes=3 * MIB, trigger=Trigger(kind="load"))
    for policy in ("live", "paper", "reroute", "reparallelize"):
        # The paper's optimizer looks at nothing that runs: it has another favourite under an unknown load.
        pins = {"data": 2, "pipeline": 2, "tensor": 1} if policy == "paper" else {}
        plan = make_plan(problem.model_copy(update={"spec": tiny_spec(policy=policy, **pins)}))
        assert ((), False, True) == (plan.steps, plan.applyable, plan.complete)


def test_too_many_requests_for_the_target() -> None:
    """Tests that those furthest along move while B holds them, the rest finishes in time or is recomputed."""
    problem = running_problem(
        tiny_spec(max_running=4), shape=(2, 2, 1), memory_bytes=3 * MIB, trigger=notice("i2"), requests_each=3
    )
    old = problem.snapshot.world.replicas[1]
    extra = request(900, old, tokens=190), request(901, old, tokens=3, max_tokens=100_000)
    snapshot = problem.snapshot.model_copy(update={"requests": (*problem.snapshot.requests, *extra)})
    plan = make_plan(problem.model_copy(update={"snapshot": snapshot}))
    by_name = {action.request[-3:].lstrip("0"): action.action for action in plan.requests}
    assert by_name["384"] == "move"
    assert by_name["385"] == "recompute"
    assert ["finish", "finish", "finish", "move", "recompute"] == sorted(actions(plan))
    (stop,) = [step for step in plan.steps if isinstance(step, Quiesce)]
    assert 0 < stop.not_before_s < (stop.latest_s or 0)


def test_short_grace_steps_down_the_ladder() -> None:
    """Tests that KV is dropped as the grace period shrinks: all of it, some of it, none; survivors' weights last."""
    rungs = []
    for remaining_s in (30.0, 0.5, 0.4, 0.0):
        problem = running_problem(
            tiny_spec(link_bytes_per_s=1e6, max_running=8),
            shape=(2, 2, 1),
            memory_bytes=5 * MIB,
            trigger=notice("i2", remaining_s=remaining_s),
            requests_each=4,
            kv_blocks=60,
        )
        plan = make_plan(problem)
        assert () == check_plan(plan)
        rungs.append((plan.fallback[0], actions(plan).count("move")))
    assert [rung for rung, _ in rungs] == ["all_kv", "hottest_kv", "hottest_kv", "tokens_only"]
    assert sorted((moved for _, moved in rungs), reverse=True) == [moved for _, moved in rungs]
    assert rungs[0][1] == 4


def test_no_grace_reads_no_doomed_worker() -> None:
    """Tests that with no time left nothing is read from the doomed instance, storage is the source."""
    problem = running_problem(
        tiny_spec(), shape=(1, 2, 1), memory_bytes=4 * MIB, trigger=notice("i1", remaining_s=0.0), spare=1, kv_blocks=20
    )
    plan = make_plan(problem)
    assert not any(getattr(step, "source", None) == "i1/0" for step in plan.steps)
    assert [("i2/0",)] == [step.workers for step in plan.steps if isinstance(step, LoadWeights)]


def test_reroute_keeps_the_shape_and_loses_kv() -> None:
    """Tests that rerouting drops the hit replica, builds one of idle GPUs from storage, and copies nothing."""
    problem = running_problem(
        tiny_spec(policy="reroute"), shape=(2, 2, 1), memory_bytes=4 * MIB, trigger=notice("i2"), spare=1, kv_blocks=16
    )
    plan = make_plan(problem)
    assert {"r3.1": [["i0/0"], ["i1/0"]], "r4": [["i4/0"], ["i3/0"]]} == layout(plan)
    assert not {"copy_weights", "copy_kv"} & set(kinds(plan))
    assert ["recompute", "recompute"] == actions(plan)
    assert ("tokens_only",) == plan.fallback
    assert () == check_plan(plan)


def test_reroute_closes_what_is_hit_and_loads_all_of_the_next() -> None:
    """Tests that the GPUs of a hit pipeline load their whole new position, even where they hold it already."""
    problem = running_problem(
        tiny_spec(policy="reroute"), shape=(2, 2, 1), memory_bytes=4 * MIB, trigger=notice("i2"), spare=1, kv_blocks=16
    )
    plan = make_plan(problem)
    (fresh,) = [replica for replica in plan.target.replicas if replica.id == "r4"]
    loaded = {step.workers[0]: step.bytes for step in plan.steps if isinstance(step, LoadWeights)}
    shards = replica_shards(problem.spec.model, pipeline=2, tensor=1)
    sizes = [shard_bytes(problem.spec.model, shard) for shard in shards]
    assert dict(zip(fresh.gpus, sizes, strict=True)) == loaded
    assert ("in_place", "i3/0") == (plan.mode, fresh.gpus[1])
    order = kinds(plan)
    assert order.index("commit") < order.index("release") < order.index("load_weights")


def test_reroute_has_its_shape_or_nothing() -> None:
    """Tests that no other (P, M) is placed where the pinned one does not fit, as any other policy would do."""
    placed = {
        policy: make_plan(
            running_problem(
                tiny_spec(policy=policy, pipeline=2, tensor=2),
                shape=(0, 1, 1),
                memory_bytes=4 * MIB,
                trigger=Trigger(kind="start"),
                spare=3,
            )
        ).target.replicas
        for policy in ("reroute", "paper")
    }
    assert placed["reroute"] == ()
    assert placed["paper"] != ()


def test_reparallelize_restarts_everything() -> None:
    """Tests that the restart stops every replica first, replaces all, and loads all weights from storage."""
    problem = running_problem(
        tiny_spec(policy="reparallelize"), shape=(2, 2, 1), memory_bytes=3 * MIB, trigger=notice("i2")
    )
    plan = make_plan(problem)
    assert ("in_place", {4}) == (plan.mode, {one.generation for one in plan.target.replicas})
    assert ["quiesce", "quiesce", "commit"] == kinds(plan)[:3]
    assert not {"copy_weights", "copy_kv"} & set(kinds(plan))
    loaded = {step.workers[0]: step.bytes for step in plan.steps if isinstance(step, LoadWeights)}
    assert loaded == {
        gpu: shard_bytes(problem.spec.model, shard)
        for one in plan.target.replicas
        for gpu, shard in zip(
            one.gpus,
            replica_shards(problem.spec.model, pipeline=one.pipeline, tensor=one.tensor),
            strict=True,
        )
    }
    assert ["recompute"] * 4 == actions(plan)
    assert () == check_plan(plan)


def test_the_paper_stops_what_it_changes() -> None:
    """Tests that the paper's policy uses the paper's solvers and replaces every replica in place, with its KV."""
    problem = running_problem(
        tiny_spec(policy="paper"), shape=(2, 2, 1), memory_bytes=4 * MIB, trigger=notice("i2"), spare=1, kv_blocks=16
    )
    plan = make_plan(problem)
    assert ("in_place", {4}) == (plan.mode, {one.generation for one in plan.target.replicas})
    assert {
        "configure": "paper",
        "place": "paper",
        "migrate": "paper",
        "arrange": "paper",
        "ladder": "longest_first",
    } == {kind: report.name for kind, report in plan.solver.items() if kind != "memory"}
    assert ["quiesce", "quiesce"] == [kind for kind in kinds(plan) if kind == "quiesce"]
    assert "copy_kv" in kinds(plan)
    assert () == check_plan(plan)


def test_the_paper_lets_run_what_it_only_adds_to() -> None:
    """Tests that a second replica of the same shape comes up while the first one serves on."""
    trigger = Trigger.model_validate({"kind": "joined", "instances": ["i3"]})
    spec = tiny_spec(policy="paper", pipeline=2, tensor=1)
    plan = make_plan(running_problem(spec, shape=(1, 2, 1), memory_bytes=3 * MIB, trigger=trigger, spare=2))
    assert {"r3.1": [["i0/0"], ["i1/0"]]}.items() <= layout(plan).items()
    assert 2 == len(plan.target.replicas)
    assert "quiesce" not in kinds(plan)
    assert () == check_plan(plan)


@pytest.mark.parametrize("migrate", ["paper-unplanned", "paper-first-holder"])
def test_without_a_migration_planner_even_an_addition_stops_all(migrate: str) -> None:
    """Tests the ablation: the replica that stays is replaced like any other, with its KV."""
    trigger = Trigger.model_validate({"kind": "joined", "instances": ["i3"]})
    spec = tiny_spec(policy="paper", pipeline=2, tensor=1, solvers={"migrate": migrate})
    plan = make_plan(running_problem(spec, shape=(1, 2, 1), memory_bytes=3 * MIB, trigger=trigger, spare=2))
    assert {4} == {replica.generation for replica in plan.target.replicas}
    assert {"quiesce", "copy_kv"} <= set(kinds(plan))
    assert () == check_plan(plan)


def reshaped_within(memory_bytes: int, *, migrate: str = "layered", kv_blocks: int = 5) -> Plan:
    """A plan that turns two stages into two tensor ranks on the same two GPUs of so much memory."""
    spec = tiny_spec(solvers={"migrate": migrate}, max_model_len=64, pipeline=1, tensor=2)
    problem = running_problem(
        spec, shape=(1, 2, 1), memory_bytes=MIB, trigger=Trigger(kind="load"), kv_blocks=kv_blocks, requests_each=1
    )
    return make_plan(with_memory(problem, memory_bytes))


def test_enough_memory_serves_on() -> None:
    """Tests that a change of shape with room for old and new is live and keeps KV."""
    plan = reshaped_within(2000 * KIB, migrate="maxflow")
    assert ("live", "all_kv", ["move"]) == (plan.mode, plan.fallback[0], actions(plan))


def test_short_memory_restarts() -> None:
    """Tests that without room everything old is released after the commit and before anything new is reserved."""
    plan = reshaped_within(1600 * KIB, migrate="maxflow")
    order = list(dict.fromkeys(kinds(plan)))
    assert ("in_place", True) == (plan.mode, plan.complete)
    assert ["quiesce", "commit", "release", "reserve", "load_weights", "join_group", "activate", "recompute"] == order
    assert () == check_plan(plan)


@pytest.mark.parametrize("memory_kib", [1800, 3000])
@pytest.mark.parametrize("stage", [0, 1])
def test_a_restart_makes_room_on_idle_gpus(stage: int, memory_kib: int) -> None:
    """Tests that what an aborted plan left on an idle GPU goes first, but for what its new position needs."""
    problem = running_problem(
        tiny_spec(policy="reparallelize"),
        shape=(1, 2, 1),
        memory_bytes=memory_kib * KIB,
        trigger=notice("i1"),
        spare=1,
    )
    stages = replica_shards(problem.spec.model, pipeline=2, tensor=1)
    plan = make_plan(with_left_over(problem, "i2/0", stages[stage]))
    assert (("i0/0",), ("i2/0",)) == tuple(one.gpus for one in plan.target.replicas[0].stages)
    freed = [step for step in plan.steps if isinstance(step, Release) and step.workers == ("i2/0",)]
    loaded = sum(step.bytes for step in plan.steps if isinstance(step, LoadWeights) and step.workers == ("i2/0",))
    if stage:
        assert ([], 0) == (freed, loaded)
    else:
        (release,) = freed
        assert (plan.target.replicas[0].id, 4, False) == (release.replica, release.generation, release.kv)
        reserve = next(step for step in plan.steps if isinstance(step, Reserve) and step.workers == ("i2/0",))
        assert (release.id,) == reserve.depends_on
        assert release.id not in plan.last_releases
        shards = [shard_bytes(problem.spec.model, shard) for shard in stages]
        assert shards[0] - release.bytes == shards[1] - loaded  # What both stages have stays and is not loaded.
    assert () == check_plan(plan)


def test_layers_move_one_by_one_with_their_kv() -> None:
    """Tests Algorithm 2 where both KV pools fit: KV first, then weights with releases between, all after the commit."""
    plan = reshaped_within(1600 * KIB)
    order = kinds(plan)
    assert ("in_place", ["move"], ["quiesce", "commit"]) == (plan.mode, actions(plan), order[:2])
    assert order.index("copy_weights") > max(index for index, kind in enumerate(order) if kind == "copy_kv_delta")
    weights = [step for step in plan.steps if isinstance(step, Release) and not step.kv and step.slices]
    assert order.index("release") < max(index for index, kind in enumerate(order) if kind == "copy_weights")
    assert weights
    assert () == check_plan(plan)


def test_old_pools_make_way_for_weights() -> None:
    """Tests that an old KV pool goes once all that read it have, before the weights that need its room come."""
    plan = reshaped_within(1300 * KIB)
    pools = [step for step in plan.steps if isinstance(step, Release) and step.kv]
    assert ("in_place", ["move"], 2) == (plan.mode, actions(plan), len(pools))
    for pool in pools:
        (gpu,) = pool.workers
        readers = {s.id for s in plan.steps if isinstance(s, CopyKvDelta) and gpu in (s.source, s.destination)}
        assert readers <= set(pool.depends_on)
        arrivals = [s for s in plan.steps if isinstance(s, CopyWeights) and s.destination == gpu]
        assert all(pool.id in step.depends_on for step in arrivals)
        assert arrivals
    assert () == check_plan(plan)


def test_old_pools_shrink_to_their_content() -> None:
    """Tests that a pool that fills the memory shrinks after the commit, before anything is reserved or copied."""
    plan = reshaped_within(1300 * KIB, kv_blocks=10)
    shrunk = {s.workers[0]: s for s in plan.steps if isinstance(s, Release) and s.keep_blocks is not None}
    assert ("in_place", ["move"], 2) == (plan.mode, actions(plan), len(shrunk))
    assert all(not step.kv and 3 <= (step.keep_blocks or 0) < 10 for step in shrunk.values())
    for step in plan.steps:
        if isinstance(step, Reserve):
            assert shrunk[step.workers[0]].id in step.depends_on
        elif isinstance(step, CopyKv):
            assert shrunk[step.source].id in step.depends_on
    assert () == check_plan(plan)


def test_layers_move_one_by_one_without_kv() -> None:
    """Tests Algorithm 2 where only one KV pool fits: the old one goes first and the requests are computed again."""
    plan = reshaped_within(1250 * KIB, kv_blocks=8)
    assert ("in_place", ["recompute"]) == (plan.mode, actions(plan))
    assert ["quiesce", "commit", "release", "release", "reserve", "reserve"] == kinds(plan)[:6]
    assert "copy_kv" not in kinds(plan)
    assert () == check_plan(plan)


def test_same_problem_same_bytes_in_any_process() -> None:
    """Tests that three processes with different hash seeds write the same plan."""
    problem = running_problem(tiny_spec(), shape=(2, 2, 1), memory_bytes=3 * MIB, trigger=notice("i2"), spare=1)
    line = canonical_json(problem)
    plans = set()
    for seed in ("0", "1", "42"):
        done = subprocess.run(
            [sys.executable, "-m", "spotserve.solvers.planner_server"],
            input=line,
            capture_output=True,
            text=True,
            cwd=ROOT,
            env={**os.environ, "PYTHONHASHSEED": seed},
            check=True,
        )
        plans.add(canonical_json(json.loads(done.stdout)["plan"]))
    assert {canonical_json(make_plan(problem))} == plans


def test_planner_process_answers_every_line() -> None:
    """Tests that a malformed or refused problem is answered with an error and the next one with its plan."""
    good = running_problem(tiny_spec(), shape=(1, 2, 1), memory_bytes=3 * MIB, trigger=notice("i1"), spare=1)
    refused = good.model_copy(update={"spec": tiny_spec(policy="life")})
    answers = io.StringIO()
    serve(io.StringIO("{}\n\n" + canonical_json(refused) + canonical_json(good)), answers)
    malformed, unknown, planned = [json.loads(line) for line in answers.getvalue().splitlines()]
    assert malformed["error"]["code"] == "SPS-100"
    assert "did you mean live?" == unknown["error"]["hint"]
    assert Plan.model_validate(planned["plan"]) == make_plan(good)


def test_unknown_solver_is_refused() -> None:
    """Tests that a solver name that is not known is an error with the nearest one, not a silent default."""
    problem = running_problem(
        tiny_spec(solvers={"place": "reused"}), shape=(1, 2, 1), memory_bytes=3 * MIB, trigger=notice("i1")
    )
    with pytest.raises(SpecError, match="place solver 'reused' is not known") as refused:
        make_plan(problem)
    assert "did you mean reuse?" == refused.value.hint
    assert "reused" in answer(canonical_json(problem))


def test_epoch_numbers_names() -> None:
    """Tests that several new replicas are numbered under their epoch and carry it as generation."""
    trigger = Trigger.model_validate({"kind": "joined", "instances": ["i2"]})
    plan = make_plan(running_problem(tiny_spec(), shape=(1, 2, 1), memory_bytes=3 * MIB, trigger=trigger, spare=4))
    assert ["r3.1", "r4.1", "r4.2"] == [one.id for one in plan.target.replicas]
    assert {4} == {one.generation for one in plan.target.replicas[1:]}
