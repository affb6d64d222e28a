"""Plans that are spoiled at an edge, and all that the checker says of each: what `test_check_edges.py` goes through.

Findings read `CODE step path`, with `xN` behind those that are there N times; no words at all is a plan that passes.
"""

from __future__ import annotations

from collections.abc import Callable

from spotserve.core.plan import Plan, Trigger
from spotserve.solvers.planner import make_plan
from tests.core.test_check import drop, loss_plan, restart_plan, shrinking_plan
from tests.core.test_check_rules import Raw, instance, layered_plan, spare_plan, steps
from tests.planning_worlds import MIB, notice, running_problem, tiny_spec

UP = "model.layers.0.mlp.up_proj.weight"
Case = tuple[Callable[[], Plan], Callable[[Raw], object], str]


def step(data: Raw, name: str) -> Raw:
    """The step of an id."""
    found: Raw = next(one for one in data["steps"] if one["id"] == name)
    return found


def piece(parameter: str, start: int, stop: int, dim: int = 0) -> Raw:
    """A slice."""
    return {"parameter": parameter, "dim": dim, "start": start, "stop": stop}


def without(data: Raw, name: str, *waited: str) -> None:
    """Let a step no longer wait for some steps."""
    step(data, name)["depends_on"] = [one for one in step(data, name)["depends_on"] if one not in waited]


def also(data: Raw, name: str, **change: object) -> None:
    """Put a changed copy of a step behind it, and let the same steps wait for it."""
    index = next(number for number, one in enumerate(data["steps"]) if one["id"] == name)
    data["steps"].insert(index + 1, {**data["steps"][index], "id": "new", **change})
    for one in data["steps"]:
        if name in one["depends_on"]:
            one["depends_on"] = [*one["depends_on"], "new"]


def loaded(data: Raw) -> None:
    """Let the weights come from storage instead."""
    copy = step(data, "s5")
    copy.update(kind="load_weights", workers=[copy.pop("destination")])
    copy.pop("source")


def split_plan() -> Plan:
    """One stage of two ranks becomes two stages of one."""
    spec = tiny_spec(pipeline=2, tensor=1, max_model_len=64)
    return make_plan(
        running_problem(spec, shape=(1, 1, 2), memory_bytes=8 * MIB, trigger=Trigger(kind="load"), requests_each=1)
    )


def merging_plan() -> Plan:
    """One of two replicas is doomed; its requests move into the other, which just has room for them."""
    return make_plan(
        running_problem(tiny_spec(policy="reroute"), shape=(2, 1, 1), memory_bytes=8 * MIB, trigger=notice("i1"))
    )


def stretched(data: Raw, old: tuple[int, int], new: tuple[int, int]) -> None:
    """Let the KV of some layers come with other layers."""
    for one in steps(data, "copy_kv", "copy_kv_delta"):
        if one["route"]["layers"] == list(old):
            one["route"]["layers"] = list(new)


def kv_left_out(data: Raw) -> None:
    """Let no KV move."""
    for one in steps(data, "copy_kv_delta", "copy_kv"):
        drop(data, one)


def at_deadline(data: Raw, remaining_s: float | None) -> None:
    """Another grace period, and a stop that is not late for it."""
    data["trigger"]["remaining_s"] = remaining_s
    step(data, "s7")["latest_s"] = 0.0


def narrowed(data: Raw, missing_bytes: int) -> None:
    """Pools of as many blocks as before, in other rectangles, and reserves that fall short by some bytes."""
    fewer = data["target"]["replicas"][0]["kv_blocks"] - 40
    data["target"]["replicas"][0]["kv_blocks"] = 40
    for one in steps(data, "reserve"):
        one["bytes"] -= fewer * 16 * 1024 + missing_bytes


