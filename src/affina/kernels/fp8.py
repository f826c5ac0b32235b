"""8-bit floating point (e4m3) with one scale per row: quantise, and multiply.

Legend: M rows (tokens), N outputs, K inputs (the contracted axis), u = 2⁻⁴ half a unit of e4m3.

**Format.** e4m3 has a sign, 4 bits of exponent and 3 of mantissa: ±448 down to 2⁻⁶ with full precision, then steps of
2⁻⁹ to 0; no infinity, one NaN. Micikevicius et al., *FP8 Formats for Deep Learning*, arXiv:2209.05433, table 1.

**Maths.** A row is scaled so that its largest number lands on the largest of the format, then rounded to nearest even:

    t = max |x_k|       s = t / 448  (1 for a row of zeros)       q_k = e4m3(x_k · (448 / t))       x̂_k = q_k · s

Both quotients are float32 divisions; the product is float32, rounded once more to e4m3. Nothing can saturate:
x · (448 / t) is at most 448 (1 + 2⁻²³), and everything below 464 rounds to 448. Rows whose largest number is below
448 · 2⁻¹²⁶ are scaled by 2¹²⁶, the largest factor that does not overflow. NaN and infinity make their numbers NaN; they
are not hidden.

The scales of the rows of both factors leave the sum over k and are applied once, to the float32 result:

    y = x Wᵀ:      y_mn = s_m s'_n Σ_k q_mk q'_nk

**Error.** A number in the format's normal range, i.e. above 2⁻¹⁵ of its row's largest (2⁻⁶ / 448), is off by at most
u = 6% of itself and about 2.6% in the root mean square; a smaller one by at most 2⁻¹⁰ · s, 2·10⁻⁶ of the row's
largest. Errors of different numbers are as good as independent, so those of a product's K terms average: with both
factors rounded a dot product is off by about 3.7% of √(Σ_k x_k² w_k²), whatever K. One scale per *row*, not per tensor:
a token with large activations does not cost others their small numbers (range is not the problem of one row: e4m3 spans
2¹⁸). The matrix unit of Hopper adds products with fewer than 24 bits when `use_fast_accum` is set and promotes partial
sums to float32 otherwise, at about a third of the speed; the loss is far below that of the format.

**The input gradient** dx = dy · W contracts over N, and Hopper's unit wants both factors contiguous along the
contracted axis. So the codes are transposed when they are needed (2 bytes moved per weight and use), and the weight's
scales, which lie on the contracted axis, are multiplied into dy before dy is quantised: dx = (dy ∘ s') · Q'. One byte
per weight is kept, and the gradient is that of the very weight the forward pass used. (A second copy Wᵀ with scales of
its own would cost another byte per weight, and its gradient would be that of another weight.)

**Bytes.** Quantising reads 2 (or 4) and writes 1 per number. Row offsets are 64 bits wide.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from affina.kernels.dispatch import use_triton

E4M3 = torch.float8_e4m3fn
LARGEST = 448.0
SMALLEST_MAXIMUM = LARGEST * 2.0**-126
"""Below it 448 / max would overflow float32."""
GEMM_MULTIPLE = 16
"""Matrix units take sizes N and K that are multiples of this; M is free."""


class QuantizedRows(NamedTuple):
    """codes: [M, K] float8_e4m3fn; scale: [M] float32"""

    codes: Tensor
    scale: Tensor

    @staticmethod
    def empty(num_rows: int, num_columns: int, device: torch.device) -> QuantizedRows:
        """Memory for rows, uninitialised."""
        codes = torch.empty(num_rows, num_columns, dtype=E4M3, device=device)
        return QuantizedRows(codes, torch.empty(num_rows, dtype=torch.float32, device=device))

    def part(self, rows: slice) -> QuantizedRows:
        """Some of the rows, the same memory."""
        return QuantizedRows(self.codes[rows], self.scale[rows])


def has_matrix_units(device: torch.device) -> bool:
    """Whether the device multiplies e4m3: NVIDIA since compute capability 8.9 (Ada, Hopper)."""
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 9)


def can_convert_in_kernels(device: torch.device) -> bool:
    """Whether Triton compiles a conversion to e4m3 for the device; PyTorch's own conversion runs on every card."""
    return device.type != "cuda" or has_matrix_units(device)


