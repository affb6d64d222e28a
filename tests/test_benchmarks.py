"""The pure parts of the benchmarks: what they count, and that the report tells a miss from a hit. No timing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.clients import ClientStream, take_line
from benchmarks.loading import WAYS, cached_share, rotated
from benchmarks.loading import render as render_loading
from benchmarks.measures import (
    Gap,
    TokenCheck,
    check_tokens,
    cut_over_stalls,
    gaps_of,
    percentile,
    run_measures,
    stalls_during,
    undisturbed,
)
from benchmarks.preemption import POLICIES, TRACE, schedule
from benchmarks.report import copy_aims, render, run_aims
from benchmarks.simulator import measured, mixed_scenario, page, sized_scenario
from benchmarks.timeline import Disturbance, PlanRunSpan, Timeline, clock_offset_s
from benchmarks.workload import Arrival, WorkloadShape, draw_arrivals
from spotserve.core.trace import instance_counts


def stream_of(times_s: list[float], *, index: int = 0, is_finished: bool = True, due_s: float = 0.0) -> ClientStream:
    """A stream of tokens 0, 1, 2, … that came at these times."""
    arrival = Arrival(index=index, at_s=0.0, prompt_ids=(1,), max_tokens=4, temperature=0.0, seed=0)
    return ClientStream(
        arrival,
        due_s=due_s,
        headers_s=due_s,
        token_ids=list(range(len(times_s))),
        times_s=times_s,
        request=f"q{index}",
        status_code=200,
        finish_reason="length" if is_finished else None,
    )


@pytest.mark.parametrize(("share", "expected"), [(0.5, 50), (0.99, 99), (0.991, 100), (1.0, 100), (0.001, 1)])
def test_percentile_is_a_value_that_occurred(share: float, expected: int) -> None:
    """Tests that a percentile is the nearest rank, whatever the order of the values."""
    assert expected == percentile(list(range(100, 0, -1)), share)


@pytest.mark.parametrize(
    ("received", "is_over", "expected"),
    [
        ([1, 2, 3, 4], True, TokenCheck(0, 0, 0, 0)),
        ([1, 2], False, TokenCheck(0, 0, 0, 2)),
        ([1, 2], True, TokenCheck(2, 0, 0, 0)),
        ([1, 3, 4], True, TokenCheck(1, 0, 0, 0)),
        ([1, 2, 2, 3, 4], True, TokenCheck(0, 1, 0, 0)),
        ([1, 9, 3, 4], True, TokenCheck(0, 0, 1, 0)),
    ],
)
def test_tokens_lost_doubled_and_changed(received: list[int], is_over: bool, expected: TokenCheck) -> None:
    """Tests that every way in which a stream can differ from its reference is told apart."""
    assert expected == check_tokens(received, [1, 2, 3, 4], is_over=is_over)


def test_an_unfinished_stream_keeps_its_last_gap() -> None:
    """Tests that a stream which still waits at the end of the run has a stall up to that end."""
    gaps = gaps_of([stream_of([1.0, 2.0], is_finished=False)], offset_s=0.5, ended_s=7.5)
    assert [Gap("q0", 0.5, 1.5), Gap("q0", 1.5, 7.0)] == gaps


def test_stalls_belong_to_what_they_overlap() -> None:
    """Tests that gaps around a disturbance are its stalls and are no undisturbed iterations."""
    gaps = gaps_of([stream_of([1.0, 2.0, 5.0, 6.0, 8.0])], offset_s=0.0, ended_s=9.0)
    disturbance = Disturbance("notice", "i0", at_s=3.0, ended_s=5.4)
    assert {"q0": 3.0} == stalls_during(gaps, disturbance)
    assert [Gap("q0", 1.0, 2.0), Gap("q0", 6.0, 8.0)] == undisturbed(gaps, [disturbance])
    run = PlanRunSpan(2, "notice", "live", "all_kv", 3.0, commit_s=5.5, owners_changed=frozenset({"q0"}))
    assert {"q0": 1.0} == cut_over_stalls(gaps, run)


def test_clocks_are_related_by_the_tightest_requests() -> None:
    """Tests that the offset between client and journal lies within what every request allows."""
    assert pytest.approx(100.0) == clock_offset_s([(101.0, 1.5, 102.0), (103.9, 4.0, 104.5), (105.0, 5.4, 105.5)])


def test_every_accepted_request_is_counted() -> None:
    """Tests that an unfinished request is in the percentiles with its wait, and a failed one as lost tokens."""
    failed = stream_of([1.0, 2.0], index=2, is_finished=False)
    failed.error = "broken"
    refused = stream_of([], index=3, is_finished=False)
    refused.status_code = 429
    streams = [
        stream_of([1.0, 2.0, 3.0, 4.0], index=0),
        stream_of([1.0, 2.0], index=1, is_finished=False),
        failed,
        refused,
    ]
    references = {index: [0, 1, 2, 3] for index in range(4)}
    measures = run_measures(streams, references, Timeline(), offset_s=0.0, ended_s=60.0)
    expected = {"sent": 4, "refused": 1, "accepted": 3, "finished": 1, "failed": 1, "unfinished": 1}
    assert expected == measures["requests"]
    tokens = measures["tokens"]
    assert isinstance(tokens, dict)
    assert (2, 2) == (tokens["lost"], tokens["missing_at_end"])
    assert 60.0 == measures["latency_p99_s"]


def test_arrivals_are_seeded() -> None:
    """Tests that a seed gives the same requests again, another one others, all within the shape's bounds."""
    shape = WorkloadShape(duration_s=30.0, seed=3)
    arrivals = draw_arrivals(shape)
    assert arrivals == draw_arrivals(shape)
    assert arrivals != draw_arrivals(WorkloadShape(duration_s=30.0, seed=4))
    assert all(64 <= len(a.prompt_ids) <= 128 and 64 <= a.max_tokens <= 128 and a.at_s < 30.0 for a in arrivals)


