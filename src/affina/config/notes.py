"""Settings without effect in this run, and settings that seldom mean what was wished: legal, so only said."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from affina.catalog.formats import FOUR_BIT_FORMATS
from affina.catalog.methods import FIELDS, method_named
from affina.catalog.renamed_settings import current_name
from affina.config.derive import adapter_scale, has_validation
from affina.config.objectives import OBJECTIVES
from affina.config.origins import Note, Origin
from affina.config.paths import BUILT_IN_PREFIX
from affina.config.rules import Settings

HIGH_LEARNING_RATE = 1e-3
"""Twice the highest of the sweeps that LoRA studies used on models of billions of parameters (1e-5 to 5e-4)."""

LOW_LEARNING_RATE = 2e-5
"""A usual rate for training all weights; LoRA wants about ten times that."""

LARGE_BATCH_ROWS = 128
"""Rows per step. LoRA loses more than full fine-tuning at large batches, whatever its rank; 8 to 32 is usual."""

LARGE_SCALE = 8.0


def collect_notes(settings: Settings) -> tuple[Note, ...]:
    """Everything worth a warning, in the order of the schema."""
    collectors = (
        *(_quantization, _adapter, _model, _data, _training, _objective),
        *(_steps, _validation, _evaluation, _tracking),
    )
    return tuple(note for collect in collectors for note in collect(settings))


def renamed_notes(renamed: Mapping[str, Origin]) -> tuple[Note, ...]:
    """What the user has written under a name of before."""
    return tuple(
        Note(
            current_name(before),
            f"{before} is called {current_name(before)} now",
            "the name of before is still read, and means the same",
            origin.where,
        )
        for before, origin in renamed.items()
    )


def _note(settings: Settings, path: str, what: str, why: str) -> Note:
    return Note(path, what, why, settings.where(path))


def _no_effect(settings: Settings, path: str, why: str) -> Iterator[Note]:
    """A note if the user, and not a preset, wrote this setting."""
    if settings.wrote(path):
        yield _note(settings, path, f"{path} has no effect", why)


def _quantization(settings: Settings) -> Iterator[Note]:
    format = settings.config.quantization.format
    if format in FOUR_BIT_FORMATS:
        return
    names = ("double_quantization", "scale_search") + (("skip_modules",) if format == "none" else ())
    for name in names:
        yield from _no_effect(settings, f"quantization.{name}", f"quantization.format is {format}")


def _adapter(settings: Settings) -> Iterator[Note]:
    adapter, scale = settings.config.adapter, adapter_scale(settings.config)
    if not method_named(adapter.method).is_verified:
        why = (
            f"PEFT's {adapter.method} is trained as PEFT does it; affina tests that it trains and loads again, no more"
        )
        yield _note(settings, "adapter.method", f"adapter.method {adapter.method} is not verified", why)
    for name in FIELDS:
        if name not in method_named(adapter.method).fields and getattr(adapter, name) not in (None, {}):
            yield from _no_effect(settings, f"adapter.{name}", f"adapter.method is {adapter.method}")
    if scale is None or scale <= LARGE_SCALE:
        return
    paths = [path for path in ("adapter.alpha", "adapter.method", "adapter.rank") if settings.wrote(path)]
    if not paths:
        return
    if adapter.method == "rslora":
        same = adapter.alpha / adapter.rank * adapter.rank**0.5
        why = (
            f"rslora divides alpha by sqrt({adapter.rank}), not by {adapter.rank}; lora's scale "
            f"{adapter.alpha / adapter.rank:.3g} needs alpha {same:.3g} here"
        )
    else:
        why = f"alpha / rank = {adapter.alpha:g} / {adapter.rank}; usual is 0.5 to 4, with the learning rate tuned"
    yield _note(settings, paths[0], f"the adapter's update is scaled by {scale:.3g}", why)


def _model(settings: Settings) -> Iterator[Note]:
    model = settings.config.model
    if model.path.startswith(BUILT_IN_PREFIX):
        for name in ("revision", "trust_remote_code"):
            yield from _no_effect(settings, f"model.{name}", f"{model.path} ships with affina")
    elif model.revision is not None and Path(model.path).is_absolute():
        yield from _no_effect(settings, "model.revision", f"{model.path} is a directory")
    if model.trust_remote_code and settings.wrote("model.trust_remote_code") and "qwen3" in model.path.lower():
        why = "transformers has this architecture; code from a repository can do anything that you can"
        yield _note(settings, "model.trust_remote_code", f"{model.path} needs no remote code", why)


def _data(settings: Settings) -> Iterator[Note]:
    data = settings.config.data
    if "data.train" not in settings.origins and not settings.config.model.path.startswith(BUILT_IN_PREFIX):
        why = "data.train is not given; write `data: your-file.jsonl` to train on your own"
        yield Note("data.train", f"{settings.config.model.path} is trained on the built-in data set", why)
    if data.validation:
        if data.validation_fraction > 0:
            yield from _no_effect(settings, "data.validation_fraction", "data.validation is given")
        yield from _no_effect(settings, "data.max_validation_records", "data.validation is given, and used whole")
    elif data.validation_fraction == 0:
        yield from _no_effect(settings, "data.max_validation_records", "data.validation_fraction is 0")
    if data.streaming:
        yield from _no_effect(settings, "training.epochs", "a stream ends at training.max_steps")
    if len(data.train) == 1 and data.train[0].weight is not None:
        yield from _no_effect(settings, "data.train[0].weight", "there is one source")
    for index, source in enumerate(data.validation):
        if source.weight is not None:
            path = f"data.validation[{index}].weight"
            yield from _no_effect(settings, path, "validation records are used as they are")
    for name, sources in (("train", data.train), ("validation", data.validation)):
        for index, source in enumerate(sources):
            if Path(source.path).is_absolute() or source.path.startswith(BUILT_IN_PREFIX):
                for field in ("split", "subset"):
                    path = f"data.{name}[{index}].{field}"
                    yield from _no_effect(settings, path, f"{source.path} is not a hub dataset")
    if data.train and all(source.format == "text" for source in data.train):
        for field in ("mask", "thinking", "system_prompt"):
            yield from _no_effect(settings, f"data.{field}", "plain text has no turns; every token is trained")
    elif data.truncation == "split" and data.mask == "last" and settings.wrote("data.truncation"):
        why = "only the last piece of a split sample has the last reply; the others train nothing"
        yield _note(settings, "data.truncation", "data.truncation split goes badly with data.mask last", why)


def _training(settings: Settings) -> Iterator[Note]:
    training = settings.config.training
    if training.optimizer == "adafactor":
        for name in ("adam_beta1", "adam_beta2", "adam_epsilon"):
            yield from _no_effect(settings, f"training.{name}", "training.optimizer is adafactor")
    if training.optimizer == "paged_adamw_8bit" and training.device in ("cpu", "mps"):
        why = f"paging moves state off a CUDA card; on {training.device} it is adamw_8bit"
        yield _note(settings, "training.optimizer", "training.optimizer paged_adamw_8bit does not page here", why)
    if training.schedule == "constant":
        yield from _no_effect(settings, "training.min_learning_rate_ratio", "training.schedule is constant")
    yield from _learning_rate(settings)
    rows = training.micro_batch_size * training.gradient_accumulation_steps
    batch_paths = ("training.gradient_accumulation_steps", "training.micro_batch_size")
    if rows > LARGE_BATCH_ROWS and (wrote := [path for path in batch_paths if settings.wrote(path)]):
        why = "LoRA learns worse from large batches, whatever its rank; 8 to 32 rows are usual"
        yield _note(settings, wrote[0], f"a step has {rows} rows", why)


def _learning_rate(settings: Settings) -> Iterator[Note]:
    """A rate far from what is usual for the objective, or for LoRA; other methods' are compared in proportion."""
    training, method = settings.config.training, method_named(settings.config.adapter.method)
    if not settings.wrote("training.learning_rate") or settings.config.model.path.startswith(BUILT_IN_PREFIX):
        return
    factor, usual = method.learning_rate_factor, OBJECTIVES[training.objective].learning_rate
    rate = training.learning_rate / factor
    low, high = (0.02 * usual.value, 20 * usual.value) if usual else (LOW_LEARNING_RATE, HIGH_LEARNING_RATE)
    if low <= rate <= high:
        return
    if usual is not None:
        with_method = f" with {method.name}" if factor != 1.0 else ""
        why = f"for {training.objective}{with_method} about {usual.value * factor:g} is usual"
    elif factor != 1.0:
        why = f"LoRA on models of billions of parameters wants 1e-4 to 5e-4, {method.name} {factor:g} times that"
    elif rate > high:
        why = "LoRA on models of billions of parameters is best between 1e-4 and 5e-4; above, losses jump"
    else:
        why = "that is a rate for training all weights; LoRA wants about ten times as much"
    word = "high" if rate > high else "low"
    what = f"training.learning_rate {training.learning_rate:g} is {word}"
    yield _note(settings, "training.learning_rate", what, why)


