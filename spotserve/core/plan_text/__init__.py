"""The text view of a plan, rendered from its JSON: what `show` prints, and the differences that `diff` prints."""

from __future__ import annotations

from spotserve.core.plan_text.certificates import certificate_text, decision_lines
from spotserve.core.plan_text.changes import changes_text, plan_changes, plan_facts
from spotserve.core.plan_text.page import plan_text

__all__ = ["certificate_text", "changes_text", "decision_lines", "plan_changes", "plan_facts", "plan_text"]
