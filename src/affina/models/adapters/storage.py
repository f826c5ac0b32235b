"""An adapter on disk: PEFT's two files, so that the whole ecosystem loads it, and `affina.json`, so that we can trust
it.

adapter_model.safetensors   parameters, PEFT's names
adapter_config.json         PEFT's config with the base model's name
affina.json                 template contract, identity of the base, versions, checksums of the two files above
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel

from affina.errors import Location, ModelError
from affina.models.adapters.identity import base_identity
from affina.models.adapters.lora import ADAPTER_NAME, prepare_for_training
from affina.models.compat import quiet_peft

WEIGHTS_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"
INFO_FILE = "affina.json"
FORMAT_VERSION = 1
_PEFT_PREFIX = "base_model.model."
_UNSUPPORTED_OPTIONS = (
    "use_dora",
    "modules_to_save",
    "alora_invocation_tokens",
    "lora_bias",
    "target_parameters",
    "layer_replication",
    "trainable_token_indices",
)


@dataclass(frozen=True, slots=True)
class AdapterInfo:
    """What is known about a saved adapter.

    config:   PEFT's adapter_config.json
    contract: the template contract under which it was trained; None for adapters that affina did not write
    base:     identity of its base, with `quantization` when it was trained on a quantised one; None likewise
    versions: of the packages that wrote it
    """

    directory: Path
    config: dict[str, Any]
    contract: dict[str, Any] | None
    base: dict[str, Any] | None
    versions: dict[str, str]

    @property
    def rank(self) -> int:
        return int(self.config["r"])

    def scale_of(self, layer: str, rank: int) -> float:
        """s of W + s · B A for one layer, whose A has `rank` rows; files of other tools may set alpha per layer."""
        patterns = self.config.get("alpha_pattern") or {}
        matching = (value for key, value in patterns.items() if re.fullmatch(rf"(.*\.)?({key})", layer))
        alpha = float(next(matching, self.config["lora_alpha"]))
        return alpha / (rank**0.5 if self.config.get("use_rslora") else rank)


def save_adapter(
    model: PeftModel,
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
    state = get_peft_model_state_dict(model, adapter_name=ADAPTER_NAME, save_embedding_layers=False)
    tensors = {name: tensor.detach().to("cpu").contiguous() for name, tensor in state.items()}
    save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    config = model.peft_config[ADAPTER_NAME].to_dict()
    config |= {"inference_mode": True, "base_model_name_or_path": identity.get("path") or None}
    _write_json(folder / CONFIG_FILE, {key: _jsonable(value) for key, value in config.items()})
    info = {
        "format": FORMAT_VERSION,
        "contract": dict(contract),
        "base": identity,
        "versions": {name: importlib.metadata.version(name) for name in ("affina", "peft", "transformers", "torch")},
        "sha256": {name: _sha256(folder / name) for name in (WEIGHTS_FILE, CONFIG_FILE)},
    }
    _write_json(folder / INFO_FILE, info)
    for name in (WEIGHTS_FILE, CONFIG_FILE, INFO_FILE):
        _flush(folder / name)
    return folder


def read_adapter_info(directory: Path | str) -> AdapterInfo:
    """What the files say, without loading parameters. Raises ModelError when they are missing or damaged.

    Adapters of other tools have no affina.json; then nothing can be checked but their shapes.
    """
    folder = Path(directory)
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (folder / name).is_file():
            raise ModelError(
                "adapter-missing",
                f"{folder} is not an adapter: it has no {name}",
                fix="give the directory that holds adapter_config.json and adapter_model.safetensors",
            )
    info: dict[str, Any] = {}
    if (folder / INFO_FILE).is_file():
        info = _read_json(folder / INFO_FILE)
        _check_checksums(folder, info.get("sha256", {}))
    config = _read_json(folder / CONFIG_FILE)
    _refuse_other_methods(folder, config)
    return AdapterInfo(folder, config, info.get("contract"), info.get("base"), info.get("versions", {}))


def load_adapter(model: PreTrainedModel, directory: Path | str, *, trainable: bool = False) -> PeftModel:
    """`model` with the adapter of `directory`.

    Raises ModelError: adapter-missing, adapter-damaged (checksum, unreadable file), adapter-base-mismatch (trained on
                       another
    base: shapes or weights differ).
    """
    info = read_adapter_info(directory)
    check_base(model, info)
    with quiet_peft():
        adapted = PeftModel.from_pretrained(
            model, str(info.directory), adapter_name=ADAPTER_NAME, is_trainable=trainable
        )
    assert isinstance(adapted, PeftModel)
    if trainable:
        prepare_for_training(adapted)
    return adapted


def check_base(model: nn.Module, info: AdapterInfo) -> None:
    """Raises ModelError[adapter-base-mismatch] when `model` is not the base of the adapter."""
    _check_shapes(model, info)
    if info.base is None:
        return
    found = base_identity(model)
    expected_shapes, found_shapes = info.base.get("shapes", {}), found["shapes"]
    different = [
        f"{name} {expected_shapes[name]} → {found_shapes.get(name)}"
        for name in expected_shapes
        if expected_shapes[name] != found_shapes.get(name)
    ]
    if different:
        raise _base_mismatch(info, found, f"the shapes differ: {', '.join(different)}")
    if info.base.get("weights_sha256", found["weights_sha256"]) != found["weights_sha256"]:
        raise _base_mismatch(
            info,
            found,
            "the shapes agree but norms and embeddings are not those it was trained on "
            f"(fingerprint {info.base['weights_sha256'][:12]} → {found['weights_sha256'][:12]})",
        )


def read_adapter_tensors(directory: Path | str) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """(A [R, in], B [out, R]) of every adapted layer, by the layer's full name in the base model."""
    path = Path(directory) / WEIGHTS_FILE
    pairs: dict[str, dict[str, torch.Tensor]] = {}
    with _open(path) as file:
        for key in file.keys():  # noqa: SIM118 (not a mapping)
            layer, _, matrix = key.removeprefix(_PEFT_PREFIX).removesuffix(".weight").rpartition(".")
            if matrix in ("lora_A", "lora_B"):
                pairs.setdefault(layer, {})[matrix] = file.get_tensor(key)
    return {layer: (pair["lora_A"], pair["lora_B"]) for layer, pair in pairs.items()}


