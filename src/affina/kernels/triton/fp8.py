"""Triton kernels of `affina.kernels.fp8`: quantising rows to e4m3, and transposing bytes.

Legend: M rows of K numbers, of which a program holds HEAD and TAIL at once, R columns beside them, T the side of a
tile.

One program quantises one row. A row of up to `MAX_HELD` numbers stays in registers between the search for its maximum
and the rounding and is read once. Registers hold powers of two, so a row is held as two of them, HEAD + TAIL: 2,560 as
2,048 + 512, where the next power of two would leave 3 of 8 lanes idle. Longer rows are read twice, the second time
mostly from the caches. Few threads take a row, `ELEMENTS` numbers each: many loads are then under way in a thread
before it waits, and many rows on a processor, so that one loads while another waits for its maximum. For the same
reason rows of 16 bits stay in 16 bits while they wait. Divisions are the correctly rounded ones, one per row, so that
codes and scales equal the reference bit for bit.

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
from affina.kernels.triton.launch import ceil_div, launch, power_of_two

MAX_HELD = 32768
"""Numbers of a row that a program holds at most: 64 a thread of 16 warps."""
ELEMENTS = 80
"""Numbers of a row to a thread, at most and while 16 warps are enough. Compiled for an SM of 64 Ki registers, KiB
of rows that are under way on one with 80 and with 40: 2,560 columns 160 and 125, 9,728 152 and 114, 19,456 with factors
114 and 76."""
CODES_UNIT = 8
"""Codes are written by as many numbers at once as 16 bits are read by: the compiler, which knows of rows of codes only
that they begin at multiples of this, would else take 16 of both, and exchange what is written in 16 bits through shared
memory."""
TRANSPOSE_TILE = 64
_WARP = 32
_MIN_PIECE = 128


@triton.jit
def row_scale(maximum, LARGEST: tl.constexpr, SMALLEST_MAXIMUM: tl.constexpr):
    """(scale, what numbers are multiplied with before they are rounded) of rows with these maxima."""
    clamped = tl.maximum(maximum, SMALLEST_MAXIMUM)
    return tl.where(maximum == 0.0, 1.0, tl.div_rn(clamped, LARGEST)), tl.div_rn(LARGEST, clamped)


@triton.jit
def _load_once(row, column, inside):
    # The cache is for the factors, which every row reads.
    return tl.load(row + column, mask=inside, other=0.0, eviction_policy="evict_first")


@triton.jit
def _numbers(x, column_factor, column, inside, HAS_FACTOR: tl.constexpr):
    """float32 x · factor"""
    x = x.to(tl.float32)
    if HAS_FACTOR:
        x *= tl.load(column_factor + column, mask=inside, other=0.0, eviction_policy="evict_last")
    return x


@triton.jit
def _numbers_again(x, before, column_factor, column, inside, HAS_FACTOR: tl.constexpr, PACKS: tl.constexpr):
    """The same numbers, made anew of x so that not `before`, of 32 bits each, waits in registers."""
    if PACKS:
        # Without this no-operation the compiler sees that they are the same.
        x = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], dtype=x.dtype, is_pure=False, pack=2)
        return _numbers(x, column_factor, column, inside, HAS_FACTOR)
    return before


@triton.jit(do_not_specialize=["codes_stride"])
def _quantize_rows_kernel(
    x,
    beside,
    column_factor,
    beside_factor,
    codes,
    scale,
    x_stride,
    beside_stride,
    codes_stride,
    K: tl.constexpr,
    R: tl.constexpr,
    NUM_TILES: tl.constexpr,
    HEAD: tl.constexpr,
    TAIL: tl.constexpr,
    BESIDE: tl.constexpr,
    HAS_FACTOR: tl.constexpr,
    PACKS: tl.constexpr,
    CODES_UNIT: tl.constexpr,
    LARGEST: tl.constexpr,
    SMALLEST_MAXIMUM: tl.constexpr,
):
    index = tl.program_id(0).to(tl.int64)
    row = x + index * x_stride
    row_codes = codes + index * (codes_stride * CODES_UNIT)
    lane = tl.arange(0, HEAD)

    if NUM_TILES == 1:
        head_x = _load_once(row, lane, lane < K)
    else:
        head_x = tl.load(row + lane)
    head = _numbers(head_x, column_factor, lane, lane < K, HAS_FACTOR)
    if TAIL > 0:
        tail_lane = HEAD + tl.arange(0, TAIL)
        tail_x = _load_once(row, tail_lane, tail_lane < K)
        tail = _numbers(tail_x, column_factor, tail_lane, tail_lane < K, HAS_FACTOR)
    if BESIDE > 0:
        extra_lane = tl.arange(0, BESIDE)
        extra_x = _load_once(beside + index * beside_stride, extra_lane, extra_lane < R)
        extra = _numbers(extra_x, beside_factor, extra_lane, extra_lane < R, HAS_FACTOR)
    magnitudes = tl.abs(head)
    for tile in range(1, NUM_TILES):
        column = tile * HEAD + lane
        x_again = tl.load(row + column, mask=column < K, other=0.0)
        numbers = _numbers(x_again, column_factor, column, column < K, HAS_FACTOR)
        magnitudes = tl.maximum(magnitudes, tl.abs(numbers))
    maximum = tl.max(magnitudes, axis=0)
    if TAIL > 0:
        maximum = tl.maximum(maximum, tl.max(tl.abs(tail), axis=0))
    if BESIDE > 0:
        maximum = tl.maximum(maximum, tl.max(tl.abs(extra), axis=0))
    row_scale_, factor = row_scale(maximum, LARGEST, SMALLEST_MAXIMUM)
    tl.store(scale + index, row_scale_)

    head = _numbers_again(head_x, head, column_factor, lane, lane < K, HAS_FACTOR, PACKS)
    tl.store(row_codes + lane, (head * factor).to(tl.float8e4nv), mask=lane < K)
    if TAIL > 0:
        tail = _numbers_again(tail_x, tail, column_factor, tail_lane, tail_lane < K, HAS_FACTOR, PACKS)
        tl.store(row_codes + tail_lane, (tail * factor).to(tl.float8e4nv), mask=tail_lane < K)
    for tile in range(1, NUM_TILES):
        column = tile * HEAD + lane
        numbers = _numbers(_load_once(row, column, column < K), column_factor, column, column < K, HAS_FACTOR)
        tl.store(row_codes + column, (numbers * factor).to(tl.float8e4nv), mask=column < K)
    if BESIDE > 0:
        tl.store(row_codes + K + extra_lane, (extra * factor).to(tl.float8e4nv), mask=extra_lane < R)


def quantize_rows(
    x: Tensor,
    beside: Tensor | None,
    column_factor: Tensor | None,
    beside_factor: Tensor | None,
    codes: Tensor,
    scale: Tensor,
) -> None:
    """Launches the kernel; arguments as in `affina.kernels.fp8.quantize_rows`."""
    rows, columns = x.shape
    head, tail = held_pieces(columns)
    unit = codes_unit(codes)
    launch(
        _quantize_rows_kernel,
        (rows,),
        x,
        beside if beside is not None else x,
        column_factor if column_factor is not None else scale,
        beside_factor if beside_factor is not None else scale,
        codes,
        scale,
        x.stride(0),
        beside.stride(0) if beside is not None else 0,
        codes.stride(0) // unit,
        K=columns,
        R=beside.shape[1] if beside is not None else 0,
        NUM_TILES=ceil_div(columns, head) if tail == 0 else 1,
        HEAD=head,
        TAIL=tail,
        BESIDE=power_of_two(beside.shape[1]) if beside is not None and beside.shape[1] > 0 else 0,
        HAS_FACTOR=column_factor is not None,
        PACKS=packs(x),
        CODES_UNIT=unit,
        LARGEST=LARGEST,
        SMALLEST_MAXIMUM=SMALLEST_MAXIMUM,
        num_warps=num_warps(head + tail),
    )


def held_pieces(columns: int) -> tuple[int, int]:
    """(HEAD, TAIL) for rows of so many numbers; TAIL 0: HEAD is all, or tiles of HEAD follow one another."""
    whole = max(_MIN_PIECE, power_of_two(columns))
    if whole == columns or whole <= _MIN_PIECE:
        return min(MAX_HELD, whole), 0
    if columns > MAX_HELD:
        return MAX_HELD, 0
    tail = max(_MIN_PIECE, power_of_two(columns - whole // 2))
    return (whole // 2, tail) if tail < whole // 2 else (whole, 0)


def codes_unit(codes: Tensor) -> int:
    """What the stride of codes is told to a kernel in."""
    return CODES_UNIT if codes.stride(0) % CODES_UNIT == 0 else 1


def packs(x: Tensor) -> bool:
    """Whether rows wait in their own 16 bits; the interpreter knows no assembler."""
    return x.element_size() == 2 and x.device.type != "cpu"


def num_warps(held: int) -> int:
    """Warps for a row of so many numbers."""
    return min(16, power_of_two(ceil_div(held, ELEMENTS * _WARP)))


@triton.jit
def _transpose_kernel(
    source, below, target, N, R, K, source_stride, below_stride, target_stride, HAS_BELOW: tl.constexpr, T: tl.constexpr
):
    row = tl.program_id(1) * T + tl.arange(0, T)
    column = tl.program_id(0) * T + tl.arange(0, T)
    place = row.to(tl.int64)[:, None] * source_stride + column[None, :]
    tile = tl.load(source + place, mask=(row < N)[:, None] & (column < K)[None, :], other=0)
    if HAS_BELOW:
        row_below = row - N
        place = row_below.to(tl.int64)[:, None] * below_stride + column[None, :]
        is_below = (row_below >= 0) & (row_below < R)
        tile |= tl.load(below + place, mask=is_below[:, None] & (column < K)[None, :], other=0)
    place = column.to(tl.int64)[:, None] * target_stride + row[None, :]
    tl.store(target + place, tl.trans(tile), mask=(column < K)[:, None] & (row < N + R)[None, :])


def transpose_codes(codes: Tensor, below: Tensor | None, transposed: Tensor) -> None:
    """Writes the transpose of `codes` [N, K] and of `below` [R, K] to `transposed` [K, N + R], all of bytes."""
    columns, rows = transposed.shape
    grid = (ceil_div(columns, TRANSPOSE_TILE), ceil_div(rows, TRANSPOSE_TILE))
    assert grid[1] < 65536, f"a grid has at most 65,535 rows of tiles, {rows} rows need {grid[1]}"
    launch(
        _transpose_kernel,
        grid,
        codes.view(torch.uint8),
        (below if below is not None else codes).view(torch.uint8),
        transposed.view(torch.uint8),
        codes.shape[0],
        0 if below is None else below.shape[0],
        columns,
        codes.stride(0),
        0 if below is None else below.stride(0),
        transposed.stride(0),
        HAS_BELOW=below is not None,
        T=TRANSPOSE_TILE,
        num_warps=4,
    )