_PREFERENCE_USERS = {
    "loss": ("dpo",),
    "beta": tuple(name for name, facts in OBJECTIVES.items() if facts.beta is not None),
    "label_smoothing": ("dpo", "simpo"),
    "margin": ("simpo",),
    "desirable_weight": ("kto",),
    "undesirable_weight": ("kto",),
}


def _objective(settings: Settings) -> Iterator[Note]:
    training = settings.config.training
    name = training.objective
    for field, users in _PREFERENCE_USERS.items():
        if name not in users:
            yield from _no_effect(settings, f"training.preference.{field}", f"training.objective is {name}")
    if name == "dpo" and training.preference.loss == "ipo":
        why = "training.preference.loss is ipo, whose target is bounded already"
        yield from _no_effect(settings, "training.preference.label_smoothing", why)
    for field in type(training.distillation).model_fields:
        if name != "distill":
            yield from _no_effect(settings, f"training.distillation.{field}", f"training.objective is {name}")
    if name == "distill" and not training.distillation.on_policy:
        why = "training.distillation.on_policy is 0: the student writes no replies"
        yield from _no_effect(settings, "training.distillation.max_new_tokens", why)
    if OBJECTIVES[name].records in ("pairs", "labels"):
        why = f"training.objective {name} compares the last replies; what is before them is the prompt"
        yield from _no_effect(settings, "data.mask", why)


