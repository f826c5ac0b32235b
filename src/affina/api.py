"""One function per verb: what the command line, notebooks and later the studio call.

    import affina

    result = affina.train("run.yaml")
    print(affina.evaluate(result.run).verdict)

This is the only module with imports inside functions for the sake of start-up time: torch, transformers and datasets
are loaded when a verb needs them. Values go from one package to the next here; the packages do not know each other.
"""

from __future__ import annotations

import contextlib
import json
import shlex
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from affina.config import Note, ResolvedConfig, load_config, load_mapping, load_stored_config
from affina.config.derive import with_value
from affina.config.objectives import OBJECTIVES
from affina.config.places import place_error
from affina.config.resolved import differences, has_influence, leaves
from affina.errors import AffinaError, ConfigError, DataError, ModelError, RunError
from affina.runs import atomic
from affina.runs.checkpoints import Checkpoint, latest_checkpoint, list_checkpoints
from affina.runs.directory import (
    RunDirectory,
    create_run,
    default_name,
    ended_before_first_step,
    now,
    open_run,
    process_identity,
    starts_from_beginning,
)
from affina.runs.directory import list_runs as find_runs
from affina.training.callbacks import BaseCallback, Observers, RunFiles

if TYPE_CHECKING:
    from affina.catalog.method_table import MethodTable
    from affina.config.schema import RunConfig
    from affina.data.prepare import PreparedData
    from affina.data.report import DataReport
    from affina.data.run_data import RunData
    from affina.data.samples import Sample
    from affina.data.tokenizer import LoadedTokenizer
    from affina.evaluation.chat import ChatSession
    from affina.evaluation.compare import EvaluationResult
    from affina.evaluation.perplexity import Progress
    from affina.export.merge import MergeReport
    from affina.export.quantize import QuantizeReport
    from affina.models.build import LoadedModel
    from affina.planning.admission import Device
    from affina.planning.forecast import Forecast
    from affina.planning.plan import CardPlan
    from affina.planning.recommend import Recommendation
    from affina.planning.workload import Workload
    from affina.runs.index import RunComparison, RunSummary
    from affina.training.callbacks import Callback, RunFacts
    from affina.training.run import TrainingOutcome

ConfigLike = str | Path | Mapping[str, Any] | ResolvedConfig | None
RunLike = str | Path | RunDirectory


