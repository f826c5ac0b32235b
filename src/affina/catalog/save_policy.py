"""The save policy: what each layer keeps for its backward pass, and what it computes again.

A layer can keep, per token (bytes in bf16 for Qwen3-4B):

    x      its input                                   5,120    always
    x₂     the residual between attention and MLP      5,120
    o      the attention's output, log-sum-exp         8,320
    qkv    queries, keys, values before rotation      12,416    with room for their gradient's low-rank part
    q, k, v   after norm and rotation                 12,288
    gu     gate and up                                39,040    likewise

What is not kept is recomputed from what is. The levels drop first what is cheapest to recompute per byte: norms and
rotation cost a pass over memory; gate and up cost a product each, for 38 KiB; the attention's output costs attention.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

from affina.catalog.decoder import DecoderSpec

PITCH = 64
"""Elements to which row strides of wide buffers are rounded up: 128 bytes in 16 bits."""


class Keep(IntEnum):
    """How much a layer keeps, from least memory to least work."""

    PARTS = 0
    """As OFFLOADED; and the layer is computed part by part, its queries, keys and values twice (parts.py). Only for all
    layers together: what this saves is not kept memory but that of the layer at work."""
    OFFLOADED = 1
    """x, in pinned host memory. All of the layer is recomputed."""
    INPUT = 2
    """x. All of the layer but its last product is recomputed."""
    ATTENTION = 3
    """x, x₂, o: attention is never recomputed; q, k, v and gate, up are."""
    PROJECTIONS = 4
    """x, x₂, o, qkv: gate and up are recomputed."""
    PRODUCTS = 5
    """Every product's result: only norms, rotation and the activation are recomputed."""
    ALL = 6
    """The rotated queries and keys too: only norms and the activation are recomputed."""


@dataclass(frozen=True, slots=True)
class LayerRanks:
    """Sums of the ranks of a layer's adapters, by common input: their t = x Aᵀ are kept too."""

    qkv: int
    output: int
    gate_up: int
    down: int

    largest: int = 0
    """The largest rank of a single projection."""

    @property
    def total(self) -> int:
        return self.qkv + self.output + self.gate_up + self.down


def kept_bytes_per_token(spec: DecoderSpec, keep: Keep, *, itemsize: int, ranks: LayerRanks) -> int:
    """Device bytes that one layer keeps per token."""
    values = ranks.down
    if keep >= Keep.INPUT:
        values += spec.hidden_size
    if keep >= Keep.ATTENTION:
        values += spec.hidden_size + spec.query_size + ranks.total - ranks.down
    if keep >= Keep.PROJECTIONS:
        values += padded(spec.query_size + 2 * spec.key_value_size + ranks.qkv)
    if keep >= Keep.PRODUCTS:
        values += padded(2 * spec.intermediate_size + ranks.gate_up)
    if keep >= Keep.ALL:
        values += spec.query_size + 2 * spec.key_value_size
    scalars = spec.num_heads + 2 if keep >= Keep.ATTENTION else 0  # log-sum-exp, and the norms' factors
    return values * itemsize + scalars * 4


def padded(columns: int) -> int:
    """Columns of a wide buffer, as linear.py allocates it."""
    return -(-columns // PITCH) * PITCH


@dataclass(frozen=True, slots=True)
class SavePolicy:
    """What every layer keeps. `layers[i]` belongs to layer i."""

    layers: tuple[Keep, ...]

    @classmethod
    def uniform(cls, num_layers: int, keep: Keep) -> SavePolicy:
        """The same for every layer."""
        return cls((keep,) * num_layers)

    def num_bytes(self, spec: DecoderSpec, *, num_tokens: int, itemsize: int, ranks: LayerRanks) -> int:
        """Device bytes kept between the two passes of a row of `num_tokens`."""
        per_token = sum(kept_bytes_per_token(spec, keep, itemsize=itemsize, ranks=ranks) for keep in self.layers)
        return per_token * num_tokens

    @property
    def num_without_attention(self) -> int:
        """Layers that would compute attention again; in rows of long documents its output goes to the host instead."""
        return sum(keep < Keep.ATTENTION for keep in self.layers)

    def leaner(self) -> SavePolicy | None:
        """The next policy with less memory: every layer at the richest level goes one down. None: nothing is left."""
        richest = max(self.layers)
        if richest == Keep.PARTS:
            return None
        return SavePolicy(tuple(Keep(keep - 1) if keep == richest else keep for keep in self.layers))

    def describe(self) -> str:
        """What the layers keep, to follow "layers keep": `everything`, or `30 × all, 6 × products`."""
        if set(self.layers) == {Keep.ALL}:
            return "everything for the backward pass"
        counts = {keep: self.layers.count(keep) for keep in Keep}
        return ", ".join(f"{count} × {keep.name.lower()}" for keep, count in reversed(counts.items()) if count)
