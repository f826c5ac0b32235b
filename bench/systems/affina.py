"""affina's fast engine with its own loop's pieces: objective, clipping, optimiser."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from affina.data.collate import Batch, collate
from affina.data.samples import Sample
from affina.models.adapters import attach_adapter
from affina.models.engines import trainable_parameters
from affina.models.families import Unsupported
from affina.models.fast import attach_fast_engine
from affina.models.weights import Fp8Options, Nf4Options, quantize_linears
from affina.training.loop import apply_gradients
from affina.training.objectives.sft import sft_objective
from affina.training.optim import OptimizerOptions, build_optimizer
from systems.common import TARGETS, main, packed_rows, random_model, time_steps


def batches_of(spec: dict[str, Any], count: int = 4) -> list[Batch]:
    """Packed rows of random tokens, every one but a document's first supervised."""
    generator = np.random.default_rng(1)
    total = spec["rows"] * spec["length"]
    if spec.get("packed"):
        rows = packed_rows(total, count)
    else:
        rows = [[spec["length"]] * spec["rows"]] * count
    batches = []
    for lengths in rows:
        samples = []
        for length in lengths:
            ids = generator.integers(0, 151_000 if spec.get("model") != "llama-3.1-8b" else 128_000, length)
            samples.append(Sample(ids.astype(np.int32), ids.astype(np.int32)))
        batches.append(collate(samples, num_tokens=total, pad_token_id=0).to("cuda"))
    return batches


def prepare(spec: dict[str, Any], setting: dict[str, Any]) -> tuple[Any, Any, Any]:
    """(model, optimiser, engine)"""
    if not setting.get("deterministic", True):
        torch.use_deterministic_algorithms(False)
    else:  # what a run does by default
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False
    model = random_model(spec).eval().requires_grad_(False)
    options = Nf4Options() if spec.get("nf4") else Fp8Options() if spec.get("fp8") else None
    if options is not None:
        quantize_linears(model, options, exclude=[model.get_output_embeddings()])
        torch.cuda.empty_cache()
    adapted = attach_adapter(model, rank=spec.get("rank", 16), alpha=32.0, targets=TARGETS)
    memory = setting.get("memory_gib")
    engine = attach_fast_engine(
        adapted,
        row_tokens=spec["rows"] * spec["length"],
        budget_bytes=int(memory * 2**30) if memory else None,
        recompute=setting.get("recompute", "auto"),
    )
    if isinstance(engine, Unsupported):
        raise SystemExit(f"the fast engine does not run: {engine.reason}")
    if setting.get("graphs", True):
        engine.enable_graphs(print)
    optimizer = build_optimizer(trainable_parameters(adapted), OptimizerOptions("adamw"))
    return adapted, optimizer, engine


def one_step(model: Any, optimizer: Any, batch: Batch) -> tuple[int, float]:
    """Forward, backward, clip, update: (tokens that are not padding, loss per token)."""
    loss, count = sft_objective(model, batch)
    (loss / count).backward()
    apply_gradients(optimizer, trainable_parameters(model), 1e-4, max_norm=1.0, loss_scale=1.0)
    optimizer.zero_grad(set_to_none=True)
    return batch.num_tokens, float(loss.detach()) / count


def measure(spec: dict[str, Any], setting: dict[str, Any], folder: Path) -> dict[str, Any]:
    started = time.perf_counter()
    model, optimizer, engine = prepare(spec, setting)
    batches = batches_of(spec)
    prepared = time.perf_counter() - started
    result = time_steps(lambda index: one_step(model, optimizer, batches[index % len(batches)]))
    captured = f"{len(engine.graphs.captured)} graphs" if engine.graphs is not None else "eager"
    note = f"{engine.policy.describe()}; {captured}"
    return {**result, "note": note, "prepare_seconds": round(prepared, 1)}


if __name__ == "__main__":
    main(measure)
