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

import torch
from torch import Tensor

from affina.kernels.linear_cross_entropy import chunks
from affina.kernels.logits import (
    ExpandableRows,
    HeadOptions,
    differentiable_logits,
    finish_logits,
    finished_logits,
    head_product,
    is_trained,
    tile_rows,
    vocabulary_tiles,
    with_row_gradient,
)

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
    """[N] float32 losses with a gradient for `hidden`, and for the head where it is trained.

    hidden: [N, D] bf16, fp16 or fp32     weight: [V, D]     bias: [V] or None
    softcap, logit_scale: z = c · tanh(u / c) of u = s · (W h + b)

    A trained head needs the logits again in the backward pass: then they are made whole, and kept.
    """
    options = HeadOptions(bias=bias, softcap=softcap, logit_scale=logit_scale)
    if is_trained(weight, bias):
        return row_losses(differentiable_logits(hidden, weight, **options), slice(0, hidden.shape[0]))
    wants_gradient = hidden.requires_grad and torch.is_grad_enabled()
    losses = hidden.new_empty(hidden.shape[0], dtype=torch.float32)
    gradient = torch.empty_like(hidden) if wants_gradient else None
    with torch.no_grad():
        for part in chunks(hidden, weight, chunk_rows):
            products = head_product(hidden[part], weight, dtype=torch.float32)
            if gradient is None:
                losses[part] = row_losses(finished_logits(products, **options), part)
                continue
            with torch.enable_grad():
                products.requires_grad_()
                found = row_losses(finished_logits(products, **options), part)
                (error,) = torch.autograd.grad(found.sum(), products)
            losses[part] = found.detach()
            _times_head(error, weight, gradient[part])
    return losses if gradient is None else with_row_gradient(hidden, losses, gradient)


def linear_logits(
    hidden: Tensor,
    weight: Tensor | ExpandableRows,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
) -> Tensor:
    """[C, V] float32 logits of a few rows; no gradient."""
    return finish_logits(head_product(hidden, weight, dtype=torch.float32), bias, softcap, logit_scale)


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
