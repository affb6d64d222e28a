"""The sampler draws the same token anywhere, and from the right distribution."""

from __future__ import annotations

import math
import random
import struct
from dataclasses import replace
from typing import Any

import pytest
import torch

from spotserve.core.batching import SequenceKey
from spotserve.core.ids import RequestId
from spotserve.core.sampling import SamplingParameters
from spotserve.errors import InvariantError
from spotserve.runtime.descriptor import Admitted, Run, RunItem, Sampled, decode, encode
from spotserve.runtime.sampler import (
    LEAST_LOGPROB,
    NO_TOKEN,
    Draw,
    History,
    change_logits,
    sample,
    sample_row,
    token_logprobs,
    uniform,
)


def draw(position: int = 0, *, choice: int = 0, seed: int = 7, **changes: float) -> Draw:
    """A draw with some parameters changed."""
    parameters = SamplingParameters(max_tokens=1, seed=seed, **changes)  # type: ignore[arg-type]
    return Draw(parameters, choice, position)


def test_greedy_takes_the_first_of_equal_maxima() -> None:
    """Tests that temperature 0 is the argmax, ties going to the lowest token."""
    logits = torch.tensor([[0.0, 3.0, 3.0, 1.0]])
    assert sample(logits, [draw(temperature=0.0)]) == [1]


@pytest.mark.parametrize("temperature", [1e-5, 1e-300, 5e-324])
@pytest.mark.parametrize("changes", [{}, {"top_p": 0.9}, {"top_k": 5}])
def test_the_least_temperatures_are_greedy(temperature: float, changes: dict[str, float]) -> None:
    """Tests that a temperature whose division overflows gives the likeliest token, not the last one or an error."""
    logits = torch.randn(3, 300, generator=torch.Generator().manual_seed(4)) * 3
    draws = [draw(each, temperature=temperature, **changes) for each in range(3)]
    assert logits.argmax(-1).tolist() == sample(logits, draws)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("changes", [{}, {"top_p": 0.9}, {"top_k": 5}])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logits_without_a_finite_maximum_give_no_token(
    temperature: float, changes: dict[str, float], bad: float
) -> None:
    """Tests that a row that overflowed says so, and that a row beside it and one with impossible tokens do not."""
    logits = torch.randn(3, 300, generator=torch.Generator().manual_seed(4))
    logits[1, 7], logits[2, 7] = bad, -math.inf
    draws = [draw(each, temperature=temperature, **changes) for each in range(3)]
    first, second, third = sample(logits, draws)
    assert NO_TOKEN == second
    assert (first, third) == (sample(logits[:1], draws[:1])[0], sample(logits[2:], draws[2:])[0])
    assert NO_TOKEN not in (first, third)
    everything = [replace(draws[0], parameters=draws[0].parameters.model_copy(update=ALL_MASKED))]
    assert [NO_TOKEN] == sample(logits[:1], everything)


ALL_MASKED: dict[str, Any] = {"min_tokens": 1, "max_tokens": 2, "stop_token_ids": tuple(range(300))}


def test_a_draw_does_not_depend_on_its_batch() -> None:
    """Tests that a row alone and in a mixed batch gives the same token."""
    logits = torch.randn(4, 300, generator=torch.Generator().manual_seed(3))
    draws = [draw(5), draw(6, temperature=0.0), draw(7, top_p=0.8), draw(8, top_k=5)]
    alone = [sample(logits[index : index + 1], [each])[0] for index, each in enumerate(draws)]
    assert alone == sample(logits, draws)


def test_seed_choice_and_position_all_matter() -> None:
    """Tests that each part of the key changes the randomness, and that the values are what they were."""
    base = uniform(seed=1, choice=2, position=3)
    others = {
        uniform(seed=2, choice=2, position=3),
        uniform(seed=1, choice=3, position=3),
        uniform(seed=1, choice=2, position=4),
        uniform(seed=12, choice=2, position=3),
    }
    assert base not in others
    assert len(others) == 4
    # Another value here would make running requests continue with other tokens after an upgrade.
    assert base == 0.7819196166111381


def test_frequencies_follow_the_softmax() -> None:
    """Tests 20,000 draws against the probabilities that temperature gives, within four standard deviations."""
    logits = torch.tensor([1.0, 0.0, -1.0, 2.0])
    expected = torch.softmax(logits / 0.7, dim=0)
    tokens = torch.tensor([sample_row(logits, draw(position, temperature=0.7)) for position in range(20_000)])
    counts = torch.bincount(tokens, minlength=4) / len(tokens)
    tolerance = 4 * torch.sqrt(expected * (1 - expected) / len(tokens))
    assert bool((abs(counts - expected) < tolerance).all()), (counts, expected)


