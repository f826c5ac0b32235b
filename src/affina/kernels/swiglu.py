"""The gated activation silu(gate) · up of a decoder's MLP and its gradient, with low-rank updates folded in.

Legend: M rows (tokens), I inner width, R rank, b bytes of the tensors' type. g and u are elements of gate and up, which
lie side by side in one [M, 2 I] tensor as one product with the stacked weights makes them.

**Maths.** With σ the logistic function,

    silu(g) = g · σ(g)        a = silu(g) · u

**Backward.** Since σ' = σ (1 − σ), for a gradient h of a

    ∂L/∂u = h · silu(g)        ∂L/∂g = h · u · (σ + g σ (1 − σ)) = h · u · (σ + silu(g) · (1 − σ))

**Low-rank updates** (LoRA). The base product makes g₀ and u₀; with t = x Aᵀ of both projections side by side,

    g = g₀ + s_g · t_g B_gᵀ        u = u₀ + s_u · t_u B_uᵀ

are made tile by tile where they are used, forward and again backward, so that neither the update nor the updated gate
and up ever lie in memory. The gradient of g is that of g₀, from which the caller makes those of t and B.

**Gradients of the factors.** With G and U the [M, I] gradients of g and u, a the activation and d = ∂L/∂t of the next
projection (down),

    ∂L/∂B_g = s_g · Gᵀ t_g        ∂L/∂B_u = s_u · Uᵀ t_u        ∂L/∂A_d = dᵀ a

are sums over all rows of what a tile holds anyway, so `swiglu_backward_with_ranks` adds them up as it goes: a is never
written, G and U are not read again.

**Precision.** Everything is float32 (float64 for float64 tensors) and is rounded once, to the type of the tensors; the
factors t and B are in that type, their product is added up in float32. Deviation from separate operations, which round
the update, its sum with the base, silu(g) and a in turn. The gradients of the factors are made of the rounded G, U and
a, added up and kept in float32: the numbers of the separate products, but for the order of the sum.

**Bytes moved per element of M × I** (each read or written once):

    swiglu             3 b    g, u → a
    swiglu_backward    5 b    h, g, u → ∂L/∂g, ∂L/∂u;  6 b with a, which the gradient of the next projection's A needs
    ... with ranks     5 b    and what the separate products would read again: 3 b

An update adds (R_g + R_u) · b per row to read t, and per tile the same to read B from the cache. As operations of their
own the updates would move 2 · (2 + 1) b more, forward and backward.

**In place.** A program (on a CPU: the pass over a chunk of rows) reads its elements of all tensors before it writes
any; hence `out` may be `gate_up`, and `activation_out` may be `grad_output`.

Nothing here is recorded for autograd: forward and backward are called by the decoder's own `autograd.Function`.

Row offsets are 64-bit integers: M · 2 I passes 2³¹ at 110,000 tokens of an inner width of 9,728.

Shazeer, *GLU Variants Improve Transformer*, arXiv:2002.05202, equation 6. Hu et al., *LoRA*, arXiv:2106.09685, §4.1.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from affina.kernels.dispatch import use_triton
from affina.kernels.products import product_into

MAX_FOLDED_RANK = 64
"""Ranks above it take the reference: their tiles and sums would not fit in a program's registers."""

_CHUNK_ELEMENTS_CPU = 1 << 18
"""Elements that the reference works on at once: 1 MiB of float32 stays in a cache between its passes, and is large
enough that the calls themselves cost nothing. Measured: 2^16 takes 1.1 to 2.9 times as long, 2^20 no less."""


