"""What a model is made of, read from its config.json: every weight's shape, without loading one.

The four families that the fast engine knows are counted exactly; other decoders are read as a Llama-like stack, which
is exact for those that are one and says so (`is_exact`) where it cannot know.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from affina.catalog.decoder import FAMILIES, DecoderSpec, Unsupported, num_kv_heads_of, read_decoder
from affina.errors import Location, ModelError

_ALIASES = {
    "hidden_size": ("n_embd", "d_model", "dim"),
    "num_hidden_layers": ("n_layer", "n_layers", "num_layers"),
    "num_attention_heads": ("n_head", "n_heads"),
    "intermediate_size": ("n_inner", "ffn_dim", "ffn_hidden_size"),
    "vocab_size": ("padded_vocab_size",),
}
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")


@dataclass(frozen=True, slots=True)
class LinearShape:
    """One linear layer of a decoder layer. count: how many there are of it, for experts."""

    name: str
    out_features: int
    in_features: int
    has_bias: bool = False
    count: int = 1

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
    norm_values:  of one layer, all its norms together
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
    norm_values: int
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
    def other_parameters(self) -> int:
        """Norms and biases."""
        biases = sum(linear.num_parameters - linear.num_weights for linear in self.linears)
        return self.num_layers * (self.norm_values + biases) + self.hidden_size

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
    kv_heads = num_kv_heads_of({**config, "num_attention_heads": heads})
    described = {**config, **sizes, "intermediate_size": intermediate}
    fused = read_decoder(described)
    if isinstance(fused, DecoderSpec):
        head_dim = fused.head_dim
    else:
        head_dim = int(config.get("head_dim") or hidden // heads)
    query, key_value = heads * head_dim, kv_heads * head_dim
    family = FAMILIES.get(model_type)
    attention_bias = bool(config.get("attention_bias", False)) and model_type not in ("qwen2", "mistral")
    qkv_bias = attention_bias or (family is not None and family.always_qkv_bias)
    mlp_bias = bool(config.get("mlp_bias", False)) and model_type == "llama"
    attention = (
        LinearShape("q_proj", query, hidden, qkv_bias),
        LinearShape("k_proj", key_value, hidden, qkv_bias),
        LinearShape("v_proj", key_value, hidden, qkv_bias),
        LinearShape("o_proj", hidden, query, attention_bias),
    )
    has_qk_norm = family.has_qk_norm if family is not None else model_type.startswith("qwen3")
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
        norm_values=2 * hidden + (2 * head_dim if has_qk_norm else 0),
        fused=fused,
        is_exact=family is not None,
        **_stored(config),
    )


def _mlp(config: Mapping[str, Any], hidden: int, intermediate: int, has_bias: bool) -> tuple[LinearShape, ...]:
    experts = next((int(config[name]) for name in _EXPERTS if isinstance(config.get(name), int)), 0)
    if not experts:
        width, count = intermediate, 1
    else:
        width, count = int(config.get("moe_intermediate_size") or intermediate), experts
    return (
        LinearShape("gate_proj", width, hidden, has_bias, count),
        LinearShape("up_proj", width, hidden, has_bias, count),
        LinearShape("down_proj", hidden, width, has_bias, count),
    )


def _stored(config: Mapping[str, Any]) -> dict[str, Any]:
    """How the checkpoint is quantised; which of these affina reads is in models/quantized_checkpoint."""
    stored = config.get("quantization_config")
    if not isinstance(stored, Mapping):
        return {}
    skipped = stored.get("llm_int8_skip_modules") or stored.get("ignore") or ()
    if stored.get("load_in_4bit") or stored.get("bnb_4bit_quant_type"):
        format = str(stored.get("bnb_4bit_quant_type", "fp4"))
    elif stored.get("load_in_8bit"):
        format = "int8"
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
