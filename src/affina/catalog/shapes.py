"""What a model is made of, read from its config.json: every weight's shape, without loading one.

The four families that the fast engine knows are counted exactly; other decoders are read as a Llama-like stack, which
is exact for those that are one and says so (`is_exact`) where it cannot know.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from affina.catalog.decoder import (
    FAMILIES,
    DecoderSpec,
    Family,
    Unsupported,
    head_dim_of,
    num_kv_heads_of,
    read_decoder,
)
from affina.errors import Location, ModelError

_ALIASES = {
    "hidden_size": ("n_embd", "d_model", "dim"),
    "num_hidden_layers": ("n_layer", "n_layers", "num_layers"),
    "num_attention_heads": ("n_head", "n_heads"),
    "intermediate_size": ("n_inner", "ffn_dim", "ffn_hidden_size"),
    "vocab_size": ("padded_vocab_size",),
}
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
_LIKE_LLAMA = Family("", has_qk_norm=False, window_by_flag=False, reads_attention_bias=True)
_LIKE_QWEN3 = Family("", has_qk_norm=True, window_by_flag=False, reads_attention_bias=True)

Targets = str | Sequence[str]


def matches(targets: Targets, name: str) -> bool:
    """Whether a linear layer gets an adapter: "all-linear" means every one, other targets their name's last parts."""
    wanted = (targets,) if isinstance(targets, str) else tuple(targets)
    return wanted == ("all-linear",) or any(name == target or name.endswith(f".{target}") for target in wanted)


@dataclass(frozen=True, slots=True)
class LinearShape:
    """One linear layer of a decoder layer: y = x Wᵀ (+ b), W [out_features, in_features].

    block: the module of the layer that it is in, as transformers calls it
    count: how many there are of it, for experts
    """

    block: Literal["self_attn", "mlp"]
    name: str
    out_features: int
    in_features: int
    has_bias: bool = False
    count: int = 1

    @property
    def path(self) -> str:
        """Its name inside of a decoder layer."""
        return f"{self.block}.{self.name}"

    @property
    def num_weights(self) -> int:
        return self.out_features * self.in_features * self.count

    @property
    def num_parameters(self) -> int:
        return self.num_weights + (self.out_features * self.count if self.has_bias else 0)


