"""Configure: the choice of (D, P, M, B), and that the two choosers agree on it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from spotserve.core.cost import Workload
from spotserve.core.slices import max_tensor_degree
from spotserve.core.snapshot import Replica
from spotserve.core.spec import ServingSpec
from spotserve.solvers.configure import Candidate, Choice, configure, kept_shape, tabulate
from spotserve.solvers.configure.candidates import as_table
from tests.planning_worlds import MIB, replica, tiny_spec

WORKLOAD = Workload(prompt_tokens=64, output_tokens=32, load_rps=0.0)


def chosen(
    spec: ServingSpec,
    *,
    gpus: int,
    memory_bytes: int = 2 * MIB,
    load_rps: float = 0.0,
    intact: tuple[Replica, ...] = (),
    solver: str = "enumerate",
) -> Choice:
    """The choice for `gpus` equal GPUs."""
    workload = Workload(WORKLOAD.prompt_tokens, WORKLOAD.output_tokens, load_rps)
    rows = tabulate(spec, memory=[memory_bytes] * gpus, workload=workload, intact=intact)
    return configure(spec, rows, workload=replace(WORKLOAD, load_rps=load_rps), solver=solver)


def degrees(choice: Choice) -> tuple[int, int, int]:
    """(D, P, M) of a choice."""
    assert choice.candidate is not None
    return choice.candidate.data, choice.candidate.pipeline, choice.candidate.tensor


def running(count: int, *, pipeline: int = 2, tensor: int = 1) -> tuple[Replica, ...]:
    """`count` replicas that run."""
    size = pipeline * tensor
    return tuple(
        replica(
            f"r{number}",
            [f"i{number * size + index}/0" for index in range(size)],
            pipeline=pipeline,
            tensor=tensor,
            num_layers=8,
            kv_blocks=20,
        )
        for number in range(count)
    )


@pytest.mark.parametrize("gpus", [1, 2, 3, 4, 7, 12])
@pytest.mark.parametrize("load_rps", [0.0, 1.0, 30.0, 500.0])
@pytest.mark.parametrize("count", [0, 1])
def test_cpsat_agrees_with_enumeration(gpus: int, load_rps: float, count: int) -> None:
    """Tests that CP-SAT over the table picks the very candidate that filtering it picks."""
    spec, intact = tiny_spec(), running(count) if gpus >= 2 else ()
    by_filter = chosen(spec, gpus=gpus, load_rps=load_rps, intact=intact)
    by_model = chosen(spec, gpus=gpus, load_rps=load_rps, intact=intact, solver="cpsat")
    assert by_filter.candidate == by_model.candidate
    assert by_filter.report.objective == by_model.report.objective


def test_every_candidate_fits() -> None:
    """Tests that no candidate takes more GPUs than there are, or a tensor degree the chunks do not allow."""
    spec = tiny_spec()
    rows = tabulate(spec, memory=[2 * MIB] * 10, workload=WORKLOAD, intact=())
    assert rows
    assert all(row.gpus == row.data * row.pipeline * row.tensor <= 10 for row in rows)
    assert max(row.tensor for row in rows) <= max_tensor_degree(spec.model)


def test_small_gpus_need_two_for_a_replica() -> None:
    """Tests that with GPUs too small for the model 4 of them run two replicas, 3 and 2 one, and 1 none."""
    spec = tiny_spec(max_model_len=128)
    assert [(2, 2, 1), (1, 2, 1), (1, 2, 1)] == [
        degrees(chosen(spec, gpus=gpus, memory_bytes=2 * MIB, intact=running(gpus // 2))) for gpus in (4, 3, 2)
    ]
    nothing = chosen(spec, gpus=1, memory_bytes=2 * MIB)
    assert (None, "infeasible") == (nothing.candidate, nothing.report.status)


def test_more_gpus_never_lower_throughput() -> None:
    """Tests that one more GPU never makes the best throughput worse."""
    spec = tiny_spec()
    best = [
        max((row.throughput_urps for row in tabulate(spec, memory=[MIB] * n, workload=WORKLOAD, intact=())), default=0)
        for n in range(1, 12)
    ]
    assert best == sorted(best)


def test_larger_load_never_adds_serving_candidates() -> None:
    """Tests that a configuration that serves a load serves every smaller one."""
    spec = tiny_spec()
    serving = []
    for load_rps in (1.0, 10.0, 100.0):
        workload = Workload(WORKLOAD.prompt_tokens, WORKLOAD.output_tokens, load_rps)
        rows = tabulate(spec, memory=[2 * MIB] * 8, workload=workload, intact=())
        serving.append({(r.data, r.pipeline, r.tensor) for r in rows if not r.unserved})
    assert serving[0] >= serving[1] >= serving[2]
    assert serving[0] != serving[2]


def test_pins_are_kept_while_they_fit() -> None:
    """Tests that pinned degrees are kept, then D gives way, then all do, and that the report says so."""
    spec = tiny_spec(data=2, pipeline=2, tensor=1)
    choices = [chosen(spec, gpus=gpus, memory_bytes=3 * MIB) for gpus in (5, 3, 1)]
    assert [(2, 2, 1), (1, 2, 1), (1, 1, 1)] == [degrees(choice) for choice in choices]
    assert ["kept", "data_relaxed", "relaxed"] == [(choice.report.certificate or {})["pins"] for choice in choices]


def test_running_shape_stays() -> None:
    """Tests that a shape within the hysteresis of the best is kept, a GPU freed by it idle, and a slower one is not."""
    spec = tiny_spec()
    assert degrees(chosen(spec, gpus=3, intact=running(1))) == (1, 2, 1)
    assert degrees(chosen(spec, gpus=3, load_rps=1.0, intact=running(1))) == (1, 2, 1)

    def latencies(kept: int) -> list[int]:
        rows = [
            Candidate(1, 1, 2, 4, 2, 2, 0, latency, latency, 10**6, 0, reshaped, 1)
            for latency, reshaped in ((1000, 1), (kept, 0))
        ]
        return [row.latency_us for row in kept_shape(as_table(rows), load_known=True)]

    assert [latencies(1100), latencies(1101)] == [[1100], [1000, 1101]]


def test_overload_takes_the_shortest_wait() -> None:
    """Tests that when nothing serves the load the choice is within 5 % of the shortest latency, backlog included."""
    spec = tiny_spec()
    rows = tabulate(spec, memory=[8 * MIB] * 6, workload=Workload(64, 32, 1e6), intact=())
    choice = configure(spec, rows, workload=replace(WORKLOAD, load_rps=1e6), solver="enumerate")
    assert choice.candidate is not None
    assert choice.candidate.unserved == 1
    assert choice.candidate.latency_us <= 1.05 * min(row.latency_us for row in rows if row.data > 1)


def test_a_short_overload_is_no_reason_for_a_slow_pipeline() -> None:
    """Tests that a little more throughput does not pay for twice the latency while the backlog is short."""
    # Of (latency, throughput), the latency with the backlog of half a minute in it.
    rows = [
        Candidate(2, stages, 1, 4, 2, 2, 1, latency_us, latency_us, throughput, 0, 0, 1)
        for stages, latency_us, throughput in ((7, 30_000_000, 1_300_000), (3, 20_000_000, 1_000_000))
    ]
    for solver in ("enumerate", "cpsat"):
        choice = configure(tiny_spec(), rows, workload=replace(WORKLOAD, load_rps=1.5), solver=solver)
        assert choice.candidate == rows[1]


def test_bursts_are_served_by_what_is_paid_for() -> None:
    """Tests that where idle instances are given back the cheapest is chosen, but not while load comes in bursts."""
    spec = tiny_spec(spare_instances=0)
    rows = [
        Candidate(data, 1, 1, 4, data, data * 10**6, 0, latency, latency, data * 10**6, 0, 0, 1)
        for data, latency in ((2, 1_020), (4, 1_000))
    ]
    workload = replace(WORKLOAD, load_rps=1.0)
    chosen_data = []
    for in_bursts in (False, True):
        candidate = configure(spec, rows, workload=workload, solver="cpsat", in_bursts=in_bursts).candidate
        assert candidate is not None
        chosen_data.append(candidate.data)
    assert [2, 4] == chosen_data


def test_headroom_is_given_up_last() -> None:
    """Tests that a candidate without migration headroom is taken only if no candidate keeps it."""
    spec = tiny_spec(migration_headroom_bytes=700 * 1024)
    roomy = chosen(spec, gpus=4, memory_bytes=int(2.2 * MIB))
    tight = chosen(spec, gpus=2, memory_bytes=int(1.5 * MIB))
    assert roomy.candidate is not None
    assert tight.candidate is not None
    assert (1, 0) == (roomy.candidate.headroom, tight.candidate.headroom)


def test_equal_candidates_are_told_apart() -> None:
    """Tests that the order of wishes ends in a total order: no two rows of a table are tied."""
    rows = tabulate(tiny_spec(), memory=[2 * MIB] * 9, workload=WORKLOAD, intact=())
    keys: list[tuple[int, int, int]] = [identity(row) for row in rows]
    assert len(keys) == len(set(keys))


def identity(row: Candidate) -> tuple[int, int, int]:
    """What the last goals look at."""
    return row.tensor, row.pipeline, row.data