@dataclass(frozen=True, slots=True)
class TrainResult:
    """What a training run left behind.

    run:               the run directory
    method:            how it was trained: lora, …
    adapter:           the adapter's folder, loadable by PEFT; None while the run is interrupted
    status:            finished or interrupted
    seconds:           of training alone, without loading, validation and evaluation
    tokens_per_second: tokens of samples (no padding) per second of training
    planned_memory_bytes: what the peak was foreseen to be; None on a CPU, where the whole process is measured
    planned_step_seconds: what a step was foreseen to take; None on a CPU, whose speed no catalog knows
    evaluation:        base against tuned, None when it was switched off or there is no validation set
    objective:         what was learnt: sft, dpo, …
    """

    run: Path
    method: str
    adapter: Path | None
    status: str
    stop_reason: str
    steps: int
    seconds: float
    tokens_per_second: float
    num_tokens: int
    final_loss: float | None
    best_validation_loss: float | None
    best_step: int | None
    saved_step: int
    num_skipped_steps: int
    peak_memory_bytes: int
    planned_memory_bytes: int | None
    num_trainable: int
    num_parameters: int
    evaluation: EvaluationResult | None
    report: Path | None
    objective: str = "sft"
    planned_step_seconds: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; `evaluation` has the shape of `affina eval --json`."""
        values = {name: getattr(self, name) for name in self.__slots__ if name != "evaluation"}
        values["evaluation"] = self.evaluation.to_dict() if self.evaluation is not None else None
        return {key: str(value) if isinstance(value, Path) else value for key, value in values.items()}


def check(config: ConfigLike = None, *, overrides: Sequence[str] = (), preset: str | None = None) -> ResolvedConfig:
    """The complete, valid config with the origin of every value. Loads nothing and needs no torch.

    Raises AffinaErrors with every mistake of the file.
    """
    return _load(config, overrides=overrides, preset=preset)


def _load(
    config: ConfigLike, *, overrides: Sequence[str], preset: str | None, with_rules: bool = True
) -> ResolvedConfig:
    if isinstance(config, ResolvedConfig):
        return config
    if isinstance(config, Mapping):
        return load_mapping(dict(config), overrides=overrides, preset=preset, with_rules=with_rules)
    return load_config(Path(config) if config is not None else None, overrides, preset, with_rules=with_rules)


def methods(model: str | None = None) -> MethodTable:
    """What each adapter method can do, and, for a model, how large it becomes. Loads nothing and needs no torch.

    model: a folder, affina/nano, or a hub id whose sizes are known

    Raises ModelError `shape-unknown`, and those of a config.json that is missing, damaged or incomplete.
    """
    from affina.catalog.method_table import method_table

    return method_table(model)


def prepare(config: ConfigLike = None, *, overrides: Sequence[str] = (), preset: str | None = None) -> PreparedData:
    """Read, check, split, render and tokenise the data of a config, from the cache where nothing has changed."""
    from affina.data.build import prepare_from_config

    resolved = check(config, overrides=overrides, preset=preset)
    with _placed_errors(resolved):
        return prepare_from_config(resolved.config)


def inspect_data(config: ConfigLike = None, *, overrides: Sequence[str] = (), preset: str | None = None) -> DataReport:
    """What `affina data` shows: lengths, masks, truncation, duplicates, conflicts, leakage, personal data."""
    return prepare(config, overrides=overrides, preset=preset).report


def train(
    config: ConfigLike = None,
    *,
    overrides: Sequence[str] = (),
    preset: str | None = None,
    resume: str | Path | bool | None = None,
    callbacks: Sequence[Callback] = (),
    progress: Progress | None = None,
) -> TrainResult:
    """Prepare, train, evaluate and save. Without a config: the preset `laptop`, which needs neither GPU nor hub.

    resume:   a run directory or one of its checkpoints to continue; True continues the run named by output.name. A run
              that ended before its first checkpoint starts again from step 0, in the same directory
    progress: called with a stage of the evaluation, and how much of it is done and there is

    Raises AffinaError; what was saved before an error stays and can be resumed.
    """
    checkpoint: Checkpoint | None = None
    before: Mapping[str, Any] = {}
    if resume:
        run, checkpoint = _find_checkpoint(resume, config, overrides=overrides, preset=preset)
        resolved = _resume_config(run, config, overrides=overrides, preset=preset)
        # A killed process has left "running", which would hold for this process from the next line on.
        before = {**run.read_manifest(), "status": run.status()}
        atomic.remove_leftovers(run.path)
    else:
        resolved = check(config, overrides=overrides, preset=preset)
        with _placed_errors(resolved):
            run = create_run(
                Path(resolved.config.output.directory).expanduser(),
                resolved.config.output.name or default_name(_config_stem(config, preset)),
            )
    settings = resolved.config
    run.update_manifest(
        {
            **({} if resume else {"created": now(), "name": run.name}),
            **({} if checkpoint else {"affina": _version()}),
            "status": "running",
            "error": None,
            "command": shlex.join(["affina", *sys.argv[1:]]) if sys.argv and "affina" in sys.argv[0] else None,
            "config_hash": resolved.hash(),
            "model": settings.model.path,
            "method": settings.adapter.method,
            "objective": settings.training.objective,
            "quantization": settings.quantization.format,
            **process_identity(),
        }
    )
    started = time.monotonic()
    status: Literal["interrupted", "finished"] | None = None  # None while training has not ended
    first_step = _FirstStep()
    try:
        with _placed_errors(resolved):
            if not resume:
                _write_config(run, resolved)
            _check_model(settings)
            tokenizer, data = _tokenizer_and_data(settings, before.get("template"))
            _record_data(run, data, is_resumed=bool(resume))
            announcements = _announcements(resolved, checkpoint) if resume else []
            if checkpoint is not None:
                settings = _as_cut(settings, run)
            else:
                settings, sentences = _cut_to_fit(settings, run, data)
                announcements += sentences
            planned = _admit(settings, run, data)
            loaded, outcome = _train_model(
                settings, run, data, tokenizer, checkpoint, (first_step, *callbacks), announcements
            )
        status = "interrupted" if outcome.stop_reason == "interrupted" else "finished"
        if planned is not None:
            _record_measured(run, planned, loaded, outcome)
        run.update_manifest(
            {"status": status, "training": asdict(outcome), "wall_seconds": round(time.monotonic() - started, 1)}
        )
        evaluation = None
        if status == "finished" and settings.evaluation.enabled and len(data.validation):
            evaluation = _evaluate_loaded(run, settings, data, tokenizer, loaded, progress)
    except BaseException as error:
        # A run that had failed and has nothing to lose is told with its newest error.
        is_untouched = not first_step.is_reached and (checkpoint is not None or before.get("status") != "failed")
        _record_failure(run, error, after_training=status, before=before if is_untouched else None)
        raise
    return TrainResult(
        run=run.path,
        method=settings.adapter.method,
        adapter=run.adapter if status == "finished" else None,
        status=status,
        stop_reason=outcome.stop_reason,
        steps=outcome.num_steps,
        seconds=outcome.seconds,
        tokens_per_second=outcome.tokens_per_second,
        num_tokens=outcome.num_tokens,
        final_loss=outcome.final_loss,
        best_validation_loss=outcome.best_validation_loss,
        best_step=outcome.best_step,
        saved_step=outcome.saved_step,
        num_skipped_steps=outcome.num_skipped,
        peak_memory_bytes=outcome.peak_memory_bytes,
        planned_memory_bytes=planned.memory.allocated_bytes if planned and loaded.device.type == "cuda" else None,
        num_trainable=outcome.num_trainable,
        num_parameters=outcome.num_parameters,
        evaluation=evaluation,
        report=run.evaluation / "report.html" if evaluation is not None else None,
        objective=settings.training.objective,
        planned_step_seconds=planned.step.step_seconds if planned and planned.step else None,
    )


class _FirstStep(BaseCallback):
    """Knows whether training came as far as its first step: from there on the run's files are others."""

    def __init__(self) -> None:
        self.is_reached = False

    def on_start(self, facts: RunFacts) -> None:
        self.is_reached = True


