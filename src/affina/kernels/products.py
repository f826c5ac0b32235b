"""Thin products that are gradients of a factor: summed over the tokens in float32 and never rounded to 16 bits."""

from __future__ import annotations

import torch
from torch import Tensor


def product_into(
    left: Tensor,
    right: Tensor,
    out: Tensor,
    *,
    factor: float = 1.0,
    columns: Tensor | None = None,
    accumulates: bool = False,
) -> None:
    """out = factor · left @ right ∘ columns, or is increased by it.

    left, right: [N, M] and [M, K] of one type, M the tokens; transposed views are welcome
    out:         [N, K] float32 (float64 for float64 factors); sums are kept in its type
    columns:     [K] factors on the result's columns
    accumulates: add to what `out` holds; otherwise what it holds is not read, not even a NaN
    """
    target = torch.empty_like(out) if accumulates else out
    if left.dtype == out.dtype:
        torch.mm(left, right, out=target)
    elif left.device.type == "cuda":
        torch.mm(left, right, out_dtype=out.dtype, out=target)
    else:
        torch.mm(left.to(out.dtype), right.to(out.dtype), out=target)
    if columns is not None:
        target *= columns
    if factor != 1.0:
        target *= factor
    if accumulates:
        out += target
