"""The report: one HTML file that holds all of itself and asks the network for nothing.

`ReportData` is plain data; `read_report_data` fills it from the files of a run directory, also of one that crashed or
was never evaluated. Everything that enters the page is escaped, and a content security policy with the hashes of the
page's own style and script keeps anything else from running, whatever a model wrote into a reply.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import jinja2
from markupsafe import Markup

from affina.evaluation.charts import Series, interval_strip, line_chart, short_number, smooth
from affina.evaluation.compare import format_points, format_share
from affina.runs import atomic

QUIET_EVENTS = frozenset({"checkpoint", "loss-scale-halved"})
"""Events of a run that goes well; the page only counts them."""

_ERROR_WORDS = ("fail", "error", "nan", "fatal", "damaged", "disk-full", "out-of-memory")
_WARNING_WORDS = ("warning", "skip", "interrupt", "early", "overflow", "note", "lost", "truncat", "leak", "finding")


@dataclass(frozen=True, slots=True)
class Fact:
    """A label and its value, and what a reader should know to read it right."""

    label: str
    value: str
    note: str = ""


@dataclass(frozen=True, slots=True)
class Command:
    """What to type next, and what it does."""

    text: str
    purpose: str


@dataclass(frozen=True, slots=True)
class ConfigRow:
    """One setting: "training.epochs", its value, and who chose it in words."""

    path: str
    value: str
    origin: str
    is_chosen: bool


@dataclass(frozen=True, slots=True)
class ReportData:
    """All that the page shows.

    result:  what `EvaluationResult.to_dict` gives, None before an evaluation
    metrics: lines of metrics.jsonl: steps with `loss`, validations with `validation_loss`
    events:  lines of events.jsonl
    """

    title: str
    subtitle: str = ""
    status: str = ""
    result: Mapping[str, Any] | None = None
    metrics: Sequence[Mapping[str, Any]] = ()
    events: Sequence[Mapping[str, Any]] = ()
    facts: Sequence[Fact] = ()
    data_facts: Sequence[Fact] = ()
    config: Sequence[ConfigRow] = ()
    environment: Sequence[Fact] = ()
    commands: Sequence[Command] = ()


@dataclass(frozen=True, slots=True)
class _Measure:
    """One row of the table base against tuned, formatted."""

    name: str
    unit: str
    base: str
    base_range: str
    tuned: str
    tuned_range: str
    change: str
    change_range: str
    strip: Markup


def write_report(data: ReportData, path: Path) -> Path:
    """Write the page, all or nothing, and return its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic.write_text(path, render_report(data))
    return path


def render_report(data: ReportData, *, theme: Literal["light", "dark"] | None = None) -> str:
    """The page as HTML. theme: fix the colours instead of following the reader's system (for pictures)."""
    templates = resources.files("affina.evaluation") / "templates"
    style = (templates / "report.css").read_text(encoding="utf-8")
    script = (templates / "report.js").read_text(encoding="utf-8")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    page = environment.from_string((templates / "report.html").read_text(encoding="utf-8"))
    result = data.result or {}
    shown_events = [_event(event) for event in data.events if event.get("kind") not in QUIET_EVENTS]
    loss = _loss_series(data.metrics)
    return page.render(
        data=data,
        theme=theme,
        style=Markup(style),
        style_hash=_policy_hash(style),
        script=Markup(script),
        script_hash=_policy_hash(script),
        verdicts=_verdicts(result),
        notes=result.get("notes", []),
        measures=_measures(result),
        caption=_caption(result),
        level=f"{result.get('ci', {}).get('level', 0.95):.0%}",
        counts_sentence=_counts_sentence(result),
        samples=[_sample(sample) for sample in result.get("samples", [])],
        loss_wide=_loss_chart(loss, width=912, height=330),
        loss_narrow=_loss_chart(loss, width=380, height=260),
        small_charts=_small_charts(data.metrics),
        events=shown_events,
        num_quiet_events=len(data.events) - len(shown_events),
        sections=_config_sections(data.config),
        num_chosen=sum(row.is_chosen for row in data.config),
        footer="Made by affina. This page holds all of itself: it can be mailed, printed and archived.",
    )