@dataclass(frozen=True, slots=True)
class ModelShape:
    """A causal language model by its sizes.

    linears:      of one layer, in the order of the computation
    has_qk_norm:  queries and keys of every head are normalised
    ties:         the head is the embedding
    fused:        the decoder as the fast engine sees it, or why it does not
    is_exact:     whether the family is described; else a Llama-like decoder is assumed
    stored_format: the checkpoint's own quantisation as affina calls it, None: it is dense
    stored_double: its block scales are quantised, too; stored_skips: its layers that are dense
    """

    model_type: str
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocabulary_size: int
    ties: bool
    linears: tuple[LinearShape, ...]
    has_qk_norm: bool
    fused: DecoderSpec | Unsupported
    is_exact: bool
    stored_format: str | None = None
    stored_double: bool = False
    stored_skips: tuple[str, ...] = ()

    @property
    def embedding_parameters(self) -> int:
        return self.vocabulary_size * self.hidden_size

    @property
    def head_parameters(self) -> int:
        """0 where the head is the embedding."""
        return 0 if self.ties else self.embedding_parameters

    @property
    def linear_weights(self) -> int:
        """Weights of all linear layers but the head: what is quantised and what adapters sit on."""
        return self.num_layers * sum(linear.num_weights for linear in self.linears)

    @property
    def norm_values(self) -> int:
        """Weights of one layer's norms."""
        return 2 * self.hidden_size + (2 * self.head_dim if self.has_qk_norm else 0)

    @property
    def num_layer_parameters(self) -> int:
        """Of one decoder layer."""
        return sum(linear.num_parameters for linear in self.linears) + self.norm_values

    @property
    def other_parameters(self) -> int:
        """Norms and biases."""
        return self.num_layers * self.num_layer_parameters - self.linear_weights + self.hidden_size

    @property
    def num_parameters(self) -> int:
        """Tied ones count once."""
        return self.embedding_parameters + self.head_parameters + self.linear_weights + self.other_parameters

    @property
    def query_size(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def key_value_size(self) -> int:
        return self.num_kv_heads * self.head_dim

    def linears_named(self, targets: Targets) -> tuple[LinearShape, ...]:
        """Of one layer, those that "all-linear" or last names such as q_proj mean."""
        return tuple(linear for linear in self.linears if matches(targets, linear.path))


def read_shape(config: Mapping[str, Any], *, where: Path | None = None) -> ModelShape:
    """The shape that a config.json describes.

    Raises ModelError[config-incomplete] when it does not say how large the model is.
    """
    nested = config.get("text_config")
    if isinstance(nested, Mapping) and "hidden_size" in nested:
        ties = config.get("tie_word_embeddings", nested.get("tie_word_embeddings", False))
        config = {**nested, "tie_word_embeddings": ties}
    sizes = {name: _size(config, name, where) for name in _ALIASES if name != "intermediate_size"}
    hidden, layers, heads = sizes["hidden_size"], sizes["num_hidden_layers"], sizes["num_attention_heads"]
    model_type = str(config.get("model_type", "unknown"))
    intermediate = _find(config, "intermediate_size") or 4 * hidden
    described = {**config, **sizes, "intermediate_size": intermediate}
    kv_heads, head_dim = num_kv_heads_of(described), head_dim_of(described)
    query, key_value = heads * head_dim, kv_heads * head_dim
    family = FAMILIES.get(model_type) or (_LIKE_QWEN3 if model_type.startswith("qwen3") else _LIKE_LLAMA)
    attention_bias = family.reads_attention_bias and bool(config.get("attention_bias", False))
    qkv_bias = attention_bias or family.always_qkv_bias
    mlp_bias = family.reads_mlp_bias and bool(config.get("mlp_bias", False))
    attention = (
        LinearShape("self_attn", "q_proj", query, hidden, qkv_bias),
        LinearShape("self_attn", "k_proj", key_value, hidden, qkv_bias),
        LinearShape("self_attn", "v_proj", key_value, hidden, qkv_bias),
        LinearShape("self_attn", "o_proj", hidden, query, attention_bias),
    )
    return ModelShape(
        model_type=model_type,
        num_layers=layers,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        vocabulary_size=sizes["vocab_size"],
        ties=bool(config.get("tie_word_embeddings", model_type.startswith("gemma"))),
        linears=(*attention, *_mlp(config, hidden, intermediate, mlp_bias)),
        has_qk_norm=family.has_qk_norm,
        fused=read_decoder(described),
        is_exact=model_type in FAMILIES,
        **_stored(config),
    )


def _mlp(config: Mapping[str, Any], hidden: int, intermediate: int, has_bias: bool) -> tuple[LinearShape, ...]:
    experts = next((int(config[name]) for name in _EXPERTS if isinstance(config.get(name), int)), 0)
    if not experts:
        width, count = intermediate, 1
    else:
        width, count = int(config.get("moe_intermediate_size") or intermediate), experts
    return (
        LinearShape("mlp", "gate_proj", width, hidden, has_bias, count),
        LinearShape("mlp", "up_proj", width, hidden, has_bias, count),
        LinearShape("mlp", "down_proj", hidden, width, has_bias, count),
    )


def _stored(config: Mapping[str, Any]) -> dict[str, Any]:
    """How the checkpoint is quantised; which of these affina reads is in models/quantized_checkpoint."""
    stored = config.get("quantization_config")
    if not isinstance(stored, Mapping):
        return {}
    skipped = stored.get("llm_int8_skip_modules") or stored.get("ignore") or ()
    if stored.get("load_in_8bit"):  # it names a 4-bit type, too, which says nothing then
        format = "int8"
    elif stored.get("load_in_4bit") or stored.get("bnb_4bit_quant_type"):
        format = str(stored.get("bnb_4bit_quant_type", "fp4"))
    elif stored.get("format") == "float-quantized":
        format = "fp8"
    else:
        format = str(stored.get("quant_method", "unknown"))
    return {
        "stored_format": format,
        "stored_double": bool(stored.get("bnb_4bit_use_double_quant", False)),
        "stored_skips": tuple(skipped),
    }


def _find(config: Mapping[str, Any], name: str) -> int | None:
    for key in (name, *_ALIASES[name]):
        value = config.get(key)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    return None


def _size(config: Mapping[str, Any], name: str, where: Path | None) -> int:
    value = _find(config, name)
    if value is None:
        raise ModelError(
            "config-incomplete",
            f"config.json does not say {name}",
            why=f"without it the size of a {config.get('model_type', 'model')} cannot be known before it is loaded",
            fix="give a causal language model's directory or hub id, with its whole config.json",
            where=Location(where) if where is not None else None,
        )
    return value
