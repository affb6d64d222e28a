"""The Gantt chart of a plan: what passes each instance's ports when, and the steps around it.

Copies are drawn one at a time per port, in the order in which they could begin; workers really share the port, which
moves the same bytes in the same time. Two panels where the cut-over would be too narrow to see in one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import floor

from spotserve.cli.drawing.axes import round_up
from spotserve.cli.drawing.svg import Drawing, Markup, element, fitting, stacked, text, title, width_of
from spotserve.core.ids import instance_of, natural_key
from spotserve.core.plan import COPY_KINDS
from spotserve.core.plan_text.page import step_subject
from spotserve.core.plan_text.schedule import Span, port_spans, ports_of
from spotserve.core.plan_text.table import Json, count_text, cut, seconds_text, size_text

WIDTH = 1200
LABEL_WIDTH = 110
PLOT_WIDTH = WIDTH - LABEL_WIDTH - 10
MOST_PORTS = 48
NARROW = 0.2
"""A cut-over that takes less of the axis than this is drawn again, enlarged."""
FAR = 1.3
"""A deadline later than this times the plan's end is not drawn to scale."""
LEAST_WIDTH = 1.5
LANE_HEIGHT = 13
"""Of the labels of moments above a panel."""
HEADING_WIDTH = 300
LATE_S = 1e-4
MOST_S = 1e9
INSIDE = " inside"
"""Ends the name of a row whose copies pass no port."""

EARLY_KINDS = ("reserve", "join_group")
LATE_KINDS = ("quiesce", "commit", "activate", "recompute", "release")
COLOURS = {
    "copy_weights": "#4a86c5",
    "load_weights": "#8d6cab",
    "copy_kv": "#e08e2b",
    "copy_kv_delta": "#c2452d",
    "reserve": "#9a9a9a",
    "join_group": "#6f8f8f",
    "quiesce": "#b58900",
    "commit": "#2e7d32",
    "activate": "#43a047",
    "recompute": "#ad1457",
    "release": "#8c8c8c",
}


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the chart: a port, or a kind of step."""

    name: str
    spans: tuple[Span, ...]


@dataclass(frozen=True, slots=True)
class Axis:
    """The time that a panel shows; `deadline_s` lies beyond its end if `is_broken`."""

    begin_s: float
    end_s: float
    deadline_s: float | None = None
    is_broken: bool = False

    def x(self, at_s: float) -> float:
        """Where a time is."""
        return LABEL_WIDTH + (at_s - self.begin_s) / (self.end_s - self.begin_s) * PLOT_WIDTH


def gantt(plan: Json) -> Drawing:
    """The whole plan over time, and its cut-over enlarged where that would be a line."""
    spans = port_spans(plan["steps"], link_bytes_per_s=plan["spec"]["profile"]["link_bytes_per_s"])
    if not spans:
        return Drawing(text("There is nothing to do.", x=0, y=14, size=12), 20)
    end_s = max([plan["estimates"]["done_s"], *(span.end_s for span in spans)]) or 1e-6
    if not end_s < MOST_S:
        return Drawing(text(f"Times beyond {MOST_S:g} s are not drawn.", x=0, y=14, size=12), 20)
    left_s = plan["trigger"]["remaining_s"]
    deadline_s = None if left_s is None else max(0.0, left_s)
    if deadline_s is None:
        axis = Axis(0.0, end_s * 1.02)
    elif deadline_s <= FAR * end_s:
        axis = Axis(0.0, max(end_s, deadline_s) * 1.04, deadline_s)
    else:
        axis = Axis(0.0, end_s * 1.12, deadline_s, is_broken=True)
    drawings = [_panel(plan, spans, axis, heading="Transfers per port and steps over time", name="whole")]
    stops = [span.begin_s for span in spans if span.step["kind"] == "quiesce"]
    if stops and 0 < end_s - min(stops) < NARROW * (axis.end_s - axis.begin_s):
        margin_s = 0.03 * (end_s - min(stops))
        near = Axis(min(stops) - margin_s, end_s + margin_s)
        within = [span for span in spans if span.end_s > near.begin_s]
        drawings.append(_panel(plan, within, near, heading="The cut-over, enlarged", name="cut-over"))
    drawn_s = max(span.end_s for span in spans)
    drawings.append(_legend({span.step["kind"] for span in spans}, late_s=drawn_s - plan["estimates"]["done_s"]))
    return stacked(drawings, gap=16)


def rows_of(spans: Sequence[Span]) -> tuple[list[Row], int]:
    """The chart's rows from top to bottom, and how many ports were left out for the busiest ones."""
    ports: dict[str, list[Span]] = {}
    kinds: dict[str, list[Span]] = {}
    for span in spans:
        for name in _places(span.step):
            ports.setdefault(name, []).append(span)
        if span.step["kind"] in (*EARLY_KINDS, *LATE_KINDS):
            kinds.setdefault(span.step["kind"], []).append(span)
    names = sorted(ports, key=natural_key)
    if len(names) > MOST_PORTS:
        busy = {name: sum(span.busy_until_s - span.begin_s for span in ports[name]) for name in names}
        kept = set(sorted(names, key=lambda name: (name.endswith(INSIDE), -busy[name]))[:MOST_PORTS])
        names = [name for name in names if name in kept]
    rows = [Row(kind, tuple(kinds[kind])) for kind in EARLY_KINDS if kind in kinds]
    rows += [Row(name, tuple(ports[name])) for name in names]
    rows += [Row(kind, tuple(kinds[kind])) for kind in LATE_KINDS if kind in kinds]
    return rows, len(ports) - len(names)


