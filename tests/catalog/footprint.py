"""What `engine.memory: lowest` takes of a device, added up on one page: the oracle of plan and documentation."""

from __future__ import annotations

from dataclasses import dataclass, fields

from affina.catalog.decoder import DecoderSpec
from affina.catalog.lowest_memory import bytes_at_work
from affina.catalog.save_policy import LayerRanks

NF4_BITS = 4 + 8 / 64 + 32 / (64 * 256)
"""Of a weight in NF4 with double quantisation."""
LIBRARY_WORKSPACE_BYTES = 32 * 1024 * 1024
"""cuBLAS keeps it for each stream that multiplies, on Hopper and with CUBLAS_WORKSPACE_CONFIG=:4096:8."""


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
