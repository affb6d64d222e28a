"""Fleets of several GPU types: layers by speed and memory, the master against brute force, and whole plans."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence

import pytest

from spotserve.core.check import check_plan
from spotserve.core.cost import (
    Degrees,
    PipelineShape,
    Pool,
    StageLoad,
    Workload,
    balanced,
    pools_request_ms,
    request_ms,
)
from spotserve.core.ids import GpuId
from spotserve.core.plan import Plan, PlanningProblem, Trigger
from spotserve.core.slices import stage_shard
from spotserve.core.snapshot import Gpu, Holding, Snapshot, World
from spotserve.core.spec import DeviceProfile, ServingSpec
from spotserve.errors import SpecError
from spotserve.solvers.configure import tabulate
from spotserve.solvers.configure.mix import SHARES, MixProblem, OperatingPoint, solve_mix
from spotserve.solvers.configure.mixed import configure_mix
from spotserve.solvers.configure.templates import (
    GpuKind,
    Template,
    TemplateMaker,
    split_layers,
    undominated_templates,
)
from spotserve.solvers.planner import make_plan
from tests.planning_worlds import KIB, MIB, instance, request, tiny_model, tiny_spec

FAST = "fast"


def mixed_spec(*, price: float = 3.0, speed: float = 3.0, **options: int | None) -> ServingSpec:
    """The tiny model on the profile's own type and on a faster, dearer one."""
    spec = tiny_spec(model=tiny_model(num_layers=8), **options)
    points = tuple(p.model_copy(update={"layer_ms": p.layer_ms / speed}) for p in spec.profile.latencies)
    device = DeviceProfile(type=FAST, latencies=points, price_per_hour=price)
    return spec.model_copy(update={"profile": spec.profile.model_copy(update={"devices": (device,)})})


def kinds(fast: int, own: int, *, fast_bytes: int = 2 * MIB, own_bytes: int = MIB) -> tuple[GpuKind, ...]:
    """So many GPUs of each type."""
    return (GpuKind(FAST, fast, fast_bytes), GpuKind("", own, own_bytes))


@pytest.mark.parametrize("number", range(40))
def test_layer_split_is_the_best_there_is(number: int, rng: random.Random) -> None:
    """Tests that layers add up, caps hold, and no other split has a faster slowest stage."""
    num_layers, stages = rng.randrange(1, 9), rng.randrange(1, 5)
    times = [rng.randrange(1, 12) for _ in range(stages)]
    caps = [rng.randrange(1, 9) for _ in range(stages)]
    splits = [split for split in itertools.product(*(range(1, cap + 1) for cap in caps)) if sum(split) == num_layers]
    found = split_layers(num_layers, times, caps)
    if not splits:
        assert found is None
        return
    assert found in splits
    best = min(max(t * n for t, n in zip(times, split, strict=True)) for split in splits)
    assert best == max(t * n for t, n in zip(times, found or (), strict=True))


def test_pools_of_one_shape_wait_as_equal_replicas_do() -> None:
    """Tests that a single pool is the configuration (D, P, M, B), and that two pools share the load."""
    spec, workload = mixed_spec(), Workload(64, 32, 30.0)
    shape = balanced(spec.model, pipeline=3, tensor=2)
    assert request_ms(spec, Degrees(4, 3, 2, 4), workload) == pools_request_ms(spec, [Pool(shape, 4, 4)], workload)
    fast = PipelineShape(1, (StageLoad(8, FAST),))
    slow = PipelineShape(1, (StageLoad(8),))
    alone = [pools_request_ms(spec, [Pool(one, 2, 4)], Workload(64, 32, 1.0)) for one in (fast, slow)]
    both = pools_request_ms(spec, [Pool(fast, 1, 4), Pool(slow, 1, 4)], Workload(64, 32, 1.0))
    assert alone[0] is not None
    assert alone[1] is not None
    assert both is not None
    assert alone[0] < both < alone[1]


def template(uses: tuple[int, ...], throughput: int, cost: int, *, alone_us: int = 1000) -> Template:
    """A template of which only the master's figures matter; its shape tells it from others."""
    shape = PipelineShape(1, (StageLoad(throughput, str((uses, cost, alone_us))),))
    return Template(shape, uses, 8, 4, 4, throughput, alone_us, cost, headroom=True)


