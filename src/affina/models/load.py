"""From a path to a frozen causal language model, quantised while it is read.

Dense models go through transformers' own `from_pretrained`. With a weight format the model is built without memory for
its linear layers; then the checkpoint is read one tensor at a time, quantised at once on the target device, and the
dense tensor is dropped. Peak memory is the finished model plus the largest tensor. Checkpoints whose tensor names
differ from the modules' (fused experts, missing prefixes) are loaded by transformers first and quantised in place;
`load_notes` says so.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PretrainedConfig, PreTrainedModel

from affina.catalog.model_files import read_config, resolve_model_folder
from affina.errors import Location, ModelError
from affina.models.attention import register
from affina.models.compat import is_adapter_name, quiet_loading
from affina.models.quantized_checkpoint import layer_files, options_of_checkpoint
from affina.models.safetensors_file import TensorSpec, checkpoint_tensors, read_tensor
from affina.models.structure import base_model_of
from affina.models.weights import (
    Int8Embedding,
    QuantizedLinear,
    Vocabulary,
    WeightFormatOptions,
    cache_dequantized,
    format_of,
    place_embedding,
    place_head,
    quantize_linears,
    quantize_vocabulary,
    quantized_layers,
    vocabulary_of,
)
from affina.models.weights.quantized import replace_module

logger = logging.getLogger(__name__)
_NOTES: WeakKeyDictionary[nn.Module, tuple[str, ...]] = WeakKeyDictionary()


def load_causal_lm(
    path: str,
    *,
    revision: str | None = None,
    dtype: torch.dtype,
    device: torch.device | str,
    weight_format: WeightFormatOptions | None = None,
    trust_remote_code: bool = False,
    attention: str = "auto",
    cache_dequantized_bytes: int = 0,
    quantizes_vocabulary: bool = False,
) -> PreTrainedModel:
    """The model at `path`, in evaluation mode, every parameter frozen.

    path:          a directory, a hub id, or affina/nano
    dtype:         of weights that are not quantised, and of the computation
    weight_format: NF4, FP4, fp8 or int8 for the linear layers (never the head); None: as the checkpoint stores them.
                   A checkpoint that is already quantised (see `quantized_checkpoint`) stays as it is, whatever is
                   asked; bitsandbytes is not needed.
    attention:     a name that transformers knows; "auto" leaves the choice to it
    cache_dequantized_bytes: quantised layers keep their dense weights if all of them fit this budget (see
                             `cache_dequantized`)
    quantizes_vocabulary: embedding and head in int8, whatever the format of the other layers (weights/vocabulary.py)

    Raises ModelError: model-not-found, model-unreachable, model-gated, model-type-unknown, model-needs-code,
    checkpoint-missing, checkpoint-unsafe, checkpoint-incomplete, checkpoint-damaged, checkpoint-mismatch,
    quantization-unsupported.
    """
    device = torch.device(device)
    register()
    folder = resolve_model_folder(path, revision=revision, with_code=trust_remote_code)
    raw_config = read_config(folder)
    specs = checkpoint_tensors(folder)
    config = auto_config(folder, raw_config, path, trust_remote_code)
    stored = raw_config.get("quantization_config")
    stored_options = options_of_checkpoint(stored, path) if stored is not None else None
    if stored_options is not None:
        del config.quantization_config
    notes: list[str] = []
    build: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    if attention != "auto":
        build["attn_implementation"] = attention
    # What a quantised checkpoint left dense stays dense.
    options = weight_format if stored_options is None else None
    layer = stored_options.layer if stored_options is not None else None
    if options is None and layer is None and not quantizes_vocabulary:
        model = _load_dense(folder, config, dtype, device, build)
    else:
        target = _Target(dtype, device, options, layer, quantizes_vocabulary)
        model = _load_quantized(folder, config, specs, target, build, notes)
    if stored_options is not None and (weight_format is None or weight_format.name != stored_options.name):
        ignored = f"; {weight_format.name} was asked for and has no effect" if weight_format is not None else ""
        notes.append(f"the checkpoint is stored in {stored_options.name} and stays in it{ignored}")
    model.config._name_or_path = path
    model.eval().requires_grad_(False)
    if cache_dequantized_bytes:
        cache_dequantized(model, cache_dequantized_bytes, dtype)
    for note in notes:
        logger.info("%s: %s", path, note)
    _NOTES[model] = tuple(notes)
    return model


def check_causal_lm(path: str, *, revision: str | None = None, trust_remote_code: bool = False) -> Mapping[str, Any]:
    """The model's config.json, after what can be said about the model without its weights has been checked.

    Of a hub id, only config.json is fetched. A directory must hold whole safetensors files too.

    Raises ModelError as `load_causal_lm` does, but nothing that only shows when tensors are read.
    """
    folder = resolve_model_folder(path, revision=revision, with_weights=False)
    raw_config = read_config(folder)
    if not trust_remote_code:  # the model's own code might have to be fetched first
        auto_config(folder, raw_config, path, trust_remote_code)
    if (stored := raw_config.get("quantization_config")) is not None:
        options_of_checkpoint(stored, path)
    if Path(path).expanduser().is_dir():
        checkpoint_tensors(folder)
    return raw_config


def load_notes(model: nn.Module) -> tuple[str, ...]:
    """What was unusual about loading `model`, as sentences for the user."""
    return _NOTES.get(base_model_of(model), ())


# Config
# ----------------------------------------------------------------------------------------------------------------


def auto_config(folder: Path, raw: Mapping[str, Any], path: str, trust_remote_code: bool) -> PretrainedConfig:
    """The transformers config of a model directory; `path` is what the user called it. Raises ModelError."""
    where = Location(folder / "config.json")
    if "auto_map" in raw and not trust_remote_code and not _is_known(raw.get("model_type")):
        raise ModelError(
            "model-needs-code",
            f"{path} brings its own Python code",
            why="running it means trusting its author with your machine",
            fix="read the code, then set model.trust_remote_code: true; or choose a model that transformers knows",
            where=where,
        )
    if not raw.get("model_type"):
        raise ModelError(
            "model-type-unknown",
            f"{path} does not say what it is: no model_type",
            fix="download the model again; a config.json of transformers has a model_type",
            where=where,
        )
    if not _is_known(raw["model_type"]) and not trust_remote_code:
        import transformers

        raise ModelError(
            "model-type-unknown",
            f'model_type "{raw["model_type"]}" is unknown to transformers {transformers.__version__}',
            fix="upgrade transformers if the model is new; otherwise check config.json",
            where=where,
        )
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (ValueError, TypeError, KeyError, OSError, AttributeError) as error:
        raise ModelError(
            "config-damaged",
            f"config.json does not describe a {raw['model_type']} model: {str(error).splitlines()[0]}",
            fix="undo what was changed in it, or download the model again",
            where=where,
        ) from error
    if not trust_remote_code and type(config) not in AutoModelForCausalLM._model_mapping:
        raise ModelError(
            "model-type-unknown",
            f"{raw['model_type']} is not a causal language model",
            why="it does not predict the next token of a text",
            fix="choose a model with a …ForCausalLM architecture",
            where=where,
        )
    return config


def _is_known(model_type: object) -> bool:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    return model_type in CONFIG_MAPPING


# Dense
# -----------------------------------------------------------------------------------------------------------------


def _load_dense(
    folder: Path, config: PretrainedConfig, dtype: torch.dtype, device: torch.device, build: Mapping[str, Any]
) -> PreTrainedModel:
    options = dict(build)
    if device.type != "cpu":
        options["device_map"] = {"": device}
    try:
        with quiet_loading():
            model, info = AutoModelForCausalLM.from_pretrained(
                folder,
                config=config,
                dtype=dtype,
                use_safetensors=True,
                local_files_only=True,
                output_loading_info=True,
                **options,
            )
    except (RuntimeError, ValueError, KeyError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise _mismatch(folder, str(error)) from error
    if info["missing_keys"]:
        raise _missing(folder, sorted(info["missing_keys"]))
    assert isinstance(model, PreTrainedModel)
    return model


def _missing(folder: Path, names: list[str]) -> ModelError:
    shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    return ModelError(
        "checkpoint-mismatch",
        f"the checkpoint has no {shown}",
        why="the model would start with random numbers there",
        fix="config.json and the weights do not belong together, or a file is missing: download the model again",
        where=Location(folder),
    )


def _mismatch(folder: Path, detail: str) -> ModelError:
    return ModelError(
        "checkpoint-mismatch",
        "config.json and the weights do not fit together",
        why=" ".join(detail.split())[:400],
        fix="download the model again; do not mix files of two models",
        where=Location(folder),
    )


# Quantised, tensor by tensor
# -------------------------------------------------------------------------------------------


class _WeightsOnMeta(TorchFunctionMode):
    """While active, `torch.empty` makes tensors without memory: parameters, which are read later. What a module
    computes for itself, rotary frequencies for example, is computed as always.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.empty:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


