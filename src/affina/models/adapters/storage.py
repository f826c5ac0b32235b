"""An adapter on disk: PEFT's two files, so that the whole ecosystem loads it, and `affina.json`, so that we can trust
it.

PiSSA and OLoRA are saved as the plain LoRA of rank 2R that they are (factors.py), EVA and LoftQ without their way of
starting: loading must not start them again.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from affina.catalog.methods import method_named
from affina.errors import ModelError
from affina.models.adapters.attach import (
    ADAPTER_NAME,
    prepare_for_training,
    prepare_layers,
    remember_settings,
    settings_of,
)
from affina.models.adapters.factors import INITIAL, as_one_lora
from affina.models.adapters.files import (
    CONFIG_FILE,
    FORMAT_VERSION,
    INFO_FILE,
    PEFT_PREFIX,
    WEIGHTS_FILE,
    WEIGHTS_KEY,
    AdapterInfo,
    open_weights,
    read_adapter_info,
    sha256_of,
)
from affina.models.adapters.fitting import base_mismatch, check_base, check_complete, check_format, check_head
from affina.models.adapters.identity import base_identity
from affina.models.adapters.trained_weights import hold_weights, trained_weights_of
from affina.models.compat import quiet_peft
from affina.models.structure import base_model_of


def save_adapter(
    model: nn.Module,
    directory: Path | str,
    *,
    contract: Mapping[str, Any],
    base: Mapping[str, Any] | None = None,
) -> Path:
    """Writes the adapter of `model` into `directory` (made if absent) and returns it.

    base: identity of the base (default: `base_identity(model)`), to which the caller may add `quantization`,
          `revision`.
    Every file is flushed to the disk; replacing an older adapter at one stroke is the caller's business.
    """
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    identity = dict(base) if base is not None else base_identity(model)
    state, config = _state_and_config(model)
    save_file(tensors_for_file(state), folder / WEIGHTS_FILE, metadata={"format": "pt"})
    config |= {"inference_mode": True, "base_model_name_or_path": identity.get("path") or None}
    _write_json(folder / CONFIG_FILE, {key: _jsonable(value) for key, value in config.items()})
    info = {
        "format": FORMAT_VERSION,
        "method": settings_of(model).method,
        "contract": dict(contract),
        "base": identity,
        "versions": {name: importlib.metadata.version(name) for name in ("affina", "peft", "transformers", "torch")},
        "sha256": {name: sha256_of(folder / name) for name in (WEIGHTS_FILE, CONFIG_FILE)},
    }
    _write_json(folder / INFO_FILE, info)
    for name in (WEIGHTS_FILE, CONFIG_FILE, INFO_FILE):
        _flush(folder / name)
    return folder


def tensors_for_file(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors on the CPU, each in memory of its own: safetensors refuses what two layers share (RandLoRA's
    bases)."""
    tensors: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in state.items():
        kept = tensor.detach().to("cpu").contiguous()
        tensors[name] = kept.clone() if kept.data_ptr() in seen else kept
        seen.add(kept.data_ptr())
    return tensors


def _state_and_config(model: nn.Module) -> tuple[Mapping[str, Tensor], dict[str, Any]]:
    """What goes into the two files."""
    settings = settings_of(model)
    trained = trained_weights_of(model)
    if trained is not None:
        base = base_model_of(model)
        config: dict[str, Any] = {WEIGHTS_KEY: settings.method}
        return {name: base.get_parameter(name) for name in trained.names}, config
    assert isinstance(model, PeftModel)
    if INITIAL in model.peft_config:
        state, changes = as_one_lora(model, ADAPTER_NAME)
    elif settings.method == "adalora":
        return _adalora_state_and_config(model)
    else:
        state = get_peft_model_state_dict(model, adapter_name=ADAPTER_NAME, save_embedding_layers=False)
        changes = {}
    return state, {**model.peft_config[ADAPTER_NAME].to_dict(), **changes}


