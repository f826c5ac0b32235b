"""Weights as they are: bfloat16, float16 or float32."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D


@dataclass(frozen=True, slots=True)
class DenseFormat:
    """An `nn.Linear`, or GPT-2's `Conv1D`, whose weight is stored transposed."""

    name: str = "dense"

    def owns(self, layer: object) -> bool:
        return isinstance(layer, nn.Linear | Conv1D)

    def dequantize(self, layer: nn.Module, dtype: torch.dtype | None = None) -> Tensor:
        weight = _weight(layer)
        weight = weight.t() if isinstance(layer, Conv1D) else weight
        return weight.to(dtype) if dtype is not None else weight

    def shape(self, layer: nn.Module) -> tuple[int, int]:
        rows, columns = _weight(layer).shape
        return (columns, rows) if isinstance(layer, Conv1D) else (rows, columns)

    def num_bytes(self, layer: nn.Module) -> int:
        return _weight(layer).nbytes

    def state_keys(self, layer: nn.Module) -> tuple[str, ...]:
        return ("weight",)


def _weight(layer: nn.Module) -> Tensor:
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return weight.detach()


DENSE = DenseFormat()