def test_top_k_and_top_p_cut() -> None:
    """Tests which tokens remain under top_k and top_p: the smallest set whose probability reaches top_p."""
    logits = torch.log(torch.tensor([0.5, 0.3, 0.15, 0.05]))
    assert {0, 1} == {sample_row(logits, draw(position, top_k=2)) for position in range(200)}
    assert {0, 1} == {sample_row(logits, draw(position, top_p=0.7)) for position in range(200)}
    assert {0, 1, 2} == {sample_row(logits, draw(position, top_p=0.9)) for position in range(400)}
    assert {0} == {sample_row(logits, draw(position, top_p=1e-9)) for position in range(50)}


def test_impossible_tokens_are_never_drawn() -> None:
    """Tests that a token of probability zero is not drawn even at the edges of the range."""
    logits = torch.tensor([float("-inf"), 0.0, float("-inf"), 0.0, float("-inf")])
    assert {1, 3} == {sample_row(logits, draw(position)) for position in range(500)}


def steered(position: int, tokens: list[int], **changes: Any) -> Draw:
    """A draw of a choice that has generated these tokens."""
    parameters = SamplingParameters(max_tokens=99, seed=7, **{"temperature": 0.0, **changes})
    return Draw(parameters, 0, position, History(tokens) if parameters.needs_history else None)


def random_parameters(rng: random.Random) -> dict[str, Any]:
    """Any mix of the features, neutral values included."""
    return {
        "temperature": rng.choice([0.0, 0.7, 1.3]),
        "top_p": rng.choice([1.0, 0.9]),
        "top_k": rng.choice([0, 20]),
        "presence_penalty": rng.choice([0.0, 1.5, -2.0]),
        "frequency_penalty": rng.choice([0.0, 0.3, -0.5]),
        "logit_bias": tuple(
            (token, rng.uniform(-9, 9)) for token in sorted(rng.sample(range(300), rng.choice([0, 5])))
        ),
        "min_tokens": rng.choice([0, 4, 90]),
        "stop_token_ids": tuple(rng.sample(range(300), 3)),
        "ignore_eos": rng.random() < 0.3,
    }


def test_penalties_follow_their_formula() -> None:
    """Tests OpenAI's formula: a token generated three times loses three frequencies and one presence."""
    logits = torch.tensor([[5.0, 4.0, 0.0]])
    once = {"presence_penalty": 0.5, "frequency_penalty": 0.2}
    assert [0] == sample(logits, [steered(1, [0], **once)])
    assert [0] == sample(logits, [steered(2, [0, 0], **once)])
    assert [1] == sample(logits, [steered(3, [0, 0, 0], **once)])
    assert [0] == sample(logits, [steered(4, [0, 0, 0, 1], **once)])
    row = logits[0].double()
    change_logits(row, steered(4, [0, 0, 1, 0], presence_penalty=-1.0, frequency_penalty=0.25))
    assert [5.0 - 0.75 + 1.0, 4.0 - 0.25 + 1.0, 0.0] == row.tolist()


def test_bias_and_mask() -> None:
    """Tests that a bias is added, and that no end of text is drawn before `min_tokens` unless EOS is ignored."""
    logits = torch.tensor([[5.0, 4.0, 0.0, -3.0]])
    assert [2] == sample(logits, [steered(0, [], logit_bias=((0, -100.0), (2, 4.5)))])
    early = {"min_tokens": 2, "stop_token_ids": (0, 1, 1000)}
    assert [2, 2, 0] == [sample(logits, [steered(position, [], **early)])[0] for position in range(3)]
    assert [0] == sample(logits, [steered(0, [], **early, ignore_eos=True)])
    drawn = {sample_row(logits[0], steered(1, [], **early, temperature=2.0)) for _ in range(50)}
    assert not drawn & {0, 1}


