"""The checker at its edges: the last value that passes and the first that does not, and just the findings of each."""

from __future__ import annotations

import functools
import json
import re
from collections import Counter
from collections.abc import Callable

import pytest

from spotserve.core.canonical import canonical_json
from spotserve.core.check import misfits, verify
from spotserve.core.check_memory import check_memory
from spotserve.core.check_order import TIME_TOLERANCE_S, check_deadline, check_graph
from spotserve.core.check_requests import check_kv, check_requests
from spotserve.core.check_world import check_membership, check_snapshot, check_spec, most_ranks, well_formed
from spotserve.core.finding import Facts, Finding
from spotserve.core.plan import Plan
from spotserve.core.snapshot import Replica
from tests.core.content_edges import CONTENTS
from tests.core.plan_edges import ORDERS, Case, also, merging_plan, named, step
from tests.core.test_check import loss_plan
from tests.core.test_check_rules import Raw, instance, spare_plan, steps, told
from tests.planning_worlds import MIB, notice, running_problem, tiny_spec


def lines(found: list[Finding], data: Raw) -> list[str]:
    """Code, step and path of each finding, and how often it is there if not once; the step's own path is left out."""
    counts = Counter(f"{one.code} {_place(one, data)}" for one in found)
    return sorted(f"{line} x{count}" if count > 1 else line for line, count in counts.items())


def _place(one: Finding, data: Raw) -> str:
    of_step = re.match(r"steps\[(\d+)\]", one.path)
    if of_step is None:
        return f"{one.step or '-'} {one.path}"
    there = data["steps"][int(of_step[1])]["id"]
    return f"{one.step}{one.path[of_step.end() :]}{'' if there == one.step else f' at {there}'}"


@functools.cache
def written(plan: Callable[[], Plan]) -> str:
    """A plan that is made once, as text."""
    return canonical_json(named(plan()))


def data_of(plan: Callable[[], Plan]) -> Raw:
    """A plan as plain data, to be spoiled."""
    data: Raw = json.loads(written(plan))
    return data


def facts_of(data: Raw) -> Facts:
    """The facts of plain data."""
    return Facts(Plan.model_validate(data))


def model_of(data: Raw) -> Raw:
    """The model of a plan."""
    found: Raw = data["spec"]["model"]
    return found


def only_heads(model: Raw) -> None:
    """Leave the two axes that there must be, and what they do not cut."""
    model["axes"] = model["axes"][:2]
    model["parameters"] = [model["parameters"][0], *model["parameters"][1:5]]


def packed(model: Raw, *, offset: int, extent: int) -> None:
    """A parameter of two segments, the second at `offset`."""
    segments = [{"axis": "q_heads", "offset": 0, "unit": 8}, {"axis": "kv_heads", "offset": offset, "unit": 8}]
    model["parameters"].append(
        {**model["parameters"][1], "name": "{layer}.qkv", "shape": [extent, 64], "segments": segments}
    )


