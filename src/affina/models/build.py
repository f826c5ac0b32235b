"""From the sections model, quantization, adapter and training to a model that is ready to train or to answer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from affina.catalog.context import context_tokens
from affina.catalog.fused_choice import OPTIMIZER_BYTES, StepDemand
from affina.catalog.gpus import OLDEST_FUSED_CAPABILITY
from affina.catalog.method_memory import method_memory
from affina.catalog.methods import method_named
from affina.catalog.model_files import resolve_model_folder
from affina.catalog.reference_memory import Attention, ReferenceRow, wants_recomputation
from affina.catalog.save_policy import LayerRanks
from affina.catalog.shapes import read_shape
from affina.config.derive import has_validation
from affina.config.objectives import OBJECTIVES
from affina.config.rules import longer_than_context, room_for_samples
from affina.config.schema import RunConfig
from affina.errors import ModelError
from affina.kernels.linear_cross_entropy import default_chunk_rows
from affina.models.adapters import attach_adapter, base_identity, load_adapter, settings_of
from affina.models.adapters.attach import ADAPTER_NAME
from affina.models.adapters.factors import start_from_quantization_error
from affina.models.adapters.limits import check_sizes
from affina.models.compat import enable_recomputation
from affina.models.device import (
    check_fp8,
    choose_device,
    choose_precision,
    describe_device,
    free_bytes,
    let_segments_grow,
)
from affina.models.families import Unsupported
from affina.models.fast import attach_fast_engine
from affina.models.forward import compute_dtype_of, isolation_of
from affina.models.load import check_causal_lm, load_causal_lm, load_notes
from affina.models.quantized_checkpoint import options_of_checkpoint
from affina.models.reward_head import SCORE_NAME, add_reward_head
from affina.models.safetensors_file import checkpoint_tensors, read_tensor
from affina.models.weights import (
    Fp4Options,
    Fp8Linear,
    Fp8Options,
    Int8Options,
    Nf4Options,
    WeightFormatOptions,
    format_of,
    quantized_layers,
)

DENSE_CACHE_BYTES = 256 << 20
"""On a CPU, quantised layers that are this small together keep their dense weights: to expand them twice a step is
waste."""

_PRECISION_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
_PRECISIONS_OF_DTYPES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32", "auto": "auto"}


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A base model with an adapter on its device, and what is worth saying about it.

    identity:       what identifies the base: path, architecture, shapes, fingerprint of its weights, quantisation
    compute_dtype:  type of the forward and backward pass; adapters are float32 in any case
    num_parameters: of base and adapter together, counted as if nothing were quantised
    notes:          sentences for the user: a chosen precision, a layout, recomputation
    recompute:      makes the reference engine recompute activations from now on, where that is left to affina and not
                    done yet; None where a step could not need less
    """

    model: nn.Module
    identity: dict[str, Any]
    device: torch.device
    device_name: str
    compute_dtype: torch.dtype
    precision_name: str
    num_parameters: int
    notes: tuple[str, ...]
    recompute: Callable[[], None] | None = None


def check_before_data(config: RunConfig) -> None:
    """Refuse what could never be loaded or trained, before time goes into the data. Reads no weights.

    Raises ModelError for the device, the precision and the model; ConfigError `longer-than-context`.
    """
    device = choose_device(config.training.device)
    if config.training.precision != "auto":
        choose_precision(config.training.precision, device)
    model = config.model
    raw_config = check_causal_lm(model.path, revision=model.revision, trust_remote_code=model.trust_remote_code)
    stored = raw_config.get("quantization_config")
    options = options_of_checkpoint(stored, model.path) if stored is not None else weight_format(config)
    if options is not None and options.layer is Fp8Linear:
        check_fp8(device, torch.float32)
    if config.training.objective == "distill" and config.training.distillation.teacher is not None:
        check_causal_lm(config.training.distillation.teacher)
    context = context_tokens(raw_config)
    if context is not None and config.data.max_length > room_for_samples(config, context):
        raise longer_than_context(config, context)
    try:
        shape = read_shape(raw_config)
    except ModelError:
        return  # transformers has a default for what this config.json leaves out
    if shape.is_exact:
        targets = shape.linears_named(config.adapter.targets)
        sizes = {linear.path: (linear.out_features, linear.in_features) for linear in targets}
        method = method_named(config.adapter.method)
        check_sizes(method, method.settings(**_adapter_options(config)), sizes)


