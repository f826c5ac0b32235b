"""The longest sequence that trains with QLoRA r = 16 under a hard cap of device memory.

    python bench/long_context.py [--shapes qwen3-8b,qwen3-4b] [--caps 8,12,16,24,40,80] [--modes lowest] [--seconds 300]
                                 [--full-seconds 60] [--layers 3] [--output bench/results/long_context.json] [--tiny]

One document in one row, the loss on every token, NF4 weights with random values, the fast engine's leanest policy. Mode
`lowest` is `engine.memory: lowest`, with embedding and head in 8 bits; `nf4` leaves these in 16. An allocation beyond
the cap fails. A length counts when one whole step of it (forward, backward, clip, AdamW) has run under the cap, after a
short step that created the optimiser's moments.

The search: what two rows of moderate length take gives a line, and the line the longest row. That length is tried, and
5% less as often as it does not fit; where the measured peak leaves room for more, and a step costs little, the line is
drawn through it and its length tried as well.

Attention makes a long step take minutes. A length whose step would take more than `--step-seconds` by estimate is not
tried: the record then has the longest that was, `bounded_by` time, beside what memory would hold. Where the whole
model's step would take more than `--full-seconds` (or its inputs more host memory than there is), a model of `--layers`
layers is measured, with the memory of the missing ones (weights, adapter, moments, kept t of the down projections)
taken by a block of that size: the record's `measured_layers` and `ballast_gib` say so, and `host_gib` what the whole
model would put into host memory at least. Three layers are the fewest whose busiest moment is the whole model's: one
with a neighbour on either side. `seconds` are those of the layers that were there.

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
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

import records  # noqa: E402
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
MODES = ("lowest", "nf4")
UNSLOTH_8B = {8: 2_972, 12: 21_848, 16: 40_724, 24: 78_475, 40: 153_977, 80: 342_733}
RANK = 16
SHORT_ROW = 1024
PROBE_ROWS = (8192, 16_384)
MULTIPLE = 128
MARGIN_SHARE = 0.005
"""Of the cap, for what the allocator rounds up."""
ATTENTION_FLOPS, PRODUCT_FLOPS, PIN_BYTES_PER_SECOND = 3.2e14, 6e14, 2.5e9
"""For estimates only: what an H200 reaches in long rows, and page-locking of host memory."""
HOST_SHARE = 0.6
MAX_TRIES = 7
WORTH_ANOTHER_TRY = 1.02
CLIMB_SECONDS = 20.0
FIRST_GUESS_BYTES_PER_TOKEN = 60_000
"""Of an 8B shape, to choose between the whole model and few layers before anything is measured."""


def step_seconds(shape: dict[str, Any], num_tokens: int, num_layers: int) -> float:
    """Estimate of a step: attention forward twice and backward once (5.5 forward passes), products three times."""
    hidden, queries = shape["hidden_size"], shape["num_attention_heads"] * shape["head_dim"]
    keys = shape["num_key_value_heads"] * shape["head_dim"]
    attention = 5.5 * 2 * num_tokens**2 * queries
    products = 6 * hidden * (2 * queries + 2 * keys + 3 * shape["intermediate_size"]) * num_tokens
    head = 4 * hidden * shape["vocab_size"] * num_tokens
    host = num_layers * pinned_bytes(shape, num_tokens) / PIN_BYTES_PER_SECOND
    return num_layers * (attention / ATTENTION_FLOPS + products / PRODUCT_FLOPS) + head / PRODUCT_FLOPS + host


def affordable(shape: dict[str, Any], num_layers: int, seconds: float) -> int:
    """The longest row, a multiple of MULTIPLE, whose step takes no longer, by estimate."""
    low, high = 0, 1 << 26
    while high - low > MULTIPLE:
        middle = (low + high) // 2
        low, high = (middle, high) if step_seconds(shape, middle, num_layers) <= seconds else (low, middle)
    return low // MULTIPLE * MULTIPLE


def pinned_bytes(shape: dict[str, Any], num_tokens: int) -> int:
    """Host memory of one layer's input: torch rounds page-locked blocks up to powers of two."""
    return 1 << math.ceil(math.log2(max(1, num_tokens * shape["hidden_size"] * 2)))


