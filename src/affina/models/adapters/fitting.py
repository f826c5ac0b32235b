"""Whether a saved adapter belongs on a model: its base, the format of its weights, its layers, its head."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peft import PeftModel, get_peft_model_state_dict
from torch import nn

from affina.catalog.methods import method_named
from affina.errors import ModelError
from affina.models.adapters.attach import ADAPTER_NAME
from affina.models.adapters.files import HEAD_NAMES, PEFT_PREFIX, WEIGHTS_FILE, WEIGHTS_KEY, AdapterInfo, open_weights
from affina.models.adapters.identity import base_identity
from affina.models.adapters.targets import candidate_layers
from affina.models.structure import base_model_of
from affina.models.weights import Int8Embedding, Nf4Linear, QuantizedLinear, format_of, quantized_layers


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
        raise base_mismatch(info, found, f"the shapes differ: {', '.join(different)}")
    if info.base.get("weights_sha256", found["weights_sha256"]) != found["weights_sha256"]:
        raise base_mismatch(
            info,
            found,
            "the shapes agree but norms and embeddings are not those it was trained on "
            f"(fingerprint {info.base['weights_sha256'][:12]} → {found['weights_sha256'][:12]})",
        )


def _check_shapes(model: nn.Module, info: AdapterInfo) -> None:
    if not info.is_plain_lora:
        return
    layers = candidate_layers(model)
    with open_weights(info.directory / WEIGHTS_FILE) as file:
        for key in file.keys():  # noqa: SIM118
            layer, _, matrix = key.removeprefix(PEFT_PREFIX).removesuffix(".weight").rpartition(".")
            if matrix not in ("lora_A", "lora_B"):
                continue
            size = file.get_slice(key).get_shape()
            if layer not in layers:
                raise base_mismatch(info, base_identity(model), f"it adapts {layer}, which this model does not have")
            weight_format = format_of(layers[layer])
            assert weight_format is not None
            rows, columns = weight_format.shape(layers[layer])
            expected = columns if matrix == "lora_A" else rows
            stored = size[1] if matrix == "lora_A" else size[0]
            if stored != expected:
                side = "inputs" if matrix == "lora_A" else "outputs"
                raise base_mismatch(
                    info, base_identity(model), f"{layer} has {expected} {side}, the adapter was made for {stored}"
                )


def check_format(model: nn.Module, info: AdapterInfo) -> None:
    """Refuse a base in another weight format where the adapter holds only on its own."""
    if info.method == "loftq" and not any(isinstance(layer, Nf4Linear) for layer in quantized_layers(model)):
        raise ModelError(
            "adapter-base-mismatch",
            f"the adapter in {info.directory} was started as the error of an NF4 base, and this base is not in NF4",
            why="on the dense weights it would add that error instead of taking it out",
            fix="load it with `quantization: nf4`; merged, it becomes a model of its own",
        )
    if WEIGHTS_KEY not in info.config:
        return
    quantized = {
        f"{name}.weight"
        for name, module in base_model_of(model).named_modules()
        if isinstance(module, QuantizedLinear | Int8Embedding)
    }
    with open_weights(info.directory / WEIGHTS_FILE) as file:
        codes = sorted(quantized.intersection(file.keys()))
    if codes:
        raise ModelError(
            "adapter-base-mismatch",
            f"{info.directory} holds trained weights, and the base is quantised",
            why=f"a trained {codes[0]} cannot take the place of codes",
            fix="load it with `quantization: none`, or merge it and quantise the result",
        )


def check_head(model: nn.Module, info: AdapterInfo) -> None:
    """Refuse a reward model's adapter on a model without the head that it trains."""
    with open_weights(info.directory / WEIGHTS_FILE) as file:
        saved = {key.removeprefix(PEFT_PREFIX).partition(".")[0] for key in file.keys()}  # noqa: SIM118
    heads = sorted(saved.intersection(HEAD_NAMES))
    if heads and not hasattr(base_model_of(model), heads[0]):
        raise ModelError(
            "adapter-unsupported",
            f"the adapter in {info.directory} is a reward model's, and the model has no head called {heads[0]}",
            why="it scores conversations with that head, which is saved with it; it writes no replies",
            fix="load it in transformers, on AutoModelForSequenceClassification with num_labels=1; for replies train "
            "with another objective",
        )


def check_complete(model: PeftModel, info: AdapterInfo) -> None:
    """Refuse a file that does not hold what its config says: PEFT would leave the rest random, and only warn."""
    expected = set(get_peft_model_state_dict(model, adapter_name=ADAPTER_NAME, save_embedding_layers=False))
    with open_weights(info.directory / WEIGHTS_FILE) as file:
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


def base_mismatch(info: AdapterInfo, found: Mapping[str, Any], why: str) -> ModelError:
    """The error for a model that is not the adapter's base. found: the model's identity"""
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
