"""The sampler draws the same token anywhere, and from the right distribution."""

from __future__ import annotations

import torch

from spotserve.core.sampling import SamplingParameters
from spotserve.runtime.sampler import Draw, sample, sample_row, uniform


def draw(position: int = 0, *, choice: int = 0, seed: int = 7, **changes: float) -> Draw:
    """A draw with some parameters changed."""
    parameters = SamplingParameters(max_tokens=1, seed=seed, **changes)  # type: ignore[arg-type]
    return Draw(parameters, choice, position)


def test_greedy_takes_the_first_of_equal_maxima() -> None:
    """Tests that temperature 0 is the argmax, ties going to the lowest token."""
    logits = torch.tensor([[0.0, 3.0, 3.0, 1.0]])
    assert sample(logits, [draw(temperature=0.0)]) == [1]


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