@dataclass(frozen=True)
class Line:
    """Bytes of the device that a row takes: fixed + per_token · T."""

    fixed: float
    per_token: float

    @classmethod
    def through(cls, first: tuple[int, float], second: tuple[int, float]) -> Line:
        """Two (tokens, bytes)."""
        per_token = (second[1] - first[1]) / (second[0] - first[0])
        return cls(first[1] - per_token * first[0], per_token)

    def corrected(self, num_tokens: int, num_bytes: float) -> Line:
        """With the same beginning, through what a row took."""
        return Line(self.fixed, (num_bytes - self.fixed) / num_tokens)

    def longest(self, num_bytes: float) -> int:
        """Tokens that fit, a multiple of MULTIPLE."""
        return max(0, int((num_bytes - self.fixed) / self.per_token)) // MULTIPLE * MULTIPLE


# One process: one model, several caps
# --------------------------------------------------------------------------------------------------------------


class Model:
    """A model with `num_layers` of the shape's layers, its optimiser, and the memory of the layers that it lacks."""

    def __init__(self, shape: str, num_layers: int, *, mode: str) -> None:
        self.shape = SHAPES[shape]
        self.num_layers = num_layers
        dtype = "bfloat16" if DEVICE.type == "cuda" else "float32"
        spec = {"model": shape, "layers": num_layers, "nf4": True, "dtype": dtype, "rows": 1, "length": SHORT_ROW}
        spec["lowest"] = mode == "lowest"
        self._num_ids = num_token_ids(spec)
        self.model, self._optimizer, self.engine = affina_system.prepare(spec, {"graphs": False})
        while self.engine.make_room() is not None:
            pass
        self._ballast: torch.Tensor | None = None
        self.step(SHORT_ROW if DEVICE.type == "cuda" else 64)

    @property
    def layer_bytes(self) -> int:
        """Of one layer on the device: frozen weights, and adapter with gradient, two moments and 16-bit copy."""
        layer = self.model.get_base_model().model.layers[0]
        tensors = [*layer.named_parameters(), *layer.named_buffers()]
        frozen = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for n, t in tensors if ".lora_" not in n}
        adapter = sum(t.numel() for n, t in tensors if ".lora_" in n and t.device.type == DEVICE.type)
        return sum(frozen.values()) + adapter * (4 + 4 + 8 + 2)

    def describe(self) -> dict[str, Any]:
        vocabulary = self.model.get_base_model().get_input_embeddings().weight.dtype
        return {"policy": self.engine.policy.describe(), "vocabulary": str(vocabulary).removeprefix("torch.")}

    def take_ballast(self, num_tokens: int) -> float:
        """Take what the missing layers would hold of the device; GiB."""
        missing = self.shape["num_hidden_layers"] - self.num_layers
        num_bytes = missing * (self.layer_bytes + num_tokens * RANK * 2)
        if num_bytes and DEVICE.type == "cuda":
            self._ballast = torch.empty(num_bytes, dtype=torch.uint8, device=DEVICE)
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
        result = None
        try:
            reset_peak()
            ballast = self.take_ballast(num_tokens)
            result = {**self.step(num_tokens), **peak_gib(), "ballast_gib": round(ballast, 3)}
        except torch.OutOfMemoryError:
            pass
        # Outside of the handler, where the error no longer holds the failed step's tensors.
        self._optimizer.zero_grad(set_to_none=True)
        self._ballast = None
        gc.collect()
        reset_peak()
        return result

    def line(self, lengths: Sequence[int]) -> Line:
        """Through what rows of two lengths take, without a cap."""
        cap_memory({"cap_gib": math.inf})
        points = []
        for length in lengths:
            found = self.attempt(length)
            assert found is not None, f"{length} tokens do not fit into the whole card"
            points.append((length, found["reserved_gib"] * GIB))
        return Line.through(*points) if points[1][1] > points[0][1] else Line(0.0, FIRST_GUESS_BYTES_PER_TOKEN)


