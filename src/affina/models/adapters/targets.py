"""Which linear layers get an adapter, and a helpful error when a name matches none."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from torch import nn

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


def short_names(names: Sequence[str]) -> tuple[str, ...]:
    """The distinct last parts of layer names, in order: q_proj, k_proj, …"""
    return tuple(dict.fromkeys(name.rpartition(".")[2] for name in names))


def _unmatched(model: nn.Module, target: str, names: tuple[str, ...]) -> ModelError:
    base = base_model_of(model)
    shorts = short_names(names)
    if target in dict(base.named_modules()) or any(name.endswith(f".{target}") for name, _ in base.named_modules()):
        why = f'"{target}" is in the model, but it is not a linear layer that can take an adapter'
    else:
        why = f"the model has {', '.join(shorts)}; nothing would train"
    near = difflib.get_close_matches(target.rpartition(".")[2], shorts, n=1, cutoff=0.5)
    fix = f"did you mean {near[0]}?" if near else f"use all-linear, or some of {', '.join(shorts)}"
    return ModelError("target-unmatched", f'adapter.targets "{target}" matches nothing', why=why, fix=fix)
