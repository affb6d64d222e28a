"""The main promise with real processes: whatever is taken, every stream has exactly the tokens it would have had."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.e2e.daemon import UNHURRIED, RunningDaemon, running

pytestmark = pytest.mark.e2e

PROMPTS = ("The for statement", "A dictionary is", "class Example:", "To import a module")


def references(daemon: RunningDaemon, max_tokens: int) -> list[list[int]]:
    """The tokens that nobody disturbed."""
    streams = [daemon.stream(prompt, max_tokens=max_tokens) for prompt in PROMPTS]
    return [stream.wait() for stream in streams]


def test_notice_then_kill(tmp_path: Path, daemon_environment: dict[str, str]) -> None:
    """Tests that a notice moves KV without recompute and a kill recomputes, both with exactly the same tokens."""
    shape = ("-dp", "1", "-pp", "2", "-tp", "2")
    with running(
        tmp_path / "state", "--gpu-memory", "24MiB", *shape, env={**daemon_environment, **UNHURRIED}
    ) as daemon:
        expected = references(daemon, 200)
        streams = [daemon.stream(prompt, max_tokens=200) for prompt in PROMPTS]
        for stream in streams:
            stream.wait_tokens(20)
        daemon.admin("notice", instance="i0", grace_s=20)
        assert expected == [stream.wait() for stream in streams]
        line = daemon.status()["migrations"][-1]
        assert (line["trigger"], line["outcome"], line["recomputed_tokens"]) == ("notice", "completed", 0)
        assert line["kv_bytes"] > 0
        generations = {row[4] for row in daemon.ledger_rows(streams[0].request)}
        assert len(generations) == 2
        streams = [daemon.stream(prompt, max_tokens=200) for prompt in PROMPTS]
        for stream in streams:
            stream.wait_tokens(20)
        daemon.admin("kill", instance=daemon.status()["replicas"][0]["stages"][0]["gpus"][0].split("/")[0])
        assert expected == [stream.wait() for stream in streams]
        daemon.wait_state("serving")


def test_default_cluster_shrinks_live(tmp_path: Path, daemon_environment: dict[str, str]) -> None:
    """Tests that on the default cluster both notices from 4 to 2 instances move all KV, and one left is degraded."""
    with running(tmp_path / "state", env={**daemon_environment, **UNHURRIED}) as daemon:
        expected = references(daemon, 120)
        for _ in range(2):
            streams = [daemon.stream(prompt, max_tokens=120) for prompt in PROMPTS]
            for stream in streams:
                stream.wait_tokens(15)
            served = daemon.status()["replicas"][0]["stages"][0]["gpus"][0].split("/")[0]
            daemon.admin("notice", instance=served, grace_s=15)
            assert expected == [stream.wait() for stream in streams]
            line = daemon.status()["migrations"][-1]
            assert (line["mode"], line["outcome"], line["recomputed_tokens"]) == ("live", "completed", 0)
            assert line["kv_bytes"] > 0
            daemon.admin("kill", instance=served)
        assert len([one for one in daemon.status()["instances"] if one["state"] == "ready"]) == 2
        stream = daemon.stream(PROMPTS[0], max_tokens=120)
        stream.wait_tokens(10)
        daemon.admin("kill", instance=daemon.status()["replicas"][0]["stages"][0]["gpus"][0].split("/")[0])
        daemon.wait_state("degraded")
        daemon.admin("add-instance")
        assert expected[0] == stream.wait()
        daemon.wait_state("serving")


def test_kill_after_an_in_place_plan(tmp_path: Path, daemon_environment: dict[str, str]) -> None:
    """Tests that what an in-place plan and a lost replica leave on the GPUs does not stand in the next plan's way."""
    shape = ("-dp", "1", "-pp", "2", "-tp", "2")
    with running(tmp_path / "state", *shape, env=daemon_environment) as daemon:
        expected = references(daemon, 120)
        streams = [daemon.stream(prompt, max_tokens=120) for prompt in PROMPTS]
        for stream in streams:
            stream.wait_tokens(10)
        daemon.admin("notice", instance="i0", grace_s=20)
        assert expected == [stream.wait() for stream in streams]
        assert daemon.status()["migrations"][-1]["mode"] == "in_place"
        streams = [daemon.stream(prompt, max_tokens=120) for prompt in PROMPTS]
        for stream in streams:
            stream.wait_tokens(10)
        daemon.admin("kill", instance=daemon.status()["replicas"][0]["stages"][0]["gpus"][0].split("/")[0])
        assert expected == [stream.wait() for stream in streams]
        daemon.wait_state("serving")
