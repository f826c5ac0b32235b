"""What a weight format must tell: whose layers are its own, their dense weight, shape, bytes and names on disk."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from affina.models.compat import is_adapter_name


class WeightFormat(Protocol):
    """One way to keep the weight of a frozen linear layer. Adapters know only this and `nn.Linear`."""

    @property
    def name(self) -> str: ...

    def owns(self, layer: object) -> bool:
        """Whether `layer` keeps its weight in this format."""
        ...

    def dequantize(self, layer: nn.Module, dtype: torch.dtype | None = None) -> Tensor:
        """[out, in] the dense weight, in `dtype` or the type in which it was stored."""
        ...

    def shape(self, layer: nn.Module) -> tuple[int, int]:
        """(out, in) of the dense weight."""
        ...

    def num_bytes(self, layer: nn.Module) -> int:
        """Bytes that the weight occupies, scales included, bias not."""
        ...

    def state_keys(self, layer: nn.Module) -> tuple[str, ...]:
        """Names of the weight's tensors in a checkpoint, relative to the layer."""
        ...


def linear_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every linear layer of the base model with its name, adapters' own matrices left out."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | Conv1D) and not is_adapter_name(name):
            yield name, module
