"""Triton kernels of `affina.kernels.qk_rope`, whose docstring holds the maths.

One launch handles the queries, the keys and the values. A program owns a block of tokens and a few heads of one of the
three; it holds the block's cosines and sines in registers and walks over its heads, each a pair of tiles
[BLOCK_TOKENS, BLOCK_HALF]: the first and the second half of the head, so that both numbers of a pair lie in one thread.
Halves that are no power of two are masked. While it works on a head, the loads of the next ones are under way to shared
memory (STAGES), which also hands x to the threads as matrix units lay out the update's product.

Everything of a head is read before it is written, and what is read ahead are other heads of the same program; no two
programs share a head. So the backward pass may write over `qkv`. A tile has at least as many elements as the program
has threads: of two threads that hold the same element one could read it again after the other has written it.

`num_tokens` is not specialised: another number of tokens must not compile another kernel in the middle of a run.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, misc, import-untyped, import-not-found"
from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from affina.kernels.triton.launch import ceil_div, launch, power_of_two
from affina.kernels.triton.low_rank import (
    fitting_block_rank,
    load_left_factor,
    low_rank_product,
    must_widen,
    row_stride,
)

if TYPE_CHECKING:
    from affina.kernels.qk_rope import Heads, QkvUpdate

_WARP = 32
_MIN_UPDATED_TOKENS = 16
_MAX_SHARED_BYTES = 49152


class Tile(NamedTuple):
    """What a program works on.

    elements: of half a head in a block of tokens
    heads:    that a program walks over
    stages:   1: a head's loads begin with its turn; 3: those of the next head are under way meanwhile; 4: of the next
              two (2 gains nothing: they begin when the head before is done)
    """

    elements: int
    heads: int
    warps: int
    stages: int


TILES = {
    ("forward", "plain"): Tile(elements=1024, heads=4, warps=4, stages=1),
    ("forward", "update"): Tile(elements=1024, heads=8, warps=4, stages=3),
    ("backward", "plain"): Tile(elements=1024, heads=4, warps=4, stages=1),
    ("backward", "update"): Tile(elements=1024, heads=8, warps=4, stages=3),
}
"""By kernel, and by whether it adds low-rank updates. Sixteen tokens are the fewest that matrix units multiply, 1,024
elements of a head of 128; more take registers (32 tokens: 122 forward and 168 backward instead of 79 and 114) and with
them programs side by side. Measured on an H200 (16,384 tokens, 32 and 8 heads of 128, rank 16): 114 µs forward and 160
backward, with 4 heads 123 and 171, without loads ahead 187 and 257; without updates 84 and 139, 4.1 TB/s."""


@triton.jit
def _load_head(
    qkv_ptr,
    qkv_stride,
    column,
    first_t,
    t_ptr,
    t_stride,
    b_ptr,
    b_stride,
    b_row,
    scale,
    tokens,
    token_mask,
    halves,
    half_mask,
    HALF: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """Both halves [BLOCK_TOKENS, BLOCK_HALF] float32 of the head that begins at `column`, with its update.

    The head's rows of B begin at `b_row` (int64).
    """
    mask = token_mask[:, None] & half_mask[None, :]
    pointers = qkv_ptr + tokens[:, None] * qkv_stride + (column + halves)[None, :]
    first = tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(pointers + HALF, mask=mask, other=0.0).to(tl.float32)
    if RANK > 0:
        b_rows = b_row + halves
        first += scale * low_rank_product(
            first_t, t_ptr, t_stride, b_ptr, b_stride, tokens, token_mask, b_rows, half_mask, RANK, BLOCK_RANK, WIDEN
        )
        second += scale * low_rank_product(
            first_t,
            t_ptr,
            t_stride,
            b_ptr,
            b_stride,
            tokens,
            token_mask,
            b_rows + HALF,
            half_mask,
            RANK,
            BLOCK_RANK,
            WIDEN,
        )
    return first, second


@triton.jit
def _load_half_row(pointer, rows, stride, token_mask, halves, half_mask):
    """[BLOCK_TOKENS, BLOCK_HALF] float32: cosines or sines of the tokens."""
    mask = token_mask[:, None] & half_mask[None, :]
    return tl.load(pointer + rows[:, None] * stride + halves[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _reciprocal_root_mean_square(first, second, epsilon, HALF: tl.constexpr):
    return tl.rsqrt(tl.sum(first * first + second * second, axis=1) / (2 * HALF) + epsilon)[:, None]


@triton.jit
def _forward_heads(
    qkv_ptr,
    qkv_stride,
    first_column,
    out_ptr,
    weight_ptr,
    cos_ptr,
    cos_stride,
    sin_ptr,
    sin_stride,
    epsilon,
    t_ptr,
    t_stride,
    b_ptr,
    b_stride,
    scale,
    first_head,
    tokens,
    token_mask,
    NUM_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    ROTATE: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    HEADS_PER_PROGRAM: tl.constexpr,
    STAGES: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """Norm and rotation of up to HEADS_PER_PROGRAM heads from `first_head` (int64) on."""
    halves = tl.arange(0, BLOCK_HALF)
    half_mask = halves < HALF
    if ROTATE:
        cos = _load_half_row(cos_ptr, tokens, cos_stride, token_mask, halves, half_mask)
        sin = _load_half_row(sin_ptr, tokens, sin_stride, token_mask, halves, half_mask)
    if HAS_WEIGHT:
        first_weight = tl.load(weight_ptr + halves, mask=half_mask, other=0.0).to(tl.float32)[None, :]
        second_weight = tl.load(weight_ptr + HALF + halves, mask=half_mask, other=0.0).to(tl.float32)[None, :]
    if RANK > 0:
        first_t = load_left_factor(t_ptr, t_stride, tokens, token_mask, 0, RANK, BLOCK_RANK, WIDEN)
    else:
        first_t = 0.0
    for step in tl.range(0, HEADS_PER_PROGRAM, num_stages=STAGES):
        head = first_head + step
        head_mask = half_mask
        if NUM_HEADS % HEADS_PER_PROGRAM != 0:
            head_mask &= head < NUM_HEADS
        mask = token_mask[:, None] & head_mask[None, :]
        column = head * (2 * HALF)
        first, second = _load_head(
            qkv_ptr,
            qkv_stride,
            first_column + column,
            first_t,
            t_ptr,
            t_stride,
            b_ptr,
            b_stride,
            column,
            scale,
            tokens,
            token_mask,
            halves,
            head_mask,
            HALF,
            RANK,
            BLOCK_RANK,
            WIDEN,
        )
        if HAS_WEIGHT:
            rstd = _reciprocal_root_mean_square(first, second, epsilon, HALF)
            first = first * rstd * first_weight
            second = second * rstd * second_weight
        if ROTATE:
            rotated_first = first * cos - second * sin
            rotated_second = second * cos + first * sin
        else:
            rotated_first = first
            rotated_second = second
        pointers = out_ptr + tokens[:, None] * (NUM_HEADS * 2 * HALF) + (column + halves)[None, :]
        tl.store(pointers, rotated_first.to(out_ptr.dtype.element_ty), mask=mask)
        tl.store(pointers + HALF, rotated_second.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_tokens"])
def _forward_kernel(
    qkv_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    q_weight_ptr,
    k_weight_ptr,
    cos_ptr,
    sin_ptr,
    t_ptr,
    b_q_ptr,
    b_k_ptr,
    b_v_ptr,
    num_tokens,
    qkv_stride,
    cos_stride,
    sin_stride,
    t_stride,
    b_q_stride,
    b_k_stride,
    b_v_stride,
    scale_q,
    scale_k,
    scale_v,
    epsilon,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    HAS_Q_WEIGHT: tl.constexpr,
    HAS_K_WEIGHT: tl.constexpr,
    WITH_VALUES: tl.constexpr,
    RANK_Q: tl.constexpr,
    RANK_K: tl.constexpr,
    RANK_V: tl.constexpr,
    BLOCK_RANK_Q: tl.constexpr,
    BLOCK_RANK_K: tl.constexpr,
    BLOCK_RANK_V: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    HEADS_PER_PROGRAM: tl.constexpr,
    STAGES: tl.constexpr,
    WIDEN: tl.constexpr,
):
    q_groups: tl.constexpr = (NUM_HEADS + HEADS_PER_PROGRAM - 1) // HEADS_PER_PROGRAM
    kv_groups: tl.constexpr = (NUM_KV_HEADS + HEADS_PER_PROGRAM - 1) // HEADS_PER_PROGRAM
    num_groups: tl.constexpr = q_groups + kv_groups * (2 if WITH_VALUES else 1)
    program = tl.program_id(0)
    group = (program % num_groups).to(tl.int64)
    tokens = (program // num_groups).to(tl.int64) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    token_mask = tokens < num_tokens
    if group < q_groups:
        _forward_heads(
            qkv_ptr,
            qkv_stride,
            0,
            q_ptr,
            q_weight_ptr,
            cos_ptr,
            cos_stride,
            sin_ptr,
            sin_stride,
            epsilon,
            t_ptr,
            t_stride,
            b_q_ptr,
            b_q_stride,
            scale_q,
            group * HEADS_PER_PROGRAM,
            tokens,
            token_mask,
            NUM_HEADS,
            HALF,
            HAS_Q_WEIGHT,
            True,
            RANK_Q,
            BLOCK_RANK_Q,
            BLOCK_HALF,
            HEADS_PER_PROGRAM,
            STAGES,
            WIDEN,
        )
    elif group < q_groups + kv_groups:
        _forward_heads(
            qkv_ptr,
            qkv_stride,
            NUM_HEADS * 2 * HALF,
            k_ptr,
            k_weight_ptr,
            cos_ptr,
            cos_stride,
            sin_ptr,
            sin_stride,
            epsilon,
            t_ptr + RANK_Q,
            t_stride,
            b_k_ptr,
            b_k_stride,
            scale_k,
            (group - q_groups) * HEADS_PER_PROGRAM,
            tokens,
            token_mask,
            NUM_KV_HEADS,
            HALF,
            HAS_K_WEIGHT,
            True,
            RANK_K,
            BLOCK_RANK_K,
            BLOCK_HALF,
            HEADS_PER_PROGRAM,
            STAGES,
            WIDEN,
        )
    else:
        _forward_heads(
            qkv_ptr,
            qkv_stride,
            (NUM_HEADS + NUM_KV_HEADS) * 2 * HALF,
            v_ptr,
            k_weight_ptr,
            cos_ptr,
            cos_stride,
            sin_ptr,
            sin_stride,
            epsilon,
            t_ptr + RANK_Q + RANK_K,
            t_stride,
            b_v_ptr,
            b_v_stride,
            scale_v,
            (group - q_groups - kv_groups) * HEADS_PER_PROGRAM,
            tokens,
            token_mask,
            NUM_KV_HEADS,
            HALF,
            False,
            False,
            RANK_V,
            BLOCK_RANK_V,
            BLOCK_HALF,
            HEADS_PER_PROGRAM,
            STAGES,
            WIDEN,
        )


@triton.jit
def _backward_heads(
    grad_ptr,
    grad_stride,
    grad_head_stride,
    qkv_ptr,
    qkv_stride,
    first_column,
    out_ptr,
    out_stride,
    weight_ptr,
    cos_ptr,
    cos_stride,
    sin_ptr,
    sin_stride,
    epsilon,
    t_ptr,
    t_stride,
    b_ptr,
    b_stride,
    scale,
    first_head,
    tokens,
    token_mask,
    NUM_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    ROTATE: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    HEADS_PER_PROGRAM: tl.constexpr,
    STAGES: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """Gradients of up to HEADS_PER_PROGRAM heads from `first_head` (int64) on, before the rotation and the norm."""
    halves = tl.arange(0, BLOCK_HALF)
    half_mask = halves < HALF
    if ROTATE:
        cos = _load_half_row(cos_ptr, tokens, cos_stride, token_mask, halves, half_mask)
        sin = _load_half_row(sin_ptr, tokens, sin_stride, token_mask, halves, half_mask)
    if HAS_WEIGHT:
        first_weight = tl.load(weight_ptr + halves, mask=half_mask, other=0.0).to(tl.float32)[None, :]
        second_weight = tl.load(weight_ptr + HALF + halves, mask=half_mask, other=0.0).to(tl.float32)[None, :]
    if HAS_WEIGHT and RANK > 0:
        first_t = load_left_factor(t_ptr, t_stride, tokens, token_mask, 0, RANK, BLOCK_RANK, WIDEN)
    else:
        first_t = 0.0
    for step in tl.range(0, HEADS_PER_PROGRAM, num_stages=STAGES):
        head = first_head + step
        head_mask = half_mask
        if NUM_HEADS % HEADS_PER_PROGRAM != 0:
            head_mask &= head < NUM_HEADS
        mask = token_mask[:, None] & head_mask[None, :]
        column = head * (2 * HALF)
        grads = grad_ptr + tokens[:, None] * grad_stride + head * grad_head_stride + halves[None, :]
        first_grad = tl.load(grads, mask=mask, other=0.0).to(tl.float32)
        second_grad = tl.load(grads + HALF, mask=mask, other=0.0).to(tl.float32)
        if ROTATE:
            first_out = first_grad * cos + second_grad * sin
            second_out = second_grad * cos - first_grad * sin
        else:
            first_out = first_grad
            second_out = second_grad
        if HAS_WEIGHT:
            first, second = _load_head(
                qkv_ptr,
                qkv_stride,
                first_column + column,
                first_t,
                t_ptr,
                t_stride,
                b_ptr,
                b_stride,
                column,
                scale,
                tokens,
                token_mask,
                halves,
                head_mask,
                HALF,
                RANK,
                BLOCK_RANK,
                WIDEN,
            )
            rstd = _reciprocal_root_mean_square(first, second, epsilon, HALF)
            first *= rstd
            second *= rstd
            first_out *= first_weight
            second_out *= second_weight
            mean = tl.sum(first_out * first + second_out * second, axis=1)[:, None] / (2 * HALF)
            first_out = rstd * (first_out - first * mean)
            second_out = rstd * (second_out - second * mean)
        pointers = out_ptr + tokens[:, None] * out_stride + (first_column + column + halves)[None, :]
        tl.store(pointers, first_out.to(out_ptr.dtype.element_ty), mask=mask)
        tl.store(pointers + HALF, second_out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_tokens"])
def _backward_kernel(
    grad_q_ptr,
    grad_k_ptr,
    grad_v_ptr,
    qkv_ptr,
    out_ptr,
    q_weight_ptr,
    k_weight_ptr,
    cos_ptr,
    sin_ptr,
    t_ptr,
    b_q_ptr,
    b_k_ptr,
    num_tokens,
    grad_q_stride,
    grad_q_head_stride,
    grad_k_stride,
    grad_k_head_stride,
    grad_v_stride,
    grad_v_head_stride,
    qkv_stride,
    out_stride,
    cos_stride,
    sin_stride,
    t_stride,
    b_q_stride,
    b_k_stride,
    scale_q,
    scale_k,
    epsilon,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    HAS_Q_WEIGHT: tl.constexpr,
    HAS_K_WEIGHT: tl.constexpr,
    RANK_Q: tl.constexpr,
    RANK_K: tl.constexpr,
    BLOCK_RANK_Q: tl.constexpr,
    BLOCK_RANK_K: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    HEADS_PER_PROGRAM: tl.constexpr,
    STAGES: tl.constexpr,
    WIDEN: tl.constexpr,
):
    q_groups: tl.constexpr = (NUM_HEADS + HEADS_PER_PROGRAM - 1) // HEADS_PER_PROGRAM
    kv_groups: tl.constexpr = (NUM_KV_HEADS + HEADS_PER_PROGRAM - 1) // HEADS_PER_PROGRAM
    num_groups: tl.constexpr = q_groups + 2 * kv_groups
    program = tl.program_id(0)
    group = (program % num_groups).to(tl.int64)
    tokens = (program // num_groups).to(tl.int64) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    token_mask = tokens < num_tokens
    if group < q_groups:
        _backward_heads(
            grad_q_ptr,
            grad_q_stride,
            grad_q_head_stride,
            qkv_ptr,
            qkv_stride,
            0,
            out_ptr,
            out_stride,
            q_weight_ptr,
            cos_ptr,
            cos_stride,
            sin_ptr,
            sin_stride,
            epsilon,
            t_ptr,
            t_stride,
            b_q_ptr,
            b_q_stride,
            scale_q,
            group * HEADS_PER_PROGRAM,
            tokens,
            token_mask,
            NUM_HEADS,
            HALF,
            HAS_Q_WEIGHT,
            True,
            RANK_Q,
            BLOCK_RANK_Q,
            BLOCK_HALF,
            HEADS_PER_PROGRAM,
            STAGES,
            WIDEN,
        )
    elif group < q_groups + kv_groups:
        _backward_heads(
            grad_k_ptr,
            grad_k_stride,
            grad_k_head_stride,
            qkv_ptr,
            qkv_stride,
            NUM_HEADS * 2 * HALF,
            out_ptr,
            out_stride,
            k_weight_ptr,
            cos_ptr,
            cos_stride,
            sin_ptr,
            sin_stride,
            epsilon,
            t_ptr + RANK_Q,
            t_stride,
            b_k_ptr,
            b_k_stride,
            scale_k,
            (group - q_groups) * HEADS_PER_PROGRAM,
            tokens,
            token_mask,
            NUM_KV_HEADS,
            HALF,
            HAS_K_WEIGHT,
            True,
            RANK_K,
            BLOCK_RANK_K,
            BLOCK_HALF,
            HEADS_PER_PROGRAM,
            STAGES,
            WIDEN,
        )
    else:
        # The gradient of an updated value is that of the value: nothing is read but the gradient.
        _backward_heads(
            grad_v_ptr,
            grad_v_stride,
            grad_v_head_stride,
            qkv_ptr,
            qkv_stride,
            (NUM_HEADS + NUM_KV_HEADS) * 2 * HALF,
            out_ptr,
            out_stride,
            k_weight_ptr,
            cos_ptr,
            cos_stride,
            sin_ptr,
            sin_stride,
            epsilon,
            t_ptr,
            t_stride,
            b_k_ptr,
            b_k_stride,
            scale_k,
            (group - q_groups - kv_groups) * HEADS_PER_PROGRAM,
            tokens,
            token_mask,
            NUM_KV_HEADS,
            HALF,
            False,
            False,
            0,
            BLOCK_RANK_K,
            BLOCK_HALF,
            HEADS_PER_PROGRAM,
            STAGES,
            WIDEN,
        )


def launch_forward(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    epsilon: float,
    heads: Heads,
    lora: QkvUpdate | None,
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
) -> None:
    """Write the rotated queries and keys to `q` and `k`, and the updated values to `v` if it is given."""
    ranks = lora.ranks if lora is not None else (0, 0, 0)
    factors = lora.factors if lora is not None else (None, None, None)
    scales = lora.scales if lora is not None else (0.0, 0.0, 0.0)
    tile = _tile("forward", heads, ranks, qkv.element_size())
    num_groups = _num_groups(heads, tile, with_values=v is not None)
    launch(
        _forward_kernel,
        (ceil_div(qkv.shape[0], tile["BLOCK_TOKENS"]) * num_groups,),
        qkv,
        q,
        k,
        k if v is None else v,
        qkv if q_weight is None else q_weight,
        qkv if k_weight is None else k_weight,
        cos,
        sin,
        qkv if lora is None else lora.t,
        *(qkv if b is None else b for b in factors),
        qkv.shape[0],
        row_stride(qkv),
        row_stride(cos),
        row_stride(sin),
        0 if lora is None else row_stride(lora.t),
        *(0 if b is None else row_stride(b) for b in factors),
        *scales,
        epsilon,
        NUM_HEADS=heads.num_heads,
        NUM_KV_HEADS=heads.num_kv_heads,
        HALF=heads.head_dim // 2,
        HAS_Q_WEIGHT=q_weight is not None,
        HAS_K_WEIGHT=k_weight is not None,
        WITH_VALUES=v is not None,
        RANK_Q=ranks[0],
        RANK_K=ranks[1],
        RANK_V=ranks[2],
        BLOCK_RANK_Q=fitting_block_rank(ranks[0], tile["BLOCK_HALF"], qkv.element_size()),
        BLOCK_RANK_K=fitting_block_rank(ranks[1], tile["BLOCK_HALF"], qkv.element_size()),
        BLOCK_RANK_V=fitting_block_rank(ranks[2], tile["BLOCK_HALF"], qkv.element_size()),
        WIDEN=must_widen(qkv),
        **tile,
    )


def launch_backward(
    grads: tuple[Tensor, Tensor, Tensor],
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    epsilon: float,
    heads: Heads,
    lora: QkvUpdate | None,
    out: Tensor,
) -> None:
    """Write the gradients of queries, keys and values before rotation and norm to `out`."""
    ranks = lora.ranks if lora is not None else (0, 0, 0)
    factors = lora.factors[:2] if lora is not None else (None, None)
    scales = lora.scales[:2] if lora is not None else (0.0, 0.0)
    added_ranks = (ranks[0] if q_weight is not None else 0, ranks[1] if k_weight is not None else 0)
    tile = _tile("backward", heads, added_ranks, qkv.element_size())
    num_groups = _num_groups(heads, tile, with_values=True)
    launch(
        _backward_kernel,
        (ceil_div(qkv.shape[0], tile["BLOCK_TOKENS"]) * num_groups,),
        *grads,
        qkv,
        out,
        qkv if q_weight is None else q_weight,
        qkv if k_weight is None else k_weight,
        cos,
        sin,
        qkv if lora is None else lora.t,
        *(qkv if b is None else b for b in factors),
        qkv.shape[0],
        *(stride for grad in grads for stride in _token_and_head_stride(grad)),
        row_stride(qkv),
        row_stride(out),
        row_stride(cos),
        row_stride(sin),
        0 if lora is None else row_stride(lora.t),
        *(0 if b is None else row_stride(b) for b in factors),
        *scales,
        epsilon,
        NUM_HEADS=heads.num_heads,
        NUM_KV_HEADS=heads.num_kv_heads,
        HALF=heads.head_dim // 2,
        HAS_Q_WEIGHT=q_weight is not None,
        HAS_K_WEIGHT=k_weight is not None,
        RANK_Q=ranks[0],
        RANK_K=ranks[1],
        BLOCK_RANK_Q=fitting_block_rank(ranks[0], tile["BLOCK_HALF"], qkv.element_size()),
        BLOCK_RANK_K=fitting_block_rank(ranks[1], tile["BLOCK_HALF"], qkv.element_size()),
        WIDEN=must_widen(qkv),
        **tile,
    )


def _tile(kernel: str, heads: Heads, ranks: tuple[int, ...], element_bytes: int) -> dict[str, Any]:
    """Launch arguments of a program; `ranks` are those of the updates that the kernel adds."""
    rank = max(ranks)
    tile = TILES[kernel, "update" if rank > 0 else "plain"]
    block_half = max(16, power_of_two(heads.head_dim // 2))
    block_tokens = max(_MIN_UPDATED_TOKENS if rank > 0 else 2, tile.elements // block_half)  # 2: a warp's 32 elements
    num_warps = min(tile.warps, block_tokens * block_half // _WARP)
    head_bytes = _head_bytes(kernel, block_tokens, block_half, rank, element_bytes)
    return {
        "BLOCK_TOKENS": block_tokens,
        "BLOCK_HALF": block_half,
        "HEADS_PER_PROGRAM": tile.heads,
        "STAGES": min(tile.stages, 1 + _MAX_SHARED_BYTES // head_bytes),
        "num_warps": num_warps,
        "num_stages": 1,
    }


def _head_bytes(kernel: str, block_tokens: int, block_half: int, rank: int, element_bytes: int) -> int:
    """Shared memory that the loads of one head take which run ahead."""
    columns_of_b = fitting_block_rank(rank, block_half, element_bytes) if rank > 0 else 0
    half_bytes = (block_tokens + columns_of_b) * block_half * element_bytes
    if kernel == "backward":
        return 2 * half_bytes + 2 * block_tokens * block_half * element_bytes  # the gradient too
    return 4 * half_bytes  # Triton 3.6 lets two of the three branches share their buffers, not all


def _num_groups(heads: Heads, tile: dict[str, Any], *, with_values: bool) -> int:
    """Programs that share a block of tokens; the kernels compute the same."""
    heads_per_program: int = tile["HEADS_PER_PROGRAM"]
    kv_groups = -(-heads.num_kv_heads // heads_per_program)
    return -(-heads.num_heads // heads_per_program) + kv_groups * (2 if with_values else 1)


def _token_and_head_stride(grad: Tensor) -> tuple[int, int]:
    assert grad.stride(2) == 1, f"the last dimension of a gradient has stride {grad.stride(2)}"
    return grad.stride(0), grad.stride(1)
