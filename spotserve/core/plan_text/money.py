"""What a plan costs, in words."""

from __future__ import annotations

from spotserve.core.plan_text.table import Json


def cost_line(cost: Json) -> str:
    """`cost $3.81 -> $3.33 an hour  $12.40 -> $13.90 per million tokens  stall $0.000441`."""
    line = f"cost {usd_text(cost['before_usd_per_h'])} -> {usd_text(cost['after_usd_per_h'])} an hour"
    tokens = cost["before_usd_per_million_tokens"], cost["after_usd_per_million_tokens"]
    if tokens != (None, None):
        before, after = ("none" if value is None else usd_text(value) for value in tokens)
        line += f"  {before} -> {after} per million tokens"
    return f"{line}  stall {usd_text(cost['stall_usd'])}" if cost["stall_usd"] else line


def usd_text(value: float) -> str:
    """`$13.71`; three digits below a dollar, millionths below a cent (a plan says no more)."""
    if 0 < value < 0.01:
        return f"${value:.6f}"
    return f"${value:.3g}" if 0 < value < 1 or value >= 1e6 else f"${value:.2f}"
