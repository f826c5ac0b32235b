from __future__ import annotations

import json
import math
from html.parser import HTMLParser
from itertools import pairwise
from typing import Any
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from affina.evaluation.charts import (
    MAX_POINTS,
    Series,
    interval_strip,
    line_chart,
    nice_ticks,
    short_number,
    smooth,
)


def draw(*series: Series, **options: Any) -> str:
    return str(
        line_chart(series, title="Loss", description="falls", x_unit="step", **{"width": 600, "height": 300, **options})
    )


@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6))
def test_ticks_are_few_even_and_cover_the_range(low: float, span: float) -> None:
    ticks = nice_ticks(low, low + span)
    assert ticks[0] <= low + 1e-6 * span + 1e-9
    assert ticks[-1] >= low + span - 1e-6 * span - 1e-9
    assert 2 <= len(ticks) <= 12
    steps = [b - a for a, b in pairwise(ticks)]
    assert max(steps) == pytest.approx(min(steps), rel=1e-3)


def test_ticks_of_a_constant_still_span_something() -> None:
    assert len(nice_ticks(3.0, 3.0)) >= 2
    assert len(nice_ticks(0.0, 0.0)) >= 2


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0"), (0.0002, "2e-4"), (0.25, "0.25"), (12500.0, "12,500"), (-1.5, "-1.5"), (1e-7, "1e-7")]
)
def test_numbers_are_short(value: float, text: str) -> None:
    assert short_number(value) == text


def test_smoothing_keeps_a_constant_and_its_gaps() -> None:
    assert smooth([2.0, None, 2.0, 2.0], span=5) == pytest.approx([2.0, None, 2.0, 2.0])


def test_a_chart_is_well_formed_and_says_what_it_shows() -> None:
    svg = draw(Series("training", [1, 2, 3], [3.0, 2.0, 1.0], "smooth"))
    root = ElementTree.fromstring(svg)
    assert root.attrib["role"] == "img"
    assert root.attrib["aria-label"] == "Loss. falls"
    assert "3 steps" in svg
    assert ">training</text>" in svg


def test_the_lowest_value_is_drawn_lowest() -> None:
    root = ElementTree.fromstring(draw(Series("", [0, 1], [4.0, 1.0])))
    path = next(element for element in root.iter() if element.attrib.get("class") == "line plain")
    (_, first_y), (_, second_y) = (map(float, point.split()) for point in path.attrib["d"][1:].split("L"))
    assert second_y > first_y


def test_a_value_that_is_missing_breaks_the_line() -> None:
    svg = draw(Series("", [0, 1, 2, 3, 4], [1.0, 2.0, None, 2.0, 1.0]))
    path = ElementTree.fromstring(svg).find(".//path")
    path = path if path is not None else next(e for e in ElementTree.fromstring(svg).iter() if e.tag.endswith("path"))
    assert path.attrib["d"].count("M") == 2


def test_nothing_to_draw_gives_nothing() -> None:
    assert draw(Series("x", [], [])) == ""
    assert draw(Series("x", [1, 2], [None, None])) == ""


def test_one_point_and_a_constant_do_not_divide_by_zero() -> None:
    assert "nan" not in draw(Series("x", [1], [2.0], has_markers=True)).lower()
    assert "nan" not in draw(Series("x", [1, 2], [2.0, 2.0])).lower()


def test_a_long_line_is_thinned_and_keeps_its_spike() -> None:
    values = [1.0] * 50_000
    values[31_234] = 9.0
    svg = draw(Series("", list(range(50_000)), values))
    hover = json.loads(ElementTree.fromstring(svg).attrib["data-chart"])
    drawn = hover["series"][0]
    assert len(drawn["x"]) <= MAX_POINTS + 2
    assert max(drawn["y"]) == 9.0
    assert drawn["x"][-1] == 49_999


def test_text_in_a_chart_is_escaped() -> None:
    svg = draw(Series('<b>"&', [1, 2], [1.0, 2.0]))
    assert "<b>" not in svg

    class Reader(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            assert tag in ("svg", "line", "text", "path", "circle")

    Reader().feed(svg)


def test_a_strip_clips_intervals_to_its_scale() -> None:
    svg = interval_strip(
        [("base", 0.5, -3.0, 7.0)], description="d", low=0.0, high=1.0, end_labels=("0%", "100%"), width=200
    )
    root = ElementTree.fromstring(str(svg))
    for element in root.iter():
        for name in ("x1", "x2", "cx"):
            assert 0 <= float(element.attrib.get(name, 0)) <= 200
    assert not math.isnan(float(root.attrib["viewBox"].split()[3]))