@contextlib.contextmanager
def _placed_errors(resolved: ResolvedConfig) -> Iterator[None]:
    """Errors about a setting leave the block with the file and line, or the override, that has set it."""
    try:
        yield
    except AffinaError as error:
        place_error(error, resolved)
        raise


def _announcements(resolved: ResolvedConfig, checkpoint: Checkpoint | None) -> list[tuple[str, str]]:
    """What to say, as kind and sentence, when a run is taken up again."""
    notes = [("note", f"{note.what}: {note.why}") for note in resolved.warnings]
    return notes if checkpoint else [("restarted", "no checkpoint yet: starts from the beginning"), *notes]


def _record_failure(
    run: RunDirectory, error: BaseException, *, after_training: str | None, before: Mapping[str, Any] | None
) -> None:
    """Leave in the run how it ended. Where the disk refuses that too, the error itself is what is told.

    after_training: how training ended: a failed comparison afterwards does not undo it; None: it has not ended
    before:         the manifest of the run that should be continued, as long as nothing of that run has changed
    """
    failure: Mapping[str, Any] | None = {"code": "unexpected", "what": repr(error)}
    if isinstance(error, AffinaError):
        failure = error.to_dict()
    elif isinstance(error, KeyboardInterrupt):
        failure = None
    with contextlib.suppress(OSError):
        if failure is not None:
            kind = "failed" if after_training is None else "evaluation-failed"
            run.log_event(kind, str(failure["what"]), code=failure["code"])
        if after_training is not None:
            return
        if before:
            run.update_manifest({"status": before["status"], "error": before.get("error")})
        else:
            run.update_manifest({"status": "interrupted" if failure is None else "failed", "error": failure})


def _check_model(settings: RunConfig) -> None:
    """Before the data is prepared, which may take long: is there such a model and such a device?"""
    from affina.models.build import check_before_data

    check_before_data(settings)


def _admit(settings: RunConfig, run: RunDirectory, data: RunData) -> CardPlan | None:
    """The plan of the run, kept in its manifest. Raises TrainingError `memory-too-small` before weights are loaded."""
    from affina.planning.admission import admit, planned_record

    plan = admit(settings, _workload(settings, data), _device(settings))
    if plan is not None:
        run.update_manifest({"plan": planned_record(plan)})
    return plan


def _cut_to_fit(settings: RunConfig, run: RunDirectory, data: RunData) -> tuple[RunConfig, list[tuple[str, str]]]:
    """The settings with micro-batches that fit, where the device holds none as large as the config says; what to say.

    config.yaml stays what the user has written. The cut is in the manifest, for whoever continues the run.
    """
    from affina.planning.admission import cut_to_fit

    changes = cut_to_fit(settings, _workload(settings, data), _device(settings))
    if changes or run.read_manifest().get("cut"):  # of an attempt that ended before its first checkpoint
        run.update_manifest({"cut": {change.path: change.value for change in changes}})
    if not changes:
        return settings, []
    cut = _as_cut(settings, run)
    before, now = settings.training, cut.training
    sentence = (
        f"a micro-batch of {before.micro_batch_size} rows does not fit into the device's memory: the rows of a step "
        f"are {now.gradient_accumulation_steps} × {now.micro_batch_size} instead of "
        f"{before.gradient_accumulation_steps} × {before.micro_batch_size}"
    )
    return cut, [("micro-batch-cut", sentence)]


