"""From hidden states to logits: what whole and tiled cross-entropies share.

Legend: N rows, D model width, V vocabulary, v entries of one tile of it.

A frozen head is a tensor [V, D], or anything that can write some of its rows into memory it is given (`ExpandableRows`:
a quantised weight). The second kind is never expanded whole.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol, TypedDict

import torch
from torch import Tensor

IGNORED_LABEL = -100

TILE_BYTES = 16 * 1024 * 1024
"""Expanded weights of one tile of the vocabulary: small beside what one decoder layer needs, and products of a thousand
rows with it are long enough that launching them costs little."""
TILE_MULTIPLE = 128


class ExpandableRows(Protocol):
    """A frozen matrix [V, D] in some other form."""

    @property
    def shape(self) -> tuple[int, int]:
        """(V, D)"""
        ...

    @property
    def device(self) -> torch.device: ...

    def rows_into(self, start: int, out: Tensor) -> Tensor:
        """Rows `start`, `start` + 1, … written into `out` [v, D], in its type; returns `out`."""
        ...


class HeadOptions(TypedDict):
    """What lies between W h and the logits z = c · tanh(u / c), u = s · (W h + b): `bias` [V] or None, c or None, s."""

    bias: Tensor | None
    softcap: float | None
    logit_scale: float


@dataclass(frozen=True, slots=True)
class Tile:
    """Entries `start` to `stop` of the vocabulary. weight: [v, D], valid until the next tile is asked for."""

    start: int
    stop: int
    weight: Tensor


def tile_rows(shape: tuple[int, int], itemsize: int, tile_bytes: int = TILE_BYTES) -> int:
    """v, the entries of the vocabulary that are expanded at once."""
    entries = tile_bytes // (shape[1] * itemsize)
    return min(shape[0], max(TILE_MULTIPLE, entries // TILE_MULTIPLE * TILE_MULTIPLE))


def vocabulary_tiles(weight: ExpandableRows, buffer: Tensor) -> Iterator[Tile]:
    """The whole of `weight`, tile by tile in the memory of `buffer` [v, D]."""
    num_entries = weight.shape[0]
    for start in range(0, num_entries, buffer.shape[0]):
        stop = min(start + buffer.shape[0], num_entries)
        yield Tile(start, stop, weight.rows_into(start, buffer[: stop - start]))


@torch.no_grad()
def head_product(
    hidden: Tensor, weight: Tensor | ExpandableRows, *, dtype: torch.dtype | None = None, tile_bytes: int = TILE_BYTES
) -> Tensor:
    """[N, V] hidden @ weightᵀ in `dtype`, that of `hidden` by default; no autograd.

    hidden: [N, D] bf16, fp16 or fp32; the product is in its type, with float32 accumulation. For dtype float32 it is
            not rounded to 16 bits in between where the device allows that
    """
    dtype = dtype or hidden.dtype
    if isinstance(weight, Tensor):
        return _product(hidden, weight.to(hidden.dtype).t(), dtype)
    product = hidden.new_empty(hidden.shape[0], weight.shape[0], dtype=dtype)
    buffer = hidden.new_empty(tile_rows(weight.shape, hidden.dtype.itemsize, tile_bytes), weight.shape[1])
    for tile in vocabulary_tiles(weight, buffer):
        product[:, tile.start : tile.stop] = _product(hidden, tile.weight.t(), dtype)
    return product


def _product(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    return matmul_float32(left, right) if dtype == torch.float32 else torch.mm(left, right).to(dtype)


def matmul_float32(left: Tensor, right: Tensor) -> Tensor:
    """left @ right as float32, without rounding the result to 16 bits where the device allows it."""
    if left.device.type == "cuda" and left.dtype in (torch.float16, torch.bfloat16):
        return torch.mm(left, right, out_dtype=torch.float32)
    return torch.mm(left, right).float()


def finish_logits(logits: Tensor, bias: Tensor | None, softcap: float | None, logit_scale: float) -> Tensor:
    """Bias, scale and cap, in place on float32 logits."""
    if bias is not None:
        logits += bias.float()
    if logit_scale != 1.0:
        logits *= logit_scale
    if softcap is not None:
        logits = logits.div_(softcap).tanh_().mul_(softcap)
    return logits


# With gradients
# ---------------------------------------------------------------------------------------------------------


def is_trained(weight: Tensor | ExpandableRows, bias: Tensor | None) -> bool:
    """Whether the head itself wants a gradient now: then its logits are needed again in the backward pass."""
    tensors = (weight if isinstance(weight, Tensor) else None, bias)
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def differentiable_logits(
    hidden: Tensor,
    weight: Tensor | ExpandableRows,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
) -> Tensor:
    """[N, V] float32 logits, whole and under autograd: for a head that is trained, and the specification of others."""
    assert isinstance(weight, Tensor), "quantised weights are not trained"
    products = torch.nn.functional.linear(hidden, weight.to(hidden.dtype)).float()
    return finished_logits(products, bias, softcap, logit_scale)


def finished_logits(products: Tensor, bias: Tensor | None, softcap: float | None, logit_scale: float) -> Tensor:
    """`finish_logits` in new memory, and differentiable."""
    logits = products if bias is None else products + bias.float()
    logits = logits if logit_scale == 1.0 else logits * logit_scale
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def with_row_gradient(hidden: Tensor, losses: Tensor, gradient: Tensor) -> Tensor:
    """`losses` [N] with the known `gradient` [N, D] of each by its own row of `hidden` [N, D].

    Loss n depends on row n alone, so that ∂L/∂h_n = g_n · ∂loss_n/∂h_n for whatever g_n arrives in the backward pass.
    """
    result: Tensor = _WithRowGradient.apply(hidden, losses, gradient)  # type: ignore[no-untyped-call]
    return result


class _WithRowGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, losses: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        return losses.view_as(losses)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        # The product is made in float32 and rounded once: a factor (loss scale over token count) may lie outside
        # float16's range although the product does not.
        scaled = torch.mul(gradient, grad_outputs[0].unsqueeze(1), out=torch.empty_like(gradient))
        return scaled, None, None
