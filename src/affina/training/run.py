"""One training run from prepared data to a saved adapter: joins data, model, loop and run directory.

Reads top to bottom: what to train, on which batches, with which observers, and what is left behind at the end.
"""

from __future__ import annotations

import math
import platform
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn

from affina.catalog.formats import FOUR_BIT_FORMATS
from affina.catalog.methods import method_named
from affina.config.objectives import OBJECTIVES
from affina.config.schema import RunConfig
from affina.data.batches import BatchPlan, StreamState
from affina.data.run_data import RunData
from affina.data.samples import SampleStore
from affina.data.tokenizer import LoadedTokenizer
from affina.errors import RunError, TrainingError
from affina.models.adapters import save_adapter, settings_of
from affina.models.adapters.attach import fast_learning_parameters
from affina.models.adapters.eva import start_from_inputs
from affina.models.adapters.restore import restore_adapter_weights, save_training_state
from affina.models.build import LoadedModel
from affina.models.device import memory_stats
from affina.models.engines import engine_of, trainable_parameters
from affina.models.fast import detach_fast_engine, fast_engine_of, flat_adapter_of
from affina.models.forward import probe_batch, supervised_loss
from affina.models.load import describe_model
from affina.runs import atomic
from affina.runs.checkpoints import Checkpoint, checkpoint_bytes, require_whole
from affina.runs.directory import RunDirectory, require_free_space
from affina.runs.jsonlines import JsonLinesFile
from affina.training.adalora import adalora_of
from affina.training.build import (
    build_optimizer_options,
    build_schedule,
    build_settings,
    build_trackers,
)
from affina.training.callbacks import Callback, Observers, RunFacts, RunFiles
from affina.training.checkpoint import CheckpointWriter, restore_optimizer, restore_state
from affina.training.determinism import deterministic_kernels
from affina.training.loop import BatchSource, Validation, make_room_for, train
from affina.training.loss_scale import LossScale
from affina.training.objectives import MetricSums, Objective
from affina.training.objectives.build import build_objective
from affina.training.optim import build_optimizer, describe_saving
from affina.training.optimizer_state import OptimizerState
from affina.training.probe import probe_longest
from affina.training.signals import stop_on_signals
from affina.training.source import PlannedBatches, StreamedBatches, validation_batches
from affina.training.state import StopReason, TrainState

ADAPTER_FILES = ("adapter_model.safetensors", "adapter_config.json", "affina.json", "README.md")


@dataclass(frozen=True, slots=True)
class TrainingOutcome:
    """What a run ended with. seconds and tokens_per_second are of training alone, without validation."""

    stop_reason: StopReason
    num_steps: int
    seconds: float
    tokens_per_second: float
    num_tokens: int
    num_supervised: int
    final_loss: float | None
    best_validation_loss: float | None
    best_step: int | None
    saved_step: int
    num_skipped: int
    peak_memory_bytes: int
    num_trainable: int
    num_parameters: int


