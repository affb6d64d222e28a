"""The arrangement: the paper's toy, every stop point against brute force, and what the planner makes of it."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from spotserve.core.check import check_plan
from spotserve.core.plan import CopyKv, CopyKvDelta, CopyWeights, Plan, Quiesce, Trigger
from spotserve.errors import SpecError
from spotserve.solvers.arrange import ARRANGERS, MAX_POINTS, ArrangeProblem, Decoder, Port, Stop, Stream, arrange
from spotserve.solvers.planner import make_plan
from tests.planning_worlds import KIB, MIB, notice, running_problem, tiny_spec, with_memory

SECOND = 1_000_000
GB = 10**9


def toy(**changes: int) -> ArrangeProblem:
    """12 GB of KV that does not grow, 5 tokens to go at one a second, 1 GB/s, 10 s left (golden instance G15)."""
    base = ArrangeProblem(
        remaining_us=10 * SECOND,
        step_us=SECOND,
        bytes_per_s=GB,
        decoders=(Decoder(SECOND, (Stream(tokens_left=5, kv_tokens=12, growth=0),)),),
        ports=(Port("i0", 0, (GB,)),),
    )
    return replace(base, **changes)


def drawn(rng: random.Random) -> ArrangeProblem:
    """A few replicas with a few requests each, behind one to three ports."""
    decoders = tuple(
        Decoder(
            rng.randint(20_000, 100_000),
            tuple(
                Stream(rng.choice([None, rng.randint(0, 400)]), rng.randint(0, 2048), rng.choice([0, 1]))
                for _ in range(rng.randint(0, 12))
            ),
        )
        for _ in range(rng.randint(1, 3))
    )
    ports = tuple(
        Port(
            f"i{number}",
            rng.choice([0, rng.randrange(10**9)]),
            tuple(rng.choice([0, 260_000, 800_000]) for _ in decoders),
        )
        for number in range(rng.randint(1, 3))
    )
    return ArrangeProblem(
        remaining_us=rng.randint(0, 12 * SECOND),
        step_us=min(decoder.token_us for decoder in decoders),
        bytes_per_s=rng.choice([100_000_000, 1_250_000_000]),
        decoders=decoders,
        ports=ports,
    )


def is_feasible(problem: ArrangeProblem, step: int) -> bool:
    """S * tau + K(S) / B <= T-, by the book."""
    time_us = step * problem.step_us
    for port in problem.ports:
        num_bytes = port.fixed_bytes
        for decoder, token_bytes in zip(problem.decoders, port.token_bytes, strict=True):
            decoded = time_us // decoder.token_us
            for stream in decoder.streams:
                if stream.tokens_left is None or stream.tokens_left > decoded:
                    num_bytes += (stream.kv_tokens + stream.growth * decoded) * token_bytes
        if num_bytes * SECOND > (problem.remaining_us - time_us) * problem.bytes_per_s:
            return False
    return time_us <= problem.remaining_us


def test_stops_after_the_request_has_ended() -> None:
    """Tests G15: no stop in the first five steps is in time, every later one is, the last is S* = 10."""
    result = arrange(toy(), "scan")
    assert [False] * 5 + [True] * 6 == [is_feasible(toy(), step) for step in range(11)]
    assert Stop(first_us=5 * SECOND, last_us=10 * SECOND, steps=10) == result.answer
    assert ("optimal", 10, 10, 0.0) == (result.status, result.objective, result.bound, result.gap)
    assert 6 == result.statistics["feasible_points"]


def test_the_paper_takes_bytes_as_of_now() -> None:
    """Tests that the static formula stops at once in G15, which is too late, and one token early where KV is small."""
    late = arrange(toy(), "paper")
    assert (0, "infeasible", 10) == (late.objective, late.status, late.bound)
    small = arrange(replace(toy(), ports=(Port("i0", 0, (GB // 12,)),)), "paper")
    assert (8, "feasible", 10) == (small.objective, small.status, small.bound)


def test_the_text_decodes_as_long_as_it_is_over_in_time() -> None:
    """Tests l_exe(S) < T- - T_mig: a token more than the artifact where half of one is left, never the whole slot."""
    half = replace(toy(), ports=(Port("i0", 0, (GB // 24,)),))
    assert (8, 9) == tuple(arrange(half, solver).objective for solver in ("paper", "paper-as-published"))
    whole = replace(toy(), ports=(Port("i0", 0, (GB // 12,)),))
    assert 8 == arrange(whole, "paper-as-published").objective


def test_the_text_gives_up_kv_that_moves_for_longer_than_its_batch_runs() -> None:
    """Tests the guard T_mig < l_exe(S): KV of six seconds beside three of decoding stays, weights still move."""
    kv = replace(toy(), ports=(Port("i0", 0, (GB // 2,)),))
    result = arrange(kv, "paper-as-published")
    assert (None, "infeasible") == (result.answer, result.status)
    assert {"kind": "moves_longer_than_it_runs", "bytes": 6 * GB} == result.certificate
    weights = replace(kv, decoders=(Decoder(SECOND, ()),), ports=(Port("i0", 6 * GB, (0,)),))
    assert 3 == arrange(weights, "paper-as-published").objective


def test_no_stop_is_in_time() -> None:
    """Tests that KV which never ends and is too much has no answer."""
    problem = replace(toy(), decoders=(Decoder(SECOND, (Stream(None, 12, 0),)),))
    result = arrange(problem, "scan")
    assert (None, "infeasible") == (result.answer, result.status)
    assert {"kind": "too_late", "step": 0, "bytes": 12 * GB, "at_us": 0} == result.certificate
    assert arrange(toy(remaining_us=-1), "scan").answer is None


def test_every_stop_point_against_brute_force(rng: random.Random) -> None:
    """Tests that the chosen stop is feasible, every later one is not, and the window behind it has no gap."""
    num_gaps = num_without = 0
    for _ in range(300):
        problem = drawn(rng)
        points = range(problem.remaining_us // problem.step_us + 1)
        feasible = [step for step in points if is_feasible(problem, step)]
        result = arrange(problem, "scan")
        assert len(feasible) == result.statistics["feasible_points"]
        if not feasible:
            num_without += 1
            assert result.answer is None
            continue
        assert result.answer is not None
        assert feasible[-1] == result.answer.steps == result.objective
        first = result.answer.first_us // problem.step_us
        assert list(range(first, feasible[-1] + 1)) == feasible[-(feasible[-1] - first + 1) :]
        assert first == 0 or first - 1 not in feasible
        num_gaps += first > 0 and first > feasible[0]
        num_gaps += first > 0 and feasible[0] == first
    assert min(num_gaps, num_without) > 5, "the draw should hold both kinds"


def test_more_time_stops_later(rng: random.Random) -> None:
    """Tests that S* never falls when T- or the rate grows, and that more bytes never raise it."""
    for _ in range(100):
        problem = drawn(rng)
        before = _steps(problem)
        assert _steps(replace(problem, remaining_us=problem.remaining_us + rng.randrange(3 * SECOND))) >= before
        assert _steps(replace(problem, bytes_per_s=2 * problem.bytes_per_s)) >= before
        fuller = tuple(replace(port, fixed_bytes=port.fixed_bytes + 10**8) for port in problem.ports)
        assert _steps(replace(problem, ports=fuller)) <= before


def test_one_coefficient_changes_the_answer() -> None:
    """Tests that bytes per token, growth, tokens left and token time each move the stop."""
    base = ArrangeProblem(10 * SECOND, SECOND, GB, (Decoder(SECOND, (Stream(None, 4, 0),)),), (Port("i0", 0, (GB,)),))
    assert 6 == _steps(base)
    assert 2 == _steps(replace(base, ports=(Port("i0", 0, (2 * GB,)),)))
    assert 3 == _steps(replace(base, decoders=(Decoder(SECOND, (Stream(None, 4, 1),)),)))
    assert 10 == _steps(replace(base, decoders=(Decoder(SECOND, (Stream(9, 4, 0),)),)))
    assert 4 == _steps(replace(base, decoders=(Decoder(SECOND // 2, (Stream(None, 4, 1),)),), step_us=SECOND // 2))


def test_long_grace_is_looked_at_in_larger_steps() -> None:
    """Tests that an hour of 1 ms steps is scanned in a bounded number of points, and says how far apart they lie."""
    problem = toy(remaining_us=3600 * SECOND, step_us=1000)
    statistics = arrange(problem, "scan").statistics
    assert MAX_POINTS + 1 == statistics["points"]
    assert 360_000 == statistics["step_us"]


def test_sums_beyond_64_bits_are_refused() -> None:
    """Tests the guard of the integer sums: refused with the port's name, never wrapped around."""
    problem = replace(toy(), decoders=(Decoder(SECOND, (Stream(None, 2**40, 0),)),), ports=(Port("i7", 0, (2**30,)),))
    for name in ARRANGERS:
        with pytest.raises(SpecError, match="i7 has"):
            arrange(problem, name)


