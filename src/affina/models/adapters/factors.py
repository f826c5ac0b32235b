"""LoRA that starts from the weights: PiSSA, OLoRA, LoftQ.

PiSSA (Meng et al., arXiv:2404.02948) and OLoRA (Büyükakyüz, arXiv:2406.01775) begin with factors of W itself, and take
them out of W so that nothing changes at first:

    y = x (W − s B₀ A₀)ᵀ + s x (B A)ᵀ

    PiSSA   s B₀ A₀ = U_R Σ_R V_Rᵀ, the R largest singular directions of W, the root of Σ in either factor
    OLoRA   B₀ = Q[:, :R], A₀ = R[:R] of W = Q R

PEFT writes W − s B₀ A₀ into the base. Then the base is no longer the base: switched off it answers with a hole in it, a
second such adapter moves the first one's logits by 80%, and a saved adapter fits no other copy. Here the base is never
touched: −s B₀ A₀ is a second, frozen LoRA, and both are switched together. They are saved as the one LoRA that they
are,

    s [B  −B₀] [A; A₀]        of rank 2R, with the same scale

which every tool loads. Off is the base, bit for bit; nothing is rounded into 16-bit weights.

LoftQ (Li et al., arXiv:2310.08659) starts as what the 4-bit base has lost: s B A is the best approximation of rank R of
W − Ŵ (algorithm 1 with T = 1: further iterations would quantise another weight, and the base would not be the base).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from torch import Tensor

from affina.models.weights import format_of

INITIAL = "initial"
"""PEFT's name for the frozen adapter that takes the initial factors out again."""

_EXACT_SVD_SIZE = 1024
_OVERSAMPLING, _POWER_ITERATIONS = 16, 8


@torch.no_grad()
def start_from_weights(model: PeftModel, method: str, adapter_name: str) -> None:
    """Give a fresh LoRA the factors of its layers' weights, and add the frozen adapter that takes them out."""
    model.add_adapter(INITIAL, replace(model.peft_config[adapter_name]))
    for _, layer in lora_layers(model, adapter_name):
        base = layer.get_base_layer()
        weight_format = format_of(base)
        assert weight_format is not None
        weight = weight_format.dequantize(base, torch.float32)
        rank, scale = layer.r[adapter_name], layer.scaling[adapter_name]
        down, up = pissa_factors(weight, rank, scale) if method == "pissa" else olora_factors(weight, rank)
        layer.lora_A[adapter_name].weight.copy_(down)
        layer.lora_B[adapter_name].weight.copy_(up)
        layer.lora_A[INITIAL].weight.copy_(down)
        layer.lora_B[INITIAL].weight.copy_(-up)
    use_both(model, adapter_name)


def use_both(model: PeftModel, adapter_name: str) -> None:
    """Compute with the trained and the initial factors; only the first learn."""
    model.base_model.set_adapter([adapter_name, INITIAL])
    for name, parameter in model.named_parameters():
        if f".{INITIAL}." in name:
            parameter.requires_grad_(False)


def lora_layers(model: PeftModel, adapter_name: str) -> list[tuple[str, LoraLayer]]:
    """The adapted layers by their names in the base."""
    base = model.get_base_model()
    return [
        (name, module)
        for name, module in base.named_modules()
        if isinstance(module, LoraLayer) and adapter_name in module.lora_A
    ]


def pissa_factors(weight: Tensor, rank: int, scale: float) -> tuple[Tensor, Tensor]:
    """(A [R, in], B [out, R]) with s B A the best approximation of rank R of `weight` [out, in], its root in either."""
    left, values, right = _singular_vectors(weight, rank)
    root = (values / scale).sqrt()
    return root.unsqueeze(1) * right, left * root


def olora_factors(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """(A [R, in], B [out, R]): the first rows of R and columns of Q of weight = Q R."""
    orthogonal, upper = torch.linalg.qr(weight)
    return upper[:rank].contiguous(), orthogonal[:, :rank].contiguous()


@torch.no_grad()
def start_from_quantization_error(model: PeftModel, adapter_name: str, original: Callable[[str], Tensor]) -> None:
    """LoftQ: give a fresh LoRA what its layers have lost by quantisation.

    original: from a layer's name to its weight [out, in] before
    """
    for name, layer in lora_layers(model, adapter_name):
        base = layer.get_base_layer()
        weight_format = format_of(base)
        assert weight_format is not None
        kept = weight_format.dequantize(base, torch.float32)
        lost = original(name).to(kept.device, torch.float32) - kept
        down, up = pissa_factors(lost, layer.r[adapter_name], layer.scaling[adapter_name])
        layer.lora_A[adapter_name].weight.copy_(down)
        layer.lora_B[adapter_name].weight.copy_(up)


def _singular_vectors(weight: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """(U [out, R], Σ [R], Vᵀ [R, in]); of large weights by subspace iteration (Halko et al., arXiv:0909.4061)."""
    if min(weight.shape) <= _EXACT_SVD_SIZE:
        left, values, right = torch.linalg.svd(weight, full_matrices=False)
        return left[:, :rank], values[:rank], right[:rank]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        size = min(rank + _OVERSAMPLING, *weight.shape)
        left, values, right = torch.svd_lowrank(weight, q=size, niter=_POWER_ITERATIONS)
    return left[:, :rank], values[:rank], right[:, :rank].t()


def as_one_lora(model: PeftModel, adapter_name: str) -> tuple[dict[str, Tensor], Mapping[str, Any]]:
    """The state dict of [B, −B₀] [A; A₀] under PEFT's names, and what changes in its config."""
    trained = get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=False)
    initial = get_peft_model_state_dict(model, adapter_name=INITIAL, save_embedding_layers=False)
    joined = {
        name: torch.cat([tensor, initial[name]], dim=0 if ".lora_A." in name else 1) for name, tensor in trained.items()
    }
    config = model.peft_config[adapter_name]
    factor = math.sqrt(2) if config.use_rslora else 2
    return joined, {"r": 2 * config.r, "lora_alpha": factor * config.lora_alpha}