@pytest.mark.parametrize(
    "fit",
    [
        lambda model: model.update(num_layers=4096),
        lambda model: model.update(
            parameters=[{**model["parameters"][0], "name": str(number)} for number in range(4096)]
        ),
        only_heads,
        lambda model: packed(model, offset=64, extent=96),
        lambda model: packed(model, offset=65, extent=97),
        lambda model: model["parameters"][0].update(shape=[1, 1]),
        lambda model: model["parameters"][0].update(shape=[1, 1], dim=1),
        lambda model: model["axes"].append(
            {"name": "narrow", "size": 2, "group": 4, "chunks": [], "cover_of": "q_heads"}
        ),
        lambda model: model["axes"][2].update(chunks=[[0, 1], [1, 256]]),
    ],
)
def test_the_largest_and_the_smallest_model(fit: Callable[[Raw], None]) -> None:
    """Tests that a parameter table at a bound can be cut."""
    data = data_of(spare_plan)
    fit(model_of(data))
    assert [] == lines(list(check_spec(facts_of(data))), data)


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (lambda model: (model.update(num_layers=4097), model["axes"].clear()), ["spec.model"]),
        (
            lambda model: model.update(
                parameters=[{**model["parameters"][0], "name": str(number), "dim": 3} for number in range(4097)]
            ),
            ["spec.model"],
        ),
        (lambda model: model["axes"].append(dict(model["axes"][3], chunks=[])), ["spec.model.axes"]),
        (lambda model: model["axes"][0].update(name="heads"), ["spec.model.axes"]),
        (lambda model: model["axes"][1].update(name="heads"), ["spec.model.axes"]),
        (lambda model: packed(model, offset=63, extent=200), ["spec.model.parameters[12]"]),
        (lambda model: packed(model, offset=64, extent=95), ["spec.model.parameters[12]"]),
        (lambda model: model["parameters"][0].update(shape=[0, 64]), ["spec.model.parameters[0]"]),
        (lambda model: model["parameters"][0].update(shape=[64, 0]), ["spec.model.parameters[0]"]),
        (lambda model: model["parameters"][0].update(shape=[]), ["spec.model.parameters[0]"]),
        (lambda model: model["parameters"][0].update(dim=-1), ["spec.model.parameters[0]"]),
        (lambda model: model["parameters"][0].update(dim=2), ["spec.model.parameters[0]"]),
        (lambda model: model["parameters"].append(model["parameters"][0]), ["spec.model.parameters"]),
        (
            lambda model: model["axes"].append(
                {"name": "narrow", "size": 2, "group": 2, "chunks": [], "cover_of": "kv_heads"}
            ),
            ["spec.model.axes[4]"],
        ),
        (lambda model: model["axes"][1].update(cover_of="nobody"), ["spec.model.axes[1]"]),
        (lambda model: model["axes"][1].update(group=3), ["spec.model.axes[1]"]),
        (lambda model: model["axes"][2].update(chunks=[[0, 0], [0, 256]]), ["spec.model.axes[2]"]),
        (lambda model: model["axes"][2].update(chunks=[[0, 128], [129, 256]]), ["spec.model.axes[2]"]),
        (lambda model: model["axes"][2].update(chunks=[[0, 255]]), ["spec.model.axes[2]"]),
        (lambda model: model["axes"][2].update(chunks=[[0, 257]]), ["spec.model.axes[2]"]),
    ],
)
def test_a_model_just_beyond(spoil: Callable[[Raw], object], expected: list[str]) -> None:
    """Tests that a table that cannot be cut is told at the place that is wrong, and nowhere else."""
    data = data_of(spare_plan)
    spoil(model_of(data))
    assert expected == [one.path for one in check_spec(facts_of(data))]


@pytest.mark.parametrize("name", ["link_bytes_per_s", "storage_bytes_per_s"])
def test_rates(name: str) -> None:
    """Tests that each rate may be as slow and as fast as the bounds, and no further."""
    data = data_of(spare_plan)
    for rate, expected in ((1.0, []), (1e18, []), (0.99, [name]), (1.01e18, [name])):
        data["spec"]["profile"][name] = rate
        assert [f"spec.profile.{one}" for one in expected] == [one.path for one in check_spec(facts_of(data))]


def test_the_most_steps() -> None:
    """Tests that the number of steps is bounded at what it says, and that the table is read all the same."""
    plan = spare_plan()
    for count, expected in ((40_000, []), (40_001, ["steps"])):
        many = plan.model_copy(update={"steps": plan.steps[:1] * count})
        assert expected == [one.path for one in check_spec(Facts(many))]


def world_of(data: Raw) -> Raw:
    """The world of a plan."""
    found: Raw = data["snapshot"]["world"]
    return found


@pytest.mark.parametrize(
    ("spoil", "expected", "named"),
    [
        (
            lambda data: world_of(data)["instances"].append({**world_of(data)["instances"][2], "gpus": []}),
            ["snapshot.world.instances"],
            "i2",
        ),
        (
            lambda data: instance(data, "i2")["gpus"].append(instance(data, "i2")["gpus"][0]),
            ["snapshot.world.instances.gpus"],
            "i2/0",
        ),
        (
            lambda data: world_of(data)["replicas"].append(
                {**world_of(data)["replicas"][0], "stages": [{"gpus": ["i2/0"], "layers": [0, 8]}]}
            ),
            ["snapshot.world.replicas"],
            "r3.1",
        ),
        (
            lambda data: world_of(data)["holdings"].append(world_of(data)["holdings"][1]),
            ["snapshot.world.holdings"],
            "i1/0",
        ),
        (
            lambda data: data["target"]["replicas"].append(data["target"]["replicas"][0]),
            ["target.replicas"],
            "r4",
        ),
        (
            lambda data: data["snapshot"]["requests"].append(data["snapshot"]["requests"][1]),
            ["snapshot.requests"],
            f"{1:032x}",
        ),
    ],
)
def test_names_twice(spoil: Callable[[Raw], None], expected: list[str], named: str) -> None:
    """Tests that each kind of name is there once, and that the one that is there twice is told."""
    data = data_of(spare_plan)
    spoil(data)
    found = list(check_snapshot(facts_of(data)))
    assert expected == [one.path for one in found]
    assert found[0].message.startswith(f"{named} is there")


