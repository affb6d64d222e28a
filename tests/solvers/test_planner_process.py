"""The coordinator's end of the planner process: an answer is decoded without holding up the loop."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from pydantic import ValidationError

from spotserve.solvers import planner_process
from spotserve.solvers.planner import make_plan
from spotserve.solvers.planner_process import decode_plan
from tests.planning_worlds import notice, running_problem, tiny_spec

MIB = 1024 * 1024


def example() -> dict[str, Any]:
    """A plan's JSON, of some dozen steps."""
    problem = running_problem(tiny_spec(), shape=(2, 2, 1), memory_bytes=3 * MIB, trigger=notice("i2"))
    raw: dict[str, Any] = json.loads(make_plan(problem).model_dump_json())
    return raw


@pytest.mark.parametrize("at_once", [1, 3, 1000])
def test_decoded_in_pieces_it_is_the_same_plan(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests that a plan decoded a few steps at a time is the plan, byte for byte, and that the loop had its turns."""
    monkeypatch.setattr(planner_process, "STEPS_AT_ONCE", at_once)
    raw = example()
    turns = 0

    async def decode() -> str:
        nonlocal turns
        task = asyncio.ensure_future(decode_plan(raw))
        while not task.done():
            turns += 1
            await asyncio.sleep(0)
        return task.result().model_dump_json()

    assert json.loads(asyncio.run(decode())) == raw
    assert turns >= len(raw["steps"]) // at_once


@pytest.mark.parametrize(
    "broken",
    [
        lambda raw: {**raw, "steps": [*raw["steps"][:-1], {"kind": "nonsense"}]},
        lambda raw: {**raw, "steps": "none"},
        lambda raw: {**raw, "epoch": 3},
        lambda raw: [raw],
    ],
)
def test_what_is_no_plan_is_refused(broken: Any) -> None:
    """Tests that a wrong step, steps that are no list, another wrong field and another type are all refused."""
    with pytest.raises(ValidationError):
        asyncio.run(decode_plan(broken(example())))
