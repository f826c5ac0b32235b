"""What training needs of an adapter beyond its file, so that a resumed run continues with the same bits.

PEFT's file is what inference needs: of P-tuning and prefix tuning without the encoder, of AdaLoRA without the ranks
that are masked (they may come back) and without their importance. PiSSA and OLoRA are saved as another adapter than the
one that is trained. For these a checkpoint has one more file, with every parameter under its own name.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from affina.catalog.methods import method_named
from affina.errors import ModelError
from affina.models.adapters.attach import ADAPTER_NAME, settings_of
from affina.models.adapters.files import WEIGHTS_FILE
from affina.models.adapters.storage import tensors_for_file
from affina.models.adapters.trained_weights import trained_weights_of
from affina.models.compat import is_adapter_name
from affina.models.structure import base_model_of

STATE_FILE = "adapter_training_state.safetensors"
_INCOMPLETE_FILES = ("pissa", "olora", "adalora", "prefix", "ptuning")
_IMPORTANCE = ("ipt", "exp_avg_ipt", "exp_avg_unc")
_EXTRA = "importance:"


def save_training_state(model: nn.Module, folder: Path) -> None:
    """Write into a checkpoint what its adapter file does not hold; nothing for methods whose file is complete."""
    method = method_named(settings_of(model).method)
    if method.name not in _INCOMPLETE_FILES and method.is_verified:
        return
    assert isinstance(model, PeftModel)
    tensors = tensors_for_file(_adapter_tensors(model))
    metadata = {}
    if method.name == "adalora":
        tensors |= {name: tensor.cpu() for name, tensor in _importance(model).items()}
        metadata = {"rank_pattern": json.dumps(model.peft_config[ADAPTER_NAME].rank_pattern)}
    save_file(tensors, folder / STATE_FILE, metadata=metadata)


def restore_adapter_weights(model: nn.Module, directory: Path) -> None:
    """Copy the parameters saved in `directory` into `model`'s adapter, exactly: both sides are float32.

    The model's parameter tensors stay the same objects, so an optimiser that holds them goes on working.

    Raises ModelError `adapter-mismatch` when names or shapes differ from the model's adapter.
    """
    if (directory / STATE_FILE).is_file():
        _restore_state(model, directory)
        return
    saved = load_file(directory / WEIGHTS_FILE)
    if trained_weights_of(model) is not None:
        base = base_model_of(model)
        current: Mapping[str, Tensor] = {name: base.get_parameter(name) for name in trained_weights_of(model).names}  # type: ignore[union-attr]
        _require_equal_shapes(current, saved, directory)
        _copy(current, saved)
        return
    assert isinstance(model, PeftModel)
    _require_equal_shapes(get_peft_model_state_dict(model, adapter_name=ADAPTER_NAME), saved, directory)
    set_peft_model_state_dict(model, saved, adapter_name=ADAPTER_NAME)


def _restore_state(model: nn.Module, directory: Path) -> None:
    saved = load_file(directory / STATE_FILE)
    importance = {name: saved.pop(name) for name in list(saved) if name.startswith(_EXTRA)}
    assert isinstance(model, PeftModel)
    current = _adapter_tensors(model)
    _require_equal_shapes(current, saved, directory)
    _copy(current, saved)
    if settings_of(model).method == "adalora":
        with safe_open(directory / STATE_FILE, framework="pt") as file:
            pattern = json.loads(file.metadata()["rank_pattern"])
        model.peft_config[ADAPTER_NAME].rank_pattern = pattern
        _set_importance(model, importance)


def _adapter_tensors(model: PeftModel) -> dict[str, Tensor]:
    """Every parameter of the adapter by its name in the model, trained or not."""
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if is_adapter_name(name) or parameter.requires_grad
    }


@torch.no_grad()
def _copy(current: Mapping[str, Tensor], saved: Mapping[str, Tensor]) -> None:
    for name, tensor in current.items():
        tensor.copy_(saved[name])


def _require_equal_shapes(current: Mapping[str, Tensor], saved: Mapping[str, Tensor], directory: Path) -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in current.items()}
    found = {name: tuple(tensor.shape) for name, tensor in saved.items()}
    if shapes != found:
        different = sorted(name for name in shapes.keys() | found.keys() if shapes.get(name) != found.get(name))
        raise ModelError(
            "adapter-mismatch",
            f"the adapter in {directory} has other parameters than this run: {different[0]}",
            why=f"{len(different)} names or shapes differ",
            fix="use the adapter section that it was trained with (config.yaml of its run)",
        )


# AdaLoRA's importance of every parameter, which PEFT keeps in plain dictionaries
# ----------------------------------------------------------------------------------------------------------------


def _allocator(model: PeftModel) -> Any:
    return model.base_model.rankallocator


def _importance(model: PeftModel) -> dict[str, Tensor]:
    return {
        f"{_EXTRA}{kind}:{name}": tensor.contiguous()
        for kind in _IMPORTANCE
        for name, tensor in getattr(_allocator(model), kind).items()
    }


def _set_importance(model: PeftModel, saved: Mapping[str, Tensor]) -> None:
    allocator = _allocator(model)
    allocator.reset_ipt()
    device = next(iter(_adapter_tensors(model).values())).device
    for key, tensor in saved.items():
        _, kind, name = key.split(":", 2)
        getattr(allocator, kind)[name] = tensor.to(device)