def _as_cut(settings: RunConfig, run: RunDirectory) -> RunConfig:
    """The settings with the micro-batches that a run was cut to when it began."""
    for path, value in (run.read_manifest().get("cut") or {}).items():
        settings = with_value(settings, path, value)
    return settings


def _workload(settings: RunConfig, data: RunData) -> Workload:
    from affina.planning.workload import estimated_workload, measured_workload

    if data.train is None:
        return estimated_workload(settings)
    return measured_workload(
        settings, data.train.lengths, data.train.num_supervised, num_validation=len(data.validation)
    )


def _device(settings: RunConfig) -> Device:
    from affina.models.device import device_memory
    from affina.planning.admission import Device

    memory = device_memory(settings.training.device)
    return Device(memory.name, memory.capability, memory.total_bytes, memory.free_bytes, memory.is_capped)


def _record_measured(run: RunDirectory, plan: CardPlan, loaded: LoadedModel, outcome: TrainingOutcome) -> None:
    """What became of the plan; this machine's coefficients learn from it."""
    from affina.models.fast import fast_engine_of
    from affina.planning.admission import measured_record

    engine = "reference" if fast_engine_of(loaded.model) is None else "fast"
    measured = measured_record(
        plan,
        engine=engine,
        peak_bytes=outcome.peak_memory_bytes if loaded.device.type == "cuda" else None,
        training_seconds=outcome.seconds,
        num_steps=outcome.num_steps,
    )
    run.update_manifest({"measured": measured})


def _train_model(
    settings: RunConfig,
    run: RunDirectory,
    data: RunData,
    tokenizer: LoadedTokenizer,
    checkpoint: Checkpoint | None,
    callbacks: Sequence[Callback],
    announcements: Sequence[tuple[str, str]],
) -> tuple[LoadedModel, TrainingOutcome]:
    import torch

    from affina.models.build import load_for_training
    from affina.training.run import describe_environment, out_of_memory, run_training

    try:
        loaded = load_for_training(settings)
    except torch.OutOfMemoryError as error:  # another process took what was free, or what is not counted needs more
        raise out_of_memory(settings, error, "while the model was loaded") from error
    run.update_manifest({"environment": describe_environment(loaded.device_name), "base": loaded.identity})
    observers = Observers([RunFiles(run), *callbacks])
    for kind, message in announcements:
        observers.event(kind, message)
    return loaded, run_training(settings, run, data, tokenizer, loaded, checkpoint=checkpoint, callbacks=callbacks)


def evaluate(
    run: RunLike,
    *,
    max_records: int | None = None,
    max_generations: int | None = None,
    progress: Progress | None = None,
) -> EvaluationResult:
    """Base against adapter on the run's validation records; writes evaluation/ with the HTML report.

    progress: called with a stage, and how much of it is done and there is

    Raises RunError when the run has no adapter and when other records would be held out now, EvaluationError when there
    are no validation records.
    """
    directory = _finished_run(run)  # before torch is imported: a mistyped name is told at once
    from affina.models.build import load_for_inference

    resolved = _run_config(directory)
    settings = _as_cut(resolved.config, directory)
    _require_writer(directory, settings, "compared with its base by replies")
    changes = {"max_records": max_records, "max_generations": max_generations}
    given = {key: value for key, value in changes.items() if value is not None}
    if given:
        settings = settings.model_copy(update={"evaluation": settings.evaluation.model_copy(update=given)})
    with _placed_errors(resolved):
        tokenizer, data = _tokenizer_and_data(settings, _saved_contract(directory))
        notes = _check_validation(directory, settings, data)
        loaded = load_for_inference(settings, directory.adapter)
    return _evaluate_loaded(directory, settings, data, tokenizer, loaded, progress, notes)


def merge(run: RunLike, output: str | Path, *, dtype: str = "bfloat16") -> MergeReport:
    """Write base + adapter as one plain transformers model into `output`, and verify its logits before returning."""
    directory = _finished_run(run)
    from affina.data.build import template_from_config
    from affina.export.build import merge_run

    resolved = _run_config(directory)
    _require_writer(directory, resolved.config, "merged into a language model")
    with _placed_errors(resolved):
        _check_template(directory, template_from_config(resolved.config).contract())
        return merge_run(directory, resolved.config, Path(output), dtype=dtype)


