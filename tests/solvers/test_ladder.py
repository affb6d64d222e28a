"""Whose KV leaves in time: the LP against brute force, its prices as a proof, and what a planner makes of it."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace

import pytest

from spotserve.core.check import check_plan
from spotserve.core.plan import Plan
from spotserve.errors import SpecError
from spotserve.solvers.ladder import (
    MAX_VALUE,
    MIB,
    SELECTORS,
    Item,
    LadderProblem,
    Resource,
    Weights,
    keep_requests,
    price_bound,
)
from spotserve.solvers.planner import make_plan
from tests.planning_worlds import notice, request, running_problem, tiny_spec


def item(name: str, value_us: int, *uses: tuple[int, int], length: int = 1, lasting: bool = False) -> Item:
    """An item with so much of each resource."""
    return Item(name, value_us, uses, length, lasting)


def drawn(rng: random.Random, *, num_items: int, num_ports: int = 3, port_mib: int = 200) -> LadderProblem:
    """Requests whose value grows faster than their length, one source and one destination port each, one pool."""
    ports = [Resource(f"out i{n}", rng.randrange(port_mib) * MIB, 0) for n in range(num_ports)]
    ports += [Resource(f"in i{n}", rng.randrange(port_mib) * MIB, 100 * MIB) for n in range(num_ports)]
    items = []
    for number in range(num_items):
        tokens = rng.randint(16, 4096)
        value = 250 * tokens + tokens * tokens // 50
        source, destination = rng.randrange(num_ports), num_ports + rng.randrange(num_ports)
        num_bytes = tokens * 64 * 1024 + rng.randrange(1024)
        uses = ((source, num_bytes), (destination, num_bytes), (2 * num_ports, 1))
        items.append(Item(f"{number:05d}", value, uses, tokens))
    return LadderProblem(tuple(items), (*ports, Resource("sequences r1", num_items * 2 // 3)))


def best_value(problem: LadderProblem) -> int:
    """The most that any set of items is worth, by trying all of them."""
    best = 0
    for size in range(len(problem.items) + 1):
        for chosen in itertools.combinations(problem.items, size):
            room = [resource.capacity for resource in problem.resources]
            for one in chosen:
                for index, amount in one.uses:
                    room[index] -= amount
            if min(room) >= 0:
                best = max(best, sum(one.value_us for one in chosen))
    return best


def test_bound_and_choice_against_brute_force(rng: random.Random) -> None:
    """Tests that kept value <= optimum <= bound, that what is kept fits, and that often it is the optimum."""
    num_optimal = 0
    for _ in range(60):
        problem = drawn(rng, num_items=rng.randint(1, 9), num_ports=2)
        best = best_value(problem)
        for name in SELECTORS:
            result = keep_requests(problem, name)
            assert result.answer is not None
            room = [resource.capacity for resource in problem.resources]
            for one in problem.items:
                for index, amount in one.uses if one.name in result.answer.names else ():
                    room[index] -= amount
            assert min(room) >= 0
            worth = sum(one.value_us for one in problem.items if one.name in result.answer.names)
            assert worth == result.objective <= best <= result.bound
            assert (result.status == "optimal") == (result.objective == result.bound)
            num_optimal += name == "priced" and worth == best
    assert num_optimal >= 40


def test_priced_keeps_as_much_as_longest_first(rng: random.Random) -> None:
    """Tests that the priced choice is never worth less, sometimes more, and near the bound where requests are many."""
    num_better = 0
    for _ in range(20):
        problem = drawn(rng, num_items=300, num_ports=4, port_mib=8000)
        priced, longest = keep_requests(problem, "priced"), keep_requests(problem, "longest_first")
        assert priced.bound == longest.bound
        assert longest.objective <= priced.objective
        num_better += longest.objective < priced.objective
        assert priced.objective >= 0.97 * priced.bound
    assert num_better >= 10


def test_any_prices_bound_the_value(rng: random.Random) -> None:
    """Tests weak duality: whatever non-negative prices are set, no choice is worth more than the bound they give."""
    for _ in range(30):
        problem = drawn(rng, num_items=7, num_ports=2)
        prices = [rng.choice([0.0, rng.random() / 100]) for _ in problem.resources]
        assert best_value(problem) <= price_bound(problem, prices)


def test_all_that_fits_moves() -> None:
    """Tests that without a shortage everything moves, proven without prices."""
    result = keep_requests(
        LadderProblem((item("a", 5, (0, 3)), item("b", 7, (0, 4))), (Resource("out i0", 7, 0),)), "priced"
    )
    assert result.answer is not None
    assert ("a", "b") == result.answer.names
    assert ("optimal", 12, 12, {"kind": "all_fit", "requests": 2}) == (
        result.status,
        result.objective,
        result.bound,
        result.certificate,
    )


def test_one_coefficient_changes_who_moves() -> None:
    """Tests that value, bytes and capacity each change the choice, and that ties go to the longer one, then by name."""
    problem = LadderProblem(
        (item("a", 10, (0, 6 * MIB)), item("b", 9, (0, 6 * MIB))), (Resource("out i0", 8 * MIB, 0),)
    )
    a, b = problem.items
    assert ("a",) == _kept(problem)
    assert ("b",) == _kept(replace(problem, items=(a, replace(b, value_us=11))))
    assert ("b",) == _kept(replace(problem, items=(replace(a, uses=((0, 9 * MIB),)), b)))
    assert ("a", "b") == _kept(replace(problem, resources=(Resource("out i0", 12 * MIB, 0),)))
    assert ("b",) == _kept(replace(problem, items=(replace(a, value_us=9), replace(b, length=2))))
    assert ("a",) == _kept(replace(problem, items=(replace(a, value_us=9), b)))


def test_weights_that_are_due_go_first() -> None:
    """Tests that due weights take their room before any KV, and that too many of them leave no answer."""
    items = (item("a", 10, (0, 6)), item("b", 9, (0, 6)))
    port = (Resource("out i0", 14, 0),)
    assert ("a",) == _kept(LadderProblem(items, port, (Weights(8, (0,)),)))
    result = keep_requests(LadderProblem(items, port, (Weights(15, (0,)),)), "priced")
    assert (None, "infeasible", "out i0") == (result.answer, result.status, result.certificate["resource"])


def test_kv_goes_before_weights_that_storage_has() -> None:
    """Tests both intervals: KV takes the doomed port, weights wait for storage, and the tail is as long as that."""
    items = (item("a", 10, (0, 60 * MIB)), item("b", 10, (0, 40 * MIB)))
    port = (Resource("out i0", 100 * MIB, 0),)
    weights = (Weights(50 * MIB, (0,), storage=0),)
    result = keep_requests(LadderProblem(items, port, weights, storage_per_s=(10 * MIB,)), "priced")
    assert result.answer is not None
    assert ("a", "b") == result.answer.names
    assert 5.0 == pytest.approx(result.statistics["tail_s"], abs=1e-4)


def test_survivors_send_after_the_deadline() -> None:
    """Tests that what survivors hold crosses later and is not lost, while a doomed port's KV is."""
    ports = (Resource("out i0", 10 * MIB, 0), Resource("out i1", 10 * MIB, 5 * MIB))
    items = (
        item("doomed", 10, (0, 20 * MIB)),
        item("late", 10, (1, 30 * MIB), lasting=True),
        item("in time", 10, (0, 10 * MIB)),
    )
    weights = (Weights(15 * MIB, (1,), storage=None, lasting=True),)
    result = keep_requests(LadderProblem(items, ports, weights), "priced")
    assert result.answer is not None
    assert ("late", "in time") == result.answer.names
    assert (45 - 10) / 5 == pytest.approx(result.statistics["tail_s"], abs=1e-3)