def run_training(
    config: RunConfig,
    run: RunDirectory,
    data: RunData,
    tokenizer: LoadedTokenizer,
    loaded: LoadedModel,
    *,
    checkpoint: Checkpoint | None,
    callbacks: Sequence[Callback],
) -> TrainingOutcome:
    """Train `loaded.model`'s adapter and leave the result in `run.adapter` and in the model itself.

    checkpoint: where to continue, verified here; None starts at step 0

    Raises TrainingError, RunError; whatever was saved before stays.
    """
    model, device = loaded.model, loaded.device
    parameters = trainable_parameters(model)
    adapter_parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    num_trainable = sum(parameter.numel() for parameter in adapter_parameters)
    num_parameters = loaded.num_parameters
    require_free_space(run.path, checkpoint_bytes(num_trainable, keep_last=config.training.keep_last))

    faster, ratio = fast_learning_parameters(model)
    options = build_optimizer_options(config.training)
    optimizer = build_optimizer(parameters, options, faster=faster, learning_rate_ratio=ratio)
    optimizer_state = OptimizerState(optimizer, flat_adapter_of(model), adapter_parameters)
    state = TrainState()
    if checkpoint is not None:
        state = _restore(checkpoint, model, optimizer_state)

    source, num_steps, num_samples = _build_source(config, data, tokenizer, device, state)
    # Only now: a resume that was refused above must leave the records of the steps after the checkpoint. Without one
    # they are those of an attempt that ended before its first checkpoint.
    JsonLinesFile(run.metrics_file).keep_until_step(state.step)
    validation_tokens = int(data.validation.lengths.sum())
    tokens_per_step = _tokens_per_step(config, data)
    settings = build_settings(
        config.training, num_steps=num_steps, tokens_per_step=tokens_per_step, validation_tokens=validation_tokens
    )
    observers = Observers(
        [
            RunFiles(run),
            *callbacks,
            *build_trackers(config.tracking, directory=run.path, name=run.name),
        ]
    )
    writer = CheckpointWriter(
        run.checkpoints,
        write_adapter=lambda folder: _save(model, folder, data, loaded),
        optimizer_state=optimizer_state,
        observers=observers,
        keep_last=config.training.keep_last,
        keep_best=settings.save_best,
    )
    if checkpoint is not None:
        observers.event("resumed", f"continues from step {state.step}", step=state.step)
    for finding in data.report.findings if data.report is not None and checkpoint is None else ():
        if finding.level != "note":
            observers.event(
                "data", f"{finding.what}; {finding.fix}" if finding.fix else finding.what, code=finding.code
            )
    saving = describe_saving(
        [parameter.numel() for parameter in parameters],
        config.training.optimizer,
        model_bytes=describe_model(model)["total_bytes"],
    )
    for note in (*loaded.notes, *([saving] if saving is not None else [])):
        observers.event("note", note)
    if checkpoint is None and settings_of(model).method == "eva":
        _start_from_inputs(model, source, num_steps, observers)
    observers.start(
        RunFacts(
            name=run.name,
            directory=str(run.path),
            model=config.model.path,
            device=loaded.device_name,
            precision=loaded.precision_name,
            num_trainable=num_trainable,
            num_parameters=num_parameters,
            num_steps=num_steps,
            first_step=state.step,
            num_samples=num_samples,
            tokens_per_step=tokens_per_step,
            evaluate_every_steps=settings.evaluate_every_steps,
            validation_tokens=validation_tokens,
        )
    )
    objective = build_objective(config, tokenizer, loaded)
    peak = PeakMemory(device)
    loss_scale = LossScale.for_precision(is_float16=loaded.compute_dtype is torch.float16)
    if checkpoint is not None and loss_scale.enabled:
        loss_scale.scale, loss_scale.good_steps = state.loss_scale, state.loss_scale_good_steps
    _enable_graphs(config, loaded, observers)
    make_room = room_of(loaded)
    try:
        kernels = deterministic_kernels(
            config.training.deterministic,
            lambda: _probe_backward(model, parameters),
            lambda message: observers.event("note", message),
        )
        with kernels, stop_on_signals() as stop:
            if device.type == "cuda":
                _probe_longest(config, model, source, objective, optimizer, observers, make_room)
            train(
                model,
                parameters,
                source,
                objective,
                optimizer,
                build_schedule(config.training, num_steps=num_steps),
                settings=settings,
                state=state,
                loss_scale=loss_scale,
                validate=_build_validator(config, data.validation, tokenizer, loaded, objective)
                if validation_tokens
                else None,
                save=writer,
                observers=observers,
                stop_requested=lambda: bool(stop),
                make_room=make_room,
                memory_bytes=peak,
                method_step=adalora_of(model, num_steps=num_steps),
            )
        writer.require_last_written()
    except torch.OutOfMemoryError as error:
        raise out_of_memory(config, error) from error
    finally:
        observers.end({"step": state.step, "stop_reason": state.stop_reason})
    saved_step = state.step
    if settings.save_best and state.best_step is not None and state.stop_reason != "interrupted":
        saved_step = state.best_step
    if state.stop_reason != "interrupted":
        published = publish_adapter(run, saved_step)
        restore_adapter_weights(model, published.path)
    leave_for_replies(model)
    assert state.stop_reason is not None
    return TrainingOutcome(
        stop_reason=state.stop_reason,
        num_steps=state.step,
        seconds=state.seconds,
        tokens_per_second=state.num_tokens / state.seconds if state.seconds else math.nan,
        num_tokens=state.num_tokens,
        num_supervised=state.num_supervised,
        final_loss=state.last_loss,
        best_validation_loss=state.best_validation_loss,
        best_step=state.best_step,
        saved_step=saved_step,
        num_skipped=state.num_skipped,
        peak_memory_bytes=peak(),
        num_trainable=num_trainable,
        num_parameters=num_parameters,
    )


def leave_for_replies(model: PeftModel) -> None:
    """What comes after training, evaluation and generation, computes with PEFT's own matrices and needs memory."""
    fast = fast_engine_of(model)
    if fast is None:
        return
    if fast.decoder.adapter.is_on_host:
        detach_fast_engine(model)
    elif fast.graphs is not None:
        fast.graphs.clear()  # captured rows hold what several replies take


