"""Capacity over time, policy by policy: GPUs that are there, that serve, in which layout, and how the service is."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from spotserve.cli.drawing.axes import INK, Scale, step_path, time_words, x_axis, y_axis
from spotserve.cli.drawing.policy_style import WIDTH, styles_of
from spotserve.cli.drawing.svg import Drawing, Markup, element, fitting, stacked, text, title, width_of

Json = dict[str, Any]
"""Plain JSON data, hence `Any`."""

LEFT = 70.0
RIGHT = WIDTH - 20.0
PLOT_HEIGHT = 110.0
STATES = {
    "provisioning": "#c4c4c4",
    "serving": "#8fc58f",
    "draining": "#ecd06f",
    "migrating": "#e08e2b",
    "resuming": "#9ec5e8",
    "degraded": "#c2452d",
    "stopping": "#8c8c8c",
    "stopped": "#6c6c6c",
}
"""In the order of the legend."""

Span = tuple[float, float, str]
"""(from, to, what holds then)."""


def availability(comparison: Json) -> Drawing:
    """A panel for each policy under the first seed, all on one axis of time."""
    runs = comparison["runs"]
    heading = Drawing(text("GPUs that are there, GPUs that serve", x=0, y=14, size=12, font_weight="bold"), 18)
    if not runs:
        return stacked([heading, Drawing(text("There were no runs.", x=0, y=14), 20)])
    seed = min(run["seed"] for run in runs)
    shown = [run for run in runs if run["seed"] == seed]
    end_s = max(max(run["duration_s"], *(moment["at_s"] for moment in run["timeline"])) for run in shown)
    across = Scale(0.0, end_s, LEFT, RIGHT)
    most = max(max(moment["gpus_there"], moment["gpus"]) for run in shown for moment in run["timeline"])
    styles = styles_of(comparison)
    panels = [_panel(run, across, most=most, colour=styles[run["policy"]].colour) for run in shown]
    return stacked([heading, *panels, _legend(seed)], gap=10)


def spans_of(run: Json, key: str, *, end_s: float) -> list[Span]:
    """From when to when something held, moments of the same value taken together."""
    spans: list[Span] = []
    moments = [*run["timeline"], {"at_s": end_s, key: ""}]
    for moment, after in pairwise(moments):
        value = moment[key]
        if spans and spans[-1][2] == value:
            spans[-1] = (spans[-1][0], after["at_s"], value)
        else:
            spans.append((moment["at_s"], after["at_s"], value))
    return [span for span in spans if span[1] > span[0]]


def _panel(run: Json, across: Scale, *, most: int, colour: str) -> Drawing:
    top = 36.0
    bottom = top + PLOT_HEIGHT
    up = Scale(0.0, max(1.0, float(most)), bottom, top)
    parts = [text(run["policy"], x=0, y=14, size=12, font_weight="bold", fill=colour)]
    parts += _layouts(run, across, y=top - 6)
    whole = [value for value in up.ticks(4) if value == int(value)]
    parts += y_axis(up, left=LEFT, right=RIGHT, words=[(value, f"{value:g}") for value in whole])
    timeline = run["timeline"]
    there = [(across.at(one["at_s"]), up.at(one["gpus_there"])) for one in timeline]
    serving = [(across.at(one["at_s"]), up.at(one["gpus"])) for one in timeline]
    parts.append(element("path", d=step_path(there, until_x=RIGHT, ground_y=bottom), fill="#e9e9e9", stroke="none"))
    parts.append(
        element("path", d=step_path(serving, until_x=RIGHT, ground_y=bottom), fill=colour, fill_opacity="0.45")
    )
    parts.append(element("path", d=step_path(there, until_x=RIGHT), stroke="#777777", fill="none", stroke_width=1.2))
    parts += _states(run, across, y=bottom + 4)
    words, unit = time_words(across)
    parts += x_axis(across, top=bottom + 4, bottom=bottom + 18, words=words, name=unit)
    x = across.at(run["duration_s"])
    if x < RIGHT - 1:
        dashed = {"stroke": "#333333", "stroke_dasharray": "4 3"}
        parts.append(element("line", title("the last request has come"), x1=x, x2=x, y1=top, y2=bottom + 18, **dashed))
    return Drawing(Markup("".join(parts)), bottom + 54)


def _layouts(run: Json, across: Scale, *, y: float) -> list[Markup]:
    """The layout of each span above it where there is room, and a tick where it changes."""
    parts = []
    for begin_s, end_s, layout in spans_of(run, "layout", end_s=across.high):
        left, right = across.at(begin_s), across.at(end_s)
        told = fitting(layout, width=right - left - 4, size=9)
        words = title(f"{layout} from {begin_s:.1f} to {end_s:.1f} s")
        parts.append(element("line", words, x1=left, x2=left, y1=y - 9, y2=y + 4, stroke="#999999"))
        if told and layout != "-":
            parts.append(text(told, x=left + 3, y=y, size=9, fill="#333333"))
    return parts


def _states(run: Json, across: Scale, *, y: float) -> list[Markup]:
    """The SERVICE state as a band; what is short is still a line that can be seen."""
    parts = []
    spans = spans_of(run, "service", end_s=across.high)
    # Long ones first: a short one is drawn over its neighbours, not below them.
    for begin_s, end_s, state in sorted(spans, key=lambda span: (span[0] - span[1], span[0])):
        left = across.at(begin_s)
        width = max(1.2, across.at(end_s) - left)
        words = title(f"{state} from {begin_s:.2f} to {end_s:.2f} s")
        fill = STATES.get(state, "#777777")
        box = {"x": left, "y": y, "width": width, "height": 14.0}
        parts.append(element("rect", words, class_="bar", data_state=state, fill=fill, **box))
    return parts


def _legend(seed: int) -> Drawing:
    parts = []
    x = 0.0
    for state, colour in STATES.items():
        parts.append(element("rect", x=x, y=3, width=12, height=10, fill=colour))
        parts.append(text(state, x=x + 16, y=12, size=10))
        x += 16 + width_of(state, 10) + 16
    note = (
        f"Seed {seed}. Grey: GPUs of ready and noticed instances; coloured: those in replicas that serve; above: their"
        " layout (D,P,M); band: the service."
    )
    parts.append(text(note, x=0, y=30, size=10, fill=INK))
    return Drawing(Markup("".join(parts)), 36)
