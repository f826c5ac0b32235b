"""The files of a saved adapter, as they are: what they say, whether they are whole, and which of them affina reads.

adapter_model.safetensors   parameters, PEFT's names; of trained weights, the model's own names
adapter_config.json         PEFT's config with the base model's name; of trained weights, which they are
affina.json                 method, template contract, identity of the base, versions, checksums of the two files above
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from safetensors import SafetensorError, safe_open

from affina.catalog.methods import METHODS, UNVERIFIED
from affina.errors import Location, ModelError

WEIGHTS_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"
INFO_FILE = "affina.json"
FORMAT_VERSION = 1
WEIGHTS_KEY = "affina_method"
"""In adapter_config.json, instead of PEFT's `peft_type`: the files hold weights of the model, not an adapter."""
HEAD_NAMES = frozenset({"score", "classifier"})
"""What transformers' sequence classification models call their head; a reward model's, which affina writes, is the
first."""
PEFT_PREFIX = "base_model.model."
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


def read_adapter_tensors(directory: Path | str) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """(A [R, in], B [out, R]) of every adapted layer, by the layer's full name in the base model."""
    path = Path(directory) / WEIGHTS_FILE
    pairs: dict[str, dict[str, torch.Tensor]] = {}
    with open_weights(path) as file:
        for key in file.keys():  # noqa: SIM118 (not a mapping)
            layer, _, matrix = key.removeprefix(PEFT_PREFIX).removesuffix(".weight").rpartition(".")
            if matrix in ("lora_A", "lora_B"):
                pairs.setdefault(layer, {})[matrix] = file.get_tensor(key)
    return {layer: (pair["lora_A"], pair["lora_B"]) for layer, pair in pairs.items()}


def open_weights(path: Path) -> Any:
    """The open safetensors file. Raises ModelError[adapter-damaged]."""
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


def sha256_of(path: Path) -> str:
    """Of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check_checksums(folder: Path, checksums: Mapping[str, str]) -> None:
    for name, expected in checksums.items():
        found = sha256_of(folder / name) if (folder / name).is_file() else "missing"
        if found != expected:
            raise ModelError(
                "adapter-damaged",
                f"{name} is not the file that was saved (sha256 {found[:12]}, expected {expected[:12]})",
                why="it was cut short, edited or replaced after training",
                fix="restore it from a checkpoint of the run; delete affina.json to load the changed file anyway",
                where=Location(folder / name),
            )


def _refuse_other_methods(folder: Path, config: Mapping[str, Any]) -> None:
    if config.get(WEIGHTS_KEY) in METHODS:
        return
    kind = config.get("peft_type")
    unsupported = [name for name in _UNSUPPORTED_OPTIONS if config.get(name)]
    if set(config.get("modules_to_save") or ()) <= HEAD_NAMES:
        # PEFT adds the name that affina does not write.
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


def _method_of_config(config: Mapping[str, Any]) -> str:
    """The method that a PEFT config amounts to."""
    kind = str(config.get("peft_type", "")).lower()
    if kind == "lora":
        return "dora" if config.get("use_dora") else "rslora" if config.get("use_rslora") else "lora"
    own = {"ln_tuning": "layernorm", "prefix_tuning": "prefix", "p_tuning": "ptuning", "prompt_tuning": "prompt"}
    return {**own, "bottleneck": "houlsby"}.get(kind, kind)


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
