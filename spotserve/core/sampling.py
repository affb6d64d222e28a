"""How the tokens of a request are chosen and judged; bounds are checked here, once, for every front door."""

from __future__ import annotations

from typing import NamedTuple

from pydantic import Field

from spotserve.core.frozen import Frozen

MAX_TOP_LOGPROBS = 20
MAX_BIASED_TOKENS = 1024
MAX_BIAS = 100.0
MAX_PENALTY = 2.0


class RankedToken(NamedTuple):
    """A token and the logarithm of the probability that the model gives it."""

    token_id: int
    logprob: float


class TokenLogprobs(NamedTuple):
    """What the model thought of one token of a text: its logprob, and the likeliest tokens there, best first."""

    logprob: float
    top: tuple[RankedToken, ...] = ()


class SamplingParameters(Frozen):
    """Sampling of one request. `seed` is always set: a missing one is drawn at acceptance and journaled.

    `stop_token_ids` are the model's EOS ids; with `ignore_eos` they neither stop nor are they masked, whatever
    `min_tokens` says. `top_k` 0 and `top_p` 1.0 mean no restriction; `temperature` 0.0 is greedy. The penalties count
    the tokens that the choice has generated so far. `max_tokens` 0 computes the prompt alone.
    """

    temperature: float = Field(default=1.0, ge=0.0, le=2.0)
    top_p: float = Field(default=1.0, gt=0.0, le=1.0)
    top_k: int = Field(default=0, ge=0, le=1_000_000)
    seed: int = Field(ge=-(2**63), lt=2**64)
    max_tokens: int = Field(ge=0)
    min_tokens: int = Field(default=0, ge=0)
    ignore_eos: bool = False
    stop_token_ids: tuple[int, ...] = ()
    presence_penalty: float = Field(default=0.0, ge=-MAX_PENALTY, le=MAX_PENALTY)
    frequency_penalty: float = Field(default=0.0, ge=-MAX_PENALTY, le=MAX_PENALTY)
    logit_bias: tuple[tuple[int, float], ...] = Field(default=(), max_length=MAX_BIASED_TOKENS)
    """(token id, what is added to its logit), each id once."""
    logprobs: int | None = Field(default=None, ge=0, le=MAX_TOP_LOGPROBS)
    """How many of the likeliest tokens to tell with each token's logprob; None tells no logprobs."""
    prompt_logprobs: bool = False
    """Whether the prompt's tokens get their logprobs too."""

    @property
    def needs_history(self) -> bool:
        """Whether a token depends on which ones the choice has generated."""
        return self.presence_penalty != 0.0 or self.frequency_penalty != 0.0