@dataclass(frozen=True, slots=True)
class _Target:
    """What becomes of a checkpoint's tensors.

    options: how dense linear layers are quantised while they are read; None: they are not
    stored:  the kind of layers that are quantised in the file already
    """

    dtype: torch.dtype
    device: torch.device
    options: WeightFormatOptions | None
    stored: type[QuantizedLinear] | None
    quantizes_vocabulary: bool


def model_without_weights(config: PretrainedConfig, dtype: torch.dtype, build: Mapping[str, Any]) -> PreTrainedModel:
    """The model's modules with parameters that take no memory."""
    with _WeightsOnMeta():
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, **build)
    assert isinstance(model, PreTrainedModel)
    return model


def _load_quantized(
    folder: Path,
    config: PretrainedConfig,
    specs: Mapping[str, TensorSpec],
    target: _Target,
    build: Mapping[str, Any],
    notes: list[str],
) -> PreTrainedModel:
    model = model_without_weights(config, target.dtype, build)
    wanted = dict(model.named_parameters()) | _persistent_buffers(model)
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    missing = [name for name in wanted if name not in specs and name not in tied]
    keeps_float32 = getattr(model, "_keep_in_fp32_modules", None) or getattr(
        model, "_keep_in_fp32_modules_strict", None
    )
    if missing or keeps_float32:
        if target.stored is not None:
            raise _missing(folder, missing)
        return _load_then_quantize(folder, config, target, build, notes)
    head = model.get_output_embeddings()
    vocabulary = _wanted_vocabulary(model, target, notes)
    for name, spec in _in_file_order(specs):
        if name not in wanted:
            continue
        if vocabulary is not None and name in vocabulary.weights:
            _place_vocabulary(model, name, spec, target, vocabulary)
        else:
            _place(model, name, spec, specs, target, head)
    model.tie_weights()
    left = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if left:
        raise _missing(folder, left)
    model.to(target.device)
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model