ORDERS: list[Case] = [
    (spare_plan, lambda data: without(data, "s3", "s1"), "wrong_order s3 steps[2]"),
    (spare_plan, lambda data: without(data, "s4", "s2"), "wrong_order s4 steps[3]"),
    (spare_plan, lambda data: without(data, "s5", "s2"), "wrong_order s5 steps[4]"),
    (spare_plan, lambda data: without(data, "s6", "s1"), "wrong_order s6 steps[5]"),
    (spare_plan, lambda data: without(data, "s6", "s2"), "wrong_order s6 steps[5]"),
    (spare_plan, lambda data: without(data, "s7", "s3"), "wrong_order s7 steps[6]"),
    (spare_plan, lambda data: without(data, "s7", "s4"), "wrong_order s7 steps[6]"),
    (
        spare_plan,
        lambda data: without(data, "s7", "s5"),
        "wrong_order s11 steps[10]; wrong_order s13 steps[12]; wrong_order s5 steps[4]; wrong_order s7 steps[6]",
    ),
    (
        spare_plan,
        lambda data: without(data, "s7", "s6"),
        "wrong_order s11 steps[10]; wrong_order s6 steps[5]; wrong_order s7 steps[6]",
    ),
    (spare_plan, lambda data: without(data, "s8", "s3"), ""),
    (spare_plan, lambda data: without(data, "s8", "s7"), "wrong_order s8 steps[7]"),
    (
        spare_plan,
        lambda data: without(data, "s10", "s8"),
        "wrong_order s11 steps[10]; wrong_order s12 steps[11]; wrong_order s8 steps[7]",
    ),
    (spare_plan, lambda data: without(data, "s11", "s10"), "wrong_order s11 steps[10] x7"),
    (spare_plan, loaded, ""),
    (spare_plan, lambda data: (loaded(data), without(data, "s5", "s2")), "wrong_order s5 steps[4]"),
    (
        spare_plan,
        lambda data: (loaded(data), without(data, "s7", "s5")),
        "wrong_order s11 steps[10]; wrong_order s5 steps[4]; wrong_order s7 steps[6]",
    ),
    (layered_plan, lambda data: without(data, "s2", "s1"), "wrong_order s1 steps[0]"),
    (layered_plan, lambda data: without(data, "s3", "s2"), "wrong_order s3 steps[2]"),
    (layered_plan, lambda data: without(data, "s35", "s3"), "wrong_order s35 steps[34]"),
    (layered_plan, lambda data: without(data, "s36", "s35"), "wrong_order s36 steps[35]"),
    (layered_plan, lambda data: without(data, "s36", "s5"), ""),
    (layered_plan, lambda data: step(data, "s5").update(depends_on=["s3"]), ""),
    (
        layered_plan,
        lambda data: step(data, "s9").update(depends_on=["s1"]),
        "wrong_order s13 steps[12]; wrong_order s9 steps[8] x2",
    ),
    (layered_plan, lambda data: step(data, "s15").update(depends_on=[]), "wrong_order s15 steps[14] x2"),
    (
        restart_plan,
        lambda data: [one.update(depends_on=["s1"]) for one in steps(data, "release")],
        "wrong_order s3 steps[2]; wrong_order s4 steps[3]; wrong_order s5 steps[4]; wrong_order s7 steps[6]",
    ),
    (loss_plan, lambda data: without(data, "s2", "s1"), "wrong_order s2 steps[1]"),
    (loss_plan, lambda data: without(data, "s3", "s1"), "wrong_order s3 steps[2]"),
    (
        spare_plan,
        lambda data: step(data, "s4").update(depends_on=["s4"]),
        "cycle s4 steps; wrong_order s12 steps[11] x2; wrong_order s13 steps[12] x3",
    ),
    (spare_plan, lambda data: step(data, "s13").update(id="s12"), "duplicate_step s12 steps"),
    (
        spare_plan,
        lambda data: step(data, "s13").update(depends_on=["s10", "s11", "s99"]),
        "missing_step s13 steps[12].depends_on",
    ),
    (spare_plan, lambda data: also(data, "s1"), "duplicate_step new steps[1]"),
    (spare_plan, lambda data: also(data, "s6"), "duplicate_step new steps[6]"),
    (spare_plan, lambda data: also(data, "s7"), "duplicate_step new steps[7]"),
    (spare_plan, lambda data: also(data, "s8"), "duplicate_step new steps[8]"),
    (spare_plan, lambda data: also(data, "s10"), "duplicate_step new steps[10]; wrong_order new steps[10]"),
    (spare_plan, lambda data: also(data, "s11"), "duplicate_step new steps[11]"),
    (spare_plan, lambda data: also(data, "s12"), "duplicate_step new steps[12]"),
    (spare_plan, lambda data: also(data, "s12", kv=False, bytes=0), ""),
    (loss_plan, lambda data: also(data, "s2"), "double_owner new steps[2].requests x2"),
    (loss_plan, lambda data: also(data, "s2", requests=[]), ""),
    (spare_plan, lambda data: drop(data, step(data, "s1")), "missing_step - steps"),
    (spare_plan, lambda data: drop(data, step(data, "s2")), "missing_step - steps"),
    (spare_plan, lambda data: drop(data, step(data, "s3")), "coverage_hole - steps; missing_step s8 steps"),
    (spare_plan, lambda data: drop(data, step(data, "s5")), "coverage_hole - steps x38"),
    (spare_plan, lambda data: drop(data, step(data, "s6")), "missing_step - steps"),
    (spare_plan, lambda data: drop(data, step(data, "s7")), "missing_step - steps"),
    (spare_plan, lambda data: drop(data, step(data, "s8")), "missing_step s3 steps"),
    (spare_plan, lambda data: drop(data, step(data, "s9")), "missing_step s4 steps"),
    (spare_plan, lambda data: drop(data, step(data, "s10")), "missing_step - steps"),
    (spare_plan, lambda data: drop(data, step(data, "s11")), "missing_step - steps"),
    (spare_plan, lambda data: drop(data, step(data, "s12")), "missing_step - steps"),
    (spare_plan, lambda data: drop(data, step(data, "s13")), "missing_step - steps"),
    (loss_plan, lambda data: drop(data, step(data, "s1")), "missing_step - steps"),
    (loss_plan, lambda data: drop(data, step(data, "s2")), "missing_step - steps x2"),
    (loss_plan, lambda data: drop(data, step(data, "s3")), "missing_step - steps"),
    (
        spare_plan,
        lambda data: data.update(steps=[], applyable=False),
        "coverage_hole - steps x38; missing_step - routes[0]; missing_step - steps",
    ),
    (loss_plan, lambda data: data.update(steps=[], applyable=False), "missing_step - steps"),
    (spare_plan, lambda data: step(data, "s1").update(replica="r3.1"), "double_owner s1 steps[0]"),
    (spare_plan, lambda data: step(data, "s5").update(replica="r3.1"), "double_owner s5 steps[4]"),
    (
        spare_plan,
        lambda data: step(data, "s6").update(replica="r3.1"),
        "double_owner s6 steps[5]; missing_step - steps",
    ),
    (
        spare_plan,
        lambda data: step(data, "s11").update(replica="r3.1"),
        "double_owner s11 steps[10]; missing_step - steps",
    ),
    (spare_plan, lambda data: (loaded(data), step(data, "s5").update(replica="r3.1")), "double_owner s5 steps[4]"),
    (spare_plan, lambda data: step(data, "s7").update(replica="r4"), "double_owner s7 steps[6]; missing_step - steps"),
    (spare_plan, lambda data: step(data, "s12").update(replica="r4"), "double_owner s12 steps[11]"),
    (spare_plan, lambda data: step(data, "s7").update(workers=["i1/0"]), "double_owner s7 steps[6]"),
    (
        spare_plan,
        lambda data: step(data, "s12").update(workers=["i2/0"]),
        "double_owner s12 steps[11]; missing_step - steps",
    ),
    (spare_plan, lambda data: step(data, "s1").update(generation=5), "double_owner s1 steps[0]"),
    (spare_plan, lambda data: step(data, "s6").update(generation=5), "double_owner s6 steps[5]"),
    (spare_plan, lambda data: step(data, "s11").update(generation=5), "double_owner s11 steps[10]"),
    (spare_plan, lambda data: step(data, "s12").update(generation=5), "double_owner s12 steps[11]"),
    (spare_plan, lambda data: step(data, "s1").update(stage=2), "double_owner s1 steps[0]"),
    (spare_plan, lambda data: step(data, "s1").update(stage=-1), "double_owner s1 steps[0]"),
    (spare_plan, lambda data: step(data, "s1").update(rank=1), "double_owner s1 steps[0]"),
    (spare_plan, lambda data: step(data, "s1").update(rank=-1), "double_owner s1 steps[0]"),
    (spare_plan, lambda data: step(data, "s2").update(stage=2), "double_owner s2 steps[1]"),
    (spare_plan, lambda data: step(data, "s2").update(stage=-1), "double_owner s2 steps[1]"),
    (spare_plan, lambda data: step(data, "s2").update(rank=1), "double_owner s2 steps[1]"),
    (spare_plan, lambda data: step(data, "s2").update(rank=-1), "double_owner s2 steps[1]"),
    (spare_plan, lambda data: step(data, "s1").update(stage=1), "double_owner s1 steps[0]"),
    (spare_plan, lambda data: step(data, "s2").update(stage=0), "double_owner s2 steps[1]"),
    (spare_plan, lambda data: step(data, "s6")["workers"].reverse(), "double_owner s6 steps[5]"),
    (spare_plan, lambda data: step(data, "s11")["workers"].reverse(), "double_owner s11 steps[10]"),
    (
        spare_plan,
        lambda data: step(data, "s4").update(source="i9/0"),
        "missing_step s4 steps; missing_step s9 steps; not_a_holder s4 steps[3] x2",
    ),
    (
        spare_plan,
        lambda data: step(data, "s4").update(destination="i9/0"),
        "coverage_hole - steps; double_owner s4 steps[3]; missing_step s4 steps; missing_step s9 steps; "
        "not_a_holder s4 steps[3]",
    ),
    (spare_plan, lambda data: step(data, "s5").update(source="i9/0"), "not_a_holder s5 steps[4] x2"),
    (
        spare_plan,
        lambda data: step(data, "s5").update(destination="i9/0"),
        "coverage_hole - steps x38; double_owner - steps; not_a_holder s5 steps[4]",
    ),
    (
        spare_plan,
        lambda data: step(data, "s9").update(source="i9/0"),
        "missing_step s4 steps; missing_step s9 steps; not_a_holder s9 steps[8] x2",
    ),
    (
        spare_plan,
        lambda data: step(data, "s9").update(destination="i9/0"),
        "missing_step s4 steps; missing_step s9 steps; not_a_holder s9 steps[8]",
    ),
    (
        spare_plan,
        lambda data: step(data, "s1").update(workers=["i9/0"]),
        "double_owner s1 steps[0]; missing_step - steps; not_a_holder s1 steps[0]",
    ),
    (
        spare_plan,
        lambda data: step(data, "s7").update(workers=["i9/0"]),
        "double_owner s7 steps[6]; not_a_holder s7 steps[6]",
    ),
    (
        spare_plan,
        lambda data: step(data, "s12").update(workers=["i9/0"]),
        "double_owner s12 steps[11]; missing_step - steps; not_a_holder s12 steps[11]",
    ),
    (loss_plan, lambda data: step(data, "s2")["requests"].append(f"{0:032x}"), "double_owner s2 steps[1].requests"),
    (loss_plan, lambda data: step(data, "s2")["requests"].append(f"{100:032x}"), "double_owner s2 steps[1].requests"),
    (loss_plan, lambda data: step(data, "s3").update(kv=False), "missing_step - steps"),
    (
        layered_plan,
        lambda data: step(data, "s36").update(replica="r3.1"),
        "double_owner s36 steps[35]; missing_step - steps",
    ),
]

