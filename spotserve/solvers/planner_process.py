"""The planner as a process of its own: OR-Tools' graph solvers hold the GIL, and no solver may block a heartbeat.

JSON lines in and out (`planner_server` is the other end). A planner that dies is started again for the next
problem; one that does not answer in time is killed. No ortools here.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from typing import Any

from pydantic import TypeAdapter

from spotserve.core.plan import Plan, PlanningProblem, Step
from spotserve.errors import SpotServeError

SOLVE_TIMEOUT_S = 30.0
MAX_ANSWER_BYTES = 256 * 1024 * 1024


STEPS: TypeAdapter[tuple[Step, ...]] = TypeAdapter(tuple[Step, ...])
STEPS_AT_ONCE = 200
"""Steps that are validated before the loop has its turn again: a few milliseconds."""


class PlannerError(SpotServeError):
    """The planner process refused a problem, died, or did not answer in time."""

    code = "SPS-181"


async def decode_plan(raw: Any) -> Plan:
    """A plan from parsed JSON (hence `Any`), a few steps at a time: ten thousand at once hold a heartbeat up for a
    second. Raises ValidationError.
    """
    steps = raw.get("steps") if isinstance(raw, dict) else None
    if not isinstance(steps, list):
        return Plan.model_validate(raw)
    plan = Plan.model_validate({**raw, "steps": ()})
    decoded: list[Step] = []
    for start in range(0, len(steps), STEPS_AT_ONCE):
        decoded += STEPS.validate_python(steps[start : start + STEPS_AT_ONCE])
        await asyncio.sleep(0)
    return plan.model_copy(update={"steps": tuple(decoded)})


class PlannerProcess:
    """One warm planner; problems are answered one after the other."""

    def __init__(self) -> None:
        self._process: asyncio.subprocess.Process | None = None
        self._lock = asyncio.Lock()

    async def start(self) -> None:
        """Start the process; it warms up while others do too."""
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self._process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "spotserve.solvers.planner_server",
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            env=environment,
            limit=MAX_ANSWER_BYTES,
            start_new_session=True,
        )

    async def solve(self, problem: PlanningProblem) -> Plan:
        """The plan for a problem. Raises PlannerError."""
        async with self._lock:
            line = await self._exchange(problem.model_dump_json().encode() + b"\n")
            try:
                answer = json.loads(line)
                if "error" not in answer:
                    return await decode_plan(answer["plan"])
            except ValueError as error:
                # Whatever else it says may be as wrong.
                await self.close()
                raise PlannerError(f"planner's answer is not a plan: {str(error).splitlines()[0]}") from error
        raise PlannerError(str(answer["error"]["message"]), hint=answer["error"].get("hint"))

    async def _exchange(self, line: bytes) -> bytes:
        if self._process is None or self._process.returncode is not None:
            await self.start()
        process = self._process
        assert process is not None
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(line)
            async with asyncio.timeout(SOLVE_TIMEOUT_S):
                await process.stdin.drain()
                answer = await process.stdout.readline()
        except (TimeoutError, ConnectionError, ValueError) as error:
            await self.close()
            raise PlannerError(f"planner did not answer within {SOLVE_TIMEOUT_S:g} s: {error!r}") from error
        if not answer:
            await self.close()
            raise PlannerError("planner process ended without an answer")
        return answer

    async def close(self) -> None:
        """End the process."""
        process, self._process = self._process, None
        if process is None:
            return
        if process.returncode is None:
            process.kill()
        await process.wait()
