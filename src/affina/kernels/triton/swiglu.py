"""Triton kernels of `affina.kernels.swiglu` without low-rank updates, whose docstring holds the maths.

A program owns a tile of M × I and reads the gate's and the up projection's elements of that tile, which lie I columns
apart. It reads everything before it writes, so writing over an input is safe; the tile has at least
`_ELEMENTS_PER_THREAD` elements for each thread, since of two threads that hold the same element one could read it again
after the other has written it.

`num_rows` is not specialised: another number of rows must not compile another kernel in the middle of a run.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, misc, import-untyped, import-not-found"
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from affina.kernels.triton.launch import ceil_div, launch, power_of_two
from affina.kernels.triton.low_rank import row_stride
from affina.kernels.triton.swiglu_low_rank import approximates, sigmoid

_ELEMENTS_PER_THREAD = 8
_WARP = 32
_TILE_ELEMENTS = 1024
_NUM_WARPS = 4


@triton.jit
def _place(num_rows, WIDTH: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr):
    """Rows (int64) and columns of the program's tile, and which of its elements exist."""
    num_column_blocks: tl.constexpr = (WIDTH + BLOCK_COLUMNS - 1) // BLOCK_COLUMNS
    program = tl.program_id(0)
    rows = (program // num_column_blocks).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    columns = (program % num_column_blocks) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    return rows[:, None], columns[None, :], (rows < num_rows)[:, None] & (columns < WIDTH)[None, :]


@triton.jit(do_not_specialize=["num_rows"])
def _forward_kernel(
    gate_up_ptr,
    out_ptr,
    num_rows,
    gate_up_stride,
    out_stride,
    WIDTH: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    APPROXIMATES: tl.constexpr,
):
    rows, columns, mask = _place(num_rows, WIDTH, BLOCK_ROWS, BLOCK_COLUMNS)
    pointers = gate_up_ptr + rows * gate_up_stride + columns
    gate = tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(pointers + WIDTH, mask=mask, other=0.0).to(tl.float32)
    activation = gate * sigmoid(gate, APPROXIMATES) * up
    tl.store(out_ptr + rows * out_stride + columns, activation.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_rows"])
def _backward_kernel(
    grad_ptr,
    gate_up_ptr,
    out_ptr,
    activation_ptr,
    num_rows,
    grad_stride,
    gate_up_stride,
    out_stride,
    activation_stride,
    HAS_ACTIVATION: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    APPROXIMATES: tl.constexpr,
):
    rows, columns, mask = _place(num_rows, WIDTH, BLOCK_ROWS, BLOCK_COLUMNS)
    grad = tl.load(grad_ptr + rows * grad_stride + columns, mask=mask, other=0.0).to(tl.float32)
    pointers = gate_up_ptr + rows * gate_up_stride + columns
    gate = tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(pointers + WIDTH, mask=mask, other=0.0).to(tl.float32)
    sigma = sigmoid(gate, APPROXIMATES)
    silu = gate * sigma
    grad_gate = grad * up * (sigma + silu * (1.0 - sigma))
    out_pointers = out_ptr + rows * out_stride + columns
    tl.store(out_pointers, grad_gate.to(out_ptr.dtype.element_ty), mask=mask)
    tl.store(out_pointers + WIDTH, (grad * silu).to(out_ptr.dtype.element_ty), mask=mask)
    if HAS_ACTIVATION:
        activation = (silu * up).to(activation_ptr.dtype.element_ty)
        tl.store(activation_ptr + rows * activation_stride + columns, activation, mask=mask)


def launch_forward(gate_up: Tensor, out: Tensor) -> None:
    """Write silu(gate) · up to `out`."""
    tile, num_programs = _tile(out)
    launch(
        _forward_kernel,
        (num_programs,),
        gate_up,
        out,
        out.shape[0],
        row_stride(gate_up),
        row_stride(out),
        APPROXIMATES=approximates(gate_up),
        **tile,
    )


def launch_backward(grad_output: Tensor, gate_up: Tensor, out: Tensor, activation_out: Tensor | None) -> None:
    """Write the gradients of gate and up to `out`, and silu(gate) · up to `activation_out` if it is given."""
    tile, num_programs = _tile(grad_output)
    launch(
        _backward_kernel,
        (num_programs,),
        grad_output,
        gate_up,
        out,
        grad_output if activation_out is None else activation_out,
        grad_output.shape[0],
        row_stride(grad_output),
        row_stride(gate_up),
        row_stride(out),
        0 if activation_out is None else row_stride(activation_out),
        HAS_ACTIVATION=activation_out is not None,
        APPROXIMATES=approximates(gate_up),
        **tile,
    )


def _tile(activation: Tensor) -> tuple[dict[str, int], int]:
    """The tile's launch arguments, and how many tiles cover [M, I]."""
    num_rows, width = activation.shape
    block_columns = min(_TILE_ELEMENTS, power_of_two(width))
    block_rows = _TILE_ELEMENTS // block_columns
    assert _TILE_ELEMENTS >= _NUM_WARPS * _WARP * _ELEMENTS_PER_THREAD
    num_programs = ceil_div(num_rows, block_rows) * ceil_div(width, block_columns)
    tile = {"WIDTH": width, "BLOCK_ROWS": block_rows, "BLOCK_COLUMNS": block_columns, "num_warps": _NUM_WARPS}
    return tile, num_programs
