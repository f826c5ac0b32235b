"""All adapter parameters in one flat float32 buffer, of which PEFT's parameters are views.

One buffer makes clipping, the optimiser and the cast to 16 bits one launch each instead of hundreds, and PEFT still
owns what it owns: its modules see, save, load and merge the same memory.

In 16 bits the computation sees A' = √s A and B' = √s B, with s the adapter's scale. Then the update is t' B'ᵀ without a
factor, and the gradients of A and B are √s times those of A' and B': one factor on the loss's gradient, instead of one
on every product. (Adapters of different scales keep their factors.)

The order follows the products of a layer. Matrices A of projections with a common input (q, k, v; gate, up) lie one
after the other, so that their concatenation, [Σ R, in], is a view as well and x Aᵀ is one product for all of them:

    A_q A_k A_v  B_q  B_k  B_v | A_o  B_o | A_gate A_up  B_gate  B_up | A_down  B_down | next layer
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

_ALIGNMENT = 64
"""Elements. Every matrix starts at a multiple of 128 bytes in 16 bits: what vector loads and matrix units want."""


@dataclass(frozen=True, slots=True)
class LoraPair:
    """The adapter of one projection, as PEFT holds it.

    a: [R, in] float32     b: [out, R] float32     scale: s of W + s · B A
    """

    a: nn.Parameter
    b: nn.Parameter
    scale: float

    @property
    def rank(self) -> int:
        return self.a.shape[0]


@dataclass(frozen=True, slots=True)
class PairSlice:
    """Where the adapter of one projection lies in the flat buffer, and among its group's ranks."""

    rank: int
    scale: float
    ranks: slice
    b_offset: int
    num_outputs: int

    def b(self, flat: Tensor) -> Tensor:
        """[out, R] view of `flat`."""
        return flat[self.b_offset : self.b_offset + self.num_outputs * self.rank].view(self.num_outputs, self.rank)


@dataclass(frozen=True, slots=True)
class GroupSlice:
    """Where the adapters of projections with a common input lie. `pairs` has None for a projection without adapter."""

    a_offset: int
    total_rank: int
    num_inputs: int
    pairs: tuple[PairSlice | None, ...]

    def a(self, flat: Tensor) -> Tensor:
        """[Σ R, in] view of `flat`: the A of all projections, one below the other."""
        return flat[self.a_offset : self.a_offset + self.total_rank * self.num_inputs].view(
            self.total_rank, self.num_inputs
        )


class FlatAdapter:
    """The flat buffer.

    parameter:  [P] float32, what the optimiser trains, padding included
    layout:     PEFT's parameters with the places where they begin
    root_scale: √s; the gradient of the loss is multiplied by it before the backward pass
    """

    def __init__(self, groups: Sequence[Sequence[LoraPair | None]], *, compute_dtype: torch.dtype) -> None:
        self.slices: list[GroupSlice | None] = []
        moves: list[tuple[nn.Parameter, int]] = []
        scales = {pair.scale for group in groups for pair in group if pair is not None}
        is_scaled = compute_dtype != torch.float32 and len(scales) == 1 and min(scales) > 0
        self.root_scale = math.sqrt(min(scales)) if is_scaled else 1.0
        offset = 0
        for group in groups:
            group_slice, offset = _lay_out(group, offset, moves, scale=1.0 if is_scaled else None)
            self.slices.append(group_slice)
        assert moves, "an adapter without parameters"
        first = moves[0][0]
        self.parameter = nn.Parameter(torch.zeros(offset, dtype=torch.float32, device=first.device))
        self._shadow = torch.empty_like(self.parameter.data, dtype=compute_dtype)
        for source, start in moves:
            view = self.parameter.data[start : start + source.numel()].view(source.shape)
            view.copy_(source.data)
            source.data = view
        self.layout: dict[nn.Parameter, int] = dict(moves)

    @property
    def num_padding(self) -> int:
        """Elements between the matrices; always zero, gradients too."""
        return self.parameter.numel() - sum(source.numel() for source in self.layout)

    def computed(self) -> Tensor:
        """[P] the parameters as the computation sees them: the buffer itself in float32, else a fresh 16-bit copy,
        times `root_scale`."""
        if self._shadow.dtype == torch.float32:
            return self.parameter.data
        return torch.mul(self.parameter.data, self.root_scale, out=self._shadow)

    def new_gradient(self) -> Tensor:
        """[P] float32 for gradients: zero where no matrix lies, undefined elsewhere."""
        gradient = torch.empty_like(self.parameter)
        return gradient.zero_() if self.num_padding else gradient

    def gradients_of(self, gradient: Tensor) -> dict[nn.Parameter, Tensor]:
        """PEFT's parameters with their views of a flat gradient."""
        return {source: self._view(gradient, source) for source in self.layout}

    def split(self, flat: Tensor, order: Sequence[nn.Parameter]) -> list[Tensor]:
        """A flat tensor cut into copies that belong to the parameters of `order`."""
        return [self._view(flat, parameter).clone() for parameter in order]

    def join(self, parts: Sequence[Tensor], order: Sequence[nn.Parameter]) -> Tensor:
        """[P] the inverse of `split`, zero in the padding."""
        flat = torch.zeros_like(self.parameter.data)
        for part, parameter in zip(parts, order, strict=True):
            self._view(flat, parameter).copy_(part)
        return flat

    def _view(self, flat: Tensor, parameter: nn.Parameter) -> Tensor:
        start = self.layout[parameter]
        return flat[start : start + parameter.numel()].view(parameter.shape)

    def release(self) -> None:
        """Give every PEFT parameter its own memory again, with the present values."""
        for source in self.layout:
            source.data = source.data.clone()


def _lay_out(
    group: Sequence[LoraPair | None], offset: int, moves: list[tuple[nn.Parameter, int]], *, scale: float | None
) -> tuple[GroupSlice | None, int]:
    """Assign places to one group's matrices from `offset` on; returns the end. scale: for all; None: each its own."""
    present = [pair for pair in group if pair is not None]
    if not present:
        return None, offset
    a_offset, num_inputs = offset, present[0].a.shape[1]
    for pair in present:
        moves.append((pair.a, offset))
        offset += pair.a.numel()
    offset = _aligned(offset)
    pairs: list[PairSlice | None] = []
    first_rank = 0
    for member in group:
        if member is None:
            pairs.append(None)
            continue
        ranks = slice(first_rank, first_rank + member.rank)
        own = member.scale if scale is None else scale
        pairs.append(PairSlice(member.rank, own, ranks, offset, member.b.shape[0]))
        moves.append((member.b, offset))
        offset = _aligned(offset + member.b.numel())
        first_rank += member.rank
    return GroupSlice(a_offset, first_rank, num_inputs, tuple(pairs)), offset


def _aligned(offset: int) -> int:
    return -(-offset // _ALIGNMENT) * _ALIGNMENT