def test_policies_are_interleaved() -> None:
    """Tests that each round runs every policy once per link and begins with another one."""
    order = list(schedule(["a", "b"], 3, POLICIES))
    assert 18 == len(set(order)) == len(order)
    assert 3 == len({policy for index, (_, _, policy) in enumerate(order) if index % 3 == 0})


def test_stream_lines_are_read() -> None:
    """Tests that token ids, ends and errors are taken from server-sent events, and comments are not."""
    stream = stream_of([], is_finished=False)
    take_line(stream, ": keep-alive", 1.0)
    take_line(stream, 'data: {"choices": [{"token_ids": [5, 6], "finish_reason": null}]}', 2.0)
    take_line(stream, 'data: {"choices": [{"token_ids": [7], "finish_reason": "length"}]}', 3.0)
    take_line(stream, "data: [DONE]", 4.0)
    assert ([5, 6, 7], [2.0, 2.0, 3.0], "length") == (stream.token_ids, stream.times_s, stream.finish_reason)
    take_line(stream, 'data: {"error": {"message": "no"}}', 5.0)
    assert not stream.is_finished


def run_of(policy: str, *, stall_s: float, first_byte_ms: float | None = 100.0, recomputed: int = 0) -> dict[str, Any]:
    """A run with one notice."""
    notice = {
        "kind": "notice",
        "instance": "i0",
        "at_s": 1.0,
        "lasted_s": 2.0,
        "noticed_in_time": True,
        "runs": [],
        "stalls_s": [stall_s],
        "cut_over_stalls_s": [stall_s],
        "recomputed_tokens": recomputed,
        "weight_bytes_copied": 10,
        "weight_bytes_loaded": 0,
        "kv_bytes": 10,
        "first_byte_ms": first_byte_ms,
    }
    return {
        "policy": policy,
        "link": "64MB",
        "round": 0,
        "requests": {"sent": 2, "refused": 0, "accepted": 2, "finished": 2, "failed": 0, "unfinished": 0},
        "tokens": {"lost": 0, "duplicated": 0, "wrong": 0, "identical_streams": 2},
        "latency_p50_s": 1.0,
        "latency_p99_s": 2.0 + stall_s,
        "ttft_p50_s": 0.5,
        "ttft_p99_s": 0.6,
        "iteration_ms": 50.0,
        "calm_gap_p99_ms": 90.0,
        "longest_stall_s": stall_s,
        "recomputed_tokens": recomputed,
        "disturbances": [notice],
    }


def test_aims_can_be_missed() -> None:
    """Tests that each aim is met by numbers that meet it and missed by numbers that do not."""
    good = [run_of("live", stall_s=0.1), run_of("reroute", stall_s=2.0), run_of("reparallelize", stall_s=3.0)]
    assert [True] * 8 == [aim.is_met for aim in run_aims(good)]
    bad = [
        run_of("live", stall_s=1.0, first_byte_ms=300.0, recomputed=5),
        run_of("reroute", stall_s=0.5),
        run_of("reparallelize", stall_s=0.9),
    ]
    bad[0]["tokens"]["lost"] = 1
    assert [False] * 8 == [aim.is_met for aim in run_aims(bad)]


@pytest.mark.parametrize(("rate", "is_met"), [(850.0, True), (700.0, False)])
def test_copy_rate_is_judged_by_the_socket_beside_it(rate: float, is_met: bool) -> None:
    """Tests that the share is taken of the ceiling that was measured with the copy."""
    copies = [{"bytes_per_s": rate, "socket_fresh_bytes_per_s": 1000.0, "socket_reused_bytes_per_s": 1000.0}]
    assert [is_met, is_met] == [aim.is_met for aim in copy_aims(copies)]
    assert [None, None] == [aim.is_met for aim in copy_aims([])]


