"""Plans that are spoiled at an edge, and all that the checker says of each: what `test_check_edges.py` goes through.

Steps are called by what they do (`named`). Findings read `CODE step path`, with `xN` behind those that are there N
times and no number where the path is that of the step; no words at all is a plan that passes.
"""

from __future__ import annotations

import json
from collections.abc import Callable

from spotserve.core.canonical import canonical_json
from spotserve.core.plan import Plan, Trigger
from spotserve.solvers.planner import make_plan
from tests.core.test_check import drop, loss_plan, restart_plan
from tests.core.test_check_rules import Raw, layered_plan, spare_plan, steps
from tests.planning_worlds import MIB, notice, running_problem, tiny_spec

UP = "model.layers.0.mlp.up_proj.weight"
Case = tuple[Callable[[Raw], object], str]


def named(plan: Plan) -> Raw:
    """A plan as plain data, its steps called by what they do, so that their order in the planner's file means nothing.

    `reserve:i0/0`, `copy_kv:i1/0>i2/0`, `commit`; with the layer of what is copied or freed where two are called so.
    """
    data: Raw = json.loads(canonical_json(plan))
    plain = [_name(one) for one in data["steps"]]
    called = {
        one["id"]: name if plain.count(name) == 1 else f"{name}@{_part(one)}"
        for one, name in zip(data["steps"], plain, strict=True)
    }
    assert len(set(called.values())) == len(data["steps"])
    for one in data["steps"]:
        one.update(id=called[one["id"]], depends_on=[called[name] for name in one["depends_on"]])
    return data


def _name(one: Raw) -> str:
    if "source" in one:
        return f"{one['kind']}:{one['source']}>{one['destination']}"
    if one["kind"] in ("reserve", "load_weights"):
        return f"{one['kind']}:{one['workers'][0]}"
    if one["kind"] == "release":
        what = "release" if one["kv"] else "free" if one["keep_blocks"] is None else "shrink"
        return f"{what}:{one['workers'][0]}"
    return str(one["kind"])


def _part(one: Raw) -> str:
    """The layer of the first slice, or what it is called outside of the layers."""
    if not one["slices"]:
        return "none"
    words = one["slices"][0]["parameter"].split(".")
    return next((word for word in words if word.isdigit()), words[-2])


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
    copy = step(data, "copy_weights:i1/0>i2/0")
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
    step(data, "quiesce")["latest_s"] = 0.0


def narrowed(data: Raw, missing_bytes: int) -> None:
    """Pools of as many blocks as before, in other rectangles, and reserves that fall short by some bytes."""
    fewer = data["target"]["replicas"][0]["kv_blocks"] - 40
    data["target"]["replicas"][0]["kv_blocks"] = 40
    for one in steps(data, "reserve"):
        one["bytes"] -= fewer * 16 * 1024 + missing_bytes


