"""Triton kernels of `affina.kernels.adamw`: the step, the norm of the gradients and the factor that clips them.

Legend: P parameters, B of them in one block of a program.

The step is one pass; a thread moves 16 bytes at once and has eight loads under way. Square root and quotient are the
GPU's approximate ones, each within 2 units in the last place *of the update*, which is a thousandth of the parameter:
correctly rounded ones take a slow path wherever v = 0, as it is for every A matrix in the first step (B = 0 then).

The norm takes two launches: at most `MAX_PARTS` programs sum the squares of every MAX_PARTS-th block, lane by lane, and
add the lanes up at their end; one program adds these sums. Which program sums what depends on P alone, so the order of
all additions is fixed. Offsets are 64 bits wide.
"""

# Triton has no types, and its decorator hides those of a kernel.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, misc, import-untyped, import-not-found"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from affina.kernels.adamw import CLIP_EPSILON, Coefficients
from affina.kernels.triton.launch import ceil_div, launch, power_of_two

STEP_BLOCK = 1024
NORM_BLOCK = 4096
MAX_PARTS = 1024


@triton.jit
def _adamw_kernel(
    parameters,
    gradients,
    first_moment,
    second_moment,
    factor,
    P,
    keep,
    new_first,
    keep_second,
    new_second,
    step_size,
    inverse_root_correction,
    epsilon,
    B: tl.constexpr,
    FACTOR_ON_DEVICE: tl.constexpr,
):
    scale = tl.load(factor) if FACTOR_ON_DEVICE else factor
    # The difference of a number to itself is 0, unless it is NaN or infinite.
    if (scale != 0.0) & (scale - scale == 0.0):
        place = tl.program_id(0).to(tl.int64) * B + tl.arange(0, B)
        mask = place < P
        theta = tl.load(parameters + place, mask=mask, other=0.0) * keep
        gradient = tl.load(gradients + place, mask=mask, other=0.0) * scale
        first = tl.load(first_moment + place, mask=mask, other=0.0)
        second = tl.load(second_moment + place, mask=mask, other=0.0)
        first += new_first * (gradient - first)
        second = second * keep_second + new_second * gradient * gradient
        denominator = tl.sqrt(second) * inverse_root_correction + epsilon
        theta -= step_size * (first / denominator)

        tl.store(parameters + place, theta, mask=mask)
        tl.store(first_moment + place, first, mask=mask)
        tl.store(second_moment + place, second, mask=mask)


def adamw_step(
    parameters: Tensor,
    gradients: Tensor,
    first_moment: Tensor,
    second_moment: Tensor,
    coefficients: Coefficients,
    gradient_factor: float | Tensor,
) -> None:
    """Launches the step; arguments as in `affina.kernels.adamw.adamw_step`."""
    count = parameters.numel()
    if count == 0:
        return
    launch(
        _adamw_kernel,
        (ceil_div(count, STEP_BLOCK),),
        parameters,
        gradients,
        first_moment,
        second_moment,
        gradient_factor if isinstance(gradient_factor, Tensor) else float(gradient_factor),
        count,
        coefficients.keep,
        coefficients.new_first,
        coefficients.keep_second,
        coefficients.new_second,
        coefficients.step_size,
        1.0 / coefficients.root_correction,
        coefficients.epsilon,
        B=STEP_BLOCK,
        FACTOR_ON_DEVICE=isinstance(gradient_factor, Tensor),
        num_warps=4,
    )


@triton.jit
def _sum_of_squares_kernel(gradients, parts, P, NUM_PARTS: tl.constexpr, NUM_ROUNDS: tl.constexpr, B: tl.constexpr):
    part = tl.program_id(0)
    lane = tl.arange(0, B)
    squares = tl.zeros([B], dtype=tl.float32)
    for turn in range(NUM_ROUNDS):
        place = (turn * NUM_PARTS + part).to(tl.int64) * B + lane
        gradient = tl.load(gradients + place, mask=place < P, other=0.0)
        squares += gradient * gradient
    tl.store(parts + part, tl.sum(squares, axis=0))


@triton.jit
def _root_of_sum_kernel(parts, norm, NUM_PARTS: tl.constexpr, B: tl.constexpr):
    lane = tl.arange(0, B)
    squares = tl.load(parts + lane, mask=lane < NUM_PARTS, other=0.0)
    tl.store(norm, tl.sqrt_rn(tl.sum(squares, axis=0)))


def gradient_norm(gradients: Tensor) -> Tensor:
    """[] float32 norm of `gradients` [P] fp32."""
    norm = torch.empty((), dtype=torch.float32, device=gradients.device)
    count = gradients.numel()
    if count == 0:
        return norm.zero_()
    blocks = ceil_div(count, NORM_BLOCK)
    num_parts = min(blocks, MAX_PARTS)
    parts = torch.empty(num_parts, dtype=torch.float32, device=gradients.device)
    launch(
        _sum_of_squares_kernel,
        (num_parts,),
        gradients,
        parts,
        count,
        NUM_PARTS=num_parts,
        NUM_ROUNDS=ceil_div(blocks, num_parts),
        B=NORM_BLOCK,
        num_warps=8,
    )
    launch(_root_of_sum_kernel, (1,), parts, norm, NUM_PARTS=num_parts, B=power_of_two(num_parts), num_warps=4)
    return norm


@triton.jit
def _clip_factor_kernel(norm, factor, max_norm, loss_scale, EPSILON: tl.constexpr):
    total = tl.load(norm)
    clip = tl.div_rn(max_norm, tl.div_rn(total, loss_scale) + EPSILON)
    allowed = tl.div_rn(tl.minimum(clip, 1.0), loss_scale)
    tl.store(factor, tl.where(total - total == 0.0, allowed, 0.0))


def clip_factor(norm: Tensor, max_norm: float, loss_scale: float) -> Tensor:
    """[] float32 factor; arguments as in `affina.kernels.adamw.clip_factor`."""
    factor = torch.empty((), dtype=torch.float32, device=norm.device)
    launch(
        _clip_factor_kernel, (1,), norm, factor, float(max_norm), float(loss_scale), EPSILON=CLIP_EPSILON, num_warps=1
    )
    return factor