def _wanted_vocabulary(model: PreTrainedModel, target: _Target, notes: list[str]) -> Vocabulary | None:
    """Embedding and head as far as they are to be quantised and can be; says what cannot."""
    if not target.quantizes_vocabulary:
        return None
    vocabulary = vocabulary_of(model)
    if vocabulary.why_not is not None:
        notes.append(f"the embedding stays in {str(target.dtype).removeprefix('torch.')}: {vocabulary.why_not}")
    return vocabulary


def _place_vocabulary(
    model: PreTrainedModel, name: str, spec: TensorSpec, target: _Target, vocabulary: Vocabulary
) -> None:
    """Reads the weight of the embedding or of the head and puts it, in int8, where it belongs."""
    _check_shape(name, spec.shape, model.get_parameter(name), spec.path)
    place = place_embedding if name == f"{vocabulary.embedding}.weight" else place_head
    with _naming(name):
        place(model, vocabulary, read_tensor(spec), dtype=target.dtype, device=target.device)


def _place(
    model: PreTrainedModel,
    name: str,
    spec: TensorSpec,
    specs: Mapping[str, TensorSpec],
    target: _Target,
    head: nn.Module | None,
) -> None:
    """Reads one tensor and puts it, quantised where it should be, where it belongs."""
    module_name, _, leaf = name.rpartition(".")
    module = model.get_submodule(module_name)
    is_weight = type(module) is nn.Linear and leaf == "weight"
    stored = target.stored
    if is_weight and stored is not None and (files := layer_files(stored, module_name, specs)) is not None:
        tensors = {key: read_tensor(part) for key, part in files.items()}
        layer = stored.from_files(tensors, module_name, bias=module.bias, device=target.device)
        _check_shape(name, (layer.out_features, layer.in_features), module.weight, spec.path)
        replace_module(model, module_name, layer)
        return
    current = module.get_parameter(leaf) if leaf in module._parameters else module.get_buffer(leaf)
    _check_shape(name, spec.shape, current, spec.path)
    tensor = read_tensor(spec).to(target.device)
    if tensor.is_floating_point():
        tensor = tensor.to(target.dtype)
    options = target.options
    if is_weight and options is not None and module is not head and not options.skips(module_name):
        assert isinstance(module, nn.Linear)
        module.weight = nn.Parameter(tensor, requires_grad=False)
        with _naming(name):
            replace_module(model, module_name, options.quantize_linear(module))
    elif leaf in module._parameters:
        module._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
    else:
        module._buffers[leaf] = tensor


