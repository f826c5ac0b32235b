"""Any loss of each token's logits, without ever holding the logits of all tokens.

Legend: N rows (tokens), D model width, V vocabulary, C rows of one chunk.

**Maths.** For rows h_n [D], a frozen head W [V, D] and a function f that gives each row of logits a loss,

    ℓ_n = f(softcap(s · (W h_n + b)), n)

ℓ_n depends on h_n alone. So `∂ℓ_n/∂h_n` is made in the forward pass, chunk by chunk, by autograd over the chunk's
logits, and the backward pass multiplies its rows by what arrives: the peak is a chunk's logits, a few times over for
f's own intermediate results, plus the [N, D] gradient.

Cross-entropies have a kernel of their own (linear_cross_entropy.py), which needs no autograd. This is for divergences
between whole distributions, where f reads another model's logits of the same rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from affina.kernels.linear_cross_entropy import default_chunk_rows

RowLosses = Callable[[Tensor, slice], Tensor]
"""([C, V] float32 logits, which rows they are) → [C] float32 losses; differentiable in the logits."""


def linear_row_losses(
    hidden: Tensor,
    weight: Tensor,
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
    assert not weight.requires_grad, "for a trained head the logits are needed again"
    losses: Tensor = _RowLosses.apply(hidden, weight, row_losses, bias, softcap, logit_scale, chunk_rows)  # type: ignore[no-untyped-call]
    return losses


def linear_logits(
    hidden: Tensor,
    weight: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
) -> Tensor:
    """[C, V] float32 logits of a few rows, differentiable."""
    logits = torch.mm(hidden, weight.to(hidden.dtype).t()).float()
    if bias is not None:
        logits = logits + bias.float()
    logits = logits * logit_scale
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


class _RowLosses(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
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
            rows = hidden[part].detach()
            with torch.set_grad_enabled(gradient is not None):
                rows = rows.requires_grad_(gradient is not None)
                logits = linear_logits(rows, weight.detach(), bias=bias, softcap=softcap, logit_scale=logit_scale)
                found = row_losses(logits, part)
                if gradient is not None:
                    (gradient[part],) = torch.autograd.grad(found.sum(), rows)
            losses[part] = found.detach()
        if gradient is not None:
            ctx.save_for_backward(gradient)
        return losses

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        # In float32: a factor may lie outside float16's range although the product does not.
        scaled = (gradient.float() * grad_outputs[0].unsqueeze(1)).to(gradient.dtype)
        return scaled, None, None, None, None, None, None
