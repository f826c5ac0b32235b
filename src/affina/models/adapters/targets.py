"""Which linear layers get an adapter, and a helpful error when a name matches none."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from torch import nn
from transformers import PreTrainedModel

from affina.errors import ModelError
from affina.models.structure import base_model_of
from affina.models.weights import linear_layers

ALL_LINEAR = "all-linear"


def candidate_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Every linear layer of the base model but the head, by its full name."""
    base = base_model_of(model)
    head = base.get_output_embeddings()
    return {name: layer for name, layer in linear_layers(base) if layer is not head}


def resolve_targets(model: nn.Module, targets: str | Sequence[str] = ALL_LINEAR) -> tuple[str, ...]:
    """Full names of the layers that `targets` means, in the model's order.

    targets: "all-linear" for every linear layer but the head, or names: a full name, or its last parts ("q_proj",
             "mlp.down_proj", "layers.3.self_attn.q_proj").
    Raises ModelError[target-unmatched] for each name that matches nothing, with candidates.
    """
    candidates = candidate_layers(model)
    if not candidates:
        raise ModelError(
            "target-unmatched",
            f"{type(base_model_of(model)).__name__} has no linear layers that could take an adapter",
            fix="choose another model",
        )
    if targets == ALL_LINEAR or list(targets) == [ALL_LINEAR]:
        return tuple(candidates)
    wanted = [targets] if isinstance(targets, str) else list(targets)
    matched: set[str] = set()
    for target in wanted:
        names = {name for name in candidates if name == target or name.endswith(f".{target}")}
        if not names:
            raise _unmatched(model, target, tuple(candidates))
        matched |= names
    return tuple(name for name in candidates if name in matched)


def residual_norms(model: nn.Module) -> tuple[str, ...]:
    """Full names of the norms of the residual stream, in the model's order: those of queries and keys are not among
    them.

    Raises ModelError[target-unmatched].
    """
    base = base_model_of(model)
    width = base.get_input_embeddings().weight.shape[1]
    names = tuple(
        name
        for name, module in base.named_modules()
        if "norm" in type(module).__name__.lower() and getattr(module, "weight", None) is not None
        and tuple(module.weight.shape) == (width,)
    )  # fmt: skip
    if not names:
        raise ModelError(
            "target-unmatched",
            f"{type(base).__name__} has no norms with weights of the width of its residual stream",
            why="LayerNorm tuning trains nothing else",
            fix="write `adapter: lora`",
        )
    return names


def short_names(names: Sequence[str]) -> tuple[str, ...]:
    """The distinct last parts of layer names, in order: q_proj, k_proj, …"""
    return tuple(dict.fromkeys(name.rpartition(".")[2] for name in names))


def _unmatched(model: nn.Module, target: str, names: tuple[str, ...]) -> ModelError:
    base = base_model_of(model)
    shorts = short_names(names)
    near = difflib.get_close_matches(target.rpartition(".")[2], shorts, n=1, cutoff=0.5)
    fix = f"did you mean {near[0]}?" if near else f"use all-linear, or some of {', '.join(shorts)}"
    module = next((m for name, m in base.named_modules() if name == target or name.endswith(f".{target}")), None)
    if module is None:
        why = f"the model has {', '.join(shorts)}; nothing would train"
    elif module is base.get_input_embeddings() or module is base.get_output_embeddings():
        return _vocabulary_target(base, target, module)
    else:
        why = f'"{target}" is in the model, but it is not a linear layer that can take an adapter'
    return ModelError("target-unmatched", f'adapter.targets "{target}" matches nothing', why=why, fix=fix)


def _vocabulary_target(base: PreTrainedModel, target: str, module: nn.Module) -> ModelError:
    """The embedding or the head: an adapter there belongs to the vocabulary, and to both where they are tied."""
    embedding, head = base.get_input_embeddings(), base.get_output_embeddings()
    name = "the embedding" if module is embedding else "the head"
    if head is not None and embedding.weight is head.weight:
        other = "the head" if module is embedding else "the embedding"
        why = (
            f"{target} is {name}, and its weight is {other}'s as well (they are tied): an adapter on one of "
            "them would give the two different weights, and could be merged into neither"
        )
    else:
        why = f"{target} is {name}, which stays frozen under an adapter: the loss is computed through the plain head"
    fix = "write `targets: all-linear`; to train the embedding and the head themselves, `adapter: full`"
    return ModelError("target-unmatched", f'adapter.targets "{target}" cannot take an adapter', why=why, fix=fix)
