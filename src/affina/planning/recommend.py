"""A complete run.yaml for a model, some data and a card, every choice with its reason.

Sources: rank from what the data holds, about one bit a supervised token against two a parameter, and learning rate from
the width: J. Schulman and Thinking Machines, *LoRA Without Regret* (2025) and the tinker cookbook's formula; epochs and
steps from the same; scale 2 as in QLoRA (arXiv:2305.14314).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from affina.catalog.context import context_tokens
from affina.catalog.gpus import Gpu
from affina.catalog.shapes import ModelShape
from affina.config import ResolvedConfig, load_mapping
from affina.config.derive import with_value
from affina.config.origins import Origin
from affina.config.schema import RunConfig
from affina.errors import ConfigError
from affina.planning.build import model_config, shape_of
from affina.planning.fit import best_fit
from affina.planning.forecast import nothing_fits
from affina.planning.plan import Plan, make_plan
from affina.planning.workload import BYTES_PER_TOKEN, Workload, estimated_workload, longest_record_bytes
from affina.runs import atomic

_LONGEST = 4096
_SHORTEST = 512
_ROWS_PER_STEP = 16
_FEWEST_STEPS = 100
_LEARNING_RATE = 5e-4
_REFERENCE_WIDTH = 2000
_WIDTH_EXPONENT = 0.0775
_SAFETY = 0.5
_SUPERVISED_SHARE = 0.5
_BITS_PER_PARAMETER = 2.0
_SMALLEST_RANK, _LARGEST_RANK = 16, 64


@dataclass(frozen=True, slots=True)
class Choice:
    """A setting, its value, and why."""

    path: str
    value: Any
    why: str


@dataclass(frozen=True, slots=True)
class Recommendation:
    """path: of the file that was written; choices: in the order of the file; plan: of the run on the card"""

    path: Path
    choices: tuple[Choice, ...]
    plan: Plan

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        choices = [asdict(choice) for choice in self.choices]
        return {"path": str(self.path), "choices": choices, "plan": self.plan.to_dict()}


def recommend(model: str, data: str, gpu: Gpu, output: Path) -> Recommendation:
    """Write a complete config to `output`.

    Raises ConfigError `config-exists` when the file is there, `nothing-fits` when the model is too large for the card.
    """
    if output.exists():
        raise ConfigError(
            "config-exists",
            f"{output} exists already",
            fix="name another file with -o, or remove it",
        )
    config = load_mapping({"model": model, "data": data}).config
    raw, folder = model_config(config)
    shape = shape_of(with_value(config, "data.max_length", 8), raw, folder)
    choices: list[Choice] = []
    for choice in _choices(config, shape, gpu, context_tokens(raw)):
        config = with_value(config, choice.path, choice.value)
        choices.append(choice)
    for choice in _fitted(config, shape, gpu):
        config = with_value(config, choice.path, choice.value)
        choices = [other for other in choices if other.path != choice.path] + [choice]
    for choice in _lasting(config):
        config = with_value(config, choice.path, choice.value)
        choices.append(choice)
    origins = {choice.path: Origin("derived", reason=choice.why) for choice in choices}
    origins |= {"model.path": Origin("user"), "data.train[0].path": Origin("user")}
    output.parent.mkdir(parents=True, exist_ok=True)
    atomic.write_text(output, _header(model, data, gpu) + ResolvedConfig(config, origins).to_yaml())
    return Recommendation(output, tuple(choices), make_plan(config, [gpu], ()))


def _header(model: str, data: str, gpu: Gpu) -> str:
    return f"# Written by `affina plan --recommend --gpu {gpu.name} --model {model} --data {data}`.\n\n"


def _choices(config: RunConfig, shape: ModelShape, gpu: Gpu, context: int | None) -> Iterator[Choice]:
    """What follows from the data, the model and the card, before it is known what fits."""
    length, why = _max_length(config, context)
    yield Choice("data.max_length", length, why)
    config = with_value(config, "data.max_length", length)
    work = estimated_workload(config)
    mean = work.num_tokens // work.num_samples if work.num_tokens and work.num_samples else None
    is_packed = mean is None or mean < length / 2
    about = f"the mean sample has about {mean} tokens" if mean is not None else "samples differ in length"
    yield Choice(
        "data.packing", is_packed, f"{about}: {'rows are filled' if is_packed else 'rows are full as they are'}"
    )
    precision = "bf16" if gpu.has_bfloat16 else "fp16"
    yield Choice(
        "training.precision", precision, f"{gpu.title} {'computes' if gpu.has_bfloat16 else 'has no'} bfloat16"
    )
    rank, why = _rank(shape, work)
    yield Choice("adapter.rank", rank, why)
    yield Choice("adapter.alpha", float(2 * rank), "scale alpha / rank = 2; tune the learning rate, not this")
    rate = _SAFETY * _LEARNING_RATE * (_REFERENCE_WIDTH / shape.hidden_size) ** _WIDTH_EXPONENT
    rate = float(f"{rate:.2g}")
    yield Choice(
        "training.learning_rate",
        rate,
        f"half of the optimum for a width of {shape.hidden_size:,} in the tinker cookbook's formula; worth a sweep",
    )
    epochs = 3.0 if (work.num_samples or 0) < 2_000 else 2.0 if (work.num_samples or 0) < 20_000 else 1.0
    size = f"about {work.num_samples:,} samples" if work.num_samples else "a set of unknown size"
    yield Choice("training.epochs", epochs if work.num_samples else 1.0, f"{size}: small sets need more than one pass")


def _max_length(config: RunConfig, context: int | None) -> tuple[int, str]:
    longest = longest_record_bytes(config)
    if longest is None:
        length, why = 2048, "the data is not a local text file: the usual length; see `affina data`"
    else:
        tokens = max(1, int(longest / BYTES_PER_TOKEN))
        length = min(_LONGEST, max(_SHORTEST, 1 << (tokens - 1).bit_length()))
        why = f"the longest record has about {tokens:,} tokens"
        if tokens > length:
            why += f", more than the {_LONGEST:,} that are usual; data.truncation says what becomes of it"
    if context is not None and context < length:
        return max(context, 8), f"the model reads {context:,} tokens"
    return length, why


def _rank(shape: ModelShape, work: Workload) -> tuple[int, str]:
    per_rank = shape.num_layers * sum(
        (linear.out_features + linear.in_features) * linear.count for linear in shape.linears
    )
    if not work.num_tokens:
        return _SMALLEST_RANK, "the size of the data is unknown; 16 holds about 66 M supervised tokens of a 4B model"
    needed = work.num_tokens * _SUPERVISED_SHARE / (_BITS_PER_PARAMETER * per_rank)
    rank = min(_LARGEST_RANK, max(_SMALLEST_RANK, 1 << max(0, math.ceil(math.log2(max(needed, 1))))))
    held = rank * per_rank * _BITS_PER_PARAMETER / 1e6
    present = work.num_tokens * _SUPERVISED_SHARE / 1e6
    return rank, f"holds about {held:,.0f} M supervised tokens; the data has about {present:.2g} M"


def _fitted(config: RunConfig, shape: ModelShape, gpu: Gpu) -> Iterator[Choice]:
    """Batch, format and optimiser, by what the card holds."""
    work = estimated_workload(config)
    rows, why = _rows(config, work)
    config = with_value(config, "training.micro_batch_size", 1)
    config = with_value(config, "training.gradient_accumulation_steps", rows)
    for format, reason in (
        ("none", f"16-bit weights fit on {gpu.title}"),
        ("nf4", f"16-bit weights do not fit on {gpu.title}; 4.127 bits a weight do"),
    ):
        tried = with_value(config, "quantization.format", format)
        work = estimated_workload(tried)
        fit = best_fit(tried, shape, gpu, work, may_quantize=False)
        is_cut = fit is not None and any(change.path == "data.max_length" for change in fit.changes)
        if fit is None or (is_cut and format == "none"):
            continue
        yield Choice("quantization.format", format, reason)
        cuts = {change.path: change for change in fit.changes}
        micro = cuts.pop("training.micro_batch_size", None)
        accumulation = cuts.pop("training.gradient_accumulation_steps", None)
        yield Choice(
            "training.micro_batch_size", micro.value if micro else 1, micro.why if micro else "what fits at once"
        )
        steps = accumulation.value if accumulation else rows
        yield Choice("training.gradient_accumulation_steps", steps, why)
        for change in cuts.values():
            yield Choice(change.path, change.value, change.why)
        return
    tightest = with_value(config, "quantization.format", "nf4")
    raise nothing_fits(tightest, shape, gpu, work, gpu.memory_gib)


def _rows(config: RunConfig, work: Workload) -> tuple[int, str]:
    """Rows of a step: 16, fewer where the run would be shorter than 100 steps."""
    if work.num_steps is None or not work.steps_per_epoch:
        return _ROWS_PER_STEP, f"{_ROWS_PER_STEP} rows a step"
    per_step = config.training.micro_batch_size * config.training.gradient_accumulation_steps
    total = work.steps_per_epoch * per_step * config.training.epochs
    rows = _ROWS_PER_STEP
    while rows > 1 and total / rows < _FEWEST_STEPS:
        rows //= 2
    return (
        rows,
        f"{rows} rows a step: about {max(1, round(total / rows)):,} steps; LoRA learns better from small batches",
    )


def _lasting(config: RunConfig) -> Iterator[Choice]:
    yield Choice("training.gradient_checkpointing", "auto", "the engine keeps what fits and recomputes the rest")
    yield Choice("engine.path", "auto", "the fused decoder where it runs this model on this card")
