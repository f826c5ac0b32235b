"""NF4 on a GPU: affina's codec against bitsandbytes', same weights, same call: equality and time.

    python bench/nf4_gpu.py [--output bench/results/nf4_gpu.json]

A [9728, 2560] bf16 matrix of random numbers (Qwen3-4B's gate projection), double quantisation. Medians of 50 after 10.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import bitsandbytes
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit

from affina.kernels.code_tables import NF4
from affina.kernels.four_bit import quantize


def milliseconds(function: Callable[[], Any]) -> float:
    for _ in range(10):
        function()
    times = []
    for _ in range(50):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        function()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "nf4_gpu.json")
    output = parser.parse_args().output
    torch.manual_seed(0)
    weight = torch.randn(9728, 2560, device="cuda", dtype=torch.bfloat16) * 0.02
    ours = quantize(weight, NF4, double_quantization=True)
    codes, state = quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    theirs = dequantize_4bit(codes, state)
    record = {
        "equal_codes": bool((ours.codes.flatten() == codes.flatten()).all()),
        "different_codes": int((ours.codes.flatten() != codes.flatten()).sum()),
        "largest_difference": float((ours.dequantize(torch.bfloat16).float() - theirs.float()).abs().max()),
        "milliseconds_affina": milliseconds(lambda: ours.dequantize(torch.bfloat16)),
        "milliseconds_bitsandbytes": milliseconds(lambda: dequantize_4bit(codes, state)),
        "device": torch.cuda.get_device_name(),
        "versions": {"torch": torch.__version__, "bitsandbytes": bitsandbytes.__version__},
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
    }
    output.write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record))


if __name__ == "__main__":
    main()
