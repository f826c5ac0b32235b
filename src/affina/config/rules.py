"""Checks across fields: combinations that cannot train, found before anything is loaded.

Each check is a function from the settings to one error or None. Its decorator names the fields that it reads: a check
is skipped when one of them was refused already, so that one mistake gives one message. The first field that the user
wrote is the place of the error.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass
from pathlib import Path

from affina.catalog.context import local_context_tokens
from affina.catalog.formats import FOUR_BIT_FORMATS
from affina.catalog.methods import FIELDS, METHODS, AdapterMethod, method_named, methods_that_train_on
from affina.config.derive import adapter_scale, has_validation
from affina.config.objectives import OBJECTIVES
from affina.config.origins import Origin
from affina.config.schema import RunConfig, SourceConfig
from affina.errors import ConfigError, Location

MAX_RANK = 1024
"""Wider than any published use: code and mathematics at scale used 256 (Biderman et al., arXiv 2405.09673)."""

MAX_SCALE = 64.0
"""Of the update. The usual ones are 0.5 to 4; beyond this the first steps diverge at any learning rate in use."""

_OTHER_WEIGHTS = re.compile(r"[-_.](gguf|awq|gptq|exl2|exl3|mlx)\b.*$", re.IGNORECASE)

TRACKER_MODULES = {"tensorboard": "tensorboard", "wandb": "wandb", "mlflow": "mlflow", "trackio": "trackio"}


@dataclass(frozen=True, slots=True)
class Settings:
    """A config whose values are each valid, and where they come from."""

    config: RunConfig
    origins: Mapping[str, Origin]

    def where(self, *paths: str) -> Location | None:
        """The place of the first path that the user wrote, else of the first that has a place."""
        known = [self.origins[path] for path in paths if path in self.origins]
        explicit = [origin.where for origin in known if origin.is_explicit and origin.where]
        return next(iter(explicit or [origin.where for origin in known if origin.where]), None)

    def wrote(self, path: str) -> bool:
        """Whether the user, and not a preset or a default, set this value."""
        return path in self.origins and self.origins[path].is_explicit


Check = Callable[[Settings], ConfigError | None]
RULES: list[tuple[tuple[str, ...], Check]] = []


def reads(*paths: str) -> Callable[[Check], Check]:
    """Register a check and the fields that it depends on."""

    def register(check: Check) -> Check:
        RULES.append((paths, check))
        return check

    return register


def check_rules(settings: Settings, invalid: Set[str] = frozenset()) -> list[ConfigError]:
    """Every error across fields, except where a field that it depends on is in `invalid`."""

    def is_refused(path: str) -> bool:
        return any(bad == path or bad.startswith((f"{path}.", f"{path}[")) for bad in invalid)

    found = [check(settings) for paths, check in RULES if not any(map(is_refused, paths))]
    return [error for error in found if error is not None]


@reads("model.path")
def _model_for_other_runtimes(settings: Settings) -> ConfigError | None:
    path = settings.config.model.path
    match = _OTHER_WEIGHTS.search(path)
    if match is None or Path(path).is_absolute():
        return None
    return ConfigError(
        "model-not-trainable",
        f'model.path is "{path}", whose weights are in the format {match[1].upper()}',
        why="these weights are packed for inference; an adapter cannot be trained through them",
        fix=f"write the original model, probably {path[: match.start()]}, and `quantization: nf4` for 4 bits",
        where=settings.where("model.path"),
    )


@reads("training.max_steps", "data.streaming")
def _streaming_without_end(settings: Settings) -> ConfigError | None:
    if not settings.config.data.streaming or settings.config.training.max_steps is not None:
        return None
    return ConfigError(
        "streaming-without-max-steps",
        "data.streaming is true and training.max_steps is not given",
        why="a stream has no known end, so the learning rate's schedule could not be laid out",
        fix="write training.max_steps, or turn data.streaming off",
        where=settings.where("data.streaming"),
    )


@reads("data.validation_fraction", "data.validation", "data.streaming")
def _streaming_split(settings: Settings) -> ConfigError | None:
    data = settings.config.data
    if not data.streaming or data.validation or data.validation_fraction == 0:
        return None
    return ConfigError(
        "streaming-split",
        f"data.streaming is true and data.validation_fraction is {data.validation_fraction:g}",
        why="records are held out by group and duplicate, which needs all of them at once",
        fix="name a file in data.validation, or write `validation_fraction: 0`",
        where=settings.where("data.validation_fraction", "data.streaming"),
    )


@reads("data.deduplicate", "data.streaming")
def _streaming_deduplicate(settings: Settings) -> ConfigError | None:
    data = settings.config.data
    if not data.streaming or data.deduplicate == "none":
        return None
    return ConfigError(
        "streaming-deduplicate",
        f"data.streaming is true and data.deduplicate is {data.deduplicate}",
        why="duplicates are found by looking at all records before the first step",
        fix="turn one of the two off",
        where=settings.where("data.deduplicate", "data.streaming"),
    )


@reads("quantization.scale_search", "quantization.format")
def _scale_search_without_4bit(settings: Settings) -> ConfigError | None:
    quantization = settings.config.quantization
    if not quantization.scale_search or quantization.format in FOUR_BIT_FORMATS:
        return None
    if not settings.wrote("quantization.scale_search"):
        return None  # a preset's choice that the user's `quantization: none` overrules; notes.py says so
    return ConfigError(
        "scale-search-without-4bit",
        f"quantization.scale_search is true and quantization.format is {quantization.format}",
        why="only nf4 and fp4 have block scales that can be searched",
        fix="write `format: nf4`, or remove scale_search",
        where=settings.where("quantization.scale_search"),
    )


@reads("training.optimizer")
def _optimizer_without_package(settings: Settings) -> ConfigError | None:
    optimizer = settings.config.training.optimizer
    if "8bit" not in optimizer or _is_installed("bitsandbytes"):
        return None
    return ConfigError(
        "optimizer-without-package",
        f"training.optimizer is {optimizer}, and bitsandbytes is not installed",
        why="the 8-bit optimisers are bitsandbytes' own",
        fix='run `pip install "affina[gpu]"`, or write `optimizer: adamw`',
        where=settings.where("training.optimizer"),
    )


@reads("tracking.trackers")
def _tracker_without_package(settings: Settings) -> ConfigError | None:
    missing = [name for name in settings.config.tracking.trackers if not _is_installed(TRACKER_MODULES[name])]
    if not missing:
        return None
    names = " and ".join(missing)
    return ConfigError(
        "tracker-without-package",
        f"tracking.trackers has {names}, which {'is' if len(missing) == 1 else 'are'} not installed",
        why="metrics.jsonl is written in any case; trackers are extras",
        fix=f'run `pip install "affina[{",".join(missing)}]"`, or take {"it" if len(missing) == 1 else "them"} out',
        where=settings.where("tracking.trackers"),
    )


@reads("training.precision", "training.device")
def _half_precision_on_cpu(settings: Settings) -> ConfigError | None:
    training = settings.config.training
    if training.device != "cpu" or training.precision != "fp16":
        return None
    return ConfigError(
        "fp16-on-cpu",
        "training.precision is fp16 and training.device is cpu",
        why="float16 needs loss scaling and is slower than float32 on a CPU",
        fix="write `precision: fp32`, or bf16 on a CPU that has AMX or AVX512-BF16",
        where=settings.where("training.precision", "training.device"),
    )


@reads("adapter.rank")
def _rank_too_large(settings: Settings) -> ConfigError | None:
    rank = settings.config.adapter.rank
    if rank <= MAX_RANK:
        return None
    return ConfigError(
        "rank-too-large",
        f"adapter.rank is {rank}; the largest is {MAX_RANK}",
        why="near the width of the model an adapter costs more than the layers that it adapts",
        fix="begin with 16 to 64; more rank helps only when there are many tokens to learn from",
        where=settings.where("adapter.rank"),
    )


@reads("adapter.alpha", "adapter.rank", "adapter.method")
def _scale_too_large(settings: Settings) -> ConfigError | None:
    scale = adapter_scale(settings.config)
    if scale is None or scale <= MAX_SCALE:
        return None
    adapter = settings.config.adapter
    root = "sqrt(rank)" if adapter.method == "rslora" else "rank"
    return ConfigError(
        "adapter-scale-too-large",
        f"adapter.alpha {adapter.alpha:g} with rank {adapter.rank} scales the update by {scale:.3g} (alpha / {root})",
        why=f"the usual scale is between 0.5 and 4, and beyond {MAX_SCALE:g} the first steps diverge",
        fix="write `alpha: 32` and tune training.learning_rate",
        where=settings.where("adapter.alpha", "adapter.rank", "adapter.method"),
    )


@reads("adapter.method")
def _unused_adapter_setting(settings: Settings) -> ConfigError | None:
    """A setting that the method does not read. One with its default value means nothing, and a preset's are left
    aside."""
    adapter = settings.config.adapter
    method = method_named(adapter.method)
    unused = [
        name
        for name in FIELDS
        if name not in method.fields
        and settings.wrote(f"adapter.{name}")
        and getattr(adapter, name) != type(adapter).model_fields[name].default
    ]
    if not unused:
        return None
    homes = [other.name for other in METHODS.values() if unused[0] in other.fields]
    has = f"{method.name} has {', '.join(method.fields)}" if method.fields else f"{method.name} has no settings"
    return ConfigError(
        "adapter-setting-unused",
        f"adapter.{unused[0]} is given, and {method.title} has no such setting",
        why=f"{has}; {unused[0]} is a setting of {', '.join(homes) or 'PEFT methods that affina does not verify'}",
        fix=f"remove {' and '.join(unused)}, or choose a method that has {'it' if len(unused) == 1 else 'them'}",
        where=settings.where(f"adapter.{unused[0]}"),
    )


@reads("adapter.method", "quantization.format")
def _method_on_weight_format(settings: Settings) -> ConfigError | None:
    method = method_named(settings.config.adapter.method)
    quantization = settings.config.quantization.format
    weight_format = "dense" if quantization == "none" else quantization
    if weight_format in method.trains_on:
        return None
    return ConfigError(
        "adapter-unsupported",
        f"adapter.method is {method.name} and quantization.format is {quantization}",
        why=why_not_on(method, weight_format),
        fix=what_trains_instead(method, weight_format),
        where=settings.where("adapter.method", "quantization.format"),
    )


def why_not_on(method: AdapterMethod, weight_format: str) -> str:
    """Why a method does not train on a weight format."""
    if method.name == "loftq":
        return "LoftQ starts as the error of NF4; other weights have none that it could start from"
    if method.name in ("pissa", "olora"):
        return f"{method.title} starts from a factorisation of the weights; quantised ones have lost what it would move"
    if method.kind == "weights":
        return f"{weight_format} codes cannot be trained; only adapters beside them can"
    if not method.is_verified:
        return (
            "PEFT's own layers may read the codes as if they were weights (HRA trains on int8 codes without an error)"
        )
    return f"{method.title} needs the dense weights"


def what_trains_instead(method: AdapterMethod, weight_format: str) -> str:
    """The nearest thing that works."""
    if method.name == "loftq":
        return "write `quantization: nf4`, or `adapter: pissa` for dense weights"
    near = "loftq" if method.name in ("pissa", "olora") and weight_format == "nf4" else "lora"
    others = ", ".join(name for name in methods_that_train_on(weight_format) if name != near)
    return f"write `quantization: none`, or `adapter: {near}` (on {weight_format} also: {others})"


@reads("adapter.method", "training.objective")
def _reward_without_head(settings: Settings) -> ConfigError | None:
    method, objective = method_named(settings.config.adapter.method), settings.config.training.objective
    if OBJECTIVES[objective].can_write or method.keeps_head:
        return None
    return ConfigError(
        "adapter-unsupported",
        f"adapter.method is {method.name} and training.objective is {objective}",
        why=why_no_head(method),
        fix=WHAT_KEEPS_A_HEAD,
        where=settings.where("adapter.method", "training.objective"),
    )


def why_no_head(method: AdapterMethod) -> str:
    """Why a reward model's head is not trained beside a method."""
    if method.kind == "weights":
        return f"what {method.title} saves are weights of a causal language model, which has no reward model's head"
    if method.name in ("pissa", "olora"):
        return f"{method.title} is a trained adapter beside a frozen one, and PEFT gives a head to one adapter alone"
    return f"affina has not verified that {method.title} keeps a reward model's head"


