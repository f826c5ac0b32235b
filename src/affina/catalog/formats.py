"""Bytes of a frozen weight in each format, as models/weights stores it."""

from __future__ import annotations

from collections.abc import Sequence

from affina.catalog.fused_memory import allocated

FOUR_BIT_BLOCK = 64
"""Weights that share a scale, and below it scales that share one: kernels/four_bit.py's and double_quantization.py's.
The kernels need torch, so these numbers are stated twice; a test compares them."""
FOUR_BIT_NESTED_BLOCK = 256
FOUR_BIT_FORMATS = ("nf4", "fp4")
WEIGHT_FORMATS = ("none", "nf4", "fp4", "fp8", "int8")


def weight_tensors(
    format: str, rows: int, columns: int, *, itemsize: int = 2, double_quantization: bool = True
) -> Sequence[int]:
    """Bytes of each tensor that a [rows, columns] weight is kept in. itemsize: of a dense number

    none: one number each. nf4, fp4: half a byte, a scale of one byte per 64 weights and four bytes per 256 scales
    (arXiv 2305.14314); without double quantisation four bytes per 64. fp8, int8: a byte, and four per row.
    """
    count = rows * columns
    if format == "none":
        return (count * itemsize,)
    if format in ("fp8", "int8"):
        return (count, rows * 4)
    assert format in FOUR_BIT_FORMATS, format
    blocks = -(-count // FOUR_BIT_BLOCK)
    codes = -(-count // 2)
    if not double_quantization:
        return (codes, blocks * 4)
    return (codes, blocks, -(-blocks // FOUR_BIT_NESTED_BLOCK) * 4, 4)


def weight_bytes(format: str, rows: int, columns: int, *, itemsize: int, double_quantization: bool = True) -> int:
    """What the weight takes from PyTorch's allocator."""
    sizes = weight_tensors(format, rows, columns, itemsize=itemsize, double_quantization=double_quantization)
    return sum(allocated(size, 1) for size in sizes)
