"""Just-in-time arrangement (section 4.1): how many tokens to decode before handing over.

Judged before a batch starts, never inside one. Before a preemption the work must be over in time, so estimates are
careful; before an acquisition it should last until the instance has joined, so they are hopeful.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from spotserve.solvers.paper.latency import (
    OUTPUT_TOKENS,
    BatchPlan,
    LatencyTable,
    PhaseTimes,
    careful,
    hopeful,
    phase_times,
)

Interruption = Literal["preempt", "acquire"]

GRACE_S = 30.0
"""Grace period that the artifact's engine has built in."""

SWITCH_S = 0.5
"""What a restart of the engines is taken to cost beside the transfer."""


@dataclass(frozen=True, slots=True)
class BatchTimes:
    """Seconds of the batch to be started: its initial phase and each token; `single_initial_s`: a batch of one."""

    initial_s: float
    token_s: float
    single_initial_s: float


def slot_s(kind: Interruption, *, cost_s: float, elapsed_s: float, grace_s: float = GRACE_S) -> float:
    """Seconds that decoding may use; `cost_s` is what a switch costs and `elapsed_s` the time since the notice.

    An acquisition turns the sign of the cost: its migration starts when the instance has joined, so nothing is
    saved by stopping earlier.
    """
    return grace_s - (cost_s if kind == "preempt" else -cost_s) - elapsed_s


def switch_cost_s(transfer_s: float, *, remaining_s: float | None = None, grace_s: float = GRACE_S) -> float:
    """What a switch costs: transfer, restart, and the part of the grace period that is lost with `remaining_s` left."""
    late_s = 0.0 if remaining_s is None else max(grace_s - remaining_s, 0.0)
    return transfer_s + SWITCH_S + late_s


def jit_steps(kind: Interruption, *, slot_s: float, times: BatchTimes, output_tokens: int = OUTPUT_TOKENS) -> int:
    """Tokens to decode before the hand-over: 0 is "do not start", `output_tokens` the whole batch.

    The artifact's formula: whole tokens after the initial phase, one fewer before a preemption and one more before an
    acquisition. All times in seconds.
    """
    if slot_s <= times.single_initial_s:
        return 0
    whole = int((slot_s - times.initial_s) / times.token_s)
    return min(max(whole + (-1 if kind == "preempt" else 1), 0), output_tokens)


def jit_steps_as_published(
    kind: Interruption,
    *,
    slot_s: float,
    transfer_s: float,
    times: BatchTimes,
    output_tokens: int = OUTPUT_TOKENS,
) -> int | None:
    """S_t of the paper; None where recomputing beats migrating, because T_mig < l_exe(S_t) does not hold.

    `slot_s` is T- minus T_mig before a preemption and T+ before an acquisition: the largest S with l_exe(S) below it,
    or the smallest with l_exe(S) not below it (all of S_out if there is none).
    """
    steps = range(output_tokens + 1)
    if kind == "preempt":
        chosen = max((step for step in steps if _lasts_s(times, step) < slot_s), default=0)
    else:
        chosen = min((step for step in steps if _lasts_s(times, step) >= slot_s), default=output_tokens)
    return chosen if transfer_s < _lasts_s(times, chosen) else None


def batch_times(kind: Interruption, table: LatencyTable, plan: BatchPlan) -> BatchTimes:
    """Times of a batch from an offline profile: careful before a preemption, hopeful before an acquisition."""
    single = BatchPlan(plan.pipeline, plan.tensor, 1, plan.initial_parts, plan.token_parts)
    corrected: PhaseTimes = (careful if kind == "preempt" else hopeful)(table, phase_times(table, plan))
    return BatchTimes(
        initial_s=corrected.initial_ms / 1000,
        token_s=corrected.token_ms / 1000,
        single_initial_s=careful(table, phase_times(table, single)).initial_ms / 1000,
    )


def _lasts_s(times: BatchTimes, steps: int) -> float:
    """l_exe(S)."""
    return times.initial_s + steps * times.token_s
