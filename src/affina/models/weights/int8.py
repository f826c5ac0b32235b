"""A frozen linear layer whose weight is kept in 8-bit integers with one scale per output.

The format and its error: `affina.kernels.int8`. The layer expands its weight and multiplies in the type of the
activations.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from affina.kernels import int8
from affina.models.weights.quantized import QuantizedFormat, SkippedModules
from affina.models.weights.row_scaled import RowScaledLinear, quantize_weight


class Int8Linear(RowScaledLinear):
    """`nn.Linear` with a frozen int8 weight: weight [out, in] int8, scale [out] fp32."""

    CODES: ClassVar[torch.dtype] = torch.int8


@dataclass(frozen=True, slots=True, kw_only=True)
class Int8Options(SkippedModules):
    """Linear layers are to be kept in 8-bit integers: 8 bits per weight and 32 per row."""

    name: ClassVar[str] = "int8"

    def quantize_linear(self, layer: nn.Linear) -> Int8Linear:
        """The same layer with its weight in int8."""
        return Int8Linear(quantize_weight(layer.weight, int8.quantize_rows, Int8Linear.CODES), layer.bias)


INT8 = QuantizedFormat("int8", Int8Linear)