def _check_shapes(model: nn.Module, info: AdapterInfo) -> None:
    from affina.models.adapters.targets import candidate_layers
    from affina.models.weights import format_of

    layers = candidate_layers(model)
    with _open(info.directory / WEIGHTS_FILE) as file:
        for key in file.keys():  # noqa: SIM118
            layer, _, matrix = key.removeprefix(_PEFT_PREFIX).removesuffix(".weight").rpartition(".")
            if matrix not in ("lora_A", "lora_B"):
                continue
            size = file.get_slice(key).get_shape()
            if layer not in layers:
                raise _base_mismatch(info, base_identity(model), f"it adapts {layer}, which this model does not have")
            weight_format = format_of(layers[layer])
            assert weight_format is not None
            rows, columns = weight_format.shape(layers[layer])
            expected = columns if matrix == "lora_A" else rows
            stored = size[1] if matrix == "lora_A" else size[0]
            if stored != expected:
                side = "inputs" if matrix == "lora_A" else "outputs"
                raise _base_mismatch(
                    info, base_identity(model), f"{layer} has {expected} {side}, the adapter was made for {stored}"
                )


def _base_mismatch(info: AdapterInfo, found: Mapping[str, Any], why: str) -> ModelError:
    trained_on = (info.base or {}).get("path") or info.config.get("base_model_name_or_path") or "an unnamed base"
    if trained_on == found["path"]:
        return ModelError(
            "adapter-base-mismatch",
            f"the adapter in {info.directory} was trained on another version of {trained_on}",
            why=why,
            fix="load it on the version it was trained on (model.revision), or train again",
        )
    return ModelError(
        "adapter-base-mismatch",
        f"the adapter in {info.directory} was trained on {trained_on}, not on {found['path'] or 'this model'}",
        why=why,
        fix=f"load it on {trained_on}",
    )


def _refuse_other_methods(folder: Path, config: Mapping[str, Any]) -> None:
    kind = config.get("peft_type")
    unsupported = [name for name in _UNSUPPORTED_OPTIONS if config.get(name)]
    if set(config.get("modules_to_save") or ()) <= {"score", "classifier"}:
        # The head of a reward model, which affina writes; PEFT adds the other name that transformers uses.
        unsupported = [name for name in unsupported if name != "modules_to_save"]
    if config.get("bias", "none") != "none":
        unsupported.append(f"bias {config['bias']}")
    if kind != "LORA" or unsupported:
        raise ModelError(
            "adapter-unsupported",
            f"the adapter in {folder} is {kind}{' with ' + ', '.join(unsupported) if unsupported else ''}",
            why="affina loads LoRA and rsLoRA",
            fix="load it in PEFT",
        )


def _check_checksums(folder: Path, checksums: Mapping[str, str]) -> None:
    for name, expected in checksums.items():
        found = _sha256(folder / name) if (folder / name).is_file() else "missing"
        if found != expected:
            raise ModelError(
                "adapter-damaged",
                f"{name} is not the file that was saved (sha256 {found[:12]}, expected {expected[:12]})",
                why="it was cut short, edited or replaced after training",
                fix="restore it from a checkpoint of the run; delete affina.json to load the changed file anyway",
                where=Location(folder / name),
            )


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ModelError(
            "adapter-damaged",
            f"{path.name} cannot be read as safetensors: {error}",
            why="the file is cut short or is no safetensors file",
            fix="restore it from a checkpoint of the run",
            where=Location(path),
        ) from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ModelError(
            "adapter-damaged", f"{path.name} is not JSON: {error}", fix="restore it", where=Location(path)
        ) from error
    if not isinstance(content, dict):
        raise ModelError("adapter-damaged", f"{path.name} is no JSON object", fix="restore it", where=Location(path))
    return content


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def _jsonable(value: Any) -> Any:
    if isinstance(value, set | frozenset):
        return sorted(value)
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    return getattr(value, "value", value)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    with path.open("rb+") as file:
        os.fsync(file.fileno())
