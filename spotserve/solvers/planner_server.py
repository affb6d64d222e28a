"""The planner process: one PlanningProblem per line on stdin, one line with its plan or an error on stdout.

OR-Tools' graph solvers hold the GIL, so `python -m spotserve.solvers.planner_server` keeps them out of the coordinator
(`planner_process` is its end).
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

from pydantic import ValidationError

from spotserve.core.canonical import canonical_json
from spotserve.core.plan import PlanningProblem
from spotserve.errors import SpecError, SpotServeError
from spotserve.solvers.planner import make_plan

MAX_LINE_BYTES = 64 * 1024 * 1024


@contextmanager
def uncollected() -> Iterator[None]:
    """No garbage collection inside: a plan is many thousands of values that stay, and looking through them takes a
    quarter of the time of making them."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def answer(line: str) -> str:
    """One line of the planner process's protocol: a problem in, `{"plan": …}` or `{"error": …}` out."""
    try:
        with uncollected():
            problem = PlanningProblem.model_validate_json(line)
            return canonical_json({"plan": make_plan(problem).model_dump(mode="json")})
    except ValidationError as error:
        failure: SpotServeError = SpecError(
            f"planning problem is malformed: {error.errors(include_url=False)[0]['msg']}"
        )
    except SpotServeError as error:
        failure = error
    return canonical_json({"error": {"code": failure.code, "message": failure.message, "hint": failure.hint}})


def serve(requests: TextIO, answers: TextIO) -> None:
    """Answer problems until the input ends."""
    while line := requests.readline(MAX_LINE_BYTES):
        if line.strip():
            answers.write(answer(line))
            answers.flush()


if __name__ == "__main__":
    gc.freeze()
    serve(sys.stdin, sys.stdout)
