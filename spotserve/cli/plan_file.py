"""Plan files and cases on disk: read within bounds, refused with one clear line."""

from __future__ import annotations

import os
import stat
import tomllib
from pathlib import Path
from typing import Any, TypeVar

from spotserve.core.check import misfits, read_plan
from spotserve.core.finding import Finding
from spotserve.core.frozen import Frozen
from spotserve.core.plan import Plan, PlanningProblem, Trigger
from spotserve.core.snapshot import Snapshot
from spotserve.core.spec import Profile, ServingSpec
from spotserve.core.strict_json import MAX_DEPTH, MAX_FILE_BYTES, JsonFaultError, read_as, refuse_large_numbers, shaped
from spotserve.errors import PlanRefusedError, SpecError
from spotserve.sim.scenario import ScenarioFile

MAX_TOML_BYTES = 4 * 1024 * 1024
"""A parameter table takes kilobytes, and the TOML parser some hundred times the memory of its file."""

HINTS: dict[type, str] = {
    Snapshot: "spotserve snapshot prints a running daemon's; schemas/snapshot.schema.json describes it",
    ServingSpec: "spotserve snapshot --spec prints a running daemon's; schemas/spec.schema.json describes it",
    Profile: "spotserve profile --out writes one; schemas/profile.schema.json describes it",
    Trigger: "schemas/event.schema.json describes it",
    ScenarioFile: "examples/scenarios has some; schemas/scenario.schema.json describes it",
}

F = TypeVar("F", bound=Frozen)


def read_bytes(path: Path, *, what: str, max_bytes: int = MAX_FILE_BYTES) -> bytes:
    """The bytes of a regular file, one more than `max_bytes` at most; a pipe is refused, as it may never end."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(descriptor, "rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            if not stat.S_ISREG(mode):
                kind = "a directory" if stat.S_ISDIR(mode) else "not a regular file"
                raise SpecError(f"{what} {path} cannot be read: it is {kind}", hint="give a file on disk")
            return file.read(max_bytes + 1)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise SpecError(f"{what} {path} cannot be read: {reason}") from error


def plan_of(path: Path) -> Plan:
    """The plan in a file. Raises PlanRefusedError if it is none."""
    return plan_in(read_bytes(path, what="FILE"), path)


def plan_in(data: bytes, path: Path) -> Plan:
    """The plan that a file's bytes are. Raises PlanRefusedError if they are none."""
    plan = read_plan(data)
    if isinstance(plan, Finding):
        raise PlanRefusedError(
            f"{path}: {plan.line()}", hint="spotserve plan --out writes plans; schemas/plan.schema.json describes them"
        )
    return plan


def spec_of(path: Path, *, what: str) -> ServingSpec:
    """A serving spec from TOML or, by its suffix, JSON."""
    if path.suffix == ".json":
        return model_of(ServingSpec, path, what=what)
    return toml_of(ServingSpec, path, what=what)


def toml_of(kind: type[F], path: Path, *, what: str) -> F:
    """A frozen value from a TOML file."""
    table = toml_table(path, what=what, hint=HINTS.get(kind))
    try:
        return shaped(kind, table)
    except JsonFaultError as fault:
        raise _malformed(what, path, fault, HINTS.get(kind)) from fault


def toml_table(path: Path, *, what: str, hint: str | None = None) -> dict[str, Any]:
    """What a TOML file says, its numbers not beyond those of JSON."""
    data = read_bytes(path, what=what, max_bytes=MAX_TOML_BYTES)
    try:
        if len(data) > MAX_TOML_BYTES:
            raise JsonFaultError("", f"it is larger than {MAX_TOML_BYTES} bytes")
        table = tomllib.loads(data.decode("utf-8"))
        refuse_large_numbers(table)
        return table
    except JsonFaultError as fault:
        raise _malformed(what, path, fault, hint) from fault
    except RecursionError as error:
        raise SpecError(f"{what} {path} is not TOML: nesting exceeds {MAX_DEPTH} levels", hint=hint) from error
    except ValueError as error:  # Not TOML, not UTF-8, or a number of too many digits.
        raise SpecError(f"{what} {path} is not TOML: {error}", hint=hint) from error


def model_of(kind: type[F], path: Path, *, what: str) -> F:
    """A frozen value from a JSON file."""
    try:
        return read_as(kind, read_bytes(path, what=what))
    except JsonFaultError as fault:
        raise _malformed(what, path, fault, HINTS.get(kind)) from fault


def require_fit(problem: PlanningProblem) -> None:
    """Raise SpecError with the JSON path of the first thing in snapshot or event that does not fit the spec."""
    wrong = next(misfits(problem), None)
    if wrong is not None:
        told = Finding(code=wrong.code, path=wrong.path, message=wrong.message).line().split(" ", 2)[2]
        raise SpecError(f"spec, snapshot and event do not fit: {told}", hint="take all of them from one daemon")


def _malformed(what: str, path: Path, fault: JsonFaultError, hint: str | None) -> SpecError:
    return SpecError(f"{what} {path} is malformed at {fault.path or 'file'}: {fault.message}", hint=hint)