ORDERS: dict[Callable[[], Plan], list[Case]] = {
    spare_plan: [
        (
            lambda data: (
                data.update(steps=[], applyable=False, routes=[], requests=[]),
                data["snapshot"].update(requests=[]),
                data["snapshot"]["world"].update(replicas=[]),
            ),
            "coverage_hole - steps x38; missing_step - steps",
        ),
        (lambda data: without(data, "copy_kv:i0/0>i0/0", "reserve:i0/0"), "wrong_order copy_kv:i0/0>i0/0"),
        (lambda data: without(data, "copy_kv:i1/0>i2/0", "reserve:i2/0"), "wrong_order copy_kv:i1/0>i2/0"),
        (lambda data: without(data, "copy_weights:i1/0>i2/0", "reserve:i2/0"), "wrong_order copy_weights:i1/0>i2/0"),
        (lambda data: without(data, "join_group", "reserve:i0/0"), "wrong_order join_group"),
        (lambda data: without(data, "join_group", "reserve:i2/0"), "wrong_order join_group"),
        (lambda data: without(data, "quiesce", "copy_kv:i0/0>i0/0"), "wrong_order quiesce"),
        (lambda data: without(data, "quiesce", "copy_kv:i1/0>i2/0"), "wrong_order quiesce"),
        (
            lambda data: without(data, "quiesce", "copy_weights:i1/0>i2/0"),
            "wrong_order activate; wrong_order copy_weights:i1/0>i2/0; wrong_order quiesce; wrong_order release:i1/0",
        ),
        (
            lambda data: without(data, "quiesce", "join_group"),
            "wrong_order activate; wrong_order join_group; wrong_order quiesce",
        ),
        (lambda data: without(data, "copy_kv_delta:i0/0>i0/0", "copy_kv:i0/0>i0/0"), ""),
        (lambda data: without(data, "copy_kv_delta:i0/0>i0/0", "quiesce"), "wrong_order copy_kv_delta:i0/0>i0/0"),
        (
            lambda data: without(data, "commit", "copy_kv_delta:i0/0>i0/0"),
            "wrong_order activate; wrong_order copy_kv_delta:i0/0>i0/0; wrong_order release:i0/0",
        ),
        (lambda data: without(data, "activate", "commit"), "wrong_order activate x7"),
        (loaded, ""),
        (
            lambda data: (loaded(data), without(data, "copy_weights:i1/0>i2/0", "reserve:i2/0")),
            "wrong_order copy_weights:i1/0>i2/0",
        ),
        (
            lambda data: (loaded(data), without(data, "quiesce", "copy_weights:i1/0>i2/0")),
            "wrong_order activate; wrong_order copy_weights:i1/0>i2/0; wrong_order quiesce",
        ),
        (
            lambda data: step(data, "copy_kv:i1/0>i2/0").update(depends_on=["copy_kv:i1/0>i2/0"]),
            "cycle copy_kv:i1/0>i2/0 steps; wrong_order release:i0/0 x2; wrong_order release:i1/0 x3",
        ),
        (lambda data: step(data, "release:i1/0").update(id="release:i0/0"), "duplicate_step release:i0/0 steps"),
        (
            lambda data: step(data, "release:i1/0").update(depends_on=["commit", "activate", "s99"]),
            "missing_step release:i1/0.depends_on",
        ),
        (lambda data: also(data, "reserve:i0/0"), "duplicate_step new"),
        (lambda data: also(data, "join_group"), "duplicate_step new"),
        (lambda data: also(data, "quiesce"), "duplicate_step new"),
        (lambda data: also(data, "copy_kv_delta:i0/0>i0/0"), "duplicate_step new"),
        (lambda data: also(data, "commit"), "duplicate_step new; wrong_order new"),
        (lambda data: also(data, "activate"), "duplicate_step new"),
        (lambda data: also(data, "release:i0/0"), "duplicate_step new"),
        (lambda data: also(data, "release:i0/0", kv=False, bytes=0), ""),
        (lambda data: drop(data, step(data, "reserve:i0/0")), "missing_step - steps"),
        (lambda data: drop(data, step(data, "reserve:i2/0")), "missing_step - steps"),
        (
            lambda data: drop(data, step(data, "copy_kv:i0/0>i0/0")),
            "coverage_hole - steps; missing_step copy_kv_delta:i0/0>i0/0 steps",
        ),
        (lambda data: drop(data, step(data, "copy_weights:i1/0>i2/0")), "coverage_hole - steps x38"),
        (lambda data: drop(data, step(data, "join_group")), "missing_step - steps"),
        (lambda data: drop(data, step(data, "quiesce")), "missing_step - steps"),
        (lambda data: drop(data, step(data, "copy_kv_delta:i0/0>i0/0")), "missing_step copy_kv:i0/0>i0/0 steps"),
        (lambda data: drop(data, step(data, "copy_kv_delta:i1/0>i2/0")), "missing_step copy_kv:i1/0>i2/0 steps"),
        (lambda data: drop(data, step(data, "commit")), "missing_step - steps"),
        (lambda data: drop(data, step(data, "activate")), "missing_step - steps"),
        (lambda data: drop(data, step(data, "release:i0/0")), "missing_step - steps"),
        (lambda data: drop(data, step(data, "release:i1/0")), "missing_step - steps"),
        (
            lambda data: data.update(steps=[], applyable=False),
            "coverage_hole - steps x38; missing_step - routes[0]; missing_step - steps",
        ),
        (lambda data: step(data, "reserve:i0/0").update(replica="r3.1"), "double_owner reserve:i0/0"),
        (
            lambda data: step(data, "copy_weights:i1/0>i2/0").update(replica="r3.1"),
            "double_owner copy_weights:i1/0>i2/0",
        ),
        (lambda data: step(data, "join_group").update(replica="r3.1"), "double_owner join_group; missing_step - steps"),
        (lambda data: step(data, "activate").update(replica="r3.1"), "double_owner activate; missing_step - steps"),
        (
            lambda data: (loaded(data), step(data, "copy_weights:i1/0>i2/0").update(replica="r3.1")),
            "double_owner copy_weights:i1/0>i2/0",
        ),
        (lambda data: step(data, "quiesce").update(replica="r4"), "double_owner quiesce; missing_step - steps"),
        (lambda data: step(data, "release:i0/0").update(replica="r4"), "double_owner release:i0/0"),
        (lambda data: step(data, "quiesce").update(workers=["i1/0"]), "double_owner quiesce"),
        (
            lambda data: step(data, "release:i0/0").update(workers=["i2/0"]),
            "double_owner release:i0/0; missing_step - steps",
        ),
        (lambda data: step(data, "reserve:i0/0").update(generation=5), "double_owner reserve:i0/0"),
        (lambda data: step(data, "join_group").update(generation=5), "double_owner join_group"),
        (lambda data: step(data, "activate").update(generation=5), "double_owner activate"),
        (lambda data: step(data, "release:i0/0").update(generation=5), "double_owner release:i0/0"),
        (lambda data: step(data, "reserve:i0/0").update(stage=2), "double_owner reserve:i0/0"),
        (lambda data: step(data, "reserve:i0/0").update(stage=-1), "double_owner reserve:i0/0"),
        (lambda data: step(data, "reserve:i0/0").update(rank=1), "double_owner reserve:i0/0"),
        (lambda data: step(data, "reserve:i0/0").update(rank=-1), "double_owner reserve:i0/0"),
        (lambda data: step(data, "reserve:i2/0").update(stage=2), "double_owner reserve:i2/0"),
        (lambda data: step(data, "reserve:i2/0").update(stage=-1), "double_owner reserve:i2/0"),
        (lambda data: step(data, "reserve:i2/0").update(rank=1), "double_owner reserve:i2/0"),
        (lambda data: step(data, "reserve:i2/0").update(rank=-1), "double_owner reserve:i2/0"),
        (lambda data: step(data, "reserve:i0/0").update(stage=1), "double_owner reserve:i0/0"),
        (lambda data: step(data, "reserve:i2/0").update(stage=0), "double_owner reserve:i2/0"),
        (lambda data: step(data, "join_group")["workers"].reverse(), "double_owner join_group"),
        (lambda data: step(data, "activate")["workers"].reverse(), "double_owner activate"),
        (
            lambda data: step(data, "copy_kv:i1/0>i2/0").update(source="i9/0"),
            "missing_step copy_kv:i1/0>i2/0 steps; missing_step copy_kv_delta:i1/0>i2/0 steps; "
            "not_a_holder copy_kv:i1/0>i2/0 x2",
        ),
        (
            lambda data: step(data, "copy_kv:i1/0>i2/0").update(destination="i9/0"),
            "coverage_hole - steps; double_owner copy_kv:i1/0>i2/0; missing_step copy_kv:i1/0>i2/0 steps; "
            "missing_step copy_kv_delta:i1/0>i2/0 steps; not_a_holder copy_kv:i1/0>i2/0",
        ),
        (
            lambda data: step(data, "copy_weights:i1/0>i2/0").update(source="i9/0"),
            "not_a_holder copy_weights:i1/0>i2/0 x2",
        ),
        (
            lambda data: step(data, "copy_weights:i1/0>i2/0").update(destination="i9/0"),
            "coverage_hole - steps x38; double_owner - steps; not_a_holder copy_weights:i1/0>i2/0",
        ),
        (
            lambda data: step(data, "copy_kv_delta:i1/0>i2/0").update(source="i9/0"),
            "missing_step copy_kv:i1/0>i2/0 steps; missing_step copy_kv_delta:i1/0>i2/0 steps; "
            "not_a_holder copy_kv_delta:i1/0>i2/0 x2",
        ),
        (
            lambda data: step(data, "copy_kv_delta:i1/0>i2/0").update(destination="i9/0"),
            "missing_step copy_kv:i1/0>i2/0 steps; missing_step copy_kv_delta:i1/0>i2/0 steps; "
            "not_a_holder copy_kv_delta:i1/0>i2/0",
        ),
        (
            lambda data: step(data, "reserve:i0/0").update(workers=["i9/0"]),
            "double_owner reserve:i0/0; missing_step - steps; not_a_holder reserve:i0/0",
        ),
        (lambda data: step(data, "quiesce").update(workers=["i9/0"]), "double_owner quiesce; not_a_holder quiesce"),
        (
            lambda data: step(data, "release:i0/0").update(workers=["i9/0"]),
            "double_owner release:i0/0; missing_step - steps; not_a_holder release:i0/0",
        ),
    ],
    layered_plan: [
        (lambda data: without(data, "commit", "quiesce"), "wrong_order quiesce"),
        (lambda data: without(data, "reserve:i0/0", "commit"), "wrong_order reserve:i0/0"),
        (lambda data: without(data, "join_group", "reserve:i0/0"), "wrong_order join_group"),
        (lambda data: without(data, "activate", "join_group"), "wrong_order activate"),
        (lambda data: without(data, "activate", "copy_kv:i0/0>i0/0"), ""),
        (lambda data: step(data, "copy_kv:i0/0>i0/0").update(depends_on=["reserve:i0/0"]), ""),
        (
            lambda data: step(data, "copy_kv_delta:i0/0>i0/0").update(depends_on=["quiesce"]),
            "wrong_order copy_kv_delta:i0/0>i0/0 x2; wrong_order release:i0/0",
        ),
        (
            lambda data: step(data, "copy_weights:i0/0>i1/0@embed_tokens").update(depends_on=[]),
            "wrong_order copy_weights:i0/0>i1/0@embed_tokens x2",
        ),
        (lambda data: step(data, "activate").update(replica="r3.1"), "double_owner activate; missing_step - steps"),
    ],
    restart_plan: [
        (lambda data: without(data, "recompute", "activate"), "wrong_order recompute"),
        (
            lambda data: [one.update(depends_on=["quiesce"]) for one in steps(data, "release")],
            "wrong_order load_weights:i0/0; wrong_order release:i0/0; wrong_order release:i1/0; "
            "wrong_order reserve:i0/0",
        ),
    ],
    loss_plan: [
        (lambda data: without(data, "recompute", "commit"), "wrong_order recompute"),
        (lambda data: without(data, "release:i0/0", "commit"), "wrong_order release:i0/0"),
        (lambda data: also(data, "recompute"), "double_owner new.requests x2"),
        (lambda data: also(data, "recompute", requests=[]), ""),
        (lambda data: drop(data, step(data, "commit")), "missing_step - steps"),
        (lambda data: drop(data, step(data, "recompute")), "missing_step - steps x2"),
        (lambda data: drop(data, step(data, "release:i0/0")), "missing_step - steps"),
        (lambda data: data.update(steps=[], applyable=False), "missing_step - steps"),
        (lambda data: step(data, "recompute")["requests"].append(f"{0:032x}"), "double_owner recompute.requests"),
        (lambda data: step(data, "recompute")["requests"].append(f"{100:032x}"), "double_owner recompute.requests"),
        (lambda data: step(data, "release:i0/0").update(kv=False), "missing_step - steps"),
    ],
}
