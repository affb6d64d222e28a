"""The checker: every code by a plan that has exactly that fault, and files that are no plans at all."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

import pytest

from spotserve.core.canonical import canonical_json
from spotserve.core.check import check_plan, read_plan, verify
from spotserve.core.cost import replica_shards
from spotserve.core.finding import Finding
from spotserve.core.plan import Plan, Trigger
from spotserve.core.strict_json import MAX_DEPTH
from spotserve.solvers.planner import make_plan
from tests.planning_worlds import (
    KIB,
    MIB,
    lost,
    notice,
    random_problem,
    running_problem,
    tiny_spec,
    with_left_over,
    with_memory,
)

Raw = dict[str, Any]


def spare_plan(*, policy: str = "live", remaining_s: float = 30.0) -> Plan:
    """Two stages, one doomed, a spare takes it over: every kind of step but load and recompute."""
    return make_plan(
        running_problem(
            tiny_spec(policy=policy, max_model_len=128, migration_headroom_bytes=KIB),
            shape=(1, 2, 1),
            memory_bytes=3 * MIB,
            trigger=notice("i1", remaining_s=remaining_s),
            spare=1,
            kv_blocks=20,
        )
    )


def loss_plan() -> Plan:
    """A replica lost without notice: commit, recompute, release."""
    return make_plan(running_problem(tiny_spec(), shape=(2, 2, 1), memory_bytes=3 * MIB, trigger=lost("i1")))


def restart_plan() -> Plan:
    """An in_place plan that releases everything first."""
    return make_plan(
        running_problem(
            tiny_spec(policy="reparallelize"), shape=(1, 2, 1), memory_bytes=3 * MIB, trigger=notice("i1"), spare=1
        )
    )


def left_over_plan() -> Plan:
    """A restart whose spare GPU first drops what an aborted plan left on it: the other stage's weights."""
    problem = running_problem(
        tiny_spec(policy="reparallelize"), shape=(1, 2, 1), memory_bytes=1800 * KIB, trigger=notice("i1"), spare=1
    )
    stages = replica_shards(problem.spec.model, pipeline=2, tensor=1)
    return make_plan(with_left_over(problem, "i2/0", stages[0]))


def layered_plan(*, memory_bytes: int = 1600 * KIB, kv_blocks: int = 5) -> Plan:
    """An in_place plan that moves layer by layer."""
    spec = tiny_spec(solvers={"migrate": "layered"}, max_model_len=64, pipeline=1, tensor=2)
    problem = running_problem(
        spec, shape=(1, 2, 1), memory_bytes=MIB, trigger=Trigger(kind="load"), kv_blocks=kv_blocks, requests_each=1
    )
    return make_plan(with_memory(problem, memory_bytes))


def shrinking_plan() -> Plan:
    """An in_place plan whose old pools have to shrink first."""
    return layered_plan(memory_bytes=1300 * KIB, kv_blocks=10)


def raw(plan: Plan) -> Raw:
    """A plan as plain data, to be spoiled."""
    data: Raw = json.loads(canonical_json(plan))
    return data


def codes(data: Raw) -> set[str]:
    """The codes of all findings of a spoiled plan."""
    return {finding.code for finding in verify(canonical_json(data).encode())}


def step(data: Raw, kind: str, index: int = 0) -> Raw:
    """The `index`-th step of a kind."""
    found: Raw = [one for one in data["steps"] if one["kind"] == kind][index]
    return found


def drop(data: Raw, dropped: Raw) -> None:
    """Take a step out, and let what waited for it wait for what it waited for."""
    data["steps"].remove(dropped)
    for one in data["steps"]:
        if dropped["id"] in one["depends_on"]:
            one["depends_on"] = sorted({*one["depends_on"], *dropped["depends_on"]} - {dropped["id"]})


@pytest.mark.parametrize("plan", [spare_plan, loss_plan, restart_plan, left_over_plan, layered_plan, shrinking_plan])
def test_whole_plans_are_ok(plan: Callable[[], Plan]) -> None:
    """Tests that each plan that the other tests spoil has no finding before."""
    assert () == check_plan(plan())


