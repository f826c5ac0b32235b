"""A thousand steps of the fast engine: does memory grow, and does the same training give the same bits?

    python bench/leak.py [--steps 1000] [--seconds 90] [--phases graphs,offloaded,reference]
                         [--output bench/results/leak.json] [--tiny]

A Qwen3 of two layers of width 1,024 on NF4 weights, rows of 2,048 random tokens in 2 to 24 documents, new ones each
step, and one evaluation every 50 steps. Three phases: captured graphs with everything kept; every layer's input in host
memory, launch by launch; the reference engine.

Every 50 steps: bytes that tensors hold on the device, bytes that the allocator has from it, the process's resident
memory, the number of living tensors on the device. After a warm-up of the first fifth of the steps a phase is *without
a leak* when the device bytes and the number of tensors have not grown at all, and resident memory grows by less than
4 KiB a step on a least-squares line: one memory page a step is what cannot be told from the noise of Python's own
allocator. What torch's allocator has from the device is recorded, not judged: a new size of row may make it ask for a
new block at any time.

Determinism: 50 steps from the same start, twice; *the same bits* are equal losses and equal adapter bytes.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import json
import sys
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
from systems import common  # noqa: E402
from systems.affina import adapted_model, be_deterministic, one_step, random_batch, restart_adapter  # noqa: E402
from systems.common import DEVICE, device_name, synchronize  # noqa: E402

from affina.data.collate import Batch  # noqa: E402
from affina.models.engines import trainable_parameters  # noqa: E402
from affina.models.families import Unsupported  # noqa: E402
from affina.models.fast import attach_fast_engine, detach_fast_engine, fast_engine_of  # noqa: E402
from affina.models.forward import supervised_loss  # noqa: E402
from affina.training.optim import OptimizerOptions, build_optimizer  # noqa: E402

SHAPE: dict[str, Any] = {
    **common.QWEN3_4B,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 2,
    "num_attention_heads": 16,
    "vocab_size": 32_000,
}
ROW_TOKENS = 2048
MOST_DOCUMENTS = 24
RECORD_EVERY = 50
COUNT_EVERY = 4
"""Records; the first and the last are counted as well."""
WARM_UP_SHARE = 0.2
MAX_RESIDENT_BYTES_PER_STEP = 4096
REPEATED_STEPS = 50
PHASES = ("graphs", "offloaded", "reference")


def new_batch(generator: np.random.Generator, row_tokens: int, num_ids: int) -> Batch:
    """A row of random documents that fill it but for some padding.

    Two at least: a row that is one document has a graph of its own, and one captured late would look like a leak.
    """
    num_documents = int(generator.integers(2, min(MOST_DOCUMENTS, row_tokens // 8) + 1))
    used = row_tokens - int(generator.integers(0, row_tokens // 8))
    cuts = np.sort(generator.choice(np.arange(1, used), num_documents - 1, replace=False))
    lengths = np.diff([0, *cuts.tolist(), used]).tolist()
    return random_batch(lengths, num_tokens=row_tokens, num_ids=num_ids, generator=generator)


def memory(step: int, *, counts_tensors: bool) -> dict[str, Any]:
    """What is held now. Garbage in reference cycles counts as held on the device, but not among the living tensors.

    num_tensors: on the device; counted now and then, since it takes a look at every Python object
    """
    synchronize()
    allocated = torch.cuda.memory_allocated() if DEVICE.type == "cuda" else 0
    reserved = torch.cuda.memory_reserved() if DEVICE.type == "cuda" else 0
    num_tensors = None
    if counts_tensors:
        gc.collect()
        num_tensors = sum(issubclass(type(thing), torch.Tensor) and thing.is_cuda for thing in gc.get_objects())
    return {
        "step": step,
        "allocated_bytes": allocated,
        "reserved_bytes": reserved,
        "resident_bytes": psutil.Process().memory_info().rss,
        "num_tensors": num_tensors,
    }


def judge(samples: Sequence[dict[str, Any]], num_steps: int) -> dict[str, Any]:
    """Growth after the warm-up, and whether it is a leak."""
    kept = [sample for sample in samples if sample["step"] >= WARM_UP_SHARE * num_steps]
    if len(kept) < 3:
        return {"is_leak_free": None, "why": "too few samples after the warm-up"}
    growth = {}
    for name in ("allocated_bytes", "reserved_bytes", "num_tensors"):
        values = [sample[name] for sample in kept if sample[name] is not None]
        growth[f"{name}_growth"] = values[-1] - values[0] if values else 0
    held = max(growth["allocated_bytes_growth"], growth["num_tensors_growth"])
    steps = [sample["step"] for sample in kept]
    slope = float(np.polyfit(steps, [sample["resident_bytes"] for sample in kept], 1)[0])
    return {
        **growth,
        "resident_bytes_per_step": round(slope, 1),
        "max_resident_bytes_per_step": MAX_RESIDENT_BYTES_PER_STEP,
        "is_leak_free": held <= 0 and slope < MAX_RESIDENT_BYTES_PER_STEP,
    }


class Trainee:
    """A model with an adapter, and how it takes a step."""

    def __init__(self, row_tokens: int) -> None:
        self.row_tokens = row_tokens
        dtype = "bfloat16" if DEVICE.type == "cuda" else "float32"
        self.model = adapted_model({"model": "leak", "dtype": dtype, "nf4": True})
        self.model.train()
        self.notes: list[str] = []

    def switch_to(self, phase: str) -> None:
        """graphs: the fast engine with everything kept; offloaded: its leanest policy; reference."""
        if phase not in PHASES:
            raise RuntimeError(f"unknown phase {phase}; there are {', '.join(PHASES)}")
        if phase == "reference":
            detach_fast_engine(self.model)
            return
        engine = fast_engine_of(self.model)
        if engine is None:
            attached = attach_fast_engine(self.model, row_tokens=self.row_tokens, recompute=False)
            if isinstance(attached, Unsupported):
                raise RuntimeError(f"the fast engine does not run: {attached.reason}")
            engine = attached
        if phase == "graphs" and DEVICE.type == "cuda":
            engine.enable_graphs(self.notes.append)
        if phase == "offloaded":
            engine.graphs = None
            while engine.make_room() is not None:
                pass

    def describe(self) -> str:
        engine = fast_engine_of(self.model)
        if engine is None:
            return "transformers' forward pass"
        graphs = f"{len(engine.graphs.captured)} shapes captured" if engine.graphs is not None else "no graphs"
        return f"layers keep {engine.policy.describe()}; {graphs}"

    def train(self, num_steps: int, seed: int, observe: Callable[[int], bool]) -> list[float]:
        """Losses of steps from the adapter's start on; `observe` is told each step's number and may end it."""
        restart_adapter(self.model, seed)
        generator = np.random.default_rng(seed)
        optimizer = build_optimizer(trainable_parameters(self.model), OptimizerOptions("adamw"))
        losses = []
        num_ids = int(common.SHAPES["leak"]["vocab_size"])
        for step in range(1, num_steps + 1):
            batch = new_batch(generator, self.row_tokens, num_ids)
            losses.append(one_step(self.model, optimizer, batch)[1])
            if step % RECORD_EVERY == 0:
                with torch.no_grad():
                    supervised_loss(self.model, batch)
            if not observe(step):
                break
        return losses

    def digest(self) -> str:
        """sha256 of the adapter's bytes."""
        total = hashlib.sha256()
        for parameter in self.model.parameters():
            if parameter.requires_grad:
                total.update(parameter.detach().cpu().contiguous().numpy().tobytes())
        return total.hexdigest()