def room_of(loaded: LoadedModel) -> Callable[[], str | None] | None:
    """What makes a step need less memory and says what layers keep then, None when nothing more does: the fast engine's
    next save policy, or the reference's recomputation of activations."""
    engine = engine_of(loaded.model)
    if engine is not None:
        return engine.make_room
    left = [loaded.recompute] if loaded.recompute is not None else []

    def make_room() -> str | None:
        if not left:
            return None
        left.pop()()
        return "their inputs"

    return make_room


def _enable_graphs(config: RunConfig, loaded: LoadedModel, observers: Observers) -> None:
    """Replay packed rows as CUDA graphs, where they have one shape and the fast engine computes them."""
    engine = fast_engine_of(loaded.model)
    is_16_bit = loaded.compute_dtype in (torch.float16, torch.bfloat16)
    if engine is not None and loaded.device.type == "cuda" and is_16_bit and config.data.packing:
        engine.enable_graphs(lambda message: observers.event("note", message))


def _probe_longest(
    config: RunConfig,
    model: nn.Module,
    source: BatchSource,
    objective: Objective,
    optimizer: torch.optim.Optimizer,
    observers: Observers,
    free_some: Callable[[], str | None] | None,
) -> None:
    """Try the longest micro-batch where lengths differ and are known; a CPU does not say when memory runs out."""
    if config.data.packing or not isinstance(source, PlannedBatches):
        return
    if not OBJECTIVES[config.training.objective].runs_fast:
        return  # an objective that compares samples may prepare more than one row
    batch = source.longest(config.training.micro_batch_size)
    what = f"the longest micro-batch, {batch.num_tokens:,} tokens, tried before the first step,"
    probe_longest(
        model,
        batch,
        objective,
        optimizer,
        optimizer_kind=config.training.optimizer,
        accumulates=config.training.gradient_accumulation_steps > 1,
        make_room=lambda: make_room_for(free_some, optimizer, observers, 0, what),
    )


def _probe_backward(model: nn.Module, parameters: Sequence[nn.Parameter]) -> None:
    """One small forward and backward pass; leaves no gradients and no trace in the random state."""
    with torch.random.fork_rng():
        loss, _ = supervised_loss(model, probe_batch(model))
        torch.autograd.grad(loss, parameters, allow_unused=True)  # a reward model's head is no part of this loss


def publish_adapter(run: RunDirectory, step: int) -> Checkpoint:
    """Make a checkpoint's adapter the run's result, all or nothing; returns the checkpoint."""
    checkpoint = Checkpoint(run.checkpoints / f"step-{step:08d}", step)
    require_whole(checkpoint)
    with atomic.new_directory(run.adapter) as folder:
        for name in ADAPTER_FILES:
            if (checkpoint.path / name).exists():
                shutil.copyfile(checkpoint.path / name, folder / name)
    return checkpoint


def _save(model: nn.Module, folder: Path, data: RunData, loaded: LoadedModel) -> None:
    """The adapter's files, and what a resumed run needs besides them."""
    save_adapter(model, folder, contract=data.contract, base=loaded.identity)
    save_training_state(model, folder)


def _start_from_inputs(model: nn.Module, source: BatchSource, num_steps: int, observers: Observers) -> None:
    """EVA: look at the first training samples before the first step."""
    wanted, batches, seen = settings_of(model).calibration_samples, [], 0
    for step in range(num_steps):
        for batch in source.step(step):
            if seen < wanted:
                batches.append(batch)
                seen += len(batch.lengths)
        if seen >= wanted:
            break
    assert isinstance(model, PeftModel)
    left_random = start_from_inputs(model, batches)
    if left_random:
        what = (
            f"{len(left_random)} layers start at random: inputs of {left_random[0]} span fewer directions than the rank"
        )
        observers.event("note", f"EVA: {what}; raise adapter.calibration_samples")


def describe_environment(device_name: str) -> dict[str, Any]:
    """Versions and device, for the manifest and the report."""
    import peft
    import transformers

    return {
        "python": platform.python_version(),
        "platform": platform.platform(terse=True),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
        "device": device_name,
        "num_threads": torch.get_num_threads(),
    }


