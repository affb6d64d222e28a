"""Draws docs/lifecycles.md from the tables of spotserve/core/lifecycles.py: `python docs/draw_lifecycles.py`."""

from __future__ import annotations

from pathlib import Path

from spotserve.core.lifecycles import LIFECYCLES, Lifecycle, mermaid

PAGE = Path(__file__).parent / "lifecycles.md"
HEAD = """\
# Lifecycles

Drawn by `make docs` from the tables of `spotserve/core/lifecycles.py`; a test fails when the two differ. What is no
edge here cannot happen: firing it is a bug, and raises.
"""


def page() -> str:
    """The whole page."""
    return HEAD + "".join(section(lifecycle) for lifecycle in LIFECYCLES)


def section(lifecycle: Lifecycle) -> str:
    """One lifecycle: its picture and its ends."""
    sources = {source for edge in lifecycle.edges for source in edge.sources}
    ends = [state for state in lifecycle.states if state not in sources]
    told = f"Ends: {', '.join(f'`{state}`' for state in ends)}." if ends else "It has no end."
    return f"\n## {lifecycle.name.replace('_', ' ').capitalize()}\n\n```mermaid\n{mermaid(lifecycle)}```\n\n{told}\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
