"""Computed defaults, each with its reason: everything "auto" that can be decided without seeing the machine.

A derivation never touches a value that the user has set, nor one that a preset has, but for the learning rate: presets
state it for supervised fine-tuning, and other objectives want another one. What has to wait for the machine or for the
data (precision on `device: auto`, warm-up as a share of the steps) stays open, and `explain` says what it waits for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import ceil
from typing import TypeVar

from affina.catalog.context import local_context_tokens
from affina.catalog.methods import FIELDS, LOW_RANK_FIELDS, AdapterMethod, method_named
from affina.config.objectives import OBJECTIVES, SFT_LEARNING_RATE
from affina.config.origins import Origin
from affina.config.schema import RunConfig, Section

WARMUP_SHARE = 0.03
"""Of a run's steps. Adam's second moment needs some steps before its ratio means anything; 3% is QLoRA's setting."""

VALIDATIONS_PER_RUN = 10


@dataclass(frozen=True, slots=True)
class Derived:
    """One computed value."""

    path: str
    value: object
    reason: str


Origins = Mapping[str, Origin]


def derive(config: RunConfig, origins: Origins) -> list[Derived]:
    """Every value that follows from the others, in the order in which they build on each other."""
    derived: list[Derived] = []
    for rule in _DERIVATIONS:
        for item in rule(config, origins):
            derived.append(item)
            config = with_value(config, item.path, item.value)
    return derived


def with_value(config: RunConfig, path: str, value: object) -> RunConfig:
    """The config with one field of one section replaced."""
    return _with_value(config, path.split("."), value)


SectionT = TypeVar("SectionT", bound=Section)


def _with_value(section: SectionT, path: list[str], value: object) -> SectionT:
    name, *rest = path
    if rest:
        return section.model_copy(update={name: _with_value(getattr(section, name), rest, value)})
    return type(section).model_validate({**section.__dict__, name: value})


def has_validation(config: RunConfig) -> bool:
    """Whether any record is held out."""
    return bool(config.data.validation) or config.data.validation_fraction > 0


def _is_open(origins: Origins, path: str) -> bool:
    """Whether nobody, neither the user nor a preset, has set the value."""
    return path not in origins


def _precision(config: RunConfig, origins: Origins) -> list[Derived]:
    """Precision and dtype follow from each other, and from a device that is named."""
    names = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
    dtype, precision = config.model.dtype, config.training.precision
    derived = []
    if precision == "auto" and dtype != "auto":
        precision = {full: short for short, full in names.items()}[dtype]  # type: ignore[assignment]
        derived.append(Derived("training.precision", precision, f"model.dtype is {dtype}"))
    elif precision == "auto" and config.training.device == "cpu":
        precision = "fp32"
        derived.append(Derived("training.precision", "fp32", "training.device is cpu"))
    if dtype == "auto" and precision != "auto":
        derived.append(Derived("model.dtype", names[precision], f"training.precision is {precision}"))
    return derived


def _adapter(config: RunConfig, origins: Origins) -> list[Derived]:
    """What the method's settings are where nobody has set them. Rank and scale of a preset are meant for LoRA's
    relatives."""
    method = method_named(config.adapter.method)
    is_like_lora = set(LOW_RANK_FIELDS) <= set(method.fields)
    defaults = method.settings(initial_rank=ceil(1.5 * config.adapter.rank))
    derived = []
    for name in method.fields:
        path, value, default = f"adapter.{name}", getattr(config.adapter, name), getattr(defaults, name)
        origin = origins.get(path)
        is_for_lora = origin is not None and origin.kind == "preset" and not is_like_lora
        if (name in method.defaults and value != default and (origin is None or is_for_lora)) or (
            value is None and default is not None
        ):
            derived.append(Derived(path, default, f"of {method.title}; {method.source}"))
    return [*derived, *_left_aside(config, origins, method)]


