"""The whole way of a plan file by the command line: snapshot, plan, verify, apply; and the files that are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from spotserve.core.plan import CopyWeights, LoadWeights, Plan
from spotserve.core.slices import Slice
from tests.e2e.conftest import TinyModel
from tests.e2e.daemon import UNHURRIED, RunningDaemon, running
from tests.e2e.history import last_run
from tests.e2e.models import NUM_TOKENS

pytestmark = pytest.mark.e2e

FILE_REFUSED = 5
STATUS_KEYS = {
    "": {"format_version", "state", "epoch", "parallel", "replicas", "instances", "requests", "migrations"},
    "parallel": {"data", "pipeline", "tensor"},
    "replicas": {"id", "generation", "tensor", "stages"},
    "instances": {"id", "state", "gpus", "market"},
    "requests": {"running", "queued", "finished", "failed", "cancelled"},
    "migrations": {
        "epoch",
        "trigger",
        "mode",
        "outcome",
        "estimated_s",
        "stall_ms_max",
        "weight_bytes",
        "kv_bytes",
        "recomputed_tokens",
    },
}


def printed(daemon: RunningDaemon, *args: str) -> str:
    """What a verb prints when it succeeds."""
    done = daemon.cli(*args)
    assert done.returncode == 0, done.stderr
    return done.stdout


def plan_losing(daemon: RunningDaemon, instance: str, folder: Path) -> Path:
    """A plan file for the loss of an instance, made from the running daemon's snapshot."""
    spec, snapshot, plan = folder / "spec.json", folder / "snapshot.json", folder / "plan.json"
    spec.write_text(printed(daemon, "snapshot", "--spec"))
    snapshot.write_text(printed(daemon, "snapshot"))
    files = ["--spec", str(spec), "--snapshot", str(snapshot)]
    printed(daemon, "plan", *files, "--lose", instance, "--grace", "60", "--out", str(plan))
    return plan


def assert_refused(daemon: RunningDaemon, plan: Path, word: str) -> None:
    """`apply` exits with 5 and says why, and the daemon has done nothing."""
    before = daemon.status()
    done = daemon.cli("apply", str(plan))
    assert (FILE_REFUSED, True) == (done.returncode, word in done.stderr), done.stderr
    after = daemon.status()
    assert (before["epoch"], before["replicas"]) == (after["epoch"], after["replicas"])


def assert_keys(status: dict[str, Any]) -> None:
    """Every key that scripts rely on is there, and no other."""
    assert STATUS_KEYS[""] == set(status)
    for name, keys in STATUS_KEYS.items():
        if name:
            parts = status[name] if isinstance(status[name], list) else [status[name]]
            assert parts
            assert all(keys == set(part) for part in parts)
    assert all({"gpus", "layers"} == set(stage) for replica in status["replicas"] for stage in replica["stages"])


def test_plan_file_from_snapshot_to_released(
    tmp_path: Path, small: TinyModel, small_environment: dict[str, str]
) -> None:
    """Tests that a verified plan of the running daemon is applied live with exact streams, once, and no other file."""
    args = [str(small.folder), "--gpu-memory", "24MiB", "--instances", "4", "-dp", "1", "-pp", "3", "-tp", "1"]
    with running(tmp_path / "state", *args, env={**small_environment, **UNHURRIED}) as daemon:
        gone = daemon.status()["replicas"][0]["stages"][1]["gpus"][0].split("/")[0]
        seen = [daemon.stream(ids, max_tokens=NUM_TOKENS) for ids in small.prompt_ids[:2]]
        plan = plan_losing(daemon, gone, tmp_path)
        assert "ok\n" == printed(daemon, "verify", str(plan))
        # Requests that the plan has not seen follow its routes.
        streams = small.stream_all(daemon, NUM_TOKENS)
        for stream in streams:
            stream.wait_tokens(1)
        applied = json.loads(printed(daemon, "apply", str(plan)))
        made = json.loads(plan.read_text())
        assert {"epoch": made["epoch"]["to"], "outcome": "completed"} == applied
        assert small.expected(NUM_TOKENS) == [stream.wait() for stream in streams]
        assert small.expected(NUM_TOKENS)[:2] == [stream.wait() for stream in seen]
        assert {1, made["epoch"]["to"]} == {row[4] for stream in streams for row in daemon.ledger_rows(stream.request)}

        status = json.loads(printed(daemon, "status", "--json"))
        assert_keys(status)
        assert made["epoch"]["to"] == status["epoch"]
        used = {gpu for replica in status["replicas"] for stage in replica["stages"] for gpu in stage["gpus"]}
        assert f"{gone}/0" not in used
        line = status["migrations"][-1]
        assert ("notice", "live", "completed", 0) == (
            line["trigger"],
            line["mode"],
            line["outcome"],
            line["recomputed_tokens"],
        )
        assert line["kv_bytes"] > 0

        assert_refused(daemon, plan, "stale")
        garbage = tmp_path / "garbage.json"
        garbage.write_text("{plan}")
        assert_refused(daemon, garbage, "corrupt")
        garbage.write_text('{"format_version": "0.1"}')
        assert_refused(daemon, garbage, "corrupt - epoch: field required")
        assert small.expected(30) == [stream.wait() for stream in small.stream_all(daemon, 30)]