def load_for_training(config: RunConfig) -> LoadedModel:
    """The base of the config with a fresh adapter, and activations recomputed where memory would not hold them.

    Raises ModelError for a model that cannot be loaded and for adapter targets that match nothing.
    """
    base, device, notes = _load_base(config)
    identity = base_identity(base)  # before anything of it is trained
    method = method_named(config.adapter.method)
    is_reward = config.training.objective == "reward"
    if is_reward:
        add_reward_head(base, seed=config.training.seed)
    model = attach_adapter(
        base,
        method=method.name,
        seed=config.training.seed,
        options=_adapter_options(config),
        trained_modules=(SCORE_NAME,) if is_reward else (),
    )
    if method.name == "loftq":
        assert isinstance(model, PeftModel)
        start_from_quantization_error(model, ADAPTER_NAME, _original_weights(config))
    if not method.is_verified:
        notes.append(f"{method.title} is trained as PEFT does it, and not verified by affina")
    isolation = isolation_of(model)
    if config.data.packing and isolation.layout == "rows":
        notes.append(isolation.reason)
    recompute = None
    if not _attach_engine(model, config, notes):
        if _wants_checkpointing(config, base, model, device):
            enable_recomputation(base)
            notes.append("activations are recomputed in the backward pass (training.gradient_checkpointing)")
        elif config.training.gradient_checkpointing == "auto" and base.supports_gradient_checkpointing:
            recompute = partial(enable_recomputation, base)
    return _describe(model, base, identity, config, device, notes, recompute)


def _adapter_options(config: RunConfig) -> dict[str, Any]:
    """The settings of the section `adapter` that its method reads."""
    fields = method_named(config.adapter.method).fields
    return {name: value for name in fields if (value := getattr(config.adapter, name)) is not None}


def _original_weights(config: RunConfig) -> Callable[[str], Tensor]:
    """From a layer's name to its weight before quantisation, read from the checkpoint again."""
    folder = resolve_model_folder(config.model.path, revision=config.model.revision)
    specs = checkpoint_tensors(folder)

    def original(layer: str) -> Tensor:
        spec = specs.get(f"{layer}.weight")
        if spec is None or not spec.dtype.is_floating_point:
            kept = "is stored in 4 bits" if spec is not None else f"has no tensor {layer}.weight"
            raise ModelError(
                "adapter-unsupported",
                f"LoftQ needs the original weights, and {config.model.path} {kept}",
                why="it starts as what NF4 has lost of them",
                fix="give the original model as model.path, or write `adapter: lora`",
            )
        return read_tensor(spec)

    return original


def load_for_inference(config: RunConfig, adapter: Path) -> LoadedModel:
    """The base of the config, as it was trained on, with a saved adapter.

    Raises ModelError when the adapter is damaged or belongs to another base.
    """
    base, device, notes = _load_base(config)
    identity = base_identity(base)
    if config.training.objective == "reward":
        add_reward_head(base, seed=config.training.seed)
    return _describe(load_adapter(base, adapter), base, identity, config, device, notes)