@pytest.mark.parametrize(("length", "expected"), [(0, 1), (1, 0), (128, 0), (129, 1)])
def test_length_of_names(length: int, expected: int) -> None:
    """Tests that a name has a character at least and 128 at most."""
    data = data_of(spare_plan)
    data["target"]["replicas"][0]["id"] = "r" * length
    assert ["target.replicas"] * expected == [one.path for one in check_snapshot(facts_of(data))]


def shard(layers: list[int], *, tensor: int = 1, rank: int = 0) -> Raw:
    """A shard."""
    return {"layers": layers, "tensor": tensor, "rank": rank, "first": False, "last": False}


@pytest.mark.parametrize(
    ("held", "expected"),
    [
        (shard([0, 8]), 0),
        (shard([0, 0]), 0),
        (shard([8, 8]), 0),
        (shard([-1, 4]), 1),
        (shard([5, 4]), 1),
        (shard([4, 9]), 1),
        (shard([0, 8], tensor=8, rank=7), 0),
        (shard([0, 8], tensor=9, rank=7), 1),
        (shard([0, 8], tensor=0, rank=0), 1),
        (shard([0, 8], tensor=2, rank=2), 1),
        (shard([0, 8], tensor=2, rank=1), 0),
        (shard([0, 8], tensor=2, rank=-1), 1),
    ],
)
def test_shards_inside_the_model(held: Raw, expected: int) -> None:
    """Tests that what a GPU holds lies inside the model at each of its bounds."""
    data = data_of(spare_plan)
    world_of(data)["holdings"][1]["shards"].append(held)
    assert ["snapshot.world.holdings[1]"] * expected == [one.path for one in check_snapshot(facts_of(data))]


def costly(data: Raw) -> int:
    """How often a plan is said to be too much to judge."""
    return sum("parameters of shards exceed" in one.message for one in check_snapshot(facts_of(data)))


def test_the_most_cells() -> None:
    """Tests that the parameters of all shards, of GPUs and of both layouts, are counted to the last one."""
    data = data_of(spare_plan)
    model_of(data).update(num_layers=4096, parameters=model_of(data)["parameters"][:10])
    world, target = world_of(data), data["target"]
    world.update(replicas=[], holdings=[{"gpu": "i0/0", "shards": [shard([0, 4000])] * 200, "slices": []}])
    target["replicas"] = []
    assert 0 == costly(data)
    world["holdings"][0]["shards"].append(shard([7, 7]))
    assert 0 == costly(data)
    world["holdings"][0]["shards"] += [shard([10, 0]), shard([7, 8])]
    assert 1 == costly(data)
    world["holdings"] = []
    wide = {"generation": 3, "id": "r1", "kv_blocks": 20, "max_running": 4}
    wide["stages"] = [{"gpus": [f"i{number}/0" for number in range(200)], "layers": [0, 4000]}]
    for place in (world, target):
        place["replicas"] = [wide]
        assert 0 == costly(data)
        place["replicas"] = [{**wide, "stages": [*wide["stages"], {"gpus": ["i300/0"], "layers": [0, 1]}]}]
        assert 1 == costly(data)
        place["replicas"] = []


