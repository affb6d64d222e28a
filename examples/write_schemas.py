"""Writes the JSON Schemas of every file that SpotServe reads or writes from the models themselves.

    python examples/write_schemas.py schemas

A test fails when a schema and its model differ.
"""

import json
import sys
from pathlib import Path

from pydantic import BaseModel

from spotserve.cloud.traces import TraceFile
from spotserve.core.finding import Finding
from spotserve.core.plan import Plan, PlanningProblem, Trigger
from spotserve.core.snapshot import Snapshot
from spotserve.core.spec import Profile, ServingSpec
from spotserve.sim.comparison import Comparison
from spotserve.sim.scenario import ScenarioFile
from spotserve.sim.workloads import WorkloadFile

SCHEMAS: dict[str, type[BaseModel]] = {
    "plan": Plan,
    "planning-problem": PlanningProblem,
    "profile": Profile,
    "snapshot": Snapshot,
    "spec": ServingSpec,
    "event": Trigger,
    "finding": Finding,
    "trace": TraceFile,
    "workload": WorkloadFile,
    "scenario": ScenarioFile,
    "simulation": Comparison,
}


def schema_text(model: type[BaseModel]) -> str:
    """The schema of a model, as its file has it."""
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", **model.model_json_schema(by_alias=True)}
    return json.dumps(schema, indent=1, sort_keys=True) + "\n"


def main(folder: Path) -> None:
    """Write every schema."""
    for name, model in SCHEMAS.items():
        (folder / f"{name}.schema.json").write_text(schema_text(model), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
