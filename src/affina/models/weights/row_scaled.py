"""Weights of one byte each with one float32 scale per output row: what fp8 and int8 have in common.

    Ŵ_nk = q_nk · s_n

The scale belongs to an output, so it can also leave a product: x Ŵᵀ = (x Qᵀ) ∘ s. Here the weight is expanded, which is
exact up to one rounding in any type of the computation: both codes have at most 8 significant bits, so that they are
exact in bfloat16 and float16, and the product with the scale is rounded once.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from affina.catalog.formats import weight_tensors
from affina.errors import ModelError
from affina.kernels.row_scaled import expand_rows
from affina.models.weights.quantized import QuantizedLinear, SkippedModules

_CHUNK_ELEMENTS_CPU = 1 << 20
_CHUNK_ELEMENTS_ACCELERATOR = 1 << 24

QuantizeRows = Callable[..., tuple[Tensor, Tensor]]
"""As `affina.kernels.fp8.quantize_rows`: (x, *, out, scale_out) → (codes, scale)."""


@dataclass(frozen=True, slots=True)
class RowScaledWeight:
    """codes: [out, in], one byte each; scale: [out] fp32; dtype: the type that the weight was quantised from."""

    codes: Tensor
    scale: Tensor
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return self.codes.nbytes + self.scale.nbytes

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)"""
        return self.codes.shape[0], self.codes.shape[1]

    @property
    def device(self) -> torch.device:
        return self.codes.device

    def rows_into(self, start: int, out: Tensor) -> Tensor:
        """The dense rows from `start` on, as many as `out` [rows, in] has, written into it; returns `out`."""
        part = slice(start, start + out.shape[0])
        return RowScaledWeight(self.codes[part], self.scale[part], self.dtype).dequantize_into(out)

    def rows(self, indices: Tensor, dtype: torch.dtype) -> Tensor:
        """[…, in] the dense rows at `indices` (int64, any shape), and no others."""
        flat = indices.reshape(-1)
        chosen = RowScaledWeight(self.codes.index_select(0, flat), self.scale.index_select(0, flat), self.dtype)
        return chosen.dequantize(dtype).view(*indices.shape, self.codes.shape[1])

    def to(self, device: torch.device) -> RowScaledWeight:
        """The same weight on `device`."""
        return replace(self, codes=self.codes.to(device), scale=self.scale.to(device))

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """[out, in] the dense weight in `dtype` (default: the type it was quantised from)."""
        return self.dequantize_into(torch.empty(self.codes.shape, dtype=dtype or self.dtype, device=self.codes.device))

    @torch.no_grad()
    def dequantize_into(self, out: Tensor) -> Tensor:
        """Writes the dense weight to `out` [out, in] (any floating type; rows may be apart) and returns it."""
        if out.dtype == torch.float64:
            return out.copy_(self.dequantize(torch.float32))  # the same weight as in every other type's computation
        return expand_rows(self.codes, self.scale, out)


