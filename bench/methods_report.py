"""What results/methods.json says: a table, the answers to four claims, and two figures.

A figure is the mean over seeds, ± half the width of its 95% interval (Student's t over seeds: what other seeds would
give, on the same records). A comparison is paired by seed: both sides had the same order of the data, and the
difference is taken seed by seed before its interval is.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from equivalence import t_quantile
from scatter import Axis, Point, scatter
from tables import markdown

Record = dict[str, Any]
Content = Mapping[str, Sequence[Record]]

LEVEL = 0.95
COLOURS = {
    "low-rank": "#2f80ed",
    "rotation": "#8e5bd9",
    "scaling": "#c98500",
    "virtual-tokens": "#1a9c6b",
    "bottleneck": "#d6409f",
    "weights": "#e0533d",
}
"""Each at least 3 : 1 against white and against #111."""


# Statistics
# --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Estimate:
    """half: half the width of the interval, None for one value alone"""

    mean: float
    half: float | None
    num: int

    @property
    def low(self) -> float:
        return self.mean - (self.half or 0.0)

    @property
    def high(self) -> float:
        return self.mean + (self.half or 0.0)

    def text(self, *, sign: bool = False) -> str:
        """In per cent, or in points where it has a sign."""
        shown = f"{100 * self.mean:+.1f}" if sign else f"{100 * self.mean:.1f}"
        return shown if self.half is None else f"{shown} ± {100 * self.half:.1f}"


def estimate(values: Sequence[float]) -> Estimate | None:
    if not values:
        return None
    if len(values) == 1:
        return Estimate(values[0], None, 1)
    half = t_quantile(LEVEL, len(values) - 1) * stdev(values) / math.sqrt(len(values))
    return Estimate(mean(values), half, len(values))


@dataclass(frozen=True)
class Group:
    """The runs of one variant on one task and one model: accuracy by seed, and skills kept, of the base's."""

    records: Sequence[Record]
    accuracy: Mapping[int, float]
    kept: Mapping[int, float]


def groups(content: Content) -> dict[tuple[str, str, str], Group]:
    """By model, variant and task; where a model was trained with several numbers of steps, those with most."""
    most: dict[str, int] = {}
    for record in content["records"]:
        most[record["model"]] = max(record["steps"], most.get(record["model"], 0))
    found: dict[tuple[str, str, str], list[Record]] = {}
    for record in content["records"]:
        if record["steps"] == most[record["model"]]:
            found.setdefault((record["model"], record["variant"], record["task"]), []).append(record)
    base = {record["model"]: record.get("num_skills_right", 0) for record in content["base"]}
    return {
        key: Group(
            runs,
            {run["seed"]: run["accuracy"] for run in runs},
            {run["seed"]: run["num_skills_right"] / base[key[0]] for run in runs if base.get(key[0])},
        )
        for key, runs in found.items()
    }


def paired(first: Group | None, second: Group | None) -> tuple[Estimate | None, Estimate | None]:
    """(first / second, first − second) over the seeds that both have; the ratio is None where second is 0 once."""
    if first is None or second is None:
        return None, None
    pairs = [(first.accuracy[seed], second.accuracy[seed]) for seed in first.accuracy if seed in second.accuracy]
    ratios = [] if any(b == 0 for _, b in pairs) else [a / b for a, b in pairs]
    return estimate(ratios), estimate([a - b for a, b in pairs])


# Tables
# --------------------------------------------------------------------------------------------------------------


def methods_table(content: Content) -> str:
    """A table for each model: variants by their mean accuracy, the base last."""
    found = groups(content)
    models, tasks = (list(dict.fromkeys(key[place] for key in found)) for place in (0, 2))
    parts = [_model_table(content, found, model, tasks) for model in models]
    return "\n".join(parts) + _failures(content)


def _model_table(content: Content, found: Mapping[Any, Group], model: str, tasks: Sequence[str]) -> str:
    variants = list(dict.fromkeys(key[1] for key in found if key[0] == model))
    speeds = {record["variant"]: record for record in content["speed"] if record["model"] == model}

    def rank(variant: str) -> float:
        own = [found[model, variant, task] for task in tasks if (model, variant, task) in found]
        return -len(own) - mean(mean(group.accuracy.values()) for group in own)

    rows = []
    for variant in sorted(variants, key=rank):
        own = [found.get((model, variant, task)) for task in tasks]
        first = next(group for group in own if group is not None).records[0]
        speed = speeds.get(variant)
        rates = [f"{group.records[0]['learning_rate']:g}" if group else "" for group in own]
        seeds = {len(group.accuracy) for group in own if group}
        rows.append(
            [
                f"`{variant}`",
                f"{first['num_trainable']:,}",
                f"{100 * first['num_trainable'] / first['num_parameters']:.3g}",
                *(_accuracy(group) for group in own),
                *(_cell(estimate(list(group.kept.values()))) if group else "not measured" for group in own),
                f"{speed['microseconds_per_token']:.1f}" if speed else "",
                f"{speed['peak_memory_bytes'] / 2**30:.3f}" if speed else "",
                " / ".join(rates),
                " / ".join(str(count) for count in sorted(seeds)),
            ]
        )
    base = next((record for record in content["base"] if record["model"] == model), None)
    title = f"**{model}**"
    if base is not None:
        accuracies = [f"{100 * base['tasks'][task]['accuracy']:.1f}" if task in base["tasks"] else "" for task in tasks]
        rows.append(
            [
                "the base",
                "0",
                "0",
                *accuracies,
                *["100" if base.get("num_skills_right") else "no test"] * len(tasks),
                *[""] * 4,
            ]
        )
        if "num_skills" in base:
            title += f" (its own skills: {base['num_skills_right']} of {base['num_skills']} before)"
    steps = next(group for key, group in found.items() if key[0] == model).records[0]["steps"]
    head = ["variant", "trained", "%", *(f"{task}, %" for task in tasks)]
    head += [*(f"skills kept after {task}, %" for task in tasks), "µs a token", "peak GiB", "learning rate", "seeds"]
    return f"{title}, {steps} steps:\n\n" + markdown(head, rows)


