"""Frozen weights in e4m3, multiplied as they are: both products of a layer run on the 8-bit matrix units.

    forward:        y  = Q(x) Q_Wᵀ           rows of x quantised, one scale per token; one scale per row of W
    input gradient: ∂x = Q(∂y ∘ s_W) Q_W     the same weight: its scales lie on the contracted axis and go into ∂y

Activations and gradients are quantised as they come, row by row; norms write the codes of their output themselves
(`takes_quantized`). The adapter's own products stay in 16 bits, but its share u A of the input gradient is part of the
second product, as in 16 bits: [∂y u] [W; A], with u and A quantised like ∂y and W and with the same relative error. See
kernels/fp8.py for the error of each.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from affina.kernels.fp8 import (
    E4M3,
    GEMM_MULTIPLE,
    QuantizedRows,
    fp8_linear,
    fp8_linear_backward,
    quantize_rows,
)
from affina.models.weights import Fp8Linear


def can_multiply_fp8(layer: nn.Module) -> bool:
    """Whether the device of `layer` has 8-bit matrix units that take its size: CUDA since 8.9 (Ada, Hopper)."""
    if not isinstance(layer, Fp8Linear) or layer.weight.device.type != "cuda":
        return False
    sizes = (layer.out_features, layer.in_features)
    return torch.cuda.get_device_capability(layer.weight.device) >= (8, 9) and all(
        n % GEMM_MULTIPLE == 0 for n in sizes
    )


class Fp8Stack:
    """Codes of the layers below each other in one tensor, of which the layers' own become views."""

    num_extra = 0
    """No room beside gradients for low-rank parts: they meet in the codes."""
    takes_quantized = True

    def __init__(self, layers: Sequence[Fp8Linear]) -> None:
        self._ones = torch.ones(layers[0].in_features, dtype=torch.float32, device=layers[0].weight.device)
        sizes = [layer.out_features for layer in layers]
        self._codes = torch.cat([layer.weight.data.view(torch.uint8) for layer in layers]).view(E4M3)
        self._scale = torch.cat([layer.scale for layer in layers])
        for layer, codes in zip(layers, torch.split(self._codes.view(torch.uint8), sizes), strict=True):
            layer.weight.data = codes.view(E4M3)

    @property
    def shape(self) -> tuple[int, int]:
        return self._codes.shape[0], self._codes.shape[1]

    def forward(self, x: Tensor, *, quantized: QuantizedRows | None = None, out: Tensor | None = None) -> Tensor:
        codes, scale = quantized if quantized is not None else quantize_rows(x)
        return fp8_linear(codes, scale, self._codes, self._scale, out_dtype=x.dtype, out=out)

    def input_gradient(
        self, grad_output: Tensor, a: Tensor | None, u: Tensor | None = None, *, columns: slice = slice(None)
    ) -> Tensor:
        # Codes of some columns are gathered: the product takes contiguous ones.
        codes = self._codes.view(torch.uint8)[:, columns].contiguous().view(E4M3)
        a = a[:, columns] if a is not None else None
        ones = self._ones[columns]
        return fp8_linear_backward(grad_output, codes, self._scale, out_dtype=grad_output.dtype, u=u, a=a, ones=ones)

    def dense(self, out: Tensor) -> Tensor:
        return out.copy_(self._codes.float() * self._scale.unsqueeze(1))
