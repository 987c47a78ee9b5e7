"""What a report is made of, as values: sections with a figure and the table of its numbers. Made by `sections.py` and
`benchmarks.py`, drawn by `figures.py` and `page.py`.
"""

from __future__ import annotations

import math
import statistics
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True, slots=True)
class Lines:
    """Values over something that goes on."""

    series: Mapping[str, Points]
    """Name -> (x, y), x rising."""
    x: str
    """What x is."""
    y_range: tuple[float | None, float | None] = (None, None)
    """Of the axis; None is what the values need."""
    marks: Sequence[tuple[float, str]] = ()
    """Moments at which something happened, in words."""


@dataclass(frozen=True, slots=True)
class Bar:
    """One measure, with the range of its repetitions."""

    name: str
    middle: float
    least: float
    most: float

    @classmethod
    def of(cls, name: str, values: Sequence[float]) -> Bar:
        """The median of `values`, of which there is at least one."""
        return cls(name, statistics.median(values), min(values), max(values))


@dataclass(frozen=True, slots=True)
class Bars:
    """Measures of one kind side by side, from 0."""

    bars: Sequence[Bar]


@dataclass(frozen=True, slots=True)
class Table:
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True, slots=True)
class Section:
    title: str
    text: str = ""
    figure: Lines | Bars | None = None
    table: Table | None = None


@dataclass(frozen=True, slots=True)
class Run:
    """All about one run."""

    title: str
    source: str
    """The file."""
    facts: Sequence[tuple[str, str]] = ()
    sections: Sequence[Section] = field(default=())


MAX_ROWS = 12
"""Of the table beside a line: evenly chosen, with the last."""


def number(value: float) -> str:
    """As people read it: four digits, thousands apart."""
    if not math.isfinite(value):
        return "–"
    if float(value).is_integer() and abs(value) < 1e15:
        return f"{int(value):,}"
    return f"{value:,.4g}"


def lines_table(lines: Lines) -> Table:
    """Values at some places, the first and the last among them: of each series the one there, or the last before."""
    xs = sorted({x for points in lines.series.values() for x, _ in points})
    if len(xs) > MAX_ROWS:
        xs = [xs[round(i * (len(xs) - 1) / (MAX_ROWS - 1))] for i in range(MAX_ROWS)]
    rows = [[number(x), *(number(_latest(points, x)) for points in lines.series.values())] for x in xs]
    return Table([lines.x, *lines.series], rows)


def _latest(points: Points, x: float) -> float:
    at = bisect_right(points, x, key=lambda point: point[0])
    return points[at - 1][1] if at else math.nan


def bars_table(bars: Bars) -> Table:
    """Medians, and the ranges where there are any."""
    if all(bar.least == bar.most for bar in bars.bars):
        return Table(["", "value"], [[bar.name, number(bar.middle)] for bar in bars.bars])
    cells = [[bar.name, number(bar.middle), number(bar.least), number(bar.most)] for bar in bars.bars]
    return Table(["", "median", "least", "most"], cells)


def of_lines(title: str, lines: Lines, text: str = "") -> Section:
    """A section of a line with its table."""
    return Section(title, text, lines, lines_table(lines))


MAX_RATIO = 1000.0
"""Between the bars of a figure: beyond it, the small ones are not to be seen, and are most likely something else."""


def of_bars(title: str, bars: Bars, text: str = "") -> Section:
    """A section of bars with their table; the table alone where no picture would show them."""
    sizes = [abs(bar.most) for bar in bars.bars if bar.most]
    is_fit = len(bars.bars) > 1 and sizes and max(sizes) <= MAX_RATIO * min(sizes)
    is_fit = is_fit and all(bar.least >= 0 for bar in bars.bars)
    return Section(title, text, bars if is_fit else None, bars_table(bars))
