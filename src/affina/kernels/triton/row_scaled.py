"""Triton kernel of `affina.kernels.row_scaled`: one program expands a piece of one row.

Legend: M rows of K numbers, B numbers that a program holds. Row offsets are 64 bits wide.
"""

# Triton has no types, and its decorator hides those of a kernel.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, misc, import-untyped, import-not-found"
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from affina.kernels.triton.launch import ceil_div, launch, power_of_two

LARGEST_TILE = 4096


@triton.jit
def _expand_rows_kernel(codes, scale, out, codes_stride, out_stride, K, B: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * B + tl.arange(0, B)
    inside = column < K
    numbers = tl.load(codes + row * codes_stride + column, mask=inside, other=0.0).to(tl.float32)
    expanded = numbers * tl.load(scale + row)
    tl.store(out + row * out_stride + column, expanded.to(out.dtype.element_ty), mask=inside)


def expand_rows(codes: Tensor, scale: Tensor, out: Tensor) -> None:
    """Launches the kernel; arguments as in `affina.kernels.row_scaled.expand_rows`."""
    rows, columns = codes.shape
    tile = min(LARGEST_TILE, max(128, power_of_two(columns)))
    launch(
        _expand_rows_kernel,
        (rows, ceil_div(columns, tile)),
        codes,
        scale,
        out,
        codes.stride(0),
        out.stride(0),
        columns,
        B=tile,
        num_warps=min(8, max(1, tile // 512)),
    )
