"""Which base model an adapter belongs to, told from the model itself rather than from a path.

Two things make an identity: the numbers that give the architecture its shapes, and a fingerprint of weights that no
weight format touches (norms, biases, a sample of the embedding), rounded to bfloat16. So the same base is recognised
whether it was loaded in bfloat16, float32, NF4 or 8 bits, from a folder or a hub, and another fine-tune of the same
architecture is told apart.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch
from torch import Tensor, nn

from affina.models.adapters.trained_weights import trained_weights_of
from affina.models.compat import is_adapter_name, name_in_base
from affina.models.structure import base_model_of, text_config
from affina.models.weights import Int8Embedding, fingerprint_rows

_SHAPE_FIELDS = (
    "model_type",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "n_embd",
    "n_layer",
    "n_head",
)


def base_identity(model: nn.Module) -> dict[str, Any]:
    """JSON-ready: model_type, architecture, shapes, shapes_sha256, weights_sha256, path. The adapter, if any, is left
    out."""
    base = base_model_of(model)
    config = text_config(base)
    shapes = {name: getattr(config, name) for name in _SHAPE_FIELDS if getattr(config, name, None) is not None}
    encoded = json.dumps(shapes, sort_keys=True).encode()
    return {
        "path": str(getattr(config, "_name_or_path", "") or base.config._name_or_path),
        "architecture": type(base).__name__,
        "shapes": shapes,
        "shapes_sha256": hashlib.sha256(encoded).hexdigest(),
        "weights_sha256": _weights_fingerprint(base),
    }


@torch.no_grad()
def _weights_fingerprint(base: nn.Module) -> str:
    digest = hashlib.sha256()
    trained = trained_weights_of(base)
    original = trained.original if trained is not None else {}
    embedding = base.get_input_embeddings()  # type: ignore[operator]
    if isinstance(embedding, Int8Embedding):
        sample = embedding.fingerprint  # of the weight before it was quantised: it is the same base
    else:
        assert isinstance(embedding.weight, Tensor)
        name_of = {id(parameter): name for name, parameter in base.named_parameters()}
        sample = fingerprint_rows(original.get(name_of[id(embedding.weight)], embedding.weight))
    _update(digest, "embedding", sample)
    vectors = {
        name_in_base(name): parameter
        for name, parameter in base.named_parameters()
        if parameter.dim() == 1 and parameter.is_floating_point() and not is_adapter_name(name)
    }
    for name in sorted(vectors):
        _update(digest, name, original.get(name, vectors[name]).detach())
    return digest.hexdigest()


def _update(digest: Any, name: str, values: Tensor) -> None:
    digest.update(name.encode())
    digest.update(values.to(torch.bfloat16).contiguous().cpu().view(torch.uint8).numpy().tobytes())
