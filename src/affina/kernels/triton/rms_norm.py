"""Triton kernels of `affina.kernels.rms_norm`, whose docstring holds the maths.

A program owns whole rows, a tile [ROWS, BLOCK] with BLOCK the next power of two of D: one row of a wide model, several
of a narrow one; it may go through several such tiles, the loads of the next under way while it works on one. It holds
them in registers from the only read to the only write, so that writing over an input is safe. For that every thread
must own elements of its own (ROWS · BLOCK ≥ threads · `_MIN_ELEMENTS_PER_THREAD`): where two threads hold the same
element, one could read it again after the other has written it.

With a low-rank update the sum is a kernel of its own, on tiles [BLOCK_ROWS, BLOCK_COLUMNS], since matrix units multiply
at least 16 rows at once, too many to hold whole. One kernel for the sum and the norm, walking over a row twice, was
slower: 116 µs against 104 for both (H200, 16,384 rows of 2,560, rank 16; addmm_ and the norm of the sum: 153).

`num_rows` is not specialised: another number of rows must not compile another kernel in the middle of a run.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, misc, import-untyped, import-not-found"
from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from affina.kernels.fp8 import LARGEST, SMALLEST_MAXIMUM
from affina.kernels.triton.fp8 import codes_unit, row_scale
from affina.kernels.triton.launch import ceil_div, launch, power_of_two
from affina.kernels.triton.low_rank import (
    fitting_block_rank,
    load_left_factor,
    low_rank_product,
    must_widen,
    row_stride,
)

if TYPE_CHECKING:
    from affina.kernels.fp8 import QuantizedRows
    from affina.kernels.rms_norm import RowUpdate

_WARP = 32
_MIN_ELEMENTS_PER_THREAD = 8
_MIN_PROGRAMS = 1024
_MAX_SHARED_BYTES = 49152


class RowTile(NamedTuple):
    """How a program goes through whole rows.

    elements: of a row that a thread holds at most; more threads only where a row is short
    steps:    tiles of rows, one after the other
    stages:   1: a step's loads begin with its turn; 3: those of the next step are under way meanwhile; 4: of the next
              two (2 gains nothing: they begin when the step before is done)
    """

    elements: int
    steps: int
    stages: int


class UpdateTile(NamedTuple):
    """The tile of a program that adds a low-rank update."""

    rows: int
    columns: int
    warps: int


ROW_TILES = {
    "forward": RowTile(elements=24, steps=1, stages=1),
    "sum": RowTile(elements=24, steps=1, stages=1),
    "backward": RowTile(elements=24, steps=1, stages=1),
}
"""By kernel; "sum" is the forward kernel with the residual addition. A row of 2,560 on four warps: 48, 63 and 72
registers a thread, so that 10, 8 and 7 rows are under way on an SM of 64 Ki registers (6, 5 and 5 on eight warps)."""
UPDATE_TILE = UpdateTile(rows=32, columns=128, warps=4)
"""On an H200, 16,384 rows of 2,560, rank 16: 62 µs, 4.07 TB/s; 16 × 128, 64 × 64 and 16 × 256 take the same."""


@triton.jit(do_not_specialize=["num_rows", "codes_stride"])
def _forward_kernel(
    x_ptr,
    update_ptr,
    weight_ptr,
    sum_ptr,
    y_ptr,
    rstd_ptr,
    codes_ptr,
    scale_ptr,
    num_rows,
    x_stride,
    update_stride,
    sum_stride,
    y_stride,
    codes_stride,
    epsilon,
    WIDTH: tl.constexpr,
    HAS_UPDATE: tl.constexpr,
    QUANTIZES: tl.constexpr,
    CODES_UNIT: tl.constexpr,
    LARGEST: tl.constexpr,
    SMALLEST_MAXIMUM: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    STEPS: tl.constexpr,
    STAGES: tl.constexpr,
):
    columns = tl.arange(0, BLOCK)
    weight = tl.load(weight_ptr + columns, mask=columns < WIDTH, other=0.0).to(tl.float32)[None, :]
    for step in tl.range(0, STEPS, num_stages=STAGES):
        rows = (tl.program_id(0) * STEPS + step) * ROWS + tl.arange(0, ROWS)
        rows_long = rows.to(tl.int64)[:, None]
        mask = (rows < num_rows)[:, None] & (columns < WIDTH)[None, :]
        x = tl.load(x_ptr + rows_long * x_stride + columns[None, :], mask=mask, other=0.0)
        if HAS_UPDATE:
            update = tl.load(update_ptr + rows_long * update_stride + columns[None, :], mask=mask, other=0.0)
            x = (x.to(tl.float32) + update.to(tl.float32)).to(x_ptr.dtype.element_ty)
        wide = x.to(tl.float32)
        rstd = tl.rsqrt(tl.sum(wide * wide, axis=1) / WIDTH + epsilon)
        y = (wide * rstd[:, None] * weight).to(y_ptr.dtype.element_ty)

        if HAS_UPDATE:
            tl.store(sum_ptr + rows_long * sum_stride + columns[None, :], x, mask=mask)
        tl.store(y_ptr + rows_long * y_stride + columns[None, :], y, mask=mask)
        tl.store(rstd_ptr + rows, rstd, mask=rows < num_rows)
        if QUANTIZES:
            numbers = y.to(tl.float32)
            scale, factor = row_scale(tl.max(tl.abs(numbers), axis=1), LARGEST, SMALLEST_MAXIMUM)
            codes = (numbers * factor[:, None]).to(tl.float8e4nv)
            tl.store(codes_ptr + rows_long * (codes_stride * CODES_UNIT) + columns[None, :], codes, mask=mask)
            tl.store(scale_ptr + rows, scale, mask=rows < num_rows)


@triton.jit(do_not_specialize=["num_rows"])
def _backward_kernel(
    grad_ptr,
    x_ptr,
    weight_ptr,
    rstd_ptr,
    residual_ptr,
    out_ptr,
    num_rows,
    grad_stride,
    x_stride,
    residual_stride,
    out_stride,
    WIDTH: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    STEPS: tl.constexpr,
    STAGES: tl.constexpr,
):
    columns = tl.arange(0, BLOCK)
    weight = tl.load(weight_ptr + columns, mask=columns < WIDTH, other=0.0).to(tl.float32)[None, :]
    for step in tl.range(0, STEPS, num_stages=STAGES):
        rows = (tl.program_id(0) * STEPS + step) * ROWS + tl.arange(0, ROWS)
        rows_long = rows.to(tl.int64)[:, None]
        mask = (rows < num_rows)[:, None] & (columns < WIDTH)[None, :]
        grad = tl.load(grad_ptr + rows_long * grad_stride + columns[None, :], mask=mask, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + rows_long * x_stride + columns[None, :], mask=mask, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + rows, mask=rows < num_rows, other=0.0)[:, None]
        if HAS_RESIDUAL:
            residual = tl.load(residual_ptr + rows_long * residual_stride + columns[None, :], mask=mask, other=0.0)

        grad_normalised = grad * weight
        normalised = x * rstd
        mean = (tl.sum(grad_normalised * normalised, axis=1) / WIDTH)[:, None]
        gradient = rstd * (grad_normalised - normalised * mean)
        if HAS_RESIDUAL:
            gradient += residual.to(tl.float32)
        tl.store(out_ptr + rows_long * out_stride + columns[None, :], gradient.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _load_sum(
    x_ptr,
    update_ptr,
    first_t,
    t_ptr,
    b_ptr,
    x_stride,
    update_stride,
    t_stride,
    b_stride,
    scale,
    rows,
    row_mask,
    columns,
    column_mask,
    RANK: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """[BLOCK_ROWS, BLOCK_COLUMNS] in the type of x: x + update + scale · t Bᵀ; zeros beyond the masks."""
    mask = row_mask[:, None] & column_mask[None, :]
    x = tl.load(x_ptr + rows[:, None] * x_stride + columns[None, :], mask=mask, other=0.0)
    update = tl.load(update_ptr + rows[:, None] * update_stride + columns[None, :], mask=mask, other=0.0)
    product = low_rank_product(
        first_t,
        t_ptr,
        t_stride,
        b_ptr,
        b_stride,
        rows,
        row_mask,
        columns.to(tl.int64),
        column_mask,
        RANK,
        BLOCK_RANK,
        WIDEN,
    )
    return (x.to(tl.float32) + update.to(tl.float32) + scale * product).to(x_ptr.dtype.element_ty)


@triton.jit(do_not_specialize=["num_rows"])
def _add_kernel(
    x_ptr,
    update_ptr,
    t_ptr,
    b_ptr,
    sum_ptr,
    num_rows,
    x_stride,
    update_stride,
    t_stride,
    b_stride,
    sum_stride,
    scale,
    WIDTH: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    WIDEN: tl.constexpr,
):
    num_column_blocks: tl.constexpr = (WIDTH + BLOCK_COLUMNS - 1) // BLOCK_COLUMNS
    program = tl.program_id(0)
    rows = (program // num_column_blocks).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    columns = (program % num_column_blocks) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    row_mask = rows < num_rows
    column_mask = columns < WIDTH
    first_t = load_left_factor(t_ptr, t_stride, rows, row_mask, 0, RANK, BLOCK_RANK, WIDEN)
    s = _load_sum(
        x_ptr,
        update_ptr,
        first_t,
        t_ptr,
        b_ptr,
        x_stride,
        update_stride,
        t_stride,
        b_stride,
        scale,
        rows,
        row_mask,
        columns,
        column_mask,
        RANK,
        BLOCK_RANK,
        WIDEN,
    )
    mask = row_mask[:, None] & column_mask[None, :]
    tl.store(sum_ptr + rows[:, None] * sum_stride + columns[None, :], s, mask=mask)


def launch_forward(
    x: Tensor,
    update: Tensor | None,
    weight: Tensor,
    epsilon: float,
    *,
    sum_out: Tensor | None,
    out: Tensor,
    rstd: Tensor,
    codes_out: QuantizedRows | None = None,
) -> None:
    """Write the norm of x, or of `sum_out` = x + update, to `out`, and its reciprocal to `rstd`; perhaps its codes."""
    assert (update is None) == (sum_out is None)
    tile, num_programs = _row_tile(x, ROW_TILES["forward" if update is None else "sum"], 1 if update is None else 2)
    unit = 1 if codes_out is None else codes_unit(codes_out.codes)
    launch(
        _forward_kernel,
        (num_programs,),
        x,
        x if update is None else update,
        weight,
        x if sum_out is None else sum_out,
        out,
        rstd,
        x if codes_out is None else codes_out.codes,
        rstd if codes_out is None else codes_out.scale,
        x.shape[0],
        row_stride(x),
        0 if update is None else row_stride(update),
        0 if sum_out is None else row_stride(sum_out),
        row_stride(out),
        0 if codes_out is None else row_stride(codes_out.codes) // unit,
        epsilon,
        WIDTH=x.shape[1],
        HAS_UPDATE=update is not None,
        QUANTIZES=codes_out is not None,
        CODES_UNIT=unit,
        LARGEST=LARGEST,
        SMALLEST_MAXIMUM=SMALLEST_MAXIMUM,
        **tile,
    )


def launch_add(x: Tensor, update: Tensor, lora: RowUpdate, out: Tensor) -> None:
    """Write x + update + scale · t Bᵀ to `out`."""
    num_rows, width = x.shape
    tile = _update_tile(lora, UPDATE_TILE)
    num_programs = ceil_div(num_rows, tile["BLOCK_ROWS"]) * ceil_div(width, tile["BLOCK_COLUMNS"])
    launch(
        _add_kernel,
        (num_programs,),
        x,
        update,
        lora.t,
        lora.b,
        out,
        num_rows,
        *(row_stride(rows) for rows in (x, update, lora.t, lora.b, out)),
        lora.scale,
        WIDTH=width,
        **tile,
    )


def launch_backward(
    grad_output: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, *, grad_residual: Tensor | None, out: Tensor
) -> None:
    """Write the gradient of x to `out`."""
    tile, num_programs = _row_tile(x, ROW_TILES["backward"], 2 if grad_residual is None else 3)
    launch(
        _backward_kernel,
        (num_programs,),
        grad_output,
        x,
        weight,
        rstd,
        x if grad_residual is None else grad_residual,
        out,
        x.shape[0],
        row_stride(grad_output),
        row_stride(x),
        0 if grad_residual is None else row_stride(grad_residual),
        row_stride(out),
        WIDTH=x.shape[1],
        HAS_RESIDUAL=grad_residual is not None,
        **tile,
    )


def _row_tile(x: Tensor, tile: RowTile, num_inputs: int) -> tuple[dict[str, Any], int]:
    """Launch arguments of a program that holds whole rows of `num_inputs` tensors, and the number of programs."""
    num_rows, width = x.shape
    block = max(16, power_of_two(width))
    rows = max(1, 2048 // block)
    num_warps = min(16, max(2, power_of_two(ceil_div(rows * width, tile.elements * _WARP))))
    num_warps = min(num_warps, rows * block // (_WARP * _MIN_ELEMENTS_PER_THREAD))
    steps = tile.steps if num_rows >= _MIN_PROGRAMS * rows * tile.steps else 1
    row_bytes = num_inputs * rows * block * x.element_size()
    arguments = {
        "ROWS": rows,
        "BLOCK": block,
        "STEPS": steps,
        "STAGES": min(tile.stages, steps, 1 + _MAX_SHARED_BYTES // row_bytes),
        "num_warps": num_warps,
        "num_stages": 1,
    }
    return arguments, ceil_div(num_rows, rows * steps)


def _update_tile(lora: RowUpdate, tile: UpdateTile) -> dict[str, Any]:
    """Launch arguments of a program that adds a low-rank update."""
    rank, element_bytes = lora.t.shape[1], lora.b.element_size()
    return {
        "RANK": rank,
        "BLOCK_RANK": fitting_block_rank(rank, tile.columns, element_bytes),
        "BLOCK_ROWS": tile.rows,
        "BLOCK_COLUMNS": tile.columns,
        "WIDEN": must_widen(lora.b),
        "num_warps": tile.warps,
        "num_stages": 1,
    }
