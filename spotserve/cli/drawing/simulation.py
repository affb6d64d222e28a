"""The report of `spotserve simulate`: a page that stands alone and its pictures as files of their own."""

from __future__ import annotations

from collections.abc import Callable
from html import escape
from statistics import median
from typing import Any

from spotserve.cli.drawing.availability import availability
from spotserve.cli.drawing.axes import INK, Scale, line_path, scale_for, span_words, time_words, x_axis, y_axis
from spotserve.cli.drawing.policy_style import WIDTH, PolicyStyle, legend, styles_of
from spotserve.cli.drawing.report import MARGIN, PAGE_STYLE
from spotserve.cli.drawing.svg import Drawing, Markup, document, element, text, title, width_of
from spotserve.cli.simulation_text import (
    facts_text,
    footnote,
    migration_tables,
    policies_table,
    seeds_of,
)
from spotserve.core.plan_text.table import printable, seconds_text

Json = dict[str, Any]
"""Plain JSON data, hence `Any`."""

LEFT = 70.0
RIGHT = WIDTH - 20.0
LEAST_STALL_S = 1e-3
STYLE = ".mark:hover, .bar:hover { opacity: 0.7; }"


def simulation_files(comparison: Json) -> dict[str, str]:
    """Name -> text of every file of a report."""
    drawings = {name: draw(comparison) for name, (_, draw) in PICTURES.items()}
    pictures = {f"{name}.svg": _picture(drawing) for name, drawing in drawings.items()}
    return {"report.html": simulation_html(comparison), **pictures}


def simulation_html(comparison: Json) -> str:
    """The page: what was simulated, the table, every picture, the migrations."""
    comparison = printable(comparison)
    name = f"Simulation: {comparison['scenario']['name']}"
    figures = "\n".join(
        f"<h2>{escape(heading)}</h2>\n<figure>{_picture(draw(comparison))}</figure>"
        for heading, draw in PICTURES.values()
    )
    moves = "\n".join(
        f"<h2>{escape(heading)}</h2>\n<pre>{escape(body)}</pre>" for heading, body in migration_tables(comparison)
    )
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f"<title>{escape(name)}</title>\n<style>{PAGE_STYLE}</style>\n</head>\n<body>\n<h1>{escape(name)}</h1>\n"
        f"<pre>{escape(facts_text(comparison))}</pre>\n"
        f"<pre>{escape(policies_table(comparison))}\n\n{escape(footnote(comparison))}</pre>\n"
        f"{figures}\n{moves}\n</body>\n</html>\n"
    )


def _picture(drawing: Drawing) -> str:
    framed = Drawing(
        Markup(f'<g transform="translate({MARGIN} {MARGIN})">{drawing.markup}</g>'), drawing.height + 2 * MARGIN
    )
    return document(framed, width=WIDTH + 2 * MARGIN, style=STYLE)


# Latency


def latency_cdf(comparison: Json) -> Drawing:
    """What share of the requests ended within a time; each percentile is the median of the seeds."""
    styles = styles_of(comparison)
    curves = {name: _percentiles(comparison, name) for name in styles}
    values = [value for curve in curves.values() for value in curve]
    heading = text("Latency of requests, from arrival to end", x=0, y=14, size=12, font_weight="bold")
    if not values:
        return Drawing(Markup(heading + text("There were no requests.", x=0, y=34)), 40)
    top, bottom = 30.0, 330.0
    across = scale_for(values, start=LEFT, stop=RIGHT)
    up = Scale(0, 100, bottom, top)
    parts = [heading]
    parts += y_axis(up, left=LEFT, right=RIGHT, words=[(share, f"{share} %") for share in (0, 25, 50, 75, 90, 99)])
    words = [(value, f"{value:g}") for value in across.ticks(10)]
    unit = "seconds, logarithmic" if across.is_log else "seconds"
    parts += x_axis(across, top=top, bottom=bottom, words=words, name=unit)
    for name, curve in curves.items():
        points = [(across.at(value), up.at(percent)) for percent, value in enumerate(curve)]
        parts.append(styles[name].line(line_path(points), title(f"{name}: P50 {_at(curve, 50)}, P99 {_at(curve, 99)}")))
    rows = {name: f"P50 {_at(curve, 50)}, P99 {_at(curve, 99)}" for name, curve in curves.items() if curve}
    named = legend(styles, rows, y=bottom + 44)
    return Drawing(Markup("".join(parts) + named.markup), bottom + 44 + named.height)


def _percentiles(comparison: Json, policy: str) -> list[float]:
    runs = [run["latency_quantiles_s"] for run in comparison["runs"] if run["policy"] == policy]
    return [median(values) for values in zip(*[run for run in runs if run], strict=True)]


def _at(curve: list[float], percent: int) -> str:
    return seconds_text(curve[percent]) if curve else "-"


# Cost


