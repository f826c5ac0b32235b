"""Cross-entropy of a frozen language-model head without ever holding all logits.

Legend: N rows (tokens whose next token is supervised), D model width, V vocabulary, C rows of one chunk.

**Maths.** For a row h [D] with target y, head W [V, D], bias b [V], scale s and soft cap c:

    u = s · (W h + b)                 raw logits
    z = u                             without a cap
    z = c · tanh(u / c)               with one (Gemma)
    loss = logsumexp(z) − z_y

**Backward.** With p = softmax(z) and the one-hot e_y,

    ∂loss/∂z = p − e_y
    ∂z/∂u    = 1,  or  1 − tanh²(u / c) = 1 − (z / c)²   with a cap
    ∂loss/∂h = s · Wᵀ [ (p − e_y) ∘ ∂z/∂u ]

A row's loss depends on its own hidden state alone. So whatever number g_n arrives for it in the backward pass,
`∂L/∂h_n = g_n · ∂loss_n/∂h_n`, and everything else is known in the forward pass. Hence the gradient of `hidden` is made
there, chunk by chunk, from logits that exist anyway; the backward pass multiplies its rows. That serves the sum of all
losses, where every g_n is the same, and objectives that compare sums of log-probabilities (`linear_token_losses`).
Nothing of size N × V is ever stored: the peak is one chunk of C × V float32 plus the N × D gradient.

**Precision.** Products run in the type of `hidden` with float32 accumulation (what matrix units do); logits, softmax
and the sum over rows are float32. A float16 gradient is made of terms in [−1, 1] times head weights, and only then
multiplied by a loss scale, so scaling neither overflows nor rescues it: probabilities below 6e-8 are dropped, whose
sum over 150,000 entries is below 1% of one head weight.

**When the head itself is trained** its gradient needs the logits again; then the plain differentiable path is used.

**On a GPU** the elementwise part of a chunk is one Triton kernel (`affina.kernels.triton.linear_cross_entropy`), one
program to a row: it reads the row twice and writes the gradient once, 10 bytes per logit against some 50 of the chain
of PyTorch operations (`_cross_entropy_rows`, the reference). Losses are kept per row and added once at the end, so
neither path depends on the order in which anything ran.

Reference: `torch.nn.functional.cross_entropy` on `differentiable_logits`, the whole ones. The idea of making the
gradient in the forward pass: Hsu et al., *Liger Kernel*, arXiv:2410.10989, §3.2; of never holding the logits: Wijmans
et al., *Cut Your Losses in Large-Vocabulary Language Models*, arXiv:2411.09009. Deviation from both: the head is
frozen, ignored rows are removed before the first product, and the products are the library's own.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from affina.kernels.dispatch import is_true, use_triton
from affina.kernels.logits import (
    IGNORED_LABEL,
    ExpandableRows,
    HeadOptions,
    differentiable_logits,
    finish_logits,
    is_trained,
    matmul_float32,
    with_row_gradient,
)
from affina.kernels.tiled_cross_entropy import tiled_cross_entropy

CHUNK_BYTES_CPU = 64 * 1024 * 1024
"""Float32 logits of one chunk on a CPU. Measured: 128 rows of a 151,936-entry head take 3.0 s per 256 rows, 16 rows
8.3 s."""
CHUNK_BYTES_ACCELERATOR = 160 * 1024 * 1024
"""Float32 logits of one chunk on a GPU, 256 rows of a 151,936-entry head. Measured on an H200, both products of 16,384
such rows alone: 256 at a time 36.2 ms, 384 38.2, 441 39.1, 512 37.9, 1,024 36.7, 2,048 36.4; in a whole step, which the
card's power limits, 256 and 441 take the same."""
ROW_MULTIPLE = 128
"""Rows that a GPU's matrix products work on at once: others cost as much and do nothing."""
MIN_CHUNK_ROWS = 16


