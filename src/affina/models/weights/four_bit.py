"""Frozen linear layers whose weight is kept in 4 bits, NF4 or FP4: see `quantized` for the passes, the codec is the
kernel."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from affina.catalog.formats import weight_tensors
from affina.kernels import four_bit
from affina.kernels.code_tables import FP4 as FP4_TABLE
from affina.kernels.code_tables import NF4 as NF4_TABLE
from affina.kernels.code_tables import CodeTable
from affina.kernels.four_bit import TENSOR_SUFFIXES, FourBitTensor
from affina.models.weights.quantized import QuantizedFormat, QuantizedLinear, SkippedModules


class FourBitLinear(QuantizedLinear):
    """`nn.Linear` with a frozen 4-bit weight.

    weight: [⌈out·in / 2⌉, 1] uint8 packed codes, as in bitsandbytes' files; scales are buffers that keep their types
            when the module is cast.
    """

    TABLE: ClassVar[CodeTable]
    nested_absmax: Tensor | None
    nested_offset: Tensor | None
    absmax: Tensor
    _BUFFERS: ClassVar[tuple[str, ...]] = ("absmax", "nested_absmax", "nested_offset")
    EXACT = ("weight", *_BUFFERS)

    def __init__(self, quantized: FourBitTensor, bias: Tensor | None = None) -> None:
        assert quantized.table == self.TABLE, f"{quantized.table.name} in {type(self).__name__}"
        rows, columns = quantized.shape
        self._set_up(quantized.codes, (rows, columns), quantized.dtype, bias)
        for name in self._BUFFERS:
            self.register_buffer(name, getattr(quantized, name), persistent=False)

    @classmethod
    def file_keys(cls) -> tuple[str, ...]:
        """The names of bitsandbytes' files."""
        return ("weight", *(f"weight.{suffix}" for suffix in (*TENSOR_SUFFIXES, cls.TABLE.state_key)))

    @classmethod
    def weight_from_files(cls, tensors: Mapping[str, Tensor], name: str) -> FourBitTensor:
        """Codes and scales from a checkpoint's tensors. Raises ModelError[quantized-weights-unreadable]."""
        state = {key.removeprefix("weight").removeprefix("."): tensor for key, tensor in tensors.items()}
        return FourBitTensor.from_state(state, f"{name}.weight")

    @property
    def quantized(self) -> FourBitTensor:
        """The weight as the codec knows it; shares the layer's memory."""
        return FourBitTensor(
            self.TABLE,
            self.codes.data,
            self.absmax,
            self.nested_absmax,
            self.nested_offset,
            (self.out_features, self.in_features),
            self.source_dtype,
        )

    @property
    def state_keys(self) -> tuple[str, ...]:
        """The names of bitsandbytes' files."""
        return tuple(f"weight.{suffix}" if suffix else "weight" for suffix in self.quantized.to_state())

    def dequantize_into(self, out: Tensor) -> Tensor:
        """Writes the dense weight to `out` [out, in] and returns it."""
        return four_bit.dequantize_into(self.quantized, out)

    def _save_to_state_dict(self, destination: dict[str, Tensor], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        state = self.quantized.to_state()
        del state[""]
        destination.update({f"{prefix}weight.{suffix}": tensor for suffix, tensor in state.items()})

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *arguments: Any) -> None:
        weight = f"{prefix}weight"
        stored = {
            key: state_dict.pop(f"{prefix}{key}") for key in self.file_keys()[1:] if f"{prefix}{key}" in state_dict
        }
        if weight in state_dict and stored:
            quantized = self.weight_from_files({"weight": state_dict[weight], **stored}, prefix.removesuffix("."))
            for name in self._BUFFERS:
                value = getattr(quantized, name)
                setattr(self, name, value.to(self.codes.device) if value is not None else None)
            self._dense_weight = None
        super()._load_from_state_dict(state_dict, prefix, *arguments)

    def extra_repr(self) -> str:
        double = ", double quantisation" if self.nested_absmax is not None else ""
        return f"in_features={self.in_features}, out_features={self.out_features}, {self.TABLE.name}{double}"


class Nf4Linear(FourBitLinear):
    """`nn.Linear` with a frozen NF4 weight."""

    TABLE: ClassVar[CodeTable] = NF4_TABLE


class Fp4Linear(FourBitLinear):
    """`nn.Linear` with a frozen FP4 weight (bitsandbytes' FP4)."""

    TABLE: ClassVar[CodeTable] = FP4_TABLE


@dataclass(frozen=True, slots=True, kw_only=True)
class FourBitOptions(SkippedModules):
    """How linear layers are quantised to 4 bits.

    double_quantization: 8-bit scales: 4.127 instead of 4.5 bits per weight
    scale_search:        search each block's scale; 7% less error in NF4, 8% in FP4, the same format, a slower load
    """

    name: ClassVar[str]
    layer: ClassVar[type[FourBitLinear]]
    double_quantization: bool = True
    scale_search: bool = False

    def quantize_linear(self, layer: nn.Linear) -> FourBitLinear:
        """The same layer with its weight in 4 bits."""
        quantized = four_bit.quantize(
            layer.weight,
            self.layer.TABLE,
            double_quantization=self.double_quantization,
            scale_search=self.scale_search,
        )
        return self.layer(quantized, layer.bias)

    def num_bytes(self, rows: int, columns: int) -> int:
        """Bytes of codes and scales of a weight [rows, columns]."""
        return sum(weight_tensors(self.name, rows, columns, double_quantization=self.double_quantization))


@dataclass(frozen=True, slots=True, kw_only=True)
class Nf4Options(FourBitOptions):
    """How linear layers are quantised to NF4."""

    name: ClassVar[str] = "nf4"
    layer: ClassVar[type[FourBitLinear]] = Nf4Linear


@dataclass(frozen=True, slots=True, kw_only=True)
class Fp4Options(FourBitOptions):
    """How linear layers are quantised to FP4. NF4 has a quarter less error in the same space."""

    name: ClassVar[str] = "fp4"
    layer: ClassVar[type[FourBitLinear]] = Fp4Linear


NF4 = QuantizedFormat("nf4", Nf4Linear)
FP4 = QuantizedFormat("fp4", Fp4Linear)
