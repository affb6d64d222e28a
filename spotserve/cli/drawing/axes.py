"""Axes of plots: where a value is, which round values are marked, and lines that go in steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, floor, log10

from spotserve.cli.drawing.svg import Markup, element, text

LOG_SPAN = 20.0
"""An axis whose highest value is more than so many times the lowest is logarithmic."""
GRID = "#e4e4e4"
INK = "#555555"


@dataclass(frozen=True, slots=True)
class Scale:
    """Values from `low` to `high` on pixels from `start` to `stop`."""

    low: float
    high: float
    start: float
    stop: float
    is_log: bool = False

    def at(self, value: float) -> float:
        """Where a value is; one outside is at the nearer end."""
        inside = min(max(value, self.low), self.high)
        if self.is_log:
            share = log10(inside / self.low) / log10(self.high / self.low)
        else:
            share = (inside - self.low) / (self.high - self.low)
        return self.start + share * (self.stop - self.start)

    def ticks(self, most: int) -> list[float]:
        """Round values, `most` at the most or a few more."""
        if self.is_log:
            return self._decades(most)
        step = round_up((self.high - self.low) / most)
        first = ceil(self.low / step - 1e-9)
        last = floor(self.high / step + 1e-9)
        return [number * step for number in range(first, last + 1)]

    def _decades(self, most: int) -> list[float]:
        exponents = range(floor(log10(self.low)), ceil(log10(self.high)) + 1)
        factors: tuple[int, ...] = (1, 2, 5) if 3 * len(exponents) <= 1.5 * most else (1,)
        values = [factor * 10.0**exponent for exponent in exponents for factor in factors]
        return [value for value in values if self.low * (1 - 1e-9) <= value <= self.high * (1 + 1e-9)]


def scale_for(values: Sequence[float], *, start: float, stop: float, floor_at: float = 1e-3) -> Scale:
    """A scale that has all values: logarithmic where they span more than `LOG_SPAN`, else from 0.

    Args:
        values: what is to be drawn.
        start: pixel of the lowest value.
        stop: pixel of the highest one.
        floor_at: on a logarithmic scale lower values are drawn there.
    """
    low, high = max(floor_at, min(values, default=1.0)), max([*values, floor_at], default=1.0)
    if high / low > LOG_SPAN:
        return Scale(low / 1.15, high * 1.15, start, stop, is_log=True)
    return Scale(0.0, high * 1.05, start, stop)


def round_up(least: float) -> float:
    """The next of 1, 2, 5, 10, … at or above."""
    power = 10.0 ** floor(log10(max(least, 1e-12)))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= least * (1 - 1e-9))


def x_axis(scale: Scale, *, top: float, bottom: float, words: Sequence[tuple[float, str]], name: str) -> list[Markup]:
    """Marked values below a plot, lines up through it, and what the axis is."""
    parts = [element("line", x1=scale.start, x2=scale.stop, y1=bottom, y2=bottom, stroke="#888888")]
    for value, told in words:
        x = scale.at(value)
        parts.append(element("line", x1=x, x2=x, y1=top, y2=bottom + 4, stroke=GRID))
        parts.append(text(told, x=x, y=bottom + 16, size=10, text_anchor="middle", fill=INK))
    middle = (scale.start + scale.stop) / 2
    parts.append(text(name, x=middle, y=bottom + 31, size=10, text_anchor="middle", fill=INK))
    return parts


def y_axis(scale: Scale, *, left: float, right: float, words: Sequence[tuple[float, str]]) -> list[Markup]:
    """Marked values beside a plot and lines across it."""
    parts = []
    for value, told in words:
        y = scale.at(value)
        parts.append(element("line", x1=left, x2=right, y1=y, y2=y, stroke=GRID))
        parts.append(text(told, x=left - 6, y=y + 3.5, size=10, text_anchor="end", fill=INK))
    return parts


def line_path(points: Sequence[tuple[float, float]]) -> str:
    """The path through points."""
    return " ".join(f"{'L' if index else 'M'}{x:.1f} {y:.1f}" for index, (x, y) in enumerate(points))


def step_path(points: Sequence[tuple[float, float]], *, until_x: float, ground_y: float | None = None) -> str:
    """The path of values that hold until the next one; closed along `ground_y` if there is one."""
    corners: list[tuple[float, float]] = []
    for index, (x, y) in enumerate(points):
        if index:
            corners.append((x, corners[-1][1]))
        corners.append((x, y))
    corners.append((until_x, corners[-1][1]))
    if ground_y is None:
        return line_path(corners)
    return line_path([(corners[0][0], ground_y), *corners, (until_x, ground_y)]) + " Z"


def span_words(value_s: float) -> str:
    """`10 ms`, `1 s`, `500 s`."""
    return f"{value_s:g} s" if value_s >= 1 else f"{1000 * value_s:g} ms"


def time_words(scale: Scale, most: int = 10) -> tuple[list[tuple[float, str]], str]:
    """Round times of an axis in seconds, minutes or hours, and the unit."""
    span_s = scale.high - scale.low
    unit_s, unit = (3600.0, "hours") if span_s > 3 * 3600 else (60.0, "minutes") if span_s > 300 else (1.0, "seconds")
    step_s = round_up(span_s / unit_s / most) * unit_s
    count = floor(scale.high / step_s + 1e-9)
    return [(number * step_s, f"{number * step_s / unit_s:g}") for number in range(count + 1)], f"time in {unit}"
