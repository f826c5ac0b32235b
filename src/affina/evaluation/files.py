"""The files of an evaluation inside a run directory, and the page that is made from a run's files.

evaluation/result.json     what `affina eval --json` prints
evaluation/samples.jsonl   every compared reply
evaluation/report.html     the report
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, TypeGuard

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from affina.catalog.methods import METHODS
from affina.catalog.renamed_settings import current_name, with_current_names
from affina.evaluation.compare import EvaluationResult
from affina.evaluation.report import Command, Fact, ReportData, config_rows, write_report
from affina.runs import atomic
from affina.runs.directory import RunDirectory
from affina.runs.units import format_bytes, format_seconds

RESULT_FILE = "result.json"
SAMPLES_FILE = "samples.jsonl"
REPORT_FILE = "report.html"


def save_result(run: RunDirectory, result: EvaluationResult) -> EvaluationResult:
    """Write result, replies and report; the result that is returned knows their paths."""
    folder = run.evaluation
    folder.mkdir(parents=True, exist_ok=True)
    samples_path = folder / SAMPLES_FILE if result.replies else None
    placed = result.with_files(
        run=str(run.path),
        report_path=str(folder / REPORT_FILE),
        samples_path=str(samples_path) if samples_path else None,
    )
    if samples_path is not None:
        lines = [json.dumps(reply.to_dict(), ensure_ascii=False) + "\n" for reply in placed.replies]
        atomic.write_text(samples_path, "".join(lines))
    else:
        (folder / SAMPLES_FILE).unlink(missing_ok=True)  # replies of an earlier evaluation do not belong to this one
    atomic.write_json(folder / RESULT_FILE, placed.to_dict())
    write_report(read_report_data(run), folder / REPORT_FILE)
    return placed


def read_report_data(run: RunDirectory) -> ReportData:
    """All that the run's files say; whatever is missing is left out of the page."""
    manifest = read_manifest(run)
    config = read_config(run)
    data_report = read_json(run.data / "report.json")
    return ReportData(
        title=run.name,
        subtitle=_when(manifest),
        status=run.status(),
        result=read_json(run.evaluation / RESULT_FILE) or None,
        metrics=list(run.metrics()),
        events=[*_data_findings(data_report, str(manifest.get("created") or "")), *run.events()],
        facts=_run_facts(run, manifest, config),
        data_facts=_data_facts(data_report),
        config=config_rows(
            config, {current_name(path): origin for path, origin in read_json(run.origins_file).items()}
        ),
        environment=_environment(manifest),
        commands=next_commands(run),
    )


def next_commands(run: RunDirectory) -> list[Command]:
    """What one does with a tuned model, or with a run that has none yet."""
    if not run.adapter.is_dir():
        return [Command(f"affina train --resume {run.path}", "Continue from the last checkpoint.")]
    merge = Command(
        f"affina merge {run.path} -o {run.name}-merged", "Write a model that needs no adapter, and check it."
    )
    method = METHODS.get(str(read_manifest(run).get("method") or "lora"))
    return [
        Command(f"affina chat {run.path}", "Talk to the tuned model; /base shows what its base would say."),
        *([merge] if method is not None and method.merges != "no" else []),
        Command("affina runs", "See all runs; name two to compare their settings and results."),
    ]