CONTENTS: list[Case] = [
    (
        spare_plan,
        lambda data: data["target"]["replicas"][0]["stages"][1].update(layers=[5, 8]),
        "coverage_hole - target.replicas[0]; double_owner - steps x9; double_owner s4 steps",
    ),
    (
        spare_plan,
        lambda data: data["target"]["replicas"][0]["stages"][1].update(layers=[3, 8]),
        "coverage_hole - steps x10; double_owner - target.replicas[0]; over_memory s2 steps[1].bytes",
    ),
    (
        spare_plan,
        lambda data: data["target"]["replicas"][0]["stages"][1].update(layers=[4, 7]),
        "coverage_hole - target.replicas[0]; double_owner - steps x11; double_owner s4 steps",
    ),
    (
        spare_plan,
        lambda data: data["target"]["replicas"][0]["stages"][1].update(gpus=["i9/0"]),
        "coverage_hole - steps x39; coverage_hole - target.replicas[0]; double_owner - steps; "
        "double_owner s11 steps[10]; double_owner s2 steps[1]; double_owner s4 steps[3]; "
        "double_owner s6 steps[5]; missing_step - steps; over_memory - snapshot.world.gpus[i9/0]",
    ),
    (
        spare_plan,
        lambda data: data["target"]["replicas"][0]["stages"][1].update(gpus=["i1/0"]),
        "coverage_hole - steps; coverage_hole - target.replicas[0]; coverage_hole s13 steps[12] x38; "
        "double_owner - steps; double_owner s11 steps[10]; double_owner s2 steps[1]; "
        "double_owner s4 steps[3]; double_owner s6 steps[5]; missing_step - steps",
    ),
    (
        spare_plan,
        lambda data: data["target"]["replicas"][0]["stages"][1].update(gpus=["i0/0"]),
        "coverage_hole - steps x39; double_owner - steps; double_owner - target.replicas[0]; "
        "double_owner s11 steps[10]; double_owner s2 steps[1]; double_owner s3 steps; "
        "double_owner s4 steps[3]; double_owner s6 steps[5]; over_memory s1 steps[0].bytes",
    ),
    (spare_plan, lambda data: data["target"]["replicas"][0]["stages"].reverse(), "corrupt - target.replicas[0]"),
    (
        spare_plan,
        lambda data: data["target"]["replicas"][0].update(generation=5),
        "double_owner s1 steps[0]; double_owner s11 steps[10]; double_owner s2 steps[1]; "
        "double_owner s6 steps[5]; stale - target.replicas[0]",
    ),
    (
        spare_plan,
        lambda data: data["target"]["replicas"][0].update(id="r3.1"),
        "coverage_hole - routes[0] x2; double_owner - requests[0]; double_owner - requests[1]; "
        "double_owner - steps; double_owner - target.replicas[0]; double_owner s1 steps[0]; "
        "double_owner s11 steps[10]; double_owner s12 steps[11]; double_owner s13 steps[12]; "
        "double_owner s2 steps[1]; double_owner s5 steps[4]; double_owner s6 steps[5]; "
        "double_owner s7 steps[6]; not_a_holder s3 steps[2]; not_a_holder s4 steps[3]; "
        "not_a_holder s8 steps[7]; not_a_holder s9 steps[8]",
    ),
    (loss_plan, lambda data: data["target"]["replicas"][0].update(kv_blocks=41), "double_owner - target.replicas[0]"),
    (
        loss_plan,
        lambda data: data["target"]["replicas"].append({**data["target"]["replicas"][0], "id": "r4", "generation": 4}),
        "double_owner - target.replicas[1] x2; missing_step - steps x4",
    ),
    (spare_plan, lambda data: step(data, "s5")["slices"][0].update(start=-1), "corrupt s5 steps[4].slices"),
    (spare_plan, lambda data: step(data, "s5")["slices"][0].update(start=64), "corrupt s5 steps[4].slices"),
    (spare_plan, lambda data: step(data, "s5")["slices"][0].update(stop=65), "corrupt s5 steps[4].slices"),
    (
        spare_plan,
        lambda data: step(data, "s5")["slices"][0].update(stop=63),
        "corrupt s5 steps[4].bytes; coverage_hole - steps",
    ),
    (spare_plan, lambda data: step(data, "s5")["slices"][0].update(dim=1), "corrupt s5 steps[4].slices"),
    (spare_plan, lambda data: step(data, "s5")["slices"][0].update(parameter="nothing"), "corrupt s5 steps[4].slices"),
    (
        spare_plan,
        lambda data: (loaded(data), step(data, "s5")["slices"][0].update(start=-1)),
        "corrupt s5 steps[4].slices",
    ),
    (
        spare_plan,
        lambda data: (loaded(data), step(data, "s5")["slices"][0].update(start=64)),
        "corrupt s5 steps[4].slices",
    ),
    (
        spare_plan,
        lambda data: (loaded(data), step(data, "s5")["slices"][0].update(stop=65)),
        "corrupt s5 steps[4].slices",
    ),
    (
        spare_plan,
        lambda data: (loaded(data), step(data, "s5")["slices"][0].update(stop=63)),
        "corrupt s5 steps[4].bytes; coverage_hole - steps",
    ),
    (
        spare_plan,
        lambda data: (loaded(data), step(data, "s5")["slices"][0].update(dim=1)),
        "corrupt s5 steps[4].slices",
    ),
    (
        spare_plan,
        lambda data: (loaded(data), step(data, "s5")["slices"][0].update(parameter="nothing")),
        "corrupt s5 steps[4].slices",
    ),
    (spare_plan, lambda data: step(data, "s13")["slices"][0].update(start=-1), "corrupt s13 steps[12].slices"),
    (spare_plan, lambda data: step(data, "s13")["slices"][0].update(start=64), "corrupt s13 steps[12].slices"),
    (spare_plan, lambda data: step(data, "s13")["slices"][0].update(stop=65), "corrupt s13 steps[12].slices"),
    (spare_plan, lambda data: step(data, "s13")["slices"][0].update(stop=63), ""),
    (spare_plan, lambda data: step(data, "s13")["slices"][0].update(dim=1), "corrupt s13 steps[12].slices"),
    (
        spare_plan,
        lambda data: step(data, "s13")["slices"][0].update(parameter="nothing"),
        "corrupt s13 steps[12].slices",
    ),
    (spare_plan, lambda data: step(data, "s5").update(bytes=1116415), "corrupt s5 steps[4].bytes"),
    (spare_plan, lambda data: (loaded(data), step(data, "s5").update(bytes=1116417)), "corrupt s5 steps[4].bytes"),
    (
        spare_plan,
        lambda data: step(data, "s5")["slices"].append(piece(UP, 0, 1)),
        "corrupt s5 steps[4].bytes; double_owner - steps; not_a_holder s5 steps[4]",
    ),
    (
        spare_plan,
        lambda data: (loaded(data), step(data, "s5")["slices"].append(piece(UP, 0, 1))),
        "corrupt s5 steps[4].bytes; double_owner - steps",
    ),
    (
        spare_plan,
        lambda data: (loaded(data), step(data, "s5").update(workers=["i1/0"])),
        "coverage_hole - steps x38; double_owner - steps",
    ),
    (spare_plan, lambda data: also(data, "s5"), "double_owner - steps x38"),
    (spare_plan, lambda data: also(data, "s5", slices=[], bytes=0), ""),
    (spare_plan, lambda data: step(data, "s5").update(source="i2/0"), "not_a_holder s5 steps[4]"),
    (spare_plan, lambda data: step(data, "s5").update(source="i0/0"), "not_a_holder s5 steps[4]"),
    (
        spare_plan,
        lambda data: also(data, "s5", slices=[piece(UP, 0, 256)], bytes=65536, source="i0/0", destination="i0/0"),
        "double_owner - steps; double_owner new steps[5]; wrong_order new steps[5]",
    ),
    (spare_plan, lambda data: step(data, "s12").update(slices=[piece(UP, 0, 256)]), "coverage_hole s12 steps[11]"),
    (
        spare_plan,
        lambda data: step(data, "s12").update(slices=[piece("model.layers.4.mlp.up_proj.weight", 0, 1)]),
        "not_a_holder s12 steps[11]",
    ),
    (
        spare_plan,
        lambda data: step(data, "s13")["slices"].append(piece("model.norm.weight", 63, 64)),
        "duplicate_step s13 steps[12]",
    ),
    (spare_plan, lambda data: also(data, "s13", kv=False), "duplicate_step new steps[13] x38"),
    (spare_plan, lambda data: step(data, "s13").update(depends_on=["s11"]), ""),
    (
        spare_plan,
        lambda data: (step(data, "s13").update(depends_on=["s2"]), step(data, "s5").update(depends_on=["s2", "s13"])),
        "not_a_holder s5 steps[12]; not_a_holder s9 steps[12]; wrong_order s13 steps[12] x3",
    ),
    (
        spare_plan,
        lambda data: (step(data, "s13").update(depends_on=["s2"]), step(data, "s4").update(depends_on=["s2", "s13"])),
        "not_a_holder s4 steps[12]; not_a_holder s9 steps[12]; wrong_order s13 steps[12] x3",
    ),
    (
        restart_plan,
        lambda data: step(data, "s3").update(depends_on=["s2"], slices=[]),
        "double_owner - steps x37; over_memory s7 snapshot.world.gpus[i0/0]",
    ),
    (
        restart_plan,
        lambda data: [one.update(depends_on=["s2"]) for one in steps(data, "reserve")],
        "coverage_hole s3 steps[2] x37; double_owner - steps x37; over_memory s7 snapshot.world.gpus[i0/0]",
    ),
    (
        restart_plan,
        lambda data: [one.update(slices=one["slices"][1:]) for one in steps(data, "load_weights")],
        "corrupt s7 steps[6].bytes; corrupt s8 steps[7].bytes; coverage_hole - steps x2",
    ),
    (
        restart_plan,
        lambda data: also(data, "s3", slices=[piece(UP, 255, 256)], kv=False),
        "duplicate_step new steps[3]",
    ),
    (layered_plan, lambda data: step(data, "s17").update(depends_on=["s2"]), "wrong_order s17 steps[16]"),
    (
        layered_plan,
        lambda data: (
            step(data, "s17").update(depends_on=["s2"]),
            step(data, "s16").update(depends_on=["s3", "s13", "s17"]),
        ),
        "not_a_holder s16 steps[16]",
    ),
    (
        layered_plan,
        lambda data: step(data, "s17").update(keep_blocks=3),
        "wrong_order s10 steps[16]; wrong_order s12 steps[16]; wrong_order s6 steps[16]; wrong_order s8 steps[16]",
    ),
    (
        layered_plan,
        lambda data: step(data, "s37").update(keep_blocks=3),
        "wrong_order s11 steps[36]; wrong_order s5 steps[36]; wrong_order s7 steps[36]; wrong_order s9 steps[36]",
    ),
    (layered_plan, lambda data: step(data, "s13").update(keep_blocks=3), "wrong_order s13 steps[12]"),
    (
        shrinking_plan,
        lambda data: [one.update(keep_blocks=2) for one in steps(data, "release") if one["keep_blocks"] is not None],
        "coverage_hole s3 steps[2]; coverage_hole s4 steps[3]",
    ),
    (
        shrinking_plan,
        lambda data: [one.update(keep_blocks=3) for one in steps(data, "release") if one["keep_blocks"] is not None],
        "",
    ),
    (
        shrinking_plan,
        lambda data: [one.update(keep_blocks=7) for one in steps(data, "release") if one["keep_blocks"] is not None],
        "over_memory s5 snapshot.world.gpus[i0/0]; over_memory s6 snapshot.world.gpus[i1/0]",
    ),
    (
        shrinking_plan,
        lambda data: (
            [one.update(keep_blocks=3) for one in steps(data, "release") if one["keep_blocks"] is not None],
            data["snapshot"]["requests"][0]["choices"][0].update(kv_tokens=48),
        ),
        "",
    ),
    (
        shrinking_plan,
        lambda data: (
            [one.update(keep_blocks=3) for one in steps(data, "release") if one["keep_blocks"] is not None],
            data["snapshot"]["requests"][0]["choices"][0].update(kv_tokens=49),
        ),
        "coverage_hole s3 steps[2]; coverage_hole s4 steps[3]",
    ),
    (
        shrinking_plan,
        lambda data: step(data, "s3").update(kv=True),
        "duplicate_step s15 steps[14]; not_a_holder s11 steps[2]; not_a_holder s13 steps[2]; "
        "not_a_holder s7 steps[2]; not_a_holder s9 steps[2]; wrong_order s3 steps[2]",
    ),
    (
        shrinking_plan,
        lambda data: step(data, "s8").update(depends_on=["s5"]),
        "wrong_order s12 steps[3]; wrong_order s8 steps[3]",
    ),
    (
        shrinking_plan,
        lambda data: step(data, "s13").update(depends_on=["s1", "s2"]),
        "wrong_order s13 steps[12]; wrong_order s13 steps[2]; wrong_order s15 steps[14]",
    ),
    (
        shrinking_plan,
        lambda data: step(data, "s5").update(depends_on=["s2"]),
        "over_memory s5 snapshot.world.gpus[i0/0]",
    ),
    (shrinking_plan, lambda data: step(data, "s15").update(depends_on=["s2"]), "wrong_order s15 steps[14] x4"),
    (
        spare_plan,
        lambda data: [step(data, name)["route"].update(layers=[3, 8]) for name in ("s4", "s9")],
        "double_owner s4 steps; not_a_holder s4 steps[3]; not_a_holder s9 steps[8]",
    ),
    (
        spare_plan,
        lambda data: [step(data, name)["route"].update(layers=[4, 9]) for name in ("s4", "s9")],
        "double_owner s4 steps; not_a_holder s4 steps[3]; not_a_holder s9 steps[8]",
    ),
    (
        spare_plan,
        lambda data: [step(data, name)["route"].update(layers=[5, 8]) for name in ("s4", "s9")],
        "coverage_hole - steps",
    ),
    (
        spare_plan,
        lambda data: [step(data, name)["route"].update(layers=[4, 7]) for name in ("s4", "s9")],
        "coverage_hole - steps",
    ),
    (
        spare_plan,
        lambda data: [step(data, name)["route"].update(layers=[5, 5]) for name in ("s4", "s9")],
        "coverage_hole - steps; not_a_holder s4 steps[3]; not_a_holder s9 steps[8]",
    ),
    (
        spare_plan,
        lambda data: [step(data, name)["route"].update(kv_heads=[-1, 4]) for name in ("s4", "s9")],
        "double_owner s4 steps; not_a_holder s4 steps[3]; not_a_holder s9 steps[8]",
    ),
    (
        spare_plan,
        lambda data: [step(data, name)["route"].update(kv_heads=[1, 4]) for name in ("s4", "s9")],
        "coverage_hole - steps",
    ),
    (
        spare_plan,
        lambda data: [step(data, name)["route"].update(kv_heads=[0, 3]) for name in ("s4", "s9")],
        "coverage_hole - steps",
    ),
    (
        spare_plan,
        lambda data: [step(data, name)["route"].update(kv_heads=[0, 5]) for name in ("s4", "s9")],
        "double_owner s4 steps; not_a_holder s4 steps[3]; not_a_holder s9 steps[8]",
    ),
    (
        spare_plan,
        lambda data: [step(data, name)["route"].update(kv_heads=[2, 2]) for name in ("s4", "s9")],
        "coverage_hole - steps; not_a_holder s4 steps[3]; not_a_holder s9 steps[8]",
    ),
    (
        spare_plan,
        lambda data: [step(data, name)["route"].update(to_replica="r9") for name in ("s4", "s9")],
        "coverage_hole - steps; double_owner s4 routes",
    ),
    (
        spare_plan,
        lambda data: [step(data, name)["route"].update(from_replica="r9") for name in ("s4", "s9")],
        "coverage_hole - steps; double_owner s4 routes; not_a_holder s4 steps[3]; not_a_holder s9 steps[8]",
    ),
    (
        spare_plan,
        lambda data: step(data, "s9")["route"].update(layers=[5, 8]),
        "missing_step s4 steps; missing_step s9 steps",
    ),
    (
        spare_plan,
        lambda data: step(data, "s9").update(source="i0/0"),
        "missing_step s4 steps; missing_step s9 steps; not_a_holder s9 steps[8]",
    ),
    (
        spare_plan,
        lambda data: [step(data, name).update(destination="i0/0") for name in ("s4", "s9")],
        "coverage_hole - steps; double_owner s4 steps; wrong_order s4 steps[3]",
    ),
    (spare_plan, lambda data: (also(data, "s4"), step(data, "s9")), "double_owner - steps"),
    (
        layered_plan,
        lambda data: [step(data, name)["route"].update(kv_heads=[0, 3]) for name in ("s6", "s10")],
        "double_owner s6 steps",
    ),
    (
        layered_plan,
        lambda data: [step(data, name)["route"].update(kv_heads=[1, 4]) for name in ("s7", "s11")],
        "double_owner s7 steps",
    ),
    (
        layered_plan,
        lambda data: [step(data, name)["route"].update(kv_heads=[0, 1]) for name in ("s6", "s10")],
        "coverage_hole - steps",
    ),
    (
        layered_plan,
        lambda data: [step(data, name)["route"].update(layers=[4, 7]) for name in ("s6", "s10")],
        "coverage_hole - steps",
    ),
    (
        layered_plan,
        lambda data: [step(data, name)["route"].update(layers=[5, 8]) for name in ("s6", "s10")],
        "coverage_hole - steps",
    ),
    (layered_plan, lambda data: also(data, "s6"), "double_owner - steps"),
    (split_plan, lambda data: stretched(data, (0, 4), (0, 5)), "double_owner s3 steps; double_owner s4 steps"),
    (split_plan, lambda data: stretched(data, (4, 8), (3, 8)), "double_owner s5 steps; double_owner s6 steps"),
    (split_plan, lambda data: stretched(data, (0, 4), (0, 3)), "coverage_hole - steps"),
    (split_plan, lambda data: stretched(data, (4, 8), (5, 8)), "coverage_hole - steps"),
    (spare_plan, lambda data: data["requests"][0].update(to_replica="r3.1"), "double_owner - requests[0]"),
    (
        spare_plan,
        lambda data: data["requests"][0].update(to_replica=None),
        "corrupt - complete; double_owner - requests[0]",
    ),
    (
        spare_plan,
        lambda data: [one.update(to_replica=None) for one in data["requests"]],
        "corrupt - complete; double_owner - requests[0]; double_owner - requests[1]",
    ),
    (
        spare_plan,
        lambda data: (data["requests"][0].update(to_replica=None), data.update(complete=False)),
        "double_owner - requests[0]",
    ),
    (spare_plan, lambda data: data.update(complete=False), "corrupt - complete"),
    (spare_plan, lambda data: data["requests"].pop(0), "coverage_hole - requests"),
    (spare_plan, lambda data: data["requests"].append(data["requests"][1]), "double_owner - requests[2]"),
    (spare_plan, lambda data: data["requests"][0].update(action="finish"), ""),
    (spare_plan, lambda data: data["requests"][0].update(action="recompute"), "missing_step - steps"),
    (spare_plan, lambda data: data["snapshot"]["requests"][0].update(state="finished"), "double_owner - requests[0]"),
    (spare_plan, lambda data: data["snapshot"]["requests"][0].update(replica=None), "double_owner - requests[0]"),
    (spare_plan, lambda data: (data["snapshot"]["requests"][0].update(replica=None), data["requests"].pop(0)), ""),
    (spare_plan, lambda data: (data["snapshot"]["requests"][0].update(state="failed"), data["requests"].pop(0)), ""),
    (
        spare_plan,
        lambda data: data["snapshot"]["requests"].append({**data["snapshot"]["requests"][0], "request": "more"}),
        "coverage_hole - requests",
    ),
    (
        spare_plan,
        lambda data: data["snapshot"]["requests"].append(
            {**data["snapshot"]["requests"][0], "request": "more", "state": "cancelled"}
        ),
        "",
    ),
    (spare_plan, lambda data: data["routes"].append(data["routes"][0]), "double_owner - routes"),
    (
        spare_plan,
        lambda data: data["routes"].clear(),
        "coverage_hole - routes; double_owner - requests[0]; double_owner - requests[1]; double_owner s3 routes",
    ),
    (
        spare_plan,
        lambda data: data["routes"][0].update(from_replica="r4"),
        "coverage_hole - routes; coverage_hole - routes[0]; double_owner - requests[0]; "
        "double_owner - requests[1]; double_owner s3 routes",
    ),
    (
        spare_plan,
        lambda data: data["routes"][0].update(to_replica="r3.1"),
        "coverage_hole - routes[0]; double_owner - requests[0]; double_owner - requests[1]; double_owner s3 routes",
    ),
    (
        spare_plan,
        lambda data: data["routes"].append({"from_replica": "r4", "to_replica": "r9"}),
        "coverage_hole - routes[1] x2",
    ),
    (spare_plan, lambda data: data.update(fallback=["tokens_only"]), ""),
    (spare_plan, lambda data: (data.update(fallback=["tokens_only"]), kv_left_out(data)), "missing_step - routes[0]"),
    (
        spare_plan,
        lambda data: (
            data.update(fallback=["tokens_only"]),
            kv_left_out(data),
            [one.update(action="finish") for one in data["requests"]],
        ),
        "",
    ),
    (
        spare_plan,
        lambda data: (kv_left_out(data), [one.update(action="finish") for one in data["requests"]]),
        "missing_step - routes[0]",
    ),
    (
        loss_plan,
        lambda data: data["requests"][0].update(action="move"),
        "double_owner s2 steps[1].requests; missing_step - routes[0]; not_a_holder - requests[0]",
    ),
    (loss_plan, lambda data: data["requests"][0].update(action="finish"), "double_owner s2 steps[1].requests"),
    (loss_plan, lambda data: data["requests"][0].update(to_replica="r3.1"), "double_owner - requests[0]"),
    (
        loss_plan,
        lambda data: data["target"]["replicas"].clear(),
        "corrupt - complete; coverage_hole - requests x2; coverage_hole - routes[0]; missing_step - steps x3",
    ),
    (
        spare_plan,
        lambda data: (drop(data, step(data, "s1")), instance(data, "i0")["gpus"][0].update(memory_bytes=1443840)),
        "missing_step - steps",
    ),
    (
        restart_plan,
        lambda data: also(data, "s3", workers=["i2/0"], kv=False, slices=[], bytes=0),
        "double_owner new steps[3]",
    ),
    (restart_plan, lambda data: also(data, "s3", workers=["i2/0"], slices=[], bytes=0), "double_owner new steps[3]"),
    (spare_plan, lambda data: instance(data, "i0")["gpus"][0].update(memory_bytes=1443840), ""),
    (
        spare_plan,
        lambda data: instance(data, "i0")["gpus"][0].update(memory_bytes=1443839),
        "over_memory - snapshot.world.gpus[i0/0]",
    ),
    (
        spare_plan,
        lambda data: (step(data, "s1").update(bytes=100), instance(data, "i0")["gpus"][0].update(memory_bytes=1443940)),
        "",
    ),
    (
        spare_plan,
        lambda data: (step(data, "s1").update(bytes=100), instance(data, "i0")["gpus"][0].update(memory_bytes=1443939)),
        "over_memory - snapshot.world.gpus[i0/0]",
    ),
    (
        spare_plan,
        lambda data: (
            data["target"]["replicas"][0].update(kv_blocks=19),
            step(data, "s1").update(bytes=311296),
            instance(data, "i0")["gpus"][0].update(memory_bytes=1755136),
        ),
        "",
    ),
    (
        spare_plan,
        lambda data: (
            data["target"]["replicas"][0].update(kv_blocks=19),
            step(data, "s1").update(bytes=311296),
            instance(data, "i0")["gpus"][0].update(memory_bytes=1755135),
        ),
        "over_memory - snapshot.world.gpus[i0/0]",
    ),
    (
        spare_plan,
        lambda data: (data["target"]["replicas"][0].update(kv_blocks=19), step(data, "s1").update(bytes=311295)),
        "over_memory s1 steps[0].bytes",
    ),
    (
        spare_plan,
        lambda data: (
            data["spec"].update(linear="prepacked"),
            instance(data, "i0")["gpus"][0].update(memory_bytes=2000000),
        ),
        "over_memory - snapshot.world.gpus[i0/0]",
    ),
    (spare_plan, lambda data: at_deadline(data, 0.01247), ""),
    (spare_plan, lambda data: at_deadline(data, 0.01246), "past_deadline - steps x2"),
    (spare_plan, lambda data: at_deadline(data, 0.0114), "past_deadline - steps x2; past_deadline s9 steps[8]"),
    (spare_plan, lambda data: at_deadline(data, 0.0112), "past_deadline - steps x2; past_deadline s9 steps[8]"),
    (
        spare_plan,
        lambda data: at_deadline(data, 0.0111),
        "past_deadline - steps x2; past_deadline s5 steps[4]; past_deadline s9 steps[8]",
    ),
    (spare_plan, lambda data: (at_deadline(data, 0.01247), step(data, "s4").update(bytes=0)), ""),
    (
        spare_plan,
        lambda data: (at_deadline(data, 0.01247), step(data, "s5").update(bytes=0)),
        "corrupt s5 steps[4].bytes",
    ),
    (spare_plan, lambda data: (at_deadline(data, 0.01247), step(data, "s9").update(bytes=0)), ""),
    (
        spare_plan,
        lambda data: (at_deadline(data, 0.01246), step(data, "s4").update(bytes=0)),
        "past_deadline - steps x2",
    ),
    (
        spare_plan,
        lambda data: (at_deadline(data, 0.01246), step(data, "s5").update(bytes=0)),
        "corrupt s5 steps[4].bytes; past_deadline - steps x2",
    ),
    (
        spare_plan,
        lambda data: (at_deadline(data, 0.01246), step(data, "s9").update(bytes=0)),
        "past_deadline - steps x2",
    ),
    (
        spare_plan,
        lambda data: (at_deadline(data, 0.02), step(data, "s4").update(bytes=1500000)),
        "past_deadline - steps x2",
    ),
    (
        spare_plan,
        lambda data: (at_deadline(data, 0.02), step(data, "s5").update(bytes=1500000)),
        "corrupt s5 steps[4].bytes",
    ),
    (
        spare_plan,
        lambda data: (at_deadline(data, 0.02), step(data, "s9").update(bytes=1500000)),
        "past_deadline - steps x2; past_deadline s9 steps[8]",
    ),
    (spare_plan, lambda data: (at_deadline(data, 1.0004), step(data, "s7").update(not_before_s=1.0, latest_s=1.0)), ""),
    (
        spare_plan,
        lambda data: (at_deadline(data, 1.0002), step(data, "s7").update(not_before_s=1.0, latest_s=1.0)),
        "past_deadline s9 steps[8]",
    ),
    (
        spare_plan,
        lambda data: (
            at_deadline(data, 1.0004),
            loaded(data),
            data["spec"]["profile"].update(storage_bytes_per_s=1116416.0),
        ),
        "",
    ),
    (
        spare_plan,
        lambda data: (
            at_deadline(data, 1.0002),
            loaded(data),
            data["spec"]["profile"].update(storage_bytes_per_s=1116416.0),
        ),
        "past_deadline s9 steps[8]",
    ),
    (spare_plan, lambda data: step(data, "s7").update(latest_s=30.000001), ""),
    (spare_plan, lambda data: step(data, "s7").update(latest_s=30.000003), "past_deadline s7 steps[6]"),
    (spare_plan, lambda data: step(data, "s7").update(latest_s=None), "past_deadline s7 steps[6]"),
    (spare_plan, lambda data: step(data, "s7").update(latest_s=5.0, not_before_s=5.000001), ""),
    (spare_plan, lambda data: step(data, "s7").update(latest_s=5.0, not_before_s=5.00001), "past_deadline s7 steps[6]"),
    (spare_plan, lambda data: (at_deadline(data, None), step(data, "s7").update(latest_s=None)), ""),
    (
        spare_plan,
        lambda data: (
            at_deadline(data, 20.0),
            instance(data, "i0").update(state="doomed", remaining_s=10.0),
            step(data, "s7").update(latest_s=9.0),
        ),
        "coverage_hole - target.replicas[0]",
    ),
    (
        spare_plan,
        lambda data: (
            at_deadline(data, 20.0),
            instance(data, "i0").update(state="doomed", remaining_s=10.0),
            step(data, "s7").update(latest_s=15.0),
        ),
        "coverage_hole - target.replicas[0]; past_deadline s7 steps[6]",
    ),
    (
        spare_plan,
        lambda data: (
            instance(data, "i0").update(state="doomed", remaining_s=0.0),
            step(data, "s7").update(latest_s=0.0),
        ),
        "coverage_hole - target.replicas[0]; past_deadline s8 steps[7]",
    ),
    (
        spare_plan,
        lambda data: (at_deadline(data, 0.01247), step(data, "s4").update(depends_on=["s2", "s99"])),
        "missing_step s4 steps[3].depends_on",
    ),
    (split_plan, lambda data: narrowed(data, 0), ""),
    (split_plan, lambda data: narrowed(data, 1), "over_memory s1 steps[0].bytes; over_memory s2 steps[1].bytes"),
    (
        layered_plan,
        lambda data: data["spec"].update(linear="prepacked"),
        "over_memory s36 snapshot.world.gpus[i0/0]; over_memory s36 snapshot.world.gpus[i1/0]",
    ),
]
