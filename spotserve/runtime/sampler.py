"""From logits to a token: greedy, or drawn with randomness that is a function of (seed, choice, position).

No generator state exists, so nothing has to move when a request does but what it has generated so far: the same logits
and history give the same token on every worker, in every batch. Logits are read in float32; penalties, bias and
probabilities are computed in float64 in one order. Logprobs are the model's own: before penalties, bias, temperature.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b

import torch
from torch import Tensor

from spotserve.core.sampling import RankedToken, SamplingParameters, TokenLogprobs
from spotserve.errors import InvariantError

NO_TOKEN = -1
"""Instead of a token where the logits have no finite maximum: NaN, infinite, or all masked."""
LEAST_LOGPROB = -9999.0
"""Told instead of minus infinity, which JSON cannot say."""


class History:
    """What a choice has generated so far; only who has penalties counts."""

    __slots__ = ("counts", "num_tokens")

    def __init__(self, token_ids: Sequence[int]) -> None:
        self.counts: dict[int, int] = {}
        self.num_tokens = 0
        for token_id in token_ids:
            self.add(token_id)

    def add(self, token_id: int) -> None:
        """One more token."""
        self.counts[token_id] = self.counts.get(token_id, 0) + 1
        self.num_tokens += 1


@dataclass(frozen=True, slots=True)
class Draw:
    """One row to sample: whose parameters, which choice, and the position the token will have in it (first is 0).

    `history` is what the choice has generated before that position, where the parameters need it.
    """

    parameters: SamplingParameters
    choice: int
    position: int
    history: History | None = None

    @property
    def masks_stops(self) -> bool:
        """Whether it is too early for an end of text."""
        return self.position < self.parameters.min_tokens and not self.parameters.ignore_eos

    @property
    def changes_logits(self) -> bool:
        """Whether the token is drawn from other logits than the model's."""
        parameters = self.parameters
        return parameters.needs_history or bool(parameters.logit_bias) or self.masks_stops


def uniform(*, seed: int, choice: int, position: int) -> float:
    """A number in [0, 1) that depends on its arguments alone."""
    digest = blake2b(f"{seed} {choice} {position}".encode(), digest_size=8, person=b"spotserve").digest()
    return (int.from_bytes(digest, "little") >> 11) * 2.0**-53


def sample(logits: Tensor, draws: Sequence[Draw]) -> list[int]:
    """The token of each row of `logits` [rows, vocabulary], or NO_TOKEN."""
    assert logits.shape[0] == len(draws)
    if not draws:
        return []
    # NaN counts as the greatest, so that a row with one shows it here.
    peaks, greedy = torch.max(logits, dim=-1)
    tokens = torch.where(torch.isfinite(peaks), greedy, NO_TOKEN).tolist()
    return [
        token
        if token == NO_TOKEN or (draw.parameters.temperature == 0.0 and not draw.changes_logits)
        else sample_row(row, draw)
        for token, row, draw in zip(tokens, logits, draws, strict=True)
    ]


def sample_row(logits: Tensor, draw: Draw) -> int:
    """One token from the distribution that penalties, bias, temperature, top_k and top_p leave of `logits`.

    NO_TOKEN where they leave none.
    """
    parameters = draw.parameters
    row = wide_row(logits)
    if draw.changes_logits:
        change_logits(row, draw)
    peak = row.max()
    if not torch.isfinite(peak):
        return NO_TOKEN
    if parameters.temperature == 0.0:
        return int(torch.argmax(row))
    point = uniform(seed=parameters.seed, choice=draw.choice, position=draw.position)
    # Below the peak, a division by the least temperature there is overflows to what has no chance anyway.
    scaled = (row - peak) / parameters.temperature
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


def wide_row(logits: Tensor) -> Tensor:
    """A row of logits [vocabulary] in float64, as a tensor of its own: a batch's other rows change no bit of it."""
    return logits.to(device="cpu", dtype=torch.float32).double()


def change_logits(row: Tensor, draw: Draw) -> None:
    """Penalties, then bias, then no end of text before `min_tokens`, in place on `row` [vocabulary] in float64.

    The penalties are OpenAI's: `count * frequency_penalty`, and `presence_penalty` once, off each token generated.
    """
    parameters = draw.parameters
    if parameters.needs_history:
        history = draw.history
        if history is None or history.num_tokens != draw.position:
            known = "none" if history is None else history.num_tokens
            raise InvariantError(f"{known} generated tokens known at position {draw.position}")
        if history.counts:
            counts = torch.tensor(list(history.counts.values()), dtype=torch.float64)
            ids = torch.tensor(list(history.counts), dtype=torch.int64)
            row[ids] -= counts * parameters.frequency_penalty + parameters.presence_penalty
    if parameters.logit_bias:
        biased, values = zip(*parameters.logit_bias, strict=True)
        row[torch.tensor(biased, dtype=torch.int64)] += torch.tensor(values, dtype=torch.float64)
    if draw.masks_stops:
        for token_id in parameters.stop_token_ids:
            if token_id < len(row):
                row[token_id] = float("-inf")


def token_logprobs(logits: Tensor, token_id: int, num_top: int) -> TokenLogprobs:
    """The logprob of a token and the `num_top` likeliest, of one row of the model's logits [vocabulary]."""
    # Softmax and selection of one row at a time: their bits are a function of the row alone.
    logprobs = torch.log_softmax(wide_row(logits), dim=-1)
    top: tuple[RankedToken, ...] = ()
    if num_top:
        num_top = min(num_top, len(logprobs))
        least = torch.topk(logprobs, num_top).values[-1]
        candidates = torch.nonzero(logprobs >= least)[:, 0]
        # Among equals the lower token first, which `topk` does not promise.
        order = torch.sort(logprobs[candidates], descending=True, stable=True).indices[:num_top]
        ids = candidates[order]
        top = tuple(map(RankedToken, ids.tolist(), map(_sayable, logprobs[ids].tolist())))
    return TokenLogprobs(_sayable(float(logprobs[token_id])), top)


def _sayable(logprob: float) -> float:
    """Not below the least; NaN is below everything."""
    return logprob if logprob > LEAST_LOGPROB else LEAST_LOGPROB


def _inverse_cumulative(probabilities: Tensor, point: float) -> int:
    cumulative = torch.cumsum(probabilities, dim=-1)
    # Scaling the point by the sum keeps it inside the range although the sum is not exactly 1.
    index = int(torch.searchsorted(cumulative, point * float(cumulative[-1]), right=True))
    if index == len(cumulative):
        return int(torch.nonzero(probabilities)[-1])
    return index
