"""A fresh, trainable adapter on a frozen model.

PEFT owns the parameters and the file; affina decides where they go, how they start and in which type they are computed,
and refuses what PEFT would do silently wrong.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from affina.catalog.adapter_settings import AdapterSettings
from affina.catalog.methods import AdapterMethod, method_named
from affina.config.rules import (
    WHAT_KEEPS_A_HEAD,
    WHAT_TRAINS_AT_LOWEST,
    WHY_NOT_LOWEST,
    what_trains_instead,
    why_no_head,
    why_not_on,
)
from affina.errors import ModelError
from affina.models.adapters.factors import start_from_weights
from affina.models.adapters.limits import check_sizes
from affina.models.adapters.peft_configs import Site, option_refused, peft_config
from affina.models.adapters.targets import residual_norms, resolve_targets, short_names
from affina.models.adapters.trained_weights import train_weights, trained_weights_of
from affina.models.compat import is_adapter_name, quiet_peft
from affina.models.structure import base_model_of
from affina.models.weights import Int8Embedding, Int8Head, format_of, quantized_layers
from affina.models.weights.dense_view import show_dense_weight

ADAPTER_NAME = "default"
_READS_DENSE_WEIGHT = ("dora", "boft")
_READS_SHAPE_OF_WEIGHT = ("loha", "lokr")
_SETTINGS: WeakKeyDictionary[nn.Module, AdapterSettings] = WeakKeyDictionary()


def attach_adapter(
    model: PreTrainedModel,
    *,
    method: str = "lora",
    rank: int | None = None,
    alpha: float | None = None,
    dropout: float | None = None,
    targets: str | Sequence[str] | None = None,
    seed: int = 0,
    options: Mapping[str, Any] | None = None,
    trained_modules: Sequence[str] = (),
) -> PeftModel | PreTrainedModel:
    """`model` with a fresh adapter in float32, wrapped by PEFT; `model` itself where its own weights are trained.

    rank, alpha, dropout, targets: of the methods that have them; None: the method's default
    options: the method's other settings by their names in the section `adapter`
    trained_modules: names of modules of the model that are trained in full and saved with the adapter: a scalar head

    The base is frozen. What is random is drawn from `seed` alone, on the CPU, so the same seed gives the same adapter
    on every device, and the global random state is left as it was. Most methods change nothing before the first step;
    virtual tokens do.

    Raises ModelError: adapter-method-unknown, target-unmatched, adapter-unsupported (a weight format on which the
                       method does not train), rank-above-layer, block-size-unfit, adapter-option-wrong,
                       num-layers-too-large.
    """
    entry = method_named(method)
    given: dict[str, Any] = {"rank": rank, "alpha": alpha, "dropout": dropout, "targets": targets, **(options or {})}
    values = {name: value for name, value in given.items() if value is not None}
    if "targets" in values and not isinstance(values["targets"], str):
        values["targets"] = tuple(values["targets"])
    settings = entry.settings(**values)
    if trained_modules and not entry.keeps_head:
        raise ModelError(
            "adapter-unsupported",
            f"a reward model's head is not trained beside {entry.title}",
            why=why_no_head(entry),
            fix=WHAT_KEEPS_A_HEAD,
        )
    if entry.kind == "weights" and method != "layernorm":
        _refuse_trained_codes(entry, model)
        train_weights(model, settings)
        remember_settings(model, settings)
        return model
    names = tuple(name for name in _target_names(model, entry, settings) if name not in trained_modules)
    _check_layers(model, entry, settings, names)
    prepare_layers(model, method, names)
    config = peft_config(settings, _site(model, settings, names))
    if trained_modules:
        # With a scalar head the adapter is one of transformers' sequence classification models.
        config.task_type, config.modules_to_save = "SEQ_CLS", list(trained_modules)
    with torch.random.fork_rng(devices=[]), quiet_peft():
        torch.manual_seed(seed)
        adapted = _get_peft_model(model, config, entry)
        if method in ("pissa", "olora"):
            start_from_weights(adapted, method, ADAPTER_NAME)
    prepare_for_training(adapted)
    remember_settings(adapted, settings)
    return adapted


def _get_peft_model(model: PreTrainedModel, config: PeftConfig, entry: AdapterMethod) -> PeftModel:
    try:
        adapted = get_peft_model(model, config, adapter_name=ADAPTER_NAME)
    except (ValueError, TypeError, ImportError) as error:
        if not entry.is_verified:
            raise option_refused(entry.name, error) from error
        raise ModelError(
            "adapter-unsupported",
            f"PEFT does not put {entry.title} on {type(model).__name__}",
            why=" ".join(str(error).split())[:300],
            fix="write `adapter: lora`, which goes on every linear layer",
        ) from error
    assert isinstance(adapted, PeftModel)
    return adapted


def prepare_layers(model: nn.Module, method: str, names: Sequence[str]) -> None:
    """Let quantised layers show the weight that the method's layers look at."""
    if method in _READS_DENSE_WEIGHT or method in _READS_SHAPE_OF_WEIGHT:
        base = base_model_of(model)
        for name in names:
            show_dense_weight(base.get_submodule(name), shape_only=method in _READS_SHAPE_OF_WEIGHT)


