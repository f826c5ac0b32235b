"""Any loss of each token's logits, without ever holding the logits of all tokens.

Legend: N rows (tokens), D model width, V vocabulary, C rows of one chunk.

**Maths.** For rows h_n [D], a frozen head W [V, D] and a function f that gives each row of logits a loss,

    ℓ_n = f(softcap(s · (W h_n + b)), n)

ℓ_n depends on h_n alone. So `∂ℓ_n/∂h_n = ∂ℓ_n/∂(W h_n) · W` is made in the forward pass, chunk by chunk: autograd from
the losses to the chunk's products with the head, and one product back. The backward pass multiplies the rows by what
arrives. The peak is a chunk's logits, a few times over for f's own intermediate results, plus the [N, D] gradient.

Cross-entropies have a kernel of their own (linear_cross_entropy.py), which needs no autograd. This is for divergences
between whole distributions, where f reads another model's logits of the same rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from affina.kernels.linear_cross_entropy import default_chunk_rows
from affina.kernels.logits import ExpandableRows, head_product, tile_rows, vocabulary_tiles

RowLosses = Callable[[Tensor, slice], Tensor]
"""([C, V] float32 logits, which rows they are) → [C] float32 losses; differentiable in the logits."""


def linear_row_losses(
    hidden: Tensor,
    weight: Tensor | ExpandableRows,
    row_losses: RowLosses,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    chunk_rows: int | None = None,
) -> Tensor:
    """[N] float32 losses with a gradient for `hidden`.

    hidden: [N, D] bf16, fp16 or fp32     weight: [V, D], frozen     bias: [V] or None
    softcap, logit_scale: z = c · tanh(u / c) of u = s · (W h + b)
    """
    assert not (isinstance(weight, Tensor) and weight.requires_grad), "for a trained head the logits are needed again"
    losses: Tensor = _RowLosses.apply(hidden, weight, row_losses, bias, softcap, logit_scale, chunk_rows)  # type: ignore[no-untyped-call]
    return losses


def linear_logits(
    hidden: Tensor,
    weight: Tensor | ExpandableRows,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
) -> Tensor:
    """[C, V] float32 logits of a few rows; no gradient."""
    return _finish(head_product(hidden, weight, dtype=torch.float32), bias, softcap, logit_scale)


def _finish(products: Tensor, bias: Tensor | None, softcap: float | None, logit_scale: float) -> Tensor:
    """Bias, scale and cap; differentiable."""
    logits = products if bias is None else products + bias.float()
    logits = logits if logit_scale == 1.0 else logits * logit_scale
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def _times_head(error: Tensor, weight: Tensor | ExpandableRows, out: Tensor) -> None:
    """`out` [C, D] = `error` [C, V] · W, in the type of `out`."""
    error = error.to(out.dtype)
    if isinstance(weight, Tensor):
        torch.mm(error, weight.to(out.dtype), out=out)
        return
    buffer = out.new_empty(tile_rows(weight.shape, out.dtype.itemsize), weight.shape[1])
    total = torch.zeros_like(out, dtype=torch.float32)
    for tile in vocabulary_tiles(weight, buffer):
        total += torch.mm(error[:, tile.start : tile.stop], tile.weight)
    out.copy_(total)


class _RowLosses(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor | ExpandableRows,
        row_losses: RowLosses,
        bias: Tensor | None,
        softcap: float | None,
        logit_scale: float,
        chunk_rows: int | None,
    ) -> Tensor:
        step = chunk_rows or default_chunk_rows(weight.shape[0], hidden.device)
        losses = hidden.new_empty(hidden.shape[0], dtype=torch.float32)
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for start in range(0, hidden.shape[0], step):
            part = slice(start, min(start + step, hidden.shape[0]))
            products = head_product(hidden[part], weight, dtype=torch.float32)
            if gradient is None:
                losses[part] = row_losses(_finish(products, bias, softcap, logit_scale), part)
                continue
            with torch.enable_grad():
                products.requires_grad_()
                found = row_losses(_finish(products, bias, softcap, logit_scale), part)
                (error,) = torch.autograd.grad(found.sum(), products)
            losses[part] = found.detach()
            _times_head(error, weight, gradient[part])
        if gradient is not None:
            ctx.save_for_backward(gradient)
        return losses

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        # In float32: a factor may lie outside float16's range although the product does not.
        scaled = (gradient.float() * grad_outputs[0].unsqueeze(1)).to(gradient.dtype)
        return scaled, None, None, None, None, None, None