def test_the_layered_plan_has_what_its_tests_need() -> None:
    """Tests that the layered plan keeps KV and frees weights between copies."""
    kinds = [one.kind for one in layered_plan().steps]
    assert {"copy_kv", "copy_weights", "release"} <= set(kinds)


@pytest.mark.parametrize("kind", ["reserve", "copy_weights", "copy_kv", "join_group", "quiesce", "copy_kv_delta"])
def test_dropped_preparation(kind: str) -> None:
    """Tests that any preparing step that is taken out of a live plan is missed."""
    data = raw(spare_plan())
    drop(data, step(data, kind))
    assert codes(data) & {"missing_step", "coverage_hole"}


@pytest.mark.parametrize("kind", ["commit", "activate", "release"])
def test_dropped_cut_over(kind: str) -> None:
    """Tests that commit, activate and release cannot be left out."""
    data = raw(spare_plan())
    drop(data, step(data, kind))
    assert "missing_step" in codes(data)


def test_weight_hole() -> None:
    """Tests that a slice that nothing brings is a coverage hole."""
    data = raw(spare_plan())
    step(data, "copy_weights")["slices"].pop()
    assert {"coverage_hole", "corrupt"} == codes(data)


def test_false_bytes() -> None:
    """Tests that a step that claims fewer bytes than its slices have is corrupt."""
    data = raw(spare_plan())
    step(data, "copy_weights")["bytes"] -= 1
    assert {"corrupt"} == codes(data)


def test_claims_beyond_what_there_is() -> None:
    """Tests that a step that claims more than can be sent in time or than memory holds is taken at its word."""
    data = raw(spare_plan())
    step(data, "copy_weights")["bytes"] = 10**12
    assert {"past_deadline", "corrupt"} == codes(data)
    data = raw(spare_plan())
    step(data, "reserve")["bytes"] = 10**12
    assert {"over_memory"} == codes(data)


def test_weights_delivered_twice() -> None:
    """Tests that the same range brought by two steps has two owners."""
    data = raw(spare_plan())
    again = {**step(data, "copy_weights"), "id": "s900"}
    data["steps"].insert(4, again)
    step(data, "quiesce")["depends_on"].append("s900")
    assert "double_owner" in codes(data)


def test_weights_of_another_position() -> None:
    """Tests that a range that belongs to another position is not to be delivered."""
    data = raw(spare_plan())
    copy = step(data, "copy_weights")
    copy["source"] = "i0/0"
    copy["slices"] = [{"parameter": "model.layers.0.mlp.up_proj.weight", "dim": 0, "start": 0, "stop": 256}]
    copy["bytes"] = 256 * 64 * 4
    assert {"double_owner", "coverage_hole"} <= codes(data)


def test_source_that_holds_nothing() -> None:
    """Tests that a copy from a GPU that does not hold the slices is refused."""
    data = raw(spare_plan())
    step(data, "copy_weights")["source"] = "i0/0"
    assert "not_a_holder" in codes(data)


def test_kv_source_without_the_rectangle() -> None:
    """Tests that KV cannot come from a rank that has other layers."""
    data = raw(spare_plan())
    for kind in ("copy_kv", "copy_kv_delta"):
        remote = next(one for one in data["steps"] if one["kind"] == kind and one["source"] != one["destination"])
        remote["source"] = "i0/0"
    assert "not_a_holder" in codes(data)


def test_kv_rectangle_twice() -> None:
    """Tests that a KV rectangle that two steps bring has two owners."""
    data = raw(spare_plan())
    again = {**step(data, "copy_kv", 1), "id": "s900"}
    data["steps"].insert(6, again)
    step(data, "quiesce")["depends_on"].append("s900")
    assert "double_owner" in codes(data)


def test_kv_heads_short() -> None:
    """Tests that a rectangle without its last kv head leaves a hole."""
    data = raw(spare_plan())
    for kind in ("copy_kv", "copy_kv_delta"):
        step(data, kind, 1)["route"]["kv_heads"] = [0, 3]
    assert "coverage_hole" in codes(data)


def test_route_without_copies() -> None:
    """Tests that a route whose KV nobody copies is a missing step."""
    data = raw(spare_plan())
    for kind in ("copy_kv_delta", "copy_kv"):
        while any(one["kind"] == kind for one in data["steps"]):
            drop(data, step(data, kind))
    assert "missing_step" in codes(data)


