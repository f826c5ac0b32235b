"""An adapter on disk: PEFT's two files, so that the whole ecosystem loads it, and `affina.json`, so that we can trust
it.

adapter_model.safetensors   parameters, PEFT's names; of trained weights, the model's own names
adapter_config.json         PEFT's config with the base model's name; of trained weights, which they are
affina.json                 method, template contract, identity of the base, versions, checksums of the two files above

PiSSA and OLoRA are saved as the plain LoRA of rank 2R that they are (factors.py), EVA and LoftQ without their way of
starting: loading must not start them again.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from affina.catalog.methods import METHODS, UNVERIFIED, method_named
from affina.errors import Location, ModelError
from affina.models.adapters.attach import (
    ADAPTER_NAME,
    prepare_for_training,
    prepare_layers,
    remember_settings,
    settings_of,
)
from affina.models.adapters.factors import as_one_lora
from affina.models.adapters.identity import base_identity
from affina.models.adapters.trained_weights import hold_weights, trained_weights_of
from affina.models.compat import quiet_peft
from affina.models.structure import base_model_of
from affina.models.weights import quantized_layers

WEIGHTS_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"
INFO_FILE = "affina.json"
FORMAT_VERSION = 1
WEIGHTS_KEY = "affina_method"
"""In adapter_config.json, instead of PEFT's `peft_type`: the files hold weights of the model, not an adapter."""
_PEFT_PREFIX = "base_model.model."
_STARTED_FROM_WEIGHTS = ("pissa", "olora", "corda", "loftq", "lora_ga")
_UNSUPPORTED_OPTIONS = (
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
    method:   its name in the section `adapter`; of other tools' files, what the config amounts to
    contract: the template contract under which it was trained; None for adapters that affina did not write
    base:     identity of its base, with `quantization` when it was trained on a quantised one; None likewise
    versions: of the packages that wrote it
    written:  the whole of affina.json, empty without one
    """

    directory: Path
    config: dict[str, Any]
    contract: dict[str, Any] | None
    base: dict[str, Any] | None
    versions: dict[str, str]
    written: dict[str, Any] = field(default_factory=dict)

    @property
    def method(self) -> str:
        known = self.written.get("method") or self.config.get(WEIGHTS_KEY)
        return str(known) if known else _method_of_config(self.config)

    @property
    def is_plain_lora(self) -> bool:
        """Whether it is W + s · B A on every layer."""
        return self.config.get("peft_type") == "LORA" and not self.config.get("use_dora")

    def scale_of(self, layer: str, rank: int) -> float:
        """s of W + s · B A for one layer, whose A has `rank` rows; files of other tools may set alpha per layer."""
        patterns = self.config.get("alpha_pattern") or {}
        matching = (value for key, value in patterns.items() if re.fullmatch(rf"(.*\.)?({key})", layer))
        alpha = float(next(matching, self.config["lora_alpha"]))
        return alpha / (rank**0.5 if self.config.get("use_rslora") else rank)


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
        "sha256": {name: _sha256(folder / name) for name in (WEIGHTS_FILE, CONFIG_FILE)},
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
    if settings.method in ("pissa", "olora"):
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
    return AdapterInfo(folder, config, info.get("contract"), info.get("base"), info.get("versions", {}), info)


def load_adapter(
    model: PreTrainedModel, directory: Path | str, *, trainable: bool = False
) -> PeftModel | PreTrainedModel:
    """`model` with the adapter of `directory`, or with the trained weights that are there.

    Raises ModelError: adapter-missing, adapter-damaged (checksum, unreadable file), adapter-unsupported,
                       adapter-base-mismatch
    (trained on another base: shapes or weights differ, or its weight format).
    """
    info = read_adapter_info(directory)
    check_base(model, info)
    method = method_named(info.method)
    _check_format(model, info)
    remember_settings(model, method.settings())
    if WEIGHTS_KEY in info.config:
        return _load_weights(model, info)
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
        raise _base_mismatch(info, base_identity(model), " ".join(str(error).split())[:300]) from error
    assert isinstance(adapted, PeftModel)
    _check_complete(adapted, info)
    if trainable:
        prepare_for_training(adapted)
    return adapted


def _check_complete(model: PeftModel, info: AdapterInfo) -> None:
    """Refuse a file that does not hold what its config says: PEFT would leave the rest random, and only warn."""
    expected = set(get_peft_model_state_dict(model, adapter_name=ADAPTER_NAME, save_embedding_layers=False))
    with _open(info.directory / WEIGHTS_FILE) as file:
        found = set(file.keys())
    if expected != found:
        name = sorted(expected ^ found)[0]
        whose = f"has no {name}" if name in expected else f"has {name}, which it does not say"
        raise ModelError(
            "adapter-mismatch",
            f"the file in {info.directory} {whose}",
            why=f"adapter_config.json says {method_named(info.method).title}; the parameters are another method's",
            fix="restore the adapter_config.json that was saved with it",
        )


def _load_weights(model: PreTrainedModel, info: AdapterInfo) -> PreTrainedModel:
    saved = load_file(info.directory / WEIGHTS_FILE)
    own = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    wrong = next((name for name, tensor in saved.items() if own.get(name) != tuple(tensor.shape)), None)
    if wrong is not None:
        raise _base_mismatch(info, base_identity(model), f"{wrong} has another shape, or is not in this model")
    hold_weights(model, list(saved))
    with torch.no_grad():
        for name, tensor in saved.items():
            model.get_parameter(name).copy_(tensor)
    return model


def _adapted_layers(model: nn.Module, info: AdapterInfo) -> list[str]:
    """Names of the base's layers that have parameters in the file."""
    with _open(info.directory / WEIGHTS_FILE) as file:
        keys = [key.removeprefix(_PEFT_PREFIX) for key in file.keys()]  # noqa: SIM118 (not a mapping)
    names = {name for name, _ in base_model_of(model).named_modules()}
    prefixes = (key.split(".")[:length] for key in keys for length in range(1, key.count(".") + 1))
    found = {".".join(parts) for parts in prefixes}
    layers = found & names
    return sorted(name for name in layers if not any(other.startswith(f"{name}.") for other in layers))


def _check_format(model: nn.Module, info: AdapterInfo) -> None:
    """Refuse a base in another weight format where the adapter holds only on its own."""
    kept = {type(layer).__name__ for layer in quantized_layers(model)}
    if info.method == "loftq" and "Nf4Linear" not in kept:
        raise ModelError(
            "adapter-base-mismatch",
            f"the adapter in {info.directory} was started as the error of an NF4 base, and this base is not in NF4",
            why="on the dense weights it would add that error instead of taking it out",
            fix="load it with `quantization: nf4`; merged, it becomes a model of its own",
        )
    if WEIGHTS_KEY in info.config and kept:
        raise ModelError(
            "adapter-base-mismatch",
            f"{info.directory} holds trained weights, and the base is quantised",
            fix="load it with `quantization: none`, or merge it and quantise the result",
        )


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


def _method_of_config(config: Mapping[str, Any]) -> str:
    """The method that a PEFT config amounts to."""
    kind = str(config.get("peft_type", "")).lower()
    if kind == "lora":
        return "dora" if config.get("use_dora") else "rslora" if config.get("use_rslora") else "lora"
    own = {"ln_tuning": "layernorm", "prefix_tuning": "prefix", "p_tuning": "ptuning", "prompt_tuning": "prompt"}
    return {**own, "bottleneck": "houlsby"}.get(kind, kind)


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

    if not info.is_plain_lora:
        return
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
    if config.get(WEIGHTS_KEY) in METHODS:
        return
    kind = config.get("peft_type")
    unsupported = [name for name in _UNSUPPORTED_OPTIONS if config.get(name)]
    if set(config.get("modules_to_save") or ()) <= {"score", "classifier"}:
        # The head of a reward model, which affina writes; PEFT adds the other name that transformers uses.
        unsupported = [name for name in unsupported if name != "modules_to_save"]
    if config.get("bias", "none") != "none":
        unsupported.append(f"bias {config['bias']}")
    method = _method_of_config(config)
    if kind not in PEFT_TYPE_TO_CONFIG_MAPPING or method not in {**METHODS, **UNVERIFIED} or unsupported:
        raise ModelError(
            "adapter-unsupported",
            f"the adapter in {folder} is {kind}{' with ' + ', '.join(unsupported) if unsupported else ''}",
            why="affina does not load that",
            fix="load it in PEFT",
        )
    start = str(config.get("init_lora_weights", "")).lower()
    if kind == "LORA" and start.startswith(_STARTED_FROM_WEIGHTS):
        raise ModelError(
            "adapter-unsupported",
            f"the adapter in {folder} was saved with init_lora_weights {start}",
            why="it fits a base that this way of starting has changed; loading it changes the base again, and moves "
            "every other adapter on it",
            fix="save it again in PEFT with path_initial_model_for_weight_conversion, which makes a plain LoRA of it",
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