def _left_aside(config: RunConfig, origins: Origins, method: AdapterMethod) -> list[Derived]:
    """A preset's settings that the method does not read: back to what they are when nobody sets them."""
    adapter = config.adapter
    derived = []
    for name in FIELDS:
        origin, default = origins.get(f"adapter.{name}"), type(adapter).model_fields[name].default
        is_preset = origin is not None and origin.kind == "preset"
        if name not in method.fields and is_preset and getattr(adapter, name) != default:
            derived.append(Derived(f"adapter.{name}", default, f"no setting of {method.name}"))
    return derived


def _learning_rate(config: RunConfig, origins: Origins) -> list[Derived]:
    """The schema's and the presets' rates are for supervised fine-tuning with LoRA. Methods and objectives that want
    others get them in proportion, so that a preset's word about its model still counts."""
    origin = origins.get("training.learning_rate")
    if origin is not None and origin.is_explicit:
        return []
    given, objective = config.training.learning_rate, config.training.objective
    method, usual = method_named(config.adapter.method), OBJECTIVES[objective].learning_rate
    rate, reasons = given, []
    if method.learning_rate_factor != 1.0:
        rate *= method.learning_rate_factor
        reasons.append(f"{method.name}: {method.learning_rate_factor:g} times LoRA's; {method.source}")
    if usual is not None:
        rate *= usual.value / SFT_LEARNING_RATE
        reasons.append(f"{objective}: {usual.value:g} with LoRA; {usual.source}")
    if not reasons:
        return []
    if origin is not None:
        reasons.append(f"in proportion to the preset's {given:g} for sft with LoRA")
    return [Derived("training.learning_rate", float(f"{rate:.3g}"), "; ".join(reasons))]


def _recomputation(config: RunConfig, origins: Origins) -> list[Derived]:
    method = method_named(config.adapter.method)
    if method.checkpointing or config.training.gradient_checkpointing != "auto":
        return []
    return [Derived("training.gradient_checkpointing", False, f"{method.title} cannot recompute activations")]


def _max_length(config: RunConfig, origins: Origins) -> list[Derived]:
    """The default length is for models of billions of parameters; a small one may read less."""
    context = local_context_tokens(config.model.path)
    room = context - (config.adapter.num_virtual_tokens or 0) if context is not None else None
    if room is None or room >= config.data.max_length or not _is_open(origins, "data.max_length"):
        return []
    return [Derived("data.max_length", max(room, 8), f"{config.model.path} reads {context:,} tokens")]


def _validation(config: RunConfig, origins: Origins) -> list[Derived]:
    """A stream cannot be split before it has been read."""
    data = config.data
    if data.streaming and not data.validation and _is_open(origins, "data.validation_fraction"):
        return [Derived("data.validation_fraction", 0.0, "a stream cannot be split; give data.validation to measure")]
    if data.validation and data.validation_fraction > 0 and _is_open(origins, "data.validation_fraction"):
        return [Derived("data.validation_fraction", 0.0, "data.validation is a set of its own")]
    return []


def _without_validation(config: RunConfig, origins: Origins) -> list[Derived]:
    """What needs validation records is off when there are none."""
    if has_validation(config):
        return []
    candidates = (
        ("training.keep_best", config.training.keep_best),
        ("evaluation.enabled", config.evaluation.enabled),
    )
    return [
        Derived(path, False, "there are no validation records")
        for path, is_on in candidates
        if is_on and _is_open(origins, path)
    ]


def _objective(config: RunConfig, origins: Origins) -> list[Derived]:
    """Defaults that depend on what is learnt."""
    name = config.training.objective
    facts = OBJECTIVES[name]
    derived: list[Derived] = []
    if config.training.preference.beta is None and facts.beta is not None:
        derived.append(Derived("training.preference.beta", facts.beta.value, f"{name}: {facts.beta.source}"))
    if facts.records == "texts" and _is_open(origins, "data.truncation"):
        derived.append(Derived("data.truncation", "split", "no part of a long text is lost"))
    if not facts.compares_replies and _is_open(origins, "evaluation.max_generations"):
        derived.append(Derived("evaluation.max_generations", 0, f"{name} learns no replies"))
    if not facts.can_write and _is_open(origins, "evaluation.enabled"):
        reason = f"a {name} model writes nothing; its validation accuracy is in metrics.jsonl"
        derived.append(Derived("evaluation.enabled", False, reason))
    return derived


