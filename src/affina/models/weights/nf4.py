"""A frozen linear layer whose weight is kept in 4-bit NF4: see `quantized` for its passes, the codec is the kernel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from affina.kernels import nf4
from affina.kernels.nf4 import Nf4Tensor
from affina.models.weights.quantized import QuantizedFormat, QuantizedLinear, SkippedModules


@dataclass(frozen=True, slots=True, kw_only=True)
class Nf4Options(SkippedModules):
    """How linear layers are quantised to NF4.

    double_quantization: 8-bit scales: 4.127 instead of 4.5 bits per weight
    scale_search:        search each block's scale; 7% less error, the same format, a slower load
    """

    name: ClassVar[str] = "nf4"
    double_quantization: bool = True
    scale_search: bool = False

    def quantize_linear(self, layer: nn.Linear) -> Nf4Linear:
        """The same layer with its weight in NF4."""
        quantized = nf4.quantize(
            layer.weight, double_quantization=self.double_quantization, scale_search=self.scale_search
        )
        return Nf4Linear(quantized, layer.bias)


class Nf4Linear(QuantizedLinear):
    """`nn.Linear` with a frozen NF4 weight.

    weight: [⌈out·in / 2⌉, 1] uint8 packed codes, as in bitsandbytes' files; scales are buffers that keep their types
            when the module is cast.
    """

    nested_absmax: Tensor | None
    nested_offset: Tensor | None
    absmax: Tensor
    _BUFFERS: ClassVar[tuple[str, ...]] = ("absmax", "nested_absmax", "nested_offset")
    EXACT = ("weight", *_BUFFERS)

    def __init__(self, quantized: Nf4Tensor, bias: Tensor | None = None) -> None:
        rows, columns = quantized.shape
        super().__init__(quantized.codes, (rows, columns), quantized.dtype, bias)
        for name in self._BUFFERS:
            self.register_buffer(name, getattr(quantized, name), persistent=False)

    @property
    def quantized(self) -> Nf4Tensor:
        """The weight as the codec knows it; shares the layer's memory."""
        return Nf4Tensor(
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
        return nf4.dequantize_into(self.quantized, out)

    def _save_to_state_dict(self, destination: dict[str, Tensor], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        state = self.quantized.to_state()
        del state[""]
        destination.update({f"{prefix}weight.{suffix}": tensor for suffix, tensor in state.items()})

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *arguments: Any) -> None:
        stored = {
            suffix: state_dict.pop(f"{prefix}weight.{suffix}")
            for suffix in nf4.STATE_SUFFIXES
            if f"{prefix}weight.{suffix}" in state_dict
        }
        if f"{prefix}weight" in state_dict and stored:
            stored[""] = state_dict[f"{prefix}weight"]
            quantized = Nf4Tensor.from_state(stored, f"{prefix}weight")
            for name in self._BUFFERS:
                value = getattr(quantized, name)
                setattr(self, name, value.to(self.codes.device) if value is not None else None)
            self._dense_weight = None
        super()._load_from_state_dict(state_dict, prefix, *arguments)

    def extra_repr(self) -> str:
        double = ", double quantisation" if self.nested_absmax is not None else ""
        return f"in_features={self.in_features}, out_features={self.out_features}, nf4{double}"


NF4 = QuantizedFormat("nf4", Nf4Linear)