def test_types_of_gpus() -> None:
    """Tests that a GPU is of a type that the profile has times of: its own, or one beside it."""
    data = data_of(spare_plan)
    instance(data, "i2")["gpus"][0]["type"] = "other"
    assert ["spec.profile.devices"] == [one.path for one in check_snapshot(facts_of(data))]
    latencies = data["spec"]["profile"]["latencies"]
    data["spec"]["profile"]["devices"] = [{"type": "other", "latencies": latencies}]
    assert [] == list(check_snapshot(facts_of(data)))
    instance(data, "i1")["gpus"][0]["type"] = "cpu"
    assert [] == list(check_snapshot(facts_of(data)))


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (lambda one: one["stages"][0].update(gpus=["i0/0"]), ["snapshot.world.replicas[1]"]),
        (lambda one: one["stages"][0].update(gpus=["i3/0"]), ["snapshot.world.replicas[1]"]),
        (lambda one: one["stages"][0].update(layers=[0, 9]), ["snapshot.world.replicas[1]"]),
        (lambda one: None, []),
    ],
)
def test_replicas_of_a_world(spoil: Callable[[Raw], None], expected: list[str]) -> None:
    """Tests that no GPU of the world sits twice, in one replica or in two, and that each replica is of the model."""
    data = data_of(loss_plan)
    spoil(world_of(data)["replicas"][1])
    assert expected == [one.path for one in check_snapshot(facts_of(data))]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, ["snapshot.requests[1].replica"]),
        ({"state": "finished"}, []),
        ({"state": "cancelled"}, []),
        ({"replica": None}, []),
        ({"replica": None, "state": "failed"}, []),
        ({"replica": "r3.1"}, []),
    ],
    ids=str,
)
def test_replica_of_a_request(change: Raw, expected: list[str]) -> None:
    """Tests that a request that goes on runs on a replica of the snapshot or on none; one that has ended did so."""
    data = data_of(spare_plan)
    data["snapshot"]["requests"][1].update({"replica": "r77", **change})
    assert expected == [one.path for one in check_membership(facts_of(data))]


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (lambda data: world_of(data)["holdings"][1].update(gpu="i7/0"), ["snapshot.world.holdings[1].gpu"]),
        (lambda data: world_of(data)["replicas"][0]["stages"][1].update(gpus=["i7/0"]), ["snapshot.world.replicas[0]"]),
        (lambda data: data["trigger"].update(instances=["i0", "i7"]), ["event.instances[1]"]),
    ],
)
def test_members(spoil: Callable[[Raw], None], expected: list[str]) -> None:
    """Tests that whatever holds, serves or happens does so on an instance of the snapshot."""
    data = data_of(spare_plan)
    spoil(data)
    assert expected == [one.path for one in check_membership(facts_of(data))]


def test_misfits_end_with_the_first_rule() -> None:
    """Tests that a spec that contradicts itself is told alone: what is said of its world would mean nothing."""
    problem = running_problem(tiny_spec(), shape=(1, 2, 1), memory_bytes=3 * MIB, trigger=notice("i7"))
    assert ["event.instances[0]"] == [one.path for one in misfits(problem)]
    model = problem.spec.model.model_copy(update={"axes": ()})
    broken = problem.model_copy(update={"spec": problem.spec.model_copy(update={"model": model})})
    assert ["spec.model.axes"] == [one.path for one in misfits(broken)]


def test_most_ranks() -> None:
    """Tests that the axis with the fewest chunks bounds the tensor degree, and that covers do not count."""
    model = tiny_spec().model
    assert 8 == most_ranks(model)
    axes = (model.axes[0], model.axes[1], model.axes[2].model_copy(update={"chunks": ((0, 128), (128, 256))}))
    assert 2 == most_ranks(model.model_copy(update={"axes": axes}))
    assert 1 == most_ranks(model.model_copy(update={"axes": ()}))


@pytest.mark.parametrize(
    ("stages", "expected"),
    [
        ([([0, 4], 1), ([4, 8], 1)], True),
        ([([4, 8], 1), ([0, 4], 1)], False),
        ([([0, 8], 8)], True),
        ([([0, 8], 9)], False),
        ([([0, 8], 0)], False),
        ([([0, 4], 1), ([4, 8], 2)], False),
        ([([-1, 8], 1)], False),
        ([([0, 9], 1)], False),
        ([([3, 3], 1)], False),
        ([([0, 4], 1), ([4, 4], 1), ([4, 8], 1)], False),
        ([([7, 8], 1)], True),
    ],
)
def test_well_formed(stages: list[tuple[list[int], int]], expected: bool) -> None:
    """Tests that stages are in order, inside the model, not empty, and of one tensor degree that the model has."""
    made = [{"layers": layers, "gpus": [f"i{number}/0" for number in range(count)]} for layers, count in stages]
    one = Replica.model_validate({"id": "r1", "generation": 3, "kv_blocks": 1, "max_running": 1, "stages": made})
    assert expected is well_formed(Facts(spare_plan()), one)


def spoiled(plan: Callable[[], Plan], spoil: Callable[[Raw], object]) -> list[str]:
    """All findings of a plan that has been spoiled."""
    data = data_of(plan)
    spoil(data)
    return lines(told(data), data)


def cases(table: dict[Callable[[], Plan], list[Case]]) -> list[tuple[Callable[[], Plan], Callable[[Raw], object], str]]:
    """The rows of a table, each with its plan."""
    return [(plan, spoil, expected) for plan, rows in table.items() for spoil, expected in rows]


