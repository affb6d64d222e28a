"""What a family's tokens must be: the model folder, prompts, `transformers`' greedy tokens, and our own (1, 1, 1) run.

Made once per family under a lock and kept, as several cells need them. References that repeat or dwell could not tell
a lost or doubled token, so they are refused.
"""

from __future__ import annotations

import fcntl
import json
import random
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from spotserve.core.sampling import SamplingParameters
from spotserve.runtime.profiles import write_whole
from spotserve.runtime.sampler import Draw, sample
from tests.e2e.models import LEAST_DISTINCT_TOKENS, LEAST_PERIOD, shortest_period
from tests.runtime.families import FAMILIES
from tests.runtime.models import LocalReplica, key_of
from tests.transformers_reference import greedy_tokens_with_lead, reference_model

VOCAB_SIZE = 16_384
"""So that embedding and head, not the layers, make a stage's weights: their copy lasts over a capped link."""
MAX_MODEL_LEN = 512
NUM_TOKENS = 200
PROMPT_LENGTHS = (15, 17, 70, 16, 1)
"""Both sides of a KV block's edge, one longer than any sliding window, and one token."""
NUM_PREFILL_PROMPTS = 4
PREFILL_LENGTH = 430
"""Two prefill chunks of a daemon."""
PREFILL_TOKENS = 1
LEAST_LEAD = 1e-4
"""What float32 implementations may differ by in a logit of these models, several times over."""
MAX_PROMPTS = 20


@dataclass(frozen=True, slots=True)
class Subject:
    """A family's model on disk, prompts, and the greedy float32 tokens of `transformers` after each."""

    family: str
    folder: Path
    architecture: str
    prompt_ids: list[list[int]]
    token_ids: list[list[int]]
    long_prompt_ids: list[list[int]]
    long_token_ids: list[list[int]]


def prompts(lengths: Sequence[int], seed: str) -> list[list[int]]:
    """Random prompts; low ids are left to the special tokens."""
    rng = random.Random(seed)
    return [[rng.randrange(8, VOCAB_SIZE) for _ in range(length)] for length in lengths]


def subject(family: str, folder: Path, *, seed: int) -> Subject:
    """The family's model and references: those that are kept in `folder`, else new ones.

    Args:
        family: a name of the registry.
        folder: keeps one subfolder per family.
        seed: of the weights and the prompts.
    """
    own = folder / family
    own.mkdir(parents=True, exist_ok=True)
    with locked(own / "lock"):
        kept = own / "references.json"
        if not kept.exists():
            shutil.rmtree(own / "model", ignore_errors=True)
            write_whole(kept, json.dumps(_made(family, own / "model", seed)))
        return Subject(family=family, folder=own / "model", **json.loads(kept.read_text()))


def _made(family: str, model: Path, seed: int) -> dict[str, Any]:
    FAMILIES[family](model, seed=seed, vocab_size=VOCAB_SIZE)
    module = reference_model(model)
    asked = [decided(module, length, NUM_TOKENS, f"{seed}:prompts", is_lively) for length in PROMPT_LENGTHS]
    long = [decided(module, PREFILL_LENGTH, PREFILL_TOKENS, f"{seed}:long:{n}") for n in range(NUM_PREFILL_PROMPTS)]
    return {
        "architecture": json.loads((model / "config.json").read_text())["architectures"][0],
        "prompt_ids": [ids for ids, _ in asked],
        "token_ids": [tokens for _, tokens in asked],
        "long_prompt_ids": [ids for ids, _ in long],
        "long_token_ids": [tokens for _, tokens in long],
    }


def decided(
    module: Any, length: int, num_tokens: int, seed: str, serves: Callable[[Sequence[int]], bool] = bool
) -> tuple[list[int], list[int]]:
    """A random prompt and its greedy tokens, none of which float32 rounding chose and which `serves` accepts.

    Of two logits that are equal but for rounding, any float32 implementation may take either: with Helium, one of
    transformers' choices was not that of its own float64. Such a prompt is left for the next one.
    """
    for attempt in range(MAX_PROMPTS):
        (ids,) = prompts([length], f"{seed}:{length}:{attempt}")
        tokens, least_lead = greedy_tokens_with_lead(module, ids, num_tokens)
        if least_lead >= LEAST_LEAD and serves(tokens):
            return ids, tokens
    raise AssertionError(f"{MAX_PROMPTS} prompts of {length} tokens have a tie among their logits or repeat themselves")


def is_lively(tokens: Sequence[int]) -> bool:
    """Whether a lost, doubled or shifted one among these tokens would be seen."""
    return shortest_period(tokens) >= LEAST_PERIOD and len(set(tokens)) >= LEAST_DISTINCT_TOKENS


def own_tokens(replica: LocalReplica, ids: Sequence[int], choices: Sequence[int], **fields: Any) -> list[list[int]]:
    """Tokens per choice of one request on an undisturbed replica, all choices in one batch."""
    parameters = sampling(**fields)
    keys = [key_of(choice, 100) for choice in choices]
    rows = [replica.prefill(key, ids, chunk=64) for key in keys]
    tokens: list[list[int]] = [[] for _ in choices]
    for position in range(parameters.max_tokens):
        draws = [Draw(parameters, choice, position) for choice in choices]
        for own, token in zip(tokens, sample(torch.stack(list(rows)), draws), strict=True):
            own.append(token)
        if position + 1 < parameters.max_tokens:
            rows = list(replica.decode({key: own[-1] for key, own in zip(keys, tokens, strict=True)}))
    for key in keys:
        free(replica, key)
    return tokens


def free(replica: LocalReplica, key: Any) -> None:
    """Give a sequence's blocks back on every rank."""
    for ranks in replica.stages:
        for rank in ranks:
            rank.kv.free(key)


def sampling(*, max_tokens: int, temperature: float = 0.0, seed: int = 0, **fields: Any) -> SamplingParameters:
    """Parameters of one request that no EOS stops."""
    return SamplingParameters(temperature=temperature, seed=seed, max_tokens=max_tokens, ignore_eos=True, **fields)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Alone with a folder among all processes."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