def random_templates(rng: random.Random, count: int) -> tuple[Template, ...]:
    """Templates over two kinds of GPUs."""
    drawn = []
    while len(drawn) < count:
        uses = (rng.randrange(3), rng.randrange(3))
        if any(uses):
            drawn.append(template(uses, rng.randrange(1, 50), rng.randrange(1, 30), alone_us=rng.randrange(100, 900)))
    return tuple(drawn)


def every_count(templates: Sequence[Template], available: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Every mix within the GPUs that has a replica at all."""
    return [
        counts
        for counts in itertools.product(range(max(available) + 1), repeat=len(templates))
        if any(counts)
        and all(
            sum(t.uses[k] * n for t, n in zip(templates, counts, strict=True)) <= have
            for k, have in enumerate(available)
        )
    ]


@pytest.mark.parametrize("number", range(25))
def test_throughput_master_is_brute_force(number: int, rng: random.Random) -> None:
    """Tests that under an unknown load the master finds the most throughput there is, and then the lowest price."""
    templates, available = random_templates(rng, 3), (rng.randrange(1, 4), rng.randrange(1, 4))
    mixes = every_count(templates, available)
    result = solve_mix(MixProblem(templates, available, 0))
    if not mixes:
        assert result.answer is None
        return

    def total(counts: Sequence[int], column: str) -> int:
        return sum(getattr(t, column) * n for t, n in zip(templates, counts, strict=True))

    assert result.answer is not None
    best = max(total(counts, "throughput_urps") for counts in mixes)
    most = max(total(c, "throughput_urps") for c in mixes)
    price = min(total(c, "cost_micro") for c in mixes if total(c, "throughput_urps") == most)
    assert ("optimal", best, best) == (result.status, result.objective, result.bound)
    assert (most, price) == tuple(total(result.answer.counts, name) for name in ("throughput_urps", "cost_micro"))


def least_latency(problem: MixProblem) -> int | None:
    """The least mean latency x SHARES by trying every mix at every operating point; shares go to the fastest first."""
    best = None
    throughput = [t.throughput_urps for t in problem.templates]
    for counts in every_count(problem.templates, problem.available):
        if sum(t * n for t, n in zip(throughput, counts, strict=True)) * 1000 < 1050 * problem.load_urps:
            continue
        splits = [
            [s for s in itertools.product(range(n + 1), repeat=len(points)) if sum(s) == n]
            for n, points in zip(counts, problem.points, strict=True)
        ]
        for chosen in itertools.product(*splits):
            offers = sorted(
                (point.latency_us, SHARES * point.served_urps * n // problem.load_urps)
                for points, split in zip(problem.points, chosen, strict=True)
                for point, n in zip(points, split, strict=True)
            )
            left, spent = SHARES, 0
            for latency_us, most in offers:
                taken = min(left, most)
                left, spent = left - taken, spent + taken * latency_us
            if left == 0 and (best is None or spent < best):
                best = spent
    return best


@pytest.mark.parametrize("number", range(20))
def test_latency_master_is_brute_force(number: int, rng: random.Random) -> None:
    """Tests that under a load the bound is the least mean latency there is, and the choice within 5 % of it."""
    templates, available = random_templates(rng, 2), (rng.randrange(1, 4), rng.randrange(1, 4))
    points = tuple(
        tuple(
            OperatingPoint(max(1, t.throughput_urps * permille // 1000), t.alone_us * (1000 + permille) // 1000)
            for permille in (400, 950)
        )
        for t in templates
    )
    problem = MixProblem(templates, available, rng.randrange(1, 120), points=points)
    best, result = least_latency(problem), solve_mix(problem)
    if best is None:
        assert result.answer is None or not result.answer.serves_load
        return
    assert result.answer is not None
    assert result.answer.serves_load
    assert (best, "optimal") == (result.bound, result.status)
    assert best <= result.objective <= best * 1.05


@pytest.mark.parametrize("number", range(15))
def test_dominated_templates_are_not_missed(number: int, rng: random.Random) -> None:
    """Tests that the most throughput is the same without the templates that another dominates."""
    templates, available = random_templates(rng, 12), (rng.randrange(2, 6), rng.randrange(2, 6))
    useful = undominated_templates(templates)
    assert len(useful) < len(templates)
    everything, without = (solve_mix(MixProblem(each, available, 0)) for each in (templates, useful))
    assert everything.objective == without.objective


def test_one_price_changes_the_mix() -> None:
    """Tests that a dearer type is left where the cheaper one is about as fast, and taken where the price is turned."""
    workload = Workload(64, 32, 2.0)
    # Equally fast types: only the price tells them apart.
    chosen = [
        configure_mix(mixed_spec(price=price, speed=1.0), kinds(4, 4, own_bytes=2 * MIB), workload, ())
        for price in (3.0, 0.2)
    ]
    devices = [{stage.device for shape in one.shapes for stage in shape.stages} for one in chosen]
    assert devices == [{""}, {FAST}]


def test_a_type_that_holds_the_model_in_part_gets_part_of_it() -> None:
    """Tests that where neither type holds the model alone the faster one with more memory takes more of the layers."""
    choice = configure_mix(mixed_spec(), kinds(1, 1), Workload(64, 32, 0), ())
    assert [1, 1] == [len(choice.shapes), len({shape.tensor for shape in choice.shapes})]
    layers = {stage.device: stage.layers for stage in choice.shapes[0].stages}
    assert sum(layers.values()) == 8
    assert layers[FAST] > layers[""] > 0
    alone = [configure_mix(mixed_spec(), (kind,), Workload(64, 32, 0), ()) for kind in kinds(1, 1)]
    assert [(), ()] == [one.replicas for one in alone]


def test_a_mix_of_one_type_is_no_worse_than_equal_replicas() -> None:
    """Tests that templates of one type reach at least the throughput of the best table row."""
    spec = mixed_spec()
    for gpus in (2, 3, 7):
        choice = configure_mix(spec, (GpuKind("", gpus, 2 * MIB),), Workload(64, 32, 0.0), ())
        rows = tabulate(spec, memory=[2 * MIB] * gpus, workload=Workload(64, 32, 0.0), intact=())
        assert choice.report.bound >= max(row.throughput_urps for row in rows)


def test_templates_keep_within_the_memory_of_their_type() -> None:
    """Tests that every template leaves the smallest KV pool on each type, and with headroom that too."""
    spec = mixed_spec(migration_headroom_bytes=200 * KIB)
    maker = TemplateMaker(spec, kinds(3, 3), Workload(64, 32, 0.0))
    roomy, tight = (maker.all(headroom=headroom) for headroom in (True, False))
    assert roomy
    assert tight
    assert all(one.headroom for one in roomy)
    assert all(one.kv_blocks >= 16 and sum(s.layers for s in one.shape.stages) == 8 for one in (*roomy, *tight))
    assert {one.uses for one in roomy} <= {one.uses for one in tight}


# -- whole plans ----------------------------------------------------------------------------------------------


def fleet(spec: ServingSpec, types: Sequence[str], *, memory: dict[str, int]) -> PlanningProblem:
    """One-GPU instances of the given types, nothing running."""
    instances = tuple(
        instance(number, memory_bytes=memory[name]).model_copy(
            update={"gpus": (Gpu(id=GpuId(f"i{number}/0"), memory_bytes=memory[name], type=name),)}
        )
        for number, name in enumerate(types)
    )
    snapshot = Snapshot(world=World(epoch=0, instances=instances, replicas=()))
    return PlanningProblem(spec=spec, snapshot=snapshot, trigger=Trigger(kind="start"), epoch_to=1)


def after(problem: PlanningProblem, plan: Plan, trigger: Trigger, *, load_rps: float = 0.0) -> PlanningProblem:
    """The same cluster once a first plan ran, with two requests on each replica."""
    model, replicas = problem.spec.model, plan.target.replicas
    held = tuple(
        Holding(
            gpu=gpu,
            shards=(stage_shard(model, layers=stage.layers, tensor=one.tensor, rank=rank),),
        )
        for one in replicas
        for stage in one.stages
        for rank, gpu in enumerate(stage.gpus)
    )
    world = problem.snapshot.world.model_copy(update={"epoch": 1, "replicas": replicas, "holdings": held})
    requests = tuple(
        request(100 * number + index, one, tokens=5 + 9 * index)
        for number, one in enumerate(replicas)
        for index in (0, 1)
    )
    snapshot = Snapshot(world=world, requests=requests, load_rps=load_rps)
    return problem.model_copy(update={"snapshot": snapshot, "trigger": trigger, "epoch_to": 2})


@pytest.mark.parametrize("number", range(25))
def test_plans_for_mixed_fleets_are_sound(number: int, rng: random.Random) -> None:
    """Tests that the checker accepts what is planned for any mixed fleet, at the start and after any trouble."""
    spec = mixed_spec(
        migration_headroom_bytes=rng.choice([0, 200 * KIB]),
        max_running=rng.choice([1, 4]),
        max_model_len=rng.choice([64, 256]),
    )
    spec = spec.model_copy(update={"policy": rng.choice(["live", "live", "reroute", "reparallelize"])})
    types = [FAST, *(rng.choice([FAST, "", "cpu"]) for _ in range(rng.randrange(1, 7)))]
    memory = {FAST: rng.randrange(MIB, 3 * MIB), "": rng.randrange(MIB // 2, 2 * MIB)}
    problem = fleet(spec, types, memory={**memory, "cpu": memory[""]})
    first = make_plan(problem)
    assert check_plan(first) == ()
    if not first.target.replicas:
        return
    names = [one.id for one in problem.snapshot.world.instances]
    hit = tuple(sorted(rng.sample(names, rng.randrange(1, len(names)))))
    trigger = rng.choice(
        [
            Trigger(kind="notice", instances=hit, remaining_s=rng.choice([0.5, 30.0])),
            Trigger(kind="lost", instances=hit),
            Trigger(kind="load"),
        ]
    )
    second = make_plan(after(problem, first, trigger, load_rps=rng.choice([0.0, 2.0, 40.0])))
    assert check_plan(second) == ()


def test_uneven_replicas_run_on_when_another_is_hit() -> None:
    """Tests that a replica of uneven stages is untouched by the loss of a GPU it does not use."""
    memory = {FAST: 2 * MIB, "": MIB}
    problem = fleet(mixed_spec(), [FAST, "", FAST, ""], memory=memory)
    first = make_plan(problem)
    runs = [[stage.layers for stage in one.stages] for one in first.target.replicas]
    assert len(runs) == 2
    assert all(len({stop - start for start, stop in each}) == 2 for each in runs)
    untouched, hit = first.target.replicas
    doomed = Trigger(kind="notice", instances=(hit.gpus[0].split("/")[0],), remaining_s=30.0)  # type: ignore[arg-type]
    second = make_plan(after(problem, first, doomed))
    assert (untouched,) == second.target.replicas
    assert check_plan(second) == ()
    third = make_plan(after(problem, first, Trigger(kind="load"), load_rps=1.0))
    assert (first.target.replicas, ()) == (third.target.replicas, third.steps)


def test_an_unknown_type_and_solvers_of_equal_replicas_are_refused() -> None:
    """Tests that a type without times and a configure solver that knows one type only end with one clear line."""
    memory = {FAST: 2 * MIB, "": MIB, "h100": 8 * MIB}
    with pytest.raises(SpecError, match=r"gpus\[0\]\.type: GPU type 'h100' has no times"):
        make_plan(fleet(mixed_spec(), ["", "h100"], memory=memory))
    for solver in ("enumerate", "paper"):
        spec = mixed_spec().model_copy(update={"solvers": {"configure": solver}})
        with pytest.raises(SpecError, match=f"configure={solver} knows fleets of the profile's own GPU type only"):
            make_plan(fleet(spec, ["", FAST], memory=memory))


def test_files_without_types_stay_as_they_are() -> None:
    """Tests that a GPU without a type and a profile without devices are written as before there were any."""
    assert {"id", "memory_bytes"} == set(Gpu(id=GpuId("i0/0"), memory_bytes=1).model_dump())
    assert "devices" not in tiny_spec().profile.model_dump()
    assert "price_per_hour" not in tiny_spec().profile.model_dump()
    typed = Gpu(id=GpuId("i0/0"), memory_bytes=1, type=FAST)
    assert typed == Gpu.model_validate_json(typed.model_dump_json())
    assert mixed_spec() == ServingSpec.model_validate_json(mixed_spec().model_dump_json())


def test_a_plan_with_an_unknown_type_is_corrupt() -> None:
    """Tests that the checker refuses a snapshot whose GPU types the spec does not know."""
    plan = make_plan(fleet(mixed_spec(), [FAST, ""], memory={FAST: 2 * MIB, "": MIB}))
    profile = plan.spec.profile.model_copy(update={"devices": ()})
    findings = check_plan(plan.model_copy(update={"spec": plan.spec.model_copy(update={"profile": profile})}))
    assert any("of which the profile has no times" in finding.message for finding in findings)
