"""What an adapter makes of a tensor of its base: one way for LoRA files, one for PEFT's other layers, two for weights.

A merger names the tensors that it changes and makes each from the base's, in float32, one at a time.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from peft import PeftModel
from peft.tuners.ln_tuning.layer import LNTuningLayer
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from affina.catalog.methods import method_named
from affina.errors import ExportError
from affina.models.adapters import AdapterInfo
from affina.models.adapters.attach import ADAPTER_NAME
from affina.models.adapters.files import WEIGHTS_FILE, WEIGHTS_KEY, read_adapter_tensors
from affina.models.compat import name_in_base
from affina.models.structure import base_model_of
from affina.models.weights import QuantizedLinear, quantized_layers


class Merger(Protocol):
    """names: of the tensors that are changed"""

    @property
    def names(self) -> frozenset[str]: ...

    def merged(self, name: str, tensor: Tensor) -> Tensor:
        """The tensor `name` of the result in float32, from the base's."""
        ...


def merger_of(info: AdapterInfo, model: nn.Module) -> Merger:
    """How the adapter of `info` is merged. model: the base with it attached, which some ways keep and read.

    Raises ExportError[merge-unsupported] for methods that are no change of weights.
    """
    if WEIGHTS_KEY in info.config:
        return WeightsMerger(load_file(info.directory / WEIGHTS_FILE))
    if info.method == "loftq":
        return DequantizedMerger(model)
    if info.is_plain_lora:
        base = base_model_of(model)
        return LowRankMerger(info, read_adapter_tensors(info.directory), _transposed_layers(base))
    require_mergeable(info)
    assert isinstance(model, PeftModel)
    return LayerMerger(model)


def require_mergeable(info: AdapterInfo) -> None:
    """Raises ExportError[merge-unsupported] for an adapter that cannot become part of the weights."""
    method = method_named(info.method)
    if method.merges != "no":
        return
    reasons = {
        "virtual tokens": "its trained tokens stand before the input; no weight of the model holds them",
        "bottleneck": "it is not linear: no weight does what it does",
        "unverified": "affina has not verified that PEFT merges it rightly (HRA and C3A give garbage on 8 bits)",
    }
    raise ExportError(
        "merge-unsupported",
        f"the adapter in {info.directory} is {method.title}, which cannot be merged",
        why=reasons[method.kind],
        fix="serve base and adapter with PEFT; train with `adapter: lora` where one plain model is needed",
    )


@dataclass(frozen=True, slots=True)
class LowRankMerger:
    """W + s · B A, from the file's matrices.

    pairs: (A [R, in], B [out, R]) by layer name     transposed: layers that store [in, out]
    """

    info: AdapterInfo
    pairs: Mapping[str, tuple[Tensor, Tensor]]
    transposed: frozenset[str]

    @property
    def names(self) -> frozenset[str]:
        return frozenset(f"{layer}.weight" for layer in self.pairs)

    def merged(self, name: str, tensor: Tensor) -> Tensor:
        layer = name.removesuffix(".weight")
        down, up = self.pairs[layer]
        update = self.info.scale_of(layer, down.shape[0]) * (up.float() @ down.float())
        return tensor.float() + (update.t() if layer in self.transposed else update)


@dataclass(frozen=True, slots=True)
class WeightsMerger:
    """Trained weights take the place of the base's."""

    weights: Mapping[str, Tensor]

    @property
    def names(self) -> frozenset[str]:
        return frozenset(self.weights)

    def merged(self, name: str, tensor: Tensor) -> Tensor:
        return self.weights[name].float()


class LayerMerger:
    """PEFT's own merge, layer by layer, on a float32 copy of the weight."""

    def __init__(self, model: PeftModel) -> None:
        base = model.get_base_model()
        self._layers: dict[str, Any] = {
            name: module for name, module in base.named_modules() if isinstance(module, BaseTunerLayer)
        }
        with_bias = ("bias",) if any(_scales_outputs(layer) for layer in self._layers.values()) else ()
        self._names = frozenset(
            f"{name}.{leaf}"
            for name, layer in self._layers.items()
            for leaf in ("weight", *with_bias)
            if getattr(layer.get_base_layer(), leaf, None) is not None
        )

    @property
    def names(self) -> frozenset[str]:
        return self._names

    def merged(self, name: str, tensor: Tensor) -> Tensor:
        path, _, leaf = name.rpartition(".")
        layer = self._layers[path]
        base = layer.get_base_layer()
        before = {key: parameter.data for key, parameter in base._parameters.items() if parameter is not None}
        for key, value in before.items():
            base._parameters[key].data = value.float().clone()
        if leaf in before:
            base._parameters[leaf].data = tensor.to(before[leaf].device, torch.float32).clone()
        layer.merge(safe_merge=False, adapter_names=[ADAPTER_NAME])
        result: Tensor = getattr(layer.get_base_layer(), leaf).data.float().cpu().clone()
        if isinstance(layer, LNTuningLayer):
            layer.unmerge()  # an exchange of modules, exact
        layer.merged_adapters.clear()
        for key, value in before.items():
            base._parameters[key].data = value
        return result


class DequantizedMerger:
    """Ŵ + s · B A: LoftQ takes out the error of the quantised base, so it belongs to that one."""

    def __init__(self, model: nn.Module) -> None:
        self._base = base_model_of(model)
        kept = {id(layer) for layer in quantized_layers(model)}
        self._names = frozenset(
            f"{name_in_base(name)}.weight" for name, module in self._base.named_modules() if id(module) in kept
        )

    @property
    def names(self) -> frozenset[str]:
        return self._names

    def merged(self, name: str, tensor: Tensor) -> Tensor:
        layer = self._base.get_submodule(name.removesuffix(".weight"))
        inner = layer.get_base_layer() if isinstance(layer, LoraLayer) else layer
        assert isinstance(inner, QuantizedLinear)
        weight = inner.dequantize(torch.float32)
        if isinstance(layer, LoraLayer):
            up, down = layer.lora_B[ADAPTER_NAME].weight, layer.lora_A[ADAPTER_NAME].weight
            weight = weight + layer.scaling[ADAPTER_NAME] * (up.float() @ down.float())
        return weight.detach().cpu()


def _scales_outputs(layer: object) -> bool:
    """Whether merging changes the bias too: (IA)³ and BOFT scale what comes out."""
    return type(layer).__module__.startswith(("peft.tuners.ia3", "peft.tuners.boft"))


def _transposed_layers(base: PreTrainedModel) -> frozenset[str]:
    return frozenset(name_in_base(name) for name, module in base.named_modules() if isinstance(module, Conv1D))