def quantize(
    model: str,
    output: str | Path,
    *,
    format: Literal["nf4", "fp4", "int8", "fp8"] = "nf4",
    double_quantization: bool | None = None,
    scale_search: bool = False,
    skip_modules: Sequence[str] | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    device: str = "auto",
    report: bool = True,
    text: str | Path | None = None,
    max_records: int = 64,
    progress: Progress | None = None,
) -> QuantizeReport:
    """Write `model` with its linear layers in a weight format into `output`, and prove it by loading it again.

    double_quantization, scale_search, skip_modules: as in the section `quantization` of a config
    report:      measure the error of each layer, and the divergence of the predictions from the unquantised model's
    text:        what the divergence is measured on: a data file of any format, or a run, whose validation data are
                 taken; None: the built-in data set's validation conversations
    max_records: records of the text that are used, drawn at random with a fixed seed

    Raises AffinaError before anything is written for what cannot be quantised, written or read as text.
    """
    from affina.evaluation.quantization import measure_quantization
    from affina.export.quantize import quantize as write_quantized
    from affina.models.build import weight_format
    from affina.models.device import choose_device

    if (Path(model) / "config.yaml").is_file():
        raise ModelError(
            "model-not-found",
            f"{model} is a run, not a model",
            why="a run holds an adapter; quantising belongs after merging it",
            fix=f"run `affina merge {model} -o merged`, then `affina quantize merged -o {output}`",
        )
    given = {
        "double_quantization": double_quantization,
        "scale_search": scale_search or None,
        "skip_modules": skip_modules,
    }
    settings: dict[str, Any] = {
        "model": {"path": model, "revision": revision, "trust_remote_code": trust_remote_code},
        "quantization": {"format": format, **{key: value for key, value in given.items() if value is not None}},
        "training": {"device": device},
    }
    resolved = load_mapping(settings)
    config = resolved.config
    options = weight_format(config)
    if options is None:
        raise ConfigError(
            "unknown-value",
            f'format is "{format}"; it takes one of nf4, fp4, int8, fp8',
            fix="to use the model as it is, write its path as `model:`",
        )
    measure = None
    if report:
        samples, name, notes = _held_out_text(settings, text, max_records)

        def measure(quantized: Any, folder: Path) -> dict[str, Any]:
            errors = measure_quantization(
                quantized,
                folder,
                samples,
                text=name,
                trust_remote_code=trust_remote_code,
                notes=notes,
                **({"progress": progress} if progress is not None else {}),
            )
            return errors.to_dict()

    written = write_quantized(
        config.model.path,
        output,
        options,
        revision=revision,
        trust_remote_code=trust_remote_code,
        device=choose_device(device),
        measure=measure,
    )
    said = [f"{note.what}: {note.why}" for note in resolved.warnings if note.path.startswith("quantization.")]
    return replace(written, notes=(*said, *written.notes))


def _held_out_text(
    settings: Mapping[str, Any], text: str | Path | None, max_records: int
) -> tuple[list[Sample], str, list[str]]:
    """Samples to compare two models on, what they are, and what to say when there are none."""
    from affina.data.build import tokenizer_from_config
    from affina.data.run_data import open_run_data
    from affina.evaluation.build import draw_samples

    is_run = text is not None and (Path(text) / "config.yaml").is_file()
    if is_run:
        run = _open(str(text))
        stored = _run_config(run).config
        config = stored.model_copy(update={"model": load_mapping(dict(settings)).config.model})
    else:
        built_in = {
            "train": "affina/support",
            "validation": [{"path": "affina/support", "split": "validation"}],
            "max_length": 512,
            "truncation": "truncate",
        }
        own = {"train": str(text), "validation_fraction": 0.0, "max_length": 512, "truncation": "split"}
        config = load_mapping({**settings, "data": built_in if text is None else own}).config
    try:
        tokenizer = tokenizer_from_config(config.model)
    except AffinaError:
        if text is not None:
            raise
        return [], "", ["the divergence was not measured: the model has no tokenizer"]
    if text is None and not tokenizer.has_template:
        return (
            [],
            "",
            [
                "the divergence was not measured: the built-in text is conversations and this tokenizer has no chat "
                "template; give a text with --text FILE"
            ],
        )
    data = open_run_data(config, tokenizer)
    store = data.validation if is_run or text is None else data.train
    name = f"the validation data of {text}" if is_run else str(text) if text is not None else "affina/support"
    if store is None or not len(store):
        raise DataError(
            "text-empty",
            f"{name} has no records to measure on",
            fix="give a file with text or conversations, or a run that has validation data",
        )
    return draw_samples(store, max_records, seed=0), name, []