def _accuracy(group: Group | None) -> str:
    return _cell(estimate(list(group.accuracy.values()))) if group else "not measured"


def _cell(value: Estimate | None) -> str:
    return value.text() if value is not None else "no test"


def _failures(content: Content) -> str:
    failed = {
        (record["model"], record["variant"], record["task"]): record["error"].strip().splitlines()[0][:160]
        for record in content["errors"]
        if record["kind"] == "records"
    }
    lines = [f"- `{variant}` on {task} ({model}) failed: {why}" for (model, variant, task), why in failed.items()]
    return "\n" + "\n".join(lines) + "\n" if lines else ""


@dataclass(frozen=True)
class Claim:
    """first / second, paired by seed, is said to lie within `low` to `high`."""

    text: str
    first: str
    second: str
    low: float
    high: float = math.inf


CLAIMS = (
    Claim("LoRA keeps 98–99.5% of full fine-tuning", "lora", "full", 0.98, 0.995),
    Claim("IA³ loses 2–3% against full fine-tuning", "ia3", "full", 0.97, 0.98),
    Claim("all-linear beats q,v", "lora", "lora-qv", 1.0),
    Claim("QLoRA's gap to LoRA is under 1%", "lora-nf4", "lora", 0.99),
    Claim("with int8 the gap is under 1%", "lora-int8", "lora", 0.99),
)


def claims_table(content: Content) -> str:
    """Each claim on each model and task: the two means, their paired ratio and difference, and what that allows."""
    found = groups(content)
    places = list(dict.fromkeys((key[0], key[2]) for key in found)) or [("", "")]
    rows = []
    for claim in CLAIMS:
        for model, task in places:
            first, second = (found.get((model, name, task)) for name in (claim.first, claim.second))
            ratio, difference = paired(first, second)
            rows.append(
                [
                    claim.text,
                    f"{model}, {task}" if model else "",
                    f"`{claim.first}` {_accuracy(first)}",
                    f"`{claim.second}` {_accuracy(second)}",
                    ratio.text() if ratio else "",
                    difference.text(sign=True) if difference else "",
                    verdict(claim, ratio) if ratio or difference is None else "no ratio to 0%",
                ]
            )
    head = ["claim", "where", "accuracy, %", "against, %", "ratio, %", "difference, points", "so"]
    return markdown(head, rows)


def verdict(claim: Claim, ratio: Estimate | None) -> str:
    """Whether all of the interval is within what is claimed, none of it, or some."""
    if ratio is None:
        return "not measured"
    if ratio.half is None:
        return "one seed: cannot tell"
    # "beats" is strict: a ratio of exactly 1 does not.
    if claim.low < ratio.low and ratio.high <= claim.high:
        return "yes"
    if ratio.high <= claim.low or ratio.low > claim.high:
        return "**no**"
    return "cannot tell"


# Figures
# --------------------------------------------------------------------------------------------------------------


def draw(content: Content, folder: Path) -> list[Path]:
    """Accuracy against trained parameters, and against skills kept; the files that were written."""
    from affina.catalog.methods import METHODS

    found = groups(content)
    if not found:
        return []
    folder.mkdir(parents=True, exist_ok=True)
    parameters: dict[str, list[Point]] = {}
    forgetting: dict[str, list[Point]] = {}
    for (model, variant, task), group in found.items():
        value, kept = estimate(list(group.accuracy.values())), estimate(list(group.kept.values()))
        assert value is not None
        style = METHODS[group.records[0]["method"]].kind.replace(" ", "-")
        panel = f"{task}, {model}"
        trained = group.records[0]["num_trainable"]
        parameters.setdefault(panel, []).append(Point(variant, trained, value.mean, value.low, value.high, style))
        if kept is not None:
            share = min(kept.mean, 1.0)
            forgetting.setdefault(panel, []).append(Point(variant, share, value.mean, value.low, value.high, style))
    accuracy = Axis("replies exactly right")
    drawings = {
        "methods_parameters.svg": (parameters, Axis("trained parameters", is_log=True)),
        "methods_skills.svg": (forgetting, Axis("the base's skills kept")),
    }
    written = []
    for name, (panels, x) in drawings.items():
        if panels:
            drawing = scatter(list(panels.items()), x=x, y=accuracy, colours=COLOURS)
            (folder / name).write_text(drawing, encoding="utf-8")
            written.append(folder / name)
    return written
