"""What `engine.memory: lowest` takes of a device, counted before anything is loaded.

Legend: b bytes of a number in the computation, D hidden, Q = H K and KV = G K widths of queries and of keys, V
vocabulary, R ranks, T tokens of the row, C tokens of a part, G_h groups of heads.

Per token, at the four moments of a layer that is computed in parts (parts.py), with x = b D, q, k, v = b (Q + 2 KV),
o = b Q + 4 H, angles = 4 K, stream = b (D + R) and `away` what the layer before sends to the host:

    forward, attention      x + q, k, v + o + angles + away
    forward, MLP            2 x + o + angles + away                                       and a part
    backward, MLP           stream + x + q, k, v + o + angles                             and a part
    backward, attention     the same + (b (3 Q + 2 KV) + 12 H) / G_h

A part is gate and up, the activation (or its gradient) and three rows of D, for C tokens. A test counts all of it on a
CPU, allocation by allocation.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from affina.catalog.decoder import DecoderSpec
from affina.catalog.fused_memory import (
    LONG_DOCUMENT,
    MLP_CHUNK_TOKENS,
    FusedPeaks,
    FusedRow,
    allocated,
    chunk_bytes,
)
from affina.catalog.save_policy import LayerRanks, padded

NF4_BITS = 4 + 8 / 64 + 32 / (64 * 256)
"""Of a weight in NF4 with double quantisation."""
LIBRARY_WORKSPACE_BYTES = 32 * 1024 * 1024
"""cuBLAS keeps it for each stream that multiplies, on Hopper and with CUBLAS_WORKSPACE_CONFIG=:4096:8."""
MAX_HEAD_GROUPS = 4
"""Into so many groups the heads are divided for attention's gradient: more would save another 2 KiB per token of
Qwen3-4B, and leave a large card idle on rows of a few thousand tokens."""
TILE_BYTES = 16 * 1024 * 1024
"""Of a head's tile that is expanded at once. kernels/logits.py and tiled_cross_entropy.py need torch, so this number
and the two below are stated twice; a test compares them."""
TILE_MULTIPLE = 128
HEAD_CHUNK_ROWS = 512
_SMALLEST_PART = 512
_PART_MULTIPLE = 128
_PARTS_OF_A_LONG_ROW = 16
_FOLDED_SUMS_BYTES = 8 * 1024 * 1024
"""Partial sums of the ranks' gradients in the activation's kernel: a few times I · R float32."""


@dataclass(frozen=True, slots=True)
class Footprint:
    """Bytes on the device.

    linears:       frozen weights of the layers
    vocabulary:    embedding and head in int8, one or two of them
    norms:         weights of all norms
    adapter:       one layer's matrices and gradients on their way from and to the host
    expanded:      the largest weight that is expanded at once
    products:      the workspace of the matrix products
    kept:          between the passes: t of the down projections, token ids, angles
    at_work:       a layer or the head, at the busiest moment
    """

    linears: int
    vocabulary: int
    norms: int
    adapter: int
    expanded: int
    products: int
    kept: int
    at_work: int

    @property
    def total(self) -> int:
        return sum(getattr(self, field.name) for field in fields(self))


def lowest_footprint(
    spec: DecoderSpec, *, num_tokens: int, rank: int, is_tied: bool, bits_per_weight: float = NF4_BITS
) -> Footprint:
    """Of training a row of `num_tokens`, one document, with adapters of `rank` on all seven projections, in 16 bits."""
    itemsize = 2
    q, kv, hidden, inner = spec.query_size, spec.key_value_size, spec.hidden_size, spec.intermediate_size
    shapes = [(q, hidden), (kv, hidden), (kv, hidden), (hidden, q), (inner, hidden), (inner, hidden), (hidden, inner)]
    num_weights = sum(rows * columns for rows, columns in shapes)
    num_adapter = sum(rows + columns for rows, columns in shapes) * rank
    vocabulary = spec.vocabulary_size * (hidden + 4) * (1 if is_tied else 2)
    norms = spec.num_layers * (2 * hidden + (2 * spec.head_dim if spec.has_qk_norm else 0)) + hidden
    ranks = LayerRanks(qkv=3 * rank, output=rank, gate_up=2 * rank, down=rank)
    kept = spec.num_layers * rank * itemsize + 3 * 8
    return Footprint(
        linears=int(spec.num_layers * num_weights * bits_per_weight / 8),
        vocabulary=vocabulary,
        norms=norms * itemsize,
        adapter=num_adapter * (4 + 4 + 2 * itemsize),
        expanded=max((rows + rank) * columns for rows, columns in shapes) * itemsize,
        products=LIBRARY_WORKSPACE_BYTES,
        kept=num_tokens * kept,
        at_work=bytes_at_work(spec, num_tokens=num_tokens, itemsize=itemsize, ranks=ranks),
    )


def tokens_per_part(num_tokens: int) -> int:
    """Tokens that a layer in parts computes at once: at least so many that the weights, which are expanded anew for
    every part, are used well, and for long rows few beside what grows with them."""
    share = num_tokens // _PARTS_OF_A_LONG_ROW // _PART_MULTIPLE * _PART_MULTIPLE
    return min(max(share, _SMALLEST_PART), MLP_CHUNK_TOKENS)


def num_head_groups(num_kv_heads: int) -> int:
    """The most groups of equal size, up to `MAX_HEAD_GROUPS`."""
    return max(count for count in range(1, MAX_HEAD_GROUPS + 1) if num_kv_heads % count == 0)


def head_workspace_bytes(shape: tuple[int, int], itemsize: int) -> int:
    """Bytes of the workspace for a head of `shape` (V, D) that is expanded tile by tile."""
    entries = TILE_BYTES // (shape[1] * itemsize)
    entries = min(shape[0], max(TILE_MULTIPLE, entries // TILE_MULTIPLE * TILE_MULTIPLE))
    logits = HEAD_CHUNK_ROWS * entries * (4 + (itemsize if itemsize < 4 else 1))
    return entries * shape[1] * itemsize + logits + 2 * HEAD_CHUNK_ROWS * shape[1] * 4


def bytes_at_work(spec: DecoderSpec, *, num_tokens: int, itemsize: int, ranks: LayerRanks) -> int:
    """Bytes of a layer in parts, or of the head, at the busiest moment of a row that is one document."""
    moments = bytes_per_token(
        spec,
        itemsize=itemsize,
        num_extra=max(ranks.output, ranks.down),
        sends_attention=num_tokens >= 2 * LONG_DOCUMENT,
    )
    inner, hidden = spec.intermediate_size, spec.hidden_size
    wide = padded(2 * inner + ranks.gate_up) + inner
    part = tokens_per_part(num_tokens) * itemsize
    in_parts = {
        "forward, MLP": part * (wide + 3 * hidden),
        "backward, MLP": part * (wide + hidden) + _FOLDED_SUMS_BYTES,
        "head": head_workspace_bytes((spec.vocabulary_size, hidden), itemsize),
    }
    return max(num_tokens * per_token + in_parts.get(moment, 0) for moment, per_token in moments.items())


def bytes_per_token(spec: DecoderSpec, *, itemsize: int, num_extra: int, sends_attention: bool) -> dict[str, int]:
    """Bytes of a layer in parts that grow with the row, at each of its moments.

    num_extra:       R, the room for low-rank parts beside the gradient of the stream
    sends_attention: the attention's output goes to the host
    """
    x = spec.hidden_size * itemsize
    heads = (spec.query_size + 2 * spec.key_value_size) * itemsize
    attended = spec.query_size * itemsize + 4 * spec.num_heads
    angles = 4 * spec.head_dim
    away = x + (attended if sends_attention else 0)
    stream = padded(spec.hidden_size + num_extra) * itemsize
    group = (3 * spec.query_size + 2 * spec.key_value_size) * itemsize + 12 * spec.num_heads
    backward = stream + x + heads + attended + angles
    return {
        "forward, attention": x + heads + attended + angles + away,
        "forward, MLP": 2 * x + attended + angles + away,
        "head": 2 * x + stream + angles + away,
        "backward, MLP": backward,
        "backward, attention": backward + group // num_head_groups(spec.num_kv_heads),
    }


def parts_peaks(row: FusedRow) -> FusedPeaks:
    """The peaks of a row all of whose layers are computed in parts. A head in tiles is one of a layer's moments."""
    at_work = bytes_at_work(row.spec, num_tokens=row.num_tokens, itemsize=row.itemsize, ranks=row.ranks)
    x = row.values(row.spec.hidden_size)
    kept = row.spec.num_layers * row.values(row.ranks.down) + 3 * allocated(row.num_tokens, 8)
    chunk = chunk_bytes(row.num_predicted, row.chunk_rows, row.spec.vocabulary_size, row.itemsize, has_gradient=True)
    head = kept + 2 * x + 2 * row.values(row.spec.hidden_size, rows=row.num_predicted) + chunk
    if row.tiles_head:
        head = kept + at_work
    return FusedPeaks(kept + at_work, head, kept + at_work + allocated(row.num_parameters, 4))
