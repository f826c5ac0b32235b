"""Whether the fused decoder runs a model, and if not, why not."""

from __future__ import annotations

import torch
from peft import PeftModel
from peft.tuners.lora import Linear as PeftLinear
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from affina.catalog.gpus import OLDEST_FUSED_CAPABILITY
from affina.catalog.methods import method_named
from affina.kernels.dispatch import has_triton
from affina.models.adapters.attach import ADAPTER_NAME, settings_of
from affina.models.families import DecoderSpec, Unsupported, read_decoder
from affina.models.fast.parameters import LoraPair
from affina.models.forward import isolation_of, verified_head
from affina.models.structure import base_model_of, text_config
from affina.models.weights import QuantizedLinear

PROJECTIONS = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)
"""The linear layers of a decoder layer, grouped by their common input."""


def decoder_of(model: nn.Module) -> DecoderSpec | Unsupported:
    """The decoder inside `model`, or the first reason why the fused decoder does not run it with this adapter."""
    base = base_model_of(model)
    spec = read_decoder(text_config(base))
    if isinstance(spec, Unsupported):
        return spec
    return (
        _unsupported_method(model)
        or _unsupported_device(base.device, base.dtype)
        or _unsupported_isolation(model)
        or _unsupported_head(model)
        or _unsupported_adapter(model)
        or _unsupported_layers(base, spec)
        or spec
    )


def lora_pair(layer: nn.Module) -> LoraPair | None:
    """The adapter of a linear layer, None when it has none."""
    if not isinstance(layer, LoraLayer):
        return None
    a, b = layer.lora_A[ADAPTER_NAME].weight, layer.lora_B[ADAPTER_NAME].weight
    assert isinstance(a, nn.Parameter)
    assert isinstance(b, nn.Parameter)
    return LoraPair(a, b, float(layer.scaling[ADAPTER_NAME]))


def frozen_layer(layer: nn.Module) -> nn.Module:
    """The frozen layer under an adapter, or the layer itself."""
    inner = layer.get_base_layer() if isinstance(layer, LoraLayer) else layer
    assert isinstance(inner, nn.Module)
    return inner


def layer_projections(layer: nn.Module) -> list[list[nn.Module]]:
    """The modules of PROJECTIONS in one decoder layer."""
    return [[layer.get_submodule(name) for name in group] for group in PROJECTIONS]


def _unsupported_method(model: nn.Module) -> Unsupported | None:
    method = method_named(settings_of(model).method)
    if method.fast_engine and isinstance(model, PeftModel):
        return None
    return Unsupported(f"it computes plain LoRA, not {method.title}")


def _unsupported_device(device: torch.device, dtype: torch.dtype) -> Unsupported | None:
    if device.type == "cpu":
        wanted = str(dtype).removeprefix("torch.")
        return None if dtype == torch.float32 else Unsupported(f"on a CPU it computes in float32, not {wanted}")
    if device.type != "cuda" or torch.version.hip is not None:
        return Unsupported(f"it has no kernels for {'ROCm' if device.type == 'cuda' else device.type}")
    capability = torch.cuda.get_device_capability(device)
    if capability < OLDEST_FUSED_CAPABILITY:
        return Unsupported(
            f"its attention needs compute capability {OLDEST_FUSED_CAPABILITY[0]}.{OLDEST_FUSED_CAPABILITY[1]}, "
            f"the card has {capability[0]}.{capability[1]}"
        )
    return None if has_triton() else Unsupported("Triton is not installed (`pip install triton`)")


def _unsupported_isolation(model: nn.Module) -> Unsupported | None:
    isolation = isolation_of(model)
    return None if isolation.layout == "packed" else Unsupported(isolation.reason)


def _unsupported_head(model: nn.Module) -> Unsupported | None:
    head = verified_head(model)
    if head is None:
        return Unsupported("the head is not a plain linear layer")
    if any(isinstance(part, Tensor) and part.requires_grad for part in (head.weight, head.bias)):
        return Unsupported("the head is trained")
    return None


def _unsupported_adapter(model: nn.Module) -> Unsupported | None:
    assert isinstance(model, PeftModel)
    if list(model.peft_config) != [ADAPTER_NAME]:
        return Unsupported("more than one adapter is attached")
    known: set[int] = set()
    for name, module in model.named_modules():
        if not isinstance(module, LoraLayer):
            continue
        if reason := _unsupported_lora(module):
            return Unsupported(f"{name.rpartition('model.')[2]} {reason}")
        known |= {id(module.lora_A[ADAPTER_NAME].weight), id(module.lora_B[ADAPTER_NAME].weight)}
    others = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in known]
    return Unsupported(f"{others[0]} is trained, which is not a LoRA matrix") if others else None


def _unsupported_lora(layer: LoraLayer) -> str | None:
    """Why one adapted layer is not plain LoRA, to follow the layer's name."""
    if type(layer) is not PeftLinear:
        return f"is adapted as {type(layer).__name__}, not as a plain LoRA layer"
    if getattr(layer, "use_dora", {}).get(ADAPTER_NAME) or ADAPTER_NAME in layer.lora_magnitude_vector:
        return "uses DoRA"
    if getattr(layer.lora_dropout[ADAPTER_NAME], "p", 0.0) > 0:
        return "has adapter dropout"
    if layer.lora_A[ADAPTER_NAME].bias is not None or layer.lora_B[ADAPTER_NAME].bias is not None:
        return "has a bias in its adapter"
    if layer.fan_in_fan_out:
        return "stores its weight transposed"
    if layer.merged_adapters or layer.disable_adapters:
        return "has its adapter merged or switched off"
    return None


def _unsupported_layers(base: nn.Module, spec: DecoderSpec) -> Unsupported | None:
    layers = base.get_submodule("model.layers")
    assert isinstance(layers, nn.ModuleList)
    projections: set[int] = set()
    for index, layer in enumerate(layers):
        for group in layer_projections(layer):
            kinds = {type(frozen_layer(member)) for member in group}
            if len(kinds) > 1 or not all(kind is nn.Linear or issubclass(kind, QuantizedLinear) for kind in kinds):
                names = " and ".join(sorted(kind.__name__ for kind in kinds))
                return Unsupported(f"layer {index} keeps its weights as {names}")
            projections |= {id(member) for member in group}
    for name, module in base.named_modules():
        if isinstance(module, LoraLayer) and id(module) not in projections:
            return Unsupported(f"{name} is adapted, which is not a projection of a decoder layer")
    if len(layers) != spec.num_layers:
        return Unsupported(f"the model has {len(layers)} layers, its config says {spec.num_layers}")
    return None