WHAT_KEEPS_A_HEAD = "write `adapter: lora`, or an objective without a head, such as `objective: dpo`"


@reads("adapter.method", "engine.memory")
def _lowest_trains_vocabulary(settings: Settings) -> ConfigError | None:
    method = method_named(settings.config.adapter.method)
    if settings.config.engine.memory != "lowest" or not method.trains_vocabulary:
        return None
    return ConfigError(
        "adapter-unsupported",
        f"adapter.method is {method.name} and engine.memory is lowest",
        why=WHY_NOT_LOWEST,
        fix=WHAT_TRAINS_AT_LOWEST,
        where=settings.where("engine.memory", "adapter.method"),
    )


WHY_NOT_LOWEST = "lowest keeps embedding and head in int8, whose codes cannot be trained"
WHAT_TRAINS_AT_LOWEST = "write `memory: auto`, or `adapter: lora`"


@reads("adapter.method", "training.gradient_checkpointing")
def _checkpointing_of_method(settings: Settings) -> ConfigError | None:
    method = method_named(settings.config.adapter.method)
    if method.checkpointing or settings.config.training.gradient_checkpointing is not True:
        return None
    return ConfigError(
        "adapter-without-checkpointing",
        f"training.gradient_checkpointing is true and adapter.method is {method.name}",
        why="the prefix is a cache of keys and values, and recomputing a layer would append to it a second time",
        fix="remove gradient_checkpointing, or write `adapter: prompt` or `adapter: ptuning`, which recompute",
        where=settings.where("training.gradient_checkpointing", "adapter.method"),
    )


