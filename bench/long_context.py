"""The longest sequence that trains with QLoRA r = 16 under a hard cap of device memory.

    python bench/long_context.py [--shapes qwen3-8b,qwen3-4b] [--caps 8,12,16,24,40,80] [--seconds 300]
                                 [--full-seconds 60] [--layers 3] [--output bench/results/long_context.json] [--tiny]

One document in one row, the loss on every token, NF4 weights with random values, the fast engine's leanest policy:
every layer's input in host memory. An allocation beyond the cap fails. A length counts when one whole step of it
(forward, backward, clip, AdamW) has run under the cap, after a short step that created the optimiser's moments.

The search: bench/row_memory.py predicts the longest row from what is held per token; that length is tried, and 5% less
as often as it does not fit; a first try that fits is followed by 3% more, as long as that fits and costs little.

Attention makes a long step take minutes. Where the whole model's step would take more than `--full-seconds` by estimate
(or its inputs more host memory than there is), a model of `--layers` layers is measured, with the memory of the missing
ones (weights, adapter, moments, kept t of the down projection) taken by a block of that size: the record's
`measured_layers` and `ballast_gib` say so, and `host_gib` what the whole model would put into host memory. Three layers
are the fewest whose busiest moment is the whole model's: one with a neighbour on either side.

Unsloth publishes lengths for Llama-3.1-8B in 4 bits, rank 32; they stand beside those of Qwen3-8B.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

import records  # noqa: E402
import row_memory  # noqa: E402
from row_memory import Sizes  # noqa: E402
from systems import affina as affina_system  # noqa: E402
from systems.common import (  # noqa: E402
    DEVICE,
    SHAPES,
    cap_memory,
    device_name,
    num_token_ids,
    peak_gib,
    reset_peak,
    synchronize,
)

GIB = 2**30
CAPS = (8, 12, 16, 24, 40, 80)
UNSLOTH_8B = {8: 2_972, 12: 21_848, 16: 40_724, 24: 78_475, 40: 153_977, 80: 342_733}
RANK = 16
SHORT_ROW = 1024
MARGIN_SHARE = 0.005
"""Of the cap, for what the allocator rounds up."""
ATTENTION_FLOPS, PRODUCT_FLOPS, PIN_BYTES_PER_SECOND = 3.2e14, 6e14, 2.5e9
"""For estimates only: what an H200 reaches in long rows, and page-locking of host memory."""
HOST_SHARE = 0.6
MAX_TRIES, MAX_CLIMBS = 6, 2
CLIMB_SECONDS = 15.0


def step_seconds(sizes: Sizes, num_tokens: int, num_layers: int) -> float:
    """Estimate of a step: attention forward twice and backward once (5.5 forward passes), products three times."""
    attention = 5.5 * 2 * num_tokens**2 * sizes.queries
    weights = sizes.hidden * (2 * sizes.queries + 2 * sizes.keys + 3 * sizes.intermediate)
    products = 6 * weights * num_tokens
    head = 4 * sizes.hidden * sizes.vocabulary * num_tokens
    host = num_layers * pinned_bytes(sizes, num_tokens) / PIN_BYTES_PER_SECOND
    return num_layers * (attention / ATTENTION_FLOPS + products / PRODUCT_FLOPS) + head / PRODUCT_FLOPS + host


def pinned_bytes(sizes: Sizes, num_tokens: int) -> int:
    """Host memory of one layer's input: torch rounds page-locked blocks up to powers of two."""
    return 1 << math.ceil(math.log2(max(1, num_tokens * sizes.hidden * sizes.itemsize)))


def whole_model_bytes(sizes: Sizes, *, is_tied: bool) -> int:
    """Weights, one expanded weight, adapter and moments: what is there besides the row, for a first estimate."""
    embeddings = (1 if is_tied else 2) * sizes.vocabulary * sizes.hidden * sizes.itemsize
    workspace = (2 * sizes.intermediate + 2 * sizes.rank) * sizes.hidden * sizes.itemsize
    layer = row_memory.nf4_bytes(sizes) + row_memory.adapter_bytes(sizes)
    return embeddings + workspace + sizes.layers * layer