def read_json(path: Path) -> dict[str, Any]:
    """The mapping in a JSON file; empty when the file is absent, damaged or holds something else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def read_manifest(run: RunDirectory) -> dict[str, Any]:
    """The manifest; empty when it cannot be read."""
    return read_json(run.manifest_file)


def read_config(run: RunDirectory) -> dict[str, Any]:
    """The resolved config as plain values; empty when it is not there or not readable."""
    try:
        value = YAML(typ="safe", pure=True).load(run.config_file.read_text(encoding="utf-8"))
    except (OSError, YAMLError, UnicodeDecodeError):
        return {}
    return with_current_names(value) if isinstance(value, dict) else {}


def get(value: Mapping[str, Any], *keys: str) -> Any:
    """A value inside nested mappings, None where the path ends early."""
    current: Any = value
    for key in keys:
        if not isinstance(current, Mapping):
            return None
        current = current.get(key)
    return current


def method_name(config: Mapping[str, Any]) -> str | None:
    """`LoRA r16 on NF4`, in the words that people use."""
    method, rank = get(config, "adapter", "method"), get(config, "adapter", "rank")
    if method is None:
        return None
    text = {"lora": "LoRA", "rslora": "rsLoRA"}.get(str(method), str(method))
    text += f" r{rank}" if rank is not None else ""
    base = get(config, "quantization", "format")
    return f"{text} on {str(base).upper()}" if base not in (None, "none") else text


def last_metrics(run: RunDirectory) -> dict[str, Any]:
    """The last value of each metric: steps and validations are different lines."""
    values: dict[str, Any] = {}
    for line in run.metrics():
        values.update((key, value) for key, value in line.items() if value is not None)
    return values


def _when(manifest: Mapping[str, Any]) -> str:
    created = manifest.get("created")
    if not isinstance(created, str):
        return ""
    try:
        moment = datetime.fromisoformat(created.replace("Z", "+00:00"))
    except ValueError:
        return created
    return f"{moment.day} {moment:%B %Y, %H:%M} UTC"


def _run_facts(run: RunDirectory, manifest: Mapping[str, Any], config: Mapping[str, Any]) -> list[Fact]:
    """The run in a dozen figures: of the manifest when it ended, of the metrics as long as it has not."""
    last = last_metrics(run)
    training = manifest.get("training") or {}
    facts: list[Fact] = []

    def add(label: str, value: Any, note: str = "") -> None:
        if value not in (None, ""):
            facts.append(Fact(label, str(value), note))

    add("Base model", get(config, "model", "path") or manifest.get("model"), get(config, "model", "revision") or "")
    alpha = get(config, "adapter", "alpha")
    details = [f"α {alpha:g}" if _is_number(alpha) else "", _targets(get(config, "adapter", "targets"))]
    add("Method", method_name(config), ", ".join(detail for detail in details if detail))
    trainable, total = training.get("num_trainable"), training.get("num_parameters")
    if _is_number(trainable):
        share = f"{trainable / total:.2%} of the model's {total:,}" if _is_number(total) and total else ""
        add("Trainable parameters", f"{trainable:,}", share)
    steps, epoch = training.get("num_steps", last.get("step")), last.get("epoch")
    if _is_number(steps):
        add("Steps", f"{steps:,}", f"{epoch:.3g} epochs" if _is_number(epoch) else "")
    if _is_number(training.get("saved_step")) and training["saved_step"] != steps:
        add("Adapter of step", f"{training['saved_step']:,}", "the lowest validation loss")
    seconds = training.get("seconds", last.get("seconds"))
    if _is_number(seconds):
        add("Training time", format_seconds(seconds), "without loading, validation and evaluation")
    speed = training.get("tokens_per_second", last.get("tokens_per_second"))
    if _is_number(speed):
        add("Speed", f"{speed:,.0f} tokens/s", "without padding")
    memory = training.get("peak_memory_bytes", last.get("memory_bytes"))
    if _is_number(memory) and memory > 0:
        add("Peak memory", format_bytes(memory))
    add("Device", get(manifest, "environment", "device"))
    error = manifest.get("error")
    if isinstance(error, Mapping):
        add("Error", error.get("what"), str(error.get("fix") or ""))
    return facts


def _is_number(value: Any) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _targets(targets: Any) -> str:
    if targets == "all-linear":
        return "all linear layers"
    return ", ".join(map(str, targets)) if isinstance(targets, list) else ""


def _data_facts(report: Mapping[str, Any]) -> list[Fact]:
    """What `affina data` reported when the run was prepared (data/report.json), in a few figures."""
    facts: list[Fact] = []
    for side, label in (("train", "Training samples"), ("validation", "Validation samples")):
        lengths = report.get(side)
        if isinstance(lengths, Mapping) and lengths.get("num_samples"):
            facts.append(Fact(label, f"{lengths['num_samples']:,}", f"{lengths.get('num_tokens', 0):,} tokens"))
    train = report.get("train")
    if isinstance(train, Mapping) and train.get("num_samples"):
        percentiles = " · ".join(f"{train[name]:,}" for name in ("p50", "p95", "p99", "max") if name in train)
        facts.append(Fact("Length in tokens", percentiles, "p50 · p95 · p99 · longest"))
        facts.append(Fact("Supervised", f"{train.get('supervised_share', 0.0):.1%}", "of the training tokens"))
    packing = report.get("packing")
    if isinstance(packing, Mapping):
        padded = f"padded batches: {packing['padded_efficiency']:.1%}" if packing.get("is_packed") else "not packed"
        facts.append(Fact("Rows filled", f"{packing['efficiency']:.1%}", padded))
    left_out = sum(
        value
        for value in (
            report.get("num_records_skipped"),
            report.get("num_duplicates_removed"),
            get(report, "counts", "dropped_too_long"),
            get(report, "counts", "dropped_without_labels"),
        )
        if _is_number(value)
    )
    if report:
        facts.append(Fact("Left out", f"{left_out:,}", "damaged, repeated, too long or without a reply"))
    exact, near = (get(report, "duplicates", f"num_{kind}_duplicates") for kind in ("exact", "near"))
    if _is_number(exact) and _is_number(near) and near:
        # The exact ones are among the near ones.
        facts.append(Fact("Repeated", f"{near:,}", f"{exact:,} exactly, {near - exact:,} nearly"))
    conflicts = get(report, "duplicates", "num_conflicts")
    if _is_number(conflicts) and conflicts:
        facts.append(Fact("Contradictions", f"{conflicts:,}", "prompts with different replies"))
    leaked = get(report, "leakage", "leaked_share")
    if _is_number(leaked):
        facts.append(Fact("Leakage", f"{leaked:.1%}" if leaked else "none", "validation records also in training"))
    hits = report.get("pii")
    if isinstance(hits, Mapping) and any(hits.values()):
        kinds = ", ".join(f"{kind} {number:,}" for kind, number in hits.items() if number)
        facts.append(Fact("Personal data", f"{sum(hits.values()):,} hits", kinds))
    return facts


def _data_findings(report: Mapping[str, Any], time: str) -> list[dict[str, Any]]:
    """The findings of the data report as events of the moment when the run was prepared."""
    return [
        {
            "time": time,
            "kind": f"data: {finding.get('code', 'finding')}",
            "message": finding.get("what", ""),
            "fix": finding.get("fix"),
            "severity": "info" if finding.get("level") == "note" else finding.get("level"),
        }
        for finding in report.get("findings") or ()
        if isinstance(finding, Mapping)
    ]


def _environment(manifest: Mapping[str, Any]) -> list[Fact]:
    environment = manifest.get("environment")
    if not isinstance(environment, Mapping):
        return []
    facts = [Fact("affina", str(manifest["affina"]))] if manifest.get("affina") else []
    names = {"python": "Python", "platform": "System", "num_threads": "Threads", "device": "Device"}
    facts += [
        Fact(names.get(str(name), str(name)), str(value)) for name, value in environment.items() if value is not None
    ]
    return facts
