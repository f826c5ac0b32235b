"""Bottleneck adapters: a small MLP with a residual after chosen layers, as a tuner that PEFT attaches, saves and
switches.

    y = h + U relu(D drop(h) + d) + u        h = W x + b, the output of the adapted layer
    D: [m, o]   d: [m]   U: [o, m]   u: [o]   m the bottleneck, o the layer's outputs

Houlsby et al., arXiv:1902.00751: after attention and after the MLP, before the residual addition of each. Pfeiffer et
al., arXiv:2005.00247: after the MLP only. The last layer of either block (o_proj, down_proj) gives exactly its output,
so that the adapter wraps that layer. U starts as zero: nothing changes before the first step. The layer norms stay
frozen, unlike in the first paper: that is `adapter: layernorm`.

PEFT has no such method, and its public registration takes only its own names; `compat.register_peft_tuner` has the
rest.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import Tensor, nn

from affina.models.compat import register_peft_tuner
from affina.models.weights import format_of

PEFT_NAME = "BOTTLENECK"


@dataclass
class BottleneckConfig(PeftConfig):  # type: ignore[misc]
    """As it stands in adapter_config.json."""

    bottleneck_size: int = field(default=64)
    dropout: float = field(default=0.0)
    target_modules: list[str] | str | None = field(default=None)
    exclude_modules: list[str] | str | None = field(default=None)
    modules_to_save: list[str] | None = field(default=None)
    bias: str = field(default="none")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PEFT_NAME
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)  # type: ignore[assignment]


class BottleneckLinear(nn.Module, BaseTunerLayer):  # type: ignore[misc]
    """A linear layer of any weight format, followed by its bottlenecks: one for each adapter."""

    adapter_layer_names = ("bottleneck_down", "bottleneck_up")
    other_param_names = ("bottleneck_dropout",)
    # Of BaseTunerLayer, which has no types.
    active_adapters: list[str]
    disable_adapters: bool
    set_adapter: Callable[..., None]
    _cast_input_dtype: Callable[[Tensor, torch.dtype], Tensor]
    _move_adapter_to_device_of_base_layer: Callable[[str], None]

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: BottleneckConfig) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.bottleneck_down = nn.ModuleDict({})
        self.bottleneck_up = nn.ModuleDict({})
        self.bottleneck_dropout = nn.ModuleDict({})
        self.merged_adapters: list[str] = []
        self._disable_adapters = False
        self._active_adapter = adapter_name
        weight_format = format_of(base_layer)
        assert weight_format is not None, f"{type(base_layer).__name__} is no linear layer"
        self.out_features, self.in_features = weight_format.shape(base_layer)
        self.update_layer(adapter_name, config)

    def update_layer(self, adapter_name: str, config: BottleneckConfig) -> None:
        """A fresh bottleneck called `adapter_name`."""
        size = config.bottleneck_size
        up = nn.Linear(size, self.out_features)
        self.bottleneck_down[adapter_name] = nn.Linear(self.out_features, size)
        self.bottleneck_up[adapter_name] = up
        self.bottleneck_dropout[adapter_name] = nn.Dropout(config.dropout) if config.dropout else nn.Identity()
        with torch.no_grad():
            up.weight.zero_()
            up.bias.zero_()
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """[…, in] → […, out]"""
        result: Tensor = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters:
            return result
        for name in self.active_adapters:
            if name not in self.bottleneck_down:
                continue
            down = self.bottleneck_down[name]
            assert isinstance(down, nn.Linear)
            hidden = self._cast_input_dtype(result, down.weight.dtype)
            inner = down(self.bottleneck_dropout[name](hidden))
            update: Tensor = self.bottleneck_up[name](torch.relu(inner))
            result = result + update.to(result.dtype)
        return result

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        raise ValueError("a bottleneck adapter is not linear: it cannot be merged into a weight")

    def unmerge(self) -> None:
        raise ValueError("a bottleneck adapter is never merged")


class BottleneckModel(BaseTuner):  # type: ignore[misc]
    """A model whose target layers are followed by bottlenecks."""

    prefix = "bottleneck_"
    tuner_layer_cls = BottleneckLinear
    target_module_mapping: dict[str, Sequence[str]] = {}  # noqa: RUF012 - PEFT's own name and type

    def _create_and_replace(
        self,
        peft_config: BottleneckConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **optional: Any,
    ) -> None:
        if isinstance(target, BottleneckLinear):
            target.update_layer(adapter_name, peft_config)
            return
        layer = BottleneckLinear(target, adapter_name, peft_config)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)


register_peft_tuner(PEFT_NAME, BottleneckConfig, BottleneckModel, BottleneckModel.prefix)