@torch.no_grad()
def quantize_rows(
    x: Tensor,
    *,
    beside: Tensor | None = None,
    column_factor: Tensor | None = None,
    beside_factor: Tensor | None = None,
    out: Tensor | None = None,
    scale_out: Tensor | None = None,
) -> QuantizedRows:
    """x in e4m3 and the scale of every row: ([M, K] float8_e4m3fn, [M] float32) with x ≈ codes · scale.

    x:             [M, K] bf16, fp16 or fp32; a row is contiguous, rows may be apart
    beside:        [M, R] of the type of x: [x, beside] is quantised, K + R columns, without being made; or None
    column_factor: [K] fp32, multiplied into the columns of x before quantising, or None
    beside_factor: [R] fp32, into those of `beside`; None with column_factor
    out:           [M, K + R] float8_e4m3fn memory for the codes; a row is contiguous, rows may be apart
    scale_out:     [M] fp32 memory for the scales
    """
    assert x.dim() == 2, f"rows of a matrix, got {tuple(x.shape)}"
    assert x.shape[1] <= 1 or x.stride(1) == 1, "the numbers of a row must lie side by side"
    shape = (x.shape[0], x.shape[1] + (beside.shape[1] if beside is not None else 0))
    codes = out if out is not None else torch.empty(shape, dtype=E4M3, device=x.device)
    scale = scale_out if scale_out is not None else torch.empty(x.shape[0], dtype=torch.float32, device=x.device)
    assert codes.shape == shape, f"{tuple(codes.shape)} memory for {shape} codes"
    assert codes.dtype == E4M3, f"{codes.dtype} memory for e4m3"
    assert codes.shape[1] <= 1 or codes.stride(1) == 1, "the codes of a row must lie side by side"
    assert scale.shape == x.shape[:1], "one scale for each row"
    assert scale.dtype == torch.float32, f"scales are float32, not {scale.dtype}"
    assert scale.is_contiguous(), "scales must be contiguous"
    assert beside is None or (beside.shape[0] == x.shape[0] and beside.dtype == x.dtype), "rows beside others"
    assert beside is None or beside.shape[1] <= 1 or beside.stride(1) == 1, "the numbers of a row must lie side by side"
    assert beside is None or (column_factor is None) == (beside_factor is None), "all columns have a factor, or none"
    if codes.numel() == 0:
        return QuantizedRows(codes, scale.fill_(1.0))
    if not (use_triton(x) and can_convert_in_kernels(x.device)):
        if beside is not None:
            x = torch.cat([x, beside], dim=1)
            factors = [factor for factor in (column_factor, beside_factor) if factor is not None]
            column_factor = torch.cat(factors) if factors else None
        _quantize_rows(x, column_factor, codes, scale)
        return QuantizedRows(codes, scale)
    from affina.kernels.triton import fp8 as kernel

    for factor in (column_factor, beside_factor):
        assert factor is None or factor.is_contiguous(), "factors must be contiguous"
    kernel.quantize_rows(x, beside, column_factor, beside_factor, codes, scale)
    return QuantizedRows(codes, scale)


def _quantize_rows(x: Tensor, column_factor: Tensor | None, codes: Tensor, scale: Tensor) -> None:
    """The specification."""
    numbers = x.float() if column_factor is None else x.float() * column_factor
    maximum = numbers.abs().amax(dim=1)
    clamped = maximum.clamp(min=SMALLEST_MAXIMUM)
    # Tensor by tensor: PyTorch divides a tensor by a number, or a number by it, as a product with a rounded reciprocal.
    largest = torch.full_like(clamped, LARGEST)
    torch.where(maximum == 0, torch.ones_like(maximum), clamped / largest, out=scale)
    codes.copy_(numbers * (largest / clamped).unsqueeze(1))


