"""A plan's report: one SVG, or one HTML page with that picture and the text beside it. Nothing outside is loaded."""

from __future__ import annotations

from html import escape

from spotserve.cli.drawing.gantt import WIDTH, gantt
from spotserve.cli.drawing.layout import layout_panels
from spotserve.cli.drawing.svg import Drawing, Markup, document, stacked, text
from spotserve.core.plan_text.certificates import decision_lines
from spotserve.core.plan_text.page import MOST_ROWS, headline, path_table, step_table
from spotserve.core.plan_text.table import Json, printable, runs_text
from spotserve.core.plan_text.topology import instance_table, request_lines
from spotserve.core.plan_text.transfers import busiest_line, link_table

MARGIN = 20
STYLE = ".bar:hover, .gpu:hover { opacity: 0.8; }"
PAGE_STYLE = """
body { font: 14px/1.45 system-ui, sans-serif; color: #222; background: #fff; }
body { margin: 1.5rem auto; max-width: 1260px; padding: 0 1rem; }
h1 { font-size: 1.25rem; } h2 { font-size: 1rem; margin: 1.6rem 0 0.4rem; }
pre { font: 12px/1.4 ui-monospace, 'DejaVu Sans Mono', Menlo, Consolas, monospace; }
pre { overflow-x: auto; background: #f7f7f7; padding: 0.7rem; }
figure { margin: 1rem 0; overflow-x: auto; }
"""


def plan_svg(plan: Json) -> str:
    """The picture: headline, both layouts, the Gantt chart."""
    plan = printable(plan)
    inner = stacked([_heading(plan), layout_panels(plan), gantt(plan)], gap=18)
    framed = Drawing(
        Markup(f'<g transform="translate({MARGIN} {MARGIN})">{inner.markup}</g>'), inner.height + 2 * MARGIN
    )
    return document(framed, width=WIDTH + 2 * MARGIN, style=STYLE)


def _heading(plan: Json) -> Drawing:
    lines = [*headline(plan).replace("  ", " · ").split("\n"), busiest_line(plan)]
    shown = [line for line in lines if line]
    parts = [
        text(line, x=0, y=14.0 + 16 * index, size=14 if not index else 12, font_weight="normal" if index else "bold")
        for index, line in enumerate(shown)
    ]
    return Drawing(Markup("".join(parts)), 16.0 * len(shown) + 4)


def plan_html(plan: Json) -> str:
    """A page that stands alone: the picture, then the tables of `show`."""
    plan = printable(plan)
    trigger = plan["trigger"]
    event = " ".join([trigger["kind"], runs_text(trigger["instances"])]).strip()
    name = f"Plan {plan['epoch']['from']} -> {plan['epoch']['to']}: {event}"
    blocks = (
        ("Why it is so", decision_lines(plan)),
        ("Critical path", path_table(plan, most_rows=MOST_ROWS)),
        ("Requests", request_lines(plan)),
        ("Transfers by link", link_table(plan, most_rows=MOST_ROWS)),
        ("Instances (replica:stage x GPUs)", instance_table(plan, most_rows=MOST_ROWS)),
    )
    sections = "\n".join(f"<h2>{escape(heading)}</h2>\n<pre>{escape(body)}</pre>" for heading, body in blocks if body)
    steps = escape(step_table(plan, most_rows=10 * MOST_ROWS))
    details = f"<details><summary>Steps</summary>\n<pre>{steps}</pre>\n</details>" if steps else ""
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f"<title>{escape(name)}</title>\n<style>{PAGE_STYLE}</style>\n</head>\n<body>\n<h1>{escape(name)}</h1>\n"
        f"<figure>{plan_svg(plan)}</figure>\n{sections}\n{details}\n</body>\n</html>\n"
    )
