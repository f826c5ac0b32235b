"""Whether this card computes what the definitions say, tried with the shapes of the model before it is trusted.

A compiler can be wrong for one shape on one card and right for all others, and a probe of the whole model is too short
to meet the tiles of long documents. Attention is the operation whose kernel is chosen by shape, so it is tried by
itself.
"""

from __future__ import annotations

import torch
from torch import Tensor

from affina.kernels.attention import BACKENDS, Segments, attention, attention_backward, why_not
from affina.models.families import DecoderSpec

_LAYOUTS = ((1, 300, 3, 130), (256, 256))
"""Documents of several tiles and of less than one, and a dense batch."""

ATTENTION_LIMIT = 0.05
"""Relative; rounding to bfloat16 explains 0.3% (measured on an H200), a wrong tile 20% and more."""


def attention_difference(spec: DecoderSpec, dtype: torch.dtype, device: torch.device) -> float:
    """The largest relative difference of output, ∂q, ∂k and ∂v between attention on this device and the definition.

    Of every backend that takes the model's heads: which of them a row gets depends on its documents, and on whether
    deterministic kernels are asked for, which is not known yet.
    """
    return max(
        _difference(spec, dtype, device, lengths, window)
        for lengths in _LAYOUTS
        for window in {_shortened(window) for window in spec.windows}
    )


def _difference(
    spec: DecoderSpec, dtype: torch.dtype, device: torch.device, lengths: tuple[int, ...], window: int | None
) -> float:
    """The same for one row and one window."""
    generator = torch.Generator().manual_seed(0)

    def normal(heads: int) -> Tensor:
        return torch.randn(sum(lengths), heads, spec.head_dim, generator=generator).to(device, dtype)

    inputs = [normal(spec.num_heads), normal(spec.num_kv_heads), normal(spec.num_kv_heads), normal(spec.num_heads)]
    bounds = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32).to(device)
    segments = Segments.from_cu_seqlens(bounds, max_seqlen=max(lengths), lengths=lengths)

    def both_passes(q: Tensor, k: Tensor, v: Tensor, grad_output: Tensor, *, backend: str) -> list[Tensor]:
        result = attention(q, k, v, segments, scale=spec.attention_scale, window=window, backend=backend)
        gradients = attention_backward(
            grad_output, q, k, v, result, segments, scale=spec.attention_scale, window=window
        )
        return [result.output, *gradients]

    expected = both_passes(*(tensor.float() for tensor in inputs), backend="reference")
    usable = [name for name in BACKENDS if why_not(name, inputs[0], inputs[2], segments, window) is None]
    return max(
        float((found.float() - exact).norm() / exact.norm())
        for backend in usable
        for found, exact in zip(both_passes(*inputs, backend=backend), expected, strict=True)
    )


def _shortened(window: int | None) -> int | None:
    """A window that the probe's documents exceed."""
    return None if window is None else min(window, 100)