def search(
    model: Model, cap_gib: float, line: Line, deadline: records.Deadline, *, most_seconds: float, longest: int | None
) -> tuple[dict[str, Any], Line]:
    """(The longest row under the cap that was seen to train; the line through it.)

    most_seconds: of one step, by estimate; a row that time bounds and not memory is recorded as such
    longest:      that is tried at all
    """
    cap_memory({"cap_gib": cap_gib})
    usable = cap_gib * GIB * (1 - MARGIN_SHARE)
    bound = affordable(model.shape, model.num_layers, min(most_seconds, deadline.left))
    if longest is not None:
        bound = min(bound, longest)
    length = min(line.longest(usable), bound)
    record: dict[str, Any] = {
        "predicted_tokens": line.longest(usable),
        "bytes_per_token": round(line.per_token),
        "fixed_gib": round(line.fixed / GIB, 3),
        "tries": [],
    }
    best: dict[str, Any] | None = None
    while length >= MULTIPLE and len(record["tries"]) < MAX_TRIES:
        found = model.attempt(length)
        record["tries"].append({"tokens": length, "fits": found is not None})
        print(f"  {cap_gib} GiB, {length:,} tokens: {found or 'does not fit'}", flush=True)
        if found is None:
            if best is not None:
                break
            length = int(length * 0.95) // MULTIPLE * MULTIPLE
            continue
        best = {"tokens": length, "bounded_by": "time" if length >= bound else "memory", **found}
        if found["reserved_gib"] * GIB > line.fixed:
            line = line.corrected(length, found["reserved_gib"] * GIB)
        more = min(line.longest(usable), bound)
        has_failed = not all(one["fits"] for one in record["tries"])
        if has_failed or more < WORTH_ANOTHER_TRY * length or found["seconds"] > CLIMB_SECONDS:
            break
        if deadline.left < step_seconds(model.shape, more, model.num_layers):
            break
        length = more
    why = "no time was left" if bound < MULTIPLE else "no length fits"
    return {**record, **(best or {"error": why})}, line


def run_process(request: dict[str, Any], output: Path) -> None:
    """All caps of one shape on one model, written after each."""
    deadline = records.Deadline(request["seconds"])
    started = time.perf_counter()
    model = Model(request["shape"], request["num_layers"], mode=request["mode"])
    line = model.line(PROBE_ROWS if request["longest"] is None else (64, 128))
    prepared = round(time.perf_counter() - started, 1)
    found: list[dict[str, Any]] = []
    for cap in request["caps"]:
        record = {"cap_gib": cap, "prepare_seconds": prepared, **model.describe()}
        try:
            most_seconds, longest = request["most_seconds"], request["longest"]
            result, line = search(model, cap, line, deadline, most_seconds=most_seconds, longest=longest)
            record |= result
        except Exception as error:  # noqa: BLE001 - the other caps are still worth their time
            record["error"] = f"{type(error).__name__}: {error}"[:800]
        found.append(record)
        records.write(output, {"records": found})


# All of them
# --------------------------------------------------------------------------------------------------------------


def choose_layers(shape: dict[str, Any], num_tokens: int, *, full_seconds: float, few_layers: int) -> int:
    """All layers where their step is affordable, else `few_layers`."""
    layers: int = shape["num_hidden_layers"]
    host = layers * pinned_bytes(shape, num_tokens)
    is_affordable = step_seconds(shape, num_tokens, layers) <= full_seconds
    return layers if is_affordable and host <= HOST_SHARE * psutil.virtual_memory().available else few_layers


def first_guess(shape: dict[str, Any], cap_gib: float) -> int:
    """Tokens, from the weights in NF4, embedding and head in 16 bits, and a guess of what a token takes."""
    hidden, queries = shape["hidden_size"], shape["num_attention_heads"] * shape["head_dim"]
    keys = shape["num_key_value_heads"] * shape["head_dim"]
    weights = shape["num_hidden_layers"] * hidden * (2 * queries + 2 * keys + 3 * shape["intermediate_size"])
    vocabulary = shape["vocab_size"] * hidden * (1 if shape["tie_word_embeddings"] else 2)
    free = cap_gib * GIB - weights * 0.52 - vocabulary * 2 - GIB
    return max(MULTIPLE, int(free / (FIRST_GUESS_BYTES_PER_TOKEN * hidden / 4096)))