@torch.no_grad()
def dequantize_rows(codes: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """[M, K] codes · scale in `dtype`: the float32 product, rounded once."""
    return (codes.float() * scale.unsqueeze(1)).to(dtype)


@torch.no_grad()
def fp8_linear(
    x8: Tensor,
    x_scale: Tensor,
    w8: Tensor,
    w_scale: Tensor,
    *,
    out_dtype: torch.dtype,
    bias: Tensor | None = None,
    use_fast_accum: bool = True,
    out: Tensor | None = None,
) -> Tensor:
    """[M, N] x Wᵀ + b in `out_dtype`, written to `out` if given; no autograd.

    x8, x_scale:    [M, K] e4m3 and [M] fp32, from `quantize_rows`
    w8, w_scale:    [N, K] e4m3 and [N] fp32
    out_dtype:      on CUDA the product is bfloat16 (what row-wise scaled products give there) and cast when another
                    type is asked for; on a CPU it is float32
    bias:           [N] or None
    use_fast_accum: let the matrix unit add with fewer bits (see the module)

    On CUDA N and K are multiples of 16 and rows are contiguous; needs compute capability 8.9 or 9.0 and later.
    """
    assert x8.shape[1] == w8.shape[1], f"{tuple(x8.shape)} and {tuple(w8.shape)} do not share K"
    if x8.device.type != "cuda":
        product = _fp8_linear(x8, x_scale, w8, w_scale, out_dtype, bias)
        return product if out is None else out.copy_(product)
    for size in w8.shape:
        assert size % GEMM_MULTIPLE == 0, f"a weight of {tuple(w8.shape)} is no multiple of {GEMM_MULTIPLE}"
    is_direct = out is not None and out.dtype == torch.bfloat16 and out.is_contiguous()
    product = torch._scaled_mm(
        x8,
        w8.t(),
        scale_a=x_scale.unsqueeze(1),
        scale_b=w_scale.unsqueeze(0),
        bias=bias.to(torch.bfloat16) if bias is not None else None,
        out_dtype=torch.bfloat16,
        use_fast_accum=use_fast_accum,
        out=out if is_direct else None,
    )
    assert isinstance(product, Tensor)
    if out is None:
        return product.to(out_dtype)
    return out if is_direct else out.copy_(product)


def _fp8_linear(
    x8: Tensor, x_scale: Tensor, w8: Tensor, w_scale: Tensor, out_dtype: torch.dtype, bias: Tensor | None
) -> Tensor:
    """The specification: codes are multiplied exactly, added in float32, and scaled."""
    product = x8.float() @ w8.float().t()
    product.mul_(x_scale.unsqueeze(1)).mul_(w_scale)
    if bias is not None:
        product += bias.float()
    return product.to(out_dtype)


# The input gradient
# -------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def fp8_linear_backward(
    gradient: Tensor,
    w8: Tensor,
    w_scale: Tensor,
    *,
    out_dtype: torch.dtype,
    use_fast_accum: bool = True,
    u: Tensor | None = None,
    a: Tensor | None = None,
    ones: Tensor | None = None,
) -> Tensor:
    """[M, K] dy W + u A for dy [M, N] (bf16, fp16 or fp32), which is quantised, and the weight of `fp8_linear`.

    u, a: [M, R] of the type of dy and [R, K], both quantised as dy and W are; None: without them
    ones: [K] float32, the scales of the product's second factor; None: made here
    """
    num_outputs, num_inputs = w8.shape
    rank = 0 if a is None else a.shape[0]
    width = -(-(num_outputs + rank) // GEMM_MULTIPLE) * GEMM_MULTIPLE
    codes = torch.empty(gradient.shape[0], width, dtype=E4M3, device=gradient.device)
    transposed = torch.empty(num_inputs, width, dtype=E4M3, device=gradient.device)
    a_codes, a_scale = quantize_rows(a) if a is not None else (None, None)
    transpose_codes(w8, below=a_codes, out=transposed[:, : num_outputs + rank])
    for unused in (codes[:, num_outputs + rank :], transposed[:, num_outputs + rank :]):
        unused.view(torch.uint8).zero_()
    used = codes[:, : num_outputs + rank]
    _, scale = quantize_rows(gradient, beside=u, column_factor=w_scale, beside_factor=a_scale, out=used)
    if ones is None:
        ones = torch.ones(num_inputs, dtype=torch.float32, device=transposed.device)
    return fp8_linear(codes, scale, transposed, ones, out_dtype=out_dtype, use_fast_accum=use_fast_accum)


@torch.no_grad()
def transpose_codes(codes: Tensor, *, below: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """[K, N + R] contiguous, the transpose of `codes` [N, K] e4m3 and, if given, of `below` [R, K] under them.

    out: where it is written; rows may be apart
    """
    rows, columns = codes.shape
    if below is not None:
        assert below.shape[1] == columns, f"{tuple(below.shape)} below {tuple(codes.shape)}"
        rows += below.shape[0]
    transposed = out if out is not None else torch.empty(columns, rows, dtype=codes.dtype, device=codes.device)
    assert transposed.shape == (columns, rows), f"{tuple(transposed.shape)} memory for {(columns, rows)} codes"
    if not use_triton(codes) or codes.numel() == 0:
        stacked = codes.view(torch.uint8)
        if below is not None:
            stacked = torch.cat([stacked, below.view(torch.uint8)])
        transposed.view(torch.uint8).copy_(stacked.t())
        return transposed
    from affina.kernels.triton import fp8 as kernel

    kernel.transpose_codes(codes, below, transposed)
    return transposed