@pytest.mark.parametrize(("plan", "spoil", "expected"), cases(ORDERS))
def test_orders(plan: Callable[[], Plan], spoil: Callable[[Raw], object], expected: str) -> None:
    """Tests that a step that is missing, doubled, misplaced or another's is told at that step and nowhere else."""
    assert expected == "; ".join(spoiled(plan, spoil))


@pytest.mark.parametrize(("plan", "spoil", "expected"), cases(CONTENTS))
def test_contents(plan: Callable[[], Plan], spoil: Callable[[Raw], object], expected: str) -> None:
    """Tests that content, KV, requests, memory and deadlines at a bound pass, and beyond it are told there alone."""
    assert expected == "; ".join(spoiled(plan, spoil))


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (lambda target, _: target.update(max_running=4), 0),
        (lambda target, _: target.update(max_running=3), 1),
        (lambda target, _: target.update(kv_blocks=14), 0),
        (lambda target, _: target.update(kv_blocks=13), 1),
        (lambda _, requests: requests[0]["choices"].append({**requests[0]["choices"][0], "choice": 1}), 1),
        (lambda _, requests: requests[2]["choices"].append({**requests[2]["choices"][0], "choice": 1}), 1),
        (lambda target, requests: (target.update(max_running=3), requests[0].update(state="finished")), 0),
        (lambda target, requests: (target.update(max_running=3), requests[0].update(replica=None)), 0),
        (lambda target, requests: (target.update(max_running=3), requests[0].update(choices=[])), 1),
        (lambda target, requests: (target.update(max_running=3), requests[2].update(choices=[])), 1),
        (lambda target, requests: (target.update(kv_blocks=11), requests[0].update(choices=[])), 0),
        (lambda target, requests: (target.update(kv_blocks=10), requests[0].update(choices=[])), 1),
        (lambda _, requests: requests[0]["choices"][0].update(kv_tokens=32 * 16), 1),
        (lambda _, requests: requests[0]["choices"][0].update(kv_tokens=29 * 16), 0),
        (lambda _, requests: requests[0]["choices"][0].update(kv_tokens=29 * 16 + 1), 1),
    ],
)
def test_room_for_those_who_come(spoil: Callable[[Raw, list[Raw]], object], expected: int) -> None:
    """Tests that what stays on a replica counts beside what moves there, in sequences and in blocks, to the last."""
    data = data_of(merging_plan)
    for one in data["requests"]:
        one["action"] = "move"
    spoil(data["target"]["replicas"][0], data["snapshot"]["requests"])
    assert ["over_memory - target.replicas[0]"] * expected == lines(list(check_requests(facts_of(data))), data)


def test_a_replica_that_nobody_joins_is_as_full_as_it_is() -> None:
    """Tests that a replica that is over its bounds already is not the plan's fault."""
    data = data_of(merging_plan)
    data["target"]["replicas"][0].update(max_running=1, kv_blocks=1)
    assert [] == list(check_requests(facts_of(data)))


@pytest.mark.parametrize(("size", "expected"), [(327680, []), (327679, ["steps[0].bytes"])])
def test_pool_of_a_lost_replica(size: int, expected: list[str]) -> None:
    """Tests that a position cannot take over the pool of a replica that has lost a rank, though it is of the size."""
    data = data_of(spare_plan)
    data["trigger"].update(kind="lost", remaining_s=None)
    step(data, "reserve:i0/0")["bytes"] = size
    assert expected == [one.path for one in check_memory(facts_of(data))]


def test_moves_of_another_replica() -> None:
    """Tests that a route needs copies for those who move along it, not for others."""
    data = data_of(loss_plan)
    data["requests"].append({"action": "move", "request": f"{100:032x}", "to_replica": "r3.2"})
    assert [] == list(check_kv(facts_of(data)))


def test_the_first_of_a_cycle() -> None:
    """Tests that a cycle is told at the first step that is on it, not at the first of the file."""
    data = data_of(spare_plan)
    step(data, "commit")["depends_on"].append("activate")
    assert ["cycle commit steps"] == lines(list(check_graph(facts_of(data))), data)


READS = ["copy_weights", "copy_kv", "copy_kv_delta"]


