"""What every linear layer with a quantised frozen weight has in common: its passes, and its place in a model.

Forward:  y = x Ŵᵀ + b with Ŵ = dequantise(codes)
Backward: ∂x = ∂y Ŵ; the weight has no gradient.

The backward pass needs Ŵ again. Letting autograd keep it would store every layer's dense weight between the two
passes, all that quantising had saved; so only the codes are kept (they exist anyway) and Ŵ is expanded a second
time. Where memory is no issue, a small model on a laptop, `cache_dequantized` keeps Ŵ instead: same numbers, none of
the expansions.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, Self

import torch
from torch import Tensor, nn


class QuantizedWeight(Protocol):
    """Codes and scales of one weight."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the dense weight."""
        ...

    @property
    def num_bytes(self) -> int: ...

    def to(self, device: torch.device) -> Self:
        """The same weight on `device`."""
        ...

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """[out, in] the dense weight in `dtype` (default: the type it was quantised from)."""
        ...


class WeightFormatOptions(Protocol):
    """How the linear layers of a model are to be quantised: which of them, and into what."""

    @property
    def name(self) -> str:
        """Of the format, as in `quantization.format`."""
        ...

    @property
    def layer(self) -> type[QuantizedLinear]:
        """The kind of layer that keeps such a weight."""
        ...

    def skips(self, name: str) -> bool:
        """Whether the layer `name` stays dense."""
        ...

    def quantize_linear(self, layer: nn.Linear) -> QuantizedLinear:
        """The same layer with its weight quantised. Raises ModelError[weights-not-finite]."""
        ...

    def num_bytes(self, rows: int, columns: int) -> int:
        """Bytes of a quantised weight [rows, columns]."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class SkippedModules:
    """The part that all formats' options share.

    skip_modules: names (or parts of names) of linear layers that stay dense; the head is never quantised
    """

    skip_modules: tuple[str, ...] = ("lm_head",)

    def skips(self, name: str) -> bool:
        """Whether the layer `name` stays dense: an entry equals its name or a dotted part of it."""
        return any(f".{skipped}." in f".{name}." for skipped in self.skip_modules)


class QuantizedLinear(nn.Linear):
    """`nn.Linear` with a frozen quantised weight. It is a subclass so that adapter libraries see the linear layer.

    EXACT: names of the codes and scales, whose types no cast of the module changes
    """

    EXACT: ClassVar[tuple[str, ...]] = ("weight",)

    @abstractmethod
    def __init__(self, quantized: Any, bias: Tensor | None = None) -> None:
        """A layer around a weight of its format, which it shares."""

    def _set_up(self, codes: Tensor, shape: tuple[int, int], source_dtype: torch.dtype, bias: Tensor | None) -> None:
        nn.Module.__init__(self)  # nn.Linear's own would allocate the dense weight
        self.out_features, self.in_features = shape
        self.source_dtype = source_dtype
        self.weight = nn.Parameter(codes, requires_grad=False)
        bias_parameter = nn.Parameter(bias.detach(), requires_grad=False) if bias is not None else None
        self.register_parameter("bias", bias_parameter)
        self.keeps_dense_weight = False
        self._dense_weight: Tensor | None = None

    @classmethod
    @abstractmethod
    def file_keys(cls) -> tuple[str, ...]:
        """Names that the weight's tensors may have in a checkpoint, relative to the layer; "weight" is the first."""

    @classmethod
    @abstractmethod
    def weight_from_files(cls, tensors: Mapping[str, Tensor], name: str) -> QuantizedWeight:
        """The weight from a checkpoint's tensors by `file_keys`; `name` of the layer, for messages.

        Raises ModelError[quantized-weights-unreadable].
        """

    @classmethod
    def from_files(cls, tensors: Mapping[str, Tensor], name: str, *, bias: Tensor | None, device: torch.device) -> Self:
        """The layer `name` on `device` from a checkpoint's tensors by `file_keys`.

        Raises ModelError[quantized-weights-unreadable].
        """
        return cls(cls.weight_from_files(tensors, name).to(device), bias)

    @property
    def codes(self) -> Tensor:
        """The quantised weight's own tensor, also where `weight` shows something else (see `dense_view`)."""
        codes = self._parameters["weight"]
        assert codes is not None
        return codes

    @property
    @abstractmethod
    def quantized(self) -> QuantizedWeight:
        """The weight as its codec knows it; shares the layer's memory."""

    @property
    @abstractmethod
    def state_keys(self) -> tuple[str, ...]:
        """Names of the weight's tensors in the state dict, relative to the layer."""

    @abstractmethod
    def dequantize_into(self, out: Tensor) -> Tensor:
        """Writes the dense weight to `out` [out, in], whose rows may be apart, and returns it."""

    @property
    def compute_dtype(self) -> torch.dtype:
        """The type in which PEFT makes an adapter's matrices; it would take the type of the codes otherwise."""
        return torch.float32

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

    def keep_dense_weight(self, keeps: bool) -> None:
        """Whether the dense weight is kept from the next use on. One that is kept already is released."""
        self.keeps_dense_weight = keeps
        self._dense_weight = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        exact = [tensor for name in self.EXACT if (tensor := self._own_tensor(name)) is not None]
        super()._apply(keeping_types(fn, exact), recurse)  # type: ignore[no-untyped-call]
        self._dense_weight = None
        return self

    def _own_tensor(self, name: str) -> Tensor | None:
        return self._parameters[name] if name in self._parameters else self._buffers[name]