class RowScaledLinear(QuantizedLinear):
    """`nn.Linear` with a frozen weight of one byte each and one scale per output.

    weight: [out, in] codes in the type CODES        scale: [out] fp32 buffer
    SCALE_KEY: what the scale is called in files, relative to the layer
    """

    CODES: ClassVar[torch.dtype]
    SCALE_KEY: ClassVar[str]
    EXACT = ("weight", "scale")
    scale: Tensor

    def __init__(self, quantized: RowScaledWeight, bias: Tensor | None = None) -> None:
        assert quantized.codes.dtype == self.CODES, f"{quantized.codes.dtype} in {type(self).__name__}"
        rows, columns = quantized.codes.shape
        self._set_up(quantized.codes, (rows, columns), quantized.dtype, bias)
        self.register_buffer("scale", quantized.scale, persistent=False)

    @classmethod
    @abstractmethod
    def scale_to_files(cls, scale: Tensor) -> dict[str, Tensor]:
        """What is stored beside the codes, by key relative to the layer, for the scales [out] fp32."""

    @classmethod
    @abstractmethod
    def scale_from_file(cls, stored: Tensor) -> Tensor:
        """[out] fp32 scales from what stands under SCALE_KEY."""

    @classmethod
    def weight_from_files(cls, tensors: Mapping[str, Tensor], name: str) -> RowScaledWeight:
        """Codes and scales from a checkpoint's tensors. Raises ModelError[quantized-weights-unreadable]."""
        codes, stored = tensors["weight"], tensors.get(cls.SCALE_KEY)
        if codes.dtype != cls.CODES or stored is None or stored.numel() != codes.shape[0]:
            has = f"{stored.numel()} entries" if stored is not None else "nothing"
            raise ModelError(
                "quantized-weights-unreadable",
                f"{name}.weight is {_named(codes.dtype)} {list(codes.shape)} with {has} in {cls.SCALE_KEY}; "
                f"{_named(cls.CODES)} codes with one scale per row were expected",
                why="the checkpoint is damaged or was edited",
                fix="download it again, or quantise the original model with `affina quantize`",
            )
        return RowScaledWeight(codes, cls.scale_from_file(stored), torch.float32)

    @property
    def quantized(self) -> RowScaledWeight:
        """Codes and scales; shares the layer's memory."""
        return RowScaledWeight(self.codes.data, self.scale, self.source_dtype)

    @property
    def state_keys(self) -> tuple[str, ...]:
        """The codes and their scales."""
        return self.file_keys()

    def dequantize_into(self, out: Tensor) -> Tensor:
        """Writes the dense weight to `out` [out, in] and returns it."""
        return self.quantized.dequantize_into(out)

    def _save_to_state_dict(self, destination: dict[str, Tensor], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination.update({f"{prefix}{key}": tensor for key, tensor in self.scale_to_files(self.scale).items()})

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *arguments: Any) -> None:
        codes = state_dict.get(f"{prefix}weight")
        if codes is not None and codes.dtype != self.CODES:
            # nn.Module would copy a dense weight into the codes, rounding it, and keep the old scales.
            raise ModelError(
                "checkpoint-mismatch",
                f"{prefix}weight is {_named(codes.dtype)}, the layer keeps {_named(self.CODES)} codes",
                why="a state dict fits a model of the same weight format only",
                fix="quantise the layer after its dense weight is loaded",
            )
        stored = {key: state_dict.pop(f"{prefix}{key}", None) for key in self.file_keys()[1:]}
        if codes is not None:
            tensors = {key: tensor for key, tensor in stored.items() if tensor is not None}
            quantized = self.weight_from_files({"weight": codes, **tensors}, prefix.removesuffix("."))
            self.scale = quantized.scale.to(self.weight.device)
        self._dense_weight = None
        super()._load_from_state_dict(state_dict, prefix, *arguments)

    def extra_repr(self) -> str:
        sizes = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{sizes}, {_named(self.CODES)}, one scale per row"


@dataclass(frozen=True, slots=True, kw_only=True)
class RowScaledOptions(SkippedModules):
    """The part that the options of formats with one byte per weight share."""

    name: ClassVar[str]

    def num_bytes(self, rows: int, columns: int) -> int:
        """Bytes of codes and scales of a weight [rows, columns]."""
        return sum(weight_tensors(self.name, rows, columns))


def quantize_weight(
    weight: Tensor,
    quantize_rows: QuantizeRows,
    codes_dtype: torch.dtype,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
) -> RowScaledWeight:
    """`weight` [out, in] with one scale per row, some rows at a time: `quantize_rows` makes float32 copies.

    dtype:  to which the weight is rounded first; default: its own
    device: of the result; the rows are moved there as they are quantised, so that the dense weight never is

    Raises ModelError[weights-not-finite].
    """
    assert weight.dtype in (torch.bfloat16, torch.float16, torch.float32), f"cannot quantise {weight.dtype}"
    dense = weight.detach()
    dtype, device = dtype or dense.dtype, device or dense.device
    rows, columns = dense.shape
    codes = torch.empty(rows, columns, dtype=codes_dtype, device=device)
    scale = torch.empty(rows, dtype=torch.float32, device=device)
    elements = _CHUNK_ELEMENTS_CPU if device.type == "cpu" else _CHUNK_ELEMENTS_ACCELERATOR
    step = max(1, elements // max(columns, 1))
    for start in range(0, rows, step):
        part = slice(start, start + step)
        quantize_rows(dense[part].to(device).to(dtype).contiguous(), out=codes[part], scale_out=scale[part])
    if not bool(torch.isfinite(scale).all()):
        raise ModelError(
            "weights-not-finite",
            f"a weight of shape {list(weight.shape)} holds NaN or infinity",
            why="a row of weights with such a number cannot be scaled",
            fix="the checkpoint is damaged: download or export it again",
        )
    return RowScaledWeight(codes, scale, dtype)


def _named(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