@reads("adapter.method", "data.streaming")
def _eva_with_streaming(settings: Settings) -> ConfigError | None:
    if settings.config.adapter.method != "eva" or not settings.config.data.streaming:
        return None
    return ConfigError(
        "eva-with-streaming",
        "adapter.method is eva and data.streaming is true",
        why="EVA looks at the first samples before the first step, and a stream cannot be wound back",
        fix="turn data.streaming off, or write `adapter: lora`",
        where=settings.where("adapter.method", "data.streaming"),
    )


@reads("adapter.method", "adapter.rank", "adapter.initial_rank")
def _initial_rank_too_small(settings: Settings) -> ConfigError | None:
    adapter = settings.config.adapter
    if adapter.initial_rank is None or adapter.initial_rank >= adapter.rank:
        return None
    return ConfigError(
        "initial-rank-too-small",
        f"adapter.initial_rank is {adapter.initial_rank} and adapter.rank is {adapter.rank}",
        why="AdaLoRA comes down from initial_rank to rank, on the average of all layers",
        fix=f"write `initial_rank: {adapter.rank * 3 // 2}`, or remove it",
        where=settings.where("adapter.initial_rank", "adapter.rank"),
    )


@reads("adapter.targets")
def _empty_targets(settings: Settings) -> ConfigError | None:
    if settings.config.adapter.targets != ():
        return None
    return ConfigError(
        "no-targets",
        "adapter.targets is an empty list",
        why="nothing would train",
        fix="write `targets: all-linear`, or names such as [q_proj, v_proj]",
        where=settings.where("adapter.targets"),
    )