def keeping_types(fn: Callable[[Tensor], Tensor], exact: Iterable[Tensor]) -> Callable[[Tensor], Tensor]:
    """What `Module._apply` does to its tensors, but for the types of those in `exact`.

    `.to(bfloat16)` and `.half()` cast every floating tensor; scales or 8-bit floats in another type would change the
    weight, or its size, silently.
    """
    kept = {id(tensor) for tensor in exact}

    def moved(tensor: Tensor) -> Tensor:
        after = fn(tensor)
        return tensor.to(after.device) if id(tensor) in kept and after.dtype != tensor.dtype else after

    return moved


class _FrozenLinear(torch.autograd.Function):
    """x Ŵᵀ + b that remembers the codes instead of Ŵ."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, quantized: QuantizedWeight, bias: Tensor | None) -> Tensor:
        ctx.quantized = quantized
        return nn.functional.linear(input, quantized.dequantize(input.dtype), bias)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, None, None]:
        if not ctx.needs_input_grad[0]:
            return None, None, None
        grad_output = grad_outputs[0]
        return grad_output @ ctx.quantized.dequantize(grad_output.dtype), None, None


@dataclass(frozen=True, slots=True)
class QuantizedFormat:
    """The weight format of one kind of quantised layer."""

    name: str
    kind: type[QuantizedLinear]

    def owns(self, layer: object) -> bool:
        return isinstance(layer, self.kind)

    def dequantize(self, layer: nn.Module, dtype: torch.dtype | None = None) -> Tensor:
        return self._own(layer).dequantize(dtype)

    def shape(self, layer: nn.Module) -> tuple[int, int]:
        own = self._own(layer)
        return own.out_features, own.in_features

    def num_bytes(self, layer: nn.Module) -> int:
        return self._own(layer).quantized.num_bytes

    def state_keys(self, layer: nn.Module) -> tuple[str, ...]:
        return self._own(layer).state_keys

    def _own(self, layer: nn.Module) -> QuantizedLinear:
        assert isinstance(layer, self.kind), f"{type(layer).__name__} is not kept as {self.name}"
        return layer


def quantize_linears(
    model: nn.Module, options: WeightFormatOptions, *, exclude: Iterable[nn.Module] = ()
) -> tuple[str, ...]:
    """Quantises the linear layers of `model` on the instance, one after the other, and names them.

    `exclude` holds layers that stay dense whatever their name: the head, above all. Each dense weight is released
    before the next is quantised. Layers whose weight is shared with another module stay dense.
    """
    kept = {id(module) for module in exclude}
    owners: dict[int, int] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    replaced = []
    for name in _names(model):
        module = model.get_submodule(name)
        if type(module) is not nn.Linear or id(module) in kept or options.skips(name) or owners[id(module.weight)] > 1:
            continue
        replace_module(model, name, options.quantize_linear(module))
        replaced.append(name)
    return tuple(replaced)


@torch.no_grad()
def expand_linears(model: nn.Module, dtype: torch.dtype) -> None:
    """Puts a dense frozen layer with the same numbers, in `dtype`, in the place of every quantised linear layer.

    For what writes to weights, as PEFT's merging does. Each layer's codes are released before the next is expanded.
    """
    for name in _names(model):
        module = model.get_submodule(name)
        if not isinstance(module, QuantizedLinear):
            continue
        dense = nn.Linear(module.in_features, module.out_features, bias=False, device="meta")
        dense.weight = nn.Parameter(module.dequantize(dtype), requires_grad=False)
        dense.bias = module.bias
        replace_module(model, name, dense.train(module.training))


def _names(model: nn.Module) -> list[str]:
    """Of every module: a list of the modules themselves would keep alive what is replaced on the way."""
    return [name for name, _ in model.named_modules()]


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Puts `module` at the dotted `name` inside `model`."""
    parent_name, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent_name), child, module)


def quantized_layers(model: nn.Module) -> tuple[QuantizedLinear, ...]:
    """Every quantised linear layer of `model`."""
    return tuple(module for module in model.modules() if isinstance(module, QuantizedLinear))


def cache_dequantized(model: nn.Module, budget_bytes: int, dtype: torch.dtype) -> int:
    """Lets all quantised layers keep their dense weight if together they need at most `budget_bytes`; returns the
    bytes, or 0.

    Nothing else changes: the kept weight is the dequantised one. With 0 as budget kept weights are released.
    """
    layers = quantized_layers(model)
    needed = sum(layer.out_features * layer.in_features * dtype.itemsize for layer in layers)
    fits = 0 < needed <= budget_bytes
    for layer in layers:
        layer.keep_dense_weight(fits)
    return needed if fits else 0
