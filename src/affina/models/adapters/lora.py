"""LoRA and rsLoRA through PEFT, on dense and quantised layers alike.

PEFT owns the parameters and the file; affina decides where they go, how they start and in which type they are computed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from affina.errors import ModelError
from affina.models.adapters.methods import method_named
from affina.models.adapters.targets import resolve_targets, short_names
from affina.models.compat import quiet_peft
from affina.models.weights import format_of

ADAPTER_NAME = "default"


def attach_adapter(
    model: PreTrainedModel,
    *,
    method: str = "lora",
    rank: int = 16,
    alpha: float = 32.0,
    dropout: float = 0.0,
    targets: str | Sequence[str] = "all-linear",
    seed: int = 0,
    trained_modules: Sequence[str] = (),
) -> PeftModel:
    """`model` with a fresh trainable adapter: float32 parameters, B zero, so that nothing changes before the first
    step.

    The base is frozen. A is drawn from `seed` alone, on the CPU, so the same seed gives the same adapter on every
    device, and the global random state is left as it was.

    trained_modules: names of modules of the model that are trained in full and saved with the adapter: a scalar head

    Raises ModelError for an unknown method, a target that
    matches nothing, or a weight format on which the method does not train.
    """
    entry = method_named(method)
    names = resolve_targets(model, targets)
    names = tuple(name for name in names if name not in trained_modules)
    layers = [model.get_submodule(name) for name in names]
    for name, layer in zip(names, layers, strict=True):
        weight_format = format_of(layer)
        if weight_format is None or weight_format.name not in entry.trains_on:
            raise ModelError(
                "adapter-unsupported",
                f"{entry.title} cannot train on {name} ({type(layer).__name__})",
                fix=f"use a base whose weights are {' or '.join(sorted(entry.trains_on))}",
            )
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type, unused-ignore]
        lora_dropout=dropout,
        target_modules=_compact(model, names),
        use_rslora=entry.scales_by_root,
        bias="none",
        # With a scalar head the adapter is one of transformers' sequence classification models.
        task_type="SEQ_CLS" if trained_modules else "CAUSAL_LM",
        modules_to_save=list(trained_modules) or None,
        fan_in_fan_out=any(isinstance(layer, Conv1D) for layer in layers),
    )
    with torch.random.fork_rng(devices=[]), quiet_peft():
        torch.manual_seed(seed)
        adapted = get_peft_model(model, config, adapter_name=ADAPTER_NAME)
    assert isinstance(adapted, PeftModel)
    prepare_for_training(adapted)
    return adapted


def prepare_for_training(model: PeftModel) -> None:
    """Adapter parameters in float32, and PEFT's float32 copies of every layer's input off.

    PEFT casts a 16-bit input to the adapter's float32 and autograd keeps that copy. `forward.compute_context` casts
    the small matrices instead; a forward pass of a 16-bit model outside of it fails loudly on mixed types.
    """
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
            assert ".lora_" in name or ".modules_to_save." in name, f"{name} is trainable but no adapter"
    if model.get_base_model().dtype != torch.float32:
        for module in model.modules():
            if isinstance(module, LoraLayer):
                module.cast_input_dtype_enabled = False


def _compact(model: PreTrainedModel, names: tuple[str, ...]) -> list[str]:
    """The shortest names that mean exactly these layers to PEFT: q_proj, … where every q_proj is meant."""
    shorts = short_names(names)
    wanted = set(names)
    means_more = any(name.rpartition(".")[2] in shorts and name not in wanted for name, _ in model.named_modules())
    return list(names) if means_more else list(shorts)


def has_adapter(model: nn.Module) -> bool:
    """Whether `model` carries an adapter."""
    return isinstance(model, PeftModel)


@contextmanager
def adapter_disabled(model: nn.Module) -> Iterator[None]:
    """Inside, the model answers as its base; a model without adapter already does."""
    if not isinstance(model, PeftModel):
        yield
        return
    with model.disable_adapter():
        yield