@reads("training.warmup_steps", "training.max_steps")
def _warmup_never_ends(settings: Settings) -> ConfigError | None:
    training = settings.config.training
    if training.warmup_steps is None or training.max_steps is None or training.warmup_steps < training.max_steps:
        return None
    if not settings.wrote("training.warmup_steps"):
        return None  # a preset's warm-up in a run cut short to try something: notes.py says it
    return ConfigError(
        "warmup-too-long",
        f"training.warmup_steps is {training.warmup_steps} and training.max_steps is {training.max_steps}",
        why="the run would end before the learning rate has reached its peak",
        fix="remove warmup_steps: 3% of the run is the default",
        where=settings.where("training.warmup_steps", "training.max_steps"),
    )


@reads("engine.memory", "training.gradient_checkpointing")
def _lowest_keeps_activations(settings: Settings) -> ConfigError | None:
    config = settings.config
    if config.engine.memory != "lowest" or config.training.gradient_checkpointing is not False:
        return None
    if not settings.wrote("training.gradient_checkpointing"):
        return None  # a preset's choice: `lowest` is the user's and wins
    return ConfigError(
        "lowest-keeps-activations",
        "engine.memory is lowest and training.gradient_checkpointing is false",
        why="the least memory means that activations are computed again, not kept",
        fix="remove gradient_checkpointing, or write `memory: auto` or a number of GiB",
        where=settings.where("engine.memory", "training.gradient_checkpointing"),
    )