def default_chunk_rows(vocabulary_size: int, device: torch.device) -> int:
    """How many rows of logits are computed at once on `device`."""
    if device.type == "cpu":
        return max(MIN_CHUNK_ROWS, CHUNK_BYTES_CPU // (4 * vocabulary_size))
    rows = CHUNK_BYTES_ACCELERATOR // (4 * vocabulary_size)
    return max(MIN_CHUNK_ROWS, rows // ROW_MULTIPLE * ROW_MULTIPLE)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor | ExpandableRows,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    chunk_rows: int | None = None,
) -> Tensor:
    """The sum of the cross-entropies of all rows whose target is not -100, as a float32 scalar.

    hidden:      [N, D] bf16, fp16 or fp32; the only tensor that receives a gradient when the head is frozen
    weight:      [V, D] the head, cast to the type of `hidden` when it differs; one that is no tensor is expanded
                 tile by tile (`tiled_cross_entropy`)
    targets:     [N] int64, class of each row; rows with -100 are left out before anything is computed
    bias:        [V] or None
    softcap:     c of z = c · tanh(u / c), or None
    logit_scale: factor on the raw logits (Cohere's logit_scale, one over Granite's logits_scaling)
    chunk_rows:  rows of logits held at once; default from the vocabulary and the device

    With N = 0 the result is 0 and its gradient is zeros.
    """
    hidden, targets = _drop_ignored_rows(hidden, targets)
    return linear_token_losses(
        hidden, weight, targets, bias=bias, softcap=softcap, logit_scale=logit_scale, chunk_rows=chunk_rows
    ).sum()


def linear_token_losses(
    hidden: Tensor,
    weight: Tensor | ExpandableRows,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    chunk_rows: int | None = None,
) -> Tensor:
    """[N] float32 cross-entropy of every row, minus the log-probability of its target; 0 where the target is -100.

    Arguments and gradients as in `linear_cross_entropy`.
    """
    options = HeadOptions(bias=bias, softcap=softcap, logit_scale=logit_scale)
    if is_trained(weight, bias):
        logits = differentiable_logits(hidden, weight, **options)
        return torch.nn.functional.cross_entropy(logits, targets, ignore_index=IGNORED_LABEL, reduction="none")
    if not (hidden.requires_grad and torch.is_grad_enabled()):
        return token_losses(hidden, weight, targets, chunk_rows=chunk_rows, **options)
    return with_row_gradient(
        hidden, *_losses_and_gradient(hidden, weight, targets, bias, softcap, logit_scale, chunk_rows)
    )


@torch.no_grad()
def token_losses(
    hidden: Tensor,
    weight: Tensor | ExpandableRows,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    chunk_rows: int | None = None,
) -> Tensor:
    """[N] float32 cross-entropy of every row (0 where the target is -100), without a gradient.

    Shapes and types as in `linear_cross_entropy`.
    """
    losses = hidden.new_empty(hidden.shape[0], dtype=torch.float32)
    options = HeadOptions(bias=bias, softcap=softcap, logit_scale=logit_scale)
    if not isinstance(weight, Tensor):
        tiled_cross_entropy(hidden, weight, targets, losses=losses, chunk_rows=chunk_rows, **options)
        return losses
    weight = weight.to(hidden.dtype)
    for part in chunks(hidden, weight, chunk_rows):
        logits = matmul_float32(hidden[part], weight.t())
        cross_entropy_rows(logits, targets[part], losses=losses[part], **options)
    return losses


@torch.no_grad()
def linear_cross_entropy_and_gradient(
    hidden: Tensor,
    weight: Tensor | ExpandableRows,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    chunk_rows: int | None = None,
    gradient_out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The loss sum as a float32 scalar and its gradient [N, D] in the type of `hidden`; no autograd.

    gradient_out: [N, D] memory for the gradient, of the type of `hidden`, rows contiguous; new memory when None. It may
                  be `hidden` itself: a chunk of it is read before it is written.

    Everything else as in `linear_cross_entropy`, but rows with -100 are computed too: loss 0 and a gradient of zeros.
    Nothing waits for the device and all shapes are known in advance, so the call can be captured in a CUDA graph.
    """
    losses, gradient = _losses_and_gradient(
        hidden, weight, targets, bias, softcap, logit_scale, chunk_rows, gradient_out
    )
    return losses.sum(), gradient


@torch.no_grad()
def _losses_and_gradient(
    hidden: Tensor,
    weight: Tensor | ExpandableRows,
    targets: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    logit_scale: float,
    chunk_rows: int | None,
    gradient_out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """[N] float32 losses and [N, D] the gradient of each by its own row."""
    gradient = gradient_out if gradient_out is not None else torch.empty_like(hidden)
    assert gradient.shape == hidden.shape, f"{tuple(gradient.shape)} memory for {tuple(hidden.shape)} gradients"
    assert gradient.dtype == hidden.dtype, f"{gradient.dtype} memory for {hidden.dtype} gradients"
    losses = hidden.new_empty(hidden.shape[0], dtype=torch.float32)
    if not isinstance(weight, Tensor):
        options = HeadOptions(bias=bias, softcap=softcap, logit_scale=logit_scale)
        tiled_cross_entropy(hidden, weight, targets, losses=losses, gradient=gradient, chunk_rows=chunk_rows, **options)
        return losses, gradient
    weight = weight.to(hidden.dtype)
    for part in chunks(hidden, weight, chunk_rows):
        error = _error_of_chunk(hidden[part], weight, targets[part], losses[part], bias, softcap, logit_scale)
        torch.mm(error, weight, out=gradient[part])
    return losses, gradient


def _error_of_chunk(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    losses: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    logit_scale: float,
) -> Tensor:
    """[C, V] gradient of the losses by W h, in the type of `hidden`; fills `losses`. Frees the logits on return."""
    logits = matmul_float32(hidden, weight.t())
    error = logits if hidden.dtype == torch.float32 else torch.empty_like(logits, dtype=hidden.dtype)
    cross_entropy_rows(logits, targets, losses=losses, error=error, bias=bias, softcap=softcap, logit_scale=logit_scale)
    return error


def chunks(hidden: Tensor, weight: Tensor | ExpandableRows, chunk_rows: int | None) -> Iterator[slice]:
    """The rows of `hidden` [N, D], as many at a time as `chunk_rows` or, for None, the device's default."""
    num_rows = hidden.shape[0]
    step = chunk_rows if chunk_rows is not None else default_chunk_rows(weight.shape[0], hidden.device)
    for start in range(0, num_rows, step):
        yield slice(start, min(start + step, num_rows))


# Rows of logits
# ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def cross_entropy_rows(
    logits: Tensor,
    targets: Tensor,
    *,
    losses: Tensor,
    error: Tensor | None = None,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
) -> None:
    """Fills `losses` with the cross-entropy of every row and `error` with its gradient by the row of `logits`.

    logits:      [C, V] fp32, bf16 or fp16: W h, to which bias, scale and cap are still to be applied; a row is
                 contiguous, rows may be apart. The contents are undefined afterwards
    targets:     [C] int64; -100 gives loss 0 and an error of zeros
    losses:      [C] fp32, written
    error:       [C, V] fp32, bf16 or fp16, written, or None; rows may be apart. `logits` itself is allowed, memory that
                 overlaps it in any other way is not
    bias:        [V] or None
    softcap:     c of z = c · tanh(u / c), or None
    logit_scale: factor on logits and bias
    """
    assert losses.dtype == torch.float32, f"losses are float32, not {losses.dtype}"
    assert losses.is_contiguous(), "losses must be contiguous"
    assert logits.shape[1] <= 1 or logits.stride(1) == 1, "the logits of a row must lie side by side"
    assert error is None or error.shape == logits.shape, "one error for each logit"
    if not use_triton(logits):
        _cross_entropy_rows(logits, targets, losses, error, bias, softcap, logit_scale)
        return
    from affina.kernels.triton import linear_cross_entropy as kernel

    kernel.cross_entropy_rows(
        logits,
        targets.contiguous(),
        losses=losses,
        error=error,
        bias=bias.contiguous() if bias is not None else None,
        softcap=softcap,
        logit_scale=logit_scale,
    )


def _cross_entropy_rows(
    logits: Tensor,
    targets: Tensor,
    losses: Tensor,
    error: Tensor | None,
    bias: Tensor | None,
    softcap: float | None,
    logit_scale: float,
) -> None:
    """The specification of `cross_entropy_rows`, in the memory of the logits where these are float32.

    A logit is exponentiated once, for the normaliser and for its probability: on a CPU that is most of the time.
    """
    logits = finish_logits(logits.float(), bias, softcap, logit_scale)
    target = targets.unsqueeze(1)
    ignored = target == IGNORED_LABEL
    target = target.clamp(min=0)
    picked = logits.gather(1, target)
    slope = 1.0 - (logits / softcap).square_() if softcap is not None and error is not None else None
    largest = logits.amax(dim=1, keepdim=True)
    exponentials = logits.sub_(largest).exp_()
    total = exponentials.sum(dim=1, keepdim=True)
    losses.copy_((largest + total.log() - picked).masked_fill_(ignored, 0.0).squeeze(1))
    if error is None:
        return

    difference = exponentials.mul_(logit_scale / total)
    difference.scatter_add_(1, target, torch.full_like(total, -logit_scale))
    if slope is not None:
        difference *= slope
    # On a GPU the test would wait for the device; on a CPU it saves a pass over the logits.
    if logits.device.type != "cpu" or is_true(ignored.any()):
        difference.masked_fill_(ignored, 0.0)
    if error is not difference:
        error.copy_(difference)


def _drop_ignored_rows(hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    assert hidden.dim() == 2, f"hidden must be [N, D], got {tuple(hidden.shape)}"
    assert targets.shape == hidden.shape[:1], f"{tuple(targets.shape)} targets for {tuple(hidden.shape)} hidden"
    # On a GPU the test would wait for the device in every step; callers there pass supervised rows only.
    if hidden.device.type == "cpu" and is_true((targets == IGNORED_LABEL).any()):
        keep = targets != IGNORED_LABEL
        return hidden[keep], targets[keep]
    return hidden, targets
