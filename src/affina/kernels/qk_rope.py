"""Queries and keys made ready for attention: per-head norm, rotary embedding, low-rank updates; and the gradient.

Legend: T tokens, H query heads, G key and value heads, K head dimension, R rank, b bytes of the tensors' type. `qkv`
[T, (H + 2 G) · K] holds queries, keys and values side by side, as one product with the stacked weights makes them.

**Maths.** For each token and each head of the queries and keys, x its K numbers:

    x = x₀ + s · t B_headᵀ                            with a low-rank update (LoRA)
    r = 1 / √(mean(x²) + ε),   n = w ∘ (r · x)        with a norm (Qwen3); n = x without (Llama, Qwen2, Mistral)
    (a, b) = the halves of n,  c, s = cos and sin of the token's angles [K / 2]
    y = (a c − b s,  b c + a s)                       the rotation of each pair (a_i, b_i)

Values take no norm and no rotation, only their update.

**Backward.** A rotation's transpose is the rotation back; for a gradient (f, g) of y's halves

    ∂L/∂n = (f c + g s,  g c − f s)

and with m = w ∘ ∂L/∂n and x̂ = r · x, as derived in `rms_norm`,

    ∂L/∂x = r · (m − x̂ · mean(m ∘ x̂))

The norm's weights are frozen. r and x̂ are computed again from `qkv`, which costs its one read; without a norm `qkv` is
not read at all. The gradient of x is that of x₀, from which the caller makes those of t and B; that of v is copied to
its place in the gradient of `qkv`.

**Precision.** Everything is float32 (float64 for float64 tensors) and is rounded once, to the type of `qkv`. Deviation
from transformers' modules, which round x̂, the norm, cos, sin, and both products of the rotation in turn.

**Bytes moved per token**, cos and sin (4 K for each four heads, from the cache mostly) aside:

    qk_rope             2 b K (H + G)       with updates also 2 b K G: the values, copied with theirs
    qk_rope_backward    2 b K (H + 2 G)     with a norm also b K (H + G): x is read

**In place.** A program (on a CPU: the pass over a chunk of tokens) reads its heads before it writes them; hence `out`
of the backward pass may be `qkv`.

Nothing here is recorded for autograd: forward and backward are called by the decoder's own `autograd.Function`.

Row offsets are 64-bit integers: T · (H + 2 G) · K passes 2³¹ at 350,000 tokens of 48 heads of 128.

Su et al., *RoFormer*, arXiv:2104.09864, equation 34, with pairs (i, i + K / 2) in place of (2 i, 2 i + 1), as
transformers stores Llama's weights. Norm of queries and keys: Henry et al., arXiv:2010.04245 (here RMS, as in Qwen3).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import overload

import torch
from torch import Tensor

from affina.kernels.dispatch import use_triton

MAX_TRITON_HEAD_DIM = 512
"""The largest head that one Triton program holds in registers. Larger ones take the reference."""
_CHUNK_ELEMENTS_CPU = 1 << 18
"""Elements of `qkv` that the reference works on at once: 1 MiB of float32 stays in a cache between its passes, and is
large enough that the calls themselves cost nothing. Measured: 2^16 takes 1.1 to 2.9 times as long, 2^20 no less."""


@dataclass(frozen=True)
class Heads:
    """How the columns of `qkv` are divided: H, G and K."""

    num_heads: int
    num_kv_heads: int
    head_dim: int

    @classmethod
    def of(cls, qkv: Tensor, num_heads: int, num_kv_heads: int) -> Heads:
        """Checks that `qkv` has columns for the heads."""
        assert qkv.dim() == 2, f"qkv must be [T, (H + 2 G) K], got {tuple(qkv.shape)}"
        head_dim, rest = divmod(qkv.shape[1], num_heads + 2 * num_kv_heads)
        assert rest == 0, f"{qkv.shape[1]} columns for {num_heads} + 2 · {num_kv_heads} heads"
        assert head_dim % 2 == 0, f"a head of {head_dim} numbers has no halves"
        return cls(num_heads, num_kv_heads, head_dim)

    @property
    def columns(self) -> tuple[slice, slice, slice]:
        """Columns of `qkv` that hold the queries, the keys and the values."""
        q_end = self.num_heads * self.head_dim
        k_end = q_end + self.num_kv_heads * self.head_dim
        return slice(0, q_end), slice(q_end, k_end), slice(k_end, 2 * k_end - q_end)


@dataclass(frozen=True)
class QkvUpdate:
    """Low-rank updates of queries, keys and values: what is added to them is scale · t Bᵀ.

    t:       [T, R_q + R_k + R_v] x Aᵀ of the three A's, in the type of `qkv`; its row stride may be larger
    b_q:     [H · K, R_q] in the same type, or None when the queries have no update (R_q = 0: t has no columns for it)
    b_k:     [G · K, R_k], or None
    b_v:     [G · K, R_v], or None
    scale_*: factor of each update (α / r)
    """

    t: Tensor
    b_q: Tensor | None
    b_k: Tensor | None
    b_v: Tensor | None
    scale_q: float = 1.0
    scale_k: float = 1.0
    scale_v: float = 1.0

    def __post_init__(self) -> None:
        assert self.t.dim() == 2, f"t must be [T, R], got {tuple(self.t.shape)}"
        assert sum(self.ranks) == self.t.shape[1], f"t has {self.t.shape[1]} columns for ranks {self.ranks}"
        for b in self.factors:
            assert b is None or b.dtype == self.t.dtype, f"t is {self.t.dtype}, B is {b.dtype}"

    @property
    def ranks(self) -> tuple[int, int, int]:
        """(R_q, R_k, R_v); 0 where there is no update."""
        return _rank(self.b_q), _rank(self.b_k), _rank(self.b_v)

    @property
    def factors(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """(B_q, B_k, B_v)."""
        return self.b_q, self.b_k, self.b_v

    @property
    def scales(self) -> tuple[float, float, float]:
        """The factors in the same order."""
        return self.scale_q, self.scale_k, self.scale_v


def _rank(b: Tensor | None) -> int:
    return 0 if b is None else b.shape[1]


@overload
def qk_rope(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    num_heads: int,
    num_kv_heads: int,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    epsilon: float,
    lora: None = None,
) -> tuple[Tensor, Tensor]: ...


@overload
def qk_rope(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    num_heads: int,
    num_kv_heads: int,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    epsilon: float,
    lora: QkvUpdate,
) -> tuple[Tensor, Tensor, Tensor]: ...


def qk_rope(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    num_heads: int,
    num_kv_heads: int,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    epsilon: float,
    lora: QkvUpdate | None = None,
) -> tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Tensor]:
    """Rotated queries [T, H, K] and keys [T, G, K]; with `lora` also the updated values [T, G, K].

    All are contiguous and in the type of `qkv`. Without `lora` the values are the last G · K columns of `qkv`.

    qkv:      [T, (H + 2 G) · K] bf16, fp16, fp32 or fp64; its row stride may be larger
    cos, sin: [T, K / 2] float32, cosine and sine of each token's angles
    q_weight: [K] weight of the queries' norm, or None without one
    k_weight: [K] weight of the keys' norm, or None without one
    epsilon:  added to the mean square; unused without norms
    lora:     low-rank updates to add first
    """
    heads = Heads.of(qkv, num_heads, num_kv_heads)
    _check(qkv, cos, sin, q_weight, k_weight, heads, lora)
    q = _new_heads(qkv, num_heads, heads.head_dim)
    k = _new_heads(qkv, num_kv_heads, heads.head_dim)
    v = _new_heads(qkv, num_kv_heads, heads.head_dim) if lora is not None else None
    if _runs_triton(qkv, heads):
        from affina.kernels.triton import qk_rope as kernels

        kernels.launch_forward(qkv, cos, sin, q_weight, k_weight, epsilon, heads, lora, q, k, v)
    else:
        _forward_reference(qkv, cos, sin, q_weight, k_weight, epsilon, heads, lora, q, k, v)
    return (q, k) if v is None else (q, k, v)


def qk_rope_backward(
    grad_q: Tensor,
    grad_k: Tensor,
    grad_v: Tensor,
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    num_heads: int,
    num_kv_heads: int,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    epsilon: float,
    out: Tensor | None = None,
    lora: QkvUpdate | None = None,
) -> Tensor:
    """The gradient of `qkv`, [T, (H + 2 G) · K] in its type.

    grad_q: [T, H, K] in the type of `qkv`; any strides over tokens and heads, the numbers of a head side by side
    grad_k: [T, G, K] likewise
    grad_v: [T, G, K] likewise
    out:    where the result is written, its row stride may be larger; may be `qkv`

    The other arguments are those of the forward pass.
    """
    heads = Heads.of(qkv, num_heads, num_kv_heads)
    _check(qkv, cos, sin, q_weight, k_weight, heads, lora)
    for grad, count in ((grad_q, num_heads), (grad_k, num_kv_heads), (grad_v, num_kv_heads)):
        wanted = (qkv.shape[0], count, heads.head_dim)
        assert grad.shape == wanted, f"a gradient {tuple(grad.shape)} where {wanted} is due"
        assert grad.dtype == qkv.dtype, f"a gradient is {grad.dtype}, qkv is {qkv.dtype}"
    if out is None:
        out = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    assert out.shape == qkv.shape, f"out {tuple(out.shape)} for {tuple(qkv.shape)}"
    assert out.dtype == qkv.dtype, f"out is {out.dtype}, qkv is {qkv.dtype}"
    if _runs_triton(qkv, heads):
        from affina.kernels.triton import qk_rope as kernels

        kernels.launch_backward((grad_q, grad_k, grad_v), qkv, cos, sin, q_weight, k_weight, epsilon, heads, lora, out)
    else:
        _backward_reference((grad_q, grad_k, grad_v), qkv, cos, sin, q_weight, k_weight, epsilon, heads, lora, out)
    return out


def _check(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    heads: Heads,
    lora: QkvUpdate | None,
) -> None:
    for angles in (cos, sin):
        wanted = (qkv.shape[0], heads.head_dim // 2)
        assert angles.shape == wanted, f"cos and sin must be {wanted}, got {tuple(angles.shape)}"
    for weight in (q_weight, k_weight):
        assert weight is None or weight.shape == (heads.head_dim,), f"a norm of {heads.head_dim} has {weight.shape}"
    if lora is None:
        return
    assert lora.t.shape[0] == qkv.shape[0], f"t has {lora.t.shape[0]} rows, qkv {qkv.shape[0]}"
    assert lora.t.dtype == qkv.dtype, f"t is {lora.t.dtype}, qkv is {qkv.dtype}"
    for b, columns in zip(lora.factors, heads.columns, strict=True):
        width = columns.stop - columns.start
        assert b is None or b.shape[0] == width, f"B has {b.shape[0]} rows for {width} columns"


def _new_heads(qkv: Tensor, num_heads: int, head_dim: int) -> Tensor:
    return torch.empty(qkv.shape[0], num_heads, head_dim, dtype=qkv.dtype, device=qkv.device)


def _runs_triton(qkv: Tensor, heads: Heads) -> bool:
    return use_triton(qkv) and qkv.dtype != torch.float64 and heads.head_dim <= MAX_TRITON_HEAD_DIM and qkv.numel() > 0


# Reference
# --------------------------------------------------------------------------------------------------------------


def _token_chunks(qkv: Tensor) -> Iterator[slice]:
    """Slices of tokens that the reference works on at once; all of them on an accelerator."""
    num_tokens, width = qkv.shape
    step = max(1, _CHUNK_ELEMENTS_CPU // max(1, width)) if qkv.device.type == "cpu" else max(1, num_tokens)
    return (slice(start, min(start + step, num_tokens)) for start in range(0, num_tokens, step))


def _updated_heads(qkv: Tensor, heads: Heads, lora: QkvUpdate | None, index: int, tokens: slice) -> Tensor:
    """[tokens, heads, K] float32: queries (index 0), keys (1) or values (2), with their update.

    A view of `qkv` where that needs no copy.
    """
    wide_type = torch.promote_types(qkv.dtype, torch.float32)
    x = qkv[tokens, heads.columns[index]].to(wide_type)
    b = None if lora is None else lora.factors[index]
    if lora is not None and b is not None:
        start = sum(lora.ranks[:index])
        t = lora.t[tokens, start : start + b.shape[1]].to(wide_type)
        x = torch.addmm(x, t, b.to(wide_type).t(), alpha=lora.scales[index])
    return x.view(x.shape[0], x.shape[1] // heads.head_dim, heads.head_dim)


def _reciprocal_root_mean_square(x: Tensor, epsilon: float) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return norm.square_().div_(x.shape[-1]).add_(epsilon).rsqrt_()


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Each pair (first half, second half) of x [T, heads, K] turned by the angle whose cosine and sine are given."""
    rotated = torch.empty_like(x)
    first, second = x.chunk(2, dim=-1)
    rotated_first, rotated_second = rotated.chunk(2, dim=-1)
    torch.mul(first, cos, out=rotated_first).addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=rotated_second).addcmul_(first, sin)
    return rotated


