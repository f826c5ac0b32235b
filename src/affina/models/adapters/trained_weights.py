"""Methods without an adapter: weights of the model itself are trained, all of them or those of the last layers.

Trained weights are float32, whatever the type of the computation, as adapters are. The base's own values are kept in
main memory. Switched off, the model is its base again, bit for bit. That is not what a model which has learnt nothing
answers: its float32 weights round less than the base's in 16 bits. What is compared with the model step by step is
therefore the base's values in the types of the trained ones (`as_trained`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from peft.tuners.ln_tuning.layer import LNTuningLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from affina.catalog.adapter_settings import AdapterSettings
from affina.errors import ModelError
from affina.models.structure import base_model_of, body_of


@dataclass(frozen=True, slots=True)
class TrainedWeights:
    """original: the base's values by name, in main memory; compute_dtype: of the forward pass"""

    original: Mapping[str, Tensor]
    compute_dtype: torch.dtype

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.original)


_TRAINED: WeakKeyDictionary[nn.Module, TrainedWeights] = WeakKeyDictionary()


def train_weights(model: PreTrainedModel, settings: AdapterSettings) -> None:
    """Unfreeze what `settings` name: everything, or the last decoder layers.

    Raises ModelError[num-layers-too-large].
    """
    prefixes = _last_layers(model, settings.num_layers) if settings.method == "freeze" else ("",)
    names = [name for name, _ in model.named_parameters() if name.startswith(prefixes)]
    hold_weights(model, names)
    for name in names:
        model.get_parameter(name).requires_grad_(True)


def hold_weights(model: PreTrainedModel, names: list[str]) -> None:
    """Keep the base's values of these parameters, and the parameters themselves in float32."""
    _TRAINED[model] = TrainedWeights(
        {name: model.get_parameter(name).detach().to("cpu", copy=True) for name in names}, model.dtype
    )
    for name in names:
        parameter = model.get_parameter(name)
        parameter.data = parameter.data.float()


def trained_weights_of(model: nn.Module) -> TrainedWeights | None:
    """What of the model itself is trained; None where an adapter is, or nothing."""
    return _TRAINED.get(base_model_of(model))


@contextmanager
def original_weights(model: nn.Module, *, as_trained: bool = False) -> Iterator[None]:
    """Inside, the trained parameters have the base's values, in the base's type or, `as_trained`, in their own."""
    base, trained = base_model_of(model), trained_weights_of(model)
    assert trained is not None
    parameters = {name: base.get_parameter(name) for name in trained.names}
    values = (
        (parameter, trained.original[name].to(parameter.device, parameter.dtype if as_trained else None))
        for name, parameter in parameters.items()
    )
    with _values(values):
        yield


@contextmanager
def original_norms_as_trained(model: nn.Module) -> Iterator[None]:
    """Inside, the norms beside which PEFT trains others have those ones' type; nothing where LayerNorms are not
    tuned."""
    layers = [module for module in model.modules() if isinstance(module, LNTuningLayer)]
    pairs = (
        pair
        for layer in layers
        for pair in zip(layer.base_layer.parameters(), layer.ln_tuning_layers.parameters(), strict=True)
    )
    with _values((original, original.data.to(tuned.dtype)) for original, tuned in pairs):
        yield


@contextmanager
def _values(values: Iterable[tuple[nn.Parameter, Tensor]]) -> Iterator[None]:
    """Inside, parameters have other values; they stay the same objects."""
    before: list[tuple[nn.Parameter, Tensor]] = []
    try:
        for parameter, value in values:
            before.append((parameter, parameter.data))
            parameter.data = value
        yield
    finally:
        for parameter, value in before:
            parameter.data = value


def _last_layers(model: PreTrainedModel, count: int) -> tuple[str, ...]:
    """Prefixes of the parameters of the last `count` decoder layers."""
    body = body_of(model)
    found = None
    if body is not None:
        lists = [(name, child) for name, child in body.named_modules() if isinstance(child, nn.ModuleList)]
        found = max(lists, key=lambda item: len(item[1]), default=None)
    if found is None or body is None:
        raise ModelError(
            "adapter-unsupported",
            f"the layers of {type(model).__name__} cannot be told from the rest",
            fix="write `adapter: full`, or `adapter: lora`",
        )
    name, layers = found
    if count > len(layers):
        raise ModelError(
            "num-layers-too-large",
            f"adapter.num_layers is {count}; the model has {len(layers)} layers",
            fix=f"write `num_layers: {len(layers)}` or less, or `adapter: full`, which trains the embedding too",
        )
    place = next(prefix for prefix, module in model.named_modules() if module is layers)
    assert place.endswith(name)
    return tuple(f"{place}.{index}." for index in range(len(layers) - count, len(layers)))
