"""A frozen linear layer whose weight is kept in 8-bit floating point, e4m3, with one scale per output.

The format, its error and the products that a matrix unit makes of it: `affina.kernels.fp8`. This layer expands its
weight and multiplies in the type of the activations, on any device; only the weight is rounded.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from affina.kernels import fp8
from affina.models.weights.quantized import QuantizedFormat, SkippedModules
from affina.models.weights.row_scaled import RowScaledLinear, quantize_weight


class Fp8Linear(RowScaledLinear):
    """`nn.Linear` with a frozen e4m3 weight: weight [out, in] float8_e4m3fn, scale [out] fp32."""

    CODES: ClassVar[torch.dtype] = fp8.E4M3


@dataclass(frozen=True, slots=True, kw_only=True)
class Fp8Options(SkippedModules):
    """Linear layers are to be kept in e4m3: 8 bits per weight and 32 per row."""

    name: ClassVar[str] = "fp8"

    def quantize_linear(self, layer: nn.Linear) -> Fp8Linear:
        """The same layer with its weight in e4m3."""
        return Fp8Linear(quantize_weight(layer.weight, fp8.quantize_rows, Fp8Linear.CODES), layer.bias)


FP8 = QuantizedFormat("fp8", Fp8Linear)