def test_gpu_in_two_positions() -> None:
    """Tests that one GPU cannot be two positions of the target."""
    data = raw(spare_plan())
    data["target"]["replicas"][0]["stages"][1]["gpus"] = ["i0/0"]
    assert "double_owner" in codes(data)


def test_layers_of_nobody() -> None:
    """Tests that stages that leave out a layer are a hole."""
    data = raw(spare_plan())
    data["target"]["replicas"][0]["stages"][1]["layers"] = [5, 8]
    assert "coverage_hole" in codes(data)


def test_target_on_a_doomed_gpu() -> None:
    """Tests that a new replica cannot count on an instance that is being taken."""
    data = raw(spare_plan())
    data["target"]["replicas"][0]["stages"][1]["gpus"] = ["i1/0"]
    assert "coverage_hole" in codes(data)


def test_pool_too_large() -> None:
    """Tests that old and new weights and both pools must fit, and that the reserve names enough."""
    data = raw(spare_plan())
    data["target"]["replicas"][0]["kv_blocks"] = 100_000
    assert "over_memory" in codes(data)
    data = raw(spare_plan())
    max((one for one in data["steps"] if one["kind"] == "reserve"), key=lambda one: int(one["bytes"]))["bytes"] = 10
    assert {"over_memory"} == codes(data)


def test_pool_taken_over_counts_once() -> None:
    """Tests that a position that keeps its rectangle needs no second pool, and one of another size does."""
    data = raw(spare_plan())
    assert min(one["bytes"] for one in data["steps"] if one["kind"] == "reserve") == 0
    assert set() == codes(data)
    data["target"]["replicas"][0]["kv_blocks"] -= 1
    assert "over_memory" in codes(data)


def test_too_many_moves() -> None:
    """Tests that more sequences than B cannot move into a replica."""
    data = raw(spare_plan())
    data["target"]["replicas"][0]["max_running"] = 1
    assert "over_memory" in codes(data)


def test_peak_in_place() -> None:
    """Tests that the peak of an in_place plan is followed step by step: without its releases it is over."""
    data = raw(layered_plan())
    for release in [one for one in data["steps"] if one["kind"] == "release" and not one["kv"]]:
        drop(data, release)
    assert "over_memory" in codes(data)


def test_cycle() -> None:
    """Tests that steps that wait for each other are found, however they are reached."""
    data = raw(spare_plan())
    step(data, "reserve")["depends_on"] = [step(data, "activate")["id"]]
    assert "cycle" in codes(data)


def test_doubled_steps() -> None:
    """Tests that an id twice and an effect twice are duplicates."""
    data = raw(spare_plan())
    data["steps"].append(data["steps"][-1])
    assert "duplicate_step" in codes(data)
    data = raw(spare_plan())
    data["steps"].append({**step(data, "commit"), "id": "s901"})
    assert "duplicate_step" in codes(data)


def test_an_id_twice_ends() -> None:
    """Tests that steps of one id that others wait for are told, and do not send the ordering round for ever."""
    data = raw(spare_plan())
    first, second = step(data, "reserve"), step(data, "reserve", 1)
    second["id"] = first["id"]
    assert "duplicate_step" in codes(data)
    for number, one in enumerate(data["steps"]):
        one["id"] = f"s{number % 3}"
        one["depends_on"] = ["s0", "s1", "s2"]
    assert {"duplicate_step", "cycle"} <= codes(data)


def test_unknown_dependency() -> None:
    """Tests that waiting for a step that does not exist is a missing step."""
    data = raw(spare_plan())
    step(data, "quiesce")["depends_on"].append("s999")
    assert {"missing_step"} == codes(data)