def test_more_room_never_keeps_less(rng: random.Random) -> None:
    """Tests that the bound grows with any capacity and with any value."""
    for _ in range(20):
        problem = drawn(rng, num_items=40)
        before = keep_requests(problem, "priced").bound
        wider = tuple(replace(resource, capacity=2 * resource.capacity) for resource in problem.resources)
        # Prices are the LP solver's, so the bound is tight to its tolerance.
        assert keep_requests(replace(problem, resources=wider), "priced").bound >= before * (1 - 1e-6)
        dearer = tuple(replace(one, value_us=2 * one.value_us) for one in problem.items)
        assert 2 * before == pytest.approx(keep_requests(replace(problem, items=dearer), "priced").bound, rel=1e-6)


def test_values_beyond_a_double_are_refused() -> None:
    """Tests the guard of the LP's doubles."""
    problem = LadderProblem((item("a", MAX_VALUE - 1, (0, 6)), item("b", 1, (0, 6))), (Resource("out i0", 8, 0),))
    with pytest.raises(SpecError, match="cannot be summed exactly"):
        keep_requests(problem, "priced")


def _kept(problem: LadderProblem) -> tuple[str, ...]:
    answer = keep_requests(problem, "priced").answer
    assert answer is not None
    return answer.names


def hurried(remaining_s: float, *, solver: str = "priced") -> Plan:
    """A replica of eight requests between 3 and 180 tokens is doomed; its whole KV needs 0.7 s at 1 MB/s."""
    problem = running_problem(
        tiny_spec(link_bytes_per_s=1e6, max_running=16, solvers={"ladder": solver}),
        shape=(2, 2, 1),
        memory_bytes=5 * MIB,
        trigger=notice("i2", remaining_s=remaining_s),
        requests_each=0,
        kv_blocks=100,
    )
    old = problem.snapshot.world.replicas[1]
    requests = tuple(request(n, old, tokens=tokens) for n, tokens in enumerate((3, 20, 60, 90, 120, 180, 30, 10)))
    snapshot = problem.snapshot.model_copy(update={"requests": requests})
    return make_plan(problem.model_copy(update={"snapshot": snapshot}))


