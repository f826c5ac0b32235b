"""Triton kernels of `affina.kernels.swiglu` for low-rank updates of ranks up to 64, whose docstring holds the maths.

A program owns a block of columns of gate and up and walks down a chunk of rows, tile by tile. So

* its rows of B are loaded once and stay in shared memory, as operands of the matrix units;
* the next tiles are on their way (asynchronous copies to shared memory) while one is computed;
* the gradients of the factors, sums over all rows, grow in its registers. At its end it writes them once to a workspace
  [chunks, R_g + R_u + R_d, I] in float32, and a second kernel adds up the chunks in their order: no atomics, the same
  bits every time.

A tile's elements are read before they are written and no program reads those of another, so writing over an input is
safe. `num_rows` is not specialised: another number of rows must not compile another kernel in the middle of a run.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, misc, import-untyped, import-not-found"
from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from affina.kernels.triton.launch import ceil_div, launch
from affina.kernels.triton.low_rank import block_rank, must_widen, row_stride

if TYPE_CHECKING:
    from affina.kernels.swiglu import GateUpUpdate, RankGradients


@triton.jit
def sigmoid(x, APPROXIMATES: tl.constexpr):
    """1 / (1 + exp(-x)).

    APPROXIMATES: the device's own 2^x and 1/x, within 2 units in the last place: 4 instructions instead of 12, which
    treat the ends of float32's range exactly; here ∞ gives the right 0. Elsewhere x < -87 counts as -87, so that
    exp(-x) stays finite; x · σ(x) is below 10⁻³⁵ in size there.
    """
    if APPROXIMATES:
        power = tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x * -1.4426950408889634], dtype=tl.float32, is_pure=True, pack=1
        )
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [1.0 + power], dtype=tl.float32, is_pure=True, pack=1
        )
    return 1.0 / (1.0 + tl.exp(-tl.maximum(x, -87.0)))


@triton.jit
def _factor(b_ptr, b_stride, columns, column_mask, RANK: tl.constexpr, BLOCK_RANK: tl.constexpr, WIDEN: tl.constexpr):
    """[BLOCK_RANK, BLOCK_COLUMNS]: Bᵀ of a block of columns of the activation."""
    ranks = tl.arange(0, BLOCK_RANK)
    mask = (ranks < RANK)[:, None] & column_mask[None, :]
    b = tl.load(b_ptr + columns[None, :] * b_stride + ranks[:, None], mask=mask, other=0.0)
    return b.to(tl.float32) if WIDEN else b


@triton.jit
def _rank_rows(t_ptr, t_stride, rows, row_mask, RANK: tl.constexpr, BLOCK_RANK: tl.constexpr, WIDEN: tl.constexpr):
    """[BLOCK_ROWS, BLOCK_RANK]: rows of t, or of the gradient of a t."""
    ranks = tl.arange(0, BLOCK_RANK)
    mask = row_mask[:, None] if RANK == BLOCK_RANK else row_mask[:, None] & (ranks < RANK)[None, :]
    t = tl.load(t_ptr + rows[:, None] * t_stride + ranks[None, :], mask=mask, other=0.0)
    return t.to(tl.float32) if WIDEN else t


@triton.jit
def _rank_sum(sums, wide, t, WIDEN: tl.constexpr):
    """sums + wideᵀ t: [BLOCK_COLUMNS, BLOCK_RANK] from [BLOCK_ROWS, BLOCK_COLUMNS] and [BLOCK_ROWS, BLOCK_RANK].

    The other way round (tᵀ wide) the matrix units would need no waiting for, but 40 registers more per thread.
    """
    if WIDEN:
        wide = wide.to(tl.float32)
    return tl.dot(tl.trans(wide), t, sums, input_precision="ieee")


@triton.jit
def _store_sums(
    workspace_ptr, sums, columns, column_mask, RANK: tl.constexpr, BLOCK_RANK: tl.constexpr, WIDTH: tl.constexpr
):
    ranks = tl.arange(0, BLOCK_RANK)
    mask = (ranks < RANK)[None, :] & column_mask[:, None]
    tl.store(workspace_ptr + ranks[None, :] * WIDTH + columns[:, None], sums, mask=mask)


@triton.jit(do_not_specialize=["num_rows", "blocks_per_chunk"])
def _forward_kernel(
    gate_up_ptr,
    out_ptr,
    t_ptr,
    b_gate_ptr,
    b_up_ptr,
    num_rows,
    blocks_per_chunk,
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
    STAGES: tl.constexpr,
    WIDEN: tl.constexpr,
    APPROXIMATES: tl.constexpr,
):
    num_column_blocks: tl.constexpr = (WIDTH + BLOCK_COLUMNS - 1) // BLOCK_COLUMNS
    program = tl.program_id(0)
    columns = (program % num_column_blocks) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    chunk = program // num_column_blocks
    column_mask = columns < WIDTH
    if RANK_GATE > 0:
        b_gate = _factor(b_gate_ptr, b_gate_stride, columns, column_mask, RANK_GATE, BLOCK_RANK_GATE, WIDEN)
    if RANK_UP > 0:
        b_up = _factor(b_up_ptr, b_up_stride, columns, column_mask, RANK_UP, BLOCK_RANK_UP, WIDEN)
    first_row = chunk * blocks_per_chunk * BLOCK_ROWS
    for block in tl.range(0, blocks_per_chunk, num_stages=STAGES):
        rows = first_row + block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS).to(tl.int64)
        row_mask = rows < num_rows
        mask = row_mask[:, None] if WIDTH % BLOCK_COLUMNS == 0 else row_mask[:, None] & column_mask[None, :]
        pointers = gate_up_ptr + rows[:, None] * gate_up_stride + columns[None, :]
        gate = tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
        up = tl.load(pointers + WIDTH, mask=mask, other=0.0).to(tl.float32)
        if RANK_GATE > 0:
            t_gate = _rank_rows(t_ptr, t_stride, rows, row_mask, RANK_GATE, BLOCK_RANK_GATE, WIDEN)
            gate += scale_gate * tl.dot(t_gate, b_gate, input_precision="ieee")
        if RANK_UP > 0:
            t_up = _rank_rows(t_ptr + RANK_GATE, t_stride, rows, row_mask, RANK_UP, BLOCK_RANK_UP, WIDEN)
            up += scale_up * tl.dot(t_up, b_up, input_precision="ieee")
        activation = gate * sigmoid(gate, APPROXIMATES) * up
        out_pointers = out_ptr + rows[:, None] * out_stride + columns[None, :]
        tl.store(out_pointers, activation.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_rows", "blocks_per_chunk"])
def _backward_kernel(
    grad_ptr,
    gate_up_ptr,
    out_ptr,
    t_ptr,
    b_gate_ptr,
    b_up_ptr,
    u_down_ptr,
    workspace_ptr,
    num_rows,
    blocks_per_chunk,
    grad_stride,
    gate_up_stride,
    out_stride,
    t_stride,
    b_gate_stride,
    b_up_stride,
    u_down_stride,
    scale_gate,
    scale_up,
    WIDTH: tl.constexpr,
    RANK_GATE: tl.constexpr,
    RANK_UP: tl.constexpr,
    RANK_DOWN: tl.constexpr,
    BLOCK_RANK_GATE: tl.constexpr,
    BLOCK_RANK_UP: tl.constexpr,
    BLOCK_RANK_DOWN: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    STAGES: tl.constexpr,
    WIDEN: tl.constexpr,
    APPROXIMATES: tl.constexpr,
):
    num_column_blocks: tl.constexpr = (WIDTH + BLOCK_COLUMNS - 1) // BLOCK_COLUMNS
    program = tl.program_id(0)
    columns = (program % num_column_blocks) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    chunk = program // num_column_blocks
    column_mask = columns < WIDTH
    if RANK_GATE > 0:
        b_gate = _factor(b_gate_ptr, b_gate_stride, columns, column_mask, RANK_GATE, BLOCK_RANK_GATE, WIDEN)
        sums_gate = tl.zeros([BLOCK_COLUMNS, BLOCK_RANK_GATE], dtype=tl.float32)
    if RANK_UP > 0:
        b_up = _factor(b_up_ptr, b_up_stride, columns, column_mask, RANK_UP, BLOCK_RANK_UP, WIDEN)
        sums_up = tl.zeros([BLOCK_COLUMNS, BLOCK_RANK_UP], dtype=tl.float32)
    if RANK_DOWN > 0:
        sums_down = tl.zeros([BLOCK_COLUMNS, BLOCK_RANK_DOWN], dtype=tl.float32)
    first_row = chunk * blocks_per_chunk * BLOCK_ROWS
    for block in tl.range(0, blocks_per_chunk, num_stages=STAGES):
        rows = first_row + block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS).to(tl.int64)
        row_mask = rows < num_rows
        mask = row_mask[:, None] if WIDTH % BLOCK_COLUMNS == 0 else row_mask[:, None] & column_mask[None, :]
        grad = tl.load(grad_ptr + rows[:, None] * grad_stride + columns[None, :], mask=mask, other=0.0).to(tl.float32)
        pointers = gate_up_ptr + rows[:, None] * gate_up_stride + columns[None, :]
        gate = tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
        up = tl.load(pointers + WIDTH, mask=mask, other=0.0).to(tl.float32)
        if RANK_GATE > 0:
            t_gate = _rank_rows(t_ptr, t_stride, rows, row_mask, RANK_GATE, BLOCK_RANK_GATE, WIDEN)
            gate += scale_gate * tl.dot(t_gate, b_gate, input_precision="ieee")
        if RANK_UP > 0:
            t_up = _rank_rows(t_ptr + RANK_GATE, t_stride, rows, row_mask, RANK_UP, BLOCK_RANK_UP, WIDEN)
            up += scale_up * tl.dot(t_up, b_up, input_precision="ieee")

        sigma = sigmoid(gate, APPROXIMATES)
        silu = gate * sigma
        grad_up = (grad * silu).to(out_ptr.dtype.element_ty)
        grad_gate = (grad * up * (sigma + silu * (1.0 - sigma))).to(out_ptr.dtype.element_ty)
        activation = (silu * up).to(out_ptr.dtype.element_ty)
        out_pointers = out_ptr + rows[:, None] * out_stride + columns[None, :]
        tl.store(out_pointers, grad_gate, mask=mask)
        tl.store(out_pointers + WIDTH, grad_up, mask=mask)
        if RANK_GATE > 0:
            sums_gate = _rank_sum(sums_gate, grad_gate, t_gate, WIDEN)
        if RANK_UP > 0:
            sums_up = _rank_sum(sums_up, grad_up, t_up, WIDEN)
        if RANK_DOWN > 0:
            u_down = _rank_rows(u_down_ptr, u_down_stride, rows, row_mask, RANK_DOWN, BLOCK_RANK_DOWN, WIDEN)
            sums_down = _rank_sum(sums_down, activation, u_down, WIDEN)

    mine = workspace_ptr + chunk.to(tl.int64) * ((RANK_GATE + RANK_UP + RANK_DOWN) * WIDTH)
    if RANK_GATE > 0:
        _store_sums(mine, sums_gate, columns, column_mask, RANK_GATE, BLOCK_RANK_GATE, WIDTH)
    if RANK_UP > 0:
        _store_sums(mine + RANK_GATE * WIDTH, sums_up, columns, column_mask, RANK_UP, BLOCK_RANK_UP, WIDTH)
    if RANK_DOWN > 0:
        mine += (RANK_GATE + RANK_UP) * WIDTH
        _store_sums(mine, sums_down, columns, column_mask, RANK_DOWN, BLOCK_RANK_DOWN, WIDTH)


@triton.jit
def _reduce_factor(
    workspace_ptr,
    out_ptr,
    rank_stride,
    column_stride,
    scale,
    columns,
    column_mask,
    num_chunks,
    chunk_elements,
    RANK: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
    WIDTH: tl.constexpr,
    ACCUMULATES: tl.constexpr,
):
    """The gradient of one factor for a block of columns: the chunks' sums, added in their order."""
    if RANK > 0:
        ranks = tl.arange(0, BLOCK_RANK)
        mask = (ranks < RANK)[:, None] & column_mask[None, :]
        pointers = workspace_ptr + ranks[:, None] * WIDTH + columns[None, :]
        sums = tl.load(pointers, mask=mask, other=0.0)
        for chunk in tl.range(1, num_chunks, num_stages=4):
            sums += tl.load(pointers + chunk * chunk_elements, mask=mask, other=0.0)
        sums *= scale
        out_pointers = out_ptr + ranks[:, None] * rank_stride + columns[None, :] * column_stride
        if ACCUMULATES:
            sums += tl.load(out_pointers, mask=mask, other=0.0)
        tl.store(out_pointers, sums, mask=mask)


