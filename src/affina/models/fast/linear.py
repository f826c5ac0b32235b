"""A stack of frozen projections with a common input and their LoRA adapters: forward and backward by hand.

Legend: M tokens, K inputs, N outputs of all projections together, N_i of projection i, R_i its rank, R = Σ R_i.

    t   = x Aᵀ                         [M, R]: the A of all projections in one product
    y_i = x W_iᵀ + s_i t_i B_iᵀ + b_i  [M, N_i]

and for the gradient g_i of y_i, with W frozen,

    u_i  = s_i g_i B_i                 [M, R_i]: gradient of t_i
    ∂B_i = s_i g_iᵀ t_i                ∂A = uᵀ x
    ∂x   = Σ g_i W_i + u A = [g u] [W; A]

Gradients of outputs therefore live in buffers of N + R columns (`new_outputs`): u is written beside g.

Three ways to the update s t Bᵀ of y, the same function:

* *added* by a product of its own, in place: right in every precision;
* *folded* into the operation that reads y next (norm and rotation, the gated activation), which adds it tile by tile:
  it never touches memory. The caller asks for y without it (`folds`) and hands on `t`;
* *merged*: the product is with W + s B A, made once per use. Then neither y nor ∂x is touched a second time, and the
  cost does not grow with the number of tokens. The sum is rounded to the type of the weight, which swallows small
  updates in 16 bits and is 2⁻²⁴ in float32, so it is used in float32 only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from affina.catalog.save_policy import PITCH
from affina.kernels.fp8 import QuantizedRows
from affina.kernels.products import product_into
from affina.models.fast.parameters import FlatPart, GroupSlice, PairSlice
from affina.models.fast.weights import FrozenStack, Workspace


@dataclass(slots=True)
class Operand:
    """Input [M, K] of a stack.

    quantized: the same rows in 8 bits, where what made them wrote those too; the first product uses them up
    """

    values: Tensor
    quantized: QuantizedRows | None = None

    def part(self, rows: slice) -> Operand:
        """Some of the rows, the same memory."""
        return Operand(self.values[rows], None if self.quantized is None else self.quantized.part(rows))

    def take_quantized(self) -> QuantizedRows | None:
        quantized, self.quantized = self.quantized, None
        return quantized


@dataclass(frozen=True, slots=True)
class AdaptedLinear:
    """stack: the frozen weights; slices: of the adapters in the flat buffer, None where nothing is adapted.

    outputs: of each projection; bias: [N] or None; merges: W + s B A instead of two products (float32)
    """

    stack: FrozenStack
    slices: GroupSlice | None
    outputs: tuple[slice, ...]
    bias: Tensor | None
    workspace: Workspace
    merges: bool

    @property
    def num_outputs(self) -> int:
        """N"""
        return int(self.outputs[-1].stop)

    @property
    def num_extra(self) -> int:
        """R columns beside the outputs' gradients, where u is written."""
        return 0 if self.slices is None or self.merges else self.stack.num_extra

    def new_outputs(self, num_tokens: int, like: Tensor) -> Tensor:
        """[M, N + R] uninitialised, its rows 128 bytes apart or a multiple."""
        columns = self.num_outputs + self.num_extra
        return like.new_empty(num_tokens, -(-columns // PITCH) * PITCH)[:, :columns]

    def new_codes(self, x: Tensor) -> QuantizedRows | None:
        """Memory for the codes of x [M, K], for who makes x to write; None where products take x as it is."""
        return QuantizedRows.empty(x.shape[0], x.shape[1], x.device) if self.stack.takes_quantized else None

    def wide(self, stream: Tensor) -> Tensor:
        """[M, N + R] of a buffer whose first N columns are a gradient of the outputs, and which has R more, or more."""
        return stream[:, : self.num_outputs + self.num_extra]

    def forward(
        self, operand: Operand, flat: FlatPart, *, is_wide: bool = False, folds: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """x [M, K] → (y [M, N], t [M, R] for the backward pass).

        flat:    the parameters
        is_wide: y is the first N columns of a buffer for its gradient: [M, N + R] is returned
        folds:   y without s t Bᵀ, which the caller's next operation adds
        """
        x, quantized = operand.values, operand.take_quantized()
        wide = self.new_outputs(x.shape[0], x) if is_wide else x.new_empty(x.shape[0], self.num_outputs)
        y = wide[:, : self.num_outputs]
        t = None if self.slices is None else x @ self.slices.a(flat).t()
        if t is not None and self.merges:
            torch.mm(x, self._merged_weight(flat).t(), out=y)
        else:
            self.stack.forward(x, quantized=quantized, out=y)
            if t is not None and not folds:
                self._add_update(y, t, flat)
        if self.bias is not None:
            y += self.bias
        return wide, t

    def a(self, flat: FlatPart) -> Tensor | None:
        """A [R, K] of all projections, None where none has an adapter."""
        return None if self.slices is None else self.slices.a(flat)

    def factors(self, flat: FlatPart) -> list[Tensor | None]:
        """B [N_i, R_i] of every projection, None where it has no adapter."""
        if self.slices is None:
            return [None] * len(self.outputs)
        return [pair.b(flat) if pair is not None else None for pair in self.slices.pairs]

    @property
    def scales(self) -> list[float]:
        """s of every projection; 1 where it has no adapter."""
        if self.slices is None:
            return [1.0] * len(self.outputs)
        return [pair.scale if pair is not None else 1.0 for pair in self.slices.pairs]

    def rank_gradient(
        self, wide: Tensor, t: Tensor | None, flat: FlatPart, gradient: FlatPart | None, *, accumulates: bool = False
    ) -> Tensor | None:
        """u [M, R], the gradient of t; ∂B goes into `gradient`, or is added to it; None: it is known already.

        wide: [M, N + R] with the gradient of y in its first N columns; u is written into the others
        t:    [M, R], which only ∂B needs
        """
        if self.slices is None:
            return None
        u = wide[:, self.num_outputs :] if self.num_extra else wide.new_empty(wide.shape[0], self.slices.total_rank)
        for pair, columns in self._pairs():
            g = wide[:, columns]
            torch.mm(g, pair.b(flat), out=u[:, pair.ranks])
            if gradient is not None:
                assert t is not None
                target = pair.b(gradient)
                product_into(g.t(), t[:, pair.ranks], target, factor=pair.scale, accumulates=accumulates)
            if pair.scale != 1.0:
                u[:, pair.ranks] *= pair.scale
        return u

    def a_gradient(
        self,
        u: Tensor | None,
        x: Tensor,
        gradient: FlatPart,
        *,
        columns: Tensor | None = None,
        accumulates: bool = False,
    ) -> None:
        """∂A = uᵀ x into `gradient`. columns: [K] factors on its columns, see `DecoderLayer`."""
        if self.slices is None:
            return
        assert u is not None
        product_into(u.t(), x, self.slices.a(gradient), columns=columns, accumulates=accumulates)

    def input_gradient(self, wide: Tensor, u: Tensor | None, flat: FlatPart, *, columns: slice = slice(None)) -> Tensor:
        """∂x [M, K] from the wide gradient of the outputs and that of t, after `rank_gradient`.

        columns: of x, where not all are wanted
        """
        if self.slices is None:
            return self.stack.input_gradient(wide, None, columns=columns)
        if self.merges:
            return wide @ self._merged_weight(flat)[:, columns]
        return self.stack.input_gradient(wide, self.slices.a(flat), None if self.num_extra else u, columns=columns)

    def _pairs(self) -> list[tuple[PairSlice, slice]]:
        assert self.slices is not None
        both = zip(self.slices.pairs, self.outputs, strict=True)
        return [(pair, columns) for pair, columns in both if pair is not None]

    def _add_update(self, y: Tensor, t: Tensor, flat: FlatPart) -> None:
        for pair, columns in self._pairs():
            y[:, columns].addmm_(t[:, pair.ranks], pair.b(flat).t(), alpha=pair.scale)

    def _merged_weight(self, flat: FlatPart) -> Tensor:
        assert self.slices is not None
        weight = self.stack.dense(self.workspace.matrix(*self.stack.shape))
        a = self.slices.a(flat)
        for pair, rows in self._pairs():
            weight[rows].addmm_(pair.b(flat), a[pair.ranks], alpha=pair.scale)
        return weight


def output_slices(sizes: Sequence[int]) -> tuple[slice, ...]:
    """Where the outputs of projections of these sizes lie beside each other."""
    ends = list(accumulate(sizes))
    return tuple(slice(end - size, end) for size, end in zip(sizes, ends, strict=True))
