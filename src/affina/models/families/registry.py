"""The described families, and how a transformers config becomes a `DecoderSpec`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transformers import PretrainedConfig

from affina.models.families.decoder import DecoderSpec, Unsupported

_STATIC_ROPE = frozenset({"default", "linear", "llama3", "yarn"})
"""Rotations that depend on the position alone; `dynamic` and `longrope` change with the length of a row."""


@dataclass(frozen=True, slots=True)
class Family:
    """A `model_type` of transformers whose layers are those of families/decoder.py.

    window_by_flag: `sliding_window` counts only where `use_sliding_window` is set (Qwen); elsewhere it always counts
    """

    title: str
    has_qk_norm: bool
    window_by_flag: bool


FAMILIES: Mapping[str, Family] = {
    "qwen3": Family("Qwen3", has_qk_norm=True, window_by_flag=True),
    "qwen2": Family("Qwen2 and Qwen2.5", has_qk_norm=False, window_by_flag=True),
    "llama": Family("Llama 2 and 3", has_qk_norm=False, window_by_flag=False),
    "mistral": Family("Mistral", has_qk_norm=False, window_by_flag=False),
}

_KNOWN_REFUSALS: Mapping[str, str] = {
    "qwen3_moe": "Qwen3-MoE routes tokens to experts, which the fused decoder does not do",
    "qwen2_moe": "Qwen2-MoE routes tokens to experts, which the fused decoder does not do",
    "mixtral": "Mixtral routes tokens to experts, which the fused decoder does not do",
}


def read_decoder(config: PretrainedConfig) -> DecoderSpec | Unsupported:
    """The decoder that `config` describes, or why the fast engine does not run it."""
    model_type = config.model_type
    if model_type in _KNOWN_REFUSALS:
        return Unsupported(_KNOWN_REFUSALS[model_type])
    family = FAMILIES.get(model_type)
    if family is None:
        known = ", ".join(entry.title for entry in FAMILIES.values())
        return Unsupported(f"{model_type} is not a family that it describes ({known})")
    if (activation := config.hidden_act) not in ("silu", "swish"):
        return Unsupported(f"the activation {activation} is not silu")
    if getattr(config, "attention_dropout", 0.0):
        return Unsupported(f"attention_dropout is {config.attention_dropout}")
    if getattr(config, "pretraining_tp", 1) != 1:
        return Unsupported(f"pretraining_tp is {config.pretraining_tp}")
    rope_type = _rope_type(config)
    if rope_type not in _STATIC_ROPE:
        return Unsupported(f"the rotary embedding {rope_type} depends on the length of the row")
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if head_dim % 8 or head_dim > 256:
        return Unsupported(f"heads of {head_dim} are not a multiple of 8 up to 256")
    return DecoderSpec(
        family=model_type,
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_heads=config.num_attention_heads,
        num_kv_heads=getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
        head_dim=head_dim,
        vocabulary_size=config.vocab_size,
        norm_epsilon=config.rms_norm_eps,
        has_qk_norm=family.has_qk_norm,
        windows=_windows(config, family),
    )


def _rope_type(config: PretrainedConfig) -> str:
    parameters: Any = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    return str(parameters.get("rope_type", parameters.get("type", "default")))


def _windows(config: PretrainedConfig, family: Family) -> tuple[int | None, ...]:
    window = getattr(config, "sliding_window", None)
    if family.window_by_flag and not getattr(config, "use_sliding_window", False):
        window = None
    layer_types = getattr(config, "layer_types", None) or [None] * config.num_hidden_layers
    return tuple(None if kind == "full_attention" else window for kind in layer_types)
