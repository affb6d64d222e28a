"""Migrate inside whole plans: every solver's plan is sound, and copies stand in the order in which they start."""

from __future__ import annotations

import itertools

import pytest

from spotserve.core.check import check_plan
from spotserve.core.ids import GpuId
from spotserve.core.plan import CopyWeights, LoadWeights, Plan, Release, Step, Trigger
from spotserve.core.slices import Slice
from spotserve.solvers.migrate import sources
from spotserve.solvers.migrate.pieces import layer_of
from spotserve.solvers.migrate.sources import SOURCE_SOLVERS, choose_sources
from spotserve.solvers.planner import make_plan
from tests.planning_worlds import KIB, MIB, lost, notice, running_problem, tiny_spec, with_memory
from tests.solvers.migrate_worlds import catalog, piece, problem


def reshaped(solver: str, *, memory_bytes: int = 3 * MIB, tensor: int = 2, storage_bytes_per_s: float = 200e6) -> Plan:
    """Two pipelines of two stages become pipelines of one, two ranks wide, when one instance gets a notice."""
    spec = tiny_spec(
        solvers={"migrate": solver}, pipeline=3 - tensor, tensor=tensor, storage_bytes_per_s=storage_bytes_per_s
    )
    problem = running_problem(
        spec, shape=(2, 2, 1), memory_bytes=memory_bytes, trigger=notice("i2"), spare=1, kv_blocks=8
    )
    return make_plan(problem)


def weight_steps(plan: Plan) -> list[CopyWeights | LoadWeights]:
    """The steps that bring weights, in the order of the file."""
    return [step for step in plan.steps if isinstance(step, CopyWeights | LoadWeights)]


def layers_of(slices: tuple[Slice, ...]) -> list[str]:
    """The layers of some slices, in order, each once."""
    names = [next((part for part in piece.parameter.split(".") if part.isdigit()), "-") for piece in slices]
    return list(dict.fromkeys(names))


def ancestors(plan: Plan, step: Step) -> set[str]:
    """Everything that a step waits for."""
    before: dict[str, set[str]] = {}
    for one in plan.steps:
        before[one.id] = set(one.depends_on).union(*(before[name] for name in one.depends_on))
    return before[step.id]


@pytest.mark.parametrize("memory_bytes", [3 * MIB, 1600 * KIB])
@pytest.mark.parametrize("solver", SOURCE_SOLVERS)
def test_every_solver_makes_a_sound_plan(solver: str, memory_bytes: int) -> None:
    """Tests that each registered name plans live and in place, that the checker finds nothing, and who decided."""
    plan = reshaped(solver, memory_bytes=memory_bytes)
    assert () == check_plan(plan)
    assert "live" == plan.mode or memory_bytes < 2 * MIB
    report = plan.solver["migrate"]
    assert (solver, True) == (report.name, report.objective >= report.bound)
    assert report.certificate is not None


@pytest.mark.parametrize("solver", SOURCE_SOLVERS)
def test_kv_is_written_before_weights(solver: str) -> None:
    """Tests that the runtime, which starts what is ready in the order of the file, starts KV first."""
    kinds = [step.kind for step in reshaped(solver).steps if step.kind in ("copy_kv", "copy_weights", "load_weights")]
    assert "copy_kv" in kinds
    assert "copy_weights" in kinds
    assert kinds == sorted(kinds, key=lambda kind: kind != "copy_kv")


def test_front_layers_come_first_within_a_step() -> None:
    """Tests that a copy brings what stands before the layers, the layers by number, then the head."""
    for step in weight_steps(reshaped("layered")):
        layers = layers_of(step.slices)
        numbered = [int(layer) for layer in layers if layer.isdigit()]
        assert numbered == sorted(numbered)
        assert "-" not in layers[1:-1]


@pytest.mark.parametrize("memory_bytes", [3 * MIB, 1400 * KIB])
def test_the_paper_moves_layer_after_layer(memory_bytes: int) -> None:
    """Tests Algorithm 2 as published: all KV, then one layer at a time, each waiting for the one before."""
    plan = reshaped("paper", memory_bytes=memory_bytes)
    steps = weight_steps(plan)
    assert all(1 == len(layers_of(step.slices)) for step in steps)
    groups = [list(group) for _, group in itertools.groupby(steps, key=lambda step: layer_of(step.slices[0].parameter))]
    assert len(groups) == len({layer_of(group[0].slices[0].parameter) for group in groups}) > 4
    kv = {step.id for step in plan.steps if step.kind == "copy_kv"}
    assert kv <= ancestors(plan, groups[0][0])
    for earlier, later in itertools.pairwise(groups):
        for step in later:
            assert {one.id for one in earlier} <= ancestors(plan, step)
    copies = [step for step in steps if isinstance(step, CopyWeights)]
    assert sum(step.bytes for step in copies) > 0
    assert plan.estimates.done_s > reshaped("layered", memory_bytes=memory_bytes).estimates.done_s


def layers_in_order(solver: str, *, memory_bytes: int = 3 * MIB) -> list[str]:
    """The layers of a plan's weight steps as they are written."""
    steps = weight_steps(reshaped(solver, memory_bytes=memory_bytes))
    return list(dict.fromkeys(layer_of(step.slices[0].parameter) for step in steps))