@pytest.mark.parametrize(
    ("kind", "without"),
    [
        ("copy_weights", "reserve"),
        ("join_group", "reserve"),
        ("quiesce", "copy_weights"),
        ("copy_kv_delta", "quiesce"),
        ("activate", "commit"),
        ("release", "activate"),
    ],
)
def test_broken_order_live(kind: str, without: str) -> None:
    """Tests that each order that live mode demands is missed when a step no longer waits."""
    data = raw(spare_plan())
    waiting = step(data, kind)
    hidden = {one["id"] for one in data["steps"] if one["kind"] == without}
    waiting["depends_on"] = [name for name in waiting["depends_on"] if name not in hidden]
    if (kind, without) == ("release", "activate"):
        waiting["depends_on"] = [step(data, "commit")["id"]]
    assert "wrong_order" in codes(data)


def test_live_plan_called_in_place() -> None:
    """Tests that a live plan does not pass as an in_place one, nor the other way round."""
    for plan, mode in ((spare_plan(), "in_place"), (restart_plan(), "live")):
        data = raw(plan)
        data["mode"] = mode
        assert "wrong_order" in codes(data)


def test_release_before_read() -> None:
    """Tests that weights cannot be freed while a step may still read them."""
    data = raw(layered_plan())
    copies = {one["id"] for one in data["steps"] if one["kind"] == "copy_weights"}
    for one in data["steps"]:
        if one["kind"] == "release":
            one["depends_on"] = [name for name in one["depends_on"] if name not in copies]
    assert "wrong_order" in codes(data)


def test_kv_freed_before_read() -> None:
    """Tests that a KV pool cannot be freed while a step may still copy from it."""
    data = raw(layered_plan())
    deltas = {one["id"] for one in data["steps"] if one["kind"] == "copy_kv_delta"}
    for one in data["steps"]:
        if one["kind"] == "release" and one["kv"]:
            one["depends_on"] = [name for name in one["depends_on"] if name not in deltas]
    assert {"wrong_order"} == codes(data)


@pytest.mark.parametrize(
    ("change", "code"),
    [({"keep_blocks": 1}, "coverage_hole"), ({"keep_blocks": 10}, "over_memory"), ({"kv": True}, "wrong_order")],
    ids=str,
)
def test_kept_blocks(change: Raw, code: str) -> None:
    """Tests that a pool that shrinks keeps what moves, makes the room that is claimed, and does not go with it."""
    data = raw(shrinking_plan())
    for release in [one for one in data["steps"] if one.get("keep_blocks") is not None]:
        release.update(change)
    assert code in codes(data)


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"kv": True}, "double_owner"),
        ({"keep_blocks": 1}, "double_owner"),
        ({"generation": 3}, "double_owner"),
        ({"workers": ["i0/0"]}, "double_owner"),
        ({"workers": ["i1/0"]}, "double_owner"),
        ({"depends_on": []}, "wrong_order"),
        ({"slices": []}, "over_memory"),
    ],
    ids=str,
)
def test_left_over_weights(change: Raw, code: str) -> None:
    """Tests that what makes room for a new position is there, is nobody's, and frees no KV pool."""
    data = raw(left_over_plan())
    release = next(one for one in data["steps"] if one["kind"] == "release" and one["workers"] == ["i2/0"])
    release.update(change)
    assert code in codes(data)


def test_room_is_made_before_it_is_reserved() -> None:
    """Tests that a position does not begin before the left-over weights that its memory is short of are gone."""
    data = raw(left_over_plan())
    release = next(one for one in data["steps"] if one["kind"] == "release" and one["workers"] == ["i2/0"])
    for one in data["steps"]:
        if one["kind"] == "reserve" and one["workers"] == ["i2/0"]:
            one["depends_on"] = release["depends_on"]
    assert {"over_memory"} == codes(data)


def test_shrinks_before_it_is_read() -> None:
    """Tests that nobody copies from a pool while it shrinks."""
    data = raw(shrinking_plan())
    shrinks = {one["id"] for one in data["steps"] if one["kind"] == "release" and one.get("keep_blocks") is not None}
    for one in data["steps"]:
        if one["kind"] in ("copy_kv", "reserve"):
            one["depends_on"] = [step(data, "commit")["id"]] if one["kind"] == "reserve" else one["depends_on"]
            one["depends_on"] = [name for name in one["depends_on"] if name not in shrinks]
    assert "wrong_order" in codes(data)


