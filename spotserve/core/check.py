"""The checker: judges any plan file without the solvers that made it (design section 3, P3).

It shares no code with them: coverage, holders, memory, order and deadlines are derived from the file again, with the
slice map as the only common ground (the workers use that one as well). Meaning is judged first, digests after.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice

from spotserve.core.canonical import digest
from spotserve.core.check_content import (
    check_bytes,
    check_layout,
    check_releases,
    check_slices,
    check_weights,
)
from spotserve.core.check_memory import check_memory
from spotserve.core.check_order import (
    check_deadline,
    check_doubles,
    check_graph,
    check_missing,
    check_mode,
)
from spotserve.core.check_requests import check_kv, check_requests
from spotserve.core.check_world import check_membership, check_snapshot, check_spec
from spotserve.core.finding import Facts, Finding
from spotserve.core.plan import FORMAT_VERSION, EpochChange, Plan, PlanningProblem, Target
from spotserve.core.strict_json import JsonFaultError, parse, shaped, shown

MAX_FINDINGS = 1000

Rule = Callable[[Facts], Iterator[Finding]]

GROUND_RULES: tuple[Rule, ...] = (check_spec, check_snapshot)
"""Each takes the one before it for granted."""

FORM_RULES: tuple[Rule, ...] = (check_graph, check_layout, check_slices)
"""What the rules of the next line take for granted."""

MEANING_RULES: tuple[Rule, ...] = (
    check_doubles,
    check_missing,
    check_weights,
    check_releases,
    check_kv,
    check_requests,
    check_memory,
    check_mode,
    check_deadline,
    check_bytes,
)


def check_plan(plan: Plan, *, daemon_epoch: int | None = None) -> tuple[Finding, ...]:
    """Everything that is wrong with a plan; `daemon_epoch` is the running daemon's, if it is one that asks."""
    facts = Facts(plan)
    findings: list[Finding] = []
    for rules in (*((rule,) for rule in GROUND_RULES), FORM_RULES, MEANING_RULES):
        if any(finding.code == "corrupt" for finding in findings):
            break
        for rule in rules:
            # What nobody is told is not looked for: a small file may have as many faults as pairs of steps.
            findings += islice(rule(facts), MAX_FINDINGS - len(findings))
    findings += _claims(plan)
    findings += _currency(plan, daemon_epoch)
    return tuple(findings[:MAX_FINDINGS])


def _claims(plan: Plan) -> Iterator[Finding]:
    """The plan says of itself what is so."""
    if plan.applyable != bool(plan.steps):
        message = f"applyable is {plan.applyable}, the plan has {len(plan.steps)} steps"
        yield Finding(code="corrupt", path="applyable", message=message)


def _currency(plan: Plan, daemon_epoch: int | None) -> Iterator[Finding]:
    """Made for this world, this spec and this epoch."""
    if plan.spec_digest != digest(plan.spec):
        yield Finding(code="stale", path="spec_digest", message="the spec has another digest")
    if plan.snapshot_digest != digest(plan.snapshot.world):
        yield Finding(code="stale", path="snapshot_digest", message="the snapshot's world has another digest")
    if plan.epoch.from_ != plan.snapshot.world.epoch:
        message = f"made for epoch {plan.epoch.from_}, the snapshot has {plan.snapshot.world.epoch}"
        yield Finding(code="stale", path="epoch.from", message=message)
    if plan.epoch.to <= plan.epoch.from_:
        message = f"epoch {plan.epoch.to} does not follow epoch {plan.epoch.from_}"
        yield Finding(code="stale", path="epoch.to", message=message)
    unused = plan.snapshot.next_epoch
    if unused is not None and plan.epoch.to < unused:
        message = f"epoch {plan.epoch.to} is used already, {unused} is the first that is not"
        yield Finding(code="stale", path="epoch.to", message=message)
    if daemon_epoch is not None and daemon_epoch != plan.epoch.from_:
        message = f"made for epoch {plan.epoch.from_}, the daemon has {daemon_epoch}"
        yield Finding(code="stale", path="epoch.from", message=message)
    if (plan.policy, plan.policy_version) != (plan.spec.policy, plan.spec.policy_version):
        message = f"policy {plan.policy} {plan.policy_version} is not the spec's {plan.spec.policy}"
        yield Finding(code="stale", path="policy", message=message)


def read_plan(data: bytes) -> Plan | Finding:
    """A plan from the bytes of a file, or the one finding that says why it is none."""
    try:
        raw = parse(data)
        version = raw.get("format_version") if isinstance(raw, dict) else FORMAT_VERSION
        if version != FORMAT_VERSION:
            message = f"format version {shown(version, 40)} is not {FORMAT_VERSION}"
            return Finding(code="bad_version", path="format_version", message=message)
        return shaped(Plan, raw)
    except JsonFaultError as fault:
        return Finding(code="corrupt", path=fault.path or "file", message=fault.message)


def misfits(problem: PlanningProblem) -> Iterator[Finding]:
    """What in a snapshot or an event does not fit the spec, or contradicts itself: seen before any solver is asked."""
    nothing = Plan(
        epoch=EpochChange.model_validate({"from": problem.snapshot.world.epoch, "to": problem.epoch_to}),
        trigger=problem.trigger,
        policy=problem.spec.policy,
        policy_version=problem.spec.policy_version,
        spec=problem.spec,
        spec_digest="",
        snapshot=problem.snapshot,
        snapshot_digest="",
        target=Target(replicas=()),
        applyable=False,
        complete=False,
    )
    facts = Facts(nothing)
    for rule in (*GROUND_RULES, check_membership):
        found = list(rule(facts))
        yield from found
        if found:
            return


def verify(data: bytes, *, daemon_epoch: int | None = None) -> tuple[Finding, ...]:
    """All findings of a plan file."""
    plan = read_plan(data)
    return (plan,) if isinstance(plan, Finding) else check_plan(plan, daemon_epoch=daemon_epoch)
