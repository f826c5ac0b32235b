"""Where the time of one fast training step goes, on a GPU.

    python bench/step_profile.py [--case bf16-lora-8x2048] [--output bench/results/step_profile.json]

The step runs launch by launch under torch's profiler (a CUDA graph's inside cannot be attributed), then once more as it
is trained, graphs included; the difference of the two is what the host costs. Products are told apart by their shapes:
those with a side of at most 256 are the adapter's.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

from records import versions  # noqa: E402
from systems.affina import batches_of, one_step, prepare  # noqa: E402
from systems.common import time_steps  # noqa: E402
from train_step import CASES  # noqa: E402

STEPS = 3
_CATEGORIES = (
    ("attention", ("flash", "cudnn", "fmha", "attention")),
    ("norm", ("rms_norm", "_norm")),
    ("rotation", ("rope",)),
    ("activation", ("swiglu",)),
    ("loss", ("cross_entropy", "nonzero", "index", "gather")),
    ("expansion of weights", ("nf4", "dequant")),
    ("optimiser", ("adam", "norm_kernel", "foreach")),
)


def category(name: str, shapes: str) -> str:
    """The part of the step that an operation belongs to."""
    if name in ("aten::mm", "aten::addmm", "aten::addmm_", "aten::_scaled_mm"):
        sides = [int(n) for n in shapes.replace("[", " ").replace("]", " ").replace(",", " ").split()]
        if name == "aten::_scaled_mm":  # its scales are arguments too
            sides = [n for n in sides if n > 1]
        if 151_936 in sides or 128_256 in sides:
            return "head product"
        return "adapter products" if min(sides, default=0) <= 256 else "base products"
    lowered = name.lower()
    return next((title for title, words in _CATEGORIES if any(word in lowered for word in words)), "other")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=CASES, default="bf16-lora-8x2048")
    parser.add_argument("--output", type=Path, default=HERE / "results" / "step_profile.json")
    parser.add_argument("--rows", type=int, default=32)
    arguments = parser.parse_args()
    spec = CASES[arguments.case]
    model, optimizer, engine = prepare(spec, {"graphs": False})
    batches = batches_of(spec)

    def step(index: int) -> tuple[int, float]:
        return one_step(model, optimizer, batches[index % len(batches)])

    eager = time_steps(step)
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA], record_shapes=True) as profiler:
        for index in range(STEPS):
            step(index)
        torch.cuda.synchronize()
    rows: list[tuple[float, int, str, str]] = []
    totals: dict[str, float] = defaultdict(float)
    for event in profiler.key_averages(group_by_input_shape=True):
        milliseconds = event.self_device_time_total / 1e3 / STEPS
        # Kernels are listed beside the operations that launch them; Triton's alone have no operation.
        is_kernel = event.device_type != torch.autograd.DeviceType.CPU
        is_triton = is_kernel and event.key.startswith("_") and event.key.endswith("_kernel")
        # Of autograd's own nodes the time is that of the Triton kernels inside, which are listed by themselves.
        if milliseconds < 1e-3 or (is_kernel and not is_triton) or "_FusedLoss" in event.key:
            continue
        shapes = str(event.input_shapes)[:60]
        rows.append((milliseconds, event.count // STEPS, event.key[:50], shapes))
        totals[category(event.key, shapes)] += milliseconds
    engine.enable_graphs(print)
    graphed = time_steps(step)
    for milliseconds, count, name, shapes in sorted(rows, reverse=True)[: arguments.rows]:
        print(f"{milliseconds:9.2f} ms {count:6d} × {name:50} {shapes}")
    busy = sum(totals.values())
    print(
        f"\n{arguments.case}: {eager['milliseconds']} ms eager, {graphed['milliseconds']} ms graphed, "
        f"{busy:.1f} ms of kernels"
    )
    for title, milliseconds in sorted(totals.items(), key=lambda item: -item[1]):
        print(f"{milliseconds:9.2f} ms {milliseconds / busy:6.1%}  {title}")
    record: dict[str, Any] = {
        "case": arguments.case,
        "milliseconds_eager": eager["milliseconds"],
        "milliseconds_graphed": graphed["milliseconds"],
        "milliseconds_by_part": dict(totals),
        "device": torch.cuda.get_device_name(),
        "versions": versions(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
