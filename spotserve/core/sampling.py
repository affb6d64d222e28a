"""How the tokens of a request are chosen; bounds are checked here, once, for every front door."""

from __future__ import annotations

from pydantic import Field

from spotserve.core.frozen import Frozen


class SamplingParameters(Frozen):
    """Sampling of one request. `seed` is always set: a missing one is drawn at acceptance and journaled.

    `stop_token_ids` are the model's EOS ids; with `ignore_eos` they neither stop nor are they masked.
    `top_k` 0 and `top_p` 1.0 mean no restriction; `temperature` 0.0 is greedy.
    """

    temperature: float = Field(default=1.0, ge=0.0, le=2.0)
    top_p: float = Field(default=1.0, gt=0.0, le=1.0)
    top_k: int = Field(default=0, ge=0, le=1_000_000)
    seed: int = Field(ge=-(2**63), lt=2**64)
    max_tokens: int = Field(ge=1)
    ignore_eos: bool = False
    stop_token_ids: tuple[int, ...] = ()
