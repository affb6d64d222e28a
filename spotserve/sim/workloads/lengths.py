"""How long requests are: distributions of (prompt tokens, output tokens)."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import Protocol

from spotserve.errors import SpecError


class Lengths(Protocol):
    """A distribution of lengths."""

    @property
    def told(self) -> str:
        """What it is, for the notes of a workload."""

    def draw(self, rng: random.Random) -> tuple[int, int]:
        """(prompt tokens, output tokens) of one request."""


@dataclass(frozen=True, slots=True)
class FixedLengths:
    """Every request alike; 512 and 128 are those of the SpotServe paper (section 6.1)."""

    prompt_tokens: int = 512
    output_tokens: int = 128

    def __post_init__(self) -> None:
        _require_positive(prompt_tokens=self.prompt_tokens, output_tokens=self.output_tokens)

    @property
    def told(self) -> str:
        """What it is."""
        return f"{self.prompt_tokens} in, {self.output_tokens} out"

    def draw(self, rng: random.Random) -> tuple[int, int]:
        """The fixed pair."""
        return self.prompt_tokens, self.output_tokens


@dataclass(frozen=True, slots=True)
class UniformLengths:
    """Prompt and output drawn apart, each whole number of its closed range equally likely."""

    prompt: tuple[int, int]
    output: tuple[int, int]

    def __post_init__(self) -> None:
        for name, (least, most) in (("prompt", self.prompt), ("output", self.output)):
            if not 1 <= least <= most:
                raise SpecError(f"{name} {least} to {most} is not a range of 1 or more tokens")

    @property
    def told(self) -> str:
        """What it is."""
        return f"uniform {self.prompt[0]}-{self.prompt[1]} in, {self.output[0]}-{self.output[1]} out"

    def draw(self, rng: random.Random) -> tuple[int, int]:
        """One pair."""
        return rng.randint(*self.prompt), rng.randint(*self.output)


@dataclass(frozen=True, slots=True)
class LognormalLengths:
    """Prompt and output drawn apart, lognormal by mean and coefficient of variation, cut to 1 and to the most."""

    prompt_mean: float
    prompt_cv: float
    output_mean: float
    output_cv: float
    max_prompt_tokens: int
    max_output_tokens: int

    def __post_init__(self) -> None:
        _require_positive(
            prompt_mean=self.prompt_mean,
            output_mean=self.output_mean,
            max_prompt_tokens=self.max_prompt_tokens,
            max_output_tokens=self.max_output_tokens,
        )
        for name, cv in (("prompt_cv", self.prompt_cv), ("output_cv", self.output_cv)):
            if not 0 <= cv <= 100:
                raise SpecError(f"{name} {cv:g} is not between 0 and 100")

    @property
    def told(self) -> str:
        """What it is."""
        return (
            f"lognormal, in mean {self.prompt_mean:g} cv {self.prompt_cv:g} at most {self.max_prompt_tokens}, "
            f"out mean {self.output_mean:g} cv {self.output_cv:g} at most {self.max_output_tokens}"
        )

    def draw(self, rng: random.Random) -> tuple[int, int]:
        """One pair."""
        return (
            _lognormal(rng, self.prompt_mean, self.prompt_cv, self.max_prompt_tokens),
            _lognormal(rng, self.output_mean, self.output_cv, self.max_output_tokens),
        )


@dataclass(frozen=True, slots=True)
class EmpiricalLengths:
    """Pairs that were seen, drawn with replacement; a long prompt keeps the answer that it had."""

    pairs: tuple[tuple[int, int], ...]
    source: str

    def __post_init__(self) -> None:
        if not self.pairs:
            raise SpecError(f"lengths of {self.source}: there is none to draw from")

    @property
    def told(self) -> str:
        """What it is."""
        return f"drawn from {len(self.pairs)} pairs of {self.source}"

    def draw(self, rng: random.Random) -> tuple[int, int]:
        """One pair."""
        return self.pairs[rng.randrange(len(self.pairs))]


def _lognormal(rng: random.Random, mean: float, cv: float, most: int) -> int:
    """A lognormal of this mean and coefficient of variation before it is rounded and cut."""
    sigma2 = math.log1p(cv * cv)
    value = rng.lognormvariate(math.log(mean) - sigma2 / 2, math.sqrt(sigma2))
    return max(1, min(most, round(value)))


def _require_positive(**values: float) -> None:
    for name, value in values.items():
        if not 0 < value < math.inf:
            raise SpecError(f"{name} {value:g} is not above 0")
