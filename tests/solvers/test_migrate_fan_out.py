"""What several GPUs of an instance lack passes its port once, in the plan's steps as in placement's objective."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator

import pytest

from spotserve.core.check import check_plan
from spotserve.core.ids import GpuId, instance_of
from spotserve.core.plan import CopyWeights, LoadWeights, Plan, PlanningProblem, Trigger
from spotserve.solvers.migrate import sources
from spotserve.solvers.migrate.fan_out import fan_out
from spotserve.solvers.migrate.pieces import Demand, cut_pieces
from spotserve.solvers.planner import make_plan
from spotserve.solvers.ranges import Catalog, Ranges
from spotserve.solvers.steps import busiest_port_s
from tests.planning_worlds import (
    MIB,
    lost,
    memory_in_use,
    notice,
    running_problem,
    tiny_model,
    tiny_spec,
    with_memory,
)

UP, DOWN = "model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight"
HOLDER = GpuId("i0/0")


@pytest.fixture
def no_crumbs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every byte that could be passed on is."""
    monkeypatch.setattr(sources, "CRUMB_BYTES", 1)


def two_replicas(**limits: int | str) -> PlanningProblem:
    """Two whole replicas on one instance of two GPUs, which gets a notice; another such instance takes over."""
    spec = tiny_spec(solvers={"migrate": str(limits.pop("migrate", "layered"))}, data=2, pipeline=1, tensor=1)
    return running_problem(
        spec, shape=(2, 1, 1), memory_bytes=8 * MIB, trigger=notice("i0"), spare=1, gpus_per_instance=2
    )


def copies(plan: Plan) -> list[CopyWeights]:
    """The steps that copy weights."""
    return [step for step in plan.steps if isinstance(step, CopyWeights)]


def relays(plan: Plan) -> list[CopyWeights]:
    """Those that pass on what the same plan brought."""
    return [step for step in copies(plan) if step.reason == "instance_fetches"]


