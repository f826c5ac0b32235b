"""A frozen linear layer whose weight is kept in 4-bit NF4 and expanded when it is used.

Forward:  y = x Ŵᵀ + b with Ŵ = dequantise(codes)
Backward: ∂x = ∂y Ŵ; the weight has no gradient.

The backward pass needs Ŵ again. Letting autograd keep it would store every layer's dense weight between the two
passes, all that 4 bits had saved; so only the packed codes are kept (they exist anyway) and Ŵ is expanded a second
time. Where memory is no issue, a small model on a laptop, `cache_dequantized` keeps Ŵ instead: same numbers, none of
the expansions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from affina.kernels import nf4
from affina.kernels.nf4 import Nf4Tensor


@dataclass(frozen=True, slots=True)
class Nf4Options:
    """How linear layers are quantised.

    double_quantization: 8-bit scales: 4.127 instead of 4.5 bits per weight
    scale_search:        search each block's scale; 7% less error, the same format, a slower load
    skip_modules:        names (or last parts of names) of linear layers that stay dense; the head is never quantised
    """

    double_quantization: bool = True
    scale_search: bool = False
    skip_modules: tuple[str, ...] = ("lm_head",)

    def skips(self, name: str) -> bool:
        """Whether the layer `name` stays dense: an entry equals its name or a dotted part of it."""
        return any(f".{skipped}." in f".{name}." for skipped in self.skip_modules)


class Nf4Linear(nn.Linear):
    """`nn.Linear` with a frozen NF4 weight.

    weight: [⌈out·in / 2⌉, 1] uint8 packed codes, as in bitsandbytes' files; scales are buffers that keep their types
            when the module is cast. It is a subclass so that adapter libraries see the linear layer that it is.
    """

    nested_absmax: Tensor | None
    nested_offset: Tensor | None
    absmax: Tensor
    _BUFFERS: ClassVar[tuple[str, ...]] = ("absmax", "nested_absmax", "nested_offset")

    def __init__(self, quantized: Nf4Tensor, bias: Tensor | None = None) -> None:
        nn.Module.__init__(self)  # nn.Linear's own would allocate the dense weight
        self.out_features, self.in_features = quantized.shape
        self.source_dtype = quantized.dtype
        self.weight = nn.Parameter(quantized.codes, requires_grad=False)
        for name in self._BUFFERS:
            self.register_buffer(name, getattr(quantized, name), persistent=False)
        bias_parameter = nn.Parameter(bias.detach(), requires_grad=False) if bias is not None else None
        self.register_parameter("bias", bias_parameter)
        self.keeps_dense_weight = False
        self._dense_weight: Tensor | None = None

    @property
    def quantized(self) -> Nf4Tensor:
        """The weight as the codec knows it; shares the layer's memory."""
        return Nf4Tensor(
            self.weight.data,
            self.absmax,
            self.nested_absmax,
            self.nested_offset,
            (self.out_features, self.in_features),
            self.source_dtype,
        )

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """[out, in] the dense weight in `dtype` (default: the type it was quantised from)."""
        return self.quantized.dequantize(dtype)

    def forward(self, input: Tensor) -> Tensor:
        """[…, in] → […, out] in the type of `input`, or autocast's."""
        device_type = input.device.type
        if torch.is_autocast_enabled(device_type):
            input = input.to(torch.get_autocast_dtype(device_type))
        bias = self.bias.to(input.dtype) if self.bias is not None else None
        if self.keeps_dense_weight:
            return nn.functional.linear(input, self.dense_weight(input.dtype), bias)
        if not (torch.is_grad_enabled() and input.requires_grad):
            return nn.functional.linear(input, self.dequantize(input.dtype), bias)
        with torch.autocast(device_type, enabled=False):
            output: Tensor = _FrozenLinear.apply(input, self.quantized, bias)  # type: ignore[no-untyped-call]
        return output

    def dense_weight(self, dtype: torch.dtype) -> Tensor:
        """[out, in] the dense weight, expanded at the first call and kept; see `cache_dequantized`."""
        if self._dense_weight is None or self._dense_weight.dtype != dtype:
            self._dense_weight = self.dequantize(dtype)
        return self._dense_weight

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Nf4Linear:
        # .to(bfloat16), .half() cast every floating buffer; scales cast to 16 bits would change the weight silently.
        exact = {name: getattr(self, name) for name in self._BUFFERS}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, before in exact.items():
            if before is not None:
                after = fn(before)
                setattr(self, name, after if after.dtype == before.dtype else before.to(after.device))
        self._dense_weight = None
        return self

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
                setattr(self, name, value.to(self.weight.device) if value is not None else None)
            self._dense_weight = None
        super()._load_from_state_dict(state_dict, prefix, *arguments)

    def extra_repr(self) -> str:
        double = ", double quantisation" if self.nested_absmax is not None else ""
        return f"in_features={self.in_features}, out_features={self.out_features}, nf4{double}"


