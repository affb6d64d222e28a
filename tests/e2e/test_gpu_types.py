"""A fleet of two GPU types: what the workers say they are decides the layout, before and after a notice."""

from __future__ import annotations

from pathlib import Path

import pytest

from spotserve.core.canonical import canonical_json
from spotserve.core.snapshot import Replica, Snapshot, World
from spotserve.runtime.profiles import cache_name, read_profile
from tests.e2e.conftest import TinyModel
from tests.e2e.daemon import UNHURRIED, RunningDaemon, running
from tests.e2e.history import last_run
from tests.e2e.models import NUM_TOKENS

pytestmark = pytest.mark.e2e

SLOWDOWN = 3


def write_slow_profile(folder: Path, environment: dict[str, str], path: Path) -> None:
    """The profile of a type that is called `slow` and takes three times as long as the daemon's own."""
    kept = read_profile(Path(environment["SPOTSERVE_PROFILE_CACHE"]) / cache_name(folder, device="cpu", dtype=None))
    assert kept is not None
    slower = tuple(point.model_copy(update={"layer_ms": SLOWDOWN * point.layer_ms}) for point in kept.latencies)
    path.write_text(canonical_json(kept.model_copy(update={"device": "slow", "latencies": slower})))


def world_seen(daemon: RunningDaemon) -> World:
    """The world of the daemon's snapshot."""
    done = daemon.cli("snapshot")
    assert done.returncode == 0, done.stderr
    return Snapshot.model_validate_json(done.stdout).world


def layers_by_type(world: World, replica: Replica) -> list[tuple[str, int]]:
    """(type of its GPU, number of layers) of each stage, slow ones first."""
    return sorted(
        (world.gpu_types.get(stage.gpus[0], ""), stage.layers[1] - stage.layers[0]) for stage in replica.stages
    )[::-1]


def test_two_types_through_a_notice(tmp_path: Path, small: TinyModel, small_environment: dict[str, str]) -> None:
    """Tests that layers are dealt by the speed of each GPU's type, and anew at a notice, and that streams are exact."""
    profile = tmp_path / "slow.json"
    write_slow_profile(small.folder, small_environment, profile)
    args = [str(small.folder), "--gpu-memory", "24MiB", "--instances", "4", "-dp", "1", "-pp", "3", "-tp", "1"]
    args += ["--gpu-profile", str(profile), "--gpu-types", "own,own,slow,slow"]
    with running(tmp_path / "state", *args, env={**small_environment, **UNHURRIED}) as daemon:
        status = daemon.status()
        assert [["cpu"], ["cpu"], ["slow"], ["slow"]] == [one["gpu_types"] for one in status["instances"]]
        before = world_seen(daemon)
        assert {"i2/0": "slow", "i3/0": "slow"} == dict(before.gpu_types)
        assert [("slow", 1), ("", 3), ("", 3)] == layers_by_type(before, before.replicas[0])

        streams = small.stream_all(daemon, NUM_TOKENS)
        for stream in streams:
            stream.wait_tokens(1)
        daemon.admin("notice", instance="i0", grace_s=60)
        assert small.expected(NUM_TOKENS) == [stream.wait() for stream in streams]
        plan = last_run(daemon).plan
        assert {"slow"} == {device.type for device in plan.spec.profile.devices}
        assert [("slow", 1), ("slow", 1), ("", 5)] == layers_by_type(plan.snapshot.world, plan.target.replicas[0])
        line = daemon.status()["migrations"][-1]
        assert ("notice", "live", "completed", 0) == (
            line["trigger"],
            line["mode"],
            line["outcome"],
            line["recomputed_tokens"],
        )
        assert line["kv_bytes"] > 0
        assert {1, plan.epoch.to} == {row[4] for stream in streams for row in daemon.ledger_rows(stream.request)}

        port = (daemon.state_dir / "worker-port").read_text().strip()
        secret = str(daemon.state_dir / "worker-secret")
        worker = ["worker", "--coordinator", f"127.0.0.1:{port}", "--secret-file", secret, "--instance", "i1"]
        # i1 has one GPU, which is connected; its second one would be new.
        refused = daemon.cli(*worker, "--gpus", "2", "--gpu-type", "fast")
        assert refused.returncode == 1
        assert "GPU type 'fast' has no times in profile 'tiny'; known: cpu; slow" in refused.stdout + refused.stderr

        added = daemon.admin("add-instance")["instance"]
        daemon.wait_for(lambda: daemon.status()["instances"][-1]["state"] == "ready", f"{added} ready")
        assert ["cpu"] == daemon.status()["instances"][-1]["gpu_types"]
