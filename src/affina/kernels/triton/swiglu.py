"""Triton kernels of `affina.kernels.swiglu`, whose docstring holds the maths: without updates, and with any rank.

A program owns a tile of M × I and reads the gate's and the up projection's elements of that tile, which lie I columns
apart. It reads everything before it writes, so writing over an input is safe; the tile has at least
`_ELEMENTS_PER_THREAD` elements for each thread, since of two threads that hold the same element one could read it again
after the other has written it.

Low-rank updates of ranks up to 64 are the business of `swiglu_low_rank`. With a larger one the tile is nearly square,
so that t (a row of it for each row of the tile) and B (a row of it for each column) are each read once per side of the
tile, from the cache: R · 2 · 2 b bytes for BLOCK_ROWS or BLOCK_COLUMNS elements.

`num_rows` is not specialised: another number of rows must not compile another kernel in the middle of a run.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, misc, import-untyped, import-not-found"
from __future__ import annotations

from typing import TYPE_CHECKING, Any

import triton
import triton.language as tl
from torch import Tensor

from affina.kernels.triton import swiglu_low_rank
from affina.kernels.triton.low_rank import block_rank, low_rank_tile, must_widen, row_stride
from affina.kernels.triton.swiglu_low_rank import approximates, sigmoid

if TYPE_CHECKING:
    from affina.kernels.swiglu import GateUpUpdate

_ELEMENTS_PER_THREAD = 8
_WARP = 32
_PLAIN_TILE_ELEMENTS = 1024
_NUM_WARPS = 4
_UPDATE_TILE = (64, 64)


@triton.jit
def _load_gate_up(
    gate_up_ptr,
    gate_up_stride,
    t_ptr,
    t_stride,
    b_gate_ptr,
    b_gate_stride,
    b_up_ptr,
    b_up_stride,
    scale_gate,
    scale_up,
    rows,
    row_mask,
    columns,
    column_mask,
    WIDTH: tl.constexpr,
    RANK_GATE: tl.constexpr,
    RANK_UP: tl.constexpr,
    BLOCK_RANK_GATE: tl.constexpr,
    BLOCK_RANK_UP: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """The float32 tiles of gate and up, with their low-rank updates where a rank is not 0."""
    mask = row_mask[:, None] & column_mask[None, :]
    pointers = gate_up_ptr + rows[:, None] * gate_up_stride + columns[None, :]
    gate = tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(pointers + WIDTH, mask=mask, other=0.0).to(tl.float32)
    if RANK_GATE > 0:
        gate += scale_gate * low_rank_tile(
            t_ptr,
            t_stride,
            b_gate_ptr,
            b_gate_stride,
            rows,
            row_mask,
            columns.to(tl.int64),
            column_mask,
            RANK_GATE,
            BLOCK_RANK_GATE,
            BLOCK_ROWS,
            BLOCK_COLUMNS,
            WIDEN,
        )
    if RANK_UP > 0:
        up += scale_up * low_rank_tile(
            t_ptr + RANK_GATE,
            t_stride,
            b_up_ptr,
            b_up_stride,
            rows,
            row_mask,
            columns.to(tl.int64),
            column_mask,
            RANK_UP,
            BLOCK_RANK_UP,
            BLOCK_ROWS,
            BLOCK_COLUMNS,
            WIDEN,
        )
    return gate, up


@triton.jit(do_not_specialize=["num_rows"])
def _forward_kernel(
    gate_up_ptr,
    out_ptr,
    t_ptr,
    b_gate_ptr,
    b_up_ptr,
    num_rows,
    gate_up_stride,
    out_stride,
    t_stride,
    b_gate_stride,
    b_up_stride,
    scale_gate,
    scale_up,
    WIDTH: tl.constexpr,
    RANK_GATE: tl.constexpr,
    RANK_UP: tl.constexpr,
    BLOCK_RANK_GATE: tl.constexpr,
    BLOCK_RANK_UP: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    WIDEN: tl.constexpr,
    APPROXIMATES: tl.constexpr,
):
    num_column_blocks: tl.constexpr = (WIDTH + BLOCK_COLUMNS - 1) // BLOCK_COLUMNS
    program = tl.program_id(0)
    rows = (program // num_column_blocks).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    columns = (program % num_column_blocks) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    row_mask = rows < num_rows
    column_mask = columns < WIDTH
    gate, up = _load_gate_up(
        gate_up_ptr,
        gate_up_stride,
        t_ptr,
        t_stride,
        b_gate_ptr,
        b_gate_stride,
        b_up_ptr,
        b_up_stride,
        scale_gate,
        scale_up,
        rows,
        row_mask,
        columns,
        column_mask,
        WIDTH,
        RANK_GATE,
        RANK_UP,
        BLOCK_RANK_GATE,
        BLOCK_RANK_UP,
        BLOCK_ROWS,
        BLOCK_COLUMNS,
        WIDEN,
    )
    activation = gate * sigmoid(gate, APPROXIMATES) * up
    tl.store(
        out_ptr + rows[:, None] * out_stride + columns[None, :],
        activation.to(out_ptr.dtype.element_ty),
        mask=row_mask[:, None] & column_mask[None, :],
    )


@triton.jit(do_not_specialize=["num_rows"])
def _backward_kernel(
    grad_ptr,
    gate_up_ptr,
    out_ptr,
    activation_ptr,
    t_ptr,
    b_gate_ptr,
    b_up_ptr,
    num_rows,
    grad_stride,
    gate_up_stride,
    out_stride,
    activation_stride,
    t_stride,
    b_gate_stride,
    b_up_stride,
    scale_gate,
    scale_up,
    HAS_ACTIVATION: tl.constexpr,
    WIDTH: tl.constexpr,
    RANK_GATE: tl.constexpr,
    RANK_UP: tl.constexpr,
    BLOCK_RANK_GATE: tl.constexpr,
    BLOCK_RANK_UP: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    WIDEN: tl.constexpr,
    APPROXIMATES: tl.constexpr,
):
    num_column_blocks: tl.constexpr = (WIDTH + BLOCK_COLUMNS - 1) // BLOCK_COLUMNS
    program = tl.program_id(0)
    rows = (program // num_column_blocks).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    columns = (program % num_column_blocks) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    row_mask = rows < num_rows
    column_mask = columns < WIDTH
    mask = row_mask[:, None] & column_mask[None, :]
    grad = tl.load(grad_ptr + rows[:, None] * grad_stride + columns[None, :], mask=mask, other=0.0).to(tl.float32)
    gate, up = _load_gate_up(
        gate_up_ptr,
        gate_up_stride,
        t_ptr,
        t_stride,
        b_gate_ptr,
        b_gate_stride,
        b_up_ptr,
        b_up_stride,
        scale_gate,
        scale_up,
        rows,
        row_mask,
        columns,
        column_mask,
        WIDTH,
        RANK_GATE,
        RANK_UP,
        BLOCK_RANK_GATE,
        BLOCK_RANK_UP,
        BLOCK_ROWS,
        BLOCK_COLUMNS,
        WIDEN,
    )
    sigma = sigmoid(gate, APPROXIMATES)
    silu = gate * sigma
    grad_gate = grad * up * (sigma + silu * (1.0 - sigma))
    grad_up = grad * silu

    pointers = out_ptr + rows[:, None] * out_stride + columns[None, :]
    tl.store(pointers, grad_gate.to(out_ptr.dtype.element_ty), mask=mask)
    tl.store(pointers + WIDTH, grad_up.to(out_ptr.dtype.element_ty), mask=mask)
    if HAS_ACTIVATION:
        tl.store(
            activation_ptr + rows[:, None] * activation_stride + columns[None, :],
            (silu * up).to(activation_ptr.dtype.element_ty),
            mask=mask,
        )


def launch_forward(gate_up: Tensor, lora: GateUpUpdate | None, out: Tensor) -> None:
    """Write silu(gate) · up to `out`."""
    if lora is not None and swiglu_low_rank.takes(*lora.ranks):
        swiglu_low_rank.launch_forward(gate_up, lora, out)
        return
    tile, num_programs = _tile(out, lora)
    pointers, strides, constants = _update_arguments(gate_up, lora)
    _forward_kernel[(num_programs,)](
        gate_up,
        out,
        *pointers,
        out.shape[0],
        row_stride(gate_up),
        row_stride(out),
        *strides,
        WIDTH=out.shape[1],
        **constants,
        **tile,
    )


def launch_backward(
    grad_output: Tensor, gate_up: Tensor, lora: GateUpUpdate | None, out: Tensor, activation_out: Tensor | None
) -> None:
    """Write the gradients of gate and up to `out`, and silu(gate) · up to `activation_out` if it is given."""
    if lora is not None and swiglu_low_rank.takes(*lora.ranks):
        swiglu_low_rank.launch_backward(grad_output, gate_up, lora, out, activation_out=activation_out)
        return
    tile, num_programs = _tile(grad_output, lora)
    pointers, strides, constants = _update_arguments(gate_up, lora)
    _backward_kernel[(num_programs,)](
        grad_output,
        gate_up,
        out,
        grad_output if activation_out is None else activation_out,
        *pointers,
        grad_output.shape[0],
        row_stride(grad_output),
        row_stride(gate_up),
        row_stride(out),
        0 if activation_out is None else row_stride(activation_out),
        *strides,
        HAS_ACTIVATION=activation_out is not None,
        WIDTH=grad_output.shape[1],
        **constants,
        **tile,
    )


def _tile(activation: Tensor, lora: GateUpUpdate | None) -> tuple[dict[str, int], int]:
    """The tile's launch arguments, and how many tiles cover [M, I]."""
    num_rows, width = activation.shape
    if lora is None:
        block_columns = min(_PLAIN_TILE_ELEMENTS, triton.next_power_of_2(width))
        block_rows = _PLAIN_TILE_ELEMENTS // block_columns
    else:
        block_rows, block_columns = _UPDATE_TILE
    assert block_rows * block_columns >= _NUM_WARPS * _WARP * _ELEMENTS_PER_THREAD
    num_programs = triton.cdiv(num_rows, block_rows) * triton.cdiv(width, block_columns)
    return {"BLOCK_ROWS": block_rows, "BLOCK_COLUMNS": block_columns, "num_warps": _NUM_WARPS}, num_programs


def _update_arguments(
    gate_up: Tensor, lora: GateUpUpdate | None
) -> tuple[tuple[Tensor, ...], tuple[int | float, ...], dict[str, Any]]:
    """Pointers, strides with scales, and constants of the update; stand-ins where there is none."""
    rank_gate, rank_up = lora.ranks if lora is not None else (0, 0)
    constants = {
        "RANK_GATE": rank_gate,
        "RANK_UP": rank_up,
        "BLOCK_RANK_GATE": block_rank(rank_gate),
        "BLOCK_RANK_UP": block_rank(rank_up),
        "WIDEN": must_widen(gate_up),
        "APPROXIMATES": approximates(gate_up),
    }
    if lora is None:
        return (gate_up, gate_up, gate_up), (0, 0, 0, 0.0, 0.0), constants
    pointers = tuple(gate_up if b is None else b for b in (lora.t, lora.b_gate, lora.b_up))
    b_strides = tuple(0 if b is None else row_stride(b) for b in (lora.b_gate, lora.b_up))
    return pointers, (row_stride(lora.t), *b_strides, lora.scale_gate, lora.scale_up), constants
