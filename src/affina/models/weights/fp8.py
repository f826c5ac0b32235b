"""A frozen linear layer whose weight is kept in 8-bit floating point, e4m3, with one scale per output.

The format, its error and the products that a matrix unit makes of it: `affina.kernels.fp8`. This layer expands its
weight and multiplies in the type of the activations, on any device that has the type; only the weight is rounded.

In files: `weight` [out, in] float8_e4m3fn and `weight_scale` [out, 1] float32, the names and shapes of the format
`float-quantized` of compressed-tensors with one scale per channel.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from affina.kernels import fp8
from affina.models.weights.quantized import QuantizedFormat
from affina.models.weights.row_scaled import RowScaledLinear, RowScaledOptions, quantize_weight


class Fp8Linear(RowScaledLinear):
    """`nn.Linear` with a frozen e4m3 weight: weight [out, in] float8_e4m3fn, scale [out] fp32."""

    CODES: ClassVar[torch.dtype] = fp8.E4M3
    SCALE_KEY: ClassVar[str] = "weight_scale"

    @classmethod
    def file_keys(cls) -> tuple[str, ...]:
        """The names of compressed-tensors."""
        return "weight", "weight_scale"

    @classmethod
    def scale_to_files(cls, scale: Tensor) -> dict[str, Tensor]:
        """[out, 1]"""
        return {"weight_scale": scale.unsqueeze(1)}

    @classmethod
    def scale_from_file(cls, stored: Tensor) -> Tensor:
        """[out] fp32, also from scales that were stored in 16 bits."""
        return stored.reshape(-1).float()


@dataclass(frozen=True, slots=True, kw_only=True)
class Fp8Options(RowScaledOptions):
    """Linear layers are to be kept in e4m3: 8 bits per weight and 32 per row."""

    name: ClassVar[str] = "fp8"
    layer: ClassVar[type[Fp8Linear]] = Fp8Linear

    def quantize_linear(self, layer: nn.Linear) -> Fp8Linear:
        """The same layer with its weight in e4m3."""
        return Fp8Linear(quantize_weight(layer.weight, fp8.quantize_rows, Fp8Linear.CODES), layer.bias)


FP8 = QuantizedFormat("fp8", Fp8Linear)
