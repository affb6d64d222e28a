"""Arrange: when to stop decoding before the deadline (SpotServe, section 4.1, its just-in-time arrangement).

    S* = max {S : S * tau + K(S) / B <= T-},   K(S) = bytes that cross after a stop at S, of what is unfinished then

`scan` looks at every stop point: requests end and drop out of K, those that go on grow, so that the feasible points
are no interval and no binary search finds S*. What K is depends on the mode of the plan:

- in_place, nothing is copied before the stop: all weights that move, and for each moving choice that is unfinished
  after S its KV of now, a token more for each step, and the block that the delta brings again;
- live, weights and full KV blocks follow while decoding goes on: one block for each moving choice unfinished after S.

B is one port's rate and K the bytes through it; the busiest port decides. `paper` is the artifact's formula, which
takes K as of now and one token off. `paper-as-published` decodes as long as l_exe(S) < T- - T_mig, and gives KV up
where T_mig < l_exe(S) does not hold. `discard` is the paper's ablation: it stops as late as `paper`, and no KV moves.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from spotserve.errors import SpecError
from spotserve.solvers.paper.arranger import BatchTimes, jit_steps, jit_steps_as_published
from spotserve.solvers.result import Result

MAX_POINTS = 10_000
"""Stop points that are looked at; steps are taken together where the grace period has more of them."""

MAX_BYTES = 2**62
"""What 64-bit sums hold."""

MICROSECONDS = 1_000_000

Counts = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Stream:
    """A choice whose KV moves: tokens until it ends (None: not before the deadline), and what crosses after a stop.

    That is `kv_tokens` now and `growth` more for each token that it decodes until then.
    """

    tokens_left: int | None
    kv_tokens: int
    growth: int


@dataclass(frozen=True, slots=True)
class Decoder:
    """A replica that decodes until the stop: time per token, and its streams."""

    token_us: int
    streams: tuple[Stream, ...]


@dataclass(frozen=True, slots=True)
class Port:
    """A port that must be done by the deadline: bytes that cross it in any case, and per KV token of each decoder."""

    name: str
    fixed_bytes: int
    token_bytes: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ArrangeProblem:
    """`remaining_us` (T-) until everything has crossed; stop points lie `step_us` (tau) apart."""

    remaining_us: int
    step_us: int
    bytes_per_s: int
    decoders: tuple[Decoder, ...]
    ports: tuple[Port, ...]


@dataclass(frozen=True, slots=True)
class Stop:
    """Decode until a point of [first_us, last_us]: every stop point between them is in time. `steps` = last."""

    first_us: int
    last_us: int
    steps: int


@dataclass(frozen=True, slots=True)
class _Scan:
    """Every stop point: when it is, the fullest port's bytes then, and whether they cross in time."""

    step_us: int
    times_us: Counts
    bytes: Counts
    is_feasible: NDArray[np.bool_]

    @property
    def last(self) -> int | None:
        """S*, None if no point is in time."""
        points = np.flatnonzero(self.is_feasible)
        return int(points[-1]) if len(points) else None


def arrange(problem: ArrangeProblem, solver: str) -> Result[Stop]:
    """The stop by the solver called so. Raises SpecError for sums beyond 64 bits."""
    return ARRANGERS[solver](problem)


def scan_stops(problem: ArrangeProblem) -> Result[Stop]:
    """The last stop point whose bytes cross in time, and the first from which on all up to it do."""
    scan = _scan(problem)
    last = scan.last
    if last is None:
        return Result(None, "infeasible", certificate=_proof(scan, -1), statistics=_statistics(scan))
    late = np.flatnonzero(~scan.is_feasible[:last])
    first = int(late[-1]) + 1 if len(late) else 0
    return Result(
        Stop(first * scan.step_us, last * scan.step_us, last),
        "optimal",
        objective=last,
        bound=last,
        certificate=_proof(scan, last),
        statistics=_statistics(scan),
    )


def just_in_time(problem: ArrangeProblem) -> Result[Stop]:
    """The artifact's steps with the bytes as of now; what is already decoding has no initial phase any more.

    The bound is what a scan finds; the status says whether these steps are in time when K grows and shrinks.
    """
    scan = _scan(problem)
    slot_s = _allowed_us(problem, int(scan.bytes[0])) / MICROSECONDS
    steps = jit_steps("preempt", slot_s=slot_s, times=_decoding(scan), output_tokens=len(scan.times_us) - 1)
    return _by_formula(scan, steps)


def just_in_time_as_published(problem: ArrangeProblem) -> Result[Stop]:
    """S_t of the text, with the bytes as of now. Infeasible where KV moves for longer than the batch would still run.

    Then computing it again beats moving it (section 4.1); weights have to move in any case.
    """
    scan = _scan(problem)
    num_bytes = int(scan.bytes[0])
    slot_s = _allowed_us(problem, num_bytes) / MICROSECONDS
    most = len(scan.times_us) - 1
    transfer_s = num_bytes / problem.bytes_per_s if any(decoder.streams for decoder in problem.decoders) else -1.0
    steps = jit_steps_as_published(
        "preempt", slot_s=slot_s, transfer_s=transfer_s, times=_decoding(scan), output_tokens=most
    )
    if steps is None:
        proof: dict[str, str | int | float] = {"kind": "moves_longer_than_it_runs", "bytes": num_bytes}
        return Result(None, "infeasible", certificate=proof, statistics=_statistics(scan))
    return _by_formula(scan, steps)


