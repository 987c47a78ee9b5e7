"""Figures: round ticks, points where they belong, nothing lost and nothing unescaped."""

from __future__ import annotations

import math
import re
import xml.etree.ElementTree as ET

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray_moe.report.figures import BOTTOM, HEIGHT, LEFT, MAX_POINTS, NAMES, RIGHT, TOP, WIDTH, draw, thinned, ticks
from ray_moe.report.parts import Bar, Bars, Lines, bars_table, lines_table, number, of_bars


@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6))
def test_ticks_are_round_even_and_span_the_values(least: float, extent: float) -> None:
    found = ticks(least, least + extent)
    step = found[1] - found[0]
    slack = 1e-6 * step + 1e-9 * abs(least)
    assert found[0] <= least + slack and found[-1] >= least + extent - slack
    assert 3 <= len(found) <= 9
    mantissa = step / 10 ** math.floor(math.log10(step) + 1e-6)
    assert min(abs(mantissa - round_) for round_ in (1, 2, 5, 10)) < 1e-2


def test_ticks_of_one_value_lie_around_it() -> None:
    assert ticks(0.0, 0.0)[0] < 0 < ticks(0.0, 0.0)[-1]
    assert ticks(3.0, 3.0)[0] < 3 < ticks(3.0, 3.0)[-1]


def test_a_line_goes_from_corner_to_corner() -> None:
    figure = ET.fromstring(draw(Lines({"loss": [(0, 0), (5, 10)]}, "step", (0, 10)), "Loss"))
    (line,) = figure.iter("polyline")
    places = [tuple(map(float, place.split(","))) for place in line.attrib["points"].split()]
    assert places == [(LEFT, HEIGHT - BOTTOM), (WIDTH - RIGHT, TOP)]
    assert figure.attrib["aria-label"] == "Loss"
    assert [title.text for title in figure.iter("title")] == ["loss: 0 at step 0", "loss: 10 at step 5"]


def test_what_happened_is_marked_where_it_did() -> None:
    figure = ET.fromstring(draw(Lines({"y": [(0, 1), (10, 2)]}, "step", marks=[(5, "a <host> & more")]), "t"))
    (mark,) = (group for group in figure.iter("g") if group.attrib["class"] == "mark")
    assert float(mark[0].attrib["x1"]) == (LEFT + WIDTH - RIGHT) / 2
    assert mark[1].text == "step 5: a <host> & more"


def test_bars_are_as_long_as_their_numbers() -> None:
    bars = Bars([Bar.of("<half>", [1.0, 2.0, 3.0]), Bar.of("whole", [4.0])])
    figure = ET.fromstring(draw(bars, "t"))
    lengths = [float(rect.attrib["width"]) for rect in figure.iter("rect")]
    assert lengths == [pytest.approx(lengths[1] / 2), WIDTH - 80 - NAMES]
    (line,) = figure.iter("line")
    assert float(line.attrib["x2"]) - float(line.attrib["x1"]) == pytest.approx(lengths[1] / 2)
    assert [title.text for title in figure.iter("title")] == ["<half>: 2 (1 to 3)", "whole: 4"]


def test_a_long_line_keeps_its_peaks() -> None:
    points = [(float(x), math.sin(x / 50)) for x in range(10_000)]
    points[4321] = (4321.0, 99.0)
    points[7777] = (7777.0, -99.0)
    thin = thinned(points)
    assert len(thin) <= MAX_POINTS
    assert {(4321.0, 99.0), (7777.0, -99.0)} <= set(thin)
    assert list(thin) == sorted(thin)
    assert thinned(points[:MAX_POINTS]) == points[:MAX_POINTS]


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (1234567.0, "1,234,567"),
        (0.123456, "0.1235"),
        (5e-5, "5e-05"),
        (math.nan, "–"),
        (1234.5678, "1,235"),
        (-2, "-2"),
    ],
)
def test_numbers_are_short(value: float, said: str) -> None:
    assert number(value) == said


def test_the_table_of_a_line_has_its_ends_and_the_last_known_of_each_series() -> None:
    lines = Lines({"a": [(x, float(x)) for x in range(100)], "b": [(50, 7.0)]}, "step")
    table = lines_table(lines)
    assert (table.columns, len(table.rows)) == (["step", "a", "b"], 12)
    assert (table.rows[0], table.rows[-1]) == (["0", "0", "–"], ["99", "99", "7"])


def test_bars_of_several_kinds_are_a_table_alone() -> None:
    assert of_bars("t", Bars([Bar.of("bytes", [1e9]), Bar.of("loss", [2.5])])).figure is None
    assert of_bars("t", Bars([Bar.of("a", [-1.0]), Bar.of("b", [2.5])])).figure is None
    assert of_bars("t", Bars([Bar.of("a", [1.0]), Bar.of("b", [0.0])])).figure is not None
    assert bars_table(Bars([Bar.of("a", [1.0, 3.0])])).rows == [["a", "2", "1", "3"]]
    assert re.match("median", bars_table(Bars([Bar.of("a", [1.0, 3.0])])).columns[1])