def test_report_has_every_aim_and_policy() -> None:
    """Tests that the page is made of the results alone and marks what was missed."""
    results = {
        "circumstances": {
            "command": "python -m benchmarks.preemption",
            "commit": "abc",
            "uncommitted_files": 0,
            "processor": "P",
            "cores": 2,
            "memory_gib": 4.0,
            "system": "Linux",
            "python": "3.11",
            "torch": "2",
            "load_average_before": [0.1, 0.1, 0.1],
        },
        "model": {
            "num_layers": 1,
            "hidden_size": 8,
            "num_q_heads": 2,
            "num_kv_heads": 1,
            "vocab_size": 32,
            "seed": 0,
        },
        "workload": {
            "requests": 2,
            "duration_s": 9.0,
            "rate_rps": 1.0,
            "prompt_tokens": [1, 2],
            "output_tokens": [1, 2],
            "seed": 0,
        },
        "trace": json.loads(json.dumps(TRACE)),
        "daemon_args": ["--instances", "4"],
        "rounds": 1,
        "runs": [run_of("live", stall_s=1.0), run_of("reroute", stall_s=2.0), run_of("reparallelize", stall_s=3.0)],
        "copies": [],
    }
    page = render(results)
    assert page == render(json.loads(json.dumps(results)))
    assert all(f"`{policy}`" in page for policy in POLICIES)
    assert "| 64MB | noticed stall P99 ≤ 3 iterations | 20.0 of 1 stalls (P50 20.0) | **no** |" in page
    stall = "longest stall of the whole run ≥ 5× shorter than `reparallelize`"
    assert f"| 64MB | {stall} | 1.00 s against 3.00 s (3.0×) | **no** |" in page


def test_every_way_of_loading_begins_a_round() -> None:
    """Tests that in as many rounds as there are ways each is the first once and none is left out."""
    orders = [rotated(number) for number in range(len(WAYS))]
    assert sorted(WAYS) == sorted(order[0] for order in orders)
    assert [sorted(WAYS)] * len(WAYS) == [sorted(order) for order in orders]


def test_the_page_cache_is_seen(tmp_path: Path) -> None:
    """Tests that a file that was just written is in the page cache."""
    (tmp_path / "file").write_bytes(bytes(100_000))
    assert 1.0 == cached_share(tmp_path / "file")


def test_the_loading_report_says_medians_and_where_bytes_came_from() -> None:
    """Tests one row for each link and way, with the median of its rounds and the rate of what was brought."""
    fills = [
        {
            "round": number,
            "link": "uncapped",
            "way": way,
            "cached_share": 0.5,
            "from_peers": 2e8 if way == "peer" else 0,
            "from_storage": 0 if way == "peer" else 2e8,
            "joined_s": 1.0,
            "weights_s": seconds,
            "serving_s": seconds + 0.5,
            "total_s": seconds + 1.5,
        }
        for number, seconds in enumerate((2.0, 1.0, 4.0))
        for way in WAYS
    ]
    given = {
        "command": "c",
        "commit": "0" * 40,
        "uncommitted_files": 0,
        "processor": "p",
        "cores": 2,
        "memory_gib": 8,
        "load_average_before": [0.1],
        "load_average_after": [0.2],
    }
    text = render_loading({"circumstances": given, "fills": fills, "model": {"bytes": 2e8, "seed": 0}, "rounds": 3})
    rows = [line for line in text.splitlines() if line.startswith("| uncapped")]
    assert list(WAYS) == [row.split(" | ")[1] for row in rows]
    assert "| not read | 200 MB | 0 MB | 1.00 s (1.00 to 1.00) | 2.00 s (1.00 to 4.00) |" in rows[0]
    assert "| 50 % | 0 MB | 200 MB |" in rows[1]
    assert all(row.endswith("| 100 (50 to 200) |") for row in rows)


def test_a_small_cluster_at_size() -> None:
    """Tests that a run of the simulator's benchmark counts what it took, and that the page has a row of it."""
    scenario = sized_scenario(16, duration_s=20.0, seed=1)
    assert 4 == sum(len(event.instances) for event in scenario.trace.events if event.at_s == 0)
    row = {"gpus": 16, **measured(scenario, "live")}
    assert 0 == row["requests"]["lost"]
    assert row["plans"] >= 1
    assert row["cpu_s"] > row["planning_cpu_s"] > 0
    facts = {"command": "c", "commit": "d", "uncommitted_files": 0, "processor": "p", "cores": 2}
    saved = {"circumstances": {**facts, "load_average_before": [0.5]}, "seed": 1, "hours": 0.01, "rows": [row]}
    lines = list(page({"parts": {"speed": saved}}))
    assert any(line.startswith(f"| 16 | {row['requests']['accepted']} |") for line in lines)


def test_days_of_zones_are_of_two_types(shared_data: Path) -> None:
    """Tests that the SkyPilot days have at most 64 GPUs at a time, of both types, under a load of Azure's lengths."""
    scenario = mixed_scenario(shared_data, days=1.0, rate_rps=0.05, seed=0)
    assert {"", "a10g"} == {event.gpu_type for event in scenario.trace.events if event.kind == "add"}
    assert 4 < max(count for _, count in instance_counts(scenario.trace)) <= 16
    assert 86_400.0 == scenario.duration_s
    assert 2000 < len(scenario.arrivals()) < 8000
