"""From a transformers model with a PEFT adapter to a `Decoder` on the same memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from affina.catalog.save_policy import LayerRanks
from affina.kernels.dispatch import use_triton
from affina.kernels.swiglu import MAX_FOLDED_RANK
from affina.models.families import DecoderSpec
from affina.models.fast.decoder import Decoder
from affina.models.fast.layer import DecoderLayer
from affina.models.fast.linear import AdaptedLinear, output_slices
from affina.models.fast.offload import HostBuffers
from affina.models.fast.parameters import FlatAdapter, GroupSlice
from affina.models.fast.support import frozen_layer, layer_projections, lora_pair
from affina.models.fast.weights import Workspace, build_stack
from affina.models.forward import verified_head
from affina.models.structure import base_model_of, body_of


def build_decoder(
    model: PeftModel, spec: DecoderSpec, *, is_lean: bool = False, adapter_on_host: bool = False
) -> Decoder:
    """The fused decoder of a supported model. Moves PEFT's parameters, and dense q/k/v and gate/up weights, into joint
    tensors of which the modules' own become views.

    is_lean:         the least memory for weights that are expanded
    adapter_on_host: see `FlatAdapter`
    """
    base = base_model_of(model)
    body = body_of(base)
    head = verified_head(model)
    assert body is not None
    assert head is not None
    device, dtype = base.device, base.dtype
    modules: list[Any] = list(body.get_submodule("layers").children())
    groups = [group for module in modules for group in layer_projections(module)]
    pairs = [[lora_pair(member) for member in group] for group in groups]
    adapter = FlatAdapter(pairs, compute_dtype=dtype, on_host=adapter_on_host)
    workspace = Workspace(device, dtype)
    linears = [
        _adapted_linear(group, slices, workspace, merges=dtype == torch.float32, splits=is_lean)
        for group, slices in zip(groups, adapter.slices, strict=True)
    ]
    layers = [
        DecoderLayer(
            spec,
            spec.windows[index],
            _folds(adapter.slices[4 * index : 4 * index + 4], device, dtype),
            _weight(module.input_layernorm),
            _weight(module.post_attention_layernorm),
            _weight(module.self_attn.q_norm) if spec.has_qk_norm else None,
            _weight(module.self_attn.k_norm) if spec.has_qk_norm else None,
            *linears[4 * index : 4 * index + 4],
        )
        for index, module in enumerate(modules)
    ]
    adapted = [index for index in range(len(layers)) if any(adapter.slices[4 * index : 4 * index + 4])]
    return Decoder(
        spec=spec,
        layers=layers,
        embedding=base.get_input_embeddings(),
        final_norm=_weight(body.get_submodule("norm")),
        head=head,
        adapter=adapter,
        first_adapted=adapted[0],
        host=HostBuffers(device),
    )


def largest_ranks(decoder: Decoder) -> LayerRanks:
    """The ranks of the layer with the largest adapters."""
    return max((_ranks(layer) for layer in decoder.layers), key=lambda layer: layer.total)


def _ranks(layer: DecoderLayer) -> LayerRanks:
    groups = [linear.slices for linear in layer.linears]
    single = [pair.rank for group in groups if group is not None for pair in group.pairs if pair is not None]
    qkv, output, gate_up, down = (group.total_rank if group else 0 for group in groups)
    return LayerRanks(qkv, output, gate_up, down, largest=max(single, default=0))


def _folds(slices: Sequence[GroupSlice | None], device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a layer's low-rank updates are added inside its Triton kernels."""
    ranks = [pair.rank for group in slices if group is not None for pair in group.pairs if pair is not None]
    return (
        dtype != torch.float32
        and use_triton(torch.empty(0, device=device))
        and max(ranks, default=0) <= MAX_FOLDED_RANK
    )


def _adapted_linear(
    group: list[nn.Module], slices: GroupSlice | None, workspace: Workspace, *, merges: bool, splits: bool
) -> AdaptedLinear:
    frozen = [frozen_layer(member) for member in group]
    num_extra = 0 if slices is None or merges else slices.total_rank
    stack = build_stack(frozen, num_extra, workspace, splits=splits)
    assert stack is not None, "support.py lets only known formats through"
    if merges:
        workspace.reserve(stack.shape[0] * stack.shape[1])
    sizes = [int(layer.out_features) for layer in frozen]  # type: ignore[arg-type]
    return AdaptedLinear(stack, slices, output_slices(sizes), _joint_bias(frozen, sizes), workspace, merges)


def _joint_bias(frozen: list[nn.Module], sizes: list[int]) -> Tensor | None:
    """[Σ out] with zeros where a projection has none, or None."""
    biases = [layer.bias for layer in frozen]
    present = [bias for bias in biases if isinstance(bias, Tensor)]
    if not present:
        return None
    return torch.cat(
        [
            bias.data if isinstance(bias, Tensor) else present[0].new_zeros(size)
            for bias, size in zip(biases, sizes, strict=True)
        ]
    )


def _weight(norm: nn.Module) -> Tensor:
    weight = norm.weight
    assert isinstance(weight, Tensor)
    return weight.detach()
