"""Where the config stops: the sections of `run.yaml` become a `StepSetup`, and back come changes of settings."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from affina.catalog.context import context_tokens
from affina.catalog.formats import FOUR_BIT_FORMATS, WEIGHT_FORMATS, weight_tensors
from affina.catalog.gpus import Gpu
from affina.catalog.methods import method_named
from affina.catalog.model_files import find_config
from affina.catalog.shapes import ModelShape, read_shape
from affina.config.derive import has_validation
from affina.config.objectives import OBJECTIVES
from affina.config.rules import longer_than_context
from affina.config.schema import RunConfig
from affina.errors import ConfigError
from affina.planning.setup import ROW_MULTIPLE, Adapter, Precision, StepSetup
from affina.planning.workload import Workload, row_tokens_of

_PRECISIONS: Mapping[str, Precision] = {"bf16": "bf16", "fp16": "fp16", "fp32": "fp32"}
_OF_DTYPE: Mapping[str, Precision] = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}


def why_unplanned(config: RunConfig) -> str | None:
    """Why the memory of this run is not known beforehand, as a clause; None: it is known."""
    method = method_named(config.adapter.method)
    if not method.is_verified:
        return f"adapter.method {method.name} is PEFT's own, and affina does not know what it holds"
    if not OBJECTIVES[config.training.objective].runs_fast:
        return f"training.objective {config.training.objective} computes more than the supervised cross-entropy"
    return None


def raise_unless_planned(config: RunConfig) -> None:
    """Raises ConfigError `plan-unsupported` for a run whose memory is not known beforehand."""
    reason = why_unplanned(config)
    if reason is not None:
        raise ConfigError(
            "plan-unsupported",
            f"the memory of this run cannot be planned: {reason}",
            why="the closed form counts the methods of `affina methods` on the supervised cross-entropy",
            fix="plan it with `adapter: lora` and `training.objective=sft` for a lower bound, or train: "
            "`affina train` does not need a plan",
        )


def model_config(config: RunConfig) -> tuple[dict[str, Any], Path]:
    """The model's config.json and its folder; of a hub id, only that file is fetched, from the cache if it is there.

    Raises ModelError: model-not-found, model-unreachable, model-gated, config-damaged.
    """
    return find_config(config.model.path, revision=config.model.revision)


def shape_of(config: RunConfig, raw: Mapping[str, Any], folder: Path) -> ModelShape:
    """The model's shape. Raises ConfigError `longer-than-context`, ModelError `config-incomplete`."""
    context = context_tokens(raw)
    if context is not None and config.data.max_length > context:
        raise longer_than_context(config, context, limits=context_limits(raw))
    return read_shape(raw, where=folder / "config.json")


def context_limits(raw: Mapping[str, Any]) -> str:
    """The limits of a context that are often mixed up: what the config allows, what is native, what YaRN would give."""
    allowed = context_tokens(raw)
    scaling = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    original = scaling.get("original_max_position_embeddings") if isinstance(scaling, Mapping) else None
    parts = [f"config.json allows {allowed:,}"]
    if isinstance(original, int):
        parts.append(f"pre-trained on {original:,}")
    elif raw.get("model_type") == "qwen3" and allowed == 40_960:
        # Qwen3's documentation: 32,768 tokens of pre-training, 8,192 of room for a prompt; YaRN by 4 is validated.
        parts.append(
            "pre-trained on 32,768 (the rest is room for a reply), 131,072 with YaRN, which can hurt short texts"
        )
    return "; ".join(parts)


def precision_of(config: RunConfig, gpu: Gpu | None) -> Precision:
    """What training.precision will be on that card; the rule of models/device.py."""
    wanted = config.training.precision
    if wanted == "auto" and config.model.dtype != "auto":
        return _OF_DTYPE[config.model.dtype]
    if wanted == "auto":
        if gpu is None:
            return "fp32"
        return "bf16" if gpu.has_bfloat16 else "fp16"
    if wanted == "bf16" and gpu is not None and not gpu.has_bfloat16:
        return "fp16"
    return _PRECISIONS[wanted]