def run_phase(
    trainee: Trainee, phase: str, num_steps: int, record_every: int, deadline: records.Deadline
) -> dict[str, Any]:
    trainee.switch_to(phase)
    samples: list[dict[str, Any]] = []

    def observe(step: int) -> bool:
        if step % record_every == 0:
            is_last = step + record_every > num_steps
            samples.append(memory(step, counts_tensors=is_last or len(samples) % COUNT_EVERY == 0))
        return deadline.left > 0

    repeated = min(REPEATED_STEPS, num_steps)
    first = (trainee.train(repeated, 1, lambda _: True), trainee.digest())
    second = (trainee.train(repeated, 1, lambda _: True), trainee.digest())
    started = time.perf_counter()
    losses = trainee.train(num_steps, 2, observe)
    synchronize()
    seconds = time.perf_counter() - started
    return {
        "phase": phase,
        "engine": trainee.describe(),
        "notes": list(trainee.notes),
        "num_steps": len(losses),
        "milliseconds_per_step": round(seconds / len(losses) * 1e3, 2),
        "is_finite": bool(np.isfinite(losses).all()),
        **judge(samples, len(losses)),
        "repeated_steps": repeated,
        "is_repeatable": first == second,
        "largest_loss_difference": max(abs(a - b) for a, b in zip(first[0], second[0], strict=True)),
        "digest": first[1],
        "samples": samples,
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000, help="of each phase")
    parser.add_argument("--phases", default=",".join(PHASES))
    parser.add_argument("--seconds", type=float, default=90.0, help="for all phases; each is cut short after its share")
    parser.add_argument("--output", type=Path, default=records.RESULTS / "leak.json")
    parser.add_argument("--tiny", action="store_true")
    arguments = parser.parse_args(argv)
    if DEVICE.type != "cuda" and not arguments.tiny:
        raise SystemExit("there is no GPU; --tiny tries the script on a CPU")
    deadline = records.Deadline(arguments.seconds)
    be_deterministic()
    common.SHAPES["leak"] = common.QWEN3_TINY if arguments.tiny else SHAPE
    row_tokens = 128 if arguments.tiny else ROW_TOKENS
    record: dict[str, Any] = {
        **records.environment(device_name()),
        "model": common.SHAPES["leak"],
        "row_tokens": row_tokens,
        "phases": [],
    }
    trainee = Trainee(row_tokens)
    phases = arguments.phases.split(",")
    for index, phase in enumerate(phases):
        share = records.Deadline(deadline.left / (len(phases) - index))
        try:
            found = run_phase(trainee, phase, arguments.steps, 5 if arguments.tiny else RECORD_EVERY, share)
        except Exception as error:  # noqa: BLE001 - the other phases are still worth their time
            found = {"phase": phase, "error": f"{type(error).__name__}: {error}"[:1500]}
        record["phases"].append(found)
        records.write(arguments.output, record)
        print(json.dumps({key: value for key, value in found.items() if key != "samples"}), flush=True)


if __name__ == "__main__":
    main()