def _places(step: Json) -> tuple[str, ...]:
    """The port rows in which a step is drawn."""
    if step["kind"] == "load_weights":
        return (f"{instance_of(step['workers'][0])} storage",)
    if step["kind"] not in COPY_KINDS:
        return ()
    used = ports_of(step)
    return tuple(f"{name} {way}" for name, way in used) or (instance_of(step["source"]) + INSIDE,)


def _panel(plan: Json, spans: Sequence[Span], axis: Axis, *, heading: str, name: str) -> Drawing:
    rows, hidden = rows_of(spans)
    height = 22 if len(rows) <= 24 else 15
    marks = _marks(plan, spans, axis)
    top = 24.0 + LANE_HEIGHT * max([1, *(lane + (not _is_deadline(told)) for told, _, _, lane in marks)])
    bottom = top + len(rows) * height
    parts = [text(heading, x=0, y=14, size=12, font_weight="bold")]
    parts += _stall(spans, axis, top=top, bottom=bottom)
    for index, row in enumerate(rows):
        y = top + index * height
        parts.append(element("line", x1=0, x2=WIDTH, y1=y, y2=y, stroke="#e4e4e4", stroke_width=1))
        size = min(11, height - 4)
        parts.append(text(cut(row.name, int(LABEL_WIDTH / size / 0.62)), x=0, y=y + height / 2 + size / 3, size=size))
        parts += _bars(row, axis, y=y + 1.5, height=height - 3.0)
    parts += _ticks(axis, top=top, bottom=bottom)
    parts += _mark_lines(marks, top=top, bottom=bottom)
    end = bottom + 20
    if hidden:
        note = f"{count_text(hidden, 'more port')} not drawn, none of them busier than these"
        parts.append(text(note, x=LABEL_WIDTH, y=end + 12, size=10, fill="#555555"))
        end += 16
    return Drawing(element("g", *parts, class_=f"panel {name}"), end)


def _bars(row: Row, axis: Axis, *, y: float, height: float) -> list[Markup]:
    """A bar for each span; those that overlap lie one above the other in the row."""
    ends: list[float] = []
    lanes: list[int] = []
    for span in sorted(row.spans, key=lambda span: span.begin_s):
        lane = next((i for i, end_s in enumerate(ends) if end_s <= span.begin_s + 1e-12), len(ends))
        ends[lane : lane + 1] = [max(span.busy_until_s, span.begin_s + 1e-12)]
        lanes.append(lane)
    each = height / max(1, len(ends))
    parts = []
    for span, lane in zip(sorted(row.spans, key=lambda span: span.begin_s), lanes, strict=True):
        parts.append(_bar(row, span, axis, y=y + lane * each, height=max(0.6, each - (0.5 if len(ends) > 1 else 0))))
    return parts