def _adalora_state_and_config(model: PeftModel) -> tuple[Mapping[str, Tensor], dict[str, Any]]:
    """The ranks that are not masked now. PEFT would take those of the last masking, and drop what has grown since."""
    config = model.peft_config[ADAPTER_NAME]
    at_last_masking = config.rank_pattern
    if at_last_masking is not None:
        config.rank_pattern = {
            name: (parameter != 0).flatten().tolist()
            for name, parameter in model.get_base_model().named_parameters()
            if name.endswith(f".lora_E.{ADAPTER_NAME}")
        }
    try:
        state = get_peft_model_state_dict(model, adapter_name=ADAPTER_NAME, save_embedding_layers=False)
        return state, config.to_dict()
    finally:
        config.rank_pattern = at_last_masking


def load_adapter(
    model: PreTrainedModel, directory: Path | str, *, trainable: bool = False
) -> PeftModel | PreTrainedModel:
    """`model` with the adapter of `directory`, or with the trained weights that are there.

    Raises ModelError: adapter-missing, adapter-damaged (checksum, unreadable file), adapter-unsupported,
                       adapter-base-mismatch (trained on another base: shapes or weights differ, or its weight format).
    """
    info = read_adapter_info(directory)
    check_base(model, info)
    method = method_named(info.method)
    check_format(model, info)
    check_head(model, info)
    if trainable and method.kind == "virtual tokens":
        raise ModelError(
            "adapter-unsupported",
            f"the adapter in {info.directory} is {method.title}, which cannot be trained further from its file",
            why="PEFT loads virtual tokens for inference alone; the file does not hold an encoder that made them",
            fix="resume its run, whose checkpoints hold all that is trained, or load it to answer with",
        )
    remember_settings(model, method.settings())
    if WEIGHTS_KEY in info.config:
        return _load_weights(model, info, trainable=trainable)
    prepare_layers(model, method.name, _adapted_layers(model, info))
    try:
        with quiet_peft(), warnings.catch_warnings():
            # Of a config's keys that PEFT does not know; whether the parameters fit is found out below.
            warnings.filterwarnings("ignore", message="Unexpected keyword arguments.*")
            adapted = PeftModel.from_pretrained(
                model, str(info.directory), adapter_name=ADAPTER_NAME, is_trainable=trainable
            )
    except (RuntimeError, ValueError, KeyError) as error:
        # Of methods other than LoRA only PEFT knows which shapes a file must have.
        raise base_mismatch(info, base_identity(model), " ".join(str(error).split())[:300]) from error
    assert isinstance(adapted, PeftModel)
    check_complete(adapted, info)
    if trainable:
        prepare_for_training(adapted)
    else:
        adapted.requires_grad_(False)  # PEFT leaves virtual tokens trainable
    return adapted


def _load_weights(model: PreTrainedModel, info: AdapterInfo, *, trainable: bool) -> PreTrainedModel:
    saved = load_file(info.directory / WEIGHTS_FILE)
    own = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    wrong = next((name for name, tensor in saved.items() if own.get(name) != tuple(tensor.shape)), None)
    if wrong is not None:
        raise base_mismatch(info, base_identity(model), f"{wrong} has another shape, or is not in this model")
    hold_weights(model, list(saved))
    with torch.no_grad():
        for name, tensor in saved.items():
            model.get_parameter(name).copy_(tensor)
            model.get_parameter(name).requires_grad_(trainable)
    return model


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def _jsonable(value: Any) -> Any:
    if isinstance(value, set | frozenset):
        return sorted(value)
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    return getattr(value, "value", value)


def _flush(path: Path) -> None:
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def _adapted_layers(model: nn.Module, info: AdapterInfo) -> list[str]:
    """Names of the base's layers that have parameters in the file."""
    with open_weights(info.directory / WEIGHTS_FILE) as file:
        keys = [key.removeprefix(PEFT_PREFIX) for key in file.keys()]  # noqa: SIM118 (not a mapping)
    names = {name for name, _ in base_model_of(model).named_modules()}
    prefixes = (key.split(".")[:length] for key in keys for length in range(1, key.count(".") + 1))
    found = {".".join(parts) for parts in prefixes}
    layers = found & names
    return sorted(name for name in layers if not any(other.startswith(f"{name}.") for other in layers))
