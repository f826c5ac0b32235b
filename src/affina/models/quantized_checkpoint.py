"""Checkpoints whose linear layers are stored quantised: what config.json says about them, and how one is written.

    nf4, fp4   bitsandbytes' 4-bit files: `weight` packed, `weight.absmax`, `weight.quant_state.bitsandbytes__nf4` …
    int8       bitsandbytes' 8-bit files: `weight` int8, `SCB`, `weight_format`
    fp8        compressed-tensors, format float-quantized: `weight` float8_e4m3fn, `weight_scale` [out, 1]

The names of a layer's tensors belong to its format (`QuantizedLinear.file_keys`); here is what belongs to the model.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from affina.errors import ModelError
from affina.models.compat import is_adapter_name, name_in_base
from affina.models.safetensors_file import PlannedTensor, TensorSpec, read_tensor, write_sharded
from affina.models.structure import base_model_of
from affina.models.weights import (
    FourBitLinear,
    Fp4Options,
    Fp8Options,
    Int8Embedding,
    Int8Head,
    Int8Options,
    Nf4Options,
    QuantizedLinear,
    WeightFormatOptions,
    format_of,
    linear_layers,
    quantized_layers,
)
from affina.models.weights.quantized import QuantizedWeight

_MAX_SHARD_BYTES = 5 * 1000**3
_FOUR_BITS = {"nf4": Nf4Options, "fp4": Fp4Options}


# Reading
# -------------------------------------------------------------------------------------------------------------


def options_of_checkpoint(stored: Mapping[str, Any], path: str) -> WeightFormatOptions:
    """The options behind a checkpoint's `quantization_config`.

    Raises ModelError[quantization-unsupported] for a format that is not among those that affina writes.
    """
    method = stored.get("quant_method")
    skipped = tuple(stored.get("llm_int8_skip_modules") or ())
    kind = str(stored.get("bnb_4bit_quant_type", "fp4"))  # bitsandbytes' own default
    if method == "bitsandbytes" and stored.get("load_in_4bit") and kind in _FOUR_BITS:
        return _FOUR_BITS[kind](
            double_quantization=bool(stored.get("bnb_4bit_use_double_quant", False)), skip_modules=skipped
        )
    if method == "bitsandbytes" and stored.get("load_in_8bit") and not stored.get("llm_int8_has_fp16_weight"):
        return Int8Options(skip_modules=skipped)
    if method == "compressed-tensors" and _is_fp8_by_channel(stored):
        return Fp8Options(skip_modules=tuple(stored.get("ignore") or ()))
    described = f"{method} {kind}" if stored.get("load_in_4bit") else str(method)
    raise ModelError(
        "quantization-unsupported",
        f"{path} is stored quantised ({described})",
        why="affina reads bfloat16, float16, float32, bitsandbytes' NF4, FP4 and int8, and compressed-tensors' fp8 "
        "with one scale per channel",
        fix="use the original model and set quantization.format: nf4",
    )


def _is_fp8_by_channel(stored: Mapping[str, Any]) -> bool:
    """Whether all that is quantised is e4m3 with one symmetric scale per output; how activations may be is free."""
    groups = list((stored.get("config_groups") or {}).values())
    if stored.get("format") != "float-quantized" or len(groups) != 1:
        return False
    weights, inputs = groups[0].get("weights") or {}, groups[0].get("input_activations") or {}
    wanted = {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True}
    return all(weights.get(key) == value for key, value in wanted.items()) and (
        not inputs or bool(inputs.get("dynamic"))
    )


def layer_files(
    kind: type[QuantizedLinear], layer: str, specs: Mapping[str, TensorSpec]
) -> dict[str, TensorSpec] | None:
    """The tensors of the quantised layer called `layer` by `file_keys`, or None where it is stored dense.

    Raises ModelError[quantized-weights-unreadable] for codes without their scales.
    """
    files = {key: specs[f"{layer}.{key}"] for key in kind.file_keys() if f"{layer}.{key}" in specs}
    if len(files) > 1:
        return files
    dtype = specs[f"{layer}.weight"].dtype
    if dtype in (torch.bfloat16, torch.float16, torch.float32):
        return None
    raise ModelError(
        "quantized-weights-unreadable",
        f"{layer}.weight is stored as {str(dtype).removeprefix('torch.')} without its scales",
        why=f"they would be called {layer}.{kind.file_keys()[1]}; the checkpoint is damaged or was edited",
        fix="download it again, or quantise the original model with `affina quantize`",
    )


@dataclass(frozen=True, slots=True)
class StoredWeights:
    """The tensors of a checkpoint whose linear layers may be stored quantised.

    kind: of the quantised layers; None: the checkpoint is dense
    """

    specs: Mapping[str, TensorSpec]
    kind: type[QuantizedLinear] | None

    def names(self) -> list[str]:
        """The tensors in the order of the files, without those that only decode another one."""
        layers = [name.removesuffix(".weight") for name in self.specs if name.endswith(".weight")]
        decoders = {decoder for layer in layers for decoder in self._decoders(layer)}
        return [name for name in self.specs if name not in decoders]

    def quantized(self, name: str) -> QuantizedWeight | None:
        """The weight called `name` as codes and scales; None where it is stored dense."""
        layer = name.removesuffix(".weight")
        if self.kind is None or not self._decoders(layer):
            return None
        files = layer_files(self.kind, layer, self.specs) or {}
        return self.kind.weight_from_files({key: read_tensor(spec) for key, spec in files.items()}, layer)

    def _decoders(self, layer: str) -> list[str]:
        keys = self.kind.file_keys()[1:] if self.kind is not None else ()
        return [f"{layer}.{key}" for key in keys if f"{layer}.{key}" in self.specs]


# Writing
# -------------------------------------------------------------------------------------------------------------


def save_quantized(
    model: nn.Module,
    directory: Path | str,
    *,
    compute_dtype: torch.dtype | None = None,
    max_shard_bytes: int = _MAX_SHARD_BYTES,
) -> Path:
    """Writes a model with quantised layers, config.json and generation settings into a folder, and returns it.

    4-bit and int8 models are bitsandbytes' files, which transformers + bitsandbytes load. An adapter on `model` is not
    written. Raises ModelError when no layer is quantised.
    """
    base = base_model_of(model)
    config = quantization_config(base, compute_dtype or base.dtype)
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    write_sharded(folder, planned_tensors(base), max_shard_bytes=max_shard_bytes)
    settings = base.config.to_diff_dict()
    settings.pop("_name_or_path", None)
    settings["architectures"] = [type(base).__name__]
    settings["quantization_config"] = config
    text = json.dumps(settings, indent=2, sort_keys=True, default=str) + "\n"
    (folder / "config.json").write_text(text, encoding="utf-8")
    if base.generation_config is not None:
        base.generation_config.save_pretrained(folder)
    return folder


def planned_tensors(base: PreTrainedModel) -> list[PlannedTensor]:
    """Every tensor of the model's file: quantised layers as their formats store them, tied weights once."""
    tied = set(getattr(base, "all_tied_weights_keys", None) or {})
    # No format of a file knows embeddings or heads in few bits: they are expanded.
    modules = [item for item in base.named_modules() if isinstance(item[1], Int8Embedding | Int8Head)]
    vocabulary = {f"{name}.weight": module.quantized for name, module in modules}
    decoders = {f"{name}.{key}" for name, module in modules for key in module.state_keys[1:]}
    planned = []
    for name, tensor in base.state_dict().items():
        if name in tied or name in decoders or is_adapter_name(name):
            continue
        plain, shape = name_in_base(name), tuple(tensor.shape)
        if name in vocabulary:
            planned.append(PlannedTensor(plain, base.dtype, shape, partial(vocabulary[name].dequantize, base.dtype)))
        else:
            planned.append(PlannedTensor(plain, tensor.dtype, shape, lambda tensor=tensor: tensor))  # type: ignore[misc]
    return planned