def _load_base(config: RunConfig) -> tuple[PreTrainedModel, torch.device, list[str]]:
    device = choose_device(config.training.device)
    let_segments_grow(device)
    wanted: str = config.training.precision
    if wanted == "auto":
        wanted = _PRECISIONS_OF_DTYPES[config.model.dtype]
    dtype, precision_note = choose_precision(wanted, device)
    is_lowest = config.engine.memory == "lowest"
    base = load_causal_lm(
        config.model.path,
        revision=config.model.revision,
        dtype=dtype,
        device=device,
        weight_format=weight_format(config),
        trust_remote_code=config.model.trust_remote_code,
        cache_dequantized_bytes=0 if is_lowest or device.type != "cpu" else DENSE_CACHE_BYTES,
        quantizes_vocabulary=is_lowest,
    )
    fp8_note = check_fp8(device, dtype) if any(isinstance(x, Fp8Linear) for x in quantized_layers(base)) else None
    notes = [note for note in (precision_note, fp8_note, *load_notes(base)) if note]
    return base, device, notes


def weight_format(config: RunConfig) -> WeightFormatOptions | None:
    """How the config wants the frozen linear layers stored; None: as the checkpoint has them."""
    quantization = config.quantization
    if quantization.format == "none":
        return None
    if quantization.format == "fp8":
        return Fp8Options(skip_modules=quantization.skip_modules)
    if quantization.format == "int8":
        return Int8Options(skip_modules=quantization.skip_modules)
    kind = Nf4Options if quantization.format == "nf4" else Fp4Options
    return kind(
        double_quantization=quantization.double_quantization,
        scale_search=quantization.scale_search,
        skip_modules=quantization.skip_modules,
    )


def _describe(
    model: nn.Module,
    base: PreTrainedModel,
    known_identity: dict[str, Any],
    config: RunConfig,
    device: torch.device,
    notes: list[str],
    recompute: Callable[[], None] | None = None,
) -> LoadedModel:
    dtype = compute_dtype_of(model)
    identity = {
        **known_identity,
        "path": config.model.path,
        "revision": config.model.revision,
        "quantization": config.quantization.model_dump(mode="json"),
    }
    return LoadedModel(
        model=model,
        identity=identity,
        device=device,
        device_name=describe_device(device),
        compute_dtype=dtype,
        precision_name=_precision_name(base, dtype),
        num_parameters=count_parameters(model),
        notes=tuple(notes),
        recompute=recompute,
    )


def _precision_name(base: PreTrainedModel, dtype: torch.dtype) -> str:
    """`bf16 on NF4`: the type of the computation, and the format of the weights that have another one."""
    formats = {weight_format.name.upper() for layer in quantized_layers(base) if (weight_format := format_of(layer))}
    return " on ".join([_PRECISION_NAMES[dtype], *sorted(formats)])


def count_parameters(model: torch.nn.Module) -> int:
    """Parameters as if nothing were quantised; tied ones count once."""
    packed = {id(layer.codes): layer for layer in quantized_layers(model)}
    return sum(
        packed[id(parameter)].in_features * packed[id(parameter)].out_features
        if id(parameter) in packed
        else parameter.numel()
        for parameter in model.parameters()
    )


def _attach_engine(model: nn.Module, config: RunConfig, notes: list[str]) -> bool:
    """Attach the fast engine where the config wants it and it runs this model; whether it is attached."""
    if config.engine.path == "reference":
        return False
    objective = config.training.objective
    if not OBJECTIVES[objective].runs_fast:
        reason = f"training.objective {objective} needs more than the supervised cross-entropy"
        if config.engine.path == "fast":
            raise ModelError(
                "engine-unsupported",
                f"engine.path is fast, and the fused decoder does not compute training.objective {objective}",
                why=reason,
                fix="write `engine: auto`: it takes transformers' own forward here",
            )
        notes.append(f"engine: reference, because {reason}")
        return False
    memory = config.engine.memory
    attached = attach_fast_engine(
        model,
        row_tokens=config.training.micro_batch_size * config.data.max_length,
        budget_bytes=int(memory * 2**30) if isinstance(memory, float) else None,
        recompute=config.training.gradient_checkpointing,
        is_flat=config.training.optimizer == "adamw" and config.adapter.method != "loraplus",
        is_lean=memory == "lowest",
        may_capture=config.data.packing,
        longest=config.data.max_length,
        demand=_demand(model, config),
    )
    if isinstance(attached, Unsupported):
        if config.engine.path == "fast":
            raise ModelError(
                "engine-unsupported",
                "engine.path is fast, and the fused decoder does not run this model with this adapter",
                why=attached.reason,
                fix="write `engine: auto`: it takes transformers' own forward here, with the same results",
            )
        notes.append(f"engine: reference, because {attached.reason}")
        return False
    notes.append(f"engine: fast; layers keep {attached.policy.describe()}")
    if attached.decoder.adapter.is_on_host:
        notes.append("adapter, gradients and optimiser state are kept in main memory (engine.memory: lowest)")
    return True


