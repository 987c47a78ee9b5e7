"""Figures as SVG, which stands in the page itself: sharp at any size, light or dark as the page is, nothing to load.

Colours are classes that `page.py` gives a value; the text of a figure is escaped here. What a line or bar is tells its
tooltip (`<title>`), and the table beside it for those who cannot see it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from html import escape

from ray_moe.report.parts import Bar, Bars, Lines, Points, number

WIDTH, HEIGHT = 640, 260
LEFT, RIGHT, TOP, BOTTOM = 64, 16, 10, 34
BAR, GAP = 18, 8
NAMES = 210
"""Room for the names of bars."""
MAX_LETTERS = 30
MAX_POINTS = 500
"""Of a line: a screen shows no more."""
NUM_COLOURS = 6


def draw(figure: Lines | Bars, title: str) -> str:
    """The figure as an SVG element; `title` is what readers of screens are told."""
    return _lines(figure, title) if isinstance(figure, Lines) else _bars(figure, title)


def ticks(least: float, most: float, wanted: int = 5) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart) that span [least, most]."""
    if most <= least:
        least, most = least - (abs(least) or 1.0) / 2, most + (abs(most) or 1.0) / 2
    rough = (most - least) / wanted
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))
    first = math.floor(least / step + 1e-9)
    return [round(i * step, 12) for i in range(first, math.ceil(most / step - 1e-9) + 1)]


# --- lines ---------------------------------------------------------------------------------------------------
def _lines(lines: Lines, title: str) -> str:
    points = [point for series in lines.series.values() for point in series]
    xs = [x for x, _ in points] + [at for at, _ in lines.marks]
    low, high = lines.y_range
    y_ticks = ticks(
        min(y for _, y in points) if low is None else low, max(y for _, y in points) if high is None else high
    )
    x_ticks = ticks(min(xs), max(xs), 8)
    x_of = Scale(min(xs), max(xs), LEFT, WIDTH - RIGHT)
    y_of = Scale(y_ticks[0], y_ticks[-1], HEIGHT - BOTTOM, TOP)
    parts = [*_grid([tick for tick in x_ticks if min(xs) <= tick <= max(xs)], y_ticks, x_of, y_of)]
    parts.append(_text(WIDTH - RIGHT, HEIGHT - 4, lines.x, "end"))
    for at, what in lines.marks:
        x = x_of(at)
        parts.append(
            f'<g class="mark"><line x1="{x:.1f}" y1="{TOP}" x2="{x:.1f}" y2="{HEIGHT - BOTTOM}"/>'
            f"<title>{escape(f'{lines.x} {number(at)}: {what}')}</title></g>"
        )
    for i, (name, series) in enumerate(lines.series.items()):
        thin = thinned(series)
        path = " ".join(f"{x_of(x):.1f},{y_of(y):.1f}" for x, y in thin)
        parts.append(f'<polyline class="c{i % NUM_COLOURS}" points="{path}"/>')
        parts += [_point(name, lines.x, at, (x_of(at[0]), y_of(at[1])), i) for at in thin]
    return _svg(HEIGHT, title, parts)


def thinned(points: Points) -> Points:
    """At most `MAX_POINTS` of them: of each stretch the lowest and the highest, so that no peak is lost."""
    if len(points) <= MAX_POINTS:
        return points
    length = -(-2 * len(points) // MAX_POINTS)
    kept: list[tuple[float, float]] = []
    for start in range(0, len(points), length):
        stretch = points[start : start + length]
        ends = {min(stretch, key=lambda point: point[1]), max(stretch, key=lambda point: point[1])}
        kept += sorted(ends)
    return kept


def _grid(x_ticks: Sequence[float], y_ticks: Sequence[float], x_of: Scale, y_of: Scale) -> Iterator[str]:
    for tick in y_ticks:
        y = y_of(tick)
        yield f'<line class="grid" x1="{LEFT}" y1="{y:.1f}" x2="{WIDTH - RIGHT}" y2="{y:.1f}"/>'
        yield _text(LEFT - 6, y + 4, number(tick), "end")
    for tick in x_ticks:
        yield _text(x_of(tick), HEIGHT - BOTTOM + 15, number(tick), "middle")


def _point(name: str, x: str, at: tuple[float, float], where: tuple[float, float], colour: int) -> str:
    told = escape(f"{name}: {number(at[1])} at {x} {number(at[0])}")
    place = f'class="p{colour % NUM_COLOURS}" cx="{where[0]:.1f}" cy="{where[1]:.1f}" r="4"'
    return f"<circle {place}><title>{told}</title></circle>"


class Scale:
    """From values to places."""

    def __init__(self, least: float, most: float, start: float, end: float) -> None:
        self._least, self._start = least, start
        self._factor = (end - start) / (most - least) if most > least else 0.0

    def __call__(self, value: float) -> float:
        return self._start + (value - self._least) * self._factor


# --- bars ----------------------------------------------------------------------------------------------------
def _bars(bars: Bars, title: str) -> str:
    most = max(bar.most for bar in bars.bars) or 1.0
    x_of = Scale(0.0, most, NAMES, WIDTH - 80)
    height = len(bars.bars) * (BAR + GAP) + GAP
    parts = [part for i, bar in enumerate(bars.bars) for part in _bar(bar, GAP + i * (BAR + GAP), x_of)]
    return _svg(height, title, parts)


def _bar(bar: Bar, y: float, x_of: Scale) -> Iterator[str]:
    middle = y + BAR / 2
    name = bar.name if len(bar.name) <= MAX_LETTERS else f"{bar.name[: MAX_LETTERS - 1]}…"
    told = f"{bar.name}: {number(bar.middle)}"
    if bar.least != bar.most:
        told += f" ({number(bar.least)} to {number(bar.most)})"
    yield _text(NAMES - 8, middle + 4, name, "end")
    yield (
        f'<rect class="bar" x="{NAMES}" y="{y:.1f}" width="{x_of(bar.middle) - NAMES:.1f}" height="{BAR}">'
        f"<title>{escape(told)}</title></rect>"
    )
    if bar.least != bar.most:
        yield f'<line class="range" x1="{x_of(bar.least):.1f}" y1="{middle}" x2="{x_of(bar.most):.1f}" y2="{middle}"/>'
    yield _text(x_of(bar.most) + 6, middle + 4, number(bar.middle), "start")


# --- elements ------------------------------------------------------------------------------------------------
def _svg(height: float, title: str, parts: Sequence[str]) -> str:
    inside = "".join(parts)
    return f'<svg viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label="{escape(title)}">{inside}</svg>'


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'
