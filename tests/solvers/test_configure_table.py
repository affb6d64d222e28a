"""The table of equal replicas against a plain loop over the cost model, and the properties that any such choice has."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from spotserve.core.cost import (
    Degrees,
    Workload,
    execution_ms,
    least_kv_blocks,
    most_kv_blocks,
    replica_shards,
    request_ms,
    running_bound,
    serves_load,
    throughput_rps,
)
from spotserve.core.slices import kv_block_bytes, max_tensor_degree, shard_bytes
from spotserve.core.snapshot import Replica
from spotserve.core.spec import LatencyPoint, ServingSpec
from spotserve.solvers.configure import CHOOSERS, Goal, Table, configure, goals_for, several_replicas, tabulate
from spotserve.solvers.configure.candidates import COLUMNS, Candidate, as_table
from spotserve.solvers.configure.choice import choose_by_cpsat, choose_by_enumeration
from spotserve.solvers.cp_sat import MAX_SUM, require_exact
from tests.planning_worlds import KIB, MIB, replica, tiny_model, tiny_spec

WORKLOAD = Workload(prompt_tokens=64, output_tokens=32, load_rps=0.0)


def random_spec(rng: random.Random) -> ServingSpec:
    """Any small model, profile and limits."""
    spec = tiny_spec(
        model=tiny_model(num_layers=rng.choice([1, 3, 6, 8]), kv_heads=rng.choice([1, 4, 8])),
        max_model_len=rng.choice([64, 256]),
        max_running=rng.choice([1, 3, 8]),
        migration_headroom_bytes=rng.choice([0, 200 * KIB]),
        data=rng.choice([None, None, None, 2]),
    )
    points = tuple(
        LatencyPoint(tokens=tokens, tensor=tensor, layer_ms=rng.uniform(0.1, 1.0) * (1 + tokens / 20) / tensor**0.5)
        for tensor in rng.sample([1, 2, 4], rng.choice([1, 2]))
        for tokens in (1, 8, 64)
    )
    return spec.model_copy(update={"profile": spec.profile.model_copy(update={"latencies": points})})


def random_memory(rng: random.Random) -> list[int]:
    """GPUs of one or of several sizes."""
    sizes = [rng.randrange(MIB // 2, 4 * MIB) for _ in range(rng.choice([1, 1, 3]))]
    return [rng.choice(sizes) for _ in range(rng.randrange(1, 14))]


def running(rng: random.Random, spec: ServingSpec, num_gpus: int) -> tuple[Replica, ...]:
    """Some replicas of one shape that run, or none."""
    pipeline = rng.randrange(1, spec.model.num_layers + 1)
    count = rng.randrange(0, num_gpus // pipeline + 1)
    return tuple(
        replica(
            f"r{number}",
            [f"i{number * pipeline + index}/0" for index in range(pipeline)],
            pipeline=pipeline,
            tensor=1,
            num_layers=spec.model.num_layers,
            kv_blocks=4,
        )
        for number in range(count)
    )


def by_loop(spec: ServingSpec, memory: list[int], workload: Workload, intact: tuple[Replica, ...]) -> list[Candidate]:
    """The table as two plain loops write it, with core/cost.py for every figure."""
    largest_first, least, reserve = sorted(memory, reverse=True), least_kv_blocks(spec.limits), 0
    reserve = spec.limits.migration_headroom_bytes
    rows = []
    for tensor in range(1, min(max_tensor_degree(spec.model), len(memory)) + 1):
        for pipeline in range(1, min(spec.model.num_layers, len(memory) // tensor) + 1):
            shards = replica_shards(spec.model, pipeline=pipeline, tensor=tensor)
            held = [shard_bytes(spec.model, shard) for shard in shards]
            block = [kv_block_bytes(spec.model, shard, block_tokens=16) for shard in shards]
            for data in range(1, len(memory) // len(shards) + 1):
                budget = largest_first[data * len(shards) - 1]
                if any(have + least * size > budget for have, size in zip(held, block, strict=True)):
                    continue
                roomy = all(have + least * size + reserve <= budget for have, size in zip(held, block, strict=True))
                left = [budget - (reserve if roomy else 0) - have for have in held]
                blocks = min(room // size for room, size in zip(left, block, strict=True))
                blocks = max(least, min(blocks, most_kv_blocks(spec.limits)))
                most = running_bound(spec.limits, blocks)
                batch = max(1, min(most, blocks * 16 // (workload.prompt_tokens + workload.output_tokens)))
                degrees = Degrees(data, pipeline, tensor, batch)
                throughput = throughput_rps(spec, degrees, workload)
                same = [one for one in intact if (one.pipeline, one.tensor) == (pipeline, tensor)]
                shapes = {(one.pipeline, one.tensor) for one in intact}
                rows.append(
                    Candidate(
                        data=data,
                        pipeline=pipeline,
                        tensor=tensor,
                        max_running=most,
                        gpus=degrees.gpus,
                        cost_micro=degrees.gpus * round(spec.profile.compared_price_of("") * 1e6),
                        unserved=int(not serves_load(throughput, workload)),
                        latency_us=round(request_ms(spec, degrees, workload) * 1000),
                        execution_us=round(execution_ms(spec, degrees, workload, running=batch) * 1000),
                        throughput_urps=round(throughput * 1e6),
                        disturbed=sum(len(one.gpus) for one in intact) - min(data, len(same)) * len(shards),
                        reshaped=int(bool(shapes) and (pipeline, tensor) not in shapes),
                        headroom=int(roomy),
                    )
                )
    return rows


@pytest.mark.parametrize("number", range(30))
def test_table_is_that_of_a_plain_loop(number: int, rng: random.Random) -> None:
    """Tests that every row and figure of the numpy sweep is what two loops over the cost model give."""
    spec, memory = random_spec(rng), random_memory(rng)
    intact = running(rng, spec, len(memory))
    workload = Workload(rng.randrange(1, 100), rng.randrange(1, 60), rng.choice([0.0, 0.5, 5.0, 50.0]))
    table = tabulate(spec, memory=memory, workload=workload, intact=intact)
    assert by_loop(spec, memory, workload, intact) == list(table) == [table[index] for index in range(len(table))]


@pytest.mark.parametrize("number", range(60))
def test_cpsat_and_enumeration_choose_the_same(number: int, rng: random.Random) -> None:
    """Tests that both give the same candidate, objective and bound for any spec, fleet, load and running replicas."""
    spec, memory = random_spec(rng), random_memory(rng)
    load_rps = rng.choice([0.0, 0.5, 5.0, 50.0, 5000.0])
    rows = tabulate(spec, memory=memory, workload=Workload(64, 32, load_rps), intact=running(rng, spec, len(memory)))
    told = replace(WORKLOAD, load_rps=load_rps)
    by_filter, by_model = (configure(spec, rows, workload=told, solver=name) for name in ("enumerate", "cpsat"))
    assert by_filter.candidate == by_model.candidate
    assert by_filter.report.status == by_model.report.status
    assert (by_filter.report.objective, by_filter.report.bound) == (by_model.report.objective, by_model.report.bound)


@pytest.mark.parametrize("solver", sorted(CHOOSERS))
def test_the_cheapest_of_what_is_about_as_fast_is_taken(solver: str) -> None:
    """Tests that who gives instances back takes few GPUs at a light load, and who pays for all of them uses them."""
    spec = tiny_spec(spare_instances=1)
    rows = tabulate(spec, memory=[8 * MIB] * 64, workload=Workload(64, 32, 20.0), intact=())
    candidate = configure(spec, rows, workload=replace(WORKLOAD, load_rps=20.0), solver=solver).candidate
    assert candidate is not None
    fastest = min(row.latency_us for row in rows)
    assert candidate.latency_us <= fastest * 1.05
    assert min((r for r in rows if r.latency_us == fastest), key=lambda r: r.gpus).gpus >= 2 * candidate.gpus
    assert candidate.throughput_urps >= 1.05 * 20.0e6
    paid_for = configure(tiny_spec(), rows, workload=replace(WORKLOAD, load_rps=20.0), solver=solver).candidate
    assert paid_for is not None
    assert paid_for.latency_us <= fastest * 1.05
    assert paid_for.throughput_urps > candidate.throughput_urps


@pytest.mark.parametrize("choose", [choose_by_cpsat, choose_by_enumeration])
def test_one_cost_changes_the_choice(choose: object) -> None:
    """Tests that the price of one row decides among rows that are about as fast, and only among these."""
    assert callable(choose)
    rows = [
        Candidate(1, 1, number, 4, number, cost, 0, latency, latency, 10**6, 0, 0, 1)
        for number, (cost, latency) in enumerate([(50, 1000), (40, 1049), (30, 1051)], start=1)
    ]
    goals = goals_for(as_table(rows), load_known=True, gives_back=True)
    assert choose(as_table(rows), goals).answer == 1
    dearer = [*rows[:1], Candidate(**{**{n: getattr(rows[1], n) for n in COLUMNS}, "cost_micro": 60}), rows[2]]
    assert choose(as_table(dearer), goals).answer == 0


def test_a_second_replica_is_worth_a_quarter_of_the_latency() -> None:
    """Tests that two replicas are taken where they are nearly as fast as one, and not where one is much faster."""
    rows = [
        Candidate(data, 1, 4 // data, 4, 4, 4, 0, latency, latency, 10**6, 0, 0, 1)
        for data, latency in [(1, 1000), (2, 1250)]
    ]
    table = as_table(rows)
    assert [row.data for row in several_replicas(table, load_known=True)] == [2]
    slower = as_table([rows[0], Candidate(2, 1, 2, 4, 4, 4, 0, 1251, 1251, 10**6, 0, 0, 1)])
    assert len(several_replicas(slower, load_known=True)) == 2
    assert [row.data for row in several_replicas(slower, load_known=False)] == [2]


def test_more_gpus_and_less_load_never_cost_more() -> None:
    """Tests that the cheapest serving row gets no cheaper with the load and no dearer with more GPUs."""
    spec = tiny_spec()

    def cheapest(gpus: int, load_rps: float) -> float:
        rows = tabulate(spec, memory=[2 * MIB] * gpus, workload=Workload(64, 32, load_rps), intact=())
        return min((row.cost_micro for row in rows if not row.unserved), default=float("inf"))

    by_load = [cheapest(12, load_rps) for load_rps in (1.0, 20.0, 60.0, 150.0, 1e5)]
    assert by_load == sorted(by_load)
    assert len(set(by_load)) >= 3
    by_gpus = [cheapest(gpus, 60.0) for gpus in range(1, 14)]
    assert by_gpus == sorted(by_gpus, reverse=True)


def test_larger_headroom_never_adds_candidates() -> None:
    """Tests that every row that keeps a larger migration headroom keeps a smaller one."""
    kept = []
    for headroom in (0, 200 * KIB, 600 * KIB):
        spec = tiny_spec(migration_headroom_bytes=headroom)
        rows = tabulate(spec, memory=[int(1.3 * MIB)] * 8, workload=WORKLOAD, intact=())
        kept.append({(row.data, row.pipeline, row.tensor) for row in rows if row.headroom})
    assert kept[0] > kept[1] > kept[2]


def test_twice_the_gpus_and_replicas_double_the_throughput() -> None:
    """Tests that (2D, P, M) on 2N GPUs serves twice what (D, P, M) serves on N."""
    spec = tiny_spec()
    half = tabulate(spec, memory=[2 * MIB] * 9, workload=WORKLOAD, intact=())
    rows = tabulate(spec, memory=[2 * MIB] * 18, workload=WORKLOAD, intact=())
    throughput = {(row.data, row.pipeline, row.tensor): row.throughput_urps for row in rows}
    assert len(half) > 20
    for row in half:
        assert abs(throughput[2 * row.data, row.pipeline, row.tensor] - 2 * row.throughput_urps) <= 2


def test_sums_that_doubles_cannot_hold_are_refused() -> None:
    """Tests that a coefficient from 2^52 up is refused before CP-SAT would change it and call that optimal."""
    require_exact(MAX_SUM - 1)
    with pytest.raises(ValueError, match="coarser unit"):
        require_exact(MAX_SUM)
    huge = Table({name: np.array([2**56 + number for number in range(3)], dtype=np.int64) for name in COLUMNS})
    with pytest.raises(ValueError, match="coarser unit"):
        choose_by_cpsat(huge, (Goal("latency_us", tolerance_permille=50),))


SCRIPT = """
import json
from pathlib import Path
from spotserve.cli.plan_command import inputs
from spotserve.core.canonical import canonical_json
from spotserve.core.plan import PlanningProblem
from spotserve.solvers.planner import make_plan
for load_rps in (0.0, 0.3):
    spec, seen, trigger = inputs(Path("plans/mixed-gpus"), None, None, needs_event=True)
    seen = seen.model_copy(update={"load_rps": load_rps})
    print(canonical_json(make_plan(PlanningProblem(spec=spec, snapshot=seen, trigger=trigger, epoch_to=4))), end="")
"""


@pytest.mark.thorough
def test_mixed_plans_are_the_same_under_every_hash_seed() -> None:
    """Tests that three processes with different PYTHONHASHSEED write the same bytes."""
    answers = {
        subprocess.run(
            [sys.executable, "-c", SCRIPT],
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
            capture_output=True,
            check=True,
            timeout=120,
        ).stdout
        for hash_seed in ("0", "1", "4242")
    }
    assert len(answers) == 1
    assert answers.pop().count(b"\n") == 2