def open_chat(run: RunLike) -> ChatSession:
    """A conversation with a run's model; the base can answer the same prompts for comparison."""
    directory = _finished_run(run)
    from affina.data.build import template_from_config, tokenizer_from_config
    from affina.evaluation.build import open_chat_session
    from affina.models.adapters import read_adapter_info
    from affina.models.build import load_for_inference

    resolved = _run_config(directory)
    settings = resolved.config
    _require_writer(directory, settings, "asked to chat")
    with _placed_errors(resolved):
        tokenizer = tokenizer_from_config(settings.model)
        template = template_from_config(settings, tokenizer)
        _check_template(directory, template.contract())
        loaded = load_for_inference(settings, directory.adapter)
    contract = read_adapter_info(directory.adapter).contract or {}
    return open_chat_session(
        settings,
        tokenizer,
        template,
        loaded,
        enable_thinking=contract.get("enable_thinking"),
        run=directory.name,
    )


def list_runs(directory: str | Path = "runs") -> list[RunSummary]:
    """The runs in a folder, oldest first."""
    from affina.runs.index import summarize

    return [summarize(run) for run in find_runs(Path(directory))]


def compare_runs(first: RunLike, second: RunLike) -> RunComparison:
    """The settings in which two runs differ, and their results side by side."""
    from affina.runs.index import compare

    return compare(_open(first), _open(second))


def _evaluate_loaded(
    run: RunDirectory,
    settings: RunConfig,
    data: RunData,
    tokenizer: LoadedTokenizer,
    loaded: LoadedModel,
    progress: Progress | None,
    notes: Sequence[str] = (),
) -> EvaluationResult:
    from affina.evaluation.build import evaluate_run
    from affina.evaluation.perplexity import no_progress

    return evaluate_run(run, settings, data, tokenizer, loaded, progress=progress or no_progress, notes=notes)


def _check_validation(run: RunDirectory, settings: RunConfig, data: RunData) -> list[str]:
    """Refuse validation records that the run may have been trained on; what to know about other changes."""
    if data.report is None or not (run.data / "splits.json").is_file():
        return []
    stored = json.loads((run.data / "splits.json").read_text(encoding="utf-8"))
    if stored.get("validation") == data.report.split.get("validation"):
        return []
    if settings.data.validation:
        return ["the validation set has changed since the run was trained"]
    raise RunError(
        "validation-changed",
        f"the data of {run.path} has changed, and other records would be held out now than when it was trained",
        why="some of them were trained on: the adapter would look better than it is",
        fix="put the data back as it was, or start a new run",
    )


def _tokenizer_and_data(
    settings: RunConfig, contract: Mapping[str, Any] | None = None
) -> tuple[LoadedTokenizer, RunData]:
    """Tokenizer and data of a config. `contract`: what the run was trained with, which both must still be.

    The template is compared before the data is read: with another one its records may not even be readable.
    """
    from affina.data.build import template_from_config, tokenizer_from_config
    from affina.data.run_data import open_run_data
    from affina.data.templates import check_contract

    tokenizer = tokenizer_from_config(settings.model)
    if contract is not None:
        check_contract(contract, template_from_config(settings, tokenizer).contract())
    return tokenizer, open_run_data(settings, tokenizer)


def _saved_contract(run: RunDirectory) -> Mapping[str, Any] | None:
    from affina.models.adapters import read_adapter_info

    return read_adapter_info(run.adapter).contract


def _check_template(run: RunDirectory, contract: Mapping[str, Any]) -> None:
    """Refuse to use an adapter under another template than it was trained with."""
    from affina.data.templates import check_contract

    saved = _saved_contract(run)
    if saved is not None:
        check_contract(saved, contract)


def _version() -> str:
    from affina import __version__

    return __version__


def _open(run: RunLike) -> RunDirectory:
    return run if isinstance(run, RunDirectory) else open_run(Path(run))


def _finished_run(run: RunLike) -> RunDirectory:
    """A run that has an adapter. Raises RunError `run-unfinished` otherwise."""
    directory = _open(run)
    if not (directory.adapter / "adapter_config.json").is_file():
        status = directory.status()
        failure = directory.read_manifest().get("error") if status == "failed" else None
        raise RunError(
            "run-unfinished",
            f"{directory.path} has no adapter yet (its status is {status})",
            why=f"it failed: {failure['what']}" if failure else None,
            fix=_way_to_an_adapter(directory, status),
        )
    return directory


