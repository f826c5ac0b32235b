"""Root-mean-square normalisation of rows, alone or fused with the residual addition before it, and its gradient.

Legend: M rows (tokens), D model width, R rank, x one row [D], w the weight [D] (frozen), ε a small constant.

**Maths.**

    r = 1 / √(mean(x²) + ε)        x̂ = r · x        y = w ∘ x̂

**Residual addition.** `add_rms_norm` normalises s = x + v, `add_rows` gives s alone. v is the output of a projection,
which may have a low-rank update (LoRA) of its own; s = x + v₀ + c · t Bᵀ is then made tile by tile, so that v never
lies in memory. The gradient of s is that of x and of v₀, from which the caller makes those of t and B.

**Backward.** Let g = ∂L/∂y and n = w ∘ g, the gradient of x̂. Since ∂r/∂x_j = −r³ x_j / D,

    ∂L/∂x_j = r n_j + Σ_i n_i x_i · (−r³ x_j / D) = r · ( n_j − x̂_j · mean(n ∘ x̂) )

The weight is frozen, so it has no gradient. In a decoder x is also the residual stream, whose own gradient arrives
beside g; `grad_residual` is added in the same pass, before the one rounding.

**Precision.** Sums, r and products are float32 (float64 for float64 rows); a result is rounded once, to the type of x.
Deviation from transformers' modules, which round x̂ to the type of x *before* the product with w: ours is one rounding
closer to the exact value. The sum s is added up in float32 with all its terms, is rounded once, and the rounded sum is
normalised, as two separate operations would, since the rounded sum is what the residual stream carries on.

**Bytes moved per element** in b-byte types (each tensor is read or written once; w stays in the cache, r is 4 / D):

    rms_norm             2 b    x → y
    add_rms_norm         4 b    x, update → s, y        (5 b as two operations; 7 b with an update added before)
    add_rows             3 b    x, update → s
    rms_norm_backward    3 b    g, x → ∂L/∂x;  4 b with grad_residual

`codes_out` writes 1 byte more: y in e4m3 (kernels/fp8.py), where a pass of its own would read b and write 1.
A low-rank update adds R · b per row to read t, and per tile of rows R · D · b to read B from the cache.

**In place.** Every element is read before anything is written to its place, by the program (on a CPU: the pass over a
chunk of rows) that owns the row. Hence an output may be one of the [M, D] inputs. It must not overlap any input in
another way.

Nothing here is recorded for autograd: forward and backward are called by the decoder's own `autograd.Function`.

Row offsets are 64-bit integers: M · D passes 2³¹ at 840,000 tokens of a width of 2,560.

Zhang and Sennrich, *Root Mean Square Layer Normalization*, arXiv:1910.07467, equation 4. Hu et al., *LoRA*,
arXiv:2106.09685, §4.1.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from affina.kernels.dispatch import use_triton
from affina.kernels.fp8 import QuantizedRows, can_convert_in_kernels, quantize_rows

MAX_TRITON_WIDTH = 16384
"""The widest row that one Triton program holds in registers. Wider rows take the reference."""
_CHUNK_ELEMENTS_CPU = 1 << 18
"""Elements that the reference works on at once: 1 MiB of float32 stays in a cache between its passes, and is large
enough that the calls themselves cost nothing. Measured: 2^16 takes 1.1 to 2.9 times as long, 2^20 no less."""


@dataclass(frozen=True)
class RowUpdate:
    """A low-rank update of rows [M, D]: what is added to them is scale · t Bᵀ.

    t:     [M, R] in the type of the rows; its row stride may be larger
    b:     [D, R] in the same type, likewise
    scale: factor of the update (α / r)
    """

    t: Tensor
    b: Tensor
    scale: float = 1.0

    def __post_init__(self) -> None:
        assert self.t.dim() == 2, f"t must be [M, R], got {tuple(self.t.shape)}"
        assert self.b.dim() == 2, f"B must be [D, R], got {tuple(self.b.shape)}"
        assert self.t.shape[1] == self.b.shape[1], f"t has rank {self.t.shape[1]}, B {self.b.shape[1]}"
        assert self.t.dtype == self.b.dtype, f"t is {self.t.dtype}, B is {self.b.dtype}"


def rms_norm(
    x: Tensor,
    weight: Tensor,
    epsilon: float,
    *,
    out: Tensor | None = None,
    codes_out: QuantizedRows | None = None,
) -> tuple[Tensor, Tensor]:
    """The normalised rows y [M, D] in the type of x, and r [M] float32, which the backward pass needs.

    x:         [M, D] bf16, fp16, fp32 or fp64; its row stride may exceed D
    weight:    [D], any of these types
    epsilon:   added to the mean square
    out:       [M, D] like x, also strided, where y is written; may be x
    codes_out: where the e4m3 codes and scales of y's rows are written too, the bits of `quantize_rows(y)`
    """
    y = _output(x, out)
    r = _new_rstd(x)
    if _runs_triton(x):
        _launch_forward(x, None, weight, epsilon, None, y, r, codes_out)
        return y, r
    _forward_reference(x, weight, epsilon, y, r)
    _quantize(y, codes_out)
    return y, r


def add_rms_norm(
    x: Tensor,
    update: Tensor,
    weight: Tensor,
    epsilon: float,
    *,
    sum_out: Tensor | None = None,
    out: Tensor | None = None,
    lora: RowUpdate | None = None,
    codes_out: QuantizedRows | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """s = x + update + scale · t Bᵀ [M, D], the normalised rows y of s [M, D], and r [M] float32.

    x, update: [M, D] of one type (bf16, fp16, fp32 or fp64); row strides may exceed D
    weight:    [D]
    epsilon:   added to the mean square
    sum_out:   where s is written; may be x or update
    out:       where y is written; may be x or update, but not what sum_out is
    lora:      t, B and scale; without it s = x + update
    codes_out: where the e4m3 codes and scales of y's rows are written too, the bits of `quantize_rows(y)`
    """
    _check_sum(x, update, lora)
    s, y = _output(x, sum_out), _output(x, out)
    r = _new_rstd(x)
    lora = _effective(lora)
    if _runs_triton(x):
        from affina.kernels.triton import rms_norm as kernels

        if lora is None:
            _launch_forward(x, update, weight, epsilon, s, y, r, codes_out)
        else:
            kernels.launch_add(x, update, lora, s)
            _launch_forward(s, None, weight, epsilon, None, y, r, codes_out)
        return s, y, r
    for part in _row_chunks(x):
        _add_reference(x, update, lora, s, part)
        _forward_reference(s[part], weight, epsilon, y[part], r[part])
    _quantize(y, codes_out)
    return s, y, r


def add_rows(x: Tensor, update: Tensor, *, lora: RowUpdate | None = None, out: Tensor | None = None) -> Tensor:
    """s = x + update + scale · t Bᵀ [M, D], in the type of x, rounded once.

    x, update: [M, D] of one type (bf16, fp16, fp32 or fp64); row strides may exceed D
    lora:      t, B and scale; without it s = x + update
    out:       where s is written, its row stride may exceed D; may be x or update
    """
    _check_sum(x, update, lora)
    s = _output(x, out)
    lora = _effective(lora)
    if lora is not None and _runs_triton(x):
        from affina.kernels.triton import rms_norm as kernels

        kernels.launch_add(x, update, lora, s)
        return s
    for part in _row_chunks(x):
        _add_reference(x, update, lora, s, part)
    return s


def rms_norm_backward(
    grad_output: Tensor,
    x: Tensor,
    weight: Tensor,
    rstd: Tensor,
    *,
    grad_residual: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """∂L/∂x [M, D] in the type of x: the norm's gradient plus `grad_residual`.

    grad_output:   [M, D] gradient of y, in the type of x
    x:             [M, D] what was normalised (s of `add_rms_norm`)
    weight:        [D]
    rstd:          [M] float32, r of the forward pass
    grad_residual: [M, D] gradient that reaches x by other ways, or None
    out:           where the result is written; may be any of the three [M, D] inputs

    All row strides may exceed D.
    """
    grad_x = _output(x, out)
    for gradient in (grad_output, grad_residual):
        assert gradient is None or gradient.shape == x.shape, f"a gradient {tuple(gradient.shape)} for {tuple(x.shape)}"
        assert gradient is None or gradient.dtype == x.dtype, f"a gradient in {gradient.dtype}, x is {x.dtype}"
    assert rstd.shape == x.shape[:1], f"rstd {tuple(rstd.shape)} for {tuple(x.shape)}"
    if _runs_triton(x):
        from affina.kernels.triton import rms_norm as kernels

        kernels.launch_backward(grad_output, x, weight, rstd, grad_residual=grad_residual, out=grad_x)
    else:
        _backward_reference(grad_output, x, weight, rstd, grad_residual, grad_x)
    return grad_x


def _runs_triton(x: Tensor) -> bool:
    assert x.dim() == 2, f"rows must be [M, D], got {tuple(x.shape)}"
    return use_triton(x) and x.shape[1] <= MAX_TRITON_WIDTH and x.dtype != torch.float64 and x.numel() > 0


def _launch_forward(
    x: Tensor,
    update: Tensor | None,
    weight: Tensor,
    epsilon: float,
    sum_out: Tensor | None,
    y: Tensor,
    r: Tensor,
    codes_out: QuantizedRows | None,
) -> None:
    from affina.kernels.triton import rms_norm as kernels

    in_kernel = codes_out if can_convert_in_kernels(x.device) else None
    kernels.launch_forward(x, update, weight, epsilon, sum_out=sum_out, out=y, rstd=r, codes_out=in_kernel)
    if in_kernel is None:
        _quantize(y, codes_out)


def _quantize(y: Tensor, codes_out: QuantizedRows | None) -> None:
    if codes_out is not None:
        quantize_rows(y, out=codes_out.codes, scale_out=codes_out.scale)


def _check_sum(x: Tensor, update: Tensor, lora: RowUpdate | None) -> None:
    assert update.shape == x.shape, f"update {tuple(update.shape)} is added to x {tuple(x.shape)}"
    assert update.dtype == x.dtype, f"update is {update.dtype}, x is {x.dtype}"
    if lora is not None:
        shape = (lora.t.shape[0], lora.b.shape[0])
        assert shape == x.shape, f"t Bᵀ is {shape}, x is {tuple(x.shape)}"
        assert lora.t.dtype == x.dtype, f"t is {lora.t.dtype}, x is {x.dtype}"


def _effective(lora: RowUpdate | None) -> RowUpdate | None:
    """None for an update of rank 0."""
    return lora if lora is not None and lora.t.shape[1] > 0 else None


def _output(x: Tensor, out: Tensor | None) -> Tensor:
    """Where a result shaped like x goes."""
    if out is None:
        return torch.empty(x.shape, dtype=x.dtype, device=x.device)
    assert out.shape == x.shape, f"out {tuple(out.shape)} for {tuple(x.shape)}"
    assert out.dtype == x.dtype, f"out is {out.dtype}, the rows are {x.dtype}"
    return out


def _accumulation_type(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _new_rstd(x: Tensor) -> Tensor:
    return torch.empty(x.shape[0], dtype=_accumulation_type(x.dtype), device=x.device)


# Reference
# --------------------------------------------------------------------------------------------------------------


def _row_chunks(x: Tensor) -> Iterator[slice]:
    """Slices of rows that the reference works on at once; all rows on an accelerator."""
    num_rows, width = x.shape
    step = max(1, _CHUNK_ELEMENTS_CPU // max(1, width)) if x.device.type == "cpu" else max(1, num_rows)
    return (slice(start, min(start + step, num_rows)) for start in range(0, num_rows, step))


def _add_reference(x: Tensor, update: Tensor, lora: RowUpdate | None, out: Tensor, part: slice) -> None:
    """x + update + scale · t Bᵀ of the rows `part`."""
    if lora is None:
        torch.add(x[part], update[part], out=out[part])
        return
    wide_type = _accumulation_type(x.dtype)
    total = torch.add(x[part].to(wide_type), update[part])
    out[part] = total.addmm_(lora.t[part].to(wide_type), lora.b.to(wide_type).t(), alpha=lora.scale)


def _forward_reference(x: Tensor, weight: Tensor, epsilon: float, y: Tensor, r: Tensor) -> None:
    width = x.shape[1]
    weight = weight.to(r.dtype)
    for part in _row_chunks(x):
        wide = x[part].to(r.dtype)
        norm = torch.linalg.vector_norm(wide, dim=1)
        r[part] = norm.square_().div_(width).add_(epsilon).rsqrt_()
        torch.mul(wide * r[part].unsqueeze(1), weight, out=y[part])


def _backward_reference(
    grad_output: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, grad_residual: Tensor | None, grad_x: Tensor
) -> None:
    wide_type = _accumulation_type(x.dtype)
    weight = weight.to(wide_type)
    for part in _row_chunks(x):
        r = rstd[part].unsqueeze(1)
        normalised = x[part] * r  # float32, since r is
        grad_normalised = grad_output[part] * weight
        mean = (grad_normalised * normalised).mean(dim=1, keepdim=True)
        gradient = grad_normalised.sub_(normalised.mul_(mean)).mul_(r)
        if grad_residual is not None:
            gradient += grad_residual[part]
        grad_x[part] = gradient
