"""What quantising a model costs: the error of each layer's weights, and how far its predictions move.

**Weights.** For each layer, with W its dense weight and Ŵ the one that is kept:

    RMSE = √ mean (ŵ − w)²        relative error = RMSE / √ mean w²        SNR = −20 log₁₀ (relative error)  in dB

**Predictions.** On held-out text, at each supervised position t, the divergence of the two next-token distributions,

    KL_t = Σ_v p_t(v) (log p_t(v) − log q_t(v))        p: unquantised, q: quantised, in nats, ≥ 0

averaged over tokens. Its interval is a bootstrap over records (`stats.bootstrap_ratio`): tokens of one text are not
independent. Both distributions are computed in float32, so that only the weights differ. A divergence needs
no right answers, and sees more than perplexity, in which better and worse guesses cancel; perplexities are given too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from affina.data.samples import IGNORED_LABEL, Sample
from affina.errors import EvaluationError
from affina.evaluation.perplexity import Progress, exponential, no_progress
from affina.evaluation.stats import Estimate, bootstrap_ratio
from affina.models.device import free_bytes
from affina.models.forward import compute_context, evaluation_mode
from affina.models.load import load_causal_lm
from affina.models.safetensors_file import TensorSpec, checkpoint_tensors, read_tensor
from affina.models.structure import base_model_of, text_config
from affina.models.weights import DENSE, QuantizedLinear, format_of
from affina.runs.units import format_bytes

DenseWeight = Callable[[str], Tensor | None]
"""From a layer's name to its dense weight [out, in]; None where it cannot be read."""

_SHARE_OF_FREE_MEMORY = 0.8
_ROWS_AT_ONCE = 128
"""Positions whose float64 distributions are held at once: 150 MiB each at a vocabulary of 152,000."""


@dataclass(frozen=True, slots=True)
class LayerError:
    """The error of one layer's weight; `rmse` in units of the weight, the others relative to it (see the module)."""

    name: str
    shape: tuple[int, int]
    bits_per_weight: float
    rmse: float
    relative_error: float
    snr_db: float


@dataclass(frozen=True, slots=True)
class Divergence:
    """How far predictions moved, on `num_tokens` supervised tokens of `num_records` records of `text`.

    kl:            mean of KL(unquantised ‖ quantised) per token in nats, with its interval
    top_agreement: share of tokens for which both models put the same token first
    perplexity_unquantized, perplexity_quantized: on the same tokens
    """

    text: str
    num_records: int
    num_tokens: int
    kl: Estimate
    top_agreement: float
    perplexity_unquantized: float
    perplexity_quantized: float