def _steps(settings: Settings) -> Iterator[Note]:
    training = settings.config.training
    for name, what in (("evaluate_every_steps", "validation"), ("save_every_steps", "checkpoint")):
        every = getattr(training, name)
        if training.max_steps is not None and every is not None and every > training.max_steps:
            why = f"the run ends at step {training.max_steps}; its only {what} is at the end"
            yield from _no_effect(settings, f"training.{name}", why)
    if training.max_steps is not None and (training.warmup_steps or 0) >= training.max_steps:
        yield _note(
            settings,
            "training.warmup_steps",
            f"the preset warms up for {training.warmup_steps} steps and the run has {training.max_steps}",
            "enough to try something, not to learn: the learning rate does not reach its peak",
        )


def _validation(settings: Settings) -> Iterator[Note]:
    if has_validation(settings.config):
        return
    why = "there are no validation records"
    if settings.config.training.keep_best:
        yield from _no_effect(settings, "training.keep_best", why)
    for name in ("early_stopping_patience", "evaluate_every_steps"):
        if getattr(settings.config.training, name) is not None:
            yield from _no_effect(settings, f"training.{name}", why)


def _evaluation(settings: Settings) -> Iterator[Note]:
    evaluation = settings.config.evaluation
    if evaluation.max_generations == 0:
        for name in ("max_new_tokens", "match", "batch_size", "num_samples"):
            yield from _no_effect(settings, f"evaluation.{name}", "evaluation.max_generations is 0")


def _tracking(settings: Settings) -> Iterator[Note]:
    if not settings.config.tracking.trackers:
        yield from _no_effect(settings, "tracking.project", "tracking.trackers is empty")
