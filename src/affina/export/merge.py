"""One plain model out of a base and an adapter: written tensor by tensor, then loaded again and proven.

    W' = W + s · B A        computed in float32, rounded once to the type of the result

(LoRA; mergers.py has the other methods.) The base is the original one, never its quantised copy: merging into that
would quantise the sum again and lose part of the adapter. Memory stays at one tensor while writing. The result is then
loaded from its files and its logits are compared with those of base and adapter: an export whose effect vanished fails,
and leaves nothing behind.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from affina.catalog.model_files import read_config, resolve_model_folder
from affina.errors import ExportError
from affina.export.mergers import Merger, merger_of, require_mergeable
from affina.export.output import check_output, check_space, copy_companions
from affina.export.probes import default_probes, logits_of, rms, spread_of, text_vocabulary
from affina.models.adapters import AdapterInfo, adapter_disabled, base_identity, load_adapter, read_adapter_info
from affina.models.compat import quiet_loading
from affina.models.load import load_causal_lm
from affina.models.quantized_checkpoint import StoredWeights, options_of_checkpoint
from affina.models.safetensors_file import (
    PlannedTensor,
    TensorSpec,
    checkpoint_tensors,
    read_tensor,
    write_sharded,
)
from affina.models.weights import WeightFormatOptions, expand_linears
from affina.runs.atomic import new_directory

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
PROVENANCE_FILE = "affina.json"
_MAX_SHARD_BYTES = 4 * 1000**3
_FLOAT32_PROOF_BYTES = 6 * 2**30

# RMS of the logits' error over the logits' spread. Each merged weight is rounded once: 2^-9 of itself in bfloat16,
# 2^-12 in float16, 2^-25 in float32; errors of different weights add up like random steps through the layers.
_TOLERANCES = {torch.bfloat16: 0.03, torch.float16: 0.005, torch.float32: 1e-4}


@dataclass(frozen=True, slots=True)
class MergeReport:
    """What was written and how far it is from base + adapter. Differences are RMS, in units of the logits' spread.

    adapter_effect:       base + adapter against base: what must survive
    merge_error:          merged against base + adapter, on `num_probe_tokens` positions
    max_merge_error:      the largest single difference, in the same unit
    quantized_difference: merged against quantised base + adapter, as it was trained; None when it was trained on a
                          dense base
    """

    output: Path
    base: str
    adapter: Path
    dtype: str
    num_tensors: int
    num_merged: int
    num_bytes: int
    files: tuple[str, ...]
    num_probe_tokens: int
    adapter_effect: float
    merge_error: float
    max_merge_error: float
    quantized_difference: float | None
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        values = asdict(self)
        return values | {
            "output": str(self.output),
            "adapter": str(self.adapter),
            "files": list(self.files),
            "notes": list(self.notes),
        }


def merge(
    base: str,
    adapter: Path | str,
    output: Path | str,
    *,
    dtype: str = "bfloat16",
    revision: str | None = None,
    trust_remote_code: bool = False,
    device: torch.device | str = "cpu",
    trained_weight_format: WeightFormatOptions | None = None,
    trained_int8_vocabulary: bool = False,
    probe_prompts: Sequence[Sequence[int]] | None = None,
    max_shard_bytes: int = _MAX_SHARD_BYTES,
) -> MergeReport:
    """Writes base + adapter as one model into the new directory `output` and proves it.

    base:                  directory, hub id or affina/nano
    dtype:                 of the result: bfloat16, float16 or float32
    device:                where the proof is computed; writing is done on the CPU
    trained_weight_format: of the base on which the adapter was trained, when it was quantised; its distance is then
                           reported
    trained_int8_vocabulary: whether its embedding and head were in int8 (engine.memory: lowest), likewise
    probe_prompts:         token ids on which logits are compared; default: sentences through the model's own tokenizer

    Raises ExportError: output-exists, disk-full, dtype-unknown, merge-unsupported (the method), merge-vanished (the
                        adapter's effect is not in the result), merge-unverified (the result differs by more than
                        rounding); ModelError when base or adapter cannot be used.
    """
    target, target_dtype = Path(output), _dtype_named(dtype)
    check_output(target, why="a merge never overwrites")
    folder = resolve_model_folder(base, revision=revision, with_code=trust_remote_code)
    specs, raw_config, info = checkpoint_tensors(folder), read_config(folder), read_adapter_info(adapter)
    require_mergeable(info)
    _check_space(target, specs, target_dtype)
    proof_dtype = _proof_dtype(specs, target_dtype)
    load = _loader(revision, trust_remote_code, device)
    prompts = probe_prompts if probe_prompts is not None else default_probes(folder, text_vocabulary(raw_config))
    notes: list[str] = []

    made_for = trained_weight_format if info.method == "loftq" else None
    plain = load(base, proof_dtype, made_for)
    identity = base_identity(plain)
    if info.method != "loftq":  # which holds on its own codes alone; the others are merged into weights
        expand_linears(plain, proof_dtype)
    with_adapter = load_adapter(plain, info.directory)
    expected, of_base = logits_of(with_adapter, prompts), _logits_of_base(with_adapter, prompts)
    writer = _Writer(merger_of(info, with_adapter), target_dtype)
    del with_adapter, plain

    with new_directory(target) as temporary:
        stored = StoredWeights(specs, None)
        if (quantization := raw_config.get("quantization_config")) is not None:
            options = options_of_checkpoint(quantization, base)
            stored = StoredWeights(specs, options.layer)
            notes.append(
                f"the base is stored in {options.name}: its weights were expanded before merging; "
                "the original base would be more exact"
            )
        if writer.fits(specs):
            planned = list(writer.plan(stored))
            files = write_sharded(temporary, planned, max_shard_bytes=max_shard_bytes)
            num_tensors = len(planned)
            num_bytes = sum(tensor.num_bytes for tensor in planned)
        else:
            notes.append(
                "the checkpoint names tensors differently from the modules: "
                "merged in memory instead of tensor by tensor"
            )
            files = _merge_in_memory(load(base, target_dtype, None), writer, temporary)
            written = checkpoint_tensors(temporary)
            num_tensors, num_bytes = len(written), sum(spec.num_bytes for spec in written.values())
        _write_config(temporary, raw_config, dtype)
        copy_companions(folder, temporary, with_code=trust_remote_code)
        _write_provenance(temporary, info, identity, dtype)

        merged = logits_of(load(str(temporary), proof_dtype, None), prompts)
        differences = _compare(merged, expected, of_base)
        _prove(differences, target_dtype, dtype)

        quantized_difference = None
        if made_for is not None:
            notes.append("merged into the dequantised NF4 base, which the adapter was made for")
        elif trained_weight_format is not None or trained_int8_vocabulary:
            trained_base = load(base, proof_dtype, trained_weight_format, trained_int8_vocabulary)
            trained = logits_of(load_adapter(trained_base, info.directory), prompts)
            quantized_difference = rms(merged - trained) / spread_of(expected)
            kind = trained_weight_format.name.upper() if trained_weight_format is not None else "int8-vocabulary"
            notes.append(
                f"the adapter was trained against the {kind} base and is merged into the original one: its logits "
                f"differ from those in training by {quantized_difference:.1%} of their spread, the {kind} base's own "
                "error"
            )
    return MergeReport(
        output=target,
        base=base,
        adapter=info.directory,
        dtype=dtype,
        num_tensors=num_tensors,
        num_merged=len(writer.merger.names),
        num_bytes=num_bytes,
        files=tuple(path.name for path in files),
        num_probe_tokens=expected.shape[0],
        adapter_effect=differences.effect,
        merge_error=differences.error,
        max_merge_error=differences.max_error,
        quantized_difference=quantized_difference,
        notes=tuple(notes),
    )


# Before anything is written
# --------------------------------------------------------------------------------------------


def _dtype_named(name: str) -> torch.dtype:
    if name not in DTYPES:
        raise ExportError("dtype-unknown", f'"{name}" is no type for weights', fix=f"use one of {', '.join(DTYPES)}")
    return DTYPES[name]


def _check_space(target: Path, specs: Mapping[str, TensorSpec], dtype: torch.dtype) -> None:
    needed = sum(_num_elements(spec) * dtype.itemsize for spec in specs.values())
    check_space(target, needed, what="the merged model")


def _num_elements(spec: TensorSpec) -> int:
    # Codes of a 4-bit checkpoint hold two weights a byte.
    return spec.num_bytes * 2 if spec.dtype == torch.uint8 else spec.num_bytes // spec.dtype.itemsize


def _proof_dtype(specs: Mapping[str, TensorSpec], target_dtype: torch.dtype) -> torch.dtype:
    """float32 where it fits: then the proof sees the rounding of the weights and nothing else."""
    needed = sum(_num_elements(spec) * 4 for spec in specs.values())
    return torch.float32 if needed <= _FLOAT32_PROOF_BYTES else target_dtype


class _Load(Protocol):
    def __call__(
        self, path: str, dtype: torch.dtype, weight_format: WeightFormatOptions | None, int8_vocabulary: bool = False
    ) -> PreTrainedModel: ...


def _loader(revision: str | None, trust_remote_code: bool, device: torch.device | str) -> _Load:
    def load(
        path: str, dtype: torch.dtype, weight_format: WeightFormatOptions | None, int8_vocabulary: bool = False
    ) -> PreTrainedModel:
        return load_causal_lm(
            path,
            revision=revision,
            dtype=dtype,
            device=device,
            weight_format=weight_format,
            trust_remote_code=trust_remote_code,
            quantizes_vocabulary=int8_vocabulary,
        )

    return load


# Merging
# ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Writer:
    """How a tensor of the base becomes one of the result."""

    merger: Merger
    dtype: torch.dtype

    def fits(self, specs: Mapping[str, TensorSpec]) -> bool:
        """Whether every changed tensor is one of its own in the checkpoint."""
        return all(name in specs for name in self.merger.names)

    def plan(self, stored: StoredWeights) -> Iterator[PlannedTensor]:
        """Every tensor of the result, in the order of the files, to be made when it is written."""
        for name in stored.names():
            spec, quantized = stored.specs[name], stored.quantized(name)
            shape = quantized.shape if quantized is not None else spec.shape
            is_float = quantized is not None or spec.dtype.is_floating_point
            yield PlannedTensor(name, self.dtype if is_float else spec.dtype, shape, self._maker(name, stored))

    def _maker(self, name: str, stored: StoredWeights) -> Callable[[], Tensor]:
        def make() -> Tensor:
            quantized = stored.quantized(name)
            weight = quantized.dequantize(torch.float32) if quantized is not None else read_tensor(stored.specs[name])
            return self.merged(name, weight)

        return make

    def merged(self, name: str, tensor: Tensor) -> Tensor:
        """The merged tensor in the type of the result, or the tensor itself when the adapter leaves it alone."""
        if name not in self.merger.names:
            return tensor.to(self.dtype) if tensor.is_floating_point() else tensor
        return self.merger.merged(name, tensor).to(self.dtype)


@torch.no_grad()
def _merge_in_memory(model: PreTrainedModel, writer: _Writer, folder: Path) -> list[Path]:
    for name in writer.merger.names:
        parameter = model.get_parameter(name)
        parameter.copy_(writer.merged(name, parameter))
    with quiet_loading():
        model.save_pretrained(folder)
    return sorted(folder.glob("*.safetensors"))


def _write_config(folder: Path, raw: Mapping[str, Any], dtype: str) -> None:
    config = {key: value for key, value in raw.items() if key not in ("quantization_config", "torch_dtype")}
    config["dtype"] = dtype
    (folder / "config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _write_provenance(folder: Path, info: AdapterInfo, identity: Mapping[str, Any], dtype: str) -> None:
    content = {
        "merged": True,
        "base": info.base or dict(identity),
        "adapter": {
            "method": info.method,
            **{key: info.config.get(key) for key in ("r", "lora_alpha", "use_rslora", "target_modules")},
        },
        "contract": info.contract,
        "dtype": dtype,
        "versions": info.versions,
    }
    text = json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    (folder / PROVENANCE_FILE).write_text(text, encoding="utf-8")


# Proving
# ---------------------------------------------------------------------------------------------------------------


def _logits_of_base(model: nn.Module, prompts: Sequence[Sequence[int]]) -> Tensor:
    with adapter_disabled(model):
        return logits_of(model, prompts)


@dataclass(frozen=True, slots=True)
class _Differences:
    """RMS differences of logits over their spread: adapter against base, merged against adapter, merged against
    base."""

    effect: float
    error: float
    max_error: float
    left: float


def _compare(merged: Tensor, expected: Tensor, of_base: Tensor) -> _Differences:
    spread = spread_of(expected)
    return _Differences(
        effect=rms(expected - of_base) / spread,
        error=rms(merged - expected) / spread,
        max_error=float((merged - expected).abs().max()) / spread,
        left=rms(merged - of_base) / spread,
    )


def _prove(differences: _Differences, dtype: torch.dtype, name: str) -> None:
    if not differences.effect > 0:
        raise ExportError(
            "merge-vanished",
            "the adapter changes nothing: base and base + adapter give the same logits",
            why="it was never trained, or its learning rate was 0",
            fix="look at the run's loss; merge a checkpoint that learnt something",
        )
    # `not <` also catches NaN.
    if not differences.error < differences.effect or not differences.left > 0.5 * differences.effect:
        raise ExportError(
            "merge-vanished",
            f"the adapter moves logits by {differences.effect:.2e} of their spread; the merged model is "
            f"{differences.error:.2e} away from it and {differences.left:.2e} away from the base",
            why=f"the adapter's update is lost in the result (rounding to {name}, or a merge that went wrong)",
            fix="merge with dtype float32, or train longer",
        )
    tolerance = _TOLERANCES[dtype]
    if not differences.error <= tolerance:
        raise ExportError(
            "merge-unverified",
            f"the merged model's logits differ from the adapter's by {differences.error:.2e} of their spread",
            why=f"rounding to {name} explains at most {tolerance:.0e}; nothing was written",
            fix="merge with dtype float32; if it fails too, report the model and the adapter",
        )
