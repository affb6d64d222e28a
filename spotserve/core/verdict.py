"""Whether a planner's answer may be run: the checker's findings, but for a deadline that the ladder answers."""

from __future__ import annotations

from spotserve.core.check import check_plan
from spotserve.core.finding import Finding
from spotserve.core.plan import Plan


def findings_of(plan: Plan, *, daemon_epoch: int | None = None) -> tuple[Finding, ...]:
    """What the checker has against a plan; one without steps has nothing to be checked."""
    return check_plan(plan, daemon_epoch=daemon_epoch) if plan.steps else ()


def blocking(findings: tuple[Finding, ...]) -> Finding | None:
    """The first finding that forbids a run. A late plan is run all the same: what does not arrive is recomputed."""
    return next((finding for finding in findings if finding.code != "past_deadline"), None)