@triton.jit(do_not_specialize=["num_chunks"])
def _reduce_kernel(
    workspace_ptr,
    b_gate_ptr,
    b_up_ptr,
    a_down_ptr,
    num_chunks,
    b_gate_stride,
    b_up_stride,
    a_down_stride,
    scale_gate,
    scale_up,
    WIDTH: tl.constexpr,
    RANK_GATE: tl.constexpr,
    RANK_UP: tl.constexpr,
    RANK_DOWN: tl.constexpr,
    BLOCK_RANK_GATE: tl.constexpr,
    BLOCK_RANK_UP: tl.constexpr,
    BLOCK_RANK_DOWN: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    ACCUMULATES: tl.constexpr,
):
    """The first third of the programs make the gradient of the gate's B, the next the up projection's, the last A's."""
    chunk_elements: tl.constexpr = (RANK_GATE + RANK_UP + RANK_DOWN) * WIDTH
    columns = tl.program_id(0) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    column_mask = columns < WIDTH
    factor = tl.program_id(1)
    if factor == 0:
        _reduce_factor(
            workspace_ptr,
            b_gate_ptr,
            1,
            b_gate_stride,
            scale_gate,
            columns,
            column_mask,
            num_chunks,
            chunk_elements,
            RANK_GATE,
            BLOCK_RANK_GATE,
            WIDTH,
            ACCUMULATES,
        )
    elif factor == 1:
        _reduce_factor(
            workspace_ptr + RANK_GATE * WIDTH,
            b_up_ptr,
            1,
            b_up_stride,
            scale_up,
            columns,
            column_mask,
            num_chunks,
            chunk_elements,
            RANK_UP,
            BLOCK_RANK_UP,
            WIDTH,
            ACCUMULATES,
        )
    else:
        _reduce_factor(
            workspace_ptr + (RANK_GATE + RANK_UP) * WIDTH,
            a_down_ptr,
            a_down_stride,
            1,
            1.0,
            columns,
            column_mask,
            num_chunks,
            chunk_elements,
            RANK_DOWN,
            BLOCK_RANK_DOWN,
            WIDTH,
            ACCUMULATES,
        )


