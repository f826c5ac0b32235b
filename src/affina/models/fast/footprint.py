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

from affina.kernels.tiled_cross_entropy import workspace_bytes
from affina.models.families import DecoderSpec
from affina.models.fast.memory import LONG_DOCUMENT, tokens_per_part
from affina.models.fast.parts import num_head_groups
from affina.models.fast.policy import LayerRanks, padded

NF4_BITS = 4 + 8 / 64 + 32 / (64 * 256)
"""Of a weight in NF4 with double quantisation."""
LIBRARY_WORKSPACE_BYTES = 32 * 1024 * 1024
"""cuBLAS keeps it for each stream that multiplies, on Hopper and with CUBLAS_WORKSPACE_CONFIG=:4096:8."""
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
    library:       the workspace of the matrix products
    kept:          between the passes: t of the down projections, token ids, angles
    at_work:       a layer or the head, at the busiest moment
    """

    linears: int
    vocabulary: int
    norms: int
    adapter: int
    expanded: int
    library: int
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
        library=LIBRARY_WORKSPACE_BYTES,
        kept=num_tokens * kept,
        at_work=bytes_at_work(spec, num_tokens=num_tokens, itemsize=itemsize, ranks=ranks),
    )


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
        "head": workspace_bytes((spec.vocabulary_size, hidden), itemsize),
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
