"""The main promise with real processes: whatever is taken, every stream has exactly the tokens it would have had."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.e2e.daemon import RunningDaemon, running

pytestmark = pytest.mark.e2e

PROMPTS = ("The for statement", "A dictionary is", "class Example:", "To import a module")


def references(daemon: RunningDaemon, max_tokens: int) -> list[list[int]]:
    """The tokens that nobody disturbed."""
    streams = [daemon.stream(prompt, max_tokens=max_tokens) for prompt in PROMPTS]
    return [stream.wait() for stream in streams]


def test_notice_then_kill(tmp_path: Path) -> None:
    """Tests that a notice moves KV without recompute and a kill recomputes, both with exactly the same tokens."""
    with running(tmp_path / "state", "--gpu-memory", "24MiB", "-dp", "1", "-pp", "2", "-tp", "2") as daemon:
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
