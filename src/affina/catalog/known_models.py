"""The sizes of models by name: of those on this machine from their config.json, of some hub models as facts kept here,
so that they can be counted without a network.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from affina.catalog.decoder import FAMILIES
from affina.catalog.model_files import local_config_folder, read_config
from affina.catalog.shapes import ModelShape, read_shape
from affina.errors import Location, ModelError

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


def shape_of_model(path: str) -> ModelShape:
    """The sizes of a folder, of affina/nano, or of a hub id that is known here or whose config.json is in the hub's
    cache.

    Fetches nothing. Raises ModelError: shape-unknown, config-incomplete, config-damaged, model-not-found.
    """
    folder = local_config_folder(path)
    file = folder / "config.json" if folder is not None else None
    config = read_config(folder) if folder is not None else _known(path)
    if config is None:
        raise ModelError(
            "shape-unknown",
            f'the sizes of "{path}" are not known',
            why="it is no folder with a config.json, not in the hub's cache, and not among the known models",
            fix=f"give a folder, or one of {', '.join(_KNOWN)}",
        )
    shape = read_shape(config, where=file)
    if not shape.is_exact:
        raise ModelError(
            "shape-unknown",
            f"{path} is a {config.get('model_type') or 'nameless'} model, whose layers are not known",
            why=f"parameters are counted for {', '.join(FAMILIES)}; such a model may still be trained",
            fix="leave --model out to see what each method can do",
            where=Location(file) if file is not None else None,
        )
    return shape


def _known(path: str) -> dict[str, Any] | None:
    name = next((path.removesuffix(variant) for variant in _VARIANTS if path.endswith(variant)), path)
    sizes = _KNOWN.get(name)
    return dict(zip(_SIZES, sizes, strict=True)) if sizes is not None else None
