"""8-bit integers with one scale per row: quantise and dequantise.

**Maths.** Symmetric, so that 0 stays 0 and no zero point enters a product. A row is scaled so that its largest
magnitude lands on 127, then rounded to the nearest integer, halves to the even one:

    t = max |x_k|       s = t / 127  (1 for a row of zeros)       q_k = round(x_k · (127 / t))       x̂_k = q_k · s

Both quotients are float32 divisions, and the product is float32 before it is rounded. Nothing has to be clamped:
x · (127 / t) is at most 127 (1 + 2⁻²³), which rounds to 127; −128 is never used. Rows whose largest number is below
127 · 2⁻¹²⁶ are scaled by 2¹²⁶, the largest factor that does not overflow.

**Error.** The step s is the same over the whole row, and where a row's numbers spread over many steps the rounding
error is as good as uniform in ±s/2, whatever the number's size:

    σ_error = s / √12 = t / (127 √12) = t / 440

A number is thus off by at most t / 254, and by t / 440 in the root mean square. For normal weights t is 3.5 to 4 σ in
rows of a few thousand, so 0.8% to 0.9% of σ: a third of e4m3's 2.6%, whose error is relative to each number. A row with
one number 20 times the spread pays for it in all others; there e4m3, whose steps shrink with the numbers, is better
(`affina.kernels.fp8`). Symmetric per-row scales: Dettmers et al., *LLM.int8()*, arXiv:2208.07339, §2.1 and §3.1
(vector-wise quantisation).

**Bytes.** Quantising reads 2 (or 4) and writes 1 per number. NaN and infinity give a scale that is not finite; whoever
quantises weights looks at the scales.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

LARGEST = 127.0
SMALLEST_MAXIMUM = LARGEST * 2.0**-126
"""Below it 127 / max would overflow float32."""


@torch.no_grad()
def quantize_rows(x: Tensor, *, out: Tensor | None = None, scale_out: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """x as integers and the scale of every row: ([M, K] int8, [M] float32) with x ≈ codes · scale.

    x:         [M, K] bf16, fp16 or fp32
    out:       [M, K] int8 memory for the codes
    scale_out: [M] fp32 memory for the scales
    """
    assert x.dim() == 2, f"rows of a matrix, got {tuple(x.shape)}"
    codes = out if out is not None else torch.empty(x.shape, dtype=torch.int8, device=x.device)
    scale = scale_out if scale_out is not None else torch.empty(x.shape[0], dtype=torch.float32, device=x.device)
    assert codes.shape == x.shape, f"{tuple(codes.shape)} memory for {tuple(x.shape)} codes"
    assert codes.dtype == torch.int8, f"{codes.dtype} memory for int8"
    assert scale.shape == x.shape[:1], "one scale for each row"
    assert scale.dtype == torch.float32, f"scales are float32, not {scale.dtype}"
    if x.numel() == 0:
        return codes, scale.fill_(1.0)
    maximum = x.abs().amax(dim=1).float()
    clamped = maximum.clamp(min=SMALLEST_MAXIMUM)
    largest = torch.full_like(clamped, LARGEST)
    scale.copy_(torch.where(maximum == 0, torch.ones_like(maximum), scale_of(clamped)))
    codes.copy_((x.float() * (largest / clamped).unsqueeze(1)).round_())
    return codes, scale


def scale_of(maximum: Tensor) -> Tensor:
    """t / 127 for maxima t, float32."""
    # Tensor by tensor: PyTorch divides a tensor by a number, or a number by it, as a product with a rounded reciprocal.
    return maximum / torch.full_like(maximum, LARGEST)


def maxima_of(scale: Tensor) -> Tensor:
    """Maxima t with `scale_of(t)` equal to `scale` bit for bit: what files hold.

    s · 127 is off by less than two units in the last place (one rounding of the quotient, one of the product), so t is
    it or one of its neighbours.
    """
    product = scale * LARGEST
    maxima = product
    for neighbour in (math.inf, 0.0):
        candidate = torch.nextafter(product, torch.full_like(product, neighbour))
        maxima = torch.where(scale_of(maxima) == scale, maxima, candidate)
    return maxima


@torch.no_grad()
def dequantize_rows(codes: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """[M, K] codes · scale in `dtype`: the float32 product, rounded once."""
    return (codes.float() * scale.unsqueeze(1)).to(dtype)
