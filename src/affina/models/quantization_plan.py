"""Which layers of a checkpoint would be quantised, and how large the result is: from its headers, before it is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from affina.catalog.model_files import read_config
from affina.models.load import auto_config, model_without_weights
from affina.models.safetensors_file import checkpoint_tensors
from affina.models.weights import WeightFormatOptions, linear_layers

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
_TABLES_AND_STATE_BYTES = 2048
"""Upper bound of what a 4-bit weight's two tables and its JSON state take in a file."""
_HEADER_BYTES = 300
"""Upper bound of a tensor's entry in a file's header."""


@dataclass(frozen=True, slots=True)
class QuantizationPlan:
    """What quantising a checkpoint comes to.

    layers:      names of the layers that will be quantised
    dense:       names of the linear layers that stay dense: the head, and what is skipped
    dtype:       in which the checkpoint is stored, and the dense rest stays
    num_bytes:   of the file that will be written, not less than it will be
    dense_bytes: of the checkpoint as it is
    """

    layers: tuple[str, ...]
    dense: tuple[str, ...]
    dtype: torch.dtype
    num_bytes: int
    dense_bytes: int


def plan_quantization(
    folder: Path, options: WeightFormatOptions, *, path: str, trust_remote_code: bool = False
) -> QuantizationPlan:
    """Reads config.json and the headers of the weight files in `folder`. Raises ModelError as loading does.

    path: what the user called the model, for messages
    """
    raw_config, specs = read_config(folder), checkpoint_tensors(folder)
    config = auto_config(folder, raw_config, path, trust_remote_code)
    dtype = _stored_dtype(raw_config, [spec.dtype for spec in specs.values()])
    model = model_without_weights(config, dtype, {"trust_remote_code": trust_remote_code})
    head = model.get_output_embeddings()
    layers: dict[str, int] = {}
    dense = []
    for name, layer in linear_layers(model):
        if type(layer) is not nn.Linear or layer is head or options.skips(name):
            dense.append(name)
        else:
            layers[name] = options.num_bytes(layer.out_features, layer.in_features)
    quantized = {f"{name}.weight" for name in layers}
    rest = [tensor for name, tensor in model.named_parameters() if name not in quantized]
    num_bytes = sum(size + _TABLES_AND_STATE_BYTES + 6 * _HEADER_BYTES for size in layers.values())
    num_bytes += sum(tensor.numel() * dtype.itemsize + _HEADER_BYTES for tensor in rest)
    return QuantizationPlan(
        tuple(layers), tuple(dense), dtype, num_bytes, sum(spec.num_bytes for spec in specs.values())
    )


def _stored_dtype(raw_config: Mapping[str, Any], dtypes: list[torch.dtype]) -> torch.dtype:
    """The type that config.json names, else the one that most tensors have."""
    nested = raw_config.get("text_config")
    for config in (raw_config, nested if isinstance(nested, Mapping) else {}):
        named = _DTYPES.get(str(config.get("dtype") or config.get("torch_dtype")))
        if named is not None:
            return named
    known = [dtype for dtype in dtypes if dtype in _DTYPES.values()]
    return max(set(known), key=known.count) if known else torch.float32