@pytest.mark.parametrize("kind", READS)
def test_each_kind_reads_in_time(kind: str) -> None:
    """Tests that one step of each kind alone that reads a doomed instance is late by its path and by both ports."""
    data = data_of(spare_plan)
    data["steps"] = [{**one, "depends_on": []} for one in steps(data, kind) if one["source"] == "i1/0"]
    size = data["steps"][0]["bytes"]
    for seconds, expected in ((size / 1e8, 0), (size / 1e8 - 2e-6, 3)):
        data["trigger"]["remaining_s"] = seconds
        assert expected == len(list(check_deadline(facts_of(data))))
    data["spec"]["profile"]["link_bytes_per_s"] = size
    for seconds, expected in ((1.0 - TIME_TOLERANCE_S, 0), (1.0 - 2 * TIME_TOLERANCE_S, 3)):
        data["trigger"]["remaining_s"] = seconds
        assert expected == len(list(check_deadline(facts_of(data))))


def test_kv_that_comes_twice_in_two_parts_is_told_once() -> None:
    """Tests that rectangles that arrive twice are told at the first layer of the position where they do."""
    data = data_of(spare_plan)
    also(data, "copy_kv:i1/0>i2/0", route={**step(data, "copy_kv:i1/0>i2/0")["route"], "layers": [4, 6]})
    data["steps"].append(
        {**step(data, "new"), "id": "newer", "route": {**step(data, "new")["route"], "layers": [6, 8]}}
    )
    assert ["double_owner - steps"] == lines(list(check_kv(facts_of(data))), data)


def test_a_port_is_told_once() -> None:
    """Tests that a port that misses two deadlines has one finding, of the earlier of them."""
    data = data_of(spare_plan)
    data["trigger"]["instances"] = []
    data["steps"] = [{**one, "depends_on": []} for one in steps(data, "copy_weights", "copy_kv")][1:]
    step(data, "copy_kv:i1/0>i2/0")["source"] = "i0/0"
    for name, seconds in (("i0", 0.00001), ("i1", 0.002)):
        instance(data, name).update(state="doomed", remaining_s=seconds)
    ports = [one.message for one in check_deadline(facts_of(data)) if one.step is None]
    assert ["i2", "i0", "i1"] == [message.split()[0] for message in ports]
    assert ports[0].startswith("i2 receives 97280 bytes")


def test_what_stays_on_an_instance_passes_no_port() -> None:
    """Tests that a copy between two GPUs of a doomed instance uses its time, and not its ports."""
    data = data_of(spare_plan)
    data["steps"] = [{**steps(data, "copy_weights")[0], "depends_on": [], "destination": "i1/1"}]
    data["trigger"]["remaining_s"] = 0.001
    assert ["past_deadline copy_weights:i1/0>i2/0"] == lines(list(check_deadline(facts_of(data))), data)
    data["steps"][0]["destination"] = "i1/0"
    assert [] == list(check_deadline(facts_of(data)))


def test_kv_of_a_lost_replica() -> None:
    """Tests that no KV of a replica that has lost a rank can be copied, not even by the ranks that it has left."""
    data = data_of(spare_plan)
    data["trigger"].update(kind="lost", remaining_s=None)
    expected = [
        "copy_kv:i0/0>i0/0",
        "copy_kv:i1/0>i2/0",
        "copy_kv_delta:i0/0>i0/0",
        "copy_kv_delta:i1/0>i2/0",
    ]
    assert [f"not_a_holder {one}" for one in expected] == lines(list(check_kv(facts_of(data))), data)


def test_a_pool_does_not_shrink_in_live_mode() -> None:
    """Tests that a live plan keeps its pools whole until they go, even where enough is kept."""
    found = spoiled(spare_plan, lambda data: also(data, "release:i0/0", kv=False, bytes=0, keep_blocks=20))
    late = ["copy_kv:i0/0>i0/0", "copy_kv_delta:i0/0>i0/0"]
    assert [*(f"wrong_order {one} at new" for one in late), "wrong_order new"] == found


def test_the_first_epoch_that_is_not_used() -> None:
    """Tests that a plan may take just the first epoch that is not used yet."""
    assert [] == spoiled(spare_plan, lambda data: data["snapshot"].update(next_epoch=4))
    assert ["stale - epoch.to"] == spoiled(spare_plan, lambda data: data["snapshot"].update(next_epoch=5))


def test_place_of_a_fault_in_a_file() -> None:
    """Tests that what has the wrong shape is told at its place, and what is no JSON of the whole file."""
    assert ["file"] == [one.path for one in verify(b"{")]
    data = data_of(spare_plan)
    data["epoch"]["from"] = -1
    assert ["epoch.from"] == [one.path for one in verify(canonical_json(data).encode())]
