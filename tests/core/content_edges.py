"""Plans whose content, KV, requests, memory or deadlines are spoiled at an edge, and all that the checker says of each.

As `plan_edges.ORDERS`; what `test_check_edges.py` goes through.
"""

from __future__ import annotations

from collections.abc import Callable

from spotserve.core.plan import Plan
from tests.core.plan_edges import (
    UP,
    Case,
    also,
    at_deadline,
    kv_left_out,
    loaded,
    narrowed,
    piece,
    split_plan,
    step,
    stretched,
)
from tests.core.test_check import drop, loss_plan, restart_plan, shrinking_plan
from tests.core.test_check_rules import instance, layered_plan, spare_plan, steps

CONTENTS: dict[Callable[[], Plan], list[Case]] = {
    spare_plan: [
        (
            lambda data: step(data, "release:i1/0")["slices"].__setitem__(
                slice(0, 1),
                [{**step(data, "release:i1/0")["slices"][0], **part} for part in ({"stop": 1}, {"start": 1})],
            ),
            "",
        ),
        (
            lambda data: (
                at_deadline(data, 0.5),
                step(data, "copy_kv:i1/0>i2/0").update(depends_on=["copy_kv:i1/0>i2/0"]),
            ),
            "cycle copy_kv:i1/0>i2/0 steps; wrong_order release:i0/0 x2; wrong_order release:i1/0 x3",
        ),
        (
            lambda data: (
                data.update(fallback=["tokens_only", "all_kv"]),
                kv_left_out(data),
                [one.update(action="finish") for one in data["requests"]],
            ),
            "",
        ),
        (
            lambda data: (
                also(data, "copy_weights:i1/0>i2/0", source="i2/0", destination="i0/0", depends_on=["reserve:i0/0"]),
                step(data, "new")["depends_on"].append("copy_weights:i1/0>i2/0"),
            ),
            "double_owner - steps x38",
        ),
        (
            lambda data: also(
                data, "copy_weights:i1/0>i2/0", source="i2/0", destination="i0/0", depends_on=["reserve:i0/0"]
            ),
            "double_owner - steps x38; not_a_holder new",
        ),
        (
            lambda data: data["target"]["replicas"][0]["stages"][1].update(layers=[5, 8]),
            "coverage_hole - target.replicas[0]; double_owner - steps x9; double_owner copy_kv:i1/0>i2/0 steps",
        ),
        (
            lambda data: data["target"]["replicas"][0]["stages"][1].update(layers=[3, 8]),
            "coverage_hole - steps x10; double_owner - target.replicas[0]; over_memory reserve:i2/0.bytes",
        ),
        (
            lambda data: data["target"]["replicas"][0]["stages"][1].update(layers=[4, 7]),
            "coverage_hole - target.replicas[0]; double_owner - steps x11; double_owner copy_kv:i1/0>i2/0 steps",
        ),
        (
            lambda data: data["target"]["replicas"][0]["stages"][1].update(gpus=["i9/0"]),
            "coverage_hole - steps x39; coverage_hole - target.replicas[0]; double_owner - steps; "
            "double_owner activate; double_owner copy_kv:i1/0>i2/0; double_owner join_group; "
            "double_owner reserve:i2/0; missing_step - steps; over_memory - snapshot.world.gpus[i9/0]",
        ),
        (
            lambda data: data["target"]["replicas"][0]["stages"][1].update(gpus=["i1/0"]),
            "coverage_hole - steps; coverage_hole - target.replicas[0]; coverage_hole release:i1/0 x38; "
            "double_owner - steps; double_owner activate; double_owner copy_kv:i1/0>i2/0; "
            "double_owner join_group; double_owner reserve:i2/0; missing_step - steps",
        ),
        (
            lambda data: data["target"]["replicas"][0]["stages"][1].update(gpus=["i0/0"]),
            "coverage_hole - steps x39; double_owner - steps; double_owner - target.replicas[0]; "
            "double_owner activate; double_owner copy_kv:i0/0>i0/0 steps; double_owner copy_kv:i1/0>i2/0; "
            "double_owner join_group; double_owner reserve:i2/0; over_memory reserve:i0/0.bytes",
        ),
        (lambda data: data["target"]["replicas"][0]["stages"].reverse(), "corrupt - target.replicas[0]"),
        (
            lambda data: data["target"]["replicas"][0].update(generation=5),
            "double_owner activate; double_owner join_group; double_owner reserve:i0/0; "
            "double_owner reserve:i2/0; stale - target.replicas[0]",
        ),
        (
            lambda data: data["target"]["replicas"][0].update(id="r3.1"),
            "coverage_hole - routes[0] x2; double_owner - requests[0]; double_owner - requests[1]; "
            "double_owner - steps; double_owner - target.replicas[0]; double_owner activate; "
            "double_owner copy_weights:i1/0>i2/0; double_owner join_group; double_owner quiesce; "
            "double_owner release:i0/0; double_owner release:i1/0; double_owner reserve:i0/0; "
            "double_owner reserve:i2/0; not_a_holder copy_kv:i0/0>i0/0; not_a_holder copy_kv:i1/0>i2/0; "
            "not_a_holder copy_kv_delta:i0/0>i0/0; not_a_holder copy_kv_delta:i1/0>i2/0",
        ),
        (
            lambda data: step(data, "copy_weights:i1/0>i2/0")["slices"][0].update(start=-1),
            "corrupt copy_weights:i1/0>i2/0.slices",
        ),
        (
            lambda data: step(data, "copy_weights:i1/0>i2/0")["slices"][0].update(start=64),
            "corrupt copy_weights:i1/0>i2/0.slices",
        ),
        (
            lambda data: step(data, "copy_weights:i1/0>i2/0")["slices"][0].update(stop=65),
            "corrupt copy_weights:i1/0>i2/0.slices",
        ),
        (
            lambda data: step(data, "copy_weights:i1/0>i2/0")["slices"][0].update(stop=63),
            "corrupt copy_weights:i1/0>i2/0.bytes; coverage_hole - steps",
        ),
        (
            lambda data: step(data, "copy_weights:i1/0>i2/0")["slices"][0].update(dim=1),
            "corrupt copy_weights:i1/0>i2/0.slices",
        ),
        (
            lambda data: step(data, "copy_weights:i1/0>i2/0")["slices"][0].update(parameter="nothing"),
            "corrupt copy_weights:i1/0>i2/0.slices",
        ),
        (
            lambda data: (loaded(data), step(data, "copy_weights:i1/0>i2/0")["slices"][0].update(start=-1)),
            "corrupt copy_weights:i1/0>i2/0.slices",
        ),
        (
            lambda data: (loaded(data), step(data, "copy_weights:i1/0>i2/0")["slices"][0].update(start=64)),
            "corrupt copy_weights:i1/0>i2/0.slices",
        ),
        (
            lambda data: (loaded(data), step(data, "copy_weights:i1/0>i2/0")["slices"][0].update(stop=65)),
            "corrupt copy_weights:i1/0>i2/0.slices",
        ),
        (
            lambda data: (loaded(data), step(data, "copy_weights:i1/0>i2/0")["slices"][0].update(stop=63)),
            "corrupt copy_weights:i1/0>i2/0.bytes; coverage_hole - steps",
        ),
        (
            lambda data: (loaded(data), step(data, "copy_weights:i1/0>i2/0")["slices"][0].update(dim=1)),
            "corrupt copy_weights:i1/0>i2/0.slices",
        ),
        (
            lambda data: (loaded(data), step(data, "copy_weights:i1/0>i2/0")["slices"][0].update(parameter="nothing")),
            "corrupt copy_weights:i1/0>i2/0.slices",
        ),
        (lambda data: step(data, "release:i1/0")["slices"][0].update(start=-1), "corrupt release:i1/0.slices"),
        (lambda data: step(data, "release:i1/0")["slices"][0].update(start=64), "corrupt release:i1/0.slices"),
        (lambda data: step(data, "release:i1/0")["slices"][0].update(stop=65), "corrupt release:i1/0.slices"),
        (lambda data: step(data, "release:i1/0")["slices"][0].update(stop=63), ""),
        (lambda data: step(data, "release:i1/0")["slices"][0].update(dim=1), "corrupt release:i1/0.slices"),
        (
            lambda data: step(data, "release:i1/0")["slices"][0].update(parameter="nothing"),
            "corrupt release:i1/0.slices",
        ),
        (
            lambda data: step(data, "copy_weights:i1/0>i2/0").update(bytes=1116415),
            "corrupt copy_weights:i1/0>i2/0.bytes",
        ),
        (
            lambda data: (loaded(data), step(data, "copy_weights:i1/0>i2/0").update(bytes=1116417)),
            "corrupt copy_weights:i1/0>i2/0.bytes",
        ),
        (
            lambda data: step(data, "copy_weights:i1/0>i2/0")["slices"].append(piece(UP, 0, 1)),
            "corrupt copy_weights:i1/0>i2/0.bytes; double_owner - steps; not_a_holder copy_weights:i1/0>i2/0",
        ),
        (
            lambda data: (loaded(data), step(data, "copy_weights:i1/0>i2/0")["slices"].append(piece(UP, 0, 1))),
            "corrupt copy_weights:i1/0>i2/0.bytes; double_owner - steps",
        ),
        (
            lambda data: (loaded(data), step(data, "copy_weights:i1/0>i2/0").update(workers=["i1/0"])),
            "coverage_hole - steps x38; double_owner - steps",
        ),
        (lambda data: also(data, "copy_weights:i1/0>i2/0"), "double_owner - steps x38"),
        (lambda data: also(data, "copy_weights:i1/0>i2/0", slices=[], bytes=0), ""),
        (
            lambda data: step(data, "copy_weights:i1/0>i2/0").update(source="i2/0"),
            "not_a_holder copy_weights:i1/0>i2/0",
        ),
        (
            lambda data: step(data, "copy_weights:i1/0>i2/0").update(source="i0/0"),
            "not_a_holder copy_weights:i1/0>i2/0",
        ),
        (
            lambda data: also(
                data,
                "copy_weights:i1/0>i2/0",
                slices=[piece(UP, 0, 256)],
                bytes=65536,
                source="i0/0",
                destination="i0/0",
            ),
            "double_owner - steps; double_owner new; wrong_order new",
        ),
        (lambda data: step(data, "release:i0/0").update(slices=[piece(UP, 0, 256)]), "coverage_hole release:i0/0"),
        (
            lambda data: step(data, "release:i0/0").update(slices=[piece("model.layers.4.mlp.up_proj.weight", 0, 1)]),
            "not_a_holder release:i0/0",
        ),
        (
            lambda data: step(data, "release:i1/0")["slices"].append(piece("model.norm.weight", 63, 64)),
            "duplicate_step release:i1/0",
        ),
        (lambda data: also(data, "release:i1/0", kv=False), "duplicate_step new x38"),
        (lambda data: step(data, "release:i1/0").update(depends_on=["activate"]), ""),
        (
            lambda data: (
                step(data, "release:i1/0").update(depends_on=["reserve:i2/0"]),
                step(data, "copy_weights:i1/0>i2/0").update(depends_on=["reserve:i2/0", "release:i1/0"]),
            ),
            "not_a_holder copy_kv_delta:i1/0>i2/0 at release:i1/0; "
            "not_a_holder copy_weights:i1/0>i2/0 at release:i1/0; "
            "wrong_order release:i1/0 x3",
        ),
        (
            lambda data: (
                step(data, "release:i1/0").update(depends_on=["reserve:i2/0"]),
                step(data, "copy_kv:i1/0>i2/0").update(depends_on=["reserve:i2/0", "release:i1/0"]),
            ),
            "not_a_holder copy_kv:i1/0>i2/0 at release:i1/0; "
            "not_a_holder copy_kv_delta:i1/0>i2/0 at release:i1/0; "
            "wrong_order release:i1/0 x3",
        ),
        (
            lambda data: [
                step(data, name)["route"].update(layers=[3, 8])
                for name in ("copy_kv:i1/0>i2/0", "copy_kv_delta:i1/0>i2/0")
            ],
            "double_owner copy_kv:i1/0>i2/0 steps; not_a_holder copy_kv:i1/0>i2/0; "
            "not_a_holder copy_kv_delta:i1/0>i2/0",
        ),
        (
            lambda data: [
                step(data, name)["route"].update(layers=[4, 9])
                for name in ("copy_kv:i1/0>i2/0", "copy_kv_delta:i1/0>i2/0")
            ],
            "double_owner copy_kv:i1/0>i2/0 steps; not_a_holder copy_kv:i1/0>i2/0; "
            "not_a_holder copy_kv_delta:i1/0>i2/0",
        ),
        (
            lambda data: [
                step(data, name)["route"].update(layers=[5, 8])
                for name in ("copy_kv:i1/0>i2/0", "copy_kv_delta:i1/0>i2/0")
            ],
            "coverage_hole - steps",
        ),
        (
            lambda data: [
                step(data, name)["route"].update(layers=[4, 7])
                for name in ("copy_kv:i1/0>i2/0", "copy_kv_delta:i1/0>i2/0")
            ],
            "coverage_hole - steps",
        ),
        (
            lambda data: [
                step(data, name)["route"].update(layers=[5, 5])
                for name in ("copy_kv:i1/0>i2/0", "copy_kv_delta:i1/0>i2/0")
            ],
            "coverage_hole - steps; not_a_holder copy_kv:i1/0>i2/0; not_a_holder copy_kv_delta:i1/0>i2/0",
        ),
        (
            lambda data: [
                step(data, name)["route"].update(kv_heads=[-1, 4])
                for name in ("copy_kv:i1/0>i2/0", "copy_kv_delta:i1/0>i2/0")
            ],
            "double_owner copy_kv:i1/0>i2/0 steps; not_a_holder copy_kv:i1/0>i2/0; "
            "not_a_holder copy_kv_delta:i1/0>i2/0",
        ),
        (
            lambda data: [
                step(data, name)["route"].update(kv_heads=[1, 4])
                for name in ("copy_kv:i1/0>i2/0", "copy_kv_delta:i1/0>i2/0")
            ],
            "coverage_hole - steps",
        ),
        (
            lambda data: [
                step(data, name)["route"].update(kv_heads=[0, 3])
                for name in ("copy_kv:i1/0>i2/0", "copy_kv_delta:i1/0>i2/0")
            ],
            "coverage_hole - steps",
        ),
        (
            lambda data: [
                step(data, name)["route"].update(kv_heads=[0, 5])
                for name in ("copy_kv:i1/0>i2/0", "copy_kv_delta:i1/0>i2/0")
            ],
            "double_owner copy_kv:i1/0>i2/0 steps; not_a_holder copy_kv:i1/0>i2/0; "
            "not_a_holder copy_kv_delta:i1/0>i2/0",
        ),
        (
            lambda data: [
                step(data, name)["route"].update(kv_heads=[2, 2])
                for name in ("copy_kv:i1/0>i2/0", "copy_kv_delta:i1/0>i2/0")
            ],
            "coverage_hole - steps; not_a_holder copy_kv:i1/0>i2/0; not_a_holder copy_kv_delta:i1/0>i2/0",
        ),
        (
            lambda data: [
                step(data, name)["route"].update(to_replica="r9")
                for name in ("copy_kv:i1/0>i2/0", "copy_kv_delta:i1/0>i2/0")
            ],
            "coverage_hole - steps; double_owner copy_kv:i1/0>i2/0 routes",
        ),
        (
            lambda data: [
                step(data, name)["route"].update(from_replica="r9")
                for name in ("copy_kv:i1/0>i2/0", "copy_kv_delta:i1/0>i2/0")
            ],
            "coverage_hole - steps; double_owner copy_kv:i1/0>i2/0 routes; not_a_holder copy_kv:i1/0>i2/0; "
            "not_a_holder copy_kv_delta:i1/0>i2/0",
        ),
        (
            lambda data: step(data, "copy_kv_delta:i1/0>i2/0")["route"].update(layers=[5, 8]),
            "missing_step copy_kv:i1/0>i2/0 steps; missing_step copy_kv_delta:i1/0>i2/0 steps",
        ),
        (
            lambda data: step(data, "copy_kv_delta:i1/0>i2/0").update(source="i0/0"),
            "missing_step copy_kv:i1/0>i2/0 steps; missing_step copy_kv_delta:i1/0>i2/0 steps; "
            "not_a_holder copy_kv_delta:i1/0>i2/0",
        ),
        (
            lambda data: [
                step(data, name).update(destination="i0/0") for name in ("copy_kv:i1/0>i2/0", "copy_kv_delta:i1/0>i2/0")
            ],
            "coverage_hole - steps; double_owner copy_kv:i1/0>i2/0 steps; wrong_order copy_kv:i1/0>i2/0",
        ),
        (lambda data: (also(data, "copy_kv:i1/0>i2/0"), step(data, "copy_kv_delta:i1/0>i2/0")), "double_owner - steps"),
        (lambda data: data["requests"][0].update(to_replica="r3.1"), "double_owner - requests[0]"),
        (lambda data: data["requests"][0].update(to_replica=None), "corrupt - complete; double_owner - requests[0]"),
        (
            lambda data: [one.update(to_replica=None) for one in data["requests"]],
            "corrupt - complete; double_owner - requests[0]; double_owner - requests[1]",
        ),
        (
            lambda data: (data["requests"][0].update(to_replica=None), data.update(complete=False)),
            "double_owner - requests[0]",
        ),
        (lambda data: data.update(complete=False), "corrupt - complete"),
        (lambda data: data["requests"].pop(0), "coverage_hole - requests"),
        (lambda data: data["requests"].append(data["requests"][1]), "double_owner - requests[2]"),
        (lambda data: data["requests"][0].update(action="finish"), ""),
        (lambda data: data["requests"][0].update(action="recompute"), "missing_step - steps"),
        (lambda data: data["snapshot"]["requests"][0].update(state="finished"), "double_owner - requests[0]"),
        (lambda data: data["snapshot"]["requests"][0].update(replica=None), "double_owner - requests[0]"),
        (lambda data: (data["snapshot"]["requests"][0].update(replica=None), data["requests"].pop(0)), ""),
        (lambda data: (data["snapshot"]["requests"][0].update(state="failed"), data["requests"].pop(0)), ""),
        (
            lambda data: data["snapshot"]["requests"].append({**data["snapshot"]["requests"][0], "request": "more"}),
            "coverage_hole - requests",
        ),
        (
            lambda data: data["snapshot"]["requests"].append(
                {**data["snapshot"]["requests"][0], "request": "more", "state": "cancelled"}
            ),
            "",
        ),
        (lambda data: data["routes"].append(data["routes"][0]), "double_owner - routes"),
        (
            lambda data: data["routes"].clear(),
            "coverage_hole - routes; double_owner - requests[0]; double_owner - requests[1]; "
            "double_owner copy_kv:i0/0>i0/0 routes",
        ),
        (
            lambda data: data["routes"][0].update(from_replica="r4"),
            "coverage_hole - routes; coverage_hole - routes[0]; double_owner - requests[0]; "
            "double_owner - requests[1]; double_owner copy_kv:i0/0>i0/0 routes",
        ),
        (
            lambda data: data["routes"][0].update(to_replica="r3.1"),
            "coverage_hole - routes[0]; double_owner - requests[0]; double_owner - requests[1]; "
            "double_owner copy_kv:i0/0>i0/0 routes",
        ),
        (
            lambda data: data["routes"].append({"from_replica": "r4", "to_replica": "r9"}),
            "coverage_hole - routes[1] x2",
        ),
        (lambda data: data.update(fallback=["tokens_only"]), ""),
        (lambda data: (data.update(fallback=["tokens_only"]), kv_left_out(data)), "missing_step - routes[0]"),
        (
            lambda data: (
                data.update(fallback=["tokens_only"]),
                kv_left_out(data),
                [one.update(action="finish") for one in data["requests"]],
            ),
            "",
        ),
        (
            lambda data: (kv_left_out(data), [one.update(action="finish") for one in data["requests"]]),
            "missing_step - routes[0]",
        ),
        (
            lambda data: (
                drop(data, step(data, "reserve:i0/0")),
                instance(data, "i0")["gpus"][0].update(memory_bytes=1443840),
            ),
            "missing_step - steps",
        ),
        (lambda data: instance(data, "i0")["gpus"][0].update(memory_bytes=1443840), ""),
        (
            lambda data: instance(data, "i0")["gpus"][0].update(memory_bytes=1443839),
            "over_memory - snapshot.world.gpus[i0/0]",
        ),
        (
            lambda data: (
                step(data, "reserve:i0/0").update(bytes=100),
                instance(data, "i0")["gpus"][0].update(memory_bytes=1443940),
            ),
            "",
        ),
        (
            lambda data: (
                step(data, "reserve:i0/0").update(bytes=100),
                instance(data, "i0")["gpus"][0].update(memory_bytes=1443939),
            ),
            "over_memory - snapshot.world.gpus[i0/0]",
        ),
        (
            lambda data: (
                data["target"]["replicas"][0].update(kv_blocks=19),
                step(data, "reserve:i0/0").update(bytes=311296),
                instance(data, "i0")["gpus"][0].update(memory_bytes=1755136),
            ),
            "",
        ),
        (
            lambda data: (
                data["target"]["replicas"][0].update(kv_blocks=19),
                step(data, "reserve:i0/0").update(bytes=311296),
                instance(data, "i0")["gpus"][0].update(memory_bytes=1755135),
            ),
            "over_memory - snapshot.world.gpus[i0/0]",
        ),
        (
            lambda data: (
                data["target"]["replicas"][0].update(kv_blocks=19),
                step(data, "reserve:i0/0").update(bytes=311295),
            ),
            "over_memory reserve:i0/0.bytes",
        ),
        (
            lambda data: (
                data["spec"].update(linear="prepacked"),
                instance(data, "i0")["gpus"][0].update(memory_bytes=2000000),
            ),
            "over_memory - snapshot.world.gpus[i0/0]",
        ),
        (lambda data: at_deadline(data, 0.01247), ""),
        (lambda data: at_deadline(data, 0.01246), "past_deadline - steps x2"),
        (lambda data: at_deadline(data, 0.0114), "past_deadline - steps x2; past_deadline copy_kv_delta:i1/0>i2/0"),
        (lambda data: at_deadline(data, 0.0112), "past_deadline - steps x2; past_deadline copy_kv_delta:i1/0>i2/0"),
        (
            lambda data: at_deadline(data, 0.0111),
            "past_deadline - steps x2; past_deadline copy_kv_delta:i1/0>i2/0; past_deadline copy_weights:i1/0>i2/0",
        ),
        (lambda data: (at_deadline(data, 0.01247), step(data, "copy_kv:i1/0>i2/0").update(bytes=0)), ""),
        (
            lambda data: (at_deadline(data, 0.01247), step(data, "copy_weights:i1/0>i2/0").update(bytes=0)),
            "corrupt copy_weights:i1/0>i2/0.bytes",
        ),
        (lambda data: (at_deadline(data, 0.01247), step(data, "copy_kv_delta:i1/0>i2/0").update(bytes=0)), ""),
        (
            lambda data: (at_deadline(data, 0.01246), step(data, "copy_kv:i1/0>i2/0").update(bytes=0)),
            "past_deadline - steps x2",
        ),
        (
            lambda data: (at_deadline(data, 0.01246), step(data, "copy_weights:i1/0>i2/0").update(bytes=0)),
            "corrupt copy_weights:i1/0>i2/0.bytes; past_deadline - steps x2",
        ),
        (
            lambda data: (at_deadline(data, 0.01246), step(data, "copy_kv_delta:i1/0>i2/0").update(bytes=0)),
            "past_deadline - steps x2",
        ),
        (
            lambda data: (at_deadline(data, 0.02), step(data, "copy_kv:i1/0>i2/0").update(bytes=1500000)),
            "past_deadline - steps x2",
        ),
        (
            lambda data: (at_deadline(data, 0.02), step(data, "copy_weights:i1/0>i2/0").update(bytes=1500000)),
            "corrupt copy_weights:i1/0>i2/0.bytes",
        ),
        (
            lambda data: (at_deadline(data, 0.02), step(data, "copy_kv_delta:i1/0>i2/0").update(bytes=1500000)),
            "past_deadline - steps x2; past_deadline copy_kv_delta:i1/0>i2/0",
        ),
        (lambda data: (at_deadline(data, 1.0004), step(data, "quiesce").update(not_before_s=1.0, latest_s=1.0)), ""),
        (
            lambda data: (at_deadline(data, 1.0002), step(data, "quiesce").update(not_before_s=1.0, latest_s=1.0)),
            "past_deadline copy_kv_delta:i1/0>i2/0",
        ),
        (
            lambda data: (
                at_deadline(data, 1.0004),
                loaded(data),
                data["spec"]["profile"].update(storage_bytes_per_s=1116416.0),
            ),
            "",
        ),
        (
            lambda data: (
                at_deadline(data, 1.0002),
                loaded(data),
                data["spec"]["profile"].update(storage_bytes_per_s=1116416.0),
            ),
            "past_deadline copy_kv_delta:i1/0>i2/0",
        ),
        (lambda data: step(data, "quiesce").update(latest_s=30.000001), ""),
        (lambda data: step(data, "quiesce").update(latest_s=30.000003), "past_deadline quiesce"),
        (lambda data: step(data, "quiesce").update(latest_s=None), "past_deadline quiesce"),
        (lambda data: step(data, "quiesce").update(latest_s=5.0, not_before_s=5.000001), ""),
        (lambda data: step(data, "quiesce").update(latest_s=5.0, not_before_s=5.00001), "past_deadline quiesce"),
        (lambda data: (at_deadline(data, None), step(data, "quiesce").update(latest_s=None)), ""),
        (
            lambda data: (
                at_deadline(data, 20.0),
                instance(data, "i0").update(state="doomed", remaining_s=10.0),
                step(data, "quiesce").update(latest_s=9.0),
            ),
            "coverage_hole - target.replicas[0]",
        ),
        (
            lambda data: (
                at_deadline(data, 20.0),
                instance(data, "i0").update(state="doomed", remaining_s=10.0),
                step(data, "quiesce").update(latest_s=15.0),
            ),
            "coverage_hole - target.replicas[0]; past_deadline quiesce",
        ),
        (
            lambda data: (
                instance(data, "i0").update(state="doomed", remaining_s=0.0),
                step(data, "quiesce").update(latest_s=0.0),
            ),
            "coverage_hole - target.replicas[0]; past_deadline copy_kv_delta:i0/0>i0/0",
        ),
        (
            lambda data: (
                at_deadline(data, 0.01247),
                step(data, "copy_kv:i1/0>i2/0").update(depends_on=["reserve:i2/0", "s99"]),
            ),
            "missing_step copy_kv:i1/0>i2/0.depends_on",
        ),
    ],
    loss_plan: [
        (lambda data: data["target"]["replicas"][0].update(kv_blocks=41), "double_owner - target.replicas[0]"),
        (
            lambda data: data["target"]["replicas"].append(
                {**data["target"]["replicas"][0], "id": "r4", "generation": 4}
            ),
            "double_owner - target.replicas[1] x2; missing_step - steps x4",
        ),
        (
            lambda data: data["requests"][0].update(action="move"),
            "double_owner recompute.requests; missing_step - routes[0]; not_a_holder - requests[0]",
        ),
        (lambda data: data["requests"][0].update(action="finish"), "double_owner recompute.requests"),
        (lambda data: data["requests"][0].update(to_replica="r3.1"), "double_owner - requests[0]"),
        (
            lambda data: data["target"]["replicas"].clear(),
            "corrupt - complete; coverage_hole - requests x2; coverage_hole - routes[0]; missing_step - steps x3",
        ),
    ],
    restart_plan: [
        (
            lambda data: step(data, "release:i0/0").update(depends_on=["commit"], slices=[]),
            "double_owner - steps x37; over_memory load_weights:i0/0 snapshot.world.gpus[i0/0]",
        ),
        (
            lambda data: [one.update(depends_on=["commit"]) for one in steps(data, "reserve")],
            "coverage_hole release:i0/0 x37; double_owner - steps x37; "
            "over_memory load_weights:i0/0 snapshot.world.gpus[i0/0]",
        ),
        (
            lambda data: [one.update(slices=one["slices"][1:]) for one in steps(data, "load_weights")],
            "corrupt load_weights:i0/0.bytes; corrupt load_weights:i2/0.bytes; coverage_hole - steps x2",
        ),
        (lambda data: also(data, "release:i0/0", slices=[piece(UP, 255, 256)], kv=False), "duplicate_step new"),
        (lambda data: also(data, "release:i0/0", workers=["i2/0"], kv=False, slices=[], bytes=0), "double_owner new"),
        (lambda data: also(data, "release:i0/0", workers=["i2/0"], slices=[], bytes=0), "double_owner new"),
    ],
    layered_plan: [
        (lambda data: step(data, "free:i1/0@4").update(depends_on=["commit"]), "wrong_order free:i1/0@4"),
        (
            lambda data: (
                step(data, "free:i1/0@4").update(depends_on=["commit"]),
                step(data, "copy_weights:i1/0>i0/0@4").update(
                    depends_on=["reserve:i0/0", "release:i0/0", "free:i1/0@4"]
                ),
            ),
            "not_a_holder copy_weights:i1/0>i0/0@4 at free:i1/0@4",
        ),
        (
            lambda data: step(data, "free:i1/0@4").update(keep_blocks=3),
            "wrong_order copy_kv:i1/0>i0/0 at free:i1/0@4; "
            "wrong_order copy_kv:i1/0>i1/0 at free:i1/0@4; "
            "wrong_order copy_kv_delta:i1/0>i0/0 at free:i1/0@4; "
            "wrong_order copy_kv_delta:i1/0>i1/0 at free:i1/0@4",
        ),
        (
            lambda data: step(data, "free:i0/0@none").update(keep_blocks=3),
            "wrong_order copy_kv:i0/0>i0/0 at free:i0/0@none; "
            "wrong_order copy_kv:i0/0>i1/0 at free:i0/0@none; "
            "wrong_order copy_kv_delta:i0/0>i0/0 at free:i0/0@none; "
            "wrong_order copy_kv_delta:i0/0>i1/0 at free:i0/0@none",
        ),
        (lambda data: step(data, "release:i0/0").update(keep_blocks=3), "wrong_order release:i0/0"),
        (
            lambda data: [
                step(data, name)["route"].update(kv_heads=[0, 3])
                for name in ("copy_kv:i1/0>i0/0", "copy_kv_delta:i1/0>i0/0")
            ],
            "double_owner copy_kv:i1/0>i0/0 steps",
        ),
        (
            lambda data: [
                step(data, name)["route"].update(kv_heads=[1, 4])
                for name in ("copy_kv:i0/0>i1/0", "copy_kv_delta:i0/0>i1/0")
            ],
            "double_owner copy_kv:i0/0>i1/0 steps",
        ),
        (
            lambda data: [
                step(data, name)["route"].update(kv_heads=[0, 1])
                for name in ("copy_kv:i1/0>i0/0", "copy_kv_delta:i1/0>i0/0")
            ],
            "coverage_hole - steps",
        ),
        (
            lambda data: [
                step(data, name)["route"].update(layers=[4, 7])
                for name in ("copy_kv:i1/0>i0/0", "copy_kv_delta:i1/0>i0/0")
            ],
            "coverage_hole - steps",
        ),
        (
            lambda data: [
                step(data, name)["route"].update(layers=[5, 8])
                for name in ("copy_kv:i1/0>i0/0", "copy_kv_delta:i1/0>i0/0")
            ],
            "coverage_hole - steps",
        ),
        (lambda data: also(data, "copy_kv:i1/0>i0/0"), "double_owner - steps"),
        (
            lambda data: data["spec"].update(linear="prepacked"),
            "over_memory activate snapshot.world.gpus[i0/0]; over_memory activate snapshot.world.gpus[i1/0]",
        ),
    ],
    shrinking_plan: [
        (
            lambda data: [
                one.update(keep_blocks=2) for one in steps(data, "release") if one["keep_blocks"] is not None
            ],
            "coverage_hole shrink:i0/0; coverage_hole shrink:i1/0",
        ),
        (
            lambda data: [
                one.update(keep_blocks=3) for one in steps(data, "release") if one["keep_blocks"] is not None
            ],
            "",
        ),
        (
            lambda data: [
                one.update(keep_blocks=7) for one in steps(data, "release") if one["keep_blocks"] is not None
            ],
            "over_memory reserve:i0/0 snapshot.world.gpus[i0/0]; over_memory reserve:i1/0 snapshot.world.gpus[i1/0]",
        ),
        (
            lambda data: (
                [one.update(keep_blocks=3) for one in steps(data, "release") if one["keep_blocks"] is not None],
                data["snapshot"]["requests"][0]["choices"][0].update(kv_tokens=48),
            ),
            "",
        ),
        (
            lambda data: (
                [one.update(keep_blocks=3) for one in steps(data, "release") if one["keep_blocks"] is not None],
                data["snapshot"]["requests"][0]["choices"][0].update(kv_tokens=49),
            ),
            "coverage_hole shrink:i0/0; coverage_hole shrink:i1/0",
        ),
        (
            lambda data: step(data, "shrink:i0/0").update(kv=True),
            "duplicate_step release:i0/0; "
            "not_a_holder copy_kv:i0/0>i0/0 at shrink:i0/0; "
            "not_a_holder copy_kv:i0/0>i1/0 at shrink:i0/0; "
            "not_a_holder copy_kv_delta:i0/0>i0/0 at shrink:i0/0; "
            "not_a_holder copy_kv_delta:i0/0>i1/0 at shrink:i0/0; "
            "wrong_order shrink:i0/0",
        ),
        (
            lambda data: step(data, "copy_kv:i1/0>i0/0").update(depends_on=["reserve:i0/0"]),
            "wrong_order copy_kv:i1/0>i0/0 at shrink:i1/0; wrong_order copy_kv_delta:i1/0>i0/0 at shrink:i1/0",
        ),
        (
            lambda data: step(data, "copy_kv_delta:i0/0>i1/0").update(depends_on=["quiesce", "commit"]),
            "wrong_order copy_kv_delta:i0/0>i1/0; "
            "wrong_order copy_kv_delta:i0/0>i1/0 at shrink:i0/0; "
            "wrong_order release:i0/0",
        ),
        (
            lambda data: step(data, "reserve:i0/0").update(depends_on=["commit"]),
            "over_memory reserve:i0/0 snapshot.world.gpus[i0/0]",
        ),
        (lambda data: step(data, "release:i0/0").update(depends_on=["commit"]), "wrong_order release:i0/0 x4"),
    ],
    split_plan: [
        (
            lambda data: stretched(data, (0, 4), (0, 5)),
            "double_owner copy_kv:i0/0>i0/0 steps; double_owner copy_kv:i1/0>i0/0 steps",
        ),
        (
            lambda data: stretched(data, (4, 8), (3, 8)),
            "double_owner copy_kv:i0/0>i1/0 steps; double_owner copy_kv:i1/0>i1/0 steps",
        ),
        (lambda data: stretched(data, (0, 4), (0, 3)), "coverage_hole - steps"),
        (lambda data: stretched(data, (4, 8), (5, 8)), "coverage_hole - steps"),
        (lambda data: narrowed(data, 0), ""),
        (lambda data: narrowed(data, 1), "over_memory reserve:i0/0.bytes; over_memory reserve:i1/0.bytes"),
    ],
}
