"""Real plans, spoiled in every way that `plan_mutations` knows: each is refused with its own code."""

from __future__ import annotations

import copy
import json
import random
from pathlib import Path

import pytest

from spotserve.core.canonical import canonical_json
from spotserve.core.check import verify
from spotserve.solvers.planner import make_plan
from tests.core.plan_mutations import MUTATIONS, Mutation, Raw
from tests.planning_worlds import random_problem

PLANS = Path(__file__).resolve().parents[2] / "plans"
NUM_WORLDS = 80
MOST = 6
LEAST = 2
"""Plans that each mutation must have spoiled, or the test is about nothing."""

RARE = {"moved_and_recomputed"}
"""What few random worlds have room for."""


@pytest.fixture(scope="module", name="plans")
def plans_of_the_run(seed: int) -> list[Raw]:
    """`made_plans` of this run's seed."""
    return made_plans(seed)


def made_plans(seed: int) -> list[Raw]:
    """Plans of the worked cases and of random worlds that have steps, live and in_place; each of them accepted."""
    made = [json.loads((case / "expected-plan.json").read_text()) for case in sorted(PLANS.iterdir())]
    made += [json.loads(canonical_json(make_plan(random_problem(1000 * seed + one)))) for one in range(NUM_WORLDS)]
    assert [()] * len(made) == [verify(canonical_json(plan).encode()) for plan in made]
    small = [plan for plan in made if plan["steps"] and len(plan["steps"]) < 80]
    assert {"live", "in_place"} == {plan["mode"] for plan in small}
    return sorted(small, key=lambda plan: len(plan["steps"]))


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_each_fault_has_its_code(mutation: Mutation, plans: list[Raw], rng: random.Random) -> None:
    """Tests that a plan with one fault is refused with the code of that fault, on as many real plans as have room."""
    spoiled = spoiled_plans(mutation, plans, rng)
    assert len(spoiled) >= (1 if mutation.name in RARE else LEAST)
    for data in spoiled:
        found = verify(data)
        assert mutation.code in {finding.code for finding in found}, [finding.line() for finding in found[:5]]


def spoiled_plans(mutation: Mutation, plans: list[Raw], rng: random.Random) -> list[bytes]:
    """The first plans that a mutation can spoil, spoiled."""
    files: list[bytes] = []
    for plan in plans:
        data = copy.deepcopy(plan)
        if len(files) < MOST and mutation.spoil(data, rng):
            files.append(canonical_json(data).encode())
    return files


def test_whole_plans_pass(plans: list[Raw]) -> None:
    """Tests that plans that nobody has spoiled are accepted."""
    assert [()] * len(plans) == [verify(canonical_json(plan).encode()) for plan in plans]


def test_every_code_has_a_mutation() -> None:
    """Tests that the table spoils plans in a way for each code of the contract."""
    codes = "coverage_hole double_owner not_a_holder over_memory cycle duplicate_step missing_step wrong_order"
    assert {*codes.split(), "past_deadline", "stale", "corrupt", "bad_version"} == {one.code for one in MUTATIONS}