def _require_writer(run: RunDirectory, settings: RunConfig, what: str) -> None:
    """Refuse a reward run where replies are wanted."""
    if OBJECTIVES[settings.training.objective].can_write:
        return
    raise RunError(
        "reward-run",
        f"{run.path} is a reward model: it cannot be {what}",
        why="it gives a conversation a score, and writes nothing",
        fix=f"score with it: PEFT loads {run.adapter} onto transformers' AutoModelForSequenceClassification "
        "(docs/guides/preferences.md)",
    )


def _way_to_an_adapter(run: RunDirectory, status: str) -> str:
    if status == "running":
        return "wait until it is done"
    if not starts_from_beginning(run):
        return f"continue it with `affina train --resume {run.path}`"
    if status == "failed" and ended_before_first_step(run):
        with_its_own = f"`affina train --resume {run.path}` with its own config"
        return f"correct that and start it again: `affina train`, or {with_its_own}"
    return f"it has no checkpoint yet: `affina train --resume {run.path}` starts it from the beginning"


def _run_config(run: RunDirectory, overrides: Sequence[str] = ()) -> ResolvedConfig:
    """The config that a run was started with, each value with its line in the run's own config.yaml."""
    if not run.config_file.is_file():
        raise RunError(
            "run-unreadable",
            f"{run.path} has no {run.config_file.name}",
            why="base model, data and settings of the run are in it",
            fix="restore it, or name another run (`affina runs` lists them); adapter/ still loads with PEFT alone",
        )
    return load_stored_config(run.config_file, overrides=overrides)


def _config_stem(config: ConfigLike, preset: str | None) -> str:
    if isinstance(config, str | Path):
        return Path(config).stem
    return preset or ("laptop" if config is None else "run")


def _write_config(run: RunDirectory, resolved: ResolvedConfig) -> None:
    atomic.write_text(run.config_file, resolved.to_yaml())
    atomic.write_json(run.origins_file, resolved.origins_to_dict())


def _record_data(run: RunDirectory, data: RunData, *, is_resumed: bool) -> None:
    """Store what was trained on; a resumed run must find the same."""
    if is_resumed:
        before = run.read_manifest().get("data_fingerprint")
        if before is not None and before != data.fingerprint:
            raise RunError(
                "resume-data-changed",
                f"the data of {run.path} is not what it was when the run began",
                why="other records, another tokenizer or another template would continue a different run",
                fix="put the data back as it was, or start a new run",
            )
    run.update_manifest({"data_fingerprint": data.fingerprint, "template": data.contract})
    if data.report is not None:
        atomic.write_json(run.data / "report.json", data.report.to_dict())
        atomic.write_json(run.data / "splits.json", data.report.split)


def _find_checkpoint(
    resume: str | Path | bool, config: ConfigLike, *, overrides: Sequence[str], preset: str | None
) -> tuple[RunDirectory, Checkpoint | None]:
    """The run and the checkpoint that `resume` names; of a run its newest, or None when it has none and no result."""
    if resume is True:
        output = _load(config, overrides=overrides, preset=preset, with_rules=False).config.output
        if output.name is None:
            raise RunError(
                "resume-unnamed",
                "`--resume latest` continues the run named by output.name, and the config names none",
                fix="name the run: --resume runs/NAME (`affina runs` lists them)",
            )
        path = Path(output.directory).expanduser() / output.name
    else:
        path = Path(str(resume))
    names_checkpoint = path.parent.name == "checkpoints"
    run = open_run(path.parent.parent if names_checkpoint else path)
    if run.status() == "running":
        raise RunError(
            "run-running",
            f"{run.path} is still being trained by process {run.read_manifest().get('pid')}",
            fix="wait for it, or stop it first",
        )
    if names_checkpoint:
        return run, _checkpoint_at(path, run)
    return run, None if starts_from_beginning(run) else latest_checkpoint(run.checkpoints)


def _checkpoint_at(path: Path, run: RunDirectory) -> Checkpoint:
    checkpoints = {entry.path.name: entry for entry in list_checkpoints(run.checkpoints)}
    if path.name in checkpoints:
        return checkpoints[path.name]
    if checkpoints:
        fix = f"checkpoints of this run: {', '.join(checkpoints)}"
    elif starts_from_beginning(run):
        fix = f"the run has no checkpoint yet: --resume {run.path} starts it from the beginning"
    else:
        fix = "the run has no checkpoint any more; start a new one"
    raise RunError("checkpoint-missing", f"{path} is not a checkpoint", fix=fix)


