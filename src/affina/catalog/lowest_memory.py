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

MAX_HEAD_GROUPS = 4
"""Into so many groups the heads are divided for attention's gradient: more would save another 2 KiB per token of
Qwen3-4B, and leave a large card idle on rows of a few thousand tokens."""
TILE_BYTES = 16 * 1024 * 1024
"""Of a head's tile that is expanded at once. kernels/logits.py and tiled_cross_entropy.py need torch, so this number
and the two below are stated twice; a test compares them."""
TILE_MULTIPLE = 128
HEAD_CHUNK_ROWS = 512
_SMALLEST_PART = 2048
"""On an H200 behind a slow host a step of 2,048 tokens in parts of 512 took 1,414 ms, most of it the host's launches,
which every part repeats. One part instead of four takes 98 MB more of Qwen3-4B, 142 MB of Qwen3-8B."""
_PART_MULTIPLE = 128
_PARTS_OF_A_LONG_ROW = 16
_FOLDED_SUMS_BYTES = 8 * 1024 * 1024
"""Partial sums of the ranks' gradients in the activation's kernel: a few times I · R float32."""


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
    part = min(tokens_per_part(num_tokens), num_tokens) * itemsize
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
