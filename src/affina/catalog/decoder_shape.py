"""The sizes of a decoder, read from its config.json alone: enough to count parameters without loading anything.

Known are the decoders that are made of grouped-query attention, a gated MLP and RMS norms: Qwen3, Qwen2 (and 2.5),
Llama and Mistral. The sizes of some hub models are kept here as facts, so that they can be counted without a network.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from affina.catalog.embedded import embedded_model_path
from affina.catalog.shapes import read_shape
from affina.errors import Location, ModelError

_FAMILIES = ("qwen3", "qwen2", "llama", "mistral")
_BLOCKS = dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), "self_attn") | dict.fromkeys(
    ("gate_proj", "up_proj", "down_proj"), "mlp"
)


@dataclass(frozen=True, slots=True)
class LinearShape:
    """One linear layer of a decoder layer: y = x Wᵀ (+ b), W [num_outputs, num_inputs]."""

    name: str
    num_outputs: int
    num_inputs: int
    has_bias: bool = False

    @property
    def num_parameters(self) -> int:
        return self.num_outputs * self.num_inputs + (self.num_outputs if self.has_bias else 0)


@dataclass(frozen=True, slots=True)
class DecoderShape:
    """A decoder of `num_layers` equal layers.

    linears:   of one layer, in the model's order, without the head
    norms:     sizes of the norms of one layer; those of queries and keys have the size of a head
    is_tied:   the head is the embedding
    """

    model_type: str
    num_layers: int
    hidden_size: int
    num_heads: int
    num_key_value_heads: int
    head_dim: int
    vocabulary_size: int
    is_tied: bool
    linears: tuple[LinearShape, ...]
    norms: tuple[int, ...]

    @property
    def num_layer_parameters(self) -> int:
        """Of one decoder layer."""
        return sum(linear.num_parameters for linear in self.linears) + sum(self.norms)

    @property
    def num_parameters(self) -> int:
        """Of the whole model; a tied head counts once."""
        embeddings = self.vocabulary_size * self.hidden_size * (1 if self.is_tied else 2)
        return embeddings + self.num_layers * self.num_layer_parameters + self.hidden_size

    def linears_named(self, targets: str | tuple[str, ...]) -> tuple[LinearShape, ...]:
        """Of one layer, those that "all-linear" or last names such as q_proj mean."""
        if targets == "all-linear":
            return self.linears
        wanted = (targets,) if isinstance(targets, str) else targets
        return tuple(
            linear
            for linear in self.linears
            if any(linear.name == name or linear.name.endswith(f".{name}") for name in wanted)
        )


def decoder_shape(config: Mapping[str, Any]) -> DecoderShape | None:
    """The sizes that a config.json gives; None for a family that is not known, or where a size is missing."""
    if config.get("model_type") not in _FAMILIES:
        return None
    try:
        shape = read_shape(config)
    except ModelError:
        return None
    has_qk_norm = shape.norm_values > 2 * shape.hidden_size
    return DecoderShape(
        model_type=shape.model_type,
        num_layers=shape.num_layers,
        hidden_size=shape.hidden_size,
        num_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        vocabulary_size=shape.vocabulary_size,
        is_tied=shape.ties,
        linears=tuple(
            LinearShape(
                f"{_BLOCKS[linear.name]}.{linear.name}", linear.out_features, linear.in_features, linear.has_bias
            )
            for linear in shape.linears
        ),
        norms=(shape.hidden_size,) * 2 + ((shape.head_dim,) * 2 if has_qk_norm else ()),
    )


Sizes = tuple[Literal["qwen3", "qwen2", "llama", "mistral"], int, int, int, int, int, int, int, bool]

# family, layers, hidden, intermediate, heads, key-value heads, head size, vocabulary, tied: the models' own
# config.json.
_KNOWN: Mapping[str, Sizes] = {
    "Qwen/Qwen3-0.6B": ("qwen3", 28, 1024, 3072, 16, 8, 128, 151936, True),
    "Qwen/Qwen3-1.7B": ("qwen3", 28, 2048, 6144, 16, 8, 128, 151936, True),
    "Qwen/Qwen3-4B": ("qwen3", 36, 2560, 9728, 32, 8, 128, 151936, True),
    "Qwen/Qwen3-8B": ("qwen3", 36, 4096, 12288, 32, 8, 128, 151936, False),
    "Qwen/Qwen3-14B": ("qwen3", 40, 5120, 17408, 40, 8, 128, 151936, False),
    "Qwen/Qwen3-32B": ("qwen3", 64, 5120, 25600, 64, 8, 128, 151936, False),
    "Qwen/Qwen2.5-0.5B": ("qwen2", 24, 896, 4864, 14, 2, 64, 151936, True),
    "Qwen/Qwen2.5-1.5B": ("qwen2", 28, 1536, 8960, 12, 2, 128, 151936, True),
    "Qwen/Qwen2.5-3B": ("qwen2", 36, 2048, 11008, 16, 2, 128, 151936, True),
    "Qwen/Qwen2.5-7B": ("qwen2", 28, 3584, 18944, 28, 4, 128, 152064, False),
    "meta-llama/Llama-3.2-1B": ("llama", 16, 2048, 8192, 32, 8, 64, 128256, True),
    "meta-llama/Llama-3.2-3B": ("llama", 28, 3072, 8192, 24, 8, 128, 128256, True),
    "meta-llama/Llama-3.1-8B": ("llama", 32, 4096, 14336, 32, 8, 128, 128256, False),
    "mistralai/Mistral-7B-v0.3": ("mistral", 32, 4096, 14336, 32, 8, 128, 32768, False),
}
_VARIANTS = ("-Instruct-2507", "-Thinking-2507", "-Instruct", "-Base")
_SIZES = (
    "model_type",
    "num_hidden_layers",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "tie_word_embeddings",
)


def shape_of_model(path: str) -> DecoderShape:
    """The sizes of a folder, of affina/nano, or of a hub id that is known here or whose config.json is in the hub's
    cache.

    Fetches nothing. Raises ModelError[shape-unknown].
    """
    folder = embedded_model_path(path) or Path(path).expanduser()
    file = folder / "config.json" if folder.is_dir() else _cached_config(path)
    config = _read(file) if file is not None else _known(path)
    if config is None:
        raise ModelError(
            "shape-unknown",
            f'the sizes of "{path}" are not known',
            why="it is no folder with a config.json, not in the hub's cache, and not among the known models",
            fix=f"give a folder, or one of {', '.join(_KNOWN)}",
        )
    shape = decoder_shape(config)
    if shape is None:
        raise ModelError(
            "shape-unknown",
            f"{path} is a {config.get('model_type') or 'nameless'} model, whose layers are not known",
            why=f"parameters are counted for {', '.join(_FAMILIES)}; such a model may still be trained",
            fix="leave --model out to see what each method can do",
            where=Location(file) if file is not None else None,
        )
    return shape


def _known(path: str) -> dict[str, Any] | None:
    name = next((path.removesuffix(variant) for variant in _VARIANTS if path.endswith(variant)), path)
    sizes = _KNOWN.get(name)
    return dict(zip(_SIZES, sizes, strict=True)) if sizes is not None else None


def _cached_config(path: str) -> Path | None:
    """config.json of a hub id in huggingface_hub's cache, whose layout is part of its documented interface."""
    if path.count("/") != 1:
        return None
    home = Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser()
    cache = Path(os.environ.get("HF_HUB_CACHE", home / "hub"))
    found = sorted((cache / f"models--{path.replace('/', '--')}" / "snapshots").glob("*/config.json"))
    return found[-1] if found else None


def _read(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(
            "shape-unknown",
            f"{file} cannot be read: {error}",
            fix="give a folder that holds a model's config.json",
            where=Location(file),
        ) from error
    return content if isinstance(content, dict) else {}