# One process: one model, several caps
# --------------------------------------------------------------------------------------------------------------


class Model:
    """A model with `num_layers` of the shape's layers, its optimiser, and the memory of the layers that it lacks."""

    def __init__(self, shape: str, num_layers: int) -> None:
        self.sizes = Sizes.of(SHAPES[shape], rank=RANK)
        self.num_layers = num_layers
        dtype = "bfloat16" if DEVICE.type == "cuda" else "float32"
        spec = {"model": shape, "layers": num_layers, "nf4": True, "dtype": dtype, "rows": 1, "length": SHORT_ROW}
        self._num_ids = num_token_ids(spec)
        self.model, self._optimizer, self.engine = affina_system.prepare(spec, {"graphs": False})
        while self.engine.make_room() is not None:
            pass
        self._ballast: list[torch.Tensor] = []
        self._missing = self.sizes.layers - num_layers
        self.step(SHORT_ROW if DEVICE.type == "cuda" else 64)

    def add_ballast(self, num_tokens: int) -> float:
        """Take what the missing layers would hold; GiB."""
        self._ballast.clear()
        layer = row_memory.nf4_bytes(self.sizes) + row_memory.adapter_bytes(self.sizes)
        num_bytes = self._missing * (layer + num_tokens * self.sizes.rank * self.sizes.itemsize)
        if num_bytes and DEVICE.type == "cuda":
            self._ballast.append(torch.empty(num_bytes, dtype=torch.uint8, device=DEVICE))
        return num_bytes / GIB

    def step(self, num_tokens: int) -> dict[str, Any]:
        """One whole step of a document of that length."""
        batch = affina_system.random_batch(
            [num_tokens], num_tokens=num_tokens, num_ids=self._num_ids, generator=np.random.default_rng(0)
        )
        synchronize()
        started = time.perf_counter()
        _, loss = affina_system.one_step(self.model, self._optimizer, batch)
        synchronize()
        return {"seconds": round(time.perf_counter() - started, 2), "loss": round(loss, 4)}

    def attempt(self, num_tokens: int) -> dict[str, Any] | None:
        """A step's record, or None when it does not fit; leaves nothing of the step behind."""
        try:
            ballast = self.add_ballast(num_tokens)
            reset_peak()
            result = {**self.step(num_tokens), **peak_gib(), "ballast_gib": round(ballast, 3)}
        except torch.OutOfMemoryError:
            result = None
        # Outside of the handler, where the error no longer holds the failed step's tensors.
        self._optimizer.zero_grad(set_to_none=True)
        gc.collect()
        reset_peak()
        return result

    @property
    def fixed_bytes(self) -> int:
        """Held between steps, the missing layers' share included."""
        held = torch.cuda.memory_allocated() if DEVICE.type == "cuda" else 0
        layer = row_memory.nf4_bytes(self.sizes) + row_memory.adapter_bytes(self.sizes)
        # The gradient of the layers that are there exists only while the step runs.
        gradient = self.num_layers * self.sizes.adapter_parameters * 4
        return held - sum(block.nbytes for block in self._ballast) + self._missing * layer + gradient


def search(model: Model, cap_gib: float, deadline: records.Deadline, *, longest: int | None) -> dict[str, Any]:
    """The longest row under the cap that was seen to train."""
    model.add_ballast(0)
    model._ballast.clear()
    cap_memory({"cap_gib": cap_gib})
    sizes, layers = model.sizes, model.num_layers
    free = int(cap_gib * GIB * (1 - MARGIN_SHARE)) - model.fixed_bytes
    predicted = row_memory.longest(sizes, free)
    record: dict[str, Any] = {
        "predicted_tokens": predicted,
        "fixed_gib": round(model.fixed_bytes / GIB, 3),
        "tries": [],
    }
    length, best = min(predicted, longest or predicted), None
    while length >= 128 and len(record["tries"]) < MAX_TRIES + MAX_CLIMBS:
        if deadline.left < step_seconds(sizes, length, layers):
            record["why"] = f"a step of {length:,} tokens would take longer than is left"
            break
        found = model.attempt(length)
        record["tries"].append({"tokens": length, "fits": found is not None})
        print(f"  {cap_gib} GiB, {length:,} tokens: {found or 'does not fit'}", flush=True)
        if found is None:
            if best is not None:
                break
            length = int(length * 0.95) // 128 * 128
            continue
        best = {"tokens": length, **found}
        climbs = sum(one["fits"] for one in record["tries"])
        if len(record["tries"]) > climbs or climbs > MAX_CLIMBS or found["seconds"] > CLIMB_SECONDS or longest:
            break
        length = int(length * 1.03) // 128 * 128
    return {**record, **(best or {"error": record.get("why", "no length fits")})}