def _bar(row: Row, span: Span, axis: Axis, *, y: float, height: float) -> Markup:
    """The time that the port is busy as a bar, the answer's way back as a line behind it."""
    step = span.step
    left, right = (axis.x(min(max(at_s, axis.begin_s), axis.end_s)) for at_s in (span.begin_s, span.busy_until_s))
    width = max(LEAST_WIDTH, right - left)
    size_told = f", {size_text(step['bytes'])}" if step.get("bytes") else ""
    words = f"{step['id']} {step['kind']} {cut(step_subject(step), 90)}{size_told}, "
    words += f"{seconds_text(span.begin_s)} to {seconds_text(span.end_s)}"
    bar = element(
        "rect",
        title(words),
        x=left,
        y=y,
        width=width,
        height=height,
        fill=COLOURS.get(step["kind"], "#777777"),
        class_=f"bar {step['kind']}",
        data_step=step["id"],
        data_row=row.name,
    )
    size = min(10.0, height - 2)
    label = step["id"] + (f" {size_text(step['bytes'])}" if step.get("bytes") else "")
    shown = fitting(label, width=width - 6, size=size) or fitting(step["id"], width=width - 6, size=size)
    if shown and size >= 8:
        bar = Markup(bar + text(shown, x=left + 3, y=y + height / 2 + size / 3, size=size, fill="#ffffff"))
    tail = axis.x(min(span.end_s, axis.end_s))
    if tail > left + width + 1:
        middle = y + height / 2
        line = element("line", x1=left + width, x2=tail, y1=middle, y2=middle, stroke="#999999", stroke_width=1)
        bar = Markup(bar + line)
    return bar


def _stall(spans: Sequence[Span], axis: Axis, *, top: float, bottom: float) -> list[Markup]:
    """The time in which clients wait, shaded."""
    stops = [span.begin_s for span in spans if span.step["kind"] == "quiesce"]
    ends = [span.end_s for span in spans if span.step["kind"] in ("commit", "activate")]
    if not stops or not ends:
        return []
    left, right = axis.x(max(min(stops), axis.begin_s)), axis.x(min(max(ends), axis.end_s))
    words = title(f"clients wait {seconds_text(max(ends) - min(stops))}")
    box = {"x": left, "y": top, "width": max(LEAST_WIDTH, right - left), "height": bottom - top}
    return [element("rect", words, fill="#fff3cd", class_="stall", **box)]


Mark = tuple[str, str, float, int]
"""(label, colour, x, lane)."""


def _marks(plan: Json, spans: Sequence[Span], axis: Axis) -> list[Mark]:
    """The moments that matter, each label in the first lane where it covers no other."""
    moments: list[tuple[float, str, str]] = []
    for kind, told in (("quiesce", "stop decoding"), ("commit", "commit"), ("activate", "activate")):
        times = [span.begin_s for span in spans if span.step["kind"] == kind]
        if times:
            moments.append((axis.x(min(times)), f"{told} {seconds_text(min(times))}", COLOURS[kind]))
    done_s = plan["estimates"]["done_s"]
    if axis.begin_s <= done_s <= axis.end_s:
        moments.append((axis.x(done_s), f"estimated end {seconds_text(done_s)}", "#333333"))
    lanes: list[float] = []
    marks = []
    for x, told, colour in sorted(moments, reverse=True):
        left = _label_left(x, told)
        lane = next((i for i, end in enumerate(lanes) if left + width_of(told, 10) + 8 <= end), len(lanes))
        lanes[lane : lane + 1] = [left]
        marks.append((told, colour, x, lane))
    if axis.deadline_s is not None:
        # On the heading's line, above all others: its own line crosses no label.
        x = LABEL_WIDTH + PLOT_WIDTH - 4.0 if axis.is_broken else axis.x(axis.deadline_s)
        scale = " (not to scale)" if axis.is_broken else ""
        marks.append((f"deadline {seconds_text(axis.deadline_s)}{scale}", "#b00020", x, len(lanes)))
    return marks


