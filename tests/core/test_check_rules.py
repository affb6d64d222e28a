"""The checker's rules one by one, at their bounds: what a plan may just do, and what it may just not."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Callable
from typing import Any

import pytest

from spotserve.core.canonical import canonical_json, digest
from spotserve.core.check import check_plan, misfits, verify
from spotserve.core.check_memory import worst_excess
from spotserve.core.finding import Facts, Finding
from spotserve.core.plan import Plan, Trigger
from spotserve.core.snapshot import World
from spotserve.core.spec import ServingSpec
from spotserve.solvers.planner import make_plan
from tests.planning_worlds import KIB, MIB, notice, random_problem, running_problem, tiny_spec, with_memory

Raw = dict[str, Any]


def spare_plan() -> Plan:
    """Two stages, one doomed, a spare takes it over."""
    return make_plan(
        running_problem(
            tiny_spec(max_model_len=128, migration_headroom_bytes=KIB),
            shape=(1, 2, 1),
            memory_bytes=3 * MIB,
            trigger=notice("i1"),
            spare=1,
            kv_blocks=20,
        )
    )


def layered_plan() -> Plan:
    """An in_place plan that moves layer by layer."""
    spec = tiny_spec(solvers={"migrate": "layered"}, max_model_len=64, pipeline=1, tensor=2)
    problem = running_problem(
        spec, shape=(1, 2, 1), memory_bytes=MIB, trigger=Trigger(kind="load"), kv_blocks=5, requests_each=1
    )
    return make_plan(with_memory(problem, 1600 * KIB))


def raw(plan: Plan) -> Raw:
    """A plan as plain data."""
    data: Raw = json.loads(canonical_json(plan))
    return data


def told(data: Raw) -> list[Finding]:
    """All findings of plain data, whose digests are made right first."""
    data["spec_digest"] = digest(ServingSpec.model_validate(data["spec"]))
    data["snapshot_digest"] = digest(World.model_validate(data["snapshot"]["world"]))
    return list(verify(canonical_json(data).encode()))


def codes(data: Raw) -> set[str]:
    """The codes of all findings."""
    return {finding.code for finding in told(data)}


def steps(data: Raw, *kinds: str) -> list[Raw]:
    """The steps of some kinds."""
    return [one for one in data["steps"] if one["kind"] in kinds]


def instance(data: Raw, name: str) -> Raw:
    """An instance of the snapshot."""
    found: Raw = next(one for one in data["snapshot"]["world"]["instances"] if one["id"] == name)
    return found


@pytest.mark.parametrize("seed", range(12))
def test_order_in_the_file_means_nothing(seed: int) -> None:
    """Tests that a plan whose steps are shuffled is judged as the plan is: right ones and spoiled ones."""
    plan = make_plan(random_problem(seed))
    draw = random.Random(seed)
    for spoil in (False, True):
        data = raw(plan)
        for one in data["steps"] if spoil else ():
            one["depends_on"] = one["depends_on"][1:]
        expected = codes(data)
        for _ in range(3):
            draw.shuffle(data["steps"])
            assert expected == codes(data)
        data["steps"].reverse()
        assert expected == codes(data)


@pytest.mark.parametrize("state", ["requested", "joining", "gone"])
def test_gpu_without_a_worker(state: str) -> None:
    """Tests that a target cannot count on an instance that has no workers yet, or none any more."""
    data = raw(spare_plan())
    instance(data, "i2")["state"] = state
    assert {"coverage_hole", "not_a_holder"} <= codes(data)


def test_doomed_in_the_snapshot_counts_as_noticed() -> None:
    """Tests that the grace period of the snapshot binds as that of the trigger does, the shorter of the two."""
    data = raw(spare_plan())
    data["trigger"]["instances"] = []
    instance(data, "i1").update(state="doomed", remaining_s=30.0)
    assert set() == codes(data)
    instance(data, "i1")["remaining_s"] = 0.001
    assert {"past_deadline"} == codes(data)
    data["trigger"].update(instances=["i1"], remaining_s=0.001)
    instance(data, "i1")["remaining_s"] = 30.0
    assert {"past_deadline"} == codes(data)
    instance(data, "i1")["remaining_s"] = None
    data["trigger"]["remaining_s"] = None
    assert set() == codes(data)


def test_moving_tokens() -> None:
    """Tests that the KV that moves is that of moving requests alone, choice by choice."""
    plan = spare_plan()
    data = raw(plan)
    first, second = data["snapshot"]["requests"]
    choice = {"choice": 0, "kv_generation": 0, "tokens": 1, "kv_tokens": 7}
    first["choices"] = [choice, {**choice, "choice": 1}, {**choice, "choice": 2}]
    second["choices"] = []
    facts = Facts(Plan.model_validate(data))
    assert (21, 4) == facts.moving_tokens(facts.plan.snapshot.world.replicas[0].id)
    data["requests"][0]["action"] = "finish"
    facts = Facts(Plan.model_validate(data))
    assert (0, 1) == facts.moving_tokens(facts.plan.snapshot.world.replicas[0].id)


def brute_excess(takes: list[int], gives: list[int], needs: list[list[int]]) -> int:
    """Every choice of takes, with the gives that they wait for."""
    best = 0
    for size in range(len(takes) + 1):
        for chosen in itertools.combinations(range(len(takes)), size):
            due = {give for take in chosen for give in needs[take]}
            best = max(best, sum(takes[take] for take in chosen) - sum(gives[give] for give in due))
    return best


def test_worst_excess_is_that_of_any_order(rng: random.Random) -> None:
    """Tests that the peak over all orders is what trying them all gives."""
    for _ in range(300):
        takes = [rng.randrange(12) for _ in range(rng.randrange(8))]
        gives = [rng.randrange(12) for _ in range(rng.randrange(5))]
        needs = [sorted(rng.sample(range(len(gives)), rng.randrange(len(gives) + 1))) for _ in takes]
        excess, last = worst_excess(takes, gives, needs)
        assert brute_excess(takes, gives, needs) == excess
        assert (last is None) == (excess == 0)
        assert last is None or takes[last] > 0


def test_peak_of_steps_that_nothing_orders() -> None:
    """Tests that room which a later release makes does not count for a step that does not wait for it."""
    data = raw(layered_plan())
    freed = {one["id"] for one in steps(data, "release")}
    for one in steps(data, "copy_weights"):
        one["depends_on"] = [name for name in one["depends_on"] if name not in freed]
    assert "over_memory" in codes(data)


@pytest.mark.parametrize(("spare_bytes", "expected"), [(0, set()), (-1, {"over_memory"})])
@pytest.mark.parametrize("linear", ["plain", "prepacked"])
def test_live_memory_to_the_byte(linear: str, spare_bytes: int, expected: set[str]) -> None:
    """Tests that a blank GPU just holds weights, as often as the spec lays them out, and pool; a byte less is over."""
    data = raw(spare_plan())
    data["spec"]["linear"] = linear
    reserve = next(one for one in steps(data, "reserve") if one["workers"] == ["i2/0"])
    copied = sum(one["bytes"] for one in steps(data, "copy_weights") if one["destination"] == "i2/0")
    takes = reserve["bytes"] + (copied if linear == "prepacked" else 0)
    instance(data, "i2")["gpus"][0]["memory_bytes"] = takes + spare_bytes
    instance(data, "i0")["gpus"][0]["memory_bytes"] = 64 * MIB
    assert expected == codes(data)


def test_pool_of_a_target_holds_what_moves() -> None:
    """Tests that the KV of all that moves in fits the pool: blocks filled in part count whole."""
    data = raw(spare_plan())
    blocks = data["target"]["replicas"][0]["kv_blocks"]
    tokens = data["spec"]["limits"]["kv_block_tokens"]
    for request in data["snapshot"]["requests"]:
        request["choices"][0]["kv_tokens"] = 1
    data["snapshot"]["requests"][0]["choices"][0]["kv_tokens"] = (blocks - 1) * tokens
    assert set() == codes(data)
    data["snapshot"]["requests"][0]["choices"][0]["kv_tokens"] += 1
    assert {"over_memory"} == codes(data)


def test_running_bound_counts_choices() -> None:
    """Tests that B counts sequences, not requests, and that just B pass."""
    data = raw(spare_plan())
    choice = data["snapshot"]["requests"][0]["choices"][0]
    data["target"]["replicas"][0]["max_running"] = 4
    data["snapshot"]["requests"][0]["choices"] = [{**choice, "choice": number} for number in range(3)]
    assert set() == codes(data)
    data["target"]["replicas"][0]["max_running"] = 3
    assert {"over_memory"} == codes(data)


@pytest.mark.parametrize(("other_grace_s", "expected"), [(30.0, set()), (0.02, {"past_deadline"})])
def test_each_deadline_of_a_port(other_grace_s: float, expected: set[str]) -> None:
    """Tests that what a port brings of one doomed instance is due at that one's deadline, not at the latest of all."""
    plan = make_plan(
        running_problem(
            tiny_spec(max_model_len=128), shape=(1, 2, 1), memory_bytes=3 * MIB, trigger=notice("i0", "i1"), spare=2
        )
    )
    data = raw(plan)
    assert set() == codes(data)
    data["trigger"]["instances"] = []
    instance(data, "i0").update(state="doomed", remaining_s=30.0)
    instance(data, "i1").update(state="doomed", remaining_s=30.0)
    for one in steps(data, "quiesce"):
        one["latest_s"] = 0.0
    assert set() == codes(data)
    copies = [one for one in steps(data, "copy_weights") if one["source"] == "i1/0"]
    total_s = sum(one["bytes"] for one in copies) / data["spec"]["profile"]["link_bytes_per_s"]
    slowest_s = max(one["bytes"] for one in copies) / data["spec"]["profile"]["link_bytes_per_s"]
    if expected:
        instance(data, "i1")["remaining_s"] = (slowest_s + total_s) / 2 if len(copies) > 1 else slowest_s / 2
    assert expected == codes(data)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda data: data["snapshot"]["world"]["replicas"][0]["stages"][1].update(gpus=["i0/0"]),
        lambda data: data["snapshot"]["world"]["holdings"].append(data["snapshot"]["world"]["holdings"][0]),
        lambda data: instance(data, "i2").update(id="i1"),
        lambda data: instance(data, "i2")["gpus"][0].update(id="i3/0"),
        lambda data: instance(data, "i2").update(id="", gpus=[]),
        lambda data: data["snapshot"]["requests"][0].update(request="r" * 129),
        lambda data: data["spec"]["profile"].update(link_bytes_per_s=0.5),
        lambda data: data["spec"]["profile"].update(storage_bytes_per_s=2e18),
        lambda data: data["spec"]["model"]["axes"][1].update(group=3),
        lambda data: data["spec"]["model"]["axes"][1].update(cover_of="kv_heads"),
        lambda data: data["spec"]["model"]["axes"][1].update(cover_of="nobody"),
        lambda data: data["spec"]["model"]["axes"][0].update(name="heads"),
        lambda data: data["spec"]["model"]["axes"].append(data["spec"]["model"]["axes"][2]),
        lambda data: data["spec"]["model"]["axes"][2]["chunks"].pop(),
        lambda data: data["spec"]["model"]["axes"][2]["chunks"][1].reverse(),
        lambda data: data["spec"]["model"]["axes"][2]["chunks"].insert(
            1, data["spec"]["model"]["axes"][2]["chunks"][1]
        ),
        lambda data: data["spec"]["model"]["parameters"].append(data["spec"]["model"]["parameters"][0]),
        lambda data: data["spec"]["model"]["parameters"][1].update(shape=[0, 64]),
        lambda data: data["spec"]["model"]["parameters"][1].update(dim=2),
        lambda data: data["spec"]["model"]["parameters"][1].update(shape=[63, 64]),
        lambda data: data["spec"]["model"]["parameters"][1]["segments"][0].update(offset=1),
        lambda data: data["spec"]["model"]["parameters"][1]["segments"].append(
            data["spec"]["model"]["parameters"][1]["segments"][0]
        ),
        lambda data: data["spec"]["model"].update(num_layers=4097),
    ],
)
def test_ground_rules(spoil: Callable[[Raw], None]) -> None:
    """Tests that a spec or world that contradicts itself is corrupt, and judged no further."""
    data = raw(spare_plan())
    spoil(data)
    assert {"corrupt"} == codes(data) - {"stale"}