def run_process(request: dict[str, Any], output: Path) -> None:
    """All caps of one shape on one model, written after each."""
    deadline = records.Deadline(request["seconds"])
    started = time.perf_counter()
    model = Model(request["shape"], request["num_layers"])
    prepared = round(time.perf_counter() - started, 1)
    found: list[dict[str, Any]] = []
    for cap in request["caps"]:
        record = {"cap_gib": cap, "prepare_seconds": prepared, "policy": model.engine.policy.describe()}
        try:
            record |= search(model, cap, deadline, longest=request["longest"])
        except Exception as error:  # noqa: BLE001 - the other caps are still worth their time
            record["error"] = f"{type(error).__name__}: {error}"[:800]
        found.append(record)
        records.write(output, {"records": found})


# All of them
# --------------------------------------------------------------------------------------------------------------


def choose_layers(sizes: Sizes, num_tokens: int, *, full_seconds: float, few_layers: int) -> int:
    """All layers where their step is affordable, else `few_layers`."""
    host = sizes.layers * pinned_bytes(sizes, num_tokens)
    is_affordable = step_seconds(sizes, num_tokens, sizes.layers) <= full_seconds
    return sizes.layers if is_affordable and host <= HOST_SHARE * psutil.virtual_memory().available else few_layers


Report = Callable[[list[dict[str, Any]]], None]
"""Told all records of a shape that there are so far."""


def measure(
    shape: str, caps: Sequence[float], arguments: argparse.Namespace, deadline: records.Deadline, report: Report
) -> None:
    """One shape: the caps whose whole model is affordable in one process, the others in another."""
    sizes = Sizes.of(SHAPES[shape], rank=RANK)
    fixed = whole_model_bytes(sizes, is_tied=SHAPES[shape]["tie_word_embeddings"])
    by_layers: dict[int, list[float]] = {}
    for cap in caps:
        estimate = max(128, row_memory.longest(sizes, int(cap * GIB) - fixed))
        few = min(arguments.layers, sizes.layers)
        layers = choose_layers(sizes, estimate, full_seconds=arguments.full_seconds, few_layers=few)
        by_layers.setdefault(layers, []).append(cap)
    finished: list[dict[str, Any]] = []
    for num_layers, some in by_layers.items():

        def report_all(
            new: list[dict[str, Any]], before: Sequence[Any] = tuple(finished), count: int = num_layers
        ) -> None:
            report([*before, *(completed(record, shape, sizes, count) for record in new)])

        new = measure_in_process(shape, num_layers, some, arguments, deadline, report_all)
        report_all(new)
        finished += [completed(record, shape, sizes, num_layers) for record in new]


def completed(record: dict[str, Any], shape: str, sizes: Sizes, num_layers: int) -> dict[str, Any]:
    """A process's record with what it stands for, and what it compares with."""
    record = {**record, "shape": shape, "measured_layers": num_layers, "num_layers": sizes.layers}
    if "tokens" in record:
        record["host_gib"] = round(sizes.layers * record["tokens"] * sizes.hidden * sizes.itemsize / GIB, 1)
    if shape == "qwen3-8b":
        record["unsloth_tokens"] = UNSLOTH_8B.get(record["cap_gib"])
    return record


