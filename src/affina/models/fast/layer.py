"""One decoder layer: forward and backward written out.

Legend: T tokens, D hidden, I intermediate, H heads, G key/value heads, K head dim, R ranks. *Wide* tensors have R more
columns than their name says, see linear.py.

Forward, with x the residual stream:

    h₁ = w₁ ∘ x / rms(x)                      q, k = rope(norm(q)), rope(norm(k))
    [q k v] = h₁ W_qkvᵀ (+ adapters)          o = attention(q, k, v)
    x₂ = x + o W_oᵀ
    h₂ = w₂ ∘ x₂ / rms(x₂)                    [g u] = h₂ W_guᵀ
    x₃ = x₂ + (silu(g) ∘ u) W_dᵀ

The backward pass walks up the same list. Three things are worth saying.

* Norm outputs are never kept and never recomputed for the adapters' sake. With h = w ∘ (ρ x), ρ one number per token,

      ∂A = uᵀ h = (ρ ∘ u)ᵀ x ∘ w         (ρ scales the rows of u, w the columns of the result)

  so the gradient of A comes from x, which is kept anyway.
* Buffers are reused as soon as their content is spent: the gradient of gate and up is written over them, the
  activation over its own gradient.
* Where gate and up are not kept, the MLP runs over a few thousand tokens at a time, forward and backward: it is the
  widest part of a layer, and no token of it sees another.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypedDict

import torch
from torch import Tensor

from affina.kernels.attention import AttentionResult, Segments, attention, attention_backward
from affina.kernels.qk_rope import QkvUpdate, qk_rope, qk_rope_backward
from affina.kernels.rms_norm import add_rms_norm, rms_norm, rms_norm_backward
from affina.kernels.swiglu import GateUpUpdate, swiglu, swiglu_backward
from affina.models.families import DecoderSpec
from affina.models.fast.linear import AdaptedLinear
from affina.models.fast.policy import Keep

MLP_CHUNK_TOKENS = 4096
"""Tokens of an MLP that are computed at once where gate and up are not kept: enough to fill a large card."""


@dataclass(frozen=True, slots=True)
class RowContext:
    """What all layers need to know of one packed row. cos, sin: [T, K/2] float32. flat: [P] the adapter."""

    segments: Segments
    cos: Tensor
    sin: Tensor
    flat: Tensor


@dataclass(slots=True)
class Saved:
    """What a layer keeps; fields are None at leaner levels and filled again before the backward pass.

    qkv, gate_up: wide. v: [T, G, K] with the update folded in, None where it is a view of qkv
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

    def forward(self, x: Tensor, row: RowContext, keep: Keep | None) -> tuple[Tensor, Saved | None]:
        """x [T, D] → (x₃ [T, D], what `keep` says; None keeps nothing, for evaluation). Leaves x as it is."""
        saved = Saved(x)
        self._attend(saved, row)
        h = self._add_attention(saved, row)
        if keep is not None and keep >= Keep.PRODUCTS:
            x3, saved.gate_up, saved.t_gate_up, saved.t_down = self._mlp(h, saved, slice(None), row)
        else:
            x3 = self._mlp_in_parts(h, saved, row)
        return x3, None if keep is None else _kept(saved, keep)

    def new_gradient(self, num_tokens: int, like: Tensor) -> Tensor:
        """[T, D + R] uninitialised, for the gradient of x₃."""
        return self.down.new_outputs(num_tokens, like)

    def backward(
        self, grad: Tensor, saved: Saved, row: RowContext, gradient: Tensor, *, below: DecoderLayer | None
    ) -> Tensor | None:
        """∂x₃ [T, D + R] → ∂x in a buffer of the layer below; adapter gradients go into `gradient`.

        below: None: nothing below needs a gradient. Uses up `grad` and `saved`.
        """
        self._complete_attention(saved, row)
        grad2 = self._mlp_backward(grad, saved, row, gradient)
        del grad
        grad_qkv = self._attention_backward(grad2, saved, row, gradient)
        assert saved.rstd1 is not None
        if below is None:
            u = self.qkv.rank_gradient(grad_qkv, saved.t_qkv, row.flat, gradient)
            self._normed_a_gradient(self.qkv, u, saved.x, saved.rstd1, self.input_norm, gradient)
            return None
        grad_x = below.new_gradient(saved.x.shape[0], saved.x)
        self._through_norm(
            self.qkv,
            grad_qkv,
            saved.t_qkv,
            saved.x,
            saved.rstd1,
            self.input_norm,
            row,
            gradient,
            grad_residual=grad2[:, : self.spec.hidden_size],
            out=grad_x[:, : self.spec.hidden_size],
        )
        return grad_x

    # Forward

    def _attend(self, saved: Saved, row: RowContext) -> None:
        """x → h₁ → q, k, v → o"""
        self._project(saved, row)
        self._rotate(saved, row)
        q, k, v = self._heads(saved)
        saved.attended = attention(q, k, v, row.segments, scale=self.spec.attention_scale, window=self.window)

    def _project(self, saved: Saved, row: RowContext) -> None:
        """x → h₁ → q, k, v"""
        h, saved.rstd1 = rms_norm(saved.x, self.input_norm, self.spec.norm_epsilon)
        saved.qkv, saved.t_qkv = self.qkv.forward(h, row.flat, is_wide=True, folds=self.folds)

    def _rotate(self, saved: Saved, row: RowContext) -> None:
        assert saved.qkv is not None
        products = saved.qkv[:, : self.qkv.num_outputs]
        update = self._qkv_update(saved.t_qkv, row)
        options = self._rope_options()
        if update is None:
            saved.q, saved.k = qk_rope(products, row.cos, row.sin, **options)
        else:
            saved.q, saved.k, saved.v = qk_rope(products, row.cos, row.sin, **options, lora=update)

    def _heads(self, saved: Saved) -> tuple[Tensor, Tensor, Tensor]:
        """q [T, H, K], k [T, G, K], v [T, G, K], the last a view of qkv where nothing was folded into it."""
        assert saved.q is not None
        assert saved.k is not None
        if saved.v is not None:
            return saved.q, saved.k, saved.v
        assert saved.qkv is not None
        columns = saved.qkv[:, self.spec.query_size + self.spec.key_value_size : self.qkv.num_outputs]
        return saved.q, saved.k, columns.view(-1, self.spec.num_kv_heads, self.spec.head_dim)

    def _add_attention(self, saved: Saved, row: RowContext) -> Tensor:
        """o → x₂ → h₂ [T, D]"""
        assert saved.attended is not None
        update, saved.t_o = self.output.forward(saved.attended.output.flatten(1), row.flat)
        saved.x2, h, saved.rstd2 = add_rms_norm(saved.x, update, self.mlp_norm, self.spec.norm_epsilon, sum_out=update)
        return h

    def _mlp(
        self, h: Tensor, saved: Saved, part: slice, row: RowContext
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """h₂ of some tokens → (x₃, wide gate and up, their t, t of the down projection)"""
        assert saved.x2 is not None
        gate_up, t = self.gate_up.forward(h, row.flat, is_wide=True, folds=self.folds)
        activation = swiglu(gate_up[:, : self.gate_up.num_outputs], lora=self._gate_up_update(t, row))
        x3, t_down = self.down.forward(activation, row.flat)
        x3 += saved.x2[part]
        return x3, gate_up, t, t_down

    def _mlp_in_parts(self, h: Tensor, saved: Saved, row: RowContext) -> Tensor:
        """h₂ → x₃, keeping only t of the down projection."""
        results = []
        for part in _parts(h.shape[0]):
            x3, _, _, t_down = self._mlp(h[part], saved, part, row)
            results.append((x3, t_down))
        if len(results) == 1:
            x3, saved.t_down = results[0]
            return x3
        ts = [t for _, t in results if t is not None]
        saved.t_down = torch.cat(ts) if ts else None
        return torch.cat([x3 for x3, _ in results])

    # Backward

    def _complete_attention(self, saved: Saved, row: RowContext) -> None:
        """Compute again what was not kept, up to x₂."""
        if saved.attended is None:
            self._attend(saved, row)
            self._add_attention(saved, row)
            return
        if saved.qkv is None:
            self._project(saved, row)
        if saved.q is None:
            self._rotate(saved, row)

    def _mlp_backward(self, grad: Tensor, saved: Saved, row: RowContext, gradient: Tensor) -> Tensor:
        """wide ∂x₃ → wide ∂x₂, the sum of its two ways."""
        assert saved.x2 is not None
        grad2 = self.output.new_outputs(grad.shape[0], saved.x2)
        is_kept = saved.gate_up is not None
        for part in [slice(None)] if is_kept else _parts(grad.shape[0]):
            self._mlp_part_backward(grad[part], saved, part, row, gradient, grad2[part, : self.spec.hidden_size])
        return grad2

    def _mlp_part_backward(
        self, grad: Tensor, saved: Saved, part: slice, row: RowContext, gradient: Tensor, out: Tensor
    ) -> None:
        """wide ∂x₃ of some tokens → ∂x₂ of them, into `out`."""
        assert saved.x2 is not None
        x2, rstd2, wide, t = saved.x2[part], saved.rstd2, saved.gate_up, saved.t_gate_up
        if wide is None:
            h, rstd2 = rms_norm(x2, self.mlp_norm, self.spec.norm_epsilon)
            wide, t = self.gate_up.forward(h, row.flat, is_wide=True, folds=self.folds)
            del h
        saved.gate_up = None
        assert rstd2 is not None
        accumulates = part.start not in (None, 0)
        t_down = saved.t_down[part] if saved.t_down is not None else None
        u = self.down.rank_gradient(grad, t_down, row.flat, gradient, accumulates=accumulates)
        grad_activation = self.down.input_gradient(grad, row.flat)
        gate_up = wide[:, : self.gate_up.num_outputs]
        swiglu_backward(
            grad_activation,
            gate_up,
            out=gate_up,
            activation_out=grad_activation,
            lora=self._gate_up_update(t, row),
        )
        self.down.a_gradient(u, grad_activation, gradient, accumulates=accumulates)  # the activation itself by now
        del grad_activation
        self._through_norm(
            self.gate_up,
            wide,
            t,
            x2,
            rstd2,
            self.mlp_norm,
            row,
            gradient,
            grad_residual=grad[:, : self.spec.hidden_size],
            out=out,
            accumulates=accumulates,
        )

    def _attention_backward(self, grad2: Tensor, saved: Saved, row: RowContext, gradient: Tensor) -> Tensor:
        """wide ∂x₂ → wide gradient of q, k, v before norm and rotation, written over them."""
        assert saved.attended is not None
        assert saved.qkv is not None
        attended = saved.attended
        u = self.output.rank_gradient(grad2, saved.t_o, row.flat, gradient)
        self.output.a_gradient(u, attended.output.flatten(1), gradient)
        grad_heads = self.output.input_gradient(grad2, row.flat).view(attended.output.shape)
        q, k, v = self._heads(saved)
        grads = attention_backward(
            grad_heads, q, k, v, attended, row.segments, scale=self.spec.attention_scale, window=self.window
        )
        products = saved.qkv[:, : self.qkv.num_outputs]
        qk_rope_backward(
            *grads,
            products,
            row.cos,
            row.sin,
            **self._rope_options(),
            out=products,
            lora=self._qkv_update(saved.t_qkv, row),
        )
        return saved.qkv

    def _through_norm(
        self,
        linear: AdaptedLinear,
        wide: Tensor,
        t: Tensor | None,
        x: Tensor,
        rstd: Tensor,
        weight: Tensor,
        row: RowContext,
        gradient: Tensor,
        *,
        grad_residual: Tensor,
        out: Tensor,
        accumulates: bool = False,
    ) -> None:
        """The gradient of x, into `out`, from that of `linear(norm(x))` and that of the residual beside it."""
        u = linear.rank_gradient(wide, t, row.flat, gradient, accumulates=accumulates)
        grad_h = linear.input_gradient(wide, row.flat)
        self._normed_a_gradient(linear, u, x, rstd, weight, gradient, accumulates=accumulates)
        rms_norm_backward(grad_h, x, weight, rstd, grad_residual=grad_residual, out=out)

    @staticmethod
    def _normed_a_gradient(
        linear: AdaptedLinear,
        u: Tensor | None,
        x: Tensor,
        rstd: Tensor,
        weight: Tensor,
        gradient: Tensor,
        *,
        accumulates: bool = False,
    ) -> None:
        """∂A = (ρ ∘ u)ᵀ x ∘ w; scales `u` in place, so it is called after the last other use of it."""
        if u is not None:
            linear.a_gradient(u.mul_(rstd.unsqueeze(1)), x, gradient, columns=weight, accumulates=accumulates)

    # Arguments of the folded operations

    def _qkv_update(self, t: Tensor | None, row: RowContext) -> QkvUpdate | None:
        if not self.folds or t is None:
            return None
        b_q, b_k, b_v = self.qkv.factors(row.flat)
        return QkvUpdate(t, b_q, b_k, b_v, *self.qkv.scales)

    def _gate_up_update(self, t: Tensor | None, row: RowContext) -> GateUpUpdate | None:
        if not self.folds or t is None:
            return None
        b_gate, b_up = self.gate_up.factors(row.flat)
        return GateUpUpdate(t, b_gate, b_up, *self.gate_up.scales)

    def _rope_options(self) -> RopeOptions:
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


def _parts(num_tokens: int) -> Iterator[slice]:
    for start in range(0, num_tokens, MLP_CHUNK_TOKENS):
        yield slice(start, min(start + MLP_CHUNK_TOKENS, num_tokens))


def _kept(saved: Saved, keep: Keep) -> Saved:
    """Drop what `keep` does not name."""
    if keep < Keep.ALL:
        saved.q = saved.k = saved.v = None
    if keep < Keep.PROJECTIONS:
        saved.qkv = None
    if keep < Keep.ATTENTION:
        return Saved(saved.x, t_down=saved.t_down)
    return saved
