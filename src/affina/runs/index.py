"""Runs side by side: a line for each, and the difference between two."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from affina.catalog.renamed_settings import with_current_names
from affina.runs.directory import RunDirectory, Status


@dataclass(frozen=True, slots=True)
class RunSummary:
    """One line of `affina runs`. Losses are the objective's own (of sft: nats per supervised token); accuracies are
    shares."""

    name: str
    path: Path
    created: str | None
    status: Status
    model: str | None
    method: str | None
    num_steps: int | None
    seconds: float | None
    final_loss: float | None
    validation_loss: float | None
    base_accuracy: float | None
    tuned_accuracy: float | None
    base_perplexity: float | None
    tuned_perplexity: float | None

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "path": str(self.path)}


@dataclass(frozen=True, slots=True)
class RunComparison:
    """Two runs: `settings` has only the keys whose values differ, as (first, second)."""

    first: RunSummary
    second: RunSummary
    settings: dict[str, tuple[Any, Any]]
    same_data: bool

    def to_dict(self) -> dict[str, Any]:
        return {
            "first": self.first.to_dict(),
            "second": self.second.to_dict(),
            "settings": {key: list(values) for key, values in self.settings.items()},
            "same_data": self.same_data,
        }


def summarize(run: RunDirectory) -> RunSummary:
    """What the manifest, the metrics and the evaluation say, of a finished run, one that is under way, or one whose
    manifest is damaged."""
    status = run.status()
    manifest = run.read_manifest() if status != "damaged" else {}
    training = manifest.get("training") or {}
    evaluation = read_evaluation(run)
    base, tuned = evaluation.get("base") or {}, evaluation.get("tuned") or {}
    last_step: dict[str, Any] = {}
    best_loss: float | None = training.get("best_validation_loss")
    for record in run.metrics():
        if record.get("validation_loss") is not None:
            best_loss = (
                min(best_loss, record["validation_loss"]) if best_loss is not None else record["validation_loss"]
            )
        elif "loss" in record:
            last_step = record
    return RunSummary(
        name=run.name,
        path=run.path,
        created=manifest.get("created"),
        status=status,
        model=manifest.get("model"),
        method=_method(manifest),
        num_steps=training.get("num_steps", last_step.get("step")),
        seconds=training.get("seconds", last_step.get("seconds")),
        final_loss=training.get("final_loss", last_step.get("loss")),
        validation_loss=best_loss,
        base_accuracy=base.get("accuracy"),
        tuned_accuracy=tuned.get("accuracy"),
        base_perplexity=base.get("perplexity"),
        tuned_perplexity=tuned.get("perplexity"),
    )


def _method(manifest: dict[str, Any]) -> str | None:
    method = manifest.get("method")
    if method is None:
        return None
    if manifest.get("quantization") not in (None, "none"):
        method = f"{method} on {manifest['quantization']}"
    objective = manifest.get("objective", "sft")
    return str(method) if objective == "sft" else f"{method}, {objective}"


def read_evaluation(run: RunDirectory) -> dict[str, Any]:
    """evaluation/result.json, or an empty mapping when there is none."""
    try:
        result: dict[str, Any] = json.loads((run.evaluation / "result.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return result


def compare(first: RunDirectory, second: RunDirectory) -> RunComparison:
    """The settings in which two runs differ, and both summaries."""
    left, right = dict(_flat_config(first)), dict(_flat_config(second))
    # Where a run is stored differs always and says nothing.
    keys = [key for key in sorted(left.keys() | right.keys()) if not key.startswith("output.")]
    fingerprints = [run.read_manifest().get("data_fingerprint") for run in (first, second)]
    return RunComparison(
        first=summarize(first),
        second=summarize(second),
        settings={key: (left.get(key), right.get(key)) for key in keys if left.get(key) != right.get(key)},
        same_data=fingerprints[0] is not None and fingerprints[0] == fingerprints[1],
    )


def _flat_config(run: RunDirectory) -> Iterator[tuple[str, Any]]:
    """`training.epochs` → 3 … from config.yaml, without needing the schema it was written with."""
    if not run.config_file.is_file():
        return
    config = YAML(typ="safe", pure=True).load(run.config_file.read_text(encoding="utf-8")) or {}
    yield from _flatten(with_current_names(config), "")


def _flatten(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _flatten(inner, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list) and value and isinstance(value[0], dict):
        for index, inner in enumerate(value):
            yield from _flatten(inner, f"{path}[{index}]")
    else:
        yield path, value
