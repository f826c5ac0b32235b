"""Triton kernels of `affina.kernels.attention`: causal attention of packed documents, forward and backward.

The formulas and their derivation stand in `affina.kernels.attention`. Legend as there: T tokens, S documents, L tokens
of one document, H query heads, G key heads, R = H / G, K head dim, w window. Here also: P query heads that share a
tile, c = scale · log₂e.

**Work list.** A grid of ⌈max_seqlen / block⌉ · S · H programs is mostly empty when documents are packed. Instead one
kernel per micro-batch turns `cu_seqlens` into a list of blocks of B tokens, each inside one document; Σ ⌈L / B⌉ ≤
⌊T / B⌋ + S, so the list has a size that the host knows without knowing the lengths. The rest is filled with empty
entries, whose programs return at once. The list is sorted by a block's rank r inside its document, highest first. A
query block with B tokens before it r times, and a key block with r blocks behind it, both have r + 1 blocks of work:
one list serves both passes, and the longest programs start first, so that the card does not wait for one of them at
the end. Position of entry (d, r), without a sort, with n_d the number of blocks of document d, is the number of blocks
of higher rank, and of those of the same rank in earlier documents:

    Σ_e max(0, n_e − r − 1)  +  #{e < d : n_e > r}

**Query heads in one tile.** The R query heads of a key head need the same keys. A tile of M rows holds P of them (the
largest power of two that divides R and leaves 16 tokens) with M / P consecutive tokens each, not M tokens of one head.
Then a row's keys end M / P tokens behind the block's first instead of M: with M = 128, N = 64 keys and P = 4 a document
of 300 tokens costs 1.4 times its triangle instead of 2.0, one of 2,048 1.05 times instead of 1.09. Only tiles on the
diagonal (or on the window's edge) are masked.

**Forward.** Online softmax in powers of two: with m the running maximum of c · q·k, p = 2^(c·q·k − m) is one fused
multiply-add and one exponential; l = Σ p, and lse = (m + log₂ l) · ln 2.

**Backward.** Two kernels, none of which adds to what another program wrote, so the result is the same bits every time.
The price is two more products than with atomics, seven in all:

    1  one query tile:  S = q kᵀ, ∂P = ∂y vᵀ over its keys;  ∂q = scale · ∂S k.  Before the loop D = ∂y · y, also kept.
    2  one key tile:    Sᵀ = k qᵀ, ∂Pᵀ = v ∂yᵀ over its queries;  ∂v = Pᵀ ∂y,  ∂k = scale · ∂Sᵀ q,  summed over all R
                        heads in registers and written once.

In 2 the scores are computed transposed: Pᵀ and ∂Sᵀ come out in the layout in which the second product takes its left
operand from registers, so that neither goes through shared memory; kᵀ, qᵀ, vᵀ and ∂yᵀ are views that the matrix unit
reads from shared memory either way.

**Tiles from memory.** On compute capability 9.0 and 10.0 a tile [tokens, heads, K] is one request to the tensor memory
accelerator, which needs neither registers for addresses nor instructions for masks: with pointers the second backward
kernel spills (255 registers and 128 bytes of stack against 252 and none). What a request reads behind a document's end
belongs to the next one; it meets weights that are exactly zero, so it has no influence unless it is not finite.
Elsewhere pointers, with row strides as compile-time constants.

Accumulators, softmax, lse and D are float32; P and ∂S are rounded to the inputs' type before their products. K is
filled up to a power of two with zeros (80 and 96 to 128). Elements read: (M + 2 · keys) · K by a query tile, twice that
in the backward pass, and 2 · (N + R · queries) · K by a key tile. Offsets of a row are 64 bits wide, inside a
tile 32, coordinates of descriptors 32: T · 2P < 2³¹.

Triton 3.6 has no code for the matrix unit below 8.0.

Rows that are in no document are not written.
"""

# Triton has no types, and its decorator hides those of a kernel.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, misc, import-untyped, import-not-found"
from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from affina.kernels.triton.launch import ceil_div, launch, power_of_two