def fates(plan: Plan) -> str:
    """m(ove), f(inish) or r(ecompute) of each request."""
    return "".join(action.action[0] for action in plan.requests)


def test_plan_keeps_what_is_worth_most() -> None:
    """Tests a plan's rungs: all move, then those about to end finish and the rest moves, then only the longest."""
    plans = {left: hurried(left) for left in (30.0, 1.2, 0.5, 0.0)}
    assert ["mmmmmmmm", "mmmfffmm", "rrrrmfrr", "rrrrrrrr"] == [fates(plan) for plan in plans.values()]
    assert ["all_kv", "hottest_kv", "hottest_kv", "tokens_only"] == [plan.fallback[0] for plan in plans.values()]
    assert all(() == check_plan(plan) for plan in plans.values())
    report = plans[0.5].solver["ladder"]
    assert ("priced", "feasible") == (report.name, report.status)
    assert 0 < report.objective < report.bound
    assert (report.certificate or {})["kind"] == "prices"
    assert "ladder" not in plans[0.0].solver


def test_plan_moves_more_with_more_time() -> None:
    """Tests that fewer requests are computed again as the grace period grows, whatever the solver."""
    for solver in SELECTORS:
        again = [fates(hurried(left, solver=solver)).count("r") for left in (0.3, 0.5, 0.7, 0.9, 1.2, 2.0)]
        assert again == sorted(again, reverse=True)
        assert 0 == again[-1]


def test_plan_takes_the_solver_that_is_named() -> None:
    """Tests that the ladder's solver is chosen by name, reported, and refused if unknown."""
    assert "longest_first" == hurried(0.5, solver="longest_first").solver["ladder"].name
    with pytest.raises(SpecError, match="ladder solver 'cheapest' is not known"):
        hurried(0.5, solver="cheapest")
