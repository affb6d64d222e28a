"""The checker: judges any plan file without the solvers that made it (design section 3, P3).

It shares no code with them: coverage, holders, memory, order and deadlines are derived from the file again, with the
slice map as the only common ground (the workers use that one as well). Meaning is judged first, digests after.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator

from pydantic import ValidationError

from spotserve.core.canonical import digest
from spotserve.core.check_content import (
    check_bytes,
    check_kv,
    check_layout,
    check_memory,
    check_releases,
    check_requests,
    check_slices,
    check_weights,
)
from spotserve.core.check_order import (
    check_deadline,
    check_doubles,
    check_graph,
    check_missing,
    check_mode,
)
from spotserve.core.check_world import check_snapshot, check_spec
from spotserve.core.finding import Facts, Finding
from spotserve.core.plan import FORMAT_VERSION, Plan

MAX_PLAN_BYTES = 64 * 1024 * 1024
MAX_DEPTH = 64
MAX_FINDINGS = 1000

STRINGS = re.compile(rb'"(?:[^"\\\\]++|\\\\.)*+"?', re.DOTALL)
"""A JSON string, closed or cut off by the end of the file; possessive, so it never backtracks."""

BRACKETS = re.compile(rb"[\[\]{}]")

Rule = Callable[[Facts], Iterator[Finding]]

GROUND_RULES: tuple[Rule, ...] = (check_spec, check_snapshot)
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
    for rules in (GROUND_RULES, FORM_RULES, MEANING_RULES):
        if any(finding.code == "corrupt" for finding in findings):
            break
        findings += [finding for rule in rules for finding in rule(facts)]
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
    if daemon_epoch is not None and daemon_epoch != plan.epoch.from_:
        message = f"made for epoch {plan.epoch.from_}, the daemon has {daemon_epoch}"
        yield Finding(code="stale", path="epoch.from", message=message)
    if (plan.policy, plan.policy_version) != (plan.spec.policy, plan.spec.policy_version):
        message = f"policy {plan.policy} {plan.policy_version} is not the spec's {plan.spec.policy}"
        yield Finding(code="stale", path="policy", message=message)


def read_plan(data: bytes) -> Plan | Finding:
    """A plan from the bytes of a file, or the one finding that says why it is none."""
    if len(data) > MAX_PLAN_BYTES:
        return _corrupt("", f"file size {len(data)} exceeds {MAX_PLAN_BYTES} bytes")
    if _depth(data) > MAX_DEPTH:
        return _corrupt("", f"nesting exceeds {MAX_DEPTH} levels")
    try:
        raw = json.loads(data.decode("utf-8"), object_pairs_hook=_unique_keys, parse_constant=_no_constant)
    except (UnicodeDecodeError, ValueError, RecursionError) as error:
        return _corrupt("", f"not JSON: {str(error)[:200]}")
    if not isinstance(raw, dict):
        return _corrupt("", f"the file holds a {type(raw).__name__}, not an object")
    version = raw.get("format_version")
    if version != FORMAT_VERSION:
        shown = str(version)[:40]
        return Finding(
            code="bad_version", path="format_version", message=f"format version {shown} is not {FORMAT_VERSION}"
        )
    try:
        return Plan.model_validate_json(data)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"]).lstrip(".")
        return _corrupt(where, str(first["msg"])[:200])


def verify(data: bytes, *, daemon_epoch: int | None = None) -> tuple[Finding, ...]:
    """All findings of a plan file."""
    plan = read_plan(data)
    return (plan,) if isinstance(plan, Finding) else check_plan(plan, daemon_epoch=daemon_epoch)


def _corrupt(path: str, message: str) -> Finding:
    return Finding(code="corrupt", path=path or "file", message=message)


def _depth(data: bytes) -> int:
    """The deepest nesting of brackets outside strings; counted before any parser recurses."""
    depth = deepest = 0
    for bracket in BRACKETS.finditer(STRINGS.sub(b"", data)):
        depth += 1 if bracket.group() in b"[{" else -1
        deepest = max(deepest, depth)
    return deepest


def _unique_keys(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """Refuse an object that names a key twice: two readers could see two plans."""
    result = dict(pairs)
    if len(result) < len(pairs):
        raise ValueError("an object names a key twice")
    return result


def _no_constant(name: str) -> object:
    """Refuse NaN and Infinity, which JSON does not have."""
    raise ValueError(f"{name} is not JSON")