def _steps(problem: ArrangeProblem) -> int:
    answer = arrange(problem, "scan").answer
    return -1 if answer is None else answer.steps


def planned(remaining_s: float | None, *, memory_kib: int = 2000, solver: str = "scan") -> Plan:
    """Two stages become two tensor ranks on one old and one spare GPU; 1.2 MB of weights at 1 MB/s come from i1."""
    spec = tiny_spec(
        solvers={"arrange": solver}, link_bytes_per_s=1e6, max_model_len=64, pipeline=1, tensor=2, max_running=4
    )
    trigger = Trigger(kind="load") if remaining_s is None else notice("i1", remaining_s=remaining_s)
    problem = running_problem(
        spec, shape=(1, 2, 1), memory_bytes=MIB, trigger=trigger, kv_blocks=5, requests_each=2, spare=1
    )
    return make_plan(with_memory(problem, memory_kib * KIB))


def stop_of(plan: Plan) -> Quiesce:
    """The plan's only stop."""
    (stop,) = [step for step in plan.steps if isinstance(step, Quiesce)]
    return stop


def test_live_plan_stops_as_late_as_its_last_blocks_allow() -> None:
    """Tests that a live plan's latest stop is S*, at which only a block of each request is left to send."""
    plan = planned(30.0)
    report = plan.solver["arrange"]
    assert ("live", "scan", "optimal") == (plan.mode, report.name, report.status)
    statistics = report.statistics or {}
    assert stop_of(plan).latest_s == report.objective * statistics["step_us"] / SECOND
    assert 26 < (stop_of(plan).latest_s or 0) < 27
    delta = sum(step.bytes for step in plan.steps if isinstance(step, CopyKvDelta) and step.source == "i1/0")
    assert delta == statistics["bytes_now"]


