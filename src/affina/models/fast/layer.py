"""One decoder layer: forward and backward written out.

Legend: T tokens, D hidden, I intermediate, H heads, G key/value heads, K head dim, R ranks. *Wide* tensors have R more
columns than their name says, see linear.py.

Forward, with x the residual stream:

    h₁ = w₁ ∘ x / rms(x)                      q, k = rope(norm(q)), rope(norm(k))
    [q k v] = h₁ W_qkvᵀ (+ adapters)          o = attention(q, k, v)
    x₂ = x + o W_oᵀ
    h₂ = w₂ ∘ x₂ / rms(x₂)                    [g u] = h₂ W_guᵀ
    x₃ = x₂ + (silu(g) ∘ u) W_dᵀ

The backward pass walks up the same list. Some things are worth saying.

* Norm outputs are never kept and never recomputed for the adapters' sake. With h = w ∘ (ρ x), ρ one number per token,

      ∂A = uᵀ h = (ρ ∘ u)ᵀ x ∘ w         (ρ scales the rows of u, w the columns of the result)

  so the gradient of A comes from x, which is kept anyway.
* The sum x₂ + … of a layer's end is left to the next layer's norm, which reads both anyway (`Pending`).
* Buffers are reused as soon as their content is spent: the gradient of gate and up is written over them, the
  activation over its own gradient, and there is one gradient of the residual stream, from the last layer to the first.
* Where gate and up are not kept, the MLP runs over a few thousand tokens at a time, forward and backward: it is the
  widest part of a layer, and no token of it sees another.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypedDict

import torch
from torch import Tensor

from affina.catalog.decoder import DecoderSpec
from affina.catalog.fused_memory import MLP_CHUNK_TOKENS
from affina.catalog.save_policy import Keep
from affina.kernels.attention import AttentionResult, Segments, attention, attention_backward
from affina.kernels.qk_rope import QkvUpdate, qk_rope, qk_rope_backward
from affina.kernels.rms_norm import RowUpdate, add_rms_norm, add_rows, rms_norm, rms_norm_backward
from affina.kernels.swiglu import GateUpUpdate, swiglu, swiglu_backward_with_ranks
from affina.models.fast.linear import AdaptedLinear, Operand
from affina.models.fast.parameters import FlatPart


@dataclass(frozen=True, slots=True)
class RowContext:
    """What the layers need to know of one packed row.

    cos, sin:    [T, K/2] float32
    flat:        the adapter, or at least that of the layer at hand
    num_attention_on_host: so many layers, the first ones, send the attention's output to host memory where they would
                           compute it again otherwise
    part_tokens: tokens that are computed at once where not all need be
    in_parts:    all that can be computed part by part is (parts.py)
    """

    segments: Segments
    cos: Tensor
    sin: Tensor
    flat: FlatPart
    num_attention_on_host: int = 0
    part_tokens: int = MLP_CHUNK_TOKENS
    in_parts: bool = False

    def parts(self) -> Iterator[slice]:
        """The row cut into parts."""
        num_tokens = self.cos.shape[0]
        for start in range(0, num_tokens, self.part_tokens):
            yield slice(start, min(start + self.part_tokens, num_tokens))


@dataclass(slots=True)
class Pending:
    """The residual stream between two layers, its last sum not yet made: x + update + low-rank part, [T, D].

    The next norm makes it, so that it costs no pass of its own; `settle` then forgets the terms.
    """

    x: Tensor
    update: Tensor | None = None
    lora: RowUpdate | None = None

    def settle(self, x: Tensor) -> None:
        """Take the sum [T, D] in place of its terms."""
        self.x, self.update, self.lora = x, None, None

    def rows(self, positions: Tensor) -> Tensor:
        """[N, D] the sum at these positions."""
        x = self.x.index_select(0, positions)
        if self.update is None:
            return x
        lora = self.lora
        if lora is not None:
            lora = RowUpdate(lora.t.index_select(0, positions), lora.b, lora.scale)
        return add_rows(x, self.update.index_select(0, positions), lora=lora, out=x)


@dataclass(slots=True)
class Saved:
    """What a layer keeps; fields are None at leaner levels and filled again before the backward pass.

    qkv, gate_up: wide. v: [T, G, K] with the update folded in, None where it is a view of qkv
    host_pass: the forward pass whose tensors of this layer are in host memory, see offload.py
    """

    x: Tensor
    rstd1: Tensor | None = None
    qkv: Tensor | None = None
    t_qkv: Tensor | None = None
    q: Tensor | None = None
    k: Tensor | None = None
    v: Tensor | None = None
    attended: AttentionResult | None = None
    t_o: Tensor | None = None
    x2: Tensor | None = None
    rstd2: Tensor | None = None
    gate_up: Tensor | None = None
    t_gate_up: Tensor | None = None
    t_down: Tensor | None = None
    host_pass: int | None = None


@dataclass(frozen=True, slots=True)
class NormedMlp:
    """What the backward pass of an MLP needs of some tokens.

    x2: [M, D]; rstd2: [M] its norm's factors; gate_up: [M, 2 I + R] wide; t_gate_up, t_down: [M, R]
    """

    x2: Tensor
    rstd2: Tensor
    gate_up: Tensor
    t_gate_up: Tensor | None
    t_down: Tensor | None


@dataclass(frozen=True, slots=True)
class DecoderLayer:
    """Weights of one layer. norm weights: [D]; q_norm, k_norm: [K] or None.

    folds: low-rank updates of q, k, v, gate and up are added by the operations that read them (16-bit kernels)
    """

    spec: DecoderSpec
    window: int | None
    folds: bool
    input_norm: Tensor
    mlp_norm: Tensor
    q_norm: Tensor | None
    k_norm: Tensor | None
    qkv: AdaptedLinear
    output: AdaptedLinear
    gate_up: AdaptedLinear
    down: AdaptedLinear

    @property
    def linears(self) -> tuple[AdaptedLinear, AdaptedLinear, AdaptedLinear, AdaptedLinear]:
        """In the order of `FlatAdapter`."""
        return self.qkv, self.output, self.gate_up, self.down

    def forward(
        self, before: Pending, row: RowContext, keep: Keep | None, *, keeps_attention: bool = False
    ) -> tuple[Pending, Saved | None]:
        """x → (x₃, what `keep` says; None keeps nothing, for evaluation). The update of `before` is used up.

        keeps_attention: the attention's output at levels that do not name it
        """
        saved, h = self.normed_input(before)
        before.settle(saved.x)
        self._project(h, saved, row)
        self._attend(saved, row)
        h = self._add_attention(saved, row)
        assert saved.x2 is not None
        if keep is not None and keep >= Keep.PRODUCTS:
            update, saved.gate_up, saved.t_gate_up, saved.t_down = self.mlp(h, row)
        else:
            update, saved.t_down = self._mlp_in_parts(h, row)
        after = Pending(saved.x2, update, self.row_update(self.down, saved.t_down, row))
        return after, None if keep is None else _kept(saved, keep, keeps_attention=keeps_attention)

    def backward(self, stream: Tensor, saved: Saved, row: RowContext, gradient: FlatPart, *, is_first: bool) -> None:
        """∂x₃ → ∂x, written over it; adapter gradients go into `gradient`. Uses up `saved`.

        stream:   [T, D + R] the gradient of the residual stream, with room for the largest R of any layer
        is_first: nothing below needs a gradient, and ∂x is not made
        """
        self._complete_attention(saved, row)
        self._mlp_backward(stream, saved, row, gradient)
        saved.x2 = None
        grad_qkv = self._attention_backward(stream, saved, row, gradient)
        assert saved.rstd1 is not None
        self.input_backward(grad_qkv, saved.t_qkv, saved.x, saved.rstd1, stream, row, gradient, is_first=is_first)

    def input_backward(
        self,
        grad_qkv: Tensor,
        t: Tensor | None,
        x: Tensor,
        rstd: Tensor,
        stream: Tensor,
        row: RowContext,
        gradient: FlatPart,
        *,
        is_first: bool,
        accumulates: bool = False,
    ) -> None:
        """wide gradient of q, k, v of some tokens and ∂x₂ of them in `stream` → ∂x in its place."""
        if is_first:
            u = self.qkv.rank_gradient(grad_qkv, t, row.flat, gradient, accumulates=accumulates)
            self.normed_a_gradient(self.qkv, u, x, rstd, self.input_norm, gradient, accumulates=accumulates)
            return
        residual = stream[:, : self.spec.hidden_size]
        self.through_norm(
            self.qkv,
            grad_qkv,
            t,
            x,
            rstd,
            self.input_norm,
            row,
            gradient,
            grad_residual=residual,
            out=residual,
            accumulates=accumulates,
        )

    # Forward

    def normed_input(self, before: Pending) -> tuple[Saved, Operand]:
        """(x, kept; h₁ [T, D])"""
        if before.update is None:
            h, rstd = self.normed(before.x, self.input_norm, self.qkv)
            return Saved(before.x, rstd1=rstd), h
        x, h, rstd = self.normed_sum(before.x, before.update, before.lora, self.input_norm, self.qkv)
        return Saved(x, rstd1=rstd), h

    def normed(self, x: Tensor, weight: Tensor, reader: AdaptedLinear) -> tuple[Operand, Tensor]:
        """(norm of x, for `reader`; its factors [M])"""
        codes = reader.new_codes(x)
        h, rstd = rms_norm(x, weight, self.spec.norm_epsilon, codes_out=codes)
        return Operand(h, codes), rstd

    def normed_sum(
        self, x: Tensor, update: Tensor, lora: RowUpdate | None, weight: Tensor, reader: AdaptedLinear
    ) -> tuple[Tensor, Operand, Tensor]:
        """(x + update + low-rank part, written over `update`; its norm, for `reader`; the norm's factors [M])"""
        codes = reader.new_codes(x)
        x, h, rstd = add_rms_norm(x, update, weight, self.spec.norm_epsilon, sum_out=update, lora=lora, codes_out=codes)
        return x, Operand(h, codes), rstd

    def _project(self, h: Operand, saved: Saved, row: RowContext) -> None:
        """h₁ → q, k, v"""
        saved.qkv, saved.t_qkv = self.qkv.forward(h, row.flat, is_wide=True, folds=self.folds)

    def _attend(self, saved: Saved, row: RowContext) -> None:
        """q, k, v → o"""
        self._rotate(saved, row)
        q, k, v = self.heads(saved)
        saved.attended = attention(q, k, v, row.segments, scale=self.spec.attention_scale, window=self.window)

    def _rotate(self, saved: Saved, row: RowContext) -> None:
        assert saved.qkv is not None
        products = saved.qkv[:, : self.qkv.num_outputs]
        update = self.qkv_update(saved.t_qkv, row)
        options = self.rope_options()
        if update is None:
            saved.q, saved.k = qk_rope(products, row.cos, row.sin, **options)
        else:
            saved.q, saved.k, saved.v = qk_rope(products, row.cos, row.sin, **options, lora=update)

    def heads(self, saved: Saved) -> tuple[Tensor, Tensor, Tensor]:
        """q [T, H, K], k [T, G, K], v [T, G, K], the last a view of qkv where nothing was folded into it."""
        assert saved.q is not None
        assert saved.k is not None
        if saved.v is not None:
            return saved.q, saved.k, saved.v
        assert saved.qkv is not None
        columns = saved.qkv[:, self.spec.query_size + self.spec.key_value_size : self.qkv.num_outputs]
        return saved.q, saved.k, columns.view(-1, self.spec.num_kv_heads, self.spec.head_dim)

    def _add_attention(self, saved: Saved, row: RowContext) -> Operand:
        """o → x₂ → h₂ [T, D]"""
        assert saved.attended is not None
        heads = saved.attended.output.flatten(1)
        update, saved.t_o = self.output.forward(Operand(heads), row.flat, folds=self.folds)
        lora = self.row_update(self.output, saved.t_o, row)
        saved.x2, h, saved.rstd2 = self.normed_sum(saved.x, update, lora, self.mlp_norm, self.gate_up)
        return h

    def mlp(self, h: Operand, row: RowContext) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """h₂ of some tokens → (what is added to x₂, wide gate and up, their t, t of the down projection)"""
        gate_up, t = self.gate_up.forward(h, row.flat, is_wide=True, folds=self.folds)
        activation = swiglu(gate_up[:, : self.gate_up.num_outputs], lora=self.gate_up_update(t, row))
        update, t_down = self.down.forward(Operand(activation), row.flat, folds=self.folds)
        return update, gate_up, t, t_down

    def _mlp_in_parts(self, h: Operand, row: RowContext) -> tuple[Tensor, Tensor | None]:
        """h₂ → (what is added to x₂, t of the down projection)"""
        if h.values.shape[0] <= row.part_tokens:
            update, _, _, t_down = self.mlp(h, row)
            return update, t_down
        update = torch.empty_like(h.values)
        ts = []
        for part in row.parts():
            update[part], _, _, t = self.mlp(h.part(part), row)
            ts.append(t)
        return update, joined(ts)

    # Backward

    def _complete_attention(self, saved: Saved, row: RowContext) -> None:
        """Compute again what was not kept, up to x₂."""
        if saved.qkv is None:
            h, saved.rstd1 = self.normed(saved.x, self.input_norm, self.qkv)
            self._project(h, saved, row)
            del h
        if saved.attended is None:
            self._attend(saved, row)
        elif saved.q is None:
            self._rotate(saved, row)
        if saved.x2 is None:
            self._add_attention(saved, row)

    def _mlp_backward(self, stream: Tensor, saved: Saved, row: RowContext, gradient: FlatPart) -> None:
        """∂x₃ → ∂x₂, the sum of its two ways, in its place."""
        assert saved.x2 is not None
        if saved.gate_up is not None:
            assert saved.rstd2 is not None
            kept = NormedMlp(saved.x2, saved.rstd2, saved.gate_up, saved.t_gate_up, saved.t_down)
            saved.gate_up = None
            self.mlp_backward(stream, kept, row, gradient)
            return
        for part in row.parts():
            x2 = saved.x2[part]
            h, rstd2 = self.normed(x2, self.mlp_norm, self.gate_up)
            t_down = saved.t_down[part] if saved.t_down is not None else None
            again = self.mlp_again(x2, h, rstd2, t_down, row)
            del h
            self.mlp_backward(stream[part], again, row, gradient, accumulates=part.start > 0)

    def mlp_again(self, x2: Tensor, h: Operand, rstd2: Tensor, t_down: Tensor | None, row: RowContext) -> NormedMlp:
        """What the backward pass of some tokens' MLP needs, from their x₂ and its norm h."""
        gate_up, t = self.gate_up.forward(h, row.flat, is_wide=True, folds=self.folds)
        return NormedMlp(x2, rstd2, gate_up, t, t_down)

    def mlp_backward(
        self, stream: Tensor, kept: NormedMlp, row: RowContext, gradient: FlatPart, *, accumulates: bool = False
    ) -> None:
        """∂x₃ of some tokens → ∂x₂ of them, in its place. Uses up `kept`."""
        grad, wide, t = self.down.wide(stream), kept.gate_up, kept.t_gate_up
        u_down = self.down.rank_gradient(grad, kept.t_down, row.flat, gradient, accumulates=accumulates)
        grad_activation = self.down.input_gradient(grad, u_down, row.flat)
        gate_up = wide[:, : self.gate_up.num_outputs]
        b_gate, b_up = self.gate_up.factors(gradient)
        swiglu_backward_with_ranks(
            grad_activation,
            gate_up,
            lora=self.gate_up_update(t, row),
            u_down=u_down,
            grad_b_gate=b_gate if self.folds else None,
            grad_b_up=b_up if self.folds else None,
            grad_a_down=self.down.a(gradient),
            accumulates=accumulates,
            out=gate_up,
        )
        del grad_activation
        self.through_norm(
            self.gate_up,
            wide,
            t,
            kept.x2,
            kept.rstd2,
            self.mlp_norm,
            row,
            gradient,
            grad_residual=grad[:, : self.spec.hidden_size],
            out=grad[:, : self.spec.hidden_size],
            accumulates=accumulates,
            has_b_gradient=self.folds,
        )

    def _attention_backward(self, stream: Tensor, saved: Saved, row: RowContext, gradient: FlatPart) -> Tensor:
        """∂x₂ → wide gradient of q, k, v before norm and rotation, written over them."""
        assert saved.attended is not None
        assert saved.qkv is not None
        attended, grad2 = saved.attended, self.output.wide(stream)
        u = self.output.rank_gradient(grad2, saved.t_o, row.flat, gradient)
        self.output.a_gradient(u, attended.output.flatten(1), gradient)
        grad_heads = self.output.input_gradient(grad2, u, row.flat).view(attended.output.shape)
        q, k, v = self.heads(saved)
        grads = attention_backward(
            grad_heads, q, k, v, attended, row.segments, scale=self.spec.attention_scale, window=self.window
        )
        products = saved.qkv[:, : self.qkv.num_outputs]
        qk_rope_backward(
            *grads,
            products,
            row.cos,
            row.sin,
            **self.rope_options(),
            out=products,
            lora=self.qkv_update(saved.t_qkv, row),
        )
        return saved.qkv

    def through_norm(
        self,
        linear: AdaptedLinear,
        wide: Tensor,
        t: Tensor | None,
        x: Tensor,
        rstd: Tensor,
        weight: Tensor,
        row: RowContext,
        gradient: FlatPart,
        *,
        grad_residual: Tensor,
        out: Tensor,
        accumulates: bool = False,
        has_b_gradient: bool = False,
    ) -> None:
        """The gradient of x, into `out`, from that of `linear(norm(x))` and that of the residual beside it."""
        target = None if has_b_gradient else gradient
        u = linear.rank_gradient(wide, t, row.flat, target, accumulates=accumulates)
        grad_h = linear.input_gradient(wide, u, row.flat)
        self.normed_a_gradient(linear, u, x, rstd, weight, gradient, accumulates=accumulates)
        rms_norm_backward(grad_h, x, weight, rstd, grad_residual=grad_residual, out=out)

    @staticmethod
    def normed_a_gradient(
        linear: AdaptedLinear,
        u: Tensor | None,
        x: Tensor,
        rstd: Tensor,
        weight: Tensor,
        gradient: FlatPart,
        *,
        accumulates: bool = False,
    ) -> None:
        """∂A = (ρ ∘ u)ᵀ x ∘ w; scales `u` in place, so it is called after the last other use of it."""
        if u is not None:
            linear.a_gradient(u.mul_(rstd.unsqueeze(1)), x, gradient, columns=weight, accumulates=accumulates)

    # Arguments of the folded operations

    def qkv_update(self, t: Tensor | None, row: RowContext) -> QkvUpdate | None:
        if not self.folds or t is None:
            return None
        b_q, b_k, b_v = self.qkv.factors(row.flat)
        return QkvUpdate(t, b_q, b_k, b_v, *self.qkv.scales)

    def gate_up_update(self, t: Tensor | None, row: RowContext) -> GateUpUpdate | None:
        if not self.folds or t is None:
            return None
        b_gate, b_up = self.gate_up.factors(row.flat)
        return GateUpUpdate(t, b_gate, b_up, *self.gate_up.scales)

    def row_update(self, linear: AdaptedLinear, t: Tensor | None, row: RowContext) -> RowUpdate | None:
        if not self.folds or t is None:
            return None
        (b,) = linear.factors(row.flat)
        assert b is not None
        return RowUpdate(t, b, linear.scales[0])

    def rope_options(self) -> RopeOptions:
        return {
            "num_heads": self.spec.num_heads,
            "num_kv_heads": self.spec.num_kv_heads,
            "q_weight": self.q_norm,
            "k_weight": self.k_norm,
            "epsilon": self.spec.norm_epsilon,
        }


class RopeOptions(TypedDict):
    """What every call of `qk_rope` and its backward pass says about the heads."""

    num_heads: int
    num_kv_heads: int
    q_weight: Tensor | None
    k_weight: Tensor | None
    epsilon: float


def joined(ts: list[Tensor | None]) -> Tensor | None:
    """t [M, R] of parts, one below the other."""
    present = [t for t in ts if t is not None]
    return torch.cat(present) if len(present) > 1 else next(iter(present), None)


def _kept(saved: Saved, keep: Keep, *, keeps_attention: bool) -> Saved:
    """Drop what `keep` does not name; `keeps_attention` keeps the attention's output at every level."""
    if keep < Keep.ALL:
        saved.q = saved.k = saved.v = None
    if keep < Keep.PROJECTIONS:
        saved.qkv = None
    if keep < Keep.ATTENTION:
        return Saved(saved.x, t_down=saved.t_down, attended=saved.attended if keeps_attention else None)
    return saved