def _steps(config: RunConfig, origins: Origins) -> list[Derived]:
    """In a stream the number of steps is max_steps exactly; elsewhere it is known once the data is counted."""
    training = config.training
    derived = []
    if config.data.streaming and training.max_steps is not None:
        steps = training.max_steps
        if training.warmup_steps is None:
            warmup = min(max(1, round(WARMUP_SHARE * steps)), steps - 1)
            derived.append(Derived("training.warmup_steps", warmup, f"{WARMUP_SHARE:.0%} of {steps} steps"))
        if training.evaluate_every_steps is None and has_validation(config):
            every = max(1, steps // VALIDATIONS_PER_RUN)
            reason = f"about {VALIDATIONS_PER_RUN} times in {steps} steps"
            derived.append(Derived("training.evaluate_every_steps", every, reason))
    every_steps = next(
        (d.value for d in derived if d.path.endswith("evaluate_every_steps")), training.evaluate_every_steps
    )
    if training.save_every_steps is None and every_steps is not None and has_validation(config):
        derived.append(Derived("training.save_every_steps", every_steps, "with every validation"))
    return derived


_DERIVATIONS: tuple[Callable[[RunConfig, Origins], list[Derived]], ...] = (
    _adapter,
    _learning_rate,
    _recomputation,
    _precision,
    _max_length,
    _validation,
    _objective,
    _without_validation,
    _steps,
)


def adapter_scale(config: RunConfig) -> float | None:
    """What the adapter's update is multiplied by: alpha / rank, or alpha / sqrt(rank) for rsLoRA (arXiv 2312.03732);
    None for a method without such a scale."""
    adapter = config.adapter
    method = method_named(adapter.method)
    if "alpha" not in method.fields:
        return None
    return method.scale(adapter.initial_rank or adapter.rank, adapter.alpha)


def explain(config: RunConfig) -> dict[str, str]:
    """For values that need a word: what they amount to, or what an open one waits for. By dotted path."""
    training, data = config.training, config.data
    rows = training.micro_batch_size * training.gradient_accumulation_steps
    root = "√r" if config.adapter.method == "rslora" else "r"
    scale = adapter_scale(config)
    reasons = {
        **({"adapter.alpha": f"the update is scaled by α/{root} = {scale:.3g}"} if scale is not None else {}),
        **{f"adapter.{name}": f"no setting of {config.adapter.method}" for name in _unused_fields(config)},
        "training.gradient_accumulation_steps": f"{_rows(rows)} of up to {data.max_length} tokens per step",
    }
    waits = {
        "model.dtype": (config.model.dtype == "auto", "follows the device"),
        "training.precision": (training.precision == "auto", "follows the device"),
        "training.device": (training.device == "auto", "cuda, mps or cpu, whichever is there"),
        "training.gradient_checkpointing": (training.gradient_checkpointing == "auto", "follows the free memory"),
        "training.warmup_steps": (training.warmup_steps is None, f"{WARMUP_SHARE:.0%} of the steps, at least 1"),
        "training.evaluate_every_steps": (
            training.evaluate_every_steps is None,
            f"about {VALIDATIONS_PER_RUN} times per run" if has_validation(config) else "no validation records",
        ),
        "training.save_every_steps": (training.save_every_steps is None, "with every validation, and at the end"),
        "data.num_workers": (data.num_workers is None, "follows the cores and the size of the data"),
        "data.cache_directory": (data.cache_directory is None, "~/.cache/affina, or AFFINA_CACHE"),
        "engine.path": (config.engine.path == "auto", "the fused decoder where it runs this model, else the reference"),
        "engine.memory": (config.engine.memory == "auto", "what the device has free"),
        "output.name": (config.output.name is None, "the YAML file's name and the date"),
    }
    reasons.update({path: reason for path, (is_open, reason) in waits.items() if is_open})
    return reasons


def _unused_fields(config: RunConfig) -> list[str]:
    """Settings of the section `adapter` that the method does not read."""
    return [name for name in FIELDS if name not in method_named(config.adapter.method).fields]


def _rows(count: int) -> str:
    return "1 row" if count == 1 else f"{count} rows"