def cost_bars(comparison: Json) -> Drawing:
    """What each policy costs: per million tokens as a bar, in all beside it."""
    styles = styles_of(comparison)
    lines = {line["policy"]: line for line in comparison["policies"]}
    left = max([width_of(name, 11) for name in styles], default=0.0) + 12
    most = max([line["usd_per_million_tokens"] or 0.0 for line in lines.values()], default=0.0)
    across = Scale(0, most or 1.0, left, WIDTH - 330.0)
    parts = [text("Cost per million tokens, and of the whole run", x=0, y=14, size=12, font_weight="bold")]
    y = 30.0
    for name, style in styles.items():
        line = lines[name]
        cost = line["usd_per_million_tokens"]
        parts.append(text(name, x=0, y=y + 14, size=11))
        told = "no tokens" if cost is None else f"{cost:.4g} USD"
        if cost is not None:
            width = max(1.0, across.at(cost) - left)
            box = {"x": left, "y": y, "width": width, "height": 20.0}
            parts.append(
                element("rect", title(f"{name}: {told} per million tokens"), class_="bar", fill=style.colour, **box)
            )
        ratio = "" if line["cost_ratio"] is None else f", x {line['cost_ratio']:.2f}"
        words = f"{told}{ratio}; {line['usd']:.2f} USD in all"
        parts.append(text(words, x=(left if cost is None else across.at(cost)) + 8, y=y + 14, size=11, fill=INK))
        y += 30
    return Drawing(Markup("".join(parts)), y)


# Stalls


def stalls(comparison: Json) -> Drawing:
    """The longest wait of a stream that each migration caused, over time; of the first seed."""
    styles = styles_of(comparison)
    seed = seeds_of(comparison)[0] if comparison["runs"] else 0
    runs = [run for run in comparison["runs"] if run["seed"] == seed]
    heading = f"Longest stall that each migration caused, seed {seed}"
    parts = [text(heading, x=0, y=14, size=12, font_weight="bold")]
    if not any(run["migrations"] for run in runs):
        return Drawing(Markup("".join(parts) + text("There were no migrations.", x=0, y=34)), 40)
    top, bottom = 30.0, 260.0
    waits = [one["stall_s_max"] for run in runs for one in run["migrations"]]
    longest_s = max([*waits, 10 * LEAST_STALL_S])
    up = Scale(LEAST_STALL_S, longest_s * 1.4, bottom, top, is_log=True)
    end_s = max(max(run["duration_s"], *(one["at_s"] for one in run["migrations"]), 0.0) for run in runs)
    across = Scale(0.0, end_s, LEFT, RIGHT)
    ticks = [value for value in up.ticks(8) if value > 2 * LEAST_STALL_S]
    words = [(LEAST_STALL_S, "none"), *((value, span_words(value)) for value in ticks)]
    parts += y_axis(up, left=LEFT, right=RIGHT, words=words)
    marks, unit = time_words(across)
    parts += x_axis(across, top=top, bottom=bottom, words=marks, name=unit)
    for run in runs:
        for one in run["migrations"]:
            parts.append(_stall_mark(styles[run["policy"]], run, one, x=across.at(one["at_s"]), up=up))
    rows = {run["policy"]: _stall_words(run) for run in runs}
    named = legend(styles, rows, y=bottom + 44, marked=True)
    return Drawing(Markup("".join(parts) + named.markup), bottom + 44 + named.height)


def _stall_mark(style: PolicyStyle, run: Json, one: Json, *, x: float, up: Scale) -> Markup:
    """A line up from the ground with the policy's mark on it; hollow where the migration did not complete."""
    y = up.at(one["stall_s_max"])
    outcome = one["outcome"] or "under way"
    words = f"{run['policy']}: {one['trigger']} at {one['at_s']:.1f} s, {outcome}, {seconds_text(one['stall_s_max'])}"
    stem = element("line", x1=x, x2=x, y1=up.start, y2=y, stroke=style.colour, stroke_opacity="0.5")
    return element(
        "g",
        title(words),
        stem,
        style.mark(x, y, small=not one["stall_s_max"], hollow=one["outcome"] != "completed"),
        class_="mark",
    )


def _stall_words(run: Json) -> str:
    waits = [one["stall_s_max"] for one in run["migrations"]]
    longest = seconds_text(max(waits)) if waits else "-"
    not_done = sum(one["outcome"] != "completed" for one in run["migrations"])
    hollow = f", {not_done} not completed (hollow)" if not_done else ""
    return f"{len(waits)} in all, longest {longest}{hollow}; any gap of a stream {seconds_text(run['stall_s']['max'])}"


PICTURES: dict[str, tuple[str, Callable[[Json], Drawing]]] = {
    "latency-cdf": ("Latency", latency_cdf),
    "availability": ("Capacity and service over time", availability),
    "stalls": ("Stalls", stalls),
    "cost": ("Cost", cost_bars),
}
"""File name -> what the page calls it, and how it is drawn."""