class PeakMemory:
    """Peak memory so far, in bytes: the allocator's on a GPU, the process's on a CPU."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)

    def __call__(self) -> int:
        return memory_stats(self._device).peak_bytes


def _restore(checkpoint: Checkpoint, model: nn.Module, optimizer_state: OptimizerState) -> TrainState:
    require_whole(checkpoint)
    restore_adapter_weights(model, checkpoint.path)
    restore_optimizer(optimizer_state, checkpoint.path)
    return restore_state(checkpoint.path)


def _build_source(
    config: RunConfig, data: RunData, tokenizer: LoadedTokenizer, device: torch.device, state: TrainState
) -> tuple[BatchSource, int, int]:
    """The source of batches, the number of steps of the whole run, and the number of training samples (0: unknown)."""
    training = config.training
    if data.stream is not None:
        assert training.max_steps is not None, "config rules ask for max_steps when streaming"
        stream = data.stream.batches(
            micro_batch_size=training.micro_batch_size,
            gradient_accumulation_steps=training.gradient_accumulation_steps,
            packing=config.data.packing,
            seed=training.seed,
            state=StreamState(**state.source_state) if state.source_state else None,
        )
        source = StreamedBatches(
            stream,
            num_steps=training.max_steps,
            first_step=state.step,
            pad_token_id=tokenizer.pad_id,
            device=device,
        )
        return source, training.max_steps, 0
    assert data.train is not None
    plan = build_plan(config, data.train)
    if state.step > plan.num_steps:
        raise RunError(
            "resume-past-end",
            f"the checkpoint is at step {state.step}, the run has only {plan.num_steps}",
            why="config.yaml of the run was changed after it began",
            fix="put training.epochs and training.max_steps of the run's config.yaml back to what they were",
        )
    planned = PlannedBatches(data.train, plan, pad_token_id=tokenizer.pad_id, device=device)
    return planned, plan.num_steps, len(data.train)


def build_plan(config: RunConfig, store: SampleStore) -> BatchPlan:
    """The order of a run's samples."""
    return BatchPlan(
        store.lengths,
        max_length=config.data.max_length,
        micro_batch_size=config.training.micro_batch_size,
        gradient_accumulation_steps=config.training.gradient_accumulation_steps,
        packing=config.data.packing,
        seed=config.training.seed,
        epochs=config.training.epochs,
        max_steps=config.training.max_steps,
        num_supervised=store.num_supervised,
    )


def _tokens_per_step(config: RunConfig, data: RunData) -> float:
    """Mean tokens of a step, without padding; the capacity of a step when streaming."""
    if data.train is None:
        rows = config.training.micro_batch_size * config.training.gradient_accumulation_steps
        return float(rows * config.data.max_length)
    plan = build_plan(config, data.train)
    return float(data.train.lengths.sum()) / plan.steps_per_epoch


def _build_validator(
    config: RunConfig, store: SampleStore, tokenizer: LoadedTokenizer, loaded: LoadedModel, objective: Objective
) -> Callable[[], Validation]:
    """The objective's loss over the validation set, in the training's own precision."""

    @torch.no_grad()
    def validate() -> Validation:
        total, metrics = 0.0, MetricSums()
        batches = validation_batches(
            store,
            row_tokens=max(config.data.max_length * config.training.micro_batch_size, 1024),
            pad_token_id=tokenizer.pad_id,
            max_samples=config.data.max_validation_records,
        )
        prepared = objective.prepare(loaded.model, [batch.to(loaded.device) for batch in batches], step=None)
        for batch in prepared.batches:
            found = prepared.loss(loaded.model, batch)
            total += float(found.loss)
            metrics.add(found.metrics)
        return Validation(total / prepared.count if prepared.count else math.nan, metrics.means())

    return validate


def out_of_memory(config: RunConfig, error: torch.OutOfMemoryError, when: str = "in a training step") -> TrainingError:
    """The error of a run that the device cannot hold, with what would take less."""
    training, method = config.training, method_named(config.adapter.method)
    advice = []
    if training.micro_batch_size > 1:
        half = training.micro_batch_size // 2
        advice.append(
            f"training.micro_batch_size: {half} with gradient_accumulation_steps: "
            f"{training.gradient_accumulation_steps * training.micro_batch_size // half} (the same effective batch)"
        )
    if training.gradient_checkpointing is False:
        advice.append("training.gradient_checkpointing: true")
    if config.quantization.format not in FOUR_BIT_FORMATS and "nf4" in method.trains_on:
        advice.append("quantization.format: nf4")
    if config.engine.memory != "lowest" and not method.trains_vocabulary:
        advice.append("engine.memory: lowest")
    advice.append(f"data.max_length: {config.data.max_length // 2}")
    return TrainingError(
        "out-of-memory",
        f"the device ran out of memory {when}",
        why=str(error).splitlines()[0],
        fix="start a new run with one of: " + "; ".join(advice),
    )