# Launches
# --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tile:
    """What a program does at once, and how many programs a multiprocessor holds beside each other."""

    rows: int
    columns: int
    num_warps: int
    num_stages: int
    programs: int
    max_registers: int | None = None


TILES: dict[tuple[str, int], Tile] = {
    ("forward", 16): Tile(32, 64, 4, 3, 8),
    ("forward", 32): Tile(32, 64, 4, 3, 6),
    ("forward", 64): Tile(32, 64, 4, 3, 4),
    ("backward", 16): Tile(32, 64, 4, 3, 4, max_registers=128),
    ("backward", 32): Tile(32, 64, 4, 3, 3, max_registers=168),
    ("backward", 64): Tile(16, 64, 4, 3, 3, max_registers=168),
}
"""By kernel and largest padded rank, for 16-bit types.

Measured on an H200 (16,384 rows of 9,728), the backward pass: rank 16 in 441 µs (3.6 TB/s; separate products: 824),
rank 64 in 623 µs (32 × 64: 630, separate products: 804). 32 × 128 on eight warps takes 419 at rank 16, but 71 KiB of
shared memory, more than cards before 8.0 have."""

_TILE_FLOAT32 = Tile(32, 32, 4, 2, 2)
"""Products in float32 do without matrix units; this only has to be right."""

