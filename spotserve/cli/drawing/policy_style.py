"""How the policies of a comparison are told apart in pictures: a colour, a dash and a mark each, and the legend."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from spotserve.cli.drawing.svg import Drawing, Markup, element, text, width_of

WIDTH = 1100
COLOURS = ("#1f6fb2", "#d1702b", "#3f8f4a", "#8d5ba6", "#b03a48", "#5a6b7a", "#a68a2b", "#2b9c9c")
DASHES = ("none", "7 3", "2 3", "9 3 2 3", "12 4", "4 2", "1 2", "6 2 1 2")
CORNERS: dict[int, tuple[tuple[float, float], ...]] = {
    1: ((-4, -4), (4, -4), (4, 4), (-4, 4)),
    2: ((0, -5), (5, 4), (-5, 4)),
    3: ((0, -5.5), (5.5, 0), (0, 5.5), (-5.5, 0)),
}
"""Of square, triangle and diamond; the first shape is a circle."""
NUM_SHAPES = len(CORNERS) + 1


@dataclass(frozen=True, slots=True)
class PolicyStyle:
    """Colour is never the only signal."""

    colour: str
    dash: str
    shape: int

    def line(self, path: str, *children: Markup) -> Markup:
        """A curve of the policy."""
        dashes = {"stroke_dasharray": self.dash, "class_": "mark"}
        return element("path", *children, d=path, stroke=self.colour, stroke_width=2, fill="none", **dashes)

    def mark(self, x: float, y: float, *, hollow: bool = False, small: bool = False) -> Markup:
        """A point of the policy: circle, square, triangle or diamond."""
        scale = 0.6 if small else 1.0
        fill = "#ffffff" if hollow else self.colour
        look = {"fill": fill, "stroke": self.colour}
        if self.shape == 0:
            return element("circle", cx=x, cy=y, r=4.5 * scale, stroke_width=1.5, **look)
        points = " ".join(f"{x + scale * dx:.1f},{y + scale * dy:.1f}" for dx, dy in CORNERS[self.shape])
        return element("polygon", points=points, stroke_width=1.5, **look)


def styles_of(comparison: Mapping[str, Any]) -> dict[str, PolicyStyle]:
    """A style for each policy, in order of the comparison."""
    names = [line["policy"] for line in comparison["policies"]]
    return {
        name: PolicyStyle(COLOURS[index % len(COLOURS)], DASHES[index % len(DASHES)], index % NUM_SHAPES)
        for index, name in enumerate(names)
    }


def legend(styles: Mapping[str, PolicyStyle], words: Mapping[str, str], *, y: float, marked: bool = False) -> Drawing:
    """A row for each policy: its line or its mark, its name, and what there is to say of it."""
    left = 52 + max([width_of(name, 11) for name in styles], default=0.0)
    parts = []
    for index, (name, style) in enumerate(styles.items()):
        at = y + 18.0 * index
        parts.append(style.mark(14, at + 4) if marked else style.line(f"M0 {at + 4:.1f} L30 {at + 4:.1f}"))
        parts.append(text(name, x=38, y=at + 8, size=11))
        parts.append(text(words.get(name, ""), x=left, y=at + 8, size=11, fill="#555555"))
    return Drawing(Markup("".join(parts)), 18.0 * len(styles))
