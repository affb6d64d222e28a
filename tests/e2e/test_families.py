"""Each family as real processes: a notice and a kill in the middle of answers, tokens as `transformers` gives them.

`make test-all` plays every family at more degrees, in both dtypes and with every disturbance (tests/matrix).
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.daemon import running
from tests.e2e.models import write_profile
from tests.e2e.scene import PACED, rarely
from tests.runtime.families import FAMILIES
from tests.transformers_reference import greedy_tokens, reference_model

pytestmark = pytest.mark.e2e

NAMED = ("mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "opt", "gpt_neox", "gpt2", "mixtral", "qwen3_moe")
"""Beside llama, which every other process test serves."""
DEGREES = ((1, 2, 1), (1, 1, 2), (1, 1, 3))
PROMPT_LENGTHS = (15, 17, 40)
NUM_TOKENS = 240
VOCAB_SIZE = 512


def degrees_of(family: str) -> tuple[int, int, int]:
    """(D, P, M) in turn, so that each meets several families."""
    return DEGREES[list(FAMILIES).index(family) % len(DEGREES)]


def leader(status: dict[str, Any]) -> str:
    """The instance of the first replica's leader."""
    return str(status["replicas"][0]["stages"][0]["gpus"][0]).split("/")[0]


@pytest.mark.parametrize("family", [*NAMED, *rarely(*sorted(set(FAMILIES) - set(NAMED) - {"llama"}))])
def test_tokens_survive_a_notice_and_a_kill(tmp_path: Path, daemon_environment: dict[str, str], family: str) -> None:
    """Tests that a family's KV and weights migrate without recompute, and that a kill loses no token of it."""
    folder = FAMILIES[family](tmp_path / "model")
    rng = random.Random(0)
    prompts = [[rng.randrange(8, VOCAB_SIZE) for _ in range(length)] for length in PROMPT_LENGTHS]
    module = reference_model(folder)
    expected = [greedy_tokens(module, ids, NUM_TOKENS) for ids in prompts]
    env = {**daemon_environment, **PACED, "SPOTSERVE_PROFILE_CACHE": str(tmp_path / "profiles")}
    write_profile(folder, tmp_path / "profiles")
    data, pipeline, tensor = degrees_of(family)
    shape = ["-dp", str(data), "-pp", str(pipeline), "-tp", str(tensor)]
    args = [str(folder), "--gpu-memory", "24MiB", "--instances", str(data * pipeline * tensor + 2), *shape]
    with running(tmp_path / "state", *args, env=env) as daemon:
        streams = [daemon.stream(ids, max_tokens=NUM_TOKENS) for ids in prompts]
        for stream in streams:
            stream.wait_tokens(12)
        noticed = leader(daemon.status())
        daemon.admin("notice", instance=noticed, grace_s=60)
        assert expected == [stream.wait() for stream in streams]
        line = daemon.status()["migrations"][-1]
        assert ("notice", "completed", 0) == (line["trigger"], line["outcome"], line["recomputed_tokens"])
        assert line["kv_bytes"] > 0
        assert len({row[4] for row in daemon.ledger_rows(streams[-1].request)}) == 2
        streams = [daemon.stream(ids, max_tokens=NUM_TOKENS) for ids in prompts]
        for stream in streams:
            stream.wait_tokens(12)
        daemon.admin("kill", instance=leader(daemon.status()))
        assert expected == [stream.wait() for stream in streams]
        assert "lost" == daemon.status()["migrations"][-1]["trigger"]