def _policy_hash(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode('utf-8')).digest()).decode('ascii')}"


# Result


def _verdicts(result: Mapping[str, Any]) -> list[dict[str, str]]:
    verdicts = result.get("verdict", {})
    names = [name for name in ("accuracy", "perplexity") if verdicts.get(name)]
    return [
        {"style": verdicts[name]["conclusion"].replace(" ", "-"), "sentence": verdicts[name]["sentence"]}
        for name in names
    ]


def _caption(result: Mapping[str, Any]) -> str:
    if not result:
        return ""
    text = f"The same {result['n']:,} validation records ({result['num_tokens']:,} reply tokens) for both models"
    if result.get("num_replies"):
        text += f", replies generated for {result['num_replies']:,}"
    return f"{text}. {result['ci']['level']:.0%} confidence intervals."


def _counts_sentence(result: Mapping[str, Any]) -> str:
    counts = result.get("counts")
    if not counts:
        return ""
    p_value = result["verdict"]["accuracy"]["p_value"]
    shown = f"p = {p_value:.2g}" if p_value >= 1e-4 else "p < 0.0001"
    return (
        f"Both right on {counts['both_right']}, only the tuned model on {counts['gained']}, only the base model on "
        f"{counts['lost']}, neither on {counts['neither_right']} (McNemar's exact test: {shown})."
    )


def _measures(result: Mapping[str, Any]) -> list[_Measure]:
    if not result:
        return []
    measures = []
    base, tuned, ci, verdict = result["base"], result["tuned"], result["ci"], result["verdict"]
    if base.get("accuracy") is not None and verdict.get("accuracy"):
        measures.append(
            _Measure(
                name="Accuracy",
                unit="replies that match",
                base=format_share(base["accuracy"]),
                base_range=_range(ci["accuracy"]["base"], format_share),
                tuned=format_share(tuned["accuracy"]),
                tuned_range=_range(ci["accuracy"]["tuned"], format_share),
                change=f"{format_points(verdict['accuracy']['change'])} points",
                change_range=_range(verdict["accuracy"]["interval"], format_points),
                strip=_strip(
                    "accuracy",
                    base["accuracy"],
                    tuned["accuracy"],
                    ci["accuracy"],
                    0.0,
                    1.0,
                    format_share,
                    end_labels=("0%", "100%"),
                ),
            )
        )
    ratio = verdict["perplexity"]["change"]
    measures.append(
        _Measure(
            name="Perplexity",
            unit="on reply tokens, lower is better",
            base=format_figure(base["perplexity"]),
            base_range=_range(ci["perplexity"]["base"], format_figure),
            tuned=format_figure(tuned["perplexity"]),
            tuned_range=_range(ci["perplexity"]["tuned"], format_figure),
            change=f"× {format_figure(ratio)}",
            change_range=_range(verdict["perplexity"]["interval"], format_figure),
            strip=_perplexity_strip(base["perplexity"], tuned["perplexity"], ci["perplexity"]),
        )
    )
    return measures


def _perplexity_strip(base: float | None, tuned: float | None, ci: Mapping[str, Any]) -> Markup:
    """Perplexities on a logarithmic scale from 1: equal distances are equal factors."""
    if base is None or tuned is None:
        return Markup("")
    logs = {name: [math.log(end) if end else None for end in ci[name] or (None, None)] for name in ("base", "tuned")}
    ends = [math.log(base), math.log(tuned), *(log for pair in logs.values() for log in pair if log is not None)]
    highest = max(max(ends), 0.05) * 1.02
    return _strip(
        "perplexity",
        math.log(base),
        math.log(tuned),
        logs,
        0.0,
        highest,
        format_figure,
        end_labels=("1", format_figure(math.exp(highest))),
        described={"base": ci["base"], "tuned": ci["tuned"]},
    )


