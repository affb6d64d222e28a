"""Fixtures of the tests that run real workers: one forkserver, one tiny model, a fresh cluster per scenario."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from spotserve.core.spec import ModelSpec
from spotserve.runtime.forkserver_client import ForkServer
from spotserve.runtime.model_table import describe_model
from tests.runtime.cluster import Cluster, running_cluster, serving_spec
from tests.runtime.models import write_llama

Scenario = Callable[[Cluster], Awaitable[None]]
Play = Callable[[Scenario], None]


@pytest.fixture(scope="module")
def forkserver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ForkServer]:
    """One forkserver for the module (or the one the environment names)."""
    server = ForkServer.start(log=tmp_path_factory.mktemp("forkserver") / "log")
    yield server
    server.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama."""
    return write_llama(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def model(folder: Path) -> ModelSpec:
    """Its description."""
    return describe_model(folder)


@pytest.fixture
def play(folder: Path, model: ModelSpec, tmp_path: Path, forkserver: ForkServer) -> Play:
    """Runs a scenario against a fresh cluster."""

    def run(scenario: Scenario) -> None:
        async def main() -> None:
            async with running_cluster(serving_spec(model), folder, tmp_path, forkserver) as cluster:
                await scenario(cluster)

        asyncio.run(main())

    return run


_references: dict[tuple[Path, tuple[int, ...]], list[int]] = {}


def reference(folder: Path, prompt: list[int], max_tokens: int) -> list[int]:
    """What transformers' greedy `generate` says."""
    key = (folder, tuple(prompt))
    if len(_references.get(key, [])) < max_tokens:
        network = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        ids = torch.tensor([prompt])
        # A mask of our own: the one that `generate` guesses would hide tokens equal to the padding id.
        output = network.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_tokens,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        _references[key] = output[0, len(prompt) :].tolist()
    return _references[key][:max_tokens]


def prompt_of(seed: int, length: int) -> list[int]:
    """A random prompt."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 500, (length,), generator=generator).tolist()