@pytest.mark.parametrize("kind", ["copy_kv", "copy_kv_delta"])
def test_last_blocks_in_place(kind: str) -> None:
    """Tests that an in_place plan too brings the blocks that are not full, and with them what it followed."""
    data = raw(layered_plan())
    drop(data, step(data, kind))
    assert "missing_step" in codes(data)


def test_needed_weights_freed() -> None:
    """Tests that a release of what the new position needs leaves a hole."""
    data = raw(spare_plan())
    release = next(one for one in data["steps"] if one["kind"] == "release" and one["workers"] == ["i0/0"])
    release["slices"] = [{"parameter": "model.layers.0.mlp.up_proj.weight", "dim": 0, "start": 0, "stop": 256}]
    assert "coverage_hole" in codes(data)


@pytest.mark.parametrize("remaining_s", [0.0, 0.004])
def test_past_deadline(remaining_s: float) -> None:
    """Tests that reads of a doomed instance that cannot end in time are found, whatever the plan estimates."""
    data = raw(spare_plan())
    data["trigger"]["remaining_s"] = remaining_s
    for one in data["steps"]:
        one["estimated_s"] = 0.0
    assert {"past_deadline"} == codes(data)


def test_stop_after_the_deadline() -> None:
    """Tests that a doomed replica may not be allowed to go on past its grace period."""
    data = raw(spare_plan())
    step(data, "quiesce")["latest_s"] = 31.0
    assert {"past_deadline"} == codes(data)


def test_requests_left_out() -> None:
    """Tests that each request of an affected replica has exactly one action along its route."""
    data = raw(spare_plan())
    data["requests"].pop()
    assert {"coverage_hole"} == codes(data)
    data = raw(spare_plan())
    data["requests"].append(data["requests"][0])
    assert "double_owner" in codes(data)
    data = raw(spare_plan())
    data["requests"][0]["to_replica"] = "r9"
    assert {"double_owner"} == codes(data)


def test_move_from_a_lost_replica() -> None:
    """Tests that a request cannot move from a replica whose KV is gone."""
    data = raw(loss_plan())
    data["requests"][0]["action"] = "move"
    assert "not_a_holder" in codes(data)


def test_recompute_nobody_does() -> None:
    """Tests that a request that is to be recomputed is named by a recompute step."""
    data = raw(loss_plan())
    step(data, "recompute")["requests"].pop()
    assert {"missing_step"} == codes(data)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda data: data["spec"]["limits"].update(max_running=3),
        lambda data: data["snapshot"]["world"]["instances"][2].update(market="ondemand"),
        lambda data: data.update(spec_digest="sha256:0"),
        lambda data: data["epoch"].update({"from": 2}),
        lambda data: data["epoch"].update(to=3),
    ],
)
def test_stale(spoil: Callable[[Raw], None]) -> None:
    """Tests that a plan for another spec, world or epoch is stale."""
    data = raw(spare_plan())
    spoil(data)
    assert "stale" in codes(data)


def test_requests_are_not_in_the_digest() -> None:
    """Tests that progress of requests makes no plan stale."""
    data = raw(spare_plan())
    data["snapshot"]["requests"][0]["max_tokens"] += 1
    assert set() == codes(data)


def test_daemon_in_another_epoch() -> None:
    """Tests that a plan is stale for a daemon that has gone on."""
    plan = spare_plan()
    assert () == check_plan(plan, daemon_epoch=3)
    assert ["stale"] == [finding.code for finding in check_plan(plan, daemon_epoch=4)]


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff\xfe",
        b"null",
        b"[1, 2",
        b'{"format_version": "0.1"}',
        b'{"format_version": "0.1", "format_version": "0.1"}',
        b'{"format_version": "0.1", "epoch": NaN}',
        b"[" * 100_000,
        b'{"a":' * 5_000 + b"1" + b"}" * 5_000,
        b'"' + b'\\"' * 200_000,
    ],
)
def test_garbage_is_corrupt(data: bytes) -> None:
    """Tests that what is no plan is one corrupt finding, quickly and without a crash."""
    assert ["corrupt"] == [finding.code for finding in verify(data)]


