"""The few SVG elements that the pictures are made of; every text and attribute is escaped here and nowhere else."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape
from typing import NewType

Markup = NewType("Markup", str)
"""Finished XML: nothing in it is escaped again."""

CHARACTER_WIDTH = 0.6
"""Of a character of the fixed-width font, per unit of its size."""
FONT = "ui-monospace, 'DejaVu Sans Mono', Menlo, Consolas, monospace"


@dataclass(frozen=True, slots=True)
class Drawing:
    """A part of a picture and how much height it takes."""

    markup: Markup
    height: float


def element(name: str, *children: Markup, **attributes: str | float) -> Markup:
    """`<name …>…</name>`; underscores in attribute names are hyphens, a trailing one is dropped (`class_`)."""
    parts = [name]
    for key, value in attributes.items():
        text = f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)
        parts.append(f'{key.rstrip("_").replace("_", "-")}="{escape(text, quote=True)}"')
    opening = " ".join(parts)
    return Markup(f"<{opening}>{''.join(children)}</{name}>" if children else f"<{opening}/>")


def text(content: str, *, x: float, y: float, size: float = 11, **attributes: str | float) -> Markup:
    """A line of text whose baseline begins at (x, y)."""
    return element("text", Markup(escape(content)), x=x, y=y, font_size=size, **attributes)


def title(content: str) -> Markup:
    """What a viewer shows over the element around it."""
    return element("title", Markup(escape(content)))


def width_of(content: str, size: float) -> float:
    """Pixels of a line of text."""
    return CHARACTER_WIDTH * size * len(content)


def fitting(content: str, *, width: float, size: float) -> str:
    """The text if it fits into `width` pixels, else nothing."""
    return content if width_of(content, size) <= width else ""


def group(*children: Markup, y: float = 0, **attributes: str | float) -> Markup:
    """Elements moved down together."""
    return element("g", *children, transform=f"translate(0 {y:g})", **attributes)


def stacked(drawings: list[Drawing], *, gap: float = 0) -> Drawing:
    """Drawings one below the other."""
    parts: list[Markup] = []
    y = 0.0
    for drawing in drawings:
        parts.append(group(drawing.markup, y=y))
        y += drawing.height + gap
    return Drawing(Markup("\n".join(parts)), max(0.0, y - gap))


def document(drawing: Drawing, *, width: float, style: str) -> str:
    """A whole SVG file on a white ground, its style inside."""
    height = round(drawing.height)
    background = element("rect", width=width, height=height, fill="#ffffff")
    return (
        element(
            "svg",
            Markup(f"<style>{style}</style>"),
            background,
            drawing.markup,
            xmlns="http://www.w3.org/2000/svg",
            width=width,
            height=height,
            viewBox=f"0 0 {width:g} {height}",
            font_family=FONT,
        )
        + "\n"
    )
