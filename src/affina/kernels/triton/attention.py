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
the end. Position of entry (d, r), without a sort, with n_d the number of blocks of document d:

    Σ_e max(0, n_e − r − 1)  +  #{e < d : n_e > r}        blocks of higher rank, and of the same rank in earlier documents

**Query heads in one tile.** The R query heads of a key head need the same keys. A tile of M rows holds P of them (the
largest power of two that divides R and leaves 16 tokens) with M / P consecutive tokens each, not M tokens of one head.
Per row a tile computes about M / 2P + N / 2 products behind the diagonal, N the keys of a tile: with M = 128, N = 64,
P = 4 a document of 300 tokens costs 1.4 times its triangle instead of 2.0, one of 2,048 1.05 instead of 1.09. Only tiles
on the diagonal (or on the window's edge) are masked.

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

Accumulators, softmax, lse and D are float32; P and ∂S are rounded to the inputs' type before their products. Tiles are
read once per program: forward M / P tokens cost (M + 2 · keys) · K elements. Padding: K is filled up to a power of two with zeros
(80 and 96 to 128). Row strides are compile-time constants, so that the addresses of a tile are one register and
constants; offsets of a row are 64 bits, inside a tile 32.

Rows that are in no document are not written.
"""

# Triton has no types, and its decorator hides those of a kernel.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, misc, import-untyped, import-not-found"
from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor

WORDS_OF_AN_ENTRY: Final = 4
"""A work-list entry: the document's first row, its number of tokens (0: empty entry), the rank r, the document."""

_ENTRIES_OF_A_PROGRAM = 64
_DOCUMENTS_AT_ONCE = 128
_LOG2_E = math.log2(math.e)
_LN_2 = math.log(2.0)


@dataclass(frozen=True, slots=True)
class Tile:
    """One kernel's tile: rows (query heads × tokens) × keys, and how the compiler schedules it."""

    rows: int
    keys: int
    num_warps: int
    num_stages: int
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


# ------------------------------------------------------------------------------------------------ work list


@triton.jit
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
    _work_list_kernel[(triton.cdiv(num_entries, _ENTRIES_OF_A_PROGRAM),)](
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
        return tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)
    return tl.exp2(x)


@triton.jit
def _load_tile(pointers, rows_exist, columns, K: tl.constexpr):
    """A tile with zeros where there is no row and, if K is no power of two, no column."""
    if columns.shape[1] == K:
        return tl.load(pointers, mask=rows_exist[:, None], other=0.0)
    return tl.load(pointers, mask=rows_exist[:, None] & (columns < K), other=0.0)


@triton.jit
def _store_tile(pointers, values, rows_exist, columns, K: tl.constexpr):
    if columns.shape[1] == K:
        tl.store(pointers, values, mask=rows_exist[:, None])
    else:
        tl.store(pointers, values, mask=rows_exist[:, None] & (columns < K))


@triton.jit
def _first_key(first, KEYS: tl.constexpr, WINDOW: tl.constexpr):
    """Where the keys begin that the queries from `first` on see, at a multiple of KEYS."""
    if WINDOW == 0:
        return 0
    return tl.maximum(first - WINDOW + 1, 0) // KEYS * KEYS


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


@triton.jit
def _statistics(head, token, num_rows, HEADS: tl.constexpr):
    """Where a row's log-sum-exp and D lie between the two backward kernels: [H / P, rows, P], P heads of a key tile.

    The numbers of a tile of the second kernel are contiguous.
    """
    return ((head // HEADS).to(tl.int64) * num_rows + token) * HEADS + head % HEADS


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

    row_head = tl.arange(0, ROWS) % HEADS
    row_token = tl.arange(0, ROWS) // HEADS
    query = first + row_token
    row_exists = query < length
    column = tl.arange(0, PADDED_K)[None, :]
    lane = tl.arange(0, KEYS)
    row_offset = (start + first).to(tl.int64)
    q_tile = _load_tile(
        q + row_offset * Q_STRIDE + head * K + (row_token * Q_STRIDE + row_head * K)[:, None] + column,
        row_exists,
        column,
        K,
    )
    k_rows = k + start.to(tl.int64) * K_STRIDE + (head // REPEATS) * K
    v_rows = v + start.to(tl.int64) * V_STRIDE + (head // REPEATS) * K

    maximum = tl.full([ROWS], -1e30, dtype=tl.float32)  # finite: a row may see none of its first tile's keys
    total = tl.zeros([ROWS], dtype=tl.float32)
    sums = tl.zeros([ROWS, PADDED_K], dtype=tl.float32)
    last = tl.minimum(first + TOKENS, length)
    for position in range(_first_key(first, KEYS, WINDOW), last, KEYS):
        key = position + lane
        k_tile = _load_tile(
            k_rows + position.to(tl.int64) * K_STRIDE + lane[:, None] * K_STRIDE + column, key < length, column, K
        )
        v_tile = _load_tile(
            v_rows + position.to(tl.int64) * V_STRIDE + lane[:, None] * V_STRIDE + column, key < length, column, K
        )
        scores = tl.dot(q_tile, tl.trans(k_tile))
        if _is_partly_hidden(first, first + TOKENS - 1, position, position + KEYS - 1, WINDOW):
            scores = tl.where(_is_visible(query[:, None], key[None, :], WINDOW), scores, float("-inf"))
        highest = tl.maximum(maximum, tl.max(scores, 1) * log2_scale)
        weights = _exp2(scores * log2_scale - highest[:, None], APPROXIMATE)
        shrink = _exp2(maximum - highest, APPROXIMATE)
        total = total * shrink + tl.sum(weights, 1)
        sums = sums * shrink[:, None]
        sums = tl.dot(weights.to(v_tile.dtype), v_tile, sums)
        maximum = highest

    sums = sums * (1.0 / total)[:, None]
    row_lse = (maximum + tl.log2(total)) * 0.6931471805599453
    tl.store(lse + row_offset * NUM_HEADS + head + row_token * NUM_HEADS + row_head, row_lse, mask=row_exists)
    _store_tile(
        output
        + row_offset * (NUM_HEADS * K)
        + head * K
        + (row_token * (NUM_HEADS * K) + row_head * K)[:, None]
        + column,
        sums.to(output.dtype.element_ty),
        row_exists,
        column,
        K,
    )


# ------------------------------------------------------------------------------------------------ backward


@triton.jit
def _grad_q_kernel(
    q,
    k,
    v,
    output,
    grad_output,
    lse,
    log2_lse,
    delta,
    grad_q,
    work,
    num_rows,
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

    row_head = tl.arange(0, ROWS) % HEADS
    row_token = tl.arange(0, ROWS) // HEADS
    query = first + row_token
    row_exists = query < length
    column = tl.arange(0, PADDED_K)[None, :]
    lane = tl.arange(0, KEYS)
    row_offset = (start + first).to(tl.int64)
    offset = row_offset * STRIDE + head * K
    in_tile = (row_token * STRIDE + row_head * K)[:, None] + column
    q_tile = _load_tile(
        q + row_offset * Q_STRIDE + head * K + (row_token * Q_STRIDE + row_head * K)[:, None] + column,
        row_exists,
        column,
        K,
    )
    g_tile = _load_tile(grad_output + offset + in_tile, row_exists, column, K)
    y_tile = _load_tile(output + offset + in_tile, row_exists, column, K)
    row_delta = tl.sum(g_tile.to(tl.float32) * y_tile.to(tl.float32), 1)
    in_lse = row_offset * NUM_HEADS + head + row_token * NUM_HEADS + row_head
    row_lse = tl.load(lse + in_lse, mask=row_exists, other=0.0) * 1.4426950408889634
    place = _statistics(head + row_head, row_offset + row_token, num_rows, KEY_HEADS)
    tl.store(delta + place, row_delta, mask=row_exists)
    tl.store(log2_lse + place, row_lse, mask=row_exists)
    k_rows = k + start.to(tl.int64) * K_STRIDE + (head // REPEATS) * K
    v_rows = v + start.to(tl.int64) * V_STRIDE + (head // REPEATS) * K

    sums = tl.zeros([ROWS, PADDED_K], dtype=tl.float32)
    last = tl.minimum(first + TOKENS, length)
    for position in range(_first_key(first, KEYS, WINDOW), last, KEYS):
        key = position + lane
        k_tile = _load_tile(
            k_rows + position.to(tl.int64) * K_STRIDE + lane[:, None] * K_STRIDE + column, key < length, column, K
        )
        v_tile = _load_tile(
            v_rows + position.to(tl.int64) * V_STRIDE + lane[:, None] * V_STRIDE + column, key < length, column, K
        )
        weights = _exp2(tl.dot(q_tile, tl.trans(k_tile)) * log2_scale - row_lse[:, None], APPROXIMATE)
        if _is_partly_hidden(first, first + TOKENS - 1, position, position + KEYS - 1, WINDOW):
            weights = tl.where(_is_visible(query[:, None], key[None, :], WINDOW), weights, 0.0)
        grad_scores = weights * (tl.dot(g_tile, tl.trans(v_tile)) - row_delta[:, None])
        sums = tl.dot(grad_scores.to(k_tile.dtype), k_tile, sums)

    _store_tile(grad_q + offset + in_tile, (sums * scale).to(grad_q.dtype.element_ty), row_exists, column, K)


@triton.jit
def _grad_kv_kernel(
    q,
    k,
    v,
    grad_output,
    log2_lse,
    delta,
    grad_k,
    grad_v,
    work,
    num_rows,
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
    APPROXIMATE: tl.constexpr,
):
    GROUPS: tl.constexpr = NUM_HEADS // REPEATS
    PARTS: tl.constexpr = REPEATS // HEADS
    TOKENS: tl.constexpr = ROWS // HEADS
    G_STRIDE: tl.constexpr = NUM_HEADS * K
    entry = work + (tl.program_id(0) // GROUPS) * 4
    group = tl.program_id(0) % GROUPS
    start = tl.load(entry)
    length = tl.load(entry + 1)
    if length == 0:
        return
    first = (tl.cdiv(length, KEYS) - 1 - tl.load(entry + 2)) * KEYS  # the rank counts from the end

    lane = tl.arange(0, KEYS)
    key = first + lane
    key_exists = key < length
    column = tl.arange(0, PADDED_K)[None, :]
    row_offset = (start + first).to(tl.int64)
    k_tile = _load_tile(
        k + row_offset * K_STRIDE + group * K + lane[:, None] * K_STRIDE + column, key_exists, column, K
    )
    v_tile = _load_tile(
        v + row_offset * V_STRIDE + group * K + lane[:, None] * V_STRIDE + column, key_exists, column, K
    )
    row = tl.arange(0, ROWS)
    row_head = row % HEADS
    row_token = row // HEADS
    in_q_tile = (row_token * Q_STRIDE + row_head * K)[:, None] + column
    in_g_tile = (row_token * G_STRIDE + row_head * K)[:, None] + column
    head = group * REPEATS
    q_rows = q + row_offset * Q_STRIDE + head * K
    g_rows = grad_output + row_offset * G_STRIDE + head * K

    last = length
    if WINDOW != 0:
        last = tl.minimum(length, first + KEYS + WINDOW - 1)
    num_steps = tl.cdiv(last - first, TOKENS)
    k_sums = tl.zeros([KEYS, PADDED_K], dtype=tl.float32)
    v_sums = tl.zeros([KEYS, PADDED_K], dtype=tl.float32)
    for step in range(num_steps * PARTS):  # one loop over tokens and parts of the heads keeps one pipeline full
        part = 0 if PARTS == 1 else step // num_steps
        position = (step - part * num_steps) * TOKENS  # from the first key on
        query = first + position + row_token
        row_exists = query < length
        q_tile = _load_tile(
            q_rows + position.to(tl.int64) * Q_STRIDE + part * (HEADS * K) + in_q_tile, row_exists, column, K
        )
        g_tile = _load_tile(
            g_rows + position.to(tl.int64) * G_STRIDE + part * (HEADS * K) + in_g_tile, row_exists, column, K
        )
        place = _statistics(head + part * HEADS, row_offset + position, num_rows, HEADS)
        row_lse = tl.load(log2_lse + place + row)  # behind the row's end there is room, behind a document's no meaning
        row_delta = tl.load(delta + place + row)
        weights = _exp2(tl.dot(k_tile, tl.trans(q_tile)) * log2_scale - row_lse[None, :], APPROXIMATE)
        hidden = _is_partly_hidden(first + position, first + position + TOKENS - 1, first, first + KEYS - 1, WINDOW)
        if hidden | (first + position + TOKENS > length):
            visible = _is_visible(query[None, :], key[:, None], WINDOW) & row_exists[None, :]
            weights = tl.where(visible, weights, 0.0)
        v_sums = tl.dot(weights.to(g_tile.dtype), g_tile, v_sums)
        grad_scores = weights * (tl.dot(v_tile, tl.trans(g_tile)) - row_delta[None, :])
        k_sums = tl.dot(grad_scores.to(q_tile.dtype), q_tile, k_sums)

    target = row_offset * (GROUPS * K) + group * K + lane[:, None] * (GROUPS * K) + column
    _store_tile(grad_v + target, v_sums.to(grad_v.dtype.element_ty), key_exists, column, K)
    _store_tile(grad_k + target, (k_sums * scale).to(grad_k.dtype.element_ty), key_exists, column, K)


# ------------------------------------------------------------------------------------------------ launches


def forward(
    q: Tensor, k: Tensor, v: Tensor, work: Tensor, *, scale: float, window: int | None, tile: Tile
) -> tuple[Tensor, Tensor]:
    """[T, H, K] output and [T, H] float32 log-sum-exp; `work` in blocks of `tile.tokens(R)` tokens."""
    num_tokens, num_heads, width = q.shape
    repeats = num_heads // k.shape[1]
    output = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(num_tokens, num_heads, dtype=torch.float32, device=q.device)
    heads = tile.heads(repeats)
    _forward_kernel[(work.shape[0] * (num_heads // heads),)](
        q,
        k,
        v,
        output,
        lse,
        work,
        scale * _LOG2_E,
        **_shapes(q, k, v, heads, tile, window),
    )
    return output, lse


def backward(
    grad_output: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    output: Tensor,
    lse: Tensor,
    query_work: Tensor,
    key_work: Tensor,
    *,
    scale: float,
    window: int | None,
    tiles: Tiles,
) -> tuple[Tensor, Tensor, Tensor]:
    """∂q [T, H, K], ∂k and ∂v [T, G, K], contiguous.

    grad_output, output: [T, H, K] contiguous
    query_work:          in blocks of `tiles.queries.tokens(R)` tokens
    key_work:            in blocks of `tiles.keys.keys` tokens
    """
    num_tokens, num_heads, _ = q.shape
    groups = k.shape[1]
    repeats = num_heads // groups
    grad_q, grad_k, grad_v = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v))
    # The second kernel reads whole tiles of these two.
    num_rows = num_tokens + tiles.keys.rows
    log2_lse, delta = torch.empty(2, num_rows * num_heads, dtype=torch.float32, device=q.device)
    heads = tiles.queries.heads(repeats)
    _grad_q_kernel[(query_work.shape[0] * (num_heads // heads),)](
        q,
        k,
        v,
        output,
        grad_output,
        lse,
        log2_lse,
        delta,
        grad_q,
        query_work,
        num_rows,
        scale,
        scale * _LOG2_E,
        KEY_HEADS=tiles.keys.heads(repeats),
        **_shapes(q, k, v, heads, tiles.queries, window),
    )
    _grad_kv_kernel[(key_work.shape[0] * groups,)](
        q,
        k,
        v,
        grad_output,
        log2_lse,
        delta,
        grad_k,
        grad_v,
        key_work,
        num_rows,
        scale,
        scale * _LOG2_E,
        **_shapes(q, k, v, tiles.keys.heads(repeats), tiles.keys, window),
    )
    return grad_q, grad_k, grad_v


def _shapes(q: Tensor, k: Tensor, v: Tensor, heads: int, tile: Tile, window: int | None) -> dict[str, int]:
    _, num_heads, width = q.shape
    return {
        "Q_STRIDE": q.stride(0),
        "K_STRIDE": k.stride(0),
        "V_STRIDE": v.stride(0),
        "NUM_HEADS": num_heads,
        "REPEATS": num_heads // k.shape[1],
        "HEADS": heads,
        "K": width,
        "PADDED_K": max(16, triton.next_power_of_2(width)),
        "ROWS": tile.rows,
        "KEYS": tile.keys,
        "WINDOW": window or 0,
        "APPROXIMATE": q.device.type == "cuda",
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
    }