class _FrozenLinear(torch.autograd.Function):
    """x Ŵᵀ + b that remembers the codes instead of Ŵ."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, quantized: Nf4Tensor, bias: Tensor | None) -> Tensor:
        ctx.quantized = quantized
        return nn.functional.linear(input, quantized.dequantize(input.dtype), bias)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, None, None]:
        if not ctx.needs_input_grad[0]:
            return None, None, None
        grad_output = grad_outputs[0]
        return grad_output @ ctx.quantized.dequantize(grad_output.dtype), None, None


@dataclass(frozen=True, slots=True)
class Nf4Format:
    """The weight format of `Nf4Linear`."""

    name: str = "nf4"

    def owns(self, layer: object) -> bool:
        return isinstance(layer, Nf4Linear)

    def dequantize(self, layer: nn.Module, dtype: torch.dtype | None = None) -> Tensor:
        assert isinstance(layer, Nf4Linear)
        return layer.dequantize(dtype)

    def shape(self, layer: nn.Module) -> tuple[int, int]:
        assert isinstance(layer, Nf4Linear)
        return layer.out_features, layer.in_features

    def num_bytes(self, layer: nn.Module) -> int:
        assert isinstance(layer, Nf4Linear)
        return layer.quantized.num_bytes

    def state_keys(self, layer: nn.Module) -> tuple[str, ...]:
        assert isinstance(layer, Nf4Linear)
        return tuple(f"weight.{suffix}" if suffix else "weight" for suffix in layer.quantized.to_state())


NF4 = Nf4Format()


def quantize_linears(model: nn.Module, options: Nf4Options, *, exclude: Iterable[nn.Module] = ()) -> tuple[str, ...]:
    """Replaces the linear layers of `model` by `Nf4Linear` on the instance, one after the other, and names them.

    `exclude` holds layers that stay dense whatever their name: the head, above all. Each dense weight is released
    before the next is quantised. Layers whose weight is shared with another module stay dense.
    """
    kept = {id(module) for module in exclude}
    owners: dict[int, int] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    replaced = []
    for name, module in list(model.named_modules()):
        if type(module) is not nn.Linear or id(module) in kept or options.skips(name) or owners[id(module.weight)] > 1:
            continue
        replace_module(model, name, quantize_linear(module, options))
        replaced.append(name)
    return tuple(replaced)


def quantize_linear(layer: nn.Linear, options: Nf4Options) -> Nf4Linear:
    """The same layer with its weight in NF4."""
    return Nf4Linear(quantize_weight(layer.weight, options), layer.bias)


def quantize_weight(weight: Tensor, options: Nf4Options) -> Nf4Tensor:
    """`weight` in NF4 as the options say."""
    return nf4.quantize(weight, double_quantization=options.double_quantization, scale_search=options.scale_search)


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Puts `module` at the dotted `name` inside `model`."""
    parent_name, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent_name), child, module)


def cache_dequantized(model: nn.Module, budget_bytes: int, dtype: torch.dtype) -> int:
    """Lets all NF4 layers keep their dense weight if together they need at most `budget_bytes`; returns the bytes, or
    0.

    Nothing else changes: the kept weight is the dequantised one. With 0 as budget kept weights are released.
    """
    layers = [module for module in model.modules() if isinstance(module, Nf4Linear)]
    needed = sum(layer.out_features * layer.in_features * dtype.itemsize for layer in layers)
    fits = 0 < needed <= budget_bytes
    for layer in layers:
        layer.keeps_dense_weight = fits
        layer._dense_weight = None
    return needed if fits else 0