def _demand(model: nn.Module, config: RunConfig) -> StepDemand:
    num_trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return StepDemand(
        optimizer_bytes=int(OPTIMIZER_BYTES[config.training.optimizer] * num_trainable),
        accumulates=config.training.gradient_accumulation_steps > 1,
        validates=has_validation(config),
    )


def _wants_checkpointing(config: RunConfig, base: PreTrainedModel, model: nn.Module, device: torch.device) -> bool:
    """The user's choice, or whether the activations of one row would crowd the device."""
    choice = config.training.gradient_checkpointing
    if config.engine.memory == "lowest":
        return bool(base.supports_gradient_checkpointing)
    if choice != "auto":
        return choice and base.supports_gradient_checkpointing
    if not base.supports_gradient_checkpointing:
        return False
    try:
        row = _reference_row(base, model, config, device)
    except ModelError:  # a model whose sizes its config does not tell
        return device.type == "cuda"
    return wants_recomputation(row, _demand(model, config), free_bytes=free_bytes(device), on_gpu=device.type == "cuda")


def _reference_row(base: PreTrainedModel, model: nn.Module, config: RunConfig, device: torch.device) -> ReferenceRow:
    """The longest row, every token of it supervised."""
    shape = read_shape({**base.config.to_dict(), "model_type": base.config.model_type})
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    dropped = sum(int(layer.in_features) for layer in layers.values()) // max(shape.num_layers, 1)
    tokens = config.training.micro_batch_size * config.data.max_length
    itemsize = compute_dtype_of(model).itemsize  # trained weights are float32 whatever the computation is in
    attention: Attention = "cpu"
    if device.type == "cuda":
        has_flash = torch.cuda.get_device_capability(device) >= OLDEST_FUSED_CAPABILITY
        attention = "varlen" if has_flash and itemsize == 2 else "efficient"
    return ReferenceRow(
        shape=shape,
        num_tokens=tokens,
        num_predicted=tokens,
        itemsize=itemsize,
        attention=attention,
        ranks=_layer_ranks(layers, shape.num_layers),
        num_parameters=sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad),
        chunk_rows=default_chunk_rows(shape.vocabulary_size, device),
        dropped_inputs=dropped if config.adapter.dropout else 0,
        expands=any(quantized_layers(base)),
        longest=config.data.max_length,
        method=method_memory(method_named(settings_of(model).method), shape, settings_of(model), itemsize=itemsize),
    )


def _layer_ranks(layers: Mapping[str, LoraLayer], num_layers: int) -> LayerRanks:
    """Ranks that one layer computes with, by common input: of both adapters of PiSSA, of AdaLoRA what it starts with.

    layers: by their names; those of other names than a decoder's count as part of the MLP
    """
    ranks: Counter[str] = Counter()
    for name, layer in layers.items():
        ranks[name.rpartition(".")[2]] += sum(layer.r.values())
    qkv, output, down = (
        sum(ranks.pop(name, 0) for name in group)
        for group in (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("down_proj",))
    )
    return LayerRanks(*(total // max(num_layers, 1) for total in (qkv, output, ranks.total(), down)))