WORDS_OF_AN_ENTRY: Final = 4
"""A work-list entry: the document's first row, its number of tokens (0: empty entry), the rank r, the document."""

_ENTRIES_OF_A_PROGRAM = 64
_DOCUMENTS_AT_ONCE = 128
_LOG2_E = math.log2(math.e)
_LN_2 = math.log(2.0)


@dataclass(frozen=True, slots=True)
class Tile:
    """One kernel's tile: rows (query heads × tokens) × keys, and how the compiler schedules it.

    descriptors: tiles come through the tensor memory accelerator (compute capability 9.0 and 10.0), else by pointers
    max_heads:   the most query heads in a tile, a power of two
    """

    rows: int
    keys: int
    num_warps: int
    num_stages: int
    descriptors: bool
    max_heads: int = 8

    def heads(self, repeats: int) -> int:
        """P: the largest power of two that divides R and leaves the tile at least 16 tokens."""
        return math.gcd(repeats, self.max_heads, max(1, self.rows // 16))

    def tokens(self, repeats: int) -> int:
        return self.rows // self.heads(repeats)


@dataclass(frozen=True, slots=True)
class Tiles:
    """The tiles of the three kernels: output; ∂q; ∂k and ∂v."""

    forward: Tile
    queries: Tile
    keys: Tile


# Rows, keys, num_warps, num_stages, descriptors. None spills (ptxas of Triton 3.6, 9.0 and 8.0, R = 4). With two stages
# a tile is asked for at the end of the step before its own: enough only where a processor has other programs to run.
_HOPPER: Final = {
    # Descriptors of head dim 64 give wrong results as Triton 3.6 compiles them (output 23% off on an H200). Pointers,
    # 8 documents of 2,048, H = 16, G = 4: 0.18, 0.20 and 0.27 ms; 64 rows forward and ∂q: 0.19 and 0.21.
    64: Tiles(Tile(128, 64, 8, 3, False), Tile(128, 64, 8, 3, False), Tile(64, 64, 4, 3, False)),
    # Two or three programs to a processor. Measured on an H200, 8 documents of 2,048, H = 32, G = 8, K = 128: 0.61 ms
    # forward and 1.74 backward (449 and 394 TFLOP/s of the usual two and five products). Twice the rows, one program
    # to a processor: 0.69 and 1.84 by pointers, 0.65 and 2.02 by descriptors. With descriptors of 128 keys what Triton
    # 3.6 compiles is wrong (44% off).
    128: Tiles(Tile(64, 64, 4, 3, True), Tile(64, 64, 4, 3, True), Tile(64, 64, 4, 2, True)),
    256: Tiles(Tile(64, 64, 4, 2, True), Tile(64, 32, 8, 2, False), Tile(32, 64, 8, 2, True)),
}
_AMPERE: Final = {
    # At most 99 KiB, so that they also run on 8.6, 8.9 and 12.0.
    64: Tiles(Tile(128, 64, 8, 2, False), Tile(64, 32, 4, 2, False), Tile(32, 64, 4, 2, False)),
    128: Tiles(Tile(128, 64, 8, 2, False), Tile(64, 64, 4, 2, False), Tile(64, 64, 8, 2, False)),
    256: Tiles(Tile(64, 32, 4, 2, False), Tile(32, 32, 4, 2, False), Tile(16, 64, 8, 2, False)),
}


def tiles_for(q: Tensor) -> Tiles:
    """The tiles for the card and the head dim."""
    tiles = _HOPPER if q.is_cuda and _has_descriptors(q.device) else _AMPERE
    return tiles[min(width for width in tiles if q.shape[2] <= width)]


@lru_cache(maxsize=8)
def _has_descriptors(device: torch.device) -> bool:
    """Whether the card has a tensor memory accelerator and 227 KiB of shared memory for a program: 9.0, 10.0, 10.3."""
    return torch.cuda.get_device_capability(device)[0] in (9, 10)


# ------------------------------------------------------------------------------------------------ work list


@triton.jit(do_not_specialize=["num_documents", "num_entries"])
def _work_list_kernel(
    cu_seqlens, work, num_documents, num_entries, BLOCK: tl.constexpr, ENTRIES: tl.constexpr, DOCUMENTS: tl.constexpr
):
    """Entry i in the order of documents goes to its place in the order of ranks (module docstring)."""
    entry = tl.program_id(0) * ENTRIES + tl.arange(0, ENTRIES)
    lane = tl.arange(0, DOCUMENTS)

    # The document of entry i is the number of documents whose blocks all lie before i.
    document = tl.zeros([ENTRIES], dtype=tl.int32)
    before = tl.zeros([ENTRIES], dtype=tl.int32)  # blocks of those documents
    seen = 0
    for first in range(0, num_documents, DOCUMENTS):
        exists = first + lane < num_documents
        start = tl.load(cu_seqlens + first + lane, mask=exists, other=0)
        end = tl.load(cu_seqlens + first + lane + 1, mask=exists, other=0)
        count = (end - start + BLOCK - 1) // BLOCK
        last = seen + tl.cumsum(count, 0)
        passed = (last[None, :] <= entry[:, None]) & exists[None, :]
        document += tl.sum(passed.to(tl.int32), 1)
        before = tl.maximum(before, tl.max(tl.where(passed, last[None, :], 0), 1))
        seen += tl.sum(count, 0)

    is_real = entry < seen
    rank = entry - before
    place = tl.zeros([ENTRIES], dtype=tl.int32)
    for first in range(0, num_documents, DOCUMENTS):
        exists = first + lane < num_documents
        start = tl.load(cu_seqlens + first + lane, mask=exists, other=0)
        end = tl.load(cu_seqlens + first + lane + 1, mask=exists, other=0)
        count = (end - start + BLOCK - 1) // BLOCK
        higher = tl.maximum(count[None, :] - rank[:, None] - 1, 0)
        earlier = ((first + lane)[None, :] < document[:, None]) & (count[None, :] > rank[:, None])
        place += tl.sum(higher + earlier.to(tl.int32), 1)

    start = tl.load(cu_seqlens + document, mask=is_real, other=0)
    end = tl.load(cu_seqlens + document + 1, mask=is_real, other=0)
    target = work + tl.where(is_real, place, entry) * 4
    exists = entry < num_entries
    tl.store(target, start, mask=exists)
    tl.store(target + 1, end - start, mask=exists)
    tl.store(target + 2, tl.where(is_real, rank, 0), mask=exists)
    tl.store(target + 3, tl.where(is_real, document, -1), mask=exists)


def work_list(cu_seqlens: Tensor, num_tokens: int, block: int) -> Tensor:
    """[⌊T / block⌋ + S, 4] int32: the blocks of the documents, most work first. Never waits for the device."""
    num_documents = cu_seqlens.shape[0] - 1
    num_entries = num_tokens // block + min(num_documents, num_tokens)
    work = torch.empty(num_entries, WORDS_OF_AN_ENTRY, dtype=torch.int32, device=cu_seqlens.device)
    launch(
        _work_list_kernel,
        (ceil_div(num_entries, _ENTRIES_OF_A_PROGRAM),),
        cu_seqlens,
        work,
        num_documents,
        num_entries,
        BLOCK=block,
        ENTRIES=_ENTRIES_OF_A_PROGRAM,
        DOCUMENTS=_DOCUMENTS_AT_ONCE,
        num_warps=4,
    )
    return work


# ------------------------------------------------------------------------------------------------ parts of the kernels


@triton.jit
def _exp2(x, APPROXIMATE: tl.constexpr):
    """2^x. The instruction alone, without the four around it that save results below 2⁻¹²⁶ from becoming 0."""
    if APPROXIMATE:
        power = tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)
    else:
        power = tl.exp2(x)
    return power


@triton.jit
def _offsets(STRIDE: tl.constexpr, K: tl.constexpr, PADDED_K: tl.constexpr, ROWS: tl.constexpr, HEADS: tl.constexpr):
    """[ROWS, PADDED_K] offsets of a tile from its first token's first head."""
    row = tl.arange(0, ROWS)
    return ((row // HEADS) * STRIDE + (row % HEADS) * K)[:, None] + tl.arange(0, PADDED_K)[None, :]


@triton.jit
def _mask(num_tokens, K: tl.constexpr, PADDED_K: tl.constexpr, ROWS: tl.constexpr, HEADS: tl.constexpr):
    """Which elements of a tile are real when it holds so many tokens."""
    exists = (tl.arange(0, ROWS) // HEADS < num_tokens)[:, None]
    if K != PADDED_K:
        exists = exists & (tl.arange(0, PADDED_K) < K)[None, :]
    return exists


@triton.jit
def _load_tile(
    source,
    token,
    end,
    head,
    STRIDE: tl.constexpr,
    K: tl.constexpr,
    PADDED_K: tl.constexpr,
    ROWS: tl.constexpr,
    HEADS: tl.constexpr,
    IS_DESCRIPTOR: tl.constexpr,
):
    """[ROWS, PADDED_K] of [T, heads, K]: HEADS heads from `head` on of the tokens from `token` on.

    Behind `end`, where the document ends, a pointer gives zeros and a descriptor other documents' numbers.
    """
    if IS_DESCRIPTOR:
        tile = tl.reshape(source.load([token, head, 0]), [ROWS, PADDED_K])
    else:
        pointers = source + token.to(tl.int64) * STRIDE + head * K + _offsets(STRIDE, K, PADDED_K, ROWS, HEADS)
        tile = tl.load(pointers, mask=_mask(end - token, K, PADDED_K, ROWS, HEADS), other=0.0)
    return tile


@triton.jit
def _store_tile(
    target,
    values,
    token,
    end,
    head,
    STRIDE: tl.constexpr,
    K: tl.constexpr,
    PADDED_K: tl.constexpr,
    ROWS: tl.constexpr,
    HEADS: tl.constexpr,
):
    pointers = target + token.to(tl.int64) * STRIDE + head * K + _offsets(STRIDE, K, PADDED_K, ROWS, HEADS)
    tl.store(pointers, values.to(target.dtype.element_ty), mask=_mask(end - token, K, PADDED_K, ROWS, HEADS))


@triton.jit
def _load_statistics(
    source, part, token, end, stride, ROWS: tl.constexpr, HEADS: tl.constexpr, IS_DESCRIPTOR: tl.constexpr
):
    """[ROWS] log₂ lse and [ROWS] −D of a tile, from [H / HEADS, T, HEADS, 2]."""
    if IS_DESCRIPTOR:
        pairs = source.load([part, token * (2 * HEADS)])
    else:
        lane = tl.arange(0, 2 * ROWS)
        exists = lane // (2 * HEADS) < end - token
        pairs = tl.load(source + part.to(tl.int64) * stride + token * (2 * HEADS) + lane, mask=exists, other=0.0)
    return tl.split(tl.reshape(pairs, [ROWS, 2]))


@triton.jit
def _first_key(first, KEYS: tl.constexpr, WINDOW: tl.constexpr):
    """Where the keys begin that the queries from `first` on see, at a multiple of KEYS."""
    key = 0
    if WINDOW != 0:
        key = tl.maximum(first - WINDOW + 1, 0) // KEYS * KEYS
    return key


@triton.jit
def _is_partly_hidden(first_query, last_query, first_key, last_key, WINDOW: tl.constexpr):
    """Whether some of these queries do not see some of these keys."""
    hidden = last_key > first_query
    if WINDOW != 0:
        hidden = hidden | (last_query - first_key >= WINDOW)
    return hidden


@triton.jit
def _is_visible(query, key, WINDOW: tl.constexpr):
    visible = key <= query
    if WINDOW != 0:
        visible = visible & (query - key < WINDOW)
    return visible


# ------------------------------------------------------------------------------------------------ forward


@triton.jit
def _forward_kernel(
    q,
    k,
    v,
    output,
    lse,
    work,
    log2_scale,
    Q_STRIDE: tl.constexpr,
    K_STRIDE: tl.constexpr,
    V_STRIDE: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    REPEATS: tl.constexpr,
    HEADS: tl.constexpr,
    K: tl.constexpr,
    PADDED_K: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    WINDOW: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    APPROXIMATE: tl.constexpr,
):
    PARTS: tl.constexpr = NUM_HEADS // HEADS
    TOKENS: tl.constexpr = ROWS // HEADS
    entry = work + (tl.program_id(0) // PARTS) * 4
    head = (tl.program_id(0) % PARTS) * HEADS
    start = tl.load(entry)
    length = tl.load(entry + 1)
    if length == 0:
        return
    first = tl.load(entry + 2) * TOKENS
    end = start + length
    group = head // REPEATS

    q_tile = _load_tile(q, start + first, end, head, Q_STRIDE, K, PADDED_K, ROWS, HEADS, DESCRIPTORS)
    maximum = tl.full([ROWS], -1e30, dtype=tl.float32)  # finite: a row may see none of its first tile's keys
    total = tl.zeros([ROWS], dtype=tl.float32)
    sums = tl.zeros([ROWS, PADDED_K], dtype=tl.float32)
    for position in range(_first_key(first, KEYS, WINDOW), tl.minimum(first + TOKENS, length), KEYS):
        k_tile = _load_tile(k, start + position, end, group, K_STRIDE, K, PADDED_K, KEYS, 1, DESCRIPTORS)
        v_tile = _load_tile(v, start + position, end, group, V_STRIDE, K, PADDED_K, KEYS, 1, DESCRIPTORS)
        scores = tl.dot(q_tile, tl.trans(k_tile))
        if _is_partly_hidden(first, first + TOKENS - 1, position, position + KEYS - 1, WINDOW):
            query = (first + tl.arange(0, ROWS) // HEADS)[:, None]
            key = (position + tl.arange(0, KEYS))[None, :]
            scores = tl.where(_is_visible(query, key, WINDOW), scores, float("-inf"))
        highest = tl.maximum(maximum, tl.max(scores, 1) * log2_scale)
        weights = _exp2(scores * log2_scale - highest[:, None], APPROXIMATE)
        shrink = _exp2(maximum - highest, APPROXIMATE)
        total = total * shrink + tl.sum(weights, 1)
        sums = sums * shrink[:, None]
        sums = tl.dot(weights.to(v_tile.dtype), v_tile, sums)
        maximum = highest

    row = tl.arange(0, ROWS)
    row_lse = (maximum + tl.log2(total)) * 0.6931471805599453
    in_lse = (start + first).to(tl.int64) * NUM_HEADS + head + (row // HEADS) * NUM_HEADS + row % HEADS
    tl.store(lse + in_lse, row_lse, mask=first + row // HEADS < length)
    sums = sums * (1.0 / total)[:, None]
    _store_tile(output, sums, start + first, end, head, NUM_HEADS * K, K, PADDED_K, ROWS, HEADS)


# ------------------------------------------------------------------------------------------------ backward


@triton.jit(do_not_specialize=["statistics_stride"])
def _grad_q_kernel(
    q,
    k,
    v,
    output,
    grad_output,
    lse,
    statistics,
    grad_q,
    work,
    statistics_stride,
    scale,
    log2_scale,
    Q_STRIDE: tl.constexpr,
    K_STRIDE: tl.constexpr,
    V_STRIDE: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    REPEATS: tl.constexpr,
    HEADS: tl.constexpr,
    KEY_HEADS: tl.constexpr,
    K: tl.constexpr,
    PADDED_K: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    WINDOW: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    APPROXIMATE: tl.constexpr,
):
    PARTS: tl.constexpr = NUM_HEADS // HEADS
    TOKENS: tl.constexpr = ROWS // HEADS
    STRIDE: tl.constexpr = NUM_HEADS * K  # of output and both gradients
    entry = work + (tl.program_id(0) // PARTS) * 4
    head = (tl.program_id(0) % PARTS) * HEADS
    start = tl.load(entry)
    length = tl.load(entry + 1)
    if length == 0:
        return
    first = tl.load(entry + 2) * TOKENS
    end = start + length
    group = head // REPEATS

    q_tile = _load_tile(q, start + first, end, head, Q_STRIDE, K, PADDED_K, ROWS, HEADS, DESCRIPTORS)
    g_tile = _load_tile(grad_output, start + first, end, head, STRIDE, K, PADDED_K, ROWS, HEADS, DESCRIPTORS)
    y_tile = _load_tile(output, start + first, end, head, STRIDE, K, PADDED_K, ROWS, HEADS, False)
    row = tl.arange(0, ROWS)
    row_head = head + row % HEADS
    row_exists = first + row // HEADS < length
    row_token = (start + first).to(tl.int64) + row // HEADS
    negative_delta = -tl.sum(g_tile.to(tl.float32) * y_tile.to(tl.float32), 1)
    row_lse = tl.load(lse + row_token * NUM_HEADS + row_head, mask=row_exists, other=0.0) * 1.4426950408889634
    part, part_head = (row_head // KEY_HEADS).to(tl.int64), row_head % KEY_HEADS
    pair = statistics + part * statistics_stride + (row_token * KEY_HEADS + part_head) * 2
    tl.store(pair, row_lse, mask=row_exists)
    tl.store(pair + 1, negative_delta, mask=row_exists)

    sums = tl.zeros([ROWS, PADDED_K], dtype=tl.float32)
    for position in range(_first_key(first, KEYS, WINDOW), tl.minimum(first + TOKENS, length), KEYS):
        k_tile = _load_tile(k, start + position, end, group, K_STRIDE, K, PADDED_K, KEYS, 1, DESCRIPTORS)
        v_tile = _load_tile(v, start + position, end, group, V_STRIDE, K, PADDED_K, KEYS, 1, DESCRIPTORS)
        weights = _exp2(tl.dot(q_tile, tl.trans(k_tile)) * log2_scale - row_lse[:, None], APPROXIMATE)
        if _is_partly_hidden(first, first + TOKENS - 1, position, position + KEYS - 1, WINDOW):
            query = (first + tl.arange(0, ROWS) // HEADS)[:, None]
            key = (position + tl.arange(0, KEYS))[None, :]
            weights = tl.where(_is_visible(query, key, WINDOW), weights, 0.0)
        grad_scores = weights * (tl.dot(g_tile, tl.trans(v_tile)) + negative_delta[:, None])
        sums = tl.dot(grad_scores.to(k_tile.dtype), k_tile, sums)

    _store_tile(grad_q, sums * scale, start + first, end, head, STRIDE, K, PADDED_K, ROWS, HEADS)


@triton.jit(do_not_specialize=["statistics_stride"])
def _grad_kv_kernel(
    q,
    k,
    v,
    grad_output,
    statistics,
    grad_k,
    grad_v,
    work,
    statistics_stride,
    scale,
    log2_scale,
    Q_STRIDE: tl.constexpr,
    K_STRIDE: tl.constexpr,
    V_STRIDE: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    REPEATS: tl.constexpr,
    HEADS: tl.constexpr,
    K: tl.constexpr,
    PADDED_K: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    WINDOW: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    APPROXIMATE: tl.constexpr,
):
    GROUPS: tl.constexpr = NUM_HEADS // REPEATS
    PARTS: tl.constexpr = REPEATS // HEADS
    TOKENS: tl.constexpr = ROWS // HEADS
    G_STRIDE: tl.constexpr = NUM_HEADS * K
    # Requests of Triton 3.6 for a tile that begins at no multiple of 16 bytes end in an illegal instruction.
    DESCRIBED: tl.constexpr = DESCRIPTORS and HEADS > 1
    entry = work + (tl.program_id(0) // GROUPS) * 4
    group = tl.program_id(0) % GROUPS
    start = tl.load(entry)
    length = tl.load(entry + 1)
    if length == 0:
        return
    first = (tl.cdiv(length, KEYS) - 1 - tl.load(entry + 2)) * KEYS  # the rank counts from the end
    end = start + length

    # By pointers: the compiler leaves them in shared memory, while tiles of descriptors would fill 64 registers.
    k_tile = _load_tile(k, start + first, end, group, K_STRIDE, K, PADDED_K, KEYS, 1, False)
    v_tile = _load_tile(v, start + first, end, group, V_STRIDE, K, PADDED_K, KEYS, 1, False)
    last = length
    if WINDOW != 0:
        last = tl.minimum(length, first + KEYS + WINDOW - 1)
    num_steps = tl.cdiv(last - first, TOKENS)
    k_sums = tl.zeros([KEYS, PADDED_K], dtype=tl.float32)
    v_sums = tl.zeros([KEYS, PADDED_K], dtype=tl.float32)
    for step in range(num_steps * PARTS):  # one loop over tokens and parts of the heads keeps one pipeline full
        part = 0 if PARTS == 1 else step // num_steps
        position = first + (step - part * num_steps) * TOKENS
        head = group * REPEATS + part * HEADS
        q_tile = _load_tile(q, start + position, end, head, Q_STRIDE, K, PADDED_K, ROWS, HEADS, DESCRIPTORS)
        g_tile = _load_tile(grad_output, start + position, end, head, G_STRIDE, K, PADDED_K, ROWS, HEADS, DESCRIPTORS)
        log2_lse, negative_delta = _load_statistics(
            statistics, group * PARTS + part, start + position, end, statistics_stride, ROWS, HEADS, DESCRIBED
        )
        weights = _exp2(tl.dot(k_tile, tl.trans(q_tile)) * log2_scale - log2_lse[None, :], APPROXIMATE)
        hidden = _is_partly_hidden(position, position + TOKENS - 1, first, first + KEYS - 1, WINDOW)
        if hidden | (position + TOKENS > length):
            query = (position + tl.arange(0, ROWS) // HEADS)[None, :]
            key = (first + tl.arange(0, KEYS))[:, None]
            weights = tl.where(_is_visible(query, key, WINDOW) & (query < length), weights, 0.0)
        v_sums = tl.dot(weights.to(g_tile.dtype), g_tile, v_sums)
        grad_scores = weights * (tl.dot(v_tile, tl.trans(g_tile)) + negative_delta[None, :])
        k_sums = tl.dot(grad_scores.to(q_tile.dtype), q_tile, k_sums)

    _store_tile(grad_v, v_sums, start + first, end, group, GROUPS * K, K, PADDED_K, KEYS, 1)
    _store_tile(grad_k, k_sums * scale, start + first, end, group, GROUPS * K, K, PADDED_K, KEYS, 1)


# ------------------------------------------------------------------------------------------------ launches


@dataclass(frozen=True, slots=True)
class _Launch:
    """What the three launches have in common."""

    q: Tensor
    k: Tensor
    v: Tensor
    window: int | None

    @property
    def repeats(self) -> int:
        return self.q.shape[1] // self.k.shape[1]

    def padded_width(self) -> int:
        return max(16, power_of_two(self.q.shape[2]))

    def queries(self, tensor: Tensor, tile: Tile) -> Tensor | TensorDescriptor:
        """[T, H, K] as the kernels read it: P heads of M / P tokens at once."""
        heads = tile.heads(self.repeats)
        return self._source(tensor, tile, (tile.rows // heads, heads))

    def keys(self, tensor: Tensor, tile: Tile) -> Tensor | TensorDescriptor:
        """[T, G, K] as the kernels read it: one head of N tokens at once."""
        return self._source(tensor, tile, (tile.keys, 1))

    def _source(self, tensor: Tensor, tile: Tile, block: tuple[int, int]) -> Tensor | TensorDescriptor:
        if not tile.descriptors:
            return tensor
        strides = [tensor.stride(0), tensor.shape[2], 1]
        return TensorDescriptor(tensor, list(tensor.shape), strides, [*block, self.padded_width()])

    def constants(self, tile: Tile) -> dict[str, int]:
        _, num_heads, width = self.q.shape
        return {
            "Q_STRIDE": self.q.stride(0),
            "K_STRIDE": self.k.stride(0),
            "V_STRIDE": self.v.stride(0),
            "NUM_HEADS": num_heads,
            "REPEATS": self.repeats,
            "HEADS": tile.heads(self.repeats),
            "K": width,
            "PADDED_K": self.padded_width(),
            "ROWS": tile.rows,
            "KEYS": tile.keys,
            "WINDOW": self.window or 0,
            "DESCRIPTORS": tile.descriptors,
            "APPROXIMATE": self.q.is_cuda,
            "num_warps": tile.num_warps,
            "num_stages": tile.num_stages,
        }


def forward(
    q: Tensor, k: Tensor, v: Tensor, work: Tensor, *, scale: float, window: int | None, tile: Tile
) -> tuple[Tensor, Tensor]:
    """[T, H, K] output and [T, H] float32 log-sum-exp; `work` in blocks of `tile.tokens(R)` tokens."""
    num_tokens, num_heads, _ = q.shape
    shared = _Launch(q, k, v, window)
    output = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(num_tokens, num_heads, dtype=torch.float32, device=q.device)
    launch(
        _forward_kernel,
        (work.shape[0] * (num_heads // tile.heads(shared.repeats)),),
        shared.queries(q, tile),
        shared.keys(k, tile),
        shared.keys(v, tile),
        output,
        lse,
        work,
        scale * _LOG2_E,
        **shared.constants(tile),
    )
    return output, lse


def backward_queries(
    grad_output: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    output: Tensor,
    lse: Tensor,
    work: Tensor,
    *,
    scale: float,
    window: int | None,
    tile: Tile,
    key_heads: int,
) -> tuple[Tensor, Tensor]:
    """∂q [T, H, K] contiguous, and what `backward_keys` needs to know of each row (`_new_statistics`).

    grad_output, output: [T, H, K] contiguous
    work:                in blocks of `tile.tokens(R)` tokens
    key_heads:           P of the tile of `backward_keys`
    """
    shared = _Launch(q, k, v, window)
    grad_q = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    statistics = _new_statistics(q, key_heads)
    launch(
        _grad_q_kernel,
        (work.shape[0] * (q.shape[1] // tile.heads(shared.repeats)),),
        shared.queries(q, tile),
        shared.keys(k, tile),
        shared.keys(v, tile),
        output,
        shared.queries(grad_output, tile),
        lse,
        statistics,
        grad_q,
        work,
        statistics.stride(0),
        scale,
        scale * _LOG2_E,
        KEY_HEADS=key_heads,
        **shared.constants(tile),
    )
    return grad_q, statistics


def backward_keys(
    grad_output: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    statistics: Tensor,
    work: Tensor,
    *,
    scale: float,
    window: int | None,
    tile: Tile,
) -> tuple[Tensor, Tensor]:
    """∂k and ∂v [T, G, K], contiguous; `work` in blocks of `tile.keys` tokens."""
    shared = _Launch(q, k, v, window)
    grad_k, grad_v = (torch.empty(k.shape, dtype=k.dtype, device=k.device) for _ in range(2))
    launch(
        _grad_kv_kernel,
        (work.shape[0] * k.shape[1],),
        shared.queries(q, tile),
        k,
        v,
        shared.queries(grad_output, tile),
        _described(statistics, tile) if tile.descriptors and tile.heads(shared.repeats) > 1 else statistics,
        grad_k,
        grad_v,
        work,
        statistics.stride(0),
        scale,
        scale * _LOG2_E,
        **shared.constants(tile),
    )
    return grad_k, grad_v


def _described(statistics: Tensor, tile: Tile) -> TensorDescriptor:
    """One request gets what `backward_keys` needs of a tile's rows."""
    return TensorDescriptor.from_tensor(statistics, [1, 2 * tile.rows])


def _new_statistics(q: Tensor, heads: int) -> Tensor:
    """[H / P, T · P · 2] float32: log₂ lse and −D of P heads next to each other; rows at multiples of 16 bytes."""
    num_tokens, num_heads, _ = q.shape
    padded = torch.empty(num_heads // heads, (num_tokens + 1) // 2 * heads * 4, dtype=torch.float32, device=q.device)
    return padded[:, : num_tokens * heads * 2]
