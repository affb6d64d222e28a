"""The cases under plans/: worked examples and golden tests at once. And the schemas that describe their files."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import jsonschema
import pytest

from spotserve.cli.main import run_verb

CHECKOUT = Path(__file__).resolve().parent.parent
CASES = sorted(path.parent for path in (CHECKOUT / "plans").glob("*/spec.toml"))
FILES = {"README.md", "event.json", "expected-plan.json", "snapshot.json", "spec.toml"}


def script(name: str) -> ModuleType:
    """A script of the examples folder, imported."""
    specification = importlib.util.spec_from_file_location(name, CHECKOUT / "examples" / f"{name}.py")
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


SCHEMAS = script("write_schemas")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_case_gives_its_expected_plan(case: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Tests that `spotserve plan CASE` writes expected-plan.json to the byte, with 4 only where nothing fits."""
    code = run_verb(["plan", str(case), "--json"])
    assert capsys.readouterr().out == (case / "expected-plan.json").read_text(encoding="utf-8")
    assert code == (4 if case.name == "last-instance" else 0)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_case_is_whole_and_valid(case: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Tests that a case has its five files and its plan passes the checker and its schema."""
    assert {path.name for path in case.iterdir()} == FILES
    assert run_verb(["verify", str(case / "expected-plan.json")]) == 0
    assert capsys.readouterr().out == "ok\n"
    for name, schema in (("expected-plan", "plan"), ("snapshot", "snapshot"), ("event", "event")):
        jsonschema.validate(loaded(case / f"{name}.json"), loaded(CHECKOUT / "schemas" / f"{schema}.schema.json"))


@pytest.mark.parametrize("policy", ["live", "reroute", "reparallelize"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_policy_plans_every_case(case: Path, policy: str, tmp_path: Path) -> None:
    """Tests that each policy answers each case with a plan that the checker accepts."""
    out = tmp_path / "plan.json"
    assert run_verb(["plan", str(case), "--policy", policy, "--out", str(out)]) in (0, 4)
    assert run_verb(["verify", str(out)]) == 0


@pytest.mark.parametrize("name", sorted(SCHEMAS.SCHEMAS))
def test_schemas_are_those_of_the_models(name: str) -> None:
    """Tests that schemas/ is what examples/write_schemas.py writes."""
    expected = SCHEMAS.schema_text(SCHEMAS.SCHEMAS[name])
    assert expected == (CHECKOUT / "schemas" / f"{name}.schema.json").read_text(encoding="utf-8")


def loaded(path: Path) -> Any:
    """A JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))