_REDUCED_COLUMNS = 32
_MAX_CHUNKS = 16
_INTERPRETED_PROGRAMS = 4


def tile_for(kernel: str, ranks: tuple[int, ...], dtype: torch.dtype) -> Tile:
    """The tile of `kernel` ("forward", "backward") for these ranks."""
    return _TILE_FLOAT32 if dtype == torch.float32 else TILES[kernel, max(block_rank(rank) for rank in ranks)]


def approximates(tensor: Tensor) -> bool:
    """Whether NVIDIA's own instructions can be used."""
    return tensor.device.type == "cuda" and torch.version.hip is None


def launch_forward(gate_up: Tensor, lora: GateUpUpdate, out: Tensor) -> None:
    """Write silu(gate) · up to `out`."""
    tile = tile_for("forward", lora.ranks, gate_up.dtype)
    pointers, strides, constants = _update_arguments(gate_up, lora)
    grid, loop, shape = _grid(out, tile)
    launch(
        _forward_kernel,
        grid,
        gate_up,
        out,
        *pointers,
        *loop,
        row_stride(gate_up),
        row_stride(out),
        *strides,
        WIDTH=out.shape[1],
        **constants,
        **shape,
    )


def launch_backward(
    grad_output: Tensor, gate_up: Tensor, lora: GateUpUpdate | None, out: Tensor, gradients: RankGradients
) -> None:
    """Write the gradients of gate and up to `out`, and those of the factors where `gradients` says."""
    tile = tile_for("backward", gradients.ranks, gate_up.dtype)
    pointers, strides, constants = _update_arguments(gate_up, lora)
    rank_down = gradients.ranks[2]
    constants |= {"RANK_DOWN": rank_down, "BLOCK_RANK_DOWN": block_rank(rank_down)}
    grid, loop, shape = _grid(grad_output, tile)
    width = grad_output.shape[1]
    num_chunks = grid[0] // ceil_div(width, tile.columns)
    workspace = torch.empty(num_chunks * width * sum(gradients.ranks), dtype=torch.float32, device=gate_up.device)
    u_down = gradients.u_down
    launch(
        _backward_kernel,
        grid,
        grad_output,
        gate_up,
        out,
        *pointers,
        gate_up if u_down is None else u_down,
        workspace,
        *loop,
        row_stride(grad_output),
        row_stride(gate_up),
        row_stride(out),
        *strides[:3],
        0 if u_down is None else row_stride(u_down),
        *strides[3:],
        WIDTH=width,
        **constants,
        **shape,
    )
    _launch_reduction(workspace, gradients, lora, width, num_chunks, constants)