def _forward_reference(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    epsilon: float,
    heads: Heads,
    lora: QkvUpdate | None,
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
) -> None:
    for tokens in _token_chunks(qkv):
        chunk_cos, chunk_sin = cos[tokens].unsqueeze(1), sin[tokens].unsqueeze(1)
        for index, (weight, out) in enumerate(((q_weight, q), (k_weight, k))):
            x = _updated_heads(qkv, heads, lora, index, tokens)
            if weight is not None:
                x = (x * _reciprocal_root_mean_square(x, epsilon)).mul_(weight)
            out[tokens] = _rotate(x, chunk_cos, chunk_sin)
        if v is not None:
            v[tokens] = _updated_heads(qkv, heads, lora, 2, tokens)


def _backward_reference(
    grads: tuple[Tensor, Tensor, Tensor],
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    epsilon: float,
    heads: Heads,
    lora: QkvUpdate | None,
    out: Tensor,
) -> None:
    wide_type = torch.promote_types(qkv.dtype, torch.float32)
    grad_v = grads[2]
    for tokens in _token_chunks(qkv):
        # Angles of the opposite sign turn back.
        chunk_cos, chunk_sin = cos[tokens].unsqueeze(1), -sin[tokens].unsqueeze(1)
        for index, weight in enumerate((q_weight, k_weight)):
            gradient = _rotate(grads[index][tokens].to(wide_type), chunk_cos, chunk_sin)
            if weight is not None:
                x = _updated_heads(qkv, heads, lora, index, tokens)
                rstd = _reciprocal_root_mean_square(x, epsilon)
                normalised = x * rstd
                gradient *= weight
                mean = (gradient * normalised).mean(dim=-1, keepdim=True)
                gradient.sub_(normalised.mul_(mean)).mul_(rstd)
            out[tokens, heads.columns[index]] = gradient.flatten(1)
        out[tokens, heads.columns[2]] = grad_v[tokens].flatten(1)
