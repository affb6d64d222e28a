"""Requests and their arrival times, drawn from a seed: the same for every policy and round."""

from __future__ import annotations

import random
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Arrival:
    """One request: when it is sent, counted from the start of the trace, and what it asks for."""

    index: int
    at_s: float
    prompt_ids: tuple[int, ...]
    max_tokens: int
    temperature: float
    seed: int


@dataclass(frozen=True, slots=True)
class WorkloadShape:
    """Poisson arrivals of requests with uniform lengths; every third one is sampled, the rest are greedy."""

    rate_rps: float = 0.4
    duration_s: float = 66.0
    prompt_tokens: tuple[int, int] = (64, 128)
    output_tokens: tuple[int, int] = (64, 128)
    vocab_size: int = 32_000
    seed: int = 0


def draw_arrivals(shape: WorkloadShape) -> tuple[Arrival, ...]:
    """All requests of a run, in order of arrival."""
    rng = random.Random(shape.seed)
    arrivals: list[Arrival] = []
    at_s = rng.expovariate(shape.rate_rps)
    while at_s < shape.duration_s:
        index = len(arrivals)
        prompt_ids = tuple(rng.randrange(shape.vocab_size) for _ in range(rng.randint(*shape.prompt_tokens)))
        arrivals.append(
            Arrival(
                index=index,
                at_s=at_s,
                prompt_ids=prompt_ids,
                max_tokens=rng.randint(*shape.output_tokens),
                temperature=1.0 if index % 3 == 2 else 0.0,
                seed=rng.randrange(2**31),
            )
        )
        at_s += rng.expovariate(shape.rate_rps)
    return tuple(arrivals)