def prepare_for_training(model: PeftModel) -> None:
    """Adapter parameters in float32, and PEFT's float32 copies of every layer's input off where LoRA would make them.

    PEFT casts a 16-bit input to the adapter's float32 and autograd keeps that copy. `forward.compute_context` casts
    the small matrices instead; a forward pass of a 16-bit model outside of it fails loudly on mixed types.
    """
    for name, parameter in model.named_parameters():
        if parameter.requires_grad or is_adapter_name(name):
            parameter.data = parameter.data.float()
            assert is_adapter_name(name), f"{name} is trainable but no adapter"
    if model.get_base_model().dtype != torch.float32:
        for module in model.modules():
            if isinstance(module, LoraLayer):
                module.cast_input_dtype_enabled = False


def remember_settings(model: nn.Module, settings: AdapterSettings) -> None:
    """What was attached, for those who save it."""
    _SETTINGS[base_model_of(model)] = settings


def settings_of(model: nn.Module) -> AdapterSettings:
    """The settings of the adapter on `model`; of one that was loaded, only the method. Plain LoRA's for one that PEFT
    has attached without affina."""
    return _SETTINGS.get(base_model_of(model)) or AdapterSettings()


def fast_learning_parameters(model: nn.Module) -> tuple[list[nn.Parameter], float]:
    """LoRA+: the parameters that learn faster than the others, and how much; none for other methods."""
    settings = settings_of(model)
    if settings.method != "loraplus":
        return [], 1.0
    return [p for name, p in model.named_parameters() if ".lora_B." in name], settings.learning_rate_ratio


def has_adapter(model: nn.Module) -> bool:
    """Whether `model` carries an adapter, or weights of its own that were trained."""
    return isinstance(model, PeftModel) or trained_weights_of(model) is not None


def _target_names(model: PreTrainedModel, entry: AdapterMethod, settings: AdapterSettings) -> tuple[str, ...]:
    if entry.name == "layernorm":
        return residual_norms(model)
    return resolve_targets(model, settings.targets) if "targets" in entry.fields else ()


def _check_layers(
    model: PreTrainedModel, entry: AdapterMethod, settings: AdapterSettings, names: Sequence[str]
) -> None:
    layers = [] if entry.name == "layernorm" else [(name, model.get_submodule(name)) for name in names]
    _refuse_formats(entry, layers)
    shapes = {name: weight_format.shape(layer) for name, layer in layers if (weight_format := format_of(layer))}
    check_sizes(entry, settings, shapes)


def _refuse_trained_codes(entry: AdapterMethod, model: PreTrainedModel) -> None:
    """Refuse to train weights of the model where they are codes. An int8 vocabulary is beside the last layers."""
    if entry.trains_vocabulary and isinstance(model.get_input_embeddings(), Int8Embedding):
        raise ModelError(
            "adapter-unsupported",
            f"{entry.title} cannot train an embedding and a head in int8",
            why=WHY_NOT_LOWEST,
            fix=WHAT_TRAINS_AT_LOWEST,
        )
    layers = [layer for layer in quantized_layers(model) if not isinstance(layer, Int8Head)]
    _refuse_formats(entry, [("its weights", layer) for layer in layers])


def _refuse_formats(entry: AdapterMethod, layers: Sequence[tuple[str, nn.Module]]) -> None:
    for name, layer in layers:
        weight_format = format_of(layer)
        if weight_format is None or weight_format.name not in entry.trains_on:
            kept_as = weight_format.name if weight_format is not None else "unknown"
            raise ModelError(
                "adapter-unsupported",
                f"{entry.title} cannot train on {name} ({type(layer).__name__})",
                why=why_not_on(entry, kept_as),
                fix=what_trains_instead(entry, kept_as),
            )


def _site(model: PreTrainedModel, settings: AdapterSettings, names: tuple[str, ...]) -> Site:
    compact = _compact(model, names)
    inner = tuple(name for name in compact if name.rpartition(".")[2] in INNER_OUTPUTS or ".mlp." in name)
    is_transposed = any(isinstance(model.get_submodule(name), Conv1D) for name in names)
    return Site(compact, inner if settings.method == "ia3" else (), is_transposed)


INNER_OUTPUTS = ("down_proj", "fc2", "dense_4h_to_h", "fc_out", "w2")
"""What architectures call the layer whose input is the MLP's inner activation."""


def _compact(model: PreTrainedModel, names: tuple[str, ...]) -> tuple[str, ...]:
    """The shortest names that mean exactly these layers to PEFT: q_proj, … where every q_proj is meant."""
    shorts = short_names(names)
    wanted = set(names)
    means_more = any(name.rpartition(".")[2] in shorts and name not in wanted for name, _ in model.named_modules())
    return names if means_more else shorts