def measure_in_process(
    shape: str,
    num_layers: int,
    caps: list[float],
    arguments: argparse.Namespace,
    deadline: records.Deadline,
    report: Report,
) -> list[dict[str, Any]]:
    """In a process of its own; when it dies, another one goes on with the next cap."""
    found: list[dict[str, Any]] = []
    while len(found) < len(caps):
        left = caps[len(found) :]
        if deadline.left < 20:
            return found + [{"cap_gib": cap, "error": "no time was left"} for cap in left]
        with tempfile.TemporaryDirectory() as folder:
            output = Path(folder) / "result.json"

            def written(output: Path = output) -> list[dict[str, Any]]:
                return list((records.read(output) or {"records": []})["records"])

            request = {
                "shape": shape,
                "num_layers": num_layers,
                "caps": left,
                "seconds": deadline.left - 10,
                "longest": 256 if arguments.tiny else None,
            }
            print(f"{shape}, {num_layers} layers, caps {left}", flush=True)
            command = [sys.executable, str(HERE / "long_context.py"), "--request", json.dumps(request)]
            _, printed = records.run(
                [*command, "--output", str(output)],
                timeout=deadline.left,
                environment={"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"},
                meanwhile=lambda: report(found + written()),  # noqa: B023 - called before the next turn
            )
            print("\n".join(line for line in printed.splitlines() if line.startswith("  ")), flush=True)
            found += (new := written())
            if len(new) < len(left):
                found.append({"cap_gib": left[len(new)], "error": printed.strip()[-800:] or "the process died"})
    return found


def summary(found: Sequence[dict[str, Any]]) -> str:
    lines = []
    for record in found:
        head = f"{record['shape']:10} {record['cap_gib']:>5} GiB"
        if "tokens" not in record:
            lines.append(f"{head} {record['error'].splitlines()[-1][:100]}")
            continue
        beside = f"  Unsloth {record['unsloth_tokens']:,}" if record.get("unsloth_tokens") else ""
        lines.append(
            f"{head} {record['tokens']:>9,} tokens  peak {record['peak_gib']:.2f} GiB, reserved "
            f"{record['reserved_gib']:.2f}  {record['seconds']:.1f} s on {record['measured_layers']} layers{beside}"
        )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="qwen3-8b,qwen3-4b")
    parser.add_argument("--caps", default=",".join(map(str, CAPS)), help="GiB, by comma")
    parser.add_argument("--seconds", type=float, default=300.0, help="for everything")
    parser.add_argument("--full-seconds", type=float, default=60.0, help="longest step of a whole model, by estimate")
    parser.add_argument("--layers", type=int, default=3, help="of the model that stands in for a whole one")
    parser.add_argument("--output", type=Path, default=records.RESULTS / "long_context.json")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--request", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.request:
        run_process(json.loads(arguments.request), arguments.output)
        return
    if DEVICE.type != "cuda" and not arguments.tiny:
        raise SystemExit("there is no GPU; --tiny tries the script on a CPU")
    shapes = ["tiny"] if arguments.tiny else arguments.shapes.split(",")
    if unknown := set(shapes) - set(SHAPES):
        raise SystemExit(f"unknown shapes: {', '.join(sorted(unknown))}; there are {', '.join(SHAPES)}")
    caps = sorted(float(cap) if "." in cap else int(cap) for cap in arguments.caps.split(","))
    deadline = records.Deadline(arguments.seconds)
    old = records.read(arguments.output) or {"records": []}
    record: dict[str, Any] = {**records.environment(device_name()), "rank": RANK, "weights": "NF4", "per_token": {}}
    kept = [one for one in old["records"] if one["shape"] not in shapes or one["cap_gib"] not in caps]
    finished: list[dict[str, Any]] = []
    newest: list[dict[str, Any]] = []

    def report(new: list[dict[str, Any]]) -> None:
        newest[:] = new
        merged = sorted(kept + finished + new, key=lambda one: (one["shape"], one["cap_gib"]))
        records.write(arguments.output, {**record, "records": merged})

    for shape in shapes:
        record["per_token"][shape] = {
            moment.name: {
                "bytes": moment.bytes_per_token,
                "needed_bytes": moment.needed_bytes_per_token,
                "constant_bytes": moment.constant_bytes,
            }
            for moment in row_memory.moments(Sizes.of(SHAPES[shape], rank=RANK))
        }
        measure(shape, caps, arguments, deadline, report)
        finished += newest
    print(summary(finished), flush=True)


if __name__ == "__main__":
    main()