def _launch_reduction(
    workspace: Tensor,
    gradients: RankGradients,
    lora: GateUpUpdate | None,
    width: int,
    num_chunks: int,
    constants: dict[str, Any],
) -> None:
    outputs = (gradients.b_gate, gradients.b_up, gradients.a_down)
    launch(
        _reduce_kernel,
        (ceil_div(width, _REDUCED_COLUMNS), 3),
        workspace,
        *(workspace if out is None else out for out in outputs),
        num_chunks,
        *(0 if out is None else row_stride(out) for out in outputs),
        1.0 if lora is None else lora.scale_gate,
        1.0 if lora is None else lora.scale_up,
        WIDTH=width,
        BLOCK_COLUMNS=_REDUCED_COLUMNS,
        ACCUMULATES=gradients.accumulates,
        num_warps=4,
        **{name: value for name, value in constants.items() if "RANK" in name},
    )


def _grid(rows: Tensor, tile: Tile) -> tuple[tuple[int], tuple[int, int], dict[str, int]]:
    """The number of programs; rows, and blocks of rows in a chunk; and the tile's launch arguments."""
    num_rows, width = rows.shape
    num_row_blocks = ceil_div(num_rows, tile.rows)
    num_column_blocks = ceil_div(width, tile.columns)
    blocks = _blocks_per_chunk(num_row_blocks, num_column_blocks, _num_programs(rows.device, tile))
    shape = {
        "BLOCK_ROWS": tile.rows,
        "BLOCK_COLUMNS": tile.columns,
        "STAGES": tile.num_stages,
        "num_warps": tile.num_warps,
    }
    if tile.max_registers is not None:
        shape["maxnreg"] = tile.max_registers
    return (num_column_blocks * ceil_div(num_row_blocks, blocks),), (num_rows, blocks), shape


@lru_cache(maxsize=256)
def _blocks_per_chunk(num_row_blocks: int, num_column_blocks: int, num_programs: int) -> int:
    """Blocks of rows in a chunk with which all is done soonest, the device running `num_programs` at once.

    The time is counted in blocks of rows: a chunk's number of them for each round of programs, and one more for a
    program's beginning and end.
    """

    def cost(blocks: int) -> int:
        rounds = ceil_div(num_column_blocks * ceil_div(num_row_blocks, blocks), num_programs)
        return rounds * (blocks + 1)

    choices = {ceil_div(num_row_blocks, num_chunks) for num_chunks in range(1, _MAX_CHUNKS + 1)}
    return min(sorted(choices), key=cost)


@lru_cache(maxsize=8)
def _num_multiprocessors(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def _num_programs(device: torch.device, tile: Tile) -> int:
    if device.type != "cuda":
        return _INTERPRETED_PROGRAMS
    return tile.programs * _num_multiprocessors(device)


def _update_arguments(
    gate_up: Tensor, lora: GateUpUpdate | None
) -> tuple[tuple[Tensor, ...], tuple[int | float, ...], dict[str, Any]]:
    """Pointers, strides and then scales, and constants of the update; stand-ins where there is none."""
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
        return (gate_up, gate_up, gate_up), (0, 0, 0, 1.0, 1.0), constants
    pointers = tuple(gate_up if b is None else b for b in (lora.t, lora.b_gate, lora.b_up))
    b_strides = tuple(0 if b is None else row_stride(b) for b in (lora.b_gate, lora.b_up))
    return pointers, (row_stride(lora.t), *b_strides, lora.scale_gate, lora.scale_up), constants