@dataclass(frozen=True)
class GateUpUpdate:
    """Low-rank updates of gate and up: what is added to them is scale · t Bᵀ.

    t:          [M, R_g + R_u] x Aᵀ of the gate's and of the up projection's A, in the type of gate and up; its row
                stride may be larger
    b_gate:     [I, R_g] in the same type, or None when the gate has no update (R_g = 0: t has no columns for it)
    b_up:       [I, R_u], or None
    scale_gate: factor of the gate's update (α / r)
    scale_up:   factor of the up projection's update
    """

    t: Tensor
    b_gate: Tensor | None
    b_up: Tensor | None
    scale_gate: float = 1.0
    scale_up: float = 1.0

    def __post_init__(self) -> None:
        assert self.t.dim() == 2, f"t must be [M, R], got {tuple(self.t.shape)}"
        assert sum(self.ranks) == self.t.shape[1], f"t has {self.t.shape[1]} columns for ranks {self.ranks}"
        for b in (self.b_gate, self.b_up):
            assert b is None or b.dtype == self.t.dtype, f"t is {self.t.dtype}, B is {b.dtype}"

    @property
    def ranks(self) -> tuple[int, int]:
        """(R_g, R_u); 0 where there is no update."""
        return _rank(self.b_gate), _rank(self.b_up)


def _rank(b: Tensor | None) -> int:
    return 0 if b is None else b.shape[1]


def swiglu(gate_up: Tensor, *, out: Tensor | None = None, lora: GateUpUpdate | None = None) -> Tensor:
    """silu(gate) · up as [M, I], in the type of `gate_up`.

    gate_up: [M, 2 I] bf16, fp16, fp32 or fp64, gate in the first I columns; its row stride may be larger
    out:     [M, I] where the result is written, also strided; it may be the first or the last I columns of `gate_up`
    lora:    low-rank updates to add to gate and up first
    """
    num_rows, width = _sizes(gate_up, lora)
    activation = _output(gate_up, (num_rows, width), out)
    lora = _effective(lora)
    if not _runs_triton(gate_up, *(lora.ranks if lora is not None else ())):
        _forward_reference(gate_up, lora, activation)
    elif lora is None:
        from affina.kernels.triton import swiglu as kernels

        kernels.launch_forward(gate_up, activation)
    else:
        from affina.kernels.triton import swiglu_low_rank

        swiglu_low_rank.launch_forward(gate_up, lora, activation)
    return activation


def swiglu_backward(
    grad_output: Tensor,
    gate_up: Tensor,
    *,
    out: Tensor | None = None,
    activation_out: Tensor | None = None,
    lora: GateUpUpdate | None = None,
) -> Tensor:
    """The gradients of gate and up, side by side as [M, 2 I].

    grad_output:    [M, I] gradient of silu(gate) · up, in the type of `gate_up`
    gate_up:        [M, 2 I] as in the forward pass (without the update)
    out:            [M, 2 I] where the result is written; may be `gate_up`
    activation_out: [M, I] where silu(gate) · up is written again, or None; may be `grad_output`
    lora:           the same as in the forward pass; with one this is the reference on every device, since training
                    takes `swiglu_backward_with_ranks`

    All row strides may be larger than the rows.
    """
    num_rows, width = _sizes(gate_up, lora)
    assert grad_output.shape == (num_rows, width), f"gradient {tuple(grad_output.shape)} for {tuple(gate_up.shape)}"
    assert grad_output.dtype == gate_up.dtype, f"the gradient is {grad_output.dtype}, gate and up are {gate_up.dtype}"
    gradient = _output(gate_up, (num_rows, 2 * width), out)
    if activation_out is not None:
        _output(gate_up, (num_rows, width), activation_out)
    if _runs_triton(gate_up) and _effective(lora) is None:
        from affina.kernels.triton import swiglu as kernels

        kernels.launch_backward(grad_output, gate_up, gradient, activation_out)
    else:
        _backward_reference(grad_output, gate_up, lora, gradient, activation_out)
    return gradient