def _resume_config(
    run: RunDirectory, config: ConfigLike, *, overrides: Sequence[str], preset: str | None
) -> ResolvedConfig:
    """The config of the run that is continued, with what may be changed of it: trackers, workers and the cache.

    Raises RunError `resume-config-changed` for what can change a result. Combinations are not judged: those of the run
    have been, and of others only the change itself is worth telling.
    """
    saved = _run_config(run)
    if config is None and preset is None:
        wanted = _run_config(run, overrides) if overrides else saved
    else:
        wanted = _load(config, overrides=overrides, preset=preset, with_rules=False)
    found = differences(saved.config, wanted.config)
    changed = [path for path in found if has_influence(path)]
    if changed:
        origin = wanted.origins.get(changed[0])
        more = f" and {len(changed) - 5} more" if len(changed) > 5 else ""
        raise RunError(
            "resume-config-changed",
            f"the config differs from the one that {run.path} was started with: "
            f"{', '.join(found[path] for path in changed[:5])}{more}",
            why="a resumed run continues the same experiment",
            fix=f"leave the config out (`affina train --resume {run.path}`), or start a new run with the new values",
            where=origin.where if origin is not None and origin.is_explicit else None,
        )
    return _with_changes(saved, wanted, [path for path in found if path in wanted.origins], run)


def _with_changes(
    saved: ResolvedConfig, wanted: ResolvedConfig, paths: Sequence[str], run: RunDirectory
) -> ResolvedConfig:
    """`saved` with what the user has written differently, but for where the run is stored."""
    changed, origins, notes = saved.config, dict(saved.origins), []
    values = dict(leaves(wanted.config))
    for path in paths:
        origin = wanted.origins[path]
        if not origin.is_explicit:
            continue
        if path.startswith("output."):
            notes.append(Note(path, f"{path} has no effect", f"a resumed run stays in {run.path}", origin.where))
        else:
            changed, origins[path] = with_value(changed, path, values[path]), origin
    return ResolvedConfig(changed, origins, tuple(notes))


def plan(
    config: ConfigLike = None,
    *,
    overrides: Sequence[str] = (),
    preset: str | None = None,
    gpus: Sequence[str] = (),
    prices: str | Path | None = None,
    fit_gib: float | None = None,
    may_quantize: bool = False,
    tokenize: bool = False,
    trace: bool = False,
) -> Forecast:
    """What a run will need and cost, before anything is downloaded or loaded. Without torch unless `trace` is given.

    gpus:         names of cards, `this`, `all`; none: the card of this machine, or all where there is none
    prices:       a file of prices; None: those that ship, with their dates
    fit_gib:      find the settings with which it runs within this memory, at the same effective batch
    may_quantize: such settings may store the weights in another format
    tokenize:     prepare the data as training would, for exact steps and the longest micro-batch
    trace:        run the real step of the reference engine on fake tensors, too

    Raises AffinaError: ConfigError `plan-unsupported`, `gpu-unknown`, `prices-unreadable`, `price-row`,
    `longer-than-context`, `nothing-fits`, ModelError for a model without a readable config.
    """
    from affina.planning.forecast import forecast

    resolved = check(config, overrides=overrides, preset=preset)
    with _placed_errors(resolved):
        workload = _measured_workload(resolved.config) if tokenize else None
        return forecast(
            resolved,
            gpus=gpus,
            prices=prices,
            fit_gib=fit_gib,
            may_quantize=may_quantize,
            workload=workload,
            trace=trace,
        )


def _measured_workload(settings: RunConfig) -> Workload:
    from affina.planning.workload import measured_workload

    _, data = _tokenizer_and_data(settings)
    if data.train is None:
        raise RunError(
            "plan-of-stream",
            "data.streaming is true, so that its tokens cannot be counted beforehand",
            fix="plan without --tokenize: training.max_steps decides how much is read",
        )
    return measured_workload(
        settings, data.train.lengths, data.train.num_supervised, num_validation=len(data.validation)
    )


def recommend(*, model: str, data: str, gpu: str, output: str | Path = "run.yaml") -> Recommendation:
    """Write a complete config for a model, data and a card, every choice with its reason, and return both.

    Raises ConfigError `config-exists`, `gpu-unknown`, `nothing-fits`, and what `check` raises for model and data.
    """
    from affina.planning.forecast import cards_of
    from affina.planning.recommend import recommend as write_recommendation

    card = cards_of(check({"model": model, "data": data}).config, [gpu])[0]
    if card is None:
        raise AffinaError(
            "recommend-without-card",
            "a recommendation is made for a card, and cpu is none",
            fix="name a card: --gpu t4; for a CPU begin with --preset laptop",
        )
    return write_recommendation(model, data, card, Path(output))
