"""What each weight format costs: the error on normal and on trained weights, and the divergence of the predictions.

    python bench/quantization.py --data FOLDER [--output bench/results/quantization.json]

FOLDER holds stories260k_hf (a trained Llama of 260,032 parameters), text_english_books/books_en.jsonl.gz and
text_italian/eltec_ita.jsonl.gz, of which the 25th work is taken: affina/nano, trained on the others, has not seen it.
Normal weights: 1,024 rows of 2,560 of N(0, 1), seed 0. INT4 is the symmetric grid
−7 … 7 with one scale per block of 64, for comparison only: affina has no such format. KL(unquantised ‖ quantised) per
token is measured on `NUM_RECORDS` windows of 256 tokens, spread evenly over each text, on the CPU in float32; its
interval is a bootstrap over windows.
"""

from __future__ import annotations

import argparse
import gzip
import itertools
import json
import platform
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

import affina
from affina.catalog.embedded import embedded_model_path
from affina.data.samples import Sample
from affina.evaluation.quantization import QuantizationErrors, decibels, measure_quantization
from affina.models.load import load_causal_lm
from affina.models.weights import Fp4Options, Fp8Options, Int8Options, Nf4Options, WeightFormatOptions

RESULTS = Path(__file__).parent / "results" / "quantization.json"
ROWS, COLUMNS = 1024, 2560
NUM_RECORDS = 24
RECORD_TOKENS = 256
FORMATS: dict[str, WeightFormatOptions] = {
    "int8": Int8Options(),
    "fp8": Fp8Options(),
    "nf4, scale search": Nf4Options(scale_search=True),
    "nf4": Nf4Options(),
    "nf4, single": Nf4Options(double_quantization=False),
    "fp4, scale search": Fp4Options(scale_search=True),
    "fp4": Fp4Options(),
}
TEXTS = {
    "English": "text_english_books/books_en.jsonl.gz",
    "Italian": "text_italian/eltec_ita.jsonl.gz",
}
HELD_OUT_WORK = 24
"""The first of those that tools/nano/corpus.py keeps out of affina/nano's training."""


def normal_weights() -> dict[str, dict[str, float]]:
    """Error relative to σ, signal to noise in dB and bits per weight of each format, INT4 included."""
    weight = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(0))
    layer = torch.nn.Linear(COLUMNS, ROWS, bias=False)
    layer.weight.data = weight
    rows = {}
    for name, options in FORMATS.items():
        quantized = options.quantize_linear(layer)
        error = float((quantized.dequantize(torch.float32) - weight).double().square().mean().sqrt())
        rows[name] = _row(error, quantized.quantized.num_bytes * 8 / weight.numel())
    rows["int4 (not a format)"] = _row(float((int4(weight) - weight).double().square().mean().sqrt()), 4.5)
    return rows


def _row(error: float, bits: float) -> dict[str, float]:
    return {"rmse_over_sigma": error, "snr_db": decibels(error), "bits_per_weight": bits}


def int4(weight: torch.Tensor) -> torch.Tensor:
    """The weight on the grid −7 … 7 times max |w| / 7 of its block of 64."""
    blocks = weight.reshape(-1, 64)
    scale = blocks.abs().amax(dim=1, keepdim=True) / 7
    return ((blocks / scale).round() * scale).reshape(weight.shape)


def held_out_work(path: Path) -> dict[str, str]:
    """Title, author and text of the held-out work of a file."""
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        work: dict[str, str] = json.loads(next(itertools.islice(lines, HELD_OUT_WORK, None)))
    return work


def windows(folder: Path, text: str) -> list[Sample]:
    """Evenly spread pieces of a text as samples, every token but the first supervised."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    step = len(text) // NUM_RECORDS
    samples = []
    for start in range(0, step * NUM_RECORDS, step):
        ids = tokenizer(text[start : start + 2 * RECORD_TOKENS], add_special_tokens=True)["input_ids"]
        ids = np.array(ids[:RECORD_TOKENS], np.int32)
        labels = ids.copy()
        labels[0] = -100
        samples.append(Sample(ids, labels))
    return samples


def measure_model(folder: Path, texts: dict[str, str]) -> list[dict[str, Any]]:
    """One record per format: error of the weights, the worst layers, and the divergence on each text."""
    samples = {name: windows(folder, text) for name, text in texts.items()}
    records = []
    for name, options in FORMATS.items():
        quantized = load_causal_lm(str(folder), dtype=torch.float32, device="cpu", weight_format=options)
        reports = {text: measure_quantization(quantized, folder, samples[text], text=text) for text in texts}
        first: QuantizationErrors = next(iter(reports.values()))
        records.append(
            {
                "format": name,
                "relative_error": first.relative_error,
                "snr_db": first.snr_db,
                "worst_layer": first.worst(1)[0].name,
                "worst_layer_relative_error": first.worst(1)[0].relative_error,
                "texts": {text: report.to_dict()["divergence"] for text, report in reports.items()},
            }
        )
        print(f"{folder.name:>15} {name:>18}: {describe(records[-1])}", file=sys.stderr)
    return records


def describe(record: dict[str, Any]) -> str:
    """One line."""
    kl = "  ".join(f"{text} {moved['kl']['value']:.2e}" for text, moved in record["texts"].items())
    return f"{record['relative_error']:.2%}  {record['snr_db']:.1f} dB  KL {kl}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    nano = embedded_model_path("affina/nano")
    assert nano is not None
    works = {name: held_out_work(arguments.data / path) for name, path in TEXTS.items()}
    texts = {name: work["text"] for name, work in works.items()}
    result = {
        "when": datetime.now(UTC).strftime("%Y-%m-%d"),
        "affina": affina.__version__,
        "torch": torch.__version__,
        "machine": platform.machine(),
        "texts": {name: f"{work['author']}, {work['title']}" for name, work in works.items()},
        "normal_weights": normal_weights(),
        "models": {
            "stories260k": measure_model(arguments.data / "stories260k_hf", texts),
            "affina/nano": measure_model(nano, texts),
        },
    }
    arguments.output.write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
