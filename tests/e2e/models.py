"""A tiny random model for process tests, what `transformers` says about it, and the profile it is planned with."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from spotserve.core.canonical import canonical_json
from spotserve.core.spec import LatencyPoint, LinearKind, Profile
from spotserve.runtime.profiles import cache_name, write_whole
from tests.runtime.models import write_llama
from tests.transformers_reference import greedy_tokens, reference_model

VOCAB_SIZE = 512
NUM_TOKENS = 200
MAX_MODEL_LEN = 512
PROMPT_LENGTHS = (1, 15, 16, 17, 70)
"""One token, and both sides of a KV block's and a query tile's edge."""

LEAST_PERIOD = 60
LEAST_DISTINCT_TOKENS = 50

# 7 layers go unevenly over 2, 3 and 4 stages, 8 q heads over 3 ranks; 4 kv heads are fewer than 8 ranks.
SMALL: dict[str, Any] = {"num_hidden_layers": 7, "num_attention_heads": 8, "num_key_value_heads": 4}
# About 7 MB of weights: a capped link takes seconds for a stage's share of them, and decoding goes on meanwhile.
LARGE: dict[str, Any] = {**SMALL, "hidden_size": 128, "intermediate_size": 496}


def write_tiny(folder: Path, *, seed: int = 0, **changes: Any) -> Path:
    """A random Llama without tokenizer: prompts are ids."""
    return write_llama(folder, seed=seed, vocab_size=VOCAB_SIZE, max_position_embeddings=MAX_MODEL_LEN, **changes)


def prompts(seed: int = 0) -> tuple[tuple[int, ...], ...]:
    """Random prompts of `PROMPT_LENGTHS`."""
    rng = random.Random(seed)
    return tuple(tuple(rng.randrange(3, VOCAB_SIZE) for _ in range(length)) for length in PROMPT_LENGTHS)


def generated(folder: Path, prompt_ids: Sequence[Sequence[int]], num_tokens: int) -> list[list[int]]:
    """Greedy tokens of each prompt by `transformers`, one prompt at a time, in float32."""
    model = reference_model(folder)
    return [greedy_tokens(model, ids, num_tokens) for ids in prompt_ids]


def shortest_period(tokens: Sequence[int]) -> int:
    """The least p < LEAST_PERIOD with which the end of `tokens` repeats; LEAST_PERIOD if none does."""
    tail = list(tokens[-2 * LEAST_PERIOD :])
    return next((p for p in range(1, LEAST_PERIOD) if tail[p:] == tail[:-p]), LEAST_PERIOD)


def write_profile(folder: Path, cache: Path, *, dtype: str | None = None, linear: LinearKind = "plain") -> None:
    """Keep a made-up profile for a model where daemons look for a measured one: every run then plans alike.

    So slow that no load is ever served: the choice is by throughput whatever arrives. Time grows with rows and not
    with ranks, so that stages pay: three GPUs that hold no whole model make (1, 3, 1).
    """
    layer_ms = {1: 1000.0, 2: 1000.0}
    latencies = tuple(
        LatencyPoint(tokens=tokens, tensor=tensor, layer_ms=tokens * milliseconds)
        for tensor, milliseconds in layer_ms.items()
        for tokens in (1, 8, 64)
    )
    profile = Profile(
        name="tiny",
        source="made up for process tests",
        device="cpu",
        latencies=latencies,
        link_bytes_per_s=2.0e7,
        storage_bytes_per_s=2.0e8,
    )
    write_whole(cache / cache_name(folder, device="cpu", dtype=dtype, linear=linear), canonical_json(profile))
