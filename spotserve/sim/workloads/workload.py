"""A workload: when requests arrive and how long they are, and the ways to change one; it keeps a note of each."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, replace
from functools import cached_property

from spotserve.errors import SpecError
from spotserve.sim.workloads.lengths import EmpiricalLengths, Lengths

MAX_ARRIVALS = 500_000
MAX_TOKENS = 2**24
"""Of one prompt or one answer."""
MAX_SECONDS = 366 * 86_400.0


@dataclass(frozen=True, slots=True)
class Arrival:
    """One request: when it arrives, tokens of its prompt, and tokens of its answer if nobody cuts it short."""

    at_s: float
    prompt_tokens: int
    output_tokens: int


@dataclass(frozen=True)
class Workload:
    """Requests in order of arrival, where they come from, and how they were scaled or assumed, one sentence each."""

    name: str
    source: str
    arrivals: tuple[Arrival, ...]
    notes: tuple[str, ...] = ()

    @property
    def duration_s(self) -> float:
        """When the last request arrives."""
        return self.arrivals[-1].at_s if self.arrivals else 0.0

    @property
    def rate_rps(self) -> float:
        """Requests per second from 0 until the last one arrives."""
        return len(self.arrivals) / self.duration_s if self.duration_s > 0 else 0.0

    @cached_property
    def cv(self) -> float:
        """Coefficient of variation of the gaps between arrivals, the sample's own; 0 for fewer than three requests."""
        gaps = [after.at_s - before.at_s for before, after in zip(self.arrivals, self.arrivals[1:], strict=False)]
        mean = math.fsum(gaps) / len(gaps) if gaps else 0.0
        if len(gaps) < 2 or mean == 0:
            return 0.0
        return math.sqrt(math.fsum((gap - mean) ** 2 for gap in gaps) / (len(gaps) - 1)) / mean

    @cached_property
    def tokens(self) -> tuple[int, int]:
        """(prompt tokens, output tokens) of all requests."""
        return sum(each.prompt_tokens for each in self.arrivals), sum(each.output_tokens for each in self.arrivals)


def with_note(workload: Workload, arrivals: tuple[Arrival, ...], note: str) -> Workload:
    """Other arrivals of the same origin. Raises SpecError if none is left."""
    if not arrivals:
        raise SpecError(f"workload {workload.name} has no request left: {note}")
    return replace(workload, arrivals=arrivals, notes=(*workload.notes, note))


def window(workload: Workload, *, start_s: float, stop_s: float) -> Workload:
    """The requests that arrive in [start_s, stop_s), their time counted from `start_s`."""
    if not 0 <= start_s < stop_s:
        raise SpecError(f"window {start_s:g} to {stop_s:g} s is not a piece of time", hint="0 <= start_s < stop_s")
    inside = tuple(
        replace(each, at_s=each.at_s - start_s) for each in workload.arrivals if start_s <= each.at_s < stop_s
    )
    return with_note(workload, inside, f"requests of {start_s:g} to {stop_s:g} s, counted from 0")


def at_rate(workload: Workload, *, rate_rps: float) -> Workload:
    """The same requests with all times stretched or squeezed, so that they arrive at a mean rate."""
    if not 0 < rate_rps < math.inf or workload.rate_rps == 0:
        raise SpecError(f"rate_rps {rate_rps:g} is not a rate that workload {workload.name} can be brought to")
    factor = workload.rate_rps / rate_rps
    if workload.duration_s * factor > MAX_SECONDS:
        raise SpecError(f"at {rate_rps:g} requests per second workload {workload.name} takes more than a year")
    stretched = tuple(replace(each, at_s=each.at_s * factor) for each in workload.arrivals)
    return with_note(workload, stretched, f"times multiplied by {factor:g}: {rate_rps:g} requests per second")


def thinned(workload: Workload, *, share: float, seed: int) -> Workload:
    """Each request kept with a probability, its time unchanged: less load with the pattern of the day."""
    if not 0 < share <= 1:
        raise SpecError(f"share {share:g} is not between 0 and 1")
    rng = random.Random(f"{seed}:{workload.name}:thinned")
    kept = tuple(each for each in workload.arrivals if rng.random() < share)
    return with_note(workload, kept, f"each request kept with probability {share:g}, seed {seed}")


def clipped(
    workload: Workload, *, max_prompt_tokens: int | None = None, max_output_tokens: int | None = None
) -> Workload:
    """Prompts and answers cut to at most so many tokens, as a model of a shorter context serves them."""
    prompt = MAX_TOKENS if max_prompt_tokens is None else max_prompt_tokens
    output = MAX_TOKENS if max_output_tokens is None else max_output_tokens
    if prompt < 1 or output < 1:
        raise SpecError(f"max_prompt_tokens {prompt} and max_output_tokens {output} are not 1 or more")
    cut = tuple(
        replace(
            each,
            prompt_tokens=min(each.prompt_tokens, prompt),
            output_tokens=min(each.output_tokens, output),
        )
        for each in workload.arrivals
    )
    changed = sum(before != after for before, after in zip(workload.arrivals, cut, strict=True))
    note = f"prompts cut to {prompt} and answers to {output} tokens: {changed} of {len(cut)} requests"
    return with_note(workload, cut, note)


def lengths_of(workload: Workload) -> EmpiricalLengths:
    """The lengths of a workload's requests as a distribution to draw from."""
    pairs = tuple((each.prompt_tokens, each.output_tokens) for each in workload.arrivals)
    return EmpiricalLengths(pairs, workload.name)


def with_lengths(workload: Workload, lengths: Lengths, *, seed: int) -> Workload:
    """The same arrival times with lengths drawn anew."""
    rng = random.Random(f"{seed}:{workload.name}:lengths")
    drawn = tuple(Arrival(each.at_s, *lengths.draw(rng)) for each in workload.arrivals)
    return with_note(workload, drawn, f"lengths: {lengths.told}, seed {seed}")
