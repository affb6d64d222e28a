"""Plan files and cases on disk: read within bounds, refused with one clear line."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import TypeVar

from pydantic import ValidationError

from spotserve.core.check import MAX_PLAN_BYTES, read_plan
from spotserve.core.finding import Finding
from spotserve.core.frozen import Frozen
from spotserve.core.plan import Plan
from spotserve.core.spec import ServingSpec
from spotserve.errors import PlanRefusedError, SpecError

F = TypeVar("F", bound=Frozen)


def read_bytes(path: Path, *, what: str) -> bytes:
    """The bytes of a file, one more than any plan may have at most."""
    try:
        with path.open("rb") as file:
            return file.read(MAX_PLAN_BYTES + 1)
    except OSError as error:
        raise SpecError(f"{what} {path} cannot be read: {error.strerror}") from error


def plan_of(path: Path) -> Plan:
    """The plan in a file. Raises PlanRefusedError if it is none."""
    plan = read_plan(read_bytes(path, what="FILE"))
    if isinstance(plan, Finding):
        raise PlanRefusedError(f"{path}: {plan.line()}", hint="spotserve verify lists every finding")
    return plan


def spec_of(path: Path, *, what: str) -> ServingSpec:
    """A serving spec from TOML or, by its suffix, JSON."""
    if path.suffix == ".json":
        return model_of(ServingSpec, path, what=what)
    try:
        raw = tomllib.loads(read_bytes(path, what=what).decode("utf-8"))
        return ServingSpec.model_validate(raw)
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SpecError(f"{what} {path} is not TOML: {error}") from error
    except ValidationError as error:
        raise _malformed(what, path, error) from error


def model_of(kind: type[F], path: Path, *, what: str) -> F:
    """A frozen value from a JSON file."""
    try:
        return kind.model_validate_json(read_bytes(path, what=what))
    except ValidationError as error:
        raise _malformed(what, path, error) from error


def _malformed(what: str, path: Path, error: ValidationError) -> SpecError:
    first = error.errors(include_url=False, include_input=False)[0]
    where = ".".join(str(part) for part in first["loc"]) or "file"
    return SpecError(f"{what} {path} is malformed at {where}: {first['msg']}")