def drawn(seed: int, *, is_short: bool) -> PlanningProblem:
    """Some cluster of 2 or 4 GPUs an instance that has to go to some other shape, short of memory or not."""
    draw = random.Random(seed)
    shape = draw.choice([(2, 1, 1), (2, 2, 1), (4, 1, 1), (2, 1, 2), (3, 2, 1), (1, 2, 2), (1, 4, 1), (1, 2, 4)])
    data, pipeline, tensor = draw.choice([(2, 1, 1), (2, 2, 1), (4, 1, 1), (2, 1, 2), (2, 3, 1), (1, 1, 4)])
    spec = tiny_spec(
        model=tiny_model(num_layers=draw.choice([4, 6, 8]), kv_heads=draw.choice([2, 4])),
        solvers={"migrate": draw.choice(["layered", "layered", "maxflow", "prefix_lp"])},
        max_running=1,
        max_model_len=64,
        data=data,
        pipeline=pipeline,
        tensor=tensor,
    )
    per_instance = draw.choice([2, 4])
    last = -(-shape[0] * shape[1] * shape[2] // per_instance) - 1
    trouble = [notice("i0"), notice(f"i{last}"), lost("i0"), Trigger(kind="joined", instances=(instance_of(HOLDER),))]
    problem = running_problem(
        spec,
        shape=shape,
        memory_bytes=MIB,
        trigger=draw.choice(trouble),
        spare=draw.choice([1, 2]),
        requests_each=draw.choice([0, 1]),
        gpus_per_instance=per_instance,
        kv_blocks=draw.choice([4, 8, 16]),
    )
    return with_memory(problem, memory_in_use(problem) + (0 if is_short else 4 * MIB))


def test_one_gpu_fetches_and_the_other_copies_from_it() -> None:
    """Tests that of two GPUs with the same demand one fetches it and passes it on; the third is elsewhere."""
    need: Ranges = {UP: [(0, 192)]}
    demands = [Demand(GpuId(name), 0, need) for name in ("i1/0", "i1/1", "i2/0")]
    catalog = Catalog(tiny_model())
    pieces = cut_pieces(catalog, demands, {HOLDER: need}, [HOLDER])
    kept, passed_on = fan_out(catalog, pieces, least_bytes=1)
    assert ["i1/0", "i2/0"] == [one.destination for one in kept]
    assert [("i1/0", "i1/1", catalog.bytes(need))] == [(one.source, one.destination, one.bytes) for one in passed_on]
    assert passed_on[0].parts == kept[0].parts
    assert (pieces, ()) == fan_out(catalog, pieces, least_bytes=catalog.bytes(need) + 1)


def test_only_what_both_lack_is_passed_on() -> None:
    """Tests positions that overlap in part: each range passes the port once, and every GPU gets all it lacks once."""
    needs: list[Ranges] = [{UP: [(0, 128)]}, {UP: [(64, 192)], DOWN: [(0, 64)]}, {UP: [(0, 192)], DOWN: [(0, 128)]}]
    demands = [Demand(GpuId(f"i1/{number}"), 0, need) for number, need in enumerate(needs)]
    catalog = Catalog(tiny_model())
    everything: Ranges = {UP: [(0, 256)], DOWN: [(0, 256)]}
    kept, passed_on = fan_out(catalog, cut_pieces(catalog, demands, {HOLDER: everything}, [HOLDER]), least_bytes=1)
    fetched = {
        one.destination: {name: runs for part in one.parts for name, runs in part.ranges.items()} for one in kept
    }
    assert {
        "i1/0": {UP: [(0, 128)]},
        "i1/1": {UP: [(128, 192)], DOWN: [(0, 64)]},
        "i1/2": {DOWN: [(64, 128)]},
    } == fetched
    told = sorted(
        (one.source, one.destination, name, run)
        for one in passed_on
        for part in one.parts
        for name, runs in part.ranges.items()
        for run in runs
    )
    assert [
        ("i1/0", "i1/1", UP, (64, 128)),
        ("i1/0", "i1/2", UP, (0, 128)),
        ("i1/1", "i1/2", UP, (128, 192)),
        ("i1/1", "i1/2", DOWN, (0, 64)),
    ] == told
    size = catalog.bytes({UP: [(0, 192)], DOWN: [(0, 128)]})
    assert size == sum(one.bytes for one in kept)


def test_what_a_sibling_holds_or_nobody_does_is_not_passed_on() -> None:
    """Tests that a holder inside the instance is asked itself, and that storage is read by every GPU that must."""
    need: Ranges = {UP: [(0, 192)]}
    demands = [Demand(GpuId(name), 0, need) for name in ("i1/0", "i1/1")]
    catalog = Catalog(tiny_model())
    sibling = GpuId("i1/2")
    for holdings in ({sibling: need}, {}):
        pieces = cut_pieces(catalog, demands, holdings, [sibling])
        assert (pieces, ()) == fan_out(catalog, pieces, least_bytes=1)
    everyone = frozenset(one.destination for one in demands)
    freed_first = cut_pieces(catalog, demands, {HOLDER: need}, [HOLDER], freed=everyone)
    assert (freed_first, ()) == fan_out(catalog, freed_first, least_bytes=1)


@pytest.mark.parametrize("solver", ["layered", "maxflow", "prefix_lp"])
@pytest.mark.usefixtures("no_crumbs")
def test_the_steps_do_what_the_placement_counts(solver: str) -> None:
    """Tests that a plan's busiest port carries placement's objective, and that each copy waits for what it copies."""
    plan = make_plan(two_replicas(migrate=solver))
    assert () == check_plan(plan)
    across, inside = (
        [step for step in copies(plan) if (instance_of(step.source) == "i1") == is_inside]
        for is_inside in (False, True)
    )
    assert inside == relays(plan)
    assert 1 == len(inside)
    assert sum(step.bytes for step in inside) == sum(step.bytes for step in across) + sum(
        step.bytes for step in plan.steps if isinstance(step, LoadWeights)
    )
    assert {step.id for step in across} <= set(inside[0].depends_on)
    assert 1 == (plan.solver["migrate"].statistics or {})["relays"]
    if solver != "prefix_lp":
        link = plan.spec.profile.link_bytes_per_s
        weights_and_kv = [step for step in plan.steps if step.kind != "copy_kv_delta"]
        assert plan.solver["place"].objective == round(busiest_port_s(weights_and_kv, link_bytes_per_s=link) * link)


def test_a_crumb_is_fetched_twice() -> None:
    """Tests that a round trip is not spent on what crosses in less."""
    plan = make_plan(two_replicas())
    spec = two_replicas().spec
    assert max(step.bytes for step in copies(plan)) > sources.CRUMB_BYTES
    assert 1 == len(relays(plan))
    few = tiny_spec(model=tiny_model(num_layers=2), data=2, pipeline=1, tensor=1)
    problem = running_problem(
        few, shape=(2, 1, 1), memory_bytes=8 * MIB, trigger=notice("i0"), spare=1, gpus_per_instance=2
    )
    small = make_plan(problem)
    assert spec.limits == few.limits
    assert 0 < max(step.bytes for step in copies(small)) < sources.CRUMB_BYTES
    assert [] == relays(small)


@pytest.mark.parametrize("solver", ["first_holder", "paper"])
@pytest.mark.usefixtures("no_crumbs")
def test_the_baselines_fetch_for_every_gpu(solver: str) -> None:
    """Tests that what naive systems do, and what was published, is not improved."""
    plan = make_plan(two_replicas(migrate=solver))
    assert () == check_plan(plan)
    assert [] == relays(plan)


def network_runs(plan: Plan) -> Iterator[tuple[str, str, int]]:
    """(instance, parameter, row) of all that copies bring over the network."""
    for step in copies(plan):
        into = instance_of(step.destination)
        if instance_of(step.source) != into:
            for piece in step.slices:
                for row in range(piece.start, piece.stop):
                    yield into, piece.parameter, row


def is_as_placed(plan: Plan) -> bool:
    """Whether nothing is there that placement does not see, and so its objective is what the steps do.

    It does not see KV of a second replica that goes to the same one, and takes storage for one more instance.
    """
    heirs = Counter(route.to_replica for route in plan.routes)
    loads = any(isinstance(step, LoadWeights) for step in plan.steps)
    if plan.mode != "live" or loads or not plan.steps or max(heirs.values(), default=0) > 1:
        return False
    link = plan.spec.profile.link_bytes_per_s
    foreseen = [step for step in plan.steps if step.kind != "copy_kv_delta"]
    busiest = round(busiest_port_s(foreseen, link_bytes_per_s=link) * link)
    assert plan.solver["place"].objective == busiest or plan.solver["migrate"].status != "optimal"
    return True


@pytest.mark.thorough
@pytest.mark.parametrize("is_short", [False, True], ids=["room", "short"])
@pytest.mark.usefixtures("no_crumbs")
def test_nothing_crosses_a_port_twice(seed: int, is_short: bool) -> None:
    """Tests random clusters: sound plans, live and in place, in which no instance gets a row from others twice."""
    modes: Counter[str] = Counter()
    for number in range(120):
        plan = make_plan(drawn(seed + number, is_short=is_short))
        assert () == check_plan(plan)
        rows = Counter(network_runs(plan))
        assert not rows or max(rows.values()) == 1
        ids = {step.id: step for step in plan.steps}
        for relay in relays(plan):
            assert instance_of(relay.source) == instance_of(relay.destination)
            bringing = [ids[name] for name in relay.depends_on if ids[name].kind in ("copy_weights", "load_weights")]
            assert bringing
            assert all("instance_fetches" != step.reason for step in bringing)
        modes[plan.mode] += bool(relays(plan))
        modes["as placed"] += is_as_placed(plan)
    assert modes["as placed"] > 20 or is_short
    assert modes["in_place" if is_short else "live"]
