"""Charts of affina's report as SVG files of their own, readable on light and dark pages."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from affina.evaluation.charts import Series, line_chart

WIDTH = 760
_TITLE_HEIGHT = 26
STYLE = """
svg { font: 11px system-ui, sans-serif; }
rect.page { fill: #fff; } text { fill: #333; } text.title { font-weight: 600; font-size: 13px; }
.grid { stroke: #ddd; } .line { fill: none; stroke-width: 1.6; } .crosshair { display: none; }
@media (prefers-color-scheme: dark) {
  rect.page { fill: #111; } text { fill: #ddd; } .grid { stroke: #333; }
}
"""


@dataclass(frozen=True)
class Panel:
    title: str
    description: str
    series: Sequence[Series]
    height: int = 280


def figure(panels: Sequence[Panel], *, colours: Mapping[str, str], x_unit: str) -> str:
    """One SVG with the panels below each other.

    colours: of the series' styles; a style that ends in -thin is drawn thin and pale
    """
    styles = [
        f".{style} {{ stroke: {colour}; {'stroke-width: .8; opacity: .35;' if style.endswith('-thin') else ''} }} "
        f"text.{style} {{ fill: {colour}; stroke: none; }}"
        for style, colour in colours.items()
    ]
    parts, top = [], 0
    for panel in panels:
        chart = str(
            line_chart(
                panel.series,
                title=panel.title,
                description=panel.description,
                x_unit=x_unit,
                width=WIDTH,
                height=panel.height,
            )
        )
        # The values under the pointer are for the report's script; a file has none.
        chart = re.sub(r' data-chart="[^"]*"', "", chart, count=1)
        parts.append(f'<text class="title" x="8" y="{top + 18}">{panel.title}</text>')
        place = f'x="0" y="{top + _TITLE_HEIGHT}" width="{WIDTH}" height="{panel.height}"'
        parts.append(chart.replace("<svg ", f"<svg {place} ", 1))
        top += _TITLE_HEIGHT + panel.height
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {top}">'
        f'<style>{STYLE}{" ".join(styles)}</style><rect class="page" width="{WIDTH}" height="{top}"/>'
        f"{''.join(parts)}</svg>\n"
    )
