"""The topology before and after a plan: a row for each instance, a cell for each GPU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from spotserve.cli.drawing.svg import Drawing, Markup, element, fitting, stacked, text, title
from spotserve.core.ids import natural_key
from spotserve.core.plan_text.table import Json, count_text, cut
from spotserve.core.plan_text.topology import (
    gpus_of,
    instance_state,
    layout_line,
    positions,
    replica_change,
    replicas_after,
    replicas_before,
)

PANEL_WIDTH = 585
LABEL_WIDTH = 120
MOST_INSTANCES = 64
COLOURS = ("#9ec5e8", "#f6c28b", "#a8d5a2", "#d9b3e0", "#f2b5b5", "#c9c28e", "#9ed8d4", "#d2b89a")
"""Fills of replicas, by their place in natural order of ids; the id stands in the cell where it fits."""


def layout_panels(plan: Json) -> Drawing:
    """Both layouts side by side, and what borders mean."""
    instances = _instances(plan)
    after = positions(replicas_after(plan))
    before = positions(replicas_before(plan))
    changed = [name for name in instances if _differs(instances[name], before, after)]
    shown = list(instances)
    note = ""
    if len(shown) > MOST_INSTANCES:
        rest = [name for name in shown if name not in set(changed)]
        kept = {*changed[:MOST_INSTANCES], *rest[: max(0, MOST_INSTANCES - len(changed))]}
        shown = [name for name in shown if name in kept]
        note = f"; {count_text(len(instances) - len(shown), 'more instance')} not drawn, changed ones first"
    states = {one["id"]: instance_state(plan, one) for one in plan["snapshot"]["world"]["instances"]}
    rows = [(name, states.get(name, "unknown"), instances[name]) for name in shown]
    left = _panel(plan, "Before", replicas_before(plan), rows)
    right = _panel(plan, "After", replicas_after(plan), rows)
    panels = Drawing(
        Markup(left.markup + element("g", right.markup, transform=f"translate({PANEL_WIDTH + 30} 0)")), left.height
    )
    legend = "border: thick = new, dashed = leaves, thin = untouched; r4 s1 = stage 1 of replica r4" + note
    return stacked([panels, Drawing(text(legend, x=0, y=14, size=10, fill="#555555"), 18)], gap=4)


def _instances(plan: Json) -> Mapping[str, Sequence[str]]:
    found = gpus_of(plan)
    known = {*found, *(one["id"] for one in plan["snapshot"]["world"]["instances"])}
    return {name: found.get(name, ()) for name in sorted(known, key=natural_key)}


def _differs(
    gpus: Sequence[str], before: Mapping[str, tuple[str, int, int]], after: Mapping[str, tuple[str, int, int]]
) -> bool:
    return any(before.get(gpu) != after.get(gpu) for gpu in gpus)


def _row_height(num_rows: int) -> int:
    return 26 if num_rows <= 12 else 20 if num_rows <= 24 else 14


def _panel(plan: Json, name: str, replicas: Sequence[Json], rows: Sequence[tuple[str, str, Sequence[str]]]) -> Drawing:
    """One layout."""
    taken = positions(replicas)
    names = sorted({one["id"] for one in (*replicas_before(plan), *replicas_after(plan))}, key=natural_key)
    colours = {replica: COLOURS[index % len(COLOURS)] for index, replica in enumerate(names)}
    changes = {replica["id"]: replica_change(plan, replica) for replica in replicas}
    height = _row_height(len(rows))
    size = min(11, height - 5)
    most_gpus = max([1, *(len(gpus) for _, _, gpus in rows)])
    width = min(110.0, (PANEL_WIDTH - LABEL_WIDTH) / most_gpus)
    parts = [text(f"{name}: {cut(layout_line(plan, replicas), 74)}", x=0, y=14, size=12, font_weight="bold")]
    for index, (instance, state, gpus) in enumerate(rows):
        y = 24.0 + index * height
        bad = state.startswith(("notice", "lost"))
        told = instance if state == "ready" else f"{instance} {state.split(',')[0]}"
        label = cut(told, int(LABEL_WIDTH / size / 0.62))
        fill = "#b00020" if bad else "#222222"
        row = [text(label, x=0, y=y + height / 2 + size / 3, size=size, fill=fill)]
        idle = "gone" if name == "After" and bad else "spare"
        for column, gpu in enumerate(gpus):
            x = LABEL_WIDTH + column * width
            box = (x, y, width - 2, height - 3)
            row.append(_cell(gpu, taken.get(gpu), colours, changes, idle=idle, box=box))
        parts.append(element("g", *row, class_="instance"))
    return Drawing(Markup("".join(parts)), 24.0 + len(rows) * height)


def _cell(
    gpu: str,
    place: tuple[str, int, int] | None,
    colours: Mapping[str, str],
    changes: Mapping[str, str],
    *,
    idle: str,
    box: tuple[float, float, float, float],
) -> Markup:
    """One GPU in its box (x, y, width, height)."""
    x, y, width, height = box
    size = min(10.0, height - 3)
    if place is None:
        told, style = idle, {"fill": "#f4f4f4", "stroke": "#cccccc", "stroke_width": "1"}
    else:
        told = f"{place[0]} s{place[1]}"
        borders = {"new": ("2", ""), "changed": ("2", ""), "leaves": ("1.5", "4 2"), "untouched": ("0.5", "")}
        stroke_width, dashes = borders[changes[place[0]]]
        scale = 1.0 if height >= 15 else 0.55
        style = {"fill": colours[place[0]], "stroke": "#333333", "stroke_width": f"{float(stroke_width) * scale:.2g}"}
        style |= {"stroke_dasharray": dashes} if dashes else {}
    words = f"{gpu}: {idle}" if place is None else f"{gpu}: {place[0]} stage {place[1]} rank {place[2]}"
    cell = element("rect", title(words), x=x, y=y, width=width, height=height, rx=2, class_="gpu", **style)
    label = fitting(told, width=width - 4, size=size) or fitting(told.split(" ")[0], width=width - 4, size=size)
    if not label:
        return cell
    middle = text(label, x=x + width / 2, y=y + height / 2 + size / 3, size=size, text_anchor="middle", fill="#222222")
    return Markup(cell + middle)
