"""A model written with its linear layers in a weight format, once, so that later runs load it as it is.

The checkpoint is read one tensor at a time and quantised at once, so that the dense model is never in memory. The
result is written under a temporary name, loaded again and compared with the model in memory: codes and scales must be
the same bits, and the logits those of the same weights. Only then does it get its name.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from affina.catalog.model_files import read_config, resolve_model_folder
from affina.errors import ExportError
from affina.export.output import check_output, check_space, copy_companions
from affina.export.probes import default_probes, logits_of, rms, spread_of, text_vocabulary
from affina.models.adapters import base_identity
from affina.models.build import count_parameters
from affina.models.device import check_fp8
from affina.models.load import load_causal_lm, load_notes
from affina.models.quantization_plan import QuantizationPlan, plan_quantization
from affina.models.quantized_checkpoint import save_quantized
from affina.models.weights import Fp8Linear, WeightFormatOptions, quantized_layers
from affina.runs import atomic

PROVENANCE_FILE = "affina.json"
REPORT_FILE = "quantization_report.json"
_MAX_SHARD_BYTES = 4 * 1000**3

# RMS of the logits' difference over the logits' spread. The weights are equal bit for bit; what may differ is the order
# of a product's sums, that is a few roundings of the type: 2^-24, 2^-11 and 2^-8 of the values, through all layers.
_TOLERANCES = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 3e-2}

Measure = Callable[[PreTrainedModel, Path], Mapping[str, Any]]
"""(the quantised model in memory, the folder of the unquantised one) → a JSON-ready report of its errors."""


@dataclass(frozen=True, slots=True)
class QuantizeReport:
    """What was written, and that it is what is in memory.

    num_bytes, num_bytes_before: of the weight files
    bits_per_weight:             of the quantised layers, scales included
    dense_layers:                linear layers that stay in `dtype`
    logits_difference:           loaded again against in memory, RMS over the logits' spread, on `num_probe_tokens`
    errors:                      the report of per-layer errors and divergence; None when none was asked for
    """

    output: Path
    model: str
    format: str
    double_quantization: bool | None
    scale_search: bool | None
    dtype: str
    num_layers: int
    dense_layers: tuple[str, ...]
    num_bytes: int
    num_bytes_before: int
    bits_per_weight: float
    files: tuple[str, ...]
    num_probe_tokens: int
    logits_difference: float
    seconds: float
    notes: tuple[str, ...]
    errors: Mapping[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        values = asdict(self)
        listed = {key: list(values[key]) for key in ("dense_layers", "files", "notes")}
        return values | listed | {"output": str(self.output)}


def quantize(
    model: str,
    output: Path | str,
    options: WeightFormatOptions,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    device: torch.device | str = "cpu",
    measure: Measure | None = None,
    max_shard_bytes: int = _MAX_SHARD_BYTES,
) -> QuantizeReport:
    """Writes `model` quantised into the new directory `output`, proves it, and measures it with `measure`.

    model:   directory, hub id or affina/nano; not quantised yet
    device:  where layers are quantised and logits computed
    measure: called when the directory is complete: an error in it loses nothing that was written

    Raises ExportError: output-exists, output-not-writable, already-quantized, nothing-to-quantize, disk-full,
    quantize-unverified; ModelError when the model cannot be used.
    """
    started = time.monotonic()
    target = Path(output)
    check_output(target, why="a quantised model never overwrites another one")
    folder = resolve_model_folder(model, revision=revision, with_code=trust_remote_code)
    raw_config = read_config(folder)
    _check_unquantized(model, raw_config)
    plan = plan_quantization(folder, options, path=model, trust_remote_code=trust_remote_code)
    _check_layers(model, plan, options)
    check_space(target, plan.num_bytes, what="the quantised model")
    if options.layer is Fp8Linear:
        check_fp8(torch.device(device), plan.dtype)

    def load(path: str, weight_format: WeightFormatOptions | None) -> PreTrainedModel:
        return load_causal_lm(
            path,
            revision=revision,
            dtype=plan.dtype,
            device=device,
            weight_format=weight_format,
            trust_remote_code=trust_remote_code,
        )

    quantized = load(model, options)
    prompts = default_probes(folder, text_vocabulary(raw_config))
    with atomic.new_directory(target) as temporary:
        save_quantized(quantized, temporary, max_shard_bytes=max_shard_bytes)
        copy_companions(folder, temporary, with_code=trust_remote_code)
        _write_provenance(temporary, model, quantized, options)
        files = sorted(path for path in temporary.glob("*.safetensors"))
        num_bytes = sum(path.stat().st_size for path in files)
        expected = logits_of(quantized, prompts)
        difference = _prove(quantized, load(str(temporary), None), prompts, expected, plan.dtype)
    layers = quantized_layers(quantized)
    num_weights = sum(layer.out_features * layer.in_features for layer in layers)
    report = QuantizeReport(
        output=target,
        model=model,
        format=options.name,
        double_quantization=getattr(options, "double_quantization", None),
        scale_search=getattr(options, "scale_search", None),
        dtype=str(plan.dtype).removeprefix("torch."),
        num_layers=len(layers),
        dense_layers=plan.dense,
        num_bytes=num_bytes,
        num_bytes_before=plan.dense_bytes,
        bits_per_weight=sum(layer.quantized.num_bytes for layer in layers) * 8 / num_weights,
        files=tuple(path.name for path in files),
        num_probe_tokens=expected.shape[0],
        logits_difference=difference,
        seconds=round(time.monotonic() - started, 1),
        notes=(*load_notes(quantized), *_small_share(num_weights, count_parameters(quantized), plan.dtype)),
    )
    if measure is None:
        return report
    errors = measure(quantized, folder)
    atomic.write_json(target / REPORT_FILE, errors)
    return replace(report, errors=errors, seconds=round(time.monotonic() - started, 1))


# Before anything is written
# --------------------------------------------------------------------------------------------


def _check_unquantized(model: str, raw_config: Mapping[str, Any]) -> None:
    stored = raw_config.get("quantization_config")
    if stored is None:
        return
    kind = stored.get("bnb_4bit_quant_type") if stored.get("load_in_4bit") else None
    described = " ".join(str(part) for part in (stored.get("quant_method"), kind) if part)
    raise ExportError(
        "already-quantized",
        f"{model} is stored quantised already ({described})",
        why="quantising it again would add a second error to the first",
        fix="give the original model, in bfloat16, float16 or float32",
    )


def _check_layers(model: str, plan: QuantizationPlan, options: WeightFormatOptions) -> None:
    if plan.layers:
        return
    dense = f"its linear layers are {', '.join(plan.dense[:3])}" if plan.dense else "it has no linear layers"
    raise ExportError(
        "nothing-to-quantize",
        f"{model} has no linear layer that can be kept in {options.name}",
        why=f"{dense}; the head stays dense, and so do GPT-2's transposed layers",
        fix="use the model as it is",
    )


def _small_share(num_quantized: int, num_parameters: int, dtype: torch.dtype) -> tuple[str, ...]:
    if num_quantized >= 0.5 * num_parameters:
        return ()
    kind = str(dtype).removeprefix("torch.")
    return (
        f"{num_quantized / num_parameters:.0%} of the parameters are in linear layers that were quantised; the others "
        f"(embedding, fused experts, …) stay in {kind}, so the model shrinks little",
    )


# Writing and proving
# ---------------------------------------------------------------------------------------------------


def _write_provenance(folder: Path, model: str, quantized: PreTrainedModel, options: WeightFormatOptions) -> None:
    content = {
        "quantized": True,
        "base": base_identity(quantized) | {"path": model},
        "quantization": {"format": options.name, **asdict(options)},  # type: ignore[call-overload]
    }
    atomic.write_json(folder / PROVENANCE_FILE, content)


@torch.no_grad()
def _prove(
    quantized: PreTrainedModel,
    loaded: PreTrainedModel,
    prompts: list[list[int]],
    expected: Tensor,
    dtype: torch.dtype,
) -> float:
    """The distance of the logits. Raises ExportError[quantize-unverified]."""
    before, after = quantized.state_dict(), loaded.state_dict()
    wrong = sorted(before.keys() ^ after.keys()) + [
        name for name in before.keys() & after.keys() if not _is_same(before[name], after[name])
    ]
    difference = rms(logits_of(loaded, prompts) - expected) / spread_of(expected)
    # `not <=` also catches NaN.
    if wrong or not difference <= _TOLERANCES[dtype]:
        what = f"{wrong[0]} differs" if wrong else f"its logits differ by {difference:.1e} of their spread"
        raise ExportError(
            "quantize-unverified",
            f"what was written is not what is in memory: {what}",
            why="nothing was kept; a faulty disk, or a mistake of affina's",
            fix="try another disk; if it happens again, report the model",
        )
    return difference


def _is_same(first: Tensor, second: Tensor) -> bool:
    if first.shape != second.shape or first.dtype != second.dtype:
        return False
    return torch.equal(first.contiguous().view(-1).view(torch.uint8), second.contiguous().view(-1).view(torch.uint8))