def quantization_config(base: PreTrainedModel, compute_dtype: torch.dtype) -> dict[str, Any]:
    """What config.json says about the quantised layers of `base`. Raises ModelError when there are none."""
    layers = [layer for layer in quantized_layers(base) if not isinstance(layer, Int8Head)]
    if not layers:
        raise ModelError(
            "quantization-unsupported",
            "the model has no quantised layers to save",
            fix="load it with a quantization.format other than none",
        )
    weight_format = format_of(layers[0])
    assert weight_format is not None
    assert {type(layer) for layer in layers} == {type(layers[0])}, "a model has one weight format"
    dense = [
        name_in_base(name)
        for name, linear in linear_layers(base)
        if not isinstance(linear, QuantizedLinear) or isinstance(linear, Int8Head)
    ]
    if weight_format.name == "fp8":
        return _compressed_tensors_config(dense)
    return _bitsandbytes_config(layers[0], dense, compute_dtype)


def _bitsandbytes_config(layer: QuantizedLinear, dense: list[str], compute_dtype: torch.dtype) -> dict[str, Any]:
    four_bit = layer.quantized if isinstance(layer, FourBitLinear) else None
    return {
        "_load_in_4bit": four_bit is not None,
        "_load_in_8bit": four_bit is None,
        "bnb_4bit_compute_dtype": str(compute_dtype).removeprefix("torch."),
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_quant_type": four_bit.table.name if four_bit is not None else "nf4",
        "bnb_4bit_use_double_quant": four_bit is not None and four_bit.is_double_quantized,
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_skip_modules": dense or None,
        "llm_int8_threshold": 6.0,
        "load_in_4bit": four_bit is not None,
        "load_in_8bit": four_bit is None,
        "quant_method": "bitsandbytes",
    }


def _compressed_tensors_config(dense: list[str]) -> dict[str, Any]:
    weights = {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True, "dynamic": False}
    return {
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": None}},
        "format": "float-quantized",
        "ignore": dense,
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
    }