def _is_deadline(told: str) -> bool:
    """Its label stands beside the panel's heading."""
    return told.startswith("deadline")


def _label_left(x: float, told: str) -> float:
    """Where a label of a moment begins: beside its line, inside the picture."""
    return min(x + 3, WIDTH - width_of(told, 10) - 2)


def _mark_lines(marks: Sequence[Mark], *, top: float, bottom: float) -> list[Markup]:
    lines: list[Markup] = []
    labels: list[Markup] = []
    for told, colour, x, lane in marks:
        y = top - 6 - LANE_HEIGHT * lane
        dashes = "6 3" if _is_deadline(told) else "none"
        name = f"mark {told.split(' ')[0]}"
        lines.append(
            element("line", x1=x, x2=x, y1=y - 8, y2=bottom, stroke=colour, stroke_dasharray=dashes, class_=name)
        )
        left = max(_label_left(x, told), HEADING_WIDTH if _is_deadline(told) else 0)
        box = {"x": left - 2, "y": y - 9, "width": width_of(told, 10) + 4, "height": 12}
        labels.append(element("rect", fill="#ffffff", **box))
        labels.append(text(told, x=left, y=y, size=10, fill=colour))
    return [*lines, *labels]


def _ticks(axis: Axis, *, top: float, bottom: float) -> list[Markup]:
    """Round times below the chart."""
    last_s = axis.end_s
    step_s = round_up((axis.end_s - axis.begin_s) / 8)
    parts = [element("line", x1=LABEL_WIDTH, x2=WIDTH, y1=bottom, y2=bottom, stroke="#888888")]
    number = floor(axis.begin_s / step_s)
    while number * step_s <= last_s:
        at_s = number * step_s
        number += 1
        if at_s < axis.begin_s:
            continue
        x = axis.x(at_s)
        if axis.is_broken and x > LABEL_WIDTH + PLOT_WIDTH - 40:
            break
        told = f"{at_s:g} s" if step_s >= 0.1 else f"{at_s * 1000:g} ms"
        anchor = "start" if x < LABEL_WIDTH + 20 else "end" if x > WIDTH - 30 else "middle"
        parts.append(element("line", x1=x, x2=x, y1=top, y2=bottom + 4, stroke="#888888", stroke_opacity="0.35"))
        parts.append(text(told, x=x, y=bottom + 15, size=10, text_anchor=anchor, fill="#555555"))
    return parts


WORDS: Mapping[str, str] = {
    "copy_weights": "weights from a holder",
    "load_weights": "weights from storage",
    "copy_kv": "KV while decoding goes on",
    "copy_kv_delta": "KV after the stop",
}


def _legend(kinds: set[str], *, late_s: float) -> Drawing:
    """What colours mean, for the kinds that rows do not name; how much the drawing ends after the estimate."""
    parts: list[Markup] = []
    x = float(LABEL_WIDTH)
    for kind, words in WORDS.items():
        if kind in kinds:
            parts.append(element("rect", x=x, y=3, width=12, height=10, fill=COLOURS[kind]))
            parts.append(text(words, x=x + 17, y=12, size=10))
            x += 17 + width_of(words, 10) + 22
    parts.append(element("rect", x=x, y=3, width=12, height=10, fill="#fff3cd", stroke="#dddddd"))
    parts.append(text("clients wait", x=x + 17, y=12, size=10))
    note = "Copies are drawn one at a time per port; a thin line behind a bar is the answer's way back."
    if late_s > LATE_S:
        note += f" So drawn it ends {seconds_text(late_s)} after the estimate, where they share ports."
    parts.append(text(note, x=LABEL_WIDTH, y=28, size=10, fill="#555555"))
    return Drawing(Markup("".join(parts)), 32)