def weight_steps(plan: Plan) -> list[tuple[str, str | None, tuple[str, ...], int, tuple[Slice, ...]]]:
    """Who gets which weights from where, in the plan's order."""
    return [
        (
            step.kind,
            step.source if isinstance(step, CopyWeights) else None,
            (step.destination,) if isinstance(step, CopyWeights) else step.workers,
            step.bytes,
            step.slices,
        )
        for step in plan.steps
        if isinstance(step, CopyWeights | LoadWeights)
    ]


def test_a_dry_run_foretells_the_event(tmp_path: Path, small: TinyModel, small_environment: dict[str, str]) -> None:
    """Tests that a notice leads to the target, the routes and the weight steps that the dry run before it printed."""
    args = [str(small.folder), "--gpu-memory", "24MiB", "--instances", "5", "-dp", "2", "-pp", "2", "-tp", "1"]
    with running(tmp_path / "state", *args, env={**small_environment, **UNHURRIED}) as daemon:
        gone = daemon.status()["replicas"][1]["stages"][1]["gpus"][0].split("/")[0]
        streams = small.stream_all(daemon, NUM_TOKENS)
        for stream in streams:
            stream.wait_tokens(1)
        foretold = Plan.model_validate_json(plan_losing(daemon, gone, tmp_path).read_text())
        printed(daemon, "notice", gone, "--grace", "60")
        daemon.wait_for(lambda: daemon.status()["epoch"] == foretold.epoch.to, "the plan's epoch")
        done = last_run(daemon).plan
        assert small.expected(NUM_TOKENS) == [stream.wait() for stream in streams]
        assert (foretold.target, foretold.routes, foretold.mode) == (done.target, done.routes, done.mode)
        assert weight_steps(foretold)
        assert weight_steps(foretold) == weight_steps(done)


def test_plan_for_another_world_is_refused(tmp_path: Path, small: TinyModel, small_environment: dict[str, str]) -> None:
    """Tests that a plan for a later epoch, for a world that has changed, or with a forged step is refused."""
    args = [str(small.folder), "--gpu-memory", "24MiB", "--instances", "3", "-dp", "1", "-pp", "2", "-tp", "1"]
    with running(tmp_path / "state", *args, env=small_environment) as daemon:
        gone = daemon.status()["replicas"][0]["stages"][0]["gpus"][0].split("/")[0]
        plan = plan_losing(daemon, gone, tmp_path)
        made = json.loads(plan.read_text())

        other = tmp_path / "other.json"
        other.write_text(json.dumps({**made, "epoch": {"from": 7, "to": 8}}))
        assert_refused(daemon, other, "stale")
        other.write_text(json.dumps({**made, "steps": [step for step in made["steps"] if step["kind"] != "commit"]}))
        assert_refused(daemon, other, "missing_step")

        spare = daemon.admin("add-instance")["instance"]
        daemon.wait_for(
            lambda: {i["id"]: i["state"] for i in daemon.status()["instances"]}[spare] == "ready", "spare ready"
        )
        assert_refused(daemon, plan, "stale")