@contextmanager
def _naming(name: str) -> Iterator[None]:
    """Errors of a weight that cannot be quantised say which one it is."""
    try:
        yield
    except ModelError as error:
        raise ModelError(error.code, f"{name} holds NaN or infinity", why=error.why, fix=error.fix) from error


def _check_shape(name: str, stored: tuple[int, ...], current: Tensor, path: Path) -> None:
    if tuple(stored) != tuple(current.shape):
        raise _mismatch(path.parent, f"{name} is {list(stored)} in {path.name}, {list(current.shape)} by config.json")


def _persistent_buffers(model: nn.Module) -> dict[str, Tensor]:
    parameters = dict(model.named_parameters(remove_duplicate=False))
    return {name: tensor for name, tensor in model.state_dict().items() if name not in parameters}


def _in_file_order(specs: Mapping[str, TensorSpec]) -> list[tuple[str, TensorSpec]]:
    return sorted(specs.items(), key=lambda item: (item[1].path, item[1].offset))


def _load_then_quantize(
    folder: Path,
    config: PretrainedConfig,
    target: _Target,
    build: Mapping[str, Any],
    notes: list[str],
) -> PreTrainedModel:
    notes.append(
        "its checkpoint does not name tensors as transformers' modules do: loaded whole, then quantised, "
        "so that loading took the memory of the dense model"
    )
    model = _load_dense(folder, config, target.dtype, torch.device("cpu"), build)
    head = model.get_output_embeddings()
    if target.options is not None:
        quantize_linears(model, target.options, exclude=[head] if head is not None else [])
    if _wanted_vocabulary(model, target, notes) is not None:
        quantize_vocabulary(model)
    model.to(target.device)
    return model


# Describing
# ------------------------------------------------------------------------------------------------------------


def describe_model(model: nn.Module) -> dict[str, Any]:
    """JSON-ready: parameters (quantised weights counted as the numbers they stand for), trainable, bytes by format and
    in all."""
    base = base_model_of(model)
    quantized = quantized_layers(base)
    codes = {id(layer.codes) for layer in quantized}
    adapter = [parameter for name, parameter in model.named_parameters() if is_adapter_name(name)]
    adapter_ids = {id(parameter) for parameter in adapter}
    dense = [p for p in base.parameters() if id(p) not in codes and id(p) not in adapter_ids]
    num_bytes: dict[str, int] = {}
    for parameter in dense:
        key = str(parameter.dtype).removeprefix("torch.")
        num_bytes[key] = num_bytes.get(key, 0) + parameter.nbytes
    for layer in quantized:
        weight_format = format_of(layer)
        assert weight_format is not None
        num_bytes[weight_format.name] = num_bytes.get(weight_format.name, 0) + weight_format.num_bytes(layer)
    for module in base.modules():
        if isinstance(module, Int8Embedding) and id(module.weight) not in codes:
            num_bytes["int8"] += module.scale.nbytes
    if adapter:
        num_bytes["adapter"] = sum(parameter.nbytes for parameter in adapter)
    expanded = sum(layer.out_features * layer.in_features for layer in quantized)
    return {
        "architecture": type(base).__name__,
        "num_parameters": sum(p.numel() for p in dense) + expanded,
        "num_adapter_parameters": sum(p.numel() for p in adapter),
        "num_trainable": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "num_bytes": num_bytes,
        "total_bytes": sum(num_bytes.values()),
    }
