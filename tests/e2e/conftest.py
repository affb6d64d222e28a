"""Tiny models on disk with the tokens they must give, made once for all process tests."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.daemon import RunningDaemon, Stream, running
from tests.e2e.models import (
    LARGE,
    LEAST_DISTINCT_TOKENS,
    LEAST_PERIOD,
    MAX_MODEL_LEN,
    NUM_TOKENS,
    SMALL,
    generated,
    prompts,
    shortest_period,
    write_profile,
    write_tiny,
)

SAMPLED: dict[str, Any] = {"temperature": 0.9, "top_p": 0.95, "n": 2, "seed": 20}


@dataclass(frozen=True, slots=True)
class TinyModel:
    """A model folder, prompts, and the greedy tokens that `transformers` gives for each."""

    folder: Path
    prompt_ids: tuple[tuple[int, ...], ...]
    token_ids: list[list[int]]

    def stream_all(self, daemon: RunningDaemon, max_tokens: int) -> list[Stream]:
        """Stream every prompt at once, greedily."""
        return [daemon.stream(ids, max_tokens=max_tokens) for ids in self.prompt_ids]

    def expected(self, max_tokens: int) -> list[list[int]]:
        """What those streams must bring."""
        return [tokens[:max_tokens] for tokens in self.token_ids]


def checked(folder: Path, num_tokens: int, **config: Any) -> TinyModel:
    """A model whose references could tell a lost, doubled or shifted token: they neither repeat nor dwell."""
    write_tiny(folder, **config)
    model = TinyModel(folder, prompts(), generated(folder, prompts(), num_tokens))
    for tokens in model.token_ids:
        assert len(tokens) == num_tokens
        assert shortest_period(tokens[:NUM_TOKENS]) >= LEAST_PERIOD
        assert len(set(tokens[:NUM_TOKENS])) >= LEAST_DISTINCT_TOKENS
    return model


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    """A model of 2 MB."""
    return checked(tmp_path_factory.mktemp("models") / "small", NUM_TOKENS, **SMALL)


@pytest.fixture(scope="session")
def large(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    """A model of 7 MB, with references that fill most of its context."""
    longest = max(len(ids) for ids in prompts())
    return checked(tmp_path_factory.mktemp("models") / "large", MAX_MODEL_LEN - longest, **LARGE)


@pytest.fixture(scope="session")
def small_environment(daemon_environment: dict[str, str], small: TinyModel) -> dict[str, str]:
    """Variables for daemons that serve `small`, with a profile that is the same on every machine."""
    write_profile(small.folder, Path(daemon_environment["SPOTSERVE_PROFILE_CACHE"]))
    return daemon_environment


@pytest.fixture(scope="session")
def large_environment(daemon_environment: dict[str, str], large: TinyModel) -> dict[str, str]:
    """Variables for daemons that serve `large`, with a profile that is the same on every machine."""
    write_profile(large.folder, Path(daemon_environment["SPOTSERVE_PROFILE_CACHE"]))
    return daemon_environment


@pytest.fixture(scope="session")
def sampled(
    tmp_path_factory: pytest.TempPathFactory, small: TinyModel, small_environment: dict[str, str]
) -> list[dict[int, list[int]]]:
    """Tokens per choice of every prompt under `SAMPLED` on `small`: our own undisturbed run on one GPU."""
    state_dir = tmp_path_factory.mktemp("undisturbed") / "state"
    with running(state_dir, str(small.folder), "--instances", "1", env=small_environment) as daemon:
        streams = [daemon.stream(ids, max_tokens=NUM_TOKENS, **SAMPLED) for ids in small.prompt_ids]
        for stream in streams:
            stream.wait()
        assert daemon.status()["parallel"] == {"data": 1, "pipeline": 1, "tensor": 1}
    for stream in streams:
        assert stream.by_choice[0] != stream.by_choice[1]
    return [stream.by_choice for stream in streams]
