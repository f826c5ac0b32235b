"""Frozen weights of the fused decoder: a stack of projections with a common input, in any weight format.

Each format offers the products that training a frozen layer needs, and nothing else:

    forward:        y  = x Wᵀ            [M, in] → [M, out]
    input gradient: ∂x = ∂y W + u A      [M, out + R] → [M, in]

The second is one product of [∂y u] with W and, below it, A: the adapter's share of the gradient costs no pass over ∂x
of its own. For that every stack has room for R more rows under its weight.

The weights are the transformers model's own: dense ones move into a tensor with that room, of which the layers'
weights become views; quantised ones stay where they are and are expanded into a workspace when they are used.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from affina.kernels.fp8 import QuantizedRows
from affina.models.fast.fp8 import Fp8Stack, can_multiply_fp8
from affina.models.weights import Fp8Linear, QuantizedLinear


class FrozenStack(Protocol):
    """Σ out rows of weights in some format."""

    @property
    def shape(self) -> tuple[int, int]:
        """(Σ out, in)"""
        ...

    @property
    def num_extra(self) -> int:
        """R, the room below the weights; 0 where gradients need no room for u beside them."""
        ...

    @property
    def takes_quantized(self) -> bool:
        """Whether `forward` multiplies e4m3 codes of x."""
        ...

    def forward(self, x: Tensor, *, quantized: QuantizedRows | None = None, out: Tensor | None = None) -> Tensor:
        """[M, in] → [M, Σ out]; the row stride of `out` may be larger.

        quantized: codes of x, where they exist already and `takes_quantized`
        """
        ...

    def input_gradient(
        self, grad_output: Tensor, a: Tensor | None, u: Tensor | None = None, *, columns: slice = slice(None)
    ) -> Tensor:
        """[M, Σ out + R] → [M, in], or some columns of it. a: [R, in], or None without an adapter; u: [M, R] where
        `num_extra` is 0."""
        ...

    def dense(self, out: Tensor) -> Tensor:
        """The weight, [Σ out, in], written into `out`."""
        ...


class Workspace:
    """Memory for one expanded weight at a time, shared by all layers: as large as the largest stack, or layer of one.

    Products that read it are queued before the next expansion on the same stream, so nothing is overwritten early.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self._buffer = torch.empty(0, dtype=dtype, device=device)

    @property
    def num_bytes(self) -> int:
        return self._buffer.nbytes

    def reserve(self, num_elements: int) -> None:
        """Make room. Only before the first use: tensors handed out earlier keep the old memory."""
        if num_elements > self._buffer.numel():
            self._buffer = self._buffer.new_empty(num_elements)

    def matrix(self, rows: int, columns: int) -> Tensor:
        """[rows, columns] view; the contents are whatever was expanded last."""
        return self._buffer[: rows * columns].view(rows, columns)


class DenseStack:
    """Weights in the type of the computation. num_extra: R, rows of room below them."""

    takes_quantized = False

    def __init__(self, layers: Sequence[nn.Linear], num_extra: int) -> None:
        self.num_extra = num_extra
        self._buffer, self._weight = _as_one_tensor(layers, num_extra)

    @property
    def shape(self) -> tuple[int, int]:
        return self._weight.shape[0], self._weight.shape[1]

    def forward(self, x: Tensor, *, quantized: QuantizedRows | None = None, out: Tensor | None = None) -> Tensor:
        assert quantized is None, "16-bit weights take 16-bit rows"
        return torch.mm(x, self._weight.t(), out=out)

    def input_gradient(
        self, grad_output: Tensor, a: Tensor | None, u: Tensor | None = None, *, columns: slice = slice(None)
    ) -> Tensor:
        assert u is None, "u lies beside the gradient"
        if a is None:
            return grad_output @ self._weight[:, columns]
        self._buffer[self.shape[0] :].copy_(a)
        return grad_output @ self._buffer[:, columns]

    def dense(self, out: Tensor) -> Tensor:
        return out.copy_(self._weight)