def _strip(
    name: str,
    base: float,
    tuned: float,
    ends: Mapping[str, Any],
    low: float,
    high: float,
    form: Any,
    *,
    end_labels: tuple[str, str],
    described: Mapping[str, Any] | None = None,
) -> Markup:
    def bounds(which: str, value: float) -> tuple[float, float]:
        start, end = ends[which] or (None, None)
        return (value if start is None else start, value if end is None else end)

    told = described or ends
    description = (
        f"Intervals of {name}: base {_range(told['base'], form) or 'not known'}, "
        f"tuned {_range(told['tuned'], form) or 'not known'}"
    )
    rows = [("base", base, *bounds("base", base)), ("tuned", tuned, *bounds("tuned", tuned))]
    return interval_strip(rows, description=description, low=low, high=high, end_labels=end_labels, width=224)


def format_figure(value: float | None) -> str:
    """A perplexity or a ratio with three or four digits."""
    if value is None:
        return "∞"
    if value >= 1000:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 100 else f"{value:.2f}" if value >= 1 else f"{value:.3f}"


def _range(interval: Sequence[float | None] | None, form: Any) -> str:
    if interval is None or interval[0] is None or interval[1] is None:
        return ""
    return f"{form(interval[0])} to {form(interval[1])}"


def _sample(sample: Mapping[str, Any]) -> dict[str, Any]:
    sides = [
        {
            "style": name,
            "name": title,
            "text": sample[name],
            "is_right": sample[f"{name}_is_right"],
            "is_complete": sample.get(f"{name}_is_complete", True),
        }
        for name, title in (("base", "Base"), ("tuned", "Tuned"))
    ]
    compared = {
        "json": "compared as JSON",
        "number": "the final number counts",
        "normalized": "compared without case, spacing and final punctuation",
        "exact": "compared letter by letter",
        "contains": "must contain the wanted text",
        "tool_calls": "the tool calls count",
    }.get(sample["matcher"], sample["matcher"])
    origin = " · ".join(part for part in (sample["origin"], compared) if part)
    return {"prompt": sample["prompt"], "reference": sample["reference"], "sides": sides, "origin": origin}


# Charts


def _column(
    metrics: Iterable[Mapping[str, Any]], key: str, *, scale: float = 1.0
) -> tuple[list[float], list[float | None]]:
    """Steps and values of the lines that have `key`; a value that is not finite is a gap."""
    steps: list[float] = []
    values: list[float | None] = []
    for line in metrics:
        step, value = line.get("step"), line.get(key)
        if not isinstance(step, int | float) or key not in line:
            continue
        is_finite = isinstance(value, int | float) and math.isfinite(value)
        steps.append(float(step))
        values.append(float(value) * scale if is_finite and value is not None else None)
    return steps, values


def _loss_series(metrics: Sequence[Mapping[str, Any]]) -> list[Series]:
    steps, losses = _column(metrics, "loss")
    series = []
    if len(steps) >= 30:
        series.append(Series("", steps, losses, "train"))
        series.append(Series("training", steps, smooth(losses, span=max(5.0, len(steps) / 30)), "smooth"))
    elif steps:
        series.append(Series("training", steps, losses, "smooth", has_markers=len(steps) < 3))
    validation_steps, validation_losses = _column(metrics, "validation_loss")
    if validation_steps:
        series.append(Series("validation", validation_steps, validation_losses, "validation", has_markers=True))
    return series


def _loss_chart(series: Sequence[Series], *, width: int, height: int) -> Markup:
    parts = []
    for one in series:
        finite = [y for y in one.y if y is not None]
        if one.name and finite:
            parts.append(f"{one.name} from {short_number(finite[0])} to {short_number(finite[-1])}")
    description = "; ".join(parts) or "no values"
    return line_chart(series, title="Loss", description=description, x_unit="step", width=width, height=height)


