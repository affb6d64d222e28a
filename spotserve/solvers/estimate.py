"""Times of a plan: when steps end, how long clients would wait, and what the average request is."""

from __future__ import annotations

from collections.abc import Iterable

from spotserve.core.cost import Workload
from spotserve.core.ids import StepId
from spotserve.core.plan import PREPARING_KINDS, TRANSFER_KINDS, Estimates, PlanningProblem, Quiesce, Step
from spotserve.core.spec import Profile
from spotserve.solvers.steps import busiest_port_s, busiest_storage_s


def margin_s(left_s: float) -> float:
    """Safety kept of a grace period: a tenth, at least half a second unless that is most of it."""
    return max(0.1 * left_s, min(0.5, 0.5 * left_s))


def workload_of(problem: PlanningProblem) -> Workload:
    """The average request: the snapshot's, else what is expected, or half a context in and a quarter out."""
    requests = problem.snapshot.requests
    length = problem.spec.limits.max_model_len
    prompt, output = problem.spec.limits.expected_tokens or (max(1, length // 2), max(1, length // 4))
    if requests:
        prompt = max(1, sum(request.prompt_tokens for request in requests) // len(requests))
        output = max(1, sum(request.max_tokens for request in requests) // len(requests))
    return Workload(min(prompt, length), min(output, length), problem.snapshot.load_rps)


def finish_times(steps: Iterable[Step]) -> dict[StepId, float]:
    """When each step ends if every step starts as soon as all it depends on are done."""
    finish: dict[StepId, float] = {}
    begins: dict[tuple[StepId, ...], float] = {}
    for step in steps:
        begin = begins.get(step.depends_on)
        if begin is None:  # Many steps wait for the same ones.
            begin = begins[step.depends_on] = max((finish[before] for before in step.depends_on), default=0.0)
        if isinstance(step, Quiesce):
            begin = max(begin, step.not_before_s)
        finish[step.id] = begin + step.estimated_s
    return finish


def estimate(steps: tuple[Step, ...], remaining_s: float | None, *, profile: Profile) -> Estimates:
    """Copy, stall and total time along the longest path, or the busiest port or disk where that takes longer."""
    if not steps:
        return Estimates(slack_s=remaining_s)
    finish = finish_times(steps)
    begin = {step.id: finish[step.id] - step.estimated_s for step in steps}
    copies = [step for step in steps if step.kind in PREPARING_KINDS]
    path_s = max((finish[s.id] for s in copies), default=0.0) - min((begin[s.id] for s in copies), default=0.0)
    copy_s = max(path_s, busiest_s(copies, profile))
    stall_s = extra_s = 0.0
    if stops := [begin[step.id] for step in steps if step.kind == "quiesce"]:
        cut_over_s = max(finish[step.id] for step in steps if step.kind in ("commit", "activate", "recompute"))
        stopped = [step for step in steps if step.kind in TRANSFER_KINDS and begin[step.id] > min(stops)]
        moving_s = max((finish[s.id] for s in stopped), default=0.0) - min((begin[s.id] for s in stopped), default=0.0)
        extra_s = max(0.0, busiest_s(stopped, profile) - moving_s)
        stall_s = cut_over_s - min(stops) + extra_s
    done_s = max(finish.values()) + max(copy_s - path_s, extra_s)
    return Estimates(
        copy_s=round(copy_s, 6),
        stall_s=round(stall_s, 6),
        done_s=round(done_s, 6),
        slack_s=None if remaining_s is None else round(remaining_s - done_s, 6),
    )


def busiest_s(steps: Iterable[Step], profile: Profile) -> float:
    """Seconds that the busiest port needs for the copies of `steps`, or the busiest way to storage for the loads."""
    listed = tuple(steps)
    ports_s = busiest_port_s(listed, link_bytes_per_s=profile.link_bytes_per_s)
    return max(ports_s, busiest_storage_s(listed, storage_bytes_per_s=profile.storage_bytes_per_s))