@dataclass(frozen=True, slots=True)
class QuantizationErrors:
    """The report on one quantised model; `divergence` is None where it was not measured, and a note says why."""

    format: str
    layers: tuple[LayerError, ...]
    divergence: Divergence | None
    notes: tuple[str, ...] = ()

    @property
    def relative_error(self) -> float:
        """RMSE over all weights of all layers, relative to them."""
        squares = math.fsum(layer.rmse**2 * math.prod(layer.shape) for layer in self.layers)
        weights = math.fsum(
            (layer.rmse / layer.relative_error) ** 2 * math.prod(layer.shape)
            for layer in self.layers
            if layer.relative_error > 0
        )
        return math.sqrt(squares / weights) if weights > 0 else 0.0

    @property
    def snr_db(self) -> float:
        """Signal to noise over all weights of all layers, in dB."""
        return decibels(self.relative_error)

    def worst(self, count: int) -> list[LayerError]:
        """The layers with the largest relative error, the worst first."""
        return sorted(self.layers, key=lambda layer: (-layer.relative_error, layer.name))[:count]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready. What is infinite, or not known, is None: JSON has no word for it."""
        divergence = None
        if self.divergence is not None:
            kl = self.divergence.kl
            is_known = math.isfinite(kl.standard_error)  # not with fewer than five records
            divergence = asdict(self.divergence) | {
                "kl": {
                    "value": kl.value,
                    "interval": kl.interval.to_list() if is_known else None,
                    "level": kl.interval.level,
                    "standard_error": kl.standard_error if is_known else None,
                }
            }
        return {
            "format": self.format,
            "relative_error": self.relative_error,
            "snr_db": _finite(self.snr_db),
            "worst_layers": [layer.name for layer in self.worst(5)],
            "divergence": divergence,
            "layers": [
                asdict(layer) | {"shape": list(layer.shape), "snr_db": _finite(layer.snr_db)} for layer in self.layers
            ],
            "notes": list(self.notes),
        }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def decibels(relative_error: float) -> float:
    """−20 log₁₀ of an error relative to the signal; infinite for none."""
    return math.inf if relative_error == 0 else -20 * math.log10(relative_error)


# Weights
# ---------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def layer_errors(model: nn.Module, dense_weight: DenseWeight) -> tuple[list[LayerError], list[str]]:
    """The error of every quantised layer of `model`, one dense weight at a time, and the names of layers whose dense
    weight cannot be read."""
    base = base_model_of(model)
    errors, unread = [], []
    for name, layer in base.named_modules():
        if not isinstance(layer, QuantizedLinear):
            continue
        weight = dense_weight(name)
        if weight is None or tuple(weight.shape) != (layer.out_features, layer.in_features):
            unread.append(name)
        else:
            errors.append(_layer_error(name, layer, weight))
    return errors, unread


def _layer_error(name: str, layer: QuantizedLinear, weight: Tensor) -> LayerError:
    kept = layer.dequantize(torch.float32)
    dense = weight.to(kept.device, torch.float32)
    # The norms are float64: summing 25 million float32 squares one by one would lose digits.
    signal = float(torch.linalg.vector_norm(dense, dtype=torch.float64))
    noise = float(torch.linalg.vector_norm(kept.sub_(dense), dtype=torch.float64))
    relative = noise / signal if signal > 0 else 0.0
    return LayerError(
        name=name,
        shape=(layer.out_features, layer.in_features),
        bits_per_weight=layer.quantized.num_bytes * 8 / dense.numel(),
        rmse=noise / math.sqrt(dense.numel()),
        relative_error=relative,
        snr_db=decibels(relative),
    )


# Predictions
# -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def divergence(
    unquantized: nn.Module,
    quantized: nn.Module,
    samples: Sequence[Sample],
    *,
    text: str,
    confidence: float = 0.95,
    num_resamples: int = 2000,
    seed: int = 0,
    progress: Progress = no_progress,
) -> Divergence:
    """KL(unquantised ‖ quantised) per supervised token of `samples`, each of which is a record of its own.

    text: what the samples are, for the report

    Raises EvaluationError: evaluation-no-tokens, evaluation-not-finite.
    """
    used = [sample for sample in samples if sample.num_supervised > 0]
    if not used:
        raise EvaluationError(
            "evaluation-no-tokens",
            f"{text} has no supervised token to measure on",
            fix="give another text with --text FILE",
        )
    sums, counts = [], []
    same = 0
    nll_unquantized = nll_quantized = 0.0
    with evaluation_mode(unquantized), evaluation_mode(quantized):
        for number, sample in enumerate(used, start=1):
            total = 0.0
            for p, q, targets in _distributions(unquantized, quantized, sample):
                total += float((p.exp() * (p - q)).sum())
                same += int((p.argmax(dim=1) == q.argmax(dim=1)).sum())
                nll_unquantized -= float(p.gather(1, targets).sum())
                nll_quantized -= float(q.gather(1, targets).sum())
            if not math.isfinite(total):
                raise EvaluationError(
                    "evaluation-not-finite",
                    f"record {number} of {text} has a divergence of {total}",
                    why="one of the two models' outputs overflows or holds NaN",
                    fix="quantise with another format, or look at the layers of the report",
                )
            sums.append(total)
            counts.append(sample.num_supervised)
            progress("divergence", number, len(used))
    num_tokens = sum(counts)
    return Divergence(
        text=text,
        num_records=len(used),
        num_tokens=num_tokens,
        kl=bootstrap_ratio(sums, counts, num_resamples=num_resamples, confidence=confidence, seed=seed),
        top_agreement=same / num_tokens,
        perplexity_unquantized=exponential(nll_unquantized / num_tokens),
        perplexity_quantized=exponential(nll_quantized / num_tokens),
    )


def _distributions(
    unquantized: nn.Module, quantized: nn.Module, sample: Sample
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """([R, V], [R, V], [R, 1]): float64 log-probabilities of both models and the targets, R positions at once."""
    labels = torch.from_numpy(sample.labels.astype(np.int64))  # a copy: stores hand out read-only arrays
    positions = torch.nonzero(labels != IGNORED_LABEL).flatten()
    logits = [_logits(model, sample) for model in (unquantized, quantized)]
    for part in torch.split(positions, _ROWS_AT_ONCE):
        p, q = (rows[(part - 1).to(rows.device)].double().log_softmax(dim=1) for rows in logits)
        yield p, q.to(p.device), labels[part].unsqueeze(1).to(p.device)


def _logits(model: nn.Module, sample: Sample) -> Tensor:
    base = base_model_of(model)
    ids = torch.from_numpy(sample.input_ids.astype(np.int64)).unsqueeze(0).to(base.device)
    with compute_context(model):
        logits: Tensor = model(input_ids=ids, use_cache=False).logits[0, :, : text_config(base).vocab_size]
    return logits


# The whole report
# ------------------------------------------------------------------------------------------------------


def measure_quantization(
    quantized: PreTrainedModel,
    folder: Path,
    samples: Sequence[Sample] = (),
    *,
    text: str = "",
    trust_remote_code: bool = False,
    notes: Sequence[str] = (),
    progress: Progress = no_progress,
) -> QuantizationErrors:
    """The errors of `quantized`, whose unquantised checkpoint is in `folder`.

    Dense weights are read one at a time. For the divergence, the unquantised model is loaded beside the quantised one,
    in float32 where that fits into what is free, and `quantized` is cast to it (its codes and scales stay). In 16 bits
    the roundings of two computations are part of the divergence (1.8e-3 nats in bfloat16 on affina/nano, where int8's
    own is 2.5e-3); a note says so, and another one when not even that fits.
    """
    specs = checkpoint_tensors(folder)
    said = list(notes)
    unquantized = _load_unquantized(quantized, folder, specs, trust_remote_code, said) if samples else None

    def dense_weight(name: str) -> Tensor | None:
        if f"{name}.weight" in specs:
            return read_tensor(specs[f"{name}.weight"])
        # A checkpoint with other names: fused experts, missing prefixes.
        return DENSE.dequantize(unquantized.get_submodule(name)) if unquantized is not None else None

    layers, unread = layer_errors(quantized, dense_weight)
    if unread:
        said.append(f"{len(unread)} layers have no tensor of their own in the checkpoint and were not measured")
    moved = None
    if unquantized is not None:
        quantized.to(unquantized.dtype)
        moved = divergence(unquantized, quantized, samples, text=text, progress=progress)
    return QuantizationErrors(format_name(quantized), tuple(layers), moved, tuple(said))


def _load_unquantized(
    quantized: PreTrainedModel,
    folder: Path,
    specs: Mapping[str, TensorSpec],
    trust_remote_code: bool,
    notes: list[str],
) -> PreTrainedModel | None:
    num_parameters = sum(math.prod(spec.shape) for spec in specs.values())
    free = free_bytes(quantized.device)
    room = _SHARE_OF_FREE_MEMORY * free
    needed = num_parameters * quantized.dtype.itemsize
    if needed > room:
        notes.append(
            f"the divergence was not measured: the unquantised model needs {format_bytes(needed)} and "
            f"{format_bytes(free)} are free"
        )
        return None
    dtype = torch.float32
    # The quantised model's own dense part grows to 4 bytes too, and is smaller than the whole.
    if 2 * num_parameters * dtype.itemsize > room and quantized.dtype != dtype:
        dtype = quantized.dtype
        kind = str(dtype).removeprefix("torch.")
        notes.append(
            f"the divergence was computed in {kind}, for want of memory for float32: rounding is part of it, and it "
            "says little about int8"
        )
    return load_causal_lm(str(folder), dtype=dtype, device=quantized.device, trust_remote_code=trust_remote_code)


def format_name(model: nn.Module) -> str:
    """The weight format of a model's quantised layers: `nf4`."""
    for module in base_model_of(model).modules():
        if isinstance(module, QuantizedLinear) and (weight_format := format_of(module)) is not None:
            return weight_format.name
    return "dense"