def _small_charts(metrics: Sequence[Mapping[str, Any]]) -> list[tuple[str, Markup]]:
    wanted = (
        ("Learning rate", "learning_rate", 1.0),
        ("Gradient norm", "grad_norm", 1.0),
        ("Tokens per second", "tokens_per_second", 1.0),
        # Of preference objectives; a metric that a run does not have gets no chart.
        ("Reward margin", "reward_margin", 1.0),
        ("Pairs in the right order", "reward_accuracy", 1.0),
        ("Reward of chosen replies", "reward_chosen", 1.0),
        ("Reward of rejected replies", "reward_rejected", 1.0),
        ("Reward of wanted replies", "reward_desirable", 1.0),
        ("Reward of unwanted replies", "reward_undesirable", 1.0),
        ("KL estimate", "kl_estimate", 1.0),
    )
    charts = []
    for title, key, scale in wanted:
        steps, values = _column(metrics, key, scale=scale)
        finite = [value for value in values if value is not None]
        if len(finite) < 2:
            continue
        chart = line_chart(
            [Series("", steps, values, "plain")],
            title=title,
            description=f"from {short_number(min(finite))} to {short_number(max(finite))}",
            x_unit="step",
            width=290,
            height=165,
            from_zero=True,
            label_lines=False,
        )
        charts.append((title, chart))
    return charts


# Events and configuration


def _event(event: Mapping[str, Any]) -> dict[str, str]:
    kind = str(event.get("kind", "event"))
    severity = str(event.get("severity", ""))
    if severity not in ("error", "warning", "info"):
        severity = (
            "error"
            if any(word in kind for word in _ERROR_WORDS)
            else "warning"
            if any(word in kind for word in _WARNING_WORDS)
            else "info"
        )
    return {
        "time": str(event.get("time", "")).replace("T", " ").replace("Z", ""),
        "kind": kind.replace("-", " ").replace("_", " ").capitalize(),
        "message": str(event.get("message", "")),
        "fix": str(event.get("fix") or ""),
        "severity": severity,
    }


def _config_sections(rows: Sequence[ConfigRow]) -> list[tuple[str, list[dict[str, Any]]]]:
    sections: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        section, _, key = row.path.partition(".")
        shown = {"key": key or section, "value": row.value, "origin": row.origin, "is_chosen": row.is_chosen}
        sections.setdefault(section, []).append(shown)
    return list(sections.items())


def flatten(value: Any, path: str = "") -> dict[str, Any]:
    """{"training": {"epochs": 1}} as {"training.epochs": 1}; lists of mappings get [0], [1], …"""
    if isinstance(value, Mapping) and value:
        return {
            key: leaf
            for name, child in value.items()
            for key, leaf in flatten(child, f"{path}.{name}" if path else str(name)).items()
        }
    if isinstance(value, list | tuple) and value and all(isinstance(child, Mapping) for child in value):
        return {
            key: leaf for index, child in enumerate(value) for key, leaf in flatten(child, f"{path}[{index}]").items()
        }
    return {path: value}


def format_setting(value: Any) -> str:
    """A setting as YAML would write it on one line."""
    if value is None:
        return "not set"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return value
    if isinstance(value, float):
        return f"{value:g}"
    return json.dumps(value, ensure_ascii=False)


def config_rows(config: Mapping[str, Any], origins: Mapping[str, Any]) -> list[ConfigRow]:
    """Each setting with who chose it; `origins` maps "training.epochs" to what `Origin.to_dict` gives."""
    rows = []
    for path, value in flatten(config).items():
        origin = origins.get(path) or origins.get(path.partition("[")[0]) or {}
        kind = str(origin.get("kind") or "default")
        rows.append(ConfigRow(path, format_setting(value), _origin_words(origin), kind in ("user", "override")))
    return rows


def _origin_words(origin: Mapping[str, Any]) -> str:
    kind = str(origin.get("kind") or "default")
    file, line = origin.get("file"), origin.get("line")
    place = f"{Path(str(file)).name}:{line}" if file and line else str(file or "")
    words = {
        "user": f"you, {place}" if place else "you",
        "override": f"you, {place}" if place else "you, --set",
        "preset": f"preset {origin.get('preset') or ''}".strip(),
    }.get(kind, kind)
    reason = origin.get("reason")
    return f"{words}: {reason}" if reason else words