def setup_of(config: RunConfig, shape: ModelShape, gpu: Gpu | None, workload: Workload) -> StepSetup:
    """The training step of a config on a card (None: a CPU)."""
    training, memory = config.training, config.engine.memory
    quantization = config.quantization
    is_stored = shape.stored_format in WEIGHT_FORMATS
    row_tokens = row_tokens_of(config)
    lengths = workload.row_lengths
    if not config.data.packing and workload.is_exact:
        row_tokens = min(row_tokens, -(-sum(lengths) // 128) * 128)
    return StepSetup(
        shape=shape,
        adapter=adapter_of(config),
        precision=precision_of(config, gpu),
        format=shape.stored_format if is_stored and shape.stored_format else quantization.format,
        row_tokens=row_tokens,
        gpu=gpu,
        double_quantization=shape.stored_double if is_stored else quantization.double_quantization,
        skipped=("lm_head", *shape.stored_skips) if is_stored else quantization.skip_modules,
        lengths=lengths,
        num_predicted=min(workload.row_supervised or row_tokens, row_tokens),
        micro_batches=training.gradient_accumulation_steps,
        optimizer=training.optimizer,
        recompute=True if memory == "lowest" else training.gradient_checkpointing,
        engine=config.engine.path,
        is_packed=config.data.packing,
        validates=has_validation(config),
        is_deterministic=training.deterministic,
        memory_bytes=int(memory * 2**30) if isinstance(memory, float) else None,
        is_lowest=memory == "lowest",
        generation=_generation(config, workload),
        longest_possible=config.data.max_length,
        has_two_rates=config.adapter.method == "loraplus",
    )


def adapter_of(config: RunConfig) -> Adapter:
    """The method and its settings."""
    adapter = config.adapter
    fields = method_named(adapter.method).fields
    others = tuple(
        (name, value)
        for name in fields
        if name not in ("rank", "targets", "dropout") and (value := getattr(adapter, name)) is not None
    )
    return Adapter(adapter.rank, adapter.targets, adapter.dropout, adapter.method, others)


def _generation(config: RunConfig, workload: Workload) -> tuple[int, int]:
    """Replies at once, and tokens of the longest prompt with its reply."""
    evaluation = config.evaluation
    if not evaluation.enabled or not evaluation.max_generations or not has_validation(config):
        return (0, 0)
    prompt = workload.longest or config.data.max_length
    return min(evaluation.batch_size, evaluation.max_generations), prompt + evaluation.max_new_tokens


def adapter_file_bytes(setup: StepSetup) -> int:
    """Of the saved adapter: float32 matrices and about 130 bytes of header for each."""
    if setup.counts_by_method:
        return setup.adapter.entry.num_file_parameters(setup.shape, setup.adapter.settings) * 4
    matrices = 2 * sum(adapted for _, _, adapted in setup.linears)
    return setup.num_trainable * 4 + matrices * 130


def merged_bytes(setup: StepSetup) -> int:
    """Of the merged model in 16 bits."""
    return setup.shape.num_parameters * 2


def checkpoint_bytes_of(shape: ModelShape) -> int:
    """Of the model's checkpoint: 16-bit numbers, and linear layers as they are stored."""
    if shape.stored_format not in FOUR_BIT_FORMATS and shape.stored_format not in ("fp8", "int8"):
        return shape.num_parameters * 2
    setup = StepSetup(
        shape, Adapter(1), "bf16", shape.stored_format, ROW_MULTIPLE, None, skipped=("lm_head", *shape.stored_skips)
    )
    dense = shape.num_parameters - shape.linear_weights
    return 2 * dense + sum(
        sum(weight_tensors(format, linear.out_features, linear.in_features, double_quantization=shape.stored_double))
        * linear.count
        for linear, format, _ in setup.linears
    )


def checkpoint_bytes_on_disk(folder: Path) -> int | None:
    """Of the weights in a local folder; None where they are not there yet."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            total = json.loads(index.read_text(encoding="utf-8"))["metadata"]["total_size"]
        except (ValueError, KeyError, TypeError):
            return None
        return int(total)
    sizes = [file.stat().st_size for file in folder.glob("*.safetensors")]
    return sum(sizes) or None