def test_layers_go_as_numbered_without_a_planner() -> None:
    """Tests that `paper-unplanned` goes from the embedding to the head, where the text puts off what has no room."""
    as_numbered = layers_in_order("paper-unplanned")
    assert [str(number) for number in range(8)] == as_numbered[1:9]
    assert as_numbered[0].endswith("embed_tokens.weight")
    assert as_numbered != layers_in_order("paper")
    assert sorted(as_numbered) == sorted(layers_in_order("paper"))


def test_the_artifact_lets_nobody_grow() -> None:
    """Tests that layers of the two old stages take turns, so that nobody holds a layer more for longer than one."""
    spec = tiny_spec(solvers={"migrate": "paper-artifact"}, max_model_len=64, pipeline=1, tensor=2)
    old = running_problem(spec, shape=(1, 2, 1), memory_bytes=MIB, trigger=Trigger(kind="load"), kv_blocks=5)
    steps = weight_steps(make_plan(with_memory(old, 1600 * KIB)))
    order = list(dict.fromkeys(layer_of(step.slices[0].parameter) for step in steps))
    assert ["0", "4", "1", "5", "2", "6", "3", "7"] == [layer for layer in order if layer.isdigit()]
    assert order[0].endswith("embed_tokens.weight")


def test_without_a_mapper_one_gpu_sends_everything() -> None:
    """Tests that `paper-first-holder` asks the first holder where `paper` deals receivers out over all."""
    world = [piece(f"i{number}/0", ["i0/0", "i1/0", "i2/0"], 10**9, layer=number) for number in (3, 4, 5)]
    senders = {
        solver: {one.source for one in choose_sources(problem(*world), catalog(), solver).answer or ()}
        for solver in ("paper", "paper-unplanned", "paper-first-holder")
    }
    assert {"i0/0"} == senders["paper-first-holder"]
    assert {"i0/0", "i1/0", "i2/0"} == senders["paper"] == senders["paper-unplanned"]


def test_storage_helps_where_ports_are_full() -> None:
    """Tests that `prefix_lp` reads from storage what ports would bring later, says why, and ends no later."""
    fast = reshaped("prefix_lp", storage_bytes_per_s=2e9)
    loads = [step for step in fast.steps if isinstance(step, LoadWeights)]
    assert {"ports_full"} == {step.reason for step in loads}
    assert fast.solver["migrate"].objective < reshaped("layered", storage_bytes_per_s=2e9).solver["migrate"].objective
    assert fast.estimates.done_s <= reshaped("layered", storage_bytes_per_s=2e9).estimates.done_s


def test_weights_free_what_they_replace_in_the_order_of_the_memory_solver() -> None:
    """Tests that a plan short of memory reports Algorithm 2's peak, and frees a layer before it takes the next."""
    plan = reshaped("layered", memory_bytes=1600 * KIB)
    assert "in_place" == plan.mode
    report = plan.solver["memory"]
    assert report.objective <= 0
    assert report.bound <= report.objective
    freed = [step for step in plan.steps if isinstance(step, Release) and step.slices and not step.kv]
    assert freed
    for release in freed:
        readers = [
            step.id
            for step in plan.steps
            if isinstance(step, CopyWeights)
            and step.source == release.workers[0]
            and {piece.parameter for piece in step.slices} & {piece.parameter for piece in release.slices}
        ]
        assert set(readers) <= ancestors(plan, release)


def test_nothing_changes_nothing_moves() -> None:
    """Tests that a reconfiguration to what runs is an empty plan."""
    problem = running_problem(tiny_spec(), shape=(1, 2, 1), memory_bytes=3 * MIB, trigger=lost("i2"), spare=1)
    plan = make_plan(problem)
    assert () == plan.steps
    assert plan.target.replicas == problem.snapshot.world.replicas


def test_the_second_instance_of_a_holder_shares_the_load() -> None:
    """Tests that two new pipelines do not both draw on the first of two holders."""
    spec = tiny_spec(solvers={"migrate": "layered"}, pipeline=2, tensor=1, data=4)
    problem = running_problem(spec, shape=(2, 2, 1), memory_bytes=4 * MIB, trigger=notice("i9"), spare=4)
    problem = problem.model_copy(update={"trigger": problem.trigger.model_copy(update={"kind": "joined"})})
    plan = make_plan(problem)
    assert () == check_plan(plan)
    sources: dict[GpuId, int] = {}
    for step in plan.steps:
        if isinstance(step, CopyWeights):
            sources[step.source] = sources.get(step.source, 0) + step.bytes
    assert len(sources) == 4
    assert max(sources.values()) <= 1.2 * min(sources.values())


@pytest.mark.parametrize("solver", ["layered", "maxflow"])
def test_a_split_plan_delivers_each_range_once(monkeypatch: pytest.MonkeyPatch, solver: str) -> None:
    """Tests that a plan whose pieces are split over holders meets the bound and that the checker accepts it."""
    monkeypatch.setattr(sources, "CRUMB_BYTES", 1)
    spec = tiny_spec(solvers={"migrate": solver}, pipeline=1, tensor=2)
    spec = spec.model_copy(update={"profile": spec.profile.model_copy(update={"round_trip_s": 0.0})})
    problem = running_problem(spec, shape=(2, 2, 1), memory_bytes=3 * MIB, trigger=notice("i2"), spare=1, kv_blocks=8)
    plan = make_plan(problem)
    report = plan.solver["migrate"]
    assert report.statistics is not None
    assert 1 == report.statistics["split"]
    assert report.objective <= 1.001 * report.bound
    assert () == check_plan(plan)
