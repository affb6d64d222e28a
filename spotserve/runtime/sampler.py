"""From logits to a token: greedy, or drawn with randomness that is a function of (seed, choice, position).

No generator state exists, so nothing has to move when a request does: the same logits give the same token on every
worker, in every batch. Logits are read in float32 and probabilities summed in float64 in one order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b

import torch
from torch import Tensor

from spotserve.core.sampling import SamplingParameters


@dataclass(frozen=True, slots=True)
class Draw:
    """One row to sample: whose parameters, which choice, and the position the token will have in it (first is 0)."""

    parameters: SamplingParameters
    choice: int
    position: int


def uniform(*, seed: int, choice: int, position: int) -> float:
    """A number in [0, 1) that depends on its arguments alone."""
    digest = blake2b(f"{seed} {choice} {position}".encode(), digest_size=8, person=b"spotserve").digest()
    return (int.from_bytes(digest, "little") >> 11) * 2.0**-53


def sample(logits: Tensor, draws: Sequence[Draw]) -> list[int]:
    """The token of each row of `logits` [rows, vocabulary]."""
    assert logits.shape[0] == len(draws)
    if not draws:
        return []
    greedy = torch.argmax(logits, dim=-1).tolist()
    return [
        int(token) if draw.parameters.temperature == 0.0 else sample_row(row, draw)
        for token, row, draw in zip(greedy, logits, draws, strict=True)
    ]


def sample_row(logits: Tensor, draw: Draw) -> int:
    """One token from the distribution that temperature, top_k and top_p leave of `logits` [vocabulary]."""
    parameters = draw.parameters
    point = uniform(seed=parameters.seed, choice=draw.choice, position=draw.position)
    scaled = logits.to(device="cpu", dtype=torch.float32).double() / parameters.temperature
    if not parameters.top_k and parameters.top_p == 1.0:
        return _inverse_cumulative(torch.softmax(scaled, dim=-1), point)
    # A stable sort keeps equal logits in token order, so ties are cut the same way everywhere.
    ranked, tokens = torch.sort(scaled, descending=True, stable=True)
    if parameters.top_k:
        ranked, tokens = ranked[: parameters.top_k], tokens[: parameters.top_k]
    probabilities = torch.softmax(ranked, dim=-1)
    if parameters.top_p < 1.0:
        before = torch.cumsum(probabilities, dim=-1) - probabilities
        # The first token always stays; `before` is 0 there.
        probabilities = probabilities[before < parameters.top_p]
        probabilities = probabilities / probabilities.sum()
    return int(tokens[_inverse_cumulative(probabilities, point)])


def _inverse_cumulative(probabilities: Tensor, point: float) -> int:
    cumulative = torch.cumsum(probabilities, dim=-1)
    # Scaling the point by the sum keeps it inside the range although the sum is not exactly 1.
    index = int(torch.searchsorted(cumulative, point * float(cumulative[-1]), right=True))
    if index == len(cumulative):
        return int(torch.nonzero(probabilities)[-1])
    return index
