"""Weights of one byte each, expanded: int8 and e4m3 codes times the scale of their row.

**Maths.** ŵ_nk = q_nk · s_n in float32, rounded once to the type of the result. Both kinds of codes are exact in every
floating type that a model computes in, so only that one rounding happens, here and in the kernel alike.

**Bytes.** 1 read and 2 written per number in 16 bits. PyTorch's operations take two passes, a conversion and a product
in place, and move 7.
"""

from __future__ import annotations

import torch
from torch import Tensor

from affina.kernels.dispatch import use_triton
from affina.kernels.fp8 import E4M3, can_convert_in_kernels


@torch.no_grad()
def expand_rows(codes: Tensor, scale: Tensor, out: Tensor) -> Tensor:
    """Writes codes · scale to `out` and returns it.

    codes: [M, K] int8 or e4m3; rows may be apart
    scale: [M] fp32
    out:   [M, K] bf16, fp16 or fp32; rows may be apart
    """
    assert codes.shape == out.shape, f"{tuple(codes.shape)} codes for {tuple(out.shape)} numbers"
    assert scale.shape == codes.shape[:1], "one scale for each row"
    assert codes.dtype in (torch.int8, E4M3), f"{codes.dtype} codes"
    assert out.dtype in (torch.float32, torch.bfloat16, torch.float16), f"cannot expand to {out.dtype}"
    is_dense = codes.stride(-1) == 1 and out.stride(-1) == 1
    converts = codes.dtype == torch.int8 or can_convert_in_kernels(out.device)
    if out.numel() == 0 or not (use_triton(out) and is_dense and converts):
        return out.copy_(codes).mul_(scale.unsqueeze(1))
    from affina.kernels.triton import row_scaled as kernel

    kernel.expand_rows(codes, scale, out)
    return out