def test_size_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests that a file over the size bound is refused before it is parsed."""
    monkeypatch.setattr("spotserve.core.strict_json.MAX_FILE_BYTES", 100)
    assert ["corrupt"] == [finding.code for finding in verify(canonical_json(loss_plan()).encode())]


def test_brackets_in_strings_do_not_count() -> None:
    """Tests that depth is counted in structure, not in text."""
    data = raw(spare_plan())
    data["spec"]["profile"]["source"] = "[" * (MAX_DEPTH + 1)
    assert {"stale"} == codes(data)


def test_other_version() -> None:
    """Tests that a file of another format version is told so, and nothing else is guessed."""
    data = raw(spare_plan())
    data["format_version"] = "1.0"
    assert {"bad_version"} == codes(data)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda data: data["spec"]["model"].update(num_layers=10**12),
        lambda data: data["spec"]["model"]["axes"].clear(),
        lambda data: data["spec"]["model"]["axes"][0].update(chunks=[[0, 10**12]]),
        lambda data: data["spec"]["model"]["parameters"][2].update(shape=[]),
        lambda data: data["spec"]["model"]["parameters"][2].update(dim=-7),
        lambda data: data["spec"]["model"]["parameters"][2]["segments"][0].update(axis="nobody"),
        lambda data: data["snapshot"]["world"]["holdings"][0]["shards"][0].update(rank=7),
        lambda data: data["snapshot"]["world"]["holdings"][0]["shards"][0].update(layers=[-3, 10**12]),
        lambda data: data["snapshot"]["world"]["holdings"][0]["shards"][0].update(tensor=0),
        lambda data: data["snapshot"]["world"]["replicas"][0]["stages"][0].update(layers=[0, 10**12]),
        lambda data: data["snapshot"]["world"]["replicas"][0]["stages"][0].update(gpus=[]),
        lambda data: data["target"]["replicas"][0]["stages"][0].update(layers=[0, 10**12]),
        lambda data: data["target"]["replicas"][0]["stages"][0].update(gpus=["i0/0"] * 99),
        lambda data: step(data, "copy_weights")["slices"][0].update(parameter="nothing"),
        lambda data: step(data, "copy_weights")["slices"][0].update(dim=3),
        lambda data: step(data, "copy_weights")["slices"][0].update(start=-5),
        lambda data: data.update(applyable=False, steps=data["steps"]),
        lambda data: data.update(target={"replicas": []}),
    ],
)
def test_hostile_values(spoil: Callable[[Raw], None]) -> None:
    """Tests that values that no planner writes give findings, not a crash or a loop."""
    data = raw(spare_plan())
    spoil(data)
    assert codes(data)


@pytest.mark.parametrize("seed", range(60))
def test_any_spoiled_plan_is_found(seed: int) -> None:
    """Tests that a random plan that loses a random step, or a random slice of one, never passes."""
    draw = random.Random(seed)
    data = raw(make_plan(random_problem(seed)))
    if not data["steps"]:
        assert codes(data) == set()
        return
    victim = draw.choice(data["steps"])
    if victim.get("slices") and victim["kind"] != "release" and draw.random() < 0.5:
        victim["slices"].pop(draw.randrange(len(victim["slices"])))
    else:
        data["steps"].remove(victim)
    assert codes(data), victim["kind"]


@pytest.mark.parametrize("seed", range(40))
def test_any_swapped_source_is_found(seed: int) -> None:
    """Tests that a copy whose source is swapped for a GPU without the content never passes."""
    draw = random.Random(seed)
    data = raw(make_plan(random_problem(seed)))
    copies = [one for one in data["steps"] if one["kind"] in ("copy_weights", "copy_kv")]
    if not copies:
        return
    victim = draw.choice(copies)
    victim["source"] = "i99/0"
    assert "not_a_holder" in codes(data)


def test_a_finding_is_one_line() -> None:
    """Tests that a finding reads `CODE step path: message`, a dash for no step."""
    finding = Finding(code="stale", path="epoch.from", message="made for epoch 1")
    assert "stale - epoch.from: made for epoch 1" == finding.line()


def test_read_gives_the_plan_back() -> None:
    """Tests that a plan written and read is the same plan."""
    plan = spare_plan()
    assert plan == read_plan(canonical_json(plan).encode())