def test_ids_of_the_longest_length_pass() -> None:
    """Tests that the bound on ids is where it says."""
    data = raw(spare_plan())
    name = "r" * 128
    for one in (data["snapshot"]["requests"][0], data["requests"][0]):
        one["request"] = name
    assert set() == codes(data)


def test_too_many_steps() -> None:
    """Tests that the number of steps is bounded before any of them is judged."""
    data = raw(spare_plan())
    data["steps"] = [{**data["steps"][0], "id": f"s{number}", "depends_on": []} for number in range(20_001)]
    assert ["corrupt"] == [finding.code for finding in told(data)]


def test_shards_without_end() -> None:
    """Tests that shards which would take hours to judge are refused by their number."""
    data = raw(spare_plan())
    data["spec"]["model"]["num_layers"] = 4096
    shard = {"layers": [0, 4096], "tensor": 1, "rank": 0, "first": True, "last": True}
    data["snapshot"]["world"]["holdings"][0]["shards"] = [shard] * 200
    assert "parameters of shards exceed" in " ".join(finding.message for finding in told(data))


def test_findings_are_bounded() -> None:
    """Tests that a plan with thousands of faults is told so in a thousand findings, each of them one short line."""
    data = raw(spare_plan())
    data["steps"][0]["depends_on"] = [f"\x1b[2J\n{'x' * 5000}{number}" for number in range(3000)]
    found = told(data)
    assert 1000 == len(found)
    assert all(finding.line().isprintable() and len(finding.line()) < 800 for finding in found)