class ExpandedStack:
    """Quantised weights of any format, expanded into the workspace before each product.

    splits: expand one layer after the other, so that the workspace need only hold the largest. Their shares of the
            input gradient are then added up in the type of the computation.
    """

    takes_quantized = False

    def __init__(
        self, layers: Sequence[QuantizedLinear], num_extra: int, workspace: Workspace, *, splits: bool = False
    ) -> None:
        self.num_extra = num_extra
        self._layers = tuple(layers)
        self._rows = [layer.out_features for layer in layers]
        self.shape = sum(self._rows), layers[0].in_features
        self._workspace = workspace
        self._splits = splits and len(layers) > 1
        at_once = max(*self._rows[:-1], self._rows[-1] + num_extra) if self._splits else sum(self._rows) + num_extra
        workspace.reserve(at_once * layers[0].in_features)

    def forward(self, x: Tensor, *, quantized: QuantizedRows | None = None, out: Tensor | None = None) -> Tensor:
        assert quantized is None, "16-bit weights take 16-bit rows"
        if not self._splits:
            return torch.mm(x, self._expand(self._layers).t(), out=out)
        product = x.new_empty(x.shape[0], self.shape[0]) if out is None else out
        for layer, part in zip(self._layers, torch.split(product, self._rows, dim=1), strict=True):
            torch.mm(x, self._expand([layer]).t(), out=part)
        return product

    def input_gradient(
        self, grad_output: Tensor, a: Tensor | None, u: Tensor | None = None, *, columns: slice = slice(None)
    ) -> Tensor:
        assert u is None, "u lies beside the gradient"
        if not self._splits:
            return grad_output @ self._expand(self._layers, a)[:, columns]
        parts = torch.split(grad_output, [*self._rows[:-1], grad_output.shape[1] - sum(self._rows[:-1])], dim=1)
        gradient = parts[0] @ self._expand(self._layers[:1])[:, columns]
        for index in range(1, len(parts)):
            below = a if index == len(parts) - 1 else None
            gradient.addmm_(parts[index], self._expand(self._layers[index : index + 1], below)[:, columns])
        return gradient

    def dense(self, out: Tensor) -> Tensor:
        return self._write(self._layers, out)

    def _expand(self, layers: Sequence[QuantizedLinear], below: Tensor | None = None) -> Tensor:
        """The weights of `layers` and the rows of `below`, one under the other, in the workspace."""
        rows = sum(layer.out_features for layer in layers)
        extra = below.shape[0] if below is not None else 0
        weight = self._workspace.matrix(rows + extra, self.shape[1])
        self._write(layers, weight[:rows])
        if below is not None:
            weight[rows:].copy_(below)
        return weight

    @staticmethod
    def _write(layers: Sequence[QuantizedLinear], out: Tensor) -> Tensor:
        parts = torch.split(out, [layer.out_features for layer in layers]) if len(layers) > 1 else (out,)
        for layer, part in zip(layers, parts, strict=True):
            if layer.keeps_dense_weight:
                part.copy_(layer.dense_weight(out.dtype))
            else:
                layer.dequantize_into(part)
        return out


def build_stack(
    layers: Sequence[nn.Module], num_extra: int, workspace: Workspace, *, splits: bool = False
) -> FrozenStack | None:
    """The stack of `layers` in their common format, or None when they have none that is known here.

    splits: see `ExpandedStack`
    """
    if all(isinstance(layer, Fp8Linear) for layer in layers) and can_multiply_fp8(layers[0]):
        return Fp8Stack([layer for layer in layers if isinstance(layer, Fp8Linear)])
    if all(isinstance(layer, QuantizedLinear) for layer in layers):
        quantized = [layer for layer in layers if isinstance(layer, QuantizedLinear)]
        return ExpandedStack(quantized, num_extra, workspace, splits=splits)
    if all(type(layer) is nn.Linear for layer in layers):
        return DenseStack([layer for layer in layers if isinstance(layer, nn.Linear)], num_extra)
    return None


def _as_one_tensor(layers: Sequence[nn.Linear], num_extra: int) -> tuple[Tensor, Tensor]:
    """The layers' weights below each other in one tensor with `num_extra` more rows, and the view of the weights alone.

    The layers' own weights become views of it.
    """
    if len(layers) == 1 and num_extra == 0:
        return layers[0].weight.data, layers[0].weight.data
    sizes = [layer.out_features for layer in layers]
    buffer = layers[0].weight.data.new_zeros(sum(sizes) + num_extra, layers[0].in_features)
    weight = buffer[: sum(sizes)]
    for layer, part in zip(layers, torch.split(weight, sizes), strict=True):
        part.copy_(layer.weight.data)
        layer.weight.data = part
    return buffer, weight
