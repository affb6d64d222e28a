"""Frozen values: what they have worked out once is theirs alone."""

from __future__ import annotations

from spotserve.core.ids import GpuId
from spotserve.core.slices import axis_range
from tests.planning_worlds import notice, replica, running_problem, tiny_model, tiny_spec

MIB = 1024 * 1024


def test_a_changed_copy_works_everything_out_anew() -> None:
    """Tests that no copy keeps what the original has cached of fields that the copy changes."""
    one = replica("r1", ["i0/0", "i1/0"], pipeline=2, tensor=1, num_layers=8, kv_blocks=4)
    assert one.gpus == ("i0/0", "i1/0")
    shorter = one.model_copy(update={"stages": one.stages[:1]})
    assert (GpuId("i0/0"),) == shorter.gpus
    problem = running_problem(tiny_spec(), shape=(2, 2, 1), memory_bytes=3 * MIB, trigger=notice("i2"))
    snapshot, world = problem.snapshot, problem.snapshot.world
    assert len(snapshot.live_requests) == 2
    assert {} == snapshot.model_copy(update={"requests": ()}).live_requests
    assert len(world.positions) == 4
    assert len(world.model_copy(update={"replicas": world.replicas[:1]}).positions) == 2
    model = tiny_model()
    assert axis_range(model, model.axis("mlp"), tensor=2, rank=0) == (0, 128)
    other = model.model_copy(update={"axes": model.axes[:1]})
    assert ["q_heads"] == [other.axis(axis.name).name for axis in other.axes]


def test_what_is_cached_is_not_part_of_the_value() -> None:
    """Tests that equality, hash and JSON are those of the fields, whatever has been looked at."""
    one = replica("r1", ["i0/0", "i1/0"], pipeline=2, tensor=1, num_layers=8, kv_blocks=4)
    same = one.model_copy()
    assert one.gpus == ("i0/0", "i1/0")
    assert same == one
    assert hash(same) == hash(one)
    assert same.model_dump_json() == one.model_dump_json()
    assert type(one).model_validate_json(one.model_dump_json()) == one