def test_a_cycle_is_not_judged_twice() -> None:
    """Tests that steps on a cycle give no finding of the mode's order beside it."""
    data = raw(spare_plan())
    for one in data["steps"]:
        one["depends_on"] = [data["steps"][-1]["id"]]
    found = told(data)
    assert "cycle" in {finding.code for finding in found}
    assert not [finding for finding in found if "does not wait for" in finding.message]


@pytest.mark.parametrize("seed", range(20))
def test_a_problem_that_can_be_planned_fits(seed: int) -> None:
    """Tests that nothing is said against the worlds that the planner plans for, and of a broken one what is wrong."""
    problem = random_problem(seed)
    assert [] == list(misfits(problem))
    trigger = Trigger.model_validate({"kind": "lost", "instances": ["i77"]})
    assert ["event.instances[0]"] == [one.path for one in misfits(problem.model_copy(update={"trigger": trigger}))]


@pytest.mark.parametrize(
    ("spoil", "path"),
    [
        (lambda world: world["holdings"][0].update(gpu="i77/0"), "snapshot.world.holdings[0].gpu"),
        (lambda world: world["replicas"][0]["stages"][0].update(gpus=["i77/0"]), "snapshot.world.replicas[0]"),
        (lambda world: world["replicas"].pop(), "snapshot.requests[0].replica"),
        (lambda world: world["instances"][0]["gpus"][0].update(type="unheard of"), "spec.profile.devices"),
    ],
)
def test_what_a_snapshot_names_is_in_it(spoil: Callable[[Raw], None], path: str) -> None:
    """Tests that a world that names a GPU, replica or GPU type that nothing else knows does not fit."""
    problem = running_problem(tiny_spec(), shape=(1, 2, 1), memory_bytes=3 * MIB, trigger=notice("i1"))
    world: Raw = json.loads(canonical_json(problem.snapshot.world))
    spoil(world)
    snapshot = problem.snapshot.model_copy(update={"world": World.model_validate(world)})
    assert path in {finding.path for finding in misfits(problem.model_copy(update={"snapshot": snapshot}))}


@pytest.mark.parametrize("rate", [1.0, 1e18])
def test_slowest_and_fastest_link(rate: float) -> None:
    """Tests that the bounds on rates are part of what is allowed."""
    problem = running_problem(
        tiny_spec(link_bytes_per_s=rate), shape=(1, 2, 1), memory_bytes=3 * MIB, trigger=notice("i1")
    )
    assert [] == list(misfits(problem))


def test_check_plan_and_verify_agree() -> None:
    """Tests that a plan in memory and in a file are judged alike."""
    plan = spare_plan()
    wrong = plan.model_copy(update={"policy_version": 2})
    assert list(check_plan(wrong)) == list(verify(canonical_json(wrong).encode()))
