"""Triton kernels of `affina.kernels.fp8`: quantising rows to e4m3, and transposing bytes.

Legend: M rows of K numbers, B numbers of a row that a program holds at once, T the side of a tile.

One program quantises one row. Up to `MAX_TILE` numbers the row stays in registers between the search for its maximum
and the rounding and is read once; a longer one is read twice, the second time mostly from the caches. Divisions are the
correctly rounded ones, one per row, so that codes and scales equal the reference bit for bit.

The transpose moves T × T bytes per program; the compiler exchanges them through shared memory, so that reads and writes
are whole 16-byte words. Row offsets are 64 bits wide.
"""

# Triton has no types, and its decorator hides those of a kernel.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, misc, import-untyped, import-not-found"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from affina.kernels.fp8 import LARGEST, SMALLEST_MAXIMUM

MAX_TILE = 32768
TRANSPOSE_TILE = 64


@triton.jit
def _numbers(row, column_factor, column, inside, HAS_FACTOR: tl.constexpr):
    x = tl.load(row + column, mask=inside, other=0.0).to(tl.float32)
    if HAS_FACTOR:
        x *= tl.load(column_factor + column, mask=inside, other=0.0)
    return x


@triton.jit
def _quantize_rows_kernel(
    x,
    beside,
    column_factor,
    codes,
    scale,
    x_stride,
    beside_stride,
    codes_stride,
    K,
    R,
    NUM_TILES: tl.constexpr,
    B: tl.constexpr,
    BESIDE: tl.constexpr,
    HAS_FACTOR: tl.constexpr,
    LARGEST: tl.constexpr,
    SMALLEST_MAXIMUM: tl.constexpr,
):
    index = tl.program_id(0).to(tl.int64)
    row = x + index * x_stride
    row_codes = codes + index * codes_stride
    lane = tl.arange(0, B)

    first = _numbers(row, column_factor, lane, lane < K, HAS_FACTOR)
    magnitudes = tl.abs(first)
    for tile in range(1, NUM_TILES):
        column = tile * B + lane
        magnitudes = tl.maximum(magnitudes, tl.abs(_numbers(row, column_factor, column, column < K, HAS_FACTOR)))
    maximum = tl.max(magnitudes, axis=0)
    if BESIDE > 0:
        extra_lane = tl.arange(0, BESIDE)
        extra = _numbers(beside + index * beside_stride, column_factor + K, extra_lane, extra_lane < R, HAS_FACTOR)
        maximum = tl.maximum(maximum, tl.max(tl.abs(extra), axis=0))
    clamped = tl.maximum(maximum, SMALLEST_MAXIMUM)
    tl.store(scale + index, tl.where(maximum == 0.0, 1.0, tl.div_rn(clamped, LARGEST)))

    factor = tl.div_rn(LARGEST, clamped)
    tl.store(row_codes + lane, (first * factor).to(tl.float8e4nv), mask=lane < K)
    for tile in range(1, NUM_TILES):
        column = tile * B + lane
        numbers = _numbers(row, column_factor, column, column < K, HAS_FACTOR)
        tl.store(row_codes + column, (numbers * factor).to(tl.float8e4nv), mask=column < K)
    if BESIDE > 0:
        tl.store(row_codes + K + extra_lane, (extra * factor).to(tl.float8e4nv), mask=extra_lane < R)


def quantize_rows(x: Tensor, beside: Tensor | None, column_factor: Tensor | None, codes: Tensor, scale: Tensor) -> None:
    """Launches the kernel; arguments as in `affina.kernels.fp8.quantize_rows`."""
    rows, columns = x.shape
    tile = min(MAX_TILE, max(128, triton.next_power_of_2(columns)))
    _quantize_rows_kernel[(rows,)](
        x,
        beside if beside is not None else x,
        column_factor if column_factor is not None else scale,
        codes,
        scale,
        x.stride(0),
        beside.stride(0) if beside is not None else 0,
        codes.stride(0),
        columns,
        beside.shape[1] if beside is not None else 0,
        NUM_TILES=triton.cdiv(columns, tile),
        B=tile,
        BESIDE=triton.next_power_of_2(beside.shape[1]) if beside is not None and beside.shape[1] > 0 else 0,
        HAS_FACTOR=column_factor is not None,
        LARGEST=LARGEST,
        SMALLEST_MAXIMUM=SMALLEST_MAXIMUM,
        num_warps=min(16, max(1, tile // 512)),
    )


@triton.jit
def _transpose_kernel(source, target, N, K, source_stride, target_stride, T: tl.constexpr):
    row = tl.program_id(1) * T + tl.arange(0, T)
    column = tl.program_id(0) * T + tl.arange(0, T)
    place = row.to(tl.int64)[:, None] * source_stride + column[None, :]
    tile = tl.load(source + place, mask=(row < N)[:, None] & (column < K)[None, :], other=0)
    place = column.to(tl.int64)[:, None] * target_stride + row[None, :]
    tl.store(target + place, tl.trans(tile), mask=(column < K)[:, None] & (row < N)[None, :])


def transpose_codes(codes: Tensor, transposed: Tensor) -> None:
    """Writes the transpose of `codes` [N, K] to `transposed` [K, N]; both have one byte per number."""
    rows, columns = codes.shape
    grid = (triton.cdiv(columns, TRANSPOSE_TILE), triton.cdiv(rows, TRANSPOSE_TILE))
    assert grid[1] < 65536, f"a grid has at most 65,535 rows of tiles, {rows} rows need {grid[1]}"
    _transpose_kernel[grid](
        codes.view(torch.uint8),
        transposed.view(torch.uint8),
        rows,
        columns,
        codes.stride(0),
        transposed.stride(0),
        T=TRANSPOSE_TILE,
        num_warps=4,
    )