@reads("data.max_length", "model.path", "adapter.num_virtual_tokens")
def _longer_than_context(settings: Settings) -> ConfigError | None:
    """For a model on this machine; that of a hub id is compared once its config.json is there."""
    context = local_context_tokens(settings.config.model.path)
    if context is None or settings.config.data.max_length <= room_for_samples(settings.config, context):
        return None
    return longer_than_context(settings.config, context, where=settings.where("data.max_length", "model.path"))


def room_for_samples(config: RunConfig, context: int) -> int:
    """Tokens of a context that are left for a sample: virtual tokens take theirs."""
    return context - (config.adapter.num_virtual_tokens or 0)


def longer_than_context(
    config: RunConfig, context: int, *, where: Location | None = None, limits: str | None = None
) -> ConfigError:
    """The error for samples that the model could not read whole. limits: what is known of native and stretched ones"""
    room = room_for_samples(config, context)
    taken = f", of which the adapter's virtual tokens take {context - room}" if room < context else ""
    return ConfigError(
        "longer-than-context",
        f"data.max_length is {config.data.max_length:,} tokens; {config.model.path} reads {context:,}{taken}",
        why="beyond its context a model has never seen the positions: it would learn noise, or fail"
        + (f" ({limits})" if limits else ""),
        fix=f"write `max_length: {room}` or less; data.truncation says what happens to longer samples",
        where=where,
    )


@reads("data.train")
def _no_training_data(settings: Settings) -> ConfigError | None:
    if settings.config.data.train:
        return None
    return ConfigError(
        "no-training-data",
        "data.train is an empty list",
        fix="name a file, a folder or a hub dataset: `data: my.jsonl`",
        where=settings.where("data.train"),
    )


@reads("data.train")
def _mixed_weights(settings: Settings) -> ConfigError | None:
    sources = settings.config.data.train
    without = [index for index, source in enumerate(sources) if source.weight is None]
    if not without or len(without) == len(sources):
        return None
    return ConfigError(
        "weights-incomplete",
        f"data.train[{without[0]}] has no weight, other sources have one",
        why="a weight is a share relative to the other weights",
        fix="give every source a weight, or none: then all records are used once per epoch",
        where=settings.where(f"data.train[{without[0]}].path"),
    )


@reads("data.train")
def _repeated_source(settings: Settings) -> ConfigError | None:
    seen: dict[tuple[str, str | None, str | None], int] = {}
    for index, source in enumerate(settings.config.data.train):
        first = seen.setdefault(_identity(source), index)
        if first != index:
            return ConfigError(
                "source-repeated",
                f'data.train[{index}] is "{source.path}", as data.train[{first}] is',
                why="each record would be trained twice, and may land on both sides of the split",
                fix="remove one; a weight makes a source count more",
                where=settings.where(f"data.train[{index}].path"),
            )
    return None


@reads("data.train", "data.validation")
def _validation_is_training(settings: Settings) -> ConfigError | None:
    trained = {_identity(source): index for index, source in enumerate(settings.config.data.train)}
    for index, source in enumerate(settings.config.data.validation):
        if _identity(source) in trained:
            return ConfigError(
                "validation-is-training",
                f'data.validation[{index}] is "{source.path}", as data.train[{trained[_identity(source)]}] is',
                why="a model measured on what it was trained on always looks good",
                fix="remove data.validation: a part of the training data is then held out",
                where=settings.where(f"data.validation[{index}].path"),
            )
    return None