def swiglu_backward_with_ranks(
    grad_output: Tensor,
    gate_up: Tensor,
    *,
    lora: GateUpUpdate | None,
    u_down: Tensor | None = None,
    grad_b_gate: Tensor | None = None,
    grad_b_up: Tensor | None = None,
    grad_a_down: Tensor | None = None,
    accumulates: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    """`swiglu_backward`, and in the same pass the gradients of gate's and up's B and of the next projection's A.

    grad_output: [M, I] gradient of silu(gate) · up; **used up**: the activation may be written over it
    gate_up:     [M, 2 I] as in the forward pass (without the update)
    lora:        the same as in the forward pass
    u_down:      [M, R_d] gradient of the next projection's t, in the type of `gate_up`; None where it has no adapter
    grad_b_gate: [I, R_g] float32 (float64 for float64 tensors) where the gradient of B is written; None with b_gate
    grad_b_up:   [I, R_u]
    grad_a_down: [R_d, I]; None with u_down
    accumulates: add to what the three outputs hold
    out:         [M, 2 I] where the gradient of gate and up is written; may be `gate_up`

    One kernel up to ranks of `MAX_FOLDED_RANK`; separate products beyond.
    """
    num_rows, width = _sizes(gate_up, lora)
    assert grad_output.shape == (num_rows, width), f"gradient {tuple(grad_output.shape)} for {tuple(gate_up.shape)}"
    assert grad_output.dtype == gate_up.dtype, f"the gradient is {grad_output.dtype}, gate and up are {gate_up.dtype}"
    gradients = RankGradients(u_down, grad_b_gate, grad_b_up, grad_a_down, accumulates)
    gradients.check(gate_up, lora)
    gradient = _output(gate_up, (num_rows, 2 * width), out)
    if any(gradients.ranks) and _runs_triton(gate_up, *gradients.ranks):
        from affina.kernels.triton import swiglu_low_rank

        swiglu_low_rank.launch_backward(grad_output, gate_up, _effective(lora), gradient, gradients)
        return gradient
    activation = None if u_down is None else grad_output
    swiglu_backward(grad_output, gate_up, out=gradient, activation_out=activation, lora=lora)
    _rank_products(gradient, activation, lora, gradients)
    return gradient


@dataclass(frozen=True)
class RankGradients:
    """The gradients of factors that `swiglu_backward_with_ranks` makes; its docstring says what they are."""

    u_down: Tensor | None
    b_gate: Tensor | None
    b_up: Tensor | None
    a_down: Tensor | None
    accumulates: bool

    @property
    def ranks(self) -> tuple[int, int, int]:
        """(R_g, R_u, R_d); 0 where there is no factor."""
        return _rank(self.b_gate), _rank(self.b_up), _rank(self.u_down)

    def check(self, gate_up: Tensor, lora: GateUpUpdate | None) -> None:
        """Every factor has a gradient of its shape."""
        num_rows, width = gate_up.shape[0], gate_up.shape[1] // 2
        ranks = (0, 0) if lora is None else lora.ranks
        assert self.ranks[:2] == ranks, f"gradients of B of ranks {self.ranks[:2]} for an update of ranks {ranks}"
        assert (self.u_down is None) == (self.a_down is None), "u_down and grad_a_down belong together"
        wide_type = torch.promote_types(gate_up.dtype, torch.float32)
        for name, gradient, shape in (
            ("grad_b_gate", self.b_gate, (width, ranks[0])),
            ("grad_b_up", self.b_up, (width, ranks[1])),
            ("grad_a_down", self.a_down, (self.ranks[2], width)),
        ):
            assert gradient is None or gradient.shape == shape, f"{name} must be {shape}, got {tuple(gradient.shape)}"
            assert gradient is None or gradient.dtype == wide_type, f"{name} is {gradient.dtype}, not {wide_type}"
        if self.u_down is not None:
            assert self.u_down.shape[0] == num_rows, f"u_down has {self.u_down.shape[0]} rows, gate and up {num_rows}"
            assert self.u_down.dtype == gate_up.dtype, f"u_down is {self.u_down.dtype}, gate and up {gate_up.dtype}"


def _sizes(gate_up: Tensor, lora: GateUpUpdate | None) -> tuple[int, int]:
    """(M, I), after checking that the update fits."""
    assert gate_up.dim() == 2, f"gate and up must be [M, 2 I], got {tuple(gate_up.shape)}"
    assert gate_up.shape[1] % 2 == 0, f"gate and up must be of one width, got {tuple(gate_up.shape)}"
    num_rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    if lora is not None:
        assert lora.t.shape[0] == num_rows, f"t has {lora.t.shape[0]} rows, gate and up {num_rows}"
        assert lora.t.dtype == gate_up.dtype, f"t is {lora.t.dtype}, gate and up are {gate_up.dtype}"
        for b in (lora.b_gate, lora.b_up):
            assert b is None or b.shape[0] == width, f"B has {b.shape[0]} rows for a width of {width}"
    return num_rows, width


def _output(gate_up: Tensor, shape: tuple[int, int], out: Tensor | None) -> Tensor:
    if out is None:
        return torch.empty(shape, dtype=gate_up.dtype, device=gate_up.device)
    assert out.shape == shape, f"out {tuple(out.shape)} for {shape}"
    assert out.dtype == gate_up.dtype, f"out is {out.dtype}, gate and up are {gate_up.dtype}"
    return out


def _effective(lora: GateUpUpdate | None) -> GateUpUpdate | None:
    """None for an update of neither projection."""
    return lora if lora is not None and any(lora.ranks) else None


def _runs_triton(gate_up: Tensor, *ranks: int) -> bool:
    fits = max(ranks, default=0) <= MAX_FOLDED_RANK
    return fits and use_triton(gate_up) and gate_up.dtype != torch.float64 and gate_up.numel() > 0


# Reference
# --------------------------------------------------------------------------------------------------------------


def _row_chunks(rows: Tensor) -> Iterator[slice]:
    """Slices of rows that the reference works on at once; all rows on an accelerator."""
    num_rows, width = rows.shape
    step = max(1, _CHUNK_ELEMENTS_CPU // max(1, width)) if rows.device.type == "cpu" else max(1, num_rows)
    return (slice(start, min(start + step, num_rows)) for start in range(0, num_rows, step))


def _gate_and_up(gate_up: Tensor, lora: GateUpUpdate | None, part: slice) -> tuple[Tensor, Tensor]:
    """Rows `part` of gate and up in float32, with their updates; views of `gate_up` where that needs no copy."""
    wide_type = torch.promote_types(gate_up.dtype, torch.float32)
    gate, up = gate_up[part].to(wide_type).chunk(2, dim=1)
    if lora is not None:
        t = lora.t[part].to(wide_type)
        rank_gate, _ = lora.ranks
        gate = _updated(gate, t[:, :rank_gate], lora.b_gate, lora.scale_gate)
        up = _updated(up, t[:, rank_gate:], lora.b_up, lora.scale_up)
    return gate, up


def _updated(base: Tensor, t: Tensor, b: Tensor | None, scale: float) -> Tensor:
    return base if b is None else torch.addmm(base, t, b.to(base.dtype).t(), alpha=scale)


def _forward_reference(gate_up: Tensor, lora: GateUpUpdate | None, out: Tensor) -> None:
    for part in _row_chunks(out):
        gate, up = _gate_and_up(gate_up, lora, part)
        torch.mul(torch.nn.functional.silu(gate), up, out=out[part])


def _backward_reference(
    grad_output: Tensor, gate_up: Tensor, lora: GateUpUpdate | None, out: Tensor, activation_out: Tensor | None
) -> None:
    width = grad_output.shape[1]
    for part in _row_chunks(grad_output):
        gate, up = _gate_and_up(gate_up, lora, part)
        grad = grad_output[part]
        silu = torch.nn.functional.silu(gate)
        grad_up = grad * silu
        grad_gate = torch.ops.aten.silu_backward(grad * up, gate)
        if activation_out is not None:
            torch.mul(silu, up, out=activation_out[part])
        out[part, :width] = grad_gate
        out[part, width:] = grad_up


def _rank_products(
    gradient: Tensor, activation: Tensor | None, lora: GateUpUpdate | None, gradients: RankGradients
) -> None:
    """The gradients of the factors as products of their own."""
    width = gradient.shape[1] // 2
    if lora is not None:
        rank_gate, _ = lora.ranks
        factors = (
            (gradient[:, :width], lora.t[:, :rank_gate], gradients.b_gate, lora.scale_gate),
            (gradient[:, width:], lora.t[:, rank_gate:], gradients.b_up, lora.scale_up),
        )
        for wide, t, out, scale in factors:
            if out is not None:
                product_into(wide.t(), t, out, factor=scale, accumulates=gradients.accumulates)
    if gradients.u_down is not None:
        assert activation is not None
        assert gradients.a_down is not None
        product_into(gradients.u_down.t(), activation, gradients.a_down, accumulates=gradients.accumulates)
