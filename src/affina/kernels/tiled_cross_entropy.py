"""Cross-entropy of a frozen head that is kept in few bits: neither the expanded head nor a whole row of logits exists.

Legend: N rows, C rows of one chunk, D model width, V vocabulary, v entries of one tile; z finished logits (bias, scale
and cap applied, see `linear_cross_entropy`), y the target.

**Maths.** For C rows at a time, the vocabulary goes by twice, tile by tile. First the log-sum-exp, with a running
maximum m and a running sum r over the tiles seen so far:

    m' = max(m, max_j z_j)        r' = r · exp(m − m') + Σ_j exp(z_j − m')        j in the tile

so that in the end logsumexp(z) = m + log r, and z_y is picked from the one tile that has it. Then, since
softmax(z)_j = exp(z_j − m) / r needs no other tile,

    ∂loss/∂h = Σ_tiles s · W_tileᵀ [ (softmax(z) − e_y) ∘ ∂z/∂u ]_tile

Nothing is approximated: it is the plain loss, added up in another order. Milakov and Gimelshein, *Online normalizer
calculation for softmax*, arXiv:1805.02867, algorithm 3; over tiles of a product: Dao et al., arXiv:2205.14135, §3.1.

**Precision.** As in `linear_cross_entropy`: products in the type of `hidden` with float32 accumulation, logits and sums
float32. The gradient is added up over the tiles in float32 and rounded once.

**Memory**, whatever N and V are (`workspace_bytes`): one tile of weights v · D, its logits and their gradient C · v,
and twice the chunk's gradient C · D in float32. D = 2,560 in 16 bits: v = 3,200 and C = 512 make 37 MiB.

**Work.** Three products instead of two (the logits are made twice), and the weights are expanded twice for each chunk
of rows. On int8 rows of V = 151,936 and D = 2,560 one expansion reads 0.39 GB and writes 0.78 GB, in PyTorch's two
operations another 1.6 GB mostly in the cache: below a millisecond on an H200, some ten on a T4.

There are no atomics and no data-dependent shapes: same input, same bits, and nothing waits for the device.

Reference: `linear_cross_entropy` on the expanded weight.
"""

from __future__ import annotations

import torch
from torch import Tensor

from affina.kernels.logits import (
    IGNORED_LABEL,
    TILE_BYTES,
    ExpandableRows,
    Tile,
    finish_logits,
    matmul_float32,
    tile_rows,
    vocabulary_tiles,
)

CHUNK_ROWS = 512


def workspace_bytes(shape: tuple[int, int], itemsize: int) -> int:
    """Bytes of the workspace for a head of `shape` (V, D): the most that a call allocates besides what it returns."""
    entries = tile_rows(shape, itemsize)
    tile = entries * shape[1] * itemsize
    # Float32 logits, and beside them where the targets are or the gradient rounded to the type of the product.
    logits = CHUNK_ROWS * entries * (4 + (itemsize if itemsize < 4 else 1))
    return tile + logits + 2 * CHUNK_ROWS * shape[1] * 4


@torch.no_grad()
def tiled_cross_entropy(
    hidden: Tensor,
    weight: ExpandableRows,
    targets: Tensor,
    *,
    losses: Tensor,
    gradient: Tensor | None = None,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    chunk_rows: int | None = None,
    tile_bytes: int = TILE_BYTES,
) -> None:
    """Fills `losses` with the cross-entropy of every row and `gradient` with its gradient by `hidden`.

    hidden:     [N, D] bf16, fp16 or fp32
    weight:     [V, D] the head, expanded in the type of `hidden`
    targets:    [N] int64; -100 gives loss 0 and a gradient of zeros
    losses:     [N] fp32, written
    gradient:   [N, D] in the type of `hidden`, written, or None; may be `hidden` itself
    bias:       [V] or None; softcap, logit_scale: as in `linear_cross_entropy`
    chunk_rows: C; tile_bytes: of the expanded tile
    """
    entries = tile_rows(weight.shape, hidden.dtype.itemsize, tile_bytes)
    buffer = hidden.new_empty(entries, weight.shape[1])
    step = chunk_rows if chunk_rows is not None else CHUNK_ROWS
    for start in range(0, hidden.shape[0], step):
        part = slice(start, min(start + step, hidden.shape[0]))
        chunk = _Chunk(hidden[part], targets[part], bias, softcap, logit_scale)
        largest, total = chunk.normalisers(weight, buffer, losses[part])
        if gradient is not None:
            gradient[part] = chunk.gradient(weight, buffer, largest, total)


class _Chunk:
    """Some rows, and how their logits are finished."""

    def __init__(
        self, hidden: Tensor, targets: Tensor, bias: Tensor | None, softcap: float | None, logit_scale: float
    ) -> None:
        self._hidden = hidden
        self._targets = targets.unsqueeze(1)
        self._ignored = targets == IGNORED_LABEL
        self._bias = bias
        self._softcap = softcap
        self._logit_scale = logit_scale

    def normalisers(self, weight: ExpandableRows, buffer: Tensor, losses: Tensor) -> tuple[Tensor, Tensor]:
        """[C] float32 m and r of each row; fills `losses`."""
        largest = self._hidden.new_full((self._hidden.shape[0],), -torch.inf, dtype=torch.float32)
        total, picked = torch.zeros_like(largest), torch.zeros_like(largest)
        for tile in vocabulary_tiles(weight, buffer):
            logits = self._logits(tile)
            place = self._targets - tile.start
            is_here = (place >= 0) & (place < tile.stop - tile.start)
            of_target = logits.gather(1, place.clamp(0, tile.stop - tile.start - 1))
            picked = torch.where(is_here, of_target, picked.unsqueeze(1)).squeeze(1)
            new_largest = torch.maximum(largest, logits.amax(dim=1))
            total *= (largest - new_largest).exp_()
            total += logits.sub_(new_largest.unsqueeze(1)).exp_().sum(dim=1)
            largest = new_largest
            del logits  # before the next tile's
        losses.copy_((largest + total.log() - picked).masked_fill_(self._ignored, 0.0))
        return largest, total

    def gradient(self, weight: ExpandableRows, buffer: Tensor, largest: Tensor, total: Tensor) -> Tensor:
        """[C, D] float32 gradient of the losses by the rows."""
        gradient = torch.zeros_like(self._hidden, dtype=torch.float32)
        # Ignored rows have no probabilities, and no target in any tile.
        factor = total.reciprocal().masked_fill_(self._ignored, 0.0)
        for tile in vocabulary_tiles(weight, buffer):
            gradient += matmul_float32(self._error(tile, largest.unsqueeze(1), factor.unsqueeze(1)), tile.weight)
        return gradient

    def _error(self, tile: Tile, largest: Tensor, factor: Tensor) -> Tensor:
        """[C, v] gradient of the losses by W h, in the type of the rows."""
        logits = self._logits(tile)
        slope = 1.0 - (logits / self._softcap).square_() if self._softcap is not None else None
        error = logits.sub_(largest).exp_().mul_(factor)
        entries = torch.arange(tile.start, tile.stop, device=error.device)
        error.add_(self._targets == entries, alpha=-1.0)
        if self._logit_scale != 1.0:
            error *= self._logit_scale
        if slope is not None:
            error *= slope
        return error.to(self._hidden.dtype)

    def _logits(self, tile: Tile) -> Tensor:
        logits = matmul_float32(self._hidden, tile.weight.t())
        bias = self._bias[tile.start : tile.stop] if self._bias is not None else None
        return finish_logits(logits, bias, self._softcap, self._logit_scale)