@pytest.mark.parametrize("memory_kib", [2000, 1400])
@pytest.mark.parametrize("remaining_s", [30.0, None])
def test_without_an_arranger_no_kv_moves(memory_kib: int, remaining_s: float | None) -> None:
    """Tests `discard`: live or in place, everybody is computed again, and weights come from GPUs all the same."""
    plan = planned(remaining_s, memory_kib=memory_kib, solver="discard")
    assert ("live" if memory_kib == 2000 else "in_place") == plan.mode
    assert not any(isinstance(step, CopyKv | CopyKvDelta) for step in plan.steps)
    assert "move" not in {action.action for action in plan.requests}
    assert sum(step.bytes for step in plan.steps if isinstance(step, CopyWeights)) > 0
    assert () == check_plan(plan)


def test_in_place_plan_leaves_time_for_all_of_its_bytes() -> None:
    """Tests that a plan that copies nothing before its stop has to stop earlier, by what weights and KV take."""
    plan = planned(30.0, memory_kib=1400)
    assert ("in_place", "all_kv") == (plan.mode, plan.fallback[0])
    latest_s = stop_of(plan).latest_s
    assert latest_s is not None
    crossing = [
        s for s in plan.steps if isinstance(s, CopyWeights | CopyKv | CopyKvDelta) and s.source != s.destination
    ]
    received = sum(step.bytes for step in crossing if step.destination == "i2/0")
    assert received > 1_000_000
    # The requests have ended by then, so that their KV no longer counts; a stop may be late by half of the margin.
    latest_s -= 1.5
    weights = sum(step.bytes for step in crossing if isinstance(step, CopyWeights) and step.destination == "i2/0")
    assert latest_s + weights / 1e6 <= 27.0 < latest_s + weights / 1e6 + 0.03
    assert received == (plan.solver["arrange"].statistics or {})["bytes_now"]
    assert () == check_plan(plan)


def test_in_place_plan_without_time_leaves_kv_behind() -> None:
    """Tests that no stop is chosen at which weights and KV would come too late: what stays is computed again."""
    plans = [planned(left, memory_kib=1400) for left in (1.9, 1.8, 1.0)]
    assert ["all_kv", "hottest_kv", "tokens_only"] == [plan.fallback[0] for plan in plans]
    assert [2, 1, 0] == [sum(one.action == "move" for one in plan.requests) for plan in plans]
    for plan in plans:
        assert ("in_place", "optimal") == (plan.mode, plan.solver["arrange"].status)
        assert () == check_plan(plan)


def test_plan_without_a_deadline_arranges_nothing() -> None:
    """Tests that there is no report, and no latest stop, if nobody hurries."""
    plan = planned(None)
    assert "arrange" not in plan.solver
    assert stop_of(plan).latest_s is None


def test_plan_just_in_time() -> None:
    """Tests that `paper` decodes until its formula's step and not a moment less, where `scan` stops once it can."""
    ours, theirs = planned(30.0), planned(30.0, solver="paper")
    assert 0.0 == stop_of(ours).not_before_s
    assert stop_of(theirs).not_before_s == stop_of(theirs).latest_s
    assert "paper" == theirs.solver["arrange"].name
    assert theirs.solver["arrange"].objective < ours.solver["arrange"].objective
    assert () == check_plan(theirs)
    with pytest.raises(SpecError, match="arrange solver 'scann' is not known"):
        planned(30.0, solver="scann")
