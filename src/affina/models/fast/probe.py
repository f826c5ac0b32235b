"""Whether this card computes what the definitions say, tried with the shapes of the model before it is trusted.

A compiler can be wrong for one shape on one card and right for all others, and a probe of the whole model is too short
to meet the tiles of long documents. Attention is the operation whose kernel is chosen by shape, so it is tried by
itself.
"""

from __future__ import annotations

import torch
from torch import Tensor

from affina.kernels.attention import Segments, attention, attention_backward
from affina.models.families import DecoderSpec

_LENGTHS = (1, 300, 3, 130)
"""Documents of several tiles and of less than one."""

ATTENTION_LIMIT = 0.05
"""Relative; rounding to bfloat16 explains 0.3% (measured on an H200), a wrong tile 20% and more."""


def attention_difference(spec: DecoderSpec, dtype: torch.dtype, device: torch.device) -> float:
    """The largest relative difference of output, ∂q, ∂k and ∂v between the card's attention and the definition."""
    num_tokens = sum(_LENGTHS)
    generator = torch.Generator().manual_seed(0)

    def normal(heads: int) -> Tensor:
        return torch.randn(num_tokens, heads, spec.head_dim, generator=generator).to(device, dtype)

    q, grad_output = normal(spec.num_heads), normal(spec.num_heads)
    k, v = normal(spec.num_kv_heads), normal(spec.num_kv_heads)
    bounds = torch.tensor([0, *_LENGTHS]).cumsum(0).to(torch.int32).to(device)
    segments = Segments.from_cu_seqlens(bounds, max_seqlen=max(_LENGTHS), lengths=_LENGTHS)

    def both_passes(window: int | None, inputs: list[Tensor], backend: str) -> list[Tensor]:
        query, key, value, gradient = inputs
        scale = spec.attention_scale
        result = attention(query, key, value, segments, scale=scale, window=window, backend=backend)
        gradients = attention_backward(gradient, query, key, value, result, segments, scale=scale, window=window)
        return [result.output, *gradients]

    worst = 0.0
    for window in {_shortened(window) for window in spec.windows}:
        found = both_passes(window, [q, k, v, grad_output], "auto")
        expected = both_passes(window, [tensor.float() for tensor in (q, k, v, grad_output)], "reference")
        differences = [float((f.float() - e).norm() / e.norm()) for f, e in zip(found, expected, strict=True)]
        worst = max(worst, *differences)
    return worst


def _shortened(window: int | None) -> int | None:
    """A window that the probe's documents exceed."""
    return None if window is None else min(window, 100)
