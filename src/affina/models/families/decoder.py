"""What a decoder is made of, as plain data.

A layer of every described family is

    x ← x + O · attention(rope(norm_q(Q h)), rope(norm_k(K h)), V h)      h = RMSNorm(x)
    x ← x + D · (silu(G h) ∘ U h)                                         h = RMSNorm(x)

and the families differ in what the fields below say: whether queries and keys are normalised per head, which products
have a bias, how many key/value heads there are, which layers see only a window.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class DecoderSpec:
    """One decoder.

    num_heads, num_kv_heads: H and G, H a multiple of G
    head_dim:      K; H · K need not be the hidden size
    has_qk_norm:   RMSNorm over K of every query and key head, before the rotation
    windows:       for each layer, how many tokens a token sees, itself included; None: its whole document
    """

    family: str
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocabulary_size: int
    norm_epsilon: float
    has_qk_norm: bool
    windows: tuple[int | None, ...]

    @property
    def query_size(self) -> int:
        """H · K, the width of the attention's output."""
        return self.num_heads * self.head_dim

    @property
    def key_value_size(self) -> int:
        """G · K, the width of the keys, and of the values."""
        return self.num_kv_heads * self.head_dim

    @property
    def attention_scale(self) -> float:
        """Factor on the scores."""
        return float(self.head_dim**-0.5)


@dataclass(frozen=True, slots=True)
class Unsupported:
    """Why the fast engine does not run something; one sentence that ends a note to the user."""

    reason: str
