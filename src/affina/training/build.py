"""From the `training` section to the loop's plain arguments: the last place that sees the config."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from affina.config.schema import TrackingConfig, TrainingConfig
from affina.training.callbacks import Callback
from affina.training.loop import LoopSettings
from affina.training.optim import OptimizerOptions
from affina.training.schedule import Schedule
from affina.training.trackers import build_tracker

VALIDATIONS_PER_RUN = 10
MAX_VALIDATION_SHARE = 0.15
WARMUP_SHARE = 0.03


def build_settings(
    config: TrainingConfig, *, num_steps: int, tokens_per_step: float, validation_tokens: int
) -> LoopSettings:
    """The loop's settings; intervals that the user left open become about ten per run.

    Fewer where the validation set is large beside a step: a forward pass is about a third of a training step, and
    validating shall not take more than 15% of the time. validation_tokens 0: there is no validation set.
    """
    has_validation = validation_tokens > 0
    tenth = math.ceil(num_steps / VALIDATIONS_PER_RUN)
    affordable = math.ceil(validation_tokens / 3 / (MAX_VALIDATION_SHARE * tokens_per_step))
    evaluate_every = config.evaluate_every_steps or max(1, tenth, affordable)
    return LoopSettings(
        num_steps=num_steps,
        max_grad_norm=config.max_grad_norm,
        log_every_steps=config.log_every_steps,
        evaluate_every_steps=evaluate_every if has_validation else None,
        save_every_steps=config.save_every_steps or config.evaluate_every_steps or max(1, tenth),
        save_best=config.keep_best and has_validation,
        early_stopping_patience=config.early_stopping_patience if has_validation else None,
        max_skipped_steps=config.max_skipped_steps,
        seed=config.seed,
    )


def build_schedule(config: TrainingConfig, *, num_steps: int) -> Schedule:
    """The learning rate of every step; 3% warm-up, at least one step, where the user left it open."""
    warmup = config.warmup_steps
    if warmup is None:
        warmup = max(1, round(WARMUP_SHARE * num_steps))
    return Schedule(
        config.schedule,
        peak=config.learning_rate,
        num_steps=num_steps,
        warmup_steps=min(warmup, num_steps),
        min_ratio=config.min_learning_rate_ratio,
    )


def build_optimizer_options(config: TrainingConfig) -> OptimizerOptions:
    """The optimiser's name and constants."""
    return OptimizerOptions(
        config.optimizer,
        betas=(config.adam_beta1, config.adam_beta2),
        epsilon=config.adam_epsilon,
        weight_decay=config.weight_decay,
    )


def build_trackers(config: TrackingConfig, *, directory: Path, name: str) -> Sequence[Callback]:
    """The trackers that the config asks for. Raises TrainingError when one's package is not installed."""
    return [build_tracker(kind, directory=directory, project=config.project, name=name) for kind in config.trackers]
