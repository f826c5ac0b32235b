"""Line charts and interval strips as inline SVG: no JavaScript is needed to see them, no file beside the page.

Colours are CSS classes, so that one drawing serves the light and the dark page and paper. Values under the pointer are
read by the page's script from the `data-chart` attribute.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

MAX_POINTS = 400
"""Points drawn per line; more than one per pixel only makes the file larger."""


@dataclass(frozen=True, slots=True)
class Series:
    """One line. `style` is a CSS class (train, smooth, validation, plain); an unnamed series has no label."""

    name: str
    x: Sequence[float]
    y: Sequence[float | None]
    style: str = "plain"
    has_markers: bool = False


@dataclass(frozen=True, slots=True)
class _Frame:
    """The plot area inside the drawing, and the map from values to pixels."""

    left: float
    top: float
    right: float
    bottom: float
    x_low: float
    x_high: float
    y_low: float
    y_high: float

    def x(self, value: float) -> float:
        return self.left + (value - self.x_low) / (self.x_high - self.x_low) * (self.right - self.left)

    def y(self, value: float) -> float:
        return self.bottom - (value - self.y_low) / (self.y_high - self.y_low) * (self.bottom - self.top)


def line_chart(
    series: Sequence[Series],
    *,
    title: str,
    description: str,
    x_unit: str,
    width: int,
    height: int,
    from_zero: bool = False,
    label_lines: bool = True,
) -> Markup:
    """A chart of one or more lines over the same x, or an empty string when there is no finite point.

    description: what a person who cannot see the chart is told
    x_unit:      singular name of what x counts ("step"); it stands once, beside the last tick
    from_zero:   the y axis starts at 0
    label_lines: name each line at its end instead of in a legend
    """
    drawn = [_thinned(one) for one in series]
    points = [(x, y) for one in drawn for x, y in zip(one.x, one.y, strict=True) if y is not None]
    if not points:
        return Markup("")
    frame = _frame(points, drawn, width, height, from_zero, label_lines)
    parts = [*_grid(frame), *_x_axis(frame, x_unit)]
    for one in drawn:
        parts.append(_path(one, frame))
        if one.has_markers:
            parts.extend(_markers(one, frame))
    if label_lines:
        parts.extend(_end_labels([one for one in drawn if one.name], frame))
    parts.append(
        Markup('<line class="crosshair" x1="0" x2="0" y1="{}" y2="{}" visibility="hidden"/>').format(
            _number(frame.top), _number(frame.bottom)
        )
    )
    hover = {
        "left": frame.left,
        "right": frame.right,
        "low": frame.x_low,
        "high": frame.x_high,
        "label": x_unit,
        "series": [
            {"name": one.name or title, "style": one.style, "x": list(one.x), "y": [_rounded(y) for y in one.y]}
            for one in drawn
            if one.style != "train" or len(drawn) == 1
        ],
    }
    return Markup(
        '<svg class="chart" viewBox="0 0 {width} {height}" role="img" aria-label="{label}" data-chart="{hover}">'
        "{body}</svg>"
    ).format(
        width=width,
        height=height,
        label=f"{title}. {description}",
        hover=json.dumps(hover, separators=(",", ":")),
        body=Markup("").join(parts),
    )


def interval_strip(
    rows: Sequence[tuple[str, float, float, float]],
    *,
    description: str,
    low: float,
    high: float,
    end_labels: tuple[str, str],
    width: int,
) -> Markup:
    """Estimates with their intervals on one horizontal scale.

    rows:       (CSS class, value, interval low, interval high), from top to bottom; ends outside the scale are clipped
    end_labels: texts of the two ends of the scale
    """
    pad, row_height, text_height = 6.0, 16.0, 15.0
    axis = pad / 2 + row_height * len(rows)
    height = axis + text_height

    def place(value: float) -> float:
        share = (min(max(value, low), high) - low) / (high - low) if high > low else 0.5
        return pad + share * (width - 2 * pad)

    parts = [
        Markup(
            '<line class="scale" x1="{left}" x2="{right}" y1="{axis}" y2="{axis}"/>'
            '<text x="{left}" y="{text}">{first}</text><text x="{right}" y="{text}" text-anchor="end">{last}</text>'
        ).format(
            left=_number(pad),
            right=_number(width - pad),
            axis=_number(axis),
            text=_number(axis + 12),
            first=end_labels[0],
            last=end_labels[1],
        )
    ]
    for position, (style, value, start, end) in enumerate(rows):
        parts.append(
            Markup(
                '<g class="{}"><line x1="{}" x2="{}" y1="{y}" y2="{y}"/><circle cx="{}" cy="{y}" r="4"/></g>'
            ).format(
                style,
                _number(place(start)),
                _number(place(end)),
                _number(place(value)),
                y=_number(row_height * (position + 0.5)),
            )
        )
    return Markup('<svg class="strip" viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>').format(
        width, _number(height), description, Markup("").join(parts)
    )


def smooth(values: Sequence[float | None], *, span: float) -> list[float | None]:
    """Exponential moving average over about `span` points, corrected for its start; gaps stay gaps."""
    decay = 1.0 - 2.0 / (max(1.0, span) + 1.0)
    total = weight = 0.0
    smoothed: list[float | None] = []
    for value in values:
        if value is None:
            smoothed.append(None)
            continue
        total = decay * total + (1.0 - decay) * value
        weight = decay * weight + (1.0 - decay)
        smoothed.append(total / weight)
    return smoothed


def nice_ticks(low: float, high: float, *, about: int = 5) -> list[float]:
    """Round values that cover [low, high], in steps of 1, 2, 2.5 or 5 times a power of ten."""
    if not high > low:
        high = low + (abs(low) or 1.0)
    raw = (high - low) / max(1, about)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1.0, 2.0, 2.5, 5.0, 10.0) if power * factor >= raw * 0.999)
    first = math.floor(low / step + 1e-9)
    last = math.ceil(high / step - 1e-9)
    return [round(index * step, 12) for index in range(first, last + 1)]


def short_number(value: float) -> str:
    """A tick or a value under the pointer: 12,500 · 0.25 · 2e-4."""
    if value == 0:
        return "0"
    if abs(value) < 1e-3:
        mantissa, _, exponent = f"{value:.2e}".partition("e")
        return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}"


def _thinned(series: Series) -> Series:
    """At most MAX_POINTS points: of each stretch the lowest and the highest, so that spikes stay."""
    if len(series.x) <= MAX_POINTS:
        return series
    per_stretch = math.ceil(len(series.x) / (MAX_POINTS // 2))
    kept: list[int] = []
    for start in range(0, len(series.x), per_stretch):
        stretch = range(start, min(start + per_stretch, len(series.x)))
        finite = [index for index in stretch if series.y[index] is not None]
        if not finite:
            kept.append(start)
            continue
        extremes = {min(finite, key=series.y.__getitem__), max(finite, key=series.y.__getitem__)}  # type: ignore[arg-type]
        kept.extend(sorted(extremes))
    if kept[-1] != len(series.x) - 1:
        kept.append(len(series.x) - 1)
    return Series(
        series.name, [series.x[i] for i in kept], [series.y[i] for i in kept], series.style, series.has_markers
    )


def _frame(
    points: Sequence[tuple[float, float]],
    series: Sequence[Series],
    width: int,
    height: int,
    from_zero: bool,
    label_lines: bool,
) -> _Frame:
    x_low, x_high = min(x for x, _ in points), max(x for x, _ in points)
    y_low, y_high = min(y for _, y in points), max(y for _, y in points)
    if from_zero:
        y_low = min(0.0, y_low)
    ticks = nice_ticks(y_low, y_high, about=_num_y_ticks(height))
    label_width = 7.0 * max(len(short_number(tick)) for tick in ticks) + 10
    names = [one.name for one in series if one.name] if label_lines else []
    right_margin = 7.0 * max((len(name) for name in names), default=0) + (14 if names else 8)
    return _Frame(
        left=label_width,
        top=10.0,
        right=width - right_margin,
        bottom=height - 26.0,
        x_low=x_low,
        x_high=x_high if x_high > x_low else x_low + 1,
        y_low=ticks[0],
        y_high=ticks[-1],
    )


def _num_y_ticks(height: int) -> int:
    return 5 if height >= 240 else 3


def _grid(frame: _Frame) -> list[Markup]:
    parts = []
    for tick in nice_ticks(frame.y_low, frame.y_high, about=_num_y_ticks(round(frame.bottom + 26))):
        y = frame.y(tick)
        parts.append(
            Markup(
                '<line class="grid" x1="{}" x2="{}" y1="{}" y2="{}"/><text class="tick" x="{}" y="{}" '
                'text-anchor="end">{}</text>'
            ).format(
                _number(frame.left),
                _number(frame.right),
                _number(y),
                _number(y),
                _number(frame.left - 8),
                _number(y + 4),
                short_number(tick),
            )
        )
    return parts


def _x_axis(frame: _Frame, unit: str) -> list[Markup]:
    about = 6 if frame.right - frame.left > 420 else 3
    inside = [
        tick
        for tick in nice_ticks(frame.x_low, frame.x_high, about=about)
        if frame.x_low <= tick <= frame.x_high and tick == int(tick)
    ]
    parts = []
    for tick in inside:
        is_last = tick == inside[-1]
        # The last tick may be at the very edge: its text then ends there instead of being cut off.
        anchor = "end" if is_last and frame.right - frame.x(tick) < 30 else "middle"
        parts.append(
            Markup('<text class="tick" x="{}" y="{}" text-anchor="{}">{}{}</text>').format(
                _number(frame.x(tick)),
                _number(frame.bottom + 20),
                anchor,
                short_number(tick),
                f" {unit}s" if is_last else "",
            )
        )
    return parts


def _path(series: Series, frame: _Frame) -> Markup:
    commands = []
    is_down = False
    for x, y in zip(series.x, series.y, strict=True):
        if y is None:
            is_down = False
            continue
        commands.append(f"{'L' if is_down else 'M'}{_number(frame.x(x))} {_number(frame.y(y))}")
        is_down = True
    return Markup('<path class="line {}" d="{}"/>').format(series.style, "".join(commands))


def _markers(series: Series, frame: _Frame) -> list[Markup]:
    return [
        Markup('<circle class="marker {}" cx="{}" cy="{}" r="3.2"/>').format(
            series.style, _number(frame.x(x)), _number(frame.y(y))
        )
        for x, y in zip(series.x, series.y, strict=True)
        if y is not None
    ]


def _end_labels(series: Sequence[Series], frame: _Frame) -> list[Markup]:
    ends = []
    for one in series:
        last = next((y for y in reversed(one.y) if y is not None), None)
        if last is not None:
            ends.append((frame.y(last), one))
    ends.sort(key=lambda end: end[0])
    labels, previous = [], -math.inf
    for y, one in ends:
        previous = max(y + 4, previous + 15)
        labels.append(
            Markup('<text class="name {}" x="{}" y="{}">{}</text>').format(
                one.style, _number(frame.right + 8), _number(previous), escape(one.name)
            )
        )
    return labels


def _rounded(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.5g}")


def _number(value: float) -> str:
    return f"{value:.1f}".rstrip("0").rstrip(".")
