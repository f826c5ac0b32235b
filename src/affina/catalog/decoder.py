"""What a decoder is made of, as plain data, and which families of transformers are described.

A layer of every described family is

    x ← x + O · attention(rope(norm_q(Q h)), rope(norm_k(K h)), V h)      h = RMSNorm(x)
    x ← x + D · (silu(G h) ∘ U h)                                         h = RMSNorm(x)

and the families differ in what the fields below say: whether queries and keys are normalised per head, which products
have a bias, how many key/value heads there are, which layers see only a window.

A config is read as a mapping, so that a config.json on disk and a config object in memory (`to_dict()`) give the same
decoder: what is foreseen is what runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_STATIC_ROPE = frozenset({"default", "linear", "llama3", "yarn"})
"""Rotations that depend on the position alone; `dynamic` and `longrope` change with the length of a row."""


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


@dataclass(frozen=True, slots=True)
class Family:
    """A `model_type` of transformers whose layers are those above.

    window_by_flag: `sliding_window` counts only where `use_sliding_window` is set (Qwen); elsewhere it always counts
    always_qkv_bias: q, k and v have a bias whatever the config says (Qwen2)
    reads_attention_bias, reads_mlp_bias: its layers have the bias that a config's attention_bias, mlp_bias asks for
    num_kv_heads, head_dim, sliding_window: transformers' defaults, which a config.json may leave out
    """

    title: str
    has_qk_norm: bool
    window_by_flag: bool
    always_qkv_bias: bool = False
    reads_attention_bias: bool = False
    reads_mlp_bias: bool = False
    num_kv_heads: int | None = None
    head_dim: int | None = None
    sliding_window: int | None = None


FAMILIES: Mapping[str, Family] = {
    "qwen3": Family(
        "Qwen3",
        has_qk_norm=True,
        window_by_flag=True,
        reads_attention_bias=True,
        num_kv_heads=32,
        head_dim=128,
        sliding_window=4096,
    ),
    "qwen2": Family(
        "Qwen2 and Qwen2.5",
        has_qk_norm=False,
        window_by_flag=True,
        always_qkv_bias=True,
        num_kv_heads=32,
        sliding_window=4096,
    ),
    "llama": Family(
        "Llama 2 and 3", has_qk_norm=False, window_by_flag=False, reads_attention_bias=True, reads_mlp_bias=True
    ),
    "mistral": Family("Mistral", has_qk_norm=False, window_by_flag=False, num_kv_heads=8, sliding_window=4096),
}

_KNOWN_REFUSALS: Mapping[str, str] = {
    "qwen3_moe": "Qwen3-MoE routes tokens to experts, which the fused decoder does not do",
    "qwen2_moe": "Qwen2-MoE routes tokens to experts, which the fused decoder does not do",
    "mixtral": "Mixtral routes tokens to experts, which the fused decoder does not do",
}


def read_decoder(config: Mapping[str, Any]) -> DecoderSpec | Unsupported:
    """The decoder that a config.json describes, or why the fast engine does not run it."""
    model_type = str(config.get("model_type"))
    if model_type in _KNOWN_REFUSALS:
        return Unsupported(_KNOWN_REFUSALS[model_type])
    family = FAMILIES.get(model_type)
    if family is None:
        known = ", ".join(entry.title for entry in FAMILIES.values())
        return Unsupported(f"{model_type} is not a family that it describes ({known})")
    if (activation := config.get("hidden_act", "silu")) not in ("silu", "swish"):
        return Unsupported(f"the activation {activation} is not silu")
    if config.get("attention_dropout"):
        return Unsupported(f"attention_dropout is {config['attention_dropout']}")
    if config.get("pretraining_tp", 1) != 1:
        return Unsupported(f"pretraining_tp is {config['pretraining_tp']}")
    rope_type = rope_type_of(config)
    if rope_type not in _STATIC_ROPE:
        return Unsupported(f"the rotary embedding {rope_type} depends on the length of the row")
    num_heads = int(config["num_attention_heads"])
    head_dim = head_dim_of(config)
    if head_dim % 8 or head_dim > 256:
        return Unsupported(f"heads of {head_dim} are not a multiple of 8 up to 256")
    num_layers = int(config["num_hidden_layers"])
    return DecoderSpec(
        family=model_type,
        num_layers=num_layers,
        hidden_size=int(config["hidden_size"]),
        intermediate_size=int(config["intermediate_size"]),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads_of(config),
        head_dim=head_dim,
        vocabulary_size=int(config["vocab_size"]),
        norm_epsilon=float(config.get("rms_norm_eps", 1e-6)),
        has_qk_norm=family.has_qk_norm,
        windows=_windows(config, family, num_layers),
    )


def num_kv_heads_of(config: Mapping[str, Any]) -> int:
    """G; where a config.json leaves it out, what the family's class of transformers takes."""
    family = FAMILIES.get(str(config.get("model_type")))
    default = family.num_kv_heads if family is not None and "num_key_value_heads" not in config else None
    return int(config.get("num_key_value_heads") or default or config["num_attention_heads"])


def head_dim_of(config: Mapping[str, Any]) -> int:
    """K; where a config.json leaves it out, what the family's class of transformers takes."""
    family = FAMILIES.get(str(config.get("model_type")))
    default = family.head_dim if family is not None and "head_dim" not in config else None
    return int(config.get("head_dim") or default or int(config["hidden_size"]) // int(config["num_attention_heads"]))


def rope_type_of(config: Mapping[str, Any]) -> str:
    """`default`, `yarn`, `llama3`, …"""
    parameters = config.get("rope_parameters") or config.get("rope_scaling") or {}
    return str(parameters.get("rope_type", parameters.get("type", "default")))


def _windows(config: Mapping[str, Any], family: Family, num_layers: int) -> tuple[int | None, ...]:
    window = config.get("sliding_window", family.sliding_window)
    if family.window_by_flag and not config.get("use_sliding_window", False):
        window = None
    layer_types = config.get("layer_types")
    if not layer_types and family.window_by_flag and window is not None:
        # transformers' own rule for a config.json that does not name the layers
        first = config.get("max_window_layers", 28)
        layer_types = ["sliding_attention" if index >= first else "full_attention" for index in range(num_layers)]
    kinds = layer_types or [None] * num_layers
    return tuple(None if kind == "full_attention" else window for kind in kinds)