def _decoding(scan: _Scan) -> BatchTimes:
    """What is already decoding has no initial phase any more."""
    return BatchTimes(initial_s=0.0, token_s=scan.step_us / MICROSECONDS, single_initial_s=0.0)


def _by_formula(scan: _Scan, steps: int) -> Result[Stop]:
    """The stop after so many steps, beside what a scan finds."""
    return Result(
        Stop(steps * scan.step_us, steps * scan.step_us, steps),
        "feasible" if scan.is_feasible[steps] else "infeasible",
        objective=steps,
        bound=steps if scan.last is None else scan.last,
        certificate=_proof(scan, steps),
        statistics=_statistics(scan),
    )


DISCARD = "discard"

ARRANGERS: dict[str, Callable[[ArrangeProblem], Result[Stop]]] = {
    "scan": scan_stops,
    "paper": just_in_time,
    "paper-as-published": just_in_time_as_published,
    DISCARD: just_in_time,
}
BY_FORMULA = ("paper", "paper-as-published", DISCARD)
"""Those that decode for as long as they can."""


def _scan(problem: ArrangeProblem) -> _Scan:
    """All stop points of the grace period."""
    remaining_us = max(0, problem.remaining_us)
    step_us = max(1, problem.step_us, -(-remaining_us // MAX_POINTS))
    times_us = np.arange(remaining_us // step_us + 1, dtype=np.int64) * step_us
    _check_sums(problem, remaining_us)
    tokens = [_tokens(decoder, times_us) for decoder in problem.decoders]
    fullest = np.zeros_like(times_us)
    for port in problem.ports:
        load = np.full_like(times_us, port.fixed_bytes)
        for count, token_bytes in zip(tokens, port.token_bytes, strict=True):
            if token_bytes:
                load += count * token_bytes
        fullest = np.maximum(fullest, load)
    # Time left times rate passes 64 bits, so it is counted in Python's integers.
    most = [(remaining_us - time_us) * problem.bytes_per_s // MICROSECONDS for time_us in times_us.tolist()]
    room = np.array([min(num_bytes, MAX_BYTES) for num_bytes in most], dtype=np.int64)
    return _Scan(step_us, times_us, fullest, (fullest <= room) & (problem.remaining_us >= 0))


def _check_sums(problem: ArrangeProblem, remaining_us: int) -> None:
    """Raise SpecError if a port's bytes could pass 64 bits."""
    most = [
        sum(s.kv_tokens + s.growth * (remaining_us // decoder.token_us) for s in decoder.streams)
        for decoder in problem.decoders
    ]
    for port in problem.ports:
        load = port.fixed_bytes + sum(a * b for a, b in zip(most, port.token_bytes, strict=True))
        if load >= MAX_BYTES:
            raise SpecError(f"{port.name} has {load} bytes to pass after a stop, at most {MAX_BYTES - 1} are counted")


def _tokens(decoder: Decoder, times_us: Counts) -> Counts:
    """KV tokens of a decoder's streams that are unfinished at each time."""
    never = int(times_us[-1]) // decoder.token_us + 1
    streams = sorted(decoder.streams, key=lambda s: never if s.tokens_left is None else s.tokens_left)
    ends = np.array([never if s.tokens_left is None else min(s.tokens_left, never) for s in streams], dtype=np.int64)
    now = _from_each_on([s.kv_tokens for s in streams])
    growth = _from_each_on([s.growth for s in streams])
    decoded = times_us // decoder.token_us
    unfinished = np.searchsorted(ends, decoded, side="right")
    result: Counts = now[unfinished] + decoded * growth[unfinished]
    return result


def _from_each_on(values: list[int]) -> Counts:
    """Sums of each value and all after it; 0 behind the last."""
    return np.concatenate([np.cumsum(np.array(values[::-1], dtype=np.int64))[::-1], np.zeros(1, dtype=np.int64)])


def _allowed_us(problem: ArrangeProblem, num_bytes: int) -> int:
    """Time that decoding may use if so many bytes cross after it."""
    return problem.remaining_us - -(-num_bytes * MICROSECONDS // problem.bytes_per_s)


def _proof(scan: _Scan, steps: int) -> dict[str, str | int | float]:
    """Why not one step later: the bytes that would then cross in too little time. A formula may stop too soon."""
    following = steps + 1
    proof: dict[str, str | int | float] = {"kind": "grace_ends", "points": len(scan.times_us)}
    if following < len(scan.times_us):
        kind = "stops_early" if scan.is_feasible[following] else "too_late"
        proof = {"kind": kind, "step": following, "bytes": int(scan.bytes[following])}
        proof["at_us"] = int(scan.times_us[following])
    if steps >= 0:
        proof["bytes_after_stop"] = int(scan.bytes[steps])
    return proof


def _statistics(scan: _Scan) -> dict[str, int | float]:
    return {
        "points": len(scan.times_us),
        "feasible_points": int(scan.is_feasible.sum()),
        "step_us": scan.step_us,
        "bytes_now": int(scan.bytes[0]),
    }
