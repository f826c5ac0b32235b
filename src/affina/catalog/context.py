"""How many tokens a model reads at once, from its config.json alone."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from affina.catalog.embedded import EMBEDDED_MODELS, embedded_model_path

_LENGTHS = ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length", "seq_length")
_STRETCHING = ("linear", "dynamic", "yarn", "longrope", "su")
"""Kinds of rope scaling whose `factor` may not be part of max_position_embeddings yet."""


def context_tokens(config: Mapping[str, Any]) -> int | None:
    """The longest input, in tokens, that a config.json allows; None where it does not say.

    Where rotary positions are stretched by a factor, models differ in whether max_position_embeddings counts it; the
    longer reading is taken, because a limit that is too low would refuse what works.
    """
    nested = config.get("text_config")
    if isinstance(nested, Mapping) and any(isinstance(nested.get(name), int) for name in _LENGTHS):
        config = nested
    length = next((config[name] for name in _LENGTHS if _is_count(config.get(name))), None)
    if length is None:
        return None
    scaling = config.get("rope_scaling") or config.get("rope_parameters")
    if not isinstance(scaling, Mapping) or scaling.get("rope_type", scaling.get("type")) not in _STRETCHING:
        return int(length)
    factor, original = scaling.get("factor"), scaling.get("original_max_position_embeddings", length)
    if not isinstance(factor, int | float) or not _is_count(original):
        return int(length)
    return max(int(length), int(original * factor))


def local_context_tokens(path: str) -> int | None:
    """`context_tokens` of a model that is on this machine; None for any other, and where config.json says nothing."""
    folder = embedded_model_path(path) if path in EMBEDDED_MODELS else Path(path).expanduser()
    assert folder is not None
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None  # the loader says what is wrong with it
    return context_tokens(config) if isinstance(config, Mapping) else None


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
