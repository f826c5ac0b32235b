"""A frozen linear layer whose weight is kept in 8-bit integers with one scale per output.

The format and its error: `affina.kernels.int8`. The layer expands its weight and multiplies in the type of the
activations.

In files it is bitsandbytes' 8-bit layer: `weight` [out, in] int8, `SCB` [out] float32, the rows' largest magnitudes
(not their 127th part), and `weight_format`, 0 for codes that lie row by row.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from affina.errors import ModelError
from affina.kernels import int8
from affina.models.weights.quantized import QuantizedFormat
from affina.models.weights.row_scaled import RowScaledLinear, RowScaledOptions, RowScaledWeight, quantize_weight

_ROW_BY_ROW = 0
"""bitsandbytes' number for codes in the order of the weight."""


class Int8Linear(RowScaledLinear):
    """`nn.Linear` with a frozen int8 weight: weight [out, in] int8, scale [out] fp32."""

    CODES: ClassVar[torch.dtype] = torch.int8
    SCALE_KEY: ClassVar[str] = "SCB"

    @classmethod
    def file_keys(cls) -> tuple[str, ...]:
        """The names of bitsandbytes."""
        return "weight", "SCB", "weight_format"

    @classmethod
    def weight_from_files(cls, tensors: Mapping[str, Tensor], name: str) -> RowScaledWeight:
        """Codes and scales from bitsandbytes' tensors. Raises ModelError[quantized-weights-unreadable]."""
        layout = tensors.get("weight_format")
        if layout is not None and int(layout) != _ROW_BY_ROW:
            raise ModelError(
                "quantized-weights-unreadable",
                f"the int8 codes of {name} lie in bitsandbytes' layout {int(layout)}, not row by row",
                why="such layouts belong to one kind of card; bitsandbytes wrote them before version 0.45",
                fix="quantise the original model again, for example with `affina quantize`",
            )
        return super().weight_from_files(tensors, name)

    @classmethod
    def scale_to_files(cls, scale: Tensor) -> dict[str, Tensor]:
        """The rows' maxima, from which the very same scales are made again, and the layout."""
        return {"SCB": int8.maxima_of(scale), "weight_format": torch.tensor(_ROW_BY_ROW, dtype=torch.uint8)}

    @classmethod
    def scale_from_file(cls, stored: Tensor) -> Tensor:
        """[out] fp32"""
        return int8.scale_of(stored.reshape(-1).float())


@dataclass(frozen=True, slots=True, kw_only=True)
class Int8Options(RowScaledOptions):
    """Linear layers are to be kept in 8-bit integers: 8 bits per weight and 32 per row."""

    name: ClassVar[str] = "int8"
    layer: ClassVar[type[Int8Linear]] = Int8Linear

    def quantize_linear(self, layer: nn.Linear) -> Int8Linear:
        """The same layer with its weight in int8."""
        return Int8Linear(quantize_weight(layer.weight, int8.quantize_rows, Int8Linear.CODES), layer.bias)


INT8 = QuantizedFormat("int8", Int8Linear)
