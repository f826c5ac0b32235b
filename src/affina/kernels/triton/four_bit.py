"""Triton kernel of `affina.kernels.four_bit.dequantize_into`: packed 4-bit codes and their scales to a dense weight.

Legend: B quantisation blocks of one program, S numbers of a quantisation block (64), n numbers of the weight.

A weight costs half a byte to read and two (16 bits) to write, so the kernel is bound by its stores; everything else
has to stay out of their way:

- One program expands B blocks. Its codes are B · S/2 contiguous bytes and its numbers B · S contiguous elements of each
  row, so a thread reads and writes 16 bytes at once.
- The scale of a block is made once, as a vector of B entries, and broadcast over the block.
- The 16 numbers of the format's table (`codebook`) are looked up in one of three ways (`LOOKUP`), all exact:
  `gather`: the codebook is a register tensor, and `tl.gather` fetches from it: through shared memory, where 16 words
  lie in 16 different banks, so that no two threads ever wait for each other;
  `load`: an indexed load whose 64 bytes stay in the first-level cache;
  `select`: a tree of 15 selections on the bits of the code, no memory at all, but 15 instructions per number.

Equality bit for bit with the reference needs the scale d · t + m rounded after the product *and* after the sum, as two
PyTorch operations (and two kernels of bitsandbytes) round it. A fused multiply-add rounds once; the launch therefore
switches contraction off (`enable_fp_fusion=False`). The last product is float32 and rounded once more to the type of
the weight.

Numbers of blocks are 32 bits wide (their division is cheap, and 2³¹ blocks are 137 billion weights), addresses 64.
"""

# Triton has no types, and its decorator hides those of a kernel.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, misc, import-untyped, import-not-found"
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from affina.kernels.triton.launch import ceil_div, launch

NUMBERS_PER_PROGRAM = 4096
NUM_WARPS = 4
LOOKUPS = ("gather", "load", "select")
DEFAULT_LOOKUP = "gather"


@triton.jit
def _pick(bit, when_set, when_clear):
    return tl.where(bit, when_set, when_clear)


@triton.jit
def _select(codebook, index):
    """codebook[index] by halving: each bit of the index keeps one half of the table."""
    bit0 = (index & 1) != 0
    bit1 = (index & 2) != 0
    bit2 = (index & 4) != 0
    bit3 = (index & 8) != 0
    pair0 = _pick(bit0, tl.load(codebook + 1), tl.load(codebook + 0))
    pair1 = _pick(bit0, tl.load(codebook + 3), tl.load(codebook + 2))
    pair2 = _pick(bit0, tl.load(codebook + 5), tl.load(codebook + 4))
    pair3 = _pick(bit0, tl.load(codebook + 7), tl.load(codebook + 6))
    pair4 = _pick(bit0, tl.load(codebook + 9), tl.load(codebook + 8))
    pair5 = _pick(bit0, tl.load(codebook + 11), tl.load(codebook + 10))
    pair6 = _pick(bit0, tl.load(codebook + 13), tl.load(codebook + 12))
    pair7 = _pick(bit0, tl.load(codebook + 15), tl.load(codebook + 14))
    low = _pick(bit2, _pick(bit1, pair3, pair2), _pick(bit1, pair1, pair0))
    high = _pick(bit2, _pick(bit1, pair7, pair6), _pick(bit1, pair5, pair4))
    return _pick(bit3, high, low)


@triton.jit
def _look_up(codebook, index, LOOKUP: tl.constexpr):
    """The numbers of the codebook at `index` [B, S/2] int32."""
    if LOOKUP == "gather":
        table = tl.load(codebook + tl.arange(0, 16))
        flat = tl.reshape(index, [index.shape[0] * index.shape[1]])
        values = tl.reshape(tl.gather(table, flat, 0), [index.shape[0], index.shape[1]])
    elif LOOKUP == "load":
        values = tl.load(codebook + index)
    else:
        values = _select(codebook, index)
    return values


@triton.jit
def _scales(absmax, nested_absmax, nested_offset, dynamic_map, block, exists, DOUBLE: tl.constexpr):
    """[B] float32 scales of the blocks `block`."""
    stored = tl.load(absmax + block, mask=exists, other=0)
    if DOUBLE:
        group = tl.load(nested_absmax + block // 256, mask=exists, other=0.0)
        scale = tl.load(dynamic_map + stored.to(tl.int32)) * group + tl.load(nested_offset)
    else:
        scale = stored.to(tl.float32)
    return scale


@triton.jit
def _dequantize_kernel(
    codes,
    absmax,
    nested_absmax,
    nested_offset,
    dynamic_map,
    codebook,
    out,
    num_blocks,
    num_codes,
    num_elements,
    blocks_per_row,
    row_stride,
    B: tl.constexpr,
    S: tl.constexpr,
    DOUBLE: tl.constexpr,
    CONTIGUOUS: tl.constexpr,
    LOOKUP: tl.constexpr,
):
    block = tl.program_id(0) * B + tl.arange(0, B)
    exists = block < num_blocks
    scale = _scales(absmax, nested_absmax, nested_offset, dynamic_map, block, exists, DOUBLE)

    byte = block.to(tl.int64)[:, None] * (S // 2) + tl.arange(0, S // 2)[None, :]
    packed = tl.load(codes + byte, mask=byte < num_codes, other=0).to(tl.int32)
    first = _look_up(codebook, packed >> 4, LOOKUP)
    second = _look_up(codebook, packed & 15, LOOKUP)
    values = tl.interleave(first, second) * scale[:, None]

    lane = tl.arange(0, S)[None, :]
    if CONTIGUOUS:
        element = block.to(tl.int64)[:, None] * S + lane
        tl.store(out + element, values.to(out.dtype.element_ty), mask=element < num_elements)
    else:  # whole blocks, each inside one row
        start = (block // blocks_per_row).to(tl.int64) * row_stride + (block % blocks_per_row) * S
        tl.store(out + start[:, None] + lane, values.to(out.dtype.element_ty), mask=exists[:, None])


def dequantize_into(
    codes: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    dynamic_map: Tensor,
    codebook: Tensor,
    out: Tensor,
    *,
    block_size: int,
    lookup: str = DEFAULT_LOOKUP,
    numbers_per_program: int = NUMBERS_PER_PROGRAM,
    num_warps: int = NUM_WARPS,
) -> None:
    """Launches the kernel; arguments as in `affina.kernels.four_bit.FourBitTensor`, `out` [rows, columns].

    Rows of `out` may have a stride when columns are a multiple of `block_size`, else `out` must be contiguous.
    """
    rows, columns = out.shape
    contiguous = out.is_contiguous()
    assert contiguous or (columns % block_size == 0 and out.stride(1) == 1), "a block must not leave its row"
    assert lookup in LOOKUPS, f"lookup {lookup!r} is none of {LOOKUPS}"
    num_blocks = absmax.numel()
    if num_blocks == 0:
        return
    blocks_per_program = max(1, numbers_per_program // block_size)
    launch(
        _dequantize_kernel,
        (ceil_div(num_blocks, blocks_per_program),),
        codes,
        absmax,
        nested_absmax if nested_absmax is not None else absmax,
        nested_offset if nested_offset is not None else absmax,
        dynamic_map,
        codebook,
        out,
        num_blocks,
        codes.numel(),
        rows * columns,
        max(1, columns // block_size),
        out.stride(0),
        B=blocks_per_program,
        S=block_size,
        DOUBLE=nested_absmax is not None,
        CONTIGUOUS=contiguous,
        LOOKUP=lookup,
        num_warps=num_warps,
        enable_fp_fusion=False,
    )
