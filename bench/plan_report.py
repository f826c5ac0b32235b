"""The table and the figure of plans against measurements (plan_accuracy.py)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from figures import STYLE, WIDTH
from tables import markdown

Record = dict[str, Any]
GIB = 2**30
COLOURS = {"fast": "#3b82f6", "reference": "#d97706"}
PANEL, LEFT, RIGHT, TOP, BOTTOM = 360, 64, 40, 40, 48


def name_of(case: Record) -> str:
    """`qwen3-4b, 8 × 2048, nf4, rank 64`: what is not the default is said."""
    parts = [case["model"], f"{case['rows']} × {case['length']}"]
    parts += [case["format"]] if case["format"] != "none" else []
    parts += [f"rank {case['rank']}"] if case["rank"] != 16 else []
    parts += [case["optimizer"]] if case["optimizer"] != "adamw" else []
    parts += ["packed"] if case["packed"] else []
    parts += [f"within {case['gib']:g} GiB"] if case["gib"] else []
    parts += [f"{case['accumulation']} micro-batches"] if case["accumulation"] > 1 else []
    parts += ["no graphs"] if case["engine"] == "fast" and not case["captured"] else []
    return ", ".join(parts)


def table(found: Sequence[Record]) -> str:
    """One row for each configuration that ran: measured, and how far the plan was off."""
    rows = []
    for record in found:
        if "error" in record:
            rows.append([name_of(record["case"]), record["case"]["engine"], "failed", "", "", "", "", ""])
            continue
        measured, today = record["measured"], record.get("today")
        keeps = measured["keeps"] or record["predicted"]["keeps"]
        rows.append(
            [
                name_of(record["case"]) + (" (by lot)" if record["case"]["set"] == "random" else ""),
                record["case"]["engine"],
                keeps.removesuffix(" for the backward pass"),
                f"{measured['allocated_bytes'] / GIB:.2f}",
                f"{record['memory_error']:+.2%}",
                f"{record['reserved_error']:+.1%}",
                f"{measured['step_seconds'] * 1e3:.0f}",
                f"{record['time_error']:+.0%}" + (f" ({today['time_error']:+.0%})" if today else ""),
            ]
        )
    head = ["configuration", "engine", "layers keep", "GiB", "plan's error", "of reserved", "ms", "plan's error, time"]
    return markdown(head, rows)


def summary(content: Record) -> str:
    """What all of them say: medians and the worst, of the fixed cases and of those by lot."""
    rows = []
    for title, prefix in (("chosen", ""), ("by lot", "random_")):
        if f"{prefix}num_cases" not in content:
            continue
        value = {key: content.get(f"{prefix}{key}") for key in _SUMMARY}
        today = content.get(f"{prefix}time_error_median_today")
        rows.append(
            [
                f"{title}, {content[f'{prefix}num_cases']}",
                f"{value['memory_error_median']:.2%}",
                f"{value['memory_error_worst']:.2%}",
                f"{min(value['memory_error_lowest'], 0):.2%}",
                f"{value['reserved_error_median']:.1%}",
                f"{value['time_error_median']:.1%}" + (f" ({today:.1%})" if today is not None else ""),
            ]
        )
    head = ["configurations", "memory, median error", "worst", "lowest plan", "reserved, median", "time, median"]
    return markdown(head, rows)


_SUMMARY = (
    "memory_error_median",
    "memory_error_worst",
    "memory_error_lowest",
    "reserved_error_median",
    "time_error_median",
)


def draw(found: Sequence[Record], path: Path) -> None:
    """Planned against measured, memory and time, on logarithmic axes with the line where both are equal."""
    done = [record for record in found if "measured" in record]
    memory, time = [], []
    for record in done:
        engine, today = record["case"]["engine"], record.get("today", record["predicted"])
        measured, planned = record["measured"], record["predicted"]
        memory.append((measured["allocated_bytes"] / GIB, planned["allocated_bytes"] / GIB, engine))
        time.append((measured["step_seconds"] * 1e3, today["step_seconds"] * 1e3, engine))
    panels = [
        _panel("Peak memory: planned against allocated, GiB", memory),
        _panel("Step time: planned against measured, ms", time),
    ]
    parts = [f'<g transform="translate(0 {index * PANEL})">{panel}</g>' for index, panel in enumerate(panels)]
    place, foot = LEFT, 2 * PANEL
    for engine in COLOURS:
        parts.append(f'<circle class="{engine}" cx="{place}" cy="{foot + 6}" r="4"/>')
        parts.append(f'<text x="{place + 8}" y="{foot + 10}">{engine} engine</text>')
        place += 120
    styles = " ".join(f".{engine} {{ fill: {colour}; fill-opacity: .75; }}" for engine, colour in COLOURS.items())
    path.write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {foot + 22}" width="{WIDTH}" '
        f'height="{foot + 22}"><style>{STYLE} {styles}</style>'
        f'<rect class="page" width="{WIDTH}" height="{foot + 22}"/>{"".join(parts)}</svg>\n',
        encoding="utf-8",
    )


def _panel(title: str, points: Sequence[tuple[float, float, str]]) -> str:
    values = [value for x, y, _ in points for value in (x, y)]
    low, high = math.log10(min(values)) - 0.05, math.log10(max(values)) + 0.05
    right, bottom = WIDTH - RIGHT, PANEL - BOTTOM

    def across(value: float) -> float:
        return LEFT + (right - LEFT) * (math.log10(value) - low) / (high - low)

    def up(value: float) -> float:
        return bottom - (bottom - TOP) * (math.log10(value) - low) / (high - low)

    parts = [f'<text class="title" x="8" y="18">{escape(title)}</text>']
    for tick in _ticks(low, high):
        x, y = across(tick), up(tick)
        parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{bottom}"/>')
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{x:.1f}" y="{bottom + 15}" text-anchor="middle">{tick:,g}</text>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{tick:,g}</text>')
    first, last = 10**low, 10**high
    parts.append(
        f'<line class="grid" stroke-dasharray="4 3" x1="{across(first):.1f}" y1="{up(first):.1f}" '
        f'x2="{across(last):.1f}" y2="{up(last):.1f}"/>'
    )
    parts.append(f'<text x="{(LEFT + right) / 2:.0f}" y="{bottom + 33}" text-anchor="middle">measured</text>')
    parts.append(f'<text x="8" y="{TOP - 8}">planned</text>')
    for x, y, engine in points:
        parts.append(f'<circle class="{engine}" cx="{across(x):.1f}" cy="{up(y):.1f}" r="4"/>')
    return "".join(parts)


def _ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 of every decade that is seen."""
    powers = range(math.floor(low), math.ceil(high) + 1)
    return [tick for power in powers for factor in (1, 2, 5) if low <= math.log10(tick := factor * 10.0**power) <= high]
