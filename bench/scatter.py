"""Points with names and intervals as an SVG file, readable on light and dark pages."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

from figures import STYLE, WIDTH

PANEL_HEIGHT = 330
LEFT, RIGHT, TOP, BOTTOM = 52, 92, 46, 46
LETTER, LINE = 6.0, 11.0
"""Width and height that a label's letter takes, in pixels: an estimate that is a little too wide."""


@dataclass(frozen=True)
class Point:
    """low, high: the interval of y. style: a CSS class"""

    name: str
    x: float
    y: float
    low: float
    high: float
    style: str


@dataclass(frozen=True)
class Axis:
    """is_log: decades; else from 0 to 1, in per cent"""

    title: str
    is_log: bool = False


def scatter(panels: Sequence[tuple[str, Sequence[Point]]], *, x: Axis, y: Axis, colours: Mapping[str, str]) -> str:
    """One SVG with a panel (title, points) below the other, and what the colours mean at its foot."""
    parts, top = [], 0
    for title, points in panels:
        parts.append(f'<g transform="translate(0 {top})">{_panel(title, points, x, y)}</g>')
        top += PANEL_HEIGHT
    seen = {point.style for _, points in panels for point in points}
    place = LEFT
    for style in colours:
        if style in seen:
            parts.append(f'<circle class="{style}" cx="{place}" cy="{top + 12}" r="4"/>')
            parts.append(f'<text x="{place + 8}" y="{top + 16}">{escape(style.replace("-", " "))}</text>')
            place += 26 + round(LETTER * len(style))
    styles = " ".join(
        f".{style} {{ fill: {colour}; stroke: {colour}; }} text.{style} {{ stroke: none; }}"
        for style, colour in colours.items()
    )
    height = top + 26
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}">'
        f"<style>{STYLE} .interval {{ opacity: .4; }} .leader {{ opacity: .5; stroke-width: .6; }} {styles}</style>"
        f'<rect class="page" width="{WIDTH}" height="{height}"/>{"".join(parts)}</svg>\n'
    )


def _panel(title: str, points: Sequence[Point], x: Axis, y: Axis) -> str:
    right, bottom = WIDTH - RIGHT, PANEL_HEIGHT - BOTTOM
    across, x_ticks = _scale([point.x for point in points], x, LEFT, right)
    up, y_ticks = _scale([], y, bottom, TOP)
    parts = [f'<text class="title" x="8" y="18">{escape(title)}</text>']
    for value, label in x_ticks:
        place = across(value)
        parts.append(f'<line class="grid" x1="{place:.1f}" x2="{place:.1f}" y1="{TOP}" y2="{bottom}"/>')
        parts.append(f'<text x="{place:.1f}" y="{bottom + 15}" text-anchor="middle">{label}</text>')
    for value, label in y_ticks:
        place = up(value)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{right}" y1="{place:.1f}" y2="{place:.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{place + 4:.1f}" text-anchor="end">{label}</text>')
    middle = (LEFT + right) / 2
    parts.append(f'<text x="{middle:.0f}" y="{bottom + 33}" text-anchor="middle">{escape(x.title)}</text>')
    parts.append(f'<text x="8" y="{TOP - 13}">{escape(y.title)}</text>')
    placed = [(point, across(point.x), up(point.y)) for point in points]
    for point, px, py in placed:
        low, high = (up(min(max(value, 0.0), 1.0)) for value in (point.low, point.high))
        parts.append(
            f'<line class="{point.style} interval" x1="{px:.1f}" x2="{px:.1f}" y1="{low:.1f}" y2="{high:.1f}"/>'
        )
        parts.append(f'<circle class="{point.style}" cx="{px:.1f}" cy="{py:.1f}" r="3.5"/>')
    return "".join([*parts, *_labels(placed)])


def _scale(
    values: Sequence[float], axis: Axis, begin: float, end: float
) -> tuple[Callable[[float], float], list[tuple[float, str]]]:
    """The place of a value on the page, and the ticks."""
    if not axis.is_log:
        return (lambda value: begin + (end - begin) * value), [(share / 5, f"{20 * share}%") for share in range(6)]
    low = math.floor(math.log10(min(values, default=1.0)))
    high = max(low + 1, math.ceil(math.log10(max(values, default=10.0))))
    ticks = [(10.0**power, _power(power)) for power in range(low, high + 1)]
    return (lambda value: begin + (end - begin) * (math.log10(value) - low) / (high - low)), ticks


def _power(power: int) -> str:
    for size, letter in ((9, "B"), (6, "M"), (3, "k")):
        if power >= size:
            return f"{10 ** (power - size)} {letter}"
    return f"{10**power}"


def _labels(placed: Sequence[tuple[Point, float, float]]) -> list[str]:
    """A name beside each point where it covers no other name and no point, with a line to it where that is far."""
    taken = [(px - 4, py - 4, px + 4, py + 4) for _, px, py in placed]
    parts = []
    for point, px, py in sorted(placed, key=lambda item: item[2]):
        width = LETTER * len(point.name)
        boxes = [
            (*_box(px, py, width, side, shift), distance)
            for distance in range(14)
            for side in ("right", "left")
            for shift in {distance * LINE, -distance * LINE}
        ]
        inside = [box for box in boxes if _is_inside(*box[:4])]
        free = [box for box in inside if not any(_overlap(box[:4], other) for other in taken)]
        left, top, right, bottom, distance = (free or inside or boxes)[0]
        taken.append((left, top, right, bottom))
        if distance > 0:
            edge = left if left > px else right
            parts.append(
                f'<line class="{point.style} leader" x1="{px:.1f}" y1="{py:.1f}" x2="{edge:.1f}" y2="{top + 6:.1f}"/>'
            )
        parts.append(f'<text class="{point.style}" x="{left:.1f}" y="{bottom - 2:.1f}">{escape(point.name)}</text>')
    return parts


def _box(px: float, py: float, width: float, side: str, shift: float) -> tuple[float, float, float, float]:
    gap = 7 if shift == 0 else 14
    left = px + gap if side == "right" else px - gap - width
    return left, py - LINE / 2 + shift, left + width, py + LINE / 2 + shift


def _is_inside(left: float, top: float, right: float, bottom: float) -> bool:
    return left > LEFT and right < WIDTH and top > TOP and bottom < PANEL_HEIGHT - BOTTOM + 4


def _overlap(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]
