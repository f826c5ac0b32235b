"""Triton kernel of `affina.kernels.linear_cross_entropy.cross_entropy_rows`: the loss of each row and its gradient.

Legend: C rows, V vocabulary, B logits that a program holds at once; u raw logits, z = cap(s · u), p = softmax(z).

One program owns a row and reads it twice:

1. maximum m and sum ℓ = Σ exp(z − m) in one pass. With every tile the maximum may grow; the sums so far are then
   multiplied by exp(m_old − m_new) (Milakov and Gimelshein, *Online normalizer calculation for softmax*,
   arXiv:1805.02867). The sums stay one per lane and are added up once, after the last tile: a fixed order. A tile's
   maximum is the only reduction inside the loop.
2. (exp(z − m) / ℓ − e_y) ∘ ∂z/∂u, cast and stored. Tiles come in *reverse* order: the last ones read are still in the
   second-level cache, the first ones are not.

Bytes per logit: 4 + 4 read (2 + 2 from 16-bit logits) and 2 written for a 16-bit gradient, where the chain of PyTorch
operations reads and writes float32 seven times. The loss is m + log ℓ − z_y. All arithmetic is float32; row offsets are
64 bits wide. tanh is written as 1 − 2 / (1 + exp(2x)): exact at both ends, and its absolute error, 1e-7, is multiplied
by a cap of 30 or 50, as tanh's own rounding would be. A target outside the vocabulary makes the loss NaN instead of
reading foreign memory.
"""

# Triton has no types, and its decorator hides those of a kernel.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, misc, import-untyped, import-not-found"
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from affina.kernels.triton.launch import ceil_div, launch, power_of_two

MAX_TILE = 8192
IGNORED_LABEL = -100


@triton.jit
def _tanh(x):
    return 1.0 - 2.0 / (1.0 + tl.exp(2.0 * x))


@triton.jit
def _bounded(u, inverse_cap, HAS_CAP: tl.constexpr):
    """tanh(u / c), of which z is the c-fold, or u itself without a cap."""
    if HAS_CAP:
        u = _tanh(u * inverse_cap)
    return u


@triton.jit
def _raw_logits(row, bias, column, inside, logit_scale, HAS_BIAS: tl.constexpr, HAS_SCALE: tl.constexpr):
    """float32 scale · (logits + bias), before the cap."""
    u = tl.load(row + column, mask=inside, other=0.0).to(tl.float32)
    if HAS_BIAS:
        u += tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
    if HAS_SCALE:
        u *= logit_scale
    return u


@triton.jit
def _cross_entropy_kernel(
    logits,
    bias,
    targets,
    losses,
    error,
    logits_stride,
    error_stride,
    V,
    softcap,
    inverse_cap,
    logit_scale,
    NUM_TILES: tl.constexpr,
    B: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_CAP: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_ERROR: tl.constexpr,
    IGNORED: tl.constexpr,
):
    index = tl.program_id(0).to(tl.int64)
    row = logits + index * logits_stride
    target = tl.load(targets + index)
    lane = tl.arange(0, B)

    if target == IGNORED:
        tl.store(losses + index, 0.0)
        if HAS_ERROR:
            nothing = tl.zeros([B], dtype=tl.float32).to(error.dtype.element_ty)
            for tile in range(NUM_TILES):
                column = tile * B + lane
                tl.store(error + index * error_stride + column, nothing, mask=column < V)
    else:
        # Read before anything is written: the gradient may replace the logits.
        exists = (target >= 0) & (target < V)
        picked = _raw_logits(row, bias, target, exists, logit_scale, HAS_BIAS, HAS_SCALE)
        picked = _bounded(picked, inverse_cap, HAS_CAP) * softcap
        picked = tl.where(exists, picked, float("nan"))

        # Not -inf: a tile of logits that are all -inf must add exp(-inf) = 0, not exp(-inf + inf).
        maximum = tl.full([], -3.0e38, dtype=tl.float32)
        sums = tl.zeros([B], dtype=tl.float32)
        for tile in range(NUM_TILES):
            column = tile * B + lane
            inside = column < V
            u = _raw_logits(row, bias, column, inside, logit_scale, HAS_BIAS, HAS_SCALE)
            z = tl.where(inside, _bounded(u, inverse_cap, HAS_CAP) * softcap, float("-inf"))
            larger = tl.maximum(maximum, tl.max(z, axis=0))
            sums = sums * tl.exp(maximum - larger) + tl.exp(z - larger)
            maximum = larger
        total = tl.sum(sums, axis=0)
        tl.store(losses + index, maximum + tl.log(total) - picked)

        if HAS_ERROR:
            inverse = 1.0 / total
            for step in range(NUM_TILES):
                column = (NUM_TILES - 1 - step) * B + lane
                inside = column < V
                u = _raw_logits(row, bias, column, inside, logit_scale, HAS_BIAS, HAS_SCALE)
                bounded = _bounded(u, inverse_cap, HAS_CAP)
                difference = tl.exp(bounded * softcap - maximum) * inverse - tl.where(column == target, 1.0, 0.0)
                if HAS_CAP:
                    difference *= 1.0 - bounded * bounded
                if HAS_SCALE:
                    difference *= logit_scale
                position = error + index * error_stride + column
                tl.store(position, difference.to(error.dtype.element_ty), mask=inside)


def cross_entropy_rows(
    logits: Tensor,
    targets: Tensor,
    *,
    losses: Tensor,
    error: Tensor | None,
    bias: Tensor | None,
    softcap: float | None,
    logit_scale: float,
) -> None:
    """Launches the kernel; arguments as in `affina.kernels.linear_cross_entropy.cross_entropy_rows`."""
    rows, vocabulary = logits.shape
    if rows == 0:
        return
    tile = min(MAX_TILE, max(128, power_of_two(vocabulary)))
    launch(
        _cross_entropy_kernel,
        (rows,),
        logits,
        bias if bias is not None else logits,
        targets,
        losses,
        error if error is not None else logits,
        logits.stride(0),
        error.stride(0) if error is not None else 0,
        vocabulary,
        softcap if softcap is not None else 1.0,
        1.0 / softcap if softcap is not None else 1.0,
        logit_scale,
        NUM_TILES=ceil_div(vocabulary, tile),
        B=tile,
        HAS_BIAS=bias is not None,
        HAS_CAP=softcap is not None,
        HAS_SCALE=logit_scale != 1.0,
        HAS_ERROR=error is not None,
        IGNORED=IGNORED_LABEL,
        num_warps=min(16, max(4, tile // 512)),
    )