def test_a_token_is_a_function_of_its_sequence() -> None:
    """Tests over random parameters that a history told at once or counted, in any batch, gives the same tokens."""
    rng = random.Random(11)
    logits = torch.randn(12, 300, generator=torch.Generator().manual_seed(5)) * 3
    for _ in range(40):
        draws, grown = [], []
        for _ in range(len(logits)):
            fields, position = random_parameters(rng), rng.randrange(8)
            tokens = [rng.randrange(300) for _ in range(position)]
            draws.append(steered(position, tokens, **fields))
            history = History(tokens[: rng.randint(0, position)])
            for token in tokens[history.num_tokens :]:
                history.add(token)
            grown.append(replace(draws[-1], history=history if draws[-1].history else None))
        together = sample(logits, draws)
        assert together == sample(logits, grown)
        order = rng.sample(range(len(draws)), len(draws))
        shuffled = sample(logits[order], [draws[index] for index in order])
        assert together == [shuffled[order.index(index)] for index in range(len(draws))]
        assert together == [sample(logits[index : index + 1], [draw])[0] for index, draw in enumerate(draws)]


def test_neutral_parameters_change_nothing() -> None:
    """Tests that features that are off leave tokens what they were, to the draw."""
    logits = torch.randn(6, 300, generator=torch.Generator().manual_seed(6))
    before = [Draw(SamplingParameters(max_tokens=9, seed=3, temperature=0.8, top_p=0.9), 0, at) for at in range(6)]
    neutral = [
        replace(draw, parameters=draw.parameters.model_copy(update={"logit_bias": ((4, 0.0),), "min_tokens": 0}))
        for draw in before
    ]
    assert sample(logits, before) == sample(logits, neutral)


def test_a_history_that_is_not_the_sequences_is_refused() -> None:
    """Tests that a lost or short history is an error, never another token."""
    logits = torch.zeros(1, 9)
    draw = steered(2, [1, 2], presence_penalty=1.0)
    for history in (None, History([]), History([1]), History([1, 2, 3])):
        with pytest.raises(InvariantError, match="known at position 2"):
            sample(logits, [replace(draw, history=history)])


def test_logprobs_are_a_function_of_their_row() -> None:
    """Tests the bits of logprobs beside other rows, at other addresses and against the definition."""
    logits = torch.randn(40, 1003, generator=torch.Generator().manual_seed(8)) * 5
    for index, row in enumerate(logits):
        alone = torch.cat([torch.zeros(index % 7), row])[index % 7 :]
        assert token_logprobs(row, index, 5) == token_logprobs(alone, index, 5)
        exact = row.double().numpy()
        total = math.log(math.fsum(math.exp(value - exact.max()) for value in exact)) + exact.max()
        assert math.isclose(exact[index] - total, token_logprobs(row, index, 0).logprob, rel_tol=1e-12)


def test_the_likeliest_tokens_are_ranked_the_same_way_everywhere() -> None:
    """Tests that equal logits are told in token order, that fewer than asked are told, and what cannot be said."""
    tied = torch.tensor([1.0, 2.0, 2.0, 1.0, 2.0, float("-inf")])
    for num_top, ids in ((0, []), (2, [1, 2]), (4, [1, 2, 4, 0]), (20, [1, 2, 4, 0, 3, 5])):
        assert ids == [ranked.token_id for ranked in token_logprobs(tied, 3, num_top).top]
    assert LEAST_LOGPROB == token_logprobs(tied, 5, 20).logprob == token_logprobs(tied, 5, 20).top[-1].logprob
    assert LEAST_LOGPROB == token_logprobs(torch.full((4,), float("nan")), 0, 2).logprob


def test_what_the_ranks_are_told_comes_back() -> None:
    """Tests that parameters, history, targets and every bit of logprobs survive the mesh."""
    key = SequenceKey(RequestId("a"), 1, 2)
    parameters = SamplingParameters(
        seed=2**63,
        max_tokens=0,
        presence_penalty=0.1,
        logit_bias=((3, 0.1), (4, -1e-9)),
        logprobs=0,
        prompt_logprobs=True,
    )
    item = RunItem(key, 16, 3, None, (5, 6, 7), 17, (7, 8))
    run = Run(4, (key,), (Admitted(key, parameters, (9, 9)),), (item,))
    assert (run, 2) == (decode(encode(run)), item.num_logits)
    row = torch.randn(50, generator=torch.Generator().manual_seed(1))
    scores = tuple(token_logprobs(row, token, token % 4) for token in range(8))
    sampled = Sampled(4, (1, 2), (None, scores[0]), ((1, scores), (3, ())))
    again = decode(encode(sampled))
    assert sampled == again
    assert isinstance(again, Sampled)
    assert [struct.pack("<d", one.logprob) for one in scores] == [
        struct.pack("<d", one.logprob) for one in again.prompt_logprobs[0][1]
    ]