Report = Callable[[list[dict[str, Any]]], None]
"""Told all records of a shape that there are so far."""


def measure(
    name: str,
    mode: str,
    caps: Sequence[float],
    arguments: argparse.Namespace,
    deadline: records.Deadline,
    report: Report,
) -> None:
    """One shape and mode: the caps whose whole model is affordable in one process, the others in another."""
    shape = SHAPES[name]
    few = min(arguments.layers, shape["num_hidden_layers"])
    by_layers: dict[int, list[float]] = {}
    for cap in caps:
        guess = first_guess(shape, cap)
        layers = choose_layers(shape, guess, full_seconds=arguments.full_seconds, few_layers=few)
        by_layers.setdefault(layers, []).append(cap)
    finished: list[dict[str, Any]] = []
    for num_layers, some in by_layers.items():

        def report_all(
            new: list[dict[str, Any]], before: Sequence[Any] = tuple(finished), count: int = num_layers
        ) -> None:
            report([*before, *(completed(record, name, mode, count) for record in new)])

        new = measure_in_process(name, mode, num_layers, some, arguments, deadline, report_all)
        report_all(new)
        finished += [completed(record, name, mode, num_layers) for record in new]


def completed(record: dict[str, Any], name: str, mode: str, num_layers: int) -> dict[str, Any]:
    """A process's record with what it stands for, and what it compares with."""
    shape = SHAPES[name]
    record = {**record, "shape": name, "mode": mode}
    record |= {"measured_layers": num_layers, "num_layers": shape["num_hidden_layers"]}
    if "tokens" in record:
        inputs = shape["num_hidden_layers"] * record["tokens"] * shape["hidden_size"] * 2
        record["host_gib"] = round(inputs / GIB, 1)
    if name == "qwen3-8b":
        record["unsloth_tokens"] = UNSLOTH_8B.get(record["cap_gib"])
    return record


def measure_in_process(
    shape: str,
    mode: str,
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
                "mode": mode,
                "num_layers": num_layers,
                "caps": left,
                "seconds": deadline.left - 10,
                "most_seconds": arguments.step_seconds,
                "longest": 256 if arguments.tiny else None,
            }
            print(f"{shape}, {mode}, {num_layers} layers, caps {left}", flush=True)
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


def key_of(record: dict[str, Any]) -> tuple[str, str, float]:
    return record["shape"], record["mode"], record["cap_gib"]


def summary(found: Sequence[dict[str, Any]]) -> str:
    lines = []
    for record in found:
        head = f"{record['shape']:10} {record['mode']:7} {record['cap_gib']:>5} GiB"
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
    parser.add_argument("--modes", default="lowest", help=f"of {', '.join(MODES)}, by comma")
    parser.add_argument("--caps", default=",".join(map(str, CAPS)), help="GiB, by comma")
    parser.add_argument("--seconds", type=float, default=300.0, help="for everything")
    parser.add_argument("--step-seconds", type=float, default=90.0, help="longest step, by estimate")
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
    modes = arguments.modes.split(",")
    if unknown := set(modes) - set(MODES):
        raise SystemExit(f"unknown modes: {', '.join(sorted(unknown))}; there are {', '.join(MODES)}")
    caps = sorted(float(cap) if "." in cap else int(cap) for cap in arguments.caps.split(","))
    deadline = records.Deadline(arguments.seconds)
    old = records.read(arguments.output) or {"records": []}
    record: dict[str, Any] = {**records.environment(device_name()), "rank": RANK, "weights": "NF4"}
    redone = {(shape, mode, cap) for shape in shapes for mode in modes for cap in caps}
    kept = [one for one in old["records"] if key_of(one) not in redone]
    finished: list[dict[str, Any]] = []
    newest: list[dict[str, Any]] = []

    def report(new: list[dict[str, Any]]) -> None:
        newest[:] = new
        merged = sorted(kept + finished + new, key=key_of)
        records.write(arguments.output, {**record, "records": merged})

    for shape, mode in product(shapes, modes):
        measure(shape, mode, caps, arguments, deadline, report)
        finished += newest
    print(summary(finished), flush=True)


if __name__ == "__main__":
    main()
