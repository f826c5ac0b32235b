"""The low-rank product t · Bᵀ inside other Triton kernels: a tile of it, made in registers, never in memory."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, misc, import-untyped, import-not-found"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from affina.kernels.triton.launch import power_of_two

MIN_BLOCK_RANK = 16
"""Matrix units multiply 16 columns of the left factor at least; a smaller rank is padded with zeros."""
MAX_BLOCK_RANK = 64
"""Columns of a larger rank are added up in steps of this, so that both factors' tiles stay small."""
MAX_FACTOR_BYTES = 16384
"""The largest tile of B: it lies in shared memory, of which a GPU gives a program 64 to 227 KiB."""


@triton.jit
def load_left_factor(
    t_ptr, t_stride, rows, row_mask, first, RANK: tl.constexpr, BLOCK_RANK: tl.constexpr, WIDEN: tl.constexpr
):
    """[BLOCK_ROWS, BLOCK_RANK] columns of t from `first` on; rows are int64."""
    ranks = first + tl.arange(0, BLOCK_RANK)
    mask = row_mask[:, None] & (ranks < RANK)[None, :]
    t = tl.load(t_ptr + rows[:, None] * t_stride + ranks[None, :], mask=mask, other=0.0)
    return t.to(tl.float32) if WIDEN else t


@triton.jit
def load_right_factor(
    b_ptr, b_stride, columns, column_mask, first, RANK: tl.constexpr, BLOCK_RANK: tl.constexpr, WIDEN: tl.constexpr
):
    """[BLOCK_RANK, BLOCK_COLUMNS] columns of B from `first` on, transposed; `columns`, int64, are rows of B."""
    ranks = first + tl.arange(0, BLOCK_RANK)
    mask = column_mask[None, :] & (ranks < RANK)[:, None]
    b = tl.load(b_ptr + columns[None, :] * b_stride + ranks[:, None], mask=mask, other=0.0)
    return b.to(tl.float32) if WIDEN else b


@triton.jit
def low_rank_product(
    first_t,
    t_ptr,
    t_stride,
    b_ptr,
    b_stride,
    rows,
    row_mask,
    columns,
    column_mask,
    RANK: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """[BLOCK_ROWS, BLOCK_COLUMNS] float32: entry (i, j) is t[rows[i]] · b[columns[j]].

    first_t: `load_left_factor` of these rows and first = 0, which a caller with several products loads once
    rows, columns: int64
    WIDEN: multiply in float32 where the interpreter cannot multiply the type
    """
    b = load_right_factor(b_ptr, b_stride, columns, column_mask, 0, RANK, BLOCK_RANK, WIDEN)
    product = tl.dot(first_t, b, input_precision="ieee")
    for first in range(BLOCK_RANK, RANK, BLOCK_RANK):
        t = load_left_factor(t_ptr, t_stride, rows, row_mask, first, RANK, BLOCK_RANK, WIDEN)
        b = load_right_factor(b_ptr, b_stride, columns, column_mask, first, RANK, BLOCK_RANK, WIDEN)
        product = tl.dot(t, b, product, input_precision="ieee")
    return product


def block_rank(rank: int) -> int:
    """Columns of t and b that one product takes."""
    return min(MAX_BLOCK_RANK, max(MIN_BLOCK_RANK, power_of_two(max(1, rank))))


def fitting_block_rank(rank: int, block_columns: int, element_bytes: int) -> int:
    """The same where a tile has so many columns that MAX_BLOCK_RANK of them would not fit in shared memory."""
    fitting = MAX_FACTOR_BYTES // (block_columns * element_bytes)
    return max(MIN_BLOCK_RANK, min(block_rank(rank), fitting))


def must_widen(tensor: Tensor) -> bool:
    """Whether products need float32 operands: Triton 3.6's interpreter multiplies bfloat16 as if it were integers."""
    return tensor.device.type == "cpu" and tensor.dtype == torch.bfloat16


def row_stride(rows: Tensor) -> int:
    """Elements from one row to the next of [M, N]; the elements of a row must be neighbours."""
    assert rows.stride(1) == 1 or rows.shape[1] == 1, f"the last dimension has stride {rows.stride(1)}"
    return rows.stride(0)