@reads("evaluation.enabled", "data.validation", "data.validation_fraction")
def _evaluation_without_records(settings: Settings) -> ConfigError | None:
    if not settings.config.evaluation.enabled or has_validation(settings.config):
        return None
    return ConfigError(
        "evaluation-without-records",
        "evaluation.enabled is true, and there are no validation records",
        why="data.validation is empty and data.validation_fraction is 0",
        fix="name a file in data.validation, or write `validation_fraction: 0.1`",
        where=settings.where("evaluation.enabled", "data.validation_fraction"),
    )


@reads("training.objective", "data.truncation")
def _truncation_of_pairs(settings: Settings) -> ConfigError | None:
    objective, truncation = settings.config.training.objective, settings.config.data.truncation
    is_judged = OBJECTIVES[objective].records in ("pairs", "labels")
    is_taught = objective == "distill" and settings.config.training.distillation.teacher is None
    if not (is_judged or is_taught) or truncation in ("drop", "raise"):
        return None
    why = "what was judged is the whole reply; a part of it may deserve another judgement"
    if is_taught:
        why = "the records have the teacher's log-probabilities for every token of the whole reply, not for a part"
    return ConfigError(
        "truncation-changes-preference",
        f"data.truncation is {truncation}, and training.objective is {objective}",
        why=why,
        fix="write `truncation: drop` (leaves it out and counts it) or raise, and raise data.max_length",
        where=settings.where("data.truncation", "training.objective"),
    )


@reads("training.objective", "evaluation.enabled")
def _evaluation_of_reward(settings: Settings) -> ConfigError | None:
    if OBJECTIVES[settings.config.training.objective].can_write or not settings.config.evaluation.enabled:
        return None
    return ConfigError(
        "evaluation-of-reward",
        "evaluation.enabled is true, and training.objective is reward",
        why="the comparison reads replies and their perplexity; a reward model writes none",
        fix="remove evaluation.enabled: the accuracy on validation pairs is in metrics.jsonl",
        where=settings.where("evaluation.enabled", "training.objective"),
    )


@reads("training.objective", "training.distillation.on_policy", "training.distillation.teacher")
def _on_policy_without_teacher(settings: Settings) -> ConfigError | None:
    training = settings.config.training
    if training.objective != "distill" or training.distillation.teacher or not training.distillation.on_policy:
        return None
    return ConfigError(
        "on-policy-without-teacher",
        f"training.distillation.on_policy is {training.distillation.on_policy:g}, and there is no teacher model",
        why="log-probabilities in the records are for the replies of the records, not for what the student writes",
        fix="name a model in training.distillation.teacher, or write `on_policy: 0`",
        where=settings.where("training.distillation.on_policy"),
    )


@reads("training.objective", "training.distillation.divergence", "training.distillation.temperature")
def _divergence_from_files(settings: Settings) -> ConfigError | None:
    training, distillation = settings.config.training, settings.config.training.distillation
    if training.objective != "distill" or distillation.teacher:
        return None
    if distillation.divergence == 0 and distillation.temperature == 1:
        return None
    return ConfigError(
        "divergence-needs-teacher",
        f"training.distillation has divergence {distillation.divergence:g} and temperature "
        f"{distillation.temperature:g}, and there is no teacher model",
        why="the records hold the k likeliest tokens only: enough for the forward divergence at temperature 1",
        fix="name a model in training.distillation.teacher, or remove both",
        where=settings.where("training.distillation.divergence", "training.distillation.temperature"),
    )


@reads("output.name")
def _name_is_path(settings: Settings) -> ConfigError | None:
    name = settings.config.output.name
    if name is None or (name.strip() and not any(c in name for c in '/\\:*?"<>|\0\n') and name not in (".", "..")):
        return None
    return ConfigError(
        "name-not-usable",
        f'output.name is "{name}", which cannot be the name of a folder',
        fix="use letters, digits, - and _; the place of all runs is output.directory",
        where=settings.where("output.name"),
    )


def _identity(source: SourceConfig) -> tuple[str, str | None, str | None]:
    return (source.path, source.subset, source.split)


def _is_installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None
